"""Measure the speed of each script beside PyTorch on the same work, and beside itself on one core.

Both sides of a row train the same network with the same batch size on as many cores. Each kind of
work runs in processes of its own. Rows of the same network and batch size are a group, in which all
kinds of work take their samples in turn, A B C A B C …, after a warm-up: a machine whose speed
drifts drifts for all of them, and what stands in several rows is one measurement. A row has the
medians, and of the ratios of each turn the median, the least and the greatest.

"of sgemm" is the rate of a training step relative to that of a large matrix product on the same
cores, sampled in the same turns. It counts the multiplications of the plain algorithm: one that
needs fewer (Winograd's) may pass 100 %, and so may train_cifar.py in bfloat16.

"of the bound" is the rate of parallel work relative to that of as many copies on one core each,
with the same batch per core, that share nothing but the machine: what they lose, no method can
avoid. Where there is a GPU, gpu_scratch.py is measured on it beside PyTorch with cuDNN.

--loading measures instead what loading costs train_cifar.py: each source with 0, 1 and 2 workers,
alone and while ResNet-18 trains. The S3 server runs on this machine and shares its cores.

    python experiments/bench.py --quick
    python experiments/bench.py --pairs 15 --only serial
    python experiments/bench.py --loading "S3, shards, 1" --quick
"""

import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
sys.path.insert(0, str(REPO))  # common.py and the scripts are at the top level
import gpu_scratch
import train_cifar
from bench_worker import Work
from common import (
    IMAGE_SHAPE,
    TRAIN,
    InputError,
    Parser,
    TrainingError,
    atomic_write,
    available_cores,
    blas_warning,
    check_outputs,
    environment,
    find_mpirun,
    format_table,
    limit_blas_threads,
    load_dataset,
    number,
    run_main,
)

# train_cifar.py as tutorials write it; without workers, since it shares its cores
TUTORIAL = ("--loader", "torchvision", "--workers", "0", "--memory-format", "nchw", "--amp", "off")
GEMM_SIZE = 1024  # rows and columns of sgemm's matrices
SAMPLE_SECONDS = 1.0
QUICK_SAMPLE_SECONDS = 0.25
QUICK_PAIRS = 7

# Images in an epoch of --loading
SHARD_IMAGES = 50_000  # from memory and from shards
PICTURE_IMAGES = 10_000  # pictures one by one, from disk and from S3
TRAINING_IMAGES = 1600


class Benchmark(NamedTuple):
    """A row: two kinds of work to compare."""

    group: str  # rows of a group are measured together
    ours: Work
    baseline: Work
    model: str | None = None  # network whose operations are compared with sgemm
    cores: int = 0  # of ours, if the baseline is our own work on one core; 0: it is PyTorch
    bound: Work | None = None  # copies that share nothing, on as many cores

    def works(self) -> list[Work]:
        return [work for work in (self.ours, self.baseline, self.bound) if work]


# --------------------------------------------------------------------------------------------------
# The rows
# --------------------------------------------------------------------------------------------------


def list_benchmarks(quick: bool) -> dict[str, Benchmark]:
    """All rows by name. On a machine with more cores there are rows for 4, 8 and 16 ranks too."""
    cores = len(available_cores())
    networks = (("cnn", "CNN", 32), ("cnn", "CNN", 128), ("resnet18", "resnet18", 64))
    rows = {}
    # From scratch, on one core and on all, against PyTorch on as many.
    for model, shown, images in networks:
        ours = Work("serial", images, options=("--model", model))
        baseline = Work("pytorch", images, options=(model,))
        name = f"serial_cnn.py, {shown}, batch {images}, 1 core"
        rows[name] = Benchmark(group_name(model, images), ours, baseline, model)
    for model, shown, images in networks:
        for threads in sorted({1, cores}):
            ours = Work("hybrid", images, threads=threads, options=("--model", model))
            baseline = Work("pytorch", images, threads=threads, options=(model,))
            name = f"parallel_cnn_hybrid.py, {shown}, batch {images}, {count_cores(threads)}"
            rows[name] = Benchmark(group_name(model, images), ours, baseline, model)
    for ranks in (2, 4, 8, 16):
        if ranks <= cores:
            rows.update(scaling_benchmarks(ranks, cores))

    # PyTorch as train_cifar.py uses it against PyTorch as tutorials use it.
    trainings = [("cnn", 32), ("resnet18", 32 if quick else 64)]
    if not quick:
        trainings += [("resnet18", 128), ("resnet50", 64)]
    for model, images in trainings:
        options = ("--model", model, "--epochs", "1")
        ours = Work("train_cifar", images, threads=cores, options=options)
        baseline = ours._replace(options=(*options, *TUTORIAL))
        name = f"train_cifar.py, {model}, batch {images}, {count_cores(cores)}"
        rows[name] = Benchmark(group_name(model, images), ours, baseline, model)
    if not missing_for_gpu():
        for (model, shown, _), images in itertools.product(networks[1:], (64, 512)):
            ours = Work("gpu", images, options=("--model", model))
            baseline = Work("pytorch_gpu", images, options=(model,))
            name = f"gpu_scratch.py, {shown}, batch {images}, GPU"
            rows[name] = Benchmark(name, ours, baseline)
    ours = Work("loading", 64, options=("--workers", "0"))
    baseline = Work("loading", 64, options=TUTORIAL)
    rows["train_cifar.py --load-only, batch 64, 1 core"] = Benchmark("loading", ours, baseline)
    return rows


def group_name(model, images):
    return f"{model}, batch {images}"


def scaling_benchmarks(ranks, cores) -> dict[str, Benchmark]:
    """Rows of several ranks or threads beside our own work on one core, and beside DDP."""
    # Weak scaling: each rank has the batch of the serial run, so the ranks train as many times more
    # images in a step. Strong scaling: they share the batch of the serial run.
    cnn = ("--model", "cnn")
    serial_32 = Work("serial", 32, options=cnn)
    serial_64 = Work("serial", 64, options=cnn)
    mpi = Work("mpi", 32 * ranks, ranks)
    overlap = mpi._replace(options=("--reduce", "overlap"))
    no_overlap = mpi._replace(options=(*overlap.options, "--no-overlap"))
    strong = Work("mpi", 64, ranks)
    ddp = Work("ddp", 32 * ranks, ranks, options=("cnn",))
    # What independent copies lose, because they share memory, cache and clock, no method can avoid.
    copies_weak = Work("serial", 32 * ranks, ranks, options=cnn)
    copies_strong = Work("serial", 64, ranks, options=cnn)

    script = "parallel_cnn_mpi.py"
    weak = f"32 per rank, {ranks} ranks"
    copies = f"serial_cnn.py, {ranks} independent copies, batch 32 each"
    rows = {
        copies: (copies_weak, serial_32, None),
        f"{script}, weak scaling: {weak}": (mpi, serial_32, copies_weak),
        f"{script} --reduce overlap, {weak}": (overlap, serial_32, copies_weak),
        f"{script} --reduce overlap --no-overlap, {weak}": (no_overlap, serial_32, copies_weak),
        f"{script}, strong scaling: 64 in all, {ranks} ranks": (strong, serial_64, copies_strong),
    }
    # All ranks of a group wait in memory: the rows of fewer ranks than cores have their own.
    group = group_name("cnn", 32) if ranks == cores else f"{ranks} cores"
    benchmarks = {}
    for name, (ours, baseline, bound) in rows.items():
        benchmarks[name] = Benchmark(group, ours, baseline, cores=ranks, bound=bound)
    benchmarks[f"{script}, beside DDP (gloo), {weak}"] = Benchmark(group, mpi, ddp)

    for images in (32, 128):
        one_thread = Work("hybrid", images, options=cnn)
        several_threads = one_thread._replace(threads=ranks)
        bound = Work("hybrid_copies", images, ranks, options=cnn)
        name = f"parallel_cnn_hybrid.py, batch {images}, {ranks} threads"
        row = Benchmark(group_name("cnn", images), several_threads, one_thread, None, ranks, bound)
        benchmarks[name] = row
    return benchmarks


def count_cores(cores):
    return f"{cores} core{'s' if cores > 1 else ''}"


def missing_for_gpu():
    """Why there are no rows of gpu_scratch.py on this machine; None if there are."""
    missing = gpu_scratch.missing_for_gpu()
    if missing is None and not torch.cuda.is_available():
        return "this PyTorch finds no GPU to compare with"
    return missing


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


class Worker:
    """Processes that run bench_worker.py, which describes the lines that are exchanged."""

    def __init__(self, work: Work, dataset: str):
        command = [find_mpirun(), "-np", str(work.ranks), sys.executable]
        command += [str(HERE / "bench_worker.py"), json.dumps(work), "--dataset", dataset]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait_until_ready(self):
        self._read_answer()

    def sample(self, seconds: float) -> list:
        print(seconds, file=self.process.stdin, flush=True)
        return self._read_answer()

    def _read_answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise TrainingError("a worker ended: " + " ".join(self.process.args))
        return json.loads(line)

    def close(self):
        self.process.stdin.close()  # a worker ends when there is nothing more to read
        self.process.wait()


def measure_all(benchmarks: dict[str, Benchmark], turns, seconds, dataset) -> list[dict]:
    """Measure one group after the other; returns the rows in the order of benchmarks."""
    groups = {}
    for name, benchmark in benchmarks.items():
        groups.setdefault(benchmark.group, {})[name] = benchmark
    measured = {}
    for group, rows in groups.items():
        started = time.perf_counter()
        for row in measure_group(group, rows, turns, seconds, dataset):
            measured[row["name"]] = row
        print(f"{group}: {len(rows)} rows in {time.perf_counter() - started:.0f} s", flush=True)
    return [measured[name] for name in benchmarks]


def measure_group(group: str, rows: dict[str, Benchmark], turns, seconds, dataset) -> list[dict]:
    """Measure all work of a group in turns, after one turn as warm-up; returns its rows."""
    works = list(dict.fromkeys(work for row in rows.values() for work in row.works()))
    workers = {}
    try:
        for work in tqdm(works, desc=f"{group}: starting", leave=False, disable=None):
            workers[work] = Worker(work, dataset)
            workers[work].wait_until_ready()
        samples = take_turns(group, workers, turns, seconds)
    finally:
        for worker in workers.values():
            worker.close()
    return [make_row(name, benchmark, samples) for name, benchmark in rows.items()]


class Samples(NamedTuple):
    """What the turns of a group have measured, one number for each turn."""

    rates: dict[Work, list]  # images/s
    communication: dict[Work, list]  # its share of the time, or None
    sgemm: dict[int, list]  # products/s, by the number of threads


def take_turns(group, workers: dict[Work, Worker], turns, seconds) -> Samples:
    threads = sorted({work.threads for work in workers})
    samples = Samples({w: [] for w in workers}, {w: [] for w in workers}, {n: [] for n in threads})
    with tqdm(total=(turns + 1) * len(workers), desc=group, leave=False, disable=None) as progress:
        for turn in range(turns + 1):
            is_warm_up = turn == 0
            # There and back, so that no work always follows the same other one.
            order = list(workers.items())
            for work, worker in order if turn % 2 == 0 else reversed(order):
                rate, communication = worker.sample(seconds)
                progress.update()
                if not is_warm_up:
                    samples.rates[work].append(rate * work.images)
                    samples.communication[work].append(communication)
            for n in threads:
                limit_blas_threads(n)  # those of sgemm, in this process
                rate = sgemm_rate(seconds / 5)
                if not is_warm_up:
                    samples.sgemm[n].append(rate)
    return samples


def sgemm_rate(seconds):
    """Products per second of two float32 matrices, over `seconds` and at least two products."""
    a = np.random.default_rng(0).standard_normal((GEMM_SIZE, GEMM_SIZE), np.float32)
    product = a @ a  # warm-up
    products = 0
    started = time.perf_counter()
    while products < 2 or time.perf_counter() - started < seconds:
        np.matmul(a, a, out=product)
        products += 1
    return products / (time.perf_counter() - started)


def make_row(name, benchmark, samples: Samples) -> dict:
    """The row for bench.json."""
    ours = samples.rates[benchmark.ours]
    baseline = samples.rates[benchmark.baseline]
    # The ratio of each turn, not that of the medians: all samples of a turn met the same machine.
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    row = {
        "name": name,
        "ours": statistics.median(ours),
        "baseline": statistics.median(baseline),
        "unit": "images/s",
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "n": len(ratios),
    }
    if benchmark.model:
        # An image needs as many operations as this fraction of a matrix product.
        products_per_image = count_flops(benchmark.model) / (2 * GEMM_SIZE**3)
        sgemm = samples.sgemm[benchmark.ours.threads]
        shares = [a * products_per_image / b for a, b in zip(ours, sgemm, strict=True)]
        row["of_sgemm"] = statistics.median(shares)
    if benchmark.cores:
        row["cores"] = benchmark.cores
        row["efficiency"] = row["ratio"] / benchmark.cores
    if benchmark.bound:
        bound = samples.rates[benchmark.bound]
        shares = [a / b for a, b in zip(ours, bound, strict=True)]
        row["of_bound"] = statistics.median(shares)
        row["of_bound_min"] = min(shares)
        row["of_bound_max"] = max(shares)
    communication = samples.communication[benchmark.ours]
    if communication[0] is not None:
        row["communication"] = statistics.median(communication)
    return row


def count_flops(model_name: str) -> float:
    """Floating-point operations per image, forward and backward, as PyTorch counts them."""
    images = 8
    with torch.device("meta"):  # tensors with a shape and no data: nothing is computed
        model = train_cifar.make_model(model_name)
        x = torch.zeros(images, 3, 32, 32)
        labels = torch.zeros(images, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), labels).backward()
    return counter.get_total_flops() / images


def print_rows(rows):
    lines = []
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
        line = [row["name"], f"{row['ours']:,.0f}", f"{row['baseline']:,.0f}", ratio, str(row["n"])]
        for share in ("of_sgemm", "efficiency", "of_bound", "communication"):
            line.append(f"{row[share]:.1%}" if share in row else "-")
        lines.append(line)
    header = ("training, images/s", "ours", "baseline", "ratio (min–max)", "n")
    shares = ("of sgemm", "efficiency", "of the bound", "communication")
    print(format_table((*header, *shares), lines))
    print("Baseline: PyTorch; where there is an efficiency, our own work on one core.")


# --------------------------------------------------------------------------------------------------
# --loading
# --------------------------------------------------------------------------------------------------


def measure_loading(args) -> list[dict]:
    """Rows for loading.json: images/s of each source alone, and its waiting in a training."""
    script = [sys.executable, str(REPO / "train_cifar.py")]
    data = ["--dataset", args.dataset]
    if args.data_dir:
        data += ["--data-dir", args.data_dir]
    many = images_in_epoch(SHARD_IMAGES, args.quick)
    few = images_in_epoch(PICTURE_IMAGES, args.quick)

    # The S3 server has the images in a folder: its pictures are the source "disk" too.
    folder = Path("results/bench-s3")
    # The export of other images, from an earlier run, would be measured in their place.
    fingerprint = load_dataset(args.data_dir, args.dataset).fingerprint
    bucket = f"cifar10/{fingerprint[:12]}-{many}"
    images = folder / "buckets" / bucket
    with_s3 = [sys.executable, str(HERE / "s3_server.py"), "--dir", str(folder), *script]
    if not (images / "manifest.json").exists():
        export = ["--export", f"s3://{bucket}", "--subset", str(many)]
        subprocess.run([*with_s3, *export, *data], check=True)

    s3 = [*with_s3, "--source", f"s3://{bucket}", "--s3-mode"]
    sources = {  # name: (command, images in an epoch)
        "memory": ([*script, *data], many),
        "disk": ([*script, "--source", "disk", "--data-dir", str(images)], few),
        "S3, single objects": ([*s3, "stream"], few),
        "S3, shards": ([*s3, "shards"], many),
    }
    rows = []
    for (source, (command, count)), workers in itertools.product(sources.items(), (0, 1, 2)):
        name = f"{source}, {workers} workers"
        if args.loading in name:
            command = [*command, "--workers", str(workers), "--quiet"]
            rows.append({"name": name, **loading_row(command, count, args.quick)})
    return rows


def images_in_epoch(images, quick):
    return max(images // 100, 64) if quick else images


def loading_row(command, images, quick) -> dict:
    """Load three epochs alone, then train two; returns the row without its name."""
    # Alone, the source is the limit; in a training it should hide behind the computation.
    load = ["--load-only", "--epochs", "3", "--subset", str(images)]
    loaded, peak_ram_mb = run_epochs([*command, *load])
    rates = [float(epoch["images_per_s"]) for epoch in loaded]

    model = "cnn" if quick else "resnet18"
    subset = str(images_in_epoch(TRAINING_IMAGES, quick))
    train = ["--model", model, "--batch-size", "64", "--epochs", "2", "--subset", subset]
    trained, _ = run_epochs([*command, *train])
    return {
        "images_per_s": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "n": len(rates),
        "peak_ram_mb": peak_ram_mb,
        "waiting_s": [float(epoch["loading"]) for epoch in trained],
        "total_s": [float(epoch["duration"]) for epoch in trained],
    }


def run_epochs(command):
    """Run train_cifar.py; returns its log's rows of training epochs, and its peak RAM in MiB."""
    log = Path("results/bench-loading.csv")
    files = ["--log", str(log), "--save-metrics", str(log.with_suffix(".npz"))]
    subprocess.run([*command, *files], check=True, stdout=subprocess.DEVNULL)
    with open(log, newline="") as file:
        epochs = [row for row in csv.DictReader(file) if row["type"] == str(TRAIN)]
    metadata = json.loads(log.with_suffix(".json").read_text())
    return epochs, metadata["totals"]["peak_ram_mb"]


def print_loading(rows):
    lines = []
    for row in rows:
        megabytes_per_s = row["images_per_s"] * 3072e-6  # an image has 32 · 32 · 3 bytes
        waiting = [
            f"{waiting:.3f} of {total:.2f} ({waiting / total:.2%})"
            for waiting, total in zip(row["waiting_s"], row["total_s"], strict=True)
        ]
        rate = f"{row['images_per_s']:,.0f} ({row['min']:,.0f}–{row['max']:,.0f})"
        ram = f"{row['peak_ram_mb']:,.0f}"
        lines.append([row["name"], rate, f"{megabytes_per_s:,.0f}", ram, *waiting])
    epochs = ("waiting s in the first epoch", "in the second")
    print(format_table(("loading only", "images/s (min–max)", "MB/s", "peak MiB", *epochs), lines))


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def describe_machine(env):
    blas = ", ".join(f"{b['library']} {b['version']} ({b['kernel']} kernels)" for b in env["blas"])
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{env['cpu']}, {len(env['cores'])} cores{gpu}; {blas}; {versions}"


def choose_benchmarks(args) -> dict[str, Benchmark]:
    """The rows that --only names. Raises InputError with the names of all rows if there is none."""
    benchmarks = list_benchmarks(args.quick)
    chosen = {name: row for name, row in benchmarks.items() if args.only in name}
    missing = missing_for_gpu()
    no_gpu = f"no rows of gpu_scratch.py: {missing}" if missing else ""
    if not chosen:
        hint = f" ({no_gpu})" if no_gpu else ""
        names = "; ".join(benchmarks)
        raise InputError(f"--only {args.only}: no such row{hint}; there are: {names}")
    if no_gpu and not args.only:
        print(no_gpu, flush=True)
    return chosen


def parse_args(argv=None):
    parser = Parser("bench", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer networks and shorter samples")
    pairs = "samples of each kind of work, taken in turns (default: %(default)s)"
    add("--pairs", type=number(int, 7, 1000), default=11, help=pairs)
    add("--only", metavar="TEXT", default="", help="only rows with TEXT in their name")
    loading = "measure loading instead, of the sources of train_cifar.py with TEXT in their name"
    add("--loading", metavar="TEXT", nargs="?", const="", help=loading)
    add("--data-dir", help="folder with CIFAR-10 (default: $CIFAR10_DIR, else ./data)")
    add("--dataset", choices=("auto", "cifar10", "synthetic"), default="auto")
    add("--output", metavar="FILE", default="results/bench.json", help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    check_outputs([args.output])
    env = environment()
    if args.loading is not None:
        print(describe_machine(env), flush=True)
        rows = measure_loading(args)
        print_loading(rows)
    else:
        chosen = choose_benchmarks(args)
        if args.data_dir:
            os.environ["CIFAR10_DIR"] = args.data_dir  # for the workers
        # Workers find the data when this process has downloaded and prepared it.
        data = load_dataset(args.data_dir, args.dataset, subset=2048)
        if (data.image_shape, len(data.classes)) != (IMAGE_SHAPE, 10):
            raise InputError(f"{data.name}: the benchmark is for images and classes as CIFAR-10's")
        dataset = data.name
        print(describe_machine(env), flush=True)
        warning = blas_warning()
        if warning:
            print(warning, flush=True)
        pairs = QUICK_PAIRS if args.quick else args.pairs
        seconds = QUICK_SAMPLE_SECONDS if args.quick else SAMPLE_SECONDS
        rows = measure_all(chosen, pairs, seconds, dataset)
        print_rows(rows)

    with atomic_write(args.output, "w") as file:
        json.dump({"environment": env, "rows": rows}, file, indent=1)
    print(f"written: {args.output}")


if __name__ == "__main__":
    run_main(main)
