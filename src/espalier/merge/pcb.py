"""PCB-Merging: what competes for a number is weighed by how much it matters within its model and between them."""

from __future__ import annotations

from typing import Any, Literal

import torch

from espalier.delta.merging import Combine, Parameter, Piece, Whole
from espalier.errors import EspalierError
from espalier.kernels.merging import blend, compete
from espalier.registry import merger


def balance(low: torch.Tensor, high: torch.Tensor, piece: Piece, inter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Clamped changes, and intra- times inter-balancing: both (models, rows, columns)."""
    width = (high - low).clamp_min(1e-12)
    if inter == "pairs":
        limits = (low.flatten(), high.flatten(), width.flatten())
        updates, scores = piece.updates, piece.spare
        compete(updates.flatten(1), *limits, scores.flatten(1))
        return updates, scores
    magnitudes, sign = torch.clip(piece.updates.abs(), low, high), piece.updates.sign()
    normal = (magnitudes - low) / width
    others = (sign * normal if inter == "normalized" else piece.updates).sum(0)
    return sign * magnitudes, torch.exp(len(normal) * (normal.square() - 1)) * torch.tanh(piece.updates * others)


def survey(whole: Whole, *, density: float = 0.1, clamp: float = 0.0001, inter: str = "pairs") -> dict[str, torch.Tensor]:
    """Limits of the clamp, and the threshold and largest of the scores, over the whole model: each (models, 1, 1)."""
    if not 0 <= density <= 1 or not 0 <= clamp < 0.5:
        raise EspalierError(f"density is {density} and clamp {clamp}; density must be from 0 to 1, and clamp at least 0 and below 0.5")
    low, high = whole.quantiles(lambda parameter, piece: piece.updates.abs_(), [clamp, 1 - clamp])
    scores = lambda parameter, piece: balance(low, high, piece, inter)[1]  # noqa: E731
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

    ``intra_i = exp(N (a_i^2 - 1))`` with a_i the clamped magnitude scaled to [0, 1] over the model, ``inter_i = sum_j
    tanh(s_i s_j)`` with s the signed a; the scores ``intra inter`` below the quantile 1 - density are 0, the others scaled to
    [0, 1]; ``tau = sum_i w_i S_i t_i / sum_i S_i``. Quantiles are of the whole model, as in the paper.
    The -1 in the exponent is ours: it scales all scores alike, so that many models do not overflow.

    Args:
        density: r, share of the numbers of a model whose scores are not 0
        clamp: share of smallest and of largest magnitudes that are drawn in to the rest
        inter: the official code's three ways to weigh models against each other: pairs (the paper's), normalized, raw
    """
    found: dict[str, Any] = parameter.survey
    cut = found["cut"].flatten()
    factors = 1 / (found["top"].flatten() - cut).clamp_min(1e-30)

    def combine(piece: Piece) -> torch.Tensor:
        clamped, scores = balance(found["low"], found["high"], piece, inter)
        flat = (piece.origin.flatten(), clamped.flatten(1), scores.flatten(1))
        return blend(*flat, cut, factors, parameter.weights, parameter.scale).view_as(piece.origin)

    return combine
