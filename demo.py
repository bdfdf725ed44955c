"""Watch serial, MPI and hybrid train in one terminal: loss curves, images/s, measured speed-ups.

serial_cnn.py, parallel_cnn_mpi.py and parallel_cnn_hybrid.py train as child processes, on the same
data with the same global batch, one after another so that none slows another down. Everything that
is shown is read from their run logs. The panels share one time axis: the loss follows the same
curve in less time. At the end the largest difference between the curves is printed: all do the same
computation.

A speed-up compares a script with the same code on one core. The hybrid's kernels are faster than
those of serial_cnn.py, so it trains twice: first on one rank of one thread, its own baseline.

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
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from common import (
    BATCH,
    SHORT_OF_CPU,
    TRAIN,
    InputError,
    Interrupted,
    Parser,
    TrainingError,
    available_cores,
    dataset_option,
    find_mpirun,
    format_table,
    in_main_thread,
    load_dataset,
    metadata_path,
    number,
    run_main,
    stop_processes,
)

HERE = Path(__file__).resolve().parent
SCRIPTS = {  # of each training
    "serial": "serial_cnn.py",
    "MPI": "parallel_cnn_mpi.py",
    "hybrid, 1 thread": "parallel_cnn_hybrid.py",
    "hybrid": "parallel_cnn_hybrid.py",
}
BASELINES = {  # what a training's speed-up is measured against: the same code on one core
    "serial": "serial",
    "MPI": "serial",
    "hybrid, 1 thread": "hybrid, 1 thread",
    "hybrid": "hybrid, 1 thread",
}
# ANSI codes of cyan, yellow, blue, magenta
COLOURS = {"serial": 36, "MPI": 33, "hybrid, 1 thread": 34, "hybrid": 35}
MIN_COLUMNS = 76  # the smallest terminal that has room for the panels
MIN_LINES = 18
FRAME_SECONDS = 0.2  # between two frames on a terminal
LINE_SECONDS = 2.0  # between two lines elsewhere
TOP_LOSS = 3.0  # upper end of the loss axis; guessing among ten classes has ln 10 = 2.3

ENTER_SCREEN = "\033[?1049h\033[?25l"  # alternate screen, no cursor
LEAVE_SCREEN = "\033[0m\033[?25h\033[?1049l"  # no colour, cursor, old screen

# The bits of a Braille character's dots, 4 rows of 2: chr(0x2800 + the sum of bits) shows them.
BRAILLE_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


# --------------------------------------------------------------------------------------------------
# Trainings: child processes, and what their run logs say
# --------------------------------------------------------------------------------------------------


class Training:
    """One script that trains as a child process, and what its run log says so far."""

    def __init__(self, name, command, folder, epochs):
        self.name = name
        self.script = SCRIPTS[name]
        self.epochs = epochs
        self.log = folder / f"{self.name}.csv"
        self.output = folder / f"{self.name}.txt"
        metrics = folder / f"{self.name}.npz"
        self.command = [*command, "--quiet", f"--log={self.log}", f"--save-metrics={metrics}"]
        self.cores = None  # the cores that it may use; None: all
        self.process = None
        self.started = 0.0
        self.suspended = 0.0  # seconds for which Ctrl-Z has stopped it
        self.finished = False  # it has ended well and its log is read to the end

        self.losses = []  # of each batch: mean loss
        self.seconds = []  # of each batch: training seconds since the run began
        self.epoch_seconds = 0.0  # training seconds of all complete epochs
        self.state = ""  # for instance "epoch 1/2 batch 3/79"
        self.progress = 0.0  # fraction of all batches that is trained
        self.images_per_s = 0.0
        self.metadata = {}  # the JSON file beside the log
        self.position = 0  # bytes of the log that are read

    def start(self):
        # In a session of its own: the terminal sends Ctrl-C to the demo alone, which ends it.
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=self._choose_cores,
            )
        self.started = time.monotonic()

    def _choose_cores(self):
        if self.cores:
            os.sched_setaffinity(0, self.cores)

    def running(self):
        return self.process is not None and self.process.poll() is None

    def update(self):
        """Read what is new in log and metadata. Raises TrainingError if the script has failed."""
        if self.process is None or self.finished:
            return

        # Look at the process before its log, so that its last rows are not missed.
        status = self.process.poll()
        if status not in (None, 0):
            lines = self.output.read_text(errors="replace").strip().split("\n")
            reason = lines[-1].strip() or "it printed nothing"
            raise TrainingError(f"{self.script} ended with exit status {status}: {reason}")

        self.read_log()
        path = metadata_path(self.log)
        if path.exists() and (status == 0 or not self.metadata):  # the totals come at the end
            self.metadata = json.loads(path.read_text())
        self.finished = status == 0

    def read_log(self):
        """Read the rows that were written since the last call."""
        if not self.log.exists():
            return
        with open(self.log, "rb") as file:
            file.seek(self.position)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]  # the last row may be half written
        self.position += len(complete)

        for row in csv.reader(complete.decode().splitlines()):
            kind, epoch, _, _, duration, value1, value2, loss, images_per_s = row[:9]
            if kind == str(BATCH):
                batches = int(value2)
                self.losses.append(float(loss))
                self.seconds.append(self.epoch_seconds + float(duration))
                self.progress = len(self.losses) / (self.epochs * batches)
                self.images_per_s = float(images_per_s)
                self.state = f"epoch {epoch}/{self.epochs} batch {value1}/{batches}"
            elif kind == str(TRAIN):  # training of the epoch is over, its validation follows
                self.epoch_seconds += float(duration)
                self.state = f"epoch {epoch}/{self.epochs} validating"

    def expected_seconds(self):
        """The estimated training seconds of the whole run; 0 before the first batch."""
        return self.seconds[-1] / self.progress if self.losses else 0.0

    def core_count(self):
        return self.metadata["ranks"] * self.metadata["threads"]

    def label(self, times):
        """For instance "1 core" or "2 ranks × 1 thread"; empty before the script has started."""
        if not self.metadata:
            return ""
        if self.name == "serial":
            return plural(self.core_count(), "core")
        ranks = plural(self.metadata["ranks"], "rank")
        threads = plural(self.metadata["threads"], "thread")
        return f"{ranks} {times} {threads}"


def plural(n, word):
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def make_trainings(args, data, folder):
    """The trainings of the same data with the same seed and global batch, not yet started."""
    options = [
        f"--epochs={args.epochs}",
        f"--subset={args.subset}",
        f"--dataset={dataset_option(data.name)}",
        f"--lr={args.lr}",
        f"--dtype={args.dtype}",
        f"--seed={args.seed}",
    ]
    if args.data_dir:
        options.append(f"--data-dir={args.data_dir}")

    trainings = []
    for name, script in SCRIPTS.items():
        command = [sys.executable, str(HERE / script), *options]
        if name == "serial":
            command.append(f"--batch-size={args.batch_size}")
        else:
            ranks = 1 if name == "hybrid, 1 thread" else args.ranks
            command.append(f"--global-batch-size={args.batch_size}")
            command = [find_mpirun(), "-np", str(ranks), *command]
        if name == "hybrid, 1 thread":
            command.append("--num-threads=1")
        trainings.append(Training(name, command, folder, args.epochs))
    return trainings


def divide_cores(trainings, ranks):
    """Give each training cores of its own: one, or one for each rank; hybrid gets the rest."""
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("--at-once: this system cannot bind processes to cores: leave it out")
    cores = available_cores()
    needed = 2 + 2 * ranks
    if len(cores) < needed:
        raise InputError(
            f"--at-once with {ranks} ranks needs {needed} cores, there are {len(cores)}: "
            "leave it out, and they train one after another"
        )
    serial, mpi, one_thread, hybrid = trainings
    serial.cores = cores[:1]
    one_thread.cores = cores[1:2]
    mpi.cores = cores[2 : 2 + ranks]
    hybrid.cores = cores[2 + ranks :]


def run_trainings(trainings, at_once, show, received, is_live=False):
    """Run the trainings to their end; call show() for each frame.

    received: the list to which the signal handlers append; Ctrl-Z suspends, another signal raises
    Interrupted. is_live: frames are shown on the alternate screen.
    However this function ends, no child process outlives it.
    """
    waiting = list(trainings)
    try:
        while not all(training.finished for training in trainings):
            if waiting and (at_once or not any(training.running() for training in trainings)):
                waiting.pop(0).start()
            time.sleep(FRAME_SECONDS)
            for training in trainings:
                training.update()
            show()
            ends = [number for number in received if number != signal.SIGTSTP]
            if ends:
                raise Interrupted(f"interrupted by {signal.Signals(ends[-1]).name}")
            if received:
                suspend(trainings, is_live)
                received.clear()  # further Ctrl-Z of a key that was held down
    finally:
        stop_processes([training.process for training in trainings if training.running()])


def suspend(trainings, is_live):
    """Ctrl-Z: stop the trainings and this script until `fg`; the shell gets its screen back."""
    if is_live:
        print(LEAVE_SCREEN, end="", flush=True)
    running = [training for training in trainings if training.running()]
    started = time.monotonic()
    send_to_families(running, signal.SIGSTOP)

    handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTSTP)  # here the script stops; SIGCONT continues it
    signal.signal(signal.SIGTSTP, handler)

    send_to_families(running, signal.SIGCONT)
    for training in running:
        training.suspended += time.monotonic() - started
    if is_live:
        print(ENTER_SCREEN, end="", flush=True)


def send_to_families(trainings, signum):
    """Send a signal to the trainings' processes and to all that these have started."""
    for training in trainings:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            process = psutil.Process(training.process.pid)
            for member in (process, *process.children(recursive=True)):
                member.send_signal(signum)


# --------------------------------------------------------------------------------------------------
# Pictures made of characters
# --------------------------------------------------------------------------------------------------


class Style:
    """The characters and colours that a terminal can show."""

    def __init__(self, stream, ascii_only=False):
        terminal = os.environ.get("TERM", "dumb")
        self.live = stream.isatty() and terminal != "dumb"
        self.coloured = self.live and not os.environ.get("NO_COLOR")

        environ = os.environ  # the first of these that is set is the locale
        locale = environ.get("LC_ALL") or environ.get("LC_CTYPE") or environ.get("LANG")
        utf8 = (stream.encoding or "").lower() in ("utf-8", "utf8")
        braille = locale not in ("C", "POSIX") and terminal != "linux"
        self.unicode = utf8 and braille and not ascii_only
        characters = "█░×│─└" if self.unicode else "#.x|-+"
        self.full, self.empty, self.times, self.axis, self.floor, self.corner = characters

    def colour(self, text, name):
        return f"\033[{COLOURS[name]}m{text}\033[0m" if self.coloured and text.strip() else text

    def bar(self, fraction, width):
        full = round(min(fraction, 1.0) * width)
        return self.full * full + self.empty * (width - full)


def column_means(seconds, losses, columns, end):
    """The mean loss in each of `columns` equal parts of 0 to `end` seconds; NaN without a batch."""
    column = (np.array(seconds) / end * columns).astype(int)
    column = np.minimum(column, columns - 1)
    counts = np.bincount(column, minlength=columns)
    sums = np.bincount(column, weights=losses, minlength=columns)
    return np.divide(sums, counts, out=np.full(columns, np.nan), where=counts > 0)


def curve(means, height, top, unicode):
    """Draw a curve as `height` lines of text, with loss 0 at the bottom and `top` at the top.

    A Braille character has 4 rows of 2 dots, so with unicode it shows two of the means.
    """
    across, down = (2, 4) if unicode else (1, 1)
    rows = height * down
    dots = np.zeros((rows, len(means)), dtype=bool)
    previous = None
    for x, mean in enumerate(means):
        if not math.isfinite(mean):
            continue
        y = math.floor((1 - mean / top) * rows)  # row 0 is the highest
        y = min(max(y, 0), rows - 1)
        if previous is None:
            previous = y
        dots[min(y, previous) : max(y, previous) + 1, x] = True  # a vertical line joins the points
        previous = y

    if not unicode:
        return ["".join("*" if dot else " " for dot in row) for row in dots]
    cells = dots.reshape(height, down, len(means) // across, across)
    bits = (cells * BRAILLE_BITS[:, None, :]).sum(axis=(1, 3))  # (height, width)
    return ["".join(chr(0x2800 + code) if code else " " for code in row) for row in bits]


def describe_state(training, style, width):
    """Four lines on what a training does just now, for a panel of that width."""
    if training.process is None:
        return ["waiting", "", "", ""]
    if not training.losses:
        hint = "its kernels compile once" if training.script == "parallel_cnn_hybrid.py" else ""
        return [f"starting, {time.monotonic() - training.started:.0f} s", hint, "", ""]
    state = training.state
    if training.finished:
        state = f"epoch {training.epochs}/{training.epochs} done, {training.seconds[-1]:.1f} s"
    recent = training.losses[-50:]
    return [
        f"{style.bar(training.progress, width - 6)} {training.progress:4.0%}",
        state,
        f"{training.images_per_s:,.0f} images/s",
        f"loss {sum(recent) / len(recent):.3f}",
    ]


def draw_panels(trainings, style, columns, height):
    """The loss curves side by side on the same axes, and below each its state: lines."""
    width = (columns - 4) // len(trainings) - 2
    points = width * 2 if style.unicode else width
    expected = [training.expected_seconds() for training in trainings]
    seconds = math.ceil(max(1.0, *expected))  # the time axis has room for the slowest

    panels = []
    for training in trainings:
        means = column_means(training.seconds, training.losses, points, seconds)
        panel = [" " + style.colour(training.script.ljust(width)[:width], training.name)]
        panel.append(" " + training.label(style.times).ljust(width)[:width])
        for line in curve(means, height, TOP_LOSS, style.unicode):
            panel.append(style.axis + style.colour(line, training.name))
        panel.append(style.corner + style.floor * width)
        panel.append(" 0" + f"{seconds} s of training".rjust(width - 1))
        for line in describe_state(training, style, width):
            panel.append(" " + line.ljust(width)[:width])
        panels.append(panel)

    # The margin of 4 columns has the marks of the loss axis, which begins below two headings.
    middle = 2 + height // 2
    marks = {0: "loss", 2: f"{TOP_LOSS:.1f}", middle: f"{TOP_LOSS / 2:.1f}", 2 + height: "0.0"}
    rows = zip(*panels, strict=True)
    return [f"{marks.get(i, ''):>4}" + " ".join(row) for i, row in enumerate(rows)]


@contextlib.contextmanager
def alternate_screen():
    """A screen for the frames; when the block ends, the terminal looks as it did before."""
    try:
        print(ENTER_SCREEN, end="", flush=True)
        yield
    finally:
        print(LEAVE_SCREEN, end="", flush=True)


def show_frame(title, trainings, style):
    """Draw the trainings over the frame before."""
    columns, lines = shutil.get_terminal_size()
    if columns < MIN_COLUMNS or lines < MIN_LINES:
        needed = f"{MIN_COLUMNS} columns x {MIN_LINES} lines are needed"
        frame = [needed[:columns], f"here are {columns} x {lines}"[:columns]]
    else:
        panels = draw_panels(trainings, style, columns, lines - 13)
        frame = [title[:columns], "", *panels, "", "Ctrl-C stops all of them."]

    # From the upper left corner; clear the rest of each line, and all below the last.
    print("\033[H" + "\033[K\r\n".join(frame[:lines]) + "\033[K\033[J", end="", flush=True)


class LinePrinter:
    """Where there is no terminal: a line now and then for each training that runs."""

    def __init__(self, trainings, style):
        self.trainings = trainings
        self.style = style
        self.last = time.monotonic()
        self.ended = set()  # names of the trainings whose last line is printed

    def show(self):
        due = time.monotonic() - self.last >= LINE_SECONDS
        if due:
            self.last = time.monotonic()
        for training in self.trainings:
            ended = training.finished and training.name not in self.ended
            if ended:
                self.ended.add(training.name)
            if ended or (due and training.running()):
                state = [part for part in describe_state(training, self.style, 16) if part]
                print(f"{training.name:16}  {'  '.join(state)}", flush=True)


# --------------------------------------------------------------------------------------------------
# The result
# --------------------------------------------------------------------------------------------------


def summarize(trainings, style):
    """Times and speed-ups, and how far the loss curves differ: text of at most 80 columns."""
    serial = trainings[0]
    totals = {training.name: training.metadata["totals"] for training in trainings}
    rows = []
    for training in trainings:
        total = totals[training.name]
        baseline = totals[BASELINES[training.name]]
        speedup = baseline["train_seconds"] / total["train_seconds"]
        row = [training.name, training.label(style.times)]
        row += [f"{total['train_seconds']:.1f} s", f"{total['images_per_s']:,.0f}"]
        row += [f"{speedup:.2f}", f"{speedup / training.core_count():.0%}"]
        rows.append(row)
    header = ("", "on", "training", "images/s", "speed-up", "efficiency")

    differences = {}
    for training in trainings[1:]:
        pairs = zip(serial.losses, training.losses, strict=True)
        differences[training.name] = max(abs(a - b) for a, b in pairs)
    words = (
        f"One run each, on ranks {style.times} threads cores. Speed-up: of MPI over serial, of "
        "hybrid over itself on one thread. "
        f"Largest difference from serial's loss in {len(serial.losses):,} steps: "
        + "; ".join(f"{name} {difference:.2g}" for name, difference in differences.items())
        + "."
    )
    if serial.metadata["arguments"]["dtype"] == "float32" and max(differences.values()) > 0:
        words += " This is rounding, which training amplifies; try --dtype float64."
    suspended = [training.name for training in trainings if training.suspended]
    if suspended:
        words += f" Suspended meanwhile, which their times include: {', '.join(suspended)}."
    cores = len(available_cores())
    oversubscribed = [training.name for training in trainings if training.core_count() > cores]
    if oversubscribed:
        words += f" Oversubscribed (more threads than cores): {', '.join(oversubscribed)}."
    short = [name for name, total in totals.items() if total.get("cpu_share", 1) < SHORT_OF_CPU]
    if short and not oversubscribed:
        words += f" Short of CPU (something else used the cores): {'; '.join(short)}."
    return f"{format_table(header, rows)}\n\n{textwrap.fill(words, 80)}"


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)

    def add(option, help_text, **settings):
        parser.add_argument(option, help=f"{help_text} (default: %(default)s)", **settings)

    positive = number(float, 0, math.inf, exclusive=True)
    add("--epochs", "epochs of each training", type=number(int, 1, 1000), default=2)
    add("--subset", "training images", type=number(int, 1, 50_000), default=20_000, metavar="N")
    add("--batch-size", "images per step", type=number(int, 1, 10**6), default=64, metavar="N")
    add("--ranks", "MPI and hybrid ranks", type=number(int, 1, 1024), default=2, metavar="N")
    add("--lr", "learning rate", type=positive, default=0.01)
    add("--dtype", "precision", choices=("float32", "float64"), default="float32")
    choices = ("auto", "cifar10", "synthetic")
    add("--dataset", "auto: CIFAR-10 if it can be had", choices=choices, default="auto")
    add("--seed", "seed for weights and data order", type=number(int, 0, 2**32 - 1), default=42)

    folder = "folder with CIFAR-10 (default: $CIFAR10_DIR, else ./data)"
    parser.add_argument("--data-dir", help=folder)
    at_once = "train all at the same time, each on cores of its own"
    parser.add_argument("--at-once", action="store_true", help=at_once)
    parser.add_argument("--ascii", action="store_true", help="draw without Unicode characters")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    # Under nohup SIGHUP is ignored: the demo then outlives its terminal.
    stopping = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        stopping.append(signal.SIGHUP)  # the terminal was closed
    if not in_main_thread():  # no signals there
        stopping = []
    for signum in stopping:
        signal.signal(signum, signal.default_int_handler)
    data = load_dataset(args.data_dir, args.dataset, args.subset, args.seed)
    style = Style(sys.stdout, args.ascii)
    known_names = {"cifar10": "CIFAR-10", "synthetic": "SYNTHETIC DATA, not CIFAR-10"}
    name = known_names.get(data.name, data.name)
    images = f"{len(data.y_train):,} images"
    title = f"{name}, {images}, {plural(args.epochs, 'epoch')}, batch {args.batch_size} in all"

    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        trainings = make_trainings(args, data, Path(folder))
        if args.at_once:
            divide_cores(trainings, args.ranks)

        # From here on a signal is only noted, and acted on between two frames.
        received = []
        for signum in [*stopping, signal.SIGTSTP] if stopping else ():
            signal.signal(signum, lambda signum, frame: received.append(signum))

        if style.live:
            with alternate_screen():
                show = partial(show_frame, title, trainings, style)
                run_trainings(trainings, args.at_once, show, received, is_live=True)
        else:
            print(title, flush=True)
            run_trainings(trainings, args.at_once, LinePrinter(trainings, style).show, received)

    summary = summarize(trainings, style)
    columns, lines = shutil.get_terminal_size()
    if style.live and columns >= MIN_COLUMNS:  # the curves once more, on the terminal's own screen
        # Beside them and the summary: a title, two headings, two lines of the axis, two empty lines
        height = lines - len(summary.splitlines()) - 7
        panels = draw_panels(trainings, style, columns, max(height, 4))
        print("\n".join([title, *panels[:-4], ""]))
    print(summary, flush=True)


if __name__ == "__main__":
    run_main(main)
