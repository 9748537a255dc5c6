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


def _code(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of a matrix as bytes (packed_size,), and the lowest value and step of its groups (groups, 2) in float32."""
    groups = weight.float().reshape(-1, math.gcd(weight.shape[-1], GROUP))
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
        made = [_code(matrix, bits) for matrix in weight.reshape(-1, *weight.shape[-2:])]  # in float32 one at a time
        self.codes = nn.Parameter(torch.cat([codes for codes, _ in made]), requires_grad=False)
        self.levels = nn.Parameter(torch.cat([levels for _, levels in made]).view(torch.uint8), requires_grad=False)

    def matrix(self, expert: int = 0) -> torch.Tensor:
        """The weight of an expert (or the only one), (out, in), in the dtype that it had."""
        out_in = self.shape[-2:]
        codes = self.codes.view(self.count, -1)[expert]
        codes = codes if self.bits == 8 else unpack_bits(codes, out_in.numel(), self.bits)
        low, step = self.levels.view(torch.float32).view(self.count, -1, 2)[expert].split(1, -1)
        return torch.addcmul(low, codes.view(len(low), -1).float(), step).to(self.dtype).view(out_in)

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
        return functional.linear(x, weight.matrix(expert))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient @ ctx.weight.matrix(ctx.expert), None, None


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
