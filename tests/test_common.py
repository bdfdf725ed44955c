"""common.py: gradients, parity with PyTorch, data, run log, and what the other parts of it
promise.
"""

import contextlib
import csv
import functools
import hashlib
import http.server
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from helpers import REPO, finish, start_command

import common
from common import (
    SGD,
    Adam,
    BasicBlock,
    BatchNorm2D,
    Checkpoint,
    Conv2D,
    ConvReLUPool,
    Dataset,
    Dense,
    Flatten,
    GlobalAvgPool,
    InputError,
    Interrupted,
    MaxPool2D,
    Model,
    ReLU,
    ResourceMonitor,
    RunLog,
    StopSignal,
    TrainingError,
    WinogradConv2D,
    WinogradReLUPool,
    count_correct,
    epoch_order,
    evaluate,
    load_batch,
    load_cifar10,
    load_dataset,
    make_cnn,
    make_optimizer,
    make_parser,
    make_resnet18,
    make_synthetic,
    require_finite,
    save_and_stop,
    softmax_cross_entropy,
)


@pytest.fixture(scope="session", autouse=True)
def _one_blas_thread():
    common.limit_blas_threads(1)


@pytest.fixture(scope="session")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="session")
def torchvision(torch):
    pytest.importorskip("PIL")
    return common.import_torchvision()


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    """No download (a closed port refuses at once), no data, and no cache but the test's own."""
    for name in (
        "CIFAR10_DIR",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "no_proxy",
        "NO_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    use_proxy(monkeypatch, 9)


@pytest.fixture
def _signal_handlers(monkeypatch):
    """Puts back what run_main() sets for a whole process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def use_proxy(monkeypatch, port):
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    urllib.request.install_opener(None)  # urllib keeps the proxies that it found first


# --------------------------------------------------------------------------------------------------
# A layer or a model that is wrong says so
# --------------------------------------------------------------------------------------------------


class Rebinding(Dense):
    """The mistake that trains nothing in silence: dW becomes an array that no optimizer sees."""

    def backward(self, dout):
        dx = super().backward(dout)
        self.dW = self.dW * 1
        return dx


class Doubling(Dense):
    def backward(self, dout):
        dx = super().backward(dout)
        self.dW[1, 2] *= 2
        return dx


def one_step(model, shape, labels=(0, 1)):
    logits = model.forward(np.ones((2, *shape), np.float32))
    _, dlogits = softmax_cross_entropy(logits, np.array(labels))
    model.backward(dlogits)


def test_a_layer_that_rebinds_its_gradient_is_named():
    with pytest.raises(ValueError, match=r"Rebinding\.dW is a new array.*self\.dW\[\.\.\.\] = "):
        one_step(Model([Rebinding(3, 4)]), (3,))


def test_a_layer_that_rebinds_its_weights_is_named():
    model = Model([Dense(3, 4)])
    model.layers[0].W = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"Dense\.W is a new array"):
        one_step(model, (3,))


def test_a_layer_that_is_used_twice_is_named():
    relu = ReLU()
    with pytest.raises(ValueError, match="layer 3, ReLU, is in the model twice"):
        Model([Dense(3, 4), relu, Dense(4, 4), relu])


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match=r"Model\(\[ReLU, Flatten\]\): no layer has parameters"):
        Model([ReLU(), Flatten()])


def test_a_dense_layer_of_the_wrong_width_has_both_numbers():
    with pytest.raises(ValueError, match=r"Dense\(4, 5\) takes .* \(N, 4\), not of \(N, 3\)"):
        one_step(Model([Dense(4, 5)]), (3,))
    with pytest.raises(ValueError, match=r"not of \(N, 2, 2, 3\): .*Flatten"):
        one_step(Model([Dense(4, 5)]), (2, 2, 3))


def test_a_convolution_of_the_wrong_channels_has_both_numbers():
    with pytest.raises(ValueError, match="Conv2D takes 3 channels, its input has 2"):
        Conv2D(3, 4).forward(np.ones((1, 4, 4, 2), np.float32))
    with pytest.raises(ValueError, match="WinogradConv2D takes 3 channels, its input has 2"):
        WinogradConv2D(3, 4).forward(np.ones((1, 4, 4, 2), np.float32))


def test_a_label_outside_the_classes_is_named():
    with pytest.raises(ValueError, match="label 4, but the logits are of 4 classes"):
        one_step(Model([Dense(3, 4)]), (3,), labels=(0, 4))


def test_check_gradient_names_the_worst_entry():
    x = np.random.default_rng(0).standard_normal((2, 3))
    assert common.check_gradient(Dense(3, 4, rng=1, dtype=np.float64), x) < 1e-6
    with pytest.raises(ValueError, match=r"Doubling\.dW\[1, 2\] is .*, central differences give"):
        common.check_gradient(Doubling(3, 4, rng=1, dtype=np.float64), x)


# --------------------------------------------------------------------------------------------------
# Layers: numerical gradients
# --------------------------------------------------------------------------------------------------


def numerical_gradient(f, x, eps=1e-6):
    """df/dx by central differences, element by element; x is changed in place and put back."""
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + eps
        above = f()
        x[i] = kept - eps
        gradient[i] = (above - f()) / (2 * eps)
        x[i] = kept
    return gradient


def assert_close(value, wanted, tolerance=1e-6):
    """The largest difference is at most `tolerance` of the largest value."""
    value, wanted = np.asarray(value), np.asarray(wanted)
    assert value.shape == wanted.shape
    assert abs(value - wanted).max(initial=0) <= tolerance * max(abs(wanted).max(initial=0), 1e-3)


def check_gradients(layer, x, rng):
    """dx, dW and db of sum(out * R) with a random R against central differences, in float64."""
    R = rng.standard_normal(layer.forward(x).shape)
    analytic = [np.array(a) for a in (layer.backward(R), *layer.grads())]
    for a, array in zip(analytic, (x, *layer.params()), strict=True):
        assert_close(a, numerical_gradient(lambda: (layer.forward(x) * R).sum(), array))


def randomized(layer, rng):
    """The layer with biases that are not zero."""
    layer.b[...] = 0.3 * rng.standard_normal(layer.b.shape)
    return layer


def distinct(rng, shape):
    """Numbers that are at least 0.01 apart from each other and from zero: no tie, no kink within
    reach.
    """
    size = math.prod(shape)
    return (rng.permutation(size) - size // 2 + 0.5).reshape(shape) * 0.02


CONVOLUTIONS = [(k, s, p) for k in (1, 2, 3, 5) for s in (1, 2, 3) for p in (0, 1, 2)]


def conv_case(k, s, p, block=False, largest=9):
    """A Conv2D (or ConvReLUPool) in float64 and an input of random, not square, size."""
    rng = np.random.default_rng([k, s, p])
    c_in, c_out, n = rng.integers(1, 4, 3)
    least = max(k + s * block - 2 * p, 1)  # one output, two for a pooling window
    h = rng.integers(least, max(largest, least + 2))
    w = h + rng.integers(1, 4)
    layer = (ConvReLUPool if block else Conv2D)(c_in, c_out, k, s, p, rng=rng, dtype=np.float64)
    return randomized(layer, rng), rng.standard_normal((n, h, w, c_in)), rng


@pytest.mark.parametrize(("k", "s", "p"), CONVOLUTIONS)
def test_gradient_conv2d(k, s, p):
    check_gradients(*conv_case(k, s, p))


@pytest.mark.parametrize(("k", "s", "p"), CONVOLUTIONS)
def test_gradient_conv_relu_pool(k, s, p):
    check_gradients(*conv_case(k, s, p, block=True))


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (2, 8, 4, 3), (3, 4, 12, 2)])
def test_gradient_winograd_relu_pool(shape):
    rng = np.random.default_rng(shape)
    layer = randomized(WinogradReLUPool(shape[3], 3, rng=rng, dtype=np.float64), rng)
    check_gradients(layer, rng.standard_normal(shape), rng)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (2, 8, 4, 3), (3, 4, 12, 2)])
def test_gradient_winograd_conv2d(shape, bias):
    rng = np.random.default_rng(shape)
    layer = WinogradConv2D(shape[3], 3, bias=bias, rng=rng, dtype=np.float64)
    assert len(layer.params()) == 1 + bias
    check_gradients(randomized(layer, rng) if bias else layer, rng.standard_normal(shape), rng)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [0, 1, 9])
def test_winograd_conv2d_is_conv2d(n, dtype):
    """More images than fit into a piece, and none; the second call finds used buffers."""
    rng, tolerance = np.random.default_rng(n), 1e-12 if dtype is np.float64 else 2e-5
    ours, theirs = (layer(32, 48, rng=1, dtype=dtype) for layer in (WinogradConv2D, Conv2D))
    for _ in range(2):
        x, dout = (rng.standard_normal((n, 16, 8, c)).astype(dtype) for c in (32, 48))
        assert_close(ours.forward(x), theirs.forward(x), tolerance)
        assert_close(ours.backward(dout), theirs.backward(dout), tolerance)
        for a, b in zip(ours.grads(), theirs.grads(), strict=True):
            assert_close(a, b, tolerance)


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (1, 2, 1, 3), (5, 1, 1, 1)])
def test_gradient_batch_norm(shape):
    rng = np.random.default_rng(shape)
    layer = BatchNorm2D(shape[3], dtype=np.float64)
    layer.gamma[...], layer.beta[...] = rng.standard_normal((2, shape[3]))
    check_gradients(layer, 2 + 3 * rng.standard_normal(shape), rng)


def test_gradient_global_avg_pool():
    rng = np.random.default_rng(0)
    check_gradients(GlobalAvgPool(), rng.standard_normal((2, 3, 4, 5)), rng)


@pytest.mark.parametrize("conv", [Conv2D, WinogradConv2D])
@pytest.mark.parametrize(("channels", "stride"), [((2, 2), 1), ((2, 3), 1), ((2, 3), 2)])
def test_gradient_basic_block(channels, stride, conv):
    rng = np.random.default_rng([*channels, stride])
    layer = BasicBlock(*channels, stride, conv=conv, rng=rng, dtype=np.float64)
    check_gradients(layer, rng.standard_normal((2, 8, 8, channels[0])), rng)


def test_batch_norm_over_ranks_is_that_of_the_whole_batch():
    """Three shards of unequal size, one of them empty, each in a thread of its own: outputs,
    gradients, statistics.
    """
    rng = np.random.default_rng(0)
    x, dout = 5 + rng.standard_normal((7, 2, 3, 4)), rng.standard_normal((7, 2, 3, 4))
    whole = BatchNorm2D(4, dtype=np.float64)
    out, dx = whole.forward(x), whole.backward(dout)
    parts, met, places = (
        [slice(0, 4), slice(4, 4), slice(4, 7)],
        threading.Barrier(3, timeout=120),
        [None] * 3,
    )
    layers = [BatchNorm2D(4, dtype=np.float64) for _ in parts]
    results = [None] * 3

    def rank(r):
        def gather(array):
            places[r] = array.copy()
            met.wait()
            stacked = np.stack(places)
            met.wait()
            return stacked

        layers[r].gather = gather
        results[r] = (
            layers[r].forward(x[parts[r]]).copy(),
            layers[r].backward(dout[parts[r]]).copy(),
        )

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(np.concatenate([result[0] for result in results]), out, 1e-12)
    assert_close(np.concatenate([result[1] for result in results]), dx, 1e-12)
    assert_close(sum(layer.dgamma for layer in layers), whole.dgamma, 1e-12)
    assert_close(sum(layer.dbeta for layer in layers), whole.dbeta, 1e-12)
    for layer in layers:
        assert_close(layer.running_mean, whole.running_mean, 1e-12)
        assert_close(layer.running_var, whole.running_var, 1e-12)


POOLS = [
    (2, None),
    (2, 1),
    (3, None),
    (3, 2),
    (3, 1),
    (1, 2),
    (2, 3),
]  # overlapping, with leftovers, with gaps


@pytest.mark.parametrize(("size", "stride"), POOLS)
@pytest.mark.parametrize("shape", [(2, 6, 6, 2), (1, 7, 5, 3)])
def test_gradient_max_pool(size, stride, shape):
    rng = np.random.default_rng([size, *shape])
    check_gradients(MaxPool2D(size, stride), distinct(rng, shape), rng)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5)])
def test_gradient_relu(shape):
    rng = np.random.default_rng(shape)
    check_gradients(ReLU(), distinct(rng, shape), rng)


def test_gradient_flatten():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 5))
    check_gradients(Flatten(), x, rng)
    np.testing.assert_array_equal(Flatten().forward(x), x.reshape(2, 60))


@pytest.mark.parametrize(("n", "inputs", "outputs"), [(1, 1, 1), (5, 7, 3), (2, 30, 10)])
def test_gradient_dense(n, inputs, outputs):
    rng = np.random.default_rng([n, inputs])
    layer = randomized(Dense(inputs, outputs, rng=rng, dtype=np.float64), rng)
    check_gradients(layer, rng.standard_normal((n, inputs)), rng)


@pytest.mark.parametrize("scale", [1, 30])
def test_gradient_softmax_cross_entropy(scale):
    rng = np.random.default_rng(scale)
    logits, labels = scale * rng.standard_normal((6, 10)), rng.integers(0, 10, 6).astype(np.uint8)
    _, dlogits = softmax_cross_entropy(logits, labels)
    assert_close(
        dlogits, numerical_gradient(lambda: softmax_cross_entropy(logits, labels)[0], logits, 1e-5)
    )


def test_gradient_of_the_whole_cnn():
    """A random direction through all 1,070,794 parameters: dL = grads · direction."""
    rng, model = np.random.default_rng(1), make_cnn(1, np.float64)
    x, labels = rng.standard_normal((2, 32, 32, 3)), np.array([3, 8], np.uint8)
    model.backward(softmax_cross_entropy(model.forward(x), labels)[1])
    kept = model.params.copy()
    for _ in range(3):
        direction = rng.standard_normal(kept.size) / 1000
        losses = []
        for eps in (1e-5, -1e-5):
            model.params[...] = kept + eps * direction
            losses.append(softmax_cross_entropy(model.forward(x), labels)[0])
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(model.grads @ direction, rel=1e-6)


# --------------------------------------------------------------------------------------------------
# Layers: against PyTorch and against each other
# --------------------------------------------------------------------------------------------------


def run_layer(layer, x, R):
    """Output and all gradients of a layer, copied."""
    out = np.array(layer.forward(x))
    dx = layer.backward(R)
    return [out, *(np.array(a) for a in (dx, *layer.grads()))]


def against_torch(torch, layer, x, function, tolerance=1e-10):
    """The layer gives the output and gradients of function(x, *params), which works on NHWC
    tensors.
    """
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, *layer.params())]
    out = function(*leaves)
    R = np.random.default_rng(0).standard_normal(out.shape).astype(x.dtype)
    out.backward(torch.tensor(R))
    for mine, theirs in zip(
        run_layer(layer, x, R), (out.detach(), *(t.grad for t in leaves)), strict=True
    ):
        assert_close(mine, theirs.numpy(), tolerance)


def torch_conv2d(torch, stride=1, padding=1):
    def function(x, W, b):
        y = torch.nn.functional.conv2d(
            x.permute(0, 3, 1, 2), W.permute(3, 2, 0, 1).contiguous(), b, stride, padding
        )
        return y.permute(0, 2, 3, 1)

    return function


def torch_pool(torch, x, size=2, stride=None):
    return torch.nn.functional.max_pool2d(x.permute(0, 3, 1, 2), size, stride).permute(0, 2, 3, 1)


def torch_block(torch, stride=1, padding=1):
    conv = torch_conv2d(torch, stride, padding)
    return lambda x, W, b: torch_pool(torch, conv(x, W, b).relu())


@pytest.mark.parametrize(("k", "s", "p"), CONVOLUTIONS)
def test_conv2d_is_pytorchs(torch, k, s, p):
    layer, x, _ = conv_case(k, s, p, largest=20)
    against_torch(torch, layer, x, torch_conv2d(torch, s, p))


@pytest.mark.parametrize(("k", "s", "p"), CONVOLUTIONS)
def test_conv_relu_pool_is_pytorchs(torch, k, s, p):
    layer, x, _ = conv_case(k, s, p, block=True, largest=20)
    against_torch(torch, layer, x, torch_block(torch, s, p))


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (5, 16, 8, 7), (3, 12, 20, 4)])
def test_winograd_relu_pool_is_pytorchs(torch, shape):
    rng = np.random.default_rng(shape)
    layer = randomized(WinogradReLUPool(shape[3], 6, rng=rng, dtype=np.float64), rng)
    against_torch(torch, layer, rng.standard_normal(shape), torch_block(torch))


@pytest.mark.parametrize(("size", "stride"), POOLS)
@pytest.mark.parametrize("shape", [(3, 8, 8, 4), (2, 13, 9, 3)])
def test_max_pool_is_pytorchs(torch, size, stride, shape):
    rng = np.random.default_rng(shape)
    for x in (
        rng.standard_normal(shape),
        rng.integers(-1, 2, shape).astype(float),
    ):  # the second is full of ties
        against_torch(
            torch, MaxPool2D(size, stride), x, lambda x: torch_pool(torch, x, size, stride)
        )


def test_dense_and_loss_are_pytorchs(torch):
    rng = np.random.default_rng(5)
    layer = randomized(Dense(20, 10, rng=rng, dtype=np.float64), rng)
    against_torch(torch, layer, rng.standard_normal((6, 20)), lambda x, W, b: x @ W + b)
    logits, labels = 20 * rng.standard_normal((6, 10)), rng.integers(0, 10, 6)
    loss, dlogits = softmax_cross_entropy(logits, labels)
    theirs = torch.tensor(logits, requires_grad=True)
    total = torch.nn.functional.cross_entropy(theirs, torch.tensor(labels), reduction="sum")
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-12)
    assert_close(dlogits, theirs.grad.numpy(), 1e-12)


def tied_inputs(shape):
    """Images whose pooling windows hold equal maxima, exactly, in any order of summation."""
    rng = np.random.default_rng(shape)
    return {
        "integers": rng.integers(-1, 2, shape).astype(float),
        "constant": np.ones(shape),
        "zero": np.zeros(shape),
        "stripes": np.broadcast_to(np.arange(shape[2])[:, None] // 3 % 2, shape).astype(float),
    }


@pytest.mark.parametrize("kind", ["integers", "constant", "zero", "stripes"])
@pytest.mark.parametrize("bias", [-2, 0, 1])
def test_ties_go_where_pytorch_sends_them(torch, kind, bias):
    """Integers are added without rounding, so equal sums are equal: the gradient goes to the same
    one of them.
    """
    x = tied_inputs((3, 9, 8, 3))[kind]
    layer = ConvReLUPool(3, 5, dtype=np.float64)
    layer.W[...] = np.random.default_rng(7).integers(-1, 2, layer.W.shape)
    layer.b[...] = bias
    against_torch(torch, layer, x, torch_block(torch))


@pytest.mark.parametrize("bias", [-1, 0, 1])
def test_winograd_ties_of_empty_images_go_where_pytorch_sends_them(torch, bias):
    """A Winograd tile rounds, so only zeros tie exactly; after a ReLU they are the ties that there
    are.
    """
    rng = np.random.default_rng(0)
    layer = WinogradReLUPool(3, 5, rng=0, dtype=np.float64)
    layer.b[...] = bias
    x = np.zeros((3, 16, 16, 3))
    x[:, 8:, 8:] = rng.standard_normal((3, 8, 8, 3))
    against_torch(torch, layer, x, torch_block(torch))


@pytest.mark.parametrize("block", [ConvReLUPool, WinogradReLUPool])
@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (2, 16, 12, 5), (1, 4, 32, 8)])
def test_fused_blocks_are_the_three_layers(block, shape):
    rng = np.random.default_rng(shape)
    fused = randomized(block(shape[3], 6, rng=1, dtype=np.float64), rng)
    conv, relu, pool = Conv2D(shape[3], 6, rng=1, dtype=np.float64), ReLU(), MaxPool2D(2)
    conv.b[...] = fused.b
    x = rng.standard_normal(shape)
    out = pool.forward(relu.forward(conv.forward(x)))
    R = rng.standard_normal(out.shape)
    dx = conv.backward(relu.backward(pool.backward(R)))
    for mine, theirs in zip(run_layer(fused, x, R), (out, dx, conv.dW, conv.db), strict=True):
        assert_close(mine, theirs, 1e-12)


@pytest.mark.parametrize("block", [ConvReLUPool, WinogradReLUPool])
def test_fused_blocks_in_float32_keep_its_precision(block):
    """Against the same weights in float64, at the size of the CNN's second convolution."""
    x = np.random.default_rng(0).standard_normal((8, 16, 16, 32))
    out32 = block(32, 64, rng=1).forward(x.astype(np.float32))
    assert out32.dtype == np.float32
    assert_close(out32, block(32, 64, rng=1, dtype=np.float64).forward(x), 2e-5)


LAYERS = {
    "Conv2D kernel 1": lambda: Conv2D(
        4, 6, 1, 1, 0, rng=2, dtype=np.float64
    ),  # keeps its im2col matrix
    "Conv2D kernel 3": lambda: Conv2D(4, 6, rng=2, dtype=np.float64),
    "Conv2D stride 2": lambda: Conv2D(4, 6, 3, 2, 1, rng=2, dtype=np.float64),
    "Conv2D padding 0": lambda: Conv2D(4, 6, 3, 1, 0, rng=2, dtype=np.float64),
    "ConvReLUPool": lambda: ConvReLUPool(4, 6, rng=2, dtype=np.float64),
    "ConvReLUPool kernel 1": lambda: ConvReLUPool(4, 6, 1, 1, 0, rng=2, dtype=np.float64),
    "WinogradReLUPool": lambda: WinogradReLUPool(4, 6, rng=2, dtype=np.float64),
    "MaxPool2D": lambda: MaxPool2D(3, 2),
    "ReLU": ReLU,
    "Flatten": Flatten,
    "Dense": lambda: Dense(4, 6, rng=2, dtype=np.float64),
}
all_layers = pytest.mark.parametrize("name", LAYERS)


def batch_for(name, n, rng, size=8):
    return rng.standard_normal((n, 4) if name == "Dense" else (n, size, size, 4))


@all_layers
@pytest.mark.parametrize(
    "cache", [1, 20_000, 2**40], ids=["one image", "some images", "all images"]
)
def test_pieces_do_not_change_the_result(name, cache, monkeypatch):
    rng = np.random.default_rng(3)
    x = batch_for(name, 11, rng)
    R = rng.standard_normal(LAYERS[name]().forward(x).shape)
    wanted = run_layer(LAYERS[name](), x, R)
    monkeypatch.setattr(common, "CACHE_BYTES", cache)
    for mine, theirs in zip(run_layer(LAYERS[name](), x, R), wanted, strict=True):
        assert_close(mine, theirs, 1e-12)


def test_pieces():
    """Slices that cover the batch once, in order, of at least one image."""
    assert common.batch_chunks(5, common.CACHE_BYTES // 2) == [
        slice(0, 2),
        slice(2, 4),
        slice(4, 5),
    ]
    assert common.batch_chunks(2, 2 * common.CACHE_BYTES) == [slice(0, 1), slice(1, 2)]
    assert common.batch_chunks(0, 100) == []


@all_layers
def test_batch_and_image_size_may_change_between_calls(name):
    """32, 16, 100 in evaluation mode, 32, then other images: each time what a fresh layer gives."""
    rng, layer = np.random.default_rng(4), LAYERS[name]()
    calls = (
        (32, 8, True),
        (16, 8, True),
        (100, 8, False),
        (32, 8, True),
        (5, 12, True),
        (6, 8, True),
    )
    for n, size, training in calls:
        x = batch_for(name, n, rng, size)
        fresh = LAYERS[name]()
        layer.training = fresh.training = training
        wanted = fresh.forward(x)
        np.testing.assert_array_equal(layer.forward(x), wanted)
        if training:
            R = rng.standard_normal(wanted.shape)
            for mine, theirs in zip(run_layer(layer, x, R), run_layer(fresh, x, R), strict=True):
                np.testing.assert_array_equal(mine, theirs)


@all_layers
def test_the_type_may_change_between_calls(name):
    """Scratch arrays of float32 are of no use to float64."""
    x, layer = batch_for(name, 3, np.random.default_rng(5)), LAYERS[name]()
    wanted = run_layer(LAYERS[name](), x, LAYERS[name]().forward(x))
    run_layer(layer, x.astype(np.float32), layer.forward(x.astype(np.float32)).copy())
    for mine, theirs in zip(run_layer(layer, x, wanted[0]), wanted, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@all_layers
def test_strided_arrays_are_taken(name):
    """Views such as a transposed NCHW array give what their contiguous copies give."""
    rng = np.random.default_rng(6)
    x = batch_for(name, 6, rng)
    R = rng.standard_normal(LAYERS[name]().forward(x).shape)
    strided = [np.ascontiguousarray(np.moveaxis(a, -1, 0)) for a in (x, R)]
    strided = [np.moveaxis(a, 0, -1) for a in strided]
    assert not strided[0].flags.c_contiguous
    for mine, theirs in zip(
        run_layer(LAYERS[name](), *strided), run_layer(LAYERS[name](), x, R), strict=True
    ):
        assert_close(mine, theirs, 1e-12)


@all_layers
def test_inputs_are_left_as_they_are(name):
    rng, layer = np.random.default_rng(8), LAYERS[name]()
    x = batch_for(name, 3, rng)
    kept = x.copy()
    R = rng.standard_normal(layer.forward(x).shape)
    kept_R = R.copy()
    layer.backward(R)
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(R, kept_R)


@all_layers
def test_an_empty_batch_has_zero_gradients(name):
    """A rank's shard may be empty."""
    layer = LAYERS[name]()
    x = batch_for(name, 3, np.random.default_rng(0))
    out = layer.forward(x)
    layer.backward(out.copy())
    empty = layer.forward(x[:0])
    assert empty.shape == (0, *out.shape[1:])
    assert layer.backward(empty).shape == (0, *x.shape[1:])
    assert not any(g.any() for g in layer.grads())


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if "Conv" in name or name in ("Dense", "WinogradReLUPool")]
)
def test_without_requires_input_grad_the_weight_gradients_are_the_same(name):
    rng, layer, spared = np.random.default_rng(9), LAYERS[name](), LAYERS[name]()
    spared.requires_input_grad = False
    x = batch_for(name, 5, rng)
    R = rng.standard_normal(layer.forward(x).shape)
    spared.forward(x)
    layer.backward(R)
    assert spared.backward(R) is None
    for mine, theirs in zip(spared.grads(), layer.grads(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_layer_works_alone():
    """W, b, dW and db are ordinary attributes; backward() overwrites dW and db."""
    layer, x = Conv2D(2, 3, rng=1), np.ones((1, 4, 4, 2), np.float32)
    assert layer.W.shape == (3, 3, 2, 3)
    assert (
        [p.shape for p in layer.params()]
        == [g.shape for g in layer.grads()]
        == [(3, 3, 2, 3), (3,)]
    )
    layer.W = np.zeros_like(layer.W)
    layer.b = np.array([1, 2, 3], np.float32)
    out = layer.forward(x)
    assert (out == [1, 2, 3]).all()
    for _ in range(2):
        layer.backward(np.ones_like(out))
        assert (layer.db == 16).all()


def test_wrong_image_sizes_are_told():
    with pytest.raises(ValueError, match="smaller than the kernel"):
        Conv2D(1, 1, 5, padding=0).forward(np.zeros((1, 4, 4, 1), np.float32))
    with pytest.raises(ValueError, match="use ConvReLUPool"):
        WinogradReLUPool(1, 1).forward(np.zeros((1, 6, 8, 1), np.float32))


def test_he_normal_has_variance_two_over_fan_in_and_one_draw_for_both_types():
    W = common.he_normal((3, 3, 32, 64), 5, np.float64)
    assert W.var() == pytest.approx(2 / (9 * 32), rel=0.05)
    assert abs(W.mean()) < 0.002
    np.testing.assert_array_equal(common.he_normal((3, 3, 32, 64), 5), W.astype(np.float32))


def test_softmax_does_not_overflow():
    logits = np.array([[1e4, 0, -1e4], [0, 0, 0]], np.float32)
    loss, dlogits = softmax_cross_entropy(logits, np.array([0, 1], np.uint8))
    assert loss == pytest.approx(math.log(3))
    assert_close(dlogits, [[0, 0, 0], [1 / 3, -2 / 3, 1 / 3]])


def test_count_correct():
    logits = np.array([[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]] * 4, float)
    assert count_correct(logits, np.array([0, 4, 5, 0], np.uint8)) == (2, 3)


# --------------------------------------------------------------------------------------------------
# Models and optimizers
# --------------------------------------------------------------------------------------------------


def to_torch(torch, model):
    """The CNN as a PyTorch module with the same weights."""
    nn, (conv1, conv2, _, dense1, _, dense2) = torch.nn, model.layers
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4096, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    ).to(getattr(torch, model.params.dtype.name))
    weights = (
        conv1.W.transpose(3, 2, 0, 1),
        conv1.b,
        conv2.W.transpose(3, 2, 0, 1),
        conv2.b,
        # rows in the order (H, W, C) here, columns in the order (C, H, W) there
        dense1.W.reshape(8, 8, 64, 256).transpose(3, 2, 0, 1).reshape(256, 4096),
        dense1.b,
        dense2.W.T,
        dense2.b,
    )
    with torch.no_grad():
        for theirs, mine in zip(net.parameters(), weights, strict=True):
            theirs.copy_(torch.tensor(mine.copy()))
    return net


@pytest.fixture(scope="module")
def images():
    return make_synthetic(1600, seed=3, n_test=1)[:2]


@pytest.mark.parametrize(("name", "weight_decay"), [("sgd", 0), ("sgd", 0.01), ("adam", 0.01)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fifty_steps_are_pytorchs(torch, images, dtype, name, weight_decay):
    """The same weights and batches give the same losses and, step by step, the same weights.

    In float64 both trainings run freely, and agree to 1e-10 at the end. In float32 rounding flips a
    ReLU now and then, and training amplifies that, in PyTorch too; so each step starts from the
    same weights.
    """
    size, loss_tolerance, tolerance = (32, 1e-5, 1e-4) if dtype is np.float32 else (8, 1e-10, 1e-10)
    model = make_cnn(0, dtype)
    net = to_torch(torch, model)
    args = make_parser("test", "").parse_args(
        ["--optimizer", name, "--weight-decay", str(weight_decay)]
    )
    optimizer = make_optimizer(model, args)
    if name == "adam":
        theirs = torch.optim.Adam(net.parameters(), args.lr, weight_decay=weight_decay)
    else:
        theirs = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=weight_decay)
    order = epoch_order(len(images[1]), 0, 1)
    for step in range(50):
        x, labels = load_batch(*images, order[step * size : (step + 1) * size], dtype)
        loss, dlogits = softmax_cross_entropy(model.forward(x), labels)
        model.backward(dlogits)
        optimizer.step(size)
        their_logits = net(torch.tensor(x.transpose(0, 3, 1, 2).copy()))
        their_loss = torch.nn.functional.cross_entropy(
            their_logits, torch.tensor(labels.astype(np.int64))
        )
        theirs.zero_grad()
        their_loss.backward()
        theirs.step()
        assert loss / size == pytest.approx(their_loss.item(), rel=loss_tolerance), f"step {step}"
        if dtype is np.float32 or step == 49:
            wanted = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
            mine = torch.nn.utils.parameters_to_vector(to_torch(torch, model).parameters()).detach()
            differ = int((abs(mine - wanted) > tolerance).sum())
            # Adam's first steps are ±lr whatever the gradient's size: one that rounds to the other
            # side of 0 is far off
            assert differ <= (1000 if name == "adam" and dtype is np.float32 else 0), f"step {step}"
        if dtype is np.float32:
            torch.nn.utils.vector_to_parameters(mine, net.parameters())


def resnet18_to_torch(torch, model):
    """torchvision's ResNet-18 with the CIFAR stem, in float64, with the weights and statistics of
    ours.
    """
    net = common.import_torchvision().models.resnet18(num_classes=10)
    net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    stem, norm, _, *blocks, _, dense = model.layers
    pairs = [(net.conv1, stem), (net.bn1, norm), (net.fc, dense)]
    for theirs, ours in zip(
        (b for i in (1, 2, 3, 4) for b in getattr(net, f"layer{i}")), blocks, strict=True
    ):
        conv1, bn1, _, conv2, bn2 = ours.branch
        pairs += [
            (theirs.conv1, conv1),
            (theirs.bn1, bn1),
            (theirs.conv2, conv2),
            (theirs.bn2, bn2),
        ]
        pairs += zip(theirs.downsample or (), ours.shortcut, strict=True)
    for theirs, ours in pairs:
        if isinstance(ours, BatchNorm2D):
            arrays = {
                "weight": ours.gamma,
                "bias": ours.beta,
                "running_mean": ours.running_mean,
                "running_var": ours.running_var,
            }
        else:
            arrays = {"weight": ours.W.transpose(3, 2, 0, 1) if ours.W.ndim == 4 else ours.W.T}
            if theirs.bias is not None:
                arrays["bias"] = ours.b
        for name, array in arrays.items():
            getattr(theirs, name).data = torch.tensor(array.copy())
    assert len(pairs) == sum(hasattr(m, "weight") for m in net.modules())
    return net


@pytest.mark.slow
def test_resnet18_trains_as_pytorchs(torch, images):
    """Five steps in float64 from the same weights: losses, every parameter, running statistics, and
    an evaluation.
    """
    model = make_resnet18(0, np.float64)
    assert model.params.size == 11_173_962
    net, optimizer = resnet18_to_torch(torch, model), SGD(model, lr=0.01, momentum=0.9)
    theirs = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    for step in range(5):
        x, labels = load_batch(*images, np.arange(6 * step, 6 * step + 6), np.float64)
        loss, dlogits = softmax_cross_entropy(model.forward(x), labels)
        model.backward(dlogits)
        optimizer.step(6)
        their_loss = torch.nn.functional.cross_entropy(
            net(torch.tensor(x.transpose(0, 3, 1, 2).copy())), torch.tensor(labels.astype(np.int64))
        )
        theirs.zero_grad()
        their_loss.backward()
        theirs.step()
        assert loss / 6 == pytest.approx(their_loss.item(), rel=1e-8)
    for (name, wanted), ours in zip(
        net.state_dict().items(), resnet18_to_torch(torch, model).state_dict().values(), strict=True
    ):
        if not name.endswith("num_batches_tracked"):
            assert_close(ours, wanted, 1e-8)
    model.train(False)
    net.eval()
    assert_close(model.forward(x), net(torch.tensor(x.transpose(0, 3, 1, 2).copy())).detach(), 1e-8)


@pytest.mark.slow
def test_fifty_free_steps_in_float32_with_im2col_are_pytorchs(torch, images):
    """Both convolutions by im2col, which adds in the order of PyTorch's, and a learning rate at
    which training is calm: losses within 1e-4 (relative) and parameters within 1e-4 after 50 steps
    that start from each side's own weights.
    """
    model = make_cnn(3, conv2=ConvReLUPool)
    net, optimizer = to_torch(torch, model), SGD(model, lr=0.001, momentum=0.9)
    theirs = torch.optim.SGD(net.parameters(), 0.001, momentum=0.9)
    order = np.concatenate([epoch_order(len(images[1]), 0, epoch) for epoch in (1, 2, 3, 4)])
    for step in range(50):
        x, labels = load_batch(*images, order[step * 32 : (step + 1) * 32])
        loss, dlogits = softmax_cross_entropy(model.forward(x), labels)
        model.backward(dlogits)
        optimizer.step(32)
        theirs.zero_grad()
        logits = net(torch.tensor(x.transpose(0, 3, 1, 2).copy()))
        their_loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels.astype(np.int64))
        )
        their_loss.backward()
        theirs.step()
        assert loss / 32 == pytest.approx(their_loss.item(), rel=1e-4), f"step {step}"
    mine = torch.nn.utils.parameters_to_vector(to_torch(torch, model).parameters()).detach()
    wanted = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    assert abs(mine - wanted).max() < 1e-4


@pytest.mark.parametrize("make", [make_cnn, pytest.param(make_resnet18, marks=pytest.mark.slow)])
def test_the_first_loss_is_that_of_guessing(make):
    x_train, y_train, *_ = make_synthetic(64, n_test=1)
    x, labels = load_batch(x_train, y_train, slice(64))
    loss, _ = softmax_cross_entropy(make().forward(x), labels)
    assert loss / 64 == pytest.approx(math.log(10), abs=0.1)


def test_the_cnn_has_1070794_parameters():
    model = make_cnn()
    assert model.params.size == model.grads.size == 1_070_794
    assert model.params.dtype == np.float32
    assert model.forward(np.zeros((2, 32, 32, 3), np.float32)).shape == (2, 10)
    np.testing.assert_array_equal(model.params, make_cnn(42).params)
    np.testing.assert_array_equal(model.params, make_cnn(42, np.float64).params.astype(np.float32))
    assert (model.params != make_cnn(43).params).any()


def test_parameters_and_gradients_are_views_of_the_flat_buffers():
    model, start = make_cnn(), 0
    for layer in model.layers:
        for name in layer.param_names:
            for buffer, array in (
                (model.params, getattr(layer, name)),
                (model.grads, getattr(layer, "d" + name)),
            ):
                assert np.shares_memory(array, buffer)
                assert array.ctypes.data == buffer[start:].ctypes.data
            start += array.size
    assert start == 1_070_794
    model.params.fill(3)
    assert (model.layers[0].W == 3).all()


def test_gradients_are_reported_in_backward_order_when_they_are_final():
    model, rng = make_cnn(), np.random.default_rng(0)
    logits = model.forward(rng.standard_normal((4, 32, 32, 3)).astype(np.float32))
    _, dlogits = softmax_cross_entropy(logits, np.arange(4))
    model.grads.fill(np.nan)
    reported = []
    model.backward(dlogits, lambda part: reported.append((part, model.grads[part].copy())))
    end = len(model.grads)
    for part, grads in reported:  # from the buffer's end to its start, without a gap
        assert part.stop == end
        np.testing.assert_array_equal(grads, model.grads[part])
        end = part.start
    assert end == 0
    assert np.isfinite(model.grads).all()
    assert [part.stop - part.start for part, _ in reported] == [2570, 1_048_832, 18_496, 896]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_are_sums_over_shards(dtype):
    """Summed over shards of 5, 0 and 3 images they are the gradient of the batch of 8: the idea of
    every MPI script.
    """
    rng, model = np.random.default_rng(2), make_cnn(1, dtype)
    x, labels = (
        rng.standard_normal((8, 32, 32, 3)).astype(dtype),
        rng.integers(0, 10, 8).astype(np.uint8),
    )

    def gradient(part):
        loss, dlogits = softmax_cross_entropy(model.forward(x[part]), labels[part])
        model.backward(dlogits)
        return loss, model.grads.copy()

    loss, wanted = gradient(slice(None))
    shards = [gradient(part) for part in (slice(0, 5), slice(5, 5), slice(5, 8))]
    tolerance = 1e-5 if dtype is np.float32 else 1e-12
    assert sum(shard[0] for shard in shards) == pytest.approx(loss, rel=tolerance)
    assert_close(sum(shard[1] for shard in shards), wanted, tolerance)


def test_evaluate_is_the_mean_over_all_images(images):
    """Over batches of 100 and a last one of 30, in evaluation mode; the model is left in training
    mode.
    """
    modes = []

    class Conv(ConvReLUPool):
        def forward(self, x):
            modes.append((len(x), self.training))
            return super().forward(x)

    model, (x, labels) = make_cnn(conv1=Conv), (a[:230] for a in images)
    started = time.perf_counter()
    loss, top1, top5, loading = evaluate(model, x, labels)
    seconds = time.perf_counter() - started
    assert modes == [(100, False), (100, False), (30, False)]
    assert model.layers[0].training
    logits = make_cnn().forward(load_batch(x, labels, slice(None))[0])
    assert loss == pytest.approx(softmax_cross_entropy(logits, labels)[0] / 230, rel=1e-5)
    assert (top1, top5) == tuple(n / 230 for n in count_correct(logits, labels))
    assert 0 < loading < seconds


def small_resnet(seed=0):
    rng = np.random.default_rng(seed)
    model = Model(
        [
            Conv2D(3, 4, rng=rng, dtype=np.float64),
            BasicBlock(4, 4, conv=Conv2D, rng=rng, dtype=np.float64),
            MaxPool2D(3),
            Flatten(),
            Dense(16, 5, rng=rng, dtype=np.float64),
        ]
    )
    for leaf in model.layers[1].leaves():
        if isinstance(leaf, BatchNorm2D):
            leaf.gamma[...], leaf.beta[...] = np.linspace(0.5, 1.5, 4), np.linspace(-0.2, 0.3, 4)
    return model


def test_a_composite_layer_with_state_has_a_place_in_a_model():
    """The protocol leaves room for BatchNorm and residual blocks: buffers, gradients, modes."""
    rng, model = np.random.default_rng(1), small_resnet()
    x, labels = rng.standard_normal((3, 6, 6, 3)), np.array([0, 1, 4])
    block = model.layers[1]
    assert [p.shape for p in block.params()] == 2 * [(3, 3, 4, 4), (4,), (4,)]
    assert all(np.shares_memory(p, model.params) for p in block.params())
    assert all(np.shares_memory(g, model.grads) for g in block.grads())

    reported = []
    model.backward(softmax_cross_entropy(model.forward(x), labels)[1], reported.append)
    assert reported == [s for s in reversed(model.slices) if s.stop > s.start]
    analytic = model.grads.copy()
    assert_close(
        analytic,
        numerical_gradient(
            lambda: softmax_cross_entropy(model.forward(x), labels)[0], model.params
        ),
    )

    model.train(False)
    alone, both = model.forward(x[:1]).copy(), model.forward(x)[:1]
    assert_close(alone, both, 1e-12)  # the running statistics do not depend on the batch


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_training_goes_on_exactly_from_its_arrays(name):
    """state_dict() and load_state_dict() carry parameters, statistics, state and the step count."""
    rng = np.random.default_rng(2)
    batches = [(rng.standard_normal((4, 6, 6, 3)), rng.integers(0, 5, 4)) for _ in range(6)]
    args = make_parser("test", "").parse_args(["--optimizer", name])

    def start():
        model = small_resnet()
        return model, make_optimizer(model, args)

    def steps(model, optimizer, batches):
        for x, labels in batches:
            model.backward(softmax_cross_entropy(model.forward(x), labels)[1])
            optimizer.step(len(labels))
        arrays = {**model.state_dict(), **optimizer.state_dict()}
        return {name: array.copy() for name, array in arrays.items()}

    whole = start()
    half = steps(*whole, batches[:3])
    wanted = steps(*whole, batches[3:])
    assert set(half) >= {"params", "state0", "state1", "optimizer_steps"}
    resumed = start()
    for part in resumed:
        part.load_state_dict(half)
    assert resumed[1].steps == 3
    for key, array in steps(*resumed, batches[3:]).items():
        np.testing.assert_array_equal(array, wanted[key])


OPTIMIZERS = {
    "SGD": functools.partial(SGD, lr=0.1, weight_decay=0.01),
    "Adam": functools.partial(Adam, lr=0.1, weight_decay=0.01),
}


def optimized(make, count=1, steps=3, shards=None):
    rng = np.random.default_rng(0)
    model = Model([Dense(50, 21, rng=1, dtype=np.float64)])
    optimizer = make(model)
    for _ in range(steps):
        model.grads[...] = count * rng.standard_normal(model.grads.shape)
        optimizer.step(count, shards=shards)
    return model.params


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_step_divides_by_the_count(make):
    np.testing.assert_allclose(optimized(make, count=7), optimized(make), rtol=1e-12)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("piece", [1, 100, 1071, 10**6])
def test_an_optimizers_pieces_do_not_change_its_result(make, piece, monkeypatch):
    wanted = optimized(make).copy()
    monkeypatch.setattr(common.Optimizer, "CHUNK", piece)
    np.testing.assert_array_equal(optimized(make), wanted)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_updates_the_parts_that_it_is_given(make, monkeypatch):
    monkeypatch.setattr(common.Optimizer, "CHUNK", 100)
    wanted, untouched = optimized(make).copy(), optimized(make, steps=0).copy()
    parts = [slice(0, 0), slice(7, 350), slice(900, 1071)]
    for part in parts:
        untouched[part] = wanted[part]
    np.testing.assert_array_equal(optimized(make, shards=parts), untouched)


def test_sgd_is_its_formula():
    """v = momentum v + g / count + decay w; w -= lr v."""
    model = Model([Dense(1, 1, rng=0, dtype=np.float64)])
    optimizer, w, v = SGD(model, 0.5, 0.9, 0.1), model.params.copy(), 0
    for step in (1, 2):
        model.grads[...] = [2 * step, -4]
        optimizer.step(2)
        v = 0.9 * v + np.array([step, -2]) + 0.1 * w
        w = w - 0.5 * v
        np.testing.assert_allclose(model.params, w, rtol=1e-14)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def binary_files(tmp_path_factory):
    """A folder with the six files of the binary layout in full size: random pixels, labels 0 to
    9.
    """
    folder, rng = tmp_path_factory.mktemp("binary"), np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = np.frombuffer(rng.bytes(30_730_000), np.uint8).reshape(10_000, 3073).copy()
        records[:, 0] %= 10
        records.tofile(folder / name)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def python_files(binary_files, tmp_path_factory):
    """The same images in the Python layout, with the MD5 checksum of each file."""
    root = tmp_path_factory.mktemp("python")
    folder, checksums = root / "cifar-10-batches-py", {}
    folder.mkdir()
    for path in sorted(binary_files.iterdir()):
        records = np.fromfile(path, np.uint8).reshape(-1, 3073)
        entry = pickle.dumps(
            {"data": records[:, 1:].copy(), "labels": records[:, 0].tolist()}, protocol=4
        )
        (folder / path.stem).write_bytes(entry)
        checksums[path.stem] = hashlib.md5(entry).hexdigest()
    entry = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(entry)
    checksums["batches.meta"] = hashlib.md5(entry).hexdigest()
    yield folder, checksums
    shutil.rmtree(root)


@pytest.fixture
def published(monkeypatch, torchvision, python_files):
    """Torchvision's CIFAR10 believes that the checksums of python_files are the published ones."""
    cifar10, checksums = torchvision.datasets.CIFAR10, python_files[1]
    monkeypatch.setattr(cifar10, "train_list", [[n, checksums[n]] for n, _ in cifar10.train_list])
    monkeypatch.setattr(cifar10, "test_list", [[n, checksums[n]] for n, _ in cifar10.test_list])
    monkeypatch.setattr(cifar10, "meta", {**cifar10.meta, "md5": checksums["batches.meta"]})
    return cifar10


@pytest.fixture
def data_dir(tmp_path):
    """An empty folder; emptied after the test, because caches are large."""
    (tmp_path / "data").mkdir()
    yield tmp_path / "data"
    shutil.rmtree(tmp_path)


def link(files, folder):
    """A folder with symbolic links to all files."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in files.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def caches(root):
    return sorted(path.name for path in root.iterdir() if path.name.startswith((".", "npy-")))


def assert_mapped(data):
    for array in data[:4]:
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


def record(files, name, number):
    """Image (32, 32, 3) and label of one record, read in the slowest way."""
    with open(files / name, "rb") as file:
        file.seek(3073 * number)
        label, planes = file.read(1)[0], file.read(3072)
    image = [
        [[planes[1024 * c + 32 * y + x] for c in range(3)] for x in range(32)] for y in range(32)
    ]
    return np.array(image, np.uint8), label


def test_binary_layout_cache_and_fingerprint(binary_files, data_dir):
    link(binary_files, data_dir / "cifar-10-batches-bin")
    data = load_cifar10(data_dir)
    assert [(a.shape, a.dtype) for a in data[:4]] == [
        ((50_000, 32, 32, 3), np.uint8),
        ((50_000,), np.uint8),
        ((10_000, 32, 32, 3), np.uint8),
        ((10_000,), np.uint8),
    ]
    for i in (0, 1, 9_999, 10_000, 34_567, 49_999):
        image, label = record(binary_files, f"data_batch_{i // 10_000 + 1}.bin", i % 10_000)
        np.testing.assert_array_equal(data.x_train[i], image)
        assert data.y_train[i] == label
    for i in (0, 5_000, 9_999):
        image, label = record(binary_files, "test_batch.bin", i)
        np.testing.assert_array_equal(data.x_test[i], image)
        assert data.y_test[i] == label
    assert data.name == "cifar10"
    assert data.fingerprint == hashlib.sha256(b"".join(map(bytes, data[:4]))).hexdigest()

    again = load_cifar10(data_dir, "cifar10")
    assert again.fingerprint == data.fingerprint
    for mine, first in zip(again[:4], data[:4], strict=True):
        np.testing.assert_array_equal(mine, first)
    for loaded in (data, again):
        assert_mapped(loaded)
        assert Path(loaded.x_train.base.filename).parent.parent == data_dir
    assert len(caches(data_dir)) == 1


def test_data_dir_may_be_the_folder_itself_and_comes_from_the_environment(
    binary_files, data_dir, monkeypatch
):
    link(binary_files, data_dir)
    monkeypatch.setenv("CIFAR10_DIR", str(data_dir))
    image, label = record(binary_files, "data_batch_1.bin", 77)
    data = load_cifar10(dataset="cifar10", subset=100)
    np.testing.assert_array_equal(data.x_train[77], image)
    assert data.y_train[77] == label


def test_a_changed_file_is_read_anew(binary_files, data_dir):
    folder = link(binary_files, data_dir / "cifar-10-batches-bin")
    before = load_cifar10(data_dir)
    changed = folder / "data_batch_2.bin"
    contents = bytearray(changed.read_bytes())
    contents[0], contents[1] = (contents[0] + 1) % 10, contents[1] ^ 255
    changed.unlink()
    changed.write_bytes(contents)
    after = load_cifar10(data_dir)
    assert after.fingerprint != before.fingerprint
    assert after.y_train[10_000] == (before.y_train[10_000] + 1) % 10
    assert after.x_train[10_000, 0, 0, 0] == before.x_train[10_000, 0, 0, 0] ^ 255
    np.testing.assert_array_equal(after.x_test, before.x_test)


def test_an_unusable_cache_in_data_dir_falls_back_to_the_users(binary_files, data_dir, tmp_path):
    """A file stands where the folder of .npy files would go, which stops root too."""
    link(binary_files, data_dir / "cifar-10-batches-bin")
    first = load_cifar10(data_dir)
    key = Path(first.x_train.base.filename).parent
    shutil.rmtree(key)
    key.write_text("in the way")
    for _ in range(2):
        data = load_cifar10(data_dir)
        assert data.fingerprint == first.fingerprint
        assert_mapped(data)
        assert (
            Path(data.x_test.base.filename).parent == tmp_path / "xdg" / "parallel-cnn" / key.name
        )


def test_without_any_cache_the_arrays_are_returned(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = load_cifar10(tmp_path / "file" / "data", "synthetic", 20)
    np.testing.assert_array_equal(data.x_train, make_synthetic(20)[0])
    assert data.fingerprint == hashlib.sha256(b"".join(map(bytes, make_synthetic(20)))).hexdigest()


@pytest.mark.parametrize(
    ("name", "damage"),
    [("x_train.npy", damage) for damage in ("missing", "empty", "half", "garbage", "zip", "pickle")]
    + [("meta.json", damage) for damage in ("missing", "half", "list")],
)
def test_a_damaged_cache_is_not_trusted(tmp_path, name, damage):
    wanted = load_cifar10(tmp_path, "synthetic", 20)
    expected = [a.copy() for a in wanted[:4]]
    path = tmp_path / caches(tmp_path)[0] / name
    contents, evil = path.read_bytes(), tmp_path / "evil"
    path.unlink()
    replacement = {
        "empty": b"",
        "half": contents[: len(contents) // 2],
        "garbage": b"\xffgarbage" * 99,
        "zip": b"PK\x03\x04" + bytes(99),
        "list": b"[1]",
        "pickle": malicious_pickle(evil),
    }
    if damage in replacement:
        path.write_bytes(replacement[damage])
    for _ in range(2):
        data = load_cifar10(tmp_path, "synthetic", 20)
        assert data.fingerprint == wanted.fingerprint
        for mine, theirs in zip(data[:4], expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert len(caches(tmp_path)) == 1
    assert not (tmp_path / "xdg").exists()  # the damaged one has been replaced
    assert not evil.exists()


def test_two_processes_may_build_the_cache_at_once(binary_files, data_dir):
    link(binary_files, data_dir / "cifar-10-batches-bin")
    code = "import sys, common; print(common.load_cifar10(sys.argv[1], 'cifar10').fingerprint)"
    command = [sys.executable, "-c", code, str(data_dir)]
    both = [subprocess.Popen(command, cwd=REPO, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    (first, errors1), (second, errors2) = (process.communicate(timeout=60) for process in both)
    assert (errors1, errors2, [process.returncode for process in both]) == ("", "", [0, 0])
    assert first == second == load_cifar10(data_dir).fingerprint + "\n"
    assert len(caches(data_dir)) == 1
    assert not (data_dir.parent / "xdg").exists()


@pytest.mark.parametrize(
    "inside", ["cifar-10-batches-bin", "."], ids=["data_dir above", "data_dir itself"]
)
@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("data_batch_3.bin", lambda contents: contents[:-1], "30729999 bytes"),
        ("data_batch_5.bin", lambda contents: b"", "0 bytes"),
        ("test_batch.bin", lambda contents: contents + b"\0", "30730001 bytes"),
        ("data_batch_1.bin", None, "missing"),
        ("data_batch_4.bin", None, "missing"),
        ("test_batch.bin", None, "missing"),
        (
            "data_batch_2.bin",
            lambda contents: contents[: 3073 * 5] + b"\x0a" + contents[3073 * 5 + 1 :],
            "label 10",
        ),
    ],
    ids=["truncated", "empty", "oversized", "first missing", "missing", "test missing", "label 10"],
)
def test_damaged_binary_files_are_named(
    binary_files, data_dir, inside, dataset, name, damage, message
):
    path = link(binary_files, data_dir / inside) / name
    contents = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(contents))
    with pytest.raises(InputError, match=message) as raised:
        load_cifar10(data_dir, dataset)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert caches(data_dir) == []


def test_python_layout_gives_the_same_arrays_as_the_binary_one(
    published, binary_files, python_files, data_dir
):
    link(python_files[0], data_dir / "cifar-10-batches-py")
    data = load_cifar10(data_dir, "cifar10")
    for i in (0, 12_345, 49_999):
        image, label = record(binary_files, f"data_batch_{i // 10_000 + 1}.bin", i % 10_000)
        np.testing.assert_array_equal(data.x_train[i], image)
        assert data.y_train[i] == label
    assert_mapped(data)
    digest = hashlib.sha256()
    for names in ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]):
        records = np.concatenate(
            [np.fromfile(binary_files / n, np.uint8).reshape(-1, 3073) for n in names]
        )
        digest.update(
            np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        )
        digest.update(records[:, 0].copy())
    assert data.fingerprint == digest.hexdigest()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def malicious_pickle(path):
    return pickle.dumps(Payload(path))


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_a_pickle_with_a_wrong_checksum_is_never_opened(
    published, python_files, data_dir, name, dataset
):
    path = link(python_files[0], data_dir / "cifar-10-batches-py") / name
    path.unlink()
    path.write_bytes(malicious_pickle(data_dir / "executed"))
    with pytest.raises(InputError, match="checksum"):
        load_cifar10(data_dir, dataset)
    assert not (data_dir / "executed").exists()
    pickle.loads(path.read_bytes())
    assert (data_dir / "executed").exists()  # it would have worked


def test_the_python_layout_without_torch_is_a_one_line_error(python_files, data_dir, monkeypatch):
    link(python_files[0], data_dir / "cifar-10-batches-py")
    for name in ("torch", "torchvision"):
        monkeypatch.setitem(
            sys.modules, name, None
        )  # what Python does for a module that is not installed
    with pytest.raises(InputError, match="torchvision"):
        load_cifar10(data_dir, "cifar10")


# -- downloads


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        """A client that hangs up early is no news."""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class HangingHandler(QuietHandler):
    def do_GET(self):
        time.sleep(30)


@pytest.fixture
def serve(monkeypatch):
    """serve(folder): CIFAR10_URL is the .tar in that folder, on this machine."""
    servers = []

    def start(folder, handler=QuietHandler):
        server = QuietServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar"
        monkeypatch.setattr(common, "CIFAR10_URL", url)
        return url

    yield start
    for server in servers:
        server.shutdown()
        server.socket.close()


@pytest.fixture
def tarball(published, python_files, tmp_path, serve, monkeypatch):
    """The Python layout as a tar file on a server of this machine."""
    path = tmp_path / "server" / "cifar-10-python.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        tar.add(python_files[0], python_files[0].name)
    monkeypatch.setattr(published, "filename", path.name)
    monkeypatch.setattr(published, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(published, "url", serve(path.parent))
    return path


def test_download(tarball, binary_files, data_dir):
    """Missing data are downloaded, checked and left as cifar-10-batches-py; nothing else is
    left.
    """
    data = load_cifar10(data_dir)
    image, label = record(binary_files, "data_batch_5.bin", 9_999)
    np.testing.assert_array_equal(data.x_train[-1], image)
    assert (data.y_train[-1], data.name) == (label, "cifar10")
    assert sorted(os.listdir(data_dir)) == ["cifar-10-batches-py", *caches(data_dir)]
    assert len(caches(data_dir)) == 1


def test_a_broken_download_leaves_nothing(tarball, data_dir):
    with open(tarball, "r+b") as file:
        file.truncate(10**6)
    with pytest.raises(InputError, match="it broke off"):
        load_cifar10(data_dir, "cifar10")
    assert os.listdir(data_dir) == []


def test_a_download_without_torch_is_given_up_in_one_line(tmp_path, serve, monkeypatch, capsys):
    """Somebody with NumPy alone, and with a network."""
    (tmp_path / "cifar-10-python.tar").write_bytes(b"")
    serve(tmp_path)
    for name in ("torch", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="torchvision"):
        load_cifar10(tmp_path / "data", "cifar10")
    monkeypatch.chdir(tmp_path)  # without a folder that somebody has named
    assert load_cifar10(None, "auto", 10).name == "synthetic"
    assert "SYNTHETIC DATA" in capsys.readouterr().err


def test_a_download_that_hangs_half_way_is_given_up(torchvision, tmp_path, serve, monkeypatch):
    """The server answers HEAD but not GET; the sockets' default timeout is put back.

    The time for GET alone is shortened, because the answer to HEAD may take a while on a busy
    machine.
    """
    asked, set_timeout = [], socket.setdefaulttimeout

    def set_short_timeout(seconds):
        asked.append(seconds)
        set_timeout(seconds and 0.5)

    url = serve(tmp_path, HangingHandler)
    (tmp_path / "cifar-10-python.tar").write_bytes(b"x")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
    monkeypatch.setattr(common, "DOWNLOAD_TIMEOUT", 60)
    monkeypatch.setattr(socket, "setdefaulttimeout", set_short_timeout)
    with pytest.raises(InputError, match="it broke off: timed out"):
        load_cifar10(tmp_path / "data", "cifar10")
    assert asked == [60, None]
    assert socket.getdefaulttimeout() is None


def test_a_download_that_hangs_is_given_up(tmp_path, monkeypatch):
    """A proxy that accepts and never answers costs the time-out, which is below ten seconds,
    once.
    """
    assert common.DOWNLOAD_TIMEOUT < 9
    monkeypatch.setattr(common, "DOWNLOAD_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        use_proxy(monkeypatch, server.getsockname()[1])
        with pytest.raises(
            InputError, match=r"cannot be downloaded \((no answer within 1 s|timed out)"
        ):
            load_cifar10(tmp_path / "data", "cifar10")
        server.setblocking(False)
        knocks = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                server.accept()
                knocks += 1
        assert knocks <= 1  # 0: the thread that knocks has been kept waiting for longer than that


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_proxy_that_talks_nonsense_is_given_up_in_one_line(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"220 this is no web server\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        use_proxy(monkeypatch, server.getsockname()[1])
        with pytest.raises(InputError, match="cannot be downloaded"):
            load_cifar10(tmp_path / "data", "cifar10")


def test_cifar10_without_files_and_network_is_an_error(tmp_path):
    started = time.monotonic()
    with pytest.raises(InputError, match="cannot be downloaded"):
        load_cifar10(tmp_path / "none", "cifar10")
    assert time.monotonic() - started < 10
    assert not (tmp_path / "none").exists()


def test_auto_without_files_and_network_is_synthetic_with_a_banner(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = load_cifar10(None, "auto", 50)
    stderr = capsys.readouterr().err
    assert data.name == "synthetic"
    assert "SYNTHETIC DATA: these are NOT the CIFAR-10 images" in stderr
    assert "No CIFAR-10 in data" in stderr
    np.testing.assert_array_equal(data.x_train, make_synthetic(50)[0])


def test_synthetic_is_asked_for_without_a_banner(tmp_path, capsys):
    data = load_cifar10(tmp_path, "synthetic", 50, seed=7)
    assert (data.name, capsys.readouterr().err) == ("synthetic", "")
    np.testing.assert_array_equal(data.x_train, make_synthetic(50, 7)[0])
    assert data.fingerprint != load_cifar10(tmp_path, "synthetic", 50, seed=8).fingerprint


def test_subset_is_a_prefix(binary_files, data_dir):
    """The first N training images and N // 5 test images, at least one; the fingerprint is the
    whole set's.
    """
    link(binary_files, data_dir / "cifar-10-batches-bin")
    whole = load_cifar10(data_dir)
    for subset, tests in ((1, 1), (4, 1), (5, 1), (9, 1), (10, 2), (1234, 246), (50_000, 10_000)):
        part = load_cifar10(data_dir, subset=subset)
        assert [len(a) for a in part[:4]] == [subset, subset, tests, tests]
        for mine, theirs in zip(part[:4], whole[:4], strict=True):
            np.testing.assert_array_equal(mine[:2000], theirs[: min(len(mine), 2000)])
        assert part.fingerprint == whole.fingerprint


@pytest.mark.parametrize("subset", [0, -1, 50_001])
@pytest.mark.parametrize("dataset", ["auto", "cifar10", "synthetic"])
def test_impossible_subsets(tmp_path, subset, dataset):
    with pytest.raises(InputError, match=f"--subset {subset}"):
        load_cifar10(tmp_path, dataset, subset)


# -- archives, and folders a level deeper


def test_the_archive_as_downloaded(binary_files, tmp_path):
    """In a folder, or as --data-dir itself; the second time from the cache."""
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(binary_files, "cifar-10-batches-bin")
    data = load_dataset(str(tmp_path / "data"))
    image, label = record(binary_files, "data_batch_3.bin", 77)
    np.testing.assert_array_equal(data.x_train[20_077], image)
    assert (data.y_train[20_077], data.name) == (label, "cifar10")
    archive_itself = load_dataset(str(archive), "cifar10")
    assert archive_itself.fingerprint == data.fingerprint
    assert len(caches(tmp_path / "data")) == 1


def test_an_archive_that_was_cut_short(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        (tmp_path / "data_batch_1").write_bytes(os.urandom(50_000))
        tar.add(tmp_path / "data_batch_1", "cifar-10-batches-py/data_batch_1")
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(InputError, match=r"cifar-10-python.tar.gz: cut short or damaged"):
        load_dataset(str(path))


def test_a_folder_one_level_deeper(binary_files, data_dir):
    link(binary_files, data_dir / "downloads" / "cifar-10-batches-bin")
    assert load_dataset(str(data_dir)).name == "cifar10"


# -- the synthetic set


def test_synthetic_is_a_function_of_the_seed():
    one, same, other = make_synthetic(300, 1), make_synthetic(300, 1), make_synthetic(300, 2)
    assert [a.shape for a in one] == [(300, 32, 32, 3), (300,), (60, 32, 32, 3), (60,)]
    assert all(a.dtype == np.uint8 for a in one)
    for a, b, c in zip(one, same, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


def test_a_smaller_synthetic_set_is_the_beginning_of_a_larger_one():
    large = make_synthetic(2500)
    for n in (1, 300, 1000, 1700):
        for small, whole in zip(make_synthetic(n), large, strict=True):
            np.testing.assert_array_equal(small, whole[: len(small)])
    assert len(make_synthetic(1)[2]) == 1
    assert len(make_synthetic(10, n_test=7)[2]) == 7


def test_synthetic_splits_differ_and_have_all_classes():
    x_train, y_train, x_test, y_test = make_synthetic(1000, n_test=1000)
    assert set(y_train) == set(y_test) == set(range(10))
    assert np.bincount(y_train).min() > 60
    assert not {image.tobytes() for image in x_train} & {image.tobytes() for image in x_test}


def test_no_two_random_streams_are_the_same(monkeypatch):
    """Weights, patterns, images and data orders of one seed are independent: NumPy takes [7], [7,
    0] for the same.
    """
    make_generator, states = np.random.default_rng, []

    def default_rng(seed):
        states.append(
            None
            if isinstance(seed, np.random.Generator)
            else str(make_generator(seed).bit_generator.state)
        )
        return make_generator(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    make_cnn(7)
    make_synthetic(1001, 7)
    for epoch in range(1, 4):
        epoch_order(10, 7, epoch)
    states = [state for state in states if state]
    assert len(states) >= 8
    assert len(set(states)) == len(states)


def train(data, epochs, seed=0):
    """Train the CNN as the scripts do; test accuracy after each epoch."""
    model, accuracies = make_cnn(seed), []
    optimizer = SGD(model, lr=0.01, momentum=0.9)
    for epoch in range(1, epochs + 1):
        order = epoch_order(len(data[1]), seed, epoch)
        for start in range(0, len(order), 32):
            x, labels = load_batch(data[0], data[1], order[start : start + 32])
            model.backward(softmax_cross_entropy(model.forward(x), labels)[1])
            optimizer.step(len(labels))
        accuracies.append(evaluate(model, data[2], data[3])[1])
    return accuracies


@pytest.mark.slow
def test_a_cnn_learns_the_synthetic_set_well_but_not_at_once():
    accuracies = train(make_synthetic(5000), 3)
    assert 0.15 < accuracies[0] < 0.6
    assert accuracies[2] > 0.5


# -- the real images


@pytest.mark.real_data
def test_real_images(real_data):
    data = load_cifar10(real_data, "cifar10")
    assert data.name == "cifar10"
    assert (data.x_train.shape, data.x_test.shape) == ((50_000, 32, 32, 3), (10_000, 32, 32, 3))
    assert np.bincount(data.y_train).tolist() == [5000] * 10
    assert np.bincount(data.y_test).tolist() == [1000] * 10
    for channel, mean, std in zip(range(3), common.MEAN, common.STD, strict=True):
        share = (
            np.bincount(data.x_train[..., channel].ravel(), minlength=256)
            / data.x_train[..., channel].size
        )
        level = np.arange(256) / 255
        assert share @ level == pytest.approx(mean, abs=0.01)
        assert math.sqrt(share @ level**2 - (share @ level) ** 2) == pytest.approx(std, abs=0.01)


@pytest.mark.real_data
@pytest.mark.slow
def test_a_cnn_learns_real_images(real_data):
    """Guessing gives 10 %."""
    assert train(load_cifar10(real_data, "cifar10", 2000)[:4], 3)[-1] > 0.25


# -- batches


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order = epoch_order(1000, 42, 3)
    assert sorted(order) == list(range(1000))
    np.random.seed(1)  # whatever state the process is in
    epoch_order(1000, 42, 2)
    np.testing.assert_array_equal(epoch_order(1000, 42, 3), order)
    assert (epoch_order(1000, 42, 4) != order).any()
    assert (epoch_order(1000, 43, 3) != order).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
@pytest.mark.parametrize(
    "index", [np.array([3, 1, 1, 40]), slice(5, 12), np.array([], int)], ids=str
)
def test_load_batch_normalises(images, dtype, tolerance, index):
    kept = [a.copy() for a in images]
    x, labels = load_batch(*images, index, dtype)
    wanted = (images[0][index].astype(np.float64) / 255 - common.MEAN) / common.STD
    assert x.dtype == dtype
    np.testing.assert_allclose(x, wanted, rtol=0, atol=tolerance * 3)  # |x| is at most 2.2
    np.testing.assert_array_equal(labels, images[1][index])
    x[...] = 0
    for a, b in zip(images, kept, strict=True):
        np.testing.assert_array_equal(a, b)


# --------------------------------------------------------------------------------------------------
# Run log and resource monitor
# --------------------------------------------------------------------------------------------------

DESIGN_COLUMNS = [
    "type",
    "epoch",
    "start",
    "loading",
    "duration",
    "value1",
    "value2",
    "loss",
    "images_per_s",
    "cpu_percent",
    "ram_mb",
    "gpu_percent",
    "gpu_mem_mb",
    "forward",
    "backward",
    "communication",
]
TINY = Dataset(
    np.zeros((30, 32, 32, 3), np.uint8),
    np.zeros(30, np.uint8),
    np.zeros((6, 32, 32, 3), np.uint8),
    np.zeros(6, np.uint8),
    "synthetic",
    "f" * 64,
)


def run_args(folder, *options):
    paths = ("--log", f"{folder}/log.csv", "--save-metrics", f"{folder}/metrics.npz")
    return make_parser("fake", "").parse_args([*paths, "--epochs", "2", *options])


class FakeModel:
    """What a checkpoint needs of a model, and of an optimizer: one array."""

    def __init__(self, name):
        self.arrays = {name: np.zeros(3)}

    def layout(self):
        return []

    def state_dict(self):
        return self.arrays

    def load_state_dict(self, state):
        for name, array in self.arrays.items():
            array[...] = state[name]


class Fake:
    """Three batches of ten images an epoch, 3 right, 6 in the top five, mean loss 2."""

    def __init__(
        self,
        folder,
        *options,
        validation=0.0,
        before_batch=lambda epoch, batch: None,
        **log_options,
    ):
        self.args = run_args(folder, *options)
        self.validation = validation
        self.before_batch = before_batch
        self.model = FakeModel("w")
        self.log = RunLog(self.args, "fake", TINY, **log_options)
        rank = log_options.get("rank", 0)
        self.checkpoint = Checkpoint(self.args, self.log, self.model, FakeModel("v"), rank)
        if self.args.resume:
            self.checkpoint.load()

    def train(self):
        with StopSignal() as stop, self.log as log:
            for epoch in range(log.epoch, self.args.epochs + 1):
                log.start_epoch(epoch, 3)
                for batch in range(log.batch, 3):
                    time.sleep(0.02)
                    self.before_batch(epoch, batch)
                    log.add_seconds("loading", 0.001)
                    log.add_seconds("forward", 0.002)
                    log.add_seconds("backward", 0.004)
                    log.end_batch(10, 20.0, 3, 6)
                    if stop.requested:
                        save_and_stop(self.checkpoint, log, stop)
                log.end_training()
                time.sleep(self.validation)
                log.end_epoch(1.5, 0.25 if epoch == 1 else 0.2, 0.8, 0.01)
                self.checkpoint.save()
            log.finish()
        return self


def log_rows(folder):
    with open(folder / "log.csv", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return reader.fieldnames, rows


def sidecar(folder):
    return json.loads((folder / "log.json").read_text())


def test_log_rows(tmp_path):
    before = time.time()
    Fake(tmp_path, validation=0.05).train()
    columns, rows = log_rows(tmp_path)
    assert columns == DESIGN_COLUMNS == list(common.LOG_COLUMNS)
    assert [(r["type"], r["epoch"]) for r in rows] == [(t, e) for e in "12" for t in "22201"]

    seconds = [r[c] for r in rows for c in ("start", "loading", "duration")]
    seconds += [r[c] for r in rows if r["type"] != "1" for c in ("forward", "backward")]
    assert all(re.fullmatch(r"\d+\.\d{6}", s) for s in seconds)
    assert all(r["gpu_percent"] == r["gpu_mem_mb"] == r["communication"] == "" for r in rows)

    for epoch in ("1", "2"):
        batches, training, validation = (
            [r for r in rows if r["epoch"] == epoch and r["type"] == kind] for kind in "201"
        )
        assert [(r["value1"], r["value2"]) for r in batches] == [("1", "3"), ("2", "3"), ("3", "3")]
        assert len({r["start"] for r in batches + training}) == 1
        for i, r in enumerate(batches, 1):  # since the epoch's start
            assert float(r["duration"]) >= 0.02 * i
            assert [float(r[c]) for c in ("loading", "forward", "backward")] == [
                0.001 * i,
                0.002 * i,
                0.004 * i,
            ]
            assert float(r["images_per_s"]) == pytest.approx(
                10 * i / float(r["duration"]), rel=1e-3
            )
            assert float(r["loss"]) == 2
        (training,), (validation,) = training, validation
        assert training["duration"] == batches[-1]["duration"]
        assert training["loading"] == batches[-1]["loading"]
        assert [float(training[c]) for c in ("value1", "value2", "loss")] == [0.3, 0.6, 2]
        assert float(training["images_per_s"]) == pytest.approx(
            30 / float(training["duration"]), rel=1e-3
        )
        assert float(training["ram_mb"]) > 10
        assert [float(validation[c]) for c in ("value2", "loss", "loading")] == [0.8, 1.5, 0.01]
        assert float(validation["value1"]) == (0.25 if epoch == "1" else 0.2)
        assert float(validation["duration"]) >= 0.05
        assert float(validation["images_per_s"]) == pytest.approx(
            6 / float(validation["duration"]), rel=1e-3
        )
        assert (
            float(validation["start"])
            >= float(training["start"]) + float(training["duration"]) - 0.01
        )
    assert before <= float(rows[0]["start"])
    assert (
        float(rows[4]["start"]) + float(rows[4]["duration"])
        <= float(rows[5]["start"]) + 0.01
        <= time.time()
    )


def test_rows_are_flushed_as_they_are_written(tmp_path):
    seen = []
    Fake(tmp_path, before_batch=lambda *_: seen.append(len(log_rows(tmp_path)[1]))).train()
    assert seen == [0, 1, 2, 5, 6, 7]


def control_groups(folder, groups, mounts, files):
    """Files as in /proc/self, with which cpu_quota() reads control groups below `folder`."""
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    lines = [mount.format(folder) for mount in mounts]
    (folder / "mounts").write_text("".join(f"{line}\n" for line in lines))
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    return str(folder)


VERSION_1 = ["tmpfs {0} tmpfs rw 0 0", "cgroup {0}/cpu cgroup rw,nosuid,cpu,cpuacct 0 0"]
VERSION_2 = ["proc /proc proc rw 0 0", "cgroup2 {0}/all cgroup2 rw,nosuid 0 0"]


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "quota"),
    [
        (["0::/job"], VERSION_2, {"all/job/cpu.max": "150000 100000"}, 1.5),
        (["0::/"], VERSION_2, {"all/cpu.max": "50000 50000"}, 1),
        (["0::/job"], VERSION_2, {"all/job/cpu.max": "max 100000"}, math.inf),
        # The limit of a group above holds too, whichever is smaller.
        (["0::/a/b"], VERSION_2, {"all/a/cpu.max": "2000 1000", "all/a/b/cpu.max": "max 1"}, 2),
        (["0::/a/b"], VERSION_2, {"all/a/cpu.max": "2000 1000", "all/a/b/cpu.max": "5 10"}, 0.5),
        # In a container the path is the host's.
        (["0::/docker/0a"], VERSION_2, {"all/cpu.max": "3000 1000"}, 3),
        (
            ["3:cpu,cpuacct:/docker/0a", "0::/"],
            [*VERSION_1, *VERSION_2],
            {"cpu/cpu.cfs_quota_us": 50000, "cpu/cpu.cfs_period_us": 100000},
            0.5,
        ),
        (
            ["3:cpuacct,cpu:/job"],
            VERSION_1,
            {"cpu/job/cpu.cfs_quota_us": -1, "cpu/job/cpu.cfs_period_us": 100000},
            math.inf,
        ),
        (["2:memory:/", "1:name=systemd:/"], VERSION_1, {}, math.inf),
        ([], [], {}, math.inf),
    ],
)
def test_quota_of_a_container(tmp_path, groups, mounts, files, quota):
    assert common.cpu_quota(control_groups(tmp_path, groups, mounts, files)) == quota


def test_quota_without_control_groups(tmp_path):
    """Other systems than Linux."""
    assert common.cpu_quota(str(tmp_path / "none")) == math.inf


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_available_cores_are_those_of_affinity_and_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 4, 5, 6})
    for quota, cores in ((math.inf, [4, 5, 6, 7]), (0.5, [4]), (2.5, [4, 5]), (9, [4, 5, 6, 7])):
        monkeypatch.setattr(common, "cpu_quota", lambda quota=quota: quota)
        assert common.available_cores() == cores


def test_sidecar(tmp_path):
    started = time.time()
    Fake(tmp_path, "--lr", "0.5", "--seed", "9", info={"ranks": 4, "extra": "x"}).train()
    info = sidecar(tmp_path)
    assert info["script"] == "fake"
    assert info["arguments"]["lr"] == 0.5
    assert info["arguments"]["log"] == str(tmp_path / "log.csv")
    assert (info["dataset"], info["fingerprint"]) == ("synthetic", "f" * 64)
    assert (info["train_images"], info["test_images"]) == (30, 6)
    assert (info["seed"], info["ranks"], info["threads"], info["extra"]) == (9, 4, 1, "x")
    assert info["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", info["git_commit"])
    assert (info["host"], info["cores"]) == (os.uname().nodename, sorted(os.sched_getaffinity(0)))
    assert info["cpu"]
    assert all(set(blas) == {"library", "version", "kernel", "threads"} for blas in info["blas"])
    assert all(blas["threads"] == 1 for blas in info["blas"])
    assert (info["versions"]["numpy"], info["versions"]["python"]) == (
        np.__version__,
        sys.version.split()[0],
    )
    assert started <= info["start"] <= info["end"] <= time.time()
    assert info["status"] == "done"
    totals = info["totals"]
    assert (totals["train_images"], totals["final_accuracy"], totals["best_accuracy"]) == (
        60,
        0.2,
        0.25,
    )
    assert totals["images_per_s"] == pytest.approx(60 / totals["train_seconds"])
    assert totals["peak_ram_mb"] >= psutil.Process().memory_info().rss / 2**20 / 2
    assert totals["mean_cpu_percent"] >= 0


def test_evaluation_is_not_training_time(tmp_path):
    """Both together are no longer than the run took, so that neither has a part of the other."""
    fake, started = Fake(tmp_path, validation=0.3), time.perf_counter()
    fake.train()
    seconds = time.perf_counter() - started
    totals = sidecar(tmp_path)["totals"]
    trainings = [r for r in log_rows(tmp_path)[1] if r["type"] == "0"]
    assert totals["train_seconds"] == pytest.approx(
        sum(float(r["duration"]) for r in trainings), abs=1e-5
    )
    assert totals["train_seconds"] >= 0.12
    assert totals["evaluation_seconds"] >= 0.6
    assert totals["train_seconds"] + totals["evaluation_seconds"] < seconds


def test_metrics_file(tmp_path):
    Fake(tmp_path).train()
    with np.load(tmp_path / "metrics.npz", allow_pickle=False) as file:
        metrics = dict(file)
    assert list(metrics) == [
        "train_loss",
        "train_acc",
        "test_loss",
        "test_acc",
        "epoch_time",
        "images_per_s",
    ]
    assert all(m.shape == (2,) for m in metrics.values())
    assert metrics["train_acc"].tolist() == [0.3, 0.3]
    assert metrics["test_acc"].tolist() == [0.25, 0.2]
    np.testing.assert_allclose(metrics["images_per_s"], 30 / metrics["epoch_time"])


def test_the_last_lines_name_the_data(tmp_path, capsys):
    Fake(tmp_path).train()
    shown = capsys.readouterr().out
    assert "epoch 2/2  train loss 2.0000 accuracy 30.00%  test loss 1.5000 accuracy 20.00%" in shown
    assert "best test accuracy 25.00% (epoch 1)" in shown
    assert shown.count("SYNTHETIC DATA, not CIFAR-10") == 2
    Fake(tmp_path, "--quiet").train()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_other_ranks_write_and_show_nothing(tmp_path, capsys):
    Fake(tmp_path, "--checkpoint", f"{tmp_path}/c.npz", rank=1).train()
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, loss):
    log = Fake(tmp_path).log

    def train():
        with log:
            log.start_epoch(1, 3)
            log.end_batch(10, loss, 1, 5)
            require_finite(loss, "loss", log)

    with pytest.raises(TrainingError, match=rf"loss is {loss} at step 1 .*smaller --lr"):
        train()
    assert sidecar(tmp_path)["status"].startswith(f"failed: the loss is {loss}")
    assert [r["loss"] for r in log_rows(tmp_path)[1]] == [str(loss)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("batch", [0, 2], ids=["first batch", "last batch"])
def test_an_interrupted_run_is_resumed_without_a_gap(tmp_path, number, batch):
    """The batch is finished, the checkpoint written; the resumed run's log is the one of a run that
    was not stopped.
    """
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    options = ("--checkpoint", f"{tmp_path}/c.npz")
    stop = (2, batch)
    fake = Fake(
        tmp_path, *options, before_batch=lambda *at: at == stop and os.kill(os.getpid(), number)
    )
    fake.model.arrays["w"][...] = 7
    with pytest.raises(
        Interrupted, match=f"{number.name} after batch {batch + 1} of epoch 2; continue with"
    ):
        fake.train()
    assert sidecar(tmp_path)["status"] == "interrupted"
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [(r["type"], r["epoch"]) for r in log_rows(tmp_path)[1]][5:] == [("2", "2")] * (
        batch + 1
    )

    resumed = Fake(tmp_path, *options, "--resume")
    assert resumed.model.arrays["w"].tolist() == [7, 7, 7]
    resumed.train()
    rows = log_rows(tmp_path)[1]
    assert [(r["type"], r["epoch"]) for r in rows] == [(t, e) for e in "12" for t in "22201"]
    assert [r["value1"] for r in rows if r["type"] == "2"] == ["1", "2", "3"] * 2
    assert [float(rows[8][c]) for c in ("value1", "value2", "loss")] == [0.3, 0.6, 2]
    assert sidecar(tmp_path)["totals"]["train_images"] == 60


def test_a_crashed_run_is_resumed_from_its_last_checkpoint(tmp_path):
    """Rows after the checkpoint, a half one too, are dropped from the log and written again."""
    options = ("--checkpoint", f"{tmp_path}/c.npz")

    def crash(*at):
        if at == (2, 2):
            raise MemoryError("no memory left")

    with pytest.raises(MemoryError):
        Fake(tmp_path, *options, before_batch=crash).train()
    assert sidecar(tmp_path)["status"] == "failed: no memory left"
    with open(tmp_path / "log.csv", "a") as file:
        file.write("2,2,17000")
    assert len(log_rows(tmp_path)[1]) == 5 + 2 + 1
    Fake(tmp_path, *options, "--resume").train()
    assert [(r["type"], r["epoch"]) for r in log_rows(tmp_path)[1]] == [
        (t, e) for e in "12" for t in "22201"
    ]
    assert sidecar(tmp_path)["status"] == "done"
    Fake(tmp_path, *options, "--resume").train()  # there is nothing left to do
    assert len(log_rows(tmp_path)[1]) == 10


def test_checkpoints_that_do_not_fit_are_input_errors(tmp_path, capsys):
    path = tmp_path / "c.npz"
    options = ("--checkpoint", str(path))
    fake = Fake(tmp_path, *options, "--resume")  # as a cluster's script asks for in its first job
    assert (fake.log.epoch, fake.log.batch) == (1, 0)
    assert (
        f"no checkpoint {path} yet: training starts from the beginning" in capsys.readouterr().out
    )
    with pytest.raises(InputError, match="--resume needs --checkpoint"):
        Fake(tmp_path, "--resume")
    Fake(tmp_path, *options).train()
    with pytest.raises(InputError, match=r"made with lr 0.01, this run has 0.5"):
        Fake(tmp_path, *options, "--resume", "--lr", "0.5")
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        b"garbage",
        malicious_pickle(tmp_path / "executed"),
        b"PK\x03\x04",
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="not a valid checkpoint"):
            Fake(tmp_path, *options, "--resume")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("option", ["--log", "--save-metrics", "--checkpoint"])
def test_outputs_that_cannot_be_written_are_input_errors_at_the_start(tmp_path, option):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/x cannot be written \(Not a directory\)"):
        Fake(tmp_path, option, f"{tmp_path}/file/x")
    with pytest.raises(InputError, match="it is a folder"):
        Fake(tmp_path, option, str(tmp_path))


def test_the_sidecar_has_a_place_of_its_own(tmp_path):
    """It stands beside x.csv as x.json, so the log must not be x.json and no folder may have that
    name.
    """
    with pytest.raises(InputError, match=r"--log.*\.json"):
        Fake(tmp_path, "--log", f"{tmp_path}/x.json").train()
    (tmp_path / "log.json").mkdir()
    with pytest.raises(InputError, match=r"log\.json cannot be written \(it is a folder\)"):
        Fake(tmp_path).train()


@pytest.mark.parametrize(
    ("log", "metadata"),
    [
        ("runs/a.csv", "runs/a.json"),
        ("lr0.01", "lr0.01.json"),
        ("lr0.02", "lr0.02.json"),
        ("a", "a.json"),
        ("a.log", "a.log.json"),
        (".csv", ".csv.json"),
        ("a.b.csv", "a.b.json"),
    ],
)
def test_the_sidecar_is_named_after_the_whole_log(log, metadata):
    assert common.metadata_path(log) == Path(metadata)


@pytest.mark.parametrize(("first", "second"), [("x", "x.csv"), ("x.csv", "x"), ("a.1", "a.1.csv")])
def test_two_logs_do_not_share_a_sidecar(tmp_path, first, second):
    Fake(tmp_path, "--log", f"{tmp_path}/{first}").train()
    with pytest.raises(InputError, match=r"would describe both: choose another name"):
        Fake(tmp_path, "--log", f"{tmp_path}/{second}")
    Fake(tmp_path, "--log", f"{tmp_path}/{first}").train()


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = make_parser("fake", "")
    args = parser.parse_args(
        ["--log=~/run.csv", "--checkpoint", "~/ck", "--data-dir=~", "--trace=./~"]
    )
    assert args.log == f"{tmp_path}/run.csv"
    assert args.checkpoint == f"{tmp_path}/ck"
    assert args.data_dir == str(tmp_path)
    assert args.trace == "./~"
    for option in ("--log", "--data-dir", "--save-metrics", "--checkpoint"):
        with pytest.raises(InputError, match="no such home folder: write the whole path"):
            parser.parse_args([f"{option}=~nobody-at-all/x"])
    monkeypatch.setenv("CIFAR10_DIR", "~nobody-at-all/x")
    with pytest.raises(InputError, match="no such home folder"):
        load_cifar10(dataset="synthetic", subset=10)


SPIN = "block = bytearray(b'x' * 100_000_000)\nprint(flush=True)\nwhile True:\n    pass"


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cpu_seconds(process):
    times = process.cpu_times()
    return times.user + times.system


@pytest.fixture
def busy_child():
    """busy_child(): a process (psutil's) with 100 MB that spins."""
    children = []

    def start():
        children.append(subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE))
        children[-1].stdout.readline()
        return psutil.Process(children[-1].pid)

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_monitor_sees_a_busy_child(busy_child):
    own = psutil.Process().memory_info().rss / 2**20
    busy_child()
    monitor = ResourceMonitor(interval=0.1)
    monitor.start()
    # of one core, which others may want too, now and then a whole interval long
    wait_for(
        lambda: (
            len(monitor.samples) >= 3
            and min(monitor.latest()["cpu_percent"] or 0, monitor.summary()["cpu_percent"]) > 5
        )
    )
    monitor.stop()
    assert monitor.latest()["ram_mb"] > own + 95
    assert monitor.latest()["gpu_percent"] is None
    assert set(monitor.summary()) == {"cpu_percent", "ram_mb"}
    assert not monitor.is_alive()


@pytest.mark.skipif(not common.thread_times(), reason="the system does not count waiting threads")
def test_run_whose_core_is_busy_says_so(tmp_path, busy_child):
    """A training and a process that spins share one core: both get about half of it."""
    core = common.available_cores()[0]
    busy_child().cpu_affinity([core])
    options = ("--dataset", "synthetic", "--subset", 1000, "--epochs", 2, "--conv", "loops")
    command = ("taskset", "-c", core, sys.executable, REPO / "serial_cnn.py", *options)
    out, _ = finish(start_command(tmp_path, command))
    totals = json.loads((tmp_path / "results/serial_cnn.json").read_text())["totals"]
    assert totals["cpu_share"] < common.SHORT_OF_CPU
    assert "(SHORT OF CPU: its threads got " in out.splitlines()[-1]


@pytest.mark.parametrize(
    "earlier", [True, False], ids=["child before monitor", "monitor before child"]
)
def test_monitors_first_sample_of_a_child_is_not_a_false_zero(busy_child, earlier):
    """It has all that the child has computed, however little of a core it got, since the monitor
    was made.
    """
    child = busy_child() if earlier else None
    started, monitor = time.monotonic(), ResourceMonitor()
    child = child or busy_child()
    before = cpu_seconds(child) if earlier else 0.0
    wait_for(lambda: cpu_seconds(child) - before >= 0.3)
    monitor.sample()
    assert monitor.samples[0][0] > 99 * 0.3 / (time.monotonic() - started)


def test_monitors_first_sample_of_itself_is_not_a_false_zero(monkeypatch):
    """With a clock that the test sets: 0 s and half a second after the monitor was made."""
    now = 100.0
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: now))
    began, monitor = time.process_time(), ResourceMonitor()
    monitor.sample()  # too early to tell
    assert monitor.latest()["cpu_percent"] is None
    assert monitor.summary().keys() == {"ram_mb"}
    spun = time.process_time()
    while time.process_time() - spun < 0.3:
        pass
    now += 0.5
    monitor.sample()
    used = time.process_time() - began
    assert (
        100 * (0.3 - 0.03) / 0.5 < monitor.samples[1][0] < 100 * (used + 0.03) / 0.5
    )  # ticks of 10 ms, of two kinds
    assert monitor.summary()["cpu_percent"] == monitor.samples[1][0]


def test_monitor_outlives_children_and_needs_no_gpu():
    monitor = ResourceMonitor(gpu_uuid="GPU-none")
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(
        os.P_PID, child.pid, os.WEXITED | os.WNOWAIT
    )  # it has ended, but nobody has waited for it
    monitor.sample()
    child.wait()
    monitor.sample()
    assert len(monitor.samples) == 2


def test_monitor_leaves_out_what_a_gpu_does_not_tell(monkeypatch):
    """A partitioned GPU (MIG) tells its memory and refuses to tell its use. A stand-in for NVML."""

    class NVMLError(Exception):
        pass

    def refuse(gpu):
        raise NVMLError

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=str,
        nvmlDeviceGetUtilizationRates=refuse,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=3 * common.MIB),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monitor = ResourceMonitor(gpu_uuid="GPU-1")
    monitor.sample()
    assert monitor.samples[0][2:] == (None, 3)


def test_summary_is_mean_use_and_peak_memory():
    monitor = ResourceMonitor()
    monitor.samples = [(900, 900, 1, 1), (100, 50, 10, 7), (200, 30, 30, 9)]
    assert monitor.summary(1) == {
        "cpu_percent": 150,
        "ram_mb": 50,
        "gpu_percent": 20,
        "gpu_mem_mb": 9,
    }


# --------------------------------------------------------------------------------------------------
# Files, command line and the rest
# --------------------------------------------------------------------------------------------------


def test_atomic_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with common.atomic_write(path, "w") as file:
        file.write("old")
        file.flush()
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with common.atomic_write(path, "w") as file:
            file.write("half")
            file.flush()
            raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]
    with common.atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file.txt"]
    with pytest.raises(OSError, match=r"file\.txt/x cannot be written"):
        with common.atomic_write(path / "x"):
            pass


def test_atomic_write_keeps_links_and_devices(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path in (tmp_path / "link", "/dev/null"):
        with common.atomic_write(path, "w") as file:
            file.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert Path("/dev/null").is_char_device()
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_check_outputs(tmp_path):
    (tmp_path / "file").write_text("kept")
    common.check_outputs([tmp_path / "file", tmp_path / "a" / "b" / "c.csv", None])
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(InputError, match="it is a folder"):
        common.check_outputs([tmp_path])
    with pytest.raises(InputError, match="Not a directory"):
        common.check_outputs([tmp_path / "file" / "c.csv"])
    with pytest.raises(InputError, match="written twice"):
        common.check_outputs([tmp_path / "x", tmp_path / "y", str(tmp_path / "x")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 0", "'0' is not a whole number from 1 to 1000000"),
        ("--epochs 1.5", "'1.5' is not a whole number"),
        ("--batch-size -3", "'-3' is not a whole number from 1"),
        ("--lr 0", "'0' is not a number more than 0"),
        ("--lr nan", "'nan' is not a number more than 0"),
        ("--lr inf", "'inf' is not a number more than 0"),
        ("--lr x", "'x' is not a number more than 0"),
        ("--momentum 1.1", "'1.1' is not a number from 0 to 1"),
        ("--checkpoint-every -1", "'-1' is not a number from 0 to 1000000000"),
        ("--checkpoint-every inf", "'inf' is not a number from 0 to 1000000000"),
        ("--subset 0", "'0' is not a whole number from 1"),
        ("--seed -1", "'-1' is not a whole number from 0"),
        ("--dataset mnist", "invalid choice: 'mnist'"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ],
)
@pytest.mark.usefixtures("_signal_handlers")
def test_bad_options_are_one_line_and_status_2(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: make_parser("fake", "").parse_args(options.split()))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr


def test_number():
    assert common.number(int, 1, 5)("5") == 5
    assert isinstance(common.number(int, 1, 5)("5"), int)
    assert common.number(float, 0, 1)("1e-3") == 0.001
    assert common.number(float, 0, 1)("0") == 0


def test_defaults_are_the_designs():
    args = make_parser("fake", "").parse_args([])
    assert (args.model, args.epochs, args.batch_size, args.lr, args.momentum) == (
        "cnn",
        10,
        32,
        0.01,
        0.9,
    )
    assert (args.weight_decay, args.optimizer, args.dataset, args.seed) == (0, "sgd", "auto", 42)
    assert (args.log, args.save_metrics) == ("results/fake.csv", "results/fake_metrics.npz")
    assert make_parser("fake", "").parse_args(["--optimizer", "adam"]).lr == 0.001
    assert make_parser("fake", "").parse_args(["--optimizer", "adam", "--lr", "0.1"]).lr == 0.1


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (InputError("no file"), 2, "error: no file\n"),
        (TrainingError("nan"), 1, "error: nan\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (Interrupted("by SIGINT"), 130, "by SIGINT\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
    ],
)
@pytest.mark.usefixtures("_signal_handlers")
def test_exit_status(error, status, shown, capsys):
    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as stop:
        common.run_main(main)
    assert (stop.value.code or 0, capsys.readouterr().err) == (status, shown)


def test_table():
    assert common.format_table(("a", "long"), [("123", "4"), ("5", "6")]).splitlines() == [
        "  a  long",
        "---  ----",
        "123     4",
        "  5     6",
    ]
    assert common.format_table(("a",), []) == "a\n-"


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool])
def test_aligned_zeros(shape, dtype):
    zeros = common.aligned_zeros(shape, dtype)
    assert (zeros.shape, zeros.dtype, zeros.ctypes.data % 64) == (shape, dtype, 0)
    assert not zeros.any()


def test_importing_common_imports_nothing_heavy():
    heavy = set("torch torchvision scipy numba mpi4py cupy psutil threadpoolctl tqdm".split())
    code = f"import common, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_import_torchvision(torch, torchvision):
    """Beside a CPU-only torch too; models work, and a second call changes nothing."""
    assert common.import_torchvision() is torchvision
    with torch.no_grad():
        assert torchvision.models.resnet18(num_classes=10).eval()(
            torch.zeros(1, 3, 32, 32)
        ).shape == (1, 10)


def test_import_torchvision_beside_operators_of_its_own(torch, tmp_path):
    """A torchvision that fits its torch (CPU wheels, macOS) registers its operators itself: twice
    would be an abort.
    """
    if torch.version.cuda:
        pytest.skip("needs a CPU-only torch")
    (tmp_path / "torchvision.py").write_text(
        "import torch\n"
        "library = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
    )
    code = "import common; print(common.import_torchvision().__file__)"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "torchvision.py")


# --------------------------------------------------------------------------------------------------
# Other sizes, channels and classes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_shape", [(28, 28, 1), (9, 14, 3), (4, 4, 2)])
@pytest.mark.parametrize("make", [make_cnn, make_resnet18])
def test_networks_of_other_sizes(make, image_shape):
    model = make(image_shape=image_shape, classes=3)
    images = np.random.default_rng(0).integers(256, size=(3, *image_shape), dtype=np.uint8)
    statistics = {"mean": (0.5,) * image_shape[2], "std": (0.2,) * image_shape[2]}
    x, labels = load_batch(images, np.arange(3), slice(3), **statistics)
    expected = (images / 255 - 0.5) / 0.2
    np.testing.assert_allclose(x, expected, atol=1e-5)
    _, dlogits = softmax_cross_entropy(model.forward(x), labels)
    model.backward(dlogits)
    assert model.grads.any()
    confusion = np.zeros((3, 3), int)
    _, top1, top5, _ = evaluate(model, images, labels, **statistics, confusion=confusion)
    assert top5 == 1
    assert confusion.trace() / 3 == pytest.approx(top1)


def test_images_too_small_for_the_network_are_refused():
    with pytest.raises(InputError, match=r"images of 3x8 pixels: its two MaxPool2D\(2\) take 4x4"):
        make_cnn(image_shape=(3, 8, 1))


def test_the_mean_of_other_data_is_asked_for():
    with pytest.raises(ValueError, match=r"1 channels, but a mean for 3.*mean=data\.mean"):
        load_batch(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, int), slice(2))


def test_a_checkpoint_names_its_parameters():
    model = make_resnet18()
    layout = np.array(json.dumps(model.layout()))
    found = common.split_params({"params": model.params, "layout": layout})
    assert found["0.Conv2D.W"].shape == (3, 3, 3, 64)
    assert np.shares_memory(found["0.Conv2D.W"], model.layers[0].W)
    assert sum(array.size for array in found.values()) == model.params.size
    assert list(found)[-2:] == ["12.Dense.W", "12.Dense.b"]


# -- the watch over ranks that are blocked ---------------------------------------------------------


def test_watch_without_a_log_outlives_a_pause(monkeypatch):
    """Before the training there is no log; Ctrl-Z stops the watch too, for longer than 5 s."""
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    with common.StallWatch(None, SimpleNamespace(rank=0)) as watch:
        time.sleep(0.6)  # it has looked twice
        assert watch._thread.is_alive()


@pytest.mark.parametrize("is_stopping", [False, True])
def test_ranks_that_have_agreed_to_stop_may_save(monkeypatch, is_stopping):
    """After a signal a blocked rank ends the job, but not one whose disk is slow."""
    ended = threading.Event()
    monkeypatch.setattr(common.StallWatch, "AFTER_SIGNAL", 0.0)
    monkeypatch.setattr(common.StallWatch, "_end_job", lambda *_: ended.set())
    log = SimpleNamespace(
        args=SimpleNamespace(stall_timeout=0), last_batch=None, is_stopping=is_stopping
    )
    with common.StallWatch(log, SimpleNamespace(rank=0)) as watch:
        os.write(watch._wakeup, b"\x0f")  # as Python does when SIGTERM comes
        assert ended.wait(60 if not is_stopping else 1) == (not is_stopping)
