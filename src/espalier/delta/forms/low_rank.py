"""Low-rank updates: two factors of one's own, or factors made of shards that updates share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.thin import thin_product
from espalier.delta.forms.update import (
    Gain,
    Update,
    embedding_rows,
    expect,
    expect_indices,
    gain_like,
    linear_onto,
    matrix_shape,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError


@register_form
class LowRank(Update):
    """``gain * B @ A`` with B (..., out, rank) and A (..., rank, in); ``shape`` is given for a convolution."""

    form = "low_rank"
    fields = ("B", "A")

    def __init__(self, B: torch.Tensor, A: torch.Tensor, gain: Gain = 1.0, shape: tuple[int, ...] | None = None) -> None:
        self.B = B
        self.A = A
        self.gain = gain
        self.shape = tuple(shape or (*B.shape[:-1], A.shape[-1]))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        rank = tensors["A"].shape[-2] if tensors["A"].ndim >= 2 else -1
        B = expect("B", tensors["B"], (*lead, outputs, rank))
        return cls(B, expect("A", tensors["A"], (*lead, rank, inputs)), gain, shape)

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def _slice(self, start: int, stop: int) -> Update | None:
        return self._with_rows(stop - start, B=self.B[start:stop])

    def low_rank(self) -> LowRank | None:
        return self

    def without(self, idle: torch.Tensor) -> LowRank:
        """The same update without the rank-one terms that ``idle`` (..., rank) marks for every expert; one stays at least."""
        used = (~idle).reshape(-1, self.rank).any(0)
        used[0] |= ~used.any()
        return LowRank(self.B[..., used], self.A[..., used, :], self.gain, self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = working_dtype(weight)
        return ((self.B.to(wide) * self.gain) @ self.A.to(wide)).reshape(self.shape)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        return thin_product(x, base, self, self.B, self.A)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        hidden = functional.linear(x, self.A.to(x.dtype)) * gain_like(self.gain, x)
        return linear_onto(hidden, self.B.to(x.dtype), onto)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        hidden = embedding_rows(ids, self.B, rows) * gain_like(self.gain, rows)
        return rows + hidden @ self.A.to(rows.dtype)


class ByFactors(Update):
    """An update that is kept in another way, and computes as the :class:`LowRank` that it stands for."""

    def low_rank(self) -> LowRank:
        """The same update with its factors as tensors."""
        raise NotImplementedError

    def unbind(self) -> list[Update]:
        return self.low_rank().unbind()

    def _slice(self, start: int, stop: int) -> Update | None:
        return self.low_rank()._slice(start, stop)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        return self.low_rank().materialize(weight)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        return self.low_rank().linear(x, base)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        return self.low_rank().matmul(x, onto)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        return self.low_rank().lookup(ids, base)


@register_form
class Pooled(ByFactors):
    """``gain * B @ A`` whose vectors are concatenations of shards of shared pools.

    B (shards, out / l) and A (shards, in / l) are pools that other parameters' updates share; row j of the
    rank-r factor A is the concatenation of ``A[index_A[..., j, :]]``, column j of B of ``B[index_B[..., j, :]]``,
    with indices of shape (..., rank, l). It is how such an update is stored; products assemble the factors.
    """

    form = "pooled"
    fields = ("B", "A", "index_B", "index_A")

    def __init__(
        self, B: torch.Tensor, A: torch.Tensor, index_B: torch.Tensor, index_A: torch.Tensor, gain: Gain = 1.0,
        shared: Mapping[str, str] | None = None, shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.B, self.A = B, A
        self.index_B, self.index_A = index_B, index_A
        self.gain = gain
        self.shared = shared or {}
        shards = index_A.shape[-1]
        self.shape = tuple(shape or (*index_A.shape[:-2], shards * B.shape[-1], shards * A.shape[-1]))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        for factor in "AB":
            index, pool = tensors[f"index_{factor}"], tensors[factor]
            if pool.ndim != 2 or index.ndim != len(lead) + 2:
                raise EspalierError(f"pool {factor} and its index have shapes {tuple(pool.shape)} and {tuple(index.shape)}")
            expect(factor, pool, pool.shape)
            expect_indices(f"index_{factor}", index, index.shape[:-1], len(pool), "shards in its pool")
        made = cls(tensors["B"], tensors["A"], tensors["index_B"], tensors["index_A"], gain)
        if made.shape != (*lead, outputs, inputs) or made.index_A.shape != made.index_B.shape:
            raise EspalierError(f"the pools make an update of shape {made.shape}; the parameter needs {tuple(shape)}")
        made.shape = tuple(shape)
        return made

    def low_rank(self) -> LowRank:
        A = self.A[self.index_A.long()].flatten(-2)
        B = self.B[self.index_B.long()].flatten(-2).transpose(-1, -2)
        return LowRank(B, A, self.gain, self.shape)
