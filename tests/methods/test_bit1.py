"""BinaryAdapter (ICCV 2023): each tensor's mean, spread and the nearest of 2^b normal levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from espalier import registry
from espalier.delta import store
from espalier.delta.compression import Whole, compress
from espalier.delta.forms import LowRank, Quantized, Update
from espalier.errors import EspalierError


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bit1(update: Update, **options: Any) -> Quantized:
    whole = Whole(store.Delta({"w": update}, {"w": store.Layout()}))
    made = compress(registry.make("bit1", "compressor", **options), whole)[0]["w"]
    assert isinstance(made, Quantized)
    return made


def test_one_bit_keeps_mean_and_spread_and_two_levels() -> None:
    """w^ = Q(z) sd + mu, with Q(z) = +-0.6745 at one bit."""
    B, A = random(0, 64, 8) * 1e-3 + 2e-4, random(1, 8, 48) * 0.2
    factors = bit1(LowRank(B, A, 0.5)).low_rank()
    assert factors is not None and float(factors.gain) == 0.5
    for tensor, found in ((B, factors.B), (A, factors.A)):
        mean, spread = tensor.mean(), tensor.std()
        right = torch.where(tensor > mean, 0.6745, -0.6745) * spread + mean
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_the_bytes_are_those_of_the_codes_and_two_numbers_a_tensor(bits: int) -> None:
    """Per tensor ceil(numel b / 8) bytes and two float32."""
    made = bit1(LowRank(random(0, 33, 5), random(1, 5, 27)), bits=bits)
    assert made.nbytes == -(-33 * 5 * bits // 8) + -(-27 * 5 * bits // 8) + 4 * 4


def test_packing_is_lossless_on_codes_and_the_numbers_are_equal_after_reloading(tmp_path: Path) -> None:
    made = bit1(LowRank(random(0, 33, 5), random(1, 5, 27)))
    store.save(tmp_path / "d", store.Delta({"w": made}, {"w": store.Layout()}), "")
    read = store.load(tmp_path / "d").updates["w"]
    assert all(torch.equal(t, read.tensors()[k]) for k, t in made.tensors().items())
    assert torch.equal(read.materialize(torch.zeros(33, 27)), made.materialize(torch.zeros(33, 27)))


def test_more_bits_are_nearer() -> None:
    update = LowRank(random(0, 40, 6), random(1, 6, 30))
    dense = update.materialize(torch.zeros(40, 30))
    errors = [float((bit1(update, bits=b).materialize(torch.zeros(40, 30)) - dense).norm()) for b in range(1, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]


def test_bits_out_of_range_are_refused() -> None:
    for bits in (0, 9):
        with pytest.raises(EspalierError, match=f"bits is {bits}; it must be from 1 to 8"):
            registry.make("bit1", "compressor", bits=bits)
