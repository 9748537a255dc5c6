"""Greedy soup: the mean of the models that make it better."""

from __future__ import annotations

from espalier.delta.searching import Problem
from espalier.registry import searcher


@searcher("greedy_soup", ids=(), paper="arXiv:2203.05482", budget=1000, genes=False)
def greedy_soup(problem: Problem) -> None:
    """Go through the models from the best to the worst, and keep each whose addition does not raise the loss of the mean.

    The result is ``linear`` with weights of 0 and 1. Of models that lose the same the first goes first.
    """
    order = sorted(range(problem.models), key=problem.alone)
    kept: list[int] = []
    least = float("inf")
    for model in order[: problem.budget]:
        tried = [*kept, model]
        weights = [float(other in tried) for other in range(problem.models)]
        names = ", ".join(problem.paths[other] for other in sorted(tried))
        loss = problem.loss(problem.recipe("linear", weights), f"the mean of {names}")
        if loss <= least:
            kept, least = tried, loss
    problem.note(f"the soup has {len(kept)} of {problem.models} models")
