"""Few bits a number, with a scale for each group."""

from __future__ import annotations

from typing import Any, Literal

from espalier.delta.compression import Compressor, Whole
from espalier.delta.forms import Magnitude, Update
from espalier.delta.trained import quantized
from espalier.errors import EspalierError, at_least
from espalier.registry import compressor


@compressor("quantize", ids=(), paper="")
class Quantize(Compressor):
    """Round the matrices and values of any form to 2^b levels, with scale and offset for each group of numbers.

    Groups run along the rows. ``uniform`` levels lie evenly from the least to the greatest of a group; ``normal`` ones
    as a normal distribution has its numbers, around the group's mean. Indices, scales and magnitudes stay. Of a
    LoRA, B and the distance of A from where it started are rounded; where the start is not known, A stays as it is.
    """

    bits: int = 4
    """b: bits of a number, 1 to 8"""
    group: int = 64
    """numbers that share a scale and an offset; 0: all of a tensor"""
    codebook: Literal["uniform", "normal"] = "uniform"
    """where the levels lie"""

    def check(self) -> None:
        if not 1 <= self.bits <= 8:
            raise EspalierError(f"bits is {self.bits!r}; it must be from 1 to 8")
        at_least("group", self.group, 0)

    def compress(self, name: str, update: Update, whole: Whole, state: Any) -> Update:
        source = update if isinstance(update, Magnitude) else whole.independent(name, update)
        return quantized(source, whole.start(name, update), self.bits, self.group, self.codebook)
