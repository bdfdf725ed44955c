"""Train the CNN data-parallel over MPI ranks: each rank computes a shard of every batch.

The gradients of all ranks are summed and divided once by the number of images in the global batch,
so any number of ranks follows the run of serial_cnn.py with that batch size. How they are summed is
a ladder: --reduce chooses the rung.

    allreduce   one blocking Allreduce after the backward pass: AllreduceReducer, below
    ring        an allreduce of our own, by messages in a ring: RingReducer, below
    overlap     each layer's slice while the layers below compute: OverlapReducer in common.py
    shared      in memory that the ranks of a machine share: SharedMemoryReducer in common.py
    auto        shared where the ranks of a machine can, else overlap; the default

For networks that are too slow for that, three options send less. They are not the serial run any
more: the weights are others, and so is the accuracy. The log says so.

    --compress bf16     gradients of half the bytes: Bf16Reducer, below
    --compress topk     the largest 1 % of the gradients only: TopKReducer, below
    --local-steps K     average the weights after every K-th step only: LocalSGD, below

    mpirun -np 2 python parallel_cnn_mpi.py
    mpirun -np 2 python parallel_cnn_mpi.py --reduce allreduce --epochs 2 --subset 5000
    mpirun -np 4 python parallel_cnn_mpi.py --epochs 10 --batch-size 32
    mpirun -np 2 python parallel_cnn_mpi.py --global-batch-size 64 --no-overlap
    mpirun -np 2 python parallel_cnn_mpi.py --compress topk
    mpirun -np 2 python parallel_cnn_mpi.py --local-steps 16 --compress bf16
    python parallel_cnn_mpi.py --checkpoint results/mpi.ckpt.npz

Result: the CNN on 2 ranks, 32 images each: 2,288 images/s, 1.89 (1.13–2.74) times serial_cnn.py on
one core in the same turns (AMD EPYC; median (min–max) of 11 paired samples). With a global batch of
32, 10 epochs on all of CIFAR-10 take 255 s; the best test accuracy, in epoch 3, is 67.91%.
"""

import contextlib
import faulthandler
import math
import os
import signal
import sys

# (Safety while the ranks start: skip it at a first reading.)
# A rank that ends by itself would leave the others waiting for it for ever. So, until guard_ranks()
# takes over: Ctrl-C kills, since mpirun ends the ranks if a signal has killed one; nobody waits
# more than 120 s in the import of MPI, where all ranks meet; a later import that fails ends all.
if __name__ == "__main__":
    with contextlib.suppress(ValueError):  # raised in a thread, which gets no signals
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.dump_traceback_later(120, exit=True, file=2)
if os.environ.get("SLURM_MPI_TYPE") == "pmi2":
    # srun --mpi=pmi2 cannot hand on the long addresses of UCX; those of MPICH's OFI are short.
    os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
from mpi4py import MPI

faulthandler.cancel_dump_traceback_later()


def end_all_ranks(*error):
    sys.__excepthook__(*error)
    MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    sys.excepthook = end_all_ranks

import numpy as np

from common import (
    MODELS,
    Checkpoint,
    InputError,
    OverlapReducer,
    RunLog,
    SharedMemoryReducer,
    StopSignal,
    abort_on_exception,
    add_mpi_options,
    add_recipe_options,
    assert_replicas_identical,
    blas_warning,
    check_launcher,
    choose_reduce,
    collective,
    collective_run,
    count_correct,
    draw_augmentation,
    epoch_order,
    evaluate,
    gather_from_all,
    gather_trace,
    guard_ranks,
    learning_rate,
    limit_blas_threads,
    load_batch,
    load_data_collectively,
    log_communication,
    make_model,
    make_optimizer,
    make_parser,
    number,
    require_finite,
    run_main,
    save_and_stop,
    shard,
    softmax_cross_entropy,
    warn_if_oversubscribed,
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
    (allgather). Each rank sends 2 (p - 1) / p of the gradients: less than twice, however many ranks
    there are. It costs 2 (p - 1) latencies.

    With three ranks, the chunk that each one sends, and in brackets the ranks whose sum it is:

        rank                       0        1        2
        reduce-scatter, step 0     0 [0]    1 [1]    2 [2]
                        step 1     2 [2 0]  0 [0 1]  1 [1 2]
        allgather, step 0          1 [all]  2 [all]  0 [all]
                   step 1          0 [all]  1 [all]  2 [all]
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


# --------------------------------------------------------------------------------------------------
# Slow networks: rungs that send less, and so compute something else
# --------------------------------------------------------------------------------------------------


class Bf16Reducer(RingReducer):
    """--compress bf16: what is sent has the upper 16 bits of each float32, half of the bytes.

    bfloat16 has the range of float32 and 8 bits of precision; sums are made in float32. What a
    rank rounds away it adds to its next gradients, so that nothing is lost, only late: error
    feedback (Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
    Schemes", 2019). The sums are rounded again before they are sent on; the rank that rounds them
    keeps that error (Tang et al., "DoubleSqueeze", 2019). Of the ring it takes the chunks only: in
    a ring a sum would be rounded at each of p - 1 steps, and here once.

    residual: (parameters,), what this rank has not sent yet. The sum of all totals plus the
    residuals of all ranks is the sum of all gradients.
    """

    name = "bf16"

    def __init__(self, comm, model):
        super().__init__(comm, model)
        self.residual = np.zeros_like(self.total)
        self.own_chunk = shard(len(self.total), comm.rank, comm.size)
        self.counts = [len(chunk) for chunk in self.chunks]

    def wait(self):
        self.total += self.residual
        sent = to_bfloat16(self.total)
        np.subtract(self.total, from_bfloat16(sent), out=self.residual)

        # Reduce-scatter: every rank sends chunk r to rank r, which sums it in float32.
        own = self.own_chunk
        length = own.stop - own.start
        received = np.empty((self.comm.size, length), np.uint16)
        self.comm.Alltoallv([sent, self.counts], [received, [length] * self.comm.size])
        own_sum = from_bfloat16(received).sum(axis=0)
        rounded = to_bfloat16(own_sum)
        self.residual[own] += own_sum - from_bfloat16(rounded)

        # Allgather: the sums of all chunks to all ranks
        self.comm.Allgatherv(rounded, [sent, self.counts])
        self.total[...] = from_bfloat16(sent)


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float array → its bfloat16 values as uint16, rounded to the nearest, ties to even."""
    bits = array.astype(np.float32).view(np.uint32)
    # 0x7FFF is just under half of the last bit that stays; where that bit is 1, exactly half.
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class TopKReducer(AllreduceReducer):
    """--compress topk: each rank sends the 1 % of its gradients with the largest magnitudes.

    Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", 2017. The others are
    added to the next gradients until they are large enough (error feedback, as in Bf16Reducer). A
    rank sends an index and a value, 8 bytes, of each, to all ranks: 2 (p - 1) % of the gradients'
    bytes, which grows with the ranks.
    """

    name = "topk"
    FRACTION = 0.01

    def __init__(self, comm, model):
        super().__init__(comm, model)
        self.residual = np.zeros_like(self.total)
        self.k = math.ceil(self.FRACTION * len(self.total))

    def wait(self):
        self.residual += self.total
        # argpartition takes time proportional to the length; sorting would take more. NaN counts
        # as the largest, so that a loss that is not finite is found on all ranks.
        largest = np.argpartition(np.abs(self.residual), -self.k)[-self.k :].astype(np.int32)
        values = self.residual[largest]
        self.residual[largest] = 0

        indices_of_ranks = gather_from_all(self.comm, largest)  # (ranks, k)
        values_of_ranks = gather_from_all(self.comm, values)
        self.total[...] = 0
        for index, value in zip(indices_of_ranks, values_of_ranks, strict=True):
            self.total[index] += value  # no index is twice in one rank's list


class LocalSGD(AllreduceReducer):
    """--local-steps K: each rank trains alone; after every K-th step all average their weights.

    Stich, "Local SGD Converges Fast and Communicates Little", 2019. What is averaged is the change
    of the weights since the last average, by the exchange that --compress names; with top-k that
    is Qsparse-local-SGD (Basu et al., 2019). The optimizer's state (momentum) is never averaged:
    it stays each rank's own. At the end of an epoch the weights are averaged too, so that all ranks
    evaluate, save and end with the same.
    """

    name = "local"

    def __init__(self, comm, model, exchange):
        super().__init__(comm, model)
        self.model = model
        self.exchange = exchange
        exchange.total = np.zeros_like(model.params)  # (parameters,): the change, then its sum
        # The weights that all ranks had after the last average. Not yet known: a checkpoint and the
        # broadcast of rank 0 may still replace the first ones.
        self.start_params = None

    def wait(self):
        """No gradients are exchanged: self.total has those of this rank's images alone."""
        if self.start_params is None:
            self.start_params = self.model.params.copy()

    def finish(self):
        """Called after every K-th update."""
        change = self.exchange.total
        np.subtract(self.model.params, self.start_params, out=change)
        self.exchange.wait()
        change /= self.comm.size
        self.start_params += change
        self.model.params[...] = self.start_params


class RankCheckpoint(Checkpoint):
    """A checkpoint that also holds what differs from rank to rank: all ranks save it together.

    rank_state: this rank's arrays by name. The file has those of all ranks, stacked.
    """

    def __init__(self, args, log, model, optimizer, comm, rank_state):
        super().__init__(args, log, model, optimizer, comm.rank)
        self.comm = comm
        self.rank_state = rank_state
        size = comm.size if comm.rank == 0 else 0
        self.gathered = {
            name: np.zeros((size, *array.shape), array.dtype) for name, array in rank_state.items()
        }

    def due(self):
        return bool(self.path) and self.comm.bcast(super().due())

    def save(self):
        if self.path:
            for name, array in self.rank_state.items():
                self.comm.Gather(array, self.gathered[name])
            super().save()

    def scatter(self):
        """Give each rank its arrays of the file that rank 0 has loaded; without one, zeros."""
        for name, array in self.rank_state.items():
            self.comm.Scatter(self.gathered[name], array)

    def arrays(self):
        return super().arrays() | {f"rank_{name}": self.gathered[name] for name in self.gathered}

    def _apply(self, arrays):
        super()._apply(arrays)
        for name, gathered in self.gathered.items():
            gathered[...] = arrays[f"rank_{name}"]


REDUCERS = ("allreduce", "ring", "overlap", "shared")
COMPRESSORS = {"none": AllreduceReducer, "bf16": Bf16Reducer, "topk": TopKReducer}


def make_reducer(comm, model, optimizer, args):
    """The reducer that the options name. Those of --reduce leave the same weights on every rank."""
    if args.local_steps > 1:
        if model.buffers():
            raise InputError(
                f"--local-steps: the batch normalisation of {args.model} needs the statistics of "
                "the global batch in every step: use --model cnn"
            )
        return LocalSGD(comm, model, COMPRESSORS[args.compress](comm, model))
    if args.compress != "none":
        return COMPRESSORS[args.compress](comm, model)

    name = choose_reduce(args, comm, model, optimizer)
    if name == "allreduce":
        return AllreduceReducer(comm, model)
    if name == "ring":
        return RingReducer(comm, model)
    if name == "overlap":
        return OverlapReducer(comm, model, args.overlap)
    if name == "shared":
        return SharedMemoryReducer(comm, model, optimizer, args.overlap)
    raise ValueError(f"--reduce {name}: make_reducer has no branch for it")


def state_of_rank(reducer, optimizer):
    """The arrays that each rank has its own of, by name: what checkpoints hold of every rank."""
    state = {}
    exchange = reducer
    if isinstance(reducer, LocalSGD):
        exchange = reducer.exchange
        state |= optimizer.state
    if hasattr(exchange, "residual"):
        state["residual"] = exchange.residual
    return state


# --------------------------------------------------------------------------------------------------
# The network, the same on every rank
# --------------------------------------------------------------------------------------------------


def make_network(args, image_shape, classes):
    """The network that --model names, for images (H, W, C).

    For your own network return Model([...]) with a list of its layers here.
    """
    return make_model(args.model, args.seed, np.dtype(args.dtype), image_shape, classes)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def train(model, optimizer, data, args, log, checkpoint, stop, comm, reducer):
    """Train until epoch args.epochs is done, beginning at log.epoch and log.batch.

    The log's "communication" is the time in MPI, waiting for slower ranks included.
    """
    n = len(data.y_train)
    batches = math.ceil(n / args.global_batch_size)

    def reduce_slice(grad_slice):  # backward() calls it as soon as a layer's gradients are complete
        # timed() pauses the phase "backward" around it. The slice is the trace's label.
        with log.timed("communication", grad_slice):
            reducer.start(grad_slice)

    def gather(array):  # batch normalisation needs the statistics of the global batch
        with log.timed("communication"):
            return gather_from_all(comm, array)

    model.gather_statistics(gather)
    log.trace_layers(model)

    for epoch in range(log.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        aug_params = draw_augmentation(n, args.seed, epoch) if args.augment == "on" else None
        log.start_epoch(epoch, batches)
        for batch in range(log.batch, batches):
            optimizer.lr = learning_rate(args, (epoch - 1 + batch / batches) / args.epochs)

            with log.timed("loading"):
                # The same order on all ranks; each takes its shard of the batch, perhaps none.
                index = order[batch * args.global_batch_size : (batch + 1) * args.global_batch_size]
                own_index = index[shard(len(index), comm.rank, comm.size)]
                x, labels = load_batch(
                    data.x_train,
                    data.y_train,
                    own_index,
                    args.dtype,
                    data.mean,
                    data.std,
                    aug_params,
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

            # With --local-steps the gradients are the sum over this rank's images alone.
            count = len(index) if args.local_steps == 1 else max(len(own_index), 1)
            with log.timed("update"):
                optimizer.step(count, reducer.total, reducer.shards)

            # Between two averages of --local-steps the ranks have different weights.
            is_synchronized = (batch + 1) % args.local_steps == 0 or batch + 1 == batches
            if is_synchronized:
                with log.timed("communication"):
                    reducer.finish()

            loss, top1, top5, stop_requests = sums.tolist()
            log.end_batch(len(index), loss, int(top1), int(top5))
            require_finite(loss, "loss", log)
            if stop_requests and is_synchronized:
                save_and_stop(checkpoint, log, stop)
            if is_synchronized and checkpoint.due():
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
        # After a signal in the validation the run stops one batch later, whose sums tell all ranks.


def parse_args(argv=None):
    parser = make_parser(__file__, __doc__, MODELS)
    add_recipe_options(parser)
    add_mpi_options(parser, REDUCERS)
    parser.add_argument(
        "--compress",
        choices=COMPRESSORS,
        default="none",
        help="send bfloat16, or the largest 1%% only; not the serial run (default: %(default)s)",
    )
    parser.add_argument(
        "--local-steps",
        type=number(int, 1, 10**6),
        default=1,
        metavar="K",
        help="average weights after every K-th step in place of gradients in each; above 1 not the "
        "serial run (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.global_batch_size is None:
        args.global_batch_size = args.batch_size * MPI.COMM_WORLD.size
    if difference_from_serial(args):
        if args.reduce != "auto":
            raise InputError("--compress and --local-steps have their own exchange: omit --reduce")
        # Another number of ranks would be another computation: --resume compares it.
        args.ranks = MPI.COMM_WORLD.size
    return args


def difference_from_serial(args):
    """What the options change in the computation, as words; empty if nothing."""
    changes = []
    if args.compress != "none":
        changes.append(f"--compress {args.compress} sends a part of each gradient later")
    if args.local_steps > 1:
        changes.append(f"with --local-steps {args.local_steps} ranks train apart in between")
    return ", ".join(changes)


def main(argv=None):
    comm = MPI.COMM_WORLD
    abort_on_exception(comm)
    check_launcher(comm)
    args = collective(comm, lambda: parse_args(argv))
    limit_blas_threads(1)
    warn_if_oversubscribed(comm)
    warning = blas_warning()
    if warning and comm.rank == 0:
        print(warning, file=sys.stderr)

    data = load_data_collectively(args, comm)
    model = make_network(args, data.image_shape, len(data.classes))
    optimizer = make_optimizer(model, args)
    reducer = make_reducer(comm, model, optimizer, args)

    info = {"ranks": comm.size, "reduce": reducer.name}
    difference = difference_from_serial(args)
    if difference:
        info["not_the_serial_run"] = difference
        if comm.rank == 0:
            print(f"not the run of serial_cnn.py: {difference}", flush=True)
    log = collective(comm, lambda: RunLog(args, __file__, data, info, comm.rank))
    checkpoint = Checkpoint(args, log, model, optimizer, comm.rank)
    if difference:
        rank_state = state_of_rank(reducer, optimizer)
        checkpoint = RankCheckpoint(args, log, model, optimizer, comm, rank_state)
    if args.resume:
        collective(comm, lambda: checkpoint.load() if comm.rank == 0 else None)
    stop = StopSignal()

    # Overflows need no warning: the run stops at the first loss that is not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        with collective_run(log, checkpoint, stop, model, optimizer, comm):
            if difference:
                checkpoint.scatter()
            train(model, optimizer, data, args, log, checkpoint, stop, comm, reducer)
            gather_trace(log, comm)
            log.finish()


if __name__ == "__main__":
    guard_ranks(MPI.COMM_WORLD)
    run_main(main, MPI.COMM_WORLD.rank)
