"""DoRA: direction by a low-rank update, magnitude by one number a row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import LowRank, Magnitude
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("dora", ids=(), paper="arXiv:2402.09353", learning_rate=2e-4)
class DoRA(Adapter):
    """Train magnitude and direction apart: ``W' = m (W + (alpha / r) B A) / ||W + (alpha / r) B A||``.

    The norm is of each output row (PEFT's convention), a constant of the step (section 4.3 of the paper).
    m (out,) starts at the rows' norms, B at zero, so the start is the base. Embeddings are treated by the
    same rule in their logical shape (vocabulary, hidden), so a tied head sees the same matrix.
    """

    rank: int = 16
    """rank r of the direction's update, at least 1"""
    alpha: float = 32.0
    """the direction's update is multiplied by alpha / rank"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        B = torch.zeros(*target.lead, target.outputs, self.rank)
        A = stream.kaiming_uniform(*target.lead, self.rank, target.inputs)
        inner = LowRank(B.to(weight.device), A.to(weight.device), self.alpha / self.rank)
        return {"magnitude": nn.Parameter(Magnitude.row_norms(weight, inner)), "B": nn.Parameter(B), "A": nn.Parameter(A)}

    def update(self, part: Any, context: Any) -> Magnitude:
        return Magnitude(part.magnitude, LowRank(part.B, part.A, self.alpha / self.rank), part.gain)

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * (self.rank * (target.outputs + target.inputs) + target.outputs)
