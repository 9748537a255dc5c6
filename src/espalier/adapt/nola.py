"""NOLA: low-rank factors that are combinations of frozen random ones, of which only the coefficients train."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import SeededLowRank
from espalier.errors import at_least
from espalier.kernels.philox import Distribution, Stream
from espalier.kernels.seeded import SeededMatrix
from espalier.registry import adapter


@adapter("nola", ids=(199,), paper="arXiv:2310.02556", learning_rate=5e-3, targets="attention.q,attention.v", size="coefficients")
class NOLA(Adapter):
    """Train coefficients of random factors: ``W' = W + (alpha / r) (sum_j b_j B_j) (sum_i a_i A_i)``.

    A_i (r, in) and B_j (out, r), k of each, are uniform in +-1 / sqrt(k), from a seed of each matrix's own; a (k) starts at
    random, such that A is about as large as LoRA's, and b (k) at zero, so the start is the base. The numbers that train
    are 2 k whatever the rank and the shape; the delta stores them and the seed. The authors' code starts a at zero beside a
    frozen A_0; the paper trains 512 or 1,024 coefficients.

    The A_i and B_j are r k (in + out) numbers for each matrix. With ``keep`` they stay in memory and a step reads them; else
    forward and backward draw them again, a block at a time, which costs time in proportion (kernels/seeded.py). A loaded delta
    draws them once, at the first pass without gradients, and keeps the two factors, r (in + out) numbers for each matrix.
    """

    rank: int = 8
    """rank r of the update, at least 1; at most the smaller side of a matrix is used"""
    coefficients: int = 64
    """k: random matrices, and trained numbers, for each factor"""
    alpha: float = 8.0
    """the update is multiplied by alpha / rank"""
    keep: bool = True
    """keep the random matrices in memory while training, 4 rank coefficients (in + out) bytes for each matrix"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        at_least("coefficients", self.coefficients, 1)

    def _rank(self, target: Target) -> int:
        return min(self.rank, *target.shape[-2:])

    def gain(self, target: Target) -> float:
        return self.alpha / self.rank

    def bases(self, target: Target, stream: Stream) -> dict[str, SeededMatrix]:
        rows = {"B": target.outputs * self._rank(target), "A": self._rank(target) * target.inputs}
        scale, kind = self.coefficients**-0.5, Distribution("uniform", (-1.0, 1.0))
        return {
            name: SeededMatrix.of(stream.named(f"{stream.name} nola {name}"), math.prod(target.lead) * count, self.coefficients, kind, scale)
            for name, count in rows.items()
        }

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        shape = (*target.lead, self.coefficients)
        tensors: Tensors = {"b": nn.Parameter(torch.zeros(shape)), "a": nn.Parameter(stream.gaussian(*shape) * target.inputs**-0.5)}
        if self.keep:
            for name, basis in self.bases(target, stream).items():
                tensors[f"bases_{name}"] = stream.named(basis.name).draw(basis.distribution, basis.rows, basis.columns) * basis.scale
        return tensors

    def update(self, part: Any, context: Any) -> SeededLowRank:
        tensors = {"coefficients_B": part.b, "coefficients_A": part.a}
        drawn = {"B": part.bases_B, "A": part.bases_A} if self.keep else None
        return SeededLowRank(part.target.shape, self._rank(part.target), part.bases, tensors, part.gain, drawn)

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * 2 * self.coefficients
