"""Train the CNN data-parallel over MPI ranks: every rank a share of each batch, the gradients summed over all.

The gradients of all ranks are summed and divided once by the number of images in the global batch, so any number of
ranks follows the run of serial_cnn.py with that batch size. The sum is taken slice by slice while the backward pass
still works on the layers below: the large dense layer first, 98 % of all parameters. --no-overlap waits for each.

    mpirun -np 2 python parallel_cnn_mpi.py
    mpirun -np 4 python parallel_cnn_mpi.py --epochs 10 --batch-size 32
    mpirun -np 2 python parallel_cnn_mpi.py --global-batch-size 64 --no-overlap
    python parallel_cnn_mpi.py --checkpoint results/mpi.ckpt.npz
"""

import math
import os
import sys
import time

import numpy as np
from mpi4py import MPI

from common import (
    MODELS,
    InputError,
    Run,
    add_rank_options,
    blas_warning,
    check_equal,
    check_launcher,
    count_correct,
    epoch_order,
    evaluate,
    get_arrays,
    limit_blas_threads,
    load_batch,
    load_on_all,
    make_model,
    make_optimizer,
    make_parser,
    report_communication,
    run_main,
    running_on_all,
    set_arrays,
    share,
    softmax_cross_entropy,
    stop_all_on_error,
    together,
)


class Reducer:
    """Sums the gradients of all ranks with MPI messages while the backward pass goes on.

    start(part) is called when that slice of model.grads is complete; after wait() `total` has the sums over all ranks,
    and the rank updates the weights; after finish() they are updated on all ranks. start_sums(array) adds up a small
    array in place. overlap=False: start() itself waits. seconds: time spent in these functions so far.
    """

    name = "messages"
    parts = None  # slices that this rank has the sums of, and updates: all

    def __init__(self, comm, model, overlap=True):
        self.comm, self.overlap, self.requests, self.seconds = comm, overlap, [], 0.0
        self.total = model.grads

    def start(self, part):
        started = time.perf_counter()
        self._start(part)
        if not self.overlap:
            self._wait()
        self.seconds += time.perf_counter() - started

    def start_sums(self, sums):
        started = time.perf_counter()
        self.requests.append(self.comm.Iallreduce(MPI.IN_PLACE, sums))
        self.seconds += time.perf_counter() - started

    def wait(self):
        started = time.perf_counter()
        self._wait()
        self.seconds += time.perf_counter() - started

    def finish(self):
        """Each rank has updated all weights itself."""

    def gather(self, array):
        """The arrays of all ranks, stacked, for statistics of the global batch."""
        started = time.perf_counter()
        stacked = np.empty((self.comm.size, *array.shape), array.dtype)
        self.comm.Allgather(array, stacked)
        self.seconds += time.perf_counter() - started
        return stacked

    def _start(self, part):
        self.requests.append(self.comm.Iallreduce(MPI.IN_PLACE, self.total[part]))
        MPI.Request.Testall(self.requests)  # MPI moves data only while one of its functions runs

    def _wait(self):
        MPI.Request.Waitall(self.requests)
        self.requests.clear()


class SharedMemoryReducer(Reducer):
    """The same where ranks share a machine: nothing is sent, and neither sums nor updates are computed twice.

    Weights, optimizer state and all ranks' gradients lie in a window of shared memory: Hoefler et al., "MPI + MPI: a
    new hybrid approach to parallel programming with MPI plus shared memory", 2013. Each rank adds up its share of a
    slice from all ranks' gradients, and updates its share of the weights: Rajbhandari et al., "ZeRO: memory
    optimizations toward training trillion parameter models", 2020. On several machines, which must have equal numbers
    of ranks, each share is summed over the machines by messages before that, all shares at once.
    """

    name = "shared"

    def __init__(self, comm, model, optimizer, overlap=True):
        super().__init__(comm, model, overlap)
        self.machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.same_share = comm.Split(self.machine.rank)  # one rank of each machine
        self.parts = [self._share(part) for part in model.slices]
        dtype, n, private = (
            model.grads.dtype,
            model.grads.size,
            [model.params, *optimizer.slots.values()],
        )
        size = -(-model.grads.nbytes // 64) * 64  # whole cache lines
        mine = (
            size if self.machine.rank else size * (1 + len(private))
        )  # gradients; rank 0 has room for the rest
        self.window = MPI.Win.Allocate_shared(mine, dtype.itemsize, comm=self.machine)
        memory = [self.window.Shared_query(rank)[0] for rank in range(self.machine.size)]
        self.grads = [np.frombuffer(m, dtype, n) for m in memory]
        shared = [
            np.frombuffer(memory[0], dtype, n, offset=size * (1 + i)) for i in range(len(private))
        ]
        self.window.Lock_all(MPI.MODE_NOCHECK)
        for part in self.parts:  # a page of memory is near the rank that first writes to it
            for ours, theirs in zip(shared, private, strict=True):
                ours[part] = theirs[part]
        self.finish()
        model.move(shared[0], self.grads[self.machine.rank])
        optimizer.slots.update(zip(optimizer.slots, shared[1:], strict=True))
        self.summing = []  # slices that this rank has completed, and the request that tells that all ranks have

    def finish(self):
        """Wait until all shares are updated; then nobody reads this rank's gradients any more either."""
        started = time.perf_counter()
        self.window.Sync()
        self.machine.Barrier()
        self.window.Sync()
        self.seconds += time.perf_counter() - started

    def _start(self, part):
        self.window.Sync()  # what this rank wrote is now seen by the others
        self.summing.append((part, self.machine.Ibarrier()))
        while self.summing and self.summing[0][1].Test():
            self._sum()

    def _wait(self):
        while self.summing:
            self.summing[0][1].Wait()
            self._sum()
        super()._wait()

    def _sum(self):
        mine = self._share(self.summing.pop(0)[0])
        self.window.Sync()
        self.total[mine] = self.grads[0][mine]
        for grads in self.grads[1:]:
            self.total[mine] += grads[mine]
        if self.same_share.size > 1:
            self.requests.append(self.same_share.Iallreduce(MPI.IN_PLACE, self.total[mine]))

    def _share(self, part):
        mine = share(part.stop - part.start, self.machine.rank, self.machine.size)
        return slice(part.start + mine.start, part.start + mine.stop)


def make_reducer(comm, model, optimizer, args):
    sizes = comm.allgather(comm.Split_type(MPI.COMM_TYPE_SHARED).size)
    equal = min(sizes) == max(sizes)
    if args.reduce == "shared" and not equal:
        raise InputError(
            "--reduce shared: the machines have different numbers of ranks: use --reduce messages"
        )
    if args.reduce == "shared" or (args.reduce == "auto" and equal and sizes[0] > 1):
        return SharedMemoryReducer(comm, model, optimizer, args.overlap)
    return Reducer(comm, model, args.overlap)


def train_step(model, optimizer, x, labels, count, reducer, stop=None):
    """One step on a global batch of `count` images, x and labels being this rank's share of them, perhaps none.

    Returns [summed loss, top-1, top-5, ranks that want to stop] over all ranks, and this rank's seconds of the forward
    and backward pass, without communication.
    """
    started, waited = time.perf_counter(), reducer.seconds
    logits = model.forward(x)
    loss, dlogits = softmax_cross_entropy(logits, labels)
    forward = time.perf_counter() - (reducer.seconds - waited)
    sums = np.array([loss, *count_correct(logits, labels), bool(stop)], np.float64)
    reducer.start_sums(sums)
    model.backward(dlogits, on_grad_ready=reducer.start)
    backward = time.perf_counter() - (reducer.seconds - waited)
    reducer.wait()
    optimizer.step(count, reducer.total, reducer.parts)
    reducer.finish()
    return sums, forward - started, backward - forward


def train(model, optimizer, data, args, run, reducer, comm):
    """Train for args.epochs epochs on data; everything measured goes to run."""
    n, size = len(data.y_train), args.global_batch_size
    for epoch in range(run.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        run.start_epoch(epoch, math.ceil(n / size))
        for batch in range(run.batch, math.ceil(n / size)):
            started, waited = time.perf_counter(), reducer.seconds
            index = order[batch * size : (batch + 1) * size]
            mine = index[share(len(index), comm.rank, comm.size)]
            x, labels = load_batch(data.x_train, data.y_train, mine, args.dtype)
            loading = time.perf_counter() - started
            sums, forward, backward = train_step(
                model, optimizer, x, labels, len(index), reducer, run.signal
            )
            run.end_batch(
                len(index),
                float(sums[0]),
                int(sums[1]),
                int(sums[2]),
                loading,
                stop=sums[3] > 0,
                forward=forward,
                backward=backward,
                communication=reducer.seconds - waited,
            )
        check_equal(model, comm, epoch)
        report_communication(run, comm)
        run.end_training()
        test = share(len(data.y_test), comm.rank, comm.size)
        run.end_epoch(
            *evaluate(
                model,
                data.x_test[test],
                data.y_test[test],
                reduce=lambda sums: comm.Allreduce(MPI.IN_PLACE, sums),
            ),
            stop=False,
        )


def parse_args(argv=None):
    parser = make_parser("parallel_cnn_mpi", __doc__, MODELS)
    add_rank_options(parser)
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
    limit_blas_threads(1)
    if warning := blas_warning():
        print(warning, file=sys.stderr)
    data = load_on_all(args, comm)
    model = make_model(args.model, args.seed, np.dtype(args.dtype))
    optimizer = make_optimizer(model, args)
    reducer = make_reducer(comm, model, optimizer, args)
    model.gather_statistics(reducer.gather)
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # run stops at the first loss that is not finite
        run = together(
            comm,
            lambda: Run(
                args,
                "parallel_cnn_mpi",
                data,
                lambda: get_arrays(model, optimizer),
                lambda arrays: set_arrays(model, optimizer, arrays),
                {"ranks": comm.size, "reduce": reducer.name},
                comm.rank,
            ),
        )
        with running_on_all(run, model, optimizer, comm):
            train(model, optimizer, data, args, run, reducer, comm)
            run.finish()


if __name__ == "__main__":
    run_main(main)
