"""Encoder-decoders: what transformers computes row by row is what batches and labels give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TEXTS, make_t5
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedTokenizerFast

from treelora_cli.engine.batches import BatchPlan
from treelora_cli.engine.forwards import Forwards
from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import IGNORED, Encoder, Example, collate, pack, pad_prompts
from treelora_cli.models.features import HEAD, prompt_features, shorten
from treelora_cli.models.forward import answer_logits, answer_loss, answer_loss_of
from treelora_cli.models.generate import SharedPrefix, generate
from treelora_cli.models.grouping import group_by_sides
from treelora_cli.models.likelihood import choose_batches, score_batches
from treelora_cli.models.packing import require_packing
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.recipe import LoraSection, ModelSection, OptimSection

KINDS = {
    "t5": {"num_decoder_layers": 3},
    "mt5": {"decoder_start_token_id": 5},
    "umt5": {},
    "longt5": {"local_radius": 4},
    "marian": {"max_position_embeddings": 128, "decoder_start_token_id": 7},
}
INSTRUCTION = "Which letter comes next? Say nothing else, please. "
PROMPTS = ["a", "What is 1 + 1?", "今天天气怎么样", "x" * 50, "zz zz zz", INSTRUCTION + "Straße"]
ROWS = list(zip(PROMPTS, ["b", "two, grün 红", "long " * 5, "q", "no", "A"], strict=True))
LABELS = ["A", "B", "no", "the longest of them all"]


def noise(model: AdaptedModel, seed: int) -> Snapshot:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, generator=generator) * 0.1
        for key, value in model.snapshot().items()
    }


def adapt(folder: Path, **lora: object) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu"))
    model = AdaptedModel(backbone, LoraSection(**{"rank": 4, "targets": "all-linear", **lora}), 0)
    model.restore(noise(model, 1))
    return model


def encoder_of(model: AdaptedModel, prompt: int = 120, answer: int = 30) -> Encoder:
    return Encoder(model.backbone.tokenizer, prompt, answer, encodes=True)


def ids_of(model: AdaptedModel, text: str) -> list[int]:
    """What T5's own tokenizer gives: the text and the end token."""
    return list(model.backbone.tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def model(tiny_t5: Path) -> AdaptedModel:
    return adapt(tiny_t5)


@pytest.fixture(scope="module", params=KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    folder = tmp_path_factory.mktemp(request.param)
    return adapt(make_t5(folder, request.param, **KINDS[request.param]))


# --- text to tokens


def test_prompt_and_answer_are_what_the_tokenizer_gives_each(model: AdaptedModel) -> None:
    """No begin token, an end token behind either side, no separator between them."""
    encoder = encoder_of(model)
    for separator in ("", " ", "\n"):
        example = encoder.example("What is it?", "grün", separator)
        assert example.apart and not example.truncated
        assert example.sides == (example.answer_start, len(example.tokens) - example.answer_start)
        read, learned = (
            list(example.tokens[: example.answer_start]),
            list(example.tokens[example.answer_start :]),
        )
        assert read == ids_of(model, "What is it?") == encoder.prompt("What is it?")[0]
        assert learned == ids_of(model, "grün")
    assert encoder.example("a", " b", " ") == encoder.example("a", "b")
    assert ids_of(model, " b") != ids_of(model, "b"), "the white space would have been learned"


def test_a_begin_token_that_the_tokenizer_knows_is_not_read(tiny_model: Path) -> None:
    tokenizer = load_backbone(ModelSection(name=str(tiny_model), device="cpu")).tokenizer
    assert tokenizer.bos_token_id == 1
    bare = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert Encoder(tokenizer, 9, 9, encodes=True).prompt("a b") == ([*bare, 2], False)


@pytest.mark.parametrize("truncate", ["left", "middle"])
def test_what_is_cut_keeps_both_end_tokens(model: AdaptedModel, truncate: str) -> None:
    encoder = Encoder(model.backbone.tokenizer, 10, 3, truncate, encodes=True)
    example = encoder.example("abcdefghijklmnopqrstuvwxyz 0123456789", "one two three")
    assert example.truncated and example.sides == (11, 4)
    assert [at for at, token in enumerate(example.tokens) if token == 2] == [10, 14]
    whole = ids_of(model, "abcdefghijklmnopqrstuvwxyz 0123456789")[:-1]
    assert list(example.tokens[5:10]) == whole[-5:]
    assert list(example.tokens[:5]) == (whole[-10:-5] if truncate == "left" else whole[:5])


def test_an_answer_that_names_the_end_token_does_not_end_there(model: AdaptedModel) -> None:
    example = encoder_of(model).example("What ends a text?", "</s> does")
    learned = example.tokens[example.answer_start :]
    assert [at for at, token in enumerate(learned) if token == 2] == [len(learned) - 1]


def test_each_side_has_the_positions_for_itself(model: AdaptedModel) -> None:
    tokenizer = model.backbone.tokenizer
    Encoder(tokenizer, 127, 127, positions=128, encodes=True)
    for lengths, name in (((128, 9), "max_prompt_tokens"), ((9, 128), "max_answer_tokens")):
        with pytest.raises(UsageError, match=f"{name} 128") as raised:
            Encoder(tokenizer, *lengths, positions=128, encodes=True)
        assert f"{name}=127" in raised.value.hint


def test_chat_is_refused(model: AdaptedModel) -> None:
    with pytest.raises(UsageError, match="encoder-decoder") as raised:
        Encoder(model.backbone.tokenizer, 9, 9, chat=True, encodes=True)
    assert "data.format=plain" in raised.value.hint


def test_collate_pads_both_sides() -> None:
    batch = collate([Example((5, 6, 2, 9, 2), 3, False, True), Example((7, 2), 1, False, True)], 0)
    assert batch.input_ids.tolist() == [[5, 6, 2], [7, 0, 0]]
    assert batch.labels.tolist() == [9, 2, 2, IGNORED]
    assert batch.prompt_mask().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (batch.tokens, batch.answer_tokens, batch.kept) == (7, 3, None)
    moved = batch.to(torch.device("cpu"))
    assert moved.starts is not None and moved.starts.tolist() == [3, 1]


def test_pad_prompts_on_the_right() -> None:
    ids, mask = pad_prompts([[1, 2, 3], [4]], pad=0, left=False)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# --- training


def test_the_loss_is_transformers_own_row_by_row(each: AdaptedModel) -> None:
    """Batched, padded, with our own decoder inputs: the sum of what transformers says of rows."""
    encoder = encoder_of(each)
    examples = [encoder.example(prompt, answer, " ") for prompt, answer in ROWS]
    expected = 0.0
    for prompt, answer in ROWS:
        ids, labels = (torch.tensor([ids_of(each, text)]) for text in (prompt, answer))
        found = each.peft(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        expected += found.loss.item() * labels.numel()
    batch = collate(examples, encoder.pad)
    found = answer_loss(each, batch)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    logits = answer_logits(each, batch)
    assert logits.shape == (len(batch.labels), 320)
    assert answer_loss_of(logits, batch).item() == found.item()
    alone = sum(answer_loss(each, collate([example], encoder.pad)).item() for example in examples)
    assert alone == pytest.approx(expected, rel=1e-5)
    assert float(logits.detach()[:, 3:].std(dim=0).min()) > 1e-3, "positions differ"


def test_logits_stand_in_the_order_of_the_labels(model: AdaptedModel) -> None:
    encoder = encoder_of(model)
    examples = [encoder.example(prompt, answer) for prompt, answer in ROWS[:3]]
    batch = collate(examples, encoder.pad)
    together = answer_logits(model, batch)[batch.labels != IGNORED]
    alone = torch.cat([answer_logits(model, collate([one], encoder.pad)) for one in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len(alone) == batch.answer_tokens


def test_rows_of_one_length_need_no_mask(model: AdaptedModel) -> None:
    """The same logits as with the mask that a longer neighbour makes necessary."""
    encoder = encoder_of(model)
    one, other = encoder.example("abc def", "A"), encoder.example("abc deg", "B")
    longer = encoder.example("abc def and more", "A")
    assert one.sides == other.sides
    seen: list[Tensor | None] = []
    inner = model.backbone.model.get_encoder()
    hook = inner.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    even = answer_logits(model, collate([one, other], encoder.pad))
    uneven = answer_logits(model, collate([one, other, longer], encoder.pad))
    hook.remove()
    assert seen[0] is None and seen[1] is not None
    torch.testing.assert_close(uneven[: len(even)], even, rtol=1e-4, atol=1e-5)


def test_both_halves_learn(model: AdaptedModel) -> None:
    encoder = encoder_of(model)
    loss = answer_loss(model, collate([encoder.example(*row) for row in ROWS], encoder.pad))
    gradients = torch.autograd.grad(loss, model.parameters())
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)
    assert [block.depth for block in model.blocks] == [0, 1, 2, 3]


def test_a_batch_for_the_other_kind_of_model_is_refused(
    model: AdaptedModel, tiny_model: Path
) -> None:
    causal = AdaptedModel(
        load_backbone(ModelSection(name=str(tiny_model), device="cpu")), LoraSection(rank=2), 0
    )
    apart = Example((5, 6, 2, 7, 2), 3, False, apart=True)
    together = Example((5, 6, 2, 7, 2), 3, False)
    for wrong, example in ((model, together), (causal, apart)):
        with pytest.raises(ValueError, match="encoder-decoder"):
            answer_logits(wrong, collate([example], 0))


def test_packing_is_refused(model: AdaptedModel) -> None:
    with pytest.raises(UsageError, match="encoder-decoder") as raised:
        require_packing(model)
    assert "packing=false" in raised.value.hint
    with pytest.raises(ValueError, match="packed"):
        pack([Example((5, 6, 2), 1, False)], 0).prompt_mask()


SIDES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=20)


def area(sides: list[tuple[int, int]], group: list[int]) -> int:
    return len(group) * (max(sides[n][0] for n in group) + max(sides[n][1] for n in group))


@given(SIDES, st.integers(1, 9), st.one_of(st.none(), st.integers(1, 200)))
@settings(max_examples=150, deadline=None)
def test_groups_of_sides_keep_to_their_limits_and_lose_nothing(
    sides: list[tuple[int, int]], most: int, tokens: int | None
) -> None:
    groups = group_by_sides(sides, most, tokens)
    assert sorted(number for group in groups for number in group) == list(range(len(sides)))
    for group in groups:
        assert len(group) <= most
        assert tokens is None or len(group) == 1 or area(sides, group) <= tokens


def test_rows_are_grouped_by_the_side_that_differs() -> None:
    by_prompt = [(30, 2), (3, 2), (30, 3), (3, 3)]
    assert group_by_sides(by_prompt, 2, None) == [[2, 0], [3, 1]]
    by_answer = [(answer, prompt) for prompt, answer in by_prompt]
    assert group_by_sides(by_answer, 2, None) == [[2, 0], [3, 1]]
    assert group_by_sides([(5, 5), (5, 5), (5, 4)], 9, 20) == [[0, 1], [2]]


def test_the_gradient_of_a_step_does_not_depend_on_its_passes(tiny_t5: Path) -> None:
    model = adapt(tiny_t5)
    model.peft.double()
    encoder = encoder_of(model)
    examples = [encoder.example(*row) for row in ROWS]
    plan = BatchPlan(len(examples), len(examples), 1, 0)
    whole = Forwards(examples, plan, OptimSection(), encoder.pad).of(0)
    limits = OptimSection(micro_batch_size=2, micro_batch_tokens=90)
    forwards = Forwards(examples, plan, limits, encoder.pad)
    passes = forwards.of(0)
    assert len(whole) == 1 and forwards.per_epoch() == len(passes) > 2
    assert sum(batch.tokens for batch in passes) == whole[0].tokens
    for found, wanted in zip(gradients(model, passes), gradients(model, whole), strict=True):
        torch.testing.assert_close(found, wanted)
        assert float(wanted.abs().max()) > 1e-3


def gradients(model: AdaptedModel, batches: list) -> tuple[Tensor, ...]:
    loss = torch.stack([answer_loss(model, batch) for batch in batches]).sum()
    return torch.autograd.grad(loss, model.parameters())


# --- answers


def plainly(model: AdaptedModel, prompt: str, longest: int) -> str:
    """One prompt through transformers' own generate, no padding, none of our settings.

    Without its cache, which transformers 5.23 makes as deep as the encoder even where the decoder
    is deeper.
    """
    ids = torch.tensor([ids_of(model, prompt)])
    start = model.backbone.model.config.decoder_start_token_id
    config = GenerationConfig(
        max_new_tokens=longest, do_sample=False, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=start, use_cache=False,
    )  # fmt: skip
    said = model.peft.generate(input_ids=ids, generation_config=config)
    return model.backbone.tokenizer.decode(said[0][1:], skip_special_tokens=True)


def greedily(model: AdaptedModel, prompt: str, longest: int) -> str:
    """The whole answer read anew for every token, no cache."""
    start = model.backbone.model.config.decoder_start_token_id
    ids, said = torch.tensor([ids_of(model, prompt)]), [start]
    while len(said) <= longest and said[-1] != 2:
        logits = model.peft(
            input_ids=ids, decoder_input_ids=torch.tensor([said]), use_cache=False
        ).logits
        said.append(int(logits[0, -1].argmax()))
    return model.backbone.tokenizer.decode(said[1:], skip_special_tokens=True)


def test_answers_are_transformers_own_row_by_row(each: AdaptedModel) -> None:
    encoder = encoder_of(each)
    expected = [plainly(each, prompt, 7) for prompt in PROMPTS]
    assert expected == [greedily(each, prompt, 7) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert SharedPrefix(each, [encoder.prompt(INSTRUCTION + end)[0] for end in "abcd"]).tokens == []
    for size, tokens in ((1, None), (4, None), (6, 150)):
        assert generate(each, encoder, PROMPTS, 7, size, batch_tokens=tokens) == expected


@pytest.mark.parametrize("prompts", [PROMPTS[:1], [PROMPTS[0]] * 5, [], ["", "a", ""]])
def test_few_equal_and_empty_prompts(model: AdaptedModel, prompts: list[str]) -> None:
    expected = [plainly(model, prompt, 6) for prompt in prompts]
    assert generate(model, encoder_of(model), prompts, 6, 3) == expected


def test_labels_score_as_transformers_own_loss(each: AdaptedModel) -> None:
    """A prompt and a label at a time, through the model's own loss; the separator has no part."""
    found: dict[int, Tensor] = {}
    for batch in score_batches(each, encoder_of(each), PROMPTS, LABELS, "\n", 4):
        found |= batch
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([ids_of(each, prompt)])
        for number, label in enumerate(LABELS):
            labels = torch.tensor([ids_of(each, label)])
            expected = -each.peft(input_ids=ids, labels=labels).loss * labels.numel()
            assert found[row][number].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    assert all(scores.shape == (len(LABELS),) for scores in found.values())


def test_the_prompt_is_encoded_once_for_all_labels(model: AdaptedModel) -> None:
    calls: list[str] = []
    body = model.backbone.model
    layer = body.decoder.block[1].layer[1].EncDecAttention
    hooks = [
        body.get_encoder().register_forward_hook(lambda *_: calls.append("encoder")),
        layer.k.register_forward_hook(lambda *_: calls.append("keys of the prompt")),
        body.decoder.register_forward_hook(lambda *_: calls.append("decoder")),
    ]
    list(choose_batches(model, encoder_of(model), PROMPTS[:4], LABELS, "", 4))
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["decoder"] * 4 + ["encoder", "keys of the prompt"]


def test_labels_of_an_unknown_script_are_refused(tmp_path: Path) -> None:
    """T5 knows no Chinese: its labels would all be the unknown token."""
    model = adapt(sentence_piece(make_t5(tmp_path)))
    with pytest.raises(UsageError, match="'红' and '蓝' are the same tokens"):
        next(choose_batches(model, encoder_of(model), ["a"], ["红", "蓝"], "", 4))
    with pytest.raises(UsageError, match="max_answer_tokens cuts the labels 'no' and 'nor'"):
        next(choose_batches(model, encoder_of(model, 9, 1), ["a"], ["no", "nor"], "", 4))


def sentence_piece(folder: Path) -> Path:
    """Give a model a tokenizer of T5's own make: pieces of words, an unknown token, no bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(r" +", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "<unk>", "</s>"], unk_token="<unk>"
    )
    western = [text for text in TEXTS if text.isascii()]
    tokenizer.train_from_iterator([*western, "no nor now red blue"] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_pieces_of_words_are_read_and_learned_as_t5s_are(tmp_path: Path) -> None:
    model = adapt(sentence_piece(make_t5(tmp_path)))
    encoder, tokenizer = encoder_of(model), model.backbone.tokenizer
    pieces = tokenizer("red sky", add_special_tokens=False)["input_ids"]
    example = encoder.example("What is the colour", "red sky", " ")
    assert list(example.tokens[example.answer_start :]) == [*pieces, 2]
    assert tokenizer.decode(pieces) == "red sky"
    assert encoder.example("a", " red sky").tokens == encoder.example("a", "red sky", " ").tokens


# --- several adapters in a batch


@settings(max_examples=4, deadline=None)
@given(
    size=st.integers(1, 7),
    who=st.lists(st.sampled_from(["live", "base", "one", "two"]), min_size=6, max_size=6),
)
def test_neighbours_with_other_adapters_change_nothing(
    model: AdaptedModel, size: int, who: list[str]
) -> None:
    """Encoder and decoder of every row carry its own adapter, generated or by label."""
    encoder = encoder_of(model)
    stored = {"live": model.snapshot(), "one": noise(model, 2), "two": noise(model, 3)}
    expected = []
    for name, prompt in zip(who, PROMPTS, strict=True):
        if name == "base":
            with model.as_base():
                expected.append(both(model, encoder, prompt))
        else:
            model.restore(stored[name])
            expected.append(both(model, encoder, prompt))
    model.restore(stored["live"])
    with model.beside([stored["one"], stored["two"]]) as (one, two):
        slots = {"live": model.live, "base": None, "one": one, "two": two}
        rows = [slots[name] for name in who]
        said = generate(model, encoder, PROMPTS, 6, size, adapters=rows)
        scores: dict[int, Tensor] = {}
        for batch in score_batches(model, encoder, PROMPTS, LABELS, "", size, adapters=rows):
            scores |= batch
    for row, (text, wanted) in enumerate(expected):
        assert said[row] == text
        torch.testing.assert_close(scores[row], wanted, rtol=1e-4, atol=1e-4)


def both(model: AdaptedModel, encoder: Encoder, prompt: str) -> tuple[str, Tensor]:
    scores = next(score_batches(model, encoder, [prompt], LABELS, "", 1))[0]
    return generate(model, encoder, [prompt], 6, 1)[0], scores


# --- features


def test_features_are_the_encoders_views_of_a_prompt(tiny_t5: Path, model: AdaptedModel) -> None:
    body = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).get_encoder().eval()
    texts = [*PROMPTS, "今天天气怎么样？ " * 9]
    found = prompt_features(model, encoder_of(model, 200), texts, batch_size=3)
    assert len(ids_of(model, texts[-1])) > HEAD
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([shorten(ids_of(model, text))])
        with torch.no_grad():
            states = body(input_ids=ids, output_hidden_states=True).hidden_states
        middle, last = (state[0] / state[0].square().mean(1, True).sqrt() for state in states[1:])
        views = [middle[1:HEAD].mean(0), last[1:].mean(0), last[-1]]
        torch.testing.assert_close(row, torch.cat(views), atol=2e-5, rtol=1e-4)


def test_batches_and_padding_change_no_features(each: AdaptedModel) -> None:
    encoder = encoder_of(each)
    each.peft.train()
    alone = prompt_features(each, encoder, PROMPTS, batch_size=1)
    together = prompt_features(each, encoder, PROMPTS, batch_size=4)
    each.peft.eval()
    torch.testing.assert_close(together, alone, atol=5e-5, rtol=1e-3)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-2


def test_the_way_in_is_the_same_for_all(model: AdaptedModel) -> None:
    """Training, generating and scoring give the encoder the same tokens for a prompt."""
    encoder = encoder_of(model)
    seen: list[list[int]] = []

    def watch(_: object, args: object, kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["input_ids"].tolist()[0])

    hook = model.backbone.model.get_encoder().register_forward_pre_hook(watch, with_kwargs=True)
    answer_loss(model, collate([encoder.example("What is it?", "A", " ")], encoder.pad))
    generate(model, encoder, ["What is it?"], 2, 1)
    list(choose_batches(model, encoder, ["What is it?"], LABELS, " ", 1))
    prompt_features(model, encoder, ["What is it?"])
    hook.remove()
    assert seen == [ids_of(model, "What is it?")] * 4
