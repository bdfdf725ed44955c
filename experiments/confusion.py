"""The confusion matrix of a run: which classes its network takes for which others.

A training writes it into the metrics (--save-metrics, the arrays `confusion` and `classes`);
analyze_results.py shows it for each log that it is given, as a table, a CSV and a figure.
"""

import json
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import atomic_write, format_table
from figures import Plot, make_figure

MOST_IN_TABLE = 12  # classes of which the whole matrix is printed
MOST_WITH_NUMBERS = 20  # classes whose counts fit into the figure
PAIRS = 10  # of the most frequent confusions


class Confusion(NamedTuple):
    """How many test images of class i were taken for class j, at counts[i, j]."""

    name: str  # of the run
    classes: list
    counts: np.ndarray


def find_confusion(log: Path) -> Confusion | None:
    """The matrix in the metrics of the run with this log; None if there is none that is its own.

    The metrics lie where the run's metadata says, or beside the log.
    """
    try:
        metadata = json.loads(log.with_suffix(".json").read_text())
        written = metadata["arguments"]["save_metrics"] or ""
        accuracy = metadata["totals"]["final_accuracy"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    beside = log.with_name(Path(written).name)
    for path in (beside, log.with_suffix(".npz"), Path(written)):
        try:
            with np.load(path, allow_pickle=False) as file:
                counts = file["confusion"]
                classes = file["classes"].tolist()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            continue
        # Another run may have overwritten the file: its accuracy would be another one.
        if counts.sum() and abs(counts.trace() / counts.sum() - accuracy) < 1e-9:
            return Confusion(log.stem, classes, counts)
    return None


def write_confusion(confusion: Confusion, path: Path):
    """Write the matrix as CSV: a row for each class, a column for each class it was taken for."""
    with atomic_write(path, "w") as file:
        names = [f'"{name}"' if "," in name else name for name in confusion.classes]
        file.write(",".join(["label \\ predicted", *names]) + "\n")
        for name, row in zip(names, confusion.counts.tolist(), strict=True):
            file.write(",".join([name, *map(str, row)]) + "\n")


def describe_confusion(confusion: Confusion) -> str:
    """The matrix as a table; of many classes, the most frequent confusions."""
    title = f"confusion matrix of {confusion.name}: rows are labels, columns predictions"
    if len(confusion.classes) <= MOST_IN_TABLE:
        rows = []
        for name, row in zip(confusion.classes, confusion.counts, strict=True):
            found = row[len(rows)] / max(row.sum(), 1)
            rows.append([name, *map(str, row.tolist()), f"{found:.1%}"])
        return f"{title}\n{format_table(('label', *confusion.classes, 'found'), rows)}"

    wrong = confusion.counts * (1 - np.eye(len(confusion.classes), dtype=int))
    rows = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]:
        label, predicted = divmod(int(place), len(confusion.classes))
        if wrong[label, predicted]:
            names = (confusion.classes[label], confusion.classes[predicted])
            images = confusion.counts[label].sum()
            rows.append([*names, f"{wrong[label, predicted]} of {images}"])
    title = f"most frequent confusions of {confusion.name}"
    return f"{title}\n{format_table(('label', 'taken for', 'images'), rows)}"


def plot_confusion(confusion: Confusion) -> Plot:
    """The matrix as shares of each label's images, dark where they are large."""
    k = len(confusion.classes)
    shares = 100 * confusion.counts / np.maximum(confusion.counts.sum(axis=1, keepdims=True), 1)
    figure, axes = make_figure(min(2.5 + 0.25 * k, 7.0))
    ax = axes[0, 0]
    ax.grid(False)
    image = ax.imshow(shares, cmap="Greys", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=ax, label="% of the label's test images")
    ax.set_xlabel("predicted")
    ax.set_ylabel("label")
    if k <= MOST_WITH_NUMBERS:
        ax.set_xticks(range(k), confusion.classes, rotation=45, ha="right")
        ax.set_yticks(range(k), confusion.classes)
        for i, j in np.ndindex(k, k):
            color = "white" if shares[i, j] > 50 else "black"
            ax.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", color=color)
    return Plot(
        figure,
        f"confusion_{confusion.name}",
        title=f"Confusion matrix of {confusion.name}",
        caption="Of the test images of each class, the share that the network takes for each "
        "class, after the last epoch.",
    )
