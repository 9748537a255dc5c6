"""A frozen base that is kept as codes: every method trains on it as on the weights that the codes mean."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import loops
import pytest
import torch
from families import config, statistics_of, tiny, tokens
from test_loop import model, run, text  # noqa: F401

from espalier import registry
from espalier.anatomy.parameters import parameters, select
from espalier.attach.attachment import (
    attach,
    detach,
    release_base,
    settle,
    stored,
    targets_of,
    trainable_parameters,
)
from espalier.attach.coded import CodedWeight
from espalier.attach.coded_base import quantize_base
from espalier.attach.load import load
from espalier.attach.method import Adapter
from espalier.delta.forms import Dense, Quantized
from espalier.errors import EspalierError
from espalier.plan.trace import trace_step

METHODS = [info.name for info in registry.methods() if info.role == "adapter" and "needs" not in info.settings]
BRANCHES = [info.name for info in registry.methods() if info.role == "brancher" and "needs" not in info.settings]


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
    step = found.levels.view(torch.float32)[:, 1:]
    assert bool((error <= 0.501 * step + (1e-2 if dtype == torch.bfloat16 else 1e-6)).all())
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


def equal_to_decoded(method: str, family: str, targets: str | None = None, bits: int = 8) -> None:
    results = []
    for model_ in (decoded(family, bits), quantize_base(tiny(family), bits)):
        attach(model_, method, targets=targets, seed=3, statistics=statistics_of(model_))
        loops.randomize(model_, 0.05)
        x = tokens()
        loss = model_(x, labels=x).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in trainable_parameters(model_).items() if p.grad is not None}))
    (plain, wanted), (coded, found) = results
    torch.testing.assert_close(coded, plain, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("method", "family"), [*((method, None) for method in METHODS), ("lora", "gpt2"), ("dora", "gpt2")])
def test_a_method_on_codes_has_the_loss_and_the_gradients_of_one_on_what_they_mean(method: str, family: str | None, bits: int) -> None:
    equal_to_decoded(method, family or family_for(registry.make(method, "adapter")), bits=bits)


@pytest.mark.parametrize(("family", "bits"), [("llama", 8), ("gpt2", 4)])
@pytest.mark.parametrize("method", BRANCHES)
def test_a_branch_on_codes_has_the_loss_and_the_gradients_of_one_on_what_they_mean(method: str, family: str, bits: int) -> None:
    equal_to_decoded(method, family, bits=bits)


def takes_experts(method: str) -> bool:
    try:
        return bool(targets_of(tiny("qwen3_moe"), registry.make(method, "adapter"), "experts"))
    except EspalierError:
        return False


@pytest.mark.parametrize(
    ("method", "family"),
    [*((method, "qwen3_moe") for method in METHODS if takes_experts(method)), ("lora", "mixtral"), ("lora", "gpt_oss"), ("lora", "qwen2_moe")],
)
def test_fused_experts_are_coded_too_and_a_method_on_them_is_one_on_what_the_codes_mean(method: str, family: str) -> None:
    equal_to_decoded(method, family, "experts", 4)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("targets", ["experts.down", "attention"])
def test_experts_without_an_update_are_coded_and_run_from_their_codes(family: str, targets: str) -> None:
    model_ = quantize_base(tiny(family), 4)
    names = [t.name for t in parameters(model_) if t.role.startswith("experts") and not t.role.endswith("bias")]
    assert names == [t.name for t in parameters(tiny(family)) if t.role.startswith("experts") and not t.role.endswith("bias")]
    assert len(names) == 4 and not {*names} & {name for name, _ in model_.named_parameters()}, "they are no parameters any more"
    plain = sum(p.nbytes for n, p in tiny(family).named_parameters() if n in names)
    coded = sum(p.nbytes for n, p in model_.named_parameters() if ".experts.espalier_base." in n)
    groups = 8 * sum(t.size // math.gcd(t.inputs, 64) for t in parameters(model_) if t.name in names)
    assert coded == plain // 8 + groups, "half a byte a number, and two float32 a group"
    equal_to_decoded("lora", family, targets, 4)
    outputs = model_(tokens()).logits
    attach(model_, "dora", targets="experts")
    detach(model_)
    assert torch.equal(model_(tokens()).logits, outputs)
    compiled = torch.compile(model_.model.layers[0].mlp.experts, fullgraph=True, backend="eager")
    given = torch.randn(6, 32), torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [0, 2], [1, 3]]), torch.rand(6, 2)
    torch.testing.assert_close(compiled(*given), model_.model.layers[0].mlp.experts(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_plan_counts_the_bytes_that_a_coded_model_has(family: str) -> None:
    options = {"tokens": 32, "sequence_length": 16, "recompute": False, "chunk": 64}
    traced = trace_step(config(family), registry.make("lora", "adapter"), {"targets": "linear"}, dtype=torch.float32, base_bits=4, **options)
    model_ = attach(quantize_base(tiny(family), 4), "lora", targets="linear")
    assert traced.model == sum(t.nbytes for t in (*model_.parameters(), *model_.buffers()) if not t.requires_grad)


def test_a_step_of_a_larger_model_takes_what_its_activations_take_whatever_its_weights_take() -> None:
    """A view of a weight that is there anyway, as each product makes one, is no memory of the step."""
    options = {"tokens": 4, "sequence_length": 4, "recompute": True, "chunk": 4}
    large = config("llama", hidden_size=256, intermediate_size=4096, num_hidden_layers=4)
    traced = trace_step(large, registry.make("lora", "adapter", rank=1), {"targets": "attention.q"}, dtype=torch.float32, **options)
    assert traced.peak < 0.02 * traced.model


def test_load_keeps_the_base_as_codes_where_asked(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, base_bits=4)(tokens()).logits, quantize_base(tiny("llama"), 4)(tokens()).logits)
    with pytest.raises(EspalierError, match="base_bits is 5; it must be one of: 4, 8"):
        load(tmp_path, base_bits=5)


@pytest.mark.parametrize("method", ["lora", "full", "mos", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_chain_of_deltas_on_codes_is_one_on_what_they_mean(family: str, method: str) -> None:
    results = []
    for model_ in (decoded(family, 4), quantize_base(tiny(family), 4)):
        attach(model_, "dora", rank=2, targets="linear", seed=1)
        with torch.no_grad():
            for number, p in enumerate(trainable_parameters(model_).values()):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.05)
        attach(model_, method, targets="linear", name="second", seed=3)
        release_base(model_)
        x = tokens()
        loss = model_(x, labels=x).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in trainable_parameters(model_).items() if p.grad is not None}))
    (plain, wanted), (coded, found) = results
    torch.testing.assert_close(coded, plain, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_recomputation_and_accumulation_change_nothing_on_codes(family: str) -> None:
    x, results = tokens(4), []
    for recompute, micro in ((False, 1), (True, 2)):
        model_ = attach(quantize_base(tiny(family), 4), "lora", rank=2, seed=3).train()
        if recompute:
            model_.gradient_checkpointing_enable()
        for part in x.chunk(micro):
            (model_(part, labels=part).loss / micro).backward()
        results.append({name: p.grad for name, p in trainable_parameters(model_).items()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_settling_leaves_an_ordinary_parameter_and_what_training_replaces_whole_keeps_no_codes() -> None:
    model_ = quantize_base(tiny("llama"), 8)
    attach(model_, "lora", rank=2, targets="mlp")
    with torch.no_grad():
        for p in trainable_parameters(model_).values():
            p.add_(0.1)
    outputs = model_(tokens()).logits
    settle(model_)
    assert type(model_.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(model_(tokens()).logits, outputs, rtol=1e-4, atol=1e-4)
    attach(model_, "full", targets="attention")
    release_base(model_)
    assert not any(isinstance(module, CodedWeight) for module in model_.modules())
    torch.testing.assert_close(model_(tokens()).logits, outputs, rtol=1e-4, atol=1e-4)


def test_codes_survive_a_change_of_dtype() -> None:
    model_ = quantize_base(tiny("llama"), 4)
    before = {t.name: stored(model_, t.name) for t in parameters(model_) if t.role == "mlp.up"}
    model_.to(torch.bfloat16)
    assert all(torch.equal(stored(model_, name), weight) for name, weight in before.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_codes_are_computed_with_in_the_dtype_of_the_model_and_under_autocast(family: str) -> None:
    for method in (None, "lora"):
        cast = quantize_base(tiny(family), 8)
        cast = (attach(cast, method, rank=2) if method else cast).to(torch.bfloat16)
        assert cast(tokens()).logits.dtype == torch.bfloat16
    found = {}
    for name, base in {"coded": quantize_base(tiny(family), 8), "plain": decoded(family, 8)}.items():
        attach(base, "lora", rank=2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = base(tokens(), labels=tokens()).loss
        loss.backward()
        found[name] = torch.cat([p.grad.flatten() for p in trainable_parameters(base).values() if p.grad is not None])
    assert (found["coded"] - found["plain"]).norm() < 0.05 * found["plain"].norm()


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
