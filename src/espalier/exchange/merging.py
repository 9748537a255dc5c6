"""Several models into one, parameter by parameter in slices: no model is in memory, however many there are.

In memory is a slice of every model for each thread, unless a method asks for whole parameters. A delta whose form has no
rows of its own (a layer that stores its matrix transposed, forms whose rows depend on one another) is worked out for one
whole parameter at a time.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from espalier.checkpoint.directory import INDEX, SINGLE, ModelDirectory, read_json
from espalier.checkpoint.relaid import Relaid
from espalier.checkpoint.safetensors_file import DTYPES, SafetensorsWriter, tensor_bytes, torch_dtype
from espalier.checkpoint.stream import one_thread_each
from espalier.delta.merging import Combine, Parameter, Whole, is_finite
from espalier.delta.store import FILES, Delta
from espalier.errors import EspalierError
from espalier.exchange import materialize
from espalier.exchange.composition import Output, outputs, seen_by
from espalier.exchange.difference import source_of
from espalier.registry import MethodInfo

Rows = Callable[[int, int], torch.Tensor]
"""From a range of rows to these rows of one model's parameter, (rows, columns), in any dtype."""


class Model:
    """A model on disk, one of those that are merged.

    Args:
        directory: the model.
        like: the model whose names and layout the merged one has.
    """

    def __init__(self, directory: ModelDirectory, like: ModelDirectory) -> None:
        model_type = str(like.config.get("model_type"))
        sources = {n: s for n in like if n not in directory and (s := source_of(directory, like, n, model_type))}
        self.path = directory.path
        self.directory = Relaid(directory, sources) if sources else directory
        used = {part for source in sources.values() for part, _, _ in source.runs}
        self.extra = sorted(n for n in directory if n not in like and n not in used)
        """Tensors that ``like`` has in no layout."""
        self.names = [n for n in like if n in self.directory] + self.extra
        self.config = directory.config

    def __contains__(self, name: object) -> bool:
        return name in self.directory

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as it is stored."""
        return self.directory.info(name).shape

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as it is stored, a name of safetensors."""
        return self.directory.info(name).dtype

    def file(self, name: str) -> Path:
        """A file beside the weights, which may not exist."""
        return self.path / name

    def rows(self, name: str) -> Rows:
        """The rows of a tensor, read when they are asked for; each call may overwrite what the one before gave."""
        info = self.directory.info(name)
        dtype, columns = torch_dtype(info.dtype), info.shape[-1] if info.shape else 1
        size, held = columns * DTYPES[info.dtype][1], torch.empty(0, dtype=torch.uint8)
        if pages := self.directory.pages(name):
            return lambda start, stop: pages(start * size, stop * size).view(dtype).view(stop - start, columns)

        def read(start: int, stop: int) -> torch.Tensor:
            nonlocal held
            if len(held) < (stop - start) * size:
                held = torch.empty((stop - start) * size, dtype=torch.uint8)
            taken = held[: (stop - start) * size]
            self.directory.read_into(taken.numpy().data, name, start * size)
            return taken.view(dtype).view(stop - start, columns)

        return read


class Changed:
    """The model that a base becomes under a delta, one of those that are merged; it is never written.

    Args:
        base: the base.
        delta: the delta.
        path: where the delta is.
    """

    def __init__(self, base: ModelDirectory, delta: Delta, path: Path) -> None:
        self.path = path
        self.directory, deltas = seen_by(base, [delta])
        self._updates = materialize.Scaled(deltas, 1.0)
        self._outputs = outputs(self.directory, deltas, "F32")
        self._stored = Model(base, base)
        self.extra = sorted(n for n in self._outputs if n not in base)
        """Tensors that the base does not have."""
        self.names = list(self._outputs)
        self._files, self._base = delta.manifest.get("files", {}), base.path
        self.config = read_json(self.file("config.json"))

    def __contains__(self, name: object) -> bool:
        return name in self._outputs

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as it is stored."""
        return self._outputs[name].shape

    def dtype(self, name: str) -> str:
        """The dtype in which a tensor is given, a name of safetensors."""
        return self._outputs[name].dtype

    def file(self, name: str) -> Path:
        """A file beside the weights, which may not exist: the delta's own, or the base's."""
        return (self.path / FILES if name in self._files else self._base) / name

    def rows(self, name: str) -> Rows:
        """The rows of a tensor, worked out when they are asked for, in float32."""
        output = self._outputs[name]
        if not output.steps:
            return self._stored.rows(name)
        steps = [self._updates(*step, output.expert) for step in output.steps]
        if output.source is None or len(output.shape) != 2 or not materialize.by_rows(output.layout, steps):
            return self._whole(output)
        read = self._stored.rows(output.source)

        def updated(start: int, stop: int) -> torch.Tensor:
            rows = read(start, stop).float()
            for step in steps:
                rows = materialize.rows(step, output.row + start, output.row + stop).apply(rows)
            return rows

        return updated

    def _whole(self, output: Output) -> Rows:
        found = torch.empty(0)

        def rows(start: int, stop: int) -> torch.Tensor:
            nonlocal found
            if not len(found):
                job = [self._outputs[n] for n in output.others] if len(output.others) > 1 else [output]
                found = materialize.contents(self.directory, job, self._updates)[output.name]
                found = found.view(-1, output.shape[-1] if output.shape else 1)
            return found[start:stop]

        return rows


Places = torch.Tensor
"""For each row of the merged model the row of a model that is about the same token, or -1: (rows,), int64."""


class Aligned:
    """One tensor of a model whose rows are tokens, its rows where the merged model has these tokens.

    Args:
        places: where the model has them.
        shape: of the merged tensor.
        others: (model, tensor, places), for a token that the model does not have: its row is that of the first of
            these, the base, where that has it, else the mean of all others that do (zero where none does).
    """

    def __init__(
        self, member: Model | Changed, tensor: str, places: Places, shape: tuple[int, ...], others: Sequence[tuple[Model | Changed, str, Places]]
    ) -> None:
        self.path, self._member, self._tensor, self._places, self._shape, self._others = member.path, member, tensor, places, shape, others

    def __contains__(self, name: object) -> bool:
        return name == self._tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape after the alignment."""
        return self._shape

    def dtype(self, name: str) -> str:
        """The dtype of the tensor as it is stored."""
        return self._member.dtype(name)

    def rows(self, name: str) -> Rows:
        """The rows of the tensor, in float32."""
        if len(self._shape) > 1:
            read, others = self._member.rows(name), [(member.rows(tensor), places) for member, tensor, places in self._others]
            return lambda start, stop: self._gathered(read, others, start, stop, self._shape[-1])
        vector = _by_entries(self._member, name)
        others = [(_by_entries(member, tensor), places) for member, tensor, places in self._others]
        return lambda start, stop: self._gathered(vector, others, 0, self._shape[0], 1).view(1, -1)

    def _gathered(self, read: Rows, others: Sequence[tuple[Rows, Places]], start: int, stop: int, columns: int) -> torch.Tensor:
        made = torch.zeros(stop - start, columns)
        places = self._places[start:stop]
        steps = ((places[1:] - places[:-1] != 1) | (places[1:] < 0)).nonzero().flatten() + 1
        for first, last in itertools.pairwise([0, *steps.tolist(), stop - start]):
            if (place := int(places[first])) >= 0:
                made[first:last] = read(place, place + last - first)
                continue
            have = [(other, where) for other, found in others if (where := int(found[start + first])) >= 0]
            if have and int(others[0][1][start + first]) >= 0:
                have = have[:1]
            for other, where in have:
                made[first] += other(where, where + 1)[0].float() / len(have)
        return made


def _by_entries(member: Model | Changed, name: str) -> Rows:
    """The entries of a vector, as rows."""
    whole = member.rows(name)
    return lambda start, stop: whole(0, 1).view(-1, 1)[start:stop]


Member = Model | Changed | Aligned


class _Parameter(Parameter):
    def __init__(self, base: Rows | None, models: Sequence[Rows], paths: Sequence[Path], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._base, self._models, self._paths = base, models, paths

    def stored(self, model: int | None, start: int, stop: int) -> torch.Tensor:
        source = self._base if model is None else self._models[model]
        assert source is not None
        return source(start, stop)

    def refuse(self, model: int | None, rows: torch.Tensor) -> NoReturn:
        path = self._paths[-1 if model is None else model]
        raise EspalierError(f"{path} has {float(rows[~rows.isfinite()][0])} in it; a model must be finite to be merged")


@dataclass
class Item:
    """How one tensor of the new model is merged.

    Args:
        sources: (model, its tensor), for every model that has a part in it.
        base: the base's tensor that changes are taken from, or ``None``.
        weights: one of each source.
        options: of the method.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: list[tuple[Member, str]]
    base: tuple[Member, str] | None
    weights: list[float]
    scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]

    @property
    def is_merged(self) -> bool:
        """Whether it is computed; integers, booleans and tensors without numbers are copied from the first source."""
        return torch_dtype(self.dtype).is_floating_point and math.prod(self.shape) > 0

    def parameter(self, seed: int, survey: Any = None, device: torch.device | str = "cpu") -> Parameter:
        """Its numbers in every model.

        Raises:
            EspalierError: when a model has it in another shape.
        """
        for member, name in (*self.sources, *([self.base] if self.base else [])):
            if member.shape(name) != self.shape:
                raise EspalierError(f"it is {member.shape(name)} in {member.path}; the merged model has {self.shape}")
        base = self.base[0].rows(self.base[1]) if self.base else None
        models = [member.rows(name) for member, name in self.sources]
        paths = [member.path for member, _ in (*self.sources, *([self.base] if self.base else []))]
        return _Parameter(base, models, paths, self.name, self.shape, self.weights, self.scale, base is not None, seed, survey, device)


@dataclass(frozen=True)
class Method:
    """A merge method: from a parameter and options to what combines its pieces, and its first pass if it has one."""

    function: Callable[..., Combine | torch.Tensor]
    first_pass: Callable[..., Any] | None = None

    @classmethod
    def of(cls, info: MethodInfo, function: Callable[..., Any]) -> Method:
        """A registered method, with the first pass that its declaration names."""
        named = info.settings.get("first_pass")
        return cls(function, getattr(sys.modules[function.__module__], named) if named else None)


Sink = Callable[[Item, torch.Tensor, int], None]
"""Takes numbers of a tensor of the new model, in its dtype, from a place on (counted in numbers); called from many threads."""


def write_merged(
    items: Sequence[Item], files: Mapping[str, str], method: Method, seed: int, out: Path, progress: Callable[[int], Any],
    device: torch.device | str = "cpu",
) -> None:  # fmt: skip
    """Write the merged weights into ``out``, each tensor into the file that ``files`` says, and the index.

    Args:
        progress: called with the bytes written so far.
        device: where the arithmetic is done.

    Raises:
        EspalierError: naming the tensor, where a model does not fit or a merged value is not finite.
    """
    writers = {
        file: SafetensorsWriter(out / file, {i.name: (i.dtype, i.shape) for i in items if files[i.name] == file})
        for file in sorted(set(files.values()))
    }

    def write(item: Item, numbers: torch.Tensor, start: int) -> None:
        writers[files[item.name]].write_bytes(item.name, tensor_bytes(numbers), start * DTYPES[item.dtype][1])

    merge_into(write, items, method, seed, progress, device=device)
    for writer in writers.values():
        writer.close()
        writer.require_complete()
    if len(writers) > 1 or SINGLE not in writers:
        index = {"metadata": {"total_size": sum(i.nbytes for i in items)}, "weight_map": dict(files)}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def merge_into(
    sink: Sink, items: Sequence[Item], method: Method, seed: int, progress: Callable[[int], Any], wanted: Container[str] | None = None,
    device: torch.device | str = "cpu",
) -> None:  # fmt: skip
    """Merge every tensor (of those called ``wanted``, if given) and give the numbers to ``sink``, in slices.

    Args:
        progress: called with the bytes merged so far.

    Raises:
        EspalierError: naming the tensor, where a model does not fit or a merged value is not finite.
    """
    done = 0

    def work(item: Item) -> int:
        try:
            if not item.is_merged:
                member, name = item.sources[0]
                sink(item, member.rows(name)(0, math.prod(item.shape[:-1])).to(torch_dtype(item.dtype)), 0)
                return item.nbytes
            parameter = item.parameter(seed, survey, device)
            made = method.function(parameter, **item.options)
            if isinstance(made, torch.Tensor):
                _give(item, made, 0)
                return item.nbytes
            for piece in parameter.pieces():
                _give(item, made(piece).to(torch.float32), piece.start)
        except EspalierError as error:
            raise EspalierError(f"{item.name}: {error}") from error
        return item.nbytes

    def _give(item: Item, numbers: torch.Tensor, start: int) -> None:
        made = numbers.to(torch_dtype(item.dtype))
        if not is_finite(made):
            value = float(made[~made.isfinite()][0])
            raise EspalierError(f"a merged value is {value} in {item.dtype}; are the models finite, and the weights right?")
        sink(item, made, start)

    survey = None
    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        merged = [item for item in items if item.is_merged]
        if method.first_pass is not None and merged:
            for item in merged:
                if item.options != merged[0].options:
                    raise EspalierError(
                        f"{item.name} has the options {dict(item.options)} and {merged[0].name} has {dict(merged[0].options)}; "
                        "this method looks at the whole model first, so its options must be the same everywhere"
                    )

            def each(do: Callable[[Parameter], Any]) -> Iterable[Any]:
                def one(item: Item) -> Any:
                    try:
                        return do(item.parameter(seed, device=device))
                    except EspalierError as error:
                        raise EspalierError(f"{item.name}: {error}") from error

                return pool.map(one, merged)

            survey = method.first_pass(Whole([item.parameter(seed, device=device) for item in merged], each), **merged[0].options)
        chosen = [item for item in items if wanted is None or item.name in wanted]
        for nbytes in pool.map(work, sorted(chosen, key=lambda item: -item.nbytes)):
            progress(done := done + nbytes)
