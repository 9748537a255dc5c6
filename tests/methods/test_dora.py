"""DoRA (arXiv:2402.09353): magnitude and direction apart, over one base product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.attach.attachment import Attachment, attach, attachments, stored, trainable_parameters
from espalier.delta.base import BaseWeight, DenseBase, product
from espalier.delta.forms import LowRank, Magnitude
from espalier.errors import EspalierError


def dora(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family).to(dtype), "dora", name="d", rank=3, alpha=2.0, **options)
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def logical(model: torch.nn.Module, attachment: Attachment, name: str) -> torch.Tensor:
    weight = stored(model, name)
    return weight.transpose(-1, -2) if attachment.slots[name].target.transposed else weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("targets", ["linear", "embedding", "linear,embedding,head"])
def test_the_start_is_the_base_exactly(targets: str, trained: torch.dtype, dtype: torch.dtype) -> None:
    """Not only nearly: m equals the norms, so each row is multiplied by exactly one."""
    x = tokens()
    bare = tiny("llama").to(dtype)(x).logits
    model, _ = dora(dtype=dtype, targets=targets)
    assert torch.equal(model(x).logits, bare)
    assert torch.equal(attach(model, "dora", name="second", targets=targets)(x).logits, bare), "a second one starts there too"
    rounded = attach(tiny("llama").to(dtype), "dora", targets=targets, dtype=trained)
    assert torch.equal(rounded(x).logits, bare)


@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("gpt2", "attention,mlp"), ("gpt2", "embedding"), ("qwen3_moe", "experts")])
def test_magnitudes_start_at_the_norms_of_the_output_rows_and_stay_the_norms(family: str, targets: str) -> None:
    model, attachment = dora(family, targets=targets)
    for name, slot in attachment.slots.items():
        torch.testing.assert_close(slot.magnitude, logical(model, attachment, name).norm(dim=-1))
        assert slot.magnitude.shape == slot.target.shape[:-1]
    shake(model)
    for name, slot in attachment.slots.items():
        norms = slot.update().apply(logical(model, attachment, name)).norm(dim=-1)
        torch.testing.assert_close(norms, slot.magnitude.abs(), rtol=1e-4, atol=1e-5)


class Counted(BaseWeight):
    """A base that counts its products."""

    def __init__(self, base: BaseWeight) -> None:
        self.inner, self.bias, self.dtype, self.shape = base, base.bias, base.dtype, base.shape
        self.products = 0

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return self.inner.linear(x)

    def dense(self) -> torch.Tensor:
        return self.inner.dense()


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_the_base_product_is_computed_once(gain: float) -> None:
    weight, x = torch.randn(6, 8), torch.randn(5, 8)
    update = Magnitude(torch.rand(6) + 0.5, LowRank(torch.randn(6, 2), torch.randn(2, 8), 0.5), gain)
    base = Counted(DenseBase(weight))
    found = product(x, base, update)
    assert base.products == 1
    torch.testing.assert_close(found, x @ update.apply(weight).T, rtol=1e-4, atol=1e-5)


class Sizes(TorchDispatchMode):
    """Records the number of entries of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
        self.made += [t.numel() for t in made if t.untyped_storage().data_ptr() not in given]
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_makes_no_matrix_of_the_weights_size(dtype: torch.dtype) -> None:
    """The norm comes from ||W||^2 + 2 B.(W A^T) + B.(B A A^T); the product B A is never formed."""
    weight, x = torch.randn(60, 50).to(dtype), torch.randn(4, 50).to(dtype).requires_grad_()
    B, A, m = torch.randn(60, 2).requires_grad_(), torch.randn(2, 50).requires_grad_(), torch.rand(60).requires_grad_()
    with Sizes() as sizes:
        Magnitude(m, LowRank(B, A)).linear(x, DenseBase(weight)).sum().backward()
    assert sizes.made and max(sizes.made) <= 60 * 4
    with Sizes() as sizes:
        Magnitude(m, LowRank(B, A)).apply(weight)
    assert max(sizes.made) >= 60 * 50, "the measure sees a dense update"


def test_the_norm_is_a_constant_of_the_step() -> None:
    """Section 4.3: gradients are those of m V / c with c = ||V|| held; through the norm they would be others."""
    model, attachment = dora(targets="mlp.down")
    shake(model)
    for name, slot in attachment.slots.items():
        weight = stored(model, name).double()
        m, B, A = leaves = [p.detach().double().requires_grad_() for p in (slot.magnitude, slot.B, slot.A)]
        x, y = torch.randn(7, slot.target.inputs).double(), torch.randn(7, slot.target.outputs).double()
        found = torch.autograd.grad((product(x, DenseBase(weight), Magnitude(m, LowRank(B, A, 2 / 3))) * y).sum(), leaves)
        direction = weight + 2 / 3 * B @ A
        norm = direction.norm(dim=1, keepdim=True)
        held, through = (
            torch.autograd.grad((x @ (m[:, None] * direction / c).T * y).sum(), leaves, retain_graph=True) for c in (norm.detach(), norm)
        )
        for ours, right in zip(found, held, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-8, atol=1e-10)
        assert not torch.allclose(found[1], through[1], rtol=1e-2) and not torch.allclose(found[2], through[2], rtol=1e-2)


def test_a_bias_is_left_as_it_is() -> None:
    model, attachment = dora("gpt2", targets="mlp.down")
    with torch.no_grad():
        for slot in attachment.slots.values():
            slot.magnitude.mul_(3)
    module = model.transformer.h[0].mlp.c_proj
    zero = torch.zeros(2, module.nx)
    assert module.bias.abs().min() > 0
    assert torch.equal(module(zero), module.bias.expand(2, -1))


def test_dropout_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"dropout 0\.1 does not go with dora: its update depends on the base"):
        dora(dropout=0.1)
