"""MAM adapters: a short prefix in attention and a wide scaled parallel bottleneck at the feed-forward."""

from __future__ import annotations

from collections.abc import Sequence

from espalier import registry
from espalier.attach.branch import Branch, Composed
from espalier.errors import at_least
from espalier.registry import brancher


@brancher(
    "mam", ids=(213,), paper="arXiv:2110.04366", learning_rate=1e-3, size="mlp_width", targets="heads,mlp",
    form="softmax(x W_q P_k^T) P_v; act(x W_d) W_u", place="heads+sublayer", insertion="parallel",
    composition="(1 - lambda) h + lambda change; h + s change", starts_as_base=False,
)  # fmt: skip
class MAM(Composed):
    """Train a prefix of l keys and values in attention and ``h <- h + s act(x W_d) W_u`` beside the feed-forward.

    The two are the methods ``prefix`` and ``scaled-parallel-adapter``; what they do is said there. "Mix-and-match": attention
    gets few numbers, the feed-forward many.
    """

    prefix_length: int = 30
    """l, the size of the prefix, at least 1"""
    mlp_width: int = 512
    """the bottleneck's size, at least 1"""
    mlp_scale: float = 4.0
    """s"""

    def check(self) -> None:
        at_least("prefix_length", self.prefix_length, 1)
        at_least("mlp_width", self.mlp_width, 1)

    def methods(self) -> Sequence[Branch]:
        prefix = registry.make("prefix", "brancher", length=self.prefix_length)
        return prefix, registry.make("scaled-parallel-adapter", "brancher", width=self.mlp_width, scale=self.mlp_scale)
