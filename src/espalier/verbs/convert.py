"""Convert: a delta into other forms or into a PEFT adapter, a PEFT adapter into a delta, a bank into the delta of a task."""

from __future__ import annotations

from typing import Any, Literal


def convert(
    source: str,
    out: str,
    *,
    to: Literal["lora", "peft", "dense", "lowrank", "sparse", "rows", "columns", "ternary", "quantized"] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    bits: int | None = None,
    group: int | None = None,
    task: str | None = None,
    model: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Turn a delta into one of another form, exactly where the form allows; or import a PEFT adapter as a delta.

    Args:
        source: directory of a delta, or of a PEFT adapter (adapter_config.json and adapter_model.safetensors)
        out: directory of the new delta
        to: form of every update; `lora`: two factors for every matrix; `peft`: these, and the files that PEFT loads
        rank: of lora, peft and lowrank: the rank; exact for updates of that rank or less
        energy: of lora, peft and lowrank, instead of a rank: share of the squared norm to keep, in (0, 1]
        density: of sparse, rows, columns and ternary: share to keep; default: whatever is not zero (ternary: of least error)
        bits: of quantized: bits of a number, 1 to 8; default: 4
        group: of quantized: numbers that share a scale; 0: all of a tensor; default: 64
        task: of a bank of tasks (see `espalier methods mhr`): the one whose update is taken; the form is lora where --to gives no other
        model: the base model; default: the one that the delta (where it is on this machine) or the adapter names
        seed: of randomised decompositions
        quiet: print nothing but the result

    Returns:
        `out`, `method`, `parameters` (how many are updated), `bytes`, and, for another form, `to`, `worst` (the largest
        relative error) and `tensors`: for each its forms, bytes and the relative error (Frobenius norms).

    Raises:
        EspalierError: when an update cannot have that form, or an adapter cannot be imported.
    """
    from pathlib import Path

    from espalier.checkpoint.atomic import atomic_directory, refuse_existing
    from espalier.delta import store
    from espalier.display import Display
    from espalier.errors import EspalierError
    from espalier.exchange import conversion
    from espalier.memory.meter import format_bytes
    from espalier.verbs._outcomes import show_worst

    display = Display(quiet)
    folder, target = Path(source), Path(out)
    refuse_existing(target)
    options = {"rank": rank, "energy": energy, "density": density, "bits": bits, "group": group}
    given = {option: value for option, value in options.items() if value is not None}
    if not store.is_delta(folder) and (folder / "adapter_config.json").is_file():
        if to is not None:
            raise EspalierError(f"{folder} is a PEFT adapter; import it first, without --to, and convert what comes of it")
        if task is not None:
            raise EspalierError(f"{folder} is a PEFT adapter, which is imported as it is; take --task {task} from the delta that comes of it")
        for option in given:
            raise EspalierError(f"{folder} is a PEFT adapter, which is imported as it is; --{option} is of converting a delta to another form")
        return _import(folder, target, model, display)
    if not store.is_delta(folder):
        raise EspalierError(f"{folder} is neither a delta (no delta.json) nor a PEFT adapter (no adapter_config.json)")
    to = to or ("lora" if task is not None else None)
    if to is None:
        raise EspalierError(f"{folder} is already a delta; say which form it shall have: --to lora, peft, dense, ...")
    allowed = _OPTIONS.get(to, {})
    for option in given.keys() - allowed.keys():
        owners = ", ".join(form for form, names in _OPTIONS.items() if option in names)
        raise EspalierError(f"--{option} is no option of --to {to} (it belongs to {owners})")
    used = {option: given.get(option, default) for option, default in allowed.items() if given.get(option, default) is not None}
    delta = store.load(folder, mapped=True, bank=task is not None)
    if task is not None:
        delta = conversion.of_task(delta, task)
    weights = conversion.base_of(delta, folder, model)
    with atomic_directory(target) as temporary:
        spool = conversion.Spool(temporary / "spool")
        with display.bar("converting", len(delta.updates), "parameters") as update:
            updates, outcomes = conversion.converted(delta, to, {**used, "seed": seed}, weights, spool, update)
        manifest = conversion.manifest_after(delta, "convert", {"to": to, **({"task": task} if task is not None else {}), **used, "seed": seed}, outcomes)
        made = store.Delta(updates, delta.layouts, manifest)
        size = conversion.write(folder, temporary, made, f"Converted to `{to}`.")
        if to == "peft":
            _export(temporary, made, model)
        spool.remove()
    show_worst(outcomes, display)
    display.note(f"{len(updates)} updates converted; the delta is in {target} ({format_bytes(size)})")
    return {
        "out": str(target),
        "method": "convert",
        "parameters": len(updates),
        "bytes": size,
        "to": to,
        "worst": max((o.error for o in outcomes if o.error is not None), default=0.0),
        "tensors": [outcome.as_json() for outcome in outcomes],
    }


_FACTORS: dict[str, int | None] = {"rank": None, "energy": None}
_SHARE: dict[str, int | None] = {"density": None}
_OPTIONS: dict[str, dict[str, int | None]] = {
    "lora": _FACTORS, "peft": _FACTORS, "lowrank": _FACTORS, "sparse": _SHARE, "rows": _SHARE, "columns": _SHARE, "ternary": _SHARE,
    "quantized": {"bits": 4, "group": 64},
}  # fmt: skip
"""The options of each form, and their defaults."""


def _export(folder: Any, delta: Any, model: str | None) -> None:
    """PEFT's files beside the delta's.

    Raises:
        EspalierError: saying why PEFT cannot hold it.
    """
    from espalier.anatomy.parameters import parameters
    from espalier.attach.load import empty_model
    from espalier.checkpoint.directory import resolve_model
    from espalier.errors import EspalierError
    from espalier.exchange.peft_lora import export

    name = model or str(delta.manifest.get("base", {}).get("name", ""))
    if not name:
        raise EspalierError("the delta does not name its base; pass --model DIR")
    live = empty_model(resolve_model(name), [folder])
    if reason := export(folder, delta, {t.name: t for t in parameters(live)}, name, live):
        raise EspalierError(f"PEFT cannot hold this delta: {reason}")


def _import(folder: Any, target: Any, model: str | None, display: Any) -> dict[str, Any]:
    """A PEFT adapter as a delta."""
    from espalier.anatomy.parameters import parameters
    from espalier.anatomy.site import sites
    from espalier.checkpoint.atomic import atomic_directory
    from espalier.checkpoint.directory import ModelDirectory, resolve_model
    from espalier.checkpoint.peft_adapter import read_config
    from espalier.delta import store
    from espalier.errors import EspalierError
    from espalier.exchange import new_head, peft_prompt
    from espalier.exchange.peft_import import import_adapter
    from espalier.exchange.peft_kinds import export
    from espalier.memory.meter import format_bytes

    config = read_config(folder)
    named = model or config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise EspalierError(f"{folder} does not name its base model; pass --model DIR")
    directory = ModelDirectory(resolve_model(named))
    live = new_head.model_of_adapter(folder, read_config(folder), directory)
    targets = {t.name: t for t in parameters(live)}
    branched = config.get("peft_type") in peft_prompt.KINDS
    delta = peft_prompt.import_prompt(folder, sites(live)) if branched else import_adapter(folder, targets, directory)
    delta.manifest["base"] = {"name": str(named), "fingerprint": directory.fingerprint(), "model_type": live.config.model_type}
    delta.manifest["training"] = {"imported_from": str(folder)}
    card = f"---\nlibrary_name: espalier\nbase_model: {named}\n---\n\n# A delta of {named}\n\nImported from the PEFT adapter `{folder}`.\n"
    head = new_head.beyond(live, directory)
    with atomic_directory(target) as temporary:
        if head is not None:
            new_head.as_whole(head, delta.updates, delta.layouts)
            delta.manifest |= new_head.bring(head, live, directory, temporary)
        size = store.save(temporary, delta, card)
        if branched:
            peft_prompt.export(temporary, delta, sites(live), str(named))
        else:
            export(temporary, delta, targets, str(named), live)
    count, what = (len(delta.branches), "branches") if branched else (len(delta.updates), "updates")
    display.note(f"{count} {what} imported; the delta is in {target} ({format_bytes(size)})")
    return {"out": str(target), "method": delta.manifest["method"], "parameters": count, "bytes": size}
