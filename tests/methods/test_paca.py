"""PaCA (ICLR 2025): columns of the weights train, and only their slice of the activations is kept."""

from __future__ import annotations

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.delta.base import DenseBase, product
from espalier.delta.forms import LowRank

RANK = 3


def paca(family: str = "llama", dtype: torch.dtype = torch.float32, **options: object) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family).to(dtype), "paca", name="d", **{"rank": RANK, **options})
    return model, attachments(model)["d"]


def train(model: torch.nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, weight_decay=0.1)
    x = tokens()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x, labels=x).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_start_is_the_base_exactly(dtype: torch.dtype) -> None:
    x = tokens()
    model, _ = paca(dtype=dtype)
    assert torch.equal(model(x).logits, tiny("llama").to(dtype)(x).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("gpt2", "attention,mlp"), ("qwen3_moe", "experts")])
def test_columns_outside_the_chosen_are_bit_identical_after_training(family: str, targets: str, dtype: torch.dtype) -> None:
    model, attachment = paca(family, dtype, targets=targets)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model)
    for name, slot in attachment.slots.items():
        weight = before[name].transpose(-1, -2) if slot.target.transposed else before[name]
        with torch.no_grad():
            same = (slot.update().apply(weight) == weight).flatten(0, -2).all(0) if not slot.target.lead else None
        if same is not None:
            assert sorted(torch.nonzero(~same).flatten().tolist()) == slot.index.tolist()
            continue
        for expert, part in enumerate(slot.update().unbind()):
            with torch.no_grad():
                moved = torch.nonzero((part.apply(weight[expert]) != weight[expert]).any(0)).flatten().tolist()
            assert set(moved) <= set(slot.index[expert].tolist())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_is_the_chosen_columns_of_the_dense_gradient(family: str) -> None:
    """Check (3) of the notes, at s = 1."""
    x = tokens()
    bare = tiny(family)
    bare(x, labels=x).loss.backward()
    dense = {name: p.grad for name, p in bare.named_parameters()}
    model, attachment = paca(family, targets="attention,mlp")
    model(x, labels=x).loss.backward()
    for name, slot in attachment.slots.items():
        gradient = dense[name].T if slot.target.transposed else dense[name]
        torch.testing.assert_close(slot.P.grad, gradient[:, slot.index], rtol=1e-4, atol=1e-7)
        assert slot.P.grad.abs().max() > 0


def test_matrices_that_read_one_input_share_their_columns() -> None:
    _, attachment = paca()

    def columns(block: int, module: str) -> list[int]:
        return attachment.slots[f"model.layers.{block}.{module}_proj.weight"].index.tolist()

    for block in (0, 1):
        q, gate = columns(block, "self_attn.q"), columns(block, "mlp.gate")
        assert q == columns(block, "self_attn.k") == columns(block, "self_attn.v")
        assert gate == columns(block, "mlp.up")
        assert len({tuple(c) for c in (q, gate, columns(block, "self_attn.o"), columns(block, "mlp.down"))}) == 4
    assert columns(0, "self_attn.q") != columns(1, "self_attn.q")


def test_columns_are_distinct_sorted_and_drawn_by_the_seed() -> None:
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(draws))
        _, attachment = paca(seed=seed)
        draws.append({name: slot.index.tolist() for name, slot in attachment.slots.items()})
    assert draws[0] == draws[1] != draws[2]
    for columns in draws[0].values():
        assert len(columns) == RANK and columns == sorted(set(columns))


def test_a_rank_beyond_the_inputs_trains_every_column() -> None:
    _, attachment = paca(rank=1000, targets="attention.q")
    for slot in attachment.slots.values():
        assert slot.index.tolist() == list(range(slot.target.inputs))
        assert slot.P.shape == slot.target.shape


def kept_for_backward(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that a forward keeps for its backward, parameters and views of them aside, each storage once."""
    frozen = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in frozen:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x).sum().backward()
    return list(kept.values())


@pytest.mark.parametrize(("family", "path", "role"), [("llama", "model.layers.0.mlp.down_proj", "mlp.down"), ("gpt2", "transformer.h.0.mlp.c_proj", "mlp.down")])
def test_only_the_slice_of_the_input_is_kept_for_the_backward_pass(family: str, path: str, role: str) -> None:
    model, _ = paca(family, targets=role)
    module = model.get_submodule(path)
    x = torch.randn(2, 7, 48, requires_grad=True)
    kept = kept_for_backward(module, x)
    assert [t.numel() for t in kept] == [2 * 7 * RANK]
    rival = attach(tiny(family), "lora", targets=role, rank=RANK).get_submodule(path)
    assert max(t.numel() for t in kept_for_backward(rival, x)) == 2 * 7 * 48, "the measure sees what LoRA keeps"


def test_it_is_the_lora_whose_a_picks_the_columns() -> None:
    """A column delta on J is exactly a LoRA with B = P and one-hot rows of A."""
    model, attachment = paca()
    train(model, 2)
    slot = attachment.slots["model.layers.1.mlp.up_proj.weight"]
    A = torch.nn.functional.one_hot(slot.index, slot.target.inputs).float()
    base, x = DenseBase(model.get_parameter("model.layers.1.mlp.up_proj.weight")), torch.randn(4, slot.target.inputs)
    torch.testing.assert_close(product(x, base, slot.update()), product(x, base, LowRank(slot.P, A)))
