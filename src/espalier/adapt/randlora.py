"""RandLoRA: a sum of frozen random bases of low rank, scaled by trained diagonals: full rank for few numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import RandomBases
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Distribution, Stream
from espalier.kernels.seeded import Beginning, SeededMatrix
from espalier.registry import adapter


@adapter("randlora", ids=(169,), paper="arXiv:2502.00987", learning_rate=1e-3, size="rank")
class RandLoRA(Adapter):
    """Train diagonals between frozen random bases: ``W' = W + s sum_n B_n diag(lambda_n) A diag(gamma_n)``.

    With ``large`` and ``small`` the sides of W there are N = ceil(small / r) terms, enough for full rank: B_n (large, r),
    A (r, small) for all n, lambda (N, r) zero at the start, gamma (N, small) at 1 / max(N, small); the sum is transposed
    where the input is the wide side. A smaller rank trains more numbers. One B and one A, the largest that is needed, are
    drawn from the seed for the whole model, and each matrix takes their beginning; experts share them. Entries have unit
    variance. The delta stores lambda, gamma and the seed; loaded, it keeps B and A for each shape of matrix.

    s is alpha / (r sqrt(N)), as in the authors' code for language models; theirs for vision, and PEFT, use alpha / r
    (``scaling="plain"``). The paper's bases are the uniform and the sparse ones, standardised by what was drawn; here by
    what is drawn from. Drawn numbers are used row by row, so matrices of other shapes hold the same numbers elsewhere.
    """

    rank: int = 32
    """rank r of each basis, at least 1; smaller ranks train more"""
    alpha: float = 64.0
    """the update is multiplied by alpha / (rank sqrt(N)), or alpha / rank"""
    scaling: Literal["root", "plain"] = "root"
    """alpha / (rank sqrt(N)), or alpha / rank as PEFT has it"""
    sparsity: float = 0.0
    """entries of the bases are +-1 with probability 1 / sparsity and else 0 (the paper: 3, or sqrt(small)); 0: uniform"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        if self.sparsity and self.sparsity < 1:
            raise EspalierError(f"sparsity is {self.sparsity}; it must be 0, or at least 1")

    def _sizes(self, target: Target) -> tuple[int, int, int, int]:
        """(large, small, rank, N)."""
        large, small = max(target.shape[-2:]), min(target.shape[-2:])
        rank = min(self.rank, small)
        return large, small, rank, -(-small // rank)

    def _distribution(self) -> Distribution:
        return Distribution("sparse_rademacher", (self.sparsity,)) if self.sparsity else Distribution("uniform", (-1.0, 1.0))

    def bases(self, target: Target, stream: Stream) -> dict[str, SeededMatrix]:
        large, small, rank, count = self._sizes(target)
        sizes = {"B": (large, count * rank), "A": (rank, small)}
        return {name: SeededMatrix.of(stream.named(f"randlora {name}"), *size, self._distribution()) for name, size in sizes.items()}

    def start_shared(self, targets: Sequence[Target], stream: Stream) -> Tensors:
        every = [self._sizes(target) for target in targets]
        counts = {"B": max(large * rank * count for large, _, rank, count in every), "A": max(rank * small for _, small, rank, _ in every)}
        return {name: stream.named(f"randlora {name}").draw(self._distribution(), count) for name, count in counts.items()}

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        _, small, rank, count = self._sizes(target)
        gamma = torch.full((*target.lead, count, small), 1 / max(count, small))
        return {"lam": nn.Parameter(torch.zeros(*target.lead, count, rank)), "gamma": nn.Parameter(gamma)}

    def gain(self, target: Target) -> float:
        _, _, rank, count = self._sizes(target)
        unit = self.sparsity or 3.0  # the inverse variance of what is drawn, for B and A together
        return unit * self.alpha / (rank * (math.sqrt(count) if self.scaling == "root" else 1))

    def prepare(self, pool: Any, targets: Sequence[Target]) -> Mapping[str, dict[str, Beginning]]:
        B, A = {pool.B.dtype: pool.B}, {pool.A.dtype: pool.A}
        made = {}
        for target in targets:
            large, small, rank, count = self._sizes(target)
            made[target.name] = {"B": Beginning(B, large, count * rank), "A": Beginning(A, rank, small)}
        return made

    def update(self, part: Any, context: Mapping[str, Beginning] | None) -> RandomBases:
        return RandomBases({"lam": part.lam, "gamma": part.gamma}, part.bases, part.target.shape, part.gain, context)

    def count(self, target: Target) -> int:
        _, small, rank, count = self._sizes(target)
        return math.prod(target.lead) * count * (rank + small)
