"""The figures of analyze_results.py: what they show. How they look and are written: figures.py.

plot_suite() draws all figures of a suite. Each of the functions that it calls draws one figure from
run groups (see metrics.py) and returns it as a Plot, or None if the runs have nothing of what it
shows. All figures can be read in grey: lines differ by style and marker, bars by hatch.
"""

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import BATCH, TRAIN, VALIDATE
from figures import Plot, is_slide, make_figure, plain_text, scaled
from metrics import (
    METRICS,
    PHASES,
    RunGroup,
    ci_half_widths,
    fit_amdahl,
    format_number,
    loading_groups,
    means,
    on_main_machine,
    plural,
    same_computation,
)

# After Okabe and Ito: colours that most colour-blind readers can tell apart
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#7f7f7f")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = "osD^v<>Pp*Xh"

# Fillings of bars, from dark to light, with hatches that tell them apart in grey too
SHADES = ("#1f2933", "#6b8fb5", "#b9d3ea", "#f2c48d", "#ffffff")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx")
BAR = {"edgecolor": "0.2", "linewidth": 0.6, "error_kw": {"elinewidth": 0.8}}

# Labels that are shorter than in METRICS, where the axis already says the rest
BAR_LABELS = {"idle_forward": "forward", "idle_backward": "backward"}


def plot_suite(suite: str, groups: list[RunGroup]) -> list[Plot]:
    """Draw the figures of a suite."""
    plots = []
    if suite == "parallel":
        plots.append(plot_scaling(groups, "speedup"))
        plots.append(plot_scaling(groups, "efficiency"))
    if suite in ("parallel", "files"):
        plots.append(plot_throughput(groups, suite))
    if suite == "hardware":
        plots.append(plot_resources(groups))
    if suite == "split":
        plots.append(plot_split_modes(groups))
    if suite == "loading":
        plots.append(plot_loading(groups))
    if suite in ("loading", "files"):
        plots.append(plot_batches(groups))
    plots.append(plot_step(groups, suite))
    plots.append(plot_curves(groups, suite))
    return [plot for plot in plots if plot is not None]


# --------------------------------------------------------------------------------------------------
# Scaling over cores
# --------------------------------------------------------------------------------------------------


def plot_scaling(groups: list[RunGroup], metric: str) -> Plot | None:
    """Strong and weak scaling with the ideal line. metric: "speedup" or "efficiency".

    Beside the speed-up there is the curve of Amdahl's law that fits it, beside the efficiency a
    panel with the serial fractions of Karp and Flatt.
    """
    groups = on_main_machine(groups)
    lines = {"strong": scaling_lines(groups, "strong"), "weak": scaling_lines(groups, "weak")}
    labels = sorted({*lines["strong"], *lines["weak"]})
    if not labels:
        return None

    panels = [("strong", metric), ("weak", metric)]
    if metric == "efficiency":
        panels.append(("strong", "serial_fraction"))

    most_cores = max(group.cores for group in groups)
    figure, axes = make_figure(2.9, 1, len(panels))
    for ax, (scaling, shown) in zip(axes[0], panels, strict=True):
        plot_ideal(ax, shown, most_cores)
        for label, line in lines[scaling].items():
            # Lines are moved a little to the side, so that their whiskers do not overlap.
            number = labels.index(label)
            shift = 0.012 * most_cores * (number - (len(labels) - 1) / 2)
            plot_line(ax, line, shown, label, number, shift)
        if scaling == "strong" and shown == "speedup":
            plot_amdahl(ax, groups, most_cores)
        label_scaling_axes(ax, groups, scaling, shown)

    word = {"speedup": "Speed-up", "efficiency": "Efficiency"}[metric]
    return Plot(
        figure,
        metric,
        title=f"{word}, strong and weak scaling",
        message=describe_scaling(lines["strong"], metric),
        caption=f"{word} against the same work on one core: serial_cnn.py for MPI, one rank of one "
        "thread for hybrid. Hollow: oversubscribed. Whiskers that leave the picture are cut.",
        legend_columns=4,
        has_whiskers=True,
    )


def describe_scaling(lines: dict[str, list[RunGroup]], metric: str) -> str:
    """The best strong speed-up, or the efficiency there, in one sentence; "" if there is none."""
    measured = [
        (group.mean("speedup"), label, group)
        for label, line in lines.items()
        for group in line
        if group.cores > 1 and not group.marks
    ]
    if not measured:
        return ""
    speedup, label, group = max(measured, key=lambda found: found[0])
    if metric == "speedup":
        return f"{label} is {speedup:.2f} times as fast on {group.cores} cores as on one"
    return f"{label} makes use of {group.mean('efficiency'):.0f} % of {group.cores} cores"


def scaling_lines(groups: list[RunGroup], scaling: str) -> dict[str, list[RunGroup]]:
    """{label: run groups by cores} of strong or weak scaling, one line for MPI and each hybrid."""
    lines = {}
    for group in groups:
        if group.scaling == scaling and group.cores > 1 and "speedup" in group.estimates:
            is_mpi = group.base_name.startswith("mpi")
            label = "MPI" if is_mpi else f"hybrid, {plural(group.ranks, 'rank')}"
            lines.setdefault(label, []).append(group)

    # A line begins at the run on one core that its speed-ups are divided by.
    on_one_core = {group.base_name: group for group in groups}
    for label, base_name in (("MPI", "serial"), ("hybrid, 1 rank", "hybrid-1x1-strong")):
        if label in lines and base_name in on_one_core:
            lines[label].append(on_one_core[base_name])

    return {label: sorted(line, key=lambda group: group.cores) for label, line in lines.items()}


def plot_ideal(ax: Axes, metric: str, most_cores: int):
    """Plot the speed-up p, or the efficiency of 100 %, of p cores without any loss."""
    cores = np.linspace(1, most_cores, 50)
    if metric == "speedup":
        ax.plot(cores, cores, color="0.6", lw=1, label="ideal")
    elif metric == "efficiency":
        ax.plot(cores, np.full(50, 100), color="0.6", lw=1, label="ideal")


def plot_line(ax: Axes, line: list[RunGroup], metric: str, label: str, number: int, shift: float):
    """Plot a line of groups over cores with whiskers; markers of oversubscribed groups are hollow.

    number: of the line, which decides its style. shift: along the axis, in cores.
    """
    line = [group for group in line if metric in group.estimates]
    x = np.array([group.cores + shift if group.cores > 1 else group.cores for group in line])
    y = means(line, metric)
    half_widths = ci_half_widths(line, metric)

    color = COLORS[1:][number % 7]  # not black
    style = {"marker": MARKERS[number % len(MARKERS)], "color": color}
    line_style = LINES[number % len(LINES)]
    ax.errorbar(x, y, half_widths, ls=line_style, elinewidth=0.8, label=label, **style)

    # White markers on top of the coloured ones
    hollow = [group.oversubscribed for group in line]
    ax.plot(x[hollow], y[hollow], ls="", mfc="white", zorder=5, **style)


def plot_amdahl(ax: Axes, groups: list[RunGroup], most_cores: int):
    """Plot Amdahl's law for the fitted serial fractions that are possible ones."""
    p = np.linspace(1, most_cores, 50)
    for (family, fit), line_style in zip(fit_amdahl(groups).items(), LINES[1:], strict=False):
        s = fit.value / 100
        if 0 <= s <= 1:
            name = family.replace("mpi", "MPI")
            label = f"Amdahl, {name}: s = {fit.value:.1f} %"
            ax.plot(p, 1 / (s + (1 - s) / p), ls=line_style, color="0.45", lw=1, label=label)


def label_scaling_axes(ax: Axes, groups: list[RunGroup], scaling: str, metric: str):
    """Set title, labels and limits; the limits go by the means, as a whisker can be very long."""
    titles = {"serial_fraction": "Karp–Flatt"}
    labels = {
        "speedup": "speed-up",
        "efficiency": "efficiency (%)",
        "serial_fraction": "serial fraction (%)",
    }
    most_cores = max(group.cores for group in groups)
    ideal = most_cores if metric == "speedup" else 100
    values = [group.mean(metric) or 0 for group in groups]
    ax.set(
        title=titles.get(metric, f"{scaling} scaling"),
        xlabel="cores (ranks × threads)",
        ylabel=labels[metric],
        xticks=sorted({group.cores for group in groups}),
        xlim=(1 - 0.05 * most_cores, 1.05 * most_cores),
        ylim=(1.3 * min(0, *values), 1.3 * max(ideal, *values)),
    )


# --------------------------------------------------------------------------------------------------
# Bars
# --------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    label: str  # of the horizontal axis
    metrics: list[str]
    may_be_logarithmic: bool = False


def plot_throughput(groups: list[RunGroup], suite: str) -> Plot | None:
    caption = "Images per second."
    marks = sorted({mark for group in groups for mark in group.marks})
    if marks:
        caption += f" *: {' or '.join(marks)}."
    panels = [Panel("throughput (images/s)", ["images_per_s"])]
    title = f"Throughput, {suite}"
    return plot_bars(groups, panels, "throughput", title, caption, describe_fastest(groups))


def describe_fastest(groups: list[RunGroup]) -> str:
    """The group with the most images/s, in one sentence; "" if all speeds are marked."""
    fair = [group for group in groups if not group.marks]
    if not fair:
        return ""
    fastest = max(fair, key=lambda group: group.mean("images_per_s"))
    return f"Fastest: {fastest.label}, {fastest.mean('images_per_s'):,.0f} images/s"


def plot_resources(groups: list[RunGroup]) -> Plot | None:
    panels = [
        Panel("throughput (images/s)", ["images_per_s"], may_be_logarithmic=True),
        Panel("test accuracy (%)", ["test_accuracy"]),
        Panel("peak RAM (MiB)", ["ram_mb"], may_be_logarithmic=True),
        Panel("CPU use (% of a core)", ["cpu_percent"]),
        Panel("GPU use (%)", ["gpu_percent"]),
        Panel("peak GPU memory (MiB)", ["gpu_mem_mb"]),
    ]
    caption = (
        "Memory: peaks, use: means over the run, of rank 0 and its children; 100 % CPU is one core."
    )
    title = "Throughput and use of resources"
    return plot_bars(groups, panels, "use", title, caption, describe_fastest(groups))


def plot_split_modes(groups: list[RunGroup]) -> Plot | None:
    panels = [
        Panel("against all (×)", ["speedup_over_all"]),
        Panel("a step (ms)", ["forward_ms", "backward_ms"]),
        Panel("idle (%)", ["idle_forward", "idle_backward"]),
    ]
    caption = (
        "Speed against mode all; milliseconds of a step; "
        "share of the time in which a group's cores computed nothing."
    )
    others = [group for group in groups if "speedup_over_all" in group.estimates]
    others = [group for group in others if group.base_name not in ("all", "replicas")]
    message = ""
    if others:
        best = max(others, key=lambda group: group.mean("speedup_over_all"))
        ratio = best.mean("speedup_over_all")
        message = f"Separate cores ({best.label}): {ratio:.2f} × the speed of all cores together"
    title = "Forward and backward pass on separate cores"
    return plot_bars(groups, panels, "modes", title, caption, message, columns=3)


def plot_loading(groups: list[RunGroup]) -> Plot | None:
    panels = [
        Panel("an epoch (s)", ["epoch_seconds", "epoch_loading"], may_be_logarithmic=True),
        Panel("loading alone (images/s)", ["alone_images_per_s"], may_be_logarithmic=True),
    ]
    caption = (
        "Seconds of an epoch (record type 0) and of them waiting for data; "
        "the same loading without training."
    )
    training = [group for group in groups if group.trains and group.mean("epoch_seconds")]
    message = ""
    if training:
        shares = [g.mean("epoch_loading") / g.mean("epoch_seconds") for g in training]
        message = (
            f"Training waits for data between {min(shares):.1%} and {max(shares):.1%} of its time"
        )
    title = "Loading against total"
    return plot_bars(loading_groups(groups), panels, "epoch", title, caption, message)


def plot_bars(
    groups: list[RunGroup],
    panels: list[Panel],
    name: str,
    title: str,
    caption: str,
    message: str = "",
    columns: int = 2,
) -> Plot | None:
    """Panels of horizontal bars, a row for each run group; without metrics that no group has.

    A slide has one row of panels, the first ones.
    """
    shown = []
    for panel in panels:
        metrics = [m for m in panel.metrics if any(m in group.estimates for group in groups)]
        if metrics:
            shown.append(panel._replace(metrics=metrics))
    if not shown:
        return None

    columns = min(columns, len(shown))
    if is_slide():
        shown = shown[:columns]
    rows = math.ceil(len(shown) / columns)

    # The height in inches: each row of bars needs some, and each row of panels its axis.
    bars_a_row = max(len(panel.metrics) for panel in shown)
    panel_height = 0.45 + (0.1 + 0.12 * bars_a_row) * len(groups)
    figure, axes = make_figure(0.6 + rows * panel_height, rows, columns, sharey=True)

    for ax, panel in zip(axes.flat, shown, strict=False):
        plot_panel(ax, groups, panel, tick_bins=8 // columns + 1)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    label_rows(axes[0][0], groups)
    return Plot(figure, name, title, caption, message, has_whiskers=True)


def plot_panel(ax: Axes, groups: list[RunGroup], panel: Panel, tick_bins: int):
    """Plot a panel's metrics; its axis is logarithmic if values differ by more than 100 times."""
    metrics = panel.metrics
    values = [group.mean(m) for m in metrics for group in groups if m in group.estimates]
    lowest = min(values)
    is_log = panel.may_be_logarithmic and 0 < 100 * lowest < max(values)

    for place, metric in enumerate(metrics):
        plot_metric(ax, groups, metric, place, len(metrics), is_log)

    # The axis ends well behind the longest bar, where the number is written.
    end = max(longest_whisker(groups, metric, is_log) for metric in metrics)
    if is_log:
        ax.set(xscale="log", xlim=(lowest / 3, end * (end / lowest) ** 0.25 * 2))
    else:
        ax.set_xlim(0, 1.35 * end or 1)
        ax.locator_params(axis="x", nbins=tick_bins)
    ax.set_xlabel(f"{panel.label}, logarithmic" if is_log else panel.label)
    ax.grid(visible=False, axis="y")


def plot_metric(
    ax: Axes, groups: list[RunGroup], metric: str, place: int, places: int, is_log: bool
):
    """Plot a metric as bar number `place` of the `places` bars of each row, with its whisker.

    A logarithmic axis has no zero where a bar could begin: there it is a dot.
    """
    rows = [row for row, group in enumerate(groups) if metric in group.estimates]
    present = [groups[row] for row in rows]
    values = means(present, metric)
    half_widths = ci_half_widths(present, metric)

    # Row i has its bars between i − 0.39 and i + 0.39.
    height = 0.78 / places
    positions = np.array(rows) + height * (place - (places - 1) / 2)
    style = {"color": SHADES[place + 1]}
    if half_widths.any():
        style["xerr"] = half_widths
    if places > 1:
        style["label"] = BAR_LABELS.get(metric, METRICS[metric].label)

    if is_log:
        ax.errorbar(values, positions, fmt="os^"[place], ecolor="0.1", elinewidth=0.8, **style)
    else:
        hatch = HATCHES[place + 1] if places > 1 else ""
        ax.barh(positions, values, height, hatch=hatch, **BAR, **style)
    write_numbers(ax, present, metric, positions, whisker_limit(present, metric, is_log))


def whisker_limit(groups: list[RunGroup], metric: str, is_log: bool) -> float:
    """Where whiskers are cut: a very long one would leave no room for the bars themselves."""
    limit = (4 if is_log else 2) * means(groups, metric).max()
    return min(limit, 100) if METRICS[metric].unit == "%" else limit


def longest_whisker(groups: list[RunGroup], metric: str, is_log: bool) -> float:
    """Where the longest whisker ends, or is cut."""
    present = [group for group in groups if metric in group.estimates]
    ends = means(present, metric) + ci_half_widths(present, metric)
    return min(ends.max(), whisker_limit(present, metric, is_log))


def write_numbers(
    ax: Axes, groups: list[RunGroup], metric: str, positions: np.ndarray, limit: float
):
    """Write each mean behind its whisker; behind a whisker that is cut, its interval too."""
    digits = METRICS[metric].digits
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    values = zip(positions, means(groups, metric), ci_half_widths(groups, metric), strict=True)
    for position, mean, half_width in values:
        text = format_number(mean, digits)
        end = mean + half_width
        if end > limit:
            text += f" ± {format_number(half_width, digits)}"
            end = mean
        write_right_of(ax, end, position, text, bbox=background)


def write_right_of(ax: Axes, x: float, y: float, text: str, **style):
    """Write text four points to the right of (x, y)."""
    offset = {"xytext": (4, 0), "textcoords": "offset points"}
    ax.annotate(text, (x, y), va="center", fontsize=scaled(6), **offset, **style)


def label_rows(ax: Axes, groups: list[RunGroup]):
    names = [plain_text(group.label) + (" *" if group.marks else "") for group in groups]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)  # the first row on top


def plot_step(groups: list[RunGroup], suite: str) -> Plot | None:
    """Where a step's time goes, in ms and in shares; overlapping phases cannot be shown so."""
    groups = [group for group in groups if "update_share" in group.estimates]
    if not groups:
        return None

    figure, axes = make_figure(1.2 + 0.24 * len(groups), 1, 2, sharey=True)
    for ax, unit in zip(axes[0], ("ms", "share"), strict=True):
        plot_phases(ax, groups, unit)
    longest = max(group.mean("step_ms") for group in groups)
    for row, group in enumerate(groups):
        step_ms = group.mean("step_ms")
        write_right_of(axes[0][0], step_ms, row, format_number(step_ms, 2))

    axes[0][0].set(xlabel="a step (ms)", xlim=(0, 1.2 * longest))
    axes[0][1].set(xlabel="share of a step (%)", xlim=(0, 100), xticks=range(0, 101, 20))
    label_rows(axes[0][0], groups)

    quickest = min(groups, key=lambda group: group.mean("step_ms"))
    phase = max(PHASES, key=lambda phase: quickest.mean(f"{phase}_share") or 0)
    name = METRICS[f"{phase}_share"].label.removesuffix(" share")
    share = quickest.mean(f"{phase}_share")
    part = f"the {name} pass" if phase in ("forward", "backward") else name
    return Plot(
        figure,
        "step",
        title=f"Where a step's time goes, {suite}",
        caption="A training step of rank 0 in milliseconds, and the shares of its phases. "
        "Communication includes waiting for other ranks.",
        message=f"{quickest.label}: {share:.0f} % of a step is {part}",
        legend_columns=5,
    )


def plot_phases(ax: Axes, groups: list[RunGroup], unit: str):
    """A bar for each group, made of its phases one after another. unit: "ms" or "share"."""
    left = np.zeros(len(groups))  # where the next phase's bars begin
    for phase, shade, hatch in zip(PHASES, SHADES, HATCHES, strict=True):
        values = np.array([group.mean(f"{phase}_{unit}") or 0 for group in groups])
        if values.any():
            label = METRICS[f"{phase}_share"].label.removesuffix(" share")
            rows = range(len(groups))
            ax.barh(rows, values, 0.7, left, color=shade, hatch=hatch, label=label, **BAR)
        left += values
    ax.grid(visible=False, axis="y")


# --------------------------------------------------------------------------------------------------
# Curves over epochs and batches
# --------------------------------------------------------------------------------------------------


def plot_curves(groups: list[RunGroup], suite: str) -> Plot | None:
    """Loss and accuracy over the epochs, one colour for all groups with the same computation.

    The first line of a colour is a broad band: those that agree with it lie upon it.
    """
    computations = same_computation([g for g in groups if g.curves(VALIDATE, "loss").size])
    if not computations:
        return None
    groups = [group for members in computations for group in members]

    figure, axes = make_figure(2.8 + 0.14 * math.ceil(len(groups) / 3), 1, 2)
    panels = ((TRAIN, "loss", 1, "training loss"), (VALIDATE, "value1", 100, "test accuracy (%)"))
    epochs = max(group.curves(TRAIN, "loss").shape[1] for group in groups)
    for ax, (kind, column, factor, label) in zip(axes[0], panels, strict=True):
        for number, members in enumerate(computations):
            for place, group in enumerate(members):
                curve = factor * group.curves(kind, column).mean(axis=0)
                plot_curve(ax, curve, plain_text(group.label), number, place)
        ax.set(xlabel="epoch", ylabel=label)
        ax.set_xticks(range(1, epochs + 1, max(math.ceil(epochs / 8), 1)))

    remark = describe_differences(groups)
    title = f"Loss and accuracy, {suite}"
    message = describe_agreement(groups)
    return Plot(figure, "curves", title, caption=remark, message=message, remark=remark)


def plot_curve(ax: Axes, curve: np.ndarray, label: str, number: int, place: int):
    """Plot the epochs of run group number `place` of computation number `number`."""
    style = {"lw": scaled(1.1), "ls": LINES[place % len(LINES)]}
    if place == 0:
        style = {"lw": scaled(4), "alpha": 0.35, "ls": "-"}

    # About eight markers a line; lines of one colour have them at different epochs, as they may
    # lie exactly upon each other.
    every = max(len(curve) // 8, 1)
    ax.plot(
        range(1, len(curve) + 1),
        curve,
        color=COLORS[number % len(COLORS)],
        marker=MARKERS[place % len(MARKERS)],
        mfc="none",
        markevery=(place % every, every),
        ms=scaled(4 + place % 4),
        label=label,
        **style,
    )


def describe_agreement(groups: list[RunGroup]) -> str:
    """That trainings are the same computation, in one sentence; "" if no two are."""
    differences = [group.mean("loss_difference") for group in groups]
    differences = [difference for difference in differences if difference is not None]
    if not differences:
        return ""
    largest = max(differences)
    how_far = f"differ by {largest:.1g} at most" if largest else "are equal, digit by digit"
    return f"The same computation: losses {how_far}"


def describe_differences(groups: list[RunGroup]) -> str:
    """How far trainings that are the same computation are apart; "" for one alone."""
    if len(groups) == 1:
        return ""
    compared = [group for group in groups if "loss_difference" in group.estimates]
    if not compared:
        return "No two compute the same."
    worst = max(compared, key=lambda group: group.mean("loss_difference"))
    loss = worst.mean("loss_difference")
    points = max(group.mean("accuracy_difference") or 0 for group in compared)
    where = f" ({worst.label})" if loss else ""
    return (
        "Lines of one colour compute the same. Largest difference: training or test loss "
        f"{loss:.2g}{where}, accuracy {points:.2g} points."
    )


def plot_batches(groups: list[RunGroup]) -> Plot | None:
    """Total and waiting time over the batches of one epoch, a panel for each source of images."""
    sources = {}
    for group in groups:
        if group.trains and "batch_loading_ms" in group.estimates:
            # Its label is, for instance, "S3 shards, 2 workers".
            source = re.sub(r", \d+ workers?.*", "", group.label)
            sources.setdefault(source, []).append(group)
    if not sources:
        return None

    rows = math.ceil(len(sources) / 2)
    columns = min(2, len(sources))
    figure, axes = make_figure(0.9 + 1.6 * rows, rows, columns, sharey=True)
    for ax, (source, members) in zip(axes.flat, sources.items(), strict=False):
        for number, group in enumerate(members):
            plot_batch_times(ax, group, number)
        ax.set(title=plain_text(source), yscale="log", xlabel="batch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("seconds since\nthe epoch began")
    for ax in axes.flat[len(sources) :]:
        ax.set_visible(False)

    return Plot(
        figure,
        "batches",
        title="Loading against total, batch by batch",
        caption="First epoch of the first repeat (record type 2): seconds since the epoch began, "
        "and of them waiting for data.",
        legend_columns=max(2, *(len(members) for members in sources.values())),
    )


def plot_batch_times(ax: Axes, group: RunGroup, number: int):
    """Two lines of the same colour and marker: all seconds of an epoch so far, and those waited."""
    batches = group.runs[0].rows(BATCH)
    batches = batches[batches["epoch"] == batches["epoch"].iloc[0]]
    workers = f", {plural(group.workers, 'worker')}" if "-workers" in group.name else ""
    for column, line_style, word in (("duration", "-", "total"), ("loading", ":", "waiting")):
        ax.plot(
            batches["value1"],
            batches[column].clip(lower=1e-6),  # a logarithmic axis has no zero
            line_style,
            label=word + workers,
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            mfc="none",
            markevery=max(len(batches) // 8, 1),
        )
