"""DELLA: drop changes at random, the small ones more often."""

from __future__ import annotations

from typing import Literal

import torch

from espalier.delta.merging import Combine, Parameter, Piece, merged_changes
from espalier.errors import EspalierError
from espalier.kernels.merging import thin
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
        epsilon: by how much the probability rises and falls over a row; density +- epsilon must stay inside (0, 1], but for a density of 1, which keeps all
        rescale: divide each number by its probability; or scale each tensor to the sum of magnitudes that it had; or not
        elect: merge only the changes of the sign that has the greater mass, or the most models; none: all of them
        normalize: divide by the weights that were merged; default: only with an election
    """
    shares, spreads = parameter.each(density, "density"), parameter.each(epsilon, "epsilon")
    for share, spread in zip(shares, spreads, strict=True):
        if (share < 1 and not (spread >= 0 and share - spread > 0 and share + spread <= 1)) or share > 1:
            raise EspalierError(f"density {share} and epsilon {spread} give probabilities outside (0, 1]")
    streams = [parameter.stream(f"dare {model}") for model in range(parameter.models)]
    ranks = torch.arange(parameter.columns, device=parameter.device) / max(parameter.columns - 1, 1)
    if parameter.columns == 1:
        ranks.fill_(0.5)
    odds = [torch.ones_like(ranks) if d == 1 else d - e + 2 * e * ranks for d, e in zip(shares, spreads, strict=True)]
    factors = [1 / odd if rescale == "density" else torch.ones_like(odd) for odd in odds]

    def keep(piece: Piece) -> torch.Tensor:
        made = torch.empty_like(piece.updates)
        for update, stream, odd, factor, out in zip(piece.updates, streams, odds, factors, made, strict=True):
            thin(update, stream.at(piece.start).uniform(*update.shape, device=parameter.device), odd, factor, out)
        return made

    if rescale != "norm":
        return merged_changes(parameter, keep, elect, normalize)
    ratio = parameter.ratio(lambda piece: torch.stack([_mass(piece.updates), _mass(keep(piece))], -1))[:, None, None].to(parameter.device)
    return merged_changes(parameter, lambda piece: keep(piece).mul_(ratio), elect, normalize)


def _mass(changes: torch.Tensor) -> torch.Tensor:
    return changes.abs().sum(-1).double().sum(-1).cpu()
