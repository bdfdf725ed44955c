"""Train the CNN over MPI ranks × threads: parallel_cnn_mpi.py with layers that share a rank's images among threads.

The layers below are those of common.py as Numba kernels: the loop over the images of a rank's share is a `prange` over
OpenMP threads, and inside it each thread works through an image in buffers of its own, so that nothing but weights and
results leaves its cache. Dense layers and the optimizer are threaded too: 98 % of all parameters are theirs.

    mpirun -np 2 python parallel_cnn_hybrid.py
    mpirun -np 2 python parallel_cnn_hybrid.py --num-threads 4 --epochs 10
    python parallel_cnn_hybrid.py --num-threads 2 --global-batch-size 128
"""

import contextlib
import hashlib
import math
import os
import socket
import sys
import time
import traceback

import numba
import numpy as np
from mpi4py import MPI
from numba import get_thread_id, njit, prange

from common import (
    SGD,
    ConvReLUPool,
    Dense,
    InputError,
    Interrupted,
    Run,
    TrainingError,
    WinogradReLUPool,
    available_cores,
    blas_warning,
    count_correct,
    epoch_order,
    evaluate,
    get_arrays,
    limit_blas_threads,
    load_batch,
    load_cifar10,
    make_cnn,
    make_optimizer,
    make_parser,
    number,
    run_main,
    set_arrays,
    softmax_cross_entropy,
)

# ----------------------------------------------------------------------------------------------------------------------
# Threaded layers. Scratch arrays have a first axis of one entry per thread.
# ----------------------------------------------------------------------------------------------------------------------


@njit(inline="always")
def pool(y0, y1, y2, y3, b, out, won):
    """out = ReLU(max of the four + b), won = which of four was the first maximum, 4 if ReLU is at zero. All (F,)."""
    for f in range(out.size):
        best, k = y0[f], 0
        if y1[f] > best:
            best, k = y1[f], 1
        if y2[f] > best:
            best, k = y2[f], 2
        if y3[f] > best:
            best, k = y3[f], 3
        best += b[f]
        out[f] = max(best, 0)
        won[f] = k if best > 0 else 4


@njit(inline="always")
def unpool(dout, won, dy0, dy1, dy2, dy3, db):
    """The gradient goes to the one of four that was the maximum; db += dout where ReLU is open. All (F,)."""
    for f in range(dout.size):
        d, k = dout[f], won[f]
        dy0[f] = d if k == 0 else 0
        dy1[f] = d if k == 1 else 0
        dy2[f] = d if k == 2 else 0
        dy3[f] = d if k == 3 else 0
        if k < 4:
            db[f] += d


@njit(inline="always")
def im2col(x, col):
    """x (H, W, C) → col (H·W, 9·C), 3×3 windows with padding 1, rows in the order plane, pooling window."""
    height, width, channels = x.shape
    row = 0
    for i in range(2):
        for j in range(2):
            for h in range(i, height, 2):
                for w in range(j, width, 2):
                    at = 0
                    for kh in range(h - 1, h + 2):
                        for kw in range(w - 1, w + 2):
                            inside = 0 <= kh < height and 0 <= kw < width
                            for c in range(channels):
                                col[row, at] = x[kh, kw, c] if inside else 0
                                at += 1
                    row += 1


@njit(parallel=True, cache=True)
def conv_forward(x, W, b, out, won, cols, ys):
    """im2col, product, bias, ReLU and pooling. x (N, H, W, C), W (9·C, F) → out, won (N, H/2, W/2, F)."""
    n, oh, ow, _ = out.shape
    for i in prange(n):
        col, y = cols[get_thread_id()], ys[get_thread_id()]
        im2col(x[i], col)
        np.dot(col, W, y)
        for h in range(oh):
            for w in range(ow):
                row = h * ow + w
                pool(y[row], y[row + oh * ow], y[row + 2 * oh * ow], y[row + 3 * oh * ow], b,
                     out[i, h, w], won[i, h, w])  # fmt: skip


@njit(parallel=True, cache=True)
def conv_backward(x, dout, won, dWs, dbs, cols, ys, products):
    """Adds each image's dW (9·C, F) and db (F,) to its thread's sums."""
    n, oh, ow, _ = dout.shape
    for i in prange(n):
        t = get_thread_id()
        col, dy = cols[t], ys[t]
        for h in range(oh):
            for w in range(ow):
                row = h * ow + w
                unpool(dout[i, h, w], won[i, h, w], dy[row], dy[row + oh * ow], dy[row + 2 * oh * ow],
                       dy[row + 3 * oh * ow], dbs[t])  # fmt: skip
        im2col(x[i], col)
        np.dot(col.T, dy, products[t])
        dWs[t] += products[t]


class ThreadedConvReLUPool(ConvReLUPool):
    """ConvReLUPool for a model's first layer: kernel 3, stride 1, padding 1, even H and W, no dx."""

    def forward(self, x):
        n, h, w, c = x.shape
        f, threads = self.b.size, numba.get_num_threads()
        self.x = x
        self.out = self.scratch("out", (n, h // 2, w // 2, f), x)
        self.won = self.scratch("won", (n, h // 2, w // 2, f), x, dtype=np.uint8)
        self.cols = self.scratch("cols", (threads, h * w, 9 * c), x)
        self.ys = self.scratch("ys", (threads, h * w, f), x)
        conv_forward(x, self.W.reshape(-1, f), self.b, self.out, self.won, self.cols, self.ys)
        return self.out

    def backward(self, dout):
        threads, W = numba.get_num_threads(), self.W.reshape(-1, self.b.size)
        dWs, dbs, products = (self.scratch(name, (threads, *shape), dout)
                              for name, shape in (("dWs", W.shape), ("dbs", self.b.shape), ("products", W.shape)))
        dWs.fill(0)
        dbs.fill(0)
        conv_backward(self.x, dout, self.won, dWs, dbs, self.cols, self.ys, products)
        self.dW[...] = dWs.sum(axis=0).reshape(self.W.shape)
        self.db[...] = dbs.sum(axis=0)


@njit(inline="always")
def gather_tiles(x, tiles):
    """x (H, W, C) → tiles (36, T·C): the 6×6 tiles of x padded by 1, 4 apart."""
    height, width, channels = x.shape
    for i in range(6):
        for j in range(6):
            at = 0
            for h in range(i - 1, height + i - 4, 4):
                for w in range(j - 1, width + j - 4, 4):
                    inside = 0 <= h < height and 0 <= w < width
                    for c in range(channels):
                        tiles[6 * i + j, at] = x[h, w, c] if inside else 0
                        at += 1


@njit(inline="always")
def filter_tiles(tiles, U, B2, A2, V, M, y):
    """Winograd's filtering of one image: tiles (36, T·C) → y (16, T·F); V is set to the transformed tiles."""
    k, c, _ = U.shape
    np.dot(B2, tiles, V)
    for i in range(k):
        np.dot(V[i].reshape(-1, c), U[i], M[i])
    np.dot(A2, M.reshape(k, -1), y)


@njit(parallel=True, cache=True)
def winograd_forward(x, U, B2, A2, b, out, won, Vs, tiles, Ms, ys):
    """x (N, H, W, C), U (36, C, F) → out, won (N, H/2, W/2, F); Vs (N, 36, T·C) is kept for the backward pass."""
    n, oh, ow, channels = out.shape
    for i in prange(n):
        t = get_thread_id()
        gather_tiles(x[i], tiles[t])
        filter_tiles(tiles[t], U, B2, A2, Vs[i], Ms[t], ys[t])
        y = ys[t].reshape(4, 4, oh // 2, ow // 2, channels)
        for h in range(oh):
            for w in range(ow):
                r, c, p, q = 2 * (h % 2), 2 * (w % 2), h // 2, w // 2
                pool(y[r, c, p, q], y[r, c + 1, p, q], y[r + 1, c, p, q], y[r + 1, c + 1, p, q], b,
                     out[i, h, w], won[i, h, w])  # fmt: skip


@njit(parallel=True, cache=True)
def winograd_backward(dout, won, turned, B2, A2, Vs, dx, dUs, dbs, dMs, ys, products, images, tiles, V2s, M2s, y2s):
    """Sets dx (N, H, W, C) and adds each image's dU (36, C, F) and db (F,) to its thread's sums."""
    n, oh, ow, f = dout.shape
    _, height, width, channels = dx.shape
    for i in prange(n):
        t = get_thread_id()
        dy, image = ys[t].reshape(4, 4, oh // 2, ow // 2, f), images[t]
        for h in range(oh):
            for w in range(ow):
                r, c, p, q = 2 * (h % 2), 2 * (w % 2), h // 2, w // 2
                unpool(dout[i, h, w], won[i, h, w], dy[r, c, p, q], dy[r, c + 1, p, q], dy[r + 1, c, p, q],
                       dy[r + 1, c + 1, p, q], dbs[t])  # fmt: skip
                image[2 * h, 2 * w], image[2 * h, 2 * w + 1] = dy[r, c, p, q], dy[r, c + 1, p, q]
                image[2 * h + 1, 2 * w], image[2 * h + 1, 2 * w + 1] = dy[r + 1, c, p, q], dy[r + 1, c + 1, p, q]
        np.dot(A2.T, ys[t], dMs[t].reshape(36, -1))
        for k in range(36):
            np.dot(Vs[i, k].reshape(-1, channels).T, dMs[t, k], products[t])
            dUs[t, k] += products[t]
        gather_tiles(image, tiles[t])
        filter_tiles(tiles[t], turned, B2, A2, V2s[t], M2s[t], y2s[t])
        y = y2s[t].reshape(4, 4, height // 4, width // 4, channels)
        for h in range(height):
            for w in range(width):
                dx[i, h, w] = y[h % 4, w % 4, h // 4, w // 4]


class ThreadedWinogradReLUPool(WinogradReLUPool):
    def forward(self, x):
        n, h, w, c = self.x_shape = x.shape
        f, threads, tiles = self.b.size, numba.get_num_threads(), h // 4 * (w // 4)
        self.B2, self.G2, self.A2 = (np.kron(m, m).astype(x.dtype) for m in (self.BT, self.G, self.AT))
        self.out = self.scratch("out", (n, h // 2, w // 2, f), x)
        self.won = self.scratch("won", (n, h // 2, w // 2, f), x, dtype=np.uint8)
        self.V = self.scratch("V", (n, 36, tiles * c), x)
        self.M, self.y = self.scratch("M", (threads, 36, tiles, f), x), self.scratch("y", (threads, 16, tiles * f), x)
        winograd_forward(x, self._transform_kernel(self.W), self.B2, self.A2, self.b, self.out, self.won, self.V,
                         self.scratch("tiles", (threads, 36, tiles * c), x), self.M, self.y)  # fmt: skip
        return self.out

    def backward(self, dout):
        (_, h, w, c), f, threads, tiles = self.x_shape, self.b.size, numba.get_num_threads(), self.M.shape[2]
        turned = self._transform_kernel(self.W[::-1, ::-1].transpose(0, 1, 3, 2))
        dUs, dbs = self.scratch("dUs", (threads, 36, c, f), dout), self.scratch("dbs", (threads, f), dout)
        dUs.fill(0)
        dbs.fill(0)
        dx = self.scratch("dx", self.x_shape, dout)
        winograd_backward(
            dout, self.won, turned, self.B2, self.A2, self.V, dx, dUs, dbs, self.M, self.y,
            self.scratch("products", (threads, c, f), dout), self.scratch("image", (threads, h, w, f), dout),
            self.scratch("tiles of dy", (threads, 36, tiles * f), dout),
            self.scratch("V of dy", (threads, 36, tiles * f), dout),
            self.scratch("M of dx", (threads, 36, tiles, c), dout),
            self.scratch("y of dx", (threads, 16, tiles * c), dout),
        )  # fmt: skip
        self.dW[...] = (self.G2.T @ dUs.sum(axis=0).reshape(36, -1)).reshape(self.W.shape)
        self.db[...] = dbs.sum(axis=0)
        return dx


@njit(inline="always")
def part(n, t, threads):
    """Thread t's range of n items, as start and stop."""
    return n * t // threads, n * (t + 1) // threads


@njit(parallel=True, cache=True)
def dense_forward(x, W, b, out, threads):
    for t in prange(threads):
        start, stop = part(len(x), t, threads)
        if stop > start:
            np.dot(x[start:stop], W, out[start:stop])
            out[start:stop] += b


@njit(parallel=True, cache=True)
def dense_backward(x, dout, W, dW, dx, x_turned, dx_turned, threads):
    """dW = xᵀ dout and dx = dout Wᵀ, each thread a range of the input features."""
    for t in prange(threads):
        start, stop = part(len(W), t, threads)
        x_turned[start:stop] = x[:, start:stop].T
        np.dot(x_turned[start:stop], dout, dW[start:stop])
        np.dot(W[start:stop], dout.T, dx_turned[start:stop])
        dx[:, start:stop] = dx_turned[start:stop].T


class ThreadedDense(Dense):
    def forward(self, x):
        self.x, out = x, self.scratch("out", (len(x), self.b.size), x)
        dense_forward(x, self.W, self.b, out, numba.get_num_threads())
        return out

    def backward(self, dout):
        (n, features), x = self.x.shape, self.x
        if n == 0:
            return super().backward(dout)
        dx = self.scratch("dx", (n, features), dout)
        x_turned, dx_turned = (np.empty((features, n), dout.dtype) for _ in range(2))
        dense_backward(x, dout, self.W, self.dW, dx, x_turned, dx_turned, numba.get_num_threads())
        dout.sum(axis=0, out=self.db)
        return dx


@njit(parallel=True, cache=True)
def sgd_update(w, g, velocity, scale, lr, momentum, weight_decay):
    for i in prange(w.size):
        velocity[i] = momentum * velocity[i] + (g[i] * scale + weight_decay * w[i])
        w[i] -= lr * velocity[i]


class ThreadedSGD(SGD):
    def step(self, count):
        self.steps += 1
        scalars = (self.model.params.dtype.type(s) for s in (1 / count, self.lr, self.momentum, self.weight_decay))
        sgd_update(self.model.params, self.model.grads, self.slots["velocity"], *scalars)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks, as in parallel_cnn_mpi.py
# ----------------------------------------------------------------------------------------------------------------------


def share(n, rank, size):
    """This rank's slice of n items: the first n % size ranks have one more than the others. It may be empty."""
    start = rank * (n // size) + min(rank, n % size)
    return slice(start, start + n // size + (rank < n % size))


class Reducer:
    """Sums arrays over all ranks, in place, while the caller goes on computing.

    start(array) may be called for one part of the gradients after the other; wait() returns when all sums are there.
    overlap=False: start() itself waits. seconds: time spent in MPI calls so far.
    """

    def __init__(self, comm, overlap=True):
        self.comm, self.overlap, self.requests, self.seconds = comm, overlap, [], 0.0

    def start(self, array):
        started = time.perf_counter()
        if self.overlap:
            self.requests.append(self.comm.Iallreduce(MPI.IN_PLACE, array))
            MPI.Request.Testall(self.requests)  # MPI moves data only while one of its functions runs
        else:
            self.comm.Allreduce(MPI.IN_PLACE, array)
        self.seconds += time.perf_counter() - started

    def wait(self):
        started = time.perf_counter()
        MPI.Request.Waitall(self.requests)
        self.requests.clear()
        self.seconds += time.perf_counter() - started


def train_step(model, optimizer, x, labels, count, reducer, stop=None):
    """One step on a global batch of `count` images, x and labels being this rank's share of them, perhaps none.

    Returns [summed loss, top-1, top-5, ranks that want to stop] over all ranks, and this rank's seconds of the forward
    and backward pass, without communication.
    """
    started, waited = time.perf_counter(), reducer.seconds
    logits = model.forward(x)
    loss, dlogits = softmax_cross_entropy(logits, labels)
    forward = time.perf_counter()
    sums = np.array([loss, *count_correct(logits, labels), bool(stop)], np.float64)
    reducer.start(sums)
    model.backward(dlogits, on_grad_ready=lambda part: reducer.start(model.grads[part]))
    backward = time.perf_counter() - (reducer.seconds - waited)
    reducer.wait()
    optimizer.step(count)
    return sums, forward - started, backward - forward


def train(model, optimizer, data, args, run, comm):
    """Train for args.epochs epochs on data; everything measured goes to run."""
    n, size = len(data.y_train), args.global_batch_size
    reducer = Reducer(comm, args.overlap)
    for epoch in range(run.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        run.start_epoch(epoch, math.ceil(n / size))
        for batch in range(run.batch, math.ceil(n / size)):
            started, waited = time.perf_counter(), reducer.seconds
            index = order[batch * size:(batch + 1) * size]
            mine = index[share(len(index), comm.rank, comm.size)]
            x, labels = load_batch(data.x_train, data.y_train, mine, args.dtype)
            loading = time.perf_counter() - started
            sums, forward, backward = train_step(model, optimizer, x, labels, len(index), reducer, run.signal)
            run.end_batch(len(index), float(sums[0]), int(sums[1]), int(sums[2]), loading, stop=sums[3] > 0,
                          forward=forward, backward=backward, communication=reducer.seconds - waited)  # fmt: skip
        check_equal(model, comm, epoch)
        report_communication(run, comm)
        run.end_training()
        test = share(len(data.y_test), comm.rank, comm.size)
        total = Reducer(comm, overlap=False).start
        run.end_epoch(*evaluate(model, data.x_test[test], data.y_test[test], reduce=total), stop=False)


def report_communication(run, comm):
    """Put the mean over the ranks into the log's column, and least, mean and greatest into the sidecar."""
    seconds = comm.allgather(run.sums.get("communication", 0.0))
    run.sums["communication"] = sum(seconds) / comm.size
    totals = run.totals.setdefault("communication_seconds", {"min": 0.0, "mean": 0.0, "max": 0.0})
    for name, value in (("min", min(seconds)), ("mean", sum(seconds) / comm.size), ("max", max(seconds))):
        totals[name] += value


def check_equal(model, comm, epoch):
    """Raise TrainingError unless all ranks hold the same weights, bit for bit."""
    digests = comm.allgather(hashlib.blake2b(model.params.data, digest_size=16).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise TrainingError(f"after epoch {epoch} the weights of rank {different[0]} are not those of rank 0")


def together(comm, action):
    """Call action() on every rank and return its result; an InputError on any rank is raised on all of them."""
    result, problem = None, None
    try:
        result = action()
    except InputError as error:
        problem = str(error)
    problems = [text for text in comm.allgather(problem) if text]
    if problems:
        raise InputError(problems[0])
    return result


def load_on_all(args, comm):
    """The data on every rank; rank 0 first, which downloads and prepares files that the others then find."""

    def load(dataset):
        return load_cifar10(args.data_dir, dataset, args.subset, args.seed)

    data = together(comm, lambda: None if comm.rank else load(args.dataset))
    name = comm.bcast(data and data.name)
    data = together(comm, lambda: data or load(name))
    found = comm.allgather((socket.gethostname(), data.fingerprint))
    for rank, (host, fingerprint) in enumerate(found):
        if fingerprint != found[0][1]:
            raise InputError(f"rank {rank} on {host} has other data than rank 0: give all hosts the same --data-dir")
    return data


def resume_on_all(run, model, optimizer, comm):
    """Give all ranks what rank 0 has read from the checkpoint."""
    position = (run.epoch, run.batch, run.sums, run.history, run.totals, optimizer.steps)
    run.epoch, run.batch, run.sums, run.history, run.totals, optimizer.steps = comm.bcast(position)
    for array in (model.params, *model.state(), *optimizer.slots.values()):
        comm.Bcast(array)


def check_launcher(comm):
    """Raise InputError if mpirun belongs to another MPI than mpi4py, so that every rank believes that it is alone."""
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS"):
        if comm.size == 1 and int(os.environ.get(name) or 1) > 1:
            library = MPI.Get_library_version().split("\n")[0].strip("\0")
            raise InputError(f"mpirun started {os.environ[name]} ranks, but each is alone: it belongs to another MPI "
                             f"than mpi4py, which uses {library}. Take the mpirun beside python: .venv/bin/mpirun")


def stop_all_on_error(comm):
    """Let an exception on one rank end the job: its traceback, with the rank's number, then MPI_Abort."""

    def hook(kind, error, trace):
        lines = "".join(traceback.format_exception(kind, error, trace))
        lines = "".join(f"[rank {comm.rank}] {line}\n" for line in lines.splitlines())
        print(lines, end="", file=sys.__stderr__, flush=True)
        comm.Abort(1)

    sys.excepthook = hook


def choose_threads(args, comm):
    """Set and return the threads of this rank: no more than its share of the cores it may run on, unless forced."""
    cores, local = len(available_cores()), comm.Split_type(MPI.COMM_TYPE_SHARED).size
    mine = max(1, cores // local)
    asked = args.num_threads or int((os.environ.get("OMP_NUM_THREADS") or "0").partition(",")[0]) or mine
    threads = asked if args.force_threads else min(asked, mine)
    if threads < asked:
        print(f"{threads} threads a rank instead of {asked}: {local} ranks share {cores} cores (--force-threads keeps "
              f"{asked})", file=sys.stderr)  # fmt: skip
    if local * threads > cores:
        print(f"warning: {local} ranks of {threads} threads share {cores} cores: they wait for each other",
              file=sys.stderr)  # fmt: skip
    if threads > numba.config.NUMBA_NUM_THREADS:
        raise InputError(f"{threads} threads: Numba was started with {numba.config.NUMBA_NUM_THREADS}; to force more, "
                         f"set NUMBA_NUM_THREADS={threads} in the environment")
    numba.set_num_threads(threads)
    return threads


def compile_kernels(dtype, comm):
    """Compile all kernels, or load them from Numba's cache, rank 0 first; returns the seconds that it took."""
    import scipy.linalg.cython_blas  # noqa: F401 (Numba's np.dot calls it: load it before its threads are set)

    numba.config.THREADING_LAYER = "omp"
    started = time.perf_counter()
    for turn in (True, False):
        if turn == (comm.rank == 0):
            model = make_model(0, dtype)
            logits = model.forward(np.zeros((2, 32, 32, 3), dtype))
            model.backward(softmax_cross_entropy(logits, np.zeros(2, np.uint8))[1])
            ThreadedSGD(model).step(2)
        comm.Barrier()
    return time.perf_counter() - started


def make_model(seed, dtype):
    return make_cnn(seed, dtype, conv1=ThreadedConvReLUPool, conv2=ThreadedWinogradReLUPool, dense=ThreadedDense)


def parse_args(argv=None):
    parser = make_parser("parallel_cnn_hybrid", __doc__)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    parser.add_argument("--global-batch-size", type=number(int, 1, 10**6), metavar="N",
                        help="images per step of all ranks together (default: ranks x --batch-size)")  # fmt: skip
    parser.add_argument("--no-overlap", dest="overlap", action="store_false",
                        help="wait for the sum of each slice before the backward pass goes on")  # fmt: skip
    parser.add_argument("--num-threads", type=number(int, 1, 1024), metavar="N",
                        help="threads of a rank (default: $OMP_NUM_THREADS, else its share of the cores)")  # fmt: skip
    parser.add_argument("--force-threads", action="store_true", help="even if that is more than its share")
    args = parser.parse_args(argv)
    args.global_batch_size = args.global_batch_size or args.batch_size * MPI.COMM_WORLD.size
    return args


def main(argv=None):
    comm = MPI.COMM_WORLD
    stop_all_on_error(comm)
    check_launcher(comm)
    if comm.rank:  # one rank speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
    args = parse_args(argv)
    threads = together(comm, lambda: choose_threads(args, comm))
    seconds = compile_kernels(np.dtype(args.dtype), comm)
    limit_blas_threads(1)  # of NumPy's and SciPy's: the threads here are Numba's
    if not args.quiet:
        print(f"{comm.size} ranks x {threads} threads; kernels ready after {seconds:.1f} s of compiling", flush=True)
    if warning := blas_warning():
        print(warning, file=sys.stderr)
    data = load_on_all(args, comm)
    model = make_model(args.seed, np.dtype(args.dtype))
    if args.optimizer == "sgd":
        optimizer = ThreadedSGD(model, args.lr, args.momentum, args.weight_decay)
    else:
        optimizer = make_optimizer(model, args)
    with np.errstate(over="ignore", invalid="ignore"):  # run stops at the first loss that is not finite
        run = together(comm, lambda: Run(
            args, "parallel_cnn_hybrid", data, lambda: get_arrays(model, optimizer),
            lambda arrays: set_arrays(model, optimizer, arrays), {"ranks": comm.size, "threads": threads,
            "compile_seconds": seconds, "threading_layer": numba.threading_layer()}, comm.rank,
        ))  # fmt: skip
        resume_on_all(run, model, optimizer, comm)
        try:
            with contextlib.ExitStack() as stack:
                together(comm, lambda: stack.enter_context(run))  # rank 0 opens the log, which may be refused
                train(model, optimizer, data, args, run, comm)
                run.finish()
        except Interrupted as stopped:
            if not args.checkpoint or run.signal == "SIGINT":
                raise
            print(stopped, flush=True)  # SIGTERM is how clusters say that the time is over: no failure
        except OSError as error:  # on this rank alone: the others would wait for ever
            print(f"error: {error}", file=sys.stderr, flush=True)
            comm.Abort(1)


if __name__ == "__main__":
    run_main(main)
