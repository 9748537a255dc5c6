"""SHiRA: a few entries of each matrix, drawn once, train."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Sparse, compact
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("shira", ids=(), paper="arXiv:2406.13175", learning_rate=2e-4)
class SHiRA(Adapter):
    """Train n entries of each matrix, as many as LoRA of rank r would: ``W' = W + S``, S sparse, n = r (out + in).

    The support is drawn once, uniformly, from the seed (the paper's SHiRA-Rand); the values start at zero, so the
    start is the base. The update is of high rank and touches a few numbers in a hundred, so that several of them
    disturb each other little. Of experts, the support is drawn over all of them.
    """

    rank: int = 16
    """r: trains r (out + in) entries of a matrix, or all where there are no more; at least 1"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        count = self.count(target)
        return {"values": nn.Parameter(torch.zeros(count)), "index": stream.choice(target.size, count)}

    def update(self, part: Any, context: Any) -> Sparse:
        return Sparse(part.values, part.index, part.target.shape, part.gain)

    def export(self, part: Any, pool: Any) -> Sparse:
        where = compact(part.index, part.target.size)
        return Sparse(part.values, where.get("index"), part.target.shape, part.gain, mask=where.get("mask"))

    def count(self, target: Target) -> int:
        return min(math.prod(target.lead) * self.rank * (target.outputs + target.inputs), target.size)
