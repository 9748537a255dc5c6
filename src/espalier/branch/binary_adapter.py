"""BinaryAdapter: a bottleneck beside the feed-forward, trained through the codes of a few bits as which it is kept."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from espalier.anatomy.site import Site
from espalier.attach.branch import Branch
from espalier.attach.method import Tensors
from espalier.delta.forms.bits import packed_size
from espalier.delta.forms.quantized import Coded, decode, encode, levels, small_normal, through_codes
from espalier.errors import at_least, one_of, within
from espalier.kernels.philox import Stream
from espalier.registry import brancher


@brancher(
    "binary-adapter", ids=(71,), paper="BinaryAdapter, ICCV 2023", learning_rate=1e-3, size="width", targets="mlp",
    form="relu(x W_d) W_u", place="sublayer", insertion="parallel", composition="h + s change", starts_as_base=False,
)  # fmt: skip
class BinaryAdapter(Branch):
    """Train ``h <- h + s Q(W_u) drop(relu(Q(W_d) x))`` through the quantizer Q, beside the feed-forward of every block.

    x is the feed-forward's input, W_d (m, d), W_u (d, m), no biases (AdaptFormer's bottleneck). Q is that of the method
    ``binary``: each number to the nearest of 2^b levels times the matrix's deviation, plus its mean; gradients pass the
    choice of the level as if it were none, and mean and deviation as they are. Stored are b bits a number and two numbers
    a matrix, which are decoded to what was trained, bit for bit. W_d starts as ``nn.Linear`` does, W_u as a normal of
    deviation 0.001 cut at two deviations: one bit cannot be zero, so the start is near the base and not at it.
    """

    width: int = 32
    """m, the size between the two matrices, at least 1"""
    bits: int = 1
    """b: bits a number, one of 1, 2, 3, 4 and 8"""
    scale: float = 1.0
    """s; the paper searches it for each task, from 0.01 to 100"""
    inner_dropout: float = 0.1
    """probability that a number between the two matrices is dropped in training, in [0, 1]"""
    coded: bool = False
    """the matrices are codes, and nothing trains: so is what was stored"""

    def check(self) -> None:
        at_least("width", self.width, 1)
        one_of("bits", self.bits, (1, 2, 3, 4, 8))
        within("inner_dropout", self.inner_dropout, 0, 1)
        self._levels = levels("normal", self.bits).tolist()

    def start(self, site: Site, model: nn.Module, stream: Stream) -> Tensors:
        if self.coded:
            codes = torch.zeros(packed_size(self.width * site.width, self.bits), dtype=torch.uint8)
            of_one = {"codes": codes, "scale": torch.zeros(1), "mean": torch.zeros(1)}
            return {f"{name}_{field}": tensor.clone() for name in ("down", "up") for field, tensor in of_one.items()}
        up = small_normal(stream, site.width, self.width)
        return {"down": nn.Parameter(stream.kaiming_uniform(self.width, site.width)), "up": nn.Parameter(up)}

    def tensors(self, part: Any) -> Tensors:
        table = torch.tensor(self._levels, dtype=torch.float32, device=getattr(part, part.names[0]).device)
        if not self.coded:
            return {name: through_codes(getattr(part, name), table) for name in ("down", "up")}
        shapes = {"down": (self.width, part.site.width), "up": (part.site.width, self.width)}
        return {name: decode(_coded(part, name), self.bits, 0, table, 0, math.prod(shape)).view(shape) for name, shape in shapes.items()}

    def branch(self, part: Any, x: torch.Tensor) -> torch.Tensor:
        inner = functional.dropout(functional.relu(functional.linear(x, part.down)), self.inner_dropout, part.training)
        return functional.linear(inner, part.up) * self.scale

    def stored(self) -> BinaryAdapter:
        made = copy.copy(self)
        made.coded = True
        return made

    def export(self, part: Any, pool: Any) -> Tensors:
        coded = {name: _coded(part, name) if self.coded else encode(getattr(part, name), self.bits, 0, "normal") for name in ("down", "up")}
        return {f"{name}_{field}": tensor for name, c in coded.items() for field, tensor in c._asdict().items()}

    def count(self, site: Site) -> int:
        return 0 if self.coded else 2 * self.width * site.width


def _coded(part: Any, name: str) -> Coded:
    return Coded(*(getattr(part, f"{name}_{field}") for field in Coded._fields))
