"""A product with a weight and a thin update on it, as one function."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.update import Gain, Update, as_rows, gain_like


class _Product(torch.autograd.Function):
    """``x @ (W + gain * B @ A).T + bias``; the update's part is added, to the output and to x's gradient, where the base's part lies.

    A is (rank, in), or, of integers, the columns (rank,) of x that it picks; then a slice of x is saved, and not x.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, B: torch.Tensor, A: torch.Tensor, bias: torch.Tensor | None, gain: Gain, base: BaseWeight
    ) -> torch.Tensor:
        y = base.linear(x)  # which autocast makes narrower
        ctx.gain, ctx.base, ctx.dtypes = gain, base, (B.dtype, A.dtype)
        B = B.to(y.dtype)
        if A.is_floating_point():
            x, A = x.to(y.dtype), A.to(y.dtype)
            inner = functional.linear(x, A)
        else:
            inner = x.index_select(-1, A)
        inner = as_rows(inner).to(y.dtype).mul_(gain_like(gain, y))
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, inner, B, A)
        return as_rows(y).addmm_(inner, B.T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        x, inner, B, A = ctx.saved_tensors
        of_x = of_B = of_A = of_bias = None
        needs_x, needs_B, needs_A, needs_bias, *_ = ctx.needs_input_grad
        rows = as_rows(gradient)
        if needs_x or needs_A:
            part = (rows @ B).mul_(gain_like(ctx.gain, rows))
        if needs_x:
            of_x = rows @ ctx.base.dense().to(rows.dtype)
            if A.is_floating_point():
                of_x.addmm_(part, A)
            else:  # index_add_ of 16-bit numbers takes five times as long
                of_x.index_copy_(-1, A.long(), part.add_(of_x.index_select(-1, A)))
            of_x = of_x.view(*gradient.shape[:-1], of_x.shape[-1])
        if needs_B:  # in this order, and not as it is laid out, the product takes half the time
            of_B = (inner.T @ rows).T.to(ctx.dtypes[0], memory_format=torch.contiguous_format)
        if needs_A:
            of_A = (part.T @ as_rows(x)).to(ctx.dtypes[1])
        if needs_bias:
            of_bias = rows.sum(0)
        return of_x, of_B, of_A, of_bias, None, None


def thin_product(x: torch.Tensor, base: BaseWeight, update: Update, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """``update.linear(x, base)`` of an update that is ``gain * B @ A``.

    Under compilation, and where the gain or the base trains, it is left to autograd.

    Args:
        x: (..., in).
        base: of shape (out, in).
        update: whose ``gain`` and ``matmul`` are used.
        B: (out, rank).
        A: (rank, in), or the columns (rank,) of x that it picks.
    """
    gain = update.gain
    trained = isinstance(gain, torch.Tensor) and gain.requires_grad
    if torch.compiler.is_compiling() or trained or base.trains:
        return update.matmul(x, base.linear(x))
    return _Product.apply(x, B, A, base.bias, gain, base)
