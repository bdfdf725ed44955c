"""make_report.py: from facts made up here to three formats, the page in a real browser, the LaTeX compiled."""

import base64
import fcntl
import html.parser
import itertools
import json
import os
import re
import select
import shutil
import subprocess

import make_report
import pytest
from helpers import REPO, assert_one_error_line

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg=="
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20"><path d="M0 0h9v9z"/></svg>'
NASTY = r"""50 % of_it & <b>x</b> | \a{b} ~^ $1 #2 "q" `c` *d* -- [e](f) ö 漢 µ"""
FORMATS = ("md", "tex", "html")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def fact(value, unit="", half=0.01):
    """A fact with an interval of ± half × value, n = 3; half None: measured once."""
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
    """All that the text can name, in the form of analyze_results.py."""
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
    """Set a fact to another value, with an interval around it unless others has one."""
    analysis["facts"][name].update({**fact(value, analysis["facts"][name]["unit"]), **others})


@pytest.fixture
def analysis():
    return make_analysis()


@pytest.fixture
def write(tmp_path):
    """write(analysis, *options) → {format: report} of make_report.py's main(), in an empty folder each time."""
    numbers = itertools.count(1)

    def run(analysis, *options):
        folder = tmp_path / str(next(numbers))
        save(folder, analysis)
        make_report.main(
            ["--analysis", str(folder), "--output-dir", str(folder / "report"), *options]
        )
        return {form: (folder / "report" / f"report.{form}").read_text() for form in FORMATS}

    return run


def save(folder, analysis):
    (folder / "figures").mkdir(parents=True)
    (folder / "analysis.json").write_text(
        analysis if isinstance(analysis, str) else json.dumps(analysis)
    )
    for figure in analysis["figures"] if isinstance(analysis, dict) else []:
        (folder / "figures" / f"{figure['name']}.png").write_bytes(PNG)
        (folder / "figures" / f"{figure['name']}.svg").write_text(SVG)


class Page(html.parser.HTMLParser):
    """The elements of a page, closed in the order in which they must be, and its text."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

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
    text = re.sub(
        r"\\(?:texttt|emph|textbf)\{([^{}]*)\}", r"\1", text.replace(r"\allowbreak{}", "")
    )
    for tex, plain in (
        (r"$\times$", "×"),
        ("$-$", "−"),
        (r"$\pm$", "±"),
        (r"\%", "%"),
        (r"\_", "_"),
        ("~", " "),
    ):
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
    analysis["environments"][0]["cpu"], analysis["runs"] = "Another", 43
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
    analysis["environments"][0]["training"]["epochs"] = "8"
    reports = write(analysis)
    assert_everywhere(reports, *after)
    assert_nowhere(reports, *before)


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
def test_a_removed_fact_removes_its_sentence(name, sentence, analysis, write):
    assert_everywhere(write(analysis), sentence)
    del analysis["facts"][name]
    assert_nowhere(write(analysis), sentence)


def test_any_fact_may_be_missing(analysis, write):
    """Each alone, and all: the text is made, and names nothing that is not there."""
    for name in list(analysis["facts"]):
        without = {
            **analysis,
            "facts": {key: value for key, value in analysis["facts"].items() if key != name},
        }
        assert "Undefined" not in make_report.make_text(without)
    lists = ("tables", "figures", "environments", "marks", "missing", "failed_runs")
    reports = write(
        {**analysis, "created": None, "facts": {}, "runs": 0, **{name: [] for name in lists}}
    )
    assert set(re.findall(r"\d+", reports["md"])) == {"10"}  # CIFAR-10
    assert_everywhere(reports, "No section Performance")


def test_a_false_condition_removes_its_sentence(analysis, write):
    faster = "hybrid-1x2-weak is faster than mpi-2-weak on as many cores, 2,430 images/s"
    slower, name = (
        "hybrid-1x2-weak is slower than mpi-2-weak",
        "parallel.hybrid-1x2-weak.images_per_s",
    )
    reports = write(analysis)
    assert_everywhere(reports, faster)
    assert_nowhere(reports, slower)
    change(analysis, name, 1500)
    reports = write(analysis)
    assert_everywhere(reports, slower)
    assert_nowhere(reports, faster)
    change(analysis, name, 2430, low=1820, high=3040)  # overlaps 1,830's
    assert_nowhere(write(analysis), faster, slower)
    change(analysis, name, 2430, low=None, high=None, n=1)  # measured once
    assert_nowhere(write(analysis), "hybrid-1x2-weak is faster", slower)


def test_a_section_without_results_is_named(analysis, write):
    heading = {
        "md": "\n## Data loading\n",
        "tex": r"\section{Data loading}",
        "html": ">Data loading</h2>",
    }
    reports = write(analysis)
    for form in FORMATS:
        assert heading[form] in reports[form]
    for part in ("tables", "figures"):
        analysis[part] = [
            entry for entry in analysis[part] if not entry["name"].startswith("loading")
        ]
    analysis["facts"] = {
        name: entry for name, entry in analysis["facts"].items() if not name.startswith("loading")
    }
    reports = write(analysis)
    assert_everywhere(reports, "No section Data loading: there is no result for it.")
    for form in FORMATS:
        assert heading[form] not in reports[form]


def test_logs_of_single_runs(analysis, write):
    """Nobody knows in what order they ran; and a section that is not there is named without its own sections."""
    analysis.update(
        facts={"files.serial_cnn.images_per_s": fact(1010, "images/s", half=None)},
        tables=[],
        figures=[],
    )
    reports = write(analysis)
    assert_everywhere(
        reports, "Each run trains for 7 epochs on 4,800 images", "No section Performance"
    )
    assert_nowhere(reports, "interleaved", "No section MPI", "No section Scaling")


def test_amdahl_is_fitted_to_more_than_one_number_of_cores(analysis, write):
    assert_everywhere(
        write(analysis), "fits the strong scaling of MPI best with a serial fraction of 41.8 %"
    )
    del analysis["facts"]["parallel.mpi-4-strong.serial_fraction"]
    assert_nowhere(write(analysis), "fits the strong scaling of MPI", "could make MPI more than")


def test_a_wide_table_is_divided_evenly():
    columns = [{"label": "configuration"}] + [{"label": f"quantity{i}"} for i in range(20)]
    table = {"columns": columns, "rows": [["a", *range(20)]]}
    numbers = [[i for i, _ in group] for group in make_report.paper_columns(table)]
    assert [group[0] for group in numbers] == [0] * len(numbers)
    assert sorted(i for group in numbers for i in group[1:]) == list(range(1, 21))
    assert max(map(len, numbers)) - min(map(len, numbers)) <= 1
    assert (
        len(make_report.paper_columns({"columns": columns[:10], "rows": [table["rows"][0][:10]]}))
        == 1
    )


def test_nothing_of_the_results_is_lost(analysis, write):
    """Every table and figure stands there once, also one that the text does not know."""
    analysis["tables"].append({**analysis["tables"][0], "name": "new_kind", "title": "unheard-of"})
    reports = write(analysis)
    assert_everywhere(reports, "Unheard-of")
    tables, figures = len(analysis["tables"]) + 1, len(analysis["figures"])  # and the environment
    tags = [tag for tag, _ in Page(reports["html"]).elements]
    assert (tags.count("table"), tags.count("img")) == (tables, figures)
    assert reports["tex"].count(r"\includegraphics[") == figures
    assert len(re.findall(r"\\begin\{here\}\{table\}\s*\\caption", reports["tex"])) == tables
    assert (
        len(re.findall(r"\*\*Table \d+\.", reports["md"])),
        reports["md"].count("](figures/"),
    ) == (tables, figures)


def test_marks_stand_out_at_the_top(analysis, write):
    reports = write(analysis)
    assert_everywhere(reports, "accuracies say nothing about CIFAR-10")
    assert reports["md"].index("> **synthetic data**") < reports["md"].index("## ")
    for form, *marks in (
        ("tex", r"\fbox", r"\textbf{synthetic data}", r"\section"),
        ("html", '<aside class="note"', "<strong>synthetic data</strong>", "<h2 id="),
    ):
        places = [reports[form].index(mark) for mark in marks]
        assert places == sorted(places)
    assert_everywhere(reports, "slower than hybrid-1x2-weak: mpi-4-strong (oversubscribed).")
    assert "> **synthetic data**\n>\n> **oversubscribed" in reports["md"]  # two paragraphs
    analysis["marks"] = []
    assert_nowhere(write(analysis), "synthetic data", "mpi-4-strong (oversubscribed)")


def put_everywhere(analysis, text):
    """Where a machine, a library or a failed run decides what stands in the report."""
    analysis["marks"].append(text)
    analysis["missing"].append(text)
    analysis["environments"][0].update(cpu=text, **{"gpu": text})
    analysis["failed_runs"][0]["output"].append(text)
    for entry in (*analysis["tables"], *analysis["figures"]):
        entry.update(title=text, caption=text)
    for entry in analysis["figures"]:
        entry["alt"] = text
    for entry in analysis["tables"]:
        entry["columns"][0]["label"], entry["rows"][0][0] = text, text
    return analysis


def test_escaping(analysis, write):
    plain = Page(write(analysis)["html"])
    reports = write(put_everywhere(analysis, NASTY))
    page = Page(reports["html"])
    assert page.text.count(squeeze(NASTY)) >= 15
    assert [tag for tag, _ in page.elements].count("b") == [tag for tag, _ in plain.elements].count(
        "b"
    )
    assert any(attributes.get("alt") == NASTY for _, attributes in page.elements)
    for table in re.findall(r"(?:^\|.*\n)+", reports["md"], re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert "<b>" not in re.sub(r"(?<!\\)`.*?`", "", reports["md"])
    assert r"50 \% of\_it \& \textless{}b\textgreater{}" in reports["tex"]
    assert "[U+6F22]" in reports["tex"].replace("{[}", "[").replace("{]}", "]")
    assert reports["tex"].replace("ö", "").isascii()


def test_html_is_well_formed_and_asks_for_nothing(analysis, write):
    page = write(analysis)["html"]
    elements = Page(page).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements:
        for name in ("src", "href"):
            target = attributes.get(name, "#main")
            assert target.startswith("data:") or target.removeprefix("#") in ids, target
    assert not re.search(r"https?:|//\w+\.\w|url\(|@import", re.sub(r"base64,[\w+/=]+", "", page))


def test_latex_is_balanced(analysis, write):
    for analysed in (analysis, put_everywhere(make_analysis(), NASTY)):
        text = re.sub(r"(?<!\\)%.*", "", write(analysed)["tex"].replace("\\\\", ""))
        bare = re.sub(r"\\[{}]", "", text)
        depth = list(itertools.accumulate((char == "{") - (char == "}") for char in bare))
        assert min(depth) == depth[-1] == 0
        opened = []
        for what, name in re.findall(
            r"\\(begin|end)\{(\w+)\}", text[text.index(r"\begin{document}") :]
        ):
            if what == "begin":
                opened.append(name)
            else:
                assert opened.pop() == name
        assert not opened


def test_latex_compiles(analysis, write, tmp_path):
    if not any(map(shutil.which, make_report.PDF_MAKERS)):
        pytest.skip(f"needs one of {', '.join(make_report.PDF_MAKERS)}")
    write(put_everywhere(analysis, NASTY), "--pdf")
    assert (tmp_path / "1/report/report.pdf").read_bytes().startswith(b"%PDF")
    names = {path.name for path in (tmp_path / "1/report").iterdir()}
    assert names == {"report.md", "report.tex", "report.html", "report.pdf", "figures"}


def test_pdf_without_latex(analysis, run_script, tmp_path):
    save(tmp_path / "results", analysis)
    done = run_script("make_report.py", "--analysis", "results", "--pdf", env={"PATH": tmp_path})
    assert done.stdout.startswith("no PDF: none of latexmk, pdflatex, tectonic is installed\n")
    assert "report/report.tex" in done.stdout
    assert (tmp_path / "report/figures/parallel_step.png").read_bytes() == PNG


def break_analysis(how):
    analysis = make_analysis()
    text = json.dumps(analysis)
    if how == "truncated":
        return text[:1000]
    if how == "not a number":
        return text.replace('"value": 1010', '"value": NaN')
    if how == "another form":
        return "[1, 2]"
    if how == "figure":
        analysis["figures"][0]["name"] = "../figures/parallel_step"
    elif how == "row":
        analysis["tables"][0]["rows"][0].pop()
    elif how == "fact":
        analysis["facts"]["parallel.serial.seconds"]["value"] = "20"
    elif how == "key":
        del analysis["marks"]
    return analysis


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "no complete JSON"),
        ("not a number", "NaN"),
        ("another form", "is list, not dict"),
        ("figure", "a figure that is not there"),
        ("row", "table parallel_scaling has a row"),
        ("fact", "facts: parallel.serial.seconds: value is str, not int or float"),
        ("key", "has no marks"),
    ],
)
def test_bad_input(how, said, tmp_path, capsys):
    save(tmp_path / "results", break_analysis(how))
    with pytest.raises(make_report.InputError, match=re.escape(said)):
        make_report.main(
            ["--analysis", str(tmp_path / "results"), "--output-dir", str(tmp_path / "report")]
        )
    assert not (tmp_path / "report").exists()


def test_no_analysis_is_one_line(run_script, tmp_path):
    done = run_script("make_report.py", status=2)
    assert_one_error_line(done.stderr)
    assert "results/analysis/analysis.json does not exist" in done.stderr
    assert list(tmp_path.iterdir()) == []


def sentences():
    """The text's sentences, each as the pieces that stand between Jinja2's tags."""
    source = re.sub(r"\{#.*?#\}", "", (REPO / "report/templates/text.j2").read_text(), flags=re.S)
    joined = re.sub(r"\n +", " ", source)
    return [
        [piece for piece in re.split(r"\{%.*?%\}|\{\{.*?\}\}", line) if piece]
        for line in joined.split("\n")
    ]


def test_no_number_stands_in_the_text():
    formulas = ("*S* = 1 / (*f* + (1 − *f*) / *p*)", "(1 / *S* − 1 / *p*) / (1 − 1 / *p*)")
    names = ("CIFAR-10", "ResNet-18", "ResNet-50", "float32", "float64", "95 %")
    for pieces in sentences():
        text = "".join(pieces)
        for allowed in (*formulas, *names):
            text = text.replace(allowed, "")
        assert not re.search(r"\d", text), text


def test_every_sentence_can_appear(analysis):
    """Over these results and a few that are changed; one that never does names a fact that nobody writes."""
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
    texts = [make_report.make_text(analysed) for analysed in (analysis, other, slow, once)]
    kept = {
        name: entry for name, entry in analysis["facts"].items() if not name.startswith("loading")
    }
    texts.append(make_report.make_text({**analysis, "facts": kept, "tables": [], "figures": []}))
    for pieces in sentences():
        longest = max(map(str.strip, pieces), key=len, default="")
        assert any(longest in text for text in texts), longest


class Browser:
    """A headless chromium, spoken to over two pipes: DevTools messages in JSON, each with a zero byte behind it."""

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


def test_page_in_a_browser(analysis, write, browser, tmp_path):
    """Sorting by click and by key, no sideways scrolling of the page, dark and light, nothing on the console."""
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
        assert browser.run(scroll), browser.run(
            "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
            ".map(e => e.outerHTML.slice(0, 200)).slice(0, 3)"
        )
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
