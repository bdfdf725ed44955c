"""train_cifar.py: networks, sources, training beside plain PyTorch, ladder, log, resume, errors."""

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_error_line, count_rows, finish, pausing, refused, start, wait_until
from PIL import Image
from torch.nn import functional as F

import common
import train_cifar
from common import MEAN, STD, InputError, TrainingError, epoch_order, make_cnn, make_synthetic
from train_cifar import (
    DeviceSource,
    ImageFolderSource,
    InMemorySource,
    OneBatchSource,
    ProcessGroup,
    TrainContext,
    WorkerPool,
    load_batches,
)

TINY = ("--dataset", "synthetic", "--subset", 48, "--batch-size", 16, "--model", "cnn")
CPU = torch.device("cpu")
CONTEXT = TrainContext(ProcessGroup(), WorkerPool(0))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """run_here("--epochs", 1, …): train_cifar.main() in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    monkeypatch.setattr(train_cifar, "keep_freed_memory", lambda: None)  # it would last

    def run(*argv):
        train_cifar.main([str(word) for word in argv])

    return run


def read_checkpoint(path):
    return torch.load(path, weights_only=True)


def read_metadata(folder=Path()):
    return json.loads((folder / "results/train_cifar.json").read_text())


def read_rows(folder=Path()):
    with open(folder / "results/train_cifar.csv", newline="") as file:
        return list(csv.DictReader(file))


# -- networks ------------------------------------------------------------------------------------


SIZES = {"cnn": 1_070_794, "resnet18": 11_173_962, "resnet50": 23_520_842}


@pytest.mark.parametrize(("name", "parameters"), SIZES.items())
def test_networks_have_the_published_size_and_ten_logits(name, parameters):
    model = train_cifar.make_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_cnn_starts_from_the_same_distribution_as_from_scratch():
    torch.manual_seed(0)
    leaves = [leaf for layer in make_cnn(0).layers for leaf in layer.leaves()]
    ours = [leaf.W.std() for leaf in leaves if leaf.param_names]
    model = train_cifar.make_model("cnn")
    theirs = [layer.weight.std().item() for layer in model if hasattr(layer, "weight")]
    assert theirs == pytest.approx(ours, rel=0.1)


def test_resnet50_begins_with_blocks_that_pass_their_input_on():
    """Each block adds nothing to its shortcut at first: Goyal et al., 2017, section 5.1."""
    named = train_cifar.make_model("resnet50").named_parameters()
    scales = [p for name, p in named if name.endswith("bn3.weight")]
    assert len(scales) == 16
    assert not any(p.any() for p in scales)


def test_cifar_stem_keeps_the_resolution():
    """32 × 32 positions reach ResNet-18's first block, 4 × 4 its last: no stride in the stem."""
    model = train_cifar.make_model("resnet18").eval()
    shapes = []
    for layer in (model.layer1, model.layer4):
        layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    model(torch.zeros(1, 3, 32, 32))
    assert shapes == [(1, 64, 32, 32), (1, 512, 4, 4)]


# -- batches -------------------------------------------------------------------------------------


def load(images, labels, index, aug_params=None):
    batch = train_cifar.prepare_batch(InMemorySource(images, labels), aug_params, CONTEXT, index)
    return train_cifar.finish_batch(*batch, CONTEXT)


@pytest.mark.parametrize("name", train_cifar.MEMORY_FORMATS)
def test_batch_is_normalised_in_the_memory_format(name):
    memory_format = train_cifar.MEMORY_FORMATS[name]
    images, labels, *_ = make_synthetic(20)
    index = np.array([3, 17, 5])
    context = CONTEXT._replace(memory_format=memory_format)
    ((x, y),) = load_batches(InMemorySource(images, labels), [index], None, context)
    expected = (images[index] / 255 - np.array(MEAN)) / np.array(STD)
    assert x.is_contiguous(memory_format=memory_format)
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert y.tolist() == labels[index].tolist()


def plain_augment(image, param):
    """One image, step by step: pad, crop, flip."""
    flip, dy, dx = param // 81, param // 9 % 9, param % 9
    crop = np.pad(image, ((4, 4), (4, 4), (0, 0)))[dy : dy + 32, dx : dx + 32]
    return crop[:, ::-1] if flip else crop


def test_augmentation_is_crop_and_flip():
    """All 162 parameters against the plain form, in NumPy and in the form that a GPU runs."""
    images = make_synthetic(162)[0]
    params = np.arange(162, dtype=np.uint8)
    pairs = zip(images, params, strict=True)
    expected = np.stack([plain_augment(image, int(param)) for image, param in pairs])
    np.testing.assert_array_equal(common.augment(images, params), expected)
    ours = train_cifar.augment_tensor(torch.from_numpy(images), torch.from_numpy(params))
    np.testing.assert_array_equal(ours.numpy(), expected)


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    arguments = ((50_000, 1, 1), (1000, 1, 1), (1000, 1, 2), (1000, 2, 1))
    params = [common.draw_augmentation(*argument) for argument in arguments]
    np.testing.assert_array_equal(params[0][:1000], params[1])  # not of the size of the set
    assert (params[1] != params[2]).mean() > 0.9
    assert (params[1] != params[3]).mean() > 0.9
    counts = np.bincount(params[0], minlength=162)
    assert len(counts) == 162
    assert counts.min() > 200  # 50,000 / 162 = 309, deviation 18


def test_batches_for_a_gpu_are_those_for_a_cpu():
    """The part that runs on a GPU, here on the CPU: uint8 images, augmented after the move."""
    images, labels, *_ = make_synthetic(50)
    index = np.arange(40)[::-1].copy()
    aug_params = common.draw_augmentation(50, 1, 1)
    x, y = load(images, labels, index, aug_params)
    gpu = CONTEXT._replace(group=ProcessGroup(device=torch.device("cuda")))
    for source in (
        InMemorySource(images, labels),
        DeviceSource(InMemorySource(images, labels), CPU),
    ):
        batch = train_cifar.prepare_batch(source, aug_params, gpu, index)
        assert batch[0].dtype in (np.uint8, torch.uint8)
        other_x, other_y = train_cifar.finish_batch(*batch, CONTEXT)
        torch.testing.assert_close(other_x, x, atol=1e-6, rtol=1e-6)
        assert torch.equal(other_y, y)
        assert other_x.is_contiguous(memory_format=torch.channels_last)


def test_one_batch_is_the_same_tensor_every_time():
    indices = np.split(np.arange(96), 3)
    batches = list(load_batches(OneBatchSource(100, 32, 1), indices, None, CONTEXT))
    assert [len(y) for _, y in batches] == [32] * 3
    assert len({x.data_ptr() for x, _ in batches}) == 1


# -- the ladder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_torchvision_loads_the_same_images_and_augments_them(workers):
    """Without augmentation bit for bit the pixels of whole batches; with it crops and flips."""
    images, labels, *_ = make_synthetic(20)
    source = InMemorySource(images, labels)
    indices = np.split(np.random.default_rng(1).permutation(20), 2)
    torchvision = CONTEXT._replace(loader="torchvision", workers=WorkerPool(workers))
    plain = list(load_batches(source, indices, None, CONTEXT))
    for (x, y), (other_x, other_y) in zip(
        load_batches(source, indices, None, torchvision), plain, strict=True
    ):
        torch.testing.assert_close(x, other_x, atol=1e-6, rtol=1e-6)
        assert torch.equal(y, other_y)
        assert x.is_contiguous(memory_format=torch.channels_last)

    def augmented(epoch):
        return torch.cat([x for x, _ in load_batches(source, indices, (1, epoch), torchvision)])

    # Each is one of the 162 crops and flips of its image.
    pixels = (augmented(1) * torch.tensor(STD)[:, None, None]).permute(0, 2, 3, 1)
    pixels = ((pixels.numpy() + np.array(MEAN)) * 255).round().astype(np.uint8)
    for i, ours in zip(np.concatenate(indices), pixels, strict=True):
        possible = (plain_augment(images[i], param) for param in range(162))
        assert any(np.array_equal(ours, crop) for crop in possible)
    assert torch.equal(augmented(1), augmented(1))  # of seed and epoch
    assert not torch.equal(augmented(1), augmented(2))


def test_rungs_train_alike(run_here):
    """In float32 without augmentation every loader and memory format gives the same weights."""
    options = (*TINY, "--epochs", 1, "--augment", "off", "--amp", "off", "--lr", 0.001)
    run_here(*options, "--checkpoint", "top.pt")
    expected = read_checkpoint("top.pt")["model"]
    rungs = {
        "nchw.pt": ("--memory-format", "nchw"),
        "loader.pt": ("--loader", "torchvision", "--workers", 0),
        "first.pt": ("--loader", "torchvision", "--workers", 0, "--memory-format", "nchw"),
    }
    for path, rung in rungs.items():
        run_here(*options, *rung, "--checkpoint", path)
        for name, tensor in read_checkpoint(path)["model"].items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    assert read_metadata()["arguments"]["loader"] == "torchvision"


@pytest.mark.slow
def test_first_rung_as_documented(run_script, tmp_path):
    """Augmented, with a process that loads."""
    rung = ("--loader", "torchvision", "--memory-format", "nchw", "--amp", "off")
    run_script("train_cifar.py", *TINY, *rung, "--epochs", 1)
    assert read_metadata(tmp_path)["status"] == "done"
    assert "".join(row["type"] for row in read_rows(tmp_path)[:5]) == "22201"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_compile_trains_like_eager(run_script, tmp_path):
    """The same parameters, in a checkpoint of the same form."""
    tiny = (*TINY, "--subset", 32, "--epochs", 1, "--amp", "off", "--lr", 0.001, "--threads", 1)
    run_script("train_cifar.py", *tiny, "--checkpoint", "eager.pt")
    run_script("train_cifar.py", *tiny, "--checkpoint", "compiled.pt", "--compile", timeout=240)
    eager = read_checkpoint(tmp_path / "eager.pt")["model"]
    compiled = read_checkpoint(tmp_path / "compiled.pt")["model"]
    assert eager.keys() == compiled.keys()
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-5, rtol=0)


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "reference"),
    [
        ("resnet18", (), {}),
        ("cnn", ("--nesterov", "--label-smoothing", 0.1), {"nesterov": True}),
    ],
)
def test_training_is_the_plain_pytorch_loop(run_here, monkeypatch, model, options, reference):
    """channels_last changes the memory, not the computation: three steps of the tutorial's loop."""
    monkeypatch.setattr(
        train_cifar,
        "load_batch",
        lambda *batch, **statistics: common.load_batch(*batch, np.float64, **statistics),
    )
    torch.set_default_dtype(torch.float64)  # so that rounding does not matter
    try:
        argv = ["--model", model, "--dataset", "synthetic", "--subset", 12, "--batch-size", 4]
        argv += ["--epochs", 1, "--augment", "off", "--amp", "off", "--seed", 1, "--workers", 0]
        argv += ["--lr", 0.01, "--weight-decay", 0.001, "--checkpoint", "run.pt", *options]
        run_here(*argv)

        torch.manual_seed(1)
        plain = train_cifar.make_model(model)
        optimizer = torch.optim.SGD(plain.parameters(), 0.01, 0.9, weight_decay=0.001, **reference)
        images, labels, *_ = make_synthetic(12, 1)
        losses = []
        for index in np.split(epoch_order(12, 1, 1), 3):
            x = (images[index] / 255 - np.array(MEAN)) / np.array(STD)
            x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
            y = torch.from_numpy(labels[index]).long()
            optimizer.zero_grad()
            smoothing = 0.1 if options else 0.0
            loss = F.cross_entropy(plain(x).float(), y, label_smoothing=smoothing)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        torch.set_default_dtype(torch.float32)

    rows = read_rows()
    assert [float(row["loss"]) for row in rows[:3]] == pytest.approx(losses, abs=2e-6)
    assert float(rows[2]["forward"]) > float(rows[0]["forward"]) > 0
    assert float(rows[2]["backward"]) > float(rows[0]["backward"]) > 0
    trained = read_checkpoint("run.pt")["model"]
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-7)


def test_count_correct_top1_and_top5():
    logits = torch.arange(10.0).repeat(3, 1)
    assert train_cifar.count_correct(logits, torch.tensor([9, 5, 0])) == (1, 2)


def test_evaluation_leaves_the_model_as_it_was():
    source = InMemorySource(*make_synthetic(20)[:2])
    model = train_cifar.make_model("resnet18")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss, top1, top5, loading = train_cifar.evaluate(model, source, CONTEXT, batch_size=8)
    assert model.training
    assert 0 <= top1 <= top5 <= 1
    assert loss > 0
    assert loading > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_warm_up_leaves_no_trace():
    torch.manual_seed(1)
    model = train_cifar.make_model("resnet18")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_cifar.warm_up(model, model, [2, 3], CONTEXT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_choose_amp(monkeypatch):
    assert train_cifar.choose_amp("off", CPU) == "off"
    assert train_cifar.choose_amp("bf16", CPU) == "bf16"
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        train_cifar.choose_amp("fp16", CPU)
    for flags, expected in (({"fpu", "avx512_bf16"}, "bf16"), ({"fpu", "avx2"}, "off")):
        monkeypatch.setattr(common, "cpu_flags", lambda flags=flags: flags)
        assert train_cifar.choose_amp("auto", CPU) == expected


def test_bfloat16_is_near_float32(run_here):
    """The loss of one batch; the weights stay float32."""
    losses = []
    for amp in ("off", "bf16"):
        run_here(*TINY, "--subset", 16, "--epochs", 1, "--amp", amp, "--checkpoint", "run.pt")
        losses.append(float(read_rows()[0]["loss"]))
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert all(t.dtype is torch.float32 for t in read_checkpoint("run.pt")["model"].values())


def options(*words):
    return train_cifar.parse_args(["--device", "cpu", "--subset", "10", *map(str, words)])


def test_one_cycle_is_that_of_pytorch():
    args = options("--schedule", "one-cycle", "--lr", 0.4)
    steps = 200
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=steps + 1, cycle_momentum=False
    )
    for step in range(steps + 1):
        ours = train_cifar.learning_rate(args, step / steps)
        # its phases end on whole steps
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=0.08, abs=1e-4)
        if step < steps:
            optimizer.step()
            theirs.step()


def test_cosine_and_warm_up():
    args = options("--schedule", "cosine", "--lr", 0.4, "--warmup", 0.2)
    rates = [train_cifar.learning_rate(args, done) for done in (0, 0.1, 0.2, 0.6, 1)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.2, 0])
    assert train_cifar.learning_rate(options("--lr", 0.4), 0.7) == 0.4
    warm = options("--lr", 0.4, "--warmup", 0.5)
    assert train_cifar.learning_rate(warm, 0.25) == pytest.approx(0.2)


def test_loss_that_explodes_stops_the_run(run_here):
    with pytest.raises(TrainingError, match=r"the loss is .* step"):
        run_here(*TINY, "--epochs", 5, "--lr", 1e12, "--amp", "off")
    assert read_metadata()["status"].startswith("failed")


def test_accuracy_ends_the_run_and_reports_the_time(run_here):
    run_here(*TINY, "--epochs", 30, "--accuracy", 0.01)
    totals = read_metadata()["totals"]
    assert totals["final_accuracy"] >= 0.01
    rows = read_rows()
    epochs = int(rows[-1]["epoch"])
    assert epochs < 30
    seconds = sum(float(row["duration"]) for row in rows if row["type"] == "0")
    assert totals["seconds_to_accuracy"] == pytest.approx(seconds, rel=1e-3)
    run_here(*TINY, "--epochs", epochs, "--accuracy", 0.01)  # in the last one
    assert "seconds_to_accuracy" in read_metadata()["totals"]


def test_seeds_are_runs_of_their_own(run_here, capsys):
    run_here(
        *TINY,
        "--epochs",
        1,
        "--seeds",
        3,
        "--seed",
        5,
        "--checkpoint",
        "w.ckpt.pt",
        "--trace",
        "t.trace",
    )
    assert "± " in capsys.readouterr().out
    results = Path("results")
    summary = json.loads((results / "train_cifar_seeds.json").read_text())["final_accuracy"]
    metadata = [json.loads((results / f"train_cifar_seed{s}.json").read_text()) for s in (5, 6, 7)]
    values = [run["totals"]["final_accuracy"] for run in metadata]
    assert summary["values"] == values
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["std"] == pytest.approx(np.std(values, ddof=1))
    assert [run["seed"] for run in metadata] == [5, 6, 7]
    weights = [read_checkpoint(f"w_seed{s}.ckpt.pt")["model"]["0.weight"] for s in (5, 6, 7)]
    assert not torch.equal(weights[0], weights[1])
    assert sorted(Path().glob("*.trace")) == [Path(f"t_seed{s}.trace") for s in (5, 6, 7)]


# -- what a run leaves behind --------------------------------------------------------------------


def test_run_writes_log_metadata_and_table(run_script, tmp_path):
    done = run_script("train_cifar.py", *TINY, "--epochs", 2)
    assert "SYNTHETIC DATA" in done.stdout
    rows = read_rows(tmp_path)
    assert [row["type"] for row in rows] == ["2", "2", "2", "0", "1"] * 2
    trained = rows[3]
    assert float(trained["images_per_s"]) == pytest.approx(48 / float(trained["duration"]), 1e-4)
    assert 0 <= float(trained["value1"]) <= float(trained["value2"]) <= 1  # top-1 and top-5
    phases = sum(float(trained[name]) for name in ("loading", "forward", "backward"))
    assert phases <= float(trained["duration"])
    metadata = read_metadata(tmp_path)
    assert metadata["status"] == "done"
    assert metadata["device"] == "cpu"
    assert metadata["arguments"]["amp"] in ("bf16", "off")
    assert metadata["versions"]["torch"] == torch.__version__


def test_synthetic_batch_waits_for_nothing(run_here):
    source = ("--source", "synthetic-batch", "--subset", 200, "--batch-size", 32)
    run_here(*source, "--model", "cnn", "--epochs", 1, "--threads", 1)
    rows = read_rows()
    assert [row["type"] for row in rows] == ["2"] * 7 + ["0", "1"]
    assert rows[6]["value1"] == rows[6]["value2"] == "7"
    metadata = read_metadata()
    assert metadata["threads"] == 1
    assert metadata["totals"]["train_images"] == 200
    assert metadata["dataset"] == "synthetic"


def test_cpu_default_is_what_it_trains_in_minutes(run_here, capsys, monkeypatch):
    """With neither --epochs nor --subset a CPU measures its speed; --resume keeps the result."""
    monkeypatch.setattr(train_cifar, "CPU_SECONDS", 0.5)
    options = ("--device", "cpu", "--dataset", "synthetic", "--model", "cnn")
    run_here(*options, "--checkpoint", "run.pt")
    out = capsys.readouterr().out
    totals = read_metadata()["totals"]
    subset = totals["train_images"] // 2  # 2 epochs
    assert subset % 16 == 0
    assert 64 <= subset < 50_000
    words = f"On a CPU: {subset:,} images, 2 epochs, batch 16, adam, one-cycle learning rate"
    assert f"{words}. The full run: --epochs 10" in out

    monkeypatch.setattr(train_cifar, "CPU_SECONDS", 60)  # as if the machine were faster now
    run_here(*options, "--checkpoint", "run.pt", "--resume")
    assert f"On a CPU: {subset:,} images" in capsys.readouterr().out
    assert read_metadata()["totals"]["train_images"] == totals["train_images"]  # nothing was left


def test_cpu_default_of_a_loading_alone(run_here, capsys):
    run_here("--device", "cpu", "--dataset", "synthetic", "--load-only", "--batch-size", 100)
    assert "5,000 images, 2 epochs, batch 100, adam" in capsys.readouterr().out
    assert read_metadata()["totals"]["train_images"] == 2 * 5000


def test_defaults_where_a_number_is_given():
    args = train_cifar.parse_args(["--device", "cpu", "--epochs", "3"])
    assert (args.epochs, args.subset, args.batch_size, args.optimizer) == (3, None, 64, "sgd")
    args = train_cifar.parse_args(["--device", "cpu", "--lr", "0.02"])
    assert (args.epochs, args.batch_size, args.optimizer, args.lr) == (2, 16, "sgd", 0.02)
    args = train_cifar.parse_args(["--device", "cpu"])
    assert (args.optimizer, args.lr, args.schedule, args.warmup) == (
        "adam",
        0.001,
        "one-cycle",
        0.3,
    )


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--schedule", "one-cycle", "--nesterov", "--label-smoothing", 0.1, "--workers", 2),
        pytest.param(
            ("--optimizer", "adam", "--amp", "bf16", "--workers", 0), marks=pytest.mark.slow
        ),
    ],
    ids=["sgd", "adam-bf16"],
)
def test_interrupted_run_resumes_bit_for_bit(run_here, tmp_path, options):
    """SIGINT in the first epoch, then --resume: all states of a run that was not interrupted."""
    # One thread: two that wait for each other take minutes where other processes have the cores.
    tiny = ("--dataset", "synthetic", "--subset", 24, "--batch-size", 8, "--model", "resnet18")
    tiny = (*tiny, "--epochs", 2, "--threads", 1, "--quiet", *options)
    run_here(*tiny, "--checkpoint", "whole.pt")
    log = Path("results/train_cifar.csv")
    log.unlink()
    script = pausing(tmp_path, "train_cifar.py", epoch=1, batch=1)
    process = start(tmp_path, script, *tiny, "--checkpoint", "broken.pt")
    wait_until(process, lambda: count_rows(log) >= 1)
    process.send_signal(signal.SIGINT)
    _, stderr = finish(process, status=130)
    assert "--resume" in stderr
    run_here(*tiny, "--checkpoint", "broken.pt", "--resume")

    whole, broken = read_checkpoint("whole.pt"), read_checkpoint("broken.pt")
    assert whole.keys() == broken.keys() == {"meta", "model", "optimizer", "scaler"}
    assert whole["model"].keys() == broken["model"].keys()
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, broken["model"][name]), name
    states = (checkpoint["optimizer"]["state"] for checkpoint in (whole, broken))
    for ours, theirs in zip(*(state.values() for state in states), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole["meta"]["history"]["test_acc"] == broken["meta"]["history"]["test_acc"]
    assert [row["type"] for row in read_rows()] == ["2", "2", "2", "0", "1"] * 2


def test_checkpoint_is_pytorch_own_format(run_here):
    """Another program opens it: a state dict of the network, one of the optimizer."""
    run_here(*TINY, "--epochs", 1, "--checkpoint", "run.pt")
    content = read_checkpoint("run.pt")
    model = train_cifar.make_model("cnn")
    model.load_state_dict(content["model"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    optimizer.load_state_dict(content["optimizer"])
    assert len(optimizer.state) == len(list(model.parameters()))


def test_resume_without_a_checkpoint_starts_from_the_beginning(run_here, capsys):
    run_here(*TINY, "--epochs", 1, "--checkpoint", "run.pt", "--resume")
    assert "no checkpoint run.pt yet" in capsys.readouterr().out
    assert len(read_rows()) == 5
    run_here(*TINY, "--epochs", 2, "--checkpoint", "run.pt", "--resume")
    assert "no checkpoint" not in capsys.readouterr().out
    assert len(read_rows()) == 10


def test_checkpoint_of_an_older_version_is_refused(run_here):
    np.savez("old.npz", params=np.zeros(3), meta=np.array("{}"))
    argv = (*TINY, "--checkpoint", "old.npz", "--resume")
    line = refused(train_cifar.main, *argv)
    assert "old.npz is not a valid checkpoint (it is an .npz file" in line
    assert "start without --resume" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lr", 0.5), "was made with lr 0.01, this run has 0.5"),
        (("--loader", "torchvision"), "was made with loader batched"),
        (("--memory-format", "nchw"), "was made with memory_format channels_last"),
    ],
)
def test_resume_with_other_options_is_refused(run_here, options, words):
    run_here(*TINY, "--epochs", 1, "--checkpoint", "run.pt")
    argv = (*TINY, "--epochs", 2, "--checkpoint", "run.pt", "--resume", *options)
    assert words in refused(train_cifar.main, *argv)


# -- refusals ------------------------------------------------------------------------------------


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
        (("--loader", "torchvision", "--source", "disk"), "--source builtin"),
        (("--loader", "torchvision", "--source", "s3://a-bucket/b"), "--source builtin"),
        (("--memory-format", "nhwc"), "invalid choice"),
    ],
)
def test_bad_input_is_one_line(run_here, options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    line = refused(train_cifar.main, *TINY, *options)
    assert message in line
    assert "\n" not in line
    assert not Path("results").exists()


def test_bad_input_ends_with_status_2(run_script, tmp_path):
    done = run_script("train_cifar.py", *TINY, "--source", "somewhere", status=2)
    assert_one_error_line(done.stderr)
    assert not (tmp_path / "results").exists()


# -- folders of pictures -------------------------------------------------------------------------


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


BLACK = np.zeros((32, 32, 3), np.uint8)


def read_all(folder):
    """All images and labels of a folder, and the names of its classes."""
    pictures, _, classes = train_cifar.label_pictures(train_cifar.list_pictures(folder), [])
    examined = train_cifar.examine_pictures(pictures, [])
    source = ImageFolderSource(examined.train, examined.image_shape, examined.deep)
    return *source.read(np.arange(len(examined.train))), classes


def test_folder_in_the_order_of_the_numbers(tmp_path):
    images = make_synthetic(12)[0]
    for i in range(12):
        save(tmp_path / f"{i}_{i % 10}.png", images[i])  # "10_0.png" sorts before "2_2.png"
    (tmp_path / "notes.txt").write_text("no picture")
    found, labels, _ = read_all(tmp_path)
    np.testing.assert_array_equal(found, images)
    assert labels.tolist() == [*range(10), 0, 1]


def test_class_folders_alternate(tmp_path):
    images = make_synthetic(6)[0]
    for i in range(6):
        save(tmp_path / ("airplane", "bird")[i % 2] / f"{i}.png", images[i])
    found, labels, classes = read_all(tmp_path)
    np.testing.assert_array_equal(found, images)
    assert labels.tolist() == [0, 1] * 3
    assert classes == ("airplane", "bird")


def test_jpeg_and_grey_pictures(tmp_path):
    ramp = np.arange(0, 256, 8, np.uint8)[:, None, None] * np.ones((1, 32, 1), np.uint8)
    pixels = np.repeat(ramp, 3, axis=2)
    save(tmp_path / "0_3.jpg", pixels, quality=95)
    save(tmp_path / "1_4.png", pixels[..., 0])
    found, labels, _ = read_all(tmp_path)
    assert np.abs(found[0].astype(int) - pixels).max() < 5
    np.testing.assert_array_equal(found[1], pixels)
    assert labels.tolist() == [3, 4]


def test_gray_pictures_alone_have_one_channel(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}_{i}.png", np.full((9, 7), 40 * i, np.uint8))
    found, _, _ = read_all(tmp_path)
    assert found.shape == (2, 9, 7, 1)
    assert found[1].max() == 40


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 32768, 65535], np.uint16), [0, 128, 255]),
        (np.array([0, 2048, 4095], np.uint16), [0, 128, 255]),  # a camera of 12 bits
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([-10, 0, 10], np.float32), [0, 128, 255]),
    ],
)
def test_more_than_8_bits_are_scaled_not_clipped(tmp_path, values, expected):
    for i in range(2):
        save(tmp_path / f"{i}_{i}.tif", values.repeat(4).reshape(3, 4))
    found, _, _ = read_all(tmp_path)
    assert found[0, :, 0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("ending", "form"),
    [
        ("bmp", "BMP"),
        ("webp", "WEBP"),
        ("jfif", "JPEG"),
        ("jpe", "JPEG"),
        ("tif", "TIFF"),
        ("gif", "GIF"),
        ("PNG", "PNG"),
        ("jpg", "WEBP"),  # the content counts
        ("png", "GIF"),
    ],
)
def test_every_format_that_pillow_reads(tmp_path, ending, form):
    for i, name in enumerate(("cat", "dog")):
        save(tmp_path / name / "deeper" / f"1.{ending}", BLACK + 100 * i, format=form)
    found, labels, _ = read_all(tmp_path)
    assert np.abs(found[1].astype(int) - 100).max() < 4
    assert labels.tolist() == [0, 1]


def test_exif_turns_a_picture_upright(tmp_path):
    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[:20] = 255  # white above black
    lying = Image.fromarray(np.rot90(pixels))  # as the camera stored it
    exif = Image.Exif()
    exif[train_cifar.EXIF_ORIENTATION] = 6  # to be turned to the right by 90°
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lying.save(tmp_path / name / "0.jpg", exif=exif, quality=95)
    found, _, _ = read_all(tmp_path)
    assert found.shape == (2, 40, 20, 3)
    assert np.abs(found[0].astype(int) - pixels).mean() < 3


def test_sizes_that_differ_are_made_one(run_here, tmp_path, capsys):
    """To 32 × 32, or --image-size: the middle of the picture, antialiased."""
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[::2] = 255  # finer than the small picture can show: gray
    for split in ("train", "test"):
        save(tmp_path / split / "0_0.png", stripes)
        save(tmp_path / split / "1_1.png", BLACK)
    found, _, _ = read_all(tmp_path / "train")
    assert found.shape == (2, 32, 32, 3)
    assert np.abs(found[0].astype(int) - 127).max() < 20
    disk = ("--source", "disk", "--data-dir", tmp_path, "--device", "cpu", "--model", "cnn")
    run_here(*disk, "--epochs", 1, "--image-size", 16)
    assert "2 sizes (96x64, 32x32): resized to 16x16" in capsys.readouterr().out
    assert read_metadata()["image_shape"] == [16, 16, 3]


def test_what_is_no_picture_is_passed_over(tmp_path):
    for name in ("cat", "dog"):
        save(tmp_path / name / "0.png", BLACK)
        (tmp_path / name / "._0.png").write_bytes(b"\0\5\x16\7")  # macOS, on other file systems
        (tmp_path / name / "Thumbs.db").write_bytes(b"\xd0\xcf")
    for name in ("@eaDir", "__MACOSX", "lost+found", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat" / "readme.txt").write_text("about cats")
    pictures, _, classes = train_cifar.label_pictures(train_cifar.list_pictures(tmp_path), [])
    assert classes == ("cat", "dog")
    examined = train_cifar.examine_pictures(pictures, [])
    assert [picture.label for picture in examined.train] == [0, 1]
    (note,) = examined.notes
    assert note.startswith("passed over, no pictures: 1 files, the first: ")
    assert note.endswith("readme.txt")


def empty(folder):
    pass


def unnamed(folder):
    save(folder / "train/cat.png", BLACK)
    (folder / "test").mkdir()


def dated(folder):
    """A camera's names: a date and a time are no label."""
    save(folder / "train/20240131_000012.png", BLACK)
    (folder / "test").mkdir()


def only_in_test(folder):
    for place in ("train/bird", "train/cat", "train/.hidden", "test/cat", "test/dog"):
        save(folder / place / "0.png", BLACK)


def one_class(folder):
    for place in ("train/bird", "test/bird"):
        save(folder / place / "0.png", BLACK)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (empty, "which is empty: give --data-dir a folder with train/ and test/"),
        (unnamed, "cat.png: the file name has no label"),
        (dated, "20240131_000012.png: the file name has no label"),
        (only_in_test, "class dog has no training pictures"),
        (one_class, "1 classes"),
    ],
)
def test_bad_folder_is_one_line(run_here, tmp_path, make, words):
    make(tmp_path)
    argv = ("--source", "disk", "--data-dir", tmp_path, "--epochs", 1)
    assert words in refused(train_cifar.main, *argv)


def test_three_classes_train(run_here, tmp_path):
    """Fewer than five: the top 5 are all of them. Their names are in the metadata."""
    for split in ("train", "val"):
        for name in ("cat", "dog", "狗"):
            save(tmp_path / split / name / "0.png", BLACK)
    disk = ("--source", "disk", "--data-dir", tmp_path, "--device", "cpu", "--model", "cnn")
    run_here(*disk, "--epochs", 1, "--confusion", "confusion.csv")
    assert read_metadata()["classes"] == ["cat", "dog", "狗"]
    header, *rows = Path("confusion.csv").read_text().splitlines()
    assert header == "label \\ predicted,cat,dog,狗"
    assert [row.split(",")[0] for row in rows] == ["cat", "dog", "狗"]
    assert sum(int(count) for row in rows for count in row.split(",")[1:]) == 3


def test_subset_larger_than_the_folder(run_here, tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "0_1.png", make_synthetic(1)[0][0])
    disk = ("--source", "disk", "--data-dir", tmp_path, "--device", "cpu", "--model", "cnn")
    assert "there are 1 training images" in refused(train_cifar.main, *disk, "--subset", 9)
    run_here(*disk)  # the 5,000 images of a CPU's default are not asked for
    assert read_metadata()["train_images"] == 1


def truncated(path):
    path.write_bytes(path.read_bytes()[:300])


def foreign(path):
    path.write_bytes(b"no picture")


def missing(path):
    path.unlink()
    path.symlink_to("nowhere")


def zero(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "decoded"),
        (foreign, "decoded"),
        (zero, "decoded"),
        (missing, "cannot be read"),
    ],
)
def test_picture_that_cannot_be_used_is_named(run_here, tmp_path, capsys, damage, words):
    """Before training starts; --skip-damaged leaves it out and says so."""
    images = make_synthetic(4)[0]
    for i in range(4):
        for split in ("train", "test"):
            save(tmp_path / split / f"{i}_{i}.png", images[i])
    damage(tmp_path / "train/2_2.png")
    argv = ("--source", "disk", "--data-dir", tmp_path, "--epochs", 1, "--model", "cnn")
    line = refused(train_cifar.main, *argv)
    assert words in line
    assert "train/2_2.png" in line
    assert "--skip-damaged" in line
    assert not Path("results").exists()
    run_here(*argv, "--skip-damaged")
    assert "left out, damaged: 1" in capsys.readouterr().out
    assert read_metadata()["train_images"] == 3


# -- networks of one's own -------------------------------------------------------------------------


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))

def make_fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))

def make_wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(999, 10))

def make_broken():
    return undefined

number = 3
"""


def test_an_own_network(run_here, tmp_path):
    (tmp_path / "own.py").write_text(NET)
    run_here("--device", "cpu", *TINY, "--model", "own.py:Net", "--checkpoint", "own.pt")
    state = torch.load("own.pt", weights_only=True)["model"]
    assert state["head.weight"].shape == (10, 3072)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own.py:make_fixed", "it returns (2, 7) for 2 images, (2, 10) is needed"),
        ("own.py:make_wide", "cannot take images (2, 3, 32, 32): RuntimeError"),
        ("own.py:make_broken", "cannot be loaded from own.py, line 20: NameError"),
        ("own.py:number", "TypeError"),
        ("own.py:Absent", "has no attribute 'Absent'"),
        ("absent.py:Net", "there is no file absent.py"),
        ("vgg", "invalid choice: 'vgg': resnet50, resnet18, cnn, or an own network, file.py:Net"),
    ],
)
def test_an_own_network_that_cannot_be_used(run_here, tmp_path, name, words):
    (tmp_path / "own.py").write_text(NET)
    assert words in refused(train_cifar.main, "--device", "cpu", *TINY, "--model", name)


@pytest.mark.parametrize("batch_size", [16, 48])
def test_damage_in_the_test_set_leaves_a_checkpoint_of_the_training(
    run_here, tmp_path, monkeypatch, batch_size
):
    """Repaired, the run goes on with that validation, and ends as one without damage.

    Damage from before the start is found before training: this one comes while the run trains.
    """
    run_here("--export", tmp_path / "data", *TINY[:4], "--quiet")
    options = ("--source", "disk", "--data-dir", "data", "--model", "cnn", "--epochs", 2)
    options = (*options, "--batch-size", batch_size, "--quiet")
    run_here(*options, "--checkpoint", "reference.pt")
    expected = read_rows()

    (victim,) = Path("data/test").glob("00003_*.png")
    good = victim.read_bytes()
    examine = train_cifar.examine_pictures

    def examine_then_damage(*arguments, **options):
        pictures = examine(*arguments, **options)
        truncated(victim)
        return pictures

    resumable = (*options, "--checkpoint", "run.pt", "--resume")
    for _ in range(2):  # the second time nothing is left to train in this epoch
        with monkeypatch.context() as patch:
            patch.setattr(train_cifar, "examine_pictures", examine_then_damage)
            with pytest.raises(TrainingError, match=r"00003_.*--checkpoint run.pt --resume"):
                run_here(*resumable)
        victim.write_bytes(good)
    run_here(*resumable)
    ours, theirs = read_checkpoint("run.pt"), read_checkpoint("reference.pt")
    for name, weights in theirs["model"].items():
        assert torch.equal(ours["model"][name], weights)
    for column in ("type", "epoch", "value1", "value2", "loss"):
        assert [row[column] for row in read_rows()] == [row[column] for row in expected]
    assert ours["meta"]["history"].keys() == theirs["meta"]["history"].keys()
    for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
        assert ours["meta"]["history"][name] == theirs["meta"]["history"][name]
    assert ours["meta"]["totals"]["train_images"] == 2 * 48


# -- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_gpu_learns_and_logs_its_use(run_script, tmp_path, amp):
    data = ("--dataset", "synthetic", "--subset", 5000, "--epochs", 3, "--model", "resnet18")
    run_script("train_cifar.py", *data, "--device", "cuda", "--amp", amp, "--lr", 0.02)
    totals = read_metadata(tmp_path)["totals"]
    assert totals["best_accuracy"] > 0.3
    assert totals["peak_gpu_allocated_mb"] > 0
    assert any(row["gpu_mem_mb"] for row in read_rows(tmp_path))
