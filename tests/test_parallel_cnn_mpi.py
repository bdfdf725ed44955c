"""parallel_cnn_mpi.py under a real mpirun: the serial weights whatever the ranks, and what happens
when one dies.
"""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import (
    REPO,
    assert_gone,
    assert_same_resnet18_statistics,
    assert_same_weights,
    count_rows,
    mpirun,
    numbers,
    pausing,
    ranks_of,
    read_log,
    read_npz,
    script_environment,
    start_ranks,
    wait_until,
    without_core_warning,
)

from common import available_cores

SCRIPT = "parallel_cnn_mpi.py"
LOG, SIDECAR = "results/parallel_cnn_mpi.csv", "results/parallel_cnn_mpi.json"
ODD = ("--dataset", "synthetic", "--subset", 203, "--global-batch-size", 50, "--quiet")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_any_number_of_ranks_gives_the_serial_weights(
    tmp_path, serial, cache, ranks, dtype, tolerance
):
    """1,001 images in global batches of 64, two epochs: 32 steps, the order of the sums the only
    difference.

    In float32 with --lr 0.0001: BLAS rounds otherwise for other numbers of rows, a pooling window
    may then send its gradient to another pixel, and weights move by the learning rate times that.
    With other seeds and other kernels of OpenBLAS that was up to 1.3e-4 of the largest weight at
    0.001, and 6e-5 at 0.0003.
    """
    common = (
        "--dataset",
        "synthetic",
        "--subset",
        1001,
        "--epochs",
        2,
        "--dtype",
        dtype,
        "--quiet",
        "--lr",
        0.01 if dtype == "float64" else 0.0001,
    )
    reference = serial(*common, "--batch-size", 64)
    mpirun(
        tmp_path,
        ranks,
        SCRIPT,
        *common,
        "--global-batch-size",
        64,
        "--checkpoint",
        "run.npz",
        env=cache,
    )
    assert read_npz(tmp_path / "run.npz")["optimizer_steps"] == 32
    assert_same_weights(tmp_path / "run.npz", reference / "run.npz", tolerance)
    ours, theirs = read_log(tmp_path / LOG), read_log(reference / "results/serial_cnn.csv")
    assert [row["type"] for row in ours] == [row["type"] for row in theirs]
    assert numbers(ours, "loss") == pytest.approx(
        numbers(theirs, "loss"), rel=1e-3 if dtype == "float32" else 1e-6
    )
    for column in ("value1", "value2"):  # accuracies: a rounding may turn two of 1,001 answers
        error = 2 / 200 if dtype == "float32" else 1e-6
        assert numbers(ours, column) == pytest.approx(numbers(theirs, column), abs=error)
    assert json.loads((tmp_path / SIDECAR).read_text())["ranks"] == ranks


SLOW = pytest.mark.slow
REDUCERS = ("allreduce", "ring", "overlap", "shared")
NO_OVERLAP = ("--no-overlap",)
ADAM = ("--optimizer", "adam")
RECIPE = ("--augment", "on", "--schedule", "one-cycle", "--weight-decay", 0.001)
LADDER = [
    *(pytest.param(4, (reduce,), (), id=f"4 {reduce}") for reduce in REDUCERS),
    *(
        pytest.param(ranks, (reduce,), (), id=f"{ranks} {reduce}", marks=SLOW)
        for ranks in (1, 2, 3)
        for reduce in REDUCERS
    ),
    *(
        pytest.param(4, (reduce, *options), same, id=f"4 {reduce} {options} {same}", marks=SLOW)
        for reduce in ("overlap", "shared")
        for options in ((), NO_OVERLAP)
        for same in ((), ADAM)
        if options or same
    ),
    pytest.param(2, ("messages",), (), id="the old name of overlap", marks=SLOW),
    pytest.param(3, ("shared",), RECIPE, id="crops, flips and a schedule"),
]


@pytest.mark.parametrize(("ranks", "reduce", "same"), LADDER)
def test_all_rungs_give_the_serial_weights(tmp_path, serial, cache, ranks, reduce, same):
    """20 steps with batches of 50, 50, 50, 50 and 3 images: on four ranks the last leaves one with
    none.
    """
    tiny = (
        "--dataset",
        "synthetic",
        "--subset",
        203,
        "--epochs",
        4,
        "--dtype",
        "float64",
        "--quiet",
    )
    reference = serial(*tiny, *same, "--batch-size", 50)
    options = ("--global-batch-size", 50, "--checkpoint", "run.npz", "--reduce", *reduce)
    mpirun(tmp_path, ranks, SCRIPT, *tiny, *same, *options, env=cache)
    assert read_npz(tmp_path / "run.npz")["optimizer_steps"] == 20
    assert_same_weights(tmp_path / "run.npz", reference / "run.npz", 1e-10)
    name = "overlap" if reduce[0] == "messages" else reduce[0]
    assert json.loads((tmp_path / SIDECAR).read_text())["reduce"] == name


@pytest.mark.slow
def test_resnet18_has_the_statistics_of_the_global_batch(tmp_path, serial, cache):
    """Batches of 4, 4 and 2 images on three ranks: weights and running statistics are the serial
    run's.
    """
    tiny = (
        "--model",
        "resnet18",
        "--dataset",
        "synthetic",
        "--subset",
        10,
        "--epochs",
        1,
        "--dtype",
        "float64",
        "--quiet",
    )
    reference = serial(*tiny, "--batch-size", 4)
    mpirun(
        tmp_path, 3, SCRIPT, *tiny, "--global-batch-size", 4, "--checkpoint", "run.npz", env=cache
    )
    assert_same_weights(tmp_path / "run.npz", reference / "run.npz", 1e-10)
    assert_same_resnet18_statistics(tmp_path / "run.npz", reference / "run.npz", 1e-10)
    assert (
        read_log(tmp_path / LOG)[-1]["value1"]
        == read_log(reference / "results/serial_cnn.csv")[-1]["value1"]
    )


def test_batch_size_is_per_rank_and_the_global_one_is_fixed(tmp_path, cache):
    """Weak scaling by default, strong scaling with one flag."""
    tiny = ("--dataset", "synthetic", "--subset", 120, "--epochs", 1, "--quiet")
    for options, batches in ((("--batch-size", 20), 3), (("--global-batch-size", 20), 6)):
        mpirun(tmp_path, 2, SCRIPT, *tiny, *options, env=cache)
        rows = read_log(tmp_path / LOG)
        assert [row["value2"] for row in rows if row["type"] == "2"] == [str(batches)] * batches


def test_log_has_communication(tmp_path, cache):
    mpirun(tmp_path, 2, SCRIPT, *ODD, "--epochs", 1, env=cache)
    rows = read_log(tmp_path / LOG)
    epoch = next(row for row in rows if row["type"] == "0")
    assert 0 < float(epoch["communication"]) < float(epoch["duration"])
    parts = sum(float(epoch[name]) for name in ("loading", "forward", "backward", "communication"))
    assert (
        parts <= float(epoch["duration"]) * 1.5
    )  # communication is a mean over ranks, the others rank 0's
    seconds = json.loads((tmp_path / SIDECAR).read_text())["totals"]["communication_seconds"]
    assert 0 < seconds["min"] <= seconds["mean"] <= seconds["max"]
    assert seconds["mean"] == pytest.approx(float(epoch["communication"]), abs=1e-5)


def test_only_rank_0_speaks_and_writes(tmp_path, cache):
    out, err = mpirun(tmp_path, 3, SCRIPT, *ODD, "--epochs", 1, env=cache)
    assert out.count("\n") == 1
    assert without_core_warning(err) == ""
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "parallel_cnn_mpi.csv",
        "parallel_cnn_mpi.json",
        "parallel_cnn_mpi_metrics.npz",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", 0), "--epochs"),
        (("--global-batch-size", 0), "--global-batch-size"),
        (("--dataset", "cifar10", "--data-dir", "nowhere"), "no CIFAR-10 in nowhere"),
        (("--resume",), "--resume needs --checkpoint FILE"),
        (("--log", "/proc/nothing/x"), "cannot be written"),
    ],
)
def test_bad_input_is_one_line_for_all_ranks(tmp_path, cache, options, message):
    _, err = mpirun(tmp_path, 2, SCRIPT, *ODD, *options, status=2, env=cache)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_folder_that_cannot_be_read_ends_all_ranks(tmp_path, cache):
    _, err = mpirun(tmp_path, 2, SCRIPT, "--data-dir", "x" * 300, status=2, env=cache)
    assert "File name too long" in err


def test_loss_that_explodes_stops_all_ranks(tmp_path, cache):
    _, err = mpirun(tmp_path, 2, SCRIPT, *ODD, "--epochs", 3, "--lr", 1e10, status=1, env=cache)
    assert err.startswith("error: the ")
    assert err.count("\n") == 1


def run_until_second_epoch(folder, ranks, *options, env):
    process = start_ranks(
        folder, ranks, pausing(folder, SCRIPT, epoch=2, batch=1), *LONG, *options, env=env
    )
    wait_until(process, lambda: count_rows(folder / LOG) >= 11 + 2 + 1)
    return process


LONG = (
    "--dataset",
    "synthetic",
    "--subset",
    603,
    "--lr",
    0.0001,
    "--global-batch-size",
    60,
    "--epochs",
    3,
    "--quiet",
    "--checkpoint",
    "run.npz",
    "--checkpoint-every",
    0,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The folder of an unbroken run of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    mpirun(folder, 2, SCRIPT, *LONG, env=cache)
    return folder


def assert_resumes(folder, whole, cache):
    """With two ranks bit for bit the weights of the unbroken run; with three, a float32 rounding
    apart.
    """
    checkpoint = (folder / "run.npz").read_bytes()
    mpirun(folder, 2, SCRIPT, *LONG, "--resume", env=cache)
    assert (
        read_npz(folder / "run.npz")["params"].tobytes()
        == read_npz(whole / "run.npz")["params"].tobytes()
    )
    batches = [
        (row["epoch"], row["value1"]) for row in read_log(folder / LOG) if row["type"] == "2"
    ]
    assert batches == [(str(epoch), str(batch)) for epoch in (1, 2, 3) for batch in range(1, 12)]
    (folder / "run.npz").write_bytes(checkpoint)
    mpirun(folder, 3, SCRIPT, *LONG, "--resume", env=cache)
    assert_same_weights(folder / "run.npz", whole / "run.npz", 1e-4)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=SLOW)])
def test_a_killed_rank_ends_the_job_and_resume_goes_on_exactly(tmp_path, whole, cache, victim):
    process = run_until_second_epoch(tmp_path, 2, env=cache)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[victim].kill()
    killed = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - killed < 10
    assert process.returncode != 0
    assert_gone(ranks)
    assert_resumes(tmp_path, whole, cache)


@pytest.mark.slow
def test_a_log_of_another_run_is_refused_on_all_ranks(tmp_path, cache):
    """Only rank 0 opens the log; the others must not wait for it for ever."""
    mpirun(tmp_path, 2, SCRIPT, *ODD, "--epochs", 1, "--checkpoint", "run.npz", env=cache)
    mpirun(
        tmp_path, 2, SCRIPT, *ODD, "--epochs", 1, "--seed", 7, env=cache
    )  # its log takes the place of the first
    resume = ("--epochs", 2, "--checkpoint", "run.npz", "--resume")
    _, err = mpirun(tmp_path, 2, SCRIPT, *ODD, *resume, status=2, timeout=60, env=cache)
    assert "is the log of another run" in err
    assert without_core_warning(err).count("\n") == 1


@pytest.mark.slow
def test_sigterm_saves_and_ends_without_an_error(tmp_path, whole, cache):
    process = run_until_second_epoch(tmp_path, 2, env=cache)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert "--resume" in out
    assert json.loads((tmp_path / SIDECAR).read_text())["status"] == "interrupted"
    assert_resumes(tmp_path, whole, cache)


def test_a_signal_before_the_training_ends_all_ranks(tmp_path):
    """Rank 0 waits inside MPI, where no Python handler runs, for rank 1, which the signal
    reaches.
    """
    (tmp_path / "wait.py").write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPO)!r})
from mpi4py import MPI
from common import run_main, abort_on_exception
def main():
    abort_on_exception(MPI.COMM_WORLD)
    if MPI.COMM_WORLD.rank:
        os.kill(os.getpid(), signal.SIGTERM)
    MPI.COMM_WORLD.Barrier()
run_main(main)
""")
    _, err = mpirun(tmp_path, 2, tmp_path / "wait.py", status=130)
    assert "interrupted" in err


EARLY = """
import os, runpy, signal, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import {module}
real = {module}.{function}

def act(*args, **options):
    if {when}:
        {what}
    return real(*args, **options)

if os.environ["PMI_RANK"] == "1":
    {module}.{function} = act
runpy.run_path(sys.argv[0], run_name="__main__")
"""

MOMENTS = {
    "import": ("builtins", "__import__", "args[0] == 'common'"),
    "before MPI starts": ("faulthandler", "dump_traceback_later", "True"),
    "MPI has started": ("faulthandler", "cancel_dump_traceback_later", "True"),
    "options": ("argparse", "ArgumentParser.parse_args", "True"),
    "data": ("common", "load_dataset", "True"),
}


def start_early(folder, script, moment, what, **options):
    """Start two ranks of a script; rank 1 does something in its first second."""
    module, function, when = MOMENTS[moment]
    code = EARLY.format(module=module, function=function, when=when, what=what)
    (folder / "early.py").write_text(code)
    return start_ranks(
        folder, 2, folder / "early.py", REPO / script, *ODD, "--epochs", 1, **options
    )


def assert_ends(process, timeout=240):  # Numba may have to compile first
    """The job ends with an error, however long the other rank would wait. Returns its stderr."""
    try:
        _, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode != 0
    return err


@pytest.mark.parametrize("script", [SCRIPT, pytest.param("parallel_cnn_hybrid.py", marks=SLOW)])
def test_an_import_that_fails_on_one_rank_ends_the_job(tmp_path, cache, script):
    """A package that one machine does not have: the other rank waits for this one in MPI_Init."""
    what = "raise ImportError('on this machine')"
    process = start_early(tmp_path, script, "import", what, env=cache)
    err = assert_ends(process)
    assert process.returncode == 1
    assert "\nImportError: on this machine\n" in err


def test_a_rank_that_does_not_start_ends_the_job(tmp_path, cache):
    """mpirun takes a process that ends before MPI_Init for one that needs no MPI."""
    text = (REPO / SCRIPT).read_text()
    assert "dump_traceback_later(120," in text
    (tmp_path / SCRIPT).write_text(text.replace("later(120,", "later(2,"))
    shutil.copy(REPO / "common.py", tmp_path)
    process = start_early(
        tmp_path, tmp_path / SCRIPT, "before MPI starts", "os._exit(1)", env=cache
    )
    err = assert_ends(process)
    assert "Timeout (0:00:02)!" in err


@pytest.mark.parametrize("script", [SCRIPT, pytest.param("parallel_cnn_hybrid.py", marks=SLOW)])
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW)])
@pytest.mark.parametrize(
    "moment",
    ["MPI has started", *(pytest.param(name, marks=SLOW) for name in MOMENTS if "has" not in name)],
)
def test_a_signal_at_any_moment_of_the_start_ends_the_job(tmp_path, cache, script, number, moment):
    what = f"os.kill(os.getpid(), {int(number)})"
    process = start_early(tmp_path, script, moment, what, env=cache)
    assert_ends(process)


@pytest.mark.slow
@pytest.mark.parametrize("script", [SCRIPT, "parallel_cnn_hybrid.py"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_signal_at_a_random_moment_ends_the_job(tmp_path, cache, script, name):
    rng = random.Random(name + script)
    for _ in range(4):
        process = start_ranks(tmp_path, 2, REPO / script, *ODD, "--epochs", 20, env=cache)
        time.sleep(rng.uniform(0, 2))
        victims = ranks_of(process)
        if victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(victims).send_signal(getattr(signal, name))
        # Without one, or when all is done already, there is nothing to end early.
        try:
            process.communicate(timeout=90)
        finally:
            process.kill()
        assert_gone(victims)


SMALL_MEMORY = """
mount --make-rprivate / && mount -t tmpfs -o size=24m tmpfs /dev/shm && exec "$@"
"""


@pytest.fixture(scope="module")
def small_memory():
    """The words before a command that see a /dev/shm of 24 MB, as in a container."""
    words = ("unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_MEMORY, "sh")
    try:
        done = subprocess.run([*words, "true"], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"needs unshare of util-linux: {error}")
    if done.returncode:
        pytest.skip(f"needs mount namespaces: {done.stderr}")
    return words


def test_little_shared_memory_makes_auto_send_messages(tmp_path, cache, small_memory):
    """Otherwise the first access behind its end is a bare "Bus error"."""
    _, err = mpirun(tmp_path, 2, SCRIPT, *ODD, "--epochs", 1, env=cache, before=small_memory)
    line = r"--reduce overlap: /dev/shm has \d+ MiB free, 17 MiB are needed \(in Docker: .*\)\n"
    assert re.fullmatch(line, without_core_warning(err))
    assert json.loads((tmp_path / SIDECAR).read_text())["reduce"] == "overlap"


@pytest.mark.slow
@pytest.mark.parametrize("script", [SCRIPT, "parallel_cnn_hybrid.py"])
def test_little_shared_memory_refuses_what_was_asked_for(tmp_path, cache, small_memory, script):
    options = ("--dtype", "float64", "--reduce", "shared")
    _, err = mpirun(tmp_path, 2, script, *ODD, *options, env=cache, before=small_memory, status=2)
    err = without_core_warning(err)
    assert re.match(r"error: --reduce shared: /dev/shm has \d+ MiB free, 33 MiB are needed", err)
    assert err.count("\n") == 1


def test_ctrl_c_ends_with_130(tmp_path, cache):
    process = run_until_second_epoch(tmp_path, 2, env=cache)
    ranks = ranks_of(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err
    assert_gone(ranks)


BROKEN = """
import sys
sys.path.insert(0, {repo!r})
import common
import parallel_cnn_mpi as script
real, calls = common.Model.forward, []

def forward(*args):
    calls.append(1)
    if len(calls) == 3 and script.MPI.COMM_WORLD.rank == 1:
        {what}
    return real(*args)

common.Model.forward = forward
script.run_main(script.main, script.MPI.COMM_WORLD.rank)
"""


def broken(folder, what):
    """The script with something that happens on rank 1 before its third step."""
    (folder / "broken.py").write_text(BROKEN.format(repo=str(REPO), what=what))
    return folder / "broken.py"


def test_an_exception_on_one_rank_ends_the_job_with_its_traceback(tmp_path, cache):
    script = broken(tmp_path, "raise ZeroDivisionError('on purpose')")
    _, err = mpirun(tmp_path, 2, script, *ODD, status=1, timeout=60, env=cache)
    assert "[rank 1] Traceback" in err
    assert "[rank 1] ZeroDivisionError: on purpose" in err


@pytest.mark.parametrize("what", ["weights", pytest.param("running statistics", marks=SLOW)])
def test_ranks_that_differ_are_found(tmp_path, cache, what):
    """One number on one rank: the checksum at the end of the epoch stops the run.

    Weights can only differ where the ranks do not share them.
    """
    number, options = {
        "weights": ("params[1234]", ("--reduce", "overlap")),
        "running statistics": ("buffers()[3][0]", ("--model", "resnet18", "--subset", 150)),
    }[what]
    script = broken(tmp_path, f"args[0].{number} += 0.001")
    _, err = mpirun(tmp_path, 2, script, *ODD, *options, "--epochs", 1, status=1, env=cache)
    assert f"error: after epoch 1 the {what} of rank 1 are not those of rank 0" in err
    assert re.search(r"they differ by up to 0\.00\d+\n", err)


DEADLOCK = """
import sys
sys.path.insert(0, {repo!r})
import parallel_cnn_mpi as script

class RingReducer(script.RingReducer):
    def wait(self):
        comm = self.comm
        open(f"waiting-{{comm.rank}}", "w").close()
        comm.Send(self.total, (comm.rank + 1) % comm.size)  # every rank sends first
        comm.Recv(self.total, (comm.rank - 1) % comm.size)

script.RingReducer = RingReducer
script.run_main(script.main, script.MPI.COMM_WORLD.rank)
"""


def deadlock(folder):
    """A ring as beginners write it: it blocks for ever as soon as a message is not buffered."""
    path = folder / "deadlock.py"
    path.write_text(DEADLOCK.format(repo=str(REPO)))
    return path, *ODD, "--epochs", 1, "--reduce", "ring"


def assert_both_ranks_wait_in_send(err):
    for rank in (0, 1):
        assert f"[rank {rank}]     comm.Send(self.total, (comm.rank + 1) % comm.size)" in err


def test_a_deadlock_says_where(tmp_path, cache):
    script = deadlock(tmp_path)
    _, err = mpirun(tmp_path, 2, *script, "--stall-timeout", 5, status=1, timeout=60, env=cache)
    assert_both_ranks_wait_in_send(err)
    assert "no batch was finished for 5 s" in err
    sidecar = json.loads((tmp_path / "results/parallel_cnn_mpi.json").read_text())
    assert sidecar["status"].startswith("failed: no batch was finished")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_ranks_that_are_blocked(tmp_path, cache, number):
    process = start_ranks(tmp_path, 2, *deadlock(tmp_path), env=cache)
    wait_until(process, lambda: len(list(tmp_path.glob("waiting-*"))) == 2)
    ranks = ranks_of(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert_both_ranks_wait_in_send(err)
    assert_gone(ranks)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"OMPI_COMM_WORLD_SIZE": 4, "OMPI_COMM_WORLD_RANK": 0}, "mpirun started 4 ranks"),
        pytest.param(
            {"SLURM_STEP_NUM_TASKS": 4, "SLURM_PROCID": 0}, "srun started 4 tasks", marks=SLOW
        ),
    ],
)
def test_a_launcher_of_another_mpi_is_explained(tmp_path, cache, env, words):
    """What a rank sees when Open MPI's mpirun starts it and mpi4py is on MPICH, or srun without
    --mpi: alone, told that there are four.
    """
    command = [sys.executable, str(REPO / SCRIPT), *map(str, ODD)]
    env = script_environment(**cache, **env)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    # After mpi4py's own warning.
    assert f"error: {words}, but each is alone" in done.stderr


def test_more_ranks_than_cores_are_named(tmp_path, cache):
    cores = len(available_cores())
    _, err = mpirun(tmp_path, cores + 1, SCRIPT, *ODD, "--epochs", 1, env=cache)
    words = f"warning: {cores + 1} ranks share {cores} cores of {os.uname().nodename}: "
    assert err == f"{words}they wait for each other\n"


HOSTS = ("10.231.77.1", "10.231.77.2")


class TwoHosts:
    """Two network namespaces, joined by a veth pair: MPI calls them two machines, and only TCP
    joins them.
    """

    def __init__(self, folder):
        self.names = [f"cnn-{os.getpid()}-{i}" for i in range(2)]
        cases = "".join(
            f"{host}) name={name};;" for host, name in zip(HOSTS, self.names, strict=True)
        )
        self.shell = folder / "shell"  # called like ssh: [options] host command...
        self.shell.write_text(
            "#!/bin/sh\nwhile [ ${1#-} != $1 ]; do shift; done\n"
            f'case $1 in {cases} esac; shift\nexec ip netns exec $name sh -c "$*"\n'
        )
        self.shell.chmod(0o755)

    def __enter__(self):
        first, second = self.names
        try:
            for command in (
                f"netns add {first}",
                f"netns add {second}",
                f"link add net0 netns {first} type veth peer name net0 netns {second}",
                *(
                    f"-n {name} addr add {host}/24 dev net0"
                    for name, host in zip(self.names, HOSTS, strict=True)
                ),
                *(
                    f"-n {name} link set {link} up"
                    for name in self.names
                    for link in ("lo", "net0")
                ),
            ):
                subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)
            deadline = time.monotonic() + 10
            while not all(
                self._is_up(name) for name in self.names
            ):  # the kernel takes up to a second
                assert time.monotonic() < deadline
                time.sleep(0.05)
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            pytest.skip(
                "needs two network namespaces (root and Debian's iproute2): "
                f"{getattr(error, 'stderr', error)}"
            )
        return self

    def _is_up(self, name):
        command = ["ip", "-n", name, "link", "show", "net0"]
        return (
            "state UP" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )

    def __exit__(self, *_):
        for name in self.names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def options(self, ranks_per_host):
        """For start_ranks: mpirun on the first host, ranks on both; UCX_TLS: no messages through
        shared memory.
        """
        launch = (
            f"-launcher ssh -launcher-exec {shlex.quote(str(self.shell))} -hosts {','.join(HOSTS)} "
        )
        launch += f"-ppn {ranks_per_host} -genv UCX_TLS tcp,self"
        return {
            "before": ("ip", "netns", "exec", self.names[0]),
            "launch": tuple(shlex.split(launch)),
        }

    def received(self):
        """Bytes that have come to the first host."""
        command = [
            "ip",
            "netns",
            "exec",
            self.names[0],
            "cat",
            "/sys/class/net/net0/statistics/rx_bytes",
        ]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture
def two_hosts(tmp_path):
    with TwoHosts(tmp_path) as hosts:
        yield hosts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "per_host", "reduce"),
    [(4, 2, "shared"), (4, 2, "overlap"), (3, 2, "overlap"), (2, 1, "ring"), (2, 1, "allreduce")],
)
def test_two_hosts_give_the_serial_weights(
    tmp_path, two_hosts, serial, cache, ranks, per_host, reduce
):
    tiny = (
        "--dataset",
        "synthetic",
        "--subset",
        203,
        "--epochs",
        1,
        "--dtype",
        "float64",
        "--quiet",
    )
    reference = serial(*tiny, "--batch-size", 50)
    choice = (
        () if ranks == 3 else ("--reduce", reduce)
    )  # left to itself with unequal hosts it sends messages
    mpirun(
        tmp_path,
        ranks,
        SCRIPT,
        *tiny,
        *choice,
        "--global-batch-size",
        50,
        "--checkpoint",
        "run.npz",
        env=cache,
        timeout=60,
        **two_hosts.options(per_host),
    )
    assert_same_weights(tmp_path / "run.npz", reference / "run.npz", 1e-10)
    sidecar = json.loads((tmp_path / SIDECAR).read_text())
    assert (sidecar["ranks"], sidecar["reduce"]) == (ranks, reduce)
    assert (
        two_hosts.received() > 5 * 4 * read_npz(tmp_path / "run.npz")["params"].size
    )  # half of each sum at least


@pytest.mark.slow
def test_hosts_with_unequal_ranks_cannot_share(tmp_path, two_hosts, cache):
    _, err = mpirun(
        tmp_path,
        3,
        SCRIPT,
        *ODD,
        "--reduce",
        "shared",
        status=2,
        timeout=60,
        env=cache,
        **two_hosts.options(2),
    )
    err = without_core_warning(err)
    assert err.startswith("error: --reduce shared: the machines have different numbers of ranks")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_killed_rank_on_another_host_ends_the_job(tmp_path, two_hosts, cache):
    script = pausing(tmp_path, SCRIPT, epoch=1, batch=3)
    process = start_ranks(tmp_path, 2, script, *LONG, env=cache, **two_hosts.options(1))
    wait_until(process, lambda: count_rows(tmp_path / LOG) >= 3)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert_gone(ranks)
