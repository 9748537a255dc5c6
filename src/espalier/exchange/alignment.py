"""How far matching brought two models together: distances, and whether their singular vectors point the same way.

A permutation leaves the singular values of a matrix as they are and turns its singular vectors; that the large ones come to
agree, more than that the distance shrinks, goes with a low barrier (arXiv:2402.04051).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from espalier.anatomy.parameters import parameters
from espalier.exchange.matching import Reordered

Spectrum = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""U (out, n), s (n,), V (in, n) of a matrix."""


def spectra(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Spectrum]:
    """The singular values and vectors of every matrix of the blocks; fused experts and what is outside are left out."""
    found = {}
    for target in parameters(model):
        if target.block is not None and target.is_matrix and len(target.shape) == 2:
            u, s, v = torch.linalg.svd(tensors[target.name].float(), full_matrices=False)
            found[target.name] = u, s, v.mT
    return found


def permuted(spectrum: Spectrum, name: str, reordered: Reordered) -> Spectrum:
    """The spectrum of a matrix after its rows and columns were put in another order."""
    u, s, v = spectrum
    return u[reordered.rows[name]], s, v[reordered.columns[name]]


def alignment(one: Spectrum, other: Spectrum, gamma: float = 0.0) -> float:
    """``R = sum_ij (u_i . u'_j)(v_i . v'_j) / n`` over the n singular values of at least ``gamma`` times the largest.

    1 for a matrix and itself, about 0 for unrelated ones. Where the two have different numbers of such values, n is the
    larger.
    """
    kept = [int((s >= gamma * s[0]).sum()) for _, s, _ in (one, other)]
    u = one[0][:, : kept[0]].mT @ other[0][:, : kept[1]]
    v = one[2][:, : kept[0]].mT @ other[2][:, : kept[1]]
    return float((u * v).sum()) / max(kept)


def distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """``||A - B||`` over all parameters."""
    return sum(float((a[name] - b[name]).double().square().sum()) for name in a) ** 0.5
