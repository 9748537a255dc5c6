"""Deltas of low rank as PEFT's LoRA (or DoRA) files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.anatomy.target import Target
from espalier.checkpoint import peft_adapter
from espalier.checkpoint.peft_adapter import Factors
from espalier.delta.forms import LowRank, Magnitude, Update
from espalier.delta.gather import by_parameter
from espalier.delta.store import Delta


def _factors(update: Update, target: Target) -> Factors | str:
    """The factors of an update, or why PEFT cannot hold it."""
    if len(target.names) > 1:
        return f"{target.name} is tied, and PEFT adapts only one side of a tie"
    if len(target.shape) != 2 or target.route not in ("linear", "lookup"):
        return f"{target.name} is no plain matrix of a Linear or Embedding"
    magnitude, inner = None, update
    if isinstance(update, Magnitude) and target.route == "linear" and float(update.gain) == 1.0:
        magnitude, inner = update.magnitude, update.inner
    if not isinstance(inner, LowRank):
        return f"the form of {target.name} is {update.form}"
    return Factors(inner.A, inner.B, float(inner.gain), magnitude, target.route == "lookup")


def export(folder: Path, delta: Delta, targets: Mapping[str, Target], base: str, model: Any) -> str | None:
    """Write PEFT's files beside a delta's where it is LoRA or DoRA; else say why not.

    Args:
        folder: gets adapter_config.json and adapter_model.safetensors.
        targets: the model's parameters, by name.
        base: name or path of the base model, as PEFT records it.
        model: the model, which may be empty, for the names of its modules.

    Returns:
        ``None`` when written, or the reason why PEFT cannot hold this delta as it is.
    """
    factors = {}
    if not delta.updates:
        return "it updates no parameter"
    for name, update in by_parameter(delta.updates, targets.values()).items():
        made = _factors(update, targets[name])
        if isinstance(made, str):
            return made
        factors[name.removesuffix(".weight")] = made
    if len({f.magnitude is None for f in factors.values()}) > 1:
        return "only some of its parts have a magnitude"
    modules = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    peft_adapter.write(folder, factors, base, modules)
    return None
