"""Apply: write the model that a base becomes under a delta, tensor by tensor."""

from __future__ import annotations

from typing import Any


def apply(
    model: str,
    delta: list[str],
    out: str,
    *,
    scale: float = 1.0,
    any_base: bool = False,
    verify: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the model that a base becomes under a delta, one tensor in memory at a time.

    Args:
        model: a directory, `seedling`, or a hub id
        delta: directory of a delta; may be given several times, innermost first
        out: directory of the new model
        scale: multiplies every delta
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

    from espalier.checkpoint.atomic import atomic_directory, refuse_existing, require_free_space
    from espalier.checkpoint.directory import ModelDirectory, resolve_model
    from espalier.delta import store
    from espalier.display import Display
    from espalier.errors import EspalierError
    from espalier.exchange import materialize
    from espalier.memory.meter import format_bytes

    display = Display(quiet)
    deltas = [delta] if isinstance(delta, str) else list(delta)
    if not deltas:
        raise EspalierError("apply needs a delta: --delta DIR")
    target = Path(out)
    refuse_existing(target)
    if verify is not None and not Path(verify).is_file():
        raise EspalierError(f"--verify {verify} is no file; give a text file")
    directory = ModelDirectory(resolve_model(model))
    loaded = []
    for folder in deltas:
        loaded.append(store.load(Path(folder)))
        if not any_base:
            store.check_base(loaded[-1], Path(folder), directory.path, directory.fingerprint())
    require_free_space(target, directory.nbytes() + (8 << 20), f"the new model in {target}")
    with atomic_directory(target) as temporary:
        with display.bar("applying", len(list(directory)), "tensors") as update:
            report = materialize.write_model(directory, loaded, scale, temporary, update)
        materialize.write_card(temporary, directory, deltas, loaded, scale)
        verified = None
        if verify is not None:
            from espalier.verbs._verify import compare

            verified = compare(model, deltas, scale, any_base, temporary, Path(verify), target, display)
    worst = max(report.values(), key=lambda r: r["lost"], default=None)
    result: dict[str, Any] = {"out": str(target), "changed": len(report), "bytes": directory.nbytes(), "tensors": report}
    display.note(f"{len(report)} tensors changed; the model is in {target} ({format_bytes(directory.nbytes())})")
    if worst:
        display.note(f"storing as {worst['dtype']} loses at most {worst['lost']:.2%} of an update ({worst['name']})")
    if verified is not None:
        result["verified"] = verified
    return result
