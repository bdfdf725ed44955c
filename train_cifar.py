"""Train ResNet-50, ResNet-18 or a small CNN on CIFAR-10 with PyTorch, and measure the loading.

The images come from memory, from a folder of pictures or from S3 (downloaded first, streamed
picture by picture, or read in shards of thousands). Worker threads prepare batches ahead of the
training. The log separates waiting for data from total time, batch by batch. Every source but S3
shards gives the same images in the same order with the same augmentation, whatever --workers is.
--model file.py:Net trains a network of one's own.

    make train-cifar
    make train-cifar-s3
    python train_cifar.py --model resnet18 --epochs 1 --subset 5000 --workers 1
    python train_cifar.py --model cnn --batch-size 32 --amp off --augment off --epochs 10
    python train_cifar.py --model resnet50 --epochs 30 --batch-size 128 --lr 0.05 --device cuda
    python train_cifar.py --epochs 2 --subset 5000 --checkpoint results/resnet.pt --resume
    torchrun --standalone --nproc-per-node 2 train_cifar.py --model cnn --epochs 1
    python train_cifar.py --load-only --subset 5000 --epochs 3
    python train_cifar.py --export results/pictures --subset 5000
    python train_cifar.py --source disk --data-dir results/pictures --workers 2 --epochs 1

The ladder from the script as tutorials write it to the default, one option per rung. --compile is
one more; whether it pays depends on the machine.

    python train_cifar.py --model resnet18 --loader torchvision --memory-format nchw --amp off
    python train_cifar.py --model resnet18 --loader torchvision --amp off  # + channels_last memory
    python train_cifar.py --model resnet18 --loader torchvision            # + bfloat16
    python train_cifar.py --model resnet18                                 # + batched loading

Result: ResNet-50, batch 64, on 2 cores: 16 images/s, 1.59 (1.46–2.00) times PyTorch's 10 in
float32, NCHW and with a DataLoader (AMD EPYC; median (min–max) of 11 paired samples). ResNet-18
reaches 88.88% on the test images in 13 epochs, 102 minutes on 2 cores in bfloat16 (make accuracy).
"""

import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import math
import os
import random
import re
import shutil
import ssl
import statistics
import sys
import threading
import time
import traceback
import types
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

if os.environ.get("RANK"):
    # OpenMP, which PyTorch loads, would bind the threads of every process to the same cores.
    os.environ["OMP_PROC_BIND"] = "false"
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.nn import functional as F

from common import (
    CLASSES,
    DATASET_FILE,
    FETCH_TRAIN,
    FETCH_VALIDATE,
    IMAGE_SHAPE,
    MEAN,
    MIB,
    OUTPUT_STD,
    PAD,
    STD,
    InputError,
    RunLog,
    StopSignal,
    TorchCheckpoint,
    TrainingError,
    add_recipe_options,
    atomic_write,
    augment,
    available_cores,
    check_network_size,
    check_outputs,
    cpu_quota,
    dataset_option,
    describe_folder,
    draw_augmentation,
    epoch_order,
    expand_home,
    has_bfloat16,
    import_torchvision,
    keep_freed_memory,
    label_type,
    launched_processes,
    learning_rate,
    load_batch,
    load_dataset,
    make_parser,
    make_synthetic,
    make_torch_optimizer,
    make_torch_resnet,
    number,
    require_finite,
    run_main,
    save_and_stop,
)

# What a CPU trains that is given neither --epochs nor --subset
CPU_EPOCHS = 2
CPU_RECIPE = {"batch_size": 16, "optimizer": "adam", "schedule": "one-cycle"}  # learns fast
CPU_SECONDS = 120  # of training: choose_cpu_subset() finds out how many images that are
CPU_IMAGES = 5000  # where that cannot be measured
FULL_EPOCHS = 10
TEST_BATCH = 250  # images in a batch of the evaluation
AHEAD = 4  # batches that a worker may be ahead of the training

STREAM_SHARDS = 4  # random stream of the shard order; common.py uses 1 to 3 of the same seed
IN_FLIGHT = 16  # S3 requests that a worker has under way at once
SHARD_IMAGES = 5000  # 15 MB
SHUFFLED_SHARDS = 2  # shards whose images are mixed, so both must be in memory
KEPT_SHARDS = 3 * SHUFFLED_SHARDS  # shards in memory at once
MANIFEST = "manifest.json"
MAX_CHECKSUM_ERRORS = 3  # times that an object may arrive damaged

TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")  # beside train/
# What file managers, archivers and file systems put beside pictures
STRAY_NAMES = ("__macosx", "@eadir", "lost+found", "$recycle.bin", "thumbs.db", "desktop.ini")
MAX_CLASSES = 1000
EXIF_ORIENTATION = 0x0112
HAS_EXIF = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # in Pillow's info
STATISTICS_OF = 5000  # pictures from which their mean and deviation are taken

RANK = os.environ.get("RANK", "")  # of this process; torchrun sets it
RANK = int(RANK) if RANK.isdecimal() else 0
MODELS = ("resnet50", "resnet18", "cnn")
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class LoadingError(TrainingError):
    """Images that cannot be read. Of several processes it may concern one alone."""


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


def make_model(name: str, image_shape: tuple = IMAGE_SHAPE, classes: int = 10) -> nn.Module:
    """The network of that name for images of image_shape (H, W, C): (N, C, H, W) → (N, classes).

    `cnn` is the network of common.make_cnn(), `resnet18` and `resnet50` are torchvision's with a
    stem for small images; `file.py:Net` is your own.
    """
    if ":" in name:
        return make_own_model(name, image_shape, classes)
    h, w, channels = image_shape
    if name != "cnn":
        return make_torch_resnet(name, channels=channels, classes=classes)
    check_network_size(name, image_shape)
    model = nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # 32 × 32 → 16 × 16
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # 16 × 16 → 8 × 8
        nn.Flatten(),  # 64 channels × 8 × 8 = 4096
        nn.Linear(64 * (h // 4) * (w // 4), 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )
    for layer in model:
        if hasattr(layer, "weight"):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    nn.init.normal_(model[-1].weight, std=OUTPUT_STD)
    return model


def make_own_model(name: str, image_shape: tuple, classes: int) -> nn.Module:
    """The network `file.py:Net`, called with num_classes if it takes that, and tried once.

    Raises InputError, with the line, if it cannot be made or returns another shape than logits.
    """
    file, _, attribute = name.rpartition(":")
    h, w, channels = image_shape
    x = torch.zeros(2, channels, h, w)
    doing = f"cannot be loaded from {file}"
    try:
        spec = importlib.util.spec_from_file_location(f"own_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.insert(0, str(Path(file).resolve().parent))  # for what it imports
        spec.loader.exec_module(module)
        make = getattr(module, attribute)
        takes = inspect.signature(make).parameters.values()
        has_classes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in takes)
        net = make(num_classes=classes) if has_classes else make()
        if not isinstance(net, nn.Module):
            raise TypeError(f"it is a {type(net).__name__}, not an nn.Module")
        doing = f"cannot take images (2, {channels}, {h}, {w})"
        with torch.no_grad():
            shape = tuple(net.eval()(x).shape)
    except Exception as error:  # anything may be wrong in somebody's own file
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).resolve() == Path(file).resolve()]
        line = f", line {own[-1].lineno}" if own else ""
        raise InputError(
            f"--model {name}: {doing}{line}: {type(error).__name__}: {error}"
        ) from None
    if shape != (2, classes):
        raise InputError(
            f"--model {name}: it returns {shape} for 2 images, (2, {classes}) is needed: one logit "
            f"for each of {classes} classes; a network that takes num_classes is told the number"
        )
    return net.train()


# --------------------------------------------------------------------------------------------------
# Sources of images: memory, a GPU's memory, one batch, pictures on disk
# --------------------------------------------------------------------------------------------------


class ImageSource:
    """Images that are read by index, by several threads at once.

    labels: (N,) uint8 or uint16. image_shape: (H, W, C). mean, std: with which a batch is
    normalised, one number for each channel.
    """

    labels: np.ndarray
    image_shape: tuple = IMAGE_SHAPE
    mean: tuple = MEAN
    std: tuple = STD

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order (N,) of the epoch's images, a function of (seed, epoch) alone."""
        return epoch_order(len(self.labels), seed, epoch)

    def set_read_order(self, order: np.ndarray) -> None:
        """Announce the indices that read() will be asked for; a source may fetch them ahead."""

    def read(self, index: np.ndarray):
        """The images (n, H, W, C) uint8 and labels (n,) with these indices (n,)."""
        raise NotImplementedError


class InMemorySource(ImageSource):
    """Images in memory, (N, H, W, C) uint8."""

    def __init__(self, images, labels, mean=MEAN, std=STD):
        self.images = images
        self.labels = labels
        self.image_shape = tuple(images.shape[1:])
        self.mean = mean
        self.std = std

    def read(self, index):
        return self.images[index], self.labels[index]


class DeviceSource(ImageSource):
    """An InMemorySource in the memory of a GPU: no batch crosses the bus. CIFAR-10: 180 MB."""

    def __init__(self, source: InMemorySource, device):
        self.labels = source.labels
        self.image_shape = source.image_shape
        self.mean = source.mean
        self.std = source.std
        # np.array() copies: PyTorch warns of arrays that are mapped read-only.
        self._images = torch.from_numpy(np.array(source.images)).to(device)
        self._labels = torch.from_numpy(source.labels.astype(np.int64)).to(device)

    def read(self, index):
        index = torch.from_numpy(index).to(self._images.device)
        return self._images[index], self._labels[index]


class OneBatchSource(ImageSource):
    """Claims to be n images but holds one batch: the upper bound, training without loading."""

    def __init__(self, n, batch_size, seed):
        images, labels, *_ = make_synthetic(min(n, batch_size), seed)
        self.images = images
        self.labels = np.resize(labels, n)

    def read(self, index):
        return self.images[: len(index)], self.labels[: len(index)]


class ImageFolderSource(ImageSource):
    """Pictures on disk, each read when it is needed. pictures: a list of Picture."""

    def __init__(self, pictures: list, image_shape: tuple = IMAGE_SHAPE, deep=(0.0, 65535.0)):
        self.paths = [picture.path for picture in pictures]
        labels = [picture.label for picture in pictures]
        self.labels = np.array(labels, label_type(range(max(labels) + 1)))
        self.image_shape = image_shape
        self.deep = deep

    def read(self, index):
        images = [read_picture(self.paths[i], self.image_shape, self.deep) for i in index]
        return np.stack(images), self.labels[index]


# --------------------------------------------------------------------------------------------------
# Pictures: folders of them as people have them, in any format that Pillow reads
#
# experiments/import_data.py reads them in the same way, once; here each is read when it is needed.
# --------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture file and its label."""

    path: str
    label: int


class PictureInfo(NamedTuple):
    """What examine_picture() finds."""

    size: tuple  # (H, W), upright
    is_gray: bool
    low: float  # the least and largest value of a picture with more than 8 bits, otherwise 0, 255
    high: float


def list_pictures(folder: Path, notes: list | None = None) -> list[tuple[int, str, str]]:
    """[(number, class name, path)] of the files in a folder, in the order of the numbers.

    The classes are the folders in it, with files at any depth, and the numbers count within each;
    or, without folders, files are named <number>_<class>.<ending>. Sorted by number the classes
    alternate, so that a subset has all of them. Hidden and stray files are left out. notes: gets a
    sentence for each folder that is empty.
    """

    def visible(path):
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        return [e for e in entries if e.name[0] != "." and e.name.lower() not in STRAY_NAMES]

    def files_below(path):
        for entry in visible(path):
            if entry.is_dir():
                yield from files_below(entry.path)
            else:
                yield entry.path

    found = []
    class_folders = [entry for entry in visible(folder) if entry.is_dir()]
    for entry in class_folders:
        files = list(files_below(entry.path))
        if any(is_picture_name(path) or examine_picture(path, decode=False) for path in files):
            found += [(i, entry.name, path) for i, path in enumerate(files)]
        elif notes is not None:
            notes.append(f"{entry.path}: no pictures in it, so no class")
    if not class_folders:
        for entry in visible(folder):
            # A label has no leading zeros: 20240131_000012.jpg is a date and a time.
            match = re.fullmatch(r"(\d+)_(0|[1-9]\d*|[^\W\d][^.]*)\.\w+", entry.name)
            if match:
                found.append((int(match[1]), match[2], entry.path))
            elif is_picture_name(entry.path):
                raise InputError(
                    f"{entry.path}: the file name has no label: name it <number>_<label>.png, or "
                    "make a folder for each class"
                )
    return sorted(found)


def array_to_picture(pixels: np.ndarray) -> Image.Image:
    """A Pillow picture of an image (H, W, C), C = 1 for gray or 3 for red, green, blue."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def read_picture(path: str, image_shape: tuple, deep: tuple) -> np.ndarray:
    """decode_picture() of a file, resized."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise LoadingError(f"{path} cannot be read ({error.strerror}): put it back") from None
    return decode_picture(data, path, image_shape, resize=True, deep=deep)


def is_picture_name(path: str) -> bool:
    """Whether the file's ending is that of a picture."""
    return Path(path).suffix.lower() in Image.registered_extensions()


def label_pictures(train: list, test: list, names: tuple = ()) -> tuple[list, list, tuple]:
    """Lists of Picture from those of list_pictures(), and the names of the classes, which are
    `names` if given. Raises InputError for a class that has no training pictures."""
    found = {name for _, name, _ in train}
    are_numbers = all(name.isdecimal() for name in found)
    in_files = all(Path(path).stem.endswith(f"_{name}") for _, name, path in train)
    if not names and are_numbers:
        numbers = sorted(map(int, found))
        # A label in a file name counts from 0, and some classes may have no picture; folders are
        # classes by themselves, whatever number is their name.
        if in_files and numbers and numbers[-1] < MAX_CLASSES:
            numbers = range(numbers[-1] + 1)
        names = tuple(map(str, numbers))
    names = names or tuple(sorted(found))
    labels = {name: label for label, name in enumerate(names)}
    if are_numbers and in_files:  # the files have numbers, `names` says what they mean
        labels.update({str(label): label for label in range(len(names))})

    lists = []
    for pictures in (train, test):
        for _, name, path in pictures:
            if name not in labels:
                raise InputError(
                    f"{path}: class {name} has no training pictures: give train/ and test/ the "
                    f"same classes (train/ has {', '.join(sorted(found)[:20])})"
                )
        lists.append([Picture(path, labels[name]) for _, name, path in pictures])
    if not 2 <= len(names) <= MAX_CLASSES:
        raise InputError(f"{len(names)} classes: 2 to {MAX_CLASSES} can be trained")
    return *lists, names


def examine_picture(path: str, decode: bool = True) -> PictureInfo | None:
    """What a file has in it, whatever its ending; None if it is no picture and not named like one.

    decode: look at every pixel, and not at the head of the file alone. Raises LoadingError for what
    cannot be decoded.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if picture.getexif().get(EXIF_ORIENTATION, 1) >= 5:  # EXIF: the camera was held upright
                width, height = height, width
            low, high = 0.0, 255.0
            if is_deep(picture):
                values = np.asarray(picture)
                low, high = float(values.min()), float(values.max())
            elif decode:
                picture.load()
            is_gray = picture.mode in ("1", "L", "LA", "La") or is_deep(picture)
            return PictureInfo((height, width), is_gray, low, high)
    except UnidentifiedImageError:
        if is_picture_name(path):
            raise LoadingError(f"{path} cannot be decoded: it is no picture") from None
        return None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error …
        if getattr(error, "strerror", None):  # the system's, not Pillow's
            raise LoadingError(f"{path} cannot be read ({error.strerror})") from None
        raise LoadingError(f"{path} cannot be decoded ({error})") from None


def is_deep(picture) -> bool:
    """Whether a Pillow picture is gray with more than 8 bits: 16 or 32, or floating point."""
    return picture.mode[0] in "IF"


def value_range(infos: list[PictureInfo]) -> tuple[float, float]:
    """Which values of gray pictures with more than 8 bits become 0 and 255, the same for all.

    Whole numbers: from 0 to the largest that as many bits can have as the largest value needs.
    Floating point from 0 to 1: that range. Anything else: from the least value to the largest.
    """
    low = min((info.low for info in infos), default=0.0)
    high = max((info.high for info in infos), default=255.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if low >= 0 and all(info.high == int(info.high) for info in infos):
        return 0.0, float(max(2 ** int(high).bit_length() - 1, 255))
    return low, high


def decode_picture(
    data: bytes, name: str, image_shape: tuple = IMAGE_SHAPE, resize=False, deep=(0.0, 65535.0)
) -> np.ndarray:
    """The pixels (H, W, C) uint8 of a picture file, turned upright as its EXIF says.

    image_shape: (H, W, C), C = 1 for gray or 3 for red, green, blue; transparency is ignored.
    resize: scale, with antialiasing, until the picture just covers H × W pixels, and take their
    middle. deep: what becomes 0 and 255 of gray values with more than 8 bits, as value_range() has
    it. Raises LoadingError with the name.
    """
    h, w, channels = image_shape
    try:
        with open_picture(io.BytesIO(data)) as picture:
            picture.load()
            if picture.format == "TIFF" or not HAS_EXIF.isdisjoint(picture.info):  # saves time
                picture = ImageOps.exif_transpose(picture)
            if is_deep(picture):
                low, high = deep
                values = (np.asarray(picture, np.float64) - low) * (255 / ((high - low) or 1))
                picture = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
            if "transparency" in picture.info:  # of a palette: Pillow wants it as a channel first
                picture = picture.convert("RGBA")
            picture = picture.convert("L" if channels == 1 else "RGB")
            if resize and picture.size != (w, h):
                picture = ImageOps.fit(picture, (w, h), Image.Resampling.BICUBIC)
            width, height = picture.size
            pixels = np.asarray(picture).reshape(height, width, channels)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error …
        raise LoadingError(f"{name} cannot be decoded ({error}): replace it") from None
    if (height, width) != (h, w):
        raise LoadingError(f"{name} has {width}x{height} pixels, not {w}x{h}: replace it")
    return pixels


def open_picture(file) -> Image.Image:
    """Image.open(), which tries a dozen formats one after the other, with the usual ones first."""
    try:
        return Image.open(file, formats=("PNG", "JPEG"))
    except UnidentifiedImageError:
        file.seek(0)
        return Image.open(file)


class PictureSet(NamedTuple):
    """Pictures that have been examined, and how to decode them: decode_picture()'s arguments."""

    train: list  # of Picture
    test: list
    image_shape: tuple
    deep: tuple
    notes: list  # sentences for the user: what was left out, or changed


def examine_pictures(
    train: list, test: list, image_size=None, skip_damaged=False, decode=True, parallel_map=map
) -> PictureSet:
    """Look into the files of two lists of Picture before they are used.

    image_size: side in pixels; default: the pictures' own size if all have the same, else 32.
    skip_damaged: leave out what cannot be decoded, instead of an InputError. decode: as in
    examine_picture(). parallel_map: what takes the place of map().
    """
    notes = []
    splits = []
    infos = []
    damaged = []
    strays = []
    for pictures in (train, test):
        kept = []
        examined = parallel_map(functools.partial(try_to_examine, decode=decode), pictures)
        for picture, info in zip(pictures, examined, strict=True):
            if isinstance(info, LoadingError):
                damaged.append(str(info))
            elif info is None:
                strays.append(picture.path)
            else:
                kept.append(picture)
                infos.append(info)
        splits.append(kept)
    if damaged and not skip_damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise InputError(f"{damaged[0]}{more}: replace it, or leave such out with --skip-damaged")
    if damaged:
        notes.append(f"left out, damaged: {len(damaged)}, the first: {damaged[0]}")
    if strays:
        notes.append(f"passed over, no pictures: {len(strays)} files, the first: {strays[0]}")

    sizes = collections.Counter(info.size for info in infos)
    h, w = next(iter(sizes)) if len(sizes) == 1 else (32, 32)
    if image_size:
        h, w = image_size, image_size
    if len(sizes) > 1:
        some = ", ".join(f"{width}x{height}" for (height, width), _ in sizes.most_common(3))
        notes.append(f"{len(sizes)} sizes ({some}{' …' * (len(sizes) > 3)}): resized to {w}x{h}")
    elif image_size and (h, w) not in sizes:
        notes.append(f"resized to {w}x{h}")
    image_shape = (h, w, 1 if all(info.is_gray for info in infos) else 3)
    deep_infos = [info for info in infos if (info.low, info.high) != (0.0, 255.0)]
    deep = value_range(deep_infos)
    if deep_infos:
        notes.append(f"{len(deep_infos)} of more than 8 bits: {deep[0]:g} to {deep[1]:g} scaled")
    return PictureSet(*splits, image_shape, deep, notes)


def try_to_examine(picture: Picture, decode: bool):
    """examine_picture(), with a LoadingError returned, not raised."""
    try:
        return examine_picture(picture.path, decode)
    except LoadingError as error:
        return error


# --------------------------------------------------------------------------------------------------
# S3: a bucket with pictures, shards of them, and a manifest with the checksum of each object
# --------------------------------------------------------------------------------------------------


class ChecksumError(Exception):
    """An object arrived with another length or checksum than the manifest has."""


class ManifestEntry(NamedTuple):
    """An object in the bucket, as the manifest describes it."""

    name: str
    size: int  # bytes
    sha256: str
    images: int  # how many are in it


class S3Settings(NamedTuple):
    """How to reach a bucket, as the AWS configuration and the command line say."""

    credentials: object  # botocore's, which renews the keys of a role
    region: str
    endpoint: str  # for messages: "http://host:port", or "Amazon S3, region"
    bucket_url: str  # a key is appended to it; the bucket is in its host name or in its path
    ca_bundle: bytes | None  # certificates of authorities beside those of the system, PEM
    proxy: str | None
    client: object  # botocore's, for questions about the bucket


def resolve_s3(bucket: str, endpoint_url: str | None) -> S3Settings:
    """Look up all settings where the AWS tools do: environment, ~/.aws, roles.

    botocore, the library of the AWS tools, knows them all: endpoints of single services, regions,
    the style of bucket addresses, certificates, logins. endpoint_url: overrides the configured one.
    """
    # Imported here and not above: only S3 needs these packages.
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    try:
        session = Session()
        session.register_component("data_loader", botocore_loader())
        credentials = session.get_credentials()
        if credentials is not None:
            credentials.get_frozen_credentials()  # a login that has expired fails here, by name
        # The other tools read this variable too, botocore only AWS_DEFAULT_REGION.
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
        region = region or "us-east-1"
        seconds = {"connect_timeout": 5, "read_timeout": 5}
        config = Config(signature_version=UNSIGNED, retries={"max_attempts": 0}, **seconds)
        options = {"region_name": region, "endpoint_url": endpoint_url, "config": config}
        client = session.create_client("s3", **options)
        endpoint = client.meta.endpoint_url.rstrip("/")
        check_endpoint(endpoint)
        bucket_url = find_bucket_url(client, bucket)
        ca_path = session.get_config_variable("ca_bundle")
    except (BotoCoreError, ClientError, ValueError, OSError) as error:
        if endpoint_url:
            check_endpoint(endpoint_url)
        raise InputError(f"the AWS configuration cannot be used: {error}") from None

    if credentials is None:
        raise InputError(
            f"s3://{bucket}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "fill in ~/.aws/credentials"
        )
    if urlsplit(endpoint).hostname.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        endpoint = f"Amazon S3, {region}"
    ca_bundle = read_ca_bundle(ca_path) if ca_path else None
    proxy = find_proxy(bucket_url)
    return S3Settings(credentials, region, endpoint, bucket_url, ca_bundle, proxy, client)


def find_bucket_url(client, bucket: str) -> str:
    """Where botocore would send a request about a bucket: endpoint, region and addressing style."""
    from botocore.awsrequest import AWSResponse

    urls = []

    def answer(request, **_):
        urls.append(request.url)
        return AWSResponse(request.url, 200, {}, types.SimpleNamespace(stream=lambda: [b""]))

    # A handler that answers in place of the network: nothing is sent.
    event = "before-send.s3.HeadBucket"
    client.meta.events.register(event, answer)
    client.head_bucket(Bucket=bucket)
    client.meta.events.unregister(event, answer)
    return urls[0].rstrip("/")


@functools.cache
def botocore_loader():
    """What reads botocore's descriptions of services, megabytes of JSON: once is enough."""
    from botocore.loaders import create_loader

    return create_loader()


def check_endpoint(url: str) -> None:
    """Raise InputError unless the URL has a scheme, a host, and at most a port and a path."""
    if not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s@?#]*)?", url):
        shown = re.sub(r"//.*@", "//…@", url)  # a password is not printed
        raise InputError(f"--endpoint-url {shown}: give http(s)://host:port")


def read_ca_bundle(path: str) -> bytes:
    """The certificates in a file; InputError if there are none."""
    try:
        ssl.create_default_context(cafile=path)
        return Path(path).read_bytes()
    except OSError as error:  # of which SSLError is one
        raise InputError(
            f"AWS_CA_BUNDLE (ca_bundle in ~/.aws/config) {path}: {error.strerror or error}: "
            "give a file with certificates in PEM format"
        ) from None


def find_proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL. This machine itself needs none."""
    parts = urlsplit(url)
    host = parts.hostname
    with contextlib.suppress(ValueError):  # a name, not an address
        if ipaddress.ip_address(host).is_loopback:
            return None
    if host == "localhost" or host.endswith(".localhost"):
        return None
    if urllib.request.proxy_bypass_environment(parts.netloc):  # no_proxy
        return None
    proxies = urllib.request.getproxies_environment()
    return proxies.get(parts.scheme) or proxies.get("all")


class Bucket:
    """The objects under s3://bucket/prefix, fetched with bounded retries and verified.

    Credentials, region and endpoint come from where the AWS tools look: the environment, ~/.aws, a
    role. retry_timeout: seconds for which a failing request is repeated.
    """

    def __init__(self, url: str, endpoint_url: str | None = None, retry_timeout: float = 60.0):
        match = re.fullmatch(r"s3://([a-z0-9][a-z0-9._-]+)((?:/[^/]+)*)/?", url)
        if not match or {".", ".."} & set(match[2].split("/")) or not match[2].isprintable():
            raise InputError(f"{url!r}: not of the form s3://bucket/prefix")
        self.url = url.rstrip("/")
        self.bucket = match[1]
        self.prefix = match[2].strip("/") or None
        self.settings = resolve_s3(self.bucket, endpoint_url)

        self.retry_timeout = retry_timeout
        self.read_timeout = min(max(retry_timeout, 1), 20)  # seconds without a byte
        self.stopped = threading.Event()  # set: nothing is retried any more
        self.failure = None  # the message of the first request that gave up
        self._thread = threading.local()

    def connect(self):
        """A new client, an obstore S3Store."""
        from obstore.store import S3Store

        settings = self.settings
        options = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(minutes=10),
            "read_timeout": timedelta(seconds=self.read_timeout),
            # A proxy for no host is how to say that none is to be used.
            "proxy_url": settings.proxy or "http://127.0.0.1",
        }
        if not settings.proxy:
            options["proxy_excludes"] = urlsplit(settings.bucket_url).hostname
        if settings.ca_bundle:
            options["root_certificate"] = settings.ca_bundle
        return S3Store(
            self.bucket,
            prefix=self.prefix,
            # The bucket is in this URL already, which obstore calls virtual-hosted style. The
            # second name is the one that $AWS_ENDPOINT_URL_S3 would override.
            endpoint=settings.bucket_url,
            aws_endpoint_url_s3=settings.bucket_url,
            virtual_hosted_style_request=True,
            region=settings.region,
            client_options=options,
            retry_config={"max_retries": 0},  # retry() does it, and verifies checksums too
            credential_provider=self._get_credentials,
        )

    def client(self):
        """The calling thread's own client."""
        if not hasattr(self._thread, "client"):
            self._thread.client = self.connect()
        return self._thread.client

    def _get_credentials(self):
        key = self.settings.credentials.get_frozen_credentials()
        return {
            "access_key_id": key.access_key,
            "secret_access_key": key.secret_key,
            "token": key.token,
            # The keys of a role change: obstore asks again then.
            "expires_at": datetime.now(timezone.utc) + timedelta(minutes=10),
        }

    def describe(self, key: str) -> str:
        """The object, its endpoint and the proxy on the way, for messages."""
        place = f"{self.url}/{key} at {self.settings.endpoint}"
        if self.settings.proxy:
            host = urlsplit(self.settings.bucket_url).hostname
            proxy = re.sub(r"//.*@", "//…@", self.settings.proxy)  # a password is not printed
            place += f" through the proxy {proxy} (no_proxy={host} would go without it)"
        return place

    def fetch(self, client, entry: ManifestEntry):
        """The bytes of an object, in a buffer, as they were when the manifest was made."""
        import obstore

        def get_and_verify():
            data = obstore.get(client, entry.name).bytes()
            verify(entry, data)
            return data

        return self.retry(entry.name, get_and_verify)

    def retry(self, key: str, action: Callable):
        """Return action(), repeated while it fails in a way that may pass.

        Raises LoadingError with the names of object and endpoint: at once for a failure that will
        not pass, after retry_timeout seconds for others, and when an object has arrived damaged
        MAX_CHECKSUM_ERRORS times. That also ends the retries of all other threads, which then raise
        the same error: the first one is the reason why the run ends.
        """
        from obstore.exceptions import BaseError

        started = time.monotonic()
        checksum_errors = 0
        for attempt in itertools.count(1):
            try:
                return action()
            except ChecksumError as error:
                checksum_errors += 1
                problem = str(error)
                permanent = checksum_errors == MAX_CHECKSUM_ERRORS
            except (BaseError, OSError) as error:  # for a missing object it is FileNotFoundError
                failure = self.explain(error)
                problem = failure.words + (f": {failure.remedy}" if failure.remedy else "")
                permanent = failure.is_permanent

            # Exponential back-off with jitter: threads that failed together do not all come back
            # at the same moment.
            pause = min(0.1 * 2 ** min(attempt, 6), 5) * random.uniform(0.5, 1)
            passed = time.monotonic() - started
            tried = f", tried {attempt} times in {passed:.0f} s" if attempt > 1 else ""
            message = f"{self.describe(key)}: {problem}{tried}"

            if permanent or passed + pause > self.retry_timeout:
                self.stop(message)
                raise LoadingError(self.failure)
            if self.stopped.wait(pause):  # pauses, unless another thread has stopped the retries
                raise LoadingError(self.failure or message)

    def stop(self, failure: str | None = None) -> None:
        """End all retries. failure: the reason; the first one is kept."""
        self.failure = self.failure or failure
        self.stopped.set()

    def explain(self, error: Exception) -> "S3Failure":
        """What an obstore exception says, with the region's name where the bucket is elsewhere."""
        failure = describe_s3_error(error)
        if failure.words == OTHER_REGION:
            region = self._find_region()
            if region:
                failure = failure._replace(remedy=f"set AWS_REGION={region}")
        return failure

    def _find_region(self):
        """The region that the bucket is in, a header of every answer; None if there is none."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = self.settings.client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            answer = error.response
        except BotoCoreError:
            return None
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return headers.get("x-amz-bucket-region")

    def manifest(self) -> dict:
        """The manifest: "dataset", "fingerprint", and lists of ManifestEntry as "train", "test",
        "train_shards", "test_shards".

        Raises InputError where the bucket, the prefix or the credentials are wrong.
        """
        text = self.read_manifest()
        if text is None:
            raise InputError(
                f"{self.describe(MANIFEST)}: 404 Not Found (NoSuchKey): put the data there with "
                "--export"
            )
        digest, _, body = text.partition(b"\n")
        if hashlib.sha256(body).hexdigest() != digest.decode(errors="replace"):
            raise LoadingError(
                f"{self.describe(MANIFEST)}: damaged: put the data there again with --export"
            )
        content = json.loads(body)
        manifest = {"dataset": content["dataset"], "fingerprint": digest.decode()}
        manifest["about"] = describe_data(content)
        for kind, rows in content["objects"].items():
            manifest[kind] = [ManifestEntry(*row) for row in rows]
        return manifest

    def read_manifest(self) -> bytes | None:
        """The bytes of the manifest; None if there is none.

        Raises InputError where no S3 answers, or bucket or credentials are wrong.
        """
        text = self.retry(MANIFEST, self._get_manifest)
        if text is not None and text.lstrip()[:1] == b"<":
            raise InputError(f"{self.describe(MANIFEST)}: {WEB_PAGE}: {CONSOLE_REMEDY}")
        return text

    def _get_manifest(self):
        import obstore
        from obstore.exceptions import BaseError

        try:
            return bytes(obstore.get(self.client(), MANIFEST).bytes())
        except (BaseError, OSError) as error:
            failure = self.explain(error)
            if failure.code == "NoSuchKey":
                return None
            if not failure.is_permanent:
                raise
            remedy = failure.remedy or "look at credentials and endpoint"
            message = f"{self.describe(MANIFEST)}: {failure.words}: {remedy}"
            raise InputError(message) from None


def verify(entry: ManifestEntry, data) -> None:
    """Raise ChecksumError unless the data is what the manifest describes."""
    if len(data) != entry.size:
        raise ChecksumError(f"{len(data)} bytes arrived instead of {entry.size}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ChecksumError("its checksum is wrong")


class S3Failure(NamedTuple):
    """Why a request failed."""

    words: str
    is_permanent: bool  # the same request will fail again
    remedy: str = ""  # what to do, if that is known
    code: str = ""  # S3's own name of the error, such as NoSuchBucket


OTHER_REGION = "the bucket is in another region"
WEB_PAGE = "a web page, no S3, answers there"
CONSOLE_REMEDY = "look at the endpoint: S3 often has another port or path than its console"

# By S3's code of the error.
S3_REMEDIES = {
    "AccessDenied": "look at what these credentials permit",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the bucket's region",
    "ExpiredToken": "log in again, or renew the credentials",
    "InvalidAccessKeyId": "look at the credentials",
    "InvalidObjectState": "the object is archived: restore it first",
    "InvalidToken": "log in again, or renew the credentials",
    "NoSuchBucket": "look at the bucket's name and the endpoint, or make the bucket",
    "QuotaExceeded": "make room in the storage",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "SecondLevelDomainForbidden": "set addressing_style = virtual below s3 = in ~/.aws/config",
    "SignatureDoesNotMatch": "look at the secret key",
    "XMinioStorageFull": "make room in the storage",
}

# By the name that the TLS library gives to what is wrong with a certificate.
CERTIFICATE_PROBLEMS = {
    "UnknownIssuer": (
        "its certificate is of an unknown authority",
        "set AWS_CA_BUNDLE to a file with the certificate of that authority",
    ),
    "NotValidForName": ("its certificate is for another host", "use the name in the certificate"),
    "Expired": ("its certificate has expired", "renew it, or set the clock of this machine"),
    "NotValidYet": ("its certificate is not valid yet", "set the clock of this machine"),
}


def describe_s3_error(error: Exception) -> S3Failure:
    """What an obstore exception says, whose text ends in a dump of the errors that led to it."""
    text = str(error)
    answer = re.search(r"status code: (\d+)([ \w]*)", text)  # "status code: 404 Not Found"
    if answer:
        return describe_answer(int(answer[1]), answer[2].strip(), text)
    if "redirect without LOCATION" in text:
        return S3Failure(OTHER_REGION, True, S3_REMEDIES["AuthorizationHeaderMalformed"])
    certificate = re.search(r"InvalidCertificate\(\s*(\w+?)(Context)?\b", text)
    if certificate:
        words, remedy = CERTIFICATE_PROBLEMS.get(
            certificate[1], (f"its certificate is refused ({certificate[1]})", "replace it")
        )
        return S3Failure(words, True, remedy)
    if "InvalidContentType" in text:
        return S3Failure("no TLS is spoken there", True, "try http:// in place of https://")
    if "TimedOut" in text or "timed out" in text:
        return S3Failure("no answer in time", False)
    login = re.search(r"credential provider: (\w+): (.*)", text)  # botocore's error and its words
    if login:
        return S3Failure(login[2], "Token" in login[1])  # a login that has expired, or an outage
    cause = re.search(r'(?:message|error): "([^"]+)"', text)
    words = cause[1] if cause else text.partition("\n")[0].rpartition(" - ")[2]
    return S3Failure(words, "BadScheme" in text)


def describe_answer(status: int, reason: str, text: str) -> S3Failure:
    """The same of an answer with that HTTP status; the text has its body."""
    found = re.search(r"<Code>(\w+)</Code>", text)
    code = found[1] if found else ""
    words = f"{status}{reason and ' ' + reason}" + (f" ({code})" if code else "")
    remedy = S3_REMEDIES.get(code, "")
    region = re.search(r"expecting '([\w-]+)'", text)
    if region:
        words += f": {OTHER_REGION}"
        remedy = f"set AWS_REGION={region[1]}"
    if not code and "<html" in text.lower():
        words += f": {WEB_PAGE}"
        remedy = CONSOLE_REMEDY
    # 408 is a time-out and 429 too many requests: both may pass, as may all 5xx but a full storage.
    is_permanent = 300 <= status < 500 and status not in (408, 429)
    return S3Failure(words, is_permanent or status == 507, remedy, code)


def describe_data(content: dict) -> dict:
    """image_shape, classes, mean and std from a manifest; older ones are of CIFAR-10's."""
    return {
        "image_shape": tuple(content.get("image_shape", IMAGE_SHAPE)),
        "classes": tuple(content.get("classes", CLASSES)),
        "mean": tuple(content.get("mean", MEAN)),
        "std": tuple(content.get("std", STD)),
    }


class S3Pictures(ImageSource):
    """Pictures in a bucket, each fetched when it is needed. Nothing is kept.

    Each of `readers` threads that call read() may have IN_FLIGHT requests under way.
    """

    def __init__(
        self,
        bucket: Bucket,
        entries: Sequence[ManifestEntry],
        readers: int = 1,
        image_shape: tuple = IMAGE_SHAPE,
    ):
        self.bucket = bucket
        self.entries = entries
        self.image_shape = image_shape
        self.labels = labels_of(entries)
        self._pool = ThreadPoolExecutor(IN_FLIGHT * max(readers, 1))

    def read(self, index):
        entries = [self.entries[i] for i in index]
        fetch = functools.partial(self.bucket.fetch, self.bucket.client())
        images = []
        # map() keeps the order of the entries, whichever arrives first.
        for entry, data in zip(entries, self._pool.map(fetch, entries), strict=True):
            name = self.bucket.describe(entry.name)
            images.append(decode_picture(data, name, self.image_shape))
        return np.stack(images), self.labels[index]


class S3Shards(ImageSource):
    """Shards in a bucket, fetched whole; at most KEPT_SHARDS are in memory at once.

    labels: of the images that are wanted, from the first on. cache_dir: folder that keeps all
    shards on disk. readers: threads that fetch; with at least one, they fetch ahead of the use.
    """

    def __init__(
        self,
        bucket: Bucket,
        entries,
        labels,
        cache_dir=None,
        readers: int = 0,
        image_shape: tuple = IMAGE_SHAPE,
        classes: int = 10,
    ):
        self.bucket = bucket
        self.labels = labels
        self.image_shape = image_shape
        self.classes = classes
        self.cache_dir = Path(cache_dir) if cache_dir else None
        # Shard s has the images bounds[s] to bounds[s + 1] - 1. After the last label no image is
        # wanted: a subset may end within a shard.
        ends = np.cumsum([entry.images for entry in entries])
        self.entries = entries[: np.searchsorted(ends, len(labels)) + 1]
        self.bounds = np.minimum([0, *ends[: len(self.entries)]], len(labels))

        self.shards_ahead = SHUFFLED_SHARDS if readers else 0
        self._read_order = list(range(len(self.entries)))
        self._kept = collections.OrderedDict()  # shard → Future of its records, last used last
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max(readers, 1))

    def order(self, seed, epoch):
        """Shard after shard in random order, the images of SHUFFLED_SHARDS mixed.

        A shuffle of all images would need all shards for each batch.
        """
        rng = np.random.default_rng([seed, STREAM_SHARDS, epoch])
        shards = rng.permutation(len(self.entries))
        images = [np.arange(self.bounds[s], self.bounds[s + 1]) for s in shards]
        order = []
        for start in range(0, len(images), SHUFFLED_SHARDS):
            mixed = np.concatenate(images[start : start + SHUFFLED_SHARDS])
            order.append(rng.permutation(mixed))
        return np.concatenate(order)

    def set_read_order(self, order):
        """Note in which order the shards are needed, so that they can be fetched ahead."""
        shards, first_use = np.unique(self._shard_of(order), return_index=True)
        with self._lock:
            self._read_order = shards[np.argsort(first_use)].tolist()

    def _shard_of(self, index):
        """The shards (n,) that hold these images: bounds[s] <= i < bounds[s + 1]."""
        return np.searchsorted(self.bounds, index, side="right") - 1

    def read(self, index):
        images = np.empty((len(index), *self.image_shape), np.uint8)
        labels = np.empty(len(index), self.labels.dtype)
        shard_of = self._shard_of(index)
        for s in np.unique(shard_of):
            here = shard_of == s  # the places in the batch that this shard fills
            records = self._get_records(s)[index[here] - self.bounds[s]]
            images[here], labels[here] = decode_records(records, self.image_shape)
        return images, labels

    def _get_records(self, s):
        """The records (n, bytes) uint8 of shard s; starts to fetch the next shards too."""
        with self._lock:
            # A Future takes the place of the records at once, so that several threads that need a
            # shard wait for the same request.
            for shard in self._shards_from(s):
                if shard not in self._kept:
                    self._kept[shard] = self._pool.submit(self._load_shard, self.entries[shard])
                self._kept.move_to_end(shard)
            future = self._kept[s]
            while len(self._kept) > KEPT_SHARDS:
                self._kept.popitem(last=False)  # the one longest unused
        return future.result()

    def _shards_from(self, s):
        """Shard s and the ones that are needed next."""
        if s not in self._read_order:
            return [s]
        place = self._read_order.index(s)
        return self._read_order[place : place + 1 + self.shards_ahead]

    def _load_shard(self, entry):
        """The records of a shard, from the cache if it has them."""
        data = self._read_cache(entry)
        if data is None:
            data = self.bucket.fetch(self.bucket.client(), entry)
            self._write_cache(entry, data)
        record_bytes = self.labels.itemsize + math.prod(self.image_shape)
        problem = len(data) != entry.images * record_bytes
        if not problem:
            records = np.frombuffer(data, np.uint8).reshape(-1, record_bytes)
            _, labels = decode_records(records, self.image_shape)
            problem = labels.max() >= self.classes
        if problem:
            place = self.bucket.describe(entry.name)
            last = self.classes - 1
            raise LoadingError(f"{place}: not {entry.images} images with labels up to {last}")
        return records

    def _read_cache(self, entry):
        """The bytes of a shard; None if they are not there or damaged."""
        if self.cache_dir is None:
            return None
        try:
            data = (self.cache_dir / f"{entry.sha256}.bin").read_bytes()
            verify(entry, data)
        except (OSError, ChecksumError):
            return None
        return data

    def _write_cache(self, entry, data):
        """Keep a shard on disk: the rename makes it appear there whole or not at all."""
        if self.cache_dir is None:
            return
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        part = self.cache_dir / f"{entry.sha256}.{os.getpid()}"
        part.write_bytes(data)
        part.replace(self.cache_dir / f"{entry.sha256}.bin")


def labels_of(entries: Sequence[ManifestEntry]) -> np.ndarray:
    """The labels (N,) of pictures, in which their names end: "train/00012_7.png"."""
    labels = [int(re.search(r"_(\d+)\.\w+$", entry.name)[1]) for entry in entries]
    return np.array(labels, label_type(range(max(labels, default=0) + 1)))


def encode_records(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images (n, H, W, C) and labels (n,) in CIFAR-10's binary layout, (n, bytes) uint8: the label
    in one byte (uint16: in two, the lower first), then a plane for each channel."""
    label_bytes = labels.itemsize
    records = np.empty((len(labels), label_bytes + math.prod(images.shape[1:])), np.uint8)
    little_endian = np.ascontiguousarray(labels, labels.dtype.newbyteorder("<"))
    records[:, :label_bytes] = little_endian.view(np.uint8).reshape(-1, label_bytes)
    records[:, label_bytes:] = images.transpose(0, 3, 1, 2).reshape(len(labels), -1)
    return records


def decode_records(records: np.ndarray, image_shape: tuple = IMAGE_SHAPE):
    """The reverse of encode_records(): images (n, H, W, C) and labels (n,)."""
    h, w, channels = image_shape
    label_bytes = records.shape[1] - math.prod(image_shape)
    planes = records[:, label_bytes:].reshape(-1, channels, h, w)
    labels = np.ascontiguousarray(records[:, :label_bytes]).view(f"<u{label_bytes}")
    return planes.transpose(0, 2, 3, 1), labels[:, 0]


# --------------------------------------------------------------------------------------------------
# Processes, threads, precision
# --------------------------------------------------------------------------------------------------


class ProcessGroup:
    """The processes that train together: this one's rank, their number, sums over all of them."""

    def __init__(self, rank=0, size=1, local_size=1, device=torch.device("cpu")):  # noqa: B008
        self.rank = rank
        self.size = size
        self.local_size = local_size  # processes on this machine
        self.device = device

    def shard(self, index: np.ndarray) -> np.ndarray:
        """This rank's part of an array; the first ranks have one more where it does not divide."""
        return np.array_split(index, self.size)[self.rank]

    def sum(self, *values):
        """The values summed over all ranks."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()


def join_process_group(args: argparse.Namespace) -> ProcessGroup:
    """Meet the other processes under torchrun, which sets RANK and its like; otherwise be alone."""
    device = torch.device(args.device)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = {name: os.environ.get(name) or "" for name in names}
    if not values["RANK"]:
        launcher, size = launched_processes()
        if size > 1:
            raise InputError(
                f"{launcher} started {size} processes, but each would train alone: use torchrun"
            )
        return ProcessGroup(device=device)

    # Some launchers, such as Kubernetes operators, start one process on each machine and do not
    # set the local variables.
    values["LOCAL_RANK"] = values["LOCAL_RANK"] or "0"
    values["LOCAL_WORLD_SIZE"] = values["LOCAL_WORLD_SIZE"] or "1"
    for name, value in values.items():
        if not value.isdecimal():
            raise InputError(
                f"RANK is set, but {name}={value} is not a number: use torchrun, or unset RANK"
            )
    rank, size, local_rank, local_size = (int(value) for value in values.values())
    if not os.environ.get("MASTER_ADDR") or not os.environ.get("MASTER_PORT"):
        if size == 1:
            return ProcessGroup(device=device)
        raise InputError(
            f"WORLD_SIZE={size}, but MASTER_ADDR and MASTER_PORT do not say where the processes "
            "meet: use torchrun"
        )
    if device.type == "cuda":
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return ProcessGroup(rank, size, local_size, device)


class WorkerPool:
    """Calls a function for one item after the other, in threads ahead of the consumer, in order.

    Threads, not processes: what takes time here (reading, hashing, decoding, NumPy's copying) runs
    outside Python's global lock, and nothing has to be copied between processes. With 0 workers the
    consumer itself makes the call.
    """

    def __init__(self, workers: int):
        self.number = workers
        self._pool = ThreadPoolExecutor(workers, "loader") if workers else None

    def map(self, function: Callable, items: Iterable, waiting: Callable | None = None):
        """Yield function(item) for each item, in their order, AHEAD of them per worker in advance.

        waiting: called again and again while the next result is not there; it may raise.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        items = iter(items)
        pending = collections.deque()  # Futures, in the order of the items
        try:
            while True:
                # Fill up the queue: fast workers do not run away, so memory stays bounded.
                for item in itertools.islice(items, AHEAD * self.number - len(pending)):
                    pending.append(self._pool.submit(function, item))
                if not pending:
                    return
                # Wait for the oldest, even if later ones are ready: the order is that of the items.
                while wait([pending[0]], timeout=0.2).not_done:
                    if waiting:
                        waiting()
                yield pending.popleft().result()
        finally:  # an error, or the consumer wants no more
            for future in pending:
                future.cancel()


class TrainContext(NamedTuple):
    """How to load and compute: what train(), evaluate() and measure_loading() have in common."""

    group: ProcessGroup
    workers: WorkerPool
    loader: str = "batched"
    memory_format: torch.memory_format = torch.channels_last
    amp: torch.dtype | None = None  # type for autocast, None for float32

    device = property(lambda self: self.group.device)


def choose_amp(amp: str, device: torch.device) -> str:
    """--amp with `auto` resolved: bf16 where the hardware computes in it, else fp16 on a GPU."""
    if amp == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16 needs a GPU: use --amp bf16 or off")
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if has_bfloat16() else "off"


def autocast(context: TrainContext):
    """Rung "--amp": convolutions and matrix products in bfloat16 or float16, the rest in float32.

    Faster because a register holds twice as many numbers, half the bytes move, and recent hardware
    has instructions for such products. The cost is precision: 8 or 11 bits in place of 24. Weights
    and their updates stay float32 (Micikevicius et al., "Mixed Precision Training", 2018).
    """
    return torch.autocast(context.device.type, context.amp, enabled=context.amp is not None)


# --------------------------------------------------------------------------------------------------
# Loaders: from indices to batches that the network takes
# --------------------------------------------------------------------------------------------------


def load_batches(
    source: ImageSource, indices: list, augmentation, context: TrainContext, waiting=None
) -> Iterator:
    """Yield x (n, C, H, W) float32, normalised, and labels (n,) int64 for each index (n,).

    augmentation: (seed, epoch), None for none. waiting: as in WorkerPool.map().
    """
    if context.loader == "torchvision":
        return torchvision_batches(source, indices, augmentation, context)
    return whole_batches(source, indices, augmentation, context, waiting)


# Rung "--loader torchvision", as tutorials write it. Each image becomes a Pillow picture, four
# transforms make a tensor of it, and PyTorch's DataLoader stacks the tensors to a batch. It takes
# any transform; the cost is that Python runs a dozen times for each image.


class TorchvisionImages(torch.utils.data.Dataset):
    """Image i, transformed, (C, H, W) float32, and its label."""

    def __init__(self, source: InMemorySource, is_augmented: bool):
        transforms = import_torchvision().transforms
        steps = [transforms.ToTensor(), transforms.Normalize(source.mean, source.std)]
        if is_augmented:
            crop = transforms.RandomCrop(source.image_shape[:2], padding=PAD)
            steps = [crop, transforms.RandomHorizontalFlip(), *steps]
        self.transform = transforms.Compose(steps)
        self.source = source

    def __len__(self):
        return len(self.source.labels)

    def __getitem__(self, i):
        image = array_to_picture(self.source.images[i])
        return self.transform(image), int(self.source.labels[i])


def torchvision_batches(source, indices, augmentation, context) -> Iterator:
    """load_batches() with PyTorch's DataLoader, whose workers are processes.

    The transforms draw from PyTorch's random state: the augmentation is not that of the other rung,
    and after a resume within an epoch it is another one than without.
    """
    if augmentation:
        seed = np.random.default_rng([*augmentation, context.group.rank]).integers(2**63)
        torch.manual_seed(int(seed))
    images = TorchvisionImages(source, is_augmented=augmentation is not None)
    workers = context.workers.number
    loader = torch.utils.data.DataLoader(images, batch_sampler=indices, num_workers=workers)
    for x, labels in loader:
        x = x.to(context.device).contiguous(memory_format=context.memory_format)
        yield x, labels.to(context.device)


# Rung "--loader batched" (default). Images stay uint8, a quarter of the bytes, until they are used;
# a batch is cut out of its source, augmented and normalised as one array. Faster because Python
# runs a few times for each batch and NumPy does the rest, also in threads. The cost is code of our
# own for each transform: here crop and flip.


def whole_batches(source, indices, augmentation, context, waiting=None) -> Iterator:
    """load_batches() with whole arrays, by threads ahead of the training."""
    if isinstance(source, OneBatchSource):  # made once, given again and again
        batch = prepare_batch(source, None, context, indices[0])
        x, labels = finish_batch(*batch, context, source.mean, source.std)
        for index in indices:
            yield x[: len(index)], labels[: len(index)]
        return
    aug_params = None
    if augmentation:
        aug_params = draw_augmentation(len(source.labels), *augmentation)
    if indices:
        source.set_read_order(np.concatenate(indices))
    prepare = functools.partial(prepare_batch, source, aug_params, context)
    for batch in context.workers.map(prepare, indices, waiting):
        yield finish_batch(*batch, context, source.mean, source.std)


def prepare_batch(source: ImageSource, aug_params, context, index: np.ndarray):
    """A worker's part: all work for a CPU, reading for a GPU. Returns arguments of finish_batch().

    aug_params: of draw_augmentation(), for all images of the source, or None.
    """
    images, labels = source.read(index)
    if aug_params is not None:
        aug_params = aug_params[index]
    if context.device.type != "cpu":
        return images, labels, aug_params
    if aug_params is not None:
        images = augment(images, aug_params)
    x, labels = load_batch(images, labels, slice(None), mean=source.mean, std=source.std)
    return x, labels, None


def finish_batch(images, labels, aug_params, context, mean=MEAN, std=STD):
    """The consumer's part: images (n, H, W, C) to the device, and there from uint8 to float32."""
    x = torch.as_tensor(images).to(context.device, non_blocking=True)
    labels = torch.as_tensor(labels).to(context.device, non_blocking=True)
    if x.dtype is torch.uint8:
        x = augment_and_normalize(x, aug_params, mean, std)
    x = x.permute(0, 3, 1, 2)  # a view: NHWC in memory is what PyTorch calls channels_last
    x = x.contiguous(memory_format=context.memory_format)
    labels = labels.long()
    if x.is_cuda:
        torch.cuda.synchronize()  # so that all this counts as loading
    return x, labels


def augment_and_normalize(
    images: torch.Tensor, aug_params=None, mean=MEAN, std=STD
) -> torch.Tensor:
    """common.augment() and normalisation with PyTorch: (n, H, W, C) uint8 → float32."""
    if aug_params is not None:
        images = augment_tensor(images, torch.from_numpy(aug_params).to(images.device))
    # (images / 255 - mean) / std as one multiplication and one addition
    mean = torch.tensor(mean, device=images.device)
    std = torch.tensor(std, device=images.device)
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std))


def augment_tensor(images: torch.Tensor, aug_params: torch.Tensor) -> torch.Tensor:
    """common.augment() for tensors: images (n, H, W, C) and aug_params (n,), both uint8.

    A parameter is flip · 81 + dy · 9 + dx: whether to mirror, and the corner of the crop.
    """
    aug_params = aug_params.long()
    _, h, w, _ = images.shape
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))  # (n, H + 8, W + 8, C)
    # A view with all 9 × 9 crops of each image, (n, 9, 9, H, W, C), from which one is taken.
    crops = padded.unfold(1, h, 1).unfold(2, w, 1).permute(0, 1, 2, 4, 5, 3)
    image = torch.arange(len(images), device=images.device)
    out = crops[image, aug_params // 9 % 9, aug_params % 9]
    flip = (aug_params // 81 == 1)[:, None, None, None]
    return torch.where(flip, out.flip(2), out)


# --------------------------------------------------------------------------------------------------
# The data set that the options ask for
# --------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Training and test images, and what the log says of them."""

    train: ImageSource
    test: ImageSource
    name: str
    fingerprint: str
    classes: tuple = CLASSES
    bucket: Bucket | None = None  # where the images come from, if it is one
    fetch_rows: tuple = ()  # (type, columns) of the log's rows about downloading

    y_train = property(lambda self: self.train.labels)  # as a common.Dataset has them
    y_test = property(lambda self: self.test.labels)
    image_shape = property(lambda self: self.train.image_shape)


def open_data(args: argparse.Namespace, context: TrainContext) -> Data:
    """The Data for --source, --s3-mode, --data-dir, --dataset and --subset."""
    if args.source == "synthetic-batch":
        n = args.subset or 50_000
        train = OneBatchSource(n, args.batch_size, args.seed)
        test = OneBatchSource(max(n // 5, 1), TEST_BATCH, args.seed)
        data = Data(train, test, "synthetic", "one batch")
    elif args.source == "disk":
        data = open_folder(args)
    elif args.source == "builtin":
        if args.cpu_default and (data_folder(args) / DATASET_FILE).exists():
            prepared = load_dataset(args.data_dir, args.dataset)  # mapped, not read
            args.subset = min(args.subset, len(prepared.y_train))
        dataset = load_dataset(args.data_dir, args.dataset, args.subset, args.seed)
        mean_and_std = (dataset.mean, dataset.std)
        train = InMemorySource(dataset.x_train, dataset.y_train, *mean_and_std)
        test = InMemorySource(dataset.x_test, dataset.y_test, *mean_and_std)
        data = Data(train, test, dataset.name, dataset.fingerprint, dataset.classes)
    else:
        data = open_bucket(args, context.workers)

    available = len(data.y_train)
    if args.subset and available < args.subset:
        if not args.cpu_default:
            raise InputError(
                f"--subset {args.subset}: there are {available} training images in {args.source}"
            )
        args.subset = available
    in_memory = isinstance(data.train, InMemorySource)
    if context.device.type == "cuda" and in_memory and context.loader == "batched":
        train = DeviceSource(data.train, context.device)
        test = DeviceSource(data.test, context.device)
        data = data._replace(train=train, test=test)
    return data


def split_sizes(args):
    """The name of each split, and how many of its images --subset takes (None: all)."""
    if args.subset is None:
        return (("train", None), ("test", None))
    return (("train", args.subset), ("test", max(args.subset // 5, 1)))


def data_folder(args) -> Path:
    """The folder that --data-dir or $CIFAR10_DIR names."""
    return Path(expand_home(args.data_dir or os.environ.get("CIFAR10_DIR") or "data"))


def open_folder(args):
    """The Data in the folders train/ and test/ of --data-dir."""
    root = data_folder(args)
    test_folders = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
    if not (root / "train").is_dir() or not test_folders:
        raise InputError(
            f"no pictures in {root}, {describe_folder(root)}: give --data-dir a folder with train/ "
            "and test/, each with <number>_<label>.png files or a folder for each class; --export "
            "makes one"
        )
    about = read_local_manifest(root)
    names = about["classes"] if about else read_class_names(root)
    notes = []
    lists = [list_pictures(folder, notes) for folder in (root / "train", test_folders[0])]
    if not all(lists):
        raise InputError(f"no pictures in {root}: train/ or test/ is empty")
    train, test, classes = label_pictures(*lists, names)
    if not args.skip_damaged:  # otherwise it is not known yet which are the first ones
        train, test = cut_to_subset(args, train, test)
    with ThreadPoolExecutor(len(available_cores())) as pool:
        pictures = examine_pictures(
            train, test, args.image_size, args.skip_damaged, not args.load_only, pool.map
        )
        train, test = cut_to_subset(args, pictures.train, pictures.test)
        if not train or not test:
            raise InputError(f"no pictures in {root}: none is left in train/ or in test/")
        sources = [ImageFolderSource(p, pictures.image_shape, pictures.deep) for p in (train, test)]
        mean, std = (about["mean"], about["std"]) if about else statistics_of(sources[0], pool.map)
    for source in sources:
        source.mean = mean
        source.std = std
    if RANK == 0:
        for note in (*notes, *pictures.notes):
            print(f"pictures in {root}: {note}", flush=True)

    paths = [os.path.relpath(picture.path, root) for picture in (*train, *test)]
    fingerprint = hashlib.sha256("\n".join(paths).encode()).hexdigest()
    return Data(*sources, f"pictures in {root}", fingerprint, classes)


def cut_to_subset(args, *lists):
    """The lists of the training and of the test set, as --subset says."""
    return [pictures[:n] for pictures, (_, n) in zip(lists, split_sizes(args), strict=True)]


def read_local_manifest(root: Path) -> dict | None:
    """describe_data() of a folder that --export has made; None if it is another folder."""
    try:
        _, _, body = (root / MANIFEST).read_bytes().partition(b"\n")
        return describe_data(json.loads(body))
    except (OSError, ValueError, AttributeError):
        return None


def read_class_names(root: Path) -> tuple:
    """The lines of labels.txt or its like; () if there is none: the folders have the names."""
    for name in ("labels.txt", "classes.txt", "batches.meta.txt"):
        if (root / name).is_file():
            lines = (root / name).read_text(errors="replace").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
    return ()


def statistics_of(source: ImageFolderSource, parallel_map=map) -> tuple[tuple, tuple]:
    """Mean and standard deviation of each channel, on a scale from 0 to 1, of at most
    STATISTICS_OF pictures that are spread over the source."""
    n = len(source.labels)
    count = min(n, STATISTICS_OF)
    index = np.arange(count) * n // count
    sums = np.zeros(source.image_shape[2])
    squares = np.zeros_like(sums)
    for images, _ in parallel_map(source.read, np.array_split(index, -(-count // 64))):
        values = images.reshape(-1, source.image_shape[2]) / 255
        sums += values.sum(axis=0)
        squares += np.square(values).sum(axis=0)
    values = count * math.prod(source.image_shape[:2])
    mean = sums / values
    deviation = np.sqrt(np.maximum(squares / values - mean**2, 0))
    deviation[deviation < 1e-3] = 1  # a channel that is the same everywhere
    return tuple(mean.tolist()), tuple(deviation.tolist())


def open_bucket(args, workers):
    """The Data in s3://bucket/prefix, read as --s3-mode says."""
    if args.cache_dir:
        check_outputs([Path(args.cache_dir) / "shard"])
    bucket = Bucket(args.source, args.endpoint_url, args.retry_seconds)
    sources = []
    fetch_rows = []
    try:
        manifest = bucket.manifest()
        about = manifest["about"]
        classes = about["classes"]
        image_shape = about["image_shape"]
        for split, n in split_sizes(args):
            pictures = manifest[split][:n]
            shards = manifest[f"{split}_shards"]
            if args.s3_mode == "stream":
                source = S3Pictures(bucket, pictures, args.workers, image_shape)
            else:
                labels = labels_of(pictures).astype(label_type(classes))
                sizes = (image_shape, len(classes))
                source = S3Shards(bucket, shards, labels, args.cache_dir, args.workers, *sizes)
            if args.s3_mode == "download":
                source, row = download(source, workers)
                fetch_rows.append((FETCH_TRAIN if split == "train" else FETCH_VALIDATE, row))
            source.mean = about["mean"]
            source.std = about["std"]
            sources.append(source)
    except BaseException:
        bucket.stop()  # no thread goes on retrying
        raise
    # Shards have an order of their own, which --resume needs again.
    order = "-shards" if args.s3_mode == "shards" else ""
    fingerprint = manifest["fingerprint"] + order
    return Data(*sources, manifest["dataset"], fingerprint, classes, bucket, tuple(fetch_rows))


def download(source: S3Shards, workers: WorkerPool) -> tuple[InMemorySource, dict]:
    """Read all images of a source into memory. Returns them and the columns of the log's row."""
    start = time.time()
    clock = time.perf_counter()
    waiting = 0.0
    images = np.empty((len(source.labels), *source.image_shape), np.uint8)
    labels = np.empty_like(source.labels)
    shards = [np.arange(first, end) for first, end in itertools.pairwise(source.bounds)]
    arriving = workers.map(source.read, shards)
    for index in shards:
        asked = time.perf_counter()
        images[index], labels[index] = next(arriving)
        waiting += time.perf_counter() - asked
    duration = time.perf_counter() - clock
    row = {"epoch": 0, "start": start, "loading": waiting, "duration": duration}
    row["value1"] = len(images)
    return InMemorySource(images, labels), row


def open_data_on_all(args: argparse.Namespace, context: TrainContext) -> Data:
    """open_data() in every process: rank 0 first, which downloads what the others then find."""
    group = context.group
    if group.size == 1:
        return open_data(args, context)
    data = open_data(args, context) if group.rank == 0 else None
    name = [data.name if data else None]
    torch.distributed.broadcast_object_list(name, 0)  # the others wait here
    if group.rank:
        if args.source == "builtin":
            args.dataset = dataset_option(name[0])  # no second download, no second warning
        data = open_data(args, context)
    return data


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def global_batches(n: int, batch_size: int, processes: int) -> list[tuple[int, int]]:
    """[(start, end)] of the batches in an epoch of n images.

    A last one with fewer images than processes is left out: each process needs at least one.
    """
    bounds = [(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    return [(start, end) for start, end in bounds if end - start >= processes]


def train(model, net, optimizer, scaler, data, args, context, log, checkpoint, stop):
    """Train net for args.epochs epochs. model: net, or what torch.compile and DDP made of it."""
    group = context.group
    batches = global_batches(len(data.y_train), args.global_batch_size, group.size)
    # A GPU computes while Python goes on: a clock would only see how long it takes to launch work.
    timed = log.timed if context.device.type == "cpu" else contextlib.nullcontext

    def stop_while_waiting():
        """Let Ctrl-C end the wait for an S3 server that is silent."""
        if stop.requested and group.size == 1:
            save_and_stop(checkpoint, log, stop)

    for epoch in range(log.epoch, args.epochs + 1):
        if has_reached(args.accuracy, log.history):
            break
        # Every process computes the same order and takes its shard of each batch.
        order = data.train.order(args.seed, epoch)
        indices = [group.shard(order[start:end]) for start, end in batches[log.batch :]]
        augmentation = (args.seed, epoch) if args.augment == "on" else None
        log.start_epoch(epoch, len(batches))
        loaded = load_batches(data.train, indices, augmentation, context, stop_while_waiting)

        for batch in range(log.batch, len(batches)):
            start, end = batches[batch]
            images = end - start  # of all processes

            # The learning rate is a function of the position alone, so a resumed run has the same.
            done = (epoch - 1 + batch / len(batches)) / args.epochs
            for param_group in optimizer.param_groups:
                param_group["lr"] = learning_rate(args, done)

            with log.timed("loading"), saved_if_loading_fails(checkpoint):
                x, labels = next(loaded)

            with timed("forward"):
                optimizer.zero_grad()
                with autocast(context):
                    logits = model(x)
                    smoothing = args.label_smoothing
                    loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

            with timed("backward"):
                # DistributedDataParallel sums the gradients while the backward pass runs, and
                # divides by the number of processes. This weight makes the result the mean over
                # all images, also where one process has an image more than another.
                weight = len(labels) * group.size / images
                # float16 rounds small gradients to zero: the scaler multiplies the loss by a large
                # number, and its step() divides the gradients again. It is off for other types.
                scaler.scale(loss * weight).backward()

            with timed("update"):
                scaler.step(optimizer)
                scaler.update()

            # All processes get the same sums, and so they log, fail and stop alike.
            top1, top5 = count_correct(logits, labels)
            loss_sum, top1, top5, stops = group.sum(
                loss.item() * len(labels), top1, top5, bool(stop.requested)
            )
            log.end_batch(images, loss_sum, int(top1), int(top5))
            require_finite(loss_sum, "loss", log)
            if stops:
                save_and_stop(checkpoint, log, stop)
            if checkpoint.due():
                checkpoint.save()

        # Images of the test set may fail to load too. The checkpoint then has the position after
        # the last batch, so that --resume begins with this validation.
        position = copy.deepcopy(log.state_dict())
        log.end_training()
        with saved_if_loading_fails(checkpoint, position):
            loss, top1, top5, loading = evaluate(net, data.test, context, confusion=log.confusion)
        log.end_epoch(loss, top1, top5, loading)
        require_finite(loss, "validation loss", log)
        checkpoint.save()
        (stops,) = group.sum(bool(stop.requested))
        if stops and epoch < args.epochs:
            save_and_stop(checkpoint, log, stop)

    if has_reached(args.accuracy, log.history):
        log.totals["seconds_to_accuracy"] = log.totals["train_seconds"]


def has_reached(accuracy: float | None, history: dict) -> bool:
    """Whether the last evaluation had the accuracy at which the run is to end (None: never)."""
    if accuracy is None or not history["test_acc"]:
        return False
    return history["test_acc"][-1] >= accuracy


@contextlib.contextmanager
def saved_if_loading_fails(checkpoint, position: dict | None = None):
    """Save what was trained so far before a LoadingError ends the run.

    position: the log's state to save; default the present one.
    """
    try:
        yield
    except LoadingError as error:
        if not checkpoint.path:
            raise
        if position:
            checkpoint.log.load_state_dict(position)
        checkpoint.save()
        message = f"{error}; continue with --checkpoint {checkpoint.path} --resume"
        raise LoadingError(message) from None


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """How many labels (n,) have the largest, and one of the five largest, logits (n, classes)."""
    best = min(5, logits.shape[1])  # there may be fewer classes
    hits = logits.detach().float().topk(best).indices == labels[:, None]  # (n, 5)
    return hits[:, 0].sum().item(), hits.sum().item()  # .item() waits for the GPU


@torch.inference_mode()
def evaluate(
    net, source: ImageSource, context: TrainContext, batch_size: int = TEST_BATCH, confusion=None
):
    """Mean loss, top-1 and top-5 accuracy over all processes, and seconds spent loading.

    confusion: (K, K) zeros, in which each image is counted at [its label, predicted class].
    """
    group = context.group
    net.eval()  # batch normalisation with running statistics, not with those of the batch
    if group.size > 1:
        # Each process has seen different images: all take the running statistics of rank 0.
        for buffer in net.buffers():
            torch.distributed.broadcast(buffer, 0)

    n = len(source.labels)
    indices = []
    for start in range(0, n, batch_size):
        index = group.shard(np.arange(start, min(start + batch_size, n)))
        if len(index):
            indices.append(index)
    loaded = load_batches(source, indices, None, context)

    sums = np.zeros(3)  # loss, top-1, top-5
    loading = 0.0
    for _ in indices:
        started = time.perf_counter()
        x, labels = next(loaded)
        loading += time.perf_counter() - started
        with autocast(context):
            logits = net(x).float()
        loss = F.cross_entropy(logits, labels, reduction="sum").item()
        sums += (loss, *count_correct(logits, labels))
        if confusion is not None:
            np.add.at(confusion, (labels.cpu().numpy(), logits.argmax(dim=1).cpu().numpy()), 1)
    net.train()
    loss, top1, top5 = group.sum(*sums.tolist())
    if confusion is not None and group.size > 1:
        confusion[...] = np.reshape(group.sum(*confusion.ravel().tolist()), confusion.shape)
    return loss / n, top1 / n, top5 / n, loading


def measure_loading(data, args, context, log, checkpoint, stop) -> None:
    """Load args.epochs epochs as training would, and do nothing with them."""
    group = context.group
    batches = global_batches(len(data.y_train), args.global_batch_size, group.size)
    for epoch in range(1, args.epochs + 1):
        order = data.train.order(args.seed, epoch)
        indices = [group.shard(order[start:end]) for start, end in batches]
        augmentation = (args.seed, epoch) if args.augment == "on" else None
        log.start_epoch(epoch, len(batches))
        loaded = load_batches(data.train, indices, augmentation, context)
        for start, end in batches:
            with log.timed("loading"):
                next(loaded)
            log.end_batch(end - start)
            if stop.requested:
                save_and_stop(checkpoint, log, stop)
        log.end_training()
        if not args.quiet and group.rank == 0:
            sums = log.sums
            rate = sums["images"] / sums["duration"]
            print(
                f"epoch {epoch}: {sums['images']:,} images in {sums['duration']:.3f} s, "
                f"waiting {sums['loading']:.3f} s, {rate:,.0f} images/s",
                flush=True,
            )


# --------------------------------------------------------------------------------------------------
# Runs: one training, several seeds, loading alone
# --------------------------------------------------------------------------------------------------


def train_once(args, data, context) -> dict:
    """Train one network from args.seed. Returns the totals of the run."""
    device = context.device
    group = context.group
    torch.manual_seed(args.seed)
    # Rung "--memory-format channels_last": the channels of a pixel lie side by side, as the fastest
    # convolutions of oneDNN and cuDNN read them; nchw tensors they reorder first, each time. It
    # costs nothing, but an operation that does not know the format reorders the tensor back.
    net = make_model(args.model, data.image_shape, len(data.classes))
    net = net.to(device, memory_format=context.memory_format)
    optimizer = make_torch_optimizer(net, args)
    scaler = torch.amp.GradScaler(device.type, enabled=context.amp is torch.float16)

    # `net` stays the plain network, for the checkpoint and the evaluation; `model` trains it.
    model = net
    if args.compile:
        # Rung "--compile": generated code does several operations in one pass over memory. It needs
        # a compiler and about a minute, again for each batch size. Convolutions gain nothing, so on
        # a CPU it can be slower.
        model = torch.compile(net, dynamic=False)
    if group.size > 1:
        # Gives all processes rank 0's weights, then sums the gradients in each backward pass.
        device_ids = [device] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids)
    batches = global_batches(len(data.y_train), args.global_batch_size, group.size)
    # As many warm-ups on all ranks, each with its shard's size: in one, DDP sums gradients too.
    sizes = [
        len(group.shard(range(size))) for size in sorted({end - start for start, end in batches})
    ]
    warm_up(model, net, sizes, context, data.image_shape)

    log = make_log(args, data, context)
    parts = {"model": net, "optimizer": optimizer, "scaler": scaler}
    checkpoint = TorchCheckpoint(args, log, group.rank, **parts)
    if args.resume:
        if group.rank == 0:
            checkpoint.load()
        broadcast_states([log, *parts.values()], group)

    with StopSignal() as stop, log:
        for kind, columns in data.fetch_rows:
            log.write_row(kind, **columns)
        train(model, net, optimizer, scaler, data, args, context, log, checkpoint, stop)
        if device.type == "cuda":
            log.totals["peak_gpu_allocated_mb"] = torch.cuda.max_memory_allocated(device) / MIB
        log.finish()
    return log.metadata["totals"]


def choose_cpu_subset(args, context: TrainContext) -> int:
    """How many images this CPU trains CPU_EPOCHS times in about CPU_SECONDS.

    From the time of two steps of a network that is then discarded. A resumed run keeps the number
    that its checkpoint was made with.
    """
    group = context.group
    # Nothing is known of an own network, or of the images of folders and buckets before they are
    # opened, which needs the number.
    is_known = args.model in MODELS and (args.source == "builtin" or not args.image_size)
    if args.load_only or not is_known:
        return CPU_IMAGES
    if args.resume and args.checkpoint and Path(args.checkpoint).is_file():
        with contextlib.suppress(Exception):  # a damaged file: TorchCheckpoint.load() will say so
            state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
            return state["meta"]["identity"]["subset"]
    if group.rank == 0:
        print("On a CPU, without --epochs and --subset: measuring its speed …", flush=True)
    image_shape = IMAGE_SHAPE
    classes = len(CLASSES)
    if args.source == "builtin" and (data_folder(args) / DATASET_FILE).exists():
        prepared = load_dataset(args.data_dir, args.dataset)  # mapped, not read
        image_shape = prepared.image_shape
        classes = len(prepared.classes)
    h, w, channels = image_shape
    net = make_model(args.model, image_shape, classes).to(memory_format=context.memory_format)
    optimizer = make_torch_optimizer(net, args)
    x = torch.zeros(args.batch_size, channels, h, w)
    x = x.contiguous(memory_format=context.memory_format)
    labels = torch.zeros(args.batch_size, dtype=torch.long)
    for step in range(3):
        if step == 1:  # the first one was the warm-up
            started = time.perf_counter()
        optimizer.zero_grad()
        with autocast(context):
            logits = net(x)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    rate = 2 * args.batch_size / (time.perf_counter() - started)

    (rate,) = group.sum(rate)  # images/s of all processes: all take the same number
    batches = round(rate * CPU_SECONDS / CPU_EPOCHS / args.global_batch_size)
    return min(max(batches, 4) * args.global_batch_size, 50_000)


def warm_up(
    model, net, sizes: Iterable[int], context: TrainContext, image_shape=IMAGE_SHAPE
) -> None:
    """Let the libraries choose and build their kernels for batches of these sizes.

    That is not training time; a compiled network is compiled here. net stays as it was.
    """
    # Running statistics of batch normalisation change in each forward pass.
    buffers = [buffer.clone() for buffer in net.buffers()]
    h, w, channels = image_shape
    for size in sizes:
        x = torch.zeros(size, channels, h, w, device=context.device)
        x = x.contiguous(memory_format=context.memory_format)
        with autocast(context):
            model(x).float().sum().backward()
    net.zero_grad()
    for buffer, before in zip(net.buffers(), buffers, strict=True):
        buffer.copy_(before)
    if context.device.type == "cuda":
        torch.cuda.synchronize()


def make_log(args, data, context) -> RunLog:
    device = context.device
    info = {"device": "cpu", "threads": torch.get_num_threads(), "ranks": context.group.size}
    gpu_uuid = None
    if device.type == "cuda":
        info["device"] = torch.cuda.get_device_name(device)
        gpu_uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return RunLog(args, __file__, data, info, context.group.rank, gpu_uuid)


def broadcast_states(parts: list, group: ProcessGroup) -> None:
    """Give all processes the states that rank 0 has read from the checkpoint."""
    if group.size == 1:
        return
    states = [part.state_dict() for part in parts]
    torch.distributed.broadcast_object_list(states, 0)
    if group.rank:
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)


def load_once(args, data, context) -> None:
    """Measure the loading alone."""
    log = make_log(args, data, context)
    checkpoint = TorchCheckpoint(args, log, context.group.rank)
    with StopSignal() as stop, log:
        for kind, columns in data.fetch_rows:
            log.write_row(kind, **columns)
        measure_loading(data, args, context, log, checkpoint, stop)
        log.finish()


SUMMARY_FORMATS = {
    "best_accuracy": ".4f",
    "final_accuracy": ".4f",
    "train_seconds": ".2f",
    "images_per_s": ",.0f",
    "seconds_to_accuracy": ".2f",
}


def train_seeds(args, data, context) -> None:
    """train_once() for args.seeds seeds, each with files of its own; then mean and deviation."""
    results = []
    for seed in range(args.seed, args.seed + args.seeds):
        own_args = argparse.Namespace(**vars(args))  # a copy
        own_args.seed = seed
        for name in ("log", "save_metrics", "checkpoint", "confusion", "trace"):
            path = getattr(args, name)
            if path:
                setattr(own_args, name, path_for_seed(path, seed, name))
        results.append(train_once(own_args, data, context))
    if context.group.rank:
        return

    summary = {}
    for name, form in SUMMARY_FORMATS.items():
        values = [result[name] for result in results if name in result]
        if len(values) == len(results):
            mean = statistics.mean(values)
            std = statistics.stdev(values)
            summary[name] = {"mean": mean, "std": std, "values": values}
            print(f"{name}: {mean:{form}} ± {std:{form}} (n = {len(values)})", flush=True)
    log = Path(args.log)
    content = {"seeds": args.seeds, "arguments": vars(args), **summary}
    with atomic_write(log.with_name(f"{log.name.removesuffix('.csv')}_seeds.json"), "w") as file:
        json.dump(content, file, indent=1, default=str)


def path_for_seed(path: str, seed: int, option: str) -> str:
    """results/run.ckpt.pt → results/run_seed7.ckpt.pt"""
    name = Path(path).name
    if not name:
        raise InputError(f"--{option.replace('_', '-')} {path!r}: give a file name")
    stem, dot, suffix = name.partition(".")
    return str(Path(path).with_name(f"{stem}_seed{seed}{dot}{suffix}"))


# --------------------------------------------------------------------------------------------------
# Export: the data set into a bucket or a folder
# --------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    """Put the data set into args.export, s3://bucket/prefix or a folder.

    It gets pictures, shards and a manifest. What is there already and is the same stays, so an
    upload that was interrupted continues when it is repeated.
    """
    from obstore.store import LocalStore

    bucket = None
    if args.export.startswith("s3://"):
        bucket = Bucket(args.export, args.endpoint_url, args.retry_seconds)
        found = bucket.read_manifest()
        client = bucket.connect()
        retry = bucket.retry
    else:
        manifest = Path(args.export) / MANIFEST
        check_outputs([manifest])
        found = manifest.read_bytes() if manifest.exists() else None
        client = LocalStore(args.export, mkdir=True)
        retry = name_failure
    # An export begins with its checksum. What does not is of another program, or of a person.
    if found is not None and not re.match(rb"[0-9a-f]{64}\n", found) and not args.overwrite:
        raise InputError(
            f"{args.export}/{MANIFEST} is there already, and not of an export: choose another "
            "place, or replace it with --overwrite"
        )
    data = load_dataset(args.data_dir, args.dataset, args.subset, args.seed)
    present = retry("", lambda: list_objects(client))
    put = functools.partial(put_object, client, retry, present)
    pool = ThreadPoolExecutor(IN_FLIGHT)
    try:
        objects = put_images(data, put, pool, args.quiet)
    except BaseException:
        if bucket:
            bucket.stop()  # before shutdown() waits for threads that may be retrying
        raise
    finally:
        pool.shutdown(cancel_futures=True)

    # The manifest comes last: where it is, everything else is too.
    about = {name: getattr(data, name) for name in ("image_shape", "classes", "mean", "std")}
    content = {"dataset": data.name, "fingerprint": data.fingerprint, **about, "objects": objects}
    body = json.dumps(content).encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    put_object(client, retry, {}, (MANIFEST, digest + b"\n" + body, 0))
    print(
        f"train_cifar: {len(data.y_train):,} training and {len(data.y_test):,} test images of "
        f"{data.name} are in {args.export}",
        flush=True,
    )


def put_images(data, put: Callable, pool: ThreadPoolExecutor, quiet: bool) -> dict:
    """Put all pictures and shards. Returns the lists of ManifestEntry for the manifest."""
    from tqdm import tqdm

    objects = {"train": [], "train_shards": [], "test": [], "test_shards": []}
    splits = (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test))
    total = len(data.y_train) + len(data.y_test)
    with tqdm(total=total, desc="export", unit=" images", disable=quiet or None) as bar:
        for split, images, labels in splits:
            # Shard by shard, so that only one has to be encoded in memory at a time.
            for start in range(0, len(labels), SHARD_IMAGES):
                part = slice(start, min(start + SHARD_IMAGES, len(labels)))
                pictures = encode_pictures(split, start, images[part], labels[part])
                for entry in pool.map(put, pictures):
                    objects[split].append(entry)
                    bar.update()
                key = f"{split}-shards/{start // SHARD_IMAGES:02}.bin"
                records = encode_records(images[part], labels[part])
                objects[f"{split}_shards"].append(put((key, records.tobytes(), len(records))))
    return objects


def encode_pictures(split: str, first: int, images, labels) -> list[tuple]:
    """The images, whose numbers begin with `first`, as PNG files: [(key, bytes, 1)]."""
    pictures = []
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True), first):
        file = io.BytesIO()
        array_to_picture(pixels).save(file, "PNG")
        pictures.append((f"{split}/{i:05}_{label}.png", file.getvalue(), 1))
    return pictures


def list_objects(client) -> dict:
    """{key: (size, ETag)} of the objects that are there."""
    import obstore

    found = {}
    for chunk in obstore.list(client, chunk_size=1000):
        for item in chunk:
            found[item["path"]] = (item["size"], item["e_tag"])
    return found


def put_object(client, retry: Callable, present: dict, item: tuple) -> ManifestEntry:
    """Put an object unless it is there.

    present: what list_objects() found. item: (key, bytes, number of images in them).
    """
    import obstore

    key, data, images = item
    digest = hashlib.sha256(data).hexdigest()

    def is_present():
        size, tag = present.get(key, (None, None))
        if size != len(data):
            return False
        # The ETag of most objects is their MD5; of the others the content decides.
        if (tag or "").strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest():
            return True
        stored = retry(key, lambda: obstore.get(client, key).bytes())
        return hashlib.sha256(stored).hexdigest() == digest

    if not is_present():
        retry(key, lambda: obstore.put(client, key, data, use_multipart=False))
    return ManifestEntry(key, len(data), digest, images)


def name_failure(key: str, action: Callable):
    """Return action(), which reads or writes a file; LoadingError in one line if it cannot."""
    from obstore.exceptions import BaseError

    try:
        return action()
    except (BaseError, OSError) as error:
        problem = str(error).partition("\n")[0]
        raise LoadingError(f"{key or 'the folder'} cannot be exported: {problem}") from None


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked, with the defaults that depend on the machine filled in."""
    parser = make_parser(__file__, __doc__, MODELS, batch_size=64, epochs=None, model=own_or_named)
    add_data_options(parser.add_argument_group("where the images come from"))
    training = parser.add_argument_group("training")
    add_training_options(training)
    add_recipe_options(training, augment="on")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"

    # A CPU needs hours for all images with ResNet-50: without options it trains for minutes.
    unlimited = args.epochs is None and args.subset is None
    cpu_default = args.device == "cpu" and unlimited and not args.export
    if cpu_default:
        # A learning rate on the command line was chosen for the documented default optimizer.
        if not any_given(parser, argv, "optimizer lr momentum nesterov schedule warmup".split()):
            parser.set_defaults(**CPU_RECIPE)
        parser.set_defaults(batch_size=CPU_RECIPE["batch_size"])
        args = parser.parse_args(argv)
        args.device = "cpu"
        args.epochs = CPU_EPOCHS
        args.subset = CPU_IMAGES  # until choose_cpu_subset()
    args.cpu_default = cpu_default
    args.epochs = args.epochs or FULL_EPOCHS
    args.source = args.source.rstrip("/")
    check_args(args)
    return args


def any_given(parser, argv, names) -> bool:
    """Whether the command line has an option of one of these names."""
    # What a namespace has already, a parser sets only if the command line has it.
    given, _ = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names)))
    return any(getattr(given, name) is not None for name in names)


def own_or_named(name: str) -> str:
    """An argparse type: one of MODELS, or an own network, file.py:Net."""
    file, colon, attribute = name.rpartition(":")
    if name not in MODELS and not (colon and attribute.isidentifier()):
        raise argparse.ArgumentTypeError(
            f"invalid choice: {name!r}: {', '.join(MODELS)}, or an own network, file.py:Net"
        )
    if colon and not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{name!r}: there is no file {file}")
    return name


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together, or that this machine cannot fulfil."""
    named = ("builtin", "disk", "synthetic-batch")
    if args.source not in named and not args.source.startswith("s3://"):
        raise InputError(
            f"--source {args.source}: give builtin, disk, s3://bucket/prefix or synthetic-batch"
        )
    if args.loader == "torchvision" and args.source != "builtin":
        raise InputError(
            f"--loader torchvision reads --source builtin only: use --loader batched for "
            f"{args.source}"
        )
    if args.export and re.match(r"\w+:/", args.export) and not args.export.startswith("s3://"):
        raise InputError(f"--export {args.export}: give s3://bucket/prefix or a folder")
    if args.load_only and (args.source == "synthetic-batch" or args.seeds > 1 or args.checkpoint):
        raise InputError(
            "--load-only measures how a source loads: give it one that does, no --seeds, no "
            "--checkpoint"
        )
    if args.nesterov and (args.optimizer != "sgd" or not args.momentum):
        raise InputError("--nesterov needs --optimizer sgd and a --momentum over 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        reason = "no NVIDIA GPU with a driver is found"
        if not torch.version.cuda:
            reason = "this build of torch has no CUDA"
        raise InputError(f"--device cuda: {reason}: use --device cpu")
    if args.compile and args.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError(
            "--compile needs a C++ compiler on a CPU: install g++, or leave --compile out"
        )


def add_data_options(group) -> None:
    add = group.add_argument
    source = (
        "builtin: CIFAR-10 in memory; disk: pictures in --data-dir/train and /test, named "
        "<number>_<label>.png or in a folder for each class; s3://bucket/prefix; "
        "synthetic-batch: one batch again and again (default: builtin)"
    )
    add("--source", default="builtin", metavar="SOURCE", help=source)
    modes = ("download", "stream", "shards")
    mode = (
        "fetch all images first, each picture when it is needed, or large objects of many "
        "(default: %(default)s)"
    )
    add("--s3-mode", choices=modes, default="shards", help=mode)
    endpoint = "S3 server other than Amazon's (default: $AWS_ENDPOINT_URL, else ~/.aws/config)"
    add("--endpoint-url", metavar="URL", help=endpoint)
    add("--cache-dir", metavar="DIR", help="folder that keeps shards on disk")
    seconds = number(float, 0, 10**6)
    retry = "retry failed S3 requests for up to this many seconds (default: %(default)s)"
    add("--retry-seconds", type=seconds, default=60, metavar="SECONDS", help=retry)
    loader = (
        "torchvision: transforms and a DataLoader, as tutorials write it, with an augmentation of "
        "their own; batched: whole batches at once (default: %(default)s)"
    )
    add("--loader", choices=("torchvision", "batched"), default="batched", help=loader)
    size = (
        "with --source disk: scale pictures to N x N pixels, with antialiasing (default: their own "
        "size if all have the same, else 32)"
    )
    add("--image-size", type=number(int, 4, 4096), metavar="N", help=size)
    damaged = "with --source disk: leave out pictures that cannot be decoded, and say how many"
    add("--skip-damaged", action="store_true", help=damaged)
    workers = "threads, with --loader torchvision processes, that load ahead (default: %(default)s)"
    add("--workers", type=number(int, 0, 256), default=1, help=workers)
    add("--load-only", action="store_true", help="measure the loading, without training")
    target = "put the data set into s3://bucket/prefix or a folder, and end"
    add("--export", metavar="TARGET", help=target)
    overwrite = "with --export, replace a manifest.json that is not of an export"
    add("--overwrite", action="store_true", help=overwrite)


def add_training_options(group) -> None:
    add = group.add_argument
    fraction = number(float, 0, 1)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    layout = "memory layout of images and weights (default: %(default)s)"
    add("--memory-format", choices=MEMORY_FORMATS, default="channels_last", help=layout)
    amp = "mixed precision; auto: where the hardware has it (default: %(default)s)"
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help=amp)
    add("--compile", action="store_true", help="compile the network with torch.compile")
    threads = "threads of PyTorch's operators (default: all cores, shared by the processes)"
    add("--threads", type=number(int, 1, 4096), help=threads)
    add("--nesterov", action="store_true", help="Nesterov momentum")
    add("--label-smoothing", type=fraction, default=0.0, help="default: %(default)s")
    accuracy = "end at this test accuracy, such as 0.9, and report the training time it took"
    add("--accuracy", type=fraction, help=accuracy)
    seeds = "train N times, with --seed and the N - 1 seeds after it (default: %(default)s)"
    add("--seeds", type=number(int, 1, 1000), default=1, metavar="N", help=seeds)


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    try:
        args = parse_args(argv)
    except InputError:
        if RANK:
            time.sleep(5)  # torchrun ends all processes when one has ended: let rank 0 print first
        raise
    if args.export:
        export(args)
        return

    # Before the first large allocation: activations are freed and needed again in each step.
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms and keeps the fastest
    group = join_process_group(args)
    args.amp = choose_amp(args.amp, group.device)
    args.global_batch_size = args.batch_size * group.size
    # torchrun asks for one thread in each process, and PyTorch overlooks a container's quota.
    share = max(1, len(available_cores()) // group.local_size)
    if args.threads or group.size > 1 or cpu_quota() < torch.get_num_threads():
        torch.set_num_threads(args.threads or share)
    context = TrainContext(
        group,
        WorkerPool(args.workers),
        args.loader,
        MEMORY_FORMATS[args.memory_format],
        AMP_DTYPES[args.amp],
    )
    if args.cpu_default:
        args.subset = choose_cpu_subset(args, context)
        if group.rank == 0:
            print(
                f"On a CPU: {args.subset:,} images, {args.epochs} epochs, batch {args.batch_size}, "
                f"{args.optimizer}, {args.schedule} learning rate. The full run: "
                f"--epochs {FULL_EPOCHS}",
                flush=True,
            )
    data = open_data_on_all(args, context)
    try:
        if args.load_only:
            load_once(args, data, context)
        elif args.seeds > 1:
            train_seeds(args, data, context)
        else:
            train_once(args, data, context)
    except LoadingError as error:
        if RANK:  # run_main() lets only rank 0 print, but this error concerns one process alone
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        if data.bucket:
            data.bucket.stop()  # requests that are being retried end
    if group.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_main(main, RANK)
