"""The windows of a packed row, for attention: neighbours of equal length run as one batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch.nn import functional

NAME = "espalier_packed"
"""What transformers knows attention within the windows of a packed row by (``memory/packed_attention.py``)."""
_BLOCK = 64


def _step(query: torch.Tensor, causal: bool) -> int:
    """Windows are filled up to a multiple of this in attention.

    The CPU's bfloat16 kernel compiles and keeps code (4 MB seen in torch 2.13) for every length that it meets;
    what follows a window's end cannot change it when attention is causal.
    """
    return _BLOCK if causal and query.device.type == "cpu" and query.dtype == torch.bfloat16 else 1


def _groups(lengths: tuple[int, ...], step: int) -> list[tuple[int, list[int]]]:
    """Neighbouring windows that run as one batch: (their common length after filling up, their lengths)."""
    return [(size, list(group)) for size, group in groupby(lengths, lambda n: -(-n // step) * step)]


def _batched(tensor: torch.Tensor, size: int, lengths: list[int]) -> torch.Tensor:
    """(1, heads, sum of lengths, dim) as (windows, heads, size, dim), filled up with zeros."""
    if all(length == size for length in lengths):
        return tensor[0].unflatten(1, (len(lengths), size)).transpose(0, 1)
    return torch.stack([functional.pad(t, (0, 0, 0, size - t.shape[1])) for t in tensor[0].split(lengths, 1)])


def of_every_head(query: torch.Tensor, *shared: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values that the heads of a group share, (batch, as many heads as queries have, tokens, dim)."""
    repeats = query.shape[1] // shared[0].shape[1]
    return [tensor.repeat_interleave(repeats, 1) if repeats > 1 else tensor for tensor in shared]


def batches(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], causal: bool
) -> Iterator[tuple[tuple[int, list[int]], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Groups of a packed row's windows, (size, lengths), with queries, keys and values of as many heads, (windows, heads, size, dim)."""
    groups = _groups(lengths, _step(query, causal))
    sizes = [sum(own) for _, own in groups]
    for (size, own), *parts in zip(groups, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True):
        q, k, v = (_batched(part, size, own) for part in parts)
        k, v = of_every_head(q, k, v)
        yield (size, own), q, k, v


def joined(tensor: torch.Tensor, size: int, lengths: list[int]) -> torch.Tensor:
    """A group's output, (windows, heads, size, dim) as (1, sum of lengths, heads, dim)."""
    windows = tensor.transpose(1, 2)
    if all(length == size for length in lengths):
        return windows.reshape(1, len(lengths) * size, *windows.shape[2:])
    return torch.cat([window[:length] for window, length in zip(windows.unbind(0), lengths, strict=True)])[None]
