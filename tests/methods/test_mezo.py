"""MeZO (arXiv:2305.17333): estimates of the gradient from losses alone."""

from __future__ import annotations

import copy
import itertools
import json
import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FUNCTIONS, save_model, tiny

from espalier import registry
from espalier.attach.attachment import attach, trainable_parameters
from espalier.attach.course import Course
from espalier.checkpoint.safetensors_file import read_safetensors
from espalier.data.batches import Cursor
from espalier.errors import EspalierError, NotFiniteError
from espalier.memory.joined_optimizer import build
from espalier.memory.zeroth_order import ZerothOrder
from espalier.optim.mezo import MeZO
from espalier.train import checkpoint, steps
from espalier.verbs.tune import tune

SHAPES = {"model.layers.0.mlp.up_proj.weight": (24, 16), "model.norm.weight": (16,)}
Tensors = dict[str, torch.nn.Parameter]


def parameters() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def mezo(tensors: Tensors, rate: float = 0.01, state: str = "fp32", **options: Any) -> ZerothOrder:
    made = registry.make("mezo", "optimizer", **options)
    made.state = state
    built: ZerothOrder = made.build(tensors, rate)
    return built


def bowl(tensors: Tensors) -> Callable[[], torch.Tensor]:
    """A quadratic with its lowest place at 1."""
    return lambda: sum(((p - 1) ** 2).sum() for p in tensors.values()) / 2  # type: ignore[return-value]


def test_the_estimate_is_the_gradient_on_average_and_its_slopes_have_the_gradients_norm() -> None:
    """E[z z^T g] = g, with a variance of (|g|^2 + g_i^2) / n of the mean of n; in a quadratic the error in eps^2 is none."""
    tensors, count = parameters(), 1000
    gradient = torch.cat([(p.detach() - 1).flatten() for p in tensors.values()])
    optimizer = mezo(tensors, 1.0, samples=count, perturbation=1e-2)
    before = torch.cat([p.detach().flatten() for p in tensors.values()])
    optimizer.step(bowl(tensors))
    estimate = before - torch.cat([p.detach().flatten() for p in tensors.values()])
    deviations = (estimate - gradient) / ((gradient.norm() ** 2 + gradient**2) / count).sqrt()
    assert float(deviations.square().mean()) == pytest.approx(1, abs=0.25) and float(deviations.abs().max()) < 4.5
    assert optimizer.slope == pytest.approx(float(gradient.norm()), rel=0.1)


def test_taking_a_perturbation_back_leaves_what_float32_rounds() -> None:
    tensors = parameters()
    before, eps = {n: p.detach().clone() for n, p in tensors.items()}, 1e-3
    optimizer, seen = mezo(tensors, 0.0, samples=5, perturbation=eps), []

    def closure() -> torch.Tensor:
        seen.append({n: (p.detach() - before[n]).abs() for n, p in tensors.items()})
        return bowl(tensors)()

    optimizer.step(closure)
    assert len(seen) == 10 and all(bool((s[n] > 0).float().mean() > 0.99) for s in seen for n in s)
    for n, p in tensors.items():
        largest = torch.stack([s[n] for s in seen]).amax(0)
        assert bool(((p.detach() - before[n]).abs() <= 5 * 3 * (before[n].abs() + 2 * largest) * 2**-24).all())


def test_both_sides_are_the_same_way_from_where_the_parameters_are() -> None:
    tensors = parameters()
    before, seen = {n: p.detach().clone() for n, p in tensors.items()}, []

    def closure() -> torch.Tensor:
        seen.append({n: p.detach() - before[n] for n, p in tensors.items()})
        return bowl(tensors)()

    mezo(tensors, perturbation=0.5, samples=2).step(closure)
    for n in tensors:
        assert torch.allclose(seen[0][n], -seen[1][n], atol=1e-5) and torch.allclose(seen[2][n], -seen[3][n], atol=1e-5)
        assert not torch.allclose(seen[0][n], seen[2][n], atol=0.1)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_several_steps_are_those_of_the_papers_equation_in_float64(rule: str) -> None:
    """``w <- w - lr (g z + decay w)`` with g the slope, z that of the generator; the mean of ``g z`` over samples, or what Adam makes of it."""
    tensors, eps, samples = parameters(), 0.1, 2
    optimizer = mezo(tensors, 0.01, perturbation=eps, samples=samples, weight_decay=0.5, rule=rule, beta1=0.8, beta2=0.9, epsilon=0.1)
    expected = {n: p.detach().double() for n, p in tensors.items()}
    mean, square = ({n: torch.zeros_like(w) for n, w in expected.items()} for _ in range(2))
    before: dict[str, torch.Tensor] = {}
    seen: list[dict[str, torch.Tensor]] = []

    def loss(at: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return sum(((w.double() - 1) ** 2 + 0.1 * (w.double() - 1) ** 3).sum() for w in at.values()) / 2  # type: ignore[return-value]

    def closure() -> torch.Tensor:
        seen.append({n: (p.detach() - before[n]).double() / eps for n, p in tensors.items()})
        return loss(tensors)

    for step in range(1, 7):
        before.update({n: p.detach().clone() for n, p in tensors.items()})
        optimizer.step(closure)
        directions = seen[-2 * samples :: 2]
        slopes = [(loss({n: w + eps * z[n] for n, w in expected.items()}) - loss({n: w - eps * z[n] for n, w in expected.items()})) / (2 * eps) for z in directions]
        for n, w in expected.items():
            d = sum(slope * z[n] for slope, z in zip(slopes, directions, strict=True)) / samples
            if rule == "adamw":
                mean[n] = 0.8 * mean[n] + 0.2 * d
                square[n] = 0.9 * square[n] + 0.1 * d**2
                d = mean[n] / (1 - 0.8**step) / ((square[n] / (1 - 0.9**step)).sqrt() + 0.1)
            expected[n] = w * (1 - 0.01 * 0.5 if w.ndim > 1 else 1) - 0.01 * d
    assert len(seen) == 6 * 2 * samples
    for n, p in tensors.items():
        torch.testing.assert_close(p.detach().double(), expected[n], rtol=0, atol=1e-4)
        assert all(abs(float(torch.corrcoef(torch.stack((one[n].flatten(), other[n].flatten())))[0, 1])) < 0.9 for one, other in itertools.combinations(seen[::2], 2))


def test_the_defaults_that_it_names_are_those_of_adamw_below_it() -> None:
    made = registry.make("mezo", "optimizer", rule="adamw")
    assert (made.beta1, made.beta2, made.epsilon) == (made.inner.beta1, made.inner.beta2, made.inner.epsilon)


@pytest.mark.parametrize("rule", ["sgd", "adamw", "lion"])
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_saved_and_loaded_it_goes_on_to_the_same_bits(rule: str, state: str, tmp_path: Path) -> None:
    straight, broken = parameters(), parameters()
    one, two = (mezo(tensors, 1e-3, state, rule=rule, samples=2) for tensors in (straight, broken))
    for number in range(6):
        one.step(bowl(straight))
        if number == 3:
            checkpoint.save(tmp_path, broken, two, checkpoint.State(3, Cursor(), 0, 0.0))
            broken = {n: torch.nn.Parameter(torch.zeros_like(p)) for n, p in broken.items()}
            two = mezo(broken, 1e-3, state, rule=rule, samples=2)
            checkpoint.load(checkpoint.steps(tmp_path)[-1], broken, two)
        two.step(bowl(broken))
    assert all(torch.equal(straight[n], broken[n]) for n in straight)


def test_a_quadratic_goes_down_and_two_runs_are_the_same() -> None:
    tensors, other = parameters(), parameters()
    begin = float(bowl(tensors)().detach())
    for some in (tensors, other):
        optimizer = mezo(some, 3e-3)
        for _ in range(150):
            optimizer.step(bowl(some))
    # a step of 1 / (numbers + 2) takes one part of that off
    assert float(bowl(tensors)().detach()) < 0.8 * begin
    assert all(torch.equal(tensors[n], other[n]) for n in tensors)


def test_another_seed_looks_along_other_directions() -> None:
    def after(seed: int) -> torch.Tensor:
        tensors = parameters()
        optimizer = mezo(tensors)
        optimizer.rule.seed = seed
        optimizer.step(bowl(tensors))
        return torch.cat([p.detach().flatten() for p in tensors.values()])

    assert torch.equal(after(1), after(1)) and not torch.equal(after(1), after(2))


def test_sgd_has_no_state_and_a_rule_has_its_own() -> None:
    for rule, numbers in (("sgd", 0), ("lion", 1), ("adamw", 2)):
        tensors = parameters()
        optimizer = mezo(tensors, rule=rule)
        optimizer.step(bowl(tensors))
        kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
        assert kept == optimizer.rule.state_bytes({n: tuple(p.shape) for n, p in tensors.items()}) == 4 * numbers * sum(p.numel() for p in tensors.values())


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    tensors = parameters()
    before = copy.deepcopy(tensors)
    optimizer = mezo(tensors)
    assert math.isnan(float(optimizer.step(lambda: torch.tensor(math.nan))))
    assert all(torch.allclose(tensors[n], before[n], atol=1e-6) for n in tensors) and not optimizer.state


def test_a_parameter_that_needs_no_gradient_is_neither_perturbed_nor_moved() -> None:
    tensors = parameters()
    still = tensors["model.norm.weight"].requires_grad_(False)
    before = still.clone()

    def closure() -> torch.Tensor:
        assert torch.equal(still, before)
        return bowl(tensors)()

    mezo(tensors, weight_decay=0.1).step(closure)
    assert torch.equal(still, before)


def test_parts_with_options_of_their_own_each_look_along_their_own_directions() -> None:
    tensors = parameters()
    optimizer = build(registry.make("mezo", "optimizer").build, tensors, 2e-3, {"model.norm.weight": {"rate": 4.0}})
    begin = float(bowl(tensors)().detach())
    for _ in range(60):
        optimizer.step(bowl(tensors))  # type: ignore[arg-type]
    assert float(bowl(tensors)().detach()) < 0.9 * begin


def test_parts_that_take_turns_and_lose_their_state_get_new_directions_each_time() -> None:
    """As LISA's blocks do, where nothing trains always."""
    model = attach(tiny("llama"), "lisa", targets="attention", layers=1, every=1)
    course, tensors, moved = Course(model, 24), trainable_parameters(model), []
    optimizer = mezo(tensors, 1.0)
    for step in range(24):
        course.begin(step, 1.0, optimizer)
        before = {n: p.detach().clone() for n, p in tensors.items()}
        optimizer.step(lambda: sum((p.double() ** 2).sum() for p in tensors.values()))
        changes = {n: p.detach() - before[n] for n, p in tensors.items() if not torch.equal(p, before[n])}
        moved.append({n: c.flatten() / c.norm() for n, c in changes.items()})
    assert len({frozenset(m) for m in moved}) == 2
    for number, one in enumerate(moved):
        for other in moved[:number]:
            assert all(abs(float(one[n] @ other[n])) < 0.5 for n in one.keys() & other.keys())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"perturbation": 0.0}, "perturbation is 0"), ({"samples": 0}, "samples is 0"), ({"rule": "galore"}, "rule is galore"), ({"rule": "mezo"}, "rule is mezo")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EspalierError, match=words):
        registry.make("mezo", "optimizer", **options)


def test_without_a_closure_it_says_what_it_needs() -> None:
    with pytest.raises(EspalierError, match="give step a closure"):
        mezo(parameters()).step()


# -- in tune


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("mezo") / "model")
    (folder.parent / "text.txt").write_text(FUNCTIONS)
    return folder


def run(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings = {
        "steps": 30, "batch_size": 2, "sequence_length": 32, "learning_rate": 1e-3, "optimizer": "mezo", "clip": 0, "warmup": 0.0, "schedule": "constant",
        "targets": "norm", "method": "full", "quiet": True,
    }  # fmt: skip
    data = options.pop("data", str(model.parent / "text.txt"))
    return tune(str(model), data, str(out), **{**settings, **options})


def test_the_loss_of_a_model_falls_with_every_gradient_off(model: Path, tmp_path: Path) -> None:
    text = str(model.parent / "text.txt")
    result = run(Path("seedling"), tmp_path / "out", data=text, steps=30, samples=2, learning_rate=1e-2, eval_data=[text])
    scores = result["evaluation"][text]
    assert scores["after"]["loss"] < scores["before"]["loss"] - 0.1


@pytest.mark.parametrize(("method", "options"), [("lora", {"dropout": 0.2, "learning_rate": 1e-2, "targets": "linear"}), ("full", {"micro_batch_size": 1}), ("sora", {"targets": "linear"})])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(method: str, options: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    given = {"steps": 6, "checkpoint_every": 2, "method": method, **options}
    run(model, straight, **given)
    true, count = steps.run_batch, [0]

    def stops(*arguments: Any, **more: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] > 9 * (2 if "micro_batch_size" in options else 1):
            raise KeyboardInterrupt
        return true(*arguments, **more)

    monkeypatch.setattr(steps, "run_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        run(model, cut, **given)
    monkeypatch.setattr(steps, "run_batch", true)
    run(model, cut, **given, resume=True)
    one, two = (read_safetensors(out / "delta.safetensors") for out in (straight, cut))
    assert all(torch.equal(one[n], two[n]) for n in one)
    losses = [json.loads(line)["loss"] for line in (cut / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6


def test_what_a_step_holds_does_not_grow_with_the_depth_of_the_model_and_has_no_gradients() -> None:
    from families import config

    from espalier.plan.trace import Gradients, trace_step

    def peak(layers: int, gradients: Gradients, method: str) -> int:
        options = {"dtype": torch.float32, "tokens": 256, "sequence_length": 64, "recompute": False, "chunk": 64}
        return trace_step(config("llama", num_hidden_layers=layers), registry.make(method, "adapter"), {"targets": "all" if method == "full" else "linear"}, gradients=gradients, **options).peak  # type: ignore[arg-type]

    for method in ("full", "lora"):
        assert peak(2, "none", method) == peak(8, "none", method) < 0.5 * peak(2, "all", method) < 0.5 * peak(8, "all", method)


def test_what_needs_gradients_is_refused_before_anything_is_loaded(model: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"clip": 1.0}, "give --clip 0"),
        ({"method": "adalora", "targets": "linear"}, "adalora, which looks at the gradients"),
        ({"update_in_backward": True}, "mezo has no backward pass"),
        ({"method": "masked", "score": "gradient", "every": 2, "targets": "linear"}, "mezo has no gradients, by which masked --every 2 chooses anew"),
    ):
        with pytest.raises(EspalierError, match=words):
            run(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_loss_is_not_finite_stops(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="stopped at step"):
        run(model, tmp_path / "out", learning_rate=1e30)


def test_however_many_directions_a_step_looks_along_it_holds_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = parameters()
    optimizer = mezo(tensors, samples=8)
    drawn: list[weakref.ref[torch.Tensor]] = []
    most = 0
    draw = ZerothOrder._direction

    def watched(self: ZerothOrder, *where: Any) -> torch.Tensor:
        nonlocal most
        found = draw(self, *where)
        drawn.append(weakref.ref(found))
        most = max(most, sum(one() is not None for one in drawn))
        return found

    monkeypatch.setattr(ZerothOrder, "_direction", watched)
    optimizer.step(bowl(tensors))
    assert len(drawn) == 8 * 4 and 4 * most <= MeZO.working  # bytes a number, which are planned
