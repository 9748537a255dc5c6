"""A base and deltas into a new model directory, at the speed of the disk; imports neither transformers nor peft.

Tensors are worked on side by side, each in slices of rows: read, updated in float32 (float64 for float64), rounded
once, written at their place; what no update touches is copied. So a slice per thread is in memory, whatever the
model's size. Whole matrices are in memory for a layer that stores its matrix transposed (Conv1D) and for forms
whose rows depend on one another (``slice_rows`` gives ``None``): about 14 bytes a number, per thread.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from espalier.anatomy.layout import locate
from espalier.checkpoint.atomic import require_free_space
from espalier.checkpoint.directory import INDEX, LINEAGE, SINGLE, ModelDirectory, read_json
from espalier.checkpoint.fingerprint import file_digest
from espalier.checkpoint.safetensors_file import (
    DTYPES,
    SafetensorsWriter,
    TensorInfo,
    tensor_bytes,
    torch_dtype,
)
from espalier.checkpoint.stream import Hashes, known_fingerprint, one_thread_each, slices
from espalier.delta.forms import Update, working_dtype
from espalier.delta.forms.update import is_one
from espalier.delta.store import FILES, MANIFEST, Delta, Layout, check_base
from espalier.display import Display
from espalier.errors import EspalierError

_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


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


def outputs(directory: ModelDirectory, deltas: Sequence[Delta], dtype: str | None = None) -> dict[str, Output]:
    """The tensors of the model that ``directory`` becomes under ``deltas``, in the base's order.

    Args:
        dtype: stores every floating point tensor so (a name of safetensors); default: as the base, or as a delta says.

    Raises:
        EspalierError: when a delta does not fit the base, or two parameters of a delta are one tensor of it.
    """
    found = {n: Output(n, directory.info(n).dtype, directory.info(n).shape, n) for n in directory}
    for position, delta in enumerate(deltas):
        taken: dict[str, str] = {}
        for name in delta.manifest.get("removed", []):
            if found.pop(name, None) is None:
                raise EspalierError(f"the delta removes {name!r}, which the base does not have")
        for name, layout in delta.layouts.items():
            shape = tuple(delta.updates[name].shape)
            if layout.dtype:  # set as a whole
                found[name] = Output(name, layout.dtype, shape, None, [(position, name)], layout)
                continue
            experts = shape[0] if len(shape) == 3 else None
            for piece in locate(name, layout.names, experts, found):
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


def cut(made: Mapping[str, Output], directory: ModelDirectory, shard_bytes: int | None = None) -> dict[str, str]:
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
        error = rounded.to(exact.dtype).sub_(exact)
        self.error += float(torch.linalg.vector_norm(error)) ** 2
        self.moved += float(torch.linalg.vector_norm(exact - before)) ** 2
        relative = error.abs_().div_(exact.abs().clamp_min_(torch.finfo(exact.dtype).tiny))
        self.worst = max(self.worst, float(relative.max()))

    def facts(self) -> dict[str, Any]:
        lost = math.sqrt(self.error / self.moved) if self.moved > 0 else 0.0
        return {"name": self.name, "dtype": self.dtype, "rounding": self.worst, "lost": lost}


def _is_exact(update: Update, dtype: torch.dtype) -> bool:
    """Whether the update only sets values of this dtype, so that nothing is computed."""
    return update.exact_at_one and is_one(update.gain) and update.dtype == dtype


def _updated(weight: torch.Tensor, updates: Sequence[Update], dtype: torch.dtype, rounding: Rounding) -> torch.Tensor:
    """The weight under its updates, rounded once to ``dtype``; without arithmetic where values are only set."""
    current = weight
    for update in updates:
        if not _is_exact(update, current.dtype):
            current = current.to(working_dtype(current))
        current = update.apply(current)
    rounded = current.to(dtype)
    if current.dtype != dtype:
        rounding.add(weight.to(current.dtype), current, rounded)
    return rounded


def write_model(
    directory: ModelDirectory,
    deltas: Sequence[Delta],
    scale: float,
    out: Path,
    progress: Callable[[int], Any],
    *,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    hashes: Hashes | None = None,
) -> dict[str, dict[str, Any]]:
    """Write the updated model's weights into ``out``.

    Args:
        progress: called with the bytes written so far.
        dtype, shard_bytes: see :func:`outputs` and :func:`cut`.
        hashes: gathers the SHA-256 of every tensor of the base on the way.

    Returns:
        What rounding did, by parameter (the worst expert's for fused ones).

    Raises:
        EspalierError: when a delta does not fit the base, or an updated value is not finite.
    """
    made = outputs(directory, deltas, dtype)
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
            list(pool.map(hashes.complete, [n for n in directory if n not in hashes]))
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
        if len(output.others) > 1 and not _by_rows(output.layout, [updates(*step, output.expert) for step in output.steps]):
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
        yield first, 0, tensor_bytes(updates(*first.steps[0], None).tensors()["values"].to(target))
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
        whole = not shape or not _by_rows(first.layout, own)
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
                new = _updated(weight, [_rows(step, row, row + len(weight)) for step in own], target, rounding)
            yield first, start // item * wider, tensor_bytes(new)


def _matrices(info: TensorInfo, steps: list[Update]) -> Iterator[tuple[int, tuple[int, ...], list[Update]]]:
    """(first byte, shape, updates) of what a tensor is made of: itself, or a matrix for each fused expert."""
    if len(info.shape) != 3 or not steps:
        yield 0, info.shape, steps
        return
    experts = [step.unbind() for step in steps]
    for expert in range(info.shape[0]):
        yield info.nbytes // info.shape[0] * expert, info.shape[1:], [step[expert] for step in experts]


def _by_rows(layout: Layout, steps: Sequence[Update]) -> bool:
    """Whether a matrix can be updated in slices of its stored rows."""
    return not (layout.transposed and steps) and all(step.slice_rows(0, 0) is not None for step in steps)


def _rows(update: Update, start: int, stop: int) -> Update:
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
        if hashes is not None:
            hashes.of(str(output.source)).update(tensor_bytes(parts[-1]))
    new = _updated(torch.cat(parts), steps, torch_dtype(job[0].dtype), rounding)
    for output, part in zip(job, new.split([len(p) for p in parts]), strict=True):
        yield output, 0, tensor_bytes(part)


def write_side_files(out: Path, directory: ModelDirectory, folders: Sequence[Path], deltas: Sequence[Delta], dtype: str | None) -> None:
    """Write what stands beside the weights: the base's files, but for those that a delta brings or drops.

    Raises:
        EspalierError: when a delta's copy of a file is missing or is not the one that it recorded.
    """
    for side in directory.side_files():
        shutil.copyfile(side, out / side.name)
    for folder, delta in zip(folders, deltas, strict=True):
        for name, digest in delta.manifest.get("files", {}).items():
            if digest is None:
                (out / name).unlink(missing_ok=True)
                continue
            content = folder / FILES / name
            if not content.is_file() or file_digest(content) != digest:
                raise EspalierError(f"{content} is missing or damaged: its SHA-256 is not the one that {MANIFEST} records")
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(content, out / name)
    if dtype is not None:
        config = read_json(out / "config.json")
        config.pop("torch_dtype", None)
        config["dtype"] = str(torch_dtype(dtype)).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Lineage:
    """What a model was made of, as ``espalier.json`` says it: enough to make it again."""

    base: str
    fingerprint: str | None
    deltas: list[str]
    digests: dict[str, str]
    scale: float
    dtype: Literal["bf16", "fp16", "fp32"] | None

    @classmethod
    def read(cls, path: Path) -> Lineage:
        """Read it.

        Raises:
            EspalierError: when it is malformed.
        """
        content = read_json(path)
        kinds = {"base": str, "fingerprint": str | None, "deltas": list, "digests": dict, "scale": float, "dtype": str | None}
        if not isinstance(content, dict) or any(not isinstance(content.get(key), kind) for key, kind in kinds.items()):
            raise EspalierError(f"{path} does not say what the model was made of ({', '.join(kinds)})")
        if not all(isinstance(d, str) and d in content["digests"] for d in content["deltas"]) or content["dtype"] not in (None, *_DTYPES):
            raise EspalierError(f"{path} is malformed: deltas {content['deltas']!r}, dtype {content['dtype']!r}")
        return cls(**{key: content[key] for key in kinds})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def _write_card(path: Path, lineage: Lineage, deltas: Sequence[Delta]) -> None:
    """A model card that says where the model comes from."""
    lines = [
        f"- `{folder}`: {delta.manifest.get('method')} {json.dumps(delta.manifest.get('hyperparameters', {}))}, "
        f"data `{delta.manifest.get('training', {}).get('data')}`"
        for folder, delta in zip(lineage.deltas, deltas, strict=True)
    ]
    made = f"from `{lineage.base}`, fingerprint `{lineage.fingerprint}`, scale {lineage.scale}, and:\n\n" + "\n".join(lines)
    text = (
        f"---\nlibrary_name: transformers\nbase_model: {lineage.base}\ntags: [espalier]\n---\n\n# {lineage.base} with deltas\n\n"
        f"Written by `espalier apply` {made}\n\n`espalier revert` makes the model again without them.\n"
    )
    path.write_text(text, encoding="utf-8")


@dataclass
class Recipe:
    """What a new model is made of, and how it is stored."""

    directory: ModelDirectory
    name: str
    folders: Sequence[Path]
    deltas: Sequence[Delta]
    scale: float = 1.0
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    shard_bytes: int | None = None
    any_base: bool = False


def write(recipe: Recipe, folder: Path, out: Path, display: Display) -> dict[str, dict[str, Any]]:
    """Write a whole model directory (weights, side files, card) into ``folder``, which is to become ``out``.

    The base is checked against the deltas before anything is written where its fingerprint is known, else on the bytes
    that are read anyway, before the new model gets its name.

    Raises:
        EspalierError: when a delta is for another base or does not fit, the disk is too small, or a value is not finite.
    """
    directory = recipe.directory
    dtype = _DTYPES[recipe.dtype] if recipe.dtype else None
    fingerprint = known_fingerprint(directory)
    hashes = Hashes(directory) if fingerprint is None else None

    def check(found: str) -> None:
        for path, delta in zip(recipe.folders, recipe.deltas, strict=True):
            if not recipe.any_base:
                check_base(delta, path, directory.path, found)

    if fingerprint is not None:
        check(fingerprint)
    total = sum(output.nbytes for output in outputs(directory, recipe.deltas, dtype).values())
    require_free_space(folder, total + (8 << 20), f"the new model in {out}")
    with display.bar("applying", max(total >> 20, 1), "MiB") as update:
        report = write_model(
            directory, recipe.deltas, recipe.scale, folder, lambda done: update(done >> 20), dtype=dtype, shard_bytes=recipe.shard_bytes, hashes=hashes
        )
    if hashes is not None:
        fingerprint = hashes.fingerprint()
        check(fingerprint)
    write_side_files(folder, directory, recipe.folders, recipe.deltas, dtype)
    if recipe.deltas:
        names = [str(f) for f in recipe.folders]
        digests = {name: delta.manifest["sha256"] for name, delta in zip(names, recipe.deltas, strict=True)}
        lineage = Lineage(recipe.name, fingerprint, names, digests, float(recipe.scale), recipe.dtype)
        lineage.write(folder / LINEAGE)
        _write_card(folder / "README.md", lineage, recipe.deltas)
    return report
