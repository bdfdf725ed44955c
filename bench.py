"""Speed of each script beside PyTorch on the same work: same network, images, batch size and cores, in one run.

Ours and PyTorch's take turns, A B A B ..., after a warm-up, so that a machine whose speed drifts drifts for both. A row
gives medians, and the ratio pair by pair as median, least and greatest. The rate of a large float32 matrix product
(sgemm) is taken in the same turns: the share says how much of it the training step reaches, counting the
multiplications of the plain algorithm, so that one that needs fewer (Winograd's) may pass 100 %.

    python bench.py --quick
    python bench.py --pairs 15 --only serial
"""

import json
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import serial_cnn
import train_cifar
from common import (
    SGD,
    InputError,
    Parser,
    atomic_write,
    available_cores,
    blas_warning,
    check_outputs,
    environment,
    limit_blas_threads,
    load_batch,
    load_cifar10,
    make_cnn,
    number,
    run_main,
    table,
)


class Contest(NamedTuple):
    name: str
    images: int  # in a call of ours() or peer()
    threads: int
    ours: callable  # one training step
    peer: callable
    flops: float  # of a training step, counted by PyTorch


def serial_contest(data, batch_size):
    """serial_cnn.py's step against PyTorch eager on one thread, float32, channels_last (its faster layout)."""
    x, labels = load_batch(data.x_train, data.y_train, np.arange(batch_size))
    model = make_cnn()
    optimizer = SGD(model, lr=1e-3)
    peer, flops = pytorch_step("cnn", x, labels, channels_last=True)
    name = f"serial_cnn.py, CNN, batch {batch_size}, 1 core"
    return Contest(name, batch_size, 1, lambda: serial_cnn.train_step(model, optimizer, x, labels), peer, flops)


def train_cifar_contest(data, model_name, batch_size):
    """train_cifar.py's step (channels_last, --amp auto) against the usual one (NCHW, float32), on all cores, CPU."""
    device, threads = torch.device("cpu"), len(available_cores())
    x, labels = load_batch(data.x_train, data.y_train, np.arange(batch_size))
    peer, flops = pytorch_step(model_name, x, labels, channels_last=False)
    model = train_cifar.make_model(model_name).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9)
    amp = train_cifar.choose_amp("auto", device)
    ours_x, ours_y = train_cifar.load_batch(data.x_train, data.y_train, np.arange(batch_size), device)
    name = f"train_cifar.py, {model_name}, batch {batch_size}, {threads} cores"
    return Contest(name, batch_size, threads,
                   lambda: train_cifar.train_step(model, optimizer, ours_x, ours_y, amp), peer, flops)  # fmt: skip


def pytorch_step(model_name, x, labels, channels_last):
    """A training step as PyTorch's tutorials write it, and its FLOPs. x (N, 32, 32, 3), labels (N,): NumPy arrays."""
    model = train_cifar.make_model(model_name)
    x, labels = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()
    if channels_last:
        model, x = (a.to(memory_format=torch.channels_last) for a in (model, x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    with FlopCounterMode(display=False) as counter:
        step()
    return step, counter.get_total_flops()


def sgemm():
    """A product of two 1024×1024 float32 matrices: 2·1024³ floating-point operations."""
    a = np.ones((1024, 1024), np.float32)
    return lambda: a @ a


def rate(step, seconds):
    """Calls per second of step(), called until `seconds` have passed, at least twice."""
    started, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - started < seconds:
        step()
        calls += 1
    return calls / (time.perf_counter() - started)


def compete(contest, pairs, seconds):
    """Measure pairs of turns; returns the entry for bench.json and the share of the sgemm rate."""
    torch.set_num_threads(contest.threads)
    limit_blas_threads(contest.threads)
    product = sgemm()
    turns = []
    for turn in range(pairs + 1):
        ours, peer = rate(contest.ours, seconds), rate(contest.peer, seconds)
        if turn:  # the first is the warm-up
            turns.append((contest.images * ours, contest.images * peer, rate(product, seconds / 5)))
        if sys.stderr.isatty():
            print(f"\r{contest.name}: pair {turn}/{pairs} ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    ours, peer, gemm = zip(*turns, strict=True)
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    per_image = contest.flops / contest.images
    share = statistics.median(a * per_image / (g * 2 * 1024**3) for a, g in zip(ours, gemm, strict=True))
    row = {"name": contest.name, "ours": statistics.median(ours), "peer": statistics.median(peer), "unit": "images/s",
           "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "n": pairs}
    return row, share


def describe_machine():
    env = environment()
    blas = ", ".join(f"{b['library']} {b['version']} ({b['kernel']} kernels)" for b in env["blas"])
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return f"{env['cpu']}, {len(env['cores'])} cores; {blas}; {versions}"


def parse_args(argv=None):
    parser = Parser("bench", __doc__)
    parser.add_argument("--quick", action="store_true", help="fewer networks and shorter turns: within a minute")
    parser.add_argument("--pairs", type=number(int, 7, 1000), default=11, help="of turns (default: %(default)s)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only the rows whose name contains TEXT")
    parser.add_argument("--data-dir", help="folder with CIFAR-10 (default: $CIFAR10_DIR, else ./data)")
    parser.add_argument("--dataset", choices=("auto", "cifar10", "synthetic"), default="auto")
    parser.add_argument("--output", metavar="FILE", default="results/bench.json", help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    pairs, seconds = (7, 0.25) if args.quick else (args.pairs, 1.0)
    check_outputs([args.output])
    data = load_cifar10(args.data_dir, args.dataset, subset=128)
    contests = {
        "serial_cnn.py, CNN, batch 32": lambda: serial_contest(data, 32),
        "serial_cnn.py, CNN, batch 128": lambda: serial_contest(data, 128),
        "train_cifar.py, cnn": lambda: train_cifar_contest(data, "cnn", 32),
        "train_cifar.py, resnet18": lambda: train_cifar_contest(data, "resnet18", 32 if args.quick else 64),
        "train_cifar.py, resnet50": lambda: train_cifar_contest(data, "resnet50", 64),
    }
    if args.quick:
        del contests["train_cifar.py, resnet50"]
    chosen = [make for name, make in contests.items() if args.only in name]
    if not chosen:
        raise InputError(f"--only {args.only}: no such row; there are: " + "; ".join(contests))
    print(describe_machine(), flush=True)
    if warning := blas_warning():
        print(warning, flush=True)
    results = [compete(make(), pairs, seconds) for make in chosen]
    lines = [[row["name"], f"{row['ours']:,.0f}", f"{row['peer']:,.0f}",
              f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})", str(row["n"]), f"{share:.0%}"]
             for row, share in results]  # fmt: skip
    print(table(("training, images/s", "ours", "PyTorch", "ratio (min–max)", "n", "of sgemm"), lines))
    with atomic_write(args.output, "w") as file:
        json.dump([row for row, _ in results], file, indent=1)
    print(f"written: {args.output}")


if __name__ == "__main__":
    run_main(main)
