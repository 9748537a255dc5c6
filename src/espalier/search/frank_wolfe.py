"""FW-Merging: Frank-Wolfe over the convex hull of the models."""

from __future__ import annotations

from typing import Literal

import torch

from espalier.delta.searching import Problem, Recipe
from espalier.errors import EspalierError, at_least
from espalier.registry import searcher


def _inside(taken: torch.Tensor) -> torch.Tensor:
    """The same shares, positive and at most 1 in sum: (tensors, data sets)."""
    taken = taken.clamp_min(0)
    return taken / taken.sum(-1, keepdim=True).clamp_min(1)


FIRST = 0.3
"""What the soft variant's first round starts from; later rounds start from nothing."""


@searcher("frank_wolfe", ids=(280,), paper="arXiv:2503.12649", budget=10, genes=False, counts="rounds")
def frank_wolfe(
    problem: Problem,
    *,
    variant: Literal["hard", "soft"] = "hard",
    granularity: Literal["task", "layer"] = "layer",
    step_size: float = 1.0,
    sequences: int = 16,
    soft_steps: int = 50,
    learning_rate: float = 1e-3,
) -> None:
    """Go step by step to the model, or for each tensor to the model, in whose direction the loss falls most.

    ``s_t = argmin_i <g, theta_i - theta_t>``, ``theta_t+1 = theta_t + eta_t (s_t - theta_t)``, ``eta_t = step_size 2 / (t + 2)``, g the
    gradient on the data. It starts at the base, which is one of the models, or at the mean of all without a base; so the
    merged model is always ``linear``: shares of the models that are positive and sum to 1, for every tensor. A model towards which
    the loss does not fall is not taken. The soft variant takes the best model of each data set and learns their shares by Adam, ``soft_steps``
    gradients a round, kept positive and at most 1 in sum.

    A tensor that no model would make better, such as one that the data do not use, stays as it is.

    The duality gap ``<g, theta_t - s_t>``, at least 0, bounds how far a convex loss is above its least. The budget is rounds; each is a
    candidate. The paper's code aligns g with the models themselves, by the cosine for each tensor; here it is the inner product
    with what would change, which is the textbook's and does not see the direction that all models share.

    Args:
        variant: go towards one model, or learn shares of the best of each data set
        granularity: one choice for the whole model, or one for each tensor
        step_size: of eta, above 0 and at most 1
        sequences: of each data set in a gradient
        soft_steps: of Adam in a round of the soft variant
        learning_rate: of Adam in the soft variant
    """
    at_least("sequences", sequences, 1)
    at_least("soft_steps", soft_steps, 1)
    if not 0 < step_size <= 1:
        raise EspalierError(f"step_size is {step_size}; it must be above 0 and at most 1")
    count = problem.models + (problem.base is not None)
    start = torch.zeros(count, dtype=torch.float64)
    start[-1] = 1.0
    if problem.base is None:
        start[:] = 1 / count
    shares: dict[str, torch.Tensor] = {}

    def recipe() -> Recipe:
        entries = [{"names": name, "weights": row.tolist()} for name, row in shares.items()]
        return problem.recipe("linear", start.tolist(), with_base=True, parameters=entries)

    def gradient(data: int | None = None) -> torch.Tensor:
        slopes = problem.slopes(recipe(), sequences=sequences, data=data)
        if not shares:
            shares.update(dict.fromkeys(slopes, start))
        return torch.stack([slopes[name] for name in shares])  # (tensors, models)

    def ways_down(slopes: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, float]:
        """``s_t - theta_t`` in shares of the models, (tensors, models), zero where nothing is better; and the duality gap."""
        directions = slopes - (held * slopes).sum(-1, keepdim=True)  # <g, theta_i - theta_t>
        if granularity == "task":
            directions = directions.sum(0, keepdim=True)
        least = directions.min(-1)
        ways = torch.nn.functional.one_hot(least.indices, count) - held
        return torch.where(least.values[:, None] < 0, ways, 0.0), 0.0 - float(least.values.clamp_max(0).sum())

    problem.loss(recipe(), "the start")
    for round in range(problem.budget):
        eta = step_size * 2 / (round + 2)
        first = [gradient(number) for number in range(problem.data_sets)] if variant == "soft" else [gradient()]
        held = torch.stack(list(shares.values()))
        way, gap = ways_down(torch.stack(first).mean(0), held)
        if variant == "hard":
            moved = held + eta * way
        else:
            ways = torch.stack([ways_down(one, held)[0] for one in first], 1)  # (tensors, data sets, models)
            taken = torch.full(ways.shape[:2], FIRST if round == 0 else 0.0, dtype=torch.float64)
            optimizer = torch.optim.Adam([taken], learning_rate)
            for _ in range(soft_steps):
                moved = held + torch.einsum("ld,ldm->lm", _inside(taken), ways)
                shares.update(zip(shares, moved, strict=True))
                slope = torch.einsum("lm,ldm->ld", gradient(), ways)
                taken.grad = slope.sum(0, keepdim=True).expand_as(slope) if granularity == "task" else slope
                optimizer.step()
                taken.copy_(_inside(taken))
            moved = held + torch.einsum("ld,ldm->lm", taken, ways)
        shares.update(zip(shares, moved, strict=True))
        problem.loss(recipe(), f"round {round + 1}, duality gap {gap:.4g}")
    used = torch.stack(list(shares.values())).mean(0)
    names = [*problem.paths, *([problem.base] if problem.base is not None else [])]
    problem.note("mean shares after the last round: " + ", ".join(f"{n} {s:.3f}" for n, s in zip(names, used.tolist(), strict=True) if s > 0))
