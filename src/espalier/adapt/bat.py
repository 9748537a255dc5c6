"""BAT: blocks of the weight itself, mapped and moved by one small matrix for each row of blocks (Bone)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import BlockAffine
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("bat", ids=(123,), paper="arXiv:2409.15371", learning_rate=5e-5)
class BAT(Adapter):
    """Map the blocks of each matrix: ``W'_ij = W_ij + W_ij B_i + B_i``, W in blocks W_ij of r by r.

    B (out / r, r, r), one matrix for each row of blocks, starts at zero, so the start is the base. r is the largest
    number up to ``rank`` that divides both sizes of the matrix. The update is made of the weight: on another base, or
    after another delta, it is another update, and two of them do not commute. A step makes W' and keeps it.
    """

    rank: int = 64
    """the largest size r of a block, at least 2"""

    def check(self) -> None:
        at_least("rank", self.rank, 2)

    def _blocks(self, target: Target) -> tuple[int, ...]:
        common = math.gcd(target.outputs, target.inputs)
        size = max(r for r in range(1, min(self.rank, common) + 1) if common % r == 0)
        if size == 1:
            raise EspalierError(f"no block of 2 to {self.rank} (rank) divides {target.name} of {target.outputs} x {target.inputs}")
        return *target.lead, target.outputs // size, size, size

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {"B": nn.Parameter(torch.zeros(self._blocks(target)))}

    def update(self, part: Any, context: Any) -> BlockAffine:
        return BlockAffine(part.B, part.target.shape, "row", part.gain)

    def count(self, target: Target) -> int:
        return math.prod(self._blocks(target))
