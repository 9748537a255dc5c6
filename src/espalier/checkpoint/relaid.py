"""A model seen in another layout: tensors that are made of runs of entries of the stored ones, such as one expert's matrix
of a tensor that fuses all experts, or that tensor of all their matrices. Nothing is copied; what is read is read from the
files where it lies.
"""

from __future__ import annotations

import bisect
import itertools
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.safetensors_file import DTYPES, MOST_DIMENSIONS, Pages, TensorInfo, torch_dtype
from espalier.errors import EspalierError

if TYPE_CHECKING:
    import torch


ZEROS = ""
GROWN = " (grown)"
"""Behind the name of a stored tensor: the same with further rows, which are zero."""


@dataclass(frozen=True)
class Source:
    """What a tensor is made of: entries ``start`` to ``stop`` of stored tensors, one run after the other.

    A run of :data:`ZEROS` is of zeros; no manifest may ask for one.
    """

    shape: tuple[int, ...]
    runs: tuple[tuple[str, int, int], ...]

    def as_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "runs": [list(run) for run in self.runs]}

    @classmethod
    def from_json(cls, entry: Any) -> Source:
        """Read it from a manifest; whether it fits a model is checked by :class:`Relaid`.

        Raises:
            EspalierError: when it is malformed.
        """
        shape, runs = (entry.get("shape"), entry.get("runs")) if isinstance(entry, dict) else (None, None)

        def are(values: Any, *kinds: type) -> bool:
            return isinstance(values, list) and len(values) == len(kinds) and all(type(v) is k for v, k in zip(values, kinds, strict=True))

        shaped = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS and are(shape, *[int] * len(shape))
        if shape is None or not shaped or not isinstance(runs, list) or not all(are(run, str, int, int) and run[0] != ZEROS for run in runs):
            raise EspalierError(f"it is {reprlib.repr(entry)}; it must have a shape and runs of [tensor, first entry, entry after the last]")
        return cls(tuple(shape), tuple((name, start, stop) for name, start, stop in runs))


class Relaid(ModelDirectory):
    """A model directory that has, beside its own tensors, some in another layout.

    Args:
        directory: the model.
        sources: what each further tensor is made of; its dtype is that of its runs.

    Raises:
        EspalierError: when one has the name of a stored tensor, or does not fit the tensors that it is made of.
    """

    def __init__(self, directory: ModelDirectory, sources: Mapping[str, Source]) -> None:
        self.__dict__.update(vars(directory))
        self.stored, self.sources = directory, dict(sources)
        self._infos: dict[str, TensorInfo] = {}
        self._ends: dict[str, list[int]] = {}
        for name, source in sources.items():
            self._infos[name] = self._check(name, source)
            item = DTYPES[self._infos[name].dtype][1]
            self._ends[name] = list(itertools.accumulate(((stop - start) * item for _, start, stop in source.runs), initial=0))
        self.file_of = {**directory.file_of, **{name: directory.file_of[source.runs[0][0]] for name, source in sources.items()}}

    def _check(self, name: str, source: Source) -> TensorInfo:
        if name in self.stored:
            raise EspalierError(f"{self.path} has the tensor {name!r} itself; it cannot be made of others")
        stored = [run for run in source.runs if run[0] != ZEROS]
        parts = [self.stored.info(part) for part, _, _ in stored]
        if len({part.dtype for part in parts}) != 1:
            raise EspalierError(f"{name!r} is made of tensors of {len({part.dtype for part in parts})} dtypes; it must be one")
        for part, (_, start, stop) in zip(parts, stored, strict=True):
            if not 0 <= start < stop <= math.prod(part.shape):
                raise EspalierError(f"{name!r} is made of entries {start} to {stop} of {part.name!r}, which has {math.prod(part.shape)}")
        count = sum(stop - start for _, start, stop in source.runs)
        if min(source.shape, default=1) < 1 or math.prod(source.shape) != count:
            raise EspalierError(f"{name!r} of shape {source.shape} is made of {count} entries")
        return TensorInfo(name, parts[0].dtype, source.shape, 0, count * DTYPES[parts[0].dtype][1])

    def info(self, name: str) -> TensorInfo:
        return self._infos[name] if name in self._infos else self.stored.info(name)

    def pages(self, name: str) -> Pages | None:
        return None if name in self.sources else self.stored.pages(name)

    def read_into(self, buffer: memoryview, name: str, offset: int) -> None:
        if name not in self.sources:
            self.stored.read_into(buffer, name, offset)
            return
        item, ends, runs = DTYPES[self._infos[name].dtype][1], self._ends[name], self.sources[name].runs
        number, done = bisect.bisect_right(ends, offset) - 1, 0
        while done < len(buffer):
            part, start, _ = runs[number]
            inside = offset + done - ends[number]
            piece = buffer[done : done + ends[number + 1] - ends[number] - inside]
            if part == ZEROS:
                piece[:] = bytes(len(piece))
            else:
                self.stored.read_into(piece, part, start * item + inside)
            number, done = number + 1, done + len(piece)

    def read(self, name: str) -> torch.Tensor:
        import torch

        info = self.info(name)
        flat = torch.empty(info.nbytes, dtype=torch.uint8)
        self.read_into(flat.numpy().data, name, 0)
        return flat.view(torch_dtype(info.dtype)).reshape(info.shape)

    def fingerprint(self) -> str:
        return self.stored.fingerprint()
