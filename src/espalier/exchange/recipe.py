"""A base and deltas into a new model directory: weights, files beside them, card, and a record that makes it again."""

from __future__ import annotations

import json
import math
import reprlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from espalier.checkpoint.atomic import require_free_space
from espalier.checkpoint.directory import LINEAGE, ModelDirectory, read_json
from espalier.checkpoint.safetensors_file import torch_dtype
from espalier.checkpoint.stream import Hashes, known_fingerprint
from espalier.delta.store import ANY_BASE, FIRST, Delta, brought_files, check_base, check_chain
from espalier.display import Display
from espalier.errors import EspalierError
from espalier.exchange.composition import outputs, seen_by
from espalier.exchange.materialize import write_model

_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


def write_side_files(out: Path, directory: ModelDirectory, folders: Sequence[Path], deltas: Sequence[Delta], dtype: str | None) -> None:
    """Write what stands beside the weights: the base's files, but for those that a delta brings or drops.

    Raises:
        EspalierError: when a delta's copy of a file is missing, lies elsewhere or is not the one that it recorded, or the
            new config is no JSON object.
    """
    files = directory.side_files()
    for folder, delta in zip(folders, deltas, strict=True):
        for name, content in brought_files(delta, folder).items():
            files.pop(name, None)
            if content is not None:
                files[name] = content
    for name, content in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(content, out / name)
    config = read_json(out / "config.json")
    if not isinstance(config, dict):
        raise EspalierError(f"the deltas make {reprlib.repr(config)} of config.json; it must be a JSON object")
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(torch_dtype(dtype)).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Lineage:
    """What a model was made of, as ``espalier.json`` says it: enough to make it again.

    Directories are absolute paths; the base may also be ``seedling`` or a hub id.
    """

    base: str
    fingerprint: str | None
    deltas: list[str]
    digests: dict[str, str]
    scale: float
    dtype: Literal["bf16", "fp16", "fp32"] | None
    shard_bytes: int | None = None

    @classmethod
    def read(cls, path: Path) -> Lineage:
        """Read it.

        Raises:
            EspalierError: when it is malformed.
        """
        content = read_json(path)
        kinds = {
            "base": str, "fingerprint": str | None, "deltas": list, "digests": dict, "scale": float, "dtype": str | None, "shard_bytes": int | None,
        }  # fmt: skip
        if not isinstance(content, dict) or any(not isinstance(content.get(key), kind) for key, kind in kinds.items()):
            raise EspalierError(f"{path} does not say what the model was made of ({', '.join(kinds)})")
        if not all(isinstance(d, str) and d in content["digests"] for d in content["deltas"]) or content["dtype"] not in (None, *_DTYPES):
            raise EspalierError(f"{path} is malformed: deltas {content['deltas']!r}, dtype {content['dtype']!r}")
        if not math.isfinite(content["scale"]):
            raise EspalierError(f"{path}: the scale is {content['scale']}; it must be a finite number")
        facts: dict[str, Any] = {key: content.get(key) for key in kinds}
        return cls(**facts)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def recorded(model: str | Path) -> str:
    """How a base or a delta is recorded: a directory by its absolute path; ``seedling`` and hub ids as they are."""
    return str(Path(model).resolve()) if str(model) != "seedling" and Path(model).is_dir() else str(model)


def _write_card(path: Path, recipe: Recipe, fingerprint: str | None) -> None:
    """A model card that says where the model comes from."""
    lines = [
        f"- `{folder}`: {delta.manifest.get('method')} {json.dumps(delta.manifest.get('hyperparameters', {}))}, "
        f"data `{delta.manifest.get('training', {}).get('data')}`"
        for folder, delta in zip(recipe.folders, recipe.deltas, strict=True)
    ]
    made = f"from `{recipe.name}`, fingerprint `{fingerprint}`, scale {recipe.scale}, and:\n\n" + "\n".join(lines)
    text = (
        f"---\nlibrary_name: transformers\nbase_model: {recipe.name}\ntags: [espalier]\n---\n\n# {recipe.name} with deltas\n\n"
        f"Written by `espalier apply` {made}\n\n`espalier revert` makes the model again without them.\n"
    )
    path.write_text(text, encoding="utf-8")


@dataclass
class Recipe:
    """What a new model is made of, and how it is stored."""

    directory: ModelDirectory
    name: str
    folders: Sequence[Path]
    deltas: Sequence[Delta]
    scale: float = 1.0
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    shard_bytes: int | None = None
    any_base: bool = False


def write(recipe: Recipe, folder: Path, out: Path, display: Display) -> dict[str, dict[str, Any]]:
    """Write a whole model directory (weights, side files, card) into ``folder``, which is to become ``out``.

    The base is checked against the deltas before anything is written where its fingerprint is known, else on the bytes
    that are read anyway, before the new model gets its name.

    Raises:
        EspalierError: when a delta is for another base or does not fit, the disk is too small, or a new value is not finite.
    """
    if not math.isfinite(recipe.scale):
        raise EspalierError(f"the scale is {recipe.scale}; it must be a finite number")
    directory = recipe.directory
    dtype = _DTYPES[recipe.dtype] if recipe.dtype else None
    fingerprint = known_fingerprint(directory)
    hashes = Hashes(directory) if fingerprint is None else None

    def check(found: str) -> None:
        for number, (path, delta) in enumerate(zip(recipe.folders, recipe.deltas, strict=True)):
            if not recipe.any_base:
                check_base(delta, path, directory.path, found, ANY_BASE)
                check_chain(delta, path, [below.manifest["sha256"] for below in recipe.deltas[:number]], FIRST)

    if fingerprint is not None:
        check(fingerprint)
    seen, deltas = seen_by(directory, recipe.deltas)
    made = outputs(seen, deltas, dtype)
    total = sum(output.nbytes for output in made.values())
    require_free_space(folder, total + (8 << 20), f"the new model in {out}")
    with display.bar("applying", max(total >> 20, 1), "MiB") as update:
        report = write_model(
            seen, made, deltas, recipe.scale, folder, lambda done: update(done >> 20), shard_bytes=recipe.shard_bytes, hashes=hashes
        )
    if hashes is not None:
        fingerprint = hashes.fingerprint()
        check(fingerprint)
    write_side_files(folder, directory, recipe.folders, recipe.deltas, dtype)
    if recipe.deltas:
        names = [recorded(folder) for folder in recipe.folders]
        digests = {name: delta.manifest["sha256"] for name, delta in zip(names, recipe.deltas, strict=True)}
        Lineage(
            recorded(recipe.name), fingerprint, names, digests, float(recipe.scale), recipe.dtype, recipe.shard_bytes
        ).write(folder / LINEAGE)
        _write_card(folder / "README.md", recipe, fingerprint)
    return report
