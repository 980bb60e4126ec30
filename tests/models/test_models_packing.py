"""Packed rows: the same loss as padded ones, and models that would mix them are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import make_checkpoint

from treelora_cli.errors import UsageError
from treelora_cli.models import packing
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Example, collate, pack
from treelora_cli.models.forward import answer_loss
from treelora_cli.recipe import LoraSection, ModelSection


def adapted(
    folder: Path, attention: str = "auto", targets: str | tuple[str, ...] = "all-linear"
) -> AdaptedModel:
    section = ModelSection(name=str(folder), device="cpu", attention=attention)
    return AdaptedModel(load_backbone(section), LoraSection(rank=2, targets=targets), 0)


EXAMPLES = [
    Example(tuple(range(5, 25)), 15, False),
    Example(tuple(range(90, 97)), 4, False),
    Example(tuple(range(40, 53)), 10, False),
]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2"])
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_packed_rows_have_the_loss_of_padded_ones(
    tmp_path: Path, family: str, attention: str
) -> None:
    model = adapted(make_checkpoint(tmp_path / family, family), attention)
    packing.require_packing(model)
    batch = pack(EXAMPLES, 0)
    assert batch.input_ids.shape == (1, 40)
    assert (batch.tokens, batch.answer_tokens) == (40, 11)
    with torch.no_grad():
        alone = sum(answer_loss(model, collate([example], 0)) for example in EXAMPLES)
        together = answer_loss(model, batch)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(("family", "targets"), [("bloom", "auto"), ("mamba", ("x_proj",))])
def test_a_model_that_would_mix_the_rows_is_refused(
    tmp_path: Path, family: str, targets: str | tuple[str, ...]
) -> None:
    model = adapted(make_checkpoint(tmp_path / family, family), targets=targets)
    with pytest.raises(UsageError, match="would mix the rows") as raised:
        packing.require_packing(model)
    assert "packing=false" in raised.value.hint


def test_the_check_would_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that run on through the sequence make one row of it: the check must object."""
    model = adapted(make_checkpoint(tmp_path / "llama"))

    def running_on(examples: list[Example], pad: int) -> object:
        batch = pack(examples, pad)
        batch.position_ids.copy_(torch.arange(batch.tokens))
        return batch

    monkeypatch.setattr(packing, "pack", running_on)
    with pytest.raises(UsageError, match="would mix"):
        packing.require_packing(model)
