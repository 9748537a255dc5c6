"""Gradual magnitude pruning: the smallest weights are set to zero while the model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from espalier.anatomy.target import Target
from espalier.attach.masked import Masked, matrices_of
from espalier.attach.method import Moment, Tensors
from espalier.budget.gradual import Gradual
from espalier.delta.selection import across, kept, largest_mask
from espalier.errors import EspalierError, at_least, within
from espalier.kernels.philox import Stream
from espalier.kernels.sharded import whole
from espalier.registry import adapter


@adapter("gradual-magnitude", ids=(106, 202), paper="arXiv:1710.01878", learning_rate=2e-5, size="")
class GradualMagnitude(Masked):
    """Train ``W' = V`` and prune V by magnitude: the sparsity rises from ``initial_sparsity`` to ``sparsity`` between ``begin`` and ``end``.

    Cubic: ``s_f + (s_i - s_f) (1 - t)^3`` for t from 0 to 1 (eq. 1), every ``interval`` steps; geometric: the same share of what is
    left goes each time (#202, arXiv:2501.12486, whose window is 0.25 to 0.75 of the run). After each pruning exactly
    ``round((1 - s) * size)`` entries of every matrix live, or of all together. What is pruned is exactly zero, under any
    momentum and decay, and stays so: unlike in the released code, whose hidden weights may come back. The result records the average of
    the parameter counts of all steps, on which the scaling law of sparse pretraining depends (``train/sparse_laws.py``).
    """

    sparsity: float = 0.5
    """share that is zero at the end, in [0, 1)"""
    initial_sparsity: float = 0.0
    """share that is zero from the first pruning on, in [0, sparsity]"""
    begin: float = 0.25
    """share of the steps after which pruning begins, in [0, 1]"""
    end: float = 0.75
    """share of the steps after which it is done and the mask stands, in [begin, 1]"""
    interval: int = 10
    """steps between prunings, at least 1"""
    fall: Literal["cubic", "geometric"] = "cubic"
    """how the number of parameters falls in between"""
    scope: Literal["matrix", "global"] = "matrix"
    """whether every matrix has that sparsity, or all of them together"""

    kept = ("live",)

    def check(self) -> None:
        super().check()
        within("initial_sparsity", self.initial_sparsity, 0, self.sparsity)
        within("begin", self.begin, 0, 1)
        within("end", self.end, self.begin, 1)
        at_least("interval", self.interval, 1)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return self.masked(weight, torch.ones(target.shape, dtype=torch.bool, device=weight.device))

    def course(self, steps: int) -> Gradual:
        """When how much is pruned in a run of so many steps."""
        return Gradual.of(steps, self.begin, self.end, self.interval, self.initial_sparsity, self.sparsity, self.fall)

    def after_step(self, parts: Sequence[Any], moment: Moment, before: Any) -> None:
        course, done = self.course(moment.steps), moment.step + 1
        if course.prunes(done) and course.at(done) > 0:
            self._prune(parts, 1 - course.at(done))
        super().after_step(parts, moment, before)

    def _prune(self, parts: Sequence[Any], density: float) -> None:
        def magnitudes() -> Any:
            return (whole(part.values).abs().reshape(-1) * part.live.reshape(-1) for part in parts)

        if self.scope == "global":
            cut = across(magnitudes, density)
            for part, vector in zip(parts, magnitudes(), strict=True):
                live = torch.zeros_like(vector, dtype=torch.bool)
                live[cut.take(vector)] = True
                part.live.copy_(live.view(part.live.shape))
            return
        for part in parts:
            experts, size = matrices_of(part.target)
            scores = torch.where(part.live, whole(part.values).abs(), -1.0).reshape(experts, size)
            part.live.copy_(largest_mask(scores, kept(size, density)).view(part.live.shape))

    def finish(self, parts: Sequence[Any]) -> None:
        sizes = [[size] * experts for experts, size in (matrices_of(part.target) for part in parts)]
        allowed = [sum(kept(size, 1 - self.sparsity) for size in one) for one in sizes]
        live = [int(whole(part.values).count_nonzero()) for part in parts]
        if self.scope == "global":
            allowed, live = [kept(sum(map(sum, sizes)), 1 - self.sparsity)], [sum(live)]
        if over := [(a, b) for a, b in zip(live, allowed, strict=True) if a > b]:
            raise EspalierError(f"{over[0][0]} entries are left where a sparsity of {self.sparsity} allows {over[0][1]}")

    def report(self, parts: Sequence[Any], steps: int) -> dict[str, Any]:
        found, mean = super().report(parts, steps), self.course(steps).mean_density()
        return {**found, "mean_density": mean, "mean_parameters": round(mean * found["prunable"])}
