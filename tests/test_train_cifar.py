"""train_cifar.py: the networks, the step beside a plain PyTorch one, mixed precision, log, resume, bad input."""

import csv
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPO, count_rows, script_environment, wait_until
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
    ours = [leaf.W.std() for layer in make_cnn(0).layers for leaf in layer.leaves() if leaf.param_names]
    theirs = [layer.weight.std().item() for layer in train_cifar.make_model("cnn") if hasattr(layer, "weight")]
    assert theirs == pytest.approx(ours, rel=0.1)


def test_cifar_stem_keeps_the_resolution():
    """8 × 8 positions of 512 channels reach ResNet-18's last block: no stride and no pooling in the stem."""
    model = train_cifar.make_model("resnet18").eval()
    shapes = []
    model.layer4.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    model.layer1.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    model(torch.zeros(1, 3, 32, 32))
    assert shapes == [(1, 64, 32, 32), (1, 512, 4, 4)]


def test_load_batch_normalises_into_channels_last():
    images, labels, *_ = make_synthetic(20)
    index = np.array([3, 17, 5])
    x, y = train_cifar.load_batch(images, labels, index, torch.device("cpu"))
    expected = (images[index] / 255 - np.array(MEAN)) / np.array(STD)
    assert x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert y.tolist() == labels[index].tolist()


def test_step_is_the_plain_pytorch_step():
    """channels_last changes the memory, not the computation: three steps equal those of the tutorial's loop."""
    images, labels, *_ = make_synthetic(8)
    x, y = train_cifar.load_batch(images, labels, np.arange(8), torch.device("cpu"))
    torch.manual_seed(1)
    ours = train_cifar.make_model("resnet18").to(memory_format=torch.channels_last).double()
    plain = train_cifar.make_model("resnet18").double()
    plain.load_state_dict(ours.state_dict())
    args = train_cifar.parse_args(["--lr", "0.01", "--weight-decay", "0.001", "--subset", "8", "--device", "cpu"])
    optimizer = train_cifar.make_optimizer(ours, args)
    reference = torch.optim.SGD(plain.parameters(), 0.01, 0.9, weight_decay=0.001)
    for _ in range(3):
        loss, logits, phases = train_cifar.train_step(ours, optimizer, x.double(), y)
        reference.zero_grad()
        expected = F.cross_entropy(plain(x.double().contiguous()), y)
        expected.backward()
        reference.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # ours takes the loss in float32
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
    loss, top1, top5, loading = train_cifar.evaluate(model, images, labels, torch.device("cpu"), batch_size=8)
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
    x, y = train_cifar.load_batch(images, labels, np.arange(16), torch.device("cpu"))
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
    assert float(train["loading"]) + float(train["forward"]) + float(train["backward"]) <= float(train["duration"])
    sidecar = json.loads((tmp_path / "results/train_cifar.json").read_text())
    assert sidecar["status"] == "done"
    assert sidecar["device"] == "cpu"
    assert sidecar["arguments"]["amp"] in ("bf16", "off")
    assert sidecar["versions"]["torch"] == torch.__version__


def test_cpu_default_is_small_and_says_so():
    """With neither --epochs nor --subset a CPU takes 5,000 images and 2 epochs, and the full command is printed."""
    command = [sys.executable, "-c", "import train_cifar; print(vars(train_cifar.parse_args(['--device', 'cpu'])))"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert "5,000 images and 2 epochs" in done.stdout
    assert "--epochs 10 --subset 50000" in done.stdout
    assert "'epochs': 2" in done.stdout
    assert "'subset': 5000" in done.stdout
    args = train_cifar.parse_args(["--device", "cpu", "--epochs", "3"])
    assert (args.epochs, args.subset) == (3, None)


@pytest.mark.parametrize("options", [(), ("--optimizer", "adam", "--amp", "bf16")], ids=["sgd", "adam-bf16"])
def test_interrupted_run_resumes_bit_for_bit(run_script, tmp_path, options):
    """SIGINT in the first epoch, then --resume: parameters, running statistics and optimizer of an unbroken run."""
    tiny = (*TINY[:-1], "resnet18", "--epochs", 2, "--quiet", *options)
    run_script("train_cifar.py", *tiny, "--checkpoint", "whole.npz")
    command = [sys.executable, str(REPO / "train_cifar.py"), *map(str, tiny), "--checkpoint", "broken.npz"]
    process = subprocess.Popen(command, cwd=tmp_path, env=script_environment(), stderr=subprocess.PIPE, text=True)
    log = tmp_path / "results/train_cifar.csv"
    log.unlink()
    wait_until(process, lambda: count_rows(log) >= 1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
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
    done = run_script("train_cifar.py", *TINY, "--epochs", 5, "--lr", 1e12, "--amp", "off", status=1)
    assert done.stderr.startswith("error: the loss is ")
    assert "step" in done.stderr
    assert json.loads((tmp_path / "results/train_cifar.json").read_text())["status"].startswith("failed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_gpu_learns_and_logs_its_use(run_script, tmp_path, amp):
    run_script("train_cifar.py", "--dataset", "synthetic", "--subset", 5000, "--epochs", 3, "--model", "resnet18",
               "--device", "cuda", "--amp", amp, "--lr", 0.02)  # fmt: skip
    sidecar = json.loads((tmp_path / "results/train_cifar.json").read_text())
    assert sidecar["totals"]["best_accuracy"] > 0.3
    assert sidecar["totals"]["peak_gpu_allocated_mb"] > 0
    rows = list(csv.DictReader(open(tmp_path / "results/train_cifar.csv")))
    assert any(row["gpu_mem_mb"] for row in rows)
