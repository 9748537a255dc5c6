"""An update into another form: exactly where the form allows, else the best fit of that form.

Every function is pure and takes an update (or the dense update itself, a float tensor of the weight's logical
shape) and gives an update; :func:`fit` is the one door to all of them. What is kept is exactly k entries, columns
or rows, the largest first and ties in the order of their index, so a fit is the same on every machine.

Low-rank fits are the truncated singular value decomposition (Eckart and Young), or for large matrices and small
ranks the randomised one of N. Halko, P. G. Martinsson and J. A. Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from espalier.delta.forms import (
    Columns,
    Dense,
    Golomb,
    LowRank,
    Quantized,
    Rows,
    Sparse,
    Ternary,
    Update,
    compact,
    working_dtype,
)
from espalier.delta.forms.golomb import signs_at
from espalier.delta.forms.quantized import Codebook
from espalier.delta.forms.update import as_matrix
from espalier.delta.selection import kept, largest
from espalier.errors import EspalierError, at_least, one_of
from espalier.kernels.philox import Stream

OVERSAMPLING = 10
POWER_ITERATIONS = 2
EXACT_UP_TO = 512
"""Matrices whose smaller side has no more are decomposed exactly; so are those of which over a quarter is asked."""

Source = torch.Tensor | Update


def fit(
    update: Source,
    to: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    bits: int = 4,
    group: int = 64,
    seed: int = 0,
    weight: torch.Tensor | None = None,
    name: str = "",
) -> Update:
    """An update in the form ``to``.

    Args:
        update: an update, or a dense one as a float tensor of the weight's logical shape.
        to: one of :data:`TARGETS`. What only matrices can have (low rank, rows, columns) leaves others dense.
        rank: of a low-rank fit, at least 1. A lower one that the update has already is kept.
        energy: in (0, 1]: the lowest rank that keeps this share of the squared Frobenius norm.
        density: in [0, 1]: share of the entries, rows or columns that are kept, at least one of them unless it is 0;
            by default all that are not zero, which is exact, or for signs the share of least error.
        bits, group: of a quantized fit: bits a code, codes that share a scale.
        seed, name: of the random numbers of a randomised decomposition: other names, other numbers.
        weight: the base's weight in its logical shape; only updates that depend on it need it.

    Raises:
        EspalierError: when the update is not finite everywhere, an option is missing or out of range, or the update
            depends on the base and there is no ``weight``.
    """
    one_of("to", to, list(TARGETS))
    given = {"rank": rank, "energy": energy, "density": density, "bits": bits, "group": group, "seed": seed, "name": name}
    make, options = TARGETS[to]
    if isinstance(update, Update):
        require_finite(update)
    return make(_base_independent(update, weight), **{option: given[option] for option in options})


def densify(update: Source, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The dense update, in float32 (float64 for a float64 weight), of the weight's logical shape.

    Raises:
        EspalierError: when it depends on the base and there is no ``weight``, or is not finite everywhere.
    """
    if isinstance(update, torch.Tensor):
        dense = update.to(working_dtype(update))
    elif weight is not None:
        dense = update.materialize(weight)
    elif update.depends_on_base:
        raise EspalierError(f"the form {update.form!r} depends on the base; the base model is needed to make another of it (--model BASE)")
    else:
        wide = torch.float64 if update.dtype == torch.float64 else torch.float32
        dense = update.materialize(torch.empty(update.shape, dtype=wide, device="meta"))
    if not bool(dense.isfinite().all()):
        where = torch.unravel_index((~dense.isfinite()).flatten().nonzero()[0, 0], dense.shape)
        raise EspalierError(f"the update is {float(dense[where])} at {tuple(int(i) for i in where)}; every number of it must be finite")
    return dense


def relative_error(fitted: Source, update: Source, weight: torch.Tensor | None = None) -> float:
    """``||fitted - update|| / ||update||`` in Frobenius norms; of an update that is zero, the norm of what was fitted."""
    if fitted is update:
        return 0.0
    apart, size = distance(fitted, update, weight)
    return apart / (size or 1.0)


def distance(fitted: Source, update: Source, weight: torch.Tensor | None = None) -> tuple[float, float]:
    """``||fitted - update||`` and ``||update||`` in Frobenius norms."""
    factors = [None if isinstance(one, torch.Tensor) else one.low_rank() for one in (fitted, update)]
    if factors[0] is not None and factors[1] is not None:  # then nothing has to be dense
        (made_B, made_A), (B, A) = ((f.B.double() * f.gain, f.A.double()) for f in factors if f is not None)
        size = _norm_of_product(B, A)
        return (0.0 if fitted is update else _norm_of_product(torch.cat((made_B, -B), -1), torch.cat((made_A, A), -2))), size
    dense = densify(update, weight)
    size = float(torch.linalg.vector_norm(dense))
    if fitted is update:
        return 0.0, size
    return float(torch.linalg.vector_norm(densify(fitted, weight).to(dense.dtype) - dense)), size


def _norm_of_product(B: torch.Tensor, A: torch.Tensor) -> float:
    """``||B A||`` of factors (..., out, r) and (..., r, in), by their QR decompositions."""
    return float(torch.linalg.vector_norm(torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT))


# forms


def dense(update: Source, dtype: torch.dtype | None = None) -> Update:
    """The dense update, in float32 or ``dtype``."""
    if isinstance(update, Dense) and dtype in (None, update.dtype):
        return update
    values = densify(update)
    return Dense(values if dtype is None else values.to(dtype))


def sparse(
    update: Source,
    density: float | None = None,
    by: Literal["magnitude", "random"] = "magnitude",
    rescale: bool = False,
    seed: int = 0,
    name: str = "",
) -> Update:
    """The entries of largest magnitude, or as many random ones; by default all that are not zero.

    Args:
        density: share of all entries that is kept.
        by: ``random`` draws them from the stream (seed, name).
        rescale: multiply what is kept, by its gain: random entries by the inverse of their share, so that the update
            is right on average (DARE, arXiv:2311.03099), the largest so that the sum of magnitudes stays.
    """
    entries = update.numel() if isinstance(update, torch.Tensor) else math.prod(update.shape)
    if isinstance(update, Sparse) and (density is None or (by == "magnitude" and len(update.values) <= kept(entries, density))):
        return update
    if isinstance(update, Sparse) and by == "magnitude":  # what is zero need not be looked at
        positions, values, gain = update.positions, update.values, update.gain
    else:
        values, gain = densify(update), 1.0
        positions = None
    shape, flat = tuple(update.shape), values.flatten()
    if density is None:
        chosen = flat.nonzero().squeeze(-1)
    elif by == "random":
        chosen = largest(Stream(seed, f"sparse {name}").integers32(entries), kept(entries, density))
    else:
        chosen = largest(flat.abs(), kept(entries, density))
    values = flat[chosen]
    where = compact(chosen if positions is None else positions[chosen], entries)
    if rescale and density:
        if by == "random":
            gain = gain * (entries / max(len(chosen), 1))
        elif (left := float(values.abs().sum(dtype=torch.float64))) > 0:
            gain = gain * (float(flat.abs().sum(dtype=torch.float64)) / left)
    return Sparse(values, where.get("index"), shape, gain, mask=where.get("mask"))


def columns(update: Source, density: float | None = None) -> Update:
    """The columns of largest norm (each expert its own); by default all that are not zero. Exact for those kept."""
    if isinstance(update, Columns) and (density is None or update.index.shape[-1] <= kept(update.inputs, density)):
        return update
    values = densify(update)
    if values.ndim < 2:
        return Dense(values)
    matrix = as_matrix(values)
    index = _longest(matrix, -2, density)
    taken = matrix.gather(-1, index.unsqueeze(-2).expand(*matrix.shape[:-1], index.shape[-1]))
    return Columns(taken, index.to(torch.int32), matrix.shape[-1], 1.0, tuple(values.shape))


def rows(update: Source, density: float | None = None) -> Update:
    """The rows of largest norm (each expert its own); by default all that are not zero. Exact for those kept."""
    if isinstance(update, Rows) and (density is None or update.index.shape[-1] <= kept(update.outputs, density)):
        return update
    values = densify(update)
    if values.ndim < 2:
        return Dense(values)
    matrix = as_matrix(values)
    index = _longest(matrix, -1, density)
    taken = matrix.gather(-2, index.unsqueeze(-1).expand(*index.shape, matrix.shape[-1]))
    return Rows(taken, index.to(torch.int32), matrix.shape[-2], 1.0, tuple(values.shape))


def _longest(matrix: torch.Tensor, across: int, density: float | None) -> torch.Tensor:
    """Indices of the vectors of largest norm, (..., k); ``across`` is the dimension that a vector runs along."""
    norms = torch.linalg.vector_norm(matrix, dim=across)
    if density is None:
        count = int((norms > 0).sum(-1).max()) if norms.numel() else 0
    else:
        count = kept(norms.shape[-1], density)
    return largest(norms, count)


def low_rank(
    update: Source,
    rank: int | None = None,
    energy: float | None = None,
    method: Literal["exact", "randomized"] | None = None,
    seed: int = 0,
    name: str = "",
) -> Update:
    """Two factors: those that the update is made of, or the truncated singular value decomposition.

    An update that is made of factors is never made dense: they are truncated by way of their QR decompositions, and
    left as they are when no lower rank is asked for. B holds U sqrt(S) and A sqrt(S) V^T.

    Args:
        rank: rank of the factors, at least 1; the matrix's own where that is less.
        energy: instead of (or within) ``rank``: the lowest rank that keeps this share of the squared norm, in every
            expert. Experts have one rank in common.
        method: by default exact for small matrices, randomised where ``rank`` is less than a quarter of a large one.
        seed, name: of the random numbers.
    """
    if rank is not None:
        at_least("rank", rank, 1)
    if energy is not None and not 0 < energy <= 1:
        raise EspalierError(f"energy is {energy!r}; it must be above 0 and at most 1")
    factors = None if isinstance(update, torch.Tensor) else update.low_rank()
    if factors is not None:
        return _truncated(factors, rank, energy)
    values = densify(update)
    if values.ndim < 2:
        return Dense(values)
    if rank is None and energy is None:
        raise EspalierError("a low-rank fit needs --rank or --energy: the update is not made of factors")
    U, S, Vt = singular_vectors(as_matrix(values), rank, Stream(seed, f"low rank {name}"), energy, method)
    return _balanced(U, S, Vt, tuple(values.shape))


def singular_vectors(
    matrix: torch.Tensor, rank: int | None, stream: Stream, energy: float | None = None, method: Literal["exact", "randomized"] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (..., out, r), the largest singular values (..., r), and V^T (..., r, in) of a matrix (..., out, in).

    Args:
        rank, energy, method: as :func:`low_rank` has them; by neither a rank nor an energy all of them.
        stream: random numbers of the randomised decomposition.
    """
    smaller = min(matrix.shape[-2:])
    if method is None:
        method = "exact" if smaller <= EXACT_UP_TO or (rank is not None and 4 * rank > smaller) else "randomized"
    if method == "exact":
        U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
        chosen = _rank_for(S, rank, energy)
    else:
        U, S, Vt, chosen = _randomized(matrix, rank, energy, stream)
    return U[..., :chosen].contiguous(), S[..., :chosen].contiguous(), Vt[..., :chosen, :].contiguous()


def _balanced(U: torch.Tensor, S: torch.Tensor, Vt: torch.Tensor, shape: tuple[int, ...]) -> LowRank:
    root = S.sqrt()
    return LowRank((U * root.unsqueeze(-2)).contiguous(), (root.unsqueeze(-1) * Vt).contiguous(), 1.0, shape)


def _truncated(factors: LowRank, rank: int | None, energy: float | None) -> LowRank:
    """Factors of a lower rank: the decomposition of the product is that of the small product of their triangles."""
    if energy is None and (rank is None or factors.rank <= rank):
        return factors
    QB, RB = torch.linalg.qr(factors.B.double() * float(factors.gain))
    QA, RA = torch.linalg.qr(factors.A.double().transpose(-1, -2))
    U, S, Vt = torch.linalg.svd(RB @ RA.transpose(-1, -2), full_matrices=False)
    chosen = _rank_for(S, rank, energy)
    if chosen >= factors.rank:
        return factors
    made = _balanced((QB @ U)[..., :chosen], S[..., :chosen], (Vt @ QA.transpose(-1, -2))[..., :chosen, :], factors.shape)
    wide = working_dtype(factors.B, factors.A)
    return LowRank(made.B.to(wide), made.A.to(wide), 1.0, factors.shape)


def _rank_for(S: torch.Tensor, rank: int | None, energy: float | None, total: torch.Tensor | None = None) -> int:
    """The rank that is asked of singular values (..., n), of which ``total`` (...,) is the sum of all squares."""
    most = S.shape[-1] if rank is None else min(rank, S.shape[-1])
    if energy is None:
        return most
    squares = S.double().square()
    if total is None:
        total = squares.sum(-1)
    # what rounding leaves of singular values that are zero is not energy
    enough = total.unsqueeze(-1) * min(energy, 1 - 1e-12)
    needed = (squares.cumsum(-1) < enough).sum(-1) + 1
    return max(1, min(int(needed.max()), most))


def _randomized(
    matrix: torch.Tensor, rank: int | None, energy: float | None, stream: Stream
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """U, S, V^T of the dominant part of a matrix (..., out, in), and the rank that is asked of it.

    For an energy without a rank the part is doubled until it holds the energy.
    """
    smaller = min(matrix.shape[-2:])
    total = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64).square()
    size = rank if rank is not None else 64
    while True:
        width = min(smaller, size + OVERSAMPLING)
        Y = matrix @ stream.gaussian(matrix.shape[-1], width).to(matrix)
        Q = torch.linalg.qr(Y).Q
        for _ in range(POWER_ITERATIONS):  # orthonormal at each step, or small singular values drown in rounding
            Q = torch.linalg.qr(matrix.transpose(-1, -2) @ Q).Q
            Q = torch.linalg.qr(matrix @ Q).Q
        U, S, Vt = torch.linalg.svd(Q.transpose(-1, -2) @ matrix, full_matrices=False)
        chosen = _rank_for(S[..., :size], rank, energy, total)
        if rank is not None or chosen < size or width == smaller:
            return Q @ U, S, Vt, chosen
        size *= 2


def ternary(update: Source, density: float | None = None) -> Update:
    """The signs of the entries of largest magnitude, and one scale: the mean of these magnitudes, of least error.

    Args:
        density: share of the entries that keep their sign, if as many are not zero; by default the one of least error.
            An update that has but one magnitude is exact where all of it is kept.
    """
    if isinstance(update, Ternary | Golomb):
        signs = update.signs()
        if density is None or int(signs.count_nonzero()) <= kept(signs.numel(), density):
            return update
    values = densify(update)
    if not values.ndim:
        return Dense(values)
    magnitudes = values.flatten().abs()
    count = _best_count(magnitudes) if density is None else min(kept(len(magnitudes), density), int(magnitudes.count_nonzero()))
    chosen = largest(magnitudes, count)
    return signs_at(values, chosen, float(magnitudes[chosen].double().mean()) if count else 0.0)


def _best_count(magnitudes: torch.Tensor) -> int:
    """How many of the largest to keep for the least error of signs times their mean: (sum of k)^2 / k at its greatest."""
    sums = magnitudes.sort(descending=True).values.double().cumsum(0)
    gains = sums.square() / torch.arange(1, len(sums) + 1, dtype=torch.float64, device=sums.device)
    return int(gains.argmax()) + 1 if len(sums) and float(sums[-1]) > 0 else 0


def quantized(update: Source, bits: int = 4, group: int = 64, codebook: Codebook = "uniform") -> Update:
    """The same form with its matrices and values as codes of ``bits`` bits, ``group`` of them with a scale in common.

    What else a form holds (indices, scales, magnitudes) stays; a form of which nothing can be coded stays as it is.
    """
    if not 1 <= bits <= 8:
        raise EspalierError(f"bits is {bits!r}; it must be from 1 to 8")
    at_least("group", group, 0)
    if isinstance(update, torch.Tensor):
        update = Dense(densify(update))
    elif isinstance(update, Quantized):
        update = update.inner
    tensors = update.tensors()
    fields = [name for name, tensor in tensors.items() if _is_codable(name, tensor)]
    return Quantized.of(update, bits, group, codebook, fields) if fields else update


def _is_codable(name: str, tensor: torch.Tensor) -> bool:
    last = name.rpartition(".")[2]
    return tensor.is_floating_point() and last not in ("scale", "mean", "magnitude") and (tensor.ndim >= 2 or last == "values")


# what every form needs


def _base_independent(update: Source, weight: torch.Tensor | None) -> Source:
    """The update itself, or made dense where it needs the base."""
    return densify(update, weight) if isinstance(update, torch.Tensor) or update.depends_on_base else update


def require_finite(update: Update) -> None:
    """Refuse an update of which any number is not finite.

    Raises:
        EspalierError: naming the tensor and the value.
    """
    for name, tensor in update.tensors().items():
        for part in tensor.reshape(-1).split(1 << 20) if tensor.is_floating_point() else ():
            finite = part.to(working_dtype(part)).isfinite()
            if not bool(finite.all()):
                raise EspalierError(f"{name} of the update holds {float(part[~finite][0])}; every number of it must be finite")


TARGETS: dict[str, tuple[Callable[..., Update], tuple[str, ...]]] = {
    "dense": (dense, ()),
    "lowrank": (low_rank, ("rank", "energy", "seed", "name")),
    "sparse": (sparse, ("density",)),
    "rows": (rows, ("density",)),
    "columns": (columns, ("density",)),
    "ternary": (ternary, ("density",)),
    "quantized": (quantized, ("bits", "group")),
}
"""What an update can be fitted to: the function of the form, and those options of :func:`fit` that it has."""
