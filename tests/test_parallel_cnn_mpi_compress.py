"""--compress and --local-steps of parallel_cnn_mpi.py: exactly what they promise to compute."""

import json
import signal

import numpy as np
import pytest
from helpers import (
    REPO,
    mpirun,
    pausing,
    read_log,
    read_npz,
    refused,
    start_ranks,
)

import parallel_cnn_mpi
from common import SGD, epoch_order, load_batch, make_model, make_synthetic, shard
from common import softmax_cross_entropy as cross_entropy

SCRIPT = "parallel_cnn_mpi.py"
LOG, METADATA = "results/parallel_cnn_mpi.csv", "results/parallel_cnn_mpi.json"
TINY = ("--dataset", "synthetic", "--subset", 203, "--global-batch-size", 50, "--quiet")
LOSSY = [
    ("--compress", "bf16"),
    ("--compress", "topk"),
    ("--local-steps", 2),
    ("--local-steps", 2, "--compress", "topk"),
]


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.0, 0xC000),
        (1 + 2**-8, 0x3F80),  # halfway between two: to the even one
        (1 + 3 * 2**-8, 0x3F82),
        (1 + 2**-8 + 2**-20, 0x3F81),
        (3.4e38, 0x7F80),  # more than bfloat16 has: infinite
        (float("nan"), 0x7FC0),
    ],
)
def test_bfloat16_rounds_to_the_nearest(value, bits):
    array = np.array([value])
    assert parallel_cnn_mpi.to_bfloat16(array).tolist() == [bits]
    back = parallel_cnn_mpi.from_bfloat16(parallel_cnn_mpi.to_bfloat16(array))
    assert np.isfinite(back) == (bits & 0x7F80 != 0x7F80)
    if np.isfinite(back):
        assert back == pytest.approx(value, rel=2**-8)


NOTHING_IS_LOST = """
import sys
sys.path.insert(0, {repo!r})
import numpy as np
from mpi4py import MPI
from types import SimpleNamespace
import parallel_cnn_mpi as script

comm = MPI.COMM_WORLD
rng = np.random.default_rng(comm.rank)
for name in ("bf16", "topk"):
    model = SimpleNamespace(grads=np.zeros(1001))
    reducer = script.COMPRESSORS[name](comm, model)
    given = np.zeros(1001)
    sent = np.zeros(1001)
    for step in range(20):
        model.grads[:] = rng.standard_normal(1001)
        given += comm.allreduce(model.grads.copy())
        reducer.wait()
        sent += model.grads
        totals = comm.allgather(model.grads)
        assert all((total == totals[0]).all() for total in totals), name
        # float32 sums of {ranks} values round at 1e-7 of them
        missing = comm.allreduce(reducer.residual.copy())
        assert np.abs(given - sent - missing).max() < 1e-4, name
        if name == "topk":
            assert np.count_nonzero(totals[0]) <= 11 * comm.size
        assert np.abs(missing).max() > 0, name
if comm.rank == 0:
    print("nothing is lost")
"""


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_not_sent_is_in_the_residuals(tmp_path, ranks):
    """All totals so far and the residuals of all ranks are the sum of all gradients."""
    script = tmp_path / "residuals.py"
    script.write_text(NOTHING_IS_LOST.format(repo=str(REPO), ranks=ranks))
    out, _ = mpirun(tmp_path, ranks, script)
    assert out == "nothing is lost\n"


def train_apart(ranks, period, images, batch_size):
    """Local SGD written down plainly: a model for each rank, averaged after `period` steps."""
    x, y, _, _ = make_synthetic(images, 42)
    models = [make_model("cnn", 42, np.float64) for _ in range(ranks)]
    optimizers = [SGD(model, lr=0.01, momentum=0.9) for model in models]
    order = epoch_order(images, 42, 1)
    starts = range(0, images, batch_size)
    for step, start in enumerate(starts, 1):
        index = order[start : start + batch_size]
        for rank, model in enumerate(models):
            own = index[shard(len(index), rank, ranks)]
            images_of_rank, labels = load_batch(x, y, own, "float64")
            _, dlogits = cross_entropy(model.forward(images_of_rank), labels)
            model.backward(dlogits)
            optimizers[rank].step(len(own))
        if step % period == 0 or step == len(starts):
            mean = sum(model.params for model in models) / ranks
            for model in models:
                model.params[...] = mean
    return models[0].params


@pytest.mark.parametrize("period", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_local_steps_average_the_weights(tmp_path, cache, period):
    """Five steps; 100 local steps are more than an epoch, at whose end the ranks average too."""
    options = ("--local-steps", period, "--dtype", "float64", "--epochs", 1)
    mpirun(tmp_path, 2, SCRIPT, *TINY, *options, "--checkpoint", "run.npz", env=cache)
    ours = read_npz(tmp_path / "run.npz")["params"]
    assert ours == pytest.approx(train_apart(2, period, 203, 50), abs=1e-12)


@pytest.mark.parametrize(
    "options", [LOSSY[3], *(pytest.param(o, marks=pytest.mark.slow) for o in LOSSY[:3])]
)
def test_a_resumed_run_has_the_state_of_every_rank(tmp_path, cache, options):
    """Stopped after an average in the second epoch: bit for bit the weights of an unbroken run."""
    options = (*TINY, *options, "--epochs", 3, "--lr", 0.001, "--checkpoint", "run.npz")
    out, _ = mpirun(tmp_path, 2, SCRIPT, *options, "--log", "whole.csv", env=cache)
    assert out.startswith("not the run of serial_cnn.py: ")
    whole = read_npz(tmp_path / "run.npz")
    assert json.loads((tmp_path / "whole.json").read_text())["not_the_serial_run"]
    (tmp_path / "run.npz").unlink()

    waiting = pausing(tmp_path, SCRIPT, epoch=2, batch=2)
    process = start_ranks(tmp_path, 2, waiting, *options, "--log", LOG, env=cache)
    while True:  # a second SIGTERM would end it at once: wait until it is there
        if (tmp_path / LOG).exists() and len((tmp_path / LOG).read_text().splitlines()) >= 10:
            break
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    rows = read_log(tmp_path / LOG)
    # The signal travels with the next batch; with --local-steps 2 the fourth is the next average.
    last_batch = "4" if "--local-steps" in options else "3"
    assert (rows[-1]["epoch"], rows[-1]["value1"]) == ("2", last_batch)

    mpirun(tmp_path, 2, SCRIPT, *options, "--log", LOG, "--resume", env=cache)
    resumed = read_npz(tmp_path / "run.npz")
    assert resumed.keys() == whole.keys()
    for name in whole.keys() - {"meta"}:
        assert resumed[name].tobytes() == whole[name].tobytes(), name
    assert len(whole["rank_residual" if "--compress" in options else "rank_velocity"]) == 2

    _, err = mpirun(tmp_path, 3, SCRIPT, *options, "--log", LOG, "--resume", status=2, env=cache)
    assert "was made with ranks 2, this run has 3" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--compress", "bf16", "--reduce", "ring"), "omit --reduce"),
        (("--local-steps", 0), "--local-steps"),
        (("--local-steps", 2, "--model", "resnet18", "--subset", 20), "batch normalisation"),
        (("--compress", "zip"), "--compress"),
    ],
)
def test_refusals(options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel_cnn_mpi, "abort_on_exception", lambda comm: None)
    line = refused(parallel_cnn_mpi.main, *TINY, *options)
    assert message in line


def test_a_run_of_the_default_options_says_nothing(tmp_path, cache):
    out, _ = mpirun(tmp_path, 2, SCRIPT, *TINY, "--epochs", 1, "--local-steps", 1, env=cache)
    assert out.count("\n") == 1
    assert "not_the_serial_run" not in json.loads((tmp_path / METADATA).read_text())
