"""Write the technical report of measured results: Markdown, LaTeX and one self-contained HTML page, from one text.

All that is read is what analyze_results.py wrote: analysis.json and its figures. The words stand in
report/templates/text.j2, the numbers in analysis.json. A sentence that names a number which is not there, or whose
condition does not hold, does not appear; a section without any result is named among the limits instead.

    make report
    python make_report.py --analysis results/analysis --output-dir report
    python make_report.py --pdf                          # with latexmk, pdflatex or tectonic
"""

import base64
import datetime
import fnmatch
import functools
import html
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unicodedata
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import numpy as np
from markupsafe import Markup

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import (
    InputError,
    Parser,
    TrainingError,
    atomic_write,
    check_outputs,
    make_model,
    run_main,
)

TEMPLATES = Path(__file__).resolve().parent / "report" / "templates"
PDF_MAKERS = {  # program → its options, and how often it runs until all references are right
    "latexmk": (["-pdf", "-interaction=nonstopmode", "-halt-on-error"], 1),
    "pdflatex": (["-interaction=nonstopmode", "-halt-on-error"], 3),
    "tectonic": ([], 1),
}
NUMBER, MAYBE_NUMBER = (int, float), (int, float, type(None))
FORM = {  # of analysis.json, as far as it is used here
    "created": (str, type(None)),
    "runs": int,
    "missing": [str],
    "marks": [str],
    "environments": [dict],
    "failed_runs": [{"run": str, "status": str, "output": [str]}],
    "tables": [
        {"name": str, "title": str, "caption": str, "columns": [{"label": str}], "rows": [list]}
    ],
    "figures": [{"name": str, "title": str, "caption": str, "alt": str}],
    "facts": dict,
}
FACT = {"value": NUMBER, "low": MAYBE_NUMBER, "high": MAYBE_NUMBER}
PROPERTIES = {
    "cpu": "CPU",
    "gpu": "GPU",
    "memory_gib": "memory, GiB",
    "blas": "BLAS",
    "python": "Python",
}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
NBSP = "\N{NO-BREAK SPACE}"
BLOCK = "\x01"  # begins the line of a table or figure in the text


# ----------------------------------------------------------------------------------------------------------------------
# The results
# ----------------------------------------------------------------------------------------------------------------------


def read_analysis(folder):
    """The content of analysis.json, after a look at each part that the report uses. Raises InputError."""
    path = folder / "analysis.json"
    try:
        analysis = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: run analyze_results.py, or give another --analysis"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(
            f"{path} is no complete JSON ({error}): run analyze_results.py again"
        ) from None
    if problem := find_mismatch(analysis, FORM) or find_missing_part(analysis, folder):
        raise InputError(f"{path}{problem}: run analyze_results.py again")
    return analysis


def refuse(constant):
    raise ValueError(f"{constant} is no number")


def find_mismatch(value, form, where=""):
    """Where and how `value` differs from `form`; None if it does not.

    form: a type, several, a dict of forms whose keys must all be there, or a list with the form of each element.
    """
    types = form if isinstance(form, (type, tuple)) else type(form)
    if not isinstance(value, types):
        needed = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        return f"{where} is {type(value).__name__}, not {needed}"
    if isinstance(form, dict):
        if absent := form.keys() - value.keys():
            return f"{where} has no {min(absent)}"
        return next(
            filter(None, (find_mismatch(value[k], form[k], f"{where}: {k}") for k in form)), None
        )
    if isinstance(form, list):
        return next(
            filter(
                None, (find_mismatch(v, form[0], f"{where} {i}") for i, v in enumerate(value, 1))
            ),
            None,
        )
    return None


def find_missing_part(analysis, folder):
    """What analysis.json, right as far as FORM tells, still lacks; None if nothing."""
    for name, fact in analysis["facts"].items():
        if problem := find_mismatch(fact, FACT, f": facts: {name}"):
            return problem
    for table in analysis["tables"]:
        if any(len(row) != len(table["columns"]) for row in table["rows"]):
            return f": table {table['name']} has a row of another length than its columns"
    for figure in analysis["figures"]:
        path = folder / "figures" / f"{figure['name']}.png"
        if not re.fullmatch(r"\w[\w.-]*", figure["name"]) or not path.is_file():
            return f" names a figure that is not there, {path}"
    return None


class Fact:
    """A number of the results: {{ fact }} has its 95 % interval and the repeats with it, {{ fact.short }} not."""

    def __init__(self, value, low=None, high=None, n=None, unit=None):
        self.value, self.low, self.high, self.n, self.unit = value, low, high, n, unit or ""

    @property
    def short(self):
        return (
            f"{significant(self.value)}{NBSP}{self.unit}" if self.unit else significant(self.value)
        )

    @property
    def spread(self):
        if self.low is None or self.high is None:
            return ""
        if math.isclose(self.low, self.high, rel_tol=1e-12):  # means of equal numbers are rounded
            return f"(n{NBSP}={NBSP}{self.n}, all alike)" if self.n else ""
        ends = " to ".join(significant(end, like=self.value) for end in (self.low, self.high))
        return f"({ends}, n{NBSP}={NBSP}{self.n})" if self.n else f"({ends})"

    def __str__(self):
        return f"{self.short} {self.spread}".strip()


def significant(value, like=None):
    """`value` to the last digit of the three first ones of `like` (default: itself): 3,600, 1.84, 2.1 × 10⁻⁹."""
    like = value if like is None else like
    exponent = math.floor(math.log10(abs(like))) if like else 2
    if -4 <= exponent < 9:
        return f"{value:,.{max(0, 2 - exponent)}f}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.replace('-', '−')} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}"


class Configuration:
    """A configuration of a suite: run.speedup is the fact <suite>.<name>.speedup. Its name tells the rest."""

    def __init__(self, suite, name, results):
        self.suite, self.name, self._results = suite, name, results
        self.base, _, self.machine = name.partition(
            " "
        )  # [2] and so on behind the name: not the first machine
        self.oversubscribed = any(
            mark.startswith("oversubscribed") and name in re.split(r"[\s:]*[:,] ", mark)
            for mark in results.analysis["marks"]
        )
        shape = re.fullmatch(r"(mpi|hybrid)-(\d+)(?:x(\d+))?-(strong|weak)", self.base)
        self.family, self.scaling = (shape[1], shape[4]) if shape else (name, "")
        self.ranks, self.threads = (int(shape[2]), int(shape[3] or 1)) if shape else (1, 1)
        self.cores = self.ranks * self.threads
        self.source, _, self.workers = re.sub(r"-(\d+)-workers-\w+$", r" \1", self.base).partition(
            " "
        )

    def __getattr__(self, quantity):
        return self._results.fact(f"{self.suite}.{self.name}.{quantity}")


class Entry:
    """A machine: its attributes are the entries of the dict, and of those in it, that are not null."""

    def __init__(self, entries):
        self._entries = entries

    def __getattr__(self, name):
        value = self._entries.get(name)
        return absent(name) if value is None else Entry(value) if isinstance(value, dict) else value


class Block(NamedTuple):
    kind: str  # table or figure
    name: str


class Results:
    """What the text can name. It counts what was shown, so that a section can tell whether it has shown anything."""

    def __init__(self, analysis):
        self.analysis, self.shown, self.empty_sections, self.seen = analysis, 0, [], set()
        self.blocks = [
            Block(kind, entry["name"])
            for kind in ("table", "figure")
            for entry in analysis[f"{kind}s"]
        ]

    def fact(self, name):
        entry = self.analysis["facts"].get(name)
        return (
            Fact(*map(entry.get, ("value", "low", "high", "n", "unit"))) if entry else absent(name)
        )

    def run(self, suite, name):
        return Configuration(suite, name, self)

    def every_run(self, suite, pattern="*"):
        """The configurations of a suite that have facts, in their order."""
        found = (
            re.fullmatch(rf"{suite}\.([^.]+)\.([^.]+)", name) for name in self.analysis["facts"]
        )
        runs = [
            self.run(suite, name) for name in dict.fromkeys(match[1] for match in found if match)
        ]
        return [run for run in runs if fnmatch.fnmatchcase(run.base, pattern)]

    def best(self, runs, quantity):
        """The configuration with the largest mean of that quantity."""
        known = [
            (fact.value, i)
            for i, run in enumerate(runs)
            if isinstance(fact := getattr(run, quantity), Fact)
        ]
        return runs[max(known)[1]] if known else absent(quantity)

    def every_block(self, kind, pattern):
        return [
            block
            for block in self.blocks
            if block.kind == kind and fnmatch.fnmatchcase(block.name, pattern)
        ]

    def rest(self):
        """The tables and figures that the text has not shown so far."""
        return [block for block in self.blocks if block not in self.seen]

    def show(self, value):
        """A value as it stands in the text, with what would be markup there escaped."""
        self.shown += value not in ("", [])
        if isinstance(value, list):
            separator = ", " if value and not isinstance(value[0], Block) else ""
            return separator.join(map(self.show, value))
        if isinstance(value, Block):
            new = value not in self.seen
            self.seen.add(value)
            return f"\n{BLOCK}{value.kind} {value.name}\n" if new else ""
        if isinstance(value, Configuration):
            return f"`{escape_text(value.name)}`" + (
                " (oversubscribed)" if value.oversubscribed else ""
            )
        if isinstance(value, (int, float)):
            return f"{value:,}" if isinstance(value, int) else significant(value)
        return escape_text(value)


class MissingFact(jinja2.UndefinedError):
    """A sentence names what the results do not have."""


def absent(name):
    """What a template gets in the place of a fact that is not there: every use of it raises MissingFact."""
    return jinja2.StrictUndefined(f"the results have no {name}", exc=MissingFact)


def ends(value):
    """The ends of a fact's interval, None where it has none; a number is both ends of itself."""
    return (value, value) if isinstance(value, (int, float)) else (value.low, value.high)


def is_above(value, other):
    """Whether a mean is larger beyond doubt: its interval lies above a number, or above the interval of another."""
    low, limit = ends(value)[0], ends(other)[1]
    return low is not None and limit is not None and low > limit


def is_below(value, other):
    return is_above(other, value)


def is_unclear(value, other):
    """Whether the intervals of two means overlap, or a number lies in one."""
    return (
        None not in (*ends(value), *ends(other))
        and not is_above(value, other)
        and not is_below(value, other)
    )


def amdahl_limit(fraction):
    """The speed-up that no number of cores exceeds, from a serial fraction in percent."""
    low, high = (end and 100 / end for end in ends(fraction))
    return Fact(100 / fraction.value, high, low, fraction.n, "×")


@functools.lru_cache
def describe_network(name):
    """Parameters, layers and floating-point operations of a network of common.py, counted on the network itself."""
    model, seen = make_model(name), []
    weighted = [leaf for layer in model.layers for leaf in layer.leaves() if hasattr(leaf, "W")]
    for leaf in weighted:  # look at the input of each while one image goes through
        leaf.forward = lambda x, leaf=leaf, forward=leaf.forward: (
            seen.append((leaf, x.shape)) or forward(x)
        )
    model.train(False)
    model.forward(np.zeros((1, 32, 32, 3), np.float32))
    layers = []
    for leaf, shape in seen:
        kernel = leaf.kernel_size if leaf.W.ndim == 4 else 0
        side = (shape[1] + 2 * leaf.padding - kernel) // leaf.stride + 1 if kernel else 1
        layers.append(
            {
                "kind": "convolution" if kernel else "dense layer",
                "kernel": kernel,
                "inputs": leaf.W.shape[-2],
                "outputs": leaf.W.shape[-1],
                "share": 100 * leaf.W.size / model.params.size,
                "flops": 2 * leaf.W.size * side**2,
            }
        )
    forward = sum(layer["flops"] for layer in layers)
    return {
        "layers": layers,
        "parameters": model.params.size,
        "forward_mflops": forward / 1e6,
        "step_mflops": (3 * forward - layers[0]["flops"])
        / 1e6,  # backward: dW and dx, but no dx of the images
        "largest": (largest := max(layers, key=lambda layer: layer["share"])),
        "largest_flops_share": 100 * largest["flops"] / forward,
    }


# ----------------------------------------------------------------------------------------------------------------------
# The text: sentences with conditions → blocks that all formats share
# ----------------------------------------------------------------------------------------------------------------------


class Sentences(jinja2.ext.Extension):
    """Jinja2 as text.j2 uses it.

    A line, with the indented lines that follow it, is a sentence. It stands only if everything that it names is there.
    {% section "Title" %} ... {% endsection %} stands only if it has shown something of the results.
    """

    tags = frozenset({"sentence", "section"})

    def preprocess(self, source, name, filename=None):
        lines = []
        for line in re.sub(r"\{#.*?#\}", "", source, flags=re.S).splitlines():
            if line[:1] == " " and lines and lines[-1]:
                lines[-1] += " " + line.strip()
            else:
                lines.append(line.strip())
        is_statement = re.compile(r"\{% \w+(?: (?:(?!%\}).)*)? %\}")
        return "\n".join(
            line
            if not line or is_statement.fullmatch(line)
            else f"{{% sentence %}}{line}{{% endsentence %}}"
            for line in lines
        )

    def parse(self, parser):
        token = next(parser.stream)
        title = [parser.parse_expression()] if token.value == "section" else []
        body = parser.parse_statements((f"name:end{token.value}",), drop_needle=True)
        call = self.call_method(f"_{token.value}", title)
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(token.lineno)

    def _sentence(self, caller):
        shown = self.environment.results.shown
        try:
            text = caller().strip()
            return f"{text}\n" if text else ""
        except MissingFact:
            self.environment.results.shown = shown
            return ""

    def _section(self, title, caller):
        results = self.environment.results
        shown, empty, self.environment.depth = (
            results.shown,
            len(results.empty_sections),
            self.environment.depth + 1,
        )
        body = caller()
        self.environment.depth -= 1
        if results.shown == shown:
            results.empty_sections[empty:] = [title]  # its own sections are not named too
            return ""
        return f"\n{'#' * (self.environment.depth + 2)} {title}\n\n{body}\n"


@functools.lru_cache
def text_environment():
    """Jinja2 for text.j2, compiled once; `results` and `depth` are set for each text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        extensions=[Sentences],
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: environment.results.show(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests.update(above=is_above, below=is_below, unclear=is_unclear)
    return environment


def make_text(analysis):
    """The text with its markup, from text.j2: twice, as what it says about missing sections is known at the end."""
    environment, missing_sections = text_environment(), []
    machines = [Entry(machine) for machine in analysis["environments"]]
    failures = {}
    for failed in analysis["failed_runs"]:
        failures.setdefault((failed["status"], (failed["output"] or [""])[-1]), []).append(
            failed["run"]
        )
    for _ in range(2):
        results = environment.results = Results(analysis)
        environment.depth = 0
        text = environment.get_template("text.j2").render(
            **{name: analysis[name] for name in ("runs", "marks", "missing", "failed_runs")},
            failures=failures,
            machines=machines,
            machine=machines[0] if machines else Entry({}),
            repeats=sorted({fact["n"] for fact in analysis["facts"].values() if fact.get("n")}),
            fact=results.fact,
            run=results.run,
            every_run=results.every_run,
            best=results.best,
            rest=results.rest,
            tables=functools.partial(results.every_block, "table"),
            figures=functools.partial(results.every_block, "figure"),
            network=describe_network,
            amdahl_limit=amdahl_limit,
            missing_sections=missing_sections,
        )
        missing_sections = results.empty_sections
    return text


def escape_text(value):
    """A value without line breaks and without what the text's markup would take for its own."""
    return re.sub(r"([\\`*#>=-])", r"\\\1", re.sub(r"[ \t\r\n]+", " ", str(value)))


SPAN = re.compile(
    r"`(?P<code>(?:\\.|[^\\`])*)`|\*\*(?P<strong>(?:\\.|[^\\*])*)\*\*|\*(?P<em>(?:\\.|[^\\*])*)\*"
    r"|(?P<plain>(?:\\.|[^\\`*])+)"
)


def parse_spans(text):
    """Text with `code`, **strong** and *em* → [(style, text)]."""
    return [(m.lastgroup, re.sub(r"\\(.)", r"\1", m[m.lastgroup])) for m in SPAN.finditer(text)]


def parse_blocks(text, analysis):
    """The text → [{"kind": "heading", "level": 2, "spans": ...} | paragraph | list | note | keys | table | figure].

    Lines that follow each other are one paragraph, or one list of "- item", "> note" or "= key :: what".
    """

    def kind_of(line):
        kind = BLOCK if line[0] == BLOCK else "paragraph"
        return {"- ": "list", "> ": "note", "= ": "keys", "# ": "heading", "##": "heading"}.get(
            line[:2], kind
        )

    known = {("figure", entry["name"]): entry for entry in analysis["figures"]}
    known.update({("table", entry["name"]): join_intervals(entry) for entry in analysis["tables"]})
    blocks, numbers = [], {"table": itertools.count(1), "figure": itertools.count(1)}
    for lines in (
        part.strip("\n").split("\n") for part in re.split(r"\n\s*\n", text) if part.strip()
    ):
        for kind, group in itertools.groupby(lines, kind_of):
            group = list(group)
            if kind in ("list", "note", "keys"):
                items = [line[2:] for line in group]
                split = re.compile(
                    r"(.*?)( \(.*\))? :: (.*)"
                )  # 1.84 × (1.80 to 1.88, n = 3) :: the speed-up
                blocks.append(
                    {
                        "kind": kind,
                        "items": [
                            [parse_spans(part or "") for part in split.fullmatch(item).groups()]
                            if kind == "keys"
                            else parse_spans(item)
                            for item in items
                        ],
                    }
                )
            elif kind == "heading":
                marks, _, title = group[0].partition(" ")
                name = re.sub(r"\W+", "-", title.lower()).strip("-")
                blocks.append(
                    {
                        "kind": "heading",
                        "level": len(marks),
                        "spans": parse_spans(title),
                        "id": name,
                    }
                )
            elif kind == BLOCK:
                for line in group:
                    what, _, name = line[1:].partition(" ")
                    entry = known[what, name]
                    title = entry["title"][:1].upper() + entry["title"][1:]
                    blocks.append(
                        {"kind": what, "number": next(numbers[what]), **entry, "title": title}
                    )
            else:
                blocks.append({"kind": "paragraph", "spans": parse_spans(" ".join(group))})
    return blocks


# ----------------------------------------------------------------------------------------------------------------------
# Three formats
# ----------------------------------------------------------------------------------------------------------------------


def escape_markdown(text, style="plain"):
    if style == "code":
        return text.replace("`", "'")
    return re.sub(r"([\\`*_\[\]<>|~#$])", r"\\\1", text.replace("&", "&amp;").replace(NBSP, " "))


LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "*": "{*}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "[": "{[}",
    "]": "{]}",
    "–": "--",
    "—": "---",
    "×": r"$\times$",
    "−": "$-$",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "≈": r"$\approx$",
    "→": r"$\to$",
    "…": r"\ldots{}",
    "’": "'",
    "“": "``",
    "”": "''",
    "µ": r"$\mu$",
    "μ": r"$\mu$",
    "°": r"$^\circ$",
    "®": r"\textregistered{}",
    "™": r"\texttrademark{}",
    NBSP: "~",
}


def escape_latex(text, style="plain"):
    """Every character is one that LaTeX can set without further fonts; where there is none, its code point is named."""
    text = re.sub(
        r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+",
        lambda m: f"\x02{unicodedata.normalize('NFKC', m[0]).replace('−', '-')}\x03",
        text,
    )
    parts = []
    for char in text:
        if char == "-" and parts[-1:] == ["-"]:
            parts.append("{}-")  # not a dash
        elif char in LATEX:
            parts.append(LATEX[char])
        elif " " <= char <= "~" or char in "\x02\x03":
            parts.append(char)
        else:
            plain = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
            parts.append(
                "".join(LATEX.get(c, c) for c in plain if c.isprintable()) or f"[U+{ord(char):04X}]"
            )
    text = "".join(parts).replace("\x02", r"\textsuperscript{$").replace("\x03", "$}")
    return re.sub(r"(\\_|/|-(?!\{))", r"\1\\allowbreak{}", text) if style == "code" else text


def escape_html(text, style="plain"):
    return html.escape(text)


FORMATS = {  # escape, and what stands around a span
    "md": (escape_markdown, {"code": "`{}`", "strong": "**{}**", "em": "*{}*", "plain": "{}"}),
    "tex": (
        escape_latex,
        {"code": r"\texttt{{{}}}", "strong": r"\textbf{{{}}}", "em": r"\emph{{{}}}", "plain": "{}"},
    ),
    "html": (
        escape_html,
        {
            "code": "<code>{}</code>",
            "strong": "<strong>{}</strong>",
            "em": "<em>{}</em>",
            "plain": "{}",
        },
    ),
}


def join_intervals(table):
    """The table with each ± column, half of an interval, in the cells of the column before it: (mean, half)."""
    columns = table["columns"]
    kept = [i for i, column in enumerate(columns) if column["label"] != "±"]
    means = {i for i in kept if i + 1 < len(columns) and i + 1 not in kept}
    return {
        **table,
        "columns": [columns[i] for i in kept],
        "rows": [
            [(row[i], row[i + 1]) if i in means else row[i] for i in kept] for row in table["rows"]
        ],
    }


def format_cell(value, column):
    """A table's cell: numbers with the column's digits, – where there is nothing."""
    if isinstance(value, tuple):
        return " ± ".join(format_cell(part, column) for part in value if part is not None) or "–"
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        digits = column.get("digits")
        return significant(value) if digits is None else f"{value:,.{digits}f}".replace("-", "−")
    return " ".join(str(value).split())


def is_numeric(table, i):
    """Whether a column holds numbers and gaps only."""
    values = [v for v in (mean_of(row[i]) for row in table["rows"]) if v is not None]
    return bool(values) and all(isinstance(v, (int, float)) for v in values)


def mean_of(cell):
    return cell[0] if isinstance(cell, tuple) else cell


def header(column):
    return f"{column['label']}, {column['unit']}" if column.get("unit") else column["label"]


def paper_columns(table, width=105):
    """Groups of columns that fit on paper, each with the first one: lists of (number, lines of its head).

    width: of the paper, in characters. A table up to a quarter wider stays whole, in smaller letters; of one that is
    divided all parts are about as wide.
    """
    heads, widths, groups = [], [], [[]]
    for i, column in enumerate(table["columns"]):
        cells = [format_cell(row[i], column) for row in table["rows"]]
        widest = max(map(len, [*cells, *header(column).split()]))
        heads.append(
            (
                i,
                textwrap.wrap(
                    header(column), widest, break_long_words=False, break_on_hyphens=False
                ),
            )
        )
        widths.append(widest + 2)
    first, others = widths[0], sum(widths[1:])
    parts = 1 if first + others <= 1.25 * width else math.ceil(others / max(1.1 * width - first, 1))
    used = 0
    for i, head in enumerate(heads):
        if i and used >= len(groups) * others / parts:
            groups.append([heads[0]])
        groups[-1].append(head)
        used += widths[i] if i else 0
    return groups


def make_page(form, blocks, pictures, created):
    """The report in one format, from report/templates/report.<form>.j2. pictures: {name: address}"""
    title, *blocks = blocks
    escape, styles = FORMATS[form]
    delimiters = {
        "block_start_string": "((*",
        "block_end_string": "*))",
        "variable_start_string": "(((",
        "variable_end_string": ")))",
        "comment_start_string": "((#",
        "comment_end_string": "#))",
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=form == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **(delimiters if form == "tex" else {}),
    )
    environment.filters.update(
        spans=lambda spans: Markup(
            "".join(styles[style].format(escape(text, style)) for style, text in spans)
        ),
        text=lambda value: Markup(escape(" ".join(str(value).split()))),
        header=lambda column: Markup(escape(header(column))),
        cell=lambda value, column: Markup(escape(format_cell(value, column))),
        mean=mean_of,
        paper_columns=paper_columns,
    )
    environment.tests["numeric"] = is_numeric
    return environment.get_template(f"report.{form}.j2").render(
        title=title["spans"],
        blocks=blocks,
        pictures=pictures,
        created=created and date_in_words(created),
    )


def date_in_words(created):
    """2026-11-21T16:31:40+00:00 → 21 November 2026, 16:31 UTC; what is no such date as it is."""
    try:
        when = datetime.datetime.fromisoformat(created).astimezone(datetime.timezone.utc)
    except ValueError:
        return created
    return f"{when.day} {MONTHS[when.month - 1]} {when:%Y, %H:%M} UTC"


def data_uri(folder, name):
    """A figure as an address that holds the figure itself: SVG where there is one, else PNG."""
    for suffix, kind in ((".svg", "svg+xml"), (".png", "png")):
        path = folder / "figures" / f"{name}{suffix}"
        if path.is_file():
            return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def environment_table(environments):
    """The machines as a table, a column each; what none of them tells is left out."""
    keys = dict.fromkeys(key for environment in environments for key in environment)
    rows = [
        [PROPERTIES.get(key, key), *(in_words(e.get(key)) for e in environments)] for key in keys
    ]
    columns = [{"label": f"machine [{i}]"} for i in range(1, len(environments) + 1)]
    return {
        "name": "environment",
        "title": "Environment",
        "caption": "As the runs have recorded it.",
        "columns": [{"label": "property"}, *columns],
        "rows": [row for row in rows if any(row[1:])],
    }


def in_words(value):
    """An entry of a machine as a table has it."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {in_words(v)}" for k, v in value.items() if v not in (None, ""))
    if isinstance(value, list):
        return "; ".join(map(in_words, value))
    return (
        "" if value is None else re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1…", str(value))
    )  # a hash


def write_report(analysis, source, folder):
    """Write report.md, report.tex, report.html and the figures of the first two. Returns the paths of the reports."""
    if analysis["environments"]:
        analysis = {
            **analysis,
            "tables": [*analysis["tables"], environment_table(analysis["environments"])],
        }
    blocks = parse_blocks(make_text(analysis), analysis)
    names = [block["name"] for block in blocks if block["kind"] == "figure"]
    copies, inline = {n: f"figures/{n}.png" for n in names}, {n: data_uri(source, n) for n in names}
    pages = {
        form: make_page(form, blocks, inline if form == "html" else copies, analysis["created"])
        for form in FORMATS
    }
    for name, copy in copies.items():
        with atomic_write(folder / copy) as file:
            file.write((source / "figures" / f"{name}.png").read_bytes())
    for form, page in pages.items():
        with atomic_write(folder / f"report.{form}") as file:
            file.write(page.encode())
    return [folder / f"report.{form}" for form in pages]


def make_pdf(path):
    """Make a PDF of report.tex beside it. Returns its path; None where no program for that is installed."""
    program = next(filter(shutil.which, PDF_MAKERS), None)
    if program is None:
        return None
    options, times = PDF_MAKERS[program]
    with tempfile.TemporaryDirectory() as scratch:
        if (path.parent / "figures").is_dir():
            shutil.copytree(path.parent / "figures", Path(scratch) / "figures")
        shutil.copy(path, scratch)
        for _ in range(times):
            done = subprocess.run(
                [program, *options, path.name],
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                errors="replace",
            )
            if done.returncode:
                said = [
                    line for line in done.stdout.splitlines() if line.startswith("!")
                ] or done.stdout.splitlines()
                raise TrainingError(f"{program} could not set {path}: {' '.join(said[-1:])}")
        pdf = path.with_suffix(".pdf")
        with atomic_write(pdf) as file:
            file.write((Path(scratch) / pdf.name).read_bytes())
    return pdf


# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser("make_report", __doc__)
    parser.add_argument(
        "--analysis",
        metavar="FOLDER",
        default="results/analysis",
        help="what analyze_results.py has written (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir", metavar="FOLDER", default="report", help="default: %(default)s"
    )
    parser.add_argument(
        "--pdf", action="store_true", help="make report.pdf too, where LaTeX is installed"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    source, folder = Path(args.analysis), Path(args.output_dir)
    analysis = read_analysis(source)
    check_outputs([folder / f"report.{form}" for form in (*FORMATS, "pdf")])
    written = write_report(analysis, source, folder)
    if args.pdf and not (pdf := make_pdf(folder / "report.tex")):
        print(f"no PDF: none of {', '.join(PDF_MAKERS)} is installed")
    elif args.pdf:
        written.append(pdf)
    print("written:", *written)


if __name__ == "__main__":
    run_main(main)
