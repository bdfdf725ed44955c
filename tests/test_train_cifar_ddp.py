"""train_cifar.py under torchrun: the run of one process with the same global batch, one writer, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import (
    REPO,
    assert_gone,
    count_rows,
    pausing,
    read_log,
    read_npz,
    script_environment,
    wait_until,
)

from train_cifar import World, global_batches, parse_args

TINY = ("--model", "cnn", "--dataset", "synthetic", "--amp", "off", "--lr", 0.001, "--threads", 1)


def start_processes(folder, n, *options, script=REPO / "train_cifar.py"):
    command = [
        Path(sys.executable).with_name("torchrun"),
        "--standalone",
        "--nproc-per-node",
        n,
        script,
        *TINY,
        *options,
    ]
    env = script_environment(CIFAR10_DIR=folder, XDG_CACHE_HOME=folder)
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=env,
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


@pytest.mark.parametrize(("n", "size", "world"), [(100, 8, 3), (97, 16, 4), (10, 4, 8), (1, 1, 1)])
def test_processes_share_every_batch_without_overlap(n, size, world):
    """Together the shares are the epoch, each image once, but for a last batch that has fewer images than processes."""
    args = parse_args(["--subset", "10", "--device", "cpu"])
    args.global_batch_size = size * world
    order = np.random.default_rng(0).permutation(n)
    seen = []
    for start, stop in global_batches(n, args, World(size=world)):
        shares = [World(rank, world).share(order[start:stop]) for rank in range(world)]
        assert all(len(share) for share in shares)
        assert np.concatenate(shares).tolist() == order[start:stop].tolist()
        seen += np.concatenate(shares).tolist()
    assert len(set(seen)) == len(seen)
    assert n - len(seen) < world


def test_two_processes_follow_one(tmp_path):
    """Same weights to rounding as one process with the global batch, the odd last batch too; metrics are of all."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    common = ("--subset", 107, "--epochs", 2, "--checkpoint", "run.npz")
    alone(one, *common, "--batch-size", 32)
    out, _ = torchrun(two, 2, *common, "--batch-size", 16)
    ours, theirs = read_npz(two / "run.npz")["params"], read_npz(one / "run.npz")["params"]
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    rows, reference = (read_log(f / "results/train_cifar.csv") for f in (two, one))
    assert [row["type"] for row in rows] == [row["type"] for row in reference] == [*"222201"] * 2
    for row, other in zip(rows, reference, strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-3)
        if row["type"] != "2":
            assert float(row["value1"]) == pytest.approx(float(other["value1"]), abs=0.05)
    assert out.count("best test accuracy") == 1
    assert json.loads((two / "results/train_cifar.json").read_text())["ranks"] == 2


def test_interrupted_processes_resume(tmp_path):
    """SIGTERM to torchrun saves; --resume ends with the weights of an unbroken run of as many processes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    common = ("--subset", 320, "--epochs", 2, "--batch-size", 16, "--checkpoint", "run.npz")
    torchrun(whole, 2, *common)
    process = start_processes(
        broken, 2, *common, script=pausing(broken, "train_cifar.py", epoch=1, batch=3)
    )
    log = broken / "results/train_cifar.csv"
    wait_until(process, lambda: count_rows(log) >= 3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "interrupted by SIGTERM" in out + err
    assert count_rows(log) < 10
    torchrun(broken, 2, *common, "--resume")
    assert (
        read_npz(broken / "run.npz")["params"].tobytes()
        == read_npz(whole / "run.npz")["params"].tobytes()
    )
    assert len(read_log(log)) == len(read_log(whole / "results/train_cifar.csv"))


def test_a_process_that_dies_ends_all(tmp_path):
    process = start_processes(tmp_path, 2, "--subset", 2000, "--epochs", 50, "--batch-size", 16)
    wait_until(process, lambda: count_rows(tmp_path / "results/train_cifar.csv") >= 3)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = {
        p.environ().get("RANK"): p for p in family if "train_cifar.py" in " ".join(p.cmdline())
    }
    os.kill(ranks["1"].pid, signal.SIGKILL)
    process.communicate(timeout=180)
    assert process.returncode != 0
    assert_gone(family)


def test_bad_input_is_said_once(tmp_path):
    _, err = torchrun(
        tmp_path, 2, "--source", "disk", "--data-dir", "none", "--epochs", 1, status=1
    )
    assert err.count("error: ") >= 1
    assert err.count("no pictures there") == 1
    assert not (tmp_path / "results").exists()
