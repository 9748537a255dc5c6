"""BinaryAdapter (ICCV 2023): LoRA trained through the codes of a few bits as which it is stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from espalier.attach.attachment import Attachment, attach, attachments, stored, trainable_parameters
from espalier.attach.load import load
from espalier.delta import store
from espalier.delta.forms import Quantized
from espalier.delta.forms.quantized import levels, through_codes
from espalier.errors import EspalierError
from espalier.exchange.save import save


def binary(family: str = "llama", **options: Any) -> tuple[nn.Module, Attachment]:
    model = attach(tiny(family), "binary", name="d", **options)
    return model, attachments(model)["d"]


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)


every_width = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])


@every_width
def test_a_factor_has_no_more_values_than_its_bits_can_tell_apart(bits: int) -> None:
    model, attachment = binary(bits=bits, rank=8)
    shake(model)
    for slot in attachment.slots.values():
        update = slot.update()
        assert all(1 < len(factor.unique()) <= 2**bits for factor in (update.B, update.A))


@every_width
@pytest.mark.parametrize(("family", "targets"), [("llama", "linear,embedding"), ("qwen3_moe", "experts")])
def test_what_was_trained_is_bit_for_bit_what_is_read_back(family: str, targets: str, bits: int, tmp_path: Path) -> None:
    """Pack and unpack lose nothing, and the stored mean and deviation are those of the forward pass."""
    tiny(family).save_pretrained(tmp_path / "base")
    model = attach(load(tmp_path / "base"), "binary", bits=bits, rank=5, targets=targets)
    shake(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    delta = store.load(tmp_path / "delta")
    for name, slot in next(iter(attachments(model).values())).slots.items():
        update, again = slot.update(), delta.updates[name]
        assert isinstance(again, Quantized)
        assert torch.equal(again.inner.tensors()["B"], update.B) and torch.equal(again.inner.tensors()["A"], update.A)


@every_width
def test_a_factor_takes_its_bits_and_two_numbers(bits: int) -> None:
    """ceil(numel b / 8) bytes and two float32; the trap is a last byte that is not full."""
    _, attachment = binary(bits=bits, rank=3)
    for name, update in attachment.updates().items():
        slot = attachment.slots[name]
        assert update.nbytes == sum(math.ceil(t.numel() * bits / 8) + 8 for t in (slot.A, slot.B))


def test_the_start_is_near_the_base_and_not_at_it() -> None:
    """The trap: a tensor of one bit cannot be zero. B is normal with deviation 0.001, cut at 0.002."""
    model, attachment = binary(targets="mlp")
    bare = tiny("llama")
    numbers = torch.cat([slot.B.detach().flatten() for slot in attachment.slots.values()])
    assert float(numbers.abs().max()) <= 2e-3 and 0.8e-3 < float(numbers.std()) < 0.95e-3
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    layer, name = model.get_submodule("model.layers.0.mlp.up_proj"), "model.layers.0.mlp.up_proj.weight"
    slot = attachment.slots[name]
    change = (layer(x) - bare.get_submodule("model.layers.0.mlp.up_proj")(x)).detach().abs()
    hidden = (x @ slot.update().A.T).detach().abs().sum(-1)
    assert bool((change > 0).any()) and bool((change <= 1e-3 * hidden[:, None] + 1e-6).all()), "|dy| <= s 1e-3 |A x|"
    assert attachment.method.start_bound(slot.target) == pytest.approx(32 * 2.2e-3 * 1.1 / 32**0.5)


@every_width
def test_the_gradient_is_that_of_the_surrogate_by_finite_differences(bits: int) -> None:
    """dq/dz = 1, and mean and deviation stay in the graph: w' = (z + c) sd + mu with c = q(z) - z held fixed."""
    w, g = random(6, 7).requires_grad_(), random(7, 6).T.double()
    (gradient,) = torch.autograd.grad((through_codes(w, levels("normal", bits)) * g).sum(), w)
    start = w.detach().double()

    def normalized(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (v - v.mean()) / v.std(), v.std(), v.mean()

    z, _, _ = normalized(start)
    table = levels("normal", bits).double()
    c = table[(z.unsqueeze(-1) - table).abs().argmin(-1)] - z

    def surrogate(v: torch.Tensor) -> float:
        z, sd, mu = normalized(v)
        return float((((z + c) * sd + mu) * g).sum())

    for row, column in ((0, 0), (2, 5), (5, 6)):
        step = torch.zeros_like(start)
        step[row, column] = 1e-5
        slope = (surrogate(start + step) - surrogate(start - step)) / 2e-5
        assert float(gradient[row, column]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_detaching_mean_and_deviation_would_change_the_gradient() -> None:
    """The trap: with both held fixed the gradient of w would be that of w'."""
    w, g = random(6, 7).requires_grad_(), random(7, 6).T
    (gradient,) = torch.autograd.grad((through_codes(w, levels("normal", 1)) * g).sum(), w)
    assert (gradient - g).abs().max() > 1e-2


def test_more_bits_are_nearer_to_lora_of_the_same_factors() -> None:
    errors = []
    for bits in (1, 2, 3, 4, 8):
        model, attachment = binary(bits=bits, rank=16, targets="mlp.down", seed=2)
        shake(model)
        name, slot = next(iter(attachment.slots.items()))
        plain = (slot.B @ slot.A).detach()
        errors.append(float((slot.update().materialize(stored(model, name)).detach() - plain).norm() / plain.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05


def test_planning_first_leaves_no_tensor_without_numbers_behind() -> None:
    with FakeTensorMode():
        levels("normal", 5)
    assert torch.equal(levels("normal", 5).sort().values, levels("normal", 5)) and type(levels("normal", 5)) is torch.Tensor


def test_one_bit_learns() -> None:
    model, _ = binary(rank=16)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    x, losses = tokens(), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("options", "complaint"), [({"bits": 5}, "bits is 5; it must be one of: 1, 2, 3, 4, 8"), ({"rank": 0}, "rank is 0")])
def test_options_out_of_range_are_refused(options: dict[str, int], complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        binary(**options)
