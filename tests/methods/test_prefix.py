"""Prefix tuning: attention over the concatenated keys, in every implementation, and PEFT's own prefix."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import tiny, tokens
from transformers import DynamicCache

from espalier.attach import attention
from espalier.attach.attachment import activate, attach, attachments, scale, trainable_parameters
from espalier.attach.attention import log_sum_exp
from espalier.attach.load import load
from espalier.exchange.save import save


def randomize(model: torch.nn.Module, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llama", "eager"), ("llama", "sdpa"), ("gpt2", "eager"), ("gpt2", "sdpa"), ("qwen3", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")],
)
def test_the_gated_form_equals_concatenated_prefix_attention(family: str, implementation: str) -> None:
    """"the gated form equals concatenated prefix attention to 1e-6 (this is an exact identity)": with grouped heads, soft caps and sinks."""
    overrides = {"sliding_window": 64} if family in ("gemma2", "gpt_oss") else {}
    model = copy.deepcopy(tiny(family, **overrides)).double()
    model.set_attn_implementation(implementation)
    if family == "gpt_oss":
        model.set_experts_implementation("eager")  # the other one does not know float64
    attach(model, "prefix", length=5, dtype=torch.float64)
    randomize(model)
    x = tokens()
    plain = copy.deepcopy(model)
    ours = model(x).logits
    ours.square().mean().backward()
    activate(plain, [])
    for p in trainable_parameters(plain).values():
        p.grad = None
    cache = DynamicCache()
    for branch in attachments(plain)["prefix"].branches.values():
        cache.update(*[t.transpose(0, 1)[None].expand(2, -1, -1, -1) for t in (branch.key, branch.value)], branch.site.block)
    theirs = plain(x, past_key_values=cache, position_ids=torch.arange(x.shape[1])[None]).logits
    theirs.square().mean().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for (name, p), q in zip(trainable_parameters(model).items(), trainable_parameters(plain).values(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8, msg=name)


def plain_log_sum_exp(q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scaling
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    return torch.logsumexp(logits.masked_fill(hidden, float("-inf")), -1, keepdim=True)


@pytest.mark.parametrize("numbers", [1 << 22, 60], ids=["whole", "row by row"])
@pytest.mark.parametrize(("causal", "window", "softcap"), [(True, None, None), (True, 3, 2.0), (False, None, None), (False, 2, None)])
def test_log_sum_exp_and_its_gradients_are_those_of_the_plain_one(
    causal: bool, window: int | None, softcap: float | None, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_NUMBERS", numbers)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 2, 9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    distance = torch.arange(2, 9)[:, None] - torch.arange(9)
    hidden = distance < 0 if causal else torch.zeros(7, 9, dtype=torch.bool)
    if window:
        hidden = hidden | (distance >= window if causal else distance.abs() > window)
    ours = log_sum_exp(q, k, None, causal, window, None, 0.5, softcap)
    theirs = plain_log_sum_exp(q, k, hidden, 0.5, softcap)
    torch.testing.assert_close(ours, theirs)
    y = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((ours * y).sum(), (q, k)), torch.autograd.grad((theirs * y).sum(), (q, k)), strict=True):
        torch.testing.assert_close(a, b)
    mask = (~hidden).expand(2, 1, 7, 9)
    torch.testing.assert_close(log_sum_exp(q, k, mask, False, None, None, 0.5, softcap), theirs)
    torch.testing.assert_close(log_sum_exp(q, k, torch.where(mask, 0.0, -1e30), False, None, None, 0.5, softcap), theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(("causal", "lengths"), [(True, None), (False, None), (True, (30, 30, 10))])
def test_the_kernel_gives_attention_its_log_sum_exp_and_the_gradients_through_both(
    causal: bool, lengths: tuple[int, ...] | None, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = 2 if lengths is None else 1
    q, k, v = (torch.randn(batch, heads, 70, 8, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    y, z = (torch.randn(batch, 4, 70, size, generator=generator, dtype=torch.float64) for size in (8, 1))
    hidden = torch.ones(70, 70, dtype=torch.bool).triu(1) if causal else torch.zeros(70, 70, dtype=torch.bool)
    if lengths:
        window = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        hidden = hidden | (window[:, None] != window)
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.5).masked_fill(hidden, float("-inf"))
    wanted = torch.softmax(logits, -1) @ v.repeat_interleave(2, 1), torch.logsumexp(logits, -1, keepdim=True)
    made = attention._attention(*(t.to(dtype) for t in (q, k, v)), causal, lengths, 0.5)
    for ours, plain in zip(made, wanted, strict=True):
        torch.testing.assert_close(ours.double(), plain, rtol=tolerance, atol=tolerance)
    slopes = [torch.autograd.grad((out * y).sum() + (lse * z).sum(), (q, k, v)) for out, lse in ((made[0].double(), made[1].double()), wanted)]
    for ours, plain in zip(*slopes, strict=True):
        assert float((ours - plain).abs().max()) <= tolerance * float(plain.abs().max())


@pytest.mark.parametrize("length", [3, 40])
def test_the_kernel_stands_behind_sdpa_alone_and_changes_nothing(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny("llama"))
    attach(model, "prefix", length=4)
    randomize(model)
    used: list[int] = []
    plain, kernel = attention.log_sum_exp, attention._attention
    monkeypatch.setattr(attention, "log_sum_exp", lambda *a: (used.append(0), plain(*a))[1])
    monkeypatch.setattr(attention, "_attention", lambda *a: (used.append(1), kernel(*a))[1])
    x = tokens()[:, :length]
    results = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        results.append(model(x).logits)
    layers = model.config.num_hidden_layers
    assert used == [1] * layers + [0] * layers
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    q, k = torch.randn(1, 4, 64, 8, requires_grad=True), torch.randn(1, 2, 64, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        log_sum_exp(q, k, None, True, None, None, 0.3, None)
    assert sorted(kept) == [4 * 64, k.numel(), q.numel()]


def test_a_row_that_sees_nothing_is_all_prefix() -> None:
    """Rows of left padding: the mask hides every key."""
    q, k = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 3, 4, requires_grad=True)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    mask[:, :, 0] = False
    lse = log_sum_exp(q, k, mask, False, None, None, 0.5, None)
    assert float(torch.exp(lse[0, 0, 0]).detach()) == 0
    lse.sum().backward()
    assert bool(torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all())


def test_the_projection_is_dropped_on_save(tmp_path: Path) -> None:
    """"reparametrised by an MLP with Tanh during training and discarded afterwards"."""
    model = copy.deepcopy(tiny("llama"))
    model.save_pretrained(tmp_path / "base")
    attach(model, "prefix", length=4, projection=6)
    attachment = attachments(model)["prefix"]
    assert attachment.trainable() == attachment.method.count_shared([b.site for b in attachment.branches.values()])
    randomize(model)
    x = tokens()
    model(x).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in trainable_parameters(model).values())
    save(model, tmp_path / "delta", base=tmp_path / "base")
    loaded = load(tmp_path / "base", [tmp_path / "delta"])
    (again,) = attachments(loaded).values()
    assert again.pool is None and again.method.projection == 0
    assert {name for b in again.branches.values() for name in b.names} == {"key", "value"}
    torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)


def test_two_prefixes_are_one_that_is_both() -> None:
    one, both = copy.deepcopy(tiny("llama")), copy.deepcopy(tiny("llama"))
    attach(one, "prefix", length=5)
    randomize(one)
    for name, part in (("a", slice(0, 2)), ("b", slice(2, 5))):
        attach(both, "prefix", name=name, length=part.stop - part.start)
        for site, branch in attachments(both)[name].branches.items():
            whole = attachments(one)["prefix"].branches[site]
            branch.key.data, branch.value.data = whole.key.data[part], whole.value.data[part]
    torch.testing.assert_close(both(tokens()).logits, one(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["prefix", "ntk-attention", "mam"])
def test_under_autocast_it_does_nearly_what_it_does_without(method: str) -> None:
    """Queries and keys are rotated in float32 there, values are in bfloat16."""
    model, x = copy.deepcopy(tiny("llama")).eval(), tokens()
    attach(model, method)
    randomize(model)
    plain = model(x, use_cache=False).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = model(x, use_cache=False).logits.float()
    narrow.square().mean().backward()
    assert 0 < float(((narrow - plain).norm() / plain.norm()).detach()) < 0.05


def test_the_kernel_is_not_given_what_it_would_read_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """It minds neither the stride of the last dimension, nor that dtypes or sizes of heads differ."""
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    strided = torch.randn(1, 2, 4, 6).transpose(-1, -2)

    def has(*tensors: torch.Tensor) -> bool:
        return attention._has_kernel("sdpa", *tensors, True, None, {})

    assert has(q, k, v)
    assert not any((has(strided, k, v), has(q, strided, v), has(q, k, strided), has(q, k, v.bfloat16()), has(q, k, v[..., :2])))


def test_a_prefix_with_a_scale_of_nearly_nothing_is_nearly_not_there_for_those_behind_it() -> None:
    model, x = copy.deepcopy(tiny("llama")), tokens()
    for name in "ab":
        attach(model, "prefix", name=name, length=4)
    randomize(model, 2.0)
    found = []
    for factor in (0.0, 1e-6):
        scale(model, "a", factor)
        found.append(model(x).logits)
    activate(model, ["b"])
    torch.testing.assert_close(found[0], model(x).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_a_branch_with_a_scale_below_nothing_does_not_hide_those_behind_it() -> None:
    model, x = copy.deepcopy(tiny("llama")), tokens()
    for name in "ab":
        attach(model, "prefix", name=name, length=4)
    randomize(model, 2.0)
    scale(model, "a", -1.0)
    both = model(x).logits
    both.square().mean().backward()
    grads = [p.grad for n, p in trainable_parameters(model).items() if ":b" in n or ".b." in n]
    assert grads and all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in grads)
    activate(model, ["a"])
    assert not (model(x).logits == both).all(-1).any()
