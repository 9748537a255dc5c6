"""The inner loops of merging over a slice: plain here, compiled in ``merging_fast.py`` where numba is installed.

Both do the same float32 operations in the same order, so they agree bit for bit.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch


@functools.cache
def _fast() -> Any:
    try:
        from espalier.kernels import merging_fast
    except ImportError:
        warnings.warn("numba is not installed, so merging runs without its compiled loops, some times slower; pip install 'espalier[fast]'")
        return None
    return merging_fast


class Gathered:
    """What lies between two bounds, of numbers that come slice by slice; kept in one buffer that grows."""

    def __init__(self) -> None:
        self._buffer, self._count = torch.empty(0), 0

    def numbers(self) -> torch.Tensor:
        """All that has been gathered."""
        return self._buffer[: self._count]

    def add(self, numbers: torch.Tensor, low: float, high: float) -> tuple[int, int]:
        """Gather the magnitudes above ``low`` and at most ``high`` of (n,); how many are above ``high``, and equal ``low``."""
        if len(self._buffer) < self._count + len(numbers) + 1:
            larger = torch.empty(2 * (self._count + len(numbers)) + 1, device=numbers.device)
            larger[: self._count] = self.numbers()
            self._buffer = larger
        rest = self._buffer[self._count :]
        if numbers.is_cpu and (fast := _fast()):
            above, at_low, count = fast.gather(numbers.numpy(), low, high, rest.numpy())
        else:
            numbers = numbers.abs()
            upper = numbers > low
            inside = numbers[upper & (numbers <= high)]
            count = len(inside)
            rest[:count] = inside
            above, at_low = int(torch.count_nonzero(upper)) - count, int(torch.count_nonzero(numbers == low))
        self._count += count
        return above, at_low


class Between:
    """What lies between two bounds of the numbers that come, the bounds themselves left out; kept in one buffer that grows.

    ``counts``: how many are below the lower bound, how many equal it, and how many equal the upper one.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high, self.counts = low, high, [0, 0, 0]
        self._buffer, self._count = torch.empty(0), 0

    def numbers(self) -> torch.Tensor:
        """All that has been gathered."""
        return self._buffer[: self._count]

    def add(self, numbers: torch.Tensor) -> None:
        """Go through (n,) float32 numbers."""
        if len(self._buffer) < self._count + len(numbers) + 1:
            larger = torch.empty(2 * (self._count + len(numbers)) + 1, device=numbers.device)
            larger[: self._count] = self.numbers()
            self._buffer = larger
        rest = self._buffer[self._count :]
        if numbers.is_cpu and (fast := _fast()):
            *counts, count = fast.between(numbers.numpy(), self.low, self.high, rest.numpy())
        else:
            inside = numbers[(numbers > self.low) & (numbers < self.high)]
            count = len(inside)
            rest[:count] = inside
            masks = numbers < self.low, numbers == self.low, numbers == self.high
            counts = [int(torch.count_nonzero(mask)) for mask in masks]
        self._count += count
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]


def elect(
    base: torch.Tensor,
    updates: torch.Tensor,
    weights: torch.Tensor,
    limits: torch.Tensor,
    ties: torch.Tensor,
    by_mass: bool,
    normalize: bool,
    scale: float,
) -> torch.Tensor:
    """Trim, elect a sign, and merge what has it (TIES, arXiv:2306.01708), for one slice.

    Args:
        base, updates: (rows, columns) and (models, rows, columns), float32.
        weights: of the models, (models,).
        limits: the least magnitude of an update that is kept, (models,).
        ties: how many of exactly that magnitude are kept from here on, -1 for all, (models,) int64; counted down.
        by_mass: whether the sum of weighted updates elects the sign, or the number of models.
        normalize: whether what has the sign is divided by its weights.
        scale: of the merged update.
    """
    if base.is_cpu and (fast := _fast()):
        out = torch.empty_like(base)
        below = torch.nextafter(limits, torch.full_like(limits, -torch.inf))
        flat = (base.flatten(), updates.flatten(1), weights, below, limits, ties)
        fast.elect(*(t.numpy() for t in flat), by_mass, normalize, scale, out.view(-1).numpy())
        return out
    magnitudes = updates.abs()
    kept = magnitudes >= limits[:, None, None]
    for model, left in enumerate(ties.tolist()):
        if left >= 0:
            equal = (magnitudes[model] == limits[model]).flatten().nonzero().squeeze(-1)
            kept[model].view(-1)[equal[left:]] = False
            ties[model] = max(left - len(equal), 0)
    changes = torch.where(kept, updates * weights[:, None, None], 0.0)
    votes, merged, divisor = (torch.zeros_like(base) for _ in range(3))
    for change in changes:
        votes += change if by_mass else change.sign()
    for change, weight in zip(changes, weights, strict=True):
        agrees = (change > 0) & (votes >= 0) | (change < 0) & (votes < 0)
        merged += torch.where(agrees, change, 0.0)
        divisor += torch.where(agrees, weight, 0.0)
    if normalize:
        merged = merged / divisor.masked_fill(divisor == 0, 1.0)
    return base + merged * scale
