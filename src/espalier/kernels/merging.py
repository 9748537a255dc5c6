"""The inner loops of merging over a slice: plain here, compiled in ``merging_fast.py`` where numba is installed.

Both do the same float32 operations in the same order, so they agree bit for bit.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy
import torch
from torch.nn import functional

from espalier.kernels.philox import Stream

TILE = 1024
"""Numbers that compiled loops work on at a time: what is made of them stays in the first-level cache."""

LANES = 256
"""Numbers that are compared, or added up, at once."""


class Room(threading.local):
    """Memory that each thread works in again and again: what is in it is overwritten by the next who asks."""

    def __init__(self) -> None:
        self._held = torch.empty(0)

    def __call__(self, *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Uninitialised float32 of this shape."""
        size = math.prod(shape)
        if len(self._held) < size or self._held.device.type != torch.device(device).type:
            self._held = torch.empty(size, device=device)
        return self._held[:size].view(shape)


_inside = Room()


@functools.cache
def _fast() -> Any:
    try:
        from espalier.kernels import merging_fast
    except ImportError:
        warnings.warn("numba is not installed, so merging runs without its compiled loops, some times slower; pip install 'espalier[fast]'")
        return None
    return merging_fast


class Numbers:
    """The same numbers of a base and of models, as they are stored: compiled loops read them there, a tile at a time.

    Args:
        base: (...), of any floating point dtype.
        models: of each model the same, or what it changed of the base.
        refuse: called with the model, or ``None`` for the base, in which something is not finite.
        are_changes: whether ``models`` are what they changed.
        device: where plain loops work on them.
    """

    def __init__(
        self, base: torch.Tensor, models: Sequence[torch.Tensor], refuse: Callable[[int | None], NoReturn], are_changes: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self._rows, self._refuse, self.are_changes, self.device = [base, *models], refuse, are_changes, torch.device(device)
        self.models, self.shape, self.length = len(models), base.shape, base.numel()

    @cached_property
    def places(self) -> numpy.ndarray:
        """Where base and models are, and how many bytes a number of each has, two of bf16 or four of float32: (models + 1, 2)."""
        self._rows = [(row if row.dtype == torch.bfloat16 else row.float()).contiguous() for row in self._rows]
        return numpy.array([(row.data_ptr(), row.itemsize) for row in self._rows], numpy.int64)

    @cached_property
    def base(self) -> torch.Tensor:
        """(n,), float32."""
        return self._wide(0)

    def change(self, model: int) -> torch.Tensor:
        """What a model changed: (n,), float32."""
        wide = self._wide(model + 1)
        return wide if self.are_changes else wide - self.base

    def _wide(self, row: int) -> torch.Tensor:
        wide = self._rows[row].reshape(-1).to(self.device, torch.float32)
        self.require_finite(-1 if bool(wide.isfinite().all()) else row)
        return wide

    def require_finite(self, strange: int) -> None:
        """Refuse what a loop found: the base (0), a model (1 and more), or nothing (-1)."""
        if strange >= 0:
            self._refuse(strange - 1 if strange else None)


class Between:
    """What lies between two bounds of the numbers that come, or of their magnitudes, the bounds themselves left out.

    ``counts``: how many are below the lower bound, how many equal it, and how many equal the upper one.
    """

    def __init__(self, low: float, high: float, signed: bool = True) -> None:
        self.low, self.high, self.signed, self.counts = low, high, signed, [0, 0, 0]
        self._parts: list[torch.Tensor] = []

    def numbers(self) -> torch.Tensor:
        """All that has been gathered, in no order."""
        return torch.cat(self._parts) if self._parts else torch.empty(0)

    def add(self, numbers: torch.Tensor) -> None:
        """Go through (n,) float32 numbers."""
        if numbers.is_cpu and (fast := _fast()):
            counts, inside = numpy.zeros(4, numpy.int64), _inside(len(numbers) + 1)
            fast.between(numbers.numpy(), self.low, self.high, self.signed, counts, inside.numpy())
            *some, count = counts.tolist()
            self.keep(some, inside[:count].clone())
            return
        numbers = numbers if self.signed else numbers.abs()
        masks = numbers < self.low, numbers == self.low, numbers == self.high
        self.keep([int(torch.count_nonzero(mask)) for mask in masks], numbers[(numbers > self.low) & (numbers < self.high)])

    def keep(self, counts: list[int], inside: torch.Tensor) -> None:
        """Take over what has been counted and gathered."""
        if len(inside):
            self._parts.append(inside)
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]


def add_changes(numbers: Numbers, found: Sequence[tuple[int, Between]]) -> None:
    """Go through the magnitudes of changes, for each of ``found`` through those of its model."""
    if numbers.device.type == "cpu" and (fast := _fast()):
        _gather(numbers, found, fast.between_changes)
        return
    for model, between in found:
        between.add(numbers.change(model).abs())


def _gather(numbers: Numbers, found: Sequence[tuple[int, Between]], loop: Callable[..., int], *arguments: Any) -> None:
    """Have a compiled loop gather for several."""
    found = sorted(found, key=lambda pair: pair[0])
    models = numpy.array([model for model, _ in found])
    lows = numpy.array([between.low for _, between in found], numpy.float32)
    highs = numpy.array([between.high for _, between in found], numpy.float32)
    counts, inside = numpy.zeros((len(found), 4), numpy.int64), _inside(len(found), numbers.length + 1)
    numbers.require_finite(loop(numbers.places, numbers.length, *arguments, models, lows, highs, counts, inside.numpy()))
    for (_, between), (*some, count), gathered in zip(found, counts.tolist(), inside, strict=True):
        between.keep(some, gathered[:count].clone())


class Draws:
    """Which changes of models are kept at random, and what they are multiplied by.

    A model's change is kept where the next uniform number of the model's stream is below its odds.

    Args:
        streams, odds, factors: one of each model.
    """

    def __init__(self, streams: Sequence[Stream], odds: Sequence[float], factors: Sequence[float]) -> None:
        self._streams, self._odds, self._factors = streams, odds, factors

    def arrays(self) -> tuple[Any, ...]:
        """What the compiled loops take: keys and positions (models, 3), odds and factors (models,)."""
        counters = numpy.array([(*stream.key, stream.position) for stream in self._streams], numpy.uint64).reshape(-1, 3)
        return counters, numpy.array(self._odds, numpy.float32), numpy.array(self._factors, numpy.float32)

    def keep(self, model: int, changes: torch.Tensor) -> torch.Tensor:
        """What is kept of (n,) changes of a model, times its factor, and zeros."""
        stream = self._streams[model]
        drawn = stream.at(stream.position).uniform(len(changes), device=changes.device)
        factors = drawn.new_tensor([0.0, self._factors[model]])
        return changes * factors[(drawn < drawn.new_tensor(self._odds[model])).long()]


_NOTHING_DRAWN = Draws((), (), ())


def elect(
    numbers: Numbers, weights: torch.Tensor, by_mass: bool, normalize: bool, scale: float,
    limits: torch.Tensor | None = None, ties: torch.Tensor | None = None, draws: Draws | None = None,
) -> torch.Tensor:  # fmt: skip
    """Drop and trim changes, elect a sign, and merge what has it (TIES, arXiv:2306.01708), for one slice; float32, in its shape.

    Args:
        weights: of the models, (models,).
        by_mass: whether the sum of weighted changes elects the sign, or the number of models.
        normalize: whether what has the sign is divided by its weights.
        scale: of the merged change.
        limits: the least magnitude of a change that is kept, (models,); default: all are.
        ties: how many of exactly that magnitude are kept from here on, -1 for all, (models,) int64; counted down.
        draws: what is dropped at random before; default: nothing.
    """
    limits = torch.zeros_like(weights) if limits is None else limits
    ties = torch.full((numbers.models,), -1) if ties is None else ties
    if numbers.device.type == "cpu" and (fast := _fast()):
        out = torch.empty(numbers.shape)
        below = torch.nextafter(limits, torch.full_like(limits, -torch.inf))
        vectors, drawn = (t.numpy() for t in (weights, below, limits, ties)), (draws or _NOTHING_DRAWN).arrays()
        found = fast.elect(numbers.places, numbers.are_changes, *drawn, *vectors, by_mass, normalize, scale, out.view(-1).numpy())
        numbers.require_finite(found)
        return out
    updates = torch.stack([numbers.change(model) for model in range(numbers.models)])
    if draws:
        updates = torch.stack([draws.keep(model, update) for model, update in enumerate(updates)])
    magnitudes, limits, weights = updates.abs(), limits.to(numbers.device), weights.to(numbers.device)
    kept = magnitudes >= limits[:, None]
    for model, left in enumerate(ties.tolist()):
        if left >= 0:
            equal = (magnitudes[model] == limits[model]).nonzero().squeeze(-1)
            kept[model][equal[left:]] = False
            ties[model] = max(left - len(equal), 0)
    changes = torch.where(kept, updates * weights[:, None], 0.0)
    votes, merged, divisor = (torch.zeros_like(numbers.base) for _ in range(3))
    for change in changes:
        votes += change if by_mass else change.sign()
    for change, weight in zip(changes, weights, strict=True):
        agrees = (change > 0) & (votes >= 0) | (change < 0) & (votes < 0)
        merged += torch.where(agrees, change, 0.0)
        divisor += torch.where(agrees, weight, 0.0)
    if normalize:
        merged = merged / divisor.masked_fill(divisor == 0, 1.0)
    return (numbers.base + merged * scale).view(numbers.shape)


def middle(updates: torch.Tensor, skip: int, keep: int, out: torch.Tensor) -> None:
    """Per row, leave out the ``skip`` largest magnitudes and keep the ``keep`` next, of equal ones the first.

    Args:
        updates: (rows, columns), float32.
        out: what is kept, and zeros, (rows, columns).
    """
    if updates.is_cpu and (fast := _fast()):
        fast.middle(updates.numpy(), updates.view(torch.int32).numpy(), skip, keep, out.numpy())
        return
    order = updates.abs().argsort(dim=-1, descending=True, stable=True)
    chosen = order[:, skip : skip + keep]
    out.zero_().scatter_(-1, chosen, updates.gather(-1, chosen))


def thin(updates: torch.Tensor, drawn: torch.Tensor, odds: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
    """Keep numbers with the odds of their magnitude's rank in their row, times the rank's factor.

    Args:
        updates: (rows, columns), float32.
        drawn: uniform numbers in [0, 1); one is kept where it is below the odds, (rows, columns).
        odds, factors: of each rank, the smallest first, (columns,); of equal magnitudes the first has the lower rank.
        out: what is kept, and zeros, (rows, columns).
    """
    if updates.is_cpu and (fast := _fast()):
        bits = updates.view(torch.int32)
        fast.thin(*(t.numpy() for t in (updates, bits, drawn, odds, factors, out)))
        return
    order = updates.abs().argsort(dim=-1, stable=True)
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    out.copy_(torch.where(drawn < odds[ranks], updates * factors[ranks], 0.0))


def drop(numbers: Numbers, draws: Draws, out: torch.Tensor) -> None:
    """Put what is kept of models' changes, and zeros, into ``out`` (models, n)."""
    if numbers.device.type == "cpu" and (fast := _fast()):
        numbers.require_finite(fast.drop(numbers.places, *draws.arrays(), out.numpy()))
        return
    for model, made in enumerate(out):
        made.copy_(draws.keep(model, numbers.change(model)))


def masses(numbers: Numbers, draws: Draws) -> torch.Tensor:
    """Of each model the sum of magnitudes of its changes, and of what is kept of them: (models, 2), float64."""
    sums = torch.zeros(numbers.models, 2, dtype=torch.float64)
    if numbers.device.type == "cpu" and (fast := _fast()):
        numbers.require_finite(fast.masses(numbers.places, numbers.length, *draws.arrays(), sums.numpy()))
        return sums
    for model, made in enumerate(sums):
        change = numbers.change(model)
        for place, vector in enumerate((change, draws.keep(model, change))):
            lanes = functional.pad(vector.abs(), (0, -len(vector) % TILE)).view(-1, TILE // LANES, LANES)
            first, *others = lanes.unbind(1)
            total = functools.reduce(torch.add, others, first)
            while total.shape[1] > 1:
                total = total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :]
            made[place] = functools.reduce(float.__add__, total.flatten().tolist(), 0.0)
    return sums


def variance(updates: torch.Tensor) -> torch.Tensor:
    """The variance of (models, n) float32 numbers over models, divided by their number; zero where all are equal."""
    out = torch.zeros_like(updates[0])
    if updates.is_cpu and (fast := _fast()):
        fast.variance(updates.numpy(), out.numpy())
        return out
    share, mean = torch.tensor(1.0) / len(updates), torch.zeros_like(out)
    for update in updates[1:]:
        mean += update - updates[0]
    mean *= share
    for update in updates:
        off = update - updates[0] - mean
        out += off * off
    return out * share


def agree(base: torch.Tensor, updates: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    """The base plus scale times the weighted mean of those updates that have the sign of their plain sum (SCE, arXiv:2408.07990).

    Args:
        base, updates: (n,) and (models, n), float32.
        weights: of the models, (models,).
    """
    if base.is_cpu and (fast := _fast()):
        out = torch.empty_like(base)
        fast.agree(base.numpy(), updates.numpy(), weights.numpy(), scale, out.numpy())
        return out
    total, divisor, merged = (torch.zeros_like(base) for _ in range(3))
    for update in updates:
        total += update
    for update, weight in zip(updates, weights.to(updates.device), strict=True):
        agrees = (update > 0) & (total >= 0) | (update < 0) & (total < 0)
        merged += torch.where(agrees, update * weight, 0.0)
        divisor += torch.where(agrees, weight, 0.0)
    return base + merged / divisor.masked_fill(divisor == 0, 1.0) * scale


_EXPONENTIAL = tuple(math.exp(-0.5) / math.factorial(power) for power in range(9))
"""exp(x - 1/2) as a series in x; on [-1/2, 1/2] it is exact to float32."""


@dataclass(frozen=True)
class Clamp:
    """Between which magnitudes PCB-Merging draws in the changes of each model: (models,) each, on the CPU."""

    low: torch.Tensor
    high: torch.Tensor

    @cached_property
    def width(self) -> torch.Tensor:
        """What magnitudes are divided by, (models,)."""
        return (self.high - self.low).clamp_min(1e-12)

    def arrays(self) -> tuple[Any, ...]:
        """What the compiled loops take."""
        return (self.low.numpy(), self.high.numpy(), self.width.numpy(), _EXPONENTIAL)


def compete(numbers: Numbers, clamp: Clamp) -> tuple[torch.Tensor, torch.Tensor]:
    """Clamped changes, and their scores (PCB-Merging, arXiv:2410.02396): (models, n) each, float32.

    With a the magnitude between ``low`` and ``high`` divided by ``width``, and s the signed a, the score of model i is
    ``exp(N (a_i^2 - 1)) sum_j tanh(s_i s_j)``. Both functions are rational ones that are exact to float32 here.
    """
    updates = torch.stack([numbers.change(model) for model in range(numbers.models)])
    low, high, width = (limit[:, None].to(updates.device) for limit in (clamp.low, clamp.high, clamp.width))
    magnitudes = updates.abs().clamp_min(low).clamp_max(high)
    sign = updates.sign()
    signed, scores = sign * ((magnitudes - low) * (1 / width)), torch.zeros_like(updates)
    for model, own in enumerate(signed):
        for other in signed:
            x = own * other
            y = x * x
            scores[model] += x * ((y * 21 + 1260) * y + 10395) / (((y + 210) * y + 4725) * y + 10395)
    x = signed * signed - 0.5
    intra = torch.full_like(x, _EXPONENTIAL[8])
    for factor in reversed(_EXPONENTIAL[:8]):
        intra = intra * x + factor
    for _ in updates:
        scores *= intra
    return sign * magnitudes, scores


def add_scores(numbers: Numbers, clamp: Clamp, found: Sequence[tuple[int, Between]]) -> None:
    """Go through the scores of changes (:func:`compete`), for each of ``found`` through those of its model."""
    if numbers.device.type == "cpu" and (fast := _fast()):
        _gather(numbers, found, fast.between_scores, *clamp.arrays())
        return
    scores = compete(numbers, clamp)[1]
    for model, between in found:
        between.add(scores[model])


def blend(numbers: Numbers, clamp: Clamp, cut: torch.Tensor, factors: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    """The base plus the mean of clamped changes by their scores (:func:`compete`); float32, in its shape: see :func:`mean_by_scores`."""
    if numbers.device.type == "cpu" and (fast := _fast()):
        out = torch.empty(numbers.shape)
        vectors = (t.numpy() for t in (cut, factors, weights))
        numbers.require_finite(fast.blend(numbers.places, *clamp.arrays(), *vectors, scale, out.view(-1).numpy()))
        return out
    return mean_by_scores(numbers.base, *compete(numbers, clamp), cut, factors, weights, scale).view(numbers.shape)


def mean_by_scores(
    base: torch.Tensor, clamped: torch.Tensor, scores: torch.Tensor, cut: torch.Tensor, factors: torch.Tensor, weights: torch.Tensor, scale: float
) -> torch.Tensor:
    """The base plus the mean of updates by their scores (PCB-Merging): ``sum_i w_i S_i t_i / sum_i S_i`` times the scale.

    S are the scores above ``cut``, times ``factors``; the others are 0.

    Args:
        base, clamped, scores: (...), and (models, ...) twice, float32.
        cut, factors, weights: (models,).
    """
    merged, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for update, score, least, factor, weight in zip(clamped, scores, cut, factors, weights.to(base.device), strict=True):
        share = (torch.maximum(score, least) - least) * factor
        divisor += share
        merged += update * (share * weight)
    return base + merged / divisor.clamp_min(1e-12) * scale
