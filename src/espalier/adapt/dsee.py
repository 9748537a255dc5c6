"""DSEE: a low-rank update and a few single entries where the weight itself is not of low rank."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import LowRank, Sparse, Sum
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter

STEP, ROUNDS, LAST = 5, 2, 8
"""Directions that the low-rank part gains at a time, rounds at each size, and rounds at the last."""


@adapter("dsee", ids=(137,), paper="arXiv:2111.00160", learning_rate=2e-4)
class DSEE(Adapter):
    """Train a low-rank and a sparse update: ``W' = W + (alpha / r) (B A + P_Omega(s))``.

    B (out, r) and the n values s start at zero, so the start is the base. The support Omega is where the pretrained
    weight is furthest from low rank: the n entries of S in ``W ~ U V + S``, found greedily. The authors' S holds all
    residuals above 0.01, nearly all there are at usual weights, so that U V stays what it was drawn as and Omega is little else
    than W's largest entries; and they take 200 QR factorizations. Here S holds exactly n entries and U V has rank
    r (GoDec). Omega may also be W's largest entries, or random ones. alpha / r multiplies s too, so its learning rate
    depends on r. Pruning by the update, the paper's second step, is a matter of pruning.
    """

    rank: int = 16
    """rank r of the low-rank part, at least 1"""
    entries: int = 16
    """n: entries of each matrix in the sparse part, at least 1"""
    alpha: float = 32.0
    """the update is multiplied by alpha / rank"""
    support: Literal["decomposition", "magnitude", "random"] = "decomposition"
    """where the entries are: of the weight's sparse part, its largest ones, or anywhere"""
    kept = ("index",)

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        at_least("entries", self.entries, 1)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        A = stream.kaiming_uniform(*target.lead, self.rank, target.inputs)
        size = target.outputs * target.inputs
        experts = weight.reshape(-1, target.outputs, target.inputs)
        positions = torch.cat([number * size + self._support(expert.float(), stream) for number, expert in enumerate(experts)])
        tensors: Tensors = {"index": positions.to(torch.int32 if target.size < 2**31 else torch.int64)}
        B = torch.zeros(*target.lead, target.outputs, self.rank)
        return tensors | {"B": nn.Parameter(B), "A": nn.Parameter(A), "s": nn.Parameter(torch.zeros(len(positions)))}

    def _support(self, weight: torch.Tensor, stream: Stream) -> torch.Tensor:
        """The positions of the entries of one matrix, ascending."""
        count = min(self.entries, weight.numel())
        if self.support == "random":
            return stream.choice(weight.numel(), count).to(weight.device)
        if self.support == "decomposition":
            return decompose(weight, self.rank, count, stream)[2].sort().values
        return weight.flatten().abs().sort(descending=True, stable=True).indices[:count].sort().values

    def gain(self, target: Target) -> float:
        return self.alpha / self.rank

    def update(self, part: Any, context: Any) -> Sum:
        sparse = Sparse(part.s, part.index, part.target.shape)
        sparse.even = True  # every expert has its own n entries
        return Sum([LowRank(part.B, part.A), sparse], part.gain)

    def count(self, target: Target) -> int:
        size = target.outputs * target.inputs
        return math.prod(target.lead) * (self.rank * (target.outputs + target.inputs) + min(self.entries, size))


def decompose(
    weight: torch.Tensor, rank: int, entries: int, stream: Stream
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """``W ~ U V + S``: U (out, r), V (r, in), the positions (entries,) of S, and the error ``||W - U V - S||`` of each round."""
    V, S, errors = stream.gaussian(1, weight.shape[1]).to(weight), torch.zeros_like(weight), []
    while True:
        more = min(STEP, rank - len(V), min(weight.shape) - len(V))
        for _ in range(ROUNDS if more > 0 else LAST):
            rest = weight - S
            U = torch.linalg.qr(rest @ V.T).Q
            V = U.T @ rest
            left = (weight - U @ V).flatten()
            support = left.abs().topk(entries).indices
            S = torch.zeros_like(left).scatter(0, support, left[support]).view_as(weight)
            errors.append(torch.linalg.vector_norm(left - S.flatten()))
        if more <= 0:
            return U, V, support, errors
        residual = weight - U @ V - S
        V = torch.cat((V, torch.linalg.qr(residual[:, :more]).Q.T @ residual))  # the first rows of its R factor
