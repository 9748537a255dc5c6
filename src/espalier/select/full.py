"""Full tuning: every number of the chosen parameters trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Replace
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("full", ids=(), paper="", learning_rate=2e-5, targets="all", size="")
class Full(Adapter):
    """Train the parameters themselves: ``W' = V``, V starting at W, kept in the trained dtype (float32).

    Products use V rounded to the dtype of the activations, so a bf16 model trains with float32 master
    values and small steps are not lost to rounding. The stored delta holds V rounded to the base's dtype:
    applying it gives exactly the model that was evaluated.
    """

    def accepts(self, target: Target) -> bool:
        return True

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {"values": nn.Parameter(weight.clone(memory_format=torch.contiguous_format))}

    def update(self, part: Any, context: Any) -> Replace:
        return Replace(part.values)

    def export(self, part: Any, pool: Any) -> Replace:
        return Replace(part.values.to(part.base_dtype))

    def count(self, target: Target) -> int:
        return target.size
