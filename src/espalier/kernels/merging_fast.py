"""The compiled loops of merging: what lies between two bounds, and the election of signs; by numba, for one thread.

Imported where numba is installed; the plain twins are in ``merging.py``, and the tests hold the two together.
"""

from __future__ import annotations

import numba
import numpy as np

TILE = 2048
"""Numbers that are worked on at a time: what is made of them stays in the first-level cache."""


def _gather(numbers, low, high, inside):  # type: ignore[no-untyped-def]
    """How many magnitudes are above ``high`` and equal to ``low``, and how many are between: those are put into ``inside``."""
    above, at_low, count = 0, 0, 0
    magnitudes = np.empty(TILE, np.float32)
    for begin in range(0, len(numbers), TILE):
        tile = magnitudes[: min(TILE, len(numbers) - begin)]
        theirs = numbers[begin : begin + TILE]
        for i in range(len(tile)):
            tile[i] = abs(theirs[i])
        upper, equal = 0, 0
        for i in range(len(tile)):
            upper += tile[i] > high
            equal += tile[i] == low
        above += upper
        at_low += equal
        for i in range(len(tile)):
            inside[count] = tile[i]
            count += (tile[i] > low) & (tile[i] <= high)
    return above, at_low, count


def _between(numbers, low, high, inside):  # type: ignore[no-untyped-def]
    """How many numbers are below ``low``, equal to it, and equal to ``high``; those between are put into ``inside``."""
    below, at_low, at_high, count = 0, 0, 0, 0
    for begin in range(0, len(numbers), TILE):
        tile = numbers[begin : begin + TILE]
        lower, first, last = 0, 0, 0
        for i in range(len(tile)):
            lower += tile[i] < low
            first += tile[i] == low
            last += tile[i] == high
        below += lower
        at_low += first
        at_high += last
        for i in range(len(tile)):
            inside[count] = tile[i]
            count += (tile[i] > low) & (tile[i] < high)
    return below, at_low, at_high, count


def _elect(base, updates, weights, below, limits, ties, by_mass, normalize, scale, out):  # type: ignore[no-untyped-def]
    """The merged numbers of a slice by TIES: see ``merging.elect``. ``below`` are the numbers just under the limits."""
    count = len(updates)
    changes = np.empty((count, TILE), np.float32)
    votes = np.empty(TILE, np.float32)
    merged = np.empty(TILE, np.float32)
    divisor = np.empty(TILE, np.float32)
    zero, one, divides = np.float32(0), np.float32(1), bool(normalize)
    for begin in range(0, len(base), TILE):
        ours, made = base[begin : begin + TILE], out[begin : begin + TILE]
        size = len(ours)
        for i in range(size):
            votes[i] = zero
            merged[i] = zero
            divisor[i] = zero
        for m in range(count):
            weight, update, change = weights[m], updates[m, begin : begin + size], changes[m]
            limit = limits[m] if ties[m] == 0 else below[m]
            for i in range(size):
                change[i] = update[i] * weight if abs(update[i]) > limit else zero
            if ties[m] > 0:
                equal, limit = 0, limits[m]
                for i in range(size):
                    equal += abs(update[i]) == limit
                if equal <= ties[m]:
                    ties[m] -= equal
                else:
                    for i in range(size):
                        if abs(update[i]) == limit:
                            if ties[m] > 0:
                                ties[m] -= 1
                            else:
                                change[i] = zero
            if by_mass:
                for i in range(size):
                    votes[i] += change[i]
            else:
                for i in range(size):
                    votes[i] += np.float32(change[i] > zero) - np.float32(change[i] < zero)
        for m in range(count):
            change, weight = changes[m], weights[m]
            for i in range(size):
                agrees = (change[i] > zero) & (votes[i] >= zero) | (change[i] < zero) & (votes[i] < zero)
                merged[i] += change[i] if agrees else zero
                divisor[i] += weight if agrees else zero
        for i in range(size):
            share = merged[i] / (divisor[i] if divides & (divisor[i] != zero) else one)
            made[i] = ours[i] + share * scale


def _compiled(loop, signature):  # type: ignore[no-untyped-def]
    try:
        return numba.njit(signature, nogil=True, cache=True, error_model="numpy")(loop)
    except (RuntimeError, OSError):  # a cache that cannot be written
        return numba.njit(signature, nogil=True, error_model="numpy")(loop)


gather = _compiled(_gather, "UniTuple(int64, 3)(float32[::1], float32, float32, float32[::1])")
between = _compiled(_between, "UniTuple(int64, 4)(float32[::1], float32, float32, float32[::1])")
elect = _compiled(
    _elect,
    "void(float32[::1], float32[:, ::1], float32[::1], float32[::1], float32[::1], int64[::1], boolean, boolean, float32, float32[::1])",
)
