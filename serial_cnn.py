"""Train a CNN or ResNet-18 on CIFAR-10 on one core with NumPy alone: the baseline of every speed-up in this repository.

A fair baseline is a fast one. The layers (common.py) work through the batch in pieces that stay in the cache, fuse
convolution, bias, ReLU and pooling, and reuse every buffer; BLAS is held to one thread, whatever the environment says.
The parallel scripts follow this loop line by line: `diff serial_cnn.py parallel_cnn_mpi.py` shows the parallelism.

    python serial_cnn.py
    python serial_cnn.py --epochs 2 --subset 5000 --batch-size 64 --lr 0.02
    python serial_cnn.py --optimizer adam --dtype float64 --dataset synthetic --subset 1000 --epochs 1
    python serial_cnn.py --model resnet18 --batch-size 64 --epochs 1 --subset 1000
    python serial_cnn.py --checkpoint results/serial.ckpt.npz            # Ctrl-C, then add --resume
"""

import math
import sys
import time

import numpy as np

from common import (
    MODELS,
    Run,
    blas_warning,
    count_correct,
    epoch_order,
    evaluate,
    get_arrays,
    limit_blas_threads,
    load_batch,
    load_cifar10,
    make_model,
    make_optimizer,
    make_parser,
    run_main,
    set_arrays,
    softmax_cross_entropy,
)


def train_step(model, optimizer, x, labels):
    """One step on one batch. Returns the summed loss, the logits and the seconds of the forward and backward pass."""
    started = time.perf_counter()
    logits = model.forward(x)
    loss, dlogits = softmax_cross_entropy(logits, labels)
    forward = time.perf_counter()
    model.backward(dlogits)
    backward = time.perf_counter()
    optimizer.step(len(labels))
    return loss, logits, forward - started, backward - forward


def train(model, optimizer, data, args, run):
    """Train for args.epochs epochs on data; everything measured goes to run."""
    n, size = len(data.y_train), args.batch_size
    for epoch in range(run.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        run.start_epoch(epoch, math.ceil(n / size))
        for batch in range(run.batch, math.ceil(n / size)):
            started = time.perf_counter()
            x, labels = load_batch(
                data.x_train, data.y_train, order[batch * size : (batch + 1) * size], args.dtype
            )
            loading = time.perf_counter() - started
            loss, logits, forward, backward = train_step(model, optimizer, x, labels)
            correct = count_correct(logits, labels)
            run.end_batch(len(labels), loss, *correct, loading, forward=forward, backward=backward)
        run.end_training()
        run.end_epoch(*evaluate(model, data.x_test, data.y_test))


def parse_args(argv=None):
    parser = make_parser("serial_cnn", __doc__, MODELS)
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    limit_blas_threads(1)
    if warning := blas_warning():
        print(warning, file=sys.stderr)
    data = load_cifar10(args.data_dir, args.dataset, args.subset, args.seed)
    model = make_model(args.model, args.seed, np.dtype(args.dtype))
    optimizer = make_optimizer(model, args)
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # run stops at the first loss that is not finite
        with Run(
            args,
            "serial_cnn",
            data,
            lambda: get_arrays(model, optimizer),
            lambda arrays: set_arrays(model, optimizer, arrays),
        ) as run:
            train(model, optimizer, data, args, run)
            run.finish()


if __name__ == "__main__":
    run_main(main)
