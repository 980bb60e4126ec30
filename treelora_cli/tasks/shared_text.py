"""What all prompts of a task have in common: its instruction, learned from the prompts alone.

A prompt's instruction gives the task away. Taking it off shows how far routing lives on it, and
how far on the text that differs from row to row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

SHARE = 0.9
"""The share of the prompts that must carry a shared part; the others are odd rows."""


def shared_parts(prompts: Sequence[str], share: float = SHARE) -> tuple[str, str]:
    """Return the longest beginning and the longest ending that nearly all prompts carry.

    Both are cut back to a boundary of words, so that prompts which happen to go on with the same
    letters keep their words whole. One prompt alone has nothing to share.

    Args:
        prompts: training prompts of one task.
        share: at least this share of the prompts carries each part, above 0.5.

    Raises:
        ValueError: ``share`` is outside (0.5, 1].
    """
    if not 0.5 < share <= 1.0:
        raise ValueError(f"share must be above 0.5 and at most 1, not {share}")
    if len(prompts) < 2:
        return "", ""
    prefix = _whole_words(_common_start(prompts, share))
    rests = [strip_shared(prompt, (prefix, "")) for prompt in prompts]
    backwards = _whole_words(_common_start([rest[::-1] for rest in rests], share))
    return prefix, backwards[::-1]


def strip_shared(prompt: str, parts: tuple[str, str]) -> str:
    """Return a prompt without its task's shared parts, or as much of them as it carries.

    An odd row that ends in ``? Answer:`` where the others end in ``. Answer:`` loses what it shares
    with them, so that no instruction is left in it.

    Args:
        prompt: any prompt; of a ``Conversation`` only the text is looked at.
        parts: beginning and ending, from :func:`shared_parts`.
    """
    prefix, suffix = parts
    rest = str(prompt)
    rest = rest[_carried(rest, prefix) :]
    return rest[: len(rest) - _carried(rest[::-1], suffix[::-1])]


def _carried(text: str, start: str) -> int:
    """Return how many characters of a start the text has, in whole words unless it has all."""
    if text.startswith(start):
        return len(start)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(text, start, strict=False))
    return len(_whole_words("".join(char for char, _ in same)))


def _common_start(texts: Sequence[str], share: float) -> str:
    """Return the longest start of at least a share of the texts, which is more than half of them.

    Texts with the same start stand together when sorted, so the middle one has it.
    """
    middle = sorted(texts)[len(texts) // 2]
    needed = share * len(texts)
    low, high = 0, len(middle)
    while low < high:
        size = (low + high + 1) // 2
        if sum(text.startswith(middle[:size]) for text in texts) >= needed:
            low = size
        else:
            high = size - 1
    return middle[:low]


def _whole_words(start: str) -> str:
    """Cut letters and digits off the end: the word may go on differently in another prompt."""
    size = len(start)
    while size and start[size - 1].isalnum():
        size -= 1
    return start[:size]
