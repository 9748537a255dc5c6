"""AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from espalier.memory.rule import Rule, Tensors
from espalier.registry import optimizer


@optimizer("adamw", ids=(), paper="arXiv:1711.05101")
class AdamW(Rule):
    """Adam with decoupled weight decay: ``w -= lr (m / (sqrt(v) + eps) + decay w)``; with its state in float32, torch's fused kernel.

    State: two numbers per trained number, and a step count per tensor. Decay acts on tensors of two or more dimensions only.
    """

    beta1: float = 0.9
    """decay of the mean of the gradients, in [0, 1)"""
    beta2: float = 0.95
    """decay of the mean of their squares, in [0, 1)"""
    epsilon: float = 1e-8
    """added to the root of the mean square, at least 0"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""

    slots = {"exp_avg": True, "exp_avg_sq": False}

    def directions(self, gradients: Tensors, state: Mapping[str, Tensors], steps: Sequence[int]) -> Tensors:
        means, squares = state["exp_avg"], state["exp_avg_sq"]
        torch._foreach_lerp_(means, gradients, 1 - self.beta1)
        torch._foreach_mul_(squares, self.beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - self.beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [math.sqrt(1 - self.beta2**step) for step in steps])
        torch._foreach_add_(roots, self.epsilon)
        torch._foreach_mul_(roots, [1 - self.beta1**step for step in steps])
        return list(torch._foreach_div(means, roots))

    def step_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return 0 if self.state == "fp32" else super().step_bytes(shapes)

    def build(self, parameters: Mapping[str, torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        if self.state != "fp32":
            return super().build(parameters, learning_rate)
        groups = [{"params": list(some.values()), "weight_decay": decay} for some, decay in self._groups(parameters)]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon, fused=True)
