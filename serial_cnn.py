"""Train a CNN or ResNet-18 on CIFAR-10 on one core with NumPy: the baseline of every speed-up.

A fair baseline is a fast one, so this script climbs a ladder: --conv chooses how the convolutions
are computed, from loops that anyone can read to the fastest way known here. All rungs are the same
function; each is one idea faster than the one before.

    loops       a Python loop over the positions of the output: LoopConv2D, below
    im2col      all windows of the batch in one matrix, one product: Im2colConv2D, below
    blocked     the same for a few images at a time, in the cache: Conv2D in common.py
    fused       convolution, bias, ReLU and pooling in one pass: ConvReLUPool in common.py
    winograd    a quarter of the multiplications: WinogradReLUPool in common.py; the default

BLAS is held to one thread, whatever the environment says. parallel_cnn_mpi.py has the same function
`train`: what differs there is what makes it parallel.

    python serial_cnn.py
    python serial_cnn.py --conv loops --epochs 1 --subset 2000
    python serial_cnn.py --epochs 2 --subset 5000 --batch-size 64 --lr 0.02
    python serial_cnn.py --optimizer adam --dtype float64 --dataset synthetic --subset 1000
    python serial_cnn.py --model resnet18 --batch-size 64 --epochs 1 --subset 1000
    python serial_cnn.py --checkpoint results/serial.ckpt.npz            # Ctrl-C, then add --resume

Result: the CNN on one core. Batch 32: 1,467 images/s, 1.75 (1.12–1.88) times PyTorch's 872. Batch
128: 1,505 images/s, 1.40 (1.06–1.50) times PyTorch's 1,153 (AMD EPYC; median (min–max) of 11 paired
samples). 10 epochs on all of CIFAR-10 take 371 s; the best test accuracy, in epoch 4, is 68.96%.
"""

import math
import sys

import numpy as np

from common import (
    IMAGE_SHAPE,
    MODELS,
    OUTPUT_STD,
    BasicBlock,
    BatchNorm2D,
    Checkpoint,
    Conv2D,
    ConvReLUPool,
    Dense,
    Flatten,
    GlobalAvgPool,
    MaxPool2D,
    Model,
    ReLU,
    RunLog,
    StopSignal,
    WinogradConv2D,
    WinogradReLUPool,
    add_recipe_options,
    blas_warning,
    check_network_size,
    count_correct,
    draw_augmentation,
    epoch_order,
    evaluate,
    learning_rate,
    limit_blas_threads,
    load_batch,
    load_dataset,
    make_optimizer,
    make_parser,
    require_finite,
    run_main,
    save_and_stop,
    softmax_cross_entropy,
    winograd_fits,
)

# --------------------------------------------------------------------------------------------------
# The first two rungs of the ladder: a convolution, forward and backward, in plain NumPy
# --------------------------------------------------------------------------------------------------


class LoopConv2D(Conv2D):
    """Rung 1, the definition: a loop over the positions (i, j) of the output.

    The window of the input at (i, j), for all images at once, times the weights. Python and NumPy
    start several operations for each position, on small arrays: that overhead is most of the time.
    Of Conv2D it uses the parameters W and b, and their gradients dW and db.
    """

    def forward(self, x):
        """x (N, H, W, C_in) → out (N, OH, OW, C_out)"""
        k = self.kernel_size
        s = self.stride
        p = self.padding
        n, h, w, _ = x.shape
        c_out = self.b.size
        out_h = (h + 2 * p - k) // s + 1
        out_w = (w + 2 * p - k) // s + 1

        self.padded = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
        W = self.W.reshape(-1, c_out)  # (K·K·C_in, C_out)
        out = np.empty((n, out_h, out_w, c_out), x.dtype)
        for i in range(out_h):
            for j in range(out_w):
                window = self.padded[:, i * s : i * s + k, j * s : j * s + k]  # (N, K, K, C_in)
                out[:, i, j] = window.reshape(n, -1) @ W + self.b
        return out

    def backward(self, dout):
        """dout (N, OH, OW, C_out) → dx (N, H, W, C_in); sets dW and db.

        out[i, j] = window(i, j) @ W + b, so by the chain rule every position adds
        window(i, j)ᵀ @ dout[i, j] to dW, and dout[i, j] @ Wᵀ to the gradient of its window.
        """
        k = self.kernel_size
        s = self.stride
        p = self.padding
        n, out_h, out_w, c_out = dout.shape

        W = self.W.reshape(-1, c_out)
        dW = np.zeros_like(W)
        dpadded = np.zeros_like(self.padded)
        for i in range(out_h):
            for j in range(out_w):
                window = self.padded[:, i * s : i * s + k, j * s : j * s + k]
                dW += window.reshape(n, -1).T @ dout[:, i, j]
                dwindow = (dout[:, i, j] @ W.T).reshape(window.shape)
                dpadded[:, i * s : i * s + k, j * s : j * s + k] += dwindow

        self.dW[...] = dW.reshape(self.W.shape)
        self.db[...] = dout.sum(axis=(0, 1, 2))
        _, padded_h, padded_w, _ = dpadded.shape
        return dpadded[:, p : padded_h - p, p : padded_w - p]  # without the padding


class Im2colConv2D(Conv2D):
    """Rung 2: copy every window of the batch into a row of one matrix, then one product.

    Faster because one large product replaces a thousand small ones: BLAS runs near the peak of the
    core. It costs memory: the matrix is K² times as large as the input (38 MB for the CNN's second
    layer at batch 128), so it goes out to main memory and comes back.
    """

    def forward(self, x):
        """x (N, H, W, C_in) → out (N, OH, OW, C_out)"""
        self.x_shape = x.shape
        windows = self._windows(x)  # of Conv2D: (N, OH, OW, K, K, C_in), a view
        n, out_h, out_w = windows.shape[:3]
        c_out = self.b.size

        # Windows overlap in memory, so that reshape() has to copy them: (N·OH·OW, K·K·C_in).
        self.col = windows.reshape(n * out_h * out_w, -1)
        out = self.col @ self.W.reshape(-1, c_out)
        if self.has_bias:
            out += self.b
        return out.reshape(n, out_h, out_w, c_out)

    def backward(self, dout):
        """dout (N, OH, OW, C_out) → dx (N, H, W, C_in); sets dW and db."""
        k = self.kernel_size
        s = self.stride
        p = self.padding
        n, out_h, out_w, c_out = dout.shape
        _, h, w, c_in = self.x_shape
        dy = dout.reshape(-1, c_out)  # (N·OH·OW, C_out)

        self.dW[...] = (self.col.T @ dy).reshape(self.W.shape)
        if self.has_bias:
            self.db[...] = dy.sum(axis=0)
        if not self.requires_input_grad:
            return None

        # Every window's gradient goes back to where the window was copied from (col2im): for each
        # place (i, j) in the kernel, one addition for all windows at once.
        dcol = dy @ self.W.reshape(-1, c_out).T
        dwindows = dcol.reshape(n, out_h, out_w, k, k, c_in)
        dpadded = np.zeros((n, h + 2 * p, w + 2 * p, c_in), dout.dtype)
        for i in range(k):
            for j in range(k):
                dpadded[:, i : i + s * out_h : s, j : j + s * out_w : s] += dwindows[:, :, :, i, j]
        return dpadded[:, p : p + h, p : p + w]


CONV_RUNGS = ("loops", "im2col", "blocked", "fused", "winograd")


def make_layers(model, conv, rng, dtype, image_shape=IMAGE_SHAPE, classes=10):
    """The layers of --model with the convolutions of --conv; the same weights on all rungs.

    image_shape: (H, W, C). For your own network return a list of its layers here.
    """
    h, w, channels = image_shape
    options = {"rng": rng, "dtype": dtype}
    plain = {"loops": LoopConv2D, "im2col": Im2colConv2D, "blocked": Conv2D, "fused": Conv2D}

    if model == "cnn":
        check_network_size(model, image_shape)
        # Rungs 1 to 3 compute convolution, ReLU and pooling one after the other. Rungs 4 and 5 do
        # it in one pass, while a few images are in the cache: less traffic to memory.
        if conv == "winograd" and winograd_fits(h // 2, w // 2):
            features = [ConvReLUPool(channels, 32, **options), WinogradReLUPool(32, 64, **options)]
        elif conv in ("fused", "winograd"):
            features = [ConvReLUPool(channels, 32, **options), ConvReLUPool(32, 64, **options)]
        else:
            Conv = plain[conv]
            first = [Conv(channels, 32, **options), ReLU(), MaxPool2D(2)]
            second = [Conv(32, 64, **options), ReLU(), MaxPool2D(2)]
            features = first + second
        return [
            *features,
            Flatten(),
            Dense(64 * (h // 4) * (w // 4), 256, **options),
            ReLU(),
            Dense(256, classes, std=OUTPUT_STD, **options),
        ]

    # ResNet-18 has no pooling after its convolutions, so "fused" is "blocked" here. Winograd's
    # filtering needs stride 1 and whole tiles: the other convolutions are blocked.
    OtherConv = Conv2D if conv == "winograd" else plain[conv]
    layers = [OtherConv(channels, 64, bias=False, **options), BatchNorm2D(64, dtype=dtype), ReLU()]
    channels = 64
    for width in (64, 128, 256, 512):
        for stride in (1 if width == 64 else 2, 1):  # two blocks; the first may halve the image
            h = -(-h // stride)  # rounded up, as a 3×3 convolution with padding 1 does
            w = -(-w // stride)
            Conv = WinogradConv2D if conv == "winograd" and winograd_fits(h, w) else OtherConv
            block = BasicBlock(channels, width, stride, conv=Conv, other_conv=OtherConv, **options)
            layers.append(block)
            channels = width
    return [*layers, GlobalAvgPool(), Dense(512, classes, std=OUTPUT_STD, **options)]


def make_model(args, image_shape=IMAGE_SHAPE, classes=10):
    """The network that --model and --conv name; your own layers go into make_layers."""
    rng = np.random.default_rng(args.seed)
    dtype = np.dtype(args.dtype)
    return Model(make_layers(args.model, args.conv, rng, dtype, image_shape, classes))


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def train(model, optimizer, data, args, log, checkpoint, stop):
    """Train until epoch args.epochs is done.

    Begins at log.epoch and log.batch: where the checkpoint of --resume was saved, or at first.
    """
    n = len(data.y_train)
    batches = math.ceil(n / args.batch_size)
    log.trace_layers(model)
    for epoch in range(log.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        aug_params = draw_augmentation(n, args.seed, epoch) if args.augment == "on" else None
        log.start_epoch(epoch, batches)
        for batch in range(log.batch, batches):
            optimizer.lr = learning_rate(args, (epoch - 1 + batch / batches) / args.epochs)

            with log.timed("loading"):
                index = order[batch * args.batch_size : (batch + 1) * args.batch_size]
                x, labels = load_batch(
                    data.x_train, data.y_train, index, args.dtype, data.mean, data.std, aug_params
                )

            with log.timed("forward"):
                logits = model.forward(x)
                loss, dlogits = softmax_cross_entropy(logits, labels)

            with log.timed("backward"):
                model.backward(dlogits)

            with log.timed("update"):
                optimizer.step(len(labels))  # divides the summed gradients by the number of images

            log.end_batch(len(labels), loss, *count_correct(logits, labels))
            require_finite(loss, "loss", log)
            if stop.requested:
                save_and_stop(checkpoint, log, stop)  # raises Interrupted
            if checkpoint.due():
                checkpoint.save()

        log.end_training()
        loss, top1, top5, loading = evaluate(
            model,
            data.x_test,
            data.y_test,
            mean=data.mean,
            std=data.std,
            confusion=log.confusion,
        )
        log.end_epoch(loss, top1, top5, loading)
        require_finite(loss, "validation loss", log)
        checkpoint.save()
        if stop.requested and epoch < args.epochs:
            save_and_stop(checkpoint, log, stop)


def parse_args(argv=None):
    parser = make_parser(__file__, __doc__, MODELS)
    add = parser.add_argument
    add("--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    conv = "how convolutions are computed (default: %(default)s)"
    add("--conv", choices=CONV_RUNGS, default="winograd", help=conv)
    add_recipe_options(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    limit_blas_threads(1)
    warning = blas_warning()
    if warning:
        print(warning, file=sys.stderr)

    data = load_dataset(args.data_dir, args.dataset, args.subset, args.seed)
    model = make_model(args, data.image_shape, len(data.classes))
    optimizer = make_optimizer(model, args)
    log = RunLog(args, __file__, data)
    checkpoint = Checkpoint(args, log, model, optimizer)
    if args.resume:
        checkpoint.load()

    # Overflows need no warning: the run stops at the first loss that is not finite.
    with np.errstate(over="ignore", invalid="ignore"), StopSignal() as stop, log:
        train(model, optimizer, data, args, log, checkpoint, stop)
        log.finish()


if __name__ == "__main__":
    run_main(main)
