"""SHiRA (arXiv:2406.13175): a few entries of each matrix train; the update is sparse and of high rank."""

from __future__ import annotations

from typing import Any

import torch
from families import tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, stored, trainable_parameters

RANK = 2


def shira(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "shira", name="d", **{"rank": RANK, **options})
    return model, attachments(model)["d"]


def train(model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()


def test_the_start_is_the_base_exactly() -> None:
    model, _ = shira()
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits)


def test_it_trains_as_many_numbers_as_lora_of_the_rank() -> None:
    _, attachment = shira()
    for slot in attachment.slots.values():
        assert slot.values.numel() == RANK * sum(slot.target.shape)
        assert torch.equal(slot.index, slot.index.unique()) and int(slot.index.max()) < slot.target.size
    _, attachment = shira(rank=1000)
    assert all(slot.values.numel() == slot.target.size for slot in attachment.slots.values())


def test_entries_outside_the_support_are_bit_identical_and_the_rank_is_high() -> None:
    """Far beyond the rank of a LoRA of as many numbers."""
    model, attachment = shira()
    train(model)
    for name, slot in attachment.slots.items():
        weight = stored(model, name)
        with torch.no_grad():
            new = slot.update().apply(weight)
        assert torch.equal((new != weight).flatten().nonzero().flatten(), slot.index)
        assert int(torch.linalg.matrix_rank((new - weight).double())) > 0.7 * min(slot.target.shape)


def test_it_is_stored_in_at_most_8_bytes_for_a_trained_number() -> None:
    for rank in (1, 2, 8):
        _, attachment = shira(rank=rank, targets="mlp")
        assert all(update.nbytes <= min(8 * n, 4 * n + update.shape[0] * update.shape[1] / 8) for update in attachment.updates().values() if (n := update.tensors()["values"].numel()))


def test_the_support_is_drawn_by_the_seed_and_is_another_one_for_each_matrix() -> None:
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(draws))
        _, attachment = shira(seed=seed)
        draws.append([slot.index.tolist() for slot in attachment.slots.values()])
    assert draws[0] == draws[1] != draws[2]
    assert len({tuple(index) for index in draws[0]}) == len(draws[0])


def test_two_of_them_share_few_entries() -> None:
    """The paper's reason why several adapters disturb each other little: supports meet as rarely as chance has it."""
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    supports = []
    for seed in (0, 1):
        attach(model, "shira", name=f"d{seed}", rank=1, seed=seed, targets="mlp")
        supports.append({(name, i) for name, slot in attachments(model)[f"d{seed}"].slots.items() for i in slot.index.tolist()})
    assert len(supports[0] & supports[1]) < 0.05 * len(supports[0])
