"""LaMDA: a small trained core between a frozen projection and one that freezes early."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Moment, Tensors
from espalier.budget.allocation import Item, allocate
from espalier.delta.forms import LowRank
from espalier.errors import at_least, within
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("lamda", ids=(156,), paper="arXiv:2406.12832", learning_rate=3e-4)
class LaMDA(Adapter):
    """Train ``W' = W + B S A - B0 S0 A`` with A frozen, S (r, r) trained, and the columns of B frozen one after the other.

    A and B start as the top right and left singular vectors of W and S as its singular values, so that B0 S0 A is the top of
    W and the start is the base (the residual is exact: W is never rewritten). With T steps, ``floor(r t / (freeze T))`` columns
    are frozen at step t, those of the largest singular values first; then S alone trains, r^2 numbers a matrix, and the
    backward pass needs r numbers a token of the adapter's input. The released code leaves out the factor r (and so freezes 3
    columns at most), zeroes gradients only, and starts from random factors; the formula here is the one it means.

    LaMDA++ (``ranks="energy"``): layers with flat spectra get more rank than peaked ones, between half and twice ``rank``, at
    the same sum: greedily by the energy that each further singular value adds. The paper's rule was not found; this is ours.
    """

    rank: int = 32
    """r, at least 1; cut to the sizes of smaller matrices"""
    freeze: float = 0.3
    """share of the steps after which B is frozen, in [0, 1]"""
    ranks: Literal["uniform", "energy"] = "uniform"
    """the same rank for all, or by the energy of their singular values (LaMDA++)"""

    surveys_ranks = True
    kept = ("A", "origin")

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        within("freeze", self.freeze, 0, 1)

    def survey(self, targets: Sequence[Target], weight: Callable[[Target], torch.Tensor], statistic: Any) -> Mapping[str, int]:
        if self.ranks == "uniform":
            return {}
        items = []
        for target in targets:
            energy = torch.linalg.svdvals(weight(target).float()).square().reshape(-1, min(target.outputs, target.inputs)).mean(0)
            left = 1 - (energy / energy.sum()).cumsum(0)
            levels = range(min(max(self.rank // 2, 1), len(left)), min(2 * self.rank, len(left)) + 1)
            items.append(Item(target.name, tuple(levels), tuple(left[[k - 1 for k in levels]].tolist())))
        found = allocate(items, sum(self._rank(t) for t in targets), "greedy")
        return {item.name: int(item.costs[found[item.name]]) for item in items}

    def _rank(self, target: Target) -> int:
        return min(self.rank, target.outputs, target.inputs)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return self.start_from(None, target, weight, stream)

    def start_from(self, finding: int | None, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        rank = finding or self._rank(target)
        U, s, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        U, s, Vh = U[..., :rank], s[..., :rank], Vh[..., :rank, :]
        return {
            "B": nn.Parameter(U.contiguous()), "S": nn.Parameter(torch.diag_embed(s)), "A": Vh.contiguous(),
            "origin": (U * s.unsqueeze(-2)).contiguous(),
        }  # fmt: skip

    def update(self, part: Any, context: Any) -> LowRank:
        return LowRank(part.B @ part.S - part.origin, part.A, part.gain)

    def frozen(self, part: Any, moment: Moment) -> Mapping[str, torch.Tensor | bool]:
        rank = part.S.shape[-1]
        still = rank if self.freeze == 0 else min(rank, math.floor(rank * moment.step / (self.freeze * moment.steps)))
        return {"B": True if still == rank else torch.arange(rank, device=part.S.device) < still}

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self._rank(target) * (target.outputs + self._rank(target))
