"""Small data folders written on the spot, and the real ones where they are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., Path]

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def real_data() -> Path:
    """The folder of real task data; the test is skipped where it is absent."""
    if not (REAL / "manifest.json").exists():
        pytest.skip("the real task data are not beside the checkout")
    return REAL


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write one file below the test's folder: text, bytes, or rows as JSON."""

    def put(name: str, content: Any, *, pretty: bool = False) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_bytes(content.encode("utf-8"))
        elif name.endswith(".jsonl"):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in content]
            path.write_bytes("".join(lines).encode("utf-8"))
        elif pretty:
            path.write_bytes(json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8"))
        else:
            rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in content)
            path.write_bytes(f"[\n{rows}\n]\n".encode())
        return path

    return put


@pytest.fixture
def trace(write: Write) -> Callable[..., None]:
    """Write a TRACE task of a few rows under ``data/NAME``."""

    def put(
        name: str, *, rows: int = 4, answers: tuple[str, ...] = ("A", "B"), say: str = ""
    ) -> None:
        for split in ("train", "eval", "test"):
            write(
                f"data/{name}/{split}.json",
                [
                    {"prompt": f"{say}{name} {split} {at}:", "answer": answers[at % len(answers)]}
                    for at in range(rows)
                ],
            )

    return put
