"""run_experiments.py: real runs of the real scripts, and of scripts that fail or hang."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from helpers import (
    REPO,
    assert_gone,
    assert_one_error_line,
    finish,
    read_log,
    read_npz,
    refused,
    start,
    start_on_terminal,
    wait_until,
)

import run_experiments
from common import available_cores

SCRIPT = "experiments/run_experiments.py"
TINY = ("--dataset", "synthetic", "--epochs", 1, "--subset", 64, "--batch-size", 16)

# Stands in for a script: does `body` if it is given the option `when`, else what the script does.
STUB = """
import pathlib, runpy, sys, time
if "{when}" in sys.argv:
    {body}
runpy.run_path(str(pathlib.Path(__file__).with_name("real.py")), run_name="__main__")
"""

FAILS_OR_HANGS = """
import os, pathlib, runpy, sys, time
here, options = pathlib.Path(__file__).parent, " ".join(sys.argv[1:])
fails = "--global-batch-size" in options
hangs = "mpi-2-weak/1/run.csv" in options and not (here / "mended").exists()
if (fails or hangs) and os.environ["PMI_RANK"] == "0":  # the lines of two ranks may be mixed
    print("first\\nthe reason" if fails else "hanging", flush=True)
if fails:
    sys.exit(3)
if hangs:
    time.sleep(600)
runpy.run_path(str(here / "real.py"), run_name="__main__")
"""


@pytest.fixture
def copy(tmp_path):
    """A checkout with the scripts of suite parallel, in which a test can put others."""
    folder = tmp_path / "copy"
    (folder / "experiments").mkdir(parents=True)
    for name in (
        SCRIPT,
        "common.py",
        "serial_cnn.py",
        "parallel_cnn_mpi.py",
        "parallel_cnn_hybrid.py",
    ):
        shutil.copy2(REPO / name, folder / name)
    return folder


def put_stub(folder, script, when, body):
    (folder / script).rename(folder / "real.py")
    (folder / script).write_text(STUB.format(when=when, body=body))


def run(folder, *args, cache, status=0, script=REPO / SCRIPT):
    return finish(start(folder, script, *args, env=cache), status=status, timeout=200)


def main(*args):
    run_experiments.main([str(word) for word in args])


@pytest.fixture
def in_folder(tmp_path, cache, monkeypatch):
    """This process as script_environment() has it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no download
    for name, value in cache.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


def read_index(folder):
    return json.loads((folder / "results/index.json").read_text())


def runs(folder):
    return [(e["configuration"], e["repeat"], e["status"]) for e in read_index(folder)["runs"]]


# -- runs ------------------------------------------------------------------------------------------


def test_suite_end_to_end_and_resumed(in_folder, capsys):
    """Two configurations, twice, interleaved; then what is missing of three times."""
    command = ("--suite", "parallel", "--only", "mpi-2", "--oversubscribe", *TINY)
    main(*command, "--repeats", 2)
    out, err = capsys.readouterr()
    assert err == ""
    names = ["mpi-2-strong", "mpi-2-weak"]
    assert runs(in_folder) == [(name, repeat, "done") for repeat in (1, 2) for name in names]
    entries = read_index(in_folder)["runs"]
    starts = [e["start"] for e in entries]
    assert starts == sorted(starts)
    for entry in entries:
        folder = in_folder / "results" / entry["folder"]
        metadata = json.loads((folder / "run.json").read_text())
        totals = metadata["totals"]
        size = 16 if "strong" in entry["configuration"] else 32  # 16 a rank
        assert metadata["arguments"]["global_batch_size"] == size
        assert metadata["ranks"] == entry["cores"] == 2
        assert totals["train_images"] == 64
        batches = [row for row in read_log(folder / "run.csv") if row["type"] == "2"]
        assert len(batches) == 64 // size
        assert len(read_npz(folder / "run.npz")["train_loss"]) == 1
        assert entry["seconds"] >= totals["train_seconds"] > 0
        assert entry["oversubscribed"] == (len(available_cores()) < 2)
        name = f"parallel/{entry['configuration']}/{entry['repeat']}"
        assert re.search(rf"{name} +done .* {totals['images_per_s']:,.0f} images/s", out)

    main(*command, "--repeats", 3)
    out, _ = capsys.readouterr()
    assert "4 of 6 runs are there already" in out
    assert runs(in_folder) == [(name, repeat, "done") for repeat in (1, 2, 3) for name in names]
    assert [e["start"] for e in read_index(in_folder)["runs"]][:4] == starts
    line = refused(run_experiments.main, *command, "--repeats", 1, "--subset", 80)
    assert "subset 64" in line  # different runs would be mixed
    assert len(runs(in_folder)) == 6


@pytest.mark.slow
def test_failing_and_hanging_runs_are_recorded_and_the_rest_goes_on(tmp_path, copy, cache):
    """mpi-2-strong always fails, mpi-2-weak hangs in its first repeat, until it is mended."""
    (copy / "parallel_cnn_mpi.py").rename(copy / "real.py")
    (copy / "parallel_cnn_mpi.py").write_text(FAILS_OR_HANGS)
    command = ("--only", "mpi-2", "--oversubscribe", "--repeats", 2, "--time-limit", 20, *TINY)
    out, err = run(tmp_path, *command, cache=cache, status=1, script=copy / SCRIPT)
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
    for process in psutil.process_iter(["cmdline"]):
        assert str(copy) not in " ".join(process.info["cmdline"] or [])

    out, _ = run(tmp_path, *command, cache=cache, status=1, script=copy / SCRIPT)
    assert "4 of 4 runs are there already" in out
    (copy / "mended").touch()
    out, _ = run(tmp_path, *command, "--retry", cache=cache, status=1, script=copy / SCRIPT)
    assert "1 of 4 runs are there already" in out
    assert sorted(runs(tmp_path)) == [
        ("mpi-2-strong", 1, "failed"),
        ("mpi-2-strong", 2, "failed"),
        ("mpi-2-weak", 1, "done"),
        ("mpi-2-weak", 2, "done"),
    ]


def test_a_run_without_results_has_failed(tmp_path, copy, cache):
    """With exit status 0, and with another one: its last lines are in the index."""
    (copy / "serial_cnn.py").write_text("print('nothing to do')")
    command = ("--only", "serial", "--repeats", 1, *TINY)
    _, err = run(tmp_path, *command, cache=cache, status=1, script=copy / SCRIPT)
    assert_one_error_line(err)
    assert runs(tmp_path) == [("serial", 1, "failed")]
    (copy / "serial_cnn.py").write_text("import no_such_module")
    run(tmp_path, *command, "--retry", cache=cache, status=1, script=copy / SCRIPT)
    (entry,) = read_index(tmp_path)["runs"]
    assert entry["status"] == "failed"
    assert "no_such_module" in entry["output"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_interrupted_and_continued(tmp_path, copy, cache, how):
    """On a terminal, with the bar; the run is ended with all its ranks, and is not in the index."""
    put_stub(copy, "parallel_cnn_mpi.py", "--batch-size", "time.sleep(600)")
    command = ("--only", "mpi-2", "--oversubscribe", "--repeats", 1, *TINY)
    process, terminal = start_on_terminal(tmp_path, copy / SCRIPT, *command, env=cache)
    sent = ""
    while not re.search(r"1/2 \|[^\r]*0 failed; about [^\r]*mpi-2-weak/1", sent):
        sent += os.read(terminal, 65536).decode(errors="replace")
    deadline = time.monotonic() + 30
    family = []
    while len(family) < 4:  # mpirun, its proxy, two ranks
        family = psutil.Process(process.pid).children(recursive=True)
        assert time.monotonic() < deadline
    if how == "Ctrl-C":
        os.write(terminal, b"\x03")
    else:
        process.send_signal(signal.SIGTERM)
    try:
        while part := os.read(terminal, 65536):
            sent += part.decode(errors="replace")
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(terminal)
    assert process.wait(20) == 130
    assert_gone(family)
    assert "interrupted by SIG" in sent
    assert runs(tmp_path) == [("mpi-2-strong", 1, "done")]

    shutil.move(copy / "real.py", copy / "parallel_cnn_mpi.py")
    run(tmp_path, *command, cache=cache, script=copy / SCRIPT)
    assert runs(tmp_path) == [("mpi-2-strong", 1, "done"), ("mpi-2-weak", 1, "done")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_two_at_once_do_not_share_a_folder(in_folder, copy, cache, number):
    """The second is refused; a signal, or the end of the terminal, ends the first and its run."""
    started = in_folder / "started"
    wait = f"open({str(started)!r}, 'w').close(), time.sleep(600)"
    put_stub(copy, "serial_cnn.py", "--batch-size", wait)
    command = ("--only", "serial", *TINY)
    first = start(in_folder, copy / SCRIPT, *command, env=cache)
    wait_until(first, started.exists)
    line = refused(run_experiments.main, *command)
    assert "another run_experiments.py" in line
    (child,) = psutil.Process(first.pid).children()
    first.send_signal(number)
    _, err = finish(first, status=130)
    assert "interrupted by SIGTERM" in err
    assert_gone([child])
    assert runs(in_folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mpi-{}-strong", "hybrid-1x{}-strong"])
def test_oversubscribed_runs_are_marked(tmp_path, cache, name):
    args = run_experiments.parse_args(["--oversubscribe"])
    most = max(e.cores for e in run_experiments.parallel_suite(args))
    name = name.format(most)
    command = ("--only", name, "--oversubscribe", "--repeats", 1, *TINY)
    out, _ = run(tmp_path, *command, cache=cache)
    (entry,) = read_index(tmp_path)["runs"]
    assert entry["oversubscribed"] is True
    assert entry["cores"] == most
    assert re.search(rf"{name}/1 .*oversubscribed$", out, re.M)


@pytest.mark.slow
def test_every_source_is_loaded_from(tmp_path, cache):
    """Images are exported once; then memory, disk and a real S3 server."""
    command = ("--suite", "loading", "--only", "0-workers-load", "--repeats", 1, *TINY)
    run(tmp_path, *command, cache=cache)
    names = ["memory", "disk", "s3-stream", "s3-shards"]
    assert runs(tmp_path) == [(f"{name}-0-workers-load", 1, "done") for name in names]


# -- progress --------------------------------------------------------------------------------------


def test_time_left_is_estimated_from_earlier_runs():
    """A configuration's own mean, else that of its suite, else that of all."""
    names = (("parallel", "serial"), ("parallel", "mpi-2-weak"), ("split", "all"))
    todo = [(2, run_experiments.Experiment(suite, name, "", [])) for suite, name in names]
    progress = run_experiments.SuiteProgress(todo, 1)
    assert progress.time_left(0) == "time left not known yet"
    known = [{"suite": "parallel", "configuration": "serial", "seconds": 10 * n} for n in (1, 3)]
    known.append({"suite": "parallel", "configuration": "mpi-2-strong", "seconds": 10})
    progress = run_experiments.SuiteProgress(todo, 1, known)
    assert progress.time_left(5) == "about 45 s left"  # 20 + (20 + 10) / 2 + (20 + 10) / 2 − 5
    progress.end_run(
        {**known[0], "status": "done", "repeat": 2, "oversubscribed": False, "output": []}, {}
    )
    # serial now takes 16.7 s, and so mpi-2-weak and all 13.3 s
    assert progress.time_left(0) == "about 27 s left"


def test_epoch_is_that_of_the_last_complete_row(tmp_path):
    log = tmp_path / "run.csv"
    assert run_experiments.current_epoch(log) == 0
    log.write_text("type,epoch,start\n")
    assert run_experiments.current_epoch(log) == 0
    log.write_text("type,epoch,start\n" + "2,1,5.0\n" * 1000 + "2,12,5.0\n2,1")
    assert run_experiments.current_epoch(log) == 12


# -- suites ----------------------------------------------------------------------------------------


def test_no_more_than_the_cores_unless_asked_for():
    cores = len(available_cores())
    most = {}
    for options in ((), ("--oversubscribe",)):
        args = run_experiments.parse_args(list(options))
        most[options] = max(e.cores for e in run_experiments.parallel_suite(args))
    assert cores / 2 < most[()] <= cores < most[("--oversubscribe",)]


def test_what_is_not_there_is_left_out_by_name(in_folder, monkeypatch, capsys):
    checkout = in_folder / "checkout"
    checkout.mkdir()
    for name in ("serial_cnn.py", "common.py", "gpu_scratch.py"):
        shutil.copy(REPO / name, checkout)
    monkeypatch.setattr(run_experiments, "REPO", checkout)
    monkeypatch.setattr(run_experiments, "has_gpu", lambda: False)
    main("--suite", "hardware", "--only", "cnn-scratch", "--repeats", 1, *TINY)
    assert runs(in_folder) == [("cnn-scratch-1-core", 1, "done")]
    out, _ = capsys.readouterr()
    assert "left out: hardware/cnn-scratch-gpu: there is no NVIDIA GPU\n" in out
    if len(available_cores()) > 1:
        assert re.search(r"left out: hardware/cnn-\S+: there is no parallel_cnn_hybrid\.py\n", out)
    left_out = read_index(in_folder)["left_out"]
    assert left_out["hardware/cnn-scratch-gpu"] == "there is no NVIDIA GPU"

    line = refused(run_experiments.main, "--suite", "split", *TINY)
    assert "nothing of it can run here" in line
    names = ", ".join(f"split/{mode}" for mode in ("all", "split", "pipelined", "replicas"))
    out, _ = capsys.readouterr()
    assert out == f"left out: {names}: there is no train_resnet50_split_cores.py\n"


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_rung_in_bfloat16_is_for_processors_that_have_it(monkeypatch, has_bfloat16):
    """On others the training would be in float32 under another name."""
    monkeypatch.setattr(run_experiments, "has_bfloat16", lambda: has_bfloat16)
    args = run_experiments.parse_args(["--suite", "ladder"])
    ready, left_out = run_experiments.select_experiments(args)
    rungs = {e.name: e for e in ready}
    assert ("pytorch-3-bfloat16" in rungs) == has_bfloat16
    reason = left_out.get("ladder/pytorch-3-bfloat16", "")
    assert reason == ("" if has_bfloat16 else "this processor has no instructions for bfloat16")
    assert "pytorch-4-batched-loading" in rungs


def test_commands_of_suites(in_folder):
    """Each configuration becomes the command that it means."""
    lines = []
    for suite in ("loading", "split"):
        args = run_experiments.parse_args(["--suite", suite, "--s3", "s3://bucket/cifar"])
        for e in run_experiments.SUITES[suite](args):
            lines.append(" ".join(map(str, [e.suite, e.name, e.script, *e.options])))
    common = "train_cifar.py --model cnn --batch-size 64 --augment on --source"
    images = in_folder / "results/s3/buckets/cifar10/5000"
    s3 = "s3://cifar10/5000 --s3-mode shards"
    split = "train_resnet50_split_cores.py --mode pipelined --batch-size 64"
    for line in (
        f"loading memory-0-workers-train {common} builtin --workers 0",
        f"loading disk-1-workers-load {common} disk --data-dir {images} --workers 1 --load-only",
        f"loading s3-shards-1-workers-train {common} {s3} --workers 1",
        f"loading s3-given-1-workers-train {common} s3://bucket/cifar --workers 1",
        f"split pipelined {split}",
    ):
        assert line in lines


def test_hardware_compares_the_same_training():
    """PyTorch in float32, without augmentation; each network on each device by both."""
    suite = run_experiments.hardware_suite(run_experiments.parse_args(["--suite", "hardware"]))
    by_name = {e.name: e for e in suite}
    for e in suite:
        assert e.name.replace("scratch", "pytorch") in by_name
        assert e.needs_gpu == ("gpu" in e.name)
        if e.script == "train_cifar.py":
            assert " --amp off --augment off " in " ".join(map(str, e.options))
    assert {"cnn-scratch-1-core", "cnn-pytorch-gpu", "resnet18-scratch-gpu"} <= by_name.keys()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "everything"), "--suite"),
        (("--repeats", 0), "--repeats"),
        (("--time-limit", 0), "--time-limit"),
        (("--only", "nothing"), "--only nothing"),
        (("--dataset", "cifar10", "--data-dir", "empty"), "no CIFAR-10"),
        (("--results-dir", "a-file"), "a-file"),
        (("--s3", "http://bucket"), "--s3"),
    ],
)
def test_bad_input_is_refused(in_folder, options, message):
    (in_folder / "a-file").touch()
    assert message in refused(run_experiments.main, *options)
    assert not (in_folder / "results").exists()


def test_a_damaged_index_is_refused_and_not_overwritten(run_script, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/index.json").write_text('{"runs": ')
    done = run_script(SCRIPT, "--only", "serial", *TINY, status=2)
    assert_one_error_line(done.stderr)
    assert (tmp_path / "results/index.json").read_text() == '{"runs": '


def test_starts_from_any_folder(tmp_path):
    """--help from elsewhere: common.py is found, and the usage lines are shown."""
    command = [sys.executable, str(REPO / SCRIPT), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "python experiments/run_experiments.py --epochs 5 --subset 5000" in done.stdout


def test_repeats_have_seeds_of_their_own_where_the_data_do_not_come_from_the_seed(tmp_path):
    args = run_experiments.parse_args(["--subset", "20"])
    experiment = run_experiments.parallel_suite(args)[0]

    def seeds(dataset):
        data = SimpleNamespace(name=dataset)
        commands = [
            run_experiments.make_command(experiment, tmp_path, args, data, repeat)
            for repeat in (1, 2, 3)
        ]
        return [c[c.index("--seed") + 1] for c in commands if "--seed" in c]

    assert seeds("cifar10") == ["42", "43", "44"]
    assert seeds("synthetic") == []
