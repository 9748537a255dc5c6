"""Candidates drawn at random."""

from __future__ import annotations

from espalier.delta.searching import Problem
from espalier.kernels.philox import Stream
from espalier.registry import searcher


@searcher("random_search", ids=(), paper="Bergstra and Bengio, JMLR 13, 2012", budget=200, genes=True)
def random_search(problem: Problem) -> None:
    """Try candidates whose genes are drawn evenly from their ranges and choices; the first is the middle of all."""
    problem.loss(problem.at([0.5] * len(problem.genes)), "the middle")
    for trial in range(1, problem.budget):
        places = Stream(problem.seed, f"random search {trial}").uniform(len(problem.genes)).tolist()
        problem.loss(problem.at(places), "random")
