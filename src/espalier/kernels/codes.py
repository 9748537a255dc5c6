"""How float32 numbers are stored in fewer bits: bfloat16 rounded at random, and 8-bit codes in blocks that share a scale.

What is here is plain torch and runs on any device. Where numba is installed, large tensors on the CPU are coded by the compiled
twin, ``codes_fast.py``: the same bits.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from espalier.kernels.philox import INTEGERS32, numbers

BLOCK = 256
"""Numbers that share a scale in 8 bits."""
SMALL = 1 << 14
"""Tensors of fewer numbers never wait for numba to be imported or to compile."""


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


@functools.cache
def bounds(signed: bool) -> torch.Tensor:
    """Above which numbers the next code begins: (255,), ascending, float32."""
    table = codebook(signed)
    middles = (table[1:] + table[:-1]) / 2
    if not signed:  # nothing but zero becomes zero: a mean that is left over a root of zero would be a huge step
        middles[0] = 0
    return middles


@functools.cache
def _compiled_twin() -> ModuleType | None:
    try:
        from espalier.kernels import codes_fast
    except ImportError:
        return None
    return codes_fast


def _twin(tensor: torch.Tensor) -> ModuleType | None:
    return _compiled_twin() if tensor.numel() >= SMALL and tensor.device.type == "cpu" and tensor.is_contiguous() else None


def encode(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n,), uint8, of float32 ``values`` (n,), and the scale of each :data:`BLOCK` of them, float32: the largest magnitude.

    Args:
        signed: whether there are negative ones.
    """
    twin = _twin(values)
    return twin.encode(values, signed) if twin else plain_encode(values, signed)


def plain_encode(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`encode` in torch alone."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(-1)
    shares = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, bounds(signed).to(values.device), out_int32=True)
    return codes.to(torch.uint8).view(-1)[: len(values)], scale


def decode(codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> torch.Tensor:
    """The float32 numbers (n,) that codes (n,) stand for."""
    twin = _twin(codes)
    return twin.decode(codes, scale, signed) if twin else plain_decode(codes, scale, signed)


def plain_decode(codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> torch.Tensor:
    """:func:`decode` in torch alone."""
    values = codebook(signed).to(codes.device)[codes.int()]
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK) * scale[:, None]
    return blocks.view(-1)[: len(values)]


def round_at_random(values: torch.Tensor, key: tuple[int, int], position: int) -> torch.Tensor:
    """Float32 ``values`` (n,) as bfloat16, up or down at random, so that on average they are what they were.

    Args:
        key, position: of the random numbers, one for each; see ``philox.py``.
    """
    twin = _twin(values)
    return twin.round_at_random(values, key, position) if twin else plain_round_at_random(values, key, position)


def plain_round_at_random(values: torch.Tensor, key: tuple[int, int], position: int) -> torch.Tensor:
    """:func:`round_at_random` in torch alone."""
    drawn = numbers(key, position, len(values), INTEGERS32, values.device).to(torch.int32) & 0xFFFF
    bits = (values.view(torch.int32) + drawn) & ~0xFFFF
    # what is not finite is not rounded: adding to its bits would make it another number
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()
