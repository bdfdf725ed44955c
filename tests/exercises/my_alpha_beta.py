"""A solution of exercise 6: what replaces the sheet's code of the same name."""

import csv

import numpy as np


def fit(sizes, seconds):
    # Least squares of the relative errors: each equation is divided by its time.
    seconds = np.array(seconds)
    equations = np.stack([np.ones(len(sizes)), sizes], axis=1)
    solution, *_ = np.linalg.lstsq(equations / seconds[:, None], np.ones(len(sizes)), rcond=None)
    return tuple(solution)


def ring_seconds(alpha, beta, ranks, n_bytes):
    messages = 2 * (ranks - 1)
    return messages * (alpha + beta * n_bytes / ranks)


def logged_seconds(path):
    with open(path) as file:
        rows = list(csv.DictReader(file))
    training = [row for row in rows if row["type"] == "0"][-1]
    batches = [row for row in rows if row["type"] == "2" and row["epoch"] == training["epoch"]]
    return float(training["communication"]) / len(batches)
