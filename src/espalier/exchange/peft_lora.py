"""Deltas to PEFT's LoRA files: exactly where an update is of low rank, by truncated SVD where one asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.target import Target
from espalier.checkpoint import peft_adapter
from espalier.checkpoint.peft_adapter import Factors
from espalier.delta.forms import LowRank, Magnitude, Update
from espalier.delta.store import Delta
from espalier.errors import EspalierError, at_least

_WHY = {
    True: ", which depends on the base: LoRA only adds",
    False: ", which has no exact factors of less than full rank; give a rank to truncate it to",
}


def _factors(update: Update, target: Target, rank: int | None, plain: bool) -> tuple[Factors, float] | str:
    """The factors of an update and their relative error, or why PEFT cannot hold it; ``plain``: only as it is kept."""
    if len(target.names) > 1:
        return f"{target.name} is tied, and PEFT adapts only one side of a tie"
    if len(target.shape) != 2 or target.route not in ("linear", "lookup"):
        return f"{target.name} is no plain matrix of a Linear or Embedding"
    magnitude, inner = None, update
    if isinstance(update, Magnitude) and target.route == "linear" and float(update.gain) == 1.0:
        magnitude, inner = update.magnitude, update.inner
    error = 0.0
    factors = inner.low_rank() if isinstance(inner, LowRank) or not plain else None
    if factors is not None:
        A, B, gain = factors.A, factors.B, float(factors.gain)
    elif rank is None or inner.depends_on_base:
        return f"the form of {target.name} is {update.form}" + ("" if plain else _WHY[inner.depends_on_base])
    else:
        B, A, error = _truncated(inner, rank)
        gain = 1.0
    return Factors(A, B, gain, magnitude, target.route == "lookup"), error


def _truncated(update: Update, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The nearest B (out, rank) and A (rank, in), and the relative error of their product in the Frobenius norm."""
    dense = update.materialize(torch.zeros(()).expand(update.shape))  # additive: the weight gives no more than its shape
    U, s, V = torch.linalg.svd(dense.float(), full_matrices=False)
    root = s[:rank].sqrt()
    total = float(torch.linalg.vector_norm(s))
    error = float(torch.linalg.vector_norm(s[rank:])) / total if total else 0.0
    return (U[:, :rank] * root).contiguous(), (root[:, None] * V[:rank]).contiguous(), error


def _all_factors(delta: Delta, targets: Mapping[str, Target], rank: int | None, plain: bool = False) -> tuple[dict[str, Factors], dict[str, float]] | str:
    factors, errors = {}, {}
    for name, update in delta.updates.items():
        made = _factors(update, targets[name], rank, plain)
        if isinstance(made, str):
            return made
        factors[name.removesuffix(".weight")], errors[name] = made
    if len({f.magnitude is None for f in factors.values()}) > 1:
        return "only some of its parts have a magnitude"
    return factors, errors


def _write(folder: Path, factors: dict[str, Factors], base: str, model: Any) -> None:
    modules = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    peft_adapter.write(folder, factors, base, modules)


def export(folder: Path, delta: Delta, targets: Mapping[str, Target], base: str, model: Any) -> str | None:
    """Write PEFT's files beside a delta's where it is plain LoRA or DoRA, as it is kept; else say why not.

    Returns:
        ``None`` when written, or the reason why PEFT cannot hold this delta as it is.
    """
    made = _all_factors(delta, targets, None, plain=True)
    if isinstance(made, str):
        return made
    _write(folder, made[0], base, model)
    return None


def export_lora(
    folder: Path, delta: Delta, targets: Mapping[str, Target], base: str, model: Any, rank: int | None = None
) -> dict[str, float]:
    """Write a delta as a PEFT LoRA directory.

    Columns, rows, shared pools and sums of them have exact factors. With ``rank``, an additive update that has none is
    truncated to its nearest of that rank.

    Args:
        folder: gets adapter_config.json and adapter_model.safetensors; made when missing.
        targets: the model's parameters, by name.
        base: name or path of the base model, as PEFT records it.
        model: the model, which may be empty, for the names of its modules.
        rank: of truncated updates, at least 1; ``None`` refuses them.

    Returns:
        Parameter -> relative error of its update in the Frobenius norm; 0 where it is exact.

    Raises:
        EspalierError: when PEFT cannot hold an update as LoRA, naming it.
    """
    if rank is not None:
        at_least("rank", rank, 1)
    made = _all_factors(delta, targets, rank)
    if isinstance(made, str):
        raise EspalierError(f"PEFT cannot hold this delta as LoRA: {made}")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, made[0], base, model)
    return made[1]
