"""HFT (#9): which half trains."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import tiny

from espalier import registry
from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import attach, attachments, detach, trainable_parameters


def chosen(seed: int, blocks: int = 6, share: float = 0.5) -> set[str]:
    model = tiny("llama", num_hidden_layers=blocks)
    attach(model, "hft", seed=seed, share=share)
    return set(next(iter(attachments(model).values())).slots)


def test_of_each_layer_two_attention_matrices_train_and_of_the_feed_forward_two_in_half_of_the_layers_and_one_in_the_others() -> None:
    for seed in range(5):
        attention, mlp = (Counter(n.split(".layers.")[1].split(".")[0] for n in chosen(seed) if part in n) for part in ("self_attn", "mlp"))
        assert set(attention.values()) == {2} and len(attention) == 6
        assert sorted(mlp.values()) == [1, 1, 1, 2, 2, 2]
        norms = [n for n in chosen(seed) if "layernorm" in n]
        assert len(norms) == 6
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= chosen(seed)


def test_biases_are_not_counted_as_matrices() -> None:
    targets = parameters(tiny("qwen2", num_hidden_layers=6))
    for seed in range(5):
        some = registry.make("hft", registry.ATTACHED).selected(targets, seed)
        assert Counter(t.block for t in some if t.role.startswith("attention") and len(t.shape) == 2) == dict.fromkeys(range(6), 2)


def test_another_seed_is_another_half_and_the_same_one_is_the_same() -> None:
    assert chosen(0) == chosen(0) != chosen(1)


def test_all_and_nothing() -> None:
    everything = {target.name for target in parameters(tiny("llama", num_hidden_layers=6))}
    assert chosen(0, share=1.0) == everything
    assert all(".layers." not in name for name in chosen(0, share=0.0))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_what_is_not_chosen_keeps_its_bits_under_weight_decay_too(decay: float) -> None:
    model = tiny("llama", num_hidden_layers=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attach(model, "hft", seed=3)
    trained = set(next(iter(attachments(model).values())).slots)
    optimizer = registry.make("adamw", "optimizer", weight_decay=decay).build(trainable_parameters(model), 0.05)
    x = torch.arange(24).view(2, 12) % 60
    for _ in range(3):
        model(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = next(iter(attachments(model).values())).parts
    assert {part.target.name for part in parts if not torch.equal(part.values, before[part.target.name])} == trained
    detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
