"""Documents and tensors: exact round trips, and damage that is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import tree_synthetic as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.errors import RunDirError
from treelora_cli.tree.build import build_tree, insert
from treelora_cli.tree.serial import from_document, from_tensors, to_document, to_tensors


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 15),
    split=st.sampled_from(("principal", "paper", "official")),
    rule=st.sampled_from(("spread", "index")),
    seed=st.integers(0, 10**6),
)
def test_round_trip_is_exact(n: int, split: str, rule: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    bank = synthetic.bank_of(torch.randn(n, 9, generator=rng), (2, 3, 4))
    tree = build_tree(bank, split, rule)
    text = json.dumps(to_document(tree, bank, "lora_a", "A"), allow_nan=False)
    read = from_document(json.loads(text))
    assert read == tree
    assert read.leaves == tree.leaves
    assert json.dumps(to_document(read, bank, "lora_a", "A"), allow_nan=False) == text


def test_a_grown_tree_round_trips() -> None:
    bank = synthetic.clusters(0, n=9, groups=3).bank
    tree = build_tree(bank)
    for i in range(9, 14):
        bank = bank.add(f"new{i}", bank.values[i - 9] + 0.1, torch.ones(8))
        tree = insert(tree, bank, i)
    assert from_document(json.loads(json.dumps(to_document(tree, bank)))) == tree


def test_the_document_is_what_was_agreed() -> None:
    bank = synthetic.bank_of(torch.tensor([[0.0, 0, 1], [1, 1, 1]]), (2, 1))
    document = to_document(build_tree(bank), bank, "lora_delta", "AB")
    assert document["format"] == 1
    assert document["tasks"] == ["T0000", "T0001"]
    assert document["signature"] == {
        "kind": "lora_delta", "factors": "AB", "blocks": 2, "widths": [2, 1],
    }  # fmt: skip
    assert (document["split"], document["block_rule"]) == ("principal", "spread")
    root, left, right = document["nodes"]
    assert (root["parent"], root["children"], root["tasks"]) == (None, [1, 2], [0, 1])
    assert (root["block"], root["depth"], root["threshold"]) == (0, 0, 0.0)
    assert root["radius"] == pytest.approx(0.5)
    assert (left["tasks"], right["tasks"], right["parent"]) == ([0], [1], 0)


def test_tensors_round_trip() -> None:
    bank = synthetic.clusters(0, n=5, groups=2).bank
    tensors = to_tensors(bank)
    read = from_tensors({key: value.clone() for key, value in tensors.items()}, bank.names)
    assert torch.equal(read.values, bank.values)
    assert torch.equal(read.displacements, bank.displacements)
    assert (read.names, read.widths) == (bank.names, bank.widths)


Damage = Callable[[dict[str, Any]], None]


def at(node: int, **fields: object) -> Damage:
    return lambda doc: doc["nodes"][node].update(fields)


def top(**fields: object) -> Damage:
    return lambda doc: doc.update(fields)


# A document of four tasks: 0 (1 (2 3) 4) or similar; what matters is named per case.
DAMAGES: list[tuple[str, Damage, str]] = [
    ("newer format", top(format=2), "format 2"),
    ("no format", lambda doc: doc.pop("format"), "format None"),
    ("format as truth", top(format=True), "format True"),
    ("radius beyond any float", at(0, radius=10**400), "not a finite number"),
    ("split as list", top(split=[]), "unknown split"),
    ("format as text", top(format="1"), "format '1'"),
    ("cycle to itself", at(1, children=[1, 2]), "closes a cycle"),
    ("cycle to the root", at(1, children=[0, 2]), "closes a cycle"),
    ("child out of range", at(0, children=[1, 99]), "child 99 is out of range"),
    ("negative child", at(0, children=[1, -1]), "whole number"),
    ("child as text", at(0, children=[1, "4"]), "whole number"),
    ("one child", at(0, children=[1]), "1 children"),
    ("two parents", at(1, children=[2, 4]), "two parents"),
    ("wrong parent", at(2, parent=0), "does not fit"),
    ("wrong depth", at(2, depth=7), "does not fit"),
    ("wrong id", at(2, id=3), "ids must be"),
    ("children swapped", lambda doc: doc["nodes"][0]["children"].reverse(), "pre-order"),
    ("task twice in a node", at(2, tasks=[0, 0]), "lists a task twice"),
    ("task unknown", at(2, tasks=[9]), "task 9 is not one of 4"),
    ("leaf without task", at(2, tasks=[]), "must hold one task"),
    ("leaf of two", at(2, tasks=[0, 1]), "must hold one task"),
    ("node lacks a task", at(0, tasks=[0, 1, 2]), "exactly the tasks of its leaves"),
    ("task list too long", lambda doc: doc["tasks"].append("more"), "task 4 is missing"),
    ("task name twice", top(tasks=["a", "b", "c", "a"]), "name occurs twice"),
    ("no tasks", top(tasks=[]), "list of names"),
    ("no nodes", top(nodes=[]), "no nodes"),
    ("nodes no list", top(nodes={}), "nodes must be a list"),
    ("node no object", lambda doc: doc["nodes"].__setitem__(1, 5), "a node must be an object"),
    ("node cut off", lambda doc: doc["nodes"].pop(), "out of range"),
    ("orphan", lambda doc: doc["nodes"].append({**doc["nodes"][-1], "id": 7}), "no node's child"),
    ("radius text", at(0, radius="big"), "radius must be a number"),
    ("radius missing", lambda doc: doc["nodes"][0].pop("radius"), "radius must be a number"),
    ("radius nan", at(0, radius=float("nan")), "not a finite number"),
    ("threshold infinite", at(0, threshold=float("inf")), "not a finite number"),
    ("block out of range", at(0, block=8), "block 8 of 8"),
    ("split unknown", top(split="median"), "unknown split"),
    ("split of a node", at(0, split=3), "split must be a name"),
    ("signature missing", lambda doc: doc.pop("signature"), "signature must be an object"),
]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    rows = torch.zeros(4, 256)
    rows[2:] += 10
    rows += torch.arange(4).unsqueeze(1) * 0.1
    bank = synthetic.bank_of(rows, (32,) * 8)
    made: dict[str, Any] = json.loads(json.dumps(to_document(build_tree(bank), bank)))
    assert [node["tasks"] for node in made["nodes"]] == [
        [0, 1, 2, 3], [0, 1], [0], [1], [2, 3], [2], [3],
    ]  # fmt: skip
    return made


@pytest.mark.parametrize(("damage", "says"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_damage_is_named(document: dict[str, Any], damage: Damage, says: str) -> None:
    broken = copy.deepcopy(document)
    damage(broken)
    with pytest.raises(RunDirError) as caught:
        from_document(broken)
    assert says in caught.value.message
    assert caught.value.hint
    from_document(document)


def test_task_on_both_sides(document: dict[str, Any]) -> None:
    broken = copy.deepcopy(document)
    for node in (3, 1):
        broken["nodes"][node]["tasks"] = [2] if node == 3 else [0, 2]
    with pytest.raises(RunDirError, match="task 2 is on both sides"):
        from_document(broken)


@pytest.mark.parametrize("nonsense", [None, 3, "tree", [], [1, 2]])
def test_what_is_no_object_is_refused(nonsense: object) -> None:
    with pytest.raises(RunDirError, match="must be an object"):
        from_document(nonsense)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.floats(allow_nan=True)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(node=st.integers(0, 6), data=st.data())
def test_any_field_replaced_by_anything_is_read_or_refused(node: int, data: st.DataObject) -> None:
    rows = torch.arange(4.0).unsqueeze(1) ** 2
    bank = synthetic.bank_of(rows, (1,))
    doc = to_document(build_tree(bank), bank)
    place = data.draw(st.sampled_from([doc, doc["signature"], doc["nodes"][node]]))
    key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(json_values)
    try:
        from_document(doc)
    except RunDirError as error:
        assert error.message


def test_damaged_tensors_are_named() -> None:
    bank = synthetic.clusters(0, n=3, groups=1).bank
    good = to_tensors(bank)
    broken = [
        ({key: good[key] for key in ("values", "widths")}, "lacks displacements"),
        ({**good, "values": good["values"][:, :-1]}, "values must be"),
        ({**good, "values": good["values"].double()}, "values must be"),
        ({**good, "displacements": good["displacements"][:2]}, "displacements must be"),
        ({**good, "widths": good["widths"] - 32}, "at least one entry"),
        ({**good, "widths": good["widths"].sum()}, "damaged"),
        ({**good, "values": good["values"] * float("nan")}, "not finite"),
    ]
    for tensors, says in broken:
        with pytest.raises(RunDirError, match=says) as caught:
            from_tensors(tensors, bank.names)
        assert "signatures.safetensors" in caught.value.message
    with pytest.raises(RunDirError):
        from_tensors(good, bank.names[:2])
