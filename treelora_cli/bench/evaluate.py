"""Answering prompts in batches beside one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from treelora_cli.bench.document import Column, Row, Table
from treelora_cli.bench.lengths import PROMPT, ROWS, lengths_for
from treelora_cli.bench.part import Part, Plan, Say
from treelora_cli.bench.shapes import LLAMA_1B, SMALL, TINY, build, random_examples
from treelora_cli.bench.timing import alternate, compare, waiter
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Encoder
from treelora_cli.models.generate import generate

ABOUT = "Greedy answers to prompts of TRACE's lengths, in batches beside one prompt at a time"
NEW_TOKENS = 16
BATCH = 32


class Questions:
    """Prompts for a model, and what it answered last.

    Args:
        adapted: the model; its tokenizer reads numbers.
        lengths: tokens of each prompt.
        seed: of the tokens.
    """

    def __init__(self, adapted: AdaptedModel, lengths: Sequence[int], seed: int) -> None:
        self.adapted = adapted
        self.encoder = Encoder(adapted.backbone.tokenizer, PROMPT, NEW_TOKENS)
        vocab = adapted.backbone.model.config.vocab_size
        # The begin token is counted in a length and put there by the encoder.
        rows = random_examples([(length - 1, 0) for length in lengths], vocab, seed)
        self.prompts = [" ".join(map(str, row.tokens)) for row in rows]
        self.answers: dict[int, list[str]] = {}

    def answer(self, batch: int) -> None:
        """Answer all prompts, so many at a time."""
        self.answers[batch] = generate(self.adapted, self.encoder, self.prompts, NEW_TOKENS, batch)

    def equal(self, one: int, other: int) -> int:
        """Return how many answers are the same with two batch sizes."""
        pairs = zip(self.answers[one], self.answers[other], strict=True)
        return sum(left == right for left, right in pairs)


def run(plan: Plan, say: Say) -> Sequence[Table]:
    """Answer every task's prompts in both ways; a batch never mixes tasks, as in a stream."""
    shape = TINY if plan.quick else LLAMA_1B if plan.cuda else SMALL
    lengths = lengths_for(plan.data, plan.model)
    pairs, count = plan.times(5 if plan.cuda else 2, 1), 2 if plan.quick else ROWS
    adapted = build(shape, plan.device, plan.seed)
    rows: list[Row] = []
    ones, batches = [0.0] * pairs, [0.0] * pairs
    for name, found in lengths.tasks.items():
        prompts = [prompt for prompt, _ in found[:count]]
        say(f"eval: {name}, {len(prompts)} prompts, {pairs} times in both ways")
        questions = Questions(adapted, prompts, plan.seed)
        one, batched = alternate(
            partial(questions.answer, 1),
            partial(questions.answer, BATCH),
            pairs,
            warmup=1 if plan.cuda else 0,
            wait=waiter(plan.device),
        )
        rows.append({"task": name, **_row(prompts, one, batched, plan.seed)})
        rows[-1]["same_answers"] = questions.equal(1, BATCH)
        ones = [total + seconds for total, seconds in zip(ones, one, strict=True)]
        batches = [total + seconds for total, seconds in zip(batches, batched, strict=True)]
    everything = [prompt for prompt, _ in lengths.take(count)]
    rows.append({"task": "all", **_row(everything, ones, batches, plan.seed)})
    rows[-1]["same_answers"] = sum(int(row["same_answers"] or 0) for row in rows[:-1])
    title = f"{shape}, {NEW_TOKENS} new tokens, batches of up to {BATCH}, {plan.device.type}"
    return [Table("eval", title, COLUMNS, rows, (f"Lengths: {lengths.about}.",))]


def _row(prompts: Sequence[int], one: Sequence[float], batched: Sequence[float], seed: int) -> Row:
    found = compare(batched, one, seed)
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(prompts),
        "one_s": found.second,
        "batched_s": found.first,
        "speedup": found.ratio,
        "speedup_low": found.low,
        "speedup_high": found.high,
        "pairs": found.pairs,
    }


COLUMNS = (
    Column("task", ("task",)),
    Column("prompts", ("prompts",)),
    Column("prompt tokens", ("prompt_tokens",)),
    Column("one at a time s", ("one_s",), 2),
    Column("batches s", ("batched_s",), 2),
    Column("times faster", ("speedup", "speedup_low", "speedup_high"), 2),
    Column("pairs", ("pairs",)),
    Column("same answers", ("same_answers",)),
)

PART = Part("eval", ABOUT, run)
