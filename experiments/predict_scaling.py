"""Predict how data-parallel training scales to 1,024 ranks, from a run of one rank and a network.

    make predict
    python parallel_cnn_mpi.py --epochs 1 --log results/one_rank.csv --trace results/one_rank.trace
    python experiments/predict_scaling.py --run results/one_rank.csv
    mpirun -np 2 python experiments/predict_scaling.py --calibrate --output results/network.json
    python experiments/predict_scaling.py --network results/network.json 1gbe 10gbe infiniband

    mpirun -np 2 python parallel_cnn_mpi.py --reduce ring --epochs 1 --log results/two.csv
    python experiments/predict_scaling.py --network results/network.json --measured results/two.csv

The run says how long a step takes, how much steps differ, and when which gradients are complete.
The network is a preset or what --calibrate has measured on your machines. The formulas and their
sources are in scaling_model.py: waiting for the slowest rank, and communication that the backward
pass does not hide, are added to the step. What the model leaves out is in docs/scaling.md.

Result: tables here; prediction.csv with all numbers, prediction.json, from which all can be built
again (--run takes it too), and prediction.png and .svg in --output-dir.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import InputError, Parser, atomic_write, check_outputs, format_table, number, run_main
from scaling_inputs import (
    network_from_json,
    profile_from_json,
    read_json,
    read_network,
    read_profile,
    write_profile,
)
from scaling_model import ALGORITHMS, PARTS, PRESETS, Network, Prediction, Profile, predict

RANKS = [2**i for i in range(11)]  # 1 … 1,024
SHOWN_RANKS = (2, 4, 16, 64, 256, 1024)  # in the tables
SCRIPTS_RUNGS = ("allreduce", "ring", "overlap", "shared")  # of parallel_cnn_mpi.py --reduce
REDUCE = "overlap"  # the rung of which the bounds and the sentences are
PAYS = 0.5  # of the ideal speed-up: below, more than half of the ranks' time is not training


# --------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------


def predict_all(profile: Profile, networks: list[Network], images: int) -> list[dict]:
    """A row for each network, algorithm, kind of scaling and number of ranks.

    images: of a step in strong scaling, on all ranks together.
    """
    whole = profile.with_images(images)
    rows = []
    for network in networks:
        for name, algorithm in ALGORITHMS.items():
            for scaling in ("weak", "strong"):
                for ranks in RANKS:
                    if scaling == "weak":
                        found = predict(profile, network, algorithm, ranks)
                    elif ranks <= images:  # else some would have no image at all
                        found = predict(whole, network, algorithm, ranks, strong=True)
                    else:
                        continue
                    rows.append(
                        {
                            "network": network.name,
                            "algorithm": name,
                            "scaling": scaling,
                            **found._asdict(),
                            "images_per_s": found.images_per_s,
                            "bound": found.bound,
                            "lost_to": found.lost_to,
                        }
                    )
    return rows


def select(rows: list[dict], **wanted) -> list[dict]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def where_it_stops(rows: list[dict]) -> str:
    """One sentence on a network: from how many ranks on more than half of their time is lost."""
    network = rows[0]["network"]
    parts = []
    for scaling in ("weak", "strong"):
        line = select(rows, algorithm=REDUCE, scaling=scaling)
        lost = [row for row in line if row["efficiency"] < PAYS]
        fastest = max(line, key=lambda row: row["images_per_s"])
        if lost:
            text = (
                f"stops paying at {lost[0]['ranks']:,} ranks ({lost[0]['efficiency']:.0%} "
                f"efficiency, most of it lost to {lost[0]['lost_to']})"
            )
            if fastest["ranks"] < line[-1]["ranks"]:
                text += f" and is fastest on {fastest['ranks']:,}"
        else:
            text = f"pays up to {line[-1]['ranks']:,} ranks ({line[-1]['efficiency']:.0%})"
        parts.append(f"{scaling} scaling {text}")
    return f"{network}, --reduce {REDUCE}: {'; '.join(parts)}."


def table_rows(rows: list[dict], scaling: str, algorithms=None) -> list[list[str]]:
    """Network, algorithm and a cell for each of SHOWN_RANKS.

    The efficiency in weak, the speed-up in strong scaling.
    """
    cells = []
    for network in dict.fromkeys(row["network"] for row in rows):
        for algorithm in algorithms or ALGORITHMS:
            line = select(rows, network=network, algorithm=algorithm, scaling=scaling)
            by_ranks = {row["ranks"]: row for row in line}
            shown = []
            for ranks in SHOWN_RANKS:
                row = by_ranks.get(ranks)
                if row is None:
                    shown.append("–")
                elif scaling == "weak":
                    shown.append(f"{row['efficiency']:.0%}")
                else:
                    shown.append(f"{row['speedup']:.2f}")
            cells.append([network, algorithm, *shown])
    return cells


def table_header(first: str = "network") -> list[str]:
    return [first, "algorithm", *(f"{ranks:,}" for ranks in SHOWN_RANKS)]


# --------------------------------------------------------------------------------------------------
# Measured points
# --------------------------------------------------------------------------------------------------


def read_measured(log: str) -> dict:
    """What a run of parallel_cnn_mpi.py has reached: its row for the figure."""
    path = Path(log).with_suffix(".json")
    metadata = read_json(path, "give logs of parallel_cnn_mpi.py to --measured")
    try:
        return {
            "ranks": metadata["ranks"],
            "algorithm": metadata["reduce"],
            "global_batch_size": metadata["arguments"]["global_batch_size"],
            "images_per_s": metadata["totals"]["images_per_s"],
        }
    except KeyError as error:
        raise InputError(f"{path} has no {error}: give logs of parallel_cnn_mpi.py") from None


# --------------------------------------------------------------------------------------------------
# Figure
# --------------------------------------------------------------------------------------------------

BAND_COLORS = {
    "compute": "#e8f1e4",
    "bandwidth": "#fde6d0",
    "latency": "#dde7f5",
    "stragglers": "#efe3f2",
}


def draw(rows: list[dict], measured: list[dict], profile: Profile, path: Path):
    """Weak scaling above, strong below, a column for each network; path without suffix."""
    from matplotlib.patches import Patch

    from figures import figure_style, make_figure
    from plots import COLORS, LINES, MARKERS

    networks = list(dict.fromkeys(row["network"] for row in rows))
    with figure_style():
        figure, axes = make_figure(5.2, 2, len(networks), sharex=True, sharey="row")
        for column, network in enumerate(networks):
            for row, scaling in enumerate(("weak", "strong")):
                ax = axes[row, column]
                lines = select(rows, network=network, scaling=scaling)
                shade_bounds(ax, select(lines, algorithm=REDUCE))
                for i, algorithm in enumerate((*SCRIPTS_RUNGS, "tree")):
                    line = select(lines, algorithm=algorithm)
                    ranks = [point["ranks"] for point in line]
                    values = [point["efficiency"] for point in line]
                    style = {"linestyle": LINES[i], "color": COLORS[i], "linewidth": 1.2}
                    ax.plot(ranks, values, label=algorithm, **style)
                    for point in measured:
                        is_here = point["network"] == network and point["algorithm"] == algorithm
                        if is_here and point["scaling"] == scaling:
                            style = {"marker": MARKERS[i], "color": COLORS[i], "ls": ""}
                            label = f"{algorithm}, measured"
                            ax.plot(point["ranks"], point["efficiency"], label=label, **style)
                ax.set_xscale("log", base=2)
                ax.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1,024"])
                ax.set_ylim(0, 1.05)
                if row == 0:
                    ax.set_title(network)
                if column == 0:
                    ax.set_ylabel(f"efficiency, {scaling} scaling")
        figure.supxlabel(f"ranks (predicted: lines; measured: points)\n{profile.name}", fontsize=7)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        for part in PARTS:
            handles.append(Patch(color=BAND_COLORS[part]))
            labels.append(f"bound by {part}")
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        save_figure(figure, path)


def save_figure(figure, path: Path):
    """Write path.png and path.svg, the same bytes for the same numbers."""
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        with atomic_write(path.with_suffix(suffix)) as file:
            figure.savefig(file, format=suffix[1:], metadata=metadata)


def shade_bounds(ax, line: list[dict]):
    """A band behind each number of ranks in the colour of what bounds the step there."""
    for row in line:
        low = row["ranks"] / 2**0.5
        high = row["ranks"] * 2**0.5
        ax.axvspan(low, high, color=BAND_COLORS[row["bound"]], lw=0, zorder=0)


def place_measured(measured: list[dict], profile: Profile, network: str) -> list[dict]:
    """The measured points as points of the figure: relative to the measured step of one rank."""
    one_rank = profile.images / profile.mean
    points = []
    for point in measured:
        size = point["global_batch_size"]
        if size != profile.images * point["ranks"]:
            raise InputError(
                f"--measured: a run with {size} images a step on {point['ranks']} ranks: give runs "
                f"with {profile.images} images on each rank, as --run has"
            )
        efficiency = point["images_per_s"] / one_rank / point["ranks"]
        points.append({**point, "scaling": "weak", "efficiency": efficiency, "network": network})
    return points


# --------------------------------------------------------------------------------------------------
# Files and command line
# --------------------------------------------------------------------------------------------------


def write_json(path: Path, content: dict):
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def write_csv(path: Path, rows: list[dict]):
    columns = [
        "network",
        "algorithm",
        "scaling",
        *Prediction._fields,
        "images_per_s",
        "bound",
        "lost_to",
    ]
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()}
            )


def read_input(args) -> tuple[Profile, list[Network], list[dict]]:
    """Profile, networks and measured points: of a log, or of an earlier prediction.json."""
    if not args.run.endswith(".json"):
        networks = [read_network(name) for name in args.network or PRESETS]
        return read_profile(args.run), networks, [read_measured(log) for log in args.measured]
    content = read_json(Path(args.run), "give the prediction.json of an earlier prediction")
    try:
        profile = profile_from_json(content["profile"])
        networks = [network_from_json(network) for network in content["networks"]]
        measured = content["measured"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{args.run} is not a prediction.json ({error})") from None
    if args.network:
        networks = [read_network(name) for name in args.network]
    return profile, networks, measured


def calibrate(args):
    """Measure the network between the ranks that mpirun has started; rank 0 prints and writes."""
    from mpi4py import MPI

    from calibrate_network import calibrate, describe
    from common import abort_on_exception, check_launcher, collective, limit_blas_threads

    comm = MPI.COMM_WORLD
    abort_on_exception(comm)
    check_launcher(comm)
    if comm.size < 2:
        raise InputError("--calibrate needs two ranks: mpirun -np 2 python … --calibrate")
    output = Path(args.output)
    collective(comm, lambda: check_outputs([output]) if comm.rank == 0 else None)
    limit_blas_threads(1)
    content = calibrate(comm, args.name)
    if comm.rank == 0:
        print(describe(content))
        write_json(output, content)
        print(f"written: {output}")


def parse_args(argv=None):
    parser = Parser("predict_scaling", __doc__)
    add = parser.add_argument
    log = "results/one_rank.csv"
    add(
        "--run",
        metavar="FILE",
        default=log,
        help="log of one rank with --trace (default: %(default)s)",
    )
    add(
        "--network",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(PRESETS)}, or files of --calibrate (default: all of these names)",
    )
    add(
        "--ranks-per-machine",
        type=number(int, 1, 1024),
        metavar="M",
        help="ranks that share a machine and its link (default: as in the network)",
    )
    add(
        "--measured",
        nargs="+",
        default=[],
        metavar="LOG",
        help="logs of parallel_cnn_mpi.py on the first network, for the figure",
    )
    add(
        "--global-batch-size",
        type=number(int, 1, 10**6),
        default=1024,
        metavar="N",
        help="images of a step in strong scaling (default: %(default)s)",
    )
    add("--output-dir", metavar="FOLDER", default="results/prediction", help="default: %(default)s")
    add("--calibrate", action="store_true", help="measure the network between these ranks")
    add("--name", default="measured network", help="with --calibrate: its name in tables")
    output = "results/network.json"
    add("--output", metavar="FILE", default=output, help="of --calibrate (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.calibrate:
        calibrate(args)
        return

    profile, networks, measured = read_input(args)
    # Rounded as prediction.json has it, so that the same numbers come out of that file.
    profile = profile_from_json(write_profile(profile))
    if args.ranks_per_machine:
        networks = [net._replace(ranks_per_machine=args.ranks_per_machine) for net in networks]
    folder = Path(args.output_dir)
    files = [folder / f"prediction{suffix}" for suffix in (".csv", ".json", ".png", ".svg")]
    check_outputs(files)

    rows = predict_all(profile, networks, args.global_batch_size)
    points = place_measured(measured, profile, networks[0].name)
    spread = np.std(profile.steps) / profile.mean
    print(f"{profile.name}: {1e3 * profile.mean:.2f} ms a step (standard deviation {spread:.0%})")
    print(f"gradients: {len(profile.sizes)} slices, {sum(profile.sizes) / 1e6:.2f} MB\n")
    for network in networks:
        print(
            f"{network.name}: α {network.alpha * 1e6:.3g} µs, 1/β {1e-6 / network.beta:,.4g} MB/s, "
            f"{network.ranks_per_machine} per machine; {network.source}"
        )
    print("\nEfficiency, weak scaling, by ranks")
    print(format_table(table_header(), table_rows(rows, "weak")))
    print(f"\nSpeed-up, strong scaling of {args.global_batch_size:,} images, by ranks")
    print(format_table(table_header(), table_rows(rows, "strong")))
    print()
    for network in networks:
        print(where_it_stops(select(rows, network=network.name)))

    write_csv(files[0], rows)
    content = {
        "profile": write_profile(profile),
        "networks": [network._asdict() for network in networks],
        "measured": measured,
    }
    write_json(files[1], content)
    draw(rows, points, profile, files[2].with_suffix(""))
    print("\nwritten:", *files)


if __name__ == "__main__":
    run_main(main)
