"""Updates of blocks of rows as one update: what the experts' own updates are of the parameter that fuses them."""

from __future__ import annotations

import copy
import itertools
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight, DenseBase
from espalier.delta.forms.composite import Composite, read_parts
from espalier.delta.forms.update import Gain, Update, is_one, register_form, working_dtype
from espalier.errors import EspalierError


@register_form
class Blocks(Composite):
    """Each part on a block of rows of W; the rows between the blocks stay as they are.

    Rows are those of the first dimension; of fused experts (experts, out, in) those of all experts one after the
    other, and a block lies within one expert.

    Args:
        parts: an update of shape (rows of its block, ...) for each block.
        rows: (first row, row after the last) of each block, in order.
        shape: of W.
    """

    form = "blocks"
    depends_on_base = True

    def __init__(self, parts: Sequence[Update], rows: Sequence[tuple[int, int]], shape: tuple[int, ...], gain: Gain = 1.0) -> None:
        super().__init__({str(number): part for number, part in enumerate(parts)}, gain)
        self.rows = tuple(rows)
        self.shape = tuple(shape)
        self._dtype = parts[0].dtype

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        rows = [(start, stop) for start, stop in constants["rows"]]
        _check(rows, shape)
        rest = shape[2 if len(shape) == 3 else 1 :]
        shapes = {str(number): (stop - start, *rest) for number, (start, stop) in enumerate(rows)}
        return cls(list(read_parts(tensors, constants, shapes, list(shapes)).values()), rows, shape, gain)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype  # also of experts that no block touches

    @property
    def exact_at_one(self) -> bool:  # type: ignore[override]
        return all(part.exact_at_one and is_one(part.gain) for part in self.parts.values())

    def constants(self) -> dict[str, Any]:
        return {"rows": [list(rows) for rows in self.rows], **super().constants()}

    def _with_parts(self, parts, own):  # type: ignore[no-untyped-def]
        other = copy.copy(self)
        other.parts = dict(parts)
        return other

    def _of_blocks(self, blocks: Sequence[tuple[int, int, Update]], shape: tuple[int, ...]) -> Blocks:
        other = self._with_parts({str(number): part for number, (_, _, part) in enumerate(blocks)}, {})
        other.rows, other.shape = tuple((start, stop) for start, stop, _ in blocks), shape
        return other

    def unbind(self) -> list[Update]:
        outputs = self.shape[1]
        found: list[list[tuple[int, int, Update]]] = [[] for _ in range(self.shape[0])]
        for (start, stop), part in zip(self.rows, self.parts.values(), strict=True):
            first = start // outputs * outputs
            found[start // outputs].append((start - first, stop - first, part))
        return [self._of_blocks(blocks, self.shape[1:]) for blocks in found]

    def _slice(self, start: int, stop: int) -> Update | None:
        blocks = []
        for (first, last), part in zip(self.rows, self.parts.values(), strict=True):
            begin, end = min(max(first, start), stop), min(max(last, start), stop)
            inside = (begin - first, end - first) if begin < end else (0, 0)
            if (sliced := part.slice_rows(*inside)) is None:
                return None
            if begin < end:
                blocks.append((begin - start, end - start, sliced))
        return self._of_blocks(blocks, (stop - start, *self.shape[1:]))

    def _over(self, weight: torch.Tensor) -> Iterator[tuple[Update | None, torch.Tensor]]:
        """Every block of rows of a weight with its update, and the rows between with none."""
        flat = weight.flatten(0, 1) if weight.ndim == 3 else weight
        position = 0
        for (start, stop), part in zip(self.rows, self.parts.values(), strict=True):
            if position < start:
                yield None, flat[position:start]
            yield part.scaled(self.gain), flat[start:stop]
            position = stop
        if position < len(flat) or not len(flat):
            yield None, flat[position:]

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = working_dtype(weight)
        made = [torch.zeros_like(rows, dtype=wide) if part is None else part.materialize(rows) for part, rows in self._over(weight)]
        return torch.cat(made).reshape(weight.shape)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows if part is None else part.apply(rows) for part, rows in self._over(weight)]).reshape(weight.shape)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        over = self._over(base.dense())
        y = torch.cat([functional.linear(x, rows) if part is None else part.linear(x, DenseBase(rows)) for part, rows in over], -1)
        return y if base.bias is None else y + base.bias


def _check(rows: Sequence[tuple[int, int]], shape: Sequence[int]) -> None:
    """Refuse blocks that are out of order, overlap, or do not lie within the weight or within one expert.

    Raises:
        EspalierError: naming the rows.
    """
    if not shape or not all(type(row) is int for pair in rows for row in pair):
        raise EspalierError(f"the rows of the blocks are {reprlib.repr(rows)}; they must be pairs of numbers of rows of {tuple(shape)}")
    outputs = shape[1] if len(shape) == 3 else shape[0]
    count = shape[0] * outputs if len(shape) == 3 else outputs
    for (_, before), (start, _) in itertools.pairwise([(0, 0), *rows]):
        if start < before:
            raise EspalierError(f"a block begins at row {start}, the one before it ends at {before}; they must be in order and apart")
    for start, stop in rows:
        if not 0 <= start < stop <= count or start // outputs != (stop - 1) // outputs:
            raise EspalierError(f"a block is of rows {start} to {stop}; it must lie within the {count} rows, and within one expert's {outputs}")
