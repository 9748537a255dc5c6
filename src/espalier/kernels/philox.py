"""The random numbers of methods: Philox4x32-10, counter-based, in integer arithmetic.

A stream is named by (seed, name); its n-th number never depends on device, dtype, thread count, library
version, sharding or on what was drawn before. Everything that belongs to a method (starting values,
indices, seeded bases, masks) comes from here, never from a framework's global generator.

What is here is plain torch and runs on any device. Where numba is installed, large draws on the CPU run in
its compiled twin, ``philox_fast.py``, once a process has drawn many numbers: the same bits, some tens of times faster.

J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the known-answer vectors of
its reference implementation are in the tests.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from types import ModuleType
from typing import Self

import torch

from espalier.errors import EspalierError, at_least, one_of

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BLOCK = 1 << 16
SMALL = 1 << 16
"""Draws of fewer numbers never wait for numba to be imported or to compile."""
MANY = 1 << 24
"""Numbers that a process draws before it imports numba, which takes about a second and 100 MiB: plain torch draws them in less."""

Device = torch.device | str


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
def gaussian_table(device: Device = "cpu") -> torch.Tensor:
    """Quantiles of the standard normal at the 65,536 midpoints, rounded to float32 once."""
    inverse = NormalDist().inv_cdf
    upper = [inverse((i + 0.5) / 65536) for i in range(32768, 65536)]
    half = torch.tensor(upper, dtype=torch.float32, device=device)
    return torch.cat((-half.flip(0), half))


def _integers32(words: torch.Tensor) -> torch.Tensor:
    return words


def _uniform(words: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return (words >> 8).to(torch.float32) * 2.0**-24 * (high - low) + low


def _rademacher(words: torch.Tensor) -> torch.Tensor:
    return ((words >> 31) * 2 - 1).to(torch.float32)


def _sparse_rademacher(words: torch.Tensor, sparsity: float) -> torch.Tensor:
    sign = (words >> 31) * 2 - 1
    kept = (words & 0x7FFFFFFF) < round(2**31 / sparsity)
    return (sign * kept).to(torch.float32)


def _gaussian(words: torch.Tensor) -> torch.Tensor:
    return gaussian_table(words.device)[words >> 16]


_OF_WORDS: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "integers32": (_integers32, 0),
    "uniform": (_uniform, 2),
    "rademacher": (_rademacher, 0),
    "sparse_rademacher": (_sparse_rademacher, 1),
    "gaussian": (_gaussian, 0),
}
"""Kind -> (numbers from 32-bit words in int64, how many parameters it takes)."""


@dataclass(frozen=True)
class Distribution:
    """What is made of each 32-bit word of a stream.

    ``kind`` and its ``parameters``: ``uniform`` (low, high), ``rademacher`` (none: -1 or +1), ``sparse_rademacher``
    (s >= 1: +1, 0, -1 with probabilities 1/(2s), 1 - 1/s, 1/(2s)), ``gaussian`` (none: standard normal, quantised to
    65,536 equiprobable values of a fixed table), all float32; ``integers32`` (none: the words, as int64).

    Raises:
        EspalierError: for an unknown kind, and for parameters that it does not take.
    """

    kind: str
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        one_of("distribution", self.kind, list(_OF_WORDS))
        takes = _OF_WORDS[self.kind][1]
        if len(self.parameters) != takes or not all(math.isfinite(p) for p in self.parameters):
            raise EspalierError(f"{self.kind} has parameters {self.parameters}; it takes {takes} finite numbers")
        if self.kind == "sparse_rademacher":
            at_least("sparsity", self.parameters[0], 1)

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64 if self.kind == "integers32" else torch.float32


INTEGERS32 = Distribution("integers32")
RADEMACHER = Distribution("rademacher")
GAUSSIAN = Distribution("gaussian")


_drawn = 0


def _twin(count: int) -> ModuleType | None:
    """The compiled twin, where this process draws so many numbers that it is worth its import, or has it already."""
    global _drawn
    _drawn += count
    return _compiled_twin() if _drawn >= MANY or "espalier.kernels.philox_fast" in sys.modules else None


@functools.cache
def _compiled_twin() -> ModuleType | None:
    try:
        from espalier.kernels import philox_fast
    except ImportError:
        return None
    return philox_fast


def numbers(key: tuple[int, int], position: int, count: int, distribution: Distribution, device: Device = "cpu") -> torch.Tensor:
    """The ``count`` numbers from ``position`` on of the stream with that key, (count,), on ``device``.

    They are the same bits on every device, and whether or not numba is there.
    """
    if count >= SMALL and torch.device(device).type == "cpu" and (twin := _twin(count)):
        result = torch.empty(count, dtype=distribution.dtype)
        twin.fill(result, key, position, distribution)
        return result
    return plain_numbers(key, position, count, distribution, device)


def plain_numbers(
    key: tuple[int, int], position: int, count: int, distribution: Distribution, device: Device = "cpu"
) -> torch.Tensor:
    """:func:`numbers` in torch alone."""
    result = torch.empty(count, dtype=distribution.dtype, device=device)
    of_words = _OF_WORDS[distribution.kind][0]
    done = 0
    while done < count:
        block, offset = divmod(position + done, 4)
        blocks = min(_BLOCK, -(-(offset + count - done) // 4))
        counters = torch.zeros(blocks, 4, dtype=torch.int64, device=device)
        index = torch.arange(block, block + blocks, dtype=torch.int64, device=device)
        counters[:, 0], counters[:, 1] = index & _MASK, index >> 32
        words = philox(counters, key).reshape(-1)[offset : offset + count - done]
        result[done : done + len(words)] = of_words(words, *distribution.parameters)
        done += len(words)
    return result


class Stream:
    """A named sequence of random numbers; each draw starts where the one before ended.

    Args:
        seed: any integer.
        name: what the numbers are for, usually a parameter's name; other names, other numbers.
        position: of the first number to be drawn.
    """

    def __init__(self, seed: int, name: str, position: int = 0) -> None:
        self.seed = seed
        self.name = name
        self.position = position
        digest = hashlib.sha256(f"espalier-1|{seed}|{name}".encode()).digest()
        self.key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))

    def named(self, name: str) -> Self:
        """The stream of another name, of the same seed."""
        return type(self)(self.seed, name)

    def at(self, position: int) -> Self:
        """The same sequence from its ``position``-th number on; this stream stays where it is."""
        return type(self)(self.seed, self.name, position)

    def numbers(self, count: int, distribution: Distribution, device: Device) -> torch.Tensor:
        """``count`` numbers from where the stream stands; the basis of every draw."""
        return numbers(self.key, self.position, count, distribution, device)

    def draw(self, distribution: Distribution, *shape: int, device: Device = "cpu") -> torch.Tensor:
        """A tensor of ``shape``, in order of its entries."""
        count = math.prod(shape)
        result = self.numbers(count, distribution, device)
        self.position += count
        return result.reshape(shape)

    def integers32(self, count: int, device: Device = "cpu") -> torch.Tensor:
        """``count`` uniform integers in [0, 2^32) as int64."""
        return self.draw(INTEGERS32, count, device=device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, device: Device = "cpu") -> torch.Tensor:
        """Uniform float32 in [low, high), from 24 random bits each."""
        return self.draw(Distribution("uniform", (low, high)), *shape, device=device)

    def rademacher(self, *shape: int, device: Device = "cpu") -> torch.Tensor:
        """Float32 entries -1 or +1 with equal probability."""
        return self.draw(RADEMACHER, *shape, device=device)

    def sparse_rademacher(self, *shape: int, sparsity: float = 3.0, device: Device = "cpu") -> torch.Tensor:
        """Float32 entries +1, 0, -1 with probabilities 1/(2s), 1 - 1/s, 1/(2s) for ``s = sparsity`` >= 1."""
        return self.draw(Distribution("sparse_rademacher", (sparsity,)), *shape, device=device)

    def gaussian(self, *shape: int, device: Device = "cpu") -> torch.Tensor:
        """Standard normal float32, quantised to 65,536 equiprobable values of a fixed table."""
        return self.draw(GAUSSIAN, *shape, device=device)

    def kaiming_uniform(self, *shape: int, fan_in: int | None = None) -> torch.Tensor:
        """Uniform in +-1/sqrt(fan_in): the start of ``nn.Linear`` and of LoRA's A; fan_in defaults to the last size."""
        bound = 1.0 / math.sqrt(fan_in or shape[-1])
        return self.uniform(*shape, low=-bound, high=bound)

    def permutation(self, count: int) -> torch.Tensor:
        """A uniform permutation of ``range(count)`` as int64 (ties of the 32-bit sort keys keep index order)."""
        return torch.argsort(self.integers32(count), stable=True)

    def choice(self, count: int, chosen: int) -> torch.Tensor:
        """``chosen`` distinct members of ``range(count)``, sorted, as int64; all such sets are equally likely.

        Few among many (at most a quarter) are drawn one after another, and again where one was there before, in time and
        memory of ``chosen``; more are the first of a permutation.
        """
        if 4 * chosen > count:
            return self.permutation(count)[:chosen].sort().values
        members = torch.empty(0, dtype=torch.int64)
        while len(members) < chosen:
            high, low = self.integers32(2 * (chosen - len(members))).view(2, -1)
            members = torch.cat((members, ((high << 30) + (low >> 2)) % count)).unique()
        return members


class Numberless(Stream):
    """A stream for tensors of which only the shapes count: it draws nothing and gives zeros."""

    def numbers(self, count: int, distribution: Distribution, device: Device) -> torch.Tensor:
        return torch.zeros(count, dtype=distribution.dtype, device=device)

    def choice(self, count: int, chosen: int) -> torch.Tensor:
        return torch.arange(min(chosen, count))
