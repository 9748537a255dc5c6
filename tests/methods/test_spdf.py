"""SPDF (#221): a random mask that stands, dense fine-tuning after it, and what that saves in operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from courses import run
from families import tiny, tokens

from espalier import registry
from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import Attachment, attach, attachments, settle, trainable_parameters
from espalier.attach.load import empty_of
from espalier.attach.masked import matrices_of
from espalier.errors import EspalierError
from espalier.memory.joined_optimizer import build
from espalier.plan.flops import flops_of


def spdf(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "spdf", name="d", **options)
    return model, attachments(model)["d"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "momentum"])
def test_masked_entries_are_exactly_zero_after_steps_with_momentum_and_decay(optimizer: str) -> None:
    """Masked entries exactly 0 until the switch, including after optimizer steps with momentum and decay."""
    model, attachment = spdf()
    start = {name: slot.live.clone() for name, slot in attachment.slots.items()}

    def watch(step: int) -> None:
        for name, slot in attachment.slots.items():
            assert torch.equal(slot.values != 0, start[name]) and torch.equal(slot.live, start[name])

    def momentum(named: dict[str, Any], rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(named.values(), lr=rate, momentum=0.9, weight_decay=0.1, nesterov=True)

    run(model, 5, watch, optimizer=momentum if optimizer == "momentum" else registry.make(optimizer, "optimizer").build)


def test_the_optimizers_state_of_masked_entries_is_zero() -> None:
    """Masked gradients and masked optimizer state."""
    model, attachment = spdf()
    slot = next(iter(attachment.slots.values()))
    optimizer = build(lambda named, rate: torch.optim.AdamW(named.values(), lr=rate), trainable_parameters(model), 0.01, {})
    model(tokens(), labels=tokens()).loss.backward()
    assert not slot.values.grad[~slot.live].any() and bool(slot.values.grad[slot.live].any())
    optimizer.step()
    assert all(not state[~slot.live].any() for key, state in optimizer.state[slot.values].items() if key.startswith("exp"))


@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("gpt2", "attention,mlp"), ("qwen3_moe", "experts")])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_the_sparsity_of_every_layer_is_exact(family: str, targets: str, sparsity: float) -> None:
    """Of every expert too; and drawn from the seed and the name."""
    _, attachment = spdf(family, targets=targets, sparsity=sparsity)
    other, again = (spdf(family, targets=targets, sparsity=sparsity, seed=seed)[1] for seed in (1, 0))
    for name, slot in attachment.slots.items():
        experts, size = matrices_of(slot.target)
        assert slot.live.view(experts, size).sum(1).tolist() == [round((1 - sparsity) * size)] * experts
        assert torch.equal(slot.live, again.slots[name].live) and not torch.equal(slot.live, other.slots[name].live)


def test_at_the_switch_the_function_is_unchanged_and_then_all_weights_move() -> None:
    """Remove the mask; former zeros start at 0 and all weights train, with an optimizer that has no old state."""
    model, attachment = spdf()
    run(model, 3)
    sparse = model(tokens()).logits.detach()
    zeros = {name: ~slot.live for name, slot in attachment.slots.items()}
    dense = attach(settle(model), "full", name="d")
    assert torch.equal(dense(tokens()).logits, sparse)
    slots = attachments(dense)["d"].slots
    assert all(not slots[name].values[where].any() for name, where in zeros.items())
    run(dense, 1)
    assert all(bool((slots[name].values[where] != 0).float().mean() > 0.9) for name, where in zeros.items())


def test_the_same_seed_is_the_same_mask_for_sparse_fine_tuning() -> None:
    """The baseline of the paper: sparse fine-tuning with the same mask begins at the function that was pretrained."""
    model, _ = spdf(seed=4)
    run(model, 2)
    sparse = model(tokens()).logits.detach()
    again = attach(settle(model), "spdf", name="d", seed=4)
    assert torch.equal(again(tokens()).logits, sparse)


def test_rescaling_keeps_the_size_of_the_signal() -> None:
    """Else it shrinks: the variance of a product falls with the share of weights that live."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    sizes = []
    for options in ({"sparsity": 0.0}, {"sparsity": 0.75}, {"sparsity": 0.75, "rescale": True}):
        slot = next(iter(spdf(**options)[1].slots.values()))
        sizes.append(float((x @ slot.values.detach().T).std()))
    assert 0.4 < sizes[1] / sizes[0] < 0.6 and 0.85 < sizes[2] / sizes[0] < 1.15


def test_flops_are_2_5_times_fewer_for_the_shape_of_1_3_billion_at_75_percent() -> None:
    """24 layers, d = 2048, context 2048, 50k vocabulary: forward per token 3.0 GFLOP dense, 1.2 sparse; scores and vocabulary are not sparse."""
    config = transformers.GPT2Config(n_layer=24, n_embd=2048, n_head=16, n_positions=2048, vocab_size=50257)
    dense = flops_of(parameters(empty_of(config, "")), attention_width=2048, context=2048)
    sparse = dense.at(0.25)
    assert dense.forward == pytest.approx(3.0e9, rel=0.01) and sparse.forward == pytest.approx(1.2e9, rel=0.02)
    assert dense.training / sparse.training == pytest.approx(2.5, abs=0.05)
    assert dense.linear == 2 * 24 * 12 * 2048**2 and dense.vocabulary == 2 * 50257 * 2048 and dense.attention == 24 * 4 * 2048 * 2048


def test_a_token_takes_the_operations_of_its_experts_alone() -> None:
    model = tiny("qwen3_moe")
    all_four, two = (flops_of(parameters(model), attention_width=32, context=8, experts_per_token=n) for n in (4, 2))
    experts = 2 * sum(t.size for t in parameters(model) if t.role.startswith("experts"))
    assert all_four.linear - two.linear == experts / 2


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 2.0])
def test_a_sparsity_that_leaves_nothing_is_refused(sparsity: float) -> None:
    with pytest.raises(EspalierError, match="at least 0 and less than 1"):
        registry.make("spdf", "adapter", sparsity=sparsity)
