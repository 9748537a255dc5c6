"""What every adaptation method must do, on every kind of layer: no line here knows a method.

The methods come from the registry, with their default options; the places are the kinds of layer that an
update can be on. What is special to a method is tested in ``tests/methods``.
"""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import loops
import pytest
import torch
from families import config, fit_for, needed, statistics_of, tiny

from espalier import apply, registry
from espalier.anatomy.target import Target
from espalier.attach.attachment import Attachment, attach, attachments, detach, stored, trainable_parameters
from espalier.attach.load import load, put_on
from espalier.checkpoint.directory import ModelDirectory
from espalier.data.batches import assemble
from espalier.delta import store
from espalier.delta.base import DenseBase, product
from espalier.delta.forms import Update
from espalier.exchange.save import save
from espalier.kernels import philox
from espalier.memory import language_loss
from espalier.memory.training_form import training_form
from espalier.plan.trace import trace_step
from espalier.train.steps import Losses, accumulate

METHODS = [info.name for info in registry.methods() if info.role == "adapter"]
PLACES = {
    "linear": ("llama", "linear"),
    "conv1d": ("gpt2", "attention,mlp"),
    "tied embedding": ("llama", "embedding"),
    "scaled embedding": ("gemma3", "embedding"),
    "fused qkv": ("gpt_neox", "attention.qkv"),
    "fused experts": ("qwen3_moe", "experts"),
    "non-square": ("qwen3", "attention.k,mlp.down"),
    "encoder": ("bert", "linear"),
}
everywhere = pytest.mark.parametrize("place", list(PLACES))
ROUTES = ("linear", "tied embedding", "fused experts")
"""One place of each route; the others differ from these in their layout."""
every_method = pytest.mark.parametrize("method", METHODS)
_LAYOUTS = [place for place in PLACES if place not in ROUTES]
SPREAD = [(method, place) for number, method in enumerate(METHODS) for place in (*ROUTES, _LAYOUTS[number % len(_LAYOUTS)])]
spread = pytest.mark.parametrize(("method", "place"), SPREAD)
"""Every method on every route, and each layout with some of them."""
causal = pytest.mark.parametrize(("method", "place"), [case for case in SPREAD if case[1] != "encoder"])
turns = pytest.mark.parametrize(("method", "place"), [(method, ROUTES[number % len(ROUTES)]) for number, method in enumerate(METHODS)])
"""Every method on one route, for what is dear and is done by the routes and forms."""
pytestmark = [pytest.mark.room("adapt")]


def fresh(place: str, method: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    family, _ = PLACES[place]
    return fit_for(method, copy.deepcopy(tiny(family)).to(dtype).eval())


def shallow(place: str, method: str) -> torch.nn.Module:
    """A model of one block, for what is dear and asks nothing of a second."""
    return fit_for(method, copy.deepcopy(tiny(PLACES[place][0], num_hidden_layers=1)).eval())


def put(model: torch.nn.Module, method: str, place: str, targets: str = "") -> Attachment:
    targets = targets or PLACES[place][1]
    attach(model, method, targets=targets, name="d", seed=3, statistics=statistics_of(model), **needed(method, model, targets))
    return attachments(model)["d"]


randomize = functools.partial(loops.randomize, size=0.05)


def ids(model: torch.nn.Module, rows: int = 2, length: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(model)).logits


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    x = ids(model)
    return model(x, labels=x).loss


def live_updates(attachment: Attachment) -> dict[str, tuple[Target, Update]]:
    if attachment.pool is not None:
        attachment.pool.prepare()
    return {name: (slot.target, slot.update()) for name, slot in attachment.slots.items()}


def logical(model: torch.nn.Module, target: Target) -> torch.Tensor:
    weight = stored(model, target.name)
    return weight.transpose(-1, -2) if target.transposed else weight


@everywhere
@every_method
def test_the_start_is_the_base_or_as_near_as_the_method_says(method: str, place: str) -> None:
    model = fresh(place, method)
    before = logits(model)
    attachment = put(model, method, place)
    bounds = {target.name: attachment.method.start_bound(target) for target in attachment.targets}
    if not any(bounds.values()):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
        return
    for name, (target, update) in live_updates(attachment).items():
        assert 0 < float(update.materialize(logical(model, target)).detach().abs().max()) <= bounds[name]


@spread
def test_the_trained_count_is_the_declared_formula(method: str, place: str) -> None:
    model = fresh(place, method)
    attachment = put(model, method, place)
    declared = sum(attachment.method.count(target) for target in attachment.targets)
    declared += attachment.method.count_shared(attachment.targets)
    if attachment.method.surveys_ranks:
        assert attachment.trainable() == pytest.approx(declared, rel=0.25)
    else:
        assert attachment.trainable() == declared
    assert attachment.trainable() == sum(p.numel() for p in trainable_parameters(model).values())


@every_method
def test_checkpoints_hold_what_is_computed_from_the_weight_and_not_trained(method: str) -> None:
    """A decomposition is not the same bits, nor always the same signs, with other threads or on another machine."""
    model, other = fresh("linear", method), fresh("linear", method)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(torch.linspace(0.5, -1.5, parameter.shape[-1]))
    slots = [put(m, method, "linear").slots for m in (model, other)]
    for name, slot in slots[0].items():
        made = dict(slots[1][name].named_buffers())
        moved = {key for key, t in slot.named_buffers() if t.shape != made[key].shape or not torch.equal(t, made[key])}
        assert moved <= set(slot.method.kept)


@turns
def test_planning_counts_the_same_and_draws_no_random_number(method: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that nobody sees would make planning as slow as starting; a method draws from the streams that it is given."""
    family, targets = PLACES[place]
    attachment = put(shallow(place, method), method, place)
    made = registry.make(method, "adapter", **needed(method, shallow(place, method), targets))
    monkeypatch.setattr(philox, "philox", lambda *arguments: pytest.fail("a number was drawn"))
    step = trace_step(
        config(family, num_hidden_layers=1), made, {"targets": targets}, dtype=torch.float32, tokens=8, sequence_length=8,
        recompute=False, chunk=8,
    )  # fmt: skip
    method_, chosen = attachment.method, attachment.targets
    assert step.trained == sum(map(method_.count, chosen)) + method_.count_shared(chosen) and step.peak > 0
    with pytest.raises(pytest.fail.Exception, match="a number was drawn"):
        philox.Stream(0, "a").uniform(1)


@spread
def test_gradients_reach_something_in_one_step_and_everything_in_two(method: str, place: str) -> None:
    model = fresh(place, method)
    put(model, method, place)
    loops.assert_all_move_in_two_steps(model, loss_of, may_be_slight=(method, place) == ("sltrain", "encoder"))


@spread
def test_training_leaves_the_base_bit_identical_and_detaching_gives_it_back(method: str, place: str) -> None:
    model = fresh(place, method)
    before, outputs = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    classes = {n: type(m) for n, m in model.named_modules()}
    put(model, method, place)
    loops.train(model, loss_of, 10)
    detach(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n for n, _ in model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@everywhere
@every_method
def test_linear_equals_the_dense_product(method: str, place: str, dtype: torch.dtype) -> None:
    """Error at most 4 times the plain dense product's own, both against float64."""
    model = fresh(place, method, dtype)
    attachment = put(model, method, place)
    randomize(model)
    with torch.no_grad():
        for target, update in live_updates(attachment).values():
            if not target.is_matrix:
                continue  # the bias that goes with a matrix is in no product
            weight = logical(model, target)
            if target.lead:
                weight, update = weight[1], update.unbind()[1]
            x = torch.randn(37, weight.shape[-1], generator=torch.Generator().manual_seed(2)).to(dtype)
            exact_update = update.with_tensors(
                {n: t.double() if t.is_floating_point() else t for n, t in update.tensors().items()}
            )
            new = exact_update.apply(weight.double())
            exact = x.double() @ new.T
            plain = (torch.nn.functional.linear(x, new.to(dtype)).double() - exact).pow(2).mean().sqrt()
            ours = (product(x, DenseBase(weight), update).double() - exact).pow(2).mean().sqrt()
            assert ours <= 4 * plain + 1e-12, (target.name, float(ours), float(plain))


@spread
def test_gradients_of_the_accelerated_route_are_those_of_the_weight_route(method: str, place: str) -> None:
    model = fresh(place, method)
    attachment = put(model, method, place)
    randomize(model)
    for target, update in live_updates(attachment).values():
        weight = logical(model, target).double()
        leaves = {n: t.detach().double().requires_grad_() if t.is_floating_point() else t for n, t in update.tensors().items()}
        update = update.with_tensors(leaves)
        if target.lead:
            weight, update = weight[1], update.unbind()[1]
        x = torch.randn(9, weight.shape[-1], generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
        y = torch.randn(9, weight.shape[-2], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        wanted = [x, *(t for t in leaves.values() if t.requires_grad)]
        fast = torch.autograd.grad((product(x, DenseBase(weight), update) * y).sum(), wanted, retain_graph=True)
        slow = torch.autograd.grad((x @ update.apply(weight).T * y).sum(), wanted)
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        if target.route == "lookup":
            rows = torch.tensor([3, 0, 3, 7])
            z = torch.randn(4, weight.shape[-1], generator=torch.Generator().manual_seed(6), dtype=torch.float64)
            fast = torch.autograd.grad((update.lookup(rows, DenseBase(weight)) * z).sum(), wanted[1:], retain_graph=True)
            slow = torch.autograd.grad((update.apply(weight)[rows] * z).sum(), wanted[1:])
            for a, b in zip(fast, slow, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        return


@spread
def test_saving_and_loading_is_exact(method: str, place: str, tmp_path: Path) -> None:
    model = fresh(place, method)
    model.save_pretrained(tmp_path / "base")
    attachment = put(model, method, place)
    randomize(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    stored_delta = store.load(tmp_path / "delta")
    for name, update in attachment.updates().items():
        again = stored_delta.updates[name]
        assert again.shape == update.shape and again.form == update.form
        assert all(torch.equal(t, again.tensors()[n]) for n, t in update.tensors().items())
    loaded = load(tmp_path / "base", [tmp_path / "delta"])
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)
    assert not trainable_parameters(loaded)


@turns
def test_a_scale_of_zero_restores_the_base(method: str, place: str, tmp_path: Path) -> None:
    model = fresh(place, method)
    outputs = logits(model)
    model.save_pretrained(tmp_path / "base")
    put(model, method, place)
    randomize(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    assert not torch.allclose(logits(load(tmp_path / "base", [tmp_path / "delta"])), outputs, atol=1e-4)
    torch.testing.assert_close(logits(load(tmp_path / "base", [tmp_path / "delta"], scale=0.0)), outputs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "place", "dtype"),
    [*((*case, torch.float32) for case in SPREAD), *((method, "linear", torch.bfloat16) for method in METHODS)],
    ids=[*(f"{place}-{method}-fp32" for method, place in SPREAD), *(f"linear-{method}-bf16" for method in METHODS)],
)
def test_merged_equals_unmerged(method: str, place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The applied checkpoint, loaded by transformers, does what base and delta do, to the rounding of its dtype."""
    from transformers import AutoModelForCausalLM

    model = fresh(place, method, dtype)
    before = logits(model)
    model.save_pretrained(tmp_path / "base")
    put(model, method, place)
    randomize(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    apply(str(tmp_path / "base"), [str(tmp_path / "delta")], str(tmp_path / "merged"), quiet=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    there, here = logits(model).float(), logits(merged).float()
    moved = (there - before.float()).abs().max()
    assert moved > 1e-3
    assert (there - here).abs().max() <= (1e-4 if dtype == torch.float32 else 0.2) * max(moved, 1)


@spread
def test_recomputation_changes_nothing(method: str, place: str) -> None:
    results = []
    for recompute in (False, True):
        model = fresh(place, method)
        put(model, method, place)
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
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-6, atol=1e-8)


@turns
def test_it_trains_under_autocast(method: str, place: str) -> None:
    """As mixed precision of another training loop has it: products in bfloat16 of a model in float32."""
    losses, gradients = [], []
    for enabled in (False, True):
        model = fresh(place, method)
        put(model, method, place)
        randomize(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = loss_of(model)
        loss.backward()
        losses.append(loss.detach().float())
        gradients.append(torch.cat([p.grad.flatten() for p in trainable_parameters(model).values() if p.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)
    assert (gradients[1] - gradients[0]).norm() < 0.2 * gradients[0].norm()


@turns
def test_it_compiles_whole(method: str, place: str) -> None:
    torch._dynamo.reset()
    model = shallow(place, method)
    put(model, method, place, "attention.v,mlp.down" if place == "linear" else "")  # every matrix costs the compiler as much
    randomize(model)
    expected = model(ids(model)).logits
    found = torch.compile(model, fullgraph=True, backend="eager")(ids(model)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trainable_parameters(model).values())


@every_method
def test_further_steps_leave_the_number_of_live_tensors_flat(method: str) -> None:
    model = shallow("non-square", method)
    put(model, method, "non-square")
    loops.assert_live_tensors_stay_flat(model, loss_of)


@causal
def test_the_chunked_loss_gives_the_gradients_of_the_models_own(method: str, place: str) -> None:
    """Also where the update is on the head, whose gradient is made chunk by chunk."""
    model = fresh(place, method)
    put(model, method, place)
    randomize(model)
    x = ids(model, rows=1)
    own = model(x, labels=x).loss
    own.backward()
    wanted = {n: p.grad.clone() for n, p in trainable_parameters(model).items()}
    model.zero_grad()
    language_loss.install(model, 4)
    targets = torch.cat((x[0, 1:], torch.tensor([-100])))
    loss = model(input_ids=x, targets=targets, scale=1 / (x.shape[1] - 1))
    loss.backward()
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    for name, p in trainable_parameters(model).items():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6)


@turns
def test_micro_batches_add_up_packed_and_padded(method: str, place: str) -> None:
    """One step through the loop's own loss: whole, in three micro-batches, and padded."""
    model = shallow(place, method)
    put(model, method, place)
    randomize(model)
    x = ids(model, 3, 9).numpy()
    rows, goals = [row[:-1] for row in x], [row[1:] for row in x]
    rows[1], goals[1] = rows[1][:5], goals[1][:5]
    results = []
    for padded, cuts in ((False, [slice(0, 3)]), (False, [slice(i, i + 1) for i in range(3)]), (True, [slice(0, 3)])):
        model.zero_grad()
        with training_form(model, chunk=4, recompute=False, padded=padded):
            loss = accumulate(Losses(model), [assemble(rows[cut], goals[cut], 64, padded) for cut in cuts])
        results.append((loss, {n: p.grad.clone() for n, p in trainable_parameters(model).items() if p.grad is not None}))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5) and gradients.keys() == results[0][1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-6)


@every_method
def test_two_deltas_make_a_chain_that_equals_applying_them_in_order(method: str, tmp_path: Path) -> None:
    model = fresh("linear", method)
    model.save_pretrained(tmp_path / "base")
    put(model, "lora", "linear")
    randomize(model)
    save(model, tmp_path / "first", base=tmp_path / "base")
    detach(model)
    put(model, method, "linear")
    randomize(model)
    save(model, tmp_path / "second", base=tmp_path / "base")
    both = load(tmp_path / "base", [tmp_path / "first", tmp_path / "second"])
    apply(str(tmp_path / "base"), [str(tmp_path / n) for n in ("first", "second")], str(tmp_path / "merged"), quiet=True)
    torch.testing.assert_close(logits(both), logits(load(tmp_path / "merged")), rtol=1e-4, atol=1e-5)
    detach(both, "delta1")
    put_on(both, tmp_path / "second", ModelDirectory(tmp_path / "base"))
    torch.testing.assert_close(logits(both), logits(load(tmp_path / "merged")), rtol=1e-4, atol=1e-5)


@every_method
def test_bfloat16_training_moves_float32_tensors(method: str) -> None:
    model = fresh("linear", method, torch.bfloat16)
    attachment = put(model, method, "linear")
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    loss_of(model).backward()
    gradients = [p.grad for p in trainable_parameters(model).values() if p.grad is not None]
    assert gradients and all(g.dtype == torch.float32 and math.isfinite(float(g.sum())) for g in gradients)
    assert all(u.shape for u in attachment.updates().values())
