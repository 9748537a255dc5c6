"""Updates of many parameters that one vector of a few numbers makes, each through random rows of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight, DenseBase
from espalier.delta.forms.dense import Dense
from espalier.delta.forms.update import Gain, Update, expect, register_form, working_dtype
from espalier.errors import EspalierError, one_of
from espalier.kernels.philox import GAUSSIAN, Stream
from espalier.kernels.seeded import SeededMatrix, seeded_matmul
from espalier.kernels.subspace import fastfood, sparse

PROJECTIONS = ("fastfood", "dense", "sparse")


@register_form
class Subspace(Update):
    """``gain * lam * scale * P z``, in the shape of the weight, whatever that is: z (d,), lam (1,) or left out, P a seed.

    P (entries of the weight, d) is drawn from ``stream`` when it is needed, in one of three ways: ``dense``, Gaussian;
    ``sparse``, ``nonzeros`` of +-1; ``fastfood``, products of Hadamard transforms (kernels/subspace.py). z is the same
    for all parameters of a delta (``shared``), whose streams differ; ``scale`` makes P's columns of unit length over all
    of them. Products make the update, for it has no structure. An update of some rows of a parameter takes those of P from
    the ``first`` on, of all ``entries``.
    """

    form = "subspace"
    fields = ("z", "lam")

    z: torch.Tensor
    lam: torch.Tensor | None

    def __init__(
        self, z: torch.Tensor, stream: Stream, projection: str, shape: tuple[int, ...], gain: Gain = 1.0, *, scale: float = 1.0,
        nonzeros: int = 0, lam: torch.Tensor | None = None, first: int = 0, entries: int = 0,
    ) -> None:  # fmt: skip
        self.z = z
        self.lam = lam
        self.stream = stream
        self.projection = projection
        self.scale = scale
        self.nonzeros = nonzeros
        self.shape = tuple(shape)
        self.first, self.entries = first, entries or math.prod(shape)
        self.gain = gain

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        z, lam = tensors["z"], tensors.get("lam")
        expect("z", z, (z.numel(),))
        if lam is not None:
            expect("lam", lam, (1,))
        kind, seed, name, scale, nonzeros = (constants[key] for key in ("projection", "seed", "name", "scale", "nonzeros"))
        first, entries, own = constants["first"], constants["entries"], math.prod(shape)
        one_of("projection", kind, list(PROJECTIONS))
        if type(seed) is not int or not isinstance(name, str):
            raise EspalierError(f"seed is {seed!r} and name {name!r}; they must be an integer and a string")
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise EspalierError(f"scale is {scale!r}; it must be a finite number")
        if type(first) is not int or type(entries) is not int or not 0 <= first <= entries - own or not 0 < len(z) * max(entries, 1) < 2**62:
            raise EspalierError(f"the {own} rows from {first!r} of {entries!r} by {len(z)} are no part of a projection")
        most = entries * len(z) if kind == "sparse" and entries < 2**31 and len(z) < 2**31 else 0
        if type(nonzeros) is not int or not min(1, most) <= nonzeros <= most:
            raise EspalierError(f"nonzeros is {nonzeros!r}; of a {kind} projection of {entries} rows it must be from {min(1, most)} to {most}")
        return cls(z, Stream(seed, name), kind, shape, gain, scale=float(scale), nonzeros=nonzeros, lam=lam, first=first, entries=entries)

    def constants(self) -> dict[str, Any]:
        place = {"projection": self.projection, "seed": self.stream.seed, "name": self.stream.name}
        return {**place, "scale": self.scale, "nonzeros": self.nonzeros, "first": self.first, "entries": self.entries}

    def unbind(self) -> list[Update]:
        return Dense(self._made(working_dtype(self.z)), self.gain).unbind()  # one projection for all experts

    def _slice(self, start: int, stop: int) -> Update | None:
        part = self._with_rows(stop - start)
        assert isinstance(part, Subspace)
        part.first += start * math.prod(self.shape[1:])
        return part

    def _made(self, dtype: torch.dtype, gain: Gain = 1.0) -> torch.Tensor:
        z = self.z.to(dtype) * self.scale * gain
        if self.lam is not None:
            z = z * self.lam.to(dtype)
        count = math.prod(self.shape)
        if self.projection == "dense":
            matrix = SeededMatrix.of(self.stream, self.entries, len(z), GAUSSIAN)
            made = seeded_matmul(z, matrix.narrow(self.first, self.first + count))
        elif self.nonzeros:
            made = sparse(z, self.stream.key, self.first, count, self.entries, self.nonzeros)
        else:
            made = fastfood(z, self.stream.key, self.first, count)
        return made.reshape(self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        return self._made(working_dtype(weight), self.gain)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        if not (isinstance(base, DenseBase) and base.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)):
            return self.matmul(x, base.linear(x))  # in 16 bits a small update would be lost in the weight's rounding
        weight = base.dense()
        made = self._made(x.dtype, self.gain)
        if not weight.is_contiguous():  # so that the sum lies as the weight does, and rounding in the product is alike
            return functional.linear(x, (weight.t() + made.t()).t(), base.bias)
        return functional.linear(x, weight + made, base.bias)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        y = functional.linear(x, self._made(working_dtype(x), self.gain).to(x.dtype))
        return y if onto is None else onto + y
