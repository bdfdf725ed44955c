"""Train ResNet-50, ResNet-18 or the CNN on CIFAR-10 with PyTorch, and see what loading the data costs.

The images come from memory, from a folder of pictures or from S3 (downloaded first, streamed picture by picture, or
read in shards of thousands); --workers threads prepare batches ahead. Waiting for data and total time are logged apart,
batch by batch. Whatever the source and the number of workers, the same images come in the same order with the same
augmentation (shards have an order of their own). What the usual script leaves out: channels_last memory, bfloat16 where
the processor computes in it, images that stay uint8 until they are used, augmentation of whole batches.

    make train-cifar
    make train-cifar-s3
    python train_cifar.py --model resnet18 --epochs 1 --subset 5000 --workers 1
    python train_cifar.py --model cnn --batch-size 32 --amp off --augment off --epochs 10
    python train_cifar.py --model resnet50 --epochs 30 --batch-size 128 --lr 0.05 --device cuda
    python train_cifar.py --epochs 2 --subset 5000 --checkpoint results/resnet.ckpt.npz      # Ctrl-C, then add --resume
    torchrun --standalone --nproc-per-node 2 train_cifar.py --model resnet18 --epochs 1 --subset 5000
    python train_cifar.py --load-only --subset 5000 --epochs 3
    python train_cifar.py --export results/pictures --subset 5000
    python train_cifar.py --source disk --data-dir results/pictures --workers 2 --epochs 1
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import common
from common import (
    FETCH_TRAIN,
    FETCH_VALIDATE,
    MEAN,
    MIB,
    PAD,
    STD,
    InputError,
    Interrupted,
    Run,
    TrainingError,
    atomic_write,
    augment,
    available_cores,
    check_outputs,
    draw_augmentation,
    epoch_order,
    get_torch_arrays,
    get_torch_state,
    keep_freed_memory,
    load_cifar10,
    make_parser,
    make_synthetic,
    make_torch_optimizer,
    make_torch_resnet,
    number,
    run_main,
    set_torch_arrays,
)

CPU_DEFAULT = {"subset": 5000, "epochs": 2}  # what a CPU can train of ResNet-50 in a few minutes
STREAM_SHARDS = 4  # a random stream of a seed, apart from those of common.py
TEST_BATCH = 250  # images
AHEAD = 4  # batches that a worker may be ahead
IN_FLIGHT = 16  # requests that a worker has under way
SHARD_IMAGES = 5000  # 15 MB
SHUFFLED_SHARDS = 2  # shards whose images are mixed, and so must be in memory together
KEPT_SHARDS = 3 * SHUFFLED_SHARDS
RECORD = (
    1 + 3 * 32 * 32
)  # bytes of an image in a shard: label, red, green and blue plane, as in CIFAR-10's own files
MANIFEST = "manifest.json"

# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------


def make_model(name):
    """`cnn` as in common.make_cnn, or torchvision's ResNet with the CIFAR stem: (N, 3, 32, 32) → logits (N, 10)."""
    if name == "cnn":
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4096, 256),
            nn.ReLU(),
            nn.Linear(256, 10),
        )
        for layer in model:
            if hasattr(layer, "weight"):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        return model
    return make_torch_resnet(name)


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation
# ----------------------------------------------------------------------------------------------------------------------


def augment_tensor(images, draws):
    """augment() with PyTorch, for images (N, 32, 32, 3) and draws (N,) on a GPU."""
    draws, size = draws.long(), images.shape[1]
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))
    windows = padded.unfold(1, size, 1).unfold(2, size, 1).permute(0, 1, 2, 4, 5, 3)
    out = windows[torch.arange(len(images), device=images.device), draws // 9 % 9, draws % 9]
    return torch.where((draws // 81 == 1)[:, None, None, None], out.flip(2), out)


# ----------------------------------------------------------------------------------------------------------------------
# Sources of images: labels (N,), order(seed, epoch) → (N,), read(index) → (n, 32, 32, 3) and (n,) uint8, in any thread
# ----------------------------------------------------------------------------------------------------------------------


class Arrays:
    """Images in memory."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def order(self, seed, epoch):
        return epoch_order(len(self.labels), seed, epoch)

    def read(self, index):
        return self.images[index], self.labels[index]


class OnDevice(Arrays):
    """Images resident on a GPU."""

    def __init__(self, source, device):
        super().__init__(torch.from_numpy(np.array(source.images)).to(device), source.labels)
        self._labels = torch.from_numpy(np.array(source.labels)).to(device)

    def read(self, index):
        index = torch.from_numpy(index).to(self.images.device)
        return self.images[index], self._labels[index]


class OneBatch(Arrays):
    """n images in name, of which only one batch exists: the ceiling, training without any loading."""

    def __init__(self, n, batch_size, seed):
        images, labels, *_ = make_synthetic(min(n, batch_size), seed)
        super().__init__(images, np.resize(labels, n))

    def read(self, index):
        return self.images[: len(index)], self.labels[: len(index)]


class Folder(Arrays):
    """Pictures on disk, each read when it is needed: `<number>_<label>.png` (or jpg), or a folder for each class."""

    PICTURE = re.compile(r"(\d+)_(\d+)\.(?:png|jpe?g)", re.IGNORECASE)

    def __init__(self, folder, subset=None):
        numbered, self.classes = self._numbered(folder), []
        if not numbered and folder.is_dir():
            self.classes = sorted(
                f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")
            )
        found = sorted(numbered or self._pictures(folder))[:subset]
        if not found:
            raise InputError(
                f"{folder}: no pictures there: give --data-dir a folder with train/ and test/, each with "
                "<number>_<label>.png files or a folder for each class; --export makes one"
            )
        if max(label for _, label, _ in found) > 9:
            raise InputError(
                f"{max(found, key=lambda f: f[1])[2]}: its label is over 9: the networks have ten classes"
            )
        self.paths = [path for _, _, path in found]
        self.labels = np.array([label for _, label, _ in found], np.uint8)

    def _numbered(self, folder):
        """[(number, label, path)] of the pictures in the folder itself."""
        found = []
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if match := self.PICTURE.fullmatch(entry.name):
                found.append((int(match[1]), int(match[2]), entry.path))
            elif entry.name.lower().endswith((".png", ".jpg", ".jpeg")):
                raise InputError(
                    f"{entry.path}: its name does not tell its label: call it <number>_<label>.png"
                )
        return found

    def _pictures(self, folder):
        """The same of the pictures in its class folders, whose labels follow their names; the classes alternate."""
        return [
            (i, label, str(path))
            for label, name in enumerate(self.classes)
            for i, path in enumerate(
                sorted(
                    p
                    for p in (folder / name).iterdir()
                    if p.suffix.lower() in (".png", ".jpg", ".jpeg")
                )
            )
        ]

    def read(self, index):
        return np.stack([self._picture(self.paths[i]) for i in index]), self.labels[index]

    def _picture(self, path):
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise LoadingError(f"{path} cannot be read ({error.strerror}): put it back") from None
        return decode(data, path)


def decode(data, name):
    """The pixels of a PNG or JPEG picture, (32, 32, 3) uint8; LoadingError, naming it, if it is none of 32×32."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            size = picture.size
            if size == (32, 32):
                return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except Exception as error:  # Pillow has OSError, SyntaxError, ValueError, struct.error ... for damaged pictures
        raise LoadingError(f"{name} cannot be decoded ({error}): replace it") from None
    raise LoadingError(f"{name} has {size[0]}x{size[1]} pixels, not 32x32: replace it")


# ----------------------------------------------------------------------------------------------------------------------
# S3
# ----------------------------------------------------------------------------------------------------------------------


class LoadingError(TrainingError):
    """Images that cannot be had: of this process alone, where several train together."""


class Damaged(Exception):  # noqa: N818 (it is tried again)
    """An object that arrived, but not as it was stored."""


class Entry(NamedTuple):
    """An object as the manifest has it. images: how many are in it."""

    name: str
    size: int
    sha256: str
    images: int


class Bucket:
    """The objects under s3://bucket/prefix: fetched with bounded retries, their length and checksum verified.

    Credentials, region and endpoint come from where the AWS tools look: the environment, ~/.aws, a role. patience:
    seconds for which a failing request is repeated. A client is made by connect() and belongs to one worker.
    """

    def __init__(self, url, endpoint_url=None, patience=60.0):
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session

        match = re.fullmatch(r"s3://([a-z0-9][a-z0-9._-]+)(?:/(.*?))?/?", url)
        if not match:
            raise InputError(f"{url}: not of the form s3://bucket/prefix")
        self.url, (self.bucket, self.prefix), self.patience = (
            url.rstrip("/"),
            match.groups(""),
            patience,
        )
        session = Session()
        try:
            self._credentials, profile = session.get_credentials(), session.get_scoped_config()
            self.region = (
                os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
            )
        except BotoCoreError as error:
            raise InputError(f"the AWS configuration cannot be used: {error}") from None
        environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        self.endpoint = endpoint_url or environment or profile.get("endpoint_url")
        if self.endpoint and not re.fullmatch(r"https?://[^/\s@]+/?", self.endpoint):
            raise InputError(f"--endpoint-url {self.endpoint}: give http(s)://host:port")
        if self._credentials is None:
            raise InputError(
                f"{url}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or fill in "
                "~/.aws/credentials"
            )
        self.timeout = min(
            max(patience, 1), 20
        )  # seconds without a byte until a request has failed
        self.stopped = threading.Event()  # set: nothing is repeated any more
        self.failure = None  # what has ended the run, in words

    def connect(self):
        from obstore.store import S3Store

        options = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(minutes=10),
            "read_timeout": timedelta(seconds=self.timeout),
        }
        return S3Store(
            self.bucket,
            prefix=self.prefix or None,
            endpoint=self.endpoint,
            region=self.region,
            client_options=options,
            retry_config={"max_retries": 0},
            credential_provider=self._key,
        )

    def _key(self):
        key = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": key.access_key,
            "secret_access_key": key.secret_key,
            "token": key.token,
            "expires_at": datetime.now(timezone.utc) + timedelta(minutes=10),
        }  # asked for again then

    def name(self, key):
        return f"{self.url}/{key} at {self.endpoint or f'Amazon S3, {self.region}'}"

    def get(self, client, key):
        """The bytes of an object that the manifest does not have."""
        import obstore

        return self.retry(key, lambda: bytes(obstore.get(client, key).bytes()))

    def fetch(self, client, entry):
        """The bytes of an object, in a buffer, as they were when the manifest was made."""
        import obstore

        def attempt():
            data = obstore.get(client, entry.name).bytes()
            check(entry, data)
            return data

        return self.retry(entry.name, attempt)

    def retry(self, key, action):
        """action(), repeated while it fails in a way that may pass; the pauses grow, and vary among the workers.

        Raises LoadingError, naming object and endpoint, at once if it cannot pass, at the latest after `patience`
        seconds, and after the third time that an object arrived damaged.
        """
        from obstore.exceptions import BaseError

        started, damaged = time.monotonic(), 0
        for tries in itertools.count(1):
            try:
                return action()
            except Damaged as error:
                problem, damaged = str(error), damaged + 1
                final = damaged == 3
            except (BaseError, OSError) as error:  # FileNotFoundError is one of obstore's
                problem, final = describe(error)
            pause = min(0.1 * 2 ** min(tries, 6), 5) * random.uniform(0.5, 1)
            passed = time.monotonic() - started
            given_up = final or passed + pause > self.patience
            if given_up or self.stopped.wait(pause):
                times = f", tried {tries} times in {passed:.0f} s" if tries > 1 else ""
                message = f"{self.name(key)}: {problem}{times}"
                if (
                    given_up
                ):  # the run ends; what is being repeated beside it ends too, and is not the reason
                    self.failure = self.failure or message
                    self.stopped.set()
                raise LoadingError(self.failure or message)

    def manifest(self):
        """The manifest: "dataset", "fingerprint", and lists of Entry: "train", "test", "train_shards", "test_shards".

        Raises InputError where the bucket, the prefix or the credentials are wrong.
        """
        try:
            text = self.get(self.connect(), MANIFEST)
        except LoadingError as error:
            if re.search(r": [34]\d\d ", str(error)):
                hint = (
                    "put the data there with --export"
                    if "404" in str(error)
                    else "look at credentials and endpoint"
                )
                raise InputError(f"{error}: {hint}") from None
            raise
        digest, _, body = text.partition(b"\n")
        if hashlib.sha256(body).hexdigest() != digest.decode(errors="replace"):
            raise LoadingError(
                f"{self.name(MANIFEST)}: damaged: put the data there again with --export"
            )
        manifest = json.loads(body)
        lists = {kind: [Entry(*row) for row in rows] for kind, rows in manifest["objects"].items()}
        return {"dataset": manifest["dataset"], "fingerprint": digest.decode(), **lists}


def check(entry, data):
    """Raise Damaged unless the data is what the manifest says."""
    if len(data) != entry.size:
        raise Damaged(f"{len(data)} bytes arrived instead of {entry.size}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise Damaged("its checksum is wrong")


def describe(error):
    """An obstore error in a few words, and whether there is no use in trying again."""
    text = str(error)
    status = re.search(r"status code: (\d+)([ \w]*)", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    cause = re.search(r'message: "([^"]+)"', text)
    if status:
        final = status[1][0] in "34" and status[1] not in (
            "408",
            "429",
        )  # time-out, too many requests
        return status[1] + status[2].rstrip() + (f" ({code[1]})" if code else ""), final
    if "TimedOut" in text or "timed out" in text:
        return "no answer in time", False
    words = cause[1] if cause else text.partition("\n")[0].rpartition(" - ")[2]
    return words, "BadScheme" in text


class S3Pictures(Arrays):
    """Pictures in a bucket, each fetched when it is needed, IN_FLIGHT at a time. Nothing is kept."""

    def __init__(self, bucket, entries):
        self.bucket, self.entries = bucket, entries
        self.labels = labels_of(entries)
        self._worker = (
            threading.local()
        )  # the calling thread's own client, and threads for its requests

    def read(self, index):
        mine = self._worker
        if not hasattr(mine, "client"):
            mine.client, mine.pool = self.bucket.connect(), ThreadPoolExecutor(IN_FLIGHT)
        entries = [self.entries[i] for i in index]
        arrived = list(
            mine.pool.map(functools.partial(self.bucket.fetch, mine.client), entries)
        )  # in this order
        images = [
            decode(data, self.bucket.name(entry.name))
            for data, entry in zip(arrived, entries, strict=True)
        ]
        return np.stack(images), self.labels[index]


class S3Shards(Arrays):
    """Shards in a bucket, fetched whole and at most KEPT_SHARDS kept in memory; in cache_dir, if given, all of them.

    labels: of the images that are wanted, from the first on. readers: threads that fetch; with more than none, the next
    shards ahead of their use.
    """

    def __init__(self, bucket, entries, labels, cache_dir=None, readers=0):
        self.bucket, self.labels, self.cache_dir = (
            bucket,
            labels,
            Path(cache_dir) if cache_dir else None,
        )
        ends = np.cumsum([entry.images for entry in entries])
        self.entries = entries[: np.searchsorted(ends, len(labels)) + 1]
        self.bounds = np.minimum(
            [0, *ends[: len(self.entries)]], len(labels)
        )  # shard s: images bounds[s]:bounds[s + 1]
        self.ahead = SHUFFLED_SHARDS if readers else 0
        self._sequence, self._kept = (
            list(range(len(self.entries))),
            {},
        )  # _kept: shard → Future of its records
        self._pool, self._lock, self._reader = (
            ThreadPoolExecutor(max(readers, 1)),
            threading.Lock(),
            threading.local(),
        )

    def order(self, seed, epoch):
        """Shard after shard in random order, the images of SHUFFLED_SHARDS mixed: a function of (seed, epoch)."""
        rng = np.random.default_rng([seed, STREAM_SHARDS, epoch])
        self._sequence = rng.permutation(len(self.entries)).tolist()
        images = [np.arange(self.bounds[s], self.bounds[s + 1]) for s in self._sequence]
        step = SHUFFLED_SHARDS
        groups = [np.concatenate(images[i : i + step]) for i in range(0, len(images), step)]
        return np.concatenate([rng.permutation(group) for group in groups])

    def read(self, index):
        images, labels = np.empty((len(index), 32, 32, 3), np.uint8), np.empty(len(index), np.uint8)
        shards = np.searchsorted(self.bounds, index, side="right") - 1
        for s in np.unique(shards):
            here = shards == s
            records = self._records(s)[index[here] - self.bounds[s]]
            images[here] = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            labels[here] = records[:, 0]
        return images, labels

    def _records(self, s):
        """The records of shard s, (n, RECORD) uint8; fetches the next shards too, forgets those longest unused."""
        with self._lock:
            place = self._sequence.index(s)
            for shard in self._sequence[place : place + 1 + self.ahead]:
                future = self._kept.pop(shard, None) or self._pool.submit(
                    self._fetch, self.entries[shard]
                )
                self._kept[shard] = future  # the last one now
            future = self._kept[s]
            while len(self._kept) > KEPT_SHARDS:
                del self._kept[next(iter(self._kept))]
        return future.result()

    def _fetch(self, entry):
        data = self._from_cache(entry)
        if data is None:
            if not hasattr(self._reader, "client"):
                self._reader.client = self.bucket.connect()
            data = self.bucket.fetch(self._reader.client, entry)
            if self.cache_dir:
                self.cache_dir.mkdir(parents=True, exist_ok=True)
                part = self._cached(entry).with_suffix(f".{os.getpid()}")
                part.write_bytes(data)
                part.replace(self._cached(entry))
        records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
        if len(records) != entry.images or records[:, 0].max() > 9:
            raise LoadingError(
                f"{self.bucket.name(entry.name)}: not {entry.images} images with labels up to 9"
            )
        return records

    def _cached(self, entry):
        return self.cache_dir / f"{entry.sha256}.bin"

    def _from_cache(self, entry):
        if self.cache_dir:
            with contextlib.suppress(OSError, Damaged):
                data = self._cached(entry).read_bytes()
                check(entry, data)
                return data


def labels_of(entries):
    """The labels (N,) of pictures, which their names end in."""
    return np.array([int(re.search(r"_(\d+)\.\w+$", entry.name)[1]) for entry in entries], np.uint8)


def download(source, loader):
    """All images of a source, in memory; and when it began, seconds waiting, seconds in all, and how many they are."""
    began, clock, waited = time.time(), time.perf_counter(), 0.0
    images, labels = (
        np.empty((len(source.labels), 32, 32, 3), np.uint8),
        np.empty_like(source.labels),
    )
    parts = [np.arange(a, b) for a, b in itertools.pairwise(source.bounds)]
    reading = loader.run(source.read, parts)
    for part in parts:
        started = time.perf_counter()
        images[part], labels[part] = next(reading)
        waited += time.perf_counter() - started
    return Arrays(images, labels), (began, waited, time.perf_counter() - clock, len(images))


def export(args):
    """Put the data set into args.export, s3://bucket/prefix or a folder, as pictures and as shards, then a manifest.

    What is there already, and is the same, stays; so an upload that broke off goes on when it is repeated.
    """
    from obstore.store import LocalStore
    from tqdm import tqdm

    if args.export.startswith("s3://"):
        target = Bucket(args.export, args.endpoint_url, args.retry_seconds)
        client, retry, stop = target.connect(), target.retry, target.stopped.set
    else:
        check_outputs([Path(args.export) / MANIFEST])
        client, retry, stop = LocalStore(args.export, mkdir=True), name_failure, lambda: None
    data = load_cifar10(args.data_dir, args.dataset, args.subset, args.seed)
    objects = {"train": [], "train_shards": [], "test": [], "test_shards": []}
    present = retry("", lambda: list_objects(client))
    total = len(data.y_train) + len(data.y_test)
    pool, put = ThreadPoolExecutor(IN_FLIGHT), functools.partial(put_object, client, retry, present)
    try:
        with tqdm(total=total, desc="export", unit=" images", disable=args.quiet or None) as bar:
            for split, images, labels in (
                ("train", data.x_train, data.y_train),
                ("test", data.x_test, data.y_test),
            ):
                for start in range(0, len(labels), SHARD_IMAGES):
                    part = slice(start, min(start + SHARD_IMAGES, len(labels)))
                    pictures, shard = encode(split, start, images[part], labels[part])
                    for row in pool.map(put, pictures):
                        objects[split].append(row)
                        bar.update()
                    objects[split + "_shards"].append(put(shard))
    except BaseException:
        stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    body = json.dumps(
        {"dataset": data.name, "fingerprint": data.fingerprint, "objects": objects}
    ).encode()
    manifest = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    put_object(client, retry, {}, (MANIFEST, manifest, 0))  # last: where it is, everything is
    print(
        f"train_cifar: {len(data.y_train):,} training and {len(data.y_test):,} test images of {data.name} are in "
        f"{args.export}",
        flush=True,
    )


def name_failure(key, action):
    """action(), which reads or writes a file; LoadingError, in one line, if it cannot."""
    from obstore.exceptions import BaseError

    try:
        return action()
    except (BaseError, OSError) as error:
        problem = str(error).partition("\n")[0]
        raise LoadingError(f"{key or 'the folder'} cannot be exported: {problem}") from None


def list_objects(client):
    """{key: (size, ETag)} of what is there."""
    import obstore

    return {
        o["path"]: (o["size"], o["e_tag"])
        for chunk in obstore.list(client, chunk_size=1000)
        for o in chunk
    }


def encode(split, first, images, labels):
    """[(key, bytes, images in it)] of the pictures number `first` and following, and the same of their shard."""
    shard = np.empty((len(labels), RECORD), np.uint8)
    shard[:, 0], shard[:, 1:] = labels, images.transpose(0, 3, 1, 2).reshape(len(labels), -1)
    pictures = []
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True), first):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pictures.append((f"{split}/{i:05}_{label}.png", file.getvalue(), 1))
    return pictures, (
        f"{split}-shards/{first // SHARD_IMAGES:02}.bin",
        shard.tobytes(),
        len(labels),
    )


def put_object(client, retry, present, item):
    """Put an object unless it is there; returns its row of the manifest. present: what is there, of list_objects()."""
    import obstore

    key, data, images = item
    size, tag = present.get(key, (None, None))
    digest = hashlib.sha256(data).hexdigest()
    same = size == len(data) and (
        (tag or "").strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
        or hashlib.sha256(retry(key, lambda: obstore.get(client, key).bytes())).hexdigest()
        == digest
    )  # an ETag is the MD5 of most objects, not of all
    if not same:
        retry(key, lambda: obstore.put(client, key, data, use_multipart=False))
    return Entry(key, len(data), digest, images)


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Where training and test images come from; the rest is what Run wants of a data set."""

    train: Arrays
    test: Arrays
    name: str
    fingerprint: str
    fetched: tuple = ()  # how long downloading took: download()'s, of training and test images

    y_train = property(lambda self: self.train.labels)
    y_test = property(lambda self: self.test.labels)

    def close(self):
        for source in (self.train, self.test):
            if hasattr(source, "bucket"):
                source.bucket.stopped.set()  # requests that are being repeated end


def split_sizes(args):
    """How many images --subset leaves of each split, None for all."""
    return ("train", args.subset), ("test", args.subset and max(args.subset // 5, 1))


def open_data(args, device, loader):
    """The Data that --source, --s3-mode, --data-dir, --dataset and --subset ask for."""
    if args.source == "synthetic-batch":
        n = args.subset or 50_000
        train, test = (
            OneBatch(n, args.batch_size, args.seed),
            OneBatch(max(n // 5, 1), TEST_BATCH, args.seed),
        )
        return Data(train, test, "synthetic", "one batch")
    if args.source == "disk":
        root = Path(args.data_dir or os.environ.get("CIFAR10_DIR") or "data").expanduser()
        train, test = (Folder(root / split, n) for split, n in split_sizes(args))
        if train.classes != test.classes:  # the labels are their numbers
            raise InputError(
                f"{root}: train/ has the classes {', '.join(train.classes) or 'in the names'}, test/ "
                f"{', '.join(test.classes) or 'in the names'}: give both the same"
            )
        names = "\n".join(os.path.relpath(path, root) for path in train.paths + test.paths)
        data = Data(train, test, f"pictures in {root}", hashlib.sha256(names.encode()).hexdigest())
    elif args.source == "builtin":
        data = load_cifar10(args.data_dir, args.dataset, args.subset, args.seed)
        data = Data(
            Arrays(data.x_train, data.y_train),
            Arrays(data.x_test, data.y_test),
            data.name,
            data.fingerprint,
        )
    else:
        data = open_bucket(args, loader)
    if args.subset and len(data.y_train) < args.subset:
        if not args.cpu_default:
            raise InputError(
                f"--subset {args.subset}: there are {len(data.y_train)} training images in {args.source}"
            )
        args.subset = len(data.y_train)
    if device.type == "cuda" and type(data.train) is Arrays:
        data = data._replace(train=OnDevice(data.train, device), test=OnDevice(data.test, device))
    return data


def open_bucket(args, loader):
    """The Data in s3://bucket/prefix, read as --s3-mode says."""
    if args.cache_dir:
        check_outputs([Path(args.cache_dir) / "shard"])
    bucket = Bucket(args.source, args.endpoint_url, args.retry_seconds)
    try:
        manifest, sources, fetched = bucket.manifest(), [], []
        for split, n in split_sizes(args):
            pictures, shards = manifest[split][:n], manifest[split + "_shards"]
            if args.s3_mode == "stream":
                sources.append(S3Pictures(bucket, pictures))
                continue
            sources.append(
                S3Shards(bucket, shards, labels_of(pictures), args.cache_dir, args.workers)
            )
            if args.s3_mode == "download":
                sources[-1], record = download(sources[-1], loader)
                fetched.append(record)
    except BaseException:
        bucket.stopped.set()
        raise
    order = "-shards" if args.s3_mode == "shards" else ""  # --resume needs the same order
    return Data(*sources, manifest["dataset"], manifest["fingerprint"] + order, tuple(fetched))


class Loader:
    """Calls a function for one batch after the other, in `workers` threads ahead of the consumer, in order.

    Threads, not processes: what takes time here (reading, hashing, decoding, NumPy's copying) runs outside Python's
    lock, and nothing has to be copied between processes. Without workers the consumer itself makes the call.
    """

    def __init__(self, workers):
        self.workers, self._pool = (
            workers,
            ThreadPoolExecutor(workers, "loader") if workers else None,
        )

    def run(self, make, batches, waiting=None):
        """Yield make(batch) for each of `batches`, in their order; waiting() is called while there is nothing yet."""
        if not self._pool:
            yield from map(make, batches)
            return
        batches, pending = iter(batches), collections.deque()
        try:
            while True:
                for batch in itertools.islice(batches, AHEAD * self.workers - len(pending)):
                    pending.append(self._pool.submit(make, batch))
                if not pending:
                    return
                while wait([pending[0]], 0.2).not_done:
                    if waiting:
                        waiting()
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def batches(self, source, batches, draws, device, waiting=None):
        """Yield x (n, 3, 32, 32), normalised and in channels_last memory, and labels (n,) for each array of indices.

        draws: of draw_augmentation(), for all images of the source, or None. Both tensors are on the device.
        """
        if isinstance(source, OneBatch):
            ready = finish_batch(*make_batch(source, None, device, batches[0]), device)
            yield from ((ready[0][: len(index)], ready[1][: len(index)]) for index in batches)
            return
        for batch in self.run(
            functools.partial(make_batch, source, draws, device), batches, waiting
        ):
            yield finish_batch(*batch, device)


def make_batch(source, draws, device, index):
    """A worker's part: for a CPU all of it, for a GPU the images as they are, and their draws."""
    images, labels = source.read(index)
    draws = None if draws is None else draws[index]
    if device.type == "cpu":
        images = images if draws is None else augment(images, draws)
        return *common.load_batch(images, labels, slice(None)), None
    return images, labels, draws


def finish_batch(images, labels, draws, device):
    """The rest: on a GPU images arrive as uint8, a quarter of the bytes, and are augmented and normalised there."""
    x, labels = (torch.as_tensor(a).to(device, non_blocking=True) for a in (images, labels))
    if x.dtype is torch.uint8:
        x = x if draws is None else augment_tensor(x, torch.from_numpy(draws).to(device))
        scale, shift = (
            1 / (255 * torch.tensor(STD, device=device)),
            torch.tensor(MEAN) / torch.tensor(STD),
        )
        x = torch.addcmul(-shift.to(device), x.float(), scale)
    if x.is_cuda:
        torch.cuda.synchronize()  # before the clock is read
    return x.permute(0, 3, 1, 2), labels.long()


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class World:
    """The processes that train together: this one's rank, their number, sums over all of them."""

    def __init__(self, rank=0, size=1, local_size=1, device=torch.device("cpu")):  # noqa: B008 (immutable)
        self.rank, self.size, self.local_size, self.device = rank, size, local_size, device

    def share(self, index):
        """This rank's part of an array, the first ranks one more than the others where it does not divide."""
        return np.array_split(index, self.size)[self.rank]

    def sum(self, *values):
        """The values summed over all ranks."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()


class Setup(NamedTuple):
    """How to compute: what train(), evaluate() and their like have in common."""

    device: torch.device
    amp: torch.dtype | None
    scaler: torch.amp.GradScaler | None
    loader: Loader
    world: World


def learning_rate(args, done):
    """The learning rate when the part `done` (0 to 1) of the training is over.

    constant: args.lr. cosine: up from 0 in a straight line during args.warmup of the training, then half a cosine down
    to 0. one-cycle: from lr / 25 up to lr and down to lr / 250,000, both half a cosine, as PyTorch's OneCycleLR; Smith
    and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018.
    """
    if done < args.warmup and args.schedule == "one-cycle":
        return half_cosine(args.lr / 25, args.lr, done / args.warmup)
    if done < args.warmup:
        return args.lr * done / args.warmup
    if args.schedule == "constant":
        return args.lr
    last = args.lr / 250_000 if args.schedule == "one-cycle" else 0.0
    return half_cosine(args.lr, last, (done - args.warmup) / (1 - args.warmup))


def half_cosine(start, end, part):
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def autocast(device, amp):
    return torch.autocast(device.type, amp) if amp else contextlib.nullcontext()


def train_step(model, optimizer, x, labels, amp=None, scaler=None, smoothing=0.0, weight=1.0):
    """One step on one batch. Returns the mean loss, the logits and the seconds of forward and backward pass.

    amp: the type for autocast, None for float32. scaler: a GradScaler for float16. smoothing: of the labels. weight: of
    this process's loss beside the others'. The seconds are None on a GPU, which works behind the clock's back.
    """
    started = time.perf_counter()
    optimizer.zero_grad()
    with autocast(x.device, amp):
        logits = model(x)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    forward = time.perf_counter()
    scaled = loss * weight
    (scaler.scale(scaled) if scaler else scaled).backward()
    backward = time.perf_counter()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    phases = {} if x.is_cuda else {"forward": forward - started, "backward": backward - forward}
    return loss.detach(), logits.detach(), phases


def warm_up(model, net, sizes, setup):
    """Let the libraries choose and build their kernels for batches of these sizes, and leave net as it was."""
    kept = [buffer.clone() for buffer in net.buffers()]
    for size in sizes:
        x = torch.zeros(size, 32, 32, 3, device=setup.device).permute(0, 3, 1, 2)
        with autocast(setup.device, setup.amp):
            model(x).float().sum().backward()
    net.zero_grad()
    for buffer, before in zip(net.buffers(), kept, strict=True):
        buffer.copy_(before)
    if setup.device.type == "cuda":
        torch.cuda.synchronize()


def count_correct(logits, labels):
    hits = logits.float().topk(5).indices == labels[:, None]
    return hits[:, 0].sum().item(), hits.sum().item()  # .item() waits for the GPU


def global_batches(n, args, world):
    """[(start, stop)] of the batches in an epoch of n images, without one that has fewer images than processes."""
    size = args.global_batch_size
    bounds = ((start, min(start + size, n)) for start in range(0, n, size))
    return [(start, stop) for start, stop in bounds if stop - start >= world.size]


def train(model, net, optimizer, data, args, run, setup):
    """Train for args.epochs epochs on data; everything measured goes to run. model: net, or what wraps it."""
    device, amp, scaler, loader, world = setup
    batches = global_batches(len(data.train.labels), args, world)
    for epoch in range(run.epoch, args.epochs + 1):
        if has_reached(args.accuracy, run):
            break
        order, draws = epoch_plan(data.train, args, epoch)
        run.start_epoch(epoch, len(batches))
        mine = [world.share(order[start:stop]) for start, stop in batches[run.batch :]]
        loaded = loader.batches(
            data.train, mine, draws, device, waiting=run.check_signal if world.size == 1 else None
        )
        for batch in range(run.batch, len(batches)):
            set_learning_rate(optimizer, args, (epoch - 1 + batch / len(batches)) / args.epochs)
            started = time.perf_counter()
            x, labels = next_batch(loaded, args, run)
            loading = time.perf_counter() - started
            start, stop = batches[batch]
            weight = (
                len(labels) * world.size / (stop - start)
            )  # DistributedDataParallel takes the mean over processes
            loss, logits, phases = train_step(
                model, optimizer, x, labels, amp, scaler, args.label_smoothing, weight
            )
            sums = world.sum(
                loss.item() * len(labels), *count_correct(logits, labels), bool(run.signal)
            )
            run.end_batch(
                stop - start,
                sums[0],
                int(sums[1]),
                int(sums[2]),
                loading,
                stop=sums[3] > 0,
                **phases,
            )
        run.end_training()
        run.end_epoch(*evaluate(net, data.test, setup), stop=world.sum(bool(run.signal))[0] > 0)
    has_reached(args.accuracy, run)  # in the last epoch too


def epoch_plan(source, args, epoch):
    """The order of the epoch's images, and the draws of their augmentation or None."""
    draws = (
        draw_augmentation(len(source.labels), args.seed, epoch) if args.augment == "on" else None
    )
    return source.order(args.seed, epoch), draws


def set_learning_rate(optimizer, args, done):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, done)


def next_batch(loaded, args, run):
    """The next batch; if it cannot be had, what was trained so far is saved before the run ends."""
    try:
        return next(loaded)
    except LoadingError as error:
        if args.checkpoint:
            run.save_checkpoint()
            raise LoadingError(
                f"{error}; continue with --checkpoint {args.checkpoint} --resume"
            ) from None
        raise


def has_reached(accuracy, run):
    """Whether the last validation had the accuracy that the run was to reach; the totals tell in what training time."""
    reached = (
        accuracy is not None and run.history["test_acc"] and run.history["test_acc"][-1] >= accuracy
    )
    if reached:
        run.totals["seconds_to_accuracy"] = run.totals["train_seconds"]
    return reached


@torch.inference_mode()
def evaluate(net, source, setup, batch_size=TEST_BATCH):
    """Mean loss, top-1 and top-5 accuracy over all processes, and seconds spent waiting for data."""
    device, amp, _, loader, world = setup
    net.eval()
    for buffer in (
        net.buffers() if world.size > 1 else ()
    ):  # running statistics differ from rank to rank
        torch.distributed.broadcast(buffer, 0)
    n = len(source.labels)
    mine = [
        world.share(np.arange(start, min(start + batch_size, n)))
        for start in range(0, n, batch_size)
    ]
    mine = [index for index in mine if len(index)]
    sums, loading, loaded = np.zeros(3), 0.0, loader.batches(source, mine, None, device)
    for _ in mine:
        started = time.perf_counter()
        x, y = next(loaded)
        loading += time.perf_counter() - started
        with autocast(device, amp):
            logits = net(x).float()
        sums += (F.cross_entropy(logits, y, reduction="sum").item(), *count_correct(logits, y))
    net.train()
    loss, top1, top5 = world.sum(*sums.tolist())
    return loss / n, top1 / n, top5 / n, loading


def measure_loading(data, args, run, setup):
    """Load args.epochs epochs as training would, and do nothing with them."""
    batches = global_batches(len(data.train.labels), args, setup.world)
    for epoch in range(1, args.epochs + 1):
        order, draws = epoch_plan(data.train, args, epoch)
        run.start_epoch(epoch, len(batches))
        mine = [setup.world.share(order[start:stop]) for start, stop in batches]
        loaded = setup.loader.batches(data.train, mine, draws, setup.device)
        for start, stop in batches:
            started = time.perf_counter()
            next(loaded)
            run.end_loading(stop - start, time.perf_counter() - started)
        if not args.quiet and setup.world.rank == 0:
            print(
                "epoch {}: {images:,} images in {duration:.3f} s, waiting {loading:.3f} s, {:,.0f} images/s".format(
                    epoch, run.sums["images"] / run.sums["duration"], **run.sums
                ),
                flush=True,
            )


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def get_arrays(model, optimizer, scaler):
    arrays = get_torch_arrays(model, optimizer)
    if scaler:
        state = scaler.state_dict()
        arrays["scaler"] = np.array([state["scale"], state["_growth_tracker"]])
    return arrays


def set_arrays(model, optimizer, scaler, arrays):
    set_torch_arrays(model, optimizer, arrays)
    if scaler:
        scale, growth = arrays["scaler"]
        scaler.load_state_dict(
            {**scaler.state_dict(), "scale": float(scale), "_growth_tracker": int(growth)}
        )


def share_position(run, net, optimizer, setup):
    """Give all processes what rank 0 has read from the checkpoint."""
    if setup.world.size == 1:
        return
    names = ("epoch", "batch", "sums", "history", "totals")
    scaler = setup.scaler and setup.scaler.state_dict()
    position = [{name: getattr(run, name) for name in names}, scaler]
    torch.distributed.broadcast_object_list(position, 0)
    for name, value in position[0].items():
        setattr(run, name, value)
    if setup.scaler:
        setup.scaler.load_state_dict(position[1])
    with torch.no_grad():
        for tensor in (*net.parameters(), *get_torch_state(net, optimizer).values()):
            ours = tensor.to(setup.device, copy=True, memory_format=torch.contiguous_format)
            torch.distributed.broadcast(ours, 0)
            tensor.copy_(ours)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def choose_amp(amp, device):
    """The type for autocast, or None. auto: bfloat16 where the hardware computes in it, else float16 on a GPU."""
    if amp == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16 needs a GPU: use --amp bf16 or off")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        amp = (
            "bf16"
            if any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))
            else "off"
        )
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def parse_args(argv=None):
    parser = make_parser(
        "train_cifar", __doc__, ("resnet50", "resnet18", "cnn"), batch_size=64, epochs=None
    )
    add_data_options(parser.add_argument_group("where the images come from"))
    add_training_options(parser.add_argument_group("training"))
    args = parser.parse_args(argv)
    args.source = args.source.rstrip("/")
    if args.source not in ("builtin", "disk", "synthetic-batch") and not args.source.startswith(
        "s3://"
    ):
        raise InputError(
            f"--source {args.source}: give builtin, disk, s3://bucket/prefix or synthetic-batch"
        )
    if args.load_only and (args.source == "synthetic-batch" or args.seeds > 1 or args.checkpoint):
        raise InputError(
            "--load-only measures how a source loads: give it one that does, no --seeds, no --checkpoint"
        )
    if args.nesterov and (args.optimizer != "sgd" or not args.momentum):
        raise InputError("--nesterov needs --optimizer sgd and a --momentum over 0")
    if args.warmup is None:
        args.warmup = {"constant": 0.0, "cosine": 0.05, "one-cycle": 0.3}[args.schedule]
    if args.device == "cuda" and not torch.cuda.is_available():
        why = (
            "this build of torch has no CUDA"
            if not torch.version.cuda
            else "no NVIDIA GPU with a driver is found"
        )
        raise InputError(f"--device cuda: {why}: use --device cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.compile and args.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError(
            "--compile needs a C++ compiler on a CPU: install g++, or leave --compile out"
        )
    args.cpu_default = (
        args.device == "cpu" and args.epochs is None and args.subset is None and not args.export
    )
    if args.cpu_default:
        args.epochs, args.subset = CPU_DEFAULT["epochs"], CPU_DEFAULT["subset"]
        print(
            f"On a CPU: {args.subset:,} images and {args.epochs} epochs. The full run: the same with --epochs 10",
            flush=True,
        )
    args.epochs = args.epochs or 10
    args.schedule_epochs = (
        args.epochs if args.schedule != "constant" or args.warmup else None
    )  # what --resume compares
    return args


def add_data_options(group):
    add = group.add_argument
    add(
        "--source",
        default="builtin",
        metavar="SOURCE",
        help="builtin: CIFAR-10 in memory; disk: pictures in --data-dir/train and /test, named <number>_<label>.png or "
        "in a folder for each class; s3://bucket/prefix; synthetic-batch: one batch again and again (default: builtin)",
    )
    add(
        "--s3-mode",
        choices=("download", "stream", "shards"),
        default="shards",
        help="fetch all images first, each picture when it is needed, or large objects of many (default: %(default)s)",
    )
    add(
        "--endpoint-url",
        metavar="URL",
        help="of an S3 that is not Amazon's (default: $AWS_ENDPOINT_URL, else ~/.aws/config)",
    )
    add("--cache-dir", metavar="DIR", help="keep shards on disk here")
    add(
        "--retry-seconds",
        type=number(float, 0, 10**6),
        default=60,
        metavar="SECONDS",
        help="how long to go on asking an S3 that fails (default: %(default)s)",
    )
    add(
        "--workers",
        type=number(int, 0, 256),
        default=1,
        help="threads that load ahead (default: %(default)s)",
    )
    add(
        "--augment",
        choices=("on", "off"),
        default="on",
        help="random crops and flips (default: %(default)s)",
    )
    add("--load-only", action="store_true", help="measure the loading, without training")
    add(
        "--export",
        metavar="TARGET",
        help="put the data set into s3://bucket/prefix or a folder, and stop",
    )


def add_training_options(group):
    add = group.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add(
        "--amp",
        choices=("auto", "off", "bf16", "fp16"),
        default="auto",
        help="mixed precision; auto: where the hardware has it (default: %(default)s)",
    )
    add("--compile", action="store_true", help="torch.compile the network")
    add(
        "--threads",
        type=number(int, 1, 4096),
        help="of PyTorch's operators (default: all cores, shared by processes)",
    )
    add("--nesterov", action="store_true", help="Nesterov's momentum")
    add(
        "--schedule",
        choices=("constant", "cosine", "one-cycle"),
        default="constant",
        help="of the learning rate; --lr is its largest (default: %(default)s)",
    )
    add(
        "--warmup",
        type=number(float, 0, 1, exclusive=True),
        metavar="PART",
        help="of the training in which the learning rate rises (default: 0; cosine: 0.05; one-cycle: 0.3)",
    )
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, help="default: %(default)s")
    add(
        "--accuracy",
        type=number(float, 0, 1),
        help="stop at this test accuracy, say 0.9, and report the time it took",
    )
    add(
        "--seeds",
        type=number(int, 1, 1000),
        default=1,
        metavar="N",
        help="train N times, with --seed and the N - 1 seeds after it (default: %(default)s)",
    )


def join_world(args):
    """This process's World; under torchrun, which sets RANK, it meets the others here."""
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return World()
    rank, size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, local_size, device)


def open_on_all(args, loader, world, device):
    """The Data on every process; rank 0 first, which downloads and prepares files that the others then find."""
    if world.rank:
        torch.distributed.barrier()
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stderr(nowhere),
        ):  # rank 0 has said it
            return open_data(args, device, loader)
    data = open_data(args, device, loader)
    if world.size > 1:
        torch.distributed.barrier()
    return data


def train_once(args, data, setup):
    """Train one network from args.seed. Returns the totals of the run."""
    device, world = setup.device, setup.world
    torch.manual_seed(args.seed)
    net = make_model(args.model).to(device, memory_format=torch.channels_last)
    optimizer = make_torch_optimizer(net, args)
    state = (net, optimizer, setup.scaler)
    model = torch.compile(net, dynamic=False) if args.compile else net
    if world.size > 1:
        model = nn.parallel.DistributedDataParallel(
            model, [device] if device.type == "cuda" else None
        )
    batches = global_batches(len(data.train.labels), args, world)
    warm_up(
        model, net, sorted({len(world.share(range(start, stop))) for start, stop in batches}), setup
    )
    with make_run(
        args, data, setup, lambda: get_arrays(*state), lambda arrays: set_arrays(*state, arrays)
    ) as run:
        share_position(run, net, optimizer, setup)
        train(model, net, optimizer, data, args, run, setup)
        if device.type == "cuda":
            run.totals["peak_gpu_allocated_mb"] = torch.cuda.max_memory_allocated(device) / MIB
        run.finish()
    return run.sidecar["totals"]


def load_once(args, data, setup):
    """Measure the loading alone."""
    with make_run(args, data, setup, dict, lambda _: None) as run:
        measure_loading(data, args, run, setup)
        run.finish()


@contextlib.contextmanager
def make_run(args, data, setup, get, put):
    """The Run, with what is known of device and processes, and what fetching the data took."""
    device, gpu = setup.device, None
    if device.type == "cuda":
        gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    info = {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "ranks": setup.world.size,
    }
    with Run(args, "train_cifar", data, get, put, info, setup.world.rank, gpu_uuid=gpu) as run:
        for kind, fetched in zip((FETCH_TRAIN, FETCH_VALIDATE), data.fetched, strict=False):
            run.record_fetch(kind, *fetched)
        yield run


def train_seeds(args, data, setup):
    """train_once() for each of args.seeds seeds, with files of its own; then mean and standard deviation."""
    results = []
    for seed in range(args.seed, args.seed + args.seeds):
        mine = argparse.Namespace(**{**vars(args), "seed": seed})
        for name in ("log", "save_metrics", "checkpoint"):
            if path := getattr(args, name):
                if not Path(path).name:
                    raise InputError(f"--{name.replace('_', '-')} {path!r}: give a file name")
                stem, dot, suffix = Path(path).name.partition(".")
                setattr(mine, name, str(Path(path).with_name(f"{stem}_seed{seed}{dot}{suffix}")))
        mine.resume = args.resume and (not mine.checkpoint or Path(mine.checkpoint).exists())
        results.append(train_once(mine, data, setup))
    if setup.world.rank == 0:
        summary = {}
        for name, form in (
            ("best_accuracy", ".4f"),
            ("final_accuracy", ".4f"),
            ("train_seconds", ".2f"),
            ("images_per_s", ",.0f"),
            ("seconds_to_accuracy", ".2f"),
        ):
            values = [result[name] for result in results if name in result]
            if len(values) == len(results):
                summary[name] = {
                    "mean": statistics.mean(values),
                    "std": statistics.stdev(values),
                    "values": values,
                }
                mean, std = (format(summary[name][key], form) for key in ("mean", "std"))
                print(f"{name}: {mean} ± {std} (n = {len(values)})", flush=True)
        path = Path(args.log).with_name(Path(args.log).stem + "_seeds.json")
        with atomic_write(path, "w") as file:
            json.dump(
                {"seeds": args.seeds, "arguments": vars(args), **summary},
                file,
                indent=1,
                default=str,
            )


def main(argv=None):
    rank = int(os.environ.get("RANK", 0))
    try:
        with contextlib.redirect_stdout(None) if rank else contextlib.nullcontext():
            args = parse_args(argv)
    except InputError:
        if rank:
            time.sleep(
                5
            )  # rank 0 says it, before torchrun ends all processes because this one ended
            sys.exit(2)
        raise
    if args.export:
        return export(args)
    keep_freed_memory()
    world, amp = join_world(args), choose_amp(args.amp, torch.device(args.device))
    args.amp = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[amp]
    args.global_batch_size = args.batch_size * world.size
    if args.threads or world.size > 1:  # torchrun asks for one thread each
        torch.set_num_threads(args.threads or max(1, len(available_cores()) // world.local_size))
    torch.backends.cudnn.benchmark = True
    loader, scaler = (
        Loader(args.workers),
        torch.amp.GradScaler("cuda") if amp is torch.float16 else None,
    )
    setup = Setup(world.device, amp, scaler, loader, world)
    data = open_on_all(args, loader, world, world.device)
    try:
        run = load_once if args.load_only else train_seeds if args.seeds > 1 else train_once
        run(args, data, setup)
    except (Interrupted, TrainingError) as error:
        if world.rank and not isinstance(
            error, LoadingError
        ):  # all processes know, and rank 0 says it
            sys.exit(1 if isinstance(error, TrainingError) else 130)
        raise
    finally:
        data.close()
    if world.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
