"""Train the CNN or ResNet-18 with MPI ranks × threads: parallel_cnn_mpi.py with threaded layers.

A rank computes its shard of a batch with several threads, which share its weights and gradients:
with fewer ranks there is less to sum. The layers that cost most are Numba kernels; ReLU, the loss
and the like are those of common.py. In an im2col layer a thread takes whole images through the
layer in a workspace of its own. In a Winograd layer the threads divide first the images, then the
36 matrix products. The dense layers, which have 98 % of the CNN's parameters, and the optimizer
divide the parameters instead.

    mpirun -np 2 python parallel_cnn_hybrid.py
    mpirun -np 2 python parallel_cnn_hybrid.py --num-threads 4 --epochs 10
    python parallel_cnn_hybrid.py --num-threads 2 --global-batch-size 128

Result: one rank on 2 cores. The CNN, batch 128: 2,595 images/s, 1.63 (1.55–1.91) times PyTorch's
1,593. ResNet-18, batch 64: 78 images/s, 1.82 (1.77–1.88) times PyTorch's 43 (AMD EPYC; median
(min–max) of 11 paired samples).
"""

import argparse
import contextlib
import faulthandler
import functools
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

# A rank that ends by itself would leave the others waiting for it for ever. So, until guard_ranks()
# takes over: Ctrl-C kills, since mpirun ends the ranks if a signal has killed one; nobody waits
# more than 120 s in the import of MPI, where all ranks meet; a later import that fails ends all.
if __name__ == "__main__":
    with contextlib.suppress(ValueError):  # raised in a thread, which gets no signals
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.dump_traceback_later(120, exit=True, file=2)
if os.environ.get("SLURM_MPI_TYPE") == "pmi2":
    # srun --mpi=pmi2 cannot hand on the long addresses of UCX; those of MPICH's OFI are short.
    os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
from mpi4py import MPI

faulthandler.cancel_dump_traceback_later()


def end_all_ranks(*error):
    sys.__excepthook__(*error)
    MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    sys.excepthook = end_all_ranks

import numba
import numpy as np
from numba import get_thread_id, njit, prange

from common import (
    CACHE_BYTES,
    IMAGE_SHAPE,
    MODELS,
    SGD,
    WINOGRAD_G,
    WINOGRAD_POINTS,
    Adam,
    BasicBlock,
    BatchNorm2D,
    Checkpoint,
    Conv2D,
    ConvReLUPool,
    Dense,
    InputError,
    Layer,
    MaxPool2D,
    Model,
    OverlapReducer,
    ReLU,
    RunLog,
    SharedMemoryReducer,
    StopSignal,
    WinogradConv2D,
    abort_on_exception,
    add_mpi_options,
    add_recipe_options,
    assert_replicas_identical,
    available_cores,
    blas_warning,
    check_launcher,
    choose_reduce,
    collective,
    collective_run,
    cores_of_machine,
    count_correct,
    draw_augmentation,
    epoch_order,
    evaluate,
    gather_from_all,
    gather_trace,
    guard_ranks,
    learning_rate,
    limit_blas_threads,
    load_batch,
    load_data_collectively,
    log_communication,
    make_cnn,
    make_optimizer,
    make_parser,
    make_resnet18,
    number,
    require_finite,
    run_main,
    save_and_stop,
    shard,
    softmax_cross_entropy,
    warn_if_oversubscribed,
    winograd_fits,
)


def choose_kernel_cache() -> bool:
    """Set the folder in which Numba keeps compiled kernels; False if there is none to be had.

    The first of these in which a file can be made: $NUMBA_CACHE_DIR, beside this file, in the home
    folder, in a temporary folder of the user's own. A container may lack the first three.
    """
    own = Path(tempfile.gettempdir()) / f"parallel-cnn-{os.getuid()}"
    beside = Path(__file__).resolve().with_name("__pycache__")
    folders = [numba.config.CACHE_DIR, beside, os.path.expanduser("~/.cache/numba"), own]
    for folder in folders:
        if not folder or not os.path.isabs(folder):  # no home folder: "~" stays as it is
            continue
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            # The cache is code that will be run: what another user may have written is not used.
            if folder == own and (own.lstat().st_uid != os.getuid() or own.lstat().st_mode & 0o077):
                continue
            with tempfile.TemporaryFile(dir=folder):
                pass
            if folder != beside:  # where Numba would look by itself
                numba.config.CACHE_DIR = str(folder)
            return True
    return False


# --------------------------------------------------------------------------------------------------
# How threads share the work
#
# Numba compiles a kernel to machine code. `prange` divides its iterations among OpenMP threads, a
# contiguous range for each. Nothing orders the threads before the end of the loop, so no two
# iterations may write to the same place: every thread has a workspace of its own, which also stays
# in the cache of its core. (Arrays with one entry per thread have plural names: `cols` has `col`s.)
# What all images add to, a weight's gradient, each thread sums apart; the layer adds those sums up.
# --------------------------------------------------------------------------------------------------

# No fastmath: Numba optimises the body of a prange by itself and again within its function, so what
# it has just compiled and what it loads from its cache may differ as machine code. With strict
# arithmetic both compute the same bits.
kernel = functools.partial(njit, cache=choose_kernel_cache())
inlined = kernel(forceinline=True)


# Loops over neighbouring values, the channels of one position: the compiler makes vector
# instructions of them. An `inlined` function becomes part of the kernel that calls it.


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


# --------------------------------------------------------------------------------------------------
# Optimizers: the simplest kernels, one iteration per parameter
# --------------------------------------------------------------------------------------------------


@kernel(parallel=True)
def sgd_update(w, g, velocity, scale, lr, momentum, weight_decay):
    """common.SGD's update of w from the summed gradients g, all in one pass over memory."""
    for i in prange(w.size):
        velocity[i] = momentum * velocity[i] + (g[i] * scale + weight_decay * w[i])
        w[i] -= lr * velocity[i]


class ThreadedSGD(SGD):
    def step(self, count, grads=None, shards=None):
        self.steps += 1
        w = self.model.params
        g = self.model.grads if grads is None else grads
        velocity = self.state["velocity"]

        # Python's floats would make the kernel compute in float64.
        scalars = [1 / count, self.lr, self.momentum, self.weight_decay]
        scalars = [w.dtype.type(value) for value in scalars]
        for own in [slice(None)] if shards is None else shards:
            sgd_update(w[own], g[own], velocity[own], *scalars)


@kernel(parallel=True)
def adam_update(w, g, m, v, scale, lr, beta1, beta2, v_correction, eps, weight_decay):
    """common.Adam's update of w; lr includes the bias correction of m."""
    one = w.dtype.type(1)
    for i in prange(w.size):
        gradient = g[i] * scale + weight_decay * w[i]
        m[i] = beta1 * m[i] + (one - beta1) * gradient
        v[i] = beta2 * v[i] + (one - beta2) * gradient * gradient
        w[i] -= lr * m[i] / (np.sqrt(v[i]) * v_correction + eps)


class ThreadedAdam(Adam):
    def step(self, count, grads=None, shards=None):
        self.steps += 1
        w = self.model.params
        g = self.model.grads if grads is None else grads
        m = self.state["m"]
        v = self.state["v"]

        beta1, beta2 = self.betas
        lr = self.lr / (1 - beta1**self.steps)
        v_correction = 1 / math.sqrt(1 - beta2**self.steps)
        scalars = [1 / count, lr, beta1, beta2, v_correction, self.eps, self.weight_decay]
        scalars = [w.dtype.type(value) for value in scalars]
        for own in [slice(None)] if shards is None else shards:
            adam_update(w[own], g[own], m[own], v[own], *scalars)


# --------------------------------------------------------------------------------------------------
# Dense layers: threads share the input features, not the images
#
# The CNN's first dense layer has 98 % of its parameters. If threads shared the images, each would
# read all of W and have a dW of its own, 4 MB. So each has its rows of W and dW instead.
# --------------------------------------------------------------------------------------------------


@inlined
def thread_range(n, t, threads):
    """Thread t's range of n items, as start and stop."""
    return n * t // threads, n * (t + 1) // threads


@kernel(parallel=True)
def dense_forward(x, W, xs, outs):
    """outs[t] (N, F_out) = thread t's columns of x times its rows of W; their sum is x @ W.

    xs[t] = thread t's columns of x (N, F_in), contiguous as BLAS wants them, kept for backward().
    """
    threads = len(outs)
    n = len(x)
    for t in prange(threads):
        start, stop = thread_range(len(W), t, threads)
        local_x = xs[t, : n * (stop - start)].reshape(n, stop - start)
        local_x[...] = x[:, start:stop]
        np.dot(local_x, W[start:stop], outs[t])


@kernel(parallel=True)
def dense_backward(xs, dout, W, dW, dx, dx_transposed):
    """dW = xᵀ dout and dx = dout Wᵀ: each thread its rows of dW and its columns of dx (N, F_in)."""
    threads = len(xs)
    n = len(dout)
    for t in prange(threads):
        start, stop = thread_range(len(W), t, threads)
        local_x = xs[t, : n * (stop - start)].reshape(n, stop - start)
        np.dot(local_x.T, dout, dW[start:stop])
        # BLAS is faster with the long dimension first: dxᵀ (F_in, N) = W doutᵀ, then transposed,
        # 16 columns at a time, a cache line of dx.
        np.dot(W[start:stop], dout.T, dx_transposed[start:stop])
        for first in range(start, stop, 16):
            for i in range(n):
                for k in range(first, min(first + 16, stop)):
                    dx[i, k] = dx_transposed[k, i]


class ThreadedDense(Dense):
    """common.Dense with threads: x (N, F_in) → x @ W + b (N, F_out)."""

    def forward(self, x):
        self._check_features(x)
        n, features = x.shape
        threads = numba.get_num_threads()
        self.xs = self.workspace("xs", (threads, n * -(-features // threads)), x.dtype)
        outs = self.workspace("outs", (threads, n, self.b.size), x.dtype)
        dense_forward(x, self.W, self.xs, outs)

        out = self.workspace("out", (n, self.b.size), x.dtype)
        outs.sum(axis=0, out=out)
        out += self.b
        return out

    def backward(self, dout):
        n = len(dout)
        features = len(self.W)
        if n == 0:  # BLAS takes no empty matrices; NumPy does
            self.x = np.zeros((0, features), dout.dtype)
            return super().backward(dout)
        dx = self.workspace("dx", (n, features), dout.dtype)
        dx_transposed = self.workspace("dx_transposed", (features, n), dout.dtype)
        dense_backward(self.xs, dout, self.W, self.dW, dx, dx_transposed)
        dout.sum(axis=0, out=self.db)
        return dx


# --------------------------------------------------------------------------------------------------
# Any convolution, by im2col: the windows of a few images are the rows of one matrix
# --------------------------------------------------------------------------------------------------


@inlined
def pad(x, padding, padded):
    """x (H, W, C) → padded (H + 2 padding, (W + 2 padding)·C): the image with zeros around it."""
    height, width, channels = x.shape
    padded[...] = 0
    for h in range(height):
        inner = padded[padding + h, padding * channels : (padding + width) * channels]
        copy(x[h].reshape(-1), inner)


@inlined
def copy_windows(padded, channels, top, left, stride, col):
    """col (OH, OW, K, K·C) = the windows from (top, left) on, each K lines of K·C values."""
    oh, ow, kernel_size, line = col.shape
    for h in range(oh):
        for w in range(ow):
            start = (left + stride * w) * channels
            for k in range(kernel_size):
                copy(padded[top + stride * h + k, start : start + line], col[h, w, k])


@inlined
def col2im(col, stride, padding, padded, dx):
    """pad and copy_windows transposed: dx (H, W, C) = the sum of the windows' gradients col."""
    height, width, channels = dx.shape
    oh, ow, kernel_size, line = col.shape
    padded[...] = 0
    for i in range(oh):
        for j in range(ow):
            left = stride * j * channels
            for k in range(kernel_size):
                add(col[i, j, k], padded[stride * i + k, left : left + line])
    for h in range(height):
        inner = padded[padding + h, padding * channels : (padding + width) * channels]
        copy(inner, dx[h].reshape(-1))


@kernel(parallel=True)
def conv_forward(x, W, out, stride, padding, padded_images, cols):
    """x (N, H, W, C), W (K·K·C, F) → out (N, OH, OW, F).

    Threads share chunks of images, as many as cols[t] (chunk size, OH, OW, K, K·C) has room for:
    so the matrix of a chunk is still in the cache when it is multiplied.
    """
    n, oh, ow, channels = out.shape
    chunk_size = cols.shape[1]
    for chunk in prange(-(-n // chunk_size)):  # n / chunk_size, rounded up
        t = get_thread_id()
        start = chunk * chunk_size
        stop = min(start + chunk_size, n)
        for i in range(start, stop):
            pad(x[i], padding, padded_images[t])
            copy_windows(padded_images[t], x.shape[3], 0, 0, stride, cols[t, i - start])
        col = cols[t, : stop - start].reshape((stop - start) * oh * ow, len(W))
        np.dot(col, W, out[start:stop].reshape(-1, channels))


@kernel(parallel=True)
def conv_backward(x, dout, W, dx, dWs, stride, padding, padded_images, cols, products):
    """Add each chunk's dW (K·K·C, F) to its thread's sum, dWs[t]; set dx, unless that is empty.

    The matrix is made again, which is cheaper than to fetch one K² times as large as x from memory.
    """
    n, oh, ow, channels = dout.shape
    chunk_size = cols.shape[1]
    for chunk in prange(-(-n // chunk_size)):
        t = get_thread_id()
        start = chunk * chunk_size
        stop = min(start + chunk_size, n)
        for i in range(start, stop):
            pad(x[i], padding, padded_images[t])
            copy_windows(padded_images[t], x.shape[3], 0, 0, stride, cols[t, i - start])
        col = cols[t, : stop - start].reshape((stop - start) * oh * ow, len(W))
        dy = dout[start:stop].reshape(-1, channels)
        np.dot(col.T, dy, products[t])
        dWs[t] += products[t]
        if len(dx):
            np.dot(dy, W.T, col)  # the windows' gradients, in the place of the windows
            for i in range(start, stop):
                col2im(cols[t, i - start], stride, padding, padded_images[t], dx[i])


class ThreadedConv2D(Conv2D):
    """common.Conv2D with threads: any kernel size, stride and padding."""

    MIN_ROWS = 512  # of a matrix product, if there are enough images: BLAS is slow on small ones

    def forward(self, x):
        """x (N, H, W, C_in) → (N, OH, OW, C_out)"""
        self._check_channels(x)
        n, h, w, c = x.shape
        k = self.kernel_size
        padded_h = h + 2 * self.padding
        padded_w = w + 2 * self.padding
        oh = (padded_h - k) // self.stride + 1
        ow = (padded_w - k) // self.stride + 1
        threads = numba.get_num_threads()

        # Enough images for MIN_ROWS rows, but at least one chunk for every thread.
        chunk_size = max(1, min(-(-self.MIN_ROWS // (oh * ow)), -(-n // threads)))
        self.padded_images = self.workspace(
            "padded_images", (threads, padded_h, padded_w * c), x.dtype
        )
        self.cols = self.workspace("cols", (threads, chunk_size, oh, ow, k, k * c), x.dtype)

        self.x = x
        out = self.workspace("out", (n, oh, ow, self.b.size), x.dtype)
        W = self.W.reshape(-1, self.b.size)
        conv_forward(x, W, out, self.stride, self.padding, self.padded_images, self.cols)
        if self.has_bias:
            out += self.b
        return out

    def backward(self, dout):
        """dout (N, OH, OW, C_out) → dx (N, H, W, C_in), or None if nobody needs it."""
        W = self.W.reshape(-1, self.b.size)
        threads = len(self.cols)
        dWs = self.workspace("dWs", (threads, *W.shape), dout.dtype)
        products = self.workspace("products", (threads, *W.shape), dout.dtype)
        n = len(self.x) if self.requires_input_grad else 0
        dx = self.workspace("dx", (n, *self.x.shape[1:]), dout.dtype)

        dWs.fill(0)
        geometry = (self.stride, self.padding, self.padded_images, self.cols)
        conv_backward(self.x, dout, W, dx, dWs, *geometry, products)
        dWs.sum(axis=0, out=self.dW.reshape(W.shape))
        if self.has_bias:
            dout.sum(axis=(0, 1, 2), out=self.db)
        return dx if self.requires_input_grad else None


# --------------------------------------------------------------------------------------------------
# Convolution with bias, ReLU and 2×2 pooling in one pass
#
# max(ReLU(y + b)) = ReLU(max(y) + b): bias and ReLU work on a quarter of the values, and backward()
# needs no more of y than which of four was the maximum.
# --------------------------------------------------------------------------------------------------

CLOSED = 4  # argmax where ReLU is closed; otherwise 0 to 3, row by row


@inlined
def relu_pool(y0, y1, y2, y3, b, out, argmax):
    """out = ReLU(max(y0, y1, y2, y3) + b); argmax: which it was, of equal ones the first.

    y0 and y1 are the upper, y2 and y3 the lower positions of a pooling window. All (channels,).
    """
    for c in range(out.size):
        upper = max(y0[c], y1[c])
        lower = max(y2[c], y3[c])
        upper_argmax = 0 if y0[c] >= y1[c] else 1
        lower_argmax = 2 if y2[c] >= y3[c] else 3
        largest = upper_argmax if upper >= lower else lower_argmax
        value = max(upper, lower) + b[c]
        is_closed = value <= 0  # False for NaN: if all four are, as after a wild update, so is out
        out[c] = 0 if is_closed else value
        argmax[c] = CLOSED if is_closed else largest


@inlined
def relu_pool_gradient(dout, argmax, dy0, dy1, dy2, dy3, db):
    """relu_pool transposed: dout goes to the position of the maximum, and to db, unless closed."""
    zero = dout.dtype.type(0)
    for c in range(dout.size):
        dy0[c] = dout[c] if argmax[c] == 0 else zero
        dy1[c] = dout[c] if argmax[c] == 1 else zero
        dy2[c] = dout[c] if argmax[c] == 2 else zero
        dy3[c] = dout[c] if argmax[c] == 3 else zero
        db[c] += dout[c] if argmax[c] != CLOSED else zero


@inlined
def im2col_for_pooling(x, padded, col):
    """x (H, W, C) → col (4, H/2, W/2, 3, 3·C): the windows of the four positions of each pool."""
    pad(x, 1, padded)
    for i in range(2):
        for j in range(2):
            copy_windows(padded, x.shape[2], i, j, 2, col[2 * i + j])


@kernel(parallel=True)
def conv_pool_forward(x, W, b, out, argmax, padded_images, cols, ys):
    """x (N, H, W, C), W (9·C, F) → out, argmax (N, H/2, W/2, F).

    An image's convolution, y (4, H/2, W/2, F), is pooled while it is in the cache. y has the four
    positions of a pooling window in four arrays.
    """
    n, oh, ow, channels = out.shape
    for i in prange(n):
        t = get_thread_id()
        y = ys[t]
        im2col_for_pooling(x[i], padded_images[t], cols[t])
        np.dot(cols[t].reshape(4 * oh * ow, len(W)), W, y.reshape(-1, channels))
        for h in range(oh):
            for w in range(ow):
                y0 = y[0, h, w]
                y1 = y[1, h, w]
                y2 = y[2, h, w]
                y3 = y[3, h, w]
                relu_pool(y0, y1, y2, y3, b, out[i, h, w], argmax[i, h, w])


@kernel(parallel=True)
def conv_pool_backward(x, dout, argmax, dWs, dbs, padded_images, cols, ys, products):
    """Add each image's dW (9·C, F) and db (F,) to its thread's sums, dWs[t] and dbs[t]."""
    n, oh, ow, channels = dout.shape
    for i in prange(n):
        t = get_thread_id()
        dy = ys[t]
        for h in range(oh):
            for w in range(ow):
                dy0 = dy[0, h, w]
                dy1 = dy[1, h, w]
                dy2 = dy[2, h, w]
                dy3 = dy[3, h, w]
                relu_pool_gradient(dout[i, h, w], argmax[i, h, w], dy0, dy1, dy2, dy3, dbs[t])
        im2col_for_pooling(x[i], padded_images[t], cols[t])
        col = cols[t].reshape(4 * oh * ow, len(products[t]))
        np.dot(col.T, dy.reshape(-1, channels), products[t])
        dWs[t] += products[t]


class ThreadedConvReLUPool(ConvReLUPool):
    """common.ConvReLUPool with threads, for a model's first layer: backward() returns no dx.

    Kernel 3, stride 1, padding 1; H and W: even.
    """

    def __init__(self, in_channels, out_channels, *, rng=None, dtype=np.float32):
        super().__init__(in_channels, out_channels, rng=rng, dtype=dtype)

    def forward(self, x):
        """x (N, H, W, C_in) → (N, H/2, W/2, C_out)"""
        self._check_channels(x)
        n, h, w, c = x.shape
        if h % 2 or w % 2:
            raise ValueError(
                "ThreadedConvReLUPool takes images of 2n x 2m pixels, "
                f"not {h}x{w}: use ConvReLUPool"
            )
        f = self.b.size
        threads = numba.get_num_threads()
        self.x = x
        self.out = self.workspace("out", (n, h // 2, w // 2, f), x.dtype)
        self.argmax = self.workspace("argmax", (n, h // 2, w // 2, f), np.uint8)
        self.thread_buffers = (
            self.workspace("padded_images", (threads, h + 2, (w + 2) * c), x.dtype),
            self.workspace("cols", (threads, 4, h // 2, w // 2, 3, 3 * c), x.dtype),
            self.workspace("ys", (threads, 4, h // 2, w // 2, f), x.dtype),
        )
        W = self.W.reshape(-1, f)
        conv_pool_forward(x, W, self.b, self.out, self.argmax, *self.thread_buffers)
        return self.out

    def backward(self, dout):
        """dout (N, H/2, W/2, C_out): sets dW and db."""
        f = self.b.size
        W_shape = (self.W.size // f, f)
        threads = numba.get_num_threads()
        dWs = self.workspace("dWs", (threads, *W_shape), dout.dtype)
        dbs = self.workspace("dbs", (threads, f), dout.dtype)
        products = self.workspace("products", (threads, *W_shape), dout.dtype)
        dWs.fill(0)
        dbs.fill(0)
        conv_pool_backward(self.x, dout, self.argmax, dWs, dbs, *self.thread_buffers, products)
        dWs.sum(axis=0, out=self.dW.reshape(W_shape))
        dbs.sum(axis=0, out=self.db)


class ThreadedConvThenPool(Layer):
    """Convolution, ReLU and 2×2 pooling one after the other: any image size, but more traffic."""

    def __init__(self, in_channels, out_channels, *, rng=None, dtype=np.float32):
        self.conv = ThreadedConv2D(in_channels, out_channels, rng=rng, dtype=dtype)
        self.layers = [self.conv, ReLU(), MaxPool2D(2)]

    def leaves(self):
        yield from self.layers

    def forward(self, x):
        """x (N, H, W, C_in) → (N, H // 2, W // 2, C_out)"""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dout):
        """dout (N, H // 2, W // 2, C_out) → dx (N, H, W, C_in), or None if nobody needs it."""
        self.conv.requires_input_grad = self.requires_input_grad
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout


# --------------------------------------------------------------------------------------------------
# Winograd's convolution F(4×4, 3×3): see WinogradConv2D in common.py for the idea and the paper
#
#   forward     d    6×6 tiles of x, 4 apart     V = Bᵀ d B    36 matrices (tiles, C)
#               w    3×3 weights                 U = G w Gᵀ    36 matrices (C, F)
#                                                M = V U       36 matrices (tiles, F)
#               y    4×4 tiles of the output     y = Aᵀ M A
#   backward    dM = A dy Aᵀ     dV = dM Uᵀ    dd = B dV Bᵀ, which adds up to dx where tiles overlap
#                                dU = Vᵀ dM    dw = Gᵀ dU G
#
# Threads share the images in d → V and M → y, and the 36 matrices in V → M: so no thread needs all
# of U, nor a dU of its own.
#
# The transforms work on one tile at a time, and BLOCK of its channels: at most 9 KiB, which fit
# into the fastest cache. The kernels take views whose axes count tiles and blocks of channels:
#
#   x       (N, H, W, C/BLOCK, BLOCK)
#   V, M    (36, N, H/4, W/4, C/BLOCK, BLOCK)      position (h, w) of a tile is in matrix 6·h + w
#   y       (N, H/4, 4, W/4, 4, F/BLOCK, BLOCK)    when pooled, 2 in the place of 4
#   tile    (6, 6, BLOCK)
# --------------------------------------------------------------------------------------------------

BLOCK = 32
ROW = 6 * BLOCK  # between the rows of a flat tile; between its columns: BLOCK
POINT_P = float(WINOGRAD_POINTS[1])  # the points are 0, p, -p, q, -q and infinity
POINT_Q = float(WINOGRAD_POINTS[3])


# The four transforms of one row or column of a flat tile, in place: it begins at `start`, `step` is
# between its values. The points p and -p have equal even powers and opposite odd ones, so their two
# sums are even + odd and even - odd: a quarter of the operations of a product with the matrix.


@inlined
def transform_input(tile, start, step):
    """Bᵀ d: six values of the input → six values of V."""
    p = tile.dtype.type(POINT_P)
    q = tile.dtype.type(POINT_Q)
    for i in range(start, start + BLOCK):
        d0 = tile[i]
        d1 = tile[i + step]
        d2 = tile[i + 2 * step]
        d3 = tile[i + 3 * step]
        d4 = tile[i + 4 * step]
        d5 = tile[i + 5 * step]
        even_p = d4 - q * q * d2
        odd_p = p * (d3 - q * q * d1)
        even_q = d4 - p * p * d2
        odd_q = q * (d3 - p * p * d1)
        tile[i] = p * p * q * q * d0 - (p * p + q * q) * d2 + d4
        tile[i + step] = even_p + odd_p
        tile[i + 2 * step] = even_p - odd_p
        tile[i + 3 * step] = even_q + odd_q
        tile[i + 4 * step] = even_q - odd_q
        tile[i + 5 * step] = p * p * q * q * d1 - (p * p + q * q) * d3 + d5


@inlined
def transform_input_gradient(tile, start, step):
    """B dv: transform_input transposed, six values of dV → six of the input's gradient."""
    p = tile.dtype.type(POINT_P)
    q = tile.dtype.type(POINT_Q)
    for i in range(start, start + BLOCK):
        v0 = tile[i]
        v1 = tile[i + step]
        v2 = tile[i + 2 * step]
        v3 = tile[i + 3 * step]
        v4 = tile[i + 4 * step]
        v5 = tile[i + 5 * step]
        even_p = v1 + v2
        odd_p = p * (v1 - v2)
        even_q = v3 + v4
        odd_q = q * (v3 - v4)
        tile[i] = p * p * q * q * v0
        tile[i + step] = p * p * q * q * v5 - q * q * odd_p - p * p * odd_q
        tile[i + 2 * step] = -(p * p + q * q) * v0 - q * q * even_p - p * p * even_q
        tile[i + 3 * step] = odd_p + odd_q - (p * p + q * q) * v5
        tile[i + 4 * step] = v0 + even_p + even_q


@inlined
def transform_output(tile, start, step):
    """Aᵀ m: six values of M → four values of the output."""
    p = tile.dtype.type(POINT_P)
    q = tile.dtype.type(POINT_Q)
    for i in range(start, start + BLOCK):
        m1 = tile[i + step]
        m2 = tile[i + 2 * step]
        m3 = tile[i + 3 * step]
        m4 = tile[i + 4 * step]
        even_p = m1 + m2
        odd_p = p * (m1 - m2)
        even_q = m3 + m4
        odd_q = q * (m3 - m4)
        tile[i] += even_p + even_q
        tile[i + step] = odd_p + odd_q
        tile[i + 2 * step] = p * p * even_p + q * q * even_q
        tile[i + 3 * step] = p * p * odd_p + q * q * odd_q + tile[i + 5 * step]


@inlined
def transform_output_gradient(tile, start, step):
    """A dy: transform_output transposed, four values of the output's gradient → six of dM."""
    p = tile.dtype.type(POINT_P)
    q = tile.dtype.type(POINT_Q)
    for i in range(start, start + BLOCK):
        y0 = tile[i]
        y1 = tile[i + step]
        y2 = tile[i + 2 * step]
        y3 = tile[i + 3 * step]
        even_p = y0 + p * p * y2
        odd_p = p * (y1 + p * p * y3)
        even_q = y0 + q * q * y2
        odd_q = q * (y1 + q * q * y3)
        tile[i + step] = even_p + odd_p
        tile[i + 2 * step] = even_p - odd_p
        tile[i + 3 * step] = even_q + odd_q
        tile[i + 4 * step] = even_q - odd_q
        tile[i + 5 * step] = y3


# A whole tile: its rows and its columns.


@inlined
def input_tile(tile):
    """V = Bᵀ d B"""
    flat = tile.reshape(-1)
    for h in range(6):
        transform_input(flat, h * ROW, BLOCK)
    for w in range(6):
        transform_input(flat, w * BLOCK, ROW)


@inlined
def input_tile_gradient(tile):
    """dd = B dV Bᵀ"""
    flat = tile.reshape(-1)
    for w in range(6):
        transform_input_gradient(flat, w * BLOCK, ROW)
    for h in range(6):
        transform_input_gradient(flat, h * ROW, BLOCK)


@inlined
def output_tile(tile):
    """y = Aᵀ M A, in the upper left 4×4 positions"""
    flat = tile.reshape(-1)
    for h in range(6):
        transform_output(flat, h * ROW, BLOCK)
    for w in range(4):
        transform_output(flat, w * BLOCK, ROW)


@inlined
def output_tile_gradient(tile):
    """dM = A dy Aᵀ"""
    flat = tile.reshape(-1)
    for w in range(4):
        transform_output_gradient(flat, w * BLOCK, ROW)
    for h in range(6):
        transform_output_gradient(flat, h * ROW, BLOCK)


@inlined
def read_matrices(matrices, i, row, col, block, tile):
    for h in range(6):
        for w in range(6):
            copy(matrices[6 * h + w, i, row, col, block], tile[h, w])


@inlined
def write_matrices(tile, matrices, i, row, col, block):
    for k in range(36):
        copy(tile[k // 6, k % 6], matrices[k, i, row, col, block])


# The kernels: threads share the images; inside are loops over tiles and blocks of channels. An
# input tile begins one position above and left of its output tile: that is the padding.


@kernel(parallel=True)
def transform_images(x, V, tiles):
    """d → V = Bᵀ d B"""
    n, height, width, blocks, _ = x.shape
    for i in prange(n):
        tile = tiles[get_thread_id()]
        for row in range(height // 4):
            for col in range(width // 4):
                top = 4 * row - 1
                left = 4 * col - 1
                for block in range(blocks):
                    for h in range(6):
                        for w in range(6):
                            if 0 <= top + h < height and 0 <= left + w < width:
                                copy(x[i, top + h, left + w, block], tile[h, w])
                            else:
                                tile[h, w] = 0
                    input_tile(tile)
                    write_matrices(tile, V, i, row, col, block)


@kernel(parallel=True)
def transform_images_gradient(dV, dx, tiles):
    """dd = B dV Bᵀ, and dx = the sum of the overlapping tiles dd."""
    n, height, width, blocks, _ = dx.shape
    for i in prange(n):
        tile = tiles[get_thread_id()]
        dx[i] = 0
        for row in range(height // 4):
            for col in range(width // 4):
                top = 4 * row - 1
                left = 4 * col - 1
                for block in range(blocks):
                    read_matrices(dV, i, row, col, block, tile)
                    input_tile_gradient(tile)
                    for h in range(6):
                        for w in range(6):
                            if 0 <= top + h < height and 0 <= left + w < width:
                                add(tile[h, w], dx[i, top + h, left + w, block])


@kernel(parallel=True)
def transform_products(M, out, tiles):
    """M → y = Aᵀ M A"""
    n, rows, _, cols, _, blocks, _ = out.shape
    for i in prange(n):
        tile = tiles[get_thread_id()]
        for row in range(rows):
            for col in range(cols):
                for block in range(blocks):
                    read_matrices(M, i, row, col, block, tile)
                    output_tile(tile)
                    for h in range(4):
                        for w in range(4):
                            copy(tile[h, w], out[i, row, h, col, w, block])


@kernel(parallel=True)
def transform_products_gradient(dout, dM, tiles):
    """dM = A dy Aᵀ"""
    n, rows, _, cols, _, blocks, _ = dout.shape
    for i in prange(n):
        tile = tiles[get_thread_id()]
        for row in range(rows):
            for col in range(cols):
                for block in range(blocks):
                    for h in range(4):
                        for w in range(4):
                            copy(dout[i, row, h, col, w, block], tile[h, w])
                    output_tile_gradient(tile)
                    write_matrices(tile, dM, i, row, col, block)


@kernel(parallel=True)
def pool_products(M, b, out, argmax, tiles):
    """transform_products with bias b (F/BLOCK, BLOCK), ReLU and pooling.

    The 4×4 positions of y are 2×2 pooling windows; only their maxima leave the cache.
    """
    n, rows, _, cols, _, blocks, _ = out.shape
    for i in prange(n):
        tile = tiles[get_thread_id()]
        for row in range(rows):
            for col in range(cols):
                for block in range(blocks):
                    read_matrices(M, i, row, col, block, tile)
                    output_tile(tile)
                    for h in range(2):
                        for w in range(2):
                            y0 = tile[2 * h, 2 * w]
                            y1 = tile[2 * h, 2 * w + 1]
                            y2 = tile[2 * h + 1, 2 * w]
                            y3 = tile[2 * h + 1, 2 * w + 1]
                            place = (i, row, h, col, w, block)
                            relu_pool(y0, y1, y2, y3, b[block], out[place], argmax[place])


@kernel(parallel=True)
def pool_products_gradient(dout, argmax, dM, dbs, tiles):
    """pool_products transposed; dbs (N, F/BLOCK, BLOCK): each image's db."""
    n, rows, _, cols, _, blocks, _ = dout.shape
    for i in prange(n):
        tile = tiles[get_thread_id()]
        dbs[i] = 0
        for row in range(rows):
            for col in range(cols):
                for block in range(blocks):
                    db = dbs[i, block]
                    for h in range(2):
                        for w in range(2):
                            dy0 = tile[2 * h, 2 * w]
                            dy1 = tile[2 * h, 2 * w + 1]
                            dy2 = tile[2 * h + 1, 2 * w]
                            dy3 = tile[2 * h + 1, 2 * w + 1]
                            place = (i, row, h, col, w, block)
                            relu_pool_gradient(dout[place], argmax[place], dy0, dy1, dy2, dy3, db)
                    output_tile_gradient(tile)
                    write_matrices(tile, dM, i, row, col, block)


@kernel(parallel=True)
def transform_weights(matrix, weights, out):
    """out = matrix @ weights, for a small matrix with zeros and many columns of weights.

    w → U with the matrix G ⊗ G (36, 9) and weights (9, C·F); dU → dw with its transpose.
    """
    columns = weights.shape[1]
    for block in prange(-(-columns // 256)):
        start = 256 * block
        stop = min(start + 256, columns)
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
    """dV = dM Uᵀ; dU = Vᵀ dM in the first chunk of a batch, and added to dU in the others."""
    for k in prange(36):
        if first:
            np.dot(V[k].T, dM[k], dU[k])
        else:
            product = products[get_thread_id()]
            np.dot(V[k].T, dM[k], product)
            dU[k] += product
        np.dot(dM[k], U[k].T, dV[k])


def by_block(x):
    """A view of x (..., C) as (..., C/BLOCK, BLOCK)."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def by_tile(y, tile_size):
    """A view of y (N, H, W, C) as (N, rows, tile_size, columns, tile_size, C/BLOCK, BLOCK)."""
    n, h, w, c = y.shape
    return by_block(y.reshape(n, h // tile_size, tile_size, w // tile_size, tile_size, c))


class ThreadedWinogradConv2D(WinogradConv2D):
    """common.WinogradConv2D with threads. in_channels, out_channels: multiples of BLOCK."""

    def __init__(self, in_channels, out_channels, *, bias=True, rng=None, dtype=np.float32):
        for c in (in_channels, out_channels):
            if c % BLOCK:
                raise ValueError(f"{c} channels: {type(self).__name__} takes multiples of {BLOCK}")
        super().__init__(in_channels, out_channels, bias=bias, rng=rng, dtype=dtype)

    def forward(self, x):
        """x (N, H, W, C_in) → (N, H, W, C_out); H and W: multiples of 4."""
        self._check_channels(x)
        n, h, w, c = x.shape
        if h % 4 or w % 4:
            raise ValueError(
                f"{type(self).__name__} takes images of 4n x 4m pixels, not {h}x{w}: use Conv2D"
            )
        self.x_shape = x.shape
        self.tiles = self.workspace("tiles", (numba.get_num_threads(), 6, 6, BLOCK), x.dtype)

        # U = G w Gᵀ for all channels at once: vec(G w Gᵀ) = (G ⊗ G) vec(w)
        self.G2 = np.kron(WINOGRAD_G, WINOGRAD_G).astype(x.dtype)
        self.U = self.workspace("U", (36, c, self.b.size), x.dtype)
        transform_weights(self.G2, self.W.reshape(9, -1), self.U.reshape(36, -1))

        # backward() needs V again. A chunk of images takes as many rows of this memory, and uses
        # all of them as 36 matrices: a row by itself is no image's V.
        self.V_memory = self.workspace("V", (n, 36 * (h // 4) * (w // 4) * c), x.dtype)
        self._allocate_output(x)
        for chunk in self._chunks():
            V, V_by_tile = self._matrices(self.V_memory[chunk], c)
            M, M_by_tile = self._products(chunk)
            transform_images(by_block(x[chunk]), V_by_tile, self.tiles)
            multiply(V, self.U, M)
            self._transform_output(M_by_tile, chunk)
        return self.out

    def backward(self, dout):
        """dout, of the shape that forward() returned, → dx (N, H, W, C_in); sets dW and db."""
        c = self.x_shape[3]
        dx = self.workspace("dx", self.x_shape, dout.dtype)
        dU = self.workspace("dU", self.U.shape, dout.dtype)
        products = self.workspace("products", (len(self.tiles), *self.U.shape[1:]), dout.dtype)
        for chunk in self._chunks():
            V, _ = self._matrices(self.V_memory[chunk], c)
            dV_memory = self.workspace("dV", self.V_memory[chunk].shape, dout.dtype)
            dV, dV_by_tile = self._matrices(dV_memory, c)
            dM, dM_by_tile = self._products(chunk)
            self._transform_output_gradient(dout, dM_by_tile, chunk)
            multiply_gradient(V, dM, self.U, dV, dU, products, chunk.start == 0)
            transform_images_gradient(dV_by_tile, by_block(dx[chunk]), self.tiles)
        transform_weights(self.G2.T.copy(), dU.reshape(36, -1), self.dW.reshape(9, -1))
        self._bias_gradient(dout)
        return dx

    def _chunks(self):
        """Slices of the batch, at least one, each large enough for the threads and their caches.

        A chunk's V and M fill the caches, or are as large as U, which each chunk reads again.
        """
        n, h, w, c = self.x_shape
        threads = len(self.tiles)
        bytes_per_image = 36 * (h // 4) * (w // 4) * (c + self.b.size) * self.V_memory.itemsize
        bytes_per_thread = max(CACHE_BYTES, self.U.nbytes / threads)
        chunk_size = threads * math.ceil(bytes_per_thread / bytes_per_image)
        starts = range(0, max(n, 1), chunk_size)
        return [slice(start, min(start + chunk_size, n)) for start in starts]

    def _matrices(self, memory, channels):
        """Two views of V, M or their gradients of n images: (36, tiles, channels), and by tile."""
        n = len(memory)
        _, h, w, _ = self.x_shape
        by_place = memory.reshape(36, n, h // 4, w // 4, channels)
        return memory.reshape(36, -1, channels), by_block(by_place)

    def _products(self, chunk):
        """M or dM of a chunk, in a workspace that the next chunk overwrites."""
        _, h, w, _ = self.x_shape
        f = self.b.size
        shape = (chunk.stop - chunk.start, 36 * (h // 4) * (w // 4) * f)
        return self._matrices(self.workspace("M", shape, self.V_memory.dtype), f)

    # The steps that ThreadedWinogradReLUPool replaces.

    def _allocate_output(self, x):
        self.out = self.workspace("out", (*x.shape[:3], self.b.size), x.dtype)

    def _transform_output(self, M, chunk):
        out = self.out[chunk]
        transform_products(M, by_tile(out, 4), self.tiles)
        if self.has_bias:
            out += self.b

    def _transform_output_gradient(self, dout, dM, chunk):
        transform_products_gradient(by_tile(dout[chunk], 4), dM, self.tiles)

    def _bias_gradient(self, dout):
        if self.has_bias:
            dout.sum(axis=(0, 1, 2), out=self.db)


class ThreadedWinogradReLUPool(ThreadedWinogradConv2D):
    """common.WinogradReLUPool with threads: (N, H, W, C_in) → (N, H/2, W/2, C_out)."""

    def __init__(self, in_channels, out_channels, *, rng=None, dtype=np.float32):
        super().__init__(in_channels, out_channels, rng=rng, dtype=dtype)

    def _allocate_output(self, x):
        n, h, w, _ = x.shape
        f = self.b.size
        self.out = self.workspace("out", (n, h // 2, w // 2, f), x.dtype)
        self.argmax = self.workspace("argmax", (n, h // 2, w // 2, f), np.uint8)
        self.dbs = self.workspace("dbs", (n, f), x.dtype)

    def _transform_output(self, M, chunk):
        out = by_tile(self.out[chunk], 2)
        argmax = by_tile(self.argmax[chunk], 2)
        pool_products(M, by_block(self.b), out, argmax, self.tiles)

    def _transform_output_gradient(self, dout, dM, chunk):
        dout = by_tile(dout[chunk], 2)
        argmax = by_tile(self.argmax[chunk], 2)
        pool_products_gradient(dout, argmax, dM, by_block(self.dbs[chunk]), self.tiles)

    def _bias_gradient(self, dout):
        self.dbs.sum(axis=0, out=self.db)


# --------------------------------------------------------------------------------------------------
# Batch normalisation, with what follows it in a residual block: the sum with the shortcut, ReLU
#
# A pass over memory costs more than the arithmetic: so as much as possible is done in each. Sums
# over a channel are taken image by image, then over the images, whichever thread had them.
# --------------------------------------------------------------------------------------------------


@kernel(parallel=True)
def moments(x, means, squares):
    """x (N, H, W, C) → each image's means and sums of squared deviations from them, (N, C) both.

    Two passes over an image, which the second finds in the cache: a variance computed from the sum
    of squares would lose its digits where the mean is large.
    """
    n, height, width, channels = x.shape
    for i in prange(n):
        mean = means[i]
        mean[:] = 0
        for h in range(height):
            for w in range(width):
                add(x[i, h, w], mean)
        mean /= height * width

        square = squares[i]
        square[:] = 0
        for h in range(height):
            for w in range(width):
                for c in range(channels):
                    deviation = x[i, h, w, c] - mean[c]
                    square[c] += deviation * deviation


@kernel(parallel=True)
def normalize(x, mean, scale, shift, shortcut, has_relu, out):
    """out = (x - mean) scale + shift, + shortcut if not empty, ReLU if has_relu: (N, H, W, C)."""
    n, height, width, channels = x.shape
    for i in prange(n):
        for h in range(height):
            for w in range(width):
                for c in range(channels):
                    y = (x[i, h, w, c] - mean[c]) * scale[c] + shift[c]
                    if len(shortcut):
                        y += shortcut[i, h, w, c]
                    if has_relu and y <= 0:
                        y = x.dtype.type(0)
                    out[i, h, w, c] = y


@kernel(parallel=True)
def normalize_param_gradients(dout, x, mean, out, has_relu, products, sums):
    """Each image's sums of d (x - mean) and of d, (N, C) both; d: the gradient before ReLU."""
    n, height, width, channels = x.shape
    for i in prange(n):
        products[i] = 0
        sums[i] = 0
        for h in range(height):
            for w in range(width):
                for c in range(channels):
                    d = dout[i, h, w, c]
                    if has_relu and not out[i, h, w, c] > 0:
                        d = x.dtype.type(0)
                    sums[i, c] += d
                    products[i, c] += d * (x[i, h, w, c] - mean[c])


@kernel(parallel=True)
def normalize_input_gradient(dout, x, mean, out, has_relu, scale, slope, shift, dx, dshortcut):
    """dx = d scale - (x - mean) slope - shift, and dshortcut = d if not empty: (N, H, W, C)."""
    n, height, width, channels = x.shape
    for i in prange(n):
        for h in range(height):
            for w in range(width):
                for c in range(channels):
                    d = dout[i, h, w, c]
                    if has_relu and not out[i, h, w, c] > 0:
                        d = x.dtype.type(0)
                    if len(dshortcut):
                        dshortcut[i, h, w, c] = d
                    deviation = x[i, h, w, c] - mean[c]
                    dx[i, h, w, c] = d * scale[c] - deviation * slope[c] - shift[c]


class ThreadedBatchNorm2D(BatchNorm2D):
    """common.BatchNorm2D with threads: its four passes over the images.

    forward(x, shortcut) adds the shortcut; backward() then sets its gradient, `dshortcut`.
    has_relu: ReLU of the result.
    """

    has_relu = False

    def forward(self, x, shortcut=None):
        self.shortcut = x[:0] if shortcut is None else shortcut
        return super().forward(x)

    def _moments(self, x):
        """Values per channel; their mean and sum of squared deviations (C,), from each image's."""
        n, h, w, c = x.shape
        means = self.workspace("means", (n, c), x.dtype)
        squares = self.workspace("squares", (n, c), x.dtype)
        moments(x, means, squares)
        mean = means.sum(axis=0) / max(n, 1)
        squared_deviations = squares.sum(axis=0) + h * w * np.square(means - mean).sum(axis=0)
        return n * h * w, mean, squared_deviations

    def _normalize(self, x, mean):
        self.x = x
        self.mean = mean
        self.out = self.workspace("out", x.shape, x.dtype)
        scale = self.gamma * self.inv_std
        normalize(x, mean, scale, self.beta, self.shortcut, self.has_relu, self.out)
        return self.out

    def _param_gradients(self, dout):
        n, _, _, c = dout.shape
        products = self.workspace("products", (n, c), dout.dtype)
        sums = self.workspace("sums", (n, c), dout.dtype)
        normalize_param_gradients(dout, self.x, self.mean, self.out, self.has_relu, products, sums)
        return products.sum(axis=0) * self.inv_std, sums.sum(axis=0)

    def _input_gradient(self, dout, mean_dgamma, mean_dbeta):
        dx = self.workspace("dx", dout.shape, dout.dtype)
        self.dshortcut = self.workspace("dshortcut", self.shortcut.shape, dout.dtype)
        # gamma · inv_std · (d - mean_dbeta - x_hat · mean_dgamma), x_hat = (x - mean) · inv_std
        scale = self.gamma * self.inv_std
        slope = scale * self.inv_std * mean_dgamma
        shift = scale * mean_dbeta
        saved = (self.x, self.mean, self.out, self.has_relu)
        normalize_input_gradient(dout, *saved, scale, slope, shift, dx, self.dshortcut)
        return dx


class ThreadedNormReLU(ThreadedBatchNorm2D):
    has_relu = True


@kernel(parallel=True)
def accumulate(source, target):
    """target += source, both flat."""
    for i in prange(target.size):
        target[i] += source[i]


class ThreadedBasicBlock(BasicBlock):
    """common.BasicBlock with threads: the normalisations include the two ReLUs and the sum."""

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
        self.norm1.has_relu = True
        self.norm2.has_relu = True

    def forward(self, x):
        """x (N, H, W, C_in) → (N, H/stride, W/stride, C_out)"""
        shortcut = x
        for layer in self.shortcut:
            shortcut = layer.forward(shortcut)
        y = self.norm1.forward(self.conv1.forward(x))
        return self.norm2.forward(self.conv2.forward(y), shortcut)

    def backward(self, dout):
        dx = self.conv2.backward(self.norm2.backward(dout))
        dx = self.conv1.backward(self.norm1.backward(dx))
        dshortcut = self.norm2.dshortcut
        for layer in reversed(self.shortcut):
            dshortcut = layer.backward(dshortcut)
        accumulate(dshortcut.reshape(-1), dx.reshape(-1))
        return dx


# --------------------------------------------------------------------------------------------------
# Models, and the threads that compute them
# --------------------------------------------------------------------------------------------------


def make_stem(channels, rng, dtype):
    """The first layers of ResNet-18."""
    return [
        ThreadedConv2D(channels, 64, bias=False, rng=rng, dtype=dtype),
        ThreadedNormReLU(64, dtype=dtype),
    ]


def make_model(name: str, seed: int, dtype, image_shape=IMAGE_SHAPE, classes: int = 10) -> Model:
    """The network that --model names, of threaded layers, for images (H, W, C).

    For your own network return Model([...]) with a list of its layers here.
    """
    sizes = {"image_shape": image_shape, "classes": classes}
    if name == "cnn":
        h, w, _ = image_shape
        is_even = h % 2 == 0 and w % 2 == 0
        has_tiles = winograd_fits(h // 2, w // 2)
        return make_cnn(
            seed,
            dtype,
            conv1=ThreadedConvReLUPool if is_even else ThreadedConvThenPool,
            conv2=ThreadedWinogradReLUPool if has_tiles else ThreadedConvThenPool,
            dense=ThreadedDense,
            **sizes,
        )
    return make_resnet18(
        seed,
        dtype,
        conv=ThreadedWinogradConv2D,
        plain_conv=ThreadedConv2D,
        stem=make_stem,
        block=ThreadedBasicBlock,
        dense=ThreadedDense,
        **sizes,
    )


def choose_threads(args: argparse.Namespace, comm) -> int:
    """Start this rank's threads, at most its share of the cores unless forced; return their number.

    With more threads than cores some would wait for the others at the end of every kernel.
    """
    local_ranks, cores = cores_of_machine(comm)
    cores_per_rank = max(1, min(cores // local_ranks, len(available_cores())))

    most = numba.config.NUMBA_NUM_THREADS
    wanted = args.num_threads or min(threads_from_environment() or cores_per_rank, most)
    threads = wanted if args.force_threads else min(wanted, cores_per_rank)
    if threads > most:
        raise InputError(
            f"{threads} threads: Numba was started with {most}; "
            f"to force more, set NUMBA_NUM_THREADS={threads} in the environment"
        )

    if threads < wanted and comm.rank == 0:
        print(
            f"--num-threads {threads} instead of {wanted}: ranks on this machine: {local_ranks}, "
            f"cores: {cores} (--force-threads keeps {wanted})",
            file=sys.stderr,
        )
    choose_wait_policy(threads, comm)
    start_threads(threads)
    return threads


def threads_from_environment() -> int:
    """The first number in $OMP_NUM_THREADS, which may be a list; 0 if it is not set."""
    text = (os.environ.get("OMP_NUM_THREADS") or "0").partition(",")[0].strip()
    if not text.isdecimal():
        raise InputError(f"OMP_NUM_THREADS={text}: set it to a whole number, or use --num-threads")
    return int(text)


def choose_wait_policy(threads: int, comm):
    """Let threads wait without using their cores if other processes need these, unless the user
    has chosen. threads: of this rank. Collective: the ranks of a machine choose together.

    A thread that waits for the others, some 20 times in a step, looks again and again whether they
    are done: that is fastest if its core is idle otherwise. Beside another process it uses up the
    time that it would need for its own images.
    """
    import psutil

    is_chosen = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    # Not available_cores(): a quota does not say which cores it is for.
    has_affinity = hasattr(os, "sched_getaffinity")
    own_cores = os.sched_getaffinity(0) if has_affinity else range(os.cpu_count() or 1)

    # A launcher may give each rank cores of its own.
    machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
    ranks = machine.allgather((is_chosen, threads, set(own_cores)))
    if not any(chosen for chosen, _, _ in ranks) and any(count > 1 for _, count, _ in ranks):
        percent = psutil.cpu_percent(interval=0.2, percpu=True)  # all ranks are at rest now
        cores = set.union(*(of_rank for _, _, of_rank in ranks))
        idle_cores = sum(1 - percent[core] / 100 for core in cores if core < len(percent))
        is_busy = idle_cores < sum(count for _, count, _ in ranks) - 0.5
        if machine.allreduce(is_busy, op=MPI.LOR):
            os.environ["OMP_WAIT_POLICY"] = "passive"
    machine.Free()


def start_threads(threads: int):
    """Start Numba's threads, in the layer that $NUMBA_THREADING_LAYER names, else of OpenMP."""
    # With this, OMP_PLACES or GOMP_CPU_AFFINITY, OpenMP would bind the threads of every rank to the
    # same cores, from the first one on.
    os.environ["OMP_PROC_BIND"] = "false"

    layer = os.environ.get("NUMBA_THREADING_LAYER")
    for name in [layer] if layer else ["omp", "default"]:
        numba.config.THREADING_LAYER = name
        try:
            numba.set_num_threads(threads)
            return
        except ValueError as error:
            problem = error
    raise InputError(f"Numba's threads do not start: {problem}: unset NUMBA_THREADING_LAYER")


def compile_kernels(name: str, dtype, comm, image_shape=IMAGE_SHAPE, classes: int = 10) -> float:
    """Compile all kernels by using them once; returns the seconds that it took.

    Rank 0 first: it writes them to Numba's cache on disk, from where the others load them.
    """
    import scipy.linalg.cython_blas  # noqa: F401 (np.dot in a kernel calls SciPy's BLAS)

    limit_blas_threads(1)  # SciPy's and NumPy's: the threads here are Numba's
    started = time.perf_counter()

    def use_all_kernels():
        model = make_model(name, 0, dtype, image_shape, classes)
        logits = model.forward(np.zeros((2, *image_shape), dtype))
        _, dlogits = softmax_cross_entropy(logits, np.zeros(2, np.uint8))
        model.backward(dlogits)
        ThreadedSGD(model).step(2)
        ThreadedAdam(model).step(2)

    if comm.rank == 0:
        use_all_kernels()
    comm.Barrier()
    if comm.rank != 0:
        use_all_kernels()
    comm.Barrier()
    return time.perf_counter() - started


def make_reducer(comm, model, optimizer, args):
    """The reducer that --reduce names: rungs of the ladder in parallel_cnn_mpi.py."""
    if choose_reduce(args, comm, model, optimizer) == "shared":
        return SharedMemoryReducer(comm, model, optimizer, args.overlap)
    return OverlapReducer(comm, model, args.overlap)


# --------------------------------------------------------------------------------------------------
# Training, as in parallel_cnn_mpi.py
# --------------------------------------------------------------------------------------------------


def train(model, optimizer, data, args, log, checkpoint, stop, comm, reducer):
    """Train until epoch args.epochs is done, from where the log's position is.

    The log's "communication" is the time in MPI, waiting for slower ranks included.
    """
    n = len(data.y_train)
    batches = math.ceil(n / args.global_batch_size)

    def reduce_slice(grad_slice):  # backward() calls it as soon as a layer's gradients are complete
        with log.timed("communication", grad_slice):
            reducer.start(grad_slice)

    def gather(array):  # batch normalisation needs the statistics of the global batch
        with log.timed("communication"):
            return gather_from_all(comm, array)

    model.gather_statistics(gather)
    log.trace_layers(model)

    for epoch in range(log.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        aug_params = draw_augmentation(n, args.seed, epoch) if args.augment == "on" else None
        log.start_epoch(epoch, batches)
        for batch in range(log.batch, batches):
            optimizer.lr = learning_rate(args, (epoch - 1 + batch / batches) / args.epochs)

            with log.timed("loading"):
                # The same order on all ranks; each takes its shard of the batch, perhaps none.
                index = order[batch * args.global_batch_size : (batch + 1) * args.global_batch_size]
                own_index = index[shard(len(index), comm.rank, comm.size)]
                x, labels = load_batch(
                    data.x_train,
                    data.y_train,
                    own_index,
                    args.dtype,
                    data.mean,
                    data.std,
                    aug_params,
                )

            with log.timed("forward"):
                logits = model.forward(x)
                loss, dlogits = softmax_cross_entropy(logits, labels)

            # Loss, correct answers and whether a rank was sent a signal, summed over the ranks: a
            # few bytes that travel during the backward pass.
            sums = np.array(
                [loss, *count_correct(logits, labels), bool(stop.requested)], np.float64
            )
            with log.timed("communication"):
                request = comm.Iallreduce(MPI.IN_PLACE, sums)

            with log.timed("backward"):
                model.backward(dlogits, on_grad_ready=reduce_slice)

            with log.timed("communication"):
                reducer.wait()
                request.Wait()

            with log.timed("update"):
                optimizer.step(len(index), reducer.total, reducer.shards)

            with log.timed("communication"):
                reducer.finish()

            loss, top1, top5, stop_requests = sums.tolist()
            log.end_batch(len(index), loss, int(top1), int(top5))
            require_finite(loss, "loss", log)
            if stop_requests:
                save_and_stop(checkpoint, log, stop)
            if checkpoint.due():
                checkpoint.save()

        assert_replicas_identical(model, comm, epoch)
        log_communication(log, comm)
        log.end_training()
        test = shard(len(data.y_test), comm.rank, comm.size)
        loss, top1, top5, loading = evaluate(
            model,
            data.x_test[test],
            data.y_test[test],
            reduce=lambda sums: comm.Allreduce(MPI.IN_PLACE, sums),
            mean=data.mean,
            std=data.std,
            confusion=log.confusion,
        )
        log.end_epoch(loss, top1, top5, loading)
        require_finite(loss, "validation loss", log)
        checkpoint.save()


def parse_args(argv=None):
    parser = make_parser(__file__, __doc__, MODELS)
    add_recipe_options(parser)
    add_mpi_options(parser, ("overlap", "shared"))
    add = parser.add_argument
    threads = "threads per rank (default: $OMP_NUM_THREADS, else its share of the cores)"
    add("--num-threads", type=number(int, 1, 1024), metavar="N", help=threads)
    force = "use --num-threads even if that is more than a rank's share of the cores"
    add("--force-threads", action="store_true", help=force)
    args = parser.parse_args(argv)
    if args.global_batch_size is None:
        args.global_batch_size = args.batch_size * MPI.COMM_WORLD.size
    return args


def main(argv=None):
    comm = MPI.COMM_WORLD
    abort_on_exception(comm)
    check_launcher(comm)
    args = collective(comm, lambda: parse_args(argv))
    dtype = np.dtype(args.dtype)
    threads = collective(comm, lambda: choose_threads(args, comm))
    warn_if_oversubscribed(comm, threads)
    data = load_data_collectively(args, comm)
    sizes = (data.image_shape, len(data.classes))
    model = make_model(args.model, args.seed, dtype, *sizes)
    compile_seconds = compile_kernels(args.model, dtype, comm, *sizes)
    warning = blas_warning()
    if comm.rank == 0:
        if not args.quiet:
            print(
                f"{comm.size} ranks x {threads} threads; "
                f"kernels ready after {compile_seconds:.1f} s of compiling",
                flush=True,
            )
        if warning:
            print(warning, file=sys.stderr)

    optimizer = make_optimizer(model, args, sgd=ThreadedSGD, adam=ThreadedAdam)
    reducer = make_reducer(comm, model, optimizer, args)

    info = {
        "ranks": comm.size,
        "reduce": reducer.name,
        "threads": threads,
        "compile_seconds": compile_seconds,
        "threading_layer": numba.threading_layer(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }
    log = collective(comm, lambda: RunLog(args, __file__, data, info, comm.rank))
    checkpoint = Checkpoint(args, log, model, optimizer, comm.rank)
    if args.resume:
        collective(comm, lambda: checkpoint.load() if comm.rank == 0 else None)
    stop = StopSignal()

    # Overflows need no warning: the run stops at the first loss that is not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        with collective_run(log, checkpoint, stop, model, optimizer, comm):
            train(model, optimizer, data, args, log, checkpoint, stop, comm, reducer)
            gather_trace(log, comm)
            log.finish()


if __name__ == "__main__":
    guard_ranks(MPI.COMM_WORLD)
    run_main(main, MPI.COMM_WORLD.rank)
