"""Random entries of an update, rescaled: DARE."""

from __future__ import annotations

from typing import Any

from espalier.delta.compression import Compressor, Whole
from espalier.delta.fit import sparse
from espalier.delta.forms import Update
from espalier.errors import EspalierError
from espalier.registry import compressor


@compressor("random", ids=(), paper="DARE, arXiv:2311.03099")
class Random(Compressor):
    """Keep random entries and divide them by the share that is kept, so that the update is right on average.

    With density k (1 - p in the paper) exactly k n entries of each tensor are kept, where the paper throws a coin for
    each. They are drawn from the seed and the parameter's name.
    """

    density: float = 0.1
    """share of the entries that is kept, in (0, 1]"""
    rescale: bool = True
    """whether what is kept is divided by that share"""

    def check(self) -> None:
        if not 0 < self.density <= 1:
            raise EspalierError(f"density is {self.density!r}; it must be above 0 and at most 1")

    def compress(self, name: str, update: Update, whole: Whole, state: Any) -> Update:
        return sparse(whole.independent(name, update), self.density, "random", self.rescale, whole.seed, name)
