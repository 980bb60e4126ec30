"""Pre-trains the tiny base that ships with the package; anyone can repeat it.

A Llama of one million parameters reads generated documents in packed rows. Matrices are trained
by Muon, embeddings and norms by AdamW; the rate is constant for the first half and falls linearly
to zero over the second. With the same settings, package versions and kind of processor the files
come out byte for byte the same; a limit in minutes gives that up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from treelora_cli.errors import DivergedError, EnvironmentProblem, UsageError
from treelora_cli.models.pretrain_card import model_card

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

log = logging.getLogger("treelora")

PAD, BOS, EOS = 0, 1, 2
_SPECIAL = ("<pad>", "<s>", "</s>")
_LOG_EVERY = 25


@dataclass(frozen=True, slots=True)
class PretrainSettings:
    """Everything that the files of a base depend on.

    Attributes:
        tokens: tokens to read; None for no limit of that kind.
        minutes: minutes to train; None for no limit of that kind.
        seed: names the text, the first weights and nothing else.
        vocabulary: size of the byte-level BPE vocabulary.
        documents: documents that the tokenizer is trained on.
        hidden: width of the model.
        layers: number of layers.
        heads: number of attention heads.
        mlp: inner width of the MLP.
        positions: longest context that the model accepts.
        batch: packed rows a step.
        length: tokens a packed row.
        rate: learning rate of Muon (matrices).
        rate_rest: learning rate of AdamW (embedding and norms).
        threads: threads of one matrix product; another number may change the last bits.
    """

    tokens: int | None = 6_000_000
    minutes: float | None = None
    seed: int = 7
    vocabulary: int = 1536
    documents: int = 12_000
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 352
    positions: int = 512
    batch: int = 16
    length: int = 128
    rate: float = 0.02
    rate_rest: float = 0.003
    threads: int = 1


@dataclass(frozen=True, slots=True)
class PretrainResult:
    """What came out.

    Attributes:
        out: the folder of the base.
        tokens_read: tokens read.
        steps: optimiser steps made.
        loss: mean training loss of the last steps, nats a token.
        parameters: number of weights.
        seconds: time spent on training.
    """

    out: Path
    tokens_read: int
    steps: int
    loss: float
    parameters: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Reading:
    """The text that a base reads.

    Attributes:
        documents: maps a seed and the name of a part to a stream of documents without end.
        description: what the text holds, in Markdown, for the model card.
    """

    documents: Callable[[int, str], Iterator[str]]
    description: str


Progress = Callable[[float, float, int], None]
"""Called with the done share (0-1), the loss in nats a token and the tokens read."""


def shipped_base() -> Path:
    """Return the folder of the base that is part of the package.

    Raises:
        EnvironmentProblem: the installation lacks it.
    """
    folder = Path(__file__).parent / "builtin"
    if not (folder / "model.safetensors").is_file():
        raise EnvironmentProblem(
            f"the built-in base is missing from {folder}", "install the package again"
        )
    return folder


def pretrain(
    out: Path,
    reading: Reading,
    settings: PretrainSettings,
    progress: Progress | None = None,
) -> PretrainResult:
    """Train a tokenizer and a base and write both to ``out``.

    Args:
        out: a folder that is empty or does not exist yet.
        reading: the text to read.
        settings: what to train.
        progress: told about the training now and then.

    Raises:
        UsageError: ``out`` is in use, or neither tokens nor minutes limit the training.
        EnvironmentProblem: the installed torch has no Muon.
        DivergedError: the loss is no longer finite.
    """
    import torch
    import transformers

    if settings.tokens is None and settings.minutes is None:
        raise UsageError("nothing limits the pre-training", "give --tokens or --minutes")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder", "name another --out")
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        tokenizer = _train_tokenizer(reading, settings)
        transformers.set_seed(settings.seed)
        model = _new_model(settings)
        batches = _packed(tokenizer, reading, settings)
        result = _train(model, batches, settings, progress, out)
    finally:
        torch.set_num_threads(before)
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(out)
    _save_tokenizer(tokenizer, settings, out)
    facts = {**asdict(settings), **asdict(result), "description": reading.description}
    (out / "README.md").write_text(model_card(facts), encoding="utf-8")
    return result


def _train_tokenizer(reading: Reading, settings: PretrainSettings) -> Tokenizer:
    """Train a byte-level BPE; every text can be encoded, and decoding gives it back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = islice(reading.documents(settings.seed, "tokenizer"), settings.documents)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, settings: PretrainSettings, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = _SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        model_max_length=settings.positions,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def _new_model(settings: PretrainSettings) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        intermediate_size=settings.mlp,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    return model


def _packed(
    tokenizer: Tokenizer, reading: Reading, settings: PretrainSettings
) -> Iterator[torch.Tensor]:
    """Yield int64 tokens [batch, length]: documents, each between bos and eos, end to end."""
    import torch

    need = settings.batch * settings.length
    held: list[int] = []
    for document in reading.documents(settings.seed, "text"):
        held += [BOS, *tokenizer.encode(document).ids, EOS]
        while len(held) >= need:
            yield torch.tensor(held[:need]).view(settings.batch, settings.length)
            held = held[need:]


def _optimizers(
    model: LlamaForCausalLM, settings: PretrainSettings
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return the two optimisers with their rates."""
    import torch

    if not hasattr(torch.optim, "Muon"):
        raise EnvironmentProblem(
            f"torch {torch.__version__} has no torch.optim.Muon", "install torch 2.9 or newer"
        )
    inner = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "embed" not in name
    }
    rest = [weight for name, weight in model.named_parameters() if name not in inner]
    muon = torch.optim.Muon(
        list(inner.values()), lr=settings.rate, momentum=0.95, weight_decay=0.05
    )
    adamw = torch.optim.AdamW(rest, lr=settings.rate_rest, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, settings.rate), (adamw, settings.rate_rest)]


def _train(
    model: LlamaForCausalLM,
    batches: Iterator[torch.Tensor],
    settings: PretrainSettings,
    progress: Progress | None,
    out: Path,
) -> PretrainResult:
    """Train the model in place until the tokens are read or the time is over."""
    import torch

    optimizers = _optimizers(model, settings)
    started = time.monotonic()
    tokens = steps = 0
    losses: list[float] = []
    done = 0.0
    while done < 1.0:
        batch = next(batches)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, 2.0 * (1.0 - done))
        loss = model(input_ids=batch, labels=batch).loss
        if not torch.isfinite(loss):
            raise DivergedError(
                f"pre-training: loss {loss.item()} at step {steps}", "lower the learning rates"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps += 1
        tokens += batch.numel()
        losses = [*losses[1 - _LOG_EVERY :], loss.item()]
        done = _share_done(settings, tokens, time.monotonic() - started)
        if progress and steps % _LOG_EVERY == 0:
            progress(done, sum(losses) / len(losses), tokens)
    return PretrainResult(
        out=out,
        tokens_read=tokens,
        steps=steps,
        loss=sum(losses) / len(losses),
        parameters=model.num_parameters(),
        seconds=time.monotonic() - started,
    )


def _share_done(settings: PretrainSettings, tokens: int, seconds: float) -> float:
    by_tokens = tokens / settings.tokens if settings.tokens else 0.0
    by_time = seconds / (60.0 * settings.minutes) if settings.minutes else 0.0
    return max(by_tokens, by_time)
