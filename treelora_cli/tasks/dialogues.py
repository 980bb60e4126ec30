"""Conversations as rows: sharegpt (``from``, ``value``) and messages (``role``, ``content``).

The last assistant turn is the answer, everything before it is the prompt. One user turn alone is a
plain prompt; more than that is a ``Conversation``.
"""

from __future__ import annotations

from typing import Any

from treelora_cli.conversation import Conversation, Role, Turn
from treelora_cli.tasks.jsonrows import Record, describe, fault_of
from treelora_cli.tasks.problems import Problems

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
_KEYS = (("from", "value"), ("role", "content"))


class _UnusableError(Exception):
    """Why a conversation makes no row: the kind of fault, and the whole story."""


def read_dialogue(record: Record, column: str, problems: Problems) -> tuple[str, str, int] | None:
    """Read the conversation of a record.

    Args:
        record: the record; a text in its field ``system`` comes before the turns.
        column: the field of the turns.
        problems: takes what is wrong.

    Returns:
        Prompt, answer, and the number of turns after the answer; None if it cannot be used.
    """
    turns = read_turns(record, column, problems)
    if turns is None:
        return None
    last = max((at for at, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    before, answer = turns[:last], turns[last].text if turns else ""
    if not any(turn.role == "user" for turn in before):
        what = f"{column}: found no turn of the user with an answer after it"
        problems.bad_row(record.where, f"{column}: no question and answer", what, record.fields)
        return None
    system = record.fields.get("system")
    if fault_of(system) is None and before[0].role != "system":
        before = [Turn("system", str(system)), *before]
    prompt = Conversation(before) if len(before) > 1 else before[0].text
    return prompt, answer, len(turns) - last - 1


def read_turns(record: Record, column: str, problems: Problems) -> list[Turn] | None:
    """Return all turns of a record's conversation; None after noting why it cannot be used."""
    try:
        return _turns(record.fields.get(column))
    except _UnusableError as fault:
        reason, what = fault.args
        problems.bad_row(record.where, f"{column}: {reason}", f"{column}: {what}", record.fields)
        return None


def _turns(found: Any) -> list[Turn]:
    if isinstance(found, dict) and found and all(isinstance(v, list) for v in found.values()):
        # A sequence of structs may come as a struct of sequences.
        found = [
            dict(zip(found, values, strict=False)) for values in zip(*found.values(), strict=False)
        ]
    if not isinstance(found, list):
        raise _UnusableError(
            "not a list of turns", f"found {describe(found)}, expected a list of turns"
        )
    turns = [_turn(entry, number) for number, entry in enumerate(found, start=1)]
    return [turn for turn in turns if turn is not None]


def _turn(entry: Any, number: int) -> Turn | None:
    """Return one turn; None for an empty system turn, which says nothing."""
    keys = next((pair for pair in _KEYS if isinstance(entry, dict) and pair[0] in entry), None)
    if keys is None:
        what = (
            f"turn {number}: found {describe(entry)}, expected from and value or role and content"
        )
        raise _UnusableError("not a turn", what)
    who, text = entry[keys[0]], entry.get(keys[1])
    role = _ROLES.get(who.lower()) if isinstance(who, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise _UnusableError(
            "unknown role", f"turn {number}: found role {who!r}, expected one of {known}"
        )
    fault = fault_of(text)
    if fault is None:
        return Turn(role, str(text))
    if role == "system" and (text is None or fault[0] == "empty"):
        return None
    raise _UnusableError(f"turn {fault[0]}", f"turn {number}: {keys[1]}: {fault[1]}")
