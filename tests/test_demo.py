"""demo.py: real trainings, on a real terminal and without one, interrupted by real signals."""

import contextlib
import io
import math
import os
import re
import signal
import sys
import time

import psutil
import pytest
from helpers import (
    assert_gone,
    assert_one_error_line,
    finish,
    refused,
    run_on_terminal,
    start,
    start_on_terminal,
)

import demo
from common import TrainingError, available_cores, stop_processes

TINY = ("--dataset", "synthetic", "--epochs", 1, "--subset", 256)
LONG = ("--dataset", "synthetic", "--epochs", 1000, "--subset", 640)
ENDING = "\033[0m\033[?25h\033[?1049l"  # colours off, cursor on, the terminal's own screen again


@pytest.fixture
def env(cache, tmp_path):
    """An environment whose temporary folder is empty, so that what stays in it is seen."""
    (tmp_path / "temporary").mkdir()
    return {
        **cache,
        "TMPDIR": tmp_path / "temporary",
        "TERM": "xterm-256color",
        "LC_ALL": "C.UTF-8",
    }


@pytest.fixture
def signals():
    """demo.main() in this process sets signal handlers: put back what was there."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def left_over(tmp_path):
    return [p.name for p in (tmp_path / "temporary").iterdir() if p.name.startswith("demo-")]


def read_until(terminal, text, timeout=90):
    """What the terminal shows, up to the first time that `text` is in it."""
    got, deadline = "", time.monotonic() + timeout
    while text not in got:
        assert time.monotonic() < deadline, got
        got += os.read(terminal, 65536).decode(errors="replace")
    return got


def rest(terminal):
    got = b""
    try:
        while part := os.read(terminal, 65536):
            got += part
    except OSError:  # how Linux says that the other side is closed
        pass
    return got.decode(errors="replace")


def table_rows(text):
    """{name: (seconds, images/s, speed-up, efficiency in %)} of the table at the end."""
    rows = re.findall(
        r"^ *([a-zMPI]+(?:, 1 thread)?)  .*?([\d.]+) s +([\d,]+) .*? ([\d.]+) +(\d+)%$", text, re.M
    )
    return {name: [float(n.replace(",", "")) for n in numbers] for name, *numbers in rows}


@pytest.mark.slow
def test_piped_it_prints_plain_lines_and_measured_speed_ups(tmp_path, env):
    out, err = finish(start(tmp_path, "demo.py", *TINY, "--dtype", "float64", env=env), timeout=240)
    assert err == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)
    assert out.startswith("SYNTHETIC DATA, not CIFAR-10, 256 images, 1 epoch, batch 64 in all\n")
    for name in demo.SCRIPTS:
        assert re.search(
            rf"^{name} .*100%  epoch 1/1 done, [\d.]+ s  [\d,]+ images/s  loss [\d.]+$", out, re.M
        )
    rows = table_rows(out)
    assert list(rows) == list(demo.SCRIPTS)
    assert rows["serial"][2:] == rows["hybrid, 1 thread"][2:] == [1.0, 100]
    for name, cores in (("MPI", 2), ("hybrid", None)):
        _, images_per_s, speedup, efficiency = rows[name]
        baseline = rows[demo.BASELINES[name]][1]
        # both speeds are printed as whole numbers: the ratio of slow ones is less exact
        rounding = 0.005 + speedup * (0.5 / images_per_s + 0.5 / baseline)
        assert speedup == pytest.approx(images_per_s / baseline, abs=1.1 * rounding)
        if cores:
            assert efficiency == pytest.approx(100 * speedup / cores, abs=0.8)
    differences = re.search(r"in\s+4\s+steps:(.*?)\.\s", out + " ", re.S)[1].split(";")
    assert len(differences) == 3
    assert all(0 <= float(text.split()[-1]) < 1e-8 for text in differences)
    assert left_over(tmp_path) == []


def test_on_a_terminal_of_80_by_24(tmp_path, env):
    sent, lines = run_on_terminal(
        tmp_path, "demo.py", *TINY, columns=80, lines=24, env={**env, "NO_COLOR": 1}
    )
    before, live = sent.split("\033[?1049h\033[?25l")
    live, after = live.split(ENDING)
    assert before == ""
    assert "\033" not in after
    assert set(re.findall(r"\033\[[^A-Za-z]*[A-Za-z]", live)) <= {
        "\033[H",
        "\033[K",
        "\033[J",
    }  # no colours
    frames = [re.sub(r"\033\[\w|\r", "", frame).split("\n") for frame in live.split("\033[H")[1:]]
    assert len(frames) > 3
    assert all(len(frame) <= 24 and max(map(len, frame)) <= 80 for frame in frames)
    assert any("waiting" in line for line in frames[0])
    assert sum("done" in line for line in frames[-1]) == 1  # the line below the panels
    assert frames[-1][-4].count("images/s") == 4
    assert any("⠀" < c <= "⣿" for line in frames[-1] for c in line)  # a curve
    shown = after.replace("\r", "").split("\n")
    assert len(shown) <= 24
    assert max(map(len, shown)) <= 80
    assert list(table_rows("\n".join(lines))) == list(demo.SCRIPTS)


def test_frame_of_a_terminal_that_is_too_small(monkeypatch, capsys):
    style = demo.Style(sys.stdout)
    for size in ((40, 10), (120, 17), (75, 40), (5, 1)):
        monkeypatch.setattr("shutil.get_terminal_size", lambda size=size: os.terminal_size(size))
        demo.show_frame("title", [], style)
        text = re.sub(r"\033\[\w|\r", "", capsys.readouterr().out)
        wanted = f"76 columns x 18 lines are needed\nhere are {size[0]} x {size[1]}".split("\n")
        assert text.split("\n") == [line[: size[0]] for line in wanted][: size[1]]


@pytest.mark.slow
def test_terminal_that_is_too_small(tmp_path, env):
    sent, lines = run_on_terminal(tmp_path, "demo.py", *TINY, columns=40, lines=10, env=env)
    assert "76 columns x 18 lines are needed" in sent
    assert "│" not in sent
    assert list(table_rows("\n".join(lines))) == list(demo.SCRIPTS)


@pytest.mark.parametrize(
    "how",
    [
        "Ctrl-C",
        pytest.param("SIGTERM", marks=pytest.mark.slow),
        pytest.param("SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_interrupted_on_a_terminal(tmp_path, env, how):
    """While serial runs, and while MPI's ranks do: terminal and machine are as they were before."""
    options = LONG if how == "Ctrl-C" else (*TINY[:-2], "--subset", 640)
    process, terminal = start_on_terminal(
        tmp_path, "demo.py", *options, columns=80, lines=24, env=env
    )
    sent = read_until(terminal, "images/s")
    assert "\033[36m" in sent  # colours
    enough = 1 if how == "Ctrl-C" else 4  # mpirun, its proxy, two ranks
    while len(family := psutil.Process(process.pid).children(recursive=True)) < enough:
        sent += os.read(terminal, 65536).decode(errors="replace")
    if how == "Ctrl-C":
        os.write(terminal, b"\x03")
    else:
        process.send_signal(getattr(signal, how))
    sent += rest(terminal)
    os.close(terminal)
    assert process.wait(20) == 130
    assert_gone(family)
    assert sent.count("\033[?1049h") == sent.count("\033[?1049l") == 1
    name = "SIGINT" if how == "Ctrl-C" else how
    assert sent.endswith(f"{ENDING}interrupted by {name}\r\n")
    assert left_over(tmp_path) == []


def test_children_that_do_not_obey_are_killed(tmp_path):
    code = """import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
print(1, flush=True)
time.sleep(60)"""
    process = psutil.Popen([os.sys.executable, "-c", code], stdout=-1, start_new_session=True)
    process.stdout.readline()
    family = [process, *process.children(recursive=True)]
    assert len(family) == 2
    stop_processes([process], timeout=0.5)
    assert_gone(family)


@pytest.mark.slow
def test_dumb_terminal_gets_plain_lines(tmp_path, env):
    process, terminal = start_on_terminal(
        tmp_path, "demo.py", *LONG, "--ascii", env={**env, "TERM": "dumb"}
    )
    sent = read_until(terminal, "images/s")
    os.write(terminal, b"\x03")
    sent += rest(terminal)
    os.close(terminal)
    assert process.wait(20) == 130
    assert "\033" not in sent
    assert sent.replace("^C", "").isascii()
    assert ".........." in sent  # the bar
    assert sent.endswith("interrupted by SIGINT\r\n")


@pytest.mark.slow
def test_failing_script_is_named_and_ends_the_demo(tmp_path, env):
    process = start(tmp_path, "demo.py", *TINY, "--batch-size", 8, "--lr", "1e30", env=env)
    out, err = finish(process, status=1)
    assert_one_error_line(err)
    assert "serial_cnn.py ended with exit status 1" in err
    assert "try a smaller --lr" in err
    assert "speed-up" not in out
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--subset", 0), "--subset"),
        (("--ranks", 0), "--ranks"),
        (("--epochs", "many"), "--epochs"),
        (("--dataset", "cifar10", "--data-dir", "nowhere"), "no CIFAR-10"),
        (("--at-once", "--ranks", 1000, *TINY), "--at-once"),
    ],
)
def test_bad_input_is_refused(tmp_path, monkeypatch, signals, options, message):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert message in refused(demo.main, *options)
    assert not list(tmp_path.glob("demo-*"))


def test_bad_input_is_one_line(run_script):
    done = run_script("demo.py", "--subset", 0, status=2)
    assert_one_error_line(done.stderr)
    assert "--subset" in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.skipif(len(available_cores()) < 6, reason="needs six cores")
def test_at_once_each_has_cores_of_its_own(tmp_path, env):
    process = start(tmp_path, "demo.py", *LONG, "--at-once", env=env)
    while len(children := psutil.Process(process.pid).children()) < 4:
        time.sleep(0.01)
    cores = [set(child.cpu_affinity()) for child in children]
    process.send_signal(signal.SIGTERM)
    finish(process, status=130)
    assert sorted(map(len, cores))[:3] == [1, 1, 2]
    assert sum(map(len, cores)) == len(set.union(*cores)) == len(available_cores())


def log_line(kind, epoch, duration, batch, loss):
    return f"{kind},{epoch},0,0.1,{duration},{batch},2,{loss},100.0,,,,,,,\n"


@pytest.mark.parametrize("status", [0, 1])
def test_training_that_ends_between_two_looks(tmp_path, capsys, status):
    """It writes its only row and ends right after a look: neither row nor end is lost."""
    code = f"""import pathlib, sys, time
folder = pathlib.Path({str(tmp_path)!r})
while not (folder / "shown").exists():
    time.sleep(0.01)
(folder / "serial.csv").write_text({log_line(2, 1, 0.5, 2, 2.5)!r})
(folder / "serial.json").write_text("{{}}")
sys.exit("the reason" if {status} else 0)"""
    training = demo.Training("serial", [], tmp_path, epochs=1)
    training.command = [sys.executable, "-c", code]
    lines = demo.LinePrinter([training], demo.Style(sys.stdout))

    def show():
        lines.show()
        (tmp_path / "shown").touch()
        training.process.wait(60)

    with pytest.raises(TrainingError, match="the reason") if status else contextlib.nullcontext():
        demo.run_trainings([training], False, show, [])
    assert ("epoch 1/1 done, 0.5 s" in capsys.readouterr().out) == (status == 0)


def test_log_is_read_as_it_grows(tmp_path):
    """Rows that are torn in the middle, and seconds that start anew in each epoch."""
    training = demo.Training("serial", [], tmp_path, epochs=2)
    training.read_log()  # no log yet
    text = "type,epoch,start,loading,duration,value1,value2,loss,images_per_s\n"
    text += (
        log_line(2, 1, 0.5, 1, 2.5) + log_line(2, 1, 1.0, 2, 2.0) + log_line(0, 1, 1.0, 0.1, 2.25)
    )
    text += log_line(1, 1, 0.3, 0.1, 2.1) + log_line(2, 2, 0.75, 1, 1.5)
    for end in range(0, len(text) + 1, 7):
        training.log.write_text(text[:end])
        training.read_log()
    training.log.write_text(text)
    training.read_log()
    assert training.losses == [2.5, 2.0, 1.5]
    assert training.seconds == [0.5, 1.0, 1.75]
    assert training.progress == 0.75
    assert training.expected_seconds() == pytest.approx(1.75 / 0.75)
    assert training.state == "epoch 2/2 batch 1/2"


def test_curve_is_drawn_where_the_values_are():
    assert demo.curve([3.0, 1.6, 0.1], 3, 3.0, unicode=False) == ["** ", " **", "  *"]
    # U+28B9: the uppermost dot on the left, all four on the right
    assert demo.curve([2.9, 0.1, math.nan, math.nan], 1, 3.0, unicode=True) == ["⢹ "]
    # cut off at the edges
    assert demo.curve([math.inf, 99.0, -1.0], 2, 3.0, unicode=False) == [" **", "  *"]


def test_column_means():
    means = demo.column_means([0.1, 0.4, 2.5, 4.0], [3.0, 2.0, 1.5, 1.0], 4, 4.0)
    assert means.tolist() == pytest.approx([2.5, math.nan, 1.5, 1.0], nan_ok=True)
    assert all(map(math.isnan, demo.column_means([], [], 3, 1.0)))


@pytest.mark.parametrize(
    ("settings", "encoding", "unicode"),
    [
        ({"LC_ALL": "C.UTF-8", "TERM": "xterm"}, "utf-8", True),
        ({"LC_ALL": "C", "TERM": "xterm"}, "utf-8", False),
        ({"LC_ALL": "C.UTF-8", "TERM": "linux"}, "utf-8", False),
        ({"LC_ALL": "C.UTF-8", "TERM": "xterm"}, "latin-1", False),
    ],
)
def test_unicode_only_where_it_can_be_shown(monkeypatch, settings, encoding, unicode):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert demo.Style(stream).unicode == unicode
    assert not demo.Style(stream, ascii_only=True).unicode
