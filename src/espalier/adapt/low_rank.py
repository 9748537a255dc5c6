"""Low-rank weights: a product of two factors in the place of each matrix, trained from nothing or from its best approximation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Made
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("low-rank", ids=(), paper="arXiv:2209.13569", learning_rate=3e-3)
class LowRankWeights(Adapter):
    """Train ``W' = B A`` in the place of W: the baseline of low-rank pretraining.

    B (out, r) = U sqrt(s) and A (r, in) = sqrt(s) V of the r largest singular values of W (the paper's spectral start), random
    or trained: so the start is the best approximation of W that has rank r. In ``pretrain``, embeddings, head, norms and biases
    train whole. The paper's decay of the product, in the place of the factors', is left out.
    """

    rank: int = 128
    """r, at least 1; at most that of the matrix"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        U, s, V = torch.linalg.svd(weight.float(), full_matrices=False)
        root = s[..., : self.rank].sqrt()
        B, A = U[..., : self.rank] * root.unsqueeze(-2), root.unsqueeze(-1) * V[..., : self.rank, :]
        return {"B": nn.Parameter(B.contiguous()), "A": nn.Parameter(A.contiguous())}

    def update(self, part: Any, context: Any) -> Made:
        return Made(part.B, part.A, shape=part.target.shape)

    def start_bound(self, target: Target) -> float:
        return math.inf

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * min(self.rank, target.outputs, target.inputs) * (target.outputs + target.inputs)
