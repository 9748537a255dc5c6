"""Metrics-weighted averaging: the checkpoints of a run, weighed by how good they are."""

from __future__ import annotations

from typing import Literal

import torch

from espalier.delta.merging import Combine, Parameter, combination
from espalier.errors import EspalierError
from espalier.registry import merger


@merger("metrics_weighted", ids=(292,), paper="arXiv:2504.18580")
def metrics_weighted(
    parameter: Parameter,
    *,
    metrics: list[float] | None = None,
    power: float = 1.0,
    better: Literal["lower", "higher"] = "lower",
) -> Combine:
    """The mean of models weighed by a metric of each: ``w_k = s_k^p / sum_j s_j^p`` with s the metric or, of losses, 1 / metric.

    With power 0 it is the uniform mean; the larger the power, the more the best one counts. Deltas are averaged as what they
    change; factor by factor with ``--to delta --space factors``. A weight of a model multiplies its s^p.

    Args:
        metrics: one positive number of each model, such as its loss on held-out data, or its step
        power: p, at least 0, how much the metric counts
        better: whether a lower metric is better (losses) or a higher one (accuracies, steps)
    """
    if metrics is None:
        raise EspalierError("metrics_weighted needs a metric of every model: --metrics 2.1,2.0,1.9")
    if len(metrics) != parameter.models:
        raise EspalierError(f"metrics has {len(metrics)} values; there are {parameter.models} models")
    if min(metrics) <= 0 or power < 0:
        raise EspalierError(f"metrics are {metrics} and power {power}; metrics must be above 0, and power at least 0")
    scores = torch.tensor(metrics, dtype=torch.float64).log() * (power if better == "higher" else -power)
    weights = parameter.weights.double() * (scores - scores.max()).exp()
    return combination(parameter, (weights / weights.sum()).tolist())
