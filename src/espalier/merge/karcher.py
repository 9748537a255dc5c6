"""The mean of models on the sphere."""

from __future__ import annotations

import torch

from espalier.delta.merging import Combine, Parameter, combination
from espalier.registry import merger


@merger("karcher", ids=(), paper="Karcher, Comm. Pure Appl. Math. 30, 1977")
def karcher(parameter: Parameter, *, iterations: int = 10, tolerance: float = 1e-5) -> Combine:
    """The point on the sphere with the least squared angles to the models' directions, times their mean norm.

    ``T = sum_i w_i (a_i / sin a_i) (u_i - cos(a_i) u)``, ``u <- cos|T| u + sin|T| T/|T|``, a_i the angle from u to u_i.
    Every iterate is a combination of the models, so it works on their inner products: one pass, then the sum.

    Args:
        iterations: most steps
        tolerance: length of a step at which it has arrived
    """
    if parameter.models == 1:
        return combination(parameter, [1.0])
    weights = parameter.shares().double()
    gram = parameter.gram()
    norms = gram.diagonal().sqrt()
    there = norms > tolerance
    if not bool(there.any()):
        return combination(parameter, [0.0] * parameter.models)
    shares = torch.where(there, weights, 0.0) / weights[there].sum()
    unit = torch.where(there, 1 / norms, 0.0)
    mean = shares * unit
    length = (mean @ gram @ mean).clamp_min(0).sqrt()
    if float(length) < tolerance:
        mean = torch.zeros_like(mean)
        mean[there.nonzero()[0]] = unit[there.nonzero()[0]]
    else:
        mean = mean / length
    for _ in range(iterations):
        cosines = (unit * (gram @ mean)).clamp(-1, 1)
        angles = cosines.acos()
        pull = torch.where(there & (angles >= tolerance), shares * angles / angles.sin().clamp_min(1e-12), 0.0)
        tangent = pull * unit - (pull * cosines).sum() * mean
        size = (tangent @ gram @ tangent).clamp_min(0).sqrt()
        if float(size) < tolerance:
            break
        mean = size.cos() * mean + size.sin() / size * tangent
        mean = mean / (mean @ gram @ mean).sqrt()
    return combination(parameter, (mean * (weights * norms).sum()).tolist())
