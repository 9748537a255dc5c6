"""AdaLoRA (arXiv:2303.10512): triplets pruned by importance on a cubic budget."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from courses import run
from families import tiny, tokens

from espalier.adapt.adalora import AdaLoRA
from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.attach.course import Course
from espalier.attach.method import Moment
from espalier.delta.forms import LowRank
from espalier.errors import EspalierError

OPTIONS: dict[str, Any] = {"rank": 2, "initial_rank": 4, "begin": 0.2, "end": 0.7, "interval": 2}


def attached(**options: Any) -> tuple[torch.nn.Module, list[Any]]:
    model = attach(tiny("llama"), "adalora", **{**OPTIONS, **options})
    return model, list(attachments(model)["adalora"].slots.values())


def active(parts: list[Any]) -> int:
    return sum(int(part.e.count_nonzero()) for part in parts)


def test_the_budget_is_monotone_has_exact_ends_and_is_kept_exactly() -> None:
    model, parts = attached()
    total, seen = 4 * len(parts), []
    run(model, 20, lambda step: seen.append(active(parts)))
    method = attachments(model)["adalora"].method
    assert isinstance(method, AdaLoRA)
    budgets = [method.budget(Moment(step, 20), total) for step in range(20)]
    assert budgets[:4] == [total] * 4 and budgets[-1] == total // 2 and budgets == sorted(budgets, reverse=True)
    pruned = [step for step in range(20) if step + 1 >= 14 or (step + 1 > 4 and (step + 1) % 2 == 0)]
    assert [seen[step] for step in pruned] == [budgets[step] for step in pruned]
    assert seen[:4] == [total] * 4, "nothing is pruned before the beginning"


def test_a_masked_triplet_keeps_training_and_comes_back_when_its_score_revives() -> None:
    model, parts = attached(begin=0.0, end=1.0)
    masks: list[torch.Tensor] = []
    run(model, 30, lambda step: masks.append(torch.cat([part.e.detach() != 0 for part in parts])), learning_rate=0.05)
    assert any(bool((~before & after).any()) for before, after in itertools.pairwise(masks))


def test_the_pattern_stands_in_the_final_phase() -> None:
    model, parts = attached()
    masks: list[torch.Tensor] = []
    run(model, 20, lambda step: masks.append(torch.cat([part.e.detach() != 0 for part in parts])))
    assert all(torch.equal(mask, masks[-1]) for mask in masks[14:])


@pytest.mark.parametrize(("begin", "end"), [(0.5, 0.5), (0.45, 0.55), (0.0, 0.0), (1.0, 1.0)])
def test_a_window_shorter_than_a_step_prunes_all_at_once_and_for_good(begin: float, end: float) -> None:
    """The trap: a budget that falls by the step would still be falling when the pattern stands."""
    model, parts = attached(begin=begin, end=end)
    masks: list[torch.Tensor] = []
    run(model, 5, lambda step: masks.append(torch.cat([part.e.detach() != 0 for part in parts])))
    first = next(step for step in range(5) if step + 1 >= end * 5)
    assert [int(mask.sum()) for mask in masks] == [4 * len(parts)] * first + [2 * len(parts)] * (5 - first)
    assert all(torch.equal(mask, masks[-1]) for mask in masks[first:])


def test_what_is_saved_is_a_plain_lora_without_the_pruned_triplets() -> None:
    model, _ = attached()
    run(model, 10)
    x = tokens(seed=77)
    with torch.no_grad():
        for name, update in attachments(model)["adalora"].updates().items():
            slot = attachments(model)["adalora"].slots[name]
            assert isinstance(update, LowRank) and update.rank == max(1, int(slot.e.count_nonzero()))
            whole = slot.update()
            rows = torch.randn(5, slot.target.inputs)
            torch.testing.assert_close(update.matmul(rows), whole.matmul(rows), rtol=1e-5, atol=1e-7)
        assert model(x).logits.isfinite().all()


def test_a_run_that_does_not_reach_the_budget_says_so() -> None:
    model, parts = attached()
    for part in parts:
        torch.nn.init.ones_(part.e)
    with pytest.raises(EspalierError, match=r"56 triplets are left of 56; the budget is 28"):
        Course(model, 3).finish()


def test_the_penalty_is_the_mean_distance_from_orthogonality() -> None:
    model, parts = attached(orthogonality=0.3)
    distances = []
    for part in parts:
        for gram in (part.B.T @ part.B, part.A @ part.A.T):
            distances.append(torch.linalg.norm(gram - torch.eye(4)))
    torch.testing.assert_close(Course(model, 5).penalty(), 0.3 * torch.stack(distances).mean())


def test_it_prunes_what_peft_prunes_step_by_step() -> None:
    peft = pytest.importorskip("peft")
    steps = 16
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=3, tfinal=5, deltaT=2, beta1=0.85, beta2=0.85, orth_reg_weight=0.5, total_step=steps, lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny("llama"), config)
    model = attach(
        tiny("llama"), "adalora", targets="attention.q,attention.v,mlp.down", rank=2, initial_rank=4, begin=3 / steps, end=11 / steps, interval=2,
        orthogonality=0.5, alpha=8.0,
    )  # fmt: skip
    slots = attachments(model)["adalora"].slots
    modules = {name: module for name, module in theirs.named_modules() if hasattr(module, "lora_E")}
    pairs = [(slots[name.removeprefix("base_model.model.") + ".weight"], module) for name, module in modules.items()]
    with torch.no_grad():
        for slot, module in pairs:
            slot.B.copy_(module.lora_B["default"]), slot.A.copy_(module.lora_A["default"]), slot.e.copy_(module.lora_E["default"][:, 0])
    names = [name for name, p in theirs.named_parameters() if p.requires_grad]
    assert len(names) == len(trainable_parameters(model))
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    patterns: list[list[torch.Tensor]] = []
    for step in range(steps):
        x = tokens(seed=step)
        theirs(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        patterns.append([module.lora_E["default"][:, 0].detach().clone() for _, module in pairs])
    seen: list[list[torch.Tensor]] = []
    run(
        model, steps, lambda step: seen.append([slot.e.detach().clone() for slot, _ in pairs]), learning_rate=0.5,
        optimizer=lambda parameters, rate: torch.optim.SGD(parameters.values(), lr=rate),
    )  # fmt: skip
    assert sum(int((e == 0).sum()) for e in patterns[-1]) == 2 * len(pairs)
    for here, there in zip(seen, patterns, strict=True):
        for ours, other in zip(here, there, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-6)
