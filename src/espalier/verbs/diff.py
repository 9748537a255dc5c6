"""Diff: the delta that makes one checkpoint into another, bit for bit or approximately."""

from __future__ import annotations

from typing import Any, Literal


def diff(
    base: str,
    tuned: str,
    out: str,
    *,
    to: Literal["auto", "dense", "lowrank", "sparse", "rows", "columns", "ternary", "quantized"] = "auto",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    bits: int | None = None,
    group: int | None = None,
    seed: int | None = None,
    ranks: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the delta that makes one checkpoint into another, without having either in memory.

    With `auto` the delta is exact: applied to BASE it gives every tensor, config and tokenizer file of TUNED bit for bit,
    and it holds only what changed. The other forms approximate the matrices and say how well; everything else stays exact.

    Args:
        base: a directory, `seedling`, or a hub id: what the delta is to be applied to
        tuned: a directory, `seedling`, or a hub id: what it is to become
        out: directory of the delta
        to: form of the updates of matrices; `auto` is exact
        rank: of lowrank
        energy: of lowrank, instead of a rank: the share of the update's squared norm to keep, in (0, 1]
        density: of sparse, rows, columns and ternary: the share of entries, rows or columns to keep, in (0, 1]
        bits: of quantized, 1 to 8; default: 4
        group: of quantized: entries that share a scale; default: 64
        seed: of lowrank: of its random numbers; default: 0
        ranks: measure the rank of every matrix's update too, which takes its singular values: minutes for a large model
        quiet: print nothing but the result

    Returns:
        `out`, `bytes`, `unchanged` (share of all entries whose bits are equal), `unchanged_to_1e-5` (share of those of floating
        point that moved by at most that), `added`, `removed`, `relaid` (tensors that the
        base has in another layout), `files`, and `tensors`: for each that changed its `form`, `dtype`, how many `entries`
        `changed` and moved less than 1e-5, norms, effective rank, with `ranks` the stable rank and the share of the singular values above 0.1 % of the largest, and for approximating forms the relative `error` of the
        update (Frobenius norms).

    Raises:
        EspalierError: when one is no model, they have no tensor in common, an option is not one of the form, an update that
            is approximated is not finite, or the disk is too small.
    """
    from pathlib import Path

    from espalier.checkpoint.atomic import atomic_directory, refuse_existing
    from espalier.checkpoint.directory import ModelDirectory, resolve_model
    from espalier.display import Display
    from espalier.exchange import difference
    from espalier.memory.meter import format_bytes

    display = Display(quiet)
    target = Path(out)
    refuse_existing(target)
    options = {"rank": rank, "energy": energy, "density": density, "bits": bits, "group": group, "seed": seed}
    options = difference.checked(to, {key: value for key, value in options.items() if value is not None})
    pair = difference.Pair(ModelDirectory(resolve_model(base)), ModelDirectory(resolve_model(tuned)))
    size = pair.tuned.nbytes()
    with display.bar("comparing", max(size >> 20, 1), "MiB") as update:
        changes = difference.measure(pair, lambda done: update(done >> 20), ranks)
    errors: dict[str, float] = {}
    with atomic_directory(target) as temporary, display.bar("writing", max(size >> 20, 1), "MiB") as update:
        errors = difference.write(pair, changes, to, options, (base, tuned), temporary, target, lambda done: update(done >> 20))
        nbytes = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    entries = sum(c.entries for c in changes)
    unchanged = 1 - sum(c.changed for c in changes) / entries if entries else 1.0
    floating = [c for c in changes if c.small is not None]
    numbers = sum(c.entries for c in floating)
    still = sum(c.small or 0 for c in floating) / numbers if numbers else 1.0
    tensors = [{**c.as_json(), "error": errors.get(c.name)} for c in changes if c.changed]
    if not quiet:
        display.table(
            f"{len(tensors)} of {len(changes)} tensors changed; {unchanged:.2%} of their entries did not",
            ("tensors", "count", "dtype", "entries", "unchanged", "moved by", "largest", "effective rank"),
            difference.summary(changes),
        )
    if pair.relaid:
        display.note(f"{len(pair.relaid)} tensors are in another layout than the base's; of these too only changes are stored ({min(pair.relaid)}, ...)")
    if pair.whole:
        display.note(f"{len(pair.whole)} tensors are new or of another shape or dtype and are stored whole ({pair.whole[0]}, ...)")
    if errors:
        worst = max(errors, key=lambda n: errors[n])
        display.note(f"the {to} form misses at most {errors[worst]:.2%} of an update ({worst})")
    display.note(f"the delta is in {target} ({format_bytes(nbytes)}; {tuned} has {format_bytes(size)})")
    return {
        "out": str(target),
        "bytes": nbytes,
        "unchanged": unchanged,
        "unchanged_to_1e-5": still,
        "added": [n for n in pair.whole if n not in pair.base],
        "removed": pair.removed,
        "relaid": sorted(pair.relaid),
        "files": sorted(pair.files),
        "tensors": tensors,
    }
