"""bench.py: both sides of a row do the same work, and the arithmetic holds. No figure is judged."""

import importlib
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_one_error_line, refused
from mpi4py import MPI

import bench
import bench_worker
from bench_worker import Step, Stopwatch, Work
from common import Dataset, available_cores, make_synthetic

KEYS = {"name", "ours", "baseline", "unit", "ratio", "ratio_min", "ratio_max", "n"}
BOUND = {"of_bound", "of_bound_min", "of_bound_max"}
two_cores = pytest.mark.skipif(len(available_cores()) < 2, reason="needs two cores")


@pytest.fixture(scope="module")
def data():
    return Dataset(*make_synthetic(64), "synthetic", "")


@pytest.fixture(autouse=True)
def same_threads():
    """A worker sets the threads of its process; here all tests share one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_step(work, data):
    return bench_worker.STEPS[work.kind](work, data, MPI.COMM_WORLD)


# -- rows ------------------------------------------------------------------------------------------


@pytest.fixture
def run_quick(tmp_path, monkeypatch, capsys):
    """run_quick(name) → the one row whose name has that, from samples of 0.05 s."""

    def run(name):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(bench, "QUICK_SAMPLE_SECONDS", 0.05)
        bench.main(["--quick", "--only", name, "--dataset", "synthetic"])
        (row,) = json.loads((tmp_path / "results/bench.json").read_text())["rows"]
        out, _ = capsys.readouterr()
        assert row["name"] in out
        assert "kernels" in out  # the BLAS kernel in use is named
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] < 100
        assert row["n"] >= 7
        assert row["unit"] == "images/s"
        return row

    return run


def test_quick_run_writes_table_and_json(run_quick):
    row = run_quick("serial_cnn.py, CNN, batch 32")
    assert set(row) == KEYS | {"of_sgemm"}
    assert row["ratio_min"] * 0.5 < row["ours"] / row["baseline"] < row["ratio_max"] * 2


@two_cores
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("weak scaling: 32 per rank, 2 ranks", {"cores", "efficiency", "communication", *BOUND}),
        ("batch 32, 2 threads", {"cores", "efficiency", "communication", *BOUND}),
        ("2 independent copies", {"cores", "efficiency", "communication"}),
        ("beside DDP (gloo), 32 per rank, 2 ranks", {"communication"}),
        ("parallel_cnn_hybrid.py, CNN, batch 32, 1 core", {"of_sgemm", "communication"}),
        ("train_cifar.py, cnn, batch 32", {"of_sgemm"}),
        ("train_cifar.py --load-only", set()),
    ],
)
def test_rows_of_each_kind(run_quick, name, more):
    row = run_quick(name)
    assert set(row) == KEYS | more
    if "communication" in more:
        assert (row["communication"] == 0) == ("independent" in name)
        assert row["communication"] < 1
    assert row.get("efficiency", row["ratio"] / 2) == row["ratio"] / 2


def test_the_scripts_accept_the_options_of_every_row():
    modules = {
        "serial": "serial_cnn",
        "mpi": "parallel_cnn_mpi",
        "hybrid": "parallel_cnn_hybrid",
        "hybrid_copies": "parallel_cnn_hybrid",
        "train_cifar": "train_cifar",
        "loading": "train_cifar",
        "gpu": "gpu_scratch",
    }
    kinds = set()
    for benchmark in bench.list_benchmarks(quick=False).values():
        for work in benchmark.works():
            kinds.add(work.kind)
            assert Work(*json.loads(json.dumps(work))).images == work.images  # as a worker gets it
            if work.kind in modules:
                importlib.import_module(modules[work.kind]).parse_args(list(work.options))
    assert kinds >= {"serial", "hybrid", "pytorch", "train_cifar", "loading"}
    assert kinds <= bench_worker.STEPS.keys()


class FakeWorker:
    """Answers with given rates."""

    def __init__(self, letter, rate, communication, calls):
        self.letter = letter
        self.answer = [rate, communication]
        self.calls = calls

    def sample(self, seconds):
        self.calls.append(self.letter)
        return self.answer


def test_work_takes_turns_and_ratios_are_taken_turn_by_turn(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "sgemm_rate", lambda seconds: 1000)
    monkeypatch.setattr(bench, "count_flops", lambda model: 1e5)
    ours = Work("mpi", 20, 2)
    baseline = Work("serial", 10)
    copies = Work("serial", 20, 2)
    workers = {
        ours: FakeWorker("a", 1000, 0.25, calls),
        baseline: FakeWorker("b", 500, None, calls),
        copies: FakeWorker("c", 1250, 0.0, calls),
    }
    samples = bench.take_turns("test", workers, 7, 0.01)
    assert "".join(calls) == "abccba" * 4  # a warm-up and seven turns, there and back
    assert samples.rates == {ours: [20_000] * 7, baseline: [5_000] * 7, copies: [25_000] * 7}
    assert samples.sgemm == {1: [1000] * 7}

    samples.rates[baseline][0] = 2_000
    benchmark = bench.Benchmark("group", ours, baseline, model="cnn", cores=2, bound=copies)
    row = bench.make_row("test", benchmark, samples)
    assert (row["ours"], row["baseline"]) == (20_000, 5_000)
    assert (row["ratio_min"], row["ratio"], row["ratio_max"]) == (4, 4, 10)
    assert row["n"] == 7
    assert row["of_sgemm"] == pytest.approx(20 * 1e5 / (2 * 1024**3))
    assert (row["cores"], row["efficiency"], row["communication"]) == (2, 2, 0.25)
    assert (row["of_bound_min"], row["of_bound"], row["of_bound_max"]) == (0.8, 0.8, 0.8)


def test_work_of_one_configuration_is_measured_once():
    """Equal works are in one group, so that rows do not disagree about a configuration."""
    groups = {}
    for benchmark in bench.list_benchmarks(quick=False).values():
        for work in benchmark.works():
            groups.setdefault(work, set()).add(benchmark.group)
    cores = len(available_cores())
    several = {work for work, names in groups.items() if len(names) > 1}
    # On more than two cores the groups of fewer ranks have their own serial baseline.
    assert all(work.kind == "serial" and cores > 2 for work in several)


def test_the_bound_has_as_many_images_per_core():
    for benchmark in bench.list_benchmarks(quick=False).values():
        if benchmark.bound:
            assert benchmark.bound.images == benchmark.ours.images
            assert benchmark.bound.ranks == benchmark.ours.ranks * benchmark.ours.threads


def test_sgemm_rate_counts_whole_products(monkeypatch):
    """Two products, then as many as fit; each look at the clock takes 0.03 s."""
    readings = iter(np.arange(1000) * 0.03)
    clock = SimpleNamespace(perf_counter=lambda: next(readings))
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench, "GEMM_SIZE", 2)
    # Looks: at the start, 0.03, 0.06 and 0.09 s (one product each), 0.12 s, and at the end.
    assert bench.sgemm_rate(0.1) == pytest.approx(5 / 0.15)


# -- both sides do the same work -------------------------------------------------------------------


def test_both_sides_do_the_same_training_step(data):
    """The baseline of the serial row has our network, batch and loss."""
    benchmark = bench.list_benchmarks(quick=True)["serial_cnn.py, CNN, batch 32, 1 core"]
    assert benchmark.ours.images == benchmark.baseline.images == 32
    assert bench.count_flops(benchmark.model) == pytest.approx(38.1e6, rel=0.01)  # made by hand
    ours = make_step(benchmark.ours, data)
    first = ours.run()
    assert np.log(10) * 0.5 < first < 20
    assert np.log(10) * 0.5 < make_step(benchmark.baseline, data).run() < 20
    losses = [ours.run() for _ in range(60)]
    assert losses[-1] < first / 2  # it trains, it does not only run


@pytest.mark.parametrize(
    "kind", ["mpi", *(pytest.param(k, marks=pytest.mark.slow) for k in ("hybrid", "hybrid_copies"))]
)
def test_parallel_steps_are_the_serial_step(data, kind):
    """From the same weights, on the same batch, the same losses. The hybrid is compiled first."""
    serial = make_step(Work("serial", 32), data)
    parallel = make_step(Work(kind, 32), data)
    losses = [serial.run() for _ in range(5)]
    np.testing.assert_allclose([parallel.run() for _ in range(5)], losses, rtol=1e-4)
    assert serial.communication is None
    assert parallel.communication.seconds > 0


def test_train_cifar_row_uses_what_the_script_uses(data):
    """Both sides: the script's own way, and that of tutorials, its first rung."""
    benchmark = bench.list_benchmarks(quick=True)
    (name,) = [name for name in benchmark if name.startswith("train_cifar.py, cnn")]
    for work in benchmark[name].ours, benchmark[name].baseline:
        step = make_step(work._replace(images=16, threads=1), data)
        assert np.isfinite([step.run() for _ in range(3)]).all()


def test_both_sides_load_the_same_images_augmented(data):
    """Batches of one form and distribution, each image once in an epoch."""
    benchmark = bench.list_benchmarks(quick=True)["train_cifar.py --load-only, batch 64, 1 core"]
    for work in benchmark.ours, benchmark.baseline:
        step = make_step(work._replace(images=32), data)
        x, y = step.run()
        x2, y2 = step.run()
        assert x.shape == (32, 3, 32, 32)
        assert x.dtype is torch.float32
        assert y.dtype is torch.int64
        seen = torch.bincount(torch.cat([y, y2]), minlength=10)
        assert seen.tolist() == np.bincount(data.y_train).tolist()
        assert torch.cat([x, x2]).mean().item() == pytest.approx(0.0, abs=0.4)


# -- workers ---------------------------------------------------------------------------------------


@two_cores
def test_a_worker_takes_samples_and_ends_with_its_stdin():
    worker = bench.Worker(Work("mpi", 64, ranks=2), "synthetic")
    worker.wait_until_ready()
    for _ in range(2):
        rate, communication = worker.sample(0.01)
        assert rate > 0
        assert 0 < communication < 1
    worker.close()
    assert worker.process.returncode == 0


def test_a_worker_that_fails_ends_the_benchmark(capfd):
    worker = bench.Worker(Work("serial", 64, options=("--no-such-option",)), "synthetic")
    with pytest.raises(bench.TrainingError, match=r"a worker ended: .*no-such-option"):
        worker.wait_until_ready()
    worker.close()
    assert "--no-such-option" in capfd.readouterr().err


class Comm:
    """Two ranks, of which the other one measures the same."""

    rank = 0
    size = 2

    def allreduce(self, value):
        return 2 * value


def test_a_sample_has_all_steps_and_ends_when_a_gpu_has_done_them(monkeypatch):
    """Steps only launch work, 0.5 s each; synchronize() waits for it, once."""
    clock = SimpleNamespace(now=0.0, launched=0.0, waits=0)
    stopwatch = Stopwatch()

    def run():
        clock.launched += 0.5
        stopwatch.seconds += 0.125

    def synchronize():
        clock.now += clock.launched
        clock.launched = 0.0
        clock.waits += 1

    monkeypatch.setattr(bench_worker.time, "perf_counter", lambda: clock.now)
    step = Step(run, stopwatch, synchronize)
    for _ in range(2):
        assert bench_worker.take_sample(step, 20, Comm()) == (2, 0.25)
    assert clock.waits == 2
    assert bench_worker.take_sample(Step(run, None, synchronize), 20, Comm()) == (2, None)


def test_a_stopwatch_adds_up():
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch.running():
            time.sleep(0.01)
    assert 0.02 <= stopwatch.seconds < 10


# -- GPU -------------------------------------------------------------------------------------------


def test_gpu_rows_are_left_out_with_a_reason():
    if not bench.missing_for_gpu():
        pytest.skip("needs a machine without a GPU")
    line = refused(bench.main, "--only", "gpu_scratch.py", "--dataset", "synthetic")
    assert line.startswith("error: --only gpu_scratch.py: no such row (no rows of gpu_scratch.py: ")


@pytest.mark.gpu
@pytest.mark.skipif(
    bool(bench.missing_for_gpu()), reason="needs an NVIDIA GPU, CuPy and a PyTorch with CUDA"
)
def test_gpu_row(run_quick):
    assert set(run_quick("gpu_scratch.py, CNN, batch 64")) == KEYS


# -- loading and refusals --------------------------------------------------------------------------


@pytest.mark.slow
def test_loading(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench.main(["--loading", "memory, 1", "--quick", "--dataset", "synthetic"])
    (row,) = json.loads((tmp_path / "results/bench.json").read_text())["rows"]
    assert row["name"] == "memory, 1 workers"
    assert row["name"] in capsys.readouterr().out
    assert 0 < row["min"] <= row["images_per_s"] <= row["max"]
    assert row["n"] == 3
    for waiting, total in zip(row["waiting_s"], row["total_s"], strict=True):
        assert 0 <= waiting <= total


@pytest.mark.parametrize(
    ("options", "message"), [(("--only", "absent"), "no such row"), (("--pairs", 3), "--pairs")]
)
def test_bad_input_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(bench.main, *options, "--dataset", "synthetic")
    assert not (tmp_path / "results").exists()


def test_bad_input_is_one_line(run_script, tmp_path):
    done = run_script("experiments/bench.py", "--pairs", 3, status=2)
    assert_one_error_line(done.stderr)
    assert not (tmp_path / "results").exists()
