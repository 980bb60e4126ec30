"""Rows that only ever grow, shared by the banks of one stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class GrowingRows:
    """The storage behind a bank and all that grow from it, each seeing the first of its rows.

    Adding a row to the longest of them writes behind the last row and moves nothing; room is
    made for half as many rows again when it runs out, so that n additions copy O(n) rows.

    Attributes:
        values: [capacity, F].
        displacements: [capacity, D].
        places: the position of every name.
        scales: the last c_d worked out and the sample it was worked out from.
    """

    def __init__(self, names: Sequence[str], values: Tensor, displacements: Tensor) -> None:
        self.values = values
        self.displacements = displacements
        self.places = {name: place for place, name in enumerate(names)}
        self.scales: tuple[Sequence[int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def with_one_more(
        self, names: Sequence[str], name: str, value: Tensor, displacement: Tensor
    ) -> GrowingRows:
        """Return rows that hold one more behind the first ``len(names)``; these if they can.

        They cannot where another bank has already written there, or where there is no room.

        Args:
            names: the names of the rows that the caller sees.
            name: of the new row, not among them.
            value: [F], float32 on the host.
            displacement: [D], float32 on the host.
        """
        count = len(names)
        rows = self
        if len(self) != count or count == self.values.shape[0]:
            rows = self._copied(names)
        rows.values[count] = value
        rows.displacements[count] = displacement
        rows.places[name] = count
        return rows

    def _copied(self, names: Sequence[str]) -> GrowingRows:
        count = len(names)
        room = max(count + 1, count + count // 2)
        # Pages that are never written are never taken from the system.
        values = torch.empty(room, self.values.shape[1])
        displacements = torch.empty(room, self.displacements.shape[1])
        values[:count] = self.values[:count]
        displacements[:count] = self.displacements[:count]
        return GrowingRows(names, values, displacements)
