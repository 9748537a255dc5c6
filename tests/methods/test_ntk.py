"""NTK-Attention: a linear attention inside the softmax."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tiny, tokens

from espalier.attach import attention
from espalier.attach.attachment import attach, attachments, trainable_parameters


def phi(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.elu(x / x.shape[-1] ** 0.25) + 1


def attended(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, the formula of the paper taken literally) of the first layer, in float64."""
    found: list[torch.Tensor] = []
    original = attention._with_branches

    def spy(implementation: str, attend: object, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **kwargs: object) -> object:
        output, weights = original(implementation, attend, module, query, key, value, mask, **kwargs)
        if not found:
            (branch,) = module.__dict__["_espalier_heads"]
            k, v = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
            logits = query @ k.transpose(-1, -2) * kwargs["scaling"]
            scores = torch.exp(logits).tril()
            numerator = scores @ v + phi(query) @ branch.Z
            denominator = scores.sum(-1, keepdim=True) + phi(query) @ branch.k.abs()[..., None]
            found.extend((output.detach(), (numerator / denominator).transpose(1, 2).detach()))
        return output, weights

    monkeypatch.setattr(attention, "_with_branches", spy)
    model(tokens())
    return found[0], found[1]


def test_it_is_the_formula_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny("llama")).double()
    attach(model, "ntk-attention", dtype=torch.float64)
    for branch in attachments(model)["ntk-attention"].branches.values():
        torch.nn.init.normal_(branch.Z)
        torch.nn.init.normal_(branch.k)
    ours, literal = attended(model, monkeypatch)
    torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-9)


def test_built_from_a_real_prefix_it_is_linear_attention_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """"if Z, k are built from a real prefix through phi, output equals linear-attention of that prefix"."""
    model = copy.deepcopy(tiny("gpt2")).double()
    attach(model, "ntk-attention", dtype=torch.float64)
    branches = attachments(model)["ntk-attention"].branches
    keys, values = (torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    for branch in branches.values():
        branch.Z.data, branch.k.data = phi(keys).transpose(-1, -2) @ values, phi(keys).sum(1)
    ours, _ = attended(model, monkeypatch)
    with torch.no_grad():
        query = phi(torch.randn(1, 4, 3, 8, dtype=torch.float64))
        part = type("Part", (), {"Z": branches["blocks.0.heads"].Z, "k": branches["blocks.0.heads"].k, "wide": torch.float64})()
        raw = torch.randn(1, 4, 3, 8, dtype=torch.float64)
        numerator, denominator, _ = attachments(model)["ntk-attention"].method.branch(part, raw)
        scores = phi(raw) @ phi(keys).transpose(-1, -2)
    torch.testing.assert_close(numerator, scores @ values)
    torch.testing.assert_close(denominator, scores.sum(-1, keepdim=True))
    assert ours.isfinite().all() and query.isfinite().all()


def test_large_logits_neither_overflow_nor_underflow() -> None:
    """"the exp(-c) bookkeeping": logits of any size leave the output finite, and their gradients."""
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(20)
    attach(model, "ntk-attention")
    for branch in attachments(model)["ntk-attention"].branches.values():
        torch.nn.init.normal_(branch.Z)
        torch.nn.init.normal_(branch.k)
    logits = model(tokens()).logits
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_that_sees_nothing_leaves_the_tokens_alone_at_the_start(implementation: str) -> None:
    """k is zero then: the softmax of a padding row has no denominator, neither of its own nor of the branch."""
    model, x = copy.deepcopy(tiny("llama")).eval(), tokens()
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    with torch.no_grad():
        before = model(input_ids=x, attention_mask=mask).logits
    attach(model, "ntk-attention")
    after = model(input_ids=x, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(after[real], before[real], rtol=1e-5, atol=1e-5)
    after[real].square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in trainable_parameters(model).values() if p.grad is not None)
