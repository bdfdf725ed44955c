"""Train the CNN or ResNet-18 over MPI ranks × threads: parallel_cnn_mpi.py with layers that share images among threads.

The layers below are those of common.py as Numba kernels: the loop over the images of a rank's share is a `prange` over
OpenMP threads, and inside it each thread works through an image in buffers of its own, so that nothing but weights and
results leaves its cache. Dense layers and the optimizer are threaded too: 98 % of the CNN's parameters are theirs.
--model resnet18 shares its batch normalisation among threads and ranks: the statistics are the global batch's.

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
    CACHE_BYTES,
    MODELS,
    SGD,
    Adam,
    BasicBlock,
    BatchNorm2D,
    Conv2D,
    ConvReLUPool,
    Dense,
    InputError,
    Run,
    WinogradConv2D,
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
    make_resnet18,
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
A, B = (
    float(p) for p in (WinogradConv2D.POINTS[1], WinogradConv2D.POINTS[3])
)  # 0, A, -A, B, -B and infinity

# No fastmath: what has just been compiled and what comes from the cache differ as machine code (Numba optimises the
# body of a prange both by itself and within its function), and only strict arithmetic gives the same bits in both.
kernel = functools.partial(njit, cache=True)
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
def add_scaled(factor, source, target):
    for c in range(target.size):
        target[c] += factor * source[c]


@inlined
def pool(tile, at, right, below):
    """Of four positions the maximum → the first of them, and which was the first maximum, 0 to 3 → its right."""
    zero, one, two, three = (
        tile.dtype.type(0),
        tile.dtype.type(1),
        tile.dtype.type(2),
        tile.dtype.type(3),
    )
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
    zero, one, two, three = (
        tile.dtype.type(0),
        tile.dtype.type(1),
        tile.dtype.type(2),
        tile.dtype.type(3),
    )
    for i in range(at, at + BLOCK):
        d, which = tile[i], tile[i + right]
        tile[i], tile[i + right] = d if which == zero else zero, d if which == one else zero
        tile[i + below], tile[i + below + right] = (
            d if which == two else zero,
            d if which == three else zero,
        )


@inlined
def im2col_for_pooling(x, planes, col):
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
                            copy(planes[c, odd, h, first : first + ow], row[to : to + ow])
                            to += ow


@kernel(parallel=True)
def conv_pool_forward(x, W, b, out, won, planes, cols, ys, tiles):
    """im2col, product, bias, ReLU and pooling. x (N, H, W, C), W (9·C, F) → out, won (N, H/2, W/2, F)."""
    n, oh, ow, channels = out.shape
    for i in prange(n):
        t = get_thread_id()
        y, tile = ys[t], tiles[t]
        im2col_for_pooling(x[i], planes[t], cols[t])
        np.dot(cols[t].T, W, y)
        for row in range(oh * ow):
            h, w = divmod(row, ow)
            for f in range(0, channels, BLOCK):
                for k in range(4):
                    copy(y[row + k * oh * ow, f : f + BLOCK], tile[k])
                pool(tile.reshape(-1), 0, BLOCK, 2 * BLOCK)
                bias_relu(
                    tile[0],
                    tile[1],
                    b[f : f + BLOCK],
                    out[i, h, w, f : f + BLOCK],
                    won[i, h, w, f : f + BLOCK],
                )


@kernel(parallel=True)
def conv_pool_backward(x, dout, won, dWs, dbs, planes, cols, ys, tiles, products):
    """Adds each image's dW (9·C, F) and db (F,) to its thread's sums."""
    n, oh, ow, channels = dout.shape
    for i in prange(n):
        t = get_thread_id()
        dy, tile = ys[t], tiles[t]
        for row in range(oh * ow):
            h, w = divmod(row, ow)
            for f in range(0, channels, BLOCK):
                relu_gradient(
                    dout[i, h, w, f : f + BLOCK], won[i, h, w, f : f + BLOCK], tile[0], tile[1]
                )
                add(tile[0], dbs[t, f : f + BLOCK])
                unpool(tile.reshape(-1), 0, BLOCK, 2 * BLOCK)
                for k in range(4):
                    copy(tile[k], dy[row + k * oh * ow, f : f + BLOCK])
        im2col_for_pooling(x[i], planes[t], cols[t])
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
            raise ValueError(
                f"ThreadedConvReLUPool takes images of 2n x 2m pixels, not {h}x{w}: use ConvReLUPool"
            )
        f, threads = self.b.size, numba.get_num_threads()
        self.x = x
        self.out = self.scratch("out", (n, h // 2, w // 2, f), x)
        self.won = self.scratch("won", (n, h // 2, w // 2, f), x, dtype=np.uint8)
        self.own = (
            self.scratch("planes", (threads, c, 2, h + 2, w // 2 + 1), x),
            self.scratch("cols", (threads, 9 * c, h * w), x),
            self.scratch("ys", (threads, h * w, f), x),
            self.scratch("tiles", (threads, 4, BLOCK), x),
        )
        conv_pool_forward(x, self.W.reshape(-1, f), self.b, self.out, self.won, *self.own)
        return self.out

    def backward(self, dout):
        threads, W = numba.get_num_threads(), self.W.reshape(-1, self.b.size)
        dWs, dbs, products = (
            self.scratch(name, (threads, *shape), dout)
            for name, shape in (("dWs", W.shape), ("dbs", self.b.shape), ("products", W.shape))
        )
        dWs.fill(0)
        dbs.fill(0)
        conv_pool_backward(self.x, dout, self.won, dWs, dbs, *self.own, products)
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
        even_a, odd_a, even_b, odd_b = (
            d4 - b * b * d2,
            a * (d3 - b * b * d1),
            d4 - a * a * d2,
            b * (d3 - a * a * d1),
        )
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
        even_a, odd_a = (
            tile[i + step] + tile[i + 2 * step],
            a * (tile[i + step] - tile[i + 2 * step]),
        )
        even_b, odd_b = (
            tile[i + 3 * step] + tile[i + 4 * step],
            b * (tile[i + 3 * step] - tile[i + 4 * step]),
        )
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
        even_a, odd_a = (
            tile[i + step] + tile[i + 2 * step],
            a * (tile[i + step] - tile[i + 2 * step]),
        )
        even_b, odd_b = (
            tile[i + 3 * step] + tile[i + 4 * step],
            b * (tile[i + 3 * step] - tile[i + 4 * step]),
        )
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
        even_a, odd_a, even_b, odd_b = (
            y0 + a * a * y2,
            a * (y1 + a * a * y3),
            y0 + b * b * y2,
            b * (y1 + b * b * y3),
        )
        tile[i + step], tile[i + 2 * step] = even_a + odd_a, even_a - odd_a
        tile[i + 3 * step], tile[i + 4 * step] = even_b + odd_b, even_b - odd_b
        tile[i + 5 * step] = y3


ROW = 6 * BLOCK  # of a tile


@kernel(parallel=True)
def transform_images(x, V, tiles):
    """Bᵀ d B of all 6×6 tiles d, 4 apart, of images padded by 1: x (N, H, W, C) → V (36, rows, C), a row per tile."""
    n, height, width, channels = x.shape
    for i in prange(n):
        tile, row = tiles[get_thread_id()], i * (height // 4) * (width // 4)
        flat = tile.reshape(-1)
        for top in range(-1, height - 1, 4):
            for left in range(-1, width - 1, 4):
                for c in range(0, channels, BLOCK):
                    for h in range(top, top + 6):
                        for w in range(left, left + 6):
                            k = 6 * (h - top) + w - left
                            if 0 <= h < height and 0 <= w < width:
                                copy(x[i, h, w, c : c + BLOCK], tile[k])
                            else:
                                tile[k] = 0
                    for k in range(6):
                        transform_input(flat, k * ROW, BLOCK)
                    for k in range(6):
                        transform_input(flat, k * BLOCK, ROW)
                    for k in range(36):
                        copy(tile[k], V[k, row, c : c + BLOCK])
                row += 1


@kernel(parallel=True)
def transform_images_gradient(dV, dx, tiles):
    """transform_images transposed: dV (36, rows, C) → dx (N, H, W, C), the overlapping tiles added up."""
    n, height, width, channels = dx.shape
    for i in prange(n):
        tile, row = tiles[get_thread_id()], i * (height // 4) * (width // 4)
        flat = tile.reshape(-1)
        dx[i] = 0
        for top in range(-1, height - 1, 4):
            for left in range(-1, width - 1, 4):
                for c in range(0, channels, BLOCK):
                    for k in range(36):
                        copy(dV[k, row, c : c + BLOCK], tile[k])
                    for k in range(6):
                        transform_input_gradient(flat, k * BLOCK, ROW)
                    for k in range(6):
                        transform_input_gradient(flat, k * ROW, BLOCK)
                    for h in range(max(top, 0), min(top + 6, height)):
                        for w in range(max(left, 0), min(left + 6, width)):
                            add(tile[6 * (h - top) + w - left], dx[i, h, w, c : c + BLOCK])
                row += 1


@kernel(parallel=True)
def transform_products(M, out, tiles):
    """Aᵀ m A of all tiles: M (36, rows, F) → out (N, H, W, F)."""
    n, height, width, channels = out.shape
    for i in prange(n):
        tile, row = tiles[get_thread_id()], i * (height // 4) * (width // 4)
        flat = tile.reshape(-1)
        for top in range(0, height, 4):
            for left in range(0, width, 4):
                for f in range(0, channels, BLOCK):
                    for k in range(36):
                        copy(M[k, row, f : f + BLOCK], tile[k])
                    for k in range(6):
                        transform_output(flat, k * ROW, BLOCK)
                    for k in range(4):
                        transform_output(flat, k * BLOCK, ROW)
                    for h in range(4):
                        for w in range(4):
                            copy(tile[6 * h + w], out[i, top + h, left + w, f : f + BLOCK])
                row += 1


@kernel(parallel=True)
def transform_products_gradient(dout, dM, tiles):
    """transform_products transposed: dout (N, H, W, F) → dM (36, rows, F)."""
    n, height, width, channels = dout.shape
    for i in prange(n):
        tile, row = tiles[get_thread_id()], i * (height // 4) * (width // 4)
        flat = tile.reshape(-1)
        for top in range(0, height, 4):
            for left in range(0, width, 4):
                for f in range(0, channels, BLOCK):
                    for h in range(4):
                        for w in range(4):
                            copy(dout[i, top + h, left + w, f : f + BLOCK], tile[6 * h + w])
                    for k in range(4):
                        transform_output_gradient(flat, k * BLOCK, ROW)
                    for k in range(6):
                        transform_output_gradient(flat, k * ROW, BLOCK)
                    for k in range(36):
                        copy(tile[k], dM[k, row, f : f + BLOCK])
                row += 1


@kernel(parallel=True)
def pool_products(M, b, out, won, tiles):
    """transform_products with bias, ReLU and pooling: M (36, rows, F) → out, won (N, H/2, W/2, F)."""
    n, oh, ow, channels = out.shape
    for i in prange(n):
        tile, row = tiles[get_thread_id()], i * (oh // 2) * (ow // 2)
        flat = tile.reshape(-1)
        for top in range(0, oh, 2):
            for left in range(0, ow, 2):
                for f in range(0, channels, BLOCK):
                    for k in range(36):
                        copy(M[k, row, f : f + BLOCK], tile[k])
                    for k in range(6):
                        transform_output(flat, k * ROW, BLOCK)
                    for k in range(4):
                        transform_output(flat, k * BLOCK, ROW)
                    for h in range(2):
                        for w in range(2):
                            k = 12 * h + 2 * w
                            pool(flat, k * BLOCK, BLOCK, ROW)
                            bias_relu(
                                tile[k],
                                tile[k + 1],
                                b[f : f + BLOCK],
                                out[i, top + h, left + w, f : f + BLOCK],
                                won[i, top + h, left + w, f : f + BLOCK],
                            )
                row += 1


@kernel(parallel=True)
def pool_products_gradient(dout, won, dM, dbs, tiles):
    """pool_products transposed: dout, won (N, H/2, W/2, F) → dM (36, rows, F), db of each image (N, F)."""
    n, oh, ow, channels = dout.shape
    for i in prange(n):
        tile, row = tiles[get_thread_id()], i * (oh // 2) * (ow // 2)
        flat = tile.reshape(-1)
        dbs[i] = 0
        for top in range(0, oh, 2):
            for left in range(0, ow, 2):
                for f in range(0, channels, BLOCK):
                    for h in range(2):
                        for w in range(2):
                            k = 12 * h + 2 * w
                            relu_gradient(
                                dout[i, top + h, left + w, f : f + BLOCK],
                                won[i, top + h, left + w, f : f + BLOCK],
                                tile[k],
                                tile[k + 1],
                            )
                            add(tile[k], dbs[i, f : f + BLOCK])
                            unpool(flat, k * BLOCK, BLOCK, ROW)
                    for k in range(4):
                        transform_output_gradient(flat, k * BLOCK, ROW)
                    for k in range(6):
                        transform_output_gradient(flat, k * ROW, BLOCK)
                    for k in range(36):
                        copy(tile[k], dM[k, row, f : f + BLOCK])
                row += 1


@kernel(parallel=True)
def transform_weights(matrix, weights, out):
    """out = matrix @ weights: few rows, many columns."""
    columns = weights.shape[1]
    for block in prange(-(-columns // 256)):
        start, stop = 256 * block, min(256 * (block + 1), columns)
        for k in range(len(out)):
            row = out[k, start:stop]
            row[:] = 0
            for j in range(len(weights)):
                if matrix[k, j] != 0:
                    add_scaled(matrix[k, j], weights[j, start:stop], row)


@kernel(parallel=True)
def multiply(V, U, M):
    """M (36, rows, F) = V (36, rows, C) @ U (36, C, F)"""
    for k in prange(36):
        np.dot(V[k], U[k], M[k])


@kernel(parallel=True)
def multiply_gradient(V, dM, U, dV, dU, products, first):
    """dV = dM Uᵀ; dU = Vᵀ dM, or that added to dU unless this is the first piece of the batch."""
    for k in prange(36):
        if first:
            np.dot(V[k].T, dM[k], dU[k])
        else:
            product = products[get_thread_id()]
            np.dot(V[k].T, dM[k], product)
            dU[k] += product
        np.dot(dM[k], U[k].T, dV[k])


class ThreadedWinogradConv2D(WinogradConv2D):
    """in_channels, out_channels: multiples of BLOCK.

    Images are shared among threads in the transforms, the 36 products between them too: then no thread needs the whole
    of U, nor a sum of its own for the weights' gradient.
    """

    def __init__(self, in_channels, out_channels, *, bias=True, rng=None, dtype=np.float32):
        check_blocks(in_channels, out_channels)
        super().__init__(in_channels, out_channels, bias=bias, rng=rng, dtype=dtype)

    def forward(self, x):
        n, h, w, c = self.x_shape = x.shape
        if h % 4 or w % 4:
            raise ValueError(
                f"{type(self).__name__} takes images of 4n x 4m pixels, not {h}x{w}: use Conv2D"
            )
        f, threads = self.b.size, numba.get_num_threads()
        self.G2 = np.kron(self.G, self.G).astype(x.dtype)
        self.U = self.scratch("U", (36, c, f), x)
        transform_weights(self.G2, self.W.reshape(9, -1), self.U.reshape(36, -1))
        self.tiles = self.scratch("tiles", (threads, 36, BLOCK), x)
        self.V = self.scratch(
            "V", (n, 36 * (h // 4) * (w // 4) * c), x
        )  # a piece's part: (36, rows, C)
        self._start_forward(x)
        for piece in self._pieces():
            V, M = self.V[piece].reshape(36, -1, c), self._M(piece)
            transform_images(x[piece], V, self.tiles)
            multiply(V, self.U, M)
            self._finish_forward(M, piece)
        return self.out

    def backward(self, dout):
        c, f = self.x_shape[3], self.b.size
        dx, dU = self.scratch("dx", self.x_shape, dout), self.scratch("dU", self.U.shape, dout)
        products = self.scratch("products", (len(self.tiles), c, f), dout)
        for piece in self._pieces():
            V, dM = self.V[piece].reshape(36, -1, c), self._M(piece)
            dV = self.scratch("dV", self.V[piece].shape, dout).reshape(V.shape)
            self._start_backward(dout, dM, piece)
            multiply_gradient(V, dM, self.U, dV, dU, products, piece.start == 0)
            transform_images_gradient(dV, dx[piece], self.tiles)
        transform_weights(self.G2.T.copy(), dU.reshape(36, -1), self.dW.reshape(9, -1))
        self._finish_backward(dout)
        return dx

    def _pieces(self):
        """Slices of the batch, at least one: V and M fill the threads' caches, or as much as U, which each reads."""
        (n, h, w, c), threads = self.x_shape, len(self.tiles)
        bytes_per_image = 36 * (h // 4) * (w // 4) * (c + self.b.size) * self.V.itemsize
        images = threads * math.ceil(max(CACHE_BYTES, self.U.nbytes / threads) / bytes_per_image)
        return [slice(start, min(start + images, n)) for start in range(0, max(n, 1), images)]

    def _M(self, piece):
        (_, h, w, _), f = self.x_shape, self.b.size
        return self.scratch(
            "M", (piece.stop - piece.start, 36 * (h // 4) * (w // 4) * f), self.V
        ).reshape(36, -1, f)

    def _start_forward(self, x):
        self.out = self.scratch("out", (*x.shape[:3], self.b.size), x)

    def _finish_forward(self, M, piece):
        transform_products(M, self.out[piece], self.tiles)
        if self.has_bias:
            self.out[piece] += self.b

    def _start_backward(self, dout, dM, piece):
        transform_products_gradient(dout[piece], dM, self.tiles)

    def _finish_backward(self, dout):
        if self.has_bias:
            dout.sum(axis=(0, 1, 2), out=self.db)


class ThreadedWinogradReLUPool(ThreadedWinogradConv2D):
    """WinogradReLUPool: with bias, ReLU and pooling."""

    def __init__(self, in_channels, out_channels, *, rng=None, dtype=np.float32):
        super().__init__(in_channels, out_channels, rng=rng, dtype=dtype)

    def _start_forward(self, x):
        n, h, w, _ = x.shape
        self.out = self.scratch("out", (n, h // 2, w // 2, self.b.size), x)
        self.won = self.scratch("won", self.out.shape, x, dtype=np.uint8)
        self.dbs = self.scratch("dbs", (n, self.b.size), x)

    def _finish_forward(self, M, piece):
        pool_products(M, self.b, self.out[piece], self.won[piece], self.tiles)

    def _start_backward(self, dout, dM, piece):
        pool_products_gradient(dout[piece], self.won[piece], dM, self.dbs[piece], self.tiles)

    def _finish_backward(self, dout):
        self.dbs.sum(axis=0, out=self.db)


# Any other convolution: the rows of one matrix product are the windows of a few images.


@inlined
def im2col(x, size, stride, padding, oh, ow, col):
    """x (N, H, W, C) → col (N·OH·OW, size·size·C): a row for each window. What lies outside the image is 0."""
    n, height, width, channels = x.shape
    row = 0
    for i in range(n):
        for top in range(-padding, stride * oh - padding, stride):
            for left in range(-padding, stride * ow - padding, stride):
                first, last = max(left, 0), min(left + size, width)
                for h in range(top, top + size):
                    line = col[row, (h - top) * size * channels : (h - top + 1) * size * channels]
                    if not (0 <= h < height and first == left and last == left + size):
                        line[:] = 0
                    if 0 <= h < height:
                        copy(
                            x[i, h].reshape(-1)[first * channels : last * channels],
                            line[(first - left) * channels : (last - left) * channels],
                        )
                row += 1


@inlined
def col2im(col, size, stride, padding, oh, ow, dx):
    """im2col transposed: adds the windows' gradients up."""
    n, height, width, channels = dx.shape
    row = 0
    dx[...] = 0
    for i in range(n):
        for top in range(-padding, stride * oh - padding, stride):
            for left in range(-padding, stride * ow - padding, stride):
                first, last = max(left, 0), min(left + size, width)
                for h in range(max(top, 0), min(top + size, height)):
                    line = col[row, (h - top) * size * channels : (h - top + 1) * size * channels]
                    add(
                        line[(first - left) * channels : (last - left) * channels],
                        dx[i, h].reshape(-1)[first * channels : last * channels],
                    )
                row += 1


@kernel(parallel=True)
def conv_forward(x, W, out, size, stride, padding, images, cols):
    """x (N, H, W, C), W (size·size·C, F) → out (N, OH, OW, F), in pieces of that many images."""
    n, oh, ow, channels = out.shape
    for p in prange(-(-n // images)):
        start, stop = p * images, min((p + 1) * images, n)
        col = cols[get_thread_id(), : (stop - start) * oh * ow]
        im2col(x[start:stop], size, stride, padding, oh, ow, col)
        np.dot(col, W, out[start:stop].reshape(-1, channels))


@kernel(parallel=True)
def conv_backward(x, dout, W, dx, dWs, size, stride, padding, images, cols, products):
    """Adds each piece's dW (size·size·C, F) to its thread's sum and sets dx, unless that has no images."""
    n, oh, ow, channels = dout.shape
    for p in prange(-(-n // images)):
        t, start, stop = get_thread_id(), p * images, min((p + 1) * images, n)
        col, dy = cols[t, : (stop - start) * oh * ow], dout[start:stop].reshape(-1, channels)
        im2col(x[start:stop], size, stride, padding, oh, ow, col)
        np.dot(col.T, dy, products[t])
        dWs[t] += products[t]
        if len(dx):
            np.dot(dy, W.T, col)
            col2im(col, size, stride, padding, oh, ow, dx[start:stop])


class ThreadedConv2D(Conv2D):
    ROWS = 512  # at least, of a matrix product, if there are enough images

    def forward(self, x):
        (n, h, w, c), k, s, p, threads = (
            x.shape,
            self.kernel_size,
            self.stride,
            self.padding,
            numba.get_num_threads(),
        )
        self.x, oh, ow = x, (h + 2 * p - k) // s + 1, (w + 2 * p - k) // s + 1
        out = self.scratch("out", (n, oh, ow, self.b.size), x)
        images = max(
            1, min(-(-self.ROWS // (oh * ow)), -(-n // threads))
        )  # a piece for every thread
        self.options = (
            k,
            s,
            p,
            images,
            self.scratch("cols", (threads, images * oh * ow, k * k * c), x),
        )
        conv_forward(x, self.W.reshape(-1, self.b.size), out, *self.options)
        if self.has_bias:
            out += self.b
        return out

    def backward(self, dout):
        threads, W = numba.get_num_threads(), self.W.reshape(-1, self.b.size)
        dWs, products = (
            self.scratch(name, (threads, *W.shape), dout) for name in ("dWs", "products")
        )
        dx = self.scratch("dx", self.x.shape if self.needs_dx else (0, *self.x.shape[1:]), dout)
        dWs.fill(0)
        conv_backward(self.x, dout, W, dx, dWs, *self.options, products)
        dWs.sum(axis=0, out=self.dW.reshape(W.shape))
        if self.has_bias:
            dout.sum(axis=(0, 1, 2), out=self.db)
        return dx if self.needs_dx else None


# ----------------------------------------------------------------------------------------------------------------------
# The sums of a channel are taken image by image and then over the images, whichever thread had them.
# ----------------------------------------------------------------------------------------------------------------------


@inlined
def add_squared_deviations(x, mean, sums):
    """sums += (x - mean)². All (C,)."""
    for c in range(sums.size):
        d = x[c] - mean[c]
        sums[c] += d * d


@inlined
def scale_and_shift(x, mean, scale, shift, out):
    """out = (x - mean) scale + shift. All (C,)."""
    for c in range(out.size):
        out[c] = (x[c] - mean[c]) * scale[c] + shift[c]


@inlined
def relu(row):
    zero = row.dtype.type(0)
    for c in range(row.size):
        row[c] = zero if row[c] <= zero else row[c]


@inlined
def mask(dout, out, d):
    """d = dout where ReLU is open, else 0. All (C,)."""
    zero = dout.dtype.type(0)
    for c in range(d.size):
        d[c] = dout[c] if out[c] > zero else zero


@inlined
def add_products(d, x, mean, sums):
    """sums += d (x - mean). All (C,)."""
    for c in range(sums.size):
        sums[c] += d[c] * (x[c] - mean[c])


@inlined
def combine(d, scale, x, mean, slope, shift, dx):
    """dx = d scale - (x - mean) slope - shift. All (C,)."""
    for c in range(dx.size):
        dx[c] = d[c] * scale[c] - (x[c] - mean[c]) * slope[c] - shift[c]


@kernel(parallel=True)
def moments(x, means, squares):
    """x (N, positions, C) → of each image and channel the mean and the sum of squared deviations from it (N, C)."""
    n, positions, _ = x.shape
    for i in prange(n):
        mean, square = means[i], squares[i]
        mean[:] = 0
        square[:] = 0
        for p in range(positions):
            add(x[i, p], mean)
        mean /= positions
        for p in range(positions):
            add_squared_deviations(x[i, p], mean, square)


@kernel(parallel=True)
def normalize(x, mean, scale, shift, shortcut, has_relu, out):
    """out = (x - mean) scale + shift, plus shortcut if that has images, ReLU of it if has_relu. (N, positions, C)"""
    n, positions, _ = x.shape
    for i in prange(n):
        for p in range(positions):
            row = out[i, p]
            scale_and_shift(x[i, p], mean, scale, shift, row)
            if len(shortcut):
                add(shortcut[i, p], row)
            if has_relu:
                relu(row)


@kernel(parallel=True)
def normalize_sums(dout, x, mean, out, has_relu, rows, products, sums):
    """Of each image and channel the sums of d and d (x - mean), d being the gradient before ReLU (N, C)."""
    n, positions, _ = x.shape
    for i in prange(n):
        d = rows[get_thread_id()]
        products[i] = 0
        sums[i] = 0
        for p in range(positions):
            if has_relu:
                mask(dout[i, p], out[i, p], d)
            else:
                copy(dout[i, p], d)
            add(d, sums[i])
            add_products(d, x[i, p], mean, products[i])


@kernel(parallel=True)
def normalize_gradient(dout, x, mean, out, has_relu, scale, slope, shift, rows, dx, dshortcut):
    """dx = d scale - (x - mean) slope - shift; dshortcut = d, if that has images; d: the gradient before ReLU."""
    for i in prange(len(x)):
        d = rows[get_thread_id()]
        for p in range(x.shape[1]):
            if has_relu:
                mask(dout[i, p], out[i, p], d)
            else:
                copy(dout[i, p], d)
            if len(dshortcut):
                copy(d, dshortcut[i, p])
            combine(d, scale, x[i, p], mean, slope, shift, dx[i, p])


class ThreadedBatchNorm2D(BatchNorm2D):
    """BatchNorm2D, and in the same pass what follows it in a residual block: the sum with the shortcut, ReLU."""

    relu = False

    def forward(self, x, shortcut=None):
        self.shortcut = x[:0] if shortcut is None else shortcut
        return super().forward(x)

    def _moments(self, x):
        n, h, w, c = x.shape
        means, squares = (self.scratch(name, (n, c), x) for name in ("means", "squares"))
        moments(by_position(x), means, squares)
        mean = means.sum(axis=0) / max(n, 1)
        return n * h * w, mean, squares.sum(axis=0) + h * w * np.square(means - mean).sum(axis=0)

    def _normalize(self, x, mean):
        self.x, self.mean, self.out = x, mean, self.scratch("out", x.shape, x)
        normalize(
            by_position(x),
            mean,
            self.gamma * self.inverse,
            self.beta,
            by_position(self.shortcut),
            self.relu,
            by_position(self.out),
        )
        return self.out

    def _sums(self, dout):
        n, _, _, c = dout.shape
        products, sums = (self.scratch(name, (n, c), dout) for name in ("means", "squares"))
        self.rows = self.scratch("rows", (numba.get_num_threads(), c), dout)
        normalize_sums(
            by_position(dout),
            by_position(self.x),
            self.mean,
            by_position(self.out),
            self.relu,
            self.rows,
            products,
            sums,
        )
        return products.sum(axis=0) * self.inverse, sums.sum(axis=0)

    def _input_gradient(self, dout, dgamma, dbeta):
        dx, scale = self.scratch("dx", dout.shape, dout), self.gamma * self.inverse
        self.dshortcut = self.scratch("dshortcut", self.shortcut.shape, dout)
        normalize_gradient(
            by_position(dout),
            by_position(self.x),
            self.mean,
            by_position(self.out),
            self.relu,
            scale,
            scale * self.inverse * dgamma,
            scale * dbeta,
            self.rows,
            by_position(dx),
            by_position(self.dshortcut),
        )
        return dx


class ThreadedNormReLU(ThreadedBatchNorm2D):
    relu = True


def by_position(x):
    """(N, H, W, C) → (N, H·W, C)"""
    n, h, w, c = x.shape
    return x.reshape(n, h * w, c)


@kernel(parallel=True)
def accumulate(source, target):
    for i in prange(target.size):
        target[i] += source[i]


class ThreadedBasicBlock(BasicBlock):
    def __init__(
        self, in_channels, out_channels, stride=1, *, conv=None, rng=None, dtype=np.float32
    ):
        super().__init__(
            in_channels,
            out_channels,
            stride,
            conv=conv or ThreadedWinogradConv2D,
            other_conv=ThreadedConv2D,
            norm=ThreadedBatchNorm2D,
            rng=rng,
            dtype=dtype,
        )
        self.conv1, self.norm1, _, self.conv2, self.norm2 = self.branch
        self.norm1.relu = self.norm2.relu = True

    def forward(self, x):
        shortcut = x
        for part in self.shortcut:
            shortcut = part.forward(shortcut)
        y = self.norm1.forward(self.conv1.forward(x))
        return self.norm2.forward(self.conv2.forward(y), shortcut)

    def backward(self, dout):
        dx = self.conv2.backward(self.norm2.backward(dout))
        dx = self.conv1.backward(self.norm1.backward(dx))
        dshortcut = self.norm2.dshortcut
        for part in reversed(self.shortcut):
            dshortcut = part.backward(dshortcut)
        accumulate(dshortcut.reshape(-1), dx.reshape(-1))
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
        mine = xs[t, : x.shape[0] * (stop - start)].reshape(x.shape[0], stop - start)
        mine[...] = x[:, start:stop]
        np.dot(mine, W[start:stop], outs[t])


@kernel(parallel=True)
def dense_backward(xs, dout, W, dW, dx, turned):
    """dW = xᵀ dout and dx = dout Wᵀ, each thread a range of the input features."""
    threads, n = len(xs), len(dout)
    for t in prange(threads):
        start, stop = part(len(W), t, threads)
        np.dot(xs[t, : n * (stop - start)].reshape(n, stop - start).T, dout, dW[start:stop])
        np.dot(
            W[start:stop], dout.T, turned[start:stop]
        )  # BLAS is faster with the long dimension first
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
        dx, turned = (
            self.scratch(name, shape, dout)
            for name, shape in (
                ("dx", (len(dout), len(self.W))),
                ("turned", (len(self.W), len(dout))),
            )
        )
        dense_backward(self.xs, dout, self.W, self.dW, dx, turned)
        dout.sum(axis=0, out=self.db)
        return dx


@kernel(parallel=True)
def sgd_update(w, g, velocity, scale, lr, momentum, weight_decay):
    for i in prange(w.size):
        velocity[i] = momentum * velocity[i] + (g[i] * scale + weight_decay * w[i])
        w[i] -= lr * velocity[i]


class ThreadedSGD(SGD):
    def step(self, count, grads=None, parts=None):
        self.steps += 1
        w, g = self.model.params, self.model.grads if grads is None else grads
        scalars = [w.dtype.type(s) for s in (1 / count, self.lr, self.momentum, self.weight_decay)]
        for part in [slice(None)] if parts is None else parts:
            sgd_update(w[part], g[part], self.slots["velocity"][part], *scalars)


@kernel(parallel=True)
def adam_update(w, g, m, v, scale, lr, beta1, beta2, root, eps, weight_decay):
    one = w.dtype.type(1)
    for i in prange(w.size):
        gradient = g[i] * scale + weight_decay * w[i]
        m[i] = beta1 * m[i] + (one - beta1) * gradient
        v[i] = beta2 * v[i] + (one - beta2) * gradient * gradient
        w[i] -= lr * m[i] / (np.sqrt(v[i]) * root + eps)


class ThreadedAdam(Adam):
    def step(self, count, grads=None, parts=None):
        self.steps += 1
        w, g, (beta1, beta2) = (
            self.model.params,
            self.model.grads if grads is None else grads,
            self.betas,
        )
        lr, root = self.lr / (1 - beta1**self.steps), 1 / math.sqrt(1 - beta2**self.steps)
        scalars = [
            w.dtype.type(s)
            for s in (1 / count, lr, beta1, beta2, root, self.eps, self.weight_decay)
        ]
        for part in [slice(None)] if parts is None else parts:
            adam_update(w[part], g[part], self.slots["m"][part], self.slots["v"][part], *scalars)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks, as in parallel_cnn_mpi.py
# ----------------------------------------------------------------------------------------------------------------------


class Reducer:
    """Sums the gradients of all ranks with MPI messages while the backward pass goes on.

    start(part) is called when that slice of model.grads is complete; after wait() `total` has the sums over all ranks,
    and the rank updates the weights; after finish() they are updated on all ranks. start_sums(array) adds up a small
    array in place. overlap=False: start() itself waits. seconds: time spent in these functions so far.
    """

    name = "messages"
    parts = None  # slices that this rank has the sums of, and updates: all

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

    def finish(self):
        """Each rank has updated all weights itself."""

    def gather(self, array):
        """The arrays of all ranks, stacked, for statistics of the global batch."""
        started = time.perf_counter()
        stacked = np.empty((self.comm.size, *array.shape), array.dtype)
        self.comm.Allgather(array, stacked)
        self.seconds += time.perf_counter() - started
        return stacked

    def _start(self, part):
        self.requests.append(self.comm.Iallreduce(MPI.IN_PLACE, self.total[part]))
        MPI.Request.Testall(self.requests)  # MPI moves data only while one of its functions runs

    def _wait(self):
        MPI.Request.Waitall(self.requests)
        self.requests.clear()


class SharedMemoryReducer(Reducer):
    """The same where ranks share a machine: nothing is sent, and neither sums nor updates are computed twice.

    Weights, optimizer state and all ranks' gradients lie in a window of shared memory: Hoefler et al., "MPI + MPI: a
    new hybrid approach to parallel programming with MPI plus shared memory", 2013. Each rank adds up its share of a
    slice from all ranks' gradients, and updates its share of the weights: Rajbhandari et al., "ZeRO: memory
    optimizations toward training trillion parameter models", 2020. On several machines, which must have equal numbers
    of ranks, each share is summed over the machines by messages before that, all shares at once.
    """

    name = "shared"

    def __init__(self, comm, model, optimizer, overlap=True):
        super().__init__(comm, model, overlap)
        self.machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.same_share = comm.Split(self.machine.rank)  # one rank of each machine
        self.parts = [self._share(part) for part in model.slices]
        dtype, n, private = (
            model.grads.dtype,
            model.grads.size,
            [model.params, *optimizer.slots.values()],
        )
        size = -(-model.grads.nbytes // 64) * 64  # whole cache lines
        mine = (
            size if self.machine.rank else size * (1 + len(private))
        )  # gradients; rank 0 has room for the rest
        self.window = MPI.Win.Allocate_shared(mine, dtype.itemsize, comm=self.machine)
        memory = [self.window.Shared_query(rank)[0] for rank in range(self.machine.size)]
        self.grads = [np.frombuffer(m, dtype, n) for m in memory]
        shared = [
            np.frombuffer(memory[0], dtype, n, offset=size * (1 + i)) for i in range(len(private))
        ]
        self.window.Lock_all(MPI.MODE_NOCHECK)
        for part in self.parts:  # a page of memory is near the rank that first writes to it
            for ours, theirs in zip(shared, private, strict=True):
                ours[part] = theirs[part]
        self.finish()
        model.move(shared[0], self.grads[self.machine.rank])
        optimizer.slots.update(zip(optimizer.slots, shared[1:], strict=True))
        self.summing = []  # slices that this rank has completed, and the request that tells that all ranks have

    def finish(self):
        """Wait until all shares are updated; then nobody reads this rank's gradients any more either."""
        started = time.perf_counter()
        self.window.Sync()
        self.machine.Barrier()
        self.window.Sync()
        self.seconds += time.perf_counter() - started

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

    def _sum(self):
        mine = self._share(self.summing.pop(0)[0])
        self.window.Sync()
        self.total[mine] = self.grads[0][mine]
        for grads in self.grads[1:]:
            self.total[mine] += grads[mine]
        if self.same_share.size > 1:
            self.requests.append(self.same_share.Iallreduce(MPI.IN_PLACE, self.total[mine]))

    def _share(self, part):
        mine = share(part.stop - part.start, self.machine.rank, self.machine.size)
        return slice(part.start + mine.start, part.start + mine.stop)


def make_reducer(comm, model, optimizer, args):
    sizes = comm.allgather(comm.Split_type(MPI.COMM_TYPE_SHARED).size)
    equal = min(sizes) == max(sizes)
    if args.reduce == "shared" and not equal:
        raise InputError(
            "--reduce shared: the machines have different numbers of ranks: use --reduce messages"
        )
    if args.reduce == "shared" or (args.reduce == "auto" and equal and sizes[0] > 1):
        return SharedMemoryReducer(comm, model, optimizer, args.overlap)
    return Reducer(comm, model, args.overlap)


def train_step(model, optimizer, x, labels, count, reducer, stop=None):
    """One step on a global batch of `count` images, x and labels being this rank's share of them, perhaps none.

    Returns [summed loss, top-1, top-5, ranks that want to stop] over all ranks, and this rank's seconds of the forward
    and backward pass, without communication.
    """
    started, waited = time.perf_counter(), reducer.seconds
    logits = model.forward(x)
    loss, dlogits = softmax_cross_entropy(logits, labels)
    forward = time.perf_counter() - (reducer.seconds - waited)
    sums = np.array([loss, *count_correct(logits, labels), bool(stop)], np.float64)
    reducer.start_sums(sums)
    model.backward(dlogits, on_grad_ready=reducer.start)
    backward = time.perf_counter() - (reducer.seconds - waited)
    reducer.wait()
    optimizer.step(count, reducer.total, reducer.parts)
    reducer.finish()
    return sums, forward - started, backward - forward


def train(model, optimizer, data, args, run, reducer, comm):
    """Train for args.epochs epochs on data; everything measured goes to run."""
    n, size = len(data.y_train), args.global_batch_size
    for epoch in range(run.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        run.start_epoch(epoch, math.ceil(n / size))
        for batch in range(run.batch, math.ceil(n / size)):
            started, waited = time.perf_counter(), reducer.seconds
            index = order[batch * size : (batch + 1) * size]
            mine = index[share(len(index), comm.rank, comm.size)]
            x, labels = load_batch(data.x_train, data.y_train, mine, args.dtype)
            loading = time.perf_counter() - started
            sums, forward, backward = train_step(
                model, optimizer, x, labels, len(index), reducer, run.signal
            )
            run.end_batch(
                len(index),
                float(sums[0]),
                int(sums[1]),
                int(sums[2]),
                loading,
                stop=sums[3] > 0,
                forward=forward,
                backward=backward,
                communication=reducer.seconds - waited,
            )
        check_equal(model, comm, epoch)
        report_communication(run, comm)
        run.end_training()
        test = share(len(data.y_test), comm.rank, comm.size)
        run.end_epoch(
            *evaluate(
                model,
                data.x_test[test],
                data.y_test[test],
                reduce=lambda sums: comm.Allreduce(MPI.IN_PLACE, sums),
            ),
            stop=False,
        )


def choose_threads(args, comm):
    """Set and return the threads of this rank: no more than its share of the cores it may run on, unless forced."""
    cores, local = len(available_cores()), comm.Split_type(MPI.COMM_TYPE_SHARED).size
    mine = max(1, cores // local)
    wanted = (os.environ.get("OMP_NUM_THREADS") or "0").partition(",")[0].strip()
    if not args.num_threads and not wanted.isdecimal():
        raise InputError(
            f"OMP_NUM_THREADS={wanted}: set it to a whole number, or give --num-threads"
        )
    asked = args.num_threads or int(wanted) or mine
    threads = asked if args.force_threads else min(asked, mine)
    if threads < asked:
        print(
            f"--num-threads {threads} instead of {asked}: ranks on this machine: {local}, cores: {cores} "
            f"(--force-threads keeps {asked})",
            file=sys.stderr,
        )
    if local * threads > cores:
        print(
            f"warning: {local} ranks of {threads} threads share {cores} cores: they wait for each other",
            file=sys.stderr,
        )
    if threads > numba.config.NUMBA_NUM_THREADS:
        raise InputError(
            f"{threads} threads: Numba was started with {numba.config.NUMBA_NUM_THREADS}; to force more, "
            f"set NUMBA_NUM_THREADS={threads} in the environment"
        )
    numba.set_num_threads(threads)
    return threads


def compile_kernels(name, dtype, comm):
    """Compile all kernels, or load them from Numba's cache, rank 0 first; returns the seconds that it took."""
    import scipy.linalg.cython_blas  # noqa: F401 (Numba's np.dot calls its BLAS)

    limit_blas_threads(1)  # SciPy's and NumPy's: the threads here are Numba's
    numba.config.THREADING_LAYER = "omp"
    started = time.perf_counter()
    for turn in (True, False):
        if turn == (comm.rank == 0):
            model = make_model(name, 0, dtype)
            logits = model.forward(np.zeros((2, 32, 32, 3), dtype))
            model.backward(softmax_cross_entropy(logits, np.zeros(2, np.uint8))[1])
            ThreadedSGD(model).step(2)
            ThreadedAdam(model).step(2)
        comm.Barrier()
    return time.perf_counter() - started


def make_model(name, seed, dtype):
    """The network that --model names, of threaded layers."""
    if name == "cnn":
        return make_cnn(
            seed,
            dtype,
            conv1=ThreadedConvReLUPool,
            conv2=ThreadedWinogradReLUPool,
            dense=ThreadedDense,
        )
    return make_resnet18(seed, dtype, stem=make_stem, block=ThreadedBasicBlock, dense=ThreadedDense)


def make_stem(rng, dtype):
    return [
        ThreadedConv2D(3, 64, bias=False, rng=rng, dtype=dtype),
        ThreadedNormReLU(64, dtype=dtype),
    ]


def parse_args(argv=None):
    parser = make_parser("parallel_cnn_hybrid", __doc__, MODELS)
    add_rank_options(parser)
    parser.add_argument(
        "--num-threads",
        type=number(int, 1, 1024),
        metavar="N",
        help="threads of a rank (default: $OMP_NUM_THREADS, else its share of the cores)",
    )
    parser.add_argument(
        "--force-threads", action="store_true", help="even if that is more than its share"
    )
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
    seconds = compile_kernels(args.model, np.dtype(args.dtype), comm)
    if not args.quiet:
        print(
            f"{comm.size} ranks x {threads} threads; kernels ready after {seconds:.1f} s of compiling",
            flush=True,
        )
    if warning := blas_warning():
        print(warning, file=sys.stderr)
    data = load_on_all(args, comm)
    model = make_model(args.model, args.seed, np.dtype(args.dtype))
    optimizer = make_optimizer(model, args, sgd=ThreadedSGD, adam=ThreadedAdam)
    reducer = make_reducer(comm, model, optimizer, args)
    model.gather_statistics(reducer.gather)
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # run stops at the first loss that is not finite
        run = together(
            comm,
            lambda: Run(
                args,
                "parallel_cnn_hybrid",
                data,
                lambda: get_arrays(model, optimizer),
                lambda arrays: set_arrays(model, optimizer, arrays),
                {
                    "ranks": comm.size,
                    "reduce": reducer.name,
                    "threads": threads,
                    "compile_seconds": seconds,
                    "threading_layer": numba.threading_layer(),
                },
                comm.rank,
            ),
        )
        with running_on_all(run, model, optimizer, comm):
            train(model, optimizer, data, args, run, reducer, comm)
            run.finish()


if __name__ == "__main__":
    run_main(main)
