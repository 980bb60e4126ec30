"""The evidence per pair of tasks: from a run directory to every format."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from report_adapters import SHAPES, adapted_run, changes, factors
from report_fixtures import make_run
from test_report_exports import checked
from test_report_formats import _Page

from treelora_cli.report.collect import collect
from treelora_cli.report.csvtable import csv_table
from treelora_cli.report.document import document
from treelora_cli.report.evidence import EVIDENCE_HEADS, compared, means_line, shown
from treelora_cli.report.heatmap import heatmap
from treelora_cli.report.html import html
from treelora_cli.report.latex import latex
from treelora_cli.report.markdown import markdown
from treelora_cli.report.measure import measure
from treelora_cli.report.model import Evidence, RunReport
from treelora_cli.report.pairmap import pairmap
from treelora_cli.report.text import text
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.merged import Merged, write_merged

ENTRIES = sum(height * width for height, width in SHAPES.values())
TASKS = [factors(2, seed) for seed in range(4)]


def quiet(what: str, done: int, of: int) -> None:
    """Take no notice of progress."""


def measured(path: Path, threshold: float | None = None) -> RunReport:
    return replace(collect(path), evidence=measure(path, threshold, quiet))


def cosines(parts: list[torch.Tensor]) -> list[list[float]]:
    units = [part / part.norm() for part in parts]
    return [[float(one @ other) for other in units] for one in units]


def close(found: object, wanted: list[list[float]]) -> bool:
    assert isinstance(found, tuple)
    return all(
        row == pytest.approx(other, rel=1e-5, abs=1e-6)
        for row, other in zip(found, wanted, strict=True)
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> RunReport:
    return measured(adapted_run(tmp_path_factory.mktemp("evidence") / "run", TASKS))


@pytest.fixture(scope="module")
def found(report) -> Evidence:
    assert report.evidence is not None
    return report.evidence


def test_a_part_is_the_difference_where_one_adapter_goes_on(found) -> None:
    whole = changes(TASKS)
    parts = [whole[0], *(after - before for before, after in itertools.pairwise(whole))]
    assert found.part == "difference"
    assert close(found.cosine, cosines(parts))
    assert found.norm == pytest.approx([float(part.norm()) for part in parts], rel=1e-6)
    assert (found.entries, found.places, found.threshold) == (ENTRIES, (0, 1, 2, 3), 0.1)


@pytest.mark.parametrize("mode", ["own", "route"])
def test_a_part_is_the_own_adapter_where_each_task_has_one(tmp_path, mode) -> None:
    run = adapted_run(tmp_path / "run", TASKS, mode=mode)
    found = measure(run, None, quiet)
    assert found.part == "own"
    assert close(found.cosine, cosines(changes(TASKS)))


def test_of_a_sum_of_adapters_a_part_is_the_last_one(tmp_path) -> None:
    sums = [
        {
            key: torch.cat([task[key] for task in TASKS[: n + 1]], dim=int(".lora_B." in key))
            for key in TASKS[0]
        }
        for n in range(len(TASKS))
    ]
    found = measure(adapted_run(tmp_path / "run", sums), None, quiet)
    assert found.part == "difference"
    assert close(found.cosine, cosines(changes(TASKS)))


def test_an_unfinished_run_is_compared_as_far_as_it_is(tmp_path) -> None:
    run = adapted_run(tmp_path / "run", TASKS[:2], tasks=4, learned=2)
    assert measure(run, None, quiet).places == (0, 1)


def test_merged_adapters_are_no_task_s_own(tmp_path) -> None:
    kept = {"difference": ("C-STANCE",), "own": ("C-STANCE", "ScienceQA")}
    adapters = [*TASKS, factors(2, 9)]
    for mode, part in (("latest", "difference"), ("own", "own")):
        run = adapted_run(tmp_path / part, adapters, mode=mode)
        write_merged(RunDir.open(run), [Merged("001-FOMC+2", (1, 2, 3), 4)])
        found = measure(run, None, quiet)
        assert (found.part, found.names) == (part, kept[part])
        (note,) = found.notes
        assert note.startswith("left out: FOMC, MeetingBank, Py150")
        assert ("ScienceQA" in note) == (part == "difference")


def test_a_task_between_merged_ones_still_has_its_difference(tmp_path) -> None:
    run = adapted_run(tmp_path / "run", TASKS)
    write_merged(RunDir.open(run), [Merged("000-C-STANCE+1", (0, 1), 3)])
    found = measure(run, None, quiet)
    whole = changes(TASKS)
    assert found.places == (3,)
    assert found.norm == pytest.approx([float((whole[3] - whole[2]).norm())], rel=1e-6)


def test_where_there_is_nothing_to_compare_the_notes_say_why(tmp_path) -> None:
    joint = measure(make_run(tmp_path / "joint", mode="joint"), None, quiet)
    assert (joint.names, joint.mean("collision")) == ((), None)
    assert "at once" in joint.notes[0]
    empty = measure(make_run(tmp_path / "none", learned=0), None, quiet)
    assert (empty.names, empty.notes) == ((), ("there is no LoRA adapter to compare",))


def test_weights_that_are_no_lora_are_named(tmp_path) -> None:
    more = [{**task, "weights.layers.0.norm": torch.ones(3)} for task in TASKS[:2]]
    found = measure(adapted_run(tmp_path / "run", more), None, quiet)
    assert found.notes == ("what was trained beside LoRA is not in it",)
    assert found.entries == ENTRIES


def test_adapters_that_do_nothing_are_not_called_free_of_collision(tmp_path) -> None:
    still = [
        {key: value * (".lora_A." in key) for key, value in task.items()} for task in TASKS[:2]
    ]
    found = measure(adapted_run(tmp_path / "run", still), None, quiet)
    assert (found.names, found.mean("collision")) == ((), None)
    assert found.notes == ("no LoRA adapter of the run changes anything",)


def test_progress_ends_at_what_there_is(tmp_path) -> None:
    told: list[tuple[str, int, int]] = []
    measure(adapted_run(tmp_path / "run", TASKS[:2]), None, lambda *step: told.append(step))
    assert ("adapters read", 2, 2) in told
    assert told[-1] == ("modules compared", 3, 3)


def test_means_are_over_tasks_and_over_pairs(found) -> None:
    assert found.mean("density") == pytest.approx(sum(found.density) / 4)
    for key in ("collision", "overlap", "cosine"):
        rows = getattr(found, key)
        values = [abs(rows[i][j]) for i in range(4) for j in range(i)]
        assert found.mean(key) == pytest.approx(sum(values) / 6)
    assert found.mean("cosine") > abs(sum(v for _, _, v in found.pairs("cosine")) / 6)


def test_json(report, found) -> None:
    one = document([report])["evidence"]
    json.dumps(one, allow_nan=False)
    assert one["tasks"] == list(found.names)
    assert one["collision"] == [list(row) for row in found.collision]
    assert [one["collision"][i][i] for i in range(4)] == one["density"]
    assert one["mean"]["overlap"] == found.mean("overlap")
    assert (one["part"], one["threshold"], one["entries"]) == ("difference", 0.1, ENTRIES)
    assert document([replace(report, evidence=None)])["evidence"] is None
    several = document([report, report])
    assert several["groups"][0]["evidence"]["nuclear"]["mean"] == found.mean("nuclear")


def test_csv(report, found) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table([report]))))
    tasks = {(r["task"], r["metric"]): r for r in rows if r["kind"] == "evidence"}
    assert len(tasks) == 4 * 3
    assert float(tasks["FOMC", "nuclear"]["score"]) == found.nuclear[1]
    pairs = {(r["task"], r["other"], r["metric"]): r for r in rows if r["kind"] == "evidence_pair"}
    assert len(pairs) == 6 * 3
    row = pairs["Py150", "FOMC", "cosine"]
    assert float(row["score"]) == found.cosine[3][1]
    assert (row["task_index"], row["other_index"], row["run"]) == ("4", "2", report.path)
    without = csv_table([replace(report, evidence=None)])
    assert {row["kind"] for row in csv.DictReader(io.StringIO(without))}.isdisjoint(
        {"evidence", "evidence_pair"}
    )


def test_latex(report, found) -> None:
    joint = replace(report, method="joint", origin="another", evidence=None)
    tables = checked(latex([report, joint]))
    assert len(tables) == 4
    tasks, pairs = tables[2:]
    assert tasks[0][:2] == ["Method", r"$\Delta$W"]
    of_tasks = [shown(key, found.mean(key)) for key in ("density", "norm", "nuclear")]
    assert tasks[1:] == [["treelora", "difference", *of_tasks]]
    of_pairs = [shown(key, found.mean(key)) for key in ("collision", "overlap")]
    assert pairs[1:] == [["treelora", *of_pairs, f"{found.mean('cosine'):.3f}"]]
    assert len(checked(latex([joint]))) == 2


def test_html_shows_every_pair(report, found) -> None:
    page = html([report])
    _Page(page)
    assert compared(found) in page
    for key in ("collision", "overlap", "cosine"):
        drawn = str(pairmap(found, key))
        assert drawn in page
        root = ElementTree.fromstring(drawn)
        assert EVIDENCE_HEADS[key] in root.get("aria-label")
        tips = re.findall(r"<g><title>(.*?)</title>", drawn)
        assert len(tips) == 6
        for i, j, value in found.pairs(key):
            wanted = f"{found.names[i]} and {found.names[j]}: {EVIDENCE_HEADS[key]} "
            assert any(tip.startswith(wanted + shown(key, value)) for tip in tips)


def test_colours_follow_the_size_of_the_number(found) -> None:
    rows = ((1.0, None), (-0.5, 1.0))
    drawn = str(pairmap(replace(found, names=("a", "b"), places=(0, 1), cosine=rows), "cosine"))
    assert re.findall(r'<rect [^>]*rx="3" class="(\w+)"', drawn) == ["h10"]
    assert ">-0.50</text>" in drawn


def test_a_pair_without_a_number_is_a_hole_and_a_dash(found) -> None:
    empty = replace(found, cosine=tuple((None,) * 4 for _ in range(4)))
    assert str(pairmap(empty, "cosine")).count('class="hole"') == 6
    assert empty.mean("cosine") is None
    assert "|cosine| —" in means_line(empty)


@pytest.mark.parametrize("write", [html, markdown, text], ids=["html", "md", "text"])
def test_pages_say_what_is_compared_and_print_the_numbers(report, found, write) -> None:
    plain = " ".join(write([report]).replace("\\", "").split())
    assert "the weight change after it less that after the task before it" in plain
    assert "above 0.1 of the root mean square" in plain
    assert "hold less than 1 % of its squared norm" in plain
    for key in ("density", "nuclear"):
        for value in getattr(found, key):
            assert shown(key, value) in plain
    if write is not html:
        for key in ("collision", "overlap", "cosine"):
            for _, _, value in found.pairs(key):
                assert shown(key, value) in plain
    assert "weight change" not in write([replace(report, evidence=None)])


@pytest.mark.parametrize("write", [html, markdown, text], ids=["html", "md", "text"])
def test_compared_runs_have_a_table_of_means(report, found, write) -> None:
    own = replace(found, part="own")
    own = replace(report, method="per-task", origin="another", evidence=own)
    page = write([report, own])
    plain = re.sub(r"<[^>]+>|\||\\", " ", page)
    for method, part in (("treelora", "difference"), ("per-task", "own")):
        cells = [shown(key, found.mean(key)) for key in ("density", "norm", "nuclear")]
        assert re.search(rf"{method}\s+{part}\s+" + r"\s+".join(map(re.escape, cells)), plain)
    assert "What the tasks added" not in write([replace(report, evidence=None)] * 2)


def test_means_over_seeds_have_a_deviation(report, found) -> None:
    twice = replace(found, nuclear=tuple(value + 10 for value in found.nuclear))
    other = replace(report, seed=2, path="other", evidence=twice)
    (group,) = document([report, other])["groups"]
    assert group["evidence"]["nuclear"] == {
        "mean": pytest.approx(found.mean("nuclear") + 5),
        "std": pytest.approx(50**0.5),
        "n": 2,
    }
    printed = f"{shown('nuclear', found.mean('nuclear') + 5)} ± 7.071"
    for write in (html, markdown, text):
        assert printed in write([report, other])
    assert printed.replace("±", r"$\pm$") in latex([report, other])


def test_text_fits_the_page(tmp_path) -> None:
    many = measured(adapted_run(tmp_path / "run", [factors(1, seed) for seed in range(16)]))
    for width in (80, 120):
        lines = text([many], width).splitlines()
        assert [line for line in lines if len(line) > width and "train-stream" not in line] == []
    assert str(pairmap(many.evidence, "overlap")).count("<g><title>") == 16 * 15 // 2


def test_markdown_tables_have_one_width(report) -> None:
    for block in markdown([report]).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1, block


@pytest.mark.parametrize(
    ("key", "value", "printed"),
    [
        ("collision", 0.81234, "81.2"),
        ("collision", 0.012345, "1.23"),
        ("collision", 0.0, "0"),
        ("density", 1e-9, "<0.001"),
        ("cosine", 0.1234, "+0.123"),
        ("cosine", -0.00001, "0.000"),
        ("overlap", 1.0, "1.000"),
        ("nuclear", 123.0, "123.0"),
        ("norm", 12345.6, "12,346"),
        ("overlap", None, "—"),
    ],
)
def test_numbers_as_printed(key, value, printed) -> None:
    assert shown(key, value) == printed


@pytest.mark.parametrize(
    ("threshold", "said"),
    [(0.0, "where it is not 0."), (0.5, "less than 25 % of"), (2.0, "its task’s ΔW.")],
)
def test_the_threshold_is_explained(found, threshold, said) -> None:
    assert compared(replace(found, threshold=threshold)).partition(". ")[2].count(said) == 1


def test_the_matrix_is_drawn_as_ever(report) -> None:
    drawn = str(heatmap(report))
    assert drawn.count('class="frame"') == 4
    assert re.findall(r">(\d+)</text></g>", drawn) == ["100"]
