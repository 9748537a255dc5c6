"""The generator: known answers of the reference implementation, golden draws, and what each draw promises.

The golden numbers were computed once with a generator written apart, in Python integers; a change of any of them
is a change of every seeded basis, index and starting value that a delta on disk relies on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.kernels.philox import Stream, philox

# (counter, key, output): the philox4x32 lines of tests/kat_vectors in DEShawResearch/random123
KNOWN_ANSWERS = {
    10: [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    7: [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("rounds", KNOWN_ANSWERS)
def test_the_known_answers_of_random123(rounds: int) -> None:
    for counter, key, output in KNOWN_ANSWERS[rounds]:
        found = philox(torch.tensor([words(counter)]), tuple(words(key)), rounds)
        assert found.tolist() == [words(output)]


def test_counters_do_not_disturb_one_another() -> None:
    counters = torch.tensor([words(counter) for counter, _, _ in KNOWN_ANSWERS[10]] * 2)
    together = philox(counters, (1, 2))
    assert together.tolist() == [philox(c[None], (1, 2))[0].tolist() for c in counters]


def stream() -> Stream:
    return Stream(7, "weight")


GOLDEN: dict[str, tuple[Callable[[Stream], torch.Tensor], list]] = {
    "integers32": (lambda s: s.integers32(6), [1529709551, 1394697459, 4178191745, 703638462, 1858246496, 3950194730]),
    "uniform": (lambda s: s.uniform(4), [5975427 / 2**24, 5448036 / 2**24, 16321061 / 2**24, 2748587 / 2**24]),
    "uniform in [-2, 2)": (
        lambda s: s.uniform(2, 2, low=-2, high=2),
        [[5975427 / 2**22 - 2, 5448036 / 2**22 - 2], [16321061 / 2**22 - 2, 2748587 / 2**22 - 2]],
    ),
    "rademacher": (lambda s: s.rademacher(12), [-1, -1, 1, -1, -1, 1, 1, -1, -1, -1, 1, 1]),
    "sparse_rademacher": (lambda s: s.sparse_rademacher(12), [0, 0, 0, -1, 0, 0, 1, -1, 0, -1, 0, 0]),
    "gaussian": (
        lambda s: s.gaussian(6),
        [float.fromhex(f"{h}p-26") for h in ("-0x1799564", "-0x1d16bc8", "0x7b212f8", "-0x3ea58c8", "-0xadb04e", "0x59cf198")],
    ),
    "kaiming_uniform": (
        lambda s: s.kaiming_uniform(4, 1, fan_in=4),
        [[5975427 / 2**24 - 0.5], [5448036 / 2**24 - 0.5], [16321061 / 2**24 - 0.5], [2748587 / 2**24 - 0.5]],
    ),
    "permutation": (lambda s: s.permutation(10), [7, 9, 3, 8, 1, 0, 4, 6, 5, 2]),
    "choice": (lambda s: s.choice(20, 6), [1, 3, 7, 8, 9, 16]),
}


@pytest.mark.parametrize("draw", GOLDEN)
def test_the_golden_numbers_of(draw: str) -> None:
    make, expected = GOLDEN[draw]
    assert make(stream()).tolist() == expected


def test_the_gaussian_table_is_the_quantile_function_of_the_standard_normal() -> None:
    """At the midpoints of 65,536 equal probabilities, to the rounding of float32."""
    words = stream().integers32(4096)
    probability = ((words >> 16).double() + 0.5) / 65536
    exact = math.sqrt(2) * torch.erfinv(2 * probability - 1)
    torch.testing.assert_close(stream().gaussian(4096).double(), exact, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), max_size=8))
def test_a_draw_does_not_depend_on_how_it_is_split(sizes: list[int]) -> None:
    source = stream()
    parts = [source.integers32(size) for size in sizes]
    assert torch.equal(torch.cat([*parts, torch.empty(0, dtype=torch.int64)]), stream().integers32(sum(sizes)))


def test_a_draw_does_not_depend_on_its_blocks_of_work() -> None:
    whole = stream().integers32((1 << 20) + 9)
    source = stream()
    assert torch.equal(torch.cat((source.integers32((1 << 20) - 3), source.integers32(12))), whole)


def test_kinds_of_draws_follow_one_another_in_one_sequence() -> None:
    source = stream()
    source.gaussian(3), source.permutation(4)
    assert source.integers32(2).tolist() == stream().integers32(9)[7:].tolist()


def test_other_names_and_other_seeds_give_other_numbers() -> None:
    draws = {
        tuple(Stream(seed, name).integers32(4).tolist())
        for seed in (0, 1, -1, 2**40, 71)
        for name in ("", "weight", "weight ", "bias", "1|weight")
    }
    assert len(draws) == 25
    assert torch.equal(Stream(3, "weight").integers32(4), Stream(3, "weight").integers32(4))


def test_a_stream_gives_streams_of_other_names_from_their_beginning() -> None:
    """Of its own class, so that whoever replaces the source of numbers replaces all of them."""

    class Zeros(Stream):
        def integers32(self, count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int64)

    source = Stream(3, "weight")
    source.integers32(5)
    assert torch.equal(source.named("bias").integers32(4), Stream(3, "bias").integers32(4))
    assert not Zeros(3, "weight").named("bias").integers32(4).any()


COUNT = 200_000


def close(found: torch.Tensor, expected: float, deviation: float) -> bool:
    """Whether a mean of COUNT numbers is within 5 of its standard errors."""
    return abs(float(found.double().mean()) - expected) < 5 * deviation / math.sqrt(COUNT)


def test_the_moments_of_uniform_numbers() -> None:
    x = stream().uniform(COUNT, low=-1.0, high=1.0)
    assert x.dtype == torch.float32 and float(x.min()) >= -1 and float(x.max()) < 1
    assert close(x, 0, math.sqrt(1 / 3)) and close(x.square(), 1 / 3, math.sqrt(4 / 45))
    counts = torch.histc(x, 100, -1, 1)
    assert float(((counts - COUNT / 100) ** 2 / (COUNT / 100)).sum()) < 99 + 5 * math.sqrt(2 * 99)  # chi-squared


def test_the_moments_of_gaussian_numbers() -> None:
    x = stream().gaussian(COUNT)
    assert close(x, 0, 1) and close(x.square(), 1, math.sqrt(2)) and close(x.pow(3), 0, math.sqrt(15))
    assert close(x.pow(4), 3, math.sqrt(96))
    assert close(x[1:] * x[:-1], 0, 1)


def test_the_moments_of_rademacher_numbers() -> None:
    x = stream().rademacher(COUNT)
    assert set(x.tolist()) == {-1.0, 1.0} and close(x, 0, 1)
    assert close(x[1:] * x[:-1], 0, 1)


@pytest.mark.parametrize("sparsity", [1.0, 3.0, 16.0])
def test_the_moments_of_sparse_rademacher_numbers(sparsity: float) -> None:
    x = stream().sparse_rademacher(COUNT, sparsity=sparsity)
    kept = 1 / sparsity
    assert set(x.tolist()) <= {-1.0, 0.0, 1.0}
    assert close(x, 0, math.sqrt(kept)) and close(x.abs(), kept, math.sqrt(kept * (1 - kept)) + 1e-9)


def test_shapes_are_those_asked_for() -> None:
    assert stream().uniform(2, 3).shape == (2, 3) and stream().gaussian(0, 4).shape == (0, 4)
    assert stream().rademacher(5, 1, 2).shape == (5, 1, 2) and stream().kaiming_uniform(2, 3, 4).shape == (2, 3, 4)
    bound = 1 / math.sqrt(4)
    assert bound * 0.9 < float(stream().kaiming_uniform(64, 4).abs().max()) <= bound


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 300), st.integers(-5, 5))
def test_a_permutation_holds_every_index_once(count: int, seed: int) -> None:
    found = Stream(seed, "order").permutation(count)
    assert found.dtype == torch.int64 and sorted(found.tolist()) == list(range(count))


def test_every_place_of_a_permutation_is_as_likely_for_every_index() -> None:
    source = stream()
    orders = torch.stack([source.permutation(5) for _ in range(2000)])
    for place in range(5):
        counts = torch.bincount(orders[:, place], minlength=5).double()
        assert float(((counts - 400) ** 2 / 400).sum()) < 4 + 5 * math.sqrt(8)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.integers(0, 220), st.integers(0, 5))
def test_a_choice_is_distinct_and_sorted(count: int, chosen: int, seed: int) -> None:
    found = Stream(seed, "choice").choice(count, chosen).tolist()
    assert found == sorted(set(found)) and len(found) == min(count, chosen)
    assert all(0 <= member < count for member in found)
