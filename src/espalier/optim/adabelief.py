"""AdaBelief: steps by how far gradients are from their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from espalier.memory.rule import Rule, Tensors, corrections
from espalier.registry import optimizer


@optimizer("adabelief", ids=(174,), paper="arXiv:2010.07468")
class AdaBelief(Rule):
    """Adam with ``s <- beta2 s + (1 - beta2)(g - m)^2 + eps`` in the place of the mean square, m the new mean.

    ``w -= lr ((m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps) + decay w)``. Without the rectification that the official
    code adds by default, which leaves out one of the two eps.
    """

    beta1: float = 0.9
    """decay of the mean of the gradients, in [0, 1)"""
    beta2: float = 0.999
    """decay of the mean of what they differ by, in [0, 1)"""
    epsilon: float = 1e-16
    """added to s at every step, and to its root, at least 0; it has the part of Adam's squared"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""

    slots = {"exp_avg": True, "exp_avg_var": False}
    working = 12

    def directions(self, gradients: Tensors, state: Mapping[str, Tensors], steps: Sequence[Any]) -> Tensors:
        means, variances = state["exp_avg"], state["exp_avg_var"]
        torch._foreach_lerp_(means, gradients, 1 - self.beta1)
        off = torch._foreach_sub(gradients, means)
        torch._foreach_mul_(variances, self.beta2)
        torch._foreach_addcmul_(variances, off, off, 1 - self.beta2)
        torch._foreach_add_(variances, self.epsilon)
        roots = torch._foreach_sqrt(variances)
        torch._foreach_div_(roots, corrections(self.beta2, steps, root=True))
        torch._foreach_add_(roots, self.epsilon)
        torch._foreach_mul_(roots, corrections(self.beta1, steps))
        return list(torch._foreach_div(means, roots))
