"""What methods share that train parameters of which some entries are held at exactly zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Moment, Tensors
from espalier.attach.whole_tensors import WholeTensors
from espalier.delta.forms import Replace
from espalier.errors import EspalierError
from espalier.kernels.sharded import like, local, whole


class Masked(WholeTensors):
    """Base of methods that train ``W' = V``, V zero where the mask ``live`` is false: ``V`` of W's shape, ``live`` too.

    Entries that are not live get no gradient, so that clipping and the optimizer's state are those of the others alone, and are
    set to zero after every step, whatever the optimizer made of them. Products are dense: nothing gets faster.
    """

    sparsity: float

    def check(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise EspalierError(f"sparsity is {self.sparsity!r}; it must be at least 0 and less than 1")

    def accepts(self, target: Target) -> bool:
        return target.is_matrix

    def masked(self, weight: torch.Tensor, live: torch.Tensor) -> Tensors:
        """The tensors of a parameter that starts at ``weight`` where it is live; both of its logical shape."""
        values = torch.where(live, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        return {"values": nn.Parameter(values.contiguous()), "live": live}

    def update(self, part: Any, context: Any) -> Replace:
        return Replace(_Live.apply(part.values, part.live))

    reads_gradients = False

    def after_step(self, parts: Sequence[Any], moment: Moment, before: Any) -> None:
        for part in parts:
            local(part.values).masked_fill_(~local(like(part.values, part.live)), 0.0)

    def report(self, parts: Sequence[Any], steps: int) -> dict[str, Any]:
        numbers = sum(part.target.size for part in parts)
        live = sum(int(whole(part.values).count_nonzero()) for part in parts)
        return {"prunable": numbers, "sparsity": 1 - live / numbers}


def matrices_of(target: Target) -> tuple[int, int]:
    """How many matrices a parameter holds (experts), and the entries of each."""
    return math.prod(target.lead), target.outputs * target.inputs


class _Live(torch.autograd.Function):
    """A tensor as it is, whose gradient is zero where a mask is false."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, live: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(live)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * ctx.saved_tensors[0], None
