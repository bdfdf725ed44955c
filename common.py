"""What the scripts share: data, layers, models, optimizers, run log, checkpoints, command line.

A copy of one script and this file is all that a copy of an experiment needs. At import this module takes in NumPy and
the standard library only, and does nothing else; psutil, threadpoolctl, tqdm and torchvision are imported by the
functions that need them.

Arrays are NHWC: images (N, H, W, C), convolution weights (KH, KW, C_in, C_out), dense weights (in, out). `dx` means
dL/dx. The loss is summed over a batch, and so are the gradients; `optimizer.step(count)` divides once by the number of
images. So any number of ranks, with shards of any size, follows the serial run.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (said here because what follows would fail without a reason)
    print(
        f"error: Python 3.10 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr
    )
    sys.exit(2)

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np


class InputError(Exception):
    """The user's input cannot be used: one line that says what and what to do; exit status 2."""


class TrainingError(Exception):
    """The run failed after it had started: one line that says where; exit status 1."""


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """Ctrl-C or SIGTERM, raised between two batches; exit status 130."""


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------

MEAN = (0.4914, 0.4822, 0.4465)  # of all pixels of the published training set, red, green, blue
STD = (0.2470, 0.2435, 0.2616)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
DOWNLOAD_TIMEOUT = 8  # seconds until a download that has not started is given up
RECORD_BYTES, FILE_RECORDS = (
    1 + 3 * 32 * 32,
    10_000,
)  # a record of the binary layout: label, red, green, blue plane
STREAM_ORDER, STREAM_SYNTHETIC, STREAM_AUGMENT = (
    1,
    2,
    3,
)  # keep one seed's streams apart: the weights' is [seed] alone
PAD = 4  # pixels around an image that a random crop may reach


class Dataset(NamedTuple):
    x_train: np.ndarray  # (N, 32, 32, 3) uint8
    y_train: np.ndarray  # (N,) uint8
    x_test: np.ndarray
    y_test: np.ndarray
    name: str  # "cifar10" or "synthetic": stands in every log, table and plot
    fingerprint: str  # SHA-256 of the bytes of all that was read or made, before --subset cuts it


def load_cifar10(data_dir=None, dataset="auto", subset=None, seed=42):
    """Return CIFAR-10, or the synthetic stand-in, as a `Dataset` of uint8 arrays.

    data_dir: folder that holds `cifar-10-batches-bin/` or `cifar-10-batches-py/`, or is one of them; default
        $CIFAR10_DIR, else ./data. What is found there is kept beside it as .npy files and memory-mapped from then on.
    dataset: "auto" takes the files, else downloads them, else falls back to the synthetic set with a banner on stderr;
        "cifar10" never falls back; "synthetic" is generated from `seed`.
    subset: the first N training images and the first N // 5 (at least one) test images, the proportion of the set.
    Raises InputError for files that are missing or damaged and for a subset that the set does not have.
    """
    if subset is not None and not 1 <= subset <= 50_000:
        raise InputError(f"--subset {subset}: give a number of training images from 1 to 50000")
    data_dir = Path(data_dir or os.environ.get("CIFAR10_DIR") or "data").expanduser()
    loaded = None if dataset == "synthetic" else _load_real(data_dir, may_fail=dataset == "auto")
    name = "cifar10" if loaded else "synthetic"
    if loaded is None:
        stamp = {"synthetic": 2, "seed": seed, "subset": subset}
        loaded = _through_cache(data_dir, stamp, lambda: make_synthetic(subset or 50_000, seed))
    arrays, fingerprint = loaded
    if subset is not None:
        sizes = (subset, subset, max(subset // 5, 1), max(subset // 5, 1))
        arrays = [a[:size] for a, size in zip(arrays, sizes, strict=True)]
    return Dataset(*arrays, name, fingerprint)


def _load_real(data_dir, may_fail):
    """The arrays and fingerprint of the files in data_dir, downloaded if need be; None if that cannot be."""
    found = _find_batches(data_dir)
    if found is None:
        problem = _download(data_dir)
        found = _find_batches(data_dir)
        if found is None and may_fail:
            print(
                _SYNTHETIC_BANNER.format(data_dir=data_dir, problem=problem),
                file=sys.stderr,
                flush=True,
            )
            return None
        if found is None:
            raise InputError(
                f"no CIFAR-10 in {data_dir} and it cannot be downloaded ({problem}): put "
                "cifar-10-batches-bin/ or cifar-10-batches-py/ there, or use --dataset synthetic"
            )
    folder, read = found
    files = {
        f.name: [f.stat().st_size, f.stat().st_mtime_ns]
        for f in sorted(folder.iterdir())
        if f.is_file()
    }
    return _through_cache(data_dir, files, lambda: read(folder))


_SYNTHETIC_BANNER = """\
********************************************************************************
*  SYNTHETIC DATA: these are NOT the CIFAR-10 images, and no result of this    *
*  run says anything about CIFAR-10.                                           *
********************************************************************************
   No CIFAR-10 in {data_dir}, and no download: {problem}.
   Give --data-dir or $CIFAR10_DIR a folder with cifar-10-batches-bin/ or cifar-10-batches-py/."""


def _find_batches(data_dir):
    """The folder with CIFAR-10's files and the function that reads their layout; None if there is none."""
    for folder in (data_dir / "cifar-10-batches-bin", data_dir / "cifar-10-batches-py", data_dir):
        for suffix, read in ((".bin", _read_binary), ("", _read_python)):
            if any(
                (folder / (name + suffix)).exists()
                for name in ("data_batch_1", "data_batch_2", "test_batch")
            ):
                return folder, read
    return None


def _read_binary(folder):
    """Read the six files of CIFAR-10's binary layout (https://www.cs.toronto.edu/~kriz/cifar.html)."""
    parts = []
    for path in [folder / f"data_batch_{i}.bin" for i in range(1, 6)] + [folder / "test_batch.bin"]:
        wanted = RECORD_BYTES * FILE_RECORDS
        if not path.is_file() or path.stat().st_size != wanted:
            seen = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
            raise InputError(
                f"{path}: {seen}, CIFAR-10 has {wanted} bytes there: fetch the file again"
            )
        records = np.fromfile(path, np.uint8).reshape(FILE_RECORDS, RECORD_BYTES)
        if records[:, 0].max() > 9:
            record = int(np.argmax(records[:, 0] > 9))
            raise InputError(
                f"{path}: label {records[record, 0]} in record {record}, labels end at 9: "
                "fetch the file again"
            )
        parts.append((records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]))
    x, y = zip(*parts, strict=True)
    return np.concatenate(x[:5]), np.concatenate(y[:5]), x[5], y[5]


def _read_python(folder):
    """Read the pickled layout through torchvision, which opens a file only after its MD5 checksum agrees."""
    try:
        datasets = import_torchvision().datasets
    except ImportError as error:
        raise InputError(
            f"{folder}: to read CIFAR-10's Python layout, install torchvision ({error}), or fetch the "
            "binary layout"
        ) from None
    if folder.name != datasets.CIFAR10.base_folder:
        raise InputError(
            f"{folder}: rename it to {datasets.CIFAR10.base_folder}, the name that torchvision looks for"
        )
    try:
        sets = [
            datasets.CIFAR10(folder.parent, train=train, download=False) for train in (True, False)
        ]
    except RuntimeError:
        raise InputError(
            f"{folder}: a file is missing or its checksum is wrong, so nothing in it was opened: "
            "delete the folder and fetch CIFAR-10 again"
        ) from None
    arrays = [a for s in sets for a in (s.data, np.array(s.targets, np.uint8))]
    if any(len(a) != n for a, n in zip(arrays, (50_000, 50_000, 10_000, 10_000), strict=True)):
        raise InputError(f"{folder}: not 50000 training and 10000 test images")
    return arrays


def _download(data_dir):
    """Download the Python layout into data_dir; return what went wrong, or None."""
    import http.client
    import urllib.request

    failure = [f"no answer within {DOWNLOAD_TIMEOUT} s"]

    def probe():  # in a thread of its own, because a name look-up takes no timeout
        try:
            urllib.request.urlopen(
                urllib.request.Request(CIFAR10_URL, method="HEAD"), timeout=DOWNLOAD_TIMEOUT
            ).close()
            failure[0] = None
        except (OSError, http.client.HTTPException) as error:
            failure[0] = str(getattr(error, "reason", error)).strip()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_TIMEOUT)
    if failure[0]:
        return failure[0]
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as scratch:
            cifar10 = import_torchvision().datasets.CIFAR10(scratch, download=True)
            (Path(scratch) / cifar10.base_folder).rename(data_dir / cifar10.base_folder)
    except ImportError as error:
        return f"that needs torchvision: {error}"
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        return f"it broke off: {error}"
    finally:
        socket.setdefaulttimeout(previous)


def _through_cache(data_dir, stamp, build):
    """Memory maps of the arrays that build() makes, kept in data_dir (else the user's cache folder) under `stamp`.

    stamp: JSON-able description of the source; another stamp means another folder, so a changed source is read anew.
    Returns ([x_train, y_train, x_test, y_test], fingerprint). A folder is complete or absent: it is renamed into place.
    """
    key = "npy-" + hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:16]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "parallel-cnn"
    names = ("x_train", "y_train", "x_test", "y_test")

    def open_maps(folder):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            maps = [np.lib.format.open_memmap(folder / f"{name}.npy", mode="r") for name in names]
            return [np.asarray(m) for m in maps], json.loads((folder / "meta.json").read_text())[
                "fingerprint"
            ]

    for root in (data_dir, user_cache):
        if maps := open_maps(root / key):
            return maps
    arrays = [np.ascontiguousarray(a) for a in build()]
    digest = hashlib.sha256()
    for a in arrays:
        digest.update(a)
    for root in (data_dir, user_cache):
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
                new = Path(scratch) / key
                new.mkdir()
                for name, a in zip(names, arrays, strict=True):
                    np.save(new / f"{name}.npy", a)
                (new / "meta.json").write_text(
                    json.dumps({"fingerprint": digest.hexdigest(), "source": stamp})
                )
                try:
                    new.rename(root / key)
                except OSError:  # another process was faster, or what is there is damaged
                    if not open_maps(root / key):
                        shutil.rmtree(root / key, ignore_errors=True)
                        new.rename(root / key)
            if maps := open_maps(root / key):
                return maps
    return arrays, digest.hexdigest()


def make_synthetic(n_train, seed=42, n_test=None):
    """Ten classes of moving textures, (N, 32, 32, 3) uint8, that a CNN learns well but not at once.

    An image is one of its class's three smooth patterns, moved by up to seven pixels around the torus, faded into a
    pattern that all classes share, in random contrast and under pixel noise. Images come in blocks that depend on
    (seed, split, block) alone, so a smaller set is the beginning of a larger one.
    Returns x_train, y_train, x_test, y_test; n_test defaults to n_train // 5, at least one.
    """
    block, grid = 1000, np.arange(32)
    wave = np.exp(
        2j * np.pi * np.outer(np.arange(1, 5), grid) / 32
    )  # (4, 32): the four lowest frequencies

    def patterns(rng, *shape):  # (*shape, 32, 32, 3), zero mean, unit deviation
        c = rng.standard_normal((*shape, 4, 4, 3)) + 1j * rng.standard_normal((*shape, 4, 4, 3))
        p = np.einsum("...fgc,fh,gw->...hwc", c, wave, wave).real
        return (p / p.std(axis=(-3, -2), keepdims=True)).astype(np.float32)

    rng = np.random.default_rng([seed, STREAM_SYNTHETIC])
    own, shared = patterns(rng, 10, 3), patterns(rng, 16)

    def images(split, number):
        x, y = np.empty((number, 32, 32, 3), np.uint8), np.empty(number, np.uint8)
        for start in range(0, number, block):
            rng = np.random.default_rng([seed, STREAM_SYNTHETIC, split, start])
            labels, which, other = (rng.integers(choices, size=block) for choices in (10, 3, 16))
            dy, dx, ey, ex = (
                (grid + rng.integers(reach, size=(block, 1))) % 32 for reach in (8, 8, 32, 32)
            )
            pixels = own[
                labels[:, None, None], which[:, None, None], dy[:, :, None], dx[:, None, :]
            ]
            pixels *= rng.uniform(0.5, 1, (block, 1, 1, 1)).astype(np.float32)
            pixels += shared[other[:, None, None], ey[:, :, None], ex[:, None, :]]
            pixels += 0.75 * rng.standard_normal(pixels.shape, np.float32)
            pixels = np.clip(
                127 + rng.uniform(20, 40, (block, 1, 1, 1)).astype(np.float32) * pixels, 0, 255
            )
            x[start : start + block], y[start : start + block] = (
                pixels[: number - start],
                labels[: number - start],
            )
        return x, y

    return (*images(1, n_train), *images(2, max(n_train // 5, 1) if n_test is None else n_test))


def epoch_order(n, seed, epoch):
    """The order of n images in an epoch (from 1): a function of (seed, epoch) alone, whatever runs in parallel."""
    return np.random.default_rng([seed, STREAM_ORDER, epoch]).permutation(n)


@functools.lru_cache
def _normalization(dtype):
    """scale and shift (96,) of a row of pixels, since long rows make fast loops; pixel · scale - shift is wanted."""
    return np.tile(1 / (255 * np.array(STD)), 32).astype(dtype), np.tile(
        np.array(MEAN) / STD, 32
    ).astype(dtype)


def load_batch(images, labels, index, dtype=np.float32):
    """The images (N, 32, 32, 3) and labels (N,) at `index`, normalised channel by channel with MEAN and STD."""
    xp, (scale, shift) = array_module(images), _normalization(np.dtype(dtype))
    x = xp.multiply(images[index].reshape(-1, 32, 96), xp.asarray(scale), dtype=dtype)
    x -= xp.asarray(shift)
    return x.reshape(-1, 32, 32, 3), labels[index]


def draw_augmentation(n, seed, epoch):
    """(n,) uint8: 81 flip + 9 dy + dx for each image; a function of (seed, epoch, index), whoever loads the image."""
    return np.random.default_rng([seed, STREAM_AUGMENT, epoch]).integers(
        2 * 81, size=n, dtype=np.uint8
    )


def augment(images, draws):
    """Crop images (N, 32, 32, 3) at (dy, dx) from themselves padded with PAD zeros, and flip some left to right."""
    n, size = len(images), images.shape[1]
    padded = np.zeros((n, size + 2 * PAD, size + 2 * PAD, 3), images.dtype)
    padded[:, PAD:-PAD, PAD:-PAD] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))  # a view
    out = windows.transpose(0, 1, 2, 4, 5, 3)[np.arange(n), draws // 9 % 9, draws % 9]
    flipped = np.flatnonzero(draws // 81)
    out[flipped] = out[flipped, :, ::-1]
    return out


def import_torchvision():
    """Import torchvision, also where torch is a CPU-only build and torchvision, from the package index, is not.

    That import stops at "operator torchvision::nms does not exist" (pytorch/vision #8985). Declaring the schemas of the
    missing operators first is enough for models and data sets.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        # what it defines lasts as long as the object is kept
        library = import_torchvision.library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        import torchvision
    return torchvision


# ----------------------------------------------------------------------------------------------------------------------
# Layers
# ----------------------------------------------------------------------------------------------------------------------

CACHE_BYTES = (
    2048 * 1024
)  # working set of one piece of a convolution: a common size of a core's own cache


def array_module(x):
    """The module whose array x is: numpy or cupy."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def aligned_zeros(shape, dtype, xp=np):
    """Zeros on a cache line's boundary, where vector loads and stores are fastest; NumPy promises 16 bytes only."""
    if xp is not np:
        return xp.zeros(shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class Layer:
    """The protocol: `out = forward(x)`, `dx = backward(dout)`, `params()`, `grads()`.

    A leaf names its parameters in `param_names`; parameter `W` has its gradient in `dW`, which every backward()
    overwrites with the sum over the batch. Arrays that are kept but not trained (running statistics) are named in
    `state_names`. A composite, such as a residual block, overrides `leaves()` to yield its parts.
    What forward() and backward() return belongs to the layer and is overwritten by its next call.
    """

    param_names, state_names = (), ()
    training = True  # False during evaluation
    needs_dx = True  # False in a model's first layer: nobody asks for the gradient of the images

    def leaves(self):
        yield self

    def params(self):
        return [getattr(leaf, name) for leaf in self.leaves() for name in leaf.param_names]

    def grads(self):
        return [getattr(leaf, "d" + name) for leaf in self.leaves() for name in leaf.param_names]

    def state(self):
        return [getattr(leaf, name) for leaf in self.leaves() for name in leaf.state_names]

    def scratch(self, name, shape, like, dtype=None):
        """An array, zero when new, that is kept between calls; the first axis may shrink without a new one."""
        arrays, key, dtype = (
            self.__dict__.setdefault("_scratch", {}),
            (name, shape[1:]),
            dtype or like.dtype,
        )
        kept = arrays.get(key)
        if kept is None or len(kept) < shape[0] or kept.dtype != dtype:
            kept = arrays[key] = aligned_zeros(shape, dtype, array_module(like))
        return kept if len(kept) == shape[0] else kept[: shape[0]]


class Conv2D(Layer):
    """2-D convolution (cross-correlation, as the field has it) with any kernel size, stride and padding.

    W: (kernel_size, kernel_size, in_channels, out_channels), He-normal; b: (out_channels,), zero, if `bias`.
    Each image's receptive fields are copied to the rows of a matrix (im2col) and multiplied by W: Chellapilla et al.,
    "High Performance Convolutional Neural Networks for Document Processing", 2006. A few images at a time, so that
    the matrix, K² times as large as the image, never leaves the cache; backward() makes it again, which is cheaper
    than to fetch a large one from memory.
    """

    param_names = ("W", "b")

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size=3,
        stride=1,
        padding=1,
        *,
        bias=True,
        rng=None,
        dtype=np.float32,
    ):
        self.kernel_size, self.stride, self.padding, self.has_bias = (
            kernel_size,
            stride,
            padding,
            bias,
        )
        if not bias:
            self.param_names = ("W",)
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.W, self.b = he_normal(shape, rng, dtype), np.zeros(out_channels, dtype)
        self.dW, self.db = np.zeros_like(self.W), np.zeros_like(self.b)

    def forward(self, x):
        """x (N, H, W, C_in) → (N, OH, OW, C_out), OH = (H + 2 padding - kernel_size) // stride + 1."""
        xp, self.x_shape, self.windows = array_module(x), x.shape, self._windows(x)
        out = self.scratch("out", (*self.windows.shape[:3], self.b.size), x)
        for piece in self._pieces():
            y = out[piece].reshape(-1, self.b.size)
            xp.matmul(self._im2col(piece), self.W.reshape(-1, self.b.size), out=y)
            if self.has_bias:
                y += self.b
        return out

    def backward(self, dout):
        """dout (N, OH, OW, C_out) → dx (N, H, W, C_in); sets dW and db."""
        self._start_backward(dout)
        for piece in self._pieces():
            self._add_weight_gradient(
                self._im2col(piece, backward=True), dout[piece].reshape(-1, self.b.size)
            )
            if self.has_bias:
                self._add_bias_gradient(dout[piece])
            if self.needs_dx:
                self._input_gradient(dout[piece], piece)
        return self._dx if self.needs_dx else None

    def _windows(self, x):
        """All receptive fields of x, (N, OH, OW, KH, KW, C_in): a view of the padded images, nothing is copied."""
        x, k, s = self._pad(x), self.kernel_size, self.stride
        n, h, w, c = x.shape
        if min(h, w) < k:
            raise ValueError(
                f"an input of {h}x{w} pixels, padding included, is smaller than the kernel, {k}x{k}"
            )
        sn, sh, sw, sc = x.strides
        shape = (n, (h - k) // s + 1, (w - k) // s + 1, k, k, c)
        return array_module(x).lib.stride_tricks.as_strided(
            x, shape, (sn, s * sh, s * sw, sh, sw, sc)
        )

    def _pad(self, x):
        (n, h, w, c), p = x.shape, self.padding
        if not p:
            return x
        padded = self.scratch(
            "padded", (n, h + 2 * p, w + 2 * p, c), x
        )  # zero when new, and its border stays so
        padded[:, p : p + h, p : p + w] = x
        return padded

    def _pieces(self):
        """Slices of the batch whose im2col matrix and output fit into the cache."""
        *positions, kh, kw, c = self.windows.shape[1:]
        return pieces(
            len(self.windows),
            math.prod(positions) * (kh * kw * c + self.b.size) * self.windows.itemsize,
        )

    def _im2col(self, piece, backward=False):
        """The piece's matrix (n·OH·OW, KH·KW·C_in). Where it is no larger than the output, backward() finds it kept."""
        window = math.prod(self.windows.shape[-3:])
        keep, windows = window <= self.b.size, self.windows[piece]
        if keep:
            col = self.scratch("kept col", self.windows.shape, windows)[piece]
        else:
            col = self.scratch("col", windows.shape, windows)
        if not (keep and backward):
            col[...] = windows
        return col.reshape(-1, window)

    def _start_backward(self, dout):
        self.dW.fill(0)
        self.db.fill(0)
        if self.needs_dx:
            self._dx = self.scratch("dx", self.x_shape, dout)
            # (KH·KW, C_out, C_in): one plain matrix product per offset within the kernel
            self._W_by_offset = self.W.reshape(-1, *self.W.shape[2:]).transpose(0, 2, 1).copy()

    def _add_weight_gradient(self, col, dy):
        dW = array_module(col).matmul(
            col.T, dy, out=self.scratch("dW", (col.shape[1], dy.shape[1]), col)
        )
        self.dW += dW.reshape(self.W.shape)

    def _add_bias_gradient(self, dy):
        dy = dy.reshape(-1, self.b.size)
        self.db += (
            array_module(dy).ones(len(dy), dy.dtype) @ dy
        )  # the sum over all positions, by BLAS

    def _input_gradient(self, dy, piece):
        """dx of one piece: a matrix product and a shifted addition (col2im) for each offset within the kernel."""
        (n, oh, ow, c_out), (_, h, w, c), k, s, p = (
            dy.shape,
            self.x_shape,
            self.kernel_size,
            self.stride,
            self.padding,
        )
        offsets = self.scratch("offsets", (n, k * k * oh * ow * c), dy).reshape(k * k, -1, c)
        array_module(dy).matmul(dy.reshape(1, -1, c_out), self._W_by_offset, out=offsets)
        padded = self.scratch("dx padded", (n, h + 2 * p, w + 2 * p, c), dy)
        padded.fill(0)
        for offset, part in enumerate(offsets):
            i, j = divmod(offset, k)
            padded[:, i : i + s * oh : s, j : j + s * ow : s] += part.reshape(n, oh, ow, c)
        self._dx[piece] = padded[:, p : p + h, p : p + w]


class ReLU(Layer):
    def forward(self, x):
        self.out = array_module(x).maximum(x, 0, out=self.scratch("out", x.shape, x))
        return self.out

    def backward(self, dout):
        return array_module(dout).multiply(
            dout, self.out > 0, out=self.scratch("dx", dout.shape, dout)
        )


class MaxPool2D(Layer):
    """Maximum over size×size windows, `stride` (default: size) apart; what does not fill a window is left out.

    The gradient goes to the first of equal maxima, row by row, as in PyTorch.
    """

    def __init__(self, size=2, stride=None):
        self.size, self.stride = size, stride or size

    def _offsets(self, x):
        """Views of x, (N, OH, OW, C) each: the input of all windows at one offset within the window."""
        (_, h, w, _), k, s = x.shape, self.size, self.stride
        oh, ow = (h - k) // s + 1, (w - k) // s + 1
        return [
            x[:, i : i + s * (oh - 1) + 1 : s, j : j + s * (ow - 1) + 1 : s]
            for i in range(k)
            for j in range(k)
        ]

    def forward(self, x):
        xp, self.x = array_module(x), x
        first, *others = self._offsets(x)
        self.out = self.scratch("out", first.shape, x)
        self.out[...] = first
        for other in others:
            xp.maximum(self.out, other, out=self.out)
        return self.out

    def backward(self, dout):
        dx = self.scratch("dx", self.x.shape, dout)
        dx.fill(0)
        open_ = array_module(dout).ones(
            dout.shape, bool
        )  # windows whose maximum has not been met yet
        for x, dx_part in zip(self._offsets(self.x), self._offsets(dx), strict=True):
            hit = open_ & (x == self.out)
            dx_part += dout * hit
            open_ &= ~hit
        return dx


class ConvReLUPool(Conv2D):
    """Conv2D, ReLU and MaxPool2D(2) in one pass while a piece of the batch is in the cache: the same function.

    max(ReLU(y + b)) = ReLU(max(y) + b), so bias and ReLU work on a quarter of the values, and backward() needs no more
    of y than which of four was the maximum. The convolution delivers the four positions of all pooling windows as four
    arrays, `planes`, (n, OH/2, OW/2, C_out) each, so that every step runs over long rows.
    """

    def forward(self, x):
        """x (N, H, W, C_in) → (N, OH // 2, OW // 2, C_out)"""
        xp, self.x_shape = array_module(x), x.shape
        self.out = self._start_forward(x)
        for piece in self._pieces():
            y0, y1, y2, y3 = self._convolve(piece)
            upper, lower = (self.scratch(name, y0.shape, x) for name in ("upper", "lower"))
            xp.maximum(y0, y1, out=upper)
            xp.maximum(y2, y3, out=lower)
            if self.training:  # which of four was the first maximum
                y0_won, y2_won, upper_won = self._won(piece, y0.shape)
                xp.greater_equal(y0, y1, out=y0_won)
                xp.greater_equal(y2, y3, out=y2_won)
                xp.greater_equal(upper, lower, out=upper_won)
            xp.maximum(upper, lower, out=upper)
            upper += self.b
            xp.maximum(upper, 0, out=self._like_planes(self.out[piece]))
        return self.out

    def backward(self, dout):
        """dout (N, OH // 2, OW // 2, C_out) → dx (N, H, W, C_in); sets dW and db."""
        xp = array_module(dout)
        self._start_backward(dout)
        for piece in self._pieces():
            out, d = self._like_planes(self.out[piece]), self._like_planes(dout[piece])
            d = xp.multiply(d, out > 0, out=self.scratch("upper", d.shape, dout))
            self._add_bias_gradient(d)
            y0_won, y2_won, upper_won = self._won(piece, d.shape)
            y0, y1, y2, y3 = self._planes(len(dout[piece]), dout)
            upper = xp.multiply(d, upper_won, out=self.scratch("lower", d.shape, dout))
            d -= upper
            xp.multiply(upper, y0_won, out=y0)
            xp.subtract(upper, y0, out=y1)
            xp.multiply(d, y2_won, out=y2)
            xp.subtract(d, y2, out=y3)
            self._convolve_backward(piece)
        self._finish_backward()
        return self._dx if self.needs_dx else None

    def _won(self, piece, shape):
        """Booleans kept for backward(): plane 0 ≥ plane 1, plane 2 ≥ plane 3, their larger ≥ the other two's."""
        kept = self.scratch(
            "won", (len(self.out), 3 * math.prod(self.out.shape[1:])), self.out, dtype=bool
        )
        return kept[piece].reshape(3, *shape)

    # What another way to convolve has to replace: im2col here, Winograd's below.

    def _start_forward(self, x):
        windows = self._windows(x)
        n, oh, ow, *window = windows.shape
        oh, ow = oh // 2, ow // 2
        windows = windows[:, : 2 * oh, : 2 * ow].reshape(n, oh, 2, ow, 2, *window)
        self.windows = windows.transpose(
            0, 2, 4, 1, 3, 5, 6, 7
        )  # (N, 2, 2, OH/2, OW/2, KH, KW, C_in), still a view
        return self.scratch("out", (n, oh, ow, self.b.size), x)

    def _like_planes(self, image):
        """A view of `image` (n, OH/2, OW/2, C_out) in the shape that the planes have."""
        return image

    def _planes(self, n, like):
        self._y = self.scratch("y", (n, 4, *self.out.shape[1:]), like)
        return self._y.swapaxes(0, 1)

    def _convolve(self, piece):
        planes = self._planes(len(self.out[piece]), self.out)
        y = self._y.reshape(-1, self.b.size)
        array_module(y).matmul(self._im2col(piece), self.W.reshape(-1, self.b.size), out=y)
        return planes

    def _convolve_backward(self, piece):
        """From dy in the planes add to dW and set the piece's part of dx."""
        dy = self._y
        self._add_weight_gradient(self._im2col(piece, backward=True), dy.reshape(-1, self.b.size))
        if self.needs_dx:
            n, _, oh, ow, channels = dy.shape
            h, w = (
                (size + 2 * self.padding - self.kernel_size) // self.stride + 1
                for size in self.x_shape[1:3]
            )
            image = self.scratch(
                "dy", (n, h, w, channels), dy
            )  # zero when new; odd sizes leave the last row zero
            windows = image[:, : 2 * oh, : 2 * ow].reshape(n, oh, 2, ow, 2, channels)
            windows[...] = dy.reshape(n, 2, 2, oh, ow, channels).transpose(0, 3, 1, 4, 2, 5)
            self._input_gradient(image, piece)

    def _finish_backward(self):
        pass


def winograd_matrices(points, r):
    """Aᵀ (m, n), G (n, r) and Bᵀ (n, n) of Winograd's F(m, r), n = m + r - 1, from n - 1 points and infinity.

    y = Aᵀ [(G g) ⊙ (Bᵀ d)] is the correlation of n inputs d with r weights g: Toom and Cook's multiplication of
    polynomials, which evaluates both at the points, transposed.
    """
    m = len(points) + 2 - r
    others = [[q for q in points if q != p] for p in points]
    powers = np.vander(points, max(m, r), increasing=True)  # (n - 1, ·)
    AT = np.vstack([powers[:, :m], np.eye(m)[-1]]).T
    G = np.vstack(
        [
            powers[:, :r]
            / [[math.prod(p - q for q in o)] for p, o in zip(points, others, strict=True)],
            np.eye(r)[-1],
        ]
    )
    BT = np.vstack([*(np.append(np.poly(o)[::-1], 0) for o in others), np.poly(points)[::-1]])
    return AT, G, BT


class Winograd:
    """What the layers below share: Winograd's minimal filtering F(4×4, 3×3), kernel 3, stride 1, padding 1.

    H and W must be multiples of 4. A 4×4 tile of the output takes 36 multiplications per pair of channels, not 144:
    y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ d B)] A with the 6×6 tile d of the input; summed over channels, ⊙ is 36 matrix products.
    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016. On flattened tiles the transforms are
    matrix products too: vec(Bᵀ d B) = (Bᵀ ⊗ Bᵀ) vec(d). backward() is all of this transposed. In float32 the error is
    6e-7 of the output's deviation, root mean square, where im2col has 2e-7; the usual points 0, ±1, ±2 would have
    1.1e-6 (Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural
    Networks", 2018).
    """

    POINTS = (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)
    AT, G, BT = winograd_matrices(POINTS, 3)
    COLUMNS = 512  # of one product in a transform: OpenBLAS does not pack, and is faster, below 10⁶ multiplications

    def _start_tiles(self, x):
        """Before the forward pass: the transformed kernel U (36, C_in, C_out), the tiles of x, room for V."""
        n, h, w, c = x.shape
        if h % 4 or w % 4:
            name = type(self).__name__
            raise ValueError(
                f"{name} takes images of 4n x 4m pixels, not {h}x{w}: use ConvReLUPool or Conv2D"
            )
        xp, self.x_shape = array_module(x), x.shape
        self.B2, self.G2, self.A2 = (
            xp.asarray(np.kron(m, m), x.dtype) for m in (self.BT, self.G, self.AT)
        )
        self.U = (self.G2 @ self.W.reshape(9, -1)).reshape(36, *self.W.shape[2:])
        self.tiles = self._tiles(self._pad(x))
        self.V = self.scratch(
            "V", (n, 36 * (h // 4) * (w // 4) * c), x
        )  # a piece's part: (36, tiles, C_in)

    def _tiles(self, padded):
        """All 6×6 tiles of the padded images, 4 apart: (N, 6, 6, H/4, W/4, C), a view."""
        (n, h, w, c), (sn, sh, sw, sc) = padded.shape, padded.strides
        shape, strides = (n, 6, 6, (h - 2) // 4, (w - 2) // 4, c), (sn, sh, sw, 4 * sh, 4 * sw, sc)
        return array_module(padded).lib.stride_tricks.as_strided(padded, shape, strides)

    def _pieces(self):
        n, _, _, h, w, c = self.tiles.shape
        return pieces(n, h * w * (36 * c + (36 + 16) * self.b.size) * self.V.itemsize)

    def _filter(self, piece, y):
        """Set y, as (4, 4, n, H/4, W/4, C_out), to the convolution of a piece of the batch; keep its V = Bᵀ d B."""
        xp, tiles, V, (k, c_in, c_out) = (
            array_module(y),
            self.tiles[piece],
            self.V[piece],
            self.U.shape,
        )
        d = self.scratch("tiles", (len(tiles), tiles[0].size), tiles)
        d.reshape(6, 6, len(tiles), *tiles.shape[3:])[...] = tiles.transpose(1, 2, 0, 3, 4, 5)
        M = self.scratch("M", (len(V), V[0].size // c_in * c_out), V)
        self._transform(self.B2, d, V)
        xp.matmul(V.reshape(k, -1, c_in), self.U, out=M.reshape(k, -1, c_out))
        self._transform(self.A2, M, y)

    def _transform(self, matrix, a, out):
        """out = matrix @ a, with as many rows of `a` as the matrix has columns."""
        a, out = a.reshape(matrix.shape[1], -1), out.reshape(matrix.shape[0], -1)
        for start in range(0, a.shape[1], self.COLUMNS):
            part = slice(start, start + self.COLUMNS)
            array_module(a).matmul(matrix, a[:, part], out=out[:, part])

    def _start_backward(self, dout):
        self.db.fill(0)
        if self.needs_dx:
            self._dx = self.scratch("dx", self.x_shape, dout)
        self._dU = self.scratch("dU", self.U.shape, dout)
        self._dU.fill(0)

    def _filter_backward(self, piece, dy):
        """From dy, shaped as _filter's y, add to dU and set the piece's part of dx."""
        xp, V, (k, c_in, c_out) = array_module(dy), self.V[piece], self.U.shape
        dM = self.scratch("M", (len(V), V[0].size // c_in * c_out), V)
        self._transform(self.A2.T, dy, dM)
        dM = dM.reshape(k, -1, c_out)
        V_transposed = V.reshape(k, -1, c_in).transpose(0, 2, 1)
        self._dU += xp.matmul(V_transposed, dM, out=self.scratch("product", self.U.shape, V))
        if self.needs_dx:
            dV, d = self.scratch("dV", V.shape, V), self.scratch("tiles", V.shape, V)
            xp.matmul(dM, self.U.transpose(0, 2, 1), out=dV.reshape(k, -1, c_in))
            self._transform(self.B2.T, dV, d)
            self._add_tiles(d, piece)

    def _add_tiles(self, d, piece):
        """The piece's part of dx = the sum of its overlapping 6×6 tiles d."""
        n, (h, w, c) = len(d), self.tiles.shape[3:]
        padded = self.scratch("dx padded", (n, 4 * h + 2, 4 * w + 2, c), d)
        padded.fill(0)
        for position, tile in enumerate(d.reshape(36, n, h, w, c)):
            i, j = divmod(position, 6)
            padded[:, i : i + 4 * h : 4, j : j + 4 * w : 4] += tile
        self._dx[piece] = padded[:, 1:-1, 1:-1]

    def _finish_backward(self):
        self.dW[...] = (self.G2.T @ self._dU.reshape(36, -1)).reshape(self.W.shape)


class WinogradConv2D(Winograd, Conv2D):
    """Conv2D by Winograd's filtering: kernel 3, stride 1, padding 1, H and W multiples of 4."""

    def __init__(self, in_channels, out_channels, *, bias=True, rng=None, dtype=np.float32):
        super().__init__(in_channels, out_channels, bias=bias, rng=rng, dtype=dtype)

    def forward(self, x):
        self._start_tiles(x)
        out = self.scratch("out", (*x.shape[:3], self.b.size), x)
        for piece in self._pieces():
            y = self._y(len(out[piece]), x)
            self._filter(piece, y)
            self._by_tiles(out[piece])[...] = y
            if self.has_bias:
                out[piece] += self.b
        return out

    def backward(self, dout):
        self._start_backward(dout)
        for piece in self._pieces():
            dy = self._y(len(dout[piece]), dout)
            dy[...] = self._by_tiles(dout[piece])
            if self.has_bias:
                self._add_bias_gradient(dout[piece])
            self._filter_backward(piece, dy)
        self._finish_backward()
        return self._dx if self.needs_dx else None

    def _y(self, n, like):
        h, w = self.tiles.shape[3:5]
        return self.scratch("y", (n, 16 * h * w * self.b.size), like).reshape(
            4, 4, n, h, w, self.b.size
        )

    def _by_tiles(self, image):
        n, h, w, c = image.shape  # → (4, 4, n, H/4, W/4, C_out), a view
        return image.reshape(n, h // 4, 4, w // 4, 4, c).transpose(2, 4, 0, 1, 3, 5)


class WinogradReLUPool(Winograd, ConvReLUPool):
    """ConvReLUPool by Winograd's filtering: kernel 3, stride 1, padding 1, H and W multiples of 4."""

    def __init__(self, in_channels, out_channels, *, rng=None, dtype=np.float32):
        super().__init__(in_channels, out_channels, rng=rng, dtype=dtype)

    def _start_forward(self, x):
        self._start_tiles(x)
        n, h, w, _ = x.shape
        return self.scratch("out", (n, h // 2, w // 2, self.b.size), x)

    def _like_planes(self, image):
        n, h, w, c = (
            image.shape
        )  # → (2, 2, n, H/4, W/4, C_out): pooling window within the tile, tile
        return image.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 4, 0, 1, 3, 5)

    def _planes(self, n, like):
        _, h, w, c = self.out.shape
        self._y = self.scratch("y", (n, 16 * (h // 2) * (w // 2) * c), like)
        y = self._y.reshape(
            2, 2, 2, 2, n, h // 2, w // 2, c
        )  # (4, 4, tile, C_out): row and column within the tile
        return [y[:, i, :, j] for i in (0, 1) for j in (0, 1)]

    def _convolve(self, piece):
        planes = self._planes(len(self.out[piece]), self.out)
        self._filter(piece, self._y)
        return planes

    def _convolve_backward(self, piece):
        self._filter_backward(piece, self._y)


def pieces(n, bytes_per_image):
    """Slices of n images, each of about CACHE_BYTES, at least one image."""
    step = max(1, CACHE_BYTES // bytes_per_image)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


class BatchNorm2D(Layer):
    """Normalises each channel over batch and positions: Ioffe and Szegedy, "Batch Normalization", 2015.

    gamma, beta: (channels,). In training the batch's own mean and variance; otherwise the running ones, which move
    towards the batch's by `momentum` (the variance with n - 1 in the denominator, as in PyTorch).
    gather(array): the arrays of all ranks that share the batch, stacked; the batch is then that of all ranks, and
    backward() exact for it. dgamma and dbeta stay this rank's part, like all gradients.
    """

    param_names, state_names = ("gamma", "beta"), ("running_mean", "running_var")
    gather = staticmethod(lambda array: array[None])

    def __init__(self, channels, eps=1e-5, momentum=0.1, *, dtype=np.float32):
        self.eps, self.momentum = eps, momentum
        self.gamma, self.beta = np.ones(channels, dtype), np.zeros(channels, dtype)
        self.dgamma, self.dbeta = np.zeros_like(self.gamma), np.zeros_like(self.beta)
        self.running_mean, self.running_var = np.zeros(channels, dtype), np.ones(channels, dtype)

    def forward(self, x):
        """x (N, H, W, C) → the same shape."""
        mean, var = self._statistics(x) if self.training else (self.running_mean, self.running_var)
        self.inverse = 1 / array_module(x).sqrt(var + self.eps)
        return self._normalize(x, mean)

    def backward(self, dout):
        """dout (N, H, W, C) → dx; sets dgamma and dbeta. After a forward pass in training mode."""
        self.dgamma[...], self.dbeta[...] = self._sums(dout)
        dgamma, dbeta = self.gather(array_module(dout).stack([self.dgamma, self.dbeta])).sum(axis=0)
        return self._input_gradient(dout, dgamma / self.count, dbeta / self.count)

    def _statistics(self, x):
        """Mean and variance (C,) of the batch of all ranks; moves the running ones."""
        xp, channels = array_module(x), x.shape[3]
        count, mean, squares = self._moments(x)
        every = self.gather(xp.concatenate([xp.full(1, count, x.dtype), mean, squares]))
        counts, means = every[:, :1], every[:, 1 : 1 + channels]
        self.count = counts.sum()
        mean = (counts * means).sum(axis=0) / self.count
        # Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979
        squares = (every[:, 1 + channels :] + counts * xp.square(means - mean)).sum(axis=0)
        self.running_mean += self.momentum * (mean - self.running_mean)
        self.running_var += self.momentum * (squares / (self.count - 1) - self.running_var)
        return mean, squares / self.count

    # The four passes over the images.

    def _moments(self, x):
        """Of this rank's images: values per channel, their mean and the sum of squared deviations from it (C,)."""
        xp, rows = array_module(x), x.reshape(-1, x.shape[3])
        mean = sum_rows(rows) / max(len(rows), 1)
        centred = xp.subtract(
            rows, mean, out=self.scratch("normal", x.shape, x).reshape(rows.shape)
        )
        return len(rows), mean, sum_rows(xp.square(centred, out=centred))

    def _normalize(self, x, mean):
        xp = array_module(x)
        self.normal = xp.subtract(x, mean, out=self.scratch("normal", x.shape, x))
        self.normal *= self.inverse
        out = xp.multiply(self.normal, self.gamma, out=self.scratch("out", x.shape, x))
        out += self.beta
        return out

    def _sums(self, dout):
        """dgamma and dbeta (C,) of this rank's images."""
        product = array_module(dout).multiply(
            dout, self.normal, out=self.scratch("dx", dout.shape, dout)
        )
        return [sum_rows(a.reshape(-1, dout.shape[3])) for a in (product, dout)]

    def _input_gradient(self, dout, dgamma, dbeta):
        """dx = gamma / deviation (dout - dbeta - normal dgamma), dgamma and dbeta being means over the batch."""
        xp = array_module(dout)
        dx = xp.multiply(self.normal, -dgamma, out=self.scratch("dx", dout.shape, dout))
        dx += dout
        dx -= dbeta
        dx *= self.gamma * self.inverse
        return dx


def sum_rows(rows):
    """The sum (C,) of rows (n, C), by BLAS."""
    return array_module(rows).ones(len(rows), rows.dtype) @ rows


class GlobalAvgPool(Layer):
    """The mean over all positions: (N, H, W, C) → (N, C)."""

    def forward(self, x):
        self.x_shape = x.shape
        return x.mean(axis=(1, 2))

    def backward(self, dout):
        _, h, w, _ = self.x_shape
        dx = self.scratch("dx", self.x_shape, dout)
        dx[...] = (dout / (h * w))[:, None, None]
        return dx


class BasicBlock(Layer):
    """ReLU(BN(conv3×3(ReLU(BN(conv3×3(x))))) + shortcut(x)): He et al., "Deep Residual Learning", 2015, figure 2.

    The first convolution has the stride; the shortcut is x, or BN(conv1×1(x)) where stride or channels change.
    conv: the class of the 3×3 convolutions with stride 1; other_conv: of the others; norm: in place of BatchNorm2D.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        stride=1,
        *,
        conv=None,
        other_conv=Conv2D,
        norm=BatchNorm2D,
        rng=None,
        dtype=np.float32,
    ):
        conv, options = (
            conv or WinogradConv2D,
            {"bias": False, "rng": np.random.default_rng(rng), "dtype": dtype},
        )
        first = (
            conv(in_channels, out_channels, **options)
            if stride == 1
            else other_conv(in_channels, out_channels, stride=stride, **options)
        )
        self.branch = [
            first,
            norm(out_channels, dtype=dtype),
            ReLU(),
            conv(out_channels, out_channels, **options),
            norm(out_channels, dtype=dtype),
        ]
        self.shortcut, self.relu = [], ReLU()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = [
                other_conv(in_channels, out_channels, 1, stride, 0, **options),
                norm(out_channels, dtype=dtype),
            ]

    def leaves(self):
        for part in (*self.branch, *self.shortcut):
            yield from part.leaves()

    def forward(self, x):
        y, shortcut = x, x
        for part in self.branch:
            y = part.forward(y)
        for part in self.shortcut:
            shortcut = part.forward(shortcut)
        y += shortcut
        return self.relu.forward(y)

    def backward(self, dout):
        dsum = dx = self.relu.backward(dout)
        for part in reversed(self.branch):
            dx = part.backward(dx)
        for part in reversed(self.shortcut):
            dsum = part.backward(dsum)
        dx += dsum
        return dx


class Flatten(Layer):
    def forward(self, x):
        self.x_shape = x.shape
        return x.reshape(len(x), math.prod(x.shape[1:]))  # (N, H, W, C) → (N, H·W·C)

    def backward(self, dout):
        return dout.reshape(self.x_shape)


class Dense(Layer):
    """x @ W + b. W: (in_features, out_features), He-normal; b: (out_features,), zero."""

    param_names = ("W", "b")

    def __init__(self, in_features, out_features, *, rng=None, dtype=np.float32):
        self.W, self.b = (
            he_normal((in_features, out_features), rng, dtype),
            np.zeros(out_features, dtype),
        )
        self.dW, self.db = np.zeros_like(self.W), np.zeros_like(self.b)

    def forward(self, x):
        self.x = x
        out = array_module(x).matmul(x, self.W, out=self.scratch("out", (len(x), self.b.size), x))
        out += self.b
        return out

    def backward(self, dout):
        xp = array_module(dout)
        xp.matmul(self.x.T, dout, out=self.dW)
        dout.sum(axis=0, out=self.db)
        if self.needs_dx:
            dx = self.scratch("dx", self.x.shape, dout)
            dx[...] = (self.W @ dout.T).T  # BLAS is much faster with the long dimension first
            return dx


def he_normal(shape, rng=None, dtype=np.float32):
    """Normal weights of variance 2 / fan_in: He et al., "Delving Deep into Rectifiers", 2015.

    rng: a NumPy Generator or a seed. The draw is made in float64, so that float32 and float64 models start alike.
    """
    fan_in = math.prod(shape[:-1])
    return (np.random.default_rng(rng).standard_normal(shape) * math.sqrt(2 / fan_in)).astype(dtype)


def softmax_cross_entropy(logits, labels):
    """logits (N, K), labels (N,) integers → the loss summed over the batch, a float, and dlogits (N, K)."""
    xp = array_module(logits)
    rows = xp.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    probabilities = xp.exp(shifted)
    sums = probabilities.sum(axis=1, keepdims=True)
    loss = xp.log(sums).sum(dtype=np.float64) - shifted[rows, labels].sum(dtype=np.float64)
    probabilities /= sums
    probabilities[rows, labels] -= 1
    return float(loss), probabilities


def count_correct(logits, labels):
    """logits (N, K), labels (N,) → how many labels are the largest logit, and among the five largest."""
    mine = logits[array_module(logits).arange(len(labels)), labels][:, None]
    top1 = (logits.argmax(axis=1) == labels).sum()
    return int(top1), int(((logits > mine).sum(axis=1) < 5).sum())


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


class Model:
    """Layers in a row, with all parameters in one flat buffer, `params`, and all gradients in another, `grads`.

    A layer's W, b, dW and db are views into them. So an optimizer step is a few operations on one array, a checkpoint
    is one array, and a reduction over MPI is one call on (slices of) one buffer. xp: numpy or cupy, where they live.
    """

    def __init__(self, layers, xp=np):
        self.layers = list(layers)
        self.layers[0].needs_dx = False
        size = sum(p.size for layer in self.layers for p in layer.params())
        dtype = next(p.dtype for layer in self.layers for p in layer.params())
        self.params, self.grads = (
            aligned_zeros((size,), dtype, xp),
            aligned_zeros((size,), dtype, xp),
        )
        self.slices, self._places, start = (
            [],
            [],
            0,
        )  # each layer's part of the buffers, each parameter's
        for layer in self.layers:
            first = start
            for leaf in layer.leaves():
                for name in leaf.state_names:
                    setattr(leaf, name, xp.asarray(getattr(leaf, name)))
                for name in leaf.param_names:
                    value = xp.asarray(getattr(leaf, name))
                    part = slice(start, start + value.size)
                    self.params[part] = value.reshape(-1)
                    setattr(leaf, name, self.params[part].reshape(value.shape))
                    setattr(leaf, "d" + name, self.grads[part].reshape(value.shape))
                    self._places.append((leaf, name, part, value.shape))
                    start = part.stop
            self.slices.append(slice(first, start))

    def move(self, params, grads):
        """Keep parameters and gradients in these buffers, which have their values: memory that processes share, say."""
        self.params, self.grads = params, grads
        for leaf, name, part, shape in self._places:
            setattr(leaf, name, params[part].reshape(shape))
            setattr(leaf, "d" + name, grads[part].reshape(shape))

    def forward(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dout, on_grad_ready=None):
        """Set `grads`, summed over the batch. on_grad_ready(slice) is called as soon as that part of it is final."""
        for layer, part in zip(reversed(self.layers), reversed(self.slices), strict=True):
            dout = layer.backward(dout)
            if on_grad_ready and part.stop > part.start:
                on_grad_ready(part)

    def train(self, training=True):
        """Set the layers' mode, training or evaluation."""
        for layer in self.layers:
            for leaf in layer.leaves():
                leaf.training = training

    def gather_statistics(self, gather):
        """Let BatchNorm2D take its statistics over all ranks: gather(array) → (ranks, ...)."""
        for layer in self.layers:
            for leaf in layer.leaves():
                if isinstance(leaf, BatchNorm2D):
                    leaf.gather = gather

    def state(self):
        """Arrays that a checkpoint needs besides `params`: running statistics."""
        return [array for layer in self.layers for array in layer.state()]


def make_cnn(
    seed=42, dtype=np.float32, xp=np, conv1=ConvReLUPool, conv2=WinogradReLUPool, dense=Dense
):
    """The `cnn` of all scripts, 1,070,794 parameters: (N, 32, 32, 3) → logits (N, 10).

    Conv 3→32, ReLU, MaxPool 2, Conv 32→64, ReLU, MaxPool 2, Flatten, Dense 4096→256, ReLU, Dense 256→10; convolutions
    3×3 with padding 1. conv1, conv2 and dense: layer classes of the same protocol that take the place of these.
    """
    rng = np.random.default_rng(seed)
    return Model(
        [
            conv1(3, 32, rng=rng, dtype=dtype),
            conv2(32, 64, rng=rng, dtype=dtype),
            Flatten(),
            dense(64 * 8 * 8, 256, rng=rng, dtype=dtype),
            ReLU(),
            dense(256, 10, rng=rng, dtype=dtype),
        ],
        xp,
    )


def make_resnet18(
    seed=42, dtype=np.float32, xp=np, conv=None, stem=None, block=BasicBlock, dense=Dense
):
    """`resnet18`, the CIFAR form, 11,173,962 parameters: (N, 32, 32, 3) → logits (N, 10).

    A 3×3 stem without pooling, then two BasicBlocks each of 64, 128, 256 and 512 channels, the first of each stage but
    the first with stride 2. conv: a class in the place of WinogradConv2D; stem(rng, dtype): the layers of the stem;
    block and dense: classes in the place of BasicBlock and Dense.
    """
    rng = np.random.default_rng(seed)
    layers = (
        stem(rng, dtype)
        if stem
        else [Conv2D(3, 64, bias=False, rng=rng, dtype=dtype), BatchNorm2D(64, dtype=dtype), ReLU()]
    )
    channels = 64
    for width in (64, 128, 256, 512):
        for stride in (1 if width == 64 else 2, 1):
            layers.append(block(channels, width, stride, conv=conv, rng=rng, dtype=dtype))
            channels = width
    return Model([*layers, GlobalAvgPool(), dense(512, 10, rng=rng, dtype=dtype)], xp)


MODELS = ("cnn", "resnet18")


def make_model(name, seed=42, dtype=np.float32, xp=np):
    """The network that --model names, one of MODELS."""
    return {"cnn": make_cnn, "resnet18": make_resnet18}[name](seed, dtype, xp)


def evaluate(model, images, labels, batch_size=100, reduce=lambda sums: None):
    """Evaluate on uint8 images (N, 32, 32, 3): mean loss, top-1 and top-5 accuracy, seconds spent loading batches.

    reduce(sums): sums an array in place over the ranks that share the images.
    """
    model.train(False)
    sums, loading = np.zeros(4), 0.0  # loss, top-1, top-5, images
    for start in range(0, len(labels), batch_size):
        clock = time.perf_counter()
        x, y = load_batch(images, labels, slice(start, start + batch_size), model.params.dtype)
        loading += time.perf_counter() - clock
        logits = model.forward(x)
        sums += (softmax_cross_entropy(logits, y)[0], *count_correct(logits, y), len(y))
    model.train(True)
    reduce(sums)
    return *(sums[:3] / sums[3]).tolist(), loading


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers
# ----------------------------------------------------------------------------------------------------------------------


class Optimizer:
    """step(count) divides the summed gradients by count and updates the model's flat parameter buffer in place.

    grads: the sums, if they are not in the model's own buffer. parts: the slices to update, if not all. `slots` are the
    arrays that a checkpoint needs, by name. The buffers are walked in pieces that stay in the cache.
    """

    PIECE = 64 * 1024  # elements

    def __init__(self, model, lr, weight_decay, slots):
        xp, dtype = array_module(model.params), model.params.dtype
        self.model, self.lr, self.weight_decay, self.steps = model, lr, weight_decay, 0
        self.slots = {name: aligned_zeros(model.params.shape, dtype, xp) for name in slots}
        self._g = aligned_zeros((self.PIECE,), dtype, xp)

    def step(self, count, grads=None, parts=None):
        self.steps += 1
        w, grads = self.model.params, self.model.grads if grads is None else grads
        for part in [slice(0, len(w))] if parts is None else parts:
            for start in range(part.start, part.stop, self.PIECE):
                piece = slice(start, min(start + self.PIECE, part.stop))
                g = array_module(w).multiply(
                    grads[piece], 1 / count, out=self._g[: piece.stop - piece.start]
                )
                if self.weight_decay:
                    g += self.weight_decay * w[piece]
                self._update(
                    w[piece], g, **{name: slot[piece] for name, slot in self.slots.items()}
                )


class SGD(Optimizer):
    """v = momentum v + g; w -= lr v. PyTorch's form: the learning rate stands outside the velocity."""

    def __init__(self, model, lr=0.01, momentum=0.9, weight_decay=0.0):
        super().__init__(model, lr, weight_decay, ("velocity",))
        self.momentum = momentum

    def _update(self, w, g, velocity):
        velocity *= self.momentum
        velocity += g
        w -= array_module(w).multiply(velocity, self.lr, out=g)


class Adam(Optimizer):
    """Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015; weight decay is added to the gradient."""

    def __init__(self, model, lr=0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(model, lr, weight_decay, ("m", "v"))
        self.betas, self.eps = betas, eps

    def _update(self, w, g, m, v):
        (beta1, beta2), xp = self.betas, array_module(w)
        m *= beta1
        m += (1 - beta1) * g
        v *= beta2
        v += (1 - beta2) * xp.square(g, out=g)
        xp.sqrt(v, out=g)
        g /= math.sqrt(1 - beta2**self.steps)
        g += self.eps
        w -= self.lr / (1 - beta1**self.steps) * xp.divide(m, g, out=g)


def make_optimizer(model, args, sgd=SGD, adam=Adam):
    """The optimizer that --optimizer, --lr, --momentum and --weight-decay ask for, of one of these classes."""
    if args.optimizer == "adam":
        return adam(model, args.lr, weight_decay=args.weight_decay)
    return sgd(model, args.lr, args.momentum, args.weight_decay)


def get_arrays(model, optimizer):
    """What a checkpoint holds of a model and its optimizer: {name: array}."""
    return {
        "params": model.params,
        **{f"state{i}": array for i, array in enumerate(model.state())},
        **{f"optimizer_{name}": array for name, array in optimizer.slots.items()},
        "optimizer_steps": np.array(optimizer.steps),
    }


def set_arrays(model, optimizer, arrays):
    """Put back what get_arrays() returned."""
    for name, array in get_arrays(model, optimizer).items():
        array[...] = array_module(array).asarray(arrays[name])
    optimizer.steps = int(arrays["optimizer_steps"])


# ----------------------------------------------------------------------------------------------------------------------
# Run log, resource monitor, checkpoints
# ----------------------------------------------------------------------------------------------------------------------

TRAIN, VALIDATE, BATCH, FETCH_TRAIN, FETCH_VALIDATE = 0, 1, 2, 10, 11  # record types of the log
LOG_COLUMNS = (
    "type",
    "epoch",
    "start",
    "loading",
    "duration",
    "value1",
    "value2",
    "loss",
    "images_per_s",
    "cpu_percent",
    "ram_mb",
    "gpu_percent",
    "gpu_mem_mb",
    "forward",
    "backward",
    "communication",
)
METRICS = ("train_loss", "train_acc", "test_loss", "test_acc", "epoch_time", "images_per_s")
MIB = 2**20


class ResourceMonitor(threading.Thread):
    """Samples, once a second, CPU use and RAM of this process and its children, and a GPU's use and memory.

    CPU use is in percent of one core. RAM is the sum of resident sets, in MiB: pages that processes share count for
    each of them. gpu_uuid: the GPU to watch through NVML, as "GPU-…".
    """

    FIELDS = ("cpu_percent", "ram_mb", "gpu_percent", "gpu_mem_mb")

    def __init__(self, interval=1.0, gpu_uuid=None):
        super().__init__(daemon=True)
        import psutil

        self.interval, self.process = interval, psutil.Process()
        self.samples, self._stop_event, self._lock, self._nvml = (
            [],
            threading.Event(),
            threading.Lock(),
            None,
        )
        if gpu_uuid:
            with contextlib.suppress(Exception):  # no NVML: the GPU columns stay empty
                import pynvml

                pynvml.nvmlInit()
                self._nvml, self._gpu = pynvml, pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid)
        self._sampled, (self._cpu_seconds, _) = time.monotonic(), self._measure()

    def run(self):
        while not self._stop_event.wait(self.interval):
            self.sample()

    def stop(self):
        self._stop_event.set()
        self.join()

    def sample(self):
        with self._lock:
            now, cpu = time.monotonic(), None
            seconds, ram = self._measure()
            if now - self._sampled >= 0.05:  # a shorter time tells nothing of the CPU
                used = sum(
                    s - self._cpu_seconds.get(process, 0.0) for process, s in seconds.items()
                )
                cpu = 100 * used / (now - self._sampled)
                self._sampled, self._cpu_seconds = now, seconds
            gpu, memory = None, None
            if self._nvml:
                with contextlib.suppress(
                    self._nvml.NVMLError
                ):  # no GPU that is partitioned (MIG) tells its use
                    gpu = self._nvml.nvmlDeviceGetUtilizationRates(self._gpu).gpu
                with contextlib.suppress(self._nvml.NVMLError):
                    memory = self._nvml.nvmlDeviceGetMemoryInfo(self._gpu).used / MIB
            self.samples.append((cpu, ram / MIB, gpu, memory))

    def _measure(self):
        """CPU seconds of each process so far, and the sum of their resident sets in bytes."""
        import psutil

        seconds, ram = {}, 0
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                times = process.cpu_times()
                seconds[process] = times.user + times.system
                ram += process.memory_info().rss
        return seconds, ram

    def latest(self):
        return dict(zip(self.FIELDS, self.samples[-1], strict=True)) if self.samples else {}

    def summary(self, since=0):
        """Mean use and peak memory of the samples from number `since` on."""
        result = {}
        for field, samples in zip(
            self.FIELDS, zip(*self.samples[since:], strict=True), strict=False
        ):
            if values := [sample for sample in samples if sample is not None]:
                result[field] = max(values) if field.endswith("_mb") else sum(values) / len(values)
        return result


class Run:
    """Everything that a training run leaves behind: log, sidecar, metrics, checkpoint, and what it shows meanwhile.

    arguments: the parsed command line; its log, save_metrics, checkpoint, resume, checkpoint_every, epochs and quiet
    are used here. script: name for titles. data: the Dataset. get_arrays() → {name: array} for the checkpoint;
    set_arrays(that) puts them back. info: further entries of the sidecar. rank: only rank 0 writes and shows anything.

    Use as a context manager. In the loop: start_epoch(), end_batch() after each batch, end_training(), end_epoch().
    Ctrl-C and SIGTERM end the run with Interrupted when the next batch is complete.
    """

    SAME_WHEN_RESUMED = (
        "model",
        "dtype",
        "optimizer",
        "lr",
        "momentum",
        "weight_decay",
        "seed",
        "batch_size",
        "subset",
        "amp",
        "augment",
        "nesterov",
        "schedule",
        "schedule_epochs",
        "warmup",
        "label_smoothing",
        "micro_batches",
        "image_size",
    )

    def __init__(
        self, args, script, data, get_arrays, set_arrays, info=None, rank=0, gpu_uuid=None
    ):
        self.args, self.script, self.data, self.rank, self.get_arrays = (
            args,
            script,
            data,
            rank,
            get_arrays,
        )
        self.identity = {
            "augment": "off"
        }  # of scripts without the option, which go on from those that have it
        self.identity.update(
            (name, getattr(args, name)) for name in self.SAME_WHEN_RESUMED if hasattr(args, name)
        )
        if hasattr(args, "global_batch_size"):  # what a step is, however many ranks share it
            self.identity["batch_size"] = args.global_batch_size
        self.identity.update(dataset=data.name, fingerprint=data.fingerprint)
        self.epoch, self.batch, self.sums = (
            1,
            0,
            {},
        )  # the next batch to train is number `batch` (from 0) of `epoch`
        self.history = {name: [] for name in METRICS}
        self.totals = {"train_seconds": 0.0, "train_images": 0, "evaluation_seconds": 0.0}
        self.signal, self._first_batch = (
            None,
            True,
        )  # signal: the name of one that was sent to this process
        if rank == 0:
            if not Path(args.log).name:
                raise InputError(f"--log {args.log!r}: give a file name")
            check_outputs([args.log, self._sidecar_path(), args.save_metrics, args.checkpoint])
            if args.resume:
                set_arrays(self._load_checkpoint())
        self.monitor = ResourceMonitor(gpu_uuid=gpu_uuid)
        self._info = info or {}

    def __enter__(self):
        args = self.args
        if self.rank == 0:
            self._log_file = self._open_log()
            self._log = csv.writer(self._log_file, lineterminator="\n")
            if os.fstat(self._log_file.fileno()).st_size == 0:
                self._log.writerow(LOG_COLUMNS)
                self._log_file.flush()
        self._handlers = {
            s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)
        }
        self.sidecar = {
            "script": self.script,
            "arguments": vars(args),
            "dataset": self.data.name,
            "fingerprint": self.data.fingerprint,
            "train_images": len(self.data.y_train),
            "test_images": len(self.data.y_test),
            "seed": args.seed,
            "ranks": 1,
            "threads": 1,
            "identity": self.identity,
            **environment(),
            **self._info,
            "start": time.time(),
            "end": None,
            "status": "running",
            "totals": {},
        }
        self._write_sidecar()
        if self.rank == 0:
            self.monitor.start()
        self._saved = time.monotonic()
        self._display = None if args.quiet or self.rank else Display(args.epochs)
        return self

    def __exit__(self, kind, error, _):
        if self.rank == 0:
            self.monitor.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._display:
            self._display.close()
        interrupted = kind in (Interrupted, KeyboardInterrupt)
        status = "interrupted" if interrupted else f"failed: {error}" if error else "done"
        if self.rank == 0:
            self.sidecar.update(end=time.time(), status=status)
            self._write_sidecar()
            self._log_file.close()

    # -- called by the training loop ------------------------------------------------------------------------------

    def start_epoch(self, epoch, batches):
        self.epoch, self.batches = epoch, batches
        if self.batch == 0:
            self.sums = dict.fromkeys(("images", "loss", "top1", "top5", "loading", "duration"), 0)
            self.sums["start"] = time.time()
        if self._display:
            self._display.start(epoch, len(self.data.y_train), self.sums["images"])
        self._first_sample = len(self.monitor.samples)
        self._clock = time.perf_counter() - self.sums["duration"]

    def due(self):
        """Whether a checkpoint or the end of the run is due, for one whose next batch may already be on its way."""
        return bool(self.signal or self._checkpoint_due())

    def _checkpoint_due(self):
        return self.args.checkpoint and time.monotonic() - self._saved >= self.args.checkpoint_every

    def end_batch(self, images, loss, top1, top5, loading, stop=None, more=False, **phases):
        """Count a batch: its images, summed loss, numbers of correct answers, seconds spent waiting for data.

        stop: whether to stop here, where several processes must agree; default: whether this one was sent a signal.
        more: the next batch is on its way and changes the weights: neither save nor stop after this one.
        phases: seconds of this batch in forward, backward, communication, where they are measured.
        Raises TrainingError if the loss is not finite, Interrupted if it is to stop.
        """
        if self._first_batch:
            self._first_batch = False
            self.totals.setdefault("first_step_after_seconds", process_age())
        self.batch += 1
        sums = self.sums
        for name, value in dict(
            images=images, loss=loss, top1=top1, top5=top5, loading=loading, **phases
        ).items():
            sums[name] = sums.get(name, 0) + value
        sums["duration"] = time.perf_counter() - self._clock
        self._row(
            BATCH,
            value1=self.batch,
            value2=self.batches,
            loss=loss / max(images, 1),
            **self.monitor.latest(),
        )
        self._check_finite(loss, "loss")
        if self._display:
            self._display.update(self.epoch, self.batch, self.batches, sums)
        if more:
            return
        due = self._checkpoint_due()
        if self.signal if stop is None else stop:
            self._interrupt()
        if due and self.batch < self.batches:
            pause = time.perf_counter()
            self.save_checkpoint()
            self._clock += time.perf_counter() - pause  # not training time

    def end_loading(self, images, loading):
        """Count a batch that was only loaded, and after the last one its epoch: rows without loss and accuracies."""
        self.batch += 1
        sums = self.sums
        sums.update(
            images=sums["images"] + images,
            loading=sums["loading"] + loading,
            duration=time.perf_counter() - self._clock,
        )
        self._row(BATCH, value1=self.batch, value2=self.batches, **self.monitor.latest())
        if self.signal:
            self._interrupt()
        if self.batch == self.batches:
            self.monitor.sample()
            self._row(TRAIN, **self.monitor.summary(self._first_sample))
            self.totals["train_seconds"] += sums["duration"]
            self.totals["train_images"] += sums["images"]
            self.batch = 0
            if self._display:
                self._display.close()

    def record_fetch(self, kind, start, loading, duration, images):
        """The row of a data set that was fetched before the training: FETCH_TRAIN or FETCH_VALIDATE."""
        self._write_row(
            kind, epoch=0, start=start, loading=loading, duration=duration, value1=images
        )

    def check_signal(self):
        """Stop here, between two batches, if a signal has come: for one who has to wait for the next batch."""
        if self.signal:
            self._interrupt()

    def end_training(self):
        """The epoch's training is over; what follows until end_epoch() is its validation."""
        sums = self.sums
        accuracy, top5 = sums["top1"] / sums["images"], sums["top5"] / sums["images"]
        self.monitor.sample()
        resources = self.monitor.summary(self._first_sample)
        self._row(
            TRAIN, value1=accuracy, value2=top5, loss=sums["loss"] / sums["images"], **resources
        )
        self.totals["train_seconds"] += sums["duration"]
        self.totals["train_images"] += sums["images"]
        values = (
            sums["loss"] / sums["images"],
            accuracy,
            sums["duration"],
            sums["images"] / sums["duration"],
        )
        for name, value in zip(
            ("train_loss", "train_acc", "epoch_time", "images_per_s"), values, strict=True
        ):
            self.history[name].append(value)
        self._validation_start, self._clock = time.time(), time.perf_counter()

    def end_epoch(self, loss, top1, top5, loading, stop=None):
        """The validation's mean loss, accuracies and the seconds that it waited for data; stop as in end_batch()."""
        seconds = time.perf_counter() - self._clock
        self.totals["evaluation_seconds"] += seconds
        self._write_row(
            VALIDATE,
            start=self._validation_start,
            loading=loading,
            duration=seconds,
            value1=top1,
            value2=top5,
            loss=loss,
            images_per_s=len(self.data.y_test) / seconds,
            **self.monitor.latest(),
        )
        self._check_finite(loss, "validation loss")
        self.history["test_loss"].append(loss)
        self.history["test_acc"].append(top1)
        if self._display:
            self._display.end_epoch(self.epoch, self.history)
        self.epoch, self.batch = self.epoch + 1, 0
        self._write_results()
        if self.args.checkpoint:
            self.save_checkpoint()
        if (self.signal if stop is None else stop) and self.epoch <= self.args.epochs:
            self._interrupt()

    def finish(self):
        """Write the totals and print the table of the run."""
        self._write_results()
        if self.rank:
            return
        args, data, totals = self.args, self.data, self.sidecar["totals"]
        name = {"synthetic": "SYNTHETIC DATA, not CIFAR-10"}.get(data.name, data.name)
        result = f"{totals['train_images']:,} images loaded"
        if self.history["test_acc"]:
            best = int(np.argmax(self.history["test_acc"]))
            result = f"best test accuracy {self.history['test_acc'][best]:.2%} (epoch {best + 1})"
        if self.history["test_acc"] and not args.quiet:
            header = (
                "epoch",
                "train loss",
                "train acc",
                "test loss",
                "test acc",
                "seconds",
                "images/s",
            )
            rows = [
                [
                    str(i + 1),
                    *(f"{self.history[m][i]:{f}}" for m, f in zip(METRICS, FORMATS, strict=True)),
                ]
                for i in range(len(self.history["test_acc"]))
            ]
            print(
                f"\n{self.script}: {args.model}, {name}, {len(data.y_train):,} images\n{table(header, rows)}"
            )
        print(
            f"{self.script}: {result}, {totals['train_seconds']:.1f} s"
            f"{' of training' if self.history['test_acc'] else ''}, {totals['images_per_s']:,.0f} images/s, "
            f"peak RAM {totals['peak_ram_mb']:,.0f} MiB, {name}; log: {args.log}",
            flush=True,
        )

    def _check_finite(self, loss, what):
        if not math.isfinite(loss):
            step = (self.epoch - 1) * self.batches + self.batch
            raise TrainingError(
                f"the {what} is {loss} at step {step} (epoch {self.epoch}, batch {self.batch}): try a "
                f"smaller --lr; the log is kept in {self.args.log}"
            )

    # -- files ----------------------------------------------------------------------------------------------------

    def _row(self, kind, **values):
        sums = self.sums
        phases = {
            name: sums[name] for name in ("forward", "backward", "communication") if name in sums
        }
        self._write_row(
            kind,
            start=sums["start"],
            loading=sums["loading"],
            duration=sums["duration"],
            images_per_s=sums["images"] / sums["duration"],
            **phases,
            **values,
        )

    def _write_row(self, kind, **values):
        if self.rank == 0:
            values = {"epoch": self.epoch, **values, "type": kind}
            cells = (values.get(column, "") for column in LOG_COLUMNS)
            self._log.writerow(
                [f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells]
            )
            self._log_file.flush()

    def _open_log(self):
        """The log, empty, or when resuming without the rows after the checkpoint, which will be written again."""
        path, kept = Path(self.args.log), []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log = open(path, "a", newline="")  # not "w": another run may be writing it
            if not path.is_file():  # a device, such as /dev/null
                return log
            self._claim(log)
            if self.args.resume and path.stat().st_size:
                self._check_own_log()
                with open(path, newline="") as file:
                    rows = csv.DictReader(file)
                    kept = (
                        [row for row in rows if self._before_checkpoint(row)]
                        if rows.fieldnames
                        else []
                    )
                with atomic_write(path, "w") as file:
                    writer = csv.DictWriter(
                        file, LOG_COLUMNS, extrasaction="ignore", lineterminator="\n"
                    )
                    writer.writeheader()
                    writer.writerows(kept)
                log.close()
                log = open(path, "a", newline="")
                self._claim(log)
            else:
                log.truncate(0)
            return log
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--log {path}: {reason}: choose another file") from None

    def _claim(self, log):
        """Raise InputError if another run is writing this log: their rows would be mixed. The system ends the claim."""
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"--log {log.name}: another run is writing it: wait for its end, or give this one "
                    "files of its own (--log, --save-metrics, --checkpoint)"
                ) from None
            except OSError:  # a file system without locks
                pass

    def _check_own_log(self):
        """Raise InputError if the sidecar tells that the log is another run's than the checkpoint."""
        with contextlib.suppress(
            OSError, ValueError, AttributeError
        ):  # no sidecar: nothing is known
            identity = json.loads(self._sidecar_path().read_text()).get("identity", self.identity)
            if identity != self.identity:
                raise InputError(
                    f"--resume: {self.args.log} is the log of another run than {self.args.checkpoint}: "
                    "give --log the file that belongs to it, or a new one"
                )

    def _before_checkpoint(self, row):
        try:
            epoch, batch = int(row["epoch"]), int(row["value1"]) if row["type"] == str(BATCH) else 0
        except (TypeError, ValueError, KeyError):  # a row that was cut off
            return False
        return epoch < self.epoch or (epoch == self.epoch and 0 < batch <= self.batch)

    def _write_results(self):
        if self.rank:
            return
        resources, history = self.monitor.summary(), self.history
        seconds = self.totals["train_seconds"]
        totals = dict(
            self.totals,
            images_per_s=self.totals["train_images"] / seconds if seconds else 0.0,
            peak_ram_mb=max(resources.pop("ram_mb", 0.0), peak_rss() / MIB),
        )
        if "gpu_mem_mb" in resources:
            totals["peak_gpu_mem_mb"] = resources.pop("gpu_mem_mb")
        totals.update({f"mean_{name}": value for name, value in resources.items()})
        if history["test_acc"]:
            totals.update(
                final_accuracy=history["test_acc"][-1], best_accuracy=max(history["test_acc"])
            )
        self.sidecar["totals"] = {**self.sidecar["totals"], **totals}
        self._write_sidecar()
        if self.args.save_metrics:
            with atomic_write(self.args.save_metrics) as file:
                np.savez(file, **{name: np.array(values) for name, values in history.items()})

    def _sidecar_path(self):
        return Path(self.args.log).with_suffix(".json")

    def _write_sidecar(self):
        if self.rank == 0:
            with atomic_write(self._sidecar_path(), "w") as file:
                json.dump(self.sidecar, file, indent=1, default=str)
                file.write("\n")

    def save_checkpoint(self):
        """Write parameters, optimizer, position and sums; the file is the old one or the new one, never a part."""
        if self.rank:
            return
        meta = {
            "identity": self.identity,
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": self.sums,
            "history": self.history,
            "totals": self.totals,
        }
        with atomic_write(self.args.checkpoint) as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **self.get_arrays())
        self._saved = time.monotonic()

    def _load_checkpoint(self):
        path = self.args.checkpoint
        if not path:
            raise InputError("--resume needs --checkpoint FILE, the file to resume from")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            meta = json.loads(str(arrays.pop("meta")))
            identity = meta["identity"]
        except FileNotFoundError:
            raise InputError(
                f"--resume: there is no checkpoint {path}: start without --resume"
            ) from None
        except (
            Exception
        ) as error:  # zip, zlib, NumPy and JSON each have their own for a damaged or foreign file
            raise InputError(
                f"--resume: {path} is not a whole checkpoint ({error}): start without --resume"
            ) from None
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise InputError(
                    f"--resume: {path} was made with {name} {identity.get(name)}, this run has {value}: "
                    "repeat that run's options, or start without --resume"
                )
        wanted = {name: array.shape for name, array in self.get_arrays().items()}
        if wanted != {name: array.shape for name, array in arrays.items()}:
            raise InputError(
                f"--resume: {path} is a checkpoint of another model: start without --resume"
            )
        self.epoch, self.batch, self.sums = meta["epoch"], meta["batch"], meta["sums"]
        self.history, self.totals = meta["history"], meta["totals"]
        return arrays

    # -- signals --------------------------------------------------------------------------------------------------

    def _on_signal(self, number, _):
        self.signal = signal.Signals(number).name
        signal.signal(number, self._handlers[number])  # a second one does what it always does

    def _interrupt(self):
        if self.args.checkpoint:
            self.save_checkpoint()
        self._write_results()
        saved = (
            f"; continue with --checkpoint {self.args.checkpoint} --resume"
            if self.args.checkpoint
            else ""
        )
        place = (
            f"after batch {self.batch} of epoch {self.epoch}"
            if self.batch
            else f"after epoch {self.epoch - 1}"
        )
        raise Interrupted(f"interrupted by {self.signal or 'a signal'} {place}{saved}")


FORMATS = (".4f", ".2%", ".4f", ".2%", ".1f", ",.0f")  # of METRICS


class Display:
    """Progress of a run: a bar where stderr is a terminal, a line every ten seconds on stdout elsewhere."""

    def __init__(self, epochs):
        self.epochs, self.terminal, self.bar, self.printed = (
            epochs,
            sys.stderr.isatty(),
            None,
            time.monotonic(),
        )

    def start(self, epoch, images, done):
        self.done = done
        if self.terminal:
            from tqdm import tqdm

            self.bar = tqdm(
                total=images,
                initial=done,
                desc=f"epoch {epoch}/{self.epochs}",
                unit=" images",
                dynamic_ncols=True,
                leave=False,
                mininterval=0.2,
            )

    def update(self, epoch, batch, batches, sums):
        loss = sums["loss"] / sums["images"]
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self.bar.update(sums["images"] - self.bar.n)
        elif time.monotonic() - self.printed >= 10:
            self.printed = time.monotonic()
            left = sums["duration"] / batch * (batches - batch)
            print(
                f"epoch {epoch}/{self.epochs}  batch {batch}/{batches}  loss {loss:.4f}  "
                f"{sums['images'] / sums['duration']:,.0f} images/s  {left:.0f} s left in this epoch",
                flush=True,
            )

    def end_epoch(self, epoch, history):
        self.close()
        values = (f"{history[m][-1]:{f}}" for m, f in zip(METRICS, FORMATS, strict=True))
        print(
            "epoch {}/{}  train loss {} accuracy {}  test loss {} accuracy {}  {} s  {} images/s".format(
                epoch, self.epochs, *values
            ),
            flush=True,
        )

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def table(header, rows):
    """A plain-text table: rows of strings, right-aligned in columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file beside `path` that takes its place, synced, when the block ends without an error."""
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():  # a device, such as /dev/null
        with open(path, mode) as file:
            yield file
        return
    part = path.with_name(
        f".{path.name}.part"
    )  # the same name each time: what a killed process left is written over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
        raise


def check_outputs(paths):
    """Raise InputError unless a file can be made at each path (None is passed over) and no two are the same."""
    paths = [Path(path) for path in paths if path]
    for path in paths:
        if [os.path.realpath(p) for p in paths].count(os.path.realpath(path)) > 1:
            raise InputError(
                f"{path} would be written twice: give --log (with its .json), --save-metrics and "
                "--checkpoint names of their own"
            )
        try:
            folder = path.parent
            while not folder.exists():
                folder = folder.parent
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
            with tempfile.TemporaryDirectory(dir=folder, prefix=".try-") as scratch:
                (Path(scratch) / f".{path.name}.part").touch()
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}): choose another place"
            ) from None


def process_age():
    """Seconds since this process was started."""
    try:
        started = int(
            Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        )  # ticks since boot, proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        import psutil

        return time.time() - psutil.Process().create_time()


def peak_rss():
    """The process's largest resident set so far, in bytes; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def environment():
    """The machine and software that a result depends on, for the sidecar of a log."""
    import psutil

    commit, here = None, Path(__file__).resolve().parent
    with contextlib.suppress(
        OSError, subprocess.TimeoutExpired
    ):  # not `describe --dirty`, which locks the index
        git = [
            "git",
            "--no-optional-locks",
            "-C",
            str(here),
            "status",
            "--porcelain=v2",
            "--branch",
            "--untracked-files=no",
        ]
        status = subprocess.run(
            git, capture_output=True, text=True, errors="replace", timeout=10
        ).stdout
        if found := re.match(r"# branch\.oid ([0-9a-f]{40})$", status, re.MULTILINE):
            commit = found[1] + "-dirty" * any(
                not line.startswith("#") for line in status.splitlines()
            )
    names = ("numpy", "scipy", "numba", "mpi4py", "torch", "torchvision", "cupy")
    versions = {name: sys.modules[name].__version__ for name in names if name in sys.modules}
    return {
        "host": platform.node(),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "memory_mb": psutil.virtual_memory().total / MIB,
        "blas": blas_info(),
        "git_commit": commit,
        "versions": {"python": platform.python_version(), **versions},
    }


def cpu_model():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_cores():
    """The cores that this process may run on, from its affinity mask where the system has one."""
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


def limit_blas_threads(threads):
    """Set the threads of every BLAS that is loaded, whatever the environment says."""
    import threadpoolctl

    threadpoolctl.threadpool_limits(threads, user_api="blas")


def blas_info():
    """[{library, version, kernel, threads}] of every BLAS that is loaded; kernel: the processor it was chosen for."""
    import threadpoolctl

    return [
        {
            "library": b["internal_api"],
            "version": b["version"],
            "kernel": b.get("architecture"),
            "threads": b["num_threads"],
        }
        for b in threadpoolctl.threadpool_info()
        if b["user_api"] == "blas"
    ]


def blas_warning():
    """A line for the user if OpenBLAS runs kernels for an older processor than this one; else None."""
    old = {
        "Prescott",
        "Core2",
        "Penryn",
        "Nehalem",
        "Sandybridge",
        "Haswell",
        "Zen",
        "Barcelona",
        "Bulldozer",
    }
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    for blas in blas_info():
        if blas["kernel"] in old and "avx512f" in flags and "avx512vl" in flags:
            return (
                f"warning: BLAS uses its {blas['kernel']} kernels, but this processor has AVX-512, which is up to "
                "twice as fast"
                + (": unset OPENBLAS_CORETYPE" if "OPENBLAS_CORETYPE" in os.environ else "")
            )
    return None


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch: what its scripts share
# ----------------------------------------------------------------------------------------------------------------------


def keep_freed_memory():
    """Let glibc's malloc keep and reuse what was freed, for all threads alike.

    By default it returns large blocks to the system, and more of them in threads than in the main one; each time they
    are taken again, the kernel clears their pages, which can cost half of a float32 step. See mallopt(3).
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in (
            (-8, 1),
            (-3, 2**30),
            (-1, 2**31 - 1),
        ):  # ARENA_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD
            libc.mallopt(parameter, value)


def make_torch_resnet(name, cifar_stem=True):
    """torchvision's ResNet of that name: (N, 3, H, W) → logits (N, 10).

    The CIFAR stem is a 3×3 convolution with stride 1 and no pooling: He et al., "Deep Residual Learning", 2015, §4.2.
    ResNet-50 starts with a scale of zero in each block's last normalisation (Goyal et al., "Accurate, Large Minibatch
    SGD", 2017, §5.1); without it the loss rises to three times its start before it falls, at the default learning rate.
    """
    from torch import nn

    model = getattr(import_torchvision().models, name)(
        num_classes=10, zero_init_residual=name == "resnet50"
    )
    if cifar_stem:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def make_torch_optimizer(model, args):
    """SGD or Adam, its state made at once, so that a checkpoint holds the same arrays before and after a step.

    Fused: one pass over a tensor instead of one for each operation, a quarter of the time on a CPU.
    """
    import torch

    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(
            model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.SGD(
            model.parameters(),
            args.lr,
            args.momentum,
            weight_decay=args.weight_decay,
            nesterov=getattr(args, "nesterov", False),
            fused=True,
        )
    for p in model.parameters():
        like_p = ("exp_avg", "exp_avg_sq") if args.optimizer == "adam" else ("momentum_buffer",)
        optimizer.state[p] = {
            name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in like_p
        }
        if args.optimizer == "adam":
            optimizer.state[p]["step"] = torch.zeros((), device=p.device)
    return optimizer


def get_torch_state(model, optimizer):
    """The tensors that a checkpoint needs besides the parameters: {name: tensor}."""
    tensors = {f"buffer_{name}": buffer for name, buffer in model.named_buffers()}
    for i, p in enumerate(model.parameters()):
        tensors.update(
            {f"optimizer_{name}_{i}": tensor for name, tensor in optimizer.state[p].items()}
        )
    return tensors


def get_torch_arrays(model, optimizer):
    """What a checkpoint holds of a PyTorch model and its optimizer: {name: array}; "params" is one flat array."""
    arrays = {
        name: tensor.cpu().numpy() for name, tensor in get_torch_state(model, optimizer).items()
    }
    arrays["params"] = np.concatenate(
        [p.detach().cpu().numpy().reshape(-1) for p in model.parameters()]
    )
    return arrays


def set_torch_arrays(model, optimizer, arrays):
    """Put back what get_torch_arrays() returned."""
    import torch

    params, start = torch.from_numpy(arrays["params"]), 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                params[start : start + p.numel()].view(p.shape)
            )  # in place: p keeps its device and memory format
            start += p.numel()
    for name, tensor in get_torch_state(model, optimizer).items():
        tensor.copy_(torch.from_numpy(arrays[name]))


# ----------------------------------------------------------------------------------------------------------------------
# MPI ranks: what the scripts need besides their lesson. comm: an mpi4py communicator.
# ----------------------------------------------------------------------------------------------------------------------


def share(n, rank, size):
    """This rank's slice of n items: the first n % size ranks have one more than the others. It may be empty."""
    start = rank * (n // size) + min(rank, n % size)
    return slice(start, start + n // size + (rank < n % size))


def check_launcher(comm):
    """Raise InputError if mpirun belongs to another MPI than mpi4py, so that every rank believes that it is alone."""
    from mpi4py import MPI

    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS"):
        if comm.size == 1 and int(os.environ.get(name) or 1) > 1:
            library = MPI.Get_library_version().split("\n")[0].strip("\0")
            raise InputError(
                f"mpirun started {os.environ[name]} ranks, but each is alone: it belongs to another MPI "
                f"than mpi4py, which uses {library}. Take the mpirun beside python: .venv/bin/mpirun"
            )


def stop_all_on_error(comm):
    """Let an exception on one rank end the job: its traceback, with the rank's number, then MPI_Abort.

    So too a signal while no Run takes care of it: ranks that wait in MPI for this one would not see theirs.
    """

    def hook(_, error, __):
        lines = "".join(
            f"[rank {comm.rank}] {line}\n" for line in describe_error(error).splitlines()
        )
        print(lines, end="", file=sys.__stderr__, flush=True)
        comm.Abort(1)

    def stop(*_):
        print("interrupted", file=sys.stderr, flush=True)
        comm.Abort(130)

    sys.excepthook = hook
    if comm.size > 1:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)


def together(comm, action):
    """Call action() on every rank and return its result; an error of input on any rank is raised on all of them."""
    result, problem = None, None
    try:
        result = action()
    except (InputError, OSError) as error:
        problem = str(error)
    problems = [text for text in comm.allgather(problem) if text]
    if problems:
        raise InputError(problems[0])
    return result


def load_on_all(args, comm):
    """The data on every rank; rank 0 first, which downloads and prepares files that the others then find."""

    def load(dataset):
        return load_cifar10(args.data_dir, dataset, args.subset, args.seed)

    data = together(comm, lambda: None if comm.rank else load(args.dataset))
    name = comm.bcast(data and data.name)
    data = together(comm, lambda: data or load(name))
    found = comm.allgather((socket.gethostname(), data.fingerprint))
    for rank, (host, fingerprint) in enumerate(found):
        if fingerprint != found[0][1]:
            raise InputError(
                f"rank {rank} on {host} has other data than rank 0: give all hosts the same --data-dir"
            )
    return data


def resume_on_all(run, model, optimizer, comm):
    """Give all ranks what rank 0 has read from the checkpoint."""
    position = (run.epoch, run.batch, run.sums, run.history, run.totals, optimizer.steps)
    run.epoch, run.batch, run.sums, run.history, run.totals, optimizer.steps = comm.bcast(position)
    for array in (model.params, *model.state(), *optimizer.slots.values()):
        comm.Bcast(array)


def check_equal(model, comm, epoch):
    """Raise TrainingError unless all ranks hold the same weights and running statistics, bit for bit."""
    for what, arrays in (("weights", [model.params]), ("running statistics", model.state())):
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(array.data)
        digests = comm.allgather(digest.digest())
        different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if different:
            raise TrainingError(
                f"after epoch {epoch} the {what} of rank {different[0]} are not those of rank 0"
            )


def report_communication(run, comm):
    """Put the mean over the ranks into the log's column, and least, mean and greatest into the sidecar."""
    seconds = comm.allgather(run.sums.get("communication", 0.0))
    run.sums["communication"] = sum(seconds) / comm.size
    totals = run.totals.setdefault("communication_seconds", {"min": 0.0, "mean": 0.0, "max": 0.0})
    for name, value in (
        ("min", min(seconds)),
        ("mean", sum(seconds) / comm.size),
        ("max", max(seconds)),
    ):
        totals[name] += value


@contextlib.contextmanager
def running_on_all(run, model, optimizer, comm):
    """Enter `run` on all ranks, with what rank 0 has read from a checkpoint, and end it on all of them."""
    resume_on_all(run, model, optimizer, comm)
    try:
        with contextlib.ExitStack() as stack:
            together(
                comm, lambda: stack.enter_context(run)
            )  # rank 0 opens the log, which may be refused
            yield
    except Interrupted as stopped:
        if not run.args.checkpoint or run.signal == "SIGINT":
            raise
        print(stopped, flush=True)  # SIGTERM is how clusters say that the time is over: no failure
    except OSError as error:  # on this rank alone: the others would wait for ever
        print(f"error: {error}", file=sys.stderr, flush=True)
        comm.Abort(1)


def add_rank_options(parser):
    """The options that the MPI scripts have in common beside those of make_parser()."""
    add = parser.add_argument
    add("--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    add(
        "--global-batch-size",
        type=number(int, 1, 10**6),
        metavar="N",
        help="images per step of all ranks together (default: ranks x --batch-size)",
    )
    add(
        "--no-overlap",
        dest="overlap",
        action="store_false",
        help="wait for the sum of each slice before the backward pass goes on",
    )
    add(
        "--reduce",
        choices=("auto", "shared", "messages"),
        default="auto",
        help="let the ranks of a machine share weights and gradients, or sum gradients by messages; auto: shared where "
        "the machines have equal numbers of ranks (default: %(default)s)",
    )


# ----------------------------------------------------------------------------------------------------------------------
# Child processes, for the scripts that start others
# ----------------------------------------------------------------------------------------------------------------------


def find_mpirun():
    """The mpirun beside this Python, which belongs to its mpi4py, else the first in PATH."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if not mpirun:
        raise InputError("there is no mpirun: run make setup")
    return mpirun


def stop_processes(processes, patience=3.0):
    """End processes (Popen) and all that they have started: SIGTERM, which mpirun hands on to its ranks, then SIGKILL.

    patience: seconds that they have for each.
    """
    import psutil

    family = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            family += [parent, *parent.children(recursive=True)]
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=patience)
    for relative in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            relative.kill()
    psutil.wait_procs(alive, timeout=patience)
    for process in processes:
        process.wait()


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and a default learning rate that depends on the optimizer."""

    def __init__(self, script, doc):
        super().__init__(
            prog=f"{script}.py",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def parse_args(self, args=None, namespace=None):
        args = super().parse_args(args, namespace)
        if getattr(args, "lr", 0) is None:
            args.lr = 0.001 if args.optimizer == "adam" else 0.01
        return args


def number(kind, low, high, exclusive=False):
    """An argparse type: a finite number of that kind from low to high (`exclusive`: more than low, less than high)."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value < high if exclusive else low <= value <= high):
            bounds = (
                f"more than {low} and less than {high}" if exclusive else f"from {low} to {high}"
            )
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {word} {bounds}".replace(" to inf", " up")
            )
        return value

    return parse


def make_parser(script, doc, models=("cnn",), batch_size=32, epochs=10):
    """The options that all training scripts have in common."""
    parser = Parser(script, doc)
    add = parser.add_argument
    add("--model", choices=models, default=models[0], help="network (default: %(default)s)")
    add("--epochs", type=number(int, 1, 10**6), default=epochs, help="default: %(default)s")
    add(
        "--batch-size",
        type=number(int, 1, 10**6),
        default=batch_size,
        help="images per step (default: %(default)s)",
    )
    add(
        "--lr",
        type=number(float, 0, math.inf, exclusive=True),
        help="learning rate (default: 0.01, adam: 0.001)",
    )
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of sgd (default: %(default)s)")
    add("--weight-decay", type=number(float, 0, 1), default=0.0, help="default: %(default)s")
    add("--optimizer", choices=("sgd", "adam"), default="sgd", help="default: %(default)s")
    add("--data-dir", help="folder with CIFAR-10 (default: $CIFAR10_DIR, else ./data)")
    add(
        "--dataset",
        choices=("auto", "cifar10", "synthetic"),
        default="auto",
        help="auto: CIFAR-10 from --data-dir, else downloaded, else synthetic (default: %(default)s)",
    )
    add(
        "--subset",
        type=number(int, 1, 50_000),
        metavar="N",
        help="first N training and N/5 test images",
    )
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=42,
        help="of weights and data order (default: 42)",
    )
    add(
        "--save-metrics",
        metavar="FILE",
        default=f"results/{script}_metrics.npz",
        help="default: %(default)s",
    )
    add(
        "--log",
        metavar="FILE",
        default=f"results/{script}.csv",
        help="default: %(default)s; with a .json beside it",
    )
    add(
        "--checkpoint",
        metavar="FILE",
        help="save here at the end of each epoch and when interrupted",
    )
    add(
        "--checkpoint-every",
        type=number(float, 0, 10**9),
        default=60,
        metavar="SECONDS",
        help="save during an epoch too, this often (default: %(default)s)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from --checkpoint, exactly as if never interrupted",
    )
    add("--quiet", action="store_true", help="print errors and the last line only")
    return parser


def describe_error(error):
    """What an error that nobody catches prints: one line where memory ran out, else its traceback.

    NumPy and CuPy raise a MemoryError, PyTorch and CUDA a RuntimeError.
    """
    if isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "allocate memory")
    ):
        problem = " ".join(str(error).split()) or "not told how much was asked for"
        return f"error: the memory does not suffice: give a smaller --batch-size or --subset ({problem})"
    return "".join(traceback.format_exception(error)).rstrip()


def run_main(main):
    """Call main() and end the process with the exit status that the README promises."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(
                errors="backslashreplace"
            )  # a name must not end a run where it is printed
    sys.excepthook = lambda _, error, __: print(describe_error(error), file=sys.stderr)
    for name in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # SIGTERM like Ctrl-C, which a shell's background jobs ignore at first
        signal.signal(name, signal.default_int_handler)
    try:
        sys.exit(main())
    except (InputError, TrainingError, OSError) as error:
        print(
            "error:", " ".join(str(error).split()), file=sys.stderr
        )  # one line, also of a message with several
        sys.exit(2 if isinstance(error, InputError) else 1)
    except (Interrupted, KeyboardInterrupt) as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(130)
