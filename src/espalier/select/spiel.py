"""SpIEL: single entries train, and the support drops those that changed least for others that would change most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from espalier.anatomy.target import Target
from espalier.attach import candidates
from espalier.attach.entries import Entries
from espalier.attach.method import Moment, Renewed, Tensors
from espalier.delta.selection import largest
from espalier.errors import EspalierError, at_least, within
from espalier.kernels.sharded import whole
from espalier.registry import adapter


@adapter("spiel", ids=(52,), paper="arXiv:2401.16405", learning_rate=1e-4)
class SpIEL(Entries):
    """Train ``W' = W + S``, S sparse, and every ``every`` steps let the entries of S with the smallest values go, and others come.

    The first support is drawn. With ``growth="gradient"`` (SpIEL-AG) the first step of a phase proposes the k entries of each matrix
    with the largest gradients; over the next ``collect`` steps theirs are summed up, and those with the largest sums come in. All of the
    first support may be replaced in the first phase (with the linear decline), later the share ``rate (1 - t / T)``. What goes returns
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
    decline: Literal["linear", "cosine"] = "linear"
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
        count = len(positions)
        return tensors | candidates.none(count) | {"sums": torch.zeros(count), "squares": torch.zeros(count)}

    def before_forward(self, parts: Sequence[Any], moment: Moment, measure: Callable[[], float] | None) -> None:
        place = moment.step % self.every
        for part in parts if self.growth == "gradient" else ():
            candidates.watch(part, self.each(part.target), candidates.propose if place == 0 else candidates.gather if place <= self.collect else None)
            if place == 0:
                part.sums.zero_()
                part.squares.zero_()

    def before_step(self, parts: Sequence[Any], moment: Moment) -> None:
        for part in parts:
            if self.growth == "momentum":
                if part.values.grad is not None:  # a layer may have been left out of the step
                    self._accumulate(part)
                continue
            if (gradient := candidates.settle(part, self.each(part.target))) is not None:
                part.sums += gradient
                part.squares += gradient.square()

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
        rate = self.rate * (1 - share if self.decline == "linear" else (1 + math.cos(math.pi * share)) / 2)
        if self.growth == "gradient" and done == self.collect + 1 and self.decline == "linear":
            rate = 1.0
        return [renewed for part in parts if (renewed := self._replace(part, rate)) is not None]

    def _replace(self, part: Any, rate: float) -> Renewed | None:
        k = self.each(part.target)
        plans = []
        for expert, (values, local) in enumerate(self.matrices(part)):
            doubtful = values.abs().argsort(stable=True)[: int(rate * k)]  # smallest first
            free = torch.ones(k, dtype=torch.bool, device=local.device)
            free[doubtful] = False
            plans.append((doubtful, *self._grow(part, expert, local, local[free], len(doubtful))))
        known: Mapping[str, Any] = {}
        if self.growth == "gradient":
            known = {"gradients": part.sums / self.collect, "squares": part.squares / self.collect, "steps": self.collect}
        return self.exchange(part, plans, **known)

    def _grow(self, part: Any, expert: int, local: torch.Tensor, staying: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in an expert's matrix that may come in, the best first, and the numbers of their candidates."""
        if self.growth == "gradient":
            places, sums = (t.view(-1, self.each(part.target))[expert] for t in (part.candidates, part.sums))
            eligible = ((places >= 0) & (sums != 0) & ~torch.isin(places, staying)).nonzero().squeeze(-1)
            best = eligible[sums[eligible].abs().argsort(descending=True, stable=True)[:most]]
            return places[best], best
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
