"""train_cifar.py under torchrun: follows one process with the same global batch; one writer."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers import (
    REPO,
    assert_gone,
    count_rows,
    pausing,
    read_log,
    refused,
    script_environment,
    wait_until,
)

import train_cifar
from train_cifar import ProcessGroup, global_batches

TINY = ("--model", "cnn", "--dataset", "synthetic", "--amp", "off", "--lr", 0.001, "--threads", 1)

HELP = [sys.executable, REPO / "train_cifar.py", "--help"]


def start_processes(folder, n, *options, script=REPO / "train_cifar.py"):
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--standalone", "--nproc-per-node", n, script, *TINY, *options]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=script_environment(CIFAR10_DIR=folder, XDG_CACHE_HOME=folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(folder, n, *options, status=0):
    process = start_processes(folder, n, *options)
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.terminate()
    assert process.returncode == status, out + err
    return out, err


def alone(folder, *options):
    command = [sys.executable, REPO / "train_cifar.py", *TINY, *options]
    env = script_environment(CIFAR10_DIR=folder, XDG_CACHE_HOME=folder)
    subprocess.run(list(map(str, command)), cwd=folder, env=env, check=True, timeout=240)


def read_weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(
    ("n", "size", "processes"), [(100, 8, 3), (97, 16, 4), (10, 4, 8), (1, 1, 1)]
)
def test_processes_share_every_batch_without_overlap(n, size, processes):
    """Together the shards are the epoch, each image once.

    Only a last batch that has fewer images than processes is left out.
    """
    order = np.random.default_rng(0).permutation(n)
    seen = []
    for start, end in global_batches(n, size * processes, processes):
        batch = order[start:end]
        shards = [ProcessGroup(rank, processes).shard(batch) for rank in range(processes)]
        assert all(len(shard) for shard in shards)
        assert np.concatenate(shards).tolist() == batch.tolist()
        seen += batch.tolist()
    assert len(set(seen)) == len(seen)
    assert n - len(seen) < processes


def test_two_processes_follow_one(tmp_path):
    """The weights of one process with the global batch, to rounding.

    The last batch is not divided evenly: 16 and 15 images.

    The metrics are those of all processes, and one of them writes and prints.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    common = ("--subset", 127, "--epochs", 2, "--checkpoint", "run.pt")
    alone(one, *common, "--batch-size", 32)
    out, _ = torchrun(two, 2, *common, "--batch-size", 16)

    expected = read_weights(one / "run.pt")
    for name, tensor in read_weights(two / "run.pt").items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=0)
    rows, reference = (read_log(f / "results/train_cifar.csv") for f in (two, one))
    assert [row["type"] for row in rows] == [row["type"] for row in reference] == [*"222201"] * 2
    for row, other in zip(rows, reference, strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-3)
        if row["type"] != "2":
            assert float(row["value1"]) == pytest.approx(float(other["value1"]), abs=0.05)
    assert out.count("best test accuracy") == 1
    assert json.loads((two / "results/train_cifar.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_interrupted_processes_resume(tmp_path):
    """SIGTERM to torchrun saves; --resume ends with the weights of an uninterrupted run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    common = ("--subset", 48, "--epochs", 2, "--batch-size", 8, "--model", "resnet18")
    common = (*common, "--checkpoint", "run.pt")
    torchrun(whole, 2, *common)
    script = pausing(broken, "train_cifar.py", epoch=1, batch=1)
    process = start_processes(broken, 2, *common, script=script)
    log = broken / "results/train_cifar.csv"
    wait_until(process, lambda: count_rows(log) >= 1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "interrupted by SIGTERM" in out + err
    assert count_rows(log) < 3
    torchrun(broken, 2, *common, "--resume")

    expected = read_weights(whole / "run.pt")
    for name, tensor in read_weights(broken / "run.pt").items():
        assert torch.equal(tensor, expected[name]), name
    assert len(read_log(log)) == len(read_log(whole / "results/train_cifar.csv"))


@pytest.mark.slow
def test_first_rung_of_the_ladder_on_two_processes(tmp_path):
    """--loader torchvision: each process loads its own shard of every batch."""
    options = ("--subset", 40, "--epochs", 1, "--batch-size", 8, "--loader", "torchvision")
    torchrun(tmp_path, 2, *options)
    rows = read_log(tmp_path / "results/train_cifar.csv")
    assert "".join(row["type"] for row in rows) == "22201"


@pytest.mark.slow
def test_a_process_that_dies_ends_all(tmp_path):
    process = start_processes(tmp_path, 2, "--subset", 2000, "--epochs", 50, "--batch-size", 16)
    wait_until(process, lambda: count_rows(tmp_path / "results/train_cifar.csv") >= 3)
    family = psutil.Process(process.pid).children(recursive=True)
    training = [p for p in family if "train_cifar.py" in " ".join(p.cmdline())]
    ranks = {p.environ().get("RANK"): p for p in training}
    os.kill(ranks["1"].pid, signal.SIGKILL)
    process.communicate(timeout=180)
    assert process.returncode != 0
    assert_gone(family)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--source", "disk", "--data-dir", "none", "--epochs", 1), "no pictures in none"),
        (("--source", "nowhere"), "--source nowhere"),
        (("--model", "none"), "invalid choice"),
    ],
)
def test_bad_input_is_said_once(tmp_path, options, words):
    _, err = torchrun(tmp_path, 2, *options, status=1)
    assert err.count("error: ") >= 1
    assert err.count(words) == 1
    assert not (tmp_path / "results").exists()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_launcher_that_sets_no_local_rank(tmp_path, run_script):
    """Kubernetes operators start one process on each machine."""
    env = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    run_script("train_cifar.py", *TINY, "--subset", 40, "--epochs", 1, env=env)
    assert json.loads((tmp_path / "results/train_cifar.json").read_text())["ranks"] == 1


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK=first is not a number"),
        ({"RANK": "0"}, "WORLD_SIZE= is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 processes"),
        ({"PMI_SIZE": "3"}, "mpirun started 3 processes"),
    ],
)
def test_launchers_that_leave_a_process_alone_are_named(monkeypatch, env, words):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert words in refused(train_cifar.main, *TINY, "--subset", 40, "--epochs", 1)


def test_an_empty_rank_is_none(monkeypatch):
    monkeypatch.setenv("RANK", "")
    args = train_cifar.parse_args(list(map(str, TINY)))
    assert train_cifar.join_process_group(args).size == 1


def test_torchrun_takes_none_of_our_options():
    """It looks for its own among ours, shortened ones too: --log needs a second name."""
    from torch.distributed.run import get_args_parser

    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    ours = re.findall(r"^ +(--\S+)", subprocess.check_output(HELP, text=True), re.MULTILINE)
    ours = [name.strip(",") for name in ours]
    assert {"--model", "--log", "--source"} <= {*ours}
    taken = [name for name in ours if any(other.startswith(name) for other in theirs)]
    assert taken == ["--log"]


@pytest.mark.slow
def test_torchrun_and_the_log(tmp_path):
    torchrun(tmp_path, 2, "--subset", 40, "--epochs", 1, "--log-file", "two.csv")
    assert (tmp_path / "two.csv").exists()
    assert json.loads((tmp_path / "two.json").read_text())["ranks"] == 2
