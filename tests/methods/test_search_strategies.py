"""Strategies of ``merge search`` on a problem whose answers are known: a convex loss of a few vectors."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mergers import merge, random

from espalier import registry
from espalier.delta.searching import Gene, Problem, Slopes
from espalier.errors import EspalierError
from espalier.exchange.merge_recipe import Recipe, settings

SIZE = 40
NAMES = ("embed", "layers.0.up", "layers.1.up")


def direction(seed: int, name: str) -> torch.Tensor:
    return random(seed * 31 + NAMES.index(name), SIZE).double()


class Bowl(Problem):
    """Loss: half the squared distance to a target, summed over tensors; every tensor has its own weights on it.

    Model i is the base plus a random direction; the target is the base plus ``shares[tensor][i]`` of these.
    """

    def __init__(self, shares: dict[str, Sequence[float]], budget: int, *, seed: int = 0, models: int | None = None, has_base: bool = True, genes: Sequence[Gene] = (), copy: int | None = None) -> None:
        count = models or len(next(iter(shares.values())))
        super().__init__(genes, budget, seed, [f"m{i}" for i in range(count)], "base" if has_base else None, [2] * count, 2)
        self.tensors = {f"m{i}": {n: direction(1 if i == copy else i + 1, n) for n in NAMES} for i in range(count)}
        self.tensors["base"] = {n: torch.zeros(SIZE, dtype=torch.float64) for n in NAMES}
        self.target = {n: sum(s * direction(i + 1, n) for i, s in enumerate(shares.get(n, ()))) + torch.zeros(SIZE) for n in NAMES}
        self.trials: list[tuple[dict[str, Any], float, str]] = []
        self.notes: list[str] = []
        self.asked: list[int] = []

    def at(self, places: Sequence[float]) -> dict[str, Any]:
        weights = [gene.at(place) for gene, place in zip(self.genes, places, strict=True)]
        return self.recipe("task_arithmetic", weights)

    def recipe(self, method: str, weights: Sequence[float] | None = None, *, with_base: bool = False, own_base: bool = True, **entries: Any) -> dict[str, Any]:
        models: list[dict[str, Any]] = [{"path": p} for p in (*self.paths, *(["base"] if with_base and self.base else []))]
        for model, weight in zip(models, weights or (), strict=bool(weights)):
            model["weight"] = weight
        return {"method": method, "models": models, **({"model": self.base} if self.base else {}), **entries}

    def merged(self, content: dict[str, Any]) -> dict[str, torch.Tensor]:
        recipe = Recipe.of(content, "a candidate")
        made = {}
        for name in NAMES:
            weights, scale, options = settings(recipe, registry.find(recipe.method, "merger"), name, 0, [(0, 2)])
            rows = [self.tensors[i.path][name].float()[None] for i in recipe.models]
            base = self.tensors["base"][name].float()[None] if self.base else None
            options = {key: value for key, value in options.items() if value is not None}
            made[name] = merge(recipe.method, base, rows, weights=weights, scale=scale, **options)[0].double()
        return made

    def value(self, content: dict[str, Any]) -> float:
        return sum(float((theta - self.target[n]).square().sum()) / 2 for n, theta in self.merged(content).items())

    def loss(self, recipe: dict[str, Any], about: str) -> float:
        self.trials.append((recipe, self.value(recipe), about))
        return self.trials[-1][1]

    def alone(self, model: int) -> float:
        return self.value(self.recipe("linear", [float(model == i) for i in range(self.models)]))

    def slopes(self, recipe: dict[str, Any], *, entropy: bool = False, sequences: int = 8, data: int | None = None, density: float = 1.0) -> Slopes:
        self.asked.append(-1 if data is None else data)
        models = [m["path"] for m in recipe["models"]]
        origin = self.tensors["base" if self.base else models[0]]
        made = self.merged(recipe)
        found = {}
        for name in NAMES:
            changes = [self.tensors[m][name] - origin[name] for m in models]
            kept = [c * (c.abs() >= c.abs().sort(descending=True).values[int(density * SIZE) - 1]) for c in changes]
            found[name] = torch.stack([(made[name] - self.target[name]) @ change for change in kept])
        return found

    def stream_outputs(self) -> list[str]:
        return ["*.down"]

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss, _ in self.trials]


def search(problem: Problem, strategy: str, **options: Any) -> None:
    function, options = registry.options_of(strategy, "searcher", options)
    function(problem, **options)


def weights_of(recipe: dict[str, Any], name: str) -> list[float]:
    return settings(Recipe.of(recipe, "it"), registry.find(recipe["method"], "merger"), name, 0, [(0, 2)])[0]


LAYERWISE = {"embed": (0.0, 0.0), "layers.0.up": (1.0, 0.0), "layers.1.up": (0.0, 1.0)}
WEIGHTS = tuple(Gene(f"w{i}", 0.0, 2.0) for i in range(3))
SPREAD = dict.fromkeys(NAMES, (0.2, 1.5, 0.7))


# genes


def test_a_gene_takes_every_place_to_a_value_of_its_range() -> None:
    assert [Gene("a", 1.0, 3.0).at(p) for p in (0.0, 0.25, 1.0)] == [1.0, 1.5, 3.0]
    assert Gene("a", 0.01, 1.0, is_log=True).at(0.5) == pytest.approx(0.1)
    whole = Gene("a", 2, 4, is_integer=True)
    assert [whole.at(p) for p in (0.0, 0.3, 0.5, 0.7, 1.0)] == [2, 2, 3, 4, 4] and [whole.at(p) for p in whole.places(3)] == [2, 3, 4]
    assert [Gene("a", 1, 10**12, is_integer=True).at(p) for p in Gene("a", 1, 10**12, is_integer=True).places(2)] == [1, 10**12]
    choice = Gene("a", choices=("x", "y"))
    assert [choice.at(p) for p in (0.0, 0.49, 0.5, 1.0)] == ["x", "x", "y", "y"] and [choice.at(p) for p in choice.places(7)] == ["x", "y"]
    assert Gene("a").places(3) == [0.0, 0.5, 1.0] and Gene("a").places(1) == [0.5]


# grid, random, CMA-ES


def test_the_grid_tries_every_combination_once_and_is_refused_above_the_budget() -> None:
    problem = Bowl(SPREAD, 12, genes=(WEIGHTS[0], Gene("w1", choices=(0.0, 1.0)), Gene("w2", 0, 1, is_integer=True)))
    search(problem, "grid", points=3)
    assert {tuple(weights_of(r, "embed")) for r, _, _ in problem.trials} == {(a, b, c) for a in (0.0, 1.0, 2.0) for b in (0.0, 1.0) for c in (0.0, 1.0)}
    with pytest.raises(EspalierError, match="20 candidates and the budget is 12"):
        search(problem, "grid", points=5)


def test_random_search_begins_in_the_middle_stays_in_the_ranges_and_depends_on_the_seed() -> None:
    one, same, other = (Bowl(SPREAD, 20, genes=WEIGHTS, seed=seed) for seed in (0, 0, 1))
    for problem in (one, same, other):
        search(problem, "random_search")
    assert weights_of(one.trials[0][0], "embed") == [1.0, 1.0, 1.0] and len(one.trials) == 20
    assert all(0 <= w <= 2 for recipe, _, _ in one.trials for w in weights_of(recipe, "embed"))
    assert one.trials == same.trials and one.losses[1:] != other.losses[1:]


def test_cma_finds_the_weights_that_random_search_does_not_and_depends_on_the_seed_alone() -> None:
    one, same, other, random = (Bowl(SPREAD, 150, genes=WEIGHTS, seed=seed) for seed in (0, 0, 1, 0))
    torch.manual_seed(1)
    search(one, "cma")
    torch.manual_seed(2)
    search(same, "cma")
    search(other, "cma")
    search(random, "random_search")
    assert one.trials == same.trials and one.losses != other.losses and len(one.trials) == 150
    best = min(one.trials, key=lambda trial: trial[1])
    assert weights_of(best[0], "embed") == pytest.approx([0.2, 1.5, 0.7], abs=0.02)
    assert min(one.losses) < min(random.losses) / 10
    assert all(0 <= w <= 2 for recipe, _, _ in one.trials for w in weights_of(recipe, "embed"))


@pytest.mark.parametrize("genes", [1, 3])
def test_cma_stops_at_the_budget_within_a_generation_and_goes_past_candidates_that_cannot_be_merged(genes: int) -> None:
    class Holed(Bowl):
        def value(self, content: dict[str, Any]) -> float:
            return math.inf if weights_of(content, "embed")[0] > 1 else super().value(content)

    problem = Holed(dict.fromkeys(NAMES, (0.2, 1.5, 0.7)[:genes]), 31, genes=WEIGHTS[:genes])
    search(problem, "cma", population=8)
    assert len(problem.trials) == 31 and math.inf in problem.losses[:16] and min(problem.losses[16:]) < sorted(problem.losses[:8])[1]


def test_cma_says_that_it_converged_before_the_budget() -> None:
    problem = Bowl(dict.fromkeys(NAMES, (0.5,)), 5000, genes=WEIGHTS[:1])
    search(problem, "cma")
    assert len(problem.trials) < 5000 and "ended after" in problem.notes[0]


def test_without_its_package_cma_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(EspalierError, match=r"pip install 'espalier\[search\]'"):
        search(Bowl(SPREAD, 5, genes=WEIGHTS), "cma")


@pytest.mark.parametrize(("strategy", "option"), [
    ("cma", {"sigma": 0.0}), ("cma", {"population": 1}), ("grid", {"points": 0}), ("evolve_path", {"repeats": 0}), ("evolve_path", {"spread": -1.0}),
    ("adamerging", {"keep": 0.0}), ("adamerging", {"tries": 0}), ("frank_wolfe", {"step_size": 1.5}), ("frank_wolfe", {"sequences": 0}),
])  # fmt: skip
def test_options_out_of_range_are_refused_by_name(strategy: str, option: dict[str, Any]) -> None:
    with pytest.raises(EspalierError, match=next(iter(option))):
        search(Bowl(SPREAD, 5, genes=WEIGHTS), strategy, **option)


# greedy soup


def test_the_greedy_soup_goes_from_the_best_model_on_and_keeps_what_lowers_the_loss() -> None:
    problem = Bowl(dict.fromkeys(NAMES, (0.3, 0.6, 0.0)), 100)
    search(problem, "greedy_soup")
    kept = [[i for i, w in enumerate(weights_of(recipe, "embed")) if w] for recipe, _, _ in problem.trials]
    assert kept[:2] == [[1], [0, 1]] and kept[2] == [0, 1, 2], "the best first, then each with those that were kept"
    assert problem.losses[1] < min(problem.losses[0], problem.losses[2]) and problem.notes == ["the soup has 2 of 3 models"]
    assert problem.losses[0] == min(problem.alone(i) for i in range(3))
    assert all(set(weights_of(r, "embed")) <= {0.0, 1.0} and r["method"] == "linear" for r, _, _ in problem.trials)


# AdaMerging


def test_adamerging_learns_a_coefficient_for_every_model_and_tensor() -> None:
    problem = Bowl(LAYERWISE, 200)
    search(problem, "adamerging", learning_rate=0.05)
    last = problem.trials[-1][0]
    assert last["method"] == "task_arithmetic"
    for name, wanted in LAYERWISE.items():
        assert weights_of(last, name) == pytest.approx(wanted, abs=0.02)
    assert problem.losses[0] == problem.value(problem.recipe("task_arithmetic", [0.3, 0.3])) and problem.losses[-1] < problem.losses[0] / 100


def test_task_wise_adamerging_learns_one_coefficient_for_each_model() -> None:
    problem = Bowl(SPREAD, 300)
    search(problem, "adamerging", granularity="task", learning_rate=0.05)
    last = problem.trials[-1][0]
    assert last["parameters"] == [] and weights_of(last, "embed") == pytest.approx([0.2, 1.5, 0.7], abs=0.02)


def test_the_first_step_of_adamerging_is_the_learning_rate_against_the_slope() -> None:
    problem = Bowl(LAYERWISE, 1)
    search(problem, "adamerging", learning_rate=0.01, tries=1)
    slopes = Bowl(LAYERWISE, 1).slopes(problem.trials[0][0])
    for name in NAMES:
        assert weights_of(problem.trials[-1][0], name) == pytest.approx((0.3 - 0.01 * slopes[name].sign()).tolist(), abs=1e-6)


def test_adamerging_of_zero_coefficients_is_the_base() -> None:
    problem = Bowl(LAYERWISE, 1)
    search(problem, "adamerging", start=0.0, learning_rate=0.0)
    assert all(bool((made == 0).all()) for made in problem.merged(problem.trials[-1][0]).values())


def test_adamerging_with_a_share_kept_trims_the_changes_first() -> None:
    problem = Bowl(LAYERWISE, 40)
    search(problem, "adamerging", keep=0.5, learning_rate=0.05)
    last = problem.trials[-1][0]
    made = problem.merged({**last, "models": [{"path": "m0", "weight": 1.0}], "parameters": []})
    assert last["method"] == "breadcrumbs" and problem.losses[-1] < problem.losses[0]
    for name in NAMES:
        change = direction(1, name)
        assert torch.allclose(made[name], change * (change.abs() >= change.abs().median()), atol=1e-6) or int((made[name] != 0).sum()) == SIZE // 2


def test_adamerging_needs_a_base() -> None:
    with pytest.raises(EspalierError, match="--model BASE"):
        search(Bowl(LAYERWISE, 1, has_base=False), "adamerging")


# Frank-Wolfe


@pytest.mark.parametrize("variant", ["hard", "soft"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize("has_base", [True, False])
def test_frank_wolfe_stays_in_the_convex_hull_and_its_gap_bounds_the_loss(variant: str, granularity: str, has_base: bool) -> None:
    problem = Bowl(dict.fromkeys(NAMES, (0.5, 0.3, 0.2)), 12, has_base=has_base)
    search(problem, "frank_wolfe", variant=variant, granularity=granularity, soft_steps=5, learning_rate=0.05)
    assert len(problem.trials) == 13
    for recipe, _, _ in problem.trials:
        assert recipe["method"] == "linear"
        for name in NAMES:
            shares = weights_of(recipe, name)
            assert len(shares) == 3 + has_base and min(shares) >= 0 and sum(shares) == pytest.approx(1, abs=1e-12)
        if granularity == "task":
            assert len({tuple(weights_of(recipe, name)) for name in NAMES}) == 1
    gaps = [float(about.split("duality gap ")[1]) for _, _, about in problem.trials[1:]]
    assert min(gaps) >= 0
    for gap, before in zip(gaps, problem.losses, strict=False):  # the target is in the hull, so the least loss is 0
        assert gap >= before * 0.999
    assert min(problem.losses) < problem.losses[0]


def test_a_step_of_frank_wolfe_by_layer_goes_to_the_best_model_of_every_tensor() -> None:
    problem = Bowl(LAYERWISE, 1)
    search(problem, "frank_wolfe")
    shares = {name: weights_of(problem.trials[-1][0], name) for name in NAMES}
    assert shares == {"embed": [0, 0, 1], "layers.0.up": [1, 0, 0], "layers.1.up": [0, 1, 0]} and problem.losses[-1] < 1e-9


def test_frank_wolfe_does_not_take_models_that_do_not_help() -> None:
    alone = Bowl(dict.fromkeys(NAMES, (0.6, 0.4)), 10)
    crowd = Bowl(dict.fromkeys(NAMES, (0.6, 0.4)), 10, models=8)
    for problem in (alone, crowd):
        search(problem, "frank_wolfe", granularity="task")
    assert max(crowd.losses[-1], alone.losses[-1]) < 0.1 * crowd.losses[0]
    assert sum(weights_of(crowd.trials[-1][0], "embed")[2:8]) < 0.15


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_a_copy_of_a_model_changes_nothing_for_frank_wolfe(granularity: str) -> None:
    alone = Bowl(dict.fromkeys(NAMES, (0.6, 0.4)), 8)
    copied = Bowl(dict.fromkeys(NAMES, (0.6, 0.4)), 8, models=3, copy=2)
    for problem in (alone, copied):
        search(problem, "frank_wolfe", granularity=granularity)
    assert copied.losses == pytest.approx(alone.losses, rel=1e-5)
    assert weights_of(copied.trials[-1][0], "embed")[2] == 0


def test_hard_frank_wolfe_takes_steps_of_two_over_t_plus_two() -> None:
    problem = Bowl(dict.fromkeys(NAMES, (0.5, 0.3, 0.2)), 4)
    search(problem, "frank_wolfe", granularity="task", step_size=0.5)
    shares = [torch.tensor(weights_of(recipe, "embed"), dtype=torch.float64) for recipe, _, _ in problem.trials]
    for t, (before, after) in enumerate(itertools.pairwise(shares)):
        eta = 0.5 * 2 / (t + 2)
        vertex = (after - (1 - eta) * before) / eta
        assert torch.allclose(vertex.sort().values, torch.tensor([0.0, 0, 0, 1], dtype=torch.float64), atol=1e-9)


def test_the_soft_variant_asks_for_the_gradient_of_every_data_set() -> None:
    problem = Bowl(LAYERWISE, 2)
    search(problem, "frank_wolfe", variant="soft", soft_steps=3)
    assert problem.asked == [0, 1, -1, -1, -1] * 2


# the path through blocks


def test_the_first_path_is_the_first_model_and_slots_that_are_off_are_never_in_a_path() -> None:
    class Path(Bowl):
        def value(self, content: dict[str, Any]) -> float:
            return float(len(content["stack"]))

    one, same = Path(SPREAD, 40), Path(SPREAD, 40)
    assert one.blocks == (2, 2, 2)
    search(one, "evolve_path")
    search(same, "evolve_path")
    assert one.trials == same.trials and len(one.trials) == 40
    assert one.trials[0][0]["stack"] == [{"blocks": {0: [0, 1]}}, {"blocks": {0: [1, 2]}}] and one.trials[0][0]["parameters"] == []
    for recipe, _, _ in one.trials:
        Recipe.of(recipe, "a path")
        assert 1 <= len(recipe["stack"]) <= 3 * 2 * 2
        assert all(1 / math.e**6 < p["scale"] < math.e**6 and p["names"] == ["*.down"] for p in recipe["parameters"])
    assert min(one.losses) == 1, "shorter is better here"


def test_without_a_spread_the_stream_is_left_as_it_is() -> None:
    class Path(Bowl):
        def value(self, content: dict[str, Any]) -> float:
            return float(len(content["stack"]))

    problem = Path(SPREAD, 10)
    search(problem, "evolve_path", spread=0.0, repeats=1)
    assert all(recipe["parameters"] == [] for recipe, _, _ in problem.trials)
