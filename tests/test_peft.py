"""Against PEFT: the same numbers do the same, our LoRA directories are PEFT's, and PEFT's become deltas."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.attach.load import load, load_model
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.safetensors_file import read_safetensors, write_safetensors
from espalier.errors import EspalierError
from espalier.exchange.peft_import import import_adapter
from espalier.exchange.save import save
from espalier.verbs.apply import apply
from espalier.verbs.convert import convert

peft = pytest.importorskip("peft")

LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
RANK, ALPHA = 3, 5
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def quietly(make: Any, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments, **options)


def with_adapter(model: torch.nn.Module, **options: Any) -> Any:
    """The model with a PEFT LoRA whose every tensor was moved from its start."""
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": LINEAR.get(model.config.model_type), "task_type": "CAUSAL_LM", **options}
    if model.config.model_type == "gpt2":
        options.setdefault("fan_in_fan_out", True)
    made = quietly(peft.get_peft_model, model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.eval()


def base_of(family: str, folder: Path, **overrides: Any) -> Path:
    tiny(family, **overrides).save_pretrained(folder / "base")
    return folder / "base"


def adapter_of(base: Path, folder: Path, **options: Any) -> tuple[Any, Path]:
    """A PEFT model on a base, and the adapter that it wrote."""
    made = with_adapter(load_model(base), **options)
    quietly(made.save_pretrained, folder / "adapter")
    return made, folder / "adapter"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens()).logits


# the same numbers do the same


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "rank-stabilized lora", "dora"])
def test_equal_factors_give_equal_outputs_and_gradients(kind: str, family: str) -> None:
    theirs = with_adapter(tiny(family), use_dora=kind == "dora", use_rslora="stabilized" in kind)
    options = {"rank": RANK, "alpha": float(ALPHA)}
    if "stabilized" in kind:
        options["scaling"] = "rank-stabilized"
    ours = attach(tiny(family), "dora" if kind == "dora" else "lora", targets="attention,mlp", name="d", **options)
    pairs = []
    for name, slot in attachments(ours)["d"].slots.items():
        layer = theirs.base_model.model.get_submodule(name.removesuffix(".weight"))
        pairs += [(slot.A, layer.lora_A["default"].weight), (slot.B, layer.lora_B["default"].weight)]
        if kind == "dora":
            pairs.append((slot.magnitude, layer.lora_magnitude_vector["default"].weight))
    assert len(pairs) == len(trainable_parameters(ours)) == sum(p.requires_grad for p in theirs.parameters())
    with torch.no_grad():
        for mine, their in pairs:
            assert mine.shape == their.shape
            mine.copy_(their)
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)
    assert not torch.allclose(logits(ours), logits(tiny(family)), atol=0.1)
    x = tokens()
    for model in (ours, theirs):
        model(x, labels=x).loss.backward()
    for mine, their in pairs:
        torch.testing.assert_close(mine.grad, their.grad, **TOLERANCE)
    assert all(float(mine.grad.abs().max()) > 1e-4 for mine, _ in pairs)


# our directories are PEFT's


def trained(base: Path, method: str, targets: str, **options: Any) -> torch.nn.Module:
    model = attach(load_model(base), method, targets=targets, rank=RANK, alpha=float(ALPHA), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize(
    ("family", "method", "targets", "options"),
    [
        ("llama", "lora", "linear", {}),
        ("llama", "lora", "linear", {"scaling": "rank-stabilized"}),
        ("llama", "lora", "mlp", {"seed": 4}),
        ("llama", "lora", "model.layers.1.self_attn.q_proj.weight,mlp.down", {}),
        ("llama", "lora", "linear,embedding,head", {}),
        ("qwen3", "lora", "embedding", {}),
        ("gpt2", "lora", "attention,mlp", {}),
        ("gpt_neox", "lora", "attention,mlp,head", {}),
        ("llama", "dora", "linear", {}),
        ("llama", "dora", "linear,head", {}),
        ("gpt2", "dora", "attention,mlp", {}),
    ],
)
def test_peft_loads_what_we_write_as_it_is(family: str, method: str, targets: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = base_of(family, tmp_path)
    model = trained(base, method, targets, **options)
    assert save(model, tmp_path / "delta")["peft"] is None
    theirs = quietly(peft.PeftModel.from_pretrained, load_model(base), tmp_path / "delta").eval()
    fresh = quietly(peft.get_peft_model, load_model(base), peft.LoraConfig.from_pretrained(tmp_path / "delta"))
    for made in (theirs, fresh):  # the second knows the config alone: vLLM and older PEFT choose modules by it
        adapted = {n for n, m in made.base_model.model.named_modules() if hasattr(m, "lora_A")}
        assert adapted == {name.removesuffix(".weight") for name in attachments(model)[method].slots}
    torch.testing.assert_close(logits(theirs), logits(model), **TOLERANCE)
    assert not torch.allclose(logits(model), logits(load_model(base)), atol=0.1)
    # and a delta that was imported from PEFT's two files is the same delta
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / "delta" / name, tmp_path / "adapter" / name)
    convert(str(tmp_path / "adapter"), str(tmp_path / "again"), model=str(base), quiet=True)
    torch.testing.assert_close(logits(load(base, [tmp_path / "again"])), logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "method", "targets", "why"),
    [
        ("qwen2", "lora", "embedding", "tied, and PEFT adapts only one side of a tie"),
        ("gpt2", "lora", "attention,embedding", "tied"),
        ("llama", "dora", "embedding", "the form of model.embed_tokens.weight is magnitude"),
        ("llama", "dora", "linear,embedding", "the form of model.embed_tokens.weight is magnitude"),
        ("qwen3_moe", "lora", "experts", "no plain matrix"),
        ("llama", "paca", "linear", "columns"),
    ],
)
def test_what_peft_cannot_hold_is_not_written_and_the_reason_is_said(family: str, method: str, targets: str, why: str, tmp_path: Path) -> None:
    base = base_of(family, tmp_path)
    model = attach(load_model(base), method, targets=targets)
    assert why in save(model, tmp_path / "delta")["peft"]
    assert not (tmp_path / "delta" / "adapter_config.json").exists()
    load(base, [tmp_path / "delta"])


# PEFT's become deltas

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rank-stabilized": ("llama", {"use_rslora": True}),
    "with a rank pattern": ("llama", {"rank_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 2}}),
    "with an alpha pattern": ("llama", {"alpha_pattern": {"q_proj": 11, "layers.1.mlp.down_proj": 2, "model.layers.0.self_attn.v_proj": 9}}),
    "with patterns of alternatives": ("llama", {"alpha_pattern": {"q|p_proj|o_proj": 11, ".*0.*mlp.up_proj": 1}, "rank_pattern": {"k_proj|up_proj": 4}}),
    "with patterns that are prefixes of names": ("llama", {"alpha_pattern": {"proj": 40, "p_proj": 30, "up_proj": 2}}),
    "with both patterns, rank-stabilized": ("llama", {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 3, "o_proj": 8}, "use_rslora": True}),
    "on some layers": ("llama", {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]}),
    "on a regular expression": ("llama", {"target_modules": r".*layers\.0\.mlp\.(up|down)_proj"}),
    "on every linear layer": ("llama", {"target_modules": "all-linear"}),
    "with dropout": ("llama", {"lora_dropout": 0.3}),
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA with patterns": ("llama", {"use_dora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 1}}),
    "on GPT-2": ("gpt2", {}),
    "DoRA on GPT-2": ("gpt2", {"use_dora": True, "rank_pattern": {"c_fc": 2}}),
    "rank-stabilized on GPT-2": ("gpt2", {"use_rslora": True}),
    "on an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "on embedding and head": ("qwen3", {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}),
    "of Gaussian start": ("llama", {"init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_peft_wrote_becomes_a_delta(kind: str, tmp_path: Path) -> None:
    family, options = ADAPTERS[kind]
    base = base_of(family, tmp_path)
    theirs, adapter = adapter_of(base, tmp_path, **options)
    result = convert(str(adapter), str(tmp_path / "delta"), model=str(base), quiet=True)
    assert result["method"] == ("dora" if "DoRA" in kind else "lora")
    assert result["parameters"] == sum(hasattr(m, "lora_A") for m in theirs.modules())
    ours = load(base, [tmp_path / "delta"])
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)
    assert not torch.allclose(logits(ours), logits(load_model(base)), atol=0.05)
    back = quietly(peft.PeftModel.from_pretrained, load_model(base), tmp_path / "delta").eval()
    torch.testing.assert_close(logits(back), logits(theirs), **TOLERANCE)
    apply(str(base), [str(tmp_path / "delta")], str(tmp_path / "merged"), quiet=True)
    merged, found = theirs.merge_and_unload().state_dict(), ModelDirectory(tmp_path / "merged")
    assert set(found) <= set(merged)
    for name in found:
        torch.testing.assert_close(found.read(name), merged[name], **TOLERANCE)


def test_the_base_is_the_one_that_the_adapter_names_unless_said(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    _, adapter = adapter_of(base, tmp_path)
    convert(str(adapter), str(tmp_path / "delta"), quiet=True)
    assert torch.equal(logits(load(base, [tmp_path / "delta"])), logits(load(base, [tmp_path / "delta"], any_base=True)))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(EspalierError, match="does not name its base model; pass --model DIR"):
        convert(str(adapter), str(tmp_path / "other"), quiet=True)


def test_magnitudes_are_read_under_both_names_that_peft_has_used(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    theirs, adapter = adapter_of(base, tmp_path, use_dora=True)
    tensors = read_safetensors(adapter / "adapter_model.safetensors")
    assert any(name.endswith("lora_magnitude_vector") for name in tensors)
    write_safetensors(
        adapter / "adapter_model.safetensors", {n.replace("magnitude_vector", "magnitude_vector.weight"): t for n, t in tensors.items()}
    )
    convert(str(adapter), str(tmp_path / "delta"), model=str(base), quiet=True)
    torch.testing.assert_close(logits(load(base, [tmp_path / "delta"])), logits(theirs), **TOLERANCE)


# what is more than a delta can hold is refused, with one message

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "replicated layers": ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication is .*which this version does not import for LORA"),
    "an activated LoRA": ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens is \[5\]"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changed the base.*path_initial_model"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changed the base"),
    "biases of B where the layer has none": ({"lora_bias": True}, "has a bias of B, but the model's layer has none"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_adapter_is_refused_that_has(what: str, tmp_path: Path) -> None:
    options, complaint = REFUSED[what]
    base = base_of("llama", tmp_path)
    _, adapter = adapter_of(base, tmp_path, **options)
    with pytest.raises(EspalierError, match=complaint):
        convert(str(adapter), str(tmp_path / "delta"), model=str(base), quiet=True)
    assert not (tmp_path / "delta").exists()


def test_a_pickled_adapter_is_refused_and_never_opened(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    _, adapter = adapter_of(base, tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(EspalierError, match=r"has no adapter_model\.safetensors \(it holds a pickle, which is never read"):
        convert(str(adapter), str(tmp_path / "delta"), model=str(base), quiet=True)


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_one_side_of_a_tie_is_refused(side: str, tmp_path: Path) -> None:
    base = base_of("qwen2", tmp_path)
    _, adapter = adapter_of(base, tmp_path, target_modules=[side])
    with pytest.raises(EspalierError, match=r"one side of the tie (model\.embed_tokens|lm_head)\.weight = "):
        convert(str(adapter), str(tmp_path / "delta"), model=str(base), quiet=True)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    _, adapter = adapter_of(base, tmp_path)
    for family, overrides, complaint in (
        ("gpt2", {}, "which the model does not have"),
        ("llama", {"intermediate_size": 40}, r"is torch.float32 of shape .*; the model needs"),
        ("llama", {"num_hidden_layers": 1}, r"'model\.layers\.1\..*', which the model does not have"),
    ):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        tiny(family, **overrides).save_pretrained(tmp_path / "other")
        with pytest.raises(EspalierError, match=complaint):
            convert(str(adapter), str(tmp_path / "delta"), model=str(tmp_path / "other"), quiet=True)


def test_an_adapter_that_holds_another_embedding_than_the_base_is_refused(tmp_path: Path) -> None:
    """PEFT stores a copy of an embedding that it adapts, and takes it over on loading."""
    base = base_of("llama", tmp_path)
    _, adapter = adapter_of(base, tmp_path, target_modules=["embed_tokens"])
    directory = ModelDirectory(base)
    targets = {t.name: t for t in parameters(tiny("llama"))}
    assert set(import_adapter(adapter, targets, directory).updates) == {"model.embed_tokens.weight"}
    tensors = read_safetensors(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    for changed in (tensors[name] + 1, torch.zeros(98, 32)):
        write_safetensors(adapter / "adapter_model.safetensors", {**tensors, name: changed})
        with pytest.raises(EspalierError, match=r"holds another model\.embed_tokens\.weight than the base"):
            import_adapter(adapter, targets, directory)


CORRUPTED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no B": ({}, {"lora_B.weight": None}, r"q_proj has no lora_B\.weight"),
    "factors of two ranks": ({}, {"lora_A.weight": torch.zeros(4, 32)}, r"lora_B\.weight is .*\(32, 3\); the model needs .*\(32, 4\)"),
    "a flat factor": ({}, {"lora_A.weight": torch.zeros(96)}, r"lora_A\.weight is .*\(96,\); the model needs .*\(any, 32\)"),
    "factors of integers": ({}, {"lora_A.weight": torch.zeros(3, 32, dtype=torch.int32)}, r"lora_A\.weight is torch\.int32"),
    "factors of no rank": ({}, {"lora_A.weight": torch.zeros(0, 32), "lora_B.weight": torch.zeros(32, 0)}, r"\(0, 32\)"),
    "another tensor": ({}, {"lora_C.weight": torch.zeros(1)}, "which is no tensor of a LORA adapter, nor of the model"),
    "a magnitude of another size": ({}, {"lora_magnitude_vector": torch.zeros(31)}, r"lora_magnitude_vector is .*\(31,\)"),
    "an alpha that is a word": ({"lora_alpha": "big"}, {}, "lora_alpha is 'big'; it must be a finite number"),
    "an alpha that is no number": ({"lora_alpha": float("nan")}, {}, "lora_alpha is nan; it must be a finite number"),
    "a pattern that is none": ({"alpha_pattern": {"(": 3}}, {}, r"alpha_pattern has the pattern '\('"),
    "patterns in a list": ({"alpha_pattern": ["q_proj"]}, {}, r"alpha_pattern is \['q_proj'\]; it must map names"),
}


@pytest.mark.parametrize("what", CORRUPTED)
def test_a_corrupted_adapter_is_refused_that_has(what: str, tmp_path: Path) -> None:
    settings, tensors, complaint = CORRUPTED[what]
    base = base_of("llama", tmp_path)
    _, adapter = adapter_of(base, tmp_path, target_modules=["layers.0.self_attn.q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    stored = read_safetensors(adapter / "adapter_model.safetensors")
    stored.update({f"base_model.model.model.layers.0.self_attn.q_proj.{n}": t for n, t in tensors.items()})
    write_safetensors(adapter / "adapter_model.safetensors", {n: t for n, t in stored.items() if t is not None})
    with pytest.raises(EspalierError, match=complaint):
        convert(str(adapter), str(tmp_path / "delta"), model=str(base), quiet=True)


def test_convert_refuses_what_is_no_adapter_and_to_overwrite(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    _, adapter = adapter_of(base, tmp_path)
    with pytest.raises(EspalierError, match=r"is neither a delta .* nor a PEFT adapter"):
        convert(str(base), str(tmp_path / "delta"), quiet=True)
    convert(str(adapter), str(tmp_path / "delta"), quiet=True)
    with pytest.raises(EspalierError, match="already exists"):
        convert(str(adapter), str(tmp_path / "delta"), quiet=True)
