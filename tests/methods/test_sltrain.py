"""SLTrain (#177) and low-rank weights: the weight itself is made, and exists only while it is multiplied with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from courses import run
from families import tiny, tokens
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from espalier.attach.attachment import (
    Attachment,
    attach,
    attachments,
    release_base,
    settle,
    trainable_parameters,
)
from espalier.delta.base import DenseBase, product
from espalier.delta.forms import Made, Sparse
from espalier.errors import EspalierError


def sltrain(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), options.pop("method", "sltrain"), name="d", **{"rank": 6, **options})
    return model, attachments(model)["d"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(dtype: torch.dtype = torch.float64) -> tuple[Made, torch.Tensor]:
    """A weight (9, 7) of rank 3 with 5 entries of its own, and the same as a dense expression of its tensors."""
    B, A, values = (random(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(((9, 3), (3, 7), (5,))))
    index = torch.tensor([0, 4, 17, 40, 62], dtype=torch.int32)
    return Made(B, A, values, index, 0.25), 0.25 * (B @ A) + torch.zeros(63, dtype=dtype).index_put((index.long(),), values).view(9, 7)


def test_the_materialised_weight_is_the_operators() -> None:
    """Materialised W equals the operator output to 1e-5."""
    model, attachment = sltrain()
    run(model, 2, finish=False)
    for slot in attachment.slots.values():
        x, weight = random(5, slot.target.inputs), torch.zeros(slot.target.shape)
        with torch.no_grad():
            found, update = product(x, DenseBase(weight), slot.update()), slot.update()
            torch.testing.assert_close(found, x @ update.apply(weight).T, rtol=1e-5, atol=1e-5)
            expected = (32 / 6 * slot.B @ slot.A).index_put((slot.index // slot.target.inputs, slot.index % slot.target.inputs), slot.values, accumulate=True)
            torch.testing.assert_close(update.apply(weight), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_factors_are_autograds_on_the_dense_expression() -> None:
    update, dense = made()
    x, y = random(4, 7, seed=5, dtype=torch.float64).requires_grad_(), random(4, 9, seed=6, dtype=torch.float64)
    wanted = [x, update.B, update.A, update.values]
    ours = torch.autograd.grad((update.linear(x, DenseBase(torch.empty(9, 7, dtype=torch.float64, device="meta"))) * y).sum(), wanted)
    for a, b in zip(ours, torch.autograd.grad((x @ dense.T * y).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda *t: Made(*t[1:], update.index, 0.25).linear(t[0], DenseBase(dense.detach())), wanted)


@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("gpt2", "attention,mlp"), ("qwen3_moe", "experts")])
def test_the_parameters_are_r_times_m_plus_n_and_the_floor_of_the_density(family: str, targets: str) -> None:
    """Parameter count = r (m + n) + floor(delta m n), of every expert."""
    _, attachment = sltrain(family, targets=targets, density=0.07)
    for slot in attachment.slots.values():
        m, n, experts = slot.target.outputs, slot.target.inputs, math.prod(slot.target.lead)
        assert sum(p.numel() for p in slot.parameters()) == experts * (6 * (m + n) + math.floor(0.07 * m * n))
        assert (slot.index // (m * n)).unique(return_counts=True)[1].tolist() == [math.floor(0.07 * m * n)] * experts


def test_the_support_is_a_function_of_seed_name_and_shape() -> None:
    """And has 32 bits: 64 at a density of 0.03 would cost 4 times the values in bf16."""
    (_, one), (_, again), (_, other) = (sltrain(seed=seed, density=0.1) for seed in (1, 1, 2))
    with torch.no_grad():
        changed = tiny("llama", seed=9)
    third = attachments(attach(changed, "sltrain", name="d", rank=2, density=0.1, seed=1))["d"]
    supports = [slot.index for slot in one.slots.values()]
    for name, slot in one.slots.items():
        assert slot.index.dtype == torch.int32 and bool((slot.index.diff() > 0).all())
        assert torch.equal(slot.index, again.slots[name].index) and torch.equal(slot.index, third.slots[name].index)
        assert not torch.equal(slot.index, other.slots[name].index)
    assert len({tuple(index.tolist()) for index in supports}) == len(supports)


def test_the_start_is_a_sparse_matrix_of_uniform_numbers() -> None:
    """A and the values U(-1/sqrt(in), 1/sqrt(in)); B zero, so the layer starts as a sparse matrix whatever the base held."""
    _, attachment = sltrain(rank=64, density=0.5)
    for slot in attachment.slots.values():
        bound = 1 / math.sqrt(slot.target.inputs)
        assert not slot.B.any()
        for tensor in (slot.A.detach(), slot.values.detach()):
            assert 0.95 * bound < float(tensor.abs().max()) <= bound and abs(float(tensor.std()) / bound * math.sqrt(3) - 1) < 0.1
        start = slot.update().apply(torch.full(slot.target.shape, math.nan)).detach()
        assert int(start.count_nonzero()) == len(slot.values)


def test_no_dense_weight_is_kept_between_forward_and_backward() -> None:
    update, _ = made(torch.float32)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        update.linear(random(4, 7).requires_grad_(), DenseBase(torch.empty(9, 7))).sum().backward()
    assert sorted(kept) == [(3, 7), (4, 7), (5,), (5,), (9, 3)]


@pytest.mark.parametrize("method", ["sltrain", "low-rank"])
def test_the_base_is_let_go_and_comes_back_as_the_weight_that_was_made(method: str) -> None:
    model, attachment = sltrain(method=method)
    release_base(model)
    assert all(model.get_parameter(name).is_meta for name in attachment.slots)
    run(model, 2)
    with torch.no_grad():
        before = model(tokens()).logits
    settled = settle(model)
    assert not trainable_parameters(settled)
    torch.testing.assert_close(settled(tokens()).logits, before, rtol=1e-4, atol=1e-5)


def test_a_weight_of_low_rank_starts_as_the_best_approximation_of_the_base() -> None:
    """By Eckart and Young: what is left has the singular values that were cut off."""
    model, attachment = sltrain(method="low-rank", rank=5)
    for name, slot in attachment.slots.items():
        weight = model.get_parameter(name).detach()
        left = weight - slot.update().apply(weight).detach()
        torch.testing.assert_close(torch.linalg.svdvals(left)[: -5 or None], torch.linalg.svdvals(weight)[5:], rtol=1e-3, atol=1e-4)
    exact = attachments(attach(tiny("llama"), "low-rank", name="d", rank=4096))["d"]
    for name, slot in exact.slots.items():
        torch.testing.assert_close(slot.update().apply(torch.empty(slot.target.shape)).detach(), tiny("llama").get_parameter(name).detach(), rtol=1e-4, atol=1e-5)


def test_the_rest_trains_whole() -> None:
    model = attach(tiny("gpt2"), "sltrain", rank=2, targets="mlp", full="rest")
    slots = next(iter(attachments(model).values())).slots
    assert {name for name, _ in tiny("gpt2").named_parameters()} == set(slots)
    assert {s.target.role for s in slots.values() if s.method.name == "sltrain"} == {"mlp.up", "mlp.down"}
    assert all(s.method.name == "full" for s in slots.values() if s.target.role.startswith(("attention", "norm", "embedding")) or s.target.role.endswith("bias"))
    assert attachments(attach(tiny("llama"), "full", full="rest", name="d"))["d"].trainable() == sum(p.numel() for p in tiny("llama").parameters())


def test_a_companion_of_a_target_is_none_of_the_rest() -> None:
    """Hydra's bias is updated with its matrix."""
    model = attach(tiny("gpt2"), "hydra", full="rest")
    slots = next(iter(attachments(model).values())).slots
    assert {name for name, _ in tiny("gpt2").named_parameters()} == set(slots)


@pytest.mark.parametrize(("constants", "tensors", "message"), [
    ({"scale": math.nan}, {}, "scale is nan"), ({"scale": "1"}, {}, "scale is '1'"),
    ({}, {"index": torch.tensor([4, 4], dtype=torch.int32)}, "not sorted, or names an entry twice"),
    ({}, {"index": torch.tensor([4, 63], dtype=torch.int32)}, "63"), ({}, {"B": torch.zeros(8, 3)}, "B has shape"),
    ({}, {"values": torch.zeros(3)}, "values has shape"),
])  # fmt: skip
def test_what_is_no_weight_of_that_shape_is_refused(constants: dict[str, Any], tensors: dict[str, torch.Tensor], message: str) -> None:
    good = {"B": torch.zeros(9, 3), "A": torch.zeros(3, 7), "values": torch.zeros(2), "index": torch.tensor([1, 4], dtype=torch.int32)}
    assert Made.from_tensors(good, {"scale": 1}, (9, 7), 1.0).shape == (9, 7)
    with pytest.raises(EspalierError, match=message):
        Made.from_tensors({**good, **tensors}, {"scale": 1.0, **constants}, (9, 7), 1.0)


def test_products_are_those_of_the_dense_weight_in_16_bits() -> None:
    update, dense = made(torch.float32)
    x = random(6, 7, dtype=torch.bfloat16)
    found = update.linear(x, DenseBase(torch.empty(9, 7, dtype=torch.bfloat16)))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), functional.linear(x.float(), dense), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("method", ["sltrain", "sara"])
def test_experts_without_any_entry_are_trained_all_the_same(method: str) -> None:
    """A share of none, or one that small matrices round to none."""
    model = attach(tiny("qwen3_moe"), method, targets="experts", density=0.0)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trainable_parameters(model).values())


@pytest.mark.parametrize("form", ["made", "sparse"])
def test_what_stands_still_costs_no_gradient_of_the_weight(form: str) -> None:
    """As layers do that IST leaves out of a step, and deltas that another is trained over."""
    update: Any = made()[0] if form == "made" else Sparse(random(30, dtype=torch.float64), torch.arange(30, dtype=torch.int32), (9, 7))
    for tensor in update.tensors().values():
        tensor.requires_grad_(False)
    x, base = random(6, 7, dtype=torch.float64).requires_grad_(), random(9, 7, dtype=torch.float64)
    bias = random(9, dtype=torch.float64).requires_grad_()
    y = update.linear(x, DenseBase(base, bias))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * 9 * 7 + (2 * 9 * 3 * 7 if form == "made" else 0)
    torch.testing.assert_close(x.grad, update.apply(base).sum(0).expand_as(x))
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 6.0))
