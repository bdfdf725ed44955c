"""Rebuild the README's tables, and the example of a report, from the measurements in docs/.

What is measured is named in the Makefile's target `measure`; --collect takes it over into docs/, without what no table
needs: the log rows of single batches but the last of each epoch, what was printed, and this machine's paths. A table of
the README stands between <!-- table: name --> and <!-- end -->; the words around it are the README's own.

    make readme
    python update_readme.py --check                   # exit status 1 if README.md or docs/report is not up to date
    python update_readme.py --collect results/measured
"""

import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import BATCH, TRAIN, VALIDATE, InputError, Parser, TrainingError, atomic_write, run_main

HERE = Path(__file__).resolve().parent
BENCHMARKS = ("bench.json", "loading.json", "split_cores.json")
EXPERIMENTS = ("experiments", "training")  # folders of run_experiments.py
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)
SPLIT_ROWS = {  # contestant in split_cores.json → its name in the README
    "all": "`all`",
    "split": "`split`",
    "pipelined": "`pipelined`",
    "replicas": "`replicas`",
    "all, 1 micro-batch": "`all`, one piece",
    "all, 1 micro-batch, float32 NCHW": "usual",
}


# ----------------------------------------------------------------------------------------------------------------------
# Collecting
# ----------------------------------------------------------------------------------------------------------------------


def collect(source, docs):
    """Take what has been measured over into docs/. Raises InputError for what is not there."""
    parts = [
        source / name for name in (*BENCHMARKS, *(f"{name}/index.json" for name in EXPERIMENTS))
    ]
    if absent := [str(path) for path in parts if not path.is_file()]:
        raise InputError(f"there is no {', '.join(absent)}: make measure makes all of them")
    for name in BENCHMARKS:
        write(docs / name, without_paths((source / name).read_text(), source))
    for name in EXPERIMENTS:
        shutil.rmtree(docs / name, ignore_errors=True)
        for path in sorted(source.glob(f"{name}/**/*")):
            if path.name in ("index.json", "run.json") and "analysis" not in path.parts:
                write(docs / path.relative_to(source), without_paths(path.read_text(), source))
            elif path.name == "run.csv":
                write(docs / path.relative_to(source), without_batches(path.read_text()))


def without_paths(text, source):
    """JSON with paths relative to `source` or to this folder, and `python` for the interpreter."""
    text = text.replace(json.dumps(sys.executable), '"python"')
    return text.replace(f"{source.resolve()}/", "").replace(f"{HERE}/", "")


def without_batches(text):
    """A run log whose only rows of batches are the last of each epoch, which have the phases of a step."""
    header, *rows = text.splitlines(keepends=True)
    kept = (row.split(",") for row in rows)
    return header + "".join(
        ",".join(cells) for cells in kept if cells[0] != str(BATCH) or cells[5] == cells[6]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Tables: docs/ → Markdown
# ----------------------------------------------------------------------------------------------------------------------


def markdown_table(header, rows):
    return (
        "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
        + "\n"
    )


def spread(row):
    return f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"


def scripts_as_code(name):
    return (
        re.sub(r"\w+\.py( --[\w-]+)?", r"`\g<0>`", name)
        .replace("resnet", "ResNet-")
        .replace("cnn,", "CNN,")
    )


def speed_table(docs):
    """Each script beside PyTorch."""
    rows = [
        [
            scripts_as_code(row["name"]),
            f"{row['ours']:,.0f}",
            f"{row['peer']:,.0f}",
            spread(row),
            f"{row['of_sgemm']:.0%}" if "of_sgemm" in row else "–",
            str(row["n"]),
        ]
        for row in read(docs / "bench.json")["rows"]
        if "cores" not in row
    ]
    return markdown_table(
        ["training, images/s", "ours", "PyTorch", "ratio (min–max)", "of sgemm", "n"], rows
    )


def scaling_table(docs):
    """Each parallel script beside our own work on one core."""
    rows = [
        [
            scripts_as_code(row["name"]),
            f"{row['ours']:,.0f}",
            f"{row['peer']:,.0f}",
            spread(row),
            f"{row['efficiency']:.0%}",
            f"{row['communication']:.1%}",
            str(row["n"]),
        ]
        for row in read(docs / "bench.json")["rows"]
        if "cores" in row
    ]
    header = [
        "training, images/s",
        "ours",
        "on one core",
        "speed-up (min–max)",
        "efficiency",
        "communication",
        "n",
    ]
    return markdown_table(header, rows)


def loading_table(docs):
    rows = []
    for row in read(docs / "loading.json")["rows"]:
        name, workers = row["name"].removesuffix(" workers").rsplit(", ", 1)
        waiting = [f"{w / t:.2%}" for w, t in zip(row["waiting_s"], row["total_s"], strict=True)]
        rows.append(
            [
                name,
                workers,
                f"{row['images_per_s']:,.0f} ({row['min']:,.0f}–{row['max']:,.0f})",
                f"{row['images_per_s'] * 3072e-6:,.0f}",
                f"{row['peak_ram_mb']:,.0f} MiB",
                *waiting,
            ]
        )
    header = [
        "source",
        "workers",
        "alone, images/s",
        "MB/s",
        "peak RAM",
        "waiting, first epoch",
        "second epoch",
    ]
    return markdown_table(header, rows)


def split_table(docs):
    content = read(docs / "split_cores.json")
    turns, batch_size = content["turns"], content["arguments"]["batch_size"]
    rows = []
    for name, shown in SPLIT_ROWS.items():
        rates = [batch_size / turn["seconds"] for turn in turns[name]]
        ratios = [
            b["seconds"] / a["seconds"] for a, b in zip(turns[name], turns["all"], strict=True)
        ]
        middle = {
            key: statistics.median(turn[key] for turn in turns[name]) for key in turns[name][0]
        }
        rows.append(
            [
                shown,
                f"{statistics.median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})",
                f"{middle['forward']:.3f}",
                f"{middle['backward']:.3f}",
                f"{middle['forward_idle']:.0%}",
                f"{middle['backward_idle']:.0%}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            ]
        )
    header = [
        "",
        "images/s",
        "forward, s",
        "backward, s",
        "idle: forward's cores",
        "backward's cores",
        "against `all`",
    ]
    sentences = "".join(f"- {sentence}\n" for sentence in content["findings"])
    return f"{markdown_table(header, rows)}\nThe benchmark's own words ({len(turns['all'])} rounds):\n\n{sentences}"


def training_table(docs):
    """Whole trainings: accuracy, time and memory."""
    rows = []
    for entry in read(docs / "training/index.json")["runs"]:
        folder = docs / "training" / entry["folder"]
        with open(folder / "run.csv", newline="") as file:
            log = list(csv.DictReader(file))
        tested = {
            int(row["epoch"]): float(row["value1"]) for row in log if row["type"] == str(VALIDATE)
        }
        seconds = sum(float(row["duration"]) for row in log if row["type"] == str(TRAIN))
        best, totals = max(tested, key=tested.get), read(folder / "run.json")["totals"]
        rows.append(
            [
                f"`{entry['configuration']}`",
                f"{tested[best]:.2%} (epoch {best} of {max(tested)})",
                f"{seconds:.0f} s",
                f"{totals['train_images'] / seconds:,.0f}",
                f"{totals['peak_ram_mb']:,.0f} MiB",
            ]
        )
    return markdown_table(
        ["", "best test accuracy", "training time", "images/s", "peak RAM (of rank 0)"], rows
    )


def machine_line(docs):
    """What all measurements of docs/ ran on, from each of them. Raises InputError unless it was one machine."""
    environments = [read(docs / name)["environment"] for name in BENCHMARKS]
    environments += [
        read(path) for name in EXPERIMENTS for path in sorted((docs / name).glob("*/*/*/run.json"))
    ]
    machines = {
        (env["cpu"], len(env["cores"]), round(env["memory_mb"] / 1024)) for env in environments
    }
    if len(machines) > 1:
        raise InputError(
            f"{docs} has measurements of several machines, {sorted(machines)}: make measure on one"
        )
    ((cpu, cores, memory),), first = machines, environments[0]
    blas = ", ".join(
        f"{b['library']} {b['version']} ({b['kernel']} kernels)" for b in first["blas"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return f"{cpu}, {cores} cores, {memory} GiB of memory; {blas}; {versions}; commit {first['git_commit'][:12]}.\n"


TABLES = {
    "speed": speed_table,
    "scaling": scaling_table,
    "loading": loading_table,
    "split": split_table,
    "training": training_table,
    "machine": machine_line,
}


def fill_in(text, docs):
    """The README with each table built anew. Raises InputError unless it has each of TABLES once."""
    names = [match[2] for match in BLOCK.finditer(text)]
    if sorted(names) != sorted(TABLES):
        raise InputError(
            f"README.md has the tables {', '.join(names)}: it should have {', '.join(TABLES)}, each once"
        )
    return BLOCK.sub(lambda match: match[1] + TABLES[match[2]](docs) + match[3], text)


# ----------------------------------------------------------------------------------------------------------------------
# The example of a report
# ----------------------------------------------------------------------------------------------------------------------


def make_example(docs, folder):
    """Analyse docs/experiments and write the report of it to `folder`: report.md and figures/."""
    for command in (
        [
            "analyze_results.py",
            "--results-dir",
            docs / "experiments",
            "--output-dir",
            folder / "analysis",
        ],
        ["make_report.py", "--analysis", folder / "analysis", "--output-dir", folder],
    ):
        done = subprocess.run(
            [sys.executable, HERE / command[0], *command[1:]], capture_output=True, text=True
        )
        if done.returncode:
            raise TrainingError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")


def read(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"there is no {path}: make measure makes it") from None


def write(path, text):
    with atomic_write(path, "w") as file:
        file.write(text)


def main(argv=None):
    parser = Parser("update_readme", __doc__)
    parser.add_argument(
        "--collect", metavar="FOLDER", help="take the measurements in FOLDER over into docs/ first"
    )
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    args = parser.parse_args(argv)
    docs, readme = HERE / "docs", HERE / "README.md"
    if args.collect and args.check:
        raise InputError("--collect does not go with --check: leave one out")
    if args.collect:
        collect(Path(args.collect), docs)
    before = readme.read_text()
    after = fill_in(before, docs)
    with tempfile.TemporaryDirectory() as folder:
        make_example(docs, Path(folder))
        example = (Path(folder) / "report.md").read_text()
        if args.check:
            old = [
                str(path.relative_to(HERE))
                for path, text in ((readme, after), (docs / "report/report.md", example))
                if path.read_text() != text
            ]
            if old:
                raise TrainingError(f"not up to date: {', '.join(old)}; make readme")
            return print("README.md and docs/report are up to date")
        write(readme, after)
        shutil.rmtree(docs / "report", ignore_errors=True)
        shutil.copytree(Path(folder) / "figures", docs / "report/figures")
        write(docs / "report/report.md", example)
    print(f"written: {readme.name}, docs/report")


if __name__ == "__main__":
    run_main(main)
