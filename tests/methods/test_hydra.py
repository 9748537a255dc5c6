"""Hydra (arXiv:2309.06922): a branch beside a layer and one after it, on weight and bias together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import tiny, tokens
from torch import nn

from espalier.adapt.hydra import Hydra
from espalier.anatomy.target import Target
from espalier.attach.attachment import Attachment, attach, attachments, detach, stored, trainable_parameters
from espalier.attach.load import load
from espalier.checkpoint.safetensors_file import read_safetensors
from espalier.errors import EspalierError
from espalier.exchange.save import save
from espalier.memory import language_loss


@pytest.fixture(autouse=True)
def the_same_numbers() -> None:
    torch.manual_seed(0)


def hydra(family: str, **options: Any) -> tuple[nn.Module, Attachment]:
    model = attach(tiny(family), "hydra", name="d", **options)
    return model, attachments(model)["d"]


def shake(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "bert", "gpt_neox"])
def test_the_start_is_the_base(family: str) -> None:
    model, _ = hydra(family)
    torch.testing.assert_close(model(tokens()).logits, tiny(family)(tokens()).logits)


@pytest.mark.parametrize(("family", "linear"), [("gpt2", "transformer.h.1.mlp.c_proj"), ("llama", "model.layers.0.mlp.down_proj"), ("bert", "bert.encoder.layer.0.output.dense")])
def test_the_output_is_the_layers_plus_what_both_branches_make_of_input_and_output(family: str, linear: str) -> None:
    """y = y0 + s B_p A_p x + s B_s A_s y0, with y0 = W x + b."""
    model, attachment = hydra(family, rank=2, sequential_rank=3, scale=0.7)
    shake(model)
    slot = attachment.slots[f"{linear}.weight"]
    x = torch.randn(7, slot.target.inputs)
    y0 = tiny(family).get_submodule(linear)(x)
    expected = y0 + 0.7 * x @ slot.A_p.T @ slot.B_p.T + 0.7 * y0 @ slot.A_s.T @ slot.B_s.T
    torch.testing.assert_close(model.get_submodule(linear)(x), expected, rtol=1e-4, atol=1e-5)


def test_weight_and_bias_merge_together() -> None:
    """W' = W + s (B_p A_p + B_s A_s W), b' = b + s B_s A_s b."""
    model, attachment = hydra("gpt2", rank=2, sequential_rank=3, scale=0.7)
    shake(model)
    for target in attachment.targets:
        slot, bias = attachment.slots[target.name], target.name.replace("weight", "bias")
        W, b = stored(model, target.name).T.double(), stored(model, bias).double()
        mapped = 0.7 * slot.B_s.double() @ slot.A_s.double()
        torch.testing.assert_close(slot.update().apply(W), W + 0.7 * slot.B_p.double() @ slot.A_p.double() + mapped @ W)
        torch.testing.assert_close(attachment.slots[bias].update().apply(b), b + mapped @ b)


def test_the_sequential_part_stays_in_the_columns_of_b_and_within_its_rank() -> None:
    """B_s A_s W has a column space inside that of B_s and rank <= r_s."""
    model, attachment = hydra("llama", rank=1, sequential_rank=3)
    shake(model)
    for name, slot in attachment.slots.items():
        sequential = slot.update().parts["0"].materialize(stored(model, name))
        assert torch.linalg.matrix_rank(sequential, rtol=1e-4) == 3
        Q = torch.linalg.qr(slot.B_s).Q
        torch.testing.assert_close(Q @ (Q.T @ sequential), sequential, rtol=1e-3, atol=1e-5)


def test_without_the_sequential_branch_it_is_lora() -> None:
    _, attachment = hydra("gpt2", rank=3, sequential_rank=0)
    assert {slot.update().form for slot in attachment.slots.values()} == {"low_rank"}
    assert not any(name.endswith("bias") for name in attachment.slots)
    lora = attachments(attach(tiny("gpt2"), "lora", name="d", rank=3))["d"].method
    assert all(attachment.method.count(t) == lora.count(t) for t in attachment.targets)


def test_the_biases_tensors_have_one_owner_and_train() -> None:
    """A bias is a companion of its weight: named, updated and stored, and nothing of its own."""
    model, attachment = hydra("gpt2")
    assert not any(".bias" in name or "bias:" in name for name in trainable_parameters(model))
    assert {n.replace("weight", "bias") for n in attachment.slots if n.endswith("weight")} == {n for n in attachment.slots if n.endswith("bias")}
    assert all(t.name.endswith("weight") for t in attachment.targets)
    shake(model)
    slot = attachment.slots["transformer.h.0.mlp.c_fc.weight"]
    new = model.get_submodule("transformer.h.0.mlp.c_fc")._updated("bias")
    new.sum().backward()
    assert slot.A_s.grad is not None and slot.A_s.grad.abs().max() > 0


def test_a_bias_is_as_new_as_the_factors_in_evaluation_too() -> None:
    """What is kept between forward passes is made anew when the weight's tensors change."""
    model, _ = hydra("gpt2")
    x = tokens()
    for seed in range(2):
        shake(model, seed)
        with torch.no_grad():
            model(x)
            kept = model(x).logits
        torch.testing.assert_close(kept, model(x).logits.detach())


def test_biases_of_fused_experts_go_with_their_matrices() -> None:
    model, attachment = hydra("gpt_oss", targets="experts")
    assert sum(name.endswith("_bias") for name in attachment.slots) == 4
    shake(model)
    merged = copy.deepcopy(tiny("gpt_oss"))
    with torch.no_grad():
        for name, slot in attachment.slots.items():
            weight = merged.get_parameter(name)
            logical = weight.transpose(-1, -2) if slot.target.transposed else weight
            new = slot.update().apply(logical)
            weight.copy_(new.transpose(-1, -2) if slot.target.transposed else new)
    torch.testing.assert_close(model(tokens()).logits, merged(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_weight_and_bias_share_what_is_stored_and_detaching_brings_both_back(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "base")
    model = attach(load(tmp_path / "base"), "hydra")
    before = {n: p.clone() for n, p in tiny("gpt2").named_parameters()}
    shake(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    numbers = sum(t.numel() for t in read_safetensors(tmp_path / "delta" / "delta.safetensors").values())
    assert numbers == sum(p.numel() for p in trainable_parameters(model).values())
    torch.testing.assert_close(load(tmp_path / "base", [tmp_path / "delta"])(tokens()).logits, model(tokens()).logits)
    detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(model(tokens()).logits, load(tmp_path / "base")(tokens()).logits)


def test_the_sequential_part_is_made_of_the_weight_that_is_there() -> None:
    """The trap: it depends on W, so on another base, as under a first delta, it is another matrix."""
    model, attachment = hydra("llama", targets="mlp.down")
    shake(model)
    name, slot = next(iter(attachment.slots.items()))
    first, second = stored(model, name), torch.randn(slot.target.shape)
    parts = [slot.update().materialize(w) - slot.update().parts["1"].materialize(w) for w in (first, second)]
    torch.testing.assert_close(parts[1], slot.B_s @ slot.A_s @ second * slot.gain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(parts[0], parts[1], atol=1e-2)


def test_dropout_is_refused_for_it_sits_between_the_factors() -> None:
    with pytest.raises(EspalierError, match=r"dropout 0\.1 does not go with hydra"):
        hydra("llama", dropout=0.1)


def test_a_companion_that_is_a_target_itself_is_refused() -> None:
    class Greedy(Hydra):
        def accepts(self, target: Target) -> bool:
            return True

        def start(self, target: Target, weight: torch.Tensor, stream: Any) -> dict[str, torch.Tensor]:
            return {"w": nn.Parameter(torch.zeros(target.shape))}

        def companions(self, target: Target) -> Sequence[str]:
            return [target.name.replace("weight", "bias")]

    with pytest.raises(EspalierError, match=r"hydra updates transformer\.h\.0\.attn\.c_attn\.bias with .*c_attn\.weight.*target one of them"):
        attach(tiny("gpt2"), Greedy(), targets="attention,attention.qkv.bias")


def test_a_head_with_a_bias_trains_as_much_by_the_chunked_loss() -> None:
    """Weight and bias are made of the same tensors there, which are counted once."""
    config = transformers.PhiConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = attach(transformers.AutoModelForCausalLM.from_config(config), "hydra", targets="head").eval()
    assert set(attachments(model)["hydra"].slots) == {"lm_head.weight", "lm_head.bias"}
    nn.init.normal_(stored(model, "lm_head.bias"))
    shake(model)
    x = tokens(rows=1)
    model(x, labels=x).loss.backward()
    wanted = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    language_loss.install(model, 4)
    model(input_ids=x, targets=torch.cat((x[0, 1:], torch.tensor([-100]))), scale=1 / (x.shape[1] - 1)).backward()
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
