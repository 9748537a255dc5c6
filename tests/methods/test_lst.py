"""Ladder side-tuning: nothing of the model is kept for the backward pass, and the memory shows it."""

from __future__ import annotations

import copy

import pytest
import torch
from families import HIDDEN, config, tiny, tokens

from espalier import registry
from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.errors import EspalierError
from espalier.plan.trace import trace_step


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)


def kept_for_backward(method: str) -> list[torch.Size]:
    """Shapes of what a forward pass keeps, parameters of the model aside."""
    model = copy.deepcopy(tiny("llama", num_hidden_layers=4))
    attach(model, method)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Size] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.dim() > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.model(tokens()).last_hidden_state.sum()
    return list(kept.values())


def test_no_backbone_activation_is_saved_but_what_the_rungs_read() -> None:
    """"no tensor of the backbone requires grad and no backbone activation is saved for backward"."""
    wide = [shape for shape in kept_for_backward("lst") if shape[-1] >= HIDDEN]
    assert len(wide) == 5 + 1  # the embedding, the outputs of four blocks; and W_up s, for the gate
    assert len([shape for shape in kept_for_backward("lora") if shape[-1] >= HIDDEN]) > 20


def test_no_gradient_goes_into_the_model() -> None:
    model = copy.deepcopy(tiny("llama"))
    attach(model, "lst")
    randomize(model)
    found = []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: found.append((output[0] if isinstance(output, tuple) else output).requires_grad))
    model(tokens()).logits.sum().backward()
    assert found == [False, False]


def test_the_peak_memory_of_a_step_is_far_below_loras() -> None:
    """"69% of training memory saved vs 26% for LoRA/adapters": by what the planner counts for one step."""
    shape = config("llama", hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512)
    peaks = {
        method: trace_step(
            shape, registry.make(method, registry.ATTACHED), {"targets": targets}, dtype=torch.float32, tokens=1024, sequence_length=512, recompute=False, chunk=64
        ).peak
        for method, targets in (("full", "all"), ("lora", "linear"), ("lst", "model"))
    }
    assert peaks["lst"] < 0.35 * peaks["full"] and peaks["lst"] < 0.4 * peaks["lora"], peaks


def test_the_side_network_has_about_one_part_in_r_squared_of_the_blocks() -> None:
    """"side parameter count about 1/R^2 of the backbone blocks"."""
    model = copy.deepcopy(tiny("llama", hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=8))
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    attach(model, "lst", reduction=4)
    side = sum(p.numel() for n, p in trainable_parameters(model).items() if ".side__layers" in n)
    assert blocks / 16 <= side <= 1.1 * blocks / 16


def test_a_closed_gate_is_the_base() -> None:
    """"with mu_f -> 0 output equals base"."""
    model = copy.deepcopy(tiny("gpt2"))
    before = model(tokens()).logits
    attach(model, "lst")
    randomize(model)
    assert (model(tokens()).logits - before).abs().max() > 1e-3
    (branch,) = attachments(model)["lst"].branches.values()
    branch.gate.data.fill_(-100)
    assert torch.equal(model(tokens()).logits, before)


def test_rungs_stand_at_every_so_manieth_block_and_the_last() -> None:
    model = copy.deepcopy(tiny("llama", num_hidden_layers=5))
    attach(model, "lst", every=2)
    (branch,) = attachments(model)["lst"].branches.values()
    assert branch._machine.rungs == [0, 2, 4]
    assert len({n.split("__")[2] for n in branch.names if n.startswith("side__layers")}) == 3
    with pytest.raises(EspalierError, match="every is 0"):
        attach(model, "lst", every=0)
