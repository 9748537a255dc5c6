"""Products with a matrix that is a seed: its blocks are drawn again in forward and backward, and never kept.

The products are torch operators with gradients of their own (so recomputation, compilation and tensors without
data treat them as one step). None holds more of the matrix than a block at a time; what is saved for the backward
pass is x and the coefficients, or nothing where the product is linear in the one tensor that it is given. The
numbers do not depend on the size of the blocks; sums over blocks round in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch

from espalier.errors import EspalierError
from espalier.kernels.philox import Device, Distribution, Stream, numbers

BLOCK_BYTES = 16 << 20
"""Bytes of the matrix, in float32, that a product holds at a time; at least one row."""


@dataclass(frozen=True)
class SeededMatrix:
    """A (rows, columns) matrix of a stream's numbers, row by row, times ``scale``.

    Entry (i, j) is number ``position + i * columns + j`` of the stream (``seed``, ``name``), so any stretch of rows
    is drawn without the others. Made by :meth:`of`.
    """

    seed: int
    name: str
    key: tuple[int, int]
    position: int
    rows: int
    columns: int
    distribution: Distribution
    scale: float

    @classmethod
    def of(cls, stream: Stream, rows: int, columns: int, distribution: Distribution, scale: float = 1.0) -> SeededMatrix:
        """The matrix whose first entry is the number at which ``stream`` stands; the stream stays there.

        Raises:
            EspalierError: for a distribution of integers.
        """
        if distribution.dtype != torch.float32:
            raise EspalierError(f"the distribution of a seeded matrix is {distribution.kind!r}; it must be one of float32 numbers")
        return cls(stream.seed, stream.name, stream.key, stream.position, rows, columns, distribution, scale)

    def narrow(self, start: int, stop: int) -> SeededMatrix:
        """Its rows from ``start`` to ``stop``."""
        return replace(self, position=self.position + start * self.columns, rows=stop - start)

    def dense(self, device: Device = "cpu") -> torch.Tensor:
        """The matrix itself, float32."""
        drawn = _draw(*self._place(), self.rows * self.columns, *self._distribution(), torch.device(device))
        return drawn.view(self.rows, self.columns) * self.scale

    def _place(self) -> tuple[int, int, int]:
        return (*self.key, self.position)

    def _distribution(self) -> tuple[str, list[float]]:
        return self.distribution.kind, list(self.distribution.parameters)


_HELD: WeakValueDictionary[tuple[SeededMatrix, torch.device, torch.dtype], torch.Tensor] = WeakValueDictionary()


def held(matrix: SeededMatrix, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``matrix.dense(device)`` in a dtype, the same tensor for all who hold it at one time; not to be written to."""
    if torch.compiler.is_compiling():
        return matrix.dense(device).to(dtype)
    place = (matrix, torch.device(device), dtype)
    if (found := _HELD.get(place)) is None:
        with torch.inference_mode(False):  # others may hold it too, and want gradients
            found = matrix.dense(device).to(dtype)
        if type(found) is torch.Tensor:  # and not one without data, of a plan
            _HELD[place] = found
    return found


@dataclass(frozen=True)
class Beginning:
    """A matrix of the first numbers of a tensor that many updates share, or some rows of it.

    In a dtype other than the tensor's, the whole tensor is rounded once for all who share ``rounded``.
    """

    rounded: dict[torch.dtype, torch.Tensor]
    """the flat tensor in its dtype, first, and in those that were asked for"""
    rows: int
    columns: int
    start: int = 0

    def __getitem__(self, rows: slice) -> Beginning:
        first, last, _ = rows.indices(self.rows)
        return replace(self, rows=last - first, start=self.start + first * self.columns)

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix, (rows, columns)."""
        if (numbers := self.rounded.get(dtype)) is None:
            numbers = next(iter(self.rounded.values())).to(dtype)
            if not torch.compiler.is_compiling():
                self.rounded[dtype] = numbers
        return numbers[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)


def keeps() -> bool:
    """Whether what is made for a product may be kept for the next one: not where gradients, or a compiler, will see it."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def seeded_matmul(x: torch.Tensor, matrix: SeededMatrix, block_bytes: int = BLOCK_BYTES) -> torch.Tensor:
    """``x @ matrix.T``, (..., columns) to (..., rows), in x's dtype; differentiable any number of times."""
    arguments = (*matrix._place(), matrix.rows, matrix.columns, *matrix._distribution())
    y = _product(x.reshape(-1, matrix.columns), *arguments, False, block_bytes)
    return (y * matrix.scale).reshape(*x.shape[:-1], matrix.rows)


def seeded_combination(
    coefficients: torch.Tensor, matrix: SeededMatrix, *shape: int, block_bytes: int = BLOCK_BYTES
) -> torch.Tensor:
    """``sum_i coefficients[i] * P_i`` where P_i, of ``shape``, is column i of ``matrix``; in the coefficients' dtype.

    Args:
        coefficients: (columns,).
        matrix: with as many rows as ``shape`` has entries. The numbers of one entry lie beside each other in the
            stream, so the combination of some entries draws the rows of those alone.
    """
    return seeded_matmul(coefficients, matrix, block_bytes).reshape(shape)


def seeded_linear(
    x: torch.Tensor, coefficients: torch.Tensor, matrix: SeededMatrix, block_bytes: int = BLOCK_BYTES
) -> torch.Tensor:
    """``x @ D.T`` with ``D = seeded_combination(coefficients, matrix, out, in)``, of which only some rows are ever held.

    Args:
        x: (..., in).
        coefficients: (columns,) floating point.
        matrix: of ``out * in`` rows.

    Returns:
        (..., out) in x's dtype.
    """
    inputs = x.shape[-1]
    arguments = (*matrix._place(), matrix.rows, matrix.columns, *matrix._distribution())
    y = _linear(x.reshape(-1, inputs), coefficients * matrix.scale, *arguments, block_bytes)
    return y.reshape(*x.shape[:-1], matrix.rows // inputs)


@torch.library.custom_op("espalier::draw", mutates_args=())
def _draw(
    key0: int, key1: int, position: int, count: int, kind: str, parameters: Sequence[float], device: torch.device
) -> torch.Tensor:
    return numbers((key0, key1), position, count, Distribution(kind, tuple(parameters)), device)


@_draw.register_fake
def _(key0, key1, position, count, kind, parameters, device):  # type: ignore[no-untyped-def]
    return torch.empty(count, device=device)


def _blocks(
    place: tuple[int, int, int], rows: tuple[int, int], columns: int, distribution: Distribution, like: torch.Tensor, block_bytes: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(row, row after the last, those rows in the dtype and on the device of ``like``) from ``rows[0]`` to ``rows[1]``."""
    *key, position = place
    step = max(1, block_bytes // (4 * max(1, columns)))
    for first in range(*rows, step):
        last = min(first + step, rows[1])
        drawn = numbers((key[0], key[1]), position + first * columns, (last - first) * columns, distribution, like.device)
        yield first, last, drawn.view(last - first, columns).to(like.dtype)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """In which sums over blocks are kept."""
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.library.custom_op("espalier::seeded_product", mutates_args=())
def _product(
    x: torch.Tensor, key0: int, key1: int, position: int, rows: int, columns: int, kind: str, parameters: Sequence[float],
    transposed: bool, block_bytes: int,
) -> torch.Tensor:  # fmt: skip
    """``x @ M.T``, (n, columns) to (n, rows), or, ``transposed``, ``x @ M``, (n, rows) to (n, columns)."""
    y = x.new_zeros(len(x), columns, dtype=_wide(x)) if transposed else x.new_empty(len(x), rows)
    distribution = Distribution(kind, tuple(parameters))
    for first, last, block in _blocks((key0, key1, position), (0, rows), columns, distribution, x, block_bytes):
        if transposed:
            y += x[:, first:last] @ block
        else:
            y[:, first:last] = x @ block.T
    return y.to(x.dtype)


@_product.register_fake
def _(x, key0, key1, position, rows, columns, kind, parameters, transposed, block_bytes):  # type: ignore[no-untyped-def]
    return x.new_empty(len(x), columns if transposed else rows)


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.arguments = inputs[1:]


def _product_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    *matrix, transposed, block_bytes = ctx.arguments
    return _product(gradient, *matrix, not transposed, block_bytes), *[None] * len(ctx.arguments)


_product.register_autograd(_product_backward, setup_context=_product_setup)


def _slabs(outputs: int, inputs: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of the rows of an (outputs, inputs) matrix of at most ``block_bytes`` in float32."""
    step = max(1, block_bytes // (4 * max(1, inputs)))
    return ((first, min(first + step, outputs)) for first in range(0, outputs, step))


@torch.library.custom_op("espalier::seeded_linear", mutates_args=())
def _linear(
    x: torch.Tensor, coefficients: torch.Tensor, key0: int, key1: int, position: int, rows: int, columns: int, kind: str,
    parameters: Sequence[float], block_bytes: int,
) -> torch.Tensor:  # fmt: skip
    """``x @ D.T``, (n, in) to (n, out), D = the combination: some of its rows (a slab) at a time."""
    inputs = x.shape[1]
    c = coefficients.to(_wide(coefficients))
    y = x.new_empty(len(x), rows // inputs)
    distribution = Distribution(kind, tuple(parameters))
    for first, last in _slabs(rows // inputs, inputs, block_bytes):
        entries = (first * inputs, last * inputs)
        slab = torch.cat([b @ c for *_, b in _blocks((key0, key1, position), entries, columns, distribution, c, block_bytes)])
        y[:, first:last] = x @ slab.view(-1, inputs).to(x.dtype).T
    return y


@_linear.register_fake
def _(x, coefficients, key0, key1, position, rows, columns, kind, parameters, block_bytes):  # type: ignore[no-untyped-def]
    return x.new_empty(len(x), rows // x.shape[1])


@torch.library.custom_op("espalier::seeded_linear_backward", mutates_args=())
def _linear_backward(
    gradient: torch.Tensor, x: torch.Tensor, coefficients: torch.Tensor, key0: int, key1: int, position: int, rows: int,
    columns: int, kind: str, parameters: Sequence[float], block_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x and of the coefficients from that of ``x @ D.T``; every block is drawn once for both."""
    inputs = x.shape[1]
    c = coefficients.to(_wide(coefficients))
    of_x, of_c = torch.zeros_like(x, dtype=_wide(x)), torch.zeros_like(c)
    distribution = Distribution(kind, tuple(parameters))
    for first, last in _slabs(rows // inputs, inputs, block_bytes):
        part = gradient[:, first:last]
        of_slab = (part.T @ x).to(c.dtype).reshape(-1)
        slab, begin = torch.empty_like(of_slab), first * inputs
        entries = (begin, last * inputs)
        for a, b, block in _blocks((key0, key1, position), entries, columns, distribution, c, block_bytes):
            slab[a - begin : b - begin] = block @ c
            of_c += of_slab[a - begin : b - begin] @ block
        of_x += part @ slab.view(-1, inputs).to(x.dtype)
    return of_x.to(x.dtype), of_c.to(coefficients.dtype)


@_linear_backward.register_fake
def _(gradient, x, coefficients, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(coefficients)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, coefficients, *ctx.arguments = inputs
    ctx.save_for_backward(x, coefficients)


def _linear_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    return *_linear_backward(gradient, *ctx.saved_tensors, *ctx.arguments), *[None] * len(ctx.arguments)


_linear.register_autograd(_linear_gradients, setup_context=_linear_setup)
