"""LaMDA (arXiv:2406.12832): a frozen projection, a trained core, and columns that freeze one after the other."""

from __future__ import annotations

import itertools

import pytest
import torch
from courses import run
from families import tiny, tokens

from espalier.attach.attachment import attach, attachments, stored
from espalier.attach.course import Course


def test_columns_freeze_leading_first_and_keep_their_bits_under_decay_and_momentum() -> None:
    model = attach(tiny("llama"), "lamda", rank=8, freeze=0.5)
    parts = list(attachments(model)["lamda"].slots.values())
    history: list[torch.Tensor] = [parts[0].B.detach().clone()]
    run(model, 20, lambda step: history.append(parts[0].B.detach().clone()))
    moving = [[bool((a[:, k] != b[:, k]).any()) for k in range(8)] for a, b in itertools.pairwise(history)]
    for step, columns in enumerate(moving):
        still = min(8, int(8 * step / 10))
        assert columns == [False] * still + [True] * (8 - still), step


def test_after_the_freeze_only_the_core_trains_r_squared_numbers() -> None:
    model = attach(tiny("llama"), "lamda", rank=8, freeze=0.5)
    parts = list(attachments(model)["lamda"].slots.values())
    before = torch.stack([part.S.detach().clone() for part in parts])
    run(model, 20)
    assert not torch.equal(before, torch.stack([part.S.detach() for part in parts]))
    course = Course(model, 20)
    course.begin(15)
    assert not any(part.B.requires_grad for part in parts) and all(part.S.requires_grad and part.S.numel() == 64 for part in parts)


def test_with_B_frozen_the_backward_pass_keeps_r_numbers_a_token_of_the_adapter() -> None:
    """Saved bytes beside the frozen model's do not grow with the layer's inputs."""

    def saved(method: bool) -> int:
        model = tiny("llama")
        if method:
            attach(model, "lamda", rank=2, targets="mlp.down", freeze=0.5)
            Course(model, 10).begin(9)
        else:
            model.requires_grad_(False)
            attach(model, "lora", rank=2, targets="mlp.down")
        slots = next(iter(attachments(model).values())).slots.values()
        sizes: list[int] = []
        x = torch.randn(50, next(iter(slots)).target.inputs)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[:1] == (50,):
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for slot in slots:
                slot.update().matmul(x).sum().backward()
        return max(sizes)

    assert saved(True) == 50 * 2 and saved(False) == 50 * 48


def test_the_start_is_the_top_of_the_weight_and_the_update_keeps_to_its_row_space() -> None:
    model = tiny("llama")
    attach(model, "lamda", rank=4, targets="attention.q")
    for name, slot in attachments(model)["lamda"].slots.items():
        weight = stored(model, name).detach()
        U, s, Vh = torch.linalg.svd(weight)
        torch.testing.assert_close(slot.B @ slot.S @ slot.A, U[:, :4] @ torch.diag(s[:4]) @ Vh[:4], rtol=1e-4, atol=1e-5)
    run(model, 5)
    for slot in attachments(model)["lamda"].slots.values():
        change = slot.update().materialize(torch.zeros(slot.target.shape))
        torch.testing.assert_close(change @ slot.A.T @ slot.A, change, rtol=1e-3, atol=1e-5)


def test_flat_spectra_get_more_rank_than_peaked_ones_at_the_same_sum() -> None:
    model = tiny("llama")
    names = [n for n, _ in model.named_parameters() if "q_proj" in n]
    with torch.no_grad():
        flat, peaked = (dict(model.named_parameters())[n] for n in names)
        U, _, Vh = torch.linalg.svd(torch.randn(32, 32))
        flat.copy_(U @ Vh)
        peaked.copy_(U @ torch.diag(0.3 ** torch.arange(32.0)) @ Vh)
    attach(model, "lamda", rank=8, targets="attention.q", ranks="energy")
    ranks = {n: slot.S.shape[-1] for n, slot in attachments(model)["lamda"].slots.items()}
    assert ranks[names[0]] == 12 and ranks[names[1]] == 4 and sum(ranks.values()) == 16


def test_a_mask_of_all_columns_from_the_beginning_trains_the_core_alone() -> None:
    model = attach(tiny("llama"), "lamda", rank=4, freeze=0.0)
    parts = list(attachments(model)["lamda"].slots.values())
    start = parts[0].B.detach().clone()
    run(model, 3)
    assert torch.equal(parts[0].B, start)
    x = tokens()
    assert model(x).logits.isfinite().all()


@pytest.mark.parametrize("freeze", [-0.1, 1.5])
def test_a_share_out_of_range_is_refused(freeze: float) -> None:
    with pytest.raises(Exception, match=r"freeze is .*from 0 to 1"):
        attach(tiny("llama"), "lamda", freeze=freeze)
