"""Train the CNN over MPI ranks × threads: parallel_cnn_mpi.py with layers that share a rank's images among threads.

The layers below are those of common.py as Numba kernels: the loop over the images of a rank's share is a `prange` over
OpenMP threads, and inside it each thread works through an image in buffers of its own, so that nothing but weights and
results leaves its cache. Dense layers and the optimizer are threaded too: 98 % of all parameters are theirs.

    mpirun -np 2 python parallel_cnn_hybrid.py
    mpirun -np 2 python parallel_cnn_hybrid.py --num-threads 4 --epochs 10
    python parallel_cnn_hybrid.py --num-threads 2 --global-batch-size 128
"""

import functools
import math
import os
import sys
import time

import numba
import numpy as np
from mpi4py import MPI
from numba import get_thread_id, njit, prange

from common import (
    SGD,
    Adam,
    ConvReLUPool,
    Dense,
    InputError,
    Run,
    WinogradReLUPool,
    add_rank_options,
    available_cores,
    blas_warning,
    check_equal,
    check_launcher,
    count_correct,
    epoch_order,
    evaluate,
    get_arrays,
    limit_blas_threads,
    load_batch,
    load_on_all,
    make_cnn,
    make_optimizer,
    make_parser,
    number,
    report_communication,
    run_main,
    running_on_all,
    set_arrays,
    share,
    softmax_cross_entropy,
    stop_all_on_error,
    together,
)

# ----------------------------------------------------------------------------------------------------------------------
# Threaded layers. Scratch arrays have a first axis of one entry per thread.
# ----------------------------------------------------------------------------------------------------------------------

# The compiler uses vector instructions where it can prove that loads and stores do not meet: in loops over two rows of
# channels (copy), and over one tile, whose positions lie at distances that it knows. Every step has one of these forms.

BLOCK = 32  # channels in a tile
IMAGES = 4  # at most, whose tiles one matrix product takes together: more rows a product, but still in the cache
A, B = (float(p) for p in (WinogradReLUPool.POINTS[1], WinogradReLUPool.POINTS[3]))  # 0, A, -A, B, -B and infinity

kernel = functools.partial(njit, cache=True, fastmath={"contract"})  # contract: a multiplication and an addition in one
inlined = kernel(forceinline=True)


def check_blocks(*channels):
    for c in channels:
        if c % BLOCK:
            raise ValueError(f"{c} channels: the threaded convolutions take multiples of {BLOCK}")


@inlined
def copy(source, target):
    for c in range(target.size):
        target[c] = source[c]


@inlined
def add(source, target):
    for c in range(target.size):
        target[c] += source[c]


@inlined
def pool(tile, at, right, below):
    """Of four positions the maximum → the first of them, and which was the first maximum, 0 to 3 → its right."""
    zero, one, two, three = tile.dtype.type(0), tile.dtype.type(1), tile.dtype.type(2), tile.dtype.type(3)
    for i in range(at, at + BLOCK):
        y0, y1, y2, y3 = tile[i], tile[i + right], tile[i + below], tile[i + below + right]
        upper, lower = max(y0, y1), max(y2, y3)
        upper_won, lower_won = zero if y0 >= y1 else one, two if y2 >= y3 else three
        tile[i], tile[i + right] = max(upper, lower), upper_won if upper >= lower else lower_won


@inlined
def bias_relu(y, which, b, out, won):
    """out = ReLU(y + b), won = which, 4 where ReLU is closed. All (BLOCK,)."""
    zero, four = y.dtype.type(0), y.dtype.type(4)
    for c in range(out.size):
        value = y[c] + b[c]
        closed = value <= 0  # False for NaN, which goes on to the loss
        out[c] = zero if closed else value
        won[c] = four if closed else which[c]


@inlined
def relu_gradient(dout, won, dy, which):
    """dy = dout where ReLU is open, else 0; which = won. All (BLOCK,)."""
    zero = dy.dtype.type(0)
    for c in range(dout.size):
        dy[c] = dout[c] if won[c] < 4 else zero
        which[c] = won[c]


@inlined
def unpool(tile, at, right, below):
    """From what relu_gradient has left in the first position and its right: the gradient of all four."""
    zero, one, two, three = tile.dtype.type(0), tile.dtype.type(1), tile.dtype.type(2), tile.dtype.type(3)
    for i in range(at, at + BLOCK):
        d, which = tile[i], tile[i + right]
        tile[i], tile[i + right] = d if which == zero else zero, d if which == one else zero
        tile[i + below], tile[i + below + right] = d if which == two else zero, d if which == three else zero


@inlined
def im2col(x, planes, col):
    """x (H, W, C) → col (9·C, H·W): a row for each place in a 3×3 window, columns in the order of pool()'s positions.

    planes (C, 2, H + 2, W/2 + 1): the image padded by 1, even and odd columns apart, so that col takes whole rows.
    """
    height, width, channels = x.shape
    ow = width // 2
    for h in range(height):
        for w in range(width):
            for c in range(channels):
                planes[c, (w + 1) % 2, h + 1, (w + 1) // 2] = x[h, w, c]
    for kh in range(3):
        for kw in range(3):
            for c in range(channels):
                row, to = col[(3 * kh + kw) * channels + c], 0
                for i in range(2):
                    for j in range(2):
                        odd, first = (kw + j) % 2, (kw + j) // 2
                        for h in range(i + kh, height + kh, 2):
                            copy(planes[c, odd, h, first:first + ow], row[to:to + ow])
                            to += ow


@kernel(parallel=True)
def conv_forward(x, W, b, out, won, planes, cols, ys, tiles):
    """im2col, product, bias, ReLU and pooling. x (N, H, W, C), W (9·C, F) → out, won (N, H/2, W/2, F)."""
    n, oh, ow, channels = out.shape
    for i in prange(n):
        t = get_thread_id()
        y, tile = ys[t], tiles[t]
        im2col(x[i], planes[t], cols[t])
        np.dot(cols[t].T, W, y)
        for row in range(oh * ow):
            h, w = divmod(row, ow)
            for f in range(0, channels, BLOCK):
                for k in range(4):
                    copy(y[row + k * oh * ow, f:f + BLOCK], tile[k])
                pool(tile.reshape(-1), 0, BLOCK, 2 * BLOCK)
                bias_relu(tile[0], tile[1], b[f:f + BLOCK], out[i, h, w, f:f + BLOCK], won[i, h, w, f:f + BLOCK])


@kernel(parallel=True)
def conv_backward(x, dout, won, dWs, dbs, planes, cols, ys, tiles, products):
    """Adds each image's dW (9·C, F) and db (F,) to its thread's sums."""
    n, oh, ow, channels = dout.shape
    for i in prange(n):
        t = get_thread_id()
        dy, tile = ys[t], tiles[t]
        for row in range(oh * ow):
            h, w = divmod(row, ow)
            for f in range(0, channels, BLOCK):
                relu_gradient(dout[i, h, w, f:f + BLOCK], won[i, h, w, f:f + BLOCK], tile[0], tile[1])
                add(tile[0], dbs[t, f:f + BLOCK])
                unpool(tile.reshape(-1), 0, BLOCK, 2 * BLOCK)
                for k in range(4):
                    copy(tile[k], dy[row + k * oh * ow, f:f + BLOCK])
        im2col(x[i], planes[t], cols[t])
        np.dot(cols[t], dy, products[t])
        dWs[t] += products[t]


class ThreadedConvReLUPool(ConvReLUPool):
    """ConvReLUPool for a model's first layer: kernel 3, stride 1, padding 1, even H and W, no dx.

    out_channels: a multiple of BLOCK.
    """

    def __init__(self, in_channels, out_channels, *, rng=None, dtype=np.float32):
        check_blocks(out_channels)
        super().__init__(in_channels, out_channels, rng=rng, dtype=dtype)

    def forward(self, x):
        n, h, w, c = x.shape
        if h % 2 or w % 2:
            raise ValueError(f"ThreadedConvReLUPool takes images of 2n x 2m pixels, not {h}x{w}: use ConvReLUPool")
        f, threads = self.b.size, numba.get_num_threads()
        self.x = x
        self.out = self.scratch("out", (n, h // 2, w // 2, f), x)
        self.won = self.scratch("won", (n, h // 2, w // 2, f), x, dtype=np.uint8)
        self.own = (self.scratch("planes", (threads, c, 2, h + 2, w // 2 + 1), x),
                    self.scratch("cols", (threads, 9 * c, h * w), x),
                    self.scratch("ys", (threads, h * w, f), x),
                    self.scratch("tiles", (threads, 4, BLOCK), x))  # fmt: skip
        conv_forward(x, self.W.reshape(-1, f), self.b, self.out, self.won, *self.own)
        return self.out

    def backward(self, dout):
        threads, W = numba.get_num_threads(), self.W.reshape(-1, self.b.size)
        dWs, dbs, products = (self.scratch(name, (threads, *shape), dout)
                              for name, shape in (("dWs", W.shape), ("dbs", self.b.shape), ("products", W.shape)))
        dWs.fill(0)
        dbs.fill(0)
        conv_backward(self.x, dout, self.won, dWs, dbs, *self.own, products)
        dWs.sum(axis=0, out=self.dW.reshape(W.shape))
        dbs.sum(axis=0, out=self.db)


# Winograd's transforms of one row or column of a 6×6 tile, in place; its positions lie `step` apart. Written out, the
# matrices of winograd_matrices() take a quarter of the operations.


@inlined
def transform_input(tile, start, step):
    """Bᵀ d: six values of the input."""
    a, b = tile.dtype.type(A), tile.dtype.type(B)
    for i in range(start, start + BLOCK):
        d0, d1, d2 = tile[i], tile[i + step], tile[i + 2 * step]
        d3, d4, d5 = tile[i + 3 * step], tile[i + 4 * step], tile[i + 5 * step]
        even_a, odd_a, even_b, odd_b = d4 - b * b * d2, a * (d3 - b * b * d1), d4 - a * a * d2, b * (d3 - a * a * d1)
        tile[i] = a * a * b * b * d0 - (a * a + b * b) * d2 + d4
        tile[i + step], tile[i + 2 * step] = even_a + odd_a, even_a - odd_a
        tile[i + 3 * step], tile[i + 4 * step] = even_b + odd_b, even_b - odd_b
        tile[i + 5 * step] = a * a * b * b * d1 - (a * a + b * b) * d3 + d5


@inlined
def transform_input_gradient(tile, start, step):
    """B v: transform_input transposed."""
    a, b = tile.dtype.type(A), tile.dtype.type(B)
    for i in range(start, start + BLOCK):
        v0, v5 = tile[i], tile[i + 5 * step]
        even_a, odd_a = tile[i + step] + tile[i + 2 * step], a * (tile[i + step] - tile[i + 2 * step])
        even_b, odd_b = tile[i + 3 * step] + tile[i + 4 * step], b * (tile[i + 3 * step] - tile[i + 4 * step])
        tile[i] = a * a * b * b * v0
        tile[i + step] = a * a * b * b * v5 - b * b * odd_a - a * a * odd_b
        tile[i + 2 * step] = -(a * a + b * b) * v0 - b * b * even_a - a * a * even_b
        tile[i + 3 * step] = odd_a + odd_b - (a * a + b * b) * v5
        tile[i + 4 * step] = v0 + even_a + even_b


@inlined
def transform_output(tile, start, step):
    """Aᵀ m: six products → four values of the output."""
    a, b = tile.dtype.type(A), tile.dtype.type(B)
    for i in range(start, start + BLOCK):
        even_a, odd_a = tile[i + step] + tile[i + 2 * step], a * (tile[i + step] - tile[i + 2 * step])
        even_b, odd_b = tile[i + 3 * step] + tile[i + 4 * step], b * (tile[i + 3 * step] - tile[i + 4 * step])
        tile[i] += even_a + even_b
        tile[i + step] = odd_a + odd_b
        tile[i + 2 * step] = a * a * even_a + b * b * even_b
        tile[i + 3 * step] = a * a * odd_a + b * b * odd_b + tile[i + 5 * step]


@inlined
def transform_output_gradient(tile, start, step):
    """A y: transform_output transposed, four values → six."""
    a, b = tile.dtype.type(A), tile.dtype.type(B)
    for i in range(start, start + BLOCK):
        y0, y1, y2, y3 = tile[i], tile[i + step], tile[i + 2 * step], tile[i + 3 * step]
        even_a, odd_a, even_b, odd_b = y0 + a * a * y2, a * (y1 + a * a * y3), y0 + b * b * y2, b * (y1 + b * b * y3)
        tile[i + step], tile[i + 2 * step] = even_a + odd_a, even_a - odd_a
        tile[i + 3 * step], tile[i + 4 * step] = even_b + odd_b, even_b - odd_b
        tile[i + 5 * step] = y3


ROW = 6 * BLOCK  # of a tile


@inlined
def transform_images(x, V, tile):
    """Bᵀ d B of all 6×6 tiles d, 4 apart, of images padded by 1: x (N, H, W, C) → V (36, rows, C), a row per tile."""
    n, height, width, channels = x.shape
    row, flat = 0, tile.reshape(-1)
    for i in range(n):
        for top in range(-1, height - 1, 4):
            for left in range(-1, width - 1, 4):
                for c in range(0, channels, BLOCK):
                    for h in range(top, top + 6):
                        for w in range(left, left + 6):
                            k = 6 * (h - top) + w - left
                            if 0 <= h < height and 0 <= w < width:
                                copy(x[i, h, w, c:c + BLOCK], tile[k])
                            else:
                                tile[k] = 0
                    for k in range(6):
                        transform_input(flat, k * ROW, BLOCK)
                    for k in range(6):
                        transform_input(flat, k * BLOCK, ROW)
                    for k in range(36):
                        copy(tile[k], V[k, row, c:c + BLOCK])
                row += 1


@inlined
def transform_images_gradient(dV, dx, tile):
    """transform_images transposed: dV (36, rows, C) → dx (N, H, W, C), the overlapping tiles added up."""
    n, height, width, channels = dx.shape
    row, flat = 0, tile.reshape(-1)
    dx[...] = 0
    for i in range(n):
        for top in range(-1, height - 1, 4):
            for left in range(-1, width - 1, 4):
                for c in range(0, channels, BLOCK):
                    for k in range(36):
                        copy(dV[k, row, c:c + BLOCK], tile[k])
                    for k in range(6):
                        transform_input_gradient(flat, k * BLOCK, ROW)
                    for k in range(6):
                        transform_input_gradient(flat, k * ROW, BLOCK)
                    for h in range(max(top, 0), min(top + 6, height)):
                        for w in range(max(left, 0), min(left + 6, width)):
                            add(tile[6 * (h - top) + w - left], dx[i, h, w, c:c + BLOCK])
                row += 1


@inlined
def transform_products(M, b, out, won, tile):
    """Aᵀ m A, bias, ReLU and pooling of all tiles: M (36, rows, F) → out, won (N, H/2, W/2, F)."""
    n, oh, ow, channels = out.shape
    row, flat = 0, tile.reshape(-1)
    for i in range(n):
        for top in range(0, oh, 2):
            for left in range(0, ow, 2):
                for f in range(0, channels, BLOCK):
                    for k in range(36):
                        copy(M[k, row, f:f + BLOCK], tile[k])
                    for k in range(6):
                        transform_output(flat, k * ROW, BLOCK)
                    for k in range(4):
                        transform_output(flat, k * BLOCK, ROW)
                    for h in range(2):
                        for w in range(2):
                            k = 12 * h + 2 * w
                            pool(flat, k * BLOCK, BLOCK, ROW)
                            bias_relu(tile[k], tile[k + 1], b[f:f + BLOCK], out[i, top + h, left + w, f:f + BLOCK],
                                      won[i, top + h, left + w, f:f + BLOCK])  # fmt: skip
                row += 1


@inlined
def transform_products_gradient(dout, won, dM, db, tile):
    """transform_products transposed: dout, won (N, H/2, W/2, F) → dM (36, rows, F); db += its part."""
    n, oh, ow, channels = dout.shape
    row, flat = 0, tile.reshape(-1)
    for i in range(n):
        for top in range(0, oh, 2):
            for left in range(0, ow, 2):
                for f in range(0, channels, BLOCK):
                    for h in range(2):
                        for w in range(2):
                            k = 12 * h + 2 * w
                            relu_gradient(dout[i, top + h, left + w, f:f + BLOCK],
                                          won[i, top + h, left + w, f:f + BLOCK], tile[k], tile[k + 1])  # fmt: skip
                            add(tile[k], db[f:f + BLOCK])
                            unpool(flat, k * BLOCK, BLOCK, ROW)
                    for k in range(4):
                        transform_output_gradient(flat, k * BLOCK, ROW)
                    for k in range(6):
                        transform_output_gradient(flat, k * ROW, BLOCK)
                    for k in range(36):
                        copy(tile[k], dM[k, row, f:f + BLOCK])
                row += 1


@kernel(parallel=True)
def winograd_forward(x, U, b, out, won, images, Vs, Ms, tiles):
    """x (N, H, W, C), U (36, C, F) → out, won (N, H/2, W/2, F), in pieces of that many images.

    Vs (pieces, 36, rows, C) is kept for winograd_backward().
    """
    n, height, width, _ = x.shape
    for p in prange(len(Vs)):
        t, start, stop = get_thread_id(), p * images, min((p + 1) * images, n)
        rows = (stop - start) * (height // 4) * (width // 4)
        transform_images(x[start:stop], Vs[p], tiles[t])
        for k in range(36):
            np.dot(Vs[p, k, :rows], U[k], Ms[t, k, :rows])
        transform_products(Ms[t], b, out[start:stop], won[start:stop], tiles[t])


@kernel(parallel=True)
def winograd_backward(dout, won, U, dx, dUs, dbs, images, Vs, Ms, dVs, products, tiles):
    """Sets dx (N, H, W, C) and adds each piece's dU (36, C, F) and db (F,) to its thread's sums."""
    n, height, width, _ = dx.shape
    for p in prange(len(Vs)):
        t, start, stop = get_thread_id(), p * images, min((p + 1) * images, n)
        rows = (stop - start) * (height // 4) * (width // 4)
        transform_products_gradient(dout[start:stop], won[start:stop], Ms[t], dbs[t], tiles[t])
        for k in range(36):
            np.dot(Vs[p, k, :rows].T, Ms[t, k, :rows], products[t])
            dUs[t, k] += products[t]
            np.dot(Ms[t, k, :rows], U[k].T, dVs[t, k, :rows])
        transform_images_gradient(dVs[t], dx[start:stop], tiles[t])


class ThreadedWinogradReLUPool(WinogradReLUPool):
    """in_channels, out_channels: multiples of BLOCK."""

    def __init__(self, in_channels, out_channels, *, rng=None, dtype=np.float32):
        check_blocks(in_channels, out_channels)
        super().__init__(in_channels, out_channels, rng=rng, dtype=dtype)

    def forward(self, x):
        n, h, w, c = self.x_shape = x.shape
        if h % 4 or w % 4:
            raise ValueError(f"ThreadedWinogradReLUPool takes images of 4n x 4m pixels, not {h}x{w}: use ConvReLUPool")
        f, threads = self.b.size, numba.get_num_threads()
        self.images = max(1, min(IMAGES, -(-n // threads)))  # a piece for every thread
        rows = self.images * (h // 4) * (w // 4)
        self.G2 = np.kron(self.G, self.G).astype(x.dtype)
        self.U = (self.G2 @ self.W.reshape(9, -1)).reshape(36, c, self.b.size)
        self.out = self.scratch("out", (n, h // 2, w // 2, f), x)
        self.won = self.scratch("won", (n, h // 2, w // 2, f), x, dtype=np.uint8)
        self.V = self.scratch("V", (-(-n // self.images), 36, rows, c), x)
        self.M = self.scratch("M", (threads, 36, rows, f), x)
        self.tile = self.scratch("tile", (threads, 36, BLOCK), x)
        winograd_forward(x, self.U, self.b, self.out, self.won, self.images, self.V, self.M, self.tile)
        return self.out

    def backward(self, dout):
        c, f, threads, rows = self.x_shape[3], self.b.size, numba.get_num_threads(), self.M.shape[2]
        dUs, dbs = self.scratch("dUs", (threads, 36, c, f), dout), self.scratch("dbs", (threads, f), dout)
        dUs.fill(0)
        dbs.fill(0)
        dx = self.scratch("dx", self.x_shape, dout)
        winograd_backward(dout, self.won, self.U, dx, dUs, dbs, self.images, self.V, self.M,
                          self.scratch("dV", (threads, 36, rows, c), dout),
                          self.scratch("products", (threads, c, f), dout), self.tile)  # fmt: skip
        self.dW[...] = (self.G2.T @ dUs.sum(axis=0).reshape(36, -1)).reshape(self.W.shape)
        dbs.sum(axis=0, out=self.db)
        return dx


@inlined
def part(n, t, threads):
    """Thread t's range of n items, as start and stop."""
    return n * t // threads, n * (t + 1) // threads


@kernel(parallel=True)
def dense_forward(x, W, xs, outs):
    """Each thread a range of the input features: xs[t] = x of that range, kept for backward(); outs[t]: its product."""
    threads = len(outs)
    for t in prange(threads):
        start, stop = part(len(W), t, threads)
        mine = xs[t, :x.shape[0] * (stop - start)].reshape(x.shape[0], stop - start)
        mine[...] = x[:, start:stop]
        np.dot(mine, W[start:stop], outs[t])


@kernel(parallel=True)
def dense_backward(xs, dout, W, dW, dx, turned):
    """dW = xᵀ dout and dx = dout Wᵀ, each thread a range of the input features."""
    threads, n = len(xs), len(dout)
    for t in prange(threads):
        start, stop = part(len(W), t, threads)
        np.dot(xs[t, :n * (stop - start)].reshape(n, stop - start).T, dout, dW[start:stop])
        np.dot(W[start:stop], dout.T, turned[start:stop])  # BLAS is faster with the long dimension first
        for first in range(start, stop, 16):  # a cache line
            for i in range(n):
                for k in range(first, min(first + 16, stop)):
                    dx[i, k] = turned[k, i]


class ThreadedDense(Dense):
    def forward(self, x):
        (n, features), threads = x.shape, numba.get_num_threads()
        self.xs = self.scratch("xs", (threads, n * -(-features // threads)), x)
        outs = self.scratch("outs", (threads, n, self.b.size), x)
        dense_forward(x, self.W, self.xs, outs)
        out = outs.sum(axis=0, out=self.scratch("out", outs.shape[1:], x))
        out += self.b
        return out

    def backward(self, dout):
        if len(dout) == 0:
            self.x = np.zeros((0, len(self.W)), dout.dtype)
            return super().backward(dout)
        dx, turned = (self.scratch(name, shape, dout) for name, shape in
                      (("dx", (len(dout), len(self.W))), ("turned", (len(self.W), len(dout)))))  # fmt: skip
        dense_backward(self.xs, dout, self.W, self.dW, dx, turned)
        dout.sum(axis=0, out=self.db)
        return dx


@kernel(parallel=True)
def sgd_update(w, g, velocity, scale, lr, momentum, weight_decay):
    for i in prange(w.size):
        velocity[i] = momentum * velocity[i] + (g[i] * scale + weight_decay * w[i])
        w[i] -= lr * velocity[i]


class ThreadedSGD(SGD):
    def step(self, count, grads=None):
        self.steps += 1
        w, g = self.model.params, self.model.grads if grads is None else grads
        scalars = (w.dtype.type(s) for s in (1 / count, self.lr, self.momentum, self.weight_decay))
        sgd_update(w, g, self.slots["velocity"], *scalars)


@kernel(parallel=True)
def adam_update(w, g, m, v, scale, lr, beta1, beta2, root, eps, weight_decay):
    one = w.dtype.type(1)
    for i in prange(w.size):
        gradient = g[i] * scale + weight_decay * w[i]
        m[i] = beta1 * m[i] + (one - beta1) * gradient
        v[i] = beta2 * v[i] + (one - beta2) * gradient * gradient
        w[i] -= lr * m[i] / (np.sqrt(v[i]) * root + eps)


class ThreadedAdam(Adam):
    def step(self, count, grads=None):
        self.steps += 1
        w, g, (beta1, beta2) = self.model.params, self.model.grads if grads is None else grads, self.betas
        lr, root = self.lr / (1 - beta1**self.steps), 1 / math.sqrt(1 - beta2**self.steps)
        scalars = (w.dtype.type(s) for s in (1 / count, lr, beta1, beta2, root, self.eps, self.weight_decay))
        adam_update(w, g, self.slots["m"], self.slots["v"], *scalars)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks, as in parallel_cnn_mpi.py
# ----------------------------------------------------------------------------------------------------------------------


class Reducer:
    """Sums the gradients of all ranks with MPI messages while the backward pass goes on.

    start(part) is called when that slice of model.grads is complete; after wait() `total` has the sums over all ranks.
    start_sums(array) does the same, in place, for a small array. overlap=False: start() itself waits.
    seconds: time spent in these functions so far.
    """

    name = "messages"

    def __init__(self, comm, model, overlap=True):
        self.comm, self.overlap, self.requests, self.seconds = comm, overlap, [], 0.0
        self.total = model.grads

    def start(self, part):
        started = time.perf_counter()
        self._start(part)
        if not self.overlap:
            self._wait()
        self.seconds += time.perf_counter() - started

    def start_sums(self, sums):
        started = time.perf_counter()
        self.requests.append(self.comm.Iallreduce(MPI.IN_PLACE, sums))
        self.seconds += time.perf_counter() - started

    def wait(self):
        started = time.perf_counter()
        self._wait()
        self.seconds += time.perf_counter() - started

    def _start(self, part):
        self.requests.append(self.comm.Iallreduce(MPI.IN_PLACE, self.total[part]))
        MPI.Request.Testall(self.requests)  # MPI moves data only while one of its functions runs

    def _wait(self):
        MPI.Request.Waitall(self.requests)
        self.requests.clear()


class SharedMemoryReducer(Reducer):
    """The same where ranks share a machine: nothing is sent, each adds up its share of a slice from all ranks' memory.

    The ranks' gradients and `total` lie in a window of shared memory: Hoefler et al., "MPI + MPI: a new hybrid approach
    to parallel programming with MPI plus shared memory", 2013. On several machines, which must have equal numbers of
    ranks, each share is then summed over the machines by messages, all shares at once.
    """

    name = "shared"

    def __init__(self, comm, model, overlap=True):
        super().__init__(comm, model, overlap)
        self.machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.same_share = comm.Split(self.machine.rank)  # one rank of each machine
        dtype, n = model.grads.dtype, model.grads.size
        size = -(-model.grads.nbytes // 64) * 64  # whole cache lines
        mine = size if self.machine.rank else 2 * size  # rank 0 has room for `total`
        self.window = MPI.Win.Allocate_shared(mine, dtype.itemsize, comm=self.machine)
        memory = [self.window.Shared_query(rank)[0] for rank in range(self.machine.size)]
        self.grads = [np.frombuffer(m, dtype, n) for m in memory]
        self.total = np.frombuffer(memory[0], dtype, n, offset=size)
        self.window.Lock_all(MPI.MODE_NOCHECK)
        self.summing = []  # slices that this rank has completed, and the request that tells that all ranks have
        model.move_grads(self.grads[self.machine.rank])

    def _start(self, part):
        self.window.Sync()  # what this rank wrote is now seen by the others
        self.summing.append((part, self.machine.Ibarrier()))
        while self.summing and self.summing[0][1].Test():
            self._sum()

    def _wait(self):
        while self.summing:
            self.summing[0][1].Wait()
            self._sum()
        super()._wait()
        self.window.Sync()
        self.machine.Barrier()  # all shares are there, and nobody reads this rank's gradients any more

    def _sum(self):
        part, _ = self.summing.pop(0)
        mine = share(part.stop - part.start, self.machine.rank, self.machine.size)
        mine = slice(part.start + mine.start, part.start + mine.stop)
        self.window.Sync()
        self.total[mine] = self.grads[0][mine]
        for grads in self.grads[1:]:
            self.total[mine] += grads[mine]
        if self.same_share.size > 1:
            self.requests.append(self.same_share.Iallreduce(MPI.IN_PLACE, self.total[mine]))


def make_reducer(comm, model, args):
    sizes = comm.allgather(comm.Split_type(MPI.COMM_TYPE_SHARED).size)
    equal = min(sizes) == max(sizes)
    if args.reduce == "shared" and not equal:
        raise InputError("--reduce shared: the machines have different numbers of ranks: use --reduce messages")
    shared = args.reduce == "shared" or (args.reduce == "auto" and equal and sizes[0] > 1)
    return (SharedMemoryReducer if shared else Reducer)(comm, model, args.overlap)


def train_step(model, optimizer, x, labels, count, reducer, stop=None):
    """One step on a global batch of `count` images, x and labels being this rank's share of them, perhaps none.

    Returns [summed loss, top-1, top-5, ranks that want to stop] over all ranks, and this rank's seconds of the forward
    and backward pass, without communication.
    """
    started, waited = time.perf_counter(), reducer.seconds
    logits = model.forward(x)
    loss, dlogits = softmax_cross_entropy(logits, labels)
    forward = time.perf_counter()
    sums = np.array([loss, *count_correct(logits, labels), bool(stop)], np.float64)
    reducer.start_sums(sums)
    model.backward(dlogits, on_grad_ready=reducer.start)
    backward = time.perf_counter() - (reducer.seconds - waited)
    reducer.wait()
    optimizer.step(count, reducer.total)
    return sums, forward - started, backward - forward


def train(model, optimizer, data, args, run, reducer, comm):
    """Train for args.epochs epochs on data; everything measured goes to run."""
    n, size = len(data.y_train), args.global_batch_size
    for epoch in range(run.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        run.start_epoch(epoch, math.ceil(n / size))
        for batch in range(run.batch, math.ceil(n / size)):
            started, waited = time.perf_counter(), reducer.seconds
            index = order[batch * size:(batch + 1) * size]
            mine = index[share(len(index), comm.rank, comm.size)]
            x, labels = load_batch(data.x_train, data.y_train, mine, args.dtype)
            loading = time.perf_counter() - started
            sums, forward, backward = train_step(model, optimizer, x, labels, len(index), reducer, run.signal)
            run.end_batch(len(index), float(sums[0]), int(sums[1]), int(sums[2]), loading, stop=sums[3] > 0,
                          forward=forward, backward=backward, communication=reducer.seconds - waited)  # fmt: skip
        check_equal(model, comm, epoch)
        report_communication(run, comm)
        run.end_training()
        test = share(len(data.y_test), comm.rank, comm.size)
        run.end_epoch(*evaluate(model, data.x_test[test], data.y_test[test],
                                reduce=lambda sums: comm.Allreduce(MPI.IN_PLACE, sums)), stop=False)  # fmt: skip


def choose_threads(args, comm):
    """Set and return the threads of this rank: no more than its share of the cores it may run on, unless forced."""
    cores, local = len(available_cores()), comm.Split_type(MPI.COMM_TYPE_SHARED).size
    mine = max(1, cores // local)
    asked = args.num_threads or int((os.environ.get("OMP_NUM_THREADS") or "0").partition(",")[0]) or mine
    threads = asked if args.force_threads else min(asked, mine)
    if threads < asked:
        print(f"{threads} threads a rank instead of {asked}: {local} ranks share {cores} cores (--force-threads keeps "
              f"{asked})", file=sys.stderr)  # fmt: skip
    if local * threads > cores:
        print(f"warning: {local} ranks of {threads} threads share {cores} cores: they wait for each other",
              file=sys.stderr)  # fmt: skip
    if threads > numba.config.NUMBA_NUM_THREADS:
        raise InputError(f"{threads} threads: Numba was started with {numba.config.NUMBA_NUM_THREADS}; to force more, "
                         f"set NUMBA_NUM_THREADS={threads} in the environment")
    numba.set_num_threads(threads)
    return threads


def compile_kernels(dtype, comm):
    """Compile all kernels, or load them from Numba's cache, rank 0 first; returns the seconds that it took."""
    import scipy.linalg.cython_blas  # noqa: F401 (Numba's np.dot calls its BLAS)

    limit_blas_threads(1)  # SciPy's and NumPy's: the threads here are Numba's
    numba.config.THREADING_LAYER = "omp"
    started = time.perf_counter()
    for turn in (True, False):
        if turn == (comm.rank == 0):
            model = make_model(0, dtype)
            logits = model.forward(np.zeros((2, 32, 32, 3), dtype))
            model.backward(softmax_cross_entropy(logits, np.zeros(2, np.uint8))[1])
            ThreadedSGD(model).step(2)
            ThreadedAdam(model).step(2)
        comm.Barrier()
    return time.perf_counter() - started


def make_model(seed, dtype):
    return make_cnn(seed, dtype, conv1=ThreadedConvReLUPool, conv2=ThreadedWinogradReLUPool, dense=ThreadedDense)


def parse_args(argv=None):
    parser = make_parser("parallel_cnn_hybrid", __doc__)
    add_rank_options(parser)
    parser.add_argument("--num-threads", type=number(int, 1, 1024), metavar="N",
                        help="threads of a rank (default: $OMP_NUM_THREADS, else its share of the cores)")  # fmt: skip
    parser.add_argument("--force-threads", action="store_true", help="even if that is more than its share")
    args = parser.parse_args(argv)
    args.global_batch_size = args.global_batch_size or args.batch_size * MPI.COMM_WORLD.size
    return args


def main(argv=None):
    comm = MPI.COMM_WORLD
    stop_all_on_error(comm)
    check_launcher(comm)
    if comm.rank:  # one rank speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
    args = parse_args(argv)
    threads = together(comm, lambda: choose_threads(args, comm))
    seconds = compile_kernels(np.dtype(args.dtype), comm)
    if not args.quiet:
        print(f"{comm.size} ranks x {threads} threads; kernels ready after {seconds:.1f} s of compiling", flush=True)
    if warning := blas_warning():
        print(warning, file=sys.stderr)
    data = load_on_all(args, comm)
    model = make_model(args.seed, np.dtype(args.dtype))
    optimizer = make_optimizer(model, args, sgd=ThreadedSGD, adam=ThreadedAdam)
    reducer = make_reducer(comm, model, args)
    with np.errstate(over="ignore", invalid="ignore"):  # run stops at the first loss that is not finite
        run = together(comm, lambda: Run(
            args, "parallel_cnn_hybrid", data, lambda: get_arrays(model, optimizer),
            lambda arrays: set_arrays(model, optimizer, arrays), {"ranks": comm.size, "reduce": reducer.name,
            "threads": threads, "compile_seconds": seconds, "threading_layer": numba.threading_layer()}, comm.rank,
        ))  # fmt: skip
        with running_on_all(run, model, optimizer, comm):
            train(model, optimizer, data, args, run, reducer, comm)
            run.finish()


if __name__ == "__main__":
    run_main(main)
