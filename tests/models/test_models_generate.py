"""Answers: neither batches nor shared beginnings nor neighbours with other adapters change one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import SHARED, make_checkpoint

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import MOST_BESIDE, AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder
from treelora_cli.models.generate import SharedPrefix, generate, generate_batches
from treelora_cli.models.grouping import group_by_length
from treelora_cli.models.likelihood import choose_batches
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.models.spread import Spread
from treelora_cli.recipe import LoraSection, ModelSection

INSTRUCTION = "Which letter comes next? Say nothing else, please. "
PROMPTS = [
    INSTRUCTION + end for end in ("a", "What is 1 + 1?", "今天", "x" * 30, "zz zz", "Straße")
]
LONGEST = 6
LABELS = ["A", "B", "no"]


def adapt(folder: Path, **lora: object) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu"))
    model = AdaptedModel(backbone, LoraSection(**{"rank": 4, "targets": "all-linear", **lora}), 0)
    model.restore(noise(model, 1))
    return model


def noise(model: AdaptedModel, seed: int) -> Snapshot:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, generator=generator) * 0.5
        for key, value in model.snapshot().items()
    }


def encoder_of(model: AdaptedModel) -> Encoder:
    return Encoder(model.backbone.tokenizer, 120, 8)


def plain_greedy(model: AdaptedModel, encoder: Encoder, prompt: str) -> str:
    """One prompt, the whole sequence read anew for every token, no cache, no padding."""
    read = encoder.prompt(prompt)[0]
    ids = list(read)
    while len(ids) < len(read) + LONGEST and (len(ids) == len(read) or ids[-1] != encoder.eos):
        logits = model.peft(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return model.backbone.tokenizer.decode(ids[len(read) :], skip_special_tokens=True)


def by_label(model: AdaptedModel, encoder: Encoder, prompt: str) -> list[str]:
    return [
        said
        for batch in choose_batches(model, encoder, [prompt], LABELS, " ", 1)
        for said in batch.values()
    ]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> AdaptedModel:
    return adapt(tiny_model)


@pytest.mark.parametrize(
    ("model_type", "shares"),
    [("llama", True), ("qwen2", True), ("gpt2", True), ("mistral", False), ("gemma2", False)],
)
def test_every_way_matches_plain_greedy(tmp_path: Path, model_type: str, shares: bool) -> None:
    """Cached, padded, chunked, with the instruction read once; windowed models read all of it."""
    one = adapt(make_checkpoint(tmp_path, model_type))
    encoder = encoder_of(one)
    expected = [plain_greedy(one, encoder, prompt) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    shared = SharedPrefix(one, [encoder.prompt(prompt)[0] for prompt in PROMPTS])
    assert bool(shared.tokens) is shares
    for size, tokens in ((1, None), (4, None), (6, 150)):
        assert generate(one, encoder, PROMPTS, LONGEST, size, batch_tokens=tokens) == expected


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:2], [PROMPTS[0]] * 5, [], ["", "a", ""]])
def test_few_equal_and_empty_prompts(model: AdaptedModel, prompts: list[str]) -> None:
    encoder = encoder_of(model)
    expected = [plain_greedy(model, encoder, prompt) for prompt in prompts]
    assert generate(model, encoder, prompts, LONGEST, 3) == expected


def test_the_shared_beginning_leaves_every_prompt_a_token(model: AdaptedModel) -> None:
    ids = list(range(5, 35))
    assert SharedPrefix(model, [[*ids, 7], [*ids, 8], ids]).tokens == ids[:-1]
    assert SharedPrefix(model, [[*ids, 7], [*ids, 8], ids[:9]]).tokens == []


ADAPTERS = st.lists(st.sampled_from(["live", "base", "one", "two"]), min_size=6, max_size=6)


@settings(max_examples=8, deadline=None)
@given(
    size=st.integers(1, 7),
    tokens=st.sampled_from([None, 1, 100, 400]),
    who=ADAPTERS,
    start=st.sampled_from(["", INSTRUCTION]),
)
@example(size=4, tokens=None, who=["one", "base"] * 3, start=INSTRUCTION)
def test_batches_and_neighbours_change_nothing(model, size, tokens, who, start) -> None:
    """Rows of several adapters in a batch are answered as one by one, generated or by label."""
    encoder = encoder_of(model)
    prompts = [start + prompt.removeprefix(INSTRUCTION) for prompt in PROMPTS]
    stored = {"live": model.snapshot(), "one": noise(model, 2), "two": noise(model, 3)}
    expected: list[str] = []
    for name, prompt in zip(who, prompts, strict=True):
        if name == "base":
            with model.peft.disable_adapter():
                expected += generate(model, encoder, [prompt], LONGEST, 1)
                expected += by_label(model, encoder, prompt)
            continue
        model.restore(stored[name])
        expected += generate(model, encoder, [prompt], LONGEST, 1)
        expected += by_label(model, encoder, prompt)
    model.restore(stored["live"])
    with model.beside([stored["one"], stored["two"]]) as (one, two):
        slots = {"live": model.live, "base": None, "one": one, "two": two}
        rows = [slots[name] for name in who]
        said = generate(model, encoder, prompts, LONGEST, size, batch_tokens=tokens, adapters=rows)
        chosen: dict[int, str] = {}
        for batch in choose_batches(
            model, encoder, prompts, LABELS, " ", size, batch_tokens=tokens, adapters=rows
        ):
            chosen |= batch
    assert said == expected[::2]
    assert [chosen[row] for row in range(6)] == expected[1::2]


def test_adapters_beside_leave_no_trace(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    model.peft.train()
    # A method may freeze a part of the adapter; it must stay so when others come and go.
    for _, parameter in model.named_factors("A"):
        parameter.requires_grad_(False)

    def state() -> tuple[object, ...]:
        named = {name: p.requires_grad for name, p in model.peft.named_parameters()}
        return named, model.peft.active_adapters, list(model.peft.peft_config), model.peft.training

    before, random, live = state(), torch.get_rng_state(), model.snapshot()
    with model.beside([noise(model, 5), noise(model, 6)]) as names:
        assert names == ["t001", "t002"]
        assert len(list(model.peft.parameters())) > len(before[0])
        assert len(model.parameters()) == len(model.named_factors("B"))
    assert state() == before
    assert torch.get_rng_state().equal(random)
    assert all(model.snapshot()[key].equal(value) for key, value in live.items())
    stranger = {**noise(model, 7), "another": torch.zeros(1)}
    with pytest.raises(UsageError, match="does not fit"), model.beside([live, stranger]):
        pass
    with pytest.raises(ValueError, match="at once"), model.beside([live] * (MOST_BESIDE + 1)):
        pass
    assert state() == before


@given(
    lengths=st.lists(st.integers(1, 40), max_size=30),
    rows=st.integers(1, 8),
    tokens=st.none() | st.integers(1, 200),
)
def test_groups_keep_within_the_budget(lengths, rows, tokens) -> None:
    groups = group_by_length(lengths, rows, tokens)
    assert sorted(at for group in groups for at in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[at] for at in group)
        assert len(group) == 1 or tokens is None or longest * len(group) <= tokens
        assert len(group) <= rows


@pytest.mark.realdata
def test_real_tasks_are_answered_as_one_by_one() -> None:
    """The real base on a few rows of all eight TRACE tasks, their instructions shared."""
    base, data = SHARED / "base", SHARED / "data" / "trace"
    if not base.is_dir() or not data.is_dir():
        pytest.skip("no real base or no real tasks beside the checkout")
    from treelora_cli.tasks.load import load_tasks

    names = sorted(folder.name for folder in data.iterdir() if folder.is_dir())
    model = adapt(base)
    encoder = Encoder(model.backbone.tokenizer, 192, 16, "middle")
    shared = 0
    for task in load_tasks(names, str(data)):
        prompts = [row.prompt for row in task.splits["test"][:5]]
        ids = [encoder.prompt(prompt)[0] for prompt in prompts]
        shared += bool(SharedPrefix(model, ids).tokens)
        one_by_one = [generate(model, encoder, [prompt], 8, 1)[0] for prompt in prompts]
        assert generate(model, encoder, prompts, 8, 3) == one_by_one, task.name
    assert shared >= 5


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_share_out_batches_and_meet_equally_often(model: AdaptedModel, size: int) -> None:
    """The answers are those of one process; where a process has no batch left it yields none."""
    encoder = encoder_of(model)
    alone = generate(model, encoder, PROMPTS, LONGEST, 2)
    chosen = [by_label(model, encoder, prompt)[0] for prompt in PROMPTS]
    generated = [
        list(generate_batches(model, encoder, PROMPTS, LONGEST, 2, spread=Spread(rank, size)))
        for rank in range(size)
    ]
    compared = [
        list(choose_batches(model, encoder, PROMPTS, LABELS, " ", 2, spread=Spread(rank, size)))
        for rank in range(size)
    ]
    for ranks, wanted in ((generated, alone), (compared, chosen)):
        assert len({len(batches) for batches in ranks}) == 1
        found = [pair for batches in ranks for batch in batches for pair in batch.items()]
        assert sorted(found) == list(enumerate(wanted))  # every prompt once
    busy = [sum(map(bool, batches)) for batches in generated]
    assert max(busy) - min(busy) <= 1
