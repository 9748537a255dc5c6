"""The delta between two checkpoints: what to set in BASE so that it is TUNED, bit for bit; never with either in memory.

A first pass counts the entries whose bits differ, tensor by tensor in slices, and measures the update; a second writes,
for each tensor that changed, the new values: all of them, or those that changed with their positions or a bitmap of
them, whichever is smallest. Imports neither transformers nor peft.

The measures are those of arXiv:2505.11711 (share of unchanged entries, rank), with the dtype named beside them: in bf16
an entry moves only when its update exceeds about 1/512 of it.
"""

from __future__ import annotations

import contextlib
import filecmp
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.layout import is_transposed, locate, place
from espalier.checkpoint.atomic import require_free_space
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.fingerprint import file_digest
from espalier.checkpoint.relaid import Relaid, Source
from espalier.checkpoint.safetensors_file import DTYPES, tensor_bytes, torch_dtype
from espalier.checkpoint.stream import Hashes, one_thread_each, slices
from espalier.delta.fit import TARGETS, fit, relative_error
from espalier.delta.forms import Update
from espalier.delta.forms.bits import pack_bits
from espalier.delta.forms.update import matrix_shape
from espalier.delta.store import FILES, Append, Entry, Layout, writing
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream

SMALL = 1e-5
"""Entries that moved by no more count as unchanged in the measure of arXiv:2505.11711, section 3."""
PROBES = 16
RANK = 1e-3
"""A singular value counts into the rank of an update where it is more than this share of the largest: what is below is mostly the
rounding of checkpoints of 16 bits."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Change:
    """How one tensor of TUNED differs from BASE's of the same name, shape and dtype.

    Args:
        entries, changed, small: how many there are, whose bits differ, and that moved by at most :data:`SMALL` (None: integers).
        norm, base_norm, largest: Frobenius norms of the update and of the base, largest absolute update.
        effective_rank: (sum s^2)^2 / (sum s^4) over the update's singular values s, estimated from products with
            ``PROBES`` random signs; a convolution's as that of the matrix (out, in * kh * kw). None where the tensor is no
            matrix: of one dimension, or of three, which are as many matrices as there are experts.
        rank_ratio: share of the singular values of the update that are more than :data:`RANK` of the largest.
        stable_rank: (sum s^2) / max s^2. Both are ``None`` unless asked for, means over the experts of a tensor of three dimensions.
    """

    name: str
    dtype: str
    entries: int
    changed: int = 0
    small: int | None = None
    norm: float = 0.0
    base_norm: float = 0.0
    largest: float = 0.0
    effective_rank: float | None = None
    rank_ratio: float | None = None
    stable_rank: float | None = None
    form: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "form": self.form,
            "dtype": self.dtype,
            "entries": self.entries,
            "changed": self.changed,
            "moved_less_than_1e-5": self.small,
            "norm": self.norm,
            "relative_norm": self.norm / self.base_norm if self.base_norm else None,
            "largest": self.largest,
            "effective_rank": self.effective_rank,
            "rank_ratio": self.rank_ratio,
            "stable_rank": self.stable_rank,
        }


class Pair:
    """Two models of which one is to be made of the other; ``base`` is seen in the layout of ``tuned``.

    Raises:
        EspalierError: when no tensor is shared, saying so where names seem to differ by a prefix that no family has.
    """

    def __init__(self, base: ModelDirectory, tuned: ModelDirectory) -> None:
        self.model_type = str(base.config.get("model_type"))
        self.relaid = {n: source for n in tuned if n not in base and (source := source_of(base, tuned, n, self.model_type))}
        self.base, self.tuned = Relaid(base, self.relaid), tuned
        same = {n for n in tuned if n in self.base and _spec(self.base, n) == _spec(tuned, n)}
        self.common = sorted(same)
        self.whole = sorted(set(tuned) - same)
        self.removed = sorted(set(base) - set(tuned))
        if not any(n in self.base for n in tuned):
            if pair := _same_but_for_prefix(base, tuned):
                raise EspalierError(f"{base.path} calls a tensor {pair[0]!r} that {tuned.path} calls {pair[1]!r}; save both with the same model class")
            raise EspalierError(f"{base.path} and {tuned.path} have no tensor in common; a difference is of two checkpoints of one model")
        self.hashes = Hashes(base), Hashes(tuned)
        self.files: dict[str, str | None] = {}
        """What differs beside the weights, once it has been written."""

    def layout(self, name: str) -> Layout:
        return Layout((name,), transposed=is_transposed(self.model_type, name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape of a tensor that both have."""
        shape = self.base.info(name).shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.layout(name).transposed else shape

    def is_matrix(self, name: str) -> bool:
        """Whether a form of matrices can stand for the update of a tensor: floating point, (out, in) or experts of it."""
        info = self.base.info(name)
        return len(info.shape) in (2, 3) and torch_dtype(info.dtype).is_floating_point

    def logical(self, side: ModelDirectory, name: str) -> torch.Tensor:
        """A tensor as a whole, in logical orientation."""
        return side.read(name).mT.contiguous() if self.layout(name).transposed else side.read(name)

    def slices(self, name: str, hashed: bool = False) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(first entry, base's values, tuned's) of a tensor in the logical order of its entries, as (rows, columns)."""
        info = self.base.info(name)
        item, columns = DTYPES[info.dtype][1], matrix_shape((1, 1, *info.shape)[-max(len(info.shape), 2) :])[-1]
        transposed = self.layout(name).transposed
        unit = info.shape[-2] * columns * item if transposed else columns * item
        if unit % (8 * item):  # so that every slice but the last has whole bytes of a bitmap
            unit *= 8
        sides = zip(
            slices(self.base, name, unit, hashes=self.hashes[0] if hashed else None),
            slices(self.tuned, name, unit, hashes=self.hashes[1] if hashed else None),
            strict=True,
        )
        for (start, old), (_, new) in sides:
            a, b = (torch.frombuffer(side, dtype=torch_dtype(info.dtype)).reshape(-1, columns) for side in (old, new))
            if transposed:
                a, b = (side.reshape(-1, *info.shape[-2:]).mT.reshape(-1, info.shape[-2]) for side in (a, b))
            yield start // item, a, b

    def compare(self, name: str) -> Change:
        """The first pass over one tensor that both have."""
        info = self.base.info(name)
        change = Change(name, info.dtype, math.prod(info.shape))
        floating = torch_dtype(info.dtype).is_floating_point
        wide = torch.float64 if info.dtype == "F64" else torch.float32
        shape = self.shape(name)
        is_matrix = len(shape) not in (0, 1, 3) and change.entries > 0
        probes = Stream(0, name).rademacher(matrix_shape(shape)[-1] if is_matrix else 0, PROBES).to(wide)
        products = torch.zeros_like(probes)
        squares = base_squares = 0.0
        small = 0
        for _, old, new in self.slices(name, hashed=True):
            differ = int(torch.count_nonzero(_bits(old) != _bits(new)))
            change.changed += differ
            if not floating:
                continue
            base_squares += float(torch.linalg.vector_norm(old.to(wide))) ** 2
            if not differ:
                small += old.numel()
                continue
            moved = new.to(wide).sub_(old.to(wide))
            squares += float(torch.linalg.vector_norm(moved)) ** 2
            change.largest = max(change.largest, float(moved.abs().max()))
            small += int(torch.count_nonzero(moved.abs() <= SMALL))
            if probes.numel():
                products += moved.T @ (moved @ probes)
        change.norm, change.base_norm = math.sqrt(squares), math.sqrt(base_squares)
        change.small = small if floating else None
        fourth = float(products.double().square().sum()) / PROBES  # E |G z|^2 = tr G^2 for random signs z, G = D^T D
        change.effective_rank = max(squares * (squares / fourth), 1.0) if fourth > 0 else None
        return change


    def find_ranks(self, change: Change) -> None:
        """Fill in the ranks of the update of a matrix that changed, which is in memory for that."""
        if not change.changed or not self.is_matrix(change.name) or 0 in self.shape(change.name):
            return
        sides = (self.logical(side, change.name) for side in (self.base, self.tuned))
        old, new = (side.to(torch.float64 if change.dtype == "F64" else torch.float32) for side in sides)
        squares = torch.linalg.svdvals(new.sub_(old)).double().square()  # (..., min(out, in)), descending
        squares = squares[squares[..., 0] > 0]  # an expert that did not change has none
        change.rank_ratio = float((RANK**2 * squares[..., :1] < squares).double().mean())
        change.stable_rank = float((squares.sum(-1) / squares[..., 0]).mean())


def _spec(directory: ModelDirectory, name: str) -> tuple[str, tuple[int, ...]]:
    info = directory.info(name)
    return info.dtype, info.shape


def source_of(base: ModelDirectory, tuned: ModelDirectory, name: str, model_type: str) -> Source | None:
    """What a tensor of TUNED is made of in the base, where that has it in another layout, of the same dtype.

    Matrices that lie transposed in a fused tensor have no entries in a row, and are no source.
    """
    dtype, shape = _spec(tuned, name)
    runs: list[tuple[str, int, int]] = []
    if (found := place(name, base)) is not None:
        stored = base.info(found.name).shape
        count, start = math.prod(shape), 0
        if found.expert is not None:
            expected = (stored[1] // found.parts, *stored[2:]) if len(stored) == 3 and not is_transposed(model_type, found.name) else None
            if shape != expected or found.expert >= stored[0] or stored[1] % found.parts:
                return None
            start = (found.expert * found.parts + found.part) * count
        elif shape != stored:
            return None
        runs = [(found.name, start, start + count)]
    elif len(shape) == 3 and not is_transposed(model_type, name):
        with contextlib.suppress(EspalierError):
            for piece in locate(name, (), shape[0], base):
                parts = [base.info(part).shape for part in piece.names]
                if any(part[1:] != shape[2:] for part in parts) or sum(part[0] for part in parts) != shape[1]:
                    return None
                runs += [(part, 0, math.prod(base.info(part).shape)) for part in piece.names]
    if not runs or math.prod(shape) == 0 or any(base.info(part).dtype != dtype for part, _, _ in runs):
        return None
    return Source(shape, tuple(runs))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _same_but_for_prefix(base: ModelDirectory, tuned: ModelDirectory) -> tuple[str, str] | None:
    for name in base:
        for rest in _without_prefixes(name):
            if rest in tuned:
                return name, rest
    for name in tuned:
        for rest in _without_prefixes(name):
            if rest in base:
                return rest, name
    return None


def _without_prefixes(name: str) -> Iterator[str]:
    """The name without its first part, its first two, ... as many as a prefix may have."""
    for _ in range(4):
        _, dot, name = name.partition(".")
        if not dot:
            return
        yield name


def measure(pair: Pair, progress: Callable[[int], Any], ranks: bool = False) -> list[Change]:
    """The first pass over everything, which hashes both models as it goes.

    Args:
        ranks: find the ranks of the updates of matrices too, one matrix after another.
    """
    jobs = sorted(pair.common, key=lambda n: -pair.base.info(n).nbytes)
    changes, done = [], 0
    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        for change in pool.map(pair.compare, jobs):
            changes.append(change)
            progress(done := done + pair.base.info(change.name).nbytes)
        rest = [(h, n) for h in pair.hashes for n in h.directory if n not in h]
        list(pool.map(lambda job: job[0].complete(job[1]), rest))
    for change in changes if ranks else ():
        pair.find_ranks(change)
    return sorted(changes, key=lambda change: change.name)


def entries(pair: Pair, changes: Sequence[Change], to: str) -> dict[str, Entry]:
    """How each tensor that changed is stored exactly: whole, or by positions or a bitmap, whichever is smallest.

    Matrices that ``to`` approximates are left out.
    """
    found: dict[str, Entry] = {}
    for change in changes:
        if not change.changed:
            continue
        if to != "auto" and pair.is_matrix(change.name):
            change.form = to
            continue
        info, layout = pair.base.info(change.name), pair.layout(change.name)
        shape = pair.shape(change.name)
        item, position = DTYPES[info.dtype][1], 4 if change.entries < 2**31 else 8
        index, mask = change.changed * position, -(-change.entries // 8)
        values = (info.dtype, (change.changed,))
        if min(index, mask) + change.changed * item >= change.entries * item:
            change.form, tensors = "all values", {"values": (info.dtype, shape)}
        elif index <= mask:
            change.form = "values at positions"
            tensors = {"values": values, "index": ("I32" if position == 4 else "I64", (change.changed,))}
        else:
            change.form, tensors = "values by bitmap", {"values": values, "mask": ("U8", (mask,))}
        found[change.name] = Entry("replace", shape, tensors, layout)
    for name in pair.whole:
        info = pair.tuned.info(name)
        found[name] = Entry("replace", info.shape, {"values": (info.dtype, info.shape)}, Layout((name,), dtype=info.dtype))
    return found


def nbytes(described: Mapping[str, Entry]) -> int:
    """Bytes of the tensors of entries."""
    return sum(math.prod(shape) * DTYPES[dtype][1] for e in described.values() for dtype, shape in e.tensors.values())


def fitted(
    pair: Pair, changes: Sequence[Change], to: str, options: Mapping[str, Any], advance: Callable[[int], Any]
) -> tuple[dict[str, Update], dict[str, float]]:
    """The updates of the matrices that changed, each approximated as a whole, and their relative errors."""
    updates: dict[str, Update] = {}
    errors: dict[str, float] = {}
    for change in changes:
        if not change.changed or not pair.is_matrix(change.name):
            continue
        old, new = (pair.logical(side, change.name).float() for side in (pair.base, pair.tuned))
        moved = new.sub_(old)
        try:
            update = fit(moved, to, weight=old, **options)
        except EspalierError as error:
            raise EspalierError(f"{change.name}: {error}") from error
        updates[change.name], errors[change.name] = update, relative_error(update, moved)
        advance(pair.base.info(change.name).nbytes)
    return updates, errors


def fill(pair: Pair, described: dict[str, Entry], append: Append, advance: Callable[[int], Any]) -> None:
    """The second pass: the values of every entry."""

    def one(name: str) -> int:
        entry = described[name]
        if entry.layout.dtype or (set(entry.tensors) == {"values"} and not entry.layout.transposed):
            for _, piece in slices(pair.tuned, name):
                append(f"{name}:values", piece)
            return pair.tuned.info(name).nbytes
        for start, old, new in pair.slices(name):
            if "index" not in entry.tensors and "mask" not in entry.tensors:
                append(f"{name}:values", tensor_bytes(new))
                continue
            differ = (_bits(old) != _bits(new)).reshape(-1)
            append(f"{name}:values", tensor_bytes(new.reshape(-1)[differ]))
            if "mask" in entry.tensors:
                append(f"{name}:mask", tensor_bytes(pack_bits(differ)))
            else:
                positions = differ.nonzero().reshape(-1) + start
                append(f"{name}:index", tensor_bytes(positions.to(torch_dtype(entry.tensors["index"][0]))))
        return pair.tuned.info(name).nbytes

    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        for count in pool.map(one, sorted(described, key=lambda n: -pair.tuned.info(n).nbytes)):
            advance(count)


def summary(changes: Sequence[Change]) -> list[tuple[Any, ...]]:
    """A row per kind of tensor: those whose names differ only in numbers."""
    kinds: dict[str, list[Change]] = {}
    for change in changes:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", change.name), []).append(change)
    rows: list[tuple[Any, ...]] = []
    for kind, members in kinds.items():
        entries, changed = sum(c.entries for c in members), sum(c.changed for c in members)
        norm, base = (math.sqrt(sum(v * v for v in vs)) for vs in zip(*((c.norm, c.base_norm) for c in members), strict=True))
        ranks = [c.effective_rank for c in members if c.effective_rank is not None]
        rank = f"{min(ranks):.0f}-{max(ranks):.0f}" if ranks else "-"
        share = f"{1 - changed / entries:.2%}" if entries else "-"
        largest = max(c.largest for c in members)
        rows.append((kind, len(members), members[0].dtype, entries, share, f"{norm / base:.2e}" if base else "-", f"{largest:.2e}", rank))
    return rows


def side_files(pair: Pair, folder: Path) -> dict[str, str | None]:
    """Copy the files beside TUNED's weights that differ from BASE's into a delta's folder; name to SHA-256."""
    old, new = pair.base.side_files(), pair.tuned.side_files()
    found: dict[str, str | None] = dict.fromkeys(set(old) - set(new))
    for name, path in new.items():
        if name in old and filecmp.cmp(old[name], path, shallow=False):
            continue
        copy = folder / FILES / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        found[name] = file_digest(copy)
    return dict(sorted(found.items()))


def checked(to: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a form: those that were given, and the defaults of the others.

    Raises:
        EspalierError: when one was given that does nothing for that form, as all for ``auto``.
    """
    taken = TARGETS[to][1] if to in TARGETS else ()
    for key in options:
        if key not in taken:
            users = [target for target, (_, names) in TARGETS.items() if key in names]
            raise EspalierError(f"--{key} does nothing with --to {to}; it is an option of {', '.join(users)}")
    return {**{key: value for key, value in {"bits": 4, "group": 64, "seed": 0}.items() if key in taken}, **options}


def write(
    pair: Pair, changes: Sequence[Change], to: str, options: Mapping[str, Any], names: tuple[str, str],
    folder: Path, out: Path, progress: Callable[[int], Any],
) -> dict[str, float]:  # fmt: skip
    """Write the delta of a measured pair into ``folder``, which is to become ``out``.

    Returns:
        The relative errors of what ``to`` approximates.

    Raises:
        EspalierError: when an update cannot have that form, or the disk is too small.
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        progress(done := done + count)

    described = entries(pair, changes, to)
    updates, errors = ({}, {}) if to == "auto" else fitted(pair, changes, to, options, advance)
    everything = {**described, **{name: Entry.of(update, pair.layout(name)) for name, update in updates.items()}}
    require_free_space(folder, nbytes(everything) + (8 << 20), f"the delta in {out}")
    pair.files = side_files(pair, folder)
    manifest = {
        "method": "diff",
        "hyperparameters": {"to": to, **options},
        "base": {"name": names[0], "fingerprint": pair.hashes[0].fingerprint(), "model_type": pair.model_type},
        "tuned": {"name": names[1], "fingerprint": pair.hashes[1].fingerprint()},
        "removed": pair.removed,
        "relaid": {name: source.as_json() for name, source in pair.relaid.items()},
        "files": pair.files,
    }
    how = "exact: `espalier apply` gives it back, bit for bit" if to == "auto" else f"matrices approximately, as {to}"
    card = (
        f"---\nlibrary_name: espalier\nbase_model: {names[0]}\n---\n\n# What changed from {names[0]} to {names[1]}\n\n"
        f"Written by `espalier diff`, {how}.\n"
    )
    with writing(folder, everything, manifest, card) as append:
        fill(pair, described, append, advance)
        for name, update in updates.items():
            for key, tensor in update.tensors().items():
                append(f"{name}:{key}", tensor_bytes(tensor))
    return errors
