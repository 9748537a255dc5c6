"""Spherical interpolation of two models."""

from __future__ import annotations

from typing import Literal

import torch

from espalier.delta.merging import Combine, Parameter, Piece, combination, scaled
from espalier.errors import EspalierError
from espalier.registry import merger

COLLINEAR = 0.9995
"""Cosine above which the arc is as good as straight."""


def _factors(gram: torch.Tensor, t: float) -> torch.Tensor:
    """The shares of both, (..., 2), from their inner products (..., 2, 2)."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    there = norms.amin(-1) > 1e-8
    cosine = torch.where(there, gram[..., 0, 1] / norms.prod(-1).clamp_min(1e-16), 1.0).clamp(-1, 1)
    angle = cosine.acos()
    straight = cosine.abs() > COLLINEAR
    sine = torch.where(straight, 1.0, angle.sin())
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(straight, t, (t * angle).sin() / sine)
    return torch.stack([first, second], -1)


@merger("slerp", ids=(), paper="Shoemake, SIGGRAPH 1985")
def slerp(
    parameter: Parameter,
    *,
    t: float = 0.5,
    of: Literal["models", "updates"] = "models",
    per: Literal["tensor", "row"] = "tensor",
) -> Combine:
    """From the first of two models to the second along the arc between them, each tensor as one vector.

    ``sin((1-t) a) / sin(a) theta_1 + sin(t a) / sin(a) theta_2``, a their angle; a straight line where they are
    (anti)parallel. Of updates and by rows it is what other tools call NuSLERP.

    Args:
        t: how far to go, from 0 (the first) to 1 (the second)
        of: interpolate the models, or what they changed of the base
        per: whether there is one angle for a tensor, or one for each of its rows
    """
    if parameter.models != 2:
        raise EspalierError(f"slerp is between two models, there are {parameter.models}; multislerp and karcher take more")
    if per == "tensor":
        return combination(parameter, _factors(parameter.gram(of), t).tolist(), of)

    def arcs(piece: Piece) -> torch.Tensor:
        both = getattr(piece, of).transpose(0, 1)  # (rows, 2, columns)
        factors = _factors((both.double() @ both.double().mT), t).float()
        return (factors[..., None] * both).sum(1)

    if of == "updates":
        return lambda piece: piece.origin + parameter.scale * arcs(piece)
    return scaled(parameter, arcs)
