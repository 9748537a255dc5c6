"""PERP: retrain a pruned model through its biases, its norms and low-rank updates that leave its zeros alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Dense, LowRank, MaskedLowRank, ScaledLowRank, Update, bitmaps
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("perp", ids=(3,), paper="arXiv:2312.15230", learning_rate=5e-4, targets="linear,norm,bias?,head?", needs="pruned")
class PERP(Adapter):
    """Retrain the biases, the norms, a LoRA of the head, and of every pruned matrix of a block an update that keeps its zeros zero.

    M is where the base is not zero at the start; it is stored as a bitmap. B (out, r), A (r, in), s = alpha / r:

    - ``mask``: ``W' = W + s M * (B A)``, B zero and A Kaiming: what is trained is what is merged. The paper recommends it.
    - ``scale``: ``W' = W * (B A)``, all of B and A 1 / sqrt(r), so that the start is W.
    - ``prune``: trains ``W + s B A``, a dense matrix, and stores ``W + s M * (B A)``: the function jumps when it is saved.

    Vectors train as ``b' = b + d``; matrices in no block as LoRA. Each group is a target: ``--targets norm,bias?`` leaves the
    matrices out (``?``: if there are any). A head that is tied to the embedding is one parameter, with one update at both its uses, so that
    merging changes nothing. This is the paper's retraining, to be run with ``tune``; a base without zeros is refused. A matrix of zeros in a pruned
    block stays zero, and so does a number that was exactly zero before pruning: nothing tells it from a pruned one.
    """

    rank: int = 16
    """rank r of the update, at least 1"""
    alpha: float = 32.0
    """the update is multiplied by alpha / rank; not with variant scale"""
    variant: Literal["mask", "scale", "prune"] = "mask"
    """MaskLoRA, ScaleLoRA or LoRA-Prune"""

    def check(self) -> None:
        at_least("rank", self.rank, 1)

    def accepts(self, target: Target) -> bool:
        return True

    def survey(
        self, targets: Sequence[Target], weight: Callable[[Target], torch.Tensor], statistic: Callable[[str, str], torch.Tensor] | None
    ) -> Mapping[str, Any]:
        pruned = [target for target in targets if _is_pruned(target)]
        if pruned and not any(bool((weight(target) == 0).any()) for target in pruned):
            raise EspalierError(
                f"perp retrains a pruned model, and none of the {len(pruned)} matrices of this base has a zero ({pruned[0].name}, ...): "
                "prune it first, or tune it with --method lora"
            )
        return {}

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        if not target.is_matrix:
            return {"values": nn.Parameter(torch.zeros(target.shape))}
        shapes = (*target.lead, target.outputs, self.rank), (*target.lead, self.rank, target.inputs)
        if _is_pruned(target) and self.variant == "scale":
            return {name: nn.Parameter(torch.full(shape, self.rank**-0.5)) for name, shape in zip("BA", shapes, strict=True)}
        tensors: Tensors = {"B": nn.Parameter(torch.zeros(shapes[0])), "A": nn.Parameter(stream.kaiming_uniform(*shapes[1]))}
        return {**tensors, "mask": bitmaps(weight != 0)} if _is_pruned(target) else tensors

    def gain(self, target: Target) -> float:
        scales = not target.is_matrix or (_is_pruned(target) and self.variant == "scale")
        return 1.0 if scales else self.alpha / self.rank

    def update(self, part: Any, context: Any) -> Update:
        if not part.target.is_matrix:
            return Dense(part.values, part.gain)
        if _is_pruned(part.target) and self.variant == "scale":
            return ScaledLowRank(part.B, part.A, part.gain)
        if _is_pruned(part.target) and self.variant == "mask":
            return MaskedLowRank(part.B, part.A, part.mask, part.gain)
        return LowRank(part.B, part.A, part.gain)

    def export(self, part: Any, pool: Any) -> Update:
        if _is_pruned(part.target) and self.variant == "prune":
            return MaskedLowRank(part.B, part.A, part.mask, part.gain)
        return self.update(part, None)

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self.rank * (target.outputs + target.inputs) if target.is_matrix else target.size


def _is_pruned(target: Target) -> bool:
    """Whether it is a matrix of a block, as pruning takes them: not the embedding, nor the head."""
    return target.is_matrix and target.block is not None
