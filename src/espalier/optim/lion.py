"""Lion: the sign of a mean of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from espalier.memory.rule import Rule, Tensors
from espalier.registry import optimizer


@optimizer("lion", ids=(18,), paper="arXiv:2302.06675")
class Lion(Rule):
    """``u = sign(beta1 m + (1 - beta1) g)``, ``w -= lr (u + decay w)``, then ``m <- beta2 m + (1 - beta2) g``.

    State: one number per trained number. A learning rate three to ten times lower than AdamW's, and a decay as many times
    larger. Numbers that get no gradient (rows of unused tokens) go on moving by the sign of their mean.
    """

    beta1: float = 0.95
    """weight of the mean in the step, in [0, 1)"""
    beta2: float = 0.98
    """decay of the mean, in [0, 1)"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""

    slots = {"exp_avg": True}
    working = 4

    def directions(self, gradients: Tensors, state: Mapping[str, Tensors], steps: Sequence[int]) -> Tensors:
        means = state["exp_avg"]
        made = list(torch._foreach_lerp(means, gradients, 1 - self.beta1))
        torch._foreach_lerp_(means, gradients, 1 - self.beta2)
        torch._foreach_sign_(made)
        return made
