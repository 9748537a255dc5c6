"""MiSS (arXiv:2409.15371): one block of numbers, repeated along the input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch.utils.flop_counter import FlopCounterMode

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.load import load
from espalier.delta.base import DenseBase, product
from espalier.delta.forms import LowRank, Tiled
from espalier.errors import EspalierError
from espalier.exchange.save import save


def miss(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family).to(dtype), "miss", name="d", **{"rank": 5, **options})
    return model, attachments(model)["d"]


def train(model: torch.nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_start_is_the_base_exactly(dtype: torch.dtype) -> None:
    model, _ = miss(dtype=dtype)
    assert torch.equal(model(tokens()).logits, tiny("llama").to(dtype)(tokens()).logits)


@pytest.mark.parametrize("rank", [1, 5, 8, 1000])
def test_the_delta_has_rank_at_most_r_and_converts_to_lora_with_zero_error(rank: int) -> None:
    """The notes' check, r that does not divide the inputs included: the last copy is cut, where PEFT pads with zeros."""
    model, attachment = miss(rank=rank)
    train(model)
    for slot in attachment.slots.values():
        weight = torch.zeros(slot.target.shape)
        with torch.no_grad():
            update = slot.update()
            dense, factors = update.materialize(weight), update.low_rank()
        assert factors is not None and factors.rank == min(rank, slot.target.inputs)
        assert torch.equal(factors.materialize(weight), dense) and dense.abs().max() > 0
        assert set(factors.A.unique().tolist()) <= {0.0, 1.0} and torch.equal(factors.A.sum(0), torch.ones(slot.target.inputs))
        assert int(torch.linalg.matrix_rank(dense.double())) <= rank
        for start in range(0, slot.target.inputs - rank, rank):
            part = dense[:, start + rank : start + 2 * rank]
            assert torch.equal(part, slot.block.detach()[:, : part.shape[1]]), "the same block again"


def test_it_trains_r_numbers_for_each_output() -> None:
    _, attachment = miss()
    assert attachment.trainable() == sum(5 * slot.target.outputs for slot in attachment.slots.values())
    _, attachment = miss(rank=40)
    assert attachment.trainable() == sum(min(40, slot.target.inputs) * slot.target.outputs for slot in attachment.slots.values())


def cost(update: Any, x: torch.Tensor, base: DenseBase) -> int:
    """Multiplications of a forward and a backward beyond those of the base."""
    unknown = {torch.ops.aten.addmm_: lambda onto, left, right, out_shape=None, **_: 2 * left[0] * left[1] * right[1]}  # to the counter
    counts = []
    for forward in (lambda: product(x, base, update), lambda: base.linear(x)):
        with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
            forward().sum().backward()
        counts.append(counter.get_total_flops())
    return counts[0] - counts[1]


def test_folding_the_input_costs_no_product_and_keeps_only_the_sums() -> None:
    """Half of what LoRA of the same rank costs on a square matrix, and where its backward keeps x, this keeps r numbers a token."""
    inputs, outputs, rank, n = 64, 64, 8, 20
    base, x = DenseBase(torch.randn(outputs, inputs)), torch.randn(n, inputs, requires_grad=True)
    update = Tiled(torch.randn(outputs, rank, requires_grad=True), (outputs, inputs))
    lora = LowRank(torch.randn(outputs, rank, requires_grad=True), torch.randn(rank, inputs, requires_grad=True))
    assert cost(update, x, base) == 3 * 2 * n * rank * outputs == cost(lora, x, base) / 2
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        update.matmul(x)
    assert max(kept) == max(n, outputs) * rank


def test_the_mini_block_repeats_along_the_outputs_too() -> None:
    model, attachment = miss(mini_rank=4, targets="mlp")
    assert attachment.trainable() == sum(5 * 4 for _ in attachment.slots)
    train(model)
    for slot in attachment.slots.values():
        with torch.no_grad():
            dense = slot.update().materialize(torch.zeros(slot.target.shape))
        assert torch.equal(dense[:4], dense[4:8]) and torch.equal(dense[:4, :5], slot.block.detach())


def test_a_mini_block_that_does_not_divide_the_outputs_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"mini_rank is 5; it must divide the 32 outputs of model\.layers\.0\.self_attn\.q_proj\.weight"):
        miss(mini_rank=5)


def test_a_scale_is_of_the_update(tmp_path: Path) -> None:
    """Which PEFT leaves undefined; for the additive form it is plain."""
    model, attachment = miss(targets="mlp.down")
    train(model)
    tiny("llama").save_pretrained(tmp_path / "base")
    save(model, tmp_path / "delta", base=tmp_path / "base")
    half = load(tmp_path / "base", [tmp_path / "delta"], scale=0.5)
    with torch.no_grad():
        for slot in attachment.slots.values():
            slot.block.mul_(0.5)
        torch.testing.assert_close(half(tokens()).logits, model(tokens()).logits)
