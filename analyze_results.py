"""Tables and plots of what run_experiments.py has measured, or of the logs of any runs.

Reads results/<suite>/<configuration>/<repeat>/run.csv and run.json and results/index.json, or the logs that are named.
Prints the tables; writes them as CSV, the plots as PNG and SVG, and analysis.json, which has every number once more.

    make analyze
    python analyze_results.py --results-dir results --output-dir results/analysis
    python analyze_results.py results/serial_cnn.csv results/parallel_cnn_mpi.csv --output-dir results/analysis

±: half of the 95 % interval of a mean over the repeats, by Student's t with n − 1 degrees of freedom; nothing for n = 1.
Speed-up and efficiency: repeats are run interleaved, so repeat i of a configuration is divided by repeat i of its
reference, and mean and interval are those of the n ratios. Speed-up S: images/s against the same work on one core (MPI:
serial_cnn.py; hybrid: one rank of one thread); strong scaling: T(1)/T(p); weak scaling: the scaled speed-up. Efficiency:
S/p, p = ranks × threads. Serial fraction of strong scaling: (1/S − 1/p) / (1 − 1/p) (Karp and Flatt 1990); Amdahl's law
1/S = s + (1 − s)/p is fitted to all p at once by least squares in 1/S, each repeat by itself. Repeats of different
machines or data sets are never averaged or divided by each other; different commits are marked.
"""

import csv
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import BATCH, FETCH_TRAIN, LOG_COLUMNS, TRAIN, VALIDATE, InputError, Parser, atomic_write, run_main, table

SUITES = ("parallel", "hardware", "loading", "split")
PHASES = ("loading", "forward", "backward", "communication", "update")
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
        self.path, self.epochs, self.batch_lines = path, {TRAIN: [], VALIDATE: [], FETCH_TRAIN: []}, []
        try:
            header, *lines = path.read_text().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
        if header.split(",") != list(LOG_COLUMNS):
            raise InputError(f"{path} is not a run log: its first line has other columns")
        whole = lines[:-1]  # what follows the last newline is cut off, or empty
        damaged = int(bool(lines and lines[-1]))
        for line in whole:
            if line.startswith(f"{BATCH},") and line.count(",") == len(LOG_COLUMNS) - 1:
                self.batch_lines.append(line)
                continue
            try:
                row = self._parse(line)
                self.epochs.setdefault(int(row["type"]), []).append(row)
            except ValueError:
                damaged += 1
        if damaged:
            warn(f"{path}: {damaged} damaged or cut off lines are left out")
        if not self.epochs[TRAIN]:
            raise InputError(f"{path} has no complete epoch")

    @staticmethod
    def _parse(line):
        cells = zip(LOG_COLUMNS, line.split(","), strict=True)
        return {name: float(cell) if cell else None for name, cell in cells}

    def batches(self):
        """The rows of batches, parsed; lines that are not numbers are left out."""
        rows = []
        for line in self.batch_lines:
            try:
                rows.append(self._parse(line))
            except ValueError:
                continue
        return rows


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
        return self.sidecar.get("host"), self.sidecar.get("cpu"), len(self.sidecar.get("cores") or []), *self.data


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
    """A RunResult. entry, settings: of run_experiments.py's index, which knows what a source's pictures were made of."""
    log, sidecar, entry = Log(path, warn), read_sidecar(path, warn), entry or {}
    from_memory = (sidecar.get("arguments") or {}).get("source", "builtin") == "builtin"
    data = sidecar if from_memory or not settings else settings
    cores = entry.get("cores") or (sidecar.get("ranks") or 1) * (sidecar.get("threads") or 1)
    here = len(sidecar.get("cores") or [])
    crowded = entry.get("oversubscribed", here > 0 and cores > here)
    return RunResult(suite, name, repeat, log, sidecar, cores, crowded, (data.get("dataset"), data.get("fingerprint")))


def read_results(folder, warn):
    """The runs that results/index.json lists as done, the entries of the others, and what was left out."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
        entries = [(e["suite"], e["configuration"], e["repeat"], e["status"], e["folder"], e) for e in index["runs"]]
        left_out, settings = dict(index.get("left_out", {})), dict(index["settings"])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: run make experiments first, or name the logs of runs") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not an index of runs: delete it and run make experiments") from None
    runs, failed = [], []
    for suite, name, repeat, status, place, entry in entries:
        if status != "done":
            failed.append({"run": f"{suite}/{name}/{repeat}", "status": status, "output": entry.get("output", [])})
            continue
        try:
            runs.append(make_run(suite, name, repeat, folder / place / "run.csv", warn, entry, settings))
        except InputError as error:
            warn(f"{error}: this run is left out")
    return runs, failed, left_out


def read_files(paths, warn):
    """Each log is a configuration of its own, named after its file, or its path where names are the same."""
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else str(path.with_suffix("")) for path in paths]
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
    values = {repeat: value for repeat, value in values.items() if value is not None and math.isfinite(value)}
    if not values:
        return None
    numbers, n = np.array(list(values.values()), float), len(values)
    mean, half = float(numbers.mean()), None
    if n > 1:
        from scipy.special import stdtrit

        half = float(stdtrit(n - 1, 0.975) * numbers.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, None if half is None else mean - half, None if half is None else mean + half, n, values)


def ratio(ours, theirs, factor=1.0):
    """Estimate of the ratios of two Estimates, repeat by repeat; None where they have no repeat in common."""
    if not (ours and theirs):
        return None
    pairs = {r: factor * v / theirs.values[r] for r, v in ours.values.items() if theirs.values.get(r)}
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
    train, validate, totals = run.log.epochs[TRAIN], run.log.epochs[VALIDATE], run.sidecar.get("totals") or {}
    seconds = sum(row["duration"] for row in train)
    complete = {int(row["epoch"]) for row in train}
    steps = sum(int(line.split(",", 2)[1]) in complete for line in run.log.batch_lines)
    result = {
        "seconds": seconds,
        "images_per_s": sum(row["duration"] * row["images_per_s"] for row in train) / seconds,
        "train_loss": train[-1]["loss"], "train_accuracy": percent(train[-1]["value1"]),
        "ram_mb": totals.get("peak_ram_mb") or largest(train, "ram_mb"),
        "gpu_mem_mb": totals.get("peak_gpu_mem_mb") or largest(train, "gpu_mem_mb"),
        "cpu_percent": totals.get("mean_cpu_percent"), "gpu_percent": totals.get("mean_gpu_percent"),
        "epoch_seconds": seconds / len(train), "epoch_loading": sum(row["loading"] for row in train) / len(train),
        "first_loading_share": percent(train[0]["loading"] / train[0]["duration"]),
        "fetch_seconds": sum(row["duration"] for row in run.log.epochs[FETCH_TRAIN]) or None,
    }  # fmt: skip
    if validate:
        result.update(test_loss=validate[-1]["loss"], test_accuracy=percent(validate[-1]["value1"]))
    if later := train[1:]:
        shares = sum(row["loading"] for row in later) / sum(row["duration"] for row in later)
        result["later_loading_share"] = percent(shares)
    for group, share in (totals.get("idle") or {}).items():
        result[f"idle_{group}"] = percent(share)
    if steps:
        result.update(step_ms=1000 * seconds / steps, **phases(train, seconds, steps))
    return result


def phases(train, seconds, steps):
    """Milliseconds and share of a step in each phase. update: what the logged phases leave; without it they overlap."""
    result, rest = {}, seconds
    for phase in PHASES[:-1]:
        if all(row[phase] is not None for row in train):
            spent = sum(row[phase] for row in train)
            rest -= spent
            result.update({f"{phase}_ms": 1000 * spent / steps, f"{phase}_share": percent(spent / seconds)})
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
        self.batch, self.n = arguments.get("global_batch_size", arguments.get("batch_size")), len(runs)
        self.workers = arguments.get("workers")
        self.scaling = next((s for s in ("strong", "weak") if name.endswith(s)), None)
        measured = {run.repeat: measure(run) for run in runs}
        names = dict.fromkeys(name for values in measured.values() for name in values)
        self.estimates = {}
        for quantity in names:
            self.put(quantity, estimate({repeat: values.get(quantity) for repeat, values in measured.items()}))

    def put(self, quantity, value):
        if value is not None:
            self.estimates[quantity] = value

    def get(self, quantity):
        found = self.estimates.get(quantity)
        return found.value if found else None

    def curves(self, kind, column):
        """(repeats, epochs) of a column of the epochs' rows; cut to the shortest."""
        rows = [[row[column] for row in run.log.epochs[kind] if row[column] is not None] for run in self.runs]
        return np.array([row[:min(map(len, rows))] for row in rows], float)

    def comparable(self):
        """Trainings of which this is the same are the same computation: they may differ by rounding alone."""
        get, script = self.arguments.get, self.sidecar.get("script", "")
        kind = "scratch" if script in ("serial_cnn", "parallel_cnn_mpi", "parallel_cnn_hybrid", "gpu_scratch") else script
        names = ("model", "lr", "momentum", "optimizer", "weight_decay", "seed", "subset", "epochs", "amp", "augment",
                 "dtype", "image_size", "schedule", "label_smoothing", "nesterov")  # fmt: skip
        order = get("s3_mode") if str(get("source")).startswith("s3:") and get("s3_mode") == "shards" else None
        return self.environment, kind, self.batch, order, *(get(name) for name in names)


def make_configurations(runs, machines):
    groups = {}
    for run in runs:
        groups.setdefault((run.suite, run.configuration, machines.index(run.machine) + 1), []).append(run)
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
                c.put("serial_fraction", estimate({r: 100 * karp_flatt(s, c.cores) for r, s in own.values.items()}))
        if c.suite == "split":
            c.put("speedup_over_all", against("all"))
            c.put("speedup_over_split", against("split"))


def add_differences(configurations):
    """How far losses and accuracies are from the first configuration that is the same computation, at most."""
    for members in comparable_groups(configurations):
        first = members[0]
        for c in members[1:]:
            for name, factor, column in (("loss_difference", 1, "loss"), ("accuracy_difference", 100, "value1")):
                gaps = [difference(first.curves(kind, column), c.curves(kind, column)) for kind in (TRAIN, VALIDATE)]
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
    fits = {}
    for family in ("mpi", "hybrid"):
        members = [c for c in configurations if c.base.startswith(family) and "serial_fraction" in c.estimates
                   and c.environment == 1]  # fmt: skip
        if members:
            repeats = set.intersection(*(set(c.estimates["speedup"].values) for c in members))
            fits[family] = estimate({
                r: 100 * amdahl_fit([(c.cores, c.estimates["speedup"].values[r]) for c in members]) for r in repeats})
    return {family: fit for family, fit in fits.items() if fit}


def add_batches(configurations):
    """Waiting for data batch by batch, from rows of type 2, which count from the start of the epoch."""
    for c in configurations:
        for quantity, function in (("batch_loading_ms", np.median), ("batch_loading_max_ms", np.max)):
            waits = {run.repeat: batch_waits(run.log.batches()) for run in c.runs}
            c.put(quantity, estimate({r: 1000 * float(function(w)) for r, w in waits.items() if len(w)}))


def batch_waits(rows):
    """Seconds that each batch was waited for."""
    before, waits = {}, []
    for row in rows:
        waits.append(row["loading"] - before.get(row["epoch"], 0.0))
        before[row["epoch"]] = row["loading"]
    return waits


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------

RESULT = ("n", "seconds", "images_per_s", "train_accuracy", "test_accuracy", "ram_mb", "cpu_percent", "gpu_percent",
          "gpu_mem_mb")  # fmt: skip
SCALING = ("ranks", "threads", "batch", "n", "images_per_s", "speedup", "efficiency", "serial_fraction",
           "speedup_over_serial")  # fmt: skip
LEARNING = ("n", "batch", "train_loss", "test_loss", "train_accuracy", "test_accuracy", "loss_difference",
            "accuracy_difference")  # fmt: skip
LOADING = ("workers", "n", "epoch_seconds", "epoch_loading", "first_loading_share", "later_loading_share",
           "batch_loading_ms", "batch_loading_max_ms", "fetch_seconds")  # fmt: skip
SPLIT = ("n", "images_per_s", "speedup_over_all", "speedup_over_split", "step_ms", "forward_ms", "backward_ms",
         "update_ms", "idle_forward", "idle_backward")  # fmt: skip
STEP = ("step_ms", *(f"{phase}_ms" for phase in PHASES), *(f"{phase}_share" for phase in PHASES))
TABLES = {  # kind: title, caption, quantities
    "results": ("results", "Training time without warm-up and validation. RAM, CPU and GPU use are those of rank 0 and "
                "its children.", RESULT),
    "scaling": ("scaling", "Speed-up against the same work on one core: serial_cnn.py for MPI, one rank of one thread "
                "for hybrid. Karp–Flatt: the serial fraction that a strong speed-up implies.", SCALING),
    "learning": ("learning", "Last epoch. Differences: to the first configuration that computes the same, over all "
                 "epochs and repeats, training and validation.", LEARNING),
    "step": ("a step", "Seconds of the epochs divided by steps. Update and rest: what the logged phases leave of the "
             "step; empty where phases overlap.", STEP),
    "loading": ("waiting for data", "Waiting for data during training, per epoch (record type 0) and per batch (type "
                "2).", LOADING),
    "alone": ("loading alone", "The same loading without a training.", ("workers", "n", "alone_images_per_s", "ram_mb",
                                                                        "cpu_percent", "fetch_seconds")),
    "modes": ("modes", "Idle: the share of the training in which a group's cores computed nothing.", SPLIT),
}  # fmt: skip


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
        spread = {q for q in chosen if any(q in c.estimates and c.estimates[q].half is not None for c in configurations)}
        columns = [{"key": "configuration", "label": "configuration", "unit": "", "digits": None}]
        for quantity in chosen:
            label, unit, digits = QUANTITIES[quantity]
            columns.append({"key": quantity, "label": label, "unit": unit, "digits": digits})
            if quantity in spread:
                columns.append({"key": f"{quantity}_ci", "label": "±", "unit": unit, "digits": digits})
        rows = []
        for c in configurations:
            row = [c.name + (" (oversubscribed)" if c.oversubscribed else "")]
            for quantity in chosen:
                row.append(cell(c, quantity))
                if quantity in spread:
                    row.append(c.estimates[quantity].half if quantity in c.estimates else None)
            rows.append(row)
        self.tables.append({"name": f"{suite}_{kind}", "title": f"{suite}: {title}", "caption": caption,
                            "columns": columns, "rows": rows})  # fmt: skip

    def add_fact(self, name, value, unit):
        self.facts[name] = {"value": value.value, "low": value.low, "high": value.high, "n": value.n, "unit": unit}


def cell(configuration, quantity):
    """An estimate's mean, or one of the numbers that describe a configuration."""
    if quantity in ("n", "cores", "ranks", "threads", "batch", "workers"):
        return getattr(configuration, quantity)
    return configuration.get(quantity)


def tabulate(report, suite, members):
    trained = [c for c in members if "train_loss" in c.estimates]
    timed = [c for c in trained if "forward_ms" in c.estimates]
    report.add_table(suite, "results", members)
    if trained:
        report.add_table(suite, "learning", trained)
    if timed:
        report.add_table(suite, "step", timed)
    for name in sorted({c.sidecar.get("script") or c.name for c in trained} - {
            c.sidecar.get("script") or c.name for c in timed}):
        report.missing.append(f"{suite}: where a step's time goes in {name}: its log has no phases")
    if suite == "parallel":
        report.add_table(suite, "scaling", members)
    if suite in ("loading", "files"):
        report.add_table(suite, "loading", trained or members)
    if alone := [c for c in members if "alone_images_per_s" in c.estimates]:
        report.add_table(suite, "alone", alone)
    if suite == "split":
        report.add_table(suite, "modes", members)


def collect_facts(report, configurations):
    """Everything that prose may state, by name."""
    for c in configurations:
        for quantity, value in c.estimates.items():
            report.add_fact(f"{c.suite}.{c.name}.{quantity}", value, QUANTITIES[quantity][1])
    for suite in dict.fromkeys(c.suite for c in configurations):
        members = [c for c in configurations if c.suite == suite]
        for quantity in ("loss_difference", "accuracy_difference"):
            if found := [c.estimates[quantity] for c in members if quantity in c.estimates]:
                report.add_fact(f"{suite}.largest_{quantity}", max(found), QUANTITIES[quantity][1])
        for quantity in ("speedup", "images_per_s"):
            found = [c.estimates[quantity] for c in members if quantity in c.estimates and not c.oversubscribed]
            if found and suite == "parallel":
                report.add_fact(f"{suite}.best_{quantity}", max(found), QUANTITIES[quantity][1])
        for family, fit in fit_amdahl(members).items():
            report.add_fact(f"{suite}.{family}.amdahl_serial_fraction", fit, "%")


def number_text(value, digits):
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:,.{digits}f}"


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
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx")
SHADES = ("#1f2933", "#6b8fb5", "#b9d3ea", "#f2c48d", "#ffffff")
STYLE = {
    "font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8, "legend.fontsize": 7, "axes.grid": True, "grid.color": "0.9",
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
    "svg.hashsalt": "analyze_results", "figure.dpi": 150, "legend.frameon": False, "hatch.linewidth": 0.5,
    "lines.markersize": 4, "errorbar.capsize": 2,
}  # fmt: skip


class Plotter:
    """Makes figures of one size and style, with a line below that says what was measured, and writes them."""

    def __init__(self, report, folder):
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams.update(STYLE)
        self.report, self.folder, self.notes = report, folder, ""

    def figure(self, height, rows=1, columns=1, **options):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)

    def save(self, figure, name, title, caption, alt):
        figure.supxlabel(self.notes, fontsize=6.5, color="0.25", wrap=True)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once for both files
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            with atomic_write(self.folder / "figures" / f"{name}.{kind}") as file:
                figure.savefig(file, format=kind, metadata=metadata)
        self.report.figures.append({"name": name, "title": title, "caption": f"{caption} {self.notes}", "alt": alt})

    def legend(self, figure, axes, columns=3):
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, max(len(labels), 1)))


def describe(report, configurations, machines):
    """The line below a suite's figures: machines, data, repeats, and everything that a reader must not overlook."""
    texts, runs = [], [run for c in configurations for run in c.runs]
    for number, machine in enumerate(machines, 1):
        mine = [run for run in runs if run.machine == machine]
        if mine:
            _, cpu, cores, dataset, _ = machine
            images = sorted({run.sidecar.get("train_images") or 0 for run in mine})
            sizes = "/".join(f"{n:,}" for n in images)
            data = "SYNTHETIC DATA" if dataset == "synthetic" else dataset
            place = f"{cpu}, {cores} cores; {data}, {sizes} images" if cpu else "machine and data set unknown"
            texts.append(place if len(machines) == 1 else f"[{number}] {place}")
    repeats = sorted({c.n for c in configurations})
    count = str(repeats[0]) if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    texts.append(f"n = {count}" + ("; bars: 95 % intervals" if repeats[-1] > 1 else ""))
    lines = ["; ".join(texts)]
    if crowded := [c.name for c in configurations if c.oversubscribed]:
        lines.append(f"OVERSUBSCRIBED (more ranks × threads than cores): {', '.join(crowded)}")
    commits = {run.sidecar.get("git_commit") for run in runs} - {None}
    if len(commits) > 1:
        lines.append(f"{len(commits)} DIFFERENT COMMITS: {', '.join(sorted(c[:8] for c in commits))}")
    import textwrap

    return "\n".join(part for line in lines for part in textwrap.wrap(line, 120))


def errors(configurations, quantity):
    return [c.estimates[quantity].half or 0 for c in configurations]


def families(configurations, scaling):
    """{label: configurations by cores} of suite parallel, each line beginning at its own run on one core."""
    single = {c.base: c for c in configurations if c.base in ("serial", "hybrid-1x1-strong")}
    found = {}
    for c in configurations:
        if c.scaling == scaling and c.cores > 1 and "speedup" in c.estimates:
            label = "MPI" if c.base.startswith("mpi") else f"hybrid, {c.ranks} rank{'s' * (c.ranks != 1)}"
            found.setdefault(label, []).append(c)
    for label, members in found.items():
        start = single.get("serial" if label == "MPI" else "hybrid-1x1-strong" if label == "hybrid, 1 rank" else "")
        members[:] = sorted([*([start] if start else []), *members], key=lambda c: c.cores)
    return found


def plot_scaling(plot, suite, configurations, quantity):
    """Strong and weak scaling against cores, with the ideal line and, for speed-ups, Amdahl's law."""
    members = [c for c in configurations if c.environment == 1]
    labels = sorted({label for s in ("strong", "weak") for label in families(members, s)})
    if not labels:
        return
    figure, axes = plot.figure(3.2, 1, 2, sharey=True)
    most = max(c.cores for c in members)
    for ax, scaling in zip(axes[0], ("strong", "weak"), strict=True):
        p = np.linspace(1, most, 50)
        ax.plot(p, p if quantity == "speedup" else np.full(50, 100), color="0.6", lw=1, label="ideal")
        for label, line in families(members, scaling).items():
            plot_family(ax, line, quantity, labels.index(label), label)
        if scaling == "strong" and quantity == "speedup":
            for (family, fit), style in zip(fit_amdahl(members).items(), LINES[1:], strict=False):
                s = fit.value / 100
                name = "MPI" if family == "mpi" else family
                ax.plot(p, 1 / (s + (1 - s) / p), ls=style, color="0.45", lw=1, label=f"Amdahl, {name}: s = {fit.value:.1f} %")
        ax.set(title=f"{scaling} scaling", xlabel="cores used (ranks × threads)", xticks=sorted({c.cores for c in members}))
    axes[0][0].set_ylabel("speed-up" if quantity == "speedup" else "efficiency (%)")
    axes[0][0].set_ylim(bottom=0)
    plot.legend(figure, axes[0][0], 4)
    word = "Speed-up" if quantity == "speedup" else "Efficiency"
    best = max((c for c in members if quantity in c.estimates and c.cores > 1), key=lambda c: c.get(quantity))
    plot.save(figure, f"{suite}_{quantity}", f"{word}, strong and weak scaling",
              f"{word} against the same work on one core. Hollow: oversubscribed.",
              f"{word} over cores for {', '.join(labels)}; the highest is {best.get(quantity):.2f} ({best.name}).")


def plot_family(ax, line, quantity, number, label):
    """A line with error bars; what was oversubscribed is hollow."""
    x, y = [c.cores for c in line], [c.get(quantity) for c in line]
    color = COLORS[1:][number % 7]
    ax.errorbar(x, y, errors(line, quantity), ls=LINES[number % len(LINES)], marker=MARKERS[number % len(MARKERS)],
                color=color, label=label)
    hollow = [(c.cores, c.get(quantity)) for c in line if c.oversubscribed]
    if hollow:
        ax.plot(*zip(*hollow, strict=True), ls="", marker=MARKERS[number % len(MARKERS)], color=color, mfc="white", zorder=5)


def bars(ax, configurations, quantity, shade=1, hatch="", digits=None):
    """Horizontal bars with error bars and the number behind each; a configuration without the quantity has none."""
    y = [i for i, c in enumerate(configurations) if quantity in c.estimates]
    members = [configurations[i] for i in y]
    values, half = np.array([c.get(quantity) for c in members]), np.array(errors(members, quantity))
    ax.barh(y, values, 0.7, color=SHADES[shade], hatch=hatch, edgecolor="0.2", linewidth=0.6,
            xerr=half if half.any() else None, error_kw={"elinewidth": 0.8})
    label, unit, default = QUANTITIES[quantity]
    for position, value, width in zip(y, values, half, strict=True):
        ax.annotate(number_text(value, default if digits is None else digits), (value + width, position), (3, 0),
                    textcoords="offset points", va="center", fontsize=6.5)
    ax.set_xlabel(f"{label} ({unit})" if unit else label)
    ax.set_xlim(0, 1.25 * max(values + half, default=1) or 1)
    ax.grid(visible=False, axis="y")
    name_rows(ax, configurations)


def name_rows(ax, configurations):
    names = [c.name + (" *" if c.oversubscribed else "") for c in configurations]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)


def plot_throughput(plot, suite, configurations):
    members = [c for c in configurations if "images_per_s" in c.estimates]
    figure, axes = plot.figure(1.0 + 0.24 * len(members))
    bars(axes[0][0], members, "images_per_s", digits=0)
    best = max(members, key=lambda c: c.get("images_per_s"))
    star = " *: oversubscribed." if any(c.oversubscribed for c in members) else ""
    plot.save(figure, f"{suite}_throughput", f"Throughput, {suite}", f"Training images per second.{star}",
              f"Bars of throughput; the highest is {best.get('images_per_s'):,.0f} images/s ({best.name}).")


def plot_step(plot, suite, configurations):
    """Where a step's time goes, as shares; a configuration whose phases overlap has no such sum."""
    members = [c for c in configurations if "update_share" in c.estimates]
    if not members:
        return
    figure, axes = plot.figure(1.3 + 0.26 * len(members))
    ax, left = axes[0][0], np.zeros(len(members))
    for phase, shade, hatch in zip(PHASES, SHADES, HATCHES, strict=True):
        values = np.array([c.get(f"{phase}_share") or 0 for c in members])
        if values.any():
            ax.barh(range(len(members)), values, 0.7, left, color=shade, hatch=hatch, edgecolor="0.2", linewidth=0.6,
                    label=QUANTITIES[f"{phase}_share"][0].removesuffix(" share"))
        left += values
    for i, c in enumerate(members):
        ax.annotate(f"{c.get('step_ms'):,.1f} ms", (100, i), (3, 0), textcoords="offset points", va="center", fontsize=6.5)
    ax.set(xlabel="share of a step (%)", xlim=(0, 112), xticks=range(0, 101, 20))
    ax.grid(visible=False, axis="y")
    name_rows(ax, members)
    plot.legend(figure, ax, 5)
    plot.save(figure, f"{suite}_step", f"Where a step's time goes, {suite}",
              "Shares of a training step; behind each bar the step in milliseconds. Communication has waiting for other "
              "ranks in it; update and rest is what the logged phases leave.",
              "Stacked bars of loading, forward, backward, communication, update and rest.")


def plot_curves(plot, suite, configurations):
    """Loss and accuracy over the epochs; lines that lie on each other are nested, the first one widest."""
    groups = comparable_groups([c for c in configurations if c.curves(VALIDATE, "loss").size])
    if not groups:
        return
    members = [c for group in groups for c in group]
    figure, axes = plot.figure(3.0 + 0.15 * math.ceil(len(members) / 3), 1, 2)
    for number, group in enumerate(groups):
        for place, c in enumerate(group):
            style = {"color": COLORS[number % 8], "ls": LINES[place % len(LINES)], "marker": MARKERS[place % len(MARKERS)],
                     "lw": max(2.8 - 0.6 * place, 0.8), "ms": max(7 - place, 3), "mfc": "none", "label": c.name}
            for ax, kind, column, factor in ((axes[0][0], TRAIN, "loss", 1), (axes[0][1], VALIDATE, "value1", 100)):
                values = factor * c.curves(kind, column).mean(0)
                ax.plot(range(1, len(values) + 1), values, **style)
    for ax, title, label in zip(axes[0], ("training", "validation"), ("mean loss", "test accuracy (%)"), strict=True):
        ax.set(title=title, xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    plot.legend(figure, axes[0][0])
    worst = max((c for c in members if "loss_difference" in c.estimates), key=lambda c: c.get("loss_difference"), default=None)
    said = "No two of them compute the same." if worst is None else (
        f"Those of one colour compute the same; their losses differ by {worst.get('loss_difference'):.1e} at most "
        f"({worst.name}), their accuracies by {max(c.get('accuracy_difference') or 0 for c in members):.2f} points.")
    axes[0][0].annotate(f"largest difference: {worst.get('loss_difference'):.1e}" if worst else "", (0.98, 0.97),
                        xycoords="axes fraction", ha="right", va="top", fontsize=7)
    plot.save(figure, f"{suite}_curves", f"Loss and accuracy, {suite}", said, f"Loss and test accuracy over epochs. {said}")


def plot_hardware(plot, suite, configurations):
    """Throughput, memory, processor and accuracy, each configuration one row in all panels."""
    quantities = [q for q in ("images_per_s", "ram_mb", "cpu_percent", "gpu_percent", "gpu_mem_mb", "test_accuracy")
                  if any(q in c.estimates for c in configurations)]  # fmt: skip
    columns = 2
    rows = math.ceil(len(quantities) / columns)
    figure, axes = plot.figure(0.8 + rows * (0.6 + 0.2 * len(configurations)), rows, columns, sharey=True)
    for ax, quantity in zip(axes.flat, quantities, strict=False):
        bars(ax, configurations, quantity, digits=0 if quantity != "test_accuracy" else 1)
        if quantity == "images_per_s":
            ax.set_xscale("log")
            values = [c.get(quantity) for c in configurations]
            ax.set_xlim(min(values) / 2, 4 * max(values))
            ax.set_xlabel("throughput (images/s, logarithmic)")
    for ax in list(axes.flat)[len(quantities):]:
        ax.set_visible(False)
    plot.save(figure, f"{suite}_use", "Throughput and use of resources",
              "RAM, CPU and GPU use are means (memory: peaks) over the run, of rank 0 and its children; 100 % CPU is one core.",
              f"Bars of {', '.join(QUANTITIES[q][0] for q in quantities)} for each configuration.")


def plot_loading(plot, suite, configurations):
    """Seconds of an epoch and how many of them were waiting for data; beside it the loading alone."""
    trained = [c for c in configurations if "train_loss" in c.estimates]
    alone = [c for c in configurations if "alone_images_per_s" in c.estimates]
    panels = [p for p in ((trained, "epoch"), (alone, "alone")) if p[0]]
    figure, axes = plot.figure(1.2 + 0.24 * max(len(p[0]) for p in panels), 1, len(panels))
    for ax, (members, kind) in zip(axes[0], panels, strict=True):
        if kind == "alone":
            bars(ax, members, "alone_images_per_s", 1)
            continue
        bars(ax, members, "epoch_seconds", 4, digits=2)
        ax.barh(range(len(members)), [c.get("epoch_loading") for c in members], 0.7, color=SHADES[1], hatch="////",
                edgecolor="0.2", linewidth=0.6, label="of it waiting for data")
        ax.set_xlabel("an epoch of training (s)")
        plot.legend(figure, ax)
    plot.save(figure, f"{suite}_epoch", "Loading against total",
              "Seconds of an epoch (record type 0) and the part of it in which the training waited for data; at the right "
              "the same source without training." if len(panels) == 2 else "Seconds of an epoch and the waiting in it.",
              "Bars of seconds per epoch and of the waiting in them, for each source and number of workers.")


def plot_batches(plot, suite, configurations):
    """Total and waiting time over the batches of the first epoch of the first repeat, a panel for each source."""
    sources = {}
    for c in configurations:
        if "train_loss" in c.estimates and c.runs[0].log.batch_lines:
            sources.setdefault(re.sub(r"-\d+-workers.*", "", c.name), []).append(c)
    if not sources:
        return
    columns = min(2, len(sources))
    rows = math.ceil(len(sources) / columns)
    figure, axes = plot.figure(1.0 + 1.7 * rows, rows, columns, sharey=True)
    for ax, (source, members) in zip(axes.flat, sources.items(), strict=False):
        for number, c in enumerate(members):
            batches = c.runs[0].log.batches()
            batches = [row for row in batches if row["epoch"] == batches[0]["epoch"]]
            label = f"{c.workers} workers" if "-workers" in c.name else None
            x = [row["value1"] for row in batches]
            style = {"color": COLORS[number % 8], "marker": MARKERS[number % 12], "markevery": max(len(x) // 8, 1), "mfc": "none"}
            ax.plot(x, [row["duration"] for row in batches], "-", label=f"total{', ' + label if label else ''}", **style)
            ax.plot(x, [max(row["loading"], 1e-6) for row in batches], ":", label=f"waiting{', ' + label if label else ''}", **style)
        ax.set(title=source, yscale="log", xlabel="batch")
    for ax in axes[:, 0]:
        ax.set_ylabel("seconds since\nthe epoch began")
    for ax in list(axes.flat)[len(sources):]:
        ax.set_visible(False)
    plot.legend(figure, axes[0][0], 4)
    plot.save(figure, f"{suite}_batches", "Loading against total, batch by batch",
              "First epoch of the first repeat (record type 2): seconds since the epoch began, and of them waiting for data.",
              "Lines of total and waiting time over the batches, for each source.")


def plot_split(plot, suite, configurations):
    """Speed against mode `all`, forward and backward of a step, idle cores."""
    figure, axes = plot.figure(1.0 + 0.4 * len(configurations), 1, 3, sharey=True)
    rows = np.arange(len(configurations))
    if any("speedup_over_all" in c.estimates for c in configurations):
        bars(axes[0][0], configurations, "speedup_over_all")
        axes[0][0].axvline(1, color="0.4", ls="--", lw=0.8)
    for ax, pair, label in ((axes[0][1], ("forward_ms", "backward_ms"), "of a step (ms)"),
                            (axes[0][2], ("idle_forward", "idle_backward"), "idle (%)")):  # fmt: skip
        for offset, quantity, shade, hatch in zip((-0.19, 0.19), pair, (1, 2), ("////", "...."), strict=True):
            ax.barh(rows + offset, [c.get(quantity) or 0 for c in configurations], 0.36, color=SHADES[shade], hatch=hatch,
                    edgecolor="0.2", linewidth=0.6, label=quantity.replace("idle_", "").replace("_ms", ""),
                    xerr=[(c.estimates[quantity].half or 0) if quantity in c.estimates else 0 for c in configurations],
                    error_kw={"elinewidth": 0.8})
        ax.set_xlabel(label)
        ax.set_xlim(left=0)
        ax.grid(visible=False, axis="y")
    if not any("idle_forward" in c.estimates for c in configurations):
        axes[0][2].set_visible(False)
    name_rows(axes[0][0], configurations)
    plot.legend(figure, axes[0][1])
    plot.save(figure, f"{suite}_modes", "Forward and backward pass on separate cores",
              "Speed against mode all; forward and backward pass of a step; share of the time in which the cores of each "
              "group computed nothing.", "Bars for each mode: speed, phases, idle share.")


def plot_suite(plot, suite, members):
    if suite == "parallel":
        plot_scaling(plot, suite, members, "speedup")
        plot_scaling(plot, suite, members, "efficiency")
    if suite in ("parallel", "files"):
        plot_throughput(plot, suite, members)
    if suite == "hardware":
        plot_hardware(plot, suite, members)
    if suite == "split":
        plot_split(plot, suite, members)
    if suite == "loading":
        plot_loading(plot, suite, members)
    if suite in ("loading", "files"):
        plot_batches(plot, suite, members)
    plot_step(plot, suite, members)
    plot_curves(plot, suite, members)


# ----------------------------------------------------------------------------------------------------------------------


def environments(runs, machines):
    """What each machine, with its data set, ran with; commits and versions that differ are listed side by side."""
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
        blas = sorted({f"{b['library']} {b['version']} ({b['kernel']})" for s in mine for b in s.get("blas") or []})
        memory = max((s.get("memory_mb") or 0 for s in mine), default=0)
        host, cpu, cores, dataset, fingerprint = machine
        found.append({"host": host, "cpu": cpu, "cores": cores, "memory_gb": round(memory / 1024, 1) or None,
                      "gpu": " / ".join(gpus) or None, "blas": " / ".join(blas) or None,
                      "python": versions.pop("python", None), "versions": versions,
                      "commit": " / ".join(commits) or None, "dataset": dataset, "fingerprint": fingerprint,
                      "runs": len(mine)})  # fmt: skip
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
        report.missing.append(f"95 % intervals of {', '.join(single)}: one run each")
    for c in configurations:
        if c.suite == "parallel" and c.scaling and "speedup" not in c.estimates:
            report.missing.append(f"speed-up of parallel/{c.name}: there is no run on one core to compare it with")
    if any(c.suite == "split" for c in configurations) and not any("idle_forward" in c.estimates for c in configurations):
        report.missing.append("split: idle shares: the sidecars do not have them")


def list_marks(report, configurations, found):
    if any(e["dataset"] == "synthetic" for e in found):
        report.marks.append("synthetic data")
    if crowded := [c.name for c in configurations if c.oversubscribed]:
        report.marks.append(f"oversubscribed: {', '.join(crowded)}")
    if len(found) > 1:
        report.marks.append(f"{len(found)} machines or data sets, never compared with each other; [2] and so on tell them apart")
    for number, environment in enumerate(found, 1):
        if " / " in (environment["commit"] or ""):
            report.marks.append(f"different commits on machine [{number}]: {environment['commit']}")


def analyze(runs, failed, left_out, args, report):
    """Fill the report, write all files, return the content of analysis.json."""
    machines = [machine for machine, _ in Counter(run.machine for run in runs).most_common()]
    configurations = make_configurations(runs, machines)
    for c in configurations:
        if "train_loss" not in c.estimates:
            c.put("alone_images_per_s", c.estimates["images_per_s"])
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
        plot.notes = describe(report, members, machines)
        plot_suite(plot, suite, members)
    last = max((run.sidecar.get("end") or 0 for run in runs), default=0)
    import datetime

    created = datetime.datetime.fromtimestamp(last, datetime.timezone.utc).isoformat(timespec="seconds") if last else None
    return {"created": created, "results_dir": str(args.results_dir), "runs": len(runs), "failed_runs": failed,
            "missing": report.missing, "marks": report.marks, "environments": found, "tables": report.tables,
            "figures": report.figures, "facts": report.facts}  # fmt: skip


def write(content, folder):
    for content_of in content["tables"]:
        with atomic_write(folder / "tables" / f"{content_of['name']}.csv", "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([f"{c['key']} ({c['unit']})" if c["unit"] else c["key"] for c in content_of["columns"]])
            writer.writerows([["" if v is None else v for v in row] for row in content_of["rows"]])
    with atomic_write(folder / "analysis.json", "w") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")


def parse_args(argv=None):
    parser = Parser("analyze_results", __doc__)
    add = parser.add_argument
    add("logs", nargs="*", metavar="LOG", help="logs (CSV) of any runs; default: those in --results-dir")
    add("--results-dir", metavar="FOLDER", default="results", help="of run_experiments.py (default: %(default)s)")
    add("--output-dir", metavar="FOLDER", help="default: analysis/ in --results-dir")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or str(Path(args.results_dir) / "analysis")
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
