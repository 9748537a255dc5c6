"""The heads and channels that a single matrix has rows or columns for: what the couplings of a whole model are made of.

Known of a :class:`~espalier.anatomy.target.Target` alone, so that a method that is shown parameters one by one, and the planner,
can choose whole heads and channels. :mod:`espalier.anatomy.structure` says of a whole model what belongs together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from espalier.anatomy.target import Target

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Units:
    """Units that are alike, in one matrix: unit u has the indices ``start + u * stride + (0 .. width - 1)`` along ``axis``.

    Args:
        kind: ``heads`` (query heads; also those of k and v where there are as many), ``key-value heads`` or ``channels``.
        count: how many.
        axis: 0 for rows, 1 for columns of the logical matrix (of each expert).
        start, stride, width: see above.
    """

    kind: Literal["heads", "key-value heads", "channels"]
    count: int
    axis: Literal[0, 1]
    start: int
    stride: int
    width: int

    def indices(self, chosen: torch.Tensor) -> torch.Tensor:
        """The indices along ``axis`` of chosen units: (..., k) to (..., k * width), int64."""
        import torch

        return (self.start + chosen.unsqueeze(-1) * self.stride + torch.arange(self.width, device=chosen.device)).flatten(-2)


def units_of(target: Target) -> tuple[Units, ...]:
    """The units that a matrix has rows or columns for: several kinds where it fuses q, k and v, none where they are not known."""
    kind, _, role = target.role.partition(".")
    if target.is_matrix and kind == "attention":
        return tuple(_heads(target, role)) if target.heads else ()
    if target.is_matrix and kind in ("mlp", "experts"):
        if role == "down":
            return (Units("channels", target.inputs, 1, 0, 1, 1),)
        if role in ("up", "gate"):
            return (Units("channels", target.outputs, 0, 0, 1, 1),)
        if role == "gate_up":
            half = target.outputs // 2
            if target.gate_up == "interleaved":
                return (Units("channels", half, 0, 0, 2, 2),)
            return Units("channels", half, 0, 0, 1, 1), Units("channels", half, 0, half, 1, 1)
    return ()


def _heads(target: Target, role: str) -> list[Units]:
    heads, size = target.heads, target.head_dim
    if role == "o":
        return [Units("heads", heads, 1, 0, size, size)]
    if role != "qkv":
        return [_some(target.outputs // size, target, 0, size)]
    few = (target.outputs // size - heads) // 2
    if target.qkv == "heads":
        return [_some(count, target, place * size, 3 * size) for place, count in enumerate((heads, few, few))]
    starts = (0, heads * size, (heads + few) * size)
    return [_some(count, target, start, size) for count, start in zip((heads, few, few), starts, strict=True)]


def _some(count: int, target: Target, start: int, stride: int) -> Units:
    return Units("heads" if count == target.heads else "key-value heads", count, 0, start, stride, target.head_dim)
