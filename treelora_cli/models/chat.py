"""Prompts in a tokenizer's chat template: the frame is the template's, only texts are ever cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from treelora_cli.conversation import Turn
from treelora_cli.errors import DataError, UsageError

_QUESTION, _ANSWER = "questionTREELORA", "answerTREELORA"
_MEND = "use --set data.format=plain, or a base that was tuned for chat and brings a template"

# Some templates write the day into the prompt; a run must not depend on when it is resumed. This is
# the day that the templates of Llama 3 take where no clock is given.
_FIXED_DAY = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul') "
    "| replace('%B', 'July') | replace('%m', '07') | replace('%Y', '2024') "
    "| replace('%A', 'Friday') | replace('%H', '12') | replace('%M', '00') "
    "| replace('%S', '00') }}{% endmacro %}"
)

Span = tuple[int, int]


class ChatTemplate:
    """A tokenizer's chat template, taken apart at the answer.

    The begin token is the template's matter: rendered text is tokenised without special tokens, so
    it stands there once if the template writes it, and never twice. Where a template knows no
    system turn, its text begins the user's first one.

    Args:
        tokenizer: a transformers tokenizer.

    Attributes:
        end: the token that ends the assistant's turn, or the end token where the template has none.
        lead: white space that the template puts before the assistant's text.

    Raises:
        UsageError: the tokenizer has no chat template, or one that does not show the answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or "the model"
            raise UsageError(
                f"data.format chat: the tokenizer of {name} has no chat template", _MEND
            )
        template = str(tokenizer.get_chat_template())
        self._template = (_FIXED_DAY if "strftime_now" in template else "") + template
        question = Turn("user", _QUESTION)
        opening = self._render([question], opens_answer=True)
        whole = self._render([question, Turn("assistant", _ANSWER)], opens_answer=False)
        before, found, after = whole.partition(_ANSWER)
        if not found or _QUESTION not in opening:
            raise UsageError("data.format chat: the chat template leaves out what is said", _MEND)
        between = before.removeprefix(opening) if before.startswith(opening) else ""
        # Text before every answer (an empty chain of thought) is read, white space is learned: a
        # token may hold the space and the answer's first letters.
        self._suffix = between if between.strip() else ""
        self.lead = "" if between.strip() else between
        self.end = self._turn_end(after)
        self._folds_system = not self._takes_system()

    def _takes_system(self) -> bool:
        try:
            rendered = self._render(
                [Turn("system", _ANSWER), Turn("user", _QUESTION)], opens_answer=True
            )
        except DataError:
            return False
        return _ANSWER in rendered

    def _turn_end(self, after: str) -> int:
        tokenizer = self._tokenizer
        ids = self.ids(after.lstrip())
        special = set(tokenizer.all_special_ids)
        special |= {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
        return ids[0] if ids and ids[0] in special else int(tokenizer.eos_token_id)

    def _render(self, turns: Sequence[Turn], *, opens_answer: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=opens_answer,
                chat_template=self._template,
            )
        except Exception as error:
            # Templates are programs of their own: they raise what Jinja raises, and what they like.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(
                f"the chat template refuses a conversation of the turns {roles}: {reason}",
                "take such rows out, or use --set data.format=plain",
            ) from error
        return str(rendered)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens of the tokenizer's own."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Return the tokens of a whole prompt, up to where the assistant's text begins."""
        if self._folds_system:
            turns = fold_system(turns)
        return self.ids(self._render(turns, opens_answer=True) + self._suffix)

    def fit(
        self, turns: Sequence[Turn], longest: int, truncate: Literal["left", "middle"]
    ) -> tuple[list[int], bool]:
        """Return a prompt's tokens, at most ``longest``, and whether something was cut.

        First whole exchanges go, the oldest ones (``middle``: those after the first), then the
        beginning or the middle of the user's last text. System turns and the frame stay.

        Args:
            turns: the prompt.
            longest: the most tokens, frame included.
            truncate: which part goes.

        Raises:
            UsageError: frame and system text alone are longer than that.
        """
        ids = self.prompt_ids(turns)
        if len(ids) <= longest:
            return ids, False
        system, exchanges = _exchanges(turns)
        while len(exchanges) > 1 and len(ids) > longest:
            del exchanges[1 if truncate == "middle" and len(exchanges) > 2 else 0]
            turns = [*system, *(turn for exchange in exchanges for turn in exchange)]
            ids = self.prompt_ids(turns)
        return (ids, True) if len(ids) <= longest else (self._cut(turns, longest, truncate), True)

    def _cut(
        self, turns: Sequence[Turn], longest: int, truncate: Literal["left", "middle"]
    ) -> list[int]:
        """Cut the last text of the user until the whole fits; tokens may merge, so try again."""
        at = max(at for at, turn in enumerate(turns) if turn.role == "user")
        text = turns[at].text
        spans = self._spans(text)
        ids = self.prompt_ids(turns)
        keep = len(spans)
        while keep > 1:
            keep = max(1, keep - max(1, len(ids) - longest))
            short = Turn("user", cut_text(text, spans, keep, truncate))
            ids = self.prompt_ids([*turns[:at], short, *turns[at + 1 :]])
            if len(ids) <= longest:
                return ids
        raise UsageError(
            f"data.max_prompt_tokens {longest}: the chat template and the system text take "
            f"{len(ids)} tokens, nothing is left for the prompt",
            f"e.g. --set data.max_prompt_tokens={2 * len(ids)}",
        )

    def _spans(self, text: str) -> list[Span]:
        """Return the characters of each token; of each character where that is not known."""
        if not getattr(self._tokenizer, "is_fast", False):
            return [(at, at + 1) for at in range(len(text))]
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(start, end) for start, end in found["offset_mapping"]]


def cut_text(
    text: str, spans: Sequence[Span], keep: int, truncate: Literal["left", "middle"]
) -> str:
    """Return what is left of a text when only so many of its tokens are kept.

    Args:
        text: the text.
        spans: first character and end of each token.
        keep: tokens to keep, at least one.
        truncate: ``left`` keeps the end, ``middle`` both ends.
    """
    head = keep // 2 if truncate == "middle" else 0
    start = spans[head - 1][1] if head else 0
    return text[:start] + text[max(start, spans[len(spans) - (keep - head)][0]) :]


def fold_system(turns: Sequence[Turn]) -> list[Turn]:
    """Put system texts before the user's first text, for templates that know no system turn."""
    system = [turn.text for turn in turns if turn.role == "system"]
    rest = [turn for turn in turns if turn.role != "system"]
    at = next((at for at, turn in enumerate(rest) if turn.role == "user"), None)
    if at is not None and system:
        rest[at] = Turn("user", "\n\n".join([*system, rest[at].text]))
    return rest


def _exchanges(turns: Sequence[Turn]) -> tuple[list[Turn], list[list[Turn]]]:
    """Part a prompt into its leading system turns and exchanges that begin with the user."""
    first = next((at for at, turn in enumerate(turns) if turn.role != "system"), len(turns))
    exchanges: list[list[Turn]] = []
    for turn in turns[first:]:
        if turn.role == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(turn)
    return list(turns[:first]), exchanges
