"""The product, entry by entry, of two low-rank matrices: the form of LoHa."""

from __future__ import annotations

import torch

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
class Hadamard(Update):
    """``gain * (B1 A1) * (B2 A2)``, entry by entry, with B1, B2 (..., out, rank) and A1, A2 (..., rank, in).

    Its rank is up to rank^2 (FedPara, arXiv:2108.06098; LoHa, arXiv:2309.14859). Where that is less than full, products
    go through the factors of that rank, and no matrix of the weight's size is made. ``shape`` is given for a convolution.
    """

    form = "hadamard"
    fields = ("B1", "A1", "B2", "A2")

    def __init__(
        self, B1: torch.Tensor, A1: torch.Tensor, B2: torch.Tensor, A2: torch.Tensor, gain: Gain = 1.0,
        shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.B1, self.A1 = B1, A1
        self.B2, self.A2 = B2, A2
        self.gain = gain
        self.shape = tuple(shape or (*B1.shape[:-1], A1.shape[-1]))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        rank = tensors["A1"].shape[-2] if tensors["A1"].ndim >= 2 else -1
        B1, B2 = (expect(name, tensors[name], (*lead, outputs, rank)) for name in ("B1", "B2"))
        A1, A2 = (expect(name, tensors[name], (*lead, rank, inputs)) for name in ("A1", "A2"))
        return cls(B1, A1, B2, A2, gain, shape)

    def _slice(self, start: int, stop: int) -> Update | None:
        return self._with_rows(stop - start, B1=self.B1[start:stop], B2=self.B2[start:stop])

    def low_rank(self) -> LowRank | None:
        """Of rank^2, by the products of the rows of B and of the columns of A, where that is less than full."""
        if self.A1.shape[-2] ** 2 >= min(matrix_shape(self.shape)[-2:]):
            return None
        wide = working_dtype(self.B1)
        B1, A1, B2, A2 = (t.to(wide) for t in (self.B1, self.A1, self.B2, self.A2))
        B = (B1.unsqueeze(-1) * B2.unsqueeze(-2)).flatten(-2)  # (..., out, rank^2)
        A = (A1.unsqueeze(-2) * A2.unsqueeze(-3)).flatten(-3, -2)  # (..., rank^2, in)
        return LowRank(B, A, self.gain, self.shape)

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.B1.to(dtype) @ self.A1.to(dtype)) * (self.B2.to(dtype) @ self.A2.to(dtype)) * self.gain

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        return self._dense(working_dtype(weight)).reshape(self.shape)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        if (factors := self.low_rank()) is not None:
            return factors.matmul(x, onto)
        return linear_onto(x, self._dense(working_dtype(x)).to(x.dtype), onto)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        first = embedding_rows(ids, self.B1, rows) @ self.A1.to(rows.dtype)
        second = embedding_rows(ids, self.B2, rows) @ self.A2.to(rows.dtype)
        return rows + first * second * gain_like(self.gain, rows)
