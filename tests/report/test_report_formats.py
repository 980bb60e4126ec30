from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixtures import cell, make_cells, make_run, names_for, tree_document

from treelora_cli.errors import RunDirError, UsageError
from treelora_cli.report import words
from treelora_cli.report.collect import collect
from treelora_cli.report.curves import STYLES, loss_curve
from treelora_cli.report.dendrogram import dendrogram
from treelora_cli.report.document import document
from treelora_cli.report.formats import choose
from treelora_cli.report.heatmap import heatmap
from treelora_cli.report.html import html
from treelora_cli.report.markdown import escaped, fenced, markdown
from treelora_cli.report.metrics import DEFINITIONS
from treelora_cli.report.model import LossPoint, TaskReport
from treelora_cli.report.ramp import DARK, LIGHT, STEPS, _luminance, colours, contrast, level
from treelora_cli.report.svg import Scale, element, nice_ticks, shorten, text_width
from treelora_cli.report.text import text
from treelora_cli.report.treedoc import problem, read_tree

HOSTILE = "<script>alert('x')</script>|`**\x1b[31mred\x1b[0m\x07\u202e [b]m[/b] & \"q\""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "one": collect(make_run(root / "one", tasks=1)),
        "trace": collect(make_run(root / "trace", tasks=8)),
        "seqlora": collect(
            make_run(root / "seqlora", tasks=8, method="seqlora", tree=False, drop=0.06)
        ),
        "half": collect(make_run(root / "half", tasks=8, learned=3, builtin=True, model="tiny")),
        "none": collect(make_run(root / "none", tasks=3, learned=0)),
        "many": collect(make_run(root / "many", tasks=40, steps=3)),
        "hostile": collect(
            make_run(
                root / "hostile",
                method=HOSTILE,
                model=HOSTILE,
                extra={"command": ["treelora", HOSTILE], "decoding": "greedy"},
            )
        ),
    }


EVERY = ["one", "trace", "seqlora", "half", "none", "many", "hostile"]


class _Page(HTMLParser):
    """Checks that every element is closed in turn, and collects what the page refers to."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("name", EVERY)
def test_html_is_well_formed_and_needs_nothing_else(runs, name):
    page = html([runs[name]])
    parsed = _Page(page)
    assert not parsed.tags & {"script", "link", "img", "iframe", "image", "use", "object"}
    for attribute, value in parsed.attributes:
        assert attribute not in {"src", "href", "xlink:href", "onload", "onclick"}
        assert "url(" not in (value or "")
    assert "@import" not in page
    assert "url(" not in page
    assert "://" not in page.replace(runs[name].path, "")
    assert "default-src 'none'" in page


@pytest.mark.parametrize("name", EVERY)
def test_every_picture_is_xml_with_a_label_and_finite_places(runs, name):
    pictures = re.findall(r"<svg.*?</svg>", html([runs[name]]), re.DOTALL)
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("aria-label") or root.get("aria-hidden")
        assert not re.search(r"\bnan\b|\binf\b", re.sub(r">[^<]*<", "><", picture))
    if name in ("trace", "many"):
        # Matrix, kept, tree, loss at two widths, OP (at two widths where it has its own row).
        assert len(pictures) == (6 if name == "trace" else 7)


def test_every_score_is_in_the_heat_map(runs):
    report = runs["trace"]
    drawn = str(heatmap(report))
    for row in report.matrix:
        for score in row:
            if score is not None:
                assert f">{100 * score:.1f}</text>" in drawn
    assert drawn.count('class="frame"') == 8
    assert drawn.count('class="dot"') == 8 * 9 // 2 - 8 - 7


def test_a_missing_score_is_drawn_as_a_hole(tmp_path):
    names = names_for(3)
    cells = [c for c in make_cells(names, 3) if (c.after, c.task) != (names[2], names[0])]
    report = collect(make_run(tmp_path / "run", cells=cells))
    assert str(heatmap(report)).count('class="hole"') == 1
    assert "Not measured (1)" in html([report])
    assert "after MeetingBank: C-STANCE" in text([report])
    assert "- after MeetingBank: C-STANCE" in markdown([report])
    assert document([report])["matrix"][2][0] is None
    assert document([report])["op"] is None


@pytest.mark.parametrize("write", [html, markdown, text], ids=["html", "md", "text"])
def test_built_in_things_say_so_in_every_format(runs, write):
    page = write([runs["half"]])
    title = next(line for line in page.splitlines() if "treelora on" in line)
    assert "tiny (built-in, synthetic)" in title
    plain = " ".join(page.split())
    assert "ScienceQA (built-in, synthetic)" in plain
    assert "not finished (running); numbers are after 3 of 8 tasks" in plain
    both = write([runs["half"], runs["trace"]])
    assert "treelora (half)" in both


def test_real_things_are_not_called_synthetic(runs):
    for write in (html, markdown, text):
        assert "synthetic" not in write([runs["trace"]])


@pytest.mark.parametrize("write", [html, markdown, text], ids=["html", "md", "text"])
def test_scores_of_few_rows_are_shown_apart_from_the_numbers(tmp_path, write):
    names = names_for(2)
    cells = [cell(names[0], names[0], 0.876, limited=True, rows=8)]
    report = collect(make_run(tmp_path / "run", tasks=2, cells=cells))
    page = write([report])
    assert words.LIMITED in page
    assert "87.6" in page
    assert "87.60" not in re.sub("<title>.*?</title>", "", page), "no number is made of it"
    assert "1 score was made with --limit" in page


@pytest.mark.parametrize("write", [html, markdown, text], ids=["html", "md", "text"])
def test_hostile_text_comes_out_harmless(runs, write):
    page = write([runs["hostile"], runs["one"]])
    for character in "\x1b\x07\u202e":
        assert character not in page
    if write is html:
        assert "<script" not in page
        assert "&lt;script&gt;" in page
        _Page(page)
    elif write is markdown:
        assert r"\<script\>" in page
        assert r"\|\`\*\*" in page
    else:
        assert "[b]m[/b]" in page, "rich markup in data is text"


def test_markdown_tables_have_one_width(runs):
    for report in runs.values():
        page = markdown([report, runs["trace"]])
        for block in page.split("\n\n"):
            rows = [line for line in block.splitlines() if line.startswith("|")]
            bars = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
            assert len(bars) <= 1, block


@given(st.text())
def test_a_fence_outlasts_its_content(content):
    block = fenced(content, "yaml")
    fence = re.match("`+", block)[0]
    assert fence not in block[len(fence) : -len(fence)]


def test_markdown_escapes_markup_and_leaves_words():
    assert escaped("NumGLUE_cm v1.0") == "NumGLUE_cm v1.0"
    assert escaped("_a_ *b* <i> [x](y) #1") == r"\_a\_ \*b\* \<i\> \[x\](y) \#1"


@given(st.text())
def test_cleaned_text_can_be_printed(raw):
    cleaned = words.clean(raw)
    cleaned.encode()
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", cleaned)
    assert words.clean(cleaned) == cleaned


def test_cleaning_keeps_what_people_wrote():
    assert words.clean("判断以下文本 Zürich ") == "判断以下文本 Zürich"
    assert words.clean("a\x1b]0;title\x07b\x1b[1;31mc") == "abc"
    assert words.clean_lines("a:\n  b: 1\r\n\tc") == "a:\n  b: 1\n    c"


def test_text_fits_the_terminal(runs):
    for name in ("trace", "many", "half", "one"):
        for width in (80, 120):
            lines = text([runs[name]], width).splitlines()
            long = [line for line in lines if len(line) > width and "train-stream" not in line]
            assert long == []


def test_text_has_every_score_and_marks_the_diagonal(runs):
    report = runs["many"]
    page = text([report], 80)
    for i, row in enumerate(report.matrix):
        assert f"[{100 * row[i]:.1f}]" in page
    numbers = re.findall(r"\d+\.\d", page)
    for row in report.matrix:
        for score in row:
            assert score is None or f"{100 * score:.1f}" in numbers


@pytest.mark.parametrize("write", [html, markdown, text], ids=["html", "md", "text"])
def test_definitions_and_adapter_mode_stand_beside_the_numbers(runs, write):
    import html as escaping

    for reports in ([runs["trace"]], [runs["trace"], runs["seqlora"]]):
        page = write(reports)
        plain = " ".join(escaping.unescape(page).replace("\\", "").split())
        for key in ("op", "bwt", "forgetting", "fwt"):
            start = DEFINITIONS[key][:24]
            assert start in plain
        assert re.search(r"adapter mode (<b>)?latest", plain)
        assert f"{100 * runs['trace'].op:.2f}" in plain


def test_json_of_one_run_is_an_object_and_of_several_a_list(runs):
    one = document([runs["trace"]])
    assert one["op"] == runs["trace"].op
    wanted = {"op", "bwt", "bwt_lopez_paz", "forgetting", "fwt", "adapter_mode", "matrix"}
    wanted |= {"seconds", "tasks", "method", "model", "synthetic"}
    assert wanted <= set(one)
    assert one["matrix"][0][2:] == [None] * 6
    wanted = {"name", "metric", "own", "final", "zero_shot", "chance", "synthetic"}
    assert wanted <= set(one["tasks"][0])
    several = document([runs["trace"], runs["half"]])
    assert list(several) == ["runs", "groups"]
    assert several["runs"][0] == one
    assert several["runs"][1]["synthetic"] is True
    for name in runs:
        json.dumps(document([runs[name]]), allow_nan=False)


def test_compared_runs_are_told_apart_and_differences_named(runs):
    page = html([runs["trace"], runs["seqlora"], runs["half"]])
    assert "3 runs compared: treelora, seqlora (built-in, synthetic)" in page
    assert "treelora (trace)" in page
    assert "treelora (half)" in page
    assert "the runs differ in: number of tasks learned so far, model" in page
    assert words.legends([runs["trace"], runs["trace"]]) == [
        "treelora (trace) #1",
        "treelora (trace) #2",
    ]
    assert "differ" not in html([runs["trace"], runs["seqlora"]])


def test_more_runs_than_line_styles(runs):
    reports = [runs["trace"]] * (STYLES + 2)
    _Page(html(reports))


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_ramp_is_monotonic(first, second):
    low, high = sorted((first, second))
    assert 0 <= level(low) <= level(high) <= STEPS


@pytest.mark.parametrize(("anchors", "sign"), [(LIGHT, -1), (DARK, 1)])
def test_colours_are_told_apart_by_lightness_and_readable(anchors, sign):
    ramp = colours(anchors)
    assert len(ramp) == STEPS + 1
    lights = [_luminance(cell) for cell, _ in ramp]
    assert all(sign * (b - a) > 0 for a, b in pairwise(lights))
    assert all(contrast(cell, ink) >= 4.5 for cell, ink in ramp)


def test_the_tree_picture(runs):
    drawn = str(dendrogram(runs["trace"].tree))
    assert drawn.count('class="leaf"') == 8
    assert drawn.count('class="node"') == 7
    assert "split by principal; at block 0; threshold 0.125" in drawn
    for number, name in enumerate(names_for(8), start=1):
        assert f">{number} {name}<" in re.sub(r"<title>.*?</title>", "", drawn)


def curve(*losses):
    return TaskReport("a", loss=tuple(LossPoint(n, loss) for n, loss in enumerate(losses, 1)))


def test_a_loss_that_falls_by_orders_is_drawn_by_its_logarithm():
    falling = str(loss_curve([curve(10, 1, 0.01, 0.01, 0.01, 0.001, 0)]))
    assert "logarithmic" in falling
    for tick in ("10", "1", "0.1", "0.01", "0.001"):
        assert f">{tick}</text>" in falling
    points = re.search('points="([^"]+)"', falling)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights == sorted(heights)
    assert heights[1] - heights[0] == pytest.approx((heights[2] - heights[1]) / 2, abs=0.1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_every_loss_curve_stays_inside_its_picture(losses):
    drawn = str(loss_curve([curve(*losses)]))
    for point in re.search('points="([^"]+)"', drawn)[1].split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= 940
        assert 0 <= y <= 240


def test_a_usual_loss_is_drawn_straight():
    assert "logarithmic" not in str(loss_curve([curve(2.5, 1.5, 1.2, 0.9)]))
    assert loss_curve([curve()]) is None


def test_a_very_deep_tree_can_be_drawn():
    count = 1500
    nodes = []
    for depth in range(count):
        at = 2 * depth
        nodes.append(
            {"id": at, "children": [at + 1, at + 2], "tasks": [0], "depth": depth, "block": 1}
        )
        nodes.append({"id": at + 1, "children": [], "tasks": [0], "depth": depth + 1})
    nodes.append({"id": 2 * count, "children": [], "tasks": [0], "depth": count})
    assert str(dendrogram({"tasks": ["a"], "nodes": nodes})).count('class="leaf"') == count + 1


def damaged_trees():
    """A name and a change that no tree document survives."""
    return {
        "no nodes": lambda tree: tree.update(nodes=[]),
        "nodes missing": lambda tree: tree.pop("nodes"),
        "tasks missing": lambda tree: tree.pop("tasks"),
        "a task is no name": lambda tree: tree["tasks"].append(3),
        "a cycle": lambda tree: tree["nodes"][2].update(children=[0, 1]),
        "a child twice": lambda tree: tree["nodes"][0].update(children=[1, 1]),
        "out of range": lambda tree: tree["nodes"][0].update(children=[1, 99]),
        "ids shuffled": lambda tree: tree["nodes"].reverse(),
        "no depth": lambda tree: tree["nodes"][1].pop("depth"),
        "unknown task": lambda tree: tree["nodes"][1].update(tasks=[7]),
        "no task": lambda tree: tree["nodes"][1].update(tasks=[]),
        "a node is text": lambda tree: tree["nodes"].append("x"),
        "threshold is text": lambda tree: tree["nodes"][0].update(threshold="high"),
        "no split": lambda tree: tree["nodes"][0].pop("split"),
        "no parent": lambda tree: tree["nodes"][1].pop("parent"),
        "newer": lambda tree: tree.update(format=2),
    }


@pytest.mark.parametrize("name", damaged_trees())
def test_a_damaged_tree_is_an_error_that_names_the_file(tmp_path, name):
    tree = tree_document(["a", "b", "c"])
    assert problem(tree) == ""
    damaged_trees()[name](tree)
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(RunDirError, match=r"tree\.json"):
        read_tree(path)


def test_a_merged_leaf_names_all_its_tasks():
    tree = tree_document(["a", "b", "c"])
    tree["nodes"] = [{"id": 0, "children": [], "tasks": [0, 1, 2], "depth": 0}]
    assert ">1 a, 2 b, 3 c<" in str(dendrogram(tree))


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(1, 12))
def test_ticks_enclose_the_values(a, b, wanted):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high, wanted)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 3 * wanted + 3
    assert all(x < y for x, y in pairwise(ticks))


@given(st.text(max_size=80), st.floats(20, 300))
def test_a_shortened_name_fits(name, room):
    short = shorten(name, room)
    assert text_width(short) <= room or short == "…"
    if text_width(name) <= room:
        assert short == name


def test_shortening_keeps_both_ends():
    short = shorten("a-very-long-task-name-that-differs-at-the-end-A", 150)
    assert short.startswith("a-very")
    assert short.endswith("end-A")


def test_elements_escape_text_and_attributes():
    assert element("text", "<b>", title='"&') == '<text title="&#34;&amp;">&lt;b&gt;</text>'
    assert Scale(5, 5, 0, 10)(5) == 5


@pytest.mark.parametrize(
    ("wanted", "out", "chosen"),
    [
        (None, None, "text"),
        (None, "r.html", "html"),
        (None, "r.HTM", "html"),
        (None, "r.md", "md"),
        (None, "r.json", "json"),
        (None, "r.txt", "text"),
        ("md", "r.html", "md"),
        ("json", None, "json"),
    ],
)
def test_the_format_follows_the_suffix(tmp_path, wanted, out, chosen):
    assert choose(wanted, tmp_path / out if out else None) == chosen


@pytest.mark.parametrize(("wanted", "out"), [("htlm", None), (None, "r.pdf"), (None, "r")])
def test_an_unknown_format_is_refused(tmp_path, wanted, out):
    with pytest.raises(UsageError) as caught:
        choose(wanted, tmp_path / out if out else None)
    assert "html" in caught.value.hint


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "—"), (0.5, "50.00"), (-0.00001, "0.00"), (0.0, "0.00"), (1.0, "100.00")],
)
def test_scores_are_printed_times_100(value, shown):
    assert words.percent(value) == shown


def test_signs_and_times():
    assert words.signed(0.1) == "+10.00"
    assert words.signed(-0.1) == "-10.00"
    assert words.signed(0.00001) == "0.00"
    assert words.signed(None) == "—"
    assert words.duration(None) == "—"
    assert words.duration(59.96) == "60.0 s"
    assert words.duration(200) == "3 min 20 s"
    assert words.duration(3599.7) == "1 h 0 min"
    assert words.count(1234567) == "1,234,567"
