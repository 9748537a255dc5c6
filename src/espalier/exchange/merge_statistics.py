"""What is counted of models that may be merged: how far they are apart, and where their changes of a base collide.

Everything here is a sum over the entries of tensors, gathered in slices of rows, so that what holds for one tensor, for
a role, for a block or for the whole model are sums of the same counts (:data:`Counts`). Sign conflicts and election are
those of TIES (arXiv:2306.01708); the alignment of singular vectors is that of arXiv:2402.04051.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from espalier.checkpoint.stream import one_thread_each
from espalier.delta.compare import Directions, aligned, principal_angles
from espalier.delta.merging import Parameter, Piece
from espalier.errors import EspalierError
from espalier.exchange.merging import Item
from espalier.kernels.philox import Stream

Counts = dict[str, torch.Tensor]
"""Sums in float64, by name; those of several tensors are added up. ``n`` models:

- ``entries`` (): how many numbers there are.
- ``gram`` (n + 1, n + 1): inner products of the models and, last, the base; zero where there is none.
- ``apart`` (n, n): squared norms of the models' differences.
- ``changes`` (n, n): inner products of the changes.
- ``touched``, ``signs`` (n, n): entries that both changed; those where the signs agree less those where they differ.
- ``kept``, ``kept_signs`` (n, n): the same of the entries among the largest changes of both.
- ``kept_squares`` (n,): squared norm of the largest changes of each.
- ``mass``, ``kept_mass`` (n, n): sum of |a + b| of two changes; of a change and itself twice its sum of magnitudes.
- ``all_mass``, ``kept_all_mass`` (): sum of |a + b + ...| of the changes of all models.
- ``left``, ``right`` (n, n): sums of squared cosines of the principal angles between leading singular subspaces;
  ``directions`` (n, n) how many there are; ``left_chance``, ``right_chance`` (n, n) the sums to be expected of unrelated ones.
- ``aligned``, ``aligned_of`` (n, n): the sum of (u_i . u_j)(v_i . v_j) over dominant singular directions, and how many they are.
- ``captured``, ``captured_of`` (n,): squared norm in the leading directions, and in all, of the matrices looked at.
"""

SLICE = 1 << 17
"""Numbers of each model in a slice, as much is made of each in float64."""

DOMINANT = 0.3
"""Singular directions whose value is above this share of the largest are compared (arXiv:2402.04051, gamma)."""
NEGLIGIBLE = 1e-3
"""Singular values below this share of the largest are rounding, and belong to no leading subspace."""
EXACT = 1 << 18
"""Matrices of at most so many numbers are decomposed as a whole."""
POWERS, EXTRA = 4, 10
"""Of the block power method: passes before the last one, and columns beyond the rank."""


@dataclass
class Found:
    """What was counted of one tensor; principal angles in degrees, ascending, by pair of models."""

    counts: Counts
    angles: dict[tuple[int, int], dict[str, list[float]]] = field(default_factory=dict)


def total(counts: Iterable[Counts]) -> Counts:
    """The counts of several tensors together."""
    summed: Counts = {}
    for some in counts:
        for name, value in some.items():
            summed[name] = summed[name] + value if name in summed else value.clone()
    return summed


def gone_through(items: Sequence[Item], density: float, rank: int, progress: Callable[[int], None]) -> dict[str, Found]:
    """Count everything of every tensor, on all threads; the result does not depend on how many they are.

    Args:
        density: share of a tensor's entries that are its largest changes.
        rank: of the leading singular subspaces; 0: leave them out.
        progress: called with the numbers gone through so far.

    Raises:
        EspalierError: naming the tensor, where a model is not finite or has another shape.
    """

    def one(item: Item) -> Found:
        try:
            parameter = item.parameter(0)
            of = "updates" if parameter.has_base else "models"
            counts = _entries(parameter, density)
            found = Found(counts)
            if rank and len(item.shape) in (2, 3) and min(item.shape) > 1:
                _compare_directions(parameter, of, rank, found)
            return found
        except EspalierError as error:
            raise EspalierError(f"{item.name}: {error}") from error

    largest_first = sorted((item for item in items if item.is_merged), key=lambda item: -math.prod(item.shape))
    made, done = {}, 0
    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        for item, found in zip(largest_first, pool.map(one, largest_first), strict=True):
            made[item.name] = found
            progress(done := done + math.prod(item.shape))
    return {item.name: made[item.name] for item in items if item.name in made}


def _entries(parameter: Parameter, density: float) -> Counts:
    n = parameter.models
    square = {name: torch.zeros(n, n, dtype=torch.float64) for name in ("changes", "touched", "signs", "kept", "kept_signs", "mass", "kept_mass")}
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("all_mass", "kept_all_mass")}
    found: Counts = {"entries": torch.tensor(parameter.numel, dtype=torch.float64)}
    found |= {"gram": torch.zeros(n + 1, n + 1, dtype=torch.float64), "apart": torch.zeros(n, n, dtype=torch.float64)}
    if parameter.has_base:
        found |= square | sums | {"kept_squares": torch.zeros(n, dtype=torch.float64)}
        chosen = parameter.largest([parameter.count(density)] * n)
    for piece in parameter.pieces(SLICE):
        vectors = piece.models.flatten(1).double()
        for i, j in itertools.combinations(range(n), 2):
            found["apart"][i, j] += (vectors[i] - vectors[j]).square_().sum()
        if piece.base is None:
            found["gram"][:n, :n] += vectors @ vectors.T
            continue
        everything = torch.cat([vectors, piece.base.flatten()[None].double()])
        found["gram"] += everything @ everything.T
        changes = (piece.models - piece.base).flatten(1)
        touched = changes != 0  # where fewer changed than are to be kept, what did not is not kept either
        mask = chosen(changes.abs()) & touched
        for prefix, x, where in (("", changes, touched), ("kept_", changes * mask, mask)):
            signs, present = x.sign(), where.float()
            found[prefix.removesuffix("_") or "touched"] += (present @ present.T).double()
            found[f"{prefix}signs"] += (signs @ signs.T).double()
            found[f"{prefix}mass"] += _mass_of_pairs(x)
            found[f"{prefix}all_mass"] += x.sum(0).abs_().sum(dtype=torch.float64)
            if prefix:
                found["kept_squares"] += x.double().square().sum(-1)
            else:
                precise = x.double()
                found["changes"] += precise @ precise.T
    return found


def _mass_of_pairs(changes: torch.Tensor) -> torch.Tensor:
    """The sum of |a + b| of every two of (n, m) changes, (n, n)."""
    made = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for i, j in itertools.combinations_with_replacement(range(len(changes)), 2):
        made[i, j] = made[j, i] = (changes[i] + changes[j]).abs_().sum(dtype=torch.float64)
    return made


def leading(parameter: Parameter, of: str, rank: int, squares: Sequence[float], first: int, last: int) -> list[Directions]:
    """The leading singular directions of every model's change (or of the models) in the rows from ``first`` to ``last``.

    A small matrix is decomposed as a whole; of another the rows are gone through ``POWERS + 1`` times, by the block power
    method. In memory are (rows + 2 columns) (rank + 10) numbers for each model then.

    Args:
        of: ``updates`` or ``models``.
        squares: squared norm of each; where it is zero there are no directions.
    """
    rows, columns, n = last - first, parameter.columns, parameter.models
    step = max(SLICE // columns, 1)

    def slices() -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(first, last, step):
            yield start - first, getattr(Piece(parameter, start, min(start + step, last)), of)

    if rows * columns <= EXACT:
        whole = torch.cat([part.double() for _, part in slices()], 1)
        return [Directions(U, S, Vh.mT) for U, S, Vh in map(_svd, whole)]
    width = min(rank + EXTRA, rows, columns)
    # a start of its own for every change, or two that have little to do with each other would look related; the same for
    # the same change, or a model would look different from itself
    Q = torch.stack([Stream(_bits(s), f"directions of {parameter.name} {first}").gaussian(columns, width) for s in squares])
    for _ in range(POWERS):
        Z = torch.zeros(n, columns, width)
        for _, part in slices():
            Z += part.mT @ (part @ Q)
        Q = torch.linalg.qr(Z.double()).Q.float()
    Y = torch.empty(n, rows, width)
    for start, part in slices():
        torch.matmul(part, Q, out=Y[:, start : start + part.shape[1]])
    made = []
    for model in range(n):
        U, S, Wh = _svd(Y[model])
        made.append(Directions(U, S, Q[model].double() @ Wh.mT))
    return made


def _svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U, S, Vh


def _bits(number: float) -> int:
    """A seed that is the number's own."""
    return int.from_bytes(struct.pack("<d", number), "little") >> 1


def _compare_directions(parameter: Parameter, of: str, rank: int, found: Found) -> None:
    n, shape = parameter.models, parameter.shape
    squares = (found.counts["changes"].diag() if of == "updates" else found.counts["gram"].diag()[:n]).tolist()
    names = ("left", "right", "directions", "left_chance", "right_chance", "aligned", "aligned_of")
    sums = {name: torch.zeros(n, n, dtype=torch.float64) for name in names}
    captured, of_all = torch.zeros(n, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64)
    rows, most = shape[-2], min(rank, min(shape[-2:]) // 2)  # subspaces of more than half the dimensions meet in any case
    for first in range(0, parameter.rows if any(squares) else 0, rows):  # the matrix, or that of each expert
        directions = leading(parameter, of, rank, squares, first, first + rows)
        counts = [d.above(NEGLIGIBLE, most) for d in directions]
        captured += torch.stack([d.S[:count].square().sum() for d, count in zip(directions, counts, strict=True)])
        for i, j in itertools.combinations_with_replacement(range(n), 2):
            for name, value in _compared(directions[i], directions[j], counts[i], counts[j]).items():
                sums[name][i, j] += value
                if i != j:
                    sums[name][j, i] += value
            if i != j and len(shape) == 2 and counts[i] and counts[j]:
                a, b = directions[i], directions[j]
                angles = {side: principal_angles(getattr(a, X)[:, : counts[i]], getattr(b, X)[:, : counts[j]]) for side, X in (("left", "U"), ("right", "V"))}
                found.angles[i, j] = {side: angle.rad2deg().tolist() for side, angle in angles.items()}
    found.counts |= sums | {"captured": captured, "captured_of": of_all}


def _compared(a: Directions, b: Directions, p: int, q: int) -> dict[str, float]:
    alignment, among = aligned(a, b, DOMINANT)
    left, right = a.U.mT @ b.U, a.V.mT @ b.V
    return {
        "left": float(left[:p, :q].square().sum()),
        "right": float(right[:p, :q].square().sum()),
        "directions": min(p, q),
        "left_chance": p * q / len(a.U),
        "right_chance": p * q / len(a.V),
        "aligned": alignment,
        "aligned_of": among,
    }
