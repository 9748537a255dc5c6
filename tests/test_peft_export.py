"""``convert --to peft``: deltas become LoRA directories, which PEFT loads: exactly where a form is of low rank, else truncated."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier import convert
from espalier.anatomy.parameters import parameters
from espalier.anatomy.target import Target
from espalier.attach.load import load, load_model
from espalier.checkpoint.directory import ModelDirectory
from espalier.delta import store
from espalier.delta.forms import (
    Columns,
    Dense,
    Diagonal,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    Pooled,
    Rows,
    Sparse,
    Sum,
    Tiled,
    Update,
)
from espalier.errors import EspalierError
from espalier.exchange.peft_import import import_adapter

peft = pytest.importorskip("peft")

PLACES = {"llama": ("q_proj.weight", "down_proj.weight"), "gpt2": ("c_attn.weight", "mlp.c_proj.weight")}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.1


def update_of(form: str, outputs: int, inputs: int) -> Update:
    low = LowRank(noise(outputs, 3), noise(3, inputs), 2.0)
    match form:
        case "low_rank":
            return low
        case "columns":
            return Columns(noise(outputs, 4), torch.tensor([5, 1, 9, 2]), inputs, 1.5)
        case "rows":
            return Rows(noise(4, inputs), torch.tensor([5, 1, 9, 2]), outputs, 1.5)
        case "pooled":
            index = torch.tensor([[0, 1], [2, 3]])
            return Pooled(noise(4, outputs // 2), noise(4, inputs // 2), index, index.flip(0), 2.0)
        case "kronecker":
            return Kronecker(noise(1, 1, 1), noise(1, outputs, 2), 2.0, B_in=noise(1, 2, inputs))
        case "tiled":
            return Tiled(noise(outputs, 5), (outputs, inputs), 2.0)
        case "hadamard":
            return Hadamard(noise(outputs, 2) * 5, noise(2, inputs), noise(outputs, 2, seed=1) * 5, noise(2, inputs, seed=1), 2.0)
        case "sum":
            return Sum([low, Columns(noise(outputs, 2), torch.tensor([0, 3]), inputs, 0.5)], 2.0)
        case "magnitude":
            return Magnitude(noise(outputs).abs() + 1, low)
        case "dense":
            return Dense(noise(outputs, inputs), 2.0)
        case "sparse":
            return Sparse(noise(60), torch.arange(0, 600, 10), (outputs, inputs), 2.0)
    raise AssertionError(form)


def delta_of(form: str, base: Path) -> tuple[store.Delta, dict[str, Target], Any]:
    model = load_model(base)
    targets = {t.name: t for t in parameters(model)}
    chosen = {n: t for n, t in targets.items() if n.endswith(PLACES[model.config.model_type])}
    updates = {name: update_of(form, t.outputs, t.inputs) for name, t in chosen.items()}
    facts = {"name": str(base), "fingerprint": ModelDirectory(base).fingerprint(), "model_type": model.config.model_type}
    return store.Delta(updates, {n: store.Layout.of(t) for n, t in chosen.items()}, {"method": form, "base": facts}), targets, model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(tokens()).logits


def in_peft(base: Path, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load_model(base), folder)


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("form", ["low_rank", "columns", "rows", "pooled", "kronecker", "tiled", "hadamard", "sum", "magnitude"])
def test_an_update_of_low_rank_is_exported_exactly(form: str, family: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path / "base")
    delta, targets, model = delta_of(form, tmp_path / "base")
    store.save(tmp_path / "delta", delta, "")
    result = convert(str(tmp_path / "delta"), str(tmp_path / "peft"), to="peft", quiet=True)
    assert [(t["name"], t["error"] < 1e-6) for t in result["tensors"]] == [(name, True) for name in delta.updates]
    ours, theirs = load(tmp_path / "base", [tmp_path / "delta"]), in_peft(tmp_path / "base", tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=2e-5)
    assert not torch.allclose(logits(theirs), logits(model), atol=0.01)
    again = import_adapter(tmp_path / "peft", targets, ModelDirectory(tmp_path / "base"))
    for name, update in delta.updates.items():
        weight = torch.ones(update.shape)
        torch.testing.assert_close(again.updates[name].apply(weight), update.apply(weight), rtol=1e-5, atol=1e-5)


def test_ranks_and_alphas_differ_by_module_and_are_named_exactly(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    delta, _, _ = delta_of("low_rank", tmp_path / "base")
    names = list(delta.updates)
    for rank, name in enumerate(names[1:], start=4):
        outputs, inputs = delta.updates[name].shape
        delta.updates[name] = LowRank(noise(outputs, rank), noise(rank, inputs), 0.7 * rank)
    store.save(tmp_path / "delta", delta, "")
    convert(str(tmp_path / "delta"), str(tmp_path / "peft"), to="peft", quiet=True)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {f"^{name.removesuffix('.weight')}": rank for rank, name in enumerate(names[1:], start=4)}
    ours, theirs = load(tmp_path / "base", [tmp_path / "delta"]), in_peft(tmp_path / "base", tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_any_additive_update_is_truncated_to_a_rank_that_is_asked_for(form: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    delta, targets, _ = delta_of(form, tmp_path / "base")
    store.save(tmp_path / "delta", delta, "")
    with pytest.raises(EspalierError, match="needs --rank or --energy: the update is not made of factors"):
        convert(str(tmp_path / "delta"), str(tmp_path / "peft"), to="peft", quiet=True)
    assert not (tmp_path / "peft").exists()
    result = convert(str(tmp_path / "delta"), str(tmp_path / "peft"), to="peft", rank=4, quiet=True)
    errors = {t["name"]: t["error"] for t in result["tensors"]}
    again = import_adapter(tmp_path / "peft", targets, ModelDirectory(tmp_path / "base"))
    for name, update in delta.updates.items():
        zero = torch.zeros(update.shape)
        exact, kept = update.materialize(zero), again.updates[name].materialize(zero)
        singular = torch.linalg.svdvals(exact)
        assert errors[name] == pytest.approx(float(singular[4:].norm() / singular.norm()), rel=1e-4)
        assert float((exact - kept).norm() / exact.norm()) == pytest.approx(errors[name], rel=1e-3)
    full = convert(str(tmp_path / "delta"), str(tmp_path / "full"), to="peft", rank=32, quiet=True)
    assert full["worst"] < 1e-6
    ours, theirs = load(tmp_path / "base", [tmp_path / "delta"]), in_peft(tmp_path / "base", tmp_path / "full")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)


def test_an_update_that_depends_on_the_base_is_truncated_against_it(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    delta, _, _ = delta_of("low_rank", tmp_path / "base")
    name, update = next(iter(delta.updates.items()))
    delta.updates[name] = Diagonal(noise(update.shape[0]), None, update.shape)
    store.save(tmp_path / "delta", delta, "")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(EspalierError, match=rf"{name}: .*depends on the base; the base model is needed .*--model BASE"):
        convert(str(tmp_path / "delta"), str(tmp_path / "peft"), to="peft", rank=4, quiet=True)
    (tmp_path / "moved").rename(tmp_path / "base")
    convert(str(tmp_path / "delta"), str(tmp_path / "peft"), to="peft", rank=32, model=str(tmp_path / "base"), quiet=True)
    ours, theirs = load(tmp_path / "base", [tmp_path / "delta"]), in_peft(tmp_path / "base", tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
    with pytest.raises(EspalierError, match="rank is 0; it must be at least 1"):
        convert(str(tmp_path / "delta"), str(tmp_path / "none"), to="peft", rank=0, model=str(tmp_path / "base"), quiet=True)
