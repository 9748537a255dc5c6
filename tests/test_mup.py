"""muP: factors by the width, folded into ordinary weights; the coordinate check; and ``pretrain --mup``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import tiny

import espalier
from espalier import registry
from espalier.checkpoint.directory import resolve_model
from espalier.checkpoint.safetensors_file import read_safetensors
from espalier.errors import EspalierError
from espalier.memory.joined_optimizer import build
from espalier.train.mup import Width, coordinates, kind_of, options, slope, start, width_of, widths


def model(width: int, kind: str = "Llama", **more: Any) -> transformers.PreTrainedModel:
    given: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0, **more,
    }  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**given))


def test_the_factors_are_those_of_the_paper_with_the_multiplier_of_the_output_folded_in() -> None:
    """"Hidden matrices: init std / sqrt(m), lr / m; readout: multiply the output by 1/m, init as at base width, lr unchanged; input and
    all vectors: init std and lr unchanged. For SGD: input lr x m, hidden lr x1, readout lr x m\""""
    m = 8.0
    assert width_of("hidden", m, m) == Width(m**-0.5, 1 / m, 1.0)
    assert width_of("input", 1.0, m) == width_of("vector", 1.0, m) == Width(1.0, 1.0, m)
    assert width_of("output", m, 1.0) == Width(1.0, 1.0, m).folded(1 / m) == Width(1 / m, 1 / m, 1 / m)
    kinds = {role: kind_of(role) for role in ("attention.q", "mlp.down", "experts.gate_up", "attention.q.bias", "norm", "embedding.position", "head", "router")}
    assert list(kinds.values()) == ["hidden", "hidden", "hidden", "vector", "vector", "input", "output", "output"]


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_a_multiplier_folded_into_a_weight_is_the_same_training(rule: str) -> None:
    """W = c w: initial values and Adam's rate times c, SGD's times c^2 (the symmetry of arXiv:2011.14522, section 3)."""
    x, y = (torch.randn(20, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (0, 1))
    first, ends = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64), []
    for c, folded in ((0.125, Width()), (1.0, Width().folded(0.125))):
        weight = torch.nn.Parameter(first * folded.initial)
        rate = 0.05 * getattr(folded, rule)
        optimizer: Any = torch.optim.Adam([weight], lr=rate, eps=1e-30) if rule == "adam" else torch.optim.SGD([weight], lr=rate)
        for _ in range(20):
            optimizer.zero_grad()
            (torch.tanh(c * x @ weight.T) - y).square().mean().backward()
            optimizer.step()
        ends.append(c * weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(ends[0], 0.125 * first)


def test_at_the_width_of_the_base_nothing_is_another() -> None:
    for family in ("llama", "gpt2", "gemma2", "qwen3", "mixtral"):
        assert set(widths(tiny(family), tiny(family)).values()) == {Width()}


def trained(size: int, is_mup: bool, heads: int = 4) -> dict[str, list[float]]:
    live, base = model(size, num_attention_heads=heads), model(32, num_attention_heads=4)
    factors = widths(live, base) if is_mup else dict.fromkeys(dict(live.named_parameters()), Width())
    start(live, factors)
    rule = registry.make("adamw", "optimizer")
    rates = {name: options(factors[name], 0.0, "adam", True) for name in factors}
    batches = [torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(7))] * 4
    return coordinates(live, batches, build(rule.build, dict(live.named_parameters()), 0.01, rates))


@pytest.mark.parametrize("grows", ["head_dim", "heads"])
def test_coordinates_stay_as_the_width_grows_under_mup_and_grow_without(grows: str) -> None:
    """"After 3 steps the mean |activation| per layer" does not follow the width under muP, and does under the usual parametrization."""
    sizes = (32, 64, 128, 256)
    for is_mup in (True, False):
        found = [trained(size, is_mup, size // 8 if grows == "heads" else 4) for size in sizes]
        slopes = {name: slope(sizes, [one[name][-1] for one in found]) for name in found[0]}
        blocks = [value for name, value in slopes.items() if name[0].isdigit()]
        assert len(blocks) == 6 and len(found[0]["logits"]) == 4
        if is_mup:
            assert max(map(abs, slopes.values())) < 0.5, slopes
        else:
            assert min(blocks) > 1 and slopes["logits"] > 0.4, slopes


def test_attention_by_head_dim_is_folded_into_the_queries_alone() -> None:
    found = widths(model(128, attention_bias=True), model(32, attention_bias=True))
    hidden, q = found["model.layers.0.self_attn.k_proj.weight"], found["model.layers.0.self_attn.q_proj.weight"]
    assert hidden == Width(0.5, 0.25, 1.0) and q == hidden.folded(0.5), "head_dim is 4 times as large: 1 / d where it was 1 / sqrt(d)"
    assert found["model.layers.0.self_attn.q_proj.bias"] == Width(1.0, 1.0, 4.0).folded(0.5)
    assert found["model.layers.0.self_attn.k_proj.bias"] == Width(1.0, 1.0, 4.0)
    fixed = widths(model(128, head_dim=8), model(32, head_dim=8))
    assert fixed["model.layers.0.self_attn.q_proj.weight"] == Width(0.5, 0.25, 0.25), "as wide a head: nothing to fold"
    own = widths(model(128, "Granite", attention_multiplier=1 / 32), model(32, "Granite", attention_multiplier=1 / 8))
    assert own["model.layers.0.self_attn.q_proj.weight"] == hidden, "where the config says it, it is not said again"


def test_a_multiplier_of_the_config_takes_the_place_of_what_would_be_folded() -> None:
    scaled = {"tie_word_embeddings": True, "attention_multiplier": 0.1, "head_dim": 8}
    found = widths(model(128, "Granite", logits_scaling=16.0, **scaled), model(32, "Granite", logits_scaling=4.0, **scaled))
    assert found["model.embed_tokens.weight"] == Width(1.0, 1.0, 4.0)
    untied = {**scaled, "tie_word_embeddings": False}
    found = widths(model(128, "Granite", logits_scaling=8.0, **untied), model(32, "Granite", logits_scaling=4.0, **untied))
    assert found["lm_head.weight"] == Width(1.0, 1.0, 4.0).folded(0.5)


@pytest.mark.parametrize(
    ("wide", "narrow", "complaint"),
    [
        (("Llama", {"tie_word_embeddings": True}), ("Llama", {"tie_word_embeddings": True}), r"are one parameter.*divide the logits by 4 where the config can"),
        (("GPT2", {}), ("GPT2", {}), r"keeps q, k and v in one matrix.*head_dim is 32 and the base's 8: keep it"),
        (("Qwen3", {"head_dim": 16}), ("Qwen3", {"head_dim": 8}), r"has a norm of its queries \(.*q_norm.weight\)"),
        (("Llama", {"num_hidden_layers": 3}), ("Llama", {}), r"the base model lacks model\.layers\.2\."),
        (("OPT", {"word_embed_proj_dim": 16}), ("OPT", {"word_embed_proj_dim": 16}), r"the part of .*project_out.* \(projection\) in the width of this opt model"),
    ],
)  # fmt: skip
def test_what_cannot_be_folded_is_refused(wide: tuple[str, dict[str, Any]], narrow: tuple[str, dict[str, Any]], complaint: str) -> None:
    def made(width: int, kind: str, more: dict[str, Any]) -> transformers.PreTrainedModel:
        if kind == "GPT2":
            more = {"n_embd": width, "n_layer": 2, "n_head": 4, **more}
        return model(width, kind, **more)

    with pytest.raises(EspalierError, match=complaint):
        widths(made(128, *wide), made(32, *narrow))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mup")
    for width in (32, 128):
        model(width, vocab_size=4096).config.save_pretrained(folder / str(width))
    transformers.AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder / "tokenizer")
    (folder / "text.txt").write_text("".join(f"def double_{i}(x):\n    return x * {2 * i}\n\n\n" for i in range(60)))
    return folder


def pretrained(work: Path, out: Path, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "architecture": str(work / "128" / "config.json"), "tokenizer": str(work / "tokenizer"), "steps": 1, "batch_size": 2, "sequence_length": 32,
        "learning_rate": 0.001, "warmup": 0.0, "clip": 0.0, "dtype": "fp32", "threads": 1, "quiet": True, "checkpoint_every": 1,
    }  # fmt: skip
    return espalier.pretrain(str(work / "text.txt"), str(out), **{**given, **more})


def test_pretrain_starts_and_steps_by_the_width_and_stores_an_ordinary_model(work: Path, tmp_path: Path) -> None:
    pretrained(work, tmp_path / "out", mup=str(work / "32" / "config.json"), weight_decay=0.1)
    before, after = (read_safetensors(tmp_path / "out" / "run" / "checkpoints" / f"step-0000000{n}" / "trained.safetensors") for n in (0, 1))
    expected = {"mlp.up_proj": (0.02 / 2, 0.25), "k_proj": (0.02 / 2, 0.25), "q_proj": (0.02 / 4, 0.125), "lm_head": (0.02 / 4, 0.25), "embed_tokens": (0.02, 1.0)}
    for part, (deviation, rate) in expected.items():
        name = next(name for name in before if part in name)
        assert float(before[name].std()) == pytest.approx(deviation, rel=0.05), part
        kept = before[name] * (1 - 0.001 * 0.1)  # the decay is the same for all, whatever their rates
        assert float((after[name] - kept).abs().max()) == pytest.approx(0.001 * rate, rel=0.02), part
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stored(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert "mup" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_trains_whole_beside_the_targets_has_its_rates_too(work: Path, tmp_path: Path) -> None:
    ends = []
    for targets in ("all", "attention"):
        pretrained(work, tmp_path / targets, mup=str(work / "32" / "config.json"), targets=targets)
        ends.append(read_safetensors(tmp_path / targets / "model.safetensors"))
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("optimizer", ["muon", "adafactor", "galore", "mezo"])
def test_an_optimizer_whose_steps_go_otherwise_is_refused(optimizer: str, work: Path, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=f"how the steps of the optimizer {optimizer} go by the width is not known"):
        pretrained(work, tmp_path / "out", mup=str(work / "32" / "config.json"), optimizer=optimizer)
    assert not (tmp_path / "out").exists()
