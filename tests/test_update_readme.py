"""The tables, the results and docs/report are what measurements/ says."""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import REPO, assert_one_error_line, commands_of, refused, script_environment

import train_cifar
import update_readme
from common import InputError

MEASUREMENTS = REPO / "measurements"
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def run(folder, *args):
    return subprocess.run(
        [sys.executable, folder / "experiments/update_readme.py", *map(str, args)],
        cwd=folder,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def measurements(tmp_path):
    return shutil.copytree(MEASUREMENTS, tmp_path / "measurements")


def change(path, pattern, new):
    text = path.read_text()
    changed = re.sub(pattern, new, text, count=1)
    assert changed != text
    path.write_text(changed)


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- what is built from measurements/ --------------------------------------------------------------


def test_pages_and_report_are_up_to_date(capsys):
    update_readme.main(["--check"])
    assert "up to date" in capsys.readouterr().out


@pytest.mark.slow
def test_a_changed_measurement_changes_pages_results_and_report(tmp_path):
    ignored = shutil.ignore_patterns(".*", "data", "results", "tests")
    copy = shutil.copytree(REPO, tmp_path / "copy", ignore=ignored)
    change(copy / "measurements/bench.json", r'"ours": [\d.]+', '"ours": 7654321')
    experiments = copy / "measurements/experiments.json"
    change(experiments, r'"peak_ram_mb": [\d.]+', '"peak_ram_mb": 1234567')
    script = copy / "serial_cnn.py"
    if "\nResult: " not in script.read_text():
        script.write_text(script.read_text().replace("\n\n", "\n\nResult: old\nold\n\n", 1))
    done = run(copy, "--check")
    assert done.returncode == 1
    assert_one_error_line(done.stderr)
    for name in ("README.md", "serial_cnn.py", "docs/report/report.md"):
        assert name in done.stderr

    before = (copy / "README.md").read_text().splitlines()
    done = run(copy)
    assert (done.returncode, done.stderr) == (0, "")
    lines = zip(before, (copy / "README.md").read_text().splitlines(), strict=True)
    changed = [new for old, new in lines if old != new]
    assert changed
    assert all("7,654,321" in line for line in changed)
    assert "7,654,321 images/s" in script.read_text()
    assert run(copy, "--check").returncode == 0


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "pattern", "new", "table", "shown"),
    [
        ("bench.json", r'"ratio": [\d.]+', '"ratio": 77.1234', "speed", "77.12 ("),
        ("bench.json", r'"of_sgemm": [\d.]+', '"of_sgemm": 7.712', "speed-scratch", "771%"),
        ("bench.json", r'"efficiency": [\d.]+', '"efficiency": 7.712', "scaling", "771%"),
        ("loading.json", r'"images_per_s": [\d.]+', '"images_per_s": 7712', "loading", "7,712 ("),
        ("split_cores.json", r'"split takes', '"split needs', "split", "- split needs"),
    ],
)
def test_each_table_shows_its_file(measurements, path, pattern, new, table, shown):
    before = update_readme.TABLES[table](measurements)
    change(measurements / path, pattern, new)
    after = update_readme.TABLES[table](measurements)
    assert shown in after
    assert shown not in before


def test_the_parts_of_the_speed_table_are_the_whole():
    """What is from scratch, then what uses PyTorch."""
    tables = {
        name: update_readme.TABLES[name](MEASUREMENTS).splitlines()
        for name in ("speed", "speed-scratch", "speed-pytorch")
    }
    header = tables["speed"][:2]
    parts = tables["speed-scratch"][2:] + tables["speed-pytorch"][2:]
    assert sorted(header + parts) == sorted(tables["speed"])
    for row in tables["speed-pytorch"][2:]:
        assert row.startswith("| `train_cifar.py")


def test_split_table_has_medians_and_ratios_round_by_round(measurements):
    """Rounds of 1, 2, 4 s against 2, 2, 2 s of `all`: 64, 32, 16 images/s; ratios 2, 1, 0.5."""
    path = measurements / "split_cores.json"
    content = json.loads(path.read_text())
    sample = content["turns"]["all"][0]
    for name, seconds in {"all": (2, 2, 2), "split": (1, 2, 4)}.items():
        content["turns"][name] = [
            {**sample, "seconds": s, "forward": s / 4, "backward_idle": 0.25} for s in seconds
        ]
    for name in content["turns"].keys() - {"all", "split"}:
        content["turns"][name] = content["turns"][name][:3]
    content["arguments"]["batch_size"] = 64
    path.write_text(json.dumps(content))
    lines = update_readme.split_table(measurements).splitlines()
    (row,) = [line for line in lines if line.startswith("| `split`")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[0] == "32.0 (16.0–64.0)"
    assert cells[1] == "0.500"
    assert cells[4:] == ["25%", "1.00 (0.50–2.00)"]


def make_second_epoch_best(rows, seconds):
    """Change a log's rows: 77.12 % in epoch 2, that many seconds each. Returns the epochs."""
    for row in rows:
        if row["type"] == "1":
            row["value1"] = "0.7712" if row["epoch"] == "2" else "0.5"
        if row["type"] == "0":
            row["duration"] = str(seconds)
    return sum(row["type"] == "0" for row in rows)


def test_training_table_has_the_best_epoch(measurements):
    path = measurements / "training.csv"
    rows = read_rows(path)
    first = [row for row in rows if row["configuration"] == rows[0]["configuration"]]
    epochs = make_second_epoch_best(first, seconds=10)
    update_readme.write_csv(path, rows[0].keys(), rows)
    line = update_readme.training_table(measurements).splitlines()[2]
    assert f"| 77.12% (epoch 2 of {epochs}) | {10 * epochs} s |" in line


def test_accuracy_table_has_the_epochs_and_the_machine_of_its_run(measurements):
    """Epochs of 60 s, the best of which is the second."""
    path = measurements / f"{update_readme.ACCURACY}.csv"
    rows = read_rows(path)
    epochs = make_second_epoch_best(rows, seconds=60)
    update_readme.write_csv(path, rows[0].keys(), rows)
    change(path.with_suffix(".json"), '"cpu": "[^"]*"', '"cpu": "Another"')
    table = update_readme.accuracy_table(measurements)
    assert f"| 77.12% (epoch 2 of {epochs}) | " in table
    assert f" | {epochs} min | " in table
    assert "Another (OpenBLAS" in table


def test_make_accuracy_is_the_command_of_the_accuracy_table():
    (command,) = commands_of("make accuracy")
    assert command[:2] == ["python", "train_cifar.py"]
    asked = vars(train_cifar.parse_args(command[2:]))
    metadata = json.loads((MEASUREMENTS / f"{update_readme.ACCURACY}.json").read_text())
    files = {"log", "save_metrics", "checkpoint", "checkpoint_every"}
    of_machine = {"device", "amp", "dataset", "global_batch_size"}
    for name in metadata["arguments"].keys() - files - of_machine:
        assert asked[name] == metadata["arguments"][name], name


@pytest.mark.parametrize("key", ["cpu", "kernel"])
def test_measurements_of_two_machines_are_refused(measurements, key):
    """A processor of the same name may have other vector instructions."""
    change(measurements / "loading.json", f'"{key}": "[^"]*"', f'"{key}": "Another"')
    with pytest.raises(InputError, match=r"several machines.*Another"):
        update_readme.machine_line(measurements)


def test_other_machines_are_columns_of_their_own(measurements):
    """A row that was not measured there is a dash."""
    other = measurements / update_readme.OTHER_MACHINES
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    content = json.loads((measurements / "bench.json").read_text())
    first = content["rows"][0]
    ours = f"{first['ratio']:.2f} ({first['ratio_min']:.2f}–{first['ratio_max']:.2f})"
    content["environment"]["cpu"] = "Another"
    ratio = {"ratio": 7.712, "ratio_min": 6.5, "ratio_max": 8.25}
    content["rows"] = [{**first, **ratio, "of_bound": 0.77}]
    (other / "small.json").write_text(json.dumps(content))
    lines = update_readme.machines_table(measurements).splitlines()
    assert lines[0] == "| ratio (min–max); of the bound | README | small |"
    assert lines[2].endswith(f"| {ours} | 7.71 (6.50–8.25); 77% |")
    assert lines[3].endswith(" | – |")
    assert any(line.startswith("- small: Another (OpenBLAS") for line in lines)


def test_tables_stand_in_any_page(measurements):
    """In the README or a page of docs/. One that no page has, or that is unknown, is refused."""
    pages = {path: path.read_text() for path in PAGES}
    assert update_readme.fill_in_tables(pages, MEASUREMENTS).keys() == pages.keys()
    moved = {path: text.replace("<!-- table: split -->", "") for path, text in pages.items()}
    with pytest.raises(InputError, match="no page has the table split"):
        update_readme.fill_in_tables(moved, MEASUREMENTS)
    page = REPO / "docs/another.md"
    moved[page] = "Before.\n\n<!-- table: split -->\nold\n<!-- end -->\n\nAfter.\n"
    filled_in = update_readme.fill_in_tables(moved, MEASUREMENTS)[page]
    assert filled_in.startswith("Before.\n\n<!-- table: split -->\n|  | images/s |")
    assert filled_in.endswith("\n<!-- end -->\n\nAfter.\n")
    moved[page] = moved[page].replace("split", "splt")
    with pytest.raises(InputError, match=r"no table 'splt'; there are: scripts, .*machine"):
        update_readme.fill_in_tables(moved, MEASUREMENTS)


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ['\n"""\n\n', '"""\n', '\n\n    python script.py\n"""\n\n'])
@pytest.mark.parametrize("script", update_readme.RESULTS)
def test_the_result_of_a_script_is_a_paragraph_of_its_docstring(script, after):
    """Replaced up to the next blank line or the docstring's end, wrapped at 100 columns."""
    start = '"""Do something.\n\n'
    end = f"{after}import sys\n"
    text = f"{start}Result: an old one,\nof two lines.{end}"
    filled_in = update_readme.fill_in_result(script, text, MEASUREMENTS)
    assert filled_in.startswith(start)
    assert filled_in.endswith(end)
    lines = filled_in.removeprefix(start).removesuffix(end).splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 100
    assert " ".join(lines) == f"Result: {update_readme.RESULTS[script](MEASUREMENTS)}"
    assert update_readme.fill_in_result(script, filled_in, MEASUREMENTS) == filled_in


def test_results_have_the_numbers_of_the_tables():
    result = update_readme.RESULTS["serial_cnn.py"](MEASUREMENTS)
    (row,) = [
        line
        for line in update_readme.TABLES["speed"](MEASUREMENTS).splitlines()
        if "CNN, batch 32, 1 core" in line and "serial" in line
    ]
    ours, pytorch, ratio = [cell.strip() for cell in row.split("|")[2:5]]
    assert f"{ours} images/s, {ratio} times PyTorch's {pytorch}." in result


def test_a_script_without_a_result_stays_as_it_is():
    text = '"""Do something."""\n\nx = "Result: "\n'
    assert update_readme.fill_in_result("serial_cnn.py", text, MEASUREMENTS) == text


# -- collecting ------------------------------------------------------------------------------------


FIRST_RUN = {"ladder": "ladder/serial-1-loops/1"}


@pytest.fixture
def measured(tmp_path):
    """A folder as make measure leaves it, with all batches, absolute paths and further files."""
    source = tmp_path / "measured"
    for name in update_readme.RESULTS_FOLDERS:
        update_readme.unpack_results(MEASUREMENTS / name, source / name)
        place = source / name / FIRST_RUN.get(name, "parallel/serial/1")
        log = place / "run.csv"
        last = next(row for row in log.read_text().splitlines() if row.startswith("2,1,"))
        cells = last.split(",")
        cells[5] = "1"  # another batch than the last
        log.write_text(log.read_text() + ",".join(cells) + "\n")
        index = json.loads((source / name / "index.json").read_text())
        index["runs"][0]["command"] = [sys.executable, f"{REPO}/serial_cnn.py", str(log)]
        (source / name / "index.json").write_text(json.dumps(index))
        (place / "output.txt").touch()
        (source / name / "analysis").mkdir()
        (source / name / "analysis/index.json").touch()
    for name in update_readme.BENCHMARKS:
        shutil.copy(MEASUREMENTS / name, source / name)
    return source


def test_a_single_run_is_packed_without_most_batches(tmp_path):
    """Of ten rows of batches the last stays; the .json is relative to the folder it came from."""
    log = tmp_path / "measured" / "resnet18.csv"
    log.parent.mkdir()
    packed = MEASUREMENTS / update_readme.ACCURACY
    rows = read_rows(packed.with_suffix(".csv"))
    last = next(row for row in rows if row["type"] == "2")
    batches = [{**last, "value1": str(batch)} for batch in range(9)]
    update_readme.write_csv(log, rows[0].keys(), batches + rows)
    metadata = json.loads(packed.with_suffix(".json").read_text())
    metadata["arguments"]["log"] = str(log)
    log.with_suffix(".json").write_text(json.dumps(metadata))
    update_readme.pack_run(log, tmp_path / "packed", log.parent)
    assert read_rows(tmp_path / "packed.csv") == rows
    assert json.loads((tmp_path / "packed.json").read_text())["arguments"]["log"] == log.name


def test_collected_files_are_few_and_name_no_folder_of_the_machine(measured, tmp_path):
    packed = tmp_path / "packed"
    update_readme.collect(measured, packed)
    results = [
        f"{name}{end}" for name in update_readme.RESULTS_FOLDERS for end in (".json", ".csv")
    ]
    assert {path.name for path in packed.iterdir()} == {*update_readme.BENCHMARKS, *results}
    runs = json.loads((packed / "training.json").read_text())["runs"]
    log = "training/parallel/serial/1/run.csv"
    assert runs[0]["command"] == ["python", "serial_cnn.py", log]
    for name in update_readme.RESULTS_FOLDERS:
        kept = (packed / f"{name}.csv").read_text()
        assert kept == (MEASUREMENTS / f"{name}.csv").read_text()
    (measured / "loading.json").unlink()
    with pytest.raises(InputError, match=r"loading\.json: make measure"):
        update_readme.collect(measured, packed)


def test_unpacked_results_are_those_that_were_packed(tmp_path):
    """All as it was, also of a run that has failed, without metadata and log."""
    folder = tmp_path / "results"
    failed = {
        "suite": "s",
        "configuration": "a",
        "repeat": 1,
        "folder": "s/a/1",
        "status": "failed",
    }
    done = {"suite": "s", "configuration": "b", "repeat": 1, "folder": "s/b/1", "status": "done"}
    index = {"settings": {"epochs": 1}, "runs": [failed, done], "left_out": {"s/c": "reason"}}
    columns = ",".join(update_readme.LOG_COLUMNS)
    files = {
        "index.json": json.dumps(index),
        "s/b/1/run.json": json.dumps({"totals": {"x": 0.1}}),
        "s/b/1/run.csv": f"{columns}\n0,1,1795307806.417969,0.045033,2.816208" + "," * 11 + "\n",
    }
    for name, text in files.items():
        update_readme.write(folder / name, text)
    update_readme.pack_results(folder, tmp_path / "packed", tmp_path)
    update_readme.unpack_results(tmp_path / "packed", tmp_path / "again")
    again = {
        str(path.relative_to(tmp_path / "again")): path.read_text()
        for path in (tmp_path / "again").rglob("*")
        if path.is_file()
    }
    assert again.keys() == files.keys()
    for name, text in files.items():
        if name.endswith(".json"):
            assert json.loads(again[name]) == json.loads(text)
        else:
            assert again[name] == text


def test_what_is_committed_is_small_and_names_no_folder():
    measured = [path for path in MEASUREMENTS.rglob("*") if path.is_file()]
    report = [path for path in (REPO / "docs/report").rglob("*") if path.is_file()]
    assert len(measured) < 20
    assert sum(path.stat().st_size for path in measured + report) < 2.5e6
    for path in measured + report:
        if path.suffix != ".png":
            assert not re.search(r'["\s(]/\w', path.read_text()), path


def test_bad_input_is_refused():
    assert "nowhere" in refused(update_readme.main, "--collect", "nowhere")
    assert "--check" in refused(update_readme.main, "--collect", "x", "--check")
    done = run(REPO, "--collect", "nowhere")
    assert done.returncode == 2
    assert_one_error_line(done.stderr)
