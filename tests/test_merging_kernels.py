"""The inner loops of merging: what is compiled gives the bits of what is plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.kernels import merging
from espalier.kernels.merging import (
    Between,
    Clamp,
    Draws,
    Numbers,
    add_changes,
    add_scores,
    agree,
    blend,
    compete,
    drop,
    elect,
    masses,
    middle,
    thin,
    variance,
)
from espalier.kernels.philox import Stream

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


def refuse(model: int | None) -> NoReturn:
    raise ValueError(f"{model} is not finite")


def stored(seed: int, models: int, size: int, are_changes: bool = False) -> Numbers:
    """A base and models near it, every other one in bf16."""
    base = numbers(seed, size)
    wide = numbers(seed + 1, models, size) if are_changes else base + numbers(seed + 1, models, size) / 8
    rows = [base, *wide]
    return Numbers(rows[0], [row.bfloat16() if (seed + i) % 2 else row for i, row in enumerate(rows[1:])], refuse, are_changes)


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
@given(seeds, st.integers(1, 4), sizes, st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_what_lies_between_bounds_of_changes_and_of_scores(seed: int, models: int, size: int, low: float, width: float) -> None:
    given_numbers = stored(seed, models, size)
    clamp = Clamp(torch.full((models,), low / 8), torch.full((models,), low / 8 + 0.5))

    def gathered(add: Callable[[list[tuple[int, Between]]], None]) -> Any:
        found = [(model, Between(low * factor, low * factor + width)) for factor in (0.1, 1) for model in range(models)]
        add(found)
        add(found)
        return [(between.counts, between.numbers().sort().values) for _, between in found]

    assert same(*both(lambda: gathered(lambda found: add_changes(given_numbers, found))))
    assert same(*both(lambda: gathered(lambda found: add_scores(given_numbers, clamp, found))))


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 5), sizes, st.booleans(), st.booleans(), st.integers(-1, 20), st.booleans())
def test_the_election(seed: int, models: int, size: int, by_mass: bool, normalize: bool, left: int, are_changes: bool) -> None:
    given_numbers, weights = stored(seed, models, size, are_changes), numbers(seed + 2, models)
    limits = torch.stack([given_numbers.change(model)[0].abs() for model in range(models)])

    def do() -> Any:
        ties = torch.full((models,), left)
        return elect(given_numbers, weights, by_mass, normalize, 0.7, limits, ties), ties

    assert same(*both(do))


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 5), sizes, st.integers(0, 2**40), st.booleans())
def test_the_election_among_what_is_drawn(seed: int, models: int, size: int, position: int, by_mass: bool) -> None:
    given_numbers, weights, drawn = stored(seed, models, size), numbers(seed + 2, models), draws(seed, models, position)
    out = torch.empty(models, size)
    drop(given_numbers, drawn, out)
    dropped = Numbers(given_numbers.base, out.unbind(), refuse, are_changes=True)
    fused, *others = (*both(lambda: elect(given_numbers, weights, by_mass, True, 0.7, draws=drawn)), elect(dropped, weights, by_mass, True, 0.7))
    assert all(same(fused, other) for other in others)


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
def test_thinning_by_rank(seed: int, rows: int, size: int) -> None:
    updates, drawn = numbers(seed, rows, size), torch.rand(rows, size, generator=torch.Generator().manual_seed(seed))
    odds, factors = torch.linspace(0.2, 0.8, size), torch.linspace(3, 1, size)

    def ranked() -> torch.Tensor:
        out = torch.empty_like(updates)
        thin(updates, drawn, odds, factors, out)
        return out

    assert same(*both(ranked))


def draws(seed: int, models: int, position: int) -> Draws:
    return Draws([Stream(seed, f"dropped {model}", position + model) for model in range(models)], [0.3] * models, [1 / 0.3] * models)


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 3), sizes, st.integers(0, 2**40))
def test_dropping_at_random(seed: int, models: int, size: int, position: int) -> None:
    given_numbers, drawn = stored(seed, models, size), draws(seed, models, position)

    def dropped() -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty(models, size)
        drop(given_numbers, drawn, out)
        return out, masses(given_numbers, drawn)

    compiled, plain = both(dropped)
    assert same(compiled, plain)
    changes = torch.stack([given_numbers.change(model) for model in range(models)])
    uniform = torch.stack([Stream(seed, f"dropped {model}", position + model).uniform(size) for model in range(models)])
    assert torch.equal(plain[0] != 0, (uniform < 0.3) & (changes != 0))
    torch.testing.assert_close(plain[1], torch.stack([changes.double(), plain[0].double()], 1).abs().sum(-1), rtol=1e-5, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 6), sizes)
def test_variance_and_agreement(seed: int, models: int, size: int) -> None:
    updates = numbers(seed, models, size)
    assert same(*both(lambda: variance(updates)))
    assert same(*both(lambda: agree(updates[0] / 3, updates, numbers(seed + 1, models), 0.7)))


def test_the_rational_functions_are_exact_to_float32() -> None:
    a = torch.linspace(0, 1, 4001)
    for count in (1, 3):
        clamp = Clamp(torch.zeros(count), torch.ones(count))
        scores = compete(Numbers(torch.zeros_like(a), [a] * count, refuse), clamp)[1]
        wide = a.double()
        expected = torch.exp(count * (wide**2 - 1)) * count * torch.tanh(wide**2)
        torch.testing.assert_close(scores[0].double(), expected, rtol=2e-6, atol=1e-9)


def test_equal_updates_have_no_variance() -> None:
    one = numbers(3, 1, 1000) / 3
    assert not bool(variance(one.repeat(3, 1)).any())


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 5), sizes)
def test_blending_by_scores(seed: int, models: int, size: int) -> None:
    given_numbers = stored(seed, models, size)
    changes = torch.stack([given_numbers.change(model).abs() for model in range(models)])
    low, high = changes.amin(1), changes.amax(1)
    clamp = Clamp(low + 0.1 * (high - low), high - 0.1 * (high - low))
    cut, factors, weights = compete(given_numbers, clamp)[1].quantile(0.5, dim=-1), numbers(seed + 3, models).abs(), numbers(seed + 4, models)
    assert same(*both(lambda: blend(given_numbers, clamp, cut, factors, weights, 0.7)))


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_loop_refuses_what_is_not_finite_and_says_whose_it_is(row: int, dtype: torch.dtype) -> None:
    rows = torch.zeros(3, 1500, dtype=dtype)
    rows[row, 1300] = -torch.inf
    clamp, ones, out = Clamp(torch.zeros(2), torch.ones(2)), torch.ones(2), torch.empty(2, 1500)
    for do in (
        lambda given: add_changes(given, [(0, Between(0, 1)), (1, Between(0, 1))]),
        lambda given: add_scores(given, clamp, [(0, Between(0, 1))]),
        lambda given: elect(given, ones, True, True, 1.0),
        lambda given: blend(given, clamp, ones, ones, ones, 1.0),
        lambda given: drop(given, draws(0, 2, 0), out),
        lambda given: masses(given, draws(0, 2, 0)),
    ):
        def refused(do: Callable[[Numbers], Any] = do) -> str:
            with pytest.raises(ValueError) as caught:
                do(Numbers(rows[0], rows[1:].unbind(), refuse))
            return str(caught.value)

        assert both(refused) == (f"{row - 1 if row else None} is not finite",) * 2
