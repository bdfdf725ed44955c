"""The scaling model beside published results on up to 512 GPUs.

    python experiments/published_scaling.py

Every input is published, or is an assumption that is the same for all rows: none is chosen to meet
a result. The model knows nothing of what the papers do not give: variation of steps, traffic of
others, what a framework does between layers. So it should be above the measured efficiency.

Result: a table of predicted and published efficiencies, with the inputs and their sources.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import Parser, format_table, run_main
from scaling_model import (
    ALGORITHMS,
    Algorithm,
    Network,
    Prediction,
    Profile,
    predict,
    shared_memory,
)

# The same for all rows. The latencies are those by which NCCL 2.8 chooses algorithms (tuning.cc,
# ring, protocol Simple); the others are assumptions.
NETWORK_ALPHA = 9.6e-6
PCIE_ALPHA = 5.7e-6
NVLINK_ALPHA = 3.4e-6
PCIE_BETA = 1 / 10e9  # seconds per byte
NVLINK_BETA = 1 / 30e9
GPU_GAMMA = 1 / 200e9  # seconds per byte that a GPU sums
PAYLOAD = 0.9  # of the network's nominal rate
BACKWARD_SHARE = 2 / 3  # of a step: the backward pass has twice the operations of the forward pass

RING = ALGORITHMS["ring, overlapped"]  # NCCL's
HIERARCHY = Algorithm(shared_memory, overlap=True)  # sum in a machine, then between machines


class Published(NamedTuple):
    name: str
    gpus: int
    efficiency: float
    baseline_gpus: int  # of which the efficiency is relative to
    images: int  # of a step on each GPU
    images_per_s: float  # of one GPU
    parameters: float
    last_layers: float  # share of the parameters in fully connected layers, ready first
    gbit_per_s: float  # of each machine
    gpus_per_machine: int
    has_nvlink: bool
    bucket: float  # bytes that are reduced together
    algorithm: Algorithm
    sources: str


TABLES = (
    Published(
        "Horovod, ResNet-101",
        gpus=512,
        efficiency=0.90,
        baseline_gpus=1,
        images=64,
        images_per_s=1656.82 / 16,
        parameters=44.5e6,
        last_layers=0.05,
        gbit_per_s=25,
        gpus_per_machine=4,
        has_nvlink=False,
        bucket=64 * 2**20,
        algorithm=RING,
        sources="horovod, docs/benchmarks: 128 servers, 4 Pascal GPUs each, RoCE 25 Gbit/s, batch "
        "64; its example's 1,656.82 images/s on 16 GPUs; docs/tensor-fusion: 64 MiB; NCCL's ring",
    ),
    Published(
        "Horovod, VGG-16",
        gpus=512,
        efficiency=0.68,
        baseline_gpus=1,
        images=64,
        images_per_s=154,
        parameters=138.4e6,
        last_layers=0.89,
        gbit_per_s=25,
        gpus_per_machine=4,
        has_nvlink=False,
        bucket=64 * 2**20,
        algorithm=RING,
        sources="the same; one GPU: TensorFlow's performance benchmarks, P100, batch 64, May 2017",
    ),
    Published(
        "Goyal et al. 2017, ResNet-50",
        gpus=256,
        efficiency=0.90,
        baseline_gpus=8,
        images=32,
        images_per_s=195,
        parameters=25.6e6,
        last_layers=0.08,
        gbit_per_s=50,
        gpus_per_machine=8,
        has_nvlink=True,
        bucket=4 * 25.6e6 / 161,
        algorithm=HIERARCHY,
        sources="arXiv:1706.02677: 32 servers, 8 P100 each with NVLink, 50 Gbit/s Ethernet, 32 "
        "images a GPU; each of 161 gradients by itself, within a server, then by recursive halving "
        "and doubling; one GPU: TensorFlow's performance benchmarks, P100, batch 32",
    ),
    Published(
        "Li et al. 2020, DDP, ResNet-50",
        gpus=256,
        efficiency=0.50,
        baseline_gpus=1,
        images=32,
        images_per_s=300,
        parameters=25.6e6,
        last_layers=0.08,
        gbit_per_s=100,
        gpus_per_machine=8,
        has_nvlink=True,
        bucket=25e6,
        algorithm=RING,
        sources="arXiv:2006.15704, section 5.3: a shared cluster, V100 with NVLink, 100 "
        "Gbit/s, buckets of 25 MB; with NCCL an "
        "iteration on 256 GPUs takes twice that of one; images and rate of a GPU: assumed",
    ),
)


def make_profile(entry: Published) -> Profile:
    """The step of one GPU: the backward pass in equal times for equal parts of the parameters.

    Fully connected layers are at its end, have many parameters and take little time: they are ready
    at its start. Without published variation all steps are alike.
    """
    step = entry.images / entry.images_per_s
    size = 4 * entry.parameters
    count = max(1, round(size / entry.bucket))
    backward = BACKWARD_SHARE * step
    convolutions = 1 - entry.last_layers
    ready = []
    for i in range(1, count + 1):
        computed = max(0.0, i / count - entry.last_layers) / convolutions
        ready.append(backward * computed)
    phases = {"loading": 0.0, "forward": step - backward, "backward": backward, "update": 0.0}
    return Profile(entry.images, np.array([step]), phases, tuple(ready), (size / count,) * count)


def make_network(entry: Published) -> Network:
    inside = NVLINK_ALPHA if entry.has_nvlink else PCIE_ALPHA
    alpha = NETWORK_ALPHA
    if entry.algorithm is RING:
        # A chunk goes around: of as many hops as a machine has GPUs, one leaves the machine.
        alpha = (NETWORK_ALPHA + (entry.gpus_per_machine - 1) * inside) / entry.gpus_per_machine
    return Network(
        f"{entry.gbit_per_s:g} Gbit/s",
        alpha=alpha,
        beta=1 / (PAYLOAD * entry.gbit_per_s * 1e9 / 8),
        gamma=GPU_GAMMA,
        ranks_per_machine=entry.gpus_per_machine,
        memory_alpha=inside,
        memory_beta=NVLINK_BETA if entry.has_nvlink else PCIE_BETA,
    )


def predict_published(entry: Published) -> Prediction:
    """The efficiency is relative to the published baseline."""
    profile = make_profile(entry)
    network = make_network(entry)
    found = predict(profile, network, entry.algorithm, entry.gpus)
    baseline = predict(profile, network, entry.algorithm, entry.baseline_gpus)
    return found._replace(efficiency=found.efficiency / baseline.efficiency)


HEADER = (
    "published",
    "GPUs",
    "1 GPU, ms",
    "gradients, MB",
    "network",
    "model",
    "published",
    "difference",
)


def table_rows() -> list[list[str]]:
    rows = []
    for entry in TABLES:
        found = predict_published(entry)
        difference = found.efficiency - entry.efficiency
        rows.append(
            [
                entry.name,
                f"{entry.gpus}",
                f"{1e3 * entry.images / entry.images_per_s:.0f}",
                f"{4e-6 * entry.parameters:.0f}",
                f"{entry.gpus_per_machine} a machine, {entry.gbit_per_s:g} Gbit/s",
                f"{found.efficiency:.0%}",
                f"{entry.efficiency:.0%}",
                f"{100 * difference:+.0f} points",
            ]
        )
    return rows


def parse_args(argv=None):
    return Parser("published_scaling", __doc__).parse_args(argv)


def main(argv=None):
    parse_args(argv)
    print(format_table(HEADER, table_rows()))
    print()
    for entry in TABLES:
        print(f"{entry.name}: {entry.sources}")


if __name__ == "__main__":
    run_main(main)
