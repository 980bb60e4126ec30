"""The diagonal of the Fisher information of what a model answers, from every row's own gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from treelora_cli.methods._memory import generator
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import IGNORED, Batch, Example
from treelora_cli.models.forward import answer_logits
from treelora_cli.models.probe import Probe

Labels = Literal["model", "data"]


def fisher_diagonal(
    model: AdaptedModel, ask: Probe, rows: Sequence[Example], labels: Labels, seed: int
) -> Tensor:
    """Return the mean over answer tokens of squared gradients, at the live weights, no dropout.

    F_j = (1 / answer tokens) sum over rows of (d log p(answer | prompt) / d theta_j)^2. The mean
    loss over answer tokens rises by d^T diag(F) d / 2 where theta moves by d from its minimum: to
    second order, and without F's entries off the diagonal.

    Args:
        model: its trainable parameters are theta.
        ask: makes batches.
        rows: at least one.
        labels: ``data``: the rows' own answers (the empirical Fisher). ``model``: every answer
            token drawn from the model, given the prompt and the true tokens before it; its
            expectation is the Fisher information of these predictions.
        seed: decides what is drawn.

    Returns:
        float32 [P] on the host, in the order of ``model.parameters()``.
    """
    batches = ask.batches(rows)
    if any(batch.starts is None for batch in batches):  # packed: rows cannot be told apart
        batches = _single(ask, rows)
    with model.evaluating():
        total = _squares(model, batches, labels, seed)
        if total is None:
            total = _squares_one_by_one(model, _single(ask, rows), labels, seed)
    return (total / sum(batch.answer_tokens for batch in batches)).cpu()


def _single(ask: Probe, rows: Sequence[Example]) -> list[Batch]:
    return [batch for row in rows for batch in ask.batches([row])]


def _loss(model: AdaptedModel, batch: Batch, labels: Labels, source: torch.Generator) -> Tensor:
    """Return minus the summed log-likelihood of a batch's answers, as they are or drawn."""
    logits = answer_logits(model, batch).float()
    target = batch.labels
    if labels == "model":
        noise = torch.empty_like(logits).exponential_(generator=source).log_()
        drawn = (logits.detach() - noise).argmax(dim=-1)  # of the softmax: the Gumbel-max trick
        target = torch.where(target == IGNORED, IGNORED, drawn)
    return functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")


def _squares_one_by_one(
    model: AdaptedModel, single: Sequence[Batch], labels: Labels, seed: int
) -> Tensor:
    """Return the sum of squared gradients, [P], of batches of one row each; fits every model."""
    parameters = model.parameters()
    total = torch.zeros(model.trainable_count(), device=model.device)
    source = generator(seed, device=model.device)
    for batch in single:
        loss = _loss(model, batch, labels, source)
        parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        total += parameters_to_vector(parts).square()
    return total


class _Call(NamedTuple):
    """One use of a linear layer without bias: y = x W^T, [..., d_in] to [..., d_out]."""

    weight: int
    x: Tensor
    y: Tensor


def _squares(
    model: AdaptedModel, batches: Sequence[Batch], labels: Labels, seed: int
) -> Tensor | None:
    """Return the sum of every row's squared gradients, [P], from one backward pass a batch.

    A row's gradient of W is the product of its dL/dy and its x, and a backward pass gives these
    for all rows at once.

    Returns:
        None where a trainable parameter is no such W, is used twice in a pass, or where rows are
        not the first dimension of x.
    """
    parameters = model.parameters()
    layers = {
        id(layer.weight): layer
        for layer in model.peft.modules()
        if isinstance(layer, torch.nn.Linear) and layer.bias is None
    }
    if not all(id(parameter) in layers for parameter in parameters):
        return None
    total = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in parameters}
    source = generator(seed, device=model.device)
    with _watched({key: layers[key] for key in total}) as calls:
        for batch in batches:
            calls.clear()
            loss = _loss(model, batch, labels, source)
            if not _apart(calls, len(batch.input_ids)):
                return None
            slopes = torch.autograd.grad(
                loss, [call.y for call in calls], allow_unused=True, materialize_grads=True
            )
            for call, slope in zip(calls, slopes, strict=True):
                rows = torch.einsum("bso,bsi->boi", slope.float(), call.x.float())
                total[call.weight] += rows.square().sum(dim=0)
    return parameters_to_vector(total.values())


def _apart(calls: Sequence[_Call], rows: int) -> bool:
    """Tell whether no weight was used twice, and every use has the batch's rows in front."""
    once = len({call.weight for call in calls}) == len(calls)
    return once and all(call.x.dim() == 3 and len(call.x) == rows for call in calls)


@contextmanager
def _watched(layers: Mapping[int, torch.nn.Linear]) -> Iterator[list[_Call]]:
    """Note every use of some layers."""
    calls: list[_Call] = []

    def note(layer: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(_Call(names[layer], inputs[0].detach(), output))

    names: dict[torch.nn.Module, int] = {layer: key for key, layer in layers.items()}
    handles = [layer.register_forward_hook(note) for layer in layers.values()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
