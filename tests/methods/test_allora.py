"""ALLoRA (arXiv:2410.09692): a learning rate for every row that fades as its update grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from courses import run
from families import tiny, tokens

from espalier.attach.attachment import attach, attachments


def allora(**options: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    model = attach(tiny("llama"), "allora", **{"rank": 2, "targets": "attention.q", **options})
    return model, attachments(model)["allora"].slots


def test_the_factor_starts_at_eta_and_falls_with_the_rows_norm() -> None:
    model, slots = allora(eta=3.0)
    method, slot = attachments(model)["allora"].method, next(iter(slots.values()))
    assert torch.allclose(method.factors(slot), torch.tensor(3.0))
    with torch.no_grad():
        slot.B.copy_(torch.linspace(0, 5, slot.B.numel()).reshape(slot.B.shape))
        norms = (slot.B @ slot.A).norm(dim=-1)
        factors = method.factors(slot)[:, 0]
    torch.testing.assert_close(factors, (norms + 1 / 9).rsqrt(), rtol=1e-4, atol=1e-5)
    assert bool((factors.diff() <= 0).all())


@pytest.mark.parametrize("scale", ["update", "gradient"])
def test_one_plain_step_moves_B_by_the_factor_times_what_lora_would_and_A_as_lora(scale: str) -> None:
    sgd = lambda parameters, rate: torch.optim.SGD(parameters.values(), lr=rate)  # noqa: E731
    model, slots = allora(eta=3.0, scale=scale)
    plain = attach(tiny("llama"), "lora", rank=2, alpha=2.0, targets="attention.q")
    others = attachments(plain)["lora"].slots
    run(model, 1, optimizer=sgd), run(plain, 1, optimizer=sgd)
    for name, slot in slots.items():
        torch.testing.assert_close(slot.B, 3.0 * others[name].B, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(slot.A, others[name].A, rtol=1e-5, atol=1e-7)


def test_under_adam_a_factor_on_the_gradient_cancels_and_one_on_the_update_does_not() -> None:
    adam = lambda parameters, rate: torch.optim.Adam(parameters.values(), lr=rate)  # noqa: E731
    moved = {}
    for scale in ("update", "gradient"):
        model, slots = allora(eta=4.0, scale=scale)
        run(model, 1, optimizer=adam)
        moved[scale] = torch.stack([slot.B.detach() for slot in slots.values()]).abs().median()
    assert moved["update"] == pytest.approx(4 * 0.01, rel=1e-3) and moved["gradient"] == pytest.approx(0.01, rel=1e-3)


def test_the_forward_pass_is_that_of_lora_with_alpha_equal_to_the_rank() -> None:
    model, slots = allora()
    plain = attach(tiny("llama"), "lora", rank=2, alpha=2.0, targets="attention.q")
    for name, slot in slots.items():
        with torch.no_grad():
            slot.B.normal_()
            attachments(plain)["lora"].slots[name].B.copy_(slot.B)
    x = tokens()
    assert torch.equal(model(x).logits, plain(x).logits)


def test_an_eta_of_nearly_zero_makes_the_updates_of_B_vanish() -> None:
    model, slots = allora(eta=1e-6)
    run(model, 3)
    assert max(float(slot.B.detach().abs().max()) for slot in slots.values()) < 1e-5
