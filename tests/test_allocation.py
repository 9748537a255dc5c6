"""The allocation service: solvers against brute force, their promises, and what they refuse."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier import registry
from espalier.anatomy.parameters import parameters, select
from espalier.budget.allocation import Item, allocate
from espalier.budget.fitting import fit, trained
from espalier.budget.largest import largest
from espalier.errors import EspalierError

SOLVERS = ("uniform", "greedy", "dynamic", "linear", "evolutionary")


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Item], int]:
    items = []
    for number in range(draw(st.integers(1, 5))):
        costs = sorted(draw(st.sets(st.integers(0, 12), min_size=1, max_size=4)))
        damages = draw(st.lists(st.integers(0, 20), min_size=len(costs), max_size=len(costs)))
        items.append(Item(f"item{number}", tuple(costs), tuple(map(float, damages))))
    least = sum(int(item.costs[0]) for item in items)
    return items, draw(st.integers(least, least + 30))


def cost(items: list[Item], levels: dict[str, int]) -> float:
    return sum(item.costs[levels[item.name]] for item in items)


def damage(items: list[Item], levels: dict[str, int]) -> float:
    return sum(item.damages[levels[item.name]] for item in items)


def brute_force(items: list[Item], total: float) -> float:
    choices = itertools.product(*(range(len(item.costs)) for item in items))
    fitting = [c for c in choices if sum(item.costs[level] for item, level in zip(items, c, strict=True)) <= total]
    return min(sum(item.damages[level] for item, level in zip(items, c, strict=True)) for c in fitting)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_dynamic_programming_is_optimal_and_every_solver_keeps_to_the_total(problem: tuple[list[Item], int]) -> None:
    items, total = problem
    best = brute_force(items, total)
    for solver in SOLVERS:
        levels = allocate(items, total, solver, evaluations=40)  # type: ignore[arg-type]
        assert cost(items, levels) <= total
        assert damage(items, levels) >= best
    assert damage(items, allocate(items, total, "dynamic")) == best


def convex(seed: int, count: int = 12) -> list[Item]:
    """Damages that fall by less and less, at unit costs: where greedy is optimal."""
    draw = random.Random(seed)
    items = []
    for number in range(count):
        falls = sorted((draw.random() for _ in range(8)), reverse=True)
        damages = [sum(falls[k:]) for k in range(9)]
        items.append(Item(f"item{number}", tuple(range(9)), tuple(damages)))
    return items


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("solver", ["greedy", "linear"])
def test_where_damage_is_convex_greedy_and_linear_are_optimal(solver: str, seed: int) -> None:
    items = convex(seed)
    best = damage(items, allocate(items, 41, "dynamic"))
    assert damage(items, allocate(items, 41, solver)) == pytest.approx(best)  # type: ignore[arg-type]


def test_greedy_is_no_worse_than_uniform_and_spends_where_it_saves_most() -> None:
    items = [Item("cheap", (0, 1, 2), (10.0, 1.0, 0.9)), Item("dear", (0, 1, 2), (1.0, 0.9, 0.8))]
    assert allocate(items, 2, "uniform") == {"cheap": 1, "dear": 1}
    assert allocate(items, 1, "greedy") == {"cheap": 1, "dear": 0}


def test_greedy_steps_over_a_level_that_saves_nothing_by_itself() -> None:
    items = [Item("late", (0, 1, 2), (5.0, 5.0, 0.0)), Item("early", (0, 1), (1.0, 0.5))]
    assert allocate(items, 2, "greedy") == {"late": 2, "early": 0}


def test_evolution_finds_what_greedy_cannot_see_when_damages_do_not_add_up() -> None:
    items = [Item(name, (0, 1), (1.0, 0.9)) for name in "abcd"]

    def together(levels: dict[str, int]) -> float:
        return 0.0 if (levels["c"], levels["d"]) == (1, 1) else 5.0

    assert together(allocate(items, 2, "greedy")) == 5.0
    found = allocate(items, 2, "evolutionary", damage=together, evaluations=200, seed=1)
    assert together(found) == 0.0 and allocate(items, 2, "evolutionary", damage=together, evaluations=200, seed=1) == found


def test_bad_problems_are_refused() -> None:
    with pytest.raises(EspalierError, match="the total is 1; the cheapest level of every item makes 4 already"):
        allocate([Item("a", (2, 3), (1.0, 0.0)), Item("b", (2, 3), (1.0, 0.0))], 1)
    with pytest.raises(EspalierError, match="must increase"):
        Item("a", (2, 2), (1.0, 0.0))
    with pytest.raises(EspalierError, match="2 costs and 1 damages"):
        Item("a", (1, 2), (1.0,))
    with pytest.raises(EspalierError, match="not finite"):
        Item("a", (1, 2), (1.0, float("nan")))
    with pytest.raises(EspalierError, match="integers"):
        allocate([Item("a", (0.5, 1), (1.0, 0.0))], 1, "dynamic")
    with pytest.raises(EspalierError, match="no solver 'gredy'; did you mean 'greedy'"):
        allocate([Item("a", (0, 1), (1.0, 0.0))], 1, "gredy")  # type: ignore[arg-type]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 24))
def test_exactly_so_many_are_kept_also_among_ties(lists: list[list[int]], count: int) -> None:
    scores = [torch.tensor(values, dtype=torch.float32) for values in lists]
    count = min(count, sum(map(len, lists)))
    masks = largest(scores, count)
    assert sum(int(mask.sum()) for mask in masks) == count
    kept = [v for s, m in zip(scores, masks, strict=True) for v in s[m].tolist()]
    left = [v for s, m in zip(scores, masks, strict=True) for v in s[~m].tolist()]
    assert not kept or not left or min(kept) >= max(left)


@pytest.mark.parametrize("method", [info.name for info in registry.methods() if info.role == "adapter" and "needs" not in info.settings])
def test_a_method_is_fitted_to_the_largest_size_under_a_bound(method: str) -> None:
    made = registry.make(method, "adapter")
    if not made.size:
        return
    if getattr(made, made.size) is None:  # a share says it there
        made = registry.make(method, "adapter", **{made.size: 2})
    targets = select(parameters(tiny("llama")), made.targets.split(","))
    bound = trained(made, targets) + 5
    fitted = fit(made, targets, bound)
    assert trained(fitted, targets) <= bound
    assert trained(fitted, targets) >= bound - 5
    with pytest.raises(EspalierError, match=r"trains [0-9,]+ numbers at least"):
        fit(made, targets, 0)
