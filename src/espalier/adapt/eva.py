"""EVA: LoRA that starts from the directions in which its inputs vary most, with rank where they explain most."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors, Wanted
from espalier.budget.allocation import Item, allocate
from espalier.delta.forms import LowRank
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("eva", ids=(124,), paper="arXiv:2410.07170", learning_rate=5e-4)
class EVA(Adapter):
    """LoRA, ``W' = W + (alpha / r_l) B A``, with A the top right singular vectors of the layer's inputs on the training data.

    A streaming SVD (``calibrate``) of each input over ``tokens`` tokens gives singular values sigma and vectors; the shares
    ``sigma_j^2 / ||X||_F^2`` of explained variance of all layers compete for N r ranks, at most ``spread`` r for one layer (a
    layer may get none). B starts at zero. With ``rescale``, alpha_l / r_l is the same for all layers. The SVD is of the
    inputs as they are; the official code centres them, and stops by convergence instead of a number of tokens. Embeddings,
    which have no input activations, start as in LoRA, and so do vectors of experts that no token came to.
    """

    rank: int = 16
    """average rank r, at least 1"""
    alpha: float = 16.0
    """the update is multiplied by alpha / rank"""
    spread: float = 2.0
    """rho: a layer gets at most so many times the average rank; 1: all get the same"""
    tokens: int = 16384
    """tokens of the training data that are looked at"""
    whiten: bool = False
    """divide each row of A by the root of its singular value over the root of ``tokens``"""
    rescale: bool = True
    """alpha / rank for all layers, whatever their rank"""

    surveys_ranks = True

    def check(self) -> None:
        for name in ("rank", "spread", "tokens"):
            at_least(name, getattr(self, name), 1)

    def wanted(self) -> Wanted:
        return Wanted("norm,singular_vectors", round(self.spread * self.rank), self.tokens)

    def survey(
        self, targets: Sequence[Target], weight: Callable[[Target], torch.Tensor], statistic: Callable[[str, str], torch.Tensor] | None
    ) -> Mapping[str, Callable[[], torch.Tensor]]:
        assert statistic is not None

        def vectors(name: str, most: int) -> torch.Tensor:  # read again when they are needed: of one layer at a time
            return statistic(name, "singular_vectors")[..., :most, :]

        items = []
        for target in targets:
            if target.route in ("linear", "experts"):
                norm = statistic(target.name, "norm")
                shares = vectors(target.name, round(self.spread * self.rank)).square().sum(-1) / norm.square().sum(-1, keepdim=True).clamp_min(1e-300)
                left = 1 - shares.reshape(-1, shares.shape[-1]).mean(0).cumsum(0)
                items.append(Item(target.name, tuple(range(len(left) + 1)), (1.0, *left.tolist())))
        levels = allocate(items, sum(min(self.rank, len(item.costs) - 1) for item in items), "greedy")
        return {name: functools.partial(vectors, name, level) for name, level in levels.items()}

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {
            "B": nn.Parameter(torch.zeros(*target.lead, target.outputs, self.rank)),
            "A": nn.Parameter(stream.kaiming_uniform(*target.lead, self.rank, target.inputs)),
        }

    def start_from(self, finding: Callable[[], torch.Tensor] | None, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        if finding is None:
            return self.start(target, weight, stream)
        vectors = finding()
        rank, sigma = vectors.shape[-2], torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        root = (sigma / math.sqrt(self.tokens)).sqrt() if self.whiten else 1.0
        random = stream.kaiming_uniform(*target.lead, rank, target.inputs)
        tensors: Tensors = {
            "B": nn.Parameter(torch.zeros(*target.lead, target.outputs, rank)),
            "A": nn.Parameter(torch.where(sigma > 0, vectors / sigma / root, random).float()),
        }
        return tensors if self.rescale or not rank else tensors | {"gain": torch.tensor(self.alpha / rank)}

    def gain(self, target: Target) -> float:
        return self.alpha / self.rank

    def update(self, part: Any, context: Any) -> LowRank:
        return LowRank(part.B, part.A, part.gain)

    def count(self, target: Target) -> int:
        """At the average rank; the data decide who gets more."""
        return math.prod(target.lead) * self.rank * (target.outputs + target.inputs)
