"""Sums of scaled random bases: an update of full rank of few trained numbers (RandLoRA, arXiv:2502.00987)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight, DenseBase
from espalier.delta.forms.low_rank import LowRank
from espalier.delta.forms.seeded import described, read_described
from espalier.delta.forms.update import (
    Gain,
    Update,
    as_rows,
    embedding_rows,
    expect,
    linear_onto,
    matrix_shape,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError
from espalier.kernels.seeded import Beginning, SeededMatrix, held, keeps


@register_form
class RandomBases(Update):
    """``gain * sum_n B_n diag(lam[n]) A diag(gamma[n])``, transposed where the input is the wide side.

    With small and large the sides of the weight: lam (..., bases, rank) and gamma (..., bases, small) are trained; B
    (large, bases * rank), the B_n side by side, and A (rank, small), which all of them use, are frozen: tensors, or
    seeds. Experts use the same two. The sum is ``B S`` with the rows of A, scaled, below each other in S.

    A product goes one of two ways, by the multiplications of forward and backward together: through B and S one after
    the other, which costs tokens * bases * rank * (large + small) each way; or through the update itself, made for the
    occasion at large * small * bases * rank, which is then as good as free where it can be added to the base's weight.

    Without gradients, products keep what they draw, as long as the update lives: B and A once for all weights of one shape,
    large * bases * rank and rank * small numbers in the dtype of the products. With gradients, nothing is kept.

    Args:
        tensors: ``lam`` and ``gamma``; ``B`` and ``A`` where they are no seeds.
        bases: ``B`` and ``A`` as seeds, of the shapes above, where they are no tensors.
        shape: of the weight.
        drawn: what the seeds draw, where that is in memory from the start.
    """

    form = "random_bases"
    fields = ("lam", "gamma", "B", "A")

    lam: torch.Tensor
    gamma: torch.Tensor
    B: torch.Tensor | None
    A: torch.Tensor | None

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], bases: Mapping[str, SeededMatrix], shape: tuple[int, ...], gain: Gain = 1.0,
        drawn: Mapping[str, Beginning] | None = None,
    ) -> None:  # fmt: skip
        self.bases = dict(bases)
        self.drawn = dict(drawn or {})
        self.shape = tuple(shape)
        self.gain = gain
        for name in self.fields:
            setattr(self, name, tensors.get(name))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        large, small = max(outputs, inputs), min(outputs, inputs)
        count, rank = tensors["lam"].shape[-2:] if tensors["lam"].ndim >= 2 else (0, 0)
        if not (1 <= rank <= small and 1 <= count <= -(-small // rank)):
            raise EspalierError(f"there are {count} bases of rank {rank}; {-(-small // max(rank, 1))} of rank at most {small} are enough for full rank")
        expect("lam", tensors["lam"], (*lead, count, rank))
        expect("gamma", tensors["gamma"], (*lead, count, small))
        seeds, bases = constants["bases"], {}
        for name, size in {"B": (large, count * rank), "A": (rank, small)}.items():
            if (name in seeds) == (name in tensors):
                raise EspalierError(f"{name} must be either a tensor or a seed")
            if name in tensors:
                expect(name, tensors[name], size)
            else:
                bases[name] = read_described(seeds[name], *size)
        return cls(tensors, bases, shape, gain)

    def constants(self) -> dict[str, Any]:
        return {"bases": {name: described(basis) for name, basis in self.bases.items()}}

    def unbind(self) -> list[Update]:
        return self._experts if keeps() else self._unbind()

    @cached_property
    def _experts(self) -> list[Update]:
        return self._unbind()

    def _unbind(self) -> list[Update]:
        frozen = {name: tensor for name in "BA" if (tensor := getattr(self, name)) is not None}
        pairs = zip(self.lam.unbind(0), self.gamma.unbind(0), strict=True)
        return [RandomBases({"lam": lam, "gamma": gamma, **frozen}, self.bases, self.shape[1:], self.gain, self.drawn) for lam, gamma in pairs]

    def _frozen(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if (stored := getattr(self, name)) is not None:
            return stored.to(dtype)
        if name in self.drawn:
            return self.drawn[name].to(dtype)
        return held(self.bases[name], self.lam.device, dtype)

    def _keep(self, dtype: torch.dtype) -> None:
        """Hold on to what a product draws, for the next one."""
        if keeps() and not self.drawn:
            self._kept.update({(name, dtype): held(basis, self.lam.device, dtype) for name, basis in self.bases.items()})

    @cached_property
    def _kept(self) -> dict[tuple[str, torch.dtype], torch.Tensor]:
        return {}

    def _scaled(self, dtype: torch.dtype) -> torch.Tensor:
        """S, (..., bases * rank, small)."""
        A = self._frozen("A", dtype)
        lam, gamma = self.lam.to(dtype) * self.gain, self.gamma.to(dtype)
        if A.requires_grad:
            return (lam.unsqueeze(-1) * A * gamma.unsqueeze(-2)).flatten(-3, -2)
        return _Scaled.apply(lam, gamma, A).flatten(-3, -2)  # type: ignore[no-untyped-call]

    @property
    def _is_tall(self) -> bool:
        """Whether the output is the wide side."""
        *_, outputs, inputs = matrix_shape(self.shape)
        return outputs >= inputs

    def _factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., out, bases * rank) and (..., bases * rank, in), whose product is the update."""
        S, B = self._scaled(dtype), self._frozen("B", dtype)
        B = B.expand(*S.shape[:-2], *B.shape)
        return (B, S) if self._is_tall else (S.mT, B.mT)

    def _slice(self, start: int, stop: int) -> Update | None:
        left, right = self._factors(working_dtype(self.lam))
        return LowRank(left[start:stop], right, 1.0, (stop - start, *self.shape[1:]))

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        left, right = self._factors(working_dtype(weight))
        return (left @ right).reshape(self.shape)

    def _made_is_cheaper(self, x: torch.Tensor, added: bool) -> bool:
        """Whether a product through the update itself, ``added`` to the base's weight or apart, takes fewer multiplications."""
        large, small = max(self.shape), min(self.shape)
        tokens = x.numel() // x.shape[-1]
        apart = 0 if added else 2 * tokens * large
        return large * small + apart < tokens * (large + 2 * small if added else 2 * (large + small))

    def _trains_bases(self) -> bool:
        return any(t is not None and t.requires_grad for t in (self.A, self.B))

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        self._keep(x.dtype)
        # in 16 bits a small update would be lost in the weight's rounding
        exact = isinstance(base, DenseBase) and base.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)
        if not exact or base.trains or self._trains_bases() or not self._made_is_cheaper(x, added=True):
            return self.matmul(x, base.linear(x))
        S, B = self._scaled(x.dtype), self._frozen("B", x.dtype)
        return _Product.apply(x, S, B, base.dense(), base.bias, self._is_tall)  # type: ignore[no-untyped-call]

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        self._keep(x.dtype)
        if self._trains_bases() or not self._made_is_cheaper(x, added=False):
            left, right = self._factors(x.dtype)
            return linear_onto(functional.linear(x, right), left, onto)
        S, B = self._scaled(x.dtype), self._frozen("B", x.dtype)
        y = _Product.apply(x, S, B, None, None, self._is_tall)  # type: ignore[no-untyped-call]
        return y if onto is None else onto + y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        self._keep(working_dtype(rows))
        left, right = self._factors(working_dtype(rows))
        return rows + (embedding_rows(ids, left, left) @ right).to(rows.dtype)


class _Scaled(torch.autograd.Function):
    """``lam * A * gamma``, (..., bases, rank, small), of which only the three are saved."""

    @staticmethod
    def forward(ctx: Any, lam: torch.Tensor, gamma: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(lam, gamma, A)
        return lam.unsqueeze(-1) * A * gamma.unsqueeze(-2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        lam, gamma, A = ctx.saved_tensors
        through = gradient * A
        return (through @ gamma.unsqueeze(-1)).squeeze(-1), (lam.unsqueeze(-2) @ through).squeeze(-2), None


class _Product(torch.autograd.Function):
    """``x @ (W + B S).T``, or with ``(B S).T`` for B S where the input is the wide side; W None is zero.

    The gradient of S needs no product with the update: it is ``(g B).T x`` (``(x B).T g``), or ``B.T`` times the
    gradient of the update, whichever is less.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, S: torch.Tensor, B: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, tall: bool
    ) -> torch.Tensor:
        left, right = (B, S) if tall else (S.t(), B.t())
        if weight is None:
            made = left @ right
        elif weight.is_contiguous():
            made = torch.addmm(weight, left, right)
        else:  # stored the other way round: so is what is made, and rounding in the product is alike
            made = torch.addmm(weight.t(), right.t(), left.t()).t()
        ctx.tall = tall
        ctx.save_for_backward(x, B, made)
        return functional.linear(x, made, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, B, made = (tensor.to(gradient.dtype) for tensor in ctx.saved_tensors)  # which autocast makes narrower
        of_x = gradient @ made if ctx.needs_input_grad[0] else None
        of_bias = as_rows(gradient).sum(0) if ctx.needs_input_grad[4] else None
        of_S = None
        if ctx.needs_input_grad[1]:
            wide, narrow = (gradient, x) if ctx.tall else (x, gradient)
            wide, narrow = as_rows(wide), as_rows(narrow)
            of_S = (wide @ B).t() @ narrow if len(wide) < len(B) else B.t() @ (wide.t() @ narrow)
        return of_x, of_S, None, None, of_bias, None
