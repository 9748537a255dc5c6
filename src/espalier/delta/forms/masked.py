"""Low-rank updates of a pruned matrix that leave its zeros where they are: at a mask, or as factors of its entries."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight, DenseBase
from espalier.delta.forms.bits import has_padding, packed_size, slice_bits
from espalier.delta.forms.update import (
    Gain,
    Update,
    as_matrix,
    as_rows,
    embedding_rows,
    expect,
    gain_like,
    matrix_shape,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError


def bitmaps(kept: torch.Tensor) -> torch.Tensor:
    """Which entries of matrices (..., out, in) are kept, as a bitmap of each: (..., bytes), uint8, the lowest bit first."""
    flat = kept.flatten(-2)
    octets = functional.pad(flat.to(torch.uint8), (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (octets << _places(kept)).sum(-1, dtype=torch.uint8)


def _places(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _is_kept(mask: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The inverse of :func:`bitmaps`: bool (..., out, in)."""
    bits = (mask.unsqueeze(-1) >> _places(mask)) & 1
    return bits.flatten(-2)[..., : outputs * inputs].unflatten(-1, (outputs, inputs)).bool()


class _Product(torch.autograd.Function):
    """``x @ D.T`` of a dense matrix D that is made of W, B and A, again in the backward pass: what is kept is what it is made of."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, B: torch.Tensor, A: torch.Tensor,
        mask: torch.Tensor | None, gain: Any,
    ) -> torch.Tensor:  # fmt: skip
        ctx.gain = gain
        ctx.save_for_backward(x, weight, B, A, mask)
        return functional.linear(x, _dense(weight, B, A, mask, gain, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight, B, A, mask = ctx.saved_tensors
        gradient = gradient.to(x.dtype)  # which autocast makes narrower
        by_x = gradient @ _dense(weight, B, A, mask, ctx.gain, x.dtype) if ctx.needs_input_grad[0] else None
        by_bias = as_rows(gradient).sum(0) if ctx.needs_input_grad[2] else None
        if not (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]):
            return by_x, None, by_bias, None, None, None, None
        wide = working_dtype(B)
        G = as_rows(gradient).t() @ as_rows(x)
        G = G.to(wide) * ctx.gain
        if mask is None:
            G = G * weight
        else:
            G = torch.where(_is_kept(mask, *G.shape), G, 0.0)
        return by_x, None, by_bias, (G @ A.to(wide).t()).to(B.dtype), (B.to(wide).t() @ G).to(A.dtype), None, None


def _dense(weight: torch.Tensor | None, B: torch.Tensor, A: torch.Tensor, mask: torch.Tensor | None, gain: Gain, dtype: torch.dtype) -> torch.Tensor:
    """``W + gain M * (B A)`` or, without a mask, ``W + gain W * (B A - 1)``; W may be left out at a mask. In ``dtype``."""
    wide = working_dtype(B, torch.empty(0, dtype=dtype))
    product = B.to(wide) @ A.to(wide)
    if mask is None:
        assert weight is not None
        return torch.addcmul(weight.to(wide), weight.to(wide), (product - 1) * gain).to(dtype)
    product = torch.where(_is_kept(mask, *product.shape), product * gain, 0.0)
    return (product if weight is None else weight.to(wide) + product).to(dtype)


@register_form
class MaskedLowRank(Update):
    """``gain * M * (B A)``, entry by entry: B (..., out, rank), A (..., rank, in), M a bitmap of each matrix, (..., bytes).

    Where the base is zero outside M, so is the updated weight, exactly (MaskLoRA of PERP, arXiv:2312.15230). The dense product
    is made again in the backward pass: training keeps x, the factors and a bit for each entry, and one matrix at a time.
    """

    form = "masked_low_rank"
    fields = ("B", "A", "mask")

    def __init__(self, B: torch.Tensor, A: torch.Tensor, mask: torch.Tensor, gain: Gain = 1.0, shape: tuple[int, ...] | None = None) -> None:
        self.B, self.A, self.mask = B, A, mask
        self.gain = gain
        self.shape = tuple(shape or (*B.shape[:-1], A.shape[-1]))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        B, A, mask = *_factors(tensors, shape), tensors["mask"]
        if mask.dtype != torch.uint8 or tuple(mask.shape) != (*lead, packed_size(outputs * inputs)):
            raise EspalierError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be a bitmap of {outputs} x {inputs} entries in bytes for each matrix")
        if mask.numel() and not mask.is_meta and any(has_padding(one, outputs * inputs) for one in mask.reshape(-1, mask.shape[-1])):
            raise EspalierError("mask has bits behind its last entry")
        return cls(B, A, mask, gain, tuple(shape))

    def _slice(self, start: int, stop: int) -> Update | None:
        row = math.prod(self.shape[1:])
        return self._with_rows(stop - start, B=self.B[start:stop], mask=slice_bits(self.mask, start * row, stop * row))

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = working_dtype(weight)
        product = (self.B.to(wide) @ self.A.to(wide)) * self.gain
        return torch.where(_is_kept(self.mask, *product.shape[-2:]), product, 0.0).reshape(self.shape)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        if not isinstance(base, DenseBase) or base.trains:
            return super().linear(x, base)
        return _Product.apply(x, base.dense(), base.bias, self.B, self.A, self.mask, self.gain)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        y = _Product.apply(x, None, None, self.B, self.A, self.mask, self.gain)
        return y if onto is None else onto + y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows, inputs = base.rows(ids), self.shape[-1]
        product = embedding_rows(ids, self.B, rows) @ self.A.to(rows.dtype) * gain_like(self.gain, rows)
        entries = ids.long().unsqueeze(-1) * inputs + torch.arange(inputs, device=ids.device)
        bits = (self.mask[entries // 8] >> (entries % 8).to(torch.uint8)) & 1
        return rows + torch.where(bits.bool(), product, 0.0)


@register_form
class ScaledLowRank(Update):
    """``W + gain * W * (B A - 1)``, entry by entry: at a gain of 1 ``W * (B A)``, B (..., out, rank) and A (..., rank, in).

    A zero of the base stays zero (ScaleLoRA of PERP, arXiv:2312.15230). Training keeps no dense matrix, as for
    :class:`MaskedLowRank`.
    """

    form = "scaled_low_rank"
    fields = ("B", "A")
    depends_on_base = True

    def __init__(self, B: torch.Tensor, A: torch.Tensor, gain: Gain = 1.0, shape: tuple[int, ...] | None = None) -> None:
        self.B, self.A = B, A
        self.gain = gain
        self.shape = tuple(shape or (*B.shape[:-1], A.shape[-1]))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        return cls(*_factors(tensors, shape), gain, tuple(shape))

    def _slice(self, start: int, stop: int) -> Update | None:
        return self._with_rows(stop - start, B=self.B[start:stop])

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = working_dtype(weight)
        return (as_matrix(weight).to(wide) * (self.B.to(wide) @ self.A.to(wide) - 1) * self.gain).reshape(self.shape)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        if base.trains:
            return functional.linear(x, self.apply(base.dense()).to(x.dtype), base.bias)
        return _Product.apply(x, base.dense(), base.bias, self.B, self.A, None, self.gain)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        factor = embedding_rows(ids, self.B, rows) @ self.A.to(rows.dtype) - 1
        return rows + rows * factor * gain_like(self.gain, rows)


def _factors(tensors: Any, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    *lead, outputs, inputs = matrix_shape(shape)
    rank = tensors["A"].shape[-2] if tensors["A"].ndim >= 2 else -1
    return expect("B", tensors["B"], (*lead, outputs, rank)), expect("A", tensors["A"], (*lead, rank, inputs))
