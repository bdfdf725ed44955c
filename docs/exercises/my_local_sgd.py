"""Exercise 5: local SGD."""

import time

from mpi4py import MPI

from common import (
    SGD,
    abort_on_exception,
    epoch_order,
    evaluate,
    limit_blas_threads,
    load_batch,
    load_data_collectively,
    make_model,
    make_parser,
    run_main,
    shard,
    softmax_cross_entropy,
)


def local_sgd(comm, model, optimizer, batches, period):
    """Train on the (x, labels) of this rank's batches. After every `period` steps replace the
    weights by the mean over the ranks, and once more at the end if steps are left."""
    # TODO


def own_batches(data, args, comm):
    """This rank's shard of each global batch, as in parallel_cnn_mpi.py; only whole batches."""
    size = comm.size * args.batch_size
    for epoch in range(1, args.epochs + 1):
        order = epoch_order(len(data.y_train), args.seed, epoch)
        for start in range(0, len(order) - size + 1, size):
            index = order[start : start + size][shard(size, comm.rank, comm.size)]
            yield load_batch(data.x_train, data.y_train, index)


def main():
    comm = MPI.COMM_WORLD
    abort_on_exception(comm)
    args = make_parser(__file__, __doc__, epochs=1).parse_args()
    limit_blas_threads(1)
    data = load_data_collectively(args, comm)
    for period in (1, 4, 16, 64):
        model = make_model(args.model, args.seed)
        optimizer = SGD(model, args.lr, args.momentum)
        started = time.perf_counter()
        local_sgd(comm, model, optimizer, own_batches(data, args, comm), period)
        seconds = time.perf_counter() - started
        if comm.rank == 0:
            _, accuracy, _, _ = evaluate(model, data.x_test, data.y_test)
            print(f"period {period:2}: test accuracy {accuracy:.1%}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    run_main(main, MPI.COMM_WORLD.rank)
