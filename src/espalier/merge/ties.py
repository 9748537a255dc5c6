"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from typing import Literal

from espalier.delta.merging import Combine, Parameter
from espalier.kernels.merging import elect
from espalier.registry import merger


@merger("ties", ids=(), paper="arXiv:2306.01708")
def ties(
    parameter: Parameter, *, density: float | list[float] = 0.2, majority: Literal["mass", "count"] = "mass", normalize: bool = True
) -> Combine:
    """Keep the largest changes of every model, elect a sign for every number, average the changes of that sign.

    ``tau = sum_i w_i t_i [sgn t_i = gamma] / sum_i w_i [sgn t_i = gamma]`` with t_i the kept share of update i, and
    gamma the sign of ``sum_i w_i t_i`` (a tie is positive).

    Args:
        density: share of the numbers of a tensor that each model keeps, in [0, 1]; exactly int(share * numbers), one at least
        majority: what elects the sign: the sum of weighted changes, or how many models have it
        normalize: whether what agrees is averaged; else it is summed
    """
    kept = parameter.largest([parameter.count(share) for share in parameter.each(density, "density")])
    weights, mass, scale = parameter.weights, majority == "mass", parameter.scale
    return lambda piece: elect(piece.stored, weights, mass, normalize, scale, kept.limits, kept.ties)
