"""Full tuning: float32 masters under a bf16 model, stored as the model that was evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, settle, trainable_parameters
from espalier.attach.load import load, load_model
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.safetensors_file import SafetensorsFile, tensor_bytes
from espalier.exchange.save import save
from espalier.verbs.apply import apply


def full(family: str, dtype: torch.dtype = torch.bfloat16, **options: object) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family).to(dtype), "full", name="d", **options)
    return model, attachments(model)["d"]


def train(model: torch.nn.Module, steps: int = 3, learning_rate: float = 1e-3) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=learning_rate)
    x = tokens()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x, labels=x).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "qwen3_moe"])
def test_the_start_is_the_base_and_every_number_trains(family: str) -> None:
    model, attachment = full(family)
    x = tokens()
    torch.testing.assert_close(model(x).logits, tiny(family).to(torch.bfloat16)(x).logits, rtol=0.05, atol=0.05)
    assert attachment.trainable() == sum(p.numel() for p in tiny(family).parameters())


def test_products_see_the_masters_rounded_to_the_models_dtype() -> None:
    model, attachment = full("llama")
    train(model)
    rounded = tiny("llama").to(torch.bfloat16)
    with torch.no_grad():
        for name, slot in attachment.slots.items():
            assert slot.values.dtype == torch.float32
            rounded.get_parameter(name).copy_(slot.values)
    assert torch.equal(model(tokens()).logits, rounded(tokens()).logits)


def test_steps_smaller_than_the_rounding_add_up() -> None:
    """Each step is a hundredth of the distance between neighbouring bf16 numbers; trained in bf16, nothing would move."""
    model, attachment = full("llama", targets="mlp.down")
    slot = attachment.slots["model.layers.0.mlp.down_proj.weight"]
    start = slot.values.detach().clone()
    big = start.abs() > 0.1
    optimizer, step = torch.optim.SGD(trainable_parameters(model).values(), lr=1.0), 1e-2 * 2**-8 * start
    lost = start.bfloat16()
    for _ in range(200):
        slot.values.grad = step.clone()
        optimizer.step()
        lost = lost - step.bfloat16()
    assert torch.equal(lost, start.bfloat16())
    moved = attachment.updates()["model.layers.0.mlp.down_proj.weight"].tensors()["values"] != start.bfloat16()
    assert bool(moved[big].all())


def test_what_is_stored_is_in_the_bases_dtype(tmp_path: Path) -> None:
    model, attachment = full("llama")
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    train(model)
    assert {u.dtype for u in attachment.updates().values()} == {torch.bfloat16}
    size = save(model, tmp_path / "delta", base=tmp_path / "base")["bytes"]
    assert size < 2 * attachment.trainable() + 20_000
    with SafetensorsFile(tmp_path / "delta" / "delta.safetensors") as file:
        assert {info.dtype for info in file.tensors.values()} == {"BF16"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_applying_gives_the_evaluated_model_byte_for_byte(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny(family).to(dtype).save_pretrained(tmp_path / "base")
    model = attach(load_model(tmp_path / "base"), "full")
    train(model)
    save(model, tmp_path / "delta")
    with torch.no_grad():
        evaluated = load(tmp_path / "base", [tmp_path / "delta"])(tokens()).logits
        assert torch.equal(model.eval()(tokens()).logits, evaluated)
    apply(str(tmp_path / "base"), [str(tmp_path / "delta")], str(tmp_path / "out"), quiet=True)
    settle(model).save_pretrained(tmp_path / "settled")
    found, expected = ModelDirectory(tmp_path / "out"), ModelDirectory(tmp_path / "settled")
    assert found.fingerprint() == expected.fingerprint()
    assert all(bytes(tensor_bytes(found.read(name))) == bytes(tensor_bytes(expected.read(name))) for name in expected)
    changed = sum(bytes(tensor_bytes(found.read(n))) != bytes(tensor_bytes(ModelDirectory(tmp_path / "base").read(n))) for n in found)
    assert changed > len(list(found)) / 2


def test_a_tied_matrix_trains_once_and_stays_tied() -> None:
    model, attachment = full("qwen2", torch.float32)
    assert "lm_head.weight" not in attachment.slots
    train(model)
    model = settle(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
