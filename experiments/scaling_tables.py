"""Tables and sentences about scaling beyond this machine, of measurements/ or of own results.

update_readme.py puts them into docs/scaling.md, make_report.py into the report.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
import check_prediction
import predict_scaling
import published_scaling
from common import InputError
from scaling_inputs import network_from_json, profile_from_json, read_json

ALGORITHMS = ("allreduce", "ring", "overlap", "tree")  # shown; the CSV has all
STRONG_IMAGES = 1024
PREDICTED = "A prediction, not a measurement."


class Table(NamedTuple):
    name: str
    title: str
    header: list
    rows: list
    notes: list  # sentences below it
    caption: str


def prediction_tables(path: Path) -> list[Table]:
    """Efficiency and speed-up, of a prediction.json of predict_scaling.py."""
    content = read_json(path, "make predict makes it")
    try:
        profile = profile_from_json(content["profile"])
        networks = [network_from_json(network) for network in content["networks"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a prediction.json ({error}): make predict") from None
    rows = predict_scaling.predict_all(profile, networks, STRONG_IMAGES)
    header = predict_scaling.table_header()
    by_network = [predict_scaling.select(rows, network=network.name) for network in networks]
    step = f"{1e3 * profile.mean:.1f} ms a step of one rank ({profile.name})"
    sources = [
        f"{net.name}: {net.alpha * 1e6:.3g} µs, {1e-6 / net.beta:,.0f} MB/s ({net.source})"
        for net in networks
    ]
    return [
        Table(
            "weak",
            "Predicted efficiency, weak scaling, by ranks",
            header,
            predict_scaling.table_rows(rows, "weak", ALGORITHMS),
            [f"{step}. {'; '.join(sources)}."],
            PREDICTED,
        ),
        Table(
            "strong",
            f"Predicted speed-up, strong scaling of {STRONG_IMAGES:,} images a step, by ranks",
            header,
            predict_scaling.table_rows(rows, "strong", ALGORITHMS),
            [predict_scaling.where_it_stops(lines) for lines in by_network],
            PREDICTED,
        ),
    ]


def check_tables(path: Path) -> list[Table]:
    """Measured against predicted steps, of a file of check_prediction.py; then what sends less."""
    content = read_json(path, "make check-prediction makes it")
    try:
        rungs = check_prediction.rungs(content)
        points = Table(
            "check",
            "Steps over links of limited rate, predicted and measured",
            list(check_prediction.POINT_HEADER),
            check_prediction.point_rows(rungs),
            [check_prediction.verdict_line(rungs), check_prediction.machines_line(content)],
            "Hosts are network namespaces of one machine, with one rank each.",
        )
        run = content.get("accuracy_run")
        note = "No accuracy was measured."
        if run:
            seeds = max(len(found) for found in content["accuracy"].values())
            note = (
                f"Accuracy after {run['epochs']} epochs of {run['images']:,} images "
                f"({run['dataset']}), {run['global_batch_size']} a step on two ranks: "
                + ("one seed." if seeds == 1 else f"the mean (range) of {seeds} seeds.")
            )
        slow = Table(
            "slow",
            "What sends less, on two hosts",
            list(check_prediction.SLOW_HEADER),
            check_prediction.slow_rows(content),
            [note],
            "The factor is that over allreduce on the same link.",
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a file of check_prediction.py ({error})") from None
    return [points, slow]


def published_table() -> Table:
    notes = [f"{entry.name}: {entry.sources}." for entry in published_scaling.TABLES]
    return Table(
        "published",
        "The model beside published efficiencies",
        list(published_scaling.HEADER),
        published_scaling.table_rows(),
        notes,
        "Other machines, measured by others.",
    )
