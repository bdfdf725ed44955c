"""A solution of exercise 8: what replaces the sheet's code of the same name."""

import numpy as np
from numba import get_num_threads, get_thread_id, njit, prange


@njit(parallel=True)
def bias_gradient(dout, db):
    n, channels = dout.shape
    sums = np.zeros((get_num_threads(), channels))  # a row for each thread
    for i in prange(n):
        row = sums[get_thread_id()]
        for c in range(channels):
            row[c] += dout[i, c]
    for c in range(channels):
        db[c] = sums[:, c].sum()
