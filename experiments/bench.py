"""Speed of each script beside PyTorch on the same work: same network, images, batch size and cores, in one run; and
beside itself on one core.

Ours and PyTorch's take turns, A B A B ..., after a warm-up, so that a machine whose speed drifts drifts for both. A row
gives medians, and the ratio pair by pair as median, least and greatest. The rate of a large float32 matrix product
(sgemm) is taken in the same turns: the share says how much of it the training step reaches, counting the
multiplications of the plain algorithm, so that one that needs fewer (Winograd's) may pass 100 %. Where there is a GPU,
gpu_scratch.py is measured there beside PyTorch with cuDNN, by events.

--loading measures instead what loading costs train_cifar.py: every source with 0, 1 and 2 workers, alone and while
ResNet-18 trains, with an S3 server on this machine (s3_server.py), which takes its share of the cores.

    python bench.py --quick
    python bench.py --pairs 15 --only serial
    python bench.py --loading "S3, shards, 1" --quick
"""

import argparse
import csv
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import gpu_scratch
import serial_cnn
import train_cifar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import (
    MEAN,
    SGD,
    STD,
    InputError,
    Parser,
    TrainingError,
    atomic_write,
    available_cores,
    blas_warning,
    check_outputs,
    environment,
    find_mpirun,
    import_torchvision,
    limit_blas_threads,
    load_batch,
    load_cifar10,
    make_cnn,
    make_model,
    make_torch_optimizer,
    number,
    run_main,
    share,
    table,
)


class Contest(NamedTuple):
    name: str
    images: int  # in a call of ours() or peer()
    threads: int  # of those that run in this process
    ours: callable  # one training step, or a Worker that runs it
    peer: callable
    flops: float = 0  # of a training step, counted by PyTorch; 0: not compared with sgemm
    peer_images: int = 0  # in a call of peer(), if not as many as in one of ours()
    cores: int = 0  # beside the one of peer(), which is then our own work on one core; 0: the peer is PyTorch


def serial_contest(data, batch_size, model_name="cnn"):
    """serial_cnn.py's step against PyTorch eager on one thread, float32, channels_last (its faster layout)."""
    x, labels = load_batch(data.x_train, data.y_train, np.arange(batch_size))
    peer, flops = pytorch_step(model_name, x, labels, channels_last=True)
    name = f"serial_cnn.py, {model_name.replace('cnn', 'CNN')}, batch {batch_size}, 1 core"
    return Contest(name, batch_size, 1, serial_step(x, labels, model_name), peer, flops)


def scaling_contest(data, ranks, per_rank, serial_batch, label, *options):
    """parallel_cnn_mpi.py on `ranks` cores against serial_cnn.py on one."""
    images, batch = (
        ranks * per_rank,
        load_batch(data.x_train, data.y_train, np.arange(serial_batch)),
    )
    ours = Worker(data, "mpi", ranks, images, *options)
    name = f"parallel_cnn_mpi.py, {label}, {ranks} ranks"
    return Contest(
        name, images, 1, ours, serial_step(*batch), peer_images=serial_batch, cores=ranks
    )


def copies_contest(data, copies, batch_size):
    """serial_cnn.py on every core at once against once: what cores that share memory and clock leave to any method."""
    images, batch = (
        copies * batch_size,
        load_batch(data.x_train, data.y_train, np.arange(batch_size)),
    )
    name = f"serial_cnn.py, {copies} at once that share nothing, {batch_size} each"
    ours = Worker(data, "copies", copies, images)
    return Contest(name, images, 1, ours, serial_step(*batch), peer_images=batch_size, cores=copies)


def serial_step(x, labels, model_name="cnn"):
    model = make_model(model_name)
    optimizer = SGD(model, lr=1e-3)
    return lambda: serial_cnn.train_step(model, optimizer, x, labels)


def ddp_contest(data, ranks, batch_size):
    """parallel_cnn_mpi.py against PyTorch's DistributedDataParallel over gloo, both with one thread a rank."""
    images = ranks * batch_size
    name = f"parallel_cnn_mpi.py, beside DDP (gloo), {batch_size} a rank, {ranks} ranks"
    return Contest(
        name, images, 1, Worker(data, "mpi", ranks, images), Worker(data, "ddp", ranks, images)
    )


def hybrid_contest(data, batch_size, threads, model_name="cnn"):
    """parallel_cnn_hybrid.py, one rank, against PyTorch eager, channels_last, on as many threads."""
    x, labels = load_batch(data.x_train, data.y_train, np.arange(batch_size))
    peer, flops = pytorch_step(model_name, x, labels, channels_last=True)
    ours = Worker(data, "hybrid", 1, batch_size, "--num-threads", threads, "--model", model_name)
    model = model_name.replace("cnn", "CNN")
    name = f"parallel_cnn_hybrid.py, {model}, batch {batch_size}, {threads} core{'s' if threads > 1 else ''}"
    return Contest(name, batch_size, threads, ours, peer, flops)


def threads_contest(data, batch_size, threads):
    """parallel_cnn_hybrid.py, one rank, against itself on one thread."""
    ours, peer = (Worker(data, "hybrid", 1, batch_size, "--num-threads", t) for t in (threads, 1))
    name = f"parallel_cnn_hybrid.py, batch {batch_size}, {threads} threads"
    return Contest(name, batch_size, 1, ours, peer, cores=threads)


def train_cifar_contest(data, model_name, batch_size):
    """train_cifar.py's training (channels_last, --amp auto) against the usual one (NCHW, float32, DataLoader), CPU.

    Both load and augment their batches; on all cores. Ours is in a process of its own, because it sets malloc.
    """
    threads = len(available_cores())
    x, labels = load_batch(data.x_train, data.y_train, np.arange(batch_size))
    step, flops = pytorch_step(model_name, x, labels, channels_last=False)
    theirs = torchvision_batches(data, batch_size)
    ours = Worker(data, "train_cifar", 1, batch_size, "--model", model_name, "--epochs", 1)
    name = f"train_cifar.py, {model_name}, batch {batch_size}, {threads} cores"
    return Contest(name, batch_size, threads, ours, lambda: step(*next(theirs)), flops)


def loading_contest(data, batch_size):
    """train_cifar.py's batches from memory, augmented, against torchvision's DataLoader with the same, one core."""
    batches, theirs = (
        our_batches(data, batch_size, workers=0),
        torchvision_batches(data, batch_size),
    )
    name = f"train_cifar.py --load-only, batch {batch_size}, 1 core"
    return Contest(name, batch_size, 1, lambda: next(batches), lambda: next(theirs), 0)


def gpu_contest(data, batch_size, model_name):
    """gpu_scratch.py's step as a graph against PyTorch eager with cuDNN, both float32 without TF32, on the same GPU."""
    name = f"gpu_scratch.py, {model_name.replace('cnn', 'CNN')}, batch {batch_size}, GPU"
    theirs = min(
        (
            pytorch_gpu_step(model_name, data, batch_size, layout)
            for layout in (torch.contiguous_format, torch.channels_last)
        ),
        key=lambda step: step.seconds_per_call,
    )
    return Contest(name, batch_size, 1, our_gpu_step(model_name, data, batch_size), theirs)


def our_gpu_step(model_name, data, batch_size):
    device = gpu_scratch.Gpu("float32")
    args = gpu_scratch.parse_args(["--graph", "--lr", "0.001", "--batch-size", str(batch_size)])
    x_train, y_train = (device.put(array[:batch_size]) for array in (data.x_train, data.y_train))
    model = device.make_model(model_name, args.seed)
    optimizer = device.make_optimizer(model, args)
    steps = gpu_scratch.make_steps(
        device, model, optimizer, data._replace(x_train=x_train, y_train=y_train), args
    )
    batch = device.load(x_train, y_train, device.put(np.arange(batch_size, dtype=np.int32)))
    return GpuStep(lambda: steps[batch_size](*batch), device.mark, device.seconds)


def pytorch_gpu_step(model_name, data, batch_size, memory_format):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # let cuDNN try its algorithms and keep the fastest
    x, labels = load_batch(data.x_train, data.y_train, np.arange(batch_size))
    model = train_cifar.make_model(model_name).cuda().to(memory_format=memory_format)
    x = torch.from_numpy(x).permute(0, 3, 1, 2).cuda().contiguous(memory_format=memory_format)
    labels = torch.from_numpy(labels).long().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    def mark():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return GpuStep(step, mark, lambda since, until: since.elapsed_time(until) / 1000)


class GpuStep:
    """A training step on a GPU, timed by events on its stream; nothing is read back between the steps of a turn."""

    def __init__(self, step, mark, seconds_between):
        self.step, self.mark, self.seconds_between = step, mark, seconds_between
        self._time(20)  # warm-up
        self.seconds_per_call = self._time(20)

    def _time(self, calls):
        started = self.mark()
        for _ in range(calls):
            self.step()
        ended = self.mark()
        ended.synchronize()
        return self.seconds_between(started, ended) / calls

    def rate(self, seconds):
        """Steps per second."""
        self.seconds_per_call = self._time(max(2, round(seconds / self.seconds_per_call)))
        return 1 / self.seconds_per_call


def missing_for_gpu():
    """Why there are no rows of gpu_scratch.py here; None if there are."""
    if missing := gpu_scratch.missing_for_gpu():
        return missing
    return None if torch.cuda.is_available() else "this PyTorch finds no GPU to be compared on"


def our_batches(data, batch_size, workers):
    """Batches of train_cifar.py, epoch after epoch."""
    source, loader = train_cifar.Arrays(data.x_train, data.y_train), train_cifar.Loader(workers)
    for epoch in itertools.count(1):
        draws, order = (
            train_cifar.draw_augmentation(len(data.y_train), 42, epoch),
            source.order(42, epoch),
        )
        whole = len(order) // batch_size * batch_size
        yield from loader.batches(
            source, order[:whole].reshape(-1, batch_size), draws, torch.device("cpu")
        )


def torchvision_batches(data, batch_size):
    """The same with torchvision's transforms and PyTorch's DataLoader, as its documentation has it."""
    transforms = import_torchvision().transforms
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(data.y_train)

        def __getitem__(self, i):
            return transform(Image.fromarray(data.x_train[i])), int(data.y_train[i])

    loader = torch.utils.data.DataLoader(Images(), batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def pytorch_step(model_name, x, labels, channels_last, wrap=lambda model: model):
    """A training step as PyTorch's tutorials write it, and its FLOPs. x (N, 32, 32, 3), labels (N,): NumPy arrays.

    step(x, labels) takes another batch, as tensors in NCHW.
    """
    model = train_cifar.make_model(model_name)
    x, labels = (
        torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(labels).long(),
    )
    if channels_last:
        model, x = (a.to(memory_format=torch.channels_last) for a in (model, x))
    model = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(x=x, labels=labels):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    with FlopCounterMode(display=False) as counter:
        step()
    return step, counter.get_total_flops()


class Worker:
    """A training step in processes of its own, under mpirun, which sleep until they are told to run for some seconds.

    kind: "mpi", "hybrid", "ddp", "train_cifar" or "copies" of serial_cnn.py; images: in a step of all ranks together;
    options: of the script.
    """

    def __init__(self, data, kind, ranks, images, *options):
        spec = {"kind": kind, "images": images, "options": [*map(str, options), "--lr", "0.001"]}
        command = [
            find_mpirun(),
            "-np",
            str(ranks),
            sys.executable,
            __file__,
            "--dataset",
            data.name,
            "--worker",
            json.dumps(spec),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.communication = []  # its share of the time in each turn
        self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise TrainingError("a worker ended: " + " ".join(self.process.args))
        return json.loads(line)

    def rate(self, seconds):
        """Steps per second."""
        print(seconds, file=self.process.stdin, flush=True)
        steps_per_second, communication = self._answer()
        self.communication.append(communication)
        return steps_per_second

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def work(spec, data):
    """Be one of a Worker's processes: for each number of seconds on rank 0's stdin train that long, then answer."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    limit_blas_threads(1)
    torch.set_num_threads(1)
    mine = np.arange(spec["images"])[share(spec["images"], comm.rank, comm.size)]
    x, labels = load_batch(data.x_train, data.y_train, mine)
    if spec["kind"] == "train_cifar":
        step, waited = train_cifar_step(spec, data), lambda: 0.0
    elif spec["kind"] == "copies":
        step, waited = serial_step(x, labels), lambda: 0.0
    else:
        step, waited = (ddp_step if spec["kind"] == "ddp" else ranks_step)(spec, x, labels, comm)
    for _ in range(3):
        step()
    answer, per_second = "ready", comm.bcast(5 / timed(step, 5))
    while True:
        line = None
        if comm.rank == 0:
            print(json.dumps(answer), flush=True)
            line = sys.stdin.readline()
        awake = comm.Ibarrier()
        while (
            not awake.Test()
        ):  # waiting in MPI would keep the core busy that others are measured on
            time.sleep(0.005)
        line = comm.bcast(line)
        if not line:
            return
        started, before, steps = (
            time.perf_counter(),
            waited(),
            max(2, round(float(line) * per_second)),
        )
        for _ in range(steps):
            step()
        seconds = time.perf_counter() - started
        per_second = comm.allreduce(steps / seconds) / comm.size
        answer = [per_second, comm.allreduce(waited() - before) / comm.size / seconds]


def ranks_step(spec, x, labels, comm):
    """A step of parallel_cnn_mpi.py or parallel_cnn_hybrid.py, and a function for its seconds in communication."""
    if spec["kind"] == "hybrid":
        import parallel_cnn_hybrid as script

        args = script.parse_args(spec["options"])
        script.choose_threads(args, comm)
        script.compile_kernels(args.model, np.dtype(np.float32), comm)
        model = script.make_model(args.model, args.seed, np.float32)
        optimizer = script.ThreadedSGD(model, args.lr)
    else:
        import parallel_cnn_mpi as script

        args = script.parse_args(spec["options"])
        model = make_cnn()
        optimizer = SGD(model, args.lr)
    reducer = script.make_reducer(comm, model, optimizer, args)
    return lambda: script.train_step(
        model, optimizer, x, labels, spec["images"], reducer
    ), lambda: reducer.seconds


def ddp_step(_, x, labels, comm):
    """A step of PyTorch's DistributedDataParallel, which does not tell its time in communication."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    folder = tempfile.TemporaryDirectory() if comm.rank == 0 else None
    store = torch.distributed.FileStore(f"{comm.bcast(folder and folder.name)}/store", comm.size)
    torch.distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    step, _ = pytorch_step(
        "cnn", x, labels, channels_last=True, wrap=torch.nn.parallel.DistributedDataParallel
    )
    return step, lambda folder=folder: 0.0  # the folder lasts as long as the function


def train_cifar_step(spec, data):
    """A step of train_cifar.py on all cores, with the loading of its batch by one worker."""
    args = train_cifar.parse_args(spec["options"])
    train_cifar.keep_freed_memory()
    torch.set_num_threads(len(available_cores()))
    model = train_cifar.make_model(args.model).to(memory_format=torch.channels_last)
    optimizer = make_torch_optimizer(model, args)
    amp, batches = (
        train_cifar.choose_amp(args.amp, torch.device("cpu")),
        our_batches(data, spec["images"], workers=1),
    )
    return lambda: train_cifar.train_step(model, optimizer, *next(batches), amp)


def sgemm():
    """A product of two 1024×1024 float32 matrices: 2·1024³ floating-point operations."""
    a = np.ones((1024, 1024), np.float32)
    return lambda: a @ a


def timed(step, calls):
    """Seconds that these calls of step() take."""
    started = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - started


def rate(step, seconds):
    """Calls per second of step(), called until `seconds` have passed, at least twice."""
    if isinstance(step, (Worker, GpuStep)):
        return step.rate(seconds)
    started, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - started < seconds:
        step()
        calls += 1
    return calls / (time.perf_counter() - started)


def compete(contest, pairs, seconds):
    """Measure pairs of turns; returns the row for bench.json."""
    torch.set_num_threads(contest.threads)
    limit_blas_threads(contest.threads)
    product = sgemm()
    turns = []
    for turn in range(pairs + 1):
        ours, peer = rate(contest.ours, seconds), rate(contest.peer, seconds)
        if turn:  # the first is the warm-up
            turns.append(
                (
                    contest.images * ours,
                    (contest.peer_images or contest.images) * peer,
                    rate(product, seconds / 5),
                )
            )
        if sys.stderr.isatty():
            print(f"\r{contest.name}: pair {turn}/{pairs} ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    ours, peer, gemm = zip(*turns, strict=True)
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    row = {
        "name": contest.name,
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "unit": "images/s",
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "n": pairs,
    }
    if contest.flops:
        per_image = contest.flops / contest.images / (2 * 1024**3)
        row["of_sgemm"] = statistics.median(
            a * per_image / g for a, g in zip(ours, gemm, strict=True)
        )
    if contest.cores:
        row.update(cores=contest.cores, efficiency=row["ratio"] / contest.cores)
    if isinstance(contest.ours, Worker):
        row["communication"] = statistics.median(contest.ours.communication[1:])
    return row


def run_contest(make, pairs, seconds):
    contest = make()
    try:
        return compete(contest, pairs, seconds)
    finally:
        for worker in (contest.ours, contest.peer):
            if isinstance(worker, Worker):
                worker.stop()


def print_tables(rows):
    """Rows beside PyTorch, then rows beside our own work on one core."""

    def ratio(row):
        return f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"

    beside = [
        [
            row["name"],
            f"{row['ours']:,.0f}",
            f"{row['peer']:,.0f}",
            ratio(row),
            str(row["n"]),
            f"{row['of_sgemm']:.0%}" if "of_sgemm" in row else "-",
        ]
        for row in rows
        if "cores" not in row
    ]
    scaling = [
        [
            row["name"],
            f"{row['ours']:,.0f}",
            f"{row['peer']:,.0f}",
            ratio(row),
            str(row["n"]),
            f"{row['efficiency']:.0%}",
            f"{row['communication']:.1%}",
        ]
        for row in rows
        if "cores" in row
    ]
    if beside:
        print(
            table(
                ("training, images/s", "ours", "PyTorch", "ratio (min–max)", "n", "of sgemm"),
                beside,
            )
        )
    if scaling:
        print(
            table(
                (
                    "training, images/s",
                    "ours",
                    "on one core",
                    "speed-up (min–max)",
                    "n",
                    "efficiency",
                    "communication",
                ),
                scaling,
            )
        )


LOADING_IMAGES, SINGLE_IMAGES, TRAINING_IMAGES = (
    50_000,
    10_000,
    1600,
)  # in an epoch; single: pictures one by one


def loading_costs(args):
    """Of each source of train_cifar.py and 0, 1 and 2 workers: images/s without training, and waiting in training.

    The pictures on disk are those that the S3 server serves, from this machine. Returns rows for bench.json.
    """
    folder = Path("results/bench-s3")
    server = [sys.executable, str(Path(__file__).with_name("s3_server.py")), "--dir", str(folder)]
    script = [sys.executable, str(Path(__file__).with_name("train_cifar.py"))]
    n, single, epoch = (
        max(count // 100, 64) if args.quick else count
        for count in (LOADING_IMAGES, SINGLE_IMAGES, TRAINING_IMAGES)
    )
    data = ["--dataset", args.dataset, *(["--data-dir", args.data_dir] if args.data_dir else [])]
    bucket = f"cifar10/{args.dataset}-{n}"
    if not (folder / "buckets" / bucket / "manifest.json").exists():
        subprocess.run(
            [*server, *script, "--export", f"s3://{bucket}", "--subset", str(n), *data], check=True
        )
    s3 = ["--source", f"s3://{bucket}", "--s3-mode"]
    sources = {
        "memory": (script, data, n),
        "disk": (script, ["--source", "disk", "--data-dir", f"{folder}/buckets/{bucket}"], single),
        "S3, single objects": ([*server, *script], [*s3, "stream"], single),
        "S3, shards": ([*server, *script], [*s3, "shards"], n),
    }
    rows = []
    for (name, (command, options, images)), workers in itertools.product(
        sources.items(), (0, 1, 2)
    ):
        name = f"{name}, {workers} workers"
        if args.loading not in name:
            continue
        options = [
            *options,
            "--workers",
            str(workers),
            "--quiet",
            "--log",
            "results/bench-loading.csv",
        ]
        loaded, ram = epochs_of(
            [*command, *options, "--load-only", "--epochs", "3", "--subset", str(images)]
        )
        model = ["--model", "cnn" if args.quick else "resnet18", "--batch-size", "64"]
        trained, _ = epochs_of(
            [*command, *options, *model, "--epochs", "2", "--subset", str(epoch)]
        )
        rates = [float(row["images_per_s"]) for row in loaded]
        rows.append(
            {
                "name": name,
                "images_per_s": statistics.median(rates),
                "min": min(rates),
                "max": max(rates),
                "n": len(rates),
                "peak_ram_mb": ram,
                "waiting_s": [float(row["loading"]) for row in trained],
                "total_s": [float(row["duration"]) for row in trained],
            }
        )
    return rows


def epochs_of(command):
    """Run train_cifar.py; its log's rows of training epochs, and its peak RAM in MiB."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open("results/bench-loading.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["type"] == "0"]
    return rows, json.loads(Path("results/bench-loading.json").read_text())["totals"]["peak_ram_mb"]


def print_loading(rows):
    lines = [
        [
            row["name"],
            f"{row['images_per_s']:,.0f} ({row['min']:,.0f}–{row['max']:,.0f})",
            f"{row['images_per_s'] * 3072e-6:,.0f}",
            f"{row['peak_ram_mb']:,.0f}",
            *(
                f"{waiting:.3f} of {total:.2f} ({waiting / total:.2%})"
                for waiting, total in zip(row["waiting_s"], row["total_s"], strict=True)
            ),
        ]
        for row in rows
    ]
    header = (
        "loading only",
        "images/s (min–max)",
        "MB/s",
        "peak MiB",
        "waiting s in the first epoch",
        "in the second",
    )
    print(table(header, lines))


def describe_machine(env):
    blas = ", ".join(f"{b['library']} {b['version']} ({b['kernel']} kernels)" for b in env["blas"])
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{env['cpu']}, {len(env['cores'])} cores{gpu}; {blas}; {versions}"


def contests(data, quick):
    """{name: function that makes the contest}; on a machine with more cores there are rows for 4, 8, 16 ranks too."""
    cores = len(available_cores())
    rows = {
        "serial_cnn.py, CNN, batch 32, 1 core": lambda: serial_contest(data, 32),
        "serial_cnn.py, CNN, batch 128, 1 core": lambda: serial_contest(data, 128),
        "serial_cnn.py, resnet18, batch 64, 1 core": lambda: serial_contest(data, 64, "resnet18"),
    }
    for model_name, batch_size in (("cnn", 32), ("cnn", 128), ("resnet18", 64)):
        for threads, unit in ((1, "core"), (cores, "cores")):
            model = model_name.replace("cnn", "CNN")
            rows[f"parallel_cnn_hybrid.py, {model}, batch {batch_size}, {threads} {unit}"] = (
                functools.partial(hybrid_contest, data, batch_size, threads, model_name)
            )
    for ranks in (n for n in (2, 4, 8, 16) if n <= cores):
        rows[f"serial_cnn.py, {ranks} at once that share nothing, 32 each"] = functools.partial(
            copies_contest, data, ranks, 32
        )
        for label, per_rank, serial_batch, *options in (
            ("weak: 32 a rank", 32, 32),
            ("the same by messages", 32, 32, "--reduce", "messages"),
            ("messages, no overlap", 32, 32, "--reduce", "messages", "--no-overlap"),
            ("strong: 64 in all", 64 // ranks, 64),
        ):
            rows[f"parallel_cnn_mpi.py, {label}, {ranks} ranks"] = functools.partial(
                scaling_contest, data, ranks, per_rank, serial_batch, label, *options
            )
        rows[f"parallel_cnn_mpi.py, beside DDP (gloo), 32 a rank, {ranks} ranks"] = (
            functools.partial(ddp_contest, data, ranks, 32)
        )
        for batch_size in (32, 128):
            rows[f"parallel_cnn_hybrid.py, batch {batch_size}, {ranks} threads"] = (
                functools.partial(threads_contest, data, batch_size, ranks)
            )
    rows["train_cifar.py, cnn"] = lambda: train_cifar_contest(data, "cnn", 32)
    rows["train_cifar.py, resnet18"] = lambda: train_cifar_contest(
        data, "resnet18", 32 if quick else 64
    )
    if not quick:
        rows["train_cifar.py, resnet18, batch 128"] = lambda: train_cifar_contest(
            data, "resnet18", 128
        )
        rows["train_cifar.py, resnet50"] = lambda: train_cifar_contest(data, "resnet50", 64)
    if not missing_for_gpu():
        for model_name, batch_size in itertools.product(("cnn", "resnet18"), (64, 512)):
            rows[f"gpu_scratch.py, {model_name.replace('cnn', 'CNN')}, batch {batch_size}, GPU"] = (
                functools.partial(gpu_contest, data, batch_size, model_name)
            )
    rows["train_cifar.py --load-only"] = lambda: loading_contest(data, 64)
    return rows


def parse_args(argv=None):
    parser = Parser("bench", __doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer networks and shorter turns: within a minute"
    )
    parser.add_argument(
        "--pairs", type=number(int, 7, 1000), default=11, help="of turns (default: %(default)s)"
    )
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only the rows whose name contains TEXT"
    )
    parser.add_argument(
        "--loading",
        metavar="TEXT",
        nargs="?",
        const="",
        help="instead, what loading costs: each source of train_cifar.py whose name contains TEXT",
    )
    parser.add_argument(
        "--data-dir", help="folder with CIFAR-10 (default: $CIFAR10_DIR, else ./data)"
    )
    parser.add_argument("--dataset", choices=("auto", "cifar10", "synthetic"), default="auto")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", metavar="FILE", default="results/bench.json", help="default: %(default)s"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.worker:
        return work(args.worker, load_cifar10(args.data_dir, args.dataset, subset=2048))
    pairs, seconds = (7, 0.25) if args.quick else (args.pairs, 1.0)
    check_outputs([args.output])
    if args.loading is not None:
        print(describe_machine(env := environment()), flush=True)
        rows = loading_costs(args)
        print_loading(rows)
        return write(env, rows, args.output)
    data = load_cifar10(args.data_dir, args.dataset, subset=5000)
    if args.data_dir:
        os.environ["CIFAR10_DIR"] = args.data_dir  # for the workers
    rows = contests(data, args.quick)
    chosen = [make for name, make in rows.items() if args.only in name]
    left_out = missing_for_gpu() and f"no rows of gpu_scratch.py: {missing_for_gpu()}"
    if not chosen:
        raise InputError(
            f"--only {args.only}: no such row{f' ({left_out})' if left_out else ''}; there are: "
            + "; ".join(rows)
        )
    print(describe_machine(env := environment()), flush=True)
    if left_out and not args.only:
        print(left_out, flush=True)
    if warning := blas_warning():
        print(warning, flush=True)
    rows = [run_contest(make, pairs, seconds) for make in chosen]
    print_tables(rows)
    write(env, rows, args.output)


def write(env, rows, path):
    with atomic_write(path, "w") as file:
        json.dump({"environment": env, "rows": rows}, file, indent=1)
    print(f"written: {path}")


if __name__ == "__main__":
    run_main(main)
