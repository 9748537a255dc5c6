"""CMA-ES over places from 0 to 1: the package ``cma`` with our random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from espalier.delta.searching import Problem
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream

WORST = 1e9
"""Stands for the loss of candidates that cannot be merged: the strategy needs finite numbers."""


def evolved(problem: Problem, start: list[float], sigma: float, population: int | None, spent: int = 0) -> Iterator[tuple[list[float], Callable[[float], None]]]:
    """Places to try, and what takes their loss; ends when the strategy has converged or the budget is spent.

    Args:
        start: the mean, from 0 to 1.
        sigma: the standard deviation at the start.
        population: of a generation; default: the strategy's.
        spent: candidates that were tried before.

    Raises:
        EspalierError: when the package is missing.
    """
    try:
        import cma
    except ImportError as error:
        raise EspalierError("CMA-ES needs the package cma: pip install 'espalier[search]'") from error
    stream = Stream(problem.seed, "cma")
    options = {"bounds": [0, 1], "verbose": -9, "seed": float("nan"), "randn": lambda *shape: stream.gaussian(*shape).double().numpy()}
    # in one dimension it has no covariance to adapt; a second that means nothing lets it run
    size = len(start)
    strategy = cma.CMAEvolutionStrategy([*start, *[0.5] * (size == 1)], sigma, options | ({"popsize": population} if population else {}))
    tried = spent
    while tried < problem.budget and not strategy.stop():
        asked = strategy.ask()
        told: list[float] = []
        for places in asked:
            if tried >= problem.budget:
                return
            yield [min(max(float(place), 0.0), 1.0) for place in places[:size]], told.append
            tried += 1
        strategy.tell(asked, [min(loss, WORST) for loss in told])
    if tried < problem.budget:
        problem.note(f"CMA-ES ended after {tried} candidates: {', '.join(strategy.stop())}")
