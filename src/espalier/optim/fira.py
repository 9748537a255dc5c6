"""Fira: GaLore, and the rest of the gradient scaled as Adam scales its subspace."""

from __future__ import annotations

from typing import Any

import torch

from espalier.errors import at_least
from espalier.memory.subspace import Kind, OnProjector
from espalier.registry import optimizer


@optimizer("fira", ids=(182,), paper="arXiv:2410.01623")
class Fira(OnProjector):
    """``w -= lr (scale P psi + phi S + decay w)``: psi Adam's direction for R = P^T G, S the rest of G, ``phi_i = ||psi_i|| / ||R_i||``.

    phi is of each row, or column, along the longer side. The norm of ``phi S`` grows by the factor gamma in a step at most
    (section 4.3). psi has Adam's bias correction in it; the official code corrects after that limit, which differs in the first tens of
    steps. Its rest contains the share ``1 - scale`` of what is in the subspace too, as its projection is scaled: here P P^T is
    a projection, and S is orthogonal to it.
    """

    gamma: float = 1.01
    """by which the norm of the scaled rest may grow in a step, at least 1"""

    has_rest = True

    def check(self) -> None:
        super().check()
        at_least("gamma", self.gamma, 1)

    def rest(self, rest: torch.Tensor, reduced: torch.Tensor, direction: torch.Tensor, kind: Kind, state: dict[str, Any]) -> torch.Tensor:
        short = 1 if kind == "right" else 0
        made = rest * (direction.norm(dim=short, keepdim=True) / (reduced.norm(dim=short, keepdim=True) + 1e-8))
        norm = made.norm()
        if state.get("rest_norm", 0) > 0:  # what grows from zero by a factor would stay there
            limited = torch.minimum(norm, self.gamma * state["rest_norm"])
            made *= limited / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            norm = limited
        state["rest_norm"] = norm
        return made
