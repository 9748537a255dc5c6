"""One model's tensors as they are, perhaps scaled: for stacks of layers."""

from __future__ import annotations

from espalier.delta.merging import Combine, Parameter
from espalier.errors import EspalierError
from espalier.registry import merger


@merger("passthrough", ids=(), paper="")
def passthrough(parameter: Parameter) -> Combine:
    """The one model's own numbers, times ``scale``."""
    if parameter.models != 1:
        raise EspalierError(f"passthrough takes one model for a tensor, there are {parameter.models}")
    return lambda piece: piece.models[0] if parameter.scale == 1 else piece.models[0] * parameter.scale
