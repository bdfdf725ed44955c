"""A solution of exercise 8: what replaces the sheet's code of the same name."""

import numpy as np
from numba import get_num_threads, get_thread_id, njit, prange


@njit(parallel=True)
def count_labels(labels, counts):
    partial_counts = np.zeros((get_num_threads(), len(counts)), np.int64)  # a row for each thread
    for i in prange(len(labels)):
        partial_counts[get_thread_id(), labels[i]] += 1
    for c in range(len(counts)):
        counts[c] = partial_counts[:, c].sum()
