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


def fastfood(z: torch.Tensor, key: tuple[int, int], entries: int) -> torch.Tensor:
    """``P z`` with blocks ``H G_i Pi H B`` below each other, (dimensions,) to (entries,), each column of a block of unit norm.

    B are signs, Pi a permutation, G_i Gaussian numbers divided by the root of their mean square, H the orthonormal Hadamard
    transform of :func:`padded` size (Q. Le, T. Sarlos, A. Smola, "Fastfood", ICML 2013, where each block has its own B and
    Pi). The last block is cut off.
    """
    return _subspace(z, *key, entries, len(z), 0, False)


def sparse(z: torch.Tensor, key: tuple[int, int], entries: int, nonzeros: int) -> torch.Tensor:
    """``P z`` with ``nonzeros`` entries +-1 at uniform places, added where they coincide, (dimensions,) to (entries,)."""
    return _subspace(z, *key, entries, len(z), nonzeros, False)


def padded(dimensions: int) -> int:
    """The power of two from ``dimensions`` on."""
    return 1 << max(dimensions - 1, 0).bit_length()


@torch.library.custom_op("espalier::subspace", mutates_args=())
def _subspace(x: torch.Tensor, key0: int, key1: int, entries: int, dimensions: int, nonzeros: int, transposed: bool) -> torch.Tensor:
    """``P x``, or ``P.T x`` where ``transposed``; of ``nonzeros`` places, or of Fastfood where that is 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    made = _sparse if nonzeros else _fastfood
    return made(wide, (key0, key1), entries, dimensions, nonzeros, transposed).to(x.dtype)


@_subspace.register_fake
def _(x, key0, key1, entries, dimensions, nonzeros, transposed):  # type: ignore[no-untyped-def]
    return x.new_empty(dimensions if transposed else entries)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    *places, transposed = ctx.arguments
    return _subspace(gradient.contiguous(), *places, not transposed), *[None] * len(ctx.arguments)


_subspace.register_autograd(_backward, setup_context=_setup)


def _sparse(x: torch.Tensor, key: tuple[int, int], entries: int, dimensions: int, nonzeros: int, transposed: bool) -> torch.Tensor:
    y = x.new_zeros(dimensions if transposed else entries)
    for first in range(0, nonzeros, BLOCK):
        count = min(BLOCK, nonzeros - first)
        words = numbers(key, 2 * first, 2 * count, INTEGERS32, x.device).view(count, 2)
        row = words[:, 0] * entries >> 32
        column = (words[:, 1] & 0x7FFFFFFF) * dimensions >> 31
        sign = ((words[:, 1] >> 31) * 2 - 1).to(x.dtype)
        to, of = (column, row) if transposed else (row, column)
        y.index_add_(0, to, x[of] * sign)
    return y


def _fastfood(x: torch.Tensor, key: tuple[int, int], entries: int, dimensions: int, nonzeros: int, transposed: bool) -> torch.Tensor:
    length = padded(dimensions)
    signs = numbers(key, 0, length, RADEMACHER, x.device).to(x.dtype)
    order = torch.argsort(numbers(key, length, length, INTEGERS32, x.device), stable=True)
    if transposed:
        total = x.new_zeros(length)
    else:
        spread = hadamard(functional.pad(x, (0, length - dimensions)) * signs)[order]
        y = x.new_empty(entries)
    blocks = max(1, BLOCK // length)
    for first in range(0, entries, blocks * length):
        last = min(first + blocks * length, entries)
        count = -(-(last - first) // length)
        G = numbers(key, 2 * length + first, count * length, GAUSSIAN, x.device).view(count, length).to(x.dtype)
        G *= math.sqrt(length) / torch.linalg.vector_norm(G, dim=-1, keepdim=True)
        if transposed:
            part = functional.pad(x[first:last], (0, count * length - (last - first))).view(count, length)
            total += (hadamard(part) * G).sum(0)
        else:
            y[first:last] = hadamard(G * spread).flatten()[: last - first]
    if not transposed:
        return y
    gathered = torch.empty_like(total)
    gathered[order] = total
    return (hadamard(gathered) * signs)[:dimensions]
