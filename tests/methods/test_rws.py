"""Robust weight signatures (ICML 2023): what is orthogonal to clean training, in the first blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, tiny, tokens

from espalier import registry
from espalier.anatomy.parameters import parameters, select
from espalier.attach.attachment import attach_updates, detach
from espalier.checkpoint.directory import ModelDirectory
from espalier.delta import store
from espalier.delta.compression import Whole, compress
from espalier.delta.forms import Dense, LowRank, Quantized, Update
from espalier.errors import EspalierError
from espalier.verbs.apply import apply
from espalier.verbs.compress import compress as compress_delta
from espalier.verbs.revert import revert

BASE = {"base": {"name": "x", "fingerprint": "sha256:0"}}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def saved(folder: Path, updates: dict[str, Update], manifest: dict[str, Any] = BASE) -> Path:
    store.save(folder, store.Delta(updates, {n: store.Layout() for n in updates}, manifest), "")
    return folder


def signature(updates: dict[str, Update], against: Path, **options: Any) -> dict[str, Update]:
    whole = Whole(store.Delta(updates, {n: store.Layout() for n in updates}, BASE))
    return compress(registry.make("rws", "compressor", against=str(against), **options), whole)[0]


def dense(update: Update) -> torch.Tensor:
    return update.materialize(torch.zeros(update.shape)).double()


UPDATES: dict[str, tuple[Update, Update]] = {
    "dense": (Dense(random(0, 30, 20), 0.5), Dense(random(1, 30, 20))),
    "low rank": (LowRank(random(0, 30, 3), random(1, 3, 20), 0.5), LowRank(random(2, 30, 2), random(3, 2, 20), 2.0)),
    "mixed": (LowRank(random(0, 30, 3), random(1, 3, 20), 0.5), Dense(random(2, 30, 20))),
    "experts": (LowRank(random(0, 2, 30, 3), random(1, 2, 3, 20)), LowRank(random(2, 2, 30, 2), random(3, 2, 2, 20))),
    "vector": (Dense(random(0, 20)), Dense(random(1, 20))),
}


@pytest.mark.parametrize("kind", UPDATES)
def test_the_signature_is_orthogonal_to_clean_training_in_every_tensor(kind: str, tmp_path: Path) -> None:
    """<rws, u> = 0, and what was taken away is a multiple of u."""
    robust, clean = UPDATES[kind]
    made = signature({"layers.0.w": robust}, saved(tmp_path / "c", {"layers.0.w": clean}))["layers.0.w"]
    v, u, found = dense(robust), dense(clean), dense(made)
    assert abs(float((found * u).sum())) <= 1e-6 * float(found.norm() * u.norm())
    torch.testing.assert_close(found, v - (v * u).sum() / (u * u).sum() * u, rtol=1e-4, atol=1e-6)
    if kind == "low rank":
        assert isinstance(made, LowRank) and made.rank == 5, "two low-rank updates give a low-rank signature"


def test_a_parameter_that_clean_training_left_alone_is_kept_whole(tmp_path: Path) -> None:
    robust = Dense(random(0, 6, 5))
    clean = saved(tmp_path / "c", {"layers.0.zero": Dense(torch.zeros(6, 5))})
    made = signature({"layers.0.w": robust, "layers.0.zero": robust}, clean)
    assert all(torch.equal(dense(update), dense(robust)) for update in made.values())


def test_only_the_first_blocks_are_kept_where_layers_says_so(tmp_path: Path) -> None:
    model = tiny("llama")
    updates: dict[str, Update] = {t.name: Dense(random(i, *t.shape)) for i, t in enumerate(select(parameters(model), ["all"]))}
    clean = saved(tmp_path / "c", {name: Dense(random(9, *u.shape)) for name, u in updates.items()})
    assert set(signature(updates, clean)) == set(updates)
    kept = signature(updates, clean, layers=LAYERS - 1)
    assert kept and set(kept) == {name for name in updates if name.startswith("model.layers.0.")}


@torch.no_grad()
def test_patching_and_unpatching_gives_the_bits_back_and_is_linear_in_the_strength(tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain = model(tokens()).logits
    chosen = select(parameters(model), ["linear"])
    updates: dict[str, Update] = {t.name: Dense(random(i, *t.shape)) for i, t in enumerate(chosen)}
    clean = saved(tmp_path / "c", {t.name: Dense(random(50 + i, *t.shape)) for i, t in enumerate(chosen)})
    made = signature(updates, clean)
    attach_updates(model, made, "patch")
    assert not torch.equal(model(tokens()).logits, plain)
    detach(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()) and torch.equal(model(tokens()).logits, plain)
    update = next(iter(made.values()))
    torch.testing.assert_close(dense(update.scaled(0.3)) + dense(update.scaled(0.7)), dense(update), rtol=1e-5, atol=1e-7)


def test_a_written_patch_is_linear_in_its_scale_and_reverting_it_gives_the_file_back(tmp_path: Path) -> None:
    """Quantized or not: what is taken off is not subtracted, so no rounding stays; in bf16 as in float32."""
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "clean")
    directory = ModelDirectory(tmp_path / "clean")
    manifest = {"base": {"name": str(tmp_path / "clean"), "fingerprint": directory.fingerprint()}}
    chosen = select(parameters(tiny("llama")), ["linear"])
    robust, clean = ({t.name: LowRank(random(s + i, t.shape[0], 2), random(s + i + 50, 2, t.shape[1])) for i, t in enumerate(chosen)} for s in (0, 500))
    saved(tmp_path / "r", robust, manifest), saved(tmp_path / "c", clean, manifest)
    compress_delta(str(tmp_path / "r"), str(tmp_path / "rws"), method="rws", against=str(tmp_path / "c"), layers=1, bits=8, quiet=True)
    patched = {}
    for scale in (0.5, 1.0):
        apply(str(tmp_path / "clean"), [str(tmp_path / "rws")], str(tmp_path / f"x{scale}"), scale=scale, dtype="fp32", quiet=True)
        patched[scale] = ModelDirectory(tmp_path / f"x{scale}")
    apply(str(tmp_path / "clean"), [str(tmp_path / "rws")], str(tmp_path / "bf16"), quiet=True)
    moved = 0
    for name in directory:
        base, half, whole = directory.read(name).float(), patched[0.5].read(name), patched[1.0].read(name)
        torch.testing.assert_close(2 * (half - base), whole - base, rtol=1e-5, atol=1e-6)
        moved += int(not torch.equal(whole, base))
        assert torch.equal(whole, base) == (".layers.0." not in name or "norm" in name), "the first block alone is patched"
    assert moved
    for path in ("x1.0", "bf16"):
        revert(str(tmp_path / path), str(tmp_path / f"{path}-back"), quiet=True)
        again = ModelDirectory(tmp_path / f"{path}-back")
        assert all(torch.equal(again.read(name).view(torch.int16), directory.read(name).view(torch.int16)) for name in directory)


def test_a_quantized_signature_is_near_and_small(tmp_path: Path) -> None:
    robust, clean = UPDATES["dense"]
    folder = saved(tmp_path / "c", {"layers.0.w": clean})
    exact = dense(signature({"layers.0.w": robust}, folder)["layers.0.w"])
    made = signature({"layers.0.w": robust}, folder, bits=8)["layers.0.w"]
    assert isinstance(made, Quantized) and made.nbytes < 30 * 20 + 20
    assert float((dense(made) - exact).abs().max()) <= float(exact.max() - exact.min()) / 255 * 0.51


def test_the_clean_delta_must_be_given_and_of_the_same_base(tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="rws needs the delta of clean training: --against DELTA"):
        compress(registry.make("rws", "compressor"), Whole(store.Delta({}, {}, BASE)))
    other = saved(tmp_path / "c", {"layers.0.w": Dense(random(0, 6, 5))}, {"base": {"fingerprint": "sha256:1"}})
    with pytest.raises(EspalierError, match="is of the base sha256:1, the delta of sha256:0"):
        signature({"layers.0.w": Dense(random(0, 6, 5))}, other)


def test_factors_of_16_bits_are_multiplied_in_full_precision(tmp_path: Path) -> None:
    """A gain that bf16 would round: B times it, rounded, is not orthogonal any more."""
    robust = LowRank(random(0, 30, 3).bfloat16(), random(1, 3, 20).bfloat16(), 1 / 3)
    clean = LowRank(random(2, 30, 2).bfloat16(), random(3, 2, 20).bfloat16(), 0.7)
    made = signature({"layers.0.w": robust}, saved(tmp_path / "c", {"layers.0.w": clean}))["layers.0.w"]
    v, u = dense(robust), dense(clean)
    torch.testing.assert_close(dense(made), v - (v * u).sum() / (u * u).sum() * u, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("other", [(6, 1), (6, 4), (1, 5)], ids=str)
def test_a_clean_update_of_another_shape_is_refused_by_name(other: tuple[int, ...], tmp_path: Path) -> None:
    clean = saved(tmp_path / "c", {"layers.0.w": Dense(random(1, *other))})
    with pytest.raises(EspalierError, match=rf"rws of layers\.0\.w: the update has shape \(6, 5\); that in \S+ has \({other[0]}, {other[1]}\)"):
        signature({"layers.0.w": Dense(random(0, 6, 5))}, clean)
