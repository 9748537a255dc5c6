"""CMA-ES over the genes of a recipe: evolutionary model merging in the space of parameters."""

from __future__ import annotations

from espalier.delta.evolution import evolved
from espalier.delta.searching import Problem
from espalier.errors import EspalierError
from espalier.registry import searcher


@searcher("cma", ids=(42,), paper="arXiv:2403.13187", budget=200, genes=True)
def cma(problem: Problem, *, population: int | None = None, sigma: float = 0.16666666666666666) -> None:
    """Evolve the genes by CMA-ES, a normal distribution that learns from its best candidates where to look next.

    Every range is scaled to 0 to 1 and the mean starts in the middle. A choice or a whole number is a share of the range.
    With a weight and a density for every model and group of blocks, and the method ``dare``, it is the paper's search in the space
    of parameters; the paper starts from 0.5 with sigma 1/6 too.

    Args:
        population: candidates of a generation; default: 4 + 3 ln(genes)
        sigma: standard deviation at the start, as a share of the range
    """
    if not 0 < sigma <= 1 or (population is not None and population < 2):
        raise EspalierError(f"sigma is {sigma} and population {population}; they must be above 0 and at most 1, and at least 2")
    for places, tell in evolved(problem, [0.5] * len(problem.genes), sigma, population):
        tell(problem.loss(problem.at(places), "cma"))
