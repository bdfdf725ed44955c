"""Train ResNet-50 on a CPU with forward and backward pass on separate cores, and measure what that is worth.

The cores of this process are divided into two groups. A group is a Python thread that owns an OpenMP pool; both are
pinned to the group's cores once and stay there, so that a phase moves by handing over a loss, not by moving threads.
Every mode computes the gradient of plain gradient accumulation over --micro-batches and updates once per batch:

    all        every core of both groups does both phases
    split      forward on its group, then backward and update on the other
    pipelined  forward of a micro-batch while the other group does backward of the one before
    replicas   data parallel, for comparison: each group does both phases on half of every batch

With no options: a small training run, then all modes on the same batches, taking turns, and what the figures mean. On
two cores of an AMD EPYC (Zen 4), PyTorch 2.13.0, batch 64 in 4 micro-batches, bfloat16, medians of 4 rounds: all 35.1
images/s, split 20.0, pipelined 25.9 (97 % of its bound: backward takes 2.2 × as long as forward), replicas 38.3.

    python train_resnet50_split_cores.py
    python train_resnet50_split_cores.py --benchmark --rounds 9 --split auto
    python train_resnet50_split_cores.py --mode split --epochs 2 --subset 1000 --dtype float32
    python train_resnet50_split_cores.py --mode pipelined --forward-cores 0 --backward-cores 1 --epochs 1 --subset 500
    python train_resnet50_split_cores.py --epochs 2 --checkpoint results/split.ckpt.npz      # Ctrl-C, then add --resume
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import platform
import queue
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from common import (
    MEAN,
    STD,
    InputError,
    Run,
    TrainingError,
    atomic_write,
    available_cores,
    check_outputs,
    cpu_model,
    environment,
    epoch_order,
    get_torch_arrays,
    keep_freed_memory,
    load_cifar10,
    make_parser,
    make_torch_optimizer,
    make_torch_resnet,
    number,
    run_main,
    set_torch_arrays,
    table,
)

MODES = ("all", "split", "pipelined", "replicas")
INSIDE = 0.99  # the least share of a group's CPU time on its own cores before a run warns
DEFAULT_RUN = {
    "subset": 128,
    "epochs": 1,
    "rounds": 3,
}  # with the benchmark within two minutes on two cores


# ----------------------------------------------------------------------------------------------------------------------
# Which cores
# ----------------------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    forward: tuple  # core numbers
    backward: tuple
    reserved: tuple = ()  # left to the system

    def __str__(self):
        names = (
            f"{name} {format_cores(cores)}"
            for name, cores in zip(self._fields, self, strict=True)
            if cores
        )
        return ", ".join(names)


def split_cores(cores, proportion=(1, 1)):
    """Divide the sorted `cores` as `proportion` (forward, backward) says; of more than four, two are reserved.

    Each group gets at least one core; where the proportion falls between two divisions, forward gets the core.
    Raises InputError where there is only one core.
    """
    cores = tuple(cores)
    if len(cores) < 2:
        bound = [
            name
            for name in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "OMP_PLACES")
            if name in os.environ
        ]
        remedy = f"unset {' and '.join(bound)}" if bound else "start it with more (taskset, cgroup)"
        raise InputError(
            "forward and backward on separate cores need two cores, this process may use one: use --mode "
            f"all, or {remedy}"
        )
    usable = cores[:-2] if len(cores) > 4 else cores
    forward, total = proportion[0], sum(proportion)
    first = math.floor(len(usable) * forward / total + 0.5)
    first = min(max(first, 1), len(usable) - 1)
    return Split(usable[:first], usable[first:], cores[len(usable) :])


def balance(split, forward_seconds, backward_seconds):
    """The division of split's cores with the shortest longer phase, if a phase takes time in proportion to 1 / cores.

    forward_seconds, backward_seconds: of the phases on the groups of `split`.
    """
    usable = split.forward + split.backward
    forward, backward = (
        forward_seconds * len(split.forward),
        backward_seconds * len(split.backward),
    )  # core-seconds
    first = min(range(1, len(usable)), key=lambda n: max(forward / n, backward / (len(usable) - n)))
    return Split(usable[:first], usable[first:], split.reserved)


def parse_cores(text):
    """An argparse type: "0-2,5" → (0, 1, 2, 5)."""
    cores = set()
    try:
        for part in text.split(","):
            low, dash, high = part.partition("-")
            numbers = range(int(low), int(high if dash else low) + 1)
            if not numbers or numbers[-1] > 2**16:
                raise ValueError
            cores.update(numbers)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of cores such as 0-2 or 0,2,5"
        ) from None
    return tuple(sorted(cores))


def parse_split(text):
    """An argparse type: "auto", or "1:2" → (1, 2)."""
    parts = text.split(":")
    if text == "auto":
        return text
    if len(parts) != 2 or not all(part.isdecimal() and 0 < int(part) < 1000 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a proportion such as 1:2, nor auto")
    return tuple(map(int, parts))


def format_cores(cores):
    """(0, 1, 2, 5) → "0-2,5"."""
    runs = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def choose_split(args):
    """The Split that the command line asks for; with --split auto the even one, to begin with."""
    cores = available_cores()
    if args.mode == "all" and not args.benchmark and (len(cores) < 2 or not can_pin()):
        return Split(tuple(cores), ())  # needs no groups
    if not can_pin():
        what = "--benchmark" if args.benchmark else f"--mode {args.mode}"
        raise InputError(
            f"{what} chooses the cores of its threads, which {platform.system()} does not let a process "
            "do: train with --mode all"
        )
    if args.forward_cores is None:
        return split_cores(cores, (1, 1) if args.split in (None, "auto") else args.split)
    forward, backward = args.forward_cores, args.backward_cores
    if both := set(forward) & set(backward):
        raise InputError(
            f"--forward-cores and --backward-cores both have {format_cores(sorted(both))}: "
            "give each core to one of them"
        )
    if missing := set(forward + backward) - set(cores):
        raise InputError(
            f"core {format_cores(sorted(missing))} is not available: this process may use "
            f"{format_cores(cores)}"
        )
    return Split(forward, backward, tuple(core for core in cores if core not in forward + backward))


# ----------------------------------------------------------------------------------------------------------------------
# Threads that stay on their cores
# ----------------------------------------------------------------------------------------------------------------------


def can_pin():
    return hasattr(os, "sched_setaffinity") and Path("/proc/self/task").is_dir()


def thread_ids():
    """The system's numbers of all threads of this process, those of libraries too."""
    return {int(name) for name in os.listdir("/proc/self/task")} if can_pin() else set()


def python_thread_ids():
    return {thread.native_id for thread in threading.enumerate()}


def affinities():
    """{thread: the cores it may run on} of all threads; one that is just ending, as a pool's do late, is left out."""
    cores = {}
    for thread in thread_ids():
        with contextlib.suppress(ProcessLookupError):
            cores[thread] = os.sched_getaffinity(thread)
    return cores


def pin(threads, cores):
    """Let the threads run on these cores alone, and check that they do. A thread that has ended is passed over.

    Each thread has an affinity of its own: os.sched_setaffinity(0, …) moves the thread that calls, psutil's
    cpu_affinity() the main one. Threads started later inherit it; those that exist, such as an OpenMP pool, stay where
    they are.
    """
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)
    check_affinity(threads, cores)


def check_affinity(threads, cores):
    """Read the affinity of each thread; raise TrainingError if one may run on other cores than these."""
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            if (seen := os.sched_getaffinity(thread)) != set(cores):
                raise TrainingError(
                    f"a thread is on cores {format_cores(sorted(seen))}, not {format_cores(cores)}: "
                    "let no other program move the threads of this one"
                )


class CoreGroup:
    """A Python thread and its OpenMP pool of len(cores) threads in all, on `cores`. submit() as of an executor."""

    def __init__(self, name, cores):
        self.name, self.cores = name, tuple(cores)
        self._executor = ThreadPoolExecutor(1, name)
        self.submit = self._executor.submit
        self.threads = self.submit(self._start).result()

    def _start(self):
        if can_pin():
            pin([threading.get_native_id()], self.cores)
        others = thread_ids() | python_thread_ids()
        torch.get_num_threads()  # a thread's first call into OpenMP takes over a count set by any thread: have it now
        torch.set_num_threads(len(self.cores))
        torch.zeros(len(self.cores) << 16).add_(1)  # starts the pool
        threads = {threading.get_native_id(), *(thread_ids() - others - python_thread_ids())}
        if can_pin():
            pin(
                threads, self.cores
            )  # the pool inherits the cores unless OpenMP has been told to bind its threads
        return threads

    def check(self):
        """Raise TrainingError unless every thread of the group is on its cores, and there is one for each core."""
        if can_pin():
            check_affinity(self.threads, self.cores)
            if (alive := len(self.threads & thread_ids())) != len(self.cores):
                raise TrainingError(
                    f"{alive} OpenMP threads for the {len(self.cores)} cores of group {self.name}: "
                    "unset OMP_THREAD_LIMIT and OMP_DYNAMIC"
                )

    def close(self):
        """End the thread when what it computes is done, also if Ctrl-C is pressed meanwhile.

        Waits for a job, because Thread.join() takes a thread for ended when it is interrupted (Python 3.11), and Python
        aborts if a thread is still in PyTorch when it ends itself.
        """
        last = self.submit(lambda: None)
        while not last.done():
            with contextlib.suppress(KeyboardInterrupt):
                wait([last])
        self._executor.shutdown()


class Placement:
    """While it is entered, the threads of this process are in their places; then all is as it was before.

    groups: "forward" and "backward" of the split, and "all", which has the cores of both. Every other thread (the main
    one, the monitors) is on the reserved cores, or where there are none on any, and computes with one thread.
    """

    def __init__(self, split):
        self.split, self.groups = split, {}

    def __enter__(self):
        self._affinity = affinities()
        self._threads = torch.get_num_threads()
        try:
            pin(thread_ids(), self.split.reserved or self.split.forward + self.split.backward)
            torch.set_num_threads(1)
            for name, cores in (
                ("forward", self.split.forward),
                ("backward", self.split.backward),
                ("all", self.split.forward + self.split.backward),
            ):
                if cores:
                    self.groups[name] = CoreGroup(name, cores)
            self.check()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for group in self.groups.values():
            group.close()
        for thread in thread_ids():
            before = self._affinity.get(thread) or self._affinity[threading.main_thread().native_id]
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, before)
        torch.set_num_threads(self._threads)

    def check(self):
        for group in self.groups.values():
            group.check()

    def threads(self):
        """{thread: name of its group}"""
        return {thread: name for name, group in self.groups.items() for thread in group.threads}


class CoreMonitor(threading.Thread):
    """Samples on which cores the threads of a Placement really run: take() → Usage since the last take().

    The time that a thread has computed since the last sample (schedstat, in nanoseconds; else stat, in ticks) counts
    for the core on which it was seen last (field 39 of stat; see proc(5)).
    """

    def __init__(self, placement, interval=0.05):
        super().__init__(daemon=True, name="core-monitor")
        self.placement, self.interval = placement, interval
        self._stop_event, self._lock, self._seen, self._seconds = (
            threading.Event(),
            threading.Lock(),
            {},
            Counter(),
        )
        self._sample()

    def __enter__(self):
        self._seconds.clear()
        self._since = time.perf_counter()
        self.start()
        return self

    def __exit__(self, *_):
        self._stop_event.set()
        self.join()

    def run(self):
        while not self._stop_event.wait(self.interval):
            self._sample()

    def take(self):
        self._sample()
        with self._lock:
            usage = Usage(self.placement.split, time.perf_counter() - self._since, self._seconds)
            self._seconds, self._since = Counter(), time.perf_counter()
        return usage

    def _sample(self):
        owners, python = self.placement.threads(), python_thread_ids()
        with self._lock:
            for thread in thread_ids():
                with contextlib.suppress(OSError):  # it has just ended
                    seconds = cpu_seconds(thread)
                    if (new := seconds - self._seen.get(thread, 0.0)) > 0:
                        owner = owners.get(thread, "python" if thread in python else "unknown")
                        self._seconds[owner, last_core(thread)] += new
                    self._seen[thread] = seconds


def stat_fields(thread):
    """The fields of /proc/self/task/THREAD/stat after the name, which may hold spaces; field 3 of proc(5) is [0]."""
    return Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()


def cpu_seconds(thread):
    with contextlib.suppress(FileNotFoundError):
        if nanoseconds := int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]):
            return nanoseconds / 1e9
    fields = stat_fields(thread)  # a kernel without schedstat has no such file, or zeros in it
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime + stime


def last_core(thread):
    return int(stat_fields(thread)[36])


class Usage:
    """CPU seconds by (owner, core) in a span of `seconds`; owner: a group, "python" (main, monitors) or "unknown"."""

    def __init__(self, split, seconds, by_core):
        self.split, self.seconds, self.by_core = split, seconds, by_core

    def __add__(self, other):
        return Usage(self.split, self.seconds + other.seconds, self.by_core + other.by_core)

    def inside(self, group):
        """The share of the group's CPU time on its own cores; a thread that nobody placed counts as outside."""
        cores = (
            self.split.forward + self.split.backward
            if group == "all"
            else getattr(self.split, group)
        )
        of_group = {
            key: seconds for key, seconds in self.by_core.items() if key[0] in (group, "unknown")
        }
        inside = sum(
            seconds
            for (owner, core), seconds in of_group.items()
            if owner == group and core in cores
        )
        return inside / sum(of_group.values()) if of_group else 1.0

    def idle(self, cores):
        """The share of the time that these cores did not compute for any group."""
        busy = sum(
            seconds
            for (owner, core), seconds in self.by_core.items()
            if core in cores and owner != "python"
        )
        return max(1 - busy / (self.seconds * len(cores)), 0.0)

    def shares(self):
        """{group: inside(group)} of the groups that computed."""
        groups = {owner for owner, _ in self.by_core} - {"python", "unknown"}
        return {
            group: self.inside(group)
            for group in sorted(groups, key=("forward", "backward", "all").index)
        }

    def __str__(self):
        return (
            ", ".join(f"{group} {share:.1%}" for group, share in self.shares().items())
            or "nothing computed"
        )


# ----------------------------------------------------------------------------------------------------------------------
# One step, in each mode
# ----------------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    loss: float  # summed over the batch
    logits: torch.Tensor  # (N, 10)
    forward: float  # seconds; of two groups at work on it, the mean
    backward: float
    update: float


def forward_pass(model, x, labels, batch_size):
    """Logits (n, 10) of a micro-batch and its part of the mean loss over the batch."""
    logits = model(x).float()
    return logits, F.cross_entropy(logits, labels, reduction="sum") / batch_size


def autocast(dtype):
    """For a whole batch, so that its micro-batches share the weights in `dtype`, which autocast keeps until it ends."""
    return torch.autocast("cpu", dtype) if dtype is not torch.float32 else contextlib.nullcontext()


def forward_lane(model, micro_batches, batch_size, dtype, tickets, losses):
    """All forward passes of a batch, a ticket each; the losses go to the other group. Returns results, seconds."""
    results, seconds = [], 0.0
    try:
        with autocast(dtype):
            for x, labels in micro_batches:
                tickets.acquire()
                started = time.perf_counter()
                logits, loss = forward_pass(model, x, labels, batch_size)
                seconds += time.perf_counter() - started
                results.append((logits.detach(), loss.detach()))
                losses.put(loss)
    except BaseException as error:
        losses.put(error)
        raise
    return results, seconds


def backward_lane(optimizer, count, tickets, losses):
    """Backward pass of `count` losses as they come, then one update. Returns the seconds of both."""
    seconds = 0.0
    try:
        for _ in range(count):
            loss = losses.get()
            if isinstance(loss, BaseException):  # no forward pass, no update
                raise loss
            started = time.perf_counter()
            loss.backward()  # on a CPU autograd computes in the thread that calls it
            seconds += time.perf_counter() - started
            tickets.release()
    finally:
        tickets.release(count)  # after an error the forward lane does not wait for ever
    started = time.perf_counter()
    optimizer.step()
    return seconds, time.perf_counter() - started


def both_phases(model, micro_batches, batch_size, dtype):
    """Plain gradient accumulation: forward and backward of each micro-batch in turn, on the calling group."""
    results, forward, backward = [], 0.0, 0.0
    with autocast(dtype):
        for x, labels in micro_batches:
            started = time.perf_counter()
            logits, loss = forward_pass(model, x, labels, batch_size)
            middle = time.perf_counter()
            with torch.autocast("cpu", enabled=False):
                loss.backward()
            results.append((logits.detach(), loss.detach()))
            forward, backward = forward + middle - started, backward + time.perf_counter() - middle
    return results, forward, backward


def cut(x, labels, count):
    """[(images, labels)] of up to `count` micro-batches of the batch, none empty; sizes differ by one at most."""
    count = min(count, len(labels))
    return list(zip(x.tensor_split(count), labels.tensor_split(count), strict=True))


def join(jobs):
    """The jobs' results when all have ended, or the first error."""
    wait(jobs)
    return [job.result() for job in jobs]


class Trainer:
    """A model, its optimizer and the dtype, and a step in each mode on the groups of a Placement."""

    def __init__(self, placement, model, optimizer, dtype, micro_batches):
        self.groups, self.model, self.optimizer = placement.groups, model, optimizer
        self.dtype, self.micro_batches, self._replica = dtype, micro_batches, None

    def step(self, mode, x, labels):
        """One update with the mean gradient over the batch x (N, 3, H, W), labels (N,)."""
        self.optimizer.zero_grad()
        micro_batches = cut(x, labels, self.micro_batches)
        if mode in ("split", "pipelined"):
            results, *seconds = self._two_lanes(
                micro_batches, len(labels), ahead=mode == "pipelined"
            )
        elif mode == "replicas":
            results, *seconds = self._replicas(
                cut(x, labels, max(self.micro_batches, 2)), len(labels)
            )
        else:
            results, *seconds = self._one_group("all", micro_batches, len(labels))
        logits, losses = zip(*results, strict=True)
        return Step(sum(loss.item() for loss in losses) * len(labels), torch.cat(logits), *seconds)

    def forward_alone(self, x, labels):
        """The forward passes of a step on their group, to measure them while the other group does nothing."""
        discard = SimpleNamespace(put=lambda loss: None)
        tickets = threading.Semaphore(self.micro_batches)
        _, forward = (
            self.groups["forward"]
            .submit(
                forward_lane,
                self.model,
                cut(x, labels, self.micro_batches),
                len(labels),
                self.dtype,
                tickets,
                discard,
            )
            .result()
        )
        return Step(math.nan, None, forward, 0.0, 0.0)

    def backward_alone(self, x, labels):
        """A whole step on the backward pass's group, for the same purpose: a backward pass needs a forward pass."""
        self.optimizer.zero_grad()
        _, _, backward, update = self._one_group(
            "backward", cut(x, labels, self.micro_batches), len(labels)
        )
        return Step(math.nan, None, 0.0, backward, update)

    def _one_group(self, name, micro_batches, batch_size):
        """Both phases and the update on one group."""
        group = self.groups[name]
        results, forward, backward = group.submit(
            both_phases, self.model, micro_batches, batch_size, self.dtype
        ).result()
        return results, forward, backward, group.submit(self._update).result()

    def _two_lanes(self, micro_batches, batch_size, ahead):
        """Forward and backward on their groups; the forward pass is at most `ahead` micro-batches ahead."""
        tickets, losses = threading.Semaphore(1 + ahead), queue.SimpleQueue()
        (results, forward), (backward, update) = join(
            [
                self.groups["forward"].submit(
                    forward_lane, self.model, micro_batches, batch_size, self.dtype, tickets, losses
                ),
                self.groups["backward"].submit(
                    backward_lane, self.optimizer, len(micro_batches), tickets, losses
                ),
            ]
        )
        return results, forward, backward, update

    def _replicas(self, micro_batches, batch_size):
        """Half of the micro-batches on each group, the gradients added, one update on all cores.

        The second replica has the same parameters and gradients of its own. Its running statistics are not used, as in
        DistributedDataParallel, which keeps those of rank 0.
        """
        if self._replica is None:
            self._replica = copy.deepcopy(self.model)
            for p, q in zip(self.model.parameters(), self._replica.parameters(), strict=True):
                q.data = p.data
        self._replica.zero_grad()
        half = math.ceil(len(micro_batches) / 2)
        (first, *seconds), (second, *others) = join(
            [
                self.groups["forward"].submit(
                    both_phases, self.model, micro_batches[:half], batch_size, self.dtype
                ),
                self.groups["backward"].submit(
                    both_phases, self._replica, micro_batches[half:], batch_size, self.dtype
                ),
            ]
        )
        forward, backward = ((a + b) / 2 for a, b in zip(seconds, others, strict=True))
        return (
            first + second,
            forward,
            backward,
            self.groups["all"].submit(self._update, self._replica).result(),
        )

    def _update(self, replica=None):
        started = time.perf_counter()
        if replica is not None:
            grads = [
                (p.grad, q.grad)
                for p, q in zip(self.model.parameters(), replica.parameters(), strict=True)
            ]
            if grads[0][1] is not None:  # a batch of one image leaves it without any
                torch._foreach_add_(*map(list, zip(*grads, strict=True)))
        self.optimizer.step()
        return time.perf_counter() - started


# ----------------------------------------------------------------------------------------------------------------------
# Model and data
# ----------------------------------------------------------------------------------------------------------------------


def make_model(image_size=32):
    """torchvision's ResNet-50: images (N, 3, S, S) → logits (N, 10). 32-pixel images get the CIFAR stem."""
    return make_torch_resnet("resnet50", cifar_stem=image_size == 32)


def load_batch(images, labels, index, args):
    """The images at `index`, normalised and resized: (N, 3, S, S) in args.memory_format; and their labels (N,)."""
    scale = 1 / (255 * torch.tensor(STD))
    x = torch.addcmul(
        -torch.tensor(MEAN) / torch.tensor(STD), torch.from_numpy(images[index]).float(), scale
    )
    x = x.permute(0, 3, 1, 2)  # channels_last
    if args.image_size != 32:
        x = F.interpolate(x, size=args.image_size, mode="bilinear")
    return x.contiguous(memory_format=MEMORY_FORMATS[args.memory_format]), torch.from_numpy(
        labels[index]
    ).long()


MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def count_correct(logits, labels):
    hits = logits.topk(5).indices == labels[:, None]
    return hits[:, 0].sum().item(), hits.sum().item()


@torch.inference_mode()
def evaluate(model, images, labels, args, batch_size=100):
    """Mean loss, top-1 and top-5 accuracy, and seconds spent loading batches."""
    model.eval()
    loss, top1, top5, loading = 0.0, 0, 0, 0.0
    for start in range(0, len(labels), batch_size):
        clock = time.perf_counter()
        x, y = load_batch(
            images, labels, np.arange(start, min(start + batch_size, len(labels))), args
        )
        loading += time.perf_counter() - clock
        with autocast(DTYPES[args.dtype]):
            logits = model(x).float()
        correct = count_correct(logits, y)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        top1, top5 = top1 + correct[0], top5 + correct[1]
    model.train()
    return loss / len(labels), top1 / len(labels), top5 / len(labels), loading


def make_trainer(placement, args, **changes):
    """A Trainer with a new model from args.seed; changes: of args."""
    args = argparse.Namespace(**{**vars(args), **changes})
    torch.manual_seed(args.seed)
    model = make_model(args.image_size).to(memory_format=MEMORY_FORMATS[args.memory_format])
    return Trainer(
        placement, model, make_torch_optimizer(model, args), DTYPES[args.dtype], args.micro_batches
    )


def find_split(args, data):
    """The Split of args; with --split auto the one on which the measured phases take most nearly the same time."""
    split = choose_split(args)
    if args.split != "auto" or len(split.forward + split.backward) < 3:
        return split
    batch = load_batch(
        data.x_train, data.y_train, np.arange(args.batch_size) % len(data.y_train), args
    )
    for _ in range(3):
        with Placement(split) as placement:
            trainer = make_trainer(placement, args)
            steps = [trainer.step("split", *batch) for _ in range(3)][1:]
        forward, backward = (
            min(getattr(step, phase) for step in steps) for phase in ("forward", "backward")
        )
        print(
            f"--split auto: {split}: forward {forward:.3f} s, backward {backward:.3f} s", flush=True
        )
        before, split = split, balance(split, forward, backward)
        if split == before:
            break
    return split


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def train_epochs(trainer, data, args, run, placement, monitor):
    """Train for args.epochs epochs on data; everything measured goes to run. Returns the Usage of the training."""
    n, size, total = len(data.y_train), args.batch_size, Usage(placement.split, 0.0, Counter())
    for epoch in range(run.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        run.start_epoch(epoch, math.ceil(n / size))
        monitor.take()
        for batch in range(run.batch, math.ceil(n / size)):
            started = time.perf_counter()
            x, labels = load_batch(
                data.x_train, data.y_train, order[batch * size : (batch + 1) * size], args
            )
            loading = time.perf_counter() - started
            step = trainer.step(args.mode, x, labels)
            correct = count_correct(step.logits, labels)
            run.end_batch(
                len(labels),
                step.loss,
                *correct,
                loading,
                forward=step.forward,
                backward=step.backward,
            )
        run.end_training()
        total += monitor.take()
        placement.check()
        run.totals["cpu_time_inside"] = total.shares()
        groups = {"forward": placement.split.forward, "backward": placement.split.backward}
        run.totals["idle"] = {group: total.idle(cores) for group, cores in groups.items() if cores}
        run.end_epoch(
            *placement.groups["all"]
            .submit(evaluate, trainer.model, data.x_test, data.y_test, args)
            .result()
        )
        if not args.quiet:
            print(
                f"epoch {epoch}/{args.epochs}  CPU time inside the assigned cores: {total}",
                flush=True,
            )
    return total


def run_training(args, data):
    """Train as the parsed command line says; returns {"train_loss": [one per epoch], "test_acc": …}."""
    split = find_split(args, data)
    phases = {"forward": split.forward, "backward": split.backward}
    if args.mode in ("all", "replicas"):
        phases = dict.fromkeys(phases, split.forward + split.backward)
    if not args.quiet:
        print(
            f"mode {args.mode}, cores: {split}; {args.dtype}, {args.memory_format}, "
            f"{args.micro_batches} micro-batches of {args.batch_size / args.micro_batches:g} images",
            flush=True,
        )
    with Placement(split) as placement, CoreMonitor(placement) as monitor:
        trainer = make_trainer(placement, args)
        x, labels = load_batch(
            data.x_train, data.y_train, np.arange(min(args.batch_size, len(data.y_train))), args
        )
        make_trainer(placement, args).step(
            args.mode, x, labels
        )  # libraries build their kernels for these shapes
        state = trainer.model, trainer.optimizer
        info = {
            "threads": len(split.forward + split.backward),
            "cores_of_phases": phases,
            "reserved": split.reserved,
        }
        with Run(
            args,
            "train_resnet50_split_cores",
            data,
            lambda: get_torch_arrays(*state),
            lambda arrays: set_torch_arrays(*state, arrays),
            info,
        ) as run:
            usage = train_epochs(trainer, data, args, run, placement, monitor)
            run.finish()
    print(f"cores: {split}; CPU time inside the assigned cores: {usage}", flush=True)
    if min(usage.shares().values(), default=1.0) < INSIDE:
        print(
            f"warning: less than {INSIDE:.0%} of the CPU time was inside the assigned cores",
            file=sys.stderr,
        )
    return run.history


def train(num_epochs=1, batch_size=64, learning_rate=0.01, **options):
    """Train from Python: train(num_epochs=2, subset=500, mode="split") → {"train_loss": [per epoch], "test_acc": …}.

    options: those of the command line, with underscores. Raises InputError for what cannot be used.
    """
    argv = [
        "--epochs",
        str(num_epochs),
        "--batch-size",
        str(batch_size),
        "--learning-rate",
        str(learning_rate),
    ]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        argv += (
            [option] if value is True else [] if value in (None, False) else [option, str(value)]
        )
    args = parse_args(argv)
    return run_training(args, load_cifar10(args.data_dir, args.dataset, args.subset, args.seed))


# ----------------------------------------------------------------------------------------------------------------------
# Benchmark
# ----------------------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One step of one contestant, in seconds and shares."""

    seconds: float
    forward: float
    backward: float
    update: float
    forward_idle: float
    backward_idle: float


ONE_PIECE, USUAL = "all, 1 micro-batch", "all, 1 micro-batch, float32 NCHW"
FORWARD_ALONE, BACKWARD_ALONE = "forward alone on its group", "backward alone on its group"


def contestants(placement, args):
    """{name: function of (x, labels) that does one step}; the learning rate is 0, so that all have the same weights."""
    trainer = make_trainer(placement, args, lr=0.0, weight_decay=0.0)
    whole = copy.copy(trainer)
    whole.micro_batches = 1
    usual = make_trainer(
        placement,
        args,
        lr=0.0,
        weight_decay=0.0,
        dtype="float32",
        memory_format="contiguous",
        micro_batches=1,
    )

    steps = {mode: functools.partial(trainer.step, mode) for mode in MODES}
    steps[ONE_PIECE] = functools.partial(whole.step, "all")
    steps[USUAL] = lambda x, labels: usual.step("all", x.contiguous(), labels)
    steps[FORWARD_ALONE], steps[BACKWARD_ALONE] = trainer.forward_alone, trainer.backward_alone
    return steps


def measure(args, split, data):
    """{name: [Turn of each round]} of all contestants on the same batches, taking turns, after a warm-up."""
    turns = {}
    with Placement(split) as placement, CoreMonitor(placement) as monitor:
        steps = contestants(placement, args)
        for turn in range(args.rounds + 1):
            index = (np.arange(args.batch_size) + turn * args.batch_size) % len(data.y_train)
            x, labels = load_batch(data.x_train, data.y_train, index, args)
            losses = {}
            for name, step in steps.items():
                monitor.take()
                started = time.perf_counter()
                done = step(x, labels)
                seconds, usage = time.perf_counter() - started, monitor.take()
                losses[name] = done.loss
                idle = usage.idle(split.forward), usage.idle(split.backward)
                if turn:
                    turns.setdefault(name, []).append(
                        Turn(seconds, done.forward, done.backward, done.update, *idle)
                    )
                if sys.stderr.isatty():
                    print(
                        f"\r\033[Kround {turn}/{args.rounds}: {name} ",
                        end="",
                        file=sys.stderr,
                        flush=True,
                    )
            check_same_loss({mode: losses[mode] for mode in MODES})
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return turns


def check_same_loss(losses):
    """Raise TrainingError unless the modes compute the same, but for rounding, before anybody compares their speed."""
    low, high = min(losses.values()), max(losses.values())
    if not (all(map(math.isfinite, losses.values())) and high - low <= 0.02 * high):
        raise TrainingError(
            "the modes' losses differ: " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items())
        )


def median(turns, name):
    return Turn(*(statistics.median(values) for values in zip(*turns[name], strict=True)))


def bound_seconds(forward, backward, update, micro_batches):
    """The shortest step of a pipeline in seconds, from its phases' times over a whole batch.

    The longer phase's M micro-batches follow each other without a gap; before the first or after the last of them,
    one micro-batch of the shorter phase finds nothing to overlap with: M max(f, b) + min(f, b), with f = forward / M.
    """
    return max(forward, backward) + min(forward, backward) / micro_batches + update


def report(turns, args):
    """The table of the benchmark and what it means, as text."""
    rows = []
    for name in (*MODES, ONE_PIECE, USUAL):
        middle, rates = (
            median(turns, name),
            [args.batch_size / turn.seconds for turn in turns[name]],
        )
        ratios = [b.seconds / a.seconds for a, b in zip(turns[name], turns["all"], strict=True)]
        rows.append(
            [
                name,
                f"{statistics.median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})",
                f"{middle.forward:.3f}",
                f"{middle.backward:.3f}",
                f"{middle.forward_idle:.0%}",
                f"{middle.backward_idle:.0%}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            ]
        )
    rows.append([FORWARD_ALONE, "", f"{median(turns, FORWARD_ALONE).forward:.3f}", "", "", "", ""])
    rows.append(
        [BACKWARD_ALONE, "", "", f"{median(turns, BACKWARD_ALONE).backward:.3f}", "", "", ""]
    )
    header = (
        "mode",
        "images/s",
        "forward s",
        "backward s",
        "idle: fwd cores",
        "bwd cores",
        "against all",
    )
    return table(header, rows) + "\n\n" + "\n".join(findings(turns, args.micro_batches))


def speed(turns, name, other):
    """How many times as fast as the other: the median over the rounds."""
    return statistics.median(
        b.seconds / a.seconds for a, b in zip(turns[name], turns[other], strict=True)
    )


def findings(turns, micro_batches):
    """Sentences that follow from the figures."""
    lines = [*findings_split(turns), *findings_pipelined(turns, micro_batches)]
    replicas = speed(turns, "replicas", "pipelined")
    lines.append(
        f"replicas, the same groups with half of the batch each, are {replicas:.2f} × as fast as pipelined."
    )
    lines.append(
        f"Cutting the batch makes all {speed(turns, 'all', ONE_PIECE):.2f} × as fast; uncut it is "
        f"{speed(turns, ONE_PIECE, USUAL):.2f} × as fast as the usual step, in float32 and NCHW."
    )
    return lines


def findings_split(turns):
    split, against_all = median(turns, "split"), speed(turns, "split", "all")
    idle = f"forward's cores are idle {split.forward_idle:.0%} of the time, backward's {split.backward_idle:.0%}"
    alone = statistics.median(
        s.seconds / (f.forward + b.backward + b.update)
        for s, f, b in zip(turns["split"], turns[FORWARD_ALONE], turns[BACKWARD_ALONE], strict=True)
    )
    passing = statistics.median(
        1 - (t.forward + t.backward + t.update) / t.seconds for t in turns["split"]
    )
    yield (
        f"split takes {alone:.2f} × the time of its phases, each alone on its group; going over from one group to "
        f"the other takes {passing:.2%} of its step."
    )
    if against_all > 0.95:
        yield f"It is {against_all:.2f} × as fast as all, although its phases wait for each other: {idle}."
    elif alone <= 1.05:
        yield f"It is {against_all:.2f} × as fast as all because its phases wait for each other: {idle}."
    else:
        yield (
            f"It is {against_all:.2f} × as fast as all: its phases wait for each other ({idle}) and are slower than "
            "alone."
        )


def findings_pipelined(turns, micro_batches):
    forward, (backward, update) = (
        median(turns, FORWARD_ALONE).forward,
        median(turns, BACKWARD_ALONE)[2:4],
    )
    pipelined, against_all = median(turns, "pipelined"), speed(turns, "pipelined", "all")
    gain = speed(turns, "pipelined", "split")
    why = (
        "the phases of different micro-batches overlap"
        if gain > 1.05
        else "the overlap gains nothing here"
    )
    yield f"pipelined is {gain:.2f} × as fast as split: {why}."
    bound = bound_seconds(forward, backward, update, micro_batches)
    slower = (pipelined.forward + pipelined.backward) / (forward + backward)
    yield (
        f"With {micro_batches} micro-batches its bound, from the phases measured alone, is {bound:.3f} s a step; it "
        f"takes {pipelined.seconds:.3f} s and so reaches {bound / pipelined.seconds:.0%} of the bound. At work "
        f"together the phases take {slower:.2f} × as long as alone."
    )
    if against_all >= 1:
        yield f"pipelined is {against_all:.2f} × as fast as all."
    else:
        longer, shorter = ("backward", "forward") if backward > forward else ("forward", "backward")
        ratio, idle = (
            max(forward, backward) / min(forward, backward),
            getattr(pipelined, f"{shorter}_idle"),
        )
        yield (
            f"pipelined is {against_all:.2f} × as fast as all: {longer} takes {ratio:.1f} × as long as {shorter} "
            f"on these groups, so {shorter}'s cores are idle {idle:.0%} of the time."
        )


def run_benchmark(args, data):
    split = find_split(args, data)
    print(
        f"\nBenchmark: {cpu_model()}, cores: {split}; PyTorch {torch.__version__}; ResNet-50, {data.name}, "
        f"{args.image_size} pixels, batch {args.batch_size} in {args.micro_batches} micro-batches, {args.dtype}, "
        f"{args.memory_format}; medians (min–max) of {args.rounds} rounds",
        flush=True,
    )
    turns = measure(args, split, data)
    print(report(turns, args), flush=True)
    shown = ("micro_batches", "batch_size", "dtype", "memory_format", "image_size", "rounds")
    content = {
        "environment": environment(),
        "dataset": data.name,
        "cores": str(split),
        "arguments": {name: getattr(args, name) for name in shown},
        "turns": {name: [turn._asdict() for turn in taken] for name, taken in turns.items()},
        "findings": findings(turns, args.micro_batches),
    }
    with atomic_write(args.output, "w") as file:
        json.dump(content, file, indent=1)
    print(f"written: {args.output}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def has_bfloat16():
    """Whether the processor computes in bfloat16."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else ()
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def parse_args(argv=None):
    parser = make_parser(
        "train_resnet50_split_cores", __doc__, ("resnet50",), batch_size=64, epochs=None
    )
    add = parser.add_argument
    add(
        "--learning-rate",
        dest="lr",
        type=number(float, 0, math.inf, exclusive=True),
        metavar="LR",
        help="like --lr",
    )
    add("--mode", choices=MODES, default="pipelined", help="see above (default: %(default)s)")
    add(
        "--micro-batches",
        type=number(int, 1, 10**6),
        default=4,
        metavar="M",
        help="pieces of a batch, in every mode (default: %(default)s)",
    )
    add(
        "--split",
        type=parse_split,
        metavar="F:B",
        help="proportion of forward's cores to backward's, or auto: measure both phases (default: 1:1)",
    )
    add(
        "--forward-cores",
        type=parse_cores,
        metavar="LIST",
        help="such as 0-2,5; with --backward-cores",
    )
    add(
        "--backward-cores",
        type=parse_cores,
        metavar="LIST",
        help="such as 3-4; with --forward-cores",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="bfloat16" if has_bfloat16() else "float32",
        help="of autocast; parameters stay float32 (default here: %(default)s)",
    )
    add(
        "--memory-format",
        choices=MEMORY_FORMATS,
        default="channels_last",
        help="default: %(default)s",
    )
    add(
        "--image-size",
        type=int,
        default=32,
        metavar="S",
        help="32, 64, … 224: images are scaled (default: 32)",
    )
    add("--benchmark", action="store_true", help="compare all modes instead of training")
    add(
        "--rounds",
        type=number(int, 3, 1000),
        help="of the benchmark (default: 7; in the default run 3)",
    )
    add(
        "--output",
        metavar="FILE",
        default="results/split_cores_benchmark.json",
        help="the benchmark's figures (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    check_args(args)
    args.default_run = not args.benchmark and args.epochs is None and args.subset is None
    if args.default_run:
        args.epochs, args.subset = DEFAULT_RUN["epochs"], DEFAULT_RUN["subset"]
    args.rounds = args.rounds or (DEFAULT_RUN["rounds"] if args.default_run else 7)
    args.epochs = args.epochs or 10
    return args


def check_args(args):
    """Raise InputError for options that do not go together; the cores are checked by choose_split()."""
    if (args.forward_cores is None) != (args.backward_cores is None):
        raise InputError("--forward-cores and --backward-cores go together: give both")
    if args.forward_cores and args.split:
        raise InputError(
            "--split does not go with --forward-cores and --backward-cores: give one or the other"
        )
    if args.batch_size % args.micro_batches:
        fits = [m for m in range(1, args.batch_size + 1) if args.batch_size % m == 0]
        raise InputError(
            f"--micro-batches {args.micro_batches} does not divide --batch-size {args.batch_size}: "
            f"give one of {', '.join(map(str, fits))}"
        )
    if args.image_size % 32 or not 32 <= args.image_size <= 224:
        raise InputError(
            f"--image-size {args.image_size}: the network halves an image five times: give a multiple of "
            "32 from 32 to 224"
        )
    if args.resume and args.benchmark:
        raise InputError("--resume does not go with --benchmark: leave one out")
    choose_split(args)


def main(argv=None):
    keep_freed_memory()
    args = parse_args(argv)
    benchmark = args.benchmark or (args.default_run and len(available_cores()) > 1 and can_pin())
    check_outputs([args.output] if benchmark else [])
    data = load_cifar10(args.data_dir, args.dataset, args.subset, args.seed)
    if args.default_run and not args.quiet:
        print(
            f"A small run first: {args.subset} images, {args.epochs} epoch. The full one: "
            "python train_resnet50_split_cores.py --epochs 10 --subset 50000",
            flush=True,
        )
    if not args.benchmark:
        run_training(args, data)
    if benchmark:
        run_benchmark(args, data)


if __name__ == "__main__":
    run_main(main)
