"""Magnitude and direction apart: the form of DoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from espalier.delta.base import BaseWeight
from espalier.delta.forms.composite import Composite, read_parts
from espalier.delta.forms.low_rank import LowRank
from espalier.delta.forms.update import (
    Gain,
    Update,
    as_matrix,
    embedding_rows,
    expect_finite,
    gain_like,
    matrix_shape,
    register_form,
    working_dtype,
)


@register_form
class Magnitude(Composite):
    """``magnitude * (W + inner) / ||W + inner||`` with the norm of each output row; magnitude (..., out).

    The decomposition of DoRA (arXiv:2402.09353, eq. 5) over any additive inner update. The norm is a
    constant of the step (its section 4.3: no gradient flows through it). For a low-rank inner update it
    is computed from ``||W||^2 + 2 B.(W A^T) + B.(B (A A^T))`` row by row, so the product ``B A`` is never formed.
    ``gain`` interpolates between W and the updated weight.
    """

    form = "magnitude"
    depends_on_base = True
    fields = ("magnitude",)

    def __init__(self, magnitude: torch.Tensor, inner: Update, gain: Gain = 1.0) -> None:
        super().__init__({"inner": inner}, gain)
        self.magnitude = magnitude

    @property
    def inner(self) -> Update:
        return self.parts["inner"]

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        inner = read_parts(tensors, _described(constants), shape, ["inner"], additive_in="magnitude")["inner"]
        return cls(expect_finite("magnitude", tensors["magnitude"], matrix_shape(shape)[:-1]), inner, gain)

    def _slice(self, start: int, stop: int) -> Update | None:
        parts = self._sliced_parts(start, stop)
        return None if parts is None else self._with_parts(parts, {"magnitude": self.magnitude[start:stop]})

    @staticmethod
    def row_norms(weight: torch.Tensor, inner: Update) -> torch.Tensor:
        """Norms of the rows of ``weight + inner``, (..., out), in float32 (float64 for float64), without gradient."""
        with torch.no_grad():
            return Magnitude._row_norms(weight, inner)

    @staticmethod
    def _row_norms(weight: torch.Tensor, inner: Update) -> torch.Tensor:
        wide = working_dtype(weight)
        if not isinstance(inner, LowRank):
            return torch.linalg.vector_norm(as_matrix(weight.to(wide) + inner.materialize(weight)), dim=-1)
        A, B, matrix = inner.A.to(wide), inner.B.to(wide) * inner.gain, as_matrix(weight)
        squares = torch.linalg.vector_norm(matrix, dim=-1, dtype=wide).square()
        cross = (B * (matrix @ inner.A.to(weight.dtype).transpose(-1, -2)).to(wide)).sum(-1)
        square = (B * (B @ (A @ A.transpose(-1, -2)))).sum(-1)
        return (squares + 2 * cross + square).clamp_min(0).sqrt()

    def _scale(self, weight: torch.Tensor) -> torch.Tensor:
        norms = self.row_norms(weight, self.inner).clamp_min(torch.finfo(torch.float32).tiny)
        # norms are rounded as the magnitude was, so that one that started as a norm divides to exactly one
        return self.magnitude.to(norms.dtype) / norms.to(self.magnitude.dtype).to(norms.dtype)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.to(working_dtype(weight))
        direction = as_matrix(wide + self.inner.materialize(wide))
        updated = (direction * self._scale(wide).unsqueeze(-1)).reshape(weight.shape)
        return (updated - wide) * self.gain

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        plain = base.linear(x)
        # W + gain (s (W + D) - W) = (1 + gain (s - 1)) W + gain s D
        scale = self._scale(base.dense())
        # what a row changes by is added, and not 1 beside it rounded to 16 bits
        plain, rows = torch.addcmul(plain, plain, (self.gain * (scale - 1)).to(plain.dtype)), self.gain * scale
        if isinstance(self.inner, LowRank):  # rows of a factor are fewer numbers than a product of all tokens
            return LowRank(self.inner.B * rows.unsqueeze(-1), self.inner.A, self.inner.gain).matmul(x, plain)
        return plain + self.inner.matmul(x) * rows.to(x.dtype)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        scale = embedding_rows(ids, self._scale(base.dense()).unsqueeze(-1), rows)
        return rows + ((self.inner.lookup(ids, base)) * scale - rows) * gain_like(self.gain, rows)


def _described(constants: Mapping[str, Any]) -> Mapping[str, Any]:
    """The constants as they are written now; deltas of version 0.1 spelled the one part out."""
    if "inner" not in constants:
        return constants
    return {"parts": {"inner": {"form": constants["inner"], "gain": constants["inner_gain"], "constants": constants}}}
