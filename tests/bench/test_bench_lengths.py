"""Real lengths: what comes along, how it is counted, what it pads to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import SHARED

from treelora_cli.bench.data import head_share, padding
from treelora_cli.bench.lengths import ANSWER, PROMPT, SHIPPED, count, lengths_for, shipped, to_json
from treelora_cli.bench.shapes import LLAMA_1B, SMALL, SameRows, random_examples
from treelora_cli.engine.forwards import Forwards
from treelora_cli.models.encode import Encoder
from treelora_cli.recipe import OptimSection


def test_what_comes_along_is_twenty_rows_of_eight_tasks() -> None:
    lengths = shipped()
    assert [len(pairs) for pairs in lengths.tasks.values()] == [20] * 8
    assert len(lengths.take(20)) == 160
    assert lengths.take(1) == [pairs[0] for pairs in lengths.tasks.values()]
    assert all(1 < p <= PROMPT + 1 and 1 < a <= ANSWER + 1 for p, a in lengths.take(20))
    assert lengths_for(None, None) == lengths
    assert to_json(lengths) == json.loads(SHIPPED.read_text(encoding="utf-8"))


def test_own_rows_are_counted_as_training_reads_them(toy_data: Path, tiny_model: Path) -> None:
    from treelora_cli.models.backbone import load_tokenizer
    from treelora_cli.tasks.load import load_tasks

    lengths = count(toy_data, str(tiny_model), rows=12)
    assert sorted(lengths.tasks) == ["alpha", "beta", "delta", "gamma"]
    encoder = Encoder(load_tokenizer(str(tiny_model), {}), PROMPT, ANSWER)
    (task,) = load_tasks(["beta"], toy_data)
    rows = [encoder.example(row.prompt, row.answer, "") for row in task.splits["train"]]
    expected = sorted((row.answer_start, len(row.tokens) - row.answer_start) for row in rows)
    assert sorted(lengths.tasks["beta"]) == expected
    assert lengths_for(toy_data, str(tiny_model)).tasks != shipped().tasks


@pytest.mark.realdata
def test_what_comes_along_is_what_counting_gives() -> None:
    data, base = SHARED / "data" / "trace", SHARED / "base"
    if not data.is_dir() or not base.is_dir():
        pytest.skip("the real data or the tokenizer is not beside the checkout")
    assert count(data, str(base)).tasks == shipped().tasks


def test_padding_is_what_is_computed_and_not_read() -> None:
    examples = random_examples([(8, 2), (4, 1)], 100, 0)
    optim = OptimSection(micro_batch_size=2)
    forwards = Forwards(examples, SameRows(2, 1), optim, 0)
    assert padding(forwards, [0]) == pytest.approx(5 / 20)


def test_the_output_layers_share_of_a_model() -> None:
    # Parameters of Llama-3.2-1B: 262.7 M in the (tied) output layer, 973.1 M in the layers.
    assert head_share(LLAMA_1B) == pytest.approx(262.7 / (262.7 + 973.1), rel=1e-3)
    layer = 4 * 256 * 256 + 3 * 256 * 704
    assert head_share(SMALL) == pytest.approx(4096 * 256 / (4096 * 256 + 8 * layer))


def test_rows_of_random_tokens_hold_no_special_one() -> None:
    (row,) = random_examples([(2000, 50)], 10, 3)
    assert (row.answer_start, len(row.tokens)) == (2000, 2050)
    assert set(row.tokens) == set(range(3, 10))
    assert torch.tensor(row.tokens).unique().numel() == 7
