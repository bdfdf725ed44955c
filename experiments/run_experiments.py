"""Run suites of the training scripts as processes, several times, and keep all results.

A suite is a list of experiments, each a command line of a script. They run one after another, and
the repeats are interleaved (A B C A B C …), so that a machine whose speed drifts drifts for all of
them alike. Each run has a folder results/<suite>/<configuration>/<repeat>/ with its log, its
metadata and its metrics. results/index.json lists all runs, with the last lines of output of those
that failed. A second start runs what is missing. What this machine or checkout does not have, such
as a GPU, is left out by name.

    make experiments
    python experiments/run_experiments.py --epochs 5 --subset 5000
    python experiments/run_experiments.py --suite hardware --only cnn --results-dir results/hardware
    python experiments/run_experiments.py --suite parallel --only mpi --oversubscribe --repeats 1
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
sys.path.insert(0, str(REPO))  # common.py is at the top level
from common import (
    InputError,
    Interrupted,
    Parser,
    StopSignal,
    TrainingError,
    atomic_write,
    available_cores,
    check_outputs,
    cpu_model,
    dataset_option,
    find_mpirun,
    has_bfloat16,
    in_main_thread,
    load_dataset,
    number,
    run_main,
    stop_processes,
)

FIRST_SEED = 42  # of repeat 1
OUTPUT_LINES = 20  # of a failed run that the index keeps


class Experiment(NamedTuple):
    """One configuration of a suite: what the command lines of its runs have in common."""

    suite: str
    name: str
    script: str
    options: list  # beside those that all experiments have
    cores: int = 1  # ranks × threads
    launcher: tuple = ()  # what comes before the script: mpirun, or env with variables
    needs_gpu: bool = False
    needs_bfloat16: bool = False
    is_traced: bool = False  # with --trace, of which the analysis makes a picture


# --------------------------------------------------------------------------------------------------
# Suites: args → list of experiments
# --------------------------------------------------------------------------------------------------


def parallel_suite(args) -> list[Experiment]:
    """Serial, MPI and hybrid, on 1, 2, 4, … cores.

    Strong scaling: --batch-size images a step, however many cores there are. Weak scaling:
    --batch-size images for each core.
    """
    size = args.batch_size
    suite = [Experiment("parallel", "serial", "serial_cnn.py", ["--batch-size", size])]
    for ranks in powers_of_two(2, args.max_cores):
        suite.append(mpi_experiment("strong", ranks, ["--global-batch-size", size]))
        suite.append(mpi_experiment("weak", ranks, ["--batch-size", size]))
    for ranks in powers_of_two(1, args.max_cores):
        for threads in powers_of_two(1, args.max_cores // ranks):
            cores = ranks * threads
            suite.append(hybrid_experiment("strong", ranks, threads, size))
            if cores > 1:  # on one core weak and strong scaling are the same run
                suite.append(hybrid_experiment("weak", ranks, threads, size * cores))
    return suite


def mpi_experiment(scaling, ranks, options):
    name = f"mpi-{ranks}-{scaling}"
    launcher = (find_mpirun(), "-np", ranks)
    is_traced = scaling == "strong"
    script = "parallel_cnn_mpi.py"
    return Experiment("parallel", name, script, options, ranks, launcher, is_traced=is_traced)


def hybrid_experiment(scaling, ranks, threads, global_batch_size):
    name = f"hybrid-{ranks}x{threads}-{scaling}"
    cores = ranks * threads
    launcher = (find_mpirun(), "-np", ranks)
    options = ["--num-threads", threads, "--global-batch-size", global_batch_size]
    if cores > len(available_cores()):
        # Numba starts no more threads than there are cores unless this variable says so.
        launcher = ("env", f"NUMBA_NUM_THREADS={threads}", *launcher)
        options.append("--force-threads")
    return Experiment("parallel", name, "parallel_cnn_hybrid.py", options, cores, launcher)


def hardware_suite(args) -> list[Experiment]:
    """CNN and ResNet-18, from scratch and in PyTorch, on one core, on all cores and on a GPU.

    All train the same: in float32, without augmentation.
    """
    cores = len(available_cores())
    suite = []

    def add(name, script, options, cores=1, launcher=(), needs_gpu=False):
        suite.append(Experiment("hardware", name, script, options, cores, launcher, needs_gpu))

    for model in ("cnn", "resnet18"):
        options = ["--model", model, "--batch-size", args.batch_size]
        one_rank = (find_mpirun(), "-np", 1)
        threads = [*options, "--num-threads", cores]
        add(f"{model}-scratch-1-core", "serial_cnn.py", options)
        if cores > 1:
            name = f"{model}-scratch-{cores}-cores"
            add(name, "parallel_cnn_hybrid.py", threads, cores, one_rank)
        add(f"{model}-scratch-gpu", "gpu_scratch.py", options, needs_gpu=True)

        script = "train_cifar.py"
        one_thread = ("env", "OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1")
        same = [*options, "--amp", "off", "--augment", "off", "--device"]
        add(f"{model}-pytorch-1-core", script, [*same, "cpu"], launcher=one_thread)
        if cores > 1:
            add(f"{model}-pytorch-{cores}-cores", script, [*same, "cpu"], cores)
        add(f"{model}-pytorch-gpu", script, [*same, "cuda"], needs_gpu=True)
    return suite


def loading_suite(args) -> list[Experiment]:
    """The CNN in PyTorch, with each source of images and 0, 1, 2, … workers.

    "train": the training; "load": the same loading alone.
    """
    server = local_s3(args)
    sources = {
        "memory": ((), ["builtin"]),
        "disk": ((), ["disk", "--data-dir", server.images]),
        "s3-stream": (server.launcher, [server.url, "--s3-mode", "stream"]),
        "s3-shards": (server.launcher, [server.url, "--s3-mode", "shards"]),
    }
    if args.s3:
        sources["s3-given"] = ((), [args.s3])

    suite = []
    script = "train_cifar.py"
    for source, (launcher, source_options) in sources.items():
        for workers in (0, *powers_of_two(1, args.max_cores)):
            name = f"{source}-{workers}-workers"
            cores = max(workers, 1)
            # Augmentation is part of loading: without it a worker would have little to do.
            train = ["--model", "cnn", "--batch-size", args.batch_size, "--augment", "on"]
            train += ["--source", *source_options, "--workers", workers]
            load = [*train, "--load-only"]
            suite.append(Experiment("loading", f"{name}-train", script, train, cores, launcher))
            suite.append(Experiment("loading", f"{name}-load", script, load, cores, launcher))
    return suite


class LocalS3(NamedTuple):
    """An S3 server on this machine, and the images in it."""

    launcher: tuple  # starts a command while the server runs
    url: str
    images: Path  # the folder in which the server has them


def local_s3(args) -> LocalS3:
    folder = Path(args.results_dir).resolve() / "s3"
    launcher = (sys.executable, HERE / "s3_server.py", "--dir", folder)
    images = folder / "buckets" / "cifar10" / str(args.subset)
    return LocalS3(launcher, f"s3://cifar10/{args.subset}", images)


def split_suite(args) -> list[Experiment]:
    """ResNet-50 with forward and backward pass on separate cores, in each mode."""
    script = "train_resnet50_split_cores.py"
    cores = len(available_cores())
    suite = []
    for mode in ("all", "split", "pipelined", "replicas"):
        options = ["--mode", mode, "--batch-size", args.batch_size]
        suite.append(Experiment("split", mode, script, options, cores))
    return suite


def ladder_suite(args) -> list[Experiment]:
    """Every script's way from the plainest version to the fastest, one idea a rung.

    Names are <ladder>-<number>-<rung>. "serial-pytorch" is PyTorch's best eager training of the CNN
    on one core, beside which the serial ladder is measured.
    """
    suite = []

    def climb(ladder, script, rungs, cores=1, launcher=(), **requirements):
        for step, (rung, options) in enumerate(rungs.items(), 1):
            name = f"{ladder}-{step}-{rung}"
            experiment = Experiment(
                "ladder", name, script, options, cores, launcher, **requirements
            )
            suite.append(experiment._replace(needs_bfloat16=rung == "bfloat16"))

    size = ["--batch-size", args.batch_size]
    convs = ("loops", "im2col", "blocked", "fused", "winograd")
    climb("serial", "serial_cnn.py", {conv: [*size, "--conv", conv] for conv in convs})
    one_thread = ("env", "OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1")
    eager = ["--model", "cnn", *size, "--amp", "off", "--augment", "off", "--device", "cpu"]
    eager += ["--workers", 0]
    suite.append(Experiment("ladder", "serial-pytorch", "train_cifar.py", eager, 1, one_thread))

    if len(available_cores()) > 1:
        two_ranks = (find_mpirun(), "-np", 2)
        reducers = ("allreduce", "ring", "overlap", "shared")
        rungs = {reducer: [*size, "--reduce", reducer] for reducer in reducers}
        climb("mpi", "parallel_cnn_mpi.py", rungs, 2, two_ranks)

    # From the script that tutorials write, one option at a time. A ResNet on a CPU: fewer images.
    tutorial = ["--model", "resnet18", "--batch-size", 64, "--subset", 640, "--epochs", 2]
    tutorial += ["--device", "cpu"]
    nchw = ["--memory-format", "nchw"]
    rungs = {
        "tutorial": [*tutorial, "--loader", "torchvision", *nchw, "--amp", "off"],
        "channels_last": [*tutorial, "--loader", "torchvision", "--amp", "off"],
        "bfloat16": [*tutorial, "--loader", "torchvision"],
        "batched-loading": tutorial,
        "compile": [*tutorial, "--compile"],
    }
    climb("pytorch", "train_cifar.py", rungs, len(available_cores()))

    climb("gpu", "gpu_scratch.py", {"kernels": size, "graph": [*size, "--graph"]}, needs_gpu=True)
    return suite


def recipes_suite(args) -> list[Experiment]:
    """The CNN, whose defaults overfit early, and what keeps it from that: one change a step."""
    decay = ["--weight-decay", 0.005]
    cosine = ["--schedule", "cosine", *decay]
    # More different images need less weight decay, and more epochs to learn from.
    augment = ["--augment", "on", "--schedule", "cosine", "--weight-decay", 0.0005]
    recipes = {
        "constant": [],
        "weight-decay": decay,
        "cosine": cosine,
        "augment": [*augment, "--epochs", 2 * args.epochs],
    }
    size = ["--batch-size", args.batch_size]
    return [
        Experiment("recipes", name, "serial_cnn.py", [*size, *options])
        for name, options in recipes.items()
    ]


SUITES = {
    "parallel": parallel_suite,
    "hardware": hardware_suite,
    "loading": loading_suite,
    "split": split_suite,
    "ladder": ladder_suite,
    "recipes": recipes_suite,
}


def powers_of_two(low: int, high: int) -> list[int]:
    """Those from low to high."""
    return [2**i for i in range(high.bit_length()) if low <= 2**i <= high]


def select_experiments(args) -> tuple[list[Experiment], dict[str, str]]:
    """The experiments to run, and {"suite/name": reason} for those that cannot run here."""
    suites = SUITES if args.suite == "all" else [args.suite]
    chosen = []
    for suite in suites:
        chosen += [e for e in SUITES[suite](args) if args.only in e.name]
    if not chosen:
        raise InputError(
            f"--only {args.only}: no configuration of --suite {args.suite} has that in its name"
        )

    ready = []
    left_out = {}
    for experiment in chosen:
        reason = missing_requirement(experiment)
        if reason:
            left_out[f"{experiment.suite}/{experiment.name}"] = reason
        else:
            ready.append(experiment)
    return ready, left_out


def missing_requirement(experiment):
    """What this machine or checkout lacks for an experiment; None if it can run."""
    if not (REPO / experiment.script).exists():
        return f"there is no {experiment.script}"
    if experiment.needs_gpu and not has_gpu():
        return "there is no NVIDIA GPU"
    if experiment.needs_bfloat16 and not has_bfloat16():
        return "this processor has no instructions for bfloat16"
    if "--compile" in experiment.options and not shutil.which(os.environ.get("CXX", "g++")):
        return "there is no C++ compiler"
    return None


@functools.lru_cache
def has_gpu():
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    except OSError:  # there is no nvidia-smi
        return False


# --------------------------------------------------------------------------------------------------
# The index
# --------------------------------------------------------------------------------------------------


class Index:
    """results/index.json: the settings of all runs, an entry for each run, what was left out.

    entries: {(suite, configuration, repeat): entry}. A run is entered when it has ended.
    """

    def __init__(self, path: Path, settings: dict):
        """Read the file if it exists. Raises InputError if its runs had other settings."""
        self.path = path
        self.settings = settings
        self.left_out = {}
        self.entries = {}
        if path.exists():
            self._read()

    def _read(self):
        try:
            content = json.loads(self.path.read_text())
            earlier = dict(content["settings"])
            self.left_out = dict(content["left_out"])
            for entry in content["runs"]:
                self.entries[entry["suite"], entry["configuration"], entry["repeat"]] = entry
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.path} is not an index of runs: delete it, or use another --results-dir"
            ) from None

        # Runs of different settings in one folder would be averaged as if they were repeats.
        for name, value in self.settings.items():
            if earlier.get(name) != value:
                raise InputError(
                    f"{self.path} has runs with {name} {earlier.get(name)}, now it is {value}: "
                    "use another --results-dir, or the options of those runs"
                )

    def add(self, entry: dict):
        self.entries[entry["suite"], entry["configuration"], entry["repeat"]] = entry
        self.write()

    def leave_out(self, ready: list, left_out: dict):
        """Enter what cannot run, and remove what could not run earlier but can now."""
        self.left_out.update(left_out)
        for experiment in ready:
            self.left_out.pop(f"{experiment.suite}/{experiment.name}", None)
        self.write()

    def write(self):
        content = {
            "settings": self.settings,
            "runs": list(self.entries.values()),
            "left_out": self.left_out,
        }
        with atomic_write(self.path, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


def data_options(args, data):
    """Options that make a script use the same images as this one."""
    options = ["--subset", args.subset, "--dataset", dataset_option(data.name)]
    if args.data_dir:
        options += ["--data-dir", args.data_dir]
    return options


def make_command(experiment, folder, args, data, repeat=1) -> list[str]:
    """The command line of a run whose results go to `folder`.

    Each repeat has a seed of its own: otherwise all would reach the same accuracy, and an interval
    of it would say nothing. (The synthetic images are made from the seed: there all have the same.)
    """
    command = [*experiment.launcher, sys.executable, REPO / experiment.script]
    command += ["--epochs", args.epochs, *data_options(args, data), *experiment.options]
    if data.name != "synthetic":
        command += ["--seed", FIRST_SEED + repeat - 1]
    command += ["--log", folder / "run.csv", "--save-metrics", folder / "run.npz", "--quiet"]
    if experiment.is_traced:
        command += ["--trace", folder / "trace.json"]
    return [str(word) for word in command]


def export_images(experiments, args, data):
    """Put the images where suite loading finds them on disk and over S3, unless they are there."""
    server = local_s3(args)
    used = {str(option) for experiment in experiments for option in experiment.options}
    if str(server.images) not in used and server.url not in used:
        return
    print(f"images for suite loading: {server.images}", flush=True)
    command = [*server.launcher, sys.executable, REPO / "train_cifar.py"]
    command += ["--export", server.url, *data_options(args, data), "--quiet"]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise TrainingError("the images for suite loading could not be exported")


def run_all(experiments, index, args, data) -> list[dict]:
    """Run what is missing, the repeats interleaved; returns the entries of all runs asked for."""
    # All configurations once, then all again: a machine that gets slower meanwhile does so for all.
    wanted = [(repeat, e) for repeat in range(1, args.repeats + 1) for e in experiments]
    todo = [(repeat, e) for repeat, e in wanted if not is_done(e, repeat, index, args.retry)]
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are there already", flush=True)

    earlier = [entry for entry in index.entries.values() if entry["status"] == "done"]
    progress = SuiteProgress(todo, args.epochs, earlier)
    with StopSignal() as stop, contextlib.closing(progress):
        # A terminal that is closed ends the running processes too, as SIGTERM does; nohup prevents
        # that by ignoring the signal.
        if in_main_thread() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        for repeat, experiment in todo:
            entry = run_one(experiment, repeat, args, data, progress, stop)
            index.add(entry)
            totals = read_totals(Path(args.results_dir) / entry["folder"])
            progress.end_run(entry, totals)
    return [index.entries[e.suite, e.name, repeat] for repeat, e in wanted]


def is_done(experiment, repeat, index, retry):
    """True for a run that has succeeded, and without --retry for one that has failed."""
    entry = index.entries.get((experiment.suite, experiment.name, repeat))
    return entry is not None and (entry["status"] == "done" or not retry)


def run_one(experiment, repeat, args, data, progress, stop) -> dict:
    """Run an experiment once, in a folder of its own; returns the entry for the index.

    Raises Interrupted, after ending the processes, if a signal has been received.
    """
    folder = Path(args.results_dir) / experiment.suite / experiment.name / str(repeat)
    # An interrupted run is not in the index: it starts anew, and its log must not be continued.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = make_command(experiment, folder, args, data, repeat)

    start = time.time()
    clock = time.monotonic()
    process = start_process(command, folder / "output.txt")
    status = "timeout"
    try:
        while time.monotonic() - clock < args.time_limit and not stop.requested:
            if has_ended(process):
                # A script that ends well without totals has not trained.
                is_complete = process.returncode == 0 and read_totals(folder)
                status = "done" if is_complete else "failed"
                break
            progress.show(experiment, repeat, folder, time.monotonic() - clock)
    finally:
        if process.returncode is None:
            stop_processes([process])
    if stop.requested and status == "timeout":
        raise Interrupted(
            f"interrupted by {stop.requested} in {folder}; the same command continues"
        )

    output = (folder / "output.txt").read_text(errors="replace").splitlines()
    return {
        "suite": experiment.suite,
        "configuration": experiment.name,
        "repeat": repeat,
        "command": command,
        "folder": str(folder.relative_to(args.results_dir)),
        "cores": experiment.cores,
        "oversubscribed": experiment.cores > len(available_cores()),
        "status": status,
        "start": start,
        "seconds": time.monotonic() - clock,
        "exit_status": process.returncode,
        "output": [] if status == "done" else output[-OUTPUT_LINES:],
    }


def start_process(command, output):
    """Start a command that writes stdout and stderr to the file `output`."""
    with open(output, "w") as file:
        # In a session of its own it does not get Ctrl-C: only this script decides when it ends.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def has_ended(process):
    """Wait at most 0.2 s for the end of a process."""
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return False
    return True


def read_totals(folder):
    """The totals in the metadata of a run that has come to its end; {} if it has not."""
    try:
        metadata = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return metadata.get("totals", {}) if metadata.get("status") == "done" else {}


@contextlib.contextmanager
def locked(folder: Path):
    """Raise InputError if another run_experiments.py is running in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another run_experiments.py is running in {folder}: wait for it, or use another "
            "--results-dir"
        ) from None
    with held:
        yield


# --------------------------------------------------------------------------------------------------
# Progress
# --------------------------------------------------------------------------------------------------


class SuiteProgress:
    """Prints a line for each run that has ended; on a terminal a bar below shows what runs now.

    todo: [(repeat, experiment)]; earlier: index entries of runs whose duration is known.
    """

    def __init__(self, todo, epochs, earlier=()):
        self.todo = list(todo)
        self.epochs = epochs
        self.total = len(self.todo)
        self.failed = 0
        self.seconds = defaultdict(list)  # {(suite, configuration): seconds of each of its runs}
        for entry in earlier:
            self._add_seconds(entry)
        options = {"leave": False, "dynamic_ncols": True, "file": sys.stdout}
        bar_format = "{n_fmt}/{total_fmt} |{bar:10}| {desc}"
        # disable=None: no bar where stdout is not a terminal
        self.bar = tqdm(total=self.total, bar_format=bar_format, disable=None, **options)

    def show(self, experiment, repeat, folder, elapsed):
        """Show a run that has been running for `elapsed` seconds."""
        epoch = current_epoch(folder / "run.csv")
        self.bar.set_description_str(
            f"{self.failed} failed; {self.time_left(elapsed)}; "
            f"{experiment.suite}/{experiment.name}/{repeat}, epoch {epoch}/{self.epochs}, "
            f"{elapsed:.0f} s"
        )

    def end_run(self, entry, totals):
        """Print the result of a run: its speed, or the last line that it has printed."""
        self.todo.pop(0)
        self._add_seconds(entry)
        if entry["status"] != "done":
            self.failed += 1

        printed = [line for line in entry["output"] if line.strip()]
        result = printed[-1] if printed else ""
        if "images_per_s" in totals:
            result = f"{totals['images_per_s']:>9,.0f} images/s"
        name = f"{entry['suite']}/{entry['configuration']}/{entry['repeat']}"
        mark = "  oversubscribed" if entry["oversubscribed"] else ""
        self.bar.update(1)
        self.bar.clear()
        print(
            f"{self.total - len(self.todo):>4}/{self.total}  {name:36} {entry['status']:8} "
            f"{entry['seconds']:6.1f} s  {result}{mark}",
            flush=True,
        )

    def time_left(self, elapsed):
        """Text with an estimate from the runs so far.

        For each run that is left: the mean of its configuration, else that of its suite, else that
        of all configurations.
        """
        if not self.seconds:
            return "time left not known yet"
        means = {key: mean(seconds) for key, seconds in self.seconds.items()}
        by_suite = defaultdict(list)
        for (suite, _), seconds in means.items():
            by_suite[suite].append(seconds)

        left = -elapsed
        for _, experiment in self.todo:
            if (experiment.suite, experiment.name) in means:
                left += means[experiment.suite, experiment.name]
            elif experiment.suite in by_suite:
                left += mean(by_suite[experiment.suite])
            else:
                left += mean(means.values())
        left = max(left, 0)
        return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"

    def _add_seconds(self, entry):
        self.seconds[entry["suite"], entry["configuration"]].append(entry["seconds"])

    def close(self):
        self.bar.close()


def current_epoch(log):
    """The epoch in the last complete row of a log that is being written; 0 before the first."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1000))  # the end is enough, and a log can be long
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    complete = lines[:-1]  # what follows the last newline is half a row
    cells = complete[-1].split(b",") if complete else []
    return int(cells[1]) if len(cells) > 1 and cells[1].isdigit() else 0


# --------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser("run_experiments", __doc__)
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), default="parallel", help="default: %(default)s")
    add("--only", metavar="TEXT", default="", help="only configurations with TEXT in their name")
    add("--epochs", type=number(int, 1, 10**6), default=5, help="default: %(default)s")
    subset = "first N training and N/5 test images (default: %(default)s)"
    add("--subset", type=number(int, 1, 50_000), default=5000, metavar="N", help=subset)
    repeats = "runs of each configuration (default: %(default)s)"
    add("--repeats", type=number(int, 1, 1000), default=3, help=repeats)
    batch_size = "images per step (default: %(default)s)"
    add("--batch-size", type=number(int, 1, 10**6), default=64, help=batch_size)
    add("--data-dir", help="folder with CIFAR-10 (default: $CIFAR10_DIR, else ./data)")
    dataset = "auto: CIFAR-10, else, if it cannot be downloaded, synthetic (default: %(default)s)"
    add("--dataset", choices=("auto", "cifar10", "synthetic"), default="auto", help=dataset)
    add("--s3", metavar="URL", help="s3://bucket/prefix, another source for suite loading")
    add("--results-dir", metavar="FOLDER", default="results", help="default: %(default)s")
    seconds = number(float, 0, 10**6, exclusive=True)
    time_limit = "longest time for a run; then the next one starts (default: %(default)s)"
    add("--time-limit", type=seconds, default=1800, metavar="SECONDS", help=time_limit)
    oversubscribe = "up to twice as many ranks × threads as cores; such runs are marked"
    add("--oversubscribe", action="store_true", help=oversubscribe)
    add("--retry", action="store_true", help="repeat runs that have failed or timed out before")
    args = parser.parse_args(argv)
    if args.s3 and not re.fullmatch(r"s3://[^/\s]+(/\S*)?", args.s3):
        raise InputError(f"--s3 {args.s3}: give s3://bucket/prefix")
    args.max_cores = len(available_cores()) * (2 if args.oversubscribe else 1)
    return args


def print_left_out(left_out):
    """A line for each reason, with all that it concerns."""
    names = defaultdict(list)
    for name, reason in left_out.items():
        names[reason].append(name)
    for reason in names:
        print(f"left out: {', '.join(names[reason])}: {reason}", flush=True)


def main(argv=None):
    args = parse_args(argv)
    results = Path(args.results_dir)
    check_outputs([results / "index.json"])
    experiments, left_out = select_experiments(args)
    print_left_out(left_out)
    if not experiments:
        raise InputError(f"--suite {args.suite}: nothing of it can run here: use another suite")

    data = load_dataset(args.data_dir, args.dataset, args.subset)
    settings = {
        "epochs": args.epochs,
        "subset": args.subset,
        "batch_size": args.batch_size,
        "dataset": data.name,
        "fingerprint": data.fingerprint,
        "cpu": cpu_model(),
        "cores": len(available_cores()),
    }
    # Two at once would measure each other, and each would overwrite the other's index.
    with locked(results):
        index = Index(results / "index.json", settings)
        index.leave_out(experiments, left_out)
        export_images(experiments, args, data)
        entries = run_all(experiments, index, args, data)

    failed = [entry for entry in entries if entry["status"] != "done"]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(entries)} runs failed or timed out; {index.path} has the last "
            "lines of their output; --retry repeats them"
        )
    print(f"{len(entries)} runs done; written: {index.path}")


if __name__ == "__main__":
    run_main(main)
