"""docs/notebook.md and the data set of docs/layers.md: their code runs as it stands."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import REPO, script_environment


def code_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (REPO / page).read_text(), re.M | re.S)


def test_the_notebook_page(tmp_path):
    """All cells of docs/notebook.md, one after the other, in one interpreter."""
    for name in ("pandas", "matplotlib", "torch"):
        pytest.importorskip(name)
    cells = code_blocks("docs/notebook.md")
    assert len(cells) >= 8
    checks = ["assert np.isfinite(losses).all()", "assert change > 0", "assert len(batches) == 32"]
    program = "\n".join(["import matplotlib; matplotlib.use('agg')", *cells, *checks])
    (tmp_path / "cells.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=tmp_path,
        env=script_environment(PYTHONPATH=REPO),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_own_network_of_the_page(tmp_path):
    pytest.importorskip("torch")
    (lines,) = [block for block in code_blocks("docs/layers.md") if "nn.Module" in block]
    (tmp_path / "net.py").write_text(lines)
    options = "--dataset synthetic --subset 40 --epochs 1 --device cpu --checkpoint net.pt"
    command = [sys.executable, REPO / "train_cifar.py", "--model", "net.py:Net", *options.split()]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "net.pt").exists()


@pytest.mark.parametrize(
    "script",
    [
        "serial_cnn.py",
        "gpu_scratch.py",
        "parallel_cnn_mpi.py",
        pytest.param("parallel_cnn_hybrid.py", marks=pytest.mark.slow),
    ],
)
def test_mnist_in_a_copy_of_a_script(tmp_path, script):
    """The lines of docs/layers.md in the place that it names, with a small MNIST."""
    (lines,) = [block for block in code_blocks("docs/layers.md") if "mnist.npz" in block]
    shutil.copy2(REPO / "common.py", tmp_path)
    indented = "".join(f"    {line}\n" for line in lines.splitlines())
    loading = re.compile(r"^    data = load_(dataset|data_collectively)\(.*\)\n", re.M)
    text, count = loading.subn(lambda _: indented, (REPO / script).read_text())
    assert count == 1
    (tmp_path / "my_mnist.py").write_text(text)

    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 48), ("test", 12)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        noise = rng.integers(40, size=(n, 28, 28), dtype=np.uint8)
        arrays[f"x_{split}"] = noise + 20 * labels[:, None, None]  # brightness is the digit
        arrays[f"y_{split}"] = labels
    np.savez(tmp_path / "mnist.npz", **arrays)
    command = [sys.executable, "my_mnist.py", "--epochs", "2", "--batch-size", "8"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mnist" in done.stdout
    with np.load(tmp_path / "results/my_mnist_metrics.npz") as metrics:
        assert metrics["confusion"].sum() == 12
        assert metrics["train_loss"][1] < metrics["train_loss"][0]
