"""Tables and figures from what run_experiments.py has measured, or from the logs of any runs.

Reads results/index.json and results/<suite>/<configuration>/<repeat>/run.csv and run.json, or the
logs that are named. Prints the tables and writes to results/analysis: tables/*.csv, figures/*.png
and *.svg, and analysis.json, which has all of these numbers.

    make analyze
    python experiments/analyze_results.py --results-dir ./results
    python experiments/analyze_results.py results/serial_cnn.csv results/parallel_cnn_mpi.csv
    python experiments/analyze_results.py results/serial.ckpt.npz results/mpi.ckpt.npz
    python experiments/analyze_results.py --style slides --output-dir results/slides

Logs are compared with the first, loss by loss, and so are two checkpoints (compare_runs.py). Of
each log that is named, the confusion matrix of its last validation is shown (confusion.py).

What the numbers are (read_runs.py reads runs, metrics.py computes, plots.py draws):

±             half of the 95 % interval of a mean over n repeats, t(0.975, n − 1) · s / √n
speed-up S    images/s divided by those of the same work on one core (MPI: serial_cnn.py; hybrid:
              one rank of one thread). Repeats run interleaved, so repeat i is divided by repeat i;
              mean and interval are those of the n ratios.
strong        scaling with the same batch on all p = ranks × threads cores: S = T(1)/T(p)
weak          scaling with a batch that grows with p: S is Gustafson's scaled speed-up
efficiency    S/p
Karp–Flatt    the serial fraction that a strong speed-up implies, (1/S − 1/p) / (1 − 1/p)
Amdahl        the serial fraction s of 1/S = s + (1 − s)/p that fits all p at once best

Runs of different machines or data sets are never averaged or divided by each other. Runs of
different commits are, and the output says so.
"""

import datetime
import json
import os
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
# A notebook's kernel names a backend for its pages, which need not be installed here. The figures
# are drawn into files, without any.
os.environ.pop("MPLBACKEND", None)

from common import TRAIN, VALIDATE, InputError, Parser, atomic_write, format_table, run_main
from compare_runs import batch_losses, compare_checkpoints, compare_logs, is_checkpoint
from confusion import describe_confusion, find_confusion, plot_confusion, write_confusion
from figures import STYLES, Plot, figure_style, save_plot
from metrics import (
    METRICS,
    PHASES,
    Estimate,
    RunGroup,
    by_suite,
    fit_amdahl,
    format_number,
    loading_groups,
    make_groups,
    on_main_machine,
)
from plot_ladder import plot_ladder
from plot_trace import plot_trace
from plots import plot_suite
from read_runs import Machine, Run, Warn, read_logs, read_results

WIDTH = 100  # columns of what is printed

SUITES = ("parallel", "hardware", "loading", "split", "ladder", "recipes")

# Columns of the tables that are no metrics but attributes of a RunGroup
GROUP_SETTINGS = ("n", "cores", "ranks", "threads", "batch", "workers")

# The settings of a training, by their names in the run metadata, and as analysis.json names them
TRAINING_SETTINGS = {
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


class TableForm(NamedTuple):
    title: str
    caption: str
    metrics: list[str]  # those that no run group has are left out


TABLES = {
    "results": TableForm(
        "time, throughput and resources",
        "Training time without warm-up and validation. RAM, CPU and GPU use are those of rank 0 "
        "and its children. CPU time got: short of 100 % where threads had to wait for a core.",
        (
            "n seconds images_per_s train_accuracy test_accuracy ram_mb cpu_percent cpu_share "
            "gpu_percent gpu_mem_mb"
        ).split(),
    ),
    "learning": TableForm(
        "loss and accuracy",
        "Last epoch. Differences: to the first configuration that computes the same, over all "
        "epochs and repeats, training and validation.",
        (
            "n batch train_loss test_loss train_accuracy test_accuracy loss_difference "
            "accuracy_difference"
        ).split(),
    ),
    "step": TableForm(
        "where a step's time goes",
        "Seconds of the epochs divided by steps. Update and rest: what the logged phases leave of "
        "the step; empty where phases overlap.",
        ["step_ms", *(f"{p}_ms" for p in PHASES), *(f"{p}_share" for p in PHASES)],
    ),
    "scaling": TableForm(
        "speed-up and efficiency",
        "Speed-up against the same work on one core: serial_cnn.py for MPI, one rank of one "
        "thread for hybrid. Karp–Flatt: the serial fraction that a strong speed-up implies.",
        (
            "ranks threads batch n images_per_s speedup efficiency serial_fraction "
            "speedup_over_serial"
        ).split(),
    ),
    "loading": TableForm(
        "waiting for data",
        "Waiting for data during training, per epoch (record type 0) and per batch (type 2); "
        "alone: the same loading without a training.",
        (
            "workers n epoch_seconds epoch_loading first_loading_share later_loading_share "
            "batch_loading_ms batch_loading_max_ms alone_images_per_s fetch_seconds"
        ).split(),
    ),
    "modes": TableForm(
        "modes",
        "Idle: the share of the training in which a group's cores computed nothing.",
        (
            "n images_per_s speedup_over_all speedup_over_split step_ms forward_ms backward_ms "
            "update_ms idle_forward idle_backward"
        ).split(),
    ),
}


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def make_tables(groups: list[RunGroup]) -> list[dict]:
    """All tables, as in analysis.json: name, title, caption, columns and rows."""
    tables = []
    for suite, members in by_suite(groups).items():
        trained = [group for group in members if group.trains]
        with_phases = [group for group in trained if "forward_ms" in group.estimates]

        tables.append(make_table(suite, "results", members))
        if trained:
            tables.append(make_table(suite, "learning", trained))
        if with_phases:
            tables.append(make_table(suite, "step", with_phases))
        if suite == "parallel":
            tables.append(make_table(suite, "scaling", members))
        if suite in ("loading", "files"):
            tables.append(make_table(suite, "loading", loading_groups(members)))
        if suite == "split":
            tables.append(make_table(suite, "modes", members))
    return tables


def make_table(suite: str, kind: str, groups: list[RunGroup]) -> dict:
    """A row for each run group; each metric that has intervals is followed by a column of them.

    kind: a key of TABLES.
    """
    form = TABLES[kind]
    shown = [m for m in form.metrics if any(cell(group, m) is not None for group in groups)]
    with_interval = {
        m for m in shown if any(group.ci_half_width(m) is not None for group in groups)
    }

    columns = [{"key": "configuration", "label": "configuration", "unit": "", "digits": None}]
    for metric in shown:
        label, unit, digits = METRICS[metric]
        columns.append({"key": metric, "label": label, "unit": unit, "digits": digits})
        if metric in with_interval:
            columns.append({"key": f"{metric}_ci", "label": "±", "unit": unit, "digits": digits})

    rows = []
    for group in groups:
        row = [" ".join([group.name, *(f"({mark})" for mark in group.marks)])]
        for metric in shown:
            row.append(cell(group, metric))
            if metric in with_interval:
                row.append(group.ci_half_width(metric))
        rows.append(row)

    return {
        "name": f"{suite}_{kind}",
        "title": f"{suite}: {form.title}",
        "caption": form.caption,
        "columns": columns,
        "rows": rows,
    }


def cell(group: RunGroup, metric: str):
    """The mean of a metric, or a setting of the group; None if it has neither."""
    if metric in GROUP_SETTINGS:
        return getattr(group, metric)
    return group.mean(metric)


def print_table(content: dict):
    """Print a table as text, with each interval in the cell of its mean."""
    columns = content["columns"]
    header = [f"{c['label']} {c['unit']}".strip() for c in columns if c["label"] != "±"]
    lines = []
    for row in content["rows"]:
        line = []
        for column, value in zip(columns, row, strict=True):
            text = format_number(value, column["digits"])
            if column["label"] != "±":
                line.append(text)
            elif text:
                line[-1] += f" ± {text}"
        lines.append(line)
    print(f"\n{content['title']}")
    for part in narrow_tables(header, lines):
        print(part)
    print("\n".join(textwrap.wrap(content["caption"], WIDTH)))


def narrow_tables(header: list[str], lines: list[list[str]]) -> list[str]:
    """A table as text, in as many tables below each other as fit into WIDTH.

    Each begins with the first column, the name of the row.
    """
    widths = [max(len(cell) for cell in column) + 2 for column in zip(header, *lines, strict=True)]
    parts = [[0]]
    for i in range(1, len(header)):
        if sum(widths[j] for j in parts[-1]) + widths[i] - 2 > WIDTH and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(i)
    return [
        format_table([header[i] for i in part], [[line[i] for i in part] for line in lines])
        for part in parts
    ]


def write_table(content: dict, path: Path):
    """Write a table as CSV; the header has the metrics' keys and units."""
    header = []
    for column in content["columns"]:
        unit = f" ({column['unit']})" if column["unit"] else ""
        header.append(column["key"] + unit)

    # dtype=object keeps cells as they are: otherwise a column of whole numbers with an empty cell
    # would become one of floats.
    frame = pd.DataFrame(content["rows"], columns=header, dtype=object)
    with atomic_write(path, "w") as file:
        frame.to_csv(file, index=False, lineterminator="\n")


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


def draw_figures(
    groups: list[RunGroup], machines: list[Machine], folder: Path, style: str, warn: Warn
) -> list[dict]:
    """Draw all figures, write them as PNG and SVG, return their entries in analysis.json."""
    entries = []
    with figure_style(style):
        for suite, members in by_suite(groups).items():
            plots = plot_suite(suite, members)
            if suite == "ladder":
                plots.insert(0, plot_ladder(members))
            plots += plot_traces(suite, members, warn)
            for plot in plots:
                notes = figure_notes(members, machines, plot.has_whiskers)
                entries.append(save_plot(plot, suite, notes, folder))
    return entries


def plot_traces(suite: str, groups: list[RunGroup], warn: Warn) -> list[Plot]:
    """Draw the traces of single logs; of a suite, that of the run on the most cores."""
    traced = [group for group in groups if any(run.trace is not None for run in group.runs)]
    if suite != "files":
        traced = sorted(traced, key=lambda group: group.cores)[-1:]

    plots = []
    for group in traced:
        try:
            plots.append(plot_trace(group))
        except InputError as error:  # the other figures are drawn all the same
            warn(f"{error}: it is not drawn")
    if len(plots) > 1:
        for number, plot in enumerate(plots, 1):
            plot.name += f"_{number}"
    return plots


def show_confusions(
    paths: list[Path], runs: list[Run], machines, output_dir: Path, style: str
) -> list[dict]:
    """Print and write the confusion matrix of each log that has one; returns its figures."""
    entries = []
    for path, run in zip(dict.fromkeys(paths), runs, strict=True):
        confusion = find_confusion(path)
        if confusion is None:
            continue
        confusion = confusion._replace(name=run.name.replace("/", "_"))
        print(f"\n{describe_confusion(confusion)}")
        write_confusion(confusion, output_dir / "tables" / f"confusion_{confusion.name}.csv")
        with figure_style(style):
            notes = figure_notes(make_groups([run], machines), machines, False)
            figure = save_plot(plot_confusion(confusion), "files", notes, output_dir / "figures")
            entries.append(figure)
    return entries


def figure_notes(groups: list[RunGroup], machines: list[Machine], has_whiskers: bool) -> str:
    """The lines below a figure: machines, data, repeats, and what its reader must not overlook."""
    runs = [run for group in groups for run in group.runs]

    lines = []
    for number, machine in enumerate(machines, 1):
        own_runs = [run for run in runs if run.machine == machine]
        if own_runs:
            place = describe_machine(machine, own_runs)
            lines.append(place if len(machines) == 1 else f"[{number}] {place}")

    fewest = min(group.n for group in groups)
    most = max(group.n for group in groups)
    lines[-1] += f"; n = {fewest}" if fewest == most else f"; n = {fewest} to {most}"
    if has_whiskers and most > 1:
        lines[-1] += "; whiskers: 95 % intervals"

    oversubscribed = [group.label for group in groups if group.oversubscribed]
    if oversubscribed:
        names = "; ".join(oversubscribed)
        lines.append(f"OVERSUBSCRIBED (more ranks × threads than cores): {names}")

    short = [group for group in groups if group.short_of_cpu]
    if short:
        names = "; ".join(f"{group.label}: {lowest_cpu_share(group):.0%}" for group in short)
        lines.append(f"SHORT OF CPU (something else used the cores; share that they got): {names}")

    commits = {run.metadata.get("git_commit") for run in runs} - {None}
    if len(commits) > 1:
        names = ", ".join(sorted(short_commit(commit) for commit in commits))
        lines.append(f"{len(commits)} DIFFERENT COMMITS: {names}")

    wrapped = []
    for line in ";\n".join(lines).split("\n"):
        wrapped += textwrap.wrap(line, 125)
    return "\n".join(wrapped)


def lowest_cpu_share(group: RunGroup) -> float:
    return min(run.cpu_share for run in group.runs if run.short_of_cpu)


def describe_machine(machine: Machine, runs: list[Run]) -> str:
    if not machine.cpu:
        return "machine and data set unknown"
    sizes = sorted({run.metadata.get("train_images") or 0 for run in runs})
    sizes = "/".join(f"{size:,}" for size in sizes)
    known_names = {"synthetic": "SYNTHETIC DATA", "cifar10": "CIFAR-10"}
    data = known_names.get(machine.dataset, machine.dataset)
    return f"{machine.cpu}, {machine.cores} cores; {data}, {sizes} images"


def short_commit(commit: str) -> str:
    """The first digits of a commit, with the mark of changes that were not committed."""
    return commit[:8] + ("-dirty" if commit.endswith("-dirty") else "")


# --------------------------------------------------------------------------------------------------
# Metrics by name, for the report's text
# --------------------------------------------------------------------------------------------------


def collect_metrics(groups: list[RunGroup]) -> dict[str, dict]:
    """All estimates as {"suite.group.metric": numbers}, and the extremes and fits of each suite."""
    metrics = {}
    for group in groups:
        for metric, estimate in group.estimates.items():
            name = f"{group.suite}.{group.name}.{metric}"
            metrics[name] = describe_estimate(estimate, METRICS[metric].unit)

    for suite, members in by_suite(groups).items():
        trained = [group for group in members if group.trains]
        on_own_cores = [group for group in trained if not group.marks]
        for word, metric, candidates in (
            ("largest", "loss_difference", trained),
            ("largest", "accuracy_difference", trained),
            ("best", "speedup", on_own_cores),
            ("best", "images_per_s", on_own_cores),
        ):
            found = [g.estimates[metric] for g in candidates if metric in g.estimates]
            if found:
                highest = max(found, key=lambda estimate: estimate.value)
                name = f"{suite}.{word}_{metric}"
                metrics[name] = describe_estimate(highest, METRICS[metric].unit)

        for family, fit in fit_amdahl(members).items():
            metrics[f"{suite}.{family}.amdahl_serial_fraction"] = describe_estimate(fit, "%")
    return metrics


def describe_estimate(estimate: Estimate, unit: str) -> dict:
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": estimate.n,
        "unit": unit,
    }


# --------------------------------------------------------------------------------------------------
# Environments, caveats, and what could not be analysed
# --------------------------------------------------------------------------------------------------


def describe_environments(runs: list[Run], machines: list[Machine]) -> list[dict]:
    """Hardware, software and settings of each machine's runs."""
    environments = []
    for machine in machines:
        own_runs = [run.metadata for run in runs if run.machine == machine]
        environments.append(describe_environment(machine, own_runs))
    return environments


def describe_environment(machine: Machine, runs: list[dict]) -> dict:
    """What a machine is and what its runs ran with; values that differ are all listed.

    runs: the metadata of the machine's runs.
    """
    versions = {}
    settings = {label: [] for label in TRAINING_SETTINGS.values()}
    blas = []
    for metadata in runs:
        for package, version in (metadata.get("versions") or {}).items():
            versions.setdefault(package, []).append(version)
        for library in metadata.get("blas") or []:
            parts = [str(library.get(name)) for name in ("library", "version", "kernel")]
            blas.append(" ".join(parts))

        # A setting is an argument of the script or, if it came from the data, in the metadata.
        values = {**metadata, **(metadata.get("arguments") or {})}
        values.setdefault("global_batch_size", values.get("batch_size"))
        for name, label in TRAINING_SETTINGS.items():
            settings[label].append(values.get(name))

    versions = {package: side_by_side(found) for package, found in sorted(versions.items())}
    settings = {label: side_by_side(found) for label, found in settings.items()}
    gpus = [run.get("device") for run in runs if run.get("device") != "cpu"]
    memory_mb = max(run.get("memory_mb") or 0 for run in runs)
    return {
        "host": machine.host,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory_gib": round(memory_mb / 1024, 1) or None,
        "gpu": side_by_side(gpus) or None,
        "blas": side_by_side(blas) or None,
        "python": versions.pop("python", None),
        "versions": versions,
        "commit": side_by_side(run.get("git_commit") for run in runs) or None,
        "dataset": machine.dataset,
        "fingerprint": machine.fingerprint,
        "training": {label: text for label, text in settings.items() if text} or None,
        "runs": len(runs),
    }


def side_by_side(values) -> str:
    """The different values, without None: "2.3 / 2.4"; an empty text if there is none."""
    found = set(values) - {None}
    texts = sorted(value for value in found if isinstance(value, str))
    numbers = sorted(value for value in found if not isinstance(value, str))

    # Whole numbers get commas. Not isinstance(value, int): True and False are ints too.
    numbers = [f"{value:,}" if type(value) is int else str(value) for value in numbers]
    return " / ".join([*numbers, *texts])


def find_caveats(groups: list[RunGroup], environments: list[dict]) -> list[str]:
    """What a reader must know before believing the numbers."""
    caveats = []
    if any(environment["dataset"] == "synthetic" for environment in environments):
        caveats.append("synthetic data")

    oversubscribed = [group.name for group in groups if group.oversubscribed]
    if oversubscribed:
        caveats.append(f"oversubscribed: {', '.join(oversubscribed)}")

    short = [group.name for group in groups if group.short_of_cpu]
    if short:
        caveats.append(
            "short of CPU, since something else used the cores, so that their speeds and all that "
            f"is computed from them are too low: {', '.join(short)}"
        )

    if len(environments) > 1:
        caveats.append(
            f"{len(environments)} machines or data sets, told apart by [2] and so on, "
            "never compared"
        )

    for number, environment in enumerate(environments, 1):
        commits = environment["commit"] or ""
        if " / " in commits:
            commits = re.sub(r"\b([0-9a-f]{12})[0-9a-f]+", r"\1", commits)
            caveats.append(f"different commits on machine [{number}]: {commits}")
    return caveats


def find_not_analysed(groups: list[RunGroup], left_out: dict[str, str]) -> list[str]:
    """What no number or curve can be given for, by name, and why."""
    return [
        *find_missing_runs(groups, left_out),
        *find_missing_comparisons(groups),
        *find_missing_columns(groups),
    ]


def find_missing_runs(groups: list[RunGroup], left_out: dict[str, str]) -> list[str]:
    """Suites, configurations and repeats that did not run. left_out: {configuration: reason}."""
    lines = []
    suites = by_suite(groups)
    if "files" not in suites:
        lines += [f"suite {suite}: no run" for suite in SUITES if suite not in suites]

    names_by_reason = {}
    for name, reason in left_out.items():
        names_by_reason.setdefault(reason, []).append(name)
    lines += [f"{', '.join(names)}: {reason}" for reason, names in names_by_reason.items()]

    if not any("gpu_percent" in group.estimates for group in groups):
        lines.append("GPU: no run used one")

    single = [f"{group.suite}/{group.name}" for group in groups if group.n < 2]
    if single:
        all_of_several = 1 < len(single) == len(groups)
        names = "all configurations" if all_of_several else ", ".join(single)
        lines.append(f"95 % intervals of {names}: one run each")
    return lines


def find_missing_comparisons(groups: list[RunGroup]) -> list[str]:
    """Losses that diverged, speed-ups without a baseline, curves that would mislead."""
    lines = []
    for group in groups:
        curves = [group.curves(kind, "loss") for kind in (TRAIN, VALIDATE)]
        if not all(np.isfinite(curve).all() for curve in curves):
            name = f"{group.suite}/{group.name}"
            lines.append(f"losses of {name}: not all are numbers, the training diverged")

    parallel = [group for group in groups if group.suite == "parallel"]
    for group in parallel:
        if group.scaling and "speedup" not in group.estimates:
            lines.append(
                f"speed-up of parallel/{group.name}: there is no run on one core to compare it with"
            )

    drawn = {group.machine_number for group in on_main_machine(parallel)}
    others = {group.machine_number for group in parallel} - drawn
    if others:
        numbers = ", ".join(f"[{number}]" for number in sorted(others))
        lines.append(f"curves of scaling: those of {numbers} are not drawn")

    for family, fit in fit_amdahl(parallel).items():
        if not 0 <= fit.value <= 100:
            name = family.replace("mpi", "MPI")
            lines.append(
                f"curve of Amdahl's law for {name}: its serial fraction would be {fit.value:.0f} %"
            )
    return lines


def find_missing_columns(groups: list[RunGroup]) -> list[str]:
    """Metrics for which the logs or the metadata of the runs lack the numbers."""
    lines = []
    suites = by_suite(groups)

    loading = [group for group in suites.get("loading", []) if group.trains]
    if any("batch_loading_ms" not in group.estimates for group in loading):
        lines.append(
            "loading: waiting batch by batch: the logs do not have the rows of all batches"
        )
    if any("idle_forward" not in group.estimates for group in suites.get("split", [])):
        lines.append("split: idle shares: the run metadata does not have them")

    for suite, members in suites.items():
        trained = [group for group in members if group.trains]
        scripts = {group.script or group.name for group in trained}
        with_phases = {g.script or g.name for g in trained if "forward_ms" in g.estimates}
        for name in sorted(scripts - with_phases):
            lines.append(f"{suite}: where a step's time goes in {name}: its log has no phases")
    return lines


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def end_of_last_run(runs: list[Run]) -> str | None:
    """When the last run ended; not the present time, so that the same runs give the same file."""
    last = max(run.metadata.get("end") or 0 for run in runs)
    if not last:
        return None
    end = datetime.datetime.fromtimestamp(last, datetime.timezone.utc)
    return end.isoformat(timespec="seconds")


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    parser.add_argument(
        "logs",
        nargs="*",
        metavar="LOG",
        help="logs (CSV) of any runs, or two checkpoints (default: the runs in --results-dir)",
    )
    parser.add_argument(
        "--results-dir",
        metavar="FOLDER",
        default="results",
        help="results of run_experiments.py (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        metavar="FOLDER",
        help="default: analysis/ in --results-dir, for single logs analysis_of_logs/ there",
    )
    parser.add_argument(
        "--style",
        choices=STYLES,
        default="report",
        help="figures for a page, or 16:9 with large type and a message (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.output_dir is None:
        name = "analysis_of_logs" if args.logs else "analysis"
        args.output_dir = str(Path(args.results_dir) / name)
    return args


def print_failed(failed: list[dict]):
    """Print the last line that each failed run has printed."""
    for run in failed:
        lines = [line for line in run["output"] if line.strip()]
        last_line = lines[-1] if lines else ""
        print(f"{run['run']}: {run['status']}: {last_line}", file=sys.stderr)


def print_list(title: str, lines: list[str]):
    if lines:
        print(f"\n{title}:")
        for line in lines:
            print(f"- {line}")


def main(argv=None):
    args = parse_args(argv)
    paths = [Path(log) for log in args.logs]
    checkpoints = [path for path in paths if is_checkpoint(path)]
    if checkpoints:
        if len(paths) != 2 or len(checkpoints) != 2:
            raise InputError("give two checkpoints to compare, or the logs (.csv) of any runs")
        print(compare_checkpoints(*paths))
        return

    output_dir = Path(args.output_dir)
    warnings = []

    def warn(text):
        print(f"warning: {text}", file=sys.stderr)
        warnings.append(text)

    if args.logs:
        runs = read_logs(paths, warn)
        failed = []
        left_out = {}
    else:
        runs, failed, left_out = read_results(Path(args.results_dir), warn)

    print_failed(failed)
    if not runs:
        raise InputError(f"{args.results_dir} has no run that is done: run make experiments first")

    # Machines are numbered by their runs: names of run groups on the first one have no number.
    machines = [machine for machine, _ in Counter(run.machine for run in runs).most_common()]
    groups = make_groups(runs, machines)
    environments = describe_environments(runs, machines)

    figures = draw_figures(groups, machines, output_dir / "figures", args.style, warn)

    # make_report.py reads this file: the keys are an interface.
    analysis = {
        "created": end_of_last_run(runs),
        "results_dir": None if args.logs else args.results_dir,
        "runs": len(runs),
        "failed_runs": failed,
        "missing": [*warnings, *find_not_analysed(groups, left_out)],
        "marks": find_caveats(groups, environments),
        "environments": environments,
        "tables": make_tables(groups),
        "figures": figures,
        "facts": collect_metrics(groups),
    }

    if args.logs:
        analysis["figures"] += show_confusions(paths, runs, machines, output_dir, args.style)
    for content in analysis["tables"]:
        write_table(content, output_dir / "tables" / f"{content['name']}.csv")
        print_table(content)
    with atomic_write(output_dir / "analysis.json", "w") as file:
        json.dump(analysis, file, indent=1, ensure_ascii=False)
        file.write("\n")

    if args.logs and len(groups) > 1:
        print(compare_logs(groups))
        with atomic_write(output_dir / "tables" / "batch_losses.csv", "w") as file:
            batch_losses(groups).to_csv(file, lineterminator="\n")

    print_list("caveats", analysis["marks"])
    print_list("not analysed", analysis["missing"])
    print(f"\n{len(runs)} runs analysed, {len(failed)} failed; written: {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
