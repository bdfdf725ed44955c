"""The figure of suite ladder: what each idea bought, from the plainest version to the fastest."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from figures import Plot, make_figure, scaled
from metrics import RunGroup
from plots import SHADES

TITLES = {
    "serial": "serial_cnn.py --conv, the CNN on one core",
    "mpi": "parallel_cnn_mpi.py --reduce, the CNN on two ranks",
    "pytorch": "train_cifar.py, ResNet-18 on all cores",
    "gpu": "gpu_scratch.py, the CNN on a GPU",
}
BASELINE = "serial-pytorch"  # PyTorch's best eager training of the CNN on one core


def split_ladders(groups: list[RunGroup]) -> dict[str, list[tuple[str, RunGroup]]]:
    """{ladder: [(rung, run group)]}, from the plainest rung up, by names such as serial-1-loops."""
    ladders = {}
    for group in groups:
        found = re.fullmatch(r"(\w+)-(\d+)-(.+)", group.base_name)
        if found and group.machine_number == 1:
            ladder, number, rung = found.groups()
            ladders.setdefault(ladder, []).append((int(number), rung, group))
    return {
        ladder: [(rung, group) for _, rung, group in sorted(rungs, key=lambda rung: rung[0])]
        for ladder, rungs in ladders.items()
    }


def plot_ladder(groups: list[RunGroup]) -> Plot | None:
    """Images/s by rung on a logarithmic axis, with the factor over the rung below and the first."""
    ladders = split_ladders(groups)
    if not ladders:
        return None

    heights = [len(rungs) for rungs in ladders.values()]
    figure, axes = make_figure(
        0.7 + 0.27 * sum(heights) + 0.35 * len(heights),
        len(heights),
        gridspec_kw={"height_ratios": heights},
    )
    for ax, (ladder, rungs) in zip(axes[:, 0], ladders.items(), strict=True):
        draw_rungs(ax, rungs)
        ax.set_title(TITLES.get(ladder, ladder), loc="left")
        if ladder == "serial":
            draw_baseline(ax, groups)
    axes[-1, 0].set_xlabel("training, images/s (logarithmic)")

    return Plot(
        figure,
        "rungs",
        title="What each idea bought",
        caption="Training images/s of each rung; × the factor over the rung below, and over the "
        "first rung of the ladder. All rungs of a ladder from scratch compute the same.",
        message=describe_climb(ladders),
        has_whiskers=True,
    )


def describe_climb(ladders: dict[str, list[tuple[str, RunGroup]]]) -> str:
    """What the first of the ladders gained in all, in one sentence."""
    rungs = next(iter(ladders.values()))
    bottom, slowest = rungs[0]
    top, fastest = rungs[-1]
    factor = fastest.mean("images_per_s") / slowest.mean("images_per_s")
    return f"From {bottom} to {top}: {factor:.1f} times as fast, one idea a rung"


def draw_rungs(ax: Axes, rungs: list[tuple[str, RunGroup]]):
    """A bar for each rung, the plainest on top, with its speed and its factors."""
    speeds = [group.mean("images_per_s") for _, group in rungs]
    half_widths = [group.ci_half_width("images_per_s") or 0 for _, group in rungs]
    places = range(len(rungs))
    ax.barh(places, speeds, xerr=half_widths, color=SHADES[1], height=0.7, error_kw={"lw": 0.8})
    for place, speed in enumerate(speeds):
        text = f"  {speed:,.0f}"
        if place > 0:
            text += f"   ×{speed / speeds[place - 1]:.2f}"
        if place > 1:
            text += f"   (×{speed / speeds[0]:.3g} in all)"
        ax.text(speed + half_widths[place], place, text, va="center", fontsize=scaled(7))
    ax.set(xscale="log", ylim=(len(rungs) - 0.4, -0.6))
    # Room for the numbers at the right of the longest bar
    ax.set_xlim(min(speeds) / 2, max(speeds) * (max(speeds) / min(speeds)) ** 0.45 * 3)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:,.0f}")  # 2,000 instead of 2 × 10³
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(places, [rung for rung, _ in rungs])
    ax.grid(visible=False, axis="y")


def draw_baseline(ax: Axes, groups: list[RunGroup]):
    """A line at the speed of PyTorch's best eager training of the same network."""
    for group in groups:
        if group.name == BASELINE:
            speed = group.mean("images_per_s")
            ax.axvline(speed, color="0.2", linestyle="--", linewidth=1)
            label = f"  PyTorch, one thread: {speed:,.0f}"
            ax.text(speed, 0, label, fontsize=scaled(7), va="center")  # beside the shortest bar
