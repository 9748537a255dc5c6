"""Learning-rate schedules: warm-up, shape and end."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.train.schedules import SHAPES, factor

every_shape = pytest.mark.parametrize("shape", SHAPES)
runs = st.tuples(st.integers(1, 300), st.floats(0, 0.99)).map(lambda run: (run[0], int(run[0] * run[1])))
quickly = settings(deadline=None, max_examples=50, database=None)


def curve(shape: str, steps: int, warmup: int = 0, floor: float = 0.0, decay: float = 0.2) -> list[float]:
    return [factor(shape, step, steps, warmup, floor, decay) for step in range(steps)]  # type: ignore[arg-type]


@quickly
@given(shape=st.sampled_from(SHAPES), run=runs, floor=st.floats(0, 1), decay=st.floats(0.01, 1))
def test_a_factor_is_more_than_zero_and_at_most_one(shape: str, run: tuple[int, int], floor: float, decay: float) -> None:
    assert all(0 < f <= 1 for f in curve(shape, *run, floor, decay))


@quickly
@given(shape=st.sampled_from(SHAPES), run=runs, floor=st.floats(0, 1), decay=st.floats(0.01, 1))
def test_after_the_warm_up_it_never_rises_nor_falls_below_the_floor(
    shape: str, run: tuple[int, int], floor: float, decay: float
) -> None:
    steps, warmup = run
    rest = curve(shape, steps, warmup, floor, decay)[warmup:]
    assert all(one >= other for one, other in pairwise(rest))
    assert rest[-1] >= floor - 1e-12


@every_shape
def test_the_warm_up_is_a_straight_line_from_above_zero_to_the_peak(shape: str) -> None:
    assert curve(shape, 100, warmup=4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@every_shape
def test_without_warm_up_the_first_step_is_at_the_peak(shape: str) -> None:
    assert factor(shape, 0, 100, 0) == 1.0  # type: ignore[arg-type]


@every_shape
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_end_is_one_step_from_the_floor(shape: str, floor: float) -> None:
    values = curve(shape, 1000, warmup=10, floor=floor)
    if shape == "constant":
        assert set(values[10:]) == {1.0}
    else:
        assert values[-1] == pytest.approx(floor, abs=0.006)
        if shape != "wsd":
            assert factor(shape, 1000, 1000, 10, floor) == pytest.approx(floor)  # type: ignore[arg-type]


def test_linear_and_cosine_are_half_way_in_the_middle() -> None:
    assert [factor("linear", 55, 100, 10, 0.2), factor("cosine", 55, 100, 10, 0.2)] == pytest.approx([0.6, 0.6])
    assert factor("linear", 32, 100, 10) == pytest.approx(1 - 22 / 90)
    assert factor("cosine", 40, 100, 10) == pytest.approx(0.75)  # a third of the way: (1 + cos 60°) / 2


@pytest.mark.parametrize("decay", [0.1, 0.2, 0.5, 1.0])
def test_wsd_is_constant_and_then_a_straight_line_over_the_last_part(decay: float) -> None:
    values = curve("wsd", 100, warmup=0, floor=0.1, decay=decay)
    start = 100 - round(100 * decay)
    assert set(values[:start]) <= {1.0}
    falls = [one - other for one, other in pairwise([1.0, *values[start:], 0.1])]
    assert falls == pytest.approx([0.9 / (100 - start + 1)] * (100 - start + 1))


@every_shape
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_few_steps_have_a_schedule(shape: str, steps: int) -> None:
    assert all(0 < f <= 1 for f in curve(shape, steps, warmup=steps - 1))
