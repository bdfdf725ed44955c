"""train_resnet50_split_cores.py: core groups, threads that stay where they are put, modes, log, resume, bad input."""

import contextlib
import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    REPO,
    assert_one_error_line,
    assert_same_run,
    before_batch,
    finish,
    read_log,
    script_environment,
    send,
    start,
    start_stopping,
)
from torch.nn import functional as F

import train_resnet50_split_cores as split_cores
from common import InputError, TrainingError, available_cores, make_synthetic
from train_resnet50_split_cores import Split, Turn

SCRIPT = "train_resnet50_split_cores.py"
TINY = ("--dataset", "synthetic", "--subset", 16, "--batch-size", 8, "--micro-batches", 2)

needs_two_cores = pytest.mark.skipif(
    not split_cores.can_pin() or len(available_cores()) < 2, reason="needs Linux and two cores"
)


def tiny_model():
    """A network with BatchNorm that takes a fraction of ResNet-50's time."""
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    ).to(memory_format=torch.channels_last)


def batch(n=16):
    torch.manual_seed(2)
    return torch.randn(n, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(
        0, 10, (n,)
    )


@pytest.fixture
def placement():
    with split_cores.Placement(split_cores.split_cores(available_cores())) as placement:
        yield placement


# -- core groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "forward", "backward", "reserved"),
    [
        (range(2), [0], [1], []),
        (range(3), [0, 1], [2], []),
        (range(4), [0, 1], [2, 3], []),
        (range(5), [0, 1], [2], [3, 4]),
        (range(6), [0, 1], [2, 3], [4, 5]),
        (range(8), [0, 1, 2], [3, 4, 5], [6, 7]),
        (range(16), range(7), range(7, 14), [14, 15]),
        (range(64), range(31), range(31, 62), [62, 63]),
        ([1, 4, 5, 9, 30, 31, 40], [1, 4, 5], [9, 30], [31, 40]),
    ],
)
def test_default_groups(cores, forward, backward, reserved):
    assert split_cores.split_cores(cores) == (tuple(forward), tuple(backward), tuple(reserved))


def test_one_core_cannot_be_split():
    with pytest.raises(InputError, match="two cores"):
        split_cores.split_cores([3])


@pytest.mark.parametrize(
    ("cores", "proportion", "sizes"),
    [
        (8, (1, 2), (2, 4)),
        (8, (2, 1), (4, 2)),
        (4, (1, 2), (1, 3)),
        (2, (1, 9), (1, 1)),
        (2, (9, 1), (1, 1)),
        (64, (1, 2), (21, 41)),
        (16, (1, 100), (1, 13)),
        (3, (1, 1), (2, 1)),
    ],
)
def test_proportions(cores, proportion, sizes):
    split = split_cores.split_cores(range(cores), proportion)
    assert (len(split.forward), len(split.backward)) == sizes
    assert [*split.forward, *split.backward, *split.reserved] == list(range(cores))


@pytest.mark.parametrize(
    ("cores", "forward", "backward", "sizes"),
    [
        (8, 1.0, 2.0, (2, 4)),
        (8, 1.0, 1.0, (3, 3)),
        (8, 2.0, 1.0, (4, 2)),
        (2, 1.0, 9.0, (1, 1)),
        (16, 1.0, 2.3, (4, 10)),
        (64, 1.0, 1e9, (1, 61)),
    ],
)
def test_balance_gives_the_longer_phase_more_cores(cores, forward, backward, sizes):
    even = split_cores.split_cores(range(cores))
    split = split_cores.balance(even, forward, backward)
    assert (len(split.forward), len(split.backward)) == sizes
    assert split.reserved == even.reserved
    work = forward * len(even.forward), backward * len(even.backward)
    longer = max(work[0] / sizes[0], work[1] / sizes[1])
    total = sum(sizes)
    assert longer == min(max(work[0] / n, work[1] / (total - n)) for n in range(1, total))


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0", (0,)), ("0-2", (0, 1, 2)), ("4,0-1", (0, 1, 4)), ("3,3,2-3", (2, 3)), ("10-10", (10,))],
)
def test_core_lists(text, cores):
    assert split_cores.parse_cores(text) == cores
    assert split_cores.parse_cores(split_cores.format_cores(cores)) == cores


# -- threads that stay on their cores ---------------------------------------------------------------------------------


def multiply(seconds):
    """Keep the calling thread's whole pool at work."""
    a = torch.ones(1 << 20)
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        a.mul_(1.0)


@needs_two_cores
def test_every_thread_is_placed_and_put_back():
    """Threads that existed before, the groups and their pools; each group computes with as many as it has cores."""
    stop = threading.Event()
    bystander = threading.Thread(target=stop.wait, daemon=True)
    bystander.start()
    before, threads = split_cores.affinities(), torch.get_num_threads()
    cores = available_cores()
    with split_cores.Placement(split_cores.split_cores(cores)) as placement:
        inside, split = split_cores.affinities(), placement.split
        both = split.forward + split.backward
        for name, own in (("forward", split.forward), ("backward", split.backward), ("all", both)):
            group = placement.groups[name]
            assert len(group.threads) == len(own)
            assert all(inside[thread] == set(own) for thread in group.threads)
            assert group.submit(torch.get_num_threads).result() == len(own)
        others = inside.keys() - placement.threads().keys()
        assert bystander.native_id in others
        assert all(inside[thread] == set(split.reserved or cores) for thread in others)
    after = split_cores.affinities()
    stop.set()
    assert torch.get_num_threads() == threads
    remaining = (
        before.keys() & after.keys()
    )  # a pool's threads end later than the group of an earlier test
    assert {bystander.native_id, threading.main_thread().native_id} <= remaining
    assert {thread: after[thread] for thread in remaining} == {
        thread: before[thread] for thread in remaining
    }


@needs_two_cores
def test_groups_that_started_at_once_keep_their_own_thread_count(placement):
    """A thread's first call into OpenMP takes over the count that any thread has set: that must not happen late."""
    counts = {
        name: group.submit(lambda: (multiply(0.1), torch.get_num_threads())[1])
        for name, group in placement.groups.items()
    }
    expected = {name: len(group.cores) for name, group in placement.groups.items()}
    assert {name: job.result() for name, job in counts.items()} == expected
    placement.check()


@needs_two_cores
def test_affinity_is_read_back(placement):
    """Somebody moves a thread of a pool away: check() says so. What cannot be set is an error."""
    group = placement.groups["all"]
    thread = next(
        thread for thread in group.threads if thread not in split_cores.python_thread_ids()
    )
    os.sched_setaffinity(thread, placement.split.backward)
    with pytest.raises(TrainingError, match="a thread is on cores"):
        placement.check()
    split_cores.pin(group.threads, group.cores)
    placement.check()
    with pytest.raises(OSError, match="Invalid argument"):
        split_cores.pin([thread], (4095,))


@needs_two_cores
def test_openmp_that_binds_its_threads_itself_is_named(run_script):
    """GOMP_CPU_AFFINITY binds the main thread to one core when torch is imported: said in one line."""
    cores = " ".join(map(str, available_cores()))
    done = run_script(SCRIPT, *TINY, "--epochs", 1, env={"GOMP_CPU_AFFINITY": cores}, status=2)
    assert "unset GOMP_CPU_AFFINITY" in done.stderr


@needs_two_cores
def test_monitor_sees_the_groups_on_their_cores(placement):
    with split_cores.CoreMonitor(placement, interval=0.01) as monitor:
        for name in ("forward", "backward", "all"):
            placement.groups[name].submit(multiply, 0.3).result()
            usage = monitor.take()
            assert usage.inside(name) >= 0.99
            own = set(placement.groups[name].cores)
            assert sum(usage.by_core[name, core] for core in own) > 0
            assert usage.idle(own) < 1
            if rest := set(available_cores()) - own:
                assert usage.idle(rest) > 0.9


def test_shares_of_cpu_time():
    """Two seconds: forward computes 1 s on its core and 0.5 s elsewhere, a thread that nobody placed 0.5 s."""
    seconds = Counter(
        {("forward", 0): 1.0, ("forward", 1): 0.5, ("unknown", 1): 0.5, ("python", 0): 9.0}
    )
    usage = split_cores.Usage(Split((0,), (1,)), 2.0, seconds)
    assert usage.shares() == {"forward": 0.5}
    assert (usage.idle([0]), usage.idle([1]), usage.idle([0, 1])) == (0.5, 0.5, 0.5)
    twice = usage + usage
    assert (twice.seconds, twice.inside("forward"), twice.idle([0])) == (4.0, 0.5, 0.5)


@needs_two_cores
@pytest.mark.parametrize("workers", ["moved", "left out", "elsewhere"])
def test_the_check_fails_when_worker_threads_are_left_out(workers):
    """One thread is moved, as os.sched_setaffinity(0, …) does; the pool that exists goes on computing on every core."""
    first, second, *_ = available_cores()
    split = Split((first,), (second,))
    placement = split_cores.Placement(split)
    group = split_cores.CoreGroup("forward", (first, second))  # a pool of two threads on two cores
    try:
        assert len(group.threads) == 2
        master = group.submit(threading.get_native_id).result()
        if workers == "left out":
            group.submit(os.sched_setaffinity, 0, [first]).result()
            group.threads = {master}
        else:
            split_cores.pin(group.threads, (first,))
            split_cores.pin(group.threads - {master}, (first if workers == "moved" else second,))
        placement.groups["forward"] = group
        with split_cores.CoreMonitor(placement, interval=0.01) as monitor:
            group.submit(multiply, 0.5).result()
            usage = monitor.take()
        assert (usage.inside("forward") < split_cores.INSIDE) == (workers != "moved")
    finally:
        group.close()


def test_a_group_without_its_threads_is_an_error(placement):
    placement.groups["forward"].threads.clear()
    with pytest.raises(TrainingError, match="0 OpenMP threads for the"):
        placement.check()


# -- modes ------------------------------------------------------------------------------------------------------------


def accumulate(model, optimizer, x, labels, count):
    """Plain gradient accumulation, as one would write it; the loss in float32, as autocast takes it."""
    optimizer.zero_grad()
    for part, its_labels in zip(x.tensor_split(count), labels.tensor_split(count), strict=True):
        (F.cross_entropy(model(part).float(), its_labels, reduction="sum") / len(labels)).backward()
    optimizer.step()


@needs_two_cores
@pytest.mark.parametrize("mode", split_cores.MODES)
@pytest.mark.parametrize(("images", "count"), [(16, 1), (16, 4), (13, 4), (3, 8)])
def test_modes_equal_plain_accumulation(placement, mode, images, count):
    """Three steps: gradients, weights and running statistics within 1e-10, whatever divides or does not.

    In float64: groups of other sizes may add in another order, and in float32 that puts a ReLU on its other side now
    and then, which changes gradients by more than rounding does.
    """
    ours = tiny_model().double()
    plain = copy.deepcopy(ours)
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, 0.9) for model in (ours, plain)]
    trainer = split_cores.Trainer(placement, ours, optimizers[0], torch.float32, count)
    if mode == "replicas":
        count = max(count, 2)
    for _ in range(3):
        x, labels = batch(images)
        x = x.double()
        step = trainer.step(mode, x, labels)
        accumulate(plain, optimizers[1], x, labels, min(count, images))
        assert step.logits.shape == (images, 10)
        assert step.loss == pytest.approx(
            F.cross_entropy(step.logits, labels, reduction="sum").item(), rel=1e-5
        )
        assert min(step.forward, step.backward, step.update) > 0
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if mode != "replicas":  # they keep the statistics of their own half
        for (name, a), (_, b) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@needs_two_cores
def test_resnet50_pipelined_gradient_equals_plain_accumulation(placement):
    """The real network in float64, where rounding does not hide a difference."""
    torch.manual_seed(3)
    model = split_cores.make_model().double()
    plain = copy.deepcopy(model)
    x, labels = batch(4)
    trainer = split_cores.Trainer(
        placement, model, torch.optim.SGD(model.parameters(), 0.0), torch.float32, 2
    )
    trainer.step("pipelined", x.double(), labels)
    accumulate(plain, torch.optim.SGD(plain.parameters(), 0.0), x.double(), labels, 2)
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, plain))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Meeting:
    """Where phases wait for each other: from the one numbered `since` (from 0) on until two are at work at once.

    since None: each phase lasts for a moment, in which another one could begin.
    """

    def __init__(self, since=None):
        self.since, self.begun, self.at_work = since, itertools.count(), 0
        self.lock, self.happened = threading.Lock(), threading.Event()

    def __deepcopy__(self, _):
        return self  # one for all replicas

    def attend(self):
        with self.lock:
            number = next(self.begun)
            self.at_work += 1
            if self.at_work > 1:
                self.happened.set()
        if self.since is None:
            time.sleep(0.02)
        elif number >= self.since:
            self.happened.wait(60)
        with self.lock:
            self.at_work -= 1


class Recorder(torch.nn.Module):
    """Notes its forward and backward passes, and in which thread."""

    def __init__(self, meeting):
        super().__init__()
        self.weight, self.meeting, self.seen = torch.nn.Parameter(torch.ones(())), meeting, []

    def forward(self, x):
        recorder = self

        class Phases(torch.autograd.Function):
            @staticmethod
            def forward(_, x):
                recorder.note("forward")
                return x.clone()

            @staticmethod
            def backward(_, dout):
                recorder.note("backward")
                return dout

        return Phases.apply(x.flatten(1)[:, :10] * self.weight)

    def note(self, phase):
        self.meeting.attend()
        self.seen.append((phase, threading.get_native_id()))


@needs_two_cores
@pytest.mark.parametrize(
    ("mode", "since"), {"all": None, "split": None, "pipelined": 1, "replicas": 0}.items()
)
def test_phases_run_on_their_groups_and_overlap_where_they_should(placement, mode, since):
    """Two phases of `pipelined` can meet when the first forward pass is over, of `replicas` at once."""
    model = Recorder(Meeting(since))
    trainer = split_cores.Trainer(
        placement, model, torch.optim.SGD(model.parameters(), 0.1), torch.float32, 4
    )
    trainer.step(mode, *batch(8))
    if mode == "replicas":
        model.seen += trainer._replica.seen
    groups = {
        group.submit(threading.get_native_id).result(): name
        for name, group in placement.groups.items()
    }
    lanes = {("forward", "forward"), ("backward", "backward")}
    assert {(phase, groups[thread]) for phase, thread in model.seen} == {
        "all": {("forward", "all"), ("backward", "all")},
        "split": lanes,
        "pipelined": lanes,
        "replicas": {*lanes, ("forward", "backward"), ("backward", "forward")},
    }[mode]
    assert model.meeting.happened.is_set() == (mode in ("pipelined", "replicas"))
    assert len(model.seen) == 8


@needs_two_cores
@pytest.mark.parametrize("mode", split_cores.MODES)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_an_error_in_a_phase_ends_the_step_without_an_update(placement, mode, phase):
    model = Recorder(Meeting())
    trainer = split_cores.Trainer(
        placement, model, torch.optim.SGD(model.parameters(), 0.1), torch.float32, 4
    )

    def note(kind):
        if kind == phase:
            raise ValueError("broken on purpose")

    model.note = note
    with pytest.raises(ValueError, match="broken on purpose"):
        trainer.step(mode, *batch(8))
    assert model.weight.item() == 1.0


@needs_two_cores
def test_bfloat16_is_near_float32_in_every_mode(placement):
    x, labels = batch(16)
    gradients = {}
    for mode in split_cores.MODES:
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny_model()
            optimizer = torch.optim.SGD(model.parameters(), 0.0)
            split_cores.Trainer(placement, model, optimizer, dtype, 4).step(mode, x, labels)
            assert all(p.grad.dtype is torch.float32 for p in model.parameters())
            gradients[mode, dtype] = torch.cat([p.grad.flatten() for p in model.parameters()])
    exact = gradients["all", torch.float32]
    for (mode, dtype), gradient in gradients.items():
        error = (gradient - exact).norm() / exact.norm()
        assert error < 0.05, mode
        assert (error > 1e-4) == (dtype is torch.bfloat16), mode


def test_image_sizes_and_stems():
    images, labels, *_ = make_synthetic(4)
    for size in (32, 64, 96):
        for memory_format in split_cores.MEMORY_FORMATS:
            args = split_cores.parse_args(
                ["--image-size", str(size), "--memory-format", memory_format]
            )
            x, y = split_cores.load_batch(images, labels, np.arange(4), args)
            assert x.shape == (4, 3, size, size)
            assert x.is_contiguous(memory_format=split_cores.MEMORY_FORMATS[memory_format])
            assert y.tolist() == labels[:4].tolist()
        assert split_cores.make_model(size)(x[:1]).shape == (
            1,
            10,
        )  # one image a micro-batch: BatchNorm can


@pytest.mark.parametrize(
    ("forward", "backward", "sizes"), [(1.0, 2.0, (4, 8)), (1.0, 1.0, (6, 6)), (5.0, 1.0, (10, 2))]
)
def test_split_auto_measures_until_the_phases_are_balanced(
    monkeypatch, capsys, forward, backward, sizes
):
    """On 14 cores that this machine may not have: the measured steps are those of phases that scale perfectly."""
    measured = []

    class Trainer:
        def __init__(self, placement, _):
            self.split = placement.split
            measured.append(self.split)

        def step(self, *_):
            seconds = forward / len(self.split.forward), backward / len(self.split.backward)
            return split_cores.Step(0.0, None, *seconds, 0.0)

    monkeypatch.setattr(split_cores, "choose_split", lambda _: split_cores.split_cores(range(14)))
    monkeypatch.setattr(
        split_cores, "Placement", lambda split: contextlib.nullcontext(SimpleNamespace(split=split))
    )
    monkeypatch.setattr(split_cores, "make_trainer", Trainer)
    data = SimpleNamespace(
        x_train=np.zeros((4, 32, 32, 3), np.uint8), y_train=np.zeros(4, np.uint8)
    )
    args = SimpleNamespace(split="auto", batch_size=4, image_size=32, memory_format="channels_last")
    split = split_cores.find_split(args, data)
    assert (len(split.forward), len(split.backward)) == sizes
    assert split.reserved == (12, 13)
    assert measured == [split_cores.split_cores(range(14)), split][: len(set(measured))]
    assert (
        "--split auto: forward 0-5, backward 6-11, reserved 12-13: forward"
        in capsys.readouterr().out
    )


# -- benchmark --------------------------------------------------------------------------------------------------------


def test_pipeline_bound():
    """Against a simulation of the schedule: the forward lane one ahead, the backward lane in order."""
    for forward, backward, count in ((1.0, 2.0, 4), (2.0, 1.0, 4), (1.0, 1.0, 1), (3.0, 5.0, 8)):
        f, b, free, done = forward / count, backward / count, 0.0, [0.0]
        for k in range(count):
            free = (
                max(free, done[max(k - 1, 0)]) + f
            )  # a ticket comes back when the one before the last is done
            done.append(max(done[-1], free) + b)
        assert split_cores.bound_seconds(forward, backward, 0.5, count) == pytest.approx(
            done[-1] + 0.5
        )


def turns(**seconds):
    """Three rounds in which every contestant takes `seconds` (default 1 s: 0.3 forward, 0.6 backward, 0.1 update)."""
    names = {mode: mode for mode in split_cores.MODES} | {
        "one_piece": split_cores.ONE_PIECE,
        "usual": split_cores.USUAL,
        "forward_alone": split_cores.FORWARD_ALONE,
        "backward_alone": split_cores.BACKWARD_ALONE,
    }
    times = {name: seconds.get(key, 1.0) for key, name in names.items()}
    return {name: 3 * [Turn(s, 0.3 * s, 0.6 * s, 0.1 * s, 0.7, 0.3)] for name, s in times.items()}


@pytest.mark.parametrize(
    ("seconds", "said", "not_said"),
    [
        (
            {},
            [
                "although its phases wait",
                "the overlap gains nothing",
                "pipelined is 1.00 × as fast as all.",
            ],
            ["micro-batches overlap."],
        ),
        (
            {"all": 0.5, "pipelined": 0.7},
            [
                "0.50 × as fast as all because its phases wait",
                "70%",
                "micro-batches overlap.",
                "backward takes 2.0 × as long",
                "reaches 111% of the bound",
            ],
            ["the overlap gains nothing"],
        ),
        ({"all": 0.5, "split": 1.2}, ["takes 1.20 ×", "slower than alone"], ["because its phases"]),
    ],
)
def test_findings_follow_from_the_figures(seconds, said, not_said):
    text = "\n".join(split_cores.findings(turns(**seconds), 4))
    assert all(words in text for words in said), text
    assert not any(words in text for words in not_said), text


def test_modes_that_differ_are_not_compared():
    split_cores.check_same_loss({"all": 2.30, "split": 2.31})
    for loss in (2.5, float("nan")):
        with pytest.raises(TrainingError, match="the modes' losses differ"):
            split_cores.check_same_loss({"all": 2.30, "split": loss})


@needs_two_cores
def test_benchmark_compares_all_modes(run_script, tmp_path):
    done = run_script(SCRIPT, *TINY, "--batch-size", 4, "--benchmark", "--rounds", 3, timeout=600)
    rows = {line.strip().split("  ")[0] for line in done.stdout.splitlines()}
    assert {*split_cores.MODES, split_cores.USUAL, split_cores.ONE_PIECE} <= rows
    for words in (
        "ResNet-50, synthetic",
        "medians (min–max) of 3 rounds",
        "× the time of its phases",
        "of the bound",
    ):
        assert words in done.stdout
    assert [path.name for path in (tmp_path / "results").iterdir()] == [
        "split_cores_benchmark.json"
    ]
    content = json.loads((tmp_path / "results/split_cores_benchmark.json").read_text())
    assert {len(turns) for turns in content["turns"].values()} == {3}
    assert all(turn["seconds"] >= turn["forward"] for turn in content["turns"]["all"])
    assert all(sentence in done.stdout for sentence in content["findings"])
    assert content["arguments"]["batch_size"] == 4


def test_benchmark_that_cannot_write_starts_nothing(run_script, tmp_path):
    done = run_script(
        SCRIPT,
        *TINY,
        "--batch-size",
        4,
        "--benchmark",
        "--rounds",
        3,
        "--output",
        tmp_path,
        status=2,
    )
    assert_one_error_line(done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "done", "sizes"),
    [
        ((), ["training", "benchmark"], (128, 1, 3)),
        (("--benchmark",), ["benchmark"], (None, 10, 7)),
        (("--epochs", "2"), ["training"], (None, 2, 7)),
        (("--subset", "500"), ["training"], (500, 10, 7)),
    ],
)
def test_no_options_mean_a_small_run_and_the_comparison(monkeypatch, options, done, sizes):
    calls = []
    monkeypatch.setattr(split_cores, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(split_cores, "choose_split", lambda args: Split((0,), (1,)))
    monkeypatch.setattr(split_cores, "available_cores", lambda: [0, 1])
    monkeypatch.setattr(split_cores, "load_cifar10", lambda data_dir, dataset, subset, seed: subset)
    monkeypatch.setattr(
        split_cores, "run_training", lambda args, data: calls.append(("training", args, data))
    )
    monkeypatch.setattr(
        split_cores, "run_benchmark", lambda args, data: calls.append(("benchmark", args, data))
    )
    split_cores.main(list(options))
    assert [name for name, *_ in calls] == done
    assert all((data, args.epochs, args.rounds) == sizes for _, args, data in calls)


@needs_two_cores
def test_ctrl_c_while_a_group_ends():
    """close() returns when the job is done, even if interrupted: Python aborts beside a thread in PyTorch."""
    main, interruptions = threading.main_thread().ident, []

    def waiting():
        """The main thread's frame if it stays where it waits. It is the job that looks, so close() cannot be over."""
        seen = []
        for _ in range(20):
            frame = sys._current_frames()[main]
            seen.append((frame, frame.f_lasti))
            time.sleep(0.005)
        return (
            frame
            if len(set(seen)) == 1 and frame.f_code is threading.Condition.wait.__code__
            else None
        )

    def job():
        began = time.monotonic()
        while len(interruptions) < 2 and time.monotonic() - began < 60:
            if (frame := waiting()) and frame not in interruptions:
                interruptions.append(frame)
                signal.pthread_kill(main, signal.SIGINT)

    group = split_cores.CoreGroup("forward", available_cores()[:1])
    job = group.submit(job)
    group.close()
    assert job.done()
    assert len(interruptions) == 2


# -- runs -------------------------------------------------------------------------------------------------------------


@needs_two_cores
def test_run_writes_log_and_sidecar(run_script, tmp_path):
    done = run_script(SCRIPT, *TINY, "--epochs", 2, "--mode", "split")
    rows = read_log(tmp_path / "results/train_resnet50_split_cores.csv")
    assert [row["type"] for row in rows] == ["2", "2", "0", "1"] * 2
    for row in rows:
        if row["type"] != "1":
            assert 0 < float(row["forward"]) + float(row["backward"]) <= float(row["duration"])
    sidecar = json.loads((tmp_path / "results/train_resnet50_split_cores.json").read_text())
    split = split_cores.split_cores(available_cores())
    assert sidecar["cores_of_phases"] == {
        "forward": list(split.forward),
        "backward": list(split.backward),
    }
    assert sidecar["status"] == "done"
    assert min(sidecar["totals"]["cpu_time_inside"].values()) >= 0.99
    idle = sidecar["totals"]["idle"]  # each group waits for the other
    assert all(0 < idle[group] < 1 for group in ("forward", "backward"))
    assert idle["forward"] + idle["backward"] > 0.5
    assert "CPU time inside the assigned cores: forward 100.0%, backward 100.0%" in done.stdout
    assert "epoch 2/2  train loss" in done.stdout


@needs_two_cores
def test_interrupted_run_resumes_bit_for_bit(tmp_path):
    options = (*TINY, "--subset", 40, "--epochs", 1, "--quiet", "--checkpoint", "run.npz")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    finish(start(whole, SCRIPT, *options))
    process = start_stopping(broken, SCRIPT, *options, when=before_batch(1, 2))
    send(process, signal.SIGINT)
    _, err = finish(process, 130)
    assert err.startswith("interrupted by SIGINT after batch 2 of epoch 1; ")
    assert "--resume" in err
    finish(start(broken, SCRIPT, *options, "--resume"))
    assert_same_run(broken, whole, "train_resnet50_split_cores")


FROM_PYTHON = """
import os, signal, sys, torch
import common
import train_resnet50_split_cores as s
def state():
    return torch.get_num_threads(), s.affinities()
before = state()
def check():
    threads, masks = state()
    assert threads == before[0], (threads, before)
    assert all(mask == next(iter(before[1].values())) for mask in masks.values()), masks
options = dict(dataset="synthetic", subset=16, micro_batches=2, quiet=True)
end = sys.argv[1]
if end == "interrupted":
    start_epoch = common.Run.start_epoch
    def interrupt(run, *args):
        start_epoch(run, *args)
        os.kill(os.getpid(), signal.SIGINT)
    common.Run.start_epoch = interrupt
try:
    history = s.train(num_epochs=1, batch_size=8, learning_rate=1e30 if end == "failed" else 0.01, **options)
except BaseException as error:
    print(type(error).__name__)
else:
    print(sorted(history), len(history["test_acc"]))
check()
"""


@needs_two_cores
@pytest.mark.parametrize("end", ["done", "failed", "interrupted"])
def test_train_from_python_restores_affinity_and_thread_count(tmp_path, end):
    done = run_python(tmp_path, FROM_PYTHON, end)
    assert done.returncode == 0, done.stderr
    wanted = {
        "done": "['epoch_time', 'images_per_s', 'test_acc', 'test_loss', 'train_acc', 'train_loss'] 1",
        "failed": "TrainingError",
        "interrupted": "Interrupted",
    }[end]
    assert done.stdout.splitlines()[-1] == wanted


def run_python(folder, code, *arguments):
    """Run `code` in a process of its own, which can import the script."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = script_environment(PYTHONPATH=REPO)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--forward-cores", "0-1", "--backward-cores", "1"), "both have 1"),
        (("--forward-cores", "0", "--backward-cores", "4000"), "core 4000 is not available"),
        (("--forward-cores", "", "--backward-cores", "1"), "not a list of cores"),
        (("--forward-cores", "2-0", "--backward-cores", "1"), "not a list of cores"),
        (("--forward-cores", "0,x", "--backward-cores", "1"), "not a list of cores"),
        (("--forward-cores", "0-99999999999", "--backward-cores", "1"), "not a list of cores"),
        (("--forward-cores", "0"), "give both"),
        (("--forward-cores", "0", "--backward-cores", "1", "--split", "1:2"), "one or the other"),
        (("--split", "1"), "not a proportion"),
        (("--split", "0:2"), "not a proportion"),
        (("--micro-batches", 3), "does not divide --batch-size 8"),
        (("--micro-batches", 16), "does not divide"),
        (("--micro-batches", 0), "--micro-batches"),
        (("--image-size", 40), "--image-size 40"),
        (("--image-size", 256), "--image-size 256"),
        (("--image-size", 0), "--image-size 0"),
        (("--dtype", "float16"), "invalid choice"),
        (("--learning-rate", 0), "--learning-rate"),
        (("--resume",), "--checkpoint"),
        (("--resume", "--benchmark", "--checkpoint", "x.npz"), "--benchmark"),
    ],
)
def test_bad_input_is_said(capsys, options, message):
    with pytest.raises((InputError, SystemExit)) as error:
        split_cores.main([*map(str, TINY), "--quiet", *map(str, options)])
    said = f"error: {error.value}\n"
    if error.type is SystemExit:  # from argparse, which prints it
        assert error.value.code == 2
        said = capsys.readouterr().err
    assert_one_error_line(said)
    assert message in said


@pytest.mark.parametrize(
    "options", [("--forward-cores", "0", "--backward-cores", 0), ("--split", "x"), ("--resume",)]
)
def test_bad_input_ends_the_script_with_one_line(run_script, tmp_path, options):
    done = run_script(SCRIPT, *TINY, *options, "--quiet", status=2)
    assert_one_error_line(done.stderr)
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity calls")
@pytest.mark.parametrize("mode", ["all", "replicas"])
def test_one_core(tmp_path, mode):
    """A process that may use one core: --mode all runs, the others say what is wrong."""
    core = available_cores()[0]
    code = f"import os; os.sched_setaffinity(0, [{core}]); import {SCRIPT[:-3]} as s; s.run_main(s.main)"
    done = run_python(tmp_path, code, *TINY, "--epochs", 1, "--mode", mode)
    assert done.returncode == (0 if mode == "all" else 2), done.stderr
    if mode != "all":
        assert "need two cores" in done.stderr


@pytest.mark.parametrize("mode", ["all", "split"])
def test_a_system_without_affinity(tmp_path, mode):
    """As on macOS, where os has no sched_setaffinity."""
    code = f"""import os, sys
del os.sched_setaffinity, os.sched_getaffinity
import {SCRIPT[:-3]} as s
s.run_main(s.main)"""
    done = run_python(tmp_path, code, *TINY, "--epochs", 1, "--mode", mode)
    assert done.returncode == (0 if mode == "all" else 2), done.stderr
    if mode != "all":
        assert "does not let a process do: train with --mode all" in done.stderr


@needs_two_cores
def test_loss_that_explodes_stops_the_run(run_script, tmp_path):
    done = run_script(SCRIPT, *TINY, "--epochs", 3, "--learning-rate", 1e30, "--quiet", status=1)
    assert done.stderr.startswith("error: the loss is ")
    assert done.stderr.count("\n") == 1
    assert json.loads((tmp_path / "results/train_resnet50_split_cores.json").read_text())[
        "status"
    ].startswith("failed")
