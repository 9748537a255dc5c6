"""Choosing exactly k numbers, the largest first and equal ones in the order of their index.

A threshold alone keeps another number wherever values are equal, as they often are in bf16; so these choose by index.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch

from espalier.errors import EspalierError
from espalier.kernels.merging import Between

TOO_LARGE = "the models' numbers are too large for arithmetic in float32; are they damaged?"
"""Of scores that are no numbers though the models are finite."""

_LOW = 16  # bits of a magnitude that the second pass looks at


def kept(count: int, density: float) -> int:
    """How many of ``count`` a density keeps: the nearest number, but one at least unless the density is 0.

    Raises:
        EspalierError: for a density that is not in [0, 1].
    """
    if not 0 <= density <= 1:
        raise EspalierError(f"density is {density!r}; it must be from 0 to 1")
    return min(count, max(1, round(density * count))) if density else 0


def largest_mask(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the ``count`` largest of every row of ``scores`` (..., n) are; of equal ones the first."""
    length = scores.shape[-1]
    if count >= length or not count:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    threshold = scores.kthvalue(length - count + 1, dim=-1, keepdim=True).values
    chosen = scores >= threshold
    surplus = chosen.sum(-1, keepdim=True) - count
    rows = surplus.squeeze(-1) > 0  # where equal ones are too many, the last of them go
    if bool(rows.any()):
        ties = scores[rows] == threshold[rows]
        chosen[rows] &= ~(ties & (ties.flip(-1).cumsum(-1).flip(-1) <= surplus[rows]))
    return chosen


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the ``count`` largest of ``scores`` (..., n), ascending, (..., count); of equal ones the first."""
    return largest_mask(scores, count).nonzero()[:, -1].reshape(*scores.shape[:-1], min(count, scores.shape[-1]))


@dataclass
class Cut:
    """Where the largest magnitudes of many vectors end, and what they are like.

    Args:
        threshold: the least magnitude that is kept, float32.
        ties: how many of exactly that magnitude are kept; :meth:`take` counts them down, vector after vector.
        std: standard deviation of all numbers.
        mean: mean of the kept magnitudes.
    """

    threshold: float
    ties: int
    std: float
    mean: float

    def take(self, vector: torch.Tensor) -> torch.Tensor:
        """Positions, ascending, of what is kept of the next vector (n,)."""
        magnitudes = vector.abs().float()
        chosen = magnitudes > self.threshold
        ties = (magnitudes == self.threshold).nonzero().squeeze(-1)[: self.ties]
        self.ties -= len(ties)
        chosen[ties] = True
        return chosen.nonzero().squeeze(-1)


def across(vectors: Callable[[], Iterable[torch.Tensor]], density: float = 1.0, count: int | None = None) -> Cut:
    """The cut that keeps exactly that share of all numbers of ``vectors``, if as many are not zero; or ``count`` of them, zeros too.

    They are gone through twice, one at a time.

    Magnitudes are counted by the upper half of the bits of their float32, then by the lower half: their order as
    integers is their order as numbers.
    """
    counts, squares, total, entries, nonzero = numpy.zeros(1 << 16, numpy.int64), 0.0, 0.0, 0, 0
    sums = numpy.zeros(1 << 16)
    for vector in vectors():
        bits, magnitudes = _magnitudes(vector)
        counts += numpy.bincount(bits >> _LOW, minlength=1 << 16)
        sums += numpy.bincount(bits >> _LOW, weights=magnitudes, minlength=1 << 16)
        total += float(vector.sum(dtype=torch.float64))
        squares += float(vector.double().square().sum())
        entries += vector.numel()
        nonzero += int(numpy.count_nonzero(magnitudes))
    std = math.sqrt(max(squares / max(entries, 1) - (total / max(entries, 1)) ** 2, 0.0))
    wanted = min(kept(entries, density), nonzero) if count is None else count
    if not wanted:
        return Cut(math.inf, 0, std, 0.0)
    upper, above = _bin_of(counts, wanted)
    size = float(sums[upper + 1 :].sum())
    counts[:], sums[:] = 0, 0
    for vector in vectors():
        bits, magnitudes = _magnitudes(vector)
        inside = (bits >> _LOW) == upper
        low = bits[inside] & ((1 << _LOW) - 1)
        counts += numpy.bincount(low, minlength=1 << 16)
        sums += numpy.bincount(low, weights=magnitudes[inside], minlength=1 << 16)
    lower, inner = _bin_of(counts, wanted - above)
    threshold = float(numpy.array((upper << _LOW) | lower, numpy.int32).view(numpy.float32))
    ties = wanted - above - inner
    size += float(sums[lower + 1 :].sum()) + ties * threshold
    return Cut(threshold, ties, std, size / wanted)


class Chosen:
    """The largest numbers of several vectors, vector by vector exactly as many as wanted; asked slice by slice, in order.

    Args:
        limits: the least score of each vector that is chosen, (vectors,) float32.
        ties: how many of exactly that score are chosen, or -1 where all of them are.
    """

    def __init__(self, limits: torch.Tensor, ties: list[int]) -> None:
        self.limits, self.ties = limits, torch.tensor(ties)
        self._ties = self.ties.clone()

    def again(self) -> None:
        """Begin anew with the first slice."""
        self.ties.copy_(self._ties)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Where the next slice of scores (vectors, ...) is chosen, as a mask of its shape."""
        limits = self.limits.to(scores.device).reshape(-1, *[1] * (scores.ndim - 1))
        mask = scores >= limits
        for vector, left in enumerate(self.ties.tolist()):
            if left < 0:
                continue
            ties = (scores[vector] == self.limits[vector]).flatten().nonzero().squeeze(-1)
            mask[vector].view(-1)[ties[left:]] = False
            self.ties[vector] = max(left - len(ties), 0)
        return mask


def thresholds(
    gather: Callable[[dict[int, Between]], None], sample: torch.Tensor, counts: Sequence[int], length: int
) -> Chosen:
    """The ``counts[i]`` largest magnitudes of each vector i, of ``length`` numbers each; of equal ones the first.

    A sample gives bounds between which the threshold all but certainly lies. One pass counts what is below them and
    gathers what is between them; it is repeated with other bounds where the sample misled.

    Args:
        gather: adds all magnitudes of some vectors to what counts them.
        sample: some numbers of each, (vectors, s).
    """
    limits, ties = torch.empty(len(counts)), [-1] * len(counts)
    bounds = {}
    for vector, count in enumerate(counts):
        if 0 < count < length:
            bounds[vector] = _bounds(sample[vector].abs(), 1 - count / length)
        else:
            limits[vector] = torch.inf if count <= 0 else -1.0
    for attempt in itertools.count():
        if not bounds:
            break
        if attempt == 2:  # other bounds hold every number but those that are none
            raise EspalierError(TOO_LARGE)
        found = {vector: Between(low, high, signed=False) for vector, (low, high) in bounds.items()}
        gather(found)
        for vector, between in found.items():
            low, high = bounds.pop(vector)
            inside, (below, at_low, at_high) = between.numbers(), between.counts
            at_high = at_high if low < high else 0
            above = length - below - at_low - len(inside) - at_high
            wanted = counts[vector] - above
            if wanted <= 0:
                bounds[vector] = (high, torch.inf)
            elif wanted <= at_high:
                limits[vector], ties[vector] = high, _missing(wanted, at_high)
            elif (wanted := wanted - at_high) <= len(inside):
                limits[vector] = limit = inside.kthvalue(len(inside) - wanted + 1).values
                ties[vector] = _missing(wanted - int(torch.count_nonzero(inside > limit)), int(torch.count_nonzero(inside == limit)))
            elif (wanted := wanted - len(inside)) <= at_low:
                limits[vector], ties[vector] = low, _missing(wanted, at_low)
            else:
                bounds[vector] = (-1.0, low)
    return Chosen(limits, ties)


def _bounds(sample: torch.Tensor, share: float) -> tuple[float, float]:
    """Between which numbers a quantile lies, but for a chance of about 1e-6, by a sample."""
    size = len(sample)
    margin = 5 * math.sqrt(share * (1 - share) / size) + 4 / size
    low, high = math.floor((share - margin) * size), math.ceil((share + margin) * size)
    inside = [place for place in (low, high) if 0 <= place < size]
    order = numpy.partition(sample.cpu().numpy(), inside) if inside else sample
    return float(order[low]) if low > 0 else -1.0, float(order[high]) if high < size else math.inf


def _missing(wanted: int, there: int) -> int:
    return -1 if wanted == there else wanted


def _magnitudes(vector: torch.Tensor) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The bits of the magnitudes as integers, and the magnitudes."""
    values = vector.detach().flatten().float().abs().cpu().contiguous().numpy()
    return values.view(numpy.int32), values


def _bin_of(counts: numpy.ndarray, wanted: int) -> tuple[int, int]:
    """The bin in which the ``wanted``-th from the top lies, and how many lie above it."""
    from_top = numpy.cumsum(counts[::-1])
    place = int(numpy.searchsorted(from_top, wanted))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0
