"""Check a solution of a lab sheet in docs/exercises.md: one line says right, or wrong and where.

    python experiments/check_exercise.py 3 my_ring.py

Exit status: 0 right, 1 wrong, 2 not checked: there is no such file or compiler. What the solution
prints comes before the line. No check depends on the speed of the machine, except that a solution
must be done within --timeout seconds.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import json
import linecache
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import trace
import traceback
import types
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # common.py is at the top level
import common

THREADS = 4  # of Numba
SIGNATURE = "void transpose(int rows, int cols, const float *in, float *out)"


class Wrong(Exception):  # noqa: N818 (not an error of this program)
    """The solution is wrong: one line that says where."""


def expect(condition, message):
    if not condition:
        raise Wrong(message)


def compare(what, value, expected, tolerance=1e-9):
    """Raise Wrong, which names the worst entry, unless value and expected agree."""
    expect(value is not None, f"{what} is None: is a return missing?")
    value = np.asarray(value)
    expected = np.asarray(expected)
    shapes = f"{value.shape}, {expected.shape} is expected"
    expect(value.shape == expected.shape, f"{what} has the shape {shapes}")
    error = np.abs(value - expected) / max(np.abs(expected).max(), 1e-30)
    worst = np.unravel_index(error.argmax(), error.shape)
    place = f"[{', '.join(map(str, worst))}]" if worst else ""
    values = f"{value[worst]:.6g}, {expected[worst]:.6g} is expected"
    expect(error[worst] <= tolerance, f"{what}{place} is {values}")  # NaN is wrong too


# --------------------------------------------------------------------------------------------------
# The checks. Each raises Wrong, or returns what is right.
# --------------------------------------------------------------------------------------------------


def check_layer(solution):
    """1. Gradient check of a layer"""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 5))
    layer = solution.PReLU(5, dtype=np.float64)
    layer.a[...] = (0.1, 0.2, 0.3, -0.4, 1.5)
    compare("forward(x)", layer.forward(x), np.where(x > 0, x, layer.a * x))
    common.check_gradient(layer, x)  # a ValueError names the worst entry

    # In a model the layer's arrays are views into flat ones: an array of its own would not train.
    model = common.Model([common.Dense(4, 5, rng=0), solution.PReLU(5)])
    out = model.forward(rng.standard_normal((6, 4)).astype(np.float32))
    expect(out.dtype == np.float32, f"from float32 forward() makes {out.dtype}")
    model.backward(np.ones_like(out))
    return "its gradients agree with central differences, and it trains in a model"


def count_lines(function, *args):
    """How many lines of Python function(*args) executes."""
    tracer = trace.Trace(count=True, trace=False)
    tracer.runfunc(function, *args)
    return sum(tracer.results().counts.values())


def check_im2col(solution):
    """2. From loops to im2col"""
    rng = np.random.default_rng(0)
    for size, k, dilation in ((6, 3, 1), (7, 3, 2), (9, 5, 2), (8, 3, 3)):
        x = rng.standard_normal((2, size, size + 1, 3))
        dout = rng.standard_normal((2, size, size + 1, 4))
        layer = solution.DilatedConv2D(3, 4, k, dilation, rng=0, dtype=np.float64)
        layer.b[...] = rng.standard_normal(4)

        # The same as a larger kernel with zeros in between.
        reach = dilation * (k - 1) + 1
        same = common.Conv2D(3, 4, reach, 1, layer.padding, dtype=np.float64)
        same.W.fill(0)
        same.W[::dilation, ::dilation] = layer.W
        same.b[...] = layer.b

        what = f"with kernel {k} and dilation {dilation}"
        compare(f"{what} forward(x)", layer.forward(x), same.forward(x))
        dx = layer.backward(dout)
        expected_dx = same.backward(dout)
        compare(f"{what} dW", layer.dW, same.dW[::dilation, ::dilation])
        compare(f"{what} db", layer.db, same.db)
        compare(f"{what} dx", dx, expected_dx)

    lines = []
    for size in (8, 16):
        x = rng.standard_normal((2, size, size, 3))
        layer = solution.DilatedConv2D(3, 3, rng=0, dtype=np.float64)
        lines.append(count_lines(layer.forward, x) + count_lines(layer.backward, x))
    counts = f"{lines[0]} lines of Python run for 8×8 positions, {lines[1]} for 16×16"
    expect(lines[1] <= 1.1 * lines[0], f"right, but there is a loop over the positions: {counts}")
    return "the same as a convolution with zeros in its kernel, without a loop over positions"


class CheckedComm:
    """A communicator of which a sheet allows some calls only; counts them, and the numbers sent.

    Send waits until the message is received, as MPI does with messages too large for its buffers.
    """

    def __init__(self, comm, *allowed):
        self._comm = comm
        self.rank = comm.rank
        self.size = comm.size
        self.calls = dict.fromkeys(allowed, 0)
        self.numbers = 0

    def __getattr__(self, name):
        allowed = " and ".join(f"comm.{call}" for call in self.calls)
        expect(name in self.calls, f"comm.{name} is used: do it with {allowed} alone")
        self.calls[name] += 1
        return self._send if name == "Send" else getattr(self._comm, name)

    def _send(self, buf, dest, tag=0):
        self.numbers += np.asarray(buf).size
        self._comm.Ssend(buf, dest, tag)


def check_ring(solution, world):
    """3. Ring allreduce"""
    for size in range(1, world.size + 1):
        comm = world.Split(world.rank < size, world.rank)
        for n in (1, 12, 1003) if world.rank < size else ():
            arrays = np.random.default_rng(n).integers(-99, 99, (size, n)).astype(np.float64)
            array = arrays[comm.rank].copy()
            ring = CheckedComm(comm, "Send", "Recv")
            solution.ring_allreduce(ring, array)

            what = f"{size} ranks, {n} numbers: rank {comm.rank}"
            compare(f"{what}: array", array, arrays.sum(axis=0))
            most = 2 * (size - 1)
            sent = f"sends {ring.numbers} numbers in {ring.calls['Send']} messages"
            needed = f"a ring of chunks needs {most * math.ceil(n / size)} in {most} at most"
            is_least = ring.calls["Send"] <= most and ring.numbers <= most * math.ceil(n / size)
            expect(is_least, f"{what} {sent}, {needed}")
    return f"the sum on 1 to {world.size} ranks, in 2 (p - 1) messages of a p-th each; no deadlock"


def tiny_model(seed=0):
    layers = [common.Dense(4, 5, rng=seed, dtype=np.float64), common.ReLU()]
    return common.Model([*layers, common.Dense(5, 3, rng=9, dtype=np.float64)])


def tiny_batches(rank, count):
    rng = np.random.default_rng([rank, count])
    for i in range(count):
        n = 2 + i % 3
        yield rng.standard_normal((n, 4)), rng.integers(3, size=n)


def set_gradient(model, x, labels):
    _, dlogits = common.softmax_cross_entropy(model.forward(x), labels)
    model.backward(dlogits)


class RecordingSGD(common.SGD):
    """Notes the images and gradients of each update, and all versions of the weights."""

    def step(self, count, grads=None, shards=None):
        self.updates.append((count, np.array(self.model.grads if grads is None else grads)))
        super().step(count, grads, shards)
        self.versions.append(self.model.params.copy())


def worker_batches(world):
    """Five batches. Worker 2 is slow: it begins when worker 1 has done all of its own."""
    if world.rank == 2:
        world.recv(source=1)
    yield from tiny_batches(world.rank, 5)
    if world.rank == 1:
        world.send(None, 2)


def check_server(solution, world):
    """4. Parameter server"""
    model = tiny_model(world.rank)  # a worker's own weights are not the server's
    if world.rank > 0:
        solution.work(world.Dup(), model, worker_batches(world))
    else:
        optimizer = RecordingSGD(model, lr=0.1)
        optimizer.updates = []
        optimizer.versions = [model.params.copy()]
        solution.serve(world.Dup(), model, optimizer)
        judge_updates(optimizer.updates, optimizer.versions)
    return "each gradient is applied once, and a slow worker holds up nobody"


def judge_updates(updates, versions):
    """Find the batch and the version of the weights that explain each update of the server."""
    explained = []  # (worker, batch, images, version, gradient)
    model = tiny_model()
    for worker in (1, 2):
        for batch, (x, labels) in enumerate(tiny_batches(worker, 5)):
            for version, params in enumerate(versions):
                model.params[...] = params
                set_gradient(model, x, labels)
                explained.append((worker, batch, len(x), version, model.grads.copy()))

    done = set()  # (worker, batch)
    newest = {1: 0, 2: 0}  # the version of the weights with each worker's last gradient in it
    for i, (count, grads) in enumerate(updates):
        found = [e for e in explained if np.allclose(grads, e[-1], rtol=1e-9, atol=1e-12)]
        unknown = "its gradient is not that of a batch with weights that the server has had"
        expect(found, f"update {i}: {unknown}")
        worker, batch, images, version, _ = found[0]
        what = f"update {i}, of worker {worker} with batch {batch}:"
        expect(count == images, f"{what} step({count}) for {images} images")
        expect((worker, batch) not in done, f"{what} it was done before")
        expect(version >= newest[worker], f"{what} computed without the worker's update before it")
        done.add((worker, batch))
        newest[worker] = i + 1
    expect(len(done) == 10, f"the server makes {len(done)} updates for 10 batches")


def check_local_sgd(solution, world):
    """5. Local SGD"""
    for steps, period in ((6, 3), (7, 3), (4, 1), (5, 8)):
        what = f"{steps} steps, period {period}:"
        comm = CheckedComm(world, "Allreduce")
        model = tiny_model()
        optimizer = common.SGD(model, lr=0.1, momentum=0)
        solution.local_sgd(comm, model, optimizer, tiny_batches(world.rank, steps), period)
        compare(f"{what} params", model.params, simulate_local_sgd(world.size, steps, period))
        calls = comm.calls["Allreduce"]
        expected = math.ceil(steps / period)
        expect(calls == expected, f"{what} {calls} calls of Allreduce, {expected} are expected")
    return f"the weights of a simulation of {world.size} ranks, one Allreduce a period"


def simulate_local_sgd(ranks, steps, period):
    model = tiny_model()
    mean = model.params.copy()
    batches = [list(tiny_batches(rank, steps)) for rank in range(ranks)]
    for start in range(0, steps, period):
        results = []
        for own_batches in batches:
            model.params[...] = mean
            for x, labels in own_batches[start : start + period]:
                set_gradient(model, x, labels)
                model.params -= 0.1 / len(labels) * model.grads
            results.append(model.params.copy())
        mean = np.mean(results, axis=0)
    return mean


LOG_ROWS = """
2,1,0,2.0,30,2,2,2.0,10.0,,,,,12,14,6.0
0,1,0,2.0,30,0.4,0.9,2.0,10.0,,,,,12,14,6.0
1,1,0,1.0,7,0.5,0.9,1.5,20.0,,,,,,,
2,2,0,0.5,5,1,2,1.1,30.0,,,,,1.5,2.5,0.1
2,2,0,1.0,10,2,2,1.0,30.0,,,,,3,5,0.2
0,2,0,1.0,10,0.6,0.9,1.0,30.0,,,,,3,5,0.2
1,2,0,1.0,7,0.5,0.9,1.2,20.0,,,,,,,
"""


def from_logs(function, rates):
    """function(path, ...) of logs with these images/s in the last epoch of training."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{rate}.csv" for rate in rates]
        for path, rate in zip(paths, rates, strict=True):
            rows = LOG_ROWS.replace("0.6,0.9,1.0,30.0", f"0.6,0.9,1.0,{rate}")
            path.write_text(",".join(common.LOG_COLUMNS) + rows)
        return function(*map(str, paths))


def check_alpha_beta(solution):
    """6. The alpha-beta model"""
    sizes = [2**k for k in range(3, 24)]
    fitted = solution.fit(sizes, [4e-5 + 8e-9 * size for size in sizes])
    expect(np.shape(fitted) == (2,), f"fit() returns {fitted}, (alpha, beta) is expected")
    compare("alpha of fit()", fitted[0], 4e-5, 1e-3)
    compare("beta of fit()", fitted[1], 8e-9, 1e-3)
    for ranks, size, expected in ((1, 10**6, 0), (2, 10**6, 0.00202), (16, 64, 0.00030024)):
        seconds = solution.ring_seconds(1e-5, 2e-9, ranks, size)
        compare(f"ring_seconds(1e-5, 2e-9, {ranks}, {size})", seconds, expected)
    seconds = from_logs(solution.logged_seconds, [30.0])
    compare("logged_seconds(): 0.2 s in the 2 steps of the last epoch, so it", seconds, 0.1)
    return "fit, prediction and log"


def check_scaling(solution):
    """7. Amdahl and Gustafson"""
    for share, ranks, amdahl, gustafson in ((0.1, 2, 20 / 11, 1.9), (0.5, 8, 16 / 9, 4.5)):
        compare(f"amdahl({share}, {ranks})", solution.amdahl(share, ranks), amdahl)
        compare(f"gustafson({share}, {ranks})", solution.gustafson(share, ranks), gustafson)
        compare(f"karp_flatt({amdahl:.4f}, {ranks})", solution.karp_flatt(amdahl, ranks), share)
    share = from_logs(solution.serial_share, [30.0])
    compare("serial_share(): 9 of 10 s are loading, forward and backward, so it", share, 0.1)
    speedup = from_logs(solution.speedup, [30.0, 50.0])
    compare("speedup() of 30 and 50 images/s", speedup, 5 / 3)
    return "both laws, Karp and Flatt's share, and the logs"


class SimulatedThreads:
    """Runs a kernel's Python code as if threads saw nothing of each other until the loop ends.

    So a race is found in every run.
    """

    def __init__(self, kernel):
        self.thread = 0
        self.loops = 0
        code = kernel.py_func.__code__
        self.source = "".join(linecache.getlines(code.co_filename))
        names = {
            "prange": self.prange,
            "get_thread_id": lambda: self.thread,
            "get_num_threads": lambda: THREADS,
        }
        self.run = types.FunctionType(code, {**kernel.py_func.__globals__, **names})

    def prange(self, *bounds):
        self.loops += 1
        items = range(*bounds)
        shared = []  # name, array, array before and after the loop, which elements are written
        for name, value in sys._getframe(1).f_locals.items():
            # `total += part` of a whole array is a reduction for Numba: each thread has its own.
            is_reduction = re.search(rf"^\s*{name} \+=", self.source, re.M)
            if isinstance(value, np.ndarray) and not is_reduction:
                is_written = np.zeros(value.shape, bool)
                shared.append((name, value, value.copy(), value.copy(), is_written))

        for self.thread in range(THREADS):  # each takes one contiguous range
            for _, array, before, _, _ in shared:
                array[...] = before
            start = len(items) * self.thread // THREADS
            yield from items[start : len(items) * (self.thread + 1) // THREADS]
            for name, array, before, after, is_written in shared:
                changed = array != before
                for place in np.argwhere(changed & is_written):
                    element = f"{name}[{', '.join(map(str, place))}]"
                    raise Wrong(f"a race: more than one thread writes {element}")
                is_written |= changed
                after[changed] = array[changed]
        for _, array, _, after, _ in shared:
            array[...] = after


def check_race(solution):
    """8. A race in prange"""
    kernel = solution.count_labels
    is_parallel = getattr(kernel, "targetoptions", {}).get("parallel")
    expect(is_parallel, "count_labels is not compiled by @njit(parallel=True)")
    rng = np.random.default_rng(0)
    simulated = SimulatedThreads(kernel)
    for function in (simulated.run, kernel):
        for n, classes in ((40, 10), (3, 20), (1, 1), (500, 2)):
            labels = rng.integers(classes, size=n)
            counts = np.full(classes, -1)
            function(labels, counts)
            compare(f"{n} labels: counts", counts, np.bincount(labels, minlength=classes))
        expect(simulated.loops, "count_labels has no loop over prange: one thread does it all")
    return f"no two of {THREADS} threads write the same element, and the counts are right"


def check_roofline(solution):
    """9. Roofline"""
    for shape in ((32, 16, 16, 32, 64, 3), (1, 8, 6, 3, 5, 1)):
        n, h, w, c_in, c_out, k = shape
        matrix = n * h * w * k * k * c_in
        once = n * h * w * (c_in + c_out) + k * k * c_in * c_out
        compare(f"conv_flops{shape}", solution.conv_flops(*shape), 2 * matrix * c_out)
        compare(f"blocked_bytes{shape}", solution.blocked_bytes(*shape), 4 * once)
        compare(f"im2col_bytes{shape}", solution.im2col_bytes(*shape), 4 * (once + 2 * matrix))
    for intensity, expected in ((0.5, 5e9), (10.0, 1e11), (80.0, 1e11)):
        rate = solution.attainable(intensity, 1e11, 1e10)
        compare(f"attainable({intensity}, 1e11, 1e10)", rate, expected)
    return "operations, bytes and the roof"


PIPELINES = (  # forward, backward, in flight; starts of forward, of backward
    ([1, 1, 1], [2, 2, 2], 1, [0, 3, 6], [1, 4, 7]),
    ([1, 1, 1, 1], [2, 2, 2, 2], 2, [0, 1, 3, 5], [1, 3, 5, 7]),
    ([2, 2, 2], [1, 1, 1], 2, [0, 2, 4], [2, 4, 6]),
    ([3, 1, 4, 1], [2, 7, 1, 8], 2, [0, 3, 5, 12], [3, 5, 12, 13]),
    ([3, 1, 4, 1], [2, 7, 1, 8], 3, [0, 3, 4, 8], [3, 5, 12, 13]),
)


def check_pipeline(solution):
    """10. Pipeline bubbles"""
    for forward, backward, in_flight, forward_starts, backward_starts in PIPELINES:
        what = f"schedule({forward}, {backward}, {in_flight})"
        result = solution.schedule(forward, backward, in_flight)
        expect(np.shape(result)[:1] == (2,), f"{what} returns {result}, two lists are expected")
        forwards = np.stack([forward_starts, np.add(forward_starts, forward)], axis=1)
        backwards = np.stack([backward_starts, np.add(backward_starts, backward)], axis=1)
        compare(f"{what}: forward", result[0], forwards)
        compare(f"{what}: backward", result[1], backwards)
        last = backwards[-1, 1]
        shares = (1 - sum(forward) / last, 1 - sum(backward) / last)
        found = solution.idle_shares(forwards.tolist(), backwards.tolist())
        compare(f"idle_shares(*{what})", found, shares)
    return "schedules and idle shares"


def check_kernel(solution):
    """11. A CUDA kernel, compiled as C++: see cuda_as_cpp.h"""
    expect(SIGNATURE in solution.KERNEL, f"the first line of KERNEL has to be: {SIGNATURE}")
    tracked = SIGNATURE.replace("const float *", "Pointer ").replace("float *", "Pointer ")
    source = solution.KERNEL.replace('extern "C"', "").replace(SIGNATURE, tracked)
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/kernel.so"
        command = f"g++ -O1 -std=c++14 -shared -fPIC -x c++ - -o {library} -include".split()
        command.append(str(ROOT / "experiments/cuda_as_cpp.h"))
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        error = re.search(r"<stdin>:(\d+):\d+: error: (.*)", done.stderr)
        reason = f"line {error[1]}: {error[2]}" if error else done.stderr[:300]
        expect(done.returncode == 0, f"KERNEL cannot be compiled: {reason}")
        run = ctypes.CDLL(library).run

    for rows, cols in ((64, 96), (33, 70), (1, 5), (40, 3)):
        what = f"{rows} × {cols}:"
        matrix = np.arange(1, rows * cols + 1, dtype=np.float32).reshape(rows, cols)
        out = np.zeros((cols, rows), np.float32)
        touched = np.full((-(-rows // 32), -(-cols // 32), 2, 32, 32), -1, np.int32)
        for y, x in np.ndindex(touched.shape[:2]):  # blocks
            arrays = (matrix, out, touched[y, x])
            pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
            different = run(x, y, rows, cols, *pointers)
            expect(not different, f"{what} not all threads of a block come to __syncthreads()")
        expect(-2 not in touched, f"{what} a thread touches an element outside of the matrix")
        compare(f"{what} out", out, matrix.T)
        for i, verb in enumerate(("read", "write")):
            elements = touched[:, :, i]
            both = (elements[..., 1:] >= 0) & (elements[..., :-1] >= 0)
            distance = abs(np.diff(elements))[both].max(initial=1)
            slow = f"out is right, but neighbouring threads {verb} elements {distance} apart"
            expect(distance == 1, f"{what} {slow}: a warp is fast where they are neighbours")
    return "run as C++: right at the borders too, and a warp reads and writes neighbours"


class FakeStore:
    """Objects of which the first `released` arrive, damaged the first `damaged` times."""

    def __init__(self, count, released, damaged=0):
        self.data = [f"shard {i}".encode() for i in range(count)]
        self.entries = []  # with the names that ManifestEntry in train_cifar.py has
        for i, data in enumerate(self.data):
            digest = hashlib.sha256(data).hexdigest()
            entry = types.SimpleNamespace(name=f"{i}.bin", size=len(data), sha256=digest)
            self.entries.append(entry)
        self.released = released
        self.asked = [0] * count
        self.damaged = damaged

    def get(self, entry):
        i = self.entries.index(entry)
        self.asked[i] += 1
        while i >= self.released:  # it is on its way
            time.sleep(0.001)
        return b"garbage" if self.asked[i] <= self.damaged else self.data[i]


def check_s3(solution):
    """12. Loading from S3"""
    for damaged in (2, 99):
        store = FakeStore(1, 1, damaged)
        result = []
        try:
            result += solution.load_shards(store.get, store.entries, 1)
        except Exception as error:
            result = str(error)
        is_right = result == store.data if damaged == 2 else "0.bin" in result
        what = f"an object that arrives damaged {damaged} times is fetched {store.asked[0]} times"
        wanted = "3 times are expected, then its bytes or an error that names it"
        expect(is_right and store.asked == [3], f"{what} and gives {result}: {wanted}")

    for ahead in (0, 2):
        store = FakeStore(6, released=0)
        shards = iter(solution.load_shards(store.get, store.entries, ahead))
        try:
            for i in range(6):
                store.released = i + 1
                expect(next(shards, None) == store.data[i], f"ahead={ahead}: shard {i} is wrong")
                wanted = min(i + ahead + 1, 6)
                deadline = time.monotonic() + 5
                while sum(store.asked) < wanted and time.monotonic() < deadline:
                    time.sleep(0.001)
                time.sleep(0.02)  # so that what is asked for too early shows
                counts = f"{sum(store.asked)} shards have been asked for, {wanted} are expected"
                message = f"ahead={ahead}: while the caller works on shard {i}, {counts}"
                expect(sum(store.asked) == wanted, message)
        finally:
            store.released = 6  # so that no thread waits for ever
        expect(next(shards, None) is None, "there are more shards than entries")
    return "in order, as far ahead as asked, and damaged objects are fetched again"


# --------------------------------------------------------------------------------------------------
# Running a check
# --------------------------------------------------------------------------------------------------

CHECKS = {
    1: check_layer,
    2: check_im2col,
    3: check_ring,
    4: check_server,
    5: check_local_sgd,
    6: check_alpha_beta,
    7: check_scaling,
    8: check_race,
    9: check_roofline,
    10: check_pipeline,
    11: check_kernel,
    12: check_s3,
}
RANKS = {3: 5, 4: 3, 5: 3}  # of the checks that need MPI


def innermost_line(path, frames):
    """The last of (frame, line) that is in this file: "line 12, comm.Send(…)"; None without one."""
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
    return f"line {lines[-1]}, {linecache.getline(str(path), lines[-1]).strip()}" if lines else None


def judge(exercise, path, *world):
    """Check the solution in this process: ("right", …) or ("wrong", …). world: for MPI."""
    try:
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        solution = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(solution)
        return "right", CHECKS[exercise](solution, *world)
    except Exception as error:
        place = innermost_line(path, traceback.walk_tb(error.__traceback__))
        text = " ".join(str(error).split())
        if not isinstance(error, Wrong) and (place or not text):
            text = f"{type(error).__name__}: {text}"
        return "wrong", ": ".join(filter(None, (path.name, place, text)))


def work(exercise, path, folder, timeout):
    """Check the solution in this process, one of the ranks; the verdict goes into the folder."""
    world = ()
    rank = 0
    if exercise in RANKS:
        from mpi4py import MPI

        world = (MPI.COMM_WORLD,)
        rank = MPI.COMM_WORLD.rank

    def leave(verdict, message):
        (folder / str(rank)).write_text(json.dumps([verdict, message]))

    def give_up():
        frame = sys._current_frames()[threading.main_thread().ident]
        leave("waits", innermost_line(path, list(traceback.walk_stack(frame))[::-1]))
        time.sleep(2)  # the other ranks write too: the first that exits ends the job
        os._exit(1)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    verdict, message = judge(exercise, path, *world)
    timer.cancel()
    leave(verdict, message)
    if verdict == "wrong":
        sys.stdout.flush()
        os._exit(1)  # other ranks may wait for this one: mpirun ends them


def run_check(exercise, path, timeout):
    """Check the solution in processes of its own. Returns the verdict and a message."""
    ranks = RANKS.get(exercise, 1)
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": str(THREADS)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, str(exercise), str(path)]
        command += ["--worker", folder, "--timeout", str(timeout)]
        if ranks > 1:
            command = [common.find_mpirun(), "-np", str(ranks), *command]
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
        verdicts = {int(file.name): json.loads(file.read_text()) for file in Path(folder).iterdir()}

    # mpirun has a banner for processes that end with an error, which these are meant to.
    printed = done.stdout.partition("\n" + 80 * "=")[0].rstrip("\n")
    print(printed, end="\n" if printed else "")
    waits = []
    for rank, (verdict, message) in sorted(verdicts.items()):
        if verdict == "wrong":
            return verdict, message
        if verdict == "waits" and message:
            waits.append(f"rank {rank} in {message}")
    if waits:
        return "wrong", f"{path.name}: not done after {timeout:g} s: {'; '.join(waits)}"
    if len(verdicts) < ranks or done.returncode:
        last_line = done.stderr.strip().rpartition("\n")[2]
        return "wrong", f"{path.name} ended with status {done.returncode}: {last_line}"
    return verdicts[0]


def parse_args(argv=None):
    parser = common.Parser("check_exercise", __doc__)
    add = parser.add_argument
    add("exercise", type=common.number(int, 1, len(CHECKS)), help="number of the lab sheet")
    add("file", type=lambda name: Path(name).resolve(), help="the solution")
    timeout = "seconds that the solution has (default: %(default)s)"
    add("--timeout", type=common.number(float, 1, 10**6), default=60, metavar="S", help=timeout)
    add("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.worker:
        work(args.exercise, args.file, args.worker, args.timeout)
        return 0
    if not args.file.is_file():
        raise common.InputError(f"{args.file} does not exist: docs/exercises/ has the sheet's code")
    if args.exercise == 11 and not shutil.which("g++"):
        raise common.InputError("exercise 11 needs a C++ compiler: there is no g++ in PATH")
    verdict, message = run_check(args.exercise, args.file, args.timeout)
    print(f"{verdict}: {message}", flush=True)
    return 0 if verdict == "right" else 1


if __name__ == "__main__":
    common.run_main(main)
