"""What every optimizer keeps to: its equations, its state, and what it says of itself."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from espalier import registry
from espalier.attach.method import Renewed
from espalier.data.batches import Cursor
from espalier.errors import EspalierError
from espalier.kernels.codes import codebook
from espalier.memory import stored_state
from espalier.memory.rule import BUCKET, Rule
from espalier.train import checkpoint

ALL = [info.name for info in registry.methods() if info.role == "optimizer"]
METHODS = [name for name in ALL if not getattr(registry.load(registry.find(name, "optimizer")), "zeroth_order", False)]
"""Those that are given gradients; the others are in ``tests/methods/test_mezo.py``."""
TORCHS = ("adafactor", "muon")
"""They keep their state in float32 alone."""
OURS = [name for name in METHODS if name not in TORCHS]
SMALL: dict[str, dict[str, Any]] = {
    name: {"rank": 4, "every": 3} for name in ("galore", "fira", "natural-galore", "gradnorm-lorp")
} | {"frugal": {"every": 3}}
"""Hyperparameters for matrices of a few numbers."""
SHAPES = {
    "model.embed_tokens.weight": (40, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16), "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24), "model.layers.0.input_layernorm.weight": (16,),
}  # fmt: skip


def parameters(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def pull(tensors: dict[str, torch.nn.Parameter], step: int, along: float = 0.1) -> None:
    """Gradients of a step, from nothing but its number, and a part along the weights."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in tensors.values():
        p.grad = (torch.randn(p.shape, generator=generator) + along * p.detach()).to(p.dtype)


def make(name: str, state: str = "fp32", **options: Any) -> Rule:
    made: Rule = registry.make(name, "optimizer", **{**SMALL.get(name, {}), **options})
    made.state = state  # type: ignore[assignment]
    made.check()
    return made


def run(name: str, steps: int = 10, state: str = "fp32", tensors: dict[str, torch.nn.Parameter] | None = None, **options: Any) -> dict[str, torch.nn.Parameter]:
    tensors = tensors or parameters()
    optimizer = make(name, state, **options).build(tensors, 0.01)
    for step in range(steps):
        pull(tensors, step)
        optimizer.step()
    return tensors


# -- the equations, in float64, number by number


Reference = Callable[[torch.Tensor, list[torch.Tensor], dict[str, Any]], torch.Tensor]


def adam(g: torch.Tensor, s: dict[str, Any], b1: float, b2: float, eps: float) -> torch.Tensor:
    s["t"] = s.get("t", 0) + 1
    s["m"] = b1 * s.get("m", torch.zeros_like(g)) + (1 - b1) * g
    s["v"] = b2 * s.get("v", torch.zeros_like(g)) + (1 - b2) * g * g
    return (s["m"] / (1 - b1 ** s["t"])) / ((s["v"] / (1 - b2 ** s["t"])).sqrt() + eps)


def adabelief(g: torch.Tensor, s: dict[str, Any], b1: float, b2: float, eps: float) -> torch.Tensor:
    s["t"] = s.get("t", 0) + 1
    s["m"] = b1 * s.get("m", torch.zeros_like(g)) + (1 - b1) * g
    s["v"] = b2 * s.get("v", torch.zeros_like(g)) + (1 - b2) * (g - s["m"]) ** 2 + eps
    return (s["m"] / (1 - b1 ** s["t"])) / ((s["v"] / (1 - b2 ** s["t"])).sqrt() + eps)


def adafactor(w: torch.Tensor, g: torch.Tensor, s: dict[str, Any], exponent: float, threshold: float) -> torch.Tensor:
    """The direction for a rate of 0.01, divided by it."""
    s["t"] = s.get("t", 0) + 1
    one_minus, squares = s["t"] ** -exponent, g * g
    if g.ndim > 1:
        s["R"] = (1 - one_minus) * s.get("R", 0.0) + one_minus * squares.mean(1)
        s["C"] = (1 - one_minus) * s.get("C", 0.0) + one_minus * squares.mean(0)
        v = torch.outer(s["R"], s["C"]) / s["R"].mean()
    else:
        v = s["v"] = (1 - one_minus) * s.get("v", torch.zeros_like(g)) + one_minus * squares
    u = g / v.sqrt()
    u = u / max(1.0, float(u.square().mean().sqrt()) / threshold)
    return min(0.01, s["t"] ** -0.5) / 0.01 * max(1e-3, float(w.square().mean().sqrt())) * u


def lion(g: torch.Tensor, s: dict[str, Any], b1: float, b2: float) -> torch.Tensor:
    m = s.get("m", torch.zeros_like(g))
    s["m"] = b2 * m + (1 - b2) * g
    return (b1 * m + (1 - b1) * g).sign()


def perpendicular(w: torch.Tensor, g: torch.Tensor, most: float) -> torch.Tensor:
    left = g - (w * g).sum() / (w * w).sum() * w
    return left * min(float(g.norm() / left.norm()), most)


def reference(
    name: str, weight: torch.Tensor, gradients: list[torch.Tensor], is_matrix: bool, rank: int, every: int, columns: list[torch.Tensor | None]
) -> torch.Tensor:
    """A weight after these gradients, rate 0.01, decay 0.1 for matrices, by the equations.

    Args:
        columns: those of each step that have state, where the optimizer draws them.
    """
    w, s, lengths = weight.double(), {}, {}
    project: Any = None
    for step, gradient in enumerate(gradients):
        g = gradient.double()
        if w.ndim == 2:
            decay = 1 - 0.01 * 0.1
        else:
            decay = 1.0
        if name == "perpgrad" and w.ndim == 2:
            g = perpendicular(w, g, 2.5)
        if name in ("adamw", "adabelief", "lion", "adafactor", "perpgrad") or not is_matrix:
            match name:
                case "adafactor":
                    d = adafactor(w, g, s, 0.8, 1.0)
                case "adabelief":
                    d = adabelief(g, s, 0.9, 0.999, 1e-16)
                case "lion":
                    d = lion(g, s, 0.95, 0.98)
                case "adamw":
                    d = adam(g, s, 0.9, 0.95, 1e-8)
                case "perpgrad":
                    d = adam(g, s, 0.9, 0.99, 1e-8)
                case "frugal":
                    d = adam(g, s, 0.9, 0.999, 1e-8)
                case _:
                    d = adam(g, s, 0.9, 0.999, 1e-6)
            w = decay * w - 0.01 * d
            continue
        if name == "frugal":
            if step % every == 0:
                s.clear()
            d = 0.5 * g.sign()
            d[:, columns[step]] = adam(g[:, columns[step]], s, 0.9, 0.999, 1e-8)
            w = decay * w - 0.01 * d
            continue
        right = g.shape[0] >= g.shape[1]
        units = w / w.norm(dim=1, keepdim=True)
        grad_lengths, length = (g * units).sum(1), w.norm(dim=1)
        seen = g - units * grad_lengths[:, None] if name == "gradnorm-lorp" else g
        if step % every == 0:
            u, _, vh = torch.linalg.svd(seen, full_matrices=False)
            project = vh[:rank].T @ vh[:rank] if right else u[:, :rank] @ u[:, :rank].T
            basis = vh[:rank].T if right else u[:, :rank]
            signs = torch.where(basis.gather(0, basis.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
            basis = basis * signs
            s.pop("q", None)
        r = seen @ basis if right else basis.T @ seen
        rest = seen - (seen @ project if right else project @ seen)
        if name == "natural-galore":
            s["q"] = [*s.get("q", [])[-3:], r.flatten()]
            q = torch.stack(s["q"], 1)
            r = torch.linalg.solve(1e-3 * torch.eye(len(q), dtype=torch.float64) + q @ q.T, r.flatten()).view(r.shape)
        d = adam(r, s, 0.9, 0.999, 1e-6)
        back = 0.25 * (d @ basis.T if right else basis @ d)
        if name == "fira":
            short = 1 if right else 0
            scaled = rest * (d.norm(dim=short, keepdim=True) / (r.norm(dim=short, keepdim=True) + 1e-8))
            norm = scaled.norm()
            if "n" in s and norm > 1.01 * s["n"]:
                scaled, norm = scaled * (1.01 * s["n"] / norm), 1.01 * s["n"]
            s["n"] = norm
            back = back + scaled
        w = decay * w - 0.01 * back
        if name == "gradnorm-lorp":
            length = decay * length - 0.01 * adam(grad_lengths, lengths, 0.9, 0.999, 1e-6)
            w = length[:, None] * w / w.norm(dim=1, keepdim=True)
    return w


EQUATIONS: dict[str, dict[str, Any]] = {
    "adamw": {}, "adabelief": {}, "lion": {}, "adafactor": {}, "frugal": {"density": 0.25, "rest_scale": 0.5}, "perpgrad": {"most": 2.5},
} | {name: {"staggered": False} for name in ("galore", "fira", "natural-galore", "gradnorm-lorp")}  # fmt: skip
"""Options of those that :func:`reference` knows."""


def test_every_optimizer_with_gradients_but_muon_is_held_against_its_equations() -> None:
    assert set(EQUATIONS) == {*METHODS} - {"muon"}


@pytest.mark.parametrize("name", EQUATIONS)
def test_ten_steps_are_those_of_the_equations_in_float64(name: str) -> None:
    tensors, before = parameters(), parameters()
    optimizer = make(name, weight_decay=0.1, **EQUATIONS[name]).build(tensors, 0.01)
    gradients: dict[str, list[torch.Tensor]] = {n: [] for n in tensors}
    columns: dict[str, list[torch.Tensor | None]] = {n: [] for n in tensors}
    for step in range(10):
        pull(tensors, step, along=step % 4 if name == "perpgrad" else 0.1)  # what is left is lengthened by 1 to 3
        for n, p in tensors.items():
            gradients[n].append(p.grad.clone())  # type: ignore[union-attr]
        optimizer.step()
        for n, p in tensors.items():
            columns[n].append(optimizer.state[p].get("basis"))
    for n, p in tensors.items():
        is_matrix = "layers" in n and p.ndim == 2
        if name == "frugal" and is_matrix:
            drawn = [frozenset(c.tolist()) for c in columns[n] if c is not None]
            assert [len(d) for d in drawn] == [p.shape[1] // 4] * 10 and drawn == [drawn[step - step % 3] for step in range(10)] and len(set(drawn)) == 4
        expected = reference(name, before[n].detach(), gradients[n], is_matrix, 4, 3, columns[n])
        worst = float((p.detach().double() - expected).abs().max())
        # Adam divides by roots of what is nearly nothing along singular vectors that float32 knows to 1e-6
        assert worst < (2e-4 if name == "natural-galore" else 2e-5), (n, worst)


# -- state


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_it_goes_on_to_the_same_bits(name: str, tmp_path: Any) -> None:
    for state in ("fp32", *(("bf16", "8bit") if name not in TORCHS else ())):
        shapes = {**SHAPES, "model.layers.0.mlp.gate_proj.weight": (80, 64)}  # large enough for 8 bits
        straight, broken = parameters(shapes=shapes), parameters(shapes=shapes)
        one = make(name, state).build(straight, 0.01)
        two = make(name, state).build(broken, 0.01)
        for step in range(7):
            pull(straight, step)
            one.step()
            if step == 4:
                checkpoint.save(tmp_path / state, broken, two, checkpoint.State(4, Cursor(), 0, 0.0))
                broken = parameters(5, shapes)
                two = make(name, state).build(broken, 0.01)
                checkpoint.load(checkpoint.steps(tmp_path / state)[-1], broken, two)
            pull(broken, step)
            two.step()
        assert all(torch.equal(straight[n], broken[n]) for n in straight), state


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_dict_goes_on_to_the_same_bits_alone_and_joined(name: str, dtype: torch.dtype) -> None:
    from espalier.memory.joined_optimizer import build

    shapes = {**SHAPES, "model.layers.0.mlp.gate_proj.weight": (80, 64)}
    for state, options in itertools.product(("fp32", *(("bf16", "8bit") if name not in TORCHS else ())), ({}, {"model.embed_tokens.weight": {"rate": 2.0}})):
        straight = {n: torch.nn.Parameter(p.detach().to(dtype)) for n, p in parameters(shapes=shapes).items()}
        broken = {n: torch.nn.Parameter(p.detach().clone()) for n, p in straight.items()}
        one, two = (build(make(name, state).build, tensors, 0.01, options) for tensors in (straight, broken))
        for step in range(7):
            for tensors, optimizer in ((straight, one), (broken, two)):
                pull(tensors, step)
                optimizer.step()
            if step == 4:
                saved = copy.deepcopy(two.state_dict())
                two = build(make(name, state).build, broken, 0.01, options)
                two.load_state_dict(saved)
        assert all(torch.equal(straight[n], broken[n]) for n in straight), (state, options)


def test_what_is_worked_on_at_once_is_bounded_by_the_matrices_and_not_by_what_is_seen_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.memory.rule.BUCKET", 64 * 64)
    tensors = parameters(shapes={f"model.layers.{i}.mlp.up_proj.weight": (64, 64) for i in range(5)})
    optimizer, sizes = make("galore").build(tensors, 0.01), []
    move = optimizer._move  # type: ignore[attr-defined]
    monkeypatch.setattr(optimizer, "_move", lambda pairs, group: (sizes.append(sum(w.numel() for w, _ in pairs)), move(pairs, group)))
    pull(tensors, 0)
    optimizer.step()
    assert sizes == [64 * 64] * 5


def test_the_bytes_of_frugal_in_blocks_are_those_of_its_share_of_them() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (24, 16) for i in range(8)}
    tensors, rule = parameters(shapes=shapes), make("frugal", split="blocks")
    optimizer = rule.build(tensors, 0.01)
    pull(tensors, 0)
    optimizer.step()
    kept = sum(t.numel() * 4 for s in optimizer.state.values() for key, t in s.items() if key.startswith("exp"))
    assert kept == rule.state_bytes(shapes) == 2 * 2 * 4 * 24 * 16


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit"])
def test_its_state_has_the_bytes_that_it_says(name: str, state: str) -> None:
    if name in TORCHS and state != "fp32":
        with pytest.raises(EspalierError, match="state is"):
            make(name, state)
        return
    shapes = {**SHAPES, "model.layers.0.mlp.gate_proj.weight": (4096, 16)}  # so tall that lengths of its rows are stored as the slots are
    tensors, rule = parameters(shapes=shapes), make(name, state, **({"every": 100} if name in SMALL else {}))
    optimizer = rule.build(tensors, 0.01)
    for step in range(6):
        pull(tensors, step)
        optimizer.step()
    kept = [t for s in optimizer.state.values() for key, t in s.items() if isinstance(t, torch.Tensor) and t.ndim]
    assert sum(t.numel() * t.element_size() for t in kept) == rule.state_bytes({n: tuple(p.shape) for n, p in tensors.items()})


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_a_thrifty_state_trains_nearly_as_well(name: str, state: str) -> None:
    """A least squares problem ends near where float32 ends."""
    losses = {}
    for how in ("fp32", state):
        tensors = {"model.layers.0.mlp.up_proj.weight": torch.nn.Parameter(torch.zeros(96, 64))}
        p = next(iter(tensors.values()))
        # gradients that are all alike are what a natural gradient makes small
        more = ({"rank": 32, "every": 20} if "rank" in SMALL.get(name, {}) else {}) | ({"damping": 1e3} if name == "natural-galore" else {})
        optimizer = make(name, how, **more).build(tensors, 0.01)
        goal = torch.randn(96, 64, generator=torch.Generator().manual_seed(3)) / 4
        with torch.no_grad():
            p.copy_(torch.randn(96, 64, generator=torch.Generator().manual_seed(4)) / 4)
        begin = float((p.detach() - goal).square().mean())
        for _ in range(120):
            p.grad = 2 * (p.detach() - goal)
            optimizer.step()
        losses[how] = float((p.detach() - goal).square().mean()) / begin
    assert losses[state] < max(1.5 * losses["fp32"], 0.05) and losses["fp32"] < 0.9, losses


@pytest.mark.parametrize("name", OURS)
def test_large_tensors_in_slices_are_as_small_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for state in ("fp32", "8bit"):
        whole = run(name, 4, state)
        monkeypatch.setattr("espalier.memory.rule.BUCKET", stored_state.BLOCK)
        sliced = run(name, 4, state)
        monkeypatch.setattr("espalier.memory.rule.BUCKET", BUCKET)
        assert all(torch.equal(whole[n], sliced[n]) for n in whole)


@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_without_a_gradient_stays(name: str) -> None:
    tensors, before = parameters(), parameters()
    optimizer = make(name, weight_decay=0.1).build(tensors, 0.01)
    pull(tensors, 0)
    still = "model.layers.0.mlp.up_proj.weight"
    tensors[still].grad = None
    optimizer.step()
    assert all(torch.equal(tensors[n], before[n]) == (n == still) for n in tensors)


@pytest.mark.parametrize("name", METHODS)
def test_two_runs_are_the_same(name: str) -> None:
    one, two = run(name, 5), run(name, 5)
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    ("name", "state", "options"),
    [("frugal", "fp32", {"split": "columns"}), ("frugal", "fp32", {"split": "blocks"}), ("galore", "fp32", {"choice": "random"}), ("adamw", "bf16", {})],
)
def test_what_is_drawn_is_of_the_seed(name: str, state: str, options: dict[str, Any]) -> None:
    """Columns, the order of blocks, subspaces, and how state is rounded."""

    def after(seed: int) -> torch.Tensor:
        shapes = {f"model.layers.{i}.mlp.up_proj.weight": (80, 64) for i in range(4)}  # of 4,096 numbers and more, so that state is rounded
        tensors, rule = parameters(shapes=shapes), make(name, state, **options)
        rule.seed = seed
        optimizer = rule.build(tensors, 0.01)
        for step in range(3):
            pull(tensors, step)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in tensors.values()])

    assert torch.equal(after(1), after(1)) and not torch.equal(after(1), after(2))


def test_bfloat16_state_is_right_on_average() -> None:
    """The trap of Lion's notes: increments of 1 - beta2 are lost by rounding to nearest."""
    from espalier.kernels.philox import Stream

    numbers = torch.full((4096 * 8,), 1.0 + 2**-10)
    stored, _ = stored_state.encode(numbers, "bf16", True, Stream(0, "rounded"))
    assert set(stored.tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(float(stored.float().mean()) - float(numbers[0])) < 2**-10 / 8
    strange = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    assert torch.equal(stored_state.encode(strange, "bf16", True, Stream(0, "s"))[0][:2].float(), strange[:2])
    assert bool(stored_state.encode(strange, "bf16", True, Stream(0, "s"))[0][2].isnan())


def test_eight_bits_are_near_and_keep_zero() -> None:
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 10_000)
    for signed in (True, False):
        given = numbers if signed else numbers.square()
        codes, scale = stored_state.encode(given, "8bit", signed, None)  # type: ignore[arg-type]
        back = stored_state.decode(codes, scale, signed)
        assert codes.dtype == torch.uint8 and len(codebook(signed).unique()) == 256
        blocks = torch.nn.functional.pad(given - back, (0, -10_000 % stored_state.BLOCK)).view(-1, stored_state.BLOCK)
        assert bool((blocks.abs().amax(-1) <= 0.018 * scale).all())
    assert not bool(stored_state.decode(*stored_state.encode(torch.zeros(300), "8bit", True, None), True).any())  # type: ignore[arg-type]


# -- limits


def after(name: str, steps: int = 8, shapes: Mapping[str, tuple[int, ...]] = SHAPES, **options: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in run(name, steps, tensors=parameters(shapes=shapes), **options).items()}


def close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], by: float = 1e-6) -> bool:
    return all(torch.allclose(one[n], two[n], atol=by) for n in one)


ADAM = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8}


@pytest.mark.parametrize("split", ["columns", "rows", "entries", "blocks"])
def test_frugal_with_all_of_it_is_adamw(split: str) -> None:
    assert close(after("frugal", density=1.0, split=split, every=1000, **ADAM), after("adamw", **ADAM))


def test_frugal_with_nothing_is_the_sign_of_the_gradient() -> None:
    for rest in ("sign", "none"):
        made, expected = after("frugal", density=0.0, rest_rule=rest), parameters()
        name = "model.layers.0.mlp.up_proj.weight"
        with torch.no_grad():
            for step in range(8):
                pull(expected, step)
                expected[name].sub_(expected[name].grad.sign() * (0.01 if rest == "sign" else 0.0))  # type: ignore[union-attr]
        assert torch.allclose(made[name], expected[name], atol=1e-6)


@pytest.mark.parametrize("split", ["columns", "rows", "entries", "blocks", "svd", "random"])
def test_moments_of_frugal_are_zero_after_a_refresh_and_its_share_is_kept(split: str) -> None:
    tensors = parameters()
    optimizer = make("frugal", split=split, density=0.5, every=3).build(tensors, 0.01)
    for step in range(4):
        pull(tensors, step)
        optimizer.step()
    matrices = [optimizer.state[p] for n, p in tensors.items() if "layers" in n and p.ndim == 2]
    assert all(int(state["step"]) == 1 and int(state["taken"]) == 4 for state in matrices)
    if split == "blocks":
        assert sum(state["exp_avg"].numel() > 0 for state in matrices) == round(0.5 * len(matrices))
    else:
        for state, (name, p) in zip(matrices, [(n, p) for n, p in tensors.items() if "layers" in n and p.ndim == 2], strict=True):
            assert state["exp_avg"].numel() <= math.ceil(0.5 * p.numel()), name


def test_all_blocks_of_frugal_have_their_turn() -> None:
    tensors = parameters()
    optimizer = make("frugal", split="blocks", density=1 / 3, every=1).build(tensors, 0.01)
    names = [n for n, p in tensors.items() if "layers" in n and p.ndim == 2]
    turns = []
    for step in range(3):
        pull(tensors, step)
        optimizer.step()
        turns += [n for n in names if optimizer.state[tensors[n]]["exp_avg"].numel()]
    assert sorted(turns) == sorted(names)


def test_a_projector_of_full_rank_by_the_identity_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam is not invariant to rotations: only the identity, or a signed permutation, gives its trajectory."""
    monkeypatch.setattr("espalier.memory.subspace.LowDimensional.splits", lambda self, name, shape: "layers" in name and len(shape) == 2)
    before = copy.deepcopy(after("galore", rank=64, scale=1.0, **ADAM))
    monkeypatch.setattr("espalier.memory.subspace.leading", lambda matrix, rank, *rest: torch.eye(matrix.shape[1])[:, :rank])
    for name in ("galore", "fira"):
        assert close(after(name, rank=64, scale=1.0, **ADAM), after("adamw", **ADAM))
    assert not close(before, after("adamw", **ADAM), 1e-4)


def test_the_rest_of_fira_is_orthogonal_to_its_subspace_and_its_norm_grows_by_gamma_at_most() -> None:
    from espalier.memory.subspace import down, up

    tensors = parameters()
    optimizer = make("fira", every=2).build(tensors, 0.01)
    norms: dict[str, list[float]] = {}
    for step in range(8):
        pull(tensors, step)
        optimizer.step()
        for n, p in tensors.items():
            if "basis" not in (state := optimizer.state[p]):
                continue
            kind = "right" if p.shape[0] >= p.shape[1] else "left"
            g, basis = p.grad, state["basis"]
            assert g is not None and torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-5)
            rest = g - up(kind, down(kind, g, basis), basis, tuple(g.shape))  # type: ignore[arg-type]
            assert float(down(kind, rest, basis).abs().max()) < 1e-5  # type: ignore[arg-type]
            norms.setdefault(n, []).append(float(state["rest_norm"]))
    assert all(b <= 1.01 * a * (1 + 1e-6) for values in norms.values() for a, b in itertools.pairwise(values))


def test_natural_galore_with_great_damping_is_galore() -> None:
    """Adam does not see the scale of what it is given, up to its epsilon."""
    options = {"rank": 4, "every": 100, "epsilon": 1e-30, "staggered": False}
    assert close(after("natural-galore", damping=1e9, **options), after("galore", **options), 1e-4)


def test_rows_of_gradnorm_lorp_have_the_lengths_that_were_learnt() -> None:
    tensors = parameters()
    optimizer = make("gradnorm-lorp").build(tensors, 0.01)
    p = tensors["model.layers.0.mlp.up_proj.weight"]
    for step in range(4):
        pull(tensors, step)
        units = p.detach() / p.detach().norm(dim=1, keepdim=True)
        slope = (p.grad * units).sum(1)  # type: ignore[operator]
        before = p.detach().norm(dim=1)
        optimizer.step()
        if step == 0:  # Adam's first step is the sign
            assert torch.allclose(p.detach().norm(dim=1), before - 0.01 * slope.sign(), atol=1e-5)


def test_rows_of_zeros_learn_under_gradnorm_lorp() -> None:
    p = {"model.layers.0.mlp.up_proj.weight": torch.nn.Parameter(torch.zeros(24, 16))}
    run("gradnorm-lorp", 2, tensors=p)
    assert bool((next(iter(p.values())).norm(dim=1) > 0).all())


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_lengths_of_gradnorm_lorp_mind_no_change_of_the_subspace(moments: str) -> None:
    p = torch.nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(0)))
    optimizer = make("gradnorm-lorp", moments=moments).build({"model.layers.0.mlp.up_proj.weight": p}, 0.01)
    for _ in range(8):  # the lengths' gradient is 1 at every step, so Adam moves them by the rate
        lengths = p.detach().norm(dim=1)
        p.grad = p.detach() / lengths[:, None]
        optimizer.step()
        assert torch.allclose(p.detach().norm(dim=1), lengths - 0.01, atol=1e-5)


def test_fira_goes_on_after_a_gradient_of_zeros() -> None:
    p = torch.nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(0)))
    optimizer = make("fira").build({"model.layers.0.mlp.up_proj.weight": p}, 0.01)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    pull({"p": p}, 0)
    optimizer.step()
    assert float(optimizer.state[p]["rest_norm"]) > 0


def turned(rule: Rule, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    turn = rule.turned(parameter, gradient)
    return gradient if turn is None else turn(parameter.detach().flatten(), gradient.flatten()).view_as(gradient)


def test_perpgrad_sees_nothing_along_the_weights_and_keeps_the_length() -> None:
    rule, tensors = make("perpgrad"), parameters()
    pull(tensors, 0)
    for p in tensors.values():
        if p.ndim == 2:
            made = turned(rule, p, p.grad)  # type: ignore[arg-type]
            assert abs(float((made * p.detach()).sum())) < 1e-4 * float(p.detach().norm() * made.norm())
            assert float(made.norm()) == pytest.approx(float(p.grad.norm()), rel=1e-5)  # type: ignore[union-attr]
    p = torch.nn.Parameter(torch.ones(3, 3))
    nearly = torch.ones(3, 3)
    nearly[0, 0] += 1e-3
    assert float(turned(rule, p, nearly).norm()) < 0.02  # noise is not made ten times louder than ten times
    zero = torch.nn.Parameter(torch.zeros(3, 3))
    assert torch.equal(turned(rule, zero, nearly), nearly)


def test_lion_moves_every_number_by_the_rate_and_does_not_see_the_scale() -> None:
    one, two = parameters(), parameters()
    for tensors, scale in ((one, 1.0), (two, 8.0)):
        before = copy.deepcopy(tensors)
        optimizer = make("lion").build(tensors, 0.01)
        for step in range(3):
            pull(before, step)
            for n, p in tensors.items():
                p.grad = before[n].grad * scale  # type: ignore[operator]
            was = {n: p.detach().clone() for n, p in tensors.items()}
            optimizer.step()
            assert all(bool(((p.detach() - was[n]).abs() - 0.01).abs().max() < 1e-6) for n, p in tensors.items())
    assert close({n: p.detach() for n, p in one.items()}, {n: p.detach() for n, p in two.items()})


def test_adabelief_takes_long_steps_where_gradients_do_not_change() -> None:
    p = {"w": torch.nn.Parameter(torch.zeros(4))}
    q = {"w": torch.nn.Parameter(torch.zeros(4))}
    for name, tensors in (("adabelief", p), ("adamw", q)):
        optimizer = make(name, **({"beta2": 0.999} if name == "adamw" else {})).build(tensors, 0.01)
        for _ in range(200):
            tensors["w"].grad = torch.ones(4)
            optimizer.step()
    assert bool((p["w"].detach().abs() > 3 * q["w"].detach().abs()).all())


@pytest.mark.parametrize("rule", ["lion", "adabelief"])
@pytest.mark.parametrize("name", ["galore", "frugal", "perpgrad"])
def test_any_rule_may_stand_below(name: str, rule: str) -> None:
    assert not close(after(name, 3, rule=rule), after(name, 3))


def test_a_rule_that_is_not_the_usual_one_has_its_own_defaults_but_for_what_is_given() -> None:
    above = make("galore", rule="adabelief", beta2=0.99)
    for rule in (above, above.inner):  # type: ignore[attr-defined]
        assert (rule.epsilon, rule.beta1, rule.beta2) == (1e-16, 0.9, 0.99)  # what is recorded is what is used
    assert make("galore").inner.epsilon == 1e-6  # type: ignore[attr-defined]


def test_a_rule_that_is_none_is_refused() -> None:
    for rule, words in (("galore", "rule is galore"), ("muon", "rule is muon"), ("adafactor", "rule is adafactor"), ("nothing", "nothing")):
        with pytest.raises(EspalierError, match=words):
            make("fira", rule=rule)


def test_a_subspace_is_chosen_for_one_matrix_after_the_other() -> None:
    tensors = parameters()
    optimizer = make("galore", every=6).build(tensors, 0.01)
    chosen: list[int] = []
    for step in range(12):
        before = {n: optimizer.state[p].get("basis") for n, p in tensors.items()}
        pull(tensors, step)
        optimizer.step()
        chosen.append(sum(optimizer.state[p].get("basis") is not before[n] for n, p in tensors.items()))
    assert chosen[0] == 3 and max(chosen[1:]) == 1 and sum(chosen[6:]) == 3


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_what_becomes_of_the_moments_when_the_subspace_changes(moments: str) -> None:
    tensors = parameters()
    optimizer = make("galore", every=3, moments=moments, staggered=False, beta1=0.5).build(tensors, 0.01)
    p = tensors["model.layers.0.mlp.up_proj.weight"]
    for step in range(3):
        pull(tensors, step)
        optimizer.step()
    old, mean = optimizer.state[p]["basis"].clone(), optimizer.state[p]["exp_avg"].clone().view(24, 4)
    pull(tensors, 3)
    reduced_by = p.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    new = optimizer.state[p]["basis"]
    expected = {"keep": mean, "reset": torch.zeros_like(mean), "rotate": mean @ (old.T @ new)}[moments]
    assert torch.allclose(optimizer.state[p]["exp_avg"].view(24, 4), 0.5 * expected + 0.5 * (reduced_by @ new), atol=1e-6)


@pytest.mark.parametrize("choice", ["svd", "randomized", "qr", "random"])
def test_a_subspace_is_orthonormal_and_a_sketch_is_near_the_leading_one(choice: str) -> None:
    from espalier.kernels.philox import Stream
    from espalier.memory.subspace import leading

    generator = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(60, 40, generator=generator)).Q, torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    matrix = u @ torch.diag(0.7 ** torch.arange(40.0)) @ v.T
    basis = leading(matrix, 5, "random", Stream(0, "y"))
    for _ in range(12 if choice == "qr" else 1):
        basis = leading(matrix, 5, choice, Stream(0, "x"), basis)  # type: ignore[arg-type]
    assert torch.allclose(basis.T @ basis, torch.eye(5), atol=1e-5)
    captured = float((basis.T @ v[:, :5]).square().sum()) / 5
    assert captured > 0.999 if choice != "random" else captured < 0.5


def test_where_the_decomposition_does_not_converge_a_sketch_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_svd, refused = torch.linalg.svd, []

    def svd(matrix: torch.Tensor, **options: Any) -> Any:
        if matrix.shape in ((24, 16), (16, 16)):  # of a gradient, not of its product with a sketch
            refused.append(matrix.shape)
            raise torch.linalg.LinAlgError("did not converge")
        return whole_svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    tensors = run("galore", 5)
    assert refused and all(bool(torch.isfinite(p).all()) for p in tensors.values())


def test_in_eight_bits_a_small_mean_is_not_left_over_a_root_of_zero() -> None:
    """Rows of unused tokens: a mean square that is rounded to zero would make of what is left of the mean a huge step."""
    p = torch.nn.Parameter(torch.zeros(400, 256))
    optimizer = make("adamw", "8bit").build({"model.embed_tokens.weight": p}, 1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        before = p.detach().clone()
        p.grad = 0.01 * torch.randn(p.shape, generator=generator) * (torch.rand(400, 1, generator=generator) < 0.3)
        optimizer.step()
        assert float((p.detach() - before).abs().max()) < 2


@pytest.mark.parametrize("name", METHODS)
def test_a_closure_is_called_once_with_gradients_and_its_loss_returned(name: str) -> None:
    """The contract of torch."""
    tensors, alone = parameters(), parameters()
    optimizer, other = make(name).build(tensors, 0.01), make(name).build(alone, 0.01)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in tensors.values())
        assert isinstance(loss, torch.Tensor) and loss.requires_grad
        loss.backward()
        return loss

    loss = optimizer.step(closure)  # type: ignore[arg-type]
    sum((p**2).sum() for p in alone.values()).backward()  # type: ignore[union-attr]
    other.step()
    assert len(calls) == 1 and float(loss) > 0 and all(torch.equal(tensors[n], alone[n]) for n in tensors)


def test_perpgrad_makes_no_copy_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three float32 copies of a matrix were alive at once."""
    from espalier.plan.trace import _Ledger

    monkeypatch.setattr("espalier.memory.rule.BUCKET", 4096)
    monkeypatch.setattr(importlib.import_module("espalier.optim.perpgrad"), "SLICE", 4096)
    p = torch.nn.Parameter(torch.randn(512, 512))
    p.grad = torch.randn(512, 512)
    optimizer = make("perpgrad", rule="lion").build({"model.layers.0.mlp.up_proj.weight": p}, 0.01)
    with _Ledger([p, p.grad]) as ledger:
        optimizer.step()
    assert ledger.worst((), False).total < 4 * p.numel() + 20 * 4 * 4096  # the state, and slices


# -- two processes


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder, worker = tmp_path_factory.mktemp("sharded"), Path(__file__).with_name("optimizer_worker.py")
    cases = json.dumps([(name, state) for name in OURS for state in ("fp32", "8bit")])
    commands = [[sys.executable, str(worker), str(rank), str(folder), cases] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) for command in commands]
    errors = [process.communicate(timeout=600)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    found: dict[str, dict[str, Any]] = json.loads((folder / "report.json").read_text())
    return found


WHOLE_STATE = {
    "galore": {"basis", "taken", "exp_avg"}, "fira": {"basis", "rest_norm"}, "natural-galore": {"basis", "history"},
    "gradnorm-lorp": {"basis", "lengths_exp_avg", "lengths_step"}, "frugal": {"basis", "drawn", "exp_avg"},
}  # fmt: skip
"""Some state of split matrices that every process has whole; of the others, the step."""


@pytest.mark.parametrize("name", OURS)
def test_sharded_over_two_processes_it_does_what_one_does(name: str, sharded: dict[str, dict[str, Any]]) -> None:
    assert sharded[f"{name} fp32"]["difference"] < 1e-6
    assert sharded[f"{name} 8bit"]["difference"] < 0.05  # blocks that share a scale begin where a shard does
    for state in ("fp32", "8bit"):
        replicas = sharded[f"{name} {state}"]["replicas"]
        assert {what.partition(" of ")[0] for what in replicas} >= WHOLE_STATE.get(name, {"step", "exp_avg"})
        assert [what for what, is_same in replicas.items() if not is_same] == []


def test_processes_that_fill_their_pieces_differently_do_not_wait_for_each_other(sharded: dict[str, dict[str, Any]]) -> None:
    assert sharded["in pieces"]["difference"] < 1e-6


def test_galore_is_that_of_galore_torch() -> None:
    """The official package (its 8-bit variant needs bitsandbytes, which importing the package would ask for).

    Between two choices of P: at a choice the signs of singular vectors, against which moments are kept, are arbitrary there.
    """
    spec = importlib.util.find_spec("galore_torch")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("galore-torch is not installed")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["galore_torch"] = package
    try:
        theirs = importlib.import_module("galore_torch.adamw").AdamW
    finally:
        del sys.modules["galore_torch"]
    ours, given = parameters(), parameters()
    split = [p for n, p in given.items() if "layers" in n and p.ndim == 2]
    options = {"rank": 4, "update_proj_gap": 100, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": split, **options}, {"params": [p for p in given.values() if all(p is not other for other in split)]}]
    one, two = make("galore", every=100, epsilon=1e-14).build(ours, 0.01), theirs(groups, lr=0.01, eps=1e-14, no_deprecation_warning=True)  # epsilon is added before the bias is corrected there
    for step in range(8):
        pull(ours, step)
        for n, p in given.items():
            p.grad = ours[n].grad.clone()  # type: ignore[union-attr]
        one.step()
        two.step()
    assert close({n: p.detach() for n, p in ours.items()}, {n: p.detach() for n, p in given.items()}, 1e-5)


@pytest.mark.parametrize(("name", "given"), [
    ("mezo", {"rule": "adabelief", "beta2": 0.95}), ("galore", {"rule": "adabelief", "epsilon": 1e-6}), ("perpgrad", {"rule": "adabelief", "beta2": 0.99}),
])  # fmt: skip
def test_what_was_given_to_the_rule_below_counts_also_where_it_is_the_default_above(name: str, given: dict[str, Any]) -> None:
    (option, value), made = list(given.items())[1], registry.make(name, "optimizer", **given)
    assert getattr(registry.make(name, "optimizer"), option) == value, "the default above"
    assert getattr(registry.make(given["rule"], "optimizer"), option) != value, "not that below"
    assert getattr(made, option) == getattr(made.inner, option) == value
    made.check()  # again
    assert getattr(made.inner, option) == value


def test_numbers_that_take_the_place_of_others_begin_under_adafactor_with_the_mean_square_of_those_that_stay() -> None:
    """With none, their first step would be nearly all of the update, whose root mean square is bounded."""
    from espalier.attach import course

    moved = {}
    for is_renewed in (False, True):
        weight = torch.nn.Parameter(torch.randn(200, generator=torch.Generator().manual_seed(0)))
        optimizer = registry.make("adafactor", "optimizer").build({"weight": weight}, 1e-2)
        for step in range(301):
            if step == 300 and is_renewed:
                part = types.SimpleNamespace(weight=weight)
                course._renew(optimizer, Renewed(part, "weight", torch.arange(200) < 20), False)
            weight.grad = torch.randn(200, generator=torch.Generator().manual_seed(step))
            before = weight.detach().clone()
            optimizer.step()
        moved[is_renewed] = (weight.detach() - before)[20:].norm()
    assert 0.8 < moved[True] / moved[False] < 1.25


def test_adafactor_refuses_sharded_parameters_by_name() -> None:
    class Sharded(torch.nn.Parameter):
        def full_tensor(self) -> None: ...

    with pytest.raises(EspalierError, match=r"layer\.weight is sharded"):
        registry.make("adafactor", "optimizer").build({"layer.weight": Sharded(torch.zeros(2))}, 1e-2)
