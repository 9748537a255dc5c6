"""A block repeated over the weight: the form of MiSS."""

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
from espalier.errors import EspalierError


@register_form
class Tiled(Update):
    """``gain * values[i mod b1, j mod b2]`` with values (..., b1, b2), repeated over W from its first entry on.

    The last repeats are cut where b1 or b2 divides no side. It is a low-rank update of rank b2 whose A is made of
    units (MiSS, arXiv:2409.15371): its product sums the input's chunks of b2 entries, and keeps those sums alone.
    """

    form = "tiled"
    fields = ("values",)

    def __init__(self, values: torch.Tensor, shape: tuple[int, ...], gain: Gain = 1.0) -> None:
        self.values = values
        self.shape = tuple(shape)
        self.gain = gain

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        values = tensors["values"]
        b1, b2 = values.shape[-2:] if values.ndim > 1 else (0, 0)
        if not (0 < b1 <= outputs and 0 < b2 <= inputs):
            raise EspalierError(f"a block of shape {tuple(values.shape)} does not fit a parameter of {outputs} x {inputs}")
        return cls(expect("values", values, (*lead, b1, b2)), shape, gain)

    def _slice(self, start: int, stop: int) -> Update | None:
        return self._with_rows(stop - start, values=self.values.roll(-start, -2)[: max(1, stop - start)])

    def low_rank(self) -> LowRank | None:
        *lead, outputs, inputs = matrix_shape(self.shape)
        unit = torch.eye(self.values.shape[-1], dtype=self.values.dtype, device=self.values.device)
        A = _repeat(unit, -1, inputs).expand(*lead, -1, -1)
        return LowRank(_repeat(self.values, -2, outputs), A, self.gain, self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        *_, outputs, inputs = matrix_shape(self.shape)
        values = self.values.to(working_dtype(weight)) * self.gain
        return _repeat(_repeat(values, -2, outputs), -1, inputs).reshape(self.shape)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        outputs = self.shape[0]
        folded = _fold(x, self.values.shape[-1]) * gain_like(self.gain, x)
        values = self.values.to(x.dtype)
        if len(values) == outputs:
            return linear_onto(folded, values, onto)
        y = _repeat(functional.linear(folded, values), -1, outputs)
        return y if onto is None else onto + y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        values = embedding_rows(ids % len(self.values), self.values, rows) * gain_like(self.gain, rows)
        return rows + _repeat(values, -1, rows.shape[-1])


def _repeat(values: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """``values`` repeated along a dimension (counted from the end) until there are ``size`` of them."""
    times = [1] * values.ndim
    times[dim] = -(-size // values.shape[dim])
    return values.repeat(times).narrow(dim, 0, size) if times[dim] != 1 else values.narrow(dim, 0, size)


def _fold(x: torch.Tensor, size: int) -> torch.Tensor:
    """The sum of the chunks of ``size`` entries of the last dimension, the last chunk perhaps a part of one."""
    rest = x.shape[-1] % size
    whole = x.shape[-1] - rest
    folded = x[..., :whole].unflatten(-1, (whole // size, size)).sum(-2)
    return folded + functional.pad(x[..., whole:], (0, size - rest)) if rest else folded
