"""Hydra: a low-rank branch beside a layer, and one that maps its output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Chain, LowRank, OutputMap, Update
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("hydra", ids=(134,), paper="arXiv:2309.06922", learning_rate=5e-4)
class Hydra(Adapter):
    """Train a parallel and a sequential low-rank branch: ``y = y0 + s B_p A_p x + s B_s A_s y0``.

    y0 = W x + b is the layer's output, so weight and bias change together: ``W' = W + s (B_p A_p + B_s A_s W)``,
    ``b' = b + s B_s A_s b``. A_p (r_p, in) and A_s (r_s, out) start normal with deviation 0.02, B_p (out, r_p) and
    B_s (out, r_s) at zero, so the start is the base. The paper's optional biases inside the branches are left out,
    and so is its dropout between the factors, which no merged weight has. Embeddings are mapped along their rows.
    """

    rank: int = 4
    """rank r_p of the parallel branch, at least 1"""
    sequential_rank: int = 8
    """rank r_s of the sequential branch; at 0 Hydra is LoRA"""
    scale: float = 1.0
    """s: multiplies both branches"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        at_least("sequential_rank", self.sequential_rank, 0)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        tensors: Tensors = {}
        for branch, rank, inputs in (("p", self.rank, target.inputs), ("s", self.sequential_rank, target.outputs)):
            if rank:
                tensors[f"A_{branch}"] = nn.Parameter(stream.gaussian(*target.lead, rank, inputs) * 0.02)
                tensors[f"B_{branch}"] = nn.Parameter(torch.zeros(*target.lead, target.outputs, rank))
        return tensors

    def gain(self, target: Target) -> float:
        return self.scale

    def companions(self, target: Target) -> Sequence[str]:
        biases = (f"{n.removesuffix('.weight')}.bias" if n.endswith(".weight") else f"{n}_bias" for n in target.names)
        return list(biases) if self.sequential_rank else []

    def _sequential(self, part: Any, target: Target) -> OutputMap:
        update = OutputMap(part.B_s, part.A_s, target.shape, part.gain)
        update.shared = {factor: f"hydra/{part.target.name}/{factor}" for factor in "AB"}  # stored once for weight and bias
        return update

    def update(self, part: Any, context: Any) -> Update:
        parallel = LowRank(part.B_p, part.A_p, part.gain)
        return Chain([self._sequential(part, part.target), parallel]) if self.sequential_rank else parallel

    def accompany(self, part: Any, companion: Target) -> Update:
        return self._sequential(part, companion)

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * (self.rank * (target.outputs + target.inputs) + 2 * self.sequential_rank * target.outputs)
