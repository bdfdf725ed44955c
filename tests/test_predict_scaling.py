"""The scaling model against hand-worked cases, simulations, and real training between two hosts."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    REPO,
    mpirun,
    read_npz,
    refused,
    run_usage_line,
    script_environment,
    usage_lines,
)

import calibrate_network
import check_prediction
import make_report
import network_hosts
import predict_scaling
import published_scaling
import scaling_tables
from common import InputError
from scaling_inputs import read_network, read_profile, write_profile
from scaling_model import (
    ALGORITHMS,
    PRESETS,
    Network,
    Profile,
    communication_cost,
    expected_maximum,
    mpi_allreduce,
    overlapped_end,
    predict,
    rabenseifner,
    recursive_doubling,
    ring,
    round_cost,
    shared_memory,
    topk,
    tree,
)

SIMPLE = Network("simple", alpha=1.0, beta=0.5, gamma=0.25, memory_alpha=0.1, memory_beta=0.05)


def make_profile(step=10.0, backward=4.0, sizes=(8, 4), ready=(1.0, 4.0), images=8):
    phases = {"loading": 0.5, "forward": 3.0, "backward": backward, "communication": 0.0}
    phases["update"] = step - sum(phases.values())
    return Profile(images, np.full(50, step), phases, ready, sizes)


# -- formulas --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "ranks", "seconds"),
    [
        (ring, 4, 6 * 1 + 6 * 2 * 0.5 + 3 * 2 * 0.25),  # 13.5
        (recursive_doubling, 4, 2 * (1 + 8 * 0.5 + 8 * 0.25)),  # 14
        # 4 and 2 bytes there, 2 and 4 back
        (rabenseifner, 4, 4 * 1 + (4 + 2 + 2 + 4) * 0.5 + (4 + 2) * 0.25),  # 11.5
        (tree, 4, 4 * (1 + 8 * 0.5) + 2 * 8 * 0.25),  # 24
        # Three ranks: one hands all to its neighbour, two do the work, one gets the result.
        (recursive_doubling, 3, (1 + 4 + 2) + (1 + 4 + 2) + (1 + 4)),
        (rabenseifner, 3, (1 + 4 + 2) + (1 + 2 + 1) + (1 + 2) + (1 + 4)),
        (tree, 3, 4 * (1 + 4) + 2 * 2),
        (ring, 1, 0),
        (rabenseifner, 1, 0),
        (tree, 1, 0),
    ],
)
def test_formulas_by_hand(algorithm, ranks, seconds):
    """8 bytes, α = 1, β = 0.5, γ = 0.25, one rank on each machine."""
    cost = communication_cost(algorithm(8, ranks, 1), SIMPLE)
    assert cost.total == pytest.approx(seconds)


def test_the_general_formulas_of_the_papers():
    n, p = 1e6, 64
    cost = communication_cost(rabenseifner(n, p, 1), SIMPLE)
    assert cost == pytest.approx((2 * 6 * 1.0, 2 * 63 / 64 * n * 0.5, 63 / 64 * n * 0.25))
    cost = communication_cost(ring(n, p, 1), SIMPLE)
    assert cost == pytest.approx((2 * 63 * 1.0, 2 * 63 / 64 * n * 0.5, 63 / 64 * n * 0.25))


def test_several_ranks_of_a_machine_share_its_link():
    """Rabenseifner on 2 machines of 2 ranks: the far round costs twice β, the near one memory's."""
    far, near, *_ = rabenseifner(8, 4, 2)
    assert round_cost(far, SIMPLE) == (1.0, 2 * 4 * 0.5, 4 * 0.25)
    assert round_cost(near, SIMPLE) == pytest.approx((0.1, 2 * 0.05, 2 * 0.25))
    # In shared memory one sum of half the bytes, then both ranks send their 4 bytes at once.
    total = communication_cost(shared_memory(8, 4, 2), SIMPLE).total
    assert total == pytest.approx((0.1 + 4 * 0.25) + (1.0 + 2 * 4 * 0.5 + 4 * 0.25))
    # All in one machine: no message at all
    assert all(each.flows == 0 for each in shared_memory(8, 4, 4))


def test_short_allreduces_are_recursive_doubling():
    assert mpi_allreduce(2048, 8, 1) == recursive_doubling(2048, 8, 1)
    assert mpi_allreduce(4096, 8, 1) == rabenseifner(4096, 8, 1)


def test_topk_sends_two_percent_of_the_bytes_to_each_other_rank():
    assert sum(each.size * each.count for each in topk(1000, 5, 1)) == pytest.approx(2 * 4 * 10)


def test_measured_times_of_messages_replace_alpha_and_beta():
    points = ((10, 2.0), (20, 3.0), (40, 9.0))
    network = SIMPLE._replace(beta=0.1, points=points, long_from=40, long_offset=5.0)
    assert network.message_time(5) == 2.0
    assert network.message_time(15) == 2.5
    assert network.message_time(60) == 5.0 + 60 * 0.1
    assert network._replace(beta=0.5).message_time(15) == 15 * 0.5  # no burst for ever


# -- simulations -----------------------------------------------------------------------------------


def simulate_ring(n, p, network):
    """Every rank and message on its own: when the last rank has the whole sum."""
    clock = [0.0] * p
    size = n / p
    for step in range(2 * (p - 1)):
        arrival = [clock[rank] + network.alpha + size * network.beta for rank in range(p)]
        summing = size * network.gamma if step < p - 1 else 0.0
        # A rank goes on when its own message is sent and the one from the left has come.
        clock = [max(arrival[rank], arrival[rank - 1]) + summing for rank in range(p)]
    return max(clock)


@pytest.mark.parametrize("ranks", [2, 3, 7, 64])
def test_the_ring_is_that_of_a_simulation(ranks):
    seconds = communication_cost(ring(1000, ranks, 1), SIMPLE).total
    assert seconds == pytest.approx(simulate_ring(1000, ranks, SIMPLE))


def simulate_overlap(ready, rounds):
    """Tick by tick: a link with one message at a time, first come first served."""
    rounds = [list(each) for each in rounds]
    waiting_since = {}
    sending = None
    for now in itertools.count():
        if sending and now == sending[1]:
            slice_number, _ = sending
            sending = None
            waiting_since.pop(slice_number)
            if rounds[slice_number]:
                waiting_since[slice_number] = now
        for i, time in enumerate(ready):
            if time == now:
                waiting_since[i] = now
        if sending is None and waiting_since:
            first = min(waiting_since, key=lambda i: (waiting_since[i], i))
            sending = (first, now + rounds[first].pop(0))
        if sending is None and now >= max(ready) and not any(rounds):
            return now


def test_the_overlapped_schedule_is_that_of_a_simulation():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = rng.integers(1, 5)
        ready = np.sort(rng.integers(0, 30, count)).tolist()
        rounds = [rng.integers(1, 9, rng.integers(1, 5)).tolist() for _ in range(count)]
        assert overlapped_end(ready, rounds) == simulate_overlap(ready, rounds), (ready, rounds)


def test_the_mean_of_the_largest_of_p():
    assert expected_maximum(np.array([0.0, 1.0]), 3) == pytest.approx(1 - 0.5**3)
    samples = np.random.default_rng(1).exponential(size=50)
    draws = np.random.default_rng(2).choice(samples, (200_000, 8)).max(axis=1)
    assert expected_maximum(samples, 8) == pytest.approx(draws.mean(), rel=0.01)
    assert expected_maximum(samples, 1) == pytest.approx(samples.mean())


# -- a step ----------------------------------------------------------------------------------------


def test_a_step_by_hand():
    """Compute 10; blocking: 12 bytes in two rounds of 6. Overlapped: 4 after the backward pass."""
    profile = make_profile()
    found = predict(profile, SIMPLE, ALGORITHMS["ring"], 2)
    assert found.step == pytest.approx(10 + 2 * (1 + 6 * 0.5) + 6 * 0.25)
    assert found.speedup == pytest.approx(20 / found.step)
    # Slice 1 (8 bytes) from 1 to 1 + 2 (1 + 2) + 1 = 8; slice 2 (4 bytes) until 8 + 4 + 0.5 = 12.5;
    # the backward pass ends at 4.
    found = predict(profile, SIMPLE, ALGORITHMS["ring, overlapped"], 2)
    assert found.step == pytest.approx(10 + 12.5 - 4)
    assert found.compute + found.stragglers + found.latency + found.bandwidth == pytest.approx(
        found.step
    )


def test_long_messages_of_mpi_wait_for_the_end_of_the_backward_pass():
    profile = make_profile(sizes=(80_000, 4), ready=(1.0, 4.0))
    network = SIMPLE._replace(beta=1e-5, gamma=0.0)
    found = predict(profile, network, ALGORITHMS["overlap"], 2)
    # Both begin after the backward pass: rounds of 40,000 bytes, and one round of 4 bytes
    assert found.step == pytest.approx(10 + 2 * (1 + 0.4) + 1 + 4e-5)


def test_one_rank_is_the_run_itself_and_more_never_pay_off_more_than_they_are():
    profile = make_profile()
    for name, algorithm in ALGORITHMS.items():
        for strong in (False, True):
            assert predict(profile, SIMPLE, algorithm, 1, strong).efficiency == 1, name
            for ranks in (2, 4, 8):
                found = predict(profile, SIMPLE, algorithm, ranks, strong)
                assert 0 < found.efficiency < 1, (name, ranks)


def test_stragglers_are_waited_for():
    steps = np.array([9.0] * 45 + [19.0] * 5)  # mean 10, one in ten is late
    profile = Profile(8, steps, make_profile().phases, (1.0,), (8,))
    found = predict(profile, SIMPLE, ALGORITHMS["ring"], 4)
    assert found.compute + found.stragglers == pytest.approx(9 + 10 * (1 - 0.9**4))


def test_strong_scaling_divides_the_images_but_not_the_update():
    profile = make_profile()
    found = predict(profile, SIMPLE._replace(alpha=0, beta=0, gamma=0), ALGORITHMS["ring"], 8, True)
    assert found.step == pytest.approx(10 - 7 / 8 * 7.5)
    assert found.lost_to == "computation that does not divide"


def test_local_steps_share_one_exchange():
    profile = make_profile()
    whole = predict(profile, SIMPLE, ALGORITHMS["allreduce"], 2).step - 10
    shared = predict(profile, SIMPLE, ALGORITHMS["allreduce"], 2, local_steps=5).step - 10
    assert shared == pytest.approx(whole / 5)


# -- calibration -----------------------------------------------------------------------------------


class SyntheticLink:
    """Two ranks on two machines, as rank 0 sees them, on a clock of its own."""

    rank, size = 0, 2

    def __init__(self, alpha, beta, gamma, burst=0):
        self.alpha, self.beta, self.gamma, self.burst = alpha, beta, gamma, burst
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def message(self, size):
        self.now += self.alpha + max(0, size - self.burst) * self.beta

    def Send(self, buffer, *_):
        self.message(buffer.nbytes)

    def Recv(self, buffer, *_):
        self.message(buffer.nbytes)

    def Allreduce(self, _, buffer):
        for each in mpi_allreduce(buffer.nbytes, 2, 1):
            self.message(each.size)
            self.now += each.summed * self.gamma

    def Split_type(self, _):
        return self

    def Split(self, _):
        return self

    def allreduce(self, value, _):
        return value

    def allgather(self, _):
        return [0, 1]

    def bcast(self, value):
        return value

    def Barrier(self):
        pass

    Free = Barrier


@pytest.mark.parametrize(("rate", "burst"), [(2.5e6, 0), (125e6, 0), (125e6, 31250)])
def test_calibration_finds_the_parameters_of_a_link(monkeypatch, rate, burst):
    link = SyntheticLink(40e-6, 1 / rate, 3e-10, burst)
    monkeypatch.setattr(calibrate_network.time, "perf_counter", link.perf_counter)
    content = calibrate_network.calibrate(link, "link")
    network = Network(**content["network"])
    assert network.alpha == pytest.approx(40e-6, rel=0.05)
    assert network.beta == pytest.approx(1 / rate, rel=0.05)
    if not burst:
        assert network.gamma == pytest.approx(3e-10, rel=0.1)
    assert network.ranks_per_machine == 1
    if not burst:
        long = [residual for size, _, residual in content["ping_pong"] if size >= 2**16]
        assert max(map(abs, long)) < 1e-6
        assert max(abs(residual) for *_, residual in content["allreduce"]) < 0.01
    assert "link, 2 ranks: α" in calibrate_network.describe(content)


def test_a_network_that_is_too_slow_is_refused(monkeypatch):
    link = SyntheticLink(1.0, 1.0, 0.0)
    monkeypatch.setattr(calibrate_network.time, "perf_counter", link.perf_counter)
    with pytest.raises(InputError, match="too slow to be measured"):
        calibrate_network.calibrate(link, "link")


def test_noise_does_not_move_the_fit():
    rng = np.random.default_rng(3)
    sizes = np.array(calibrate_network.SIZES)
    seconds = (20e-6 + sizes / 1e9) * rng.normal(1, 0.02, len(sizes))
    points = list(zip(sizes, seconds, strict=True))
    assert calibrate_network.fit_line(points) == pytest.approx((20e-6, 1e-9), rel=0.03)


# -- from a run to the prediction ------------------------------------------------------------------

ONE_RANK = ("--dataset", "synthetic", "--epochs", 1, "--subset", 82, "--batch-size", 2, "--quiet")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, cache):
    """The folder of a run of one rank, whose log has 41 steps."""
    folder = tmp_path_factory.mktemp("one_rank")
    options = ("--log", "results/one_rank.csv", "--trace", "results/one_rank.trace")
    mpirun(folder, 1, "parallel_cnn_mpi.py", *ONE_RANK, *options, env=cache)
    return folder


def test_a_profile_is_that_of_the_log(one_rank):
    profile = read_profile(one_rank / "results/one_rank.csv")
    assert profile.images == 2
    assert len(profile.steps) == 41 - 8 - 1
    assert sum(profile.sizes) == 4 * 1_070_794
    assert sum(profile.phases.values()) == pytest.approx(profile.mean)
    assert profile.sizes[1] == max(profile.sizes)  # the first dense layer, ready as the second
    assert list(profile.ready) == sorted(profile.ready)
    assert 0 < profile.ready[0] < profile.ready[-1] <= profile.phases["backward"] * 1.01


def test_predict_writes_table_csv_json_and_figure(one_rank, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(one_rank)
    predict_scaling.main(["--output-dir", str(tmp_path), "--network", "10gbe", "nvlink"])
    out = capsys.readouterr().out
    assert "10 GbE, --reduce overlap: weak scaling " in out
    with open(tmp_path / "prediction.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(ALGORITHMS) * 2 * 11
    assert {row["ranks"] for row in rows} == {str(2**i) for i in range(11)}
    for row in rows:
        parts = sum(float(row[part]) for part in ("compute", "stragglers", "latency", "bandwidth"))
        assert parts == pytest.approx(float(row["step"]), rel=1e-4)
    assert (tmp_path / "prediction.svg").exists()

    # The prediction.json is enough to make the same again.
    again = tmp_path / "again"
    predict_scaling.main(["--run", str(tmp_path / "prediction.json"), "--output-dir", str(again)])
    assert (again / "prediction.csv").read_bytes() == (tmp_path / "prediction.csv").read_bytes()
    assert (again / "prediction.png").read_bytes() == (tmp_path / "prediction.png").read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--run", "nothing.csv"], "the log of a run has a .json file beside it"),
        (["--network", "adsl"], "1gbe, 10gbe, infiniband, nvlink"),
        (["--network", "results/one_rank.json"], "is not a file of --calibrate"),
        (["--run", "results/one_rank.json"], "is not a prediction.json"),
        (["--run", "two.csv"], "a run of 2 ranks"),
        (["--run", "untraced.csv"], "repeat it with --trace"),
        (["--run", "short.csv"], "too few to know their spread"),
        (["--measured", "results/one_rank.csv", "--run", "other.csv"], "images on each rank"),
        (["--calibrate"], "--calibrate needs two ranks"),
        (["--output-dir", "/proc/nothing"], "cannot be written"),
    ],
)
def test_refusals(one_rank, monkeypatch, tmp_path, argv, message):
    shutil.copytree(one_rank / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    metadata = json.loads(Path("results/one_rank.json").read_text())
    arguments = metadata["arguments"]
    log = Path("results/one_rank.csv").read_text()
    changes = {
        "two": {"ranks": 2},
        "untraced": {"arguments": {**arguments, "trace": None}},
        "short": {},
        "other": {"arguments": {**arguments, "global_batch_size": 3}},
    }
    for name, change in changes.items():
        Path(f"{name}.json").write_text(json.dumps({**metadata, **change}))
        Path(f"{name}.csv").write_text("\n".join(log.split("\n")[:12]) if name == "short" else log)
    monkeypatch.setattr("common.abort_on_exception", lambda comm: None)
    assert message in refused(predict_scaling.main, *argv)


@pytest.mark.slow
def test_usage_lines_run_as_written(tmp_path):
    """One after another: each reads what those before it have written."""
    script = REPO / "experiments/predict_scaling.py"
    for line in usage_lines(script):
        tiny = ONE_RANK if "parallel_cnn_mpi.py" in line else ()
        if line == "make predict":
            ignored = shutil.ignore_patterns(".*", "data", "results", "docs", "measurements")
            checkout = shutil.copytree(REPO, tmp_path / "checkout", ignore=ignored)
            command = ["make", f"PYTHON={sys.executable}", "predict", "SUBSET=82"]
            command.append("ARGS=--dataset synthetic --batch-size 2 --quiet")
            subprocess.run(command, cwd=checkout, env=script_environment(), check=True)
            assert (checkout / "results/prediction/prediction.png").exists()
        else:
            run_usage_line(tmp_path, script, line, *tiny)
    measured = json.loads((tmp_path / "results/prediction/prediction.json").read_text())["measured"]
    assert measured[0]["ranks"] == 2


def test_presets_are_complete():
    for name, network in PRESETS.items():
        assert read_network(name) == network
        assert network.source


@pytest.mark.slow
def test_calibrate_between_real_ranks(tmp_path):
    script = "experiments/predict_scaling.py"
    out, _ = mpirun(tmp_path, 2, script, "--calibrate", "--output", "network.json")
    assert "16,777,216" in out
    network = read_network(str(tmp_path / "network.json"))
    assert network.alpha > 0
    assert network.message_time(2**24) > network.message_time(8) > 0


# -- the check between hosts -----------------------------------------------------------------------


def make_point(error, communication=0.5, configuration="ring", **changes):
    point = {"hosts": 2, "rate": 20, "configuration": configuration, "measured": 1.0, "steps": 9}
    point |= {"predicted": 1 + error, "one_rank": 1 - communication}
    return {**point, **changes}


def test_the_verdict_counts_where_communication_matters():
    points = [make_point(0.1), make_point(-0.2), make_point(0.04), make_point(0.9, 0.1)]
    found = check_prediction.verdict(points)
    assert found == {
        "points": 4,
        "counted": 3,
        "within": 2,
        "largest": pytest.approx(0.2),
        "median": pytest.approx(0.1),
    }


def test_names_of_configurations():
    assert check_prediction.algorithm_of("ring") == ("ring", 1)
    assert check_prediction.algorithm_of("topk") == ("topk", 1)
    assert check_prediction.algorithm_of("local 8") == ("allreduce", 8)
    assert check_prediction.algorithm_of("local 8, bf16") == ("bf16", 8)
    for name in (*check_prediction.REDUCERS, *check_prediction.SLOW):
        assert check_prediction.algorithm_of(name)[0] in ALGORITHMS


def test_report_of_a_file(tmp_path, capsys):
    points = {}
    for rate in (20, 100):
        for i, name in enumerate((*check_prediction.REDUCERS, *check_prediction.SLOW)):
            point = make_point(0.05, configuration=name, rate=rate, measured=1 / (i + 1))
            point["profile"] = write_profile(make_profile())
            points[f"2 hosts, {rate} Mbit/s, {name}"] = point
    networks = {f"2 hosts, {rate} Mbit/s": {"network": SIMPLE._asdict()} for rate in (20, 100)}
    content = {"points": points, "accuracy": {"topk": {"42": 0.65, "43": 0.66}}}
    content["networks"] = networks
    content["environment"] = {"cpu": "One", "cores": [0, 1], "blas": [{"kernel": "Zen"}]}
    points["2 hosts, 20 Mbit/s, topk"]["machine"] = "Another"
    (tmp_path / "check.json").write_text(json.dumps(content))
    figure = str(tmp_path / "check.png")
    check_prediction.main(["--report", str(tmp_path / "check.json"), "--figure", figure])
    out = capsys.readouterr().out
    assert "65.50% (65.00%–66.00%)" in out
    one = "One (OpenBLAS uses its Zen kernels), 2 cores"
    assert f"Points by machine: {one}: 15; Another: 1." in out
    assert Path(figure).stat().st_size > 10_000
    assert "ends with .png" in refused(check_prediction.main, "--figure", "x.pdf")


def test_the_report_keeps_predictions_apart(one_rank, tmp_path):
    """In a section of their own, which says that they were not measured."""
    words = ["--run", str(one_rank / "results/one_rank.csv"), "--output-dir", str(tmp_path)]
    predict_scaling.main(words)
    tables = scaling_tables.prediction_tables(tmp_path / "prediction.json")
    names = (
        "runs",
        "failed_runs",
        "marks",
        "missing",
        "environments",
        "facts",
        "figures",
        "tables",
    )
    empty = {"created": "", **{name: {} if name == "facts" else [] for name in names}}
    assert "Beyond this machine" not in make_report.Report(empty).to_markdown()
    text = make_report.Report(empty, tables).to_markdown()
    section = text.split("## Beyond this machine")[1].split("\n## ")[0]
    assert section.count("A prediction, not a measurement.") == 2
    assert "predicted, not measured" in section
    assert "100 Gb InfiniBand, --reduce overlap: weak scaling" in section.replace("\\", "")


def test_published_results():
    """The rows whose inputs are all published are within 5 points."""
    found = {
        entry.name: published_scaling.predict_published(entry).efficiency - entry.efficiency
        for entry in published_scaling.TABLES
    }
    assert abs(found["Horovod, ResNet-101"]) < 0.05
    assert abs(found["Horovod, VGG-16"]) < 0.05
    assert min(found.values()) > -0.02  # the model leaves out what makes real runs slower


def test_machines_without_namespaces_are_told_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(network_hosts.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(network_hosts.shutil, "which", lambda tool: f"/sbin/{tool}")
    check_prediction.main(["--output", str(tmp_path / "check.json")])
    assert capsys.readouterr().out == "skipped: only root may make network namespaces\n"
    monkeypatch.setattr(network_hosts.shutil, "which", lambda tool: None)
    assert network_hosts.why_not() == "ip of iproute2 is not installed"


@pytest.fixture(scope="module")
def hosts_allowed():
    reason = network_hosts.why_not()
    if reason:
        pytest.skip(reason)


@pytest.mark.slow
def test_training_between_two_hosts(hosts_allowed, tmp_path, capsys, monkeypatch, cache):
    """Measured and predicted steps are as long as the link needs; a second start does nothing."""
    monkeypatch.setenv("CIFAR10_DIR", str(cache["CIFAR10_DIR"]))
    monkeypatch.setattr(check_prediction, "ATTEMPTS", 1)
    output = str(tmp_path / "check.json")
    argv = ["--output", output, "--dataset", "synthetic", "--step-seconds", "1"]
    argv += ["--profile-steps", "40", "--rates", "200", "--slow-rates", "--more-hosts"]
    check_prediction.main(argv)
    assert "predictions are within" in capsys.readouterr().out
    content = json.loads(Path(output).read_text())
    names = [f"2 hosts, 200 Mbit/s, {name}" for name in check_prediction.REDUCERS]
    assert list(content["points"]) == names
    for point in check_prediction.all_points(content):
        on_the_link = 4 * 1_070_794 * 8 / 200e6
        assert point["measured"] > 0.95 * on_the_link
        assert point["predicted"] > 0.95 * on_the_link
    before = Path(output).read_bytes()
    check_prediction.main(argv)
    assert Path(output).read_bytes() == before


@pytest.mark.slow
def test_the_link_does_not_change_what_is_computed(hosts_allowed, tmp_path, cache):
    """So accuracies of slow links can be measured without them."""
    options = ["--dataset", "synthetic", "--subset", "256", "--epochs", "1", "--quiet"]
    options += ["--compress", "topk", "--checkpoint", "run.npz"]
    (tmp_path / "near").mkdir()
    mpirun(tmp_path / "near", 2, "parallel_cnn_mpi.py", *options, env=cache)
    with network_hosts.Hosts(2, 100) as hosts:
        command = hosts.mpirun([sys.executable, check_prediction.TRAIN, *options])
        (tmp_path / "far").mkdir()
        network_hosts.finish(network_hosts.start(command, tmp_path / "far"))
    near, far = (read_npz(tmp_path / place / "run.npz") for place in ("near", "far"))
    assert near["params"].tobytes() == far["params"].tobytes()
