"""SpIEL (#52): what goes and what comes, when, and with which state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from courses import run
from families import tiny, tokens

from espalier import registry
from espalier.attach.attachment import attach, attachments, stored, trainable_parameters
from espalier.attach.course import Course
from espalier.attach.method import Moment
from espalier.data.batches import Cursor
from espalier.errors import EspalierError
from espalier.memory.joined_optimizer import build
from espalier.train import checkpoint

ADAMW = registry.make("adamw", "optimizer", weight_decay=0.1)


def spiel(family: str = "llama", targets: str = "mlp", **options: Any) -> tuple[torch.nn.Module, list[Any]]:
    model = attach(tiny(family, num_hidden_layers=1), "spiel", name="d", targets=targets, **{"density": 0.05, "every": 5, "collect": 2, **options})
    return model, attachments(model)["d"].parts


def steps(model: torch.nn.Module, optimizer: Any, course: Course, some: range, watch: Any = lambda step: None, pieces: int = 1) -> None:
    for step in some:
        course.begin(step, 0.01, optimizer)
        for x in tokens(rows=4, seed=step).chunk(pieces):
            (model(x, labels=x).loss / pieces).backward()
        course.before_step()
        optimizer.step()
        course.after_step()
        optimizer.zero_grad(set_to_none=True)
        watch(step)


def begun(model: torch.nn.Module, total: int = 20) -> tuple[Any, Course]:
    return build(ADAMW.build, trainable_parameters(model), 0.01, {}), Course(model, total)


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize(("family", "targets"), [("llama", "mlp"), ("qwen3_moe", "experts"), ("llama", "embedding")])
def test_exactly_k_distinct_entries_after_every_reselection(growth: str, family: str, targets: str) -> None:
    model, parts = spiel(family, targets, growth=growth, rate=0.8)
    seen: list[list[list[int]]] = []
    run(model, 16, lambda step: seen.append([part.index.tolist() for part in parts]), optimizer=ADAMW.build)
    for now in seen:
        for part, index in zip(parts, now, strict=True):
            size = part.target.outputs * part.target.inputs
            assert index == sorted(set(index))
            for expert in range(part.target.size // size):
                assert sum(expert * size <= i < (expert + 1) * size for i in index) == part.method.each(part.target)
    changes = [step for step in range(1, 16) if seen[step] != seen[step - 1]]
    assert changes == ([2, 7, 12] if growth == "gradient" else [4, 9, 14])


def test_what_is_dropped_returns_to_the_base_and_reselection_changes_nothing_else() -> None:
    """The delta is zero at init, dropped entries restore W0 bit-exactly, and re-selection itself only removes the dropped phi."""
    model, parts = spiel()
    bases = [stored(model, part.target.name).clone() for part in parts]
    assert all(torch.equal(part.update().apply(base), base) for part, base in zip(parts, bases, strict=True))
    optimizer, course = begun(model)
    method, before = parts[0].method, {}
    original = method.reselect

    def watched(own: list[Any], moment: Moment) -> Any:
        before.update({id(p): (p.index.clone(), method.values(p).detach().clone()) for p in own})
        return original(own, moment)

    method.reselect = watched
    for step in range(8):
        steps(model, optimizer, course, range(step, step + 1))
        for part, base in zip(parts, bases, strict=True):
            index, values = before[id(part)]
            remained = torch.isin(part.index, index)
            new = part.update().apply(base)
            assert torch.equal(method.values(part)[remained], values[torch.isin(index, part.index)])
            assert bool((method.values(part)[~remained] == 0).all())
            outside = torch.ones(base.numel(), dtype=torch.bool)
            outside[part.index.long()[remained]] = False
            assert torch.equal(new.flatten()[outside], base.flatten()[outside])
            assert (step in (2, 7)) == bool((~remained).any())


def test_the_smallest_go_and_the_largest_sums_come() -> None:
    """Candidates are the k largest gradients of the first step of the phase; their later gradients are summed, signs and all."""
    model, parts = spiel(rate=0.5)
    dense = attach(tiny("llama", num_hidden_layers=1), "bitfit", targets="mlp.down")  # a dense delta that stays zero: the base's gradients
    optimizer, course = begun(model)
    part = next(p for p in parts if p.target.role == "mlp.down")
    k = len(part.index)
    gradients = []
    for step in range(3):
        x = tokens(rows=4, seed=step)
        dense.zero_grad()
        dense(x, labels=x).loss.backward()
        gradients.append(next(iter(trainable_parameters(dense).values())).grad.flatten().clone())
        if step == 2:
            part.found = None
            candidates = part.candidates.clone()
        steps(model, optimizer if step == 9 else torch.optim.SGD(trainable_parameters(model).values(), lr=0.0), course, range(step, step + 1))
    assert candidates.tolist() == gradients[0].abs().topk(k).indices.sort().values.tolist()
    sums = (gradients[1] + gradients[2])[candidates]
    torch.testing.assert_close(part.sums, sums, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(part.squares, gradients[1][candidates] ** 2 + gradients[2][candidates] ** 2, rtol=1e-4, atol=1e-8)
    assert part.index.tolist() == candidates.tolist(), "the whole first support is up for replacement, and all that goes is replaced"


def test_with_all_entries_it_is_adamw_on_the_dense_delta() -> None:
    """Support = all entries: what would both go and come is left untouched."""
    model, parts = spiel(density=1.0, targets="linear")
    dense = attach(tiny("llama", num_hidden_layers=1), "bitfit", targets="linear")
    adamw = registry.make("adamw", "optimizer")
    for m in (model, dense):
        run(m, 7, optimizer=adamw.build)
    for part in parts:
        there = attachments(dense)["bitfit"].slots[part.target.name].values
        torch.testing.assert_close(part.values.view(there.shape), there, rtol=1e-3, atol=1e-5)


def test_every_entry_has_an_age_of_its_own() -> None:
    """AdamW with per-entry age, in float64 from the equations; seeds are (1 - beta^a) times the means of the gathered gradients."""
    model, parts = spiel(rate=0.4)
    optimizer, course = begun(model)
    adam = registry.make("adamw", "optimizer")
    optimizer = build(adam.build, trainable_parameters(model), 0.01, {})
    part = parts[0]
    value = {int(i): 0.0 for i in part.index}
    moments = dict.fromkeys(value, (0.0, 0.0, 0))
    for step in range(13):
        gathered = {}

        def catch(own: Any = part, into: dict[int, float] = gathered) -> None:
            into.update(zip(own.index.tolist(), own.values.grad[own.slot.long()].double().tolist(), strict=True))

        course.begin(step, 0.01, optimizer)
        x = tokens(rows=4, seed=step)
        model(x, labels=x).loss.backward()
        catch()
        course.before_step()
        candidates, sums, squares = part.candidates.tolist(), part.sums.double().tolist(), part.squares.double().tolist()
        optimizer.step()
        course.after_step()
        optimizer.zero_grad(set_to_none=True)
        for i, g in gathered.items():
            m, v, age = moments[i]
            m, v, age = adam.beta1 * m + (1 - adam.beta1) * g, adam.beta2 * v + (1 - adam.beta2) * g * g, age + 1
            moments[i] = (m, v, age)
            value[i] -= 0.01 * (m / (1 - adam.beta1**age)) / ((v / (1 - adam.beta2**age)) ** 0.5 + adam.epsilon)
        now = part.index.tolist()
        for i in now:
            if i not in value:
                at = candidates.index(i)
                value[i], moments[i] = 0.0, ((1 - adam.beta1**2) * sums[at] / 2, (1 - adam.beta2**2) * squares[at] / 2, 2)
        value, moments = {i: value[i] for i in now}, {i: moments[i] for i in now}
        found = part.method.values(part).double()
        torch.testing.assert_close(found, torch.tensor([value[i] for i in now], dtype=torch.float64), rtol=1e-3, atol=2e-6)
    assert len({age for _, _, age in moments.values()}) > 2


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_state_of_other_precision_takes_seeds_and_ages_too(state: str) -> None:
    """The trap of the released code: with low-precision state the stored age never advances."""
    made = registry.make("adamw", "optimizer")
    made.state = state
    model = attach(tiny("llama", num_hidden_layers=1, intermediate_size=512), "spiel", targets="mlp", density=0.3, every=4, collect=1)
    part = attachments(model)["spiel"].parts[0]
    optimizer = build(made.build, trainable_parameters(model), 0.01, {})
    course = Course(model, 40)
    steps(model, optimizer, course, range(7))
    kept = optimizer.state[part.values]
    assert kept["exp_avg"].dtype == (torch.bfloat16 if state == "bf16" else torch.uint8)
    assert {6.0, 2.0} <= set(kept["age"].tolist()) <= {7.0, 6.0, 2.0}, "of the start, of the first phase, and of the second"


def test_optimizers_that_know_no_ages_forget_the_state_of_what_comes() -> None:
    model, parts = spiel()
    course, optimizer = Course(model, 20), torch.optim.AdamW(trainable_parameters(model).values(), lr=0.01)
    before = [part.index.tolist() for part in parts]
    steps(model, optimizer, course, range(3))
    for part, was in zip(parts, before, strict=True):
        new = torch.tensor([i not in was for i in part.index.tolist()])
        moments = optimizer.state[part.values]["exp_avg"][part.slot.long()]
        assert new.any() and not moments[new].any() and moments[~new].all()


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_it_resumes_to_the_same_bits_in_the_middle_of_a_phase(growth: str, stop: int, tmp_path: Path) -> None:
    model, parts = spiel(growth=growth)
    optimizer, course = begun(model)
    again, others = spiel(growth=growth, seed=9)
    second, follow = begun(again)
    steps(model, optimizer, course, range(stop))
    checkpoint.save(tmp_path / "c", {**trainable_parameters(model), **course.kept()}, optimizer, checkpoint.State(stop, Cursor(), 0, 0.0))
    steps(model, optimizer, course, range(stop, 13))
    checkpoint.load(tmp_path / "c" / f"step-{stop:08d}", {**trainable_parameters(again), **follow.kept()}, second)
    steps(again, second, follow, range(stop, 13))
    for one, two in zip(parts, others, strict=True):
        assert torch.equal(one.index, two.index) and torch.equal(one.method.values(one), two.method.values(two))


def test_micro_batches_sum_to_the_gradients_of_the_whole_batch() -> None:
    """The seeds of the released code are of micro-batches that were divided already, while Adam sees their sum."""
    found = []
    for pieces in (1, 4):
        model, parts = spiel(every=8, collect=4)
        optimizer, course = begun(model)
        steps(model, optimizer, course, range(1))
        for part in parts:
            part.candidates.copy_(torch.arange(len(part.candidates)))
        steps(model, optimizer, course, range(1, 3), pieces=pieces)
        found.append([(part.sums.clone(), part.squares.clone()) for part in parts])
    for one, two in zip(*found, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_momentums_accumulators_bound_the_squares_and_score_rows_and_columns() -> None:
    model, parts = spiel(growth="momentum", density=0.2, rate=0.5, every=3)
    optimizer, course = begun(model)
    part = parts[0]
    squares = torch.zeros(part.target.shape)
    for step in range(2):
        course.begin(step, 0.01, optimizer)
        x = tokens(seed=step)
        model(x, labels=x).loss.backward()
        squares.view(-1)[part.index.long()] += part.values.grad[part.slot.long()] ** 2
        course.before_step()
        optimizer.step()
        course.after_step()
        optimizer.zero_grad()
    R, C = part.rows[0], part.columns[0]
    assert bool((torch.minimum(R[:, None], C) >= squares * (1 - 1e-5)).all()), "SM3 never forgets a square"
    new, _ = part.method._grow(part, 0, part.index.long(), part.index.long(), 10)
    scores = torch.outer(R, C).flatten()
    scores[part.index.long()] = 0
    assert len(new.unique()) == 10
    assert torch.equal(scores[new].sort(descending=True).values, scores.topk(10).values), "of equal scores (a row's times a column's), any"


def test_a_period_too_short_for_its_phase_is_refused() -> None:
    with pytest.raises(EspalierError, match="every is 5; it must be at least 7"):
        registry.make("spiel", "adapter", every=5)


@pytest.mark.slow
def test_two_processes_choose_the_same_entries_and_train_them_as_one_does(tmp_path: Path) -> None:
    """Candidates are of all processes: with the same rows on both they are those of one, with others the same on both."""
    worker = Path(__file__).with_name("spiel_worker.py")
    processes = [
        subprocess.Popen([sys.executable, str(worker), str(rank), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    one, two = (json.loads((tmp_path / f"report{rank}.json").read_text()) for rank in range(2))
    assert one == two
    for case, found in enumerate(one):
        for name, (index, values) in found.items():
            if name.startswith("sharded") and case in (0, 3):
                there = found[name.replace("sharded", "whole")]
                assert index == there[0]
                torch.testing.assert_close(torch.tensor(values), torch.tensor(there[1]), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_no_numbers_are_left_to_the_loop_to_refuse(value: float) -> None:
    """They come in a backward pass, which looks for candidates among them, before the loop knows of them."""
    model, _ = spiel()
    optimizer, course = begun(model)
    course.begin(0, 0.01, optimizer)
    (model(tokens(), labels=tokens()).loss * value).backward()
    course.before_step()
    assert not all(bool(p.grad.isfinite().all()) for p in trainable_parameters(model).values() if p.grad is not None)
