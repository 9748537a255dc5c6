"""MeZO: estimates of the gradient from two forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from espalier.errors import EspalierError, at_least
from espalier.memory import zeroth_order
from espalier.memory.rule import Rule, Tensors
from espalier.memory.zeroth_order import ZerothOrder
from espalier.registry import optimizer


@optimizer("mezo", ids=(), paper="arXiv:2305.17333")
class MeZO(Rule):
    """``w -= lr (g z + decay w)``, ``g = (L(w + eps z) - L(w - eps z)) / (2 eps)``, z standard normal, drawn anew from its seed.

    No gradients and no activations are kept: the memory of inference. With ``samples`` n, the mean over n directions. A rule
    that has state may take the estimates in the place of gradients, and then needs its memory. z is added in float32, and what
    rounding leaves of it stays in w; the loss is evaluated as in training, with the same dropout on both sides.
    """

    perturbation: float = 1e-3
    """eps, more than 0"""
    samples: int = 1
    """directions that a step looks along, at two forward passes each; at least 1"""
    rule: str = "sgd"
    """what the estimates go to: sgd, which has no state, or the optimizer that has it"""
    beta1: float = 0.9
    """decay of the mean, in [0, 1)"""
    beta2: float = 0.95
    """decay of the mean square, in [0, 1)"""
    epsilon: float = 1e-8
    """added to the root of the mean square, at least 0"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""

    zeroth_order = True
    scales_as = None
    working = 12

    def check(self) -> None:
        super().check()
        if not self.perturbation > 0:
            raise EspalierError(f"perturbation is {self.perturbation}; it must be more than 0")
        at_least("samples", self.samples, 1)
        self.inner = None if self.rule == "sgd" else self.standing_on(self.rule)

    def step_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return self._held_bytes(shapes, zeroth_order.SLICE)

    def build(self, parameters: Mapping[str, torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        return ZerothOrder(self, self._groups(parameters), learning_rate, self.perturbation, self.samples)

    def directions(self, gradients: Tensors, state: Mapping[str, Tensors], steps: Sequence[int]) -> Tensors:
        return gradients if self.inner is None else self.inner.directions(gradients, state, steps)
