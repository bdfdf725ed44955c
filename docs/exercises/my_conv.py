"""Exercise 2: a dilated convolution, from loops to im2col."""

import time

import numpy as np

from common import Conv2D, limit_blas_threads


class DilatedConv2D(Conv2D):
    """A convolution whose kernel takes every d-th pixel; the output is as large as the input.

    Yu and Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions", 2016.
    """

    def __init__(self, c_in, c_out, kernel_size=3, dilation=2, *, rng=None, dtype=np.float32):
        padding = dilation * (kernel_size // 2)
        super().__init__(c_in, c_out, kernel_size, 1, padding, rng=rng, dtype=dtype)
        self.dilation = dilation

    def forward(self, x):
        """x (N, H, W, C_in) → out (N, H, W, C_out)"""
        n, h, w, _ = x.shape
        p = self.padding
        d = self.dilation
        reach = d * (self.kernel_size - 1) + 1  # pixels from the first to the last of a window

        self.padded = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
        W = self.W.reshape(-1, self.b.size)  # (K·K·C_in, C_out)
        out = np.empty((n, h, w, self.b.size), x.dtype)
        for i in range(h):  # TODO: no loop over i and j
            for j in range(w):
                window = self.padded[:, i : i + reach : d, j : j + reach : d]  # (N, K, K, C_in)
                out[:, i, j] = window.reshape(n, -1) @ W + self.b
        return out

    def backward(self, dout):
        """dout (N, H, W, C_out) → dx (N, H, W, C_in); writes dW and db"""
        n, h, w, _ = dout.shape
        p = self.padding
        d = self.dilation
        reach = d * (self.kernel_size - 1) + 1

        W = self.W.reshape(-1, self.b.size)
        dW = np.zeros_like(W)
        dpadded = np.zeros_like(self.padded)
        for i in range(h):  # TODO: a loop over the places of the kernel instead
            for j in range(w):
                window = self.padded[:, i : i + reach : d, j : j + reach : d]
                dW += window.reshape(n, -1).T @ dout[:, i, j]
                dwindow = (dout[:, i, j] @ W.T).reshape(window.shape)
                dpadded[:, i : i + reach : d, j : j + reach : d] += dwindow

        self.dW[...] = dW.reshape(self.W.shape)
        self.db[...] = dout.sum(axis=(0, 1, 2))
        return dpadded[:, p : p + h, p : p + w]


if __name__ == "__main__":
    limit_blas_threads(1)
    layer = DilatedConv2D(32, 64)
    for size in (8, 16, 32):
        x = np.random.default_rng(0).standard_normal((32, size, size, 32)).astype(np.float32)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            layer.backward(layer.forward(x))
            best = min(best, time.perf_counter() - started)
        print(f"32 images of {size}×{size}: {1000 * best:.1f} ms")
