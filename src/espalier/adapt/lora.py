"""LoRA: a low-rank update beside a frozen weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors, Wanted
from espalier.delta.fit import singular_vectors
from espalier.delta.forms import LowRank
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter

_GAMMA = 16.0


@adapter("lora", ids=(), paper="arXiv:2106.09685", learning_rate=2e-4)
class LoRA(Adapter):
    """Train a rank-r update of each matrix: ``W' = W + (alpha / r) B A``.

    B (out, r) starts at zero and A (r, in) uniform in +-1/sqrt(in), so the start is the base. With
    ``scaling="rank-stabilized"`` the factor is alpha / sqrt(r) (arXiv:2312.03732), which keeps the size of
    the update's output independent of the rank. Fused experts get one pair each.

    ``initialization`` may take B0 and A0 from the weight instead: its r largest singular values and vectors, as
    ``s B0 A0`` ("pissa", PiSSA, arXiv:2404.02948), or the first r columns and rows of its QR decomposition ("olora",
    OLoRA, arXiv:2406.01775). These papers train ``W - s B0 A0 + s B A``. Here the base stays as it is, and the
    same update is kept beside it, ``s (B A - B0 A0) = s [B - B0, B0] [A; A - A0]``: of rank 2 r, plain LoRA to others,
    exactly zero at the start, and made of differences, which bf16 products do not round away. "gradient" (LoRA-GA,
    arXiv:2407.05000) does so with singular vectors of the weight's gradient G = U S V^T on the training data, so that the first
    step is the best of rank 2 r: B0 = c U[:, r:2r], A0 = c V[:, :r]^T, c = out^(1/4) / sqrt(gamma) with the paper's gamma = 16.
    """

    rank: int = 16
    """rank r of the update, at least 1"""
    alpha: float = 32.0
    """the update is multiplied by alpha / rank"""
    scaling: Literal["standard", "rank-stabilized"] = "standard"
    """alpha / rank, or alpha / sqrt(rank)"""
    ratio: float = 1.0
    """learning rate of B over that of A (LoRA+, arXiv:2402.12354, takes 16)"""
    initialization: Literal["random", "pissa", "olora", "gradient"] = "random"
    """B zero and A random; or both from the weight (pissa: singular vectors; olora: QR), or from its gradient on the data"""
    tokens: int = 16384
    """tokens of the training data whose gradient is taken"""
    kept = ("B0", "A0")

    def check(self) -> None:
        at_least("rank", self.rank, 1)
        at_least("tokens", self.tokens, 1)
        if not 0 < self.ratio < math.inf:
            raise EspalierError(f"ratio is {self.ratio!r}; it must be more than 0 and finite")
        if self.initialization != "random" and not self.alpha > 0:
            raise EspalierError(f"alpha is {self.alpha!r}; with initialization {self.initialization!r} it must be above 0")

    def wanted(self) -> Wanted | None:
        return Wanted("gradient", tokens=self.tokens) if self.initialization == "gradient" else None

    def survey(
        self, targets: Sequence[Target], weight: Callable[[Target], torch.Tensor], statistic: Callable[[str, str], torch.Tensor] | None
    ) -> Mapping[str, Callable[[], torch.Tensor]]:
        if self.initialization != "gradient" or statistic is None:
            return {}
        return {target.name: functools.partial(statistic, target.name, "gradient") for target in targets}

    def start_from(self, finding: Callable[[], torch.Tensor] | None, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        if finding is None:
            return self.start(target, weight, stream)
        gradient = finding().float()
        return self.start(target, gradient.transpose(-1, -2) if target.transposed else gradient, stream)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        if self.initialization == "random":
            B = torch.zeros(*target.lead, target.outputs, self.rank)
            return {"B": nn.Parameter(B), "A": nn.Parameter(stream.kaiming_uniform(*target.lead, self.rank, target.inputs))}
        most = min(target.outputs, target.inputs) // (2 if self.initialization == "gradient" else 1)
        if self.rank > most:
            raise EspalierError(
                f"rank is {self.rank}; {target.name} of {target.outputs} x {target.inputs} has no more than {most} for initialization "
                f"{self.initialization!r}"
            )
        B, A = self._factors_of(weight.float(), self.gain(target), stream)
        return {"B": nn.Parameter(B.clone()), "A": nn.Parameter(A.clone()), "B0": B, "A0": A}

    def _factors_of(self, weight: torch.Tensor, gain: float, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
        """B0 (..., out, r) and A0 (..., r, in) of a weight, or of its gradient."""
        if self.initialization == "olora":  # the first columns of Q are those of the first columns of W
            Q = torch.linalg.qr(weight[..., : self.rank]).Q
            return Q, Q.transpose(-1, -2) @ weight
        if self.initialization == "gradient":
            U, _, Vt = singular_vectors(weight, 2 * self.rank, stream)
            size = weight.shape[-2] ** 0.25 / math.sqrt(_GAMMA)
            return U[..., self.rank :] * size, Vt[..., : self.rank, :] * size
        U, S, Vt = singular_vectors(weight, self.rank, stream)
        root = (S / gain).sqrt()
        return U * root.unsqueeze(-2), root.unsqueeze(-1) * Vt

    def gain(self, target: Target) -> float:
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def update(self, part: Any, context: Any) -> LowRank:
        if self.initialization == "random":
            return LowRank(part.B, part.A, part.gain)
        B0, A0 = part.B0.to(part.B.dtype), part.A0.to(part.A.dtype)
        return LowRank(torch.cat((part.B - B0, B0), -1), torch.cat((part.A, part.A - A0), -2), part.gain)

    def optimizer_options(self) -> Mapping[str, Mapping[str, float]]:
        return {} if self.ratio == 1 else {"B": {"rate": self.ratio}}

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self.rank * (target.outputs + target.inputs)
