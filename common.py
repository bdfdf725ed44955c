"""What the scripts share: data, layers, models, optimizers, run log, checkpoints, command line.

A copy of one script and this file is all that a copy of an experiment needs. Importing this file
loads NumPy and the standard library only, and has no side effects.

Contents, in this order (search for the name):

    Data             Dataset, load_dataset, make_synthetic, load_batch, augment
    Layers           Layer, Conv2D, ConvReLUPool, WinogradConv2D, BatchNorm2D, Dense, check_gradient
    Models           Model, make_cnn, make_resnet18, evaluate
    Optimizers       SGD, Adam, learning_rate
    Run log          RunLog, ResourceMonitor, Progress
    Checkpoints      Checkpoint, TorchCheckpoint, StopSignal
    Machine          available_cores, limit_blas_threads, environment
    MPI              collective, OverlapReducer, SharedMemoryReducer
    PyTorch          make_torch_resnet, make_torch_optimizer
    Command line     make_parser, run_main

Arrays are NHWC: images (N, H, W, C), convolution weights (KH, KW, C_in, C_out), dense weights
(in, out). `dx` means dL/dx. The loss is summed over a batch, and so are the gradients;
`optimizer.step(count)` divides once by the number of images. So any number of ranks, with shards
of any size, follows the serial run.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (what follows would fail without saying why)
    print(
        f"error: Python 3.10 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr
    )
    sys.exit(2)

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither
    print("error: Linux or macOS is needed; on Windows use WSL", file=sys.stderr)
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
import tarfile
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class OneLineError(Exception):
    """An error whose message says all: a notebook shows it as one line, without a traceback."""

    def _render_traceback_(self):  # IPython's hook
        return [f"error: {' '.join(str(self).split())}"]


class InputError(OneLineError):
    """The user's input cannot be used: one line that says what to do; exit status 2."""


class TrainingError(OneLineError):
    """The run failed after it had started: one line that says where; exit status 1."""


class Interrupted(OneLineError):  # noqa: N818 (not an error)
    """Ctrl-C or SIGTERM, raised between two batches; exit status 130."""


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------

# CIFAR-10's images, the names of its classes, and the mean and standard deviation of all pixels of
# the published training set: red, green, blue. Other data sets bring their own, in a Dataset.
IMAGE_SHAPE = (32, 32, 3)
CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
DOWNLOAD_TIMEOUT = 8  # seconds until a download that has not started is given up
FILE_RECORDS = 10_000  # images in a file of the binary layout
RECORD_BYTES = 1 + 3 * 32 * 32  # one image there: label, red, green, blue plane
PAD = 4  # pixels around an image that a random crop may reach

# Each use of a seed draws from a random stream of its own; the weights' stream is [seed] alone.
STREAM_ORDER = 1
STREAM_SYNTHETIC = 2
STREAM_AUGMENT = 3

_SYNTHETIC_BANNER = """\
********************************************************************************
*  SYNTHETIC DATA: these are NOT the CIFAR-10 images, and no result of this    *
*  run says anything about CIFAR-10.                                           *
********************************************************************************
   No CIFAR-10 in {data_dir}, and no download: {problem}.
   Give --data-dir or $CIFAR10_DIR a folder with cifar-10-batches-bin/ or cifar-10-batches-py/."""


class Dataset(NamedTuple):
    """Images, labels, and what networks, kernels and reports need to know of them."""

    x_train: np.ndarray  # (N, H, W, C) uint8
    y_train: np.ndarray  # (N,) uint8; uint16 where there are more than 256 classes
    x_test: np.ndarray
    y_test: np.ndarray
    name: str  # "cifar10", "synthetic", …; every log, table and plot shows it
    fingerprint: str  # SHA-256 of all images and labels, before --subset cuts them
    classes: tuple = CLASSES  # their names: label k is classes[k]
    mean: tuple = MEAN  # of all training pixels, one for each channel, on a scale from 0 to 1
    std: tuple = STD

    image_shape = property(lambda self: tuple(self.x_train.shape[1:]))  # (H, W, C)


def load_dataset(
    data_dir: str | None = None, dataset: str = "auto", subset: int | None = None, seed: int = 42
) -> Dataset:
    """Return the data set in a folder, or the synthetic stand-in for CIFAR-10, as uint8 arrays.

    data_dir: a folder with a prepared data set (dataset.json, as experiments/import_data.py makes
        it), or with CIFAR-10: `cifar-10-batches-bin/`, `cifar-10-batches-py/` or one of their
        archives, there or one level deeper. Default $CIFAR10_DIR, else ./data. What is found is
        memory-mapped; of CIFAR-10 a copy is kept beside it as .npy files.
    dataset: "auto" takes what is there, else downloads CIFAR-10, else, if no folder was named,
        falls back to the synthetic set with a banner on stderr; "cifar10" takes nothing else;
        "synthetic" is generated from `seed`.
    subset: the first N training and N // 5 test images (at least one), the proportion of CIFAR-10.

    Raises InputError for missing or damaged files and for a subset that the set does not have.
    """
    named = data_dir or os.environ.get("CIFAR10_DIR")
    folder = Path(expand_home(named or "data"))
    if dataset != "synthetic" and (folder / DATASET_FILE).exists():
        data = _open_prepared(folder)
        if dataset not in ("auto", data.name):
            raise InputError(f"{folder} holds {data.name}, not {dataset}: leave --dataset out")
    else:
        _check_subset(subset, 50_000)
        data = None
        if dataset != "synthetic":
            data = _load_cifar10(folder, dataset, is_named=bool(named))
        if data is None:
            source = {"synthetic": 2, "seed": seed, "subset": subset}
            arrays, fingerprint = _through_cache(
                folder, source, lambda: make_synthetic(subset or 50_000, seed)
            )
            data = Dataset(*arrays, "synthetic", fingerprint)

    _check_subset(subset, len(data.y_train))
    if subset is None:
        return data
    test_subset = max(subset // 5, 1)
    return data._replace(
        x_train=data.x_train[:subset],
        y_train=data.y_train[:subset],
        x_test=data.x_test[:test_subset],
        y_test=data.y_test[:test_subset],
    )


load_cifar10 = load_dataset  # its name in older copies of the scripts


def _check_subset(subset, most):
    if subset is not None and not 1 <= subset <= most:
        raise InputError(f"--subset {subset}: give a number of training images from 1 to {most}")


def label_type(classes) -> type:
    """The type of the labels of so many classes, a sequence."""
    return np.uint8 if len(classes) <= 256 else np.uint16


def dataset_option(name: str) -> str:
    """The --dataset with which another process finds the data set of this name again."""
    return name if name in ("cifar10", "synthetic") else "auto"


# -- a prepared data set: experiments/import_data.py makes it from whatever form people have


DATASET_FILE = "dataset.json"
ARRAY_NAMES = ("x_train", "y_train", "x_test", "y_test")  # each in a file of its own, .npy


def _open_prepared(folder):
    """The Dataset in a prepared folder; InputError if something in it does not fit together."""
    try:
        about = json.loads((folder / DATASET_FILE).read_text())
        x_train, y_train, x_test, y_test = _map_arrays(folder)
        data = Dataset(
            *(x_train, y_train, x_test, y_test),
            str(about["name"]),
            str(about["fingerprint"]),
            tuple(map(str, about["classes"])),
            tuple(map(float, about["mean"])),
            tuple(map(float, about["std"])),
        )
        for images, labels in ((x_train, y_train), (x_test, y_test)):
            if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype.kind != "u":
                raise ValueError("images are not (N, H, W, C) of uint8, or labels not unsigned")
            if labels.shape != images.shape[:1] or not len(labels):
                raise ValueError(f"{len(images)} images, but labels {labels.shape}")
            if labels.max() >= len(data.classes):
                raise ValueError(f"label {labels.max()}, but {len(data.classes)} classes")
        if x_test.shape[1:] != data.image_shape:
            raise ValueError(f"training images {data.image_shape}, test images {x_test.shape[1:]}")
        if not len(data.mean) == len(data.std) == data.image_shape[2] or min(data.std) <= 0:
            raise ValueError("mean and std are not one number for each channel")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: not a valid prepared data set ({error}): make it again with "
            "experiments/import_data.py"
        ) from None
    return data


# Other forms in which people have data sets, by a file or folder that they have in common.
_OTHER_FORMS = {
    "CIFAR-100": ("cifar-100-*",),
    "IDX files, as of MNIST": ("*-ubyte", "*-ubyte.gz"),
    "parquet files, as of Hugging Face": ("*.parquet",),
    "pictures with their labels in a table, as Kaggle has them": ("trainLabels.csv",),
    "arrays in an .npz file, as Keras keeps them": ("*.npz",),
    "folders of pictures": ("train", "training"),
}


def _other_form(path):
    """What lies in a folder that only experiments/import_data.py reads, or None."""
    for description, patterns in _OTHER_FORMS.items():
        for pattern in patterns:
            if path.is_file() and path.match(pattern):
                return description
            if any(match for depth in ("", "*/", "*/*/") for match in path.glob(depth + pattern)):
                return description
    return None


def describe_folder(folder: Path) -> str:
    """What lies there, in words, for error messages."""
    if not folder.is_dir():
        return "which is a file" if folder.exists() else "which does not exist"
    entries = sorted(
        entry for entry in folder.iterdir() if not entry.name.startswith((".", "npy-"))
    )
    names = [entry.name + "/" * entry.is_dir() for entry in entries]
    if not names:
        return "which is empty"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"which holds {', '.join(names[:8])}{more}"


# -- CIFAR-10 as it is published


def _load_cifar10(data_dir, dataset, is_named):
    """CIFAR-10 from the files in data_dir, downloaded if needed; None if synthetic images may do.

    is_named: somebody has named data_dir, so that other images than those in it would be wrong.
    """
    found = _find_batches(data_dir)
    problem = None
    if found is None:
        holds = describe_folder(data_dir)
        other = _other_form(data_dir) if is_named else None
        if other:
            raise InputError(
                f"{data_dir} holds {other}: prepare it once with python experiments/import_data.py "
                f"{data_dir} data/NAME, then give --data-dir data/NAME"
            )
        # A download into a folder that somebody keeps for something else would be a surprise.
        if is_named and dataset == "auto" and holds.startswith(("which holds", "which is a")):
            raise InputError(
                f"no data set in {data_dir}, {holds}: give --data-dir or $CIFAR10_DIR a folder "
                "with cifar-10-batches-bin/, cifar-10-batches-py/ or dataset.json, prepare what is "
                "there with experiments/import_data.py, or add --dataset cifar10 to download "
                "CIFAR-10 into it"
            )
        problem = _download(data_dir)
        found = _find_batches(data_dir)
    if found is None and dataset == "auto" and not is_named:
        banner = _SYNTHETIC_BANNER.format(data_dir=data_dir, problem=problem)
        print(banner, file=sys.stderr, flush=True)
        return None
    if found is None:
        raise InputError(
            f"no CIFAR-10 in {data_dir}, {holds}, and it cannot be downloaded ({problem}): put "
            "cifar-10-batches-bin/ or cifar-10-batches-py/ there, or use --dataset synthetic"
        )

    # A file that has changed has another size or time, and so another cache.
    path, read = found
    source = {}
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        if file.is_file():
            source[file.name] = [file.stat().st_size, file.stat().st_mtime_ns]
    cache_dir = data_dir.parent if data_dir.is_file() else data_dir
    arrays, fingerprint = _through_cache(cache_dir, source, lambda: read(path))
    return Dataset(*arrays, "cifar10", fingerprint)


def _find_batches(data_dir):
    """The folder or archive of CIFAR-10 and the function that reads it; None if there is none."""
    if data_dir.is_file():
        return (data_dir, _read_archive) if data_dir.match("cifar-10-*.tar*") else None
    if not data_dir.is_dir():
        return None
    deeper = sorted(path for path in data_dir.iterdir() if path.is_dir())
    readable = [path for path in deeper if os.access(path, os.R_OK | os.X_OK)]  # no lost+found
    for parent in (data_dir, *readable):
        for folder in (parent / "cifar-10-batches-bin", parent / "cifar-10-batches-py", parent):
            for suffix, read in ((".bin", _read_binary), ("", _read_python)):
                for name in ("data_batch_1", "data_batch_2", "test_batch"):
                    if (folder / (name + suffix)).exists():
                        return folder, read
        for archive in sorted(parent.glob("cifar-10-*.tar*")):
            return archive, _read_archive
    return None


def _read_archive(path):
    """Read CIFAR-10's archive, as downloaded: unpack its files for a moment, then read those."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    target = Path(temporary) / Path(folder).name
                    if member.isfile() and target.name.startswith("cifar-10-batches-"):
                        target.mkdir(exist_ok=True)
                        with tar.extractfile(member) as source, open(target / name, "wb") as file:
                            shutil.copyfileobj(source, file)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise InputError(f"{path}: cut short or damaged ({error}): download it again") from None
        found = _find_batches(Path(temporary))
        if found is None:
            raise InputError(f"{path}: no files of CIFAR-10 in it: download it again")
        folder, read = found
        return read(folder)


def _read_binary(folder):
    """Read the six files of the binary layout (https://www.cs.toronto.edu/~kriz/cifar.html)."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    images = []
    labels = []
    for path in [folder / name for name in names]:
        expected = RECORD_BYTES * FILE_RECORDS
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            found = "missing" if size is None else f"{size} bytes"
            raise InputError(
                f"{path}: {found}, CIFAR-10 has {expected} bytes there: fetch the file again"
            )
        records = np.fromfile(path, np.uint8).reshape(FILE_RECORDS, RECORD_BYTES)
        if records[:, 0].max() > 9:
            record = int(np.argmax(records[:, 0] > 9))
            raise InputError(
                f"{path}: label {records[record, 0]} in record {record}, labels end at 9: "
                "fetch the file again"
            )
        labels.append(records[:, 0])
        planes = records[:, 1:].reshape(-1, 3, 32, 32)
        images.append(planes.transpose(0, 2, 3, 1))  # NCHW → NHWC
    return np.concatenate(images[:5]), np.concatenate(labels[:5]), images[5], labels[5]


def _read_python(folder):
    """Read the pickled layout through torchvision, which first verifies the MD5 checksums."""
    try:
        datasets = import_torchvision().datasets
    except ImportError as error:
        raise InputError(
            f"{folder}: to read CIFAR-10's Python layout, install torchvision ({error}), or fetch "
            "the binary layout"
        ) from None
    expected_name = datasets.CIFAR10.base_folder
    if folder.name != expected_name:
        raise InputError(
            f"{folder}: rename it to {expected_name}, the name that torchvision expects"
        )
    try:
        train = datasets.CIFAR10(folder.parent, train=True, download=False)
        test = datasets.CIFAR10(folder.parent, train=False, download=False)
    except RuntimeError:
        raise InputError(
            f"{folder}: a file is missing or its checksum is wrong, so nothing in it was opened: "
            "delete the folder and fetch CIFAR-10 again"
        ) from None
    y_train = np.array(train.targets, np.uint8)
    y_test = np.array(test.targets, np.uint8)
    sizes = (len(train.data), len(y_train), len(test.data), len(y_test))
    if sizes != (50_000, 50_000, 10_000, 10_000):
        raise InputError(f"{folder}: not 50000 training and 10000 test images")
    return train.data, y_train, test.data, y_test


def _download(data_dir):
    """Download the Python layout into data_dir; return the problem in words, or None."""
    import http.client
    import urllib.request

    # Ask for the headers first, in a thread of its own: a name look-up takes no timeout.
    problem = [f"no answer within {DOWNLOAD_TIMEOUT} s"]

    def probe():
        request = urllib.request.Request(CIFAR10_URL, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT).close()
            problem[0] = None
        except (OSError, http.client.HTTPException) as error:
            problem[0] = str(getattr(error, "reason", error)).strip()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_TIMEOUT)
    if problem[0]:
        return problem[0]

    # torchvision downloads into a temporary folder: data_dir gets all of it or nothing.
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as temporary:
            name = import_torchvision().datasets.CIFAR10(temporary, download=True).base_folder
            (Path(temporary) / name).rename(data_dir / name)
        return None
    except ImportError as error:
        return f"that needs torchvision: {error}"
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        return f"it broke off: {error}"
    finally:
        socket.setdefaulttimeout(previous_timeout)


def _through_cache(data_dir, source, build):
    """Memory maps of the four arrays that build() makes, and their fingerprint.

    They are kept in data_dir, else in the user's cache folder, under a name made of `source`, a
    JSON-able description: where the source has changed, the cache is another one.
    """
    digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    name = f"npy-{digest[:16]}"
    folders = [data_dir / name]
    user_cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if os.path.isabs(user_cache):  # a user without a home folder has none
        folders.append(Path(user_cache) / "parallel-cnn" / name)

    for folder in folders:
        cached = _open_cache(folder)
        if cached is not None:
            return cached

    arrays = [np.ascontiguousarray(array) for array in build()]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array)
    fingerprint = digest.hexdigest()

    for folder in folders:
        with contextlib.suppress(OSError):  # a folder that cannot be written: try the next
            _write_cache(folder, arrays, {"fingerprint": fingerprint, "source": source})
        cached = _open_cache(folder)
        if cached is not None:
            return cached
    return arrays, fingerprint


def _map_arrays(folder):
    """The four arrays in a folder of .npy files, memory-mapped."""
    paths = [folder / f"{name}.npy" for name in ARRAY_NAMES]
    maps = [np.lib.format.open_memmap(path, mode="r") for path in paths]
    return [np.asarray(array) for array in maps]  # plain arrays index faster


def _open_cache(folder):
    """The memory-mapped arrays in a cache folder and their fingerprint; None if it is not whole."""
    try:
        arrays = _map_arrays(folder)
        fingerprint = json.loads((folder / "meta.json").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return arrays, fingerprint


def _write_cache(folder, arrays, meta):
    """Write a cache folder. It is complete or absent: it is made elsewhere and renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        for name, array in zip(ARRAY_NAMES, arrays, strict=True):
            np.save(new / f"{name}.npy", array)
        (new / "meta.json").write_text(json.dumps(meta))
        try:
            new.rename(folder)
        except OSError:  # another process was faster, or what is there is damaged
            if _open_cache(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)


def make_synthetic(n_train: int, seed: int = 42, n_test: int | None = None) -> tuple:
    """Ten classes of moving textures that a CNN learns well but not at once.

    An image is one of its class's three smooth patterns, shifted by up to seven pixels around the
    torus, plus a pattern that all classes share, in random contrast and with pixel noise. Images
    are drawn in blocks that depend on (seed, split, block) alone, so a smaller set is the beginning
    of a larger one. n_test: default n_train // 5, at least one.

    Returns x_train, y_train, x_test, y_test; images are (N, 32, 32, 3) uint8.
    """
    if n_test is None:
        n_test = max(n_train // 5, 1)
    rng = np.random.default_rng([seed, STREAM_SYNTHETIC])
    class_patterns = _smooth_patterns(rng, (10, 3))  # (10, 3, 32, 32, 3)
    shared_patterns = _smooth_patterns(rng, (16,))  # (16, 32, 32, 3)

    splits = []
    for split, n in ((1, n_train), (2, n_test)):
        images = np.empty((n, 32, 32, 3), np.uint8)
        labels = np.empty(n, np.uint8)
        for start in range(0, n, 1000):
            rng = np.random.default_rng([seed, STREAM_SYNTHETIC, split, start])
            x, y = _synthetic_block(rng, 1000, class_patterns, shared_patterns)
            images[start : start + 1000] = x[: n - start]
            labels[start : start + 1000] = y[: n - start]
        splits += [images, labels]
    return tuple(splits)


def _smooth_patterns(rng, shape):
    """Random patterns (*shape, 32, 32, 3) of the four lowest frequencies, with unit deviation."""
    coefficients = rng.standard_normal((*shape, 4, 4, 3)) + 1j * rng.standard_normal(
        (*shape, 4, 4, 3)
    )
    waves = np.exp(2j * np.pi * np.outer(np.arange(1, 5), np.arange(32)) / 32)  # (4, 32)
    patterns = np.einsum("...fgc,fh,gw->...hwc", coefficients, waves, waves).real
    return (patterns / patterns.std(axis=(-3, -2), keepdims=True)).astype(np.float32)


def _synthetic_block(rng, size, class_patterns, shared_patterns):
    """`size` images (size, 32, 32, 3), as float32 from 0 to 255, and their labels."""
    label = rng.integers(10, size=size)
    pattern = rng.integers(3, size=size)
    shared = rng.integers(16, size=size)

    def shifted(reach):  # (size, 32): the rows, or columns, of the torus from a random one on
        return (np.arange(32) + rng.integers(reach, size=(size, 1))) % 32

    def scale(low, high):
        return rng.uniform(low, high, (size, 1, 1, 1)).astype(np.float32)

    # Index arrays that broadcast to (size, 32, 32): one gather shifts each image by its own amount.
    rows = shifted(8)[:, :, None]
    columns = shifted(8)[:, None, :]
    shared_rows = shifted(32)[:, :, None]
    shared_columns = shifted(32)[:, None, :]
    pixels = class_patterns[label[:, None, None], pattern[:, None, None], rows, columns]
    pixels *= scale(0.5, 1)
    pixels += shared_patterns[shared[:, None, None], shared_rows, shared_columns]
    pixels += 0.75 * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(127 + scale(20, 40) * pixels, 0, 255), label


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n images in an epoch (from 1): the same whatever runs in parallel."""
    return np.random.default_rng([seed, STREAM_ORDER, epoch]).permutation(n)


@functools.lru_cache
def _normalization(dtype, width, mean, std):
    """scale and shift (W·C,) of a row of W pixels: pixel · scale - shift is normalised."""
    scale = np.tile(1 / (255 * np.array(std)), width)
    shift = np.tile(np.array(mean) / std, width)
    return scale.astype(dtype), shift.astype(dtype)


def load_batch(
    images: np.ndarray,
    labels: np.ndarray,
    index,
    dtype=np.float32,
    mean=MEAN,
    std=STD,
    aug_params: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, H, W, C) and labels (N,) at `index`, normalised per channel.

    mean, std: the data set's, one number for each channel. aug_params: those of all images, from
    draw_augmentation(); None for no augmentation.
    """
    h, w, c = images.shape[1:]
    if len(mean) != c:
        raise ValueError(
            f"load_batch: images of {c} channels, but a mean for {len(mean)}: give it the data "
            "set's, mean=data.mean, std=data.std"
        )
    scale, shift = _normalization(np.dtype(dtype), w, tuple(mean), tuple(std))
    batch = images[index]
    if aug_params is not None:
        batch = augment(batch, aug_params[index])
    rows = batch.reshape(-1, h, w * c)  # long rows make fast loops: W pixels of C channels
    x = np.multiply(rows, scale, dtype=dtype)
    x -= shift
    return x.reshape(-1, h, w, c), labels[index]


def draw_augmentation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Random crop and flip of n images as (n,) uint8: 81 flip + 9 dy + dx.

    A function of (seed, epoch, index) alone, whoever loads the image.
    """
    rng = np.random.default_rng([seed, STREAM_AUGMENT, epoch])
    return rng.integers(2 * 81, size=n, dtype=np.uint8)


def augment(images: np.ndarray, aug_params: np.ndarray) -> np.ndarray:
    """Crop images (N, H, W, C) at (dy, dx) from themselves padded with zeros, and flip some."""
    n, h, w, c = images.shape
    flip = aug_params // 81
    dy = aug_params // 9 % 9
    dx = aug_params % 9

    padded = np.zeros((n, h + 2 * PAD, w + 2 * PAD, c), images.dtype)
    padded[:, PAD:-PAD, PAD:-PAD] = images
    crops = np.lib.stride_tricks.sliding_window_view(padded, (h, w), axis=(1, 2))
    crops = crops.transpose(0, 1, 2, 4, 5, 3)  # (N, 9, 9, H, W, C), a view: nothing is copied yet
    out = crops[np.arange(n), dy, dx]
    flipped = np.flatnonzero(flip)
    out[flipped] = out[flipped, :, ::-1]
    return out


def import_torchvision():
    """Import torchvision, also beside a CPU-only build of torch.

    There the import stops at "operator torchvision::nms does not exist" (pytorch/vision #8985).
    Declaring the schemas of the missing operators is enough for models and data sets.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # the definitions last as long as this object
        for name in list(sys.modules):
            if name.partition(".")[0] == "torchvision":
                del sys.modules[name]  # half imported
        import torchvision
    return torchvision


# --------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------

# A convolution works through the batch in chunks whose arrays fit into a core's own cache.
CACHE_BYTES = 2048 * 1024


def aligned_zeros(shape: tuple, dtype) -> np.ndarray:
    """Zeros that begin on a cache line, where vector instructions are fastest."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def batch_chunks(n: int, bytes_per_image: int) -> list[slice]:
    """Slices that divide n images into chunks of about CACHE_BYTES, at least one image each."""
    step = max(1, CACHE_BYTES // bytes_per_image)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def he_normal(shape: tuple, rng=None, dtype=np.float32, std: float | None = None) -> np.ndarray:
    """Normal weights of variance 2 / fan_in: He et al., "Delving Deep into Rectifiers", 2015.

    rng: a NumPy Generator or a seed. std: another standard deviation. Drawn in float64, so that
    float32 and float64 start alike.
    """
    if std is None:
        fan_in = math.prod(shape[:-1])
        std = math.sqrt(2 / fan_in)
    return (np.random.default_rng(rng).standard_normal(shape) * std).astype(dtype)


def sum_rows(rows: np.ndarray) -> np.ndarray:
    """The sum (C,) of rows (n, C), as a product with ones, which BLAS does faster than np.sum."""
    return np.ones(len(rows), rows.dtype) @ rows


class Layer:
    """The protocol of all layers: out = forward(x), dx = backward(dout), params(), grads().

    A layer names its parameters in `param_names`; the gradient of `W` is `dW`, into which every
    backward() writes (self.dW[...] = …) the sum over the batch. Arrays that are kept but not
    trained (running statistics) are named in `buffer_names`. A layer made of layers, such as a
    residual block, overrides leaves() to yield them.

    What forward() and backward() return belongs to the layer: its next call overwrites it.
    """

    param_names: tuple = ()
    buffer_names: tuple = ()
    training = True  # False during evaluation
    requires_input_grad = True  # False in a model's first layer: nobody needs the images' gradient

    def leaves(self) -> Iterator["Layer"]:
        yield self

    def params(self) -> list[np.ndarray]:
        return [getattr(leaf, name) for leaf in self.leaves() for name in leaf.param_names]

    def grads(self) -> list[np.ndarray]:
        return [getattr(leaf, "d" + name) for leaf in self.leaves() for name in leaf.param_names]

    def buffers(self) -> list[np.ndarray]:
        return [getattr(leaf, name) for leaf in self.leaves() for name in leaf.buffer_names]

    def workspace(self, name: str, shape: tuple, dtype) -> np.ndarray:
        """An array, zero when new, that this layer keeps between calls.

        A step then allocates nothing. The first axis may shrink (a last, smaller batch) without a
        new array.
        """
        arrays = self.__dict__.setdefault("_workspaces", {})
        key = (name, shape[1:])
        kept = arrays.get(key)
        if kept is None or len(kept) < shape[0] or kept.dtype != dtype:
            kept = arrays[key] = aligned_zeros(shape, dtype)
        return kept[: shape[0]]


class Conv2D(Layer):
    """2-D convolution (cross-correlation, as is usual) by im2col in chunks that stay in the cache.

    W: (kernel_size, kernel_size, in_channels, out_channels), He-normal; b: (out_channels,), zero.

    Each window of the input becomes a row of a matrix, and the convolution one product with W:
    Chellapilla et al., "High Performance Convolutional Neural Networks for Document Processing",
    2006. The matrix is K² times as large as the images, so it is made for a few images at a time
    and never leaves the cache; backward() makes it again, which is cheaper than fetching it from
    memory. (That of a first layer is small, and kept.)
    """

    param_names = ("W", "b")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        *,
        bias: bool = True,
        rng=None,
        dtype=np.float32,
    ):
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.has_bias = bias
        if not bias:
            self.param_names = ("W",)
        self.W = he_normal((kernel_size, kernel_size, in_channels, out_channels), rng, dtype)
        self.b = np.zeros(out_channels, dtype)
        self.dW = np.zeros_like(self.W)
        self.db = np.zeros_like(self.b)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (N, H, W, C_in) → (N, OH, OW, C_out), OH = (H + 2 padding - kernel) // stride + 1."""
        self.x_shape = x.shape
        self.windows = self._windows(x)
        out = self.workspace("out", (*self.windows.shape[:3], self.b.size), x.dtype)
        for chunk in self._chunks():
            col = self._im2col(chunk)
            y = out[chunk].reshape(-1, self.b.size)
            np.matmul(col, self.W.reshape(-1, self.b.size), out=y)
            if self.has_bias:
                y += self.b
        return out

    def backward(self, dout: np.ndarray) -> np.ndarray | None:
        """dout (N, OH, OW, C_out) → dx (N, H, W, C_in); sets dW and db."""
        self._start_backward()
        dx = None
        if self.requires_input_grad:
            dx = self.workspace("dx", self.x_shape, dout.dtype)

        # out = col @ W + b, so dW = colᵀ @ dout, db = the sum of dout, and the gradient of col is
        # dout @ Wᵀ: _input_gradient() adds it up where windows overlap, one kernel position at a
        # time.
        for chunk in self._chunks():
            col = self._im2col(chunk, backward=True)
            dy = dout[chunk].reshape(-1, self.b.size)
            self._add_weight_gradient(col, dy)
            if self.has_bias:
                self.db += sum_rows(dy)
            if dx is not None:
                self._input_gradient(dout[chunk], dx[chunk])
        return dx

    def _check_channels(self, x):
        """Raise ValueError unless x (N, H, W, C) has as many channels as W takes."""
        if x.shape[-1] != self.W.shape[2]:
            raise ValueError(
                f"{type(self).__name__} takes {self.W.shape[2]} channels, its input has "
                f"{x.shape[-1]}: change in_channels"
            )

    def _windows(self, x):
        """All windows of x, (N, OH, OW, KH, KW, C_in): a view of the padded images, not a copy."""
        padded = self._pad(x)
        n, h, w, c = padded.shape
        k = self.kernel_size
        s = self.stride
        self._check_channels(x)
        if min(h, w) < k:
            raise ValueError(
                f"{type(self).__name__}: an input of {h}x{w} pixels, padding included, is smaller "
                f"than the kernel, {k}x{k}"
            )
        # A view with six axes: moving by one window is moving by `s` pixels, moving within a window
        # is moving by one. Windows overlap in memory, so nobody may write into this view.
        stride_n, stride_h, stride_w, stride_c = padded.strides
        shape = (n, (h - k) // s + 1, (w - k) // s + 1, k, k, c)
        strides = (stride_n, s * stride_h, s * stride_w, stride_h, stride_w, stride_c)
        return np.lib.stride_tricks.as_strided(padded, shape, strides)

    def _pad(self, x):
        p = self.padding
        if p == 0:
            return x
        n, h, w, c = x.shape
        # The workspace is zero when new, and nothing but the images is ever written into it.
        padded = self.workspace("padded", (n, h + 2 * p, w + 2 * p, c), x.dtype)
        padded[:, p : p + h, p : p + w] = x
        return padded

    def _chunks(self):
        """Slices of the batch whose im2col matrix and output fit into the cache."""
        *positions, kh, kw, c = self.windows.shape[1:]
        values = math.prod(positions) * (kh * kw * c + self.b.size)
        return batch_chunks(len(self.windows), values * self.windows.itemsize)

    def _im2col(self, chunk, backward=False):
        """The chunk's windows as the rows of a matrix, (n·OH·OW, KH·KW·C_in)."""
        windows = self.windows[chunk]
        window_size = math.prod(windows.shape[-3:])
        if window_size <= self.b.size:
            # No larger than the output (a first layer): kept, so that backward() finds it.
            col = self.workspace("kept col", self.windows.shape, windows.dtype)[chunk]
            if not backward:
                col[...] = windows
        else:
            col = self.workspace("col", windows.shape, windows.dtype)
            col[...] = windows
        return col.reshape(-1, window_size)

    def _start_backward(self):
        self.dW.fill(0)
        self.db.fill(0)
        if self.requires_input_grad:
            by_offset = self.W.reshape(-1, *self.W.shape[2:])  # (KH·KW, C_in, C_out)
            self._W_by_offset = by_offset.transpose(0, 2, 1).copy()  # (KH·KW, C_out, C_in)

    def _add_weight_gradient(self, col, dy):
        product = self.workspace("dW", (col.shape[1], dy.shape[1]), col.dtype)
        np.matmul(col.T, dy, out=product)
        self.dW += product.reshape(self.W.shape)

    def _input_gradient(self, dy, dx):
        """Set dx (n, H, W, C_in) of a chunk: for each offset within the kernel one matrix product
        with dy (n, OH, OW, C_out) and one addition shifted by the offset (col2im)."""
        n, oh, ow, c_out = dy.shape
        _, h, w, c_in = dx.shape
        k = self.kernel_size
        s = self.stride
        p = self.padding

        shape = (n, k * k * oh * ow * c_in)
        products = self.workspace("offsets", shape, dy.dtype).reshape(k * k, -1, c_in)
        np.matmul(dy.reshape(1, -1, c_out), self._W_by_offset, out=products)

        padded = self.workspace("dx padded", (n, h + 2 * p, w + 2 * p, c_in), dy.dtype)
        padded.fill(0)
        for offset, product in enumerate(products):
            i, j = divmod(offset, k)
            target = padded[:, i : i + s * oh : s, j : j + s * ow : s]
            target += product.reshape(n, oh, ow, c_in)
        dx[...] = padded[:, p : p + h, p : p + w]


class ReLU(Layer):
    """max(x, 0), element by element; NaN stays NaN."""

    def forward(self, x):
        self.out = self.workspace("out", x.shape, x.dtype)
        return np.maximum(x, 0, out=self.out)

    def backward(self, dout):
        dx = self.workspace("dx", dout.shape, dout.dtype)
        return np.multiply(dout, self.out > 0, out=dx)


class MaxPool2D(Layer):
    """Maximum over size×size windows, `stride` (default: size) apart.

    Rows and columns that do not fill a window are left out. The gradient goes to the first of equal
    maxima, row by row, as in PyTorch.
    """

    def __init__(self, size: int = 2, stride: int | None = None):
        self.size = size
        self.stride = stride or size

    def _offsets(self, x):
        """Views of x, (N, OH, OW, C) each: the input of all windows at one offset in the window."""
        _, h, w, _ = x.shape
        s = self.stride
        oh = (h - self.size) // s + 1
        ow = (w - self.size) // s + 1
        views = []
        for i in range(self.size):
            for j in range(self.size):
                views.append(x[:, i : i + s * (oh - 1) + 1 : s, j : j + s * (ow - 1) + 1 : s])
        return views

    def forward(self, x):
        self.x = x
        first, *others = self._offsets(x)
        self.out = self.workspace("out", first.shape, x.dtype)
        self.out[...] = first
        for other in others:
            np.maximum(self.out, other, out=self.out)
        return self.out

    def backward(self, dout):
        dx = self.workspace("dx", self.x.shape, dout.dtype)
        dx.fill(0)
        is_open = np.ones(dout.shape, bool)  # windows whose maximum has not been found yet
        for x, dx_at_offset in zip(self._offsets(self.x), self._offsets(dx), strict=True):
            is_max = is_open & (x == self.out)
            dx_at_offset += dout * is_max
            is_open &= ~is_max
        return dx


# Convolution, bias, ReLU and 2×2 pooling in one pass. The convolution delivers its output as four
# planes, one for each position within the pooling windows:
#
#     y0 y1        y0 is the upper left value of every window, y3 the lower right. Each step then
#     y2 y3        runs over long contiguous rows instead of picking pairs of neighbours.
#
# max(ReLU(y + b)) = ReLU(max(y) + b), so bias and ReLU work on a quarter of the values, and
# backward() needs to know no more of y than which of the four was the maximum.


def relu_pool_forward(layer: Layer, planes, out: np.ndarray, argmax: np.ndarray):
    """out = ReLU(max(y0, y1, y2, y3) + b), all of one shape that ends in C.

    argmax: three booleans for each output, kept for the backward pass in training: y0 ≥ y1, y2 ≥
    y3, and max(y0, y1) ≥ max(y2, y3).
    """
    y0, y1, y2, y3 = planes
    upper = layer.workspace("upper", y0.shape, y0.dtype)
    lower = layer.workspace("lower", y0.shape, y0.dtype)
    np.maximum(y0, y1, out=upper)
    np.maximum(y2, y3, out=lower)
    if layer.training:
        np.greater_equal(y0, y1, out=argmax[0])
        np.greater_equal(y2, y3, out=argmax[1])
        np.greater_equal(upper, lower, out=argmax[2])
    np.maximum(upper, lower, out=upper)
    upper += layer.b
    np.maximum(upper, 0, out=out)


def relu_pool_backward(layer: Layer, dout, out, argmax, planes):
    """Write the gradient of y0 … y3 into `planes` and add the bias gradient to layer.db."""
    y0, y1, y2, y3 = planes
    lower = layer.workspace("upper", out.shape, dout.dtype)
    upper = layer.workspace("lower", out.shape, dout.dtype)
    np.multiply(dout, out > 0, out=lower)  # the gradient before ReLU, for now of all windows
    layer.db += sum_rows(lower.reshape(-1, layer.b.size))
    np.multiply(lower, argmax[2], out=upper)  # where the maximum is in the upper row
    lower -= upper  # where it is in the lower row
    np.multiply(upper, argmax[0], out=y0)
    np.subtract(upper, y0, out=y1)
    np.multiply(lower, argmax[1], out=y2)
    np.subtract(lower, y2, out=y3)


class ConvReLUPool(Conv2D):
    """Conv2D, ReLU and MaxPool2D(2) fused: the same function, one pass over each chunk.

    What leaves the cache is the pooled output, a quarter of the convolution's.
    """

    def forward(self, x):
        """x (N, H, W, C_in) → (N, OH // 2, OW // 2, C_out)"""
        self.x_shape = x.shape
        self.windows = self._windows(x)
        n, _, _, oh, ow = self.windows.shape[:5]
        channels = self.b.size
        self.out = self.workspace("out", (n, oh, ow, channels), x.dtype)
        for chunk in self._chunks():
            y = self.workspace("y", (len(self.out[chunk]), 4, oh, ow, channels), x.dtype)
            col = self._im2col(chunk)
            np.matmul(col, self.W.reshape(-1, channels), out=y.reshape(-1, channels))
            planes = y.swapaxes(0, 1)  # (4, n, OH/2, OW/2, C_out)
            relu_pool_forward(self, planes, self.out[chunk], self._argmax(chunk))
        return self.out

    def backward(self, dout):
        """dout (N, OH // 2, OW // 2, C_out) → dx (N, H, W, C_in); sets dW and db."""
        self._start_backward()
        dx = None
        if self.requires_input_grad:
            dx = self.workspace("dx", self.x_shape, dout.dtype)
        _, oh, ow, channels = dout.shape
        for chunk in self._chunks():
            dy = self.workspace("y", (len(dout[chunk]), 4, oh, ow, channels), dout.dtype)
            planes = dy.swapaxes(0, 1)
            relu_pool_backward(self, dout[chunk], self.out[chunk], self._argmax(chunk), planes)
            col = self._im2col(chunk, backward=True)
            self._add_weight_gradient(col, dy.reshape(-1, channels))
            if dx is not None:
                self._input_gradient(self._planes_to_image(dy), dx[chunk])
        return dx

    def _windows(self, x):
        """All windows, (N, 2, 2, OH/2, OW/2, KH, KW, C_in): the place in the pool comes first."""
        windows = super()._windows(x)
        n, oh, ow, *window = windows.shape
        windows = windows[:, : oh // 2 * 2, : ow // 2 * 2]
        windows = windows.reshape(n, oh // 2, 2, ow // 2, 2, *window)
        return windows.transpose(0, 2, 4, 1, 3, 5, 6, 7)  # still a view

    def _argmax(self, chunk):
        """relu_pool_forward's booleans (3, n, OH/2, OW/2, C_out) for a chunk of the batch."""
        n, *shape = self.out.shape
        kept = self.workspace("argmax", (n, 3 * math.prod(shape)), bool)[chunk]
        return kept.reshape(3, len(kept), *shape)

    def _planes_to_image(self, dy):
        """(n, 4, OH/2, OW/2, C) → (n, OH, OW, C). Odd sizes leave the last row or column zero."""
        n, _, half_h, half_w, channels = dy.shape
        margin = 2 * self.padding - self.kernel_size
        oh = (self.x_shape[1] + margin) // self.stride + 1
        ow = (self.x_shape[2] + margin) // self.stride + 1
        image = self.workspace("dy", (n, oh, ow, channels), dy.dtype)  # zero when new
        pools = image[:, : 2 * half_h, : 2 * half_w].reshape(n, half_h, 2, half_w, 2, channels)
        planes = dy.reshape(n, 2, 2, half_h, half_w, channels)
        pools[...] = planes.transpose(0, 3, 1, 4, 2, 5)
        return image


def winograd_matrices(points: tuple, r: int):
    """Aᵀ (m, n), G (n, r) and Bᵀ (n, n) of Winograd's F(m, r), n = m + r - 1.

    y = Aᵀ [(G g) ⊙ (Bᵀ d)] is the correlation of n inputs d with r weights g: Toom and Cook's
    multiplication of polynomials, which evaluates both at n - 1 points and infinity, transposed.
    """
    m = len(points) + 2 - r
    powers = np.vander(points, max(m, r), increasing=True)  # (n - 1, ·)
    infinity_m = np.eye(m)[-1]
    infinity_r = np.eye(r)[-1]
    AT = np.vstack([powers[:, :m], infinity_m]).T

    G_rows = []
    BT_rows = []
    for i, p in enumerate(points):
        others = [q for q in points if q != p]
        G_rows.append(powers[i, :r] / math.prod(p - q for q in others))
        BT_rows.append(np.append(np.poly(others)[::-1], 0))  # np.poly: coefficients from the roots
    G = np.vstack([*G_rows, infinity_r])
    BT = np.vstack([*BT_rows, np.poly(points)[::-1]])
    return AT, G, BT


# F(4, 3). The usual points 0, ±1, ±2 would have twice the rounding error (Barabasz et al., "Error
# Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2018).
WINOGRAD_POINTS = (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)
WINOGRAD_AT, WINOGRAD_G, WINOGRAD_BT = winograd_matrices(WINOGRAD_POINTS, 3)


@functools.lru_cache
def _winograd_kron(dtype):
    """A2 (16, 36), G2 (36, 9), B2 (36, 36): the transforms of flattened tiles, as matrices.

    vec(Bᵀ d B) = (Bᵀ ⊗ Bᵀ) vec(d), so that BLAS transforms many tiles at once.
    """
    matrices = (WINOGRAD_AT, WINOGRAD_G, WINOGRAD_BT)
    return tuple(np.kron(matrix, matrix).astype(dtype) for matrix in matrices)


class WinogradConv2D(Conv2D):
    """Conv2D by Winograd's minimal filtering F(4×4, 3×3): a quarter of the multiplications.

    Kernel 3, stride 1, padding 1; H and W must be multiples of 4. Lavin and Gray, "Fast Algorithms
    for Convolutional Neural Networks", 2016. For each 4×4 tile of the output:

        d (6, 6)   the input tile, overlapping its neighbours by two rows and columns
        V = Bᵀ d B     (6, 6)                    U = G w Gᵀ (6, 6), the transformed kernel
        M = U ⊙ V      (6, 6): 36 multiplications instead of 16 · 9 = 144
        y = Aᵀ M A     (4, 4) the output tile

    With channels, ⊙ becomes 36 matrix products, one for each place in the tile, over all tiles.
    backward() is all of this transposed: dM = A dy Aᵀ; for each of the 36 places dU += Vᵀ dM and
    dV = dM Uᵀ; dd = B dV Bᵀ, added up where tiles overlap; at the end dw = Gᵀ dU G. In float32 the
    error is 6e-7 of the output's deviation, root mean square, where im2col has 2e-7.
    """

    COLUMNS = 512  # in one product of a transform: OpenBLAS is faster below 10⁶ multiplications

    def __init__(self, in_channels, out_channels, *, bias=True, rng=None, dtype=np.float32):
        super().__init__(in_channels, out_channels, bias=bias, rng=rng, dtype=dtype)

    def forward(self, x):
        self._start_forward(x)
        out = self.workspace("out", (*x.shape[:3], self.b.size), x.dtype)
        for chunk in self._chunks():
            y = self._output_tiles(len(out[chunk]), x.dtype)
            self._filter(chunk, y)
            image_to_tiles(out[chunk], 4)[...] = y
            if self.has_bias:
                out[chunk] += self.b
        return out

    def backward(self, dout):
        """dout (N, H, W, C_out) → dx (N, H, W, C_in); sets dW and db."""
        self._start_backward()
        dx = self.workspace("dx", self.x_shape, dout.dtype) if self.requires_input_grad else None
        for chunk in self._chunks():
            dy = self._output_tiles(len(dout[chunk]), dout.dtype)
            dy[...] = image_to_tiles(dout[chunk], 4)
            if self.has_bias:
                self.db += sum_rows(dout[chunk].reshape(-1, self.b.size))
            self._filter_backward(chunk, dy, None if dx is None else dx[chunk])
        self._finish_backward()
        return dx

    def _start_forward(self, x):
        """U (36, C_in, C_out), a view of all input tiles, and V, which backward() needs again."""
        self._check_channels(x)
        n, h, w, c = x.shape
        if h % 4 or w % 4:
            name = type(self).__name__
            raise ValueError(
                f"{name} takes images of 4n x 4m pixels, not {h}x{w}: use ConvReLUPool or Conv2D"
            )
        self.x_shape = x.shape
        _, G2, _ = _winograd_kron(x.dtype)
        self.U = (G2 @ self.W.reshape(9, -1)).reshape(36, *self.W.shape[2:])

        # 6×6 tiles of the padded images, 4 apart: (N, 6, 6, H/4, W/4, C), a view
        padded = self._pad(x)
        stride_n, stride_h, stride_w, stride_c = padded.strides
        shape = (n, 6, 6, h // 4, w // 4, c)
        strides = (stride_n, stride_h, stride_w, 4 * stride_h, 4 * stride_w, stride_c)
        self.tiles = np.lib.stride_tricks.as_strided(padded, shape, strides)
        self.V = self.workspace("V", (n, 36 * (h // 4) * (w // 4) * c), x.dtype)

    def _chunks(self):
        n, _, _, tiles_h, tiles_w, c = self.tiles.shape
        values = tiles_h * tiles_w * (36 * c + (36 + 16) * self.b.size)
        return batch_chunks(n, values * self.V.itemsize)

    def _output_tiles(self, n, dtype):
        """Room for y or dy of n images: (4, 4, n, H/4, W/4, C_out)."""
        tiles_h, tiles_w = self.tiles.shape[3:5]
        y = self.workspace("y", (n, 16 * tiles_h * tiles_w * self.b.size), dtype)
        return y.reshape(4, 4, n, tiles_h, tiles_w, self.b.size)

    def _filter(self, chunk, y):
        """y (4, 4, n, H/4, W/4, C_out) = the convolution of a chunk of the batch; keeps its V."""
        A2, _, B2 = _winograd_kron(y.dtype)
        tiles = self.tiles[chunk]
        c_in = self.W.shape[2]
        V = self.V[chunk].reshape(36, -1, c_in)  # (36, tiles, C_in)

        d = self.workspace("tiles", (len(tiles), tiles[0].size), y.dtype)
        d.reshape(6, 6, len(tiles), *tiles.shape[3:])[...] = tiles.transpose(1, 2, 0, 3, 4, 5)
        self._transform(B2, d, V)
        M = self._products(chunk)
        np.matmul(V, self.U, out=M)  # (36, tiles, C_in) @ (36, C_in, C_out)
        self._transform(A2, M, y)

    def _filter_backward(self, chunk, dy, dx):
        """From dy, shaped as _filter's y, add to dU and set dx (n, H, W, C_in), unless None."""
        A2, _, B2 = _winograd_kron(dy.dtype)
        c_in = self.W.shape[2]
        V = self.V[chunk].reshape(36, -1, c_in)
        dM = self._products(chunk)
        self._transform(A2.T, dy, dM)
        product = self.workspace("dU product", self.U.shape, dy.dtype)
        self._dU += np.matmul(V.transpose(0, 2, 1), dM, out=product)
        if dx is not None:
            shape = self.V[chunk].shape
            dV = self.workspace("dV", shape, dy.dtype)
            d = self.workspace("tiles", shape, dy.dtype)
            np.matmul(dM, self.U.transpose(0, 2, 1), out=dV.reshape(36, -1, c_in))
            self._transform(B2.T, dV, d)
            self._add_tiles(d, dx)

    def _products(self, chunk):
        """Room for M or dM of a chunk: (36, tiles, C_out)."""
        c_in, c_out = self.W.shape[2:]
        n, values = self.V[chunk].shape
        M = self.workspace("M", (n, values // c_in * c_out), self.V.dtype)
        return M.reshape(36, -1, c_out)

    def _transform(self, matrix, a, out):
        """out = matrix @ a, both cut into as many rows as the matrix has columns, and rows."""
        a = a.reshape(matrix.shape[1], -1)
        out = out.reshape(matrix.shape[0], -1)
        for start in range(0, a.shape[1], self.COLUMNS):
            columns = slice(start, start + self.COLUMNS)
            np.matmul(matrix, a[:, columns], out=out[:, columns])

    def _add_tiles(self, d, dx):
        """dx = the sum of the overlapping 6×6 tiles d."""
        n, h, w, c = dx.shape
        padded = self.workspace("dx padded", (n, h + 2, w + 2, c), d.dtype)
        padded.fill(0)
        for place, tile in enumerate(d.reshape(36, n, h // 4, w // 4, c)):
            i, j = divmod(place, 6)
            padded[:, i : i + h : 4, j : j + w : 4] += tile
        dx[...] = padded[:, 1:-1, 1:-1]

    def _start_backward(self):
        self.db.fill(0)
        self._dU = self.workspace("dU", self.U.shape, self.U.dtype)
        self._dU.fill(0)

    def _finish_backward(self):
        _, G2, _ = _winograd_kron(self.U.dtype)
        self.dW[...] = (G2.T @ self._dU.reshape(36, -1)).reshape(self.W.shape)


def image_to_tiles(image: np.ndarray, size: int) -> np.ndarray:
    """A view of images (n, H, W, C) as (size, size, n, H/size, W/size, C): tile by tile."""
    n, h, w, c = image.shape
    tiles = image.reshape(n, h // size, size, w // size, size, c)
    return tiles.transpose(2, 4, 0, 1, 3, 5)


class WinogradReLUPool(WinogradConv2D):
    """WinogradConv2D, ReLU and MaxPool2D(2) fused: a 4×4 tile of the output holds 2×2 windows."""

    def __init__(self, in_channels, out_channels, *, rng=None, dtype=np.float32):
        super().__init__(in_channels, out_channels, rng=rng, dtype=dtype)

    def forward(self, x):
        """x (N, H, W, C_in) → (N, H // 2, W // 2, C_out)"""
        self._start_forward(x)
        n, h, w, _ = x.shape
        self.out = self.workspace("out", (n, h // 2, w // 2, self.b.size), x.dtype)
        for chunk in self._chunks():
            y = self._output_tiles(len(self.out[chunk]), x.dtype)
            self._filter(chunk, y)
            out = image_to_tiles(self.out[chunk], 2)  # (2, 2, n, H/4, W/4, C_out), a view
            relu_pool_forward(self, self._planes(y), out, self._argmax(chunk, out.shape))
        return self.out

    def backward(self, dout):
        """dout (N, H // 2, W // 2, C_out) → dx (N, H, W, C_in); sets dW and db."""
        self._start_backward()
        dx = self.workspace("dx", self.x_shape, dout.dtype) if self.requires_input_grad else None
        for chunk in self._chunks():
            dy = self._output_tiles(len(dout[chunk]), dout.dtype)
            d = image_to_tiles(dout[chunk], 2)
            out = image_to_tiles(self.out[chunk], 2)
            argmax = self._argmax(chunk, out.shape)
            relu_pool_backward(self, d, out, argmax, self._planes(dy))
            self._filter_backward(chunk, dy, None if dx is None else dx[chunk])
        self._finish_backward()
        return dx

    def _planes(self, y):
        """y (4, 4, …) as relu_pool_forward's four planes, each (2, 2, …): window, then tile."""
        pools = y.reshape(2, 2, 2, 2, *y.shape[2:])  # row of windows, row in it, column, column
        return [pools[:, i, :, j] for i in (0, 1) for j in (0, 1)]

    def _argmax(self, chunk, shape):
        values = math.prod(self.out.shape[1:])
        kept = self.workspace("argmax", (len(self.out), 3 * values), bool)[chunk]
        return kept.reshape(3, *shape)


class BatchNorm2D(Layer):
    """Normalises each channel over batch and positions.

    Ioffe and Szegedy, "Batch Normalization", 2015.

    gamma, beta: (channels,). In training, mean and variance of the batch; otherwise the running
    ones, which move towards the batch's by `momentum` (the variance with n - 1 in the denominator,
    as in PyTorch).

    gather(array): the arrays of all ranks that share the batch, stacked. The statistics are then
    those of the global batch, and backward() is exact for it; dgamma and dbeta stay this rank's
    share.
    """

    param_names = ("gamma", "beta")
    buffer_names = ("running_mean", "running_var")
    gather = staticmethod(lambda array: array[None])  # one rank: itself

    def __init__(self, channels: int, eps=1e-5, momentum=0.1, *, dtype=np.float32):
        self.eps = eps
        self.momentum = momentum
        self.gamma = np.ones(channels, dtype)
        self.beta = np.zeros(channels, dtype)
        self.dgamma = np.zeros_like(self.gamma)
        self.dbeta = np.zeros_like(self.beta)
        self.running_mean = np.zeros(channels, dtype)
        self.running_var = np.ones(channels, dtype)

    def forward(self, x):
        """x (N, H, W, C) → the same shape."""
        if self.training:
            mean, var = self._batch_statistics(x)
        else:
            mean = self.running_mean
            var = self.running_var
        self.inv_std = 1 / np.sqrt(var + self.eps)
        return self._normalize(x, mean)

    def backward(self, dout):
        """dout (N, H, W, C) → dx; sets dgamma and dbeta. After a forward pass in training mode."""
        self.dgamma[...], self.dbeta[...] = self._param_gradients(dout)
        gathered = self.gather(np.stack([self.dgamma, self.dbeta]))  # (ranks, 2, C)
        dgamma, dbeta = gathered.sum(axis=0)
        return self._input_gradient(dout, dgamma / self.count, dbeta / self.count)

    def _batch_statistics(self, x):
        """Mean and variance (C,) of the global batch; moves the running ones."""
        channels = x.shape[3]
        count, mean, squares = self._moments(x)
        own = np.concatenate([np.full(1, count, x.dtype), mean, squares])
        gathered = self.gather(own)  # (ranks, 1 + 2 C)
        counts = gathered[:, :1]
        means = gathered[:, 1 : 1 + channels]
        squares = gathered[:, 1 + channels :]

        # The moments of a union of samples: Chan et al., "Updating Formulae and a Pairwise
        # Algorithm for Computing Sample Variances", 1979.
        self.count = counts.sum()
        mean = (counts * means).sum(axis=0) / self.count
        squares = (squares + counts * np.square(means - mean)).sum(axis=0)

        self.running_mean += self.momentum * (mean - self.running_mean)
        unbiased = squares / (self.count - 1)
        self.running_var += self.momentum * (unbiased - self.running_var)
        return mean, squares / self.count

    # The four passes over the images, which a subclass may do faster.

    def _moments(self, x):
        """This rank's values per channel, their mean and sum of squared deviations from it (C,)."""
        rows = x.reshape(-1, x.shape[3])
        mean = sum_rows(rows) / max(len(rows), 1)
        centred = self.workspace("x_hat", x.shape, x.dtype).reshape(rows.shape)
        np.subtract(rows, mean, out=centred)
        np.square(centred, out=centred)
        return len(rows), mean, sum_rows(centred)

    def _normalize(self, x, mean):
        self.x_hat = self.workspace("x_hat", x.shape, x.dtype)
        np.subtract(x, mean, out=self.x_hat)
        self.x_hat *= self.inv_std
        out = self.workspace("out", x.shape, x.dtype)
        np.multiply(self.x_hat, self.gamma, out=out)
        out += self.beta
        return out

    def _param_gradients(self, dout):
        """dgamma and dbeta (C,) of this rank's images."""
        product = self.workspace("dx", dout.shape, dout.dtype)
        np.multiply(dout, self.x_hat, out=product)
        channels = dout.shape[3]
        return sum_rows(product.reshape(-1, channels)), sum_rows(dout.reshape(-1, channels))

    def _input_gradient(self, dout, mean_dgamma, mean_dbeta):
        """dx = gamma · inv_std · (dout - mean dbeta - x_hat · mean dgamma)"""
        dx = self.workspace("dx", dout.shape, dout.dtype)
        np.multiply(self.x_hat, -mean_dgamma, out=dx)
        dx += dout
        dx -= mean_dbeta
        dx *= self.gamma * self.inv_std
        return dx


class GlobalAvgPool(Layer):
    """The mean over all positions: (N, H, W, C) → (N, C)."""

    def forward(self, x):
        self.x_shape = x.shape
        return x.mean(axis=(1, 2))

    def backward(self, dout):
        _, h, w, _ = self.x_shape
        dx = self.workspace("dx", self.x_shape, dout.dtype)
        dx[...] = (dout / (h * w))[:, None, None]
        return dx


class BasicBlock(Layer):
    """ReLU(BN(conv3×3(ReLU(BN(conv3×3(x))))) + shortcut(x)).

    He et al., "Deep Residual Learning for Image Recognition", 2015, figure 2. The first convolution
    has the stride; the shortcut is x, or BN(conv1×1(x)) where stride or channels change.
    conv: the class of the 3×3 convolutions with stride 1; other_conv: of the others; norm: the
    class of the normalisations.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        conv=None,
        other_conv=Conv2D,
        norm=BatchNorm2D,
        rng=None,
        dtype=np.float32,
    ):
        conv = conv or WinogradConv2D
        options = {"bias": False, "rng": np.random.default_rng(rng), "dtype": dtype}
        if stride == 1:
            first = conv(in_channels, out_channels, **options)
        else:
            first = other_conv(in_channels, out_channels, stride=stride, **options)
        self.branch = [
            first,
            norm(out_channels, dtype=dtype),
            ReLU(),
            conv(out_channels, out_channels, **options),
            norm(out_channels, dtype=dtype),
        ]
        self.shortcut = []
        if stride != 1 or in_channels != out_channels:
            self.shortcut = [
                other_conv(in_channels, out_channels, 1, stride, 0, **options),
                norm(out_channels, dtype=dtype),
            ]
        self.relu = ReLU()

    def leaves(self):
        for layer in (*self.branch, *self.shortcut):
            yield from layer.leaves()

    def forward(self, x):
        y = x
        for layer in self.branch:
            y = layer.forward(y)
        shortcut = x
        for layer in self.shortcut:
            shortcut = layer.forward(shortcut)
        y += shortcut
        return self.relu.forward(y)

    def backward(self, dout):
        dsum = self.relu.backward(dout)
        dx = dsum
        for layer in reversed(self.branch):
            dx = layer.backward(dx)
        dshortcut = dsum
        for layer in reversed(self.shortcut):
            dshortcut = layer.backward(dshortcut)
        dx += dshortcut
        return dx


class Flatten(Layer):
    """(N, H, W, C) → (N, H·W·C)"""

    def forward(self, x):
        self.x_shape = x.shape
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dout):
        return dout.reshape(self.x_shape)


class Dense(Layer):
    """x @ W + b. W: (in_features, out_features), normal; b: (out_features,), zero.

    std: the standard deviation of W; default He et al.'s.
    """

    param_names = ("W", "b")

    def __init__(
        self, in_features: int, out_features: int, *, std=None, rng=None, dtype=np.float32
    ):
        self.W = he_normal((in_features, out_features), rng, dtype, std)
        self.b = np.zeros(out_features, dtype)
        self.dW = np.zeros_like(self.W)
        self.db = np.zeros_like(self.b)

    def forward(self, x):
        """x (N, in_features) → (N, out_features)"""
        self._check_features(x)
        self.x = x
        out = self.workspace("out", (len(x), self.b.size), x.dtype)
        np.matmul(x, self.W, out=out)
        out += self.b
        return out

    def _check_features(self, x):
        """Raise ValueError unless x is (N, in_features)."""
        if x.ndim != 2 or x.shape[1] != len(self.W):
            raise ValueError(
                f"{type(self).__name__}({len(self.W)}, {self.b.size}) takes an input of "
                f"(N, {len(self.W)}), not of (N, {', '.join(map(str, x.shape[1:]))}): change "
                "in_features, or add a Flatten"
            )

    def backward(self, dout):
        """dout (N, out_features) → dx (N, in_features); sets dW and db."""
        np.matmul(self.x.T, dout, out=self.dW)
        dout.sum(axis=0, out=self.db)
        if not self.requires_input_grad:
            return None
        dx = self.workspace("dx", self.x.shape, dout.dtype)
        dx[...] = (self.W @ dout.T).T  # BLAS is much faster with the long dimension first
        return dx


def softmax_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """logits (N, K), integer labels (N,) → the loss summed over the batch, and dlogits (N, K).

    Of one image with logits z the loss is log Σ exp(z) - z[label], and its gradient is softmax(z),
    less 1 at the label. Nothing is divided by N: the optimizer does that.
    """
    n, classes = logits.shape
    if n and int(labels.max()) >= classes:
        raise ValueError(
            f"softmax_cross_entropy: label {labels.max()}, but the logits are of {classes} "
            f"classes, 0 to {classes - 1}: change the labels or the last Dense layer"
        )
    rows = np.arange(n)
    # The same softmax, and exp cannot overflow:
    shifted = logits - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted)
    sums = probabilities.sum(axis=1, keepdims=True)
    loss = np.log(sums).sum(dtype=np.float64) - shifted[rows, labels].sum(dtype=np.float64)

    dlogits = probabilities
    dlogits /= sums
    dlogits[rows, labels] -= 1
    return float(loss), dlogits


def count_correct(logits: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """logits (N, K), labels (N,) → how many labels are the largest logit, and in the top 5."""
    top1 = (logits.argmax(axis=1) == labels).sum()
    own = logits[np.arange(len(labels)), labels][:, None]
    top5 = ((logits > own).sum(axis=1) < 5).sum()
    return int(top1), int(top5)


def check_gradient(layer: Layer, x: np.ndarray, tolerance: float = 1e-6) -> float:
    """Compare a layer's backward() with central differences, entry by entry, in float64.

    The derivative is that of sum(forward(x) * R) for a random R. Make the layer with
    dtype=np.float64 and x small: every entry takes two forward passes. Returns the largest error,
    relative to the largest entry of its array. Raises ValueError that names the worst entry if the
    error is above the tolerance.
    """
    eps = 1e-6
    R = np.random.default_rng(0).standard_normal(layer.forward(x).shape)
    checked = [("dx", x, np.array(layer.backward(R)))]
    for leaf in layer.leaves():
        for name in leaf.param_names:
            gradient = np.array(getattr(leaf, "d" + name))
            checked.append((f"{type(leaf).__name__}.d{name}", getattr(leaf, name), gradient))

    largest = 0.0
    for name, array, gradient in checked:
        expected = np.empty_like(array)
        for place in np.ndindex(array.shape):
            value = array[place]
            array[place] = value + eps
            above = (layer.forward(x) * R).sum()
            array[place] = value - eps
            below = (layer.forward(x) * R).sum()
            array[place] = value
            expected[place] = (above - below) / (2 * eps)
        error = abs(gradient - expected) / max(abs(expected).max(), 1e-3)
        worst = np.unravel_index(error.argmax(), error.shape)
        if not error[worst] <= tolerance:  # NaN fails too
            raise ValueError(
                f"{type(layer).__name__}: {name}[{', '.join(map(str, worst))}] is "
                f"{gradient[worst]:.6g}, central differences give {expected[worst]:.6g}"
            )
        largest = max(largest, float(error[worst]))
    return largest


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------

MODELS = ("cnn", "resnet18")

# Standard deviation of the last layer's weights. All logits then start near zero, and the loss near
# that of guessing, ln 10 = 2.30: Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1.
OUTPUT_STD = 0.01


class Model:
    """Layers in a row; all parameters in one flat array, `params`, all gradients in `grads`.

    Each layer's W, b, dW and db become views into them. So an optimizer step is a few operations on
    one array, a checkpoint is one array, and a reduction over MPI is one call on (slices of) one
    array.
    """

    def __init__(self, layers: list[Layer]):
        self.layers = list(layers)
        self._check_layers()
        self.layers[0].requires_input_grad = False
        params = [p for layer in self.layers for p in layer.params()]
        size = sum(p.size for p in params)
        self.params = aligned_zeros((size,), params[0].dtype)
        self.grads = aligned_zeros((size,), params[0].dtype)

        self.slices = []  # each layer's part of the flat arrays
        self._places = []  # each parameter's: (leaf, name, slice, shape)
        start = 0
        for layer in self.layers:
            first = start
            for leaf in layer.leaves():
                for name in leaf.param_names:
                    value = getattr(leaf, name)
                    place = slice(start, start + value.size)
                    self.params[place] = value.reshape(-1)
                    self._places.append((leaf, name, place, value.shape))
                    start = place.stop
            self.slices.append(slice(first, start))
        self.use_memory(self.params, self.grads)

    def use_memory(self, params: np.ndarray, grads: np.ndarray):
        """Keep parameters and gradients in these flat arrays, which hold their values already.

        They may be memory that several processes share.
        """
        self.params = params
        self.grads = grads
        self._views = []
        for leaf, name, place, shape in self._places:
            view = params[place].reshape(shape)
            grad_view = grads[place].reshape(shape)
            setattr(leaf, name, view)
            setattr(leaf, "d" + name, grad_view)
            self._views += [(leaf, name, view), (leaf, "d" + name, grad_view)]

    def forward(self, x: np.ndarray) -> np.ndarray:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dout: np.ndarray, on_grad_ready: Callable[[slice], None] | None = None):
        """Set `grads`, summed over the batch.

        on_grad_ready(slice) is called as soon as a layer's slice of `grads` is final, the last
        layer's first, so that communication can begin while the layers below still compute.
        """
        for layer, grad_slice in zip(reversed(self.layers), reversed(self.slices), strict=True):
            dout = layer.backward(dout)
            if on_grad_ready and grad_slice.stop > grad_slice.start:
                on_grad_ready(grad_slice)
        self._check_views()

    def _check_layers(self):
        """Raise ValueError for what would train wrongly without a word."""
        seen = []
        for i, layer in enumerate(self.layers):
            for leaf in layer.leaves():
                if any(leaf is other for other in seen):
                    raise ValueError(
                        f"layer {i}, {type(leaf).__name__}, is in the model twice: its second "
                        "forward() would overwrite what backward() needs of the first: make a new "
                        "object for each place"
                    )
                seen.append(leaf)
        if not any(layer.params() for layer in self.layers):
            names = ", ".join(type(layer).__name__ for layer in self.layers)
            raise ValueError(
                f"Model([{names}]): no layer has parameters, so nothing can be trained"
            )

    def _check_views(self):
        """Raise ValueError if a layer has bound W or dW to a new array: it would not train."""
        for leaf, name, view in self._views:
            if getattr(leaf, name) is not view:
                raise ValueError(
                    f"{type(leaf).__name__}.{name} is a new array, which the optimizer does not "
                    f"see: write into the old one, self.{name}[...] = …, not self.{name} = …"
                )

    def leaves(self) -> Iterator[Layer]:
        for layer in self.layers:
            yield from layer.leaves()

    def train(self, training: bool = True):
        """Set the layers' mode, training or evaluation."""
        for leaf in self.leaves():
            leaf.training = training

    def gather_statistics(self, gather: Callable[[np.ndarray], np.ndarray]):
        """Make BatchNorm2D use the statistics of all ranks: gather(array) → (ranks, ...)."""
        for leaf in self.leaves():
            if isinstance(leaf, BatchNorm2D):
                leaf.gather = gather

    def buffers(self) -> list[np.ndarray]:
        """Arrays that are kept but not trained: running statistics."""
        return [array for layer in self.layers for array in layer.buffers()]

    def state_dict(self) -> dict[str, np.ndarray]:
        state = {"params": self.params}
        for i, array in enumerate(self.buffers()):
            state[f"state{i}"] = array
        return state

    def load_state_dict(self, state: dict[str, np.ndarray]):
        for name, array in self.state_dict().items():
            array[...] = state[name]

    def layout(self) -> list[tuple[str, tuple]]:
        """Name and shape of each parameter, in the order of `params`: "0.ConvReLUPool.W", …"""
        layers = {id(leaf): i for i, layer in enumerate(self.layers) for leaf in layer.leaves()}
        found = []
        counts = {}
        for leaf, name, _, shape in self._places:
            full_name = f"{layers[id(leaf)]}.{type(leaf).__name__}.{name}"
            counts[full_name] = counts.get(full_name, 0) + 1
            if counts[full_name] > 1:  # a block has several layers of one kind
                full_name += str(counts[full_name])
            found.append((full_name, shape))
        return found


def winograd_fits(h: int, w: int) -> bool:
    """Whether images of h × w pixels divide into the 4×4 tiles of the Winograd layers."""
    return h % 4 == 0 and w % 4 == 0


def check_network_size(name: str, image_shape: tuple):
    """Raise InputError for images that are too small for the pooling of the `cnn`."""
    h, w, _ = image_shape
    if name == "cnn" and min(h, w) < 4:
        raise InputError(
            f"--model cnn: images of {h}x{w} pixels: its two MaxPool2D(2) take 4x4 pixels and more"
        )


def split_params(checkpoint) -> dict[str, np.ndarray]:
    """The parameters in a checkpoint of a script without PyTorch, by name: "0.ConvReLUPool.W", …

    checkpoint: what np.load() returns. Views into its flat array `params`.
    """
    params = checkpoint["params"]
    found = {}
    start = 0
    for name, shape in json.loads(str(checkpoint["layout"])):
        size = math.prod(shape)
        found[name] = params[start : start + size].reshape(shape)
        start += size
    return found


def make_cnn(
    seed: int = 42,
    dtype=np.float32,
    conv1=ConvReLUPool,
    conv2=WinogradReLUPool,
    dense=Dense,
    *,
    image_shape: tuple = IMAGE_SHAPE,
    classes: int = 10,
) -> Model:
    """The `cnn` of all scripts: images (N, H, W, C) → logits (N, classes).

    Conv C→32, ReLU, MaxPool 2, Conv 32→64, ReLU, MaxPool 2, Flatten, Dense 64·H/4·W/4→256, ReLU,
    Dense 256→classes; convolutions 3×3 with padding 1. Of CIFAR-10's size it has 1,070,794
    parameters. conv1, conv2 (fused with ReLU and pooling) and dense: layer classes. Where
    Winograd's tiles do not divide the image, ConvReLUPool takes the place of the default conv2.
    """
    check_network_size("cnn", image_shape)
    h, w, channels = image_shape
    if conv2 is WinogradReLUPool and not winograd_fits(h // 2, w // 2):
        conv2 = ConvReLUPool
    rng = np.random.default_rng(seed)
    return Model(
        [
            conv1(channels, 32, rng=rng, dtype=dtype),
            conv2(32, 64, rng=rng, dtype=dtype),
            Flatten(),
            dense(64 * (h // 4) * (w // 4), 256, rng=rng, dtype=dtype),
            ReLU(),
            dense(256, classes, std=OUTPUT_STD, rng=rng, dtype=dtype),
        ]
    )


def make_resnet18(
    seed: int = 42,
    dtype=np.float32,
    conv=WinogradConv2D,
    plain_conv=Conv2D,
    stem=None,
    block=BasicBlock,
    dense=Dense,
    *,
    image_shape: tuple = IMAGE_SHAPE,
    classes: int = 10,
) -> Model:
    """`resnet18`, the CIFAR form: images (N, H, W, C) → logits (N, classes).

    A 3×3 stem without pooling, then two BasicBlocks each of 64, 128, 256 and 512 channels, the
    first of each stage but the first with stride 2. Of CIFAR-10's size it has 11,173,962
    parameters. conv: the class of the 3×3 convolutions with stride 1, and plain_conv where
    Winograd's tiles do not divide the image; stem(channels, rng, dtype): the layers of the stem;
    block and dense: layer classes.
    """
    h, w, channels = image_shape
    rng = np.random.default_rng(seed)
    if stem:
        layers = stem(channels, rng, dtype)
    else:
        layers = [
            Conv2D(channels, 64, bias=False, rng=rng, dtype=dtype),
            BatchNorm2D(64, dtype=dtype),
            ReLU(),
        ]
    channels = 64
    for width in (64, 128, 256, 512):
        for stride in (1 if width == 64 else 2, 1):
            h = -(-h // stride)  # rounded up, as a 3×3 convolution with padding 1 does
            w = -(-w // stride)
            stage_conv = conv if winograd_fits(h, w) else plain_conv
            layers.append(block(channels, width, stride, conv=stage_conv, rng=rng, dtype=dtype))
            channels = width
    layers += [GlobalAvgPool(), dense(512, classes, std=OUTPUT_STD, rng=rng, dtype=dtype)]
    return Model(layers)


def make_model(
    name: str,
    seed: int = 42,
    dtype=np.float32,
    image_shape: tuple = IMAGE_SHAPE,
    classes: int = 10,
) -> Model:
    """The network that --model names, one of MODELS, for images (H, W, C) and so many classes."""
    make = {"cnn": make_cnn, "resnet18": make_resnet18}[name]
    return make(seed, dtype, image_shape=image_shape, classes=classes)


def evaluate(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int = 100,
    reduce=None,
    *,
    mean=MEAN,
    std=STD,
    confusion: np.ndarray | None = None,
) -> tuple[float, float, float, float]:
    """Mean loss, top-1 and top-5 accuracy on uint8 images, and the seconds spent loading batches.

    reduce(sums): sums an array in place over the ranks that share the images. mean, std: the data
    set's. confusion: (K, K) zeros, in which each image is counted at [its label, predicted class].
    """
    model.train(False)
    sums = np.zeros(4)  # loss, top-1, top-5, images
    loading = 0.0
    for start in range(0, len(labels), batch_size):
        started = time.perf_counter()
        index = slice(start, start + batch_size)
        x, y = load_batch(images, labels, index, model.params.dtype, mean, std)
        loading += time.perf_counter() - started
        logits = model.forward(x)
        loss, _ = softmax_cross_entropy(logits, y)
        sums += (loss, *count_correct(logits, y), len(y))
        if confusion is not None:
            np.add.at(confusion, (y, logits.argmax(axis=1)), 1)
    model.train(True)
    if reduce:
        reduce(sums)
        if confusion is not None:
            reduce(confusion)
    loss, top1, top5 = (sums[:3] / sums[3]).tolist()
    return loss, top1, top5, loading


# --------------------------------------------------------------------------------------------------
# Optimizers
# --------------------------------------------------------------------------------------------------


class Optimizer:
    """Updates a model's parameters in place; `state` holds its arrays by name.

    The flat arrays are walked in chunks that stay in the cache: an update is memory traffic, and so
    each value crosses the memory bus once, not once for each operation.
    """

    CHUNK = 64 * 1024  # elements
    state_names: tuple = ()

    def __init__(self, model: Model, lr: float, weight_decay: float):
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.steps = 0
        params = model.params
        self.state = {name: aligned_zeros(params.shape, params.dtype) for name in self.state_names}
        self._g = aligned_zeros((self.CHUNK,), params.dtype)

    def step(self, count: int, grads: np.ndarray | None = None, shards: list | None = None):
        """Divide the summed gradients by count, the number of images, and update the parameters.

        grads: the sums, if they are not in model.grads. shards: the slices to update, if not all.
        """
        self.steps += 1
        w = self.model.params
        grads = self.model.grads if grads is None else grads
        for shard in [slice(0, len(w))] if shards is None else shards:
            for start in range(shard.start, shard.stop, self.CHUNK):
                chunk = slice(start, min(start + self.CHUNK, shard.stop))
                g = self._g[: chunk.stop - chunk.start]
                np.multiply(grads[chunk], 1 / count, out=g)
                if self.weight_decay:
                    g += self.weight_decay * w[chunk]
                self._update(w[chunk], g, *(array[chunk] for array in self.state.values()))

    def state_dict(self) -> dict[str, np.ndarray]:
        arrays = {f"optimizer_{name}": array for name, array in self.state.items()}
        return {**arrays, "optimizer_steps": np.array(self.steps)}

    def load_state_dict(self, state: dict[str, np.ndarray]):
        for name, array in self.state.items():
            array[...] = state[f"optimizer_{name}"]
        self.steps = int(state["optimizer_steps"])


class SGD(Optimizer):
    """v = momentum · v + g; w -= lr · v. As in PyTorch, the learning rate is not part of v."""

    state_names = ("velocity",)

    def __init__(self, model, lr=0.01, momentum=0.9, weight_decay=0.0):
        super().__init__(model, lr, weight_decay)
        self.momentum = momentum

    def _update(self, w, g, velocity):
        velocity *= self.momentum
        velocity += g
        w -= np.multiply(velocity, self.lr, out=g)  # g is needed no more: it holds the product


class Adam(Optimizer):
    """Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015.

    Weight decay is added to the gradient, as in PyTorch's Adam.
    """

    state_names = ("m", "v")

    def __init__(self, model, lr=0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(model, lr, weight_decay)
        self.betas = betas
        self.eps = eps

    def _update(self, w, g, m, v):
        beta1, beta2 = self.betas
        m *= beta1
        m += (1 - beta1) * g
        v *= beta2
        v += (1 - beta2) * np.square(g, out=g)  # g is needed no more: it holds what follows
        # m and v begin at zero, which the powers of beta correct for.
        root = np.sqrt(v, out=g)
        root /= math.sqrt(1 - beta2**self.steps)
        root += self.eps
        w -= self.lr / (1 - beta1**self.steps) * np.divide(m, root, out=root)


def make_optimizer(model: Model, args: argparse.Namespace, sgd=SGD, adam=Adam) -> Optimizer:
    """What --optimizer, --lr, --momentum and --weight-decay ask for, of one of these classes."""
    if args.optimizer == "adam":
        return adam(model, args.lr, weight_decay=args.weight_decay)
    return sgd(model, args.lr, args.momentum, args.weight_decay)


def learning_rate(args: argparse.Namespace, done: float) -> float:
    """The learning rate when the fraction `done` (0 to 1) of the training is over.

    constant: args.lr. cosine: in a straight line up from 0 during args.warmup of the training, then
    half a cosine down to 0 (Loshchilov and Hutter, "SGDR", 2017, without restarts). one-cycle: from
    lr / 25 up to lr and down to lr / 250,000, both half a cosine, as PyTorch's OneCycleLR (Smith
    and Topin, "Super-Convergence", 2018).
    """
    if done < args.warmup:
        if args.schedule == "one-cycle":
            return half_cosine(args.lr / 25, args.lr, done / args.warmup)
        return args.lr * done / args.warmup
    if args.schedule == "constant":
        return args.lr
    last = args.lr / 250_000 if args.schedule == "one-cycle" else 0.0
    return half_cosine(args.lr, last, (done - args.warmup) / (1 - args.warmup))


def half_cosine(start: float, end: float, fraction: float) -> float:
    """From start (fraction 0) to end (fraction 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


# --------------------------------------------------------------------------------------------------
# Run log
# --------------------------------------------------------------------------------------------------

# Types of a log's rows
TRAIN = 0  # training, one epoch
VALIDATE = 1  # validation, one epoch
BATCH = 2  # training, one batch
FETCH_TRAIN = 10  # fetching the training data before the first epoch
FETCH_VALIDATE = 11  # fetching the validation data
LOG_COLUMNS = (
    "type epoch start loading duration value1 value2 loss images_per_s "
    "cpu_percent ram_mb gpu_percent gpu_mem_mb forward backward communication"
).split()
METRIC_FORMATS = {
    "train_loss": ".4f",
    "train_acc": ".2%",
    "test_loss": ".4f",
    "test_acc": ".2%",
    "epoch_time": ".1f",
    "images_per_s": ",.0f",
}
METRICS = tuple(METRIC_FORMATS)
TRACED_BATCHES = range(2, 7)  # of the first epoch: the first ones still fill caches
MIB = 2**20

# A run whose threads got less of the CPU time that they asked for shared its cores with others.
SHORT_OF_CPU = 0.9

# A run resumes only with the options that its checkpoint was made with, except these, which do not
# change what a step computes. An option that a copied script adds is compared too.
FREE_OPTIONS = (
    "epochs data_dir dataset log save_metrics checkpoint checkpoint_every resume quiet trace "
    "confusion skip_damaged global_batch_size reduce overlap stall_timeout num_threads "
    "force_threads device graph tf32 source s3_mode endpoint_url cache_dir retry_seconds workers "
    "load_only export compile threads accuracy seeds cpu_default mode split forward_cores "
    "backward_cores benchmark rounds output default_run overwrite"
).split()


class RunLog:
    """The record of one training run, written while it goes on.

    --log is a CSV file with a row for each batch and epoch (docs/runs.md), a .json file beside it
    describes the run, and --save-metrics is an .npz file with the metrics of each epoch. Only rank
    0 writes files and shows progress; the others count along.

    `epoch` and `batch` are the position: the next batch to train is number `batch` (from 0) of
    `epoch` (from 1). script: the script's __file__. `sums` are the totals of the current epoch,
    `history` the metrics of all epochs, `totals` those of the run. info: further entries of the
    .json.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        script: str,
        data,
        info: dict | None = None,
        rank: int = 0,
        gpu_uuid: str | None = None,
    ):
        self.args = args
        self.script = Path(script).stem
        self.data = data
        self.info = info or {}
        self.rank = rank
        self.fingerprint = run_fingerprint(args, data)
        path = Path(args.log)
        if not path.name:
            raise InputError(f"--log {args.log!r}: give a file name")
        self.json_path = metadata_path(path)
        if rank == 0:
            outputs = [path, self.json_path, args.save_metrics, args.checkpoint]
            further = [getattr(args, name, None) for name in ("trace", "confusion")]
            check_outputs([*outputs, *further])
            # run and run.csv are two logs with one run.json.
            is_csv = path.suffix == ".csv"
            other = path.with_suffix("") if is_csv else path.with_name(f"{path.name}.csv")
            if other.is_file():
                raise InputError(
                    f"--log {path}: {other} is there too, and {self.json_path} would describe "
                    "both: choose another name"
                )

        self.epoch = 1
        self.batch = 0
        self.sums = {}
        self.history = {name: [] for name in METRICS}
        self.totals = {"train_seconds": 0.0, "train_images": 0, "evaluation_seconds": 0.0}
        # Of the last validation: how many images of class i were taken for class j, at [i, j].
        self.confusion = np.zeros((len(data.classes), len(data.classes)), np.int64)
        self.monitor = ResourceMonitor(gpu_uuid=gpu_uuid)
        self.last_batch = None  # when the last batch ended, during an epoch's training
        self.is_stopping = False  # save_and_stop() has begun
        self._phases = []  # those that timed() is in, the innermost last
        self.trace_path = getattr(args, "trace", None)
        self.spans = []  # of the traced batches: (name, start, end, rank, thread), in seconds
        self._is_tracing = False
        self._is_first_batch = True

    # -- state, of which a checkpoint consists ----------------------------------------------------

    def state_dict(self) -> dict:
        names = ("epoch", "batch", "sums", "history", "totals")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict):
        for name in self.state_dict():
            setattr(self, name, state[name])

    # -- files -------------------------------------------------------------------------------------

    def __enter__(self):
        if self.rank == 0:
            self._file = self._open_csv()
            self._csv = csv.writer(self._file, lineterminator="\n")
            if os.fstat(self._file.fileno()).st_size == 0:
                self._csv.writerow(LOG_COLUMNS)
                self._file.flush()
            self.monitor.start()
        self.metadata = {
            "script": self.script,
            "arguments": vars(self.args),
            "dataset": self.data.name,
            "fingerprint": self.data.fingerprint,
            "train_images": len(self.data.y_train),
            "test_images": len(self.data.y_test),
            "image_shape": self.data.image_shape,
            "classes": self.data.classes,
            "seed": self.args.seed,
            "ranks": 1,
            "threads": 1,
            "identity": self.fingerprint,
            **environment(),
            **self.info,
            "start": time.time(),
            "end": None,
            "status": "running",
            "totals": {},
        }
        self._write_metadata()
        is_shown = self.rank == 0 and not self.args.quiet
        self._progress = Progress(self.args.epochs) if is_shown else None
        return self

    def __exit__(self, kind, error, _):
        if self.rank:
            return
        self.monitor.stop()
        if self._progress:
            self._progress.close()
        status = "done"
        if kind in (Interrupted, KeyboardInterrupt):
            status = "interrupted"
            self._write_results()
        elif error:
            status = f"failed: {error}"
        self.metadata.update(end=time.time(), status=status)
        self._write_metadata()
        self._file.close()

    def _open_csv(self):
        """Open the CSV file: empty, or when resuming without the rows after the checkpoint."""
        path = Path(self.args.log)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a", newline="")  # not "w": another run may be writing it
            if not path.is_file():  # a device, such as /dev/null
                return file
            self._lock(file)
            if self.epoch == 1 and self.batch == 0:
                file.truncate(0)
            else:
                self._check_same_run()
                file.truncate(self._end_of_kept_rows(path))
            return file
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--log {path}: {reason}: choose another file") from None

    def _lock(self, file):
        """Raise InputError if another run is writing this file; the lock ends with the process."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--log {file.name}: another run is writing it: wait for its end, or give this one "
                "files of its own (--log, --save-metrics, --checkpoint)"
            ) from None
        except OSError:  # a file system without locks
            pass

    def _check_same_run(self):
        """Raise InputError if the log is of another run than the checkpoint."""
        try:
            theirs = dict(json.loads(self.json_path.read_text())["identity"])
        except (OSError, ValueError, LookupError, TypeError):  # nothing is known
            return
        if fingerprint_difference(self.fingerprint, theirs):
            raise InputError(
                f"--resume: {self.args.log} is the log of another run than {self.args.checkpoint}: "
                "give --log the file that belongs to it, or a new one"
            )

    def _end_of_kept_rows(self, path):
        """The length in bytes of the header and the rows before the checkpoint's position."""
        with open(path, "rb") as file:
            header = file.readline()
            if header.decode() != ",".join(LOG_COLUMNS) + "\n":
                return 0
            end = len(header)
            for line in file:
                if not self._is_before_checkpoint(line.decode()):
                    break
                end += len(line)
        return end

    def _is_before_checkpoint(self, line):
        fields = line.removesuffix("\n").split(",")
        try:
            row = dict(zip(LOG_COLUMNS, fields, strict=True))
            epoch = int(row["epoch"])
            batch = int(row["value1"]) if int(row["type"]) == BATCH else 0
        except ValueError:  # a row that was cut off
            return False
        return epoch < self.epoch or (epoch == self.epoch and 0 < batch <= self.batch)

    def write_row(self, kind: int, **columns):
        """Append a row; floats have six decimals, a column that is not given stays empty."""
        if self.rank:
            return
        row = {"epoch": self.epoch, **columns, "type": kind}
        cells = [row.get(name, "") for name in LOG_COLUMNS]
        self._csv.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells])
        self._file.flush()

    def _write_epoch_row(self, kind, **columns):
        """A row with the current epoch's totals so far."""
        sums = self.sums
        names = ("start", "loading", "duration", "forward", "backward", "communication")
        totals = {name: sums[name] for name in names if name in sums}
        if "loss" in sums:
            totals["loss"] = sums["loss"] / sums["images"]
        rate = sums["images"] / sums["duration"]
        self.write_row(kind, **{**totals, "images_per_s": rate, **columns})

    def _write_results(self):
        """Update the totals in the metadata, and the metrics file."""
        if self.rank:
            return
        totals = dict(self.totals)
        seconds = totals["train_seconds"]
        totals["images_per_s"] = totals["train_images"] / seconds if seconds else 0.0
        asked_for = totals.get("cpu_seconds", 0.0) + totals.get("cpu_wait_seconds", 0.0)
        if asked_for > 1:  # a shorter time says nothing
            totals["cpu_share"] = totals["cpu_seconds"] / asked_for
        resources = self.monitor.summary()
        totals["peak_ram_mb"] = max(resources.pop("ram_mb", 0.0), peak_rss() / MIB)
        if "gpu_mem_mb" in resources:
            totals["peak_gpu_mem_mb"] = resources.pop("gpu_mem_mb")
        for name, value in resources.items():
            totals[f"mean_{name}"] = value
        if self.history["test_acc"]:
            totals["final_accuracy"] = self.history["test_acc"][-1]
            totals["best_accuracy"] = max(self.history["test_acc"])
        self.metadata["totals"].update(totals)
        self._write_metadata()
        if self.args.save_metrics:
            arrays = {name: np.array(values) for name, values in self.history.items()}
            if self.confusion.any():
                arrays["confusion"] = self.confusion
                arrays["classes"] = np.array(self.data.classes)
            with atomic_write(self.args.save_metrics) as file:
                np.savez(file, **arrays)
        if getattr(self.args, "confusion", None) and self.confusion.any():
            with atomic_write(self.args.confusion, "w") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["label \\ predicted", *self.data.classes])
                for name, counts in zip(self.data.classes, self.confusion.tolist(), strict=True):
                    writer.writerow([name, *counts])

    def _write_metadata(self):
        if self.rank == 0:
            with atomic_write(self.json_path, "w") as file:
                json.dump(self.metadata, file, indent=1, default=str)
                file.write("\n")

    # -- called by the training loop ---------------------------------------------------------------

    def start_epoch(self, epoch: int, batches: int):
        """An epoch of that many batches begins, or goes on after a checkpoint."""
        self.epoch = epoch
        self.batches = batches
        if self.batch == 0:
            self.sums = {"images": 0, "top1": 0, "top5": 0, "loading": 0.0, "duration": 0.0}
            self.sums["start"] = time.time()
        if self._progress:
            self._progress.start(epoch, len(self.data.y_train), self.sums["images"])
        self._first_sample = len(self.monitor.samples)
        self._thread_times = thread_times()
        self._epoch_clock = time.perf_counter() - self.sums["duration"]
        self.last_batch = time.monotonic()

    @contextlib.contextmanager
    def timed(self, phase: str, label=None):
        """Count the seconds of a block as loading, forward, backward, communication or update.

        A phase inside another one pauses it, so that no second is counted twice. label: what the
        trace shows in place of the phase.
        """
        self._count_phase()
        self._phases.append(phase)
        started = self._phase_clock
        try:
            yield
        finally:
            self._count_phase()
            self._phases.pop()
            if self._is_tracing:
                self._add_span(label or phase, started)

    def _count_phase(self):
        """Count the time since the last call for the innermost phase."""
        now = time.perf_counter()
        if self._phases:
            self.add_seconds(self._phases[-1], now - self._phase_clock)
        self._phase_clock = now

    def add_seconds(self, phase: str, seconds: float):
        """Count seconds of a phase that were measured elsewhere."""
        self.sums[phase] = self.sums.get(phase, 0.0) + seconds

    @contextlib.contextmanager
    def paused(self):
        """Time in this block is not training time."""
        started = time.perf_counter()
        yield
        self._epoch_clock += time.perf_counter() - started

    def end_batch(self, images: int, loss: float | None = None, top1: int = 0, top5: int = 0):
        """Count a batch and write its row. loss: the batch's sum; None if nothing was trained."""
        if self._is_first_batch:
            self._is_first_batch = False
            self.totals.setdefault("first_step_after_seconds", process_age())
        self.batch += 1
        self.last_batch = time.monotonic()
        self._is_tracing = bool(self.trace_path) and self._is_traced()
        sums = self.sums
        sums["images"] += images
        sums["top1"] += top1
        sums["top5"] += top5
        sums["duration"] = time.perf_counter() - self._epoch_clock
        columns = {"value1": self.batch, "value2": self.batches, **self.monitor.latest()}
        if loss is not None:
            sums["loss"] = sums.get("loss", 0.0) + loss
            columns["loss"] = loss / max(images, 1)
        self._write_epoch_row(BATCH, **columns)
        if self._progress:
            self._progress.update(self.epoch, self.batch, self.batches, sums)

    def cpu_time(self) -> tuple[float, float]:
        """Seconds that this process's threads ran in this epoch, and waited for a free core."""
        ran = 0
        waited = 0
        for thread, (ran_now, waited_now) in thread_times().items():
            ran_before, waited_before = self._thread_times.get(thread, (0, 0))
            ran += ran_now - ran_before
            waited += waited_now - waited_before
        return ran / 1e9, waited / 1e9

    def end_training(self):
        """Write the row of the epoch's training; what follows until end_epoch() is validation."""
        sums = self.sums
        self.last_batch = None
        self.monitor.sample()
        columns = self.monitor.summary(self._first_sample)
        self.totals["train_seconds"] += sums["duration"]
        self.totals["train_images"] += sums["images"]
        ran, waited = sums.get("cpu_time") or self.cpu_time()
        self.totals["cpu_seconds"] = self.totals.get("cpu_seconds", 0.0) + ran
        self.totals["cpu_wait_seconds"] = self.totals.get("cpu_wait_seconds", 0.0) + waited
        if "loss" in sums:
            accuracy = sums["top1"] / sums["images"]
            columns.update(value1=accuracy, value2=sums["top5"] / sums["images"])
            self.history["train_loss"].append(sums["loss"] / sums["images"])
            self.history["train_acc"].append(accuracy)
            self.history["epoch_time"].append(sums["duration"])
            self.history["images_per_s"].append(sums["images"] / sums["duration"])
        else:  # only loaded: there is no validation
            self.batch = 0
            if self._progress:
                self._progress.close()
        self._write_epoch_row(TRAIN, **columns)
        self.confusion.fill(0)
        self._validation_start = time.time()
        self._validation_clock = time.perf_counter()

    def end_epoch(self, loss: float, top1: float, top5: float, loading: float):
        """Write the row of the validation: mean loss, accuracies, seconds spent loading."""
        seconds = time.perf_counter() - self._validation_clock
        self.totals["evaluation_seconds"] += seconds
        self.write_row(
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
        self.history["test_loss"].append(loss)
        self.history["test_acc"].append(top1)
        if self._progress:
            self._progress.end_epoch(self.epoch, self.history)
        self.epoch += 1
        self.batch = 0
        self._write_results()

    def finish(self):
        """Write the totals and the trace, and print the table of the run."""
        self._write_results()
        self._write_trace()
        if self.rank:
            return
        totals = self.metadata["totals"]
        accuracies = self.history["test_acc"]
        name = self.data.name
        if name == "synthetic":
            name = "SYNTHETIC DATA, not CIFAR-10"

        if accuracies and not self.args.quiet:
            print(f"\n{self.script}: {self.args.model}, {name}, {len(self.data.y_train):,} images")
            print(self._format_history())
        if accuracies:
            best = int(np.argmax(accuracies))
            result = f"best test accuracy {accuracies[best]:.2%} (epoch {best + 1})"
            seconds = f"{totals['train_seconds']:.1f} s of training"
        else:
            result = f"{totals['train_images']:,} images loaded"
            seconds = f"{totals['train_seconds']:.1f} s"
        rate = f"{totals['images_per_s']:,.0f} images/s"
        cpu_share = totals.get("cpu_share", 1.0)
        if cpu_share < SHORT_OF_CPU:
            # Such a speed says more about what else ran on the machine than about the training.
            rate += f" (SHORT OF CPU: its threads got {cpu_share:.0%} of the time they asked for)"
        print(
            f"{self.script}: {result}, {seconds}, {rate}, "
            f"peak RAM {totals['peak_ram_mb']:,.0f} MiB, {name}; log: {self.args.log}",
            flush=True,
        )

    # -- trace -------------------------------------------------------------------------------------

    def _is_traced(self):
        return not self.history["test_acc"] and self.batch in TRACED_BATCHES

    def _add_span(self, name, started):
        if isinstance(name, slice):
            name = f"gradients {name.start}:{name.stop}"
        thread = threading.current_thread().name
        self.spans.append((name, started, time.perf_counter(), self.rank, thread))

    def trace_layers(self, model):
        """With --trace, record each layer's forward and backward pass too."""
        if not self.trace_path:
            return

        def traced(function, name):
            def call(*args):
                started = time.perf_counter()
                result = function(*args)
                if self._is_tracing:
                    self._add_span(name, started)
                return result

            return call

        for i, layer in enumerate(model.layers):
            name = f"{i} {type(layer).__name__}"
            layer.forward = traced(layer.forward, f"{name} forward")
            layer.backward = traced(layer.backward, f"{name} backward")

    def _write_trace(self):
        """Write the spans in Chrome's trace format, which ui.perfetto.dev opens.

        https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
        """
        if not self.trace_path or self.rank:
            return
        first = min((span[1] for span in self.spans), default=0.0)
        threads = sorted({(rank, thread) for *_, rank, thread in self.spans})
        events = []
        for tid, (rank, thread) in enumerate(threads):
            track = {"ph": "M", "pid": rank, "tid": tid}
            events.append({**track, "name": "process_name", "args": {"name": f"rank {rank}"}})
            events.append({**track, "name": "thread_name", "args": {"name": thread}})
        for name, started, ended, rank, thread in self.spans:
            track = {"ph": "X", "pid": rank, "tid": threads.index((rank, thread))}
            microseconds = {"ts": (started - first) * 1e6, "dur": (ended - started) * 1e6}
            events.append({**track, "name": name, **microseconds})
        with atomic_write(self.trace_path, "w") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)

    def _format_history(self):
        header = (
            "epoch",
            "train loss",
            "train acc",
            "test loss",
            "test acc",
            "seconds",
            "images/s",
        )
        rows = []
        for i in range(len(self.history["test_acc"])):
            cells = [format(self.history[name][i], form) for name, form in METRIC_FORMATS.items()]
            rows.append([str(i + 1), *cells])
        return format_table(header, rows)


def metadata_path(log: str | Path) -> Path:
    """The file beside a log that describes its run: run.csv → run.json, lr0.01 → lr0.01.json."""
    log = Path(log)
    if log.suffix in (".csv", ".json"):  # with --log x.json both would be one file: refused
        return log.with_suffix(".json")
    return log.with_name(f"{log.name}.json")


def run_fingerprint(args: argparse.Namespace, data) -> dict:
    """The options and data that decide what a run computes; the .json has it as "identity"."""
    fingerprint = {"augment": "off", "schedule": "constant"}  # of scripts without these options
    for name, value in vars(args).items():
        if name not in FREE_OPTIONS:
            fingerprint[name] = value
    if hasattr(args, "global_batch_size"):  # the images of a step, however many ranks share it
        fingerprint["batch_size"] = args.global_batch_size
    # A schedule depends on the number of epochs, a constant rate does not.
    scheduled = getattr(args, "schedule", "constant") != "constant" or getattr(args, "warmup", 0)
    fingerprint["schedule_epochs"] = args.epochs if scheduled else None
    fingerprint["dataset"] = data.name
    fingerprint["fingerprint"] = data.fingerprint
    return fingerprint


def fingerprint_difference(ours: dict, theirs: dict) -> str | None:
    """The first name that both have with different values; None if there is none."""
    for name, value in ours.items():
        if name in theirs and theirs[name] != value:
            return name
    return None


def require_finite(loss: float, what: str, log: RunLog):
    """Raise TrainingError if the loss is not finite: such training never recovers."""
    if math.isfinite(loss):
        return
    if what == "loss":
        epoch = log.epoch
        batch = log.batch
    else:  # of the validation: the log has moved to the next epoch
        epoch = log.epoch - 1
        batch = log.batches
    step = (epoch - 1) * log.batches + batch
    raise TrainingError(
        f"the {what} is {loss} at step {step} (epoch {epoch}, batch {batch}): try a smaller --lr; "
        f"the log is kept in {log.args.log}"
    )


class ResourceMonitor(threading.Thread):
    """Samples CPU use and RAM of this process and its children, and a GPU's use, once a second.

    CPU use is in percent of one core. RAM is the sum of the resident sets, in MiB: pages that
    processes share are counted for each. gpu_uuid: the GPU to watch through NVML, as "GPU-…".
    """

    FIELDS = ("cpu_percent", "ram_mb", "gpu_percent", "gpu_mem_mb")

    def __init__(self, interval: float = 1.0, gpu_uuid: str | None = None):
        super().__init__(daemon=True)
        import psutil

        self.interval = interval
        self.samples = []
        self._process = psutil.Process()
        self._stop_event = threading.Event()
        self._lock = threading.Lock()
        self._nvml = None
        if gpu_uuid:
            with contextlib.suppress(Exception):  # no NVML: the GPU columns stay empty
                import pynvml

                pynvml.nvmlInit()
                self._gpu = pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid)
                self._nvml = pynvml
        self._sampled = time.monotonic()
        self._cpu_seconds, _ = self._measure()

    def run(self):
        while not self._stop_event.wait(self.interval):
            self.sample()

    def stop(self):
        self._stop_event.set()
        self.join()

    def sample(self):
        with self._lock:
            now = time.monotonic()
            cpu_seconds, ram = self._measure()
            cpu = None
            if now - self._sampled >= 0.05:  # a shorter time says nothing about the CPU
                used = 0.0
                for process, seconds in cpu_seconds.items():
                    used += seconds - self._cpu_seconds.get(process, 0.0)
                cpu = 100 * used / (now - self._sampled)
                self._sampled = now
                self._cpu_seconds = cpu_seconds
            self.samples.append((cpu, ram / MIB, *self._measure_gpu()))

    def _measure(self):
        """The CPU seconds of each process so far, and the sum of their resident sets in bytes."""
        import psutil

        cpu_seconds = {}
        ram = 0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                times = process.cpu_times()
                cpu_seconds[process] = times.user + times.system
                ram += process.memory_info().rss
        return cpu_seconds, ram

    def _measure_gpu(self):
        """Use in percent and memory in MiB of the whole GPU; None where NVML does not report it."""
        use = None
        memory = None
        if self._nvml:
            with contextlib.suppress(self._nvml.NVMLError):  # a partitioned GPU (MIG) has no use
                use = self._nvml.nvmlDeviceGetUtilizationRates(self._gpu).gpu
            with contextlib.suppress(self._nvml.NVMLError):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(self._gpu).used / MIB
        return use, memory

    def latest(self) -> dict:
        return dict(zip(self.FIELDS, self.samples[-1], strict=True)) if self.samples else {}

    def summary(self, since: int = 0) -> dict:
        """Mean use and peak memory of the samples from number `since` on."""
        result = {}
        for i, field in enumerate(self.FIELDS):
            values = [sample[i] for sample in self.samples[since:] if sample[i] is not None]
            if values:
                is_memory = field.endswith("_mb")
                result[field] = max(values) if is_memory else sum(values) / len(values)
        return result


def thread_times() -> dict[int, tuple[int, int]]:
    """{thread: nanoseconds that it ran, nanoseconds that it was ready but no core was free}.

    Of the threads of this process, as Linux counts them in /proc/PID/task/TID/schedstat
    (https://docs.kernel.org/scheduler/sched-stats.html); empty where it does not.
    """
    times = {}
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # the thread has just ended
            ran, waited, _ = file.read_text().split()
            times[int(file.parent.name)] = (int(ran), int(waited))
    return times


class Progress:
    """A bar where stderr is a terminal; elsewhere a line on stdout every ten seconds."""

    def __init__(self, epochs: int):
        self.epochs = epochs
        self.bar = None
        self.printed = time.monotonic()

    def start(self, epoch, images, done):
        if sys.stderr.isatty():
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
        loss = sums["loss"] / sums["images"] if "loss" in sums else math.nan
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self.bar.update(sums["images"] - self.bar.n)
        elif time.monotonic() - self.printed >= 10:
            self.printed = time.monotonic()
            left = sums["duration"] / batch * (batches - batch)
            print(
                f"epoch {epoch}/{self.epochs}  batch {batch}/{batches}  loss {loss:.4f}  "
                f"{sums['images'] / sums['duration']:,.0f} images/s  "
                f"{left:.0f} s left in this epoch",
                flush=True,
            )

    def end_epoch(self, epoch, history):
        self.close()
        cells = [format(history[name][-1], form) for name, form in METRIC_FORMATS.items()]
        train_loss, train_acc, test_loss, test_acc, seconds, rate = cells
        print(
            f"epoch {epoch}/{self.epochs}  train loss {train_loss} accuracy {train_acc}  "
            f"test loss {test_loss} accuracy {test_acc}  {seconds} s  {rate} images/s",
            flush=True,
        )

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def format_table(header: tuple, rows: list) -> str:
    """A plain-text table: rows of strings, right-aligned in columns as wide as needed."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


class StopSignal:
    """Ctrl-C or SIGTERM as a request: the loop ends after the current batch.

    A context manager. `requested` is the signal's name, or None; a second signal acts as always.
    """

    def __init__(self):
        self.requested = None

    def __enter__(self):
        self._handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread() else ():
            self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number, _):
        self.requested = signal.Signals(number).name
        signal.signal(number, self._handlers[number])


def in_main_thread() -> bool:
    """Python lets only the main thread handle signals; Streamlit runs scripts in others."""
    return threading.current_thread() is threading.main_thread()


class Checkpoint:
    """The file from which --resume continues bit for bit: model, optimizer, position, sums.

    An .npz file without pickles; `params` is the flat array of all parameters, which
    split_params() divides. Without --checkpoint, and on ranks other than 0, save() does nothing and
    due() is False.
    """

    def __init__(self, args: argparse.Namespace, log: RunLog, model, optimizer, rank: int = 0):
        self.path = args.checkpoint
        self.interval = args.checkpoint_every
        self.log = log
        self.model = model
        self.optimizer = optimizer
        self.is_writer = bool(self.path) and rank == 0
        self._saved = time.monotonic()
        if args.resume and not self.path:
            raise InputError("--resume needs --checkpoint FILE, the file to resume from")

    def due(self) -> bool:
        """True if the last save is longer ago than --checkpoint-every."""
        return self.is_writer and time.monotonic() - self._saved >= self.interval

    def save(self):
        """Write the file. A reader finds the old one or the new one, never a part of one."""
        if not self.is_writer:
            return
        meta = {"identity": self.log.fingerprint, **self.log.state_dict()}
        with self.log.paused(), atomic_write(self.path) as file:
            self._write(file, meta)
        self._saved = time.monotonic()

    def load(self) -> bool:
        """Continue from the file; without one say so and return False. InputError if damaged."""
        if not Path(self.path).exists():
            print(f"no checkpoint {self.path} yet: training starts from the beginning", flush=True)
            return False
        try:
            meta, state = self._read()
            theirs = dict(meta["identity"])
        except Exception as error:  # zip, NumPy, PyTorch and JSON each have their own errors
            raise InputError(
                f"--resume: {self.path} is not a valid checkpoint ({error}): start without --resume"
            ) from None
        name = fingerprint_difference(self.log.fingerprint, theirs)
        if name:
            raise InputError(
                f"--resume: {self.path} was made with {name} {theirs[name]}, this run has "
                f"{self.log.fingerprint[name]}: repeat that run's options, or start without "
                "--resume"
            )
        try:
            self._apply(state)
        except (KeyError, ValueError, RuntimeError):
            raise InputError(
                f"--resume: {self.path} is a checkpoint of another model: start without --resume"
            ) from None
        self.log.load_state_dict(meta)
        return True

    def arrays(self) -> dict[str, np.ndarray]:
        return {**self.model.state_dict(), **self.optimizer.state_dict()}

    def _write(self, file, meta):
        texts = {"meta": json.dumps(meta), "layout": json.dumps(self.model.layout())}
        texts = {name: np.array(text) for name, text in texts.items()}
        np.savez(file, **texts, **self.arrays())

    def _read(self):
        with np.load(self.path, allow_pickle=False) as file:
            arrays = dict(file)
        arrays.pop("layout", None)  # older ones have none
        return json.loads(str(arrays.pop("meta"))), arrays

    def _apply(self, arrays):
        if {name: array.shape for name, array in self.arrays().items()} != {
            name: array.shape for name, array in arrays.items()
        }:
            raise ValueError("other arrays")
        self.model.load_state_dict(arrays)
        self.optimizer.load_state_dict(arrays)


class TorchCheckpoint(Checkpoint):
    """The same in PyTorch's own format, a dict of state dicts: any program can torch.load it.

    parts: the objects with a state_dict(), by name: model=…, optimizer=…
    """

    def __init__(self, args: argparse.Namespace, log: RunLog, rank: int = 0, **parts):
        super().__init__(args, log, None, None, rank)
        self.parts = parts

    def _write(self, file, meta):
        import torch

        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"meta": meta, **state}, file)

    def _read(self):
        import torch

        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(self.path) as file:
            if "meta.npy" in file.namelist():
                raise ValueError("it is an .npz file, as scripts without PyTorch write them")
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        return state.pop("meta"), state

    def _apply(self, state):
        if state.keys() != self.parts.keys():
            raise ValueError("other parts")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def save_and_stop(checkpoint: Checkpoint, log: RunLog, stop: StopSignal):
    """Save the checkpoint and raise Interrupted, with the command that continues."""
    log.is_stopping = True
    checkpoint.save()
    place = f"after epoch {log.epoch - 1}"
    if log.batch:
        place = f"after batch {log.batch} of epoch {log.epoch}"
    message = f"interrupted by {stop.requested or 'a signal'} {place}"
    if checkpoint.path:
        message += f"; continue with --checkpoint {checkpoint.path} --resume"
    raise Interrupted(message)


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file beside `path` that replaces it, synced, when the block ends without an error."""
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():  # a device, such as /dev/null
        with open(path, mode) as file:
            yield file
        return
    part = path.with_name(f".{path.name}.part")  # one name: what a killed process left is replaced
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


def check_outputs(paths: list):
    """Raise InputError unless a file can be made at each path; no two may be the same."""
    paths = [Path(path) for path in paths if path]
    targets = [os.path.realpath(path) for path in paths]
    for path, target in zip(paths, targets, strict=True):
        if targets.count(target) > 1:
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
            with tempfile.TemporaryDirectory(dir=folder, prefix=".try-") as temporary:
                (Path(temporary) / f".{path.name}.part").touch()
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}): choose another place"
            ) from None


# --------------------------------------------------------------------------------------------------
# Machine
# --------------------------------------------------------------------------------------------------


def available_cores() -> list[int]:
    """The cores that this process may use: those of its affinity mask, no more than its quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))  # macOS
    quota = cpu_quota()
    # A process that has used up its quota stands still, most likely with some threads waiting for
    # others. So of 1.5 cores it may use one.
    return cores[: max(1, int(quota))] if quota < len(cores) else cores


def cpu_quota(proc: str = "/proc/self") -> float:
    """The number of cores' time that containers may limit a process to; infinite without a limit.

    It is a property of a control group, cgroups(7): `docker --cpus`, Kubernetes and Slurm set it.
    """
    groups = {}  # {controller: path}; version 2 of control groups has one entry, without a name
    mounts = []
    with contextlib.suppress(OSError):  # macOS
        for line in Path(proc, "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            groups.update(dict.fromkeys(controllers.split(","), path))
        mounts = Path(proc, "mounts").read_text().splitlines()

    quota = math.inf
    for mount in mounts:
        _, folder, kind, options, *_ = mount.split()
        controller = {"cgroup": "cpu", "cgroup2": ""}.get(kind)
        if controller not in groups or controller not in ("", *options.split(",")):
            continue
        # The limit of each group above holds too. In a container some paths are the host's and not
        # found; the root is then the container's own group.
        own_group = Path(folder, groups[controller].lstrip("/"))
        for group in (own_group, *own_group.parents):
            quota = min(quota, _read_quota(group))
            if group == Path(folder):
                break
    return quota


def _read_quota(group):
    """The quota of one control group, in cores; infinite without one."""
    with contextlib.suppress(OSError, ValueError):
        microseconds, period = (group / "cpu.max").read_text().split()  # "max 100000": no limit
        return int(microseconds) / int(period)
    with contextlib.suppress(OSError, ValueError):
        microseconds = int((group / "cpu.cfs_quota_us").read_text())  # -1: no limit
        if microseconds > 0:
            return microseconds / int((group / "cpu.cfs_period_us").read_text())
    return math.inf


def limit_blas_threads(threads: int):
    """Set the threads of every BLAS that is loaded, whatever the environment says."""
    import threadpoolctl

    threadpoolctl.threadpool_limits(threads, user_api="blas")


def blas_info() -> list[dict]:
    """Library, version, kernel and threads of every BLAS that is loaded.

    kernel: the processor that its code was written for.
    """
    import threadpoolctl

    return [
        {
            "library": blas["internal_api"],
            "version": blas["version"],
            "kernel": blas.get("architecture"),
            "threads": blas["num_threads"],
        }
        for blas in threadpoolctl.threadpool_info()
        if blas["user_api"] == "blas"
    ]


def blas_warning() -> str | None:
    """A line for the user if OpenBLAS runs kernels for an older processor than this one."""
    old = "Prescott Core2 Penryn Nehalem Sandybridge Haswell Zen Barcelona Bulldozer".split()
    if not {"avx512f", "avx512vl"} <= cpu_flags():
        return None
    for blas in blas_info():
        if blas["kernel"] in old:
            remedy = ": unset OPENBLAS_CORETYPE" if "OPENBLAS_CORETYPE" in os.environ else ""
            return (
                f"warning: BLAS uses its {blas['kernel']} kernels, but this processor has AVX-512, "
                f"which is up to twice as fast{remedy}"
            )
    return None


def cpu_flags() -> set[str]:
    """The instruction sets of this processor, as Linux names them."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        return set(found[1].split()) if found else set()
    return set()


def has_bfloat16() -> bool:
    """True if this processor has instructions for bfloat16; without them it is emulated, slowly."""
    return not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def process_age() -> float:
    """Seconds since this process was started."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot, see proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):  # macOS
        import psutil

        return time.time() - psutil.Process().create_time()


def peak_rss() -> int:
    """The process's largest resident set so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict:
    """The machine and software that a result depends on."""
    import psutil

    versions = {"python": platform.python_version()}
    for name in ("numpy", "scipy", "numba", "mpi4py", "torch", "torchvision", "cupy"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    return {
        "host": platform.node(),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "cpu_quota": quota if math.isfinite(quota := cpu_quota()) else None,
        "memory_mb": psutil.virtual_memory().total / MIB,
        "blas": blas_info(),
        "git_commit": git_commit(),
        "versions": versions,
    }


def git_commit() -> str | None:
    """The commit of this file's repository, with "-dirty" if tracked files have changed."""
    here = str(Path(__file__).resolve().parent)
    command = "git --no-optional-locks -C".split()  # `git describe --dirty` would lock the index
    command += [here, *"status --porcelain=v2 --branch --untracked-files=no".split()]
    try:
        status = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    commit = re.search(r"^# branch\.oid ([0-9a-f]{40})$", status.stdout, re.MULTILINE)
    if not commit:
        return None
    is_dirty = any(not line.startswith("#") for line in status.stdout.splitlines())
    return commit[1] + ("-dirty" if is_dirty else "")


# --------------------------------------------------------------------------------------------------
# MPI: what the scripts with ranks share. comm is an mpi4py communicator.
# --------------------------------------------------------------------------------------------------


def shard(n: int, rank: int, size: int) -> slice:
    """This rank's slice of n items, which may be empty: the first n % size ranks have one more."""
    start = rank * (n // size) + min(rank, n % size)
    return slice(start, start + n // size + (rank < n % size))


def launched_processes() -> tuple[str, int]:
    """The launcher that started this process, if any, and of how many processes it is one."""
    for launcher, name in (
        ("mpirun", "PMI_SIZE"),
        ("mpirun", "OMPI_COMM_WORLD_SIZE"),
        ("mpirun", "PMIX_SIZE"),
        ("mpirun", "MPI_LOCALNRANKS"),
        ("srun", "SLURM_STEP_NUM_TASKS"),
    ):
        size = os.environ.get(name, "")
        if size.isdecimal() and int(size) > 1:
            return launcher, int(size)
    return "", 1


def check_launcher(comm):
    """Raise InputError if each rank is alone, because the launcher does not belong to mpi4py."""
    from mpi4py import MPI

    launcher, size = launched_processes()
    if comm.size > 1 or size == 1:
        return
    library = MPI.Get_library_version().split("\n")[0].strip("\0")
    if launcher == "srun":
        raise InputError(
            f"srun started {size} tasks, but each is alone: srun and mpi4py, which uses {library}, "
            "do not agree how ranks find each other. Use srun --mpi=pmi2, or mpirun without srun"
        )
    raise InputError(
        f"mpirun started {size} ranks, but each is alone: it belongs to another MPI than mpi4py, "
        f"which uses {library}. Use the mpirun beside python: .venv/bin/mpirun"
    )


def cores_of_machine(comm) -> tuple[int, int]:
    """The number of ranks on this machine, and of the cores that they may use all together."""
    from mpi4py import MPI

    machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
    # Some launchers give each rank cores of its own; a quota is one for all.
    found = machine.allgather((set(available_cores()), cpu_quota()))
    machine.Free()
    cores = len(set.union(*(cores for cores, _ in found)))
    quota = min(quota for _, quota in found)
    return len(found), max(1, int(quota)) if quota < cores else cores


def warn_if_oversubscribed(comm, threads: int = 1):
    """Rank 0 says on which machine there are more threads of all ranks than cores."""
    ranks, cores = cores_of_machine(comm)
    machines = comm.gather((platform.node(), ranks, cores, threads))
    for host, ranks, cores, threads in dict.fromkeys(machines or []):
        if ranks * threads > cores:
            each = f" of {threads} threads" if threads > 1 else ""
            print(
                f"warning: {ranks} ranks{each} share {cores} cores of {host}: "
                "they wait for each other",
                file=sys.stderr,
            )


SHARED_MEMORY = "/dev/shm"  # where Linux keeps the memory that processes share


def free_shared_memory() -> float:
    """Bytes that are free in shared memory; infinite where the system has another kind."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # macOS
        return math.inf
    return status.f_bavail * status.f_frsize


def guard_ranks(comm):
    """Make whatever ends this rank end the whole job, from before run_main() on.

    abort_on_exception(), and a signal that comes while this rank waits inside MPI: see StallWatch.
    """
    abort_on_exception(comm)
    if comm.size > 1:
        StallWatch(None, comm).__enter__()  # until the process ends


def abort_on_exception(comm):
    """Make an uncaught exception, or an early signal, on one rank end the whole job.

    Without this the other ranks wait for ever in their next MPI call. The traceback is printed with
    the rank's number, and MPI_Abort ends all ranks.
    """

    def abort(message, status):
        print(message, file=sys.__stderr__, flush=True)
        time.sleep(0.2)  # mpirun may lose what arrives together with the abort
        comm.Abort(status)

    def on_exception(_, error, __):
        lines = [f"[rank {comm.rank}] {line}" for line in describe_error(error).splitlines()]
        abort("\n".join(lines), 1)

    def on_signal(*_):
        abort("interrupted", 130)

    sys.excepthook = on_exception
    if comm.size > 1:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)


def collective(comm, action: Callable):
    """Call action() on every rank and return its result.

    If it raises InputError or OSError on any rank, all ranks raise InputError.
    """
    result = None
    problem = None
    try:
        result = action()
    except (InputError, OSError) as error:
        problem = str(error)
    problems = [text for text in comm.allgather(problem) if text]
    if problems:
        raise InputError(problems[0])
    return result


def load_data_collectively(args: argparse.Namespace, comm) -> Dataset:
    """The data on every rank. Rank 0 is first: it downloads what the others then find."""

    def load(dataset):
        return load_dataset(args.data_dir, dataset, args.subset, args.seed)

    data = collective(comm, lambda: load(args.dataset) if comm.rank == 0 else None)
    name = comm.bcast(data.name if comm.rank == 0 else None)
    data = collective(comm, lambda: data if comm.rank == 0 else load(dataset_option(name)))

    found = comm.allgather((socket.gethostname(), data.fingerprint))
    for rank, (host, fingerprint) in enumerate(found):
        if fingerprint != data.fingerprint:
            raise InputError(
                f"rank {rank} on {host} has other data than rank 0: give all hosts the same "
                "--data-dir"
            )
    return data


@contextlib.contextmanager
def collective_run(log: RunLog, checkpoint: Checkpoint, stop: StopSignal, model, optimizer, comm):
    """Enter stop and log on all ranks, in the state that rank 0 has loaded."""
    state = comm.bcast((log.state_dict(), optimizer.steps))
    log.load_state_dict(state[0])
    optimizer.steps = state[1]
    for array in (model.params, *model.buffers(), *optimizer.state.values()):
        comm.Bcast(array)
    try:
        with contextlib.ExitStack() as stack:
            collective(comm, lambda: stack.enter_context(log))  # rank 0 opens files, which may fail
            stack.enter_context(stop)
            stack.enter_context(StallWatch(log, comm))
            yield
    except Interrupted as interrupted:
        if not checkpoint.path or stop.requested == "SIGINT":
            raise
        # SIGTERM is how clusters end a job whose time is over. It is saved: no failure.
        if comm.rank == 0:
            print(interrupted, flush=True)
    except OSError as error:  # on this rank alone: the others would wait for ever
        print(f"error: {error}", file=sys.stderr, flush=True)
        comm.Abort(1)


class StallWatch:
    """Ends the job when a rank is blocked for ever, and prints the line on which each rank waits.

    A rank blocked inside MPI runs no Python signal handler, and no other rank can help it. This
    thread still runs, since mpi4py lets other threads run while it waits. Two cases end the job:

    - --stall-timeout: so long no batch was finished, or the rank has been in one and the same call;
    - a signal has come and the rank has stayed in one call for 5 s, so that it cannot stop itself.
      Once the ranks have agreed to stop, they have the time that a slow disk takes to save.

    Before the training, when there is no log yet, only the second does.
    """

    AFTER_SIGNAL = 5.0  # seconds

    def __init__(self, log: RunLog | None, comm):
        self.log = log
        self.rank = comm.rank
        self.timeout = (log and log.args.stall_timeout) or math.inf
        self._done = threading.Event()
        self._main = threading.get_ident()
        self._previous = None

    def __enter__(self):
        # Python writes the number of each signal into this pipe at once, even when the main thread
        # is blocked.
        self._signals, self._wakeup = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(self._wakeup, False)
        if in_main_thread():
            self._previous = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        if self._previous is not None:
            signal.set_wakeup_fd(self._previous)
        os.close(self._signals)
        os.close(self._wakeup)

    def _watch(self):
        call = None
        since = time.monotonic()
        has_signal = False
        looked = since
        while not self._done.wait(0.25):
            frame = sys._current_frames()[self._main]
            now = time.monotonic()
            pause = now - looked
            looked = now
            if pause > 5:  # this thread too was stopped, by Ctrl-Z: that is no stall
                since += pause
                if self.log and self.log.last_batch is not None:
                    self.log.last_batch += pause
            if (frame, frame.f_lasti) != call:
                call = (frame, frame.f_lasti)
                since = now
            with contextlib.suppress(BlockingIOError):
                has_signal = bool(os.read(self._signals, 100)) or has_signal

            last_batch = self.log and self.log.last_batch
            stalled = now - since
            if last_batch is not None:
                stalled = max(stalled, now - last_batch)
            is_stopping = self.log and self.log.is_stopping
            if has_signal and not is_stopping and now - since >= self.AFTER_SIGNAL:
                self._end_job("interrupted, but this rank is blocked", frame, 130)
            if stalled >= self.timeout:
                self._end_job(f"no batch was finished for {stalled:.0f} s", frame, 1)

    def _end_job(self, message, frame, status):
        lines = [f"error: {message}; it waits here:"]
        for line in traceback.format_stack(frame):
            lines += line.rstrip().splitlines()
        text = "".join(f"[rank {self.rank}] {line}\n" for line in lines)
        print(text, end="", file=sys.stderr, flush=True)
        if self.log and self.rank == 0:
            self.log.metadata.update(end=time.time(), status=f"failed: {message}")
            self.log._write_metadata()
        time.sleep(2)  # the other ranks print too: the first that exits ends the job
        os._exit(status)


def assert_replicas_identical(model: Model, comm, epoch: int):
    """Raise TrainingError unless all ranks hold the same weights and statistics, bit for bit."""
    for what, arrays in (("weights", [model.params]), ("running statistics", model.buffers())):
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(array.data)
        digests = comm.allgather(digest.digest())
        different = [rank for rank in range(comm.size) if digests[rank] != digests[0]]
        if different:
            largest = 0.0
            for array in arrays:
                distance = np.abs(array - comm.bcast(array)).max()
                largest = max(largest, float(comm.allgather(distance)[different[0]]))
            raise TrainingError(
                f"after epoch {epoch} the {what} of rank {different[0]} are not those of rank 0: "
                f"they differ by up to {largest:.3g}"
            )


def log_communication(log: RunLog, comm):
    """Replace the epoch's seconds of communication by the mean over the ranks.

    Its CPU time becomes that of the rank that waited longest for a core: all wait for this one.
    """
    log.sums["cpu_time"] = max(comm.allgather(log.cpu_time()), key=lambda time: time[1])
    seconds = comm.allgather(log.sums.get("communication", 0.0))
    mean = sum(seconds) / comm.size
    log.sums["communication"] = mean
    totals = log.totals.setdefault("communication_seconds", {"min": 0.0, "mean": 0.0, "max": 0.0})
    totals["min"] += min(seconds)
    totals["mean"] += mean
    totals["max"] += max(seconds)


def gather_trace(log: RunLog, comm):
    """Collect the spans of all ranks on rank 0, on its clock, before log.finish() writes them."""
    if not log.trace_path:
        return
    comm.Barrier()  # all ranks take the time at the same moment, up to some microseconds
    gathered = comm.gather((time.perf_counter(), log.spans))
    if comm.rank == 0:
        log.spans = []
        for clock, spans in gathered:
            offset = gathered[0][0] - clock
            for name, started, ended, rank, thread in spans:
                log.spans.append((name, started + offset, ended + offset, rank, thread))


def gather_from_all(comm, array: np.ndarray) -> np.ndarray:
    """The arrays of all ranks, stacked: (ranks, ...)."""
    gathered = np.empty((comm.size, *array.shape), array.dtype)
    comm.Allgather(array, gathered)
    return gathered


class OverlapReducer:
    """Sums the gradients of all ranks by messages while the backward pass goes on.

    start(grad_slice) begins when a layer's gradients are complete; after wait() `total` has the
    sums over all ranks. Each rank then updates all weights itself. overlap=False: start() waits.
    """

    name = "overlap"
    shards = None  # the slices that this rank updates: all

    def __init__(self, comm, model: Model, overlap: bool = True):
        self.comm = comm
        self.overlap = overlap
        self.total = model.grads
        self.requests = []

    def start(self, grad_slice: slice):
        from mpi4py import MPI

        # Iallreduce only begins: the backward pass of the layers below may hide its time.
        self.requests.append(self.comm.Iallreduce(MPI.IN_PLACE, self.total[grad_slice]))
        if self.overlap:
            # MPI moves data only while one of its functions runs.
            MPI.Request.Testall(self.requests)
        else:
            self.wait()

    def wait(self):
        from mpi4py import MPI

        MPI.Request.Waitall(self.requests)
        self.requests.clear()

    def finish(self):
        """Called after the update; every rank has updated all weights itself."""


class SharedMemoryReducer:
    """Sums gradients and updates weights in memory that the ranks of a machine share.

    Nothing is sent within a machine, and nothing is computed twice. One window of shared memory
    holds

        gradients of rank 0 | weights | optimizer state | gradients of rank 1 | …

    (Hoefler et al., "MPI + MPI: a new hybrid approach to parallel programming with MPI plus shared
    memory", 2013). Each layer's slice of the gradients is divided into shards, one for each rank of
    the machine: a rank sums its shard over all ranks' gradients and then updates its shard of the
    weights (Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
    models", 2020). Where there are several machines, with equal numbers of ranks, the ranks with
    the same shard sum it over the machines by messages in between.

    Ranks wait for each other twice a step: before summing a slice, until all have written their
    gradients; after the update, until all shards of the weights are written.
    """

    name = "shared"

    def __init__(self, comm, model: Model, optimizer: Optimizer, overlap: bool = True):
        from mpi4py import MPI

        self.overlap = overlap
        self.machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.same_shard = comm.Split(self.machine.rank)  # one rank of each machine
        self.shards = [self._shard(layer_slice) for layer_slice in model.slices]
        self.total = model.grads  # private: only this rank's shards of it are used
        self.requests = []
        self.unsummed = []  # (slice, request): complete here, and not yet known to be on all ranks

        # All arrays have the same size, rounded up to whole cache lines. Rank 0 holds the weights
        # and the optimizer's arrays behind its gradients; every rank sees all of the window.
        private = [model.params, *optimizer.state.values()]
        size = -(-model.grads.nbytes // 64) * 64
        own_size = size * (1 + len(private)) if self.machine.rank == 0 else size
        itemsize = model.grads.itemsize
        self.window = MPI.Win.Allocate_shared(own_size, itemsize, comm=self.machine)
        self.window.Lock_all(MPI.MODE_NOCHECK)
        memory = [self.window.Shared_query(rank)[0] for rank in range(self.machine.size)]

        def array_at(rank, offset):
            n = model.grads.size
            return np.frombuffer(memory[rank], model.grads.dtype, n, offset=offset)

        self.grads = [array_at(rank, 0) for rank in range(self.machine.size)]
        shared = [array_at(0, size * (1 + i)) for i in range(len(private))]

        # A page of memory is placed near the core that first writes to it: each rank writes its
        # shards.
        for own_shard in self.shards:
            for target, source in zip(shared, private, strict=True):
                target[own_shard] = source[own_shard]
        self.finish()
        model.use_memory(shared[0], self.grads[self.machine.rank])
        optimizer.state = dict(zip(optimizer.state, shared[1:], strict=True))

    def start(self, grad_slice: slice):
        """This rank's gradients of a layer are complete: sum each slice that is complete on all."""
        self.window.Sync()  # the other ranks see what this one has written
        self.unsummed.append((grad_slice, self.machine.Ibarrier()))
        if not self.overlap:
            self.wait()
        while self.unsummed and self.unsummed[0][1].Test():
            self._sum_first()

    def wait(self):
        from mpi4py import MPI

        while self.unsummed:
            self.unsummed[0][1].Wait()
            self._sum_first()
        MPI.Request.Waitall(self.requests)
        self.requests.clear()

    def finish(self):
        """Wait until all shards of the weights are written. Then no gradients are read any more."""
        self.window.Sync()
        self.machine.Barrier()
        self.window.Sync()

    def _sum_first(self):
        """Sum this rank's shard of the first unsummed slice, which is complete on all ranks."""
        from mpi4py import MPI

        grad_slice, _ = self.unsummed.pop(0)
        own_shard = self._shard(grad_slice)
        self.window.Sync()
        self.total[own_shard] = self.grads[0][own_shard]
        for grads in self.grads[1:]:
            self.total[own_shard] += grads[own_shard]
        if self.same_shard.size > 1:
            request = self.same_shard.Iallreduce(MPI.IN_PLACE, self.total[own_shard])
            self.requests.append(request)

    def _shard(self, layer_slice):
        own = shard(layer_slice.stop - layer_slice.start, self.machine.rank, self.machine.size)
        return slice(layer_slice.start + own.start, layer_slice.start + own.stop)


def choose_reduce(args: argparse.Namespace, comm, model: Model, optimizer: Optimizer) -> str:
    """--reduce, with auto replaced: shared where the ranks of a machine can share memory."""
    from mpi4py import MPI

    # SharedMemoryReducer needs the same number of ranks on every machine, and memory for the
    # gradients of each rank, the weights and the optimizer's state.
    machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
    ranks_here = machine.size
    machine.Free()
    needed = model.grads.nbytes * (ranks_here + 1 + len(optimizer.state)) + MIB
    ranks, is_too_small, free = zip(
        *comm.allgather((ranks_here, needed > free_shared_memory(), free_shared_memory())),
        strict=True,
    )
    problem = None
    if min(ranks) < max(ranks):
        problem = "the machines have different numbers of ranks"
    elif any(is_too_small):
        problem = (
            f"{SHARED_MEMORY} has {min(free) // MIB} MiB free, {needed // MIB} MiB are needed "
            "(in Docker: run --shm-size=1g)"
        )

    if args.reduce != "auto":
        if args.reduce == "shared" and problem:
            raise InputError(f"--reduce shared: {problem}: use --reduce overlap")
        return args.reduce
    if max(ranks) == 1 or problem:
        if comm.rank == 0 and any(is_too_small) and max(ranks) > 1:
            print(f"--reduce overlap: {problem}", file=sys.stderr)
        return "overlap"
    return "shared"


def add_mpi_options(parser: argparse.ArgumentParser, reduce: tuple):
    """The options that the MPI scripts share. reduce: the values of --reduce, except auto."""
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank:
        parser.print_help = lambda file=None: None  # one help text, not one from each rank
    add = parser.add_argument
    add("--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    add(
        "--global-batch-size",
        type=number(int, 1, 10**6),
        metavar="N",
        help="images per step of all ranks together (default: ranks x --batch-size)",
    )
    add(
        "--reduce",
        type=lambda name: "overlap" if name == "messages" else name,  # its name in old commands
        choices=("auto", *reduce),
        default="auto",
        help="how gradients are summed; auto: in shared memory where the ranks of a machine can, "
        "else by messages that overlap the backward pass (default: %(default)s)",
    )
    stall = "end the job when no batch is finished for so long; 0: never (default: %(default)s)"
    seconds = number(float, 0, 10**6)
    add("--stall-timeout", type=seconds, default=120, metavar="SECONDS", help=stall)
    add(
        "--no-overlap",
        dest="overlap",
        action="store_false",
        help="wait for the sum of each slice before the backward pass goes on",
    )


# --------------------------------------------------------------------------------------------------
# PyTorch: what its scripts share
# --------------------------------------------------------------------------------------------------


def keep_freed_memory():
    """Let glibc's malloc keep and reuse freed memory, for all threads alike.

    By default it returns large blocks to the system; each time they are taken again, the kernel
    clears their pages, which can cost half of a float32 step. See mallopt(3).
    """
    import ctypes

    M_ARENA_MAX = -8
    M_MMAP_THRESHOLD = -3
    M_TRIM_THRESHOLD = -1
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def make_torch_resnet(name: str, cifar_stem: bool = True, channels: int = 3, classes: int = 10):
    """torchvision's ResNet of that name: (N, channels, H, W) → logits (N, classes).

    The CIFAR stem is a 3×3 convolution with stride 1 and no pooling: He et al., "Deep Residual
    Learning", 2015, section 4.2. ResNet-50 starts with a scale of zero in each block's last
    normalisation (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1); otherwise its
    loss rises to three times the start before it falls, at the default learning rate.
    """
    from torch import nn

    models = import_torchvision().models
    model = getattr(models, name)(num_classes=classes, zero_init_residual=name == "resnet50")
    if cifar_stem:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    if cifar_stem or channels != 3:
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def make_torch_optimizer(model, args: argparse.Namespace):
    """SGD or Adam, fused: one pass over a tensor, a quarter of the time of single operations."""
    import torch

    if args.optimizer == "adam":
        return torch.optim.Adam(
            model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True
        )
    return torch.optim.SGD(
        model.parameters(),
        args.lr,
        args.momentum,
        weight_decay=args.weight_decay,
        nesterov=getattr(args, "nesterov", False),
        fused=True,
    )


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line.

    The default of --lr depends on --optimizer, that of --warmup on --schedule.
    """

    def __init__(self, script: str, doc: str):
        super().__init__(
            prog=f"{Path(script).stem}.py",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args=None, namespace=None):
        if args is None and re.search("ipykernel|kernel_launcher", sys.argv[0]):
            args = []  # main() in a cell of a notebook: the command line is the kernel's
        args = super().parse_args(args, namespace)
        # A shell leaves the ~ of --log=~/run.csv to the program.
        for name, value in vars(args).items():
            if isinstance(value, str):
                setattr(args, name, expand_home(value))
        if getattr(args, "lr", 0) is None:
            args.lr = 0.001 if args.optimizer == "adam" else 0.01
        if getattr(args, "warmup", 0) is None:
            args.warmup = {"constant": 0.0, "cosine": 0.05, "one-cycle": 0.3}[args.schedule]
        return args


def expand_home(path: str) -> str:
    """The path with a leading ~ or ~user replaced; InputError if there is no such home folder."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise InputError(f"{path}: there is no such home folder: write the whole path")
    return expanded


def number(kind, low, high, exclusive: bool = False) -> Callable:
    """An argparse type: a finite number from low to high (exclusive: between them)."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        is_inside = low < value < high if exclusive else low <= value <= high
        if not is_inside:
            word = "a whole number" if kind is int else "a number"
            bounds = (
                f"more than {low} and less than {high}" if exclusive else f"from {low} to {high}"
            )
            message = f"{text!r} is not {word} {bounds}".replace(" to inf", " up")
            raise argparse.ArgumentTypeError(message)
        return value

    return parse


def make_parser(
    script: str,
    doc: str,
    models: tuple = ("cnn",),
    batch_size: int = 32,
    epochs: int | None = 10,
    model: Callable | None = None,
) -> Parser:
    """The options that all training scripts share.

    script: its __file__. The log is named after it, so that a copy does not overwrite the
    original's. model: the argparse type of --model where others than `models` are possible.
    """
    script = Path(script).stem
    parser = Parser(script, doc)
    add = parser.add_argument
    count = number(int, 1, 10**6)
    fraction = number(float, 0, 1)
    positive = number(float, 0, math.inf, exclusive=True)

    if model:
        names = f"network: {', '.join(models)}, or your own, file.py:Net (default: {models[0]})"
        add("--model", type=model, default=models[0], help=names)
    else:
        add("--model", choices=models, default=models[0], help="network (default: %(default)s)")
    add("--epochs", type=count, default=epochs, help="default: %(default)s")
    add(
        "--batch-size",
        type=count,
        default=batch_size,
        help="images per step (default: %(default)s)",
    )
    add("--optimizer", choices=("sgd", "adam"), default="sgd", help="default: %(default)s")
    add("--lr", type=positive, help="learning rate (default: 0.01, adam: 0.001)")
    add("--momentum", type=fraction, default=0.9, help="SGD momentum (default: %(default)s)")
    add("--weight-decay", type=fraction, default=0.0, help="default: %(default)s")

    folder = (
        "folder with CIFAR-10, or with a data set that experiments/import_data.py has prepared "
        "(default: $CIFAR10_DIR, else ./data)"
    )
    add("--data-dir", help=folder)
    dataset = (
        "auto: what is in --data-dir, else CIFAR-10 is downloaded; if neither was named and there "
        "is no network, synthetic images (default: %(default)s)"
    )
    add("--dataset", choices=("auto", "cifar10", "synthetic"), default="auto", help=dataset)
    subset = number(int, 1, 10**9)
    add("--subset", type=subset, metavar="N", help="the first N training and N/5 test images")
    seed = number(int, 0, 2**32 - 1)
    add("--seed", type=seed, default=42, help="seed for weights and data order (default: 42)")

    log = f"results/{script}.csv"
    # torchrun takes --log for one of its own options, wherever it stands.
    path = "default: %(default)s; with a .json beside it; torchrun needs the longer name"
    add("--log", "--log-file", metavar="FILE", default=log, help=path)
    metrics = f"results/{script}_metrics.npz"
    add("--save-metrics", metavar="FILE", default=metrics, help="default: %(default)s")
    confusion = "write the confusion matrix of the last validation here, as CSV"
    add("--confusion", metavar="FILE", help=confusion)
    checkpoint = "save here after each epoch, every --checkpoint-every and when interrupted"
    add("--checkpoint", metavar="FILE", help=checkpoint)
    every = "save during an epoch too, this often (default: %(default)s)"
    seconds = number(float, 0, 10**9)
    add("--checkpoint-every", type=seconds, default=60, metavar="SECONDS", help=every)
    resume = "resume from --checkpoint, exactly as if never interrupted"
    add("--resume", action="store_true", help=resume)
    trace = "write a timeline of five steps here, for ui.perfetto.dev (Chrome's trace format)"
    add("--trace", metavar="FILE", help=trace)
    add("--quiet", action="store_true", help="print errors and the last line only")
    return parser


def add_recipe_options(parser: Parser, augment: str = "off"):
    """Options for accuracy: --augment (with this default), --schedule, --warmup."""
    add = parser.add_argument
    crops = "random crops and flips (default: %(default)s)"
    add("--augment", choices=("on", "off"), default=augment, help=crops)
    schedules = ("constant", "cosine", "one-cycle")
    schedule = "learning-rate schedule; --lr is the peak (default: %(default)s)"
    add("--schedule", choices=schedules, default="constant", help=schedule)
    warmup = (
        "fraction of the training in which the learning rate rises "
        "(default: 0; cosine: 0.05; one-cycle: 0.3)"
    )
    fraction = number(float, 0, 1, exclusive=True)
    add("--warmup", type=fraction, metavar="FRACTION", help=warmup)


def describe_error(error: BaseException) -> str:
    """What to print of an uncaught error: one line where memory ran out, otherwise its traceback.

    NumPy and CuPy raise MemoryError, PyTorch and CUDA RuntimeError.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        reason = f" ({text})" if text else ""
        return f"error: out of memory: use a smaller --batch-size or --subset{reason}"
    return "".join(traceback.format_exception(error)).rstrip()


def run_main(main: Callable, rank: int = 0):
    """Call main() and end the process with the exit status that the README promises.

    rank: of several processes that raise the same error only rank 0 prints it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the program that started this one
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            # A file name that the terminal cannot show must not end a run.
            getattr(sys, name).reconfigure(errors="backslashreplace")
    previous_hook = sys.excepthook
    if previous_hook is sys.__excepthook__:  # that of abort_on_exception() stays
        sys.excepthook = lambda _, error, __: print(describe_error(error), file=sys.stderr)
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread() else ():
        # A shell's background jobs ignore SIGINT. So do handlers that are there.
        if not callable(signal.getsignal(number)):
            handlers[number] = signal.signal(number, signal.default_int_handler)
    line = None
    try:
        status = main()
    except SystemExit as end:  # --help
        status = end.code
    except (InputError, TrainingError, OSError) as error:
        line = f"error: {' '.join(str(error).split())}"
        status = 2 if isinstance(error, InputError) else 1
    except (Interrupted, KeyboardInterrupt) as error:
        line = str(error) or "interrupted"
        status = 130
    if line and rank == 0:
        print(line, file=sys.stderr)
    # A notebook's %run goes on after this in the same process.
    sys.excepthook = previous_hook
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.exit(status)


def find_mpirun() -> str:
    """The mpirun beside this Python, which belongs to its mpi4py, else the first in PATH."""
    beside_python = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside_python) if beside_python.exists() else shutil.which("mpirun")
    if not mpirun:
        raise InputError("mpirun is not installed: run make setup")
    return mpirun


def stop_processes(processes: list, timeout: float = 3.0):
    """End processes (Popen) and all that they have started: SIGTERM, then SIGKILL.

    mpirun hands SIGTERM on to its ranks. timeout: seconds that they have after each signal.
    """
    import psutil

    family = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            family += [parent, *parent.children(recursive=True)]
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=timeout)
    for relative in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            relative.kill()
    psutil.wait_procs(alive, timeout=timeout)
    for process in processes:
        process.wait()
