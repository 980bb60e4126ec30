"""Collecting what is wrong with the rows, so that one run tells more than the first mistake.

A problem of one row can be an error, or the row can be left out and counted; a problem of a whole
file is always an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from treelora_cli.errors import DataError

MOST_SHOWN = 10

OnBadRow = Literal["error", "skip", "quarantine"]
"""What becomes of a row that cannot be used."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands.

    Attributes:
        file: path of the file, or name of the data set.
        number: line of the row's beginning, from 1; without lines the row's number.
        column: character within the line, from 1; 0 if not known.
        lines: False for formats without lines (Parquet, Arrow).
    """

    file: str
    number: int
    column: int = 0
    lines: bool = True

    def __str__(self) -> str:
        """Return ``file:line``, ``file:line:column`` or ``file: row number``."""
        if not self.lines:
            return f"{self.file}: row {self.number}"
        return f"{self.file}:{self.number}" + (f":{self.column}" if self.column else "")

    @property
    def sort_key(self) -> tuple[str, int]:
        """Places in the order of their files and rows."""
        return self.file, self.number


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out.

    Attributes:
        place: where it stands.
        reason: the kind of problem, for counting: ``answer: empty``.
        what: the field, what was found and what was expected.
        content: its fields, or its text where that is no JSON.
    """

    place: Place
    reason: str
    what: str
    content: object


class Problems:
    """A list of problems that becomes one ``DataError``.

    The count goes on after ``MOST_SHOWN`` problems; only the texts of the first are kept.

    Args:
        on_bad_row: ``error`` makes a bad row a problem; otherwise it goes to ``bad_rows``.
    """

    def __init__(self, on_bad_row: OnBadRow = "error") -> None:
        self._shown: list[str] = []
        self._hint = ""
        self._strict = on_bad_row == "error"
        self._bad_rows: dict[tuple[str, int], BadRow] = {}
        self._rows_are_bad = False
        self.count = 0

    def add(self, where: object, what: str, hint: str = "") -> None:
        """Note one problem.

        Args:
            where: ``file``, ``file:line`` or ``file:line:column``.
            what: the field, what was found and what was expected.
            hint: how to mend it; the first hint given is the one shown.
        """
        self.count += 1
        if len(self._shown) < MOST_SHOWN:
            self._shown.append(f"{where}: {what}")
        self._hint = self._hint or hint

    def bad_row(
        self, place: Place, reason: str, what: str, content: object, hint: str = ""
    ) -> None:
        """Note a row that cannot be used: as a problem, or as one to leave out.

        A row that is left out counts once, under the first reason given.

        Args:
            place: where it stands.
            reason: the kind of problem, in a few words.
            what: the field, what was found and what was expected.
            content: the row's fields, or its text.
            hint: how to mend it.
        """
        if self._strict:
            self._rows_are_bad = True
            self.add(place, what, hint)
        else:
            row = BadRow(place, reason, what, content)
            self._bad_rows.setdefault(place.sort_key, row)

    @property
    def bad_rows(self) -> tuple[BadRow, ...]:
        """The rows left out so far, in the order found."""
        return tuple(self._bad_rows.values())

    def __len__(self) -> int:
        return self.count

    def raise_if_any(self) -> None:
        """Raise what was collected.

        Raises:
            DataError: at least one problem was added.
        """
        if not self._shown:
            return
        lines = list(self._shown)
        if len(lines) > 1:
            cut = f", the first {len(lines)} of them" if self.count > len(lines) else ""
            lines = [f"{self.count} problems in the data{cut}:", *(f"  {line}" for line in lines)]
        way_out = "or leave bad rows out: treelora prepare --on-bad-row skip|quarantine"
        hints = [self._hint or "mend the rows", way_out] if self._rows_are_bad else [self._hint]
        raise DataError("\n".join(lines), "; ".join(hints))


def count_reasons(rows: Iterable[BadRow]) -> dict[str, int]:
    """Return the number of rows by reason, the commonest first."""
    counts = Counter(row.reason for row in rows)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
