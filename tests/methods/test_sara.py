"""SaRA (#140): the smallest entries train, under a nuclear norm, and those that grew stand still in the second half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from courses import run
from families import tiny, tokens

from espalier import apply, registry
from espalier.attach.attachment import attach, attachments, stored, trainable_parameters
from espalier.attach.course import Course
from espalier.attach.load import load_model
from espalier.attach.method import Moment
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.safetensors_file import tensor_bytes
from espalier.exchange.save import save
from espalier.memory.joined_optimizer import build
from espalier.select.sara import nuclear_subgradient


def sara(**options: Any) -> tuple[torch.nn.Module, list[Any]]:
    model = attach(tiny("llama"), "sara", name="d", **options)
    return model, attachments(model)["d"].parts


@pytest.mark.parametrize("scope", ["matrix", "model"])
def test_the_support_is_exactly_the_share_with_the_smallest_magnitudes(scope: str) -> None:
    """A quantile per tensor, where one global tau would give very uneven shares."""
    model, parts = sara(scope=scope, density=0.2)
    assert sum(len(p.index) for p in parts) == sum(p.method.count(p.target) for p in parts)
    weights = [stored(model, p.target.name).flatten().abs() for p in parts]
    inside = [w[p.index.long()] for w, p in zip(weights, parts, strict=True)]
    outside = [w.scatter(0, p.index.long(), 9.0) for w, p in zip(weights, parts, strict=True)]
    if scope == "matrix":
        assert all(i.max() <= o.min() and len(i) == round(0.2 * p.target.size) for i, o, p in zip(inside, outside, parts, strict=True))
        return
    assert torch.cat(inside).max() <= torch.cat(outside).min()
    shares = {len(p.index) / p.target.size for p in parts}
    assert len(shares) > 3


def test_entries_outside_omega_are_bit_identical_at_the_end_and_the_file_reproduces_the_tuned_weights(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model = attach(load_model(tmp_path / "base"), "sara", name="d")
    parts = attachments(model)["d"].parts
    run(model, 6, optimizer=registry.make("adamw", "optimizer", weight_decay=0.1).build)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    apply(str(tmp_path / "base"), [str(tmp_path / "delta")], str(tmp_path / "out"), quiet=True)
    found, base = ModelDirectory(tmp_path / "out"), ModelDirectory(tmp_path / "base")
    for part in parts:
        old, new = base.read(part.target.name), found.read(part.target.name)
        outside = torch.ones(old.numel(), dtype=torch.bool)
        outside[part.index.long()] = False
        assert torch.equal(old.flatten()[outside], new.flatten()[outside]) and not torch.equal(old, new)
        with torch.no_grad():
            assert bytes(tensor_bytes(new)) == bytes(tensor_bytes(part.update().apply(old)))


def test_the_subgradient_pairs_with_the_matrix_to_its_nuclear_norm() -> None:
    """<G, P o M> = ||P o M||_*, and no entry of G is from a direction that the matrix does not have."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(12, 9, generator=generator) * (torch.rand(12, 9, generator=generator) < 0.2)
    for P in (full, full[:, :3] @ full[:3], torch.zeros(4, 5)):
        G = nuclear_subgradient(P)
        torch.testing.assert_close((G * P).sum(), torch.linalg.matrix_norm(P, "nuc"), rtol=1e-5, atol=1e-6)
        assert float(torch.linalg.matrix_norm(G, 2)) < 1 + 1e-5


def test_every_step_adds_the_subgradient_to_one_matrix_that_the_seed_draws() -> None:
    model, parts = sara(nuclear=0.5)
    drawn = []
    for seed in (0, 0, 1):
        model, parts = sara(nuclear=0.5, seed=seed)
        course, touched = Course(model, 40), []
        for step in range(12):
            course.begin(step)
            for part in parts:
                part.values.grad = torch.zeros_like(part.values)
            course.before_step()
            some = [p for p in parts if p.values.grad.any()]
            assert len(some) == 1
            P = torch.zeros(some[0].target.size).scatter(0, some[0].index.long(), stored(model, some[0].target.name).flatten()[some[0].index.long()])
            expected = 0.5 * nuclear_subgradient(P.view(some[0].target.shape)).flatten()[some[0].index.long()]
            torch.testing.assert_close(some[0].values.grad, expected, rtol=1e-4, atol=1e-6)
            touched.append(some[0].target.name)
            course.after_step()
        drawn.append(touched)
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 3


def test_the_penalty_lowers_the_nuclear_norm() -> None:
    norms = []
    for nuclear in (0.0, 0.1):
        model, parts = sara(nuclear=nuclear, density=0.5, targets="mlp.down")
        run(model, 30)
        P = [torch.zeros(p.target.size).scatter(0, p.index.long(), p.method.now(p).detach()).view(p.target.shape) for p in parts]
        norms.append(sum(float(torch.linalg.matrix_norm(one, "nuc")) for one in P))
    assert norms[1] < norms[0]


def test_in_the_second_half_what_grew_stands_still_and_the_rest_goes_on_with_a_fresh_optimizer() -> None:
    """Omega' is the intersection, not all small weights; the step at the switch is not skipped."""
    model, parts = sara()
    optimizer, course = build(registry.make("adamw", "optimizer").build, trainable_parameters(model), 0.02, {}), Course(model, 8)
    for step in range(8):
        course.begin(step, 0.02, optimizer)
        x = tokens(seed=step)
        model(x, labels=x).loss.backward()
        before = [p.values.detach().clone() for p in parts]
        course.before_step()
        optimizer.step()
        course.after_step()
        optimizer.zero_grad()
        for part, was in zip(parts, before, strict=True):
            assert bool((part.values != was).any())
            if step < 3:
                assert not part.still.any() and optimizer.state[part.values]["step"] == step + 1
            if step == 3:
                assert part.values not in optimizer.state
                assert torch.equal(part.still, part.method.now(part).abs() > part.threshold) and 0 < int(part.still.sum()) < len(part.still)
                part.stood = part.values[part.still].detach().clone()
            if step > 3:
                assert torch.equal(part.values[part.still], part.stood) and optimizer.state[part.values]["step"] == step - 3
                assert bool((part.values != was)[~part.still].float().mean() > 0.9)


def test_an_entry_keeps_its_sign() -> None:
    """One official optimizer writes |w| in the place of w at the start."""
    model, parts = sara()
    before = tiny("llama")
    assert torch.equal(model(tokens()).logits, before(tokens()).logits)
    assert all(torch.equal(p.start, before.get_parameter(p.target.name).flatten()[p.index.long()]) and bool((p.start < 0).any()) for p in parts)


def test_one_threshold_for_the_model_is_one_at_the_switch_too() -> None:
    """Omega' = Omega and |W'| < tau: a matrix whose entries were all far below tau may grow up to it."""
    model = tiny("llama")
    small = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    with torch.no_grad():
        small.mul_(1e-3)
    attach(model, "sara", name="d", targets="mlp", scope="model", density=0.4, switch=0.5)
    parts = attachments(model)["d"].parts
    (part,) = (p for p in parts if p.target.name == "model.layers.0.mlp.down_proj.weight")
    tau = max(float(p.threshold.max()) for p in parts)
    assert len(part.values) == part.target.size and float(part.threshold) < tau / 10
    with torch.no_grad():
        part.values[0], part.values[1] = tau / 2, 2 * tau
    part.method.reselect(parts, Moment(3, 8))
    assert part.still.nonzero().flatten().tolist() == [1]
