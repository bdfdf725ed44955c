"""Tables and plots of what run_experiments.py has measured, or of the logs of any runs.

Reads results/<suite>/<configuration>/<repeat>/run.csv and run.json and results/index.json, or the logs that are named.
Prints the tables; writes them as CSV, the plots as PNG and SVG, and analysis.json, which has every number once more.

    make analyze
    python analyze_results.py --results-dir results --output-dir results/analysis
    python analyze_results.py results/serial_cnn.csv results/parallel_cnn_mpi.csv --output-dir results/comparison

±: half of the 95 % interval of a mean over n repeats: t(0.975, n − 1) · s / √n, nothing for n = 1.
Speed-up S: images/s against the same work on one core (MPI: serial_cnn.py; hybrid: one rank of one thread). Repeats run
interleaved, so repeat i is divided by repeat i of the reference; mean and interval are those of the n ratios. Strong
scaling: T(1)/T(p), the batch is the same; weak scaling: the scaled speed-up, the batch grows with p = ranks × threads.
Efficiency: S/p. Karp–Flatt: the serial fraction (1/S − 1/p) / (1 − 1/p) of each p. Amdahl's law 1/S = s + (1 − s)/p is
fitted to all p at once by least squares in 1/S, each repeat by itself.
Runs of different machines or data sets are never averaged or divided by each other; different commits are marked.
"""

import csv
import datetime
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import (
    BATCH,
    FETCH_TRAIN,
    LOG_COLUMNS,
    TRAIN,
    VALIDATE,
    InputError,
    Parser,
    atomic_write,
    run_main,
    table,
)

SUITES = ("parallel", "hardware", "loading", "split")
FROM_SCRATCH = (
    "serial_cnn",
    "parallel_cnn_mpi",
    "parallel_cnn_hybrid",
    "gpu_scratch",
)  # with the same weights
PHASES = ("loading", "forward", "backward", "communication", "update")
TRAINING = {  # what a report has to tell of a training: arguments of the scripts and entries of the sidecars
    "model": "model",
    "train_images": "images",
    "test_images": "test images",
    "epochs": "epochs",
    "global_batch_size": "images a step",
    "optimizer": "optimizer",
    "lr": "learning rate",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "dtype": "dtype",
    "amp": "mixed precision",
    "augment": "augmentation",
    "seed": "seed",
}
QUANTITIES = {  # label, unit, digits
    "n": ("repeats", "", 0),
    "cores": ("cores", "", 0),
    "ranks": ("ranks", "", 0),
    "threads": ("threads", "", 0),
    "batch": ("images a step", "", 0),
    "workers": ("workers", "", 0),
    "seconds": ("training time", "s", 2),
    "images_per_s": ("throughput", "images/s", 1),
    "speedup": ("speed-up", "×", 2),
    "speedup_over_serial": ("against serial_cnn.py", "×", 2),
    "efficiency": ("efficiency", "%", 1),
    "serial_fraction": ("Karp–Flatt", "%", 1),
    "train_loss": ("train loss", "", 4),
    "test_loss": ("test loss", "", 4),
    "train_accuracy": ("train accuracy", "%", 2),
    "test_accuracy": ("test accuracy", "%", 2),
    "loss_difference": ("largest loss difference", "", 6),
    "accuracy_difference": ("largest accuracy difference", "points", 2),
    "ram_mb": ("peak RAM", "MiB", 0),
    "cpu_percent": ("CPU use", "% of a core", 0),
    "gpu_percent": ("GPU use", "%", 0),
    "gpu_mem_mb": ("peak GPU memory", "MiB", 0),
    "step_ms": ("step", "ms", 2),
    **{f"{phase}_ms": (phase, "ms", 2) for phase in PHASES},
    **{f"{phase}_share": (f"{phase} share", "%", 2) for phase in PHASES},
    "update_ms": ("update and rest", "ms", 2),
    "update_share": ("update and rest", "%", 2),
    "epoch_seconds": ("epoch", "s", 3),
    "epoch_loading": ("waiting per epoch", "s", 3),
    "first_loading_share": ("waiting, first epoch", "%", 2),
    "later_loading_share": ("waiting, later epochs", "%", 2),
    "batch_loading_ms": ("waiting per batch, median", "ms", 3),
    "batch_loading_max_ms": ("longest", "ms", 2),
    "alone_images_per_s": ("loading alone", "images/s", 0),
    "fetch_seconds": ("fetching before", "s", 2),
    "speedup_over_all": ("against all", "×", 2),
    "speedup_over_split": ("against split", "×", 2),
    "idle_forward": ("idle: forward's cores", "%", 1),
    "idle_backward": ("backward's cores", "%", 1),
}


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


class Log:
    """A run log: the rows of epochs as {column: float}; those of batches stay text until they are asked for."""

    def __init__(self, path, warn):
        self.path, self.epochs, self.batch_lines = (
            path,
            {TRAIN: [], VALIDATE: [], FETCH_TRAIN: []},
            [],
        )
        try:
            header, *lines = path.read_text().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: {getattr(error, 'strerror', None) or 'it is not text'}"
            ) from None
        if header.split(",") != list(LOG_COLUMNS):
            raise InputError(f"{path} is not a run log: its first line has other columns")
        whole = lines[:-1]  # what follows the last newline is cut off, or empty
        damaged = int(bool(lines and lines[-1]))
        for line in whole:
            if line.startswith(f"{BATCH},") and line.count(",") == len(LOG_COLUMNS) - 1:
                self.batch_lines.append(line)
            elif row := parse_row(line):
                self.epochs.setdefault(row["type"], []).append(row)
            else:
                damaged += 1
        if damaged:
            warn(f"{path}: {damaged} damaged or cut off lines are left out")
        if not self.epochs[TRAIN]:
            raise InputError(f"{path} has no complete epoch")

    def batches(self):
        """The rows of batches, parsed."""
        return [row for line in self.batch_lines if (row := parse_row(line))]

    def steps(self):
        """How many batches the complete epochs had, and the row of the last one of each."""
        complete, last = {f"{row['epoch']:.0f}" for row in self.epochs[TRAIN]}, {}
        for line in self.batch_lines:
            epoch = line.split(",", 2)[1]
            if epoch in complete:
                last[epoch] = line
        rows = [row for line in last.values() if (row := parse_row(line))]
        return sum(int(row["value1"]) for row in rows), rows


def parse_row(line):
    """A line of a log as {column: number, None where empty}; None if it is damaged."""
    try:
        row = {
            name: float(cell) if cell else None
            for name, cell in zip(LOG_COLUMNS, line.split(","), strict=True)
        }
        needed = [row[name] for name in ("type", "epoch", "loading", "duration")]
        needed += [row["images_per_s"]] * (row["type"] in (TRAIN, BATCH)) + [row["value1"]] * (
            row["type"] == BATCH
        )
        return row if all(map(math.isfinite, needed)) and row["duration"] > 0 else None
    except (ValueError, TypeError):
        return None


class RunResult(NamedTuple):
    suite: str
    configuration: str
    repeat: int
    log: Log
    sidecar: dict
    cores: int
    oversubscribed: bool
    data: tuple  # name and fingerprint of the data set, whatever source it came from

    @property
    def machine(self):
        """What must be the same for runs to be averaged or divided by each other."""
        return (
            self.sidecar.get("host"),
            self.sidecar.get("cpu"),
            len(self.sidecar.get("cores") or []),
            *self.data,
        )


def read_sidecar(log, warn):
    path = log.with_suffix(".json")
    try:
        sidecar = json.loads(path.read_text())
        if isinstance(sidecar, dict):
            return sidecar
        reason = "it is no description of a run"
    except OSError as error:
        reason = error.strerror
    except ValueError:
        reason = "it is not JSON"
    warn(f"{path}: {reason}: machine and data set of this run are unknown")
    return {}


def make_run(suite, name, repeat, path, warn, entry=None, settings=None):
    """A RunResult. entry, settings: of the index, which knows what data set the pictures of a source were made of."""
    log, sidecar, entry = Log(path, warn), read_sidecar(path, warn), entry or {}
    if sidecar.get("status", "done") != "done":
        warn(f"{path}: this run is {sidecar['status']}: what counts are its complete epochs")
    from_memory = (sidecar.get("arguments") or {}).get("source", "builtin") == "builtin"
    data = sidecar if from_memory or not settings else settings
    cores = entry.get("cores") or (sidecar.get("ranks") or 1) * (sidecar.get("threads") or 1)
    here = len(sidecar.get("cores") or [])
    crowded = entry.get("oversubscribed", here > 0 and cores > here)
    return RunResult(
        suite,
        name,
        repeat,
        log,
        sidecar,
        cores,
        crowded,
        (data.get("dataset"), data.get("fingerprint")),
    )


def read_results(folder, warn):
    """The runs that results/index.json lists as done, the entries of the others, and what was left out."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
        entries = [
            (e["suite"], e["configuration"], e["repeat"], e["status"], e["folder"], e)
            for e in index["runs"]
        ]
        left_out, settings = dict(index.get("left_out", {})), dict(index["settings"])
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}: run make experiments first, or name the logs of runs"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not an index of runs: delete it and run make experiments"
        ) from None
    runs, failed = [], []
    for suite, name, repeat, status, place, entry in entries:
        if status != "done":
            failed.append(
                {
                    "run": f"{suite}/{name}/{repeat}",
                    "status": status,
                    "output": entry.get("output", []),
                }
            )
            continue
        try:
            runs.append(
                make_run(suite, name, repeat, folder / place / "run.csv", warn, entry, settings)
            )
        except InputError as error:
            warn(f"{error}: this run is left out")
    return runs, failed, left_out


def read_files(paths, warn):
    """Each log is a configuration of its own, named after its file, or where names are the same, after folders too."""
    paths = list(dict.fromkeys(paths))
    stems = Counter(path.stem for path in paths)
    above = os.path.commonpath([path.absolute().parent for path in paths])
    names = [
        path.stem if stems[path.stem] == 1 else os.path.relpath(path.with_suffix(""), above)
        for path in paths
    ]
    return [make_run("files", name, 1, path, warn) for name, path in zip(names, paths, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over n repeats with its 95 % interval, None for n < 2; `values` by repeat."""

    value: float
    low: float | None
    high: float | None
    n: int
    values: dict

    @property
    def half(self):
        return None if self.low is None else (self.high - self.low) / 2


def estimate(values):
    """Mean and 95 % interval of {repeat: value}: mean ± t(0.975, n − 1) · s / √n. None if there is no value."""
    values = {
        repeat: value
        for repeat, value in values.items()
        if value is not None and math.isfinite(value)
    }
    if not values:
        return None
    numbers, n = np.array(list(values.values()), float), len(values)
    mean, half = float(numbers.mean()), None
    if n > 1:
        from scipy.special import stdtrit

        half = float(stdtrit(n - 1, 0.975) * numbers.std(ddof=1) / math.sqrt(n))
    return Estimate(
        mean,
        None if half is None else mean - half,
        None if half is None else mean + half,
        n,
        values,
    )


def ratio(ours, theirs, factor=1.0):
    """Estimate of the ratios of two Estimates, repeat by repeat; None where they have no repeat in common."""
    if not (ours and theirs):
        return None
    pairs = {
        r: factor * v / theirs.values[r] for r, v in ours.values.items() if theirs.values.get(r)
    }
    return estimate(pairs)


def karp_flatt(speedup, cores):
    """The experimentally determined serial fraction (Karp and Flatt, CACM 33(5), 1990)."""
    return (1 / speedup - 1 / cores) / (1 - 1 / cores)


def amdahl_fit(points):
    """The serial fraction s for which 1/S = s + (1 − s)/p is nearest to [(p, S)], by least squares in 1/S."""
    x = np.array([1 - 1 / p for p, _ in points])
    y = np.array([1 / s - 1 / p for p, s in points])
    return float(x @ y / (x @ x))


def measure(run):
    """{quantity: number} of a run, from its log; use of RAM, CPU and GPU from its sidecar where it has them."""
    train, validate, totals = (
        run.log.epochs[TRAIN],
        run.log.epochs[VALIDATE],
        run.sidecar.get("totals") or {},
    )
    seconds = sum(row["duration"] for row in train)
    steps, last = run.log.steps()
    result = {
        "seconds": seconds,
        "images_per_s": sum(row["duration"] * row["images_per_s"] for row in train) / seconds,
        "train_loss": train[-1]["loss"],
        "train_accuracy": percent(train[-1]["value1"]),
        "ram_mb": totals.get("peak_ram_mb") or largest(train, "ram_mb"),
        "gpu_mem_mb": totals.get("peak_gpu_mem_mb") or largest(train, "gpu_mem_mb"),
        "cpu_percent": totals.get("mean_cpu_percent"),
        "gpu_percent": totals.get("mean_gpu_percent"),
        "epoch_seconds": seconds / len(train),
        "epoch_loading": sum(row["loading"] for row in train) / len(train),
        "first_loading_share": percent(train[0]["loading"] / train[0]["duration"]),
        "fetch_seconds": sum(row["duration"] for row in run.log.epochs[FETCH_TRAIN]) or None,
    }
    if validate:
        result.update(test_loss=validate[-1]["loss"], test_accuracy=percent(validate[-1]["value1"]))
    if later := train[1:]:
        shares = sum(row["loading"] for row in later) / sum(row["duration"] for row in later)
        result["later_loading_share"] = percent(shares)
    for group in ("forward", "backward"):
        result[f"idle_{group}"] = percent((totals.get("idle") or {}).get(group))
    if last:
        result.update(step_ms=1000 * seconds / steps, **phases(last, steps))
    return result


def phases(rows, steps):
    """Milliseconds and share of a step in each phase. update: what the logged phases leave; without it they overlap.

    rows: the last batch's of each epoch. They are of rank 0 alone and add up, while communication in an epoch's own row
    is a mean over the ranks.
    """
    result, rest = {}, sum(row["duration"] for row in rows)
    seconds = rest
    for phase in PHASES[:-1]:
        if all(row[phase] is not None for row in rows):
            spent = sum(row[phase] for row in rows)
            rest -= spent
            result.update(
                {f"{phase}_ms": 1000 * spent / steps, f"{phase}_share": percent(spent / seconds)}
            )
    if "forward_ms" in result and rest >= 0:
        result.update(update_ms=1000 * rest / steps, update_share=percent(rest / seconds))
    return result


def percent(share):
    return None if share is None else 100 * share


def largest(rows, column):
    return max((row[column] for row in rows if row[column] is not None), default=None)


class Configuration:
    """The repeats of one command line on one machine: `estimates` has {quantity: Estimate}."""

    def __init__(self, suite, name, environment, runs):
        self.suite, self.base, self.environment, self.runs = suite, name, environment, runs
        self.name = name if environment == 1 else f"{name} [{environment}]"
        self.cores, self.oversubscribed = runs[0].cores, any(run.oversubscribed for run in runs)
        sidecar = self.sidecar = runs[0].sidecar
        arguments = self.arguments = sidecar.get("arguments") or {}
        self.ranks, self.threads = sidecar.get("ranks"), sidecar.get("threads")
        self.batch, self.n = (
            arguments.get("global_batch_size", arguments.get("batch_size")),
            len(runs),
        )
        self.workers = arguments.get("workers")
        self.scaling = next((s for s in ("strong", "weak") if name.endswith(s)), None)
        self.trains = any(
            row["loss"] is not None for run in runs for row in run.log.epochs[TRAIN]
        )  # else --load-only
        measured = {run.repeat: measure(run) for run in runs}
        names = dict.fromkeys(name for values in measured.values() for name in values)
        self.estimates = {}
        for quantity in names:
            self.put(
                quantity,
                estimate({repeat: values.get(quantity) for repeat, values in measured.items()}),
            )

    def put(self, quantity, value):
        if value is not None:
            self.estimates[quantity] = value

    def get(self, quantity):
        found = self.estimates.get(quantity)
        return found.value if found else None

    def half(self, quantity):
        found = self.estimates.get(quantity)
        return found.half if found else None

    def curves(self, kind, column):
        """(repeats, epochs) of a column of the epochs' rows; cut to the shortest."""
        rows = [
            [row[column] for row in run.log.epochs[kind] if row[column] is not None]
            for run in self.runs
        ]
        return np.array([row[: min(map(len, rows))] for row in rows], float)

    def comparable(self):
        """Trainings of which this is the same are the same computation: they may differ by rounding alone."""
        get, script = self.arguments.get, self.sidecar.get("script", "")
        kind = "scratch" if script in FROM_SCRATCH else script
        names = (
            "model",
            "lr",
            "momentum",
            "optimizer",
            "weight_decay",
            "seed",
            "subset",
            "epochs",
            "amp",
            "augment",
            "dtype",
            "image_size",
            "schedule",
            "label_smoothing",
            "nesterov",
        )
        order = (
            get("s3_mode")
            if str(get("source")).startswith("s3:") and get("s3_mode") == "shards"
            else None
        )
        return self.environment, kind, self.batch, order, *(get(name) for name in names)


def make_configurations(runs, machines):
    groups = {}
    for run in runs:
        groups.setdefault(
            (run.suite, run.configuration, machines.index(run.machine) + 1), []
        ).append(run)
    return [Configuration(*key, members) for key, members in groups.items()]


def add_speedups(configurations):
    """Speed-up, efficiency and serial fraction of suite parallel; against `all` and `split` in suite split."""
    by_name = {(c.suite, c.base, c.environment): c for c in configurations}
    for c in configurations:

        def against(name, c=c):
            other = by_name.get((c.suite, name, c.environment))
            return ratio(c.estimates["images_per_s"], other and other.estimates["images_per_s"])

        if c.suite == "parallel":
            own = against("hybrid-1x1-strong" if c.base.startswith("hybrid") else "serial")
            c.put("speedup", own)
            c.put("speedup_over_serial", against("serial"))
            if own:
                c.put("efficiency", estimate({r: 100 * s / c.cores for r, s in own.values.items()}))
            if own and c.scaling == "strong" and c.cores > 1 and not c.oversubscribed:
                c.put(
                    "serial_fraction",
                    estimate({r: 100 * karp_flatt(s, c.cores) for r, s in own.values.items()}),
                )
        if c.suite == "split":
            c.put("speedup_over_all", against("all"))
            c.put("speedup_over_split", against("split"))


def add_differences(configurations):
    """How far losses and accuracies are from the first configuration that is the same computation, at most."""
    for members in comparable_groups(configurations):
        first = members[0]
        for c in members[1:]:
            for name, factor, column in (
                ("loss_difference", 1, "loss"),
                ("accuracy_difference", 100, "value1"),
            ):
                gaps = [
                    difference(first.curves(kind, column), c.curves(kind, column))
                    for kind in (TRAIN, VALIDATE)
                ]
                if np.isfinite(gaps).all():  # else one of them diverged
                    c.put(name, Estimate(factor * max(gaps), None, None, c.n, {}))


def comparable_groups(configurations):
    """Lists of the configurations that train and are the same computation."""
    groups = {}
    for c in configurations:
        if "train_loss" in c.estimates:
            groups.setdefault((c.suite, c.comparable()), []).append(c)
    return list(groups.values())


def difference(a, b):
    """The largest difference between two (repeats, epochs), over all pairs of repeats and the epochs of both."""
    epochs = min(a.shape[1], b.shape[1])
    return float(np.abs(a[:, None, :epochs] - b[None, :, :epochs]).max()) if epochs else 0.0


def fit_amdahl(configurations):
    """{"mpi", "hybrid": Estimate of the serial fraction in %}, from the configurations with a serial fraction."""
    fits, configurations = {}, of_one_machine(configurations)
    for family in ("mpi", "hybrid"):
        members = [
            c
            for c in configurations
            if c.base.startswith(family) and "serial_fraction" in c.estimates
        ]
        if members:
            repeats = set.intersection(*(set(c.estimates["speedup"].values) for c in members))
            fits[family] = estimate(
                {
                    r: 100
                    * amdahl_fit([(c.cores, c.estimates["speedup"].values[r]) for c in members])
                    for r in repeats
                }
            )
    return {family: fit for family, fit in fits.items() if fit}


def of_one_machine(configurations):
    """Those of the machine that has the most of them."""
    machines = Counter(c.environment for c in configurations)
    return [c for c in configurations if c.environment == max(machines, key=machines.get)]


def add_batches(configurations):
    """Waiting for data batch by batch, from rows of type 2, which count from the start of the epoch."""
    for c in configurations:
        waits = {run.repeat: batch_waits(run.log.batches()) for run in c.runs}
        for quantity, function in (
            ("batch_loading_ms", np.median),
            ("batch_loading_max_ms", np.max),
        ):
            c.put(
                quantity,
                estimate({r: 1000 * float(function(w)) for r, w in waits.items() if len(w)}),
            )


def add_alone(configurations):
    """What --load-only has measured, also with the training from the same source by as many workers."""
    by_name = {(c.suite, c.name): c for c in configurations}
    for c in configurations:
        if not c.trains:
            training = by_name.get((c.suite, c.name.replace("-load", "-train")), c)
            for each in (c, training):
                each.put("alone_images_per_s", c.estimates["images_per_s"])


def waiting_rows(members):
    """The configurations that train, and those that only load where no training has their numbers."""
    training = {c.name for c in members if c.trains}
    return [
        c
        for c in members
        if c.name in training or c.name.replace("-load", "-train") not in training
    ]


def batch_waits(rows):
    """Seconds that each batch was waited for; nothing for one before which a batch is missing."""
    before, waits = {}, []
    for row in rows:
        if (row["epoch"], row["value1"] - 1) in before or row["value1"] == 1:
            waits.append(row["loading"] - before.get((row["epoch"], row["value1"] - 1), 0.0))
        before[row["epoch"], row["value1"]] = row["loading"]
    return waits


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------

RESULT = (
    "n",
    "seconds",
    "images_per_s",
    "train_accuracy",
    "test_accuracy",
    "ram_mb",
    "cpu_percent",
    "gpu_percent",
    "gpu_mem_mb",
)
SCALING = (
    "ranks",
    "threads",
    "batch",
    "n",
    "images_per_s",
    "speedup",
    "efficiency",
    "serial_fraction",
    "speedup_over_serial",
)
LEARNING = (
    "n",
    "batch",
    "train_loss",
    "test_loss",
    "train_accuracy",
    "test_accuracy",
    "loss_difference",
    "accuracy_difference",
)
LOADING = (
    "workers",
    "n",
    "epoch_seconds",
    "epoch_loading",
    "first_loading_share",
    "later_loading_share",
    "batch_loading_ms",
    "batch_loading_max_ms",
    "alone_images_per_s",
    "fetch_seconds",
)
SPLIT = (
    "n",
    "images_per_s",
    "speedup_over_all",
    "speedup_over_split",
    "step_ms",
    "forward_ms",
    "backward_ms",
    "update_ms",
    "idle_forward",
    "idle_backward",
)
STEP = ("step_ms", *(f"{phase}_ms" for phase in PHASES), *(f"{phase}_share" for phase in PHASES))
TABLES = {  # kind: title, caption, quantities
    "results": (
        "time, throughput and resources",
        "Training time without warm-up and validation. RAM, CPU and GPU use "
        "are those of rank 0 and its children.",
        RESULT,
    ),
    "scaling": (
        "speed-up and efficiency",
        "Speed-up against the same work on one core: serial_cnn.py for MPI, one "
        "rank of one thread for hybrid. Karp–Flatt: the serial fraction that a strong speed-up implies.",
        SCALING,
    ),
    "learning": (
        "loss and accuracy",
        "Last epoch. Differences: to the first configuration that computes the same, "
        "over all epochs and repeats, training and validation.",
        LEARNING,
    ),
    "step": (
        "where a step's time goes",
        "Seconds of the epochs divided by steps. Update and rest: what the logged "
        "phases leave of the step; empty where phases overlap.",
        STEP,
    ),
    "loading": (
        "waiting for data",
        "Waiting for data during training, per epoch (record type 0) and per batch (type "
        "2); alone: the same loading without a training.",
        LOADING,
    ),
    "modes": (
        "modes",
        "Idle: the share of the training in which a group's cores computed nothing.",
        SPLIT,
    ),
}


class Report:
    """All that goes into analysis.json, and what is said on the way."""

    def __init__(self):
        self.tables, self.figures, self.facts, self.missing, self.marks = [], [], {}, [], []

    def warn(self, text):
        print(f"warning: {text}", file=sys.stderr)
        self.missing.append(text)

    def add_table(self, suite, kind, configurations):
        """A row for each configuration; a quantity that none of them has is left out."""
        title, caption, quantities = TABLES[kind]
        chosen = [q for q in quantities if any(cell(c, q) is not None for c in configurations)]
        spread = {q for q in chosen if any(c.half(q) is not None for c in configurations)}
        columns = [{"key": "configuration", "label": "configuration", "unit": "", "digits": None}]
        for quantity in chosen:
            label, unit, digits = QUANTITIES[quantity]
            columns.append({"key": quantity, "label": label, "unit": unit, "digits": digits})
            if quantity in spread:
                columns.append(
                    {"key": f"{quantity}_ci", "label": "±", "unit": unit, "digits": digits}
                )
        rows = []
        for c in configurations:
            row = [c.name + (" (oversubscribed)" if c.oversubscribed else "")]
            for quantity in chosen:
                row.append(cell(c, quantity))
                if quantity in spread:
                    row.append(c.half(quantity))
            rows.append(row)
        self.tables.append(
            {
                "name": f"{suite}_{kind}",
                "title": f"{suite}: {title}",
                "caption": caption,
                "columns": columns,
                "rows": rows,
            }
        )

    def add_fact(self, name, value, unit):
        self.facts[name] = {
            "value": value.value,
            "low": value.low,
            "high": value.high,
            "n": value.n,
            "unit": unit,
        }


def cell(configuration, quantity):
    """An estimate's mean, or one of the numbers that describe a configuration."""
    if quantity in ("n", "cores", "ranks", "threads", "batch", "workers"):
        return getattr(configuration, quantity)
    return configuration.get(quantity)


def tabulate(report, suite, members):
    trained = [c for c in members if c.trains]
    timed = [c for c in trained if "forward_ms" in c.estimates]
    report.add_table(suite, "results", members)
    if trained:
        report.add_table(suite, "learning", trained)
    if timed:
        report.add_table(suite, "step", timed)
    for name in sorted(
        {c.sidecar.get("script") or c.name for c in trained}
        - {c.sidecar.get("script") or c.name for c in timed}
    ):
        report.missing.append(f"{suite}: where a step's time goes in {name}: its log has no phases")
    if suite == "parallel":
        report.add_table(suite, "scaling", members)
    if suite in ("loading", "files"):
        report.add_table(suite, "loading", waiting_rows(members))
    if suite == "split":
        report.add_table(suite, "modes", members)


def collect_facts(report, configurations):
    """Everything that prose may state, by name."""
    for c in configurations:
        for quantity, value in c.estimates.items():
            report.add_fact(f"{c.suite}.{c.name}.{quantity}", value, QUANTITIES[quantity][1])
    for suite in dict.fromkeys(c.suite for c in configurations):
        members = [c for c in configurations if c.suite == suite]
        for quantity, word in (
            ("loss_difference", "largest"),
            ("accuracy_difference", "largest"),
            ("speedup", "best"),
            ("images_per_s", "best"),
        ):
            found = [
                c.estimates[quantity]
                for c in members
                if c.trains
                and quantity in c.estimates
                and not (word == "best" and c.oversubscribed)
            ]
            if found:
                best = max(found, key=lambda e: e.value)
                report.add_fact(f"{suite}.{word}_{quantity}", best, QUANTITIES[quantity][1])
        for family, fit in fit_amdahl(members).items():
            report.add_fact(f"{suite}.{family}.amdahl_serial_fraction", fit, "%")


def number_text(value, digits):
    """A cell as text, with that many decimals or as few as leave four digits."""
    if value is None or isinstance(value, str):
        return value or ""
    whole = len(f"{abs(value):.0f}")
    return (
        f"{value:,.{max(0, min(digits, 4 - whole))}f}" if abs(value) >= 1 else f"{value:.{digits}f}"
    )


def print_table(content):
    """A table as text, with the half interval behind its mean."""
    columns, lines = content["columns"], []
    header = [f"{c['label']} {c['unit']}".strip() for c in columns if c["label"] != "±"]
    for row in content["rows"]:
        line = []
        for column, value in zip(columns, row, strict=True):
            text = number_text(value, column["digits"])
            if column["label"] != "±":
                line.append(text)
            elif text:
                line[-1] += f" ± {text}"
        lines.append(line)
    print(f"\n{content['title']}\n{table(header, lines)}\n{content['caption']}")


# ----------------------------------------------------------------------------------------------------------------------
# Plots: readable in grey, by line style, marker and hatch
# ----------------------------------------------------------------------------------------------------------------------

WIDTH = 7.0  # inches, of every figure
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#7f7f7f")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = "osD^v<>Pp*Xh"
SHADES = ("#1f2933", "#6b8fb5", "#b9d3ea", "#f2c48d", "#ffffff")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx")
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
    "hatch.linewidth": 0.5,
    "figure.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "analyze_results",
}
WHISKERS = "; whiskers: 95 % intervals"
BAR = {"edgecolor": "0.2", "linewidth": 0.6, "error_kw": {"elinewidth": 0.8}}


class Plotter:
    """Makes figures of one size and style, with a line below that says what was measured, and writes them."""

    def __init__(self, report, folder):
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams.update(matplotlib.rcParamsDefault)
        matplotlib.rcParams.update(STYLE)
        self.report, self.folder, self.suite, self.notes = report, folder, "", ""

    def figure(self, height, rows=1, columns=1, **options):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)

    def save(self, figure, name, title, caption, columns=3, whiskers=False, said=""):
        """Write a figure; its legend, in that many columns, is of all that is named in any panel.

        whiskers: whether it shows intervals; said: a line that stands in the picture itself.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        notes = self.notes if whiskers else self.notes.replace(WHISKERS, "")
        named = {}
        for ax in figure.axes:
            named.update(
                {name: handle for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
            )
        if named:
            columns = min(columns, len(named))
            figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=columns)
        figure.supxlabel("\n".join(filter(None, (said, notes))), fontsize=6.5, color="0.25")
        name, canvas = f"{self.suite}_{name}", FigureCanvasAgg(figure)
        figure.get_layout_engine().execute(
            figure
        )  # once for both files, which savefig() would each draw twice
        figure.set_layout_engine("none")
        with atomic_write(self.folder / "figures" / f"{name}.png") as file:
            canvas.print_png(file)
        with atomic_write(self.folder / "figures" / f"{name}.svg") as file:
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
        caption = f"{caption} {' '.join(notes.split())}."
        self.report.figures.append(
            {"name": name, "title": title, "caption": caption, "alt": f"{title}: {caption}"}
        )


def describe(members, machines):
    """The line below a suite's figures: machines, data, repeats, and everything that a reader must not overlook."""
    lines, runs = [], [run for c in members for run in c.runs]
    for number, machine in enumerate(machines, 1):
        if mine := [run for run in runs if run.machine == machine]:
            _, cpu, cores, dataset, _ = machine
            sizes = "/".join(
                f"{n:,}" for n in sorted({run.sidecar.get("train_images") or 0 for run in mine})
            )
            data = {"synthetic": "SYNTHETIC DATA", "cifar10": "CIFAR-10"}.get(dataset, dataset)
            place = (
                f"{cpu}, {cores} cores; {data}, {sizes} images"
                if cpu
                else "machine and data set unknown"
            )
            lines.append(place if len(machines) == 1 else f"[{number}] {place}")
    repeats = sorted({c.n for c in members})
    lines[-1] += f"; n = {' to '.join(map(str, repeats[:1] + repeats[1:][-1:]))}"
    lines[-1] += WHISKERS if repeats[-1] > 1 else ""
    if crowded := [c.name for c in members if c.oversubscribed]:
        lines.append(f"OVERSUBSCRIBED (more ranks × threads than cores): {', '.join(crowded)}")
    if len(commits := {run.sidecar.get("git_commit") for run in runs} - {None}) > 1:
        short = sorted(c[:8] + "-dirty" * c.endswith("-dirty") for c in commits)
        lines.append(f"{len(commits)} DIFFERENT COMMITS: {', '.join(short)}")
    return "\n".join(
        part for line in ";\n".join(lines).split("\n") for part in textwrap.wrap(line, 125)
    )


def halves(members, quantity):
    return np.array([c.half(quantity) or 0 for c in members])


def families(members, scaling):
    """{label: configurations by cores} of suite parallel; a line begins at its own run on one core."""
    single = {c.base: c for c in members if c.base in ("serial", "hybrid-1x1-strong")}
    found = {}
    for c in members:
        if c.scaling == scaling and c.cores > 1 and "speedup" in c.estimates:
            label = (
                "MPI"
                if c.base.startswith("mpi")
                else f"hybrid, {c.ranks} rank{'s' * (c.ranks != 1)}"
            )
            found.setdefault(label, []).append(c)
    for label, line in found.items():
        start = single.get({"MPI": "serial", "hybrid, 1 rank": "hybrid-1x1-strong"}.get(label))
        line[:] = sorted([*([start] if start else []), *line], key=lambda c: c.cores)
    return found


def plot_scaling(plot, members, quantity):
    """Strong and weak scaling over cores with the ideal line, and what Amdahl's law or Karp and Flatt make of it."""
    members = of_one_machine(members)
    lines = {s: families(members, s) for s in ("strong", "weak")}
    labels, most = sorted({*lines["strong"], *lines["weak"]}), max(c.cores for c in members)
    if not labels:
        return
    panels = [("strong", quantity), ("weak", quantity)] + [("strong", "serial_fraction")] * (
        quantity == "efficiency"
    )
    figure, axes = plot.figure(2.9, 1, len(panels))
    for ax, (scaling, shown) in zip(axes[0], panels, strict=True):
        p = np.linspace(1, most, 50)
        if shown != "serial_fraction":
            ax.plot(
                p, p if shown == "speedup" else np.full(50, 100), color="0.6", lw=1, label="ideal"
            )
        highest = max(most if shown == "speedup" else 100, *(c.get(shown) or 0 for c in members))
        for label, line in lines[scaling].items():
            shift = 0.012 * most * (labels.index(label) - (len(labels) - 1) / 2)
            plot_family(
                ax,
                [c for c in line if shown in c.estimates],
                shown,
                labels.index(label),
                label,
                shift,
            )
        if scaling == "strong" and shown == "speedup":
            for (family, fit), style in zip(fit_amdahl(members).items(), LINES[1:], strict=False):
                s, name = fit.value / 100, family.replace("mpi", "MPI")
                if 0 <= s <= 1:
                    ax.plot(
                        p,
                        1 / (s + (1 - s) / p),
                        ls=style,
                        color="0.45",
                        lw=1,
                        label=f"Amdahl, {name}: s = {fit.value:.1f} %",
                    )
        title = "Karp–Flatt" if shown == "serial_fraction" else f"{scaling} scaling"
        name = {
            "speedup": "speed-up",
            "efficiency": "efficiency (%)",
            "serial_fraction": "serial fraction (%)",
        }[shown]
        ax.set(
            title=title,
            xlabel="cores (ranks × threads)",
            ylabel=name,
            xticks=sorted({c.cores for c in members}),
            xlim=(1 - 0.05 * most, 1.05 * most),
            ylim=(1.3 * min(0, *(c.get(shown) or 0 for c in members)), 1.3 * highest),
        )
    word = {"speedup": "Speed-up", "efficiency": "Efficiency"}[quantity]
    plot.save(
        figure,
        quantity,
        f"{word}, strong and weak scaling",
        f"{word} against the same work on one core: "
        "serial_cnn.py for MPI, one rank of one thread for hybrid. Hollow: oversubscribed. Whiskers that leave "
        "the picture are cut.",
        4,
        whiskers=True,
    )


def plot_family(ax, line, quantity, number, label, shift):
    """A line with whiskers; what was oversubscribed is hollow. shift: along the axis, so that whiskers stand apart."""
    style = {"marker": MARKERS[number % len(MARKERS)], "color": COLORS[1:][number % 7]}
    x, y = (
        np.array([c.cores + shift * (c.cores > 1) for c in line]),
        np.array([c.get(quantity) for c in line]),
    )
    ax.errorbar(
        x,
        y,
        halves(line, quantity),
        ls=LINES[number % len(LINES)],
        elinewidth=0.8,
        label=label,
        **style,
    )
    hollow = [c.oversubscribed for c in line]
    ax.plot(x[hollow], y[hollow], ls="", mfc="white", zorder=5, **style)


def bars(ax, members, quantity, place=0, places=1, log=False):
    """Horizontal bars, whiskers and numbers, the place-th of `places` in each row; a row without the number is empty.

    On a logarithmic axis they are dots: the length of a bar would say nothing there. A whisker that would leave the
    bars small is cut, and written behind its number. Returns where the longest ends.
    """
    rows = np.array([i for i, c in enumerate(members) if quantity in c.estimates])
    having = [members[i] for i in rows]
    values, half = np.array([c.get(quantity) for c in having]), halves(having, quantity)
    label = {"idle_forward": "forward", "idle_backward": "backward"}.get(
        quantity, QUANTITIES[quantity][0]
    )
    height, limit, (_, unit, digits) = (
        0.78 / places,
        (4 if log else 2) * values.max(),
        QUANTITIES[quantity],
    )
    if unit == "%":
        limit = min(limit, 100)
    positions = rows + height * (place - (places - 1) / 2)
    style = {"xerr": half if half.any() else None, "label": label if places > 1 else None}
    if log:
        ax.errorbar(
            values,
            positions,
            fmt="os^"[place],
            color=SHADES[place + 1],
            ecolor="0.1",
            elinewidth=0.8,
            **style,
        )
    else:
        hatch = HATCHES[place + 1] if places > 1 else ""
        ax.barh(positions, values, height, color=SHADES[place + 1], hatch=hatch, **BAR, **style)
    for position, value, width in zip(positions, values, half, strict=True):
        cut = value + width > limit
        text = number_text(value, digits) + (f" ± {number_text(width, digits)}" if cut else "")
        ax.annotate(
            text,
            (value if cut else value + width, position),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    return min((values + half).max(), limit)


def plot_bars(plot, members, name, title, caption, panels, columns=2, log=()):
    """Panels (axis label, quantities) of bars that share their rows; quantities that nobody has are left out.

    Those of `log` have a logarithmic axis where one value is more than a hundred times another.
    """
    there = {q for c in members for q in c.estimates}
    panels = [(label, [q for q in quantities if q in there]) for label, quantities in panels]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return
    columns = min(columns, len(panels))
    lines, most = math.ceil(len(panels) / columns), max(len(quantities) for _, quantities in panels)
    figure, axes = plot.figure(
        0.6 + lines * (0.45 + (0.1 + 0.12 * most) * len(members)), lines, columns, sharey=True
    )
    for ax, (label, quantities) in zip(axes.flat, panels, strict=False):
        values = [c.get(q) for q in quantities for c in members if q in c.estimates]
        low = min(values)
        is_log = set(quantities) <= set(log) and 0 < 100 * low < max(values)
        high = max(
            bars(ax, members, q, i, len(quantities), is_log) for i, q in enumerate(quantities)
        )
        if is_log:
            ax.set(xscale="log", xlim=(low / 3, high * (high / low) ** 0.25 * 2))
        else:
            ax.set_xlim(0, 1.35 * high or 1)
            ax.locator_params(axis="x", nbins=8 // columns + 1)
        ax.set_xlabel(label + ", logarithmic" * is_log)
        ax.grid(visible=False, axis="y")
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    name_rows(axes[0][0], members)
    plot.save(figure, name, title, caption, whiskers=True)


def short_name(configuration):
    return re.sub("-(train|load)( |$)", r"\2", configuration.name)


def name_rows(ax, members):
    names = [short_name(c) + " *" * c.oversubscribed for c in members]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)


def plot_step(plot, members):
    """Where a step's time goes, as shares; a configuration whose phases overlap has no such sum."""
    members = [c for c in members if "update_share" in c.estimates]
    if not members:
        return
    figure, axes = plot.figure(1.2 + 0.24 * len(members))
    ax, left = axes[0][0], np.zeros(len(members))
    for phase, shade, hatch in zip(PHASES, SHADES, HATCHES, strict=True):
        values = np.array([c.get(f"{phase}_share") or 0 for c in members])
        if values.any():
            ax.barh(
                range(len(members)),
                values,
                0.7,
                left,
                color=shade,
                hatch=hatch,
                **BAR,
                label=QUANTITIES[f"{phase}_share"][0].removesuffix(" share"),
            )
        left += values
    for i, c in enumerate(members):
        ax.annotate(
            number_text(c.get("step_ms"), 2) + " ms",
            (100, i),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
        )
    ax.set(xlabel="share of a step (%)", xlim=(0, 112), xticks=range(0, 101, 20))
    ax.grid(visible=False, axis="y")
    name_rows(ax, members)
    plot.save(
        figure,
        "step",
        f"Where a step's time goes, {plot.suite}",
        "Shares of a training step of rank 0, to "
        "their right the whole step. Communication includes waiting for other ranks.",
        5,
    )


def plot_curves(plot, members):
    """Loss and accuracy over the epochs; a colour is one computation, its first line a broad band below the others."""
    groups = comparable_groups([c for c in members if c.curves(VALIDATE, "loss").size])
    if not groups:
        return
    members = [c for group in groups for c in group]
    figure, axes = plot.figure(2.8 + 0.14 * math.ceil(len(members) / 3), 1, 2)
    epochs = max(c.curves(TRAIN, "loss").shape[1] for c in members)
    panels = ((TRAIN, "loss", 1, "training loss"), (VALIDATE, "value1", 100, "test accuracy (%)"))
    for ax, (kind, column, factor, label) in zip(axes[0], panels, strict=True):
        for number, group in enumerate(groups):
            for place, c in enumerate(group):
                values = factor * c.curves(kind, column).mean(0)
                style = (
                    {"lw": 4, "alpha": 0.35, "ls": "-"}
                    if place == 0
                    else {"lw": 1.1, "ls": LINES[place % 6]}
                )
                every = max(len(values) // 8, 1)  # markers of one colour stand at different epochs
                ax.plot(
                    range(1, len(values) + 1),
                    values,
                    color=COLORS[number % 8],
                    marker=MARKERS[place % 12],
                    mfc="none",
                    markevery=(place % every, every),
                    ms=4 + place % 4,
                    label=short_name(c),
                    **style,
                )
        ax.set(xlabel="epoch", ylabel=label)
        ax.set_xticks(range(1, epochs + 1, max(math.ceil(epochs / 8), 1)))
    said = "No two compute the same."
    if same := [c for c in members if "loss_difference" in c.estimates]:
        worst = max(same, key=lambda c: c.get("loss_difference"))
        loss, points = (
            worst.get("loss_difference"),
            max(c.get("accuracy_difference") or 0 for c in same),
        )
        where = f" ({worst.name})" if loss else ""
        said = (
            f"Lines of one colour compute the same. Largest difference: training or test loss {loss:.2g}{where}, "
            f"accuracy {points:.2g} points."
        )
    plot.save(figure, "curves", f"Loss and accuracy, {plot.suite}", said, said=said)


def plot_batches(plot, members):
    """Total and waiting time over the batches of the first epoch of the first repeat, a panel for each source."""
    sources = {}
    for c in members:
        if c.trains and "batch_loading_ms" in c.estimates:
            sources.setdefault(re.sub(r"-\d+-workers.*", "", c.name), []).append(c)
    if not sources:
        return
    lines, columns = math.ceil(len(sources) / 2), min(2, len(sources))
    figure, axes = plot.figure(0.9 + 1.6 * lines, lines, columns, sharey=True)
    for ax, (source, found) in zip(axes.flat, sources.items(), strict=False):
        for number, c in enumerate(found):
            batches = c.runs[0].log.batches()
            batches = [row for row in batches if row["epoch"] == batches[0]["epoch"]]
            style = {
                "color": COLORS[number % 8],
                "marker": MARKERS[number % 12],
                "mfc": "none",
                "markevery": max(len(batches) // 8, 1),
            }
            of = f", {c.workers} worker{'s' * (c.workers != 1)}" if "-workers" in c.name else ""
            for column, line, word in (("duration", "-", "total"), ("loading", ":", "waiting")):
                ax.plot(
                    [row["value1"] for row in batches],
                    [max(row[column], 1e-6) for row in batches],
                    line,
                    label=word + of,
                    **style,
                )
        ax.set(title=source, yscale="log", xlabel="batch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("seconds since\nthe epoch began")
    for ax in list(axes.flat)[len(sources) :]:
        ax.set_visible(False)
    plot.save(
        figure,
        "batches",
        "Loading against total, batch by batch",
        "First epoch of the first repeat (record "
        "type 2): seconds since the epoch began, and of them waiting for data.",
        max(2, *map(len, sources.values())),
    )


def plot_suite(plot, suite, members):
    """The figures of a suite."""
    plot.suite = suite
    throughput = ("throughput (images/s)", ["images_per_s"])
    if suite == "parallel":
        plot_scaling(plot, members, "speedup")
        plot_scaling(plot, members, "efficiency")
    if suite in ("parallel", "files"):
        star = " *: oversubscribed." if any(c.oversubscribed for c in members) else ""
        plot_bars(
            plot,
            members,
            "throughput",
            f"Throughput, {suite}",
            f"Images per second.{star}",
            [throughput],
        )
    if suite == "hardware":
        panels = [
            (f"{QUANTITIES[q][0]} ({QUANTITIES[q][1]})", [q])
            for q in (
                "images_per_s",
                "test_accuracy",
                "ram_mb",
                "cpu_percent",
                "gpu_percent",
                "gpu_mem_mb",
            )
        ]
        plot_bars(
            plot,
            members,
            "use",
            "Throughput and use of resources",
            "Memory: peaks, use: means over the run, of "
            "rank 0 and its children; 100 % CPU is one core.",
            panels,
            log=("images_per_s", "ram_mb"),
        )
    if suite == "split":
        panels = [
            ("against all (×)", ["speedup_over_all"]),
            ("a step (ms)", ["forward_ms", "backward_ms"]),
            ("idle (%)", ["idle_forward", "idle_backward"]),
        ]
        plot_bars(
            plot,
            members,
            "modes",
            "Forward and backward pass on separate cores",
            "Speed against mode all; "
            "milliseconds of a step; share of the time in which a group's cores computed nothing.",
            panels,
            3,
        )
    if suite == "loading":
        rows = waiting_rows(members)
        panels = [
            ("an epoch (s)", ["epoch_seconds", "epoch_loading"]),
            ("loading alone (images/s)", ["alone_images_per_s"]),
        ]
        plot_bars(
            plot,
            rows,
            "epoch",
            "Loading against total",
            "Seconds of an epoch (record type 0) and of them "
            "waiting for data; the same loading without training.",
            panels,
            log=("epoch_seconds", "epoch_loading", "alone_images_per_s"),
        )
    if suite in ("loading", "files"):
        plot_batches(plot, members)
    plot_step(plot, members)
    plot_curves(plot, members)


# ----------------------------------------------------------------------------------------------------------------------


def side_by_side(values):
    values = sorted(set(values) - {None}, key=lambda v: (isinstance(v, str), v))
    return " / ".join(f"{v:,}" if type(v) is int else str(v) for v in values)


def environments(runs, machines):
    """What each machine, with its data set, ran with; what differs between its runs is listed side by side."""
    found = []
    for machine in machines:
        mine = [run.sidecar for run in runs if run.machine == machine]
        versions = {}
        for sidecar in mine:
            for name, version in (sidecar.get("versions") or {}).items():
                versions.setdefault(name, set()).add(version)
        versions = {name: " / ".join(sorted(values)) for name, values in sorted(versions.items())}
        commits = sorted({s["git_commit"] for s in mine if s.get("git_commit")})
        gpus = sorted({s["device"] for s in mine if s.get("device") not in (None, "cpu")})
        arguments = [{**s, **(s.get("arguments") or {})} for s in mine]
        arguments = [{"global_batch_size": each.get("batch_size"), **each} for each in arguments]
        training = {
            label: side_by_side(a.get(name) for a in arguments) for name, label in TRAINING.items()
        }
        blas = sorted(
            {
                " ".join(str(b.get(name)) for name in ("library", "version", "kernel"))
                for s in mine
                for b in s.get("blas") or []
            }
        )
        memory = max((s.get("memory_mb") or 0 for s in mine), default=0)
        host, cpu, cores, dataset, fingerprint = machine
        found.append(
            {
                "host": host,
                "cpu": cpu,
                "cores": cores,
                "memory_gib": round(memory / 1024, 1) or None,
                "gpu": " / ".join(gpus) or None,
                "blas": " / ".join(blas) or None,
                "python": versions.pop("python", None),
                "versions": versions,
                "commit": " / ".join(commits) or None,
                "dataset": dataset,
                "fingerprint": fingerprint,
                "training": {label: values for label, values in training.items() if values} or None,
                "runs": len(mine),
            }
        )
    return found


def list_missing(report, configurations, left_out):
    """By name what no number can be given for."""
    suites = {c.suite for c in configurations}
    if "files" not in suites:
        report.missing += [f"suite {suite}: no run" for suite in SUITES if suite not in suites]
    by_reason = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    report.missing += [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    if not any("gpu_percent" in c.estimates for c in configurations):
        report.missing.append("GPU: no run used one")
    if single := [f"{c.suite}/{c.name}" for c in configurations if c.n < 2]:
        whose = (
            "of all configurations"
            if 1 < len(single) == len(configurations)
            else f"of {', '.join(single)}"
        )
        report.missing.append(f"95 % intervals {whose}: one run each")
    for c in configurations:
        if not all(np.isfinite(c.curves(kind, "loss")).all() for kind in (TRAIN, VALIDATE)):
            report.missing.append(
                f"losses of {c.suite}/{c.name}: not all are numbers, the training diverged"
            )
    for c in configurations:
        if c.suite == "parallel" and c.scaling and "speedup" not in c.estimates:
            report.missing.append(
                f"speed-up of parallel/{c.name}: there is no run on one core to compare it with"
            )
    parallel = [c for c in configurations if c.suite == "parallel"]
    if other := {c.environment for c in parallel} - {
        c.environment for c in of_one_machine(parallel)
    }:
        report.missing.append(
            f"curves of scaling: those of {', '.join(f'[{n}]' for n in sorted(other))} are not drawn"
        )
    for family, fit in fit_amdahl(parallel).items():
        if not 0 <= fit.value <= 100:
            name = family.replace("mpi", "MPI")
            report.missing.append(
                f"curve of Amdahl's law for {name}: its serial fraction would be {fit.value:.0f} %"
            )
    if any(
        c.suite == "loading" and c.trains and "batch_loading_ms" not in c.estimates
        for c in configurations
    ):
        report.missing.append(
            "loading: waiting batch by batch: the logs do not have the rows of all batches"
        )
    if any(c.suite == "split" and "idle_forward" not in c.estimates for c in configurations):
        report.missing.append("split: idle shares: the sidecars do not have them")


def list_marks(report, configurations, found):
    if any(e["dataset"] == "synthetic" for e in found):
        report.marks.append("synthetic data")
    if crowded := [c.name for c in configurations if c.oversubscribed]:
        report.marks.append(f"oversubscribed: {', '.join(crowded)}")
    if len(found) > 1:
        report.marks.append(
            f"{len(found)} machines or data sets, told apart by [2] and so on, never compared"
        )
    for number, environment in enumerate(found, 1):
        if " / " in (environment["commit"] or ""):
            commits = re.sub(r"\b([0-9a-f]{12})[0-9a-f]+", r"\1", environment["commit"])
            report.marks.append(f"different commits on machine [{number}]: {commits}")


def analyze(runs, failed, left_out, args, report):
    """Fill the report, write all files, return the content of analysis.json."""
    machines = [machine for machine, _ in Counter(run.machine for run in runs).most_common()]
    configurations = make_configurations(runs, machines)
    configurations.sort(
        key=lambda c: c.base != "serial"
    )  # what the others are compared with, whenever it ran
    add_alone(configurations)
    add_speedups(configurations)
    add_differences(configurations)
    add_batches([c for c in configurations if c.suite in ("loading", "files")])
    found = environments(runs, machines)
    list_missing(report, configurations, left_out)
    list_marks(report, configurations, found)
    collect_facts(report, configurations)
    plot = Plotter(report, Path(args.output_dir))
    for suite in dict.fromkeys(c.suite for c in configurations):
        members = [c for c in configurations if c.suite == suite]
        tabulate(report, suite, members)
        plot.notes = describe(members, machines)
        plot_suite(plot, suite, members)
    last = max((run.sidecar.get("end") or 0 for run in runs), default=0)
    ended = datetime.datetime.fromtimestamp(
        last, datetime.timezone.utc
    )  # not now: the same runs give the same file
    return {
        "created": ended.isoformat(timespec="seconds") if last else None,
        "results_dir": None if args.logs else args.results_dir,
        "runs": len(runs),
        "failed_runs": failed,
        "missing": report.missing,
        "marks": report.marks,
        "environments": found,
        "tables": report.tables,
        "figures": report.figures,
        "facts": report.facts,
    }


def write(content, folder):
    for content_of in content["tables"]:
        with atomic_write(folder / "tables" / f"{content_of['name']}.csv", "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(
                [
                    f"{c['key']} ({c['unit']})" if c["unit"] else c["key"]
                    for c in content_of["columns"]
                ]
            )
            writer.writerows([["" if v is None else v for v in row] for row in content_of["rows"]])
    with atomic_write(folder / "analysis.json", "w") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")


def parse_args(argv=None):
    parser = Parser("analyze_results", __doc__)
    add = parser.add_argument
    add(
        "logs",
        nargs="*",
        metavar="LOG",
        help="logs (CSV) of any runs; default: those in --results-dir",
    )
    add(
        "--results-dir",
        metavar="FOLDER",
        default="results",
        help="of run_experiments.py (default: %(default)s)",
    )
    add(
        "--output-dir",
        metavar="FOLDER",
        help="default: analysis/ in --results-dir; of single logs analysis_of_logs/",
    )
    args = parser.parse_args(argv)
    name = "analysis_of_logs" if args.logs else "analysis"
    args.output_dir = args.output_dir or str(Path(args.results_dir) / name)
    return args


def main(argv=None):
    args, report = parse_args(argv), Report()
    if args.logs:
        runs, failed, left_out = read_files([Path(log) for log in args.logs], report.warn), [], {}
    else:
        runs, failed, left_out = read_results(Path(args.results_dir), report.warn)
    for run in failed:
        said = next((line for line in reversed(run["output"]) if line.strip()), "")
        print(f"{run['run']}: {run['status']}: {said}", file=sys.stderr)
    if not runs:
        raise InputError(f"{args.results_dir} has no run that is done: run make experiments first")
    content = analyze(runs, failed, left_out, args, report)
    write(content, Path(args.output_dir))
    for content_of in content["tables"]:
        print_table(content_of)
    for title, lines in (("marks", content["marks"]), ("missing", content["missing"])):
        if lines:
            print(f"\n{title}:\n" + "\n".join(f"- {line}" for line in lines))
    print(f"\n{len(runs)} runs analysed, {len(failed)} failed; written: {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
