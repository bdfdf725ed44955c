"""gpu_scratch.py: its kernels against the layers of common.py, and the script.

The tests of kernels run twice: on any machine with a C++ compiler, compiled as C++, and on a GPU.
"""

import contextlib
import ctypes
import functools
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import (
    REPO,
    assert_one_error_line,
    assert_same_run,
    assert_same_weights,
    before_batch,
    finish,
    numbers,
    read_log,
    read_npz,
    refused,
    script_environment,
    send,
    start,
    start_stopping,
    usage_lines,
)

import common
import gpu_scratch
import serial_cnn

SCRIPT = "gpu_scratch.py"
LOG = "results/gpu_scratch.csv"
METADATA = "results/gpu_scratch.json"
TINY = ("--dataset", "synthetic", "--subset", "40", "--epochs", "1")
NO_GPU = gpu_scratch.missing_for_gpu()
ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(bool(NO_GPU), reason=f"needs an NVIDIA GPU: {NO_GPU}"),
)
SIGNATURES = dict(re.findall(r"^KERNEL (\w+)\(([^)]*)\)", gpu_scratch.KERNELS, re.M))


# --------------------------------------------------------------------------------------------------
# The kernels as C++
# --------------------------------------------------------------------------------------------------

# What CUDA C has and C++ has not. The threads of a block are fibers that take turns at each
# __syncthreads(), so that a missing barrier shows.
SHIM = r"""
#include <math.h>
#include <cmath>
#include <functional>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
struct Dim { unsigned x, y; };
static Dim gridDim, blockDim, blockIdx, threadIdx;
struct Fiber {
    ucontext_t context;
    jmp_buf here;
    std::vector<char> stack = std::vector<char>(65536);
    bool begun = false, done = false;
};
static std::vector<Fiber> fibers(512);
static Fiber *running;
static jmp_buf scheduler;
static std::function<void()> kernel;
static void __syncthreads() { if (!_setjmp(running->here)) _longjmp(scheduler, 1); }
static void fiber_main() { while (true) kernel(), running->done = true, __syncthreads(); }
static __attribute__((noinline)) void resume(Fiber *fiber)
{
    running = fiber;
    if (_setjmp(scheduler)) return;
    if (fiber->begun) _longjmp(fiber->here, 1);
    fiber->begun = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    makecontext(&fiber->context, fiber_main, 0);
    setcontext(&fiber->context);
}
static Dim place(unsigned thread) { return {thread % blockDim.x, thread / blockDim.x}; }
static void run_fibers()
{
    unsigned threads = blockDim.x * blockDim.y, alive = threads;
    for (unsigned t = 0; t < threads; t++) fibers[t].done = false;
    while (alive)
        for (unsigned t = 0; t < threads; t++)
            if (!fibers[t].done) threadIdx = place(t), resume(&fibers[t]), alive -= fibers[t].done;
}
template <class Body> static void run(bool waits, const unsigned *dims, Body body)
{
    gridDim = {dims[0], dims[1]}, blockDim = {dims[2], dims[3]}, kernel = body;
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
            if (waits) run_fibers();
            else
                for (unsigned t = 0; t < blockDim.x * blockDim.y; t++) threadIdx = place(t), body();
}
"""


def parameters(name):
    """[(type, name)] of a kernel's parameters."""
    found = []
    for parameter in SIGNATURES[name].split(","):
        parameter = " ".join(parameter.split())
        found.append(re.fullmatch(r"(?:const )?(.*?)(\w+)", parameter).groups())
    return found


@functools.cache
def compiled(dtype, folder, *of_data):
    """The kernels as a shared library; kernel `k` is its function run_k(dims, ...).

    of_data: image_shape, mean and std, if not those of CIFAR-10.
    """
    source = SHIM + gpu_scratch.kernel_source(dtype, *of_data)
    bodies = re.split(r"^KERNEL (\w+)", gpu_scratch.KERNELS, flags=re.M)
    for name, body in zip(bodies[1::2], bodies[2::2], strict=True):
        body = body.partition("\n}")[0]
        waits = bool(re.search(r"block_sum|block_merge|__syncthreads", body))
        names = ", ".join(parameter for _, parameter in parameters(name))
        source += (
            f'extern "C" void run_{name}(const unsigned *dims, {SIGNATURES[name]})\n'
            f"{{ run({int(waits)}, dims, [=] {{ {name}({names}); }}); }}\n"
        )
    file = folder / f"kernels_{dtype}_{abs(hash(of_data))}.cpp"
    library = file.with_suffix(".so")
    file.write_text(source)
    options = "-O2 -std=c++14 -Wall -Werror -Wno-unknown-pragmas -shared -fPIC".split()
    command = ["g++", *options, file, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(library)


class CxxGpu(gpu_scratch.Gpu):
    """A Gpu of NumPy arrays, whose kernels run on the CPU, one thread after the other.

    Checks every argument's type against the kernel's signature.
    """

    launched = set()  # noqa: RUF012 (of all tests)

    def __init__(self, dtype, folder):
        self.dtype = np.dtype(dtype)
        self.workspaces = {}
        self.folder = folder
        self.library = compiled(self.dtype.name, folder)

    def compile(self, image_shape, mean, std):
        of_data = (image_shape, mean, std)
        if of_data == (common.IMAGE_SHAPE, common.MEAN, common.STD):
            of_data = ()
        self.library = compiled(self.dtype.name, self.folder, *of_data)

    def allocate(self, size, dtype):
        """What no kernel writes stays NaN."""
        array = np.empty(size, dtype)
        if array.dtype == self.dtype:
            array.fill(np.nan)
        return array

    def launch(self, name, grid, block, *args):
        self.launched.add(name)
        wanted = {"real": self.dtype, "int": np.int32, "double": np.float64, "byte": np.uint8}
        values = []
        for (kind, parameter), value in zip(
            parameters(name), map(self.argument, args), strict=True
        ):
            is_pointer = "*" in kind
            kind = wanted[kind.strip(" *")]
            if is_pointer and isinstance(value, np.uintp):
                assert value == 0
                values.append(ctypes.c_void_p(None))
                continue
            assert value.dtype == kind, f"{name}: {parameter} is {value.dtype}"
            assert isinstance(value, np.ndarray) == is_pointer, f"{name}: {parameter}"
            if is_pointer:
                assert value.flags.c_contiguous, f"{name}: {parameter}"
                values.append(ctypes.c_void_p(value.ctypes.data))
            else:
                values.append(np.ctypeslib.as_ctypes_type(kind)(value))
        dims = (ctypes.c_uint * 4)(*(*grid, 1)[:2], *(*block, 1)[:2])
        getattr(self.library, f"run_{name}")(dims, *values)

    def gemm(self, a, b, out, transpose_a=False, transpose_b=False):
        assert all(array.flags.c_contiguous and array.dtype == self.dtype for array in (a, b, out))
        assert not np.shares_memory(out, a)
        assert not np.shares_memory(out, b)
        stacks = (array.reshape(-1, *array.shape[-2:]) for array in (a, b, out))
        for A, B, C in zip(*stacks, strict=True):  # NumPy is slow with stacks of transposed ones
            np.matmul(A.T if transpose_a else A, B.T if transpose_b else B, out=C)

    def put(self, array):
        return np.array(array)

    def get(self, array):
        return np.array(array)

    def mark(self):
        return None

    def seconds(self, since, until):
        return 0.0

    def start_read(self, sums):
        return sums.tolist


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread():
    """As in the script; several would wait for each other where cores are busy."""
    common.limit_blas_threads(1)


@pytest.fixture(scope="session")
def kernels_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


gpu_on_device = functools.cache(gpu_scratch.Gpu)


@pytest.fixture(params=["C++", pytest.param("GPU", marks=ON_GPU)])
def make_kernels(request, kernels_folder):
    """make_kernels(dtype): the kernels as C++, or on a GPU."""
    if request.param == "GPU":
        return gpu_on_device
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler, g++")
    return lambda dtype: CxxGpu(dtype, kernels_folder)


@pytest.fixture(params=["float32", "float64"])
def gpu(request, make_kernels):
    return make_kernels(request.param)


def assert_close(gpu, value, wanted, least=1e-3):
    """Apart by at most 1e-5 (float32) or 1e-11 times the largest value, but at least `least`."""
    value = gpu.get(value)
    tolerance = {4: 1e-5, 8: 1e-11}[gpu.dtype.itemsize]
    assert value.shape == wanted.shape
    assert np.abs(value - wanted).max() <= tolerance * max(np.abs(wanted).max(), least)


def normal(gpu, seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(gpu.dtype)


def against(gpu, ours, theirs, x, add=None):
    """Forward and backward pass of our layer against one of common.py with the same parameters.

    Twice, the second time with one image less. Returns the gradient behind our ReLU.
    """
    our_leaves = [leaf for leaf in ours.leaves() if leaf.param_names]
    their_leaves = [leaf for leaf in theirs.leaves() if leaf.param_names]
    for leaf in ours.leaves():
        leaf.gpu = gpu
    for our_leaf, their_leaf in zip(our_leaves, their_leaves, strict=True):
        for i, name in enumerate(their_leaf.param_names):
            value = getattr(their_leaf, name)
            value += np.random.default_rng(i).standard_normal(value.shape).astype(value.dtype) / 10
            setattr(our_leaf, name, gpu.put(value))
            setattr(our_leaf, "d" + name, gpu.put(np.full_like(value, np.nan)))
        for name in their_leaf.buffer_names:
            setattr(our_leaf, name, gpu.put(getattr(their_leaf, name)))
    relu = getattr(ours, "relu", False) is True

    for n in (len(x), max(1, len(x) - 1)):
        wanted = theirs.forward(x[:n])
        if add is None:
            out = ours.forward(gpu.put(x[:n]))
        else:
            out = ours.forward(gpu.put(x[:n]), gpu.put(add[:n]))
            wanted = wanted + add[:n]
        if relu:
            wanted = np.maximum(wanted, 0)
        assert_close(gpu, out, wanted)

        passed = gpu.get(out) > 0
        dout = normal(gpu, 100 + n, *wanted.shape)
        dx = ours.backward(gpu.put(dout))
        masked = dout * passed if relu else dout
        assert_close(gpu, dx, theirs.backward(masked))
        for our_grad, their_grad in zip(ours.grads(), theirs.grads(), strict=True):
            # sums of so many values, which cancel
            assert_close(gpu, our_grad, their_grad, least=math.sqrt(dout.size))
        for our_buffer, their_buffer in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert_close(gpu, our_buffer, their_buffer)
    return masked


@pytest.mark.parametrize(
    ("shape", "c_out", "k", "s", "p"),
    [
        ((3, 7, 9, 5), 6, 3, 1, 1),
        ((2, 8, 8, 4), 33, 3, 2, 1),
        ((4, 9, 5, 3), 2, 1, 2, 0),
        ((2, 6, 7, 2), 3, 5, 3, 2),
        ((130, 4, 4, 2), 3, 3, 1, 1),
    ],
)
def test_im2col_is_conv2d(gpu, shape, c_out, k, s, p):
    ours, theirs = (
        layer(shape[3], c_out, k, s, p, bias=False, rng=0, dtype=gpu.dtype)
        for layer in (gpu_scratch.GpuConv2D, common.Conv2D)
    )
    against(gpu, ours, theirs, normal(gpu, 1, *shape))


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (67, 4, 4, 5)])
def test_im2col_relu_pool(gpu, shape):
    ours, theirs = (
        layer(shape[3], 34, rng=0, dtype=gpu.dtype)
        for layer in (gpu_scratch.GpuConvReLUPool, common.ConvReLUPool)
    )
    against(gpu, ours, theirs, normal(gpu, 1, *shape))


@pytest.mark.parametrize(
    ("shape", "c_out"), [((3, 8, 12, 5), 6), ((2, 4, 4, 33), 7), ((64, 8, 8, 3), 2)]
)
def test_winograd(gpu, shape, c_out):
    ours, theirs = (
        layer(shape[3], c_out, bias=False, rng=0, dtype=gpu.dtype)
        for layer in (gpu_scratch.GpuWinogradConv2D, common.WinogradConv2D)
    )
    against(gpu, ours, theirs, normal(gpu, 1, *shape))
    extra = normal(gpu, 2, *shape)
    dout = normal(gpu, 3, *shape[:3], c_out)
    x = normal(gpu, 1, *shape)
    theirs.forward(x)
    ours.forward(gpu.put(x))
    assert_close(gpu, ours.backward(gpu.put(dout), gpu.put(extra)), theirs.backward(dout) + extra)


@pytest.mark.parametrize(("shape", "c_out"), [((3, 8, 12, 5), 6), ((2, 4, 4, 33), 7)])
def test_winograd_relu_pool(gpu, shape, c_out):
    ours, theirs = (
        layer(shape[3], c_out, rng=0, dtype=gpu.dtype)
        for layer in (gpu_scratch.GpuWinogradReLUPool, common.WinogradReLUPool)
    )
    against(gpu, ours, theirs, normal(gpu, 1, *shape))


@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (3, 8, 8, 40), (33, 8, 8, 3)])
@pytest.mark.parametrize(("relu", "add"), [(False, False), (True, False), (True, True)])
def test_norm(gpu, shape, relu, add):
    ours, theirs = (
        gpu_scratch.GpuBatchNorm2D(shape[3], relu, dtype=gpu.dtype),
        common.BatchNorm2D(shape[3], dtype=gpu.dtype),
    )
    x = 3 * normal(gpu, 1, *shape) + 20  # a mean far from zero, where E x² - (E x)² would fail
    added = normal(gpu, 2, *shape) if add else None
    masked = against(gpu, ours, theirs, x, added)
    assert_close(gpu, ours.dadd, masked) if add else None
    ours.training = theirs.training = False
    wanted = theirs.forward(x) + (added if add else 0)
    out = ours.forward(gpu.put(x), gpu.put(added) if add else None)
    assert_close(gpu, out, np.maximum(wanted, 0) if relu else wanted)


@pytest.mark.parametrize(("channels", "stride"), [((4, 4), 1), ((4, 6), 2), ((4, 6), 1)])
def test_block(gpu, channels, stride):
    ours, theirs = (
        layer(*channels, stride, rng=0, dtype=gpu.dtype)
        for layer in (gpu_scratch.GpuBasicBlock, common.BasicBlock)
    )
    against(gpu, ours, theirs, normal(gpu, 1, 3, 8, 8, channels[0]))


def test_average_and_dense(gpu):
    against(gpu, gpu_scratch.GpuGlobalAvgPool(), common.GlobalAvgPool(), normal(gpu, 1, 3, 4, 5, 7))
    for relu in (False, True):
        ours = gpu_scratch.GpuDense(50, 37, relu, rng=0, dtype=gpu.dtype)
        against(gpu, ours, common.Dense(50, 37, rng=0, dtype=gpu.dtype), normal(gpu, 1, 70, 50))


@pytest.mark.parametrize("seed", range(6))
def test_layers_of_random_shapes(gpu, seed):
    """Sizes that no author has chosen: images, tiles of height and width, channels, windows."""
    rng = np.random.default_rng(seed)
    n, rows, columns, c, c_out = map(int, rng.integers(1, [9, 4, 4, 40, 40]))
    k, stride = int(rng.choice([1, 3, 5])), int(rng.integers(1, 4))
    padding = int(rng.integers(k // 2, 3))
    x = normal(gpu, seed, n, 4 * rows, 4 * columns, c)
    for ours, theirs, *options in (
        (gpu_scratch.GpuConv2D, common.Conv2D, k, stride, padding),
        (gpu_scratch.GpuWinogradConv2D, common.WinogradConv2D),
    ):
        ours, theirs = (
            layer(c, c_out, *options, bias=False, rng=seed, dtype=gpu.dtype)
            for layer in (ours, theirs)
        )
        against(gpu, ours, theirs, x)
    for ours, theirs in (
        (gpu_scratch.GpuConvReLUPool, common.ConvReLUPool),
        (gpu_scratch.GpuWinogradReLUPool, common.WinogradReLUPool),
    ):
        ours, theirs = (layer(c, c_out, rng=seed, dtype=gpu.dtype) for layer in (ours, theirs))
        against(gpu, ours, theirs, x)
    against(
        gpu,
        gpu_scratch.GpuBatchNorm2D(c, dtype=gpu.dtype),
        common.BatchNorm2D(c, dtype=gpu.dtype),
        x,
    )
    against(gpu, gpu_scratch.GpuGlobalAvgPool(), common.GlobalAvgPool(), x)
    ours = gpu_scratch.GpuDense(c, c_out, relu=bool(seed % 2), rng=seed, dtype=gpu.dtype)
    theirs = common.Dense(c, c_out, rng=seed, dtype=gpu.dtype)
    against(gpu, ours, theirs, normal(gpu, seed, 16 * n, c))


def test_a_value_that_is_not_a_number_passes_the_relu(gpu):
    """A training that diverges is stopped by its loss, which must show it."""
    x = np.full((1, 4, 4, 2), np.nan, gpu.dtype)
    convs = (
        layer(2, 3, dtype=gpu.dtype)
        for layer in (gpu_scratch.GpuConvReLUPool, gpu_scratch.GpuWinogradReLUPool)
    )
    for layer in (*convs, gpu_scratch.GpuBatchNorm2D(2, relu=True, dtype=gpu.dtype)):
        layer.gpu = gpu
        for name in (*layer.param_names, *layer.buffer_names):
            setattr(layer, name, gpu.put(getattr(layer, name)))
        assert np.isnan(gpu.get(layer.forward(gpu.put(x)))).all()


@pytest.mark.parametrize("n", [1, 30, 700])
def test_loss_gradient_and_counts(gpu, n):
    rng = np.random.default_rng(n)
    logits = (20 * normal(gpu, n, n, 10)).round(0)  # with ties
    labels = rng.integers(10, size=n, dtype=np.int32)
    logits[0] = 0
    loss, wanted = common.softmax_cross_entropy(logits, labels)
    dlogits, sums = gpu.loss(gpu.put(logits), gpu.put(labels))
    assert_close(gpu, dlogits, wanted)
    counts = common.count_correct(logits, labels)
    assert gpu.start_read(sums)()[1:] == list(counts)
    assert gpu.start_read(sums)()[0] == pytest.approx(loss, rel=1e-5)
    gpu.loss(gpu.put(logits), gpu.put(labels), sums)
    assert gpu.start_read(sums)() == pytest.approx(
        [2 * value for value in (loss, *counts)], rel=1e-5
    )


def test_images_are_loaded_augmented_and_normalised(gpu):
    images, labels, *_ = common.make_synthetic(60)
    labels = labels.astype(np.int32)
    drawn = common.draw_augmentation(60, 1, 1)
    index = np.random.default_rng(0).permutation(60)[:41].astype(np.int32)
    cpu = gpu_scratch.Cpu(gpu.dtype)
    for aug_params in (None, drawn):
        wanted, wanted_labels = cpu.load(images, labels, index, aug_params)
        on_gpu = [None if a is None else gpu.put(a) for a in (images, labels, index, aug_params)]
        x, y = gpu.load(*on_gpu)
        assert_close(gpu, x, wanted)
        assert gpu.get(y).tolist() == wanted_labels.tolist()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--momentum", "0", "--weight-decay", "0.01"),
        ("--optimizer", "adam"),
        ("--optimizer", "adam", "--weight-decay", "0.01"),
    ],
)
def test_optimizers(gpu, options):
    args = gpu_scratch.parse_args(list(options))
    theirs = common.Model([common.Dense(301, 3, rng=0, dtype=gpu.dtype)])
    ours = gpu_scratch.GpuModel([gpu_scratch.GpuDense(301, 3, rng=0, dtype=gpu.dtype)])
    ours.to_device(gpu)
    their_optimizer = common.make_optimizer(theirs, args)
    our_optimizer = gpu.make_optimizer(ours, args)
    for step in range(4):
        theirs.grads[...] = normal(gpu, step, theirs.grads.size)
        ours.grads[...] = gpu.put(theirs.grads)
        our_optimizer.step(7)
        their_optimizer.step(7)
    assert_close(gpu, ours.params, theirs.params)
    assert our_optimizer.steps == their_optimizer.steps == 4
    for name, array in their_optimizer.state.items():
        assert_close(gpu, our_optimizer.state[name], array)


def test_a_state_goes_to_the_host_and_back(gpu):
    """To a checkpoint and from it, and to common.py's model and optimizer of the same form."""
    args = gpu_scratch.parse_args(["--optimizer", "adam"])
    layers = [
        gpu_scratch.GpuConv2D(2, 3, bias=False, rng=0, dtype=gpu.dtype),
        gpu_scratch.GpuBatchNorm2D(3, dtype=gpu.dtype),
    ]
    model = gpu_scratch.GpuModel(layers)
    model.to_device(gpu)
    optimizer = gpu.make_optimizer(model, args)
    model.forward(gpu.put(normal(gpu, 0, 2, 4, 4, 2)))  # moves the running statistics
    model.grads[...] = gpu.put(normal(gpu, 1, model.grads.size))
    optimizer.step(2)
    saved = {**model.state_dict(), **optimizer.state_dict()}
    assert all(type(array) is np.ndarray for array in saved.values())

    theirs = common.Model(
        [
            common.Conv2D(2, 3, bias=False, dtype=gpu.dtype),
            common.BatchNorm2D(3, dtype=gpu.dtype),
        ]
    )
    their_optimizer = common.make_optimizer(theirs, args)
    theirs.load_state_dict(saved)
    their_optimizer.load_state_dict(saved)
    assert their_optimizer.steps == 1

    optimizer.step(2)
    model.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    again = {**model.state_dict(), **optimizer.state_dict()}
    theirs_again = {**theirs.state_dict(), **their_optimizer.state_dict()}
    assert saved.keys() == again.keys() == theirs_again.keys()
    for name, array in saved.items():
        assert array.tobytes() == again[name].tobytes() == theirs_again[name].tobytes(), name


@pytest.mark.parametrize(
    ("name", "steps", "batch", "n_test", "image_shape", "classes"),
    [
        ("cnn", 8, 9, 3, (32, 32, 3), 10),
        ("cnn", 2, 9, 3, (28, 28, 1), 10),  # MNIST's size, which Winograd's tiles do not divide
        ("cnn", 2, 4, 3, (16, 24, 3), 300),  # more classes than a byte counts
        pytest.param("resnet18", 1, 2, 1, (32, 32, 3), 10, marks=pytest.mark.slow),
        pytest.param("resnet18", 1, 2, 1, (28, 28, 1), 3, marks=pytest.mark.slow),
    ],
)
def test_networks_train_as_those_of_common(
    make_kernels, name, steps, batch, n_test, image_shape, classes
):
    """In float64: the same initial weights, losses, counts, final weights and evaluation."""
    data = other_data(50, n_test, image_shape, classes)
    results = []
    for device in (gpu_scratch.Cpu("float64"), make_kernels("float64")):
        on_device = device.put_data(data)
        model = device.make_model(name, 0, data.image_shape, len(data.classes))
        optimizer = device.make_optimizer(model, gpu_scratch.parse_args(["--lr", "0.001"]))
        before = device.get(model.params).copy()
        aug_params = device.put(common.draw_augmentation(50, 0, 1))
        sums = []
        for step in range(steps):
            index = np.random.default_rng(step).permutation(50)[:batch].astype(np.int32)
            images = (on_device.x_train, on_device.y_train)
            x, labels = device.load(*images, device.put(index), aug_params)
            result = gpu_scratch.train_step(device, model, optimizer, x, labels)
            sums.append(device.start_read(result)())
        confusion = np.zeros((classes, classes), int)
        evaluated = gpu_scratch.evaluate(device, model, on_device, 2, confusion)[:3]
        labels = np.bincount(data.y_test, minlength=classes)
        assert confusion.sum(axis=1).tolist() == labels.tolist()
        assert confusion.trace() == round(evaluated[1] * n_test)
        buffers = np.concatenate([[0.0], *(device.get(array) for array in model.buffers())])
        results.append((before, sums, evaluated, device.get(model.params), buffers))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-9, atol=1e-10)


def other_data(n, n_test, image_shape, classes):
    """A Dataset of random images of another size, with a mean and deviation of its own."""
    data = common.Dataset(*common.make_synthetic(n, n_test=n_test), "synthetic", "")
    if image_shape == common.IMAGE_SHAPE:
        return data
    rng = np.random.default_rng(0)
    channels = image_shape[2]
    return data._replace(
        x_train=rng.integers(256, size=(n, *image_shape), dtype=np.uint8),
        y_train=rng.integers(classes, size=n, dtype=np.uint16),
        x_test=rng.integers(256, size=(n_test, *image_shape), dtype=np.uint8),
        y_test=rng.integers(classes, size=n_test, dtype=np.uint16),
        classes=tuple(f"class {k}" for k in range(classes)),
        mean=tuple(0.5 + 0.01 * c for c in range(channels)),
        std=tuple(0.3 - 0.02 * c for c in range(channels)),
    )


def test_the_warm_up_changes_nothing(make_kernels):
    """It trains, which reserves memory; a second one of the same sizes needs no more."""
    device = make_kernels("float32")
    args = gpu_scratch.parse_args(["--batch-size", "4", "--optimizer", "adam"])
    data = device.put_data(common.Dataset(*common.make_synthetic(10), "synthetic", ""))
    model = device.make_model("cnn", 0)
    optimizer = device.make_optimizer(model, args)
    states = []
    places = []
    for _ in range(2):
        states.append({**model.state_dict(), **optimizer.state_dict()})
        steps = gpu_scratch.make_steps(device, model, optimizer, data, args)
        assert steps.keys() == {4, 2}
        places.append({key: id(array) for key, array in device.workspaces.items()})
    states.append({**model.state_dict(), **optimizer.state_dict()})
    assert places[0]
    assert places[0] == places[1]
    for name in states[0]:
        assert states[0][name].tobytes() == states[2][name].tobytes(), name


def test_every_kernel_has_been_tested(request):
    """The tests above have launched all kernels that there are, if all of them were run."""
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler, g++")
    of_kernels = set()
    for name, test in globals().items():
        if name.startswith("test_") and {"gpu", "make_kernels"} & {
            *inspect.signature(test).parameters
        }:
            of_kernels.add(name)
    if not of_kernels <= {item.originalname for item in request.session.items}:
        pytest.skip("only when all tests of kernels are run")
    assert CxxGpu.launched == SIGNATURES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nvrtc_compiles_the_kernels(dtype):
    """NVIDIA's compiler, which needs no GPU: for T4, A100 and H100, without register spills."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # CuPy has one of its own for a library that is not there
        pytest.skip(f"needs CuPy and NVRTC, of requirements-gpu.txt: {error}".splitlines()[0])
    for arch in (75, 80, 90):
        program = nvrtc.createProgram(gpu_scratch.kernel_source(dtype), "kernels.cu", [], [])
        options = [f"--gpu-architecture=sm_{arch}", "--std=c++14", "--ptxas-options=-v"]
        try:
            nvrtc.compileProgram(program, options)
        finally:
            log = nvrtc.getProgramLog(program)
        assert "warning" not in log
        spilled = set(re.findall(r"(\d+) bytes spill", log))
        assert spilled == {"0"}


def column_major(
    _, ta, tb, m, n, k, alpha, a, lda, stride_a, b, ldb, stride_b, beta, c, ldc, stride_c, count
):
    """BLAS's gemm as its documentation defines it: matrices are stored column by column."""

    def matrix(address, rows, columns, leading, stride, i):
        size = leading * (columns - 1) + rows
        start = ctypes.cast(address + 8 * i * stride, ctypes.POINTER(ctypes.c_double))
        flat = np.ctypeslib.as_array(start, (size,))
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), (8, 8 * leading))

    one, zero = (ctypes.cast(p, ctypes.POINTER(ctypes.c_double))[0] for p in (alpha, beta))
    assert (one, zero) == (1, 0)
    for i in range(count):
        A = matrix(a, k, m, lda, stride_a, i).T if ta else matrix(a, m, k, lda, stride_a, i)
        B = matrix(b, n, k, ldb, stride_b, i).T if tb else matrix(b, k, n, ldb, stride_b, i)
        matrix(c, m, n, ldc, stride_c, i)[...] = A @ B


@pytest.mark.parametrize("stack", [(), (1,), (4,)])
@pytest.mark.parametrize(("ta", "tb"), [(False, False), (True, False), (False, True)])
def test_matrix_products_are_asked_for_as_blas_understands_them(stack, ta, tb):
    """The arguments that go to cuBLAS, with BLAS's conventions in its place."""

    class Array(np.ndarray):
        data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))

    def single(*args):
        *start, a, lda, b, ldb, beta, c, ldc = args
        column_major(*start, a, lda, 0, b, ldb, 0, beta, c, ldc, 0, 1)

    cublas = gpu_scratch.Cublas.__new__(gpu_scratch.Cublas)
    cublas.handle = None
    cublas.alpha = np.ones(1)
    cublas.beta = np.zeros(1)
    cublas.single = single
    cublas.batched = column_major

    rng = np.random.default_rng(0)
    a = rng.standard_normal((*stack, *((5, 3) if ta else (3, 5))))
    b = rng.standard_normal((*stack, *((2, 5) if tb else (5, 2))))
    out = np.full((*stack, 3, 2), np.nan)
    cublas.gemm(a.view(Array), b.view(Array), out.view(Array), ta, tb)
    wanted = (a.swapaxes(-1, -2) if ta else a) @ (b.swapaxes(-1, -2) if tb else b)
    np.testing.assert_allclose(out, wanted)


# --------------------------------------------------------------------------------------------------
# The script without a GPU
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(run_script, cache):
    return lambda *args, env=None, **expected: run_script(
        SCRIPT, *args, env={**cache, **(env or {})}, **expected
    )


@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    """An empty folder to call main() in."""
    monkeypatch.chdir(tmp_path)
    for name, folder in cache.items():
        monkeypatch.setenv(name, str(folder))
    return tmp_path


def words(line, *more):
    return [*line.split(), *map(str, more)]


# 30 and 8 steps.
STEPS = {
    "cnn": "--dataset synthetic --subset 150 --batch-size 10 --epochs 2 --dtype float64".split(),
    "resnet18": (
        "--dataset synthetic --subset 8 --batch-size 1 --epochs 1 --dtype float64 --model resnet18"
    ).split(),
}


@pytest.mark.parametrize("line", usage_lines(REPO / SCRIPT))
def test_documented_commands_are_accepted(line):
    assert gpu_scratch.parse_args(shlex.split(line)[2:])


@pytest.mark.slow
def test_memory_stays_flat_on_numpy(run, tmp_path):
    run(*words("--device cpu --dataset synthetic --subset 300 --batch-size 60 --epochs 10"))
    ram = numbers(read_log(tmp_path / LOG), "ram_mb", kind=0)
    assert len(ram) == 10
    assert ram[9] - ram[0] < 20


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("cnn", ()),
        ("cnn", ("--augment", "on")),
        pytest.param("resnet18", (), marks=pytest.mark.slow),
    ],
)
def test_on_numpy_it_is_serial_cnn(run, serial, tmp_path, name, same):
    run(*STEPS[name], *same, "--device", "cpu", "--checkpoint", "run.npz")
    reference = serial(*STEPS[name], *same)
    assert_same_weights(tmp_path / "run.npz", reference / "run.npz", 1e-10)
    ours = read_log(tmp_path / LOG)
    theirs = read_log(reference / "results/serial_cnn.csv")
    assert [row["type"] for row in ours] == [row["type"] for row in theirs]
    assert sum(row["type"] == "2" for row in ours) == {"cnn": 30, "resnet18": 8}[name]
    for column in ("value1", "value2", "loss"):
        assert numbers(ours, column) == pytest.approx(numbers(theirs, column), abs=2e-6)


@pytest.mark.parametrize(
    "scripts",
    [
        pytest.param((SCRIPT, "serial_cnn.py"), marks=pytest.mark.slow),
        ("serial_cnn.py", SCRIPT),
    ],
)
def test_it_and_serial_cnn_continue_each_others_checkpoints(here, serial, scripts):
    mains = {SCRIPT: gpu_scratch.main, "serial_cnn.py": serial_cnn.main}
    for script, options in zip(scripts, (["--epochs", "1"], ["--resume"]), strict=True):
        device = ["--device", "cpu"] if script == SCRIPT else []
        mains[script]([*STEPS["cnn"], *device, "--checkpoint", "run.npz", *options])
    assert_same_weights(here / "run.npz", serial(*STEPS["cnn"]) / "run.npz", 1e-10)


def test_checkpoints_of_other_recipes_are_refused(here):
    """Also of one that this script has no option for."""
    gpu_scratch.main([*TINY, *words("--device cpu --augment on --checkpoint run.npz")])
    line = refused(serial_cnn.main, *TINY, "--checkpoint", "run.npz", "--resume")
    assert "augment on" in line
    serial_cnn.main([*TINY, *words("--schedule cosine --checkpoint cosine.npz")])
    line = refused(gpu_scratch.main, *TINY, *words("--device cpu --checkpoint cosine.npz --resume"))
    assert "schedule cosine" in line


def test_auto_without_a_gpu_says_so_in_one_line(here, capsys):
    if not NO_GPU:
        pytest.skip("needs a machine without a GPU")
    gpu_scratch.main([*TINY, *words("--device auto --graph --tf32 on --quiet")])
    stderr = capsys.readouterr().err
    assert re.fullmatch(r"Training on the CPU with NumPy: [^\n]+\n(warning: BLAS[^\n]+\n)?", stderr)
    metadata = json.loads((here / METADATA).read_text())
    assert (metadata["device"], metadata["tf32"], metadata["graph"]) == ("cpu", "off", False)


def test_cuda_without_a_gpu_names_what_is_missing(run, tmp_path):
    if not NO_GPU:
        pytest.skip("needs a machine without a GPU")
    done = run(*TINY, "--device", "cuda", status=2)
    assert_one_error_line(done.stderr)
    missing = "driver" if find_spec("cupy") else "requirements-gpu.txt"
    assert missing in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("cupy", "message"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'cupy'\", name='cupy')",
            "CuPy is not installed",
        ),
        (
            "raise ImportError('libcudart is\\n missing')",
            "CuPy cannot be imported (libcudart is missing)",
        ),
    ],
)
def test_a_missing_or_broken_cupy_is_one_line(here, monkeypatch, cupy, message):
    """A stand-in for the package, since a machine has only one state of it."""
    (here / "cupy.py").write_text(cupy)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(here)
    line = refused(gpu_scratch.main, *TINY, "--device", "cuda")
    assert message in line
    assert not (here / "results").exists()


def test_no_driver_and_no_cupy_are_both_named(monkeypatch):
    """Who has no GPU should not install CuPy first to be told so."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert gpu_scratch.missing_for_gpu().startswith("CuPy is not installed")

    def not_there(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", not_there)
    missing = gpu_scratch.missing_for_gpu()
    assert missing.startswith("no NVIDIA driver is found, and CuPy is not installed")


def test_the_uuid_of_a_gpu_may_have_zero_bytes(monkeypatch):
    """A stand-in for the driver's library. NVML writes UUIDs so."""

    def cuDeviceGetUuid(octets, number):
        octets[:] = range(number, number + 16)
        return 0

    monkeypatch.setattr(
        ctypes, "CDLL", lambda name: SimpleNamespace(cuDeviceGetUuid=cuDeviceGetUuid)
    )
    assert gpu_scratch.gpu_uuid(0) == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


@pytest.mark.parametrize("option", ["--graph", "--tf32 on"])
def test_what_only_a_gpu_can_do_is_refused_on_a_cpu(here, option):
    line = refused(gpu_scratch.main, *TINY, "--device", "cpu", *option.split())
    assert option.split()[0] in line
    assert not (here / "results").exists()


def test_augmentation_changes_the_images_and_is_reproducible(here):
    losses = []
    for augment in ("off", "on", "on"):
        gpu_scratch.main([*TINY, *words("--device cpu --quiet --augment"), augment])
        losses.append(numbers(read_log(here / LOG), "loss"))
    assert losses[1] == losses[2]
    assert losses[0] != losses[1]


def test_a_trace_shows_the_layers(here):
    options = "--dataset synthetic --subset 300 --epochs 1 --device cpu --quiet --trace trace.json"
    gpu_scratch.main(options.split())
    events = json.loads((here / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {"0 ConvReLUPool forward", "0 ConvReLUPool backward"} <= names


@pytest.mark.slow
def test_interrupted_and_resumed_it_is_the_same_run(tmp_path, cache):
    options = words(
        "--dataset synthetic --subset 600 --batch-size 20 --epochs 2 --device cpu --augment on "
        "--checkpoint run.npz"
    )
    for name in ("whole", "resumed"):
        folder = tmp_path / name
        folder.mkdir()
        resume = []
        if name == "resumed":
            process = start_stopping(folder, SCRIPT, *options, when=before_batch(1, 20), env=cache)
            send(process, signal.SIGINT)
            finish(process, status=130)
            resume = ["--resume"]
        finish(start(folder, SCRIPT, *options, *resume, env=cache))
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", "gpu_scratch")


class Lagging(gpu_scratch.Cpu):
    """NumPy that claims to work behind the host's back, as a GPU does."""

    asynchronous = True

    def start_read(self, sums):
        return sums.copy().tolist


@pytest.mark.parametrize("when", ["signal", "time"])
def test_nothing_is_saved_while_a_step_is_on_its_way(here, when):
    """Batches are counted one behind, but a checkpoint has the weights of those that it counts."""
    options = "--batch-size 10 --epochs 1 --quiet --log log.csv --checkpoint run.npz"
    every = 0 if when == "time" else 1000
    args = gpu_scratch.parse_args(words(options, "--checkpoint-every", every))
    data = common.Dataset(*common.make_synthetic(50), "synthetic", "")
    device = Lagging("float64")
    model = device.make_model("cnn", 0)
    optimizer = device.make_optimizer(model, args)
    log = common.RunLog(args, gpu_scratch.__file__, data)
    counted = []

    class Recording(common.Checkpoint):
        def save(self):
            counted.append((log.batch or 5, optimizer.steps))
            super().save()

    checkpoint = Recording(args, log, model, optimizer)
    stop = common.StopSignal()

    def step(x, labels, timed):
        if when == "signal" and optimizer.steps == 2:
            stop.requested = "SIGTERM"
        return gpu_scratch.train_step(device, model, optimizer, x, labels, timed)

    ends = contextlib.nullcontext()
    if when == "signal":
        ends = pytest.raises(common.Interrupted)
    with ends, log:
        gpu_scratch.train(device, model, optimizer, data, args, log, checkpoint, stop, {10: step})
    assert counted
    assert all(batches == steps for batches, steps in counted)
    if when == "signal":
        assert counted == [(3, 3)]
    else:
        assert counted == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (5, 5)]


@pytest.mark.parametrize(
    ("smi", "message"),
    [
        (
            "echo '| Driver Version: 470.82.01    CUDA Version: 11.4     |'",
            "driver is for CUDA 11, CUDA 12 is needed",
        ),
        ('[ "$1" = -L ]', "nvidia-smi, which tells its CUDA version, does not run"),
        ("echo '| Driver Version: 550.54.15    CUDA Version: 12.4     |'", None),
    ],
)
def test_make_setup_brings_cupy_if_the_driver_is_new_enough(tmp_path, smi, message):
    """Stand-ins for nvidia-smi and for Python, which notes its arguments and installs nothing."""
    python = (
        "#!/bin/sh\n"
        '[ "$1$2" = -mvenv ] && mkdir -p .venv/bin && cp "$0" .venv/bin/python\n'
        'echo "$@" >> asked\n'
    )
    for name, text in {"nvidia-smi": f"#!/bin/sh\n{smi}\n", "python3": python}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("Makefile", "requirements.txt", "requirements-gpu.txt"):
        shutil.copy(REPO / name, tmp_path)
    done = subprocess.run(
        ["make", f"BASE_PYTHON={tmp_path}/python3", "setup"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=script_environment(PATH=f"{tmp_path}:{os.environ['PATH']}"),
    )
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text()
    assert "-r requirements.txt" in asked
    assert ("-r requirements-gpu.txt" in asked) == (message is None)
    assert (message or "") in done.stderr
    assert ("No CuPy" in done.stderr) == bool(message)


# --------------------------------------------------------------------------------------------------
# The script on a GPU
# --------------------------------------------------------------------------------------------------


def on_gpu(test):
    for mark in ON_GPU:
        test = mark(test)
    return test


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_200_steps_on_a_gpu_are_those_on_numpy(run, tmp_path, name):
    options = words(
        "--dataset synthetic --subset 800 --batch-size 4 --epochs 1 --lr 0.001 --dtype float64 "
        "--augment on --model",
        name,
    )
    for device in ("cpu", "cuda"):
        run(*options, "--device", device, "--checkpoint", f"{device}.npz", timeout=600)
    assert_same_weights(tmp_path / "cuda.npz", tmp_path / "cpu.npz", 1e-6)


@on_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_a_graph_changes_nothing(run, tmp_path, name, optimizer):
    """Bit for bit the same weights, an incomplete last batch included."""
    options = words(
        "--dataset synthetic --subset 500 --batch-size 64 --epochs 2 --device cuda --model",
        name,
        "--optimizer",
        optimizer,
    )
    run(*options, "--checkpoint", "launched.npz")
    run(*options, "--graph", "--checkpoint", "captured.npz")
    launched = read_npz(tmp_path / "launched.npz")
    captured = read_npz(tmp_path / "captured.npz")
    for key in launched.keys() - {"meta"}:
        assert captured[key].tobytes() == launched[key].tobytes(), key


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("graph", [(), ("--graph",)])
def test_a_gpu_learns_in_float32_and_its_memory_stays_flat(run, tmp_path, graph):
    options = words(
        "--dataset synthetic --subset 20000 --batch-size 64 --epochs 10 --device cuda", *graph
    )
    run(*options, timeout=600)
    rows = read_log(tmp_path / LOG)
    totals = json.loads((tmp_path / METADATA).read_text())["totals"]
    memory = numbers(rows, "gpu_mem_mb", kind=0)
    assert max(memory[1:]) - memory[1] < 20
    ram = numbers(rows, "ram_mb", kind=0)
    assert ram[9] - ram[1] < 50
    assert all(0 <= use <= 100 for use in numbers(rows, "gpu_percent", kind=0))
    assert 0 < totals["gpu_arrays_mb"] <= totals["gpu_pool_mb"]
    assert totals["best_accuracy"] > 0.5


@on_gpu
def test_tf32_is_recorded_and_rounds(run, tmp_path):
    losses = []
    for tf32 in ("off", "on"):
        run(*TINY, "--device", "cuda", "--tf32", tf32)
        assert json.loads((tmp_path / METADATA).read_text())["tf32"] == tf32
        losses.append(numbers(read_log(tmp_path / LOG), "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
