"""The quadratic program of GEM: the nearest gradient that agrees with all memories, exactly.

With one constraint per earlier task it is tiny, so it is solved in float64 by an active set
(Lawson & Hanson 1974, NNLS) on inner products alone: no vector as long as the model is needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_TINY = 1e-12
"""A unit row's inner product below this share of the gradient's norm is a rounding error."""
_ROUNDS = 50
"""Most rounds for every constraint."""


def cone_weights(gram: Floats, margin: float) -> Floats:
    """Return how much of every memory's gradient is added to the live gradient g.

    The v that minimises |g + G^T v|^2 / 2 over v >= margin: the dual of GEM's program (Lopez-Paz
    & Ranzato 2017, Eq. 11; ``margin`` as in the released code). At the minimum no inner product
    G (g + G^T v) is negative, and those of v > margin are zero.

    Args:
        gram: float64 [1 + K, 1 + K], inner products of g and the rows of G, g first.
        margin: gamma, at least 0.

    Returns:
        float64 [K]; exactly zero everywhere where no memory disagrees with g.
    """
    products = gram[0, 1:]
    if not len(products) or products.min() >= 0:
        return np.zeros(len(products))
    among = gram[1:, 1:]
    lengths = np.sqrt(np.diag(among))
    lengths[lengths == 0] = 1.0
    # In units of the rows' lengths: a program that does not depend on the gradients' sizes.
    P = among / np.outer(lengths, lengths)
    shifted = (products + margin * among.sum(axis=1)) / lengths
    everything = np.array([1.0, *[margin] * len(products)])
    norm = np.sqrt(max(0.0, float(everything @ gram @ everything)))
    return nonnegative(P, shifted, _TINY * norm) / lengths + margin


def nonnegative(P: Floats, q: Floats, tolerance: float) -> Floats:
    """Minimise u^T P u / 2 + q^T u over u >= 0.

    Args:
        P: float64 [K, K], symmetric, positive semidefinite, perhaps singular.
        q: float64 [K].
        tolerance: a slope this close to zero is zero.

    Returns:
        float64 [K].
    """
    u = np.zeros(len(q))
    free = np.zeros(len(q), dtype=bool)
    barred = np.zeros(len(q), dtype=bool)
    # It ends by itself, long before; rounding alone could make it go round for ever.
    for _ in range(_ROUNDS * len(q)):
        slope = np.where(free | barred, -np.inf, -(P @ u + q))
        best = int(slope.argmax())
        if slope[best] <= tolerance:
            break
        free[best] = True
        if _minimum(P, q, free)[best] <= 0:
            # It would be bound again at once: its slope was a rounding error.
            free[best], barred[best] = False, True
            continue
        barred[:] = False
        u = _settle(P, q, u, free)
    return u


def _settle(P: Floats, q: Floats, u: Floats, free: NDArray[np.bool_]) -> Floats:
    """Go from u to the minimum over the free entries; bind, in place, those that reach zero."""
    while True:
        wanted = _minimum(P, q, free)
        below = np.flatnonzero(free & (wanted <= 0))
        if not len(below):
            return wanted
        parts = u[below] / (u[below] - wanted[below])
        first = parts.argmin()
        u = u + parts[first] * (wanted - u)
        free[below[first]] = False
        u[~free] = 0.0


def _minimum(P: Floats, q: Floats, free: NDArray[np.bool_]) -> Floats:
    """Return the minimum over the free entries, the others zero."""
    found = np.zeros(len(q))
    if free.any():
        found[free] = np.linalg.lstsq(P[np.ix_(free, free)], -q[free], rcond=None)[0]
    return found
