"""The compiled loops of merging: what lies between two bounds, and the election of signs; by numba, for one thread.

Imported where numba is installed; the plain twins are in ``merging.py``, and the tests hold the two together.
"""

from __future__ import annotations

import functools
import threading

import numba
import numpy as np

from espalier.kernels.merging import LANES, TILE
from espalier.kernels.philox_fast import fill_words

LARGEST = np.finfo(np.float32).max


@numba.extending.intrinsic
def _pointer(_, address):  # type: ignore[no-untyped-def]
    """The memory at an address."""

    def made(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.voidptr(numba.types.int64), made


@numba.extending.intrinsic
def _as_float(_, bits):  # type: ignore[no-untyped-def]
    """The float32 with these bits."""

    def made(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.float32(numba.types.uint32), made


@numba.njit(nogil=True, error_model="numpy")
def _load(numbers, row, begin, base, tile):  # type: ignore[no-untyped-def]
    """Numbers of a row, less those of a base, from a place on into a tile; whether one of the row's is not finite.

    ``numbers`` are (address, bytes of a number) of each row: two are bf16, four float32.
    """
    address, width = numbers[row]
    strange = np.int32(0)
    if width == 2:
        words = numba.carray(_pointer(address + 2 * begin), (len(tile),), np.uint16)  # type: ignore[call-arg]
        for i in range(len(tile)):
            own = _as_float(np.uint32(np.uint32(words[i]) << np.uint32(16)))  # type: ignore[call-arg]
            strange |= np.int32(not abs(own) <= LARGEST)
            tile[i] = own - base[i]
    else:
        wide = numba.carray(_pointer(address + 4 * begin), (len(tile),), np.float32)  # type: ignore[call-arg]
        for i in range(len(tile)):
            own = wide[i]
            strange |= np.int32(not abs(own) <= LARGEST)
            tile[i] = own - base[i]
    return strange


@numba.njit(nogil=True, error_model="numpy")
def _gather(tile, size, low, high, there, counts, inside):  # type: ignore[no-untyped-def]
    """Count what of a tile is below ``low``, equal to it, and equal to ``high``; what lies between goes into ``inside``.

    ``counts`` are these three and how many are inside. A tile is looked at in rows of :data:`LANES`; only columns in which
    there is something are gone through again. What is behind its size is overwritten.
    """
    below, at_low, at_high, above = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
    for i in range(size):
        below += np.int32(tile[i] < low)
        at_low += np.int32(tile[i] == low)
        at_high += np.int32(tile[i] == high)
        above += np.int32(tile[i] > high)
    counts[0] += below
    counts[1] += at_low
    counts[2] += at_high
    if below + at_low + above + (at_high if low < high else 0) == size:  # as in most tiles for a quantile far out
        return
    for i in range(size, TILE):
        tile[i] = low
    for k in range(LANES):
        there[k] = 0
    for row in range(0, TILE, LANES):
        some = tile[row : row + LANES]
        for k in range(LANES):
            there[k] |= np.int32((some[k] > low) & (some[k] < high))
    count = counts[3]
    for k in range(LANES):
        if there[k]:
            for i in range(k, TILE, LANES):
                inside[count] = tile[i]
                count += (tile[i] > low) & (tile[i] < high)
    counts[3] = count


def _between(numbers, low, high, signed, counts, inside):  # type: ignore[no-untyped-def]
    """What of the numbers (or magnitudes) lies between bounds: see ``merging.Between``."""
    tile, there = np.empty(TILE, np.float32), np.empty(LANES, np.int32)
    for begin in range(0, len(numbers), TILE):
        theirs = numbers[begin : begin + TILE]
        for i in range(len(theirs)):
            tile[i] = theirs[i] if signed else abs(theirs[i])
        _gather(tile, len(theirs), low, high, there, counts, inside)


def _between_changes(numbers, length, models, lows, highs, counts, inside):  # type: ignore[no-untyped-def]
    """What of the magnitudes of models' changes lies between bounds; which row is not finite, or -1.

    Each has a row of ``counts`` and ``inside``; those of one model are next to each other.
    """
    strange, zeros = -1, np.zeros(TILE, np.float32)
    base, tile, there = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(LANES, np.int32)
    for begin in range(0, length, TILE):
        size, last = min(TILE, length - begin), -1
        if _load(numbers, 0, begin, zeros, base[:size]):
            strange = 0
        for row in range(len(models)):
            if models[row] != last:
                last = models[row]
                if _load(numbers, last + 1, begin, base, tile[:size]):
                    strange = last + 1
                for i in range(size):
                    tile[i] = abs(tile[i])
            _gather(tile, size, lows[row], highs[row], there, counts[row], inside[row])
    return strange


@numba.njit(nogil=True, error_model="numpy")
def _draw(tile, counter, odds, factor, begin, words):  # type: ignore[no-untyped-def]
    """Keep of a tile what is drawn below the odds, times a factor. ``counter`` is a stream's key and position of the first number."""
    position = counter[2] + np.uint64(begin)
    skipped = np.int64(position % np.uint64(4))
    fill_words(counter[0], counter[1], position // np.uint64(4), words)
    drawn = words[skipped : skipped + len(tile)]
    for i in range(len(tile)):
        tile[i] *= factor if np.float32(np.int32(drawn[i] >> np.uint32(8))) * np.float32(2.0**-24) < odds else np.float32(0)


def _elect(numbers, are_changes, counters, odds, factors, weights, below, limits, ties, by_mass, normalize, scale, out):  # type: ignore[no-untyped-def]
    """The merged numbers of a slice by TIES: see ``merging.elect``. ``below`` are the numbers just under the limits.

    Where there are ``counters``, changes are dropped first, as by :func:`_drop`. Returns which row is not finite, or -1.
    """
    count, strange, words = len(numbers) - 1, -1, np.empty(TILE + 4, np.uint32)
    base, zeros = np.empty(TILE, np.float32), np.zeros(TILE, np.float32)
    changes = np.empty((count, TILE), np.float32)
    votes = np.empty(TILE, np.float32)
    merged = np.empty(TILE, np.float32)
    divisor = np.empty(TILE, np.float32)
    zero, one, divides = np.float32(0), np.float32(1), bool(normalize)
    for begin in range(0, len(out), TILE):
        made = out[begin : begin + TILE]
        size = len(made)
        if _load(numbers, 0, begin, zeros, base[:size]):
            strange = 0
        for i in range(size):
            votes[i] = zero
            merged[i] = zero
            divisor[i] = zero
        for m in range(count):
            weight, change = weights[m], changes[m, :size]
            if _load(numbers, m + 1, begin, zeros if are_changes else base, change):
                strange = m + 1
            if len(counters):
                _draw(change, counters[m], odds[m], factors[m], begin, words)
            limit = limits[m] if ties[m] == 0 else below[m]
            if ties[m] > 0:
                equal = 0
                for i in range(size):
                    equal += abs(change[i]) == limits[m]
                if equal <= ties[m]:
                    ties[m] -= equal
                else:
                    for i in range(size):
                        if abs(change[i]) == limits[m]:
                            if ties[m] > 0:
                                ties[m] -= 1
                            else:
                                change[i] = zero
            for i in range(size):
                change[i] = change[i] * weight if abs(change[i]) > limit else zero
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
            made[i] = base[i] + share * scale
    return strange


@numba.njit(nogil=True)
def _limit(bits, count):  # type: ignore[no-untyped-def]
    """(least of the ``count`` largest, how many of exactly that are among them or -1 for all), by bisection."""
    if count >= len(bits):
        return 0, -1
    if count <= 0:
        return 1 << 31, -1
    low, high, reached, above = 0, 1 << 31, len(bits), 0
    while high - low > 1 and reached != count:
        middle = (low + high) // 2
        there = 0
        for i in range(len(bits)):
            there += bits[i] >= middle
        if there >= count:
            low, reached = middle, there
        else:
            high, above = middle, there
    return low, (-1 if reached == count else count - above)


def _middle(updates, bits, skip, keep, out):  # type: ignore[no-untyped-def]
    """What is neither among the ``skip`` largest of its row nor below the ``keep`` next: see ``merging.middle``."""
    magnitudes = np.empty(updates.shape[1], np.int32)
    for row in range(len(updates)):
        theirs, ours, made = bits[row], updates[row], out[row]
        for i in range(len(magnitudes)):
            magnitudes[i] = theirs[i] & 0x7FFFFFFF
        low, inner = _limit(magnitudes, skip + keep)
        high, outer = _limit(magnitudes, skip)
        if inner < 0 and outer < 0:
            for i in range(len(magnitudes)):
                made[i] = ours[i] if (magnitudes[i] >= low) & (magnitudes[i] < high) else np.float32(0)
            continue
        for i in range(len(magnitudes)):
            inside = magnitudes[i] >= low
            if inner >= 0 and magnitudes[i] == low:
                inside = inner > 0
                inner -= inside
            outlier = magnitudes[i] >= high
            if outer >= 0 and magnitudes[i] == high:
                outlier = outer > 0
                outer -= outlier
            made[i] = ours[i] if inside and not outlier else np.float32(0)


def _thin(updates, bits, drawn, odds, factors, out):  # type: ignore[no-untyped-def]
    """Numbers of which those drawn below the odds of their rank are kept, times its factor: see ``merging.thin``.

    The rank is found by sorting the bits of the magnitudes, each with its place below it, eight at a time.
    """
    columns, byte = updates.shape[1], np.uint64(255)
    keys, others = np.empty(columns, np.uint64), np.empty(columns, np.uint64)
    counts = np.empty((4, 256), np.uint32)
    first, second, third, fourth = counts[0], counts[1], counts[2], counts[3]
    for row in range(len(updates)):
        theirs, counts[:] = bits[row], 0
        for i in range(columns):
            key = np.uint64(np.uint32(theirs[i]) & np.uint32(0x7FFFFFFF))
            keys[i] = key << np.uint64(32) | np.uint64(i)
            first[key & byte] += np.uint32(1)
            second[key >> np.uint64(8) & byte] += np.uint32(1)
            third[key >> np.uint64(16) & byte] += np.uint32(1)
            fourth[key >> np.uint64(24)] += np.uint32(1)
        ours, chance, made = updates[row], drawn[row], out[row]
        for digit in range(4):
            shift, starts, begin = np.uint64(32 + 8 * digit), counts[digit], np.uint32(0)
            for value in range(256):
                size = starts[value]
                starts[value] = begin
                begin += size
            if digit == 3:  # where a number goes now is its rank
                for i in range(columns):
                    value, place = keys[i] >> shift, np.uint32(keys[i])
                    rank = starts[value]
                    starts[value] = rank + np.uint32(1)
                    # a product, as a branch that nothing predicts takes longer than all else
                    made[place] = ours[place] * factors[rank] * np.float32(chance[place] < odds[rank])
                continue
            for i in range(columns):
                key = keys[i]
                value = key >> shift & byte
                place = starts[value]
                starts[value] = place + np.uint32(1)
                others[place] = key
            keys, others = others, keys


def _drop(numbers, counters, odds, factors, out):  # type: ignore[no-untyped-def]
    """What is kept of models' changes: see ``merging.drop``; which row is not finite, or -1."""
    strange, zeros, base, words = -1, np.zeros(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE + 4, np.uint32)
    for begin in range(0, out.shape[1], TILE):
        size = min(TILE, out.shape[1] - begin)
        if _load(numbers, 0, begin, zeros, base[:size]):
            strange = 0
        for m in range(len(out)):
            made = out[m, begin : begin + size]
            if _load(numbers, m + 1, begin, base, made):
                strange = m + 1
            _draw(made, counters[m], odds[m], factors[m], begin, words)
    return strange


def _masses(numbers, length, counters, odds, factors, sums):  # type: ignore[no-untyped-def]
    """Sums of magnitudes of models' changes, and of what is kept of them: see ``merging.masses``; which row is not finite, or -1."""
    strange, zeros, base, words = -1, np.zeros(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE + 4, np.uint32)
    tile, lanes = np.empty(TILE, np.float32), np.empty((2, LANES), np.float32)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        if _load(numbers, 0, begin, zeros, base[:size]):
            strange = 0
        for m in range(len(counters)):
            if _load(numbers, m + 1, begin, base, tile[:size]):
                strange = m + 1
            for i in range(size, TILE):
                tile[i] = np.float32(0)
            for which in range(2):
                if which:
                    _draw(tile[:size], counters[m], odds[m], factors[m], begin, words)
                lane = lanes[which]
                for k in range(LANES):
                    lane[k] = abs(tile[k])
                for row in range(LANES, TILE, LANES):
                    for k in range(LANES):
                        lane[k] += abs(tile[row + k])
                half = LANES // 2
                while half:
                    for k in range(half):
                        lane[k] += lane[half + k]
                    half //= 2
                sums[m, which] += lane[0]
    return strange


def _variance(updates, out):  # type: ignore[no-untyped-def]
    """The variance over models: see ``merging.variance``."""
    share = np.float32(1) / np.float32(len(updates))
    mean = np.empty(TILE, np.float32)
    for begin in range(0, len(out), TILE):
        made = out[begin : begin + TILE]
        first = updates[0, begin : begin + TILE]
        for i in range(len(made)):
            mean[i] = np.float32(0)
            made[i] = np.float32(0)
        for m in range(1, len(updates)):
            update = updates[m, begin : begin + TILE]
            for i in range(len(made)):
                mean[i] += update[i] - first[i]
        for i in range(len(made)):
            mean[i] *= share
        for m in range(len(updates)):
            update = updates[m, begin : begin + TILE]
            for i in range(len(made)):
                off = (update[i] - first[i]) - mean[i]
                made[i] += off * off
        for i in range(len(made)):
            made[i] *= share


def _agree(base, updates, weights, scale, out):  # type: ignore[no-untyped-def]
    """The base plus the weighted mean of the updates that have the sign of their sum: see ``merging.agree``."""
    zero, one = np.float32(0), np.float32(1)
    total, divisor = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for begin in range(0, len(base), TILE):
        ours, made = base[begin : begin + TILE], out[begin : begin + TILE]
        size = len(ours)
        for i in range(size):
            total[i] = zero
            divisor[i] = zero
            made[i] = zero
        for m in range(len(updates)):
            update = updates[m, begin : begin + size]
            for i in range(size):
                total[i] += update[i]
        for m in range(len(updates)):
            update, weight = updates[m, begin : begin + size], weights[m]
            for i in range(size):
                agrees = (update[i] > zero) & (total[i] >= zero) | (update[i] < zero) & (total[i] < zero)
                made[i] += update[i] * weight if agrees else zero
                divisor[i] += weight if agrees else zero
        for i in range(size):
            made[i] = ours[i] + made[i] / (divisor[i] if divisor[i] != zero else one) * scale


@numba.njit(nogil=True, error_model="numpy")
def _compete(numbers, begin, size, low, high, width, exponential, tiles):  # type: ignore[no-untyped-def]
    """Base, clamped changes and scores of PCB-Merging of a tile: see ``merging.compete``; which row is not finite, or -1.

    ``tiles`` have rows for zeros, the base, a while, and the models' clamped changes, signed parts, and scores.
    """
    count, strange, zero = len(low), -1, np.float32(0)
    zeros, base, tanh = tiles[0], tiles[1], tiles[2]
    clamped, signed, scores = tiles[3 : 3 + count], tiles[3 + count : 3 + 2 * count], tiles[3 + 2 * count :]
    e0, e1, e2, e3, e4, e5, e6, e7, e8 = exponential
    if _load(numbers, 0, begin, zeros, base[:size]):
        strange = 0
    for m in range(count):
        clamp, own, score = clamped[m], signed[m], scores[m]
        if _load(numbers, m + 1, begin, base, clamp[:size]):
            strange = m + 1
        least, most, over = low[m], high[m], np.float32(1) / width[m]
        for i in range(size):
            magnitude = abs(clamp[i])
            magnitude = least if magnitude < least else magnitude
            magnitude = most if magnitude > most else magnitude
            sign = np.float32(clamp[i] > zero) - np.float32(clamp[i] < zero)
            clamp[i] = sign * magnitude
            own[i] = sign * ((magnitude - least) * over)
            score[i] = zero
    for m in range(count):
        mine, score = signed[m], scores[m]
        for other in range(m + 1):
            theirs, to = signed[other], scores[other]
            for i in range(size):
                x = mine[i] * theirs[i]
                y = x * x
                above = x * ((y * np.float32(21) + np.float32(1260)) * y + np.float32(10395))
                tanh[i] = above / (((y + np.float32(210)) * y + np.float32(4725)) * y + np.float32(10395))
            for i in range(size):
                score[i] += tanh[i]
            if m != other:
                for i in range(size):
                    to[i] += tanh[i]
    for m in range(count):
        score, own = scores[m], signed[m]
        for i in range(size):
            x = own[i] * own[i] - np.float32(0.5)
            own[i] = (((((((e8 * x + e7) * x + e6) * x + e5) * x + e4) * x + e3) * x + e2) * x + e1) * x + e0
        for _ in range(count):
            for i in range(size):
                score[i] *= own[i]
    return strange


def _between_scores(numbers, length, low, high, width, exponential, models, lows, highs, counts, inside):  # type: ignore[no-untyped-def]
    """What of the scores of models lies between bounds: as :func:`_between_changes`."""
    strange, there = -1, np.empty(LANES, np.int32)
    tiles = np.zeros((3 + 3 * len(low), TILE), np.float32)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        strange = max(strange, _compete(numbers, begin, size, low, high, width, exponential, tiles))
        for row in range(len(models)):
            score = tiles[3 + 2 * len(low) + models[row]]
            _gather(score, size, lows[row], highs[row], there, counts[row], inside[row])
    return strange


def _blend(numbers, low, high, width, exponential, cut, factors, weights, scale, out):  # type: ignore[no-untyped-def]
    """The base plus what PCB-Merging makes of changes: see ``merging.blend``; which row is not finite, or -1."""
    strange, count, zero, tiny = -1, len(low), np.float32(0), np.float32(1e-12)
    tiles = np.zeros((3 + 3 * count, TILE), np.float32)
    merged, divisor = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for begin in range(0, len(out), TILE):
        made, base = out[begin : begin + TILE], tiles[1]
        size = len(made)
        strange = max(strange, _compete(numbers, begin, size, low, high, width, exponential, tiles))
        for i in range(size):
            merged[i] = zero
            divisor[i] = zero
        for m in range(count):
            update, score = tiles[3 + m], tiles[3 + 2 * count + m]
            least, factor, weight = cut[m], factors[m], weights[m]
            for i in range(size):
                share = (score[i] - least) * factor if score[i] > least else zero
                divisor[i] += share
                merged[i] += update[i] * (share * weight)
        for i in range(size):
            whole = divisor[i] if divisor[i] > tiny else tiny
            made[i] = base[i] + merged[i] / whole * scale
    return strange


_lock = threading.Lock()


def _compiled(loop, signature):  # type: ignore[no-untyped-def]
    """The loop, compiled (or taken from the disk's cache) when it is first called, so that a merge waits for its own only."""

    @functools.cache
    def compiled():  # type: ignore[no-untyped-def]
        try:
            return numba.njit(signature, nogil=True, cache=True, error_model="numpy")(loop)
        except (RuntimeError, OSError):  # a cache that cannot be written
            return numba.njit(signature, nogil=True, error_model="numpy")(loop)

    def call(*arguments):  # type: ignore[no-untyped-def]
        if not compiled.cache_info().currsize:
            with _lock:  # one thread compiles, the others wait
                compiled()
        return compiled()(*arguments)

    return call


between = _compiled(_between, "void(float32[::1], float32, float32, boolean, int64[::1], float32[::1])")
_BOUNDS = "int64[::1], float32[::1], float32[::1], int64[:, ::1], float32[:, ::1]"
between_changes = _compiled(_between_changes, f"int64(int64[:, ::1], int64, {_BOUNDS})")
_DRAWS = "uint64[:, ::1], float32[::1], float32[::1]"
elect = _compiled(
    _elect,
    f"int64(int64[:, ::1], boolean, {_DRAWS}, float32[::1], float32[::1], float32[::1], int64[::1], boolean, boolean, float32, float32[::1])",
)
middle = _compiled(_middle, "void(float32[:, ::1], int32[:, ::1], int64, int64, float32[:, ::1])")
thin = _compiled(_thin, "void(float32[:, ::1], int32[:, ::1], float32[:, ::1], float32[::1], float32[::1], float32[:, ::1])")
drop = _compiled(_drop, f"int64(int64[:, ::1], {_DRAWS}, float32[:, ::1])")
masses = _compiled(_masses, f"int64(int64[:, ::1], int64, {_DRAWS}, float64[:, ::1])")
variance = _compiled(_variance, "void(float32[:, ::1], float32[::1])")
agree = _compiled(_agree, "void(float32[::1], float32[:, ::1], float32[::1], float32, float32[::1])")
_CLAMP = "float32[::1], float32[::1], float32[::1], UniTuple(float32, 9)"
between_scores = _compiled(_between_scores, f"int64(int64[:, ::1], int64, {_CLAMP}, {_BOUNDS})")
blend = _compiled(_blend, f"int64(int64[:, ::1], {_CLAMP}, float32[::1], float32[::1], float32[::1], float32, float32[::1])")
