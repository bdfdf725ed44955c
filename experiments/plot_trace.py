"""The figure of a run's --trace: what each rank and thread did during two training steps."""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import InputError
from figures import Plot, make_figure, scaled
from metrics import RunGroup

STEPS = 2  # of the five that a trace has
KINDS = {  # of spans, in the order of a step: colours of metrics.PHASES, with hatches
    "loading": ("#1f2933", ""),
    "forward": ("#6b8fb5", ""),
    "backward": ("#b9d3ea", ""),
    "communication": ("#f2c48d", ""),
    "update": ("#ffffff", "xxxx"),
}


class Span(NamedTuple):
    """Something that a thread did. start and end are in ms since the first step shown."""

    name: str
    kind: str  # a key of KINDS
    track: str  # "rank 0", "rank 0, layers", "rank 1, loader", …
    start: float
    end: float


def read_trace(path: Path) -> list[Span]:
    """Read the steps to show from a file that --trace has written.

    Raises InputError if the file is no such trace or has no complete step.
    """
    try:
        events = json.loads(path.read_text())["traceEvents"]
        threads = {
            (event["pid"], event["tid"]): event["args"]["name"]
            for event in events
            if event["name"] == "thread_name"
        }
        spans = [make_span(event, threads) for event in events if event["ph"] == "X"]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no trace: write one with --trace") from None

    # A step begins when rank 0 loads its batch, and ends where the next one begins. The first step
    # of the trace is passed over: its loading may have begun before the trace did.
    begins = sorted(s.start for s in spans if s.name == "loading" and s.track == "rank 0")
    if len(begins) < 3:
        raise InputError(f"{path} has no complete step: train three steps or more with --trace")
    first = begins[1]
    last = begins[min(1 + STEPS, len(begins) - 1)]
    return [
        span._replace(start=(span.start - first) / 1000, end=(span.end - first) / 1000)
        for span in spans
        if first <= span.start < last
    ]


def make_span(event: dict, threads: dict) -> Span:
    """The span of an event in Chrome's trace format; start and end in microseconds."""
    name = event["name"]
    track = f"rank {event['pid']}"
    thread = threads[event["pid"], event["tid"]]
    if thread != "MainThread":
        track += f", {thread}"
    elif name not in KINDS:  # a layer, or a slice of the gradients: it lies within a phase
        track += ", layers"

    kind = name if name in KINDS else name.split()[-1]  # "3 Dense forward"
    if kind not in KINDS:
        kind = "communication"  # "gradients 0:896"
    return Span(name, kind, track, event["ts"], event["ts"] + event["dur"])


def plot_trace(group: RunGroup) -> Plot | None:
    """Draw the first traced run of a group; None if none of its runs has a trace."""
    paths = [run.trace for run in group.runs if run.trace is not None]
    if not paths:
        return None

    spans = read_trace(paths[0])
    tracks = sorted({span.track for span in spans})
    end = max(span.end for span in spans)
    figure, axes = make_figure(0.9 + 0.35 * len(tracks))
    ax = axes[0][0]
    for kind, (color, hatch) in KINDS.items():
        own = [span for span in spans if span.kind == kind]
        ax.barh(
            [tracks.index(span.track) for span in own],
            [span.end - span.start for span in own],
            height=0.8,
            left=[span.start for span in own],
            color=color,
            hatch=hatch,
            edgecolor="0.2",
            linewidth=scaled(0.4),
            label=kind,
        )

    # The names of layers, where there is room for them
    for span in spans:
        if span.track.endswith("layers") and span.end - span.start > 0.09 * end:
            layer = re.sub(r"^\d+ (\w+?)(2D)? \w+$", r"\1", span.name)
            middle = (span.start + span.end) / 2
            place = tracks.index(span.track)
            ax.text(middle, place, layer, ha="center", va="center", fontsize=scaled(5.5))

    ax.set(xlabel="ms", xlim=(0, end))
    ax.set_yticks(range(len(tracks)), tracks)
    ax.set_ylim(len(tracks) - 0.5, -0.5)  # rank 0 on top
    ax.grid(visible=False, axis="y")
    return Plot(
        figure,
        "trace",
        title=f"{STEPS} training steps, {group.label}",
        caption="What each rank did when, from its --trace; below each rank the passes of its "
        "layers, and when it started to reduce the slices of the gradients.",
        message="Where ranks compute, and where they wait for each other",
        legend_columns=len(KINDS),
    )
