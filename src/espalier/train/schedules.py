"""Learning-rate schedules as pure functions: the factor of the peak rate at a step.

All warm up linearly over the first ``warmup`` steps. Then ``constant``, ``linear`` and ``cosine`` (both to ``floor`` at the
end), or a trunk that does not know how long the run is and decays linearly to ``floor`` in the last ``decay`` part of it, so
that a longer run shares it: ``wsd`` (constant; warm-up, stable, decay: MiniCPM, arXiv:2404.06395, whose decay is exponential
and not linear), ``inverse_sqrt`` (1 / sqrt of the steps) and ``power`` (the Power scheduler, arXiv:2408.13359: a power of the tokens from a knee on, which
``train/laws.py`` says).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Shape = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "power"]
SHAPES: tuple[str, ...] = get_args(Shape)
EXPONENTS = {"inverse_sqrt": -0.5, "power": -0.51}


def factor(
    shape: Shape, step: int, steps: int, warmup: int, floor: float = 0.0, decay: float = 0.2, knee: float | None = None
) -> float:
    """The factor in [0, 1] of step ``step`` (from 0) of ``steps``; the first warm-up step is not zero.

    Args:
        warmup: number of warm-up steps, less than ``steps``.
        floor: the factor at the end, in [0, 1].
        decay: for shapes with a trunk, the share of the steps that decay, in (0, 1].
        knee: for ``power``, the step, counted from 1, after which the factor falls; default: where the warm-up ends.
    """
    if shape in ("wsd", *EXPONENTS):
        start = steps - max(1, round(decay * steps))
        start = max(start, warmup)
        begin = _trunk(shape, min(step, start), warmup, knee, floor)
        return begin if step < start else begin - (begin - floor) * (step - start + 1) / (steps - start + 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return 1.0 - (1.0 - floor) * progress
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _trunk(shape: str, step: int, warmup: int, knee: float | None, floor: float) -> float:
    """The factor of a run without an end."""
    if step < warmup:
        return _trunk(shape, warmup, warmup, knee, floor) * (step + 1) / (warmup + 1)
    if shape == "wsd":
        return 1.0
    from_here = warmup + 1 if knee is None or shape != "power" else knee
    return max(floor, min(1.0, ((step + 1) / from_here) ** EXPONENTS[shape]))
