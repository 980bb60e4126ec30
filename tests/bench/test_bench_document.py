"""Tables as JSON, Markdown and text."""

from __future__ import annotations

import json

from treelora_cli.bench.document import (
    Column,
    Document,
    Section,
    Table,
    markdown,
    text,
    to_json,
)

COLUMNS = (
    Column("method", ("method",)),
    Column("tasks", ("earlier",)),
    Column("ms", ("ms",), 2),
    Column("ratio", ("ratio", "low", "high"), 3),
)
ROWS = [
    {
        "method": "tree|lora",
        "earlier": 10_000,
        "ms": 1234.5678,
        "ratio": 1.02,
        "low": 1.0,
        "high": 1.1,
    },
    {"method": "plain", "earlier": None, "ms": 3.0, "ratio": None, "low": None, "high": None},
]


def document(quick: bool = False) -> Document:
    table = Table("short", "A shape", COLUMNS, ROWS, ("A note.",))
    machine = {
        "cpu": "Some CPU",
        "cores": 2,
        "threads": 1,
        "gpu": None,
        "versions": {"torch": "2", "peft": "0"},
    }
    return Document(
        machine,
        {"quick": quick, "signatures": "synthetic"},
        [Section("step", "What is compared", 12.3456, [table])],
    )


def test_json_keeps_keys_and_digits() -> None:
    made = json.loads(json.dumps(to_json(document()), allow_nan=False))
    assert made["kind"] == "bench"
    assert made["machine"]["cpu"] == "Some CPU"
    part = made["parts"]["step"]
    assert part["seconds"] == 12.346
    assert part["tables"]["short"]["rows"] == ROWS
    assert part["tables"]["short"]["notes"] == ["A note."]


def test_markdown_can_be_pasted() -> None:
    lines = markdown(document()).splitlines()
    assert "### step" in lines
    assert "| method | tasks | ms | ratio |" in lines
    assert "| --- | ---: | ---: | ---: |" in lines
    assert "| tree\\|lora | 10,000 | 1,234.57 | 1.020 [1.000, 1.100] |" in lines
    assert "| plain | – | 3.00 | – |" in lines


def test_one_measurement_has_no_interval() -> None:
    column = COLUMNS[3]
    assert column.cell({"ratio": 1.5, "low": 1.5, "high": 1.5}) == "1.500"
    assert column.cell({"ratio": 1.5, "low": 1.5, "high": 1.6}) == "1.500 [1.500, 1.600]"


def test_text_columns_stand_below_one_another() -> None:
    lines = text(document()).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("method"))
    head, one, other = lines[at : at + 3]
    assert head.index("ms") + 2 == one.index("1,234.57") + 8 == other.index("3.00") + 4


def test_every_form_says_what_is_synthetic_and_where() -> None:
    for form in (markdown, text):
        said = form(document())
        assert "Some CPU, 1 torch thread(s); torch 2, peft 0" in said
        assert "random weights" in said
        assert "synthetic" in said
        assert "Quick look" not in said
        assert "Quick look" in form(document(quick=True))
