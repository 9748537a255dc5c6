"""What methods that train whole parameters share: values that take the place of the weight, in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Replace
from espalier.kernels.philox import Stream


class WholeTensors(Adapter):
    """``W' = V``: V starts at W; what is stored is V in the base's dtype. See ``select/full.py``."""

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
