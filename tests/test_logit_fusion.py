"""Dynamic logit fusion: the equations in float64, decoding with kept keys and values, and experts that share a live base."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

import espalier
from espalier.attach.attachment import activate, attach, attachments, detach, trainable_parameters
from espalier.attach.load import load, load_tokenizer
from espalier.data.encode import Encoder
from espalier.errors import EspalierError
from espalier.evaluate.logit_fusion import (
    EVALUATIONS,
    LARGEST,
    Decoding,
    Fusion,
    Voice,
    divergences,
    fuse,
    require_one_vocabulary,
)
from espalier.exchange.save import save
from espalier.verbs.generate import generate


def noise(seed: int, *shape: int, by: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * by


def KL(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p||q) of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def paper(large: torch.Tensor, base: torch.Tensor, experts: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The objective as the paper writes it, in float64; logits (V,), experts (T, V), alpha (..., T)."""
    large, base, experts, alpha = large.double(), base.double(), experts.double(), alpha.double()
    P, Q, Qt = large.log_softmax(-1), base.log_softmax(-1), experts.log_softmax(-1)
    moved = (large + alpha @ (experts - base)).log_softmax(-1)
    there, back = KL(moved, P), KL(P, moved)
    return sum((there - KL(q, Q)).square() + (back - KL(Q, q)).square() for q in Qt)  # type: ignore[return-value]


def logits(seed: int, experts: int = 1, size: int = 50, by: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    base = noise(seed + 1, size, by=2.0)
    return noise(seed, size, by=2.0), base, base + noise(seed + 2, experts, size, by=by)


# the equations


@pytest.mark.parametrize("seed", range(6))
def test_alpha_is_the_one_that_a_fine_grid_in_float64_finds(seed: int) -> None:
    large, base, experts = logits(10 * seed, by=0.3 + 0.3 * seed)
    found = fuse(large, base, experts)
    grid = torch.linspace(0, LARGEST, 20001, dtype=torch.float64)[:, None]
    values = paper(large, base, experts, grid)
    assert float(found.alpha) == pytest.approx(float(grid[values.argmin()]), abs=0.002)
    assert float(found.objective) == pytest.approx(float(paper(large, base, experts, found.alpha)), rel=1e-3, abs=1e-6)
    assert float(found.objective) <= float(values.min()) * 1.001 + 1e-5
    assert EVALUATIONS == 48


@pytest.mark.parametrize("seed", range(3))
def test_divergences_are_those_of_the_distributions(seed: int) -> None:
    log_p, shift = noise(seed, 4, 30).log_softmax(-1), noise(seed + 9, 4, 30)
    moved = (log_p + shift).log_softmax(-1)
    torch.testing.assert_close(divergences(log_p, shift), torch.stack((KL(moved, log_p), KL(log_p, moved)), -1), rtol=1e-4, atol=1e-5)


def test_an_expert_that_is_its_base_leaves_the_large_model_as_it_is() -> None:
    large, base, _ = logits(0)
    for alpha in (None, 1.0, 1.7):
        found = fuse(large, base, base[None], alpha=alpha)
        torch.testing.assert_close(found.log_probabilities, large.log_softmax(-1))
        assert float(found.objective) == pytest.approx(0, abs=1e-9)


def test_of_the_small_base_itself_alpha_is_one_with_objective_zero() -> None:
    _, base, experts = logits(3)
    found = fuse(base, base, experts)
    assert float(found.alpha) == pytest.approx(1, abs=0.002) and float(found.objective) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(found.log_probabilities, experts[0].log_softmax(-1), rtol=1e-2, atol=1e-2)


def test_a_fixed_alpha_of_one_is_proxy_tuning() -> None:
    large, base, experts = logits(4)
    torch.testing.assert_close(fuse(large, base, experts, alpha=1.0).log_probabilities, (large + experts[0] - base).log_softmax(-1))


def test_the_objective_is_never_negative_and_constants_in_logits_do_not_matter() -> None:
    for seed in range(5):
        large, base, experts = logits(seed, experts=2, by=3.0)
        found, moved = fuse(large, base, experts), fuse(large + 5, base - 3, experts + 40)
        assert float(found.objective) >= 0
        torch.testing.assert_close(moved.alpha, found.alpha, rtol=0, atol=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_of_several_experts_one_acts_the_one_of_least_objective(seed: int) -> None:
    large, base, experts = logits(20 * seed, experts=3)
    found = fuse(large, base, experts)
    assert int((found.alpha > 0).sum()) == 1
    grid = torch.linspace(0, LARGEST, 2001, dtype=torch.float64)[:, None]
    least = min(float(paper(large, base, experts, grid * torch.eye(3).double()[t]).min()) for t in range(3))
    assert float(found.objective) == pytest.approx(least, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_all_experts_together_are_at_least_as_good_as_one_and_near_the_best_of_a_grid(seed: int) -> None:
    large, base, experts = logits(20 * seed, experts=2)
    one, together = fuse(large, base, experts), fuse(large, base, experts, active="all")
    grid = torch.tensor(list(itertools.product(torch.linspace(0, LARGEST, 101).tolist(), repeat=2)), dtype=torch.float64)
    least = float(paper(large, base, experts, grid).min())
    start = float(paper(large, base, experts, torch.zeros(2)))
    assert float(together.objective) <= float(one.objective)
    assert float(together.objective) <= least + 0.02 * (start - least)


def test_positions_are_fused_side_by_side() -> None:
    cases = [logits(7 * i, experts=2) for i in range(4)]
    large, base, experts = (torch.stack([case[part] for case in cases], -2) for part in range(3))
    for active in ("one", "all"):
        found = fuse(large, base, experts, active=active)  # type: ignore[arg-type]
        for i, case in enumerate(cases):
            alone = fuse(*case, active=active)  # type: ignore[arg-type]
            torch.testing.assert_close(found.alpha[i], alone.alpha)
            torch.testing.assert_close(found.log_probabilities[i], alone.log_probabilities)


# decoding


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> Path:
    """A tiny model and two deltas of it."""
    root: Path = tmp_path_factory.mktemp("small")
    tiny("llama").save_pretrained(root / "base")
    for seed, method in ((1, "lora"), (2, "dora")):
        model = load(root / "base")
        attach(model, method, rank=2, targets="linear", seed=seed)
        with torch.no_grad():
            for number, parameter in enumerate(trainable_parameters(model).values()):
                parameter.add_(noise(seed + number, *parameter.shape, by=0.1))
        save(model, root / str(seed), base=str(root / "base"))
    return root


def test_only_the_deltas_that_are_activated_act_and_detaching_gives_the_base_back(small: Path) -> None:
    ids = tokens()
    both = load(small / "base", [small / "1", small / "2"])
    names = list(attachments(both))
    with torch.no_grad():
        plain, one, two, chain = (load(small / "base", d)(ids).logits for d in ([], [small / "1"], [small / "2"], [small / "1", small / "2"]))
        for active, expected in (([], plain), (names[:1], one), (names[1:], two), (names, chain), (names[:1], one)):
            activate(both, active)
            torch.testing.assert_close(both(ids).logits, expected)
    with pytest.raises(EspalierError, match="carries no delta called 'other'"):
        activate(both, ["other"])
    activate(both, [])
    detach(both)
    assert type(both.model.layers[0].mlp.up_proj) is torch.nn.Linear and torch.equal(both(ids).logits, plain)


def test_kept_keys_and_values_give_what_whole_texts_give_and_each_token_is_read_once(small: Path) -> None:
    shared = load(small / "base", [small / "1", small / "2"])
    names = list(attachments(shared))
    large = tiny("llama", seed=5)
    fusion = Decoding(Fusion(None, "one"), Voice(shared), [Voice(shared, (name,)) for name in names])
    read, alphas = [], []
    handle = shared.model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].shape[1]))
    ids = tokens()[:1, :5]
    made = []
    with torch.no_grad():
        for _ in range(4):
            made.append(fusion(ids, large(ids).logits[:, -1]))
            ids = torch.cat([ids, made[-1].argmax(-1, keepdim=True)], -1)
        handle.remove()
        assert read == [5] * 3 + [1] * 9, "the prompt once, then one token, for the base and both experts"
        apart = [load(small / "base", d) for d in ([], [small / "1"], [small / "2"])]
        for step, expected in enumerate(made):
            text = ids[:, : 5 + step]
            base, *experts = (model(text).logits[:, -1] for model in apart)
            fused = fuse(large(text).logits[:, -1], base, torch.stack(experts))
            torch.testing.assert_close(expected, fused.log_probabilities, rtol=1e-4, atol=1e-4)
            alphas.append(fused.alpha[0])
    assert fusion.fusion.mean_alpha == pytest.approx(torch.stack(alphas).mean(0).tolist(), abs=0.01)


def test_rows_of_logits_beyond_the_vocabulary_are_never_drawn(small: Path) -> None:
    model = load(small / "base")
    fusion = Decoding(Fusion(1.0, "one"), Voice(model), [Voice(model)])
    with torch.no_grad():
        made = fusion(tokens()[:1, :3], noise(0, 1, 100))
    assert made.shape == (1, 100) and bool((made[:, 96:] == -torch.inf).all()) and bool(made[:, :96].isfinite().all())


# the verb


@pytest.fixture(scope="module")
def words(tmp_path_factory: Any) -> Path:
    """Deltas of seedling, and a model with another tokenizer."""
    root: Path = tmp_path_factory.mktemp("words")
    for seed in (1, 2):
        model = load("seedling")
        attach(model, "lora", rank=2, targets="attention", seed=seed)
        with torch.no_grad():
            for number, parameter in enumerate(trainable_parameters(model).values()):
                parameter.add_(noise(seed + number, *parameter.shape, by=0.02))
        save(model, root / str(seed), base="seedling")
    from espalier.checkpoint.directory import resolve_model

    shutil.copytree(resolve_model("seedling"), root / "other")
    tokenizer = json.loads((root / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = [token for token in vocabulary if len(token) > 4][:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (root / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return root


def run(**options: Any) -> dict[str, Any]:
    return generate("seedling", "def main", max_tokens=6, temperature=0, quiet=True, **options)


def test_on_its_own_base_a_fusion_writes_what_the_expert_writes(words: Path) -> None:
    """P = Q, so alpha is 1: the tuned model itself."""
    made = run(expert=[str(words / "1")], expert_base="seedling")
    assert made["completion"] == run(delta=[str(words / "1")])["completion"]
    assert made["alpha"] == [pytest.approx(1, abs=0.01)]
    assert run(expert=[str(words / "1")], expert_base="seedling", fusion_alpha=0.0)["completion"] == run()["completion"]


@pytest.mark.parametrize("options", [{}, {"fusion": "all"}, {"fusion_alpha": 1.0}])
def test_several_experts_of_either_kind_go_together(options: dict[str, Any], words: Path) -> None:
    made = run(expert=[str(words / "1"), "seedling", str(words / "2")], expert_base="seedling", **options)
    assert made["tokens"] == 6 and len(made["alpha"]) == 3 and "alpha" not in run()


def test_a_fusion_is_measured_as_it_is_decoded(words: Path, tmp_path: Path) -> None:
    """On its own base it is the tuned model; on another it is what whole forward passes give, position by position."""
    (tmp_path / "text.txt").write_text("def main(arguments):\n    return sorted(arguments)\n" * 6)
    data = str(tmp_path / "text.txt")
    measure = lambda **options: espalier.eval("seedling", data, sequence_length=32, quiet=True, **options)  # noqa: E731
    tuned, fused = measure(delta=[str(words / "1")]), measure(expert=[str(words / "1")], expert_base="seedling")
    assert fused["loss"] == pytest.approx(tuned["loss"], rel=2e-3) and fused["alpha"] == [pytest.approx(1, abs=0.01)]
    assert fused["confidence"] == pytest.approx(tuned["confidence"], rel=5e-3) and fused["tokens"] == tuned["tokens"]
    still = measure(expert=[str(words / "1"), str(words / "2")], expert_base="seedling", fusion_alpha=0.0)
    assert still["loss"] == pytest.approx(measure()["loss"], rel=1e-5)
    (tmp_path / "short.txt").write_text("def main(x):\n")
    options: dict[str, Any] = {"delta": [str(words / "2")], "expert": [str(words / "1"), str(words / "2")], "expert_base": "seedling"}
    found = espalier.eval("seedling", str(tmp_path / "short.txt"), sequence_length=64, dtype="fp32", quiet=True, **options)
    encoder = Encoder(load_tokenizer("seedling"))
    ids = torch.tensor([[*encoder.prefix, *encoder.ids(["def main(x):\n"])[0], *encoder.end]])
    with torch.no_grad():
        base, one, two = (load("seedling", d, dtype="fp32")(ids[:, :-1]).logits[0] for d in ([], [words / "1"], [words / "2"]))
        expected = fuse(two, base, torch.stack((one, two)))
    loss = -float(expected.log_probabilities.gather(-1, ids[0, 1:, None]).mean())
    assert found["loss"] == pytest.approx(loss, rel=1e-3) and found["tokens"] == ids.shape[1] - 1
    assert found["alpha"] == pytest.approx(expected.alpha.mean(0).tolist(), abs=0.02)


def test_what_does_not_fit_together_is_refused(words: Path) -> None:
    for options, said in [
        ({"expert": [str(words / "1")]}, "--expert and --expert-base belong together"),
        ({"expert_base": "seedling"}, "--expert and --expert-base belong together"),
        ({"fusion_alpha": 1.0}, "is of --expert"),
        ({"expert": ["seedling"], "expert_base": "seedling", "fusion_alpha": float("nan")}, "fusion_alpha is nan"),
        ({"expert": ["seedling"], "expert_base": str(words / "other")}, "logits are fused token by token, so the vocabulary must be the same"),
        ({"expert": [str(words / "other")], "expert_base": "seedling"}, "the vocabulary must be the same"),
        ({"expert": [str(words)], "expert_base": "seedling"}, "is no delta"),
    ]:
        with pytest.raises(EspalierError, match=re.escape(said)):
            run(**options)


def test_a_vocabulary_that_differs_is_named_by_a_token() -> None:
    class Words:
        def __init__(self, **words: int) -> None:
            self.get_vocab = lambda: words

    with pytest.raises(EspalierError, match="has 'b' as 2, the large model's as 1"):
        require_one_vocabulary(Words(a=0, b=1), Words(a=0, b=2), "there")
