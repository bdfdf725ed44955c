"""A solution of exercise 7: what replaces the sheet's code of the same name."""

import csv


def amdahl(share, ranks):
    return 1 / (share + (1 - share) / ranks)


def gustafson(share, ranks):
    return ranks - share * (ranks - 1)


def karp_flatt(speedup, ranks):
    return (1 / speedup - 1 / ranks) / (1 - 1 / ranks)


def last_training(path):
    """The row of the last epoch's training."""
    with open(path) as file:
        return [row for row in csv.DictReader(file) if row["type"] == "0"][-1]


def serial_share(path):
    row = last_training(path)
    parallel = sum(float(row[name]) for name in ("loading", "forward", "backward"))
    return 1 - parallel / float(row["duration"])


def speedup(serial_path, parallel_path):
    serial = last_training(serial_path)
    parallel = last_training(parallel_path)
    return float(parallel["images_per_s"]) / float(serial["images_per_s"])
