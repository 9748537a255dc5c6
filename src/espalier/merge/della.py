"""DELLA: drop changes at random, the small ones more often."""

from __future__ import annotations

from typing import Literal

import torch

from espalier.delta.merging import Combine, Parameter, Piece, merged_changes
from espalier.errors import EspalierError
from espalier.registry import merger


@merger("della", ids=(), paper="arXiv:2406.11617")
def della(
    parameter: Parameter,
    *,
    density: float | list[float] = 0.5,
    epsilon: float | list[float] = 0.15,
    rescale: Literal["density", "norm", "none"] = "density",
    elect: Literal["none", "mass", "count"] = "mass",
    normalize: bool | None = None,
) -> Combine:
    """DARE with probabilities that rise with the rank of a change's magnitude in its row, then elected as in TIES.

    ``p_j = density - epsilon + 2 epsilon r_j / (n - 1)`` with r_j the rank among the n numbers of the row; what is kept
    is divided by its own probability, so that it is right on average. Epsilon 0 is DARE.

    Args:
        density: average probability that a number is kept
        epsilon: by how much the probability rises and falls over a row; density +- epsilon must stay inside (0, 1)
        rescale: divide each number by its probability; or scale each tensor to the sum of magnitudes that it had; or not
        elect: merge only the changes of the sign that has the greater mass, or the most models; none: all of them
        normalize: divide by the weights that were merged; default: only with an election
    """
    shares, spreads = parameter.each(density, "density"), parameter.each(epsilon, "epsilon")
    for share, spread in zip(shares, spreads, strict=True):
        if share < 1 and not 0 < share - spread <= share + spread < 1:
            raise EspalierError(f"density {share} and epsilon {spread} give probabilities outside (0, 1)")
    streams = [parameter.stream(f"della {model}") for model in range(parameter.models)]
    last = max(parameter.columns - 1, 1)

    def keep(piece: Piece) -> torch.Tensor:
        kept = torch.empty_like(piece.updates)
        for model, (update, share, spread, stream) in enumerate(zip(piece.updates, shares, spreads, streams, strict=True)):
            if share >= 1:
                kept[model] = update
                continue
            order = update.abs().argsort(dim=-1, stable=True)
            ranks = torch.empty_like(update).scatter_(-1, order, torch.arange(update.shape[-1]).float().expand_as(update))
            odds = share - spread + 2 * spread * ranks / last if parameter.columns > 1 else torch.full_like(update, share)
            chosen = stream.at(piece.start).uniform(update.numel()).view_as(update) < odds
            kept[model] = torch.where(chosen, update / odds if rescale == "density" else update, 0.0)
        return kept

    factors = parameter.ratio(lambda piece: piece.updates.abs(), lambda piece: keep(piece).abs()) if rescale == "norm" else 1.0
    return merged_changes(parameter, lambda piece: keep(piece) * factors, elect, normalize)
