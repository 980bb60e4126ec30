"""What a task may be called: names become folder names, so the alphabet is small."""

from __future__ import annotations

import re

from treelora_cli.errors import UsageError

NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"
"""The pattern of a task name, without anchors."""

_NAME = re.compile(NAME)


def is_task_name(name: object) -> bool:
    """Tell whether ``name`` is text that may serve as a task name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_task_name(name: str) -> str:
    """Return ``name`` if it may serve as a task name.

    Raises:
        UsageError: it is empty, too long, or holds a character outside the allowed set.
    """
    if not is_task_name(name):
        raise UsageError(
            f"{name!r} cannot be a task name",
            "use 1 to 64 ASCII letters, digits, '.', '_', '+' or '-', starting with a letter "
            "or digit",
        )
    return name
