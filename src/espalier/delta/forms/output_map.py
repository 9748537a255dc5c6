"""A low-rank map of a layer's output: of its weight, and of its bias with it."""

from __future__ import annotations

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.update import (
    Gain,
    Update,
    as_matrix,
    embedding_rows,
    expect,
    gain_like,
    linear_onto,
    matrix_shape,
    register_form,
    working_dtype,
)


@register_form
class OutputMap(Update):
    """``gain * B (A W)`` with B (..., out, r) and A (..., r, out); of a bias b ``gain * B (A b)``.

    Both together are ``y + gain * B A y`` of a layer's output y, the sequential branch of Hydra (arXiv:2309.06922).
    A convolution's weight is viewed as (out, in * kh * kw). What is updated is a bias where the factors have one
    dimension more than it: b (..., out).
    """

    form = "output_map"
    depends_on_base = True
    fields = ("B", "A")

    def __init__(self, B: torch.Tensor, A: torch.Tensor, shape: tuple[int, ...], gain: Gain = 1.0) -> None:
        self.B, self.A = B, A
        self.shape = tuple(shape)
        self.gain = gain

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        B, A = tensors["B"], tensors["A"]
        is_bias = B.ndim == len(shape) + 1
        *lead, outputs = shape if is_bias else matrix_shape(shape)[:-1]
        rank = A.shape[-2] if A.ndim >= 2 else -1
        return cls(expect("B", B, (*lead, outputs, rank)), expect("A", A, (*lead, rank, outputs)), shape, gain)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.to(working_dtype(weight))
        matrix = wide.unsqueeze(-1) if self.B.ndim > wide.ndim else as_matrix(wide)
        return ((self.B.to(wide) * self.gain) @ (self.A.to(wide) @ matrix)).reshape(weight.shape)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        y = base.linear(x)
        return linear_onto(functional.linear(y, self.A.to(y.dtype)) * gain_like(self.gain, y), self.B.to(y.dtype), y)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        hidden = embedding_rows(ids, self.B, rows) * gain_like(self.gain, rows)
        return rows + hidden @ (self.A.to(rows.dtype) @ base.dense().to(rows.dtype))
