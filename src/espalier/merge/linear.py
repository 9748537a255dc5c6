"""Weighted mean of models: soups, interpolations."""

from __future__ import annotations

from espalier.delta.merging import Combine, Parameter, combination
from espalier.registry import merger


@merger("linear", ids=(), paper="arXiv:2203.05482")
def linear(parameter: Parameter, *, normalize: bool = True) -> Combine:
    """The weighted mean of the models themselves: ``sum_i w_i theta_i / sum_i w_i``. Equal weights are a uniform soup.

    Args:
        normalize: whether the weights are divided by their sum
    """
    weights = parameter.shares() if normalize else parameter.weights
    return combination(parameter, weights.tolist())
