"""A low-rank update in a frozen basis of singular vectors: one number for each."""

from __future__ import annotations

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.low_rank import LowRank
from espalier.delta.forms.update import (
    Gain,
    Update,
    embedding_rows,
    expect,
    gain_like,
    linear_onto,
    matrix_shape,
    register_form,
    working_dtype,
)


@register_form
class SingularScale(Update):
    """``gain * U diag(s) V`` with U (..., out, r), s (..., r) and V (..., r, in); ``shape`` is given for a convolution.

    With U and V the singular vectors of W, s is what its singular values change by. The vectors are kept, not found
    again from W: a decomposition is not the same bits on every machine, and where singular values are equal its
    vectors are not even the same spaces. So the update needs no base. Products scale between the two factors, so
    the gradient of s costs r numbers a token.
    """

    form = "singular_scale"
    fields = ("U", "s", "V")

    def __init__(self, U: torch.Tensor, s: torch.Tensor, V: torch.Tensor, gain: Gain = 1.0, shape: tuple[int, ...] | None = None) -> None:
        self.U, self.s, self.V = U, s, V
        self.gain = gain
        self.shape = tuple(shape or (*U.shape[:-1], V.shape[-1]))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        s = expect("s", tensors["s"], (*lead, tensors["s"].shape[-1] if tensors["s"].ndim else -1))
        U = expect("U", tensors["U"], (*lead, outputs, s.shape[-1]))
        return cls(U, s, expect("V", tensors["V"], (*lead, s.shape[-1], inputs)), gain, shape)

    def _slice(self, start: int, stop: int) -> Update | None:
        return self._with_rows(stop - start, U=self.U[start:stop])

    def low_rank(self) -> LowRank | None:
        wide = working_dtype(self.U, self.s, self.V)
        return LowRank(self.U.to(wide) * self.s.to(wide).unsqueeze(-2), self.V, self.gain, self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = working_dtype(weight)
        return ((self.U.to(wide) * (self.s.to(wide) * self.gain).unsqueeze(-2)) @ self.V.to(wide)).reshape(self.shape)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        hidden = functional.linear(x, self.V.to(x.dtype)) * (self.s * self.gain).to(x.dtype)
        return linear_onto(hidden, self.U.to(x.dtype), onto)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        hidden = embedding_rows(ids, self.U, rows) * self.s.to(rows.dtype) * gain_like(self.gain, rows)
        return rows + hidden @ self.V.to(rows.dtype)
