"""IST (#24): which layers train in a step, and what the importance that draws them is learned from."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import courses
import pytest
import torch
from families import tiny, tokens

from espalier import registry
from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import attach, attachments, detach, release_base, trainable_parameters
from espalier.attach.course import Course
from espalier.budget.fitting import _with_size
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream
from espalier.select.ist import draw


def ist(layers: int = 8, **options: Any) -> tuple[torch.nn.Module, list[Any]]:
    model = attach(tiny("llama", num_hidden_layers=layers), "ist", **{"rank": 2, "targets": "attention.q,mlp.down", **options})
    return model, next(iter(attachments(model).values())).parts


def importance(parts: list[Any]) -> list[float]:
    """I by layer; all parts of a layer hold the same."""
    found: dict[int, set[float]] = {}
    for part in parts:
        found.setdefault(part.target.block, set()).add(float(part.importance))
    assert all(len(values) == 1 for values in found.values())
    return [values.pop() for _, values in sorted(found.items())]


def training(parts: list[Any]) -> set[int]:
    return {part.target.block for part in parts if all(p.requires_grad for p in part.parameters())}


def suppressed(parts: list[Any]) -> set[int]:
    return {part.target.block for part in parts if part.strength is not None}


def test_rewards_sum_to_zero_so_a_constant_loss_leaves_the_importance_unchanged() -> None:
    """Check (1)."""
    model, parts = ist()
    Course(model, 100).begin(10, measure=lambda: 2.0)
    assert importance(parts) == [0.0] * 8


def test_the_importance_follows_the_equation() -> None:
    """r_k = exp(-l_k) - mean; I_i += 10 r_k p_i (1 - p_i) with "p = sigmoid(I) fixed before the update"; sets of L / 2, all different."""
    model, parts = ist()
    wanted = torch.zeros(8, dtype=torch.float64)
    for step, losses in ((10, [1.0, 2.0, 0.5]), (20, [0.3, 0.1, 0.2])):
        sets, left = [], list(losses)

        def measure(sets: list[set[int]] = sets, left: list[float] = left) -> float:
            assert {float(part.strength) for part in parts if part.strength is not None} == {0.25}
            sets.append(suppressed(parts))
            return left.pop(0)

        Course(model, 100).begin(step, measure=measure)
        assert [len(some) for some in sets] == [4] * 3 and len(set(map(frozenset, sets))) == 3
        p, mean = wanted.sigmoid(), sum(math.exp(-x) for x in losses) / 3
        for some, loss in zip(sets, losses, strict=True):
            for i in some:
                wanted[i] += 10 * (math.exp(-loss) - mean) * float(p[i] * (1 - p[i]))
        torch.testing.assert_close(torch.tensor(importance(parts)).double(), wanted, rtol=1e-5, atol=1e-6)
    assert len(set(importance(parts))) > 2


def test_scales_and_the_mode_of_every_module_are_restored_bit_exactly_after_scoring() -> None:
    """Check (2); also when the loss fails."""
    model, parts = ist()
    model.train()
    model.model.layers[3].eval()
    third = torch.tensor(1 / 3)
    parts[0].strength = third
    modes, tensors = [m.training for m in model.modules()], {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers()) if "importance" not in n}
    seen = []

    def measure() -> float:
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        assert parts[0].strength is third or float(parts[0].strength) == pytest.approx(1 / 12)
        seen.append(float(model(tokens(), labels=tokens()).loss))
        return seen[-1]

    Course(model, 100).begin(10, measure=measure)
    with pytest.raises(ZeroDivisionError):
        Course(model, 100).begin(20, measure=lambda: 1 / 0)
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
    assert parts[0].strength is third and all(part.strength is None for part in parts[1:])
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(t, after[n]) for n, t in tensors.items())
    assert len(seen) == 3


def test_layers_outside_the_active_set_receive_no_update_and_no_gradient_buffers() -> None:
    """Check (3): a quarter of 8 trains, drawn anew in each step; decay and momentum of the others stand still."""
    model, parts = ist()
    parameters, seen = trainable_parameters(model), []
    before = {n: p.detach().clone() for n, p in parameters.items()}

    def watch(step: int) -> None:
        active = training(parts)
        moved = {n for n, p in parameters.items() if not torch.equal(p, before[n])}
        assert len(active) == 2 and all(int(n.split(".")[2]) in active for n in moved) and moved
        assert all(p.grad is None for n, p in parameters.items() if int(n.split(".")[2]) not in active)
        before.update({n: p.detach().clone() for n, p in parameters.items()})
        seen.append(frozenset(active))

    courses.run(model, 12, watch)
    assert len(set(seen)) > 6 and importance(parts) != [0.0] * 8


def test_the_importance_ranks_the_layers_that_matter_lowest_and_these_train_more_often() -> None:
    """"An 8-layer test-bed where only 3 layers matter": "high I means unimportant", so that the two draws have opposite signs."""
    model, parts = ist(step_size=10.0)
    matter, counts, course = {1, 4, 6}, Counter(), Course(model, 3000)
    for step in range(400):
        course.begin(step, measure=lambda: 1.0 + 0.5 * len(suppressed(parts) & matter))
        if step >= 200:
            counts.update(training(parts))
    order = sorted(range(8), key=lambda layer: importance(parts)[layer])
    assert set(order[:3]) == matter
    assert min(counts[layer] for layer in matter) > max(counts[layer] for layer in set(range(8)) - matter)


def test_at_a_step_size_of_zero_draws_are_uniform_and_no_loss_is_measured() -> None:
    """The paper's baseline, "RST"."""
    model, parts = ist(step_size=0.0)
    course, counts = Course(model, 3000), Counter()
    for step in range(400):
        course.begin(step)
        counts.update(training(parts))
    assert sum(counts.values()) == 800 and all(abs(counts[layer] - 100) < 35 for layer in range(8))


def test_draws_follow_the_weights_the_seed_and_nothing_else() -> None:
    """The trap: "all draws use the global RNG: ranks diverge under data parallel"."""
    first = Counter(next(iter(draw([2.0, -2.0, 0.0], 1, Stream(0, str(i))))) for i in range(1000))
    weights = torch.tensor([2.0, -2.0, 0.0]).sigmoid()
    torch.testing.assert_close(torch.tensor([first[i] / 1000 for i in range(3)]), weights / weights.sum(), rtol=0, atol=0.05)
    assert draw([800.0, -800.0, -900.0], 2, Stream(0, "x")) == {0, 1}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))
        model, parts = ist(seed=seed)
        course = Course(model, 100)
        drawn.append([course.begin(step) or training(parts) for step in range(6)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_over_full_layers_the_base_stays_for_what_is_suppressed_and_what_is_in_no_block_always_trains() -> None:
    model, parts = ist(4, inner="full", targets="mlp.down,norm,head")
    release_base(model)
    base = tiny("llama", num_hidden_layers=4)
    x, losses = tokens(), []
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.01)
    for number in ({0, 1}, {2, 3}):
        wanted = copy.deepcopy(base)
        for part in parts:
            weight = wanted.get_parameter(part.target.name)
            weight.data += 0.01 * (0.25 if part.target.block in number else 1.0)
        losses.append(float(wanted(x, labels=x).loss))

    def measure() -> float:
        if suppressed(parts) in ({0, 1}, {2, 3}):
            assert float(model(x, labels=x).loss) == pytest.approx(losses[suppressed(parts) == {2, 3}], rel=1e-5)
            seen.append(suppressed(parts))
        return 1.0

    seen: list[set[int]] = []
    course = Course(model, 1000)
    for step in range(10, 200, 10):
        course.begin(step, measure=measure)
        assert training(parts) - {None} and all(p.requires_grad for part in parts if part.target.block is None for p in part.parameters())
    assert {0, 1} in seen and {2, 3} in seen
    detach(model)
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in model.named_parameters())


def test_it_resumes_to_the_same_bits_in_the_middle() -> None:
    """After a comparison, whose scores are part of a checkpoint."""

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, course: Course, which: range) -> None:
        for step in which:
            x = tokens(seed=step)
            course.begin(step, 0.01, optimizer, lambda x=x: float(model(x, labels=x).loss))
            model(x, labels=x).loss.backward()
            course.before_step()
            optimizer.step()
            course.after_step()
            optimizer.zero_grad()

    runs = []
    for _ in range(2):
        model, _ = ist(4, every=3)
        runs.append((model, torch.optim.AdamW(trainable_parameters(model).values(), lr=0.01), Course(model, 10)))
    whole, resumed = runs
    steps(*whole, range(7))
    held = {n: t.detach().clone() for n, t in {**trainable_names(whole[0]), **whole[2].kept()}.items()}
    state = copy.deepcopy(whole[1].state_dict())
    assert any(float(t) for t in whole[2].kept().values())
    steps(*whole, range(7, 10))
    with torch.no_grad():
        for name, tensor in {**trainable_names(resumed[0]), **resumed[2].kept()}.items():
            tensor.copy_(held[name])
    resumed[1].load_state_dict(state)
    steps(*resumed, range(7, 10))
    for name, tensor in {**trainable_names(whole[0]), **whole[2].kept()}.items():
        assert torch.equal(tensor, {**trainable_names(resumed[0]), **resumed[2].kept()}[name])


def trainable_names(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name, whether or not they train in this step."""
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("A", "B")}


@pytest.mark.parametrize("inner", ["dora", "paca", "hydra", "mos"])
def test_it_goes_over_any_method_that_updates_parameters(inner: str) -> None:
    model = attach(tiny("llama", num_hidden_layers=4), "ist", inner=inner, every=2)
    plain = attach(tiny("llama", num_hidden_layers=4), inner)
    assert {n: p.shape for n, p in trainable_parameters(model).items()} == {
        n.replace(f":{inner}", ":ist").replace(f".{inner}.", ".ist."): p.shape for n, p in trainable_parameters(plain).items()
    }
    courses.run(model, 5)
    assert any(importance(next(iter(attachments(model).values())).parts))


def test_what_it_cannot_do_is_refused() -> None:
    model, _ = ist()
    with pytest.raises(EspalierError, match=r"ist compares losses: give course\.begin a measure="):
        Course(model, 100).begin(10)
    with pytest.raises(EspalierError, match="inner is 'ist', which is itself over another method"):
        attach(tiny("llama"), "ist", inner="ist")
    with pytest.raises(EspalierError, match="no adapter is called 'lorra'; did you mean 'lora'"):
        attach(tiny("llama"), "ist", inner="lorra")
    with pytest.raises(EspalierError, match="trials is 1"):
        attach(tiny("llama"), "ist", trials=1)
    with pytest.raises(EspalierError, match="rank is 0"):
        attach(tiny("llama"), "ist", rank=0)


@pytest.mark.parametrize(("inner", "rank"), [("adalora", 2), ("increlora", 2)])
def test_methods_that_read_gradients_go_without_those_of_layers_that_are_left_out(inner: str, rank: int) -> None:
    model, parts = ist(4, inner=inner, rank=rank)
    seen: list[set[int]] = []
    courses.run(model, 24, lambda step: seen.append(training(parts)))
    assert all(len(some) == 1 for some in seen) and set.union(*seen) == {0, 1, 2, 3}


def test_a_method_that_draws_layers_itself_is_refused() -> None:
    """No layer might be in both draws."""
    with pytest.raises(EspalierError, match="inner is 'lisa', which draws itself what trains in a step"):
        ist(inner="lisa")


def test_what_the_inner_method_calls_the_same_and_means_otherwise_is_its_own() -> None:
    """Steps between comparisons here, steps between choices of entries there."""
    for inner in ("spiel", "masked"):
        method = registry.make("ist", "adapter", inner=inner)
        assert method.every == 10 and method.below.every == registry.make(inner, "adapter").every
        recorded = {h.name: getattr(method, h.name) for h in registry.find("ist").hyperparameters}
        again = registry.make("ist", "adapter", **recorded)
        assert vars(again.below) | {"_given": None} == vars(method.below) | {"_given": None}


def test_what_was_given_counts_also_where_it_is_the_default_here() -> None:
    method = registry.make("ist", "adapter", inner="dora", rank=32)
    assert method.below.rank == 32 and method.below.alpha == registry.make("dora", "adapter").alpha
    target = next(t for t in parameters(tiny("llama")) if t.is_matrix)
    larger = [_with_size(registry.make("ist", "adapter", inner="dora"), rank).count(target) for rank in (31, 32, 33)]
    assert larger == sorted(set(larger))
