"""Compress and convert, as verbs: what carries over, what is exact, what is refused, and what is left when it fails."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from processes import command_line
from transformers import AutoTokenizer

import espalier
from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import attach, detach, trainable_parameters
from espalier.attach.load import load
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.delta import store
from espalier.delta.compression import naming
from espalier.delta.forms import Dense, Factored, LowRank, Magnitude, Replace, Sparse, Sum
from espalier.errors import EspalierError
from espalier.exchange.conversion import BaseWeights, Spool
from espalier.exchange.save import save

TARGETS = ("lora", "peft", "dense", "lowrank", "sparse", "rows", "columns", "ternary", "quantized")


def trained(folder: Path, method: str, family: str = "llama", targets: str = "linear", **options: Any) -> tuple[Path, Path]:
    """A tiny model and a delta of it, every trained number moved."""
    base, delta = folder / "base", folder / method
    if not base.exists():
        tiny(family).save_pretrained(base)
    model = load(base)
    attach(model, method, targets=targets, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save(model, delta, base=str(base))
    return base, delta


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return trained(tmp_path_factory.mktemp("lora"), "lora", rank=3)


def logits(base: Path, *deltas: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(base, deltas)(tokens()).logits


# convert


@pytest.mark.parametrize("to", TARGETS)
def test_a_converted_delta_is_an_ordinary_delta_that_says_where_it_comes_from(to: str, lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = lora
    result = espalier.convert(str(delta), str(tmp_path / "out"), to=to, quiet=True)
    before, after = store.load(delta), store.load(tmp_path / "out")
    assert list(after.updates) == list(before.updates) and after.layouts == before.layouts
    assert after.manifest["base"] == before.manifest["base"] and after.manifest["method"] == "convert"
    (parent,) = after.manifest["lineage"]
    assert parent["delta"] == str(delta) and parent["method"] == "lora" and parent["settings"]["seed"] == 0
    assert parent["sha256"] == json.loads((delta / "delta.json").read_text())["sha256"]
    assert result["bytes"] == (tmp_path / "out" / "delta.safetensors").stat().st_size and len(result["tensors"]) == len(before.updates)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == []
    if to not in ("ternary", "quantized"):
        assert result["worst"] < 1e-6
        torch.testing.assert_close(logits(base, tmp_path / "out"), logits(base, delta), rtol=1e-4, atol=1e-4)
    else:
        assert 0 < result["worst"] < 1
    for fact in result["tensors"]:
        old, new = (d.updates[fact["name"]].materialize(torch.zeros(1)) for d in (before, after))
        assert fact["error"] == pytest.approx(float((new - old).norm() / old.norm()), abs=1e-6)


@pytest.mark.parametrize(("method", "family", "targets"), [("paca", "gpt2", "attention,mlp"), ("mos", "llama", "linear"), ("paca", "qwen3_moe", "experts")])
def test_what_is_of_low_rank_becomes_lora_exactly(method: str, family: str, targets: str, tmp_path: Path) -> None:
    base, delta = trained(tmp_path, method, family, targets)
    result = espalier.convert(str(delta), str(tmp_path / "out"), to="lora", quiet=True)
    assert result["worst"] < 1e-12 and {t["form"] for t in result["tensors"]} == {"low_rank"}
    torch.testing.assert_close(logits(base, tmp_path / "out"), logits(base, delta), rtol=1e-4, atol=1e-4)


def test_a_lora_of_lower_rank_has_the_error_of_the_discarded_directions(lora: tuple[Path, Path], tmp_path: Path) -> None:
    _, delta = lora
    result = espalier.convert(str(delta), str(tmp_path / "out"), to="lora", rank=2, quiet=True)
    before = store.load(delta).updates
    for fact in result["tensors"]:
        S = torch.linalg.svdvals(before[fact["name"]].materialize(torch.zeros(1)).double())
        assert fact["error"] == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "paca", "dora"])
def test_peft_loads_what_is_converted_for_it(method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, delta = trained(tmp_path, method)
    espalier.convert(str(delta), str(tmp_path / "out"), to="peft", quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, logits(base, delta), rtol=1e-4, atol=1e-4)


def test_what_peft_cannot_hold_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    _, delta = trained(tmp_path, "lora", "qwen3_moe", "experts")
    with pytest.raises(EspalierError, match=r"PEFT cannot hold this delta: .*experts.* is no plain matrix"):
        espalier.convert(str(delta), str(tmp_path / "out"), to="peft", quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "lora"]


@pytest.mark.parametrize(
    ("method", "family", "targets"),
    [("dora", "llama", "linear"), ("full", "llama", "all"), ("full", "gpt2", "all"), ("full", "qwen3_moe", "all")],
)
def test_an_update_that_depends_on_the_base_is_converted_with_it_and_refused_without(
    method: str, family: str, targets: str, tmp_path: Path
) -> None:
    named, delta = trained(tmp_path, method, family, targets)
    result = espalier.convert(str(delta), str(tmp_path / "by name"), to="dense", quiet=True)
    assert result["worst"] < 1e-6, "the base that the delta names is where it says"
    base = named.rename(tmp_path / "moved")
    with pytest.raises(EspalierError, match=r"^\S+: the form '(magnitude|replace)' depends on the base; .*--model BASE"):
        espalier.convert(str(delta), str(tmp_path / "out"), to="dense", quiet=True)
    tiny(family, seed=1).save_pretrained(named)
    with pytest.raises(EspalierError, match=r"depends on the base; .*--model BASE"):  # another model of that name
        espalier.convert(str(delta), str(tmp_path / "out"), to="dense", quiet=True)
    assert not (tmp_path / "out").exists()
    result = espalier.convert(str(delta), str(tmp_path / "out"), to="dense", model=str(base), quiet=True)
    assert result["worst"] < 1e-6 and {t["form"] for t in result["tensors"]} == {"dense"}
    torch.testing.assert_close(logits(base, tmp_path / "out"), logits(base, delta), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "qwen2", "gpt_neox"])
def test_the_base_is_read_as_the_live_model_has_it(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "base")
    delta = store.Delta({}, {}, {"base": {"fingerprint": ModelDirectory(tmp_path / "base").fingerprint()}})
    weights = BaseWeights(delta, tmp_path, str(tmp_path / "base"))
    for target in parameters(model):
        weight = model.get_parameter(target.name)
        logical = weight.transpose(-1, -2) if target.transposed else weight
        assert torch.equal(weights(target.name, store.Layout.of(target), target.shape), logical)


def test_another_base_is_refused_with_both_fingerprints(lora: tuple[Path, Path], tmp_path: Path) -> None:
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(EspalierError, match=r"was made for the base .*sha256:.*; .*other has sha256:"):
        espalier.convert(str(lora[1]), str(tmp_path / "out"), to="dense", model=str(tmp_path / "other"), quiet=True)


def test_integers_and_tensors_set_as_a_whole_stay_and_their_files_come_along(tmp_path: Path) -> None:
    updates = {
        "w": Dense(torch.randn(6, 5)), "ids": Replace(torch.arange(4)), "new": Replace(torch.randn(3, 3)),
    }  # fmt: skip
    layouts = {"w": store.Layout(), "ids": store.Layout(), "new": store.Layout(dtype="F32")}
    files = {"config.json": hashlib.sha256(b"{}").hexdigest(), "dropped.json": None}
    manifest = {"base": {"name": "x"}, "removed": ["old"], "files": files}
    store.save(tmp_path / "d", store.Delta(updates, layouts, manifest), "")  # type: ignore[arg-type]
    (tmp_path / "d" / store.FILES).mkdir()
    (tmp_path / "d" / store.FILES / "config.json").write_text("{}")
    (tmp_path / "d" / store.FILES / "stray.json").write_text("{}")
    espalier.convert(str(tmp_path / "d"), str(tmp_path / "out"), to="sparse", density=0.5, quiet=True)
    made = store.load(tmp_path / "out")
    assert [u.form for u in made.updates.values()] == ["sparse", "replace", "replace"]
    assert torch.equal(made.updates["ids"].values, torch.arange(4)) and made.layouts["new"].dtype == "F32"  # type: ignore[attr-defined]
    assert made.manifest["removed"] == ["old"] and (tmp_path / "out" / store.FILES / "config.json").read_text() == "{}"
    assert [p.name for p in (tmp_path / "out" / store.FILES).iterdir()] == ["config.json"], "only what the manifest lists"


def one(folder: Path, update: Any = None, **manifest: Any) -> Path:
    """A delta of one update, of the parameter w."""
    updates = {"w": Dense(torch.eye(6)) if update is None else update}
    store.save(folder, store.Delta(updates, {"w": store.Layout()}, {"base": {"name": "x"}, **manifest}), "")
    return folder


def both(folder: Path, out: Path) -> Iterator[Callable[[], Any]]:
    yield lambda: espalier.convert(str(folder), str(out), to="sparse", quiet=True)
    yield lambda: espalier.compress(str(folder), str(out), method="magnitude", quiet=True)


def test_what_a_delta_brings_along_must_be_its_own_files_undamaged(tmp_path: Path) -> None:
    """A link would copy what it leads to, a secret of whoever converts."""
    (tmp_path / "secret").write_text("{}")
    delta = one(tmp_path / "d", files={"config.json": hashlib.sha256(b"{}").hexdigest()})
    (delta / store.FILES).mkdir()
    content = delta / store.FILES / "config.json"
    for prepare, complaint in (
        (lambda: content.symlink_to(tmp_path / "secret"), "leads to .*secret, out of"),
        (lambda: content.write_text("[]"), "is missing or damaged"),
        (content.mkdir, "is missing or damaged"),
    ):
        prepare()
        for run in both(delta, tmp_path / "out"):
            with pytest.raises(EspalierError, match=complaint):
                run()
        assert not (tmp_path / "out").exists()
        content.rmdir() if content.is_dir() else content.unlink()
    content.write_text("{}")
    (delta / "tokenizer.json").symlink_to(tmp_path / "secret")
    espalier.convert(str(delta), str(tmp_path / "out"), to="sparse", quiet=True)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "update",
    [
        Sparse(torch.ones(1), torch.tensor([5]), (2**20, 2**20)),
        Sum([Sparse(torch.ones(1), torch.tensor([5]), (2**30, 2**30))]),
        Factored(Sparse(torch.ones(1), torch.tensor([0]), (1, 2**20)), Sparse(torch.ones(1), torch.tensor([0]), (2**20, 2**20))),
    ],
    ids=lambda update: update.form,
)
def test_a_shape_that_memory_could_not_hold_is_refused_before_anything_is_made(update: Any, tmp_path: Path) -> None:
    for run in both(one(tmp_path / "d", update), tmp_path / "out"):
        with pytest.raises(EspalierError, match=r"^w: an update of shape \(.*\) takes [\d.]+ GiB when it is made dense .*; there are [\d.]+ [GM]iB$"):
            run()
    assert not (tmp_path / "out").exists()


def test_a_shape_that_is_not_the_bases_is_refused_by_name(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    fingerprint = ModelDirectory(tmp_path / "base").fingerprint()
    updates = {"model.norm.weight": Dense(torch.zeros(3))}
    manifest = {"base": {"name": str(tmp_path / "base"), "fingerprint": fingerprint}}
    store.save(tmp_path / "d", store.Delta(updates, {n: store.Layout() for n in updates}, manifest), "")  # type: ignore[arg-type]
    for run in both(tmp_path / "d", tmp_path / "out"):
        with pytest.raises(EspalierError, match=r"the update of model\.norm\.weight is for shape \(3,\); the base has \(\d+,\)"):
            run()


def test_an_allocation_that_fails_names_the_parameter(tmp_path: Path) -> None:
    for problem in (MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")):
        with pytest.raises(EspalierError, match=r"^w: there is not enough memory for it"), naming("w"):
            raise problem
    with pytest.raises(RuntimeError, match="a bug"), naming("w"):
        raise RuntimeError("a bug")


def test_a_full_disk_is_refused_before_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = one(tmp_path / "d", Dense(torch.randn(600, 700)))
    free = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    for run in both(delta, tmp_path / "out"):
        with pytest.raises(EspalierError, match=r"the new delta needs [\d.]+ MiB on the disk of \S+, which has 1\.0 MiB free"):
            run()
    spool = Spool(tmp_path / "spool")
    with pytest.raises(EspalierError, match=r"the new delta needs 3\.2 MiB"):
        spool("w", Dense(torch.randn(600, 700)))


@pytest.mark.parametrize("lineage", [{}, "x", ["x"], [{}], [{"delta": 3}]], ids=str)
def test_a_lineage_that_is_none_is_refused(lineage: Any, tmp_path: Path) -> None:
    delta = one(tmp_path / "d", lineage=lineage)
    for run in both(delta, tmp_path / "out"):
        with pytest.raises(EspalierError, match=r"delta\.json: lineage (is|holds)"):
            run()


def test_peft_has_no_use_for_nothing_nor_for_parameters_that_the_model_lacks(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base = {"name": str(lora[0])}  # without its fingerprint: not even shapes are held against it before
    for name, updates, complaint in (
        ("none", {}, "PEFT cannot hold this delta: it updates no parameter"),
        ("unknown", {"model.nothing.weight": LowRank(torch.zeros(4, 2), torch.zeros(2, 4))}, "updates .model.nothing.weight., which the model does not have"),
        ("shape", {"model.embed_tokens.weight": LowRank(torch.zeros(4, 2), torch.zeros(2, 4))}, r"is for shape \(4, 4\); the model.s is"),
    ):
        store.save(tmp_path / name, store.Delta(updates, {n: store.Layout() for n in updates}, {"base": base}), "")
        with pytest.raises(EspalierError, match=complaint):
            espalier.convert(str(tmp_path / name), str(tmp_path / "out"), to="peft", quiet=True)


def test_the_seed_that_draws_the_start_of_a_outlives_every_conversion(lora: tuple[Path, Path], tmp_path: Path) -> None:
    result = espalier.convert(str(lora[1]), str(tmp_path / "same"), to="lora", seed=7, quiet=True)
    made = store.load(tmp_path / "same")
    assert result["worst"] == 0.0 and made.manifest["settings"] == store.load(lora[1]).manifest["settings"]
    assert made.manifest["hyperparameters"] == {"to": "lora", "seed": 7}
    espalier.compress(str(tmp_path / "same"), str(tmp_path / "small"), method="compeft", seed=9, factors="both", quiet=True)
    assert all(u.start is not None for u in store.load(tmp_path / "small").updates.values())  # type: ignore[attr-defined]


def test_the_model_that_a_diff_led_to_is_not_recorded_of_a_delta_that_leads_elsewhere(tmp_path: Path) -> None:
    delta = one(tmp_path / "d", Dense(torch.randn(6, 5)), tuned={"name": "y", "fingerprint": "sha256:1"})
    espalier.convert(str(delta), str(tmp_path / "same"), to="dense", quiet=True)
    assert store.load(tmp_path / "same").manifest["tuned"]["name"] == "y"
    espalier.convert(str(delta), str(tmp_path / "near"), to="ternary", quiet=True)
    espalier.compress(str(delta), str(tmp_path / "small"), method="quantize", quiet=True)
    assert all("tuned" not in store.load(tmp_path / name).manifest for name in ("near", "small"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"to": "dense", "rank": 1}, r"--rank is no option of --to dense \(it belongs to lora, peft, lowrank\)"),
        ({"to": "dense", "density": 7}, r"--density is no option of --to dense \(it belongs to sparse, rows, columns, ternary\)"),
        ({"to": "lora", "bits": 4}, r"--bits is no option of --to lora \(it belongs to quantized\)"),
        ({"to": "sparse", "energy": 0.5}, "--energy is no option of --to sparse"),
        ({"to": "ternary", "group": 64}, "--group is no option of --to ternary"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options: dict[str, Any], complaint: str, lora: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=complaint):
        espalier.convert(str(lora[1]), str(tmp_path / "out"), quiet=True, **options)


def test_options_of_other_conversions_are_refused_of_adapters_dora_and_without_data(lora: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(EspalierError, match=r"is a PEFT adapter, which is imported as it is; --rank is of converting"):
        espalier.convert(str(adapter), str(tmp_path / "out"), rank=-1, quiet=True)
    _, dora = trained(tmp_path, "dora")
    with pytest.raises(EspalierError, match=r"q_proj\.weight: DoRA stays DoRA for PEFT, of the rank that it has"):
        espalier.convert(str(dora), str(tmp_path / "out"), to="peft", rank=1, quiet=True)
    for option, value in (("micro_batch_size", 0), ("sequence_length", 8), ("device", "cpu")):
        with pytest.raises(EspalierError, match=f"{option} is of validation and does nothing without --data"):
            espalier.compress(str(lora[1]), str(tmp_path / "out"), method="svd", quiet=True, **{option: value})


def test_converting_a_delta_needs_a_form_and_an_adapter_none(lora: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=r"is already a delta; say which form it shall have: --to lora"):
        espalier.convert(str(lora[1]), str(tmp_path / "out"), quiet=True)
    with pytest.raises(EspalierError, match="is neither a delta"):
        espalier.convert(str(tmp_path), str(tmp_path / "out"), to="lora", quiet=True)
    with pytest.raises(EspalierError, match="already exists"):
        espalier.convert(str(lora[1]), str(lora[0]), to="lora", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_spool_gives_back_the_same_tensors_from_a_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    large, small = LowRank(torch.randn(3000, 90), torch.randn(90, 4000), 0.5), Dense(torch.randn(3, 3))
    assert spool("s", small) is small
    for update in (large, Magnitude(torch.rand(3000), large)):
        kept = spool("w", update)
        assert kept is not update and all(torch.equal(t, kept.tensors()[k]) for k, t in update.tensors().items())
    assert len(list((tmp_path / "spool").iterdir())) == 2
    spool.remove()
    assert not (tmp_path / "spool").exists()


# compress


def test_a_compressed_delta_is_smaller_keeps_what_it_is_about_and_names_its_parent(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = lora
    result = espalier.compress(str(delta), str(tmp_path / "out"), method="compeft", density=0.3, quiet=True)
    made, before = store.load(tmp_path / "out"), store.load(delta)
    assert made.layouts == before.layouts and made.manifest["base"] == before.manifest["base"]
    assert made.manifest["method"] == "compeft" and made.manifest["hyperparameters"]["density"] == 0.3
    assert made.manifest["lineage"][0]["method"] == "lora" and "compeft" in (tmp_path / "out" / "README.md").read_text()
    assert result["bytes"] < result["bytes_before"] and {t["form"] for t in result["tensors"]} == {"factored"}
    assert not torch.equal(logits(base, tmp_path / "out"), logits(base))
    twice = espalier.compress(str(tmp_path / "out"), str(tmp_path / "again"), method="quantize", quiet=True)
    assert [p["method"] for p in store.load(tmp_path / "again").manifest["lineage"]] == ["lora", "compeft"] and twice["tensors"]
    assert not (tmp_path / "out" / "adapter_config.json").exists(), "PEFT's files of the parent would be another delta"


def test_the_applied_model_is_base_and_compressed_delta(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = lora
    for method in ("compeft", "bit1", "svd", "magnitude"):
        espalier.compress(str(delta), str(tmp_path / method), method=method, quiet=True)
        espalier.apply(str(base), [str(tmp_path / method)], str(tmp_path / f"{method}-model"), quiet=True)
        torch.testing.assert_close(logits(tmp_path / f"{method}-model"), logits(base, tmp_path / method), rtol=1e-3, atol=1e-3)


def test_validation_data_choose_alpha(tmp_path: Path) -> None:
    """The update points away from what the data need: the smallest alpha hurts least."""
    base = tmp_path / "base"
    tiny("gpt2", vocab_size=4096).save_pretrained(base)
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(base)
    model = load(base)
    attach(model, "lora", targets="attention", rank=2)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
    save(model, tmp_path / "delta", base=str(base))
    (tmp_path / "a.txt").write_text("def double(x):\n    return 2 * x\n" * 10)
    result = espalier.compress(
        str(tmp_path / "delta"), str(tmp_path / "out"), method="compeft", data=[str(tmp_path / "a.txt")], sequence_length=32, quiet=True
    )
    assert [t["alpha"] for t in result["tried"]] == [0.5, 1, 2, 3, 4, 5, 6, 8, 10]
    best = min(result["tried"], key=lambda t: t["score"])
    assert result["hyperparameters"]["alpha"] == best["alpha"] == store.load(tmp_path / "out").manifest["hyperparameters"]["alpha"]
    found = espalier.eval(str(base), str(tmp_path / "a.txt"), delta=[str(tmp_path / "out")], sequence_length=32, quiet=True)
    assert found["loss"] == pytest.approx(best["score"], rel=1e-4)


def test_a_compression_that_fails_leaves_nothing(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = trained(tmp_path, "full", targets="attention.q")
    base.rename(tmp_path / "moved")
    with pytest.raises(EspalierError, match=r"svd of model\.layers\.0\.self_attn\.q_proj\.weight: the form 'replace' depends on the base"):
        espalier.compress(str(delta), str(tmp_path / "out"), method="svd", quiet=True)
    with pytest.raises(EspalierError, match="no compressor is called 'lora'"):
        espalier.compress(str(delta), str(tmp_path / "out"), method="lora", quiet=True)
    with pytest.raises(EspalierError, match=r"density is no option of svd \(it belongs to compeft, magnitude, random\)"):
        espalier.compress(str(delta), str(tmp_path / "out"), method="svd", density=0.5, quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "moved"]


def test_a_robust_weight_signature_patches_a_model_and_is_taken_off_again(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, clean = lora
    (tmp_path / "base").symlink_to(base)
    _, robust = trained(tmp_path, "paca")
    espalier.compress(str(robust), str(tmp_path / "out"), method="rws", against=str(clean), layers=1, quiet=True)
    made = store.load(tmp_path / "out").updates
    assert made and all(".layers.0." in name for name in made)
    model = load(base, [tmp_path / "out"])
    detach(model)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, logits(base))


def test_the_commands_print_json_and_say_what_is_wrong_in_one_line(lora: tuple[Path, Path], tmp_path: Path) -> None:
    done = command_line("compress", str(lora[1]), "--method", "compeft", "--density", "0.5", "--out", str(tmp_path / "c"), "--json", "--quiet")
    assert done.returncode == 0 and json.loads(done.stdout)["hyperparameters"]["density"] == 0.5 and not done.stderr
    done = command_line("convert", str(tmp_path / "c"), "--to", "lora", "--rank", "2", "--out", str(tmp_path / "l"))
    assert done.returncode == 0 and "updates are approximated; the worst:" in done.stderr and "worst" in done.stdout
    done = command_line("convert", str(tmp_path / "c"), "--to", "lora", "--rank", "0", "--out", str(tmp_path / "z"), "--quiet")
    assert done.returncode == 2 and done.stderr.startswith("error: model.layers.0.") and "rank is 0" in done.stderr and done.stderr.count("\n") == 1
