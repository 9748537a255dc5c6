"""Dense updates, added or set, and values set at a support."""

from __future__ import annotations

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.support import AtSupport, entries_of_rows, put
from espalier.delta.forms.update import (
    Gain,
    Update,
    embedding_rows,
    expect,
    expect_shape,
    gain_like,
    interpolate,
    is_one,
    register_form,
    sets_integers,
    working_dtype,
)
from espalier.errors import EspalierError


@register_form
class Dense(Update):
    """``gain * values``, values of the weight's shape."""

    form = "dense"
    fields = ("values",)

    def __init__(self, values: torch.Tensor, gain: Gain = 1.0) -> None:
        self.values = values
        self.gain = gain
        self.shape = tuple(values.shape)

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        return cls(expect("values", tensors["values"], shape), gain)

    def _slice(self, start: int, stop: int) -> Update | None:
        return Dense(self.values[start:stop], self.gain)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        return self.values.to(working_dtype(weight)) * self.gain

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        y = functional.linear(x * gain_like(self.gain, x), self.values.to(x.dtype))
        return y if onto is None else onto + y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        return rows + embedding_rows(ids, self.values, rows) * gain_like(self.gain, rows)


@register_form
class Replace(AtSupport):
    """``W + gain * (values - W)``: values set, not added, everywhere or at a support, whatever the base held.

    Values are of the weight's shape, or (n,) at flat positions ``index`` (n,) or ``mask`` (a bitmap), with the
    weight's ``shape`` given. With a gain that is the number 1.0 nothing is computed: values of the weight's dtype,
    which may be any that files hold, come out bit for bit. Trained values may be of higher precision than the
    weight; the layer then computes with them rounded to the dtype of its input.
    """

    form = "replace"
    depends_on_base = True
    exact_at_one = True

    def __init__(
        self, values: torch.Tensor, gain: Gain = 1.0, *, index: torch.Tensor | None = None, mask: torch.Tensor | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.values = values
        self.gain = gain
        self.index, self.mask = index, mask
        self.shape = tuple(values.shape if shape is None else shape)
        self.ignores_base = index is None and mask is None

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        index, mask = tensors.get("index"), tensors.get("mask")
        if index is None and mask is None:
            return cls(expect_shape("values", tensors["values"], shape), gain)
        cls.check_support(tensors, shape)
        return cls(tensors["values"], gain, index=index, mask=mask, shape=tuple(shape))

    def unbind(self) -> list[Update]:
        return Update.unbind(self) if self.ignores_base else super().unbind()

    def _slice(self, start: int, stop: int) -> Update | None:
        return Replace(self.values[start:stop], self.gain) if self.ignores_base else super()._slice(start, stop)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = working_dtype(weight)
        if self.ignores_base:
            return (self.values.to(wide) - weight.to(wide)) * self.gain
        change = (self.values.to(wide) - weight.to(wide).reshape(-1)[self.positions]) * self.gain
        return change.new_zeros(weight.numel()).index_put((self.positions,), change).reshape(weight.shape)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        if not (weight.is_floating_point() and self.values.is_floating_point()):
            return self._apply_integers(weight)
        values = self.values.to(weight.dtype) if is_one(self.gain) else self._mixed(weight)
        return values if self.ignores_base else put(weight, self.positions, values)

    def _apply_integers(self, weight: torch.Tensor) -> torch.Tensor:
        if self.values.dtype != weight.dtype:
            raise EspalierError(f"values of {self.values.dtype} cannot be set in a weight of {weight.dtype}")
        if not sets_integers(self.gain, weight.dtype):
            return weight
        return self.values if self.ignores_base else put(weight, self.positions, self.values)

    def _mixed(self, weight: torch.Tensor) -> torch.Tensor:
        """What takes the place of W, or of its touched entries, at a gain other than one; in W's dtype."""
        wide = weight.to(working_dtype(weight))
        if not self.ignores_base:
            wide = wide.reshape(-1)[self.positions]
        return interpolate(wide, self.values.to(wide.dtype), self.gain).to(weight.dtype)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        plain = self.ignores_base and is_one(self.gain)
        return functional.linear(x, (self.values if plain else self.apply(base.dense())).to(x.dtype), base.bias)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        if self.ignores_base and is_one(self.gain):
            return functional.embedding(ids, self.values).to(base.dtype)
        rows = base.rows(ids)
        if self.ignores_base:
            return interpolate(rows, embedding_rows(ids, self.values, rows), self.gain)
        place, entry = entries_of_rows(self.positions, ids.flatten(), rows.shape[-1])
        values = self.values[entry].to(rows.dtype)
        flat = rows.flatten()
        return flat.index_put((place,), interpolate(flat[place], values, self.gain)).reshape(rows.shape)
