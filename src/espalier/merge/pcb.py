"""PCB-Merging: what competes for a number is weighed by how much it matters within its model and between them."""

from __future__ import annotations

from typing import Any, Literal

import torch

from espalier.delta.merging import Combine, Parameter, Piece, Whole
from espalier.errors import EspalierError
from espalier.kernels.merging import Between, Clamp, add_changes, add_scores, blend, mean_by_scores
from espalier.registry import merger


def balance(clamp: Clamp, piece: Piece, inter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Clamped changes, and intra- times inter-balancing as the sum over models has it: both (models, rows, columns)."""
    low, high, width = (limit[:, None, None].to(piece.origin.device) for limit in (clamp.low, clamp.high, clamp.width))
    magnitudes, sign = torch.clip(piece.updates.abs(), low, high), piece.updates.sign()
    normal = (magnitudes - low) / width
    others = (sign * normal if inter == "normalized" else piece.updates).sum(0)
    return sign * magnitudes, torch.exp(len(normal) * (normal.square() - 1)) * torch.tanh(piece.updates * others)


def survey(whole: Whole, *, density: float = 0.1, clamp: float = 0.0001, inter: str = "pairs") -> dict[str, Any]:
    """The clamp, and the threshold and factors of the scores, over the whole model: each (models,)."""
    if not 0 <= density <= 1 or not 0 <= clamp < 0.5:
        raise EspalierError(f"density is {density} and clamp {clamp}; density must be from 0 to 1, and clamp at least 0 and below 0.5")
    limits = Clamp(*whole.quantiles(lambda piece, found: add_changes(piece.stored, found), [clamp, 1 - clamp]))

    def scores(piece: Piece, found: list[tuple[int, Between]]) -> None:
        if inter == "pairs":
            add_scores(piece.stored, limits, found)
            return
        made = balance(limits, piece, inter)[1].flatten(1)
        for model, between in found:
            between.add(made[model])

    cut, top = whole.quantiles(scores, [1 - density, 1.0])
    return {"clamp": limits, "cut": cut, "factors": 1 / (top - cut).clamp_min(1e-30)}


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
    clamped, cut, factors, weights, scale = found["clamp"], found["cut"], found["factors"], parameter.weights, parameter.scale
    if inter == "pairs":
        return lambda piece: blend(piece.stored, clamped, cut, factors, weights, scale)
    return lambda piece: mean_by_scores(piece.origin, *balance(clamped, piece, inter), cut, factors, weights, scale)
