"""Reading training runs: their logs, their metadata, and the index of run_experiments.py.

A run is one training. Its log is the CSV that --log writes, with rows of several record types:
TRAIN and VALIDATE for each epoch, BATCH for each batch, FETCH_TRAIN before an epoch that had to
fetch its images. Its metadata is the JSON beside the log: script, arguments, machine, data, totals.
"""

import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import BATCH, LOG_COLUMNS, SHORT_OF_CPU, TRAIN, InputError, metadata_path

Warn = Callable[[str], None]  # called with a line about something that could not be read


class Machine(NamedTuple):
    """What must be the same for runs to be averaged or divided by each other."""

    host: str | None
    cpu: str | None
    cores: int
    dataset: str | None
    fingerprint: str | None  # of the images, whichever source they were loaded from


@dataclass(frozen=True)
class Run:
    suite: str
    name: str  # of its command line, such as "mpi-2-strong"
    repeat: int
    log: pd.DataFrame
    metadata: dict
    machine: Machine
    cores: int  # ranks × threads
    oversubscribed: bool  # ranks × threads are more than the machine's cores
    trace: Path | None = None  # the file that --trace has written, if it is still there

    @property
    def cpu_share(self) -> float | None:
        """The CPU time that its threads got, as a share of what they asked for."""
        return (self.metadata.get("totals") or {}).get("cpu_share")

    @property
    def short_of_cpu(self) -> bool:
        """Whether something else used the cores: the run's speed is not that of its script."""
        is_short = self.cpu_share is not None and self.cpu_share < SHORT_OF_CPU
        return is_short and not self.oversubscribed

    def rows(self, kind: int) -> pd.DataFrame:
        """The log's rows of one record type: TRAIN, VALIDATE, BATCH or FETCH_TRAIN."""
        return self.log[self.log["type"] == kind]


def read_log(path: Path, warn: Warn) -> pd.DataFrame:
    """Read the complete rows of a run log; an empty cell becomes NaN.

    Damaged rows, such as the last one of a run that was killed, are left out with a warning.
    Raises InputError if the file is not a run log or has no complete epoch.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before the text
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"{path}: {reason}") from None

    header, *lines = text.split("\n")
    if re.split("[;\t]", header) == list(LOG_COLUMNS):
        raise InputError(
            f"{path} was saved by a spreadsheet, with other separators and numbers: give the log "
            "as the script has written it, or save it as CSV with commas and decimal points"
        )
    if header.split(",") != list(LOG_COLUMNS):
        raise InputError(f"{path} is not a run log: its first line has other columns")

    # Every row ends with a newline: text after the last newline is a row that was cut off.
    cut_off = lines.pop() if lines else ""
    complete = [line for line in lines if line.count(",") == len(LOG_COLUMNS) - 1]

    cells = pd.read_csv(io.StringIO("\n".join([header, *complete])))

    # A cell that is not a number becomes NaN, as if it were empty: tell such rows from whole ones.
    rows = pd.DataFrame({name: pd.to_numeric(cells[name], errors="coerce") for name in cells})
    is_number_or_empty = (rows.notna() | cells.isna()).all(axis=1)
    rows = rows[is_number_or_empty & has_required_cells(rows)]

    damaged = len(lines) - len(rows) + (cut_off != "")
    if damaged:
        warn(f"{path}: {damaged} damaged or cut off lines are left out")
    if not (rows["type"] == TRAIN).any():
        raise InputError(f"{path} has no complete epoch")
    return rows


def has_required_cells(rows: pd.DataFrame) -> pd.Series:
    """Whether each row has all the numbers without which nothing can be computed from it."""
    finite = np.isfinite(rows)

    # A run that only loads has no loss, an epoch of a serial run no communication, and so on.
    required = finite[["type", "epoch", "loading", "duration"]].all(axis=1)
    has_speed = finite["images_per_s"] | ~rows["type"].isin([TRAIN, BATCH])
    has_batch_number = finite["value1"] | (rows["type"] != BATCH)
    return required & has_speed & has_batch_number & (rows["duration"] > 0)


def read_metadata(path: Path, warn: Warn) -> dict:
    """Read the JSON beside a log; {} with a warning if there is none."""
    try:
        metadata = json.loads(path.read_text())
        if isinstance(metadata, dict):
            return metadata
        reason = "it is no description of a run"
    except OSError as error:
        reason = error.strerror
    except ValueError:
        reason = "it is not JSON"
    warn(f"{path}: {reason}: machine and data set of this run are unknown")
    return {}


def find_metadata(log: Path) -> Path:
    """The JSON beside a log. Earlier versions wrote that of lr0.01 to lr0.json, as of all lr0.…"""
    path = metadata_path(log)
    earlier = log.with_suffix(".json")
    if not path.exists() and earlier.exists():
        metadata = read_metadata(earlier, lambda _: None)
        if Path(str((metadata.get("arguments") or {}).get("log"))).name == log.name:
            return earlier
    return path


def read_run(
    suite: str,
    name: str,
    repeat: int,
    path: Path,
    warn: Warn,
    entry: dict | None = None,
    settings: dict | None = None,
) -> Run:
    """Read the log `path` and the metadata beside it.

    entry, settings: the run's entry in results/index.json and the settings of all runs in it.
    Raises InputError if the log cannot be used.
    """
    log = read_log(path, warn)
    metadata = read_metadata(find_metadata(path), warn)
    if metadata.get("status", "done") != "done":
        warn(f"{path}: this run is {metadata['status']}: what counts are its complete epochs")

    # A run that reads images from disk or S3 knows only their source. The index knows which data
    # set the images in that source were made from.
    arguments = metadata.get("arguments") or {}
    from_memory = arguments.get("source", "builtin") == "builtin"
    data = metadata if from_memory or not settings else settings

    machine = Machine(
        host=metadata.get("host"),
        cpu=metadata.get("cpu"),
        cores=len(metadata.get("cores") or []),
        dataset=data.get("dataset"),
        fingerprint=data.get("fingerprint"),
    )

    # The index knows how many cores a run was given, as PyTorch's threads are not in the metadata.
    entry = entry or {}
    ranks = metadata.get("ranks") or 1
    threads = metadata.get("threads") or 1
    cores = entry.get("cores") or ranks * threads
    more_than_machine = machine.cores > 0 and cores > machine.cores
    oversubscribed = entry.get("oversubscribed", more_than_machine)
    trace = find_trace(path, arguments.get("trace"))
    return Run(suite, name, repeat, log, metadata, machine, cores, oversubscribed, trace)


def find_trace(log: Path, argument: str | None) -> Path | None:
    """The file of a run's --trace: where it was written, or beside the log if both were moved."""
    if not argument:
        return None
    for path in (log.with_name(Path(argument).name), Path(argument)):
        if path.is_file():
            return path
    return None


def read_results(folder: Path, warn: Warn) -> tuple[list[Run], list[dict], dict[str, str]]:
    """Read what run_experiments.py has written: index.json and the runs that it lists.

    Returns the runs that are done, an entry for each of the others, and {configuration: reason}
    of those that could not run on the machine. Raises InputError if the index cannot be read.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
        settings = dict(index["settings"])
        left_out = dict(index.get("left_out", {}))
        entries = [
            (e["suite"], e["configuration"], e["repeat"], e["status"], e["folder"], e)
            for e in index["runs"]
        ]
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}: run make experiments first, or name the logs of runs"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not an index of runs: delete it and run make experiments"
        ) from None

    # One log that cannot be read must not stop the analysis of the others.
    runs = []
    failed = []
    for suite, name, repeat, status, run_folder, entry in entries:
        if status != "done":
            run_name = f"{suite}/{name}/{repeat}"
            failed.append({"run": run_name, "status": status, "output": entry.get("output", [])})
            continue
        log = folder / run_folder / "run.csv"
        try:
            runs.append(read_run(suite, name, repeat, log, warn, entry, settings))
        except InputError as error:
            warn(f"{error}: this run is left out")
    return runs, failed, left_out


def read_logs(paths: list[Path], warn: Warn) -> list[Run]:
    """Read single logs, each of which becomes a run group of its own, named after its file."""
    paths = list(dict.fromkeys(paths))
    names = distinct_names(paths)
    return [read_run("files", name, 1, path, warn) for name, path in zip(names, paths, strict=True)]


def distinct_names(paths: list[Path]) -> list[str]:
    """The names of files without ".csv"; where several are the same, with folder, then with ".csv".

    Two runs of one name would be taken for repeats. lr0.01 and lr0.02 have no suffix to cut off.
    """
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    candidates = []  # of each file, the shortest name first
    for path in paths:
        whole = os.path.relpath(path, folder)
        candidates.append([path.name.removesuffix(".csv"), whole.removesuffix(".csv"), whole])
    counts = [Counter(column) for column in zip(*candidates, strict=True)]

    names = []
    for own in candidates:
        distinct = [name for name, count in zip(own, counts, strict=True) if count[name] == 1]
        names.append(distinct[0] if distinct else own[-1])
    return names
