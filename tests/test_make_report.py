"""make_report.py: from made-up results to the Markdown, the page in a real browser, the PDF."""

import base64
import fcntl
import html.parser
import itertools
import json
import os
import re
import select
import shlex
import shutil
import subprocess

import pytest
from helpers import REPO, assert_one_error_line, refused, usage_lines

import make_report

SCRIPT = "experiments/make_report.py"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg=="
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20"><path d="M0 0h9v9z"/></svg>'
NASTY = r"""50 % of_it & <b>x</b> | \a{b} ~^ $1 #2 "q" `c` *d* -- [e](f) www.g.org :100: ö 漢 µ"""
FORMATS = ("md", "tex", "html")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def fact(value, unit="", half=0.01):
    """A metric with an interval of ± half × value, n = 3; half None: measured once."""
    ends = (None, None) if half is None else (value - half * value, value + half * value)
    return {
        "value": value,
        "low": ends[0],
        "high": ends[1],
        "n": 1 if half is None else 3,
        "unit": unit,
    }


UNITS = {
    "images_per_s": "images/s",
    "alone_images_per_s": "images/s",
    "seconds": "s",
    "step_ms": "ms",
    "ram_mb": "MiB",
    "speedup": "×",
    "speedup_over_serial": "×",
    "speedup_over_all": "×",
    "speedup_over_split": "×",
}
RUNS = {  # the configurations of each suite, and what was measured
    "parallel.serial": {
        "images_per_s": 1010,
        "seconds": 20.3,
        "test_accuracy": 61.1,
        "train_accuracy": 65.2,
        "step_ms": 16.4,
        "forward_share": 35.5,
        "backward_share": 54.6,
        "update_share": 9.77,
    },
    "parallel.mpi-2-strong": {
        "images_per_s": 1490,
        "speedup": 1.48,
        "efficiency": 74.1,
        "serial_fraction": 35.1,
        "communication_share": 21.3,
    },
    "parallel.mpi-2-weak": {
        "images_per_s": 1830,
        "speedup": 1.81,
        "efficiency": 90.6,
        "communication_share": 7.31,
    },
    "parallel.mpi-4-strong": {
        "images_per_s": 1580,
        "speedup": 1.56,
        "efficiency": 39.2,
        "serial_fraction": 52.1,
        "communication_share": 33.7,
    },
    "parallel.hybrid-1x1-strong": {
        "images_per_s": 1290,
        "speedup": 1,
        "speedup_over_serial": 1.27,
        "efficiency": 100,
    },
    "parallel.hybrid-1x2-weak": {
        "images_per_s": 2430,
        "speedup": 1.93,
        "speedup_over_serial": 2.41,
        "efficiency": 96.4,
    },
    "parallel.hybrid-1x2-strong": {
        "images_per_s": 2210,
        "speedup": 1.71,
        "speedup_over_serial": 2.19,
        "efficiency": 85.6,
        "serial_fraction": 16.9,
    },
    "parallel.hybrid-2x2-strong": {
        "images_per_s": 2310,
        "speedup": 1.79,
        "speedup_over_serial": 2.29,
        "efficiency": 44.8,
        "serial_fraction": 41.2,
    },
    "parallel.hybrid-2x1-strong": {
        "images_per_s": 1120,
        "speedup": 0.87,
        "speedup_over_serial": 1.11,
        "efficiency": 43.4,
        "serial_fraction": 129,
    },
    "hardware.cnn-scratch-1-core": {"images_per_s": 2010, "ram_mb": 271},
    "hardware.cnn-scratch-2-cores": {"images_per_s": 4020, "ram_mb": 273},
    "hardware.cnn-pytorch-1-core": {"images_per_s": 1500, "ram_mb": 531},
    "hardware.cnn-pytorch-2-cores": {"images_per_s": 5010, "ram_mb": 533},
    "hardware.cnn-pytorch-gpu": {"images_per_s": 90300, "ram_mb": 977},
    "hardware.resnet18-scratch-1-core": {"images_per_s": 33.1, "ram_mb": 711},
    "hardware.resnet18-pytorch-1-core": {"images_per_s": 33.2, "ram_mb": 713},
    "loading.disk-0-workers-train": {"later_loading_share": 14.3, "first_loading_share": 18.8},
    "loading.disk-2-workers-train": {"later_loading_share": 2.39, "first_loading_share": 6.57},
    "loading.memory-0-workers-load": {"alone_images_per_s": 116900},
    "split.all": {"images_per_s": 35.4, "speedup_over_all": 1},
    "split.split": {
        "images_per_s": 20.1,
        "speedup_over_all": 0.568,
        "idle_forward": 68.2,
        "idle_backward": 32.1,
    },
    "split.pipelined": {
        "images_per_s": 25.9,
        "speedup_over_all": 0.737,
        "speedup_over_split": 1.31,
        "idle_forward": 59.3,
        "idle_backward": 11.2,
    },
    "split.replicas": {"images_per_s": 38.4, "speedup_over_all": 1.09},
}


def make_analysis():
    """All that the text can name, as analyze_results.py writes it."""
    facts = {
        f"{run}.{quantity}": fact(value, UNITS.get(quantity, "%"))
        for run, values in RUNS.items()
        for quantity, value in values.items()
    }
    facts["parallel.largest_loss_difference"] = {**fact(3.2e-6), "low": None, "high": None}
    facts["parallel.largest_accuracy_difference"] = {
        **fact(0.14, "points"),
        "low": None,
        "high": None,
    }
    facts["hardware.largest_loss_difference"] = {**fact(0.0521), "low": None, "high": None}
    facts["hardware.largest_accuracy_difference"] = {
        **fact(3.13, "points"),
        "low": None,
        "high": None,
    }
    for suite in ("loading", "split"):
        facts[f"{suite}.largest_loss_difference"] = {**fact(0), "low": None, "high": None}
        facts[f"{suite}.largest_accuracy_difference"] = {
            **fact(0, "points"),
            "low": None,
            "high": None,
        }
    facts["parallel.mpi.amdahl_serial_fraction"] = fact(41.8, "%")
    facts["parallel.hybrid.amdahl_serial_fraction"] = fact(17.6, "%")
    columns = [
        ("configuration", "configuration", "", None),
        ("ranks", "ranks", "", 0),
        ("speedup", "speed-up", "×", 2),
        ("speedup_ci", "±", "×", 2),
    ]
    columns = [
        dict(zip(("key", "label", "unit", "digits"), column, strict=True)) for column in columns
    ]
    rows = [
        ["mpi-10-weak", 10, 7.25, 0.125],
        ["serial", 1, 1.0, None],
        ["mpi-2-weak", 2, None, None],
        ["mpi-4-weak (oversubscribed)", 4, -1.5, 0.25],
    ]
    table = {
        "title": "parallel: scaling",
        "caption": "Against one core.",
        "columns": columns,
        "rows": rows,
    }
    names = (
        "parallel_scaling",
        "hardware_results",
        "loading_loading",
        "split_modes",
        "files_results",
    )
    return {
        "created": "2026-11-21T14:00:00+00:00",
        "results_dir": "results",
        "runs": 42,
        "failed_runs": [
            {
                "run": "parallel/mpi-8-weak/2",
                "status": "timeout",
                "output": ["first", "the last line"],
            }
        ],
        "missing": ["GPU: no run used one"],
        "marks": ["synthetic data", "oversubscribed: mpi-8-weak, mpi-4-strong"],
        "environments": [
            {
                "host": "here",
                "cpu": "A processor",
                "cores": 2,
                "gpu": None,
                "versions": {"numpy": "2.4.6"},
                "training": {"epochs": "7", "images": "4,800", "learning rate": "0.01"},
                "memory_gib": 23.5,
                "commit": "0123456789abcdef0123456789abcdef01234567",
                "dataset": "synthetic",
            }
        ],
        "tables": [{"name": name, **table} for name in names],
        "figures": [
            {"name": name, "title": "A picture", "caption": "Of something.", "alt": "Lines"}
            for name in ("parallel_speedup", "parallel_step", "loading_epoch")
        ],
        "facts": facts,
    }


def change(analysis, name, value, **others):
    """Set a metric to another value, with an interval around it unless others has one."""
    analysis["facts"][name].update({**fact(value, analysis["facts"][name]["unit"]), **others})


@pytest.fixture
def analysis():
    return make_analysis()


@pytest.fixture
def write(tmp_path):
    """write(analysis, *options) → {format: report} of main(); each time in a new folder."""
    numbers = itertools.count(1)

    def run(analysis, *options):
        return write_report(tmp_path / str(next(numbers)), analysis, *options)

    return run


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{format: report} of make_analysis()."""
    return write_report(tmp_path_factory.mktemp("reports"), make_analysis())


@pytest.fixture(scope="module")
def nasty_reports(tmp_path_factory):
    """{format: report} of an analysis whose words are full of markup."""
    return write_report(tmp_path_factory.mktemp("nasty"), put_everywhere(make_analysis(), NASTY))


def write_report(folder, analysis, *options):
    save(folder, analysis)
    output = folder / "report"
    make_report.main(["--analysis", str(folder), "--output-dir", str(output), *options])
    return {form: (output / f"report.{form}").read_text() for form in FORMATS}


def save(folder, analysis):
    """Write analysis.json (or text in its place) and the figures."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    text = analysis if isinstance(analysis, str) else json.dumps(analysis)
    (folder / "analysis.json").write_text(text)
    for figure in analysis["figures"] if isinstance(analysis, dict) else []:
        (folder / "figures" / f"{figure['name']}.png").write_bytes(PNG)
        (folder / "figures" / f"{figure['name']}.svg").write_text(SVG)


def markdown(analysis):
    """The words of report.md, from which the other formats are made."""
    return read({"md": make_report.Report(analysis).to_markdown()}, "md")


class Page(html.parser.HTMLParser):
    """The elements of a page, closed in the order in which they must be, and its text."""

    VOID = ("meta", "link", "img", "br", "hr", "input", "col")

    def __init__(self, page):
        super().__init__()
        self.elements = []
        self.open = []
        self.texts = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self):
        return squeeze("".join(self.texts))


def squeeze(text):
    return " ".join(text.split())  # no-break spaces too


def read(reports, form):
    """The words of a report without its format's markup."""
    text = reports[form]
    if form == "html":
        return Page(text).text
    if form == "md":
        return squeeze(re.sub(r"\\([^\w\s])", r"\1", re.sub(r"(?<!\\)[*`]", "", text)))
    text = re.sub(r"\\(?:texttt|emph|textbf)\{([^{}]*)\}", r"\1", text)
    for tex, plain in ((r"\%", "%"), (r"\_", "_"), (r"\ ", " "), ("~", " ")):
        text = text.replace(tex, plain)
    return squeeze(text)


def assert_everywhere(reports, *texts):
    for form in FORMATS:
        for text in texts:
            assert text in read(reports, form), (form, text)


def assert_nowhere(reports, *texts):
    for form in FORMATS:
        for text in texts:
            assert text not in read(reports, form), (form, text)


# --------------------------------------------------------------------------------------------------
# The text
# --------------------------------------------------------------------------------------------------


def test_altered_numbers_change_in_all_formats(analysis, write):
    change(analysis, "parallel.serial.test_accuracy", 61.1, low=61.1, high=61.10000000000001)
    before = (
        "61.1 % (n = 3, all alike)",
        "21 November 2026, 14:00 UTC",
        "1.81 × (1.79 to 1.83, n = 3)",
        "7.25 ± 0.12",
        "A processor",
        "42 runs",
        "the last line",
        "3.2 × 10",
        "trains for 7 epochs",
    )
    assert_everywhere(write(analysis), *before)

    change(analysis, "parallel.serial.test_accuracy", 59.2)
    analysis["created"] = "2026-12-01T09:05:00+02:00"
    change(analysis, "parallel.mpi-2-weak.speedup", 1.37)
    change(analysis, "parallel.largest_loss_difference", 4.7e-7, low=None, high=None)
    analysis["tables"][0]["rows"][0][2:] = 6.5, 0.375
    for table in analysis["tables"][1:]:
        table["rows"] = table["rows"][1:]
    analysis["runs"] = 43
    analysis["environments"][0]["cpu"] = "Another"
    analysis["environments"][0]["training"]["epochs"] = "8"
    analysis["failed_runs"][0]["output"] = ["another last one"]
    after = (
        "59.2 % (58.6 to 59.8, n = 3)",
        "1 December 2026, 07:05 UTC",
        "1.48 × (1.47 to 1.49, n = 3)",
        "1.37 × (1.36 to 1.38, n = 3)",
        "6.50 ± 0.38",
        "Another",
        "43 runs",
        "another last one",
        "4.7 × 10",
        "trains for 8 epochs",
    )
    reports = write(analysis)
    assert_everywhere(reports, *after)
    assert_nowhere(reports, *before)


def test_all_formats_have_the_same_words(reports):
    """So that what is in report.md, or not, is so in each of them."""
    lines = [line.strip("- \\") for line in reports["md"].splitlines()]
    prose = [read({"md": line}, "md") for line in lines if line[:1] not in ("", "#", "|", "!", ">")]
    compared = [
        line for line in prose if not re.search(r"['–⁻\[]", line)
    ]  # LaTeX has its own for these
    assert len(compared) > 80
    assert_everywhere(reports, *compared)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("parallel.serial.seconds", "in all."),
        ("parallel.mpi.amdahl_serial_fraction", "Amdahl's law fits"),
        ("parallel.largest_accuracy_difference", "their accuracies by at most"),
        ("split.pipelined.idle_forward", "idle for 59.3 %"),
        ("hardware.cnn-pytorch-gpu.images_per_s", "The GPU is faster"),
    ],
)
def test_a_removed_metric_removes_its_sentence(name, sentence, analysis):
    assert sentence in markdown(analysis)
    del analysis["facts"][name]
    assert sentence not in markdown(analysis)


def test_any_metric_may_be_missing(analysis):
    """Each alone, and all: the text is made, and names nothing that is not there."""
    for name in list(analysis["facts"]):
        facts = {key: value for key, value in analysis["facts"].items() if key != name}
        text = markdown({**analysis, "facts": facts})
        assert "Undefined" not in text
        assert "None" not in text
    lists = ("tables", "figures", "environments", "marks", "missing", "failed_runs")
    empty = {name: [] for name in lists}
    text = markdown({**analysis, "created": None, "facts": {}, "runs": 0, **empty})
    assert set(re.findall(r"\d+", text)) == {"10"}  # CIFAR-10
    assert "No section Performance" in text
    assert "No section Limits" not in text


def test_a_null_of_a_machine_removes_its_sentence(analysis):
    assert "on A processor" in markdown(analysis)
    analysis["environments"][0]["cpu"] = None
    analysis["environments"][0]["training"] = None
    text = markdown(analysis)
    assert "This report is about" not in text
    assert "Each run trains" not in text
    assert "None" not in text


def test_a_false_condition_removes_its_sentence(analysis):
    """Faster or slower only where intervals do not overlap."""
    faster = "hybrid-1x2-weak is faster than mpi-2-weak on as many cores, 2,430 images/s"
    slower = "hybrid-1x2-weak is slower than mpi-2-weak"
    name = "parallel.hybrid-1x2-weak.images_per_s"
    assert faster in markdown(analysis)
    assert slower not in markdown(analysis)
    change(analysis, name, 1500)
    assert slower in markdown(analysis)
    assert faster not in markdown(analysis)
    change(analysis, name, 2430, low=1820, high=3040)  # overlaps 1,830's
    assert faster not in markdown(analysis)
    assert slower not in markdown(analysis)
    change(analysis, name, 2430, low=None, high=None, n=1)  # measured once
    assert "hybrid-1x2-weak is faster" not in markdown(analysis)
    assert slower not in markdown(analysis)


def test_a_section_without_results_is_named(analysis, reports):
    assert "\n## Data loading\n" in reports["md"]
    assert r"\section{Data loading}" in reports["tex"]
    assert ">Data loading</h2>" in reports["html"]
    for part in ("tables", "figures"):
        analysis[part] = [
            entry for entry in analysis[part] if not entry["name"].startswith("loading")
        ]
    for name in list(analysis["facts"]):
        if name.startswith("loading"):
            del analysis["facts"][name]
    text = make_report.Report(analysis).to_markdown()
    assert "- No section *Data loading*: there is no result for it." in text
    assert "## Data loading" not in text


def test_logs_of_single_runs(analysis):
    """Their order is unknown; and a section that is left out is named without its own sections."""
    analysis.update(
        facts={"files.serial_cnn.images_per_s": fact(1010, "images/s", half=None)},
        tables=[],
        figures=[],
    )
    text = markdown(analysis)
    assert "Each run trains for 7 epochs on 4,800 images" in text
    assert "No section Performance" in text
    for absent in ("interleaved", "No section MPI", "No section Scaling"):
        assert absent not in text


def test_amdahl_is_fitted_to_more_than_one_number_of_cores(analysis):
    fit = "fits the strong scaling of MPI best with a serial fraction of 41.8 %"
    assert fit in markdown(analysis)
    assert "could make MPI more than 2.39 × (2.37 to 2.42, n = 3)" in markdown(analysis)
    del analysis["facts"]["parallel.mpi-4-strong.serial_fraction"]
    assert "fits the strong scaling of MPI" not in markdown(analysis)
    assert "could make MPI more than" not in markdown(analysis)


def test_the_network_is_counted_on_itself(analysis):
    """Against the multiplications and additions of its layers, worked out by hand."""
    conv1 = 2 * 32**2 * 27 * 32
    conv2 = 2 * 16**2 * 288 * 64
    dense = 2 * (4096 * 256 + 256 * 10)
    forward = conv1 + conv2 + dense
    network = make_report.describe_network("cnn")
    assert network["forward_mflops"] == forward / 1e6
    assert network["step_mflops"] == (3 * forward - conv1) / 1e6
    assert "cnn has 1,070,794 parameters in 4 layers: convolution 3 → 32, 3 × 3;" in markdown(
        analysis
    )


def sentences():
    """The sentences of text.j2, each as the pieces between Jinja2's tags."""
    path = REPO / "experiments/templates/text.j2"
    source = re.sub(r"\{#.*?#\}", "", path.read_text(), flags=re.DOTALL)
    joined = re.sub(r"\n +", " ", source)
    return [
        [piece for piece in re.split(r"\{%.*?%\}|\{\{.*?\}\}", line) if piece]
        for line in joined.split("\n")
    ]


def test_no_number_is_in_the_text():
    formulas = ("*S* = 1 / (*f* + (1 − *f*) / *p*)", "(1 / *S* − 1 / *p*) / (1 − 1 / *p*)")
    names = ("CIFAR-10", "ResNet-18", "ResNet-50", "float32", "float64", "95 %")
    for pieces in sentences():
        text = "".join(pieces)
        for allowed in (*formulas, *names):
            text = text.replace(allowed, "")
        assert not re.search(r"\d", text), text


def test_every_sentence_can_appear(analysis):
    """Over these results and a few changed ones; else its condition names what nobody writes."""
    other = make_analysis()
    other["environments"].append({**other["environments"][0], "host": "there"})
    for name, entry in other["facts"].items():
        if name.endswith("images_per_s"):
            entry.update(low=0.1 * entry["value"], high=9 * entry["value"])
        if name.startswith("parallel") and name.endswith("speedup"):
            entry.update(low=0.5, high=2, n=2)
        if name.endswith("speedup_over_all"):
            entry.update(low=0.5, high=2)
    slow = make_analysis()
    change(slow, "parallel.hybrid-1x2-weak.images_per_s", 900)
    change(slow, "parallel.mpi-2-strong.speedup", 0.81)
    once = make_analysis()
    once["facts"]["parallel.serial.seconds"].update(low=None, high=None, n=1)
    once["failed_runs"] = []
    without_loading = make_analysis()
    without_loading["tables"] = []
    without_loading["figures"] = []
    for name in list(without_loading["facts"]):
        if name.startswith("loading"):
            del without_loading["facts"][name]

    analyses = (analysis, other, slow, once, without_loading)
    texts = [make_report.Report(each).to_markdown() for each in analyses]
    measured = [str(REPO / "measurements" / f"{name}prediction.json") for name in ("", "check_")]
    options = make_report.parse_args(["--prediction", measured[0], "--check", measured[1]])
    beyond = make_report.read_beyond(options)
    texts.append(make_report.Report(analysis, beyond).to_markdown())
    for pieces in sentences():
        longest = max(map(str.strip, pieces), key=len, default="")
        assert any(longest in text for text in texts), longest


# --------------------------------------------------------------------------------------------------
# The formats
# --------------------------------------------------------------------------------------------------


def test_a_wide_table_has_columns_of_fixed_width_on_paper():
    """They fill the line, a text gets more of it than a number; a narrow table stays as it is."""
    columns = [{"label": "configuration"}]
    columns += [{"label": f"quantity{i}", "digits": 0} for i in range(12)]
    row = ["a long name of a configuration", *range(12)]
    wide = make_report.make_table("wide", "wide", "", columns, [row]).numbered(1)
    narrow = make_report.make_table("narrow", "narrow", "", columns[:4], [row[:4]]).numbered(2)
    latex = make_report.make_latex(f"# Title\n\n{wide}\n\n{narrow}\n")
    widths = [float(width) for width in re.findall(r"\\real\{([\d.]+)\}", latex)]
    assert len(widths) == 13
    assert sum(widths) == pytest.approx(1, abs=0.01)
    assert widths[0] > 2 * max(widths[1:])
    assert r"\begin{longtable}[]{@{}lrrr@{}}" in latex


def test_nothing_of_the_results_is_lost(analysis, write):
    """Every table and figure is there once, also one that the text does not know."""
    analysis["tables"].append({**analysis["tables"][0], "name": "new_kind", "title": "unheard-of"})
    reports = write(analysis)
    assert_everywhere(reports, "Unheard-of")
    tables = len(analysis["tables"]) + 1  # and the environment
    figures = len(analysis["figures"])

    assert len(re.findall(r"^\*\*Table \d+\.", reports["md"], re.MULTILINE)) == tables
    assert reports["md"].count("](figures/") == figures
    tags = [tag for tag, _ in Page(reports["html"]).elements]
    assert tags.count("table") == tables
    assert tags.count("img") == figures
    assert tags.count("figcaption") == tables + figures
    assert reports["tex"].count(r"\begin{longtable}") == tables
    assert reports["tex"].count(r"\includegraphics[") == figures
    assert (
        len(re.findall(r"\\caption\{\\textbf\{(?:Table|Figure) ", reports["tex"]))
        == tables + figures
    )


def test_caveats_stand_out_at_the_top(analysis, reports):
    assert_everywhere(reports, "accuracies say nothing about CIFAR-10")
    for form, *texts in (
        ("md", "> **synthetic data**\n\n> **oversubscribed", "## "),
        ("tex", r"\begin{quote}", r"\textbf{synthetic data}", r"\section"),
        ("html", "<blockquote>", "<strong>synthetic data</strong>", "<h2>Summary"),
    ):
        places = [reports[form].index(text) for text in texts]
        assert places == sorted(places)
    assert_everywhere(reports, "slower than hybrid-1x2-weak: mpi-4-strong (oversubscribed).")
    analysis["marks"] = []
    text = markdown(analysis)
    assert "synthetic data" not in text
    assert "mpi-4-strong (oversubscribed)" not in text


def put_everywhere(analysis, text):
    """Where a machine, a library or a failed run decides what is in the report."""
    analysis["marks"].append(text)
    analysis["missing"].append(text)
    analysis["environments"][0].update(cpu=text, gpu=text)
    analysis["failed_runs"][0]["output"].append(text)
    for entry in (*analysis["tables"], *analysis["figures"]):
        entry.update(title=text, caption=text)
    for entry in analysis["figures"]:
        entry["alt"] = text
    for entry in analysis["tables"]:
        entry["columns"][0]["label"] = text
        entry["rows"][0][0] = text
    return analysis


def test_escaping(reports, nasty_reports):
    page = Page(nasty_reports["html"])
    assert page.text.count(squeeze(NASTY)) >= 15
    links = [attributes for tag, attributes in page.elements if tag == "a"]
    assert all(attributes["href"].startswith("#") for attributes in links)
    assert "b" not in [tag for tag, _ in page.elements]
    assert any(attributes.get("alt") == NASTY for _, attributes in page.elements)
    tags = [tag for tag, _ in page.elements]
    plain_tags = [tag for tag, _ in Page(reports["html"]).elements]
    assert tags.count("td") == plain_tags.count("td") + 2  # the GPU of the machine
    for table in re.findall(r"(?:^\|.*\n)+", nasty_reports["md"], re.MULTILINE):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1, table
    assert "<b>" not in re.sub(r"(?<!\\)`.*?`", "", nasty_reports["md"])
    assert r"50 \% of\_it \& \textless b\textgreater" in nasty_reports["tex"]
    assert "U+6F22" in nasty_reports["tex"]
    assert not make_report.NOT_IN_LATEX.search(nasty_reports["tex"])


def test_html_is_well_formed_and_asks_for_nothing(reports):
    page = reports["html"]
    elements = Page(page).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements:
        for name in ("src", "href"):
            target = attributes.get(name, "#main")
            assert target.startswith("data:") or target.removeprefix("#") in ids, target
    without_pictures = re.sub(r"base64,[\w+/=]+", "", page)
    assert not re.search(r"https?:|//\w+\.\w|url\(|@import", without_pictures)


def test_latex_is_balanced(reports, nasty_reports):
    for latex in (reports["tex"], nasty_reports["tex"]):
        body = latex[latex.index(r"\begin{document}") :]
        text = re.sub(r"(?<!\\)%.*", "", body.replace("\\\\", ""))
        bare = re.sub(r"\\[{}]", "", text)
        depth = list(itertools.accumulate((char == "{") - (char == "}") for char in bare))
        assert min(depth) == depth[-1] == 0
        opened = []
        for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
            if what == "begin":
                opened.append(name)
            else:
                assert opened.pop() == name
        assert not opened


@pytest.mark.slow
def test_latex_compiles(analysis, write, tmp_path):
    if not any(map(shutil.which, make_report.PDF_ENGINES)):
        pytest.skip(f"needs one of {', '.join(make_report.PDF_ENGINES)}")
    write(put_everywhere(analysis, NASTY), "--pdf")
    folder = tmp_path / "1/report"
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF")
    names = {path.name for path in folder.iterdir()}
    assert names == {"report.md", "report.tex", "report.html", "report.pdf", "figures"}


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def test_script_without_latex(analysis, run_script, tmp_path):
    """The script as users run it, from another folder; no LaTeX is in PATH."""
    save(tmp_path / "results", analysis)
    done = run_script(SCRIPT, "--analysis", "results", "--pdf", env={"PATH": tmp_path})
    assert done.stdout.startswith("no PDF: none of latexmk, pdflatex, tectonic is installed\n")
    assert "report/report.tex" in done.stdout
    assert (tmp_path / "report/figures/parallel_step.png").read_bytes() == PNG


def test_a_pdf_that_cannot_be_made_is_one_line(analysis, write, monkeypatch, tmp_path):
    """LaTeX that fails is a failure of the run; the other formats are there."""
    engine = tmp_path / "pdflatex"
    engine.write_text("#!/bin/sh\necho '! It broke.'\nexit 1\n")
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(make_report, "PDF_ENGINES", ("pdflatex",))
    with pytest.raises(make_report.TrainingError, match=r"pdflatex could not make report\.pdf"):
        write(analysis, "--pdf")
    assert (tmp_path / "1/report/report.html").is_file()
    assert not (tmp_path / "1/report/report.pdf").exists()


def test_documented_lines_are_parsed():
    lines = [shlex.split(line) for line in usage_lines(REPO / SCRIPT)]
    documented = [words[2:] for words in lines if words[:2] == ["python", SCRIPT]]
    assert len(documented) == 2
    for words in documented:
        args = make_report.parse_args(words)
        assert (args.analysis, args.output_dir) == ("results/analysis", "report")


def break_analysis(how):
    analysis = make_analysis()
    text = json.dumps(analysis)
    if how == "truncated":
        return text[: len(text) // 2]
    if how == "not a number":
        return text.replace('"value": 1010', '"value": NaN')
    if how == "another form":
        return "[1, 2]"
    if how == "no text":
        return "\x00\xff"
    if how == "figure":
        analysis["figures"][0]["name"] = "../figures/parallel_step"
    elif how == "absent figure":
        analysis["figures"][0]["name"] = "nowhere"
    elif how == "row":
        analysis["tables"][0]["rows"][0].pop()
    elif how == "fact":
        analysis["facts"]["parallel.serial.seconds"]["value"] = "20"
    elif how == "old fact":
        del analysis["facts"]["parallel.serial.seconds"]["n"]
    elif how == "date":
        analysis["created"] = "yesterday"
    elif how == "key":
        del analysis["marks"]
    return analysis


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "(char "),
        ("not a number", "parallel.serial.images_per_s is nan"),
        ("another form", "list indices"),
        ("no text", "Expecting"),
        ("figure", "'../figures/parallel_step' is no name of a figure"),
        ("absent figure", "figures/nowhere.png"),
        ("row", "shorter"),
        ("fact", "must be real number, not str"),
        ("old fact", "'n'"),
        ("date", "'yesterday'"),
        ("key", "it has no 'marks'"),
    ],
)
def test_bad_input(how, reason, tmp_path):
    save(tmp_path / "results", make_analysis())
    save(tmp_path / "results", break_analysis(how))
    (tmp_path / "results/figures/nowhere.png").unlink(missing_ok=True)
    line = refused(
        make_report.main, "--analysis", tmp_path / "results", "--output-dir", tmp_path / "report"
    )
    assert re.search(r"analysis\.json is not a complete analysis of this version", line)
    assert reason in line
    assert line.endswith("run analyze_results.py again")
    assert "\n" not in line
    assert not (tmp_path / "report").exists()


def test_no_analysis_is_one_line(run_script, tmp_path):
    done = run_script(SCRIPT, status=2)
    assert_one_error_line(done.stderr)
    assert "results/analysis/analysis.json cannot be read" in done.stderr
    assert "run analyze_results.py first" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# The page in a browser
# --------------------------------------------------------------------------------------------------


class Browser:
    """A headless chromium, which exchanges DevTools messages over two pipes.

    A message is JSON with a zero byte behind it.
    """

    def __init__(self, folder):
        (their_input, self.input), (self.output, their_output) = os.pipe(), os.pipe()
        theirs = [
            fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (their_input, their_output)
        ]  # none of them is 3 or 4
        command = [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]
        self.process = subprocess.Popen(
            command,
            preexec_fn=lambda: [
                os.dup2(fd, number) for fd, number in zip(theirs, (3, 4), strict=True)
            ],
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (their_input, their_output, *theirs):
            os.close(fd)
        self.received, self.numbers, self.events, self.session = b"", itertools.count(1), [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
        }
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def receive(self):
        while b"\0" not in self.received:
            assert select.select([self.output], [], [], 180)[0], "the browser does not answer"
            part = os.read(self.output, 65536)
            assert part, "the browser has ended"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params, **self.session}
        os.write(self.input, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def show(self, path, width, scheme="light"):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        loader = self.call("Page.navigate", url=path.as_uri())["loaderId"]
        while not any(
            (event["name"], event["loaderId"])
            == ("load", loader)  # about:blank has its own, maybe late
            for event in self.told("Page.lifecycleEvent")
        ):
            self.events.append(self.receive())

    def told(self, *methods):
        return [event["params"] for event in self.events if event.get("method") in methods]

    def run(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode={"Enter": 13, "Tab": 9}[key],
                **text,
            )

    def close(self):
        self.process.terminate()
        self.process.wait(120)
        os.close(self.input)
        os.close(self.output)


@pytest.fixture
def browser(tmp_path):
    if BROWSER is None:
        pytest.skip("needs chromium")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.mark.slow
def test_page_in_a_browser(analysis, write, browser, tmp_path):
    """Sorting by click and key, no sideways scrolling, dark and light, no message on console."""
    write(put_everywhere(analysis, "a-name-that-is-as-long-as-they-get" + NASTY))
    path = tmp_path / "1/report/report.html"
    table = "document.querySelector('table.sortable')"
    names = f"[...{table}.tBodies[0].rows].map(row => row.cells[0].textContent.slice(0, 6))"
    order = f"[...{table}.querySelectorAll('th')].map(head => head.getAttribute('aria-sort'))"
    heads = f"{table}.querySelectorAll('th button')"
    browser.show(path, 1280)
    assert browser.run(names) == ["a-name", "serial", "mpi-2-", "mpi-4-"]
    browser.run(f"{heads}[2].click()")  # speed-up: as numbers, gaps last
    assert browser.run(names) == ["mpi-4-", "serial", "a-name", "mpi-2-"]
    assert browser.run(order) == [None, None, "ascending"]
    browser.run(f"{heads}[1].focus()")
    browser.press("Enter")
    assert browser.run(names) == ["serial", "mpi-2-", "mpi-4-", "a-name"]
    browser.press("Enter")
    assert browser.run(names) == ["a-name", "mpi-4-", "mpi-2-", "serial"]
    assert browser.run(order) == [None, "descending", None]
    assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth)")
    colours = {}
    for width, scheme in ((1280, "light"), (390, "light"), (390, "dark")):
        browser.show(path, width, scheme)
        scroll = "document.scrollingElement.scrollWidth <= document.documentElement.clientWidth"
        too_wide = (
            "[...document.querySelectorAll('main *')]"
            ".filter(e => e.getBoundingClientRect().right > innerWidth)"
            ".map(e => e.outerHTML.slice(0, 200)).slice(0, 3)"
        )
        assert browser.run(scroll), browser.run(too_wide)
        colours[scheme] = browser.run("getComputedStyle(document.body).backgroundColor")
    assert colours["light"] != colours["dark"]
    assert (
        browser.told("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded") == []
    )
    asked = {
        request["request"]["url"].partition(":")[0]
        for request in browser.told("Network.requestWillBeSent")
    }
    assert asked <= {"file", "data"}
