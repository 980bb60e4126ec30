"""Strict reading of CSV and TSV: every value stays the text it is in the file.

Libraries for tables guess types, and an answer ``1.50`` becomes ``1.5``; here nothing is guessed
but the delimiter.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from treelora_cli.tasks.jsonrows import Fields, Record, read_text
from treelora_cli.tasks.problems import Place, Problems

_DELIMITERS = ",;\t|"
_PEEK_BYTES = 1 << 16
_LONGEST_FIELD = 2**31 - 1


def read_csv(path: Path, problems: Problems) -> list[Record]:
    """Read the rows of a file whose first line names the columns (RFC 4180, UTF-8).

    Blank lines are passed over; quoted fields may hold delimiters and line ends.

    Args:
        path: the file; ``.tsv`` is cut at tabs, anything else at the delimiter of its first line.
        problems: takes rows with too many or too few fields, and files that are no CSV.

    Raises:
        DataError: the file cannot be read at all.
    """
    text = read_text(path)
    # The module's limit is one for all readers, and far below a long document.
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter(path, text), strict=True)
    header: list[str] | None = None
    records: list[Record] = []
    start = 1
    try:
        for row in rows:
            place, start = Place(str(path), start), rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
                _check_header(place, header, problems)
            else:
                _keep(place, header, row, records, problems)
    except csv.Error as error:
        problems.add(Place(str(path), start), f"not CSV: {error}", "close the quotes")
    else:
        if header is None:
            problems.add(path, "found an empty file, expected rows")
    return records


def delimiter(path: Path, text: str) -> str:
    """Return what stands between fields: the mark that cuts the first line into most of them."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    first = next((line for line in text.splitlines() if line.strip()), "")
    return max(_DELIMITERS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), ())))


def header_of(path: Path) -> list[str]:
    """Return the names of the columns without reading the whole file."""
    with path.open("rb") as stream:
        text = stream.read(_PEEK_BYTES).decode("utf-8-sig", errors="ignore")
    first = next((line for line in text.splitlines() if line.strip()), "")
    return next(csv.reader([first], delimiter=delimiter(path, text)), [])


def _check_header(place: Place, header: Sequence[str], problems: Problems) -> None:
    for name in sorted({name for name in header if header.count(name) > 1}):
        problems.add(place, f"columns: found {name!r} twice in the first line, expected once")


def _keep(
    place: Place, header: Sequence[str], row: list[str], records: list[Record], problems: Problems
) -> None:
    if len(row) != len(header):
        what = f"row: found {len(row)} fields, expected {len(header)} as in the first line"
        problems.bad_row(place, "wrong number of fields", what, row)
        return
    records.append(Record(place, Fields(zip(header, row, strict=True))))
