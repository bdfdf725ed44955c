"""Exercise 9: the roofline of two rungs of serial_cnn.py."""

import time

import numpy as np

from common import Conv2D, limit_blas_threads
from serial_cnn import Im2colConv2D


def conv_flops(n, h, w, c_in, c_out, k):
    """The operations of a convolution of n images: one for each product, one for each sum."""
    # TODO


def blocked_bytes(n, h, w, c_in, c_out, k):
    """The bytes between memory and core, if the im2col matrix stays in the cache."""
    # TODO


def im2col_bytes(n, h, w, c_in, c_out, k):
    """The bytes between memory and core, if the im2col matrix is written and read again."""
    # TODO


def attainable(intensity, peak, bandwidth):
    """The roof, in operations per second. intensity: operations per byte; peak: operations per
    second of the core; bandwidth: bytes per second of the memory."""
    # TODO


def fastest(function, repeats=10):
    """The least seconds of a call."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main():
    limit_blas_threads(1)
    a = np.ones((1024, 1024), np.float32)
    peak = 2 * 1024**3 / fastest(lambda: a @ a)
    source = np.ones(32 * 2**20, np.float32)
    target = np.empty_like(source)
    bandwidth = 2 * source.nbytes / fastest(lambda: np.copyto(target, source))
    print(f"peak {peak / 1e9:.0f} GFLOP/s, memory {bandwidth / 1e9:.1f} GB/s")

    shape = (32, 16, 16, 32, 64, 3)  # the CNN's second convolution, batch 32
    x = np.ones((32, 16, 16, 32), np.float32)
    rungs = (("im2col", Im2colConv2D, im2col_bytes), ("blocked", Conv2D, blocked_bytes))
    for name, layer_class, count_bytes in rungs:
        layer = layer_class(32, 64)
        intensity = conv_flops(*shape) / count_bytes(*shape)
        roof = attainable(intensity, peak, bandwidth)
        rate = conv_flops(*shape) / fastest(lambda layer=layer: layer.forward(x))
        print(
            f"{name:8} {intensity:6.1f} FLOP/byte, roof {roof / 1e9:.0f}, measured "
            f"{rate / 1e9:.0f} GFLOP/s ({rate / roof:.0%} of the roof)"
        )


if __name__ == "__main__":
    main()
