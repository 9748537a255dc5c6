"""IA3 (arXiv:2205.05638): keys, values and the feed-forward's hidden features, rescaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.errors import EspalierError


def ia3(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "ia3", name="d", **options)
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_start_is_the_base_exactly(dtype: torch.dtype) -> None:
    model = attach(tiny("llama").to(dtype), "ia3")
    assert torch.equal(model(tokens()).logits, tiny("llama").to(dtype)(tokens()).logits)


def test_it_trains_d_k_plus_d_v_plus_d_ff_numbers_a_block() -> None:
    """The paper's count for a decoder without cross-attention."""
    model, attachment = ia3()
    assert {slot.target.role for slot in attachment.slots.values()} == {"attention.k", "attention.v", "mlp.down"}
    config = model.config
    keys = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert attachment.trainable() == config.num_hidden_layers * (2 * keys + config.intermediate_size)


def test_keys_and_values_are_scaled_and_so_is_the_hidden_layer_of_the_feed_forward() -> None:
    """``l_k * (x W_k)``, ``l_v * (x W_v)``, ``(l_ff * h) W_down``."""
    model, _ = ia3()
    shake(model)
    bare = tiny("llama")
    for name, of_outputs in (("self_attn.k_proj", True), ("self_attn.v_proj", True), ("mlp.down_proj", False)):
        ours, base = (m.get_submodule(f"model.layers.1.{name}") for m in (model, bare))
        x, scale = torch.randn(5, base.in_features), 1 + next(iter(ours.espalier.values())).s
        torch.testing.assert_close(ours(x), scale * base(x) if of_outputs else base(scale * x))


def test_experts_and_embeddings_are_scaled_in_their_hidden_features_and_their_features() -> None:
    _, attachment = ia3("qwen3_moe", targets="experts,embedding")
    shapes = {slot.target.role: tuple(slot.s.shape) for slot in attachment.slots.values()}
    assert shapes == {"experts.gate_up": (4, 32), "experts.down": (4, 16), "embedding": (32,)}


def test_biases_are_left_as_they_are() -> None:
    model, _ = ia3("gpt2", targets="attention.qkv")
    shake(model)
    module = model.transformer.h[0].attn.c_attn
    assert module.bias.abs().max() > 0
    assert torch.equal(module(torch.zeros(2, 32)), module.bias.expand(2, -1))


def test_weight_decay_pulls_to_the_base() -> None:
    model, attachment = ia3()
    shake(model)
    before = model(tokens()).logits
    for slot in attachment.slots.values():
        torch.nn.init.zeros_(slot.s)
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits) and not torch.equal(before, model(tokens()).logits)


def test_a_model_that_fuses_its_keys_says_which_target_it_has() -> None:
    with pytest.raises(EspalierError, match=r"--targets 'attention\.k' matches no parameter of this model; this model keeps q, k and v in one matrix: use attention\.qkv"):
        ia3("gpt2")
