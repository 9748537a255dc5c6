"""Model Breadcrumbs: neither the largest nor the smallest changes."""

from __future__ import annotations

from typing import Literal

import torch

from espalier.delta.merging import Combine, Parameter, Piece, merged_changes
from espalier.errors import EspalierError
from espalier.kernels.merging import middle
from espalier.registry import merger


@merger("breadcrumbs", ids=(46,), paper="arXiv:2312.06795")
def breadcrumbs(
    parameter: Parameter,
    *,
    density: float | list[float] = 0.1,
    gamma: float | list[float] = 0.01,
    per: Literal["row", "tensor"] = "row",
    elect: Literal["none", "mass", "count"] = "none",
    normalize: bool | None = None,
) -> Combine:
    """Leave out the share gamma of largest changes, keep the share ``density`` of the next largest, add up.

    Per row as in the official code, or per tensor. Counts are int(n gamma) and int(n density), one at least; equal magnitudes go in
    the order of their index. With gamma 0 and density 1 it is task arithmetic.

    Args:
        density: share of the numbers that is kept, after the largest have been left out
        gamma: share of largest numbers that is left out; less where the row has too few to keep the density
        per: what the shares are of: each row (the last dimension), or the whole tensor
        elect: merge only the changes of the sign that has the greater mass, or the most models; none: all of them
        normalize: divide by the weights that were merged; default: only with an election
    """
    size = parameter.columns if per == "row" else parameter.numel
    kept, tops = [], []
    for share, top in zip(parameter.each(density, "density"), parameter.each(gamma, "gamma"), strict=True):
        if not 0 <= share <= 1 or not 0 <= top <= 1:
            raise EspalierError(f"density is {share} and gamma {top}; both must be from 0 to 1")
        kept.append(max(1, int(size * share)) if share else 0)
        tops.append(min(int(size * top), size - kept[-1]))
    if per == "tensor":
        inside = parameter.largest([k + t for k, t in zip(kept, tops, strict=True)])
        outliers = parameter.largest(tops)

        def keep(piece: Piece) -> torch.Tensor:
            magnitudes = piece.updates.abs()
            return piece.updates * (inside(magnitudes) & ~outliers(magnitudes))
    else:

        def keep(piece: Piece) -> torch.Tensor:
            made = torch.empty_like(piece.updates)
            for update, out, top, count in zip(piece.updates, made, tops, kept, strict=True):
                middle(update, top, count, out)
            return made

    return merged_changes(parameter, keep, elect, normalize)
