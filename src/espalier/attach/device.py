"""Where tensors are worked on."""

from __future__ import annotations

import torch

from espalier.errors import EspalierError


def pick_device(device: str | None) -> torch.device:
    """The device of that name; by default a CUDA device where there is one.

    Raises:
        EspalierError: when this machine has no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if (found := torch.empty(0, device=device).device).type == "meta":
            raise RuntimeError("it has no numbers; give cpu or cuda")
        return found
    except (RuntimeError, AssertionError) as error:
        raise EspalierError(f"--device is {device!r}: {str(error).splitlines()[0]}") from error
