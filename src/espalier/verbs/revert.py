"""Revert: take deltas off a model that ``apply`` wrote, which means making it again from its base."""

from __future__ import annotations

from typing import Any


def revert(model: str, out: str, *, base: str | None = None, delta: list[str] | None = None, quiet: bool = False) -> dict[str, Any]:
    """Write the model that there was before a delta was applied.

    Subtracting is not undoing: rounding to bf16 has lost what was there, so nothing is subtracted. The model is made
    again from its base, with those deltas that stay; with none, it is the base, bit for bit.

    Args:
        model: directory that `espalier apply` wrote
        out: directory of the new model
        base: the base; default: the one that the model names
        delta: a delta to take off; may be given several times; default: all
        quiet: print nothing but the result

    Returns:
        `out`, `base`, and `kept`: the deltas that are still on it.

    Raises:
        EspalierError: when the model was not written by `apply`, its base or a delta that stays is gone or another.
    """
    from pathlib import Path

    from espalier.checkpoint.atomic import atomic_directory, refuse_existing
    from espalier.checkpoint.directory import LINEAGE, ModelDirectory, resolve_model
    from espalier.delta import store
    from espalier.display import Display
    from espalier.errors import EspalierError
    from espalier.exchange import recipe as recipes

    display, target = Display(quiet), Path(out)
    refuse_existing(target)
    record = Path(model) / LINEAGE
    if not record.is_file():
        raise EspalierError(f"{model} was not written by espalier apply: it has no {LINEAGE}")
    lineage = recipes.Lineage.read(record)
    named = base or lineage.base
    directory = ModelDirectory(resolve_model(named))
    if (found := directory.fingerprint()) != lineage.fingerprint:
        raise EspalierError(f"{record} records the base {lineage.base!r} with fingerprint {lineage.fingerprint}; {directory.path} has {found}")
    there = {d: Path(d).resolve() for d in lineage.deltas}
    off = list(there.values()) if delta is None else [Path(d).resolve() for d in delta]
    if unknown := [d for d in off if d not in there.values()]:
        raise EspalierError(f"{model} does not carry {str(unknown[0])!r}; it carries: {', '.join(lineage.deltas)}")
    names = [d for d in lineage.deltas if there[d] not in off]
    kept = [Path(name) for name in names]
    for name, folder in zip(names, kept, strict=True):
        if store.manifest_of(folder)["sha256"] != lineage.digests[name]:
            raise EspalierError(f"{folder} is not the delta that was applied: {record} records another SHA-256 for it")
    recipe = recipes.Recipe(directory, str(named), kept, [store.load(folder, mapped=True) for folder in kept], lineage.scale, any_base=True)
    if kept:
        recipe.dtype, recipe.shard_bytes = lineage.dtype, lineage.shard_bytes
    with atomic_directory(target) as temporary:
        recipes.write(recipe, temporary, target, display)
    display.note(f"made again from {directory.path}{' with ' + ', '.join(map(str, kept)) if kept else ', whose copy it is'}; nothing was subtracted")
    return {"out": str(target), "base": str(named), "kept": [str(k) for k in kept]}
