"""SpIEL: single entries train, and the support drops those that changed least for others that would change most."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from espalier.anatomy.target import Target
from espalier.attach.entries import Entries
from espalier.attach.method import Moment, Renewed, Tensors
from espalier.delta.forms import Sparse
from espalier.delta.selection import largest
from espalier.errors import EspalierError, at_least, within
from espalier.kernels.sharded import from_each, mean_over, whole
from espalier.registry import adapter


@adapter("spiel", ids=(52,), paper="arXiv:2401.16405", learning_rate=1e-4)
class SpIEL(Entries):
    """Train ``W' = W + S``, S sparse, and every ``every`` steps let the entries of S with the smallest values go, and others come.

    The first support is drawn. With ``growth="gradient"`` (SpIEL-AG) the first step of a phase proposes the k entries of each matrix
    with the largest gradients; over the next ``collect`` steps theirs are summed up, and those with the largest sums come in. All of the
    first support may be replaced in the first phase (with the linear schedule), later the share ``rate (1 - t / T)``. What goes returns
    to the base; what comes starts at zero, with Adam's moments and age from its summed gradients, so that every entry
    has its own bias correction. With ``growth="momentum"`` (SpIEL-MA) nothing is summed up: SM3's accumulators of rows and
    columns, R_i = max_j u and C_j = max_i u of ``u = min(R_i, C_j) + g^2``, score an entry by R_i C_j.

    Differences: gradients are those of steps, the same however a step is cut into micro-batches or spread over processes (the
    authors sum those of micro-batches, and choose candidates by the first of one process); a phase always gathers ``collect``
    steps beside the one that proposes, whose own gradients are not summed; both variants train with the run's optimizer, not SM3.
    """

    density: float = 0.01
    """share of the entries of each matrix that train, in [0, 1]"""
    rank: int | None = None
    """instead of a density: as many entries as LoRA of this rank trains numbers, at least 1"""
    growth: Literal["gradient", "momentum"] = "gradient"
    """what scores entries that may come in: summed gradients (AG), or rows' and columns' accumulators (MA)"""
    every: int = 20
    """steps between re-selections, more than collect"""
    collect: int = 5
    """steps over which gradients of candidates are summed, at least 1"""
    rate: float = 0.2
    """share of the entries that may be replaced at the start of the run, in [0, 1]; falls to 0"""
    schedule: Literal["linear", "cosine"] = "linear"
    """how it falls"""

    moves = True
    state_policy = "seed"
    kept = ("index", "slot", "candidates", "sums", "squares", "rows", "columns")

    def check(self) -> None:
        super().check()
        at_least("collect", self.collect, 1)
        at_least("every", self.every, self.collect + 2 if self.growth == "gradient" else 1)
        within("rate", self.rate, 0, 1)

    def at(self, positions: torch.Tensor, target: Target) -> Tensors:
        tensors = super().at(positions, target)
        if self.growth == "momentum":
            experts = math.prod(target.lead)
            return tensors | {"rows": torch.zeros(experts, target.outputs), "columns": torch.zeros(experts, target.inputs)}
        count = len(positions)  # candidates: positions in each expert's matrix, -1 for none
        return tensors | {"candidates": torch.full((count,), -1), "sums": torch.zeros(count), "squares": torch.zeros(count)}

    def begin(self, parts: Sequence[Any], moment: Moment) -> None:
        place = moment.step % self.every
        for part in parts if self.growth == "gradient" else ():
            part.watch = self._propose if place == 0 else self._gather if place <= self.collect else None
            part.found = torch.zeros_like(part.sums) if part.watch is not None else None
            if place == 0:
                part.candidates.fill_(-1)
                part.sums.zero_()
                part.squares.zero_()

    def update(self, part: Any, context: Any) -> Sparse:
        sparse = super().update(part, context)
        watch = getattr(part, "watch", None)
        sparse.watch = functools.partial(watch, part) if watch is not None and torch.is_grad_enabled() else None
        return sparse

    @torch.no_grad()
    def _propose(self, part: Any, gradient: torch.Tensor, expert: int | None = None) -> None:
        """Let the largest of one product's gradients be candidates, together with those that there are."""
        k = self.each(part.target)
        for number, one in enumerate(gradient.flatten(-2).reshape(-1, part.target.outputs * part.target.inputs)):
            own = part.candidates.view(-1, k)[number if expert is None else expert]
            scores = part.found.view(-1, k)[number if expert is None else expert]
            best = largest(one.abs(), k)
            _merge(own, scores, best, one[best].float())

    @torch.no_grad()
    def _gather(self, part: Any, gradient: torch.Tensor, expert: int | None = None) -> None:
        """Add up what the candidates get of one product's gradient."""
        k = self.each(part.target)
        for number, one in enumerate(gradient.flatten(-2).reshape(-1, part.target.outputs * part.target.inputs)):
            e = number if expert is None else expert
            own = part.candidates.view(-1, k)[e]
            part.found.view(-1, k)[e] += torch.where(own >= 0, one[own.clamp(min=0)].float(), 0.0)

    def before_step(self, parts: Sequence[Any], moment: Moment) -> None:
        for part in parts:
            if self.growth == "momentum":
                self._accumulate(part)
                continue
            if part.watch == self._propose:
                self._agree(part)
            elif part.watch == self._gather:
                gradient = mean_over(part.values, part.found)
                part.sums += gradient
                part.squares += gradient.square()
            part.watch = part.found = None

    def _agree(self, part: Any) -> None:
        """Make the candidates of all processes one list, the same on each."""
        first, *others = zip(*(from_each(part.values, t) for t in (part.candidates, part.found)), strict=True)
        own, scores = (t.clone().view(-1, self.each(part.target)) for t in first)
        for positions, values in others:
            for expert in range(len(own)):
                _merge(own[expert], scores[expert], *(t.view_as(own)[expert] for t in (positions, values)))
        part.candidates.copy_(own.view(-1))

    def _accumulate(self, part: Any) -> None:
        """SM3's accumulators of rows and columns."""
        gradient = whole(part.values.grad)[part.slot.long()].float()
        index, (outputs, inputs) = part.index.long(), part.target.shape[-2:]
        rows, columns = index // inputs, index // (outputs * inputs) * inputs + index % inputs  # of all experts in a row
        u = torch.minimum(part.rows.view(-1)[rows], part.columns.view(-1)[columns]) + gradient.square()
        part.rows.view(-1).scatter_reduce_(0, rows, u, "amax")
        part.columns.view(-1).scatter_reduce_(0, columns, u, "amax")

    def reselect(self, parts: Sequence[Any], moment: Moment) -> list[Renewed]:
        done = moment.step + 1
        if done % self.every != ((self.collect + 1) % self.every if self.growth == "gradient" else 0):
            return []
        share = done / moment.steps
        rate = self.rate * (1 - share if self.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2)
        if self.growth == "gradient" and done == self.collect + 1 and self.schedule == "linear":
            rate = 1.0
        return [renewed for part in parts if (renewed := self._replace(part, rate)) is not None]

    def _replace(self, part: Any, rate: float) -> Renewed | None:
        k, size = self.each(part.target), part.target.outputs * part.target.inputs
        values, index = whole(part.values)[part.slot.long()].view(-1, k), part.index.long().view(-1, k)
        gone, grown, of = [], [], []
        for expert, (value, here) in enumerate(zip(values, index, strict=True)):
            local = here - expert * size
            doubtful = value.abs().argsort(stable=True)[: int(rate * k)]  # smallest first
            free = torch.ones(k, dtype=torch.bool, device=here.device)
            free[doubtful] = False
            staying = local[free]
            new, source = self._grow(part, expert, local, staying, len(doubtful))
            stays = torch.isin(local[doubtful], new)  # what would go and come is left as it is
            fresh = ~torch.isin(new, local)
            leaving = doubtful[~stays][: int(fresh.sum())]
            gone.append(leaving + expert * k)
            grown.append(new[fresh][: len(leaving)] + expert * size)
            of.append(source[fresh][: len(leaving)] + expert * k)
        known: Mapping[str, Any] = {}
        if not sum(map(len, gone)):
            return None
        if self.growth == "gradient":
            come, steps = torch.cat(of), self.collect
            known = {"gradients": part.sums[come] / steps, "squares": part.squares[come] / steps, "steps": steps}
        return self.exchange(part, torch.cat(gone), torch.cat(grown), **known)

    def _grow(self, part: Any, expert: int, local: torch.Tensor, staying: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in an expert's matrix that may come in, the best first, and the numbers of their candidates."""
        if self.growth == "gradient":
            candidates, sums = (t.view(-1, self.each(part.target))[expert] for t in (part.candidates, part.sums))
            eligible = ((candidates >= 0) & (sums != 0) & ~torch.isin(candidates, staying)).nonzero().squeeze(-1)
            best = eligible[sums[eligible].abs().argsort(descending=True, stable=True)[:most]]
            return candidates[best], best
        rows, columns, inputs = part.rows[expert], part.columns[expert], part.target.inputs
        scores, places = rows.new_zeros(0), local.new_zeros(0)
        for begin in range(0, len(rows), max(1, (1 << 20) // inputs)):  # a running top-k, a tile of the outer product at a time
            tile = torch.outer(rows[begin : begin + max(1, (1 << 20) // inputs)], columns).flatten()
            active = local - begin * inputs
            tile[active[(active >= 0) & (active < len(tile))]] = 0.0
            best = largest(tile, most) if most else local[:0]
            scores, places = torch.cat((scores, tile[best])), torch.cat((places, best + begin * inputs))
            order = scores.argsort(descending=True, stable=True)[:most]
            scores, places = scores[order], places[order]
        return places[scores > 0], places[scores > 0]

    def finish(self, parts: Sequence[Any]) -> None:
        for part in parts:
            if len(part.index.unique()) != self.count(part.target):
                raise EspalierError(f"{part.target.name} ended with {len(part.index.unique())} entries; it should have {self.count(part.target)}")


def _merge(own: torch.Tensor, scores: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> None:
    """Take further candidates in, in place: what both have is added up, and of all the largest stay, ascending."""
    union, where = torch.cat((own, positions)).unique(return_inverse=True)
    sums = torch.zeros(len(union), device=values.device).index_add(0, where, torch.cat((scores, values)))
    best = largest(torch.where(union >= 0, sums.abs(), -1.0), min(len(own), len(union)))
    own.fill_(-1)[: len(best)] = union[best]
    scores.zero_()[: len(best)] = sums[best]
