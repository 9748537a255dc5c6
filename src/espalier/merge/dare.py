"""DARE: drop changes at random, rescale what is left."""

from __future__ import annotations

from typing import Literal

import torch

from espalier.delta.merging import Combine, Parameter, Piece, merged_changes
from espalier.errors import EspalierError
from espalier.kernels.merging import Draws, drop, masses
from espalier.kernels.merging import elect as elect_sign
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
    shares = parameter.each(density, "density")
    for share in shares:
        if not 0 <= share <= 1:
            raise EspalierError(f"density is {share}; it must be from 0 to 1")
    factors = [1 / share if share and rescale == "density" else 1.0 for share in shares]
    streams = [parameter.stream(f"dare {model}") for model in range(parameter.models)]

    def draws(piece: Piece) -> Draws:
        return Draws([stream.at(piece.start) for stream in streams], shares, factors)

    if rescale == "norm":
        factors = parameter.ratio(lambda piece: masses(piece.stored, draws(piece))).tolist()
    if elect != "none":
        weights, by_mass, scale = parameter.weights, elect == "mass", parameter.scale
        return lambda piece: elect_sign(piece.stored, weights, by_mass, normalize is not False, scale, draws=draws(piece))

    def keep(piece: Piece) -> torch.Tensor:
        drop(piece.stored, draws(piece), piece.spare.flatten(1))
        return piece.spare

    return merged_changes(parameter, keep, elect, normalize)
