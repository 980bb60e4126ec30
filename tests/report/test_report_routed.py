"""OP and BWT where no task is named stand beside the run's own numbers, if they are whole."""

from __future__ import annotations

import pytest
from report_fixtures import cell, make_cells, make_run, names_for, score

from treelora_cli.report.collect import collect
from treelora_cli.report.document import document
from treelora_cli.report.html import html
from treelora_cli.report.markdown import markdown
from treelora_cli.report.text import text


@pytest.fixture
def run(tmp_path):
    names = names_for(3)
    cells = make_cells(names, 3, "own")
    for i in range(3):
        for j in range(i + 1):
            cells.append(cell(names[i], names[j], score(i, j) / 2, "route"))
    cells += [cell(names[2], name, 0.5, "route:stripped") for name in names]
    cells += [cell(names[2], name, 0.9, "route:0.5") for name in names[:2]]
    cells += [cell(names[2], name, 0.9, "route:0.7", limited=True, rows=5) for name in names]
    cells += [cell(names[2], name, 0.9, "route:0.8", decoding="likelihood") for name in names]
    return make_run(tmp_path / "run", mode="own", cells=cells)


def test_whole_rows_count_and_nothing_else(run) -> None:
    routed = {way.adapter: way for way in collect(run).routed}
    assert list(routed) == ["route", "route:stripped"]
    R = [[score(i, j) / 2 for j in range(3)] for i in range(3)]
    assert routed["route"].op == pytest.approx(sum(R[2]) / 3)
    assert routed["route"].bwt == pytest.approx(sum(R[j][j] - R[2][j] for j in range(3)) / 3)
    lopez_paz = sum(R[2][j] - R[j][j] for j in range(2)) / 2
    assert routed["route"].bwt_lopez_paz == pytest.approx(lopez_paz)
    assert routed["route:stripped"].op == pytest.approx(0.5)
    assert routed["route:stripped"].bwt is None


def test_every_format_says_them(run) -> None:
    report = collect(run)
    for page in (text([report]), markdown([report]), html([report])):
        assert "where no task is named: OP 50.00" in " ".join(page.split())
    assert [way["adapter"] for way in document([report])["routed"]] == ["route", "route:stripped"]


def test_a_run_that_was_not_routed_says_nothing(tmp_path) -> None:
    report = collect(make_run(tmp_path / "run"))
    assert report.routed == ()
    assert "no task is named" not in text([report])


def test_a_run_that_is_scored_by_routing_does_not_repeat_itself(tmp_path) -> None:
    names = names_for(3)
    cells = make_cells(names, 3, "route")
    cells += [cell(names[2], name, 0.5, "route:stripped") for name in names]
    report = collect(make_run(tmp_path / "run", mode="route", cells=cells))
    assert report.mode == "route"
    assert [way.adapter for way in report.routed] == ["route:stripped"]
