"""The generator's compiled twin: Philox4x32-10 by numba, vectorised, on torch's number of threads.

Imported only when many numbers are drawn; the plain twin is ``philox.py``, and the tests hold the two together
bit for bit. The compiled code is cached on disk where that can be written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numba
import numpy as np
import torch

from espalier.kernels.philox import Distribution, gaussian_table

TILE = 1024
"""Numbers made at a time: their words stay in the first-level cache."""
PART = 1 << 19
"""Fewest numbers for which another thread is started."""

_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_KINDS = ("integers32", "uniform", "rademacher", "sparse_rademacher", "gaussian")
_UNIFORM, _RADEMACHER, _SPARSE, _GAUSSIAN = 1, 2, 3, 4


@numba.njit(nogil=True)
def fill_words(key0, key1, block, words):  # type: ignore[no-untyped-def]
    """The words of ``len(words) / 4`` counters from ``block`` on. 64-bit lanes: a product is one instruction."""
    for i in range(len(words) // 4):
        counter = block + np.uint64(i)
        c0, c1, c2, c3 = counter & _MASK, counter >> _HALF, np.uint64(0), np.uint64(0)
        k0, k1 = key0, key1
        for _ in range(10):
            product0, product1 = c0 * _M0, c2 * _M1
            c0, c1 = (product1 >> _HALF) ^ c1 ^ k0, product1 & _MASK
            c2, c3 = (product0 >> _HALF) ^ c3 ^ k1, product0 & _MASK
            k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
        words[4 * i] = c0
        words[4 * i + 1] = c1
        words[4 * i + 2] = c2
        words[4 * i + 3] = c3


def _fill(out, key0, key1, position, kind, low, width, threshold, table):  # type: ignore[no-untyped-def]
    """The numbers from ``position`` on into ``out``; the arithmetic is that of the plain twin, step by step."""
    words = np.empty(TILE, np.uint32)
    block, offset, done = position // np.uint64(4), np.int64(position % np.uint64(4)), 0
    while done < len(out):
        fill_words(key0, key1, block, words)
        made = out[done : done + TILE - offset]
        used = words[offset : offset + len(made)]
        if kind == _UNIFORM:
            for i in range(len(made)):
                made[i] = np.float32(np.int32(used[i] >> np.uint32(8))) * np.float32(2.0**-24) * width + low
        elif kind == _GAUSSIAN:
            for i in range(len(made)):
                made[i] = table[used[i] >> np.uint32(16)]
        elif kind == _SPARSE:
            for i in range(len(made)):
                sign = np.float32(1) if used[i] >> np.uint32(31) else np.float32(-1)
                made[i] = sign if used[i] & np.uint32(0x7FFFFFFF) < threshold else np.float32(0)
        elif kind == _RADEMACHER:
            for i in range(len(made)):
                made[i] = np.float32(1) if used[i] >> np.uint32(31) else np.float32(-1)
        else:
            for i in range(len(made)):
                made[i] = used[i]
        done += len(made)
        block += np.uint64(TILE // 4)
        offset = np.int64(0)


@functools.cache
def _compiled(dtype: torch.dtype) -> Callable[..., None]:
    made = "int64" if dtype == torch.int64 else "float32"
    signature = f"void({made}[::1], uint64, uint64, uint64, int64, float32, float32, uint32, float32[::1])"
    try:
        return numba.njit(signature, nogil=True, cache=True)(_fill)
    except (RuntimeError, OSError):  # a cache that cannot be written
        return numba.njit(signature, nogil=True)(_fill)


def fill(out: torch.Tensor, key: tuple[int, int], position: int, distribution: Distribution) -> None:
    """Put the numbers from ``position`` on into ``out``, a contiguous vector on the CPU of the distribution's dtype."""
    kernel, array, kind = _compiled(out.dtype), out.numpy(), _KINDS.index(distribution.kind)
    low, high = distribution.parameters if distribution.kind == "uniform" else (0.0, 0.0)
    threshold = round(2**31 / distribution.parameters[0]) if distribution.kind == "sparse_rademacher" else 0
    table = gaussian_table().numpy()

    def part(start: int, stop: int) -> None:
        kernel(array[start:stop], *key, position + start, kind, low, high - low, threshold, table)

    parts = max(1, min(torch.get_num_threads(), len(array) // PART))
    if parts == 1:
        part(0, len(array))
        return
    bounds = [len(array) * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts - 1) as pool:
        others = [pool.submit(part, *pair) for pair in pairwise(bounds[1:])]
        part(*bounds[:2])
    for other in others:
        other.result()
