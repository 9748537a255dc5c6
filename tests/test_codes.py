"""Numbers stored in fewer bits: what is compiled gives the bits of what is plain."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.kernels import codes
from espalier.kernels.codes import BLOCK, bounds, codebook
from espalier.kernels.philox import Stream

fast = pytest.importorskip("espalier.kernels.codes_fast")
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 5000, 1 << 14, 40_000])


def values(seed: int, size: int, signed: bool = True) -> torch.Tensor:
    """Numbers of all magnitudes, zeros of both signs, those at the bounds of codes and beside them, blocks of zeros or of tiny numbers."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(size, generator=generator) * 10 ** (-10 * torch.rand(size, generator=generator))
    edges = bounds(signed)[torch.randint(0, 255, (size,), generator=generator)]
    kind = torch.randint(0, 6, (size,), generator=generator)
    made = torch.where(kind == 0, edges, made)
    made = torch.where(kind == 1, edges.nextafter(torch.tensor(1.0)), made)
    made = torch.where(kind == 2, torch.tensor(0.0) * made.sign(), made)
    made[::BLOCK] = 1  # the scale, so that bounds are bounds
    blocks = made[BLOCK : 3 * BLOCK]
    blocks *= torch.where(torch.arange(len(blocks)) < BLOCK, 0.0, 1e-42)  # below what float32 holds in full
    return made if signed else made.abs()


@given(seeds, sizes, st.booleans())
@settings(max_examples=60, deadline=None)
def test_codes_of_eight_bits_are_the_same(seed: int, size: int, signed: bool) -> None:
    given = values(seed, size, signed)
    (plain, scale), (compiled, scales) = codes.plain_encode(given, signed), fast.encode(given, signed)
    assert torch.equal(plain, compiled) and torch.equal(scale, scales)
    assert torch.equal(codes.plain_decode(plain, scale, signed).view(torch.int32), fast.decode(plain, scale, signed).view(torch.int32))


@given(seeds, sizes, st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_rounding_at_random_is_the_same(seed: int, size: int, position: int) -> None:
    given, key = values(seed, size), Stream(seed, "x").key
    assert torch.equal(codes.plain_round_at_random(given, key, position).view(torch.int16), fast.round_at_random(given, key, position).view(torch.int16))


def test_what_is_not_finite_stays_so() -> None:
    for strange in (math.inf, -math.inf, math.nan):
        given = values(0, 3 * BLOCK)
        given[BLOCK + 7] = strange
        (plain, scale), (compiled, scales) = codes.plain_encode(given, True), fast.encode(given, True)
        assert torch.equal(plain, compiled) and torch.allclose(scale, scales, equal_nan=True, rtol=0) and not bool(scale[1].isfinite())
        one, two = codes.plain_round_at_random(given, (1, 2), 0), fast.round_at_random(given, (1, 2), 0)
        assert torch.allclose(one, two, equal_nan=True, rtol=0) and torch.equal(one.isnan(), two.isnan()) and not bool(two[BLOCK + 7].isfinite())


def test_every_code_and_every_number_of_sixteen_bits_is_coded_alike() -> None:
    for signed in (True, False):
        table = codebook(signed)
        shares = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)
        shares = shares[shares.isfinite() & (shares.abs() <= 1) & ((shares >= 0) | signed)]
        given = torch.cat([table, shares, shares.nextafter(torch.tensor(2.0)).clamp_max(1)])
        given = torch.nn.functional.pad(given, (0, -len(given) % (BLOCK - 1))).view(-1, BLOCK - 1)
        given = torch.cat([torch.ones(len(given), 1), given], 1).flatten()  # every block has the scale 1
        plain, _ = codes.plain_encode(given, signed)
        assert torch.equal(plain, fast.encode(given, signed)[0])
        assert torch.equal(codes.plain_encode(table, signed)[0], torch.arange(256, dtype=torch.uint8)) or not signed


def test_large_tensors_are_coded_by_several_threads_to_the_same_bits() -> None:
    given, threads = values(1, (1 << 20) + 77), torch.get_num_threads()
    plain, rounded = codes.plain_encode(given, True), codes.plain_round_at_random(given, (3, 4), 5)
    for count in (1, 3):
        torch.set_num_threads(count)
        made = codes.encode(given, True)
        assert all(torch.equal(a, b) for a, b in zip(plain, made, strict=True))
        assert torch.equal(codes.decode(*made, True), codes.plain_decode(*plain, True))
        assert torch.equal(codes.round_at_random(given, (3, 4), 5).view(torch.int16), rounded.view(torch.int16))
    torch.set_num_threads(threads)
