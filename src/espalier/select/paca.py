"""PaCA: train a few input columns of each weight and save only their slice of the activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Columns
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("paca", ids=(254,), paper="PaCA, ICLR 2025", learning_rate=2e-4)
class PaCA(Adapter):
    """Train r random input columns J of each matrix: ``W'[:, J] = W[:, J] + P``, P (out, r) starting at zero.

    J is drawn once, the same for matrices that read the same input (q, k and v; gate and up), from the
    seed. The paper trains the columns in place with a factor s = alpha / r that silently multiplies the
    learning rate; here P is a packed leaf over a read-only base and s = 1, so the base is untouched,
    weight decay pulls towards it, and removing the delta is exact.
    """

    rank: int = 16
    """number r of columns that train, at least 1"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        shared = stream.named(f"{target.site} columns")
        index = [shared.choice(target.inputs, self.rank) for _ in range(math.prod(target.lead))]
        count = len(index[0])
        return {
            "P": nn.Parameter(torch.zeros(*target.lead, target.outputs, count)),
            "index": torch.stack(index).reshape(*target.lead, count),
        }

    def update(self, part: Any, context: Any) -> Columns:
        return Columns(part.P, part.index, part.target.inputs, part.gain)

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * target.outputs * min(self.rank, target.inputs)
