"""Fixtures of all tests: scripts run as their users run them, the real images if there are any."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO, script_environment


def pytest_configure():
    """Signals as in a terminal, also where the tests run in the background or under nohup.

    There SIGINT or SIGHUP is ignored, which every script that a test starts would inherit. A
    handler is not inherited.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda signum, frame: None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failing test says which tier it is in, and so which command runs it."""
    report = yield
    if report.failed:
        if item.get_closest_marker("slow"):
            tier = "slow tier: make test-all runs this test, make test does not"
        else:
            tier = "quick tier: make test and make test-all run this test"
        report.sections.append(("tier", tier))
    return report


@pytest.fixture
def run_script(tmp_path):
    """run_script("serial_cnn.py", "--epochs", 1, ...) → CompletedProcess with text.

    The script runs in an empty folder. status: the exit status that is expected, None for any.
    env: changes to the environment.
    """

    def run(script, *args, status=0, env=None, timeout=300):
        command = [sys.executable, str(REPO / script), *map(str, args)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=script_environment(**(env or {})),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert status is None or done.returncode == status, (
            f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    return run


@pytest.fixture(scope="session")
def real_data():
    """The folder with the real images, $CIFAR10_DIR."""
    folder = os.environ.get("CIFAR10_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs the CIFAR-10 images: set CIFAR10_DIR to their folder")
    return Path(folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"CIFAR10_DIR": folder, "XDG_CACHE_HOME": folder}


@pytest.fixture(scope="session")
def serial(tmp_path_factory, cache):
    """serial(*options) → the folder of serial_cnn.py's run with them, made once."""
    folders = {}

    def run(*options):
        if options not in folders:
            folders[options] = tmp_path_factory.mktemp("serial")
            command = [sys.executable, REPO / "serial_cnn.py", *options, "--checkpoint", "run.npz"]
            subprocess.run(
                list(map(str, command)),
                cwd=folders[options],
                env=script_environment(**cache),
                check=True,
            )
        return folders[options]

    return run
