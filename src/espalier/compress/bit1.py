"""1-bit adapters: every number of an adapter as one of two levels."""

from __future__ import annotations

from typing import Any

from espalier.delta.compression import Compressor, Whole
from espalier.delta.forms import Magnitude, Update
from espalier.delta.trained import quantized
from espalier.errors import EspalierError
from espalier.registry import compressor


@compressor("bit1", ids=(71,), paper="BinaryAdapter, ICCV 2023")
class BinaryAdapter(Compressor):
    """Keep each tensor's mean and standard deviation and the nearest of 2^b normal levels: ``w = Q_b((w - mu)/sd) sd + mu``.

    Of a LoRA, w is B and the distance of A from the A0 that the delta's recorded seed draws again; where A0 is not known,
    A stays as it is.
    The levels minimise the expected absolute error under the standard normal (at 1 bit, +-0.6745). The paper trains
    through the rounding; here a finished delta is rounded. Its division by sd + 1e-5 is one by sd: numbers of an
    adapter are often smaller than 1e-5. A LoRA's B has a spread around zero once it is trained; one that is still all
    zero stays zero.
    """

    bits: int = 1
    """b: bits of a number, 1 to 8"""

    def check(self) -> None:
        if not 1 <= self.bits <= 8:
            raise EspalierError(f"bits is {self.bits!r}; it must be from 1 to 8")

    def compress(self, name: str, update: Update, whole: Whole, state: Any) -> Update:
        source = update if isinstance(update, Magnitude) else whole.independent(name, update)
        return quantized(source, whole.start(name, update), self.bits, 0, "normal")
