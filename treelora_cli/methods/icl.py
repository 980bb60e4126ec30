"""ICL: the base with examples in its prompt; nothing is trained, nothing is forgotten.

Source: the in-context learning of TRACE (Wang et al. 2023) and FIX of TreeLoRA (ICML 2025): a
question is asked behind the task's instruction and ``shots`` answered training rows. Whoever asks
knows the task, as they do in the papers. The rows are drawn by the run's seed, in turn for every
answer that occurs, so that labels are balanced and open answers differ. Rows that do not fit into
data.max_prompt_tokens with the question are left out, the last ones first, and how many is said;
both papers read 3584 tokens.

Stored per task: the adapter as it was made, B = 0, which changes nothing. Cost: no training; a
question is as long as its examples make it. Zero-shot scores are those of the bare questions.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from treelora_cli.conversation import Conversation, Turn, turns_of
from treelora_cli.methods.base import Departure, Method, MethodSettings, StreamContext
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Encoder, encoder_for
from treelora_cli.tasks.shared_text import shared_parts
from treelora_cli.tasks.types import Row, Task

logger = logging.getLogger("treelora")

FOLLOW = "Here are examples. Answer the last one in the same way.\n\n"
BREAK = "\n\n"


class IclSettings(MethodSettings):
    """ICL's own settings."""

    shots: Annotated[int, Field(gt=0)] = Field(
        6, description="answered training rows before every question, as far as they fit"
    )


class Icl(Method):
    """In-context learning: training rows in the prompt instead of training."""

    name = "icl"
    trains = False
    Settings = IclSettings
    settings: IclSettings
    departures = (
        Departure(
            "where examples come from",
            "not said",
            "the test split: the answers of test rows are shown (TRACE and TreeLoRA)",
            "the training split",
        ),
        Departure(
            "how many",
            "6",
            "6, none for MeetingBank; at most 2 a label for C-STANCE and FOMC; elsewhere no answer "
            "twice, which leaves 2 where there are two labels; of at most a twelfth of the prompt",
            "6 everywhere, answers in turn, as many as fit with the question",
        ),
        Departure(
            "a prompt that is too long",
            "not said",
            "its beginning is cut, which can be the instruction",
            "examples are left out until it fits",
        ),
        Departure(
            "what is read of an answer",
            "not said",
            "cut by a rule for every task (TRACE), as it is (TreeLoRA)",
            "as for every other method",
        ),
    )

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Freeze the adapter."""
        super().start(stream, model)
        model.freeze_adapter()

    def questions(self, task: Task, prompts: Sequence[str]) -> list[str]:
        """Return prompts behind examples, as many as fit."""
        examples = draw_examples(task, self.settings.shots, self.stream.seed)
        instruction, encoder = instruction_of(task), self._encoder()
        asked, kept = [], []
        for prompt in prompts:
            count = len(examples)
            text = with_examples(task, instruction, examples, prompt)
            while count and encoder.prompt(text)[1]:
                count -= 1
                text = with_examples(task, instruction, examples[:count], prompt)
            asked.append(text)
            kept.append(count)
        self._say(task, kept)
        return asked

    def _encoder(self) -> Encoder:
        backbone = self.model.backbone
        return encoder_for(
            backbone.tokenizer, self.stream.data, backbone.positions, encodes=backbone.encodes
        )

    def _say(self, task: Task, kept: Sequence[int]) -> None:
        wanted = self.settings.shots
        short = [count for count in kept if count < wanted]
        if short:
            logger.warning(
                "task %s: %d of %d questions have fewer than %d examples (%.1f on average): "
                "data.max_prompt_tokens=%d and the training rows give no more",
                task.name, len(short), len(kept), wanted, sum(kept) / len(kept),
                self.stream.data.max_prompt_tokens,
            )  # fmt: skip


def draw_examples(task: Task, count: int, seed: int) -> list[Row]:
    """Return training rows, drawn in turn for each answer that occurs.

    Args:
        task: whose training split is drawn from.
        count: how many, or all where there are fewer.
        seed: the run's; each task is drawn from in its own way.
    """
    source = random.Random(f"{seed} {task.name}")
    rows = source.sample(task.splits["train"], len(task.splits["train"]))
    met: defaultdict[str, int] = defaultdict(int)
    turns = []
    for place, row in enumerate(rows):
        turns.append((met[row.answer], place))
        met[row.answer] += 1
    return [rows[place] for _, place in sorted(turns)[:count]]


def instruction_of(task: Task) -> str:
    """Return the lines that nearly all training prompts of a task begin with; perhaps none."""
    shared, _ = shared_parts([row.prompt for row in task.splits["train"]])
    return shared[: shared.rfind("\n") + 1]


def with_examples(task: Task, instruction: str, examples: Sequence[Row], prompt: str) -> str:
    """Return a prompt behind examples: instruction, examples with answers, the prompt's own text.

    A conversation gets the examples as turns before its own, behind what the system says.

    Args:
        task: says what stands between prompt and answer.
        instruction: taken off examples and prompt, where they have it, and put before all.
        examples: none: the prompt is returned as it is.
        prompt: the question.
    """
    if not examples:
        return prompt
    if isinstance(prompt, Conversation):
        return _conversation(examples, prompt)
    shown = [row.prompt.removeprefix(instruction) + task.separator + row.answer for row in examples]
    return instruction + FOLLOW + BREAK.join([*shown, prompt.removeprefix(instruction)])


def _conversation(examples: Sequence[Row], prompt: Conversation) -> Conversation:
    system = [turn for turn in prompt.turns if turn.role == "system"]
    shown = [
        turn
        for row in examples
        for turn in (*turns_of(row.prompt), Turn("assistant", row.answer))
        if turn.role != "system"
    ]
    return Conversation([*system, *shown, *(t for t in prompt.turns if t.role != "system")])
