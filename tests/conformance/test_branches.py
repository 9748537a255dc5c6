"""What every branch must do, on every kind of model: no line here knows a method.

The methods come from the registry, with their default options. What is special to a method is tested in
``tests/methods``.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import tempfile
from pathlib import Path

import loops
import pytest
import torch
from families import config, tiny

from espalier import apply, registry
from espalier.attach.attachment import Attachment, activate, attach, attachments, detach, trainable_parameters
from espalier.attach.load import load
from espalier.attach.places import BranchSlot
from espalier.data.batches import assemble
from espalier.delta import store
from espalier.errors import EspalierError
from espalier.exchange.save import save
from espalier.kernels import philox
from espalier.memory import packed_attention
from espalier.memory.training_form import training_form
from espalier.plan.trace import trace_step
from espalier.train.steps import Losses, accumulate

METHODS = [info.name for info in registry.methods() if info.role == "brancher"]
FAMILIES = ("llama", "gpt2", "bert", "qwen3_moe")
CAUSAL = ("llama", "gpt2", "qwen3_moe")
every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_causal = pytest.mark.parametrize("family", CAUSAL)
pytestmark = [pytest.mark.room("branch")]


def fresh(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return copy.deepcopy(tiny(family)).to(dtype).eval()


def put(model: torch.nn.Module, method: str) -> Attachment:
    attach(model, method, name="d", seed=3, **needed(method, model.config.model_type))
    return attachments(model)["d"]


def needed(method: str, family: str) -> dict[str, str]:
    """The options that a method declares it cannot do without."""
    return {"sources": sources(family)} if registry.find(method).settings.get("needs") == "sources" else {}


@functools.cache
def sources(family: str) -> str:
    """Two trained deltas of a branch."""
    folder = Path(tempfile.mkdtemp(prefix="espalier-tests-"))
    for number in (0, 1):
        model = fresh(family)
        model.save_pretrained(folder / "base")
        attach(model, "pfeiffer", width=3, seed=number)
        randomize(model)
        save(model, folder / str(number), base=folder / "base")
    return f"{folder / '0'},{folder / '1'}"


randomize = functools.partial(loops.randomize, size=0.1)


def ids(model: torch.nn.Module, rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module, **inputs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(model), **inputs).logits


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    x = ids(model)
    return model(x, labels=x).loss


@every_family
@every_method
def test_the_start_is_the_base_where_the_method_says_so(method: str, family: str) -> None:
    model = fresh(family)
    before = logits(model)
    attachment = put(model, method)
    if attachment.method.starts_as_base:
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    else:
        assert not torch.allclose(logits(model), before, atol=1e-4)


@every_family
@every_method
def test_the_trained_count_is_the_declared_formula(method: str, family: str) -> None:
    model = fresh(family)
    attachment = put(model, method)
    places = [branch.site for branch in attachment.branches.values()]
    declared = attachment.method.count_shared(places) + sum(attachment.method.count(site) for site in places)
    assert attachment.trainable() == declared == sum(p.numel() for p in trainable_parameters(model).values())


@every_causal
@every_method
def test_planning_counts_the_same_and_draws_no_random_number(method: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attachment = put(fresh(family), method)
    monkeypatch.setattr(philox, "philox", lambda *arguments: pytest.fail("a number was drawn"))
    step = trace_step(
        config(family), registry.make(method, "brancher", **needed(method, family)), {"targets": attachment.settings["targets"]}, dtype=torch.float32, tokens=8,
        sequence_length=8, recompute=False, chunk=8,
    )  # fmt: skip
    assert step.trained == attachment.trainable() and step.peak > 0


@every_method
def test_every_branch_declares_the_fields_of_the_unified_view(method: str) -> None:
    made = registry.make(method, "brancher", **needed(method, "llama"))
    assert made.form and made.composition
    assert set(made.place.split("+")) <= {"sublayer", "heads", "embedding", "model"}
    assert set(made.insertion.split("+")) <= {"sequential", "parallel"}


@every_family
@every_method
def test_gradients_reach_something_in_one_step_and_everything_in_two(method: str, family: str) -> None:
    model = fresh(family)
    put(model, method)
    loops.assert_all_move_in_two_steps(model, loss_of)


@every_family
@every_method
def test_training_leaves_the_base_bit_identical_and_detaching_gives_it_back(method: str, family: str) -> None:
    model = fresh(family)
    before, outputs = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    modules = {n: (type(m), len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for n, m in model.named_modules()}
    put(model, method)
    loops.train(model, loss_of, 5)
    activate(model, [])
    assert torch.equal(logits(model), outputs)
    activate(model, ["d"])
    assert not torch.allclose(logits(model), outputs, atol=1e-4)
    detach(model)
    model.__dict__.pop("_espalier_attachments")
    found = {n: (type(m), len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for n, m in model.named_modules()}
    assert found == modules
    assert {n for n, _ in model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), outputs)


@every_method
def test_a_copy_of_a_model_has_branches_of_its_own(method: str) -> None:
    model = fresh("llama")
    put(model, method)
    randomize(model)
    copied = copy.deepcopy(model)
    there = logits(model)
    assert torch.equal(logits(copied), there)
    randomize(model)
    assert torch.equal(logits(copied), there) and not torch.equal(logits(model), there)


@every_family
@every_method
def test_saving_and_loading_is_exact_a_scale_of_zero_is_the_base_and_weights_are_refused(method: str, family: str, tmp_path: Path) -> None:
    model = fresh(family)
    outputs = logits(model)
    model.save_pretrained(tmp_path / "base")
    put(model, method)
    randomize(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    with pytest.raises(EspalierError, match=r"holds branches of .* cannot be merged"):
        apply(str(tmp_path / "base"), [str(tmp_path / "delta")], str(tmp_path / "merged"), quiet=True)
    if family == "bert":  # load makes causal language models
        return
    loaded = load(tmp_path / "base", [tmp_path / "delta"])
    assert torch.equal(logits(loaded), logits(model)) or torch.allclose(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)
    assert not trainable_parameters(loaded)
    torch.testing.assert_close(logits(load(tmp_path / "base", [tmp_path / "delta"], scale=0.0)), outputs, rtol=1e-6, atol=1e-6)


@every_method
def test_a_stored_branch_of_another_size_is_refused_before_memory_is_taken(method: str, tmp_path: Path) -> None:
    model = fresh("llama")
    model.save_pretrained(tmp_path / "base")
    attachment = put(model, method)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    other = copy.deepcopy(tiny("llama", hidden_size=64))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(EspalierError, match="holds tensors"):
        load(tmp_path / "other", [tmp_path / "delta"], any_base=True)
    manifest = json.loads((tmp_path / "delta" / "delta.json").read_text())
    sizes = [key for key, value in manifest["hyperparameters"].items() if type(value) is int and value > 1]
    for size in sizes:
        manifest["hyperparameters"] = {**manifest["hyperparameters"], size: 1 << 45}
        manifest["sha256"] = store._digest(manifest)
        (tmp_path / "delta" / "delta.json").write_text(json.dumps(manifest))
        try:
            loaded = load(tmp_path / "base", [tmp_path / "delta"])
        except EspalierError:
            pass
        else:  # a divisor, of which there is no larger
            assert torch.equal(logits(loaded), logits(model))
        manifest["hyperparameters"][size] = getattr(attachment.method.stored(), size)


@every_family
@every_method
def test_recomputation_changes_nothing_and_leaves_nothing_behind(method: str, family: str) -> None:
    results = []
    for recompute in (False, True):
        model = fresh(family)
        put(model, method)
        randomize(model)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        torch.manual_seed(0)
        loss_of(model).backward()
        results.append({n: p.grad for n, p in trainable_parameters(model).items()})
        slots = [m for m in model.modules() if isinstance(m, BranchSlot)]
        assert slots and not [key for slot in slots for key, value in vars(slot).items() if isinstance(value, torch.Tensor)]
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@every_method
def test_it_compiles_whole(method: str, family: str) -> None:
    torch._dynamo.reset()
    model = fresh(family)
    put(model, method)
    randomize(model)
    expected = model(ids(model)).logits
    found = torch.compile(model, fullgraph=True, backend="eager")(ids(model)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trainable_parameters(model).values())


@every_method
def test_further_steps_leave_the_number_of_live_tensors_flat(method: str) -> None:
    model = fresh("llama")
    put(model, method)
    loops.assert_live_tensors_stay_flat(model, loss_of)


@every_family
@every_method
def test_bfloat16_training_moves_float32_tensors(method: str, family: str) -> None:
    model = fresh(family, torch.bfloat16)
    put(model, method)
    randomize(model)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    loss_of(model).backward()
    gradients = [p.grad for p in trainable_parameters(model).values() if p.grad is not None]
    assert gradients and all(g.dtype == torch.float32 and math.isfinite(float(g.sum())) for g in gradients)
    assert logits(model).dtype == torch.bfloat16


@every_causal
@every_method
def test_generation_with_a_cache_gives_what_it_gives_without(method: str, family: str) -> None:
    model = fresh(family)
    put(model, method)
    randomize(model)
    x = ids(model)
    with torch.no_grad():
        whole = model(x, use_cache=False).logits
        first = model(x[:, :6], use_cache=True)
        parts = [first.logits]
        for position in range(6, x.shape[1]):
            parts.append(model(x[:, position : position + 1], past_key_values=first.past_key_values, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = [model.generate(x, attention_mask=torch.ones_like(x), use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*made)
    assert torch.equal(made[0][:, 11], whole[:, -1].argmax(-1))


@every_causal
@every_method
def test_a_row_padded_on_the_left_is_continued_as_it_is_alone(method: str, family: str) -> None:
    model = fresh(family)
    put(model, method)
    randomize(model)
    x = ids(model)
    mask = torch.ones_like(x)
    mask[1, :4] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    both = model.generate(x, attention_mask=mask, **options)
    alone = model.generate(x[1:, 4:], attention_mask=mask[1:, 4:], **options)
    for here, there in zip(both.logits, alone.logits, strict=True):
        torch.testing.assert_close(here[1:], there, rtol=1e-4, atol=1e-4)


@every_family
@every_method
def test_padding_changes_nothing(method: str, family: str) -> None:
    model = fresh(family)
    put(model, method)
    randomize(model)
    x = ids(model)
    mask = torch.ones_like(x)
    mask[1, 7:] = 0
    with torch.no_grad():
        padded = model(x, attention_mask=mask).logits
        alone = model(x[1:, :7], attention_mask=mask[1:, :7]).logits
        full = model(x[:1]).logits
    torch.testing.assert_close(padded[1:, :7], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded[:1], full, rtol=1e-4, atol=1e-4)


@every_causal
@every_method
def test_packed_sequences_get_what_they_get_alone(method: str, family: str) -> None:
    model = fresh(family)
    put(model, method)
    randomize(model)
    assert packed_attention.packs(model, model.config.vocab_size)


@every_method
def test_micro_batches_add_up_packed_and_padded(method: str) -> None:
    """One step through the loop's own loss: whole, in two micro-batches, and padded."""
    model = fresh("llama")
    put(model, method)
    randomize(model)
    x = ids(model, 3, 9).numpy()
    rows, goals = [row[:-1] for row in x], [row[1:] for row in x]
    rows[1], goals[1] = rows[1][:5], goals[1][:5]
    results = []
    for padded, cuts in ((False, [slice(0, 3)]), (False, [slice(0, 1), slice(1, 3)]), (True, [slice(0, 3)])):
        model.zero_grad()
        with training_form(model, chunk=4, recompute=False, padded=padded):
            batches = [assemble(rows[cut], goals[cut], 64, padded) for cut in cuts]
            loss = accumulate(Losses(model), batches)
        results.append((loss, {n: p.grad.clone() for n, p in trainable_parameters(model).items()}))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-6)


@every_method
def test_it_stands_on_a_frozen_delta_and_either_comes_off_alone(method: str) -> None:
    model = fresh("llama")
    attach(model, "lora", name="below")
    randomize(model)
    below = logits(model)
    put(model, method)
    assert all(".d." in name or name.startswith("espalier_pools.d") or ":d." in name for name in trainable_parameters(model))
    randomize(model)
    both = logits(model)
    detach(model, "below")
    assert not torch.allclose(logits(model), both, atol=1e-4)
    detach(model, "d")
    model = fresh("llama")
    attach(model, "lora", name="below")
    randomize(model)
    put(model, method)
    randomize(model)
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)
    detach(model, "d")
    assert torch.equal(logits(model), below)
