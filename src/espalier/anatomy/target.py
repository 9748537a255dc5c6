"""One parameter of a model, as methods see it: its name, its place and its logical shape."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from espalier.errors import EspalierError


def at_blocks(pattern: str, option: str = "--targets") -> tuple[str, Callable[[int | None], bool]]:
    """What stands before the ``@`` of a pattern, and whether a block is among those behind it: ``mlp@3``, ``mlp@0-5``, ``mlp@0-1+6``.

    Without an ``@`` all are, and what is in no block.

    Raises:
        EspalierError: when no blocks stand behind it.
    """
    what, sign, table = pattern.rpartition("@")
    if not sign:
        return table, lambda block: True
    if not what or not re.fullmatch(r"\d+(-\d+)?(\+\d+(-\d+)?)*", table):
        raise EspalierError(f"{option} {pattern!r}: a role or a glob stands before the @, and behind it blocks such as 3, 0-5 or 0-1+6")
    ranges = [(int(first), int(last or first)) for first, _, last in (part.partition("-") for part in table.split("+"))]
    return what, lambda block: block is not None and any(first <= block <= last for first, last in ranges)


@dataclass(frozen=True)
class Target:
    """A parameter that an update can be for.

    Args:
        name: the canonical name, as in ``model.named_parameters()``.
        names: every name of the same (tied) parameter, the canonical one first.
        roles: what it does, one role per name: ``attention.q``, ``mlp.down``, ``experts.gate_up``,
            ``embedding``, ``head``, ``norm``, ... with ``.bias`` appended for biases.
        block: index of its transformer block, or ``None``.
        shape: logical shape; for matrices ``(..., out, in)`` with leading dimensions for fused experts.
        transposed: whether the model stores it as (..., in, out).
        routes: how products reach it, one per name: ``linear``, ``lookup``, ``experts`` or ``weight``.
        gate_up: how a matrix that fuses gate and up lays out its rows: ``concatenated``, ``interleaved``, or "".
        site: the input that it reads; siblings (q, k and v; gate and up) share one, for shared choices.
        heads: query heads of the attention that a matrix is of, 0 where that is not known; each has ``head_dim`` rows or columns.
        head_dim: see ``heads``.
        qkv: how a matrix that fuses q, k and v lays out its rows: ``blocks`` (all of q, all of k, all of v), ``heads`` (q, k and v of
            head 0, then of head 1, ...), or "" where there is none or that is not known.
    """

    name: str
    names: tuple[str, ...]
    roles: tuple[str, ...]
    block: int | None
    shape: tuple[int, ...]
    transposed: bool
    routes: tuple[str, ...]
    gate_up: str
    site: str
    heads: int = 0
    head_dim: int = 0
    qkv: str = ""

    @property
    def role(self) -> str:
        """The role of the canonical name."""
        return self.roles[0]

    @property
    def route(self) -> str:
        """The route of the canonical name."""
        return self.routes[0]

    @property
    def is_matrix(self) -> bool:
        """Whether a product reads it by rows and columns (not a norm, a bias or a convolution)."""
        return self.route != "weight" or (len(self.shape) == 2 and not self.role.endswith(".bias"))

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dimensions before (out, in): ``(experts,)`` or ``()``."""
        return self.shape[:-2]

    @property
    def outputs(self) -> int:
        return self.shape[-2]

    @property
    def inputs(self) -> int:
        return self.shape[-1]

    @property
    def size(self) -> int:
        return math.prod(self.shape)
