"""Train the CNN data-parallel over MPI ranks: each rank computes a shard of every batch.

The gradients of all ranks are summed and divided once by the number of images in the global batch,
so any number of ranks follows the run of serial_cnn.py with that batch size. How they are summed is
a ladder: --reduce chooses the rung.

    allreduce   one blocking Allreduce after the backward pass: AllreduceReducer, below
    ring        an allreduce of our own, by messages in a ring: RingReducer, below
    overlap     each layer's slice while the layers below compute: OverlapReducer in common.py
    shared      in memory that the ranks of a machine share: SharedMemoryReducer in common.py
    auto        shared where the ranks of a machine can, else overlap; the default

    mpirun -np 2 python parallel_cnn_mpi.py
    mpirun -np 2 python parallel_cnn_mpi.py --reduce allreduce --epochs 2 --subset 5000
    mpirun -np 4 python parallel_cnn_mpi.py --epochs 10 --batch-size 32
    mpirun -np 2 python parallel_cnn_mpi.py --global-batch-size 64 --no-overlap
    python parallel_cnn_mpi.py --checkpoint results/mpi.ckpt.npz

Result: the CNN on 2 ranks, 32 images each: 5,928 images/s, 1.88 (1.43–2.01) times serial_cnn.py's
3,190 on one core (AMD EPYC; median (min–max) of 11 paired samples). With a global batch of 32, 10
epochs on all of CIFAR-10 take 126 s; the best test accuracy, in epoch 3, is 67.43%.
"""

import math
import sys

import numpy as np
from mpi4py import MPI

from common import (
    MODELS,
    Checkpoint,
    OverlapReducer,
    RunLog,
    SharedMemoryReducer,
    StopSignal,
    abort_on_exception,
    add_mpi_options,
    assert_replicas_identical,
    blas_warning,
    check_launcher,
    choose_reduce,
    collective,
    collective_run,
    count_correct,
    epoch_order,
    evaluate,
    gather_from_all,
    gather_trace,
    limit_blas_threads,
    load_batch,
    load_data_collectively,
    log_communication,
    make_model,
    make_optimizer,
    make_parser,
    require_finite,
    run_main,
    save_and_stop,
    shard,
    softmax_cross_entropy,
)

# --------------------------------------------------------------------------------------------------
# Where the ranks meet: the first rungs of the ladder
# --------------------------------------------------------------------------------------------------


class AllreduceReducer:
    """Rung 1: when all gradients are complete, sum them over the ranks in one call."""

    name = "allreduce"
    shards = None  # the slices of the weights that this rank updates: all

    def __init__(self, comm, model):
        self.comm = comm
        self.total = model.grads

    def start(self, grad_slice):
        """Called in the backward pass when a layer's gradients are complete: nothing to do yet."""

    def wait(self):
        self.comm.Allreduce(MPI.IN_PLACE, self.total)

    def finish(self):
        """Called after the update: every rank has updated all weights itself."""


class RingReducer(AllreduceReducer):
    """Rung 2: an allreduce of our own, to see what is inside.

    Patarasuk and Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations",
    2009. The gradients are cut into one chunk for each of the p ranks. In p - 1 steps every rank
    sends a chunk to its right neighbour and adds the one that comes from the left (reduce-scatter);
    then each rank has one chunk of the total. In p - 1 further steps the totals go around
    (allgather). Each rank sends 2 (p - 1) / p of the gradients, however many ranks there are; it
    costs 2 (p - 1) latencies.
    """

    name = "ring"

    def __init__(self, comm, model):
        super().__init__(comm, model)
        chunks = [shard(len(self.total), rank, comm.size) for rank in range(comm.size)]
        self.chunks = [self.total[chunk] for chunk in chunks]
        self.received = np.empty_like(self.chunks[0])  # the first chunk is the largest

    def wait(self):
        rank = self.comm.rank
        size = self.comm.size
        right = (rank + 1) % size
        left = (rank - 1) % size

        # Sendrecv sends and receives at once. If all ranks called Send first, and the messages did
        # not fit into MPI's buffers, all would wait for ever for somebody to receive.
        for step in range(size - 1):  # reduce-scatter
            outgoing = self.chunks[(rank - step) % size]
            target = self.chunks[(rank - step - 1) % size]
            received = self.received[: len(target)]
            self.comm.Sendrecv(outgoing, right, recvbuf=received, source=left)
            target += received

        for step in range(size - 1):  # allgather
            outgoing = self.chunks[(rank + 1 - step) % size]
            target = self.chunks[(rank - step) % size]
            self.comm.Sendrecv(outgoing, right, recvbuf=target, source=left)


REDUCERS = ("allreduce", "ring", "overlap", "shared")


def make_reducer(comm, model, optimizer, args):
    """The reducer that --reduce names. All leave the same weights on every rank."""
    name = choose_reduce(args, comm)
    if name == "allreduce":
        return AllreduceReducer(comm, model)
    if name == "ring":
        return RingReducer(comm, model)
    if name == "overlap":
        return OverlapReducer(comm, model, args.overlap)
    if name == "shared":
        return SharedMemoryReducer(comm, model, optimizer, args.overlap)
    raise ValueError(f"--reduce {name}: make_reducer has no branch for it")


# --------------------------------------------------------------------------------------------------
# The network, the same on every rank
# --------------------------------------------------------------------------------------------------


def make_network(args, image_shape, classes):
    """The network that --model names, for images (H, W, C).

    An own network: return Model([...]) with a list of its layers here.
    """
    return make_model(args.model, args.seed, np.dtype(args.dtype), image_shape, classes)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def train(model, optimizer, data, args, log, checkpoint, stop, comm, reducer):
    """Train until epoch args.epochs is done, from where the log's position is.

    The log's "communication" is the time in MPI, waiting for slower ranks included.
    """
    n = len(data.y_train)
    batches = math.ceil(n / args.global_batch_size)

    def reduce_slice(grad_slice):  # backward() calls it as soon as a layer's gradients are complete
        with log.timed("communication", grad_slice):
            reducer.start(grad_slice)

    def gather(array):  # batch normalisation needs the statistics of the global batch
        with log.timed("communication"):
            return gather_from_all(comm, array)

    model.gather_statistics(gather)
    log.trace_layers(model)

    for epoch in range(log.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        log.start_epoch(epoch, batches)
        for batch in range(log.batch, batches):
            with log.timed("loading"):
                # The same order on all ranks; each takes its shard of the batch, perhaps none.
                index = order[batch * args.global_batch_size : (batch + 1) * args.global_batch_size]
                own_index = index[shard(len(index), comm.rank, comm.size)]
                x, labels = load_batch(
                    data.x_train, data.y_train, own_index, args.dtype, data.mean, data.std
                )

            with log.timed("forward"):
                logits = model.forward(x)
                loss, dlogits = softmax_cross_entropy(logits, labels)

            # Loss, correct answers and whether a rank was sent a signal, summed over the ranks: a
            # few bytes that travel during the backward pass.
            sums = np.array(
                [loss, *count_correct(logits, labels), bool(stop.requested)], np.float64
            )
            with log.timed("communication"):
                request = comm.Iallreduce(MPI.IN_PLACE, sums)

            with log.timed("backward"):
                model.backward(dlogits, on_grad_ready=reduce_slice)

            with log.timed("communication"):
                reducer.wait()
                request.Wait()

            with log.timed("update"):
                optimizer.step(len(index), reducer.total, reducer.shards)

            with log.timed("communication"):
                reducer.finish()

            loss, top1, top5, stop_requests = sums.tolist()
            log.end_batch(len(index), loss, int(top1), int(top5))
            require_finite(loss, "loss", log)
            if stop_requests:
                save_and_stop(checkpoint, log, stop)
            if checkpoint.due():
                checkpoint.save()

        assert_replicas_identical(model, comm, epoch)
        log_communication(log, comm)
        log.end_training()
        test = shard(len(data.y_test), comm.rank, comm.size)
        loss, top1, top5, loading = evaluate(
            model,
            data.x_test[test],
            data.y_test[test],
            reduce=lambda sums: comm.Allreduce(MPI.IN_PLACE, sums),
            mean=data.mean,
            std=data.std,
            confusion=log.confusion,
        )
        log.end_epoch(loss, top1, top5, loading)
        require_finite(loss, "validation loss", log)
        checkpoint.save()


def parse_args(argv=None):
    parser = make_parser(__file__, __doc__, MODELS)
    add_mpi_options(parser, REDUCERS)
    args = parser.parse_args(argv)
    if args.global_batch_size is None:
        args.global_batch_size = args.batch_size * MPI.COMM_WORLD.size
    return args


def main(argv=None):
    comm = MPI.COMM_WORLD
    abort_on_exception(comm)
    check_launcher(comm)
    args = parse_args(argv)
    limit_blas_threads(1)
    warning = blas_warning()
    if warning and comm.rank == 0:
        print(warning, file=sys.stderr)

    data = load_data_collectively(args, comm)
    model = make_network(args, data.image_shape, len(data.classes))
    optimizer = make_optimizer(model, args)
    reducer = make_reducer(comm, model, optimizer, args)

    info = {"ranks": comm.size, "reduce": reducer.name}
    log = collective(comm, lambda: RunLog(args, __file__, data, info, comm.rank))
    checkpoint = Checkpoint(args, log, model, optimizer, comm.rank)
    if args.resume:
        collective(comm, lambda: checkpoint.load() if comm.rank == 0 else None)
    stop = StopSignal()

    # Overflows need no warning: the run stops at the first loss that is not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        with collective_run(log, checkpoint, stop, model, optimizer, comm):
            train(model, optimizer, data, args, log, checkpoint, stop, comm, reducer)
            gather_trace(log, comm)
            log.finish()


if __name__ == "__main__":
    run_main(main, MPI.COMM_WORLD.rank)
