"""Prepare a data set of any form, so that all scripts take it with --data-dir.

    python experiments/import_data.py mnist data/mnist
    python experiments/import_data.py fashion-mnist data/fashion-mnist
    python experiments/import_data.py cifar-100 data/cifar-100
    python experiments/import_data.py pictures data/pets --image-size 64 --skip-damaged
    make data FROM=mnist TO=data/mnist

The first argument is a name, whose files are downloaded, or what somebody has: IDX files (MNIST),
CIFAR-100's binary files, CIFAR-10 in either layout, .npz files as Keras has them, parquet files as
Hugging Face has them, pictures in a folder for each class, named <number>_<label>.png, or with
Kaggle's trainLabels.csv; a folder of one of these, or an archive (.zip, .tar.gz).

The second argument is a new folder. It gets x_train.npy, y_train.npy, x_test.npy and y_test.npy,
which the scripts map into memory, and dataset.json: the name, the classes, mean and standard
deviation, a fingerprint (SHA-256 of all images and labels) and where the data came from.
"""

import contextlib
import csv
import gzip
import hashlib
import importlib.util
import json
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import (
    ARRAY_NAMES,
    CLASSES,
    DATASET_FILE,
    MEAN,
    STD,
    Dataset,
    InputError,
    Parser,
    available_cores,
    describe_folder,
    label_type,
    load_dataset,
    number,
    run_main,
)
from download import DOWNLOADS, download

CHUNK = 1000  # images that are in memory at once
TEST_EVERY = 6  # where there is no test set, one picture in so many becomes one, as in CIFAR-10
DIGITS = tuple("0123456789")
FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


class Content(NamedTuple):
    """What a reader has found. Images have a shape (N, H, W, C) and can be sliced, as arrays."""

    x_train: Any
    y_train: np.ndarray
    x_test: Any
    y_test: np.ndarray
    classes: tuple
    notes: tuple = ()  # sentences for the user


class Options(NamedTuple):
    """What the readers of pictures need to know, and where they may put files for a moment."""

    image_size: int | None
    skip_damaged: bool
    scratch: Path


# --------------------------------------------------------------------------------------------------
# Files with arrays: IDX, CIFAR-100, .npz, CIFAR-10
# --------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> np.ndarray:
    """An IDX file, as MNIST has them, compressed or not: an array of uint8.

    Two zero bytes, the type (8: bytes), the number of dimensions, each dimension in four bytes, the
    highest first; then the values. http://yann.lecun.com/exdb/mnist/
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cut short or damaged ({error}): fetch it again") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08" or data[3] not in (1, 3):
        raise InputError(
            f"{path}: begins with {data[:4].hex(' ')}, an IDX file of bytes with 00 00 08 01 or "
            "00 00 08 03: fetch it again"
        )
    dimensions = data[3]
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", data[4:start].ljust(4 * dimensions, b"\0"))
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(data) != expected:
        raise InputError(f"{path}: {len(data):,} bytes, its head says {expected:,}: fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def find_idx(folder: Path) -> dict | None:
    """{array name: path} of a folder's four IDX files; None if there are none."""
    patterns = {
        "x_train": r"train[-_.]images[-.]idx3[-.]ubyte(\.gz)?$",
        "y_train": r"train[-_.]labels[-.]idx1[-.]ubyte(\.gz)?$",
        "x_test": r"(t10k|test)[-_.]images[-.]idx3[-.]ubyte(\.gz)?$",
        "y_test": r"(t10k|test)[-_.]labels[-.]idx1[-.]ubyte(\.gz)?$",
    }
    found = {}
    for name, pattern in patterns.items():
        paths = sorted(path for path in folder.iterdir() if re.search(pattern, path.name))
        if paths:
            found[name] = paths[0]
    if not found:
        return None
    missing = patterns.keys() - found.keys()
    if missing:
        raise InputError(f"{folder}: no IDX file for {', '.join(sorted(missing))}: fetch it")
    return found


def read_idx_folder(folder: Path, options: Options) -> Content | None:
    """MNIST, Fashion-MNIST, EMNIST, …: four IDX files."""
    found = find_idx(folder)
    if found is None:
        return None
    arrays = {name: read_idx(path) for name, path in found.items()}
    for name, array in arrays.items():
        if array.ndim != (3 if name[0] == "x" else 1):
            raise InputError(f"{found[name]}: {array.ndim} dimensions: the files are mixed up")
    names = DIGITS
    if "fashion" in str(folder).lower():
        names = FASHION
    count = int(max(arrays["y_train"].max(initial=0), arrays["y_test"].max(initial=0))) + 1
    classes = names if count <= len(names) else tuple(map(str, range(count)))
    x_train, x_test = (arrays[name][..., None] for name in ("x_train", "x_test"))
    return Content(x_train, arrays["y_train"], x_test, arrays["y_test"], classes)


def read_cifar100(folder: Path, options: Options) -> Content | None:
    """CIFAR-100's binary layout: coarse label, fine label, red, green, blue plane."""
    if (folder / "cifar-100-binary").is_dir():
        folder = folder / "cifar-100-binary"
    is_pickled = folder.name == "cifar-100-python" or (folder / "cifar-100-python").is_dir()
    if is_pickled or any(folder.glob("cifar-100-python*")):
        raise InputError(
            f"{folder}: CIFAR-100's Python layout is pickles, which can run any code and are not "
            "opened: give cifar-100 in its place, which downloads the binary layout"
        )
    if not (folder / "fine_label_names.txt").exists() and not (folder / "train.bin").exists():
        return None
    arrays = []
    for name in ("train.bin", "test.bin"):
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size == 0 or size % 3074:
            raise InputError(f"{path}: {size:,} bytes, not a multiple of 3,074: fetch it again")
        records = np.fromfile(path, np.uint8).reshape(-1, 3074)
        if records[:, 1].max() > 99:
            raise InputError(
                f"{path}: label {records[:, 1].max()}, labels end at 99: fetch it again"
            )
        images = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # NCHW → NHWC
        arrays += [images, records[:, 1]]
    names = tuple(map(str, range(100)))
    with contextlib.suppress(OSError):
        lines = (folder / "fine_label_names.txt").read_text().split()
        names = tuple(lines) if len(lines) == 100 else names
    return Content(*arrays, names)


def read_npz(path: Path, options: Options) -> Content | None:
    """x_train, y_train, x_test and y_test in an .npz file, as Keras has them."""
    if path.suffix != ".npz":
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = set(ARRAY_NAMES) - set(file.files)
            if missing:
                raise InputError(
                    f"{path}: no arrays {', '.join(sorted(missing))}: it has "
                    f"{', '.join(file.files[:8])}"
                )
            arrays = {name: file[name] for name in ARRAY_NAMES}
            classes = tuple(map(str, file["classes"])) if "classes" in file.files else None
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a valid .npz file without pickles ({error})") from None
    for name in ("x_train", "x_test"):
        arrays[name] = to_images(arrays[name], f"{path}: {name}")
    for name in ("y_train", "y_test"):
        labels = arrays[name].reshape(-1) if arrays[name].shape[1:] == (1,) else arrays[name]
        if labels.ndim != 1 or labels.dtype.kind not in "ui" or labels.min(initial=0) < 0:
            raise InputError(f"{path}: {name} is not a row of whole numbers from 0")
        arrays[name] = labels
    count = int(max(arrays["y_train"].max(initial=0), arrays["y_test"].max(initial=0))) + 1
    return Content(*arrays.values(), classes or tuple(map(str, range(count))))


def to_images(array: np.ndarray, name: str) -> np.ndarray:
    """(N, H, W), (N, H, W, C) or (N, C, H, W), values to 255 or to 1 → (N, H, W, C) uint8."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4:
        raise InputError(f"{name} has the shape {array.shape}, images (N, H, W) or (N, H, W, C)")
    if array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.dtype.kind == "f" and array.min(initial=0) >= 0 and array.max(initial=0) <= 1:
        array = (array * 255).round()
    if array.min(initial=0) < 0 or array.max(initial=0) > 255:
        raise InputError(f"{name}: values beyond 0 to 255: scale them")
    return array.astype(np.uint8)


def read_cifar10(folder: Path, options: Options) -> Content | None:
    """CIFAR-10 in the layouts that the scripts read too."""
    layouts = ("data_batch_1", "data_batch_1.bin", "cifar-10-batches-py", "cifar-10-batches-bin")
    if not any((folder / name).exists() for name in layouts):
        return None
    data = load_dataset(str(folder), "cifar10")
    return Content(data.x_train, data.y_train, data.x_test, data.y_test, CLASSES)


# --------------------------------------------------------------------------------------------------
# Pictures: folders, Kaggle's table, parquet
# --------------------------------------------------------------------------------------------------


def pictures_module():
    """train_cifar.py, which reads pictures. Only they need it: it loads PyTorch."""
    try:
        import train_cifar
    except ImportError as error:
        raise InputError(
            f"to read pictures, install the packages of train_cifar.py ({error})"
        ) from None
    return train_cifar


class Pictures:
    """Pictures as an array (N, H, W, C) uint8 whose slices are read when they are asked for."""

    def __init__(self, source):
        self.source = source
        self.shape = (len(source.labels), *source.image_shape)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index: slice) -> np.ndarray:
        numbers = np.arange(len(self))[index]
        with ThreadPoolExecutor(len(available_cores())) as pool:
            parts = np.array_split(numbers, max(1, len(numbers) // 32))
            return np.concatenate([images for images, _ in pool.map(self.source.read, parts)])


def read_picture_folder(folder: Path, options: Options) -> Content | None:
    """Folders train/ and test/ of pictures, or class folders alone, which are then divided."""
    train_folder = next((folder / n for n in ("train", "training") if (folder / n).is_dir()), None)
    subfolders = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."]
    if train_folder is None and len(subfolders) < 2:
        return None
    script = pictures_module()
    notes = []
    names = script.read_class_names(folder)
    test_folders = [folder / name for name in script.TEST_FOLDERS if (folder / name).is_dir()]
    if train_folder and test_folders:
        lists = [script.list_pictures(f, notes) for f in (train_folder, test_folders[0])]
    else:
        lists = divide(script.list_pictures(train_folder or folder, notes))
        notes.append(f"no test set: one picture in {TEST_EVERY} of each class became one")
    if not all(lists):
        return None
    return examine(script, *script.label_pictures(*lists, names), options, notes)


def divide(pictures: list) -> list[list]:
    """A training and a test list: every TEST_EVERY-th picture of a class is a test picture."""
    train, test = [], []
    seen = {}
    for picture in pictures:
        name = picture[1]
        seen[name] = seen.get(name, 0) + 1
        (train if seen[name] % TEST_EVERY else test).append(picture)
    if not test:  # few of each class
        train, test = train[: -len(train) // TEST_EVERY], train[-len(train) // TEST_EVERY :]
    return [train, test]


def examine(script, train, test, classes, options: Options, notes=()) -> Content:
    """The Content of two lists of Picture: all are decoded once, so that damage shows now."""
    from tqdm import tqdm

    with ThreadPoolExecutor(len(available_cores())) as pool:

        def shown(function, items):
            progress = tqdm(total=len(items), desc="checked", unit=" pictures", disable=None)
            with progress:
                for result in pool.map(function, items):
                    progress.update()
                    yield result

        pictures = script.examine_pictures(
            train, test, options.image_size, options.skip_damaged, parallel_map=shown
        )
    sources = []
    for split, kept in (("training", pictures.train), ("test", pictures.test)):
        if not kept:
            raise InputError(f"no {split} picture is left")
        sources.append(script.ImageFolderSource(kept, pictures.image_shape, pictures.deep))
    arrays = []
    for source in sources:
        arrays += [Pictures(source), source.labels]
    return Content(*arrays, classes, (*notes, *pictures.notes))


def read_kaggle(folder: Path, options: Options) -> Content | None:
    """train/<id>.png and trainLabels.csv. Kaggle's test set has no labels: train/ is divided."""
    table = folder / "trainLabels.csv"
    if not table.exists():
        return None
    script = pictures_module()
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"id", "label"} <= rows[0].keys():
        raise InputError(f"{table}: no columns id and label")
    files = {path.stem: path for path in sorted((folder / "train").glob("[!.]*.*"))}
    labels = {row["id"]: row["label"] for row in rows}
    unlabelled = files.keys() - labels.keys()
    absent = labels.keys() - files.keys()
    if unlabelled or absent:
        example = sorted(unlabelled or absent)[0]
        raise InputError(
            f"{folder}: {len(files):,} pictures in train/, {len(labels):,} labels in {table.name}; "
            f"{example} has only {'a picture' if unlabelled else 'a label'}: complete them"
        )
    pictures = [(i, label, str(files[name])) for i, (name, label) in enumerate(labels.items())]
    notes = (f"Kaggle's test/ has no labels: one picture in {TEST_EVERY} of train/ tests",)
    lists = script.label_pictures(*divide(pictures))
    return examine(script, *lists, options, notes)


def read_parquet(folder: Path, options: Options) -> Content | None:
    """Hugging Face's parquet files: a column of pictures and one of labels, train-* and test-*."""
    paths = sorted(folder.rglob("*.parquet"))
    if not paths:
        return None
    if not importlib.util.find_spec("pyarrow"):
        raise InputError(
            f"{folder}: to read parquet, install pyarrow: python -m pip install -c "
            "requirements.txt pyarrow"
        )
    script = pictures_module()
    lists = []
    names = ()
    for split, pattern in (("train", r"train"), ("test", r"test|valid")):
        chosen = [path for path in paths if re.match(pattern, path.name)]
        if not chosen:
            raise InputError(f"{folder}: no {split}-*.parquet among {len(paths)} parquet files")
        pictures = []
        for path in chosen:
            names = write_parquet_pictures(path, options.scratch / split, pictures, names)
        lists.append(pictures)
    labels = [label for _, label, _ in (*lists[0], *lists[1])]
    if all(label.isdecimal() for label in labels):  # numbers, perhaps with names for them
        most = max(map(int, labels), default=0)
        names = names or tuple(map(str, range(most + 1)))
        if most >= len(names):
            raise InputError(f"{folder}: label {most}, but names for {len(names)} classes")
        lists = [[(i, names[int(label)], path) for i, label, path in part] for part in lists]
    return examine(script, *script.label_pictures(*lists, names), options)


def write_parquet_pictures(path: Path, folder: Path, pictures: list, names: tuple) -> tuple:
    """Write the pictures of a parquet file into a folder and append them to a list, as
    list_pictures() has them. Returns the names of the classes, () if the file has none."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        image = next((name for name in ("image", "img") if name in columns), None)
        label = next((n for n in ("label", "fine_label", "labels") if n in columns), None)
        if image is None or label is None:
            raise InputError(
                f"{path}: its columns are {', '.join(columns)}: one of pictures (image or img) and "
                "one of labels (label or fine_label) are needed"
            )
        about = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        feature = about.get("info", {}).get("features", {}).get(label, {})
        names = tuple(map(str, feature.get("names", names)))
        for batch in file.iter_batches(CHUNK, columns=[image, label]):
            for row in batch.to_pylist():
                picture = row[image]
                data = picture["bytes"] if isinstance(picture, dict) else picture
                if data is None or row[label] is None:
                    raise InputError(f"{path}: a row without picture or label")
                target = folder / str(len(pictures))
                target.write_bytes(data)
                pictures.append((len(pictures), str(row[label]), str(target)))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: cut short or damaged ({error}): fetch it again") from None
    return names


# --------------------------------------------------------------------------------------------------
# What is it?
# --------------------------------------------------------------------------------------------------

READERS: tuple[Callable, ...] = (
    read_idx_folder,
    read_cifar100,
    read_cifar10,
    read_kaggle,
    read_parquet,
    read_picture_folder,
)
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


def read_any(path: Path, options: Options, depth: int = 2) -> Content:
    """The Content of a file or folder. Raises InputError that lists what lies there."""
    if (path / DATASET_FILE).exists():
        raise InputError(f"{path} is prepared already: give it to the scripts with --data-dir")
    if path.is_file():
        if path.name.endswith(ARCHIVES):
            return read_any(unpack(path, options.scratch / "archive"), options)
        content = read_npz(path, options)
        if content:
            return content
    if path.is_dir():
        for reader in READERS:
            content = reader(path, options)
            if content:
                return content
        # Perhaps there is one thing in it: a folder a level deeper, an archive, an .npz file.
        inside = [entry for entry in sorted(path.iterdir()) if entry.name[0] not in "._"]
        inside = [e for e in inside if e.is_dir() or e.name.endswith((*ARCHIVES, ".npz"))]
        if len(inside) == 1 and depth:
            return read_any(inside[0], options, depth - 1)
    raise InputError(
        f"{path}, {describe_folder(path)}, is not one data set of a known form: give the folder or "
        f"file of one, or a name: {', '.join(DOWNLOADS)}; docs/data.md has the forms"
    )


def unpack(path: Path, folder: Path) -> Path:
    """Unpack an archive; of its members only plain files, and none to a place outside `folder`."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)  # drops what would lead outside
            return folder
        with tarfile.open(path) as archive:
            for member in archive:
                target = (folder / member.name).resolve()
                if member.isfile() and target.is_relative_to(folder.resolve()):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.extractfile(member) as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: cut short or damaged ({error}): fetch it again") from None
    return folder


# --------------------------------------------------------------------------------------------------
# The prepared form
# --------------------------------------------------------------------------------------------------


def check_content(content: Content, origin: str):
    """Raise InputError if images, labels and classes do not fit together."""
    splits = (
        ("training", content.x_train, content.y_train),
        ("test", content.x_test, content.y_test),
    )
    for name, images, labels in splits:
        if len(images) != len(labels):
            raise InputError(f"{origin}: {len(images):,} {name} images, but {len(labels):,} labels")
        if not len(labels):
            raise InputError(f"{origin}: no {name} images")
        if int(labels.max()) >= len(content.classes):
            raise InputError(
                f"{origin}: {name} label {labels.max()}, but {len(content.classes)} classes"
            )
    if content.x_train.shape[1:] != content.x_test.shape[1:]:
        raise InputError(
            f"{origin}: training images of {content.x_train.shape[1:]}, test images of "
            f"{content.x_test.shape[1:]}: both need the same size"
        )
    if not 2 <= len(content.classes) <= 1000:
        raise InputError(f"{origin}: {len(content.classes)} classes: 2 to 1000 can be trained")


def write_prepared(content: Content, name: str, origin: str, target: Path) -> Dataset:
    """Write the prepared form; it is complete or absent, since it is made elsewhere and renamed."""
    from tqdm import tqdm

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as temporary:
        new = Path(temporary) / target.name
        new.mkdir()
        digest = hashlib.sha256()
        channels = content.x_train.shape[3]
        histogram = np.zeros((channels, 256), np.int64)  # of the training images
        total = len(content.y_train) + len(content.y_test)
        with tqdm(total=total, desc="written", unit=" images", disable=None) as bar:
            for array_name, values in zip(ARRAY_NAMES, content[:4], strict=True):
                is_labels = array_name[0] == "y"
                dtype = label_type(content.classes) if is_labels else np.uint8
                path = new / f"{array_name}.npy"
                array = np.lib.format.open_memmap(path, "w+", dtype, tuple(values.shape))
                for start in range(0, len(values), CHUNK):
                    chunk = np.ascontiguousarray(values[start : start + CHUNK], dtype)
                    array[start : start + CHUNK] = chunk
                    digest.update(chunk)
                    if array_name == "x_train":
                        for c in range(channels):
                            histogram[c] += np.bincount(chunk[..., c].ravel(), minlength=256)
                    if not is_labels:
                        bar.update(len(chunk))
                array.flush()
                del array
        mean, std = statistics(histogram)
        if name == "cifar10":  # the numbers that everybody uses, so that runs can be compared
            mean, std = MEAN, STD
        about = {
            "name": name,
            "classes": content.classes,
            "mean": mean,
            "std": std,
            "fingerprint": digest.hexdigest(),
            "image_shape": content.x_train.shape[1:],
            "train_images": len(content.y_train),
            "test_images": len(content.y_test),
            "source": origin,
            "notes": content.notes,
        }
        (new / DATASET_FILE).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")

        # Read back, as the scripts will: what the disk returns must have the same fingerprint.
        data = load_dataset(str(new))
        digest = hashlib.sha256()
        for array in data[:4]:
            digest.update(array)
        if digest.hexdigest() != data.fingerprint:
            raise OSError(f"{target}: what was written cannot be read back: is the disk full?")
        del data
        new.rename(target)
    return load_dataset(str(target))


def statistics(histogram: np.ndarray) -> tuple[list, list]:
    """Mean and standard deviation of each channel, from 0 to 1, from counts (C, 256) of values."""
    values = np.arange(256) / 255
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ np.square(values) - mean**2, 0))
    std[std < 1e-3] = 1  # a channel that is the same everywhere
    return mean.tolist(), std.tolist()


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    names = ", ".join(DOWNLOADS)
    add("source", metavar="FROM", help=f"a folder or file, or one of {names}")
    add("target", metavar="TO", help="a new folder, such as data/mnist")
    add("--name", help="of the data set, in logs and plots (default: that of the folder)")
    classes = "names of the classes, with commas between them (default: from the data)"
    add("--classes", type=lambda text: tuple(text.split(",")), metavar="A,B,…", help=classes)
    size = (
        "scale pictures to N x N pixels, with antialiasing: the middle is kept (default: their own "
        "size if all have the same, else 32)"
    )
    add("--image-size", type=number(int, 4, 4096), metavar="N", help=size)
    damaged = "leave out pictures that cannot be decoded, and say how many"
    add("--skip-damaged", action="store_true", help=damaged)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    target = Path(args.target).expanduser()
    if target.exists():
        raise InputError(f"{target} exists already: give a new folder, or remove it")
    name = args.name or target.resolve().name
    if not re.fullmatch(r"[\w][\w.+-]*", name) or name == "synthetic":
        raise InputError(f"--name {name!r}: letters, digits, - and _, and not synthetic")

    path = Path(args.source).expanduser()
    origin = str(path.resolve())
    if args.source in DOWNLOADS and not path.exists():
        path = download(args.source)
        origin = DOWNLOADS[args.source].urls[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacked-") as scratch:
        options = Options(args.image_size, args.skip_damaged, Path(scratch))
        content = read_any(path, options)
        if args.classes:
            content = content._replace(classes=args.classes)
        check_content(content, str(path))
        data = write_prepared(content, name, origin, target)

    for note in content.notes:
        print(note)
    h, w, channels = data.image_shape
    some = ", ".join(data.classes[:10]) + ", …" * (len(data.classes) > 10)
    print(
        f"{target}: {len(data.y_train):,} training and {len(data.y_test):,} test images of "
        f"{w}x{h}x{channels}, {len(data.classes)} classes: {some}\n"
        f"Train with --data-dir {args.target}",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
