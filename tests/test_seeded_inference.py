"""Deltas whose bases are seeds, at work without gradients: what is drawn once, and what is kept for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.attach.load import load
from espalier.delta.forms import SeededLowRank
from espalier.exchange.save import save
from espalier.kernels import seeded
from espalier.kernels.philox import GAUSSIAN, Stream
from espalier.kernels.seeded import SeededMatrix


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("method", ["nola", "vera", "randlora"])
def test_a_loaded_delta_draws_once_and_keeps_what_its_form_says(method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(family).save_pretrained(tmp_path / "base")
    trained = attach(load(tmp_path / "base"), method, targets="linear")
    with torch.no_grad():
        for parameter in trainable_parameters(trained).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    save(trained, tmp_path / "delta", base=tmp_path / "base")
    loaded = load(tmp_path / "base", [tmp_path / "delta"])
    x = tokens()
    with torch.no_grad():
        first = loaded(x).logits
        monkeypatch.setattr(seeded, "numbers", lambda *arguments: pytest.fail("a number was drawn again"))
        assert torch.equal(loaded(x).logits, first)
        torch.testing.assert_close(first, trained(x).logits, rtol=1e-5, atol=1e-6)
    (attachment,) = attachments(loaded).values()
    with torch.no_grad():
        kept = {id(t): t for slot in attachment.slots.values() for t in slot.update()._kept.values()}
    if family == "llama":
        sizes = {(slot.target.outputs, slot.target.inputs) for slot in attachment.slots.values()}
        if method == "nola":
            expected = sum(8 * (slot.target.outputs + slot.target.inputs) for slot in attachment.slots.values())
        elif method == "vera":  # one B for each number of outputs, one A for each of inputs, and rank the smaller side
            expected = sum(rows * rank for rows, rank in {(o, min(o, i)) for o, i in sizes}) + sum(rank * columns for rank, columns in {(min(o, i), i) for o, i in sizes})
        else:  # of rank 32 at most, one basis for each side: B as large as the weight, A of its smaller side
            expected = sum(o * i for o, i in {(max(s), min(s)) for s in sizes}) + sum(s * s for s in {min(s) for s in sizes})
        assert sum(t.numel() for t in kept.values()) == expected


def test_what_is_kept_without_gradients_hides_no_gradient() -> None:
    bases = {name: SeededMatrix.of(Stream(0, name), 2 * size, 3, GAUSSIAN) for name, size in (("B", 6), ("A", 5))}
    update = SeededLowRank((6, 5), 2, bases, {f"coefficients_{name}": torch.ones(3, requires_grad=True) for name in "BA"})
    x = torch.randn(4, 5)
    with torch.no_grad():
        y = update.matmul(x)
    z = update.matmul(x)
    assert z.requires_grad and torch.allclose(y, z, atol=1e-6)
    z.sum().backward()
    assert all(t.grad.abs().min() > 0 for t in update.tensors().values())
    moved = update.with_tensors({name: 2 * t.detach() for name, t in update.tensors().items()})
    with torch.no_grad():
        torch.testing.assert_close(moved.matmul(x), 4 * y)
