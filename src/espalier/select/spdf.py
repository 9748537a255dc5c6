"""SPDF: sparse pretraining under a random mask that stands, and dense fine-tuning after it."""

from __future__ import annotations

import torch

from espalier.anatomy.target import Target
from espalier.attach.masked import Masked, matrices_of
from espalier.attach.method import Tensors
from espalier.delta.selection import kept
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("spdf", ids=(221,), paper="arXiv:2303.10464", learning_rate=6e-4, size="")
class SPDF(Masked):
    """Train ``W' = M * V`` with a random mask M that never changes: of each matrix exactly ``round((1 - sparsity) * size)`` entries live.

    M is drawn from the seed and the parameter's name, uniformly over the entries of every matrix. What is not live is exactly
    zero after each step, under any momentum and decay. The saved model is an ordinary one, so ``tune --method full`` on it is the
    dense fine-tuning: its start is the function that was pretrained, and its optimizer has no old state. With this method and
    the same seed it is the paper's sparse fine-tuning. Counted in FLOPs the paper saves 2.5 times at 75 % (``plan/flops.py``);
    products here are dense, so nothing is faster. No code was released.
    """

    sparsity: float = 0.75
    """share of every matrix that is zero, in [0, 1)"""
    rescale: bool = False
    """multiply what lives by 1 / sqrt(1 - sparsity) at the start, so that signals of random weights keep their size"""

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        experts, size = matrices_of(target)
        drawn = stream.named(f"mask of {target.name}")
        live = torch.zeros(experts, size, dtype=torch.bool, device=weight.device)
        for expert in live:
            expert[drawn.choice(size, kept(size, 1 - self.sparsity)).to(weight.device)] = True
        factor = (1 - self.sparsity) ** -0.5 if self.rescale else 1.0
        return self.masked(weight * factor, live.reshape(target.shape))

    def start_bound(self, target: Target) -> float:
        return float("inf")

