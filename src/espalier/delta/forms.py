"""The forms of an update: small immutable objects of tensors, one per parameter.

Shapes are logical: the weight W is ``(..., out, in)``, with leading dimensions for fused experts; a form's
tensors carry the same leading dimensions and ``update[e]`` is the update of expert e. ``gain`` is one 0-d
tensor that scales the update, so that changing it recompiles nothing; at 0 the base is restored.

Contract: ``materialize`` is the law; ``linear``, ``matmul`` and ``lookup`` are accelerators that the tests
hold equal to it. Arithmetic follows the dtype of ``x`` (products) or of the weight, at least float32
(``materialize``, ``apply``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.errors import EspalierError

Gain = torch.Tensor | float


def working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Float64 when any of them is, else float32: the dtype in which updates are materialised."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class Update:
    """An update to one parameter: see the module's docstring for the contract."""

    form: ClassVar[str]
    """Name on disk."""
    depends_on_base: ClassVar[bool] = False
    """Whether the update needs the base weight; such forms have no ``matmul``."""
    exact_at_one: ClassVar[bool] = False
    """Whether a gain that is the Python number 1.0 gives the updated weight without any arithmetic."""
    fields: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors, each an attribute."""
    shared: Mapping[str, str] = {}
    """Field -> name of the factor it shares with other parameters' updates; empty for private ones."""

    shape: tuple[int, ...]
    gain: Gain

    @property
    def dtype(self) -> torch.dtype:
        return next(t.dtype for t in self.tensors().values() if t.is_floating_point())

    @property
    def nbytes(self) -> int:
        """Bytes of the private tensors; shared factors are counted once by their delta."""
        return sum(t.numel() * t.element_size() for n, t in self.tensors().items() if n not in self.shared)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that define the update, by field name; inverse of :meth:`from_tensors`."""
        return {name: getattr(self, name) for name in self.fields}

    def constants(self) -> dict[str, Any]:
        """What else defines the update, as JSON values."""
        return {}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, Any], shape: tuple[int, ...], gain: Gain
    ) -> Update:
        """Rebuild an update of a weight of ``shape``.

        Raises:
            EspalierError: when the tensors' shapes do not fit ``shape``.
        """
        raise NotImplementedError

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Update:
        """The same update over other tensors of the same meaning (moved, sliced, detached): nothing is checked."""
        other = copy.copy(self)
        for name, tensor in tensors.items():
            setattr(other, name, tensor)
        return other

    def unbind(self) -> list[Update]:
        """The updates of all leading indices: one autograd node per tensor, however many experts there are."""
        parts = {name: tensor.unbind(0) for name, tensor in self.tensors().items()}
        experts = [self.with_tensors({n: t[e] for n, t in parts.items()}) for e in range(self.shape[0])]
        for expert in experts:
            expert.shape = self.shape[1:]
        return experts

    def __getitem__(self, expert: int) -> Update:
        """The update of one leading index."""
        return self.unbind()[expert]

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        """The dense update, of the weight's logical shape, in float32 (float64 for a float64 weight)."""
        raise NotImplementedError

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The updated weight, rounded once, in the weight's dtype."""
        return (weight.to(working_dtype(weight)) + self.materialize(weight)).to(weight.dtype)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ update.T`` without building the update, added to ``onto`` when given (in x's dtype)."""
        raise NotImplementedError

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        """``x @ W_new.T`` given the base; forms that depend on it override this and call ``base.linear`` once."""
        return self.matmul(x, base.linear(x))

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        """Rows ``W_new[ids]`` of an embedding."""
        return functional.embedding(ids, self.apply(base.dense()))


def _expect(what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise EspalierError(f"{what} has shape {tuple(tensor.shape)}; the parameter needs {shape}")
    if not tensor.is_floating_point():
        raise EspalierError(f"{what} is {tensor.dtype}; it must be floating point")
    return tensor


def _expect_indices(what: str, index: torch.Tensor, lead: Sequence[int], count: int, things: str) -> torch.Tensor:
    """Indices of shape (*lead, any number) that lie in ``range(count)``, as int64."""
    if index.dtype not in (torch.int32, torch.int64) or index.ndim != len(lead) + 1 or index.shape[:-1] != tuple(lead):
        raise EspalierError(f"{what} is {index.dtype} of shape {tuple(index.shape)}; it must be int32 or int64, ({', '.join(map(str, (*lead, '...')))})")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= count):
        raise EspalierError(f"{what} reaches from {int(index.min())} to {int(index.max())}; there are {count} {things}")
    return index.long()


def _rows(ids: torch.Tensor, table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return functional.embedding(ids, table).to(like.dtype)


class Dense(Update):
    """``gain * values``, values of the weight's shape."""

    form = "dense"
    fields = ("values",)

    def __init__(self, values: torch.Tensor, gain: Gain = 1.0) -> None:
        self.values = values
        self.gain = gain
        self.shape = tuple(values.shape)

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        return cls(_expect("values", tensors["values"], shape), gain)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        return self.values.to(working_dtype(weight)) * self.gain

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        y = functional.linear(x * _as(self.gain, x), self.values.to(x.dtype))
        return y if onto is None else onto + y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        return rows + _rows(ids, self.values, rows) * _as(self.gain, rows)


class Replace(Update):
    """``W + gain * (values - W)``: values set, not added. With gain 1 it is exact, whatever the base held.

    Trained values may be of higher precision than the weight; the layer then computes with them rounded
    to the dtype of its input.
    """

    form = "replace"
    depends_on_base = True
    exact_at_one = True
    fields = ("values",)

    def __init__(self, values: torch.Tensor, gain: Gain = 1.0) -> None:
        self.values = values
        self.gain = gain
        self.shape = tuple(values.shape)

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        return cls(_expect("values", tensors["values"], shape), gain)

    @property
    def _is_plain(self) -> bool:
        return isinstance(self.gain, float) and self.gain == 1.0

    def _between(self, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        gain = self.gain if isinstance(self.gain, torch.Tensor) else torch.tensor(self.gain)
        return torch.lerp(weight, values, gain.to(weight))  # lerp is exact at both ends

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.to(working_dtype(weight))
        return (self.values.to(wide) - wide) * self.gain

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        if self._is_plain:
            return self.values.to(weight.dtype)
        wide = working_dtype(weight)
        return self._between(weight.to(wide), self.values.to(wide)).to(weight.dtype)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        return functional.linear(x, self.values.to(x.dtype) if self._is_plain else self.apply(base.dense()), base.bias)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        if self._is_plain:
            return functional.embedding(ids, self.values).to(base.dtype)
        rows = base.rows(ids)
        return self._between(rows, _rows(ids, self.values, rows))


class LowRank(Update):
    """``gain * B @ A`` with B (..., out, rank) and A (..., rank, in)."""

    form = "low_rank"
    fields = ("B", "A")

    def __init__(self, B: torch.Tensor, A: torch.Tensor, gain: Gain = 1.0) -> None:
        self.B = B
        self.A = A
        self.gain = gain
        self.shape = (*B.shape[:-1], A.shape[-1])

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = shape
        rank = tensors["A"].shape[-2] if tensors["A"].ndim >= 2 else -1
        B = _expect("B", tensors["B"], (*lead, outputs, rank))
        return cls(B, _expect("A", tensors["A"], (*lead, rank, inputs)), gain)

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = working_dtype(weight)
        return (self.B.to(wide) * self.gain) @ self.A.to(wide)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        hidden = functional.linear(x, self.A.to(x.dtype)) * _as(self.gain, x)
        return _linear_onto(hidden, self.B.to(x.dtype), onto)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        hidden = _rows(ids, self.B, rows) * _as(self.gain, rows)
        return rows + hidden @ self.A.to(rows.dtype)


class Pooled(Update):
    """``gain * B @ A`` whose vectors are concatenations of shards of shared pools.

    B (shards, out / l) and A (shards, in / l) are pools that other parameters' updates share; row j of the
    rank-r factor A is the concatenation of ``A[index_A[..., j, :]]``, column j of B of ``B[index_B[..., j, :]]``,
    with indices of shape (..., rank, l). It is how such an update is stored; products assemble the factors.
    """

    form = "pooled"
    fields = ("B", "A", "index_B", "index_A")

    def __init__(
        self, B: torch.Tensor, A: torch.Tensor, index_B: torch.Tensor, index_A: torch.Tensor, gain: Gain = 1.0,
        shared: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.B, self.A = B, A
        self.index_B, self.index_A = index_B, index_A
        self.gain = gain
        self.shared = shared or {}
        shards = index_A.shape[-1]
        self.shape = (*index_A.shape[:-2], shards * B.shape[-1], shards * A.shape[-1])

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        for factor in "AB":
            index, pool = tensors[f"index_{factor}"], tensors[factor]
            if pool.ndim != 2 or index.ndim != len(shape):
                raise EspalierError(f"pool {factor} and its index have shapes {tuple(pool.shape)} and {tuple(index.shape)}")
            _expect(factor, pool, tuple(pool.shape))
            _expect_indices(f"index_{factor}", index, index.shape[:-1], len(pool), "shards in its pool")
        made = cls(tensors["B"], tensors["A"], tensors["index_B"], tensors["index_A"], gain)
        if made.shape != tuple(shape) or tensors["index_A"].shape != tensors["index_B"].shape:
            raise EspalierError(f"the pools make an update of shape {made.shape}; the parameter needs {tuple(shape)}")
        return made

    def low_rank(self) -> LowRank:
        """The same update with its factors assembled."""
        A = self.A[self.index_A.long()].flatten(-2)
        B = self.B[self.index_B.long()].flatten(-2).transpose(-1, -2)
        return LowRank(B, A, self.gain)

    def unbind(self) -> list[Update]:
        return self.low_rank().unbind()

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        return self.low_rank().materialize(weight)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        return self.low_rank().matmul(x, onto)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        return self.low_rank().lookup(ids, base)


class Columns(Update):
    """``gain * values`` added to the columns ``index`` of W: values (..., out, k), index (..., k) int64, distinct.

    The columns are read from a slice of the input, so training saves k features of it, not all.
    """

    form = "columns"
    fields = ("values", "index")

    def __init__(self, values: torch.Tensor, index: torch.Tensor, inputs: int, gain: Gain = 1.0) -> None:
        self.values = values
        self.index = index
        self.inputs = inputs
        self.gain = gain
        self.shape = (*values.shape[:-1], inputs)

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = shape
        index = _expect_indices("index", tensors["index"], lead, inputs, "columns")
        _expect("values", tensors["values"], (*lead, outputs, index.shape[-1]))
        if bool((index.sort(-1).values.diff(dim=-1) == 0).any()):
            raise EspalierError("index names a column twice")
        return cls(tensors["values"], index, inputs, gain)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        values = self.values.to(working_dtype(weight)) * self.gain
        dense = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        return dense.scatter(-1, self.index.unsqueeze(-2).expand_as(values), values)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        return _linear_onto(x.index_select(-1, self.index) * _as(self.gain, x), self.values.to(x.dtype), onto)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        values = _rows(ids, self.values, rows) * _as(self.gain, rows)
        return rows.index_add(-1, self.index, values)


class Sparse(Update):
    """``gain * values`` added at flat positions ``index`` of W: values (n,), index (n,) int64, sorted, distinct."""

    form = "sparse"
    fields = ("values", "index")

    def __init__(self, values: torch.Tensor, index: torch.Tensor, shape: tuple[int, ...], gain: Gain = 1.0) -> None:
        self.values = values
        self.index = index
        self.shape = tuple(shape)
        self.gain = gain

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        index = _expect_indices("index", tensors["index"], (), math.prod(shape), "entries")
        _expect("values", tensors["values"], (len(index),))
        if bool((index.diff() <= 0).any()):
            raise EspalierError("index is not sorted, or names an entry twice")
        return cls(tensors["values"], index, tuple(shape), gain)

    def unbind(self) -> list[Update]:
        size = torch.Size(self.shape[1:]).numel()
        counts = torch.bincount(self.index // size, minlength=self.shape[0]).tolist()
        parts = zip(self.values.split(counts), self.index.split(counts), strict=True)
        return [Sparse(v, i - e * size, self.shape[1:], self.gain) for e, (v, i) in enumerate(parts)]

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        values = self.values.to(working_dtype(weight)) * self.gain
        dense = torch.zeros(torch.Size(self.shape).numel(), dtype=values.dtype, device=values.device)
        return dense.index_put((self.index,), values).reshape(self.shape)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        # one transient dense update; a sparse product would gather a float per entry and token
        y = functional.linear(x, self.materialize(x).to(x.dtype))
        return y if onto is None else onto + y


class Magnitude(Update):
    """``magnitude * (W + inner) / ||W + inner||`` with the norm of each output row; magnitude (..., out).

    The decomposition of DoRA (arXiv:2402.09353, eq. 5) over any additive inner update. The norm is a
    constant of the step (its section 4.3: no gradient flows through it). For a low-rank inner update it
    is computed from ``||W||^2 + 2 B.(W A^T) + B.(B (A A^T))`` row by row, so the product ``B A`` is never formed.
    ``gain`` interpolates between W and the updated weight.
    """

    form = "magnitude"
    depends_on_base = True

    def __init__(self, magnitude: torch.Tensor, inner: Update, gain: Gain = 1.0) -> None:
        self.magnitude = magnitude
        self.inner = inner
        self.gain = gain
        self.shape = inner.shape

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"magnitude": self.magnitude, **{f"inner.{n}": t for n, t in self.inner.tensors().items()}}

    def constants(self) -> dict[str, Any]:
        return {"inner": self.inner.form, "inner_gain": float(self.inner.gain), **self.inner.constants()}

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Magnitude:
        tensors = {**self.tensors(), **tensors}
        inner = self.inner.with_tensors({n[6:]: t for n, t in tensors.items() if n.startswith("inner.")})
        return Magnitude(tensors["magnitude"], inner, self.gain)

    def unbind(self) -> list[Update]:
        inner = self.inner.unbind()
        return [Magnitude(m, i, self.gain) for m, i in zip(self.magnitude.unbind(0), inner, strict=True)]

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        inner_tensors = {n.removeprefix("inner."): t for n, t in tensors.items() if n.startswith("inner.")}
        kind = form(constants["inner"])
        if kind.depends_on_base:
            raise EspalierError(f"the form {kind.form!r} depends on the base and cannot stand inside a magnitude")
        inner = kind.from_tensors(inner_tensors, constants, shape, float(constants["inner_gain"]))
        return cls(_expect("magnitude", tensors["magnitude"], shape[:-1]), inner, gain)

    @staticmethod
    def row_norms(weight: torch.Tensor, inner: Update) -> torch.Tensor:
        """Norms of the rows of ``weight + inner``, (..., out), in float32 (float64 for float64), without gradient."""
        with torch.no_grad():
            return Magnitude._row_norms(weight, inner)

    @staticmethod
    def _row_norms(weight: torch.Tensor, inner: Update) -> torch.Tensor:
        wide = working_dtype(weight)
        if not isinstance(inner, LowRank):
            return torch.linalg.vector_norm(weight.to(wide) + inner.materialize(weight), dim=-1)
        A, B = inner.A.to(wide), inner.B.to(wide) * inner.gain
        squares = torch.linalg.vector_norm(weight, dim=-1, dtype=wide).square()
        cross = (B * (weight @ inner.A.to(weight.dtype).transpose(-1, -2)).to(wide)).sum(-1)
        square = (B * (B @ (A @ A.transpose(-1, -2)))).sum(-1)
        return (squares + 2 * cross + square).clamp_min(0).sqrt()

    def _scale(self, weight: torch.Tensor) -> torch.Tensor:
        norms = self.row_norms(weight, self.inner).clamp_min(torch.finfo(torch.float32).tiny)
        # norms are rounded as the magnitude was, so that one that started as a norm divides to exactly one
        return self.magnitude.to(norms.dtype) / norms.to(self.magnitude.dtype).to(norms.dtype)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.to(working_dtype(weight))
        updated = (wide + self.inner.materialize(wide)) * self._scale(wide).unsqueeze(-1)
        return (updated - wide) * self.gain

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        plain = base.linear(x)
        # W + gain (s (W + D) - W) = (1 + gain (s - 1)) W + gain s D
        scale = self._scale(base.dense())
        return plain * (1 + self.gain * (scale - 1)).to(x.dtype) + self.inner.matmul(x) * (self.gain * scale).to(x.dtype)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        scale = _rows(ids, self._scale(base.dense()).unsqueeze(-1), rows)
        return rows + ((self.inner.lookup(ids, base)) * scale - rows) * _as(self.gain, rows)


def _as(gain: Gain, like: torch.Tensor) -> Gain:
    """A gain that multiplies ``like`` without changing its dtype."""
    return gain.to(like.dtype) if isinstance(gain, torch.Tensor) else gain


def _linear_onto(x: torch.Tensor, weight: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T`` added to ``onto`` in one pass over it."""
    if onto is None:
        return functional.linear(x, weight)
    flat = torch.addmm(onto.reshape(-1, onto.shape[-1]), x.reshape(-1, x.shape[-1]), weight.t())
    return flat.reshape(onto.shape)


FORMS: dict[str, type[Update]] = {}


def register_form(cls: type[Update]) -> type[Update]:
    """Make a form known to the delta reader under its ``form`` name."""
    FORMS[cls.form] = cls
    return cls


for _form in (Dense, Replace, LowRank, Pooled, Columns, Sparse, Magnitude):
    register_form(_form)


def form(name: str) -> type[Update]:
    """The form called ``name``.

    Raises:
        EspalierError: when this version knows no such form.
    """
    if name not in FORMS:
        raise EspalierError(f"unknown form {name!r}; this version knows: {', '.join(sorted(FORMS))}")
    return FORMS[name]
