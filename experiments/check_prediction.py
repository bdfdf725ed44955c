"""Check predict_scaling.py: real training over links of limited rate, beside what is predicted.

    make check-prediction
    python experiments/check_prediction.py --seconds 240 --output results/check_prediction.json
    python experiments/check_prediction.py --accuracy --output results/check_prediction.json
    python experiments/check_prediction.py --report results/check_prediction.json --figure check.png

The hosts are network namespaces on this machine, joined by links whose rate tc limits
(network_hosts.py); the trainings are parallel_cnn_mpi.py under mpirun, one rank on each host. For
each number of hosts and each rate it calibrates the network, measures one-rank runs on all hosts at
once, before and after the training, which share nothing but the machine, and predicts from these.
Nothing is fitted to the trainings. --accuracy trains longer, without limited links, for
the test accuracy of what --compress and --local-steps change.

Every result is saved at once; started again, the script measures what is missing.

Result: --output with all points; --report prints the tables and draws the figure.
"""

import csv
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import (
    BATCH,
    InputError,
    Parser,
    atomic_write,
    check_outputs,
    environment,
    find_mpirun,
    format_table,
    number,
    run_main,
)
from network_hosts import Hosts, finish, start, why_not
from scaling_inputs import (
    merge_profiles,
    network_from_json,
    profile_from_json,
    read_json,
    read_profile,
    write_profile,
)
from scaling_model import ALGORITHMS, predict

HERE = Path(__file__).resolve().parent
TRAIN = HERE.parent / "parallel_cnn_mpi.py"
CALIBRATE = HERE / "predict_scaling.py"
IMAGES = 32  # of a step on each rank
PROFILE_STEPS = 150  # of the one-rank runs before and after
DRIFT = 0.05  # their difference, of the measured step, above which all are measured again
ATTEMPTS = 3
IDLE = 15  # percent of all processors that others may use when a measurement begins
IDLE_PATIENCE = 5  # seconds to wait for that
STEP_SECONDS = 6  # of each measured training, about
MIN_STEPS = 8
MAX_STEPS = 1000
SETTLE = 2  # first steps that are not counted
MATTERS = 0.2  # share of communication in a step from which on a point counts
LIMIT_EACH = 0.15  # largest relative error of a point, and of their median
LIMIT_MEDIAN = 0.08

RATES = (20, 50, 100, 200, 500, 1000, 2000)  # Mbit/s
REDUCERS = {name: ["--reduce", name] for name in ("allreduce", "ring", "overlap")}
SLOW_RATES = (20, 100)
SLOW = {  # what is tried on slow links: options of parallel_cnn_mpi.py
    "bf16": ["--compress", "bf16"],
    "topk": ["--compress", "topk"],
    "local 8": ["--local-steps", "8"],
    "local 32": ["--local-steps", "32"],
    "local 8, bf16": ["--local-steps", "8", "--compress", "bf16"],
}
ACCURACY_RUN = ["--epochs", "3"]


# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------


def plan(args) -> list[tuple]:
    """(hosts, rate in Mbit/s, {name: options}) in the order in which they are measured."""
    places = [(2, rate, REDUCERS) for rate in args.rates]
    places += [(hosts, rate, REDUCERS) for hosts in args.more_hosts for rate in args.more_rates]
    places += [(2, rate, SLOW) for rate in args.slow_rates]
    return places


def algorithm_of(name: str) -> tuple[str, int]:
    """The model's algorithm and the local steps of a configuration's name: "local 8, bf16"."""
    local, _, compress = name.partition(", ")
    if not local.startswith("local "):
        return name, 1
    return compress or "allreduce", int(local.split()[1])


class Measurement:
    """The output file and how its entries are measured."""

    def __init__(self, args):
        self.args = args
        self.path = Path(args.output)
        self.content = {"environment": environment(), "networks": {}, "points": {}, "accuracy": {}}
        if self.path.exists():
            self.content = read_json(self.path, "give another --output")
        self.deadline = time.monotonic() + (args.seconds or float("inf"))

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def save(self):
        with atomic_write(self.path, "w") as file:
            json.dump(self.content, file, indent=1, default=str)
            file.write("\n")

    def measure_place(self, count: int, rate: float, configurations: dict) -> bool:
        """Measure what is missing with these hosts; False if the time was over before."""
        missing = {
            name: options
            for name, options in configurations.items()
            if f"{count} hosts, {rate:g} Mbit/s, {name}" not in self.content["points"]
        }
        if not missing:
            return True
        if self.is_late():
            return False
        place = f"{count} hosts, {rate:g} Mbit/s"
        with Hosts(count, rate) as hosts, tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            if place not in self.content["networks"]:
                self.content["networks"][place] = self.calibrate(hosts, folder, place)
                self.save()
            network = network_from_json(self.content["networks"][place]["network"])
            for name, options in missing.items():
                point = self.measure_point(hosts, folder, network, name, options)
                self.content["points"][f"{place}, {name}"] = point
                self.save()
                print(describe_point(add_prediction(self.content, point)), flush=True)
                if self.is_late():
                    return False
        return True

    def calibrate(self, hosts: Hosts, folder: Path, name: str) -> dict:
        output = folder / "network.json"
        options = ["--calibrate", "--name", name, "--output", output]
        finish(start(hosts.mpirun([sys.executable, CALIBRATE, *options]), folder))
        return json.loads(output.read_text())

    def training(self, log: Path, steps: int, ranks: int, options: list) -> list:
        """The command of a training with that many steps."""
        data = ["--dataset", self.args.dataset, "--epochs", "1", "--quiet", "--log", log]
        size = ["--batch-size", IMAGES, "--subset", min(steps * IMAGES * ranks, 50_000)]
        metrics = ["--save-metrics", log.with_suffix(".npz")]
        return [sys.executable, TRAIN, *data, *size, *metrics, *options]

    def profile(self, hosts: Hosts, folder: Path, options: list):
        """The step of one rank while as many one-rank runs share the machine."""
        processes = []
        for host in range(1, hosts.count + 1):
            log = folder / f"one{host}.csv"
            command = self.training(log, self.args.profile_steps, 1, options)
            command += ["--trace", log.with_suffix(".trace")]
            processes.append(start(hosts.on_host(host, command), folder))
        for process in processes:
            finish(process)
        return read_profile(folder / "one1.csv")

    def measure_point(self, hosts, folder, network, name, options) -> dict:
        """Measure the step of one rank before and after that of all, and predict from the former.

        Where the two differ much something else was running: all three are measured again.
        """
        algorithm, local_steps = algorithm_of(name)
        # On one rank the rungs of --reduce do nothing; --compress and --local-steps cost something
        # even there, which belongs to the prediction.
        local_options = [] if name in REDUCERS else options
        attempts = 0
        drift = float("inf")
        while drift > DRIFT and attempts < ATTEMPTS:
            attempts += 1
            wait_until_idle()
            before = self.profile(hosts, folder, local_options)
            expected = predict(
                before, network, ALGORITHMS[algorithm], hosts.count, local_steps=local_steps
            )
            steps = int(min(max(self.args.step_seconds / expected.step, MIN_STEPS), MAX_STEPS))
            steps = -(-(steps + SETTLE) // local_steps) * local_steps
            log = folder / "ranks.csv"
            command = self.training(log, steps, hosts.count, options)
            finish(start(hosts.mpirun(command), folder), timeout=600)
            settle = local_steps if local_steps > 1 else SETTLE
            measured, counted = mean_step(log, settle)

            after = self.profile(hosts, folder, local_options)
            drift = abs(after.mean - before.mean) / measured
        return {
            "hosts": hosts.count,
            "rate": hosts.rate,
            "configuration": name,
            "measured": measured,
            "steps": counted,
            "drift": drift,
            "attempts": attempts,
            "machine": describe_machine(environment()),
            "profile": write_profile(merge_profiles(before, after)),
        }

    def measure_accuracy(self, name: str, options: list):
        """Train on two ranks of this machine, for the accuracy: the links do not change it."""
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            log = folder / "accuracy.csv"
            command = [find_mpirun(), "-np", "2", sys.executable, TRAIN, *options]
            command += ["--dataset", self.args.dataset, "--quiet", "--log", log, *ACCURACY_RUN]
            command += ["--save-metrics", log.with_suffix(".npz"), "--seed", "SEED"]
            if self.args.subset:
                command += ["--subset", self.args.subset]
            accuracies = self.content["accuracy"].setdefault(name, {})
            for seed in map(str, self.args.seeds):
                if seed in accuracies or self.is_late():
                    continue
                words = [seed if word == "SEED" else str(word) for word in command]
                finish(start(words, folder), timeout=1200)
                metadata = json.loads(log.with_suffix(".json").read_text())
                accuracies[seed] = metadata["totals"]["final_accuracy"]
                self.content["accuracy_run"] = {
                    "epochs": metadata["arguments"]["epochs"],
                    "images": metadata["train_images"],
                    "global_batch_size": metadata["arguments"]["global_batch_size"],
                    "dataset": metadata["dataset"],
                }
                self.save()
                print(f"{name}, seed {seed}: {accuracies[seed]:.2%}", flush=True)


def describe_machine(env: dict) -> str:
    """The processor and its cores, of an environment()."""
    # Processors of one name may differ in their vector instructions: OpenBLAS names what it uses.
    kernels = ", ".join(sorted({blas["kernel"] for blas in env["blas"]}))
    return f"{env['cpu']} (OpenBLAS uses its {kernels} kernels), {len(env['cores'])} cores"


def wait_until_idle():
    """Wait until nothing else keeps the processors busy, for IDLE_PATIENCE seconds at most."""
    deadline = time.monotonic() + IDLE_PATIENCE
    while psutil.cpu_percent(interval=0.5) > IDLE and time.monotonic() < deadline:
        pass


def mean_step(log: Path, settle: int) -> tuple[float, int]:
    """The mean seconds of a step after the first `settle`, and how many steps that are."""
    with open(log, newline="") as file:
        ends = [float(row["duration"]) for row in csv.DictReader(file) if row["type"] == str(BATCH)]
    counted = len(ends) - settle
    return (ends[-1] - ends[settle - 1]) / counted, counted


# --------------------------------------------------------------------------------------------------
# What came out
# --------------------------------------------------------------------------------------------------


def place_of(point: dict) -> str:
    return f"{point['hosts']} hosts, {point['rate']:g} Mbit/s"


def add_prediction(content: dict, point: dict) -> dict:
    """The point with "one_rank" and "predicted", seconds of a step: of its profile and network.

    The file has what was measured alone, so that a better model needs no other measurement.
    """
    profile = profile_from_json(point["profile"])
    network = network_from_json(content["networks"][place_of(point)]["network"])
    algorithm, local_steps = algorithm_of(point["configuration"])
    predicted = predict(
        profile, network, ALGORITHMS[algorithm], point["hosts"], local_steps=local_steps
    )
    return {**point, "one_rank": profile.mean, "predicted": predicted.step}


def all_points(content: dict) -> list[dict]:
    """All points with their predictions."""
    return [add_prediction(content, point) for point in content["points"].values()]


def share_of_communication(point: dict) -> float:
    """How much of the measured step one rank alone does not have."""
    return max(0.0, 1 - point["one_rank"] / point["measured"])


def error_of(point: dict) -> float:
    return point["predicted"] / point["measured"] - 1


def describe_point(point: dict) -> str:
    return (
        f"{place_of(point)}, {point['configuration']}: {1e3 * point['measured']:.1f} ms a step, "
        f"predicted {1e3 * point['predicted']:.1f} ({error_of(point):+.1%}), communication "
        f"{share_of_communication(point):.0%}"
    )


def verdict(points: list[dict]) -> dict:
    """The errors of all points where communication matters, against the limits."""
    counted = [point for point in points if share_of_communication(point) >= MATTERS]
    errors = [abs(error_of(point)) for point in counted]
    return {
        "points": len(points),
        "counted": len(counted),
        "within": sum(error <= LIMIT_EACH for error in errors),
        "largest": max(errors, default=0.0),
        "median": statistics.median(errors) if errors else 0.0,
    }


def machines_line(content: dict) -> str:
    """On which machines the points were measured; each is predicted from its own one-rank runs."""
    first = describe_machine(content["environment"])  # of points that do not say
    machines = [point.get("machine", first) for point in content["points"].values()]
    counts = [f"{name}: {machines.count(name)}" for name in dict.fromkeys(machines)]
    return f"Points by machine: {'; '.join(counts)}."


def verdict_line(points: list[dict]) -> str:
    found = verdict(points)
    return (
        f"Where communication is at least {MATTERS:.0%} of a step, {found['within']} of "
        f"{found['counted']} predictions are within {LIMIT_EACH:.0%}; the median error is "
        f"{found['median']:.1%} (aim: {LIMIT_MEDIAN:.0%}), the largest {found['largest']:.1%}."
    )


def rungs(content: dict) -> list[dict]:
    """The points of --reduce, which all compute the serial run."""
    return [point for point in all_points(content) if point["configuration"] in REDUCERS]


POINT_HEADER = (
    "hosts",
    "Mbit/s",
    "configuration",
    "measured, ms",
    "predicted, ms",
    "error",
    "communication",
)


def point_rows(points: list[dict]) -> list[list[str]]:
    rows = []
    for point in sorted(points, key=lambda point: (point["hosts"], point["rate"])):
        cells = [
            str(point["hosts"]),
            f"{point['rate']:,g}",
            point["configuration"],
            f"{1e3 * point['measured']:,.1f}",
            f"{1e3 * point['predicted']:,.1f}",
            f"{error_of(point):+.1%}",
            f"{share_of_communication(point):.0%}",
        ]
        rows.append(cells)
    return rows


SLOW_HEADER = (
    "configuration",
    "20 Mbit/s, images/s",
    "× allreduce",
    "predicted",
    "100 Mbit/s, images/s",
    "× allreduce",
    "predicted",
    "test accuracy",
)


def slow_rows(content: dict) -> list[list[str]]:
    """Images/s on both slow links and the accuracy of each configuration."""
    rows = []
    points = {
        f"{place_of(point)}, {point['configuration']}": point for point in all_points(content)
    }
    for name in ("allreduce", *SLOW):
        cells = [name]
        for rate in SLOW_RATES:
            point = points.get(f"2 hosts, {rate} Mbit/s, {name}")
            plain = points.get(f"2 hosts, {rate} Mbit/s, allreduce")
            if point is None or plain is None:
                cells += ["–", "–", "–"]
                continue
            images = point["hosts"] * IMAGES
            cells += [
                f"{images / point['measured']:,.0f}",
                f"{plain['measured'] / point['measured']:.1f}",
                f"{images / point['predicted']:,.0f}",
            ]
        cells.append(accuracy_cell(content["accuracy"].get(name, {})))
        rows.append(cells)
    return rows


def accuracy_cell(by_seed: dict) -> str:
    """Mean and range over the seeds."""
    values = list(by_seed.values())
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2%}"
    return f"{statistics.mean(values):.2%} ({min(values):.2%}–{max(values):.2%})"


def draw(content: dict, path: Path):
    """Step time over the rate, measured points over predicted lines; errors below."""
    from figures import figure_style, make_figure
    from plots import COLORS, LINES, MARKERS
    from predict_scaling import save_figure

    with figure_style():
        figure, axes = make_figure(4.4, 2, 2, sharex="col", height_ratios=(2, 1))
        for column, (title, names) in enumerate(
            (("--reduce, 2 hosts", tuple(REDUCERS)), ("less communication, 2 hosts", tuple(SLOW)))
        ):
            above, below = axes[:, column]
            for i, name in enumerate(names):
                points = [
                    point
                    for point in all_points(content)
                    if point["configuration"] == name and point["hosts"] == 2
                ]
                points.sort(key=lambda point: point["rate"])
                rates = [point["rate"] for point in points]
                style = {"color": COLORS[i]}
                predicted = [1e3 * point["predicted"] for point in points]
                measured = [1e3 * point["measured"] for point in points]
                above.plot(rates, predicted, linestyle=LINES[i], **style)
                above.plot(rates, measured, marker=MARKERS[i], ls="", label=name, **style)
                errors = [100 * error_of(point) for point in points]
                below.plot(rates, errors, marker=MARKERS[i], ls="", **style)
            above.set(xscale="log", yscale="log", title=title)
            above.legend()
            below.axhspan(-100 * LIMIT_EACH, 100 * LIMIT_EACH, color="0.93", zorder=0)
            below.set(xlabel="rate of each link, Mbit/s", ylim=(-32, 32))
        axes[0, 0].set_ylabel("a step, ms")
        axes[1, 0].set_ylabel("prediction is off by, %")
        save_figure(figure, path.with_suffix(""))


def report(content: dict, figure: str | None):
    """Print the tables; draw the figure if its path is given."""
    print(format_table(POINT_HEADER, point_rows(all_points(content))))
    print(f"\n{verdict_line(rungs(content))}\n{machines_line(content)}\n")
    print(format_table(SLOW_HEADER, slow_rows(content)))
    if figure:
        draw(content, Path(figure))
        print(f"\nwritten: {figure}")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser("check_prediction", __doc__)
    add = parser.add_argument
    output = "results/check_prediction.json"
    add("--output", metavar="FILE", default=output, help="default: %(default)s")
    add("--report", metavar="FILE", help="measure nothing: print the tables of this file")
    add("--figure", metavar="FILE", help="draw the figure here, as PNG and SVG")
    add("--seconds", type=number(float, 0, 10**6), help="begin no further point after so long")
    add("--accuracy", action="store_true", help="measure accuracies, which needs no slow links")
    rate = number(float, 0.1, 10**5)
    hosts = number(int, 2, 64)
    add("--rates", type=rate, nargs="*", default=RATES, help="Mbit/s of two hosts")
    add("--slow-rates", type=rate, nargs="*", default=SLOW_RATES, help="of what sends less")
    add("--more-hosts", type=hosts, nargs="*", default=(3, 4), help="default: 3 4")
    add("--more-rates", type=rate, nargs="*", default=(50,), help="Mbit/s of more hosts")
    add("--step-seconds", type=number(float, 0.1, 600), default=STEP_SECONDS, help="a training")
    steps = number(int, 30, 1500)
    add("--profile-steps", type=steps, default=PROFILE_STEPS, help="of one-rank runs")
    dataset = ("auto", "cifar10", "synthetic")
    add("--dataset", choices=dataset, default="auto", help="default: %(default)s")
    add("--seeds", type=number(int, 0, 10**6), nargs="+", default=(42, 43), help="of --accuracy")
    add("--subset", type=number(int, 1, 50_000), metavar="N", help="images of --accuracy")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.figure and Path(args.figure).suffix != ".png":
        raise InputError("--figure: give a name that ends with .png")
    if args.report:
        report(read_json(Path(args.report), "give a file of --output"), args.figure)
        return
    check_outputs([args.output, args.figure])
    measurement = Measurement(args)
    if args.accuracy:
        for name, options in {"allreduce": ["--reduce", "allreduce"], **SLOW}.items():
            measurement.measure_accuracy(name, options)
    else:
        reason = why_not()
        if reason:
            print(f"skipped: {reason}")
            return
        for place in plan(args):
            if not measurement.measure_place(*place):
                print("the time is over: start again for what is missing")
                return
    report(measurement.content, args.figure)


if __name__ == "__main__":
    run_main(main)
