"""Conditions: soft prompts made of the prompt go in before it, in training and in every answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import make_checkpoint, make_t5
from torch import Tensor
from torch.nn import functional

from treelora_cli.errors import UsageError
from treelora_cli.models import soft
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.condition import Condition
from treelora_cli.models.encode import Encoder, collate, pack
from treelora_cli.models.features import prompt_features
from treelora_cli.models.forward import answer_logits, answer_loss
from treelora_cli.models.generate import SharedPrefix, generate
from treelora_cli.models.likelihood import score_batches, takes_label_masks
from treelora_cli.models.packing import require_packing
from treelora_cli.models.soft import require_condition
from treelora_cli.recipe import DataSection, LoraSection, ModelSection

CAUSAL = {
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "bloom": {},
    "mistral": {"sliding_window": 24},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window": 24},
}
SIDED = ["t5", "marian"]
PROMPTS = [
    "a",
    "What is 1 + 1?",
    "今天天气怎么样",
    "x" * 30,
    "zz zz zz",
    "Say it now, please: A B C",
]
ROWS = list(zip(PROMPTS, ["b", "two, grün 红", "long " * 3, "q", "no", "A"], strict=True))
LABELS = ["A", "B", "no", "the longest"]
WIDTH = 3


class Prompted(Condition):
    """Soft prompts that depend on the prompt's tokens, and on nothing else of the batch."""

    def __init__(self, model: AdaptedModel, width: int = WIDTH) -> None:
        self.width = width
        self.model = model
        self.events: list[tuple[str, tuple[int, ...]]] = []
        table = model.backbone.model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(3)
        shape = (width, table.shape[1])
        self.base = torch.nn.Parameter(torch.randn(shape, generator=generator) * table.std().cpu())

    def read(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        self.events.append(("read", tuple(ids.shape)))
        if not self.width:
            return None
        real = mask.unsqueeze(2)
        # The place counts: what is read must come in order, wherever the padding stands.
        places = (mask.cumsum(1) * mask / mask.sum(1, keepdim=True).clamp(min=1)).unsqueeze(2)
        embedded = self.model.backbone.model.get_input_embeddings()(ids) * real * places
        mean = embedded.sum(1) / real.sum(1).clamp(min=1)
        return self.base * (1 + torch.tanh(20 * mean)).unsqueeze(1)

    @contextmanager
    def answering(self, ids: Tensor, mask: Tensor) -> Iterator[None]:
        self.events.append(("enter", tuple(ids.shape)))
        yield
        self.events.append(("leave", tuple(ids.shape)))


def adapt(folder: Path) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu"))
    model = AdaptedModel(backbone, LoraSection(rank=2, targets="all-linear"), 0)
    generator = torch.Generator().manual_seed(1)
    model.restore(
        {
            key: torch.randn(value.shape, generator=generator) * 0.1
            for key, value in model.snapshot().items()
        }
    )
    return model


def checkpoint(folder: Path, kind: str) -> Path:
    if kind in SIDED:
        return make_t5(folder, kind)
    return make_checkpoint(folder, kind, **CAUSAL[kind])


def encoder_of(model: AdaptedModel) -> Encoder:
    return Encoder(model.backbone.tokenizer, 100, 20, encodes=model.backbone.encodes)


@pytest.fixture(scope="module", params=[*CAUSAL, *SIDED])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return adapt(checkpoint(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> AdaptedModel:
    return adapt(tiny_model)


@pytest.fixture(params=["causal", "sided"])
def either(request: pytest.FixtureRequest, tiny_model: Path, tiny_t5: Path) -> AdaptedModel:
    return adapt(tiny_model if request.param == "causal" else tiny_t5)


def told(model: AdaptedModel, read: list[int], said: list[int]) -> Tensor:
    """Logits [said + 1, vocabulary] behind a prompt and the tokens said: one row, by hand."""
    assert isinstance(model.condition, Prompted)
    body, prompt = model.backbone.model, torch.tensor([read])
    table = body.get_input_embeddings()
    front = model.condition.read(prompt, torch.ones_like(prompt))
    assert front is not None
    if model.backbone.encodes:
        start = body.config.decoder_start_token_id
        inputs = {"decoder_input_ids": torch.tensor([[start, *said]])}
        embeds = torch.cat([front, table(prompt)], dim=1)
    else:
        inputs = {}
        embeds = torch.cat([front, table(torch.tensor([[*read, *said]]))], dim=1)
    logits: Tensor = model.peft(inputs_embeds=embeds, use_cache=False, **inputs).logits[0]
    return logits[-len(said) - 1 :]


def test_the_loss_and_its_gradient_are_those_by_hand(each: AdaptedModel) -> None:
    """Neither rows beside it nor padding nor answers decide anything of a row's soft prompt."""
    encoder = encoder_of(each)
    each.condition = condition = Prompted(each)
    examples = [encoder.example(*row, " ") for row in ROWS]
    expected = torch.zeros(())
    for example in examples:
        read, learned = (
            example.tokens[: example.answer_start],
            example.tokens[example.answer_start :],
        )
        logits = told(each, list(read), list(learned[:-1]))
        expected = expected + functional.cross_entropy(
            logits, torch.tensor(learned), reduction="sum"
        )
    for chosen in (examples, examples[3:]):  # a mask of positions, and positions filled up
        found = sum(answer_loss(each, collate([one], encoder.pad)) for one in chosen)
        torch.testing.assert_close(answer_loss(each, collate(chosen, encoder.pad)), found)
    loss = answer_loss(each, collate(examples, encoder.pad))
    torch.testing.assert_close(loss, expected)
    wanted = [condition.base, *each.parameters()]
    pairs = zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    )
    for mine, by_hand in pairs:
        scale = float(by_hand.abs().max())
        torch.testing.assert_close(mine, by_hand, rtol=1e-3, atol=1e-3 * max(scale, 1e-6))
    each.condition = None


def test_soft_prompts_get_their_gradient(either: AdaptedModel) -> None:
    """Against differences of the loss; T5's norms are in float32 whatever the rest is."""
    either.peft.double()
    either.condition = condition = Prompted(either)
    condition.base = torch.nn.Parameter(condition.base.double().detach())
    encoder = encoder_of(either)
    batch = collate([encoder.example(*row) for row in ROWS[:3]], encoder.pad)
    (gradient,) = torch.autograd.grad(answer_loss(either, batch).double(), condition.base)
    for place in ((0, 0), (1, 7), (2, 31)):
        ends = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                condition.base[place] += step
                ends.append(answer_logits(either, batch))
                condition.base[place] -= step
        losses = [functional.cross_entropy(e, batch.labels, reduction="sum") for e in ends]
        slope = float(losses[0] - losses[1]) / 2e-3
        assert float(gradient[place]) == pytest.approx(slope, rel=2e-2, abs=5e-3)
    assert float(gradient.abs().max()) > 0.1


def test_soft_prompts_change_the_logits_and_no_condition_none(either: AdaptedModel) -> None:
    encoder = encoder_of(either)
    batch = collate([encoder.example(*row) for row in ROWS], encoder.pad)
    with torch.no_grad():
        before = answer_logits(either, batch)
        either.condition = condition = Prompted(either)
        during = answer_logits(either, batch)
        condition.width = 0  # a condition that looks and gives nothing
        looked = answer_logits(either, batch)
        either.condition = None
    assert during.shape == before.shape
    assert float((during - before).abs().max()) > 1e-3
    assert looked.equal(before) and len(condition.events) == 2


def greedily(model: AdaptedModel, encoder: Encoder, prompt: str, longest: int) -> str:
    """One prompt, the whole read anew for every token, no cache."""
    read, said = encoder.prompt(prompt)[0], []
    while len(said) < longest and (not said or said[-1] != encoder.eos):
        with torch.no_grad():
            said.append(int(told(model, read, said)[-1].argmax()))
    text: str = model.backbone.tokenizer.decode(said, skip_special_tokens=True)
    return text


def test_answers_are_those_by_hand(each: AdaptedModel) -> None:
    encoder = encoder_of(each)
    each.condition = Prompted(each)
    expected = [greedily(each, encoder, prompt, 5) for prompt in PROMPTS]
    for size, tokens in ((1, None), (4, None), (6, 150)):
        assert generate(each, encoder, PROMPTS, 5, size, batch_tokens=tokens) == expected
    # This Marian says one thing over and over, whatever it is asked; what it reads shows in scores.
    assert len(set(expected)) > 1 or each.backbone.model.config.model_type == "marian"
    each.condition = None


def test_labels_score_as_by_hand(each: AdaptedModel) -> None:
    encoder = encoder_of(each)
    each.condition = Prompted(each)
    found: dict[int, Tensor] = {}
    for batch in score_batches(each, encoder, PROMPTS, LABELS, " ", 4):
        found |= batch
    for row, prompt in enumerate(PROMPTS):
        for number, label in enumerate(LABELS):
            example = encoder.example(prompt, label, " ")
            read, learned = (
                example.tokens[: example.answer_start],
                example.tokens[example.answer_start :],
            )
            with torch.no_grad():
                logits = told(each, list(read), list(learned[:-1]))
            expected = -functional.cross_entropy(logits, torch.tensor(learned), reduction="sum")
            torch.testing.assert_close(found[row][number], expected, rtol=1e-3, atol=1e-3)
    each.condition = None


def test_a_window_that_soft_tokens_fill_is_not_read_over(tmp_path: Path) -> None:
    """Labels share a sequence only where it fits the window, soft tokens counted."""
    model = adapt(make_checkpoint(tmp_path, "mistral", sliding_window=24))
    encoder = encoder_of(model)
    read = len(encoder.prompt("a" * 6)[0])
    behind = sum(len(encoder._ids(" " + label)) for label in LABELS)
    model.condition = Prompted(model, 22)
    assert takes_label_masks(model.backbone.model, read + behind)
    assert not takes_label_masks(model.backbone.model, read + behind + model.condition.width)
    together = next(score_batches(model, encoder, ["a" * 6], LABELS, " ", 1))[0]
    alone = [next(score_batches(model, encoder, ["a" * 6], [one], " ", 1))[0] for one in LABELS]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_every_batch_is_shown_once_and_enclosed(either: AdaptedModel) -> None:
    encoder = encoder_of(either)
    for width in (0, WIDTH):
        either.condition = condition = Prompted(either, width)
        condition.rows = 2
        generate(either, encoder, PROMPTS, 3, 6)
        list(score_batches(either, encoder, PROMPTS, LABELS, "", 6))
        kinds = [kind for kind, _ in condition.events]
        assert kinds == ["read", "enter", "leave"] * 6, "three batches of two rows, twice"
        assert all(shape[0] == 2 for _, shape in condition.events)


def test_the_same_soft_prompt_in_training_and_in_answering(either: AdaptedModel) -> None:
    encoder = encoder_of(either)
    given: list[Tensor] = []

    class Kept(Prompted):
        def read(self, ids: Tensor, mask: Tensor) -> Tensor | None:
            given.append(super().read(ids, mask))
            return given[-1]

    either.condition = Kept(either)
    rows = [encoder.example(prompt, answer) for prompt, answer in ROWS[:2]]
    with torch.no_grad():
        answer_logits(either, collate(rows, encoder.pad))
        generate(either, encoder, PROMPTS[:2], 1, 2)
        list(score_batches(either, encoder, PROMPTS[:2], LABELS, " ", 2))
    trained, generated, scored = given
    # Batches are longest first.
    torch.testing.assert_close(generated, trained.flip(0))
    torch.testing.assert_close(scored, trained.flip(0))
    assert float((trained[0] - trained[1]).abs().max()) > 1e-3


def test_the_shared_beginning_is_not_kept(plain: AdaptedModel) -> None:
    tokens = [[*range(5, 35), end] for end in (40, 41, 42)]
    assert SharedPrefix(plain, tokens).tokens
    plain.condition = Condition()
    assert SharedPrefix(plain, tokens).tokens == []
    plain.condition = None


def test_the_base_alone_knows_no_condition(plain: AdaptedModel) -> None:
    encoder = encoder_of(plain)
    features = prompt_features(plain, encoder, PROMPTS)
    base = generate(plain, encoder, PROMPTS, 4, 3, adapters=[None] * 6)
    plain.condition = condition = Prompted(plain)
    assert prompt_features(plain, encoder, PROMPTS).equal(features)
    who = [plain.live, None] * 3
    with pytest.raises(ValueError, match="as_base"):
        generate(plain, encoder, PROMPTS, 4, 3, adapters=who)
    with pytest.raises(ValueError, match="as_base"):
        next(score_batches(plain, encoder, PROMPTS, LABELS, "", 3, adapters=who))
    with plain.as_base():
        assert generate(plain, encoder, PROMPTS, 4, 3) == base
    assert condition.events == []
    plain.condition = None


def test_packed_rows_have_no_prompts_to_look_at(plain: AdaptedModel) -> None:
    encoder = encoder_of(plain)
    rows = [encoder.example(*row) for row in ROWS[:2]]
    data = DataSection(max_prompt_tokens=9, max_answer_tokens=9)
    require_packing(plain)
    require_condition(plain, data, packing=True)
    plain.condition = Prompted(plain)
    for ask in (
        lambda: answer_loss(plain, pack(rows, encoder.pad)),
        lambda: require_condition(plain, data, packing=True),
    ):
        with pytest.raises(UsageError, match=r"optim\.packing"):
            ask()
    plain.condition = None


def test_soft_tokens_need_positions(plain: AdaptedModel, tiny_t5: Path) -> None:
    plain.condition = Prompted(plain, 40)
    room = 256 - 40 - (20 + 2)
    fits = DataSection(max_prompt_tokens=room, max_answer_tokens=20)
    require_condition(plain, fits)
    with pytest.raises(UsageError, match="40 soft tokens") as raised:
        require_condition(plain, fits.model_copy(update={"max_prompt_tokens": room + 1}))
    assert f"max_prompt_tokens={room}" in raised.value.hint
    plain.condition = None
    boundless = adapt(tiny_t5)
    boundless.condition = Prompted(boundless, 40)
    require_condition(boundless, fits)


def test_a_model_that_reads_more_than_embeddings_is_refused(
    plain: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSection(max_prompt_tokens=9, max_answer_tokens=9)
    plain.condition = Prompted(plain)
    require_condition(plain, data)
    real = soft.embed
    monkeypatch.setattr(soft, "embed", lambda model, ids: 2 * real(model, ids))
    with pytest.raises(UsageError, match="does not take soft prompts"):
        require_condition(plain, data)
    plain.condition = None
