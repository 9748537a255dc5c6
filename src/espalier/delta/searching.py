"""The contract of methods that choose a merge by data (``search/``): from a problem to candidates.

A searcher is a function of a :class:`Problem`. It makes recipes of merges and asks what they lose on the data, or how the
loss changes along the models; each answer is recorded, so a search that was killed goes through its answers again and
asks on from there. It must therefore depend on nothing but the problem's answers and its seed. The best candidate of
all that it asked about is the result.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Recipe = dict[str, Any]
"""The entries of a merge's recipe, as its file has them."""


@dataclass(frozen=True)
class Gene:
    """One thing that candidates differ in.

    Args:
        name: where it stands in the recipe.
        low, high: the range of a number.
        is_log: whether places are even in the logarithm.
        is_integer: whether it is a whole number.
        choices: what it is one of, in the place of a range.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False
    is_integer: bool = False
    choices: tuple[Any, ...] = ()

    def at(self, place: float) -> Any:
        """The value at a place from 0 to 1."""
        if self.choices:
            return self.choices[min(int(place * len(self.choices)), len(self.choices) - 1)]
        if self.is_integer:  # every integer has the same share of the places
            return min(int(self.low) + int(place * (int(self.high) - int(self.low) + 1)), int(self.high))
        if self.is_log:
            return math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))
        return self.low + place * (self.high - self.low)

    def places(self, points: int) -> list[float]:
        """The places of all its choices, or of ``points`` equal distances (of whole numbers, of all where there are no more)."""
        whole = int(self.high) - int(self.low) + 1 if self.is_integer else 0
        if count := len(self.choices) or (whole if whole <= points else 0):
            return [(number + 0.5) / count for number in range(count)]
        return [number / (points - 1) for number in range(points)] if points > 1 else [0.5]


Slopes = Mapping[str, torch.Tensor]
"""For each tensor the inner products of the objective's gradient with every model's change: (models,), float64."""


class Problem(abc.ABC):
    """A merge whose numbers are to be chosen.

    Args:
        genes: what the recipe leaves open.
        budget: candidates (or steps) that may be tried.
        seed: of random numbers.
        paths: of the models, as they were given.
        base: the model that changes are changes of, or ``None``.
        blocks: how many each model has.
        data_sets: how many there are.
    """

    def __init__(
        self, genes: Sequence[Gene], budget: int, seed: int, paths: Sequence[str], base: str | None, blocks: Sequence[int], data_sets: int
    ) -> None:
        self.genes, self.budget, self.seed, self.data_sets = tuple(genes), budget, seed, data_sets
        self.paths, self.base, self.blocks = tuple(paths), base, tuple(blocks)

    @property
    def models(self) -> int:
        """How many models there are."""
        return len(self.paths)

    @abc.abstractmethod
    def at(self, places: Sequence[float]) -> Recipe:
        """The recipe with every gene at its place, from 0 to 1."""

    @abc.abstractmethod
    def recipe(self, method: str, weights: Sequence[float] | None = None, *, with_base: bool = False, own_base: bool = True, **entries: Any) -> Recipe:
        """A recipe of the same models by another method, with further entries.

        Args:
            weights: one of each model.
            with_base: whether the base is one more model, the last.
            own_base: whether what the user's recipe names as its base is named.
        """

    @abc.abstractmethod
    def stream_outputs(self) -> list[str]:
        """Globs for the tensors that make what blocks add to the residual stream.

        Raises:
            EspalierError: where scaling these is not scaling the stream.
        """

    @abc.abstractmethod
    def loss(self, recipe: Recipe, about: str) -> float:
        """What a candidate loses on the data; infinite where the models cannot be merged so.

        Args:
            about: a few words for the record.
        """

    @abc.abstractmethod
    def alone(self, model: int) -> float:
        """What one of the models loses by itself."""

    @abc.abstractmethod
    def slopes(self, recipe: Recipe, *, entropy: bool = False, sequences: int = 8, data: int | None = None, density: float = 1.0) -> Slopes:
        """How the objective changes along every model's change, at the model that a recipe makes.

        Args:
            entropy: the mean entropy of the predictions, in the place of the loss; needs no targets.
            sequences: of each data set that are looked at; each call takes the next ones.
            data: number of the data set; default: the mean over all.
            density: share of the numbers of each change that are kept, the largest.
        """

    @abc.abstractmethod
    def note(self, text: str) -> None:
        """Say something to the user, and in the report."""
