from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_fixtures import cell

from treelora_cli.report import metrics

SCORE = st.floats(0, 1, allow_nan=False)


@st.composite
def full_matrices(draw):
    """(R, zero shot) with every cell measured, 1-7 tasks."""
    n = draw(st.integers(1, 7))
    R = draw(st.lists(st.lists(SCORE, min_size=n, max_size=n), min_size=n, max_size=n))
    return R, draw(st.lists(SCORE, min_size=n, max_size=n))


@given(full_matrices())
def test_numbers_equal_plain_loops_over_the_formulas(case):
    R, zero = case
    n = len(R)
    A = np.array(R)
    assert metrics.op(R) == pytest.approx(A[-1].mean())
    assert metrics.op_curve(R) == pytest.approx([A[i, : i + 1].mean() for i in range(n)])
    paper = sum(R[j][j] - R[n - 1][j] for j in range(n)) / n
    assert metrics.bwt(R) == pytest.approx(paper)
    if n == 1:
        assert metrics.bwt_lopez_paz(R) is None
        assert metrics.forgetting(R) is None
        assert metrics.fwt(R, zero) is None
        return
    lopez_paz = sum(R[n - 1][j] - R[j][j] for j in range(n - 1)) / (n - 1)
    assert metrics.bwt_lopez_paz(R) == pytest.approx(lopez_paz)
    chaudhry = 0.0
    for j in range(n - 1):
        best = -1.0
        for i in range(j, n - 1):
            best = max(best, R[i][j])
        chaudhry += best - R[n - 1][j]
    assert metrics.forgetting(R) == pytest.approx(chaudhry / (n - 1))
    forward = sum(R[j - 1][j] - zero[j] for j in range(1, n)) / (n - 1)
    assert metrics.fwt(R, zero) == pytest.approx(forward)


@given(full_matrices())
def test_both_signs_of_bwt_tell_the_same(case):
    R, _ = case
    n = len(R)
    if n > 1:
        assert metrics.bwt(R) == pytest.approx(-metrics.bwt_lopez_paz(R) * (n - 1) / n)


def test_positive_bwt_is_forgetting():
    R = [[0.9, 0.1], [0.5, 0.8]]
    assert metrics.bwt(R) == pytest.approx(0.2)
    assert metrics.bwt_lopez_paz(R) == pytest.approx(-0.4)
    assert metrics.forgetting(R) == pytest.approx(0.4)
    assert metrics.fwt(R, [0.3, 0.05]) == pytest.approx(0.05)


@settings(max_examples=300)
@given(full_matrices(), st.data())
def test_a_hole_makes_exactly_the_numbers_that_need_it_missing(case, data):
    R, zero = case
    n = len(R)
    i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    holed = [list(row) for row in R]
    holed[i][j] = None
    last, diagonal = i == n - 1, i == j
    before_last = j < n - 1
    assert (metrics.op(holed) is None) == last
    assert (metrics.bwt(holed) is None) == (last or diagonal)
    if n > 1:
        assert (metrics.bwt_lopez_paz(holed) is None) == (before_last and (last or diagonal))
        assert (metrics.forgetting(holed) is None) == (before_last and i >= j)
        assert (metrics.fwt(holed, zero) is None) == (j == i + 1)
    for row, op in enumerate(metrics.op_curve(holed)):
        assert (op is None) == (row == i and j <= i)


def test_no_tasks_have_no_numbers():
    assert metrics.op([]) is None
    assert metrics.bwt([]) is None
    assert metrics.forgetting([]) is None
    assert metrics.fwt([], []) is None
    assert metrics.op_curve([]) == []


def test_fwt_without_zero_shot_is_missing():
    assert metrics.fwt([[0.9, 0.1], [0.5, 0.8]], [0.3, None]) is None
    assert metrics.fwt([[0.9, 0.1], [0.5, 0.8]], [None, 0.05]) == pytest.approx(0.05)


NAMES = ["a", "b"]


def test_only_full_test_cells_of_the_mode_enter():
    cells = [
        cell("a", "a", 0.9),
        cell("a", "b", 0.1),
        cell("b", "a", 0.5),
        cell("b", "b", 0.8),
        cell("b", "b", 0.99, "own"),
        cell("b", "b", 0.98, "task:b"),
        cell("b", "b", 0.97, split="eval"),
        cell("b", "b", 0.96, limited=True, rows=8),
        cell("b", "b", 0.95, decoding="sample"),
        cell("elsewhere", "b", 0.94),
        cell("b", "elsewhere", 0.93),
        cell(None, "b", 0.2, "base"),
    ]
    assert metrics.matrix_from_scores(cells, NAMES, "latest") == [[0.9, 0.1], [0.5, 0.8]]
    assert metrics.matrix_from_scores(cells[::-1], NAMES, "latest") == [[0.9, 0.1], [0.5, 0.8]]


def test_limited_cells_alone_leave_every_place_empty():
    cells = [cell("a", "a", 0.9, limited=True)]
    assert metrics.matrix_from_scores(cells, ["a"], "latest") == [[None]]
    assert metrics.matrix_from_scores(cells, ["a"], "latest", limited=True) == [[0.9]]


def test_own_mode_repeats_the_tasks_own_score():
    cells = [cell("a", "a", 0.9, "own"), cell("b", "b", 0.8, "own"), cell("a", "b", 0.1)]
    R = metrics.matrix_from_scores(cells, NAMES, "own")
    assert R == [[0.9, None], [0.9, 0.8]]
    assert metrics.bwt(R) == 0


def test_own_mode_takes_a_score_measured_later():
    cells = [cell("b", "a", 0.7, "own"), cell("b", "b", 0.8, "own")]
    assert metrics.matrix_from_scores(cells, NAMES, "own") == [[0.7, None], [0.7, 0.8]]


def test_the_given_decoding_counts():
    cells = [cell("a", "a", 0.9), cell("a", "a", 0.7, decoding="sample")]
    assert metrics.matrix_from_scores(cells, ["a"], "latest", "sample") == [[0.7]]
    assert metrics.matrix_from_scores(cells, ["a"], "latest", "greedy") == [[0.9]]


def test_zero_shot_prefers_the_base_model():
    cells = [cell(None, "a", 0.3, "base"), cell(None, "a", 0.4, "latest")]
    assert metrics.zero_shot_from_scores(cells, NAMES) == [0.3, None]
    assert metrics.zero_shot_from_scores(cells[::-1], NAMES) == [0.3, None]


def test_most_common_decoding_is_stable():
    cells = [cell("a", "a", 0.1, decoding="x"), cell("a", "b", 0.1, decoding="b")]
    assert metrics.most_common_decoding(cells) == "b"
    assert metrics.most_common_decoding([]) is None


def test_every_number_has_a_definition():
    assert set(metrics.DEFINITIONS) == {"op", "bwt", "bwt_lopez_paz", "forgetting", "fwt"}


def test_a_merged_adapters_score_holds_from_its_merge_on():
    cells = [cell("a", "a", 0.9, "own"), cell("b", "b", 0.8, "own"), cell("c", "a", 0.4, "own")]
    R = metrics.matrix_from_scores(cells, ["a", "b", "c", "d"], "own")
    assert [row[0] for row in R] == [0.9, 0.9, 0.4, 0.4]
    assert [row[1] for row in R] == [None, 0.8, 0.8, 0.8]
