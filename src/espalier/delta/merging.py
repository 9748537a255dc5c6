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
from espalier.kernels.philox import Stream

PIECE = 1 << 17
"""Numbers of each model in a slice: those of a few models and what is made of them stay in the second-level cache."""


SAMPLE = 1 << 16
"""Numbers of each model by which thresholds are guessed, before a pass finds them."""


@dataclass
class Piece:
    """Rows of one parameter of all models, in float32.

    Args:
        base: (rows, columns), or ``None`` where the merge has no base.
        models: (models, rows, columns).
        start: place of the first number in the parameter.
    """

    base: torch.Tensor | None
    models: torch.Tensor
    start: int

    @cached_property
    def updates(self) -> torch.Tensor:
        """What each model changed: (models, rows, columns)."""
        if self.base is None:
            raise EspalierError("the method merges changes; it needs the model that they are changes of: --model BASE")
        return self.models - self.base


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
        values = [float(value)] * self.models if isinstance(value, int | float) else [float(v) for v in value]
        if len(values) != self.models:
            raise EspalierError(f"{name} has {len(values)} values; there are {self.models} models (or give one for all)")
        return values

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
            score: from a piece to scores (n, rows, columns), at least 0; default: the magnitudes of the updates.
        """
        scores = score or (lambda piece: piece.updates.abs())
        sample = torch.cat([scores(piece).flatten(1) for piece in self.sampled()], -1)
        return thresholds(lambda: (scores(piece).flatten(1) for piece in self.pieces()), sample, counts, self.numel)


@dataclass
class Whole:
    """All parameters that are merged, for methods with a first pass over the whole model."""

    parameters: Sequence[Parameter]
    each: Callable[[Callable[[Parameter], Any]], list[Any]]
    """Does something with every parameter, on all threads; the results are in the parameters' order."""
