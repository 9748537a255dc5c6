"""How the state of an optimizer is stored: float32, bfloat16 rounded at random, or 8 bits in blocks.

A rule always works on float32. What is stored is plain tensors, so a checkpoint keeps them as they are. How a tensor is
stored follows from its own size and not from that of a shard.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal

import torch

from espalier.kernels.philox import Stream

Precision = Literal["fp32", "bf16", "8bit"]

BLOCK = 256
"""Numbers that share a scale in 8 bits."""

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


CODING: Mapping[Precision, int] = {"fp32": 0, "bf16": 19, "8bit": 16}
"""Bytes a number, about, that :func:`encode` and :func:`decode` hold for a moment beside the decoded numbers."""


@functools.cache
def codebook(signed: bool) -> torch.Tensor:
    """The 256 numbers in [-1, 1] (or [0, 1]) that 8 bits stand for: (256,), ascending, float32.

    Dynamic tree quantization (arXiv:2110.02861, section 2.1): leading zeros say the power of ten, the bits behind
    the first one the fraction, linear between 0.1 and 1; so small numbers are as exact, relatively, as large ones.
    """
    bits = 6 if signed else 7
    made = [0.0, 1.0]
    for zeros in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (bits - zeros) + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0**-zeros).tolist()
        made += middles + ([-m for m in middles] if signed else [])
    return torch.tensor(sorted(made), dtype=torch.float32)


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
        drawn = stream.integers32(len(numbers), device=numbers.device).to(torch.int32) & 0xFFFF
        bits = (numbers.view(torch.int32) + drawn) & ~0xFFFF
        # what is not finite is not rounded: adding to its bits would make it another number
        return torch.where(numbers.isfinite(), bits.view(torch.float32), numbers).bfloat16(), None
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(-1)
    table = codebook(signed).to(numbers.device)
    middles = (table[1:] + table[:-1]) / 2
    if not signed:  # nothing but zero becomes zero: a mean that is left over a root of zero would be a huge step
        middles[0] = 0
    codes = torch.bucketize(blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None], middles, out_int32=True)
    return codes.to(torch.uint8).view(-1)[: len(numbers)], scale


def decode(stored: torch.Tensor, scale: torch.Tensor | None, signed: bool) -> torch.Tensor:
    """The float32 numbers (n,) that are stored; of float32 the tensor itself."""
    if scale is None:
        return stored.float()
    numbers = codebook(signed).to(stored.device)[stored.int()]
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK) * scale[:, None]
    return blocks.view(-1)[: len(numbers)]
