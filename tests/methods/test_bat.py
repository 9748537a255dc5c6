"""BAT of Bone (arXiv:2409.15371): blocks of the weight, mapped and moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, stored
from espalier.delta.forms import Chain
from espalier.errors import EspalierError


def bat(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family).to(dtype), "bat", name="d", **{"rank": 8, **options})
    return model, attachments(model)["d"]


def shake(attachment: Attachment) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for slot in attachment.slots.values():
            slot.B.copy_(torch.randn(slot.B.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_start_is_the_base_exactly(dtype: torch.dtype) -> None:
    model, _ = bat(dtype=dtype)
    assert torch.equal(model(tokens()).logits, tiny("llama").to(dtype)(tokens()).logits)


def test_merging_is_undone_to_1e_5_in_float32() -> None:
    """The notes' check: ``W_ij = (W'_ij - B_i) (I + B_i)^-1``, for every block of the row i."""
    model, attachment = bat()
    shake(attachment)
    for name, slot in attachment.slots.items():
        weight, r = stored(model, name), 8
        with torch.no_grad():
            merged = slot.update().apply(weight)
        assert (merged - weight).abs().max() > 0.1
        for i, B in enumerate(slot.B.detach()):
            for j in range(slot.target.inputs // r):
                there = merged[i * r : (i + 1) * r, j * r : (j + 1) * r]
                back = torch.linalg.solve(torch.eye(r) + B, there - B, left=False)
                torch.testing.assert_close(back, weight[i * r : (i + 1) * r, j * r : (j + 1) * r], rtol=1e-5, atol=1e-5)


def test_it_trains_r_numbers_for_each_output() -> None:
    _, attachment = bat()
    assert attachment.trainable() == sum(8 * slot.target.outputs for slot in attachment.slots.values())


def test_two_of_them_depend_on_their_order() -> None:
    model, attachment = bat(targets="attention.q")
    shake(attachment)
    slot = next(iter(attachment.slots.values()))
    weight = stored(model, slot.target.name)
    with torch.no_grad():
        first = slot.update()
        second = first.with_tensors({"B": first.B.flip(0, 2)})
        orders = [Chain(parts).apply(weight) for parts in ([first, second], [second, first])]
    assert (orders[0] - orders[1]).abs().max() > 0.01


def test_the_update_is_another_one_on_another_base() -> None:
    _, attachment = bat(targets="attention.q")
    shake(attachment)
    slot = next(iter(attachment.slots.values()))
    with torch.no_grad():
        update = slot.update()
        changes = [update.materialize(torch.randn(32, 32, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)]
    assert update.depends_on_base and (changes[0] - changes[1]).abs().max() > 0.1


def test_a_block_is_the_largest_that_divides_both_sides() -> None:
    for rank, sizes in ((64, {16, 32}), (12, {8})):  # of 32 x 32, 48 x 32, 32 x 48 and 16 x 32
        _, attachment = bat(rank=rank)
        assert {slot.B.shape[-1] for slot in attachment.slots.values()} == sizes


def test_a_matrix_without_a_common_divisor_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"no block of 2 to 8 \(rank\) divides model\.embed_tokens\.weight of 97 x 32"):
        attach(tiny("llama", vocab_size=97), "bat", rank=8, targets="embedding")
