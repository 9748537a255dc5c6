"""WiSE-FT: between a base and its fine-tuned model."""

from __future__ import annotations

from espalier.delta.merging import Combine, Parameter, combination
from espalier.errors import EspalierError
from espalier.registry import merger


@merger("wise_ft", ids=(161,), paper="arXiv:2109.01903; arXiv:2309.17230")
def wise_ft(parameter: Parameter, *, alpha: float = 0.5) -> Combine:
    """Interpolate a base and its fine-tuned model: ``(1 - alpha) theta_0 + alpha theta_1``.

    BANG is this for a model that was fine-tuned with label smoothing and Mixup, so that its logits do not outweigh the base's.

    Args:
        alpha: how far to go, from 0 (the base) to 1 (the model)
    """
    if parameter.models != 1:
        raise EspalierError(f"wise_ft is between the base and one model, there are {parameter.models}; linear averages more")
    return combination(parameter, [alpha], "updates")
