"""serial_cnn.py as its users run it: what it leaves behind, bad input, divergence, interruption and
resuming.
"""

import functools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import stat
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    REPO,
    assert_one_error_line,
    assert_same_run,
    before_batch,
    count_rows,
    files_in,
    finish,
    numbers,
    read_log,
    read_npz,
    run_on_terminal,
    run_usage_line,
    script_environment,
    send,
    start,
    start_command,
    start_stopping,
    usage_lines,
    wait_until,
    wait_until_stopped,
)
from helpers import (
    refused as refusal,
)

import serial_cnn
from common import (
    CLASSES,
    Conv2D,
    load_batch,
    make_optimizer,
    make_synthetic,
    softmax_cross_entropy,
)

SCRIPT = "serial_cnn.py"
LOG, SIDECAR, METRICS = (
    "results/serial_cnn.csv",
    "results/serial_cnn.json",
    "results/serial_cnn_metrics.npz",
)
TINY = ("--dataset", "synthetic", "--subset", 40, "--epochs", 1)


# --------------------------------------------------------------------------------------------------
# The ladder: every rung is the same function
# --------------------------------------------------------------------------------------------------


@functools.cache
def twenty_steps(*options):
    """The weights after 20 steps with batches of 6 and a last one of 3, in float64."""
    args = serial_cnn.parse_args(["--dtype", "float64", "--lr", "0.01", *options])
    x_train, y_train, *_ = make_synthetic(63, seed=3, n_test=1)
    model = serial_cnn.make_model(args)
    optimizer = make_optimizer(model, args)
    for step in range(20):
        start = step * 6 % 63
        x, labels = load_batch(x_train, y_train, slice(start, start + 6), np.float64)
        _, dlogits = softmax_cross_entropy(model.forward(x), labels)
        model.backward(dlogits)
        optimizer.step(len(labels))
    return model.params


@pytest.mark.parametrize("conv", ["loops", "im2col", "blocked", "fused"])
def test_all_rungs_give_the_same_weights(conv):
    np.testing.assert_allclose(
        twenty_steps("--conv", conv), twenty_steps("--conv", "winograd"), rtol=0, atol=1e-10
    )


@pytest.mark.slow
@pytest.mark.parametrize("conv", ["loops", "im2col", "blocked", "fused"])
def test_all_rungs_give_the_same_first_gradients_of_resnet18(conv):
    """Of 20 free steps of ResNet-18 the rounding errors are amplified: one step is compared."""
    np.testing.assert_allclose(resnet18_grads(conv), resnet18_grads("winograd"), rtol=0, atol=1e-10)


@functools.cache
def resnet18_grads(conv):
    argv = ["--model", "resnet18", "--dtype", "float64", "--conv", conv]
    model = serial_cnn.make_model(serial_cnn.parse_args(argv))
    x, y, *_ = make_synthetic(4, seed=3, n_test=1)
    x, labels = load_batch(x, y, slice(4), np.float64)
    _, dlogits = softmax_cross_entropy(model.forward(x), labels)
    model.backward(dlogits)
    return model.grads


@pytest.mark.parametrize("conv", [serial_cnn.LoopConv2D, serial_cnn.Im2colConv2D])
@pytest.mark.parametrize(("k", "s", "p"), [(3, 1, 1), (1, 2, 0), (5, 2, 2), (2, 3, 0), (3, 1, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_plain_rungs_are_conv2d(conv, k, s, p, bias):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 9, 8, 2))
    layers = [cls(2, 4, k, s, p, bias=bias, rng=1, dtype=np.float64) for cls in (conv, Conv2D)]
    outs = [layer.forward(x) for layer in layers]
    np.testing.assert_allclose(*outs, rtol=0, atol=1e-12)
    dout = rng.standard_normal(outs[0].shape)
    np.testing.assert_allclose(*(layer.backward(dout) for layer in layers), rtol=0, atol=1e-12)
    for ours, theirs in zip(*(layer.grads() for layer in layers), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# What a run leaves behind
# --------------------------------------------------------------------------------------------------

NORMAL = (
    "--dataset",
    "synthetic",
    "--subset",
    100,
    "--batch-size",
    30,
    "--epochs",
    2,
    "--checkpoint",
    "run.npz",
)


@pytest.fixture
def run(run_script, cache):
    """run(*args, status=0, env={...}): the script in tmp_path, with the cache."""
    return lambda *args, env=None, **expected: run_script(
        SCRIPT, *args, env={**cache, **(env or {})}, **expected
    )


@pytest.fixture(scope="module")
def normal(tmp_path_factory, cache):
    """A run with two threads asked for in the environment: its folder, stdout, stderr and
    seconds.
    """
    folder, began = tmp_path_factory.mktemp("normal"), time.monotonic()
    process = start(
        folder, SCRIPT, *NORMAL, env={"OMP_NUM_THREADS": 2, "OPENBLAS_NUM_THREADS": 2, **cache}
    )
    out, err = finish(process)
    return folder, out, err, time.monotonic() - began


def test_files_and_lines_of_a_run(normal):
    folder, out, err, _ = normal
    assert err == ""
    assert {str(path) for path in files_in(folder)} == {"results", LOG, SIDECAR, METRICS, "run.npz"}
    lines = out.splitlines()
    assert [line[:10] for line in lines[:2]] == ["epoch 1/2 ", "epoch 2/2 "]
    assert lines[3] == "serial_cnn: cnn, SYNTHETIC DATA, not CIFAR-10, 100 images"
    header = ["epoch", "train loss", "train acc", "test loss", "test acc", "seconds", "images/s"]
    assert re.split(r"  +", lines[4]) == header
    assert [line.split()[0] for line in lines[6:8]] == ["1", "2"]
    assert lines[8].startswith("serial_cnn: best test accuracy ")
    assert len(lines) == 9


def test_no_bar_without_a_terminal(normal):
    _, out, err, _ = normal
    assert "\r" not in out + err
    assert "|" not in out + err


def test_log_of_a_run(normal):
    rows = read_log(normal[0] / LOG)
    batches = [["2", str(epoch), str(batch), "4"] for epoch in (1, 2) for batch in (1, 2, 3, 4)]
    wanted = [*batches[:4], ["0", "1"], ["1", "1"], *batches[4:], ["0", "2"], ["1", "2"]]
    assert [
        [row[name] for name in ("type", "epoch", "value1", "value2")][: len(w)]
        for row, w in zip(rows, wanted, strict=True)
    ] == wanted
    for row in rows:
        assert all(
            re.fullmatch(r"\d+\.\d{6}", row[name])
            for name in ("start", "loading", "duration", "loss")
        )
        assert 0 < float(row["loading"]) < float(row["duration"])
        assert row["communication"] == row["gpu_percent"] == row["gpu_mem_mb"] == ""
    first = rows[:4]
    assert numbers(first, "duration") == sorted(numbers(first, "duration"))
    assert numbers(first, "images_per_s") == pytest.approx(
        [
            images / seconds
            for images, seconds in zip((30, 60, 90, 100), numbers(first, "duration"), strict=True)
        ],
        rel=1e-3,
    )
    mean = np.average(numbers(first, "loss"), weights=(30, 30, 30, 10))
    assert numbers(rows, "loss", kind=0)[0] == pytest.approx(mean, abs=2e-6)
    assert 20 < numbers(rows, "ram_mb", kind=0)[1] < 1000


def test_metrics_agree_with_the_log(normal):
    metrics, rows = read_npz(normal[0] / METRICS), read_log(normal[0] / LOG)
    columns = {
        "train_loss": (0, "loss"),
        "train_acc": (0, "value1"),
        "test_loss": (1, "loss"),
        "test_acc": (1, "value1"),
        "epoch_time": (0, "duration"),
        "images_per_s": (0, "images_per_s"),
    }
    assert metrics.keys() == {*columns, "confusion", "classes"}
    confusion = metrics["confusion"]  # images of class i taken for class j, at [i, j]
    assert confusion.shape == (10, 10)
    assert confusion.trace() / confusion.sum() == pytest.approx(metrics["test_acc"][-1])
    assert metrics["classes"].tolist() == list(CLASSES)
    for name, (kind, column) in columns.items():
        assert metrics[name] == pytest.approx(numbers(rows, column, kind), abs=1e-6), name


def test_sidecar_of_a_run(normal):
    sidecar = json.loads((normal[0] / SIDECAR).read_text())
    assert (sidecar["script"], sidecar["dataset"], sidecar["status"]) == (
        "serial_cnn",
        "synthetic",
        "done",
    )
    assert (sidecar["seed"], sidecar["ranks"], sidecar["threads"]) == (42, 1, 1)
    assert (sidecar["train_images"], sidecar["test_images"]) == (100, 20)
    assert sidecar["arguments"]["batch_size"] == 30
    assert sidecar["start"] < sidecar["end"]
    totals, rows = sidecar["totals"], read_log(normal[0] / LOG)
    assert totals["train_seconds"] == pytest.approx(
        sum(numbers(rows, "duration", kind=0)), abs=1e-5
    )
    assert totals["images_per_s"] == pytest.approx(200 / totals["train_seconds"])
    assert totals["best_accuracy"] == pytest.approx(max(numbers(rows, "value1", kind=1)), abs=1e-6)


def test_one_blas_thread_whatever_the_environment_says(normal):
    blas = json.loads((normal[0] / SIDECAR).read_text())["blas"]
    assert [library["threads"] for library in blas] == [1] * len(blas)
    assert blas


def test_start_to_first_step(normal):
    folder, *_, seconds = normal
    assert (
        0
        < json.loads((folder / SIDECAR).read_text())["totals"]["first_step_after_seconds"]
        < seconds
    )


def test_old_blas_kernels_are_named(run, tmp_path):
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or not {"avx512f", "avx512vl"} <= set(cpuinfo.read_text().split()):
        pytest.skip("needs a processor with AVX-512")
    done = run(*TINY, env={"OPENBLAS_CORETYPE": "Haswell"})
    blas = json.loads((tmp_path / SIDECAR).read_text())["blas"]
    if "openblas" not in {library["library"] for library in blas}:
        pytest.skip("needs a NumPy with OpenBLAS")
    assert "Haswell" in {library["kernel"] for library in blas}
    assert re.fullmatch(
        r"warning: BLAS uses its Haswell kernels.*unset OPENBLAS_CORETYPE\n", done.stderr
    )


def test_quiet_prints_one_line(run):
    done = run(*TINY, "--quiet")
    assert done.stderr == ""
    assert re.fullmatch(r"serial_cnn: best test accuracy .*SYNTHETIC DATA.*\n", done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
def test_closed_output_and_one_that_cannot_show_a_name(tmp_path, cache):
    closing = ("sh", "-c", 'exec "$@" >&- 2>&-', "sh")
    finish(start_command(tmp_path, [*closing, sys.executable, REPO / SCRIPT, *TINY], cache))
    out, _ = finish(
        start(tmp_path, SCRIPT, *TINY, "--log", "ü.csv", env={**cache, "PYTHONIOENCODING": "ascii"})
    )
    assert out.endswith("log: \\xfc.csv\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a Unix terminal")
def test_bar_on_a_terminal(tmp_path, cache):
    long = ("--dataset", "synthetic", "--subset", 1000, "--epochs", 1)
    sent, lines = run_on_terminal(tmp_path, SCRIPT, *long, env=cache)
    assert re.search(r"\repoch 1/1: +\d+%\|.*<\d\d:\d\d.* images/s, loss \d\.\d{3}\]", sent)
    assert [line[:10] for line in lines] == [
        "epoch 1/1 ",
        "",
        "serial_cnn",
        "epoch  tra",
        "-----  ---",
        "    1     ",
        "serial_cnn",
        "",
    ]
    assert not [line for line in lines if "|" in line]


def test_seed_decides_all_bits(normal, run, tmp_path):
    params = read_npz(normal[0] / "run.npz")["params"]
    run(*NORMAL)
    assert read_npz(tmp_path / "run.npz")["params"].tobytes() == params.tobytes()
    run(*NORMAL, "--seed", 43)
    assert read_npz(tmp_path / "run.npz")["params"].tobytes() != params.tobytes()


def test_float64(normal, run, tmp_path):
    run(*NORMAL, "--dtype", "float64")
    checkpoint = read_npz(tmp_path / "run.npz")
    assert checkpoint["params"].dtype == checkpoint["optimizer_velocity"].dtype == np.float64
    losses = [numbers(read_log(folder / LOG), "loss")[:2] for folder in (tmp_path, normal[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_adam(run, tmp_path):
    run(*TINY, "--optimizer", "adam", "--checkpoint", "run.npz")
    assert {"params", "optimizer_m", "optimizer_v", "optimizer_steps"} < read_npz(
        tmp_path / "run.npz"
    ).keys()
    assert json.loads((tmp_path / SIDECAR).read_text())["arguments"]["lr"] == 0.001


def test_a_batch_may_be_larger_than_the_set(run, tmp_path):
    run("--dataset", "synthetic", "--subset", 1, "--epochs", 1)
    assert [row["type"] for row in read_log(tmp_path / LOG)] == ["2", "0", "1"]


def test_auto_without_data_says_that_it_is_synthetic(run, tmp_path):
    done = run("--subset", 40, "--epochs", 1, "--quiet", env={"CIFAR10_DIR": None})
    assert "SYNTHETIC DATA: these are NOT the CIFAR-10 images" in done.stderr
    assert "SYNTHETIC DATA, not CIFAR-10" in done.stdout
    assert json.loads((tmp_path / SIDECAR).read_text())["dataset"] == "synthetic"


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_named_folder_without_data_is_never_replaced_by_synthetic_images(refused, tmp_path, how):
    """Its contents are in the message, so that a wrong path shows."""
    (tmp_path / "pets" / "holiday").mkdir(parents=True)
    (tmp_path / "pets" / "notes.txt").touch()
    if how == "option":
        refused("--data-dir", "pets", about="no data set in pets, which holds holiday/, notes.txt")
        refused("--data-dir", "nowhere", about="no CIFAR-10 in nowhere, which does not exist")
    else:
        env = {"CIFAR10_DIR": tmp_path / "pets"}
        refused(about="which holds holiday/, notes.txt", env=env)


@pytest.mark.real_data
def test_real_images(run, real_data, tmp_path):
    done = run("--dataset", "cifar10", "--data-dir", real_data, "--subset", 40, "--epochs", 1)
    assert "cnn, cifar10, 40 images" in done.stdout
    assert json.loads((tmp_path / SIDECAR).read_text())["dataset"] == "cifar10"


PEAKS = """
import runpy, sys
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
import common

class RunLog(common.RunLog):
    def end_epoch(self, *result):
        super().end_epoch(*result)
        print("peak", common.peak_rss(), file=sys.stderr)

common.RunLog = RunLog
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "subset", "batch_size"), [("cnn", 300, 100), ("resnet18", 25, 5)]
)
def test_memory_stays_flat(tmp_path, cache, model, subset, batch_size):
    """The peak, which has every short-lived array in it, does not grow after the second epoch."""
    options = ("--model", model, "--subset", subset, "--batch-size", batch_size, "--epochs", 10)
    command = [sys.executable, "-c", PEAKS, REPO / SCRIPT, "--dataset", "synthetic", *options]
    _, err = finish(start_command(tmp_path, command, cache))
    peaks = [int(line.split()[1]) for line in err.splitlines() if line.startswith("peak ")]
    assert len(peaks) == 10
    assert peaks[9] - peaks[1] < 20 * 2**20


@pytest.mark.parametrize("line", usage_lines(REPO / SCRIPT))
def test_usage_lines_are_parsed(line):
    serial_cnn.parse_args(shlex.split(line)[2:])


@pytest.mark.slow
@pytest.mark.parametrize("line", usage_lines(REPO / SCRIPT))
def test_usage_lines_run_as_written(tmp_path, line):
    run_usage_line(tmp_path, REPO / SCRIPT, line, *TINY)
    assert (tmp_path / LOG).exists()


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, cache, monkeypatch, capsys):
    """refused(*args, about=regex): one line about the problem, no file made or changed."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - script_environment().keys():
        monkeypatch.delenv(name)

    def refused(*args, about, env=None):
        for name, value in script_environment(**{**cache, **(env or {})}).items():
            monkeypatch.setenv(name, value)
        before = files_in(tmp_path)
        line = refusal(serial_cnn.main, *args)
        assert capsys.readouterr().out == ""
        assert re.search(about, line), line
        assert files_in(tmp_path) == before

    return refused


def test_a_refusal_is_one_line_and_status_2(run):
    done = run("--dataset", "synthetic", "--lr", 0, status=2)
    assert done.stdout == ""
    assert_one_error_line(done.stderr)


BAD_VALUES = {
    "subset": ("0", "-3", "50001", "many"),
    "batch-size": ("0", "-1", "1.5", "x"),
    "epochs": ("0", "-1", "x"),
    "lr": ("0", "-0.1", "nan", "inf", "x"),
    "momentum": ("1.5", "-1"),
    "weight-decay": ("-1", "nan"),
    "seed": ("-1", "x"),
    "checkpoint-every": ("-1",),
    "optimizer": ("sdg",),
    "dtype": ("float16",),
    "model": ("vgg",),
    "dataset": ("mnist",),
}


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option in BAD_VALUES for value in BAD_VALUES[option]]
)
def test_bad_values(refused, option, value):
    refused(
        "--dataset", "synthetic", f"--{option}={value}", about=f"--{option}.*{re.escape(value)}"
    )


def test_unknown_option(refused):
    refused("--learning-rate", 0.1, about="--learning-rate")


def test_no_data(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for folder in ("missing", "empty", "file"):
        refused("--dataset", "cifar10", "--data-dir", folder, about=folder)


@pytest.fixture(scope="session")
def binary_layout(tmp_path_factory):
    """A folder with six files of the right size, all black images with label 0; sparse, so they
    take no space.
    """
    folder = tmp_path_factory.mktemp("binary") / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        with open(folder / name, "wb") as file:
            file.truncate(30_730_000)
    return folder


@pytest.fixture
def damaged(binary_layout, tmp_path):
    """damaged(name): the path of a copy of that file in tmp_path; the other five are links to the
    good ones.
    """

    def damaged(name):
        folder = tmp_path / "data/cifar-10-batches-bin"
        folder.mkdir(parents=True)
        for path in binary_layout.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / name).unlink()
        with open(folder / name, "wb") as file:
            file.truncate(30_730_000)
        return folder / name

    return damaged


def test_undamaged_batch_files(
    run, damaged, tmp_path
):  # what follows fails because of its damage alone
    damaged("data_batch_1.bin")
    done = run(
        "--dataset", "cifar10", "--data-dir", "data", "--subset", 10, "--epochs", 1, "--quiet"
    )
    assert "cifar10" in done.stdout
    shutil.rmtree(tmp_path / "data")  # 180 MB of .npy files, which pytest would keep


@pytest.mark.parametrize("size", [0, 30_729_999, 30_733_073])
def test_batch_file_of_a_wrong_size(refused, damaged, size):
    os.truncate(damaged("data_batch_3.bin"), size)
    refused("--dataset", "cifar10", "--data-dir", "data", about=rf"data_batch_3.bin: {size} bytes")


def test_missing_batch_file(refused, damaged):
    damaged("data_batch_2.bin").unlink()
    refused("--dataset", "cifar10", "--data-dir", "data", about=r"data_batch_2.bin: missing")


def test_mislabelled_batch_file(refused, damaged):
    with open(damaged("data_batch_1.bin"), "r+b") as file:
        file.seek(3073 * 7)
        file.write(b"\x0a")
    refused(
        "--dataset",
        "cifar10",
        "--data-dir",
        "data",
        about=r"data_batch_1.bin: label 10 in record 7",
    )


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")
def test_pickle_with_a_wrong_checksum_is_not_opened(refused, tmp_path):
    trap, sprung = pickle.dumps(Trap(tmp_path / "sprung")), tmp_path / "sprung"
    pickle.loads(trap)
    assert sprung.exists()
    sprung.unlink()
    folder = tmp_path / "data/cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(trap)
    refused("--dataset", "cifar10", "--data-dir", "data", about="checksum")
    assert not sprung.exists()


@pytest.mark.parametrize("option", ["--log", "--save-metrics", "--checkpoint"])
@pytest.mark.parametrize(
    "place", ["folder", "file/x", "/proc/nothing/x", "x" * 300], ids=lambda place: place[:20]
)
def test_output_that_cannot_be_written(refused, tmp_path, option, place):
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    refused(*TINY, option, place, about=place)


@pytest.mark.parametrize("place", ["", ".", "/"])
def test_log_without_a_name(refused, place):
    refused(*TINY, "--log", place, about="--log|folder")


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_log_that_another_run_is_writing(run, tmp_path, cache):
    process = start_stopping(tmp_path, SCRIPT, *NORMAL, when=before_batch(1, 3), env=cache)
    done = run(*TINY, status=2)
    assert_one_error_line(done.stderr)
    assert "another run is writing it" in done.stderr
    assert len(read_log(tmp_path / LOG)) == 2
    run(*TINY, "--log", "other.csv", "--save-metrics", "other.npz")
    send(process, signal.SIGKILL)
    process.communicate()
    run(*TINY)  # its claim ended with it


def test_resume_with_a_log_that_is_none(normal, refused, tmp_path):
    shutil.copy(normal[0] / "run.npz", tmp_path)
    (tmp_path / "run.csv").write_bytes(b"\xff\xfe\0")
    refused(*NORMAL, "--resume", "--log", "run.csv", about=r"run\.csv")


def test_results_is_a_file(refused, tmp_path):
    (tmp_path / "results").touch()
    refused(*TINY, about="results")


def test_sidecar_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "run.json").mkdir()
    refused(*TINY, "--log", "run.csv", about=r"run\.json")


@pytest.mark.parametrize(
    "options",
    [
        ("--log", "same.json"),
        ("--log", "same", "--save-metrics", "same"),
        ("--log", "same", "--checkpoint", "same"),
        ("--save-metrics", "same", "--checkpoint", "./same"),
    ],
    ids=" ".join,
)
def test_outputs_in_one_file(refused, options):
    refused(*TINY, *options, about="same")


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_links_are_followed(run, tmp_path):
    (tmp_path / "large disk").mkdir()
    for name in ("run.npz", "metrics.npz"):
        (tmp_path / name).symlink_to(f"large disk/{name}")
    run(*TINY, "--checkpoint", "run.npz", "--save-metrics", "metrics.npz")
    for name in ("run.npz", "metrics.npz"):
        assert (tmp_path / name).is_symlink()
        assert read_npz(tmp_path / "large disk" / name)


def test_devices_are_not_replaced(run, tmp_path):
    null = tmp_path / "null"  # one of our own: root could lose the real one
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_text("")
    except (OSError, AttributeError):
        pytest.skip("needs the right to make a device")
    run(*TINY, "--save-metrics", "null", status=None)
    assert null.is_char_device()


def test_resume_without_a_file(run, refused):
    refused(*TINY, "--resume", about="--checkpoint FILE")
    done = run(*TINY, "--resume", "--checkpoint", "new.npz")  # as a cluster's first job does
    assert done.stdout.startswith("no checkpoint new.npz yet: training starts from the beginning\n")


def with_byte(whole, position, value):
    return whole[:position] + bytes([value]) + whole[position + 1 :]


DAMAGES = {
    "garbage": lambda whole: b"no checkpoint\n" * 100,
    "empty": lambda whole: b"",
    "cut after 1000": lambda whole: whole[:1000],
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "cut before the last": lambda whole: whole[:-1],
    "a wrong bit in the data": lambda whole: with_byte(whole, 10**6, whole[10**6] ^ 1),
    "an unknown compression": lambda whole: with_byte(whole, whole.index(b"PK\1\2") + 10, 99),
    "an encrypted array": lambda whole: with_byte(whole, whole.index(b"PK\1\2") + 8, 1),
    "a long header": lambda whole: with_byte(
        whole, whole.index(b"\x93NUMPY", 2000) + 9, 255
    ),  # NumPy: three lines
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_from_a_damaged_checkpoint(normal, refused, tmp_path, damage):
    whole = (normal[0] / "run.npz").read_bytes()
    part = DAMAGES[damage](whole)
    assert part != whole
    (tmp_path / "run.npz").write_bytes(part)
    refused(*NORMAL, "--resume", about=r"run\.npz")


def test_resume_from_another_kind_of_file(normal, refused, tmp_path):
    np.save(tmp_path / "run.npy", np.zeros(3))
    refused(*NORMAL, "--resume", "--checkpoint", "run.npy", about=r"run\.npy")
    shutil.copy(normal[0] / METRICS, tmp_path / "run.npz")
    refused(*NORMAL, "--resume", about=r"run\.npz")


def test_resume_from_another_model(normal, refused, tmp_path):
    arrays = read_npz(normal[0] / "run.npz")
    np.savez(tmp_path / "run.npz", **{**arrays, "params": arrays["params"][:10]})
    refused(*NORMAL, "--resume", about="another model")


@pytest.mark.parametrize(
    ("option", "value", "about"),
    [
        ("--seed", 7, "seed 42, this run has 7"),
        ("--batch-size", 10, "batch.size 30, this run has 10"),
        ("--dtype", "float64", "dtype float32, this run has float64"),
        ("--lr", 0.5, "lr 0.01, this run has 0.5"),
        ("--optimizer", "adam", "optimizer sgd, this run has adam"),
        ("--subset", 50, "subset 100, this run has 50"),
        ("--conv", "fused", "conv winograd, this run has fused"),
    ],
)
def test_resume_with_another_option(normal, refused, tmp_path, option, value, about):
    shutil.copy(normal[0] / "run.npz", tmp_path)
    refused(*NORMAL, "--resume", option, value, about=about)


def test_a_copy_has_files_and_options_of_its_own(tmp_path, cache):
    """A copied script logs under its own name, and resumes only with the same value of its
    option.
    """
    source = (REPO / SCRIPT).read_text()
    line = '    add("--conv",'
    assert source.count(line) == 1
    own = '    add("--dropout", type=float, default=0.5)\n'
    (tmp_path / "my_serial.py").write_text(source.replace(line, own + line))
    shutil.copy(REPO / "common.py", tmp_path)
    command = [sys.executable, "my_serial.py", *TINY, "--quiet", "--checkpoint", "run.npz"]
    finish(start_command(tmp_path, command, cache))
    assert (tmp_path / "results/my_serial.csv").exists()
    assert not (tmp_path / LOG).exists()
    changed = [*command, "--resume", "--dropout", "0.1"]
    _, err = finish(start_command(tmp_path, changed, cache), status=2)
    assert "made with dropout 0.5, this run has 0.1" in err


# --------------------------------------------------------------------------------------------------
# A loss that is not finite, and a disk that is full
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--lr", 1e10),
        ("--lr", 1e300),
        ("--lr", 100),
        ("--optimizer", "adam", "--lr", 1e30),
        ("--dtype", "float64", "--lr", 1e300),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_divergence(run, tmp_path, options):
    done = run(
        "--dataset",
        "synthetic",
        "--subset",
        160,
        "--batch-size",
        20,
        "--epochs",
        3,
        *options,
        status=1,
    )
    assert_one_error_line(done.stderr)  # and no RuntimeWarning
    step, epoch, batch = map(
        int, re.search(r"at step (\d+) \(epoch (\d+), batch (\d+)\)", done.stderr).groups()
    )
    assert step == (epoch - 1) * 8 + batch
    rows = read_log(tmp_path / LOG)
    assert len([row for row in rows if row["type"] == "2"]) == step
    assert (rows[-1]["epoch"], rows[-1]["value1"]) == (str(epoch), str(batch))
    assert not math.isfinite(float(rows[-1]["loss"]))
    assert np.isfinite(numbers(rows[:-1], "loss")).all()
    assert json.loads((tmp_path / SIDECAR).read_text())["status"].startswith("failed")


def test_divergence_keeps_the_checkpoint(normal, run, tmp_path):
    shutil.copy(normal[0] / "run.npz", tmp_path)
    before = (tmp_path / "run.npz").read_bytes()
    run(*NORMAL, "--lr", 1e10, status=1)
    assert (tmp_path / "run.npz").read_bytes() == before
    first = run(*NORMAL, "--lr", 1e10, "--checkpoint-every", 0, status=1)  # saves after step 1
    assert read_npz(tmp_path / "run.npz")["optimizer_steps"] == 1
    again = run(*NORMAL, "--lr", 1e10, "--resume", status=1)
    assert again.stderr == first.stderr
    assert [row["value1"] for row in read_log(tmp_path / LOG)] == ["1", "2"]


def test_divergence_in_the_last_step(
    normal, run, tmp_path
):  # only the validation meets its weights
    shutil.copy(normal[0] / "run.npz", tmp_path)
    before = (tmp_path / "run.npz").read_bytes()
    done = run(*NORMAL, "--batch-size", 100, "--epochs", 1, "--lr", 1e10, status=1)
    assert_one_error_line(done.stderr)
    assert "epoch 1" in done.stderr
    assert json.loads((tmp_path / SIDECAR).read_text())["status"].startswith("failed")
    assert (tmp_path / "run.npz").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs Unix limits")
def test_full_disk(normal, tmp_path, cache):
    import resource

    def limit():  # no file may grow beyond 1 MB: the checkpoint, 8.6 MB, fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    shutil.copy(normal[0] / "run.npz", tmp_path)
    _, err = finish(start(tmp_path, SCRIPT, *NORMAL, env=cache, preexec_fn=limit), status=1)
    assert (tmp_path / "run.npz").read_bytes() == (normal[0] / "run.npz").read_bytes()
    assert {str(path) for path in files_in(tmp_path)} == {
        "results",
        LOG,
        SIDECAR,
        METRICS,
        "run.npz",
    }
    assert json.loads((tmp_path / SIDECAR).read_text())["status"].startswith("failed")
    assert_one_error_line(err)
    assert "run.npz" in err


# --------------------------------------------------------------------------------------------------
# Interruption and resuming
# --------------------------------------------------------------------------------------------------

LONG = (
    "--dataset",
    "synthetic",
    "--subset",
    470,
    "--batch-size",
    16,
    "--epochs",
    3,
    "--checkpoint",
    "run.npz",
)
BATCHES = 30  # in each epoch; the last has 6 images


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cache):
    """reference(optimizer): the folder of an uninterrupted run, made when it is first asked for."""
    folders = {}

    def reference(optimizer):
        if optimizer not in folders:
            folders[optimizer] = tmp_path_factory.mktemp(optimizer)
            finish(start(folders[optimizer], SCRIPT, *LONG, "--optimizer", optimizer, env=cache))
        return folders[optimizer]

    return reference


def test_reference_has_every_batch_once(reference):
    rows = read_log(reference("sgd") / LOG)
    batches = [(int(row["epoch"]), int(row["value1"])) for row in rows if row["type"] == "2"]
    assert batches == [(epoch, batch) for epoch in (1, 2, 3) for batch in range(1, BATCHES + 1)]


def test_resume_after_an_epoch(run, tmp_path, reference):
    run(*LONG, "--epochs", 1)
    run(*LONG, "--resume")
    assert_same_run(tmp_path, reference("sgd"), "serial_cnn")


def test_resume_of_a_schedule_and_augmentation(run, tmp_path, cache):
    """Learning rate and crops are functions of the position: the resumed run has the same ones."""
    options = (*LONG, "--augment", "on", "--schedule", "cosine", "--warmup", 0.5)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    finish(start(tmp_path / "whole", SCRIPT, *options, env=cache))

    process = start_stopping(
        tmp_path / "parts", SCRIPT, *options, when=before_batch(2, 4), env=cache
    )
    send(process, signal.SIGTERM)
    finish(process, status=130)
    finish(start(tmp_path / "parts", SCRIPT, *options, "--resume", env=cache))
    assert_same_run(tmp_path / "parts", tmp_path / "whole", "serial_cnn")


def test_resume_of_a_schedule_with_another_number_of_epochs_is_refused(run):
    scheduled = (*LONG, "--schedule", "cosine")
    run(*scheduled, "--epochs", 1)
    done = run(*scheduled, "--epochs", 2, "--resume", status=2)
    assert_one_error_line(done.stderr)
    assert "schedule_epochs 1, this run has 2" in done.stderr


def test_resume_when_all_is_done(run, tmp_path, reference):
    shutil.copytree(reference("sgd"), tmp_path, dirs_exist_ok=True)
    done = run(*LONG, "--resume")
    assert "best test accuracy" in done.stdout
    assert_same_run(tmp_path, reference("sgd"), "serial_cnn")


@pytest.mark.parametrize(
    ("name", "optimizer"), [("SIGINT", "sgd"), ("SIGTERM", "sgd"), ("SIGINT", "adam")]
)
def test_resume_after_a_signal(run, tmp_path, cache, reference, name, optimizer):
    options = (*LONG, "--optimizer", optimizer)
    process = start_stopping(tmp_path, SCRIPT, *options, when=before_batch(2, 4), env=cache)
    send(process, getattr(signal, name))
    _, err = finish(process, status=130)
    assert (
        err == f"interrupted by {name} after batch 4 of epoch 2; "
        "continue with --checkpoint run.npz --resume\n"
    )
    rows = read_log(tmp_path / LOG)
    assert len([row for row in rows if row["type"] == "2"]) == BATCHES + 4
    assert json.loads((tmp_path / SIDECAR).read_text())["status"] == "interrupted"
    assert len(read_npz(tmp_path / METRICS)["test_acc"]) == 1
    run(*options, "--resume")
    assert json.loads((tmp_path / SIDECAR).read_text())["status"] == "done"
    assert_same_run(tmp_path, reference(optimizer), "serial_cnn")


@pytest.mark.slow
def test_resume_with_running_statistics(tmp_path, cache):
    """ResNet-18, killed in its second epoch: parameters, velocity and BatchNorm's statistics, to
    the last bit.
    """
    options = (
        "--model",
        "resnet18",
        "--dataset",
        "synthetic",
        "--subset",
        8,
        "--batch-size",
        4,
        "--epochs",
        2,
        "--checkpoint",
        "run.npz",
        "--checkpoint-every",
        0,
    )
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    finish(start(tmp_path / "whole", SCRIPT, *options, env=cache))
    process = start_stopping(
        tmp_path / "parts", SCRIPT, *options, when=before_batch(2, 2), env=cache
    )
    process.kill()
    finish(process, status=-signal.SIGKILL)
    assert read_npz(tmp_path / "parts" / "run.npz")["state0"].any()
    finish(start(tmp_path / "parts", SCRIPT, *options, "--resume", env=cache))
    assert_same_run(tmp_path / "parts", tmp_path / "whole", "serial_cnn")


def test_interruption_in_the_last_batch_of_an_epoch(tmp_path, cache):
    options = (
        "--dataset",
        "synthetic",
        "--subset",
        600,
        "--batch-size",
        600,
        "--epochs",
        2,
        "--checkpoint",
        "run.npz",
    )
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    finish(start(tmp_path / "whole", SCRIPT, *options, env=cache))
    process = start_stopping(
        tmp_path / "parts", SCRIPT, *options, when=before_batch(2, 1), env=cache
    )
    send(process, signal.SIGINT)
    _, err = finish(process, status=130)
    assert err.startswith("interrupted by SIGINT after batch 1 of epoch 2;")
    finish(start(tmp_path / "parts", SCRIPT, *options, "--resume", env=cache))
    assert_same_run(tmp_path / "parts", tmp_path / "whole", "serial_cnn")


def test_interruption_without_a_checkpoint(tmp_path, cache):
    options = ("--dataset", "synthetic", "--subset", 1500)
    process = start_stopping(tmp_path, SCRIPT, *options, when=before_batch(1, 5), env=cache)
    send(process, signal.SIGINT)
    _, err = finish(process, status=130)
    assert err == "interrupted by SIGINT after batch 5 of epoch 1\n"
    assert [row["value1"] for row in read_log(tmp_path / LOG)] == ["1", "2", "3", "4", "5"]
    assert json.loads((tmp_path / SIDECAR).read_text())["status"] == "interrupted"


def test_second_signal_stops_at_once(tmp_path, cache):
    """Both come during the second batch, which is not counted."""
    options = ("--dataset", "synthetic", "--subset", 100, "--batch-size", 100)
    process = start_stopping(
        tmp_path, SCRIPT, *options, when=before_batch(2, 1), times=2, env=cache
    )
    send(process, signal.SIGINT)
    wait_until_stopped(process)
    send(process, signal.SIGINT)
    _, err = finish(process, status=130)
    assert err == "interrupted\n"
    assert len(read_log(tmp_path / LOG)) == 3
    assert json.loads((tmp_path / SIDECAR).read_text())["status"] == "interrupted"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interruption_while_data_are_prepared(tmp_path, name):
    """When the first of the cache's files is there and the second is not."""
    env, second = (
        {"CIFAR10_DIR": tmp_path, "XDG_CACHE_HOME": tmp_path},
        "args[0].name == 'y_train.npy'",
    )
    options = ("--dataset", "synthetic", "--subset", 100)
    process = start_stopping(tmp_path, SCRIPT, *options, at="np.save", when=second, env=env)
    assert any(path.name == "x_train.npy" for path in files_in(tmp_path))
    send(process, getattr(signal, name))
    _, err = finish(process, status=130)
    assert err == "interrupted\n"
    assert not files_in(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_resume_after_kill_at_any_moment(tmp_path, cache, reference, optimizer):
    seed = random.randrange(10**6)
    rng, options = random.Random(seed), (*LONG, "--optimizer", optimizer, "--checkpoint-every", 0)
    print(f"seed {seed}")
    for _ in range(4):
        rows = count_rows(tmp_path / LOG)
        resume = ("--resume",) if (tmp_path / "run.npz").exists() else ()
        process = start(tmp_path, SCRIPT, *options, *resume, env=cache)
        wait_until(process, lambda rows=rows: count_rows(tmp_path / LOG) > rows)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), f"exit status {process.returncode}"
        if (
            process.returncode == 0
        ):  # a fast disk, or a test that was kept waiting: it had come to its end
            break
    finish(start(tmp_path, SCRIPT, *options, "--resume", env=cache))
    assert_same_run(tmp_path, reference(optimizer), "serial_cnn")


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.slow
def test_kill_while_a_checkpoint_is_written(tmp_path, cache, reference):
    """The second one, when its parameters are written and its velocity is not."""
    options, part = (*LONG, "--checkpoint-every", 0), tmp_path / ".run.npz.part"
    process = start_stopping(
        tmp_path,
        SCRIPT,
        *options,
        at="zipfile.ZipFile.open",
        env=cache,
        when="'optimizer_velocity.npy' in args and os.path.exists('run.npz')",
    )
    process.kill()
    finish(process, status=-signal.SIGKILL)
    assert 0 < part.stat().st_size < (tmp_path / "run.npz").stat().st_size
    finish(start(tmp_path, SCRIPT, *options, "--resume", env=cache))
    assert_same_run(tmp_path, reference("sgd"), "serial_cnn")
    assert not part.exists()  # what the killed process left has been cleared away
