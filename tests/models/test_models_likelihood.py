"""Scores of labels: one sequence for all labels gives what each label gives alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import make_checkpoint

from treelora_cli.errors import UsageError
from treelora_cli.models import likelihood
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder
from treelora_cli.models.likelihood import choose_batches, score_batches, takes_label_masks
from treelora_cli.recipe import LoraSection, ModelSection

PROMPTS = ["a", "What is the colour of the sky? Answer:", "今天天气怎么样", "x" * 40, "Straße"]
LABELS = ["A", "no", "very negative", "red", "noon"]


def adapt(folder: Path, attention: str = "auto") -> AdaptedModel:
    section = ModelSection(name=str(folder), device="cpu", attention=attention)
    model = AdaptedModel(load_backbone(section), LoraSection(rank=4, targets="all-linear"), 0)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def brute_force(
    model: AdaptedModel, encoder: Encoder, prompt: str, separator: str, labels: list[str] = LABELS
) -> list[float]:
    """Each label behind the prompt, alone in a batch of one, as a training row reads."""
    found = []
    for label in labels:
        example = encoder.example(prompt, label, separator)
        with torch.no_grad():
            logits = model.peft(input_ids=torch.tensor([example.tokens]), use_cache=False).logits[0]
        chances = logits.float().log_softmax(-1)
        places = range(example.answer_start, len(example.tokens))
        found.append(sum(float(chances[at - 1, example.tokens[at]]) for at in places))
    return found


def scored(model: AdaptedModel, encoder: Encoder, separator: str, size: int) -> list[list[float]]:
    found: dict[int, torch.Tensor] = {}
    for batch in score_batches(model, encoder, PROMPTS, LABELS, separator, size):
        found |= batch
    return [found[row].tolist() for row in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("model_type", "attention", "together"),
    [
        ("llama", "auto", True),
        ("llama", "eager", True),
        ("qwen2", "auto", True),
        ("mistral", "auto", True),
        ("gemma2", "auto", True),
        ("gpt2", "auto", False),
    ],
)
def test_labels_together_score_as_alone(tmp_path, model_type, attention, together) -> None:
    model = adapt(make_checkpoint(tmp_path, model_type), attention)
    encoder = Encoder(model.backbone.tokenizer, 80, 20)
    assert takes_label_masks(model.backbone.model, 150) is together
    expected = [brute_force(model, encoder, prompt, " ") for prompt in PROMPTS]
    for size in (1, 2, 5):
        torch.testing.assert_close(
            scored(model, encoder, " ", size), expected, rtol=1e-4, atol=1e-4
        )


def test_a_short_window_falls_back_to_one_row_a_label(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mistral")
    model = adapt(folder)
    model.backbone.model.config.sliding_window = 8
    assert not takes_label_masks(model.backbone.model, 9)
    encoder = Encoder(model.backbone.tokenizer, 80, 20)
    expected = [brute_force(model, encoder, prompt, "") for prompt in PROMPTS]
    torch.testing.assert_close(scored(model, encoder, "", 3), expected, rtol=1e-4, atol=1e-4)


def test_the_likeliest_label_is_chosen(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(tiny_model)
    encoder = Encoder(model.backbone.tokenizer, 80, 20)
    # No room for more than one row of logits at a time.
    monkeypatch.setattr(likelihood, "MOST_LOGITS", 1)
    said: dict[int, str] = {}
    labels = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    for batch in choose_batches(model, encoder, PROMPTS, labels, "", 4):
        assert len(batch) == 1
        said |= batch
    for row, prompt in enumerate(PROMPTS):
        scores = brute_force(model, encoder, prompt, "", labels)
        assert said[row] == labels[scores.index(max(scores))]
    assert len(set(said.values())) > 1


def test_labels_that_are_cut_to_the_same_are_refused(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    encoder = Encoder(model.backbone.tokenizer, 80, 1)
    with pytest.raises(UsageError, match="'no' and 'noon'"):
        next(choose_batches(model, encoder, PROMPTS, ["A", "no", "noon"], "", 4))
