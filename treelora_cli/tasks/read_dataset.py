"""Reader of what the ``datasets`` library loads: hub ids, folders, ``save_to_disk``."""

from __future__ import annotations

from dataclasses import replace

from treelora_cli.tasks.columns import columns_of
from treelora_cli.tasks.hub import load_splits
from treelora_cli.tasks.problems import Problems
from treelora_cli.tasks.read_plain import assemble
from treelora_cli.tasks.source import SPLIT_NAMES, WHOLE, Loaded, TaskSource
from treelora_cli.tasks.tables import Table
from treelora_cli.tasks.types import SPLITS


def read(source: TaskSource, problems: Problems) -> Loaded | None:
    """Read one data set as a task; None where ``problems`` took something.

    A split without labels (hidden test answers) is passed over. Where only an evaluation split
    has answers beside the training rows, it becomes the test split.

    Args:
        source: a task whose ``dataset`` says what to load.
        problems: takes what is wrong with the rows.

    Raises:
        DataError: it cannot be loaded.
        EnvironmentProblem: the ``datasets`` library is not installed.
    """
    assert source.dataset is not None
    found, commit = load_splits(source.dataset, problems)
    notes: list[str] = []
    tables: dict[str, Table] = {}
    for name, table in found.items():
        split = next((split for split in SPLITS if name.lower() in SPLIT_NAMES[split]), None)
        if len(found) == 1:
            tables[WHOLE] = table
        elif split is None or split in tables:
            notes.append(f"{source.name}: split {name!r} is not used")
        elif split != "train" and not _labelled(table, source):
            notes.append(f"{source.name}: split {name!r} has no answers and is not used")
        else:
            tables[split] = table
    if set(tables) == {"train"}:
        tables = {WHOLE: tables["train"]}
    elif set(tables) == {"train", "eval"}:
        tables["test"] = tables.pop("eval")
        notes.append(f"{source.name}: no test split with answers, the evaluation split is the test")
    elif WHOLE not in tables and not {"train", "test"} <= set(tables):
        problems.add(
            source.dataset, f"found the splits {', '.join(found)}, expected train and test"
        )
        return None
    if commit and source.dataset.revision is None:
        notes.append(
            f"{source.name}: read at revision {commit}; name it to get the same rows again"
        )
    at = f" at {commit}" if commit else ""
    return assemble(replace(source, place=f"{source.place}{at}"), tables, problems, notes)


def _labelled(table: Table, source: TaskSource) -> bool:
    columns = source.columns or columns_of(table.columns())
    if columns is None or not columns.answer:
        return True
    return any(record.fields.get(columns.answer) is not None for record in table.records)
