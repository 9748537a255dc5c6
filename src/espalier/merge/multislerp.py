"""Spherical interpolation of any number of models."""

from __future__ import annotations

from typing import Literal

import torch

from espalier.delta.merging import Combine, Parameter, combination
from espalier.errors import EspalierError
from espalier.registry import merger


@merger("multislerp", ids=(), paper="goddard.blog, multi-SLERP, 2025")
def multislerp(parameter: Parameter, *, normalize: bool = True, of: Literal["models", "updates"] = "models") -> Combine:
    """A weighted mean on the sphere: in the tangent space at the weighted Euclidean mean, and back; one step of ``karcher``.

    All vectors that come up are combinations of the models, so their inner products are all that it needs.

    Args:
        normalize: whether the weights are divided by their sum
        of: interpolate the models, or what they changed of the base
    """
    if parameter.models == 1:
        return combination(parameter, [1.0], of)
    weights = (parameter.shares() if normalize else parameter.weights).double()
    gram = parameter.gram(of)
    norms = gram.diagonal().sqrt()
    unit = torch.where(norms > 0, 1 / norms, 0.0)
    mean = weights * unit
    length = float((mean @ gram @ mean).clamp_min(0).sqrt())
    if length < 1e-8:
        if parameter.models == 2:
            return combination(parameter, weights.tolist(), of)
        raise EspalierError("the weighted sum of the models' directions is zero, so there is no mean on the sphere; use other weights")
    mean = mean / length
    dots = unit * (gram @ mean)
    tangent = weights * unit - (weights * dots).sum() * mean
    size = (tangent @ gram @ tangent).clamp_min(0).sqrt() + 1e-8
    made = (mean * torch.cos(size) + tangent * (torch.sin(size) / size)) * (norms * weights).sum()
    return combination(parameter, made.tolist(), of)
