"""BinaryAdapter: LoRA whose factors are trained through the codes of a few bits as which they are kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import LowRank, Quantized
from espalier.delta.forms.quantized import levels, small_normal, through_codes
from espalier.errors import at_least, one_of
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("binary", ids=(71,), paper="BinaryAdapter, ICCV 2023", learning_rate=1e-3)
class BinaryLoRA(Adapter):
    """Train factors through their quantizer: ``W' = W + s Q(B) Q(A)``, Q(w) = sd q((w - mu) / sd) + mu.

    q takes each number to the nearest of 2^b levels, medians of the parts of a standard normal; mu and sd are mean and
    deviation of the whole factor (of all experts together). The gradient passes q as if it were the identity, and
    mu and sd as they are. Stored are b bits a number, and mu and sd of each factor. A (r, in) starts as LoRA's, B (out, r)
    as a normal of deviation 0.001 cut at two deviations: one bit cannot be zero, so the start is near the base and not
    at it (:meth:`start_bound`). The paper adds 1e-5 to sd, which is not small beside this B; it is left out.
    """

    rank: int = 32
    """rank r of the update, at least 1"""
    bits: int = 1
    """b: bits a number, one of 1, 2, 3, 4 and 8"""
    scale: float = 1.0
    """s: multiplies the update; the paper searches it for each task, from 0.01 to 100"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        one_of("bits", self.bits, (1, 2, 3, 4, 8))

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        A = stream.kaiming_uniform(*target.lead, self.rank, target.inputs)
        B = small_normal(stream, *target.lead, target.outputs, self.rank)
        return {"B": nn.Parameter(B), "A": nn.Parameter(A), "levels": levels("normal", self.bits)}

    def start_bound(self, target: Target) -> float:
        """r s times the bounds of B, 0.002, and of A, 1 / sqrt(in), and a tenth each for levels beyond them."""
        return abs(self.scale) * self.rank * (1.1 * 2e-3) * (1.1 / math.sqrt(target.inputs))

    def gain(self, target: Target) -> float:
        return self.scale

    def update(self, part: Any, context: Any) -> LowRank:
        return LowRank(through_codes(part.B, part.levels), through_codes(part.A, part.levels), part.gain)

    def export(self, part: Any, pool: Any) -> Quantized:
        return Quantized.of(LowRank(part.B, part.A, part.gain), self.bits, codebook="normal")

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self.rank * (target.outputs + target.inputs)
