"""Reading of Parquet and Arrow files, and of tables that the ``datasets`` library loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from treelora_cli.errors import DataError, EnvironmentProblem
from treelora_cli.tasks.jsonrows import Fields, NumberText, Record
from treelora_cli.tasks.problems import Place, Problems

Classes = dict[str, tuple[str, ...]]
"""Names of the classes by column, where a column holds class numbers."""

_BATCH = 1000


def pyarrow() -> Any:
    """Return the pyarrow module.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EnvironmentProblem(
            "Parquet and Arrow files need the package pyarrow, which is not installed",
            "pip install 'treelora[datasets]'",
        ) from error
    return pyarrow


def read_arrow(path: Path, problems: Problems) -> tuple[list[Record], Classes]:
    """Read a Parquet or Arrow file.

    Args:
        path: the file; anything but ``.parquet`` is taken for Arrow's stream or file format.
        problems: takes rows whose class number has no name.

    Returns:
        The rows, and the classes that the ``datasets`` library noted in the file.

    Raises:
        DataError: not a file of that kind.
        EnvironmentProblem: pyarrow is not installed.
    """
    arrow = pyarrow()
    if not path.is_file():
        found = "not a regular file" if path.exists() else "no such file"
        raise DataError(f"{path}: {found}", "give a file with rows")
    try:
        table = _open(arrow, path)
    except (arrow.ArrowException, OSError) as error:
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not {kind}: {reason}") from error
    classes = _classes_in(table.schema)
    batches = table.to_batches(max_chunksize=_BATCH)
    return rows_of((batch.to_pylist() for batch in batches), str(path), classes, problems), classes


def _open(arrow: Any, path: Path) -> Any:
    if path.suffix.lower() == ".parquet":
        # Not read_table: that one takes `key=value` folders above the file for columns.
        return arrow.parquet.ParquetFile(path).read()
    with arrow.memory_map(str(path)) as source:
        try:
            return arrow.ipc.open_file(source).read_all()
        except arrow.ArrowInvalid:
            source.seek(0)
            return arrow.ipc.open_stream(source).read_all()


def names_of(path: Path) -> list[str] | None:
    """Return the names of a Parquet file's columns; None where they cannot be had cheaply."""
    if path.suffix.lower() != ".parquet":
        return None
    try:
        return list(pyarrow().parquet.read_schema(path).names)
    except (EnvironmentProblem, OSError, ValueError):
        return None


def rows_of(
    batches: Iterable[list[dict[str, Any]]],
    file: str,
    classes: Mapping[str, tuple[str, ...]],
    problems: Problems,
) -> list[Record]:
    """Turn rows of Python values into records; class numbers become the names of the classes.

    Args:
        batches: lists of rows.
        file: what to call the source.
        classes: names by column.
        problems: takes rows whose class number has no name.
    """
    records: list[Record] = []
    for number, row in enumerate((row for batch in batches for row in batch), start=1):
        place = Place(file, number, lines=False)
        fields = Fields({name: _value(value) for name, value in row.items()})
        wrong = ""
        for column, names in classes.items():
            index = row.get(column)
            if index is None or index == -1:  # -1: the library's mark for "not labelled"
                fields[column] = None
            elif isinstance(index, int) and 0 <= index < len(names):
                fields[column] = names[index]
            else:
                wrong = f"{column}: found class {index}, expected one of {len(names)} classes"
        if wrong:
            problems.bad_row(place, "class without a name", wrong, fields)
        else:
            records.append(Record(place, fields))
    return records


def _value(value: Any) -> Any:
    """Numbers become the text they are written as; not a number (pandas' gap) becomes None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return None if value != value else NumberText(repr(value))  # noqa: PLR0124 (NaN only)


def _classes_in(schema: Any) -> Classes:
    """Read the class names that the ``datasets`` library stores in a schema's metadata."""
    noted = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(noted)["info"]["features"] if noted else {}
        return {
            column: tuple(str(name) for name in feature["names"])
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError):
        return {}
