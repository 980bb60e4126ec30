"""Save and load tensors as safetensors, trusting nothing that is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from treelora_cli.errors import DivergedError, RunDirError
from treelora_cli.rundir.files import new_file
from treelora_cli.rundir.jsonfile import parse_object
from treelora_cli.rundir.storage import storage_errors

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 100 * 1000 * 1000
"""The longest header that the safetensors format allows."""

_HINT = "put the original file back; or remove its folder, so that it is made again"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, finite: bool = True) -> None:
    """Write tensors to a .safetensors file atomically; equal tensors give equal bytes.

    Args:
        path: the file; its folder must exist.
        tensors: any shapes, dtypes and devices; copied to the CPU, views and ties made whole.
        finite: refuse NaN and infinities.

    Raises:
        DivergedError: a tensor is not finite; nothing is written.
        EnvironmentProblem: the disk is full.
        RunDirError: another failure of the file system.
    """
    from safetensors.torch import save_file

    if finite:
        broken = first_not_finite(tensors)
        if broken is not None:
            raise DivergedError(
                f"the tensor {broken!r} holds NaN or infinity; {path.name} was not written",
                "lower optim.lr, or look at the last rows of the training data",
            )
    whole = _own_storage(tensors)
    with new_file(path) as temporary:
        save_file(whole, temporary)


def load_tensors(
    path: Path, *, finite: bool = True, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read a .safetensors file.

    Args:
        path: the file; no other ending is ever read.
        finite: refuse NaN and infinities.
        like: tensors that the file must match in names, shapes and dtypes.

    Returns:
        CPU tensors by name.

    Raises:
        RunDirError: names the file, and where there is one the tensor, that is wrong.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    _check_header(path)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise RunDirError(f"{path} is damaged: {error}", _HINT) from None
    if finite:
        broken = first_not_finite(tensors)
        if broken is not None:
            raise RunDirError(f"{path}: the tensor {broken!r} holds NaN or infinity", _HINT)
    if like is not None:
        _check_like(path, tensors, like)
    return tensors


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the first name, in alphabetical order, whose tensor holds NaN or infinity."""
    import torch

    for name in sorted(tensors):
        values = tensors[name].detach()
        if not (values.is_floating_point() or values.is_complex()):
            continue
        # 8-bit floats have no isfinite kernel.
        values = values.float() if values.element_size() == 1 else values
        if not bool(torch.isfinite(values).all()):
            return name
    return None


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy to the CPU; clone what shares memory, which safetensors refuses to store."""
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        whole[name] = tensor
    return whole


def _check_header(path: Path) -> None:
    """Refuse, before anything is allocated, what cannot be a safetensors file."""
    if path.suffix != ".safetensors":
        raise RunDirError(
            f"{path} is not a .safetensors file", "weights are never read from another format"
        )
    with storage_errors(path, "read"):
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RunDirError(f"{path} is not a regular file", _HINT)
            length = int.from_bytes(stream.read(8), "little")
            room = status.st_size - 8
            if not 2 <= length <= min(room, MAX_HEADER_BYTES):
                raise RunDirError(
                    f"{path} is damaged: a header of {length:,} bytes in a file of "
                    f"{status.st_size:,}",
                    _HINT,
                )
            header = stream.read(length)
    try:
        parse_object(header)
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "nested too deeply"
        raise RunDirError(
            f"{path} is damaged: its header cannot be read ({reason})", _HINT
        ) from None


def _check_like(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    for name in sorted(set(tensors) ^ set(like)):
        verb = "lacks" if name in like else "has an unexpected"
        raise RunDirError(f"{path} {verb} tensor {name!r}", _HINT)
    for name, expected in sorted(like.items()):
        found = tensors[name]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise RunDirError(
                f"{path}: the tensor {name!r} is {found.dtype} {list(found.shape)}, expected "
                f"{expected.dtype} {list(expected.shape)}",
                _HINT,
            )
