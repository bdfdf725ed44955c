"""Write a technical report of measured results as Markdown, HTML (one file), LaTeX and PDF.

The words are in templates/text.j2, the numbers in the analysis.json of analyze_results.py. Jinja2
makes report.md of both; pandoc makes the other formats of report.md. A sentence is left out if a
number in it was not measured or if its condition does not hold. A section without any result is
left out and named among the limits.

    make report
    python experiments/make_report.py --analysis results/analysis --output-dir report
    python experiments/make_report.py --pdf              # needs latexmk, pdflatex or tectonic

Result: report.md, report.html, report.tex and figures/ in --output-dir; with --pdf report.pdf too.
"""

import base64
import datetime
import fnmatch
import functools
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pypandoc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
import scaling_tables
from common import (
    InputError,
    Parser,
    TrainingError,
    atomic_write,
    check_outputs,
    make_model,
    run_main,
)

TEMPLATES = Path(__file__).resolve().parent / "templates"
PDF_ENGINES = ("latexmk", "pdflatex", "tectonic")  # the first that is installed is used
NBSP = "\N{NO-BREAK SPACE}"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# Jinja2 puts this character before each value that comes from the results, so that section() can
# see whether a section shows any. It is removed when the text is complete.
RESULT = "\x02"

# The format of report.md: GitHub's Markdown, except that no text becomes a link or a smiley.
MARKDOWN = "gfm-emoji-autolink_bare_uris"

# pdflatex with templates/header.tex has no other characters than these.
NOT_IN_LATEX = re.compile(r"[^\x00-\xff–—‘’“”…−→≤≥≈⁻⁰⁴-⁹μ™]")

# Labels of the entries that describe a machine, where they are not their names.
LABELS = {
    "cpu": "CPU",
    "gpu": "GPU",
    "memory_gib": "memory, GiB",
    "blas": "BLAS",
    "python": "Python",
}


# --------------------------------------------------------------------------------------------------
# Results as Markdown
# --------------------------------------------------------------------------------------------------


class Markdown(str):
    """Text that is Markdown already: it is not escaped again."""


def join_lines(text):
    """The text with a space in the place of line breaks and control characters."""
    return re.sub(r"[\x00-\x20\x7f-\x9f]+", " ", text)


def escape(text):
    """Plain text as Markdown: a backslash before each character that would be markup."""
    return re.sub(r"([\\`*_\[\]<>|~#$&])", r"\\\1", join_lines(text))


def code(text):
    """Plain text as Markdown in a monospaced font, where nothing can be escaped."""
    quoted = join_lines(text).replace("`", "'")
    return Markdown(f"`{quoted}`")


def format_significant(value, like=None):
    """`value` with as many decimals as `like` (default: itself) needs for three digits.

    3600 → 3,600; 1.8412 → 1.84; 2.1e-9 → 2.1 × 10⁻⁹
    """
    like = value if like is None else like
    exponent = math.floor(math.log10(abs(like))) if like else 2
    if -4 <= exponent < 9:
        decimals = max(0, 2 - exponent)
        return f"{value:,.{decimals}f}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(SUPERSCRIPTS)
    return f"{mantissa.replace('-', '−')} × 10{power}"


def to_markdown(value):
    """The text of a {{ value }} in text.j2. Jinja2 calls this for each of them."""
    if value is None:
        raise jinja2.UndefinedError("the results do not have this value")
    if isinstance(value, (Markdown, MeasuredConfiguration)):
        text = str(value)
    elif isinstance(value, list):
        text = ", ".join(str(configuration) for configuration in value)
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = format_significant(value)
    else:
        text = escape(str(value))
    return RESULT + text if text else ""


def headline(metric):
    """A metric in bold, its interval in one piece, and a line break."""
    spread = metric.spread.replace(" ", NBSP)
    return Markdown(f"**{metric.short}** {spread}".strip() + "\\\n ")


def format_date(created):
    """2026-11-21T16:31:40+00:00 → 21 November 2026, 16:31 UTC. Raises ValueError for no date."""
    when = datetime.datetime.fromisoformat(created).astimezone(datetime.timezone.utc)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


@dataclass(frozen=True)
class Metric:
    """A mean over n repeats with its 95 % interval from low to high, which are None for n = 1.

    {{ metric }} in text.j2 is "1.84 × (1.80 to 1.88, n = 3)", {{ metric.short }} is "1.84 ×".
    """

    value: float
    low: float | None
    high: float | None
    n: int | None
    unit: str | None

    @property
    def short(self):
        number = format_significant(self.value)
        return f"{number}{NBSP}{self.unit}" if self.unit else number

    @property
    def spread(self):
        """The interval and n in parentheses; empty if there is no interval."""
        if self.low is None or self.high is None:
            return ""
        n = f"n{NBSP}={NBSP}{self.n}"
        # The mean of equal numbers may differ from them by rounding.
        if math.isclose(self.low, self.high, rel_tol=1e-12):
            return f"({n}, all alike)"
        low = format_significant(self.low, like=self.value)
        high = format_significant(self.high, like=self.value)
        return f"({low} to {high}, {n})"

    def __str__(self):
        return f"{self.short} {self.spread}".strip()


class MeasuredConfiguration:
    """A configuration of a suite. Its metrics are attributes: .speedup, .images_per_s, …

    Its other attributes are in its name, such as "mpi-2-strong", "hybrid-1x2-weak" or
    "disk-2-workers-train", with " [2]" behind it if it ran on a second machine.
    """

    def __init__(self, name, metrics, caveats):
        vars(self).update(metrics)
        self.name = name
        self.base, _, self.machine = name.partition(" ")

        # Such a caveat reads "oversubscribed: mpi-8-weak, mpi-4-strong".
        self.marks = []
        for mark in ("oversubscribed", "short of CPU"):
            lists = [caveat for caveat in caveats if caveat.startswith(mark)]
            if any(name in re.split(": |, ", each) for each in lists):
                self.marks.append(mark)
        self.oversubscribed = "oversubscribed" in self.marks

        self.family = name
        self.scaling = ""
        self.ranks = 1
        self.threads = 1
        parallel = re.fullmatch(r"(mpi|hybrid)-(\d+)(?:x(\d+))?-(strong|weak)", self.base)
        if parallel:
            self.family = parallel[1]
            self.ranks = int(parallel[2])
            self.threads = int(parallel[3] or 1)
            self.scaling = parallel[4]
        self.cores = self.ranks * self.threads

        loading = re.fullmatch(r"(.+)-(\d+)-workers-\w+", self.base)
        self.source = loading[1] if loading else self.base
        self.workers = loading[2] if loading else ""

    def __str__(self):
        return code(self.name) + "".join(f" ({mark})" for mark in self.marks)


class Exhibit(NamedTuple):
    """A table or a figure."""

    kind: str  # Table or Figure
    name: str
    title: str
    caption: str
    body: str  # Markdown

    def numbered(self, number):
        """The Markdown with its caption: above a table, below a figure."""
        title = self.title[:1].upper() + self.title[1:]
        caption = f"**{self.kind} {number}. {escape(title)}.** {escape(self.caption)}"
        parts = [caption, self.body] if self.kind == "Table" else [self.body, caption]
        return "\n\n".join(parts)


def make_figure(name, title, caption, alt):
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{name!r} is no name of a figure")
    image = f"![{escape(alt)}](figures/{name}.png)"
    return Exhibit("Figure", name, title, caption, image)


def figure_path(folder, figure, suffix):
    return folder / "figures" / f"{figure.name}{suffix}"


def make_table(name, title, caption, columns, rows):
    """A table. A column ± is half the interval of the column before it and joins its cells."""
    labels = []
    alignment = []
    for i, column in enumerate(columns):
        if column["label"] == "±":
            continue
        unit = f", {column['unit']}" if column.get("unit") else ""
        labels.append(escape(column["label"] + unit))
        alignment.append("---:" if is_numeric([row[i] for row in rows]) else ":---")

    # GitHub's form of a table: | a | b | with the alignments in the second line.
    lines = [labels, alignment]
    for row in rows:
        cells = []
        for column, value in zip(columns, row, strict=True):
            text = format_cell(value, column.get("digits"))
            if column["label"] != "±":
                cells.append(text)
            elif value is not None:
                cells[-1] += f" ±{NBSP}{text}"
        lines.append(cells)
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return Exhibit("Table", name, title, caption, body)


def make_text_table(table):
    """A table of scaling_tables.py, whose cells are text already."""
    columns = [{"label": label} for label in table.header]
    return make_table(table.name, table.title, table.caption, columns, table.rows)


def is_numeric(values):
    """Whether these are numbers, with or without gaps."""
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(value, (int, float)) for value in known)


def format_cell(value, digits):
    if value is None or value == "":
        return "–"
    if isinstance(value, str):
        return escape(value)
    return f"{value:,.{digits}f}".replace("-", "−")


def make_environment_table(machines):
    """The machines with one column each."""
    labels = ["property"] + [f"machine [{number}]" for number in range(1, len(machines) + 1)]
    columns = [{"label": label} for label in labels]
    names = dict.fromkeys(name for machine in machines for name in machine)
    rows = []
    for name in names:
        values = [describe_entry(machine.get(name)) for machine in machines]
        if any(values):
            rows.append([LABELS.get(name, name), *values])
    return make_table("environment", "environment", "As the runs have recorded it.", columns, rows)


def describe_entry(value):
    """An entry of a machine as words. Hashes are cut to twelve digits."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {describe_entry(part)}" for name, part in value.items())
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1…", str(value))


# --------------------------------------------------------------------------------------------------
# Functions of text.j2: comparisons, Amdahl's law, the network
# --------------------------------------------------------------------------------------------------


def best(configurations, quantity):
    """The configuration with the largest mean of a quantity."""
    measured = [each for each in configurations if hasattr(each, quantity)]
    unknown = jinja2.StrictUndefined(f"no configuration has {quantity}")
    return max(measured, key=lambda each: getattr(each, quantity).value, default=unknown)


def interval(value):
    """The ends of a metric's interval, None where it has none. A number is both ends of itself."""
    if isinstance(value, (int, float)):
        return value, value
    return value.low, value.high


def is_above(value, other):
    """Whether a mean is larger beyond doubt: its interval is above all of the other's."""
    low, _ = interval(value)
    _, limit = interval(other)
    return low is not None and limit is not None and low > limit


def is_below(value, other):
    return is_above(other, value)


def is_unclear(value, other):
    """Whether the intervals of two means overlap."""
    if None in interval(value) or None in interval(other):
        return False
    return not is_above(value, other) and not is_below(value, other)


def amdahl_limit(fraction):
    """The speed-up 1/s that no number of cores exceeds; s: serial fraction in % (Amdahl 1967)."""
    low = 100 / fraction.high  # the larger the fraction, the smaller the speed-up
    high = 100 / fraction.low
    return Metric(100 / fraction.value, low, high, fraction.n, "×")


@functools.lru_cache
def describe_network(name):
    """Parameters, layers and operations of a network of common.py, counted on itself."""
    model = make_model(name)
    layers = []
    for layer, input_shape in trace_input_shapes(model):
        description = {
            "kind": "dense layer",
            "kernel": 0,
            "inputs": layer.W.shape[-2],
            "outputs": layer.W.shape[-1],
            "share": 100 * layer.W.size / model.params.size,
            "flops": 2 * layer.W.size,  # each weight: one multiplication and one addition
        }
        if layer.W.ndim == 4:
            description["kind"] = "convolution"
            description["kernel"] = layer.kernel_size
            side = (input_shape[1] + 2 * layer.padding - layer.kernel_size) // layer.stride + 1
            description["flops"] *= side**2  # the same weights at each position
        layers.append(description)

    forward = sum(layer["flops"] for layer in layers)
    # The backward pass computes dW and dx, each as costly as the forward pass; images need no dx.
    backward = 2 * forward - layers[0]["flops"]
    largest = max(layers, key=lambda layer: layer["share"])
    return {
        "layers": layers,
        "parameters": model.params.size,
        "forward_mflops": forward / 1e6,
        "step_mflops": (forward + backward) / 1e6,
        "largest": largest,
        "largest_flops_share": 100 * largest["flops"] / forward,
    }


def trace_input_shapes(model):
    """[(layer, shape of its input)] of the layers with weights, in the order of a forward pass."""
    trace = []

    def record(layer, forward, x):
        trace.append((layer, x.shape))
        return forward(x)

    for layer in model.leaves():
        if hasattr(layer, "W"):
            layer.forward = functools.partial(record, layer, layer.forward)
    model.train(False)  # batch normalisation of one image would have no variance
    model.forward(np.zeros((1, 32, 32, 3), np.float32))
    return trace


# --------------------------------------------------------------------------------------------------
# The text
# --------------------------------------------------------------------------------------------------


def mark_sentences(source):
    """text.j2 as plain Jinja2: each sentence in {% call sentence() %} … {% endcall %}.

    A sentence is a line with the indented lines after it, unless it is nothing but a {% … %} tag.
    """
    without_comments = re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)
    joined = re.sub(r"\n +", " ", without_comments)

    # The call block catches the error of a missing number: the sentence then is empty.
    lines = []
    for line in joined.split("\n"):
        is_tag = re.fullmatch(r"\{% ((?!%\}).)* %\}", line)
        if line and not is_tag:
            line = f"{{% call sentence() %}}{line}{{% endcall %}}"
        lines.append(line)
    return "\n".join(lines)


@functools.lru_cache
def load_text():
    """text.j2 as a template."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,  # to use what was not measured raises UndefinedError
        finalize=to_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(code=code)
    environment.tests.update(above=is_above, below=is_below, unclear=is_unclear)
    environment.globals.update(
        best=best, headline=headline, network=describe_network, amdahl_limit=amdahl_limit
    )
    source = (TEMPLATES / "text.j2").read_text(encoding="utf-8")
    return environment.from_string(mark_sentences(source))


class Report:
    """The content of analysis.json, and what text.j2 asks of it: its attributes and methods.

    It remembers which tables and figures the text has shown and which sections were empty.
    Raises KeyError, TypeError, ValueError or AttributeError if the content has another form.
    """

    def __init__(self, analysis, beyond=()):
        self.created = analysis["created"] and format_date(analysis["created"])
        self.runs = analysis["runs"]
        self.failed_runs = analysis["failed_runs"]
        self.caveats = analysis["marks"]
        self.not_analysed = analysis["missing"]
        self.machines = analysis["environments"]

        self.metrics = {}
        for name, entry in analysis["facts"].items():
            if not math.isfinite(entry["value"]):
                raise ValueError(f"{name} is {entry['value']}")
            self.metrics[name] = Metric(**entry)

        self.figures = [make_figure(**entry) for entry in analysis["figures"]]
        self.tables = [make_table(**entry) for entry in analysis["tables"]]
        if self.machines:
            self.tables.append(make_environment_table(self.machines))
        # Predictions are kept apart, so that the text shows them in their own section only.
        self.predicted = [make_text_table(table) for table in beyond]
        self.predicted_notes = {table.name: table.notes for table in beyond}
        self.shown = []
        self.empty_sections = []

    def to_markdown(self):
        """The report."""
        repeats = {metric.n for metric in self.metrics.values() if metric.n}
        text = load_text().render(
            vars(self),
            machine=self.machines[0] if self.machines else {},
            repeats=sorted(repeats),
            sentence=self.sentence,
            section=self.section,
            show=self.show,
            configuration=self.configuration,
            configurations=self.configurations,
        )
        return re.sub(r"\n{3,}", "\n\n", text.replace(RESULT, "")).strip() + "\n"

    def sentence(self, caller):
        """The sentence caller(), or nothing if it names what was not measured."""
        try:
            text = caller().strip()
        except jinja2.UndefinedError:
            return ""
        return f"{text}\n" if text else ""

    def section(self, heading, caller, optional=False):
        """The heading with the body caller(), or nothing if that shows nothing of the results."""
        already_empty = len(self.empty_sections)
        body = caller()
        # Fixed words alone are no reason for a section.
        if RESULT in body:
            return f"\n{heading}\n\n{body}\n"
        del self.empty_sections[already_empty:]  # those in this section are not named too
        if not optional:
            self.empty_sections.append(heading.strip("# "))
        return ""

    def show(self, exhibits, pattern):
        """Those of the tables or figures with such a name that the text has not shown so far."""
        parts = []
        for exhibit in exhibits:
            if exhibit not in self.shown and fnmatch.fnmatchcase(exhibit.name, pattern):
                self.shown.append(exhibit)
                number = sum(1 for each in self.shown if each.kind == exhibit.kind)
                parts.append(exhibit.numbered(number))
        return Markdown("\n\n".join(parts))

    def configuration(self, suite, name):
        """A configuration. One that was not measured has no metrics."""
        prefix = f"{suite}.{name}."
        metrics = {}
        for full_name, metric in self.metrics.items():
            if full_name.startswith(prefix):
                metrics[full_name.removeprefix(prefix)] = metric
        return MeasuredConfiguration(name, metrics, self.caveats)

    def configurations(self, suite, pattern="*"):
        """The measured configurations of a suite with such a name."""
        parts = [full_name.split(".") for full_name in self.metrics]
        names = dict.fromkeys(part[1] for part in parts if part[0] == suite and len(part) == 3)
        found = [self.configuration(suite, name) for name in names]
        return [each for each in found if fnmatch.fnmatchcase(each.base, pattern)]


def read_analysis(folder, beyond=()):
    """The Report of folder/analysis.json, and of the tables `beyond`. Raises InputError."""
    path = folder / "analysis.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): run analyze_results.py first, "
            "or give another --analysis"
        ) from None

    # A damaged file, and one of another program or version, fails somewhere here.
    try:
        report = Report(json.loads(content), beyond)
        for figure in report.figures:
            for suffix in (".png", ".svg"):
                if not figure_path(folder, figure, suffix).is_file():
                    raise ValueError(f"there is no {figure_path(folder, figure, suffix)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InputError(
            f"{path} is not a complete analysis of this version ({reason}): "
            "run analyze_results.py again"
        ) from None
    return report


# --------------------------------------------------------------------------------------------------
# The formats
# --------------------------------------------------------------------------------------------------


def convert(markdown, form, *options, output=None):
    """report.md in another format of pandoc: the text, or with `output` a file there."""
    # pandoc has places of their own for title and date.
    heading, body = markdown.split("\n\n", 1)
    title, _, date = heading.removeprefix("# ").partition("\n")
    arguments = [
        "--standalone",
        "--wrap=none",
        f"--lua-filter={TEMPLATES / 'report.lua'}",
        f"--metadata=title:{title}",
        f"--metadata=date:{date}",
        *options,
    ]
    return pypandoc.convert_text(body, form, MARKDOWN, extra_args=arguments, outputfile=output)


def make_html(markdown, figures, source):
    """One page that contains its figures, style and script."""
    for figure in figures:
        svg = base64.b64encode(figure_path(source, figure, ".svg").read_bytes()).decode()
        address = f"data:image/svg+xml;base64,{svg}"
        markdown = markdown.replace(f"](figures/{figure.name}.png)", f"]({address})")
    template = f"--template={TEMPLATES / 'report.html'}"
    return convert(markdown, "html", template, "--toc", "--toc-depth=3", "--section-divs")


def make_latex(markdown, form="latex", *options, output=None):
    """LaTeX, or with form="pdf" a PDF in the file `output`."""
    # Any other character would end LaTeX: its code point is named instead.
    printable = NOT_IN_LATEX.sub(lambda match: f"[U+{ord(match[0]):04X}]", markdown)
    return convert(
        printable,
        form,
        "--shift-heading-level-by=-1",  # ## is \section
        "--number-sections",
        f"--include-in-header={TEMPLATES / 'header.tex'}",
        "--variable=papersize:a4",
        "--variable=geometry:margin=20mm",
        *options,
        output=output,
    )


def make_pdf(markdown, folder, engine):
    """Write folder/report.pdf, with the figures in that folder. Raises TrainingError."""
    options = (f"--pdf-engine={engine}", f"--resource-path={folder}")
    try:
        make_latex(markdown, "pdf", *options, output=folder / "report.pdf")
    except RuntimeError as error:
        raise TrainingError(f"{engine} could not make report.pdf: {error}") from None


def write_report(markdown, figures, source, folder):
    """Write report.md, report.html, report.tex, and figures/ for the first and the last."""
    for figure in figures:
        picture = figure_path(source, figure, ".png").read_bytes()
        write_file(figure_path(folder, figure, ".png"), picture)
    write_file(folder / "report.md", markdown.encode())
    write_file(folder / "report.html", make_html(markdown, figures, source).encode())
    write_file(folder / "report.tex", make_latex(markdown).encode())


def write_file(path, content):
    with atomic_write(path) as file:
        file.write(content)


def parse_args(argv=None):
    parser = Parser("make_report", __doc__)
    add = parser.add_argument
    add(
        "--analysis",
        metavar="FOLDER",
        default="results/analysis",
        help="output folder of analyze_results.py (default: %(default)s)",
    )
    add("--output-dir", metavar="FOLDER", default="report", help="default: %(default)s")
    add("--prediction", metavar="FILE", help="prediction.json of predict_scaling.py")
    add("--check", metavar="FILE", help="file of check_prediction.py")
    add("--pdf", action="store_true", help="make report.pdf too, if LaTeX is installed")
    return parser.parse_args(argv)


def read_beyond(args):
    """The tables of what is predicted beyond this machine, as far as the options name files."""
    tables = []
    if args.prediction:
        tables += scaling_tables.prediction_tables(Path(args.prediction))
    if args.check:
        tables += scaling_tables.check_tables(Path(args.check))
    if tables:
        tables.append(scaling_tables.published_table())
    return tables


def main(argv=None):
    args = parse_args(argv)
    source = Path(args.analysis)
    folder = Path(args.output_dir)
    report = read_analysis(source, read_beyond(args))
    written = [folder / name for name in ("report.md", "report.tex", "report.html")]
    check_outputs([*written, folder / "report.pdf"])

    markdown = report.to_markdown()
    write_report(markdown, report.figures, source, folder)
    if args.pdf:
        installed = [engine for engine in PDF_ENGINES if shutil.which(engine)]
        if installed:
            make_pdf(markdown, folder, installed[0])
            written.append(folder / "report.pdf")
        else:
            print(f"no PDF: none of {', '.join(PDF_ENGINES)} is installed")
    print("written:", *written)


if __name__ == "__main__":
    run_main(main)
