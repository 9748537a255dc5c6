"""Sparse masks: which entries train, how many, and the subnetworks of #284."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from courses import run
from families import tiny

from espalier import diff, registry
from espalier.attach.attachment import attach, attachments, settle, stored
from espalier.attach.load import load_model
from espalier.errors import EspalierError
from espalier.kernels.philox import Numberless, Stream


def drawn(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A gradient as the statistics give it: as the model stores the parameter."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(model.get_parameter(name).shape, generator=generator, dtype=torch.float64)


def masked(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, list[Any]]:
    model = tiny(family)
    attach(model, "masked", name="d", statistics=lambda name, which: drawn(model, name), **options)
    return model, attachments(model)["d"].parts


@pytest.mark.parametrize("scope", ["matrix", "model"])
@pytest.mark.parametrize("score", ["magnitude", "smallest"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_exactly_the_share_with_the_best_magnitudes(scope: str, score: str, family: str) -> None:
    model, parts = masked(family, scope=scope, score=score, density=0.03)
    assert sum(len(p.index) for p in parts) == sum(map(parts[0].method.count, (p.target for p in parts)))
    sign = 1 if score == "magnitude" else -1
    best, rest = [], []
    for part in parts:
        weight = stored(model, part.target.name)
        weight = weight.transpose(-1, -2) if part.target.transposed else weight
        scores = sign * weight.reshape(-1).abs()
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[part.index.long()] = True
        for matrix, mask in zip(scores.view(-1, part.target.outputs * part.target.inputs), chosen.view(-1, part.target.outputs * part.target.inputs), strict=True):
            best.append(matrix[mask])
            rest.append(matrix[~mask])
            if scope == "matrix":
                assert int(mask.sum()) == part.method.each(part.target) and best[-1].min() >= rest[-1].max()
    assert scope == "matrix" or torch.cat(best).min() >= torch.cat(rest).max()


@pytest.mark.parametrize("scope", ["matrix", "model"])
def test_equal_scores_give_the_exact_number_too(scope: str) -> None:
    """Ties, also at zero: a threshold keeps another number."""
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 4).round().clamp(-1, 1))
    for score in ("magnitude", "smallest"):
        copy = tiny("llama")
        copy.load_state_dict(model.state_dict())
        attach(copy, "masked", name="d", score=score, scope=scope, density=0.07)
        parts = attachments(copy)["d"].parts
        assert sum(len(p.index) for p in parts) == sum(p.method.count(p.target) for p in parts)


@pytest.mark.parametrize(("score", "family"), [("gradient", "llama"), ("fisher", "gpt2")])
def test_scores_of_the_data_are_those_of_the_gradient(score: str, family: str) -> None:
    """A statistic is as the model stores the parameter, and supports are in the logical shape."""
    model = tiny(family)
    targets = "mlp.down"

    def statistic(name: str, which: str) -> torch.Tensor:
        assert which == score
        return drawn(model, name)

    assert registry.make("masked", "adapter", score=score, tokens=99).wanted().tokens == 99
    attach(model, "masked", name="d", targets=targets, score=score, statistics=statistic)
    for part in attachments(model)["d"].parts:
        scores = statistic(part.target.name, score).abs()
        scores = scores.transpose(-1, -2) if part.target.transposed else scores
        assert set(part.index.tolist()) == set(scores.flatten().topk(len(part.index)).indices.tolist())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_gradients_choose_anew_and_what_goes_returns_to_the_base(family: str) -> None:
    model, parts = masked(family, score="gradient", every=3, density=0.05)
    seen: list[list[dict[int, float]]] = []

    def note(step: int) -> None:
        seen.append([dict(zip(p.index.tolist(), p.method.values(p).tolist(), strict=True)) for p in parts])

    run(model, 8, note)
    for step, now in enumerate(seen):
        for part, values, before in zip(parts, now, seen[max(step - 1, 0)], strict=True):
            assert len(values) == part.method.count(part.target)
            new = set(values) - set(before)
            assert bool(new) <= (step in (3, 6)) and all(values[i] == 0 for i in new)
            base = stored(model, part.target.name)
            outside = torch.ones(base.numel(), dtype=torch.bool)
            outside[part.index.long()] = False
            if step == 7:
                assert torch.equal(part.update().apply(base).flatten()[outside], base.flatten()[outside])
    assert any(set(a) != set(b) for a, b in zip(seen[2], seen[3], strict=True))


def test_as_many_entries_as_lora_of_a_rank() -> None:
    _, parts = masked(rank=2)
    assert all(len(p.index) == 2 * sum(p.target.shape) for p in parts)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_retraining_inside_the_support_of_a_delta_leaves_the_complement_bit_identical(family: str, tmp_path: Path) -> None:
    """#284: a finished run's subnetwork, measured by `diff`, then trained again alone."""
    tiny(family).save_pretrained(tmp_path / "base")
    targets = "experts" if family == "qwen3_moe" else "mlp"
    first = attach(load_model(tmp_path / "base"), "masked", score="random", density=0.2, targets=targets)
    supports = {p.target.name: set(p.index.tolist()) for p in attachments(first)["masked"].parts}
    run(first, 3)
    settle(first).save_pretrained(tmp_path / "tuned")
    diff(str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "d"), quiet=True)
    model = attach(load_model(tmp_path / "base"), "masked", name="d", support=str(tmp_path / "d"))
    parts = attachments(model)["d"].parts
    assert {p.target.name: set(p.index.tolist()) for p in parts} == supports
    run(model, 3)
    for part in parts:
        old = stored(model, part.target.name)
        old = old.transpose(-1, -2) if part.target.transposed else old
        with torch.no_grad():
            new = part.update().apply(old)
        assert set((new != old).flatten().nonzero().flatten().tolist()) <= supports[part.target.name]
    larger = attach(load_model(tmp_path / "base"), "masked", name="d", support=str(tmp_path / "d"), tolerance=1e9)
    assert sum(len(p.index) for p in attachments(larger)["d"].parts) == 0


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="only the gradients of each matrix choose anew"):
        registry.make("masked", "adapter", every=3)
    with pytest.raises(EspalierError, match="leave scope out"):
        registry.make("masked", "adapter", score="random", scope="model")
    tiny("llama").save_pretrained(tmp_path / "base")
    model = attach(load_model(tmp_path / "base"), "lora", targets="mlp")
    from espalier.exchange.save import save

    save(model, tmp_path / "d", base=tmp_path / "base")
    with pytest.raises(EspalierError, match="leave score, scope and rank out"):
        registry.make("masked", "adapter", support=str(tmp_path / "d"), rank=3)
    with pytest.raises(EspalierError, match="changes none of the 8 parameters"):
        attach(load_model(tmp_path / "base"), "masked", targets="attention", support=str(tmp_path / "d"))


def test_without_any_gradient_nothing_could_choose_anew_and_that_is_refused() -> None:
    method = registry.make("masked", "adapter", score="gradient", every=3)
    with pytest.raises(EspalierError, match="mezo has no gradients, by which masked --every 3 chooses anew"):
        method.check_without_gradients("--optimizer mezo", is_blind=True)
    method.check_without_gradients("--update-in-backward")
    registry.make("masked", "adapter", score="gradient").check_without_gradients("--optimizer mezo", is_blind=True)


def test_a_plan_has_as_many_entries_as_the_support(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    first = attach(load_model(tmp_path / "base"), "masked", score="random", density=0.2, targets="mlp")
    run(first, 1)
    settle(first).save_pretrained(tmp_path / "tuned")
    diff(str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "d"), quiet=True)
    real, planned = (
        attach(load_model(tmp_path / "base"), "masked", name="d", support=str(tmp_path / "d"), streams=streams) for streams in (Stream, Numberless)
    )
    counts = [{p.target.name: len(p.values) for p in attachments(model)["d"].parts} for model in (real, planned)]
    assert counts[0] == counts[1] and sum(counts[0].values()) > 0
