"""The repository as its users meet it: make, the documented commands, what the pages promise."""

import ast
import contextlib
import functools
import importlib
import importlib.metadata
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    NOT_INHERITED,
    REPO,
    commands_of,
    finish,
    run_usage_line,
    script_environment,
    start_command,
    usage_lines,
)

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

STUDENTS_FILE = r"\bmy_\w+\.py"  # made from docs/exercises/; tests/test_exercises.py runs them
SCRIPTS = sorted(path.name for path in REPO.glob("*.py") if path.name != "common.py")
SCRIPTS = [name for name in SCRIPTS if not re.match(STUDENTS_FILE, name)]
EXPERIMENTS = sorted(path.name for path in REPO.glob("experiments/*.py"))
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in REPO.glob("docs/*.md"))]
BASE_PACKAGES = ("numpy", "psutil", "threadpoolctl", "tqdm")

# What makes a documented command small: options that are appended to it.
SYNTHETIC = ["--dataset", "synthetic"]
TINY_TRAINING = [*SYNTHETIC, "--epochs", "1", "--subset", "40"]
TINY_SPLIT = "--epochs 1 --subset 8 --batch-size 4 --micro-batches 2 --rounds 3".split()
TINY = {
    "demo.py": TINY_TRAINING,
    "gpu_scratch.py": TINY_TRAINING,
    "parallel_cnn_hybrid.py": TINY_TRAINING,
    "parallel_cnn_mpi.py": TINY_TRAINING,
    "serial_cnn.py": TINY_TRAINING,
    "train_cifar.py": [*SYNTHETIC, *"--epochs 1 --subset 16 --batch-size 8".split()],
    "train_resnet50_split_cores.py": [*SYNTHETIC, *TINY_SPLIT],
    "analyze_results.py": [],
    "bench.py": [*SYNTHETIC, "--quick", "--pairs", "7", "--only", "serial_cnn.py, CNN, batch 32"],
    "make_report.py": [],
    "predict_scaling.py": [],
    "published_scaling.py": [],
    "run_experiments.py": [*SYNTHETIC, *"--epochs 1 --subset 64 --repeats 1".split()],
    "s3_server.py": SYNTHETIC,
}
TINY_MAKE = {  # the same as variables of make
    "accuracy": ["EPOCHS=1", "SUBSET=16", "ARGS=--dataset synthetic --batch-size 8 --model cnn"],
    "bench": ["ARGS=--dataset synthetic --quick --only 'serial_cnn.py, CNN, batch 32'"],
    "demo": ["EPOCHS=1", "SUBSET=16", "ARGS=--dataset synthetic"],
    "experiments": ["EPOCHS=1", "SUBSET=64", "ARGS=--dataset synthetic --repeats 1 --only mpi"],
    "gpu": ["EPOCHS=1", "SUBSET=16", "ARGS=--dataset synthetic"],
    "serial": ["EPOCHS=1", "SUBSET=16", "ARGS=--dataset synthetic"],
    "split-cores": [f"ARGS={shlex.join([*SYNTHETIC, *TINY_SPLIT])}"],
    "train-cifar": ["EPOCHS=1", "SUBSET=16", "ARGS=--dataset synthetic --batch-size 8 --model cnn"],
    "train-cifar-s3": [
        *("EPOCHS=1", "SUBSET=16", "ARGS=--batch-size 8 --model cnn"),
        "S3_DATA=--subset 40 --dataset synthetic",
    ],
}
NEEDED = {  # {script: {file that it reads: the command that writes it}}
    "analyze_results.py": {
        "results/index.json": "python experiments/run_experiments.py --only serial",
        "results/serial_cnn.csv": "python serial_cnn.py",
        "results/parallel_cnn_mpi.csv": "mpirun -np 2 python parallel_cnn_mpi.py",
        "results/serial.ckpt.npz": "python serial_cnn.py --checkpoint results/serial.ckpt.npz",
        "results/mpi.ckpt.npz": "python parallel_cnn_mpi.py --checkpoint results/mpi.ckpt.npz",
    },
    "make_report.py": {
        "results/index.json": "python experiments/run_experiments.py --only serial",
        "results/analysis/analysis.json": "python experiments/analyze_results.py",
    },
}
NOT_RUN_HERE = {  # what the lines begin with, and why
    "make s3-server": "runs until Ctrl-C: tests/test_train_cifar_s3.py has it",
    "make readme": "works on the repository itself: tests/test_update_readme.py has it",
    "python experiments/update_readme.py": "tests/test_update_readme.py has it",
    "make test": "runs this test",
    "make lint": "continuous integration has it",
    "make data": "tests/test_import_data.py has it, with a server of its own",
    "python experiments/import_data.py": "tests/test_import_data.py has it",
    "make measure": "takes an hour",
    "make check-prediction": "takes half an hour",
    "python experiments/check_prediction.py": "tests/test_predict_scaling.py has it",
    "make setup": "installs the packages that run this test",
    "mpirun -np 2 python experiments/bench_worker.py": "reads stdin: tests/test_bench.py has it",
}


# --------------------------------------------------------------------------------------------------
# Documented commands
# --------------------------------------------------------------------------------------------------


def page_lines(page):
    """The commands in a page's ```sh blocks, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (REPO / page).read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def documented_lines():
    """{where: its command lines} of all docstrings and pages."""
    found = {name: usage_lines(REPO / name) for name in SCRIPTS}
    found |= {f"experiments/{n}": usage_lines(REPO / "experiments" / n) for n in EXPERIMENTS}
    found |= {page: page_lines(page) for page in PAGES}
    for where, lines in found.items():
        found[where] = [line for line in lines if not re.search(STUDENTS_FILE, line)]
    return {where: lines for where, lines in found.items() if lines}


def lines_to_run():
    """(where, line) of each documented command once, without those that another test file runs."""
    run = set()
    for name in (*SCRIPTS, *EXPERIMENTS):
        test = REPO / "tests" / f"test_{name}"
        if test.exists() and "run_usage_line(" in test.read_text():
            path = REPO / name if name in SCRIPTS else REPO / "experiments" / name
            run.update(usage_lines(path))
    once = {}
    for where, lines in documented_lines().items():
        for line in lines:
            if line not in run:
                once.setdefault(line, where)
    return sorted((where, line) for line, where in once.items())


def script_of(words):
    """The script that a command starts, and the words after it."""
    position = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return Path(words[position]).name, words[position + 1 :]


def assert_accepted(words):
    """The command's script exists and its parse_args() accepts the options."""
    script, argv = script_of(words)
    module = importlib.import_module(script.removesuffix(".py"))
    if not hasattr(module, "parse_args"):
        return  # bench_worker.py, which bench.py starts
    if script == "s3_server.py" and "python" in argv:  # its last argument is a command of its own
        assert_accepted(argv[argv.index("python") :])
    argv = ["auto" if word == "cuda" else word for word in argv if word != "--help"]  # needs no GPU
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            module.parse_args(argv)
        except SystemExit:
            pytest.fail(f"{script} {shlex.join(argv)}: {stderr.getvalue()}")


@pytest.mark.parametrize("where", sorted(documented_lines()))
def test_documented_commands_are_accepted(where):
    for line in documented_lines()[where]:
        if not line.startswith("PIP_EXTRA_INDEX_URL"):
            for words in commands_of(line):
                assert_accepted(words)


def test_each_documented_command_runs_in_one_test():
    """The lines that are run here and those that the scripts' own tests run are all lines."""
    everything = {line for lines in documented_lines().values() for line in lines}
    here = [line for _, line in lines_to_run()]
    assert len(here) == len(set(here))
    assert set(here) <= everything


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder for all lines that run a script, with the kernels that Numba has compiled."""
    folder = tmp_path_factory.mktemp("scripts")
    if (REPO / "__pycache__").exists():
        shutil.copytree(REPO / "__pycache__", folder / "__pycache__")
    return folder


def run_script_line(line, folder):
    """Run a documented command as written, with tiny sizes after its own options."""
    words = shlex.split(line)
    script, argv = script_of(words)
    if "--source disk" in line:
        source = argv[argv.index("--data-dir") + 1]
        export = f"python {script} --export {source}"
        run_usage_line(folder, REPO / script, export, *TINY[script])
    for file, command in NEEDED.get(script, {}).items():
        if not (folder / file).exists():
            run_script_line(command, folder)
    tiny = list(TINY[script])
    if "--device" in argv:
        tiny += ["--device", "auto"]  # tests need no GPU
    path = REPO / script if script in SCRIPTS else REPO / "experiments" / script
    run_usage_line(folder, path, line, *tiny)


def run_make_line(line, folder):
    _, target, *variables = shlex.split(line)
    ignored = shutil.ignore_patterns(".*", "data", "results")
    checkout = shutil.copytree(REPO, folder / "checkout", ignore=ignored)
    targets = [target]
    if target in ("analyze", "report"):
        targets.insert(0, "experiments")
    for name in targets:
        command = ["make", f"PYTHON={sys.executable}", name]
        if name == target:
            command += variables
        command += TINY_MAKE.get(name, [])
        done = subprocess.run(
            command,
            cwd=checkout,
            env=script_environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize(("where", "line"), lines_to_run())
def test_documented_command_runs_as_written(where, line, tmp_path, scripts):
    for start, reason in NOT_RUN_HERE.items():
        if line.startswith(start):
            pytest.skip(reason)
    if line.startswith("make"):
        run_make_line(line, tmp_path)
    else:
        run_script_line(line, scripts)


# --------------------------------------------------------------------------------------------------
# What the pages say
# --------------------------------------------------------------------------------------------------


def read_page(page):
    return (REPO / page).read_text()


def test_every_script_has_usage_lines_and_is_in_the_readme():
    readme = read_page("README.md")
    paths = [REPO / name for name in SCRIPTS]
    paths += [REPO / "experiments" / name for name in EXPERIMENTS]
    for path in paths:
        if "\ndef parse_args(" in path.read_text():  # not a module of another script
            assert usage_lines(path), path.name
            assert f"`{path.name}`" in readme
    assert "`common.py`" in readme


@functools.cache
def all_options():
    """The options that the help texts of all scripts name."""
    text = io.StringIO()
    for name in (*SCRIPTS, *EXPERIMENTS):
        module = importlib.import_module(name.removesuffix(".py"))
        if hasattr(module, "parse_args"):
            with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
                module.parse_args(["--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]+", text.getvalue()))


@pytest.mark.parametrize("page", PAGES)
def test_files_and_options_on_a_page_exist(page):
    text = read_page(page)
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        folders = ("", "experiments", "tests", "docs/exercises")
        places = [REPO / folder / name for folder in folders]
        assert any(path.exists() for path in places), name

    # The options of other programs are not ours, nor are those that a page says to add.
    ours = re.sub(r"```text\n.*?```|`(?:pipx?|srun|docker) [^`]*`", "", text, flags=re.S)
    ours = re.sub(r"torchrun .*?\.py|<!--.*?-->|`--signal=[^`]*`|`--my-\w+`", "", ours)
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", ours)) - {"--help"}
    assert options <= all_options()


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", read_page(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", read_page(page)):
        file, _, anchor = target.partition("#")
        path = (REPO / page).parent / file
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path if file else page), target


def definitions(script):
    """The names of a script's classes and functions."""
    path = REPO / script if (REPO / script).exists() else REPO / "experiments" / script
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.name for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef))}


def test_entry_points_in_the_readme_exist():
    """Each step of "Read in this order" names its file first, then what to look for there."""
    section = read_page("README.md").split("## Read in this order")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. .*?(?=^\d+\.|\Z)", section, re.M | re.S)
    assert len(steps) >= 5
    for step in steps:
        files = re.findall(r"`(\w+\.py)`", step)
        known = set().union(*(definitions(file) for file in files))
        for name in re.findall(r"`([A-Za-z_]\w*)`", step):
            assert name in known, f"{name} is not in {files}"


def test_readme_is_short_and_names_both_tiers():
    text = read_page("README.md")
    assert len(text.splitlines()) <= 180
    for word in ("make test", "make test-all", "make train-cifar", "Linux", "3.10"):
        assert word in text


def test_examples_of_layers_run():
    """The Python blocks of docs/layers.md, one after another; the layer of its own trains too."""
    import numpy as np

    rng = np.random.default_rng(0)
    names = {"np": np, "x": rng.random((8, 32, 32, 3), np.float32), "labels": np.arange(8)}
    for block in re.findall(r"```python\n(.*?)```", read_page("docs/layers.md"), re.S):
        if "mnist.npz" not in block and "nn.Module" not in block:  # tests/test_notebook.py has them
            exec(block, names)
    own = names["Model"](
        [names["Scale"](3), names["Flatten"](), names["Dense"](32 * 32 * 3, 10, rng=0)],
    )
    before = own.params.copy()
    _, dlogits = names["softmax_cross_entropy"](own.forward(names["x"]), names["labels"])
    own.backward(dlogits)
    names["SGD"](own, lr=0.01, momentum=0.9).step(8)
    assert (own.params[:3] != before[:3]).all()


# --------------------------------------------------------------------------------------------------
# Imports and packages
# --------------------------------------------------------------------------------------------------


def imported_packages(path):
    """The top-level names of all modules that a file imports, in its functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_scripts_do_not_import_each_other():
    """One script and common.py are all that a copy needs."""
    modules = {name.removesuffix(".py") for name in (*SCRIPTS, *EXPERIMENTS)}
    for name in (*SCRIPTS, "common.py"):
        assert not imported_packages(REPO / name) & modules, name


def test_common_imports_numpy_and_the_standard_library_only():
    code = "import sys, common; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split()) - {"common"}
    heavy = "torch torchvision psutil tqdm threadpoolctl numba mpi4py cupy scipy obstore botocore"
    assert "numpy" in loaded
    assert not loaded & set(heavy.split())


def test_serial_script_needs_no_more_than_the_base_packages(tmp_path):
    """With a folder that has these packages alone in place of site-packages."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in BASE_PACKAGES:
        for file in importlib.metadata.files(name):
            top = file.parts[0]  # a package's folder or a single module
            if top != ".." and not (packages / top).exists():
                site_packages = file.locate().parents[len(file.parts) - 1]
                (packages / top).symlink_to(site_packages / top)
    shutil.copy(REPO / "serial_cnn.py", tmp_path)
    shutil.copy(REPO / "common.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", "serial_cnn.py", *TINY["serial_cnn.py"]],
        cwd=tmp_path,
        env=script_environment(PYTHONPATH=packages),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_packages_of_a_copy_are_those_that_a_script_imports():
    page = read_page("docs/systems.md")
    rows = re.findall(r"^\| (`\w+\.py`[^|]*) \| ([^|]*numpy[^|]*|the same[^|]*) \|$", page, re.M)
    base = set(BASE_PACKAGES)
    modules = {"pillow": "PIL", "nvidia-ml-py": "pynvml"}
    previous = base
    seen = []
    for scripts_cell, packages_cell in rows:
        words = set(re.findall(r"[a-z0-9-]+", packages_cell))
        packages = words | (previous if "the same" in packages_cell else set())
        if "requirements-gpu" in packages_cell:
            packages |= {"cupy", "cupyx", "cupy_backends", "pynvml"}
        previous = packages
        allowed = {modules.get(name, name) for name in packages} | {"common"}
        for script in re.findall(r"`(\w+\.py)`", scripts_cell):
            seen.append(script)
            needed = imported_packages(REPO / script) - set(sys.stdlib_module_names)
            assert needed <= allowed, script
            assert base <= packages, script
    assert sorted(seen) == SCRIPTS


def requirements():
    """{package: line} of the requirement files, and whether each line pins one version."""
    found = {}
    for name in ("requirements.txt", "requirements-gpu.txt"):
        for line in (REPO / name).read_text().splitlines():
            requirement = line.partition("#")[0].strip()
            if requirement:
                found[re.match(r"[\w-]+", requirement)[0]] = requirement
    return found


def test_requirements_are_pinned():
    for line in requirements().values():
        assert re.match(r"[\w\[\]-]+==[\w.]+ ?(; ?python_version .*)?$", line), line


def test_packages_of_pyproject_are_those_of_the_requirements():
    """pyproject.toml says which package is for what, the requirement files alone which version."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {name.partition("[")[0] for group in groups for name in group}
    assert named == set(requirements())
    assert sorted(project["dependencies"]) == sorted(BASE_PACKAGES)


# --------------------------------------------------------------------------------------------------
# make and the test tiers
# --------------------------------------------------------------------------------------------------


def run_make(*words, cwd=REPO, **options):
    return subprocess.run(
        ["make", *words],
        cwd=cwd,
        env=script_environment(),
        capture_output=True,
        text=True,
        **options,
    )


def test_bare_make_lists_every_target():
    done = run_make()
    assert done.returncode == 0
    for target in re.findall(r"^([a-z0-9-]+):.*##", (REPO / "Makefile").read_text(), re.M):
        assert re.search(rf"^make {target}  +\S", done.stdout, re.M), target


def test_variables_given_to_make_do_not_reach_the_makes_of_tests(tmp_path):
    """`make test ARGS=-x` exports ARGS, and hands it on in MAKEFLAGS."""
    makefile = "show:\n\t@$(PYTHON) -c 'import os; print(*os.environ)'\n"
    (tmp_path / "Makefile").write_text(makefile)
    done = run_make("show", "ARGS=-x", f"PYTHON={sys.executable}", cwd=tmp_path)
    assert {"ARGS", "MAKEFLAGS", "PYTHON"} <= set(done.stdout.split())
    assert {"ARGS", "MAKEFLAGS", "PYTHON", "MAKELEVEL"} <= set(NOT_INHERITED)
    makefile = (REPO / "Makefile").read_text()
    for name in re.findall(r"\$\((?:if |or )?\$?\(?([A-Z][A-Z0-9_]+)[),]", makefile):
        if not re.search(rf"^(override )?{name} *:?=", makefile, re.M):
            assert name in NOT_INHERITED, name


@pytest.mark.parametrize(("mark", "tier"), [("", "quick"), ("@pytest.mark.slow", "slow")])
def test_a_failing_test_names_its_tier(tmp_path, mark, tier):
    (tmp_path / "test_failing.py").write_text(f"import pytest\n{mark}\ndef test(): assert 0\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", REPO / "pyproject.toml", "-p", "conftest", tmp_path],
        cwd=tmp_path,
        env=script_environment(PYTHONPATH=f"{REPO}:{REPO / 'tests'}"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{tier} tier: make test" in done.stdout


@pytest.mark.parametrize("variable", ["BASE_PYTHON", "PYTHON"])
def test_an_old_python_is_named(tmp_path, variable):
    """A stand-in for an interpreter that says it is 3.9: make stops before it makes anything."""
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.18 && exit 0\nexit 1\n')
    old.chmod(0o755)
    for name in ("Makefile", "requirements.txt", "requirements-gpu.txt"):
        shutil.copy(REPO / name, tmp_path)
    done = run_make(f"{variable}={old}", "test", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: Python 3.10 or newer is needed" in done.stderr
    assert "3.9.18" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_changed_requirements_refresh_the_environment(tmp_path):
    """.venv is made once, kept while the requirements are the same, refreshed when they change."""
    shutil.copy(REPO / "Makefile", tmp_path)
    for name in ("requirements.txt", "requirements-gpu.txt"):
        (tmp_path / name).write_text("")

    def installs():
        done = run_make(f"BASE_PYTHON={sys.executable}", "setup", cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        return "pip install" in done.stdout

    assert installs()
    assert not installs()
    (tmp_path / "requirements.txt").write_text("# changed\n")
    # A clock that ticks slowly may give both files the same time.
    later = (tmp_path / ".venv/.ready").stat().st_mtime_ns + 10**6
    os.utime(tmp_path / "requirements.txt", ns=(later, later))
    assert installs()


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kilobytes", "command"),
    [
        (1_500_000, "python serial_cnn.py"),
        (1_500_000, "python gpu_scratch.py"),
        (1_500_000, "mpirun -np 2 python parallel_cnn_mpi.py --global-batch-size 20000"),
        (3_000_000, "python train_cifar.py --model cnn"),  # PyTorch itself takes half of it
    ],
)
def test_too_little_memory_is_one_line(tmp_path, kilobytes, command):
    """Batches of 10,000 images in little address space; of two ranks one has little."""
    python = f"{sys.executable} {REPO}/"
    limited = f"sh -c '[ ${{PMI_RANK:-1}} = 1 ] && ulimit -v {kilobytes}; exec \"$@\"' sh {python}"
    command = command.replace("mpirun", f"{Path(sys.executable).parent}/mpirun")
    command = command.replace("python ", limited)
    command += " --dataset synthetic --subset 20000 --batch-size 10000 --quiet"
    threads = {"OMP_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}  # their stacks need space too
    _, err = finish(start_command(tmp_path, shlex.split(command), threads), status=1, timeout=240)
    assert "Traceback" not in err
    lines = [line.removeprefix("[rank 1] ") for line in err.splitlines() if "error: " in line]
    assert re.match("error: out of memory: use a smaller --batch-size .*allocate", lines[0])
