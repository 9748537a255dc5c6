"""Apply: write the model that a base becomes under deltas, in slices, at the speed of the disk."""

from __future__ import annotations

from typing import Any, Literal


def apply(
    model: str,
    delta: list[str],
    out: str,
    *,
    scale: float = 1.0,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    shard_size: str | None = None,
    any_base: bool = False,
    verify: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the model that a base becomes under a delta, without having either in memory.

    Args:
        model: a directory, `seedling`, or a hub id
        delta: directory of a delta; may be given several times, innermost first
        out: directory of the new model
        scale: multiplies every delta
        dtype: stores every floating point tensor so; default: as the base, or as the delta says
        shard_size: cut the weights into files of at most this size, such as 5GB; default: as the base
        any_base: accept deltas that were made for another base
        verify: a text file on which the logits of the new model and of base and delta are compared
        quiet: print nothing but the result

    Returns:
        `out`, `changed` tensors, `bytes`, and per tensor the rounding that its dtype forces: `rounding`, the largest
        relative error of the stored weight, and `lost`, the share of the update that rounding takes away (norms).

    Raises:
        EspalierError: for a damaged delta, another base, too little disk, or a failed verification.
    """
    from pathlib import Path

    from espalier.checkpoint.atomic import atomic_directory, refuse_existing
    from espalier.checkpoint.directory import ModelDirectory, resolve_model
    from espalier.delta import store
    from espalier.display import Display
    from espalier.errors import EspalierError
    from espalier.exchange import recipe as recipes
    from espalier.memory.meter import format_bytes, parse_bytes

    display = Display(quiet)
    folders = [Path(delta)] if isinstance(delta, str) else [Path(d) for d in delta]
    if not folders:
        raise EspalierError("apply needs a delta: --delta DIR")
    target = Path(out)
    refuse_existing(target)
    if verify is not None and not Path(verify).is_file():
        raise EspalierError(f"--verify {verify} is no file; give a text file")
    directory = ModelDirectory(resolve_model(model))
    deltas = [store.load(folder, mapped=True) for folder in folders]
    recipe = recipes.Recipe(
        directory, str(model), folders, deltas, scale, dtype, parse_bytes(shard_size) if shard_size else None, any_base
    )
    verified = None
    if verify is not None:
        from espalier.verbs._verify import compare, require_attachable

        require_attachable(model, folders, deltas)
    with atomic_directory(target) as temporary:
        report = recipes.write(recipe, temporary, target, display)
        nbytes = ModelDirectory(temporary).nbytes()
        if verify is not None:
            verified = compare(model, [str(f) for f in folders], scale, any_base, temporary, Path(verify), target, display)
    worst = max(report.values(), key=lambda r: r["lost"], default=None)
    result: dict[str, Any] = {"out": str(target), "changed": len(report), "bytes": nbytes, "tensors": report}
    display.note(f"{len(report)} tensors changed; the model is in {target} ({format_bytes(nbytes)})")
    if worst and worst["lost"]:
        display.note(f"storing as {worst['dtype']} loses at most {worst['lost']:.2%} of an update ({worst['name']})")
    if verified is not None:
        result["verified"] = verified
    return result
