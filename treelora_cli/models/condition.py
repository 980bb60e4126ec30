"""What a method does with the prompts that a forward pass reads: soft prompts, gates over adapters.

The engine, the loss and the generation know no method; they show the prompts of every batch to the
model's condition, if it has one, before the batch is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Condition:
    """Sees the prompts of a batch before the model reads it. The default changes nothing.

    Attributes:
        width: soft tokens put before every prompt; 0: none.
        rows: most rows a batch of answers may have; None: no limit of its own.
    """

    width: int = 0
    rows: int | None = None

    def read(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Look at the prompts of a batch, in training and before answering.

        Args:
            ids: int64 [B, S], the prompts' tokens; whatever stands where the mask is 0 is no part
                of a prompt (padding, or an answer, which must not decide anything).
            mask: int64 [B, S], 1 for the tokens of the prompts.

        Returns:
            Soft prompts [B, width, hidden], put before the embedded tokens; None where ``width``
            is 0.
        """
        return None

    @contextmanager
    def answering(self, ids: Tensor, mask: Tensor) -> Iterator[None]:
        """Enclose the answering of one batch of prompts; the arguments are those of ``read``."""
        yield
