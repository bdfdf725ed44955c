"""Measure a network: latency α, seconds per byte β and γ of a sum, by ping-pong and allreduce.

predict_scaling.py --calibrate calls it on every rank. Between two machines the network is measured,
within one its shared memory, each by a ping-pong of one pair of ranks while the others wait. In an
allreduce both send at once; what that costs beyond the ping-pong, and the sums, is γ.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import InputError
from scaling_model import Network, communication_cost, mpi_allreduce

SIZES = [2**k for k in range(3, 25)]  # 8 B … 16 MiB
SECONDS_PER_SIZE = 0.1  # at least MIN_REPEATS even if they take longer
MIN_REPEATS = 5
QUANTILE = 0.25  # of the repeats: what disturbs a message only ever makes it longer
SHORT = 1024  # bytes, up to which messages have the latency α
LONG = 64 * 1024  # bytes, from which the seconds per byte β count
LONGEST = 0.3  # seconds of one message, above which no larger one is sent


def fit_line(points: list) -> tuple[float, float]:
    """Offset and slope of seconds = offset + slope size with the least relative errors.

    All sizes count alike: with absolute errors the largest alone would decide.
    """
    sizes, seconds = np.array(points, float).T
    columns = np.column_stack([1 / seconds, sizes / seconds])
    offset, slope = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0]
    return float(offset), float(slope)


def fit_network(name: str, points: list) -> Network:
    """α from the short messages, a line of slope β from the long ones; in between, the points.

    Networks treat them differently: protocols, buffers, links that let a burst pass.
    """
    alpha, _ = fit_line([point for point in points if point[0] <= SHORT])
    long = [point for point in points if point[0] >= LONG]
    if len(long) < 2:
        raise InputError(
            f"--calibrate: a message of {points[-1][0]:,} bytes takes {points[-1][1]:.1f} s: this "
            "network is too slow to be measured"
        )
    offset, beta = fit_line(long)
    return Network(
        name,
        max(alpha, 0.0),
        beta,
        source="measured",
        points=tuple(points),
        long_from=LONG,
        long_offset=offset,
    )


def fit_gamma(points: list, ranks: int, network: Network) -> float:
    """γ, from allreduces: what they take beyond their messages, for each byte that a rank sums.

    The median over sizes from 64 KiB on, where sums matter; at least 0.
    """
    found = []
    for size, seconds in points:
        rounds = mpi_allreduce(size, ranks, network.ranks_per_machine)
        messages = communication_cost(rounds, network._replace(gamma=0.0)).total
        summed = sum(each.summed * each.count for each in rounds)
        if size >= 2**16:
            found.append((seconds - messages) / summed)
    return max(0.0, statistics.median(found)) if found else Network._field_defaults["gamma"]


def measure(comm, action) -> list:
    """[(size, seconds)] of action(buffer), which all ranks of comm call together."""
    points = []
    for size in SIZES:
        buffer = np.zeros(size // 4, np.float32)
        action(buffer)  # the first message of a size may set something up
        samples = []
        started = time.perf_counter()
        while True:
            comm.Barrier()
            begun = time.perf_counter()
            action(buffer)
            samples.append(time.perf_counter() - begun)
            enough = len(samples) >= MIN_REPEATS
            spent = time.perf_counter() - started
            if comm.bcast(enough and (spent > SECONDS_PER_SIZE or len(samples) >= 200)):
                break
        seconds = comm.bcast(float(np.quantile(samples, QUANTILE)))
        points.append((size, seconds))
        if seconds > LONGEST:
            break
    return points


def ping_pong(comm, other: int) -> list:
    """[(size, seconds one way)] between ranks 0 and `other`, known on all ranks of comm."""
    pair = comm.Split(comm.rank in (0, other))
    points = None
    if comm.rank in (0, other):

        def there_and_back(buffer):
            if pair.rank == 0:
                pair.Send(buffer, 1)
                pair.Recv(buffer, 1)
            else:
                pair.Recv(buffer, 0)
                pair.Send(buffer, 0)

        points = [(size, seconds / 2) for size, seconds in measure(pair, there_and_back)]
    pair.Free()
    return comm.bcast(points)


def calibrate(comm, name: str) -> dict:
    """Measure and fit; the content of the calibration file, the same on all ranks.

    "network": the fields of a Network; "ping_pong" and "allreduce": [size, seconds, relative
    residual], of the fit and of the formula. On a single machine the network is its shared memory.
    """
    from mpi4py import MPI

    machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
    here = comm.allgather(machine.allreduce(comm.rank, MPI.MIN))  # each rank's machine
    near = [rank for rank in range(1, comm.size) if here[rank] == here[0]]
    far = [rank for rank in range(1, comm.size) if here[rank] != here[0]]

    other = far[0] if far else near[0]
    messages = ping_pong(comm, other)
    summed = measure(comm, lambda buffer: comm.Allreduce(MPI.IN_PLACE, buffer))

    network = fit_network(name, messages)
    if far and near:
        memory = ping_pong(comm, near[0])
        inside = fit_network(name, memory)
        network = network._replace(
            ranks_per_machine=len(near) + 1, memory_alpha=inside.alpha, memory_beta=inside.beta
        )
    network = network._replace(gamma=fit_gamma(summed, comm.size, network))

    formula = []
    for size, _ in summed:
        rounds = mpi_allreduce(size, comm.size, network.ranks_per_machine)
        formula.append(communication_cost(rounds, network).total)
    return {
        "network": network._asdict(),
        "ranks": comm.size,
        "ping_pong": with_residuals(messages, fitted(network, messages)),
        "allreduce": with_residuals(summed, formula),
    }


def fitted(network: Network, points: list) -> list[float]:
    """What α, or for long messages their line, says of each point."""
    short = network._replace(points=(), beta=0.0)
    return [network.message_time(n) if n >= LONG else short.message_time(n) for n, _ in points]


def with_residuals(points: list, predicted: list) -> list:
    """[size, seconds, predicted over measured minus one] for each point."""
    pairs = zip(points, predicted, strict=True)
    return [[size, seconds, value / seconds - 1] for (size, seconds), value in pairs]


def describe(content: dict) -> str:
    """The fit and its residuals in some lines."""
    network = Network(**content["network"])
    lines = [
        f"{network.name}, {content['ranks']} ranks: α {network.alpha * 1e6:.1f} µs, "
        f"β {network.beta * 1e9:.4g} ns/B ({1e-6 / network.beta:,.1f} MB/s), "
        f"γ {network.gamma * 1e9:.3g} ns/B",
        "milliseconds; how much α (from 64 KiB on the line, for allreduce the formula) is off:",
        "       bytes           ping-pong           allreduce",
    ]
    # A slow network takes too long for the largest sizes.
    columns = [content[name] for name in ("ping_pong", "allreduce")]
    by_size = [{size: rest for size, *rest in points} for points in columns]
    for size in SIZES:
        cells = [f"{size:>12,}"]
        for points in by_size:
            seconds, residual = points.get(size, (None, None))
            cells.append(
                " " * 20 if seconds is None else f"{1e3 * seconds:>13.4f} {residual:>+6.0%}"
            )
        if any(size in points for points in by_size):
            lines.append("".join(cells))
    return "\n".join(lines)
