"""Numbers and rows on their way between host and device, so that neither waits for the other."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """Numbers on their way from the device to the host.

    The copy starts at once; ``read`` waits for it alone, not for work that was queued since. Read
    some steps later it costs an accelerator nothing.

    Args:
        values: [n] or scalar, any dtype; detached and copied, so later changes do not show.
    """

    def __init__(self, values: Tensor) -> None:
        found = values.detach().reshape(-1)
        self._arrived: torch.cuda.Event | None = None
        if found.device.type == "cuda":
            self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._host.copy_(found, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(found.device))
        else:
            self._host = found.clone()

    def read(self) -> list[float]:
        """Return the numbers, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._host.tolist()]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device; an accelerator's copy goes on beside other work."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
