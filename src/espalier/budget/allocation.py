"""Choosing a level for every item so that the total cost keeps to a bound and the total damage is small.

An item is a thing with levels (a layer and its possible ranks, sparsities, bit widths); each level costs something
and does some damage. This is the multiple-choice knapsack problem. Solvers:

- ``uniform``: the same level for all, the highest that fits.
- ``greedy``: from the cheapest levels on, always the step that saves the most damage per cost (steps may skip levels);
  optimal where every item's damage is convex in its cost and costs are equal steps, and close to it otherwise.
- ``dynamic``: the optimum, by dynamic programming over integer costs; time and memory grow with items times total.
- ``linear``: the linear relaxation (scipy's HiGHS), whose solution splits one item at most; that item is rounded down, and
  what is left is spent greedily.
- ``evolutionary``: mutation and selection from the greedy solution on, for damages measured together: see ``damage``.

Ties go to the item that comes first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from espalier.errors import EspalierError, suggestion

Solver = Literal["uniform", "greedy", "dynamic", "linear", "evolutionary"]
TABLE = 1 << 28
"""Entries of the largest table that ``dynamic`` makes."""


@dataclass(frozen=True)
class Item:
    """A thing that gets one of several levels.

    Args:
        costs: of each level, at least 0, strictly increasing; in any unit that is the total's.
        damages: of each level, finite; usually decreasing.
    """

    name: str
    costs: tuple[float, ...]
    damages: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.costs or len(self.costs) != len(self.damages):
            raise EspalierError(f"{self.name} has {len(self.costs)} costs and {len(self.damages)} damages; each level needs one of each")
        if self.costs[0] < 0 or any(b <= a for a, b in zip(self.costs, self.costs[1:], strict=False)):
            raise EspalierError(f"the costs of {self.name} are {self.costs}; they must increase, from 0 or more")
        if not all(map(math.isfinite, (*self.costs, *self.damages))):
            raise EspalierError(f"a cost or damage of {self.name} is not finite")


Damage = Callable[[dict[str, int]], float]


def allocate(
    items: Sequence[Item], total: float, solver: Solver = "greedy", *, damage: Damage | None = None, evaluations: int = 1000, seed: int = 0
) -> dict[str, int]:
    """The level of each item, by name.

    Args:
        total: bound on the sum of the costs.
        damage: for ``evolutionary``, what a choice of levels does, where that is more than the sum over items.
        evaluations: how often ``evolutionary`` may ask for it.
        seed: of ``evolutionary``.

    Raises:
        EspalierError: when the cheapest levels together exceed the total, a solver is unknown, or ``dynamic`` gets costs
            that are no integers or too large a table.
    """
    if solver not in get_args(Solver):
        raise EspalierError(f"there is no solver {solver!r}{suggestion(solver, list(get_args(Solver)))} (there are: {', '.join(get_args(Solver))})")
    least = sum(item.costs[0] for item in items)
    if least > total:
        raise EspalierError(f"the total is {total:g}; the cheapest level of every item makes {least:g} already")
    if solver == "evolutionary":
        levels = _evolutionary(items, total, damage, evaluations, seed)
    else:
        levels = {"uniform": _uniform, "greedy": _greedy, "dynamic": _dynamic, "linear": _linear}[solver](items, total)
    return {item.name: level for item, level in zip(items, levels, strict=True)}


def _cost(items: Sequence[Item], levels: Sequence[int]) -> float:
    return sum(item.costs[level] for item, level in zip(items, levels, strict=True))


def _uniform(items: Sequence[Item], total: float) -> list[int]:
    highest = max((len(item.costs) for item in items), default=1)
    for level in reversed(range(highest)):
        levels = [min(level, len(item.costs) - 1) for item in items]
        if _cost(items, levels) <= total:
            return levels
    return [0] * len(items)


def _best_step(item: Item, level: int, left: float) -> tuple[float, int] | None:
    """(saved damage per cost, level) of the best affordable step up."""
    best = None
    for higher in range(level + 1, len(item.costs)):
        extra = item.costs[higher] - item.costs[level]
        if extra > left:
            break
        slope = (item.damages[level] - item.damages[higher]) / extra
        if slope > 0 and (best is None or slope > best[0]):
            best = (slope, higher)
    return best


def _greedy(items: Sequence[Item], total: float, start: Sequence[int] | None = None) -> list[int]:
    levels = list(start or [0] * len(items))
    left = total - _cost(items, levels)
    queue: list[tuple[float, int, int, int]] = []

    def offer(number: int) -> None:
        if (step := _best_step(items[number], levels[number], left)) is not None:
            heapq.heappush(queue, (-step[0], number, levels[number], step[1]))

    for number in range(len(items)):
        offer(number)
    while queue:
        _, number, level, higher = heapq.heappop(queue)
        extra = items[number].costs[higher] - items[number].costs[level]
        if extra <= left:
            levels[number], left = higher, left - extra
        offer(number)
    return levels


def _dynamic(items: Sequence[Item], total: float) -> list[int]:
    import numpy

    costs = [[int(cost) for cost in item.costs] for item in items]
    if any(cost != given for item, row in zip(items, costs, strict=True) for cost, given in zip(row, item.costs, strict=True)):
        raise EspalierError("the solver dynamic needs costs that are integers; give them in a smaller unit")
    unit = math.gcd(*(cost for row in costs for cost in row)) or 1
    bound = min(int(total) // unit, sum(row[-1] for row in costs) // unit)
    if len(items) * (bound + 1) > TABLE:
        raise EspalierError(f"the solver dynamic would fill a table of {len(items)} x {bound + 1}; give costs in a larger unit, or take linear")
    best = numpy.zeros(bound + 1)  # least damage of the items so far, by what they may cost
    choices = []
    for item, row in zip(items, costs, strict=True):
        found = numpy.full(bound + 1, numpy.inf)
        choice = numpy.zeros(bound + 1, dtype=numpy.int32)
        for level, cost in enumerate(row):
            shift = cost // unit
            if shift > bound:
                break
            candidate = best[: bound + 1 - shift] + item.damages[level]
            better = candidate < found[shift:]
            found[shift:][better] = candidate[better]
            choice[shift:][better] = level
        best = found
        choices.append(choice)
    levels, left = [], bound
    for row, choice in zip(reversed(costs), reversed(choices), strict=True):
        levels.append(int(choice[left]))
        left -= row[levels[-1]] // unit
    return levels[::-1]


def _linear(items: Sequence[Item], total: float) -> list[int]:
    import numpy
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    sizes = [len(item.costs) for item in items]
    ends = numpy.cumsum(sizes)
    rows = numpy.repeat(numpy.arange(len(items)), sizes)
    one_each = csr_array((numpy.ones(len(rows)), (rows, numpy.arange(len(rows)))))
    costs = numpy.array([cost for item in items for cost in item.costs])
    damages = numpy.array([damage for item in items for damage in item.damages])
    scale = abs(damages).max() or 1.0
    solved = linprog(damages / scale, A_ub=costs[None], b_ub=[total], A_eq=one_each, b_eq=numpy.ones(len(items)), bounds=(0, 1), method="highs-ds")
    levels = []
    for start, end in zip(ends - sizes, ends, strict=True):
        shares = solved.x[start:end]
        levels.append(int(numpy.flatnonzero(shares > 1e-9)[0]))  # of an item that is split, the cheaper level
    return _greedy(items, total, levels)


def _evolutionary(items: Sequence[Item], total: float, damage: Damage | None, evaluations: int, seed: int) -> list[int]:
    import numpy

    random = numpy.random.default_rng(seed)

    def judge(levels: list[int]) -> float:
        if damage is not None:
            return damage({item.name: level for item, level in zip(items, levels, strict=True)})
        return sum(item.damages[level] for item, level in zip(items, levels, strict=True))

    best = _greedy(items, total)
    least = judge(best)
    for _ in range(max(evaluations - 1, 0)):
        child = list(best)
        for number in random.choice(len(items), size=min(len(items), 1 + random.geometric(0.5)), replace=False):
            child[number] = int(random.integers(len(items[number].costs)))
        while _cost(items, child) > total:  # pay for it elsewhere
            above = [n for n in range(len(items)) if child[n]]
            child[above[random.integers(len(above))]] -= 1
        if (found := judge(child)) <= least:
            best, least = child, found
    return best
