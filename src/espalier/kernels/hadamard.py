"""Orthonormal rows for the price of a seed: signed, permuted rows of the Hadamard matrix, and the fast transform.

H is Sylvester's Hadamard matrix of size n, a power of two, divided by sqrt(n): symmetric, orthonormal, its own
inverse. Other sizes have no such matrix in general; they are refused, and the caller pads or splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from espalier.errors import EspalierError
from espalier.kernels.philox import Device, Stream

RADIX = 32
"""Size of the products that the transform is made of: larger ones do more arithmetic, smaller ones read memory more often."""


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """``x @ H`` over the last dimension by the fast Walsh-Hadamard transform, several of its levels at a time in one product.

    It is its own inverse and its own adjoint, so its gradient is itself.

    Args:
        x: (..., n) floating point, n a power of two.

    Raises:
        EspalierError: when n is no power of two.
    """
    size = x.shape[-1]
    _expect_power_of_two(size)
    y, done = x * size**-0.5, 1
    while done < size:  # H of size r * done is the Kronecker product of those of r and done
        radix = min(RADIX, size // done)
        y = _sylvester(radix, x) @ y.reshape(-1, radix, done) if done > 1 else y.reshape(-1, radix) @ _sylvester(radix, x)
        done *= radix
    return y.reshape(x.shape)


def _sylvester(size: int, like: torch.Tensor) -> torch.Tensor:
    """Sylvester's matrix of +-1."""
    H = like.new_ones(1, 1)
    while len(H) < size:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H


def _expect_power_of_two(size: int) -> None:
    if size < 1 or size & (size - 1):
        raise EspalierError(f"a Hadamard transform has size {size}; it must be a power of two (pad with zeros or split)")


@dataclass(frozen=True)
class SignedHadamard:
    """``count`` orthonormal rows ``Q = H[rows] diag(signs)`` of length n, a power of two; Q is (count, n).

    Each entry is +-1/sqrt(n). Only ``rows`` (count,) int64 and ``signs`` (n,) float32 are held.
    """

    rows: torch.Tensor
    signs: torch.Tensor

    @classmethod
    def draw(cls, stream: Stream, count: int, size: int, device: Device = "cpu") -> SignedHadamard:
        """The basis that ``stream`` gives: ``size`` signs, then a permutation of which the first ``count`` are taken.

        Raises:
            EspalierError: when ``size`` is no power of two, or ``count`` is not in [0, size].
        """
        _expect_power_of_two(size)
        if not 0 <= count <= size:
            raise EspalierError(f"{count} orthonormal rows of length {size} were asked for; there are at most {size}")
        signs = stream.rademacher(size, device=device)
        return cls(stream.permutation(size)[:count].to(device), signs)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ Q.T``, (..., n) to (..., count), without building Q."""
        return hadamard(x * self.signs.to(x.dtype)).index_select(-1, self.rows)

    def lift(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ Q``, (..., count) to (..., n), without building Q: the adjoint of :meth:`project`."""
        spread = x.new_zeros(*x.shape[:-1], len(self.signs)).index_add(-1, self.rows, x)
        return hadamard(spread) * self.signs.to(x.dtype)

    def dense(self) -> torch.Tensor:
        """Q itself, (count, n) float32."""
        return self.lift(torch.eye(len(self.rows), device=self.signs.device))
