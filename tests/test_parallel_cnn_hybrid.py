"""parallel_cnn_hybrid.py: each threaded layer beside its serial one, ranks × threads, numbers of threads."""

import json

import numba
import numpy as np
import pytest
from helpers import (
    assert_gone,
    assert_same_resnet18_statistics,
    assert_same_run,
    assert_same_weights,
    count_rows,
    mpirun,
    pausing,
    ranks_of,
    read_log,
    read_npz,
    start_ranks,
    wait_until,
)

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
    make_cnn,
    softmax_cross_entropy,
)

SCRIPT = "parallel_cnn_hybrid.py"
LOG, SIDECAR = "results/parallel_cnn_hybrid.csv", "results/parallel_cnn_hybrid.json"
TINY = ("--dataset", "synthetic", "--subset", 60, "--batch-size", 20, "--epochs", 1)
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}


@pytest.fixture(params=[1, 2])
def threads(request):
    """A number of threads; more than there are cores need NUMBA_NUM_THREADS before Numba starts."""
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"Numba was started with {numba.config.NUMBA_NUM_THREADS} threads")
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


LAYERS = {
    "conv": (hybrid.ThreadedConvReLUPool, ConvReLUPool, (3, 32), (32, 32, 3)),
    "winograd": (hybrid.ThreadedWinogradReLUPool, WinogradReLUPool, (32, 64), (16, 16, 32)),
    "dense": (hybrid.ThreadedDense, Dense, (50, 17), (50,)),
}


def are_decided(layer, x):
    """Of the layer's outputs, those that no rounding takes from one pixel to another or through ReLU's bend.

    Two sums in float32 that differ in order are 1e-6 apart; where the two largest of a pooling window, or the largest
    and -b, are nearer than 1e-4, which of them wins, and so where the gradient goes, may depend on the order.
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
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_threaded_layer_is_the_serial_layer(name, dtype, n, threads):
    """Output, dx, dW and db on random images, with a bias; the second call finds used buffers."""
    threaded, plain, sizes, shape = LAYERS[name]
    rng = np.random.default_rng(3)
    ours, theirs = threaded(*sizes, rng=1, dtype=dtype), plain(*sizes, rng=1, dtype=dtype)
    ours.b[...] = theirs.b[...] = rng.standard_normal(theirs.b.shape)
    ours.needs_dx = theirs.needs_dx = name != "conv"
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
    """Output, dx, gradients and statistics to 1e-10 (float32: 1e-4 of the largest), twice, from equal weights."""

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
        for a, b in zip(
            [*ours.grads(), *ours.state()], [*theirs.grads(), *theirs.state()], strict=True
        ):
            assert_same(a, b, 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_threaded_convolutions_of_random_shapes(seed, threads):
    """Any kernel size, stride and padding, odd sizes, more images than one piece; Winograd's with its own limits."""
    rng = np.random.default_rng(seed)
    n, k, h, w = rng.integers(0, 7), rng.integers(1, 6), *rng.integers(5, 12, 2)
    channels, stride, padding = rng.integers(1, 9, 2), rng.integers(1, 4), rng.integers(0, k)
    ours, theirs = (
        conv(*channels, k, stride, padding, bias=seed % 2 == 0, dtype=np.float64)
        for conv in (hybrid.ThreadedConv2D, Conv2D)
    )
    ours.ROWS = 40
    assert_same_layer(ours, theirs, rng.standard_normal((n, h, w, channels[0])), rng)
    channels = 32 * rng.integers(1, 4, 2)
    ours, theirs = (
        conv(*channels, bias=seed % 2 == 0, dtype=np.float64)
        for conv in (hybrid.ThreadedWinogradConv2D, WinogradConv2D)
    )
    assert_same_layer(
        ours, theirs, rng.standard_normal((n, *4 * rng.integers(1, 4, 2), channels[0])), rng
    )


def test_winograd_in_several_pieces(threads, monkeypatch):
    """19 images in pieces of one a thread: the weights' gradient is added up, the last piece may be smaller."""
    monkeypatch.setattr(hybrid, "CACHE_BYTES", 1)
    rng = np.random.default_rng(0)
    ours, theirs = (
        conv(32, 32, dtype=np.float64) for conv in (hybrid.ThreadedWinogradConv2D, WinogradConv2D)
    )
    assert_same_layer(ours, theirs, rng.standard_normal((19, 8, 12, 32)), rng)
    assert len(ours._pieces()) > 1


@pytest.mark.parametrize("training", [True, False])
def test_threaded_normalization_is_the_serial_one(threads, training):
    """With ReLU, too, and far from zero mean, where a variance taken from the sum of squares would lose its digits."""
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
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_threaded_block_is_the_serial_block(threads, channels, stride, dtype):
    """Both convolutions, fused normalisation, ReLU and sum, both kinds of shortcut."""
    rng = np.random.default_rng(2)
    ours, theirs = (
        block(*channels, stride, dtype=dtype) for block in (hybrid.ThreadedBasicBlock, BasicBlock)
    )
    assert_same_layer(ours, theirs, rng.standard_normal((3, 8, 8, channels[0])).astype(dtype), rng)


def test_threaded_convolution_sends_ties_where_the_serial_one_does(threads):
    """Constant images: all four positions of most pooling windows are equal to the last bit."""
    ours, theirs = (layer(3, 32, rng=1) for layer in (hybrid.ThreadedConvReLUPool, ConvReLUPool))
    theirs.needs_dx = False
    x = np.ones((2, 8, 8, 3), np.float32)
    dout = np.random.default_rng(0).standard_normal(theirs.forward(x).shape).astype(np.float32)
    ours.forward(x)
    ours.backward(dout)
    theirs.backward(dout)
    np.testing.assert_allclose(ours.dW, theirs.dW, atol=1e-4)


def test_sizes_that_the_kernels_cannot_take_are_named():
    """The kernels do not check their bounds."""
    for layer, channels in (
        (hybrid.ThreadedConvReLUPool, (3, 48)),
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
        # not in the model's own buffer, and not all at once, as a Reducer has them
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


@pytest.mark.parametrize(("ranks", "threads"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_ranks_and_threads_give_the_serial_weights(
    tmp_path, serial, cache, ranks, threads, dtype, tolerance
):
    """As in test_parallel_cnn_mpi.py: 1,001 images in global batches of 64, 32 steps.

    The layers sum in another order than the serial ones. In float32 a pooling window may then round the other way and
    move weights by the learning rate times its gradient: by up to 6e-5 at 0.0003, where training moves them by 6e-3.
    """
    same = (
        "--dataset",
        "synthetic",
        "--subset",
        1001,
        "--epochs",
        2,
        "--dtype",
        dtype,
        "--quiet",
        "--lr",
        0.01 if dtype == "float64" else 0.0001,
    )
    reference = serial(*same, "--batch-size", 64)
    mpirun(
        tmp_path,
        ranks,
        SCRIPT,
        *same,
        "--global-batch-size",
        64,
        "--checkpoint",
        "run.npz",
        "--num-threads",
        threads,
        "--force-threads",
        env={**cache, "NUMBA_NUM_THREADS": 2},
    )
    assert_same_weights(tmp_path / "run.npz", reference / "run.npz", tolerance)
    sidecar = json.loads((tmp_path / SIDECAR).read_text())
    assert (sidecar["ranks"], sidecar["threads"], sidecar["threading_layer"]) == (
        ranks,
        threads,
        "omp",
    )
    assert [blas["threads"] for blas in sidecar["blas"]] == [1] * len(
        sidecar["blas"]
    )  # NumPy's and SciPy's


RESNET18 = ("--model", "resnet18", "--dataset", "synthetic", "--dtype", "float64")


@pytest.mark.parametrize(
    ("ranks", "threads", "options"),
    [
        (1, 1, ()),
        (1, 2, ()),
        (2, 1, ("--reduce", "messages", "--no-overlap")),
        (2, 2, ("--reduce", "shared")),
    ],
)
def test_resnet18_has_the_statistics_of_the_global_batch(
    tmp_path, serial, cache, ranks, threads, options
):
    """Batches of 4, 4 and 1 images, the last leaves a rank without: weights and statistics are the serial run's."""
    same = (*RESNET18, "--subset", 9, "--epochs", 1, "--quiet")
    reference = serial(*same, "--batch-size", 4)
    mpirun(
        tmp_path,
        ranks,
        SCRIPT,
        *same,
        *options,
        "--global-batch-size",
        4,
        "--checkpoint",
        "run.npz",
        "--num-threads",
        threads,
        "--force-threads",
        env={**cache, "NUMBA_NUM_THREADS": 2},
    )
    assert_same_weights(tmp_path / "run.npz", reference / "run.npz", 1e-10)
    assert_same_resnet18_statistics(tmp_path / "run.npz", reference / "run.npz", 1e-10)
    row, expected = read_log(tmp_path / LOG)[-1], read_log(reference / "results/serial_cnn.csv")[-1]
    assert float(row["loss"]) == pytest.approx(
        float(expected["loss"]), rel=1e-8
    )  # in evaluation mode


def test_resnet18_resumes_bit_for_bit(tmp_path, cache):
    """Two threads, killed in the second epoch: parameters, velocity and running statistics."""
    options = (
        *RESNET18,
        "--subset",
        8,
        "--batch-size",
        4,
        "--epochs",
        2,
        "--checkpoint",
        "run.npz",
        "--checkpoint-every",
        0,
        "--num-threads",
        2,
        "--force-threads",
    )
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


def test_compiling_is_told_and_not_timed(tmp_path, cache):
    """Into an empty cache: the seconds stand in the sidecar and on a line of their own; training has none of them.

    What has just been compiled and what comes from the cache compute the same, bit for bit.
    """
    env = {**cache, "NUMBA_CACHE_DIR": tmp_path / "numba"}
    seconds, weights = [], []
    for _ in range(2):
        out, _ = mpirun(
            tmp_path, 2, SCRIPT, *TINY, "--num-threads", 1, "--checkpoint", "run.npz", env=env
        )
        weights.append(read_npz(tmp_path / "run.npz")["params"].tobytes())
        sidecar = json.loads((tmp_path / SIDECAR).read_text())
        assert "kernels ready after" in out
        seconds.append(sidecar["compile_seconds"])
        assert sidecar["totals"]["train_seconds"] < 5
    assert seconds[0] > 5
    assert seconds[1] < seconds[0] / 2  # kept on disk
    assert weights[0] == weights[1]


def test_a_rank_takes_no_more_than_its_share_of_the_cores(tmp_path, cache):
    cores = numba.config.NUMBA_NUM_THREADS
    out, err = mpirun(tmp_path, 2, SCRIPT, *TINY, "--num-threads", cores, env=cache)
    share = max(1, cores // 2)
    if cores > 1:
        assert f"--num-threads {share} instead of {cores}" in err
    assert f"2 ranks x {share} threads" in out
    _, err = mpirun(
        tmp_path, 2, SCRIPT, *TINY, "--num-threads", cores, "--force-threads", env=cache
    )
    assert "warning: 2 ranks of" in err
    mpirun(tmp_path, 1, SCRIPT, *TINY, env={**cache, "OMP_NUM_THREADS": 1})
    assert json.loads((tmp_path / SIDECAR).read_text())["threads"] == 1


def test_more_threads_than_numba_was_started_with_is_one_line(tmp_path, cache):
    _, err = mpirun(
        tmp_path, 1, SCRIPT, *TINY, "--num-threads", 99, "--force-threads", status=2, env=cache
    )
    assert err.splitlines()[-1].startswith("error: 99 threads")


@pytest.mark.parametrize("value", ["two", "-3"])
def test_omp_num_threads_that_is_no_number_is_one_line(tmp_path, cache, value):
    _, err = mpirun(tmp_path, 1, SCRIPT, *TINY, status=2, env={**cache, "OMP_NUM_THREADS": value})
    assert err.splitlines()[-1].startswith(f"error: OMP_NUM_THREADS={value}")


def test_a_killed_rank_ends_the_job(tmp_path, cache):
    process = start_ranks(
        tmp_path,
        2,
        pausing(tmp_path, SCRIPT, epoch=1, batch=5),
        "--dataset",
        "synthetic",
        "--subset",
        2000,
        "--quiet",
        env=cache,
    )
    wait_until(process, lambda: count_rows(tmp_path / LOG) >= 5)
    ranks = ranks_of(process)
    ranks[1].kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert_gone(ranks)
