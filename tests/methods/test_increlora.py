"""IncreLoRA (arXiv:2308.12043): ranks that grow where the loss is most sensitive to them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from courses import run
from families import tiny, tokens

from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.attach.course import Course
from espalier.delta.forms import LowRank
from espalier.errors import EspalierError


def attached(**options: Any) -> tuple[torch.nn.Module, list[Any]]:
    model = attach(tiny("llama"), "increlora", **{"rank": 2, "most": 6, "matrices": 3, "begin": 0.1, "end": 0.8, **options})
    return model, list(attachments(model)["increlora"].slots.values())


@pytest.mark.parametrize("step_rank", [1, 2])
def test_active_ranks_never_fall_never_exceed_the_budget_and_reach_it(step_rank: int) -> None:
    model, parts = attached(step_rank=step_rank, rank=3)
    totals: list[int] = []
    run(model, 40, lambda step: totals.append(sum(int(part.active) for part in parts)))
    assert totals == sorted(totals) and totals[0] == len(parts) and totals[-1] == 3 * len(parts)
    assert all(after - before <= 3 * step_rank for before, after in itertools.pairwise(totals))
    assert max(int(part.active) for part in parts) > 3, "the rank of a matrix is not capped by the average"


def test_the_output_is_unchanged_when_ranks_are_added() -> None:
    model, parts = attached()
    run(model, 6, finish=False)
    x = tokens(seed=5)
    method: Any = attachments(model)["increlora"].method
    with torch.no_grad():
        before = model(x).logits
        method._grow(parts, 100, 7)
        torch.testing.assert_close(model(x).logits, before, rtol=1e-4, atol=1e-4)


def test_dividing_by_the_active_rank_shrinks_what_was_learnt_when_ranks_are_added() -> None:
    """The trap of the official code: by rho / (rho + g) at that instant."""
    model, parts = attached(scaling="per-rank", rank=1)
    run(model, 3, finish=False)
    method, part = attachments(model)["increlora"].method, parts[0]
    with torch.no_grad():
        was = part.update().materialize(torch.zeros(part.target.shape))
        part.active += 1
        now = method.update(part, None).materialize(torch.zeros(part.target.shape))
    torch.testing.assert_close(now, was / 2, rtol=1e-3, atol=1e-7)


def test_reserves_learn_in_advance_and_unused_room_does_not_move() -> None:
    model, _ = attached(begin=1.0, end=1.0, matrices=14)
    start = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    seen: list[dict[str, torch.Tensor]] = []
    run(model, 5, lambda step: seen.append({name: p.detach().clone() for name, p in trainable_parameters(model).items()}), finish=False)
    for name, now in seen[3].items():
        moved = now != start[name]
        if name.endswith(".B"):
            assert moved[:, 0].any() and moved[:, 1].any() and not moved[:, 2:].any()
        elif name.endswith(".e"):
            assert moved[0] and not moved[1:].any() and float(now[1]) == pytest.approx(1e-5)
        else:
            assert moved[1].any() and not moved[2:].any()


def test_what_is_saved_has_no_reserves() -> None:
    model, parts = attached()
    run(model, 30)
    for update, part in zip(attachments(model)["increlora"].updates().values(), parts, strict=True):
        assert isinstance(update, LowRank) and update.rank == int(part.active)


def test_growth_finds_the_two_matrices_in_which_a_planted_change_lies() -> None:
    """A teacher that differs from the base by rank 4 in two of twelve matrices."""
    torch.manual_seed(0)
    shapes = [(24, 24)] * 12

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(*shape, bias=False) for shape in shapes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([layer(x) for layer in self.layers])

        def get_input_embeddings(self) -> None:
            return None

        get_output_embeddings = get_input_embeddings

    student = Net()
    planted = {2: torch.randn(24, 4) @ torch.randn(4, 24) / 5, 9: torch.randn(24, 4) @ torch.randn(4, 24) / 5}
    attach(student, "increlora", targets="layers.*.weight", rank=2, most=8, matrices=2, begin=0.05, end=0.6, alpha=8.0)
    slots = attachments(student)["increlora"].slots
    course, optimizer = Course(student, 300), torch.optim.AdamW(trainable_parameters(student).values(), lr=0.02)
    for step in range(300):
        course.begin(step)
        x = torch.randn(32, 24)
        wanted = torch.stack([layer._parameters["weight"].detach() @ x.T for layer in student.layers])
        for number, change in planted.items():
            wanted[number] += change @ x.T
        loss = (student(x) - wanted.transpose(1, 2)).square().mean() + course.penalty()
        loss.backward()
        course.before_step(), optimizer.step(), course.after_step(), optimizer.zero_grad()
    course.finish()
    ranks = [int(slot.active) for slot in slots.values()]
    assert ranks[2] + ranks[9] >= 12 and sum(ranks) == 24


def test_a_run_too_short_for_the_budget_is_refused_at_its_first_step() -> None:
    model, _ = attached(rank=6)
    seen: list[int] = []
    with pytest.raises(EspalierError, match=r"its 3 steps have room for \d growths .*; take more steps"):
        run(model, 3, seen.append)
    assert not seen


@pytest.mark.parametrize(("targets", "options"), [("embedding", {}), ("attention.q", {"rank": 3, "most": 3})])
def test_the_budget_is_reached_where_fewer_matrices_than_grow_at_a_time_are_left(targets: str, options: dict[str, int]) -> None:
    model = attach(tiny("llama"), "increlora", targets=targets, **options)
    run(model, 20)
    parts = attachments(model)["increlora"].parts
    assert sum(int(part.active) for part in parts) == options.get("rank", 4) * len(parts)
