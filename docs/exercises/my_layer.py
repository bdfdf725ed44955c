"""Exercise 1: PReLU, a layer with a parameter for each channel."""

import numpy as np

from common import Layer, check_gradient


class PReLU(Layer):
    """y = x where x > 0, else a · x: He et al., "Delving Deep into Rectifiers", 2015."""

    param_names = ("a",)

    def __init__(self, channels, dtype=np.float32):
        self.a = np.full(channels, 0.25, dtype)
        self.da = np.zeros_like(self.a)

    def forward(self, x):
        """x (..., channels) → the same shape"""
        return x  # TODO

    def backward(self, dout):
        """dout (..., channels) → dx, the same shape; writes da"""
        return dout  # TODO


if __name__ == "__main__":
    layer = PReLU(3, dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3))
    print(f"largest error of the gradients: {check_gradient(layer, x):.1e}")
