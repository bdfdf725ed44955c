"""parallel_cnn_hybrid.py: each threaded layer against its serial one, ranks × threads."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import psutil
import pytest
from helpers import (
    REPO,
    assert_gone,
    assert_one_error_line,
    assert_same_resnet18_statistics,
    assert_same_run,
    assert_same_weights,
    count_rows,
    mpirun,
    pausing,
    ranks_of,
    read_log,
    read_npz,
    refused,
    script_environment,
    start_ranks,
    wait_until,
)

import common
import parallel_cnn_hybrid as hybrid
from common import (
    MODELS,
    SGD,
    Adam,
    BasicBlock,
    BatchNorm2D,
    Conv2D,
    ConvReLUPool,
    Dense,
    ReLU,
    WinogradConv2D,
    WinogradReLUPool,
    available_cores,
    make_cnn,
    softmax_cross_entropy,
)

SCRIPT = "parallel_cnn_hybrid.py"
LOG = "results/parallel_cnn_hybrid.csv"
METADATA = "results/parallel_cnn_hybrid.json"
TINY = ("--dataset", "synthetic", "--subset", 60, "--batch-size", 20, "--epochs", 1)
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}

# The quick tier compiles the kernels for float64 only: a compilation takes half a minute.
DTYPES = [np.float64, pytest.param(np.float32, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread():
    """As in the script: products inside kernels must not start threads of their own."""
    import scipy.linalg.cython_blas  # noqa: F401 (Numba's BLAS)
    import threadpoolctl

    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(params=[1, 2])
def threads(request):
    """The number of threads; more than the cores need NUMBA_NUM_THREADS in the environment."""
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"Numba was started with {numba.config.NUMBA_NUM_THREADS} threads")
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


LAYERS = {
    "conv": (hybrid.ThreadedConvReLUPool, ConvReLUPool, (3, 48), (32, 32, 3)),
    "winograd": (hybrid.ThreadedWinogradReLUPool, WinogradReLUPool, (32, 64), (16, 16, 32)),
    "dense": (hybrid.ThreadedDense, Dense, (50, 17), (50,)),
}


def are_decided(layer, x):
    """The layer's outputs whose gradient goes to the same pixel whatever the rounding.

    Two sums in float32 that differ in order are 1e-6 apart. Where the two largest values of a
    pooling window, or the largest and -b, are closer than 1e-4, the order may decide which is the
    maximum, or whether ReLU is open.
    """
    conv = Conv2D(*layer.W.shape[2:], bias=False, dtype=np.float64)
    conv.W[...] = layer.W
    y = conv.forward(x.astype(np.float64))
    n, h, w, c = y.shape
    y = np.sort(
        y.reshape(n, h // 2, 2, w // 2, 2, c)
        .transpose(0, 1, 3, 5, 2, 4)
        .reshape(n, h // 2, w // 2, c, 4)
    )
    return (y[..., 3] - y[..., 2] > 1e-4) & (abs(y[..., 3] + layer.b) > 1e-4)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_threaded_layer_is_the_serial_layer(name, dtype, n, threads):
    """Output, dx, dW and db on random images, with a bias; the second call finds used buffers."""
    threaded, plain, sizes, shape = LAYERS[name]
    rng = np.random.default_rng(3)
    ours, theirs = threaded(*sizes, rng=1, dtype=dtype), plain(*sizes, rng=1, dtype=dtype)
    ours.b[...] = theirs.b[...] = rng.standard_normal(theirs.b.shape)
    ours.requires_input_grad = theirs.requires_input_grad = name != "conv"
    for _ in range(2):
        x = rng.standard_normal((n, *shape)).astype(dtype)
        out = theirs.forward(x)
        np.testing.assert_allclose(ours.forward(x), out, atol=TOLERANCE[dtype] * 10)
        dout = rng.standard_normal(out.shape).astype(dtype)
        if name != "dense":
            decided = are_decided(theirs, x)
            assert decided.sum() >= 0.999 * decided.size
            dout *= decided
        dx = theirs.backward(dout)
        our_dx = ours.backward(dout)
        if dx is not None:
            np.testing.assert_allclose(our_dx, dx, atol=TOLERANCE[dtype] * 10)
        for a, b in zip(ours.grads(), theirs.grads(), strict=True):
            np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * 100)


def assert_same_layer(ours, theirs, x, rng):
    """Output, dx, gradients and statistics from equal weights are equal to 1e-10, in two steps.

    In float32 they are equal to 1e-4 of the largest.
    """

    def assert_same(a, b, atol=1e-10):
        if b.dtype == np.float32 and b.size:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * abs(b).max())
        else:
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=atol)
        assert a.dtype == b.dtype

    for a, b in zip(ours.params(), theirs.params(), strict=True):
        a[...] = b[...] = rng.standard_normal(b.shape)
    for _ in range(2):
        x = x + rng.standard_normal(x.shape).astype(x.dtype)
        out = theirs.forward(x)
        assert_same(ours.forward(x), out)
        dout = rng.standard_normal(out.shape).astype(x.dtype)
        dx = theirs.backward(dout)
        assert_same(ours.backward(dout), dx)
        for a, b in zip(ours.grads(), theirs.grads(), strict=True):
            assert_same(a, b, 1e-9)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert_same(a, b, 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_threaded_convolutions_of_random_shapes(seed, threads):
    """Any kernel size, stride and padding, odd sizes, several chunks; Winograd where it can."""
    rng = np.random.default_rng(seed)
    n, k, h, w = rng.integers(0, 7), rng.integers(1, 6), *rng.integers(5, 12, 2)
    channels, stride, padding = rng.integers(1, 9, 2), rng.integers(1, 4), rng.integers(0, k)
    ours, theirs = (
        conv(*channels, k, stride, padding, bias=seed % 2 == 0, dtype=np.float64)
        for conv in (hybrid.ThreadedConv2D, Conv2D)
    )
    ours.MIN_ROWS = 40
    assert_same_layer(ours, theirs, rng.standard_normal((n, h, w, channels[0])), rng)
    channels = 32 * rng.integers(1, 4, 2)
    ours, theirs = (
        conv(*channels, bias=seed % 2 == 0, dtype=np.float64)
        for conv in (hybrid.ThreadedWinogradConv2D, WinogradConv2D)
    )
    assert_same_layer(
        ours, theirs, rng.standard_normal((n, *4 * rng.integers(1, 4, 2), channels[0])), rng
    )


def test_winograd_in_several_chunks(threads, monkeypatch):
    """19 images, one per thread and chunk: the weights' gradient is a sum over chunks."""
    monkeypatch.setattr(hybrid, "CACHE_BYTES", 1)
    rng = np.random.default_rng(0)
    ours, theirs = (
        conv(32, 32, dtype=np.float64) for conv in (hybrid.ThreadedWinogradConv2D, WinogradConv2D)
    )
    assert_same_layer(ours, theirs, rng.standard_normal((19, 8, 12, 32)), rng)
    assert len(ours._chunks()) > 1


@pytest.mark.parametrize("training", [True, False])
def test_threaded_normalization_is_the_serial_one(threads, training):
    """Also with ReLU, and with means at which a sum of squares would lose the variance's digits."""
    rng = np.random.default_rng(1)
    x = 1000 * rng.standard_normal(7) + rng.standard_normal((5, 9, 3, 7))
    assert_same_layer(
        hybrid.ThreadedBatchNorm2D(7, dtype=np.float64), BatchNorm2D(7, dtype=np.float64), x, rng
    )
    ours, theirs = hybrid.ThreadedNormReLU(7, dtype=np.float64), BatchNorm2D(7, dtype=np.float64)
    ours.training = theirs.training = training
    np.testing.assert_allclose(
        ours.forward(x), ReLU().forward(theirs.forward(x)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(("channels", "stride"), [((32, 32), 1), ((32, 64), 1), ((64, 32), 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threaded_block_is_the_serial_block(threads, channels, stride, dtype):
    """Both convolutions, fused normalisation, ReLU and sum, both kinds of shortcut."""
    rng = np.random.default_rng(2)
    ours, theirs = (
        block(*channels, stride, dtype=dtype) for block in (hybrid.ThreadedBasicBlock, BasicBlock)
    )
    assert_same_layer(ours, theirs, rng.standard_normal((3, 8, 8, channels[0])).astype(dtype), rng)


def test_threaded_pooling_resolves_ties_as_the_serial_one(threads):
    """Constant images: all four positions of most pooling windows are equal to the last bit."""
    ours, theirs = (
        layer(3, 32, rng=1, dtype=np.float64)
        for layer in (hybrid.ThreadedConvReLUPool, ConvReLUPool)
    )
    theirs.requires_input_grad = False
    x = np.ones((2, 8, 8, 3))
    dout = np.random.default_rng(0).standard_normal(theirs.forward(x).shape)
    ours.forward(x)
    ours.backward(dout)
    theirs.backward(dout)
    np.testing.assert_allclose(ours.dW, theirs.dW, atol=1e-4)


def test_sizes_that_the_kernels_cannot_take_are_named():
    """The kernels do not check their bounds."""
    for layer, channels in (
        (hybrid.ThreadedWinogradReLUPool, (16, 32)),
        (hybrid.ThreadedWinogradReLUPool, (32, 48)),
    ):
        with pytest.raises(ValueError, match="multiples of 32"):
            layer(*channels)
    for layer, channels, size in (
        (hybrid.ThreadedConvReLUPool, (3, 32), 9),
        (hybrid.ThreadedWinogradReLUPool, (32, 32), 10),
    ):
        with pytest.raises(ValueError, match=f"not {size}x{size}"):
            layer(*channels).forward(np.zeros((1, size, size, channels[0]), np.float32))


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(
    ("threaded", "plain"), [(hybrid.ThreadedSGD, SGD), (hybrid.ThreadedAdam, Adam)]
)
def test_threaded_optimizer_is_the_serial_one(threads, threaded, plain, weight_decay):
    rng = np.random.default_rng(0)
    ours, theirs = (make_cnn(1, np.float64) for _ in range(2))
    optimizers = (
        threaded(ours, 0.1, weight_decay=weight_decay),
        plain(theirs, 0.1, weight_decay=weight_decay),
    )
    for _ in range(3):
        sums = rng.standard_normal(ours.grads.shape)
        theirs.grads[...] = sums
        # not in the model's own buffer, and in shards, as a reducer provides them
        optimizers[0].step(7, sums, [slice(0, 700_001), slice(700_001, len(sums))])
        optimizers[1].step(7)
    np.testing.assert_allclose(ours.params, theirs.params, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_threads_change_no_result_beyond_rounding(name):
    results = []
    for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(threads)
        model = hybrid.make_model(name, 0, np.float64)
        x = np.random.default_rng(0).standard_normal((9, 32, 32, 3))
        model.backward(softmax_cross_entropy(model.forward(x), np.arange(9) % 10)[1])
        results.append(model.grads.copy())
    for grads in results[1:]:
        np.testing.assert_allclose(grads, results[0], rtol=1e-9, atol=1e-11)


RECIPE = ("--augment", "on", "--schedule", "one-cycle", "--weight-decay", 0.001)


@pytest.mark.parametrize(
    ("ranks", "threads", "reduce", "recipe"),
    [
        (2, 2, "shared", RECIPE),
        pytest.param(2, 2, "shared", (), marks=pytest.mark.slow),
        pytest.param(2, 2, "overlap", (), marks=pytest.mark.slow),
    ],
)
def test_ranks_times_threads_give_the_serial_weights(
    tmp_path, serial, cache, ranks, threads, reduce, recipe
):
    """20 steps with batches of 50, 50, 50, 50 and 3 images, as in test_parallel_cnn_mpi.py."""
    tiny = ("--dataset", "synthetic", "--subset", 203, "--epochs", 4, "--dtype", "float64")
    tiny = (*tiny, *recipe)
    reference = serial(*tiny, "--quiet", "--batch-size", 50)
    options = ("--quiet", "--global-batch-size", 50, "--checkpoint", "run.npz", "--reduce", reduce)
    forced = ("--num-threads", threads, "--force-threads")
    env = {**cache, "NUMBA_NUM_THREADS": threads}
    mpirun(tmp_path, ranks, SCRIPT, *tiny, *options, *forced, env=env)
    assert_same_weights(tmp_path / "run.npz", reference / "run.npz", 1e-10)
    metadata = json.loads((tmp_path / METADATA).read_text())
    assert metadata["ranks"] == ranks
    assert metadata["threads"] == threads
    assert metadata["reduce"] == reduce
    assert metadata["threading_layer"] == "omp"
    assert all(blas["threads"] == 1 for blas in metadata["blas"])  # NumPy's and SciPy's


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "threads"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_any_ranks_and_threads_give_the_serial_weights(
    tmp_path, serial, cache, ranks, threads, dtype, tolerance
):
    """As in test_parallel_cnn_mpi.py: 1,001 images in global batches of 64, 32 steps.

    The layers sum in another order than the serial ones. In float32 a pooling window may then round
    the other way and move weights by the learning rate times its gradient: by up to 6e-5 at 0.0003,
    where training moves them by 6e-3.
    """
    lr = 0.01 if dtype == "float64" else 0.0001
    same = ("--dataset", "synthetic", "--subset", 1001, "--epochs", 2, "--dtype", dtype)
    reference = serial(*same, "--quiet", "--lr", lr, "--batch-size", 64)
    options = ("--quiet", "--lr", lr, "--global-batch-size", 64, "--checkpoint", "run.npz")
    forced = ("--num-threads", threads, "--force-threads")
    env = {**cache, "NUMBA_NUM_THREADS": 2}
    mpirun(tmp_path, ranks, SCRIPT, *same, *options, *forced, env=env)
    assert_same_weights(tmp_path / "run.npz", reference / "run.npz", tolerance)


RESNET18 = ("--model", "resnet18", "--dataset", "synthetic", "--dtype", "float64")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "threads", "options"),
    [
        (1, 1, ()),
        (1, 2, ()),
        (2, 1, ("--reduce", "overlap", "--no-overlap")),
        (2, 2, ("--reduce", "shared")),
    ],
)
def test_resnet18_has_the_statistics_of_the_global_batch(
    tmp_path, serial, cache, ranks, threads, options
):
    """Batches of 4, 4 and 1 images (a rank has none): the serial run's weights and statistics."""
    same = (*RESNET18, "--subset", 9, "--epochs", 1, "--quiet")
    reference = serial(*same, "--batch-size", 4)
    options = (*options, "--global-batch-size", 4, "--checkpoint", "run.npz")
    forced = ("--num-threads", threads, "--force-threads")
    env = {**cache, "NUMBA_NUM_THREADS": 2}
    mpirun(tmp_path, ranks, SCRIPT, *same, *options, *forced, env=env)
    assert_same_weights(tmp_path / "run.npz", reference / "run.npz", 1e-10)
    assert_same_resnet18_statistics(tmp_path / "run.npz", reference / "run.npz", 1e-10)
    validation = read_log(tmp_path / LOG)[-1]  # in evaluation mode
    expected = read_log(reference / "results/serial_cnn.csv")[-1]
    assert float(validation["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-8)


@pytest.mark.slow
def test_resnet18_resumes_bit_for_bit(tmp_path, cache):
    """Two threads, killed in the second epoch: parameters, velocity and running statistics."""
    run = (*RESNET18, "--subset", 8, "--batch-size", 4, "--epochs", 2)
    saved = ("--checkpoint", "run.npz", "--checkpoint-every", 0)
    options = (*run, *saved, "--num-threads", 2, "--force-threads")
    env = {**cache, "NUMBA_NUM_THREADS": 2}
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    mpirun(tmp_path / "whole", 1, SCRIPT, *options, env=env)
    script = pausing(tmp_path / "parts", SCRIPT, epoch=2, batch=1)
    process = start_ranks(tmp_path / "parts", 1, script, *options, env=env)
    wait_until(process, lambda: count_rows(tmp_path / "parts" / LOG) >= 4 + 1)
    ranks = ranks_of(process)
    ranks[0].kill()
    process.communicate(timeout=60)
    assert_gone(ranks)
    mpirun(tmp_path / "parts", 1, SCRIPT, *options, "--resume", env=env)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", "parallel_cnn_hybrid")


@pytest.mark.slow
def test_compiling_is_reported_and_not_timed(tmp_path, cache):
    """Into an empty cache: the seconds are on a line and in the metadata, and not in training's.

    A fresh compilation and one from the cache compute the same, bit for bit.
    """
    env = {**cache, "NUMBA_CACHE_DIR": tmp_path / "numba"}
    options = (*TINY, "--num-threads", 1, "--checkpoint", "run.npz")
    compiling = []
    training = []
    weights = []
    for _ in range(2):
        out, _ = mpirun(tmp_path, 2, SCRIPT, *options, env=env)
        assert "kernels ready after" in out
        weights.append(read_npz(tmp_path / "run.npz")["params"].tobytes())
        metadata = json.loads((tmp_path / METADATA).read_text())
        compiling.append(metadata["compile_seconds"])
        training.append(metadata["totals"]["train_seconds"])
    assert training[0] < compiling[0] / 2
    assert compiling[1] < compiling[0] / 2  # kept on disk
    assert weights[0] == weights[1]


@pytest.fixture
def restored(monkeypatch):
    """Undo what main() changes in this process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("OMP_PROC_BIND", "OMP_WAIT_POLICY"):  # main() sets them: so that is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield monkeypatch
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def choose_threads(*argv):
    return hybrid.choose_threads(hybrid.parse_args(argv), hybrid.MPI.COMM_WORLD)


def test_threads_are_limited_to_the_cores(restored, capsys):
    """One rank: all cores by default and at most; --num-threads wins over OMP_NUM_THREADS."""
    cores = min(len(available_cores()), numba.config.NUMBA_NUM_THREADS)
    assert choose_threads() == cores
    assert capsys.readouterr().err == ""
    assert choose_threads("--num-threads", "999") == cores
    assert f"--num-threads {cores} instead of 999" in capsys.readouterr().err
    restored.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads() == numba.get_num_threads() == 1
    assert choose_threads("--num-threads", str(cores)) == cores


@pytest.mark.slow
def test_a_rank_takes_no_more_than_its_share_of_the_cores(tmp_path, cache):
    cores = numba.config.NUMBA_NUM_THREADS
    share = max(1, cores // 2)
    options = (*TINY, "--num-threads", cores)
    out, err = mpirun(tmp_path, 2, SCRIPT, *options, env=cache)
    if cores > 1:
        assert f"--num-threads {share} instead of {cores}" in err
    assert f"2 ranks x {share} threads" in out
    _, err = mpirun(tmp_path, 2, SCRIPT, *options, "--force-threads", env=cache)
    assert "warning: 2 ranks of" in err
    mpirun(tmp_path, 1, SCRIPT, *TINY, env={**cache, "OMP_NUM_THREADS": 1})
    assert json.loads((tmp_path / METADATA).read_text())["threads"] == 1


def test_threads_are_limited_to_a_quota(restored):
    restored.setattr(common, "cpu_quota", lambda: 1.5)
    assert choose_threads() == 1


@pytest.fixture
def one_core_group():
    """The words before a command that run it in a control group with the time of one core."""
    group = Path("/sys/fs/cgroup/cpu/one-core-test")
    if not Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").exists():
        group = Path("/sys/fs/cgroup/one-core-test")  # version 2 of control groups
    try:
        group.mkdir()
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text("100000")
        else:
            (group / "cpu.max").write_text("100000 100000")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"needs root and control groups that limit the CPU: {error}")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    group.rmdir()


@pytest.mark.slow
def test_a_container_with_one_core_gets_one_thread(tmp_path, cache, one_core_group):
    command = [*one_core_group, sys.executable, REPO / SCRIPT, *TINY]
    env = script_environment(**cache)
    subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, check=True)
    metadata = json.loads((tmp_path / METADATA).read_text())
    assert metadata["cpu_quota"] == metadata["threads"] == len(metadata["cores"]) == 1


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (hybrid.ThreadedConv2D(32, 32), (2, 8, 8, 64)),
        (hybrid.ThreadedConvReLUPool(32, 32), (2, 8, 8, 64)),
        (hybrid.ThreadedWinogradConv2D(32, 32), (2, 8, 8, 64)),
        (hybrid.ThreadedWinogradReLUPool(32, 32), (2, 8, 8, 3)),
        (hybrid.ThreadedDense(32, 32), (2, 64)),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "W") else "",
)
def test_an_input_that_does_not_fit_has_both_numbers(layer, shape):
    """A kernel would read other memory in silence."""
    with pytest.raises(ValueError, match=rf"{type(layer).__name__}.*32.*{shape[-1]}.*change in_"):
        layer.forward(np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("percent", "chosen", "policy"),
    [
        ([2, 5, 0, 1], None, None),
        ([2, 100, 0, 1], None, "passive"),
        ([60, 0, 60, 0], None, "passive"),
        ([2, 100, 0, 1], "active", "active"),
        ([2, 3], None, "passive"),
    ],
)
def test_threads_wait_passively_where_other_processes_are_busy(restored, percent, chosen, policy):
    restored.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    restored.setattr(psutil, "cpu_percent", lambda **_: percent)
    if chosen:
        restored.setenv("OMP_WAIT_POLICY", chosen)
    hybrid.choose_wait_policy(4, hybrid.MPI.COMM_SELF)
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_fewer_numba_threads_than_cores_are_no_error(restored):
    restored.setattr(numba.config, "NUMBA_NUM_THREADS", 1)
    assert choose_threads() == 1
    restored.setenv("OMP_NUM_THREADS", "2")
    assert choose_threads() == 1


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["tbb", "unknown"])
def test_a_threading_layer_that_is_not_there_is_one_line(run_script, cache, layer):
    if layer == "tbb" and importlib.util.find_spec("tbb"):
        pytest.skip("tbb is installed")
    env = {**cache, "NUMBA_THREADING_LAYER": layer}
    err = run_script(SCRIPT, *TINY, env=env, status=2).stderr
    assert_one_error_line(err)
    assert "unset NUMBA_THREADING_LAYER" in err


@pytest.mark.slow
def test_the_threading_layer_can_be_chosen(tmp_path, run_script, cache):
    for layer in ("omp", "workqueue"):
        run_script(SCRIPT, *TINY, env={**cache, "NUMBA_THREADING_LAYER": layer})
        assert json.loads((tmp_path / METADATA).read_text())["threading_layer"] == layer


@pytest.mark.slow
@pytest.mark.parametrize(
    "variable", ["OMP_PROC_BIND=true", "OMP_PLACES=cores", "GOMP_CPU_AFFINITY=0"]
)
def test_openmp_does_not_bind_all_ranks_to_one_core(tmp_path, cache, variable):
    name, value = variable.split("=")
    script = pausing(tmp_path, SCRIPT, epoch=1, batch=1)
    process = start_ranks(tmp_path, 2, script, *TINY, env={**cache, name: value})
    wait_until(process, lambda: count_rows(tmp_path / "results/parallel_cnn_hybrid.csv") >= 1)
    try:
        for rank in ranks_of(process):
            for thread in rank.threads():
                assert os.sched_getaffinity(thread.id) == os.sched_getaffinity(0)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_bad_input_is_one_line(restored):
    too_many = ("--num-threads", 99, "--force-threads")
    assert refused(hybrid.main, *TINY, *too_many).startswith("error: 99 threads")
    assert "--num-threads" in refused(hybrid.main, "--num-threads", 0)
    assert "--reduce" in refused(hybrid.main, "--reduce", "ring")  # a rung of parallel_cnn_mpi.py
    for value in ("two", "-3"):
        restored.setenv("OMP_NUM_THREADS", value)
        assert refused(hybrid.main, *TINY).startswith(f"error: OMP_NUM_THREADS={value}")


def test_bad_input_is_one_line_for_all_ranks(tmp_path, cache):
    options = (*TINY, "--num-threads", 99, "--force-threads")
    _, err = mpirun(tmp_path, 2, SCRIPT, *options, status=2, env=cache)
    assert err.splitlines()[-1].startswith("error: 99 threads")
    assert err.count("error: ") == 1


def test_the_old_name_of_a_reducer_is_accepted():
    assert hybrid.parse_args(["--reduce", "messages"]).reduce == "overlap"


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(tmp_path, cache):
    script = pausing(tmp_path, SCRIPT, epoch=1, batch=5)
    options = ("--dataset", "synthetic", "--subset", 2000, "--quiet")
    process = start_ranks(tmp_path, 2, script, *options, env=cache)
    wait_until(process, lambda: count_rows(tmp_path / LOG) >= 5)
    ranks = ranks_of(process)
    ranks[1].kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert_gone(ranks)


def test_kernels_are_kept_in_the_next_best_place(tmp_path, monkeypatch):
    """A read-only checkout, then no home folder either, then a temporary folder of another's."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(hybrid, "__file__", str(tmp_path / "file/hybrid.py"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hybrid.choose_kernel_cache()
    assert str(tmp_path / "home/.cache/numba") == numba.config.CACHE_DIR

    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"parallel-cnn-{os.getuid()}"
    assert hybrid.choose_kernel_cache()
    assert str(own) == numba.config.CACHE_DIR
    assert own.stat().st_mode & 0o777 == 0o700

    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    own.chmod(0o777)  # others may have put code there
    assert not hybrid.choose_kernel_cache()
    assert numba.config.CACHE_DIR == ""
