"""FLoRA: an update as a small core and a factor for each dimension of the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Tucker
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("tucker", ids=(14,), paper="FLoRA, arXiv:2405.14739", learning_rate=2e-4)
class TuckerAdapter(Adapter):
    """Train a core and a factor per dimension: ``W' = W + s G x_1 U_1 ... x_N U_N``.

    W (d_1, ..., d_N) may be a matrix, ``W' = W + s U_1 G U_2^T``; fused experts, of which U_1 mixes what they share; or
    a convolution, whose kernel keeps its shape. G (r_1, ..., r_N) starts at zero, so the start is the base; U_i (d_i,
    r_i) normal with variance 1 / (2 r_i), He's with a = sqrt 3. r_i is the rank, or d_i where that is less. Shapes are
    those of the stored weight, so a grouped convolution is one of in / groups channels, where the authors' code breaks.
    The paper tunes s per task and does not give its ranks.
    """

    rank: int = 16
    """rank of each dimension, at least 1; of a smaller dimension its size"""
    scale: float = 1.0
    """s: multiplies the update"""
    takes = "matrices and convolutions"

    def check(self) -> None:
        at_least("rank", self.rank, 1)

    def accepts(self, target: Target) -> bool:
        return len(target.shape) >= 2 and not target.role.endswith(".bias")

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        ranks = [min(size, self.rank) for size in target.shape]
        tensors: Tensors = {"core": nn.Parameter(torch.zeros(ranks))}
        for mode, (size, rank) in enumerate(zip(target.shape, ranks, strict=True)):
            tensors[f"factor_{mode}"] = nn.Parameter(stream.gaussian(size, rank) / math.sqrt(2 * rank))
        return tensors

    def gain(self, target: Target) -> float:
        return self.scale

    def update(self, part: Any, context: Any) -> Tucker:
        return Tucker(part.core, [getattr(part, f"factor_{mode}") for mode in range(part.core.ndim)], part.gain)

    def count(self, target: Target) -> int:
        ranks = [min(size, self.rank) for size in target.shape]
        return math.prod(ranks) + sum(size * rank for size, rank in zip(target.shape, ranks, strict=True))
