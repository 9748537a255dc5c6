"""Products with a projection from a few numbers to all entries of a tensor, P (entries, dimensions), that is a seed.

Two constructions that need neither memory nor time of entries * dimensions; a dense Gaussian P is ``seeded_matmul``.
Each is one torch operator, linear in its input, whose gradient is its adjoint, and draws its numbers a block at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from espalier.kernels.hadamard import hadamard
from espalier.kernels.philox import GAUSSIAN, INTEGERS32, RADEMACHER, numbers

BLOCK = 1 << 20
"""Numbers of P that are held at a time; at least those of one transform."""


def fastfood(z: torch.Tensor, key: tuple[int, int], first: int, entries: int) -> torch.Tensor:
    """``entries`` rows of ``P z`` from the ``first`` on, with blocks ``S H G_i Pi H B`` below each other, each of whose columns is of unit length.

    B and S are signs, Pi a permutation, G_i Gaussian numbers divided by the root of their mean square, H the orthonormal
    Hadamard transform of :func:`padded` size; the last block is cut off. In Fastfood (Q. Le, T. Sarlos, A. Smola, ICML
    2013) each block has its own B and Pi, and there is no S. Without S and with one Pi, the sum of each block's rows would
    be a multiple of one and the same number.
    """
    return _subspace(z, *key, first, entries, 0, len(z), 0, False)


def sparse(z: torch.Tensor, key: tuple[int, int], first: int, entries: int, rows: int, nonzeros: int) -> torch.Tensor:
    """``entries`` of the ``rows`` (fewer than 2^31) of ``P z`` from the ``first`` on; P has ``nonzeros`` entries +-1.

    Their places are uniform, and what falls on one place is added.
    """
    return _subspace(z, *key, first, entries, rows, len(z), nonzeros, False)


def padded(dimensions: int) -> int:
    """The power of two from ``dimensions`` on."""
    return 1 << max(dimensions - 1, 0).bit_length()


@torch.library.custom_op("espalier::subspace", mutates_args=())
def _subspace(
    x: torch.Tensor, key0: int, key1: int, first: int, entries: int, rows: int, dimensions: int, nonzeros: int, transposed: bool
) -> torch.Tensor:
    """``P x``, or ``P.T x`` where ``transposed``, of some rows of P; that of ``nonzeros`` places, or Fastfood's where that is 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if nonzeros:
        made = _sparse(wide, (key0, key1), first, entries, rows, dimensions, nonzeros, transposed)
    else:
        made = _fastfood(wide, (key0, key1), first, entries, dimensions, transposed)
    return made.to(x.dtype)


@_subspace.register_fake
def _(x, key0, key1, first, entries, rows, dimensions, nonzeros, transposed):  # type: ignore[no-untyped-def]
    return x.new_empty(dimensions if transposed else entries)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    *places, transposed = ctx.arguments
    return _subspace(gradient.contiguous(), *places, not transposed), *[None] * len(ctx.arguments)


_subspace.register_autograd(_backward, setup_context=_setup)


def _sparse(
    x: torch.Tensor, key: tuple[int, int], first: int, entries: int, rows: int, dimensions: int, nonzeros: int, transposed: bool
) -> torch.Tensor:
    y = x.new_zeros(dimensions if transposed else entries)
    for begin in range(0, nonzeros, BLOCK):
        count = min(BLOCK, nonzeros - begin)
        words = numbers(key, 2 * begin, 2 * count, INTEGERS32, x.device).view(count, 2)
        row = (words[:, 0] * rows >> 32) - first
        if entries < rows:
            here = (row >= 0) & (row < entries)
            words, row = words[here], row[here]
        column = (words[:, 1] & 0x7FFFFFFF) * dimensions >> 31
        sign = ((words[:, 1] >> 31) * 2 - 1).to(x.dtype)
        to, of = (column, row) if transposed else (row, column)
        y.index_add_(0, to, x[of] * sign)
    return y


def _fastfood(x: torch.Tensor, key: tuple[int, int], first: int, entries: int, dimensions: int, transposed: bool) -> torch.Tensor:
    length, end = padded(dimensions), first + entries
    signs, after = numbers(key, 0, 2 * length, RADEMACHER, x.device).to(x.dtype).view(2, length)
    order = torch.argsort(numbers(key, 2 * length, length, INTEGERS32, x.device), stable=True)
    spread = None if transposed else hadamard(functional.pad(x, (0, length - dimensions)) * signs)[order]
    y = x.new_zeros(length if transposed else entries)
    step = max(1, BLOCK // length) * length
    for begin in range(first // length * length, end, step):
        stop = min(begin + step, -(-end // length) * length)
        G = numbers(key, 3 * length + begin, stop - begin, GAUSSIAN, x.device).view(-1, length).to(x.dtype)
        G *= math.sqrt(length) / torch.linalg.vector_norm(G, dim=-1, keepdim=True)
        low, high = max(begin, first), min(stop, end)  # of these blocks' rows, those that are asked for
        if spread is None:
            part = functional.pad(x[low - first : high - first], (low - begin, stop - high)).view(-1, length)
            y += (hadamard(part * after) * G).sum(0)
        else:
            y[low - first : high - first] = (hadamard(G * spread) * after).flatten()[low - begin : high - begin]
    if spread is not None:
        return y
    gathered = torch.empty_like(y)
    gathered[order] = y
    return (hadamard(gathered) * signs)[:dimensions]
