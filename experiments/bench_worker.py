"""Do training steps as bench.py asks for them, in processes that sleep in between.

bench.py starts this script under mpirun, once for each kind of work, and exchanges lines of JSON
with rank 0. When the first answer, "ready", has come, it writes the seconds of a sample. The answer
is [steps per second, share of the time in communication or null].

    mpirun -np 2 python experiments/bench_worker.py '["mpi", 64, 2]'             # then type: 1.0
"""

import atexit
import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are at the top level
from common import (
    Parser,
    abort_on_exception,
    count_correct,
    keep_freed_memory,
    limit_blas_threads,
    load_batch,
    load_dataset,
    make_model,
    make_optimizer,
    make_torch_optimizer,
    run_main,
    shard,
    softmax_cross_entropy,
)

LEARNING_RATE = ("--lr", "0.001")  # small: a step must not diverge, however often it is repeated


class Work(NamedTuple):
    """A training step that can be measured: what to do in a worker."""

    kind: str  # one of STEPS
    images: int  # in a step of all ranks together
    ranks: int = 1
    threads: int = 1  # of each rank
    options: tuple = ()  # of the script


# --------------------------------------------------------------------------------------------------
# Steps. Each function makes one for a rank: (work, data, comm) → Step
#
# They import what they need: a worker that measures NumPy should not load PyTorch or Numba, which
# takes seconds and may start threads.
# --------------------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up the seconds of the blocks `with stopwatch.running():`."""

    def __init__(self):
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self):
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


class Step(NamedTuple):
    """One training step of a rank."""

    run: Callable  # returns the loss; a GPU may still be working then
    communication: Stopwatch | None = None  # None: this step cannot tell
    synchronize: Callable = lambda: None  # waits until a GPU has done all steps


def own_batch(work, data, comm):
    """The rank's shard of a batch of the first work.images images."""
    index = np.arange(work.images)[shard(work.images, comm.rank, comm.size)]
    return load_batch(data.x_train, data.y_train, index)


def serial_step(work, data, comm):
    """serial_cnn.py. On several ranks: copies that share nothing but the machine."""
    import serial_cnn

    args = serial_cnn.parse_args([*work.options, *LEARNING_RATE])
    model = serial_cnn.make_model(args)
    optimizer = make_optimizer(model, args)
    x, labels = own_batch(work, data, comm)

    def run():
        logits = model.forward(x)
        loss, dlogits = softmax_cross_entropy(logits, labels)
        count_correct(logits, labels)
        model.backward(dlogits)
        optimizer.step(len(labels))
        return loss / len(labels)

    return Step(run, communication=Stopwatch() if comm.size > 1 else None)  # of copies: 0


def mpi_step(work, data, comm):
    """parallel_cnn_mpi.py"""
    import parallel_cnn_mpi as script

    args = script.parse_args([*work.options, *LEARNING_RATE])
    model = make_model(args.model, args.seed, np.dtype(args.dtype))
    optimizer = make_optimizer(model, args)
    reducer = script.make_reducer(comm, model, optimizer, args)
    return data_parallel_step(work, data, comm, model, optimizer, reducer)


def hybrid_step(work, data, comm):
    """parallel_cnn_hybrid.py"""
    import parallel_cnn_hybrid as script

    options = [*work.options, "--num-threads", str(work.threads), *LEARNING_RATE]
    args = script.parse_args(options)
    dtype = np.dtype(args.dtype)
    script.choose_threads(args, comm)
    script.compile_kernels(args.model, dtype, comm)
    model = script.make_model(args.model, args.seed, dtype)
    optimizer = make_optimizer(model, args, sgd=script.ThreadedSGD, adam=script.ThreadedAdam)
    reducer = script.make_reducer(comm, model, optimizer, args)
    return data_parallel_step(work, data, comm, model, optimizer, reducer)


def hybrid_copies_step(work, data, comm):
    """parallel_cnn_hybrid.py on one thread, as copies that share nothing but the machine."""
    return hybrid_step(work._replace(images=work.images // comm.size), data, MPI.COMM_SELF)


def data_parallel_step(work, data, comm, model, optimizer, reducer):
    """What the training loop of both MPI scripts does with a batch."""
    x, labels = own_batch(work, data, comm)
    communication = Stopwatch()

    def reduce_slice(grad_slice):
        with communication.running():
            reducer.start(grad_slice)

    def run():
        logits = model.forward(x)
        loss, dlogits = softmax_cross_entropy(logits, labels)
        # The scripts sum loss, correct answers and stop requests too, during the backward pass.
        sums = np.array([loss, *count_correct(logits, labels), False], np.float64)
        with communication.running():
            request = comm.Iallreduce(MPI.IN_PLACE, sums)
        model.backward(dlogits, on_grad_ready=reduce_slice)
        with communication.running():
            reducer.wait()
            request.Wait()
        optimizer.step(work.images, reducer.total, reducer.shards)
        with communication.running():
            reducer.finish()
        return sums[0] / work.images

    return Step(run, communication)


def pytorch_step(work, data, comm, device="cpu", memory_format="channels_last", wrap=None):
    """PyTorch as its tutorials write it, but in channels_last, its faster memory format on CPUs.

    work.options: the network. wrap: a function that puts something around the model.
    """
    import torch
    from torch.nn import functional as F

    import train_cifar

    torch.set_num_threads(work.threads)
    memory_format = getattr(torch, memory_format)
    (model_name,) = work.options
    model = train_cifar.make_model(model_name).to(device, memory_format=memory_format)
    if wrap:
        model = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    x, labels = own_batch(work, data, comm)
    x = torch.from_numpy(x).permute(0, 3, 1, 2)  # NHWC → NCHW
    x = x.to(device).contiguous(memory_format=memory_format)
    labels = torch.from_numpy(labels).long().to(device)

    def run():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.item() if device == "cpu" else loss  # .item() would wait for a GPU

    return Step(run)


def ddp_step(work, data, comm):
    """PyTorch's DistributedDataParallel over gloo."""
    import torch

    folder = None
    if comm.rank == 0:
        folder = tempfile.mkdtemp()  # where the ranks find each other
        atexit.register(shutil.rmtree, folder)
    folder = comm.bcast(folder)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # all ranks are on this machine
    store = torch.distributed.FileStore(f"{folder}/store", comm.size)
    torch.distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    return pytorch_step(work, data, comm, wrap=torch.nn.parallel.DistributedDataParallel)


def train_cifar_step(work, data, comm):
    """train_cifar.py, with the loading of its batches."""
    import torch
    from torch.nn import functional as F

    import train_cifar

    torch.set_num_threads(work.threads)
    args = train_cifar.parse_args([*work.options, *LEARNING_RATE])
    if args.loader == "batched":  # tutorials leave malloc as it is
        keep_freed_memory()
    context = make_train_context(args)
    model = train_cifar.make_model(args.model).to(memory_format=context.memory_format)
    optimizer = make_torch_optimizer(model, args)
    batches = augmented_batches(context, work, data)

    def run():
        x, labels = next(batches)
        optimizer.zero_grad()
        with train_cifar.autocast(context):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Step(run)


def loading_step(work, data, comm):
    """train_cifar.py --load-only; a step is the loading of a batch."""
    import torch

    import train_cifar

    torch.set_num_threads(work.threads)
    args = train_cifar.parse_args(list(work.options))
    batches = augmented_batches(make_train_context(args), work, data)
    return Step(lambda: next(batches))


def make_train_context(args):
    """What train_cifar.py trains and loads with on a CPU."""
    import train_cifar

    group = train_cifar.ProcessGroup()
    workers = train_cifar.WorkerPool(args.workers)
    memory_format = train_cifar.MEMORY_FORMATS[args.memory_format]
    amp = train_cifar.AMP_DTYPES[train_cifar.choose_amp(args.amp, group.device)]
    return train_cifar.TrainContext(group, workers, args.loader, memory_format, amp)


def augmented_batches(context, work, data):
    """Batches as train_cifar.py loads them, epoch after epoch, without incomplete ones."""
    import train_cifar

    source = train_cifar.InMemorySource(data.x_train, data.y_train)
    complete = len(data.y_train) // work.images * work.images
    for epoch in itertools.count(1):
        indices = source.order(42, epoch)[:complete].reshape(-1, work.images)
        yield from train_cifar.load_batches(source, list(indices), (42, epoch), context)


def gpu_step(work, data, comm):
    """gpu_scratch.py, its step captured as a graph."""
    import gpu_scratch

    options = ["--graph", "--batch-size", str(work.images)]
    args = gpu_scratch.parse_args([*work.options, *options, *LEARNING_RATE])
    device = gpu_scratch.Gpu("float32")
    # A graph is captured for one batch, which stays where it is on the GPU.
    data = device.put_data(
        data._replace(x_train=data.x_train[: work.images], y_train=data.y_train[: work.images])
    )
    model = device.make_model(args.model, args.seed)
    optimizer = device.make_optimizer(model, args)
    steps = gpu_scratch.make_steps(device, model, optimizer, data, args)
    x, labels = gpu_scratch.load_first(device, data, work.images)
    step = steps[work.images]
    return Step(lambda: step(x, labels), synchronize=device.stream.synchronize)


def pytorch_gpu_step(work, data, comm):
    """PyTorch with cuDNN, in float32 without TF32, in the faster of its two memory formats."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms and keeps the fastest
    fastest = None
    highest_rate = 0.0
    for memory_format in ("contiguous_format", "channels_last"):
        step = pytorch_step(work, data, comm, "cuda", memory_format)
        step = step._replace(synchronize=torch.cuda.synchronize)
        take_sample(step, 20, comm)  # warm-up, in which cuDNN chooses its algorithms
        rate, _ = take_sample(step, 20, comm)
        if rate > highest_rate:
            highest_rate = rate
            fastest = step
    return fastest


STEPS = {
    "serial": serial_step,
    "mpi": mpi_step,
    "hybrid": hybrid_step,
    "hybrid_copies": hybrid_copies_step,
    "pytorch": pytorch_step,
    "ddp": ddp_step,
    "train_cifar": train_cifar_step,
    "loading": loading_step,
    "gpu": gpu_step,
    "pytorch_gpu": pytorch_gpu_step,
}


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


def run_worker(work: Work, data, comm):
    """Make the step, then take a sample whenever bench.py asks for one."""
    # BLAS would take all cores, also those on which other ranks compute.
    limit_blas_threads(work.threads)
    # Before a library starts threads, which take this over: receive_request() waits for the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    pids = comm.allgather(os.getpid())
    step = STEPS[work.kind](work, data, comm)
    rate = warm_up(step, comm)
    send_answer("ready", comm)
    while True:
        seconds = receive_request(comm, pids)
        if seconds is None:
            return
        # All ranks have the same rate. If they took different numbers of steps, those with more
        # would wait for ever for the others.
        steps = max(1, round(seconds * rate))  # one, where it takes longer than a sample
        if steps > 1:
            take_sample(step, 1, comm)  # other work has filled the caches meanwhile
        rate, communication = take_sample(step, steps, comm)
        send_answer([rate, communication], comm)


def warm_up(step: Step, comm) -> float:
    """Do the first steps. Returns the steps per second, which all ranks have the same."""
    take_sample(step, 1, comm)
    rate, _ = take_sample(step, 1, comm)
    if rate > 1:  # a short step may have been an exception; one of seconds is known well enough
        rate, _ = take_sample(step, 3, comm)
    return rate


def take_sample(step: Step, steps: int, comm) -> tuple:
    """Means over the ranks: steps per second, and the share of the time in communication."""
    # A fixed number of steps, and no look at the clock between them: the ranks stay together, and a
    # GPU is never waited for.
    if step.communication:
        step.communication.seconds = 0.0
    started = time.perf_counter()
    for _ in range(steps):
        step.run()
    step.synchronize()
    seconds = time.perf_counter() - started

    rate = comm.allreduce(steps / seconds) / comm.size
    if step.communication is None:
        return rate, None
    return rate, comm.allreduce(step.communication.seconds / seconds) / comm.size


def send_answer(answer, comm):
    if comm.rank == 0:
        print(json.dumps(answer), flush=True)


def receive_request(comm, pids):
    """Sleep until bench.py wants a sample. Returns its seconds on all ranks, None at the end."""
    line = None
    # A rank that waits inside MPI keeps its core busy, on which other work is measured now. So only
    # rank 0 waits for the line, and wakes the others.
    if comm.rank == 0:
        line = sys.stdin.readline()
        for pid in pids[1:]:
            os.kill(pid, signal.SIGUSR1)
    else:
        signal.sigwait({signal.SIGUSR1})
    line = comm.bcast(line)
    return float(line) if line else None


def main(argv=None):
    parser = Parser("bench_worker", __doc__)
    parser.add_argument("work", type=json.loads, help="the fields of a Work, as a JSON array")
    parser.add_argument("--dataset", choices=("auto", "cifar10", "synthetic"), default="auto")
    args = parser.parse_args(argv)
    work = Work(*args.work)
    # Loading is measured on all images: 2,048 would stay in the cache.
    data = load_dataset(dataset=args.dataset, subset=None if work.kind == "loading" else 2048)
    run_worker(work, data, MPI.COMM_WORLD)


if __name__ == "__main__":
    abort_on_exception(MPI.COMM_WORLD)  # the other ranks would wait for ever
    run_main(main, MPI.COMM_WORLD.rank)
