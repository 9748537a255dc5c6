"""The inner loops of merging over a slice: plain here, compiled in ``merging_fast.py`` where numba is installed.

Both do the same float32 operations in the same order, so they agree bit for bit.
"""

from __future__ import annotations

import functools
import math
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


class Between:
    """What lies between two bounds of the numbers that come, or of their magnitudes, the bounds themselves left out.

    ``counts``: how many are below the lower bound, how many equal it, and how many equal the upper one.
    """

    def __init__(self, low: float, high: float, signed: bool = True) -> None:
        self.low, self.high, self.signed, self.counts = low, high, signed, [0, 0, 0]
        self._parts: list[torch.Tensor] = []
        self._room = torch.empty(0)

    def numbers(self) -> torch.Tensor:
        """All that has been gathered, in no order."""
        return torch.cat(self._parts) if self._parts else torch.empty(0)

    def add(self, numbers: torch.Tensor) -> None:
        """Go through (n,) float32 numbers."""
        if numbers.is_cpu and (fast := _fast()):
            if len(self._room) <= len(numbers):
                self._room = torch.empty(len(numbers) + 1)
            *counts, count = fast.between(numbers.numpy(), self.low, self.high, self.signed, self._room.numpy())
            inside = self._room[:count].clone()
        else:
            numbers = numbers if self.signed else numbers.abs()
            inside = numbers[(numbers > self.low) & (numbers < self.high)]
            masks = numbers < self.low, numbers == self.low, numbers == self.high
            counts = [int(torch.count_nonzero(mask)) for mask in masks]
        if len(inside):
            self._parts.append(inside)
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
    magnitudes, limits, weights = updates.abs(), limits.to(updates.device), weights.to(updates.device)
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


def drop(updates: torch.Tensor, drawn: torch.Tensor, odds: float, factor: float, out: torch.Tensor) -> None:
    """Keep the numbers (n,) where what was ``drawn`` (n,) is below the odds, times the factor, in ``out``."""
    if updates.is_cpu and (fast := _fast()):
        fast.drop(updates.numpy(), drawn.numpy(), odds, factor, out.numpy())
        return
    out.copy_(updates * torch.where(drawn < odds, factor, 0.0))


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


def compete(updates: torch.Tensor, low: torch.Tensor, high: torch.Tensor, width: torch.Tensor, scores: torch.Tensor) -> None:
    """Clamp updates, and score them (PCB-Merging, arXiv:2410.02396).

    With a the magnitude between ``low`` and ``high`` divided by ``width``, and s the signed a, the score of model i is
    ``exp(N (a_i^2 - 1)) sum_j tanh(s_i s_j)``. Both functions are rational ones that are exact to float32 here.

    Args:
        updates: (models, n), float32; they become the clamped ones.
        low, high, width: (models,).
        scores: where they are put, (models, n).
    """
    if updates.is_cpu and (fast := _fast()):
        limits = (low.numpy(), high.numpy(), width.numpy())
        fast.compete(updates.numpy(), *limits, _EXPONENTIAL, updates.numpy(), scores.numpy())
        return
    magnitudes = updates.abs().clamp_min(low[:, None]).clamp_max(high[:, None])
    sign = updates.sign()
    signed = sign * ((magnitudes - low[:, None]) * (1 / width[:, None]))
    scores.zero_()
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
    updates.copy_(sign * magnitudes)


def blend(
    base: torch.Tensor, clamped: torch.Tensor, scores: torch.Tensor, cut: torch.Tensor, factors: torch.Tensor, weights: torch.Tensor, scale: float
) -> torch.Tensor:
    """The base plus the mean of updates by their scores (PCB-Merging): ``sum_i w_i S_i t_i / sum_i S_i`` times the scale.

    S are the scores above ``cut``, times ``factors``; the others are 0.

    Args:
        base, clamped, scores: (n,), and (models, n) twice, float32.
        cut, factors, weights: (models,).
    """
    if base.is_cpu and (fast := _fast()):
        out = torch.empty_like(base)
        fast.blend(*(t.numpy() for t in (base, clamped, scores, cut, factors, weights)), scale, out.numpy())
        return out
    merged, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for update, score, least, factor, weight in zip(clamped, scores, cut, factors, weights.to(base.device), strict=True):
        share = (torch.maximum(score, least) - least) * factor
        divisor += share
        merged += update * (share * weight)
    return base + merged / divisor.clamp_min(1e-12) * scale
