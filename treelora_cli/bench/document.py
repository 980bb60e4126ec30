"""Measurements as tables, and the tables as JSON, Markdown or plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | None
Row = dict[str, Value]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table as a person reads it; JSON has the rows' own keys instead.

    An interval that is its value alone, for there was one measurement, is not shown.

    Attributes:
        title: its head, with the unit.
        keys: the row's entry, or three: a value and the ends of its interval.
        digits: digits after the point.
    """

    title: str
    keys: tuple[str, ...]
    digits: int = 1

    def cell(self, row: Row) -> str:
        """Return what stands in this column."""
        values = [row.get(key) for key in self.keys]
        if values[0] is None:
            return "–"
        value, *ends = values
        if all(end == value for end in ends):
            return self._shown(value)
        low, high = map(self._shown, ends)
        return f"{self._shown(value)} [{low}, {high}]"

    def _shown(self, value: Value) -> str:
        if isinstance(value, float):
            return f"{value:,.{self.digits}f}"
        return f"{value:,}" if isinstance(value, int) else str(value or "")


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        key: its name in the JSON document.
        title: what was measured, at what shape.
        columns: what is shown of the rows.
        rows: the measurements; units stand in the keys (``_ms``, ``_mb``).
        notes: what a reader has to know.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: list[Row]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part that was measured."""

    part: str
    about: str
    seconds: float
    tables: Sequence[Table]


@dataclass(frozen=True, slots=True)
class Document:
    """Everything one call of the benchmark measured.

    Attributes:
        machine: the class of machine, without a name of its own.
        settings: how it was measured.
        sections: the parts, in order.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    sections: list[Section] = field(default_factory=list)


def to_json(document: Document) -> dict[str, Any]:
    """Return plain JSON values: rows keep their keys and all their digits."""
    return {
        "kind": "bench",
        "machine": document.machine,
        "settings": document.settings,
        "parts": {
            section.part: {
                "about": section.about,
                "seconds": round(section.seconds, 3),
                "tables": {
                    table.key: {
                        "title": table.title,
                        "notes": list(table.notes),
                        "rows": table.rows,
                    }
                    for table in section.tables
                },
            }
            for section in document.sections
        },
    }


def markdown(document: Document) -> str:
    """Return Markdown to paste into a document; headings begin at level three."""
    lines = [_header(document), ""]
    for section in document.sections:
        lines += [f"### {section.part}", "", f"{section.about} ({section.seconds:.0f} s)", ""]
        for table in section.tables:
            lines += [f"**{table.title}**", "", *_markdown_table(table), ""]
            lines += [f"{note}\n" for note in table.notes]
    return "\n".join(lines).rstrip() + "\n"


def text(document: Document) -> str:
    """Return plain text with aligned columns."""
    lines = [_header(document), ""]
    for section in document.sections:
        lines += [f"{section.part}: {section.about} ({section.seconds:.0f} s)", ""]
        for table in section.tables:
            lines += [table.title, *_text_table(table), *table.notes, ""]
    return "\n".join(lines).rstrip() + "\n"


FORMS: dict[str, Callable[[Document], str]] = {"md": markdown, "text": text}


def _header(document: Document) -> str:
    machine = document.machine
    where = f"{machine['cpu']}, {machine['threads']} torch thread(s)"
    if machine["gpu"]:
        where = f"{machine['gpu']}, {where}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    quick = " Quick look: smallest shapes, few repetitions." if document.settings["quick"] else ""
    if document.settings["signatures"] == "real":
        return f"{where}; {versions}. Base: {document.settings['models']}; real tasks."
    return (
        f"{where}; {versions}. Models have random weights and the earlier tasks' signatures are "
        f"synthetic. Times are medians; a ratio is the median over pairs of runs side by side, "
        f"with its 95 % bootstrap interval (the range where there are fewer than six pairs).{quick}"
    )


def _cells(table: Table) -> list[list[str]]:
    return [[column.cell(row) for column in table.columns] for row in table.rows]


def _markdown_table(table: Table) -> list[str]:
    heads = [column.title for column in table.columns]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in _cells(table)]
    marks = ["---" if _is_words(table, column) else "---:" for column in table.columns]
    return [f"| {' | '.join(row)} |" for row in (heads, marks, *rows)]


def _text_table(table: Table) -> list[str]:
    heads = [column.title for column in table.columns]
    rows = [heads, *_cells(table)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(heads))]
    left = [_is_words(table, column) for column in table.columns]

    def line(row: list[str]) -> str:
        padded = (
            cell.ljust(width) if words else cell.rjust(width)
            for cell, width, words in zip(row, widths, left, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(row) for row in rows]


def _is_words(table: Table, column: Column) -> bool:
    return any(isinstance(row.get(column.keys[0]), str) for row in table.rows)
