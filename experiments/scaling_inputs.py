"""What the scaling model is fed with: the log and trace of a run, and the file of a calibration."""

import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import BATCH, InputError
from scaling_model import PRESETS, Network, Profile

PHASES = ("loading", "forward", "backward", "communication")
WARM_UP = (
    8  # steps of the first epoch: the first fill caches, the next are traced, which takes time
)


def read_profile(log: str | Path, ranks: int = 1) -> Profile:
    """The Profile of a run with --trace, from its log, the .json beside it, and the trace.

    Raises InputError for a run of another number of ranks, without a trace, or too short.
    """
    log = Path(log)
    metadata = read_json(log.with_suffix(".json"), "the log of a run has a .json file beside it")
    arguments = metadata.get("arguments", {})
    if metadata.get("ranks") != ranks:
        raise InputError(f"{log} is a run of {metadata.get('ranks')} ranks: give one of {ranks}")
    if not arguments.get("trace"):
        raise InputError(f"{log} is a run without a trace: repeat it with --trace FILE")
    trace = Path(arguments["trace"])
    if not trace.exists():
        trace = log.parent / trace.name  # the folder was moved
    events = read_json(trace, f"{log} names it as its trace")["traceEvents"]

    seconds, phases = read_steps(log)
    ready, parameters = read_slices(events, phases["backward"])
    itemsize = np.dtype(arguments.get("dtype", "float32")).itemsize
    return Profile(
        images=arguments["global_batch_size"],
        steps=seconds,
        phases=phases,
        ready=ready,
        sizes=tuple(count * itemsize for count in parameters),
        name=f"{arguments['model']}, batch {arguments['global_batch_size']}, {metadata['cpu']}",
    )


def merge_profiles(one: Profile, other: Profile) -> Profile:
    """Of two runs of the same: all their steps, and the means of their phases."""
    return replace(
        one,
        steps=np.concatenate([one.steps, other.steps]),
        phases={name: (one.phases[name] + other.phases[name]) / 2 for name in one.phases},
        ready=tuple(np.mean([one.ready, other.ready], axis=0).tolist()),
    )


def read_json(path: Path, hint: str) -> dict:
    """Raises InputError, with the hint, if the file cannot be read or is none."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {hint}") from None
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file ({error})") from None


def read_steps(log: Path) -> tuple[np.ndarray, dict[str, float]]:
    """The seconds of each step after the warm-up, (n,), and the mean seconds of each phase.

    The columns of a log's batch rows are sums since the start of the epoch.
    """
    try:
        with open(log, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["type"] == str(BATCH)]
        table = {"duration": [], **{name: [] for name in PHASES}}
        for name, values in table.items():
            sums = np.array([float(row[name] or 0) for row in rows])
            starts = np.array([row["value1"] == "1" for row in rows])
            before = np.where(starts, 0, np.roll(sums, 1))
            values.append((sums - before)[WARM_UP:-1])  # the last batch may be a smaller one
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise InputError(f"{log} is not the log of a run ({error})") from None

    steps = table["duration"][0]
    if len(steps) < 20:
        raise InputError(
            f"{log} has {len(rows)} steps, too few to know their spread: train on more images"
        )
    phases = {name: float(np.mean(table[name][0])) for name in PHASES}
    # What is left is the update, and the log itself.
    phases["update"] = float(np.mean(steps)) - sum(phases.values())
    return steps, phases


def read_slices(events: list, backward: float) -> tuple[tuple, tuple]:
    """When each slice of the gradients is complete, and how many parameters it has.

    The traced steps give the shape of the backward pass, the log its mean length.
    """
    spans = [event for event in events if event["ph"] == "X"]
    ready = {}
    lengths = []
    for step in (span for span in spans if span["name"] == "backward"):
        end = step["ts"] + step["dur"]
        lengths.append(step["dur"])
        for span in spans:
            found = re.fullmatch(r"gradients (\d+):(\d+)", span["name"])
            if found and step["ts"] <= span["ts"] <= end:
                key = (int(found[1]), int(found[2]))
                ready.setdefault(key, []).append(span["ts"] - step["ts"])
    if not ready:
        raise InputError("the trace has no slices of gradients: trace parallel_cnn_mpi.py")
    scale = backward / np.mean(lengths)
    order = sorted(ready, key=lambda key: np.mean(ready[key]))
    times = tuple(float(np.mean(ready[key]) * scale) for key in order)
    return times, tuple(stop - start for start, stop in order)


def read_network(name: str) -> Network:
    """A preset, or the network of a file that --calibrate has written. Raises InputError."""
    if name in PRESETS:
        return PRESETS[name]
    hint = f"give a file of --calibrate, or one of {', '.join(PRESETS)}"
    content = read_json(Path(name), hint)
    try:
        return network_from_json(content["network"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{name} is not a file of --calibrate ({error}): {hint}") from None


def network_from_json(content: dict) -> Network:
    points = tuple(map(tuple, content.get("points", ())))
    return Network(**{**content, "points": points})


def write_profile(profile: Profile) -> dict:
    """The profile as JSON, with at most 1,000 of its steps."""
    stride = -(-len(profile.steps) // 1000)
    return {
        **vars(profile),
        "steps": [round(float(step), 6) for step in profile.steps[::stride]],
    }


def profile_from_json(content: dict) -> Profile:
    """The reverse of write_profile()."""
    return Profile(**{**content, "steps": np.array(content["steps"])})
