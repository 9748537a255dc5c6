"""A base weight kept as codes of 8 or 4 bits: the numbers of the form ``Quantized`` (``uniform``), decoded by each product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from espalier.attach.slot import Holder
from espalier.delta.base import BaseWeight
from espalier.delta.forms.bits import pack_bits, unpack_bits

GROUP = 64
"""Inputs that share a step and a lowest value, or fewer where 64 does not divide a weight's."""


class CodedWeight(Holder):
    """The codes of one weight of logical shape (out, in): ``W = low + codes * step``, low and step by group of inputs."""

    codes: torch.Tensor
    step: torch.Tensor
    low: torch.Tensor

    def __init__(self, weight: torch.Tensor, bits: int) -> None:
        super().__init__()
        self.bits, self.shape, self.dtype = bits, weight.shape, weight.dtype
        groups = weight.float().reshape(-1, math.gcd(weight.shape[-1], GROUP))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        codes = ((groups - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.uint8).flatten()
        self.register_buffer("codes", codes if bits == 8 else pack_bits(codes, bits))
        self.register_buffer("step", step)
        self.register_buffer("low", low)

    def dense(self) -> torch.Tensor:
        """The weight, (out, in), in the dtype that it had."""
        codes = self.codes if self.bits == 8 else unpack_bits(self.codes, self.shape.numel(), self.bits)
        return torch.addcmul(self.low, codes.view(len(self.low), -1).float(), self.step).to(self.dtype).view(self.shape)


class _Product(torch.autograd.Function):
    """``x @ W.T`` that saves no weight: the backward pass decodes it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: CodedWeight) -> torch.Tensor:  # type: ignore[override]
        ctx.weight = weight
        return functional.linear(x, weight.dense())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient @ ctx.weight.dense(), None


class CodedBase(BaseWeight):
    """The weight under an update, where it is kept as codes."""

    def __init__(self, weight: CodedWeight, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.shape, self.dtype = weight.shape, weight.dtype

    def dense(self) -> torch.Tensor:
        return self.weight.dense()

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        y = _Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias

    def without_bias(self) -> BaseWeight:
        return CodedBase(self.weight)
