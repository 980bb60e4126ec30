"""Find things by name: one file in a package's folder is one entry, nothing is listed by hand."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Generic, TypeVar

from treelora_cli.errors import UsageError, did_you_mean

T = TypeVar("T")


def discover(package: ModuleType) -> Iterator[ModuleType]:
    """Import every public module of a package, in alphabetical order.

    Args:
        package: an imported package; modules whose name starts with ``_`` are passed over.
    """
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
        if not info.name.startswith("_") and not info.ispkg:
            yield importlib.import_module(f"{package.__name__}.{info.name}")


class Registry(Generic[T]):
    """Names mapped to entries of one kind, with a helpful answer to an unknown name.

    Args:
        kind: what an entry is called in messages, such as ``"method"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register an entry.

        Raises:
            ValueError: the name is taken by another entry.
        """
        if name in self._entries and self._entries[name] is not entry:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = entry

    def get(self, name: str) -> T:
        """Return the entry of that name.

        Raises:
            UsageError: no entry has that name; the hint proposes the closest one.
        """
        try:
            return self._entries[name]
        except KeyError:
            known = self.names()
            raise UsageError(f"unknown {self.kind} {name!r}", did_you_mean(name, known)) from None

    def names(self) -> list[str]:
        """Return all names in alphabetical order."""
        return sorted(self._entries)
