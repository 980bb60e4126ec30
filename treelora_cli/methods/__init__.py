"""Continual-learning methods: one public module each, found by looking, never listed by hand.

A method module defines one subclass of :class:`treelora_cli.methods.base.Method` with a ``name``.
"""

from __future__ import annotations

import sys

from treelora_cli.methods.base import Method
from treelora_cli.registry import Registry, discover


def registry() -> Registry[type[Method]]:
    """Return every method by name."""
    found: Registry[type[Method]] = Registry("method")
    for module in discover(sys.modules[__name__]):
        for entry in vars(module).values():
            if (
                isinstance(entry, type)
                and issubclass(entry, Method)
                and entry.__module__ == module.__name__
                and hasattr(entry, "name")
            ):
                found.add(entry.name, entry)
    return found
