"""Updates of some entries, some rows or some columns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.low_rank import LowRank
from espalier.delta.forms.support import AtSupport, entries_of_rows, put
from espalier.delta.forms.thin import thin_product
from espalier.delta.forms.update import (
    Gain,
    Update,
    as_rows,
    embedding_rows,
    expect,
    expect_distinct,
    expect_indices,
    gain_like,
    linear_onto,
    matrix_shape,
    register_form,
    working_dtype,
)


class _Product(torch.autograd.Function):
    """``x @ (W + S).T + bias`` that keeps no weight: the backward pass makes it again, and the dense gradient lives only there."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, update: Sparse, base: BaseWeight | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, values)
        ctx.update, ctx.base = update, base
        return functional.linear(x, update.put_on(base, values).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        x, values = ctx.saved_tensors
        of_x = gradient @ ctx.update.put_on(ctx.base, values).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_bias = as_rows(gradient).sum(0) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[1] and ctx.update.watch is None:
            return of_x, None, of_bias, None, None
        of_weight = as_rows(gradient).T @ as_rows(x).to(gradient.dtype)
        if ctx.update.watch is not None:
            ctx.update.watch(of_weight)
        return of_x, of_weight.view(-1)[ctx.update.positions].to(values.dtype), of_bias, None, None


@register_form
class Sparse(AtSupport):
    """``gain * values`` (n,) added at flat positions: ``index`` (n,), strictly increasing, or ``mask``, a bitmap."""

    form = "sparse"
    watch: Callable[..., None] | None = None
    """Is given the dense gradient of every product's updated weight: that of one expert with its number as ``expert``, else the whole one.

    Where there is one, every product goes by way of the dense weight."""

    def __init__(
        self, values: torch.Tensor, index: torch.Tensor | None, shape: tuple[int, ...], gain: Gain = 1.0, *,
        mask: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.values = values
        self.index, self.mask = index, mask
        self.shape = tuple(shape)
        self.gain = gain

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        cls.check_support(tensors, shape)
        values = expect("values", tensors["values"], tensors["values"].shape)
        return cls(values, tensors.get("index"), tuple(shape), gain, mask=tensors.get("mask"))

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        values = self.values.to(working_dtype(weight)) * self.gain
        dense = torch.zeros(torch.Size(self.shape).numel(), dtype=values.dtype, device=values.device)
        return dense.index_put((self.positions,), values).reshape(self.shape)

    def put_on(self, base: BaseWeight | None, values: torch.Tensor) -> torch.Tensor:
        """The weight with ``values`` (n,), times the gain already, on it; without a base, the dense update."""
        if base is None:
            return torch.zeros(torch.Size(self.shape).numel(), dtype=values.dtype, device=values.device).index_put((self.positions,), values).view(self.shape)
        weight, positions = base.dense(), self.positions
        return put(weight, positions, (weight.reshape(-1)[positions].to(values.dtype) + values).to(weight.dtype))

    def unbind(self) -> list[Update]:
        experts, watch = super().unbind(), self.watch
        if watch is not None:
            for number, expert in enumerate(experts):
                expert.watch = functools.partial(watch, expert=number)  # type: ignore[attr-defined]
        return experts

    @property
    def _is_thin(self) -> bool:
        """Whether there are fewer entries than inputs: then they are handled one by one, with no dense gradient."""
        return len(self.values) <= self.shape[-1] and self.watch is None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        if not weight.is_floating_point() or weight.element_size() < 2:
            return super().apply(weight)
        wide, positions = working_dtype(weight), self.positions
        touched = weight.reshape(-1)[positions].to(wide) + self.values.to(wide) * self.gain
        changed = put(weight, positions, touched.to(weight.dtype))
        if self.watch is not None and changed.requires_grad:
            changed.register_hook(self.watch)
        return changed

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        if self._is_thin:
            return super().linear(x, base)
        if torch.compiler.is_compiling() or base.trains:
            return functional.linear(x, self.apply(base.dense()).to(x.dtype), base.bias)  # one product, of W with its entries changed
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        return _Product.apply(x, self.values.to(wide) * self.gain, base.bias, self, base)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        if self._is_thin:
            outputs, inputs = self.shape
            y = x.index_select(-1, self.positions % inputs) * (self.values * self.gain).to(x.dtype)
            onto = x.new_zeros(*x.shape[:-1], outputs) if onto is None else onto
            return onto.index_add(-1, self.positions // inputs, y.to(onto.dtype))  # which autocast makes narrower
        # one transient dense update; a sparse product would gather a float per entry and token
        if torch.compiler.is_compiling():
            y = functional.linear(x, self.materialize(x).to(x.dtype))
        else:
            y = _Product.apply(x, self.values.to(working_dtype(x)) * self.gain, None, self, None)
        return y if onto is None else onto + y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        if self._is_thin:
            rows, inputs = base.rows(ids), self.shape[-1]
            of_row = ids.unsqueeze(-1) == self.positions // inputs  # (..., n)
            return rows.index_add(-1, self.positions % inputs, of_row * (self.values * self.gain).to(rows.dtype))
        if torch.compiler.is_compiling() or self.watch is not None:  # how many entries the rows have is no shape of a graph
            return super().lookup(ids, base)
        rows = base.rows(ids)
        place, entry = entries_of_rows(self.positions, ids.flatten(), rows.shape[-1])
        values = self.values[entry].to(rows.dtype) * gain_like(self.gain, rows)
        return rows.flatten().index_add(0, place, values).reshape(rows.shape)


@register_form
class Columns(Update):
    """``gain * values`` added to the columns ``index`` of W: values (..., out, k), index (..., k), distinct.

    ``inputs`` is the number of W's columns; ``shape`` is given for a convolution. The columns are read from a
    slice of the input, so training saves k features of it, not all.
    """

    form = "columns"
    fields = ("values", "index")

    def __init__(
        self, values: torch.Tensor, index: torch.Tensor, inputs: int, gain: Gain = 1.0, shape: tuple[int, ...] | None = None
    ) -> None:
        self.values = values
        self.index = index
        self.inputs = inputs
        self.gain = gain
        self.shape = tuple(shape or (*values.shape[:-1], inputs))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        index = expect_distinct("index", expect_indices("index", tensors["index"], lead, inputs, "columns"), "column")
        expect("values", tensors["values"], (*lead, outputs, index.shape[-1]))
        return cls(tensors["values"], index, inputs, gain, shape)

    def _slice(self, start: int, stop: int) -> Update | None:
        return self._with_rows(stop - start, values=self.values[start:stop])

    def low_rank(self) -> LowRank | None:
        return LowRank(self.values, _one_hot(self.index, self.inputs, self.values), self.gain, self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        values = self.values.to(working_dtype(weight)) * self.gain
        dense = values.new_zeros(*values.shape[:-1], self.inputs)
        return dense.scatter(-1, self.index.long().unsqueeze(-2).expand_as(values), values).reshape(self.shape)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        return thin_product(x, base, self, self.values, self.index)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        return linear_onto(x.index_select(-1, self.index) * gain_like(self.gain, x), self.values.to(x.dtype), onto)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        values = embedding_rows(ids, self.values, rows) * gain_like(self.gain, rows)
        return rows.index_add(-1, self.index, values)


@register_form
class Rows(Update):
    """``gain * values`` added to the rows ``index`` of W: values (..., k, in), index (..., k), distinct.

    ``outputs`` is the number of W's rows; ``shape`` is given for a convolution.
    """

    form = "rows"
    fields = ("values", "index")

    def __init__(
        self, values: torch.Tensor, index: torch.Tensor, outputs: int, gain: Gain = 1.0, shape: tuple[int, ...] | None = None
    ) -> None:
        self.values = values
        self.index = index
        self.outputs = outputs
        self.gain = gain
        self.shape = tuple(shape or (*values.shape[:-2], outputs, values.shape[-1]))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        index = expect_distinct("index", expect_indices("index", tensors["index"], lead, outputs, "rows"), "row")
        expect("values", tensors["values"], (*lead, index.shape[-1], inputs))
        return cls(tensors["values"], index, outputs, gain, shape)

    def _slice(self, start: int, stop: int) -> Update | None:
        inside = (self.index >= start) & (self.index < stop)
        part = self._with_rows(stop - start, values=self.values[inside], index=self.index[inside] - start)
        assert isinstance(part, Rows)
        part.outputs = stop - start
        return part

    def low_rank(self) -> LowRank | None:
        chosen = _one_hot(self.index, self.outputs, self.values).transpose(-1, -2)
        return LowRank(chosen, self.values, self.gain, self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        values = self.values.to(working_dtype(weight)) * self.gain
        dense = values.new_zeros(*values.shape[:-2], self.outputs, values.shape[-1])
        return dense.scatter(-2, self.index.long().unsqueeze(-1).expand_as(values), values).reshape(self.shape)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        y = functional.linear(x, self.values.to(x.dtype)) * gain_like(self.gain, x)
        return (x.new_zeros(*x.shape[:-1], self.outputs) if onto is None else onto).index_add(-1, self.index, y)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        count = self.index.shape[-1]
        place = self.index.new_full((self.outputs,), count)
        place = place.index_copy(0, self.index.long(), torch.arange(count, dtype=place.dtype, device=place.device))
        table = functional.pad(self.values, (0, 0, 0, 1))  # the last row is for ids that are not touched
        return rows + embedding_rows(place[ids], table, rows) * gain_like(self.gain, rows)


def _one_hot(index: torch.Tensor, count: int, like: torch.Tensor) -> torch.Tensor:
    """Rows of the identity, (..., k, count)."""
    chosen = like.new_zeros(*index.shape, count)
    return chosen.scatter(-1, index.long().unsqueeze(-1), 1.0)
