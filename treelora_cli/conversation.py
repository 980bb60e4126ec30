"""Turns of a conversation, and the plain text they make where no chat template is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]

ROLES: tuple[Role, ...] = ("system", "user", "assistant")


class Turn(NamedTuple):
    """What one side said."""

    role: Role
    text: str


class Conversation(str):
    """A prompt of several turns: as text a transcript, with the turns kept beside it.

    Whatever handles prompts as text (limits, fingerprints, replay, plain training) needs to know
    nothing of turns; a chat template takes ``turns`` instead of the text.

    Args:
        turns: everything before the answer, in order; at least one.
    """

    turns: tuple[Turn, ...]

    def __new__(cls, turns: Sequence[Turn]) -> Conversation:
        """Make the transcript of the turns, which ends where the answer begins."""
        lines = [f"{turn.role.capitalize()}: {turn.text}" for turn in turns]
        made = super().__new__(cls, "\n".join([*lines, "Assistant:"]))
        made.turns = tuple(turns)
        return made

    def __reduce__(self) -> tuple[type[Conversation], tuple[tuple[Turn, ...]]]:
        """Copy and send between processes by the turns: the text follows from them."""
        return Conversation, (self.turns,)


def turns_of(prompt: str) -> tuple[Turn, ...]:
    """Return the turns of a prompt; a plain text is one turn of the user."""
    return prompt.turns if isinstance(prompt, Conversation) else (Turn("user", prompt),)
