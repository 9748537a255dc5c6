"""IncreLoRA: low-rank updates that begin with one rank and grow where the loss is most sensitive to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

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

RESERVE = 1e-5
"""e of a reserve: enough for a gradient to reach its vectors."""


@adapter("increlora", ids=(50,), paper="arXiv:2308.12043", learning_rate=1e-3)
class IncreLoRA(Adapter):
    """Train ``W' = W + (alpha / rank) B diag(e) A`` with a number of active triplets that grows, matrix by matrix.

    Each matrix has one active triplet and ``step_rank`` reserves: vectors ~ N(0, 0.02^2) that learn a direction in advance, with
    e frozen at 1e-5. Every step, a matrix's sensitivity enters two moving averages, of itself and of its deviation, whose
    product is its score. From ``begin`` on, every ``interval`` steps, the ``matrices`` with the highest scores make their reserves
    active and get new ones, until the average rank is ``rank`` (never more); then reserves are switched off. The loss
    gains ``orthogonality`` times the mean of ``||B^T B - I||_F`` and ``||A A^T - I||_F``, over all active and reserve vectors
    together. New triplets warm up over ``interval`` steps of their own, then go by the run's schedule (the authors' decay by their own).

    Departures: room for ``most`` triplets is there from the start, so that shapes stand still (unused ones are zero and
    frozen); the sensitivity is ``sum_k |e_k dL/de_k| / sqrt(size)``, which needs no dense gradient, where the official code
    takes ``sum |W_delta dL/dW_delta| / sqrt(size)``; with ``scaling="per-rank"`` the divisor is the active rank as in the official
    code, which shrinks what was learnt whenever ranks are added.
    """

    rank: int = 4
    """average rank at the end, at least 1"""
    most: int = 16
    """largest rank of a matrix, at least rank"""
    alpha: float = 32.0
    """the update is multiplied by alpha / rank"""
    scaling: Literal["constant", "per-rank"] = "constant"
    """divide by rank, or by the matrix's active rank"""
    step_rank: int = 1
    """triplets that a matrix gains at a time, at least 1"""
    matrices: int = 4
    """matrices that gain at a time, at least 1"""
    begin: float = 0.05
    """share of the steps before the first growth, in [0, 1]"""
    end: float = 0.6
    """share of the steps after which the budget must be reached: sets the interval between growths, in [begin, 1]"""
    orthogonality: float = 0.1
    """weight of the penalty, at least 0"""
    decay: float = 0.85
    """of both moving averages, in [0, 1)"""

    kept = ("active", "born", "sensitivity", "uncertainty")

    def check(self) -> None:
        for name in ("rank", "step_rank", "matrices"):
            at_least(name, getattr(self, name), 1)
        at_least("most", self.most, self.rank)
        at_least("orthogonality", self.orthogonality, 0)
        for name, least in (("begin", 0.0), ("end", self.begin), ("decay", 0.0)):
            within(name, getattr(self, name), least, 1)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        e = torch.zeros(*target.lead, self.most)
        e[..., 1 : 1 + self.step_rank] = RESERVE
        return {
            "B": nn.Parameter(0.02 * stream.gaussian(*target.lead, target.outputs, self.most)),
            "e": nn.Parameter(e),
            "A": nn.Parameter(0.02 * stream.gaussian(*target.lead, self.most, target.inputs)),
            "active": torch.tensor(1), "born": torch.zeros(self.most), "sensitivity": torch.zeros(()), "uncertainty": torch.zeros(()),
        }  # fmt: skip

    def start_bound(self, target: Target) -> float:
        """Of the reserves: their vectors' entries lie within 6 standard deviations."""
        return self.step_rank * self.gain(target) * RESERVE * (6 * 0.02) ** 2

    def gain(self, target: Target) -> float:
        return self.alpha / self.rank

    def update(self, part: Any, context: Any) -> LowRank:
        gain = part.gain if self.scaling == "constant" else part.gain * self.rank / part.active
        return LowRank(part.B * part.e.unsqueeze(-2), part.A, gain)

    def export(self, part: Any, pool: Any) -> LowRank:
        return self.update(part, None).without((part.e == 0) | (part.e == RESERVE))

    def _used(self, part: Any) -> int:
        """How many triplets have vectors that train."""
        return min(self.most, int(part.active) + self.step_rank * bool((whole(part.e)[..., int(part.active) :] != 0).any()))

    def frozen(self, part: Any, moment: Moment) -> Mapping[str, torch.Tensor | bool]:
        number = torch.arange(self.most, device=part.e.device)
        unused = number >= self._used(part)
        return {"e": number >= part.active, "B": unused, "A": unused.unsqueeze(-1)}

    def penalty(self, parts: Sequence[Any]) -> torch.Tensor:
        used = [(part, self._used(part)) for part in parts]
        return self.orthogonality * distance_from_orthogonal((whole(part.B)[..., :n], whole(part.A)[..., :n, :]) for part, n in used)

    def _interval(self, parts: int, steps: int) -> int:
        """Steps between growths."""
        rounds = math.ceil((self.rank - 1) * parts / (min(self.matrices, parts) * self.step_rank))
        return max(1, math.floor((self.end - self.begin) * steps / max(rounds, 1)))

    def _grows(self, step: int, steps: int, interval: int) -> bool:
        """Whether there is a growth after a step, the first of which is 1; after ``end`` there is one in each, until the budget is reached."""
        since = step - math.ceil(self.begin * steps)
        return since >= 0 and (since % interval == 0 or step > self.end * steps)

    def check_run(self, parts: Sequence[Any], steps: int) -> None:
        interval = self._interval(len(parts), steps)
        growths = sum(self._grows(step, steps, interval) for step in range(1, steps + 1))
        if growths * min(self.matrices, len(parts)) * self.step_rank < (self.rank - 1) * len(parts):
            raise EspalierError(
                f"the run is too short for an average rank of {self.rank}: its {steps} steps have room for {growths} growths of {self.matrices} "
                f"matrices by {self.step_rank}, on {len(parts)} matrices; take more steps, a lower --rank, or a higher --matrices or --step-rank"
            )

    def before_step(self, parts: Sequence[Any], moment: Moment) -> list[dict[str, torch.Tensor]]:
        return [{name: whole(getattr(part, name)).clone() for name in ("B", "e", "A")} for part in parts]

    def after_step(self, parts: Sequence[Any], moment: Moment, before: list[dict[str, torch.Tensor]]) -> None:
        goal, total = self.rank * len(parts), sum(int(part.active) for part in parts)
        interval = self._interval(len(parts), moment.steps)
        for part, was in zip(parts, before, strict=True):
            if part.e.grad is not None:  # where another method does not leave it out of this step
                sensitivity = (was["e"] * whole(part.e.grad)).abs().sum() / math.sqrt(part.target.size)
                average_in(sensitivity, part.sensitivity, part.uncertainty, self.decay)
            # new triplets warm up
            share = ((moment.step + 1 - part.born) / interval).clamp(0, 1)
            for name, axis in (("B", 0), ("e", 0), ("A", 1)):
                now, factor = whole(getattr(part, name)), share.unsqueeze(-1) if axis else share
                put(getattr(part, name), was[name] + factor * (now - was[name]))
        if total < goal and self._grows(moment.step + 1, moment.steps, interval):
            self._grow(parts, goal - total, moment.step + 1)
        if sum(int(part.active) for part in parts) == goal:
            for part in parts:
                put(part.e, whole(part.e) * (torch.arange(self.most, device=part.e.device) < part.active))

    def _grow(self, parts: Sequence[Any], left: int, step: int) -> None:
        room = [part for part in parts if int(part.active) < self.most]
        scores = [part.sensitivity * part.uncertainty for part in room]
        chosen = largest(scores, min(self.matrices, len(room)))
        for part in (part for part, mask in zip(room, chosen, strict=True) if mask):
            grown = min(self.step_rank, left, self.most - int(part.active))
            left -= grown
            part.active += grown
            part.born[int(part.active) : int(part.active) + self.step_rank] = step
            e = whole(part.e).clone()
            e[..., int(part.active) : int(part.active) + self.step_rank] = RESERVE
            put(part.e, e)

    def finish(self, parts: Sequence[Any]) -> None:
        total, goal = sum(int(part.active) for part in parts), self.rank * len(parts)
        if total != goal:
            raise EspalierError(f"{total} ranks have grown of {goal}: the run is too short for growths of {self.matrices} x {self.step_rank}; take more steps")

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self.most * (target.outputs + target.inputs + 1)
