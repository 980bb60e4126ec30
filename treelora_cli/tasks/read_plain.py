"""Reader of plain tables: one file a task, or a folder with one file a split, in any format.

Columns are found by their names (``treelora_cli.tasks.columns``) or named by the user. One file is
split by a hash of its prompts; a missing evaluation split is taken from the training rows in the
same way. Both are reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from treelora_cli.tasks.columns import Columns, columns_of, expected_columns, row_of
from treelora_cli.tasks.problems import Problems
from treelora_cli.tasks.source import WHOLE, Loaded, TaskSource, build
from treelora_cli.tasks.tables import Table, read_table
from treelora_cli.tasks.types import Row

SPLIT_SEED = 1234
_SHARE = 0.1


def read(source: TaskSource, problems: Problems) -> Loaded | None:
    """Read one task; None where ``problems`` took something.

    Args:
        source: a task whose ``files`` name its splits (``eval`` may be missing) or one file
            under ``all``.
        problems: takes what is wrong with the rows.

    Raises:
        DataError: a file cannot be read at all.
        EnvironmentProblem: Parquet or Arrow without the package that reads them.
    """
    tables = {split: read_table(path, problems) for split, path in source.files.items()}
    return assemble(source, tables, problems, [])


def assemble(
    source: TaskSource, tables: Mapping[str, Table], problems: Problems, notes: Sequence[str]
) -> Loaded | None:
    """Make a task of tables; None where ``problems`` took something.

    Args:
        source: the task.
        tables: one for each split (``eval`` may be missing), or one under ``all``.
        problems: takes what is wrong with the rows.
        notes: what the reader has to say already.
    """
    before = len(problems)
    columns = _choose(source, tables, problems)
    if columns is None:
        return None
    read_rows: dict[str, tuple[Row, ...]] = {}
    cut = 0
    for split, table in tables.items():
        made = [row_of(record, columns, problems) for record in table.records]
        read_rows[split] = tuple(pair[0] for pair in made if pair is not None)
        cut += sum(pair[1] > 0 for pair in made if pair is not None)
        if not read_rows[split] and len(problems) == before:
            problems.add(table.place, "found no rows, expected at least one")
    splits, more = _three_splits(source, read_rows, problems)
    if len(problems) > before:
        return None
    if cut:
        more.append(
            f"{source.name}: {cut} conversations go on after the last assistant turn: cut there"
        )
    labels = next(
        (found for table in tables.values() if (found := table.classes.get(columns.answer))), None
    )
    return build(
        source, splits, mapped=str(columns), separator=None, labels=labels, notes=[*notes, *more]
    )


def _choose(source: TaskSource, tables: Mapping[str, Table], problems: Problems) -> Columns | None:
    """Return the columns to use, or None after noting that there are none."""
    filled = [table for table in tables.values() if table.records]
    if not filled:
        if not len(problems):
            problems.add(source.place, "found no rows, expected at least one")
        return None
    names = list(dict.fromkeys(name for table in filled for name in table.columns()))
    columns = source.columns or columns_of(names)
    if columns is not None and all(name in names for name in columns.needed):
        return columns
    listing = ", ".join(map(repr, names[:8]))
    wanted = " and ".join(columns.needed) if columns else f"one of {expected_columns()}"
    hint = "name them: treelora prepare --columns prompt=COLUMN,answer=COLUMN"
    what = f"columns: found {listing}; expected {wanted}"
    problems.add(filled[0].records[0].where, what, hint)
    return None


def _three_splits(
    source: TaskSource, read_rows: dict[str, tuple[Row, ...]], problems: Problems
) -> tuple[dict[str, tuple[Row, ...]], list[str]]:
    """Complete the splits: one file becomes three, a missing evaluation split is taken out."""
    name = source.name
    if WHOLE in read_rows:
        parts = split_by_hash(read_rows[WHOLE], ("test", "eval"))
        splits = {"train": parts["train"], "eval": parts["eval"], "test": parts["test"]}
        what = "one file, split"
    elif "eval" not in read_rows:
        parts = split_by_hash(read_rows["train"], ("eval",))
        splits = {"train": parts["train"], "eval": parts["eval"], "test": read_rows["test"]}
        what = "no evaluation file, training rows split"
    else:
        return dict(read_rows), []
    if not all(splits.values()) and not len(problems):
        rows = [row for part in splits.values() for row in part]
        problems.add(
            source.place,
            f"found {len(rows)} rows with {len({row.prompt for row in rows})} different prompts, "
            "too few to split",
            "give train, eval and test files of their own",
        )
    counts = ", ".join(f"{split} {len(rows)}" for split, rows in splits.items())
    return splits, [f"{name}: {what} by a hash of the prompts: {counts}"]


def split_by_hash(rows: Sequence[Row], held_out: Sequence[str]) -> dict[str, tuple[Row, ...]]:
    """Hold out a tenth of the distinct prompts for each name; the rest is ``train``.

    Prompts are ordered by a hash of their text, so neither the order of the rows nor the
    machine matters, and rows with the same prompt stay together. Rows keep their order.

    Args:
        rows: the rows to split.
        held_out: the names of the parts taken out of the training rows, in the order taken.
    """
    seed = f"{SPLIT_SEED}\n"
    prompts = sorted(
        {row.prompt for row in rows},
        key=lambda prompt: (hashlib.sha256((seed + prompt).encode("utf-8")).digest(), prompt),
    )
    share = max(1, round(len(prompts) * _SHARE))
    part: dict[str, str] = {}
    for index, name in enumerate(held_out):
        part.update(dict.fromkeys(prompts[index * share : (index + 1) * share], name))
    return {
        name: tuple(row for row in rows if part.get(row.prompt, "train") == name)
        for name in ("train", *held_out)
    }
