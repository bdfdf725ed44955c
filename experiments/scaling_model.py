"""A model of the data-parallel training step: formulas for predict_scaling.py, in NumPy alone.

Times are in seconds, sizes in bytes. A message of n bytes takes α + n β (Hockney, "The
Communication Challenge for MPP: Intel Paragon and Meiko CS-2", 1994); to sum n bytes takes n γ.

An allreduce is a list of rounds, of which each begins when the one before has ended. Sources:

    recursive doubling, tree, Rabenseifner's algorithm
        Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in
        MPICH", International Journal of High Performance Computing Applications 19, 2005
    ring
        Patarasuk and Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations",
        Journal of Parallel and Distributed Computing 69, 2009
    speed-up of a fixed and of a growing problem
        Amdahl, "Validity of the Single Processor Approach", 1967;
        Gustafson, "Reevaluating Amdahl's Law", Communications of the ACM 31, 1988
    the largest of p times, from a measured distribution
        David and Nagaraja, "Order Statistics", 2003
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """Machines with some ranks each. A message inside a machine has the memory_… parameters."""

    name: str
    alpha: float  # latency of a message between machines, s
    beta: float  # s per byte, of all messages that leave a machine together
    gamma: float = 2e-10  # s per byte of a sum: 5 GB/s, the rate of one core
    ranks_per_machine: int = 1
    memory_alpha: float = 1e-6
    memory_beta: float = 1e-10  # 10 GB/s
    source: str = ""
    # Of a calibrated network, which follows α + n β in parts only (protocols for short and long
    # messages, buffers): measured (size, seconds), ascending, and a line for long messages.
    points: tuple = ()
    long_from: float | None = None  # bytes
    long_offset: float = 0.0  # s

    def message_time(self, size: float) -> float:
        """Seconds of a message between machines.

        Never less than the rate of long messages allows: links let a short burst pass faster, but
        not one message after another.
        """
        seconds = self.alpha + size * self.beta
        if self.long_from and size >= self.long_from:
            seconds = self.long_offset + size * self.beta
        elif self.points:
            seconds = float(np.interp(size, *zip(*self.points, strict=True)))
        return max(seconds, size * self.beta)


PRESETS = {
    "1gbe": Network(
        "1 GbE",
        alpha=50e-6,
        beta=1 / 117e6,
        source="TCP: 941 Mbit/s of payload, 50 µs through kernel and switch",
    ),
    "10gbe": Network(
        "10 GbE",
        alpha=20e-6,
        beta=1 / 1.17e9,
        source="TCP: 9.4 Gbit/s of payload, 20 µs",
    ),
    "infiniband": Network(
        "100 Gb InfiniBand",
        alpha=1.5e-6,
        beta=1 / 12e9,
        source="EDR with RDMA: 12 GB/s of payload, 1.5 µs",
    ),
    "nvlink": Network(
        "NVLink",
        alpha=5e-6,
        beta=1 / 130e9,
        gamma=2e-12,
        source="NVLink 2 of a V100: 6 links of 25 GB/s a direction, 130 GB/s of payload; 5 µs to "
        "start a kernel; 500 GB/s to sum",
    ),
}


# --------------------------------------------------------------------------------------------------
# Collective operations as rounds
# --------------------------------------------------------------------------------------------------


class Round(NamedTuple):
    """Every rank that takes part sends `size` bytes and then sums `summed` bytes; `count` times.

    flows: how many ranks of a machine send to other machines at once, and so share its link; 0: all
    messages stay inside machines.
    """

    size: float
    summed: float
    flows: int
    count: int = 1


class Cost(NamedTuple):
    latency: float
    bandwidth: float
    reduction: float

    @property
    def total(self) -> float:
        return self.latency + self.bandwidth + self.reduction


def ring(n: float, p: int, m: int) -> list[Round]:
    """2 (p - 1) α + 2 (p - 1) / p n β + (p - 1) / p n γ.

    Neighbours in the ring are neighbours in a machine: one rank of each machine sends to the next.
    """
    flows = 1 if p > m else 0
    return [Round(n / p, n / p, flows, p - 1), Round(n / p, 0, flows, p - 1)]


def recursive_doubling(n: float, p: int, m: int) -> list[Round]:
    """log2(p) (α + n β + n γ): in round i all exchange with the rank 2^i away."""
    q = power_of_two_below(p)
    rounds = [Round(n, n, m if 2**i >= m and p > m else 0) for i in range(q.bit_length() - 1)]
    return with_folding(rounds, n, p, q, m)


def rabenseifner(n: float, p: int, m: int) -> list[Round]:
    """2 log2(p) α + 2 (p - 1) / p n β + (p - 1) / p n γ.

    Reduce-scatter by recursive halving, n/2 bytes to the rank p/2 away, then n/4, …; allgather by
    recursive doubling, the same backwards.
    """
    q = power_of_two_below(p)
    halving = []
    for i in range(1, q.bit_length()):
        distance = q >> i
        flows = min(m, q) if distance >= m and p > m else 0
        halving.append(Round(n / 2**i, n / 2**i, flows))
    doubling = [each._replace(summed=0) for each in reversed(halving)]
    return with_folding(halving + doubling, n, p, q, m)


def tree(n: float, p: int, m: int) -> list[Round]:
    """Reduce and broadcast along a binomial tree: 2 log2(p) (α + n β) + log2(p) n γ."""
    rounds = []
    for i in range(math.ceil(math.log2(p))):
        rounds.append(Round(n, n, 1 if 2**i >= m and p > m else 0))
    return rounds + [each._replace(summed=0) for each in reversed(rounds)]


def with_folding(rounds, n, p, q, m):
    """The rounds of q ranks, a power of two, for p: as MPICH does it.

    p - q ranks first send all they have to a neighbour, and get the result from it at the end.
    """
    if p == q:
        return rounds
    flows = 1 if p > m and m == 1 else 0
    return [Round(n, n, flows), *rounds, Round(n, 0, flows)]


def power_of_two_below(p: int) -> int:
    """The largest power of two that is not larger than p."""
    return 1 << (p.bit_length() - 1)


def mpi_allreduce(n: float, p: int, m: int) -> list[Round]:
    """What MPICH chooses: recursive doubling up to 2,048 bytes, Rabenseifner's algorithm above."""
    return recursive_doubling(n, p, m) if n <= 2048 else rabenseifner(n, p, m)


def shared_memory(n: float, p: int, m: int) -> list[Round]:
    """SharedMemoryReducer: each rank sums its 1/m of the machine's gradients where they are.

    Between machines the ranks with the same shard sum n/m bytes, all m of a machine at once.
    """
    within = min(m, p)
    rounds = [Round(0, n / within, 0, within - 1)] if within > 1 else []
    machines = p // within
    for each in mpi_allreduce(n / within, machines, 1):
        rounds.append(each._replace(flows=within * each.flows))
    return rounds


def bf16(n: float, p: int, m: int) -> list[Round]:
    """--compress bf16: half of the bytes to every rank's owner, and from it. m = 1 is assumed."""
    flows = 1 if p > m else 0  # its sums are in the step of one rank: decoding takes their time
    return [Round(n / 2 / p, 0, flows, 2 * (p - 1))]


def topk(n: float, p: int, m: int, fraction: float = 0.01) -> list[Round]:
    """--compress topk: indices, then values, of the largest 1 % from each rank to all others."""
    flows = 1 if p > m else 0
    return [Round(fraction * n, 0, flows, 2 * (p - 1))]


class Algorithm(NamedTuple):
    rounds: object  # function (n, p, ranks per machine) → list of Round
    overlap: bool = False  # while the backward pass goes on
    by_calls: bool = False  # long messages move only while the program is inside MPI
    shards_update: bool = False  # each rank of a machine updates its shard of the weights only


# A longer message is announced first; its bytes move when both sides call MPI again (rendezvous).
# The calls in the backward pass are short, so that this is in wait(), after the backward pass.
EAGER = 8192  # bytes

ALGORITHMS = {
    "allreduce": Algorithm(mpi_allreduce),
    "ring": Algorithm(ring),
    "overlap": Algorithm(mpi_allreduce, overlap=True, by_calls=True),
    "shared": Algorithm(shared_memory, overlap=True, by_calls=True, shards_update=True),
    "ring, overlapped": Algorithm(ring, overlap=True),
    "recursive doubling": Algorithm(recursive_doubling),
    "recursive doubling, overlapped": Algorithm(recursive_doubling, overlap=True),
    "tree": Algorithm(tree),
    "tree, overlapped": Algorithm(tree, overlap=True),
    "bf16": Algorithm(bf16),
    "topk": Algorithm(topk),
}


def round_cost(each: Round, network: Network) -> Cost:
    """The cost of one of its `count` rounds."""
    if each.flows:
        latency = network.alpha
        seconds = network.message_time(each.size * each.flows)
    else:
        latency = network.memory_alpha
        seconds = latency + each.size * network.memory_beta
    return Cost(latency, max(0.0, seconds - latency), each.summed * network.gamma)


def communication_cost(rounds: list[Round], network: Network) -> Cost:
    """The sum over all rounds: what a blocking call takes."""
    costs = [np.multiply(each.count, round_cost(each, network)) for each in rounds]
    return Cost(*np.sum(costs, axis=0).tolist()) if costs else Cost(0.0, 0.0, 0.0)


# --------------------------------------------------------------------------------------------------
# Overlap of communication and backward pass
# --------------------------------------------------------------------------------------------------


def overlapped_end(ready: list[float], rounds: list[list[float]]) -> float:
    """When the last slice is summed on all ranks, in seconds from the start of the backward pass.

    ready: when the communication of each slice may begin. rounds: the seconds of each slice's
    rounds. One link carries all messages, one after another; a slice's next round begins when its
    last one has ended and the link is free, whichever slice can begin first.
    """
    following = [list(each) for each in rounds]  # the rounds of each slice that did not begin yet
    free_at = list(ready)  # when each slice's next round may begin
    link_free = 0.0
    while any(following):
        waiting = [i for i, times in enumerate(following) if times]
        first = min(waiting, key=lambda i: free_at[i])
        link_free = max(free_at[first], link_free) + following[first].pop(0)
        free_at[first] = link_free
    return max(free_at, default=0.0)


# --------------------------------------------------------------------------------------------------
# Waiting for the slowest
# --------------------------------------------------------------------------------------------------


def expected_maximum(samples: np.ndarray, p: int) -> float:
    """The mean of the largest of p independent draws from the measured samples.

    The i-th smallest of n samples is the largest of p draws with the probability
    (i/n)^p - ((i-1)/n)^p. More than the largest sample never comes out, which for p of the order
    of n or larger is too little.
    """
    ordered = np.sort(samples)
    share = np.arange(len(ordered) + 1) / len(ordered)
    return float(np.diff(share**p) @ ordered)


# --------------------------------------------------------------------------------------------------
# A training step
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """A step of one rank without communication, measured (scaling_inputs.read_profile) or assumed.

    steps: (n,) seconds of single steps. phases: mean seconds of loading, forward, backward and
    update; what is missing to the mean step is the rest. ready: when each slice of the gradients
    is complete, in seconds from the start of the backward pass; sizes: its bytes.
    """

    images: int  # of a step
    steps: np.ndarray
    phases: dict[str, float]
    ready: tuple
    sizes: tuple
    name: str = ""

    @property
    def mean(self) -> float:
        return float(np.mean(self.steps))

    def with_images(self, images: float) -> "Profile":
        """The step with more or fewer images.

        Loading, forward and backward pass are taken to be proportional to the images, update and
        rest to be constant. Small batches are less efficient than that says.
        """
        factor = images / self.images
        phases = dict(self.phases)
        proportional = sum(phases[name] for name in ("loading", "forward", "backward"))
        mean = self.mean + (factor - 1) * proportional
        for name in ("loading", "forward", "backward"):
            phases[name] *= factor
        return replace(
            self,
            images=images,
            steps=self.steps * (mean / self.mean),
            phases=phases,
            ready=tuple(factor * seconds for seconds in self.ready),
        )


class Prediction(NamedTuple):
    """A step of p ranks: its seconds, and of what they consist."""

    ranks: int
    images: float  # of a step, on all ranks together
    step: float
    compute: float
    stragglers: float
    latency: float
    bandwidth: float  # the sums too
    speedup: float
    efficiency: float

    @property
    def images_per_s(self) -> float:
        return self.images / self.step

    @property
    def bound(self) -> str:
        """What most of the step is: computation, or else the largest of the other parts."""
        if self.compute >= self.step / 2:
            return "compute"
        return max(PARTS[1:], key=lambda part: getattr(self, part))

    @property
    def lost_to(self) -> str:
        """Where most of the difference to the ideal speed-up goes.

        In strong scaling a part of the computation does not become shorter with fewer images:
        Amdahl's serial fraction.
        """
        ideal = self.step * self.efficiency
        lost = {part: getattr(self, part) for part in PARTS[1:]}
        lost["computation that does not divide"] = self.compute - ideal
        return max(lost, key=lost.get)


PARTS = ("compute", "bandwidth", "latency", "stragglers")


def predict(
    profile: Profile,
    network: Network,
    algorithm: Algorithm,
    p: int,
    strong: bool = False,
    local_steps: int = 1,
) -> Prediction:
    """The step of p ranks: profile.images on each, or (strong) that many on all ranks together.

    local_steps: communication only after every so many steps.
    """
    # The rank with the most images decides.
    own = profile.with_images(math.ceil(profile.images / p)) if strong else profile
    machine_ranks = min(network.ranks_per_machine, p)
    compute = own.mean
    slowest = expected_maximum(own.steps, p)
    if algorithm.shards_update:
        saved = own.phases["update"] * (1 - 1 / machine_ranks)
        compute -= saved
        slowest -= saved

    exposed = Cost(0.0, 0.0, 0.0)
    if p > 1:
        exposed = exposed_communication(own, network, algorithm, p)
    exposed = Cost(*(seconds / local_steps for seconds in exposed))

    step = slowest + exposed.total
    images = profile.images * (1 if strong else p)
    speedup = images / step * profile.mean / profile.images
    return Prediction(
        ranks=p,
        images=images,
        step=step,
        compute=compute,
        stragglers=slowest - compute,
        latency=exposed.latency,
        bandwidth=exposed.bandwidth + exposed.reduction,
        speedup=speedup,
        efficiency=speedup / p,
    )


def exposed_communication(profile: Profile, network: Network, algorithm: Algorithm, p: int) -> Cost:
    """The communication that the backward pass does not hide."""
    m = network.ranks_per_machine
    if not algorithm.overlap:
        return communication_cost(algorithm.rounds(sum(profile.sizes), p, m), network)

    backward = profile.phases["backward"]
    starts = []
    times = []
    whole = Cost(0.0, 0.0, 0.0)
    for ready, size in zip(profile.ready, profile.sizes, strict=True):
        rounds = algorithm.rounds(size, p, m)
        whole = Cost(*np.add(whole, communication_cost(rounds, network)).tolist())
        # A ring of 1,024 ranks has 2,046 rounds: equal ones go into the schedule as one.
        times.append([each.count * round_cost(each, network).total for each in rounds])
        is_long = any(each.flows and each.size > EAGER for each in rounds)
        starts.append(backward if algorithm.by_calls and is_long else ready)
    exposed = max(0.0, overlapped_end(starts, times) - backward)
    return Cost(*(exposed * part / whole.total for part in whole))
