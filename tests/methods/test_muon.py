"""Muon (arXiv:2502.16982) on the matrices of the blocks, AdamW on all else, as one optimizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier import registry
from espalier.attach.attachment import attach, trainable_parameters
from espalier.data.batches import Cursor
from espalier.errors import EspalierError
from espalier.train import checkpoint

OPTIONS = {"momentum": 0.9, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-6, "weight_decay": 0.1}
RATES = (0.01, 0.03, 0.002, 0.05)


def model_of(family: str = "llama", method: str = "full", **options: Any) -> torch.nn.Module:
    return attach(tiny(family), method, **options)


def muon(model: torch.nn.Module, rate: float = 0.01, **options: Any) -> torch.optim.Optimizer:
    return registry.make("muon", "optimizer", **{**OPTIONS, **options}).build(trainable_parameters(model), rate)


def torchs(model: torch.nn.Module, rate: float = 0.01) -> list[torch.optim.Optimizer]:
    """Torch's own optimizers, each on what is meant for it."""
    parameters = trainable_parameters(model)
    blocks = {n: p for n, p in parameters.items() if re.search(r"\.(layers|h)\.\d+\.", n) and p.ndim == 2}
    assert 0 < len(blocks) < len(parameters)
    rest = [p for n, p in parameters.items() if n not in blocks]
    betas, eps = (OPTIONS["beta1"], OPTIONS["beta2"]), OPTIONS["epsilon"]
    return [
        torch.optim.Muon(blocks.values(), lr=rate, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in rest if p.ndim > 1], lr=rate, betas=betas, eps=eps, weight_decay=0.1, fused=True),
        torch.optim.AdamW([p for p in rest if p.ndim < 2], lr=rate, betas=betas, eps=eps, weight_decay=0.0, fused=True),
    ]


def step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """A step as the loop does it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    x = tokens()
    model(x, labels=x).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in trainable_parameters(model).values())


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    found = trainable_parameters(other)
    return all(torch.equal(p, found[n]) for n, p in trainable_parameters(one).items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_several_steps_are_those_of_torchs_muon_and_adamw(family: str) -> None:
    """Bit for bit, at another rate each step; fused experts, of three dimensions, go to AdamW."""
    ours, theirs = model_of(family), model_of(family)
    optimizer, references = muon(ours), torchs(theirs)
    for rate in RATES:
        before = {n: p.detach().clone() for n, p in trainable_parameters(ours).items()}
        step(ours, [optimizer], rate)
        step(theirs, references, rate)
        assert same(ours, theirs)
        assert all(not torch.equal(p, before[n]) for n, p in trainable_parameters(ours).items())


def test_the_rate_that_the_loop_writes_reaches_every_parameter() -> None:
    """At a rate of 0 nothing moves, though the optimizer was built at another."""
    model, untouched = model_of(), model_of()
    optimizer = muon(model, rate=0.1)
    step(model, [optimizer], 0.0)
    assert same(model, untouched)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trainable_parameters(model).values()} and len(grouped) == len(set(grouped))


def test_a_step_on_a_matrix_is_near_orthogonal_and_of_the_size_of_adamws() -> None:
    """Section 2.2 of the paper: every singular value about 0.2 sqrt(max(rows, columns)) times the rate, its mean square 0.2 squared."""
    model = model_of()
    before = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    muon(model, 0.01, weight_decay=0.0).step()
    for name, parameter in trainable_parameters(model).items():
        moved = (parameter.detach() - before[name]) / 0.01
        if ".layers." in name and parameter.ndim == 2:
            values = torch.linalg.svdvals(moved) / (0.2 * max(moved.shape) ** 0.5)
            assert float(values.median()) == pytest.approx(1, abs=0.3) and float(values.max()) < 1.4
            assert float(moved.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("targets", ["mlp", "embedding", "all"])
def test_there_may_be_only_one_kind_of_parameter(targets: str) -> None:
    model, untouched = model_of(targets=targets), model_of(targets=targets)
    step(model, [muon(model)], 0.01)
    assert not same(model, untouched)


def test_factors_that_start_at_zero_train_too() -> None:
    """A LoRA's A has a gradient of exactly zero in the first step: nothing is divided by its norm."""
    model, untouched = model_of(method="lora", rank=4), model_of(method="lora", rank=4)
    optimizer = muon(model)
    step(model, [optimizer], 0.01)
    step(model, [optimizer], 0.01)
    start = trainable_parameters(untouched)
    for name, parameter in trainable_parameters(model).items():
        assert bool(torch.isfinite(parameter).all()) and not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_saved_optimizer_goes_on_to_the_same_bits(method: str, tmp_path: Path) -> None:
    whole, cut, resumed = (model_of(method=method) for _ in range(3))
    optimizer, first = muon(whole), muon(cut)
    for rate in RATES:
        step(whole, [optimizer], rate)
    for rate in RATES[:2]:
        step(cut, [first], rate)
    path = checkpoint.save(tmp_path, trainable_parameters(cut), first, checkpoint.State(2, Cursor(), 0, 0.0))
    second = muon(resumed)
    checkpoint.load(path, trainable_parameters(resumed), second)
    assert same(resumed, cut)
    for rate in RATES[2:]:
        step(resumed, [second], rate)
    assert same(resumed, whole) and not same(resumed, cut)


def test_the_state_is_one_number_per_matrix_entry_and_two_of_the_rest() -> None:
    model = model_of()
    optimizer = muon(model)
    step(model, [optimizer], 0.01)
    keys = {n: set(optimizer.state[p]) for n, p in trainable_parameters(model).items()}
    for name, parameter in trainable_parameters(model).items():
        matrix = ".layers." in name and parameter.ndim == 2
        assert keys[name] == ({"momentum_buffer"} if matrix else {"step", "exp_avg", "exp_avg_sq"})
    held = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    shapes = {name: tuple(p.shape) for name, p in trainable_parameters(model).items()}
    assert held == registry.make("muon", "optimizer").state_bytes(shapes)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"momentum": 1.0}, "momentum is 1.0; it must be at least 0 and less than 1"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"beta1": 1.0}, "beta1 is 1.0; it must be at least 0 and less than 1"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"epsilon": -1.0}, r"epsilon is -1\.0; it must be at least 0"),
        ({"weight_decay": -1}, r"weight_decay is -1\.0; it must be at least 0"),
        ({"nesterov": True}, "nesterov is no option of muon"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        registry.make("muon", "optimizer", **options)
