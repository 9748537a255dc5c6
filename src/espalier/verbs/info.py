"""Info: what is in a model, a delta, an adapter, a calibration, a run or a data set."""

from __future__ import annotations

from typing import Any


def info(path: str) -> dict[str, Any]:
    """What is in a model, a delta, a PEFT adapter, a calibration, a run or a data set.

    Args:
        path: a directory or file, `seedling`, a hub id, or stdlib:NAME

    Returns:
        `kind` (model, delta, adapter, calibration, run or data) and what belongs to it.

    Raises:
        EspalierError: when there is nothing at the path that Espalier knows.
    """
    from pathlib import Path

    from espalier.delta import store

    folder = Path(path)
    if folder.is_file() and _is_safetensors(folder):
        return _calibration(folder)
    if path.startswith("stdlib:") or folder.is_file():
        return _data(path)
    if folder.is_dir() and store.is_delta(folder):
        return _delta(folder)
    if folder.is_dir() and (folder / "adapter_config.json").is_file():
        return _adapter(folder)
    if folder.is_dir() and (folder / "run.json").is_file():
        return _run(folder.parent)
    if folder.is_dir() and (folder / "run" / "run.json").is_file() and not (folder / "config.json").is_file():
        return _run(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return _data(path)
    return _model(path)


def _model(path: str) -> dict[str, Any]:
    import math

    from espalier.checkpoint.directory import ModelDirectory, resolve_model

    directory = ModelDirectory(resolve_model(path))
    dtypes: dict[str, int] = {}
    for name in directory:
        entry = directory.info(name)
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + math.prod(entry.shape)
    config = directory.config
    keys = (
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    return {
        "kind": "model",
        "path": str(directory.path),
        "parameters": sum(dtypes.values()),
        "tensors": len(list(directory)),
        "files": len(directory.files()),
        "bytes": directory.nbytes(),
        "dtypes": dtypes,
        "fingerprint": directory.fingerprint(),
        "config": {key: config[key] for key in keys if key in config},
    }


def _delta(folder: Any) -> dict[str, Any]:
    from espalier.delta import store

    delta = store.load(folder, mapped=True, branches=True, bank=True)
    forms: dict[str, int] = {}
    numbers = 0
    for update in delta.updates.values():
        forms[update.form] = forms.get(update.form, 0) + 1
        numbers += _numbers(update)
    numbers += sum(tensor.numel() for tensors in delta.branches.values() for tensor in tensors.values())
    return {
        "kind": "delta",
        "path": str(folder),
        "forms": forms,
        "parameters": len(delta.updates),
        **({"branches": [site for site in delta.branches if site != "shared"]} if delta.branches else {}),
        "numbers": numbers,
        "bytes": delta.nbytes,
        "peft": (folder / "adapter_config.json").is_file(),
        **delta.manifest,
    }


def _numbers(update: Any) -> int:
    """Numbers that an update holds, those that codes stand for too; not indices, and not signs or bitmaps."""
    own = [getattr(update, name) for name in update.fields if name not in update.shared]
    parts = getattr(update, "parts", {}).values()
    return sum(t.numel() for t in own if t is not None and t.is_floating_point()) + sum(map(_numbers, parts))


def _is_safetensors(path: Any) -> bool:
    """Whether a file begins as safetensors do: with the length of a header, and the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _calibration(path: Any) -> dict[str, Any]:
    from espalier.calibrate.store import Calibration

    made = Calibration(path)
    facts = made.facts
    return {
        "kind": "calibration",
        "path": str(path),
        "statistics": made.statistics,
        "places": {statistic: len(made.names(statistic)) for statistic in made.statistics},
        "bytes": path.stat().st_size,
        "sequences": facts["sequences"],
        "tokens": facts["tokens"],
        "loss": facts["loss"],
        "model": facts["request"]["model"],
        "targets": facts["request"]["targets"],
    }


def _adapter(folder: Any) -> dict[str, Any]:
    from espalier.checkpoint import peft_adapter

    adapter = peft_adapter.read(folder)
    numbers = sum(tensor.numel() for tensors in adapter.modules.values() for tensor in tensors.values())
    return {
        "kind": "adapter",
        "path": str(folder),
        "peft_type": adapter.kind,
        "base": adapter.config.get("base_model_name_or_path"),
        "rank": adapter.config.get("r"),
        "modules": len(adapter.modules),
        "numbers": numbers + sum(tensor.numel() for tensor in (*adapter.shared.values(), *adapter.copies.values())),
    }


def _run(folder: Any) -> dict[str, Any]:
    from espalier.checkpoint.directory import read_json

    record = read_json(folder / "run" / "run.json")
    found = sorted(p.name for p in (folder / "run" / "checkpoints").glob("step-*"))
    return {"kind": "run", "path": str(folder), "verb": record["verb"], "arguments": record["resolved"], "checkpoints": found}


def _data(path: str) -> dict[str, Any]:
    from espalier.data.sources import examples, open_source

    source = open_source(path)
    count = sum(1 for _ in examples(source))
    return {
        "kind": "data",
        "path": path,
        "examples_of": source.kind,
        "files": len(source.files),
        "bytes": sum(file.stat().st_size for file in source.files),
        "examples": count,
    }
