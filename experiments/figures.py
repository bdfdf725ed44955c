"""How figures look, and how they are written; plots.py and its siblings say what they show.

figure_style() sets one of two styles: "report" for a page of text, "slides" for a screen of 16:9,
on which the title is what the figure says. make_figure() and save_plot() are called within it.
"""

import contextlib
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import atomic_write

WIDTH = 7.0  # inches, of every figure of a report
SLIDE = (12.8, 7.2)  # inches

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
    "svg.fonttype": "none",  # text stays text, which can be searched and selected
    "svg.hashsalt": "analyze_results",  # names of elements that are the same in each run
}

SLIDE_STYLE = {
    **STYLE,
    "font.size": 15,
    "axes.titlesize": 16,
    "axes.labelsize": 15,
    "legend.fontsize": 13,
    "figure.titlesize": 22,
    "lines.linewidth": 2.5,
    "lines.markersize": 9,
    "errorbar.capsize": 4,
    "figure.figsize": SLIDE,
}
STYLES = {"report": STYLE, "slides": SLIDE_STYLE}


@dataclass
class Plot:
    """A figure that is drawn, and what is written about it."""

    figure: Figure
    name: str
    title: str
    caption: str
    message: str = ""  # what the figure says, in one sentence: the title of a slide
    legend_columns: int = 3
    has_whiskers: bool = False
    remark: str = ""  # a line in the picture itself, above the notes on machine and data


@contextlib.contextmanager
def figure_style(style: str = "report"):
    """Draw and save figures in a style of STYLES, whatever style the user has configured."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLES[style])
        yield


def is_slide() -> bool:
    return tuple(matplotlib.rcParams["figure.figsize"]) == SLIDE


def scaled(points: float) -> float:
    """A size of text or width of a line in a report's figure, as it is in the present style."""
    return points * matplotlib.rcParams["font.size"] / STYLE["font.size"]


def make_figure(height: float, rows: int = 1, columns: int = 1, **options):
    """Make a figure of that height in inches; returns it and its axes, an array (rows, columns).

    A slide has a size of its own, whatever is on it.
    """
    size = SLIDE if is_slide() else (WIDTH, height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def save_plot(plot: Plot, suite: str, notes: str, folder: Path) -> dict:
    """Add legend and notes, write the figure as PNG and SVG, return its entry in analysis.json."""
    figure = plot.figure

    add_legend(figure, plot.legend_columns, (plot.message or plot.title) if is_slide() else None)

    # The notes are in the picture, so that they go with it wherever it is copied to.
    lines = [plot.remark, notes] if plot.remark else [notes]
    figure.supxlabel(plain_text("\n".join(lines)), fontsize=scaled(6.5), color="0.25")

    # Compute the layout once: savefig() would do it for each file, and it takes most of the time.
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")

    name = f"{suite}_{plot.name}"
    with atomic_write(folder / f"{name}.png") as file:
        figure.savefig(file, format="png")
    with atomic_write(folder / f"{name}.svg") as file:
        figure.savefig(file, format="svg", metadata={"Date": None})

    caption = f"{plot.caption} {' '.join(notes.split())}."
    alternative_text = f"{plot.title}: {caption}"
    return {"name": name, "title": plot.title, "caption": caption, "alt": alternative_text}


def add_legend(figure: Figure, columns: int, headline: str | None):
    """One legend above all panels; what several panels show is named once. Above it the headline.

    The headline is the legend's title, as the layout would place two texts in the same room.
    """
    if headline:
        headline = plain_text(textwrap.fill(headline[:1].upper() + headline[1:], 62))
    font = {"size": matplotlib.rcParams["figure.titlesize"], "weight": "bold"}

    handles = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper center",
            ncols=min(columns, len(handles)),
            title=headline,
            title_fontproperties=font,
        )
    elif headline:
        figure.suptitle(headline, **font)


def plain_text(name: str) -> str:
    """A name of the user's as matplotlib shows it unchanged.

    Text between two "$" would be a formula, and a label that begins with "_" is in no legend.
    """
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
