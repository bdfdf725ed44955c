"""train_cifar.py: the networks, the step beside a plain PyTorch one, mixed precision, log, resume, bad input."""

import copy
import csv
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPO, assert_one_error_line, count_rows, finish, pausing, start, wait_until
from PIL import Image
from torch.nn import functional as F

import train_cifar
from common import MEAN, STD, InputError, make_cnn, make_synthetic

TINY = ("--dataset", "synthetic", "--subset", 48, "--batch-size", 16, "--model", "cnn")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


SIZES = {"cnn": 1_070_794, "resnet18": 11_173_962, "resnet50": 23_520_842}


@pytest.mark.parametrize(("name", "parameters"), SIZES.items())
def test_networks_have_the_published_size_and_ten_logits(name, parameters):
    model = train_cifar.make_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_cnn_starts_from_the_same_distribution_as_from_scratch():
    torch.manual_seed(0)
    ours = [
        leaf.W.std() for layer in make_cnn(0).layers for leaf in layer.leaves() if leaf.param_names
    ]
    theirs = [
        layer.weight.std().item()
        for layer in train_cifar.make_model("cnn")
        if hasattr(layer, "weight")
    ]
    assert theirs == pytest.approx(ours, rel=0.1)


def test_resnet50_begins_with_blocks_that_pass_their_input_on():
    """Each block adds nothing to its shortcut at first: Goyal et al., 2017, §5.1."""
    scales = [
        p
        for name, p in train_cifar.make_model("resnet50").named_parameters()
        if name.endswith("bn3.weight")
    ]
    assert len(scales) == 16
    assert not any(p.any() for p in scales)


def test_cifar_stem_keeps_the_resolution():
    """8 × 8 positions of 512 channels reach ResNet-18's last block: no stride and no pooling in the stem."""
    model = train_cifar.make_model("resnet18").eval()
    shapes = []
    model.layer4.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    model.layer1.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    model(torch.zeros(1, 3, 32, 32))
    assert shapes == [(1, 64, 32, 32), (1, 512, 4, 4)]


CPU = torch.device("cpu")
SETUP = train_cifar.Setup(CPU, None, None, train_cifar.Loader(0), train_cifar.World())


def load(images, labels, index, draws=None, device=CPU):
    return train_cifar.finish_batch(
        *train_cifar.make_batch(train_cifar.Arrays(images, labels), draws, device, index), CPU
    )


def test_batch_is_normalised_into_channels_last():
    images, labels, *_ = make_synthetic(20)
    index = np.array([3, 17, 5])
    x, y = load(images, labels, index)
    expected = (images[index] / 255 - np.array(MEAN)) / np.array(STD)
    assert x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert y.tolist() == labels[index].tolist()


def test_step_is_the_plain_pytorch_step():
    """channels_last changes the memory, not the computation: three steps equal those of the tutorial's loop."""
    images, labels, *_ = make_synthetic(8)
    x, y = load(images, labels, np.arange(8))
    torch.manual_seed(1)
    ours = train_cifar.make_model("resnet18").to(memory_format=torch.channels_last).double()
    plain = train_cifar.make_model("resnet18").double()
    plain.load_state_dict(ours.state_dict())
    args = train_cifar.parse_args(
        ["--lr", "0.01", "--weight-decay", "0.001", "--subset", "8", "--device", "cpu"]
    )
    optimizer = train_cifar.make_torch_optimizer(ours, args)
    reference = torch.optim.SGD(plain.parameters(), 0.01, 0.9, weight_decay=0.001)
    for _ in range(3):
        loss, logits, phases = train_cifar.train_step(ours, optimizer, x.double(), y)
        reference.zero_grad()
        expected = F.cross_entropy(plain(x.double().contiguous()), y)
        expected.backward()
        reference.step()
        assert loss.item() == pytest.approx(
            expected.item(), rel=1e-6
        )  # ours takes the loss in float32
        assert phases["forward"] > 0
        assert phases["backward"] > 0
        assert logits.shape == (8, 10)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_count_correct_top1_and_top5():
    logits = torch.arange(10.0).repeat(3, 1)
    assert train_cifar.count_correct(logits, torch.tensor([9, 5, 0])) == (1, 2)


def test_evaluation_leaves_the_model_as_it_was():
    images, labels, *_ = make_synthetic(20)
    model = train_cifar.make_model("resnet18")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss, top1, top5, loading = train_cifar.evaluate(
        model, train_cifar.Arrays(images, labels), SETUP, batch_size=8
    )
    assert model.training
    assert 0 <= top1 <= top5 <= 1
    assert loss > 0
    assert loading > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_choose_amp(monkeypatch):
    cpu = torch.device("cpu")
    assert train_cifar.choose_amp("off", cpu) is None
    assert train_cifar.choose_amp("bf16", cpu) is torch.bfloat16
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        train_cifar.choose_amp("fp16", cpu)
    for flags, expected in (("fpu avx512_bf16", torch.bfloat16), ("fpu avx2", None)):
        monkeypatch.setattr(train_cifar.Path, "read_text", lambda _, flags=flags: flags)
        assert train_cifar.choose_amp("auto", cpu) is expected


def test_bfloat16_step_is_near_the_float32_step():
    images, labels, *_ = make_synthetic(16)
    x, y = load(images, labels, np.arange(16))
    torch.manual_seed(1)
    model = train_cifar.make_model("cnn")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    exact, *_ = train_cifar.train_step(model, optimizer, x, y)
    mixed, logits, _ = train_cifar.train_step(model, optimizer, x, y, torch.bfloat16)
    assert logits.dtype is torch.bfloat16
    assert mixed.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.dtype is torch.float32 for p in model.parameters())


def test_run_writes_log_sidecar_and_table(run_script, tmp_path):
    done = run_script("train_cifar.py", *TINY, "--epochs", 2)
    assert "SYNTHETIC DATA" in done.stdout
    rows = list(csv.DictReader(open(tmp_path / "results/train_cifar.csv")))
    assert [row["type"] for row in rows] == ["2", "2", "2", "0", "1"] * 2
    train = rows[3]
    assert float(train["images_per_s"]) == pytest.approx(48 / float(train["duration"]), rel=1e-4)
    assert 0 <= float(train["value1"]) <= float(train["value2"]) <= 1  # top-1 and top-5
    assert float(train["loading"]) + float(train["forward"]) + float(train["backward"]) <= float(
        train["duration"]
    )
    sidecar = json.loads((tmp_path / "results/train_cifar.json").read_text())
    assert sidecar["status"] == "done"
    assert sidecar["device"] == "cpu"
    assert sidecar["arguments"]["amp"] in ("bf16", "off")
    assert sidecar["versions"]["torch"] == torch.__version__


def test_cpu_default_is_small_and_says_so():
    """With neither --epochs nor --subset a CPU takes 5,000 images and 2 epochs, and the full command is printed."""
    command = [
        sys.executable,
        "-c",
        "import train_cifar; print(vars(train_cifar.parse_args(['--device', 'cpu'])))",
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert "5,000 images and 2 epochs" in done.stdout
    assert "the same with --epochs 10" in done.stdout
    assert "'epochs': 2" in done.stdout
    assert "'subset': 5000" in done.stdout
    args = train_cifar.parse_args(["--device", "cpu", "--epochs", "3"])
    assert (args.epochs, args.subset) == (3, None)


@pytest.mark.parametrize(
    "options",
    [
        ("--schedule", "one-cycle", "--nesterov", "--label-smoothing", 0.1, "--workers", 2),
        ("--optimizer", "adam", "--amp", "bf16", "--workers", 0),
    ],
    ids=["sgd", "adam-bf16"],
)
def test_interrupted_run_resumes_bit_for_bit(run_script, tmp_path, options):
    """SIGINT in the first epoch, then --resume: parameters, running statistics and optimizer of an unbroken run."""
    # one thread: two that wait for each other take minutes where other processes have the cores
    tiny = (*TINY[:-1], "resnet18", "--epochs", 2, "--threads", 1, "--quiet", *options)
    run_script("train_cifar.py", *tiny, "--checkpoint", "whole.npz")
    log = tmp_path / "results/train_cifar.csv"
    log.unlink()
    script = pausing(tmp_path, "train_cifar.py", epoch=1, batch=1)
    process = start(tmp_path, script, *tiny, "--checkpoint", "broken.npz")
    wait_until(process, lambda: count_rows(log) >= 1)
    process.send_signal(signal.SIGINT)
    _, stderr = finish(process, status=130)
    assert "--resume" in stderr
    run_script("train_cifar.py", *tiny, "--checkpoint", "broken.npz", "--resume")
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "broken.npz") as broken:
        assert set(whole.files) == set(broken.files)
        for name in set(whole.files) - {"meta"}:
            np.testing.assert_array_equal(whole[name], broken[name], err_msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda"), "--device cuda"),
        (("--amp", "fp16", "--device", "cpu"), "--amp fp16 needs a GPU"),
        (("--model", "vgg"), "invalid choice"),
        (("--epochs", 0), "--epochs"),
        (("--resume",), "--checkpoint"),
        (("--load-only", "--source", "synthetic-batch"), "--load-only"),
        (("--nesterov", "--optimizer", "adam"), "--nesterov"),
        (("--accuracy", 90), "--accuracy"),
        (("--seeds", 2, "--log", "."), "--log '.'"),
    ],
)
def test_bad_input_is_one_line(run_script, tmp_path, options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run_script("train_cifar.py", *TINY, *options, status=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "results").exists()


def test_loss_that_explodes_stops_the_run(run_script, tmp_path):
    done = run_script(
        "train_cifar.py", *TINY, "--epochs", 5, "--lr", 1e12, "--amp", "off", status=1
    )
    assert done.stderr.startswith("error: the loss is ")
    assert "step" in done.stderr
    assert json.loads((tmp_path / "results/train_cifar.json").read_text())["status"].startswith(
        "failed"
    )


# -- augmentation and sources ------------------------------------------------------------------------------------------


def plain_augment(image, draw):
    """One image, step by step: pad, crop, flip."""
    flip, dy, dx = draw // 81, draw // 9 % 9, draw % 9
    crop = np.pad(image, ((4, 4), (4, 4), (0, 0)))[dy : dy + 32, dx : dx + 32]
    return crop[:, ::-1] if flip else crop


def test_augmentation_is_crop_and_flip():
    """All 162 draws against the plain form, in NumPy and in the PyTorch form that a GPU runs."""
    images, draws = make_synthetic(162)[0], np.arange(162, dtype=np.uint8)
    expected = np.stack(
        [plain_augment(image, int(draw)) for image, draw in zip(images, draws, strict=True)]
    )
    np.testing.assert_array_equal(train_cifar.augment(images, draws), expected)
    ours = train_cifar.augment_tensor(torch.from_numpy(images), torch.from_numpy(draws))
    np.testing.assert_array_equal(ours.numpy(), expected)


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    draws = [
        train_cifar.draw_augmentation(n, seed, epoch)
        for n, seed, epoch in ((50_000, 1, 1), (1000, 1, 1), (1000, 1, 2), (1000, 2, 1))
    ]
    np.testing.assert_array_equal(draws[0][:1000], draws[1])  # not of the size of the set
    assert (draws[1] != draws[2]).mean() > 0.9
    assert (draws[1] != draws[3]).mean() > 0.9
    counts = np.bincount(draws[0], minlength=162)
    assert len(counts) == 162
    assert counts.min() > 200  # 50,000 / 162 = 309, deviation 18


def test_batches_for_a_gpu_are_those_for_a_cpu():
    """The part that runs on a GPU, here on the CPU: uint8 images, augmented and normalised after they were moved."""
    images, labels, *_ = make_synthetic(50)
    index, draws = np.arange(40)[::-1].copy(), train_cifar.draw_augmentation(50, 1, 1)
    x, y = load(images, labels, index, draws)
    for source in (
        train_cifar.Arrays(images, labels),
        train_cifar.OnDevice(train_cifar.Arrays(images, labels), CPU),
    ):
        batch = train_cifar.make_batch(source, draws, torch.device("cuda"), index)
        assert batch[0].dtype in (np.uint8, torch.uint8)
        other_x, other_y = train_cifar.finish_batch(*batch, CPU)
        torch.testing.assert_close(other_x, x, atol=1e-6, rtol=1e-6)
        assert torch.equal(other_y, y)
        assert other_x.is_contiguous(memory_format=torch.channels_last)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_folder_in_the_order_of_the_numbers(tmp_path):
    images = make_synthetic(12)[0]
    for i in range(12):
        save(tmp_path / f"{i}_{i % 10}.png", images[i])  # "10_0.png" sorts before "2_2.png"
    (tmp_path / "notes.txt").write_text("no picture")
    folder = train_cifar.Folder(tmp_path, subset=11)
    found, labels = folder.read(np.arange(11))
    np.testing.assert_array_equal(found, images[:11])
    assert labels.tolist() == [*range(10), 0]


def test_class_folders_alternate(tmp_path):
    images = make_synthetic(6)[0]
    for i in range(6):
        save(tmp_path / ("airplane", "bird")[i % 2] / f"{i}.png", images[i])
    found, labels = train_cifar.Folder(tmp_path).read(np.arange(6))
    np.testing.assert_array_equal(found, images)
    assert labels.tolist() == [0, 1] * 3


def test_jpeg_and_grey_pictures(tmp_path):
    pixels = np.repeat(
        np.arange(0, 256, 8, np.uint8)[:, None, None] * np.ones((1, 32, 1), np.uint8), 3, axis=2
    )
    save(tmp_path / "0_3.jpg", pixels, quality=95)
    save(tmp_path / "1_4.png", pixels[..., 0])
    found, labels = train_cifar.Folder(tmp_path).read(np.arange(2))
    assert np.abs(found[0].astype(int) - pixels).max() < 5
    np.testing.assert_array_equal(found[1], np.repeat(pixels[..., :1], 3, axis=2))
    assert labels.tolist() == [3, 4]


def empty(folder):
    pass


def unnamed(folder):
    save(folder / "train/cat.png", np.zeros((32, 32, 3), np.uint8))


def eleven(folder):
    save(folder / "train/0_10.png", np.zeros((32, 32, 3), np.uint8))


def unequal(folder):
    for place in ("train/bird", "train/cat", "train/.hidden", "test/cat"):
        save(folder / place / "0.png", np.zeros((32, 32, 3), np.uint8))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (empty, "no pictures there"),
        (unnamed, "cat.png"),
        (eleven, "over 9"),
        (unequal, "train/ has the classes bird, cat, test/ cat"),
    ],
)
def test_bad_folder_is_one_line(run_script, tmp_path, make, words):
    make(tmp_path)
    done = run_script(
        "train_cifar.py", "--source", "disk", "--data-dir", tmp_path, "--epochs", 1, status=2
    )
    assert_one_error_line(done.stderr)
    assert words in done.stderr


def test_subset_larger_than_the_folder(run_script, tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "0_1.png", make_synthetic(1)[0][0])
    done = run_script(
        "train_cifar.py", "--source", "disk", "--data-dir", tmp_path, "--subset", 9, status=2
    )
    assert_one_error_line(done.stderr)
    assert "there are 1 training images" in done.stderr
    run_script(
        "train_cifar.py",
        "--source",
        "disk",
        "--data-dir",
        tmp_path,
        "--model",
        "cnn",
        "--device",
        "cpu",
    )
    assert json.loads((tmp_path / "results/train_cifar.json").read_text())["train_images"] == 1


def truncated(path):
    path.write_bytes(path.read_bytes()[:300])


def foreign(path):
    path.write_bytes(b"no picture")


def missing(path):
    path.unlink()
    path.symlink_to("nowhere")


def large(path):
    save(path, np.zeros((64, 48, 3), np.uint8))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "decoded"),
        (foreign, "decoded"),
        (missing, "cannot be read"),
        (large, "48x64 pixels"),
    ],
)
def test_picture_that_cannot_be_used_is_named(run_script, tmp_path, damage, words):
    for i in range(4):
        for split in ("train", "test"):
            save(tmp_path / split / f"{i}_{i}.png", make_synthetic(4)[0][i])
    damage(tmp_path / "train/2_2.png")
    done = run_script(
        "train_cifar.py",
        "--source",
        "disk",
        "--data-dir",
        tmp_path,
        "--epochs",
        1,
        "--model",
        "cnn",
        status=1,
    )
    assert_one_error_line(done.stderr)
    assert "train/2_2.png" in done.stderr
    assert words in done.stderr


# -- training options --------------------------------------------------------------------------------------------------


def options(*words):
    return train_cifar.parse_args(["--device", "cpu", "--subset", "10", *map(str, words)])


def test_one_cycle_is_that_of_pytorch():
    args, steps = options("--schedule", "one-cycle", "--lr", 0.4), 200
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=steps + 1, cycle_momentum=False
    )
    for step in range(steps + 1):
        ours = train_cifar.learning_rate(args, step / steps)
        assert ours == pytest.approx(
            theirs.get_last_lr()[0], rel=0.08, abs=1e-4
        )  # its phases end on whole steps
        if step < steps:
            optimizer.step()
            theirs.step()


def test_cosine_and_warm_up():
    args = options("--schedule", "cosine", "--lr", 0.4, "--warmup", 0.2)
    rates = [train_cifar.learning_rate(args, part) for part in (0, 0.1, 0.2, 0.6, 1)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.2, 0])
    assert train_cifar.learning_rate(options("--lr", 0.4), 0.7) == 0.4
    assert train_cifar.learning_rate(options("--lr", 0.4, "--warmup", 0.5), 0.25) == pytest.approx(
        0.2
    )


def test_label_smoothing_nesterov_and_weight_reach_pytorch():
    x, y = load(*make_synthetic(8)[:2], np.arange(8))
    x = x.double()  # in float32 a rounding in the first step can move the maximum of a pooling window in the second
    args = options("--nesterov", "--weight-decay", 0.01, "--lr", 0.1, "--label-smoothing", 0.1)
    torch.manual_seed(1)
    model = train_cifar.make_model("cnn").double()
    plain = copy.deepcopy(model)
    optimizer = train_cifar.make_torch_optimizer(model, args)
    reference = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=0.01, nesterov=True)
    for _ in range(2):
        train_cifar.train_step(model, optimizer, x, y, smoothing=args.label_smoothing, weight=0.5)
        reference.zero_grad()
        (F.cross_entropy(plain(x).float(), y, label_smoothing=0.1) / 2).backward()
        reference.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_warm_up_leaves_no_trace():
    torch.manual_seed(1)
    model = train_cifar.make_model("resnet18")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_cifar.warm_up(model, model, [2, 3], SETUP)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_accuracy_ends_the_run_and_tells_the_time(run_script, tmp_path):
    run_script("train_cifar.py", *TINY, "--epochs", 30, "--accuracy", 0.01)
    sidecar = json.loads((tmp_path / "results/train_cifar.json").read_text())
    assert sidecar["totals"]["final_accuracy"] >= 0.01
    rows = list(csv.DictReader(open(tmp_path / "results/train_cifar.csv")))
    epochs = int(rows[-1]["epoch"])
    assert epochs < 30
    seconds = sum(float(row["duration"]) for row in rows if row["type"] == "0")
    assert sidecar["totals"]["seconds_to_accuracy"] == pytest.approx(seconds, rel=1e-3)
    run_script("train_cifar.py", *TINY, "--epochs", epochs, "--accuracy", 0.01)  # in the last one
    assert (
        "seconds_to_accuracy"
        in json.loads((tmp_path / "results/train_cifar.json").read_text())["totals"]
    )


def test_seeds_are_runs_of_their_own(run_script, tmp_path):
    done = run_script(
        "train_cifar.py",
        *TINY,
        "--epochs",
        1,
        "--seeds",
        3,
        "--seed",
        5,
        "--checkpoint",
        "w.ckpt.npz",
    )
    summary = json.loads((tmp_path / "results/train_cifar_seeds.json").read_text())[
        "final_accuracy"
    ]
    sidecars = [
        json.loads((tmp_path / f"results/train_cifar_seed{s}.json").read_text()) for s in (5, 6, 7)
    ]
    values = [sidecar["totals"]["final_accuracy"] for sidecar in sidecars]
    assert summary["values"] == values
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["std"] == pytest.approx(np.std(values, ddof=1))
    assert "± " in done.stdout
    params = [np.load(tmp_path / f"w_seed{s}.ckpt.npz")["params"] for s in (5, 6, 7)]
    assert not np.array_equal(params[0], params[1])
    assert [sidecar["seed"] for sidecar in sidecars] == [5, 6, 7]


def test_synthetic_batch_waits_for_nothing(run_script, tmp_path):
    run_script(
        "train_cifar.py",
        "--source",
        "synthetic-batch",
        "--model",
        "cnn",
        "--subset",
        200,
        "--batch-size",
        32,
        "--epochs",
        1,
        "--threads",
        1,
    )
    rows = list(csv.DictReader(open(tmp_path / "results/train_cifar.csv")))
    assert [row["type"] for row in rows] == ["2"] * 7 + ["0", "1"]
    assert rows[6]["value1"] == rows[6]["value2"] == "7"
    sidecar = json.loads((tmp_path / "results/train_cifar.json").read_text())
    assert sidecar["threads"] == 1
    assert sidecar["totals"]["train_images"] == 200
    assert sidecar["dataset"] == "synthetic"


def test_one_batch_is_the_same_tensor_every_time():
    source = train_cifar.OneBatch(100, 32, 1)
    batches = list(train_cifar.Loader(0).batches(source, np.split(np.arange(96), 3), None, CPU))
    assert [len(y) for _, y in batches] == [32] * 3
    assert len({x.data_ptr() for x, _ in batches}) == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_compile_trains_like_eager(run_script, tmp_path):
    """The same parameters, in a checkpoint of the same form."""
    tiny = (*TINY, "--subset", 32, "--epochs", 1, "--amp", "off", "--lr", 0.001, "--threads", 1)
    run_script("train_cifar.py", *tiny, "--checkpoint", "eager.npz")
    run_script("train_cifar.py", *tiny, "--checkpoint", "compiled.npz", "--compile", timeout=240)
    with np.load(tmp_path / "eager.npz") as eager, np.load(tmp_path / "compiled.npz") as compiled:
        assert set(eager.files) == set(compiled.files)
        np.testing.assert_allclose(compiled["params"], eager["params"], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_gpu_learns_and_logs_its_use(run_script, tmp_path, amp):
    run_script(
        "train_cifar.py",
        "--dataset",
        "synthetic",
        "--subset",
        5000,
        "--epochs",
        3,
        "--model",
        "resnet18",
        "--device",
        "cuda",
        "--amp",
        amp,
        "--lr",
        0.02,
    )
    sidecar = json.loads((tmp_path / "results/train_cifar.json").read_text())
    assert sidecar["totals"]["best_accuracy"] > 0.3
    assert sidecar["totals"]["peak_gpu_allocated_mb"] > 0
    rows = list(csv.DictReader(open(tmp_path / "results/train_cifar.csv")))
    assert any(row["gpu_mem_mb"] for row in rows)
