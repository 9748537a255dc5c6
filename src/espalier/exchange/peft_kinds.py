"""Deltas as PEFT's own files of their kind: LoRA and DoRA, MiSS and BAT, LoHa, LoKr, IA3, OFT, SHiRA and Poly.

The other direction of ``peft_import.py``. PEFT keeps one setting for all modules where a delta may have one each
(sizes of blocks, for instance), and adapts what is plain: what it cannot hold is said, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.target import Target
from espalier.checkpoint import peft_adapter
from espalier.delta.forms import Bank, BlockAffine, Diagonal, Hadamard, Kronecker, Sparse, Tiled
from espalier.delta.forms.kronecker import lycoris_shapes
from espalier.delta.store import Delta
from espalier.exchange import peft_lora


@dataclass
class Part:
    """One module of an adapter: PEFT's kind, its tensors, the settings that all modules share, and its own rank and alpha."""

    kind: str
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    alpha: float = 0.0
    is_feedforward: bool = False


def _tiled(update: Tiled, target: Target, options: Mapping[str, Any]) -> Part | str:
    rows, rank = update.values.shape
    if target.outputs % rows:
        return f"the block of {target.name} has {rows} rows, which do not divide its {target.outputs} outputs"
    mini = {"init_weights": "mini", "mini_r": rows} if rows < target.outputs else {"init_weights": True, "mini_r": 1}
    return Part("MISS", {"miss_block": (update.values * update.gain).T}, {"r": rank, **mini})


def _block_affine(update: BlockAffine, target: Target, options: Mapping[str, Any]) -> Part | str:
    size = update.B.shape[-1]
    if float(update.gain) != 1.0:
        return f"the update of {target.name} is scaled by {float(update.gain):g}"
    if update.side == "row":
        return Part("MISS", {"miss_block": update.B}, {"r": size, "init_weights": "bat"})
    unit = torch.eye(size, dtype=torch.float64)
    turned = update.B.double() + unit  # R^T; Q = (I + R)^-1 (I - R) = (R^T - I) (R^T + I)^-1
    Q, _ = torch.linalg.solve_ex(unit + turned, turned - unit, left=False)
    if update.side != "input" or not torch.allclose(Q, -Q.transpose(-1, -2), rtol=1e-4, atol=1e-5):
        return f"the blocks of {target.name} are no rotations of its inputs"
    rows, columns = torch.triu_indices(size, size, 1)
    settings = {"r": 0, "oft_block_size": size, "use_cayley_neumann": False}
    return Part("OFT", {"oft_R.weight": Q[:, rows, columns].to(update.B.dtype)}, settings)


def _kronecker(update: Kronecker, target: Target, options: Mapping[str, Any]) -> Part | str:
    rank, wanted, both = (options.get(name, default) for name, default in (("rank", 0), ("factor", -1), ("decompose_both", False)))
    if type(rank) is not int or type(wanted) is not int or not (wanted == -1 or wanted >= 1):  # as another program's adapter may say
        return f"it was made with rank {rank!r} and factor {wanted!r}, which LoKr does not have"
    shapes = lycoris_shapes(target.outputs, target.inputs, rank, wanted, both)
    if {name: (1, *shape) for name, shape in shapes.items()} != {name: tuple(t.shape) for name, t in update.tensors().items()}:
        return f"the factors of {target.name} have other sizes than LoKr of rank {rank} has"
    named = {name: f"lokr_w{'AB'.index(name[0]) + 1}" for name in shapes}
    ends = {name: "_b" if name.endswith("_in") else "_a" if f"{name}_in" in shapes else "" for name in shapes}
    tensors = {f"{named[name]}{ends[name]}": tensor[0] for name, tensor in update.tensors().items()}
    return Part("LOKR", tensors, {"decompose_factor": wanted, "decompose_both": both}, rank, float(update.gain) * rank)


def _hadamard(update: Hadamard, target: Target, options: Mapping[str, Any]) -> Part:
    tensors = {"hada_w1_a": update.B1, "hada_w1_b": update.A1, "hada_w2_a": update.B2, "hada_w2_b": update.A2}
    rank = update.A1.shape[0]
    return Part("LOHA", tensors, {}, rank, float(update.gain) * rank)


def _diagonal(update: Diagonal, target: Target, options: Mapping[str, Any]) -> Part | str:
    scales = update.rows if update.columns is None else update.columns
    if scales is None or (update.rows is not None and update.columns is not None):
        return f"both sides of {target.name} are scaled"
    scales = 1 + update.gain * (scales - 1)
    is_feedforward = update.rows is None
    return Part("IA3", {"ia3_l": scales[None] if is_feedforward else scales[:, None]}, is_feedforward=is_feedforward)


def _sparse(update: Sparse, target: Target, options: Mapping[str, Any]) -> Part | str:
    rank, rest = divmod(len(update.values), target.outputs + target.inputs)
    if rest or not rank:
        return f"the update of {target.name} has {len(update.values):,} entries, no multiple of {target.outputs} + {target.inputs}"
    index = torch.stack((update.positions // target.inputs, update.positions % target.inputs)).int()
    return Part("SHIRA", {"shira_weight": update.values * update.gain, "shira_indices": index}, {"r": rank, "mask_type": "random"})


def _bank(update: Bank, target: Target, options: Mapping[str, Any]) -> Part:
    tasks, heads, skills = update.Z.shape
    rank = update.A.shape[-2]  # which PEFT divides by
    B = (update.B * (update.gain * rank)).transpose(-1, -2)
    tensors = {"poly_lora_A": update.A.transpose(-1, -2), "poly_lora_B": B, "poly_router.module_logits": update.Z.flatten(1)}
    return Part("POLY", tensors, {"r": rank, "poly_type": "poly", "n_tasks": tasks, "n_skills": skills, "n_splits": heads})


_PARTS: dict[str, Callable[[Any, Target, Mapping[str, Any]], Part | str]] = {
    "tiled": _tiled, "block_affine": _block_affine, "kronecker": _kronecker, "hadamard": _hadamard, "diagonal": _diagonal, "sparse": _sparse, "bank": _bank,
}  # fmt: skip
"""Form -> what PEFT keeps of it, or why it cannot."""


def export(folder: Path, delta: Delta, targets: Mapping[str, Target], base: str, model: Any) -> str | None:
    """Write PEFT's files beside a delta's where PEFT has its kind; else say why not.

    Args:
        folder: gets adapter_config.json and adapter_model.safetensors.
        targets: the model's parameters, by name.
        base: name or path of the base model, as PEFT records it.
        model: the model, which may be empty, for the names of its modules.

    Returns:
        ``None`` when written, or the reason why PEFT cannot hold this delta as it is.
    """
    updates = peft_lora.held(delta, targets)
    if isinstance(updates, str):
        return updates
    if not {update.form for update in updates.values()} & set(_PARTS):
        return peft_lora.export(folder, delta, targets, base, model)
    options = delta.manifest.get("hyperparameters", {})
    parts: dict[str, Part] = {}
    for name, update in updates.items():
        target = targets[name]
        if len(target.names) > 1 or len(target.shape) != 2 or target.route != "linear" or target.transposed:
            return f"{name} is no plain matrix of a Linear of its own"
        made = _PARTS[update.form](update, target, options) if update.form in _PARTS else f"the form of {name} is {update.form}"
        if isinstance(made, str):
            return made
        module = name.removesuffix(".weight")
        if made.kind == "IA3" and not made.is_feedforward and model.get_submodule(module).bias is not None:
            return f"PEFT would scale the bias of {module} too"
        parts[module] = made
    first = next(iter(parts.values()))
    for module, part in parts.items():
        if (part.kind, part.settings) != (first.kind, first.settings):
            return f"{module} is {part.kind} of {part.settings}, others are {first.kind} of {first.settings}; PEFT has one setting for all"
    settings = {**first.settings, "target_modules": sorted(parts)}
    if first.kind == "IA3":
        settings["feedforward_modules"] = sorted(module for module, part in parts.items() if part.is_feedforward)
    if first.rank is not None:
        ranks = {module: part.rank or 0 for module, part in parts.items()}
        alphas = {module: part.alpha for module, part in parts.items()}
        settings |= {**peft_adapter.by_module("r", "rank_pattern", ranks), **peft_adapter.by_module("alpha", "alpha_pattern", alphas)}
    peft_adapter.write_kind(folder, first.kind, {module: part.tensors for module, part in parts.items()}, base, settings)
    return None
