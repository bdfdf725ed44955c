"""Serial, MPI and hybrid training live in one terminal: loss curves, images/s, then the measured speed-ups.

Nothing is simulated: serial_cnn.py, parallel_cnn_mpi.py and parallel_cnn_hybrid.py train as child processes on the same
data with the same global batch, one after another, so that none slows down another. What is shown is read from the run
logs that they write, the speed-ups from their totals. On the time axis that all three share, the same loss
curve ends earlier; the largest difference between the curves tells that it is the same computation.

    make demo
    python demo.py
    python demo.py --subset 5000 --batch-size 128 --ranks 2
    python demo.py --epochs 1 --subset 2000                # piped into a file it prints plain lines
"""

import contextlib
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from common import (
    InputError,
    Interrupted,
    Parser,
    TrainingError,
    available_cores,
    find_mpirun,
    load_cifar10,
    number,
    run_main,
    stop_processes,
    table,
)

HERE = Path(__file__).resolve().parent
FRAME_SECONDS, LINE_SECONDS = (
    0.2,
    2.0,
)  # between two pictures on a terminal, between two lines elsewhere
SMALLEST = (60, 18)  # columns and lines that the picture needs
TOP_LOSS = 3.0  # of the axis; guessing among ten classes has ln 10 = 2.3, and the first steps' higher ones are cut off
TRAIN, BATCH = "0", "2"  # types of rows in a log
NAMES = {
    "serial_cnn.py": "serial",
    "parallel_cnn_mpi.py": "MPI",
    "parallel_cnn_hybrid.py": "hybrid",
}
COLOURS = (36, 33, 35)  # cyan, yellow, magenta


# ----------------------------------------------------------------------------------------------------------------------
# Trainings: child processes and what their logs say
# ----------------------------------------------------------------------------------------------------------------------


class Training:
    """One script, training as a child process; read() takes in what its log has got since the last time."""

    def __init__(self, script, launch, options, folder, args):
        name = script.removesuffix(".py")
        self.script, self.name, self.epochs = script, NAMES[script], args.epochs
        self.log, self.output = folder / f"{name}.csv", folder / f"{name}.txt"
        self.command = [
            *launch,
            sys.executable,
            str(HERE / script),
            *options,
            "--quiet",
            "--log",
            str(self.log),
            "--save-metrics",
            str(folder / f"{name}.npz"),
        ]
        self.process, self.cores, self.place, self.rest = None, None, 0, ""
        self.losses, self.seconds = (
            [],
            [],
        )  # of each batch: mean loss, training seconds since the run began
        self.epoch, self.batch, self.batches, self.images_per_s, self.before = 1, 0, 0, 0.0, 0.0
        self.validating, self.sidecar = False, {}

    def start(self):
        """Start the script, in a process group of its own: the terminal's Ctrl-C is for the demo, which ends it."""
        mine = os.sched_getaffinity(0) if self.cores else None
        if self.cores:
            os.sched_setaffinity(0, self.cores)  # a child inherits it
        try:
            with open(self.output, "w") as output:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        finally:
            if self.cores:
                os.sched_setaffinity(0, mine)
        self.started = time.monotonic()

    def running(self):
        return self.process is not None and self.process.poll() is None

    def done(self):
        """Whether it has ended well. Raises TrainingError if it has ended otherwise."""
        if self.process is None or self.process.poll() is None:
            return False
        if self.process.returncode:
            lines = self.output.read_text(errors="replace").split("\n")
            said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
            raise TrainingError(
                f"{self.script} ended with exit status {self.process.returncode}: {said.strip()}"
            )
        return True

    def read(self):
        if not self.sidecar:
            with contextlib.suppress(OSError):
                self.sidecar = json.loads(self.log.with_suffix(".json").read_text())
        with contextlib.suppress(FileNotFoundError), open(self.log) as file:
            file.seek(self.place)
            *lines, self.rest = (self.rest + file.read()).split(
                "\n"
            )  # the last line may still be incomplete
            self.place = file.tell()
            for row in csv.reader(lines):
                self._take(row)

    def _take(self, row):
        kind, epoch, _, _, duration, value1, value2, loss, images_per_s = row[:9]
        self.validating = kind == TRAIN
        if kind == TRAIN:
            self.before += float(duration)
        elif kind == BATCH:
            self.epoch, self.batch, self.batches = int(epoch), int(value1), int(value2)
            self.losses.append(float(loss))
            self.seconds.append(self.before + float(duration))
            self.images_per_s = float(images_per_s)

    def progress(self):
        return len(self.losses) / (self.epochs * self.batches) if self.losses else 0.0

    def expected_seconds(self):
        """Of training in all, as far as one can tell by now."""
        return self.seconds[-1] / self.progress() if self.losses else 0.0

    def label(self, times="×"):
        ranks, threads = self.sidecar.get("ranks", 0), self.sidecar.get("threads", 0)
        if not ranks:
            return ""
        return (
            count(ranks * threads, "core")
            if self.script.startswith("serial")
            else (f"{count(ranks, 'rank')} {times} {count(threads, 'thread')}")
        )

    def finish(self):
        """Read the last rows and the totals."""
        self.read()
        self.sidecar = json.loads(self.log.with_suffix(".json").read_text())


def count(n, word):
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def make_trainings(args, data, folder):
    if missing := [script for script in NAMES if not (HERE / script).exists()]:
        raise InputError(f"{missing[0]} is not beside demo.py: put it there")
    options = [
        "--epochs",
        args.epochs,
        "--seed",
        args.seed,
        "--lr",
        args.lr,
        "--dtype",
        args.dtype,
        "--subset",
        args.subset,
        "--dataset",
        data.name,
    ]
    options += ["--data-dir", args.data_dir] if args.data_dir else []
    ranks, batch = [find_mpirun(), "-np", str(args.ranks)], ["--global-batch-size", args.batch_size]
    return [
        Training(script, launch, list(map(str, [*options, *size])), folder, args)
        for script, launch, size in (
            ("serial_cnn.py", [], ["--batch-size", args.batch_size]),
            ("parallel_cnn_mpi.py", ranks, batch),
            ("parallel_cnn_hybrid.py", ranks, batch),
        )
    ]


def share_cores(trainings, ranks):
    """Give each training cores of its own: one, one for each rank, and what is left."""
    cores = available_cores()
    if not hasattr(os, "sched_setaffinity"):
        raise InputError(
            "--at-once: this system does not let processes choose their cores: leave it out"
        )
    if len(cores) < 1 + 2 * ranks:
        raise InputError(
            f"--at-once with {ranks} ranks needs {1 + 2 * ranks} cores, there are {len(cores)}: "
            "leave it out, and they train one after another"
        )
    for training, part in zip(
        trainings, (cores[:1], cores[1 : 1 + ranks], cores[1 + ranks :]), strict=True
    ):
        training.cores = part


def run_trainings(trainings, at_once, show, signals):
    """Run them to their end, calling show() again and again. signals: a list that a signal handler appends to."""
    waiting = list(trainings)
    try:
        while waiting or any(t.running() for t in trainings):
            if waiting and (at_once or not any(t.running() for t in trainings)):
                waiting.pop(0).start()
            time.sleep(FRAME_SECONDS)
            for training in trainings:
                training.read()
                training.done()
            show()
            if signals:
                raise Interrupted(f"interrupted by {signal.Signals(signals[0]).name}")
        for training in trainings:
            training.done()  # the last one may have failed since it was looked at
            training.finish()
        show()  # and it has ended since it was shown
    finally:
        stop_processes([t.process for t in trainings if t.running()])


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


class Style:
    """Which characters and colours the terminal can show."""

    def __init__(self, stream, ascii_only=False):
        locale = next(
            (os.environ[n] for n in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(n)), ""
        )
        utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
        terminal = os.environ.get("TERM", "dumb")
        self.unicode = (
            utf8 and not ascii_only and locale not in ("C", "POSIX") and terminal != "linux"
        )
        self.picture = stream.isatty() and terminal != "dumb"
        self.colours = self.picture and not os.environ.get("NO_COLOR")
        self.full, self.empty, self.times = ("█", "░", "×") if self.unicode else ("#", ".", "x")
        self.axis, self.floor, self.corner = ("│", "─", "└") if self.unicode else ("|", "-", "+")

    def colour(self, text, code):
        return f"\033[{code}m{text}\033[0m" if self.colours and text.strip() else text

    def bar(self, fraction, width):
        full = round(min(fraction, 1.0) * width)
        return self.full * full + self.empty * (width - full)


def column_means(training, columns, seconds):
    """The mean loss in each of `columns` equal parts of `seconds`; None where there is no batch."""
    sums, counts = [0.0] * columns, [0] * columns
    for second, loss in zip(training.seconds, training.losses, strict=True):
        column = min(int(second / seconds * columns), columns - 1)
        sums[column] += loss
        counts[column] += 1
    return [s / n if n else None for s, n in zip(sums, counts, strict=True)]


def curve(means, height, top, unicode):
    """Draw means as lines of text, 0 at the bottom and `top` at the top: Braille dots, two a column, or asterisks."""
    across, down = (2, 4) if unicode else (1, 1)
    dots, previous = set(), None
    for x, mean in enumerate(means):
        if mean is None or not math.isfinite(mean):  # the training itself says what is wrong
            continue
        y = min(max(int((1 - mean / top) * height * down), 0), height * down - 1)
        between = range(min(y, previous), max(y, previous) + 1) if previous is not None else (y,)
        dots.update((x, line) for line in between)
        previous = y
    bits = (
        (0x01, 0x02, 0x04, 0x40),
        (0x08, 0x10, 0x20, 0x80),
    )  # of the dots of U+2800, by column and row
    lines = []
    for line in range(height):
        cells = ""
        for cell in range(len(means) // across):
            inside = [
                bits[x][y]
                for x in range(across)
                for y in range(down)
                if (cell * across + x, line * down + y) in dots
            ]
            cells += " " if not inside else chr(0x2800 + sum(inside)) if unicode else "*"
        lines.append(cells)
    return lines


def draw_panels(trainings, style, columns, height):
    """The three loss curves side by side, on the same axes: lines of text."""
    width = (columns - 4) // 3 - 2
    across = 2 if style.unicode else 1
    seconds = math.ceil(max([t.expected_seconds() for t in trainings] + [1.0]))
    means = [column_means(t, width * across, seconds) for t in trainings]
    curves = [curve(part, height, TOP_LOSS, style.unicode) for part in means]
    rows = []
    for line in range(height):
        mark = (
            f"{TOP_LOSS:.1f}" if line == 0 else f"{TOP_LOSS / 2:.1f}" if line == height // 2 else ""
        )
        rows.append(
            [
                f"{mark:>4}",
                *(
                    style.axis + style.colour(part[line], code)
                    for part, code in zip(curves, COLOURS, strict=True)
                ),
            ]
        )
    rows.append([f"{0:>4.1f}", *[style.corner + style.floor * width] * 3])
    rows.append(["    ", *[" 0" + f"{seconds} s of training".rjust(width - 1)] * 3])
    heads = [
        ["loss"]
        + [
            " " + style.colour(t.script.ljust(width)[:width], code)
            for t, code in zip(trainings, COLOURS, strict=True)
        ],
        ["    "] + [" " + t.label(style.times).ljust(width)[:width] for t in trainings],
    ]
    return [" ".join([row[0] + row[1], *row[2:]]) for row in heads + rows]


def describe_state(training, style, width):
    """Four lines on what a training does just now."""
    if training.process is None:
        return ["waiting", "", "", ""]
    if not training.losses:
        hint = "its kernels compile once" if training.name == "hybrid" else ""
        return [f"starting, {time.monotonic() - training.started:.0f} s", hint, "", ""]
    recent = training.losses[-50:]
    progress = training.progress()
    where = "validating" if training.validating else f"batch {training.batch}/{training.batches}"
    if not training.running():
        where = f"done, {training.seconds[-1]:.1f} s"
    return [
        f"{style.bar(progress, width - 6)} {progress:4.0%}",
        f"epoch {training.epoch}/{training.epochs} {where}",
        f"{training.images_per_s:,.0f} images/s",
        f"loss {sum(recent) / len(recent):.3f}",
    ]


def draw_frame(title, trainings, style, columns, lines):
    width = (columns - 4) // 3 - 2
    states = [describe_state(t, style, width) for t in trainings]
    below = [
        "    " + " ".join(f" {state[i]:{width}.{width}}" for state in states) for i in range(4)
    ]
    return [
        title,
        "",
        *draw_panels(trainings, style, columns, lines - 13),
        *below,
        "",
        "Ctrl-C stops all three.",
    ]


class Screen:
    """Pictures in the terminal's alternate screen, which goes away when the block ends."""

    def __init__(self, title, trainings, style):
        self.title, self.trainings, self.style = title, trainings, style

    def __enter__(self):
        sys.stdout.write("\033[?1049h\033[?25l")  # alternate screen, no cursor
        sys.stdout.flush()
        return self

    def __exit__(self, *_):
        sys.stdout.write("\033[0m\033[?25h\033[?1049l")
        sys.stdout.flush()

    def show(self):
        columns, lines = shutil.get_terminal_size()
        if columns < SMALLEST[0] or lines < SMALLEST[1]:
            picture = [
                f"{SMALLEST[0]} columns x {SMALLEST[1]} lines are needed",
                f"here are {columns} x {lines}",
            ]
            picture = [line[:columns] for line in picture]
        else:
            picture = draw_frame(self.title[:columns], self.trainings, self.style, columns, lines)
        sys.stdout.write("\033[H" + "\033[K\r\n".join(picture[:lines]) + "\033[K\033[J")
        sys.stdout.flush()


class Lines:
    """The same where there is no terminal: a line now and then for each training that runs."""

    def __init__(self, title, trainings, style):
        self.title, self.trainings, self.style = title, trainings, style
        self.last, self.ended = time.monotonic(), set()

    def __enter__(self):
        print(self.title, flush=True)
        return self

    def __exit__(self, *_):
        pass

    def show(self):
        due = time.monotonic() - self.last >= LINE_SECONDS
        if due:
            self.last = time.monotonic()
        for training in self.trainings:
            ended = (
                training.process is not None
                and not training.running()
                and training.name not in self.ended
            )
            if ended:
                self.ended.add(training.name)
                training.read()  # what it has written since the last look
            if ended or (due and training.running()):
                state = [part for part in describe_state(training, self.style, 16) if part]
                print(f"{training.script:22}  {'  '.join(state)}", flush=True)


def summarize(trainings, style):
    """The table of times and speed-ups, and how far the loss curves are apart: text of at most 80 columns."""
    totals = [t.sidecar["totals"] for t in trainings]
    cores = [t.sidecar["ranks"] * t.sidecar["threads"] for t in trainings]
    speedups = [totals[0]["train_seconds"] / t["train_seconds"] for t in totals]
    rows = [
        [
            t.name,
            t.label(style.times),
            f"{total['train_seconds']:.1f} s",
            f"{total['images_per_s']:,.0f}",
            f"{speedup:.2f}",
            f"{speedup / n:.0%}",
        ]
        for t, total, speedup, n in zip(trainings, totals, speedups, cores, strict=True)
    ]
    bars = [
        style.colour(style.full * max(1, round(10 * speedup / max(speedups))), code)
        for speedup, code in zip(speedups, COLOURS, strict=True)
    ]
    lines = table(("", "on", "training", "images/s", "speed-up", "efficiency"), rows).split("\n")
    lines = [f"{line}  {bar}".rstrip() for line, bar in zip(lines, ["", "", *bars], strict=True)]
    apart = [
        max(abs(a - b) for a, b in zip(trainings[0].losses, t.losses, strict=True))
        for t in trainings[1:]
    ]
    words = (
        f"One run each. Largest difference from serial's loss in {len(trainings[0].losses):,} steps: "
        + ", ".join(f"{t.name} {a:.2g}" for t, a in zip(trainings[1:], apart, strict=True))
        + "."
    )
    if trainings[0].sidecar["arguments"]["dtype"] == "float32" and max(apart) > 0:
        words += " That is rounding, which training amplifies; try --dtype float64."
    if crowded := [
        t.name for t, n in zip(trainings, cores, strict=True) if n > len(available_cores())
    ]:
        words += f" Oversubscribed, more threads than cores: {', '.join(crowded)}."
    return "\n".join([*lines, "", textwrap.fill(words, 80)])


# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser("demo", __doc__)
    add = parser.add_argument
    add("--epochs", type=number(int, 1, 1000), default=2, help="default: %(default)s")
    add(
        "--subset",
        type=number(int, 1, 50_000),
        default=20_000,
        metavar="N",
        help="first N training and N/5 test images (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=number(int, 1, 10**6),
        default=64,
        help="images per step of all ranks together (default: %(default)s)",
    )
    add(
        "--ranks",
        type=number(int, 1, 1024),
        default=2,
        metavar="N",
        help="of MPI and hybrid (default: %(default)s)",
    )
    add(
        "--lr",
        type=number(float, 0, math.inf, exclusive=True),
        default=0.01,
        help="default: %(default)s",
    )
    add(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="float64: rounding does not drive the curves apart (default: %(default)s)",
    )
    add(
        "--at-once",
        action="store_true",
        help="all three at the same time, each on cores of its own",
    )
    add("--data-dir", help="folder with CIFAR-10 (default: $CIFAR10_DIR, else ./data)")
    add(
        "--dataset",
        choices=("auto", "cifar10", "synthetic"),
        default="auto",
        help="auto: CIFAR-10 from --data-dir, else downloaded, else synthetic (default: %(default)s)",
    )
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=42,
        help="of weights and data order (default: %(default)s)",
    )
    add("--ascii", action="store_true", help="for terminals that cannot show Unicode")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGHUP, signal.default_int_handler)  # the terminal is closed
    data = load_cifar10(args.data_dir, args.dataset, args.subset, args.seed)
    style = Style(sys.stdout, args.ascii)
    name = {"cifar10": "CIFAR-10", "synthetic": "SYNTHETIC DATA, not CIFAR-10"}[data.name]
    title = f"{name}, {len(data.y_train):,} images, {count(args.epochs, 'epoch')}, batch {args.batch_size} in all"
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        trainings = make_trainings(args, data, Path(folder))
        if args.at_once:
            share_cores(trainings, args.ranks)
        signals = []
        for name in (
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGHUP,
        ):  # looked at between two pictures
            signal.signal(name, lambda received, _: signals.append(received))
        with (Screen if style.picture else Lines)(title, trainings, style) as display:
            run_trainings(trainings, args.at_once, display.show, signals)
        columns, lines = shutil.get_terminal_size()
        if style.picture and columns >= SMALLEST[0]:
            print(
                "\n".join([title, *draw_panels(trainings, style, columns, max(lines - 17, 4)), ""])
            )
        print(summarize(trainings, style), flush=True)


if __name__ == "__main__":
    run_main(main)
