"""A delta on disk: what is written is read back, and whatever is damaged, foreign or forged is one clear error."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from limits import disk_full_at

from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import attach, detach, trainable_parameters
from espalier.attach.load import load, put_on
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.safetensors_file import read_safetensors, tensor_bytes, write_safetensors
from espalier.checkpoint.stream import Hashes
from espalier.delta import store
from espalier.delta.forms import (
    BlockAffine,
    Chain,
    Columns,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    Magnitude,
    Permute,
    Pooled,
    Quantized,
    Replace,
    Rows,
    Sparse,
    Sum,
    Ternary,
    compact,
)
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError
from espalier.exchange.save import save
from espalier.verbs.apply import apply
from espalier.verbs.convert import convert
from espalier.verbs.diff import diff

LAYER, SECOND = "model.layers.0.", "model.layers.1."


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def every_form(fingerprint: str) -> Delta:
    """A delta of the tiny Llama with an update of every form, two of them sharing their pools."""
    pools = {"B": randn(9, 8), "A": randn(9, 12)}
    index = {f"index_{f}": torch.randint(0, 9, (3, 4), generator=torch.Generator().manual_seed(i), dtype=torch.int32) for i, f in enumerate("BA")}
    shared = {"B": "pools/B", "A": "pools/A"}
    updates = {
        LAYER + "self_attn.q_proj.weight": LowRank(randn(32, 2), randn(2, 32), 0.5),
        LAYER + "self_attn.k_proj.weight": Columns(randn(16, 3), torch.tensor([1, 7, 30]), 32),
        LAYER + "self_attn.v_proj.weight": Sparse(randn(4), torch.tensor([0, 5, 100, 511]), (16, 32), 2.0),
        LAYER + "self_attn.o_proj.weight": Magnitude(randn(32).abs() + 1, LowRank(randn(32, 2), randn(2, 32), 0.25)),
        LAYER + "mlp.gate_proj.weight": Dense(randn(48, 32).to(torch.bfloat16)),
        LAYER + "mlp.up_proj.weight": Replace(randn(48, 32)),
        LAYER + "mlp.down_proj.weight": Pooled(pools["B"], pools["A"], index["index_B"], index["index_A"], 1.5, shared),
        "model.layers.1.mlp.down_proj.weight": Pooled(pools["B"], pools["A"], index["index_A"], index["index_B"], 1.5, shared),
        "model.norm.weight": Replace(randn(32)),
        SECOND + "self_attn.q_proj.weight": Kronecker(randn(2, 4, 8), randn(2, 8, 4)),
        SECOND + "self_attn.k_proj.weight": Rows(randn(3, 32), torch.tensor([0, 9, 15]), 16, 0.5),
        SECOND + "self_attn.v_proj.weight": Ternary.of(randn(16, 32).sign() * (randn(16, 32).abs() > 0.1), torch.tensor(0.02)),
        SECOND + "self_attn.o_proj.weight": Chain(
            [Permute(None, torch.arange(31, -1, -1), (32, 32)), BlockAffine(randn(8, 4, 4), (32, 32))], 0.5
        ),
        SECOND + "mlp.gate_proj.weight": Quantized.of(LowRank(randn(48, 2), randn(2, 32), 2.0), 3, 16),
        SECOND + "mlp.up_proj.weight": Sum(
            [LowRank(randn(48, 2), randn(2, 32)), Sparse(randn(768), shape=(48, 32), **{"index": None, **compact(torch.arange(0, 1536, 2), 1536)})]
        ),
        SECOND + "input_layernorm.weight": Diagonal(randn(32) + 1, None, (32,), 0.5),
        SECOND + "post_attention_layernorm.weight": Replace(randn(4), index=torch.tensor([1, 3, 8, 31]), shape=(32,)),
    }
    targets = {t.name: t for t in parameters(tiny("llama"))}
    manifest = {"method": "several", "hyperparameters": {"rank": 2}, "base": {"name": "tiny", "fingerprint": fingerprint}, "training": {"data": "none"}}
    return Delta(updates, {name: Layout.of(targets[name]) for name in updates}, manifest)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    tiny("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pristine(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "delta"
    store.save(folder, every_form(ModelDirectory(base).fingerprint()), "a card")
    return folder


@pytest.fixture
def delta(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "delta")


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "delta.json").read_text())


def rewrite(folder: Path, manifest: Any) -> None:
    """Write a manifest with the digest that belongs to it, as a forger would."""
    if isinstance(manifest, dict):
        rest = {key: value for key, value in manifest.items() if key != "sha256"}
        manifest = {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}
    (folder / "delta.json").write_text(json.dumps(manifest))


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(tensor_bytes(t)).hexdigest() for name, t in read_safetensors(folder / store.TENSORS).items()}


# whole and unharmed


def test_what_is_written_is_read_back(delta: Path, base: Path) -> None:
    written, found = every_form(ModelDirectory(base).fingerprint()), store.load(delta)
    assert found.updates.keys() == written.updates.keys() and found.layouts == written.layouts
    for name, update in written.updates.items():
        again = found.updates[name]
        assert (type(again), again.shape, again.gain, again.shared) == (type(update), update.shape, update.gain, update.shared)
        for key, tensor in update.tensors().items():
            assert again.tensors()[key].dtype in (tensor.dtype, torch.int64) and torch.equal(again.tensors()[key], tensor)
    assert {k: found.manifest[k] for k in written.manifest} == written.manifest
    assert found.nbytes == written.nbytes == sum(t.nbytes for t in read_safetensors(delta / store.TENSORS).values())


def test_reading_and_writing_again_changes_nothing_and_follows_changes(delta: Path, tmp_path: Path) -> None:
    found = store.load(delta)
    store.save(tmp_path / "again", found, "a card")
    assert (tmp_path / "again" / store.TENSORS).read_bytes() == (delta / store.TENSORS).read_bytes()
    assert manifest_of(tmp_path / "again") == manifest_of(delta)
    name = LAYER + "mlp.gate_proj.weight"
    found.updates[name] = Dense(torch.ones(48, 32))
    store.save(tmp_path / "changed", found, "a card")
    assert torch.equal(store.load(tmp_path / "changed").updates[name].tensors()["values"], torch.ones(48, 32))


def test_saving_over_a_delta_replaces_it_whole(base: Path, tmp_path: Path) -> None:
    """PEFT's files of a LoRA are not left beside a delta that PEFT cannot hold."""
    model = attach(tiny("llama"), "lora", rank=2)
    assert save(model, tmp_path / "delta", base=base)["peft"] is None
    assert (tmp_path / "delta" / "adapter_config.json").is_file()
    detach(model)
    attach(model, "paca", rank=2)
    assert "columns" in save(model, tmp_path / "delta", base=base)["peft"]
    assert sorted(p.name for p in (tmp_path / "delta").iterdir()) == ["README.md", "delta.json", "delta.safetensors"]
    assert {u.form for u in store.load(tmp_path / "delta").updates.values()} == {"columns"}


# damage


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit flipped in the data": (lambda d: flip(d / store.TENSORS, -1), r"delta\.safetensors is damaged"),
    "a bit flipped in the header": (lambda d: flip(d / store.TENSORS, 20), r"delta\.safetensors"),
    "the last byte missing": (lambda d: cut(d / store.TENSORS), r"delta\.safetensors is not a valid safetensors file.*truncated|needs .* bytes"),
    "an empty tensors file": (lambda d: (d / store.TENSORS).write_bytes(b""), r"delta\.safetensors is not a valid"),
    "no tensors file": (lambda d: (d / store.TENSORS).unlink(), r"delta\.safetensors is missing"),
    "no manifest": (lambda d: (d / store.MANIFEST).unlink(), r"is no delta: it has no delta\.json"),
    "a manifest cut short": (lambda d: cut(d / store.MANIFEST) or cut(d / store.MANIFEST), r"delta\.json is not JSON"),
    "a manifest that is no text": (lambda d: (d / store.MANIFEST).write_bytes(b"\xff\xfe\xfd"), r"delta\.json is not JSON"),
    "a manifest that is a list": (lambda d: rewrite(d, []), r"delta\.json does not describe a delta"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_delta_is_refused_that_has(what: str, delta: Path) -> None:
    harm, complaint = DAMAGE[what]
    store.load(delta)
    harm(delta)
    with pytest.raises(EspalierError, match=complaint):
        store.load(delta)


@pytest.mark.parametrize("where", [0, 7, 8, 9, 1000, 2000, -2000, -2])
def test_any_flipped_bit_of_the_tensors_is_noticed(where: int, delta: Path) -> None:
    flip(delta / store.TENSORS, where)
    with pytest.raises(EspalierError, match=r"delta\.safetensors|delta\.json|q_proj|:A"):
        store.load(delta)


@pytest.mark.parametrize("what", ["gain", "shape", "method"])
def test_a_manifest_that_was_changed_by_accident_is_noticed(what: str, delta: Path) -> None:
    text = (delta / store.MANIFEST).read_text()
    (delta / store.MANIFEST).write_text({
        "gain": text.replace('"gain": 0.5', '"gain": 0.7').replace('"gain": 1.0', '"gain": 1.5'),
        "shape": text.replace("32", "31", 1), "method": text.replace('"method": "', '"method": "x', 1),
    }[what])  # fmt: skip
    with pytest.raises(EspalierError, match=r"delta\.json is damaged"):
        store.load(delta)


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split("/")

    def apply_to(manifest: dict[str, Any]) -> None:
        for parent in parents:
            manifest = manifest[parent]
        if value is KeyError:
            del manifest[last]
        else:
            manifest[last] = value

    return apply_to


QUERY, VALUE, OUTPUT, DOWN = (f"parameters/{LAYER}{m}.weight" for m in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"))
UP, NORM, SUPPORT = (f"parameters/{m}.weight" for m in (f"{LAYER}mlp.up_proj", "model.norm", f"{SECOND}post_attention_layernorm"))
CHANGES: list[tuple[str, Any, str]] = [
    ("espalier_delta", 2, "has format 2; this version reads 1"),
    ("espalier_delta", KeyError, "has format None"),
    ("tensors", {}, "damaged"),
    ("tensors", KeyError, "damaged"),
    ("tensors/" + QUERY.removeprefix("parameters/") + ":A", "0" * 64, "damaged"),
    ("removed", "all", "removed is 'all'; it must be a list"),
    ("removed", [3], r"removed is \[3\]"),
    ("files", {"../config.json": None}, "plain relative file name"),
    ("files", {"/etc/passwd": None}, "plain relative file name"),
    ("files", {"model.safetensors": None}, "no weights"),
    *(
        ("files", {name: None}, "plain relative file name, or a template in additional_chat_templates")
        for name in ("elsewhere/config.json", "additional_chat_templates/../config.json", "additional_chat_templates/more/x.jinja", "additional_chat_templates/", "..")
    ),
    *(("files", {name: None}, "plain relative") for name in ("/additional_chat_templates/x.jinja", "x/additional_chat_templates/x.jinja", "additional_chat_templates\\x", "", "a\0b")),
    *(
        ("files", {name: "0" * 64}, "no weights, index, card, record or state of a training")
        for name in (
            "pytorch_model.bin", "MODEL.SAFETENSORS", "model.pkl", "tf_model.h5", "model.safetensors.index.json", "pytorch_model.bin.index.json",
            "espalier.json", "README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", ".gitattributes", "additional_chat_templates/x.py",
        )
    ),
    ("files", {"config.json": None}, "SHA-256 of the file 'config.json' is None"),
    ("relaid", {"x": 3}, r"relaid names 'x': it is 3"),
    ("relaid", [], r"relaid is \[\]; it must be a dict"),
    ("files", {"config.json": 3}, "is 3"),
    (QUERY + "/dtype", "F31", "dtype is 'F31'"),
    (QUERY + "/dtype", "F32", "dtype is 'F32'; only an update that replaces all values"),
    (UP + "/dtype", "BOOL", "dtype is 'BOOL'; only an update that replaces all values by ones of that dtype"),
    (SUPPORT + "/dtype", "F32", "dtype is 'F32'; only an update that replaces all values"),
    (NORM + "/transposed", True, r"transposed is true for the shape \[32\]"),
    ("parameters", [], "does not describe a delta"),
    ("base", None, "base is None; it must be a dict"),
    ("base", "seedling", "base is 'seedling'"),
    ("method", 3, "method is 3; it must be a str"),
    ("lineage", 5, "lineage is 5; it must be a list"),
    ("training", [], r"training is \[\]"),
    (QUERY, KeyError, "holds 'model.layers.0.self_attn.q_proj.weight:A', which delta.json does not describe"),
    (QUERY, 3, "is malformed"),
    (QUERY + "/form", "clifford", "q_proj.weight': unknown form 'clifford'"),
    (QUERY + "/form", "dense", "is malformed"),
    (QUERY + "/form", ["low_rank"], "is malformed"),
    (QUERY + "/shape", [32, 33], "A has shape"),
    (QUERY + "/shape", [10**9, 32], "B has shape"),
    (QUERY + "/shape", [-32, 32], r"shape is \[-32, 32\]"),
    (QUERY + "/shape", [32.0, 32], r"shape is \[32.0, 32\]"),
    (QUERY + "/shape", "32", "shape is '32'"),
    (QUERY + "/shape", [], r"shape is \(\); the form needs a matrix"),
    (VALUE + "/shape", [2**40, 2**40], "for shape"),
    (VALUE + "/shape", [2**70], "shape is"),
    (QUERY + "/gain", "much", "gain is 'much'"),
    (QUERY + "/gain", float("inf"), "gain is inf"),
    (QUERY + "/gain", float("nan"), "gain is nan"),
    (QUERY + "/gain", 10**400, "is malformed"),
    (QUERY + "/gain", KeyError, "is malformed"),
    (QUERY + "/names", "abc", "names is 'abc'"),
    (QUERY + "/names", [3], r"names is \[3\]"),
    (QUERY + "/transposed", 1, "transposed is 1"),
    (QUERY + "/gate_up", None, "gate_up None"),
    (QUERY + "/shared", {"C": "pools/A"}, "has no tensor 'C'"),
    (OUTPUT + "/constants", [], "is malformed"),
    (OUTPUT + "/constants/parts", {}, r"the parts are \[\]; they must be \['inner'\]"),
    (OUTPUT + "/constants/parts/inner/form", "magnitude", "cannot stand inside a magnitude"),
    (OUTPUT + "/constants/parts/inner/gain", "much", "the gain of a part is 'much'"),
    (OUTPUT + "/constants/parts/inner/constants", {"parts": "x"}, "is malformed"),
    (DOWN + "/shared", {}, "is malformed"),
    (DOWN + "/shared/A", "pools/C", "has no tensor 'shared:pools/C'"),
    (DOWN + "/shared/A", "pools/B", "makes? an update of shape"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), CHANGES, ids=[f"{p.rpartition('weight')[2]}={v!s:.12}" for p, v, _ in CHANGES])
def test_a_changed_manifest_is_refused(path: str, value: Any, complaint: str, delta: Path, base: Path) -> None:
    manifest = manifest_of(delta)
    change(path, value)(manifest)
    rewrite(delta, manifest)
    with pytest.raises(EspalierError, match=complaint):
        load(base, [delta])


@pytest.mark.parametrize("gain", [0.5, True])
def test_a_tensor_that_is_set_as_a_whole_cannot_be_set_in_part(gain: float, delta: Path) -> None:
    manifest = manifest_of(delta)
    manifest["parameters"]["model.norm.weight"] |= {"dtype": "F32", "gain": gain}
    rewrite(delta, manifest)
    with contextlib.nullcontext() if gain == 1.0 else pytest.raises(EspalierError, match="with a gain of 1, may have it"):
        assert store.load(delta).layouts["model.norm.weight"].dtype == "F32"


def test_a_parameter_of_the_name_of_a_header_s_own_entry_is_refused(delta: Path, base: Path, tmp_path: Path) -> None:
    store.save(delta, Delta({"__metadata__": Replace(torch.ones(2))}, {"__metadata__": Layout(dtype="F32")}, {}), "a card")
    with pytest.raises(EspalierError, match=r"update of '__metadata__'.*a header's own entry"):
        apply(str(base), [str(delta)], str(tmp_path / "out"), any_base=True, quiet=True)
    with pytest.raises(EspalierError, match=r"x\.safetensors: a tensor cannot be called '__metadata__'"):
        write_safetensors(tmp_path / "x.safetensors", {"__metadata__": torch.ones(2)})


def test_a_manifest_that_names_something_twice_is_refused(delta: Path) -> None:
    text = (delta / store.MANIFEST).read_text()
    (delta / store.MANIFEST).write_text(text.replace('"method"', '"method": "another",\n "method"', 1))
    with pytest.raises(EspalierError, match=r"delta\.json is not JSON: it names 'method' twice"):
        store.load(delta)


def test_a_magnitude_as_version_0_1_wrote_it_is_read(delta: Path) -> None:
    written, manifest = store.load(delta), manifest_of(delta)
    change(OUTPUT + "/constants", {"inner": "low_rank", "inner_gain": 0.25})(manifest)
    rewrite(delta, manifest)
    name = LAYER + "self_attn.o_proj.weight"
    found, weight = store.load(delta).updates[name], randn(32, 32)
    assert torch.equal(found.apply(weight), written.updates[name].apply(weight))


def test_an_update_of_a_parameter_that_the_model_lacks_is_refused(delta: Path, base: Path) -> None:
    manifest = manifest_of(delta)
    tensors = {n.replace("layers.0", "layers.7"): t for n, t in read_safetensors(delta / store.TENSORS).items()}
    write_safetensors(delta / store.TENSORS, tensors)
    manifest["parameters"] = {n.replace("layers.0", "layers.7"): e for n, e in manifest["parameters"].items()}
    manifest["tensors"] = digests(delta)
    rewrite(delta, manifest)
    with pytest.raises(EspalierError, match=r"updates 'model\.layers\.7.*', which the model does not have"):
        load(base, [delta])


def test_updates_of_two_parameters_that_claim_one_tensor_are_refused(delta: Path, base: Path, tmp_path: Path) -> None:
    manifest = manifest_of(delta)
    manifest["parameters"][f"{LAYER}self_attn.q_proj.weight"]["names"].append(f"{LAYER}self_attn.o_proj.weight")
    rewrite(delta, manifest)
    with pytest.raises(EspalierError, match=r"which are one tensor of the base: model\.layers\.0\.self_attn\.o_proj"):
        apply(str(base), [str(delta)], str(tmp_path / "out"), quiet=True)
    assert not (tmp_path / "out").exists()


# what is no delta


def test_a_run_that_has_not_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "recipe.yaml").write_text("verb: tune\n")
    with pytest.raises(EspalierError, match=r"a run that has not finished.*--resume"):
        store.load(tmp_path / "out")


def test_a_peft_adapter_says_how_to_import_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(EspalierError, match="is a PEFT adapter; import it first: espalier convert"):
        store.load(tmp_path)


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder", "a model"])
def test_what_is_no_delta_is_refused(what: str, base: Path, tmp_path: Path) -> None:
    path = {"nothing": tmp_path / "none", "a file": base / "config.json", "an empty folder": tmp_path, "a model": base}[what]
    with pytest.raises(EspalierError, match=r"is no delta: it has no delta\.json"):
        store.load(path)


# writing is all or nothing


def test_a_full_disk_leaves_the_old_delta_and_no_litter(delta: Path) -> None:
    bigger = store.load(delta)
    bigger.updates[LAYER + "mlp.up_proj.weight"] = Replace(torch.zeros(48, 32, dtype=torch.float64))
    before = {p.name: p.read_bytes() for p in delta.iterdir()}
    with disk_full_at(4000), pytest.raises(OSError):
        store.save(delta, bigger, "a card")
    assert {p.name: p.read_bytes() for p in delta.iterdir()} == before
    store.load(delta)


def test_a_write_that_ends_before_the_manifest_leaves_no_delta(delta: Path) -> None:
    """The manifest comes last: whatever stops the writing before it, new tensors are never read with old facts."""
    changed = store.load(delta)
    changed.updates[LAYER + "mlp.up_proj.weight"] = Replace(torch.zeros(48, 32))
    (delta / "README.md").unlink()
    (delta / "README.md").mkdir()  # the card, which comes just before the manifest, cannot be written
    with pytest.raises(OSError):
        store.save(delta, changed, "a card")
    assert sorted(p.name for p in delta.iterdir()) == ["README.md", "delta.safetensors"]
    with pytest.raises(EspalierError, match=r"is no delta: it has no delta\.json"):
        store.load(delta)


# whose base it is


def test_a_delta_of_another_base_is_refused_with_both_fingerprints(base: Path, pristine: Path, tmp_path: Path) -> None:
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    made_for, found = ModelDirectory(base).fingerprint(), ModelDirectory(tmp_path / "other").fingerprint()
    assert made_for != found
    for use in (
        lambda: load(tmp_path / "other", [pristine]),
        lambda: apply(str(tmp_path / "other"), [str(pristine)], str(tmp_path / "out"), quiet=True),
    ):
        with pytest.raises(EspalierError, match="made for the base 'tiny'") as refusal:
            use()
        assert made_for in str(refusal.value) and found in str(refusal.value) and "--any-base" in str(refusal.value)
    with pytest.raises(EspalierError, match=r"Give the right base$"):  # convert has no such option
        convert(str(pristine), str(tmp_path / "out"), to="dense", model=str(tmp_path / "other"), quiet=True)
    assert not (tmp_path / "out").exists()


def test_any_base_is_accepted_when_asked_for(base: Path, pristine: Path, tmp_path: Path) -> None:
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    here, there = load(tmp_path / "other", [pristine], any_base=True), load(base, [pristine])
    assert not torch.allclose(here(tokens()).logits, there(tokens()).logits)
    apply(str(tmp_path / "other"), [str(pristine)], str(tmp_path / "out"), any_base=True, quiet=True)
    torch.testing.assert_close(load(tmp_path / "out")(tokens()).logits, here(tokens()).logits, rtol=1e-4, atol=1e-5)


def test_cutting_the_base_into_other_files_does_not_change_its_fingerprint(base: Path, pristine: Path, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(ModelDirectory(tmp_path / "shards").files()) > 2
    assert ModelDirectory(tmp_path / "shards").fingerprint() == ModelDirectory(base).fingerprint()
    torch.testing.assert_close(load(tmp_path / "shards", [pristine])(tokens()).logits, load(base, [pristine])(tokens()).logits)


def test_one_value_another_dtype_or_another_name_changes_the_fingerprint(base: Path, tmp_path: Path) -> None:
    tensors = read_safetensors(base / "model.safetensors")
    name = "model.norm.weight"
    one_bit = tensors[name].view(torch.int32).clone()
    one_bit[3] ^= 1
    variants = {
        "value": {**tensors, name: one_bit.view(torch.float32)},
        "dtype": {**tensors, name: tensors[name].view(torch.int32)},
        "shape": {**tensors, name: tensors[name][None]},
        "name": {n.replace(name, "model.Norm.weight"): t for n, t in tensors.items()},
        "less": {n: t for n, t in tensors.items() if n != name},
    }
    found = {ModelDirectory(base).fingerprint()}
    for variant, content in variants.items():
        shutil.copytree(base, tmp_path / variant)
        write_safetensors(tmp_path / variant / "model.safetensors", content)
        found.add(ModelDirectory(tmp_path / variant).fingerprint())
    assert len(found) == 1 + len(variants)


def test_a_base_that_changed_in_place_since_is_refused(base: Path, pristine: Path, tmp_path: Path) -> None:
    """The cache of hashes is not fooled by a change that keeps path and size."""
    own = shutil.copytree(base, tmp_path / "own")
    load(own, [pristine])
    flip(own / "model.safetensors", -1)
    with pytest.raises(EspalierError, match="made for the base"):
        load(own, [pristine])


@pytest.mark.parametrize("replaced", [False, True], ids=["written to", "replaced"])
@pytest.mark.parametrize("streamed", [False, True], ids=["at once", "as it is read"])
def test_a_hash_taken_while_the_file_was_rewritten_is_not_kept(base: Path, tmp_path: Path, replaced: bool, streamed: bool) -> None:
    """Neither one of half old and half new bytes, nor that of the old ones under the new file's name."""
    own = shutil.copytree(base, tmp_path / "own")
    path, directory = own / "model.safetensors", ModelDirectory(own)
    hashes, names = Hashes(directory), sorted(directory, key=lambda name: -directory.info(name).stop)
    for name in names[: len(names) // 2]:
        hashes.complete(name)
    if replaced:
        flip(Path(shutil.copy(path, tmp_path / "new")), -1)
        (tmp_path / "new").replace(path)
    else:
        flip(path, -1)
    for name in names[len(names) // 2 :]:
        hashes.complete(name)
    hashes.fingerprint() if streamed else directory.fingerprint()
    other = shutil.copytree(own, tmp_path / "other")
    assert ModelDirectory(own).fingerprint() == ModelDirectory(other).fingerprint() != ModelDirectory(base).fingerprint()


def test_a_shard_may_hold_tensors_that_the_index_leaves_out(base: Path, pristine: Path, tmp_path: Path) -> None:
    """Only what the index names is the model: for the fingerprint, and in what apply writes."""
    folder = shutil.copytree(base, tmp_path / "m")
    tensors = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "a.safetensors", {**tensors, "stale": torch.zeros(3)})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert ModelDirectory(folder).fingerprint() == ModelDirectory(base).fingerprint()
    apply(str(folder), [str(pristine)], str(tmp_path / "out"), quiet=True)
    assert set(ModelDirectory(tmp_path / "out")) == set(tensors)


def test_applied_equals_loaded_for_every_form(base: Path, pristine: Path, tmp_path: Path) -> None:
    result = apply(str(base), [str(pristine)], str(tmp_path / "out"), quiet=True)
    assert result["changed"] == 17
    with torch.no_grad():
        there, here = load(base, [pristine])(tokens()).logits, load(tmp_path / "out")(tokens()).logits
        bare = load(base)(tokens()).logits
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    assert (there - bare).abs().max() > 0.1


# forged manifests and files: never anything but a refusal


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([2**63, -1, 10**400, 1e308, "magnitude", "replace", "low_rank", "pools/A", "shared", "model.norm.weight"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every part of a JSON value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from nodes(inner, (*path, key))


def mutate(data: st.DataObject, manifest: Any) -> Any:
    """A copy with one part replaced, removed, added to, or exchanged with another part."""
    manifest = copy.deepcopy(manifest)
    paths = list(nodes(manifest))
    path = data.draw(st.sampled_from(paths))

    def at(path: tuple[Any, ...]) -> Any:
        found = manifest
        for key in path:
            found = found[key]
        return found

    action = data.draw(st.sampled_from(["replace", "remove", "add", "exchange"]))
    if not path:
        return data.draw(json_values)
    parent, key = at(path[:-1]), path[-1]
    if action == "remove":
        del parent[key]
    elif action == "add" and isinstance(parent, dict):
        parent[data.draw(st.text(max_size=4) | st.sampled_from(["A", "B", "inner", "model.norm.weight"]))] = data.draw(json_values)
    elif action == "exchange":
        parent[key] = copy.deepcopy(at(data.draw(st.sampled_from(paths))))
    else:
        parent[key] = data.draw(json_values)
    return manifest


fuzzed = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


def uses_or_refuses(folder: Path, base: Path, model: torch.nn.Module, out: Path) -> None:
    """Running a delta, and applying it, either work or raise one EspalierError; what is applied is a whole model."""
    directory = ModelDirectory(base)
    with contextlib.suppress(EspalierError):
        store.manifest_after([store.load(folder)], "convert", {})
    try:
        put_on(model, folder, directory, any_base=True)
        model(tokens(1, 3))
    except EspalierError as error:
        assert "\n" not in str(error)
    finally:
        detach(model)
    shutil.rmtree(out, ignore_errors=True)
    try:
        apply(str(base), [str(folder)], str(out), any_base=True, quiet=True)
    except EspalierError as error:
        assert "\n" not in str(error) and not out.exists()
        return
    assert ModelDirectory(out).nbytes() and not [p.name for p in out.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


@pytest.fixture(scope="module")
def differing(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta that changes, adds, removes and resizes tensors and files, with tensors in another layout of the base."""
    folder = tmp_path_factory.mktemp("differing")
    tuned = shutil.copytree(base, folder / "tuned")
    tensors = read_safetensors(base / "model.safetensors")
    tensors = {n.removeprefix("model.") if n.endswith("k_proj.weight") else n: t for n, t in tensors.items()}
    tensors |= {"new": torch.arange(3), "model.norm.weight": torch.zeros(5)}
    del tensors[LAYER + "mlp.down_proj.weight"]
    tensors[LAYER + "mlp.up_proj.weight"].view(-1)[:3] += 1
    tensors["layers.0.self_attn.k_proj.weight"].view(-1)[:3] += 1
    write_safetensors(tuned / "model.safetensors", tensors)
    (tuned / "generation_config.json").unlink()
    (tuned / "LICENSE").write_text("as it is")
    diff(str(base), str(tuned), str(folder / "delta"), quiet=True)
    manifest = manifest_of(folder / "delta")
    assert all(manifest[key] for key in ("removed", "relaid", "files"))
    manifest["lineage"] = [{"delta": "x", "method": "lora", "hyperparameters": {}, "settings": {}, "sha256": "0"}]
    rewrite(folder / "delta", manifest)
    apply(str(base), [str(folder / "delta")], str(folder / "out"), quiet=True)
    return folder / "delta"


@pytest.mark.parametrize("of", ["every form", "two checkpoints"])
@fuzzed
@given(data=st.data())
def test_no_forged_manifest_makes_anything_else_than_a_refusal(of: str, data: st.DataObject, pristine: Path, differing: Path, base: Path, tmp_path: Path) -> None:
    folder, source = tmp_path / "forged", pristine if of == "every form" else differing
    if not folder.exists():
        shutil.copytree(source, folder)
    manifest = manifest_of(source)
    for _ in range(data.draw(st.integers(1, 2))):
        manifest = mutate(data, manifest)
        assume(isinstance(manifest, dict))
    rewrite(folder, manifest)
    with torch.no_grad():
        uses_or_refuses(folder, base, shared_model(), tmp_path / "out")


_model: list[torch.nn.Module] = []


def shared_model() -> torch.nn.Module:
    if not _model:
        _model.append(tiny("llama"))
    return _model[0]


@fuzzed
@given(data=st.data())
def test_no_forged_tensors_make_anything_else_than_a_refusal(data: st.DataObject, pristine: Path, base: Path, tmp_path: Path) -> None:
    """Other shapes, dtypes and index values, in a file that is well formed and whose digest is right."""
    folder = tmp_path / "forged"
    if not folder.exists():
        shutil.copytree(pristine, folder)
    tensors = read_safetensors(pristine / store.TENSORS)
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["dtype", "shape", "value", "name"]))
    if kind == "dtype":
        names = ["bool", "uint8", "int8", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float64", "float8_e4m3fn"]
        tensors[name] = tensors[name].to(getattr(torch, data.draw(st.sampled_from(names))))
    elif kind == "shape":
        tensors[name] = torch.zeros(data.draw(st.lists(st.integers(0, 4), max_size=4)), dtype=tensors[name].dtype)
    elif kind == "value" and tensors[name].dtype in (torch.int32, torch.int64):
        tensors[name].view(-1)[0] = data.draw(st.integers(-(2**31), 2**31 - 1))
    elif kind == "name":
        tensors[data.draw(st.text(max_size=3) | st.just(f"{name}x"))] = tensors.pop(name)
    write_safetensors(folder / store.TENSORS, tensors)
    manifest = manifest_of(pristine)
    manifest["tensors"] = digests(folder)
    rewrite(folder, manifest)
    with torch.no_grad():
        uses_or_refuses(folder, base, shared_model(), tmp_path / "out")


def test_a_stored_delta_trains_nothing_and_the_next_one_stands_on_it(base: Path, pristine: Path) -> None:
    model = load(base, [pristine])
    assert not trainable_parameters(model)
    before = model(tokens()).logits
    attach(model, "lora", rank=2)
    assert torch.equal(model(tokens()).logits, before)
    assert len(trainable_parameters(model)) == 2 * 14
