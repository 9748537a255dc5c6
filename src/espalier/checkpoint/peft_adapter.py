"""PEFT's directory of a LoRA adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

Only names, tensors and numbers: what they mean as updates is decided above (``exchange/peft_lora.py``).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.checkpoint.atomic import atomic_file, write_text
from espalier.checkpoint.directory import read_json
from espalier.checkpoint.safetensors_file import read_safetensors, write_safetensors
from espalier.errors import EspalierError

if TYPE_CHECKING:
    import torch

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass
class Factors:
    """One module's LoRA: A (rank, in), B (out, rank), what the product is multiplied by, DoRA's magnitude (out,).

    ``base`` is the copy of the module's own weight that PEFT stores beside the factors of an embedding or a head.
    """

    A: torch.Tensor
    B: torch.Tensor
    gain: float
    magnitude: torch.Tensor | None = None
    is_embedding: bool = False
    base: torch.Tensor | None = None


def _short_names(modules: list[str], others: list[str]) -> list[str]:
    """The last parts of the module names where these choose exactly the modules, else the full names."""
    tails = sorted({name.rpartition(".")[2] for name in modules})
    chosen = set(modules)
    caught = [name for name in others if name not in chosen and name.rpartition(".")[2] in tails]
    return sorted(modules) if caught else tails


def write(folder: Path, factors: dict[str, Factors], base: str, all_modules: list[str]) -> None:
    """Write an adapter for modules by name.

    Args:
        base: name or path of the base model, as PEFT records it.
        all_modules: names of all modules of the model with a weight, to shorten the target names safely.
    """
    tensors: dict[str, torch.Tensor] = {}
    for module, f in factors.items():
        kind = "embedding_{}" if f.is_embedding else "{}.weight"
        a, b = (f.B.T, f.A.T) if f.is_embedding else (f.A, f.B)
        tensors[f"{PREFIX}{module}.lora_{kind.format('A')}"] = a.detach()
        tensors[f"{PREFIX}{module}.lora_{kind.format('B')}"] = b.detach()
        if f.magnitude is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = f.magnitude.detach()
    ranks = {module: f.A.shape[0] for module, f in factors.items()}
    alphas = {module: f.gain * f.A.shape[0] for module, f in factors.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "target_modules": _short_names(list(factors), all_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": any(f.magnitude is not None for f in factors.values()),
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    with atomic_file(folder / TENSORS) as temporary:
        write_safetensors(temporary, {n: t.contiguous() for n, t in tensors.items()})
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def remove(folder: Path) -> None:
    """Remove an adapter's files, where there are any."""
    for name in (CONFIG, TENSORS):
        (folder / name).unlink(missing_ok=True)


def _pattern(patterns: dict[str, Any], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT looks them up
            return float(value)
    return float(default)


def _gain(path: Path, config: dict[str, Any], module: str, rank: int) -> float:
    try:
        alpha = _pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", rank))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise EspalierError(f"{path}: lora_alpha or alpha_pattern of {module} cannot be read ({error})") from error
    if not math.isfinite(alpha):
        raise EspalierError(f"{path}: lora_alpha or alpha_pattern of {module} is {alpha}; it must be a finite number")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


_CHANGED_BASES = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Starts of ``init_lora_weights`` for which PEFT changes the base itself when it makes or loads the adapter."""
_VARIANTS = (
    "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "lora_bias",
)  # fmt: skip
"""Options under which an adapter is more, or other, than W + (alpha / r) B A."""


def _refuse_variants(path: Path, config: dict[str, Any]) -> None:
    for key in _VARIANTS:
        if config.get(key):
            raise EspalierError(f"{path}: {key} is {config[key]!r}; this version imports plain LoRA and DoRA only")
    if config.get("bias") not in ("none", None):
        raise EspalierError(f"{path}: bias is {config['bias']!r}; this version imports plain LoRA and DoRA only")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGED_BASES):
        raise EspalierError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changed the base when the adapter was made; save "
            "it as plain LoRA with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def read(folder: Path) -> tuple[dict[str, Factors], dict[str, Any]]:
    """The factors by module name, and the adapter's config.

    Raises:
        EspalierError: when it is no LoRA adapter in safetensors, or holds something that is no LoRA factor.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise EspalierError(f"{folder / CONFIG}: peft_type is {kind!r}; this version imports LORA adapters")
    if not (folder / TENSORS).exists():
        hint = " (it holds a pickle, which is never read: save it again with PEFT's default safetensors)"
        raise EspalierError(f"{folder} has no {TENSORS}{hint if (folder / 'adapter_model.bin').exists() else ''}")
    _refuse_variants(folder / CONFIG, config)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_safetensors(folder / TENSORS).items():
        stem, found = name.removeprefix(PREFIX), False
        for suffix in (
            "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
            "lora_magnitude_vector.weight", "base_layer.weight",
        ):  # fmt: skip
            if stem.endswith("." + suffix):
                parts.setdefault(stem.removesuffix("." + suffix), {})[suffix.removesuffix(".weight")] = tensor
                found = True
        if not found:
            raise EspalierError(f"{folder / TENSORS} holds {name!r}, which is no factor of a plain LoRA")
    factors = {}
    for module, tensors in parts.items():
        embedding = "lora_embedding_A" in tensors
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if a not in tensors or b not in tensors or tensors[a].ndim != 2 or tensors[b].ndim != 2:
            raise EspalierError(f"{folder / TENSORS}: {module} lacks one of its two LoRA matrices")
        A, B = (tensors[b].T, tensors[a].T) if embedding else (tensors[a], tensors[b])
        if A.shape[0] != B.shape[1] or A.shape[0] < 1 or not A.is_floating_point() or not B.is_floating_point():
            raise EspalierError(f"{folder / TENSORS}: the factors of {module} are {A.dtype} {tuple(A.shape)} and {B.dtype} {tuple(B.shape)}")
        magnitude = tensors.get("lora_magnitude_vector")
        if magnitude is not None and (embedding or magnitude.numel() != B.shape[0]):
            what = "is of an embedding, whose columns PEFT normalises" if embedding else f"has {magnitude.numel()} numbers"
            raise EspalierError(f"{folder / TENSORS}: the magnitude of {module} {what}; a delta's has one for each of {B.shape[0]} rows")
        gain = _gain(folder / CONFIG, config, module, A.shape[0])
        factors[module] = Factors(A, B, gain, magnitude, embedding, tensors.get("base_layer"))
    return factors, config
