"""OFT: the inputs of each matrix, rotated in blocks."""

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


@adapter("oft", ids=(), paper="arXiv:2306.07280", learning_rate=4e-4, size="block_size")
class OFT(Adapter):
    """Rotate the inputs in blocks: ``W' = W blockdiag(R_1, ..., R_n)^T``, ``R_j = (I - Q_j) (I + Q_j)^-1``.

    Q_j (r, r) is skew-symmetric, kept as its r (r - 1) / 2 entries above the diagonal, row by row, and starts at zero,
    so the start is the base. R_j is orthogonal exactly (Cayley's transform, solved; PEFT's default is five terms of
    its series), so that lengths of rows, and angles between them, stay those of W. r is the largest number up to
    ``block_size`` that divides the inputs. Inputs are rotated, as by PEFT; the paper rotates the outputs.
    """

    block_size: int = 32
    """the largest size r of a block, at least 2"""

    def check(self) -> None:
        at_least("block_size", self.block_size, 2)

    def _size(self, target: Target) -> int:
        size = max(r for r in range(1, min(self.block_size, target.inputs) + 1) if target.inputs % r == 0)
        if size == 1:
            raise EspalierError(f"no block of 2 to {self.block_size} (block_size) divides the {target.inputs} inputs of {target.name}")
        return size

    def _shape(self, target: Target) -> tuple[int, ...]:
        size = self._size(target)
        return *target.lead, target.inputs // size, size * (size - 1) // 2

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {"angles": nn.Parameter(torch.zeros(self._shape(target)))}

    def update(self, part: Any, context: Any) -> BlockAffine:
        size, angles = self._size(part.target), part.angles.float()
        rows, columns = torch.triu_indices(size, size, 1, device=angles.device)
        upper = angles.new_zeros(*angles.shape[:-1], size * size).index_copy(-1, rows * size + columns, angles).unflatten(-1, (size, size))
        Q = upper - upper.transpose(-1, -2)
        unit = torch.eye(size, dtype=Q.dtype, device=Q.device)
        return BlockAffine(2 * torch.linalg.solve(unit - Q, Q), part.target.shape, "input", part.gain)  # R^T - I

    def count(self, target: Target) -> int:
        return math.prod(self._shape(target))
