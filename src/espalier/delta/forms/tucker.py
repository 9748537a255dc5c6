"""Tucker products: one small core, and a factor for each dimension of the weight."""

from __future__ import annotations

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
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError


@register_form
class Tucker(Update):
    """``gain * core x_0 U_0 x_1 U_1 ...`` with core (r_0, r_1, ...) and, for each size d_i of W, U_i (d_i, r_i).

    Entry i of W is changed by the sum over j of ``core[j] prod_k U_k[i_k, j_k]`` (FLoRA, arXiv:2405.14739). It fits a
    weight of any number of dimensions: a matrix, fused experts (U_0 mixes what they share), a convolution. U_k is the
    tensor ``factor_k``.
    """

    form = "tucker"

    def __init__(self, core: torch.Tensor, factors: list[torch.Tensor], gain: Gain = 1.0) -> None:
        self.core = core
        for mode, factor in enumerate(factors):
            setattr(self, f"factor_{mode}", factor)
        self.gain = gain
        self.shape = tuple(len(factor) for factor in factors)

    @property
    def factors(self) -> list[torch.Tensor]:
        return [getattr(self, f"factor_{mode}") for mode in range(self.core.ndim)]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"core": self.core, **{f"factor_{mode}": factor for mode, factor in enumerate(self.factors)}}

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        core = tensors["core"]
        if core.ndim != len(shape) or not shape or any(not 1 <= r <= max(d, 1) for r, d in zip(core.shape, shape, strict=True)):
            raise EspalierError(f"core has shape {tuple(core.shape)}; for {tuple(shape)} it must have as many dimensions, each of 1 to the parameter's")
        expect("core", core, core.shape)
        factors = [expect(f"factor_{i}", tensors[f"factor_{i}"], (d, r)) for i, (d, r) in enumerate(zip(shape, core.shape, strict=True))]
        return cls(core, factors, gain)

    def _slice(self, start: int, stop: int) -> Update | None:
        return self._with_rows(stop - start, factor_0=self.factors[0][start:stop])

    def unbind(self) -> list[Update]:
        core = torch.tensordot(self.factors[0], self.core, dims=1)  # (experts, r_1, ...)
        return [Tucker(one, self.factors[1:], self.gain) for one in core.unbind(0)]

    def low_rank(self) -> LowRank | None:
        """Of the rank of the core's first dimension (that of the outputs); of experts each with its own B."""
        if len(self.shape) < 2:
            return None
        wide = working_dtype(*self.tensors().values())
        factors = [factor.to(wide) for factor in self.factors]
        if len(self.shape) == 3:
            B = factors[1] @ torch.tensordot(factors[0], self.core.to(wide), dims=1)  # (experts, out, r_2)
            return LowRank(B, factors[2].T.expand(self.shape[0], -1, -1).contiguous(), self.gain, self.shape)
        unit = torch.eye(self.core.shape[0], dtype=wide, device=self.core.device)
        return LowRank(factors[0], _product(self.core.to(wide), [unit, *factors[1:]]).flatten(1), self.gain, self.shape)

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = working_dtype(weight)
        return _product(self.core.to(wide) * self.gain, [factor.to(wide) for factor in self.factors])

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        U_out, U_in = self.factors
        hidden = functional.linear(x @ U_in.to(x.dtype), self.core.to(x.dtype)) * gain_like(self.gain, x)
        return linear_onto(hidden, U_out.to(x.dtype), onto)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows = base.rows(ids)
        U_out, U_in = self.factors
        hidden = embedding_rows(ids, U_out, rows) @ self.core.to(rows.dtype) * gain_like(self.gain, rows)
        return rows + hidden @ U_in.to(rows.dtype).T


def _product(core: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    """The core times a factor along each dimension: each product moves the next dimension to the front."""
    for factor in factors:
        core = torch.tensordot(core, factor, dims=([0], [1]))
    return core
