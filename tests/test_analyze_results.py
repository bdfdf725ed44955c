"""analyze_results.py and the files that it imports, on small made logs and on logs of real runs.

The made logs have numbers for which the results can be worked out by hand.
"""

import csv
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from helpers import COLUMNS, assert_one_error_line, finish, refused, start
from matplotlib.backends.backend_agg import FigureCanvasAgg

import analyze_results
import confusion
from common import metadata_path
from metrics import PHASES, amdahl_fit, estimate, karp_flatt, ratio, readable_name
from plot_trace import read_trace

MACHINE = {
    "host": "here",
    "cpu": "A processor",
    "cores": [0, 1, 2, 3],
    "dataset": "cifar10",
    "fingerprint": "f",
    "git_commit": "1" * 40,
    "versions": {"python": "3.11", "numpy": "2.4"},
    "train_images": 2000,
}
SUMMED = ("loading", "duration", "forward", "backward", "communication")  # since the epoch began
LOADS_ONLY = {"value1": None, "value2": None, "loss": None}  # an epoch with --load-only
T = 12.7062  # Student's t, 97.5 %, one degree of freedom


# --------------------------------------------------------------------------------------------------
# Made results
# --------------------------------------------------------------------------------------------------


def write_log(path, epochs, batches=2, **metadata):
    """Write a run log of 2,000 images an epoch, and the metadata beside it.

    epochs: a dict of columns for each epoch, with the duration at least, and with test_loss and
    test_accuracy for its row of validation.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, epoch in enumerate(epochs, 1):
        train = {
            "epoch": number,
            "start": 0,
            "loading": 0.1,
            "loss": 1.0,
            "value1": 0.5,
            "value2": 0.9,
            "ram_mb": 50,
            "images_per_s": 2000 / epoch["duration"],
        }
        train.update({name: cell for name, cell in epoch.items() if name in COLUMNS})

        for batch in range(1, batches + 1):
            sums = {name: train[name] * batch / batches for name in SUMMED if name in train}
            rows.append({**train, **sums, "type": 2, "value1": batch, "value2": batches})
        rows.append({**train, "type": 0})
        if train["value1"] is not None:
            loss = epoch.get("test_loss", 1.5)
            accuracy = epoch.get("test_accuracy", 0.4)
            test = {"type": 1, "loss": loss, "value1": accuracy, "duration": 0.3}
            rows.append({**train, **test})

    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    run = {"script": "serial_cnn", "ranks": 1, "threads": 1, "end": 1e9, "status": "done"}
    content = {**run, **MACHINE, **metadata}
    arguments = {"batch_size": 64, "seed": 42, "model": "cnn"}
    content["arguments"] = {**arguments, **metadata.get("arguments", {})}
    totals = {"peak_ram_mb": 100.0, "mean_cpu_percent": 99.0}
    content["totals"] = {**totals, **metadata.get("totals", {})}
    metadata_path(path).write_text(json.dumps(content))


class Results:
    """A results folder as run_experiments.py leaves it."""

    def __init__(self, folder):
        self.folder = folder
        self.runs = []
        self.left_out = {}

    def add(
        self,
        name,
        *durations,
        status="done",
        cores=1,
        oversubscribed=False,
        epoch=(),
        output=(),
        **metadata,
    ):
        """Add a run of one epoch for each duration: repeats 1, 2, ... epoch: its other columns."""
        suite, _, configuration = name.partition("/")
        for repeat, duration in enumerate(durations, 1):
            folder = f"{name}/{repeat}"
            self.runs.append(
                {
                    "suite": suite,
                    "configuration": configuration,
                    "repeat": repeat,
                    "status": status,
                    "folder": folder,
                    "cores": cores,
                    "oversubscribed": oversubscribed,
                    "output": list(output),
                }
            )
            if status == "done":
                columns = {"duration": duration, **dict(epoch)}
                write_log(self.log(name, repeat), [columns], **metadata)

    def log(self, name, repeat=1):
        return self.folder / name / str(repeat) / "run.csv"

    def write(self):
        settings = {"dataset": MACHINE["dataset"], "fingerprint": MACHINE["fingerprint"]}
        index = {"settings": settings, "runs": self.runs, "left_out": self.left_out}
        (self.folder / "index.json").write_text(json.dumps(index))


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path)


def add_parallel(results, **metadata):
    """Speed-ups of MPI: 1.6 and 2.0 on two cores, 2.0 and 2.0 on four; of hybrid on two: 1.5."""
    mpi = {"script": "parallel_cnn_mpi", **metadata}
    hybrid = {"script": "parallel_cnn_hybrid", **metadata}
    weak = {**hybrid, "arguments": {"global_batch_size": 128}}
    results.add("parallel/serial", 2.0, 2.5, **metadata)
    results.add("parallel/mpi-2-strong", 1.25, 1.25, cores=2, ranks=2, **mpi)
    results.add("parallel/mpi-4-strong", 1.0, 1.25, cores=4, ranks=4, **mpi)
    results.add("parallel/hybrid-1x1-strong", 1.8, 1.8, **hybrid)
    results.add("parallel/hybrid-1x2-strong", 1.2, 1.2, cores=2, threads=2, **hybrid)
    results.add("parallel/hybrid-1x2-weak", 1.0, 1.0, cores=2, threads=2, **weak)


def add_oversubscribed(results, **metadata):
    run = {"cores": 8, "ranks": 8, "oversubscribed": True, "script": "parallel_cnn_mpi"}
    results.add("parallel/mpi-8-strong", 1.0, 1.0, **run, **metadata)


def add_loading(results):
    shards = {"dataset": "s3://b/1", "fingerprint": "of the shards"}
    for workers, duration in ((0, 1.0), (1, 0.5)):
        for source, option, data in (("memory", "builtin", {}), ("s3-shards", "s3://b/1", shards)):
            run = {
                "script": "train_cifar",
                "arguments": {"workers": workers, "source": option, "s3_mode": "shards"},
                **data,
            }
            name = f"loading/{source}-{workers}-workers"
            results.add(f"{name}-train", duration, duration, epoch={"loading": 0.2}, **run)
            results.add(f"{name}-load", 0.1, 0.1, epoch=LOADS_ONLY, **run)


def add_hardware(results):
    for name, forward in (("cnn-scratch-1-core", 0.5), ("cnn-pytorch-4-cores", 0.3)):
        results.add(f"hardware/{name}", 2.0, 2.2, epoch={"forward": forward, "backward": 1.0})


def add_split(results):
    for mode, duration, idle in (("all", 2.0, 0.0), ("split", 4.0, 0.7), ("pipelined", 2.5, 0.5)):
        results.add(
            f"split/{mode}",
            duration,
            duration,
            epoch={"forward": 1.0, "backward": 1.9},
            script="train_resnet50_split_cores",
            totals={"idle": {"forward": idle, "backward": idle / 2}},
        )


def run_analysis(results, *options):
    """Run the script on made results; returns analysis.json and the folder of the outputs."""
    results.write()
    analyze_results.main(["--results-dir", str(results.folder), *options])
    out = results.folder / "analysis"
    return json.loads((out / "analysis.json").read_text()), out


@pytest.fixture
def analyze(results, monkeypatch):
    """analyze() → run_analysis(results), but figures are drawn only, not laid out and written."""

    def describe_plot(plot, suite, notes, folder):
        return {"name": f"{suite}_{plot.name}", "notes": notes}

    monkeypatch.setattr(analyze_results, "save_plot", describe_plot)
    return lambda: run_analysis(results)


def analyze_logs(folder, *logs):
    """Run the script on logs; returns analysis.json."""
    out = folder / "out"
    analyze_results.main([*map(str, logs), "--output-dir", str(out)])
    return json.loads((out / "analysis.json").read_text())


def value(content, name):
    return content["facts"][name]["value"]


def figure_names(content):
    return {figure["name"] for figure in content["figures"]}


def read_table(out, name):
    with open(out / "tables" / f"{name}.csv", newline="") as file:
        return {row["configuration"]: row for row in csv.DictReader(file)}


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


def test_interval_is_student_t():
    found = estimate({1: 1.0, 2: 2.0, 3: 6.0})  # s = √7, t(0.975, 2) = 4.30265
    assert found.value == 3
    assert found.ci_half_width == pytest.approx(4.30265 * np.sqrt(7 / 3), rel=1e-5)
    single = estimate({1: 5.0})
    assert (single.value, single.low, single.high, single.n) == (5.0, None, None, 1)
    assert single.ci_half_width is None
    assert estimate({1: None, 2: float("nan")}) is None


def test_ratio_is_repeat_by_repeat():
    ours = estimate({1: 2.0, 2: 9.0, 3: 5.0})
    theirs = estimate({1: 1.0, 2: 3.0})
    assert ratio(ours, theirs).by_repeat.to_dict() == {1: 2.0, 2: 3.0}
    assert ratio(ours, estimate({7: 1.0})) is None
    assert ratio(ours, None) is None


def test_serial_fractions():
    assert karp_flatt(1.6, 2) == pytest.approx(0.25)
    assert karp_flatt(4.0, 4) == pytest.approx(0)
    cores = np.array([2, 4, 8])
    assert amdahl_fit(cores, 1 / (0.1 + 0.9 / cores)) == pytest.approx(0.1)
    assert amdahl_fit([2, 4], [1.6, 2.0]) == pytest.approx(0.25 / 0.8125)


def test_speedup_efficiency_and_fits(results, analyze):
    add_parallel(results)
    content, out = analyze()
    fact = content["facts"]["parallel.mpi-2-strong.speedup"]
    assert fact["value"] == pytest.approx(1.8)
    assert fact["high"] - 1.8 == pytest.approx(T * np.sqrt(0.08 / 2), rel=1e-4)
    assert fact["n"] == 2
    assert value(content, "parallel.mpi-2-strong.efficiency") == pytest.approx(90)
    assert value(content, "parallel.mpi-2-strong.serial_fraction") == pytest.approx(12.5)
    assert value(content, "parallel.mpi-4-strong.serial_fraction") == pytest.approx(100 / 3)
    amdahl = value(content, "parallel.mpi.amdahl_serial_fraction")
    assert amdahl == pytest.approx((30.7692 + 23.0769) / 2, rel=1e-4)

    # Hybrid is compared with hybrid on one core.
    assert value(content, "parallel.hybrid-1x2-strong.speedup") == pytest.approx(1.5)
    over_serial = value(content, "parallel.hybrid-1x2-strong.speedup_over_serial")
    assert over_serial == pytest.approx((2 / 1.2 + 2.5 / 1.2) / 2)
    assert value(content, "parallel.hybrid-1x2-weak.efficiency") == pytest.approx(90)
    assert "parallel.hybrid-1x2-weak.serial_fraction" not in content["facts"]

    row = read_table(out, "parallel_scaling")["mpi-2-strong"]
    assert float(row["speedup (×)"]) == pytest.approx(1.8)
    assert float(row["speedup_ci (×)"]) == pytest.approx(T * np.sqrt(0.08 / 2), rel=1e-4)
    assert float(row["images_per_s (images/s)"]) == 1600
    expected = {"parallel_speedup", "parallel_efficiency", "parallel_throughput"}
    assert expected <= figure_names(content)


def test_differences_are_those_of_repeats_with_the_same_seed(results, analyze):
    """Repeats have other seeds, and so other losses: repeat i is compared with repeat i."""
    for name, offset in (("a", 0.0), ("b", 0.25)):
        results.add(f"parallel/{name}", 4.0, 4.0)
        for repeat, seed, loss in ((1, 42, 1.0), (2, 43, 3.0)):
            epochs = [{"duration": 4.0, "loss": loss + offset, "test_loss": loss}]
            write_log(results.log(f"parallel/{name}", repeat), epochs, arguments={"seed": seed})
    content, _ = analyze()
    assert value(content, "parallel.b.loss_difference") == pytest.approx(0.25)


def test_largest_difference_is_over_all_epochs_of_what_computes_the_same(results, analyze):
    for name, losses, test_accuracy, seed in (
        ("a", (2.0, 1.0), 0.40, 1),
        ("b", (2.25, 1.0), 0.43, 1),
        ("c", (9.0, 1.0), 0.40, 2),
    ):
        results.add(f"parallel/{name}", 1.0)
        epochs = [{"duration": 1.0, "loss": x, "test_accuracy": test_accuracy} for x in losses]
        write_log(results.log(f"parallel/{name}"), epochs, arguments={"seed": seed})
    content, _ = analyze()
    assert value(content, "parallel.b.loss_difference") == pytest.approx(0.25)
    assert value(content, "parallel.b.accuracy_difference") == pytest.approx(3)
    assert value(content, "parallel.largest_loss_difference") == pytest.approx(0.25)
    assert "parallel.c.loss_difference" not in content["facts"]  # another seed


def test_a_training_that_diverged_is_named_and_nothing_is_made_of_its_losses(results, analyze):
    results.add("parallel/serial", 1.0, 1.0)
    diverged = {"loss": float("nan"), "test_loss": float("nan")}
    results.add("parallel/mpi-2-strong", 1.0, 1.0, epoch=diverged, cores=2)
    content, out = analyze()
    line = "losses of parallel/mpi-2-strong: not all are numbers, the training diverged"
    assert line in content["missing"]
    metrics = {name.rpartition(".")[2] for name in content["facts"] if "mpi-2-strong" in name}
    assert not {"train_loss", "loss_difference", "alone_images_per_s"} & metrics
    assert read_table(out, "parallel_learning")["mpi-2-strong"]["train_loss"] == ""
    assert "NaN" not in (out / "analysis.json").read_text()


def test_where_a_step_goes(results, analyze):
    """2.0 s: 0.5 forward, 1.0 backward, 0.2 communication, 0.1 loading; 0.2 s are the update.

    The epoch's own row has the mean communication of all ranks, with which rank 0's phases would
    not add up.
    """
    phases = {"loading": 0.1, "forward": 0.5, "backward": 1.0, "communication": 0.2}
    results.add("parallel/mpi-2-weak", 2.0, epoch=phases, cores=2, ranks=2)
    results.add("split/pipelined", 2.0, epoch={"forward": 1.2, "backward": 1.5})  # they overlap
    log = results.log("parallel/mpi-2-weak")
    log.write_text(log.read_text().replace(",0.5,1.0,0.2\n1,", ",0.5,1.0,0.9\n1,"))
    assert ",0.9\n" in log.read_text()

    content, _ = analyze()
    shares = [value(content, f"parallel.mpi-2-weak.{phase}_share") for phase in PHASES]
    assert PHASES == ("loading", "forward", "backward", "communication", "update")
    assert shares == pytest.approx([5, 25, 50, 10, 10])
    assert value(content, "parallel.mpi-2-weak.step_ms") == pytest.approx(1000)  # two steps
    assert value(content, "parallel.mpi-2-weak.backward_ms") == pytest.approx(500)
    assert "split.pipelined.update_share" not in content["facts"]
    assert "parallel_step" in figure_names(content)
    assert "split_step" not in figure_names(content)
    line = "speed-up of parallel/mpi-2-weak: there is no run on one core to compare it with"
    assert line in content["missing"]


def test_the_last_row_of_each_epoch_tells_the_steps(results, analyze):
    """A log without its other rows of batches has the same step, and no waits of batches."""
    add_loading(results)
    whole, _ = analyze()
    for path in results.folder.glob("**/run.csv"):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        kept = [row for row in rows if row[0] != "2" or row[5] == "2"]
        path.write_text("".join(",".join(row) + "\n" for row in kept))
    thin, _ = analyze()
    name = "loading.memory-0-workers-train"
    assert value(thin, f"{name}.step_ms") == value(whole, f"{name}.step_ms") == pytest.approx(500)
    assert value(whole, f"{name}.batch_loading_ms") == pytest.approx(100)
    assert f"{name}.batch_loading_ms" not in thin["facts"]
    assert figure_names(whole) - figure_names(thin) == {"loading_batches"}
    line = "loading: waiting batch by batch: the logs do not have the rows of all batches"
    assert line in thin["missing"]


def test_loading_per_epoch_and_per_batch(results, analyze):
    add_loading(results)
    write_log(
        results.log("loading/memory-0-workers-train"),
        [{"duration": 2.0, "loading": 0.5}, {"duration": 1.0, "loading": 0.1}],
        script="train_cifar",
        arguments={"workers": 0, "source": "builtin"},
    )
    content, out = analyze()
    without_worker = "loading.memory-0-workers-train"
    assert value(content, f"{without_worker}.first_loading_share") == pytest.approx((25 + 20) / 2)
    assert value(content, f"{without_worker}.later_loading_share") == pytest.approx(10)
    longest = value(content, f"{without_worker}.batch_loading_max_ms")
    assert longest == pytest.approx((250 + 100) / 2)
    median = value(content, "loading.memory-1-workers-train.batch_loading_ms")
    assert median == pytest.approx(100)  # 0.2 s, two batches
    alone = value(content, "loading.s3-shards-1-workers-train.alone_images_per_s")
    assert alone == pytest.approx(20_000)
    rows = {f"{source}-{n}-workers-train" for source in ("memory", "s3-shards") for n in (0, 1)}
    assert set(read_table(out, "loading_loading")) == rows
    assert len(content["environments"]) == 1  # the same images, wherever they came from


def test_split_modes(results, analyze):
    add_split(results)
    content, out = analyze()
    assert value(content, "split.split.speedup_over_all") == pytest.approx(0.5)
    assert value(content, "split.pipelined.speedup_over_split") == pytest.approx(1.6)
    assert value(content, "split.split.idle_forward") == pytest.approx(70)
    assert "idle_forward (%)" in read_table(out, "split_modes")["split"]


# --------------------------------------------------------------------------------------------------
# What a reader must not overlook
# --------------------------------------------------------------------------------------------------


def test_missing_and_failed_runs_are_named(results, analyze, capsys):
    results.add("parallel/serial", 1.0)
    output = ["first", "the last words", ""]
    results.add("parallel/mpi-2-strong", 1.0, status="timeout", output=output)
    results.left_out = {"hardware/cnn-pytorch-gpu": "there is no NVIDIA GPU"}
    content, _ = analyze()
    out, err = capsys.readouterr()
    for line in (
        "suite hardware: no run",
        "suite loading: no run",
        "suite split: no run",
        "GPU: no run used one",
        "hardware/cnn-pytorch-gpu: there is no NVIDIA GPU",
        "95 % intervals of parallel/serial: one run each",
    ):
        assert line in content["missing"]
        assert f"- {line}\n" in out.partition("\nnot analysed:\n")[2]
    assert "parallel/mpi-2-strong/1: timeout: the last words" in err
    assert content["failed_runs"][0]["output"] == output
    assert not any(name.startswith("parallel.mpi") for name in content["facts"])


def test_synthetic_data_oversubscription_and_commits_are_caveats(results, analyze, capsys):
    add_parallel(results, dataset="synthetic")
    add_oversubscribed(results, dataset="synthetic", git_commit="2" * 40)
    content, out = analyze()
    assert content["marks"][0] == "synthetic data"
    assert "oversubscribed: mpi-8-strong" in content["marks"]
    assert any("different commits" in caveat for caveat in content["marks"])
    assert "\ncaveats:\n- synthetic data\n" in capsys.readouterr().out
    assert "parallel.mpi-8-strong.serial_fraction" not in content["facts"]  # it has no eight cores
    assert "mpi-8-strong (oversubscribed)" in read_table(out, "parallel_scaling")
    for figure in content["figures"]:
        assert "SYNTHETIC DATA" in figure["notes"]
        assert "OVERSUBSCRIBED" in figure["notes"]
        assert "2 DIFFERENT COMMITS: 11111111, 22222222" in figure["notes"]


def test_machines_are_never_mixed(results, analyze):
    add_parallel(results)
    for number in range(8):  # most runs are those of a third machine
        results.add(f"hardware/{number}", 1.0, 1.0, host="third")
    for repeat in (1, 2):  # another one has run mpi-2-strong, and nothing to compare it with
        log = results.log("parallel/mpi-2-strong", repeat)
        write_log(log, [{"duration": 0.1}], host="there")
    content, _ = analyze()
    assert "parallel.mpi-2-strong.images_per_s" not in content["facts"]
    throughput = value(content, "parallel.mpi-2-strong [3].images_per_s")
    assert throughput == pytest.approx(20_000)
    assert value(content, "parallel.hybrid-1x2-strong [2].speedup") == pytest.approx(1.5)
    assert "parallel.mpi-2-strong [3].speedup" not in content["facts"]
    assert [e["host"] for e in content["environments"]] == ["third", "here", "there"]
    assert "curves of scaling: those of [3] are not drawn" in content["missing"]
    assert any("3 machines or data sets" in caveat for caveat in content["marks"])
    notes = {figure["name"]: figure["notes"] for figure in content["figures"]}
    assert "parallel_speedup" in notes
    assert "[2] A processor" in notes["parallel_throughput"]


# --------------------------------------------------------------------------------------------------
# Files that are broken, alone or many
# --------------------------------------------------------------------------------------------------


def test_logs_without_an_index(tmp_path, analyze, capsys):
    phases = {"forward": 0.2, "backward": 0.4}
    for name, duration in (("one/run", 1.0), ("two/run", 2.0), ("third", 4.0)):
        write_log(tmp_path / f"{name}.csv", [{"duration": duration, **phases}])
    (tmp_path / "third.json").unlink()
    out = tmp_path / "out"
    logs = [str(tmp_path / f"{name}.csv") for name in ("one/run", "two/run", "third")]
    analyze_results.main([*logs, "--output-dir", str(out)])
    rows = read_table(out, "files_results")
    assert list(rows) == ["one/run", "two/run", "third [2]"]
    assert [float(row["images_per_s (images/s)"]) for row in rows.values()] == [2000, 1000, 500]
    assert "third.json" in capsys.readouterr().err  # its machine is unknown: not compared
    content = json.loads((out / "analysis.json").read_text())
    figures = {"files_throughput", "files_step", "files_curves", "files_batches"}
    assert figure_names(content) == figures


NAMES = ["lr0.01", "lr0.02", "$$", "a$b_{$", "cost$5 vs $6", "_hidden", "^x_{", r"back\\slash"]


def test_logs_with_any_name_are_runs_of_their_own(tmp_path):
    """A dot is no suffix, and no name is a formula or missing from legend and tables."""
    for place, name in enumerate(NAMES):
        write_log(tmp_path / name, [{"duration": 1.0 + place, "loss": 1.0 + place}])
    write_log(tmp_path / "lr0.01.csv", [{"duration": 9.0}], seed=7)
    paths = [tmp_path / name for name in NAMES]
    analysis = analyze_logs(tmp_path, *paths)
    rows = {row[0]: row for row in analysis["tables"][0]["rows"]}
    assert list(rows) == NAMES
    assert [rows[name][2] for name in NAMES] == [1.0 + place for place in range(len(NAMES))]
    for figure in ("files_curves", "files_throughput"):
        picture = (tmp_path / f"out/figures/{figure}.svg").read_text()
        shown = re.sub("<!--.*?-->", "", picture)  # as comments it has all texts in any case
        for name in NAMES:
            assert name in shown, (figure, name)

    both = analyze_logs(tmp_path, tmp_path / "lr0.01", tmp_path / "lr0.01.csv")
    assert [row[0] for row in both["tables"][0]["rows"]] == ["lr0.01", "lr0.01.csv"]


def test_a_backend_of_a_notebook_changes_nothing(tmp_path, run_script):
    """A kernel exports one for its pages, which need not be installed beside the scripts."""
    write_log(tmp_path / "run.csv", [{"duration": 1.0}])
    backend = "module://matplotlib_inline.backend_inline"
    script = "experiments/analyze_results.py"
    run_script(script, "run.csv", "--output-dir", "out", env={"MPLBACKEND": backend})
    assert (tmp_path / "out/figures/files_throughput.png").exists()


def test_metadata_of_a_log_with_a_dot_from_an_earlier_version(tmp_path):
    """lr0.01 and lr0.02 had both lr0.json, which describes the last of them."""
    for name in ("lr0.01", "lr0.02"):
        write_log(tmp_path / name, [{"duration": 1.0}], arguments={"log": f"runs/{name}"})
        metadata_path(tmp_path / name).rename(tmp_path / "lr0.json")
    analysis = analyze_logs(tmp_path, tmp_path / "lr0.01", tmp_path / "lr0.02")
    assert len(analysis["environments"]) == 2
    unknown = [line for line in analysis["missing"] if "unknown" in line]
    assert len(unknown) == 1
    assert "lr0.01" in unknown[0]


def test_a_log_saved_by_a_spreadsheet(tmp_path):
    """With a byte order mark it is read; with semicolons and decimal commas the line says why."""
    log = tmp_path / "run.csv"
    write_log(log, [{"duration": 2.0}])
    text = log.read_text()
    log.write_text(text.replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    analysis = analyze_logs(tmp_path, log)
    assert analysis["tables"][0]["rows"][0][2] == 2.0
    for separator in ";\t":
        log.write_text(text.replace(",", separator).replace(".", ","), encoding="utf-8-sig")
        line = refused(analyze_results.main, log)
        assert f"{log} was saved by a spreadsheet" in line


def test_damaged_logs_are_named_and_the_rest_goes_on(results, analyze, capsys):
    results.add("parallel/serial", 1.0, 2.0, 4.0, 1.0)
    logs = [results.log("parallel/serial", repeat) for repeat in (1, 2, 3, 4)]
    logs[0].write_text(logs[0].read_text() + "2,2,17")  # cut off
    logs[1].write_text("something,else\n")
    logs[2].with_suffix(".json").write_text("{")

    # Damaged rows in the middle: one too short, one with a cell that is not a number, one without
    # the time that it took.
    rows = logs[3].read_text().splitlines()
    damaged = rows[1].replace("2000.0", "2000.O")
    assert damaged != rows[1]
    rows[1:1] = ["2,1", damaged, "0,1" + 14 * ","]
    logs[3].write_text("\n".join(rows) + "\n")

    content, _ = analyze()
    err = capsys.readouterr().err
    assert f"{logs[0]}: 1 damaged or cut off lines are left out" in err
    assert f"{logs[1]} is not a run log" in err
    assert f"{logs[2].with_suffix('.json')}: it is not JSON" in err
    assert f"{logs[3]}: 3 damaged or cut off lines are left out" in err
    assert len(err.splitlines()) == 4
    assert content["runs"] == 3
    assert value(content, "parallel.serial.images_per_s") == 2000


def test_a_run_that_is_not_done_says_so(tmp_path, analyze, capsys):
    write_log(tmp_path / "x.csv", [{"duration": 1.0}], status="interrupted")
    analyze_results.main([str(tmp_path / "x.csv"), "--output-dir", str(tmp_path / "out")])
    assert "x.csv: this run is interrupted: what counts are its complete epochs" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (None, "run make experiments first"),
        ("{", "is not an index of runs"),
        ('{"runs": [{}]}', "is not an index of runs"),
        ('{"settings": {}, "runs": [{}]}', "is not an index of runs"),
        ('{"settings": {}, "runs": []}', "no run that is done"),
    ],
)
def test_no_results_is_one_error_line(tmp_path, index, reason):
    if index:
        (tmp_path / "index.json").write_text(index)
    assert reason in refused(analyze_results.main, "--results-dir", tmp_path)
    assert not (tmp_path / "analysis").exists()


@pytest.mark.parametrize("content", [None, "", "a,b\n1,2\n", ",".join(COLUMNS) + "\n", "\0\xff"])
def test_a_named_file_that_is_no_log_is_one_error_line(tmp_path, content):
    log = tmp_path / "x.csv"
    if content is not None:
        log.write_bytes(content.encode("latin1"))
    assert "x.csv" in refused(analyze_results.main, log, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_hundred_runs(results, analyze):
    for ranks in (2, 4, 8, 16, 32):
        durations = [2 / ranks + 0.01 * i for i in range(18)]
        run = {"cores": ranks, "ranks": ranks, "script": "parallel_cnn_mpi"}
        for scaling in ("strong", "weak"):
            results.add(f"parallel/mpi-{ranks}-{scaling}", *durations, **run)
    results.add("parallel/serial", *[2.0] * 20)
    content, _ = analyze()
    assert content["runs"] == 200


# --------------------------------------------------------------------------------------------------
# Figures, laid out and written
# --------------------------------------------------------------------------------------------------


def test_changed_results_change_numbers_and_figures(results):
    results.add("parallel/serial", 2.0, 2.5)
    results.add("parallel/mpi-2-strong", 1.25, 1.25, cores=2, ranks=2, script="parallel_cnn_mpi")
    before, out = run_analysis(results)
    drawn = (out / "figures/parallel_speedup.svg").read_text()
    log = results.log("parallel/mpi-2-strong", 1)
    write_log(log, [{"duration": 1.0}], ranks=2, script="parallel_cnn_mpi")
    after, _ = run_analysis(results)
    assert value(after, "parallel.mpi-2-strong.speedup") == pytest.approx(2.0)
    assert value(before, "parallel.mpi-2-strong.speedup") == pytest.approx(1.8)
    assert (out / "figures/parallel_speedup.svg").read_text() != drawn


def test_same_results_give_the_same_files(results):
    add_hardware(results)
    _, out = run_analysis(results)
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(out)
    run_analysis(results)
    second = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert second == first


def overlaps(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


def tick_labels(axis, limits):
    """The labels of an axis's ticks within its limits; none where another panel shows them."""
    if not axis.get_tick_params().get("labelleft", True):
        return []
    low, high = sorted(limits)
    visible = [label for label in axis.get_ticklabels() if label.get_visible()]
    place = 0 if axis.axis_name == "x" else 1
    return [label for label in visible if low <= label.get_position()[place] <= high]


def texts_of(figure):
    """Tick labels, axis labels, titles, numbers beside bars, legend and notes of a figure."""
    texts = []
    for ax in figure.axes:
        if ax.get_visible():
            texts += tick_labels(ax.xaxis, ax.get_xlim())
            texts += tick_labels(ax.yaxis, ax.get_ylim())
            texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
    texts = [text for text in texts if text.get_text()]
    return [*texts, figure._supxlabel, *figure.legends]


@pytest.mark.parametrize("style", ["report", pytest.param("slides", marks=pytest.mark.slow)])
def test_no_labels_overlap_and_notes_are_in_the_pictures(results, monkeypatch, style):
    """All texts of all figures stay apart and inside the picture; both files have the notes."""
    add_parallel(results)
    add_oversubscribed(results, git_commit="2" * 40)
    add_loading(results)
    add_hardware(results)
    add_split(results)
    save_plot = analyze_results.save_plot
    checked = []

    def check(plot, suite, notes, folder):
        entry = save_plot(plot, suite, notes, folder)
        figure = plot.figure
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        texts = texts_of(figure)
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
        for (text, box), (other, other_box) in itertools.combinations(
            zip(texts, boxes, strict=True), 2
        ):
            assert not overlaps(box, other_box), f"{entry['name']}: {text} and {other}"
        for text, box in zip(texts, boxes, strict=True):
            assert box.x0 >= -1, f"{entry['name']}: {text}"
            assert box.y0 >= -1, f"{entry['name']}: {text}"
            assert box.x1 <= figure.bbox.x1 + 1, f"{entry['name']}: {text}"
            assert box.y1 <= figure.bbox.y1 + 1, f"{entry['name']}: {text}"

        assert (folder / f"{entry['name']}.png").stat().st_size > 5000
        svg = (folder / f"{entry['name']}.svg").read_text()
        for line in notes.splitlines():
            assert line in svg
        checked.append(entry["name"])
        return entry

    monkeypatch.setattr(analyze_results, "save_plot", check)
    content, _ = run_analysis(results, "--style", style)
    assert checked == [figure["name"] for figure in content["figures"]]
    assert len(checked) >= 12


# --------------------------------------------------------------------------------------------------
# Marks, names, slides and traces
# --------------------------------------------------------------------------------------------------


def test_run_that_was_short_of_cpu_is_marked(results, analyze):
    """Its threads waited for cores that something else used: no speed of it stands unmarked."""
    add_parallel(results)
    slowed = {"script": "parallel_cnn_mpi", "totals": {"cpu_share": 0.62}}
    results.add("parallel/mpi-8-weak", 4.0, cores=4, ranks=4, **slowed)
    results.add("parallel/mpi-8-strong", 4.0, cores=8, oversubscribed=True, **slowed)
    content, out = analyze()

    marked = [mark for mark in content["marks"] if mark.startswith("short of CPU")]
    assert len(marked) == 1
    assert marked[0].endswith(": mpi-8-weak")  # the other one took its own cores
    assert "mpi-8-weak (short of CPU)" in read_table(out, "parallel_scaling")
    row = read_table(out, "parallel_results")["mpi-8-weak (short of CPU)"]
    assert float(row["cpu_share (% of asked for)"]) == 62
    for figure in content["figures"]:
        assert "SHORT OF CPU" in figure["notes"]
        assert "MPI, 8 ranks, weak: 62%" in figure["notes"].replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("serial", "serial"),
        ("mpi-2-strong", "MPI, 2 ranks, strong"),
        ("hybrid-1x2-weak", "hybrid, 1 rank × 2 threads, weak"),
        ("cnn-scratch-1-core", "CNN from scratch, 1 core"),
        ("resnet18-pytorch-gpu", "ResNet-18 in PyTorch, GPU"),
        ("s3-shards-2-workers-train", "S3 shards, 2 workers"),
        ("serial-2-im2col", "serial: im2col"),
        ("pipelined", "pipelined"),
    ],
)
def test_readable_names(name, label):
    assert readable_name(name) == label


def write_trace(path, steps=5):
    """A trace of two ranks, whose steps take 10 ms each."""
    events = []
    for rank in (0, 1):
        track = {"pid": rank, "tid": rank}
        events.append({**track, "ph": "M", "name": "thread_name", "args": {"name": "MainThread"}})
        for step in range(steps):
            start = 10_000 * step
            spans = (
                ("loading", 0, 1000),
                ("forward", 1000, 3000),
                ("0 Dense forward", 1000, 2500),
                ("backward", 4000, 4000),
                ("gradients 0:10", 7000, 100),
                ("communication", 8000, 1000),
                ("update", 9000, 900),
            )
            for name, begin, duration in spans:
                span = {"name": name, "ts": start + begin, "dur": duration}
                events.append({**track, **span, "ph": "X"})
    path.write_text(json.dumps({"traceEvents": events}))


def test_trace_is_drawn_two_steps_long(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(path)
    spans = read_trace(path)
    assert {span.track for span in spans} == {
        f"rank {r}{t}" for r in "01" for t in ("", ", layers")
    }
    assert len(spans) == 2 * 2 * 7  # ranks × steps × spans
    assert min(span.start for span in spans) == 0
    assert max(span.end for span in spans) == pytest.approx(19.9)
    kinds = {span.name: span.kind for span in spans}
    assert kinds["0 Dense forward"] == "forward"
    assert kinds["gradients 0:10"] == "communication"


def test_traces_of_a_suite_and_damaged_ones(results, analyze, capsys):
    """The run on the most cores is drawn; a trace that cannot be read costs its picture only."""
    add_parallel(results, arguments={"trace": "elsewhere/trace.json"})
    write_trace(results.log("parallel/mpi-2-strong").with_name("trace.json"))
    write_trace(results.log("parallel/mpi-4-strong").with_name("trace.json"))
    content, _ = analyze()
    assert "parallel_trace" in figure_names(content)

    for text in ("{}", "not JSON", '{"traceEvents": [{}]}'):
        results.log("parallel/mpi-4-strong").with_name("trace.json").write_text(text)
        content, _ = analyze()
        assert "parallel_trace" not in figure_names(content)
        assert "parallel_speedup" in figure_names(content)
        assert any("trace.json is no trace" in line for line in content["missing"])
    write_trace(results.log("parallel/mpi-4-strong").with_name("trace.json"), steps=2)
    content, _ = analyze()
    assert any("no complete step" in line for line in content["missing"])


# --------------------------------------------------------------------------------------------------
# As users run it
# --------------------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    """The command of the README, in a process of its own."""
    results = Results(tmp_path / "results")
    results.add("parallel/serial", 1.0)
    results.write()
    command = ("experiments/analyze_results.py", "--results-dir", "./results")
    out, err = finish(start(tmp_path, *command))
    assert err == ""
    assert "parallel: time, throughput and resources\n" in out
    assert out.endswith("\n1 runs analysed, 0 failed; written: results/analysis\n")
    assert (tmp_path / "results/analysis/analysis.json").exists()


def test_refused_command_line(tmp_path):
    out, err = finish(start(tmp_path, "experiments/analyze_results.py", "x.csv"), status=2)
    assert out == ""
    assert_one_error_line(err)
    assert "x.csv: No such file" in err


def test_log_of_a_real_run(tmp_path, serial, analyze):
    options = ("--dataset", "synthetic", "--epochs", 2, "--subset", 64, "--batch-size", 16)
    log = serial(*options) / "results/serial_cnn.csv"
    out = tmp_path / "out"
    analyze_results.main([str(log), "--output-dir", str(out)])
    content = json.loads((out / "analysis.json").read_text())
    totals = json.loads(log.with_suffix(".json").read_text())["totals"]
    name = "files.serial_cnn"
    throughput = value(content, f"{name}.images_per_s")
    assert throughput == pytest.approx(totals["images_per_s"], rel=1e-4)
    accuracy = value(content, f"{name}.test_accuracy")
    assert accuracy == pytest.approx(100 * totals["final_accuracy"], abs=1e-3)
    phases = ("loading", "forward", "backward", "update")
    assert sum(value(content, f"{name}.{phase}_share") for phase in phases) == pytest.approx(100)
    assert content["marks"][0] == "synthetic data"
    assert content["missing"] == [
        "GPU: no run used one",
        "95 % intervals of files/serial_cnn: one run each",
    ]


@pytest.mark.slow
def test_real_experiment(tmp_path, cache):
    options = ("--dataset", "synthetic", "--epochs", 2, "--subset", 64, "--batch-size", 16)
    for only in ("serial", "mpi-2"):
        suite = ("--only", only, "--repeats", 2, "--oversubscribe", *options)
        experiments = start(tmp_path, "experiments/run_experiments.py", *suite, env=cache)
        finish(experiments, timeout=200)
    out, err = finish(start(tmp_path, "experiments/analyze_results.py"))
    assert err == ""
    assert "written: results/analysis" in out
    content = json.loads((tmp_path / "results/analysis/analysis.json").read_text())
    assert content["runs"] == 6
    assert "synthetic data" in content["marks"]

    throughputs = []
    for name in ("serial", "mpi-2-strong"):
        runs = [tmp_path / f"results/parallel/{name}/{repeat}/run.json" for repeat in (1, 2)]
        totals = [json.loads(run.read_text())["totals"] for run in runs]
        throughputs.append(np.array([run["images_per_s"] for run in totals]))
        measured = value(content, f"parallel.{name}.images_per_s")
        assert measured == pytest.approx(throughputs[-1].mean(), rel=1e-5)
        accuracy = value(content, f"parallel.{name}.test_accuracy")
        mean_accuracy = 100 * np.mean([run["final_accuracy"] for run in totals])
        assert accuracy == pytest.approx(mean_accuracy, abs=1e-3)

    speedup = value(content, "parallel.mpi-2-strong.speedup")
    assert speedup == pytest.approx((throughputs[1] / throughputs[0]).mean(), rel=1e-4)
    assert value(content, "parallel.mpi-2-strong.loss_difference") < 0.02  # the same computation
    shares = [value(content, f"parallel.mpi-2-strong.{phase}_share") for phase in PHASES]
    assert sum(shares) == pytest.approx(100)


def test_confusion_matrices_of_logs(tmp_path, cache):
    """As table, CSV and figure; of a metrics file that another run has overwritten, none."""
    options = ("--dataset", "synthetic", "--epochs", 1, "--subset", 40, "--quiet")
    finish(start(tmp_path, "serial_cnn.py", *options, env=cache))
    out, _ = finish(start(tmp_path, "experiments/analyze_results.py", "results/serial_cnn.csv"))
    assert "confusion matrix of serial_cnn" in out
    assert re.search(r"airplane +automobile .* +found", out)
    folder = tmp_path / "results/analysis_of_logs"
    header, *rows = (folder / "tables/confusion_serial_cnn.csv").read_text().splitlines()
    assert header.startswith("label \\ predicted,airplane,")
    assert sum(int(count) for row in rows for count in row.split(",")[1:]) == 8
    assert (folder / "figures/files_confusion_serial_cnn.svg").exists()

    counts = np.zeros((30, 30), int)
    counts[3, 4] = 5
    counts[0, 0] = 9
    matrix = confusion.Confusion("run", [f"c{i}" for i in range(30)], counts)
    assert re.search(r"c3 +c4 +5 of 5", confusion.describe_confusion(matrix))
    np.savez(tmp_path / "results/serial_cnn_metrics.npz", confusion=counts, classes=matrix.classes)
    assert confusion.find_confusion(tmp_path / "results/serial_cnn.csv") is None
