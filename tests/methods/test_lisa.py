"""LISA (#160): who trains when, and what the optimizer keeps of the others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from families import tiny

from espalier import registry
from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.attach.course import Course
from espalier.attach.method import Moment
from espalier.memory.joined_optimizer import build


def parts_of(model: torch.nn.Module) -> list[Any]:
    return next(iter(attachments(model).values())).parts


def active(model: torch.nn.Module, step: int) -> set[int]:
    """The blocks that train in a step."""
    method = registry.make("lisa", "adapter", layers=2, every=1)
    return {p.target.block for p in parts_of(model) if p.target.block is not None and not method.frozen(p, Moment(step, 1000))["values"]}


def test_over_many_draws_each_layer_is_active_gamma_of_l_of_the_time_and_never_twice_in_one_draw() -> None:
    model = tiny("llama", num_hidden_layers=5)
    attach(model, "lisa", seed=1)
    draws = [active(model, step) for step in range(400)]
    assert all(len(drawn) == 2 for drawn in draws)
    counts = Counter(block for drawn in draws for block in drawn)
    assert all(abs(count - 160) < 45 for count in counts.values()) and len(counts) == 5
    other = tiny("llama", num_hidden_layers=5)
    attach(other, "lisa", seed=2)
    assert [active(other, step) for step in range(20)] != draws[:20]


def run(steps: int, rule: Any = None, **options: Any) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]], list[set[str]]]:
    """A model after some steps, its trained tensors after each, and which the optimizer has state of."""
    torch.manual_seed(0)
    model = tiny("llama", num_hidden_layers=4)
    attach(model, "lisa", **{"layers": 1, "every": 3, **options})
    parameters = trainable_parameters(model)
    optimizer = build((rule or registry.make("adamw", "optimizer")).build, parameters, 0.01, {})
    course, seen, kept = Course(model, steps), [], []
    x = torch.arange(24).view(2, 12) % 60
    for step in range(steps):
        course.begin(step, 0.01, optimizer)
        model(x, labels=x).loss.backward()
        course.before_step()
        optimizer.step()
        course.after_step()
        optimizer.zero_grad(set_to_none=True)
        seen.append({n: p.detach().clone() for n, p in parameters.items()})
        kept.append({n for n, p in parameters.items() if optimizer.state.get(p)})
    return model, seen, kept


def block_of(name: str) -> int | None:
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None


def test_only_active_layers_and_what_always_trains_change_and_only_these_have_optimizer_state() -> None:
    _, seen, kept = run(12)
    for period in range(1, 4):
        first, last = seen[3 * period - 1], seen[3 * period + 2]
        moved = {n for n in first if not torch.equal(first[n], last[n])}
        blocks = {block_of(n) for n in moved} - {None}
        assert len(blocks) == 1
        assert {n for n in first if block_of(n) is None} <= moved
        assert kept[3 * period + 2] == {n for n in first if block_of(n) in (None, *blocks)}


def test_with_all_layers_it_is_full_tuning() -> None:
    _, seen, _ = run(6, layers=4)
    torch.manual_seed(0)
    full = tiny("llama", num_hidden_layers=4)
    attach(full, "full")
    parameters = trainable_parameters(full)
    optimizer = registry.make("adamw", "optimizer").build(parameters, 0.01)
    x = torch.arange(24).view(2, 12) % 60
    for _ in range(6):
        full(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(seen[-1].values(), parameters.values(), strict=True))


def test_a_block_that_moves_again_gets_another_random_subspace() -> None:
    """The optimizer forgets its state, and not how many subspaces it drew: FRUGAL would train the same columns for ever."""
    drawn: dict[int, list[tuple[int, ...]]] = {}
    rule = registry.make("frugal", "optimizer", every=1000)
    choose = type(rule).basis

    def basis(gradient: torch.Tensor, *arguments: Any) -> torch.Tensor:
        made = choose(rule, gradient, *arguments)
        drawn.setdefault(arguments[2][0], []).append(tuple(sorted(made.tolist())))
        return made

    rule.basis = basis
    run(30, rule)
    again = [bases for bases in drawn.values() if len(bases) > 1]
    assert again and all(len(set(bases)) == len(bases) for bases in again)
