"""Updates whose bases are seeds: only what is trained is stored, and the rest is drawn again where it is needed.

The bases come from the generator (``kernels/philox.py``), so a seed and a name mean the same numbers everywhere.
Seeds of other programs' generators mean nothing here: import their bases as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.low_rank import LowRank
from espalier.delta.forms.update import (
    Gain,
    Update,
    embedding_rows,
    expect,
    gain_like,
    linear_onto,
    matrix_shape,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError
from espalier.kernels.philox import Distribution, Stream
from espalier.kernels.seeded import (
    Beginning,
    SeededMatrix,
    held,
    keeps,
    seeded_combination,
    seeded_linear,
    seeded_matmul,
)


def described(matrix: SeededMatrix) -> dict[str, Any]:
    """A seeded matrix as JSON values; its shape follows from the update's."""
    kind, parameters = matrix.distribution.kind, list(matrix.distribution.parameters)
    place = {"seed": matrix.seed, "name": matrix.name, "position": matrix.position}
    return {**place, "distribution": kind, "parameters": parameters, "scale": matrix.scale}


def read_described(described: Mapping[str, Any], rows: int, columns: int) -> SeededMatrix:
    """The matrix of :func:`described`, of that shape.

    Raises:
        EspalierError: for values out of range.
    """
    if columns < 1:
        raise EspalierError("there are no coefficients; a basis needs one at least")
    seed, name, position, scale = (described[key] for key in ("seed", "name", "position", "scale"))
    if type(seed) is not int or not isinstance(name, str):
        raise EspalierError(f"seed is {seed!r} and name {name!r}; they must be an integer and a string")
    if type(position) is not int or not 0 <= position < 2**63 - rows * columns:
        raise EspalierError(f"position is {position!r}; it must be an integer from 0 on, such that the basis ends below 2^63")
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise EspalierError(f"scale is {scale!r}; it must be a finite number")
    distribution = Distribution(described["distribution"], tuple(float(p) for p in described["parameters"]))
    return SeededMatrix.of(Stream(seed, name, position), rows, columns, distribution, float(scale))


@register_form
class Seeded(Update):
    """``gain * sum_i coefficients[i] * P_i``: coefficients (k,), P_i of the weight's shape, any shape.

    P_i is column i of ``matrix``, (entries of the weight, k), so that rows and experts are drawn without the others.
    The update of #5 and #192 (arXiv:1804.08838, arXiv:2012.13255) with a dense P. Experts share the coefficients.
    Products and ``materialize`` draw k numbers an entry each time; no more than some rows of the update are held.
    """

    form = "seeded"
    fields = ("coefficients",)

    def __init__(self, coefficients: torch.Tensor, matrix: SeededMatrix, shape: tuple[int, ...], gain: Gain = 1.0) -> None:
        self.coefficients = coefficients
        self.matrix = matrix
        self.shape = tuple(shape)
        self.gain = gain

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        coefficients = tensors["coefficients"]
        expect("coefficients", coefficients, (coefficients.numel(),))
        return cls(coefficients, read_described(constants, math.prod(shape), len(coefficients)), shape, gain)

    def constants(self) -> dict[str, Any]:
        return described(self.matrix)

    def _part(self, start: int, stop: int) -> Seeded:
        """The update of ``W[start:stop]``."""
        size = math.prod(self.shape[1:])
        return Seeded(self.coefficients, self.matrix.narrow(start * size, stop * size), (stop - start, *self.shape[1:]), self.gain)

    def _slice(self, start: int, stop: int) -> Update | None:
        return self._part(start, stop)

    def unbind(self) -> list[Update]:
        experts: list[Update] = [self._part(e, e + 1) for e in range(self.shape[0])]
        for expert in experts:
            expert.shape = self.shape[1:]
        return experts

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        return seeded_combination(self.coefficients.to(working_dtype(weight)) * self.gain, self.matrix, *self.shape)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        y = seeded_linear(x, self.coefficients * self.gain, self.matrix)
        return y if onto is None else onto + y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        return rows + embedding_rows(ids, self.materialize(rows), rows)


@register_form
class SeededLowRank(Update):
    """``gain * diag(b) B diag(d) A`` with B (..., out, rank) and A (..., rank, in), of which some is a seed.

    Each factor is one of three: a tensor (``B``, ``A``); a frozen basis, drawn and never trained; or a combination of
    k bases with coefficients (..., k). Vectors b (..., out) and d (..., rank) are left out where they are not used.
    A frozen A with a tensor B is LoRA-FA (arXiv:2308.03303), two combinations are NOLA (arXiv:2310.02556, #199), two
    frozen factors with b and d are VeRA (arXiv:2310.11454).

    Without gradients, products keep what they make of seeds, as long as the update lives, in their dtype: a combination
    for each update, as large as the factor; a frozen factor once for all weights of one shape. With gradients, nothing is kept.

    Args:
        shape: of the weight.
        rank: at least 1 and, where it is read from a file, at most ``min(out, in)``, so that no factor is larger than
            the weight.
        bases: ``B`` or ``A`` to the matrix of a factor that is no tensor: (its rows, its columns) where it is frozen,
            (its entries, k) where ``coefficients_B`` or ``coefficients_A`` are given, experts one after the other. A frozen
            basis with the rows of one expert is that of every one.
        tensors: any of ``B``, ``A``, ``coefficients_B``, ``coefficients_A``, ``b``, ``d``; at least one.
        drawn: by factor, what its basis draws, where that is in memory from the start.
    """

    form = "seeded_low_rank"
    fields = ("B", "A", "coefficients_B", "coefficients_A", "b", "d")

    B: torch.Tensor | None
    A: torch.Tensor | None
    coefficients_B: torch.Tensor | None
    coefficients_A: torch.Tensor | None
    b: torch.Tensor | None
    d: torch.Tensor | None

    def __init__(
        self, shape: tuple[int, ...], rank: int, bases: Mapping[str, SeededMatrix], tensors: Mapping[str, torch.Tensor], gain: Gain = 1.0,
        drawn: Mapping[str, torch.Tensor | Beginning] | None = None,
    ) -> None:  # fmt: skip
        self.shape = tuple(shape)
        self.rank = rank
        self.bases = dict(bases)
        self.drawn = dict(drawn or {})
        self.gain = gain
        for name in self.fields:
            setattr(self, name, tensors.get(name))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        rank, described = constants["rank"], constants["bases"]
        if type(rank) is not int or not 1 <= rank <= min(outputs, inputs):
            raise EspalierError(f"rank is {rank!r}; it must be an integer from 1 to {min(outputs, inputs)}")
        shapes = {"B": (*lead, outputs, rank), "A": (*lead, rank, inputs)}
        bases = {}
        for factor, factor_shape in shapes.items():
            coefficients = tensors.get(f"coefficients_{factor}")
            if (factor in described) == (factor in tensors) or (factor in tensors and coefficients is not None):
                raise EspalierError(f"the factor {factor} must be either a tensor or a basis, and only a basis has coefficients")
            if factor in tensors:
                expect(factor, tensors[factor], factor_shape)
            elif coefficients is None:
                one = described[factor].get("of_every_expert", False)
                bases[factor] = read_described(described[factor], math.prod(factor_shape[-2 if one else 0 : -1]), factor_shape[-1])
            else:
                expect(f"coefficients_{factor}", coefficients, (*lead, coefficients.shape[-1] if coefficients.ndim else -1))
                bases[factor] = read_described(described[factor], math.prod(factor_shape), coefficients.shape[-1])
        for name, size in (("b", outputs), ("d", rank)):
            if name in tensors:
                expect(name, tensors[name], (*lead, size))
        if not tensors:
            raise EspalierError("an update of seeds alone has no tensor; store at least one")
        return cls(tuple(shape), rank, bases, tensors, gain)

    def constants(self) -> dict[str, Any]:
        every = {factor: {"of_every_expert": True} if self._of_every_expert(factor) else {} for factor in self.bases}
        return {"rank": self.rank, "bases": {factor: described(basis) | every[factor] for factor, basis in self.bases.items()}}

    def _of_every_expert(self, factor: str) -> bool:
        *lead, outputs, _ = matrix_shape(self.shape)
        return math.prod(lead) != 1 and self._is_frozen(factor) and self.bases[factor].rows == (outputs if factor == "B" else self.rank)

    def _over(self, shape: tuple[int, ...], rows: Mapping[str, tuple[int, int]], tensors: Mapping[str, torch.Tensor]) -> SeededLowRank:
        """The update of a part of the weight: of that shape, those rows of the bases and those tensors."""
        bases = {f: m.narrow(*rows[f]) if f in rows else m for f, m in self.bases.items()}
        drawn = {f: t[slice(*rows[f])] if f in rows else t for f, t in self.drawn.items()}
        return SeededLowRank(shape, self.rank, bases, tensors, self.gain, drawn)

    def _slice(self, start: int, stop: int) -> Update | None:
        tensors, rows = self.tensors(), {}
        tensors |= {name: tensors[name][start:stop] for name in ("B", "b") if name in tensors}
        if "B" in self.bases:
            each = 1 if self.coefficients_B is None else self.rank  # of the basis, for one of the weight
            rows["B"] = (start * each, stop * each)
        return self._over((stop - start, *self.shape[1:]), rows, tensors)

    def unbind(self) -> list[Update]:
        return self._experts if keeps() else self._unbind()

    @cached_property
    def _experts(self) -> list[Update]:
        return self._unbind()

    def _unbind(self) -> list[Update]:
        count = self.shape[0]
        parts = {name: tensor.unbind(0) for name, tensor in self.tensors().items()}
        each = {f: m.rows // count for f, m in self.bases.items() if not self._of_every_expert(f)}
        return [
            self._over(self.shape[1:], {f: (e * n, (e + 1) * n) for f, n in each.items()}, {n: t[e] for n, t in parts.items()})
            for e in range(count)
        ]

    def _keep(self, dtype: torch.dtype) -> None:
        """Hold on to what a product makes of seeds, for the next one."""
        for name, basis in self.bases.items() if keeps() else ():
            if (name, dtype) not in self._kept and not (self._is_frozen(name) and name in self.drawn):
                self._kept[name, dtype] = held(basis, self._device, dtype) if self._is_frozen(name) else self._factor(name, dtype)

    @cached_property
    def _kept(self) -> dict[tuple[str, torch.dtype], torch.Tensor]:
        return {}

    def _known(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        return self._kept.get((name, dtype)) if keeps() else None

    @property
    def _device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    def _factor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """B or A as a tensor, (..., out, rank) or (..., rank, in)."""
        stored = getattr(self, name)
        if stored is not None:
            return stored.to(dtype)
        if not self._is_frozen(name) and (known := self._known(name, dtype)) is not None:
            return known
        *lead, outputs, inputs = matrix_shape(self.shape)
        basis, size = self.bases[name], (outputs, self.rank) if name == "B" else (self.rank, inputs)
        coefficients = getattr(self, f"coefficients_{name}")
        if coefficients is None:
            drawn = self._drawn(name, dtype)
            return drawn.expand(*lead, *size) if self._of_every_expert(name) else drawn.reshape(*lead, *size)
        if name in self.drawn:
            bases = self._drawn(name, dtype).view(*lead, *size, basis.columns).flatten(-3, -2)
            return (bases @ coefficients.to(dtype).unsqueeze(-1)).view(*lead, *size)
        rows = math.prod(size)
        flat = coefficients.to(dtype).reshape(-1, coefficients.shape[-1])
        made = [seeded_combination(c, basis.narrow(e * rows, (e + 1) * rows), *size) for e, c in enumerate(flat.unbind(0))]
        return torch.stack(made).reshape(*lead, *size)

    def _drawn(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """What the basis of a factor draws, (its rows, its columns)."""
        if name in self.drawn:
            return self.drawn[name].to(dtype)
        known = self._known(name, dtype)
        return self.bases[name].dense(self._device).to(dtype) if known is None else known

    def low_rank(self) -> LowRank:
        """The same update with both factors as tensors, in float32 (float64 where any of its tensors is)."""
        return self._low_rank(working_dtype(*self.tensors().values()))

    def _low_rank(self, dtype: torch.dtype) -> LowRank:
        B = self._factor("B", dtype)
        if self.d is not None:
            B = B * self.d.to(dtype).unsqueeze(-2)
        if self.b is not None:
            B = B * self.b.to(dtype).unsqueeze(-1)
        return LowRank(B, self._factor("A", dtype), self.gain, self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        return self._low_rank(working_dtype(weight)).materialize(weight)

    def _is_frozen(self, name: str) -> bool:
        return name in self.bases and getattr(self, f"coefficients_{name}") is None

    def _through(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """``x`` times a factor."""
        if self._is_frozen(name) and name not in self.drawn and self._known(name, x.dtype) is None:
            return seeded_matmul(x, self.bases[name])
        return functional.linear(x, self._factor(name, x.dtype))

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        self._keep(x.dtype)
        hidden = self._through("A", x)
        hidden = hidden * gain_like(self.gain, x)
        if self.d is not None:
            hidden = hidden * self.d.to(x.dtype)
        if not self._is_frozen("B") and self.b is None:
            return linear_onto(hidden, self._factor("B", x.dtype), onto)
        y = self._through("B", hidden)
        if self.b is not None:
            y = y * self.b.to(x.dtype)
        return y if onto is None else onto + y

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        self._keep(working_dtype(*self.tensors().values()))
        return self.low_rank().lookup(ids, base)
