"""What changed in the gradient tree between two tasks of the stream.

Both trees are compared on the tasks they share. A task's company is the other shared tasks in the
smallest group of a tree that holds it together with any. A task has moved if its company changed,
so one that only got a new task beside it has not. A split is a group of shared tasks and the sides
it is parted into; a group that is parted by new tasks alone is no split of the shared ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
Sides = frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Moved:
    """A task that was learned before and stands beside others now; names in stream order.

    Attributes:
        task: its name.
        was_beside: its company in the earlier tree.
        is_beside: its company among all tasks of the later tree, new ones included.
    """

    task: str
    was_beside: tuple[str, ...]
    is_beside: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a group is cut.

    Attributes:
        sides: the shared tasks on each side, in stream order.
        block: the block whose signature decides; None where it is not recorded.
        threshold: where along it; None for a cut by task order.
    """

    sides: tuple[tuple[str, ...], ...]
    block: int | None
    threshold: float | None


@dataclass(frozen=True, slots=True)
class TreeDiff:
    """The difference of two trees.

    Attributes:
        new: tasks that only the later tree has, each with its company among all its tasks.
        moved: shared tasks whose company changed.
        gone: splits of shared tasks that only the earlier tree makes.
        made: those that only the later tree makes.
        recut: those that both make, at another block or threshold: before and after.
    """

    new: tuple[tuple[str, tuple[str, ...]], ...]
    moved: tuple[Moved, ...]
    gone: tuple[Cut, ...]
    made: tuple[Cut, ...]
    recut: tuple[tuple[Cut, Cut], ...]

    @property
    def other_block(self) -> list[tuple[Cut, Cut]]:
        """The recut splits that another block decides now."""
        return [(old, now) for old, now in self.recut if old.block != now.block]


def compare(before: Json, after: Json) -> TreeDiff:
    """Compare two tree documents that ``read_tree`` has checked.

    Args:
        before: the earlier tree.
        after: the later tree.
    """
    order: list[str] = [*after["tasks"]]
    shared = [name for name in before["tasks"] if name in set(order)]
    was, is_now = _company(before, shared), _company(after, shared)
    beside = _company(after, order)
    old, later = _cuts(before, shared), _cuts(after, shared)
    both = [(old[sides], cut) for sides, cut in later.items() if sides in old]
    return TreeDiff(
        new=tuple((name, beside[name]) for name in order if name not in set(shared)),
        moved=tuple(
            Moved(name, was[name], beside[name])
            for name in shared
            if set(was[name]) != set(is_now[name])
        ),
        gone=tuple(cut for sides, cut in old.items() if sides not in later),
        made=tuple(cut for sides, cut in later.items() if sides not in old),
        recut=tuple((cut, now) for cut, now in both if _place(cut) != _place(now)),
    )


def _company(tree: Json, among: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The company of each task ``among``, none but those counted; () for a task alone."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(among, ())
    # Pre-order: a smaller group comes after those that hold it.
    for members in _members(tree, among):
        if len(members) > 1:
            for name in members:
                found[name] = tuple(other for other in members if other != name)
    return found


def _members(tree: Json, among: Sequence[str]) -> list[tuple[str, ...]]:
    """The tasks ``among`` of each node, in their order there."""
    rank = {name: position for position, name in enumerate(among)}
    names = tree["tasks"]
    return [
        tuple(sorted({names[t] for t in node["tasks"] if names[t] in rank}, key=rank.__getitem__))
        for node in tree["nodes"]
    ]


def _cuts(tree: Json, shared: Sequence[str]) -> dict[Sides, Cut]:
    """The splits of the shared tasks, from the root on, by their sides without order."""
    members = _members(tree, shared)
    found: dict[Sides, Cut] = {}
    for node in tree["nodes"]:
        sides = tuple(members[child] for child in node["children"] if members[child])
        if len(sides) > 1:
            cut = Cut(sides, node.get("block"), node.get("threshold"))
            found[frozenset(sides)] = cut
    return found


def _place(cut: Cut) -> tuple[int | None, float | None]:
    return cut.block, cut.threshold


def marks(diff: TreeDiff) -> dict[str, str]:
    """A note beside each task that is new or moved, for the text tree."""
    notes = {name: "+ new" for name, _ in diff.new}
    return notes | {moved.task: f"~ moved, {_was(moved)}" for moved in diff.moved}


def summary(diff: TreeDiff) -> list[str]:
    """The difference in lines: a count of all, then each change."""
    splits = len(diff.gone) + len(diff.made) + len(diff.recut)
    if not (diff.new or diff.moved or splits):
        return ["nothing changed: no task is new, none has moved, every split is the same"]
    lines = [
        f"{len(diff.new)} new, {len(diff.moved)} moved; splits of the earlier tasks: "
        f"{len(diff.gone)} gone, {len(diff.made)} made, {len(diff.recut)} cut elsewhere"
    ]
    lines += [f"+ {name}: {_beside('', company)}" for name, company in diff.new]
    lines += [
        f"~ {moved.task}: {_was(moved)}, {_beside('now ', moved.is_beside)}" for moved in diff.moved
    ]
    lines += [f"- split gone: {_sides(cut)}" for cut in diff.gone]
    lines += [f"+ split made: {_sides(cut)} ({_where(cut)})" for cut in diff.made]
    lines += [
        f"~ split at another block: {_sides(now)} ({_where(old)}, now {_where(now)})"
        for old, now in diff.other_block
    ]
    rest = len(diff.recut) - len(diff.other_block)
    if rest:
        plural = "split" if rest == 1 else "splits"
        lines.append(f"~ {rest} {plural} at the same block with another threshold (see --json)")
    return lines


def to_json(diff: TreeDiff, before: Json, after: Json) -> dict[str, Any]:
    """The difference and both trees as one document."""
    return {
        "new": [{"task": name, "beside": list(company)} for name, company in diff.new],
        "moved": [
            {
                "task": moved.task,
                "was_beside": list(moved.was_beside),
                "is_beside": list(moved.is_beside),
            }
            for moved in diff.moved
        ],
        "splits": {
            "gone": [_cut_json(cut) for cut in diff.gone],
            "made": [_cut_json(cut) for cut in diff.made],
            "recut": [
                {"before": _cut_json(old), "after": _cut_json(now)} for old, now in diff.recut
            ],
        },
        "tree_before": before,
        "tree_after": after,
    }


def _cut_json(cut: Cut) -> dict[str, Any]:
    sides = [list(side) for side in cut.sides]
    return {"sides": sides, "block": cut.block, "threshold": cut.threshold}


def _was(moved: Moved) -> str:
    return _beside("was ", moved.was_beside)


def _beside(when: str, company: Sequence[str]) -> str:
    return f"{when}beside {', '.join(company)}" if company else f"{when}alone"


def _sides(cut: Cut) -> str:
    return " | ".join(", ".join(side) for side in cut.sides)


def _where(cut: Cut) -> str:
    block = "no block" if cut.block is None else f"block {cut.block}"
    return f"{block} by task order" if cut.threshold is None else f"{block} at {cut.threshold:.3g}"
