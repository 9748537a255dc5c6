"""VeRA (arXiv:2310.11454): frozen random factors for the whole model, vectors for each matrix."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.load import load
from espalier.checkpoint.directory import ModelDirectory
from espalier.delta import store
from espalier.exchange.peft_import import import_adapter
from espalier.exchange.save import save


def vera(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "vera", name="d", **{"rank": 6, **options})
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def test_the_start_is_the_base_and_counts_are_those_of_two_vectors() -> None:
    """b starts at zero, d at 0.1: out + r numbers for each matrix."""
    model, attachment = vera()
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits)
    assert attachment.trainable() == sum(t.outputs + 6 for t in attachment.targets)
    for slot in attachment.slots.values():
        assert not slot.b.any() and bool((slot.d == 0.1).all())


def test_one_pair_serves_every_shape() -> None:
    _, attachment = vera()
    pool = attachment.pool
    assert pool is not None and {n: b.numel() for n, b in pool.named_buffers()} == {"B": 48 * 6, "A": 48 * 6}
    for slot in attachment.slots.values():
        made = pool.method.prepare(pool, [slot.target])[slot.target.name]
        for name, basis in slot.method.export(slot, pool).bases.items():
            drawn = made[name].to(torch.float32)
            assert drawn.data_ptr() == getattr(pool, name).data_ptr() and torch.equal(basis.dense(), drawn)


def test_a_step_rounds_the_pair_once_for_all_matrices() -> None:
    """PEFT keeps one pair too; a copy for each matrix in the backward pass would be larger than all that trains."""
    model = attach(tiny("llama").to(torch.bfloat16), "vera", rank=6)
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1], lambda t: t):
        loss = model(tokens()).logits.float().square().mean()
    assert sum(size == 2 * 48 * 6 for size in kept.values()) <= 2
    loss.backward()


def test_experts_share_the_pair() -> None:
    """Their updates differ by b and d alone; no expert has a basis of its own."""
    model, attachment = vera("qwen3_moe", targets="experts")
    shake(model)
    for name, update in attachment.updates().items():
        whole = update.materialize(model.get_parameter(name))
        for expert, part in enumerate(update.unbind()):
            assert part.bases == update.unbind()[0].bases
            torch.testing.assert_close(part.materialize(whole[expert]), whole[expert])
    assert attachment.pool is not None and attachment.pool.B.numel() == 32 * 6


def test_the_delta_is_a_seed_and_two_vectors_for_each_matrix(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model, attachment = vera()
    shake(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    assert store.load(tmp_path / "delta").nbytes == 4 * attachment.trainable()
    torch.manual_seed(9)
    torch.testing.assert_close(load(tmp_path / "base", [tmp_path / "delta"])(tokens()).logits, model(tokens()).logits)


def test_loss_and_gradients_are_those_of_peft(tmp_path: Path) -> None:
    """With our numbers in PEFT's buffers; matrices of one width, of which both take the same rows."""
    peft = pytest.importorskip("peft")
    model, attachment = vera(targets="attention,mlp.gate,mlp.up")
    shake(model)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny("llama"), peft.VeraConfig(r=6, target_modules=modules))
    pool = attachment.pool
    assert pool is not None
    with torch.no_grad():
        for name, buffer in theirs.named_buffers():
            if "vera_A" in name:
                buffer[:, :32].copy_(pool.A[: 6 * 32].view(6, 32) * math.sqrt(6 / 32))
            elif "vera_B" in name:
                buffer[:48].copy_(pool.B.view(48, 6) * math.sqrt(6 / 6))
        for name, slot in attachment.slots.items():
            module = theirs.base_model.model.get_submodule(name.removesuffix(".weight"))
            module.vera_lambda_b["default"].copy_(slot.b)
            module.vera_lambda_d["default"].copy_(slot.d)
    x = tokens()
    losses = [m(input_ids=x, labels=x).loss for m in (model, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for name, slot in attachment.slots.items():
        module = theirs.base_model.model.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(slot.b.grad, module.vera_lambda_b["default"].grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slot.d.grad, module.vera_lambda_d["default"].grad, rtol=1e-5, atol=1e-5)
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "adapter")
    delta = import_adapter(tmp_path / "adapter", {t.name: t for t in parameters(base)}, ModelDirectory(tmp_path / "base"))
    for name, update in attachment.updates().items():
        weight = base.get_parameter(name)
        torch.testing.assert_close(delta.updates[name].materialize(weight), update.materialize(weight), rtol=1e-5, atol=1e-5)


def test_bases_keep_their_dtype_when_the_model_is_cast() -> None:
    """The stored delta says that they are what the seed draws."""
    model, attachment = vera()
    model.to(torch.bfloat16)
    assert attachment.pool is not None and attachment.pool.B.dtype == torch.float32
