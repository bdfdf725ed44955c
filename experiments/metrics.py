"""Metrics of training runs: means over repeats with 95 % intervals, and comparisons of runs.

analyze_results.py makes tables of these metrics, plots.py draws them. The terms in all three:

run        one training: a log (CSV) and its metadata (the JSON beside it)
run group  the repeats of one command line on one machine
metric     a number of each run, by name; METRICS has the labels and units
estimate   the mean of a metric over the repeats of a run group, with its 95 % interval
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import BATCH, FETCH_TRAIN, TRAIN, VALIDATE
from read_runs import Machine, Run

LOGGED_PHASES = ("loading", "forward", "backward", "communication")
PHASES = (*LOGGED_PHASES, "update")

# These scripts start from the same weights and see the same data in the same order.
FROM_SCRATCH = ("serial_cnn", "parallel_cnn_mpi", "parallel_cnn_hybrid", "gpu_scratch")

# Two trainings from scratch with equal values of these arguments are the same computation.
COMPUTATION_ARGUMENTS = (
    "model lr momentum optimizer weight_decay seed subset epochs amp augment dtype image_size "
    "schedule label_smoothing nesterov"
).split()


class Metric(NamedTuple):
    label: str
    unit: str
    digits: int  # decimals in a printed table


METRICS = {
    # Settings of a run group, which the tables show beside its metrics
    "n": Metric("repeats", "", 0),
    "cores": Metric("cores", "", 0),
    "ranks": Metric("ranks", "", 0),
    "threads": Metric("threads", "", 0),
    "batch": Metric("images a step", "", 0),
    "workers": Metric("workers", "", 0),
    # Time and speed
    "seconds": Metric("training time", "s", 2),
    "images_per_s": Metric("throughput", "images/s", 1),
    "speedup": Metric("speed-up", "×", 2),
    "speedup_over_serial": Metric("against serial_cnn.py", "×", 2),
    "efficiency": Metric("efficiency", "%", 1),
    "serial_fraction": Metric("Karp–Flatt", "%", 1),
    # Learning
    "train_loss": Metric("train loss", "", 4),
    "test_loss": Metric("test loss", "", 4),
    "train_accuracy": Metric("train accuracy", "%", 2),
    "test_accuracy": Metric("test accuracy", "%", 2),
    "loss_difference": Metric("largest loss difference", "", 6),
    "accuracy_difference": Metric("largest accuracy difference", "points", 2),
    # Resources
    "ram_mb": Metric("peak RAM", "MiB", 0),
    "cpu_percent": Metric("CPU use", "% of a core", 0),
    "cpu_share": Metric("CPU time got", "% of asked for", 0),
    "gpu_percent": Metric("GPU use", "%", 0),
    "gpu_mem_mb": Metric("peak GPU memory", "MiB", 0),
    # A training step
    "step_ms": Metric("step", "ms", 2),
    "loading_ms": Metric("loading", "ms", 2),
    "forward_ms": Metric("forward", "ms", 2),
    "backward_ms": Metric("backward", "ms", 2),
    "communication_ms": Metric("communication", "ms", 2),
    "update_ms": Metric("update and rest", "ms", 2),
    "loading_share": Metric("loading share", "%", 2),
    "forward_share": Metric("forward share", "%", 2),
    "backward_share": Metric("backward share", "%", 2),
    "communication_share": Metric("communication share", "%", 2),
    "update_share": Metric("update and rest", "%", 2),
    # Waiting for data
    "epoch_seconds": Metric("epoch", "s", 3),
    "epoch_loading": Metric("waiting per epoch", "s", 3),
    "first_loading_share": Metric("waiting, first epoch", "%", 2),
    "later_loading_share": Metric("waiting, later epochs", "%", 2),
    "batch_loading_ms": Metric("waiting per batch, median", "ms", 3),
    "batch_loading_max_ms": Metric("longest", "ms", 2),
    "alone_images_per_s": Metric("loading alone", "images/s", 0),
    "fetch_seconds": Metric("fetching before", "s", 2),
    # Forward and backward pass on separate cores (train_resnet50_split_cores.py)
    "speedup_over_all": Metric("against all", "×", 2),
    "speedup_over_split": Metric("against split", "×", 2),
    "idle_forward": Metric("idle: forward's cores", "%", 1),
    "idle_backward": Metric("backward's cores", "%", 1),
}


def format_number(value: float | str | None, digits: int) -> str:
    """A cell of a table as text: `digits` decimals, fewer where four digits come before them."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if abs(value) < 1:
        return f"{value:.{digits}f}"

    # 5279.4 ± 471.7 is no more exact than 5,279 ± 472: four digits are enough for a reader.
    digits_before_point = len(f"{abs(value):.0f}")
    decimals = max(0, min(digits, 4 - digits_before_point))
    return f"{value:,.{decimals}f}"


# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over n repeats with its 95 % interval from low to high, None for n < 2."""

    value: float
    low: float | None
    high: float | None
    n: int
    by_repeat: pd.Series = field(default_factory=lambda: pd.Series(dtype=float))

    @property
    def ci_half_width(self) -> float | None:
        """Half of the confidence interval: the number after ± in a table."""
        return None if self.low is None else (self.high - self.low) / 2


def estimate(by_repeat: dict | pd.Series) -> Estimate | None:
    """Estimate a mean from {repeat: number}: mean ± t(0.975, n − 1) · s / √n.

    The standard deviation s of a few repeats is itself uncertain. Student's t distribution allows
    for that, if the numbers are about normally distributed (Student, Biometrika 6(1), 1908).
    Entries that are None, NaN or infinite are left out; returns None if no number remains.
    """
    numbers = pd.Series(by_repeat, dtype=float)
    numbers = numbers[np.isfinite(numbers)]
    n = len(numbers)
    if n == 0:
        return None

    mean = float(numbers.mean())
    if n == 1:
        return Estimate(mean, None, None, n, numbers)

    # ddof=1: divide by n − 1, as the mean comes from the same n numbers.
    half_width = float(stats.t.ppf(0.975, n - 1) * numbers.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half_width, mean + half_width, n, numbers)


def ratio(ours: Estimate | None, baseline: Estimate | None) -> Estimate | None:
    """Estimate ours / baseline, repeat by repeat; None if they have no repeat in common.

    Repeat i of all command lines ran at about the same time: a machine that is slower for a while
    is slower for both, which cancels out in the ratio of the two.
    """
    if ours is None or baseline is None:
        return None
    # pandas divides entries with the same index; a repeat that only one of them has gives NaN.
    return estimate(ours.by_repeat / baseline.by_repeat)


def karp_flatt(speedup, cores: int):
    """The serial fraction that a speed-up on some cores implies (Karp and Flatt, CACM 33(5), 1990).

    (1/S − 1/p) / (1 − 1/p), as a fraction. speedup: a number, an array or a Series.
    """
    return (1 / speedup - 1 / cores) / (1 - 1 / cores)


def amdahl_fit(cores: Iterable[int], speedups: Iterable[float]) -> float:
    """Fit the serial fraction s of Amdahl's law to speed-ups on several numbers of cores.

    Amdahl's law (AFIPS 1967) is 1/S = s + (1 − s)/p. Written as 1/S − 1/p = s · (1 − 1/p) it is a
    line through the origin with slope s, for which least squares has this closed form.
    """
    p = np.array(cores, float)
    x = 1 - 1 / p
    y = 1 / np.array(speedups, float) - 1 / p
    return float(x @ y / (x @ x))


# --------------------------------------------------------------------------------------------------
# Metrics of one run
# --------------------------------------------------------------------------------------------------


def run_metrics(run: Run) -> dict[str, float | None]:
    """Compute {metric: number} from a run's log; use of resources from its metadata, if there."""
    epochs = run.rows(TRAIN)
    validations = run.rows(VALIDATE)
    fetches = run.rows(FETCH_TRAIN)
    totals = run.metadata.get("totals") or {}

    # Validation is not training time: it has rows of its own, and epochs do not include it.
    first = epochs.iloc[0]
    last = epochs.iloc[-1]
    seconds = epochs["duration"].sum()
    images = (epochs["duration"] * epochs["images_per_s"]).sum()

    metrics = {
        "seconds": seconds,
        "images_per_s": images / seconds,
        "train_loss": last["loss"],
        "train_accuracy": 100 * last["value1"],
        "ram_mb": totals.get("peak_ram_mb") or epochs["ram_mb"].max(),
        "gpu_mem_mb": totals.get("peak_gpu_mem_mb") or epochs["gpu_mem_mb"].max(),
        "cpu_percent": totals.get("mean_cpu_percent"),
        "gpu_percent": totals.get("mean_gpu_percent"),
        "epoch_seconds": epochs["duration"].mean(),
        "epoch_loading": epochs["loading"].mean(),
        "first_loading_share": 100 * (first["loading"] / first["duration"]),
    }

    if run.cpu_share is not None:
        metrics["cpu_share"] = 100 * run.cpu_share

    if len(fetches):
        metrics["fetch_seconds"] = fetches["duration"].sum()

    if len(validations):
        metrics["test_loss"] = validations.iloc[-1]["loss"]
        metrics["test_accuracy"] = 100 * validations.iloc[-1]["value1"]

    # The first epoch may have to start workers and fill caches: its waiting is a metric of its own.
    later = epochs.iloc[1:]
    if len(later):
        metrics["later_loading_share"] = 100 * (later["loading"].sum() / later["duration"].sum())

    # Only train_resnet50_split_cores.py measures for how long a group of cores had no work.
    idle = totals.get("idle") or {}
    for core_group in ("forward", "backward"):
        if idle.get(core_group) is not None:
            metrics[f"idle_{core_group}"] = 100 * idle[core_group]

    metrics.update(step_metrics(run))
    return metrics


def step_metrics(run: Run) -> dict[str, float]:
    """Milliseconds of a training step, and how much of it each phase takes.

    These come from the row of the last batch of each complete epoch. Its times count from the
    start of the epoch, all on rank 0, and so the phases add up to the duration. In the row of the
    epoch itself they do not: there, communication is a mean over the ranks.
    """
    epochs = run.rows(TRAIN)
    batches = run.rows(BATCH)
    complete = batches[batches["epoch"].isin(epochs["epoch"])]
    last = complete.groupby("epoch").tail(1)
    if last.empty:
        return {}

    # In a row of a batch, value1 is its number in the epoch, from 1: the last one's is the count.
    steps = last["value1"].sum()
    total = last["duration"].sum()
    metrics = {"step_ms": 1000 * epochs["duration"].sum() / steps}

    rest = total
    for phase in LOGGED_PHASES:
        if last[phase].notna().all():
            spent = last[phase].sum()
            rest -= spent
            metrics[f"{phase}_ms"] = 1000 * spent / steps
            metrics[f"{phase}_share"] = 100 * (spent / total)

    # The log has no column for the update: it is what remains. Where nothing remains, the phases
    # overlapped in time and cannot be added up.
    if "forward_ms" in metrics and rest >= 0:
        metrics["update_ms"] = 1000 * rest / steps
        metrics["update_share"] = 100 * (rest / total)
    return metrics


def batch_waits(batches: pd.DataFrame) -> pd.Series:
    """Seconds of waiting for each batch, from rows of record type BATCH.

    Column loading counts from the start of the epoch: a batch's own wait is the difference to the
    row before. A batch whose row before is not in the log is left out.
    """
    is_first = batches["value1"] == 1

    # diff() is the difference to the row before.
    follows = (batches["value1"].diff() == 1) & (batches["epoch"].diff() == 0)
    waits = batches["loading"].diff().where(~is_first, batches["loading"])
    return waits[is_first | follows]


# --------------------------------------------------------------------------------------------------
# Run groups
# --------------------------------------------------------------------------------------------------


def curve(run: Run, kind: int, column: str) -> np.ndarray:
    """A column of a run's epochs; none if nothing was trained."""
    rows = run.rows(kind)
    trained = rows["value1"].notna()
    return rows.loc[trained, column].to_numpy(float)


class RunGroup:
    """The repeats of one command line on one machine.

    estimates: {metric: Estimate}. machine_number: 1 for the machine with the most runs.
    """

    def __init__(self, suite: str, base_name: str, machine_number: int, runs: list[Run]):
        self.suite = suite
        self.base_name = base_name
        self.machine_number = machine_number
        self.name = base_name if machine_number == 1 else f"{base_name} [{machine_number}]"
        self.runs = runs
        self.n = len(runs)
        self.cores = runs[0].cores
        self.oversubscribed = any(run.oversubscribed for run in runs)
        self.short_of_cpu = any(run.short_of_cpu for run in runs)

        # All repeats have the same command line, so that the first one's settings are everyone's.
        metadata = runs[0].metadata
        self.script = metadata.get("script")
        self.arguments = metadata.get("arguments") or {}
        self.ranks = metadata.get("ranks")
        self.threads = metadata.get("threads")
        self.workers = self.arguments.get("workers")
        self.batch = self.arguments.get("global_batch_size", self.arguments.get("batch_size"))

        self.scaling = None
        for scaling in ("strong", "weak"):
            if base_name.endswith(scaling):
                self.scaling = scaling

        # With --load-only nothing is trained, and an epoch has no accuracy.
        self.trains = any(run.rows(TRAIN)["value1"].notna().any() for run in runs)

        # One row a repeat, one column a metric
        repeats = [run.repeat for run in runs]
        table = pd.DataFrame([run_metrics(run) for run in runs], index=repeats)
        self.estimates = {}
        for metric in table:
            self.add(metric, estimate(table[metric]))

    @property
    def marks(self) -> list[str]:
        """What a reader must know before comparing this group's speed with another's."""
        marks = []
        if self.oversubscribed:
            marks.append("oversubscribed")
        if self.short_of_cpu:
            marks.append("short of CPU")
        return marks

    @property
    def label(self) -> str:
        """The name in words, for a figure: "hybrid-1x2-strong" becomes "1 rank × 2 threads"."""
        if self.suite == "files":  # named by their files
            return self.name
        return readable_name(self.base_name) + self.name.removeprefix(self.base_name)

    def add(self, metric: str, value: Estimate | None):
        if value is not None:
            self.estimates[metric] = value

    def mean(self, metric: str) -> float | None:
        found = self.estimates.get(metric)
        return None if found is None else found.value

    def ci_half_width(self, metric: str) -> float | None:
        found = self.estimates.get(metric)
        return None if found is None else found.ci_half_width

    def curves(self, kind: int, column: str) -> np.ndarray:
        """A column of the epochs' rows as an array (repeats, epochs), cut to the shortest repeat.

        column: "loss" or "value1", the accuracy from 0 to 1. No epochs if nothing was trained.
        """
        curves = [curve(run, kind, column) for run in self.runs]
        shortest = min(len(curve) for curve in curves)
        return np.stack([values[:shortest] for values in curves])

    def computation(self) -> tuple:
        """A key that is equal for run groups whose losses differ by rounding errors alone."""
        algorithm = "from scratch" if self.script in FROM_SCRATCH else self.script

        # Images in shards are shuffled shard by shard, which is another order of the data.
        from_s3 = str(self.arguments.get("source")).startswith("s3:")
        in_shards = from_s3 and self.arguments.get("s3_mode") == "shards"

        # --compress and --local-steps are another computation for each number of ranks, which the
        # arguments then have. Logs from before these options do not have them.
        lossy = [self.arguments.get(name) for name in ("ranks", "compress", "local_steps")]
        lossy = lossy if lossy[0] else None

        arguments = [self.arguments.get(name) for name in COMPUTATION_ARGUMENTS]
        key = (self.suite, self.machine_number, algorithm, self.batch, in_shards)
        return (*key, str(lossy), *arguments)


def readable_name(name: str) -> str:
    """The name of a configuration of run_experiments.py in words."""
    networks = {"cnn": "CNN", "resnet18": "ResNet-18"}
    ways = {"scratch": "from scratch", "pytorch": "in PyTorch"}

    if found := re.fullmatch(r"mpi-(\d+)-(strong|weak)", name):
        ranks, scaling = found.groups()
        return f"MPI, {plural(ranks, 'rank')}, {scaling}"

    if found := re.fullmatch(r"hybrid-(\d+)x(\d+)-(strong|weak)", name):
        ranks, threads, scaling = found.groups()
        return f"hybrid, {plural(ranks, 'rank')} × {plural(threads, 'thread')}, {scaling}"

    if found := re.fullmatch(r"(cnn|resnet18)-(scratch|pytorch)-(?:(\d+)-cores?|gpu)", name):
        network, way, cores = found.groups()
        return f"{networks[network]} {ways[way]}, {plural(cores, 'core') if cores else 'GPU'}"

    # Training and loading alone are never in one figure: its axis says which of them it shows.
    if found := re.fullmatch(r"(.+)-(\d+)-workers-(?:train|load)", name):
        source, workers = found.groups()
        return f"{source.replace('s3', 'S3').replace('-', ' ')}, {plural(workers, 'worker')}"

    if found := re.fullmatch(r"(\w+)-\d+-(.+)", name):  # a rung: its ladder, number and name
        ladder, rung = found.groups()
        return f"{ladder.replace('mpi', 'MPI').replace('pytorch', 'PyTorch')}: {rung}"

    return name


def plural(number: int | str, noun: str) -> str:
    return f"{number} {noun}" if str(number) == "1" else f"{number} {noun}s"


def make_groups(runs: list[Run], machines: list[Machine]) -> list[RunGroup]:
    """Group the runs and add all metrics that compare one group with another."""
    runs_by_group = {}
    for run in runs:
        key = (run.suite, run.name, machines.index(run.machine) + 1)
        runs_by_group.setdefault(key, []).append(run)
    groups = [RunGroup(*key, members) for key, members in runs_by_group.items()]

    # The serial runs come first, whenever they ran: others are compared with the first group.
    groups.sort(key=lambda group: group.base_name != "serial")

    add_loading_alone(groups)
    add_speedups(groups)
    add_differences(groups)
    add_batch_waits(groups)
    return groups


def means(groups: list[RunGroup], metric: str) -> np.ndarray:
    """The mean of a metric in each of the groups, which must all have it."""
    return np.array([group.mean(metric) for group in groups])


def ci_half_widths(groups: list[RunGroup], metric: str) -> np.ndarray:
    """Half of the 95 % interval of a metric in each of the groups, 0 where there is none."""
    return np.array([group.ci_half_width(metric) or 0 for group in groups])


def by_suite(groups: list[RunGroup]) -> dict[str, list[RunGroup]]:
    """{suite: its run groups}, in the order of the first group of each."""
    suites = {}
    for group in groups:
        suites.setdefault(group.suite, []).append(group)
    return suites


def on_main_machine(groups: list[RunGroup]) -> list[RunGroup]:
    """The run groups of the machine that has most of them: a curve must not mix machines."""
    counts = Counter(group.machine_number for group in groups)
    if not counts:
        return []
    main_machine = counts.most_common(1)[0][0]
    return [group for group in groups if group.machine_number == main_machine]


def loading_groups(groups: list[RunGroup]) -> list[RunGroup]:
    """Groups that train, and those that only load and whose training was not run.

    The others that only load are left out: add_loading_alone() has given their numbers to the
    training.
    """
    training = {group.name for group in groups if group.trains}
    return [
        group
        for group in groups
        if group.name in training or group.name.replace("-load", "-train") not in training
    ]


def add_loading_alone(groups: list[RunGroup]):
    """Add the speed of --load-only, also to the training with the same source and workers."""
    by_name = {(group.suite, group.name): group for group in groups}
    for group in groups:
        if group.trains:
            continue
        throughput = group.estimates["images_per_s"]
        group.add("alone_images_per_s", throughput)
        training = by_name.get((group.suite, group.name.replace("-load", "-train")))
        if training is not None:
            training.add("alone_images_per_s", throughput)


def add_speedups(groups: list[RunGroup]):
    """Add speed-up, efficiency and serial fraction in suite parallel, ratios in suite split.

    With strong scaling, p cores share the work of one. With weak scaling each has as much as the
    one: images/s relative to one core are then the scaled speed-up (Gustafson, CACM 31(5), 1988).
    """
    by_name = {(group.suite, group.base_name, group.machine_number): group for group in groups}

    def speedup_over(group, baseline_name):
        baseline = by_name.get((group.suite, baseline_name, group.machine_number))
        if baseline is None:
            return None
        return ratio(group.estimates["images_per_s"], baseline.estimates["images_per_s"])

    for group in groups:
        if group.suite == "split":
            group.add("speedup_over_all", speedup_over(group, "all"))
            group.add("speedup_over_split", speedup_over(group, "split"))
        if group.suite != "parallel":
            continue

        # A speed-up compares with the same code on one core. The hybrid's kernels are faster than
        # the serial ones, so that its speed-up over serial_cnn.py would flatter its scaling.
        is_hybrid = group.base_name.startswith("hybrid")
        speedup = speedup_over(group, "hybrid-1x1-strong" if is_hybrid else "serial")
        group.add("speedup", speedup)
        group.add("speedup_over_serial", speedup_over(group, "serial"))
        if speedup is None:
            continue

        group.add("efficiency", estimate(100 * speedup.by_repeat / group.cores))

        # The serial fraction is defined for strong scaling on p real cores.
        if group.scaling == "strong" and group.cores > 1 and not group.oversubscribed:
            serial_fraction = 100 * karp_flatt(speedup.by_repeat, group.cores)
            group.add("serial_fraction", estimate(serial_fraction))


def same_computation(groups: list[RunGroup]) -> list[list[RunGroup]]:
    """Lists of the run groups that train and are the same computation."""
    found = {}
    for group in groups:
        if "train_loss" in group.estimates:
            found.setdefault(group.computation(), []).append(group)
    return list(found.values())


def add_differences(groups: list[RunGroup]):
    """Add how far losses and accuracies are from the first group with the same computation."""
    for first, *others in same_computation(groups):
        for group in others:
            for metric, column, factor in (
                ("loss_difference", "loss", 1),
                ("accuracy_difference", "value1", 100),
            ):
                largest = [
                    largest_difference(first.runs, group.runs, kind, column)
                    for kind in (TRAIN, VALIDATE)
                ]
                if np.isfinite(largest).all():  # otherwise a training has diverged
                    group.add(metric, Estimate(factor * max(largest), None, None, group.n))


def largest_difference(ours: list[Run], theirs: list[Run], kind: int, column: str) -> float:
    """The largest difference of two run groups' curves, over all pairs of runs with equal seeds."""
    largest = 0.0
    for a in ours:
        for b in theirs:
            if seed(a) == seed(b):
                one = curve(a, kind, column)
                other = curve(b, kind, column)
                epochs = min(len(one), len(other))
                differences = np.abs(one[:epochs] - other[:epochs])
                largest = np.max(differences, initial=largest)  # NaN if one of them is
    return float(largest)


def seed(run: Run):
    return (run.metadata.get("arguments") or {}).get("seed")


def add_batch_waits(groups: list[RunGroup]):
    """Add the median and the longest wait for a batch, where data loading is what was measured."""
    for group in groups:
        if group.suite not in ("loading", "files"):
            continue
        waits = {run.repeat: batch_waits(run.rows(BATCH)) for run in group.runs}
        group.add("batch_loading_ms", estimate({i: 1000 * w.median() for i, w in waits.items()}))
        group.add("batch_loading_max_ms", estimate({i: 1000 * w.max() for i, w in waits.items()}))


def fit_amdahl(groups: list[RunGroup]) -> dict[str, Estimate]:
    """Estimate the serial fraction, in %, of "mpi" and "hybrid": one fit to each repeat."""
    fits = {}
    for family in ("mpi", "hybrid"):
        members = [
            group
            for group in on_main_machine(groups)
            if group.base_name.startswith(family) and "serial_fraction" in group.estimates
        ]
        if not members:
            continue

        # One row a repeat, one column a run group; a fit needs all groups of a repeat.
        speedups = pd.DataFrame({g.name: g.estimates["speedup"].by_repeat for g in members})
        cores = [group.cores for group in members]
        fractions = {
            repeat: 100 * amdahl_fit(cores, row) for repeat, row in speedups.dropna().iterrows()
        }
        fit = estimate(fractions)
        if fit is not None:
            fits[family] = fit
    return fits
