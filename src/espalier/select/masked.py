"""Sparse masks: the entries with the best scores train, chosen once, before the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from espalier.anatomy.layout import place
from espalier.anatomy.support import Support
from espalier.anatomy.target import Target
from espalier.attach import candidates
from espalier.attach.entries import Entries, best_of_all, best_of_each
from espalier.attach.method import Moment, Renewed, Tensors, Wanted
from espalier.delta import store
from espalier.delta.forms import Update
from espalier.delta.gather import gathered
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("masked", ids=(284,), paper="arXiv:2111.09839", learning_rate=2e-4)
class Masked(Entries):
    """Train ``W' = W + S``, S zero but at the entries with the best scores: a fixed sparse mask.

    Scores are magnitudes of W, of its gradient on the data (summed over sequences), or the squares of each sequence's gradient, the diagonal
    of the empirical Fisher information (FISH mask, arXiv:2111.09839); smallest magnitudes, or a draw. Exactly the share ``density`` of
    each matrix, or of all together. With ``support``, the entries that another delta changes: the subnetwork of a run of
    reinforcement learning (arXiv:2505.11711), trained again without the rest, is ``--support`` its delta from ``espalier diff``.
    With ``every``, gradients choose anew in the run: those of one step, the largest of each matrix. What stays keeps its value and
    its place in the optimizer's state; what goes returns to the base; what comes starts at zero with a state of its own age.
    """

    score: Literal["magnitude", "smallest", "gradient", "fisher", "random"] = "magnitude"
    """what is best: the largest or smallest magnitudes, gradients or Fisher information, or chance"""
    scope: Literal["matrix", "model"] = "matrix"
    """whether each matrix has its share, or the best of all matrices are taken"""
    density: float = 0.01
    """share of the entries that train, in [0, 1]"""
    rank: int | None = None
    """instead of a density: as many entries as LoRA of this rank trains numbers, at least 1"""
    support: str = ""
    """instead of scores: directory of a delta, whose changed entries train"""
    tolerance: float = 0.0
    """by how much an entry must have changed there, more than this; at least 0"""
    tokens: int = 16384
    """tokens of the training data whose gradients are scores"""
    every: int = 0
    """steps between choices by the gradients of a step, where these are scores; 0: there is one choice, before the run"""

    state_policy = "drop"
    kept = ("index", "slot", "candidates")

    def check(self) -> None:
        super().check()
        at_least("tokens", self.tokens, 1)
        at_least("tolerance", self.tolerance, 0)
        at_least("every", self.every, 0)
        if self.every and (self.scope == "model" or self.score not in ("gradient", "fisher") or self.support):
            raise EspalierError(f"every is {self.every}, but only the gradients of each matrix choose anew: scores gradient or fisher, scope matrix, no support")
        self.moves = self.every > 0
        self.even = self.scope == "matrix" and not self.support
        if self.support and (self.score, self.scope, self.rank) != ("magnitude", "matrix", None):
            raise EspalierError(f"support {self.support} says which entries train; leave score, scope and rank out")
        if self.score == "random" and self.scope == "model":
            raise EspalierError("score random draws the share of each matrix; leave scope out")
        # made here, where numbers may be looked at: planning has none
        self._delta = dict(store.load(Path(self.support), mapped=True).updates) if self.support else None

    def wanted(self) -> Wanted | None:
        return Wanted(self.score, tokens=self.tokens) if self.score in ("gradient", "fisher") else None

    def _updates(self, targets: Sequence[Target]) -> dict[str, Update]:
        """The delta's updates of some targets, by their names."""
        assert self._delta is not None
        by_name = {alias: target for target in targets for alias in target.names}
        there = gathered(self._delta, {alias: target.shape for alias, target in by_name.items()})
        return {by_name[at.name].name: there[name] for name in there if (at := place(name, by_name)) is not None and at.expert is None}

    def selected(self, targets: Sequence[Target], seed: int) -> Sequence[Target]:
        if self._delta is None:
            return targets
        updates = self._updates(targets)
        for target in targets:
            if target.name in updates and tuple(updates[target.name].shape) != target.shape:
                raise EspalierError(f"support {self.support} has an update of {target.name} for shape {updates[target.name].shape}; the model's is {target.shape}")
        if not updates:
            raise EspalierError(f"support {self.support} changes none of the {len(targets)} parameters that --targets names")
        return [target for target in targets if target.name in updates]

    def survey(
        self, targets: Sequence[Target], weight: Callable[[Target], torch.Tensor], statistic: Callable[[str, str], torch.Tensor] | None
    ) -> Mapping[str, Support]:
        if self._delta is not None:
            found = self._changed(self._updates(targets), weight)
        elif self.score == "random":
            return {}
        elif self.scope == "matrix":
            found = best_of_each(self._score(weight, statistic), self.each, self.score == "smallest")
        else:
            count = sum(map(self.count, targets))
            found = best_of_all(self._score(weight, statistic), targets, count, self.score == "smallest")
        return dict.fromkeys((target.name for target in targets), found)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return super().start(target, weight, stream) if self._delta is None else self.at(torch.arange(self.count(target)), target)

    def _changed(self, updates: Mapping[str, Update], weight: Callable[[Target], torch.Tensor]) -> Support:
        def mask(target: Target) -> torch.Tensor:
            old = weight(target)
            new = updates[target.name].apply(old)
            return new != old if not self.tolerance else (new.double() - old.double()).abs() > self.tolerance

        return Support(mask)

    def _score(self, weight: Callable[[Target], torch.Tensor], statistic: Any) -> Callable[[Target], torch.Tensor]:
        def score(target: Target) -> torch.Tensor:
            if self.wanted() is None:
                return weight(target).abs().float()
            found = statistic(target.name, self.score).abs().float()
            return found.transpose(-1, -2) if target.transposed else found

        return score

    def at(self, positions: torch.Tensor, target: Target) -> Tensors:
        return super().at(positions, target) | (candidates.none(len(positions)) if self.every else {})

    def before_forward(self, parts: Sequence[Any], moment: Moment, measure: Callable[[], float] | None) -> None:
        for part in parts if self.every else ():
            candidates.watch(part, self.each(part.target), candidates.propose if self._chooses(moment) else None)

    def check_without_gradients(self, what: str, is_blind: bool = False) -> None:
        super().check_without_gradients(what, is_blind)
        if self.every and is_blind:  # during the backward pass they are there, one at a time
            raise EspalierError(f"{what} has no gradients, by which {self.name} --every {self.every} chooses anew; give --every 0, or another optimizer")

    def _chooses(self, moment: Moment) -> bool:
        return self.every > 0 and moment.step > 0 and moment.step % self.every == 0

    def reselect(self, parts: Sequence[Any], moment: Moment) -> list[Renewed]:
        return [renewed for part in parts if self._chooses(moment) and (renewed := self._choose(part)) is not None]

    def _choose(self, part: Any) -> Renewed | None:
        candidates.settle(part, self.each(part.target))
        plans = []
        for (values, _), new in zip(self.matrices(part), part.candidates.view(-1, self.each(part.target)), strict=True):
            new = new[new >= 0]  # none of an expert that no token went to
            plans.append((values.abs().argsort(stable=True), new, torch.zeros_like(new)))
        return self.exchange(part, plans)

    def count(self, target: Target) -> int:
        if self._delta is None:
            return super().count(target)
        update = self._updates([target]).get(target.name)
        values = None if update is None else update.tensors().get("values")
        return 0 if update is None else min(target.size, target.size if values is None else values.numel())
