"""Several updates of one parameter as one: added, or one after the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from espalier.delta.base import BaseWeight, UpdatedBase
from espalier.delta.forms.composite import Composite, read_parts
from espalier.delta.forms.low_rank import LowRank
from espalier.delta.forms.update import (
    Gain,
    Update,
    interpolate,
    is_one,
    register_form,
    sets_integers,
    working_dtype,
)


def _numbered(parts: Iterable[Update]) -> dict[str, Update]:
    return {str(number): part for number, part in enumerate(parts)}


@register_form
class Sum(Composite):
    """``gain * (sum of the parts)``, none of which depends on the base."""

    form = "sum"

    def __init__(self, parts: Iterable[Update], gain: Gain = 1.0) -> None:
        super().__init__(_numbered(parts), gain)

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        return cls(read_parts(tensors, constants, shape, additive_in="sum").values(), gain)

    def _scaled(self) -> list[Update]:
        return [part.scaled(self.gain) for part in self.parts.values()]

    def _slice(self, start: int, stop: int) -> Update | None:
        parts = self._sliced_parts(start, stop)
        return None if parts is None else self._with_parts(parts, {})

    def low_rank(self) -> LowRank | None:
        """Of the sum of the ranks, where every part is of low rank."""
        parts = [part.low_rank() for part in self.parts.values()]
        factors = [part for part in parts if part is not None]
        if len(factors) < len(parts):
            return None
        B = torch.cat([f.B if is_one(f.gain) else f.B.to(working_dtype(f.B)) * f.gain for f in factors], -1)
        return LowRank(B, torch.cat([f.A for f in factors], -2), self.gain, self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        first, *others = self._scaled()
        dense = first.materialize(weight)
        for part in others:
            dense = dense + part.materialize(weight)
        return dense

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        first, *others = self._scaled()
        y = first.matmul(x, onto)
        for part in others:
            y = part.matmul(x, y)
        return y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        for part in self._scaled():
            base = UpdatedBase(base, part)
        return base.rows(ids)


@register_form
class Chain(Composite):
    """The parts one after the other, each on the weight that those before it made.

    ``gain`` interpolates between W and the last of these weights.
    """

    form = "chain"
    depends_on_base = True
    exact_at_one = True

    def __init__(self, parts: Iterable[Update], gain: Gain = 1.0) -> None:
        super().__init__(_numbered(parts), gain)

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        return cls(read_parts(tensors, constants, shape).values(), gain)

    def _slice(self, start: int, stop: int) -> Update | None:
        parts = self._sliced_parts(start, stop)
        return None if parts is None else self._with_parts(parts, {})

    def _over(self, base: BaseWeight) -> BaseWeight:
        for part in self.parts.values():
            base = UpdatedBase(base, part)
        return base

    def _new(self, weight: torch.Tensor) -> torch.Tensor:
        for part in self.parts.values():
            weight = part.apply(weight)
        return weight

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.to(working_dtype(weight))
        return (self._new(wide) - wide) * self.gain

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        if not weight.is_floating_point():
            return self._new(weight) if sets_integers(self.gain, weight.dtype) else weight
        wide = weight.to(working_dtype(weight))
        return interpolate(wide, self._new(wide), self.gain).to(weight.dtype)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        y = self._over(base).linear(x)
        return y if is_one(self.gain) else interpolate(base.linear(x), y, self.gain)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = self._over(base).rows(ids)
        return rows if is_one(self.gain) else interpolate(base.rows(ids), rows, self.gain)
