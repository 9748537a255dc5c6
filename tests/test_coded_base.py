"""A frozen base that is kept as codes: every method trains on it as on the weights that the codes mean."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import statistics_of, tiny, tokens
from test_loop import model, run, text  # noqa: F401

from espalier import registry
from espalier.anatomy.parameters import parameters, select
from espalier.attach.attachment import attach, detach, stored, trainable_parameters
from espalier.attach.coded import CodedWeight
from espalier.attach.coded_base import quantize_base
from espalier.attach.method import Adapter
from espalier.delta.forms import Dense, Quantized
from espalier.errors import EspalierError

METHODS = [info.name for info in registry.methods() if info.role == "adapter" and "needs" not in info.settings]


def decoded(family: str, bits: int) -> torch.nn.Module:
    """An ordinary model of the numbers that the codes mean."""
    plain = tiny(family)
    coded = quantize_base(tiny(family), bits)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(stored(coded, name))
    return plain


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_codes_mean_what_the_form_quantized_means(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    form = Quantized.of(Dense(weight.float()), bits, 32, "uniform")
    found = CodedWeight(weight, bits)
    assert found.dense().dtype == dtype
    error = (found.dense().float() - weight.float()).abs().reshape(-1, 32)
    assert bool((error <= 0.501 * found.step + (1e-2 if dtype == torch.bfloat16 else 1e-6)).all())
    same = torch.isclose(found.dense().float(), form.materialize(weight.float()).to(dtype).float(), rtol=1e-6, atol=1e-6)
    assert same.all() if dtype == torch.float32 else same.float().mean() > 0.99, "bf16 weights may lie in the middle between two levels"
    assert found.codes.nbytes == 24 * 96 * bits // 8
    assert torch.equal(CodedWeight(torch.full((4, 64), 0.3), bits).dense(), torch.full((4, 64), 0.3)), "a constant group has no step"


def family_for(made: Adapter) -> str:
    """One that has what the method updates."""
    try:
        select(parameters(tiny("llama")), made.targets.split(","))
    except EspalierError:
        return "gpt2"
    return "llama"


@pytest.mark.parametrize(("method", "family"), [*((method, None) for method in METHODS), ("lora", "gpt2"), ("dora", "gpt2")])
def test_a_method_on_codes_has_the_loss_and_the_gradients_of_one_on_what_they_mean(method: str, family: str | None) -> None:
    made = registry.make(method, "adapter")
    family = family or family_for(made)
    results = []
    for model_ in (decoded(family, 8), quantize_base(tiny(family), 8)):
        attach(model_, made, seed=3, statistics=statistics_of(model_))
        x = tokens()
        loss = model_(x, labels=x).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in trainable_parameters(model_).items() if p.grad is not None}))
    (plain, wanted), (coded, found) = results
    torch.testing.assert_close(coded, plain, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_no_dense_weight_is_kept_for_the_backward_pass_and_detaching_leaves_the_codes() -> None:
    model_ = quantize_base(tiny("llama"), 4)
    outputs = model_(tokens()).logits
    attach(model_, "lora", rank=2)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        model_(tokens()).logits.sum().backward()
    assert (48, 32) not in kept and (32, 48) not in kept, "mlp weights of a model of 32 features"
    detach(model_)
    assert torch.equal(model_(tokens()).logits, outputs)
    assert copy.deepcopy(model_)(tokens()).logits.equal(outputs)


def test_tune_trains_on_codes_and_says_so_in_the_delta(model: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    from espalier.delta import store

    found = run(model, text, tmp_path / "out", base_bits=4, steps=2)
    assert found["final_loss"] > 0 and store.load(tmp_path / "out").manifest["training"]["base_bits"] == 4
    with pytest.raises(EspalierError, match="base_bits is 3; it must be one of: 4, 8"):
        run(model, text, tmp_path / "bad", base_bits=3)
