"""Whether a model keeps the rows of a packed sequence apart; asked of the model itself."""

from __future__ import annotations

import torch

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Example, pack
from treelora_cli.models.forward import answer_loss, forward_parameters


def require_packing(adapted: AdaptedModel) -> None:
    """See to it that packed rows do not see one another.

    A row is packed behind two different rows of the same length. Masked entries weigh exactly
    nothing, so its loss must not change by a single bit, whatever the dtype.

    Raises:
        UsageError: it does change, the model takes no positions, or it is an encoder-decoder.
    """
    if adapted.backbone.encodes:
        raise UsageError(
            f"optim.packing: {adapted.backbone.name} is an encoder-decoder, whose rows are two",
            "leave optim.packing=false; rows are then grouped by length",
        )
    vocabulary = int(adapted.backbone.model.config.get_text_config().vocab_size)
    tokens = [3 + n % max(1, vocabulary - 3) for n in range(24)]
    one, other, last = tokens[:8], tokens[8:16], tokens[16:]
    apart = "position_ids" in forward_parameters(adapted.backbone.model)
    if apart:
        apart = _loss(adapted, one, last) == _loss(adapted, other, last)
    if not apart:
        raise UsageError(
            f"optim.packing: {adapted.backbone.name} would mix the rows of a packed sequence",
            "leave optim.packing=false; rows are then grouped by length",
        )


def _loss(adapted: AdaptedModel, first: list[int], last: list[int]) -> float:
    # Only the last row has answer tokens: the first is all prompt.
    rows = [Example(tuple(first), len(first), False), Example(tuple(last), 4, False)]
    with torch.no_grad():
        loss = answer_loss(adapted, pack(rows, 0).to(adapted.device))
    return float(loss)
