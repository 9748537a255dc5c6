"""MiSS: one block of numbers, repeated along the input of each matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Tiled
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("miss", ids=(123,), paper="arXiv:2409.15371", learning_rate=2e-4)
class MiSS(Adapter):
    """Train one block, repeated along the input: ``W' = W + D [I I ... I]``, I of rank r.

    D (out, r) starts at zero, so the start is the base. The product sums the input's chunks of r entries and
    multiplies the sum by D, which is LoRA with a fixed A of zeros and ones, without A. Where r does not divide the
    inputs, the last copy is cut; where it is larger, it is the number of inputs. With ``mini_rank`` (PEFT's "mini")
    D repeats along the outputs too, and only its first rows train. PEFT's ``miss_block`` is D transposed.
    """

    rank: int = 64
    """r: columns of the block, at least 1"""
    mini_rank: int = 0
    """rows of the block, which then repeat along the outputs and must divide them; 0 for a row per output"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        at_least("mini_rank", self.mini_rank, 0)

    def _block(self, target: Target) -> tuple[int, ...]:
        rows = self.mini_rank or target.outputs
        if target.outputs % rows:
            raise EspalierError(f"mini_rank is {self.mini_rank}; it must divide the {target.outputs} outputs of {target.name}")
        return *target.lead, rows, min(self.rank, target.inputs)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {"block": nn.Parameter(torch.zeros(self._block(target)))}

    def update(self, part: Any, context: Any) -> Tiled:
        return Tiled(part.block, part.target.shape, part.gain)

    def count(self, target: Target) -> int:
        return math.prod(self._block(target))
