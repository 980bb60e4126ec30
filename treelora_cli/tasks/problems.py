"""Collecting what is wrong with the rows, so that one run tells more than the first mistake."""

from __future__ import annotations

from treelora_cli.errors import DataError

MOST_SHOWN = 10


class Problems:
    """A list of problems that becomes one ``DataError``.

    The count goes on after ``MOST_SHOWN`` problems; only the texts of the first are kept.
    """

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._hint = ""
        self.count = 0

    def add(self, where: str, what: str, hint: str = "") -> None:
        """Note one problem.

        Args:
            where: ``file``, ``file:line`` or ``file:line:column``.
            what: the field, what was found and what was expected.
            hint: how to mend it; the first hint given is the one shown.
        """
        self.count += 1
        if len(self._shown) < MOST_SHOWN:
            self._shown.append(f"{where}: {what}")
        self._hint = self._hint or hint

    def __len__(self) -> int:
        return self.count

    def raise_if_any(self) -> None:
        """Raise what was collected.

        Raises:
            DataError: at least one problem was added.
        """
        if not self._shown:
            return
        lines = list(self._shown)
        if len(lines) > 1:
            cut = f", the first {len(lines)} of them" if self.count > len(lines) else ""
            lines = [f"{self.count} problems in the data{cut}:", *(f"  {line}" for line in lines)]
        raise DataError("\n".join(lines), self._hint)
