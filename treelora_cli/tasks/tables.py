"""One way to the rows of a file, whatever its format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from treelora_cli.tasks import arrowrows, csvrows
from treelora_cli.tasks.jsonrows import Record, first_fields, read_records
from treelora_cli.tasks.problems import Problems

JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".parquet", ".arrow")
"""The formats of one file, by suffix in lower case."""


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one split.

    Attributes:
        place: the file or data set they came from.
        records: the rows.
        classes: names of classes by column, where the data give them.
    """

    place: str
    records: Sequence[Record]
    classes: arrowrows.Classes = field(default_factory=dict)

    def columns(self) -> list[str]:
        """Return the names that occur in any row, in the order of their first appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record.fields))


def read_table(path: Path, problems: Problems) -> Table:
    """Read a file of rows by its suffix: JSON, JSON lines, CSV, TSV, Parquet or Arrow.

    Args:
        path: the file.
        problems: takes what is wrong with its rows.

    Raises:
        DataError: the file cannot be read at all.
        EnvironmentProblem: Parquet or Arrow without the package that reads them.
    """
    suffix = path.suffix.lower()
    if suffix in {".csv", ".tsv"}:
        return Table(str(path), csvrows.read_csv(path, problems))
    if suffix in {".parquet", ".arrow"}:
        records, classes = arrowrows.read_arrow(path, problems)
        return Table(str(path), records, classes)
    return Table(str(path), read_records(path, problems))


def peek_columns(path: Path) -> list[str] | None:
    """Return the columns of a file without reading all of it; None where they are not known."""
    suffix = path.suffix.lower()
    if not path.is_file():
        return None
    if suffix in {".csv", ".tsv"}:
        return csvrows.header_of(path)
    if suffix in {".parquet", ".arrow"}:
        return arrowrows.names_of(path)
    fields = first_fields(path)
    return None if fields is None else list(fields)
