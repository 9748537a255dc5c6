"""DARE: drop changes at random, rescale what is left."""

from __future__ import annotations

from typing import Literal

import torch

from espalier.delta.merging import Combine, Parameter, Piece, merged_changes
from espalier.registry import merger


@merger("dare", ids=(), paper="arXiv:2311.03099")
def dare(
    parameter: Parameter,
    *,
    density: float | list[float] = 0.5,
    rescale: Literal["density", "norm", "none"] = "density",
    elect: Literal["none", "mass", "count"] = "none",
    normalize: bool | None = None,
) -> Combine:
    """Keep every change with probability ``density``, divide by it, and add up (or, with ``elect``, merge as TIES does).

    ``t_i = m_i tau_i / p`` with ``m_i ~ Bernoulli(p)``; on average t_i is tau_i. The mask of a number depends only on
    seed, parameter and place.

    Args:
        density: p, the probability that a number of a model is kept, in [0, 1]
        rescale: divide by the density; or scale each tensor to the sum of magnitudes that it had; or not at all
        elect: merge only the changes of the sign that has the greater mass, or the most models; none: all of them
        normalize: divide by the weights that were merged; default: only with an election
    """
    shares = torch.tensor(parameter.each(density, "density"))[:, None, None]
    streams = [parameter.stream(f"dare {model}") for model in range(parameter.models)]

    def keep(piece: Piece) -> torch.Tensor:
        size = piece.updates[0].numel()
        drawn = torch.stack([stream.at(piece.start).uniform(size) for stream in streams]).view_as(piece.updates)
        return piece.updates * (drawn < shares)

    factors = torch.where(shares > 0, 1 / shares, 0.0) if rescale == "density" else torch.ones_like(shares)
    if rescale == "norm":
        factors = parameter.ratio(lambda piece: piece.updates.abs(), lambda piece: keep(piece).abs())
    return merged_changes(parameter, lambda piece: keep(piece) * factors, elect, normalize)
