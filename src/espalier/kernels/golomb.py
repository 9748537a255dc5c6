"""Golomb codes of sparse signs: gaps between positions, in whole-array operations only.

With density k the gaps are nearly geometric, and a Golomb code with a power of two (a Rice code) is nearly their
entropy: S. Golomb, IEEE Trans. Information Theory 12 (1966); the parameter is that of ComPEFT (arXiv:2311.13171).
A gap g is its quotient g >> b in unary (so many ones, then a zero) and the b low bits of its remainder. Usually these
are interleaved; here all signs stand first, then the remainders bit by bit, then the quotients, which is as long and
needs no loop over the entries. The last byte is padded with ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy
import torch

from espalier.errors import EspalierError

LARGEST_PARAMETER = 48
BLOCK = 1 << 20
"""Bits of the quotients that are decoded together."""


def parameter(count: int, entries: int) -> int:
    """b for ``count`` of ``entries``: 1 + floor(log2(log(phi - 1) / log(1 - k))), phi the golden ratio, at least 0."""
    if not 0 < count < entries:
        return 0 if count else 1
    golden = (math.sqrt(5) + 1) / 2
    return max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log1p(-count / entries))))


def expected_bits(count: int, entries: int) -> float:
    """What ``count`` of ``entries`` at random places take by the formula of ComPEFT: k n (b + 1 / (1 - (1-k)^(2^b)) + 1)."""
    b = parameter(count, entries)
    density = count / max(entries, 1)
    return count * (b + 1 / (1 - (1 - density) ** (2**b)) + 1) if count else 0.0


def encode(positions: torch.Tensor, negative: torch.Tensor, b: int) -> torch.Tensor:
    """Bytes (uint8) of strictly increasing ``positions`` (n,) int64 and of whether each is ``negative`` (n,) bool."""
    where = positions.cpu().numpy()
    gaps = numpy.diff(where, prepend=-1) - 1
    quotients = gaps >> b
    planes = [negative.cpu().numpy().astype(numpy.uint8), *(((gaps >> j) & 1).astype(numpy.uint8) for j in range(b))]
    unary = numpy.ones(len(gaps) + int(quotients.sum()), dtype=numpy.uint8)
    unary[numpy.cumsum(quotients + 1) - 1] = 0
    padding = numpy.ones(-(len(gaps) * (b + 1) + len(unary)) % 8, dtype=numpy.uint8)
    return torch.from_numpy(numpy.packbits(numpy.concatenate([*planes, unary, padding]), bitorder="little"))


def decode(code: torch.Tensor, count: int, b: int, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (n,) int64, strictly increasing and below ``entries``, and whether each is negative (n,) bool.

    Raises:
        EspalierError: for bytes that no :func:`encode` of ``count`` among ``entries`` writes.
    """
    positions, negative = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
    parts = list(blocks(code, count, b, entries))
    return torch.cat([positions, *(p for p, _ in parts)]), torch.cat([negative, *(n for _, n in parts)])


def blocks(code: torch.Tensor, count: int, b: int, entries: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What :func:`decode` gives, in parts of at most ``BLOCK`` entries, so that little is in memory at a time.

    Raises:
        EspalierError: when the part is reached that no :func:`encode` of ``count`` among ``entries`` writes.
    """
    if type(count) is not int or not 0 <= count <= entries or type(b) is not int or not 0 <= b <= LARGEST_PARAMETER:
        raise EspalierError(f"count is {count!r} and parameter {b!r}; they must be from 0 to {entries:,} and from 0 to {LARGEST_PARAMETER}")
    if code.dtype != torch.uint8 or code.ndim != 1:
        raise EspalierError(f"the code is {code.dtype} of {code.ndim} dimensions; it must be a row of bytes (uint8)")
    size = 8 * len(code)
    length = size - count * (b + 1)  # of the quotients
    if not count <= length <= count + (entries >> b) + 7:
        raise EspalierError(f"the code has {len(code):,} bytes, which {count:,} of {entries:,} entries do not take")
    octets = code.cpu().numpy()
    done, last, ones = 0, -1, 0  # gaps that ended, the position of the latest, and ones since then
    for start in range(size - length, size, BLOCK):
        unary = _bits(octets, start, min(start + BLOCK, size))
        ends = numpy.flatnonzero(unary == 0)
        if done + len(ends) > count:
            raise EspalierError(f"the code ends {done + len(ends):,} gaps or more; there must be {count:,}")
        if not len(ends):
            ones += len(unary)
            continue
        gaps = numpy.diff(ends, prepend=-1) - 1
        gaps[0] += ones
        ones = len(unary) - 1 - int(ends[-1])
        gaps <<= b
        for j in range(b):
            gaps |= _bits(octets, (j + 1) * count + done, (j + 1) * count + done + len(ends)).astype(numpy.int64) << j
        if float(gaps.sum(dtype=numpy.float64)) > 2 * entries or last + int(gaps.sum()) + len(gaps) >= entries:
            raise EspalierError(f"the code's gaps lead beyond the last of {entries:,} entries")
        positions = last + numpy.cumsum(gaps + 1)
        yield torch.from_numpy(positions), torch.from_numpy(_bits(octets, done, done + len(ends)).astype(bool))
        done, last = done + len(ends), int(positions[-1])
    if done != count or ones > 7:
        raise EspalierError(f"the code ends {done:,} gaps; there must be {count:,}, and then less than a byte")


def _bits(octets: numpy.ndarray, start: int, stop: int) -> numpy.ndarray:
    """Bits [start, stop) of bytes, one a byte."""
    return numpy.unpackbits(octets[start // 8 : -(-stop // 8)], bitorder="little")[start % 8 : start % 8 + stop - start]
