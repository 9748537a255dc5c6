"""What the tests of merge methods share: parameters in memory, and models on disk that are nothing but tensors."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from espalier import registry
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.safetensors_file import read_safetensors, write_safetensors
from espalier.delta.merging import Parameter, Whole
from espalier.errors import EspalierError
from espalier.exchange.merging import Item, Method, Model, write_merged

Tensors = Mapping[str, torch.Tensor]


class Held(Parameter):
    """A parameter whose tensors are in memory."""

    def __init__(self, base: torch.Tensor | None, models: Sequence[torch.Tensor], weights: Sequence[float], scale: float, name: str, seed: int, survey: Any) -> None:
        super().__init__(name, tuple(models[0].shape), weights, scale, base is not None, seed, survey)
        self._all = [*models, *([base] if base is not None else [])]

    def stored(self, model: int | None, start: int, stop: int) -> torch.Tensor:
        return self._all[-1 if model is None else model].reshape(self.rows, self.columns)[start:stop]

    def refuse(self, model: int | None, rows: torch.Tensor) -> NoReturn:
        raise EspalierError("a model must be finite to be merged")


def method_of(name: str) -> Method:
    """A registered merger, with its first pass."""
    info = registry.find(name, "merger")
    function = registry.load(info)
    first = info.settings.get("first_pass")
    return Method(function, getattr(sys.modules[function.__module__], first) if first else None)


def merge_all(
    name: str, base: Tensors | None, models: Sequence[Tensors], *, weights: Sequence[float] | None = None, scale: float = 1.0, seed: int = 0, **options: Any
) -> dict[str, torch.Tensor]:
    """What a method makes of tensors in memory, in float32."""
    method = method_of(name)
    shares = [1.0] * len(models) if weights is None else list(weights)

    def parameter(tensor: str, survey: Any = None) -> Held:
        ours = base[tensor] if base is not None else None
        return Held(ours, [model[tensor] for model in models], shares, scale, tensor, seed, survey)

    survey = None
    if method.first_pass:
        parameters = [parameter(tensor) for tensor in models[0]]
        survey = method.first_pass(Whole(parameters, lambda do: map(do, parameters)), **options)
    made = {}
    for tensor, like in models[0].items():
        one = parameter(tensor, survey)
        combine = method.function(one, **options)
        if not isinstance(combine, torch.Tensor):
            combine = torch.cat([combine(piece).clone() for piece in one.pieces()])
        made[tensor] = combine.reshape(like.shape)
    return made


def merge(name: str, base: torch.Tensor | None, models: Sequence[torch.Tensor], **keywords: Any) -> torch.Tensor:
    """:func:`merge_all` of models with one tensor."""
    return merge_all(name, {"w": base} if base is not None else None, [{"w": model} for model in models], **keywords)["w"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    directory = ModelDirectory(folder)
    return {name: directory.read(name) for name in directory}


def checkpoint(folder: Path, content: Tensors, config: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint of these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", dict(content))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


def save(folder: Path, tensors: Tensors) -> Model:
    """A directory with these tensors, as a member of a merge."""
    directory = ModelDirectory(checkpoint(folder, tensors, {"model_type": "none"}))
    return Model(directory, directory)


def merge_on_disk(
    name: str, base: Model | None, models: Sequence[Model], out: Path, *, scale: float = 1.0, seed: int = 0, weights: Sequence[float] | None = None,
    device: str = "cpu", **options: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What the engine writes, read again."""
    out.mkdir(parents=True)
    like = models[0].directory
    shares = [1.0] * len(models) if weights is None else list(weights)
    items = [
        Item(n, like.info(n).dtype, like.info(n).shape, [(m, n) for m in models], (base, n) if base else None, shares, scale, options) for n in like
    ]
    write_merged(items, dict.fromkeys(like, "model.safetensors"), method_of(name), seed, out, lambda done: None, device)
    return read_safetensors(out / "model.safetensors")


def random(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


