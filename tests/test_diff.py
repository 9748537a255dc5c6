"""``diff`` and ``apply``: TUNED comes back from BASE and the delta, byte for byte; nothing is in memory as a whole."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier.anatomy.layout import is_transposed
from espalier.anatomy.parameters import parameters
from espalier.attach.load import load, load_model
from espalier.checkpoint import stream
from espalier.checkpoint.directory import INDEX, ModelDirectory
from espalier.checkpoint.safetensors_file import read_safetensors, write_safetensors
from espalier.delta import store
from espalier.delta.forms import Dense, Replace, Update
from espalier.errors import EspalierError
from espalier.verbs.apply import apply
from espalier.verbs.diff import diff
from espalier.verbs.revert import revert


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config: Any) -> Path:
    """A checkpoint of these tensors with a config, cut into files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    names = sorted(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    files = {n: f"model-{i % shards:05d}.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        write_safetensors(folder / file, {n: tensors[n] for n in names if files[n] == file})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def all_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    directory = ModelDirectory(folder)
    return {n: (directory.info(n).dtype, directory.info(n).shape, directory.read(n).reshape(-1).view(torch.uint8).numpy().tobytes()) for n in directory}


def assert_same(found: Path, expected: Path) -> None:
    assert all_bytes(found) == all_bytes(expected)
    a, b = ({n: p.read_bytes() for n, p in ModelDirectory(f).side_files().items()} for f in (found, expected))
    assert a == b


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]


def values(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) * 20
    return (made > 0) if dtype == torch.bool else made.abs().to(dtype) if dtype == torch.uint8 else made.to(dtype)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two checkpoints: tensors that stay, change here and there, change everywhere, come, go, or get another shape or dtype."""
    base: dict[str, torch.Tensor] = {"always": randn(3)}
    tuned: dict[str, torch.Tensor] = {"always": randn(3)}
    for number in range(draw(st.integers(1, 6))):
        name, dtype = f"layer.{number}.weight", draw(st.sampled_from(DTYPES))
        shape = draw(st.sampled_from([(), (1,), (0,), (7,), (3, 5), (16, 64), (2, 3, 4), (2, 3, 2, 2)]))
        old = values(draw, shape, dtype)
        kind = draw(st.sampled_from(["same", "some", "all", "added", "removed", "resized", "retyped", "sign of zero", "NaN"]))
        if kind != "added":
            base[name] = old
        if kind == "removed":
            continue
        new = old.clone()
        if kind == "some" and new.numel():
            where = draw(st.integers(0, new.numel() - 1))
            flat = new.view(-1)
            flat[where] = ~flat[where] if dtype == torch.bool else (flat[where].float() + 3).to(dtype)
        elif kind == "all":
            new = values(draw, shape, dtype)
        elif kind == "resized":
            new = values(draw, (4, *shape), dtype)
        elif kind == "retyped":
            new = values(draw, shape, draw(st.sampled_from(DTYPES)))
        elif kind == "sign of zero" and dtype.is_floating_point and new.numel() and dtype != torch.float8_e4m3fn:
            base[name].view(-1)[0], new.view(-1)[0] = 0.0, -0.0
        elif kind == "NaN" and dtype.is_floating_point and new.numel() and dtype != torch.float8_e4m3fn:
            new.view(-1)[-1] = float("nan")
        tuned[name] = new
    return base, tuned


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(pair=pairs(), shards=st.tuples(st.integers(1, 3), st.integers(1, 3)), small=st.booleans())
def test_applying_the_difference_gives_the_tuned_model_byte_for_byte(pair: Any, shards: Any, small: bool, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("pair")
    base = write(folder / "base", pair[0], shards[0])
    tuned = write(folder / "tuned", pair[1], shards[1], note="tuned")
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    (base / "generation_config.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(stream, "SLICE", 24)
        result = diff(str(base), str(tuned), str(folder / "delta"), quiet=True)
        apply(str(base), [str(folder / "delta")], str(folder / "out"), quiet=True)
    assert_same(folder / "out", tuned)
    assert result["removed"] == sorted(set(pair[0]) - set(pair[1])) and result["added"] == sorted(set(pair[1]) - set(pair[0]))
    changed = {n for n in set(pair[0]) & set(pair[1]) if all_bytes(base)[n][:2] == all_bytes(tuned)[n][:2] and all_bytes(base)[n] != all_bytes(tuned)[n]}
    assert {t["name"] for t in result["tensors"]} == changed
    revert(str(folder / "out"), str(folder / "back"), quiet=True)
    assert_same(folder / "back", base)


@pytest.fixture(scope="module")
def tuned_pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> (base, tuned): transformers' checkpoints in bf16, of which some weights moved."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny(family).to(torch.bfloat16)
            model.save_pretrained(folder / "base")
            with torch.no_grad():
                for number, (name, parameter) in enumerate(model.named_parameters()):
                    if number % 2 or "expert" in name:
                        parameter.add_(randn(*parameter.shape, seed=number) * 0.05)
            model.save_pretrained(folder / "tuned")
            made[family] = folder / "base", folder / "tuned"
        return made[family]

    return get


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_transformers_checkpoint_comes_back_and_loads_as_it_is(family: str, tuned_pair: Any, tmp_path: Path) -> None:
    base, tuned = tuned_pair(family)
    diff(str(base), str(tuned), str(tmp_path / "delta"), quiet=True)
    apply(str(base), [str(tmp_path / "delta")], str(tmp_path / "out"), shard_size="20KB", quiet=True)
    assert_same(tmp_path / "out", tuned)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1 and (tmp_path / "out" / INDEX).is_file()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(tokens()).logits, load_model(tuned)(tokens()).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_difference_goes_onto_a_live_model(family: str, tuned_pair: Any, tmp_path: Path) -> None:
    base, tuned = tuned_pair(family)
    diff(str(base), str(tuned), str(tmp_path / "delta"), quiet=True)
    with torch.no_grad():
        torch.testing.assert_close(load(base, [tmp_path / "delta"])(tokens()).logits, load_model(tuned)(tokens()).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "mixtral", "qwen3"])
def test_the_table_of_transposed_matrices_is_that_of_the_modules(family: str) -> None:
    model = tiny(family)
    for target in parameters(model):
        assert is_transposed(model.config.model_type, target.name) == target.transposed, target.name


def test_a_sparse_update_is_stored_by_positions_or_bitmap_and_a_dense_one_whole(tmp_path: Path) -> None:
    base = {"few": randn(64, 64), "many": randn(64, 64), "all": randn(64, 64)}
    tuned = {n: t.clone() for n, t in base.items()}
    tuned["few"].view(-1)[::200] += 1
    tuned["many"].view(-1)[::4] += 1
    tuned["all"] += 1
    result = diff(str(write(tmp_path / "b", base)), str(write(tmp_path / "t", tuned)), str(tmp_path / "d"), quiet=True)
    assert {t["name"]: t["form"] for t in result["tensors"]} == {
        "few": "values at positions", "many": "values by bitmap", "all": "all values",
    }  # fmt: skip
    sizes = {n: u.nbytes for n, u in store.load(tmp_path / "d").updates.items()}
    assert sizes == {"few": 21 * (4 + 2), "many": 1024 * 2 + 4096 // 8, "all": 4096 * 2}
    assert result["unchanged"] == 1 - (21 + 1024 + 4096) / (3 * 4096)


def test_the_effective_rank_is_that_of_the_update(tmp_path: Path) -> None:
    base = {"one": randn(200, 150, dtype=torch.float32), "flat": randn(200, 150, dtype=torch.float32)}
    orthonormal = torch.linalg.qr(randn(200, 40, seed=3, dtype=torch.float32)).Q @ torch.linalg.qr(randn(150, 40, seed=4, dtype=torch.float32)).Q.T
    tuned = {"one": base["one"] + randn(200, 1, seed=1, dtype=torch.float32) @ randn(1, 150, seed=2, dtype=torch.float32), "flat": base["flat"] + orthonormal}
    result = diff(str(write(tmp_path / "b", base)), str(write(tmp_path / "t", tuned)), str(tmp_path / "d"), quiet=True)
    ranks = {t["name"]: t["effective_rank"] for t in result["tensors"]}
    assert 1 <= ranks["one"] < 2.5 and 30 < ranks["flat"] < 53  # 1 and 40, from 16 random probes


def test_ranks_are_measured_where_they_are_asked_for(tmp_path: Path) -> None:
    """rank_ratio = matrix_rank(dW) / min(shape), with a threshold of its own: rounding to bf16 counts as rank otherwise."""
    base = {"low": randn(60, 40, dtype=torch.float32), "full": randn(60, 40, dtype=torch.float32), "experts": randn(2, 60, 40, dtype=torch.float32)}
    moves = {name: randn(*t.shape, seed=1, dtype=torch.float32) for name, t in base.items()}
    moves["low"] = randn(60, 4, seed=2, dtype=torch.float32) @ randn(4, 40, seed=3, dtype=torch.float32) + 1e-6 * moves["low"]
    moves["experts"][1] = 0
    tuned = {name: t + moves[name] for name, t in base.items()}
    models = str(write(tmp_path / "b", base)), str(write(tmp_path / "t", tuned))
    found = {t["name"]: t for t in diff(*models, str(tmp_path / "d"), ranks=True, quiet=True)["tensors"]}
    assert found["low"]["rank_ratio"] == 4 / 40 and found["full"]["rank_ratio"] == 1 and found["experts"]["rank_ratio"] == 1
    s = torch.linalg.svdvals(moves["full"])
    assert found["full"]["stable_rank"] == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-3) and 1 <= found["low"]["stable_rank"] <= 4
    assert {t["rank_ratio"] for t in diff(*models, str(tmp_path / "e"), quiet=True)["tensors"]} == {None}


def test_nothing_has_changed_from_a_model_to_itself(tmp_path: Path) -> None:
    """sparsity(t, t) = 1, in both counts."""
    model = str(write(tmp_path / "b", {"w": randn(8, 8)}))
    result = diff(model, model, str(tmp_path / "d"), ranks=True, quiet=True)
    assert result["unchanged"] == result["unchanged_to_1e-5"] == 1 and result["tensors"] == []


def test_small_moves_are_counted_as_the_paper_counts_them(tmp_path: Path) -> None:
    base = {"w": torch.zeros(10, 10)}
    tuned = {"w": torch.zeros(10, 10)}
    tuned["w"].view(-1)[:30] = 5e-6
    tuned["w"].view(-1)[30:50] = 1.0
    (tensor,) = diff(str(write(tmp_path / "b", base)), str(write(tmp_path / "t", tuned)), str(tmp_path / "d"), quiet=True)["tensors"]
    assert tensor["changed"] == 50 and tensor["moved_less_than_1e-5"] == 80


@pytest.mark.parametrize(("to", "options"), [("dense", {}), ("lowrank", {"rank": 4}), ("sparse", {"density": 0.3}), ("columns", {"density": 0.3})])
def test_a_lossy_form_reports_the_error_that_applying_it_makes(to: Any, options: Any, tmp_path: Path) -> None:
    base = {"a.weight": randn(24, 16, dtype=torch.float32), "norm.weight": randn(16, dtype=torch.float32)}
    tuned = {n: t + randn(*t.shape, seed=5, dtype=torch.float32) * 0.1 for n, t in base.items()}
    paths = write(tmp_path / "b", base), write(tmp_path / "t", tuned)
    result = diff(str(paths[0]), str(paths[1]), str(tmp_path / "d"), to=to, **options, quiet=True)
    apply(str(paths[0]), [str(tmp_path / "d")], str(tmp_path / "out"), quiet=True)
    out = read_safetensors(tmp_path / "out" / "model.safetensors")
    moved = tuned["a.weight"] - base["a.weight"]
    error = float((out["a.weight"] - tuned["a.weight"]).norm() / moved.norm())
    assert torch.equal(out["norm.weight"], tuned["norm.weight"])
    assert {t["name"]: t["error"] for t in result["tensors"]} == {"a.weight": pytest.approx(error, abs=1e-5), "norm.weight": None}


SIDE = ("tokenizer.model.v3", "vocab.bpe", "LICENSE", "spiece.model", "modeling_x.py", "adapter.txt", "additional_chat_templates/rag.jinja")
NOT_SIDE = (
    "README.md", "espalier.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "x.gguf", "m.onnx", "c.pth",
    "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin", ".gitattributes", "original/params.json",
)  # fmt: skip


def test_every_file_beside_the_weights_comes_back_and_nothing_else_is_carried(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(2, 2)}), write(tmp_path / "b", {"w": randn(2, 2) + 1})
    for name in (*SIDE, *NOT_SIDE):
        (b / name).parent.mkdir(exist_ok=True)
        (b / name).write_text(f"content of {name}")
    (b / "LICENSE").rename(tmp_path / "blob")
    (b / "LICENSE").symlink_to(tmp_path / "blob")  # as the hub's cache has all files
    result = diff(str(a), str(b), str(tmp_path / "d"), quiet=True)
    assert result["files"] == sorted(SIDE)
    apply(str(a), [str(tmp_path / "d")], str(tmp_path / "out"), quiet=True)
    for name in SIDE:
        assert (tmp_path / "out" / name).read_text() == f"content of {name}"
    assert not [name for name in NOT_SIDE[2:] if (tmp_path / "out" / name).exists()]


def test_a_file_of_a_delta_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(2, 2)}), write(tmp_path / "b", {"w": randn(2, 2) + 1}, more=1)
    diff(str(a), str(b), str(tmp_path / "d"), quiet=True)
    (tmp_path / "d" / "files" / "config.json").rename(tmp_path / "secret")
    (tmp_path / "d" / "files" / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(EspalierError, match=r"config\.json is a link to .*secret"):
        apply(str(a), [str(tmp_path / "d")], str(tmp_path / "out"), quiet=True)


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("content", ["[]", "{", "null", '{"a": 1, "a": 2}'])
def test_a_delta_that_would_leave_no_config_leaves_no_model(content: str, dtype: Any, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(2, 2)}), write(tmp_path / "b", {"w": randn(2, 2) + 1}, more=1)
    diff(str(a), str(b), str(tmp_path / "d"), quiet=True)
    delta = store.load(tmp_path / "d")
    delta.manifest["files"]["config.json"] = hashlib.sha256(content.encode()).hexdigest()
    (tmp_path / "d" / "files" / "config.json").write_text(content)
    store.save(tmp_path / "d", delta, "a card")
    with pytest.raises(EspalierError, match=r"config\.json"):
        apply(str(a), [str(tmp_path / "d")], str(tmp_path / "out"), dtype=dtype, quiet=True)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def stored_delta(folder: Path, **updates: Update) -> str:
    store.save(folder, store.Delta(updates, {n: store.Layout() for n in updates}, {"method": "forged"}), "a card")
    return str(folder)


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_computed_value_that_is_not_finite_is_refused_by_name(bad: float, of: torch.dtype, tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"v": randn(3, dtype=of), "w": randn(4, 4, dtype=of)})
    values = torch.zeros(4, 4)
    values[2, 1] = bad
    with pytest.raises(EspalierError, match=r"w: a value would become (nan|inf|-inf), from .*; it must be finite"):
        apply(str(a), [stored_delta(tmp_path / "d", w=Dense(values))], str(tmp_path / "out"), any_base=True, quiet=True)
    assert not (tmp_path / "out").exists()
    apply(str(a), [stored_delta(tmp_path / "e", w=Replace(values.to(of)))], str(tmp_path / "out"), any_base=True, quiet=True)
    assert not torch.isfinite(read_safetensors(tmp_path / "out" / "model.safetensors")["w"]).all()


def test_a_base_that_is_not_finite_stays_as_it_is_where_nothing_moves_it(tmp_path: Path) -> None:
    """Masks are kept as infinities in some checkpoints."""
    weight = torch.zeros(4, 4)
    weight[1] = float("-inf")
    a = write(tmp_path / "a", {"w": weight})
    apply(str(a), [stored_delta(tmp_path / "d", w=Dense(torch.ones(4, 4)))], str(tmp_path / "out"), any_base=True, dtype="fp16", quiet=True)
    assert torch.equal(read_safetensors(tmp_path / "out" / "model.safetensors")["w"], (weight + 1).half())


@pytest.mark.parametrize("whole", [True, False])
def test_values_that_the_dtype_cannot_hold_are_refused_by_name(whole: bool, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(2, 2), "v": randn(2)}), write(tmp_path / "b", {"w": torch.full((3, 2) if whole else (2, 2), 1e6), "v": randn(2)})
    diff(str(a), str(b), str(tmp_path / "d"), quiet=True)
    with pytest.raises(EspalierError, match=r"w: a value would become inf, from 1e\+06; it must be finite, which in float16 is at most 6\.55e\+04"):
        apply(str(a), [str(tmp_path / "d")], str(tmp_path / "out"), dtype="fp16", quiet=True)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_not_finite_is_refused(scale: float, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(2, 2), "v": randn(2)}), write(tmp_path / "b", {"w": randn(2, 2) + 1, "v": randn(2) + 1})
    for name in ("d", "e"):
        diff(str(a), str(b), str(tmp_path / name), quiet=True)
    with pytest.raises(EspalierError, match=r"the scale is -?(nan|inf); it must be a finite number"):
        apply(str(a), [str(tmp_path / "d")], str(tmp_path / "out"), scale=scale, quiet=True)
    apply(str(a), [str(tmp_path / "d"), str(tmp_path / "e")], str(tmp_path / "out"), quiet=True)
    record = json.loads((tmp_path / "out" / "espalier.json").read_text())
    (tmp_path / "out" / "espalier.json").write_text(json.dumps({**record, "scale": scale}))
    with pytest.raises(EspalierError, match=r"espalier\.json: the scale is"):
        revert(str(tmp_path / "out"), str(tmp_path / "back"), delta=[str(tmp_path / "d")], quiet=True)


@pytest.mark.parametrize(("to", "option", "complaint"), [
    ("auto", {"rank": -4}, "--rank does nothing with --to auto; it is an option of lowrank"),
    ("auto", {"bits": 77}, "--bits does nothing with --to auto; it is an option of quantized"),
    ("lowrank", {"rank": 2, "density": 0.5}, "--density does nothing with --to lowrank; it is an option of sparse, rows, columns, ternary"),
    ("dense", {"energy": 0.9}, "--energy does nothing"),
    ("sparse", {"seed": 1}, "--seed does nothing"),
])  # fmt: skip
def test_an_option_that_does_nothing_is_refused(to: Any, option: Any, complaint: str, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(8, 8)}), write(tmp_path / "b", {"w": randn(8, 8) + 1})
    with pytest.raises(EspalierError, match=complaint):
        diff(str(a), str(b), str(tmp_path / "d"), to=to, **option, quiet=True)


def test_an_output_may_be_the_empty_folder_that_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path / "a", {"w": randn(8, 8)}), write(tmp_path / "b", {"w": randn(8, 8) + 1})
    for folder in ("d", "out"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "d")
    assert diff(str(a), str(b), ".", quiet=True)["bytes"] > 0
    monkeypatch.chdir(tmp_path / "out")
    apply(str(a), [str(tmp_path / "d")], ".", quiet=True)
    assert_same(tmp_path / "out", b)


def test_only_the_options_of_the_form_are_recorded(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(8, 8)}), write(tmp_path / "b", {"w": randn(8, 8) + 1})
    for to, options, recorded in (("auto", {}, {}), ("lowrank", {"rank": 2}, {"rank": 2, "seed": 0}), ("quantized", {"bits": 3}, {"bits": 3, "group": 64})):
        diff(str(a), str(b), str(tmp_path / to), to=to, **options, quiet=True)  # type: ignore[arg-type]
        assert store.load(tmp_path / to).manifest["hyperparameters"] == {"to": to, **recorded}


@pytest.mark.parametrize("to", ["auto", "dense"])
def test_a_disk_that_is_too_small_for_the_delta_is_refused(to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path / "a", {"w": torch.zeros(512, 512)}), write(tmp_path / "b", {"w": torch.ones(512, 512)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, (8 << 20) + 512 * 512 * 4 - 1))  # type: ignore[attr-defined]
    with pytest.raises(EspalierError, match=r"the delta in .*d needs 9.0 MiB on the disk"):
        diff(str(a), str(b), str(tmp_path / "d"), to=to, quiet=True)
    assert not (tmp_path / "d").exists()


def test_models_without_a_tensor_in_common_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {f"a.{n}.w": randn(1) for n in range(3000)}), write(tmp_path / "b", {f"b.{n}.w": randn(1) for n in range(3000)})
    with pytest.raises(EspalierError, match="have no tensor in common"):
        diff(str(a), str(b), str(tmp_path / "d"), quiet=True)


def test_numbers_whose_powers_no_float_holds_come_back(tmp_path: Path) -> None:
    base, tuned = ({"w": torch.full((4, 4), value, dtype=torch.float64)} for value in (1e100, -1e100))
    a, b = write(tmp_path / "a", base), write(tmp_path / "b", tuned)
    assert diff(str(a), str(b), str(tmp_path / "d"), quiet=True)["tensors"][0]["norm"] == pytest.approx(8e100)
    apply(str(a), [str(tmp_path / "d")], str(tmp_path / "out"), quiet=True)
    assert_same(tmp_path / "out", b)


def test_the_effective_rank_of_a_convolution_is_that_of_its_matrix_and_experts_have_none(tmp_path: Path) -> None:
    shapes = {"conv": (20, 4, 3, 5), "experts": (4, 20, 10), "nothing": (0, 4, 3, 2**30), "wide": (0, 2**40)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    base["conv"] = torch.zeros(20, 60)
    base["conv"][:20, 40:] = torch.eye(20)
    tuned = {name: t + 1 if name == "experts" else t for name, t in base.items()}
    tuned["conv"], base["conv"] = base["conv"].reshape(shapes["conv"]), torch.zeros(shapes["conv"])
    found = diff(str(write(tmp_path / "a", base)), str(write(tmp_path / "b", tuned)), str(tmp_path / "d"), quiet=True)["tensors"]
    ranks = {t["name"]: t["effective_rank"] for t in found}
    assert ranks == {"conv": pytest.approx(20, rel=0.4), "experts": None}


def test_models_whose_names_differ_by_a_prefix_that_no_family_has_are_refused_by_name(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"base_model.x.weight": randn(2, 2)}), write(tmp_path / "b", {"x.weight": randn(2, 2)})
    with pytest.raises(EspalierError, match=r"'base_model\.x\.weight' that .* calls 'x\.weight'"):
        diff(str(a), str(b), str(tmp_path / "d"), quiet=True)
    assert not (tmp_path / "d").exists()


def test_a_delta_that_sets_whole_tensors_cannot_be_scaled(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(2, 2)}), write(tmp_path / "b", {"w": randn(3, 2)})
    diff(str(a), str(b), str(tmp_path / "d"), quiet=True)
    with pytest.raises(EspalierError, match=r"'w' as a whole, which cannot be scaled by 0\.5"):
        apply(str(a), [str(tmp_path / "d")], str(tmp_path / "out"), scale=0.5, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_changed_side_file_of_a_delta_is_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(2, 2)}), write(tmp_path / "b", {"w": randn(2, 2)}, more=1)
    diff(str(a), str(b), str(tmp_path / "d"), quiet=True)
    (tmp_path / "d" / "files" / "config.json").write_text("{}")
    with pytest.raises(EspalierError, match=r"files/config\.json is missing or damaged"):
        apply(str(a), [str(tmp_path / "d")], str(tmp_path / "out"), quiet=True)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_another_base_is_refused_also_when_its_hash_comes_with_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (write(tmp_path / n, {"w": randn(20, 20, seed=i)}) for i, n in enumerate("abc"))
    diff(str(a), str(b), str(tmp_path / "d"), quiet=True)
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(EspalierError, match="made for the base"):
        apply(str(c), [str(tmp_path / "d")], str(tmp_path / "out"), quiet=True)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    with pytest.raises(EspalierError, match="made for the base"):  # now from the cache
        apply(str(c), [str(tmp_path / "d")], str(tmp_path / "out"), quiet=True)


def test_reverting_one_of_two_deltas_leaves_the_other(tmp_path: Path) -> None:
    base = {"w": randn(8, 8), "v": randn(8, 8)}
    a = write(tmp_path / "a", base)
    for name in base:
        diff(str(a), str(write(tmp_path / f"t{name}", {**base, name: base[name] + 1})), str(tmp_path / f"d{name}"), quiet=True)
    apply(str(a), [str(tmp_path / "dw"), str(tmp_path / "dv")], str(tmp_path / "both"), quiet=True)
    result = revert(str(tmp_path / "both"), str(tmp_path / "one"), delta=[str(tmp_path / "dw")], quiet=True)
    assert result["kept"] == [str(tmp_path / "dv")]
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "tv")


def test_revert_finds_base_and_deltas_from_anywhere_however_they_are_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"w": randn(64, 64), "v": randn(64, 64)}
    a = write(tmp_path / "models" / "a", base)
    for name in base:
        diff(str(a), str(write(tmp_path / f"t{name}", {**base, name: base[name] + 1})), str(tmp_path / f"d{name}"), quiet=True)
    monkeypatch.chdir(tmp_path)
    apply("models/a", ["dw", "dv/"], "both", shard_size="10KB", quiet=True)
    record = json.loads((tmp_path / "both" / "espalier.json").read_text())
    assert record["base"] == str(a) and record["deltas"] == [str(tmp_path / "dw"), str(tmp_path / "dv")] and record["shard_bytes"] == 10_000
    assert "base_model: models/a" in (tmp_path / "both" / "README.md").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    revert("../both", "one", delta=["../dw/"], quiet=True)
    assert all_bytes(Path("one")) == all_bytes(tmp_path / "tv") and ModelDirectory(Path("one")).files() == ModelDirectory(tmp_path / "both").files()
    assert len(ModelDirectory(Path("one")).files()) == 2
    revert("../both", "back", quiet=True)
    assert_same(Path("back"), a)
    assert (Path("back") / "model.safetensors").is_file()
    with pytest.raises(EspalierError, match=r"does not carry '.*/elsewhere/dw'; it carries: .*/dw, .*/dv"):
        revert("../both", "none", delta=["dw"], quiet=True)


@pytest.mark.parametrize("harm", ["no record", "another base", "another delta"])
def test_revert_refuses(harm: str, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(8, 8)}), write(tmp_path / "b", {"w": randn(8, 8) + 1})
    diff(str(a), str(b), str(tmp_path / "d"), quiet=True)
    diff(str(a), str(write(tmp_path / "c", {"w": randn(8, 8) + 2})), str(tmp_path / "e"), quiet=True)
    apply(str(a), [str(tmp_path / "d"), str(tmp_path / "e")], str(tmp_path / "m"), quiet=True)
    if harm == "no record":
        (tmp_path / "m" / "espalier.json").unlink()
    elif harm == "another base":
        write_safetensors(a / "model.safetensors", {"w": randn(8, 8, seed=9)})
    else:
        shutil.rmtree(tmp_path / "e")
        shutil.copytree(tmp_path / "d", tmp_path / "e")
    complaint = {"no record": "was not written by espalier apply", "another base": "records the base", "another delta": "is not the delta that was applied"}
    with pytest.raises(EspalierError, match=complaint[harm]):
        revert(str(tmp_path / "m"), str(tmp_path / "back"), delta=[str(tmp_path / "d")], quiet=True)
    assert not (tmp_path / "back").exists()


def test_apply_diff_and_compress_import_neither_transformers_nor_peft(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": randn(8, 8)}), write(tmp_path / "b", {"w": randn(8, 8) + 1})
    code = (
        "import sys, espalier\n"
        f"espalier.diff({str(a)!r}, {str(b)!r}, {str(tmp_path / 'd')!r}, quiet=True)\n"
        f"espalier.apply({str(a)!r}, [{str(tmp_path / 'd')!r}], {str(tmp_path / 'out')!r}, quiet=True)\n"
        f"espalier.diff({str(a)!r}, {str(b)!r}, {str(tmp_path / 'dense')!r}, to='dense', quiet=True)\n"
        f"espalier.compress({str(tmp_path / 'dense')!r}, {str(tmp_path / 'small')!r}, method='compeft', quiet=True)\n"
        "assert not {'transformers', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


KILLED = """
import os, signal, sys
from espalier.checkpoint.safetensors_file import SafetensorsWriter
import espalier

left = int(sys.argv[4])
plain = SafetensorsWriter._pwrite

def write(self, view, position):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, view, position)

SafetensorsWriter._pwrite = write
base, delta, out = sys.argv[1:4]
espalier.apply(base, [delta], out, quiet=True) if out.endswith("out") else espalier.diff(base, delta, out, quiet=True)
"""


@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_a_killed_run_leaves_the_target_untouched_and_the_next_one_sweeps_up(verb: str, tmp_path: Path) -> None:
    tensors = {f"{n}.w": randn(8, 8, seed=n) for n in range(6)}
    a, b = write(tmp_path / "a", tensors), write(tmp_path / "b", {n: t + 1 for n, t in tensors.items()})
    diff(str(a), str(b), str(tmp_path / "d"), quiet=True)
    given_second, out = (tmp_path / "d", tmp_path / "out") if verb == "apply" else (b, tmp_path / "again")
    for count in (0, 3):
        done = subprocess.run([sys.executable, "-c", KILLED, str(a), str(given_second), str(out), str(count)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not out.exists()
    (apply(str(a), [str(tmp_path / "d")], str(out), quiet=True) if verb == "apply" else diff(str(a), str(b), str(out), quiet=True))
    assert out.is_dir() and not list(tmp_path.glob(".*tmp*"))
