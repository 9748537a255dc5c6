"""What methods that train single entries of matrices share: how many, at which positions, and supports that change in a run.

The values are a packed leaf over a read-only base: nothing outside the support can move, and the optimizer's state is as
small as the support. Where the support changes, a value stays in its place in the leaf as long as its entry is in
the support, so that state stays with it, sharded or not; ``slot`` says where the values of ascending positions are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from espalier.anatomy.support import Support
from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Renewed, Tensors
from espalier.delta.forms import Sparse, compact
from espalier.delta.selection import across, kept, largest_mask
from espalier.errors import at_least, within
from espalier.kernels.philox import Stream
from espalier.kernels.sharded import put, whole


class Entries(Adapter):
    """``W' = W + S``, S sparse, its values zero at the start. Subclasses have the fields ``density`` and ``rank``, and say where."""

    density: float
    rank: int | None
    moves = False
    """Whether the support changes in the course of a run."""
    even = True
    """Whether every expert has as many entries."""
    kept: ClassVar[tuple[str, ...]] = ("index",)

    def check(self) -> None:
        within("density", self.density, 0, 1)
        if self.rank is not None:
            at_least("rank", self.rank, 1)

    def each(self, target: Target) -> int:
        """How many entries of each matrix train."""
        size = target.outputs * target.inputs
        return kept(size, self.density) if self.rank is None else min(self.rank * (target.outputs + target.inputs), size)

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self.each(target)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        """At positions that are drawn uniformly, as many in each matrix."""
        size = target.outputs * target.inputs
        drawn = [e * size + stream.choice(size, self.each(target)) for e in range(math.prod(target.lead))]
        return self.at(torch.cat(drawn), target)

    def start_from(self, finding: Support | None, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        """At the positions of a support."""
        return self.start(target, weight, stream) if finding is None else self.at(finding.positions(target), target)

    def at(self, positions: torch.Tensor, target: Target) -> Tensors:
        """The tensors of a support, by its ascending positions."""
        integer = torch.int32 if target.size < 2**31 else torch.int64
        tensors: Tensors = {"values": nn.Parameter(torch.zeros(len(positions))), "index": positions.to(integer)}
        return tensors | ({"slot": torch.arange(len(positions), dtype=integer)} if self.moves else {})

    def values(self, part: Any) -> torch.Tensor:
        """The values in the order of their positions."""
        return part.values[part.slot.long()] if self.moves else part.values

    def update(self, part: Any, context: Any) -> Sparse:
        sparse = Sparse(self.values(part), part.index, part.target.shape, part.gain)
        sparse.even = self.even
        if (look := getattr(part, "look", None)) is not None and torch.is_grad_enabled():
            sparse.watch = functools.partial(look, part, self.each(part.target))
        return sparse

    def export(self, part: Any, pool: Any) -> Sparse:
        where = compact(part.index, part.target.size)
        return Sparse(self.values(part), where.get("index"), part.target.shape, part.gain, mask=where.get("mask"))

    def matrices(self, part: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(values, positions in it), in the order of the positions, of the matrix of each expert, or of the only one."""
        k, size = self.each(part.target), part.target.outputs * part.target.inputs
        values = whole(part.values)[part.slot.long()].view(-1, k)
        return [(value, index - expert * size) for expert, (value, index) in enumerate(zip(values, part.index.long().view(-1, k), strict=True))]

    def exchange(self, part: Any, plans: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], **known: Any) -> Renewed | None:
        """Let entries leave the support, back to the base, and as many others take their places, from zero on.

        Args:
            plans: for each matrix, the numbers of its entries that may leave, the first first; positions in it that may come,
                likewise, and the number of each among the matrix's k of ``known``. What may leave and come stays as it is.
            **known: as :class:`Renewed` takes it; numbers (matrices * k,).

        Returns:
            What is another number now; ``None`` where nothing is.
        """
        k, size = self.each(part.target), part.target.outputs * part.target.inputs
        gone, grown, of = [], [], []
        for expert, ((doubtful, new, source), (_, local)) in enumerate(zip(plans, self.matrices(part), strict=True)):
            fresh = ~torch.isin(new, local)
            leaving = doubtful[~torch.isin(local[doubtful], new)][: int(fresh.sum())]
            gone.append(leaving + expert * k)
            grown.append(new[fresh][: len(leaving)] + expert * size)
            of.append(source[fresh][: len(leaving)] + expert * k)
        if not sum(map(len, gone)):
            return None
        slots = part.slot.long()
        free, index = slots[torch.cat(gone)], torch.empty_like(part.index)
        index[slots] = part.index
        index[free] = torch.cat(grown).to(index.dtype)
        ascending = index.sort()
        part.index.copy_(ascending.values)
        part.slot.copy_(ascending.indices)
        places = torch.zeros(len(index), dtype=torch.bool, device=index.device)
        places[free] = True
        put(part.values, whole(part.values).masked_fill(places, 0.0))
        come = torch.cat(of)
        spread: dict[str, Any] = {
            name: torch.zeros(len(index), device=index.device).index_put((free,), value[come]) if isinstance(value, torch.Tensor) else value
            for name, value in known.items()
        }
        return Renewed(part, "values", places, **spread)


Score = Callable[[Target], torch.Tensor]
"""Gives a number, at least 0, for every entry of a target: of its shape."""


def best_of_each(score: Score, count: Callable[[Target], int], smallest: bool = False) -> Support:
    """The entries of each matrix with the largest scores (or smallest), exactly ``count`` of each; of equal ones the first (last)."""

    def mask(target: Target) -> torch.Tensor:
        scores = score(target).reshape(-1, target.outputs * target.inputs)
        k = count(target)
        found = ~largest_mask(scores, scores.shape[1] - k) if smallest else largest_mask(scores, k)
        return found.view(target.shape)

    return Support(mask)


def best_of_all(score: Score, targets: Sequence[Target], count: int, smallest: bool = False) -> Support:
    """The entries of all targets together with the largest scores (or smallest), exactly ``count``; of equal ones the first (last).

    Scores are gone through three times here, a target at a time.
    """
    total = sum(target.size for target in targets)
    cut = across(lambda: (score(target).flatten() for target in targets), count=total - count if smallest else count)
    ties: dict[str, int] = {}
    left = cut.ties
    for target in targets:
        ties[target.name] = left
        left = max(0, left - int((score(target).abs().float() == cut.threshold).sum()))

    def mask(target: Target) -> torch.Tensor:
        positions = dataclasses.replace(cut, ties=ties[target.name]).take(score(target).flatten())
        found = torch.zeros(target.size, dtype=torch.bool, device=positions.device)
        found[positions] = True
        return (~found if smallest else found).view(target.shape)

    return Support(mask)
