"""Exercise 6: the alpha-beta model of communication against a run log."""

import csv
import time

import numpy as np
from mpi4py import MPI

from common import make_model


def fit(sizes, seconds):
    """(alpha, beta) of T(n) = alpha + beta · n, from messages of `sizes` bytes. Small messages say
    most about alpha: let each count by its relative error, not by its seconds."""
    # TODO


def ring_seconds(alpha, beta, ranks, n_bytes):
    """The seconds of a ring allreduce of n_bytes, when all ranks send at the same time."""
    # TODO


def logged_seconds(path):
    """The seconds of communication of a step, from the last epoch of a run log."""
    # TODO


def ping_pong(comm, n_bytes, repeats=50):
    """The seconds of a message of n_bytes from rank 0 to rank 1: the least of all repeats."""
    buffer = np.zeros(n_bytes, np.uint8)
    least = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        if comm.rank == 0:
            comm.Send(buffer, 1)
            comm.Recv(buffer, 1)
        elif comm.rank == 1:
            comm.Recv(buffer, 0)
            comm.Send(buffer, 0)
        least = min(least, (time.perf_counter() - started) / 2)  # there and back
    return least


def main():
    comm = MPI.COMM_WORLD
    sizes = [2**k for k in range(3, 24)]
    seconds = [ping_pong(comm, n) for n in sizes]
    if comm.rank == 0:
        alpha, beta = fit(sizes, seconds)
        for n, measured in zip(sizes[::4], seconds[::4], strict=True):
            print(f"{n:9,} bytes: {1e6 * measured:9.1f} µs, fit {1e6 * (alpha + beta * n):9.1f} µs")
        n_bytes = make_model("cnn").grads.nbytes
        predicted = ring_seconds(alpha, beta, comm.size, n_bytes)
        logged = logged_seconds("results/ring.csv")
        print(
            f"a step of the CNN: {1000 * predicted:.2f} ms predicted, {1000 * logged:.2f} ms logged"
        )


if __name__ == "__main__":
    main()
