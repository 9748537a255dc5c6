"""Rows and columns in another order."""

from __future__ import annotations

import torch

from espalier.delta.base import BaseWeight
from espalier.delta.forms.update import (
    Gain,
    Update,
    as_matrix,
    expect_distinct,
    expect_indices,
    interpolate,
    is_one,
    matrix_shape,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError


@register_form
class Permute(Update):
    """``W_new = W[rows][:, columns]``; either may be absent: rows (..., out), columns (..., in), permutations.

    A weight of one dimension has ``rows`` alone. A bias is left alone. ``gain`` interpolates between W and W_new.
    """

    form = "permute"
    depends_on_base = True
    exact_at_one = True
    fields = ("rows", "columns")

    def __init__(self, rows: torch.Tensor | None, columns: torch.Tensor | None, shape: tuple[int, ...], gain: Gain = 1.0) -> None:
        self.rows, self.columns = rows, columns
        self.shape = tuple(shape)
        self.gain = gain

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        rows, columns = tensors.get("rows"), tensors.get("columns")
        if rows is None and columns is None:
            raise EspalierError("there are neither rows nor columns")
        if rows is not None:
            *lead, outputs = shape if len(shape) == 1 else matrix_shape(shape)[:-1]
            _expect_permutation("rows", rows, lead, outputs)
        if columns is not None:
            *lead, _, inputs = matrix_shape(shape)
            _expect_permutation("columns", columns, lead, inputs)
        return cls(rows, columns, shape, gain)

    def _slice(self, start: int, stop: int) -> Update | None:
        return self._with_rows(stop - start) if self.rows is None else None

    def _permuted(self, weight: torch.Tensor) -> torch.Tensor:
        new = as_matrix(weight)
        if self.rows is not None:
            new = _take(new, self.rows, new.ndim - 1 if new.ndim == 1 else new.ndim - 2)
        if self.columns is not None:
            new = _take(new, self.columns, new.ndim - 1)
        return new.reshape(weight.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.to(working_dtype(weight))
        return (self._permuted(wide) - wide) * self.gain

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return self._permuted(weight) if is_one(self.gain) else super().apply(weight)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        y = base.linear(x if self.columns is None else x.index_select(-1, self.columns.argsort()))
        y = y if self.rows is None else y.index_select(-1, self.rows)
        return y if is_one(self.gain) else interpolate(base.linear(x), y, self.gain)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        new = base.rows(ids if self.rows is None else self.rows.long()[ids])
        new = new if self.columns is None else new.index_select(-1, self.columns)
        return new if is_one(self.gain) else interpolate(base.rows(ids), new, self.gain)


def _expect_permutation(what: str, index: torch.Tensor, lead: list[int], count: int) -> None:
    expect_indices(what, index, lead, count, what)
    if index.shape[-1] != count:
        raise EspalierError(f"{what} names {index.shape[-1]} of {count}; a permutation names each once")
    expect_distinct(what, index, what.removesuffix("s"))


def _take(weight: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """``weight`` with its dimension ``dim`` in the order of ``index``, which may have leading dimensions."""
    if index.ndim == 1:
        return weight.index_select(dim, index)
    other = -1 if dim == weight.ndim - 2 else -2
    return weight.gather(dim, index.long().unsqueeze(other).expand_as(weight))
