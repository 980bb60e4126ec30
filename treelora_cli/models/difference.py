"""An adapter as its difference from another one: which entries are others, and their values.

Entries are compared bit by bit, so that rebuilding gives the same bytes (-0.0 is not 0.0). A tensor
whose entries are all the reference's is left out. Of another one these are stored, under its name
and the ending given here, whichever way takes the fewest bytes:

- ``values``: float32 [c], the entries that differ, in row-major order;
- ``bits``: uint8 [ceil(n / 8)], one bit an entry, the lowest bit first: set where it differs; or
- ``gaps8``: uint8, before each value the number of equal entries since the value before it; 255
  stands for 255 equal entries and no value; or
- ``gaps16``: uint16, the same with 65535; or
- none of the three where all entries differ or leaving the index out is smallest: ``values`` then
  holds the whole tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from treelora_cli.models.snapshot import Snapshot

VALUES, BITS = ".values", ".bits"
GAPS = {".gaps8": torch.uint8, ".gaps16": torch.uint16}
_LONGEST = {".gaps8": 255, ".gaps16": 65535}


class Difference(NamedTuple):
    """What is stored of an adapter beside its reference.

    Attributes:
        tensors: see the module's text.
        equal: entries that are the reference's.
        entries: all entries.
    """

    tensors: dict[str, Tensor]
    equal: int
    entries: int


def encode(snapshot: Snapshot, reference: Snapshot) -> Difference:
    """Return the difference of an adapter from one of the same shapes, both float32."""
    tensors: dict[str, Tensor] = {}
    equal = entries = 0
    for key, value in snapshot.items():
        flat = value.reshape(-1)
        differs = flat.view(torch.int32) != reference[key].reshape(-1).view(torch.int32)
        changed = int(differs.sum())
        entries += flat.numel()
        equal += flat.numel() - changed
        if changed:
            tensors |= {f"{key}{end}": part for end, part in _parts(flat, differs).items()}
    return Difference(tensors, equal, entries)


def decode(tensors: Mapping[str, Tensor], reference: Snapshot) -> Snapshot:
    """Return the adapter that :func:`encode` was given, bit for bit.

    Raises:
        ValueError: the tensors are no difference from this reference.
    """
    left = dict(tensors)
    rebuilt: Snapshot = {}
    for key, base in reference.items():
        rebuilt[key] = base
        values = left.pop(f"{key}{VALUES}", None)
        if values is None:
            continue
        places = _places(left, key, base.numel())
        if values.dtype != torch.float32 or values.shape != places.shape:
            raise ValueError(f"{key!r} has other values than places for them")
        flat = base.reshape(-1).clone()
        flat[places] = values
        rebuilt[key] = flat.view(base.shape)
    if left:
        raise ValueError(f"{min(left)!r} belongs to no tensor of the reference")
    return rebuilt


def _parts(flat: Tensor, differs: Tensor) -> dict[str, Tensor]:
    """Return the stored parts of one tensor, by the end of their names."""
    places = differs.nonzero().squeeze(1)
    ways = [{BITS: _bits(differs)}, *({end: _gaps(places, end)} for end in GAPS)]
    ways = [{VALUES: flat[places], **index} for index in ways]
    return min([{VALUES: flat.clone()}, *ways], key=_bytes)


def _bytes(parts: Mapping[str, Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


def _places(left: dict[str, Tensor], key: str, entries: int) -> Tensor:
    """Return the places of the values of one tensor, int64; what they are read of is taken out."""
    bits = left.pop(f"{key}{BITS}", None)
    found = [(end, left.pop(f"{key}{end}", None)) for end in GAPS]
    gaps = [(end, index) for end, index in found if index is not None]
    if len(gaps) + (bits is not None) > 1:
        raise ValueError(f"{key!r} has two indices")
    if bits is not None:
        if bits.dtype != torch.uint8 or bits.shape != (-(-entries // 8),):
            raise ValueError(f"the index of {key!r} is not of its size")
        spread = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        places = spread.reshape(-1).nonzero().squeeze(1)
    elif gaps:
        places = _from_gaps(*gaps[0], key)
    else:
        places = torch.arange(entries)
    if len(places) and int(places[-1]) >= entries:
        raise ValueError(f"the index of {key!r} goes beyond its end")
    return places


def _bits(differs: Tensor) -> Tensor:
    missing = -differs.numel() % 8
    padded = torch.cat([differs, differs.new_zeros(missing)]).view(-1, 8)
    return (padded * (1 << torch.arange(8))).sum(1).to(torch.uint8)


def _gaps(places: Tensor, end: str) -> Tensor:
    """Return the numbers of equal entries before each place, long ones in several steps."""
    longest = _LONGEST[end]
    skipped = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    steps = skipped // longest
    # Each value takes one code, after as many full steps as its gap holds.
    codes = torch.full((len(places) + int(steps.sum()),), longest, dtype=torch.int64)
    codes[(steps + 1).cumsum(0) - 1] = skipped % longest
    return codes.to(GAPS[end])


def _from_gaps(end: str, index: Tensor, key: str) -> Tensor:
    if index.dtype != GAPS[end] or index.dim() != 1:
        raise ValueError(f"the index of {key!r} is not of its kind")
    codes = index.to(torch.int64)
    here = codes < _LONGEST[end]
    # A code below the longest is its gap and then one value.
    return (codes + here).cumsum(0)[here] - 1
