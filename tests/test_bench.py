"""bench.py: what it measures is the same work on both sides, and its arithmetic holds. No figure is judged here."""

import json
from types import SimpleNamespace

import bench
import numpy as np
import pytest
import torch

from common import Dataset, available_cores, make_synthetic

KEYS = {"name", "ours", "peer", "unit", "ratio", "ratio_min", "ratio_max", "n"}


@pytest.fixture(scope="module")
def data():
    return Dataset(*make_synthetic(64), "synthetic", "")


def test_quick_run_writes_table_and_json(run_script, tmp_path):
    done = run_script(
        "bench.py", "--quick", "--only", "serial_cnn.py, CNN, batch 32", "--dataset", "synthetic"
    )
    rows = json.loads((tmp_path / "results/bench.json").read_text())["rows"]
    assert [set(row) for row in rows] == [KEYS | {"of_sgemm"}]
    row = rows[0]
    assert row["n"] >= 7
    assert row["unit"] == "images/s"
    assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert row["ratio_min"] * 0.5 < row["ours"] / row["peer"] < row["ratio_max"] * 2
    assert row["name"] in done.stdout
    assert "kernels" in done.stdout  # the BLAS kernel in use is named


@pytest.mark.skipif(len(available_cores()) < 2, reason="needs two cores")
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("weak: 32 a rank, 2 ranks", {"cores", "efficiency", "communication"}),
        ("2 at once that share nothing", {"cores", "efficiency", "communication"}),
        ("beside DDP (gloo), 32 a rank, 2 ranks", {"communication"}),
    ],
)
def test_rows_of_processes_under_mpirun(run_script, tmp_path, name, more):
    done = run_script("bench.py", "--quick", "--only", name, "--dataset", "synthetic")
    (row,) = json.loads((tmp_path / "results/bench.json").read_text())["rows"]
    assert set(row) == KEYS | more
    assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] < 100
    assert (row["communication"] == 0) == ("share nothing" in name)
    assert row["communication"] < 1
    assert row.get("efficiency", row["ratio"] / 2) == row["ratio"] / 2
    assert row["name"] in done.stdout


def test_both_sides_do_the_same_work(data, monkeypatch):
    """The peer of the serial row has our network, batch and step: from equal weights both have the same loss."""
    contest = bench.serial_contest(data, 32)
    assert contest.flops == pytest.approx(32 * 38.1e6, rel=0.01)  # the count that one makes by hand
    first = contest.ours()[0] / 32
    assert np.log(10) * 0.5 < first < 20
    assert np.log(10) * 0.5 < contest.peer() < 20
    losses = [contest.ours()[0] / 32 for _ in range(60)]
    assert losses[-1] < first / 2  # it trains, it does not only run


class Clock:
    """perf_counter() that steps alone move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def pass_by(self, seconds):
        self.now += seconds


def test_pairs_alternate_and_ratios_are_taken_pair_by_pair(monkeypatch):
    calls, clock = [], Clock(monkeypatch)
    monkeypatch.setattr(bench, "sgemm", lambda: lambda: clock.pass_by(0.001))
    contest = bench.Contest(
        "test",
        10,
        1,
        lambda: calls.append("a") or clock.pass_by(0.001),
        lambda: calls.append("b") or clock.pass_by(0.002),
        1e6,
    )
    row = bench.compete(contest, pairs=7, seconds=0.01)
    turns = "".join(calls[i] for i in range(len(calls)) if i == 0 or calls[i] != calls[i - 1])
    assert turns == "ab" * 8  # a warm-up and seven pairs
    assert (row["ours"], row["peer"]) == pytest.approx((10_000, 5_000))
    assert (row["ratio_min"], row["ratio"], row["ratio_max"]) == pytest.approx((2, 2, 2))
    assert row["n"] == 7
    assert row["of_sgemm"] == pytest.approx(1e6 / (2 * 1024**3))


def test_rate_counts_whole_calls(monkeypatch):
    clock = Clock(monkeypatch)
    assert bench.rate(lambda: clock.pass_by(0.03), seconds=0.1) == pytest.approx(4 / 0.12)
    assert bench.rate(lambda: clock.pass_by(7), seconds=0.1) == pytest.approx(
        2 / 14
    )  # at least two


def test_train_cifar_row_uses_what_the_script_uses(data):
    step = bench.train_cifar_step(
        {"options": ["--model", "cnn", "--lr", "0.001"], "images": 16}, data
    )
    loss, logits, _ = step()
    assert logits.shape == (16, 10)
    assert np.isfinite(loss.item())


def test_train_cifar_row_has_a_process_of_its_own(data):
    contest = bench.train_cifar_contest(data, "cnn", 16)
    assert contest.ours.rate(0.01) > 0
    assert np.isfinite(contest.peer())
    contest.ours.stop()
    assert contest.ours.process.returncode == 0


def test_both_sides_load_the_same_images_augmented(data):
    """Batches of one form and distribution, each image once in an epoch."""
    ours, theirs = bench.our_batches(data, 32, workers=1), bench.torchvision_batches(data, 32)
    for batches in (ours, theirs):
        (x, y), (x2, y2) = next(batches), next(batches)
        assert x.shape == (32, 3, 32, 32)
        assert x.dtype is torch.float32
        assert y.dtype is torch.int64
        assert (
            torch.bincount(torch.cat([y, y2]), minlength=10).tolist()
            == np.bincount(data.y_train).tolist()
        )
        assert torch.cat([x, x2]).mean().item() == pytest.approx(0.0, abs=0.4)
    contest = bench.loading_contest(data, 32)
    assert [len(batch[1]) for batch in (contest.ours(), contest.peer())] == [32, 32]


def test_gpu_rows_are_left_out_with_a_reason(run_script):
    if not bench.missing_for_gpu():
        pytest.skip("needs a machine without a GPU")
    done = run_script("bench.py", "--only", "gpu_scratch.py", "--dataset", "synthetic", status=2)
    assert done.stderr.startswith(
        "error: --only gpu_scratch.py: no such row (no rows of gpu_scratch.py: "
    )


@pytest.mark.gpu
@pytest.mark.skipif(
    bool(bench.missing_for_gpu()), reason="needs an NVIDIA GPU, CuPy and a PyTorch with CUDA"
)
def test_gpu_row(run_script, tmp_path):
    run_script(
        "bench.py",
        "--quick",
        "--only",
        "gpu_scratch.py, CNN, batch 64",
        "--dataset",
        "synthetic",
        timeout=600,
    )
    (row,) = json.loads((tmp_path / "results/bench.json").read_text())["rows"]
    assert set(row) == KEYS
    assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]


def test_a_gpu_turn_is_timed_by_its_events():
    """Marks that count the calls between them, in the place of a GPU's events."""
    calls = []

    class Mark:
        def __init__(self):
            self.calls = len(calls)

        def synchronize(self):
            self.waited = True

    def seconds(since, until):
        assert until.waited
        return (until.calls - since.calls) * 0.5

    step = bench.GpuStep(lambda: calls.append(1), Mark, seconds)
    before = len(calls)
    assert bench.rate(step, seconds=10) == 2
    assert len(calls) - before == 20


@pytest.mark.parametrize(
    ("options", "message"), [(("--only", "absent"), "no such row"), (("--pairs", 3), "--pairs")]
)
def test_bad_input_is_one_line(run_script, tmp_path, options, message):
    done = run_script("bench.py", *options, "--dataset", "synthetic", status=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "results").exists()
