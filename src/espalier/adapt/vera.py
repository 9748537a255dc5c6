"""VeRA: two frozen random factors for the whole model, and two trained vectors for each matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import SeededLowRank
from espalier.errors import at_least
from espalier.kernels.philox import Distribution, Stream
from espalier.kernels.seeded import Beginning, SeededMatrix
from espalier.registry import adapter

UNIFORM = Distribution("uniform", (-1.0, 1.0))


@adapter("vera", ids=(), paper="arXiv:2310.11454", learning_rate=4e-3, size="rank")
class VeRA(Adapter):
    """Train two vectors between frozen random factors: ``W' = W + diag(b) B diag(d) A``.

    B (out, r) and A (r, in) are Kaiming-uniform, +-sqrt(6 / r) and +-sqrt(6 / in); b (out) starts at zero, d (r) at
    ``d_initial``. One pair, the largest that is needed, is drawn from the seed for the whole model, and each matrix takes
    its beginning; experts share it. The delta stores b, d and the seed; loaded, it keeps one B for each number of outputs and one A
    for each of inputs. The paper adapts matrices of one shape; of others,
    PEFT cuts out a corner of one pair, and here the same numbers are used row by row, so that the rows lie together.
    """

    rank: int = 256
    """rank r of the update, at least 1; at most the smaller side of a matrix is used"""
    d_initial: float = 0.1
    """where d starts"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)

    def _rank(self, target: Target) -> int:
        return min(self.rank, *target.shape[-2:])

    def bases(self, target: Target, stream: Stream) -> dict[str, SeededMatrix]:
        sizes = {"B": (target.outputs, self._rank(target)), "A": (self._rank(target), target.inputs)}
        return {name: SeededMatrix.of(stream.named(f"vera {name}"), *size, UNIFORM) for name, size in sizes.items()}

    def start_shared(self, targets: Sequence[Target], stream: Stream) -> Tensors:
        counts = {"B": max(t.outputs * self._rank(t) for t in targets), "A": max(t.inputs * self._rank(t) for t in targets)}
        return {name: stream.named(f"vera {name}").draw(UNIFORM, count) for name, count in counts.items()}

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        d = torch.full((*target.lead, self._rank(target)), self.d_initial)
        return {"b": nn.Parameter(torch.zeros(*target.lead, target.outputs)), "d": nn.Parameter(d)}

    def gain(self, target: Target) -> float:
        return math.sqrt(6 / self._rank(target)) * math.sqrt(6 / target.inputs)  # of B and A, which are drawn in +-1

    def prepare(self, pool: Any, targets: Sequence[Target]) -> Mapping[str, dict[str, Beginning]]:
        B, A = {pool.B.dtype: pool.B}, {pool.A.dtype: pool.A}
        return {
            target.name: {"B": Beginning(B, target.outputs, self._rank(target)), "A": Beginning(A, self._rank(target), target.inputs)}
            for target in targets
        }

    def update(self, part: Any, context: Mapping[str, Beginning] | None) -> SeededLowRank:
        return SeededLowRank(part.target.shape, self._rank(part.target), part.bases, {"b": part.b, "d": part.d}, part.gain, context)

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * (target.outputs + self._rank(target))
