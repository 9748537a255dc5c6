"""NearSwap: a model's small changes in full, its large ones cut short."""

from __future__ import annotations

from espalier.delta.merging import Combine, Parameter
from espalier.errors import EspalierError
from espalier.registry import merger


@merger("nearswap", ids=(), paper="Alchemonaut, QuartetAnemoi-70B, 2024")
def nearswap(parameter: Parameter, *, t: float = 1e-3) -> Combine:
    """The base moved towards one model, by at most t in every number: ``theta_0 + clip(tau, -t, t)``.

    Other tools write it as an interpolation by ``clip(t / |tau|, 0, 1)``, which is the same.

    Args:
        t: the largest change of a number
    """
    if parameter.models != 1:
        raise EspalierError(f"nearswap takes one model and a base, there are {parameter.models} models")
    if t < 0:
        raise EspalierError(f"t is {t}; it must be at least 0")
    return lambda piece: piece.origin + piece.updates[0].clamp_(-t, t) * parameter.scale
