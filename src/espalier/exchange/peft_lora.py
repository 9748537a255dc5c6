"""Deltas to PEFT's LoRA files, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.layout import locate
from espalier.anatomy.target import Target
from espalier.checkpoint import peft_adapter
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.peft_adapter import Factors
from espalier.delta.forms import LowRank, Magnitude, Update
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError


def _factors(update: Update, target: Target) -> Factors | str:
    """The factors of an update, or why PEFT cannot hold it as LoRA."""
    if len(target.names) > 1:
        return f"{target.name} is tied, and PEFT adapts only one side of a tie"
    if len(target.shape) != 2 or target.route not in ("linear", "lookup"):
        return f"{target.name} is no plain matrix of a Linear or Embedding"
    if isinstance(update, LowRank):
        return Factors(update.A, update.B, float(update.gain), is_embedding=target.route == "lookup")
    if isinstance(update, Magnitude) and isinstance(update.inner, LowRank) and target.route == "linear":
        return Factors(update.inner.A, update.inner.B, float(update.inner.gain), update.magnitude)
    return f"the form of {target.name} is {update.form}"


def export(folder: Path, delta: Delta, targets: Mapping[str, Target], base: str, model: Any) -> str | None:
    """Write PEFT's files beside a delta's where it is plain LoRA or DoRA; else say why not.

    Returns:
        ``None`` when written, or the reason why PEFT cannot hold this delta as it is.
    """
    factors: dict[str, Factors] = {}
    for name, update in delta.updates.items():
        made = _factors(update, targets[name])
        if isinstance(made, str):
            return made
        factors[name.removesuffix(".weight")] = made
    if len({f.magnitude is None for f in factors.values()}) > 1:
        return "only some of its parts have a magnitude"
    modules = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    peft_adapter.write(folder, factors, base, modules)
    return None


def import_lora(folder: Path, parameters: Mapping[str, Target], base: ModelDirectory) -> Delta:
    """A PEFT LoRA (or DoRA) adapter as a delta of a model with these parameters.

    PEFT stores a copy of an embedding or head that it adapts; it is left out, and must be that of ``base``.

    Raises:
        EspalierError: when it is no plain LoRA, or does not fit the model.
    """
    factors, config = peft_adapter.read(folder)
    aliases = {alias: target for target in parameters.values() for alias in target.names}
    updates: dict[str, Update] = {}
    layouts: dict[str, Layout] = {}
    for module, f in factors.items():
        target = aliases.get(f"{module}.weight")
        if target is None:
            raise EspalierError(f"{folder} adapts {module!r}, which the model does not have")
        update: Update = LowRank(f.B.contiguous(), f.A.contiguous(), f.gain)
        if f.magnitude is not None:
            update = Magnitude(f.magnitude.reshape(-1), update)
        if tuple(update.shape) != target.shape:
            raise EspalierError(f"{folder}: the update of {module} is for shape {update.shape}; the model's is {target.shape}")
        if len(target.names) > 1:
            raise EspalierError(
                f"{folder} adapts {module}, one side of the tie {' = '.join(target.names)}; PEFT leaves the other side alone, "
                "which a tied model cannot hold"
            )
        if f.base is not None and not _is_base(f.base, target, base):
            raise EspalierError(f"{folder} holds another {target.name} than the base; it was made for another model, or changed it")
        updates[target.name], layouts[target.name] = update, Layout.of(target)
    manifest = {"method": "dora" if config.get("use_dora") else "lora", "hyperparameters": {"rank": config.get("r")}}
    return Delta(updates, layouts, manifest)


def _is_base(copy: torch.Tensor, target: Target, base: ModelDirectory) -> bool:
    if tuple(copy.shape) != target.shape:
        return False
    stored = base.read(locate(target.name, target.names, None, base)[0].names[0])
    return torch.equal(stored.to(copy.dtype), copy.T if target.transposed else copy)
