"""PERP (#3): a pruned model is retrained, and its zeros stay where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from families import FAMILIES, fit_for, tiny, tokens

from espalier import apply
from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import Attachment, attach, attachments, settle
from espalier.attach.coded_base import quantize_base
from espalier.attach.load import load
from espalier.delta import store
from espalier.delta.base import DenseBase
from espalier.delta.forms import MaskedLowRank, ScaledLowRank, bitmaps
from espalier.errors import EspalierError
from espalier.exchange.save import save

RANK = 3
VARIANTS = ("mask", "scale", "prune")
PLACES = {"llama": "linear,norm,head?", "gpt2": "linear,norm,bias", "qwen3_moe": "linear,norm", "gpt_neox": "linear,norm,bias,head"}


def pruned(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return fit_for("perp", tiny(family).to(dtype))


def perp(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(pruned(family, dtype), "perp", name="d", **{"rank": RANK, **options})
    return model, attachments(model)["d"]


def train(model: torch.nn.Module, steps: int = 3) -> None:
    loops.train_on(model, [tokens(seed=seed) for seed in range(steps)], weight_decay=0.01)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(tokens()).logits.float()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("family", "dtype"), [*((f, torch.float32) for f in PLACES), ("llama", torch.bfloat16)])
def test_the_zero_pattern_of_the_merged_model_equals_the_mask_bit_for_bit(family: str, dtype: torch.dtype, variant: str, tmp_path: Path) -> None:
    """Check (1), in the checkpoint that is applied; and every surviving number moved, but for rounding."""
    pruned(family, dtype).save_pretrained(tmp_path / "base")
    model, attachment = perp(family, dtype, variant=variant, targets=PLACES[family])
    train(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    apply(str(tmp_path / "base"), [str(tmp_path / "delta")], str(tmp_path / "merged"), quiet=True)
    before, after = dict(pruned(family, dtype).named_parameters()), dict(load(tmp_path / "merged").named_parameters())
    masked = {name for name, slot in attachment.slots.items() if slot.target.is_matrix and slot.target.block is not None}
    assert masked and len(masked) < len(attachment.slots)
    for name in masked:
        assert 0.3 < (before[name] == 0).float().mean() < 0.4
        assert torch.equal(after[name] == 0, before[name] == 0)
        assert (after[name] != before[name]).float().mean() > (0.6 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize("variant", ["mask", "scale"])
@pytest.mark.parametrize("family", PLACES)
def test_outputs_before_and_after_merge_agree_and_the_start_is_the_pruned_model(family: str, variant: str) -> None:
    """Check (2), to 1e-5."""
    model, _ = perp(family, variant=variant, targets=PLACES[family])
    torch.testing.assert_close(logits(model), logits(pruned(family)), rtol=1e-5, atol=1e-5)
    train(model)
    before = logits(model)
    assert (before - logits(pruned(family))).abs().max() > 1e-2
    torch.testing.assert_close(logits(settle(model)), before, rtol=1e-5, atol=1e-5)


def test_lora_prune_trains_a_dense_matrix_and_jumps_when_it_is_merged(tmp_path: Path) -> None:
    pruned("llama").save_pretrained(tmp_path / "base")
    model, _ = perp(variant="prune")
    train(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    assert (logits(load(tmp_path / "base", [tmp_path / "delta"])) - logits(model)).abs().max() > 1e-3


def test_the_number_of_trainables_equals_the_closed_form_count() -> None:
    """Check (3)."""
    _, attachment = perp("gpt_neox")
    hidden, inner, vocabulary, layers = 32, 48, 96, 2
    matrices = layers * RANK * ((hidden + 3 * hidden) + 2 * hidden + 2 * (hidden + inner))
    norms = (2 * layers + 1) * hidden
    biases = norms + layers * (3 * hidden + hidden + inner + hidden)
    head = RANK * (hidden + vocabulary)
    assert attachment.trainable() == matrices + norms + biases + head


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_every_family_train_and_biases_where_there_are_any(family: str) -> None:
    """The trap: "norm layers are found by a class whitelist: other families silently train nothing"."""
    model, attachment = perp(family, rank=1)
    known = parameters(model)
    norms = {t.name for t in known if "norm" in t.name.lower() or ".ln_" in t.name or t.role.startswith("norm")}
    biases = {t.name for t in known if t.name.endswith("bias")}
    assert norms and (norms | biases) <= set(attachment.slots)
    assert not any(t.role == "embedding" and len(t.names) == 1 for t in attachment.targets)


@pytest.mark.parametrize("form", [MaskedLowRank, ScaledLowRank])
def test_gradients_are_those_of_the_paper_and_no_dense_matrix_is_kept(form: Any) -> None:
    """"Naive autograd keeps the dense W_eff of every layer alive: G = gY^T X, dB = s (G o M) A^T, dA = s B^T (G o M)"."""
    torch.manual_seed(0)
    W, B, A, x = torch.randn(20, 30), torch.randn(20, 3, requires_grad=True), torch.randn(3, 30, requires_grad=True), torch.randn(5, 7, 30, requires_grad=True)
    W[torch.rand(20, 30) < 0.5] = 0
    M = (W != 0).float()
    update = form(B, A, bitmaps(W != 0), 0.5) if form is MaskedLowRank else form(B, A, 0.5)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = update.linear(x, DenseBase(W))
    own = {t.data_ptr() for t in (W, B, A, x)}
    assert sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in own) == (75 if form is MaskedLowRank else 0)
    gY = torch.randn_like(y)
    y.backward(gY)
    G = gY.flatten(0, 1).T @ x.detach().flatten(0, 1)
    G = 0.5 * G * (M if form is MaskedLowRank else W)
    torch.testing.assert_close(B.grad, G @ A.detach().T)
    torch.testing.assert_close(A.grad, B.detach().T @ G)
    torch.testing.assert_close(x.grad, gY @ update.apply(W).detach())


def test_the_mask_is_of_the_start_and_stored_and_not_inferred_again(tmp_path: Path) -> None:
    """The trap: "a surviving exact zero freezes": a number that training makes zero can leave it."""
    pruned("llama").save_pretrained(tmp_path / "base")
    model, attachment = perp()
    slot = attachment.slots["model.layers.0.mlp.up_proj.weight"]
    base = pruned("llama").get_parameter(slot.target.name)
    assert torch.equal(slot.mask, bitmaps(base != 0))
    row, column = (base != 0).nonzero()[0].tolist()
    with torch.no_grad():
        slot.B.zero_(), slot.A.zero_()
        slot.B[row, 0], slot.A[0, column] = 1.0, -base[row, column] / slot.gain
    save(model, tmp_path / "delta", base=tmp_path / "base")
    stored = store.load(tmp_path / "delta").updates[slot.target.name]
    assert isinstance(stored, MaskedLowRank) and torch.equal(stored.mask, slot.mask)
    assert float(stored.apply(base)[row, column]) == 0
    train(model, 2)
    assert float(slot.update().apply(base)[row, column]) != 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_head_that_is_tied_to_the_embedding_is_one_parameter_so_that_merging_changes_nothing(variant: str) -> None:
    """The trap: "LoRA on a head tied to the embedding changes the embedding on merge"; here training sees that too."""
    model, attachment = perp("qwen2", variant=variant)
    tied = [slot for slot in attachment.slots.values() if len(slot.target.names) > 1]
    assert len(tied) == 1 and set(tied[0].target.roles) == {"embedding", "head"}
    train(model)
    before = logits(model)
    merged = settle(model)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)


def test_a_base_without_zeros_is_refused_and_its_norms_are_not() -> None:
    """The trap: "a loaded dense model silently has a full mask"."""
    for variant in VARIANTS:
        with pytest.raises(EspalierError, match="perp retrains a pruned model, and none of the 14 matrices of this base has a zero"):
            attach(tiny("llama"), "perp", variant=variant)
    with pytest.raises(EspalierError, match="has a zero"):  # codes of 8 bits did not keep them
        attach(quantize_base(pruned("llama"), 8), "perp")
    assert attachments(attach(tiny("llama"), "perp", targets="norm,bias?"))["perp"].trainable() == 5 * 32
