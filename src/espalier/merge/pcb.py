"""PCB-Merging: what competes for a number is weighed by how much it matters within its model and between them."""

from __future__ import annotations

from typing import Any, Literal

import torch

from espalier.delta.merging import Combine, Parameter, Piece, Whole
from espalier.registry import merger


def balance(parameter: Parameter, low: torch.Tensor, high: torch.Tensor, piece: Piece, inter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Clamped changes, and intra- times inter-balancing: both (models, rows, columns)."""
    magnitudes = torch.clip(piece.updates.abs(), low, high)
    sign = piece.updates.sign()
    normal = (magnitudes - low) / (high - low).clamp_min(1e-12)
    intra = torch.exp(parameter.models * normal.square())
    signed = sign * normal
    if inter == "pairs":
        between = torch.stack([torch.tanh(one * signed).sum(0) for one in signed])
    elif inter == "normalized":
        between = torch.tanh(piece.updates * signed.sum(0))
    else:
        between = torch.tanh(piece.updates * piece.updates.sum(0))
    return sign * magnitudes, intra * between


def survey(whole: Whole, *, density: float = 0.1, clamp: float = 0.0001, inter: str = "pairs") -> dict[str, torch.Tensor]:
    """Limits of the clamp, and the threshold and largest of the scores, over the whole model: each (models, 1, 1)."""
    low, high = whole.quantiles(lambda parameter, piece: piece.updates.abs(), [clamp, 1 - clamp])
    scores = lambda parameter, piece: balance(parameter, low, high, piece, inter)[1]  # noqa: E731
    cut, top = whole.quantiles(scores, [1 - density, 1.0])
    return {"low": low, "high": high, "cut": cut, "top": top}


@merger("pcb", ids=(17,), paper="arXiv:2410.02396", first_pass="survey")
def pcb(
    parameter: Parameter,
    *,
    density: float = 0.1,
    clamp: float = 0.0001,
    inter: Literal["pairs", "normalized", "raw"] = "pairs",
) -> Combine:
    """Score every change, drop the low scores, and average the others by score.

    ``intra_i = exp(N a_i^2)`` with a_i the clamped magnitude scaled to [0, 1] over the model, ``inter_i = sum_j tanh(s_i
    s_j)`` with s the signed a; the scores ``intra inter`` below the quantile 1 - density are 0, the others scaled to
    [0, 1]; ``tau = sum_i w_i S_i t_i / sum_i S_i``. Quantiles are of the whole model, as in the paper.

    Args:
        density: r, share of the numbers of a model whose scores are not 0
        clamp: share of smallest and of largest magnitudes that are drawn in to the rest
        inter: the official code's three ways to weigh models against each other: pairs (the paper's), normalized, raw
    """
    found: dict[str, Any] = parameter.survey
    weights = parameter.weights[:, None, None]

    def combine(piece: Piece) -> torch.Tensor:
        clamped, scores = balance(parameter, found["low"], found["high"], piece, inter)
        shares = (scores.clamp_min(found["cut"]) - found["cut"]) / (found["top"] - found["cut"]).clamp_min(1e-12)
        merged = (weights * shares * clamped).sum(0) / shares.sum(0).clamp_min(1e-12)
        return piece.origin + parameter.scale * merged

    return combine
