"""Where users really run the scripts: under nohup, in notebooks and threads, in containers."""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers import REPO, assert_one_error_line, finish, script_environment, start, wait_until

import common
import serial_cnn
from common import Interrupted, TrainingError, run_main

TINY = ("--dataset", "synthetic", "--subset", 200, "--epochs", 1)


# -- signals of a terminal -----------------------------------------------------------------------


def ignore_hangup():
    """What nohup does before it starts a command."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


SUITE = ("experiments/run_experiments.py", *TINY, "--suite", "parallel", "--only", "serial")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "status"), [(ignore_hangup, 0), (None, 130)])
def test_a_closed_terminal_ends_a_suite_unless_under_nohup(tmp_path, before, status):
    process = start(tmp_path, *SUITE, "--repeats", 2, preexec_fn=before)
    running = tmp_path / "results/parallel/serial/1/output.txt"
    wait_until(process, running.exists)
    process.send_signal(signal.SIGHUP)
    finish(process, status=status)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "status"), [(ignore_hangup, 0), (None, 130)])
def test_a_closed_terminal_ends_the_demo_unless_under_nohup(tmp_path, before, status):
    process = start(tmp_path, "demo.py", *TINY, "--ranks", 1, preexec_fn=before)
    wait_until(process, lambda: psutil.Process(process.pid).children())
    process.send_signal(signal.SIGHUP)
    finish(process, status=status, timeout=240)


@pytest.mark.slow
def test_a_closed_terminal_ends_the_s3_server(tmp_path):
    process = start(tmp_path, "experiments/s3_server.py")
    assert "S3 at" in process.stdout.readline()
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGHUP)
    finish(process, status=130)
    assert family
    assert not psutil.wait_procs(family, timeout=10)[1]


class Shell:
    """A bash with job control on a terminal, as a person has it."""

    def __init__(self, folder, environment):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        self.process = psutil.Process(self.pid)

    def type(self, text):
        os.write(self.terminal, text.encode())

    def read_until(self, text, timeout=120):
        got = ""
        deadline = time.monotonic() + timeout
        while text not in got:
            assert time.monotonic() < deadline, got
            got += os.read(self.terminal, 65536).decode(errors="replace")
        return got

    def close(self):
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_ctrl_z_gives_the_terminal_back_and_stops_the_trainings(tmp_path, cache):
    environment = script_environment(**cache, TERM="xterm-256color", LC_ALL="C.UTF-8", COLUMNS=100)
    environment["LINES"] = "30"
    shell = Shell(tmp_path, environment)
    try:
        options = "--dataset synthetic --subset 2000 --epochs 200 --ranks 1"
        shell.type(f"{sys.executable} {REPO}/demo.py {options}\n")
        shell.read_until("images/s")
        (demo,) = (p for p in shell.process.children() if "demo.py" in " ".join(p.cmdline()))
        (training,) = demo.children()
        shell.type("\x1a")
        out = shell.read_until("Stopped")
        assert "\033[?25h\033[?1049l" in out  # the cursor, and the terminal's own screen
        assert demo.status() == training.status() == psutil.STATUS_STOPPED

        shell.type("fg\n")
        shell.read_until("\033[?1049h\033[?25l")
        assert training.status() != psutil.STATUS_STOPPED
        shell.type("\x03")
        shell.read_until("interrupted by SIGINT")
        assert not psutil.wait_procs([training], timeout=20)[1]
    finally:
        shell.close()


# -- notebooks and threads -----------------------------------------------------------------------


KERNEL = ["/usr/lib/python3/ipykernel_launcher.py", "-f", "/home/student/kernel-1.json"]


@pytest.mark.parametrize(
    "launcher", [KERNEL[0], "/x/colab_kernel_launcher.py", "/x/ipykernel/m.py"]
)
def test_main_in_a_cell_does_not_take_the_arguments_of_the_kernel(monkeypatch, launcher):
    monkeypatch.setattr(sys, "argv", [launcher, *KERNEL[1:]])
    assert serial_cnn.parse_args() == serial_cnn.parse_args([])
    monkeypatch.setattr(sys, "argv", ["serial_cnn.py", "--epochs", "7"])  # %run serial_cnn.py
    assert serial_cnn.parse_args().epochs == 7


def test_an_error_in_a_cell_is_one_line():
    """IPython shows what this method returns in place of a traceback."""
    error = TrainingError("the loss is\nnan")
    assert error._render_traceback_() == ["error: the loss is nan"]


@pytest.mark.parametrize("end", [None, TrainingError("no"), Interrupted("stop"), SystemExit(0)])
def test_run_main_gives_back_what_a_notebook_had(end):
    def main():
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        if end:
            raise end

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return [*handlers, sys.excepthook]

    before = state()
    with pytest.raises(SystemExit):
        run_main(main)
    assert state() == before


def test_scripts_run_in_a_thread(tmp_path, monkeypatch):
    """As Streamlit and Spyder do. Signals are the main thread's."""
    monkeypatch.chdir(tmp_path)
    ends = []

    def run():
        try:
            run_main(lambda: serial_cnn.main([str(word) for word in (*TINY, "--quiet")]))
        except BaseException as end:
            ends.append(end)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(120)
    assert [(type(end), end.code) for end in ends] == [(SystemExit, None)]
    assert Path("results/serial_cnn.csv").exists()


IN_A_THREAD = """import runpy, sys, threading
def run():
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print("ended with", end.code)
del sys.argv[0]
sys.path.insert(0, {repo!r})
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["parallel_cnn_mpi.py", "demo.py", "experiments/run_experiments.py"]
)
def test_other_scripts_run_in_a_thread(tmp_path, cache, script):
    options = ["--only", "serial", "--repeats", 1] if "run_" in script else []
    code = IN_A_THREAD.format(repo=str(REPO))
    command = [sys.executable, "-c", code, REPO / script, *TINY, *options]
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env=script_environment(**cache),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "ended with None" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr


# -- containers and other systems ----------------------------------------------------------------


def as_nobody(*command):
    """The command of a user without passwd entry, as in a container with a random uid.

    Of root's rights it keeps that to read all files, as this interpreter may be in root's home.
    """
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv")
    rights = "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    words = f"setpriv --reuid 12345 --regid 12345 --clear-groups {rights} --".split()
    if subprocess.run([*words, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("this system does not let root give up its rights")
    return [*words, *map(str, command)]


@pytest.mark.slow
def test_a_user_without_name_and_home_in_a_read_only_checkout(tmp_path):
    """All scripts run; nothing is written but the results and a cache in the temporary folder."""
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "results", "data", "report")
    shutil.copytree(REPO, checkout, ignore=ignored)
    subprocess.run(["chmod", "-R", "a-w,a+rX", checkout], check=True)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    work = tmp_path / "work"
    temporary = tmp_path / "temporary"
    for folder in (work, temporary):
        folder.mkdir()
        folder.chmod(0o777)
    env = script_environment(TMPDIR=temporary)
    del env["HOME"]

    def run(script, *options, status=0):
        command = as_nobody(sys.executable, checkout / script, *options)
        done = subprocess.run(
            command, cwd=work, env=env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == status, f"{script}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    for script in ("serial_cnn.py", "parallel_cnn_mpi.py", "parallel_cnn_hybrid.py"):
        run(script, *TINY, "--quiet")
    run("train_cifar.py", *TINY, "--model", "cnn", "--quiet")
    run("experiments/analyze_results.py", "results/serial_cnn.csv")
    server = ("experiments/s3_server.py", sys.executable, checkout / "train_cifar.py")
    run(*server, "--export", "s3://cifar10", *TINY[:4], "--quiet")
    for path in ("~/x.csv", "~nobody-at-all/x.csv"):
        done = run("serial_cnn.py", *TINY, f"--log={path}", status=2)
        assert_one_error_line(done.stderr)
        assert "no such home folder" in done.stderr
    assert {path.name for path in work.iterdir()} == {".s3", "data", "results"}


def test_a_system_without_unix_is_named(tmp_path):
    """Windows has no fcntl."""
    code = "import sys; sys.modules['fcntl'] = None; import common"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert_one_error_line(done.stderr)
    assert "WSL" in done.stderr


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_images_without_a_place_for_a_cache_are_kept_in_memory(tmp_path, monkeypatch, home):
    (tmp_path / "data").touch()  # in the way
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(common.os.path, "expanduser", lambda path: path.replace("~", home or "~"))
    monkeypatch.chdir(tmp_path)
    data = common.load_cifar10("data", "synthetic", 20)
    assert len(data.x_train) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
