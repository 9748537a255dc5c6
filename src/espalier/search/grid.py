"""Every combination of some values of all genes."""

from __future__ import annotations

import itertools
import math

from espalier.delta.searching import Problem
from espalier.errors import EspalierError, at_least
from espalier.registry import searcher


@searcher("grid", ids=(), paper="", budget=1000, genes=True)
def grid(problem: Problem, *, points: int = 5) -> None:
    """Try every combination: all choices, and ``points`` values of every range at equal distances.

    Args:
        points: values of each range, its ends among them; one is the middle. A range of fewer whole numbers has them all
    """
    at_least("points", points, 1)
    axes = [gene.places(points) for gene in problem.genes]
    if (count := math.prod(map(len, axes))) > problem.budget:
        raise EspalierError(f"the grid has {count:,} candidates and the budget is {problem.budget:,}; use fewer points, or another strategy")
    for places in itertools.product(*axes):
        problem.loss(problem.at(places), "grid")
