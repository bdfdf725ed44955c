"""Comparison of runs with each other: speed beside the differences of their losses, and
checkpoints.

analyze_results.py prints this when it is given logs, or two checkpoints:

    python experiments/analyze_results.py results/serial_cnn.csv results/parallel_cnn_mpi.csv
    python experiments/analyze_results.py results/serial.ckpt.npz results/mpi.ckpt.npz

The first run is the reference. Runs that should compute the same (metrics.py: the same options and
data from scratch) are compared loss by loss; a difference there that is more than rounding is
marked with "!". Of others no agreement is expected, and none is claimed.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import BATCH, TRAIN, VALIDATE, InputError, format_table
from metrics import RunGroup

KINDS = {BATCH: "batch", TRAIN: "training", VALIDATE: "validation"}
LOG_DIGITS = 1e-6  # a log has six decimals
ROUNDING = {"float64": 1e-6, "float32": 1e-2}  # of a loss, after training has amplified it


# --------------------------------------------------------------------------------------------------
# Logs
# --------------------------------------------------------------------------------------------------


def losses(group: RunGroup, kind: int) -> pd.Series:
    """The losses of one record type by (epoch, batch); epochs have batch 0."""
    rows = group.runs[0].rows(kind)
    batch = rows["value1"] if kind == BATCH else 0 * rows["epoch"]
    index = pd.MultiIndex.from_arrays([rows["epoch"].astype(int), batch.fillna(0).astype(int)])
    values = pd.Series(rows["loss"].to_numpy(), index=index)
    return values[~values.index.duplicated(keep="last")]


def describe_difference(ours: pd.Series, reference: pd.Series, kind: int) -> tuple[float, str]:
    """The largest difference of two series of losses, and a verdict in words.

    NaN and "not logged" if they have no row in common.
    """
    both = ours.index.intersection(reference.index)
    difference = (ours[both] - reference[both]).abs()
    difference = difference[difference.notna()]
    if difference.empty:
        return np.nan, "not logged"

    largest = float(difference.max())
    if largest < 1.5 * LOG_DIGITS:  # the last digit may be rounded either way
        return largest, "the same in all 6 decimals of the log"
    epoch, batch = difference[difference >= 1.5 * LOG_DIGITS].index[0]
    place = f"batch {batch} of epoch {epoch}" if kind == BATCH else f"epoch {epoch}"
    return largest, f"differs by up to {largest:.2g}, from {place} on"


def compare_logs(groups: list[RunGroup]) -> str:
    """Tables of the comparison of all run groups with the first, and a verdict for each."""
    reference = groups[0]
    rows = []
    verdicts = []
    for group in groups:
        speedup = group.mean("images_per_s") / reference.mean("images_per_s")
        cores = group.cores / reference.cores
        row = [
            group.name,
            f"{group.mean('images_per_s'):,.0f}",
            f"{speedup:.2f}",
            f"{100 * speedup / cores:.0f} %" if cores >= 1 else "",
        ]
        if group is reference:
            rows.append([*row, "", "", "", "reference"])
            continue

        should_agree = group.trains and group.computation() == reference.computation()
        allowed = ROUNDING.get(group.arguments.get("dtype", "float32"), ROUNDING["float32"])
        lines = []
        is_wrong = False
        for kind, word in KINDS.items():
            largest, verdict = describe_difference(
                losses(group, kind), losses(reference, kind), kind
            )
            row.append("" if np.isnan(largest) else f"{largest:.1e}")
            lines.append(f"    {word}: {verdict}")
            is_wrong |= largest > allowed
        row.append(("yes" if not is_wrong else "yes !") if should_agree else "no")
        rows.append(row)

        expected = "should compute the same as" if should_agree else "need not agree with"
        verdicts.append(f"{group.name} {expected} {reference.name}:")
        if should_agree and is_wrong:
            lines.append(f"    ! more than rounding explains (losses up to {allowed:g})")
        verdicts += lines

    header = (
        "run",
        "images/s",
        "speed-up",
        "efficiency",
        "batch loss",
        "train loss",
        "test loss",
        "should agree",
    )
    title = f"compared with {reference.name}: speed, and the largest differences of losses"
    return "\n".join(["", title, format_table(header, rows), *verdicts])


def batch_losses(groups: list[RunGroup]) -> pd.DataFrame:
    """The loss of every batch, one column a run; rows are (epoch, batch)."""
    table = pd.DataFrame({group.name: losses(group, BATCH) for group in groups})
    table.index.names = ["epoch", "batch"]
    return table


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


def is_checkpoint(path: Path) -> bool:
    return path.suffix in (".npz", ".pt", ".pth") or path.name.endswith(".ckpt")


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, of NumPy (.npz) or PyTorch; InputError if it is neither."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name not in ("meta", "layout")}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, OSError, KeyError):
        pass  # not NumPy's format: PyTorch's?
    try:
        import torch

        state = torch.load(path, map_location="cpu", weights_only=True)
        return {
            f"{part}.{name}": tensor.float().numpy()
            for part, tensors in state.items()
            if part == "model"
            for name, tensor in tensors.items()
        }
    except Exception as error:  # torch.load has many kinds
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is not a checkpoint: {reason}") from None


def compare_checkpoints(first: Path, second: Path) -> str:
    """For each array of two checkpoints the largest difference, and a verdict."""
    ours = read_checkpoint(first)
    theirs = read_checkpoint(second)
    lines = []
    for name in sorted(ours.keys() ^ theirs.keys()):
        lines.append(f"{name}: only in {first if name in ours else second}")

    rows = []
    largest = 0.0
    for name in ours.keys() & theirs.keys():
        a = np.asarray(ours[name], np.float64)
        b = np.asarray(theirs[name], np.float64)
        if a.shape != b.shape:
            lines.append(f"{name}: {a.shape} and {b.shape} are different shapes")
            continue
        difference = np.abs(a - b).max(initial=0)
        scale = np.abs(a).max(initial=0)
        relative = difference / scale if scale else difference
        largest = max(largest, relative)
        rows.append([name, str(a.shape), f"{difference:.3g}", f"{relative:.3g}"])
    rows.sort()

    header = ("array", "shape", "largest difference", "of the largest entry")
    if lines:
        verdict = "these are checkpoints of different models or optimizers"
    elif largest == 0:
        verdict = "the same, bit for bit"
    else:
        power = int(np.floor(np.log10(largest))) + 1
        verdict = f"the same to 1e{power}" if power <= -4 else f"different: up to {largest:.2g}"
    return "\n".join([format_table(header, rows), *lines, f"{first} and {second}: {verdict}"])
