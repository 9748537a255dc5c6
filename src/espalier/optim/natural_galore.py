"""Natural GaLore: GaLore along the natural gradient of its last gradients."""

from __future__ import annotations

import torch

from espalier.errors import EspalierError, at_least
from espalier.memory.rule import Shape
from espalier.memory.subspace import OnProjector
from espalier.registry import optimizer


@optimizer("natural-galore", ids=(294,), paper="arXiv:2410.16029")
class NaturalGaLore(OnProjector):
    """GaLore whose rule sees ``(lambda I + Q Q^T)^-1 R``, the columns of Q being the last ``history`` R, this one included.

    By Woodbury, ``(R - Q (lambda I + Q^T Q)^-1 Q^T R) / lambda``, in float64: published as two terms, it cancels in float32. The
    history is as many times R and is forgotten when P changes, as R is then in another basis (the official code keeps it).
    """

    history: int = 4
    """how many gradients make Q, at least 1; 20 in the paper, which is ten times Adam's moments"""
    damping: float = 1e-3
    """lambda, more than 0"""

    def check(self) -> None:
        super().check()
        at_least("history", self.history, 1)
        if not self.damping > 0:
            raise EspalierError(f"damping is {self.damping}; it must be more than 0")

    copies = 2

    def more_bytes(self, shape: Shape, reduced: int) -> int:
        return 4 * self.history * reduced

    def preconditioned(self, reduced: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        old = state.get("history", reduced.new_zeros(0, reduced.numel()))
        state["history"] = torch.cat([old[-(self.history - 1) :] if self.history > 1 else old[:0], reduced.reshape(1, -1)])
        q = state["history"].double()
        gram = q @ q.T
        gram.diagonal().add_(self.damping)
        # the last row of Q is R itself, so Q^T R is the last column of Q^T Q
        weights = torch.cholesky_solve((q @ q[-1]).unsqueeze(1), torch.linalg.cholesky(gram))
        return ((q[-1] - q.T @ weights.squeeze(1)) / self.damping).float().view_as(reduced)

    def forget(self, state: dict[str, torch.Tensor]) -> None:
        state.pop("history", None)
