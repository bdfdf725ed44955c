"""Train the CNN data-parallel over MPI ranks: every rank a share of each batch, the gradients summed over all.

The gradients of all ranks are summed and divided once by the number of images in the global batch, so any number of
ranks follows the run of serial_cnn.py with that batch size. The sum is taken slice by slice while the backward pass
still works on the layers below: the large dense layer first, 98 % of all parameters. --no-overlap waits for each.

    mpirun -np 2 python parallel_cnn_mpi.py
    mpirun -np 4 python parallel_cnn_mpi.py --epochs 10 --batch-size 32
    mpirun -np 2 python parallel_cnn_mpi.py --global-batch-size 64 --no-overlap
    python parallel_cnn_mpi.py --checkpoint results/mpi.ckpt.npz
"""

import contextlib
import hashlib
import math
import os
import socket
import sys
import time
import traceback

import numpy as np
from mpi4py import MPI

from common import (
    InputError,
    Interrupted,
    Run,
    TrainingError,
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


def parse_args(argv=None):
    parser = make_parser("parallel_cnn_mpi", __doc__)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    parser.add_argument("--global-batch-size", type=number(int, 1, 10**6), metavar="N",
                        help="images per step of all ranks together (default: ranks x --batch-size)")  # fmt: skip
    parser.add_argument("--no-overlap", dest="overlap", action="store_false",
                        help="wait for the sum of each slice before the backward pass goes on")  # fmt: skip
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
    model = make_cnn(args.seed, np.dtype(args.dtype))
    optimizer = make_optimizer(model, args)
    with np.errstate(over="ignore", invalid="ignore"):  # run stops at the first loss that is not finite
        run = together(comm, lambda: Run(
            args, "parallel_cnn_mpi", data, lambda: get_arrays(model, optimizer),
            lambda arrays: set_arrays(model, optimizer, arrays), {"ranks": comm.size}, comm.rank,
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
