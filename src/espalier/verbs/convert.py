"""Convert: a PEFT LoRA adapter into a delta."""

from __future__ import annotations

from typing import Any


def convert(adapter: str, out: str, *, model: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Import a PEFT LoRA (or DoRA) adapter as a delta.

    Args:
        adapter: directory with adapter_config.json and adapter_model.safetensors
        out: directory of the delta
        model: the base model; default: the one that the adapter names
        quiet: print nothing but the result

    Returns:
        `out`, `method`, `parameters` (how many are updated), `bytes`.

    Raises:
        EspalierError: when the adapter is of another kind, or does not fit the model.
    """
    from pathlib import Path

    from espalier.anatomy.parameters import parameters
    from espalier.attach.load import empty_model
    from espalier.checkpoint.atomic import refuse_existing
    from espalier.checkpoint.directory import ModelDirectory, read_json, resolve_model
    from espalier.delta import store
    from espalier.display import Display
    from espalier.errors import EspalierError
    from espalier.exchange.peft_import import import_adapter
    from espalier.exchange.peft_lora import export
    from espalier.memory.meter import format_bytes

    display = Display(quiet)
    folder, target = Path(adapter), Path(out)
    refuse_existing(target)
    if not (folder / "adapter_config.json").is_file():
        what = "is already a delta" if store.is_delta(folder) else "has no adapter_config.json"
        raise EspalierError(f"{folder} {what}; convert imports PEFT adapters")
    named = model or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise EspalierError(f"{folder} does not name its base model; pass --model DIR")
    directory = ModelDirectory(resolve_model(named))
    live = empty_model(directory.path)
    targets = {t.name: t for t in parameters(live)}
    delta = import_adapter(folder, targets, directory)
    delta.manifest["base"] = {"name": str(named), "fingerprint": directory.fingerprint(), "model_type": live.config.model_type}
    delta.manifest["training"] = {"imported_from": str(folder)}
    card = f"---\nlibrary_name: espalier\nbase_model: {named}\n---\n\n# A delta of {named}\n\nImported from the PEFT adapter `{folder}`.\n"
    size = store.save(target, delta, card)
    export(target, delta, targets, str(named), live)
    display.note(f"{len(delta.updates)} updates imported; the delta is in {target} ({format_bytes(size)})")
    return {"out": str(target), "method": delta.manifest["method"], "parameters": len(delta.updates), "bytes": size}
