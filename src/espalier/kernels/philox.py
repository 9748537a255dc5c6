"""The random numbers of methods: Philox4x32-10, counter-based, in integer arithmetic.

A stream is named by (seed, name); its n-th number never depends on device, dtype, thread count, library
version, sharding or on what was drawn before. Everything that belongs to a method (starting values,
indices, seeded bases, masks) comes from here, never from a framework's global generator.

J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the known-answer vectors of
its reference implementation are in the tests.
"""

from __future__ import annotations

import functools
import hashlib
import math
from statistics import NormalDist

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BLOCK = 1 << 18


def philox(counters: torch.Tensor, key: tuple[int, int], rounds: int = 10) -> torch.Tensor:
    """Philox4x32 of ``counters``.

    Args:
        counters: (n, 4) int64 tensor of 32-bit words, low word first.
        key: two 32-bit words.

    Returns:
        (n, 4) int64 tensor of 32-bit words.
    """
    c0, c1, c2, c3 = counters.unbind(-1)
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # int64 products wrap like unsigned ones, and an arithmetic shift differs only in bits masked off
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


@functools.cache
def _gaussian_table() -> torch.Tensor:
    """Quantiles of the standard normal at the 65,536 midpoints, rounded to float32 once."""
    inverse = NormalDist().inv_cdf
    upper = [inverse((i + 0.5) / 65536) for i in range(32768, 65536)]
    half = torch.tensor(upper, dtype=torch.float32)
    return torch.cat((-half.flip(0), half))


class Stream:
    """A named sequence of random numbers; each draw starts where the one before ended.

    Args:
        seed: any integer.
        name: what the numbers are for, usually a parameter's name; other names, other numbers.
    """

    def __init__(self, seed: int, name: str) -> None:
        self.seed = seed
        digest = hashlib.sha256(f"espalier-1|{seed}|{name}".encode()).digest()
        self._key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
        self._position = 0

    def named(self, name: str) -> Stream:
        """The stream of another name, of the same seed."""
        return type(self)(self.seed, name)

    def integers32(self, count: int) -> torch.Tensor:
        """``count`` uniform integers in [0, 2^32) as int64; the basis of every other draw."""
        result = torch.empty(count, dtype=torch.int64)
        done = 0
        while done < count:
            block, offset = divmod(self._position, 4)
            blocks = min(_BLOCK, -(-(offset + count - done) // 4))
            counters = torch.zeros(blocks, 4, dtype=torch.int64)
            index = torch.arange(block, block + blocks, dtype=torch.int64)
            counters[:, 0], counters[:, 1] = index & _MASK, index >> 32
            words = philox(counters, self._key).reshape(-1)[offset:]
            taken = min(len(words), count - done)
            result[done : done + taken] = words[:taken]
            done += taken
            self._position += taken
        return result

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Uniform float32 in [low, high), from 24 random bits each."""
        bits = self.integers32(math.prod(shape)) >> 8
        return (bits.to(torch.float32) * 2.0**-24 * (high - low) + low).reshape(shape)

    def rademacher(self, *shape: int) -> torch.Tensor:
        """Float32 entries -1 or +1 with equal probability."""
        return ((self.integers32(math.prod(shape)) >> 31) * 2 - 1).to(torch.float32).reshape(shape)

    def sparse_rademacher(self, *shape: int, sparsity: float = 3.0) -> torch.Tensor:
        """Float32 entries +1, 0, -1 with probabilities 1/(2s), 1 - 1/s, 1/(2s) for ``s = sparsity`` >= 1."""
        bits = self.integers32(math.prod(shape))
        sign = (bits >> 31) * 2 - 1
        kept = (bits & 0x7FFFFFFF) < round(2**31 / sparsity)
        return (sign * kept).to(torch.float32).reshape(shape)

    def gaussian(self, *shape: int) -> torch.Tensor:
        """Standard normal float32, quantised to 65,536 equiprobable values of a fixed table."""
        return _gaussian_table()[self.integers32(math.prod(shape)) >> 16].reshape(shape)

    def kaiming_uniform(self, *shape: int, fan_in: int | None = None) -> torch.Tensor:
        """Uniform in +-1/sqrt(fan_in): the start of ``nn.Linear`` and of LoRA's A; fan_in defaults to the last size."""
        bound = 1.0 / math.sqrt(fan_in or shape[-1])
        return self.uniform(*shape, low=-bound, high=bound)

    def permutation(self, count: int) -> torch.Tensor:
        """A uniform permutation of ``range(count)`` as int64 (ties of the 32-bit sort keys keep index order)."""
        return torch.argsort(self.integers32(count), stable=True)

    def choice(self, count: int, chosen: int) -> torch.Tensor:
        """``chosen`` distinct members of ``range(count)``, sorted, as int64."""
        return self.permutation(count)[:chosen].sort().values
