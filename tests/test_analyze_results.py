"""analyze_results.py: its numbers against some worked out by hand, on small made logs and on those of a real run."""

import csv
import itertools
import json
import shutil

import analyze_results
import numpy as np
import pytest
from analyze_results import amdahl_fit, estimate, karp_flatt, ratio
from helpers import COLUMNS, assert_one_error_line, finish, start

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
SUMS = ("loading", "duration", "forward", "backward", "communication")  # since the epoch began
T = 12.7062  # Student's t, 97.5 %, one degree of freedom


def write_log(path, epochs, batches=2, **sidecar):
    """A run log of 2,000 images an epoch and its sidecar; epochs: dicts of columns, with the duration at least."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, epoch in enumerate(epochs, 1):
        common = {
            "epoch": number,
            "start": 0,
            "loading": 0.1,
            "loss": 1.0,
            "value1": 0.5,
            "value2": 0.9,
            "ram_mb": 50,
            "images_per_s": 2000 / epoch["duration"],
        }
        for batch in range(1, batches + 1):
            sums = {c: v * batch / batches for c, v in {**common, **epoch}.items() if c in SUMS}
            rows.append({**common, **sums, "type": 2, "value1": batch, "value2": batches})
        rows.append(
            {**common, **{k: v for k, v in epoch.items() if not k.startswith("test_")}, "type": 0}
        )
        if epoch.get("value1", 0) is not None:
            test = {"loss": epoch.get("test_loss", 1.5), "value1": epoch.get("test_accuracy", 0.4)}
            rows.append({**common, **test, "duration": 0.3, "type": 1})
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    content = {
        "script": "serial_cnn",
        "ranks": 1,
        "threads": 1,
        "end": 1e9,
        "status": "done",
        **MACHINE,
        **sidecar,
    }
    content["arguments"] = {
        "batch_size": 64,
        "seed": 42,
        "model": "cnn",
        **sidecar.get("arguments", {}),
    }
    content["totals"] = {
        "peak_ram_mb": 100.0,
        "mean_cpu_percent": 99.0,
        **sidecar.get("totals", {}),
    }
    path.with_suffix(".json").write_text(json.dumps(content))


class Results:
    """A results folder as run_experiments.py leaves it."""

    def __init__(self, folder):
        self.folder, self.runs, self.left_out = folder, [], {}

    def add(
        self,
        name,
        *durations,
        status="done",
        cores=1,
        oversubscribed=False,
        epoch=(),
        output=(),
        **sidecar,
    ):
        """A run of one epoch for each duration: repeats 1, 2, ... epoch: further columns of it."""
        suite, _, configuration = name.partition("/")
        for repeat, duration in enumerate(durations, 1):
            place = f"{name}/{repeat}"
            self.runs.append(
                {
                    "suite": suite,
                    "configuration": configuration,
                    "repeat": repeat,
                    "status": status,
                    "folder": place,
                    "cores": cores,
                    "oversubscribed": oversubscribed,
                    "output": list(output),
                }
            )
            if status == "done":
                write_log(
                    self.folder / place / "run.csv",
                    [{"duration": duration, **dict(epoch)}],
                    **sidecar,
                )

    def write(self):
        settings = {"dataset": MACHINE["dataset"], "fingerprint": MACHINE["fingerprint"]}
        index = {"settings": settings, "runs": self.runs, "left_out": self.left_out}
        (self.folder / "index.json").write_text(json.dumps(index))


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path)


def add_parallel(results, **sidecar):
    """Speed-ups of MPI: 1.6 and 2.0 on two cores, 2.0 and 2.0 on four; hybrid on two: 1.5 and 1.5, weak 1.8 and 1.8."""
    results.add("parallel/serial", 2.0, 2.5, **sidecar)
    results.add(
        "parallel/mpi-2-strong", 1.25, 1.25, cores=2, ranks=2, script="parallel_cnn_mpi", **sidecar
    )
    results.add(
        "parallel/mpi-4-strong", 1.0, 1.25, cores=4, ranks=4, script="parallel_cnn_mpi", **sidecar
    )
    results.add("parallel/hybrid-1x1-strong", 1.8, 1.8, script="parallel_cnn_hybrid", **sidecar)
    results.add(
        "parallel/hybrid-1x2-strong",
        1.2,
        1.2,
        cores=2,
        threads=2,
        script="parallel_cnn_hybrid",
        **sidecar,
    )
    results.add(
        "parallel/hybrid-1x2-weak",
        1.0,
        1.0,
        cores=2,
        threads=2,
        script="parallel_cnn_hybrid",
        **{**sidecar, "arguments": {"global_batch_size": 128}},
    )


def add_loading(results):
    for workers, duration in ((0, 1.0), (1, 0.5)):
        for source, option in (("memory", "builtin"), ("s3-shards", "s3://b/1")):
            arguments = {"workers": workers, "source": option, "s3_mode": "shards"}
            name, script = f"loading/{source}-{workers}-workers", "train_cifar"
            data = (
                {}
                if source == "memory"
                else {"dataset": "s3://b/1", "fingerprint": "of the shards"}
            )
            results.add(
                f"{name}-train",
                duration,
                duration,
                epoch={"loading": 0.2},
                arguments=arguments,
                script=script,
                **data,
            )
            results.add(
                f"{name}-load",
                0.1,
                0.1,
                epoch={"value1": None, "value2": None, "loss": None},
                arguments=arguments,
                script=script,
                **data,
            )


def add_rest(results):
    for name, forward in (("cnn-scratch-1-core", 0.5), ("cnn-pytorch-4-cores", 0.3)):
        results.add(f"hardware/{name}", 2.0, 2.2, epoch={"forward": forward, "backward": 1.0})
    for mode, duration, idle in (("all", 2.0, 0.0), ("split", 4.0, 0.7), ("pipelined", 2.5, 0.5)):
        results.add(
            f"split/{mode}",
            duration,
            duration,
            epoch={"forward": 1.0, "backward": 1.9},
            script="train_resnet50_split_cores",
            totals={"idle": {"forward": idle, "backward": idle / 2}},
        )


def analyze(results):
    """Run the analysis; returns analysis.json and the folder of the outputs."""
    results.write()
    out = results.folder / "analysis"
    analyze_results.main(["--results-dir", str(results.folder)])
    return json.loads((out / "analysis.json").read_text()), out


def value(content, name):
    return content["facts"][name]["value"]


def read_table(out, name):
    with open(out / "tables" / f"{name}.csv", newline="") as file:
        return {row["configuration"]: row for row in csv.DictReader(file)}


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_interval_is_student_t():
    found = estimate({1: 1.0, 2: 2.0, 3: 6.0})  # s = √7, t(0.975, 2) = 4.30265
    assert found.value == 3
    assert found.half == pytest.approx(4.30265 * np.sqrt(7 / 3), rel=1e-5)
    assert estimate({1: 5.0})[:4] == (5.0, None, None, 1)
    assert estimate({1: None, 2: float("nan")}) is None


def test_the_last_row_of_each_epoch_tells_the_steps(results):
    """A log without the other rows of batches, as docs/ keeps it, has the same step, and no waits of batches."""
    add_loading(results)
    whole, _ = analyze(results)
    for path in results.folder.glob("**/run.csv"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text(
            "".join(
                line for line in lines if line.split(",")[:1] != ["2"] or line.split(",")[5] == "2"
            )
        )
    thin, _ = analyze(results)
    name = "loading.memory-0-workers-train"
    assert value(thin, f"{name}.step_ms") == value(whole, f"{name}.step_ms") == pytest.approx(500)
    assert value(whole, f"{name}.batch_loading_ms") == pytest.approx(100)
    assert f"{name}.batch_loading_ms" not in thin["facts"]
    assert [figure["name"] for figure in whole["figures"] if figure not in thin["figures"]] == [
        "loading_batches"
    ]
    assert (
        "loading: waiting batch by batch: the logs do not have the rows of all batches"
        in thin["missing"]
    )


def test_ratio_is_repeat_by_repeat():
    ours, theirs = estimate({1: 2.0, 2: 9.0, 3: 5.0}), estimate({1: 1.0, 2: 3.0})
    assert ratio(ours, theirs).values == {1: 2.0, 2: 3.0}
    assert ratio(ours, estimate({7: 1.0})) is None


def test_serial_fractions():
    assert karp_flatt(1.6, 2) == pytest.approx(0.25)
    assert karp_flatt(4.0, 4) == pytest.approx(0)
    assert amdahl_fit([(p, 1 / (0.1 + 0.9 / p)) for p in (2, 4, 8)]) == pytest.approx(0.1)
    assert amdahl_fit([(2, 1.6), (4, 2.0)]) == pytest.approx(0.25 / 0.8125)


def test_speedup_efficiency_and_fits(results):
    add_parallel(results)
    content, out = analyze(results)
    fact = content["facts"]["parallel.mpi-2-strong.speedup"]
    assert fact["value"] == pytest.approx(1.8)
    assert fact["high"] - 1.8 == pytest.approx(T * np.sqrt(0.08 / 2), rel=1e-4)
    assert fact["n"] == 2
    assert value(content, "parallel.mpi-2-strong.efficiency") == pytest.approx(90)
    assert value(content, "parallel.mpi-2-strong.serial_fraction") == pytest.approx(12.5)
    assert value(content, "parallel.mpi-4-strong.serial_fraction") == pytest.approx(100 / 3)
    assert value(content, "parallel.mpi.amdahl_serial_fraction") == pytest.approx(
        (30.7692 + 23.0769) / 2, rel=1e-4
    )
    assert value(content, "parallel.hybrid-1x2-strong.speedup") == pytest.approx(
        1.5
    )  # against hybrid on one core
    assert value(content, "parallel.hybrid-1x2-strong.speedup_over_serial") == pytest.approx(
        (2 / 1.2 + 2.5 / 1.2) / 2
    )
    assert value(content, "parallel.hybrid-1x2-weak.efficiency") == pytest.approx(90)
    assert "parallel.hybrid-1x2-weak.serial_fraction" not in content["facts"]
    row = read_table(out, "parallel_scaling")["mpi-2-strong"]
    assert float(row["speedup (×)"]) == pytest.approx(1.8)
    assert float(row["speedup_ci (×)"]) == pytest.approx(T * np.sqrt(0.08 / 2), rel=1e-4)
    assert float(row["images_per_s (images/s)"]) == 1600
    assert {"parallel_speedup", "parallel_efficiency", "parallel_throughput"} <= {
        f["name"] for f in content["figures"]
    }
    for figure in content["figures"]:
        assert (out / f"figures/{figure['name']}.png").stat().st_size > 5000
        assert (out / f"figures/{figure['name']}.svg").stat().st_size > 5000


def test_changed_results_change_numbers_and_figures(results):
    add_parallel(results)
    before, out = analyze(results)
    drawn = (out / "figures/parallel_speedup.svg").read_text()
    log = results.folder / "parallel/mpi-2-strong/1/run.csv"
    write_log(log, [{"duration": 1.0}], ranks=2, script="parallel_cnn_mpi")
    after, _ = analyze(results)
    assert value(after, "parallel.mpi-2-strong.speedup") == pytest.approx(2.0)
    assert value(before, "parallel.mpi-2-strong.speedup") == pytest.approx(1.8)
    assert (out / "figures/parallel_speedup.svg").read_text() != drawn


def test_same_results_give_the_same_files(results):
    add_rest(results)
    _, out = analyze(results)
    first = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    shutil.rmtree(out)
    analyze(results)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == first


def test_largest_difference_is_over_all_epochs_of_what_computes_the_same(results):
    for name, losses, test, seed in (
        ("a", (2.0, 1.0), 0.40, 1),
        ("b", (2.25, 1.0), 0.43, 1),
        ("c", (9.0, 1.0), 0.40, 2),
    ):
        results.add(f"parallel/{name}", 1.0)
        epochs = [{"duration": 1.0, "loss": loss, "test_accuracy": test} for loss in losses]
        write_log(results.folder / f"parallel/{name}/1/run.csv", epochs, arguments={"seed": seed})
    content, _ = analyze(results)
    assert value(content, "parallel.b.loss_difference") == pytest.approx(0.25)
    assert value(content, "parallel.b.accuracy_difference") == pytest.approx(3)
    assert value(content, "parallel.largest_loss_difference") == pytest.approx(0.25)
    assert "parallel.c.loss_difference" not in content["facts"]  # another seed


def test_a_training_that_diverged_is_named_and_nothing_is_made_of_its_losses(results):
    results.add("parallel/serial", 1.0, 1.0)
    results.add(
        "parallel/mpi-2-strong",
        1.0,
        1.0,
        epoch={"loss": float("nan"), "test_loss": float("nan")},
        cores=2,
    )
    content, out = analyze(results)
    assert (
        "losses of parallel/mpi-2-strong: not all are numbers, the training diverged"
        in content["missing"]
    )
    assert not {"train_loss", "loss_difference", "alone_images_per_s"} & {
        name.rpartition(".")[2] for name in content["facts"] if "mpi-2-strong" in name
    }
    assert read_table(out, "parallel_learning")["mpi-2-strong"]["train_loss"] == ""
    assert "NaN" not in (out / "analysis.json").read_text()


def test_where_a_step_goes(results):
    """Half a second of 2.0 for forward, 1.0 backward, 0.2 communication, 0.1 loading: 0.2 are the update and the rest.

    The epoch's own row has the ranks' mean of the communication, with which rank 0's phases would not add up.
    """
    phases = {"loading": 0.1, "forward": 0.5, "backward": 1.0, "communication": 0.2}
    results.add("parallel/mpi-2-weak", 2.0, epoch=phases, cores=2, ranks=2)
    results.add("split/pipelined", 2.0, epoch={"forward": 1.2, "backward": 1.5})  # overlap
    log = results.folder / "parallel/mpi-2-weak/1/run.csv"
    log.write_text(log.read_text().replace(",0.5,1.0,0.2\n1,", ",0.5,1.0,0.9\n1,"))
    assert ",0.9\n" in log.read_text()
    content, out = analyze(results)
    for phase, share in (
        ("loading", 5),
        ("forward", 25),
        ("backward", 50),
        ("communication", 10),
        ("update", 10),
    ):
        assert value(content, f"parallel.mpi-2-weak.{phase}_share") == pytest.approx(share)
    assert value(content, "parallel.mpi-2-weak.step_ms") == pytest.approx(1000)  # two steps
    assert value(content, "parallel.mpi-2-weak.backward_ms") == pytest.approx(500)
    assert "split.pipelined.update_share" not in content["facts"]
    assert not (out / "figures/split_step.png").exists()
    assert (
        "speed-up of parallel/mpi-2-weak: there is no run on one core to compare it with"
        in content["missing"]
    )


def test_loading_per_epoch_and_per_batch(results):
    add_loading(results)
    write_log(
        results.folder / "loading/memory-0-workers-train/1/run.csv",
        [{"duration": 2.0, "loading": 0.5}, {"duration": 1.0, "loading": 0.1}],
        script="train_cifar",
        arguments={"workers": 0, "source": "builtin"},
    )
    content, out = analyze(results)
    assert value(content, "loading.memory-0-workers-train.first_loading_share") == pytest.approx(
        (25 + 20) / 2
    )
    assert value(content, "loading.memory-0-workers-train.later_loading_share") == pytest.approx(10)
    assert value(content, "loading.memory-1-workers-train.batch_loading_ms") == pytest.approx(
        100
    )  # 0.2 s, two batches
    assert value(content, "loading.memory-0-workers-train.batch_loading_max_ms") == pytest.approx(
        (250 + 100) / 2
    )
    assert value(content, "loading.s3-shards-1-workers-train.alone_images_per_s") == pytest.approx(
        20_000
    )
    assert set(read_table(out, "loading_loading")) == {
        f"{source}-{n}-workers-train" for source in ("memory", "s3-shards") for n in (0, 1)
    }
    assert len(content["environments"]) == 1  # the same images, wherever they came from


def test_split_modes(results):
    add_rest(results)
    content, out = analyze(results)
    assert value(content, "split.split.speedup_over_all") == pytest.approx(0.5)
    assert value(content, "split.pipelined.speedup_over_split") == pytest.approx(1.6)
    assert value(content, "split.split.idle_forward") == pytest.approx(70)
    assert "idle_forward (%)" in read_table(out, "split_modes")["split"]


# -- what a reader must not overlook ----------------------------------------------------------------------------------


def test_missing_pieces_and_failed_runs_are_named(results, capsys):
    results.add("parallel/serial", 1.0)
    results.add(
        "parallel/mpi-2-strong", 1.0, status="timeout", output=["first", "the last words", ""]
    )
    results.left_out = {"hardware/cnn-pytorch-gpu": "there is no NVIDIA GPU"}
    content, _ = analyze(results)
    out, err = capsys.readouterr()
    for text in (
        "suite hardware: no run",
        "suite loading: no run",
        "suite split: no run",
        "GPU: no run used one",
        "hardware/cnn-pytorch-gpu: there is no NVIDIA GPU",
        "95 % intervals of parallel/serial: one run each",
    ):
        assert text in content["missing"]
        assert text in out
    assert "parallel/mpi-2-strong/1: timeout: the last words" in err
    assert content["failed_runs"][0]["output"] == ["first", "the last words", ""]
    assert not any(name.startswith("parallel.mpi") for name in content["facts"])


def test_synthetic_data_oversubscription_and_commits_are_in_the_pictures(results):
    add_parallel(results, dataset="synthetic")
    results.add(
        "parallel/mpi-8-strong",
        1.0,
        1.0,
        cores=8,
        ranks=8,
        oversubscribed=True,
        dataset="synthetic",
        script="parallel_cnn_mpi",
        git_commit="2" * 40,
    )
    content, out = analyze(results)
    assert content["marks"][0] == "synthetic data"
    assert "oversubscribed: mpi-8-strong" in content["marks"]
    assert any("different commits" in mark for mark in content["marks"])
    for figure in content["figures"]:
        text = (out / f"figures/{figure['name']}.svg").read_text()
        assert "SYNTHETIC DATA" in text
        assert "OVERSUBSCRIBED" in text
        assert "2 DIFFERENT COMMITS: 11111111, 22222222" in text
    assert "parallel.mpi-8-strong.serial_fraction" not in content["facts"]  # it has no eight cores
    assert "mpi-8-strong (oversubscribed)" in read_table(out, "parallel_scaling")


def test_machines_are_never_mixed(results):
    add_parallel(results)
    for number in range(8):  # most runs are those of a third one
        results.add(f"hardware/{number}", 1.0, 1.0, host="third")
    for repeat in (1, 2):  # another machine has run mpi-2-strong, and nothing to compare it with
        write_log(
            results.folder / f"parallel/mpi-2-strong/{repeat}/run.csv",
            [{"duration": 0.1}],
            host="there",
        )
    content, out = analyze(results)
    assert "parallel.mpi-2-strong.images_per_s" not in content["facts"]
    assert value(content, "parallel.mpi-2-strong [3].images_per_s") == pytest.approx(20_000)
    assert value(content, "parallel.hybrid-1x2-strong [2].speedup") == pytest.approx(1.5)
    assert "parallel.mpi-2-strong [3].speedup" not in content["facts"]
    assert [e["host"] for e in content["environments"]] == ["third", "here", "there"]
    assert "curves of scaling: those of [3] are not drawn" in content["missing"]
    assert (out / "figures/parallel_speedup.png").exists()
    assert any("3 machines or data sets" in mark for mark in content["marks"])
    assert "[2] A processor" in (out / "figures/parallel_throughput.svg").read_text()


# -- files that are broken, alone or many -----------------------------------------------------------------------------


def test_logs_without_an_index(tmp_path, capsys):
    for place, duration in (("one/run", 1.0), ("two/run", 2.0), ("third", 4.0)):
        write_log(
            tmp_path / f"{place}.csv", [{"duration": duration, "forward": 0.2, "backward": 0.4}]
        )
    (tmp_path / "third.json").unlink()
    out = tmp_path / "out"
    logs = [str(tmp_path / f"{place}.csv") for place in ("one/run", "two/run", "third")]
    analyze_results.main([*logs, "--output-dir", str(out)])
    rows = read_table(out, "files_results")
    assert list(rows) == ["one/run", "two/run", "third [2]"]
    assert [float(row["images_per_s (images/s)"]) for row in rows.values()] == [2000, 1000, 500]
    assert "third.json" in capsys.readouterr().err  # its machine is unknown: not compared
    assert {p.stem for p in (out / "figures").glob("*.png")} == {
        "files_throughput",
        "files_step",
        "files_curves",
        "files_batches",
    }


def test_damaged_logs_are_named_and_the_rest_goes_on(results, capsys):
    results.add("parallel/serial", 1.0, 2.0, 4.0)
    logs = [results.folder / f"parallel/serial/{repeat}/run.csv" for repeat in (1, 2, 3)]
    logs[0].write_text(logs[0].read_text() + "2,2,17")  # cut off
    logs[1].write_text("something,else\n")
    logs[2].with_suffix(".json").write_text("{")
    content, _ = analyze(results)
    err = capsys.readouterr().err
    assert f"{logs[0]}: 1 damaged or cut off lines are left out" in err
    assert f"{logs[1]} is not a run log" in err
    assert f"{logs[2].with_suffix('.json')}: it is not JSON" in err
    assert len(err.splitlines()) == 3
    assert content["runs"] == 2
    assert value(content, "parallel.serial.images_per_s") == 2000


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (None, "run make experiments first"),
        ("{", "is not an index of runs"),
        ('{"runs": [{}]}', "is not an index of runs"),
        ('{"settings": {}, "runs": []}', "no run that is done"),
    ],
)
def test_no_results_is_one_error_line(tmp_path, index, said):
    if index:
        (tmp_path / "index.json").write_text(index)
    _, err = finish(start(tmp_path, "analyze_results.py", "--results-dir", "."), status=2)
    assert_one_error_line(err)
    assert said in err
    assert not (tmp_path / "analysis").exists()


@pytest.mark.parametrize("content", [None, "", "a,b\n1,2\n", ",".join(COLUMNS) + "\n", "\0\xff"])
def test_a_named_file_that_is_no_log_is_one_error_line(tmp_path, content):
    if content is not None:
        (tmp_path / "x.csv").write_bytes(content.encode("latin1"))
    _, err = finish(start(tmp_path, "analyze_results.py", "x.csv"), status=2)
    assert_one_error_line(err)
    assert "x.csv" in err


def test_two_hundred_runs(results):
    for ranks in (2, 4, 8, 16, 32):
        for scaling in ("strong", "weak"):
            results.add(
                f"parallel/mpi-{ranks}-{scaling}",
                *[2 / ranks + 0.01 * i for i in range(18)],
                cores=ranks,
                ranks=ranks,
                script="parallel_cnn_mpi",
            )
    results.add("parallel/serial", *[2.0] * 20)
    content, _ = analyze(results)
    assert content["runs"] == 200


# -- pictures ---------------------------------------------------------------------------------------------------------


def overlaps(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


def test_no_labels_overlap(results, monkeypatch):
    """Tick labels of an axis, axis labels, titles, legend and the line below stay apart and inside the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    add_parallel(results)
    results.add(
        "parallel/mpi-8-strong",
        1.0,
        1.0,
        cores=8,
        ranks=8,
        oversubscribed=True,
        script="parallel_cnn_mpi",
    )
    add_loading(results)
    add_rest(results)
    checked, save = [], analyze_results.Plotter.save

    def check(self, figure, name, *args, **options):
        save(self, figure, name, *args, **options)
        figure.dpi = 150
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        boxes = [("notes", figure._supxlabel.get_window_extent(renderer))]
        boxes += [("legend", legend.get_window_extent(renderer)) for legend in figure.legends]
        for ax in figure.axes:
            if ax.get_visible():
                low, high = sorted(ax.get_xlim())
                boxes += [
                    (t.get_text(), t.get_window_extent(renderer))
                    for t in ax.get_xticklabels()
                    if t.get_text() and t.get_visible() and low <= t.get_position()[0] <= high
                ]
                boxes += [
                    (t.get_text(), t.get_window_extent(renderer))
                    for t in ax.get_yticklabels()
                    if t.get_text()
                    and t.get_visible()
                    and ax.yaxis.get_tick_params()["labelleft"]
                    and min(ax.get_ylim()) <= t.get_position()[1] <= max(ax.get_ylim())
                ]
                boxes += [
                    (t.get_text(), t.get_window_extent(renderer))
                    for t in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts)
                    if t.get_text()
                ]
        for (text, box), (other, its) in itertools.combinations(boxes, 2):
            assert not overlaps(box, its), f"{self.suite}_{name}: {text!r} and {other!r}"
        for text, box in boxes:
            assert box.x0 >= -1, f"{self.suite}_{name}: {text!r}"
            assert box.y0 >= -1
            assert box.x1 <= figure.bbox.x1 + 1, f"{self.suite}_{name}: {text!r}"
            assert box.y1 <= figure.bbox.y1 + 1
        checked.append(name)

    monkeypatch.setattr(analyze_results.Plotter, "save", check)
    content, _ = analyze(results)
    assert len(checked) == len(content["figures"]) >= 12


# -- a real run -------------------------------------------------------------------------------------------------------


def test_real_experiment(tmp_path, cache):
    options = ("--dataset", "synthetic", "--epochs", 2, "--subset", 64, "--batch-size", 16)
    for only in ("serial", "mpi-2"):
        command = (
            "run_experiments.py",
            "--only",
            only,
            "--repeats",
            2,
            "--oversubscribe",
            *options,
        )
        finish(start(tmp_path, *command, env=cache), timeout=200)
    out, err = finish(start(tmp_path, "analyze_results.py"))
    assert err == ""
    assert "written: results/analysis" in out
    content = json.loads((tmp_path / "results/analysis/analysis.json").read_text())
    assert content["runs"] == 6
    assert "synthetic data" in content["marks"]
    rates = []
    for name in ("serial", "mpi-2-strong"):
        sidecars = [
            json.loads((tmp_path / f"results/parallel/{name}/{r}/run.json").read_text())
            for r in (1, 2)
        ]
        rates.append(np.array([s["totals"]["images_per_s"] for s in sidecars]))
        assert value(content, f"parallel.{name}.images_per_s") == pytest.approx(
            rates[-1].mean(), rel=1e-5
        )
        assert value(content, f"parallel.{name}.test_accuracy") == pytest.approx(
            100 * np.mean([s["totals"]["final_accuracy"] for s in sidecars]), abs=1e-3
        )
    assert value(content, "parallel.mpi-2-strong.speedup") == pytest.approx(
        (rates[1] / rates[0]).mean(), rel=1e-4
    )
    assert value(content, "parallel.mpi-2-strong.loss_difference") < 0.02  # the same computation
    shares = [
        value(content, f"parallel.mpi-2-strong.{phase}_share") for phase in analyze_results.PHASES
    ]
    assert sum(shares) == pytest.approx(100)
