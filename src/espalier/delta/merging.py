"""The contract of merge methods (``merge/``): one parameter of several models, gone through in slices.

A method is a function of a :class:`Parameter`. It may ask the parameter for statistics (each is a pass over its
slices) and returns the function that makes the merged slice; so nothing needs a whole tensor in memory, however many
models there are. Arithmetic is in float32; the result is rounded once, when it is written.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch

from espalier.delta.selection import TOO_LARGE, Chosen, thresholds
from espalier.errors import EspalierError
from espalier.kernels.merging import Between, Numbers, Room, add_changes, elect
from espalier.kernels.philox import Stream

PIECE = 1 << 19
"""Numbers of each model in a slice, at most: enough that the interpreter does not count, few enough for the third-level cache."""

ROOM = 1 << 23
"""Numbers in memory for a slice of all models and what they changed, at most: 32 MiB for each thread."""


SAMPLE = 1 << 15
"""Numbers of each model, at least, by which thresholds are guessed, before a pass finds them."""

WHOLE_SAMPLE = 1 << 18
"""Numbers of each model, at least, by which quantiles of the whole model are guessed; and at most eight times as many."""


NEEDS_BASE = "the method merges changes; it needs the model that they are changes of: --model BASE"


class Piece:
    """Rows of one parameter of all models, in float32: what a method asks for is read when it asks.

    The tensors lie where those of the piece before lay; a method may overwrite them.

    Args:
        begin, stop: the rows.
    """

    def __init__(self, parameter: Parameter, begin: int, stop: int) -> None:
        self._parameter, self._begin, self._stop = parameter, begin, stop
        self.start = begin * parameter.columns
        """place of the first number in the parameter"""
        shape = (2 * parameter.models + 1, stop - begin, parameter.columns)
        self._room = _room(*shape, device=parameter.device)

    @cached_property
    def base(self) -> torch.Tensor | None:
        """(rows, columns), or ``None`` where the merge has no base."""
        return self._read(None, self._room[0]) if self._parameter.has_base else None

    @property
    def origin(self) -> torch.Tensor:
        """The base, for what cannot do without: (rows, columns).

        Raises:
            EspalierError: when there is none.
        """
        if self.base is None:
            raise EspalierError(NEEDS_BASE)
        return self.base

    @cached_property
    def models(self) -> torch.Tensor:
        """(models, rows, columns)."""
        for model, row in enumerate(self.spare):
            self._read(model, row)
        return self.spare

    @cached_property
    def updates(self) -> torch.Tensor:
        """What each model changed: (models, rows, columns)."""
        origin, made = self.origin, self._room[1 : 1 + self._parameter.models]
        for model, row in enumerate(made):
            self._read(model, row).sub_(origin)
        return made

    @cached_property
    def stored(self) -> Numbers:
        """All of it as it is stored, for loops that make no copy of it.

        Raises:
            EspalierError: when there is no base.
        """
        parameter, which = self._parameter, (None, *range(self._parameter.models))
        if not parameter.has_base:
            raise EspalierError(NEEDS_BASE)
        rows = {model: parameter.stored(model, self._begin, self._stop) for model in which}
        base, *models = rows.values()
        return Numbers(base, models, lambda model: parameter.refuse(model, rows[model]), device=parameter.device)

    @property
    def spare(self) -> torch.Tensor:
        """Room for what a method makes of every model: (models, rows, columns). It is that of ``models``."""
        return self._room[1 + self._parameter.models :]

    def _read(self, model: int | None, out: torch.Tensor) -> torch.Tensor:
        return self._parameter.read(model, self._begin, self._stop, out)


def is_finite(numbers: torch.Tensor) -> bool:
    """Whether all floating point numbers are finite; where their sum is, they are, and that is found out sooner."""
    return math.isfinite(float(numbers.sum())) or bool(numbers.isfinite().all())


_room = Room()


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
        device: where pieces are; statistics and weights are on the CPU.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], weights: Sequence[float], scale: float, has_base: bool, seed: int, survey: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.name, self.shape, self.scale, self.has_base, self.seed, self.survey = name, shape, scale, has_base, seed, survey
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.device = torch.device(device)

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
    def stored(self, model: int | None, start: int, stop: int) -> torch.Tensor:
        """The rows from ``start`` to ``stop`` of a model, or of the base (``None``), in any dtype: (rows, columns).

        They may be overwritten when the next ones are asked for.
        """

    @abc.abstractmethod
    def refuse(self, model: int | None, rows: torch.Tensor) -> NoReturn:
        """Say that a model, or the base, is not finite in these rows.

        Raises:
            EspalierError: always.
        """

    def one(self, model: int | None) -> torch.Tensor:
        """All of one model, or of the base (``None``), for methods that need a matrix: (rows, columns), float32."""
        return self.read(model, 0, self.rows, torch.empty(self.rows, self.columns, device=self.device))

    def read(self, model: int | None, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Rows of a model, or of the base (``None``), put into float32 ``out``, (rows, columns), which is returned.

        Raises:
            EspalierError: when they are not finite.
        """
        stored = self.stored(model, start, stop)
        if not is_finite(out.copy_(stored)):
            self.refuse(model, stored)
        return out

    def change(self, model: int) -> torch.Tensor:
        """All that one model changed: (rows, columns), float32."""
        if not self.has_base:
            raise EspalierError(NEEDS_BASE)
        return self.one(model).sub_(self.one(None))

    def pieces(self, most: int = PIECE) -> Iterator[Piece]:
        """All of it in order, in slices of whole rows; of about ``most`` numbers of each model, at most."""
        step = max(min(most, ROOM // (2 * self.models + 1)) // max(self.columns, 1), 1)
        for start in range(0, self.rows, step):
            yield Piece(self, start, min(start + step, self.rows))

    def sampled(self, most: int = SAMPLE) -> Iterator[Piece]:
        """Some of it: rows in eight places, about one in 32 numbers, but :data:`SAMPLE` at least and ``most`` at most."""
        take = max(min(max(self.numel // 32, SAMPLE), most) // 8 // max(self.columns, 1), 1)
        for start in range(0, self.rows, max(self.rows // 8, take)):
            yield Piece(self, start, min(start + take, self.rows))

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
            total += (vectors @ vectors.mT).double().cpu()
        return total

    def largest(self, counts: Sequence[int], score: Callable[[Piece], torch.Tensor] | None = None) -> Chosen:
        """Which numbers have the largest scores: exactly ``counts[i]`` of row i of the scores, of equal ones the first.

        Args:
            score: from a piece to scores (n, rows, columns), whose magnitudes count; default: the updates.
        """
        scores = score or (lambda piece: piece.updates)
        step = 5 if self.numel > SAMPLE else 1  # many rows, as these differ, but few numbers of each
        sample = torch.cat([scores(piece).flatten(1)[:, ::step].clone() for piece in self.sampled(max(4 * SAMPLE, self.numel // 64))], -1)

        def gather(found: dict[int, Between]) -> None:
            for piece in self.pieces():
                if score is None:
                    add_changes(piece.stored, list(found.items()))
                    continue
                made = score(piece).flatten(1)
                for row, between in found.items():
                    between.add(made[row])

        return thresholds(gather, sample, counts, self.numel)

    def ratio(self, masses: Callable[[Piece], torch.Tensor]) -> torch.Tensor:
        """The sum of magnitudes of each model's updates, over that of what is kept of them: (models,).

        1 where one of them is as good as zero.

        Args:
            masses: both sums of a piece, (models, 2), float64.
        """
        sums = torch.zeros(self.models, 2, dtype=torch.float64)
        for piece in self.pieces():
            sums += masses(piece)
        return torch.where((sums > 1e-7).all(1), sums[:, 0] / sums[:, 1].clamp_min(1e-7), 1.0).float()


class Combination:
    """A linear combination of the models, or the base plus that of their updates: a :data:`Combine` that can say so.

    Args:
        coefficients: one of each model.
        of: ``models`` or ``updates``.
        scale: of the merged change.
    """

    def __init__(self, coefficients: Sequence[float], of: str, scale: float) -> None:
        self.coefficients, self.of, self.scale = list(coefficients), of, scale

    def __call__(self, piece: Piece) -> torch.Tensor:
        if self.of == "updates":
            return weighted_sum(piece.updates, self.coefficients).mul_(self.scale).add_(piece.origin)
        made = weighted_sum(piece.models, self.coefficients)
        return made if self.scale == 1 else torch.lerp(piece.origin, made, self.scale)

    def of_updates(self) -> list[float]:
        """What each update is multiplied by in the merged change.

        Raises:
            EspalierError: when models are combined whose coefficients do not sum to 1: then the base changes too.
        """
        total = sum(self.coefficients)
        if self.of == "models" and abs(total - 1) > 1e-5:
            raise EspalierError(f"the models' coefficients {self.coefficients} sum to {total:.6g}; where it is not 1, the base itself is multiplied")
        return [c * self.scale for c in self.coefficients]


def combination(parameter: Parameter, coefficients: Sequence[float], of: str = "models") -> Combination:
    """The linear combination of the models, or the base plus that of their updates.

    The scale is of the change: models that are combined themselves are taken so far away from the base.
    """
    if of == "models":
        _require_base_for_scale(parameter)
    return Combination(coefficients, of, parameter.scale)


def weighted_sum(rows: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    """``sum_i f_i rows_i`` of (models, rows, columns), which are overwritten."""
    total, *others = (row.mul_(factor) for row, factor in zip(rows, factors, strict=True))
    for row in others:
        total.add_(row)
    return total


def _require_base_for_scale(parameter: Parameter) -> None:
    if parameter.scale != 1 and not parameter.has_base:
        raise EspalierError(f"scale is {parameter.scale}; it is of the merged change, and there is no base; give one: --model BASE")


def scaled(parameter: Parameter, combine: Combine) -> Combine:
    """For methods that combine models: the scale times what the result changed of the base.

    Raises:
        EspalierError: for a scale that is not 1, without a base.
    """
    _require_base_for_scale(parameter)
    if parameter.scale == 1:
        return combine
    return lambda piece: torch.lerp(piece.origin, combine(piece), parameter.scale)


def merged_changes(parameter: Parameter, changes: Callable[[Piece], torch.Tensor], majority: str, normalize: bool | None) -> Combine:
    """The base plus the weighted changes: all of them (``majority`` "none"), or those of the sign that is elected."""
    weights, by_vote = parameter.weights, majority != "none"
    factors = (parameter.shares() if normalize and not by_vote else weights).tolist()

    def combine(piece: Piece) -> torch.Tensor:
        if by_vote:
            made = Numbers(piece.origin, changes(piece).unbind(), _too_large, are_changes=True, device=parameter.device)
            return elect(made, weights, majority == "mass", normalize is not False, parameter.scale)
        return weighted_sum(changes(piece), factors).mul_(parameter.scale).add_(piece.origin)

    return combine


def _too_large(model: int | None) -> NoReturn:
    raise EspalierError(TOO_LARGE)


@dataclass
class Whole:
    """All parameters that are merged, for methods with a first pass over the whole model."""

    parameters: Sequence[Parameter]
    each: Callable[[Callable[[Parameter], Any]], Iterable[Any]]
    """What is made of every parameter, in order; made on all threads."""

    def quantiles(self, gather: Callable[[Piece, list[tuple[int, Between]]], None], shares: Sequence[float]) -> list[torch.Tensor]:
        """Exact quantiles of each model's scores over all parameters: the number at place int(share d) of d in order.

        A sample gives bounds between which they all but certainly lie; a pass counts what is below and gathers what is
        between, and is repeated with other bounds where the sample misled.

        Args:
            gather: adds the scores of a piece to some that gather them, each of a model.

        Returns:
            For each share the numbers, (models,), on the CPU.
        """
        total = sum(parameter.numel for parameter in self.parameters)
        found = torch.empty(len(shares), self.parameters[0].models)
        wanted = {
            (row, model): min(int(share * total), total - 1) for row, share in enumerate(shares) for model in range(found.shape[1])
        }
        bounds = self._bounds(gather, {where: place / total for where, place in wanted.items()})

        def gathered(parameter: Parameter) -> dict[tuple[int, int], tuple[list[int], torch.Tensor]]:
            made = {where: Between(*bound) for where, bound in bounds.items()}
            for piece in parameter.pieces():
                gather(piece, [(model, between) for (_, model), between in made.items()])
            return {where: (between.counts, between.numbers()) for where, between in made.items()}

        for attempt in itertools.count():
            if not bounds:
                break
            if attempt == 2:  # other bounds hold every number but those that are none
                raise EspalierError(TOO_LARGE)
            counts = {where: [0, 0, 0] for where in bounds}
            inside: dict[tuple[int, int], list[torch.Tensor]] = {where: [] for where in bounds}
            for made in self.each(gathered):
                for where, (some, numbers) in made.items():
                    counts[where] = [a + b for a, b in zip(counts[where], some, strict=True)]
                    inside[where].append(numbers)
            for where, (low, high) in list(bounds.items()):
                below, at_low, at_high = counts[where]
                at_high = at_high if low < high else 0
                numbers = torch.cat(inside.pop(where))
                place = wanted[where] - below
                if place < 0:
                    bounds[where] = (-math.inf, low)
                    continue
                if place >= at_low + len(numbers) + at_high:
                    bounds[where] = (high, math.inf)
                    continue
                if place < at_low:
                    found[where] = low
                elif place < at_low + len(numbers):
                    found[where] = numbers.kthvalue(place - at_low + 1).values
                else:
                    found[where] = high
                del bounds[where]
        return list(found)

    def _bounds(
        self, gather: Callable[[Piece, list[tuple[int, Between]]], None], shares: dict[tuple[int, int], float]
    ) -> dict[tuple[int, int], tuple[float, float]]:
        """Between which numbers the shares' quantiles lie, but for a small chance."""
        whole = sum(parameter.numel for parameter in self.parameters)
        most = min(max(whole >> 10, WHOLE_SAMPLE), 8 * WHOLE_SAMPLE)

        def sampled(parameter: Parameter) -> torch.Tensor:
            made = [Between(-math.inf, math.inf) for _ in range(parameter.models)]
            for piece in parameter.sampled():
                gather(piece, list(enumerate(made)))
            numbers = [between.numbers().cpu() for between in made]
            if len({len(some) for some in numbers}) > 1:
                raise EspalierError(TOO_LARGE)
            taken = torch.stack(numbers)
            wanted = max(most * parameter.numel // whole, 1)
            return taken[:, :: max(taken.shape[1] // wanted, 1)].clone()

        samples = list(self.each(sampled))
        weights = torch.cat([torch.full((s.shape[1],), p.numel / s.shape[1]) for p, s in zip(self.parameters, samples, strict=True)])
        size = float(weights.sum().square() / weights.square().sum())
        order = torch.cat(samples, -1).sort()
        reached = weights[order.indices].double().cumsum(-1)
        made = {}
        for (row, model), share in shares.items():
            margin = 8 * math.sqrt(share * (1 - share) / size) + 8 / size
            ends = torch.tensor([share - margin, share + margin], dtype=torch.float64) * reached[model, -1]
            low, high = torch.searchsorted(reached[model], ends).tolist()
            there = order.values[model]
            made[row, model] = (
                float(there[low]) if share > margin else -math.inf,
                float(there[high]) if high < len(there) else math.inf,
            )
        return made
