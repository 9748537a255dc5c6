"""Choosing exactly k numbers, the largest first and equal ones in the order of their index.

A threshold alone keeps another number wherever values are equal, as they often are in bf16; so these choose by index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy
import torch

from espalier.errors import EspalierError

_LOW = 16  # bits of a magnitude that the second pass looks at


def kept(count: int, density: float) -> int:
    """How many of ``count`` a density keeps: the nearest number, but one at least unless the density is 0.

    Raises:
        EspalierError: for a density that is not in [0, 1].
    """
    if not 0 <= density <= 1:
        raise EspalierError(f"density is {density!r}; it must be from 0 to 1")
    return min(count, max(1, round(density * count))) if density else 0


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the ``count`` largest of ``scores`` (..., n), ascending, (..., count); of equal ones the first."""
    length = scores.shape[-1]
    if count >= length:
        return torch.arange(length, device=scores.device).expand(*scores.shape[:-1], length)
    if not count:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.int64, device=scores.device)
    threshold = scores.kthvalue(length - count + 1, dim=-1, keepdim=True).values
    chosen = scores > threshold
    ties = scores == threshold
    missing = count - chosen.sum(-1, keepdim=True)
    if scores.ndim == 1:
        chosen[ties.nonzero()[: int(missing)]] = True
        return chosen.nonzero().squeeze(-1)
    chosen |= ties & (ties.cumsum(-1) <= missing)
    return chosen.nonzero()[:, -1].reshape(*scores.shape[:-1], count)


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


def across(vectors: Callable[[], Iterable[torch.Tensor]], density: float) -> Cut:
    """The cut that keeps exactly that share of all numbers of ``vectors``, if as many are not zero.

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
    wanted = min(kept(entries, density), nonzero)
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


def _magnitudes(vector: torch.Tensor) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The bits of the magnitudes as integers, and the magnitudes."""
    values = vector.detach().flatten().float().abs().cpu().contiguous().numpy()
    return values.view(numpy.int32), values


def _bin_of(counts: numpy.ndarray, wanted: int) -> tuple[int, int]:
    """The bin in which the ``wanted``-th from the top lies, and how many lie above it."""
    from_top = numpy.cumsum(counts[::-1])
    place = int(numpy.searchsorted(from_top, wanted))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0
