"""PEFT's directory of an adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

Only files, names and numbers. What is read means as updates is decided above (``exchange/peft_import.py``), and so
is what is written (``exchange/peft_lora.py``). Pickled adapters are never opened.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.checkpoint.atomic import atomic_file, write_text
from espalier.checkpoint.directory import read_json
from espalier.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from espalier.errors import EspalierError

if TYPE_CHECKING:
    import torch

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, SHARED_PREFIX = "base_model.model.", "base_model."

# writing


@dataclass
class Factors:
    """One module's LoRA: A (rank, in), B (out, rank), what the product is multiplied by, DoRA's magnitude (out,)."""

    A: torch.Tensor
    B: torch.Tensor
    gain: float
    magnitude: torch.Tensor | None = None
    is_embedding: bool = False


def _short_names(modules: list[str], others: list[str]) -> list[str]:
    """The last parts of the module names where these choose exactly the modules, else the full names."""
    tails = sorted({name.rpartition(".")[2] for name in modules})
    chosen = set(modules)
    caught = [name for name in others if name not in chosen and name.rpartition(".")[2] in tails]
    return sorted(modules) if caught else tails


def write(
    folder: Path, factors: dict[str, Factors], base: str, all_modules: list[str], copies: dict[str, dict[str, torch.Tensor]], task: str
) -> None:
    """Write a LoRA adapter for modules by name, of any ranks.

    Args:
        base: name or path of the base model, as PEFT records it.
        all_modules: names of all modules of the model with a weight, to shorten the target names safely.
        copies: modules that are held whole (``modules_to_save``): module to name in it to tensor.
        task: PEFT's name of what the model does, such as ``CAUSAL_LM``.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {module: dict(held) for module, held in copies.items()}
    for module, f in factors.items():
        kind = "embedding_{}" if f.is_embedding else "{}.weight"
        a, b = (f.B.T, f.A.T) if f.is_embedding else (f.A, f.B)
        tensors[module] = {f"lora_{kind.format('A')}": a, f"lora_{kind.format('B')}": b}
        if f.magnitude is not None:
            tensors[module]["lora_magnitude_vector"] = f.magnitude
    settings = {
        **by_module("r", "rank_pattern", {module: f.A.shape[0] for module, f in factors.items()}),
        **by_module("lora_alpha", "alpha_pattern", {module: f.gain * f.A.shape[0] for module, f in factors.items()}),
        "target_modules": _short_names(list(factors), all_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": any(f.magnitude is not None for f in factors.values()),
        "init_lora_weights": True,
        "modules_to_save": list(copies) or None,
        "task_type": task,
    }
    write_kind(folder, "LORA", tensors, base, settings)


def write_kind(folder: Path, kind: str, tensors: Mapping[str, Mapping[str, torch.Tensor]], base: str, settings: Mapping[str, Any]) -> None:
    """Write an adapter of any kind.

    Args:
        kind: a key of ``KINDS``.
        tensors: module -> end of the name -> tensor.
        base: name or path of the base model, as PEFT records it.
        settings: of adapter_config.json, beside what all kinds have.
    """
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": None,
        **settings,
    }
    named = {f"{PREFIX}{module}.{end}": t.detach().contiguous() for module, own in tensors.items() for end, t in own.items()}
    with atomic_file(folder / TENSORS) as temporary:
        write_safetensors(temporary, named)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def by_module(name: str, pattern: str, values: Mapping[str, float]) -> dict[str, Any]:
    """A setting and PEFT's pattern of the modules where it is another: searched as ``(.*\\.)?(KEY)$``, each names one module."""
    first = next(iter(values.values()))
    return {name: first, pattern: {f"^{module}": value for module, value in values.items() if value != first}}


def remove(folder: Path) -> None:
    """Remove an adapter's files, where there are any."""
    for name in (CONFIG, TENSORS):
        (folder / name).unlink(missing_ok=True)


# reading any adapter


@dataclass(frozen=True)
class Kind:
    """How PEFT keeps one kind of adapter.

    Args:
        factors: ends of the names of a module's tensors.
        options: the settings that are read, or that changed the training alone.
        shared: names of tensors that all modules share.
    """

    factors: tuple[str, ...]
    options: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


_LORA_OPTIONS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "init_lora_weights", "lora_bias",
    "trainable_token_indices", "ensure_weight_tying", "target_parameters", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size", "velora_config",
)  # fmt: skip
_LYCORIS_OPTIONS = ("r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout")
KINDS: dict[str, Kind] = {
    "LORA": Kind(
        ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
         "lora_magnitude_vector.weight", "token_adapter.trainable_tokens_delta"),
        _LORA_OPTIONS,
    ),
    "ADALORA": Kind(
        ("lora_A", "lora_B", "lora_E"),
        (*(o for o in _LORA_OPTIONS if o not in ("lora_bias", "trainable_token_indices", "target_parameters", "use_dora")),
         "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    ),
    "LOHA": Kind(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _LYCORIS_OPTIONS),
    "LOKR": Kind(
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        (*_LYCORIS_OPTIONS, "decompose_both", "decompose_factor", "rank_dropout_scale"),
    ),
    "IA3": Kind(("ia3_l",), ("feedforward_modules", "init_ia3_weights")),
    "VERA": Kind(
        ("vera_lambda_b", "vera_lambda_d"),
        ("r", "d_initial", "projection_prng_key", "save_projection", "vera_dropout"),
        shared=("vera_A", "vera_B"),
    ),
    "RANDLORA": Kind(
        ("randlora_lambda", "randlora_gamma"),
        ("r", "randlora_alpha", "randlora_dropout", "projection_prng_key", "save_projection", "sparse", "very_sparse"),
        shared=("randlora_A", "randlora_B"),
    ),
    "OFT": Kind(
        ("oft_R.weight", "oft_embedding_R.weight"),
        ("r", "oft_block_size", "module_dropout", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    ),
    "BOFT": Kind(("boft_R", "boft_s"), ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout")),
    "SHIRA": Kind(("shira_weight", "shira_indices"), ("r", "mask_type", "random_seed")),
    "MISS": Kind(("miss_block",), ("r", "mini_r", "miss_dropout")),
    "POLY": Kind(("poly_lora_A", "poly_lora_B", "poly_router.module_logits"), ("r", "poly_type", "n_tasks", "n_skills", "n_splits")),
    "TRAINABLE_TOKENS": Kind(("trainable_tokens_delta",), ("token_indices",)),
}  # fmt: skip
"""PEFT's name of the kind -> how it is kept; the layout of peft 0.21."""
_COMMON = (
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "init_weights",
)  # fmt: skip
_CHANGED_BASES = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Starts of ``init_lora_weights`` for which PEFT changes the base itself when it makes or loads the adapter."""
_PLAIN = re.compile(r"[\w.-]+")
_TAME = re.compile(r"\^?(?:(?:[\w.-]|\\[.dw]|\[[^\]\[\\]{1,40}\])[*+?]?|\((?!\?)[\w.|-]+\)|\|)+\$?")
_LONGEST, _MOST = 300, 64


@dataclass
class Adapter:
    """An adapter as it was read.

    Args:
        folder: its directory.
        kind: a key of ``KINDS``.
        config: content of adapter_config.json.
        modules: module -> end of the name -> tensor; all floating-point numbers are finite.
        shared: tensors that all modules share.
        copies: tensors of the model that the adapter holds whole, by name; ``base_layer`` is left in the names.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    modules: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    copies: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Of the config, for errors."""
        return self.folder / CONFIG

    def number(self, key: str, default: float | None = None) -> float:
        """A setting that must be a finite number.

        Raises:
            EspalierError: when it is none.
        """
        return self._finite(key, self.config.get(key, default))

    def _finite(self, what: str, value: Any) -> float:
        with contextlib.suppress(OverflowError):  # an integer may be larger than any float
            if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
                return float(value)
        raise EspalierError(f"{self.path}: {what} is {reprlib.repr(value)}; it must be a finite number")

    def number_of(self, key: str, patterns: str, module: str, default: float | None = None) -> float:
        """A setting of one module: the first of ``patterns`` that its name matches decides, else ``key``.

        Raises:
            EspalierError: when it is no finite number, or a pattern is none that is matched here.
        """
        for pattern, value in self._patterns(patterns).items():
            if self._matches(patterns, pattern, module):
                return self._finite(f"{patterns}[{pattern!r}]", value)
        return self.number(key, default)

    def _patterns(self, key: str) -> dict[str, Any]:
        patterns = self.config.get(key) or {}
        if not isinstance(patterns, dict):
            raise EspalierError(f"{self.path}: {key} is {patterns!r}; it must map names of modules to numbers")
        return patterns

    def _matches(self, key: str, pattern: str, module: str) -> bool:
        """As PEFT matches, where that cannot take long: the end of the name, from a dot on."""
        if _PLAIN.fullmatch(pattern):
            whole, size = f".{module}", len(pattern)
            if len(whole) <= size or whole[-size - 1] != ".":
                return False
            return all(a in (".", b) for a, b in zip(pattern, whole[-size:], strict=True))  # a dot stands for any character
        repeats = pattern.count("*") + pattern.count("+")
        if len(pattern) > _LONGEST or repeats > 2 or not _TAME.fullmatch(pattern) or len(self._patterns(key)) > _MOST + len(self.modules):
            raise EspalierError(
                f"{self.path}: {key} has the pattern {pattern[:_LONGEST]!r}; names of modules are matched, and short patterns of "
                "letters, dots, [sets], (a|b) and at most two of * and +"
            )
        try:
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error as error:
            raise EspalierError(f"{self.path}: {key} has the pattern {pattern!r}, which is none ({error})") from error


def _check_options(path: Path, kind: str, config: dict[str, Any]) -> None:
    known = {*_COMMON, *KINDS[kind].options}
    for key, value in config.items():
        if key not in known and value:
            raise EspalierError(f"{path}: {key} is {value!r}, which this version does not import for {kind}; it must be off, or absent")
    if config.get("bias") not in ("none", None, "all", f"{kind.lower()}_only"):
        raise EspalierError(f"{path}: bias is {config['bias']!r}; it must be 'none', 'all' or '{kind.lower()}_only'")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGED_BASES):
        raise EspalierError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changed the base when the adapter was made; save "
            "it as plain LoRA with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        EspalierError: when it is no JSON object.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise EspalierError(f"{folder / CONFIG} is {reprlib.repr(config)}; it must be a JSON object")
    return config


def read(folder: Path) -> Adapter:
    """The tensors of an adapter by module, and its config.

    Raises:
        EspalierError: when it is pickled, of another kind, has an option that is not known here, or holds numbers
            that are not finite or a tensor of no known name.
    """
    config = read_config(folder)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise EspalierError(f"{folder / CONFIG}: peft_type is {kind!r}; imported are: {', '.join(KINDS)}")
    if not (folder / TENSORS).exists():
        hint = " (it holds a pickle, which is never read: save it again with PEFT's default safetensors)"
        raise EspalierError(f"{folder} has no {TENSORS}{hint if (folder / 'adapter_model.bin').exists() else ''}")
    _check_options(folder / CONFIG, kind, config)
    adapter = Adapter(folder, kind, config)
    with SafetensorsFile(folder / TENSORS) as file:
        for name in file.tensors:
            _place(adapter, name, file)
    return adapter


def _place(adapter: Adapter, name: str, file: SafetensorsFile) -> None:
    """Put one tensor of the file where it belongs."""
    kind, path = KINDS[adapter.kind], adapter.folder / TENSORS
    bare = name.removeprefix(SHARED_PREFIX)
    if bare in kind.shared:
        adapter.shared[bare] = _read(file, name, path)
        return
    if name.rpartition(".")[2] in kind.shared:
        return  # PEFT repeats the shared tensors in each layer
    if not name.startswith(PREFIX):
        raise EspalierError(f"{path} holds {name!r}, which is no tensor of a {adapter.kind} adapter")
    stem = name.removeprefix(PREFIX)
    for end in kind.factors:
        if stem.endswith(f".{end}"):
            adapter.modules.setdefault(stem.removesuffix(f".{end}"), {})[end] = _read(file, name, path)
            return
    adapter.copies[stem] = _read(file, name, path)


def _read(file: SafetensorsFile, name: str, path: Path) -> torch.Tensor:
    import torch

    tensor = file.read(name)
    if tensor.is_floating_point() and tensor.element_size() < 2:
        tensor = tensor.to(torch.bfloat16)  # which holds every 8-bit number, and has arithmetic
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise EspalierError(f"{path}: {name} is not finite everywhere")
    return tensor


def expect_sizes(adapter: Adapter, module: str, end: str, tensor: torch.Tensor, sizes: Sequence[int | None]) -> torch.Tensor:
    """Refuse a tensor of other sizes (``None`` for any), or one of integers.

    Raises:
        EspalierError: naming the tensor, its sizes and those that it must have.
    """
    fits = tensor.ndim == len(sizes) and all(want in (None, size) for size, want in zip(tensor.shape, sizes, strict=True))
    if not fits or not tensor.is_floating_point() or 0 in tensor.shape:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise EspalierError(
            f"{adapter.folder / TENSORS}: {module}.{end} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
            f"the model needs floating point of shape ({wanted})"
        )
    return tensor
