"""Exercise 8: a race in prange."""

import numpy as np
from numba import get_num_threads, get_thread_id, njit, prange


@njit(parallel=True)
def bias_gradient(dout, db):
    """db (C,) = the sum of dout (N, C) over the images."""
    db[:] = 0
    for i in prange(dout.shape[0]):  # TODO: a race
        for c in range(dout.shape[1]):
            db[c] += dout[i, c]


if __name__ == "__main__":
    dout = np.random.default_rng(0).integers(0, 9, (200_000, 16)).astype(np.float64)
    db = np.empty(16)
    wrong = 0
    for _ in range(20):
        bias_gradient(dout, db)
        wrong += int((db != dout.sum(axis=0)).any())
    print(f"{get_num_threads()} threads: {wrong} of 20 runs are wrong")
