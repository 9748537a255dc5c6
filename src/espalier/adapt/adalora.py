"""AdaLoRA: low-rank updates in the form of an SVD, whose least important triplets are pruned on a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Moment, Tensors
from espalier.budget.largest import largest
from espalier.budget.triplets import average_in, distance_from_orthogonal
from espalier.delta.forms import LowRank
from espalier.errors import EspalierError, at_least, within
from espalier.kernels.philox import Stream
from espalier.kernels.sharded import put, whole
from espalier.registry import adapter

_TRAINED = ("B", "e", "A")


@adapter("adalora", ids=(131,), paper="arXiv:2303.10512", learning_rate=1e-3)
class AdaLoRA(Adapter):
    """Train ``W' = W + (alpha / R) B diag(e) A`` and keep the best triplets of all matrices: P = B, Lambda = diag(e), Q = A.

    B (out, R), A (R, in) ~ N(0, 0.02^2) and e (R,) zero, so the start is the base. The loss gains ``orthogonality`` times
    the mean of ``||B^T B - I||_F`` and ``||A A^T - I||_F`` (eq. 4). Every step, the sensitivity ``|w dL/dw|`` of each number
    enters two moving averages, of itself and of its deviation, whose product is its importance (eqs. 8 to 10); a triplet's is
    that of e_k plus the means over its column of B and row of A (eq. 7). The budget of triplets falls cubically from R to
    ``rank`` a matrix between ``begin`` and ``end`` (eq. 11): those beyond it get e = 0, and may come back until the end, after
    which the pattern stands. Saved as LoRA of the ranks that are left. The divisor stays R. Unlike in the
    official code, exactly as many triplets stay as the budget says.
    """

    rank: int = 8
    """average rank of a matrix at the end, at least 1"""
    initial_rank: int | None = None
    """R at the start; default: 1.5 times rank"""
    alpha: float = 32.0
    """the update is multiplied by alpha / R"""
    orthogonality: float = 0.1
    """weight of the penalty, at least 0"""
    begin: float = 0.1
    """share of the steps after which the budget begins to fall, in [0, 1]"""
    end: float = 0.7
    """share of the steps after which it has fallen and the pattern stands, in [begin, 1]"""
    interval: int = 10
    """steps between prunings while it falls"""
    decay: float = 0.85
    """of both moving averages, in [0, 1)"""

    kept = tuple(f"{average}_{name}" for average in ("sensitivity", "uncertainty") for name in _TRAINED)

    def check(self) -> None:
        for name in ("rank", "interval"):
            at_least(name, getattr(self, name), 1)
        at_least("orthogonality", self.orthogonality, 0)
        at_least("initial_rank", self.most, self.rank)
        for name, least in (("begin", 0.0), ("end", self.begin), ("decay", 0.0)):
            within(name, getattr(self, name), least, 1)

    @property
    def most(self) -> int:
        """R, the rank at the start."""
        return self.initial_rank or math.ceil(1.5 * self.rank)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        tensors: Tensors = {
            "B": nn.Parameter(0.02 * stream.gaussian(*target.lead, target.outputs, self.most)),
            "e": nn.Parameter(torch.zeros(*target.lead, self.most)),
            "A": nn.Parameter(0.02 * stream.gaussian(*target.lead, self.most, target.inputs)),
        }
        return tensors | {name: torch.zeros_like(tensors[name.rpartition("_")[2]].detach()) for name in self.kept}

    def gain(self, target: Target) -> float:
        return self.alpha / self.most

    def update(self, part: Any, context: Any) -> LowRank:
        return LowRank(part.B * part.e.unsqueeze(-2), part.A, part.gain)

    def export(self, part: Any, pool: Any) -> LowRank:
        return self.update(part, None).without(part.e == 0)

    def penalty(self, parts: Sequence[Any]) -> torch.Tensor:
        return self.orthogonality * distance_from_orthogonal((whole(part.B), whole(part.A)) for part in parts)

    def budget(self, moment: Moment, triplets: int) -> int:
        """How many of ``triplets`` stay after a step: eq. 11."""
        least, done = triplets * self.rank // self.most, moment.step + 1
        begin, end = self.begin * moment.steps, self.end * moment.steps
        if done >= end or done == moment.steps:
            return least
        return least + int((triplets - least) * min(1 - (done - begin) / (end - begin), 1.0) ** 3) if done > begin else triplets

    def after_step(self, parts: Sequence[Any], moment: Moment, before: Any) -> None:
        step, end = moment.step + 1, self.end * moment.steps
        moved = [part for part in parts if part.e.grad is not None]  # all, but where another method leaves some out of a step
        for part in moved if step < end or step == 1 else ():
            for name in _TRAINED:
                tensor, mean, deviation = (getattr(part, key) for key in (name, f"sensitivity_{name}", f"uncertainty_{name}"))
                average_in(whole(tensor * tensor.grad).abs(), mean, deviation, self.decay)
        if step >= end or step == moment.steps or (step > self.begin * moment.steps and step % self.interval == 0):
            scores = [self._scores(part) for part in parts]
            for part, mask in zip(parts, largest(scores, self.budget(moment, sum(s.numel() for s in scores))), strict=True):
                put(part.e, whole(part.e) * mask)

    def _scores(self, part: Any) -> torch.Tensor:
        B, e, A = (getattr(part, f"sensitivity_{name}") * getattr(part, f"uncertainty_{name}") for name in _TRAINED)
        return e + B.mean(-2) + A.mean(-1)

    def finish(self, parts: Sequence[Any]) -> None:
        active, triplets = (sum(int(count(whole(part.e))) for part in parts) for count in (torch.count_nonzero, torch.numel))
        if active > triplets * self.rank // self.most:
            raise EspalierError(f"{active} triplets are left of {triplets}; the budget is {triplets * self.rank // self.most}")

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self.most * (target.outputs + target.inputs + 1)
