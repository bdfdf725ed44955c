"""experiments/import_data.py: every form in which people have data sets, made small."""

import csv
import functools
import gzip
import hashlib
import http.server
import io
import json
import struct
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from helpers import finish, mpirun, refused, script_environment, start

import common
import download
import import_data
from common import ARRAY_NAMES, load_dataset

rng = np.random.default_rng(0)
IMAGES = rng.integers(256, size=(36, 28, 28), dtype=np.uint8)
LABELS = (np.arange(36) % 10).astype(np.uint8)
TRAIN = slice(0, 30)
TEST = slice(30, 36)


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    """In an empty folder, without data and network, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("CIFAR10_DIR", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in script_environment().items():
        if name.lower() == "https_proxy":
            monkeypatch.setenv(name, value)
    download.urllib.request.install_opener(None)  # urllib keeps the proxies it found first


def prepare(source, target="out", *options):
    """The Dataset that import_data.py makes of a file or folder."""
    import_data.main([str(source), str(target), *map(str, options)])
    return load_dataset(str(target))


def idx(array):
    """An array as an IDX file."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return head + np.ascontiguousarray(array, np.uint8).tobytes()


def mnist_files(compressed=True):
    """{name: bytes} of MNIST's four files, with our images."""
    files = {
        "train-images-idx3-ubyte": idx(IMAGES[TRAIN]),
        "train-labels-idx1-ubyte": idx(LABELS[TRAIN]),
        "t10k-images-idx3-ubyte": idx(IMAGES[TEST]),
        "t10k-labels-idx1-ubyte": idx(LABELS[TEST]),
    }
    if compressed:
        files = {f"{name}.gz": gzip.compress(data) for name, data in files.items()}
    return files


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def assert_is_mnist(data):
    np.testing.assert_array_equal(data.x_train, IMAGES[TRAIN][..., None])
    np.testing.assert_array_equal(data.x_test, IMAGES[TEST][..., None])
    assert data.y_train.tolist() == LABELS[TRAIN].tolist()
    assert data.y_test.tolist() == LABELS[TEST].tolist()


# -- the prepared form


def test_the_prepared_form(tmp_path):
    """Arrays that are mapped, the exact mean and deviation, the fingerprint of what is in them."""
    data = prepare(write_files(tmp_path / "in", mnist_files()), "data/mnist")
    assert_is_mnist(data)
    assert (data.name, data.image_shape, data.classes) == (
        "mnist",
        (28, 28, 1),
        tuple("0123456789"),
    )
    assert data.mean == pytest.approx([IMAGES[TRAIN].mean() / 255])
    assert data.std == pytest.approx([IMAGES[TRAIN].std() / 255])
    assert data.fingerprint == hashlib.sha256(b"".join(map(bytes, data[:4]))).hexdigest()
    assert isinstance(data.x_train.base, np.memmap)
    about = json.loads((tmp_path / "data/mnist/dataset.json").read_text())
    assert about["source"] == str(tmp_path / "in")
    part = load_dataset("data/mnist", subset=10)
    assert [len(array) for array in part[:4]] == [10, 10, 2, 2]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mnist"]  # nothing is left


def test_a_subset_larger_than_the_prepared_set(tmp_path):
    prepare(write_files(tmp_path / "in", mnist_files()))
    with pytest.raises(common.InputError, match=r"--subset 31: .* from 1 to 30"):
        load_dataset("out", subset=31)
    with pytest.raises(common.InputError, match="out holds out, not cifar10"):
        load_dataset("out", "cifar10")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a | {"y_train": a["y_train"][:-1]}, "30 images, but labels"),
        (lambda a: a | {"x_train": a["x_train"][..., 0]}, "images are not"),
        (lambda a: a | {"y_test": a["y_test"] + np.uint8(9)}, "label 14, but 10 classes"),
        (lambda a: a | {"x_test": a["x_test"][:, :14]}, "test images"),
    ],
)
def test_a_prepared_folder_that_does_not_fit_together(tmp_path, change, words):
    prepare(write_files(tmp_path / "in", mnist_files()))
    arrays = {name: np.load(f"out/{name}.npy") for name in ARRAY_NAMES}
    for name, array in change(arrays).items():
        np.save(f"out/{name}.npy", array)
    with pytest.raises(common.InputError, match=f"out: not a valid prepared .*{words}"):
        load_dataset("out")


def test_a_folder_that_exists_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists already" in refused(import_data.main, "mnist", "out")


# -- arrays


@pytest.mark.parametrize("compressed", [True, False])
def test_idx(tmp_path, compressed):
    """Also a level deeper, where torchvision puts them."""
    write_files(tmp_path / "MNIST" / "raw", mnist_files(compressed))
    assert_is_mnist(prepare(tmp_path / "MNIST"))


def test_fashion_mnist_has_names(tmp_path):
    data = prepare(write_files(tmp_path / "fashion-mnist", mnist_files()))
    assert data.classes[9] == "Ankle boot"


def break_magic(files):
    files["train-images-idx3-ubyte"] = b"\x89PNG" + files["train-images-idx3-ubyte"][4:]


def break_length(files):
    files["t10k-images-idx3-ubyte"] = files["t10k-images-idx3-ubyte"][:-5]


def lose_a_label(files):
    files["train-labels-idx1-ubyte"] = idx(LABELS[TRAIN][:-1])


def lose_a_file(files):
    del files["t10k-labels-idx1-ubyte"]


def cut_gzip(files):
    files["train-images-idx3-ubyte"] = gzip.compress(files["train-images-idx3-ubyte"])[:-20]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_magic, "train-images-idx3-ubyte: begins with 89 50 4e 47"),
        (break_length, "its head says 4,720"),
        (lose_a_label, "30 training images, but 29 labels"),
        (lose_a_file, "no IDX file for y_test"),
        (cut_gzip, "cut short or damaged"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, damage, words):
    files = mnist_files(compressed=False)
    damage(files)
    assert words in refused(import_data.main, write_files(tmp_path / "in", files), "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def npz(path, **changes):
    arrays = {"x_train": IMAGES[TRAIN], "y_train": LABELS[TRAIN]}
    arrays |= {"x_test": IMAGES[TEST], "y_test": LABELS[TEST]}
    np.savez(path, **{**arrays, **changes})
    return path


def test_npz_as_keras_has_it(tmp_path):
    assert_is_mnist(prepare(npz(tmp_path / "mnist.npz")))
    by_channel = np.repeat(IMAGES[TRAIN][:, None] / 255, 3, axis=1)  # (N, 3, 28, 28), 0 to 1
    tests = np.repeat(IMAGES[TEST][:, None] / 255, 3, axis=1)
    columns = LABELS[TRAIN][:, None].astype(np.int64)  # as Keras's CIFAR-10
    npz(tmp_path / "floats.npz", x_train=by_channel, x_test=tests, y_train=columns)
    data = prepare(tmp_path / "floats.npz", "floats")
    np.testing.assert_array_equal(data.x_train[..., 1], IMAGES[TRAIN])
    assert data.image_shape == (28, 28, 3)


class Payload:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_train": np.array([Payload()] * 30, object)}, "without pickles"),
        ({"y_train": LABELS[TRAIN] / 3}, "not a row of whole numbers"),
        ({"x_test": IMAGES[TEST].astype(int) * 300}, "values beyond 0 to 255"),
        ({"y_train": LABELS[:29]}, "30 training images, but 29 labels"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, changes, words):
    assert words in refused(import_data.main, npz(tmp_path / "a.npz", **changes), "out")
    assert not (tmp_path / "executed").exists()


def cifar100_files():
    images = rng.integers(256, size=(40, 3, 32, 32), dtype=np.uint8)
    labels = np.stack([np.arange(40) % 20, np.arange(40) * 2], axis=1).astype(np.uint8)
    records = np.concatenate([labels, images.reshape(40, -1)], axis=1)
    names = "\n".join(f"thing{i}" for i in range(100))
    files = {"train.bin": records[:30].tobytes(), "test.bin": records[30:].tobytes()}
    return {**files, "fine_label_names.txt": names.encode()}, images, labels[:, 1]


def archive(path, folder, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_cifar100_in_its_archive(tmp_path):
    files, images, labels = cifar100_files()
    data = prepare(archive(tmp_path / "cifar-100-binary.tar.gz", "cifar-100-binary", files))
    np.testing.assert_array_equal(data.x_train, images[:30].transpose(0, 2, 3, 1))
    assert data.y_test.tolist() == labels[30:].tolist()
    assert (len(data.classes), data.classes[99]) == (100, "thing99")


def test_an_archive_that_is_cut_short(tmp_path):
    path = archive(tmp_path / "cifar-100-binary.tar.gz", "cifar-100-binary", cifar100_files()[0])
    path.write_bytes(path.read_bytes()[:5000])
    assert "cut short or damaged" in refused(import_data.main, path, "out")


def test_cifar100s_pickles_are_not_opened(tmp_path):
    write_files(tmp_path / "in" / "cifar-100-python", {"train": b"", "test": b""})
    assert "pickles" in refused(import_data.main, tmp_path / "in", "out")


def test_an_archive_cannot_write_outside(tmp_path):
    path = tmp_path / "evil.tar.gz"
    archive(path, "../..", {"evil": b"x"})
    refused(import_data.main, path, "out")
    assert not any("evil" in p.name for p in tmp_path.parent.iterdir())


def test_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "mnist.zip", "w") as file:
        for name, data in mnist_files().items():
            file.writestr(f"archive/{name}", data)
    assert_is_mnist(prepare(tmp_path / "mnist.zip"))


def test_something_else_is_listed(tmp_path):
    write_files(tmp_path / "in", {"a.txt": b"", "b.doc": b""})
    line = refused(import_data.main, tmp_path / "in", "out")
    assert "which holds a.txt, b.doc, is not one data set of a known form" in line
    assert "no such" not in line
    assert "which does not exist" in refused(import_data.main, "mnits", "out")


# -- pictures


@pytest.fixture
def pictures(tmp_path):
    """pictures(split, name, pixels): a picture in a class folder, or where `name` says."""
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torch")

    def save(place, pixels, **options):
        path = tmp_path / "in" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **options)

    return save


def color(value, size=(32, 32)):
    return np.full((*size, 3), value, np.uint8)


def test_class_folders(tmp_path, pictures):
    for i in range(4):
        for name in ("cat", "dog"):
            pictures(f"train/{name}/{i}.png", color(10 * i))
            pictures(f"test/{name}/{i}.bmp", color(20 * i))
    data = prepare(tmp_path / "in", "out", "--name", "pets")
    assert (data.name, data.classes, data.image_shape) == ("pets", ("cat", "dog"), (32, 32, 3))
    assert data.x_train[:, 0, 0, 0].tolist() == [0, 0, 10, 10, 20, 20, 30, 30]  # they alternate
    assert data.y_train.tolist() == [0, 1] * 4
    assert data.x_test[-1, 0, 0].tolist() == [60] * 3


def test_class_folders_that_are_numbers(tmp_path, pictures):
    """The folders are the classes, in the order of the numbers."""
    for split in ("train", "test"):
        for name in ("2", "10", "7"):
            pictures(f"{split}/{name}/0.png", color(int(name)))
    data = prepare(tmp_path / "in")
    assert data.classes == ("2", "7", "10")
    names = [data.classes[label] for label in data.y_train]
    assert data.x_train[:, 0, 0, 0].tolist() == [int(name) for name in names]


def test_class_folders_without_a_test_set_are_divided(tmp_path, pictures, capsys):
    for i in range(12):
        for name in ("cat", "dog", "狗"):
            pictures(f"{name}/{i}.png", color(i))
    data = prepare(tmp_path / "in")
    assert [len(data.y_train), len(data.y_test)] == [30, 6]
    assert data.y_test.tolist() == [0, 1, 2] * 2
    assert "no test set: one picture in 6 of each class became one" in capsys.readouterr().out


def test_sizes_and_damaged_pictures(tmp_path, pictures, capsys):
    for i in range(3):
        pictures(f"train/cat/{i}.png", color(i, (48, 64)))
        pictures(f"train/dog/{i}.png", color(i))
        pictures(f"test/dog/{i}.png", color(i))
    (tmp_path / "in/train/cat/1.png").write_bytes(b"")
    line = refused(import_data.main, tmp_path / "in", "out")
    assert "train/cat/1.png cannot be decoded" in line
    data = prepare(tmp_path / "in", "out", "--skip-damaged", "--image-size", 16)
    assert data.x_train.shape == (5, 16, 16, 3)
    out = capsys.readouterr().out
    assert "left out, damaged: 1" in out
    assert "2 sizes (32x32, 64x48): resized to 16x16" in out
    assert json.loads((tmp_path / "out/dataset.json").read_text())["notes"]


def test_a_class_only_in_test_is_refused(tmp_path, pictures):
    for place in ("train/cat", "train/dog", "test/cat", "test/bird"):
        pictures(f"{place}/0.png", color(1))
    line = refused(import_data.main, tmp_path / "in", "out")
    assert "class bird has no training pictures" in line


def test_an_empty_class_folder_is_mentioned(tmp_path, pictures, capsys):
    for place in ("train/cat", "train/dog", "test/cat"):
        pictures(f"{place}/0.png", color(1))
    (tmp_path / "in/train/bird").mkdir()
    (tmp_path / "in/train/about").mkdir()
    (tmp_path / "in/train/about/readme.txt").write_text("no picture")
    data = prepare(tmp_path / "in")
    assert data.classes == ("cat", "dog")
    out = capsys.readouterr().out
    for name in ("bird", "about"):
        assert f"in/train/{name}: no pictures in it, so no class" in out


def kaggle(tmp_path, pictures, labels=12):
    for i in range(1, 13):
        pictures(f"train/{i}.png", color(i))
    with open(tmp_path / "in/trainLabels.csv", "w", newline="") as file:
        rows = [("id", "label"), *((i, ("frog", "truck")[i % 2]) for i in range(1, labels + 1))]
        csv.writer(file).writerows(rows)


def test_kaggle(tmp_path, pictures):
    kaggle(tmp_path, pictures)
    data = prepare(tmp_path / "in")
    assert data.classes == ("frog", "truck")
    for images, labels in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert (images[:, 0, 0, 0] % 2).tolist() == labels.tolist()
    assert len(data.y_test) == 2


def test_kaggle_with_too_few_labels(tmp_path, pictures):
    kaggle(tmp_path, pictures, labels=11)
    line = refused(import_data.main, tmp_path / "in", "out")
    assert "12 pictures in train/, 11 labels in trainLabels.csv; 12 has only a picture" in line


def parquet(path, columns, names=None):
    """A parquet file as Hugging Face makes it."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(columns)
    if names:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)


def encoded(value):
    Image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    Image.fromarray(color(value)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_parquet(tmp_path):
    pytest.importorskip("torch")
    names = ["airplane", "automobile", "bird"]
    for split, n in (("train", 6), ("test", 3)):
        columns = {"img": [encoded(i) for i in range(n)], "label": [i % 3 for i in range(n)]}
        parquet(tmp_path / f"in/plain_text/{split}-00000-of-00001.parquet", columns, names)
    data = prepare(tmp_path / "in")
    assert data.classes == tuple(names)
    assert data.x_train[:, 0, 0, 0].tolist() == list(range(6))
    assert data.y_train.tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize("labels", [[0, 2], ["cat", "dog"]])
def test_parquet_without_names(tmp_path, labels):
    pytest.importorskip("torch")
    for split in ("train", "test"):
        columns = {"image": [encoded(1), encoded(2)], "label": labels}
        parquet(tmp_path / f"in/{split}-0.parquet", columns)
    data = prepare(tmp_path / "in")
    expected = (("0", "1", "2"), [0, 2]) if labels == [0, 2] else (("cat", "dog"), [0, 1])
    assert (data.classes, data.y_train.tolist()) == expected


def test_parquet_that_cannot_be_used(tmp_path):
    pytest.importorskip("torch")
    parquet(tmp_path / "in/train-0.parquet", {"text": ["a"], "label": [0]})
    parquet(tmp_path / "in/test-0.parquet", {"text": ["a"], "label": [0]})
    line = refused(import_data.main, tmp_path / "in", "out")
    assert "its columns are text, label: one of pictures (image or img)" in line
    path = tmp_path / "in/train-0.parquet"
    path.write_bytes(path.read_bytes()[:100])
    assert "cut short or damaged" in refused(import_data.main, tmp_path / "in", "out")
    path.unlink()
    assert "no train-*.parquet" in refused(import_data.main, tmp_path / "in", "out")


# -- downloads


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, from the byte that a Range asks for; notes what was asked."""

    asked: list  # of all requests

    def log_message(self, *_):
        pass

    def do_GET(self):
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.asked.append((self.path, start))
        try:
            with open(self.translate_path(self.path), "rb") as file:
                data = file.read()[start:]
        except OSError:
            self.send_error(404)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: self.server.breaks_after])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of this machine with MNIST's files, where import_data.py looks for them."""
    files = mnist_files()
    folder = write_files(tmp_path / "server", files)
    handler = type("OwnHandler", (Handler,), {"asked": []})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=folder)
    )
    server.daemon_threads = True
    server.breaks_after = None
    server.asked = handler.asked
    server.folder = folder
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    sums = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    url = f"http://127.0.0.1:{server.server_port}/"
    dead = "http://127.0.0.1:9/"
    monkeypatch.setitem(download.DOWNLOADS, "mnist", download.Download((dead, url), sums))
    yield server
    server.shutdown()
    server.server_close()


def test_download_by_name(tmp_path, server):
    """From the second mirror; a second import asks for nothing."""
    assert_is_mnist(prepare("mnist", "data/mnist"))
    asked = len(server.asked)
    assert asked == 4
    assert_is_mnist(prepare("mnist", "again"))
    assert len(server.asked) == asked


def test_a_download_that_breaks_off_is_continued(tmp_path, server):
    server.breaks_after = 100
    line = refused(import_data.main, "mnist", "out")
    assert "cannot be downloaded" in line
    assert "it broke off after 100 of" in line
    server.breaks_after = None
    assert_is_mnist(prepare("mnist"))
    assert ("/train-images-idx3-ubyte.gz", 100) in server.asked


def test_a_download_with_a_wrong_checksum_is_not_used(tmp_path, server):
    (server.folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"something else")
    line = refused(import_data.main, "mnist", "out")
    assert "the file that arrived has a wrong checksum" in line
    assert "put train-images-idx3-ubyte.gz" in line
    assert not list((tmp_path / "cache").rglob("t10k-labels*"))
    assert not (tmp_path / "out").exists()


# -- what the scripts say of such forms


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: write_files(folder, mnist_files()), "IDX files, as of MNIST"),
        (lambda folder: npz(folder / "mnist.npz"), "arrays in an .npz file"),
        (lambda folder: write_files(folder / "plain_text", {"train-0.parquet": b""}), "parquet"),
        (lambda folder: write_files(folder / "cifar-100-python", {}), "CIFAR-100"),
        (lambda folder: write_files(folder / "train" / "cat", {}), "folders of pictures"),
    ],
)
def test_a_script_names_the_form_and_the_command(tmp_path, make, words):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(common.InputError) as error:
        load_dataset(str(tmp_path / "in"))
    assert words in str(error.value)
    assert f"python experiments/import_data.py {tmp_path / 'in'}" in str(error.value)


# -- the scripts train on it, and compute the same


@pytest.fixture(scope="module")
def other_sizes(tmp_path_factory):
    """A prepared data set of 3 classes, 20 × 28 pixels and one channel."""
    folder = tmp_path_factory.mktemp("prepared")
    generator = np.random.default_rng(1)
    arrays = {}
    for split, n in (("train", 60), ("test", 9)):
        labels = np.arange(n) % 3
        noise = generator.integers(60, size=(n, 20, 28), dtype=np.uint8)
        arrays |= {f"x_{split}": noise + (60 * labels[:, None, None]).astype(np.uint8)}
        arrays |= {f"y_{split}": labels}
    np.savez(folder / "a.npz", **arrays)
    import_data.main([str(folder / "a.npz"), str(folder / "set"), "--classes", "dark,gray,light"])
    return folder / "set"


def weights(folder):
    with np.load(folder / "run.npz", allow_pickle=False) as checkpoint:
        return checkpoint["params"]


@pytest.fixture(scope="module")
def serial_weights(other_sizes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serial")
    finish(start(folder, "serial_cnn.py", *same_run(other_sizes), "--batch-size", 20))
    metrics = dict(np.load(folder / "results/serial_cnn_metrics.npz"))
    assert metrics["confusion"].shape == (3, 3)
    assert metrics["classes"].tolist() == ["dark", "gray", "light"]
    assert metrics["train_loss"][-1] < metrics["train_loss"][0]
    return weights(folder)


def same_run(folder):
    options = "--dtype float64 --epochs 3 --checkpoint run.npz --quiet --data-dir"
    return [*options.split(), folder]


@pytest.mark.parametrize(
    ("script", "ranks", "options"),
    [
        ("gpu_scratch.py", 0, ("--device", "cpu", "--batch-size", 20)),
        ("parallel_cnn_mpi.py", 2, ("--global-batch-size", 20)),
        pytest.param(
            "parallel_cnn_hybrid.py", 2, ("--global-batch-size", 20), marks=pytest.mark.slow
        ),
    ],
)
def test_the_scripts_compute_the_same(
    other_sizes, serial_weights, tmp_path, script, ranks, options
):
    if ranks:
        pytest.importorskip("mpi4py")
        mpirun(tmp_path, ranks, script, *same_run(other_sizes), *options)
    else:
        finish(start(tmp_path, script, *same_run(other_sizes), *options))
    np.testing.assert_allclose(weights(tmp_path), serial_weights, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "command",
    [
        ("train_cifar.py", "--model", "cnn", "--batch-size", 20),
        pytest.param(("train_cifar.py", "--model", "resnet18"), marks=pytest.mark.slow),
        pytest.param(
            ("train_resnet50_split_cores.py", "--batch-size", 4, "--subset", 8),
            marks=pytest.mark.slow,
        ),
        pytest.param(("demo.py", "--subset", 40), marks=pytest.mark.slow),
    ],
)
def test_the_other_scripts_take_it_too(other_sizes, tmp_path, command):
    pytest.importorskip("torch")
    out, _ = finish(start(tmp_path, *command, "--epochs", 1, "--data-dir", other_sizes))
    assert "set" in out


def test_a_cpus_default_subset_is_not_more_than_there_is(other_sizes, monkeypatch):
    train_cifar = pytest.importorskip("train_cifar")
    args = train_cifar.parse_args(["--device", "cpu", "--data-dir", str(other_sizes)])
    context = train_cifar.TrainContext(train_cifar.ProcessGroup(), train_cifar.WorkerPool(0))
    assert len(train_cifar.open_data(args, context).y_train) == 60


def test_export_and_s3_layouts_keep_sizes_and_classes(other_sizes, tmp_path):
    """Through --export and --source disk the images, labels and statistics stay the same."""
    pytest.importorskip("obstore")
    train_cifar = pytest.importorskip("train_cifar")
    train_cifar.main(["--export", "exported", "--data-dir", str(other_sizes)])
    data = load_dataset(str(other_sizes))
    disk = ("--source", "disk", "--data-dir", "exported", "--device", "cpu")
    opened = train_cifar.open_folder(train_cifar.parse_args(disk))
    images, labels = opened.train.read(np.arange(60))
    np.testing.assert_array_equal(images, data.x_train)
    assert labels.tolist() == data.y_train.tolist()
    assert (opened.classes, opened.train.mean) == (data.classes, data.mean)
    (shard,) = (tmp_path / "exported/train-shards").iterdir()
    records = np.fromfile(shard, np.uint8).reshape(60, -1)
    images, labels = train_cifar.decode_records(records, data.image_shape)
    np.testing.assert_array_equal(images, data.x_train)
    assert labels.tolist() == data.y_train.tolist()
    wide = np.arange(300, dtype=np.uint16)
    records = train_cifar.encode_records(np.zeros((300, 2, 2, 1), np.uint8), wide)
    assert train_cifar.decode_records(records, (2, 2, 1))[1].tolist() == wide.tolist()
