"""One model in the layouts of transformers 4 and 5, with and without prefixes: deltas go from each to the other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import attach_updates
from espalier.attach.load import load, load_model, load_tokenizer
from espalier.checkpoint import stream
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.relaid import Relaid, Source
from espalier.checkpoint.safetensors_file import read_safetensors, tensor_bytes, write_safetensors
from espalier.delta import store
from espalier.delta.forms import Dense, Replace
from espalier.errors import EspalierError
from espalier.exchange import recipe
from espalier.verbs.apply import apply
from espalier.verbs.convert import convert
from espalier.verbs.diff import diff
from espalier.verbs.revert import revert

EXPERTS = ("mixtral", "qwen3_moe")
Tensors = dict[str, torch.Tensor]


def rewritten(folder: Path, out: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(folder, out)
    write_safetensors(out / "model.safetensors", {n: t.contiguous() for n, t in change(read_safetensors(folder / "model.safetensors")).items()})
    return out


def fused(folder: Path, family: str, out: Path) -> Path:
    """The checkpoint with the names and tensors that the live model of transformers 5 has."""
    model = load_model(folder)
    live = {n: p.detach().to("cpu") for n, p in model.named_parameters()}
    assert any(n.endswith("experts.gate_up_proj") for n in live)
    made = rewritten(folder, out, lambda tensors: live)
    with torch.no_grad():
        assert torch.equal(load_model(made)(tokens()).logits, model(tokens()).logits), "transformers reads this layout too"
    return made


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> folder with ``base`` and ``tuned`` as transformers saves them, and ``base5`` and ``tuned5``, fused."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = folder = tmp_path_factory.mktemp(family)
            model = tiny(family).to(torch.bfloat16)
            model.save_pretrained(folder / "base")
            with torch.no_grad():
                for number, (name, parameter) in enumerate(model.named_parameters()):
                    if "expert" in name:  # not all experts, and of one only the rows of up
                        moved = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05
                        moved[1] = 0
                        moved[2, : parameter.shape[1] // 2] = 0
                        parameter.add_(moved)
                    elif number % 2:
                        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.02)
            model.save_pretrained(folder / "tuned")
            for name in ("base", "tuned"):
                fused(folder / name, family, folder / f"{name}5")
        return made[family]

    return get


def all_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    directory = ModelDirectory(folder)
    return {n: (directory.info(n).dtype, directory.info(n).shape, directory.read(n).reshape(-1).view(torch.uint8).numpy().tobytes()) for n in directory}


def logits(folder: Path, *deltas: Path, any_base: bool = False) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, deltas, dtype="fp32", any_base=any_base)(tokens()).logits


# on a live model


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("to", ["auto", "lowrank", "sparse"])
def test_a_delta_of_single_experts_goes_onto_the_live_fused_parameters(family: str, to: Any, four: Any, tmp_path: Path) -> None:
    folder = four(family)
    options = {"auto": {}, "lowrank": {"rank": 3}, "sparse": {"density": 0.3}}[to]
    result = diff(str(folder / "base"), str(folder / "tuned"), str(tmp_path / "d"), to=to, quiet=True, **options)
    assert any(".experts.3." in t["name"] for t in result["tensors"]) and not any(".experts.1." in t["name"] for t in result["tensors"])
    apply(str(folder / "base"), [str(tmp_path / "d")], str(tmp_path / "out"), dtype="fp32", quiet=True)
    there = logits(folder / "base", tmp_path / "d")
    torch.testing.assert_close(there, logits(tmp_path / "out"), rtol=1e-4, atol=1e-4)
    assert (there - logits(folder / "base")).abs().max() > 0.1
    if to == "auto":
        torch.testing.assert_close(there, logits(folder / "tuned"), rtol=1e-5, atol=1e-5)
    apply(str(folder / "base"), [str(tmp_path / "d")], str(tmp_path / "half"), scale=0.5, dtype="fp32", quiet=True)
    with torch.no_grad():
        half = load(folder / "base", [tmp_path / "d"], dtype="fp32", scale=0.5)(tokens()).logits
    torch.testing.assert_close(half, logits(tmp_path / "half"), rtol=1e-4, atol=1e-4)


def bare(tensors: Tensors) -> Tensors:
    """The names of the model without its head, as the hub has GPT-2 and BERT."""
    prefix = next(p for p in ("transformer.", "bert.", "model.") if any(n.startswith(p) for n in tensors))
    return {n.removeprefix(prefix): t for n, t in tensors.items()}


def older(tensors: Tensors) -> Tensors:
    """BERT's norms as they were first called."""
    return {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in tensors.items()}


def moved_pair(family: str, folder: Path, change: Callable[[Tensors], Tensors]) -> tuple[Path, Path]:
    """Two checkpoints of a family, one a little moved, both renamed."""
    tiny(family).save_pretrained(folder / "saved")

    def move(tensors: Tensors) -> Tensors:
        return {n: t + torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) * 0.05 if i % 2 else t for i, (n, t) in enumerate(change(tensors).items())}

    return rewritten(folder / "saved", folder / "base", change), rewritten(folder / "saved", folder / "tuned", move)


@pytest.mark.parametrize(
    ("family", "change"), [("gpt2", bare), ("bert", bare), ("bert", lambda t: older(bare(t))), ("qwen2", bare)], ids=["gpt2", "bert", "older bert", "qwen2"]
)
def test_a_delta_under_the_names_of_a_bare_model_goes_onto_the_live_one(family: str, change: Any, tmp_path: Path) -> None:
    base, tuned = moved_pair(family, tmp_path, change)
    result = diff(str(base), str(tuned), str(tmp_path / "d"), quiet=True)
    assert any(t["name"].startswith(("h.0.", "encoder.layer.0.", "layers.0.")) for t in result["tensors"])
    there = logits(base, tmp_path / "d")
    torch.testing.assert_close(there, logits(tuned), rtol=1e-4, atol=1e-4)
    assert (there - logits(base)).abs().max() > 0.01


def test_a_delta_under_the_names_of_a_bare_model_becomes_a_lora_that_peft_loads(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "saved")

    def matrices(tensors: Tensors) -> Tensors:
        return {n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) if "c_fc.weight" in n else t for i, (n, t) in enumerate(bare(tensors).items())}

    base, tuned = rewritten(tmp_path / "saved", tmp_path / "base", bare), rewritten(tmp_path / "saved", tmp_path / "tuned", matrices)
    diff(str(base), str(tuned), str(tmp_path / "d"), to="lowrank", rank=4, quiet=True)
    convert(str(tmp_path / "d"), str(tmp_path / "lora"), to="peft", model=str(base), quiet=True)
    from peft import PeftModel

    with torch.no_grad():
        found = PeftModel.from_pretrained(load_model(base), tmp_path / "lora")(input_ids=tokens()).logits
    torch.testing.assert_close(found, logits(base, tmp_path / "d"), rtol=1e-4, atol=1e-4)


def test_a_tied_parameter_that_a_delta_changes_under_both_names_must_change_alike(tmp_path: Path) -> None:
    tiny("qwen2").save_pretrained(tmp_path / "saved")
    name = "model.embed_tokens.weight"

    def both(step: float, other: float) -> Callable[[Tensors], Tensors]:
        return lambda tensors: {**tensors, name: tensors[name] + step, "lm_head.weight": tensors[name] + other}

    base, alike, apart = (rewritten(tmp_path / "saved", tmp_path / n, both(*by)) for n, by in (("b", (0, 0)), ("s", (0.5, 0.5)), ("a", (0.5, 0.25))))
    diff(str(base), str(alike), str(tmp_path / "ds"), quiet=True)
    torch.testing.assert_close(logits(base, tmp_path / "ds"), logits(alike), rtol=1e-4, atol=1e-4)
    diff(str(base), str(apart), str(tmp_path / "da"), quiet=True)
    with pytest.raises(EspalierError, match=r"'(lm_head|model\.embed_tokens)\.weight' differently; the model ties them"):
        load(base, [tmp_path / "da"])


# from one layout of files to another


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize(("old", "new"), [("base5", "tuned"), ("base", "tuned5"), ("base", "base5"), ("tuned5", "tuned")])
def test_the_difference_of_two_layouts_is_exact_and_holds_only_what_changed(family: str, old: str, new: str, four: Any, tmp_path: Path) -> None:
    base, tuned = four(family) / old, four(family) / new
    result = diff(str(base), str(tuned), str(tmp_path / "d"), quiet=True)
    assert result["relaid"] == sorted(set(ModelDirectory(tuned)) - set(ModelDirectory(base))) and not result["added"]
    assert result["removed"] == sorted(set(ModelDirectory(base)) - set(ModelDirectory(tuned)))
    for shards in (None, "20KB"):
        apply(str(base), [str(tmp_path / "d")], str(tmp_path / f"out{shards}"), shard_size=shards, quiet=True)
        assert all_bytes(tmp_path / f"out{shards}") == all_bytes(tuned)
    own = diff(str(four(family) / old.removesuffix("5")), str(four(family) / new.removesuffix("5")), str(tmp_path / "same"), quiet=True)
    values = [sum(u.nbytes for u in store.load(tmp_path / d).updates.values()) for d in ("d", "same")]
    assert values[0] <= 1.1 * values[1] and (own["tensors"] or not result["tensors"])


def test_an_approximation_does_not_depend_on_the_layout_of_the_base(four: Any, tmp_path: Path) -> None:
    folder = four("mixtral")
    for old in ("base", "base5"):
        diff(str(folder / old), str(folder / "tuned"), str(tmp_path / f"d{old}"), to="lowrank", rank=2, quiet=True)
        apply(str(folder / old), [str(tmp_path / f"d{old}")], str(tmp_path / f"out{old}"), quiet=True)
    assert all_bytes(tmp_path / "outbase") == all_bytes(tmp_path / "outbase5") != all_bytes(folder / "tuned")


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("to", ["auto", "lowrank", "sparse", "ternary", "rows"])
def test_a_delta_of_either_layout_makes_the_same_numbers_of_a_base_in_either(family: str, to: Any, four: Any, tmp_path: Path) -> None:
    folder, made = four(family), {}
    options: Any = {"auto": {}, "lowrank": {"rank": 3}}.get(to, {"density": 0.3})
    for layout in ("", "5"):
        diff(str(folder / f"base{layout}"), str(folder / f"tuned{layout}"), str(tmp_path / f"d{layout}"), to=to, quiet=True, **options)
        for onto in ("", "5"):
            out = tmp_path / f"out{layout}on{onto}"
            apply(str(folder / f"base{onto}"), [str(tmp_path / f"d{layout}")], str(out), scale=1.0 if to == "auto" else 0.5, any_base=True, quiet=True)
            assert set(ModelDirectory(out)) == set(ModelDirectory(folder / f"base{onto}"))
            made[layout, onto] = out
        one, other = made[layout, ""], made[layout, "5"]
        assert all_bytes(fused(one, family, tmp_path / f"fused{layout}")) == all_bytes(other), "a delta makes the same of both layouts"
    if to == "auto":
        assert all_bytes(made["", "5"]) == all_bytes(made["5", "5"]) == all_bytes(folder / "tuned5")
        assert all_bytes(made["", ""]) == all_bytes(made["5", ""]) == all_bytes(folder / "tuned")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_updates_of_experts_reach_their_rows_of_a_fused_tensor_of_any_dtype(dtype: torch.dtype, transposed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randint(-9, 9, (3, 8, 5), generator=torch.Generator().manual_seed(0)).to(dtype)  # (experts, gate and up, in)
    new, stem = weight.clone(), "model.layers.0.mlp.experts"
    new[2, 4:] = torch.arange(20.0).reshape(4, 5).to(dtype)
    new.view(torch.uint8).view(-1)[: 8 * dtype.itemsize] = 1  # two entries of the second row too
    updates = {f"{stem}.2.up_proj.weight": Replace(new[2, 4:].contiguous())}
    first = torch.arange(8)
    updates[f"{stem}.0.gate_proj.weight"] = Replace(new[0].flatten()[:8].contiguous(), index=first, shape=(4, 5))
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for folder, tensor in ((base, weight), (tuned, new)):
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "%s"}' % ("llama4" if transposed else "mixtral"))
        write_safetensors(folder / "model.safetensors", {f"{stem}.gate_up_proj": (tensor.mT if transposed else tensor).contiguous()})
    monkeypatch.setattr(stream, "SLICE", 3 * 5 * dtype.itemsize)
    manifest = {"base": {"name": "m", "fingerprint": ModelDirectory(base).fingerprint()}, "method": "diff"}
    store.save(tmp_path / "d", store.Delta(updates, dict.fromkeys(updates, store.Layout()), manifest), "a card")
    apply(str(base), [str(tmp_path / "d")], str(tmp_path / "out"), quiet=True)
    assert all_bytes(tmp_path / "out") == all_bytes(tuned)


def test_a_delta_of_two_layouts_goes_onto_the_live_model_and_through_convert_and_revert(four: Any, tmp_path: Path) -> None:
    base, tuned = four("mixtral") / "base5", four("mixtral") / "tuned"
    diff(str(base), str(tuned), str(tmp_path / "d"), quiet=True)
    torch.testing.assert_close(logits(base, tmp_path / "d"), logits(tuned), rtol=1e-5, atol=1e-5)
    convert(str(tmp_path / "d"), str(tmp_path / "dense"), to="dense", model=str(base), quiet=True)
    apply(str(base), [str(tmp_path / "dense")], str(tmp_path / "out"), quiet=True)
    assert set(ModelDirectory(tmp_path / "out")) == set(ModelDirectory(tuned))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), rtol=1e-2, atol=1e-2)
    revert(str(tmp_path / "out"), str(tmp_path / "back"), quiet=True)
    assert all_bytes(tmp_path / "back") == all_bytes(base)


def test_two_deltas_to_another_layout_are_applied_together_and_one_under_another_is_refused(four: Any, tmp_path: Path) -> None:
    folder = four("qwen3_moe")
    for name, (old, new) in {"to4": ("base5", "tuned"), "in5": ("base5", "tuned5"), "only": ("base5", "base")}.items():
        diff(str(folder / old), str(folder / new), str(tmp_path / name), quiet=True)
    for number, names in enumerate((["to4", "only"], ["only", "to4"], ["only", "in5"], ["to4", "to4"])):
        apply(str(folder / "base5"), [str(tmp_path / n) for n in names], str(tmp_path / f"out{number}"), quiet=True)
        assert all_bytes(tmp_path / f"out{number}") == all_bytes(folder / "tuned")
    with pytest.raises(EspalierError, match="in different layouts"):
        apply(str(folder / "base5"), [str(tmp_path / "in5"), str(tmp_path / "only")], str(tmp_path / "no"), quiet=True)
    assert not (tmp_path / "no").exists()


# what the live base cannot carry


def test_verify_refuses_a_delta_of_another_vocabulary_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    tiny("llama", vocab_size=104).save_pretrained(tmp_path / "tuned")
    load_tokenizer("seedling").save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("words to compare on")
    diff(str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "d"), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "write", lambda *_: pytest.fail("the work began"))
        with pytest.raises(EspalierError, match=r"--verify needs .* 'lm_head\.weight' is for shape \(104, 32\); the model's is \(96, 32\)\. Leave --verify out"):
            apply(str(tmp_path / "base"), [str(tmp_path / "d")], str(tmp_path / "out"), verify=str(tmp_path / "text.txt"), quiet=True)
    assert not (tmp_path / "out").exists()
    apply(str(tmp_path / "base"), [str(tmp_path / "d")], str(tmp_path / "out"), quiet=True)
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "tuned")


@pytest.mark.parametrize("old", ["base", "base5"])
def test_verify_compares_models_of_experts_in_either_layout(old: str, four: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(four("mixtral") / old, base)
    tokenizer = load_tokenizer("seedling")
    tokenizer.save_pretrained(base)
    text = next(word for word in ("a", "in", "if", "x = 1") if max(tokenizer(word * 9).input_ids) < 96)
    (tmp_path / "text.txt").write_text(text * 9)
    diff(str(base), str(four("mixtral") / "tuned"), str(tmp_path / "d"), quiet=True)
    found = apply(str(base), [str(tmp_path / "d")], str(tmp_path / "out"), verify=str(tmp_path / "text.txt"), quiet=True)["verified"]
    assert found["mean"] < 1e-5 < found["moved"] and found["agreement"] == 1


# chat templates in a folder


def test_additional_chat_templates_come_go_and_change_with_a_delta_and_load(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("seedling")
    made = {"default": "{{ messages }}", "same": "{{ tools }}", "changed": "before", "removed": "gone"}
    for name, templates in {"base": made, "tuned": {"default": made["default"], "same": made["same"], "changed": "after", "added": "new"}}.items():
        tiny("llama").save_pretrained(tmp_path / name)
        tokenizer.chat_template = templates
        tokenizer.save_pretrained(tmp_path / name)
    result = diff(str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "d"), quiet=True)
    assert result["files"] == [f"additional_chat_templates/{name}.jinja" for name in ("added", "changed", "removed")]
    apply(str(tmp_path / "base"), [str(tmp_path / "d")], str(tmp_path / "out"), quiet=True)
    assert sorted(p.name for p in (tmp_path / "out" / "additional_chat_templates").iterdir()) == ["added.jinja", "changed.jinja", "same.jinja"]
    assert load_tokenizer(tmp_path / "out").chat_template == load_tokenizer(tmp_path / "tuned").chat_template
    convert(str(tmp_path / "d"), str(tmp_path / "again"), to="dense", quiet=True)
    apply(str(tmp_path / "base"), [str(tmp_path / "again")], str(tmp_path / "out2"), quiet=True)
    assert load_tokenizer(tmp_path / "out2").chat_template == load_tokenizer(tmp_path / "tuned").chat_template
    revert(str(tmp_path / "out"), str(tmp_path / "back"), quiet=True)
    assert load_tokenizer(tmp_path / "back").chat_template == load_tokenizer(tmp_path / "base").chat_template


# what is made of runs of entries


def stored(folder: Path) -> ModelDirectory:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {"a": torch.arange(24.0).reshape(4, 6), "b": torch.arange(5.0), "c": torch.arange(4)})
    return ModelDirectory(folder)


def test_a_tensor_in_another_layout_is_read_in_slices_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = stored(tmp_path / "m")
    seen = Relaid(directory, {"x": Source((2, 2, 3), (("a", 6, 12), ("b", 0, 2), ("a", 2, 6)))})
    expected = torch.tensor([*range(6, 12), 0, 1, *range(2, 6)], dtype=torch.float32).reshape(2, 2, 3)
    assert torch.equal(seen.read("x"), expected) and torch.equal(seen.read("a"), directory.read("a"))
    assert seen.fingerprint() == directory.fingerprint() and seen.files() == directory.files()
    for size in (4, 12, 20, 1000):
        monkeypatch.setattr(stream, "SLICE", size)
        assert b"".join(bytes(piece) for _, piece in stream.slices(seen, "x", 4)) == tensor_bytes(expected)
        assert b"".join(bytes(piece) for _, piece in stream.slices(seen, "x", 4, 8, 40)) == bytes(tensor_bytes(expected))[8:40]


@pytest.mark.parametrize(
    ("name", "entry", "complaint"),
    [
        ("x", {"shape": [2], "runs": [["none", 0, 2]]}, "no tensor 'none'"),
        ("x", {"shape": [2], "runs": [["a", 23, 25]]}, "entries 23 to 25 of 'a', which has 24"),
        ("x", {"shape": [2], "runs": [["a", -2, 0]]}, "entries -2 to 0"),
        ("x", {"shape": [2], "runs": [["a", 4, 2]]}, "entries 4 to 2"),
        ("x", {"shape": [3], "runs": [["a", 0, 2]]}, "made of 2 entries"),
        ("x", {"shape": [-1, -2], "runs": [["a", 0, 2]]}, "made of 2 entries"),
        ("x", {"shape": [2**62, 2**62], "runs": [["a", 0, 2]]}, "made of 2 entries"),
        ("x", {"shape": [4], "runs": [["a", 0, 2], ["c", 0, 2]]}, "of 2 dtypes"),
        ("x", {"shape": [0], "runs": []}, "of 0 dtypes"),
        ("b", {"shape": [2], "runs": [["a", 0, 2]]}, "has the tensor 'b' itself"),
        ("x", {"shape": [2]}, "must have a shape and runs"),
        ("x", {"shape": 2, "runs": [["a", 0, 2]]}, "must have a shape and runs"),
        ("x", {"shape": [1] * 65, "runs": [["a", 0, 1]]}, "must have a shape and runs"),
        ("x", {"shape": [2.0], "runs": [["a", 0, 2]]}, "must have a shape and runs"),
        ("x", {"shape": [2], "runs": [["a", 0, 2.0]]}, "must have a shape and runs"),
        ("x", {"shape": [2], "runs": [["a", False, 2]]}, "must have a shape and runs"),
        ("x", {"shape": [2], "runs": [["a", 0]]}, "must have a shape and runs"),
        ("x", [], "must have a shape and runs"),
    ],
)  # fmt: skip
def test_a_forged_layout_is_refused(name: str, entry: Any, complaint: str, tmp_path: Path) -> None:
    base = stored(tmp_path / "m")
    folder = tmp_path / "d"
    manifest = {"base": {"name": "m", "fingerprint": base.fingerprint()}, "method": "diff", "relaid": {name: entry}}
    store.save(folder, store.Delta({"b": Replace(torch.ones(5))}, {"b": store.Layout()}, manifest), "a card")
    with pytest.raises(EspalierError, match=complaint):
        apply(str(base.path), [str(folder)], str(tmp_path / "out"), quiet=True)
    assert not (tmp_path / "out").exists()


def test_experts_that_do_not_fit_the_fused_parameter_are_refused(four: Any) -> None:
    model = load_model(four("qwen3_moe") / "base")
    stem = "model.layers.0.mlp.experts"
    small, large = Replace(torch.zeros(16, 32)), Replace(torch.zeros(17, 32))
    for updates, complaint in (
        ({f"{stem}.4.up_proj.weight": small}, "4 experts"),
        ({f"{stem}.0.up_proj.weight": large}, r"is for shape \(17, 32\)"),
        ({f"{stem}.0.up_proj.weight": small, f"{stem}.0.w3.weight": small}, "twice"),
        ({f"{stem}.0.up_proj.weight": small, f"{stem}.gate_up_proj": Replace(torch.zeros(4, 32, 32))}, "a part of it"),
    ):
        with pytest.raises(EspalierError, match=complaint):
            attach_updates(model, updates, "forged")


@pytest.mark.parametrize("of_base", [True, False])
def test_a_forged_number_of_experts_without_entries_costs_nothing(of_base: bool, tmp_path: Path) -> None:
    """A tensor without entries may have any other sizes in a few bytes."""
    stem, shape = "a.experts", (2**40, 4, 0)
    base = rewritten(stored(tmp_path / "m").path, tmp_path / "base", lambda t: {**t, f"{stem}.gate_up_proj": torch.zeros(shape)} if of_base else t)
    updates = {f"{stem}.gate_up_proj": Dense(torch.zeros(shape))}
    store.save(tmp_path / "d", store.Delta(updates, {n: store.Layout() for n in updates}, {"method": "diff"}), "a card")
    if of_base:
        apply(str(base), [str(tmp_path / "d")], str(tmp_path / "out"), any_base=True, quiet=True)
        assert ModelDirectory(tmp_path / "out").info(f"{stem}.gate_up_proj").shape == shape
        diff(str(base), str(tmp_path / "out"), str(tmp_path / "again"), quiet=True)
    else:
        with pytest.raises(EspalierError, match=r"no tensor for the parameter 'a\.experts\.gate_up_proj'"):
            apply(str(base), [str(tmp_path / "d")], str(tmp_path / "out"), any_base=True, quiet=True)
