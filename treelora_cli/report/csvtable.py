"""The report as one CSV table in long form: one score or number in each row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from treelora_cli.report.evidence import PAIR_KEYS, TASK_KEYS
from treelora_cli.report.groups import Group, Spread, grouped
from treelora_cli.report.metrics import DEFINITIONS
from treelora_cli.report.model import Evidence, RunReport
from treelora_cli.report.scoring import ZERO_SHOT

COLUMNS = (
    "kind",
    "group",
    "run",
    "method",
    "model",
    "adapter",
    "decoding",
    "seed",
    "synthetic",
    "after_index",
    "after",
    "task_index",
    "task",
    "metric",
    "score",
    "std",
    "n",
    "rows",
    "other_index",
    "other",
)
"""``kind`` tells the rows apart:

- ``score``: R[after][task] of a run, 0-1; ``after_index`` 0 is zero shot. Cells that were not
  measured have no row.
- ``number``: a number of a run (``metric``: op, bwt, bwt_lopez_paz, forgetting, fwt).
- ``op_curve``: OP of a run after each task.
- ``group_number``, ``group_op_curve``, ``group_final``: the mean of a group of runs that differ
  only in the seed, its sample standard deviation ``std`` (empty for one run) and the number of
  runs ``n``; ``group_final`` is the final score on one task.
- ``evidence``: what a task added to the weights (``metric``: density, norm, nuclear), and
  ``evidence_pair``: how what two tasks added meets (collision, overlap, cosine), ``other`` being
  the earlier of the two. Only where evidence was asked for.
"""

# What spreadsheets take for the beginning of a formula, in both widths.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r")

Row = dict[str, str | int | float | None]


def csv_table(reports: Sequence[RunReport]) -> str:
    """Return the table; scores have all their digits and are not times 100.

    Args:
        reports: one run or several.
    """
    page = io.StringIO()
    writer = csv.DictWriter(page, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    groups = grouped(reports)
    names = {id(run): group.name for group in groups for run in group.runs}
    for report in reports:
        writer.writerows(map(_cells, _run(report, names[id(report)])))
    for group in groups:
        writer.writerows(map(_cells, _group(group)))
    return page.getvalue()


def harmless(text: str) -> str:
    """Put a quote before text that a spreadsheet would run as a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _cells(row: Row) -> dict[str, str]:
    return {
        column: harmless(value) if isinstance(value, str) else repr(value)
        for column, value in row.items()
        if value is not None
    }


def _shared(report: RunReport, synthetic: bool) -> Row:
    return {
        "method": report.method,
        "model": report.model,
        "adapter": report.mode,
        "decoding": report.decoding,
        "synthetic": "true" if synthetic else "false",
    }


def _after(report: RunReport, n: int) -> Row:
    """The place after the n-th task; 0 is before the first."""
    return {"after_index": n, "after": report.tasks[n - 1].name if n else ZERO_SHOT}


def _run(report: RunReport, group: str) -> Iterator[Row]:
    shared = _shared(report, report.synthetic)
    shared |= {"group": group, "run": report.path, "seed": report.seed}
    matrix = [tuple(task.zero_shot for task in report.tasks), *report.matrix]
    for n, scores in enumerate(matrix):
        for j, (task, score) in enumerate(zip(report.tasks, scores, strict=True), start=1):
            if score is not None:
                about: Row = {"task_index": j, "task": task.name, "metric": task.metric}
                about |= {"score": score, "rows": task.rows}
                yield {"kind": "score", **shared, **_after(report, n), **about}
    for n, op in enumerate(report.op_curve, start=1):
        if op is not None:
            about = {"metric": "op", "score": op}
            yield {"kind": "op_curve", **shared, **_after(report, n), **about}
    for key in DEFINITIONS:
        value = getattr(report, key)
        if value is not None:
            about = {"metric": key, "score": value}
            yield {"kind": "number", **shared, **_after(report, report.learned), **about}
    if report.evidence is not None:
        yield from ({**shared, **row} for row in _evidence(report.evidence))


def _evidence(evidence: Evidence) -> Iterator[Row]:
    for key in TASK_KEYS:
        for i, value in enumerate(getattr(evidence, key)):
            yield {"kind": "evidence", **_place(evidence, i), "metric": key, "score": value}
    for key in PAIR_KEYS:
        for i, j, value in evidence.pairs(key):
            about: Row = {**_place(evidence, i), "metric": key, "score": value}
            about |= {"other_index": evidence.places[j] + 1, "other": evidence.names[j]}
            yield {"kind": "evidence_pair", **about}


def _place(evidence: Evidence, i: int) -> Row:
    return {"task_index": evidence.places[i] + 1, "task": evidence.names[i]}


def _group(group: Group) -> Iterator[Row]:
    first = group.first
    shared: Row = {**_shared(first, group.synthetic), "group": group.name}

    def row(kind: str, value: Spread | None, n: int, about: Row) -> Iterator[Row]:
        if value is not None:
            found: Row = {"score": value.mean, "std": value.std, "n": value.n}
            yield {"kind": kind, **shared, **_after(first, n), **about, **found}

    for key in DEFINITIONS:
        yield from row("group_number", group.number(key), first.learned, {"metric": key})
    for n, op in enumerate(group.op_curve(), start=1):
        yield from row("group_op_curve", op, n, {"metric": "op"})
    for j, task in enumerate(first.tasks):
        about: Row = {"task_index": j + 1, "task": task.name, "metric": task.metric}
        yield from row("group_final", group.finals()[task.name], first.learned, about)
