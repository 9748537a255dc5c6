"""NearSwap: another model's numbers where they are near the base's."""

from __future__ import annotations

import torch

from espalier.delta.merging import NEEDS_BASE, Combine, Parameter, Piece
from espalier.errors import EspalierError
from espalier.registry import merger


@merger("nearswap", ids=(), paper="huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001")
def nearswap(parameter: Parameter, *, t: float = 0.001) -> Combine:
    """Go from the base towards one other model, all the way where they differ by no more than t: ``theta_0 + min(t / |tau|, 1) tau``.

    Which is to say that no number moves by more than t. Weights play no part; ``scale`` multiplies the move.

    Args:
        t: largest move of a number
    """
    if parameter.models != 1:
        raise EspalierError(f"nearswap takes one model beside the base, there are {parameter.models}")

    def combine(piece: Piece) -> torch.Tensor:
        if piece.base is None:
            raise EspalierError(NEEDS_BASE)
        return piece.base + parameter.scale * piece.updates[0].clamp(-abs(t), abs(t))

    return combine
