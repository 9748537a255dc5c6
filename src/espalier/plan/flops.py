"""How many floating-point operations a token takes, counted from the shapes of a decoder, dense and with sparse weights.

Counted, not timed: what masks set to zero is multiplied all the same by the products of today's processors, so nothing here
says how long a step takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from espalier.anatomy.target import Target


@dataclass(frozen=True)
class Flops:
    """Operations of one token's forward pass; a product of an (out, in) matrix has ``2 * out * in``.

    Args:
        linear: of the matrices of the blocks.
        attention: of scores and their sums of values, which have no weights.
        vocabulary: of the head.
    """

    linear: float
    attention: float
    vocabulary: float

    @property
    def forward(self) -> float:
        return self.linear + self.attention + self.vocabulary

    @property
    def training(self) -> float:
        """Of forward and backward pass, which is two forward passes."""
        return 3 * self.forward

    def at(self, density: float) -> Flops:
        """The same with blocks whose matrices have that share of entries that are not zero."""
        return Flops(self.linear * density, self.attention, self.vocabulary)


def flops_of(
    targets: Iterable[Target], *, attention_width: int, context: int, experts_per_token: int = 1
) -> Flops:
    """The operations of a token that attends to ``context`` tokens.

    Args:
        targets: the model's parameters, see ``anatomy.parameters``. A head that is tied to the embedding is found by its role.
        attention_width: heads times the size of a head.
        experts_per_token: of how many fused experts a token takes.
    """
    linear = head = 0.0
    blocks = set()
    for target in targets:
        if target.block is not None:
            blocks.add(target.block)
        if not target.is_matrix:
            continue
        if target.block is not None:
            share = experts_per_token / target.lead[0] if target.lead else 1.0
            linear += 2 * target.size * share
        elif any(role.startswith("head") for role in target.roles):
            head += 2 * target.size
    return Flops(linear, 4.0 * attention_width * context * len(blocks), head)
