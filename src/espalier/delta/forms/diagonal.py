"""Scaled rows and columns: the form of IA3."""

from __future__ import annotations

import torch

from espalier.delta.base import BaseWeight
from espalier.delta.forms.update import (
    Gain,
    Update,
    as_matrix,
    embedding_rows,
    expect_finite,
    interpolate,
    is_one,
    matrix_shape,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError


@register_form
class Diagonal(Update):
    """``W_new = diag(rows) W diag(columns)``; either may be absent: rows (..., out), columns (..., in).

    IA3 (arXiv:2205.05638) scales the outputs of keys and values and the inputs of the feed-forward's last matrix.
    A bias is not scaled. A weight of one dimension is scaled by ``rows`` alone. ``gain`` interpolates between W and
    W_new.
    """

    form = "diagonal"
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
            expect_finite("rows", rows, shape if len(shape) == 1 else matrix_shape(shape)[:-1])
        if columns is not None:
            *lead, _, inputs = matrix_shape(shape)
            expect_finite("columns", columns, (*lead, inputs))
        return cls(rows, columns, shape, gain)

    def _slice(self, start: int, stop: int) -> Update | None:
        return self._with_rows(stop - start, **({} if self.rows is None else {"rows": self.rows[start:stop]}))

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = scaled = as_matrix(weight.to(working_dtype(weight)))
        if self.rows is not None:
            scaled = scaled * (self.rows if weight.ndim == 1 else self.rows.unsqueeze(-1))
        if self.columns is not None:
            scaled = scaled * self.columns.unsqueeze(-2)
        return ((scaled - wide) * self.gain).reshape(weight.shape)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows, columns = self._changes(x)
        y = _times(base.linear(_times(x, columns)), rows)
        return y if self._is_alone else interpolate(base.linear(x), y, self.gain)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        old = new = base.rows(ids)
        rows, columns = self._changes(old)
        new = _times(_times(new, None if rows is None else embedding_rows(ids, rows.unsqueeze(-1), old)), columns)
        return new if self._is_alone else interpolate(old, new, self.gain)

    @property
    def _is_alone(self) -> bool:
        """Whether the gain can go into the scales: they stand on one side only, or the gain is one."""
        return self.rows is None or self.columns is None or is_one(self.gain)

    def _changes(self, like: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The scales less 1 in the dtype of ``like``, which would round them beside 1; the gain in them where it can be."""
        gain = self.gain if self._is_alone else 1.0

        def change(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else (gain * (values.to(working_dtype(values)) - 1)).to(like.dtype)

        return change(self.rows), change(self.columns)


def _times(x: torch.Tensor, change: torch.Tensor | None) -> torch.Tensor:
    """``x (1 + change)``."""
    return x if change is None else torch.addcmul(x, x, change)
