"""Weights of the sequences of a batch by their losses (loss-based sample reweighting, arXiv:2502.06733).

The losses of all M sequences of a step are brought to [-1, 1], ``h = (2 l - max - min) / (max - min)``, a shape f says which of
them matter, and ``w = softmax(f(h) / r)``: r, the temperature, is the strength of a pull towards equal weights. ``linupper``,
``min(h + 1, 1)``, takes weight from what is known already and treats the upper half alike; ``quadratic``, ``1 - h^2``, prefers
the middle; ``extremes``, ``|h|``, both ends.
"""

from __future__ import annotations

from typing import Literal

import torch

from espalier.errors import EspalierError

Shape = Literal["linupper", "quadratic", "extremes"]


def weights(losses: torch.Tensor, shape: Shape, temperature: float) -> torch.Tensor:
    """The weights (M,) of sequences, which sum to 1, from their mean losses (M,): float64.

    Raises:
        EspalierError: when the temperature is not positive.
    """
    if not temperature > 0:
        raise EspalierError(f"reweight_temperature is {temperature}; it must be more than 0")
    l_i = losses.double()
    low, high = l_i.min(), l_i.max()
    h = (2 * l_i - high - low) / (high - low).clamp_min(1e-6)
    match shape:
        case "linupper":
            f = (h + 1).clamp_max(1)
        case "quadratic":
            f = 1 - h * h
        case "extremes":
            f = h.abs()
    return (f / temperature).softmax(0)
