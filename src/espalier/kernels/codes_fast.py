"""The compiled twin of ``codes.py``: one pass over the numbers, by numba, on torch's number of threads.

Imported only for large tensors; the tests hold the two together bit for bit. The compiled code is cached on disk where that
can be written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch

from espalier.kernels.codes import BLOCK, bounds, codebook
from espalier.kernels.philox_fast import fill_words

PART = 1 << 18
"""Fewest numbers for which another thread is started."""
TILE = 1024
"""Random numbers made at a time."""
_TINY = np.finfo(np.float32).tiny


@functools.cache
def _search(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where to begin to look for a number's code: the code of the least number with the same upper 16 bits; and all bounds.

    These bits are sign, exponent and 7 bits of the fraction, and few bounds lie between two such numbers.
    """
    keys = np.arange(1 << 16, dtype=np.uint32)
    least = np.where(keys < 1 << 15, keys << 16, (keys << 16) | 0xFFFF).astype(np.uint32).view(np.float32)
    edges = bounds(signed).numpy()
    first = np.searchsorted(edges, least, side="left").astype(np.uint8)
    first[np.isnan(least)] = 255  # where torch's bucketize puts them
    return first, np.append(edges, np.float32(np.inf))


def _encode(values, codes, scales, first, edges):  # type: ignore[no-untyped-def]
    shares = np.empty(BLOCK, np.float32)
    keys = shares.view(np.uint32)
    for block in range(len(scales)):
        some = values[block * BLOCK : (block + 1) * BLOCK]
        made = codes[block * BLOCK : (block + 1) * BLOCK]
        largest, strange = np.float32(0), np.int32(0)
        for i in range(len(some)):
            magnitude = abs(some[i])
            largest = magnitude if magnitude > largest else largest
            strange |= np.int32(magnitude != magnitude)
        largest = np.float32(np.nan) if strange else largest
        scales[block] = largest
        divisor = _TINY if largest < _TINY else largest
        for i in range(len(some)):
            shares[i] = some[i] / divisor
        for i in range(len(some)):
            code = np.int32(first[keys[i] >> np.uint32(16)])
            while shares[i] > edges[code]:
                code += 1
            made[i] = code


def _decode(codes, scales, table, values):  # type: ignore[no-untyped-def]
    for block in range(len(scales)):
        some = codes[block * BLOCK : (block + 1) * BLOCK]
        made = values[block * BLOCK : (block + 1) * BLOCK]
        scale = scales[block]
        for i in range(len(some)):
            made[i] = table[some[i]] * scale


def _round(bits, rounded, key0, key1, position):  # type: ignore[no-untyped-def]
    """Upper halves of the bits of float32 numbers, after a random number of 16 bits was added where that is finite."""
    words = np.empty(TILE, np.uint32)
    block, offset, done = position // np.uint64(4), np.int64(position % np.uint64(4)), 0
    while done < len(bits):
        fill_words(key0, key1, block, words)
        some = bits[done : done + TILE - offset]
        made = rounded[done : done + TILE - offset]
        used = words[offset : offset + len(some)]
        for i in range(len(some)):
            finite = (some[i] & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
            added = some[i] + (used[i] & np.uint32(0xFFFF)) if finite else some[i]
            broken = (some[i] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # one that is none stays none
            made[i] = np.uint16(added >> np.uint32(16)) | np.uint16(0x40 if broken else 0)
        done += len(made)
        block += np.uint64(TILE // 4)
        offset = np.int64(0)


_SIGNATURES: dict[Callable[..., None], str] = {
    _encode: "void(float32[::1], uint8[::1], float32[::1], uint8[::1], float32[::1])",
    _decode: "void(uint8[::1], float32[::1], float32[::1], float32[::1])",
    _round: "void(uint32[::1], uint16[::1], uint64, uint64, uint64)",
}


@functools.cache
def _compiled(loop: Callable[..., None]) -> Callable[..., None]:
    try:
        return numba.njit(_SIGNATURES[loop], nogil=True, cache=True, error_model="numpy")(loop)
    except (RuntimeError, OSError):  # a cache that cannot be written
        return numba.njit(_SIGNATURES[loop], nogil=True, error_model="numpy")(loop)


def _in_parts(count: int, do: Callable[[int, int], Any]) -> None:
    """Call ``do`` for ranges of whole blocks that make up all numbers, in as many threads as torch uses."""
    parts = max(1, min(torch.get_num_threads(), count // PART))
    edges = [count * i // parts // BLOCK * BLOCK for i in range(parts)] + [count]
    if parts == 1:
        do(0, count)
        return
    with ThreadPoolExecutor(parts - 1) as pool:
        others = [pool.submit(do, *pair) for pair in pairwise(edges[1:])]
        do(*edges[:2])
    for other in others:
        other.result()


def encode(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``codes.py``."""
    codes, scale = torch.empty(len(values), dtype=torch.uint8), torch.empty(-(-len(values) // BLOCK))
    search, loop = _search(signed), _compiled(_encode)
    given, made, scales = values.detach().numpy(), codes.numpy(), scale.numpy()
    _in_parts(len(values), lambda a, b: loop(given[a:b], made[a:b], scales[a // BLOCK : -(-b // BLOCK)], *search))
    return codes, scale


def decode(codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> torch.Tensor:
    """See ``codes.py``."""
    values, table, loop = torch.empty(len(codes)), codebook(signed).numpy(), _compiled(_decode)
    given, scales, made = codes.numpy(), scale.contiguous().numpy(), values.numpy()
    _in_parts(len(codes), lambda a, b: loop(given[a:b], scales[a // BLOCK : -(-b // BLOCK)], table, made[a:b]))
    return values


def round_at_random(values: torch.Tensor, key: tuple[int, int], position: int) -> torch.Tensor:
    """See ``codes.py``."""
    rounded, loop = torch.empty(len(values), dtype=torch.bfloat16), _compiled(_round)
    bits, made = values.detach().view(torch.int32).numpy().view(np.uint32), rounded.view(torch.int16).numpy().view(np.uint16)
    _in_parts(len(values), lambda a, b: loop(bits[a:b], made[a:b], *key, position + a))
    return rounded
