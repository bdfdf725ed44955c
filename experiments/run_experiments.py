"""Run suites of the other scripts as processes, again and again, and keep every result for analysis.

A suite is a list of configurations, each a command line of a script. They run one after another, interleaved over the
repeats (A B C A B C ...), so that a machine whose speed drifts drifts for all alike. Each run leaves its log, sidecar
and metrics in results/<suite>/<configuration>/<repeat>/; results/index.json lists all runs, with the last lines of what
failed. A second start runs what is missing. What this machine or checkout does not have is left out by name.

    make experiments
    python run_experiments.py --suite parallel --epochs 5 --subset 5000 --repeats 3
    python run_experiments.py --suite hardware --only cnn --epochs 1 --repeats 1 --results-dir results/hardware
    python run_experiments.py --suite parallel --only mpi --oversubscribe --results-dir results/crowded
"""

import contextlib
import fcntl
import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import (
    InputError,
    Interrupted,
    Parser,
    TrainingError,
    atomic_write,
    available_cores,
    check_outputs,
    cpu_model,
    find_mpirun,
    load_cifar10,
    number,
    run_main,
    stop_processes,
)

HERE = Path(__file__).resolve().parent
LAST_LINES = 20  # of a failed run's output that the index keeps
SPLIT_MODES = ("all", "split", "pipelined", "replicas")


class Configuration(NamedTuple):
    suite: str
    name: str
    launch: list  # what stands before the script: mpirun, or env with a variable
    script: str
    options: list  # beside those that all have
    cores: int  # ranks × threads
    gpu: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# Suites: args → list of configurations
# ----------------------------------------------------------------------------------------------------------------------


def parallel_suite(args):
    """Serial, MPI, hybrid. strong: --batch-size images a step in all; weak: as many for every core."""
    size, mpirun = args.batch_size, [find_mpirun(), "-np"]
    suite = [Configuration("parallel", "serial", [], "serial_cnn.py", ["--batch-size", size], 1)]
    for ranks in powers_of_two(2, args.most_cores):
        for scaling, options in (
            ("strong", ["--global-batch-size", size]),
            ("weak", ["--batch-size", size]),
        ):
            suite.append(
                Configuration(
                    "parallel",
                    f"mpi-{ranks}-{scaling}",
                    [*mpirun, ranks],
                    "parallel_cnn_mpi.py",
                    options,
                    ranks,
                )
            )
    for ranks in powers_of_two(1, args.most_cores):
        for threads in powers_of_two(1, args.most_cores // ranks):
            cores = ranks * threads
            forced = cores > len(available_cores())
            force = ["--force-threads"] if forced else []
            launch = (
                ["env", f"NUMBA_NUM_THREADS={threads}"] if forced else []
            )  # else Numba has no more than cores
            for scaling, total in (("strong", size), ("weak", size * cores)):
                if scaling == "strong" or cores > 1:  # on one core both are the same
                    options = ["--num-threads", threads, "--global-batch-size", total, *force]
                    suite.append(
                        Configuration(
                            "parallel",
                            f"hybrid-{ranks}x{threads}-{scaling}",
                            [*launch, *mpirun, ranks],
                            "parallel_cnn_hybrid.py",
                            options,
                            cores,
                        )
                    )
    return suite


def hardware_suite(args):
    """CNN and ResNet-18 × from scratch and PyTorch × one core, all cores, GPU; float32 and no augmentation in all."""
    cores, size, suite = len(available_cores()), ["--batch-size", args.batch_size], []
    one_rank, one_core = (
        [find_mpirun(), "-np", 1],
        ["env", "OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1"],
    )
    for model in ("cnn", "resnet18"):
        options = ["--model", model, *size]
        same = [*options, "--amp", "off", "--augment", "off"]  # as those from scratch train
        on_cpu, on_gpu = [*same, "--device", "cpu"], [*same, "--device", "cuda"]
        for name, launch, script, more, used in (
            ("scratch-1-core", [], "serial_cnn.py", options, 1),
            (
                f"scratch-{cores}-cores",
                one_rank,
                "parallel_cnn_hybrid.py",
                [*options, "--num-threads", cores],
                cores,
            ),
            ("scratch-gpu", [], "gpu_scratch.py", options, 1),
            ("pytorch-1-core", one_core, "train_cifar.py", on_cpu, 1),
            (f"pytorch-{cores}-cores", [], "train_cifar.py", on_cpu, cores),
            ("pytorch-gpu", [], "train_cifar.py", on_gpu, 1),
        ):
            if not name.endswith("-1-cores"):
                suite.append(
                    Configuration(
                        "hardware", f"{model}-{name}", launch, script, more, used, "gpu" in name
                    )
                )
    return suite


def loading_suite(args):
    """The CNN in PyTorch fed from every source by every number of workers, and the same loading alone."""
    suite, (server, bucket, pictures) = [], local_s3(args)
    sources = [
        ("memory", [], ["builtin"]),
        ("disk", [], ["disk", "--data-dir", pictures]),
        ("s3-stream", server, [bucket, "--s3-mode", "stream"]),
        ("s3-shards", server, [bucket, "--s3-mode", "shards"]),
        *([("s3-given", [], [args.s3])] if args.s3 else []),
    ]
    for name, launch, source in sources:
        for workers in (0, *powers_of_two(1, args.most_cores)):
            for kind, more in (("train", []), ("load", ["--load-only"])):
                options = [
                    "--model",
                    "cnn",
                    "--batch-size",
                    args.batch_size,
                    "--augment",
                    "on",
                    "--source",
                    *source,
                    "--workers",
                    workers,
                    *more,
                ]
                suite.append(
                    Configuration(
                        "loading",
                        f"{name}-{workers}-workers-{kind}",
                        launch,
                        "train_cifar.py",
                        options,
                        max(workers, 1),
                    )
                )
    return suite


def local_s3(args):
    """How to start a script with an S3 server on this machine, its URL, and the folder whose pictures it serves."""
    folder = Path(args.results_dir).resolve() / "s3"
    launch = [sys.executable, HERE / "s3_server.py", "--dir", folder]
    return launch, f"s3://cifar10/{args.subset}", folder / "buckets" / "cifar10" / str(args.subset)


def prepare_pictures(configurations, args, data):
    """Put the images where suite loading finds them on disk and over S3, unless they are there."""
    launch, bucket, pictures = local_s3(args)
    if any({str(pictures), bucket} & set(map(str, c.options)) for c in configurations):
        print(f"pictures for suite loading: {pictures}", flush=True)
        options = [
            "--export",
            bucket,
            "--subset",
            args.subset,
            "--dataset",
            data.name,
            "--quiet",
            *(["--data-dir", args.data_dir] if args.data_dir else []),
        ]
        command = [*launch, sys.executable, HERE / "train_cifar.py", *options]
        if subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL).returncode:
            raise TrainingError("the pictures for suite loading could not be made")


def split_suite(args):
    """ResNet-50 with forward and backward pass on separate cores, in every mode."""
    return [
        Configuration(
            "split",
            mode,
            [],
            "train_resnet50_split_cores.py",
            ["--mode", mode, "--batch-size", args.batch_size],
            len(available_cores()),
        )
        for mode in SPLIT_MODES
    ]


SUITES = {
    "parallel": parallel_suite,
    "hardware": hardware_suite,
    "loading": loading_suite,
    "split": split_suite,
}


def powers_of_two(low, high):
    return [2**i for i in range(high.bit_length()) if low <= 2**i <= high]


def select(args):
    """The configurations to run, and {reason: [names]} of those that are left out."""
    names = SUITES if args.suite == "all" else [args.suite]
    chosen = [c for name in names for c in SUITES[name](args) if args.only in c.name]
    if not chosen:
        raise InputError(
            f"--only {args.only}: no configuration of --suite {args.suite} has that in its name"
        )
    left_out, ready = {}, []
    for configuration in chosen:
        reason = why_not(configuration)
        if reason:
            left_out.setdefault(reason, []).append(f"{configuration.suite}/{configuration.name}")
        else:
            ready.append(configuration)
    return ready, left_out


def why_not(configuration):
    """Why a configuration cannot run here; None if it can."""
    script = configuration.script
    if not (HERE / script).exists():
        return f"there is no {script}"
    if configuration.gpu and not has_gpu():
        return "there is no NVIDIA GPU"
    text, problem = read_help(script)
    if problem:
        return f"{script} --help fails: {problem}"
    for option, value in zip(
        configuration.options, [*configuration.options[1:], None], strict=True
    ):
        if not str(option).startswith("--"):
            continue
        found = re.search(rf"{option}(?![\w-])(?:\s+\{{(.*?)\}})?", text, re.S)
        if not found:
            return f"{script} has no {option}"
        is_url = str(value).startswith("s3://")
        if found[1] and not is_url and str(value) not in re.split(r"[,\s]+", found[1]):
            return f"{script} has no {option} {value}"
    return None


@functools.lru_cache
def read_help(script):
    """What `--help` prints, and what went wrong."""
    done = subprocess.run([sys.executable, HERE / script, "--help"], capture_output=True, text=True)
    return done.stdout, (
        done.stderr.strip().split("\n")[-1] or "no reason given"
    ) if done.returncode else None


@functools.lru_cache
def has_gpu():
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------------


class Index:
    """results/index.json: settings that all runs share, an entry for each run that has ended, what was left out."""

    def __init__(self, path, settings):
        self.path, self.content = path, {"settings": settings, "runs": [], "left_out": {}}
        if path.exists():
            try:
                self.content = json.loads(path.read_text())
                self.entries = {
                    (e["suite"], e["configuration"], e["repeat"]): e for e in self.content["runs"]
                }
                before = self.content["settings"]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path} is not an index of runs: delete it, or give another --results-dir"
                ) from None
            for name, value in settings.items():
                if before.get(name) != value:
                    raise InputError(
                        f"{path} has runs with {name} {before.get(name)}, now it is {value}: give another "
                        "--results-dir, or that run's options"
                    )
        self.entries = {
            (e["suite"], e["configuration"], e["repeat"]): e for e in self.content["runs"]
        }

    def add(self, entry):
        self.entries[entry["suite"], entry["configuration"], entry["repeat"]] = entry
        self.write()

    def write(self):
        self.content["runs"] = list(self.entries.values())
        with atomic_write(self.path, "w") as file:
            json.dump(self.content, file, indent=1)
            file.write("\n")


def make_command(configuration, folder, args, data):
    options = [
        "--epochs",
        args.epochs,
        "--subset",
        args.subset,
        "--dataset",
        data.name,
        *(["--data-dir", args.data_dir] if args.data_dir else []),
        *configuration.options,
        "--log",
        folder / "run.csv",
        "--save-metrics",
        folder / "run.npz",
        "--quiet",
    ]
    return list(
        map(str, [*configuration.launch, sys.executable, HERE / configuration.script, *options])
    )


def run_one(configuration, repeat, args, data, overview, signals):
    """Run a configuration in a folder of its own; returns its entry for the index. Raises Interrupted on a signal."""
    folder = Path(args.results_dir) / configuration.suite / configuration.name / str(repeat)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run has left
    folder.mkdir(parents=True)
    command = make_command(configuration, folder, args, data)
    started, status = time.time(), "timeout"
    deadline = time.monotonic() + args.time_limit
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while time.monotonic() < deadline and not signals:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = "failed" if process.wait(0.2) else "done"
                    break
                overview.show(configuration, repeat, folder, time.time() - started)
        finally:
            stop_processes([process] if process.returncode is None else [])
    if signals and status == "timeout":
        raise Interrupted(
            f"interrupted by {signal.Signals(signals[0]).name} in {folder}; the same command goes on"
        )
    entry = {
        "suite": configuration.suite,
        "configuration": configuration.name,
        "repeat": repeat,
        "command": command,
        "folder": str(folder.relative_to(args.results_dir)),
        "cores": configuration.cores,
        "oversubscribed": configuration.cores > len(available_cores()),
        "status": status,
        "start": started,
        "seconds": time.time() - started,
        "exit_status": process.returncode,
        "output": [],
    }
    if status == "done" and not read_totals(folder):
        entry["status"] = "failed"
    if entry["status"] != "done":
        entry["output"] = (
            (folder / "output.txt").read_text(errors="replace").splitlines()[-LAST_LINES:]
        )
    return entry


def read_totals(folder):
    """The totals in the sidecar of a run that says that it is done; else {}."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sidecar = json.loads((folder / "run.json").read_text())
        return sidecar.get("totals", {}) if sidecar.get("status") == "done" else {}
    return {}


class Overview:
    """A line for each run that has ended and, on a terminal, one that tells what runs, what is done and time left."""

    def __init__(self, todo, epochs, known=()):
        """known: entries of earlier runs, from which it can tell the time left at once."""
        self.todo, self.epochs, self.terminal = list(todo), epochs, sys.stdout.isatty()
        self.total, self.seconds, self.failed = len(self.todo), {}, 0
        for entry in known:
            self._add_seconds(entry)

    def show(self, configuration, repeat, folder, elapsed):
        if not self.terminal:
            return
        line = (
            f"{self._done()}/{self.total} done, {self.failed} failed; {self.time_left(elapsed)}; "
            f"{configuration.suite}/{configuration.name}/{repeat} {self._epoch(folder)}{elapsed:.0f} s"
        )
        print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)

    def end_run(self, entry, totals):
        self.todo.pop(0)
        self._add_seconds(entry)
        self.failed += entry["status"] != "done"
        name = f"{entry['suite']}/{entry['configuration']}/{entry['repeat']}"
        said = next((line for line in reversed(entry["output"]) if line.strip()), "")
        speed = f"{totals['images_per_s']:>9,.0f} images/s" if "images_per_s" in totals else said
        mark = "  oversubscribed" if entry["oversubscribed"] else ""
        if self.terminal:
            print("\r\033[K", end="")
        print(
            f"{self._done():>4}/{self.total}  {name:36} {entry['status']:8} {entry['seconds']:6.1f} s  {speed}{mark}",
            flush=True,
        )

    def time_left(self, elapsed):
        """From the runs so far: a configuration's own mean, else that of its suite, else that of all."""
        if not self.seconds:
            return "time left not known yet"
        means = {name: mean(seconds) for name, seconds in self.seconds.items()}
        by_suite = {s: mean([m for (suite, _), m in means.items() if suite == s]) for s, _ in means}
        left = sum(
            means.get((c.suite, c.name), by_suite.get(c.suite, mean(means.values())))
            for _, c in self.todo
        )
        left -= elapsed
        return (
            f"about {max(left, 0) / 60:.0f} min left"
            if left >= 90
            else f"about {max(left, 0):.0f} s left"
        )

    def _add_seconds(self, entry):
        self.seconds.setdefault((entry["suite"], entry["configuration"]), []).append(
            entry["seconds"]
        )

    def _done(self):
        return self.total - len(self.todo)

    def _epoch(self, folder):
        with contextlib.suppress(OSError, IndexError, ValueError):
            with open(folder / "run.csv", "rb") as file:
                file.seek(max(0, file.seek(0, 2) - 1000))
                last = file.read().split(b"\n")[-2].split(b",")  # the last complete row
            return f"epoch {int(last[1])}/{self.epochs} "
        return ""

    def close(self):
        if self.terminal:
            print("\r\033[K", end="", flush=True)


@contextlib.contextmanager
def only_one(folder):
    """Raise InputError if another run_experiments.py is at work in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another run_experiments.py is at work in {folder}: wait for it, or give another "
                "--results-dir"
            ) from None
        yield


def run_all(configurations, index, args, data):
    """Run what is missing, interleaved over the repeats; returns the entries of all that was asked for."""
    wanted = [(repeat, c) for repeat in range(1, args.repeats + 1) for c in configurations]
    again = ("failed", "timeout") if args.retry else ()
    known = {key for key, entry in index.entries.items() if entry["status"] not in again}
    todo = [(repeat, c) for repeat, c in wanted if (c.suite, c.name, repeat) not in known]
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are there already", flush=True)
    signals = []
    overview = Overview(
        todo, args.epochs, [entry for entry in index.entries.values() if entry["status"] == "done"]
    )
    for name in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # looked at between two looks at the running process
        signal.signal(name, lambda received, _: signals.append(received))
    with contextlib.closing(overview):
        for repeat, configuration in todo:
            entry = run_one(configuration, repeat, args, data, overview, signals)
            index.add(entry)
            overview.end_run(entry, read_totals(Path(args.results_dir) / entry["folder"]))
    return [index.entries[c.suite, c.name, repeat] for repeat, c in wanted]


# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser("run_experiments", __doc__)
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), default="parallel", help="default: %(default)s")
    add(
        "--only",
        metavar="TEXT",
        default="",
        help="only the configurations whose name contains TEXT",
    )
    add("--epochs", type=number(int, 1, 10**6), default=5, help="default: %(default)s")
    add(
        "--subset",
        type=number(int, 1, 50_000),
        default=5000,
        metavar="N",
        help="first N training and N/5 test images (default: %(default)s)",
    )
    add(
        "--repeats",
        type=number(int, 1, 1000),
        default=3,
        help="of each configuration (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=number(int, 1, 10**6),
        default=64,
        help="images per step (default: %(default)s)",
    )
    add("--data-dir", help="folder with CIFAR-10 (default: $CIFAR10_DIR, else ./data)")
    add(
        "--dataset",
        choices=("auto", "cifar10", "synthetic"),
        default="auto",
        help="auto: CIFAR-10 from --data-dir, else downloaded, else synthetic (default: %(default)s)",
    )
    add("--s3", metavar="URL", help="s3://bucket/prefix: a further source of suite loading")
    add("--results-dir", metavar="FOLDER", default="results", help="default: %(default)s")
    add(
        "--time-limit",
        type=number(float, 0, 10**6, exclusive=True),
        default=1800,
        metavar="SECONDS",
        help="end a run that takes longer, and go on with the next (default: %(default)s)",
    )
    add(
        "--oversubscribe",
        action="store_true",
        help="run up to twice as many ranks x threads as there are cores too, and mark them so",
    )
    add("--retry", action="store_true", help="run again what has failed or taken too long before")
    args = parser.parse_args(argv)
    if args.s3 and not re.fullmatch(r"s3://[^/\s]+(/\S*)?", args.s3):
        raise InputError(f"--s3 {args.s3}: give s3://bucket/prefix")
    args.most_cores = len(available_cores()) * (2 if args.oversubscribe else 1)
    return args


def main(argv=None):
    args = parse_args(argv)
    check_outputs([Path(args.results_dir) / "index.json"])
    configurations, left_out = select(args)
    for reason, names in left_out.items():
        print(f"left out: {', '.join(names)}: {reason}", flush=True)
    if not configurations:
        raise InputError(f"--suite {args.suite}: nothing of it can run here: choose another suite")
    data = load_cifar10(args.data_dir, args.dataset, args.subset)
    settings = {
        "epochs": args.epochs,
        "subset": args.subset,
        "batch_size": args.batch_size,
        "dataset": data.name,
        "fingerprint": data.fingerprint,
        "cpu": cpu_model(),
        "cores": len(available_cores()),
    }
    with only_one(Path(args.results_dir)):
        index = Index(Path(args.results_dir) / "index.json", settings)
        index.content["left_out"].update(
            {name: reason for reason, names in left_out.items() for name in names}
        )
        for configuration in configurations:
            index.content["left_out"].pop(f"{configuration.suite}/{configuration.name}", None)
        index.write()
        prepare_pictures(configurations, args, data)
        entries = run_all(configurations, index, args, data)
    bad = [entry for entry in entries if entry["status"] != "done"]
    if bad:
        raise TrainingError(
            f"{len(bad)} of {len(entries)} runs failed or took too long; their last lines stand in "
            f"{index.path}; --retry runs them again"
        )
    print(f"{len(entries)} runs done; written: {index.path}")


if __name__ == "__main__":
    run_main(main)
