"""AdamW, from torch."""

from __future__ import annotations

from typing import Any

import torch

from espalier.errors import EspalierError, at_least
from espalier.registry import optimizer


@optimizer("adamw", ids=(), paper="arXiv:1711.05101")
class AdamW:
    """Adam with decoupled weight decay: ``w -= lr (m / (sqrt(v) + eps) + decay w)``; torch's fused kernel.

    State: two float32 numbers per trained number, and a step count per tensor. Decay acts on tensors of
    two or more dimensions only.
    """

    beta1: float = 0.9
    """decay of the mean of the gradients, in [0, 1)"""
    beta2: float = 0.95
    """decay of the mean of their squares, in [0, 1)"""
    epsilon: float = 1e-8
    """added to the root of the mean square, at least 0"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""

    def check(self) -> None:
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise EspalierError(f"{name} is {value}; it must be at least 0 and less than 1")
        at_least("epsilon", self.epsilon, 0)
        at_least("weight_decay", self.weight_decay, 0)

    def build(self, parameters: dict[str, torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer over named parameters."""
        decayed = [p for p in parameters.values() if p.ndim >= 2]
        others = [p for p in parameters.values() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": self.weight_decay}]
        groups.append({"params": others, "weight_decay": 0.0})
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            fused=True,
        )

    def state_bytes(self, trained: int) -> int:
        """Bytes of state for ``trained`` float32 numbers."""
        return 8 * trained
