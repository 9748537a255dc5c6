"""LoKr: a Kronecker product of a small matrix and a larger one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Kronecker
from espalier.delta.forms.kronecker import lycoris_shapes
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("lokr", ids=(), paper="arXiv:2309.14859", learning_rate=1e-3)
class LoKr(Adapter):
    """Train a Kronecker product: ``W' = W + (alpha / r) kron(A, B)``, A (a1, a2), B (out / a1, in / a2).

    a1 and a2 are divisors of the sizes, near ``factor`` or, by default, near their square roots. B is itself a product
    of rank r where that is smaller (2 r less than its larger side); with ``decompose_both`` A is too. A starts at zero,
    so the start is the base. Sizes, start and factors are those of PEFT and LyCORIS.
    """

    rank: int = 8
    """rank r of the factors that are products, at least 1"""
    alpha: float = 8.0
    """the update is multiplied by alpha / rank, whether or not a factor is a product"""
    factor: int = -1
    """wanted size of A, at least 1; -1 for near the square roots of the matrix's sizes"""
    decompose_both: bool = False
    """whether A may be a product too"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        if self.factor != -1 and self.factor < 1:
            raise EspalierError(f"factor is {self.factor}; it must be at least 1, or -1")

    def _shapes(self, target: Target) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every factor, with one term."""
        shapes = lycoris_shapes(target.outputs, target.inputs, self.rank, self.factor, self.decompose_both)
        return {name: (*target.lead, 1, *shape) for name, shape in shapes.items()}

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {
            name: nn.Parameter(torch.zeros(shape) if name == "A" else stream.kaiming_uniform(*shape))
            for name, shape in self._shapes(target).items()
        }

    def gain(self, target: Target) -> float:
        return self.alpha / self.rank

    def update(self, part: Any, context: Any) -> Kronecker:
        return Kronecker(part.A, part.B, part.gain, A_in=getattr(part, "A_in", None), B_in=getattr(part, "B_in", None))

    def count(self, target: Target) -> int:
        return sum(math.prod(shape) for shape in self._shapes(target).values())
