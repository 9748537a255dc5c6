"""SoRA: a low-rank update whose rank-one terms pass gates that training drives to zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Moment, Tensors
from espalier.delta.forms import LowRank
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.kernels.sharded import put, whole
from espalier.registry import adapter


@adapter("sora", ids=(226,), paper="arXiv:2311.11696", learning_rate=8e-4)
class SoRA(Adapter):
    """Train ``W' = W + (alpha / r) B diag(g) A`` with a proximal step on the gates: ``g <- sign(g) max(|g| - threshold, 0)``.

    B starts at zero, A uniform and g ~ N(0, 1) (r,), so the start is the base. The soft threshold after each step of the
    optimizer is the proximal operator of ``threshold ||g||_1`` (eq. 6); it grows linearly to ``last_threshold`` where that is
    given (the schedule of Algorithm 1, in one run). Gates that are exactly zero take their rank-one term out of the saved LoRA;
    they still get a gradient, and come back when a step on them exceeds the threshold. The released operator zeroes all
    |g| < 2 threshold; this one is the paper's.
    """

    rank: int = 8
    """r at the start, at least 1"""
    alpha: float = 16.0
    """the update is multiplied by alpha / rank"""
    threshold: float = 3e-4
    """what each step takes off every gate, at least 0"""
    last_threshold: float | None = None
    """the threshold at the last step; default: the same"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        at_least("threshold", self.threshold, 0)
        at_least("last_threshold", self.threshold if self.last_threshold is None else self.last_threshold, 0)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {
            "B": nn.Parameter(torch.zeros(*target.lead, target.outputs, self.rank)),
            "gate": nn.Parameter(stream.gaussian(*target.lead, self.rank)),
            "A": nn.Parameter(stream.kaiming_uniform(*target.lead, self.rank, target.inputs)),
        }

    def gain(self, target: Target) -> float:
        return self.alpha / self.rank

    def update(self, part: Any, context: Any) -> LowRank:
        return LowRank(part.B * part.gate.unsqueeze(-2), part.A, part.gain)

    def export(self, part: Any, pool: Any) -> LowRank:
        return self.update(part, None).without(part.gate == 0)

    def optimizer_options(self) -> Mapping[str, Mapping[str, float]]:
        return {"gate": {"weight_decay": 0.0}}

    reads_gradients = False

    def after_step(self, parts: Sequence[Any], moment: Moment, before: Any) -> None:
        last = self.threshold if self.last_threshold is None else self.last_threshold
        threshold = self.threshold + (last - self.threshold) * (moment.step + 1) / moment.steps
        for part in parts:
            put(part.gate, nn.functional.softshrink(whole(part.gate), threshold))

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self.rank * (target.outputs + target.inputs + 1)
