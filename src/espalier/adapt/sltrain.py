"""SLTrain: weights that are the sum of a low-rank and a sparse matrix, trained from nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Made
from espalier.errors import at_least, within
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("sltrain", ids=(177,), paper="arXiv:2406.02214", learning_rate=3e-3)
class SLTrain(Adapter):
    """Train ``W' = (alpha / r) B A + S`` in the place of W, whatever W holds: for ``pretrain`` from random weights.

    B (out, r) starts at zero, A (r, in) and the ``floor(density * out * in)`` values of S uniform in +-1/sqrt(in); the support
    of S is drawn once, uniformly. So the start is a sparse matrix, as in the official code. The dense weight is built for each
    product, and again in the backward pass. The official code keeps the support as 64-bit integers, four times the bytes of
    values in bf16; here they have 32 bits. Embeddings, head, norms and biases train whole in ``pretrain``.
    """

    rank: int = 128
    """rank r of the low-rank part, at least 1"""
    alpha: float = 32.0
    """the low-rank part is multiplied by alpha / rank"""
    density: float = 0.03
    """share of the entries of each matrix that its sparse part has, in [0, 1]"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        within("density", self.density, 0, 1)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        size, count, experts = target.outputs * target.inputs, self._entries(target), math.prod(target.lead)
        A = stream.kaiming_uniform(*target.lead, self.rank, target.inputs)
        values = stream.kaiming_uniform(experts * count, fan_in=target.inputs)
        support = stream.named(f"support of {target.name}")
        index = torch.cat([expert * size + support.choice(size, count) for expert in range(experts)])
        return {
            "B": nn.Parameter(torch.zeros(*target.lead, target.outputs, self.rank)),
            "A": nn.Parameter(A),
            "values": nn.Parameter(values),
            "index": index.to(torch.int32 if target.size < 2**31 else torch.int64),
        }

    def update(self, part: Any, context: Any) -> Made:
        made = Made(part.B, part.A, part.values, part.index, self.alpha / self.rank, shape=part.target.shape)
        made.even = True  # every expert has as many entries
        return made

    def start_bound(self, target: Target) -> float:
        return math.inf

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * (self.rank * (target.outputs + target.inputs) + self._entries(target))

    def _entries(self, target: Target) -> int:
        return math.floor(self.density * target.outputs * target.inputs)
