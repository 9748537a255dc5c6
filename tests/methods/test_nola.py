"""NOLA (arXiv:2310.02556): low-rank factors as combinations of random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.load import load
from espalier.delta import store
from espalier.delta.forms import SeededLowRank
from espalier.errors import EspalierError
from espalier.exchange.save import save


def nola(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "nola", name="d", **{"rank": 3, "coefficients": 10, **options})
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def updates(attachment: Attachment) -> dict[str, SeededLowRank]:
    return {name: update for name, update in attachment.updates().items() if isinstance(update, SeededLowRank)}


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_the_count_is_independent_of_rank_and_shape(rank: int) -> None:
    """2 k numbers for each matrix."""
    assert nola(targets="linear", rank=rank)[1].trainable() == 14 * 2 * 10


def test_it_is_zero_at_the_start_and_only_b_has_a_gradient_there() -> None:
    model, attachment = nola()
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits)
    model(tokens(), labels=tokens()).loss.backward()
    for slot in attachment.slots.values():
        assert slot.b.grad.abs().max() > 0 and not slot.a.grad.any() and slot.a.abs().min() > 0


def test_the_rank_of_the_update_is_at_most_r() -> None:
    model, attachment = nola(targets="linear")
    shake(model)
    for name, update in attachment.updates().items():
        weight = model.get_parameter(name)
        assert torch.linalg.matrix_rank(update.materialize(weight.double()), rtol=1e-6) == 3


def test_layers_of_equal_shape_and_their_factors_have_other_bases() -> None:
    """The authors' GPT-2 gives every layer one seed."""
    _, attachment = nola(targets="attention.q")
    drawn = [basis.dense() for update in updates(attachment).values() for basis in update.bases.values()]
    assert len(drawn) == 4
    assert all(not torch.equal(a, b) for n, a in enumerate(drawn) for b in drawn[:n])


def test_the_factors_are_the_combinations_of_the_bases() -> None:
    """A = sum_i a_i A_i with entries in +-1 / sqrt(k); gradients are inner products with the bases."""
    model, attachment = nola(keep=False)
    shake(model)
    model(tokens(), labels=tokens()).loss.backward()
    for name, slot in attachment.slots.items():
        update, target = updates(attachment)[name], slot.target
        A = update.bases["A"].dense().T.reshape(10, 3, target.inputs)
        B = update.bases["B"].dense().T.reshape(10, target.outputs, 3)
        assert 0.9 < float(A.abs().max()) * 10**0.5 <= 1 and 0.9 < float(B.abs().max()) * 10**0.5 <= 1
        dense = (8 / 3) * torch.einsum("k,kor->or", slot.b, B) @ torch.einsum("k,kri->ri", slot.a, A)
        torch.testing.assert_close(update.materialize(model.get_parameter(name)), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("gpt2", "attention,embedding"), ("qwen3_moe", "experts")])
def test_bases_that_are_kept_and_bases_that_are_drawn_again_train_alike(family: str, targets: str) -> None:
    found = []
    for keep in (True, False):
        model = attach(tiny(family).double(), "nola", name="d", rank=3, coefficients=10, targets=targets, keep=keep, dtype=torch.float64)
        attachment = attachments(model)["d"]
        shake(model)
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        assert keep == any("bases" in name for name, _ in model.named_buffers())
        found.append((loss, {n: p.grad for n, p in trainable_parameters(model).items()}, attachment.updates()))
    (loss, gradients, stored), (other_loss, others, other_stored) = found
    torch.testing.assert_close(loss, other_loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-4)
    assert all(update.equals(other_stored[name]) for name, update in stored.items())


def test_the_delta_is_a_seed_and_2_k_numbers_for_each_matrix(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model, attachment = nola()
    shake(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    assert store.load(tmp_path / "delta").nbytes == 4 * 2 * 10 * len(attachment.slots)
    torch.manual_seed(9)
    torch.testing.assert_close(load(tmp_path / "base", [tmp_path / "delta"])(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["rank", "coefficients"])
def test_options_that_do_not_fit_are_refused(option: str) -> None:
    with pytest.raises(EspalierError, match=f"{option} is 0; it must be at least 1"):
        nola(**{option: 0})
