"""train_resnet50_split_cores.py: groups of cores, pinning, modes, benchmark, log, resume, input."""

import contextlib
import copy
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    assert_one_error_line,
    before_batch,
    finish,
    read_log,
    read_npz,
    refused,
    send,
    start,
    start_stopping,
)
from torch.nn import functional as F

import train_resnet50_split_cores as split_cores
from common import (
    Dataset,
    InputError,
    Interrupted,
    RunLog,
    TrainingError,
    available_cores,
    make_synthetic,
)
from train_resnet50_split_cores import CoreSplit, Sample

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
def tiny_script(monkeypatch, tmp_path):
    """tiny_script([option, …]): the script in this process and a new folder; a small network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    monkeypatch.setattr(split_cores, "make_model", lambda *_: tiny_model())
    monkeypatch.setattr(split_cores, "keep_freed_memory", lambda: None)

    def main(argv):
        split_cores.main([*map(str, TINY), *map(str, argv)])

    return main


@pytest.fixture
def placement():
    with split_cores.Placement(split_cores.split_cores(available_cores())) as placement:
        yield placement


# -- core groups -----------------------------------------------------------------------------------


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


# -- threads that stay on their cores --------------------------------------------------------------


def multiply(seconds):
    """Keep the calling thread's whole pool at work."""
    a = torch.ones(1 << 20)
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        a.mul_(1.0)


@needs_two_cores
def test_every_thread_is_placed_and_put_back():
    """Threads that existed before, the groups and their pools.

    Each group computes with as many threads as it has cores.
    """
    stop = threading.Event()
    bystander = threading.Thread(target=stop.wait, daemon=True)
    bystander.start()
    before = split_cores.affinities()
    threads = torch.get_num_threads()
    cores = available_cores()
    with split_cores.Placement(split_cores.split_cores(cores)) as placement:
        inside = split_cores.affinities()
        split = placement.split
        both = split.forward + split.backward
        for name, own in (("forward", split.forward), ("backward", split.backward), ("all", both)):
            group = placement.groups[name]
            assert len(group.threads) == len(own)
            assert all(inside[thread] == set(own) for thread in group.threads)
            assert group.submit(torch.get_num_threads).result() == len(own)
        others = inside.keys() - placement.group_of_threads().keys()
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
    """A thread's first call into OpenMP takes over the count that any thread has set last.

    That must not happen after the group has set its own.
    """
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
    """GOMP_CPU_AFFINITY binds the main thread to one core when torch is imported: one line."""
    cores = " ".join(map(str, available_cores()))
    done = run_script(SCRIPT, *TINY, "--epochs", 1, env={"GOMP_CPU_AFFINITY": cores}, status=2)
    assert_one_error_line(done.stderr)
    assert "unset GOMP_CPU_AFFINITY" in done.stderr


@needs_two_cores
def test_monitor_sees_the_groups_on_their_cores(placement):
    with split_cores.CoreMonitor(placement, interval=0.01) as monitor:
        for name in ("forward", "backward", "all"):
            placement.groups[name].submit(multiply, 0.3).result()
            usage = monitor.take()
            assert usage.share_inside(name) >= 0.99
            own = set(placement.groups[name].cores)
            assert sum(usage.by_core[name, core] for core in own) > 0
            assert usage.idle_share(own) < 1
            if rest := set(available_cores()) - own:
                assert usage.idle_share(rest) > 0.9


def test_shares_of_cpu_time():
    """Within two seconds forward computes 1 s on its core and 0.5 s elsewhere.

    A thread that nobody has placed computes 0.5 s.
    """
    seconds = Counter(
        {("forward", 0): 1.0, ("forward", 1): 0.5, ("unknown", 1): 0.5, ("python", 0): 9.0}
    )
    usage = split_cores.CoreUsage(CoreSplit((0,), (1,)), 2.0, seconds)
    assert usage.shares_inside() == {"forward": 0.5}
    assert (usage.idle_share([0]), usage.idle_share([1]), usage.idle_share([0, 1])) == (
        0.5,
        0.5,
        0.5,
    )
    twice = usage + usage
    assert (twice.seconds, twice.share_inside("forward"), twice.idle_share([0])) == (4.0, 0.5, 0.5)


@needs_two_cores
@pytest.mark.parametrize("workers", ["moved", "left out", "elsewhere"])
def test_the_check_fails_when_worker_threads_are_left_out(workers):
    """os.sched_setaffinity(0, …) moves one thread; the pool that exists computes on every core."""
    first, second, *_ = available_cores()
    split = CoreSplit((first,), (second,))
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
        assert (usage.share_inside("forward") < split_cores.MIN_SHARE_INSIDE) == (
            workers != "moved"
        )
    finally:
        group.close()


def test_a_group_without_its_threads_is_an_error(placement):
    placement.groups["forward"].threads.clear()
    with pytest.raises(TrainingError, match="0 OpenMP threads for the"):
        placement.check()


# -- modes -----------------------------------------------------------------------------------------


def accumulate(model, optimizer, x, labels, count):
    """Plain gradient accumulation, written plainly; the loss in float32, as autocast has it."""
    optimizer.zero_grad()
    for part, its_labels in zip(x.tensor_split(count), labels.tensor_split(count), strict=True):
        loss = F.cross_entropy(model(part).float(), its_labels, reduction="sum") / len(labels)
        loss.backward()
    optimizer.step()


@needs_two_cores
@pytest.mark.parametrize("mode", split_cores.MODES)
@pytest.mark.parametrize(("images", "count"), [(16, 1), (16, 4), (13, 4), (3, 8)])
def test_modes_equal_plain_accumulation(placement, mode, images, count):
    """Three steps: gradients, weights and running statistics agree within 1e-10.

    Also where the batch cannot be divided evenly. In float64: groups of other sizes may add in
    another order, and in float32 that puts a ReLU on its other side now and then, which changes
    gradients by more than rounding does.
    """
    if mode == "replicas":
        count = max(count, 2)  # fewer are refused
    ours = tiny_model().double()
    plain = copy.deepcopy(ours)
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, 0.9) for model in (ours, plain)]
    trainer = split_cores.Trainer(placement, ours, optimizers[0], torch.float32, count)
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
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    theirs = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Meeting:
    """Where phases wait until two of them are at work at once.

    since: the number (from 0) of the first phase that waits. None: no phase waits, but each lasts
    for a moment, in which another one could begin.
    """

    def __init__(self, since=None):
        self.since = since
        self.begun = itertools.count()
        self.at_work = 0
        self.lock = threading.Lock()
        self.happened = threading.Event()

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
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.meeting = meeting
        self.seen = []

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
    """Phases of `pipelined` can meet when the first forward pass is over, of `replicas` at once."""
    model = Recorder(Meeting(since))
    trainer = split_cores.Trainer(
        placement, model, torch.optim.SGD(model.parameters(), 0.1), torch.float32, 4
    )
    trainer.step(mode, *batch(8))
    if mode == "replicas":
        model.seen += trainer.replica.seen
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
    """On 14 cores that this machine may not have, with phases that scale perfectly."""
    measured = []

    class Trainer:
        def __init__(self, placement, *_):
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
    images = np.zeros((4, 32, 32, 3), np.uint8)
    labels = np.zeros(4, np.uint8)
    data = Dataset(images, labels, images, labels, "synthetic", "")
    args = SimpleNamespace(split="auto", batch_size=4, image_size=32, memory_format="channels_last")
    split = split_cores.find_split(args, data)
    assert (len(split.forward), len(split.backward)) == sizes
    assert split.reserved == (12, 13)
    assert measured == [split_cores.split_cores(range(14)), split][: len(set(measured))]
    assert (
        "--split auto: forward 0-5, backward 6-11, reserved 12-13: forward"
        in capsys.readouterr().out
    )


# -- benchmark -------------------------------------------------------------------------------------


def test_pipeline_bound():
    """Against a simulation: the forward worker is one ahead, the backward worker goes in order."""
    for forward, backward, count in ((1.0, 2.0, 4), (2.0, 1.0, 4), (1.0, 1.0, 1), (3.0, 5.0, 8)):
        forward_done = 0.0
        backward_done = [0.0]  # of micro-batch k - 1 at index k
        for k in range(count):
            # Two may be in flight: forward k begins when backward k - 2 is done.
            forward_done = max(forward_done, backward_done[max(k - 1, 0)]) + forward / count
            backward_done.append(max(backward_done[-1], forward_done) + backward / count)
        assert split_cores.pipeline_bound(forward, backward, 0.5, count) == pytest.approx(
            backward_done[-1] + 0.5
        )


def samples(**seconds):
    """Three rounds in which each variant takes `seconds` (default 1 s).

    Of them 0.3 are forward, 0.6 backward and 0.1 the update.
    """
    names = {mode: mode for mode in split_cores.MODES} | {
        "no_micro_batches": split_cores.NO_MICRO_BATCHES,
        "stock": split_cores.STOCK_PYTORCH,
        "forward_alone": split_cores.FORWARD_ALONE,
        "backward_alone": split_cores.BACKWARD_ALONE,
    }
    times = {name: seconds.get(key, 1.0) for key, name in names.items()}
    return {name: 3 * [Sample(s, 0.3 * s, 0.6 * s, 0.1 * s, 0.7, 0.3)] for name, s in times.items()}


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
    text = "\n".join(split_cores.findings(samples(**seconds), 4))
    assert all(words in text for words in said), text
    assert not any(words in text for words in not_said), text


def test_modes_that_differ_are_not_compared():
    split_cores.check_same_loss({"all": 2.30, "split": 2.31}, 0.02)
    for loss in (2.5, float("nan")):
        with pytest.raises(TrainingError, match="the losses of the modes differ"):
            split_cores.check_same_loss({"all": 2.30, "split": loss}, 0.02)


BENCHMARK = ("--batch-size", 4, "--benchmark", "--rounds", 3)


@needs_two_cores
def test_benchmark_compares_all_modes(tiny_script, tmp_path, capsys):
    """With a small network; tests/test_repository.py runs the documented one with ResNet-50."""
    tiny_script(BENCHMARK)
    stdout = capsys.readouterr().out
    rows = {line.strip().split("  ")[0] for line in stdout.splitlines()}
    assert {*split_cores.MODES, split_cores.STOCK_PYTORCH, split_cores.NO_MICRO_BATCHES} <= rows
    for words in (
        "ResNet-50, synthetic",
        "medians (min–max) of 3 rounds",
        "× the time of its phases",
        "of the bound",
    ):
        assert words in stdout
    files = [path.name for path in (tmp_path / "results").iterdir()]
    assert files == ["split_cores_benchmark.json"]
    content = json.loads((tmp_path / "results/split_cores_benchmark.json").read_text())
    assert {len(samples) for samples in content["turns"].values()} == {3}
    assert all(sample["seconds"] >= sample["forward"] for sample in content["turns"]["all"])
    assert all(sentence in stdout for sentence in content["findings"])
    assert content["arguments"]["batch_size"] == 4


def test_benchmark_that_cannot_write_starts_nothing(tiny_script, tmp_path, capsys):
    line = refused(tiny_script, *BENCHMARK, "--output", tmp_path)
    assert str(tmp_path) in line
    assert capsys.readouterr().out == ""


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
    monkeypatch.setattr(split_cores, "choose_split", lambda args: CoreSplit((0,), (1,)))
    monkeypatch.setattr(split_cores, "available_cores", lambda: [0, 1])
    monkeypatch.setattr(split_cores, "load_dataset", lambda data_dir, dataset, subset, seed: subset)
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
    """close() returns when the job is done, also if it is interrupted."""
    main = threading.main_thread().ident
    interruptions = []

    def waiting():
        """The main thread's frame if it stays where it waits.

        It is the job that looks, so close() cannot be over.
        """
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


# -- runs ------------------------------------------------------------------------------------------


@needs_two_cores
def test_run_writes_log_and_metadata(run_script, tmp_path):
    """The real script with the real network."""
    done = run_script(SCRIPT, *TINY, "--epochs", 2, "--mode", "split")
    rows = read_log(tmp_path / "results/train_resnet50_split_cores.csv")
    assert [row["type"] for row in rows] == ["2", "2", "0", "1"] * 2
    for row in rows:
        if row["type"] != "1":
            assert 0 < float(row["forward"]) + float(row["backward"]) <= float(row["duration"])
    metadata = json.loads((tmp_path / "results/train_resnet50_split_cores.json").read_text())
    split = split_cores.split_cores(available_cores())
    assert metadata["cores_of_phases"] == {
        "forward": list(split.forward),
        "backward": list(split.backward),
    }
    assert metadata["status"] == "done"
    assert min(metadata["totals"]["cpu_time_inside"].values()) >= 0.99
    idle = metadata["totals"]["idle"]  # each group waits for the other
    assert all(0 < idle[group] < 1 for group in ("forward", "backward"))
    assert idle["forward"] + idle["backward"] > 0.5
    assert "CPU time inside the assigned cores: forward 100.0%, backward 100.0%" in done.stdout
    assert "epoch 2/2  train loss" in done.stdout


def flatten(value, name="checkpoint"):
    """{path: value} of all that nested dicts and lists hold."""
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list | tuple):
        entries = enumerate(value)
    else:
        return {name: value}
    flat = {}
    for key, entry in entries:
        flat.update(flatten(entry, f"{name}.{key}"))
    return flat


def load_checkpoint(path):
    return torch.load(path, weights_only=True)


def assert_same_training(folder, reference):
    """Bit for bit the same weights and optimizer; the same losses and accuracies in all files."""
    ours = load_checkpoint(folder / "run.pt")
    theirs = load_checkpoint(reference / "run.pt")
    for part in ("model", "optimizer"):
        our_values = flatten(ours[part])
        their_values = flatten(theirs[part])
        assert our_values.keys() == their_values.keys()
        for name, value in their_values.items():
            if isinstance(value, torch.Tensor):
                assert our_values[name].dtype == value.dtype, name
                assert torch.equal(our_values[name], value), name
            else:
                assert our_values[name] == value, name

    metrics = "results/train_resnet50_split_cores_metrics.npz"
    for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
        assert np.array_equal(read_npz(folder / metrics)[name], read_npz(reference / metrics)[name])
    log = "results/train_resnet50_split_cores.csv"
    same = ("type", "epoch", "value1", "value2", "loss")
    assert [[row[name] for name in same] for row in read_log(folder / log)] == [
        [row[name] for name in same] for row in read_log(reference / log)
    ]


def interrupt_at(monkeypatch, method, condition):
    """Send SIGINT to this process when RunLog's method is called and condition(log) holds."""
    original = getattr(RunLog, method)

    def interrupting(log, *args, **options):
        if condition(log):
            os.kill(os.getpid(), signal.SIGINT)
        return original(log, *args, **options)

    monkeypatch.setattr(RunLog, method, interrupting)


@needs_two_cores
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_interrupted_training_resumes_bit_for_bit(tiny_script, monkeypatch, tmp_path, optimizer):
    """With --resume from the start: the first time there is no checkpoint, which is said."""
    options = ("--epochs", 2, "--optimizer", optimizer, "--checkpoint", "run.pt", "--quiet")
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    tiny_script(options)
    monkeypatch.chdir(tmp_path / "broken")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "end_batch", lambda log: (log.epoch, log.batch) == (2, 0))
        with pytest.raises(Interrupted) as stopped:
            tiny_script(options)
    assert str(stopped.value).startswith("interrupted by SIGINT after batch 1 of epoch 2; ")
    assert "--resume" in str(stopped.value)
    assert load_checkpoint("run.pt")["meta"]["batch"] == 1
    tiny_script([*options, "--resume"])
    assert_same_training(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
@needs_two_cores
def test_interrupted_resnet50_resumes_bit_for_bit(tmp_path):
    """The real script, interrupted or killed while batch 2 is not counted yet."""
    options = (*TINY, "--subset", 24, "--epochs", 1, "--quiet", "--checkpoint", "run.pt")
    options = (*options, "--checkpoint-every", 0)
    whole = tmp_path / "whole"
    whole.mkdir()
    finish(start(whole, SCRIPT, *options))
    for number in (signal.SIGINT, signal.SIGKILL):
        broken = tmp_path / number.name
        broken.mkdir()
        process = start_stopping(broken, SCRIPT, *options, when=before_batch(1, 2))
        send(process, number)
        if number == signal.SIGINT:
            _, err = finish(process, 130)
            assert err.startswith("interrupted by SIGINT after batch 2 of epoch 1; ")
            assert "--resume" in err
        else:
            finish(process, -signal.SIGKILL)
        finish(start(broken, SCRIPT, *options, "--resume"))
        assert_same_training(broken, whole)


@needs_two_cores
def test_resume_without_a_checkpoint_starts_from_the_beginning(tiny_script, tmp_path, capsys):
    tiny_script(["--epochs", 1, "--checkpoint", "run.pt", "--resume"])
    assert "no checkpoint run.pt yet: training starts from the beginning" in capsys.readouterr().out
    assert (tmp_path / "run.pt").exists()


@needs_two_cores
def test_checkpoint_is_pytorchs_own_format(tiny_script):
    """Another program opens it with PyTorch alone."""
    tiny_script(["--epochs", 1, "--checkpoint", "run.pt", "--quiet"])
    checkpoint = load_checkpoint("run.pt")
    assert checkpoint.keys() == {"meta", "model", "optimizer"}
    model = tiny_model()
    model.load_state_dict(checkpoint["model"])
    torch.optim.SGD(model.parameters(), 0.1).load_state_dict(checkpoint["optimizer"])


@needs_two_cores
def test_checkpoints_that_are_no_use_are_refused(tiny_script, tmp_path):
    """One of an earlier version of this script (.npz), one that is cut off, one of another run."""
    np.savez("old.npz", meta=np.array("{}"), params=np.zeros(1000, np.float32))
    line = refused(tiny_script, "--epochs", 1, "--checkpoint", "old.npz", "--resume")
    assert line.startswith("error: --resume: old.npz is not a valid checkpoint")
    assert not (tmp_path / "results").exists()

    tiny_script(["--epochs", 1, "--checkpoint", "run.pt", "--quiet"])
    line = refused(tiny_script, "--epochs", 1, "--checkpoint", "run.pt", "--resume", "--seed", 7)
    assert "run.pt was made with seed 42, this run has 7" in line
    (tmp_path / "run.pt").write_bytes((tmp_path / "run.pt").read_bytes()[:5000])
    line = refused(tiny_script, "--epochs", 1, "--checkpoint", "run.pt", "--resume")
    assert line.startswith("error: --resume: run.pt is not a valid checkpoint")


@needs_two_cores
@pytest.mark.parametrize("end", ["done", "failed", "interrupted"])
def test_train_from_python_restores_affinity_and_thread_count(tiny_script, monkeypatch, end):
    options = {"dataset": "synthetic", "subset": 16, "micro_batches": 2, "quiet": True}
    before = split_cores.affinities()
    num_threads = torch.get_num_threads()
    if end == "done":
        history = split_cores.train(num_epochs=1, batch_size=8, learning_rate=0.01, **options)
        assert {"train_loss", "train_acc", "test_loss", "test_acc"} <= history.keys()
        assert {len(values) for values in history.values()} == {1}
    elif end == "failed":
        with pytest.raises(TrainingError):
            split_cores.train(num_epochs=3, batch_size=8, learning_rate=1e30, **options)
    else:
        interrupt_at(monkeypatch, "start_epoch", lambda log: True)
        with pytest.raises(Interrupted):
            split_cores.train(num_epochs=1, batch_size=8, learning_rate=0.01, **options)
    after = split_cores.affinities()
    assert torch.get_num_threads() == num_threads
    allowed = before[threading.main_thread().native_id]
    assert all(cores == before.get(thread, allowed) for thread, cores in after.items())


# -- bad input -------------------------------------------------------------------------------------


@needs_two_cores
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--forward-cores", "0-1", "--backward-cores", "1"), "both have 1"),
        (("--forward-cores", "0", "--backward-cores", "0"), "both have 0"),
        (("--forward-cores", "0", "--backward-cores", "4000"), "core 4000 is not available"),
        (("--forward-cores", "", "--backward-cores", "1"), "not a list of cores"),
        (("--forward-cores", "2-0", "--backward-cores", "1"), "not a list of cores"),
        (("--forward-cores", "0,x", "--backward-cores", "1"), "not a list of cores"),
        (("--forward-cores", "0-99999999999", "--backward-cores", "1"), "not a list of cores"),
        (("--forward-cores", "0"), "give both"),
        (("--forward-cores", "0", "--backward-cores", "1", "--split", "1:2"), "one or the other"),
        (("--split", "1"), "not a proportion"),
        (("--split", "0:2"), "not a proportion"),
        (("--split", "x"), "not a proportion"),
        (("--micro-batches", 3), "does not divide --batch-size 8"),
        (("--micro-batches", 16), "does not divide"),
        (
            ("--micro-batches", 1, "--mode", "replicas"),
            "replicas and the benchmark, which has them, need 2 or more",
        ),
        (("--micro-batches", 1, "--benchmark"), "need 2 or more"),
        (("--micro-batches", 0), "--micro-batches"),
        (("--image-size", 40), "--image-size 40"),
        (("--image-size", 256), "--image-size 256"),
        (("--image-size", 0), "--image-size 0"),
        (("--dtype", "float16"), "invalid choice"),
        (("--learning-rate", 0), "--learning-rate"),
        (("--resume",), "--checkpoint"),
        (("--resume", "--benchmark", "--checkpoint", "x.pt"), "--benchmark"),
    ],
)
def test_bad_input_is_refused(tiny_script, tmp_path, options, message):
    line = refused(tiny_script, "--quiet", *options)
    assert_one_error_line(f"{line}\n")
    assert message in line
    assert not (tmp_path / "results").exists()


def test_bad_input_ends_the_script_with_one_line(run_script, tmp_path):
    done = run_script(SCRIPT, *TINY, "--split", "x", "--quiet", status=2)
    assert_one_error_line(done.stderr)
    assert done.stdout == ""
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity calls")
@pytest.mark.parametrize("mode", ["all", "replicas"])
def test_one_core(tiny_script, mode):
    """A process that may use one core: --mode all runs, the others are refused."""
    cores = available_cores()
    os.sched_setaffinity(0, cores[:1])
    try:
        if mode == "all":
            tiny_script(["--epochs", 1, "--mode", mode])
        else:
            assert "need two cores" in refused(tiny_script, "--epochs", 1, "--mode", mode)
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("options", [("--mode", "all"), ("--mode", "split"), ("--benchmark",)])
def test_a_system_without_affinity(tiny_script, monkeypatch, options):
    """As on macOS, where os has no sched_setaffinity."""
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    if "all" in options:
        tiny_script(["--epochs", 1, *options])
    else:
        line = refused(tiny_script, "--epochs", 1, *options)
        assert "does not let a process do: train with --mode all" in line


def check_failed_run(message, folder):
    assert message.startswith("error: the loss is ")
    metadata = json.loads((folder / "results/train_resnet50_split_cores.json").read_text())
    assert metadata["status"].startswith("failed")


DIVERGING = ("--epochs", 3, "--learning-rate", 1e30, "--quiet")


@needs_two_cores
def test_loss_that_explodes_stops_the_run(tiny_script, tmp_path):
    with pytest.raises(TrainingError) as failed:
        tiny_script(DIVERGING)
    check_failed_run(f"error: {failed.value}", tmp_path)


@pytest.mark.slow
@needs_two_cores
def test_loss_of_resnet50_that_explodes_stops_the_script(run_script, tmp_path):
    done = run_script(SCRIPT, *TINY, *DIVERGING, status=1)
    assert_one_error_line(done.stderr)
    check_failed_run(done.stderr, tmp_path)
