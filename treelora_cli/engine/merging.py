"""Fewer adapters than tasks: the two that change the weights most alike become one.

Alike is the Frobenius distance of their changes s B A over all modules, not that over their norms:
what a task loses when it answers through the merged adapter depends on how far that is from its own
weights. The merged adapter is the mean of the two changes, each counted with the tasks it stands
for, cut back to the rank. The newest task's adapter is left alone, for training goes on from it.

On disk every step leaves a run that reads either as before or as after: adapters stored as a
difference from one that is about to change are made dense; the merged adapter is committed; the
list of groups is replaced, which is the merge; the members' folders lose their adapters. What a
kill leaves undone after that is done by :func:`tidy`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from treelora_cli.engine.adapters import (
    ADAPTER,
    STORAGE,
    Place,
    load_adapter,
    load_adapters,
    load_config,
    recommit,
    storage_of,
    trained_places,
    write_adapter,
)
from treelora_cli.models.change import distances, mean_change, products
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.recipe import LoraSection
from treelora_cli.rundir import atomic, faults
from treelora_cli.rundir.files import LEFTOVER
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.merged import (
    FACTS_FILE,
    Merged,
    read_facts,
    read_merged,
    unit_name,
    write_merged,
)


@dataclass(frozen=True)
class Held:
    """One adapter and the tasks it answers for.

    Attributes:
        members: places of the tasks in the stream, ascending.
        snapshot: the adapter.
    """

    members: tuple[int, ...]
    snapshot: Snapshot


@dataclass(frozen=True)
class Joined:
    """One merge of two adapters.

    Attributes:
        sides: the tasks of the one and of the other.
        distance: ||s B_1 A_1 - s B_2 A_2||, Frobenius, over all modules.
        relative_distance: that, over the mean of the two norms.
        error: how far the weights that answer have moved: the root mean square, over the tasks, of
            the distance to the merged adapter, over that of the norms.
        cut: the part of it that the rank costs: the distance of the merged adapter to the mean
            change, over the norm of the mean.
    """

    sides: tuple[tuple[int, ...], tuple[int, ...]]
    distance: float
    relative_distance: float
    error: float
    cut: float

    @property
    def members(self) -> tuple[int, ...]:
        """The tasks of both sides, in stream order."""
        return tuple(sorted(self.sides[0] + self.sides[1]))

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Return JSON values with the tasks' names."""
        return {**asdict(self), "sides": [[names[m] for m in side] for side in self.sides]}


class Pool:
    """Adapters in memory, and the inner products of what they change.

    Args:
        held: at least one, by their first members.
        newest: the task whose adapter is merged last, when only one other is left.
        scale: s = alpha / rank.
    """

    def __init__(self, held: Sequence[Held], newest: int, scale: float) -> None:
        self.held = list(held)
        self._newest = newest
        self._square = scale * scale
        snapshots = [one.snapshot for one in self.held]
        self._gram = products(snapshots, snapshots) * self._square

    def closest(self) -> tuple[int, int]:
        """Return which two to merge next, ties to the earlier ones; at least two are held."""
        away = distances(self._gram)
        movable = [
            i
            for i, one in enumerate(self.held)
            if len(self.held) == 2 or self._newest not in one.members
        ]
        pairs = ((i, j) for i in movable for j in movable if i < j)
        return min(pairs, key=lambda pair: (float(away[pair]), pair))

    def join(self) -> Joined:
        """Merge the two closest adapters."""
        i, j = self.closest()
        first, second = self.held[i], self.held[j]
        counts = [len(first.members), len(second.members)]
        mean = mean_change([first.snapshot, second.snapshot], counts)
        row = products([mean], [*(one.snapshot for one in self.held), mean])[0] * self._square
        joined = _joined(first, second, self._gram[[i, j]][:, [i, j]], row[[i, j, -1]])
        self.held[i] = Held(joined.members, mean)
        self._gram[i, :] = self._gram[:, i] = row[:-1]
        self._gram[i, i] = row[-1]
        keep = [k for k in range(len(self.held)) if k != j]
        self._gram = self._gram[keep][:, keep]
        del self.held[j]
        return joined


def _joined(first: Held, second: Held, gram: torch.Tensor, with_mean: torch.Tensor) -> Joined:
    """Compute the facts of a merge.

    Args:
        first: one side.
        second: the other side.
        gram: [2, 2], their inner products.
        with_mean: [3], the merged adapter's with each of them and with itself.
    """
    (a, ab), (_, b) = gram.tolist()
    with_a, with_b, merged = with_mean.tolist()
    share = len(first.members) / (len(first.members) + len(second.members))
    rest = 1 - share
    mean = share * share * a + 2 * share * rest * ab + rest * rest * b
    lost = merged - 2 * (share * with_a + rest * with_b) + mean
    moved = share * (a - 2 * with_a + merged) + rest * (b - 2 * with_b + merged)
    distance = math.sqrt(max(0.0, a + b - 2 * ab))
    norms = (math.sqrt(max(0.0, a)) + math.sqrt(max(0.0, b))) / 2
    return Joined(
        (first.members, second.members),
        distance,
        distance / norms if norms else 0.0,
        _ratio(moved, share * a + rest * b),
        _ratio(lost, mean),
    )


def _ratio(square: float, of: float) -> float:
    return math.sqrt(max(0.0, square) / of) if of > 0 else 0.0


def scale_of(lora: LoraSection) -> float:
    """Return s, by which PEFT multiplies B A."""
    return lora.alpha / lora.rank


def load_pool(run: RunDir, scale: float) -> Pool:
    """Read the adapters of a run that has any, each once.

    Raises:
        RunDirError: a file is missing or not as it was written.
    """
    trained = trained_places(run)
    groups = {member: group.members for group in read_merged(run) for member in group.members}
    kept = [place for place in trained if groups.get(place[0], place)[0] == place[0]]
    held = [
        Held(groups.get(place[0], (place[0],)), snapshot)
        for place, snapshot in zip(kept, load_adapters(run, kept), strict=True)
    ]
    return Pool(held, trained[-1][0], scale)


def keep_to(run: RunDir, most: int, lora: LoraSection) -> list[Joined]:
    """Merge stored adapters until there are no more than ``most``, the newest one included.

    Args:
        run: the run directory; its lock is held.
        most: at least 2, since the newest adapter stays apart.
        lora: the run's ``lora`` section.

    Returns:
        What was merged, in order; nothing where there was no need.

    Raises:
        RunDirError: a file is missing or not as it was written.
    """
    tidy(run)
    groups = read_merged(run)
    count = len(trained_places(run)) - sum(len(group.members) - 1 for group in groups)
    if count <= most:
        return []
    pool = load_pool(run, scale_of(lora))
    done = []
    while len(pool.held) > most:
        joined = pool.join()
        merged = next(one for one in pool.held if one.members == joined.members)
        _commit(run, merged, joined)
        done.append(joined)
    return done


def _commit(run: RunDir, merged: Held, joined: Joined) -> None:
    """Put a merge on disk."""
    names = [entry["name"] for entry in run.info.tasks]
    trained = trained_places(run)
    members, after = merged.members, trained[-1][0]
    _free_dependants(run, trained, members)
    groups = read_merged(run)
    inside = [group for group in groups if set(group.members) <= set(members)]
    before = [one for group in inside for one in read_facts(run, group)["merges"]]
    unit = unit_name(run.info, members)
    with atomic.commit_dir(run.merged_dir(unit)) as folder:
        config = load_config(run, members[0], names[members[0]])
        write_adapter(folder / ADAPTER, config, merged.snapshot)
        merges = [*before, {"after": names[after], **joined.to_json(names)}]
        document = {"members": [names[member] for member in members], "merges": merges}
        atomic.write_json(folder / FACTS_FILE, document)
    faults.hit("merge.committed")
    others = [group for group in groups if group not in inside]
    write_merged(run, [*others, Merged(unit, members, after)])
    faults.hit("merge.switched")
    tidy(run)


def _free_dependants(run: RunDir, trained: Sequence[Place], members: Sequence[int]) -> None:
    """Make dense what is stored as a difference from an adapter that is about to change."""
    grouped = {member for group in read_merged(run) for member in group.members}
    for index, name in trained:
        storage = storage_of(run, index, name)
        if index in members or index in grouped or storage.get("form") != "delta":
            continue
        if set(storage["reference"]) & set(members):
            recommit(run, index, name, load_adapter(run, index, name), {})
            faults.hit("merge.freed")


def tidy(run: RunDir) -> None:
    """Finish the last merge: members' folders lose their adapters, former merged ones go.

    Nothing that is read changes by it.

    Args:
        run: the run directory; its lock is held.

    Raises:
        RunDirError: a folder is missing or not as it was written.
    """
    if not run.merged.is_dir():
        return
    names = [entry["name"] for entry in run.info.tasks]
    groups = read_merged(run)
    for group in groups:
        for member in group.members:
            place = (member, names[member])
            if storage_of(run, *place).get("merged_into") != group.unit:
                facts = {STORAGE: {"form": "merged", "merged_into": group.unit}}
                recommit(run, *place, None, facts)
                faults.hit("merge.member")
    units = {group.unit for group in groups}
    for path in sorted(run.merged.iterdir()):
        if path.is_dir() and path.name not in units and not LEFTOVER.fullmatch(path.name):
            atomic.discard(path)
