"""A weight that is made of a low-rank and a sparse part alone, in the place of whatever the base held.

What a model is trained from nothing with (SLTrain, arXiv:2406.02214; low-rank pretraining), where an update on a
base would keep a dense weight beside its factors. The dense weight exists only while it is multiplied with.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.support import AtSupport, entries_of_rows
from espalier.delta.forms.update import (
    Gain,
    Update,
    expect,
    interpolate,
    is_one,
    matrix_shape,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError


@register_form
class Made(AtSupport):
    """``W + gain * (scale * B A + S - W)``: B (..., out, rank), A (..., rank, in), and S, which is zero but for values.

    ``values`` (n,) stand at the flat positions ``index`` (n,), strictly increasing; without them S is zero. With a gain
    that is the number 1.0 nothing of the base is left. Products with S build the dense weight in the dtype of their input
    and build it again in the backward pass: what is kept between the two are the input and the tensors above.
    """

    form = "made"
    fields = ("B", "A", "values", "index")  # type: ignore[assignment]
    depends_on_base = True
    exact_at_one = True
    ignores_base = True

    def __init__(
        self, B: torch.Tensor, A: torch.Tensor, values: torch.Tensor | None = None, index: torch.Tensor | None = None,
        scale: float = 1.0, gain: Gain = 1.0, shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.B, self.A = B, A
        self.values, self.index = values, index  # type: ignore[assignment]
        self.mask = None
        self.scale = scale
        self.gain = gain
        self.shape = tuple(shape or (*B.shape[:-1], A.shape[-1]))

    def constants(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        rank = tensors["A"].shape[-2] if tensors["A"].ndim >= 2 else -1
        B, A = expect("B", tensors["B"], (*lead, outputs, rank)), expect("A", tensors["A"], (*lead, rank, inputs))
        scale = constants["scale"]
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise EspalierError(f"scale is {scale!r}; it must be a finite number")
        if "values" in tensors or "index" in tensors:
            expect("values", tensors["values"], tensors["values"].shape)
            cls.check_support({name: tensors[name] for name in ("values", "index")}, shape)
        return cls(B, A, tensors.get("values"), tensors.get("index"), float(scale), gain, shape)

    def unbind(self) -> list[Update]:
        if self.values is None:
            return Update.unbind(self)
        experts = super().unbind()
        for expert, B, A in zip(experts, self.B.unbind(0), self.A.unbind(0), strict=True):
            expert.B, expert.A = B, A  # type: ignore[attr-defined]
        return experts

    def _slice(self, start: int, stop: int) -> Update | None:
        part = self._with_rows(stop - start) if self.values is None else super()._slice(start, stop)
        part.B = self.B[start:stop]  # type: ignore[union-attr]
        return part

    def _whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that is made, in that dtype."""
        made = (self.B.to(dtype) * self.scale) @ self.A.to(dtype)  # which autocast makes narrower
        if self.values is not None:
            assert self.index is not None
            made = made.flatten().index_add(0, self.index, self.values.to(made.dtype))
        return made.reshape(self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = working_dtype(weight)
        return (self._whole(wide) - weight.to(wide)) * self.gain

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        made = self._whole(working_dtype(weight))
        return (made if is_one(self.gain) else interpolate(weight.to(made.dtype), made, self.gain)).to(weight.dtype)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        if not is_one(self.gain):
            return functional.linear(x, self.apply(base.dense()).to(x.dtype), base.bias)
        if self.values is None:
            return functional.linear(functional.linear(x, self.A.to(x.dtype)) * self.scale, self.B.to(x.dtype), base.bias)
        y = _Product.apply(x, self.B, self.A, self.values, self.index, self.scale)
        return y if base.bias is None else y + base.bias

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        if self.values is not None and torch.compiler.is_compiling():  # how many entries the rows have is no shape of a graph
            return super().lookup(ids, base)
        made = functional.embedding(ids, self.B).to(base.dtype) * self.scale @ self.A.to(base.dtype)
        if self.values is not None:
            place, entry = entries_of_rows(self.positions, ids.flatten(), made.shape[-1])
            made = made.flatten().index_add(0, place, self.values[entry].to(made.dtype)).reshape(made.shape)
        return made if is_one(self.gain) else interpolate(base.rows(ids), made, self.gain)


class _Product(torch.autograd.Function):
    """``x @ (scale B A + S).T``, for which the dense weight is built in both passes and kept in neither."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, B: torch.Tensor, A: torch.Tensor, values: torch.Tensor, index: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, B, A, values, index)
        ctx.scale = scale
        return functional.linear(x, _dense(x.dtype, B, A, values, index, scale))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, B, A, values, index = ctx.saved_tensors
        dtype, scale = x.dtype, ctx.scale
        gradient = gradients[0].to(dtype)  # which autocast makes narrower
        of_x = gradient @ _dense(dtype, B, A, values, index, scale) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:4]):
            return of_x, None, None, None, None, None
        of_W = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # (out, in)
        of_B = (of_W @ A.to(dtype).T).mul_(scale).to(B.dtype)
        of_A = ((B.to(dtype) * scale).T @ of_W).to(A.dtype)
        return of_x, of_B, of_A, of_W.flatten().index_select(0, index).to(values.dtype), None, None


def _dense(dtype: torch.dtype, B: torch.Tensor, A: torch.Tensor, values: torch.Tensor, index: torch.Tensor, scale: float) -> torch.Tensor:
    made = (B.to(dtype) * scale) @ A.to(dtype)
    made.view(-1).index_add_(0, index, values.to(made.dtype))
    return made
