"""SoRA (arXiv:2311.11696): gates that a proximal step drives to zero."""

from __future__ import annotations

import pytest
import torch
from courses import run
from families import tiny, tokens

from espalier.attach.attachment import attach, attachments, detach
from espalier.attach.course import Course
from espalier.delta.forms import LowRank


def test_the_proximal_step_minimizes_its_objective() -> None:
    """``argmin_g 0.5 (g - v)^2 + threshold |g|``, found on a grid; the released operator would zero 1.9 thresholds."""
    model = attach(tiny("llama"), "sora", rank=5, threshold=0.1)
    slot = next(iter(attachments(model)["sora"].slots.values()))
    v = torch.tensor([0.3, -0.12, 0.19, 0.05, -0.4])
    with torch.no_grad():
        slot.gate.copy_(v)
    course = Course(model, 10)
    course.begin(0)
    course.before_step()
    course.after_step()
    grid = torch.linspace(-0.5, 0.5, 100001, dtype=torch.float64)
    best = grid[(0.5 * (grid - v[:, None].double()).square() + 0.1 * grid.abs()).argmin(1)]
    torch.testing.assert_close(slot.gate.detach().double(), best, rtol=0, atol=2e-5)
    assert slot.gate[2] > 0.08


def test_larger_thresholds_leave_fewer_gates_and_the_saved_lora_has_only_those() -> None:
    left = []
    for threshold in (0.0, 0.02, 0.1):
        model = attach(tiny("llama"), "sora", rank=6, threshold=threshold)
        run(model, 12)
        attachment = attachments(model)["sora"]
        left.append(sum(int(slot.gate.count_nonzero()) for slot in attachment.slots.values()))
        for name, update in attachment.updates().items():
            slot = attachment.slots[name]
            assert isinstance(update, LowRank) and update.rank == max(1, int(slot.gate.count_nonzero()))
            rows = torch.randn(4, slot.target.inputs)
            with torch.no_grad():
                torch.testing.assert_close(update.matmul(rows), slot.update().matmul(rows), rtol=1e-5, atol=1e-6)
    assert left[0] == 6 * 14 and left[0] > left[1] > left[2]


def test_the_threshold_grows_linearly_to_the_last_one() -> None:
    model = attach(tiny("llama"), "sora", rank=2, threshold=0.1, last_threshold=0.3)
    slot = next(iter(attachments(model)["sora"].slots.values()))
    course = Course(model, 4)
    for step, expected in enumerate((0.15, 0.2, 0.25, 0.3)):
        with torch.no_grad():
            slot.gate.fill_(1.0)
        course.begin(step)
        course.before_step()
        course.after_step()
        assert float(slot.gate.detach()[0]) == pytest.approx(1 - expected)


def test_a_gate_at_zero_still_gets_a_gradient_and_its_vectors_do_not() -> None:
    model = attach(tiny("llama"), "sora", rank=2)
    slot = next(iter(attachments(model)["sora"].slots.values()))
    with torch.no_grad():
        slot.B.normal_(), slot.gate.copy_(torch.tensor([0.0, 1.0]))
    x = tokens()
    model(x, labels=x).loss.backward()
    assert slot.gate.grad[0] != 0 and not slot.B.grad[:, 0].any() and not slot.A.grad[0].any() and slot.B.grad[:, 1].any()
    detach(model)
