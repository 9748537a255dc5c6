"""What a new model is made of: its tensors, what each is read from, the updates on it, and the file that it goes into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from espalier.anatomy.layout import is_transposed, locate
from espalier.checkpoint.directory import SINGLE, ModelDirectory
from espalier.checkpoint.relaid import GROWN, ZEROS, Relaid, Source
from espalier.checkpoint.safetensors_file import DTYPES, torch_dtype
from espalier.delta.gather import gathered
from espalier.delta.store import Delta, Layout, relaid
from espalier.errors import EspalierError


@dataclass
class Output:
    """One tensor of the new model.

    ``source`` is the base's tensor, or ``None`` where an update sets it as a whole; ``steps`` are the updates' owners
    (position of the delta, parameter), innermost first; the tensor is the rows from ``row`` on of ``expert``'s
    matrix (``None``: of the whole parameter).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None
    steps: list[tuple[int, str]] = field(default_factory=list)
    layout: Layout = field(default_factory=Layout)
    expert: int | None = None
    row: int = 0
    others: tuple[str, ...] = ()
    """The tensors that it shares a matrix with, in the order of their rows, itself among them."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


def seen_by(directory: ModelDirectory, deltas: Sequence[Delta]) -> tuple[ModelDirectory, list[Delta]]:
    """A base as deltas see it, and the deltas as they fit it.

    The base has, beside its own tensors, those that a delta has of it in another layout; updates of single experts are
    one update of the fused tensor where it has that.

    Raises:
        EspalierError: when a delta does not fit the base, or two lay a tensor out differently.
    """
    sources: dict[str, Source] = {}
    for delta in deltas:
        for name, source in {**relaid(delta.manifest), **grown(directory, delta)}.items():
            if sources.setdefault(name, source) != source:
                raise EspalierError(f"two deltas make the tensor {name} of different tensors of the base")
    seen = Relaid(directory, sources) if sources else directory
    model_type = str(directory.config.get("model_type"))

    def logical(name: str) -> tuple[int, ...]:
        shape = seen.info(name).shape
        return (*shape[:-2], shape[-1], shape[-2]) if is_transposed(model_type, name) else shape

    shapes = {name: logical(name) for name in directory}
    fitting = []
    for delta in deltas:
        shapes.update({name: logical(name) for name in relaid(delta.manifest)})
        for name in delta.manifest.get("removed", []):
            shapes.pop(name, None)
        shapes.update({name: delta.updates[name].shape for name, layout in delta.layouts.items() if layout.dtype})
        updates = gathered(delta.updates, shapes)
        layouts = {n: delta.layouts.get(n) or Layout((n,), transposed=is_transposed(model_type, n)) for n in updates}
        fitting.append(replace(delta, updates=updates, layouts=layouts))
    return seen, fitting


def grown(directory: ModelDirectory, delta: Delta) -> dict[str, Source]:
    """The tensors of a base with the further rows, all zero, that a delta with new tokens stands on; by their names with GROWN.

    Raises:
        EspalierError: when a delta has fewer new rows than it wants the vocabulary to grow by.
    """
    rows, found = delta.manifest.get("vocabulary"), {}
    for name, layout in delta.layouts.items() if rows is not None else ():
        shape = tuple(delta.updates[name].shape)
        if layout.dtype or len(shape) != 2 or shape[0] != rows:
            continue
        for part in (part for piece in locate(name, layout.names, None, directory) for part in piece.names):
            before = directory.info(part).shape
            if len(before) != 2 or before[1] != shape[1] or before[0] >= rows:
                continue
            if rows - before[0] > len(delta.manifest.get("added_tokens", [])):
                raise EspalierError(f"the delta makes the vocabulary of {part} {rows} tokens, from {before[0]}; it adds {len(delta.manifest.get('added_tokens', []))}")
            found[part + GROWN] = Source(shape, ((part, 0, math.prod(before)), (ZEROS, 0, (rows - before[0]) * shape[1])))
    return found


def outputs(directory: ModelDirectory, deltas: Sequence[Delta], dtype: str | None = None) -> dict[str, Output]:
    """The tensors of the model that ``directory`` becomes under ``deltas`` (see :func:`seen_by`), in the base's order.

    Args:
        dtype: stores every floating point tensor so (a name of safetensors); default: as the base, or as a delta says.

    Raises:
        EspalierError: when a delta does not fit the base, or two parameters of a delta are one tensor of it.
    """
    stored = directory.stored if isinstance(directory, Relaid) else directory
    found = {n: Output(n, stored.info(n).dtype, stored.info(n).shape, n) for n in stored}
    gone: set[str] = set()
    for position, delta in enumerate(deltas):
        taken: dict[str, str] = {}
        for name, source in relaid(delta.manifest).items():
            if name in found:  # a delta before laid it out so
                continue
            for part, _, _ in source.runs:
                if part not in found or found[part].steps or found[part].source != part:
                    raise EspalierError(f"the deltas hold the tensor {part} in different layouts ({name!r}); apply them one after the other")
            found[name] = Output(name, directory.info(name).dtype, directory.info(name).shape, name)
        for name in delta.manifest.get("removed", []):
            if found.pop(name, None) is None and name not in gone:
                raise EspalierError(f"the delta removes {name!r}, which the base does not have")
            gone.add(name)
        for name, layout in delta.layouts.items():
            shape = tuple(delta.updates[name].shape)
            if layout.dtype:  # set as a whole
                found[name] = Output(name, layout.dtype, shape, None, [(position, name)], layout)
                continue
            experts = shape[0] if len(shape) == 3 else None
            for piece in locate(name, layout.names, experts, found):
                for part in piece.names:
                    if part + GROWN in directory and found[part].source == part:
                        found[part] = Output(part, found[part].dtype, directory.info(part + GROWN).shape, part + GROWN)
                matrix = shape if piece.expert is None else shape[1:]
                _check_shape(name, matrix, layout, [found[part].shape for part in piece.names], piece.expert is None)
                row = 0
                for part in piece.names:
                    if part in taken:
                        raise EspalierError(f"the delta updates {taken[part]!r} and {name!r}, which are one tensor of the base: {part}")
                    taken[part] = name
                    own = layout if piece.expert is None else replace(layout, transposed=False)
                    before = found[part]
                    if before.steps and (before.expert, before.row, before.layout.transposed) != (piece.expert, row, own.transposed):
                        raise EspalierError(f"the deltas hold the tensor {part} in different layouts ({name!r})")
                    dtype_of = before.dtype
                    found[part] = Output(
                        part, dtype_of, before.shape, before.source, [*before.steps, (position, name)], own, piece.expert, row, piece.names
                    )
                    row += before.shape[0] if before.shape else 0
    if dtype is not None:
        for output in found.values():
            if torch_dtype(output.dtype).is_floating_point:
                output.dtype = dtype
    return found


def _check_shape(name: str, shape: tuple[int, ...], layout: Layout, parts: list[tuple[int, ...]], whole: bool) -> None:
    stored = parts[0] if len(parts) == 1 else (sum(p[0] for p in parts), *parts[0][1:])
    logical = (*stored[:-2], stored[-1], stored[-2]) if whole and layout.transposed and len(stored) > 1 else stored
    if logical != shape:
        raise EspalierError(f"{name}: the update is for shape {shape}, the base has {logical}")


class Stored(Protocol):
    """What takes room in a file."""

    @property
    def nbytes(self) -> int: ...


def cut(made: Mapping[str, Stored], directory: ModelDirectory, shard_bytes: int | None = None) -> dict[str, str]:
    """Which file each tensor goes into: the base's cut, or files of at most ``shard_bytes`` (but for larger tensors)."""
    if shard_bytes is None:
        last = directory.files()[-1]
        return {name: directory.file_of.get(name, last) for name in made}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, output in made.items():
        if filled + output.nbytes > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += output.nbytes
    if len(shards) == 1:
        return dict.fromkeys(made, SINGLE)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return {name: file for file, names in zip(files, shards, strict=True) for name in names}


