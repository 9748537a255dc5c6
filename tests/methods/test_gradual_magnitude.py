"""Gradual magnitude pruning (#106) and the parameters that a run has on average (#202)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from courses import run
from families import tiny, tokens

from espalier import registry
from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.course import Course
from espalier.attach.masked import matrices_of
from espalier.budget.gradual import Gradual, sparsity, steps_of_compute
from espalier.errors import EspalierError
from espalier.train.sparse_laws import Law, Outcome, compute, fit


def pruned(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "gradual-magnitude", name="d", **{"interval": 1, **options})
    return model, attachments(model)["d"]


@pytest.mark.parametrize("fall", ["cubic", "geometric"])
@pytest.mark.parametrize("initial", [0.0, 0.2])
def test_sparsity_rises_from_first_to_last(fall: Any, initial: float) -> None:
    """s_t monotone, equals s_i at t0 and s_f at the end."""
    course = Gradual(100, 10, 70, 5, initial, 0.8, fall)
    found = [course.at(done) for done in range(101)]
    assert found[9] == 0.0 and found[10] == initial and set(found[70:]) == {0.8}
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert [done for done in range(101) if course.prunes(done)] == list(range(10, 71, 5))
    assert all(found[done] == found[done - 1] for done in range(1, 101) if not course.prunes(done))


def test_the_cubic_fall_is_steepest_at_its_start_and_is_the_papers() -> None:
    """s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3; the derivative is largest at the start."""
    rises = [sparsity((k + 1) / 10, 0.1, 0.9) - sparsity(k / 10, 0.1, 0.9) for k in range(10)]
    assert all(a > b for a, b in itertools.pairwise(rises))
    assert sparsity(0.25, 0.1, 0.9) == pytest.approx(0.9 - 0.8 * 0.75**3)


def test_the_geometric_fall_takes_the_same_share_of_what_is_left() -> None:
    left = [1 - sparsity(k / 10, 0.0, 0.6, "geometric") for k in range(11)]
    assert all(b / a == pytest.approx(0.4**0.1) for a, b in itertools.pairwise(left))


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("qwen3_moe", "experts")])
def test_exactly_so_many_live_after_every_pruning(scope: str, family: str, targets: str) -> None:
    """nnz after end == round((1 - s_f) * numel) per layer; those are the largest, and what is pruned stays zero under momentum and decay."""
    model, attachment = pruned(family, targets=targets, scope=scope, sparsity=0.7, begin=0.0, end=0.6, interval=2)
    slots = list(attachment.slots.values())
    course, before = attachment.method.course(10), {id(s): s.live.clone() for s in slots}

    def watch(step: int) -> None:
        density = 1 - course.at(step + 1)
        matrices = [live for s in slots for live in (s.values != 0).view(*matrices_of(s.target))]
        if scope == "matrix":
            assert [int(live.sum()) for live in matrices] == [round(density * live.numel()) for live in matrices]
        else:
            assert sum(int(live.sum()) for live in matrices) == round(density * sum(live.numel() for live in matrices))
        for s in slots:
            assert torch.equal(s.values != 0, s.live) and not bool((s.live & ~before[id(s)]).any())
            before[id(s)] = s.live.clone()

    run(model, 10, watch, optimizer=lambda named, rate: torch.optim.SGD(named.values(), lr=rate, momentum=0.9, weight_decay=0.1))
    if scope == "global":
        assert len({int((s.values != 0).sum()) / s.target.size for s in slots}) > 1


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_the_smallest_go(scope: str) -> None:
    model, attachment = pruned(scope=scope, sparsity=0.5, begin=0.0, end=0.0)
    before = {name: slot.values.detach().abs().clone() for name, slot in attachment.slots.items()}
    course = Course(model, 2)
    course.begin(0)
    course.before_step()
    course.after_step()
    slots = attachment.slots
    gone = [before[n][slots[n].values == 0] for n in slots]
    stay = [before[n][slots[n].values != 0] for n in slots]
    pairs = zip(gone, stay, strict=True) if scope == "matrix" else [(torch.cat(gone), torch.cat(stay))]
    assert all(float(a.max()) <= float(b.min()) for a, b in pairs)


def test_equal_magnitudes_are_counted_out() -> None:
    """A threshold alone would take all of them, or none."""
    for scope in ("matrix", "global"):
        model, attachment = pruned(scope=scope, sparsity=0.3, begin=0.0, end=0.0, targets="attention.k")
        slots = list(attachment.slots.values())
        with torch.no_grad():
            for slot in slots:
                slot.values.copy_(torch.tensor([1.0, -1.0]).repeat(slot.target.inputs // 2).expand(slot.target.shape))
        course = Course(model, 1)
        course.begin(0), course.before_step(), course.after_step()
        course.finish()
        live, sizes = [int(slot.live.sum()) for slot in slots], [slot.target.size for slot in slots]
        assert live == [round(0.7 * size) for size in sizes] if scope == "matrix" else sum(live) == round(0.7 * sum(sizes))


def test_a_weight_that_is_zero_by_chance_may_still_move() -> None:
    """The mask is a mask, not a look at the values: only what was pruned stays."""
    model, attachment = pruned(sparsity=0.5, begin=0.5, end=1.0)
    slot = next(iter(attachment.slots.values()))
    with torch.no_grad():
        slot.values[0] = 0.0
    moved: list[bool] = []
    run(model, 2, lambda step: moved.append(bool((slot.values[0] != 0).any())))
    assert moved[0] and int((slot.values != 0).sum()) == slot.target.size // 2


def test_a_short_run_reaches_its_sparsity_and_one_that_does_not_is_refused() -> None:
    """The run asserts at its end that the budget was reached."""
    model, attachment = pruned(sparsity=0.75, interval=1000)
    run(model, 2)
    assert Course(model, 2).report()["sparsity"] == pytest.approx(0.75, abs=0.001)
    slot = next(iter(attachment.slots.values()))
    with torch.no_grad():
        slot.values.fill_(1.0)
    with pytest.raises(EspalierError, match=r"entries are left where a sparsity of 0\.75 allows"):
        Course(model, 2).finish()


def test_accumulated_micro_batches_prune_as_the_whole_batch_does() -> None:
    found = []
    for pieces in (1, 2):
        model, attachment = pruned(sparsity=0.6, begin=0.0, end=1.0)
        optimizer, course = torch.optim.SGD(trainable_parameters(model).values(), lr=0.05, momentum=0.9), Course(model, 4)
        for step in range(4):
            course.begin(step)
            for micro in tokens(rows=4, seed=step).chunk(pieces):
                (model(micro, labels=micro).loss / pieces).backward()
            course.before_step(), optimizer.step(), course.after_step(), optimizer.zero_grad()
        found.append({name: slot.values.detach().clone() for name, slot in attachment.slots.items()})
    for name, values in found[0].items():
        assert torch.equal(values != 0, found[1][name] != 0)
        torch.testing.assert_close(values, found[1][name], rtol=1e-4, atol=1e-6)


# the parameters that a run has on average


@pytest.mark.parametrize(
    ("steps", "begin", "end", "final", "published"), [(13050, 2500, 8875, 0.4, 0.766), (11200, 2500, 8100, 0.2, 0.893)]
)
def test_the_average_of_a_geometric_course_is_the_published_one(steps: int, begin: int, end: int, final: float, published: float) -> None:
    """Start step 2500, end 8875 of 13050, sparsity 0.4: predicted mean density 0.766, the card says 0.765; a cubic schedule would give 0.726."""
    course = Gradual(steps, begin, end, 1, 0.0, final, "geometric")
    assert course.mean_density() == pytest.approx(published, abs=5e-4)
    window = final / math.log(1 / (1 - final))  # closed form in the window
    assert course.mean_density() == pytest.approx((begin + (end - begin) * window + (steps - end) * (1 - final)) / steps, abs=1e-4)
    if final == 0.4:
        assert Gradual(steps, begin, end, 1, 0.0, final, "cubic").mean_density() == pytest.approx(0.726, abs=1e-3)


def test_the_average_of_a_dense_run_is_n() -> None:
    """N_bar of the dense schedule is N."""
    assert Gradual.of(500, 0.25, 0.75, 10, 0.0, 0.0).mean_density() == 1.0


@pytest.mark.parametrize("fall", ["cubic", "geometric"])
def test_the_average_that_is_reported_is_that_of_the_steps(fall: str) -> None:
    model, attachment = pruned(fall=fall, sparsity=0.8, interval=3)
    size = sum(slot.target.size for slot in attachment.slots.values())
    active = [size]
    course = run(model, 12, lambda step: active.append(sum(int(slot.live.sum()) for slot in attachment.slots.values())))
    found = course.report()
    assert found["prunable"] == size and found["mean_parameters"] == pytest.approx(sum(active[:12]) / 12, rel=1e-3)
    assert found["mean_density"] == pytest.approx(found["mean_parameters"] / size, rel=1e-3)


def test_a_run_of_given_compute_has_so_many_steps() -> None:
    """Given compute C and final density: the T for which 6 * N_bar * D = C."""
    density = Gradual.of(1000, 0.25, 0.75, 1, 0.0, 0.8, "geometric").mean_density()
    C, N, batch = 1e18, 1e8, 5e5
    steps = steps_of_compute(C, N, density, batch)
    assert compute(density * N, steps * batch) <= C < compute(density * N, (steps + 1) * batch)
    assert steps > steps_of_compute(C, N, 1.0, batch)


def test_the_law_sees_a_sparse_run_as_a_dense_one_of_its_average_and_is_found_again() -> None:
    """Final loss of a sparse run equals that of a dense run of equal N_bar and tokens: coefficients come from dense runs alone."""
    law = Law(E=1.8, A=400.0, alpha=0.34, B=600.0, beta=0.3)
    dense = [Outcome(n, d, law.loss(n, d)) for n in (3e5, 1e6, 3e6, 1e7) for d in (1e7, 5e7, 2e8)]
    found = fit(dense)
    mean = 2e6 * Gradual.of(1000, 0.25, 0.75, 1, 0.0, 0.7, "geometric").mean_density()
    assert found.loss(mean, 1e8) == pytest.approx(law.loss(mean, 1e8), rel=1e-4)
    assert (found.alpha, found.beta) == pytest.approx((law.alpha, law.beta), rel=0.02)
    with pytest.raises(EspalierError, match="4 runs do not determine the law"):
        fit(dense[:4])
    with pytest.raises(EspalierError, match=r"a run has -1\.0; its parameters, its tokens and its loss must be more than 0"):
        fit([*dense, Outcome(1e6, 1e6, -1.0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0"), ({"initial_sparsity": 0.9}, "initial_sparsity is 0.9"), ({"end": 0.1}, "end is 0.1"),
        ({"begin": -0.5}, "begin is -0.5"), ({"interval": 0}, "interval is 0"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EspalierError, match=message):
        registry.make("gradual-magnitude", "adapter", **options)
