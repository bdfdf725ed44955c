"""Build all numbers of the pages from measurements/: tables, results, the example of a report.

- Tables: in README.md and docs/*.md, all between the two lines `<!-- table: NAME -->` and
  `<!-- end -->`.
- Results: in the docstrings of training scripts, the paragraph that starts with `Result: `.
- docs/figures: what each rung of the ladders bought, of measurements/ladder; predicted scaling and
  its check, of measurements/prediction.json and check_prediction.json; the curves of `make
  accuracy`, of measurements/resnet18.
- docs/report: the report that make_report.py writes of measurements/experiments.json and .csv.

`make measure` makes the measurements. --collect packs them into a few files in measurements/: the
JSON files of bench.py and train_resnet50_split_cores.py as they are, and each results folder of
run_experiments.py as two files. The .json file is its index, with the metadata of each run; the
.csv file has the logs of all runs, without most rows of single batches. What other targets measure
comes along if it is there: `make predict`, `make check-prediction`, `make accuracy`.

    make readme
    python experiments/update_readme.py --check       # exit status 1 if a page is not up to date
    python experiments/update_readme.py --collect results/measured
"""

import csv
import functools
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections import defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # common.py is at the top level
import check_prediction
import scaling_tables
from common import (
    BATCH,
    LOG_COLUMNS,
    TRAIN,
    VALIDATE,
    InputError,
    Parser,
    TrainingError,
    atomic_write,
    run_main,
)

MEASUREMENTS = REPO / "measurements"
REPORT = REPO / "docs/report"
FIGURES = REPO / "docs" / "figures"

BENCHMARKS = ("bench.json", "loading.json", "split_cores.json")
PREDICTION = "prediction.json"  # of make predict and make check-prediction; not of make measure
CHECK = "check_prediction.json"
ACCURACY = "resnet18"  # .csv and .json, the log and metadata of make accuracy
OTHER_MACHINES = "other_machines"  # folder: NAME.json is what bench.py has written elsewhere
RESULTS_FOLDERS = ("experiments", "training", "ladder")  # written by run_experiments.py
RUN_COLUMNS = ("suite", "configuration", "repeat")  # name a run, in the index and in a packed .csv

TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
RESULT = re.compile(r'^Result: .*?(?=\n\s*\n|\n?""")', re.S | re.M)

IDEAS = {  # of the scripts, in their table
    "serial_cnn.py": "the network from scratch in NumPy on one core: from loops to Winograd",
    "parallel_cnn_mpi.py": "data parallel over MPI ranks: from one Allreduce to shared memory",
    "parallel_cnn_hybrid.py": "MPI ranks × threads: the layers as Numba kernels",
    "gpu_scratch.py": "the same networks on a GPU: own CUDA kernels, cuBLAS, no cuDNN",
    "train_cifar.py": "PyTorch, from tutorial to tuned; data from memory, disk or S3",
    "train_resnet50_split_cores.py": "PyTorch: forward and backward pass on separate CPU cores",
    "demo.py": "serial, MPI and hybrid train live in one terminal, then their speed-ups",
    "common.py": "what they share: data, layers, models, optimizers, run log, checkpoints",
}
SPLIT_ROWS = {  # name in split_cores.json → name in the table
    "all": "`all`",
    "split": "`split`",
    "pipelined": "`pipelined`",
    "replicas": "`replicas`",
    "all, 1 micro-batch": "`all`, no micro-batches",
    "all, 1 micro-batch, float32 NCHW": "stock PyTorch",
}


# --------------------------------------------------------------------------------------------------
# Collecting: a folder of measurements → measurements/
# --------------------------------------------------------------------------------------------------


def collect(source, measurements):
    """Pack what was measured into `source`. Raises InputError with the names of missing files."""
    needed = [source / name for name in BENCHMARKS]
    needed += [source / name / "index.json" for name in RESULTS_FOLDERS]
    missing = [str(path) for path in needed if not path.is_file()]
    if missing:
        raise InputError(f"there is no {', '.join(missing)}: make measure makes all of them")

    for name in (*BENCHMARKS, PREDICTION, CHECK):
        if name in BENCHMARKS or (source / name).is_file():
            write(measurements / name, without_paths((source / name).read_text(), source))
    for name in RESULTS_FOLDERS:
        pack_results(source / name, measurements / name, source)
    if (source / f"{ACCURACY}.csv").is_file():
        pack_run(source / ACCURACY, measurements / ACCURACY, source)


def pack_run(run, packed, source):
    """Pack the log and the metadata of one run, without most rows of single batches."""
    rows = [row for row in read_csv(run.with_suffix(".csv")) if is_kept(row)]
    write_csv(packed.with_suffix(".csv"), LOG_COLUMNS, rows)
    metadata = read_json(run.with_suffix(".json"))
    write(packed.with_suffix(".json"), without_paths(to_json(metadata), source))


def pack_results(folder, packed, source):
    """Pack a results folder of run_experiments.py into two files, `packed`.json and `packed`.csv.

    The .json is the folder's index.json, with the run.json of each run added as its "metadata", and
    the trace.json of a first repeat as its "trace".
    The .csv has the rows of all run.csv, with RUN_COLUMNS before LOG_COLUMNS.
    """
    index = read_json(folder / "index.json")
    rows = []
    for run in index["runs"]:
        metadata = folder / run["folder"] / "run.json"
        run["metadata"] = read_json(metadata) if metadata.exists() else None  # None: it failed
        trace = folder / run["folder"] / "trace.json"
        if run["repeat"] == 1 and trace.exists():
            run["trace"] = read_json(trace)
        log = folder / run["folder"] / "run.csv"
        if log.exists():
            # Cells stay text, so that what is unpacked is what was packed, digit by digit.
            rows += [{**run, **row} for row in read_csv(log) if is_kept(row)]

    write(packed.with_suffix(".json"), without_paths(to_json(index), source))
    write_csv(packed.with_suffix(".csv"), (*RUN_COLUMNS, *LOG_COLUMNS), rows)


def is_kept(row):
    """True for a row of an epoch, and for its last batch, whose row sums up the phases."""
    is_last_batch = row["value1"] == row["value2"]
    return row["type"] != str(BATCH) or is_last_batch


def without_paths(text, source):
    """JSON with paths relative to `source` or the repository, and `python` as the interpreter."""
    # A committed file should not depend on whose home it was measured in.
    text = text.replace(json.dumps(sys.executable), '"python"')
    text = text.replace(f"{source.resolve()}/", "")
    return text.replace(f"{REPO}/", "")


def unpack_results(packed, folder):
    """The reverse of pack_results(): make a results folder that analyze_results.py can read."""
    index = read_json(packed.with_suffix(".json"))
    logs = read_logs(packed)
    for run in index["runs"]:
        place = folder / run["folder"]
        place.mkdir(parents=True)
        metadata = run.pop("metadata")
        if metadata is not None:
            (place / "run.json").write_text(to_json(metadata))
        if "trace" in run:
            (place / "trace.json").write_text(to_json(run.pop("trace")))
        log = logs[run_key(run)]
        if log:
            write_csv(place / "run.csv", LOG_COLUMNS, log)
    (folder / "index.json").write_text(to_json(index))


def read_logs(packed):
    """{(suite, configuration, repeat): rows of the run's log} of packed results."""
    logs = defaultdict(list)
    for row in read_csv(packed.with_suffix(".csv")):
        logs[run_key(row)].append(row)
    return logs


def run_key(run):
    return tuple(str(run[column]) for column in RUN_COLUMNS)


# --------------------------------------------------------------------------------------------------
# Tables: measurements/ → Markdown
# --------------------------------------------------------------------------------------------------


def markdown_table(header, rows):
    """A table in Markdown. header: its cells, with ` | ` between them; rows: lists of cells."""
    titles = header.split(" | ")
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def ratio_with_range(row):
    return f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"


def scripts_as_code(name):
    """The name of a benchmark, script and option marked as code, networks spelt properly."""
    name = re.sub(r"\w+\.py( --[\w-]+( \w+)?)*", r"`\g<0>`", name)
    return name.replace("resnet", "ResNet-").replace("cnn,", "CNN,")


def rate_cells(row):
    """What both tables of bench.json begin with."""
    name = scripts_as_code(row["name"])
    return [name, f"{row['ours']:,.0f}", f"{row['baseline']:,.0f}", ratio_with_range(row)]


def bench_rows(measurements, scaling):
    """The rows of bench.json that compare with PyTorch or (scaling) with ourselves on one core."""
    rows = read_json(measurements / "bench.json")["rows"]
    return [row for row in rows if ("cores" in row) == scaling]


def find_row(measurements, start):
    """The last row of bench.json whose name starts so, which is that with the most cores."""
    rows = read_json(measurements / "bench.json")["rows"]
    found = [row for row in rows if row["name"].startswith(start)]
    if not found:
        raise InputError(f"{measurements / 'bench.json'} has no row {start}: make measure")
    return found[-1]


def speed_table(measurements, part=None):
    """Each script beside PyTorch.

    part: "scratch", those that are written from scratch; "pytorch", train_cifar.py, which is
    PyTorch itself, beside PyTorch as tutorials use it; None, all.
    """
    cells = []
    for row in bench_rows(measurements, scaling=False):
        row_part = "pytorch" if row["name"].startswith("train_cifar.py") else "scratch"
        if part not in (None, row_part):
            continue
        of_sgemm = f"{row['of_sgemm']:.0%}" if "of_sgemm" in row else "–"
        cells.append([*rate_cells(row), of_sgemm, str(row["n"])])
    header = "training, images/s | ours | PyTorch | ratio (min–max) | of sgemm | n"
    return markdown_table(header, cells)


def scaling_table(measurements):
    """Each parallel script beside our own work on one core."""
    cells = []
    for row in bench_rows(measurements, scaling=True):
        efficiency = f"{row['efficiency']:.0%}"
        bound = "–"
        if "of_bound" in row:
            bound = f"{row['of_bound']:.0%} ({row['of_bound_min']:.0%}–{row['of_bound_max']:.0%})"
        communication = f"{row['communication']:.1%}"
        cells.append([*rate_cells(row), efficiency, bound, communication, str(row["n"])])
    rates = "training, images/s | ours | on one core"
    shares = "efficiency | of the bound (min–max) | communication"
    header = f"{rates} | speed-up (min–max) | {shares} | n"
    return markdown_table(header, cells)


def machines_table(measurements):
    """The ratios of bench.json beside those of other machines, and which machines they are."""
    files = {"README": measurements / "bench.json"}
    for path in sorted((measurements / OTHER_MACHINES).glob("*.json")):
        files[path.stem] = path
    contents = {name: read_json(path) for name, path in files.items()}
    rows = {name: {r["name"]: r for r in c["rows"]} for name, c in contents.items()}
    cells = []
    for name in rows["README"]:
        shown = [machine_cell(of_machine.get(name)) for of_machine in rows.values()]
        cells.append([scripts_as_code(name), *shown])
    table = markdown_table(" | ".join(["ratio (min–max); of the bound", *files]), cells)
    notes = [f"{name}: {machine_and_versions([c['environment']])}" for name, c in contents.items()]
    return f"{table}\n{''.join(bullet(note) for note in notes)}"


def machine_cell(row):
    """The ratio of a row of bench.json and its share of the bound; – without the row."""
    if row is None:
        return "–"
    of_bound = f"; {row['of_bound']:.0%}" if "of_bound" in row else ""
    return f"{ratio_with_range(row)}{of_bound}"


def loading_table(measurements):
    """Each source of train_cifar.py: its rate alone, and how long a training waits for it."""
    cells = []
    for row in read_json(measurements / "loading.json")["rows"]:
        source, workers = row["name"].removesuffix(" workers").rsplit(", ", 1)
        epochs = zip(row["waiting_s"], row["total_s"], strict=True)
        megabytes_per_s = row["images_per_s"] * 3072e-6  # an image has 32 · 32 · 3 bytes
        cells.append(
            [
                source,
                workers,
                f"{row['images_per_s']:,.0f} ({row['min']:,.0f}–{row['max']:,.0f})",
                f"{megabytes_per_s:,.0f}",
                f"{row['peak_ram_mb']:,.0f} MiB",
                *(f"{waiting / total:.2%}" for waiting, total in epochs),
            ]
        )
    header = (
        "source | workers | alone, images/s | MB/s | peak RAM | waiting, first epoch | second epoch"
    )
    return markdown_table(header, cells)


def split_table(measurements):
    """Each mode of train_resnet50_split_cores.py, and the findings that its benchmark prints."""
    content = read_json(measurements / "split_cores.json")
    cells = []
    for name, shown in SPLIT_ROWS.items():
        rate, rate_min, rate_max = split_rates(content, name)
        ratio, ratio_min, ratio_max = split_ratios(content, name)
        samples = content["turns"][name]
        medians = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
        cells.append(
            [
                shown,
                f"{rate:.1f} ({rate_min:.1f}–{rate_max:.1f})",
                f"{medians['forward']:.3f}",
                f"{medians['backward']:.3f}",
                f"{medians['forward_idle']:.0%}",
                f"{medians['backward_idle']:.0%}",
                f"{ratio:.2f} ({ratio_min:.2f}–{ratio_max:.2f})",
            ]
        )
    seconds = "images/s | forward, s | backward, s"
    header = f" | {seconds} | idle: forward's cores | backward's cores | against `all`"
    rounds = len(content["turns"]["all"])
    findings = "".join(bullet(sentence) for sentence in content["findings"])
    table = markdown_table(header, cells)
    return f"{table}\nFindings that the benchmark prints ({rounds} rounds):\n\n{findings}"


def bullet(text):
    return textwrap.fill(text, 110, initial_indent="- ", subsequent_indent="  ") + "\n"


def split_rates(content, name):
    """Median, least and greatest images/s over the rounds."""
    images = content["arguments"]["batch_size"]
    rates = [images / sample["seconds"] for sample in content["turns"][name]]
    return statistics.median(rates), min(rates), max(rates)


def split_ratios(content, name):
    """Speed relative to mode `all`, round by round: median, least and greatest."""
    pairs = zip(content["turns"]["all"], content["turns"][name], strict=True)
    ratios = [baseline["seconds"] / sample["seconds"] for baseline, sample in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


def training_table(measurements):
    """Whole trainings: accuracy, time and memory."""
    cells = []
    for run in read_trainings(measurements, "parallel").values():
        cells.append(
            [
                f"`{run['configuration']}`",
                f"{run['accuracy']:.2%} (epoch {run['best_epoch']} of {run['epochs']})",
                f"{run['seconds']:.0f} s",
                f"{run['images_per_s']:,.0f}",
                f"{run['peak_ram_mb']:,.0f} MiB",
            ]
        )
    header = " | best test accuracy | training time | images/s | peak RAM (of rank 0)"
    return markdown_table(header, cells)


def recipes_table(measurements):
    """The CNN with its defaults, and with what keeps it from overfitting."""
    cells = []
    for run in read_trainings(measurements, "recipes").values():
        options = run["options"]
        cells.append(
            [
                f"`{' '.join(options)}`" if options else "defaults",
                f"{run['accuracy']:.2%} (epoch {run['best_epoch']} of {run['epochs']})",
                f"{run['last_accuracy']:.2%}",
                f"{run['train_accuracy']:.2%}",
            ]
        )
    header = " | best test accuracy | after the last epoch | on the training images then"
    return markdown_table(header, cells)


def read_trainings(measurements, suite):
    """{configuration: what the tables and results show of it} of training.json and training.csv."""
    packed = measurements / "training"
    logs = read_logs(packed)
    trainings = {}
    for run in read_json(packed.with_suffix(".json"))["runs"]:
        if run["suite"] != suite:
            continue
        trainings[run["configuration"]] = {
            "configuration": run["configuration"],
            "options": recipe_options(run["command"]),
            **summarize_training(logs[run_key(run)], run["metadata"]),
        }
    return trainings


def summarize_training(log, metadata):
    """What tables show of a training. log: its rows of epochs; metadata: its run.json."""
    trained = [row for row in log if row["type"] == str(TRAIN)]
    tested = [row for row in log if row["type"] == str(VALIDATE)]
    best = max(tested, key=lambda row: float(row["value1"]))
    seconds = sum(float(row["duration"]) for row in trained)
    return {
        "accuracy": float(best["value1"]),
        "last_accuracy": float(tested[-1]["value1"]),
        "train_accuracy": float(trained[-1]["value1"]),
        "best_epoch": int(best["epoch"]),
        "epochs": max(int(row["epoch"]) for row in tested),
        "seconds": seconds,
        "images_per_s": metadata["totals"]["train_images"] / seconds,
        "peak_ram_mb": metadata["totals"]["peak_ram_mb"],
    }


def recipe_options(command):
    """The options of a command line that make it another recipe than the defaults."""
    names = ("--augment", "--schedule", "--weight-decay", "--epochs")
    words = command[command.index("--dataset") :]  # what comes before is the suite's, for all runs
    pairs = itertools.pairwise(words)
    return [word for pair in pairs if pair[0] in names for word in pair]


def accuracy_table(measurements):
    """The training of make accuracy, which may be of another machine than the other tables."""
    run, metadata = read_accuracy(measurements)
    cells = [
        f"{run['accuracy']:.2%} (epoch {run['best_epoch']} of {run['epochs']})",
        f"{run['train_accuracy']:.2%}",
        f"{run['seconds'] / 60:.0f} min",
        f"{run['images_per_s']:,.0f}",
        f"{run['peak_ram_mb']:,.0f} MiB",
    ]
    header = "best test accuracy | training images | training time | images/s | peak RAM"
    table = markdown_table(header, [cells])
    note = f"In {run['precision']}: {machine_and_versions([metadata])}"
    return f"{table}\n{bullet(note)}"


def read_accuracy(measurements):
    """(what tables show of the training of make accuracy, its metadata)."""
    path = measurements / f"{ACCURACY}.csv"
    metadata = read_json(path.with_suffix(".json"))
    is_float32 = metadata["arguments"]["amp"] == "off"
    run = {"precision": "float32" if is_float32 else "bfloat16"}
    return {**run, **summarize_training(read_csv(path), metadata)}, metadata


def machine_line(measurements):
    """The machine and software of all measurements. Raises InputError for several machines."""
    environments = read_environments(measurements)
    machines = {describe_machine(environment) for environment in environments}
    if len(machines) > 1:
        raise InputError(
            f"{measurements} has measurements of several machines ({'; '.join(sorted(machines))}): "
            "make measure on one of them"
        )
    return f"{machine_and_versions(environments)}\n"


def machine_and_versions(environments):
    """The machine, the software of the first environment, and the commits of all."""
    first = environments[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    commits = list(dict.fromkeys(environment["git_commit"][:12] for environment in environments))
    commit = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    return f"{describe_machine(first)}; {versions}; {commit}."


def read_environments(measurements):
    """The environment of each measurement, that of bench.json first."""
    environments = [read_json(measurements / name)["environment"] for name in BENCHMARKS]
    for name in RESULTS_FOLDERS:
        runs = read_json(measurements / f"{name}.json")["runs"]
        environments += [run["metadata"] for run in runs if run["metadata"]]
    return environments


def describe_machine(environment):
    gigabytes = round(environment["memory_mb"] / 1024)
    return f"{check_prediction.describe_machine(environment)}, {gigabytes} GiB of memory"


def scripts_table(measurements):
    """The scripts: their ideas, their sizes, and what they reach in one measurement each."""
    serial = find_row(measurements, "serial_cnn.py, CNN, batch 32,")
    mpi = find_row(measurements, "parallel_cnn_mpi.py, weak")
    hybrid = find_row(measurements, "parallel_cnn_hybrid.py, batch 128,")
    pytorch = find_row(measurements, "train_cifar.py, resnet50,")
    split = read_json(measurements / "split_cores.json")
    speeds = {
        "serial_cnn.py": (serial["ours"], serial["ratio"], "PyTorch"),
        "parallel_cnn_mpi.py": (mpi["ours"], mpi["ratio"], "one core"),
        "parallel_cnn_hybrid.py": (hybrid["ours"], hybrid["ratio"], "one core"),
        "train_cifar.py": (pytorch["ours"], pytorch["ratio"], "PyTorch"),
        "train_resnet50_split_cores.py": (
            split_rates(split, "pipelined")[0],
            split_ratios(split, "pipelined")[0],
            "all cores",
        ),
    }
    cells = []
    for script, idea in IDEAS.items():
        lines = len((REPO / script).read_text().splitlines())
        speed = ["–", "–"]
        if script in speeds:
            rate, ratio, baseline = speeds[script]
            speed = [f"{rate:,.0f}", f"{ratio:.2f} × {baseline}"]
        cells.append([f"`{script}`", idea, f"{round(lines, -1):,}", *speed])
    return markdown_table("script | idea | lines | images/s | speed-up", cells)


def show_tables(tables):
    """Tables of scaling_tables.py with their notes."""
    parts = []
    for table in tables:
        notes = "".join(bullet(note) for note in table.notes)
        parts.append(
            f"{table.title}:\n\n{markdown_table(' | '.join(table.header), table.rows)}\n{notes}"
        )
    return "\n".join(parts)


def prediction_table(measurements):
    return show_tables(scaling_tables.prediction_tables(measurements / PREDICTION))


def check_table(measurements, part):
    """part: "links", the rungs of --reduce; "slow", what sends less."""
    links, slow = scaling_tables.check_tables(measurements / CHECK)
    return show_tables([links if part == "links" else slow])


def published_table(_):
    return show_tables([scaling_tables.published_table()])


TABLES = {  # NAME-PART has some of the rows of table NAME
    "scripts": scripts_table,
    "speed": speed_table,
    "speed-scratch": functools.partial(speed_table, part="scratch"),
    "speed-pytorch": functools.partial(speed_table, part="pytorch"),
    "scaling": scaling_table,
    "machines": machines_table,
    "loading": loading_table,
    "split": split_table,
    "training": training_table,
    "recipes": recipes_table,
    "accuracy": accuracy_table,
    "prediction": prediction_table,
    "check-links": functools.partial(check_table, part="links"),
    "check-slow": functools.partial(check_table, part="slow"),
    "published": published_table,
    "machine": machine_line,
}


def fill_in_tables(pages, measurements):
    """Build each table in pages {path: text} anew; returns the pages with them.

    Raises InputError for a table that is not in TABLES, and for one of TABLES that no page has.
    """
    shown = set()

    def build(match):
        start, name, end = match.groups()
        if name not in TABLES:
            raise InputError(f"there is no table {name!r}; there are: {', '.join(TABLES)}")
        shown.add(name.partition("-")[0])
        return start + TABLES[name](measurements) + end

    filled_in = {path: TABLE.sub(build, text) for path, text in pages.items()}
    missing = [name for name in TABLES if name.partition("-")[0] not in shown]
    if missing:
        raise InputError(f"no page has the table {missing[0]}: put it between its two comments")
    return filled_in


# --------------------------------------------------------------------------------------------------
# Results: measurements/ → the docstring of a script
# --------------------------------------------------------------------------------------------------


def beside_pytorch(row):
    ours = f"{row['ours']:,.0f} images/s"
    return f"{ours}, {ratio_with_range(row)} times PyTorch's {row['baseline']:,.0f}"


def conditions(measurements, row):
    cpu = read_json(measurements / "bench.json")["environment"]["cpu"]
    return f"{cpu}; median (min–max) of {row['n']} paired samples"


def training_result(measurements, configuration):
    run = read_trainings(measurements, "parallel")[configuration]
    return (
        f"{run['epochs']} epochs on all of CIFAR-10 take {run['seconds']:.0f} s; the best test "
        f"accuracy, in epoch {run['best_epoch']}, is {run['accuracy']:.2%}."
    )


def serial_result(measurements):
    small = find_row(measurements, "serial_cnn.py, CNN, batch 32,")
    large = find_row(measurements, "serial_cnn.py, CNN, batch 128,")
    return (
        f"the CNN on one core. Batch 32: {beside_pytorch(small)}. Batch 128: "
        f"{beside_pytorch(large)} ({conditions(measurements, large)}). "
        f"{training_result(measurements, 'serial')}"
    )


def mpi_result(measurements):
    weak = find_row(measurements, "parallel_cnn_mpi.py, weak")
    return (
        f"the CNN on {weak['cores']} ranks, 32 images each: {weak['ours']:,.0f} images/s, "
        f"{ratio_with_range(weak)} times serial_cnn.py on one core in the same turns "
        f"({conditions(measurements, weak)}). "
        f"With a global batch of 32, {training_result(measurements, 'mpi-2-strong')}"
    )


def hybrid_result(measurements):
    cnn = find_row(measurements, "parallel_cnn_hybrid.py, CNN, batch 128,")
    resnet = find_row(measurements, "parallel_cnn_hybrid.py, resnet18, batch 64,")
    return (
        f"one rank on {cores_of(cnn)}. The CNN, batch 128: {beside_pytorch(cnn)}. ResNet-18, "
        f"batch 64: {beside_pytorch(resnet)} ({conditions(measurements, resnet)})."
    )


def train_cifar_result(measurements):
    row = find_row(measurements, "train_cifar.py, resnet50, batch 64,")
    run, metadata = read_accuracy(measurements)
    return (
        f"ResNet-50, batch 64, on {cores_of(row)}: {beside_pytorch(row)} in float32, "
        f"NCHW and with a DataLoader ({conditions(measurements, row)}). "
        f"ResNet-18 reaches {run['accuracy']:.2%} on the test images in {run['epochs']} epochs, "
        f"{run['seconds'] / 60:.0f} minutes on {len(metadata['cores'])} cores in "
        f"{run['precision']} (make accuracy)."
    )


def cores_of(row):
    """`2 cores` of a row whose name ends with it."""
    return row["name"].rpartition(", ")[2]


def split_result(measurements):
    content = read_json(measurements / "split_cores.json")
    arguments = content["arguments"]
    environment = content["environment"]
    speeds = []
    for mode in ("all", "split", "pipelined", "replicas"):
        rate, _, _ = split_rates(content, mode)
        ratio, ratio_min, ratio_max = split_ratios(content, mode)
        beside = f", {ratio:.2f} ({ratio_min:.2f}–{ratio_max:.2f}) times all"
        speeds.append(f"{mode} {rate:.1f}{'' if mode == 'all' else beside}")
    return (
        f"images/s on {len(environment['cores'])} cores, batch {arguments['batch_size']} in "
        f"{arguments['micro_batches']} micro-batches, {arguments['dtype']}: {'; '.join(speeds)} "
        f"({environment['cpu']}; median (min–max) of {len(content['turns']['all'])} rounds)."
    )


RESULTS = {
    "serial_cnn.py": serial_result,
    "parallel_cnn_mpi.py": mpi_result,
    "parallel_cnn_hybrid.py": hybrid_result,
    "train_cifar.py": train_cifar_result,
    "train_resnet50_split_cores.py": split_result,
}


def fill_in_result(script, text, measurements):
    """The text of a script, with the paragraph `Result: …` of its docstring built anew."""
    result = f"Result: {RESULTS[script](measurements)}"
    paragraph = textwrap.fill(result, width=100, break_on_hyphens=False)
    return RESULT.sub(lambda _: paragraph, text, count=1)


# --------------------------------------------------------------------------------------------------
# The example of a report: measurements/ → docs/report
# --------------------------------------------------------------------------------------------------


def make_example(measurements, folder):
    """Analyse the experiments and write their report into `folder`: report.md and figures/."""
    results = folder / "results"
    analysis = folder / "analysis"
    unpack_results(measurements / "experiments", results)
    run_script("analyze_results.py", "--results-dir", results, "--output-dir", analysis)
    beyond = ("--prediction", measurements / PREDICTION, "--check", measurements / CHECK)
    run_script("make_report.py", "--analysis", analysis, "--output-dir", folder, *beyond)


def make_ladder(measurements, folder):
    """Draw what the ladders bought, from measurements/ladder."""
    results = folder / "ladder"
    unpack_results(measurements / "ladder", results)
    analysis = folder / "ladder_analysis"
    run_script("analyze_results.py", "--results-dir", results, "--output-dir", analysis)
    return analysis / "figures" / "ladder_rungs.png"


def make_curves(measurements, folder):
    """Draw the loss and accuracy of make accuracy over its epochs."""
    analysis = folder / "accuracy_analysis"
    run_script("analyze_results.py", measurements / f"{ACCURACY}.csv", "--output-dir", analysis)
    return analysis / "figures" / "files_curves.png"


def make_figures(measurements, folder):
    """{name: its file} of docs/figures."""
    predicted = folder / "prediction"
    measured = measurements / PREDICTION
    run_script("predict_scaling.py", "--run", measured, "--output-dir", predicted)
    checked = folder / "check_prediction.png"
    run_script("check_prediction.py", "--report", measurements / CHECK, "--figure", checked)
    return {
        "ladder.png": make_ladder(measurements, folder),
        "accuracy.png": make_curves(measurements, folder),
        "prediction.png": predicted / "prediction.png",
        "check_prediction.png": checked,
    }


def run_script(name, *options):
    """Run a script of experiments/. Raises TrainingError with its stderr if it fails."""
    script = Path(__file__).with_name(name)
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    if done.returncode:
        raise TrainingError(f"{name} ended with {done.returncode}: {done.stderr.strip()}")


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def read_json(path):
    return json.loads(read_measured(path))


def read_measured(path):
    """The text of a file in measurements/. Raises InputError if there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        target = "make accuracy" if path.stem == ACCURACY else "make measure"
        raise InputError(f"there is no {path}: {target} makes it") from None


def to_json(content):
    # A line for each value, which a diff can show; indentation would be a quarter of the file.
    return json.dumps(content, indent=0) + "\n"


def write(path, text):
    with atomic_write(path, "w") as file:
        file.write(text)


def read_csv(path):
    return list(csv.DictReader(read_measured(path).splitlines()))


def write_csv(path, columns, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def build_results(measurements):
    """{path: new text} of the scripts that have a result."""
    paths = [REPO / script for script in RESULTS]
    return {path: fill_in_result(path.name, path.read_text(), measurements) for path in paths}


def build_pages(measurements):
    """{path: new text} of README.md and of the pages in docs/."""
    paths = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
    return fill_in_tables({path: path.read_text() for path in paths}, measurements)


def write_changed(texts):
    for path, text in texts.items():
        # What has not changed keeps its time: Numba compiles the kernels of a newer script again.
        if not path.exists() or path.read_text() != text:
            write(path, text)
            print(f"written: {path.relative_to(REPO)}")


def check(texts):
    """Raise TrainingError that names each file whose text is another one."""
    old = [path for path, text in texts.items() if path.read_text() != text]
    if old:
        names = ", ".join(str(path.relative_to(REPO)) for path in old)
        raise TrainingError(f"not up to date: {names}; make readme")


def parse_args(argv=None):
    parser = Parser("update_readme", __doc__)
    parser.add_argument(
        "--collect",
        metavar="FOLDER",
        help="first pack the measurements in FOLDER into measurements/",
    )
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    args = parser.parse_args(argv)
    if args.collect and args.check:
        raise InputError("--collect does not go with --check: leave one out")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.collect:
        collect(Path(args.collect), MEASUREMENTS)

    texts = build_results(MEASUREMENTS)
    if not args.check:
        write_changed(texts)  # before the pages, which have a table with the lines of the scripts
    texts.update(build_pages(MEASUREMENTS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_example(MEASUREMENTS, folder)
        texts[REPORT / "report.md"] = (folder / "report.md").read_text()
        if args.check:
            check(texts)
            print("pages, results and docs/report are up to date")
            return
        FIGURES.mkdir(exist_ok=True)
        for name, figure in make_figures(MEASUREMENTS, folder).items():
            shutil.copyfile(figure, FIGURES / name)
        shutil.rmtree(REPORT / "figures", ignore_errors=True)
        shutil.copytree(folder / "figures", REPORT / "figures")
    write_changed(texts)


if __name__ == "__main__":
    run_main(main)
