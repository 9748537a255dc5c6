"""LoRA: a low-rank update beside a frozen weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import LowRank
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("lora", ids=(), paper="arXiv:2106.09685", learning_rate=2e-4)
class LoRA(Adapter):
    """Train a rank-r update of each matrix: ``W' = W + (alpha / r) B A``.

    B (out, r) starts at zero and A (r, in) uniform in +-1/sqrt(in), so the start is the base. With
    ``scaling="rank-stabilized"`` the factor is alpha / sqrt(r) (arXiv:2312.03732), which keeps the size of
    the update's output independent of the rank. Fused experts get one pair each.
    """

    rank: int = 16
    """rank r of the update, at least 1"""
    alpha: float = 32.0
    """the update is multiplied by alpha / rank"""
    scaling: Literal["standard", "rank-stabilized"] = "standard"
    """alpha / rank, or alpha / sqrt(rank)"""
    ratio: float = 1.0
    """learning rate of B over that of A (LoRA+, arXiv:2402.12354, takes 16)"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        if not 0 < self.ratio < math.inf:
            raise EspalierError(f"ratio is {self.ratio!r}; it must be more than 0 and finite")

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {
            "B": nn.Parameter(torch.zeros(*target.lead, target.outputs, self.rank)),
            "A": nn.Parameter(stream.kaiming_uniform(*target.lead, self.rank, target.inputs)),
        }

    def gain(self, target: Target) -> float:
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def update(self, part: Any, context: Any) -> LowRank:
        return LowRank(part.B, part.A, part.gain)

    def optimizer_options(self) -> Mapping[str, Mapping[str, float]]:
        return {} if self.ratio == 1 else {"B": {"rate": self.ratio}}

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self.rank * (target.outputs + target.inputs)
