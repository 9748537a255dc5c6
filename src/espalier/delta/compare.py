"""Two deltas side by side: whether they are equal, how long they are, how they are aligned, and where they conflict.

What is compared are effective updates, ``W_new - W`` of each parameter, whatever their forms. One parameter is looked at
at a time, in float64: factors by way of their QR decompositions, sparse updates by their positions, anything else in
slices of rows, or whole where its rows need one another. Updates that depend on the base need ``weights``, which reads it
(``exchange.conversion.BaseWeights``). What is not finite is refused.

Principal angles: A. Bjorck and G. H. Golub, Mathematics of Computation 27 (1973). Small ones come from their sines,
which a cosine near one does not resolve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from espalier.delta.algebra import require_agreement
from espalier.delta.compression import Weights
from espalier.delta.fit import require_finite
from espalier.delta.forms import Columns, Rows, Sparse, Update
from espalier.delta.forms.update import matrix_shape
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError

SLICE = 1 << 20
"""Entries of a slice of rows."""


@dataclass(frozen=True)
class Measure:
    """One number for the whole deltas and one for each parameter; a cosine is ``None`` where an update is zero."""

    total: float | None
    parameters: Mapping[str, float | None]


@dataclass(frozen=True)
class Conflict:
    """How two updates of one parameter agree; ``None`` stands where there is nothing to compare.

    Args:
        norm_a, norm_b: Frobenius norms.
        cosine: of the angle between them.
        density_a, density_b: share of the entries that are not zero, their supports.
        jaccard: entries in both supports, of those in either.
        sign_agreement: share of the entries in both supports whose signs agree.
        a_in_b, b_in_a: share of one support that is in the other; by chance it is the other's density (arXiv:2505.11711).
        column_angles, row_angles: principal angles, in radians and ascending, between the column spaces and between the
            row spaces of two updates of low rank; one list for a matrix, one for each of fused experts.
    """

    norm_a: float
    norm_b: float
    cosine: float | None
    density_a: float
    density_b: float
    jaccard: float | None
    sign_agreement: float | None
    a_in_b: float | None
    b_in_a: float | None
    column_angles: list[list[float]] | None
    row_angles: list[list[float]] | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Directions:
    """The leading singular directions of one matrix: U (rows, k), S (k,) descending, V (columns, k), in float64."""

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor

    def above(self, share: float, most: int | None = None) -> int:
        """How many singular values are above a share of the largest, at most so many."""
        count = int((share * self.S[0] < self.S).sum()) if len(self.S) else 0
        return count if most is None else min(count, most)


def aligned(a: Directions, b: Directions, share: float = 0.0) -> tuple[float, int]:
    """The sum of (u_i . u_j)(v_i . v_j) over singular directions, and their number n: R of arXiv:2402.04051 is the quotient.

    It is 1 for a matrix and itself, about 0 for unrelated ones. Taken are the directions whose singular value is above
    ``share`` of the largest; where the two have different numbers of them, n is the larger.
    """
    p, q = a.above(share), b.above(share)
    agree = (a.U[:, :p].mT @ b.U[:, :q]) * (a.V[:, :p].mT @ b.V[:, :q])
    return float(agree.sum()), max(p, q)


def norm(delta: Delta, weights: Weights | None = None) -> Measure:
    """Frobenius norms.

    Raises:
        EspalierError: naming a parameter that is not finite, is set as a whole, or needs the base.
    """
    squares = {name: float(_gram(name, [delta], weights)) for name in delta.updates}
    return Measure(math.sqrt(sum(squares.values())), {name: math.sqrt(s) for name, s in squares.items()})


def inner(a: Delta, b: Delta, weights: Weights | None = None) -> Measure:
    """Inner products ``<a, b>``, of the parameters that both update.

    Raises:
        EspalierError: as :func:`norm`, and when bases or layouts differ.
    """
    products = {name: float(_gram(name, [a, b], weights)[0, 1]) for name in _common(a, b)}
    return Measure(sum(products.values()), products)


def cosine(a: Delta, b: Delta, weights: Weights | None = None) -> Measure:
    """Cosines of the parameters that both update, and of the whole deltas, in which a parameter that is missing is zero.

    Raises:
        EspalierError: as :func:`inner`.
    """
    grams = {name: _gram(name, [a, b], weights) for name in _common(a, b)}
    total = sum(grams.values(), torch.zeros(2, 2, dtype=torch.float64))
    for place, delta in enumerate((a, b)):
        total[place, place] += sum(float(_gram(name, [delta], weights)) for name in delta.updates if name not in grams)
    return Measure(_cosine(total), {name: _cosine(gram) for name, gram in grams.items()})


def equal(a: Delta, b: Delta, tolerance: float = 0.0, weights: Weights | None = None) -> bool:
    """Whether two deltas change a base alike.

    Updates of the same tensors are equal whatever the base; others are compared entry by entry in float64, and a
    parameter that is missing is zero.

    Args:
        tolerance: largest Frobenius norm of a parameter's difference, as a share of the larger update's; 0: every entry
            is the same.

    Raises:
        EspalierError: as :func:`inner`.
    """
    _common(a, b)
    if set(a.manifest.get("removed", [])) != set(b.manifest.get("removed", [])) or a.manifest.get("files", {}) != b.manifest.get("files", {}):
        return False
    return all(_is_equal(name, [d for d in (a, b) if name in d.updates], tolerance, weights) for name in dict.fromkeys([*a.updates, *b.updates]))


def conflicts(a: Delta, b: Delta, weights: Weights | None = None) -> dict[str, Conflict]:
    """Where two deltas agree and where not, for each parameter that both update.

    Raises:
        EspalierError: as :func:`inner`.
    """
    return {name: _conflict(name, [a, b], weights) for name in _common(a, b)}


def principal_angles(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The principal angles between the spans of two orthonormal bases (n, p) and (n, q), ascending, (min(p, q),)."""
    larger, smaller = (first, second) if first.shape[1] >= second.shape[1] else (second, first)
    overlap = larger.T @ smaller
    cosines = torch.linalg.svdvals(overlap)  # descending
    sines = torch.linalg.svdvals(smaller - larger @ overlap).flip(0)
    return torch.where(cosines.square() >= 0.5, sines.clamp(0, 1).asin(), cosines.clamp(0, 1).acos())


def _common(a: Delta, b: Delta) -> list[str]:
    """The parameters that both update, of deltas that may be compared."""
    require_agreement([a, b])
    return [name for name in a.updates if name in b.updates]


# one parameter, of one delta or of two


def _updates(name: str, deltas: Sequence[Delta]) -> list[Update]:
    """The updates of a parameter.

    Raises:
        EspalierError: when shapes differ or a number is not finite.
    """
    updates = [delta.updates[name] for delta in deltas]
    if len({tuple(u.shape) for u in updates}) > 1:
        raise EspalierError(f"{name}: the deltas hold updates of different shapes, {' and '.join(str(u.shape) for u in updates)}")
    for update in updates:
        try:
            require_finite(update)
        except EspalierError as problem:
            raise EspalierError(f"{name}: {problem}") from problem
    return updates


def _gram(name: str, deltas: Sequence[Delta], weights: Weights | None) -> torch.Tensor:
    """The inner products of the updates with one another, (n, n)."""
    updates = _updates(name, deltas)
    cores = _cores(updates)
    vectors = iter([torch.stack(cores).flatten(1)]) if cores else _entries(name, updates, deltas[0].layouts[name], weights)
    return _finite(name, sum((X @ X.T for X in vectors), torch.zeros(len(updates), len(updates), dtype=torch.float64)))


def _entries(name: str, updates: Sequence[Update], layout: Layout, weights: Weights | None) -> Iterator[torch.Tensor]:
    """The dense updates in parts, (n, entries), in float64; entries that are zero in all of them may be left out.

    Raises:
        EspalierError: when the base is needed and there is none, or a number is not finite.
    """
    if layout.dtype:
        raise EspalierError(f"{name}: the tensor is set as a whole ({layout.dtype}), which is no change of the base's; leave it out (algebra.restrict)")
    weight = None
    if needing := [update for update in updates if update.depends_on_base]:
        if weights is None:
            raise EspalierError(f"{name}: the form {needing[0].form!r} depends on the base; pass weights=, which reads it (BaseWeights)")
        weight = weights(name, layout, updates[0].shape)
    for part in _parts(updates, weight):
        yield _finite(name, part)


def _parts(updates: Sequence[Update], weight: torch.Tensor | None) -> Iterator[torch.Tensor]:
    shape = updates[0].shape
    if all(isinstance(update, Sparse) for update in updates):
        yield _at_union([update for update in updates if isinstance(update, Sparse)])
    elif len(shape) == 3:
        experts = zip(*[update.unbind() for update in updates], strict=True)
        for number, parts in enumerate(experts):
            yield from _parts(parts, None if weight is None else weight[number])
    elif not shape or any(update.slice_rows(0, 0) is None for update in updates):
        yield torch.stack([_dense(update, weight) for update in updates])
    else:
        step = max(1, SLICE // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            rows = None if weight is None else weight[start:stop]
            yield torch.stack([_dense(part, rows) for update in updates if (part := update.slice_rows(start, stop)) is not None])


def _dense(update: Update, weight: torch.Tensor | None) -> torch.Tensor:
    like = torch.empty(update.shape, dtype=torch.float64, device="meta") if weight is None else weight.double()
    return update.materialize(like).flatten()


def _at_union(updates: Sequence[Sparse]) -> torch.Tensor:
    """The values of sparse updates at the entries that any of them touches."""
    touched = torch.cat([update.positions for update in updates]).unique()
    values = torch.zeros(len(updates), len(touched), dtype=torch.float64, device=touched.device)
    for row, update in zip(values, updates, strict=True):
        row[torch.searchsorted(touched, update.positions)] = update.values.double() * float(update.gain)
    return values


def _cores(updates: Sequence[Update]) -> list[torch.Tensor] | None:
    """Updates of low rank in bases Q_B and Q_A that they share: C_i (..., k, l) of ``B_i A_i = Q_B C_i Q_A^T``.

    Returns:
        ``None`` unless each is made of factors that are fewer numbers than the dense update.
    """
    found = []
    for update in updates:
        chosen = update.depends_on_base or len(update.shape) < 2 or isinstance(update, Rows | Columns)  # these hold single entries
        factors = None if chosen else update.low_rank()
        if factors is None or factors.rank * sum(matrix_shape(update.shape)[-2:]) >= math.prod(matrix_shape(update.shape)[-2:]):
            return None
        found.append(factors)
    R_B = torch.linalg.qr(torch.cat([f.B.double() * float(f.gain) for f in found], -1), mode="r").R
    R_A = torch.linalg.qr(torch.cat([f.A.double() for f in found], -2).mT, mode="r").R
    ranks = [f.rank for f in found]
    return [b @ a.mT for b, a in zip(R_B.split(ranks, -1), R_A.split(ranks, -1), strict=True)]


def _cosine(gram: torch.Tensor) -> float | None:
    size = math.sqrt(gram[0, 0]) * math.sqrt(gram[1, 1])
    return max(-1.0, min(1.0, float(gram[0, 1]) / size)) if size else None


def _finite(name: str, numbers: torch.Tensor) -> torch.Tensor:
    if not bool(numbers.isfinite().all()):
        raise EspalierError(f"{name}: the dense update or a sum over it is not finite")
    return numbers


def _is_equal(name: str, owners: Sequence[Delta], tolerance: float, weights: Weights | None) -> bool:
    updates, layout = _updates(name, owners), owners[0].layouts[name]
    if len(updates) == 2 and _is_same(*updates):
        return True
    if layout.dtype:
        return False
    sums = torch.zeros(3, dtype=torch.float64)
    for part in _entries(name, updates, layout, weights):
        x, y = part if len(part) == 2 else (part[0], torch.zeros_like(part[0]))
        if tolerance == 0 and not torch.equal(x, y):
            return False
        sums += torch.stack([v.square().sum() for v in (x - y, x, y)])
    difference, *sizes = sums.sqrt().tolist()
    return difference <= tolerance * max(sizes)


def _is_same(first: Update, second: Update) -> bool:
    """Whether two updates are the same tensors, bit for bit."""

    def facts(update: Update) -> list[Any]:
        tensors = [(key, t.dtype, t.shape) for key, t in update.tensors().items()]
        return [update.form, update.shape, float(update.gain), update.constants(), tensors]

    def bits(update: Update) -> list[torch.Tensor]:
        return [t.contiguous().flatten().view(torch.uint8) for t in update.tensors().values()]

    return facts(first) == facts(second) and all(map(torch.equal, bits(first), bits(second)))


def _conflict(name: str, deltas: Sequence[Delta], weights: Weights | None) -> Conflict:
    updates = _updates(name, deltas)
    gram, counts = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    for part in _entries(name, updates, deltas[0].layouts[name], weights):
        signs = part.sign()
        touched = signs != 0
        counts += torch.stack([*touched.sum(-1), touched.all(0).sum(), (touched.all(0) & (signs[0] == signs[1])).sum()])
        gram += part @ part.T
    of_a, of_b, both, agreeing = counts.tolist()
    entries, either = max(1, math.prod(updates[0].shape)), of_a + of_b - both
    norm_a, norm_b = _finite(name, gram).diag().sqrt().tolist()
    columns = rows = None
    if cores := _cores(updates):
        matrices = [[_spaces(core) for core in (cores_of if cores_of.ndim == 3 else [cores_of])] for cores_of in cores]
        pairs = list(zip(*matrices, strict=True))
        columns, rows = ([principal_angles(a[side], b[side]).tolist() for a, b in pairs] for side in (0, 1))
    return Conflict(
        norm_a, norm_b, _cosine(gram), of_a / entries, of_b / entries, both / either if either else None,
        agreeing / both if both else None, both / of_a if of_a else None, both / of_b if of_b else None, columns, rows,
    )  # fmt: skip


def _spaces(core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of the column space and of the row space of a matrix, by its numerical rank."""
    U, S, Vt = torch.linalg.svd(core, full_matrices=False)
    negligible = S[:1] * max(core.shape) * torch.finfo(S.dtype).eps
    rank = int((negligible < S).sum())
    return U[:, :rank], Vt[:rank].mT
