"""Train ResNet-50, ResNet-18 or the CNN on CIFAR-10 with PyTorch, on a CPU or a GPU.

What the usual script leaves out and this one has: channels_last memory, bfloat16 where the processor computes in it,
and images that stay uint8 until they are on the device. Loading and total time are logged apart, batch by batch.

    make train-cifar
    python train_cifar.py --model resnet18 --epochs 1 --subset 5000
    python train_cifar.py --model cnn --batch-size 32 --amp off --epochs 10
    python train_cifar.py --model resnet50 --epochs 30 --batch-size 128 --lr 0.05 --device cuda
    python train_cifar.py --epochs 2 --subset 5000 --checkpoint results/resnet.ckpt.npz      # Ctrl-C, then add --resume
"""

import contextlib
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import (
    MEAN,
    MIB,
    STD,
    InputError,
    Run,
    epoch_order,
    import_torchvision,
    load_cifar10,
    make_parser,
    run_main,
)

CPU_DEFAULT = {"subset": 5000, "epochs": 2}  # what a CPU can train of ResNet-50 in a few minutes


def make_model(name):
    """`cnn` as in common.make_cnn, or torchvision's ResNet with the CIFAR stem: (N, 3, 32, 32) → logits (N, 10).

    The CIFAR stem is a 3×3 convolution with stride 1 and no pooling: He et al., "Deep Residual Learning", 2015, §4.2.
    """
    if name == "cnn":
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(4096, 256), nn.ReLU(), nn.Linear(256, 10),
        )  # fmt: skip
        for layer in model:
            if hasattr(layer, "weight"):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        return model
    model = getattr(import_torchvision().models, name)(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def make_optimizer(model, args):
    """SGD or Adam, its state made at once, so that a checkpoint holds the same arrays before and after a step."""
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    for p in model.parameters():
        like_p = ("exp_avg", "exp_avg_sq") if args.optimizer == "adam" else ("momentum_buffer",)
        optimizer.state[p] = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in like_p}
        if args.optimizer == "adam":
            optimizer.state[p]["step"] = torch.zeros(())
    return optimizer


def load_batch(images, labels, index, device):
    """The images at `index` as normalised (N, 3, 32, 32) in channels_last memory, and their labels, on the device."""
    x = torch.from_numpy(images[index]).to(device, non_blocking=True)  # uint8: a quarter of the bytes to move
    y = torch.from_numpy(labels[index]).to(device, non_blocking=True)
    scale = 1 / (255 * torch.tensor(STD, device=device))
    shift = torch.tensor(MEAN, device=device) / torch.tensor(STD, device=device)
    return torch.addcmul(-shift, x.float(), scale).permute(0, 3, 1, 2), y.long()


def train_step(model, optimizer, x, labels, amp=None, scaler=None):
    """One step on one batch. Returns the mean loss, the logits and the seconds of forward and backward pass.

    amp: the type for autocast, None for float32. scaler: a GradScaler for float16. The seconds are None on a GPU,
    which works behind the clock's back.
    """
    started = time.perf_counter()
    optimizer.zero_grad()
    with torch.autocast(x.device.type, amp) if amp else contextlib.nullcontext():
        logits = model(x)
        loss = F.cross_entropy(logits.float(), labels)
    forward = time.perf_counter()
    (scaler.scale(loss) if scaler else loss).backward()
    backward = time.perf_counter()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    phases = {} if x.is_cuda else {"forward": forward - started, "backward": backward - forward}
    return loss.detach(), logits.detach(), phases


def warm_up(model, data, args, device, amp):
    """Let the libraries choose and build their kernels for this batch's shape, on a copy that is thrown away."""
    model = copy.deepcopy(model)
    x, labels = load_batch(data.x_train, data.y_train, np.arange(min(args.batch_size, len(data.y_train))), device)
    train_step(model, torch.optim.SGD(model.parameters(), 0.0), x, labels, amp)[0].item()


def count_correct(logits, labels):
    hits = logits.float().topk(5).indices == labels[:, None]
    return hits[:, 0].sum().item(), hits.sum().item()  # .item() waits for the GPU


def train(model, optimizer, data, args, run, device, amp, scaler):
    """Train for args.epochs epochs on data; everything measured goes to run."""
    n, size = len(data.y_train), args.batch_size
    for epoch in range(run.epoch, args.epochs + 1):
        order = epoch_order(n, args.seed, epoch)
        run.start_epoch(epoch, math.ceil(n / size))
        for batch in range(run.batch, math.ceil(n / size)):
            started = time.perf_counter()
            x, labels = load_batch(data.x_train, data.y_train, order[batch * size:(batch + 1) * size], device)
            loading = time.perf_counter() - started
            loss, logits, phases = train_step(model, optimizer, x, labels, amp, scaler)
            correct = count_correct(logits, labels)
            run.end_batch(len(labels), loss.item() * len(labels), *correct, loading, **phases)
        run.end_training()
        run.end_epoch(*evaluate(model, data.x_test, data.y_test, device, amp))


@torch.inference_mode()
def evaluate(model, images, labels, device, amp=None, batch_size=250):
    """Mean loss, top-1 and top-5 accuracy, and seconds spent loading batches."""
    model.eval()
    loss, top1, top5, loading = 0.0, 0, 0, 0.0
    for start in range(0, len(labels), batch_size):
        clock = time.perf_counter()
        x, y = load_batch(images, labels, np.arange(start, min(start + batch_size, len(labels))), device)
        loading += time.perf_counter() - clock
        with torch.autocast(device.type, amp) if amp else contextlib.nullcontext():
            logits = model(x).float()
        correct = count_correct(logits, y)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        top1, top5 = top1 + correct[0], top5 + correct[1]
    model.train()
    return loss / len(labels), top1 / len(labels), top5 / len(labels), loading


def get_tensors(model, optimizer):
    """The tensors that a checkpoint needs besides the parameters: {name: tensor}."""
    buffers = {f"buffer_{name}": buffer for name, buffer in model.named_buffers()}
    for i, p in enumerate(model.parameters()):
        buffers.update({f"optimizer_{name}_{i}": tensor for name, tensor in optimizer.state[p].items()})
    return buffers


def get_arrays(model, optimizer, scaler):
    arrays = {name: tensor.cpu().numpy() for name, tensor in get_tensors(model, optimizer).items()}
    arrays["params"] = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu().numpy()
    if scaler:
        state = scaler.state_dict()
        arrays["scaler"] = np.array([state["scale"], state["_growth_tracker"]])
    return arrays


def set_arrays(model, optimizer, scaler, arrays):
    params = torch.from_numpy(arrays["params"]).to(next(model.parameters()).device)
    with torch.no_grad():
        for p, part in zip(model.parameters(), params.split([p.numel() for p in model.parameters()]), strict=True):
            p.copy_(part.view(p.shape))  # in place: p keeps its memory format
    for name, tensor in get_tensors(model, optimizer).items():
        tensor.copy_(torch.from_numpy(arrays[name]))
    if scaler:
        scale, growth = arrays["scaler"]
        scaler.load_state_dict({**scaler.state_dict(), "scale": float(scale), "_growth_tracker": int(growth)})


def choose_amp(amp, device):
    """The type for autocast, or None. auto: bfloat16 where the hardware computes in it, else float16 on a GPU."""
    if amp == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16 needs a GPU: use --amp bf16 or off")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        amp = "bf16" if any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16")) else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def parse_args(argv=None):
    parser = make_parser("train_cifar", __doc__, ("resnet50", "resnet18", "cnn"), batch_size=64, epochs=None)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
                        help="mixed precision; auto: where the hardware has it (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        why = "this build of torch has no CUDA" if not torch.version.cuda else "no NVIDIA GPU with a driver is found"
        raise InputError(f"--device cuda: {why}: use --device cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and args.epochs is None and args.subset is None:
        args.epochs, args.subset = CPU_DEFAULT["epochs"], CPU_DEFAULT["subset"]
        print(f"On a CPU: {args.subset:,} images and {args.epochs} epochs. The full run: "
              f"python train_cifar.py --model {args.model} --epochs 10 --subset 50000", flush=True)
    args.epochs = args.epochs or 10
    return args


def main(argv=None):
    args = parse_args(argv)
    device, amp = torch.device(args.device), choose_amp(args.amp, torch.device(args.device))
    args.amp = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[amp]
    data = load_cifar10(args.data_dir, args.dataset, args.subset, args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    model = make_model(args.model).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type) if amp is torch.float16 else None
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None
    info = {"device": torch.cuda.get_device_name(device) if gpu else "cpu", "threads": torch.get_num_threads()}
    state = (model, optimizer, scaler)
    warm_up(model, data, args, device, amp)
    with Run(args, "train_cifar", data, lambda: get_arrays(*state), lambda a: set_arrays(*state, a), info,
             gpu_uuid=gpu) as run:  # fmt: skip
        train(model, optimizer, data, args, run, device, amp, scaler)
        if gpu:
            run.totals["peak_gpu_allocated_mb"] = torch.cuda.max_memory_allocated(device) / MIB
        run.finish()


if __name__ == "__main__":
    run_main(main)
