"""Exercise 4: asynchronous SGD with a parameter server."""

import time

import numpy as np
from mpi4py import MPI

from common import (
    SGD,
    InputError,
    abort_on_exception,
    epoch_order,
    evaluate,
    limit_blas_threads,
    load_batch,
    load_data_collectively,
    make_model,
    make_parser,
    run_main,
    softmax_cross_entropy,
)


def serve(comm, model, optimizer):
    """Rank 0: send each worker the weights. Then, until all workers are done: take a gradient from
    whichever worker is first, call optimizer.step(images, gradient), and send that worker the new
    weights."""
    # TODO


def work(comm, model, batches):
    """The other ranks: receive the weights. Then for each (x, labels) of the batches: compute the
    gradient, send it with the number of images, receive the new weights."""
    # TODO


def own_batches(data, args, comm):
    """The batches of this worker: the workers deal out the images of each epoch."""
    for epoch in range(1, args.epochs + 1):
        order = epoch_order(len(data.y_train), args.seed, epoch)
        own = order[comm.rank - 1 :: comm.size - 1]
        for start in range(0, len(own), args.batch_size):
            yield load_batch(data.x_train, data.y_train, own[start : start + args.batch_size])


def main():
    comm = MPI.COMM_WORLD
    abort_on_exception(comm)
    args = make_parser(__file__, __doc__, epochs=1).parse_args()
    if comm.size < 2:
        raise InputError("a server and at least one worker: mpirun -np 2 python my_server.py")
    limit_blas_threads(1)
    data = load_data_collectively(args, comm)
    model = make_model(args.model, args.seed)
    if comm.rank:
        work(comm, model, own_batches(data, args, comm))
        return
    started = time.perf_counter()
    serve(comm, model, SGD(model, args.lr, args.momentum))
    rate = args.epochs * len(data.y_train) / (time.perf_counter() - started)
    _, accuracy, _, _ = evaluate(model, data.x_test, data.y_test)
    print(f"{comm.size - 1} workers: test accuracy {accuracy:.1%}, {rate:,.0f} images/s")


if __name__ == "__main__":
    run_main(main, MPI.COMM_WORLD.rank)
