"""Small codes packed into bytes: bitmaps (one bit an entry) and codes of up to 8 bits.

The codes are one stream of bits, the lowest bit of a byte first: code i of ``bits`` bits begins at bit
``i * bits``. The last byte is padded with zeros; how many codes there are is not in the bytes.
"""

from __future__ import annotations

import numpy
import torch

_CHUNK = 1 << 20  # codes that are 64-bit words at one time; a multiple of 8


def packed_size(count: int, bits: int = 1) -> int:
    """Bytes of ``count`` packed codes."""
    return -(-count * bits // 8)


def pack_bits(codes: torch.Tensor, bits: int = 1) -> torch.Tensor:
    """Codes (n,) of any integer dtype or bool, each below ``2 ** bits``, as bytes (uint8)."""
    packed = torch.empty(packed_size(len(codes), bits), dtype=torch.uint8, device=codes.device)
    for chunk in range(0, len(codes), _CHUNK):
        part = codes[chunk : chunk + _CHUNK].long()
        part = torch.nn.functional.pad(part, (0, -len(part) % 8)).view(-1, 8)
        words = (part << _steps(8, bits, codes)).sum(-1, keepdim=True)
        octets = ((words >> _steps(bits, 8, codes)) & 255).to(torch.uint8).flatten()
        start = chunk * bits // 8
        packed[start : start + len(octets)] = octets[: len(packed) - start]
    return packed


def unpack_bits(packed: torch.Tensor, count: int, bits: int = 1) -> torch.Tensor:
    """The first ``count`` codes (uint8) of packed bytes."""
    if 8 % bits == 0:
        steps = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[: packed_size(count, bits)].unsqueeze(-1) >> steps) & (2**bits - 1)).flatten()[:count]
    codes = torch.empty(count, dtype=torch.uint8, device=packed.device)
    for chunk in range(0, count, _CHUNK):
        octets = packed[chunk * bits // 8 : packed_size(min(chunk + _CHUNK, count), bits)].long()
        octets = torch.nn.functional.pad(octets, (0, -len(octets) % bits)).view(-1, bits)
        words = (octets << _steps(bits, 8, packed)).sum(-1, keepdim=True)
        part = ((words >> _steps(8, bits, packed)) & (2**bits - 1)).to(torch.uint8).flatten()
        codes[chunk : chunk + _CHUNK] = part[: count - chunk]
    return codes


def _steps(count: int, width: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, count * width, width, device=like.device)


def slice_bits(packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Bits [start, stop) of a bitmap, as a bitmap of their own."""
    first, shift = divmod(start, 8)
    part = packed[first : packed_size(stop)]
    if shift:
        later = torch.cat((part[1:], part.new_zeros(1)))
        part = (part >> shift) | (later << (8 - shift))
    part = part[: packed_size(stop - start)]
    if rest := (stop - start) % 8:
        part = torch.cat((part[:-1], part[-1:] & (2**rest - 1)))
    return part


def count_bits(packed: torch.Tensor) -> int:
    """How many bits are set."""
    return int(numpy.bitwise_count(packed.cpu().numpy()).sum(dtype=numpy.int64))


def has_padding(packed: torch.Tensor, count: int) -> bool:
    """Whether any bit after the first ``count`` is set."""
    return bool(count % 8 and int(packed[-1]) >> (count % 8))
