"""What the tests have in common: scripts run as their users run them, their logs, their usage
lines.
"""

import ast
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from common import InputError

REPO = Path(__file__).resolve().parent.parent
COLUMNS = (
    "type,epoch,start,loading,duration,value1,value2,loss,images_per_s,cpu_percent,ram_mb,gpu_percent,gpu_mem_mb,"
    "forward,backward,communication"
).split(",")


# `make test ARGS=-x` would hand ARGS to every make that a test starts: alone and in MAKEFLAGS.
MAKE_VARIABLES = "ARGS EPOCHS SUBSET S3_DATA FROM TO PYTHON BASE_PYTHON".split()
MAKE_INTERNALS = "MAKEFLAGS MAKEOVERRIDES MFLAGS MAKELEVEL".split()
SETTINGS = "CIFAR10_DIR OPENBLAS_CORETYPE OPENBLAS_L2_SIZE".split()
NOT_INHERITED = {*MAKE_VARIABLES, *MAKE_INTERNALS, *SETTINGS}


def script_environment(**changes):
    """The environment for a script under test: no data, no download (a closed port refuses at
    once).
    """
    env = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    env.update(
        https_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9", no_proxy="", NO_PROXY=""
    )
    env.update({k: str(v) for k, v in changes.items() if v is not None})
    return env


def start(folder, script, *args, env=None, **options):
    """Start a script in `folder`; returns the Popen. options: of Popen (default: stdout and stderr
    as text pipes).
    """
    return start_command(folder, [sys.executable, REPO / script, *args], env, **options)


def start_command(folder, command, env=None, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, env=script_environment(**(env or {})), **options
    )


STOPPING = """
import os, runpy, signal, sys, time
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import common, zipfile
import numpy as np
real = {at}
def stopping(*args, **options):
    if {when}:
        for _ in range({times}):
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.1)  # Python handles what came meanwhile, before the next stop
    return real(*args, **options)
{at} = stopping
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_stopping(folder, script, *args, at="common.RunLog.end_batch", when, times=1, env=None):
    """Start a script that stops itself (SIGSTOP) where it is to be met, however long the test takes
    to come there.

    at: the function before which it stops; when: a condition on its `args`; times: so often. A
    signal that is sent meanwhile comes with the SIGCONT; see send().
    """
    code = STOPPING.format(at=at, when=when, times=times)
    process = start_command(folder, [sys.executable, "-c", code, REPO / script, *args], env)
    wait_until_stopped(process)
    return process


def wait_until_stopped(process):
    wait_until(process, lambda: os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG))


def send(process, *signals):
    """Send signals to a process that has stopped, and let it go on."""
    for number in (*signals, signal.SIGCONT):
        process.send_signal(number)


def before_batch(epoch, batch):
    """start_stopping()'s condition: batch (from 1) of epoch is trained, but not counted yet."""
    return f"(args[0].epoch, args[0].batch + 1) == ({epoch}, {batch})"


def finish(process, status=0, timeout=180):
    """Wait for a started script; returns its stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == status, f"exit status {process.returncode}\n{out}{err}"
    return out, err


def wait_until(process, condition, timeout=180):
    """Return as soon as condition() holds; fail if the process ends before."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, (
            f"ended too early\n{''.join(filter(None, process.communicate()))}"
        )
        assert time.monotonic() < deadline, f"nothing within {timeout} s"
        time.sleep(0.002)


PAUSING = """
import sys, time
sys.path.insert(0, {repo!r})
import {module} as script

class StopSignal(script.StopSignal):
    def __init__(self):
        super().__init__()
        StopSignal.instance = self

class RunLog(script.RunLog):
    def end_batch(self, *args, **options):
        super().end_batch(*args, **options)
        stop = StopSignal.instance
        is_there = self.rank == 0 and (self.epoch, self.batch) == ({epoch}, {batch})
        while is_there and not stop.requested:
            time.sleep(0.01)

script.StopSignal = StopSignal
script.RunLog = RunLog
script.run_main(script.main, script.MPI.COMM_WORLD.rank if hasattr(script, "MPI") else 0)
"""


def pausing(folder, script, epoch, batch):
    """A script that waits after that batch (its row is written) for a signal, so that a slow test
    cannot miss it.
    """
    path = folder / f"pausing_{script}"
    path.write_text(
        PAUSING.format(repo=str(REPO), module=script.removesuffix(".py"), epoch=epoch, batch=batch)
    )
    return path


def count_rows(log):
    """The complete rows of a log, without its header; 0 if there is none."""
    return max(log.read_bytes().count(b"\n") - 1, 0) if log.exists() else 0


def read_log(log):
    """The rows of a log as dicts of strings; fails on a row that is cut off."""
    header, *rows = [line.split(",") for line in log.read_text().removesuffix("\n").split("\n")]
    assert header == COLUMNS
    assert all(len(row) == len(header) for row in rows)
    assert log.read_text().endswith("\n")
    return [dict(zip(header, row, strict=True)) for row in rows]


def numbers(rows, column, kind=None):
    """A column of the rows (of one record type) as floats."""
    return [float(row[column]) for row in rows if kind is None or row["type"] == str(kind)]


def read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def files_in(folder):
    """{path: (size, time of the last change)} of all there is below a folder."""
    return {
        p.relative_to(folder): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")
    }


def refused(main, *argv):
    """Call a script's main() in this process; returns the line with which it refuses argv.

    run_main() prints an InputError as this line, with exit status 2.
    """
    with pytest.raises(InputError) as refusal:
        main([str(word) for word in argv])
    line = f"error: {' '.join(str(refusal.value).split())}"
    assert_one_error_line(line + "\n")
    return line


def assert_one_error_line(stderr):
    assert re.fullmatch(r"error: [^\n]+\n", stderr), stderr


def assert_same_run(folder, reference, script, checkpoint="run.npz"):
    """Bit for bit the same arrays in the checkpoint, and the same losses and accuracies in metrics
    and log.
    """
    ours, theirs = read_npz(folder / checkpoint), read_npz(reference / checkpoint)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"meta"}:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].tobytes() == theirs[name].tobytes(), f"{name} differs"
    ours, theirs = (read_npz(f / f"results/{script}_metrics.npz") for f in (folder, reference))
    for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
        assert ours[name].tolist() == theirs[name].tolist(), name
    same = ("type", "epoch", "value1", "value2", "loss")
    ours, theirs = (
        [[row[name] for name in same] for row in read_log(f / f"results/{script}.csv")]
        for f in (folder, reference)
    )
    assert ours == theirs


def commands_of(line):
    """The commands that a documented line stands for, as lists of words: those of a make target."""
    words = shlex.split(line)
    if words[0] != "make":
        return [words]
    done = subprocess.run(
        ["make", "-n", "PYTHON=python", *words[1:]],
        cwd=REPO,
        env=script_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    lines = done.stdout.replace("\\\n", " ").splitlines()  # one for each command
    recipe = [line for line in lines if re.match(r"python \S+\.py\b", line)]
    return [shlex.split(line) for line in recipe]


def usage_lines(path):
    """The command lines in a script's docstring, which are its indented lines, without their
    comments.
    """
    doc = ast.get_docstring(ast.parse(Path(path).read_text()), clean=False)
    lines = re.findall(
        r"^ {4}((?:\w+=\S+ )*(?:python|mpirun|torchrun|make) .*)$", doc, re.MULTILINE
    )
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


def run_usage_line(folder, path, line, *tiny):
    """Run a usage line, with `tiny` appended, in a folder that has what a copy of the script needs.

    That is the script and common.py; for demo.py and experiments/, which start other scripts, all.
    """
    shutil.copy2(REPO / "common.py", folder)  # with its time, which Numba's cache goes by
    if path.name == "demo.py" or path.parent.name == "experiments":
        for file in REPO.glob("*.py"):
            shutil.copy2(file, folder)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(
            REPO / "experiments", folder / "experiments", ignore=ignored, dirs_exist_ok=True
        )
    else:
        shutil.copy2(path, folder)
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (folder / "bin/python").chmod(0o755)
    env = script_environment(
        PATH=f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    done = subprocess.run(
        f"{line} {shlex.join(map(str, tiny))}",
        shell=True,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done


def start_on_terminal(folder, script, *args, env=None, columns=120, lines=40):
    """Start a script with a terminal of its own; returns the Popen and our end of the terminal,
    where 3 is Ctrl-C.
    """
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
    process = start(
        folder,
        script,
        *args,
        env=env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    return process, ours


def run_on_terminal(folder, script, *args, env=None, status=0, **size):
    """Run a script on a terminal: all that it sent, and the lines that stand there at the end."""
    process, ours = start_on_terminal(folder, script, *args, env=env, **size)
    sent = b""
    try:
        while part := os.read(ours, 65536):
            sent += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert process.wait(180) == status, sent.decode()
    lines = []
    for line in sent.decode().replace("\r\n", "\n").split("\n"):
        shown = ""
        for text in line.split("\r"):  # what follows a carriage return overwrites
            shown = text + shown[len(text) :]
        lines.append(shown.rstrip())
    return sent.decode(), lines


def start_ranks(folder, ranks, script, *args, env=None, before=(), launch=(), **options):
    """Start mpirun with that many ranks. before: what stands before mpirun; launch: further options
    of it.
    """
    mpirun = [Path(sys.executable).with_name("mpirun"), "-np", ranks, *launch]
    return start_command(
        folder, [*before, *mpirun, sys.executable, REPO / script, *args], env, **options
    )


def mpirun(folder, ranks, script, *args, status=0, timeout=240, **options):
    """Run a script under mpirun to its end; returns its stdout and stderr."""
    process = start_ranks(folder, ranks, script, *args, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == status, f"exit status {process.returncode}\n{out}{err}"
    return out, err


def without_core_warning(err):
    """stderr without the line that a machine with fewer cores than ranks adds."""
    return re.sub(r"warning: \d+ ranks share .*\n", "", err)


def ranks_of(process):
    """The rank processes of a running mpirun, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(
            psutil.NoSuchProcess
        ):  # one that is just ending, a zombie too, tells nothing
            if rank := child.environ().get("PMI_RANK"):
                found[int(rank)] = child
    return [found[rank] for rank in sorted(found)]


def assert_same_weights(path, other, tolerance):
    """Parameters of two checkpoints, apart by at most tolerance × the largest."""
    ours, theirs = read_npz(path)["params"], read_npz(other)["params"]
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def assert_same_resnet18_statistics(path, other, tolerance):
    """Running means and variances of the 20 normalisations in two checkpoints, apart by less than
    tolerance.
    """
    ours, theirs = read_npz(path), read_npz(other)
    statistics = [name for name in ours if name.startswith("state")]
    assert len(statistics) == 2 * 20
    for name in statistics:
        assert abs(ours[name] - theirs[name]).max() < tolerance * abs(theirs[name]).max()


def assert_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive
