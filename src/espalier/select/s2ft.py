"""S2FT: train the slices of a few heads and channels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.anatomy.units import Units, units_of
from espalier.attach.method import Adapter, Tensors, Wanted
from espalier.budget.largest import largest
from espalier.delta.forms import Columns, Rows
from espalier.delta.selection import kept
from espalier.delta.selection import largest as largest_of_each
from espalier.errors import EspalierError, at_least, within
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("s2ft", ids=(250,), paper="arXiv:2412.06289", learning_rate=2e-4, targets="mlp.down?,experts.down?", size="")
class S2FT(Adapter):
    """Train what a few channels and heads have of each matrix: ``W'[:, J] = W[:, J] + V`` or ``W'[J] = W[J] + V``, V starting at zero.

    A channel has a column of down and a row of up and gate, a query head columns of o and rows of q, a key-value head rows of k
    and v; the matrices of a block that has several share their J. ``--targets mlp.down,attention.o`` trains columns alone, of which training saves only the slice of
    the input that J reads; rows need all of it. Any other matrix has its input features for channels. Channels are drawn, or
    ranked, over all blocks together, so that some get more of them than others, or none; in a block of experts each has its
    own, equally many. The paper permutes the weights until J is one block; indices do the same on the weights as they are.
    """

    channels: float = 0.03
    """share of the channels that train, in [0, 1]"""
    heads: float = 0.05
    """share of the heads that train, in [0, 1]"""
    selection: Literal["random", "weight", "activation", "gradient"] = "random"
    """drawn; or by the norm of the weights, of the activations (of the inputs of down and o), or of the gradient of the targets"""
    rank_by: Literal["largest", "smallest"] = "largest"
    """which norms train"""
    tokens: int = 16384
    """tokens of the training data that activations or gradients are measured on"""

    surveys_ranks = True
    takes = "matrices, in attention those whose heads it knows"
    kept = ("index",)

    def check(self) -> None:
        within("channels", self.channels, 0, 1)
        within("heads", self.heads, 0, 1)
        at_least("tokens", self.tokens, 1)

    def wanted(self) -> Wanted | None:
        statistic = {"activation": "norm", "gradient": "gradient"}.get(self.selection)
        return Wanted(statistic, tokens=self.tokens) if statistic else None

    def accepts(self, target: Target) -> bool:
        return target.is_matrix and (not target.role.startswith("attention.") or bool(units_of(target)))

    def survey(
        self, targets: Sequence[Target], weight: Callable[[Target], torch.Tensor], statistic: Callable[[str, str], torch.Tensor] | None
    ) -> Mapping[str, Callable[[Stream], torch.Tensor]]:
        index: dict[str, torch.Tensor] = {}

        def found(name: str, stream: Stream) -> torch.Tensor:
            if not index:
                index.update(self._choose(targets, weight, statistic, stream))  # of all at once, when the first starts
            return index[name]

        return {target.name: functools.partial(found, target.name) for target in targets}

    def _choose(self, targets: Sequence[Target], weight: Any, statistic: Any, stream: Stream) -> dict[str, torch.Tensor]:
        """The rows or columns of every parameter that train, ascending, (..., k)."""
        scores: dict[tuple[Any, ...], dict[Any, torch.Tensor]] = {}
        for target in targets:
            for units in _units(target):
                of_kind, place = scores.setdefault(_kind(target, units), {}), _place(target)
                if (score := self._score(target, units, weight, statistic, stream)) is not None:
                    of_kind[place] = of_kind[place] + score if self.selection != "random" and place in of_kind else score
        for target in targets:
            if missing := [units for units in _units(target) if _place(target) not in scores[_kind(target, units)]]:
                raise EspalierError(
                    f"selection is {self.selection!r}, which scores {missing[0].kind} by what reads them, and --targets has {target.name} alone of "
                    f"theirs in block {target.block}; target attention.o or mlp.down too, or choose another selection"
                )
        chosen: dict[tuple[Any, ...], dict[Any, torch.Tensor]] = {}
        for kind, of_kind in scores.items():
            if self.rank_by == "smallest":
                of_kind = {place: -score for place, score in of_kind.items()}
            # of experts, what the first, the second, ... of each scores on average
            ranked = {place: s.sort(descending=True).values.reshape(-1, s.shape[-1]).mean(0) if s.ndim > 1 else s for place, s in of_kind.items()}
            masks = largest(list(ranked.values()), sum(kept(len(score), self._share(kind[0])) for score in ranked.values()))
            chosen[kind] = {place: largest_of_each(of_kind[place], int(mask.sum())) for place, mask in zip(ranked, masks, strict=True)}
        index = {}
        for target in targets:
            parts = [units.indices(chosen[_kind(target, units)][_place(target)]) for units in _units(target)]
            index[target.name] = torch.cat(parts, -1).sort(-1).values
        return index

    def _score(self, target: Target, units: Units, weight: Any, statistic: Any, stream: Stream) -> torch.Tensor | None:
        """Of each unit in one parameter, (..., units), the square of the norm that counts; ``None`` where it says nothing of them."""
        if self.selection == "random":
            return stream.named(f"{units.kind} of {_place(target)}").uniform(*target.lead, units.count)
        if self.selection == "activation":
            if units.axis == 0:
                return None
            if target.route == "lookup":
                raise EspalierError(f"selection is 'activation', and {target.name} is looked up: it has no input to measure; leave it out of --targets")
            squares = statistic(target.name, "norm").float().square()
        else:
            values = (weight(target) if self.selection == "weight" else _logical(statistic(target.name, "gradient"), target)).float()
            squares = values.square().sum(-1 if units.axis == 0 else -2)
        places = units.indices(torch.arange(units.count, device=squares.device))
        return squares[..., places].unflatten(-1, (units.count, units.width)).sum(-1)

    def start_from(self, finding: Callable[[Stream], torch.Tensor] | None, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        index = torch.arange(self._size(target)).expand(*target.lead, -1) if finding is None else finding(stream)
        count, by_rows = index.shape[-1], _units(target)[0].axis == 0
        values = torch.zeros(*target.lead, count, target.inputs) if by_rows else torch.zeros(*target.lead, target.outputs, count)
        return {"values": nn.Parameter(values) if count else values, "index": index}

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return self.start_from(None, target, weight, stream)

    def update(self, part: Any, context: Any) -> Columns | Rows:
        if _units(part.target)[0].axis == 0:
            return Rows(part.values, part.index, part.target.outputs, part.gain)
        return Columns(part.values, part.index, part.target.inputs, part.gain)

    def _share(self, kind: str) -> float:
        return self.heads if "heads" in kind else self.channels

    def _size(self, target: Target) -> int:
        """Rows or columns of the average block."""
        return sum(kept(units.count, self._share(units.kind)) * units.width for units in _units(target))

    def count(self, target: Target) -> int:
        """Of the average block; the draw decides who gets more."""
        return math.prod(target.lead) * self._size(target) * (target.inputs if _units(target)[0].axis == 0 else target.outputs)


def _units(target: Target) -> tuple[Units, ...]:
    return units_of(target) or (Units("channels", target.inputs, 1, 0, 1, 1),)


def _kind(target: Target, units: Units) -> tuple[Any, ...]:
    """What is ranked together: units of one kind, of blocks that have equally many."""
    return units.kind, units.count, target.lead, "" if units_of(target) else "inputs"


def _place(target: Target) -> Any:
    """Whose units they are: the block's, or those of the input that a matrix reads."""
    return target.block if units_of(target) else target.site


def _logical(gradient: torch.Tensor, target: Target) -> torch.Tensor:
    return gradient.transpose(-1, -2) if target.transposed else gradient
