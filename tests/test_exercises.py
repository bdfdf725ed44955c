"""The lab sheets in docs/exercises.md: worked solutions are right, typical wrong ones are not."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO, refused, script_environment

import check_exercise
from common import LOG_COLUMNS

PAGE = (REPO / "docs/exercises.md").read_text()
STARTS = REPO / "docs/exercises"
SOLUTIONS = REPO / "tests/exercises"
FILES = {  # number: the student's file
    1: "my_layer.py",
    2: "my_conv.py",
    3: "my_ring.py",
    4: "my_server.py",
    5: "my_local_sgd.py",
    6: "my_alpha_beta.py",
    7: "my_scaling.py",
    8: "my_race.py",
    9: "my_roofline.py",
    10: "my_pipeline.py",
    11: "my_transpose.py",
    12: "my_s3.py",
}
NEEDS_CXX = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler, g++")
# These take less than a second in this process; the others need mpirun or a compilation.
QUICK = (1, 2, 6, 7, 9, 10, 11, 12)


# --------------------------------------------------------------------------------------------------
# Solutions
# --------------------------------------------------------------------------------------------------


def definitions(code):
    """{name: slice of its lines} of the top-level functions, classes and constants."""
    found = {}
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = slice(first - 1, node.end_lineno)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = slice(node.lineno - 1, node.end_lineno)
    return found


def solve(exercise, *changes):
    """The sheet's code with the solution's definitions in place of those of the same name.

    changes: (old, new) texts, to make the solution another one.
    """
    solution = (SOLUTIONS / FILES[exercise]).read_text()
    for old, new in changes:
        assert old in solution
        solution = solution.replace(old, new)
    code = (STARTS / FILES[exercise]).read_text()
    lines = code.splitlines(keepends=True)
    solved = {}
    for name, place in definitions(solution).items():
        solved[name] = "".join(solution.splitlines(keepends=True)[place])
    helpers = [text + "\n\n" for name, text in solved.items() if name not in definitions(code)]
    for place in reversed(definitions(code).values()):
        (name,) = (name for name, other in definitions(code).items() if other == place)
        if name in solved:
            lines[place] = [solved[name]]
    first = min(place.start for place in definitions(code).values())
    return "".join(lines[:first] + helpers + lines[first:])


def write(folder, exercise, *changes):
    path = folder / FILES[exercise]
    path.write_text(solve(exercise, *changes))
    return path


def judge(exercise, path, monkeypatch):
    """The line that the command prints, from check_exercise.judge() in this process."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    return ": ".join(check_exercise.judge(exercise, path))


def run_check(exercise, path, status, timeout=300):
    """The last line that the command prints."""
    script = REPO / "experiments/check_exercise.py"
    command = [sys.executable, script, exercise, path, "--timeout", timeout]
    done = subprocess.run(
        list(map(str, command)), env=script_environment(), capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()[-1]


def skip_without_compiler(exercise):
    if exercise == 11 and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler, g++")


@pytest.mark.parametrize("exercise", QUICK)
def test_solution_is_right_and_the_start_is_not(exercise, tmp_path, monkeypatch):
    skip_without_compiler(exercise)
    line = judge(exercise, write(tmp_path, exercise), monkeypatch)
    assert line.startswith("right: ")
    line = judge(exercise, STARTS / FILES[exercise], monkeypatch)
    assert line.startswith(f"wrong: {FILES[exercise]}: ")


def test_command_checks_a_ring(tmp_path):
    path = write(tmp_path, 3)
    path.write_text(path.read_text() + "\nprint('a line of my own')\n")
    script = REPO / "experiments/check_exercise.py"
    done = subprocess.run([sys.executable, script, "3", path], capture_output=True, text=True)
    assert done.stdout.count("a line of my own") == 5
    assert done.stdout.splitlines()[-1].startswith("right: the sum on 1 to 5 ranks")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("exercise", sorted(set(FILES) - {3}))
def test_command_says_right(exercise, tmp_path):
    skip_without_compiler(exercise)
    assert run_check(exercise, write(tmp_path, exercise), 0).startswith("right: ")


@pytest.mark.slow
@pytest.mark.parametrize("exercise", sorted(set(FILES) - {3, *QUICK}))
def test_command_says_that_the_start_is_wrong(exercise):
    line = run_check(exercise, STARTS / FILES[exercise], 1)
    assert line.startswith(f"wrong: {FILES[exercise]}: ")


WHOLE_ARRAYS = """
def ring_allreduce(comm, array):
    outgoing = array.copy()
    incoming = array.copy()
    for _ in range(comm.size - 1):
        for turn in (0, 1):
            if comm.rank % 2 == turn:
                comm.Send(outgoing, (comm.rank + 1) % comm.size)
            else:
                comm.Recv(incoming, (comm.rank - 1) % comm.size)
        array += incoming
        outgoing[...] = incoming
"""
CLASSES_IN_PARALLEL = """
from numba import njit, prange
@njit(parallel=True)
def count_labels(labels, counts):
    for c in prange(len(counts)):
        counts[c] = (labels == c).sum()
"""
WHOLE_ARRAY_REDUCTION = """
import numpy as np
from numba import njit, prange
@njit(parallel=True)
def count_labels(labels, counts):
    total = np.zeros(len(counts), np.int64)
    for i in prange(len(labels)):
        one = np.zeros(len(counts), np.int64)
        one[labels[i]] = 1
        total += one
    counts[:] = total
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [CLASSES_IN_PARALLEL, WHOLE_ARRAY_REDUCTION])
def test_other_ways_without_a_race_are_right(code, tmp_path):
    path = tmp_path / "my_race.py"
    path.write_text(code)
    assert run_check(8, path, 0).startswith("right: no two of 4 threads")


# --------------------------------------------------------------------------------------------------
# Wrong answers: what is changed in the solution, and what the line says of it
# --------------------------------------------------------------------------------------------------

QUICK_WRONG = [
    (1, "self.da[...] =", "self.da =", r"PReLU\.da is a new array"),
    (1, "tuple(range(dout.ndim - 1))", "(0, 1, 2)", r"line \d+, self\.da.*AxisError"),
    (1, "1, self.a)", "1, 0)", r"dx\[.*\] is -?0, central differences give"),
    (1, "return np.where(x > 0", "np.where(x > 0", r"forward\(x\) is None: is a return missing"),
    (2, "target +=", "target[...] =", r"with kernel 3 and dilation 1 dx\[.*\] is"),
    (2, "[..., ::d, ::d]", "", r"line \d+, out = .*ValueError"),
    (2, ".transpose(0, 1, 2, 4, 5, 3)", "", r"forward\(x\)\[.*\] is"),
    (6, "2 * (ranks - 1)", "(ranks - 1)", r"ring_seconds\(.*\) is 0\.00101, 0\.00202 is expected"),
    (6, ' and row["epoch"] == training["epoch"]', "", "0.2 s in the 2 steps"),
    (6, "return tuple(solution)", "return solution[0]", r"\(alpha, beta\) is expected"),
    (7, "share + (1 - share) / ranks)", "share + 1 / ranks)", r"amdahl\(0\.1, 2\) is"),
    (7, "share * (ranks - 1)", "share * ranks", r"gustafson\(0\.1, 2\) is"),
    (
        7,
        'float(parallel["images',
        'float(serial["images',
        r"speedup\(\) of 30 and 50 images/s is 1",
    ),
    (9, "2 * n * h", "n * h", r"conv_flops\(.*\) is"),
    (9, "4 * 2 * matrix", "4 * matrix", r"im2col_bytes\(.*\) is"),
    (9, "min(peak", "max(peak", r"attainable\(.*\) is"),
    (10, "if k >= in_flight", "if k > in_flight", r"forward\[1, 0\] is 1, 3 is expected"),
    (10, "1 - busy[0] / end, ", "busy[0] / end, ", r"idle_shares\(.*\[0\] is"),
    (11, "__syncthreads();", "", r"64 .* 96: out\[.*\] is"),
    (
        11,
        "    __syncthreads();",
        "else return; __syncthreads();",
        r"not all threads .*__syncthreads",
    ),
    (11, "if (out_row < cols && out_col < rows)", "", "touches an element outside"),
    (11, "[threadIdx.y];", "[threadIdx.y]", r"KERNEL cannot be compiled: line \d+: expected .;"),
    (12, "range(3)", "range(2)", "damaged 2 times is fetched 2 times"),
    (12, "i + ahead + 1]", "i + ahead + 2]", "2 shards have been asked for, 1 are expected"),
    (12, "{entry.name} arrived", "it arrived", "an error that names it"),
]
WRONG = [
    (3, "target += incoming", "target[...] = incoming", r"2 ranks, 1 numbers: rank \d: array\[0\]"),
    (3, "comm.Send(", "comm.Isend(", r"line \d+, comm\.Isend.* is used: do it with comm\.Send and"),
    (4, "optimizer.step(images,", "optimizer.step(1,", r"step\(1\) for \d images"),
    (4, "    comm.Recv(model.params, 0)\n    for", "    for", "weights that the server has had"),
    (5, "model.params /= comm.size", "pass", r"6 steps, period 3: params\[.*\] is"),
    (5, "    if steps % period:\n        average()\n", "", r"7 steps, period 3: params\[.*\] is"),
    (12, "i + ahead + 1]", "i + 1]", "on shard 0, 1 shards have been asked for, 3 are expected"),
    (8, "get_thread_id(), ", "0, ", r"a race: more than one thread writes partial_counts\[0, \d\]"),
    (8, "prange(len(labels))", "range(len(labels))", "no loop over prange"),
    (8, "njit(parallel=True)", "njit", r"not compiled by @njit\(parallel=True\)"),
]
DEADLOCKS = [  # what is in the line: where each rank waits
    (3, "rank % 2 == 0", "True", r"rank 0 in line \d+, comm\.Send.*rank 1 in line \d+, comm\.Send"),
    (4, "MPI.ANY_SOURCE", "1 + optimizer.steps % 2", r"rank 0 in line \d+, comm\.Recv.*rank 2 in"),
]


@pytest.mark.parametrize(("exercise", "old", "new", "said"), QUICK_WRONG)
def test_wrong_answer_is_wrong(exercise, old, new, said, tmp_path, monkeypatch):
    skip_without_compiler(exercise)
    line = judge(exercise, write(tmp_path, exercise, (old, new)), monkeypatch)
    assert re.match(rf"wrong: {FILES[exercise]}: .*{said}", line), line


@pytest.mark.slow
@pytest.mark.parametrize(("exercise", "old", "new", "said"), WRONG)
def test_command_says_wrong(exercise, old, new, said, tmp_path):
    line = run_check(exercise, write(tmp_path, exercise, (old, new)), 1)
    assert re.match(rf"wrong: {FILES[exercise]}: .*{said}", line), line


@pytest.mark.slow
@pytest.mark.parametrize(("exercise", "old", "new", "said"), DEADLOCKS)
def test_command_says_where_ranks_wait(exercise, old, new, said, tmp_path):
    line = run_check(exercise, write(tmp_path, exercise, (old, new)), 1, timeout=8)
    assert re.match(rf"wrong: {FILES[exercise]}: not done after 8 s: .*{said}", line), line


@pytest.mark.slow
def test_ring_that_passes_whole_arrays_on_is_wrong(tmp_path):
    path = tmp_path / "my_ring.py"
    path.write_text(WHOLE_ARRAYS)
    line = run_check(3, path, 1)
    assert re.match(r"wrong: my_ring.py: 3 ranks, 12 numbers: rank \d sends 24 numbers in 2", line)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", "module 'my_layer' has no attribute 'PReLU'"),
        ("x = (\n", r"'\(' was never closed \(my_layer.py, line 1\)"),
        ("import nonsense", "line 1, import nonsense: ModuleNotFoundError"),
        ("def PReLU(*a, **b):\n    return 1 / 0", "line 2, return 1 / 0: ZeroDivisionError"),
    ],
)
def test_broken_file_is_wrong(code, said, tmp_path, monkeypatch):
    path = tmp_path / "my_layer.py"
    path.write_text(code)
    assert re.match(f"wrong: my_layer.py: .*{said}", judge(1, path, monkeypatch))


@pytest.mark.slow
def test_a_process_that_dies_is_wrong(tmp_path):
    path = tmp_path / "my_layer.py"
    path.write_text("import os\nos.abort()")
    assert "my_layer.py ended with status -6" in run_check(1, path, 1)


def test_what_cannot_be_checked_is_refused(tmp_path, monkeypatch):
    missing = tmp_path / "my_layer.py"
    assert "does not exist: docs/exercises/ has" in refused(check_exercise.main, 1, missing)
    assert "from 1 to 12" in refused(check_exercise.main, 13, missing)
    monkeypatch.setenv("PATH", "")
    assert "no g++ in PATH" in refused(check_exercise.main, 11, STARTS / FILES[11])


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


def sheets():
    """{number: (title, text)}"""
    found = re.findall(r"^## (\d+)\. ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return {int(number): (title, text) for number, title, text in found}


def commands(text):
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.splitlines()]


def test_every_sheet_is_complete():
    assert list(sheets()) == list(FILES) == list(check_exercise.CHECKS)
    assert sorted(path.name for path in STARTS.glob("*.py")) == sorted(FILES.values())
    assert sorted(path.name for path in SOLUTIONS.glob("*.py")) == sorted(FILES.values())
    for number, (title, text) in sheets().items():
        parts = re.findall(r"^\*\*(\w+)\.\*\*", text, re.M)
        assert parts == ["Aim", "Start", "Write", "Check", "Observe"], title
        assert re.search(rf"^\| {number} \| \[{title}\].* \| \d+ \|", PAGE, re.M)
        assert "TODO" in (STARTS / FILES[number]).read_text()
        lines = commands(text)
        assert lines[0] == f"cp docs/exercises/{FILES[number]} ."
        assert f"python experiments/check_exercise.py {number} {FILES[number]}" in lines


def test_names_in_the_sheets_exist():
    """A function or class that a sheet names is in one of the files that the sheet names."""
    words_of_tools = {"mpirun", "communication"}
    for title, text in sheets().values():
        known = set(words_of_tools)
        for name in ("common.py", *re.findall(r"\w+\.py", text)):
            for path in (REPO / name, STARTS / name):
                if path.exists():
                    known.update(re.findall(r"\w+", path.read_text()))
        for name in re.findall(r"`([A-Za-z_]\w*)(?:\(\))?`", text):
            assert name in known, f"{title}: {name}"


def test_solutions_are_as_long_as_the_page_says():
    for number in FILES:
        code = (SOLUTIONS / FILES[number]).read_text()
        lines = [line for line in code.splitlines()[1:] if line.strip()]
        assert 8 <= len(lines) <= 60, number


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A fresh clone, for all commands of the page."""
    ignored = shutil.ignore_patterns(".*", "data", "results", "__pycache__", "tests", "my_*.py")
    folder = tmp_path_factory.mktemp("clone") / "checkout"
    shutil.copytree(REPO, folder, ignore=ignored)
    shutil.copytree(STARTS, folder / "docs/exercises", dirs_exist_ok=True)
    make_results(folder)
    return folder


TINY = "--dataset synthetic --subset 64 --epochs 1"
TINY_OPTIONS = {  # what makes the commands of a student's file small
    "my_serial.py": TINY,
    "my_ring.py": TINY,
    "my_server.py": TINY,
    "my_local_sgd.py": f"{TINY} --batch-size 8",
}


def run_line(line, folder, status=0):
    """Run a command as written, with what makes it small appended."""
    script = re.findall(r"my_\w+\.py", line)[-1]
    if line.startswith(("cp ", "python experiments/check_exercise")):
        options = ""
    else:
        options = TINY_OPTIONS.get(script, "")
    done = subprocess.run(
        f"{line} {options}",
        shell=True,
        cwd=folder,
        env=script_environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, f"{line}\n{done.stdout}{done.stderr}"
    return done


def make_results(folder):
    """What the commands of the scripts would write, which tests/test_repository.py runs."""
    (folder / "results").mkdir(exist_ok=True)
    log = ",".join(LOG_COLUMNS) + check_exercise.LOG_ROWS
    for name in ("ring", "serial_64", "serial_32", "two_ranks"):
        (folder / f"results/{name}.csv").write_text(log)
    shutil.copy(
        REPO / "measurements/split_cores.json", folder / "results/split_cores_benchmark.json"
    )
    export = "python train_cifar.py --export s3://cifar10 --dataset synthetic --subset 40"
    subprocess.run(
        [sys.executable, "experiments/s3_server.py", sys.executable, *export.split()[1:]],
        cwd=folder,
        env=script_environment(),
        check=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", FILES)
def test_commands_of_a_sheet_run_as_written(number, checkout):
    """In order, with the solution in place of the copied file."""
    skip_without_compiler(number)
    for line in commands(sheets()[number][1]):
        if "my_" not in line or "--stall-timeout" in line:
            continue  # tests/test_repository.py runs it; hangs on purpose: the next test
        done = run_line(line, checkout)
        if line.startswith("cp docs"):
            write(checkout, number)
        elif "check_exercise" in line:
            assert done.stdout.startswith("right: ")


@pytest.mark.slow
def test_the_ring_of_the_sheet_hangs_and_says_where(checkout):
    run_line("cp docs/exercises/my_ring.py .", checkout)
    (line,) = [line for line in commands(sheets()[3][1]) if "--stall-timeout" in line]
    done = run_line(line, checkout, status=1)
    for rank in (0, 1):
        assert re.search(rf"\[rank {rank}\] +comm\.Send\(outgoing, right\)", done.stderr)


@pytest.mark.slow
def test_own_layer_trains_in_a_copy_of_the_script(checkout):
    """Sheet 1, the last observation."""
    write(checkout, 1)
    script = (checkout / "serial_cnn.py").read_text()
    old = re.search(r"Dense\(.*, 256, \*\*options\),\s+ReLU\(\)", script)[0]
    script = script.replace(old, old.replace("ReLU()", "PReLU(256, dtype=dtype)"))
    script = script.replace(
        "from common import (", "from my_layer import PReLU\nfrom common import ("
    )
    (checkout / "my_serial.py").write_text(script)
    run_line("python my_serial.py", checkout)
    assert (checkout / "results/my_serial.csv").exists()
