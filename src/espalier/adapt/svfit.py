"""SVFit: train the largest singular values of a weight, in its own singular vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.fit import singular_vectors
from espalier.delta.forms import SingularScale
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("svfit", ids=(222,), paper="SVFit, arXiv:2409.05926", learning_rate=1e-2)
class SVFit(Adapter):
    """Train r singular values alone: ``W' = W + U_r diag(sigma s) V_r^T``, with W = U diag(sigma) V^T.

    U_r (out, r) and V_r^T (r, in) are the vectors of the r largest values sigma, frozen. s (r,) starts at zero, so the
    start is the base: sigma' = sigma (1 + s). The factor sigma, which the paper's summary does not mention, gives
    values of all sizes one learning rate. Each matrix trains r numbers; U_r and V_r^T stay in memory and are stored
    with the delta: found again from the base they would be neither the same bits on another machine, nor, where
    singular values are equal, the same spaces. The paper takes r that carries 99 % of the energy, up to all.
    """

    rank: int = 256
    """r: singular values that train, at least 1; all of them where a matrix has fewer"""
    kept = ("U", "V", "sigma")

    def check(self) -> None:
        at_least("rank", self.rank, 1)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        U, sigma, Vt = singular_vectors(weight.float(), self._rank(target), stream)
        return {"s": nn.Parameter(torch.zeros_like(sigma)), "sigma": sigma, "U": U, "V": Vt}

    def _rank(self, target: Target) -> int:
        return min(self.rank, target.outputs, target.inputs)

    def update(self, part: Any, context: Any) -> SingularScale:
        return SingularScale(part.U, part.sigma * part.s, part.V, part.gain)

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self._rank(target)
