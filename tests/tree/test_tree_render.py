"""The text tree: what it shows, on terminals and in pipes, and without torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import tree_synthetic as synthetic
from rich.console import Console

from treelora_cli.tree.build import build_tree
from treelora_cli.tree.render import names_in_short, render
from treelora_cli.tree.serial import to_document


def shown(document: dict[str, Any], extra: dict[str, str] | None = None, **console: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=200, **console).print(render(document, extra))
    return out.getvalue()


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    bank = synthetic.clusters(0, n=6, groups=2).bank
    return to_document(build_tree(bank), bank)


def test_every_group_and_task_is_there(document: dict[str, Any]) -> None:
    text = shown(document)
    lines = text.splitlines()
    assert len(lines) == 11
    for node, line in zip(document["nodes"], lines, strict=True):
        if node["children"]:
            assert f"{len(node['tasks'])} tasks (" in line
            assert f"depth {node['depth']}, block {node['block']} at " in line
            assert f"radius {node['radius']:.3g}" in line
        else:
            assert line.endswith(document["tasks"][node["tasks"][0]])
        assert line.startswith(" " * 0 if node["depth"] == 0 else ("│", "├", "└", " "))


def test_notes_stand_beside_their_task_and_are_not_markup(document: dict[str, Any]) -> None:
    text = shown(document, {"T0002": "17 pulls [bold]"})
    assert "T0002  17 pulls [bold]" in text


def test_colour_only_where_it_is_wanted(document: dict[str, Any]) -> None:
    assert "\x1b" not in shown(document)
    assert "\x1b" in shown(document, force_terminal=True, color_system="truecolor", no_color=False)


def test_cut_by_index_has_no_threshold() -> None:
    bank = synthetic.bank_of(torch.zeros(2, 3), (3,))
    assert "block 0 by task order" in shown(to_document(build_tree(bank), bank))


def test_a_single_task_is_its_name() -> None:
    bank = synthetic.bank_of(torch.zeros(1, 3), (3,))
    assert shown(to_document(build_tree(bank), bank)).strip() == "T0000"


def test_long_lists_are_counted() -> None:
    names = [f"task-{i}" for i in range(100)]
    short = names_in_short(names, 30)
    assert short == "task-0, task-1, task-2, task-3 and 96 more"
    assert names_in_short(names[:3], 30) == "task-0, task-1, task-2"
    assert names_in_short(["x" * 50, "y", "z"], 30) == f"{'x' * 50} and 2 more"
    assert names_in_short(["x" * 50, "y" * 50], 30) == f"{'x' * 50}, {'y' * 50}"


def test_a_deep_chain_is_drawn() -> None:
    values = torch.tensor([[2.0**i] for i in range(30)])
    bank = synthetic.bank_of(values, (1,))
    assert len(shown(to_document(build_tree(bank, "official"), bank)).splitlines()) == 59


def test_rendering_needs_no_torch(document: dict[str, Any]) -> None:
    code = (
        "import json, sys; from treelora_cli.tree.render import render;"
        "render(json.load(sys.stdin));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], input=json.dumps(document).encode(), check=True)
