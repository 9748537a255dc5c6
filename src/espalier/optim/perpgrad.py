"""perpGrad: gradients without the part along the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from espalier.errors import at_least
from espalier.kernels.sharded import local, total
from espalier.memory.rule import Rule, Tensors, Turn
from espalier.registry import optimizer

SLICE = 1 << 20
"""Numbers that are summed at once, in float64."""


@optimizer("perpgrad", ids=(255,), paper="arXiv:2501.04697")
class PerpGrad(Rule):
    """``g <- g - (<w, g> / <w, w>) w`` at the length of g, for every matrix; then another optimizer.

    What only makes all logits larger, which lowers the loss without learning, is gone. Vectors, and matrices that are zero, keep
    their gradient. The length is restored by a factor of at most ``most``: a gradient nearly along w is mostly noise without it.
    """

    rule: str = "adamw"
    """the optimizer that has the state"""
    most: float = 10.0
    """largest factor by which what is left is lengthened, at least 1"""
    beta1: float = 0.9
    """decay of the mean, in [0, 1)"""
    beta2: float = 0.99
    """decay of the mean square, in [0, 1)"""
    epsilon: float = 1e-8
    """added to the root of the mean square, at least 0"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""

    working = 20

    def check(self) -> None:
        super().check()
        at_least("most", self.most, 1)
        self.inner = self.standing_on(self.rule)

    def turned(self, parameter: torch.Tensor, gradient: torch.Tensor) -> Turn | None:
        if parameter.ndim < 2:
            return None
        weights, gradients = (local(t.detach()).reshape(-1).split(SLICE) for t in (parameter, gradient))

        def sums(of: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]) -> list[float]:
            parts = [torch.stack([p.sum(dtype=torch.float64) for p in of(w.float(), g.float())]) for w, g in zip(weights, gradients, strict=True)]
            return total(parameter, torch.stack(parts).sum(0)).tolist()

        size, along, before = sums(lambda w, g: (w * w, w * g, g * g))
        if size <= 0:
            return None
        share = along / size
        (after,) = sums(lambda w, g: ((g - w * share).square(),))
        factor = min((before / after) ** 0.5 if after > 0 else 1.0, self.most)
        return lambda weight, gradient: (gradient - weight * share).mul_(factor)

    def directions(self, gradients: Tensors, state: Mapping[str, Tensors], steps: Sequence[int]) -> Tensors:
        return self.inner.directions(gradients, state, steps)
