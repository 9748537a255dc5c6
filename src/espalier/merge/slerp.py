"""Spherical interpolation of two models."""

from __future__ import annotations

import math
from typing import Literal

from espalier.delta.merging import Combine, Parameter, combination
from espalier.errors import EspalierError
from espalier.registry import merger

COLLINEAR = 0.9995
"""Cosine above which the arc is as good as straight."""


@merger("slerp", ids=(), paper="Shoemake, SIGGRAPH 1985")
def slerp(parameter: Parameter, *, t: float = 0.5, of: Literal["models", "updates"] = "models") -> Combine:
    """From the first of two models to the second along the arc between them, each tensor as one vector.

    ``sin((1-t) a) / sin(a) theta_1 + sin(t a) / sin(a) theta_2``, a their angle; a straight line where they are
    (anti)parallel.

    Args:
        t: how far to go, from 0 (the first) to 1 (the second)
        of: interpolate the models, or what they changed of the base
    """
    if parameter.models != 2:
        raise EspalierError(f"slerp is between two models, there are {parameter.models}; multislerp and karcher take more")
    gram = parameter.gram(of)
    first, second = gram.diagonal().sqrt().tolist()
    cosine = max(-1.0, min(1.0, float(gram[0, 1]) / (first * second))) if first > 1e-8 and second > 1e-8 else 1.0
    if abs(cosine) > COLLINEAR:
        return combination(parameter, [1 - t, t], of)
    angle = math.acos(cosine)
    return combination(parameter, [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)], of)
