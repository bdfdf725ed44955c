"""A solution of exercise 1: what replaces the sheet's code of the same name."""

import numpy as np

from common import Layer


class PReLU(Layer):
    param_names = ("a",)

    def __init__(self, channels, dtype=np.float32):
        self.a = np.full(channels, 0.25, dtype)
        self.da = np.zeros_like(self.a)

    def forward(self, x):
        self.x = x
        return np.where(x > 0, x, self.a * x)

    def backward(self, dout):
        # a is used where x is negative, once for each element of its channel: da is the sum.
        from_elements = dout * np.minimum(self.x, 0)
        self.da[...] = from_elements.sum(axis=tuple(range(dout.ndim - 1)))
        return dout * np.where(self.x > 0, 1, self.a)
