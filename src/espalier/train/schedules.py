"""Learning-rate schedules as pure functions: the factor of the peak rate at a step.

All warm up linearly over the first ``warmup`` steps; then ``constant``, ``linear`` and ``cosine`` (both to
``floor`` at the end) or ``wsd``: constant until the last ``decay`` part of the run, then linear to ``floor``
(warm-up, stable, decay: MiniCPM, arXiv:2404.06395).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Shape = Literal["cosine", "linear", "constant", "wsd"]
SHAPES: tuple[str, ...] = get_args(Shape)


def factor(shape: Shape, step: int, steps: int, warmup: int, floor: float = 0.0, decay: float = 0.2) -> float:
    """The factor in [0, 1] of step ``step`` (from 0) of ``steps``; the first warm-up step is not zero.

    Args:
        warmup: number of warm-up steps, less than ``steps``.
        floor: the factor at the end, in [0, 1].
        decay: for ``wsd``, the share of the steps that decay, in (0, 1].
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return 1.0 - (1.0 - floor) * progress
    if shape == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    start = steps - max(1, round(decay * steps))
    return 1.0 if step < start else 1.0 - (1.0 - floor) * (step - start + 1) / (steps - start + 1)
