"""run_experiments.py: real runs of the real scripts, and of scripts that fail, hang or lack an option."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import run_experiments
from helpers import (
    REPO,
    assert_gone,
    assert_one_error_line,
    finish,
    read_log,
    read_npz,
    script_environment,
    start,
    start_on_terminal,
    wait_until,
)

from common import available_cores

TINY = ("--dataset", "synthetic", "--epochs", 1, "--subset", 64, "--batch-size", 16)
STUB = """
import pathlib, runpy, sys, time
from common import add_rank_options, make_parser
if "--help" in sys.argv or "{when}" in sys.argv:
    parser = make_parser("stub", "")
    add_rank_options(parser)
    args = parser.parse_args()
    {body}
runpy.run_path(str(pathlib.Path(__file__).with_name("real.py")), run_name="__main__")
"""

FAILS_OR_HANGS = """
import os, pathlib, runpy, sys, time
here, options = pathlib.Path(__file__).parent, " ".join(sys.argv[1:])
fails = "--global-batch-size" in options
hangs = "mpi-2-weak/1/run.csv" in options and not (here / "mended").exists()
if (fails or hangs) and os.environ["PMI_RANK"] == "0":  # one rank alone: the lines of two may run into each other
    print("first\\nthe reason" if fails else "hanging", flush=True)
if fails:
    sys.exit(3)
if hangs:
    time.sleep(600)
runpy.run_path(str(here / "real.py"), run_name="__main__")
"""


@pytest.fixture
def copy(tmp_path):
    """A folder with run_experiments.py and the scripts that it starts, in which a test can put others."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in (
        "run_experiments.py",
        "common.py",
        "serial_cnn.py",
        "parallel_cnn_mpi.py",
        "parallel_cnn_hybrid.py",
    ):
        shutil.copy2(REPO / name, folder)
    return folder


def put_stub(folder, script, when, body):
    """Replace a script by one that does `body` when the option `when` is given, and else what it did before."""
    (folder / script).rename(folder / "real.py")
    (folder / script).write_text(STUB.format(when=when, body=body))


def run(folder, *args, cache, status=0, script=REPO / "run_experiments.py"):
    return finish(start(folder, script, *args, env=cache), status=status, timeout=200)


def read_index(folder):
    return json.loads((folder / "results/index.json").read_text())


def runs(folder):
    return [(e["configuration"], e["repeat"], e["status"]) for e in read_index(folder)["runs"]]


def test_suite_end_to_end_and_resumed(tmp_path, cache):
    command = ("--suite", "parallel", "--only", "mpi-2", "--oversubscribe", *TINY)
    out, err = run(tmp_path, *command, "--repeats", 2, cache=cache)
    assert err == ""
    names = ["mpi-2-strong", "mpi-2-weak"]
    assert runs(tmp_path) == [
        (name, repeat, "done") for repeat in (1, 2) for name in names
    ]  # interleaved
    entries = read_index(tmp_path)["runs"]
    starts = [e["start"] for e in entries]
    assert starts == sorted(starts)
    for entry in entries:
        folder = tmp_path / "results" / entry["folder"]
        sidecar = json.loads((folder / "run.json").read_text())
        size = 16 if "strong" in entry["configuration"] else 32  # 16 a rank
        assert sidecar["arguments"]["global_batch_size"] == size
        assert sidecar["ranks"] == entry["cores"] == 2
        assert sidecar["totals"]["train_images"] == 64
        assert (
            len([row for row in read_log(folder / "run.csv") if row["type"] == "2"]) == 64 // size
        )
        assert len(read_npz(folder / "run.npz")["train_loss"]) == 1
        assert entry["seconds"] >= sidecar["totals"]["train_seconds"] > 0
        assert entry["oversubscribed"] == (len(available_cores()) < 2)
        speed = f"{sidecar['totals']['images_per_s']:,.0f} images/s"
        assert re.search(
            rf"parallel/{entry['configuration']}/{entry['repeat']} +done .* {speed}", out
        )
    out, _ = run(tmp_path, *command, "--repeats", 3, cache=cache)
    assert "4 of 6 runs are there already" in out
    assert runs(tmp_path) == [(name, repeat, "done") for repeat in (1, 2, 3) for name in names]
    assert [e["start"] for e in read_index(tmp_path)["runs"]][:4] == starts
    _, err = run(
        tmp_path, *command, "--repeats", 1, "--subset", 80, cache=cache, status=2
    )  # would mix what differs
    assert_one_error_line(err)
    assert "subset 64" in err
    assert len(runs(tmp_path)) == 6


def test_failing_and_hanging_runs_are_recorded_and_the_rest_goes_on(tmp_path, copy, cache):
    """mpi-2-strong always fails, mpi-2-weak hangs in its first repeat, until it is mended."""
    (copy / "parallel_cnn_mpi.py").rename(copy / "real.py")
    (copy / "parallel_cnn_mpi.py").write_text(FAILS_OR_HANGS)
    command = ("--only", "mpi-2", "--oversubscribe", "--repeats", 2, "--time-limit", 20, *TINY)
    out, err = run(tmp_path, *command, cache=cache, status=1, script=copy / "run_experiments.py")
    assert_one_error_line(err)
    assert "3 of 4 runs" in err
    assert runs(tmp_path) == [
        ("mpi-2-strong", 1, "failed"),
        ("mpi-2-weak", 1, "timeout"),
        ("mpi-2-strong", 2, "failed"),
        ("mpi-2-weak", 2, "done"),
    ]
    failed, late, _, done = read_index(tmp_path)["runs"]
    assert {"first", "the reason"} <= set(failed["output"])
    assert failed["exit_status"] not in (0, None)
    assert "hanging" in late["output"]
    assert late["seconds"] >= 20
    assert done["output"] == []
    assert not [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(copy) in " ".join(p.info["cmdline"] or [])
    ]
    out, _ = run(tmp_path, *command, cache=cache, status=1, script=copy / "run_experiments.py")
    assert "4 of 4 runs are there already" in out
    (copy / "mended").touch()
    out, _ = run(
        tmp_path, *command, "--retry", cache=cache, status=1, script=copy / "run_experiments.py"
    )
    assert "1 of 4 runs are there already" in out
    assert sorted(runs(tmp_path)) == [
        ("mpi-2-strong", 1, "failed"),
        ("mpi-2-strong", 2, "failed"),
        ("mpi-2-weak", 1, "done"),
        ("mpi-2-weak", 2, "done"),
    ]


def test_time_left_is_told_from_earlier_runs():
    """A configuration's own mean, else that of its suite, else that of all."""
    names = (("parallel", "serial"), ("parallel", "mpi-2-weak"), ("split", "all"))
    todo = [(2, run_experiments.Configuration(*name, [], "", [], 1)) for name in names]
    assert run_experiments.Overview(todo, 1).time_left(0) == "time left not known yet"
    known = [{"suite": "parallel", "configuration": "serial", "seconds": 10 * n} for n in (1, 3)]
    known.append({"suite": "parallel", "configuration": "mpi-2-strong", "seconds": 10})
    overview = run_experiments.Overview(todo, 1, known)
    assert overview.time_left(5) == "about 45 s left"  # 20 + (20 + 10) / 2 + (20 + 10) / 2 − 5
    overview.end_run(
        {**known[0], "status": "done", "repeat": 2, "oversubscribed": False, "output": []}, {}
    )
    assert (
        overview.time_left(0) == "about 27 s left"
    )  # serial now takes 16.7 s, and so all and mpi-2-weak 13.3 s


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_interrupted_and_gone_on(tmp_path, copy, cache, how):
    """On a terminal, with the overview; what runs is ended with all its ranks, and is not in the index."""
    put_stub(copy, "parallel_cnn_mpi.py", "--batch-size", "time.sleep(600)")
    command = ("--only", "mpi-2", "--oversubscribe", "--repeats", 1, *TINY)
    process, terminal = start_on_terminal(
        tmp_path, copy / "run_experiments.py", *command, env=cache
    )
    sent = ""
    while (
        "1/2 done, 0 failed; about" not in sent
        or "mpi-2-weak/1" not in sent
        or not sent.endswith(" s\033[K")
    ):
        sent += os.read(terminal, 65536).decode()
    deadline = time.monotonic() + 30
    while (
        len(family := psutil.Process(process.pid).children(recursive=True)) < 4
    ):  # mpirun, its proxy, two ranks
        assert time.monotonic() < deadline
    if how == "Ctrl-C":
        os.write(terminal, b"\x03")
    else:
        process.send_signal(signal.SIGTERM)
    try:
        while part := os.read(terminal, 65536):
            sent += part.decode()
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(terminal)
    assert process.wait(20) == 130
    assert_gone(family)
    assert "interrupted by SIG" in sent
    assert runs(tmp_path) == [("mpi-2-strong", 1, "done")]
    shutil.move(copy / "real.py", copy / "parallel_cnn_mpi.py")
    run(tmp_path, *command, cache=cache, script=copy / "run_experiments.py")
    assert runs(tmp_path) == [("mpi-2-strong", 1, "done"), ("mpi-2-weak", 1, "done")]


def test_two_at_once_do_not_share_a_folder(tmp_path, copy, cache):
    put_stub(copy, "parallel_cnn_mpi.py", "--batch-size", "time.sleep(600)")
    command = ("--only", "mpi-2-weak", "--oversubscribe", *TINY)
    first = start(tmp_path, copy / "run_experiments.py", *command, env=cache)
    wait_until(first, (tmp_path / "results/index.json").exists)
    _, err = run(tmp_path, *command, cache=cache, status=2, script=copy / "run_experiments.py")
    assert_one_error_line(err)
    assert "another run_experiments.py" in err
    first.send_signal(signal.SIGTERM)
    finish(first, status=130)


@pytest.mark.parametrize("name", ["mpi-{}-strong", "hybrid-1x{}-strong"])
def test_oversubscribed_runs_only_when_asked_for_and_marked(tmp_path, copy, cache, name):
    cores = len(available_cores())
    most = {}
    for options in ((), ("--oversubscribe",)):
        args = run_experiments.parse_args(list(options))
        most[options] = max(c.cores for c in run_experiments.parallel_suite(args))
    assert cores / 2 < most[()] <= cores < most["--oversubscribe",]
    name = name.format(most["--oversubscribe",])
    out, _ = run(
        tmp_path,
        "--only",
        name,
        "--oversubscribe",
        "--repeats",
        1,
        *TINY,
        cache=cache,
        script=copy / "run_experiments.py",
    )
    (entry,) = read_index(tmp_path)["runs"]
    assert entry["oversubscribed"] is True
    assert entry["cores"] == most["--oversubscribe",]
    assert re.search(rf"{name}/1 .*oversubscribed$", out, re.M)


def test_what_is_not_there_is_left_out_by_name(tmp_path, copy, cache):
    (copy / "train_cifar.py").write_text("import no_such_module")
    serial = (copy / "serial_cnn.py").read_text()
    (copy / "serial_cnn.py").write_text(
        serial.replace("__doc__, MODELS)", "__doc__)")
    )  # the CNN alone
    out, _ = run(
        tmp_path,
        "--suite",
        "all",
        "--only",
        "1-core",
        "--repeats",
        1,
        *TINY,
        cache=cache,
        script=copy / "run_experiments.py",
    )
    assert (
        "left out: hardware/resnet18-scratch-1-core: serial_cnn.py has no --model resnet18\n" in out
    )
    assert re.search(
        r"left out: hardware/cnn-pytorch-1-core, .*: train_cifar.py --help fails: .*no_such_module",
        out,
    )
    assert runs(tmp_path) == [("cnn-scratch-1-core", 1, "done")]
    left_out = read_index(tmp_path)["left_out"]
    assert left_out["hardware/resnet18-scratch-1-core"] == "serial_cnn.py has no --model resnet18"
    out, err = run(
        tmp_path,
        "--suite",
        "split",
        *TINY,
        cache=cache,
        status=2,
        script=copy / "run_experiments.py",
    )
    names = ", ".join(f"split/{mode}" for mode in ("all", "split", "pipelined", "replicas"))
    assert out == f"left out: {names}: there is no train_resnet50_split_cores.py\n"
    assert_one_error_line(err)


def test_commands_of_suites_whose_scripts_have_the_options(copy):
    """Scripts that only tell their options: each configuration becomes the command that it stands for."""
    parser = "import argparse; p = argparse.ArgumentParser()\n"
    parser += "for o in 'epochs subset batch-size dataset log save-metrics workers'.split(): p.add_argument('--' + o)\n"
    parser += "p.add_argument('--model', choices=['cnn']); p.add_argument('--augment', choices=['on', 'off'])\n"
    source = "for o in ('source', 's3-mode', 'data-dir'): p.add_argument('--' + o)\n"
    source += "p.add_argument('--load-only', action='store_true')\n"
    mode = "p.add_argument('--mode', choices=['all', 'split', 'pipelined'])\n"
    (copy / "train_cifar.py").write_text(parser + source + "p.parse_args()")
    (copy / "train_resnet50_split_cores.py").write_text(parser + mode + "p.parse_args()")
    code = """
import run_experiments as r
for suite in ("loading", "split"):
    ready, left_out = r.select(r.parse_args(["--suite", suite, "--s3", "s3://bucket/cifar"]))
    for c in ready:
        print(c.suite, c.name, *c.options)
    print(left_out)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env=script_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    common = "--model cnn --batch-size 64 --augment on --source"
    pictures = copy / "results/s3/buckets/cifar10/5000"
    assert f"loading memory-0-workers-train {common} builtin --workers 0" in lines
    assert (
        f"loading disk-1-workers-load {common} disk --data-dir {pictures} --workers 1 --load-only"
        in lines
    )
    assert (
        f"loading s3-shards-1-workers-train {common} s3://cifar10/5000 --s3-mode shards --workers 1"
        in lines
    )
    assert f"loading s3-given-1-workers-train {common} s3://bucket/cifar --workers 1" in lines
    assert "split pipelined --mode pipelined --batch-size 64" in lines
    assert (
        lines[-1] == "{'train_resnet50_split_cores.py has no --mode replicas': ['split/replicas']}"
    )


def test_hardware_compares_the_same_training():
    """PyTorch in float32 without augmentation, as from scratch; every network on every device by both."""
    suite = run_experiments.hardware_suite(run_experiments.parse_args(["--suite", "hardware"]))
    by_name = {c.name: c for c in suite}
    for c in suite:
        assert c.name.replace("scratch", "pytorch") in by_name
        if c.script == "train_cifar.py":
            assert " --amp off --augment off " in " ".join(map(str, c.options))
    assert {"cnn-scratch-1-core", "cnn-pytorch-gpu", "resnet18-scratch-gpu"} <= by_name.keys()


def test_every_source_is_loaded_from(tmp_path, cache):
    """Pictures are exported once; then memory, disk and a real S3 server, with the scripts as they are."""
    run(
        tmp_path,
        "--suite",
        "loading",
        "--only",
        "0-workers-load",
        "--repeats",
        1,
        *TINY,
        cache=cache,
    )
    names = ["memory", "disk", "s3-stream", "s3-shards"]
    assert runs(tmp_path) == [(f"{name}-0-workers-load", 1, "done") for name in names]


def test_a_run_that_ends_well_without_results_has_failed(tmp_path, copy, cache):
    (copy / "serial_cnn.py").write_text(
        "from common import make_parser; make_parser('stub', '').parse_args()"
    )
    run(
        tmp_path,
        "--only",
        "serial",
        "--repeats",
        1,
        *TINY,
        cache=cache,
        status=1,
        script=copy / "run_experiments.py",
    )
    assert runs(tmp_path) == [("serial", 1, "failed")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "everything"), "--suite"),
        (("--repeats", 0), "--repeats"),
        (("--time-limit", 0), "--time-limit"),
        (("--only", "nothing"), "--only nothing"),
        (("--dataset", "cifar10"), "no CIFAR-10"),
        (("--results-dir", "a-file"), "a-file"),
        (("--s3", "http://bucket"), "--s3"),
    ],
)
def test_bad_input_is_one_line(run_script, tmp_path, options, message):
    (tmp_path / "a-file").touch()
    done = run_script("run_experiments.py", *options, status=2)
    assert_one_error_line(done.stderr)
    assert message in done.stderr
    assert not (tmp_path / "results").exists()


def test_damaged_index_is_not_overwritten(run_script, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/index.json").write_text('{"runs": ')
    done = run_script("run_experiments.py", "--only", "serial", *TINY, status=2)
    assert_one_error_line(done.stderr)
    assert (tmp_path / "results/index.json").read_text() == '{"runs": '
