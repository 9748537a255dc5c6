"""Several models into one, parameter by parameter in slices: reads maps of their files, keeps no model in memory.

What a method may need of memory is said by the method: a slice of each model and thread, unless it asks for the whole
parameter. A delta whose form has no rows of its own (a layer that stores its matrix transposed, forms whose rows depend
on one another) is worked out for one whole parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.layout import locate
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.safetensors_file import DTYPES, SafetensorsWriter, tensor_bytes, torch_dtype
from espalier.checkpoint.stream import one_thread_each
from espalier.delta.merging import Combine, Parameter, Piece, Whole
from espalier.errors import EspalierError

Source = Callable[[int, int], torch.Tensor]
"""From a range of rows to these rows of one model, (rows, columns), in any dtype."""


class Rows:
    """The rows of one parameter, from tensors that hold them one after the other (experts, gate and up)."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self.parts = list(parts)

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        found, begin = [], 0
        for part in self.parts:
            low, high = max(start - begin, 0), min(stop - begin, len(part))
            if low < high:
                found.append(part[low:high])
            begin += len(part)
        return found[0] if len(found) == 1 else torch.cat(found)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as (rows, columns); a vector is one row."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)


class ModelSource:
    """The parameters of a model on disk, under the names and in the layout of another."""

    def __init__(self, directory: ModelDirectory, like: ModelDirectory) -> None:
        self.directory = directory
        self._fused: dict[str, tuple[str, int]] = {}
        for name in directory:
            shape = directory.info(name).shape
            if name in like or len(shape) != 3:
                continue
            try:
                pieces = locate(name, (), shape[0], like)
            except EspalierError:
                continue
            row = 0
            for piece in pieces:
                for part in piece.names:
                    self._fused[part] = (name, row)
                    row += like.info(part).shape[0]

    def __call__(self, name: str, shape: tuple[int, ...]) -> Source:
        if name in self._fused:
            fused, row = self._fused[name]
            view = as_rows(self._map(fused))[row : row + shape[0]]
            return Rows([view])
        pieces = locate(name, (), shape[0] if len(shape) == 3 else None, self.directory)
        if pieces[0].expert is None:
            found = self.directory.info(pieces[0].names[0]).shape
            if found != shape:
                raise EspalierError(f"{name} is {found} in {self.directory.path}; it must be {shape}")
            return Rows([as_rows(self._map(pieces[0].names[0]))])
        return Rows([self._map(part) for piece in pieces for part in piece.names])

    def _map(self, name: str) -> torch.Tensor:
        return self.directory.file(self.directory.file_of[name]).map(name)


class _Parameter(Parameter):
    def __init__(self, base: Source | None, models: Sequence[Source], *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._base, self._models = base, models

    def rows_of(self, start: int, stop: int) -> Piece:
        models = torch.empty(len(self._models), stop - start, self.columns)
        for row, source in zip(models, self._models, strict=True):
            row.copy_(source(start, stop))
        base = self._base(start, stop).float() if self._base else None
        return Piece(base, models, start * self.columns)


@dataclass
class Merge:
    """What is merged, and how.

    Args:
        like: the model whose names, dtypes and files the new one has: the base, or the first model.
        base: whose changes are merged; ``None`` for methods that merge the models themselves.
        method: from a parameter and its options to what combines its pieces.
        options: of one parameter, by its name.
        weights, scale: of one parameter, by its name.
    """

    like: ModelDirectory
    base: ModelDirectory | None
    models: Sequence[ModelSource]
    method: Callable[..., Combine | torch.Tensor]
    options: Callable[[str], Mapping[str, Any]]
    weights: Callable[[str], Sequence[float]]
    scale: Callable[[str], float]
    seed: int = 0
    first_pass: Callable[..., Any] | None = None
    dtype: str | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def parameter(self, name: str, survey: Any = None) -> Parameter:
        shape = self.like.info(name).shape
        base = ModelSource(self.base, self.like)(name, shape) if self.base else None
        sources = [model(name, shape) for model in self.models]
        return _Parameter(base, sources, name, shape, self.weights(name), self.scale(name), base is not None, self.seed, survey)


def write_merged(merge: Merge, files: Mapping[str, str], out: Path, progress: Callable[[int], Any]) -> None:
    """Write the merged weights into ``out``, into the files that ``files`` says by name.

    Raises:
        EspalierError: naming the tensor, where a model does not fit or a merged value is not finite.
    """
    like = merge.like
    stored = {n: merge.dtype if merge.dtype and torch_dtype(like.info(n).dtype).is_floating_point else like.info(n).dtype for n in like}
    writers = {
        file: SafetensorsWriter(out / file, {n: (stored[n], like.info(n).shape) for n in like if files[n] == file})
        for file in sorted(set(files.values()))
    }
    floating = [n for n in like if torch_dtype(like.info(n).dtype).is_floating_point and math.prod(like.info(n).shape)]
    done = 0

    def work(name: str, survey: Any) -> int:
        writer, info = writers[files[name]], like.info(name)
        if name not in merging:
            writer.write(name, like.read(name))
            return info.nbytes
        try:
            parameter = merge.parameter(name, survey)
            combine = merge.method(parameter, **merge.options(name))
            item, target = DTYPES[stored[name]][1], torch_dtype(stored[name])
            for piece in parameter.pieces():
                new = combine(piece)
                if not math.isfinite(float(new.abs().max())):
                    raise EspalierError("the merged tensor has values that are not finite")
                writer.write_bytes(name, tensor_bytes(new.to(target)), piece.start * item)
        except EspalierError as error:
            raise EspalierError(f"{name}: {error}") from error
        return math.prod(info.shape) * item

    merging = set(floating)
    order = sorted(like, key=lambda name: -like.info(name).nbytes)
    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        survey = None
        if merge.first_pass is not None:
            parameters = [merge.parameter(name) for name in floating]
            survey = merge.first_pass(Whole(parameters, lambda do: list(pool.map(do, parameters))), **merge.options(""))
        for nbytes in pool.map(lambda name: work(name, survey), order):
            progress(done := done + nbytes)
    for writer in writers.values():
        writer.close()
        writer.require_complete()
