"""The README's tables and docs/report are what the measurements in docs/ say."""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
import update_readme
from helpers import REPO, assert_one_error_line, script_environment

from common import InputError

DOCS = REPO / "docs"


def run(folder, *args):
    return subprocess.run(
        [sys.executable, folder / "update_readme.py", *map(str, args)],
        cwd=folder,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def docs(tmp_path):
    return shutil.copytree(DOCS, tmp_path / "docs")


def change(path, pattern, new):
    text = path.read_text()
    changed = re.sub(pattern, new, text, count=1)
    assert changed != text
    path.write_text(changed)


def test_readme_and_report_are_built_from_docs():
    done = run(REPO, "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_changed_measurement_changes_the_readme_and_the_report(tmp_path):
    copy = shutil.copytree(
        REPO, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "data", "results", "tests")
    )
    change(copy / "docs/bench.json", r'"ours": [\d.]+', '"ours": 7654321')
    change(
        copy / "docs/experiments/parallel/serial/1/run.json",
        r'"peak_ram_mb": [\d.]+',
        '"peak_ram_mb": 1234567',
    )
    done = run(copy, "--check")
    assert done.returncode == 1
    assert_one_error_line(done.stderr)
    assert "README.md, docs/report/report.md" in done.stderr
    before = (copy / "README.md").read_text().splitlines()
    done = run(copy)
    assert (done.returncode, done.stderr) == (0, "")
    lines = zip(before, (copy / "README.md").read_text().splitlines(), strict=True)
    assert ["7,654,321" in new for old, new in lines if old != new] == [True]
    assert run(copy, "--check").returncode == 0


@pytest.mark.parametrize(
    ("path", "pattern", "new", "table", "shown"),
    [
        ("bench.json", r'"ratio": [\d.]+', '"ratio": 77.1234', "speed", "77.12 ("),
        ("bench.json", r'"of_sgemm": [\d.]+', '"of_sgemm": 0.7712', "speed", "77%"),
        ("bench.json", r'"efficiency": [\d.]+', '"efficiency": 0.7712', "scaling", "77%"),
        (
            "loading.json",
            r'"images_per_s": [\d.]+',
            '"images_per_s": 77123456',
            "loading",
            "77,123,456 (",
        ),
        ("split_cores.json", r'"split takes', '"split needs', "split", "- split needs"),
    ],
)
def test_each_table_shows_its_file(docs, path, pattern, new, table, shown):
    before = update_readme.TABLES[table](docs)
    change(docs / path, pattern, new)
    after = update_readme.TABLES[table](docs)
    assert shown in after
    assert shown not in before


def test_split_table_has_medians_and_ratios_round_by_round(docs):
    """Rounds of 1, 2, 4 s against 2, 2, 2 s of `all`: 64, 32, 16 images/s, and 2, 1, 0.5 × as fast."""
    content = json.loads((docs / "split_cores.json").read_text())
    turn = content["turns"]["all"][0]
    for name, seconds in {"all": (2, 2, 2), "split": (1, 2, 4)}.items():
        content["turns"][name] = [
            {**turn, "seconds": s, "forward": s / 4, "backward_idle": 0.25} for s in seconds
        ]
    for name in content["turns"].keys() - {"all", "split"}:
        content["turns"][name] = content["turns"][name][:3]
    content["arguments"]["batch_size"] = 64
    (docs / "split_cores.json").write_text(json.dumps(content))
    (row,) = (
        line
        for line in update_readme.split_table(docs).splitlines()
        if line.startswith("| `split`")
    )
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert (cells[0], cells[1], cells[4], cells[5]) == (
        "32.0 (16.0–64.0)",
        "0.500",
        "25%",
        "1.00 (0.50–2.00)",
    )


def test_training_table_has_the_best_epoch(docs):
    index = json.loads((docs / "training/index.json").read_text())
    path = docs / "training" / index["runs"][0]["folder"] / "run.csv"
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    for row in rows:
        if row[0] == "1":
            row[header.index("value1")] = "0.7712" if row[1] == "2" else "0.5"
        if row[0] == "0":
            row[header.index("duration")] = "10"
    epochs = sum(row[0] == "0" for row in rows)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    first = update_readme.training_table(docs).splitlines()[2]
    assert f"| 77.12% (epoch 2 of {epochs}) | {10 * epochs} s |" in first


def test_measurements_of_two_machines_do_not_stand_together(docs):
    change(docs / "loading.json", r'"cpu": "[^"]*"', '"cpu": "Another"')
    with pytest.raises(InputError, match=r"several machines.*Another"):
        update_readme.machine_line(docs)


def test_a_readme_without_a_table_is_refused(docs):
    text = (REPO / "README.md").read_text()
    assert update_readme.fill_in(text, docs) == text
    with pytest.raises(InputError, match="should have"):
        update_readme.fill_in(text.replace("<!-- table: split -->", ""), docs)


def test_collected_files_are_small_and_name_no_folder_of_the_machine(tmp_path, monkeypatch):
    """Measured elsewhere, with rows of batches and absolute paths; an analysis that lies there is not taken."""
    source, run_folder = tmp_path / "measured", "parallel/serial/1"
    for name in update_readme.EXPERIMENTS:
        (source / name / run_folder).mkdir(parents=True)
        log = source / name / run_folder / "run.csv"
        shutil.copy(DOCS / "experiments" / run_folder / "run.csv", log)
        (last,) = (row for row in log.read_text().splitlines() if row.startswith("2,1,"))
        cells = last.split(",")
        log.write_text(log.read_text() + ",".join([*cells[:5], "1", *cells[6:]]) + "\n")
        for file in ("index.json", f"{run_folder}/run.json"):
            (source / name / file).write_text(
                json.dumps([sys.executable, f"{REPO}/serial_cnn.py", str(log)])
            )
        (source / name / run_folder / "output.txt").touch()
        (source / name / "analysis").mkdir()
        (source / name / "analysis/index.json").touch()
    for name in update_readme.BENCHMARKS:
        shutil.copy(DOCS / name, source / name)
    update_readme.collect(source, tmp_path / "docs")
    found = {
        str(p.relative_to(tmp_path / "docs"))
        for p in (tmp_path / "docs").glob("**/*")
        if p.is_file()
    }
    wanted = {
        f"{name}/{file}"
        for name in update_readme.EXPERIMENTS
        for file in ("index.json", f"{run_folder}/run.json", f"{run_folder}/run.csv")
    }
    assert found == {*update_readme.BENCHMARKS, *wanted}
    assert json.loads((tmp_path / "docs/training/index.json").read_text()) == [
        "python",
        "serial_cnn.py",
        f"training/{run_folder}/run.csv",
    ]
    kept = (tmp_path / "docs/training" / run_folder / "run.csv").read_text()
    assert kept == (DOCS / "experiments" / run_folder / "run.csv").read_text()
    (source / "loading.json").unlink()
    with pytest.raises(InputError, match=r"loading\.json: make measure"):
        update_readme.collect(source, tmp_path / "docs")


def test_what_is_committed_is_small_and_names_no_folder():
    files = [path for path in DOCS.glob("**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2e6
    for path in files:
        if path.suffix != ".png":
            assert not re.search(r'["\s(]/\w', path.read_text()), path


def test_bad_input_is_one_line():
    for options in (("--collect", "nowhere"), ("--collect", "x", "--check")):
        done = run(REPO, *options)
        assert done.returncode == 2
        assert_one_error_line(done.stderr)
