"""Deltas on a live model: rows of a batch with deltas of their own, strengths, and what leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from families import tiny, tokens

import espalier
from espalier.attach.attachment import active, attach, attachments, detach, trainable_parameters
from espalier.errors import EspalierError


def carrying(family: str, **deltas: tuple[str, str]) -> Any:
    """A model with deltas, by name: a method and its targets; every number of theirs is away from its start."""
    model = tiny(family)
    for seed, (name, (method, targets)) in enumerate(deltas.items()):
        attach(model, method, targets=targets, name=name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def one_by_one(model: Any, ids: torch.Tensor, names: list[Any]) -> torch.Tensor:
    found = []
    for row, own in enumerate(names):
        espalier.activate(model, own or [])
        found.append(logits(model, ids[row : row + 1]))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("family", "a", "b"),
    [
        ("llama", ("full", "norm"), ("bitfit", "norm")),
        ("qwen3", ("full", "norm"), ("lora", "linear")),  # norms of single heads
        ("gpt2", ("full", "norm,norm.bias,embedding.position"), ("hydra", "mlp")),
        ("gpt2", ("lora", "embedding.position"), ("dora", "embedding")),
        ("gemma3", ("lora", "embedding"), ("full", "norm")),
        ("bert", ("bitfit", "bias"), ("lora", "linear,head,embedding")),
        ("opt", ("lora", "linear,projection"), ("bitfit", "bias")),
        ("qwen2_moe", ("lora", "router,attention"), ("full", "*shared_expert*")),  # which see rows flattened to tokens
    ],
)
def test_rows_find_their_deltas_in_norms_biases_positions_and_flattened_inputs(family: str, a: Any, b: Any) -> None:
    model = carrying(family, a=a, b=b)
    names = [None, "b", "a", ("b", "a")]
    ids = tokens(rows=4)
    with espalier.rows(model, names):
        mixed = logits(model, ids)
    torch.testing.assert_close(mixed, one_by_one(model, ids, names), rtol=1e-5, atol=1e-5)
    assert (mixed[1:] - logits(tiny(family), ids)[1:]).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_cache_gives_every_row_its_own_text(family: str) -> None:
    model, names = carrying(family, a=("lora", "linear"), b=("dora", "linear,embedding"), c=("mos", "linear")), ["c", "b", None, "a"]
    ids = tokens(rows=4, length=5)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(1, 5, dtype=torch.long), "eos_token_id": None}
    alone = []
    for row, own in enumerate(names):
        espalier.activate(model, own or [])
        alone.append(model.generate(ids[row : row + 1], **options))
    with espalier.rows(model, names):
        mixed = model.generate(ids, **{**options, "attention_mask": torch.ones_like(ids)})
    assert torch.equal(mixed, torch.cat(alone))
    assert len({tuple(row[5:].tolist()) for row in mixed}) > 1


def test_rows_leave_no_trace_whatever_acted_before_and_however_they_end() -> None:
    model, ids = carrying("llama", a=("lora", "linear"), b=("mos", "mlp")), tokens(rows=2)
    espalier.activate(model, ["b"])
    before, classes = logits(model, ids), {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ZeroDivisionError), espalier.rows(model, ["a", None]):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), before) and active(model) == ["b"]
    assert {n: type(m) for n, m in model.named_modules()} == classes


def test_rows_under_recomputation_have_the_gradients_without() -> None:
    gradients = []
    for recompute in (False, True):
        model, ids = carrying("llama", a=("lora", "linear"), b=("dora", "linear")), tokens(rows=3)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with espalier.rows(model, ["a", None, "b"]):
            model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in trainable_parameters(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-8)


def test_what_rows_cannot_do_is_refused_in_one_line() -> None:
    model, ids = carrying("qwen3_moe", a=("lora", "experts,attention"), b=("lora", "attention")), tokens(rows=2)
    with pytest.raises(EspalierError, match="fused experts"), espalier.rows(model, ["a", "b"]):
        pass
    assert active(model) == ["a", "b"]
    with espalier.rows(model, ["a", ("a", "b")]):  # their experts are the same
        assert logits(model, ids).isfinite().all()
    sinks = carrying("gpt_oss", a=("full", "sinks"))
    with pytest.raises(EspalierError, match=r"GptOssAttention.* takes hidden_states"), espalier.rows(sinks, ["a", None]):
        pass
    model = carrying("llama", a=("lora", "linear"))
    with pytest.raises(EspalierError, match="no delta called 'x'"), espalier.rows(model, ["a", "x"]):
        pass
    with espalier.rows(model, ["a", None]):
        with pytest.raises(EspalierError, match=r"2 rows, and the batch is \(1, 12\).*not packed"):
            model(tokens(rows=1))
        for change in (lambda: detach(model), lambda: espalier.activate(model, []), lambda: attach(model, "lora", name="y")):
            with pytest.raises(EspalierError, match="leave `with rows"):
                change()
        with pytest.raises(EspalierError, match="have their deltas already"), espalier.rows(model, [None]):
            pass


def test_updates_that_add_commute_and_a_chain_with_others_is_ordered_as_attached() -> None:
    ids = tokens()
    there = logits(carrying("llama", a=("lora", "linear"), b=("lora", "linear")), ids)

    def swapped(**deltas: tuple[str, str]) -> torch.Tensor:
        """The same numbers, attached the other way round."""
        first = carrying("llama", **deltas)
        values = {n: p.detach() for n, p in first.named_parameters() if ".espalier." in n}
        second = carrying("llama", **dict(reversed(deltas.items())))
        with torch.no_grad():
            for name, parameter in second.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
        return logits(second, ids)

    torch.testing.assert_close(swapped(a=("lora", "linear"), b=("lora", "linear")), there, rtol=1e-5, atol=1e-5)
    mixed = {"a": ("ia3", "linear"), "b": ("lora", "linear")}
    model = carrying("llama", **mixed)
    assert (swapped(**mixed) - logits(model, ids)).abs().max() > 1e-3
    for order in (["a", "b"], ["b", "a"]):
        espalier.activate(model, order)
        assert torch.equal(logits(model, ids), logits(carrying("llama", **mixed), ids))


def test_a_chain_of_several_updates_is_each_applied_to_what_those_before_it_made() -> None:
    model = carrying("llama", a=("dora", "mlp"), b=("lora", "mlp"), c=("ia3", "mlp"))
    name = "model.layers.0.mlp.up_proj.weight"
    slots = [attachment.slots[name] for attachment in attachments(model).values()]
    module = model.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        weight = module.weight
        for slot in slots:
            weight = slot.update().apply(weight)
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(module(x), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_detaching_one_of_two_leaves_the_other_as_it_was_alone() -> None:
    ids = tokens()
    model = carrying("llama", a=("lora", "linear"), b=("dora", "linear"))
    detach(model, "b")
    assert torch.equal(logits(model, ids), logits(carrying("llama", a=("lora", "linear")), ids))
    attach(model, "lora", name="c")
    espalier.activate(model, ["a"])
    detach(model, "a")
    assert active(model) == [] and torch.equal(logits(model, ids), logits(tiny("llama"), ids))


def test_branches_have_strengths_exact_at_both_ends_and_act_on_all_rows_or_none() -> None:
    ids, base = tokens(), logits(tiny("llama"), tokens())
    for method in ("pfeiffer", "prefix", "prompt"):
        model = tiny("llama")
        attach(model, method, name="a")
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
        there = logits(model, ids)
        assert (there - base).abs().max() > 1e-4
        for factor, wanted in ((0, base), (1, there)):
            espalier.scale(model, "a", factor)
            assert torch.equal(logits(model, ids), wanted), method
        with pytest.raises(EspalierError, match="holds branches"), espalier.rows(model, ["a", None]):
            pass
        with espalier.rows(model, ["a", "a"]):
            assert torch.equal(logits(model, ids), there)
        with espalier.rows(model, [None, None]):
            assert torch.equal(logits(model, ids), base)
        assert torch.equal(logits(model, ids), there)
        if method == "prompt":
            with pytest.raises(EspalierError, match="there or not"):
                espalier.scale(model, "a", 0.5)


def test_changing_a_strength_recompiles_nothing() -> None:
    model, ids = carrying("llama", a=("lora", "linear")), tokens()
    espalier.scale(model, "a", 0.5)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(ids)
        frames = counter.frame_count
        for factor in (0.25, 0.0, 2.0):
            espalier.scale(model, "a", factor)
            torch.testing.assert_close(compiled(ids).logits, logits(model, ids), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == frames
    with pytest.raises(EspalierError, match="factor is nan"):
        espalier.scale(model, "a", float("nan"))
