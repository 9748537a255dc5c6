"""Compacter: the sum of Kronecker products, and what is shared."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.attach.load import load
from espalier.checkpoint.safetensors_file import read_safetensors
from espalier.errors import EspalierError
from espalier.exchange.save import save

HIDDEN = 32


def put(**options: object) -> tuple[torch.nn.Module, object]:
    model = copy.deepcopy(tiny("llama"))
    attach(model, "compacter", **{"reduction": 4, "rank": 2, **options})
    return model, attachments(model)["compacter"]


def test_the_fast_product_is_that_with_the_explicit_sum_of_kronecker_products() -> None:
    """"W equals the explicit kron sum; fast product == dense product"; A is the first factor."""
    product = importlib.import_module("espalier.branch.compacter")._product
    generator = torch.Generator().manual_seed(0)
    A, s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 4, 4), (4, 8, 2), (4, 2, 3)))
    x = torch.randn(5, 7, 32, generator=generator, dtype=torch.float64)
    W = sum(torch.kron(A[i], s[i] @ t[i]) for i in range(4))
    torch.testing.assert_close(product(x, A, s, t), x @ W)


def test_the_count_is_that_of_the_paper() -> None:
    """"trainable count per adapter = 2 r (k + m) + (k + m) biases, plus n^3 once per model"."""
    _, attachment = put()
    k, m, r, n = HIDDEN, HIDDEN // 4, 2, 4
    assert attachment.trainable() == 4 * (2 * r * (k + m) + (k + m)) + n**3


def test_the_slow_factors_are_one_tensor_that_receives_the_summed_gradient() -> None:
    """"all adapters' A tensors are the same storage and receive the summed gradient"."""
    model, attachment = put()
    assert [n for n in trainable_parameters(model) if n.endswith(".A")] == ["espalier_pools.compacter.A"]
    model(tokens()).logits.square().mean().backward()
    whole = attachment.pool.A.grad.clone()
    parts, prepare = [], attachment.method.prepare
    for site in attachment.branches:
        # the share of one site: the gradient through its own copy of A
        own = attachment.pool.A.detach().clone().requires_grad_()
        attachment.pool.method = copy.copy(attachment.method)
        attachment.pool.method.prepare = lambda pool, sites, own=own, site=site: {**prepare(pool, sites), site: own}
        model.zero_grad()
        model(tokens()).logits.square().mean().backward()
        parts.append(own.grad)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-9)


def test_the_slow_factors_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    """"Shared A must be saved once and re-tied on load"."""
    model, _ = put()
    model.save_pretrained(tmp_path / "base")
    save(model, tmp_path / "delta", base=tmp_path / "base")
    stored = [name for name in read_safetensors(tmp_path / "delta" / "delta.safetensors") if name.endswith(":A")]
    assert stored == ["branch/shared:A"]
    loaded = load(tmp_path / "base", [tmp_path / "delta"])
    (again,) = attachments(loaded).values()
    assert all(branch.pool is again.pool for branch in again.branches.values())
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_it_starts_near_the_base_and_with_zero_start_as_it() -> None:
    """"not zero at init ... offer zero-init of t in Up as an option"."""
    before = tiny("llama")(tokens()).logits
    near = put()[0](tokens()).logits
    assert 0 < (near - before).abs().max() < 0.1
    assert torch.equal(put(zero_start=True)[0](tokens()).logits, before)


def test_products_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(EspalierError, match="products is 5; it must divide the model's width, 32"):
        put(products=5)
