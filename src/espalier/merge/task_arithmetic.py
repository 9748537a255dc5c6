"""Task arithmetic: the base plus a weighted sum of changes."""

from __future__ import annotations

from espalier.delta.merging import Combine, Parameter, combination
from espalier.registry import merger


@merger("task_arithmetic", ids=(), paper="arXiv:2212.04089")
def task_arithmetic(parameter: Parameter, *, normalize: bool = False) -> Combine:
    """The base plus the weighted sum of what the models changed: ``theta_0 + scale sum_i w_i tau_i``.

    Args:
        normalize: whether the weights are divided by their sum
    """
    weights = parameter.shares() if normalize else parameter.weights
    return combination(parameter, weights.tolist(), "updates")
