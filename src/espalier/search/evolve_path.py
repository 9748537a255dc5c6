"""Evolution of the path through the blocks of models: evolutionary model merging in the space of data flow."""

from __future__ import annotations

import math
from typing import Any

from espalier.delta.evolution import evolved
from espalier.delta.searching import Problem, Recipe
from espalier.errors import EspalierError, at_least
from espalier.registry import searcher

ON, OFF = 0.65, 0.35
"""Where the indicators of slots start: above a half the slot is gone through."""


@searcher("evolve_path", ids=(42,), paper="arXiv:2403.13187", budget=200, genes=False)
def evolve_path(
    problem: Problem, *, repeats: int = 2, spread: float = 0.5, population: int | None = None, sigma: float = 0.16666666666666666
) -> None:
    """Evolve by CMA-ES which blocks of which models text goes through, and how the stream is scaled before each.

    All blocks of all models, one model after the other, ``repeats`` times over, are T slots; a slot is gone through where its
    indicator is on, and ``s_t`` multiplies the residual stream before it. The first candidate is the first model as it is.
    Weights stay as they are, but for the scales: norms do not see the size of the stream, so multiplying it by s_t
    is dividing what the blocks from t on add to it by s_t. The result is therefore ``passthrough`` with a ``stack``, and
    ``scale`` for the tensors that write to the stream.

    The paper has a scale for every pair of blocks that may follow one another (or a network that makes it); here it is one for every
    slot, so that there are 2 T genes and not the square of the number of blocks. Scales are positive.

    Args:
        repeats: how often the list of blocks is repeated
        spread: scales are from exp(-spread) to exp(spread); 0 leaves the stream as it is
        population: candidates of a generation; default: 4 + 3 ln(genes)
        sigma: standard deviation at the start, as a share of the range
    """
    at_least("repeats", repeats, 1)
    at_least("spread", spread, 0)
    if not 0 < sigma <= 1 or (population is not None and population < 2):
        raise EspalierError(f"sigma is {sigma} and population {population}; they must be above 0 and at most 1, and at least 2")
    slots = [(model, block) for model, blocks in enumerate(problem.blocks) for block in range(blocks)] * repeats
    scaled = problem.stream_outputs() if spread else []

    def recipe(places: list[float]) -> Recipe:
        indicators = places[: len(slots)]
        on = [t for t, place in enumerate(indicators) if place > 0.5] or [max(range(len(slots)), key=indicators.__getitem__)]
        stack = [{"blocks": {slots[t][0]: [slots[t][1], slots[t][1] + 1]}} for t in on]
        parameters: list[dict[str, Any]] = []
        total = 0.0
        for part, t in enumerate(on if scaled else ()):
            total += spread * (2 * places[len(slots) + t] - 1)
            if total:
                parameters.append({"part": part, "names": scaled, "scale": math.exp(-total)})
        return problem.recipe("passthrough", own_base=False, stack=stack, parameters=parameters)

    first = [ON if t < problem.blocks[0] else OFF for t in range(len(slots))]
    start = [*first, *([0.5] * len(slots) if scaled else [])]
    problem.loss(recipe(start), "the first model")
    for places, tell in evolved(problem, start, sigma, population, spent=1):
        made = recipe(places)
        path = " ".join(f"{model}.{block}" for part in made["stack"] for model, (block, _) in part["blocks"].items())
        tell(problem.loss(made, path))
