"""LoHa: the product, entry by entry, of two low-rank matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Hadamard
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("loha", ids=(), paper="arXiv:2108.06098", learning_rate=1e-3)
class LoHa(Adapter):
    """Train two low-rank matrices and multiply them entry by entry: ``W' = W + (alpha / r) (B1 A1) * (B2 A2)``.

    B1, B2 (out, r) and A1, A2 (r, in) train as many numbers as LoRA of rank 2 r, and the update's rank is up to r^2
    (FedPara; LoHa, arXiv:2309.14859). A2 starts at zero, so the start is the base; the others as PEFT's.
    """

    rank: int = 8
    """rank r of each of the two matrices, at least 1"""
    alpha: float = 8.0
    """the update is multiplied by alpha / rank"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        B, A = (*target.lead, target.outputs, self.rank), (*target.lead, self.rank, target.inputs)
        drawn = {name: nn.Parameter(stream.kaiming_uniform(*shape)) for name, shape in (("B1", B), ("A1", A), ("B2", B))}
        return {**drawn, "A2": nn.Parameter(torch.zeros(A))}

    def gain(self, target: Target) -> float:
        return self.alpha / self.rank

    def update(self, part: Any, context: Any) -> Hadamard:
        return Hadamard(part.B1, part.A1, part.B2, part.A2, part.gain)

    def count(self, target: Target) -> int:
        return 2 * math.prod(target.lead) * self.rank * (target.outputs + target.inputs)
