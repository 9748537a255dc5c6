"""SaRA: the entries of the weights with the smallest magnitudes train, under a penalty on their nuclear norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from espalier.anatomy.support import Support
from espalier.anatomy.target import Target
from espalier.attach.entries import Entries, best_of_all, best_of_each
from espalier.attach.method import Moment, Renewed, Tensors
from espalier.errors import at_least, within
from espalier.kernels.philox import Stream
from espalier.kernels.sharded import put, whole
from espalier.registry import adapter


@adapter("sara", ids=(140,), paper="arXiv:2409.06633", learning_rate=5e-4)
class SaRA(Entries):
    """Train ``W' = W + S`` where ``|W| < tau``: Omega, the entries that matter least, with the nuclear norm of W' on it as a penalty.

    tau is such that the share ``density`` of each matrix is below it, or with ``scope="model"`` of all matrices together, the paper's
    one threshold, which gives very uneven shares. Every step the subgradient ``lambda U V^T`` of ``lambda ||P||_*`` is added on one matrix, drawn
    from the seed; P is W' on Omega and zero elsewhere, of singular vectors U, V. After the share ``switch`` of the run, entries
    that have grown to tau or beyond stand still, ``Omega' = Omega and |W'| < tau``, and the others go on with a fresh
    optimizer. S is a delta, so weight decay (for a vector there is none) and a scale of 0 lead to the base. The two official
    optimizers disagree; this follows the equations: signs are kept, Omega' is the intersection, and the penalty acts.
    """

    density: float = 0.1
    """share of the entries of each matrix, or of all, that train, in [0, 1]"""
    rank: int | None = None
    """instead of a density: as many entries as LoRA of this rank trains numbers, at least 1"""
    scope: Literal["matrix", "model"] = "matrix"
    """whether each matrix has its own threshold, or all have one"""
    nuclear: float = 5e-4
    """lambda: weight of the nuclear norm, at least 0; each step costs the singular vectors of one matrix"""
    switch: float = 0.5
    """share of the run after which entries that have grown stand still, in [0, 1]; 1: they never do"""

    state_policy = "drop"
    kept = ("index", "start", "threshold", "still")

    def check(self) -> None:
        super().check()
        at_least("nuclear", self.nuclear, 0)
        within("switch", self.switch, 0, 1)
        self.even = self.scope == "matrix"

    def survey(
        self, targets: Sequence[Target], weight: Callable[[Target], torch.Tensor], statistic: Callable[[str, str], torch.Tensor] | None
    ) -> Mapping[str, Support]:
        def score(target: Target) -> torch.Tensor:
            return weight(target).abs().float()

        count = sum(map(self.count, targets))
        found = best_of_each(score, self.each, smallest=True) if self.scope == "matrix" else best_of_all(score, targets, count, smallest=True)
        return dict.fromkeys((target.name for target in targets), found)

    def start_from(self, finding: Support | None, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        tensors = super().start_from(finding, target, weight, stream)
        start = weight.reshape(-1)[tensors["index"].long()]
        each = start.view(-1, self.each(target)) if self.even and start.numel() else start.unsqueeze(0)
        largest = each.abs().float().amax(-1) if start.numel() else torch.zeros(1)
        return tensors | {
            "start": start, "threshold": largest, "still": torch.zeros(len(start), dtype=torch.bool),
            "key": torch.tensor(stream.named("matrix of the step").key),
        }  # fmt: skip

    def now(self, part: Any) -> torch.Tensor:
        """W' on Omega, (n,), in float32."""
        return part.start.float() + whole(part.values).float()

    def frozen(self, part: Any, moment: Moment) -> Mapping[str, torch.Tensor | bool]:
        return {"values": part.still} if moment.step >= self._switch(moment) else {}

    def _switch(self, moment: Moment) -> int:
        """The first step of the second half."""
        return max(1, round(self.switch * moment.steps))

    def before_step(self, parts: Sequence[Any], moment: Moment) -> None:
        if not self.nuclear:
            return
        matrices = [(part, expert) for part in parts for expert in range(part.target.size // (part.target.outputs * part.target.inputs))]
        part, expert = matrices[self._drawn(parts[0], moment, len(matrices))]
        if part.values.grad is None:
            return
        size = part.target.outputs * part.target.inputs
        inside = (part.index.long() // size == expert) & ~part.still
        places = part.index.long()[inside] - expert * size
        masked = torch.zeros(size, device=places.device).index_put((places,), self.now(part)[inside])
        of_entries = nuclear_subgradient(masked.view(part.target.shape[-2:])).flatten()[places]
        gradient = whole(part.values.grad).clone()
        gradient[inside] += self.nuclear * of_entries.to(gradient.dtype)
        put(part.values.grad, gradient)

    def _drawn(self, part: Any, moment: Moment, count: int) -> int:
        first, second = part.key.tolist()
        return int(Stream(first, f"{second}").at(moment.step).integers32(1)) % count

    def reselect(self, parts: Sequence[Any], moment: Moment) -> list[Renewed]:
        if moment.step + 1 != self._switch(moment) or moment.step + 1 == moment.steps:
            return []
        tau = torch.stack([part.threshold.max() for part in parts]).max()  # of all matrices together
        for part in parts:
            limit = tau if self.scope == "model" else part.threshold.repeat_interleave(len(part.start) // max(1, len(part.threshold)))
            part.still.copy_(self.now(part).abs() > limit)
        return [Renewed(part, "values", torch.ones_like(part.still)) for part in parts]


def nuclear_subgradient(matrix: torch.Tensor) -> torch.Tensor:
    """``U V^T`` of the singular vectors of a matrix, those of a singular value of zero left out."""
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((S[:1] * max(matrix.shape) * torch.finfo(S.dtype).eps < S).sum())
    return U[:, :rank] @ Vt[:rank]
