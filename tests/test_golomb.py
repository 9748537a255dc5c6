"""Golomb codes: what is decoded is what was encoded, in the size of the formula, and nothing else is decoded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import EspalierError
from espalier.kernels import golomb

properties = settings(deadline=None, max_examples=100)


def choose(seed: int, entries: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(entries, generator=generator)[:count].sort().values, torch.rand(count, generator=generator) < 0.5


@given(entries=st.integers(0, 300), share=st.floats(0, 1), seed=st.integers(0, 999), b=st.integers(-1, 12))
@properties
def test_decoding_gives_back_positions_and_signs(entries: int, share: float, seed: int, b: int) -> None:
    positions, negative = choose(seed, entries, round(share * entries))
    b = golomb.parameter(len(positions), entries) if b < 0 else b
    code = golomb.encode(positions, negative, b)
    found, signs = golomb.decode(code, len(positions), b, entries)
    assert torch.equal(found, positions) and torch.equal(signs, negative)


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize(("entries", "count", "b"), [(300, 60, 2), (300, 3, 0), (300, 0, 1), (64, 64, 0), (5000, 40, 6)])
def test_decoding_in_blocks_of_any_size_gives_the_same(block: int, entries: int, count: int, b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    positions, negative = choose(0, entries, count)
    code = golomb.encode(positions, negative, b)
    monkeypatch.setattr(golomb, "BLOCK", block)
    parts = list(golomb.blocks(code, count, b, entries))
    assert all(len(p) <= block for p, _ in parts)
    found, signs = golomb.decode(code, count, b, entries)
    assert torch.equal(found, positions) and torch.equal(signs, negative)


@pytest.mark.parametrize("density", [0.5, 0.2, 0.05, 0.01, 0.001])
def test_the_size_is_that_of_the_formula_within_2_percent_and_near_the_entropy(density: float) -> None:
    """ComPEFT: b + 1 / (1 - (1-k)^(2^b)) + 1 bits for each sign; k = 0.05 has an entropy of 0.336 bits an entry, k = 0.5 of 1.5."""
    entries = 2_000_000
    count = round(density * entries)
    code = golomb.encode(*choose(0, entries, count), golomb.parameter(count, entries))
    bits = 8 * len(code)
    assert bits == pytest.approx(golomb.expected_bits(count, entries), rel=0.02 if density > 0.001 else 0.05)
    entropy = -((1 - density) * math.log2(1 - density) + density * math.log2(density / 2)) * entries
    assert entropy <= bits * 1.01 and bits <= 1.05 * entropy
    if density == 0.05:
        assert entropy / entries == pytest.approx(0.336, abs=1e-3)


@given(data=st.data(), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=300)
def test_whatever_the_bytes_decoding_refuses_or_gives_positions_in_range(data: st.DataObject, seed: int) -> None:
    entries = data.draw(st.integers(0, 200))
    positions, negative = choose(seed, entries, data.draw(st.integers(0, entries)))
    b = data.draw(st.integers(0, 6))
    code = golomb.encode(positions, negative, b).tolist()
    for _ in range(data.draw(st.integers(0, 3))):
        if code:
            code[data.draw(st.integers(0, len(code) - 1))] = data.draw(st.integers(0, 255))
    code = code[: data.draw(st.integers(0, len(code) + 2))] + [255] * data.draw(st.integers(0, 2))
    count, entries = data.draw(st.sampled_from([(len(positions), entries), (entries, entries), (3, 5), (len(positions), 2**61), (-1, 4)]))
    b = data.draw(st.sampled_from([b, 0, 7, 48, 49]))
    try:
        found, signs = golomb.decode(torch.tensor(code, dtype=torch.uint8), count, b, entries)
    except EspalierError:
        return
    assert len(found) == len(signs) == count
    assert count == 0 or (int(found[0]) >= 0 and int(found[-1]) < entries and bool((found.diff() > 0).all()))


@pytest.mark.parametrize(
    ("code", "count", "b", "entries", "complaint"),
    [
        ([255], 5, 0, 4, "count is 5"),
        ([255], 1, 64, 4, "parameter 64"),
        ([0] * 4, 2, 0, 2**60, "the code ends 30 gaps or more; there must be 2"),
        ([255] * 100, 3, 0, 20, "has 100 bytes, which 3 of 20 entries do not take"),
        ([0b11001100], 2, 0, 2, "lead beyond the last of 2 entries"),
        ([255, 255], 2, 1, 8, "ends 0 gaps"),
        ([1, 2], 8, 3, 200, "has 2 bytes"),
    ],
)
def test_bytes_of_no_code_are_refused(code: list[int], count: int, b: int, entries: int, complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        golomb.decode(torch.tensor(code, dtype=torch.uint8), count, b, entries)


def test_the_parameter_is_that_of_the_paper() -> None:
    assert [golomb.parameter(round(k * 10**6), 10**6) for k in (0.5, 0.2, 0.1, 0.05, 0.01)] == [0, 2, 3, 4, 6]
