"""ALLoRA: LoRA without scale and dropout, whose rows learn the faster the smaller their update still is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Moment, Tensors
from espalier.delta.forms import LowRank
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.kernels.sharded import put, whole
from espalier.registry import adapter


@adapter("allora", ids=(150,), paper="arXiv:2410.09692", learning_rate=2e-4)
class ALLoRA(Adapter):
    """Train ``W' = W + B A``, each row i of B at ``1 / sqrt(||(B A)_i|| + 1 / eta^2)`` times the learning rate.

    B starts at zero, so the factor starts at eta and fades as the row grows. With ``scale="update"`` it multiplies the step
    that the optimizer took (Adam divides a factor on the gradient out again); with ``"gradient"`` the gradient, before
    clipping. The norm is of the current row, without gradient: ``||(B A)_i||^2 = B_i (A A^T) B_i^T``. No official code was
    found: this is the paper's equation on B; A learns as in LoRA.
    """

    rank: int = 16
    """rank r of the update, at least 1"""
    eta: float = 4.0
    """the factor at the start, more than 0"""
    scale: Literal["update", "gradient"] = "update"
    """what the factor multiplies"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        if not 0 < self.eta < math.inf:
            raise EspalierError(f"eta is {self.eta!r}; it must be more than 0 and finite")

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {
            "B": nn.Parameter(torch.zeros(*target.lead, target.outputs, self.rank)),
            "A": nn.Parameter(stream.kaiming_uniform(*target.lead, self.rank, target.inputs)),
        }

    def update(self, part: Any, context: Any) -> LowRank:
        return LowRank(part.B, part.A, part.gain)

    def factors(self, part: Any) -> torch.Tensor:
        """The factor of every row, (..., out, 1)."""
        B, A = whole(part.B), whole(part.A)
        norms = (B @ (A @ A.transpose(-1, -2)) * B).sum(-1, keepdim=True).clamp_min(0).sqrt()
        return (norms + 1 / self.eta**2).rsqrt()

    def before_step(self, parts: Sequence[Any], moment: Moment) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = [(whole(part.B).clone(), self.factors(part)) for part in parts]
        for part, (_, factors) in zip(parts, found, strict=True):
            if self.scale == "gradient" and part.B.grad is not None:
                put(part.B.grad, whole(part.B.grad) * factors)
        return found

    def after_step(self, parts: Sequence[Any], moment: Moment, before: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for part, (B, factors) in zip(parts, before, strict=True):
            if self.scale == "update":
                put(part.B, B + factors * (whole(part.B) - B))

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self.rank * (target.outputs + target.inputs)
