"""Signs and one scale, with the places of the signs as Golomb-coded gaps: the smallest spelling of ``Ternary``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from espalier.delta.base import BaseWeight
from espalier.delta.forms.ternary import Ternary
from espalier.delta.forms.update import Gain, Update, expect_finite, register_form
from espalier.errors import EspalierError
from espalier.kernels import golomb


@register_form
class Golomb(Update):
    """``gain * scale * sign`` with signs -1, 0 and 1, of which ``count`` are not zero; see ``kernels/golomb.py``.

    ``code`` (bytes) runs over all entries in row-major order, experts one after the other; ``scale`` is one number.
    Bitmaps (2 bits an entry) are made once for each object, by way of 3.5 bytes an entry; products and slices are theirs.
    """

    form = "golomb"
    fields = ("code", "scale")

    def __init__(
        self, code: torch.Tensor, scale: torch.Tensor, count: int, parameter: int, shape: tuple[int, ...], gain: Gain = 1.0
    ) -> None:
        self.code, self.scale = code, scale
        self.count, self.parameter = count, parameter
        self.shape = tuple(shape)
        self.gain = gain

    @classmethod
    def of(cls, signs: torch.Tensor, scale: torch.Tensor, gain: Gain = 1.0) -> Golomb:
        """The update of signs (of any dtype, of the weight's shape) and their scale ()."""
        positions = signs.flatten().nonzero().squeeze(-1)
        parameter = golomb.parameter(len(positions), signs.numel())
        code = golomb.encode(positions, signs.flatten()[positions] < 0, parameter)
        return cls(code.to(signs.device), scale, len(positions), parameter, tuple(signs.shape), gain)

    def constants(self) -> dict[str, Any]:
        return {"count": self.count, "parameter": self.parameter}

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        expect_finite("scale", tensors["scale"], ())
        made = cls(tensors["code"], tensors["scale"], constants["count"], constants["parameter"], tuple(shape), gain)
        for _ in made._support():
            pass  # refuses what is no code of so many positions in the shape
        return made

    def _support(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """In parts: flat positions of the signs that are not zero (n,), and which are negative (n,)."""
        return golomb.blocks(self.code, self.count, self.parameter, math.prod(self.shape))

    @cached_property
    def _bitmaps(self) -> Ternary:
        signs = torch.zeros(math.prod(self.shape), dtype=torch.int8)
        for positions, negative in self._support():
            signs[positions] = 1 - 2 * negative.to(torch.int8)
        return Ternary.of(signs.to(self.code.device).reshape(self.shape), self._scale)

    @property
    def _scale(self) -> torch.Tensor:
        return self.scale.expand(self.shape[0]) if len(self.shape) == 3 else self.scale

    @property
    def ternary(self) -> Ternary:
        """The same update with its signs as bitmaps."""
        made = self._bitmaps.with_tensors({"scale": self._scale})
        assert isinstance(made, Ternary)
        made.gain = self.gain
        return made

    def signs(self) -> torch.Tensor:
        """-1, 0 and 1 (int8), of the weight's shape."""
        return self._bitmaps.signs()

    def unbind(self) -> list[Update]:
        return self.ternary.unbind()

    def _slice(self, start: int, stop: int) -> Update | None:
        return self.ternary._slice(start, stop)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        return self.ternary.materialize(weight)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        return self.ternary.matmul(x, onto)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        return self.ternary.lookup(ids, base)


def ternary(signs: torch.Tensor, scale: torch.Tensor, code: str = "smallest") -> Ternary | Golomb:
    """Signs (of the weight's shape) and their scale () as ``bitmaps``, as a ``golomb`` code, or as what is smaller.

    Raises:
        EspalierError: for another code.
    """
    if code not in ("smallest", "bitmaps", "golomb"):
        raise EspalierError(f"code is {code!r}; it must be one of: smallest, bitmaps, golomb")
    if code == "bitmaps" or (code == "smallest" and _prefers_bitmaps(signs)):
        return Ternary.of(signs, scale.expand(signs.shape[0]).clone() if signs.ndim == 3 else scale)
    return Golomb.of(signs, scale)


def signs_at(values: torch.Tensor, chosen: torch.Tensor, scale: float, code: str = "smallest") -> Ternary | Golomb:
    """The signs of ``values`` (of the weight's shape) at the flat positions ``chosen``, and one scale: see :func:`ternary`."""
    signs = torch.zeros(values.numel(), dtype=torch.int8, device=values.device)
    signs[chosen] = values.flatten()[chosen].sign().to(torch.int8)
    return ternary(signs.reshape(values.shape), torch.tensor(scale, dtype=torch.float32, device=values.device), code)


def _prefers_bitmaps(signs: torch.Tensor) -> bool:
    return golomb.expected_bits(int(signs.count_nonzero()), signs.numel()) >= 2 * signs.numel()
