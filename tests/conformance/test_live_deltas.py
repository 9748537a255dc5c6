"""What deltas on a live model must do whatever their method: act row by row, with any strength, together, and go without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import fit_for, needed, statistics_of, tiny, tokens

import espalier
from espalier import registry
from espalier.attach.attachment import attach, detach, trainable_parameters
from espalier.errors import EspalierError

METHODS = [info.name for info in registry.methods() if info.role == "adapter"]
every_method = pytest.mark.parametrize("method", METHODS)
PLACES = {"llama": "linear,embedding,head", "gpt2": "linear,embedding"}
families = pytest.mark.parametrize("family", list(PLACES))
pytestmark = [pytest.mark.room("adapt")]


def put(model: torch.nn.Module, method: str, name: str, targets: str, seed: int) -> None:
    """A delta whose every number is away from its start."""
    attach(model, method, targets=targets, name=name, seed=seed, statistics=statistics_of(model), **needed(method, model, targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def targets_of(method: str, family: str) -> str:
    model = fit_for(method, tiny(family))
    for targets in (PLACES[family], "linear", "bias", "norm"):
        try:
            attach(copy.deepcopy(model), method, targets=targets, statistics=statistics_of(model), **needed(method, model, targets))
        except EspalierError:
            continue
        return targets
    raise AssertionError(method)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@families
@every_method
def test_a_mixed_batch_is_separate_batches_row_by_row(method: str, family: str) -> None:
    """Also the gradients, of two methods on one batch, with rows of the base and of both."""
    model, ids = fit_for(method, tiny(family)), tokens(rows=5)
    put(model, method, "a", targets_of(method, family), 1)
    put(model, "lora", "b", "mlp", 2)
    trained = {n: p.requires_grad_() for n, p in model.named_parameters() if "espalier" in n}
    names = ["a", "b", None, ("a", "b"), "a"]
    with espalier.rows(model, names):
        mixed = model(ids).logits
        (mixed[:, -1].sin().sum()).backward()
    together = {n: p.grad for n, p in trained.items()}
    model.zero_grad()
    for row, own in enumerate(names):
        espalier.activate(model, [] if own is None else own)
        alone = model(ids[row : row + 1]).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-5)
        if own is not None:
            alone[:, -1].sin().sum().backward()
    espalier.activate(model, ["a", "b"])
    assert any(g is not None for g in together.values())
    for name, parameter in trained.items():
        if parameter.grad is None:
            assert together[name] is None or not together[name].any()
        else:
            torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-5)


@families
@every_method
def test_strengths_of_0_and_1_disabling_and_removing_are_exact(method: str, family: str) -> None:
    """Bit for bit what was there before; a strength of a half lies between."""
    model, ids = fit_for(method, tiny(family)), tokens()
    base = logits(model, ids)
    put(model, method, "a", targets_of(method, family), 1)
    there = logits(model, ids)
    assert not torch.allclose(there, base, atol=1e-3)
    espalier.scale(model, "a", 0)
    assert torch.equal(logits(model, ids), base)
    espalier.scale(model, "a", 0.5)
    half = logits(model, ids)
    assert not torch.allclose(half, base, atol=1e-4) and not torch.allclose(half, there, atol=1e-4)
    espalier.scale(model, "a", 1)
    assert torch.equal(logits(model, ids), there)
    espalier.activate(model, [])
    assert torch.equal(logits(model, ids), base)
    espalier.activate(model, ["a"])
    assert torch.equal(logits(model, ids), there)
    detach(model)
    assert torch.equal(logits(model, ids), base)
