"""Muon, from torch, for the matrices of the blocks; AdamW for all else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from espalier.anatomy.parameters import BLOCK
from espalier.errors import EspalierError
from espalier.memory.joined_optimizer import Joined
from espalier.registry import make, optimizer


@optimizer("muon", ids=(), paper="arXiv:2502.16982")
class Muon:
    """Momentum made orthogonal by Newton-Schulz for every matrix of the blocks; AdamW for embeddings, heads and vectors.

    An update has the root mean square of AdamW's, ``0.2 sqrt(max(rows, columns))`` (section 2.2 of the paper), so
    that learning rate and decay carry over. State: one float32 number per number of the blocks' matrices, two of the rest.
    """

    momentum: float = 0.95
    """decay of the Nesterov momentum, in [0, 1)"""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients, in [0, 1)"""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares, in [0, 1)"""
    epsilon: float = 1e-8
    """AdamW's term beside the root of the mean square, at least 0"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""

    state = "fp32"

    def check(self) -> None:
        if self.state != "fp32":
            raise EspalierError(f"state is {self.state}; muon, which is torch's, keeps its state in fp32")
        self._rest()
        if not 0 <= self.momentum < 1:
            raise EspalierError(f"momentum is {self.momentum}; it must be at least 0 and less than 1")

    def _rest(self) -> Any:
        shared = {name: getattr(self, name) for name in ("beta1", "beta2", "epsilon", "weight_decay")}
        return make("adamw", "optimizer", **shared)

    def build(self, parameters: dict[str, torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer over named parameters."""
        matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and BLOCK.search(name)}
        rest = {name: p for name, p in parameters.items() if name not in matrices}
        parts: list[torch.optim.Optimizer] = [self._rest().build(rest, learning_rate)] if rest else []
        if matrices:
            options: Any = {"momentum": self.momentum, "weight_decay": self.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            parts.append(torch.optim.Muon(matrices.values(), lr=learning_rate, **options))
        return Joined(parts)

    def step_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes that a step holds beside gradients and state: of one matrix, the update, and what makes it orthogonal in bfloat16."""
        matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and BLOCK.search(name)]
        return max((8 * math.prod(shape) + 4 * min(shape) ** 2 for shape in matrices), default=0)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse parameters of which it would move none otherwise than AdamW.

        Raises:
            EspalierError: saying what would.
        """
        if not any(len(shape) == 2 and BLOCK.search(name) for name, shape in shapes.items()):
            raise EspalierError("muon is for the matrices of a model's blocks, and none trains; take --optimizer adamw, or another method or --targets")

    def state_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of state for parameters of these names and shapes."""
        return sum((4 if len(shape) == 2 and BLOCK.search(name) else 8) * math.prod(shape) for name, shape in shapes.items())
