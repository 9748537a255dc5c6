"""BinaryAdapter (ICCV 2023): each tensor's mean, spread and the nearest of 2^b normal levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from espalier import registry
from espalier.delta import store
from espalier.delta.compression import Whole, compress
from espalier.delta.forms import LowRank, Magnitude, Update
from espalier.delta.forms.factored import Start
from espalier.errors import EspalierError


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bit1(update: Update, seed: int | None = None, **options: Any) -> Update:
    manifest = {"settings": {} if seed is None else {"seed": seed}}
    whole = Whole(store.Delta({"w": update}, {"w": store.Layout()}, manifest))
    return compress(registry.make("bit1", "compressor", **options), whole)[0]["w"]


def lora(outputs: int, rank: int, inputs: int) -> LowRank:
    """What training made of the start that the seed 5 draws for the parameter w."""
    change = random(1, rank, inputs) * 0.03 + 0.01
    return LowRank(random(0, outputs, rank) * 1e-3 + 2e-4, Start(5, "w").draw(rank, inputs) + change, 0.5)


def test_one_bit_keeps_mean_and_spread_and_two_levels() -> None:
    """w^ = Q(z) sd + mu, with Q(z) = +-0.6745 at one bit; w is B, and the distance of A from where it started."""
    update, start = lora(64, 8, 48), Start(5, "w").draw(8, 48)
    factors = bit1(update, seed=5).low_rank()
    assert factors is not None and float(factors.gain) == 0.5
    for tensor, found in ((update.B, factors.B), (update.A - start, factors.A - start)):
        mean, spread = tensor.mean(), tensor.std()
        right = torch.where(tensor > mean, 0.6745, -0.6745) * spread + mean
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["bit1", "quantize"])
def test_the_a_of_a_lora_is_never_compressed_without_its_initial_value(method: str) -> None:
    update = lora(64, 8, 48)
    for seed in (None, 6):
        manifest = {"settings": {} if seed is None else {"seed": seed}}
        for wrapped in (update, Magnitude(torch.rand(64), update)):
            whole = Whole(store.Delta({"w": wrapped}, {"w": store.Layout()}, manifest), 0, lambda *place: torch.zeros(64, 48))
            made = compress(registry.make(method, "compressor"), whole)[0]["w"]
            factors = (made.inner if isinstance(made, Magnitude) else made).low_rank()
            assert factors is not None and torch.equal(factors.A, update.A) and not torch.equal(factors.B, update.B)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_the_bytes_are_those_of_the_codes_and_two_numbers_a_tensor(bits: int) -> None:
    """Per tensor ceil(numel b / 8) bytes and two float32."""
    made = bit1(lora(33, 5, 27), seed=5, bits=bits)
    assert made.nbytes == -(-33 * 5 * bits // 8) + -(-27 * 5 * bits // 8) + 4 * 4


def test_packing_is_lossless_on_codes_and_the_numbers_are_equal_after_reloading(tmp_path: Path) -> None:
    made = bit1(lora(33, 5, 27), seed=5)
    store.save(tmp_path / "d", store.Delta({"w": made}, {"w": store.Layout()}), "")
    read = store.load(tmp_path / "d").updates["w"]
    assert all(torch.equal(t, read.tensors()[k]) for k, t in made.tensors().items())
    assert torch.equal(read.materialize(torch.zeros(33, 27)), made.materialize(torch.zeros(33, 27)))


def test_more_bits_are_nearer() -> None:
    update = lora(40, 6, 30)
    dense = update.materialize(torch.zeros(40, 30))
    errors = [float((bit1(update, seed=5, bits=b).materialize(torch.zeros(40, 30)) - dense).norm()) for b in range(1, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


def test_bits_out_of_range_are_refused() -> None:
    for bits in (0, 9):
        with pytest.raises(EspalierError, match=f"bits is {bits}; it must be from 1 to 8"):
            registry.make("bit1", "compressor", bits=bits)
