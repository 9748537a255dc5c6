"""The weights of a base under deltas, written at the speed of the disk; imports neither transformers nor peft.

Tensors are worked on side by side, each in slices of rows: read, updated in float32 (float64 for float64), rounded
once, written at their place; what no update touches is copied. So a slice per thread is in memory, whatever the
model's size. Whole matrices are in memory for a layer that stores its matrix transposed (Conv1D) and for forms
whose rows depend on one another (``slice_rows`` gives ``None``): about 14 bytes a number, per thread.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from espalier.checkpoint.directory import INDEX, SINGLE, ModelDirectory
from espalier.checkpoint.safetensors_file import (
    DTYPES,
    SafetensorsWriter,
    TensorInfo,
    tensor_bytes,
    torch_dtype,
)
from espalier.checkpoint.stream import Hashes, one_thread_each, slices
from espalier.delta.forms import Blocks, Replace, Update, working_dtype
from espalier.delta.forms.update import is_one
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError
from espalier.exchange.composition import Output, cut


class Scaled:
    """The updates of deltas, each scaled, made when they are asked for."""

    def __init__(self, deltas: Sequence[Delta], scale: float) -> None:
        self.deltas, self.scale = deltas, scale
        self.experts = functools.lru_cache(maxsize=8)(lambda position, name: deltas[position].updates[name].unbind())

    def __call__(self, position: int, name: str, expert: int | None) -> Update:
        update = self.deltas[position].updates[name] if expert is None else self.experts(position, name)[expert]
        return update if self.scale == 1.0 else update.scaled(self.scale)


class Rounding:
    """What storing a tensor in its dtype did to the updated values, gathered over slices."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, str(dtype).removeprefix("torch.")
        self.worst = self.error = self.moved = 0.0

    def add(self, before: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        if not exact.is_floating_point() or exact.numel() == 0:
            return
        error = torch.sub(rounded, exact)
        self.error = math.hypot(self.error, float(torch.linalg.vector_norm(error)))
        self.moved = math.hypot(self.moved, float(torch.linalg.vector_norm(exact - before)))
        low, high = map(float, torch.aminmax(error.div_(exact)))
        if math.isnan(low):  # where nothing is stored as nothing
            low, high = map(float, torch.aminmax(error.nan_to_num_(0.0)))
        self.worst = max(self.worst, -low, high)

    def facts(self) -> dict[str, Any]:
        lost = self.error / self.moved if self.moved > 0 else 0.0
        return {"name": self.name, "dtype": self.dtype, "rounding": self.worst, "lost": lost}


def _is_exact(update: Update, dtype: torch.dtype) -> bool:
    """Whether the update only sets values of this dtype, so that nothing is computed."""
    return update.exact_at_one and is_one(update.gain) and update.dtype == dtype


def _only_sets(update: Update) -> bool:
    """Whether the update replaces values, and leaves the others as they are."""
    parts = list(update.parts.values()) if isinstance(update, Blocks) else [update]
    return is_one(update.gain) and all(isinstance(part, Replace) and is_one(part.gain) for part in parts)


def _updated(weight: torch.Tensor, updates: Sequence[Update], dtype: torch.dtype, rounding: Rounding) -> torch.Tensor:
    """The weight under its updates, rounded once to ``dtype``; without arithmetic where values are only set.

    Raises:
        EspalierError: when arithmetic or rounding makes a value that is not finite; one that is set may be any.
    """
    current = given = weight
    computes = False
    for update in updates:
        if not _is_exact(update, current.dtype):
            current = current.to(working_dtype(current))
        current = update.apply(current)
        computes = computes or not _only_sets(update)
        given = given if computes else current
    rounded = current.to(dtype)
    if computes or current.dtype != dtype:
        _require_finite(given, rounded)
    if current.dtype != dtype:
        rounding.add(weight.to(current.dtype), current, rounded)
    return rounded


def _require_finite(before: torch.Tensor, after: torch.Tensor) -> None:
    """Refuse values that are not finite where those before were; both extremes are NaN where anything is."""
    if not after.is_floating_point() or not after.numel():
        return
    values = after if after.element_size() > 1 else after.float()
    if all(math.isfinite(extreme) for extreme in torch.aminmax(values)):
        return
    wide = before.to(working_dtype(before))
    made = ~values.isfinite() & wide.isfinite()
    if bool(made.any()):
        was, is_ = float(wide[made][0]), float(values[made][0])
        largest = torch.finfo(after.dtype).max
        raise EspalierError(f"a value would become {is_}, from {was:.6g}; it must be finite, which in {str(after.dtype)[6:]} is at most {largest:.4g}")


def write_model(
    directory: ModelDirectory,
    made: Mapping[str, Output],
    deltas: Sequence[Delta],
    scale: float,
    out: Path,
    progress: Callable[[int], Any],
    *,
    shard_bytes: int | None = None,
    hashes: Hashes | None = None,
) -> dict[str, dict[str, Any]]:
    """Write the updated model's weights into ``out``.

    Args:
        made: its tensors, the :func:`~espalier.exchange.composition.outputs` of ``directory`` under ``deltas``.
        progress: called with the bytes written so far.
        shard_bytes: see :func:`cut`.
        hashes: gathers the SHA-256 of every tensor of the base on the way.

    Returns:
        What rounding did, by parameter (the worst expert's for fused ones).

    Raises:
        EspalierError: when a delta does not fit the base, or a value becomes one that is not finite, but for those that it sets.
    """
    files = cut(made, directory, shard_bytes)
    updates = Scaled(deltas, scale)
    if scale != 1.0 and (whole := next((o for o in made.values() if o.source is None), None)):
        raise EspalierError(f"the delta sets {whole.name!r} as a whole, which cannot be scaled by {scale}; apply it with scale 1")
    writers: dict[str, SafetensorsWriter] = {}
    for file in sorted(set(files.values())):
        layout = {n: (made[n].dtype, made[n].shape) for n in made if files[n] == file}
        kept = directory.file(file).metadata if file in directory.files() else directory.file(directory.files()[0]).metadata
        writers[file] = SafetensorsWriter(out / file, layout, {k: v for k, v in kept.items() if k != "format"})
    report: dict[str, Rounding] = {}
    done = 0

    def work(job: list[Output]) -> int:
        rounding = Rounding(job[0].steps[0][1] if job[0].steps else job[0].name, torch_dtype(job[0].dtype))
        try:
            for output, offset, content in _contents(directory, job, updates, rounding, hashes):
                writers[files[output.name]].write_bytes(output.name, content, offset)
        except EspalierError as error:
            raise EspalierError(f"{rounding.name}: {error}") from error
        if job[0].steps and (rounding.name not in report or rounding.facts()["lost"] > report[rounding.name].facts()["lost"]):
            report[rounding.name] = rounding
        return sum(output.nbytes for output in job)

    jobs = sorted(_jobs(made, updates), key=lambda job: -sum(output.nbytes for output in job))
    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        for nbytes in pool.map(work, jobs):
            progress(done := done + nbytes)
        if hashes is not None:
            list(pool.map(hashes.complete, [n for n in hashes.directory if n not in hashes]))
    for writer in writers.values():
        writer.close()
        writer.require_complete()
    if len(writers) > 1 or SINGLE not in writers:
        total = {"metadata": {"total_size": sum(o.nbytes for o in made.values())}, "weight_map": files}
        (out / INDEX).write_text(json.dumps(total, indent=2) + "\n", encoding="utf-8")
    return {name: rounding.facts() for name, rounding in report.items()}


def _jobs(made: Mapping[str, Output], updates: Scaled) -> Iterator[list[Output]]:
    """Tensors that have to be worked on together: one by one, but for those that share a matrix that cannot be sliced."""
    done: set[str] = set()
    for output in made.values():
        if output.name in done:
            continue
        together = [output]
        if len(output.others) > 1 and not by_rows(output.layout, [updates(*step, output.expert) for step in output.steps]):
            together = [made[name] for name in output.others]
        done.update(o.name for o in together)
        yield together


def _contents(
    directory: ModelDirectory, job: list[Output], updates: Scaled, rounding: Rounding, hashes: Hashes | None
) -> Iterator[tuple[Output, int, Any]]:
    """(output, offset, bytes) of everything that a job writes."""
    first, target = job[0], torch_dtype(job[0].dtype)
    if first.source is None:
        if len(first.steps) > 1:
            raise EspalierError("one delta sets it as a whole and another updates it; apply them one after the other")
        values = updates(*first.steps[0], None).tensors()["values"]
        if values.dtype != target:
            _require_finite(values, values.to(target))
        yield first, 0, tensor_bytes(values.to(target))
        return
    info = directory.info(first.source)
    if not first.steps and first.dtype == info.dtype:
        yield from ((first, start, piece) for start, piece in slices(directory, first.source, hashes=hashes))
        return
    steps = [updates(*step, first.expert) for step in first.steps]
    if len(job) > 1:
        yield from _joined(directory, job, steps, rounding, hashes)
        return
    item, wider = DTYPES[info.dtype][1], DTYPES[first.dtype][1]
    for offset, shape, own in _matrices(info, steps):
        whole = not shape or not by_rows(first.layout, own)
        nbytes = math.prod(shape) * item
        unit = nbytes if whole else nbytes // max(shape[0], 1)
        for start, piece in slices(directory, first.source, unit, offset, offset + nbytes, hashes):
            stored = torch.frombuffer(piece, dtype=torch_dtype(info.dtype))
            if whole:
                weight = stored.reshape(shape).mT if first.layout.transposed else stored.reshape(shape)
                new = _updated(weight, own, target, rounding)
                new = new.mT if first.layout.transposed else new
            else:
                weight = stored.reshape(-1, *shape[1:])
                row = first.row + (start - offset) // unit
                new = _updated(weight, [rows(step, row, row + len(weight)) for step in own], target, rounding)
            yield first, start // item * wider, tensor_bytes(new)


def contents(directory: ModelDirectory, job: list[Output], updates: Scaled) -> dict[str, torch.Tensor]:
    """The updated tensors of a job, whole, in the dtypes of their outputs."""
    whole = {output.name: torch.empty(output.nbytes, dtype=torch.uint8) for output in job}
    for output, offset, content in _contents(directory, job, updates, Rounding(job[0].name, torch_dtype(job[0].dtype)), None):
        view = memoryview(content).cast("B")
        whole[output.name].numpy()[offset : offset + len(view)] = view
    return {output.name: whole[output.name].view(torch_dtype(output.dtype)).view(output.shape) for output in job}


def _matrices(info: TensorInfo, steps: list[Update]) -> Iterator[tuple[int, tuple[int, ...], list[Update]]]:
    """(first byte, shape, updates) of what a tensor is made of: itself, or a matrix for each fused expert."""
    if len(info.shape) != 3 or not steps or not info.nbytes:
        yield 0, info.shape, steps
        return
    experts = [step.unbind() for step in steps]
    for expert in range(info.shape[0]):
        yield info.nbytes // info.shape[0] * expert, info.shape[1:], [step[expert] for step in experts]


def by_rows(layout: Layout, steps: Sequence[Update]) -> bool:
    """Whether a matrix can be updated in slices of its stored rows."""
    return not (layout.transposed and steps) and all(step.slice_rows(0, 0) is not None for step in steps)


def rows(update: Update, start: int, stop: int) -> Update:
    """The update of some rows, of an update that :func:`by_rows` says has rows of its own."""
    sliced = update.slice_rows(start, stop)
    assert sliced is not None
    return sliced


def _joined(
    directory: ModelDirectory, job: list[Output], steps: Sequence[Update], rounding: Rounding, hashes: Hashes | None
) -> Iterator[tuple[Output, int, Any]]:
    """The contents of tensors that together are one matrix, by its rows, when it is needed as a whole."""
    parts = []
    for output in job:
        parts.append(directory.read(str(output.source)))
        if hashes is not None and output.source in hashes.directory:
            hashes.of(str(output.source)).update(tensor_bytes(parts[-1]))
    new = _updated(torch.cat(parts), steps, torch_dtype(job[0].dtype), rounding)
    for output, part in zip(job, new.split([len(p) for p in parts]), strict=True):
        yield output, 0, tensor_bytes(part)
