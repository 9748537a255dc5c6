"""The entries of largest magnitude of an update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from espalier.delta.compression import Compressor, Whole, naming
from espalier.delta.fit import densify, sparse
from espalier.delta.forms import Sparse, Update, compact
from espalier.delta.selection import Cut, across
from espalier.errors import EspalierError
from espalier.registry import compressor


@compressor("magnitude", ids=(), paper="")
class Magnitude(Compressor):
    """Keep exactly the k entries of largest magnitude, as they are; ties go to the first.

    With ``rescale`` the kept entries are multiplied so that the sum of magnitudes of each tensor stays.
    """

    density: float = 0.1
    """k: share of the entries that is kept, in (0, 1]"""
    rescale: bool = False
    """whether what is kept makes up for what is not"""
    scope: Literal["tensor", "global"] = "tensor"
    """whether the share is of each tensor or of the whole delta"""

    def check(self) -> None:
        if not 0 < self.density <= 1:
            raise EspalierError(f"density is {self.density!r}; it must be above 0 and at most 1")

    def begin(self, whole: Whole) -> Cut | None:
        def numbers() -> Iterator[torch.Tensor]:
            for name in whole.compressible():
                with naming(f"{self.name} of {name}"):
                    dense = densify(whole.independent(name, whole.delta.updates[name]))
                yield dense

        return across(numbers, self.density) if self.scope == "global" else None

    def compress(self, name: str, update: Update, whole: Whole, state: Any) -> Update | None:
        source = whole.independent(name, update)
        if state is None:
            return sparse(source, self.density, rescale=self.rescale)
        flat = densify(source).flatten()
        chosen = state.take(flat)
        if not len(chosen):
            return None
        values, where = flat[chosen], compact(chosen, len(flat))
        gain = float(flat.abs().sum() / values.abs().sum()) if self.rescale else 1.0
        return Sparse(values, where.get("index"), tuple(update.shape), gain, mask=where.get("mask"))
