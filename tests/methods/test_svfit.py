"""SVFit (arXiv:2409.05926): only the largest singular values train."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch import nn

from espalier.attach.attachment import Attachment, attach, attachments, stored, trainable_parameters
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream


@pytest.fixture(autouse=True)
def the_same_numbers() -> None:
    torch.manual_seed(0)


def svfit(family: str = "llama", **options: Any) -> tuple[nn.Module, Attachment]:
    model = attach(tiny(family), "svfit", name="d", **options)
    return model, attachments(model)["d"]


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.3)


def test_the_start_is_the_base_exactly() -> None:
    model, _ = svfit(rank=8)
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits)


def test_the_update_is_diagonal_in_the_singular_vectors_and_of_at_most_the_rank() -> None:
    """U_r^T DeltaW V_r is diagonal; rank(DeltaW) <= r."""
    model, attachment = svfit(rank=5)
    shake(model)
    for name, slot in attachment.slots.items():
        update = slot.update().materialize(stored(model, name)).detach()
        assert torch.linalg.matrix_rank(update, rtol=1e-4) == 5
        inner = slot.U.T @ update @ slot.V.T
        torch.testing.assert_close(inner, torch.diag(inner.diag()), rtol=0, atol=1e-5)


def test_a_value_becomes_sigma_times_one_plus_s_and_the_vectors_stay() -> None:
    model, attachment = svfit(rank=256, targets="mlp.down")
    shake(model)
    for name, slot in attachment.slots.items():
        U, sigma, Vt = torch.linalg.svd(stored(model, name), full_matrices=False)
        new = slot.update().apply(stored(model, name)).detach()
        torch.testing.assert_close(new, U * (sigma * (1 + slot.s.detach())) @ Vt, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.linalg.svdvals(new), (sigma * (1 + slot.s.detach())).sort(descending=True).values, rtol=1e-4, atol=1e-5)


def test_the_transposed_weight_gets_the_transposed_update() -> None:
    method = attachments(svfit()[0])["d"].method
    target = attachments(svfit(targets="mlp.down")[0])["d"].targets[0]
    weight, s, dense = torch.randn(*target.shape), torch.rand(32), []
    for one, shape in ((weight, target.shape), (weight.T, target.shape[::-1])):
        tensors = method.start(replace(target, shape=shape), one, Stream(0, "w"))
        dense.append(method.update(SimpleNamespace(**{**tensors, "s": s, "gain": 1.0}), None).materialize(one))
    torch.testing.assert_close(dense[0], dense[1].T, rtol=1e-4, atol=1e-4)


def test_at_768_all_values_are_sixteen_times_fewer_numbers_than_lora_of_rank_8() -> None:
    model, attachment = svfit(rank=768)
    target = replace(attachment.targets[0], shape=(768, 768))
    lora = attachments(attach(tiny("llama"), "lora", name="d", rank=8))["d"].method
    assert attachment.method.count(target) == 768 and lora.count(target) == 16 * 768
    assert {p.ndim for p in trainable_parameters(model).values()} == {1}


def test_optimizers_hold_state_for_the_values_alone() -> None:
    """The vectors cost memory in training, r (in + out) numbers a matrix; neither gradients nor moments are of that size."""
    model, attachment = svfit(rank=8)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values())
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.ndim) == 2 * 8 * len(attachment.slots)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(EspalierError, match="rank is 0"):
        svfit(rank=0)
