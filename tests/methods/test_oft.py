"""OFT (arXiv:2306.07280): rotations, which keep what lies between the neurons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, stored
from espalier.errors import EspalierError


def oft(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny("llama").to(dtype), "oft", name="d", **{"block_size": 8, **options})
    return model, attachments(model)["d"]


def shake(attachment: Attachment, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for slot in attachment.slots.values():
            slot.angles.copy_(torch.randn(slot.angles.shape, generator=generator) * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_start_is_the_base_exactly(dtype: torch.dtype) -> None:
    model, _ = oft(dtype)
    assert torch.equal(model(tokens()).logits, tiny("llama").to(dtype)(tokens()).logits)


@pytest.mark.parametrize("size", [0.1, 3.0], ids=["small angles", "large angles"])
def test_lengths_of_neurons_and_angles_between_them_stay_those_of_the_base(size: float) -> None:
    """Section 3: the hyperspherical energy, a function of these alone, does not change; however far it trained."""
    model, attachment = oft()
    shake(attachment, size)
    for name, slot in attachment.slots.items():
        weight = stored(model, name)
        with torch.no_grad():
            rotated = slot.update().apply(weight)
        torch.testing.assert_close(rotated @ rotated.T, weight @ weight.T, rtol=1e-4, atol=1e-4)
        assert (rotated - weight).abs().max() > 0.01


def test_the_blocks_are_cayley_transforms_of_skew_symmetric_matrices() -> None:
    _, attachment = oft(block_size=3, targets="mlp.down")  # 48 inputs
    shake(attachment, 0.5)
    for slot in attachment.slots.values():
        with torch.no_grad():
            found = slot.update().B + torch.eye(3)
        for (a, b, c), block in zip(slot.angles.tolist(), found, strict=True):
            Q = torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]])
            torch.testing.assert_close(block.T, (torch.eye(3) - Q) @ torch.linalg.inv(torch.eye(3) + Q), rtol=1e-4, atol=1e-5)
            assert float(torch.linalg.det(block)) == pytest.approx(1, abs=1e-5), "a rotation, no reflection"


def test_a_block_is_the_largest_that_divides_the_inputs() -> None:
    _, attachment = oft(block_size=20)
    for slot in attachment.slots.values():
        size = {32: 16, 48: 16}[slot.target.inputs]
        assert slot.angles.shape == (slot.target.inputs // size, size * (size - 1) // 2)


def test_inputs_that_no_block_divides_are_refused() -> None:
    with pytest.raises(EspalierError, match=r"no block of 2 to 8 \(block_size\) divides the 47 inputs of model\.layers\.0\.mlp\.down_proj\.weight"):
        attach(tiny("llama", intermediate_size=47), "oft", block_size=8, targets="mlp")
