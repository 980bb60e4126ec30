"""The tree as a readable JSON document and the signatures as named tensors.

A document carries no times and no paths, and numbers keep their shortest exact form, so the same
tree always gives the same bytes and reading it back gives the same tree.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora_cli.errors import RunDirError
from treelora_cli.tree.build import BLOCK_RULES
from treelora_cli.tree.nodes import GradientTree, Node
from treelora_cli.tree.signatures import SignatureBank
from treelora_cli.tree.splits import SPLITS

FORMAT = 1

# JSON integers may be larger than any float.
_LARGEST = sys.float_info.max

_SIGNATURES = "signatures.safetensors"
_HINT = "restore the file from a copy, or start the stream anew"


def to_document(
    tree: GradientTree, bank: SignatureBank, kind: str = "", factors: str = ""
) -> dict[str, Any]:
    """Return the tree's JSON document.

    Args:
        tree: the tree over the bank's tasks.
        bank: gives the names and the widths.
        kind: ``signature.kind`` of the recipe, for the reader.
        factors: ``signature.factors`` of the recipe, for the reader.
    """
    return {
        "format": FORMAT,
        "tasks": list(bank.names),
        "signature": {
            "kind": kind,
            "factors": factors,
            "blocks": bank.blocks,
            "widths": list(bank.widths),
        },
        "split": tree.split,
        "block_rule": tree.block_rule,
        "nodes": [_node_document(node) for node in tree.nodes],
    }


def from_document(document: object) -> GradientTree:
    """Return the tree of a JSON document.

    Raises:
        RunDirError: another format version, a missing or malformed field, a child or parent that
            does not fit (out of range, a cycle, a second parent), a task that occurs twice, is
            missing or is not in the list of tasks.
    """
    doc = _mapping(document, "the document")
    version = doc.get("format")
    if version != FORMAT or isinstance(version, bool):
        newer = isinstance(version, int) and version > FORMAT
        raise RunDirError(
            f"tree.json has format {version!r}, this version reads {FORMAT}",
            "update treelora" if newer else _HINT,
        )
    tasks = _list(doc.get("tasks"), "tasks")
    if not tasks or not all(isinstance(name, str) for name in tasks):
        raise _damaged("tasks must be a list of names")
    if len(set(tasks)) != len(tasks):
        raise _damaged("a task name occurs twice")
    split, rule = doc.get("split"), doc.get("block_rule")
    if split not in list(SPLITS) or rule not in BLOCK_RULES:
        raise _damaged(f"unknown split {split!r} or block_rule {rule!r}")
    blocks = _mapping(doc.get("signature"), "signature").get("blocks")
    raw = [_mapping(node, "a node") for node in _list(doc.get("nodes"), "nodes")]
    nodes = [_read_node(node, at) for at, node in enumerate(raw)]
    _check_links(nodes)
    _check_tasks(nodes, len(tasks))
    for node in nodes:
        if node.block is not None and not (isinstance(blocks, int) and node.block < blocks):
            raise _damaged(f"node {node.id} was cut by block {node.block} of {blocks}")
    return GradientTree.of_nodes(nodes, str(split), str(rule))


def to_tensors(bank: SignatureBank) -> dict[str, Tensor]:
    """Return the tensors of ``signatures.safetensors``: values, displacements and widths (int64).

    The names are in the tree's document.
    """
    return {
        "values": bank.values.contiguous(),
        "displacements": bank.displacements.contiguous(),
        "widths": torch.tensor(bank.widths, dtype=torch.int64),
    }


def from_tensors(tensors: Mapping[str, Tensor], names: Sequence[str]) -> SignatureBank:
    """Return the bank of what ``to_tensors`` gave.

    Args:
        tensors: ``values`` [N, F], ``displacements`` [N, D], ``widths`` [D].
        names: N task names, from the tree's document.

    Raises:
        RunDirError: a tensor is missing, of another shape or dtype, or not finite.
    """
    missing = {"values", "displacements", "widths"} - set(tensors)
    if missing:
        raise _damaged(f"it lacks {', '.join(sorted(missing))}", _SIGNATURES)
    for key in ("values", "displacements"):
        if not bool(torch.isfinite(tensors[key]).all()):
            raise _damaged(f"{key} holds values that are not finite", _SIGNATURES)
    try:
        widths = tuple(int(width) for width in tensors["widths"].tolist())
        return SignatureBank(tuple(names), tensors["values"], widths, tensors["displacements"])
    except (TypeError, ValueError) as cause:
        raise _damaged(str(cause), _SIGNATURES) from None


def _node_document(node: Node) -> dict[str, Any]:
    return {
        "id": node.id,
        "parent": node.parent,
        "children": list(node.children),
        "tasks": list(node.tasks),
        "depth": node.depth,
        "split": node.split,
        "block": node.block,
        "threshold": node.threshold,
        "radius": node.radius,
        "median": node.median,
        "spread": node.spread,
    }


def _read_node(node: Mapping[str, Any], at: int) -> Node:
    def whole(key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _damaged(f"node {at}: {key} must be a whole number, not {value!r}")
        return value

    def number(key: str) -> float:
        value = node.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _damaged(f"node {at}: {key} must be a number, not {value!r}")
        if not abs(value) <= _LARGEST:
            raise _damaged(f"node {at}: {key} is not a finite number")
        return float(value)

    if whole("id", node.get("id")) != at:
        raise _damaged(f"node {at} has id {node['id']}: ids must be 0, 1, 2, … in order")
    split, parent, block = node.get("split"), node.get("parent"), node.get("block")
    if split is not None and not isinstance(split, str):
        raise _damaged(f"node {at}: split must be a name, not {split!r}")
    children = tuple(whole("children", child) for child in _list(node.get("children"), "children"))
    return Node(
        id=at,
        parent=None if parent is None else whole("parent", parent),
        children=children,
        tasks=tuple(whole("tasks", task) for task in _list(node.get("tasks"), "tasks")),
        depth=whole("depth", node.get("depth")),
        split=split,
        block=None if block is None else whole("block", block),
        threshold=None if node.get("threshold") is None else number("threshold"),
        radius=number("radius"),
        median=number("median"),
        spread=number("spread"),
    )  # fmt: skip


def _check_links(nodes: list[Node]) -> None:
    """Check that the nodes are one binary tree in pre-order."""
    if not nodes:
        raise _damaged("there are no nodes")
    parents: dict[int, int] = {}
    for node in nodes:
        if len(node.children) not in (0, 2):
            raise _damaged(f"node {node.id} has {len(node.children)} children, not 0 or 2")
        for child in node.children:
            if child >= len(nodes):
                raise _damaged(f"node {node.id}: child {child} is out of range")
            if child <= node.id:
                raise _damaged(f"node {node.id}: child {child} closes a cycle")
            if child in parents:
                raise _damaged(f"node {child} has two parents, {parents[child]} and {node.id}")
            parents[child] = node.id
    for node in nodes:
        parent = parents.get(node.id)
        if parent is None and node.id != 0:
            raise _damaged(f"node {node.id} is no node's child")
        depth = 0 if parent is None else nodes[parent].depth + 1
        if (node.parent, node.depth) != (parent, depth):
            raise _damaged(f"node {node.id}: its parent or depth does not fit the children lists")
    _check_order(nodes)


def _check_order(nodes: list[Node]) -> None:
    pending, seen = [0], 0
    while pending:
        at = pending.pop()
        if at != seen:
            raise _damaged(f"node {at} is not in pre-order")
        seen += 1
        pending.extend(reversed(nodes[at].children))


def _check_tasks(nodes: list[Node], count: int) -> None:
    """Check that every task has one leaf and every node holds exactly its leaves' tasks."""
    held: list[set[int]] = [set() for _ in nodes]
    for node in reversed(nodes):
        if len(set(node.tasks)) != len(node.tasks):
            raise _damaged(f"node {node.id} lists a task twice")
        if max(node.tasks, default=0) >= count:
            raise _damaged(f"node {node.id}: task {max(node.tasks)} is not one of {count}")
        if node.children:
            left, right = (held[child] for child in node.children)
            if left & right:
                raise _damaged(f"task {min(left & right)} is on both sides of node {node.id}")
            held[node.id] = left | right
        elif len(node.tasks) != 1:
            raise _damaged(f"leaf {node.id} must hold one task, not {len(node.tasks)}")
        else:
            held[node.id] = set(node.tasks)
        if sorted(held[node.id]) != list(node.tasks):
            raise _damaged(f"node {node.id} does not list exactly the tasks of its leaves")
    missing = set(range(count)) - held[0]
    if missing:
        raise _damaged(f"task {min(missing)} is missing from the tree")


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _damaged(f"{what} must be an object")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _damaged(f"{what} must be a list")
    return value


def _damaged(what: str, file: str = "tree.json") -> RunDirError:
    return RunDirError(f"{file} is damaged: {what}", _HINT)
