"""AdaMerging: coefficients that make the merged model sure of its predictions."""

from __future__ import annotations

from typing import Any, Literal

import torch

from espalier.delta.searching import Problem, Recipe
from espalier.errors import EspalierError, at_least
from espalier.registry import searcher


@searcher("adamerging", ids=(), paper="arXiv:2310.02575", budget=500, genes=False, counts="steps")
def adamerging(
    problem: Problem,
    *,
    granularity: Literal["task", "layer"] = "layer",
    objective: Literal["entropy", "loss"] = "entropy",
    learning_rate: float = 1e-3,
    start: float = 0.3,
    keep: float = 1.0,
    sequences: int = 8,
    tries: int = 10,
) -> None:
    """Learn how much of each model's change is taken, by Adam on the entropy of predictions on text without labels.

    ``theta = theta_0 + sum_i lambda_i^l tau_i^l``, one coefficient for every model, and for every tensor l unless they are task-wise;
    ``dL / d lambda_i^l = <dL / d theta^l, tau_i^l>``: one backward pass of the merged model and inner products with the changes,
    which are read in slices, so no model but the merged one is in memory. The budget is steps; in between and at the end the
    coefficients are tried as a candidate, so the result is the step that does best on the data, not always the last.

    The result is ``task_arithmetic``, or with ``keep`` below 1 ``breadcrumbs`` without outliers (AdaMerging++, whose sign election is
    not linear in the coefficients and is left out).

    Args:
        granularity: one coefficient for each model, or for each of its tensors
        objective: mean entropy of the predictions, or the loss (which needs the text to be what the model should say)
        learning_rate: of Adam, at least 0
        start: every coefficient before the first step
        keep: share of the numbers of each change that are taken, the largest of each tensor
        sequences: of each data set in a step
        tries: how often the coefficients are tried as a candidate, beside the start
    """
    at_least("learning_rate", learning_rate, 0)
    at_least("sequences", sequences, 1)
    at_least("tries", tries, 1)
    if not 0 < keep <= 1:
        raise EspalierError(f"keep is {keep}; it must be above 0 and at most 1")
    if problem.base is None:
        raise EspalierError("adamerging learns shares of changes; it needs the model that they are changes of: --model BASE")

    def recipe(whole: torch.Tensor, by_tensor: dict[str, torch.Tensor]) -> Recipe:
        entries: dict[str, Any] = {"parameters": [{"names": name, "weights": row.tolist()} for name, row in by_tensor.items()]}
        if keep < 1:
            return problem.recipe("breadcrumbs", whole.tolist(), options={"gamma": 0.0, "density": keep, "per": "tensor"}, **entries)
        return problem.recipe("task_arithmetic", whole.tolist(), **entries)

    whole = torch.full((problem.models,), start, dtype=torch.float64)
    by_tensor: dict[str, torch.Tensor] = {}
    problem.loss(recipe(whole, by_tensor), "the start")
    coefficients = torch.empty(0)
    optimizer: torch.optim.Adam | None = None
    for step in range(1, problem.budget + 1):
        slopes = problem.slopes(recipe(whole, by_tensor), entropy=objective == "entropy", sequences=sequences, density=keep)
        gradient = torch.stack(list(slopes.values()))  # (tensors, models)
        if granularity == "task":
            gradient = gradient.sum(0, keepdim=True)
        if optimizer is None:
            coefficients = torch.full_like(gradient, start, requires_grad=True)
            optimizer = torch.optim.Adam([coefficients], learning_rate)
        coefficients.grad = gradient
        optimizer.step()
        now = coefficients.detach().clone()
        if granularity == "task":
            whole = now[0]
        else:
            by_tensor = dict(zip(slopes, now, strict=True))
        if step == problem.budget or step * tries // problem.budget > (step - 1) * tries // problem.budget:
            problem.loss(recipe(whole, by_tensor), f"step {step}")
