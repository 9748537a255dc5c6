"""Where the values of an update stand that touches some entries of a weight: its support.

Positions are flat and row-major in the logical shape. They are kept as ``index`` (n,) int32 or int64, strictly
increasing, or as ``mask``, a bitmap of one bit an entry, which is smaller where more than one entry in 32 is
touched. Not a form itself: :class:`AtSupport` is what ``Replace`` and ``Sparse`` share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy
import torch

from espalier.delta.forms.bits import count_bits, has_padding, pack_bits, packed_size, slice_bits, unpack_bits
from espalier.delta.forms.update import Update, expect_indices
from espalier.errors import EspalierError

_BLOCK = 1 << 19  # bits of a mask whose set ones are counted once
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact(positions: torch.Tensor, entries: int) -> dict[str, torch.Tensor]:
    """A support in its smallest spelling: the field ``index`` or ``mask``.

    Args:
        positions: strictly increasing flat positions, (n,).
        entries: of the weight.
    """
    width = 4 if entries < 2**31 else 8
    if width * len(positions) <= packed_size(entries):
        return {"index": positions.to(_BITS[width])}
    return {"mask": bitmap(positions, entries)}


def bitmap(positions: torch.Tensor, entries: int) -> torch.Tensor:
    """The bitmap of flat positions among ``entries``."""
    touched = torch.zeros(entries, dtype=torch.bool, device=positions.device)
    touched[positions.long()] = True
    return pack_bits(touched)


def put(weight: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy of ``weight`` with ``values`` of its dtype at flat positions, bit for bit and whatever the dtype."""
    if torch.is_grad_enabled() and (values.requires_grad or weight.requires_grad):
        return weight.flatten().index_put((positions,), values).reshape(weight.shape)
    changed = weight.detach().clone(memory_format=torch.contiguous_format)
    bits = _BITS[values.element_size()]  # few operators know every dtype, and an integer is never rewritten
    changed.view(-1).view(bits)[positions] = values.detach().view(bits)
    return changed


def entries_of_rows(positions: torch.Tensor, ids: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries of a support lie in rows ``ids`` (n,) of a matrix of that width.

    Returns:
        For each found entry its flat place in the looked-up rows (n, width), and its number in the support.
    """
    starts = torch.searchsorted(positions, ids * width)
    counts = torch.searchsorted(positions, (ids + 1) * width) - starts
    row = torch.repeat_interleave(counts)
    within = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    entry = starts[row] + within
    return row * width + positions[entry] % width, entry


class AtSupport(Update):
    """An update of values (n,) at a support; ``index`` or ``mask`` says where."""

    fields = ("values", "index", "mask")
    values: torch.Tensor
    index: torch.Tensor | None
    mask: torch.Tensor | None
    even = False
    """Whether it is known that every leading index has as many values; else they are counted, which no planning can."""

    @staticmethod
    def check_support(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> None:
        """Refuse a support that does not fit ``shape`` or the number of values.

        Raises:
            EspalierError: saying what does not fit.
        """
        entries = math.prod(shape)
        if "mask" in tensors:
            mask = tensors["mask"]
            if mask.dtype != torch.uint8 or tuple(mask.shape) != (packed_size(entries),) or has_padding(mask, entries):
                raise EspalierError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be a bitmap of {entries} entries in bytes")
            if "index" in tensors:
                raise EspalierError("there are an index and a mask; one of them says where the values stand")
            count = count_bits(mask)
        else:
            index = expect_indices("index", tensors["index"], (), entries, "entries")
            if bool((index.diff() <= 0).any()):
                raise EspalierError("index is not sorted, or names an entry twice")
            count = len(index)
        if tuple(tensors["values"].shape) != (count,):
            raise EspalierError(f"values has shape {tuple(tensors['values'].shape)}; the support has {count} entries")

    @property
    def positions(self) -> torch.Tensor:
        """The flat positions, (n,) int64."""
        return self._unpacked if self.index is None else self.index.long()

    @cached_property
    def _unpacked(self) -> torch.Tensor:
        assert self.mask is not None
        return unpack_bits(self.mask, math.prod(self.shape)).nonzero().squeeze(-1)

    @cached_property
    def _counts(self) -> Any:
        """How many bits of the mask are set before each of its blocks."""
        assert self.mask is not None
        starts = range(0, len(self.mask), _BLOCK // 8)
        counts = [count_bits(self.mask[s : s + _BLOCK // 8]) for s in starts]
        return numpy.cumsum([0, *counts])

    def _before(self, entries: Sequence[int]) -> list[int]:
        """How many values stand before each of some flat entries, which ascend."""
        if self.index is not None:
            index = self.index.long() if entries[-1] > torch.iinfo(self.index.dtype).max else self.index
            return torch.searchsorted(index, torch.tensor(entries, dtype=index.dtype, device=index.device)).tolist()
        mask = self.mask
        assert mask is not None
        blocks = [entry // _BLOCK for entry in entries]
        return [int(self._counts[b]) + count_bits(slice_bits(mask, b * _BLOCK, entry)) for b, entry in zip(blocks, entries, strict=True)]

    def _parts(self, edges: Sequence[int], shape: tuple[int, ...], even: bool = False) -> list[Update]:
        """The updates between flat entries ``edges``, which have that shape, and as many values each where that is ``even``."""
        each = len(self.values) // (len(edges) - 1)
        bounds = [each * number for number in range(len(edges))] if even else self._before(edges)
        values = self.values[bounds[0] : bounds[-1]].split([b - a for a, b in itertools.pairwise(bounds)])
        parts: list[Update] = []
        for number, part in enumerate(values):
            if self.index is not None:
                where = {"index": self.index[bounds[number] : bounds[number + 1]] - edges[number]}
            else:
                assert self.mask is not None
                where = {"mask": slice_bits(self.mask, edges[number], edges[number + 1])}
            parts.append(self.with_tensors({"values": part, **where}))
            parts[-1].shape, parts[-1].even = shape, False  # type: ignore[attr-defined]
        return parts

    def unbind(self) -> list[Update]:
        size = math.prod(self.shape[1:])
        return self._parts([e * size for e in range(self.shape[0] + 1)], self.shape[1:], self.even)

    def _slice(self, start: int, stop: int) -> Update | None:
        row = math.prod(self.shape[1:])
        return self._parts((start * row, stop * row), (stop - start, *self.shape[1:]))[0]
