"""How far matching brought two models together: distances, and whether their singular vectors point the same way.

A permutation leaves the singular values of a matrix as they are and turns its singular vectors; that the large ones come to
agree, more than that the distance shrinks, goes with a low barrier (arXiv:2402.04051).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from espalier.anatomy.parameters import parameters
from espalier.delta.compare import Directions, aligned
from espalier.exchange.matching import Reordered


def spectra(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Directions]:
    """The singular values and vectors of every matrix of the blocks; fused experts and what is outside are left out."""
    found = {}
    for target in parameters(model):
        if target.block is not None and target.is_matrix and len(target.shape) == 2:
            u, s, v = torch.linalg.svd(tensors[target.name].float(), full_matrices=False)
            found[target.name] = Directions(u, s, v.mT)
    return found


def permuted(directions: Directions, name: str, reordered: Reordered) -> Directions:
    """The singular directions of a matrix after its rows and columns were put in another order."""
    return Directions(directions.U[reordered.rows[name]], directions.S, directions.V[reordered.columns[name]])


def alignment(one: Directions, other: Directions, gamma: float = 0.0) -> float:
    """R of two matrices, of the directions above ``gamma``: see :func:`~espalier.delta.compare.aligned`."""
    total, count = aligned(one, other, gamma)
    return total / max(count, 1)


def distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """``||A - B||`` over all parameters."""
    return sum(float((a[name] - b[name]).double().square().sum()) for name in a) ** 0.5
