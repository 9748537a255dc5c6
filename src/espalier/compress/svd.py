"""The leading singular directions of an update."""

from __future__ import annotations

from typing import Any, Literal

from espalier.delta.compression import Compressor, Whole
from espalier.delta.fit import low_rank
from espalier.delta.forms import Update
from espalier.errors import EspalierError, at_least
from espalier.registry import compressor


@compressor("svd", ids=(), paper="Eckart and Young 1936; Halko et al. 2011")
class SVD(Compressor):
    """Keep the r largest singular values of each matrix: ``U_r S_r V_r^T``, the best update of that rank.

    Factors are truncated without making the update dense. Large dense matrices are decomposed by random projections
    with power iterations where r is small. What is no matrix stays as it is.
    """

    rank: int = 8
    """r: the most singular values that are kept; 0: as many as the energy takes"""
    energy: float = 0.0
    """keep only as many as hold this share of the squared norm, in (0, 1]; 0: rank alone decides"""
    decomposition: Literal["auto", "exact", "randomized"] = "auto"
    """how dense matrices are decomposed; auto: exactly where they are small"""

    def check(self) -> None:
        at_least("rank", self.rank, 0)
        if not 0 <= self.energy <= 1 or (not self.rank and not self.energy):
            raise EspalierError(f"rank is {self.rank} and energy {self.energy}; give a rank of at least 1, or an energy in (0, 1]")

    def compress(self, name: str, update: Update, whole: Whole, state: Any) -> Update:
        if len(update.shape) < 2:
            return update
        method = None if self.decomposition == "auto" else self.decomposition
        return low_rank(whole.independent(name, update), self.rank or None, self.energy or None, method, whole.seed, name)
