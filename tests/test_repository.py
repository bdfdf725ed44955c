"""The repository as its users meet it: make, the README's commands, what the files promise."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO, finish, run_usage_line, script_environment, start_command, usage_lines

SCRIPTS = sorted(path.name for path in REPO.glob("*.py"))
TINY = {
    "gpu_scratch.py": ["--epochs", "1", "--subset", "40", "--dataset", "synthetic"],
    "parallel_cnn_hybrid.py": ["--epochs", "1", "--subset", "40", "--dataset", "synthetic"],
    "parallel_cnn_mpi.py": ["--epochs", "1", "--subset", "40", "--dataset", "synthetic"],
    "serial_cnn.py": ["--epochs", "1", "--subset", "40", "--dataset", "synthetic"],
    "train_cifar.py": [
        "--epochs",
        "1",
        "--subset",
        "16",
        "--batch-size",
        "8",
        "--dataset",
        "synthetic",
    ],
    "s3_server.py": ["--dataset", "synthetic"],
    "train_resnet50_split_cores.py": [
        "--subset",
        "8",
        "--batch-size",
        "4",
        "--micro-batches",
        "2",
        "--epochs",
        "1",
        "--rounds",
        "3",
        "--dataset",
        "synthetic",
    ],
    "demo.py": ["--epochs", "1", "--subset", "40", "--dataset", "synthetic"],
    "analyze_results.py": [],
    "make_report.py": [],
    "run_experiments.py": [
        "--epochs",
        "1",
        "--subset",
        "64",
        "--repeats",
        "1",
        "--dataset",
        "synthetic",
    ],
    "bench.py": [
        "--dataset",
        "synthetic",
        "--pairs",
        "7",
        "--quick",
        "--only",
        "serial_cnn.py, CNN, batch 32",
    ],
}
NEEDED = {  # what must be there before a script runs, and how it gets there
    "analyze_results.py": {
        "results/index.json": "python run_experiments.py --only serial",
        "results/serial_cnn.csv": "python serial_cnn.py",
        "results/parallel_cnn_mpi.csv": "mpirun -np 2 python parallel_cnn_mpi.py",
    },
    "make_report.py": {
        "results/index.json": "python run_experiments.py --only serial",
        "results/analysis/analysis.json": "python analyze_results.py",
    },
}
TINY_MAKE = {
    "train-cifar": ["EPOCHS=1", "SUBSET=16", "ARGS=--dataset synthetic --batch-size 8 --model cnn"],
    "train-cifar-s3": [
        "EPOCHS=1",
        "SUBSET=16",
        "ARGS=--batch-size 8 --model cnn",
        "S3_DATA=--subset 40 --dataset synthetic",
    ],
    "split-cores": [
        "EPOCHS=1",
        "SUBSET=8",
        "ARGS=--dataset synthetic --batch-size 4 --micro-batches 2",
    ],
    "serial": ["EPOCHS=1", "SUBSET=16", "ARGS=--dataset synthetic"],
    "gpu": ["EPOCHS=1", "SUBSET=16", "ARGS=--dataset synthetic"],
    "demo": ["EPOCHS=1", "SUBSET=16", "ARGS=--dataset synthetic"],
    "experiments": ["EPOCHS=1", "SUBSET=64", "ARGS=--dataset synthetic --repeats 1 --only mpi"],
    "bench": ["ARGS=--dataset synthetic --quick --only 'serial_cnn.py, CNN, batch 32'"],
}


def readme_lines():
    blocks = re.findall(r"```sh\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    return [
        line.split("  #")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if line.strip()
    ]


def all_usage_lines():
    lines = [
        (name, line) for name in SCRIPTS if name != "common.py" for line in usage_lines(REPO / name)
    ]
    return lines + [("README.md", line) for line in readme_lines()]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder for all lines that run a script, so that Numba compiles once."""
    return tmp_path_factory.mktemp("scripts")


def run_line(where, line, cwd, scripts):
    """Run a command of the documentation as written, with tiny sizes after its own options."""
    words = shlex.split(line)
    if words[0] in ("python", "mpirun", "torchrun"):
        script = next(word for word in words if word.endswith(".py"))
        if "--source disk" in line:
            folder = words[words.index("--data-dir") + 1]
            run_usage_line(
                scripts, REPO / script, f"python {script} --export {folder}", *TINY[script]
            )
        for file, needed in NEEDED.get(script, {}).items():
            if not (scripts / file).exists():
                name = next(word for word in needed.split() if word.endswith(".py"))
                run_usage_line(scripts, REPO / name, needed, *TINY[name])
        device = ["--device", "auto"] if "--device" in words else []  # tests need no GPU
        return run_usage_line(scripts, REPO / script, line, *TINY[script], *device)
    assert words[0] == "make", f"{where}: {line}"
    copy = shutil.copytree(
        REPO, cwd / "checkout", ignore=shutil.ignore_patterns(".*", "data", "results")
    )
    for target in (*["experiments"] * (words[1] in ("analyze", "report")), words[1]):
        command = [
            "make",
            f"PYTHON={sys.executable}",
            target,
            *words[2:],
            *TINY_MAKE.get(target, []),
        ]
        done = subprocess.run(
            command, cwd=copy, env=script_environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done


@pytest.mark.parametrize(("where", "line"), sorted(set(all_usage_lines())))
def test_usage_line_runs_as_written(where, line, tmp_path, scripts):
    if line == "make s3-server":
        pytest.skip("runs until Ctrl-C: tests/test_train_cifar_s3.py has it")
    if "update_readme.py" in line:
        pytest.skip("works on the repository itself: tests/test_update_readme.py has it")
    if line in ("make test", "make setup") or line.startswith("PIP_EXTRA_INDEX_URL"):
        pytest.skip("runs this test, or installs the packages that run it")
    run_line(where, line, tmp_path, scripts)


def test_every_script_has_usage_lines_and_is_in_the_readme():
    readme = (REPO / "README.md").read_text()
    for name in SCRIPTS:
        assert f"`{name}`" in readme
        if name != "common.py":
            assert usage_lines(REPO / name), name


def test_every_file_and_option_in_the_readme_exists():
    readme = (REPO / "README.md").read_text()
    run = re.findall(r"^(?:python|mpirun|torchrun) .*?(\w+\.py)", readme, re.M)
    named = {*re.findall(r"`([a-z_0-9]+\.py)`", readme), *run}
    assert named <= set(SCRIPTS)
    help_text = "".join(
        subprocess.run(
            [sys.executable, str(REPO / name), "--help"], capture_output=True, text=True, check=True
        ).stdout
        for name in SCRIPTS
        if name != "common.py"
    )
    ours = re.sub(
        r"```text\n.*?```|`pip [^`]*`", "", readme, flags=re.S
    )  # Slurm's options and pip's are not ours
    options = set(re.findall(r"--[a-z][a-z-]+", ours)) - {"--help"}
    assert options <= set(re.findall(r"--[a-z][a-z-]+", help_text))


def test_scripts_do_not_import_each_other():
    """One script and common.py are all that a copy needs; only bench.py, which measures the others, imports them."""
    modules = {name.removesuffix(".py") for name in SCRIPTS} - {"common"}
    for name in set(SCRIPTS) - {"bench.py"}:  # the others start them as processes
        tree = ast.parse((REPO / name).read_text())
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & modules, name


def test_common_imports_numpy_and_the_standard_library_only():
    code = "import sys, common; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split()) - {"common"}
    heavy = {
        "torch",
        "torchvision",
        "psutil",
        "tqdm",
        "threadpoolctl",
        "numba",
        "mpi4py",
        "cupy",
        "scipy",
        "obstore",
        "botocore",
    }
    assert "numpy" in loaded
    assert not loaded & heavy


def test_requirements_are_pinned():
    for name in ("requirements.txt", "requirements-gpu.txt"):
        for line in (REPO / name).read_text().splitlines():
            requirement = line.partition("#")[0].strip()
            assert not requirement or re.match(
                r"[\w\[\]-]+==[\w.]+(; python_version .*)?$", requirement
            ), line


def test_bare_make_lists_every_target():
    listed = subprocess.run(["make"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"^([a-z0-9-]+):.*##", (REPO / "Makefile").read_text(), re.M):
        assert re.search(rf"^make {target}  +\S", listed, re.M), target


@pytest.mark.parametrize("variable", ["BASE_PYTHON", "PYTHON"])
def test_an_old_python_is_named(tmp_path, variable):
    """A stand-in for an interpreter that says it is 3.9: make stops before it makes anything."""
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.18 && exit 0\nexit 1\n')
    old.chmod(0o755)
    for name in ("Makefile", "requirements.txt", "requirements-gpu.txt"):
        shutil.copy(REPO / name, tmp_path)
    done = subprocess.run(
        ["make", f"{variable}={old}", "test"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: Python 3.10 or newer is needed" in done.stderr
    assert "3.9.18" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_changed_requirements_refresh_the_environment(tmp_path):
    """.venv is made once, kept as long as the requirements are the same, and refreshed when they change."""
    for name in ("Makefile", "requirements-gpu.txt"):
        shutil.copy(REPO / name, tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    make = ["make", f"BASE_PYTHON={sys.executable}", "setup"]

    def installs():
        done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return "pip install" in done.stdout

    (tmp_path / "requirements-gpu.txt").write_text("")
    assert installs()
    assert not installs()
    (tmp_path / "requirements.txt").write_text("# changed\n")
    later = (
        tmp_path / ".venv/.ready"
    ).stat().st_mtime_ns + 10**6  # a clock that ticks slowly may give both the same
    os.utime(tmp_path / "requirements.txt", ns=(later, later))
    assert installs()


@pytest.mark.parametrize(
    ("kilobytes", "command"),
    [
        (1_500_000, "python serial_cnn.py"),
        (1_500_000, "python gpu_scratch.py"),
        (1_500_000, "mpirun -np 2 python parallel_cnn_mpi.py --global-batch-size 20000"),
        (3_000_000, "python train_cifar.py --model cnn"),  # PyTorch itself takes half of it
    ],
)
def test_memory_that_does_not_suffice_is_told_in_one_line(tmp_path, kilobytes, command):
    """Batches of 10,000 images in little address space; of two ranks one has little, and ends the job of both."""
    python = f"{sys.executable} {REPO}/"
    limited = f"sh -c '[ ${{PMI_RANK:-1}} = 1 ] && ulimit -v {kilobytes}; exec \"$@\"' sh {python}"
    command = command.replace("mpirun", f"{Path(sys.executable).parent}/mpirun").replace(
        "python ", limited
    )
    command += " --dataset synthetic --subset 20000 --batch-size 10000 --quiet"
    threads = {
        "OMP_NUM_THREADS": 1,
        "OPENBLAS_NUM_THREADS": 1,
    }  # their stacks are address space too
    _, err = finish(start_command(tmp_path, shlex.split(command), threads), status=1, timeout=240)
    assert "Traceback" not in err
    lines = [line.removeprefix("[rank 1] ") for line in err.splitlines() if "error: " in line]
    assert re.match(
        "error: the memory does not suffice: give a smaller --batch-size .*allocate", lines[0]
    )
