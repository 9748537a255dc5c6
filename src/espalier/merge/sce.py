"""SCE: select by variance, calculate weights by energy, erase minority signs."""

from __future__ import annotations

import torch

from espalier.delta.merging import Combine, Parameter, Piece
from espalier.errors import EspalierError
from espalier.registry import merger


@merger("sce", ids=(), paper="arXiv:2408.07990")
def sce(parameter: Parameter, *, density: float = 1.0) -> Combine:
    """Keep the places where the models differ most, weigh each model by its energy there, erase minority signs, average.

    ``eta_i = |t_i|^2 / sum_j |t_j|^2`` over the kept places of a tensor; signs are elected by ``sum_i t_i``. The models'
    own weights multiply eta.

    Args:
        density: share of the places with any variance that is kept, those of greatest variance
    """
    if not 0 <= density <= 1:
        raise EspalierError(f"density is {density}; it must be from 0 to 1")

    def variance(piece: Piece) -> torch.Tensor:
        mean = piece.updates.mean(0)
        return torch.stack([(update - mean).square_() for update in piece.updates]).mean(0, keepdim=True)

    kept = None
    if density < 1:
        varied = sum(int(torch.count_nonzero(variance(piece))) for piece in parameter.pieces())
        kept = parameter.largest([int(varied * density)], variance)

    def selected(piece: Piece) -> torch.Tensor:
        return piece.updates if kept is None else piece.updates * kept(variance(piece))

    energy = torch.zeros(parameter.models, dtype=torch.float64)
    for piece in parameter.pieces():
        energy += torch.linalg.vector_norm(selected(piece).flatten(1), dim=1, dtype=torch.float64).square()
    if kept is not None:
        kept.again()
    energy = energy * parameter.weights.double()
    weights = (energy / energy.sum() if float(energy.sum()) > 0 else parameter.shares().double()).float()[:, None, None]

    def combine(piece: Piece) -> torch.Tensor:
        changes = selected(piece)
        sign = (changes.sum(0) >= 0) * 2.0 - 1.0
        shares = weights * (changes.sign() == sign)
        return piece.origin + parameter.scale * (changes * shares).sum(0) / shares.sum(0).clamp_min(1e-6)

    return combine
