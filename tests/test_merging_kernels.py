"""The inner loops of merging: what is compiled gives the bits of what is plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.kernels import merging
from espalier.kernels.merging import Between, agree, blend, compete, drop, elect, middle, thin, variance

pytest.importorskip("numba")
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1, 2, 3, 7, 64, 65, 2047, 2048, 2049, 5000])


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """Numbers as updates have them: many equal, many zero, of both signs, some tiny."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator)
    kind = torch.randint(0, 4, shape, generator=generator)
    made = torch.where(kind == 0, (made * 4).round() / 4, made)  # ties, and both zeros
    made = torch.where(kind == 1, made * 1e-30, made)
    return torch.where(kind == 2, made.bfloat16().float(), made)


def both(do: Callable[[], Any]) -> tuple[Any, Any]:
    """What the compiled loops make, and what the plain ones make."""
    compiled = do()
    kept, merging._fast = merging._fast, lambda: None  # type: ignore[assignment]
    try:
        return compiled, do()
    finally:
        merging._fast = kept


def same(first: Any, second: Any) -> bool:
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@settings(deadline=None, max_examples=60)
@given(seeds, sizes, st.floats(-2, 2, width=32), st.floats(0, 2, width=32), st.booleans())
def test_what_lies_between_bounds(seed: int, size: int, low: float, width: float, signed: bool) -> None:
    values = numbers(seed, size)

    def gathered() -> Any:
        between = Between(low, low + width, signed)
        between.add(values)
        between.add(values[: size // 2])
        return between.counts, between.numbers().sort().values

    assert same(*both(gathered))


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 5), sizes, st.booleans(), st.booleans(), st.integers(-1, 20))
def test_the_election(seed: int, models: int, size: int, by_mass: bool, normalize: bool, left: int) -> None:
    updates, base, weights = numbers(seed, models, 1, size), numbers(seed + 1, 1, size), numbers(seed + 2, models)
    limits = updates[:, 0, 0].abs()

    def do() -> Any:
        ties = torch.full((models,), left)
        return elect(base, updates, weights, limits, ties, by_mass, normalize, 0.7), ties

    assert same(*both(do))


@settings(deadline=None, max_examples=80)
@given(seeds, st.integers(1, 4), sizes, st.floats(0, 1), st.floats(0, 1))
def test_the_middle_of_each_row(seed: int, rows: int, size: int, skipped: float, kept: float) -> None:
    updates, skip = numbers(seed, rows, size), int(skipped * size)
    keep = min(int(kept * size), size - skip)

    def do() -> torch.Tensor:
        out = torch.empty_like(updates)
        middle(updates, skip, keep, out)
        return out

    compiled, plain = both(do)
    assert torch.equal(compiled, plain)
    assert bool((plain.count_nonzero(-1) <= keep).all())


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 4), sizes)
def test_thinning_by_rank_and_dropping(seed: int, rows: int, size: int) -> None:
    updates, drawn = numbers(seed, rows, size), torch.rand(rows, size, generator=torch.Generator().manual_seed(seed))
    odds, factors = torch.linspace(0.2, 0.8, size), torch.linspace(3, 1, size)

    def ranked() -> torch.Tensor:
        out = torch.empty_like(updates)
        thin(updates, drawn, odds, factors, out)
        return out

    def dropped() -> torch.Tensor:
        out = torch.empty(rows * size)
        drop(updates.view(-1), drawn.view(-1), 0.3, 1 / 0.3, out)
        return out

    for do in (ranked, dropped):
        assert same(*both(do))


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 6), sizes)
def test_variance_and_competition(seed: int, models: int, size: int) -> None:
    updates = numbers(seed, models, size)
    low, high = updates.abs().amin(1), updates.abs().amax(1)
    low, high = low + 0.1 * (high - low), high - 0.1 * (high - low)
    assert same(*both(lambda: variance(updates)))
    assert same(*both(lambda: agree(updates[0] / 3, updates, numbers(seed + 1, models), 0.7)))


    def competed() -> Any:
        clamped, scores = updates.clone(), torch.empty_like(updates)
        compete(clamped, low, high, (high - low).clamp_min(1e-12), scores)
        return clamped, scores

    assert same(*both(competed))


def test_the_rational_functions_are_exact_to_float32() -> None:
    a = torch.linspace(0, 1, 4001).repeat(1, 1)
    for count in (1, 3):
        updates = a.repeat(count, 1)
        ones, zeros = torch.ones(count), torch.zeros(count)
        scores = torch.empty_like(updates)
        compete(updates, zeros, ones, ones, scores)
        wide = a.double()
        expected = torch.exp(count * (wide**2 - 1)) * count * torch.tanh(wide**2)
        torch.testing.assert_close(scores[0].double(), expected[0], rtol=2e-6, atol=1e-9)


def test_equal_updates_have_no_variance() -> None:
    one = numbers(3, 1, 1000) / 3
    assert not bool(variance(one.repeat(3, 1)).any())


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 5), sizes)
def test_blending_by_scores(seed: int, models: int, size: int) -> None:
    base, clamped, scores = numbers(seed, size), numbers(seed + 1, models, size), numbers(seed + 2, models, size)
    cut, factors, weights = scores.quantile(0.5, dim=-1), numbers(seed + 3, models).abs(), numbers(seed + 4, models)
    assert same(*both(lambda: blend(base, clamped, scores, cut, factors, weights, 0.7)))
