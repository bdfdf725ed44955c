"""Exercise 8: a race in prange."""

import numpy as np
from numba import get_num_threads, get_thread_id, njit, prange


@njit(parallel=True)
def count_labels(labels, counts):
    """counts[c] = how many of the labels (N,) are c."""
    counts[:] = 0
    for i in prange(len(labels)):  # TODO: a race
        counts[labels[i]] += 1


def main():
    labels = np.random.default_rng(0).integers(0, 10, 5_000_000)
    right = np.bincount(labels)
    counts = np.empty(10, np.int64)
    wrong = 0
    lost = 0
    for _ in range(20):
        count_labels(labels, counts)
        wrong += int((counts != right).any())
        lost = max(lost, len(labels) - counts.sum())
    print(f"{get_num_threads()} threads: {wrong} of 20 runs are wrong, up to {lost:,} labels lost")


if __name__ == "__main__":
    main()
