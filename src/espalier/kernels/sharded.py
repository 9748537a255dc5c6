"""Tensors that may be sharded over processes (DTensor), as one process sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from espalier.errors import EspalierError


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered where it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor; it shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def total(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of what each found in its own part of a tensor; of one that is not sharded, the part."""
    if not hasattr(tensor, "full_tensor"):
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if placement.is_shard() else Replicate() for placement in tensor.placements]  # type: ignore[attr-defined]
    return DTensor.from_local(part, tensor.device_mesh, placements).full_tensor()  # type: ignore[attr-defined]


def put(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor, which may be sharded, a value that is the same on every process."""
    tensor.copy_(like(tensor, value))


def like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A value that is the same on every process, sharded as a tensor is."""
    if not hasattr(tensor, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    # each process takes its own part of its own copy: nothing is sent, so processes need not come here in one order
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]


def mean_over(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The mean of a value over the processes that share a sharded tensor: what becomes of its gradient. Else the value."""
    return torch.stack(from_each(tensor, value)).mean(0) if hasattr(tensor, "full_tensor") else value


def from_each(tensor: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """A value of every process that shares a sharded tensor, in one order on all of them; else the value alone."""
    found = [value]
    mesh: Any = getattr(tensor, "device_mesh", None)
    for dimension in () if mesh is None else range(mesh.ndim):
        group = mesh.get_group(dimension)
        gathered = []
        for one in found:
            parts = [torch.empty_like(one) for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather(parts, one.contiguous(), group)
            gathered += parts
        found = gathered
    return found


def refuse(named: Iterable[tuple[str, torch.Tensor]], needs: str) -> None:
    """Refuse sharded parameters, by name; ``needs`` is who does, and its verb.

    Raises:
        EspalierError: naming the first one.
    """
    for name, tensor in named:
        if hasattr(tensor, "full_tensor"):
            raise EspalierError(f"{name} is sharded; {needs} whole parameters, in one process")
