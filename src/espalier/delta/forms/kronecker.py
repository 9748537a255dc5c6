"""Sums of Kronecker products: the form of LoKr, and of additive updates that repeat a block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.dense import Dense
from espalier.delta.forms.low_rank import LowRank
from espalier.delta.forms.update import (
    Gain,
    Update,
    expect,
    gain_like,
    matrix_shape,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError


@register_form
class Kronecker(Update):
    """``gain * sum_t kron(A_t, B_t)`` with A (..., terms, a1, a2) and B (..., terms, b1, b2).

    W is (a1 b1, a2 b2). A factor may itself be a product: with ``A_in`` (..., terms, r, a2) ``A`` is (..., terms,
    a1, r) and stands for ``A A_in``; likewise ``B_in``. One term is LoKr (arXiv:2309.14859). A row of ones for A
    repeats B along the input, the additive block update of MiSS (arXiv:2409.15371). ``shape`` is given for a
    convolution.
    """

    form = "kronecker"
    fields = ("A", "A_in", "B", "B_in")

    def __init__(
        self, A: torch.Tensor, B: torch.Tensor, gain: Gain = 1.0, *, A_in: torch.Tensor | None = None,
        B_in: torch.Tensor | None = None, shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.A, self.A_in = A, A_in
        self.B, self.B_in = B, B_in
        self.gain = gain
        (a1, a2), (b1, b2) = _sizes(A, A_in), _sizes(B, B_in)
        self.shape = tuple(shape or (*A.shape[:-3], a1 * b1, a2 * b2))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        for name in "AB":
            left, right = tensors[name], tensors.get(f"{name}_in")
            if left.ndim != len(lead) + 3:
                raise EspalierError(f"{name} has shape {tuple(left.shape)}; it must be ({', '.join(map(str, (*lead, 'terms', 'rows', 'columns')))})")
            expect(name, left, (*lead, tensors["A"].shape[-3], *left.shape[-2:]))
            if right is not None:
                expect(f"{name}_in", right, (*left.shape[:-2], left.shape[-1], right.shape[-1] if right.ndim else 0))
                if left.shape[-3] * left.shape[-2] * right.shape[-1] > outputs * inputs:
                    raise EspalierError(f"{name} {tuple(left.shape)} and {name}_in multiplied out are larger than the parameter {tuple(shape)}")
        made = cls(tensors["A"], tensors["B"], gain, A_in=tensors.get("A_in"), B_in=tensors.get("B_in"))
        if made.shape != (*lead, outputs, inputs):
            raise EspalierError(f"the factors make an update of shape {made.shape}; the parameter needs {tuple(shape)}")
        made.shape = tuple(shape)
        return made

    def _factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, each multiplied out and then rounded; they are small beside W."""
        wide = working_dtype(torch.empty(0, dtype=dtype), self.A)
        A = self.A if self.A_in is None else self.A.to(wide) @ self.A_in.to(wide)
        B = self.B if self.B_in is None else self.B.to(wide) @ self.B_in.to(wide)
        return A.to(dtype), B.to(dtype)

    def _slice(self, start: int, stop: int) -> Update | None:
        A, B = self._factors(working_dtype(self.A, self.B))  # rows need not begin with a block: they are made
        rows = torch.arange(start, stop, device=A.device)
        return Dense(_rows(A, B, rows).reshape(stop - start, *self.shape[1:]), self.gain)

    def low_rank(self) -> LowRank | None:
        """Of rank ``terms * rank(A_t) * rank(B_t)`` as the factors are kept, where that is less than full."""
        A, A_in = _split(self.A, self.A_in)
        B, B_in = _split(self.B, self.B_in)
        *_, outputs, inputs = matrix_shape(self.shape)
        if self.A.shape[-3] * A.shape[-1] * B.shape[-1] >= min(outputs, inputs):
            return None
        wide = working_dtype(A, B)
        left, right = _kron(A.to(wide), B.to(wide)), _kron(A_in.to(wide), B_in.to(wide))  # (..., terms, out, r), (..., terms, r, in)
        return LowRank(left.transpose(-3, -2).flatten(-2), right.flatten(-3, -2), self.gain, self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        A, B = self._factors(working_dtype(weight))
        blocks = (A * self.gain).flatten(-2).transpose(-1, -2) @ B.flatten(-2)  # (..., a1 a2, b1 b2)
        blocks = blocks.unflatten(-1, B.shape[-2:]).unflatten(-3, A.shape[-2:])
        return blocks.transpose(-3, -2).reshape(self.shape)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        A, B = self._factors(x.dtype)
        y = _Product.apply(x, A * gain_like(self.gain, A), B)
        return y if onto is None else onto + y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        A, B = self._factors(rows.dtype)
        return rows + _rows(A, B, ids) * gain_like(self.gain, rows)


class _Product(torch.autograd.Function):
    """``x @ (sum_t kron(A_t, B_t)).T``, of which only the input is kept for the way back: what lies between is as large, and soon made again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, A, B)
        between = _between(x, A, B)
        return torch.bmm(_flat(A).expand(len(between), -1, -1), between).view(*x.shape[:-1], A.shape[-2] * B.shape[-2])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, A, B = ctx.saved_tensors
        (terms, a1, a2), (b1, b2) = A.shape, B.shape[-2:]
        gradient = gradients[0].to(x.dtype).reshape(-1, a1, b1)
        of_A = of_B = None
        if ctx.needs_input_grad[1]:
            of_A = gradient.transpose(0, 1).flatten(1) @ _between(x, A, B).transpose(-1, -2).flatten(0, 1)  # (a1, a2 terms)
            of_A = of_A.unflatten(-1, (a2, terms)).permute(2, 0, 1)
        of_between = torch.bmm(_flat(A).T.expand(len(gradient), -1, -1), gradient).view(-1, terms * b1)  # (n a2, terms b1)
        if ctx.needs_input_grad[2]:
            of_B = (of_between.T @ x.reshape(-1, b2)).unflatten(0, (terms, b1))
        of_x = (of_between @ B.flatten(0, 1)).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, of_A, of_B


def _flat(A: torch.Tensor) -> torch.Tensor:
    """The A_t beside each other, (a1, a2 terms)."""
    return A.permute(1, 2, 0).flatten(1)


def _between(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Rows of x (..., a2 b2) as matrices, times the B_t: (n, a2 terms, b1)."""
    return functional.linear(x.reshape(-1, B.shape[-1]), B.flatten(0, 1)).view(-1, A.shape[-1] * B.shape[0], B.shape[-2])


def _rows(A: torch.Tensor, B: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of the sum of the products of A (terms, a1, a2) and B (terms, b1, b2), (..., a2 b2) for ids of any shape."""
    block = B.shape[-2]
    a = functional.embedding(ids // block, A.transpose(0, 1).flatten(1)).unflatten(-1, (A.shape[0], A.shape[-1]))
    b = functional.embedding(ids % block, B.transpose(0, 1).flatten(1)).unflatten(-1, (B.shape[0], B.shape[-1]))
    return (a.transpose(-1, -2) @ b).flatten(-2)


def _sizes(factor: torch.Tensor, factor_in: torch.Tensor | None) -> tuple[int, int]:
    return factor.shape[-2], (factor if factor_in is None else factor_in).shape[-1]


def _split(factor: torch.Tensor, factor_in: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors of a factor, with a unit matrix where it is no product."""
    if factor_in is not None:
        return factor, factor_in
    unit = torch.eye(min(factor.shape[-2:]), dtype=factor.dtype, device=factor.device)
    unit = unit.expand(*factor.shape[:-2], *unit.shape)
    return (unit, factor) if factor.shape[-2] < factor.shape[-1] else (factor, unit)


def _kron(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Kronecker products of the matrices in the last two dimensions."""
    blocks = A[..., :, None, :, None] * B[..., None, :, None, :]
    return blocks.flatten(-2).flatten(-3, -2)


def factorize(size: int, wanted: int = -1) -> tuple[int, int]:
    """Two factors of a size, as LyCORIS and PEFT choose them.

    Args:
        size: at least 1.
        wanted: of the first factor; -1 for the square root of the size.

    Returns:
        ``wanted`` and the rest where it divides; else the smaller factor first, as near ``wanted`` from below as it can be.
    """
    if wanted > 0 and size % wanted == 0:
        return wanted, size // wanted
    most = size if wanted < 0 else wanted
    small = max(f for f in range(1, math.isqrt(size) + 1) if size % f == 0 and f <= most)
    return small, size // small


def lycoris_shapes(outputs: int, inputs: int, rank: int, wanted: int, decompose_both: bool) -> dict[str, tuple[int, int]]:
    """Shapes of LoKr's factors by their names in :class:`Kronecker`, without terms, as LyCORIS and PEFT choose them.

    Sizes are those of :func:`factorize`. A factor is a product of that rank where twice the rank is less than its larger
    side; A only with ``decompose_both``.
    """
    (a1, b1), (a2, b2) = factorize(outputs, wanted), factorize(inputs, wanted)
    shapes: dict[str, tuple[int, int]] = {}
    for name, rows, columns, may in (("A", a1, a2, decompose_both), ("B", b1, b2, True)):
        if may and 2 * rank < max(rows, columns):
            shapes |= {name: (rows, rank), f"{name}_in": (rank, columns)}
        else:
            shapes[name] = (rows, columns)
    return shapes
