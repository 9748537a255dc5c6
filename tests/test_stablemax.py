"""StableMax (arXiv:2501.04697): the chunked loss against the formula, and what it keeps where softmax gives nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoTokenizer

import espalier
from espalier.checkpoint.directory import resolve_model
from espalier.data.batches import IGNORED
from espalier.errors import EspalierError
from espalier.memory.chunked_loss import chunked_cross_entropy
from espalier.memory.class_loss import ClassLoss
from espalier.memory.stablemax import losses_and_gradient, stablemax_losses
from espalier.memory.training_form import training_form


def s(x: torch.Tensor) -> torch.Tensor:
    """s(x) by its definition, number by number, in float64."""
    return torch.tensor([v + 1 if v >= 0 else 1 / (1 - v) for v in x.double().flatten().tolist()], dtype=torch.float64).view(x.shape)


def naive(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(s(logits) / s(logits).sum(-1, keepdim=True)).gather(-1, targets[:, None]).log().squeeze(-1)


@given(count=st.integers(1, 30), chunk=st.integers(1, 40), size=st.floats(0.01, 1e4), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40, database=None)
def test_the_chunked_loss_is_that_of_the_formula_in_float64_and_its_gradients_those_of_autograd(count: int, chunk: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(count, 8, generator=generator) * size, torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (count,), generator=generator)
    targets[torch.rand(count, generator=generator) < 0.3] = IGNORED
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    kept, logits = targets >= 0, hidden @ weight.T
    wanted = stablemax_losses(logits[kept], targets[kept])
    torch.testing.assert_close(wanted.detach(), naive(logits[kept].detach(), targets[kept]), rtol=1e-9, atol=1e-12)
    found = chunked_cross_entropy(hidden, targets, lambda x: x @ weight.T, [weight], 0.1, chunk, kind="stablemax")
    torch.testing.assert_close(found, (wanted.sum() * 0.1).float(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted.sum() * 0.1, leaves), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    logits = torch.tensor([[-3.0, 0.0, 2.0, 1e-3, -1e-3]] * 2, dtype=torch.float64)
    targets = torch.tensor([2, 0])
    assert torch.autograd.gradcheck(lambda x: stablemax_losses(x, targets), [(logits + 0.01).requires_grad_()])
    gradient = losses_and_gradient(logits.float(), targets)[1]
    own = logits.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(stablemax_losses(own, targets).sum(), own)[0].float(), rtol=1e-5, atol=1e-7)


def test_it_sums_to_one_is_monotone_and_has_slope_one_on_both_sides_of_zero_and_the_argmax_is_unchanged() -> None:
    x = torch.linspace(-50, 50, 2001, dtype=torch.float64)
    probabilities = torch.stack([(-stablemax_losses(x[None], torch.tensor([j]))).exp()[0] for j in range(0, 2001, 100)])
    assert (probabilities.diff() > 0).all() and float((s(x) / s(x).sum()).sum()) == pytest.approx(1)
    assert all(float(s(torch.tensor([e])) - 1) / e == pytest.approx(1, abs=1e-5) for e in (1e-6, -1e-6))
    logits = torch.randn(100, 20)
    assert torch.equal(s(logits).argmax(-1), logits.argmax(-1))


def test_no_sample_has_a_gradient_of_zero_where_nearly_all_have_one_under_softmax() -> None:
    """Softmax collapse: "the fraction of samples with exactly-zero gradient is 0 under StableMax where it is > 0.9 under softmax"."""
    logits = torch.randn(200, 113, generator=torch.Generator().manual_seed(0))
    targets = logits.argmax(-1)
    logits = (logits + 130 * functional.one_hot(targets, 113)).requires_grad_()
    fractions = {}
    for kind in ("cross_entropy", "stablemax"):
        found = chunked_cross_entropy(logits, targets, lambda x: x * 1, [], 1.0, 64, kind=kind)  # type: ignore[arg-type]
        gradient = torch.autograd.grad(found, [logits])[0]
        fractions[kind] = float((gradient == 0).all(-1).float().mean())
        assert (float(found.detach()) > 0) == (kind == "stablemax")
    assert fractions["stablemax"] == 0 and fractions["cross_entropy"] > 0.9


def test_under_softmax_a_net_that_is_sure_of_itself_stops_and_under_stablemax_it_goes_on() -> None:
    """Gradient descent from a point where all answers are right by far: the margin still grows under StableMax, and not a bit moves under softmax."""
    moved = {}
    for kind in ("cross_entropy", "stablemax"):
        weight = torch.eye(7).mul_(120).requires_grad_()
        before = weight.detach().clone()
        for _ in range(20):
            found = chunked_cross_entropy(torch.eye(7), torch.arange(7), lambda x, w=weight: x @ w.T, [weight], 1.0, 3, kind=kind)  # type: ignore[arg-type,misc]
            weight.grad = None
            found.backward()
            with torch.no_grad():
                weight -= 10 * weight.grad
        moved[kind] = not torch.equal(weight.detach(), before)
    assert moved == {"cross_entropy": False, "stablemax": True}


def test_classifiers_have_it_too() -> None:
    class Plain(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> object:
            return type("Output", (), {"logits": logits})()

    live = type("Live", (ClassLoss, Plain), {})()
    logits, targets = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 2, 0])
    found = live(logits, targets=targets, scale=0.2, kind="stablemax")
    assert float(found.detach()) == pytest.approx(0.2 * float(naive(logits.detach(), targets).sum()), rel=1e-6)
    weighted = live(logits, targets=targets, scale=1.0, kind="stablemax", weights=torch.tensor([0.0, 2, 0, 0, 0]))
    assert float(weighted.detach()) == pytest.approx(2 * float(naive(logits.detach(), targets)[1]), rel=1e-6)


def test_a_model_in_training_form_gives_the_loss_of_its_own_logits() -> None:
    live, ids = tiny("llama"), tokens()
    targets = ids.roll(-1, 1).reshape(-1)
    expected = naive(live(ids).logits.detach().flatten(0, 1), targets).mean()
    with training_form(live, chunk=5, recompute=False, padded=True):
        found = live(input_ids=ids, attention_mask=torch.ones_like(ids), targets=targets, scale=1 / len(targets), kind="stablemax")
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_tune_and_pretrain_train_on_it_and_measure_as_before(tmp_path: Path) -> None:
    text, base = tmp_path / "text.txt", tmp_path / "base"
    text.write_text("".join(f"def double_{i}(x):\n    return x * {2 * i}\n\n\n" for i in range(60)))
    tiny("llama", vocab_size=4096).save_pretrained(base)
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(base)
    options: dict[str, Any] = {"batch_size": 2, "sequence_length": 32, "steps": 8, "threads": 1, "quiet": True, "checkpoint_every": 0, "learning_rate": 0.01}
    plain = espalier.tune(str(base), str(text), str(tmp_path / "plain"), method="full", eval_data=[str(text)], **options)
    options["loss"] = "stablemax"
    found = espalier.tune(str(base), str(text), str(tmp_path / "delta"), method="full", eval_data=[str(text)], **options)
    assert found["final_loss"] < found["first_loss"] != plain["first_loss"]
    assert found["evaluation"][str(text)]["before"] == plain["evaluation"][str(text)]["before"]
    assert json.loads((tmp_path / "delta" / "delta.json").read_text())["training"]["loss"] == "stablemax"
    again = espalier.pretrain(str(text), str(tmp_path / "model"), model=str(base), dtype="fp32", warmup=0.05, floor=0.0, **options)
    assert again["first_loss"] == pytest.approx(found["first_loss"], rel=1e-4)
    with pytest.raises(EspalierError, match=r"label_smoothing is 0\.1, which goes with the loss cross_entropy"):
        espalier.tune(str(base), str(text), str(tmp_path / "no"), label_smoothing=0.1, **options)
