"""The contract of merge methods (``merge/``): one parameter of several models, gone through in slices.

A method is a function of a :class:`Parameter`. It may ask the parameter for statistics (each is a pass over its
slices) and returns the function that makes the merged slice; so nothing needs a whole tensor in memory, however many
models there are. Arithmetic is in float32; the result is rounded once, when it is written.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from espalier.delta.selection import Chosen, thresholds
from espalier.errors import EspalierError
from espalier.kernels.merging import elect, histogram, number_of
from espalier.kernels.philox import Stream

PIECE = 1 << 17
"""Numbers of each model in a slice: those of a few models and what is made of them stay in the second-level cache."""


SAMPLE = 1 << 15
"""Numbers of each model by which thresholds are guessed, before a pass finds them."""


NEEDS_BASE = "the method merges changes; it needs the model that they are changes of: --model BASE"


@dataclass
class Piece:
    """Rows of one parameter of all models, in float32.

    Args:
        base: (rows, columns), or ``None`` where the merge has no base.
        models: (models, rows, columns).
        start: place of the first number in the parameter.
        room: where the updates are put.

    The tensors are those of the next piece too, which overwrites them.
    """

    base: torch.Tensor | None
    models: torch.Tensor
    start: int
    room: torch.Tensor | None = None

    @cached_property
    def updates(self) -> torch.Tensor:
        """What each model changed: (models, rows, columns)."""
        if self.base is None:
            raise EspalierError(NEEDS_BASE)
        return torch.sub(self.models, self.base, out=self.room)


Combine = Callable[[Piece], torch.Tensor]
"""From a piece to the merged rows, (rows, columns)."""


class Parameter(abc.ABC):
    """One parameter of all models.

    Args:
        name: of the tensor.
        shape: of the tensor as it is stored.
        weights: one of each model, (models,), as they were given.
        scale: of the merged change.
        has_base: whether there is a base.
        seed: of random numbers.
        survey: what the method's first pass over the whole model found.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], weights: Sequence[float], scale: float, has_base: bool, seed: int, survey: Any = None
    ) -> None:
        self.name, self.shape, self.scale, self.has_base, self.seed, self.survey = name, shape, scale, has_base, seed, survey
        self.weights = torch.tensor(weights, dtype=torch.float32)

    @property
    def models(self) -> int:
        """How many models are merged."""
        return len(self.weights)

    @property
    def numel(self) -> int:
        """Numbers of the parameter."""
        return self.rows * self.columns

    @property
    def columns(self) -> int:
        """Numbers of a row: the last dimension; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    @cached_property
    def rows(self) -> int:
        """Rows of all leading dimensions."""
        return torch.Size(self.shape[:-1]).numel()

    @abc.abstractmethod
    def rows_of(self, start: int, stop: int) -> Piece:
        """The rows from ``start`` to ``stop`` of every model."""

    def pieces(self) -> Iterator[Piece]:
        """All of it in order, in slices of whole rows."""
        step = max(PIECE // max(self.columns, 1), 1)
        for start in range(0, self.rows, step):
            yield self.rows_of(start, min(start + step, self.rows))

    def sampled(self) -> Iterator[Piece]:
        """Some of it: rows here and there, about :data:`SAMPLE` numbers."""
        take = max(SAMPLE // 32 // max(self.columns, 1), 1)
        for start in range(0, self.rows, max(self.rows // 32, take)):
            yield self.rows_of(start, min(start + take, self.rows))

    def whole(self) -> Piece:
        """All of it at once, for methods that need a matrix."""
        return self.rows_of(0, self.rows)

    def each(self, value: float | Sequence[float], name: str) -> list[float]:
        """A hyperparameter of every model: one number for all, or one for each.

        Raises:
            EspalierError: when there are neither one nor as many as models.
        """
        values = [float(v) for v in ([value] if isinstance(value, int | float) else value)]
        values = values * self.models if len(values) == 1 else values
        if len(values) != self.models:
            raise EspalierError(f"{name} has {len(values)} values; there are {self.models} models (or give one for all)")
        return values

    def shares(self) -> torch.Tensor:
        """The weights divided by their sum.

        Raises:
            EspalierError: when they sum to zero.
        """
        total = self.weights.sum()
        if float(total.abs()) < 1e-8:
            raise EspalierError(f"the weights {self.weights.tolist()} sum to 0 and cannot be normalized; give others, or --no-normalize")
        return self.weights / total

    def count(self, density: float) -> int:
        """How many of the parameter's numbers a density keeps: int(density numbers), but one at least unless it is 0.

        Raises:
            EspalierError: for a density that is not in [0, 1].
        """
        if not 0 <= density <= 1:
            raise EspalierError(f"density is {density}; it must be from 0 to 1")
        return max(1, int(density * self.numel)) if density else 0

    def stream(self, purpose: str) -> Stream:
        """Random numbers of this parameter, the same whatever the slices and threads."""
        return Stream(self.seed, f"{purpose} {self.name}")

    # statistics, each a pass

    def gram(self, of: str = "models") -> torch.Tensor:
        """Inner products of the models (or ``updates``) as vectors: (models, models), float64."""
        total = torch.zeros(self.models, self.models, dtype=torch.float64)
        for piece in self.pieces():
            vectors = getattr(piece, of).flatten(1)
            total += (vectors @ vectors.mT).double()
        return total

    def largest(self, counts: Sequence[int], score: Callable[[Piece], torch.Tensor] | None = None) -> Chosen:
        """Which numbers have the largest scores: exactly ``counts[i]`` of row i of the scores, of equal ones the first.

        Args:
            score: from a piece to scores (n, rows, columns), whose magnitudes count; default: the updates.
        """
        scores = score or (lambda piece: piece.updates)
        sample = torch.cat([scores(piece).flatten(1).clone() for piece in self.sampled()], -1)
        return thresholds(lambda: (scores(piece).flatten(1) for piece in self.pieces()), sample, counts, self.numel)


    def ratio(self, over: Callable[[Piece], torch.Tensor], under: Callable[[Piece], torch.Tensor]) -> torch.Tensor:
        """Sums of scores of each model, one over the other: (models, 1, 1); 1 where one of them is as good as zero."""
        sums = torch.zeros(2, self.models, dtype=torch.float64)
        for piece in self.pieces():
            sums += torch.stack([over(piece), under(piece)]).flatten(2).sum(-1, dtype=torch.float64)
        found = torch.where((sums > 1e-7).all(0), sums[0] / sums[1].clamp_min(1e-7), 1.0)
        return found.float()[:, None, None]


def combination(parameter: Parameter, coefficients: Sequence[float], of: str = "models") -> Combine:
    """The linear combination of the models, or the base plus that of their updates."""
    factors = torch.tensor(list(coefficients), dtype=torch.float32)

    def combine(piece: Piece) -> torch.Tensor:
        made = torch.einsum("n,nrc->rc", factors, getattr(piece, of))
        return piece.base + made * parameter.scale if of == "updates" and piece.base is not None else made

    return combine


def merged_changes(parameter: Parameter, changes: Callable[[Piece], torch.Tensor], majority: str, normalize: bool | None) -> Combine:
    """The base plus the weighted changes: all of them (``majority`` "none"), or those of the sign that is elected."""
    weights, by_vote = parameter.weights, majority != "none"
    everything, all_of_them = torch.zeros_like(weights), torch.full((parameter.models,), -1)
    divisor = float(parameter.shares()[0] / weights[0]) if normalize and not by_vote and float(weights[0]) else 1.0

    def combine(piece: Piece) -> torch.Tensor:
        if piece.base is None:
            raise EspalierError(NEEDS_BASE)
        if by_vote:
            mass, divide = majority == "mass", normalize is not False
            return elect(piece.base, changes(piece), weights, everything, all_of_them, mass, divide, parameter.scale)
        return piece.base + torch.einsum("n,nrc->rc", weights * divisor, changes(piece)) * parameter.scale

    return combine


@dataclass
class Whole:
    """All parameters that are merged, for methods with a first pass over the whole model."""

    parameters: Sequence[Parameter]
    total: Callable[[Callable[[Parameter], torch.Tensor]], torch.Tensor]
    """The sum of a tensor that is made of every parameter, on all threads, added in the parameters' order."""

    def quantiles(self, score: Callable[[Parameter, Piece], torch.Tensor], shares: Sequence[float]) -> list[torch.Tensor]:
        """Exact quantiles of each model's scores over all parameters: the number at place int(share d) of d in order.

        Args:
            score: from a parameter and a piece to scores (models, rows, columns).

        Returns:
            For each share the numbers, (models, 1, 1).
        """
        models = self.parameters[0].models
        total = sum(parameter.numel for parameter in self.parameters)
        places = [min(int(share * total), total - 1) for share in shares]

        def counted(uppers: list[list[int]] | None) -> torch.Tensor:
            """Counts by the upper half of the bits, (models, 1, bins), or by the lower half of those with an upper half."""

            def of(parameter: Parameter) -> torch.Tensor:
                bins = torch.zeros(models, len(uppers[0]) if uppers else 1, 1 << 16, dtype=torch.int64)
                for piece in parameter.pieces():
                    for model, numbers in enumerate(score(parameter, piece).flatten(1)):
                        for row in range(bins.shape[1]):
                            histogram(numbers, uppers[model][row] if uppers else -1, bins[model, row])
                return bins

            return self.total(of)

        first = counted(None)[:, 0].cumsum(-1)
        uppers = [[int(torch.searchsorted(row, place, right=True)) for place in places] for row in first]
        second = counted(uppers).cumsum(-1)
        found = torch.empty(len(places), models)
        for model in range(models):
            for row, (place, upper) in enumerate(zip(places, uppers[model], strict=True)):
                before = int(first[model, upper - 1]) if upper else 0
                lower = int(torch.searchsorted(second[model, row], place - before, right=True))
                found[row, model] = number_of(upper << 16 | lower)
        return [row[:, None, None] for row in found]
