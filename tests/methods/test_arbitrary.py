"""Arbitrary PET (arXiv:2306.02320): exactly n numbers, wherever they were drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from courses import run
from families import tiny

from espalier.attach.attachment import attach, attachments, stored, trainable_parameters
from espalier.delta import store
from espalier.exchange.save import save


def attached(**options: Any) -> torch.nn.Module:
    return attach(tiny("llama"), "arbitrary", name="d", **options)


@pytest.mark.parametrize("numbers", [1, 777, 5000])
@pytest.mark.parametrize("inserted", [0.0, 0.5, 1.0])
def test_exactly_n_numbers_train_whatever_their_structure(numbers: int, inserted: float) -> None:
    model = attached(numbers=numbers, inserted=inserted)
    parameters = trainable_parameters(model)
    assert sum(p.numel() for p in parameters.values()) == numbers
    pairs = sum(p.numel() for name, p in parameters.items() if not name.endswith("values"))
    assert pairs <= inserted * numbers and (pairs > 0) == (inserted * numbers >= 64), "the smallest pair has 64 numbers"
    assert {n.replace(".A_", ".B_") for n in parameters if ".A_" in n} == {n for n in parameters if ".B_" in n}, "no A without its B"


def test_the_same_seed_draws_the_same_set_and_another_seed_another() -> None:
    def support(seed: int) -> list[torch.Tensor]:
        model = attached(numbers=2000, seed=seed)
        return [p for n, p in sorted(attachments(model)["d"].pool.named_buffers())]

    same, again, other = support(1), support(1), support(2)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(same, other, strict=True))


def test_entries_are_drawn_in_proportion_to_the_tensors_sizes() -> None:
    model = attached(numbers=6000, inserted=0.0)
    attachment = attachments(model)["d"]
    total = sum(target.size for target in attachment.targets)
    for target in attachment.targets:
        drawn = len(attachment.pool.get_buffer("index_" + target.name.replace(".", "__")))
        share = 6000 * target.size / total
        assert abs(drawn - share) < 1


def test_what_was_not_drawn_keeps_its_bits_and_the_result_is_a_sparse_delta(tmp_path: Path) -> None:
    model = attached(numbers=500, inserted=0.0)
    tiny("llama").save_pretrained(tmp_path / "base")
    run(model, 3)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    delta = store.load(tmp_path / "delta")
    assert {update.form for update in delta.updates.values()} == {"sparse"}
    changed = 0
    for name, update in delta.updates.items():
        weight = stored(model, name).detach()
        changed += int((update.apply(weight) != weight).sum())
    assert 0 < changed <= 500
