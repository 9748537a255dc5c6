"""A base weight kept as codes of 8 or 4 bits: the numbers of the form ``Quantized`` (``uniform``), decoded by each product.

Codes and levels are bytes in frozen parameters: FSDP2 shards and gathers these as it does any other parameter, and neither
``model.to(dtype)`` nor mixed precision changes a byte.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.bits import pack_bits, unpack_bits

GROUP = 64
"""Inputs that share a step and a lowest value, or fewer where 64 does not divide a weight's."""
PIECE = 1 << 20
"""Numbers that are in float32 at a time while a weight is coded or decoded."""


def _code(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of groups of inputs (groups, size) as bytes (packed_size,), and lowest value and step of each, (groups, 2)."""
    groups = groups.float()
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((groups - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.uint8).flatten()
    return codes if bits == 8 else pack_bits(codes, bits), torch.cat((low, step), -1)


class CodedWeight(nn.Module):
    """The codes of one weight of logical shape (out, in) or (experts, out, in): ``W = low + codes * step`` by group of inputs.

    Args:
        weight: in its logical shape.
        bits: 8 or 4.
        transposed: whether the module stores it as (..., in, out).
    """

    codes: torch.Tensor
    """(bytes,), those of one expert after those of another"""
    levels: torch.Tensor
    """(groups, 8): lowest value and step, the bytes of two float32"""

    def __init__(self, weight: torch.Tensor, bits: int, transposed: bool = False) -> None:
        super().__init__()
        self.bits, self.transposed, self.shape, self.dtype = bits, transposed, weight.shape, weight.dtype
        self.count = math.prod(weight.shape[:-2])
        size = math.gcd(weight.shape[-1], GROUP)
        matrices = (matrix.reshape(-1, size) for matrix in weight.reshape(-1, *weight.shape[-2:]))
        made = [_code(part, bits) for groups in matrices for part in groups.split(PIECE // size)]
        self.codes = nn.Parameter(torch.cat([codes for codes, _ in made]), requires_grad=False)
        self.levels = nn.Parameter(torch.cat([levels for _, levels in made]).view(torch.uint8), requires_grad=False)

    def matrix(self, expert: int = 0) -> torch.Tensor:
        """The weight of an expert (or the only one), (out, in), in the dtype that it had."""
        low, step = self.levels.view(torch.float32).view(self.count, -1, 2)[expert].split(1, -1)
        weight = torch.empty(self.shape[-2:], dtype=self.dtype, device=low.device)
        groups = weight.view(len(low), -1)
        rows = PIECE // groups.shape[1]
        octets = self.codes.view(self.count, -1)[expert].split(PIECE * self.bits // 8)
        for part, some, low_, step_ in zip(groups.split(rows), octets, low.split(rows), step.split(rows), strict=True):
            codes = some if self.bits == 8 else unpack_bits(some, part.numel(), self.bits)
            part.copy_(torch.addcmul(low_, codes.view(part.shape).float(), step_))
        return weight

    def dense(self) -> torch.Tensor:
        """The whole weight in its logical shape."""
        return self.matrix() if len(self.shape) == 2 else torch.stack([self.matrix(expert) for expert in range(self.count)])

    def stored(self) -> torch.Tensor:
        """The whole weight as the module stores it."""
        return self.dense().transpose(-1, -2) if self.transposed else self.dense()


class _Product(torch.autograd.Function):
    """``x @ W.T`` that saves no weight: the backward pass decodes it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: CodedWeight, expert: int) -> torch.Tensor:  # type: ignore[override]
        ctx.weight, ctx.expert = weight, expert
        return functional.linear(x, weight.matrix(expert).to(x.dtype))  # a model that was cast to another dtype, too

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient @ ctx.weight.matrix(ctx.expert).to(gradient.dtype), None, None  # which autocast makes narrower


class CodedBase(BaseWeight):
    """The weight under an update, (out, in), where it is kept as codes; of fused experts, one's."""

    def __init__(self, weight: CodedWeight, bias: torch.Tensor | None = None, expert: int = 0) -> None:
        self.weight, self.bias, self.expert = weight, bias, expert
        self.shape, self.dtype = weight.shape[-2:], weight.dtype

    def dense(self) -> torch.Tensor:
        return self.weight.matrix(self.expert)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        y = _Product.apply(x, self.weight, self.expert)
        return y if self.bias is None else y + self.bias

    def without_bias(self) -> BaseWeight:
        return CodedBase(self.weight, None, self.expert)
