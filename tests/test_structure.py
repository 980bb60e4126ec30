"""The house: one direction of imports, small rooms, nothing unsafe, a quick start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "treelora_cli"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each row may import only rows below it (and itself).
ROWS = [
    {"cli"},
    {"bench", "report"},
    {"engine"},
    {"methods"},
    {"routing"},
    {"tree", "models", "tasks"},
    {"rundir"},
    {"recipe", "registry", "conversation"},
    {"errors"},
]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = room(path)
    if here in {"__init__", "__main__"}:
        return
    for module in imports(path):
        if not module.startswith("treelora_cli."):
            continue
        other = module.split(".")[1]
        if other == here:
            continue
        assert LEVEL[other] > LEVEL[here], f"{path} imports {module}"


@pytest.mark.parametrize("package", ["tree", "routing"])
def test_tree_and_routing_know_no_models(package: str) -> None:
    for path in (PACKAGE / package).glob("*.py"):
        assert not any("treelora_cli.models" in module for module in imports(path)), path
        roots = {module.split(".")[0] for module in imports(path)}
        assert not roots & {"transformers", "peft"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500, path
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 100, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_nothing_unsafe_is_read() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"torch.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"}
                for keyword in node.keywords:
                    if keyword.arg == "trust_remote_code":
                        assert isinstance(keyword.value, ast.Constant)
                        assert keyword.value.value is False, path
        assert not {module.split(".")[0] for module in imports(path)} & {"pickle", "dill"}, path


def test_the_command_line_starts_without_torch() -> None:
    code = (
        "import sys, treelora_cli.cli.app\n"
        "heavy = {'torch', 'transformers', 'peft', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported at start: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
