"""Signs and scales: what an update is when its values are kept as one of three."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.bits import pack_bits, packed_size, slice_bits, unpack_bits
from espalier.delta.forms.update import (
    Gain,
    Update,
    expect_finite,
    gain_like,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError


@register_form
class Ternary(Update):
    """``gain * scale * sign`` with signs -1, 0 and 1 (ComPEFT, arXiv:2311.13171): stored, not trained.

    ``positive`` and ``negative`` are bitmaps, one bit an entry (..., bytes) for each matrix of experts, and never
    both set; ``scale`` is one number for each weight (experts,) or (), or one a row (..., out).
    """

    form = "ternary"
    fields = ("positive", "negative", "scale")

    def __init__(
        self, positive: torch.Tensor, negative: torch.Tensor, scale: torch.Tensor, shape: tuple[int, ...], gain: Gain = 1.0
    ) -> None:
        self.positive, self.negative = positive, negative
        self.scale = scale
        self.shape = tuple(shape)
        self.gain = gain

    @classmethod
    def of(cls, signs: torch.Tensor, scale: torch.Tensor, gain: Gain = 1.0) -> Ternary:
        """The update of signs (of any dtype, of the weight's shape) and their scale."""
        experts = signs.flatten(1) if signs.ndim == 3 else signs.reshape(1, -1)
        maps = [torch.stack([pack_bits(row) for row in (experts * sign > 0)]) for sign in (1, -1)]
        positive, negative = maps if signs.ndim == 3 else (maps[0][0], maps[1][0])
        return cls(positive, negative, scale, tuple(signs.shape), gain)

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        lead = shape[:1] if len(shape) == 3 else ()
        entries = math.prod(shape[len(lead) :])
        for name in ("positive", "negative"):
            bits = tensors[name]
            if bits.dtype != torch.uint8 or tuple(bits.shape) != (*lead, packed_size(entries)):
                raise EspalierError(f"{name} is {bits.dtype} of shape {tuple(bits.shape)}; it must be uint8 of shape {(*lead, packed_size(entries))}")
            if entries % 8 and bool((bits[..., -1] >> (entries % 8)).any()):
                raise EspalierError(f"{name} has bits set after its {entries} entries")
        if bool((tensors["positive"] & tensors["negative"]).any()):
            raise EspalierError("an entry is both positive and negative")
        scale = tensors["scale"]
        expect_finite("scale", scale, lead if scale.ndim == len(lead) else shape[: len(lead) + 1])
        return cls(tensors["positive"], tensors["negative"], scale, shape, gain)

    def _slice(self, start: int, stop: int) -> Update | None:
        row = math.prod(self.shape[1:])
        positive, negative = (slice_bits(bits, start * row, stop * row) for bits in (self.positive, self.negative))
        scale = self.scale[start:stop] if self.scale.ndim else self.scale
        return self._with_rows(stop - start, positive=positive, negative=negative, scale=scale)

    def signs(self) -> torch.Tensor:
        """-1, 0 and 1 (int8), of the weight's shape."""
        if len(self.shape) == 3:
            experts = [expert.signs() for expert in self.unbind() if isinstance(expert, Ternary)]
            return torch.stack(experts) if experts else torch.empty(self.shape, dtype=torch.int8)
        entries = math.prod(self.shape)
        positive, negative = (unpack_bits(bits, entries).view(torch.int8) for bits in (self.positive, self.negative))
        return (positive - negative).reshape(self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        scale = self.scale.to(working_dtype(weight)) * self.gain
        return self.signs() * scale.reshape((*scale.shape, *[1] * (len(self.shape) - scale.ndim)))

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        if self.scale.ndim:
            y = functional.linear(x, self.signs().to(x.dtype)) * (self.scale * self.gain).to(x.dtype)
        else:
            y = functional.linear(x * gain_like(self.gain, x), self.signs().to(x.dtype)) * self.scale.to(x.dtype)
        return y if onto is None else onto + y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        place = ids.unsqueeze(-1) * rows.shape[-1] + torch.arange(rows.shape[-1], device=ids.device)
        positive, negative = ((bits[place >> 3] >> (place & 7)) & 1 for bits in (self.positive, self.negative))
        scale = self.scale[ids].unsqueeze(-1) if self.scale.ndim else self.scale
        signs = positive.to(rows.dtype) - negative.to(rows.dtype)
        return rows + signs * (scale * self.gain).to(rows.dtype)
