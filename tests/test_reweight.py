"""Loss-based sample reweighting (arXiv:2502.06733): the weights, and what a step makes of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch.nn import functional
from transformers import AutoTokenizer

import espalier
from espalier.checkpoint.directory import resolve_model
from espalier.data.batches import IGNORED, Batch, assemble
from espalier.errors import EspalierError
from espalier.memory.training_form import training_form
from espalier.train.reweight import weights
from espalier.train.steps import Losses, accumulate

SHAPES = ("linupper", "quadratic", "extremes")


def test_the_weights_are_those_of_the_paper() -> None:
    """``h_i = (2 l_i - max - min) / (max - min)``; LinUpper ``min(h + 1, 1)``, Quadratic ``1 - h^2``, Extremes ``|h|``; softmax of f / r."""
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0])
    h = torch.tensor([-1.0, -0.5, 0.0, 1.0], dtype=torch.float64)
    for shape, f in zip(SHAPES, ((h + 1).clamp(max=1), 1 - h**2, h.abs()), strict=True):
        torch.testing.assert_close(weights(losses, shape, 0.5), (f / 0.5).softmax(0))  # type: ignore[arg-type]
    easy, known, middle, hard = weights(losses, "linupper", 1.0)
    assert easy < known < middle and middle == hard


@pytest.mark.parametrize("shape", SHAPES)
def test_they_sum_to_one_mind_no_shift_nor_scale_and_are_equal_for_a_large_temperature_or_equal_losses(shape: Any) -> None:
    losses = torch.rand(16, generator=torch.Generator().manual_seed(1))
    found = weights(losses, shape, 0.7)
    assert float(found.sum()) == pytest.approx(1)
    torch.testing.assert_close(weights(3 * losses + 11, shape, 0.7), found, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(losses, shape, 1e12), torch.full((16,), 1 / 16, dtype=torch.float64))
    assert torch.equal(weights(torch.full((4,), 2.5), shape, 0.1), torch.full((4,), 0.25, dtype=torch.float64))
    with pytest.raises(EspalierError, match="reweight_temperature is 0"):
        weights(losses, shape, 0)


def batches(micro: int, padded: bool, lengths: tuple[int, ...] = (12, 9, 12, 5)) -> list[Batch]:
    """Windows of these lengths, ``micro`` of them in each micro-batch; the last two thirds of each are predicted."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 90, (n + 1,), generator=generator).numpy() for n in lengths]
    made = []
    for start in range(0, len(rows), micro):
        some = rows[start : start + micro]
        targets = [row[1:].copy() for row in some]
        for own in targets:
            own[: len(own) // 3] = IGNORED
        made.append(assemble([row[:-1] for row in some], targets, 64, padded))
    return made


def gradients(live: torch.nn.Module, some: list[Batch], padded: bool, weigh: Any = None, kind: Any = "cross_entropy") -> tuple[float, dict[str, torch.Tensor]]:
    live.zero_grad()
    with training_form(live, chunk=7, recompute=False, padded=padded):  # type: ignore[arg-type]
        loss = accumulate(Losses(live, kind=kind), some, weigh)
    return loss, {name: p.grad.clone() for name, p in live.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], share: float = 2e-5) -> None:
    for name, gradient in one.items():
        assert (gradient - other[name]).norm() <= share * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("kind", ["cross_entropy", "stablemax"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_is_one_over_the_weighted_losses_however_it_is_accumulated(padded: bool, kind: Any) -> None:
    live = tiny("llama")
    live.train()
    weigh = functools.partial(weights, shape="linupper", temperature=0.4)
    loss, whole = gradients(live, batches(4, padded), padded, weigh=weigh, kind=kind)
    for micro in (1, 2):
        mean, own = gradients(live, batches(micro, padded), padded, weigh=weigh, kind=kind)
        assert mean == pytest.approx(loss, rel=1e-5)
        assert_same(own, whole)
    plain, unweighted = gradients(live, batches(2, padded), padded, kind=kind)
    assert plain == pytest.approx(loss, rel=1e-5), "what is reported is the loss without weights"
    assert any((unweighted[n] - whole[n]).norm() > 0.05 * whole[n].norm() for n in whole)
    if kind == "cross_entropy":
        live.zero_grad()
        parts, total = [], sum(batch.target_count for batch in batches(1, True))
        for batch in batches(1, True):
            logits = live(batch.input_ids).logits.flatten(0, 1)
            parts.append(functional.cross_entropy(logits[batch.rows] if batch.rows is not None else logits, batch.targets, reduction="sum", ignore_index=IGNORED))
        counts = torch.tensor([batch.target_count for batch in batches(1, True)])
        w = weigh(torch.stack(parts).detach() / counts)
        (sum(len(w) * w[i] * part for i, part in enumerate(parts)) / total).backward()  # type: ignore[union-attr]
        assert_same(whole, {name: p.grad for name, p in live.named_parameters() if p.grad is not None})


def test_a_large_temperature_is_the_ordinary_loss() -> None:
    live = tiny("llama")
    _, plain = gradients(live, batches(2, False), False)
    _, equal = gradients(live, batches(2, False), False, weigh=functools.partial(weights, shape="linupper", temperature=1e15))
    assert_same(plain, equal, 1e-6)


def test_a_class_is_weighted_text_by_text_and_sequences_without_a_target_count_for_nothing() -> None:
    some = batches(2, False, (9, 6))[0]
    assert some.windows.tolist() == [window for window, kept in ((0, 6), (1, 4)) for _ in range(kept)] + [0] * (len(some.targets) - 10)
    texts = Batch(torch.zeros(3, 5), torch.zeros(3, 5), torch.tensor([1, 0, 1]), None, (5, 4, 5), 14, torch.ones(3, 5))
    assert texts.windows.tolist() == [0, 1, 2]
    live = tiny("llama")
    empty = batches(1, False, (8, 2))  # a third of two is none, so both are kept; then make the second one empty
    empty[1].targets.fill_(IGNORED)
    seen: list[int] = []

    def weigh(losses: torch.Tensor) -> torch.Tensor:
        seen.append(len(losses))
        return weights(losses, "linupper", 1.0)

    _, own = gradients(live, empty, False, weigh=weigh)
    assert seen == [1]
    assert_same(gradients(live, empty, False)[1], own)


def test_a_step_without_any_target_is_not_weighted() -> None:
    live = tiny("llama")
    empty = batches(1, False, (8, 6))
    for batch in empty:
        batch.targets.fill_(IGNORED)
    loss, own = gradients(live, empty, False, weigh=functools.partial(weights, shape="linupper", temperature=1.0))
    assert loss == 0 and all(not bool(gradient.any()) for gradient in own.values())


def test_a_run_is_weighted_after_its_warm_up_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Dropout is the same in both passes, and what a step does depends on nothing but its number and its data."""
    text, base = tmp_path / "text.txt", str(tmp_path / "base")
    tiny("llama", vocab_size=4096).save_pretrained(base)
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(base)
    text.write_text("".join(f"def double_{i}(x):\n    return x * {2 * i}\n\n\n" for i in range(60)))
    options: dict[str, Any] = {
        "batch_size": 4, "sequence_length": 32, "steps": 6, "threads": 1, "quiet": True, "warmup": 0.34, "dropout": 0.2, "micro_batch_size": 2,
        "checkpoint_every": 3, "learning_rate": 0.01,
    }  # fmt: skip
    runs = {}
    for name, more in (("plain", {}), ("weighted", {"reweight": "linupper", "reweight_temperature": 0.3})):
        espalier.tune(base, str(text), str(tmp_path / name), **options, **more)
        runs[name] = [json.loads(line)["loss"] for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
    assert runs["plain"][:2] == runs["weighted"][:2] and runs["plain"][2] == pytest.approx(runs["weighted"][2], rel=1e-6)
    assert runs["plain"][3:] != runs["weighted"][3:]
    bits = (tmp_path / "weighted" / "delta.safetensors").read_bytes()
    last = tmp_path / "weighted" / "run" / "checkpoints" / "step-00000006"
    for file in (*last.iterdir(), tmp_path / "weighted" / "run" / "result.json", tmp_path / "weighted" / "delta.safetensors"):
        file.unlink()
    last.rmdir()
    espalier.tune(base, str(text), str(tmp_path / "weighted"), resume=True, **options, reweight="linupper", reweight_temperature=0.3)
    assert (tmp_path / "weighted" / "delta.safetensors").read_bytes() == bits


@pytest.mark.parametrize(("option", "value", "known"), [("reweight", "linuper", "linupper, quadratic"), ("loss", "stablemx", "cross_entropy, stablemax"), ("schedule", "cosin", "cosine, linear")])
def test_a_misspelt_choice_is_refused_and_nothing_else_is_taken(option: str, value: str, known: str) -> None:
    with pytest.raises(EspalierError, match=f"{option} is '{value}'; it must be one of: {known}"):
        espalier.tune("seedling", "stdlib:asyncio:train", "out", method="lora", **{option: value})
