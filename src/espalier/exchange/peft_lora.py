"""Deltas of low rank as PEFT's LoRA (or DoRA) files, and what trained whole beside them as its ``modules_to_save``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.classification import is_classifier
from espalier.anatomy.parameters import named_parameters
from espalier.anatomy.target import Target
from espalier.checkpoint import peft_adapter
from espalier.checkpoint.peft_adapter import Factors
from espalier.delta.forms import LowRank, Magnitude, Replace, Update
from espalier.delta.forms.update import is_one
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


def held(delta: Delta, targets: Mapping[str, Target]) -> dict[str, Update] | str:
    """The updates of a delta by parameter, or why PEFT can hold none of its kind."""
    if over := delta.manifest.get("over"):
        return f"it was trained over the delta in {over[-1]['delta']}"
    return by_parameter(delta.updates, targets.values()) if delta.updates else "it updates no parameter"


def export(folder: Path, delta: Delta, targets: Mapping[str, Target], base: str, model: Any) -> str | None:
    """Write PEFT's files beside a delta's where it is LoRA or DoRA, with whole modules or without; else say why not.

    Arguments and result are those of ``peft_kinds.export``.
    """
    updates = held(delta, targets)
    if isinstance(updates, str):
        return updates
    factors: dict[str, Factors] = {}
    copies: dict[str, dict[str, torch.Tensor]] = {}
    for name, update in updates.items():
        if isinstance(update, Replace) and update.ignores_base and is_one(update.gain) and len(targets[name].names) == 1:
            module, _, local = name.rpartition(".")
            copies.setdefault(module, {})[local] = update.values.mT if targets[name].transposed else update.values
            continue
        made = _factors(update, targets[name])
        if isinstance(made, str):
            return made
        if len(made.A):  # of rank 0 it does nothing, and PEFT has no such thing
            factors[name.removesuffix(".weight")] = made
    if len({f.magnitude is None for f in factors.values()}) > 1:
        return "only some of its parts have a magnitude"
    if not factors:
        return "none of its updates is of low rank"
    if reason := _why_not_whole(copies, model):
        return reason
    modules = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    peft_adapter.write(folder, factors, base, modules, copies, "SEQ_CLS" if is_classifier(model) else "CAUSAL_LM")
    return None


def _why_not_whole(copies: Mapping[str, Mapping[str, torch.Tensor]], model: Any) -> str | None:
    """Why modules cannot be PEFT's ``modules_to_save``: that keeps all of a module, and finds it by the end of its name."""
    names = [name for name, _ in model.named_modules()]
    for module, held in copies.items():
        all_of_it = {name for name, _ in named_parameters(model.get_submodule(module)) if not name.startswith("espalier")}
        if all_of_it != set(held):
            return f"of {module}, {', '.join(sorted(held))} trained whole, and PEFT keeps all or nothing of a module ({', '.join(sorted(all_of_it))})"
        if twin := next((name for name in names if name != module and name.endswith(module)), None):
            return f"PEFT would take {twin} for {module}"
    return None
