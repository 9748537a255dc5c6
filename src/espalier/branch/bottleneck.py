"""Bottleneck adapters: two thin layers with a nonlinearity between, beside or behind a sublayer.

The unified view (arXiv:2110.04366) has them as ``h <- h + s act(x W_d) W_u``. They differ in what x is (the sublayer's
output h, or its input), in where they are (``--targets attention,mlp``) and in the scale s.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from espalier.anatomy.site import Site
from espalier.attach.branch import Branch
from espalier.attach.method import Tensors
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import brancher

Activation = Literal["relu", "gelu", "silu", "tanh", "identity"]


class Bottleneck(Branch):
    """W_d (m, d) starts as ``nn.Linear`` does, W_u (d, m) and both biases at zero, so the start is the base.

    The first papers start W_u near zero instead; LoRA's start (arXiv:2110.04366, section 4.5) was found better.
    """

    width: int
    activation: str

    def check(self) -> None:
        at_least("width", self.width, 1)

    def start(self, site: Site, model: nn.Module, stream: Stream) -> Tensors:
        return {
            "down": nn.Parameter(stream.kaiming_uniform(self.width, site.width)),
            "down_bias": nn.Parameter(torch.zeros(self.width)),
            "up": nn.Parameter(torch.zeros(site.width, self.width)),
            "up_bias": nn.Parameter(torch.zeros(site.width)),
        }

    def branch(self, part: Any, x: torch.Tensor) -> torch.Tensor:
        inner = functional.linear(x, part.down, part.down_bias)
        inner = inner if self.activation == "identity" else getattr(torch.nn.functional, self.activation)(inner)
        return functional.linear(inner, part.up, part.up_bias)

    def count(self, site: Site) -> int:
        return 2 * self.width * site.width + self.width + site.width


@brancher(
    "houlsby", ids=(), paper="arXiv:1902.00751", learning_rate=1e-3, size="width", targets="attention,mlp",
    form="act(x W_d) W_u", place="sublayer", insertion="sequential", composition="h + change",
)  # fmt: skip
class Houlsby(Bottleneck):
    """Put a bottleneck behind the attention and the feed-forward of every block: ``h <- h + act(h W_d) W_u``.

    h is what the sublayer gives, before it is added to the residual stream (and before a norm that a family has there).
    """

    width: int = 64
    """m, the size between the two layers, at least 1"""
    activation: Activation = "gelu"
    """between the two layers"""


@brancher(
    "pfeiffer", ids=(), paper="arXiv:2005.00247", learning_rate=1e-3, size="width", targets="mlp",
    form="act(x W_d) W_u", place="sublayer", insertion="sequential", composition="h + change",
)  # fmt: skip
class Pfeiffer(Bottleneck):
    """Put a bottleneck behind the feed-forward of every block only: ``h <- h + act(h W_d) W_u``."""

    width: int = 64
    """m, the size between the two layers, at least 1"""
    activation: Activation = "relu"
    """between the two layers"""


@brancher(
    "parallel-adapter", ids=(213,), paper="arXiv:2110.04366", learning_rate=1e-3, size="width", targets="mlp",
    form="act(x W_d) W_u", place="sublayer", insertion="parallel", composition="h + change",
)  # fmt: skip
class ParallelAdapter(Bottleneck):
    """Put a bottleneck beside the feed-forward of every block: ``h <- h + act(x W_d) W_u`` with its input x."""

    width: int = 64
    """m, the size between the two layers, at least 1"""
    activation: Activation = "relu"
    """between the two layers"""


@brancher(
    "scaled-parallel-adapter", ids=(213,), paper="arXiv:2110.04366", learning_rate=1e-3, size="width", targets="mlp",
    form="act(x W_d) W_u", place="sublayer", insertion="parallel", composition="h + s change",
)  # fmt: skip
class ScaledParallelAdapter(Bottleneck):
    """Put a scaled bottleneck beside the feed-forward of every block: ``h <- h + s act(x W_d) W_u`` with its input x."""

    width: int = 64
    """m, the size between the two layers, at least 1"""
    activation: Activation = "relu"
    """between the two layers"""
    scale: float = 4.0
    """s; where it is learned, its start"""
    learned_scale: bool = False
    """train s too, one number for each site"""

    def start(self, site: Site, model: nn.Module, stream: Stream) -> Tensors:
        tensors = super().start(site, model, stream)
        return {**tensors, "s": nn.Parameter(torch.full((1,), self.scale))} if self.learned_scale else tensors

    def branch(self, part: Any, x: torch.Tensor) -> torch.Tensor:
        return super().branch(part, x) * (part.s if self.learned_scale else self.scale)

    def count(self, site: Site) -> int:
        return super().count(site) + self.learned_scale
