"""How the state of an optimizer is stored: float32, bfloat16 rounded at random, or 8 bits in blocks.

A rule always works on float32. What is stored is plain tensors, so a checkpoint keeps them as they are. How a tensor is
stored follows from its own size and not from that of a shard.
"""

from __future__ import annotations

from typing import Literal

import torch

from espalier.kernels import codes
from espalier.kernels.codes import BLOCK
from espalier.kernels.philox import Stream

Precision = Literal["fp32", "bf16", "8bit"]

SMALL = 4096
"""Tensors of fewer numbers stay in float32: 8 bits would save nothing, and norms and biases are the delicate ones."""


def precision_of(numel: int, asked: Precision) -> Precision:
    """How the state of a parameter of ``numel`` numbers, before it is sharded, is stored."""
    return "fp32" if numel < SMALL else asked


def bytes_of(numel: int, asked: Precision) -> int:
    """Bytes of one state tensor of a parameter."""
    match precision_of(numel, asked):
        case "fp32":
            return 4 * numel
        case "bf16":
            return 2 * numel
        case "8bit":
            return numel + 4 * -(-numel // BLOCK)


def zeros(count: int, precision: Precision, device: torch.device) -> dict[str, torch.Tensor]:
    """How ``count`` zeros are stored: tensors (count,) by what follows the slot's name, "" and, in 8 bits, "_scale"."""
    if precision == "8bit":
        return {"": torch.zeros(count, dtype=torch.uint8, device=device), "_scale": torch.zeros(-(-count // BLOCK), device=device)}
    return {"": torch.zeros(count, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=device)}


def encode(numbers: torch.Tensor, precision: Precision, signed: bool, stream: Stream) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is stored of float32 ``numbers`` (n,), and in 8 bits a scale for each :data:`BLOCK` of them.

    Args:
        signed: whether there are negative ones.
        stream: of random numbers, for rounding to bfloat16 so that small changes add up on average.
    """
    if precision == "fp32":
        return numbers, None
    if precision == "bf16":
        return codes.round_at_random(numbers, stream.key, stream.position), None
    return codes.encode(numbers, signed)


def decode(stored: torch.Tensor, scale: torch.Tensor | None, signed: bool) -> torch.Tensor:
    """The float32 numbers (n,) that are stored; of float32 the tensor itself."""
    if scale is None:
        return stored.float()
    return codes.decode(stored, scale, signed)
