"""Intrinsic dimension: one trained vector moves all weights at once, inside one seeded random subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Subspace
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.kernels.subspace import padded
from espalier.registry import adapter


@adapter("intrinsic", ids=(5, 192), paper="arXiv:1804.08838, arXiv:2012.13255", learning_rate=2e-2, size="dimensions")
class Intrinsic(Adapter):
    """Train one vector z for all parameters: ``theta = theta_0 + P z``, z of d numbers, P (D, d) a seed.

    D are the numbers of all targets together, norms and biases too where they are targets. Each parameter has its own rows
    of P, drawn from a stream named after it, so that their order does not matter. P is one of:

    - ``dense``: Gaussian, times D^(-1/2): time D d;
    - ``sparse``: a share D^(-1/2) of the entries is +-1, times D^(-1/4): time d sqrt(D);
    - ``fastfood``: blocks S H G Pi H B: time D log d.

    Columns of P have unit length over all parameters together, exactly so for whole blocks and on average else, where the
    first paper divides by the lengths that were drawn. The second normalises each parameter's rows by themselves (there z
    moves the weights sqrt(parameters) times as far) and has one transform of length >= D for each, where here blocks as
    long as z are stacked, as in the paper of Fastfood. With ``structure`` (SAID) each parameter has a scalar too,
    ``theta_i = theta_0,i + lambda_i (P z)_i``, lambda one at the start; the d numbers then include the lambdas.
    """

    dimensions: int = 1024
    """d: how many numbers train, for all parameters together"""
    projection: Literal["fastfood", "dense", "sparse"] = "fastfood"
    """how P is made"""
    structure: bool = False
    """one scalar for each parameter too (SAID), within d"""

    takes = "any parameter"

    def check(self) -> None:
        at_least("dimensions", self.dimensions, 1)

    def accepts(self, target: Target) -> bool:
        return True

    def start_shared(self, targets: Sequence[Target], stream: Stream) -> Tensors:
        return {"z": nn.Parameter(torch.zeros(self.count_shared(targets)))}

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        if self.projection == "sparse" and target.size >= 2**31:
            raise EspalierError(f"{target.name} has {target.size:,} numbers; a sparse projection takes fewer than {2**31:,}")
        return {"lam": nn.Parameter(torch.ones(1))} if self.structure else {}

    def bases(self, target: Target, stream: Stream) -> Stream:
        return stream

    def prepare(self, pool: Any, targets: Sequence[Target]) -> Mapping[str, tuple[torch.Tensor, int]]:
        context = (pool.z, sum(target.size for target in targets))
        return {target.name: context for target in targets}

    def update(self, part: Any, context: tuple[torch.Tensor, int]) -> Subspace:
        (z, total), target = context, part.target
        nonzeros = max(1, round(target.size * len(z) * total**-0.5)) if self.projection == "sparse" else 0
        scale = {"dense": total**-0.5, "sparse": total**-0.25, "fastfood": (padded(len(z)) / total) ** 0.5}[self.projection]
        lam = part.lam if self.structure else None
        return Subspace(z, part.bases, self.projection, target.shape, part.gain, scale=scale, nonzeros=nonzeros, lam=lam)

    def export(self, part: Any, pool: Any) -> Subspace:
        update = self.update(part, self.prepare(pool, pool.targets)[part.target.name])
        update.shared = {"z": "intrinsic/z"}
        return update

    def count(self, target: Target) -> int:
        return int(self.structure)

    def count_shared(self, targets: Sequence[Target]) -> int:
        left = self.dimensions - len(targets) * self.structure
        if left < 1:
            raise EspalierError(f"dimensions is {self.dimensions}, which leaves no number beside the scalars of {len(targets)} parameters")
        return left
