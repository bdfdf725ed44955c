"""Train ResNet-50 on a CPU with the forward and the backward pass on separate cores.

The cores of this process are divided into two groups. A group is one Python thread with an OpenMP
pool of its own, pinned to the cores of the group. Threads never move: work goes from one group to
the other when the forward pass puts a loss into a queue and the backward pass takes it out.

Every mode computes the same gradient, that of plain gradient accumulation over --micro-batches,
and updates the weights once per batch:

    all        all cores compute both phases; of more than four, two are left to the system
    split      one group computes the forward pass, then the other the backward pass and the update
    pipelined  as split, but the forward pass of a micro-batch overlaps the backward pass before it
    replicas   data parallelism as a control: each group computes both phases on half of the batch

Without options the script trains on a small subset in batches of 16, then compares all modes on the
same batches and says what the figures mean.

    python train_resnet50_split_cores.py
    python train_resnet50_split_cores.py --benchmark --rounds 9 --split auto
    python train_resnet50_split_cores.py --mode split --epochs 2 --subset 1000 --dtype float32
    python train_resnet50_split_cores.py --forward-cores 0 --backward-cores 1 --subset 500
    python train_resnet50_split_cores.py --epochs 2 --checkpoint results/split.pt --resume

Without a checkpoint the last command starts from the beginning.

Result: images/s on 2 cores, batch 64 in 4 micro-batches, float32: all 16.0; split 8.7, 0.55
(0.54–0.56) times all; pipelined 11.1, 0.69 (0.67–0.72) times all; replicas 16.8, 1.06 (1.00–1.09)
times all (AMD EPYC; median (min–max) of 7 rounds).
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
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
    RunLog,
    StopSignal,
    TorchCheckpoint,
    TrainingError,
    atomic_write,
    available_cores,
    check_outputs,
    cpu_model,
    environment,
    epoch_order,
    format_table,
    has_bfloat16,
    keep_freed_memory,
    load_dataset,
    make_parser,
    make_torch_optimizer,
    make_torch_resnet,
    number,
    require_finite,
    run_main,
    save_and_stop,
)

MODES = ("all", "split", "pipelined", "replicas")
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# A run warns if a group spends less than this share of its CPU time on its own cores.
MIN_SHARE_INSIDE = 0.99

# The run without options: with the benchmark it takes one to two minutes on two cores, and less
# than 2 GiB. In float32 the activations of 16 images take 390 MiB without micro-batches.
DEFAULT_RUN = {"subset": 128, "batch_size": 16, "epochs": 1, "rounds": 3}


# --------------------------------------------------------------------------------------------------
# Lesson 1: two groups of cores
# --------------------------------------------------------------------------------------------------

# The cores to divide are those of the affinity mask of this process, not those of the machine:
# taskset, a container or a batch system may have given it a few only.


class CoreSplit(NamedTuple):
    """The core numbers of the two groups, and those that are left to the system."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    reserved: tuple[int, ...] = ()

    def groups(self) -> dict[str, tuple[int, ...]]:
        """{name of a group: its cores}; the group "all" has the cores of both phases."""
        return {
            "forward": self.forward,
            "backward": self.backward,
            "all": self.forward + self.backward,
        }

    def __str__(self):
        named = self._asdict().items()
        return ", ".join(f"{name} {format_cores(cores)}" for name, cores in named if cores)


def split_cores(cores, proportion=(1, 1)) -> CoreSplit:
    """Divide the sorted core numbers in the `proportion` forward : backward.

    Each group gets at least one core. Where the proportion falls between two divisions, the core
    goes to forward. Of more than four cores, two are reserved. Raises InputError for one core.
    """
    cores = tuple(cores)
    if len(cores) < 2:
        variables = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "OMP_PLACES")
        binding = [name for name in variables if name in os.environ]
        remedy = "start it with more (taskset, cgroup)"
        if binding:  # OpenMP has bound the main thread to one core when torch was imported
            remedy = f"unset {' and '.join(binding)}"
        raise InputError(
            "forward and backward on separate cores need two cores, this process may use one: "
            f"use --mode all, or {remedy}"
        )

    # The main thread, the monitors and other programs need cores too. Beside a group they would
    # hold up all of it, since each operation ends when its last thread has ended.
    usable = cores
    if len(cores) > 4:
        usable = cores[:-2]

    # Neighbouring numbers stay together: they often share a cache or a memory bank.
    forward = math.floor(len(usable) * proportion[0] / sum(proportion) + 0.5)
    forward = min(max(forward, 1), len(usable) - 1)
    return CoreSplit(usable[:forward], usable[forward:], cores[len(usable) :])


def balance(split, forward_seconds, backward_seconds) -> CoreSplit:
    """Divide the cores of `split` anew so that the longer phase becomes as short as possible.

    forward_seconds, backward_seconds: measured on the groups of `split`. The model behind it: a
    phase takes time in proportion to 1 / cores.
    """
    usable = split.forward + split.backward
    forward_work = forward_seconds * len(split.forward)  # in core-seconds
    backward_work = backward_seconds * len(split.backward)

    def longer_phase(forward):
        return max(forward_work / forward, backward_work / (len(usable) - forward))

    # There are few divisions: try all of them.
    forward = min(range(1, len(usable)), key=longer_phase)
    return CoreSplit(usable[:forward], usable[forward:], split.reserved)


def format_cores(cores) -> str:
    """(0, 1, 2, 5) → "0-2,5"."""
    runs = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


# --------------------------------------------------------------------------------------------------
# Lesson 2: threads that stay on their cores
# --------------------------------------------------------------------------------------------------

# PyTorch divides an operation among the threads of an OpenMP pool. Where these threads run is up to
# the kernel, unless each is pinned; and which of them a Python thread uses is up to OpenMP: each
# Python thread that computes gets a pool of its own. So one Python thread per group, its pool
# pinned once, is all it takes to bind a phase to cores.


def can_pin() -> bool:
    """Whether this system lets a process choose the cores of its threads (Linux does)."""
    return hasattr(os, "sched_setaffinity") and Path("/proc/self/task").is_dir()


def thread_ids() -> set[int]:
    """The system's ids of all threads of this process, those of libraries too."""
    if not can_pin():
        return set()
    return {int(name) for name in os.listdir("/proc/self/task")}


def python_thread_ids() -> set[int]:
    """The ids of the threads that Python has started, and of the main thread."""
    return {thread.native_id for thread in threading.enumerate()}


def affinities() -> dict[int, set[int]]:
    """{thread: the cores that it may run on} of all threads."""
    cores = {}
    for thread in thread_ids():
        with contextlib.suppress(ProcessLookupError):  # the thread has ended meanwhile
            cores[thread] = os.sched_getaffinity(thread)
    return cores


def pin(threads, cores):
    """Let the threads run on these cores only, and check that they do.

    Each thread has its own affinity. os.sched_setaffinity(0, …) moves the calling thread and
    psutil's cpu_affinity() the main thread. Threads that are started later inherit the affinity;
    those that exist already, such as an OpenMP pool, stay where they are: pin each by its id.
    """
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):  # the thread has ended meanwhile
            os.sched_setaffinity(thread, cores)
    check_affinity(threads, cores)


def check_affinity(threads, cores):
    """Raise TrainingError if one of the threads may run on other cores than these."""
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            found = os.sched_getaffinity(thread)
            if found != set(cores):
                raise TrainingError(
                    f"a thread is on cores {format_cores(sorted(found))}, not "
                    f"{format_cores(cores)}: let no other program move the threads of this one"
                )


def start_openmp_pool(size) -> set[int]:
    """Start the OpenMP pool of the calling thread: `size` threads, this one included.

    Returns their ids. Each Python thread that computes has an OpenMP pool of its own.
    """
    running = thread_ids()  # before the pool exists

    # The first call of a thread into OpenMP takes over the thread count that any other thread has
    # set last. Make that call now, so that it cannot come later and undo the count of this thread.
    torch.get_num_threads()
    torch.set_num_threads(size)

    # OpenMP starts its threads at the first operation that is large enough to be divided.
    torch.zeros(size * 65_536).add_(1)

    # The threads of the pool have no names. They are those that are new and not Python's.
    pool = thread_ids() - running - python_thread_ids()
    return pool | {threading.get_native_id()}


class CoreGroup:
    """A Python thread with an OpenMP pool of its own, one thread for each of `cores`."""

    def __init__(self, name, cores):
        self.name = name
        self.cores = tuple(cores)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

        # Pin the Python thread first: the pool inherits its cores. Then pin the whole pool, since
        # OpenMP places its threads itself if the environment has OMP_PROC_BIND.
        if can_pin():
            pin([self.submit(threading.get_native_id).result()], self.cores)
        self.threads = self.submit(start_openmp_pool, len(self.cores)).result()
        if can_pin():
            pin(self.threads, self.cores)

    def submit(self, function, *args) -> Future:
        """Call function(*args) in the thread of this group, after what was submitted before."""
        return self._executor.submit(function, *args)

    def check(self):
        """Raise TrainingError unless each core of the group has one thread, pinned to the group."""
        if not can_pin():
            return
        check_affinity(self.threads, self.cores)

        # With fewer threads a core would be idle and the figures would say nothing.
        alive = len(self.threads & thread_ids())
        if alive != len(self.cores):
            raise TrainingError(
                f"{alive} OpenMP threads for the {len(self.cores)} cores of group {self.name}: "
                "unset OMP_THREAD_LIMIT and OMP_DYNAMIC"
            )

    def close(self):
        """End the thread when its work is done, also if Ctrl-C is pressed meanwhile."""
        # Python aborts if a thread is still inside PyTorch when the interpreter ends, and
        # Thread.join() believes that a thread has ended when it is interrupted (Python 3.11). So
        # wait for a job that does nothing: it is done when all before it are.
        last = self.submit(lambda: None)
        while not last.done():
            with contextlib.suppress(KeyboardInterrupt):
                wait([last])
        self._executor.shutdown()


class Placement:
    """Context manager: pins all threads of the process; restores them when it is left.

    groups: "forward", "backward" and "all", which has the cores of both. All other threads (the
    main thread, the monitors) run on the reserved cores, or on any if none is reserved, and
    compute with one thread.
    """

    def __init__(self, split):
        self.split = split
        self.groups = {}

    def __enter__(self):
        self._affinities_before = affinities()
        self._num_threads_before = torch.get_num_threads()
        groups = self.split.groups()
        try:
            # First everything that exists already: the main thread, monitors, pools of libraries.
            pin(thread_ids(), self.split.reserved or groups["all"])
            torch.set_num_threads(1)

            # The groups pin their own threads. A group that has no cores has no thread.
            for name, cores in groups.items():
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

        # A thread that was started meanwhile has inherited its cores: it gets the main thread's.
        main_before = self._affinities_before.get(threading.main_thread().native_id)
        for thread in thread_ids():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, self._affinities_before.get(thread, main_before))
        torch.set_num_threads(self._num_threads_before)

    def check(self):
        """Raise TrainingError unless all threads of the groups are where they were pinned."""
        for group in self.groups.values():
            group.check()

    def group_of_threads(self) -> dict[int, str]:
        """{thread: name of its group}"""
        names = {}
        for name, group in self.groups.items():
            names.update(dict.fromkeys(group.threads, name))
        return names


# --------------------------------------------------------------------------------------------------
# Lesson 3: one training step in four modes
# --------------------------------------------------------------------------------------------------

# A batch of four micro-batches; time goes from left to right. F forward, B backward, U update,
# dots: the group waits. Backward takes twice as long as forward; on all cores (mode all) both take
# half as long as on one group. Where there are two lines, they are the two groups.
#
#     all        F1B1--F2B2--F3B3--F4B4--U
#
#     split      F1--........F2--........F3--........F4--.........
#                ....B1------....B2------....B3------....B4------U
#
#     pipelined  F1--F2--....F3--....F4--.............
#                ....B1------B2------B3------B4------U
#
#     replicas   F1--B1------F2--B2------U
#                F3--B3------F4--B4------U
#
# Cores in proportion to the phases, here --split 1:2, close most of the gaps of pipelined.


class Step(NamedTuple):
    """What a step has computed, and the seconds of its phases."""

    loss: float  # summed over the batch
    logits: torch.Tensor  # (N, 10)
    forward: float  # if both groups compute this phase: the mean of both
    backward: float
    update: float


class Trainer:
    """A model and its optimizer, and a training step in each mode on the groups of a Placement."""

    def __init__(self, placement, model, optimizer, dtype, micro_batches):
        self.groups = placement.groups
        self.model = model
        self.optimizer = optimizer
        self.dtype = dtype
        self.micro_batches = micro_batches
        self.replica = None  # made by the first step of mode "replicas"

    def step(self, mode, x, labels) -> Step:
        """One update with the mean gradient over the batch x (N, 3, S, S), labels (N,)."""
        steps = {
            "all": self.step_all,
            "split": self.step_split,
            "pipelined": self.step_pipelined,
            "replicas": self.step_replicas,
        }
        self.optimizer.zero_grad()  # the micro-batches add their gradients to what is there
        return steps[mode](x, labels)

    # all: every core works on every operation, as in any other PyTorch script.
    # The speed to beat: no core ever waits for another phase.
    # Cost: small operations gain little when they are divided among many cores.
    def step_all(self, x, labels):
        return self.step_on_one_group("all", x, labels)

    # split: the forward pass of a micro-batch on one group, then its backward pass on the other.
    # Slower than all: while one group computes, the other one waits.
    # Cost of moving the work between groups: next to nothing, since no thread moves.
    def step_split(self, x, labels):
        return self.step_on_two_groups(x, labels, in_flight=1)

    # pipelined: two micro-batches in flight instead of one, nothing else changes. Faster than
    # split: forward of micro-batch k + 1 overlaps backward of micro-batch k. Slower than all where
    # one phase takes longer than the other. Cost: the activations of two micro-batches in memory.
    def step_pipelined(self, x, labels):
        return self.step_on_two_groups(x, labels, in_flight=2)

    # replicas: both groups do the same with different images (data parallelism), as a control.
    # Faster than pipelined: no group waits, so it is unequal phases that cost time there, not the
    # division of the cores. Cost: a second set of gradients, summed before the update.
    def step_replicas(self, x, labels):
        if self.replica is None:
            self.replica = self.make_replica()
        self.replica.zero_grad()

        micro_batches = split_micro_batches(x, labels, self.micro_batches)
        half = math.ceil(len(micro_batches) / 2)
        first, second = gather(
            self.groups["forward"].submit(
                self.forward_and_backward, self.model, micro_batches[:half], len(labels)
            ),
            self.groups["backward"].submit(
                self.forward_and_backward, self.replica, micro_batches[half:], len(labels)
            ),
        )

        # Both groups have ended: now the update, which needs the gradients of both.
        outputs = first[0] + second[0]
        forward = (first[1] + second[1]) / 2
        backward = (first[2] + second[2]) / 2
        update = self.groups["all"].submit(self.update, self.replica).result()
        return make_step(outputs, len(labels), forward, backward, update)

    def step_on_one_group(self, name, x, labels) -> Step:
        """Both phases and the update on one group."""
        group = self.groups[name]
        micro_batches = split_micro_batches(x, labels, self.micro_batches)
        outputs, forward, backward = group.submit(
            self.forward_and_backward, self.model, micro_batches, len(labels)
        ).result()
        update = group.submit(self.update).result()
        return make_step(outputs, len(labels), forward, backward, update)

    def step_on_two_groups(self, x, labels, in_flight) -> Step:
        """Forward on its group, backward and update on the other.

        in_flight: how many micro-batches may be between the start of their forward pass and the
        end of their backward pass. 1: the phases take turns. 2: they overlap.
        """
        micro_batches = split_micro_batches(x, labels, self.micro_batches)

        # The semaphore counts how many forward passes may begin: each one takes a permit, and the
        # end of its backward pass gives it back. The queue is the way from group to group.
        semaphore = threading.Semaphore(in_flight)
        losses = queue.SimpleQueue()
        (outputs, forward), (backward, update) = gather(
            self.groups["forward"].submit(
                self.forward_worker, micro_batches, len(labels), semaphore, losses
            ),
            self.groups["backward"].submit(
                self.backward_worker, len(micro_batches), semaphore, losses
            ),
        )
        return make_step(outputs, len(labels), forward, backward, update)

    def forward_and_backward(self, model, micro_batches, batch_size):
        """Plain gradient accumulation in the calling thread.

        Returns [(logits, loss) of each micro-batch], seconds of forward, seconds of backward.
        """
        outputs = []
        forward_seconds = 0.0
        backward_seconds = 0.0
        with autocast(self.dtype):
            for x, labels in micro_batches:
                started = time.perf_counter()
                logits, loss = forward_pass(model, x, labels, batch_size)
                forward_done = time.perf_counter()

                # The backward pass takes its dtypes from what the forward pass has recorded.
                with torch.autocast("cpu", enabled=False):
                    loss.backward()

                forward_seconds += forward_done - started
                backward_seconds += time.perf_counter() - forward_done
                outputs.append((logits.detach(), loss.detach()))
        return outputs, forward_seconds, backward_seconds

    def forward_worker(self, micro_batches, batch_size, semaphore, losses):
        """The forward passes of a batch, each when the semaphore allows it; losses go to the queue.

        A loss holds the graph of its forward pass: the other group needs nothing else.
        Returns [(logits, loss) of each micro-batch], seconds of forward.
        """
        outputs = []
        seconds = 0.0
        try:
            with autocast(self.dtype):
                for x, labels in micro_batches:
                    semaphore.acquire()
                    started = time.perf_counter()
                    logits, loss = forward_pass(self.model, x, labels, batch_size)
                    seconds += time.perf_counter() - started

                    # Keep the values only: the graph is freed as soon as backward is done with it.
                    outputs.append((logits.detach(), loss.detach()))
                    losses.put(loss)
        except BaseException as error:
            losses.put(error)  # else the backward worker would wait for ever
            raise
        return outputs, seconds

    def backward_worker(self, count, semaphore, losses):
        """The backward passes of `count` losses from the queue, then the update.

        Returns the seconds of backward and of the update.
        """
        seconds = 0.0
        try:
            for _ in range(count):
                loss = losses.get()
                if isinstance(loss, BaseException):  # the forward pass has failed: no update
                    raise loss
                started = time.perf_counter()
                loss.backward()  # on a CPU autograd computes in the thread that calls it
                seconds += time.perf_counter() - started
                semaphore.release()
        finally:
            semaphore.release(count)  # after an error: else the forward worker would wait for ever
        return seconds, self.update()

    def make_replica(self):
        """A copy of the model with the same parameters in the same memory, and its own gradients.

        Its running statistics are not used, as in DistributedDataParallel, which keeps rank 0's.
        """
        # The shared memory makes the update of the model an update of the replica too.
        replica = copy.deepcopy(self.model)
        for ours, theirs in zip(self.model.parameters(), replica.parameters(), strict=True):
            theirs.data = ours.data
        return replica

    def update(self, replica=None) -> float:
        """Update the weights, with the replica's gradients too if there is one. Returns seconds."""
        started = time.perf_counter()
        if replica is not None:
            for ours, theirs in zip(self.model.parameters(), replica.parameters(), strict=True):
                if theirs.grad is not None:  # it is None after a batch of a single image
                    ours.grad.add_(theirs.grad)
        self.optimizer.step()
        return time.perf_counter() - started


def split_micro_batches(x, labels, count) -> list:
    """[(x, labels), …]: the batch in `count` micro-batches, or in fewer so that none is empty."""
    count = min(count, len(labels))
    return list(zip(x.tensor_split(count), labels.tensor_split(count), strict=True))


def autocast(dtype):
    """The context in which a model computes in `dtype` while its parameters stay float32.

    Autocast keeps the converted weights until the context ends. Enter it once per batch, so that
    all micro-batches share them.
    """
    if dtype is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype)


def forward_pass(model, x, labels, batch_size):
    """The logits (n, 10) of a micro-batch, and its part of the mean loss over the whole batch.

    With these losses the gradients of all micro-batches add up to the gradient of the batch.
    """
    logits = model(x).float()
    return logits, F.cross_entropy(logits, labels, reduction="sum") / batch_size


def gather(*jobs) -> list:
    """The results of jobs, when all of them have ended. Raises the first error."""
    wait(jobs)
    return [job.result() for job in jobs]


def make_step(outputs, batch_size, forward, backward, update) -> Step:
    """The Step of a batch from the (logits, loss) of its micro-batches and the seconds."""
    loss = sum(loss.item() for _, loss in outputs) * batch_size
    logits = torch.cat([logits for logits, _ in outputs])
    return Step(loss, logits, forward, backward, update)


# --------------------------------------------------------------------------------------------------
# Measurement: on which cores the threads really run
# --------------------------------------------------------------------------------------------------

# An affinity that was set and read back says where threads may run. This says where they did run:
# a thread of a library that nobody has pinned, or a pool that was started too early, shows up here.


class CoreUsage:
    """CPU seconds by (owner, core) within `seconds` of time.

    owner: the name of a group, "python" (main thread, monitors) or "unknown".
    """

    def __init__(self, split, seconds, by_core):
        self.split = split
        self.seconds = seconds
        self.by_core = by_core

    def __add__(self, other):
        by_core = self.by_core + other.by_core
        return CoreUsage(self.split, self.seconds + other.seconds, by_core)

    def share_inside(self, group) -> float:
        """The share of the group's CPU time that was spent on its own cores.

        A thread that was never placed may belong to any group: it counts as outside.
        """
        cores = self.split.groups()[group]
        inside = 0.0
        total = 0.0
        for (owner, core), seconds in self.by_core.items():
            if owner in (group, "unknown"):
                total += seconds
            if owner == group and core in cores:
                inside += seconds
        return inside / total if total else 1.0

    def shares_inside(self) -> dict[str, float]:
        """{group: share_inside(group)} of the groups that computed."""
        owners = {owner for owner, _ in self.by_core}
        return {group: self.share_inside(group) for group in self.split.groups() if group in owners}

    def idle_share(self, cores) -> float:
        """The share of the time in which these cores did not compute for any group."""
        busy = 0.0
        for (owner, core), seconds in self.by_core.items():
            if core in cores and owner != "python":
                busy += seconds
        return max(1 - busy / (self.seconds * len(cores)), 0.0)

    def idle_shares(self) -> dict[str, float]:
        """{group: idle_share(its cores)} of both phases' groups."""
        groups = {"forward": self.split.forward, "backward": self.split.backward}
        return {group: self.idle_share(cores) for group, cores in groups.items() if cores}

    def __str__(self):
        shares = self.shares_inside().items()
        return ", ".join(f"{group} {share:.1%}" for group, share in shares) or "nothing computed"


class CoreMonitor(threading.Thread):
    """Samples on which cores the threads of a Placement run. Use as a context manager.

    The time that a thread has computed since the last sample counts for the core on which it was
    seen last.
    """

    def __init__(self, placement, interval=0.05):
        super().__init__(daemon=True, name="core-monitor")
        self.placement = placement
        self.interval = interval
        self._stop_event = threading.Event()
        self._lock = threading.Lock()
        self._cpu_seconds = {}  # of each thread, at the last sample
        self._by_core = Counter()  # CPU seconds by (owner, core) since the last take()
        self._since = time.perf_counter()  # the time of the last take()

    def __enter__(self):
        self.take()
        self.start()
        return self

    def __exit__(self, *_):
        self._stop_event.set()
        self.join()

    def run(self):
        while not self._stop_event.wait(self.interval):
            self._sample()

    def take(self) -> CoreUsage:
        """The CoreUsage since the last take()."""
        self._sample()  # what was computed since the last sample belongs to this span too
        with self._lock:
            now = time.perf_counter()
            usage = CoreUsage(self.placement.split, now - self._since, self._by_core)
            self._by_core = Counter()
            self._since = now
        return usage

    def _sample(self):
        group_of_threads = self.placement.group_of_threads()
        python_threads = python_thread_ids()
        with self._lock:
            for thread in thread_ids():
                with contextlib.suppress(OSError):  # the thread has ended meanwhile
                    seconds = cpu_seconds(thread)
                    new = seconds - self._cpu_seconds.get(thread, 0.0)
                    self._cpu_seconds[thread] = seconds
                    if new > 0:
                        # Python's own threads hardly compute. Any other one may be a stray worker.
                        other = "python" if thread in python_threads else "unknown"
                        owner = group_of_threads.get(thread, other)
                        self._by_core[owner, last_core(thread)] += new


def stat_field(thread, number) -> int:
    """Field `number` of /proc/self/task/THREAD/stat, counted from 1 as in proc(5)."""
    text = Path(f"/proc/self/task/{thread}/stat").read_text()
    fields = text.rpartition(")")[2].split()  # field 2, the name, may hold spaces
    return int(fields[number - 3])


def cpu_seconds(thread) -> float:
    """The seconds that a thread has computed so far."""
    with contextlib.suppress(FileNotFoundError):
        nanoseconds = int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0])
        if nanoseconds:
            return nanoseconds / 1e9

    # A kernel without schedstat has no such file, or zeros in it. Ticks are coarser: 10 ms.
    ticks = stat_field(thread, 14) + stat_field(thread, 15)  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


def last_core(thread) -> int:
    """The core on which the thread has run last."""
    return stat_field(thread, 39)


# --------------------------------------------------------------------------------------------------
# Model and data
# --------------------------------------------------------------------------------------------------


def make_model(image_size=32, channels=3, classes=10):
    """torchvision's ResNet-50: (N, C, S, S) → logits (N, classes); the CIFAR stem for S = 32."""
    return make_torch_resnet("resnet50", image_size == 32, channels, classes)


def make_trainer(placement, args, data, **changes) -> Trainer:
    """A Trainer with a new model from --seed for the data's channels and classes.

    changes: options that differ from args.
    """
    args = argparse.Namespace(**{**vars(args), **changes})  # a copy
    torch.manual_seed(args.seed)
    model = make_model(args.image_size, data.image_shape[2], len(data.classes))
    model = model.to(memory_format=MEMORY_FORMATS[args.memory_format])
    optimizer = make_torch_optimizer(model, args)
    return Trainer(placement, model, optimizer, DTYPES[args.dtype], args.micro_batches)


def load_batch(images, labels, index, args, mean=MEAN, std=STD):
    """The images at `index`, normalised and resized, and their labels.

    images (n, H, W, C) uint8 → (N, C, S, S) float32 in --memory-format; labels (N,) int64.
    """
    # (pixel / 255 - mean) / std in one pass: shift + pixel · scale
    std = torch.tensor(std)
    shift = -torch.tensor(mean) / std
    scale = 1 / (255 * std)
    x = torch.addcmul(shift, torch.from_numpy(images[index]).float(), scale)

    x = x.permute(0, 3, 1, 2)  # (N, H, W, C) → (N, C, H, W); the memory stays NHWC
    if x.shape[2:] != (args.image_size, args.image_size):
        x = F.interpolate(x, size=args.image_size, mode="bilinear")
    x = x.contiguous(memory_format=MEMORY_FORMATS[args.memory_format])
    return x, torch.from_numpy(labels[index]).long()


def count_correct(logits, labels) -> tuple[int, int]:
    """How many labels are the best of the logits, and how many are among the best five."""
    best = min(5, logits.shape[1])  # there may be fewer classes
    hits = logits.topk(best).indices == labels[:, None]  # (N, 5)
    return hits[:, 0].sum().item(), hits.sum().item()


@torch.inference_mode()
def evaluate(model, data, args, confusion, batch_size=100):
    """Mean loss, top-1 and top-5 accuracy on the test images, and seconds spent loading batches.

    confusion: (K, K) zeros, in which each image is counted at [its label, predicted class].
    """
    images, labels = data.x_test, data.y_test
    model.eval()
    loss = 0.0
    top1 = 0
    top5 = 0
    loading = 0.0
    n = len(labels)
    for start in range(0, n, batch_size):
        started = time.perf_counter()
        index = np.arange(start, min(start + batch_size, n))
        x, y = load_batch(images, labels, index, args, data.mean, data.std)
        loading += time.perf_counter() - started

        with autocast(DTYPES[args.dtype]):
            logits = model(x).float()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct1, correct5 = count_correct(logits, y)
        top1 += correct1
        top5 += correct5
        np.add.at(confusion, (labels[index], logits.argmax(dim=1).numpy()), 1)
    model.train()
    return loss / n, top1 / n, top5 / n, loading


def find_split(args, data) -> CoreSplit:
    """The core groups that args ask for. With --split auto: measure both phases, then balance."""
    split = choose_split(args)
    if args.split != "auto" or len(split.groups()["all"]) < 3:
        return split

    # No phase scales perfectly with the cores, so the first answer is not yet the best one:
    # measure again on the new groups, until they stay.
    index = np.arange(args.batch_size) % len(data.y_train)
    x, labels = load_batch(data.x_train, data.y_train, index, args, data.mean, data.std)
    for _ in range(3):
        with Placement(split) as placement:
            trainer = make_trainer(placement, args, data)
            trainer.step("split", x, labels)  # warm-up
            steps = [trainer.step("split", x, labels) for _ in range(2)]
        forward = min(step.forward for step in steps)
        backward = min(step.backward for step in steps)
        print(
            f"--split auto: {split}: forward {forward:.3f} s, backward {backward:.3f} s", flush=True
        )

        balanced = balance(split, forward, backward)
        if balanced == split:
            break
        split = balanced
    return split


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def train_epochs(trainer, data, args, log, checkpoint, stop, placement, monitor) -> CoreUsage:
    """Train until --epochs. Returns on which cores the threads have run."""
    n = len(data.y_train)
    batches = math.ceil(n / args.batch_size)
    usage = CoreUsage(placement.split, 0.0, Counter())
    for epoch in range(log.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        log.start_epoch(epoch, batches)
        monitor.take()  # forget what was before the epoch
        for batch in range(log.batch, batches):
            with log.timed("loading"):
                index = order[batch * args.batch_size : (batch + 1) * args.batch_size]
                x, labels = load_batch(data.x_train, data.y_train, index, args, data.mean, data.std)

            # Forward, backward and update. The threads of the groups measure their phases, which
            # may overlap: their seconds can add up to more than the step takes.
            step = trainer.step(args.mode, x, labels)
            log.add_seconds("forward", step.forward)
            log.add_seconds("backward", step.backward)

            log.end_batch(len(labels), step.loss, *count_correct(step.logits, labels))
            require_finite(step.loss, "loss", log)
            if stop.requested:
                save_and_stop(checkpoint, log, stop)
            if checkpoint.due():
                checkpoint.save()

        log.end_training()

        # Did the threads stay where they were pinned, for the whole epoch?
        usage += monitor.take()
        placement.check()
        log.totals["cpu_time_inside"] = usage.shares_inside()
        log.totals["idle"] = usage.idle_shares()

        # Only the groups have OpenMP pools of a useful size: evaluate on all cores.
        evaluation = placement.groups["all"].submit(
            evaluate, trainer.model, data, args, log.confusion
        )
        loss, top1, top5, loading = evaluation.result()
        log.end_epoch(loss, top1, top5, loading)
        require_finite(loss, "validation loss", log)
        if not args.quiet:
            print(
                f"epoch {epoch}/{args.epochs}  CPU time inside the assigned cores: {usage}",
                flush=True,
            )
        checkpoint.save()
        if stop.requested and epoch < args.epochs:
            save_and_stop(checkpoint, log, stop)
    return usage


def run_training(args, data) -> dict[str, list[float]]:
    """Train as the parsed command line says. Returns {"train_loss": [per epoch], "test_acc": …}."""
    split = find_split(args, data)
    if not args.quiet:
        print(
            f"mode {args.mode}, cores: {split}; {args.dtype}, {args.memory_format}, "
            f"{args.micro_batches} micro-batches of {args.batch_size // args.micro_batches} images",
            flush=True,
        )
    with Placement(split) as placement, CoreMonitor(placement) as monitor:
        trainer = make_trainer(placement, args, data)
        log = RunLog(args, __file__, data, run_info(split, args.mode))
        checkpoint = TorchCheckpoint(args, log, model=trainer.model, optimizer=trainer.optimizer)
        if args.resume:
            checkpoint.load()

        # Kernels that are built in the first step would count as its time.
        warm_up(placement, data, args)
        with StopSignal() as stop, log:
            usage = train_epochs(trainer, data, args, log, checkpoint, stop, placement, monitor)
            log.finish()

    print(f"cores: {split}; CPU time inside the assigned cores: {usage}", flush=True)
    if min(usage.shares_inside().values(), default=1.0) < MIN_SHARE_INSIDE:
        print(
            f"warning: less than {MIN_SHARE_INSIDE:.0%} of the CPU time was inside the assigned "
            "cores",
            file=sys.stderr,
        )
    return log.history


def warm_up(placement, data, args):
    """One step with a model that is then discarded: the libraries build kernels for its shapes."""
    index = np.arange(min(args.batch_size, len(data.y_train)))
    x, labels = load_batch(data.x_train, data.y_train, index, args, data.mean, data.std)
    make_trainer(placement, args, data).step(args.mode, x, labels)


def run_info(split, mode) -> dict:
    """The entries of the log's .json that only this script has."""
    both = split.groups()["all"]
    phases = {"forward": split.forward, "backward": split.backward}
    if mode in ("all", "replicas"):
        phases = {"forward": both, "backward": both}
    return {"threads": len(both), "cores_of_phases": phases, "reserved": split.reserved}


def train(
    num_epochs: int = 1, batch_size: int = 64, learning_rate: float = 0.01, **options
) -> dict[str, list[float]]:
    """Train from Python: train(num_epochs=2, subset=500, mode="split").

    options: those of the command line, with underscores. Returns {"train_loss": [per epoch],
    "test_acc": …}. Raises InputError for options that cannot be used.
    """
    options = {
        "epochs": num_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        **options,
    }

    # By way of the command line: its defaults and its checks are then those of the script.
    argv = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            argv.append(option)
        elif value is not None and value is not False:
            argv += [option, str(value)]
    args = parse_args(argv)
    data = load_dataset(args.data_dir, args.dataset, args.subset, args.seed)
    return run_training(args, data)


# --------------------------------------------------------------------------------------------------
# Benchmark
# --------------------------------------------------------------------------------------------------

# Other programs and the clock rate of the processor make a machine faster and slower by the minute.
# So the variants take turns on each batch, and are compared within a round (paired samples).


class Sample(NamedTuple):
    """One step of one variant: seconds, and the share of them in which each group was idle."""

    seconds: float
    forward: float
    backward: float
    update: float
    forward_idle: float
    backward_idle: float


# By how much the losses of the modes may differ, relatively: sums in another order, in that type.
LOSS_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.02}

# Variants beside the modes: without micro-batches; and as a script does it that sets nothing.
NO_MICRO_BATCHES = "all, 1 micro-batch"
STOCK_PYTORCH = "all, 1 micro-batch, float32 NCHW"
# The phases of mode split, each measured while the other group does nothing.
FORWARD_ALONE = "forward alone on its group"
BACKWARD_ALONE = "backward alone on its group"


def make_variants(placement, args, data) -> dict:
    """{name: function of (x, labels) that does one step and returns a Step}."""
    # With a learning rate of 0 the weights stay equal, and with them the losses.
    fixed = {"lr": 0.0, "weight_decay": 0.0}
    stock_options = {"dtype": "float32", "memory_format": "contiguous", "micro_batches": 1}
    trainer = make_trainer(placement, args, data, **fixed)
    whole = Trainer(placement, trainer.model, trainer.optimizer, trainer.dtype, micro_batches=1)
    stock = make_trainer(placement, args, data, **fixed, **stock_options)

    def stock_step(x, labels):
        return stock.step("all", x.contiguous(), labels)

    variants = {mode: functools.partial(trainer.step, mode) for mode in MODES}
    variants[NO_MICRO_BATCHES] = functools.partial(whole.step, "all")
    variants[STOCK_PYTORCH] = stock_step
    variants[FORWARD_ALONE] = functools.partial(forward_alone, trainer)
    variants[BACKWARD_ALONE] = functools.partial(backward_alone, trainer)
    return variants


def forward_alone(trainer, x, labels) -> Step:
    """The forward passes of a step on their group."""
    micro_batches = split_micro_batches(x, labels, trainer.micro_batches)
    semaphore = threading.Semaphore(len(micro_batches))  # the worker never waits
    # Nobody takes the losses out of a queue, and their graphs would fill the memory.
    discard = SimpleNamespace(put=lambda loss: None)
    job = trainer.groups["forward"].submit(
        trainer.forward_worker, micro_batches, len(labels), semaphore, discard
    )
    _, seconds = job.result()
    return Step(math.nan, None, seconds, 0.0, 0.0)


def backward_alone(trainer, x, labels) -> Step:
    """A step on the backward group. Its forward pass, which has to be, is not counted."""
    trainer.optimizer.zero_grad()
    step = trainer.step_on_one_group("backward", x, labels)
    return Step(math.nan, None, 0.0, step.backward, step.update)


def measure(args, split, data) -> dict[str, list[Sample]]:
    """{variant: [Sample of each round]}: in each round, all variants on the same batch."""
    from tqdm import tqdm

    with Placement(split) as placement, CoreMonitor(placement) as monitor:
        variants = make_variants(placement, args, data)
        samples = {name: [] for name in variants}
        total = (args.rounds + 1) * len(variants)
        with tqdm(total=total, leave=False, disable=None) as progress:  # None: only on a terminal
            for number in range(args.rounds + 1):
                index = np.arange(args.batch_size) + number * args.batch_size
                index %= len(data.y_train)
                x, labels = load_batch(data.x_train, data.y_train, index, args, data.mean, data.std)
                losses = {}
                for name, step in variants.items():
                    progress.set_description(f"round {number}/{args.rounds}: {name}")
                    losses[name], sample = measure_step(step, x, labels, monitor)
                    progress.update()
                    if number > 0:  # round 0 is the warm-up
                        samples[name].append(sample)
                # First the same result, then the speed.
                tolerance = LOSS_TOLERANCES[args.dtype]
                check_same_loss({mode: losses[mode] for mode in MODES}, tolerance)
    return samples


def measure_step(step, x, labels, monitor) -> tuple[float, Sample]:
    """The loss of a step, and what it took."""
    monitor.take()  # forget what was before the step
    started = time.perf_counter()
    done = step(x, labels)
    seconds = time.perf_counter() - started
    idle = monitor.take().idle_shares()
    sample = Sample(
        seconds, done.forward, done.backward, done.update, idle["forward"], idle["backward"]
    )
    return done.loss, sample


def check_same_loss(losses, tolerance):
    """Raise TrainingError unless all modes compute the same loss, except for rounding."""
    low = min(losses.values())
    high = max(losses.values())
    finite = all(math.isfinite(loss) for loss in losses.values())
    if not finite or high - low > tolerance * high:
        listed = ", ".join(f"{mode} {loss:.4f}" for mode, loss in losses.items())
        raise TrainingError(f"the losses of the modes differ: {listed}")


def median_sample(samples) -> Sample:
    """The median of each field."""
    return Sample(*[statistics.median(values) for values in zip(*samples, strict=True)])


def speedups(samples, name, baseline) -> list[float]:
    """How many times as fast as the baseline a variant is, in each round."""
    pairs = zip(samples[name], samples[baseline], strict=True)
    return [base.seconds / sample.seconds for sample, base in pairs]


def speedup(samples, name, baseline) -> float:
    return statistics.median(speedups(samples, name, baseline))


def pipeline_bound(forward, backward, update, micro_batches) -> float:
    """The least seconds of a pipelined step, from the seconds of its phases over a whole batch.

    M max(f, b) + min(f, b) + update, with f = forward / M and b = backward / M: the M micro-batches
    of the longer phase follow each other without a gap; before the first or after the last of them,
    one micro-batch of the shorter phase has nothing to overlap with.
    """
    longer = max(forward, backward)
    shorter = min(forward, backward)
    return longer + shorter / micro_batches + update


def format_spread(values, digits) -> str:
    """Median (min–max)."""
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def format_samples(samples, batch_size) -> str:
    """The table of the benchmark."""
    header = ["mode", "images/s", "forward s", "backward s"]
    header += ["idle: fwd cores", "bwd cores", "against all"]
    rows = []
    for name in (*MODES, NO_MICRO_BATCHES, STOCK_PYTORCH):
        median = median_sample(samples[name])
        row = [
            name,
            format_spread([batch_size / sample.seconds for sample in samples[name]], 1),
            f"{median.forward:.3f}",
            f"{median.backward:.3f}",
            f"{median.forward_idle:.0%}",
            f"{median.backward_idle:.0%}",
            format_spread(speedups(samples, name, "all"), 2),
        ]
        rows.append(row)
    forward = median_sample(samples[FORWARD_ALONE]).forward
    backward = median_sample(samples[BACKWARD_ALONE]).backward
    rows.append([FORWARD_ALONE, "", f"{forward:.3f}", "", "", "", ""])
    rows.append([BACKWARD_ALONE, "", "", f"{backward:.3f}", "", "", ""])
    return format_table(header, rows)


def findings(samples, micro_batches) -> list[str]:
    """What the figures mean, in sentences."""
    medians = {name: median_sample(taken) for name, taken in samples.items()}
    replicas = speedup(samples, "replicas", "pipelined")
    divided = speedup(samples, "all", NO_MICRO_BATCHES)
    whole = speedup(samples, NO_MICRO_BATCHES, STOCK_PYTORCH)
    return [
        *explain_split(samples, medians),
        *explain_pipelined(samples, medians, micro_batches),
        "replicas, the same groups with half of the batch each, are "
        f"{replicas:.2f} × as fast as pipelined.",
        f"Micro-batches make all {divided:.2f} × as fast; without them it is {whole:.2f} × as fast "
        "as stock PyTorch, in float32 and NCHW.",
    ]


def explain_split(samples, medians) -> list[str]:
    split = medians["split"]
    against_all = speedup(samples, "split", "all")

    # Does a phase take longer beside the other group than alone, and how much of a step is spent
    # outside all phases, on the way from one group to the other?
    backward_alone = medians[BACKWARD_ALONE].backward + medians[BACKWARD_ALONE].update
    against_alone = split.seconds / (medians[FORWARD_ALONE].forward + backward_alone)
    switching = statistics.median(
        1 - (sample.forward + sample.backward + sample.update) / sample.seconds
        for sample in samples["split"]
    )

    idle = (
        f"forward's cores are idle {split.forward_idle:.0%} of the time, "
        f"backward's {split.backward_idle:.0%}"
    )
    if against_all > 0.95:
        reason = f", although its phases wait for each other: {idle}"
    elif against_alone <= 1.05:
        reason = f" because its phases wait for each other: {idle}"
    else:
        reason = f": its phases wait for each other ({idle}) and are slower than alone"
    return [
        f"split takes {against_alone:.2f} × the time of its phases, each alone on its group; "
        f"switching from one group to the other takes {switching:.2%} of its step.",
        f"It is {against_all:.2f} × as fast as all{reason}.",
    ]


def explain_pipelined(samples, medians, micro_batches) -> list[str]:
    pipelined = medians["pipelined"]
    against_split = speedup(samples, "pipelined", "split")
    against_all = speedup(samples, "pipelined", "all")
    overlap = "the overlap gains nothing here"
    if against_split > 1.05:
        overlap = "the phases of different micro-batches overlap"

    forward = medians[FORWARD_ALONE].forward
    backward = medians[BACKWARD_ALONE].backward
    bound = pipeline_bound(forward, backward, medians[BACKWARD_ALONE].update, micro_batches)
    slowdown = (pipelined.forward + pipelined.backward) / (forward + backward)

    reason = ""
    if against_all < 1:
        seconds = {"forward": forward, "backward": backward}
        idle = {"forward": pipelined.forward_idle, "backward": pipelined.backward_idle}
        shorter, longer = sorted(seconds, key=seconds.get)
        reason = (
            f": {longer} takes {seconds[longer] / seconds[shorter]:.1f} × as long as {shorter} on "
            f"these groups, so {shorter}'s cores are idle {idle[shorter]:.0%} of the time"
        )
    return [
        f"pipelined is {against_split:.2f} × as fast as split: {overlap}.",
        f"With {micro_batches} micro-batches its bound, from the phases measured alone, is "
        f"{bound:.3f} s a step; it takes {pipelined.seconds:.3f} s and so reaches "
        f"{bound / pipelined.seconds:.0%} of the bound. At work together the phases take "
        f"{slowdown:.2f} × as long as alone.",
        f"pipelined is {against_all:.2f} × as fast as all{reason}.",
    ]


def run_benchmark(args, data):
    """Measure all variants, print table and findings, and write every sample to --output."""
    split = find_split(args, data)
    print(
        f"\nBenchmark: {cpu_model()}, cores: {split}; PyTorch {torch.__version__}; ResNet-50, "
        f"{data.name}, {args.image_size} pixels, batch {args.batch_size} in {args.micro_batches} "
        f"micro-batches, {args.dtype}, {args.memory_format}; medians (min–max) of {args.rounds} "
        "rounds",
        flush=True,
    )
    samples = measure(args, split, data)
    sentences = findings(samples, args.micro_batches)
    print(format_samples(samples, args.batch_size))
    print("\n" + "\n".join(sentences), flush=True)

    # "turns" is the name that the samples have in files of earlier versions.
    shown = ("micro_batches", "batch_size", "dtype", "memory_format", "image_size", "rounds")
    content = {
        "environment": environment(),
        "dataset": data.name,
        "cores": str(split),
        "arguments": {name: getattr(args, name) for name in shown},
        "turns": {name: [sample._asdict() for sample in taken] for name, taken in samples.items()},
        "findings": sentences,
    }
    with atomic_write(args.output, "w") as file:
        json.dump(content, file, indent=1)
    print(f"written: {args.output}", flush=True)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


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
    if text == "auto":
        return text
    parts = text.split(":")
    valid = [part.isdecimal() and 0 < int(part) < 1000 for part in parts]
    if len(parts) != 2 or not all(valid):
        raise argparse.ArgumentTypeError(f"{text!r} is not a proportion such as 1:2, nor auto")
    return int(parts[0]), int(parts[1])


def parse_args(argv=None):
    models = ("resnet50",)
    parser = make_parser(__file__, __doc__, models, batch_size=64, epochs=None)
    add = parser.add_argument
    positive = number(float, 0, math.inf, exclusive=True)
    add("--learning-rate", dest="lr", type=positive, metavar="LR", help="same as --lr")
    add("--mode", choices=MODES, default="pipelined", help="see above (default: %(default)s)")
    count = number(int, 1, 10**6)
    micro_batches = "micro-batches per batch, in every mode (default: %(default)s)"
    add("--micro-batches", type=count, default=4, metavar="M", help=micro_batches)

    split = "forward cores : backward cores, or auto: measure both phases (default: 1:1)"
    add("--split", type=parse_split, metavar="F:B", help=split)
    add("--forward-cores", type=parse_cores, metavar="LIST", help="cores of forward, as in 0-2,5")
    add("--backward-cores", type=parse_cores, metavar="LIST", help="cores of backward, as in 3-4")

    dtype = "bfloat16" if has_bfloat16() else "float32"
    dtype_help = "dtype of autocast; parameters stay float32 (default on this CPU: %(default)s)"
    add("--dtype", choices=DTYPES, default=dtype, help=dtype_help)
    layout = "memory format of weights and images (default: %(default)s)"
    add("--memory-format", choices=MEMORY_FORMATS, default="channels_last", help=layout)
    size = "resize images to S × S pixels: 32, 64, … 224 (default: %(default)s)"
    add("--image-size", type=int, default=32, metavar="S", help=size)

    add("--benchmark", action="store_true", help="compare all modes instead of training")
    rounds = "rounds of the benchmark (default: 7; in the run without options 3)"
    add("--rounds", type=number(int, 3, 1000), help=rounds)
    output = "results/split_cores_benchmark.json"
    samples = "file for the samples of the benchmark (default: %(default)s)"
    add("--output", metavar="FILE", default=output, help=samples)

    # What a namespace has already, parse_args() sets only if the command line has it.
    args = parser.parse_args(argv, argparse.Namespace(batch_size=None))

    # Somebody who runs the script without options wants to see something within two minutes.
    args.default_run = not args.benchmark and args.epochs is None and args.subset is None
    if args.default_run:
        args.epochs = DEFAULT_RUN["epochs"]
        args.subset = DEFAULT_RUN["subset"]
        args.batch_size = args.batch_size or DEFAULT_RUN["batch_size"]
        args.rounds = args.rounds or DEFAULT_RUN["rounds"]
    args.batch_size = args.batch_size or parser.get_default("batch_size")
    args.epochs = args.epochs or 10
    args.rounds = args.rounds or 7
    check_args(args)
    return args


def check_args(args):
    """Raise InputError for options that do not go together, and for cores that cannot be used."""
    if (args.forward_cores is None) != (args.backward_cores is None):
        raise InputError("--forward-cores and --backward-cores go together: give both")
    if args.forward_cores and args.split:
        raise InputError(
            "--split does not go with --forward-cores and --backward-cores: give one or the other"
        )
    if args.batch_size % args.micro_batches:
        divisors = [m for m in range(1, args.batch_size + 1) if args.batch_size % m == 0]
        raise InputError(
            f"--micro-batches {args.micro_batches} does not divide --batch-size "
            f"{args.batch_size}: give one of {', '.join(map(str, divisors))}"
        )
    has_replicas = args.benchmark or args.default_run or args.mode == "replicas"
    if args.micro_batches < 2 and has_replicas:
        # The two replicas divide the batch, and batch normalisation would see halves of it.
        raise InputError(
            "--micro-batches 1: replicas and the benchmark, which has them, need 2 or more"
        )
    if args.image_size % 32 or not 32 <= args.image_size <= 224:
        raise InputError(
            f"--image-size {args.image_size}: the network halves an image five times: give a "
            "multiple of 32 from 32 to 224"
        )
    if args.resume and args.benchmark:
        raise InputError("--resume does not go with --benchmark: leave one out")
    choose_split(args)


def choose_split(args) -> CoreSplit:
    """The core groups that args ask for; with --split auto the even ones, to begin with.

    Raises InputError for cores that overlap or are not available, or if threads cannot be pinned.
    """
    cores = available_cores()
    if args.mode == "all" and not args.benchmark and (len(cores) < 2 or not can_pin()):
        return CoreSplit(tuple(cores), ())  # this mode needs no groups
    if not can_pin():
        what = "--benchmark" if args.benchmark else f"--mode {args.mode}"
        raise InputError(
            f"{what} chooses the cores of its threads, which {platform.system()} does not let a "
            "process do: train with --mode all"
        )
    if args.forward_cores is None:
        proportion = args.split
        if proportion in (None, "auto"):
            proportion = (1, 1)
        return split_cores(cores, proportion)

    forward = args.forward_cores
    backward = args.backward_cores
    both = set(forward) & set(backward)
    if both:
        raise InputError(
            f"--forward-cores and --backward-cores both have {format_cores(sorted(both))}: "
            "give each core to one of them"
        )
    unavailable = set(forward + backward) - set(cores)
    if unavailable:
        raise InputError(
            f"core {format_cores(sorted(unavailable))} is not available: this process may use "
            f"{format_cores(cores)}"
        )
    reserved = tuple(core for core in cores if core not in forward + backward)
    return CoreSplit(forward, backward, reserved)


def main(argv=None):
    keep_freed_memory()
    args = parse_args(argv)
    benchmark = args.benchmark or (args.default_run and len(available_cores()) > 1 and can_pin())
    if benchmark:
        check_outputs([args.output])
    data = load_dataset(args.data_dir, args.dataset, args.subset, args.seed)
    if args.default_run and not args.quiet:
        print(
            f"A small run first: {args.subset} images in batches of {args.batch_size}, "
            f"{args.epochs} epoch. The full one: python train_resnet50_split_cores.py --epochs 10 "
            "--subset 50000",
            flush=True,
        )
    if not args.benchmark:
        run_training(args, data)
    if benchmark:
        run_benchmark(args, data)


if __name__ == "__main__":
    run_main(main)
