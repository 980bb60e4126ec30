"""merged/merged.json: which tasks are answered for by one merged adapter, and which.

A merged adapter is a unit of its own, ``merged/NNN-NAME+K``: the first of its tasks and how many
more there are. It counts once merged.json names it; that file is replaced as a whole, so merging
two adapters is one step for every reader. Folders it does not name are leftovers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.errors import RunDirError
from treelora_cli.rundir.atomic import committed, ensure_dir, write_json
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.names import NAME
from treelora_cli.rundir.runinfo import RunInfo

FORMAT = 1
FACTS_FILE = "merged.json"
_UNIT = re.compile(rf"[0-9]{{3,}}-{NAME}\+[0-9]+")


@dataclass(frozen=True)
class Merged:
    """Tasks that one merged adapter answers for.

    Attributes:
        unit: the name of its folder in ``merged``.
        members: places of the tasks in the stream, ascending, at least two.
        after: the place of the task after which it was made.
    """

    unit: str
    members: tuple[int, ...]
    after: int


def unit_name(info: RunInfo, members: Sequence[int]) -> str:
    """Return the name of the unit of a group: never that of a group it grew from."""
    first = min(members)
    return f"{first:03d}-{info.tasks[first]['name']}+{len(members) - 1}"


def read_merged(run: RunDir) -> list[Merged]:
    """Return the merged groups, by their first members; none where nothing was merged.

    Raises:
        RunDirError: merged.json is damaged or of a newer format.
    """
    path = run.merged_json
    if not path.exists():
        return []
    document = read_json(path)
    version, groups = document.get("format"), document.get("groups")
    if isinstance(version, int) and version > FORMAT:
        raise RunDirError(f"{path} was created by a newer version of treelora", "upgrade treelora")
    if version != FORMAT or not isinstance(groups, list):
        raise _damaged(path, "it names no format or no groups")
    found = [_group(path, row, len(run.info.tasks)) for row in groups]
    members = [member for group in found for member in group.members]
    if len(set(members)) != len(members):
        raise _damaged(path, "a task is in two groups")
    return found


def write_merged(run: RunDir, groups: Sequence[Merged]) -> None:
    """Replace merged.json; from then on these groups count.

    Raises:
        EnvironmentProblem: the disk is full.
        RunDirError: another failure of the file system.
    """
    ensure_dir(run.merged)
    names = [entry["name"] for entry in run.info.tasks]
    rows = [
        {
            "unit": group.unit,
            "members": list(group.members),
            "names": [names[member] for member in group.members],
            "after": group.after,
        }
        for group in sorted(groups, key=lambda group: group.members)
    ]
    write_json(run.merged_json, {"format": FORMAT, "groups": rows})


def read_facts(run: RunDir, group: Merged) -> dict[str, Any]:
    """Return how a merged adapter came about: its ``members`` and its ``merges``, oldest first.

    Checksums are left alone: they would read the weights.

    Raises:
        RunDirError: the file is missing or damaged.
    """
    folder = run.merged_dir(group.unit)
    return read_json((committed(folder) or folder) / FACTS_FILE)


def _group(path: Path, row: Any, tasks: int) -> Merged:
    fields = row if isinstance(row, dict) else {}
    unit, members, after = fields.get("unit"), fields.get("members"), fields.get("after")
    if not isinstance(unit, str) or not _UNIT.fullmatch(unit):
        raise _damaged(path, f"{unit!r} is no merged adapter")
    places = members if isinstance(members, list) else []
    if not all(type(place) is int and 0 <= place < tasks for place in [*places, after]):
        raise _damaged(path, f"{unit} names a task that the run does not have")
    if len(places) < 2 or places != sorted(set(places)):
        raise _damaged(path, f"{unit} has no two members in their order")
    return Merged(unit, tuple(places), int(after or 0))


def _damaged(path: Path, reason: str) -> RunDirError:
    return RunDirError(f"{path} is damaged: {reason}", "restore it from a copy")
