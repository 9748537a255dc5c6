"""How many bytes a calibration holds at its worst, said before it is made."""

from __future__ import annotations

from collections.abc import Iterable

from espalier.anatomy.target import Target
from espalier.calibrate.statistics import ROWS, STATISTICS
from espalier.calibrate.store import Request
from espalier.calibrate.watch import is_watched, of_kind

BATCH = 8
"""Sequences whose rows wait for one addition."""


def footprint(targets: Iterable[Target], chosen: Iterable[Target], request: Request, itemsize: int, experts_per_token: int = 1) -> int:
    """The largest of: the parameters of one block, their gradients and statistics; the same of all that is in no block.

    What the forward and backward pass of a sequence needs comes on top of it. The model itself is not there.

    Args:
        targets: all parameters of the model.
        chosen: those that are watched.
        request: what is wanted.
        itemsize: bytes of a number of the dtype that is computed in.
        experts_per_token: how many of a block's fused experts a token comes to.
    """
    watched = {target.name for target in chosen}
    bytes_of: dict[int | None, int] = {}
    seen: set[str] = set()
    gradients = of_kind(request.want, "gradient")
    rows = min(BATCH * request.sequence_length, max(request.tokens, request.sequence_length) if request.tokens else 1 << 62)
    for target in targets:
        held = target.size * itemsize
        if target.name in watched:
            if gradients:
                held += target.size * itemsize + _sums(gradients, target.shape, request)
            if is_watched(target):
                some = rows * (experts_per_token if target.lead else 1)
                if of_kind(request.want, "output"):
                    held += _waiting(of_kind(request.want, "output"), (*target.lead, target.outputs), some, request, itemsize)
                if target.site not in seen:
                    seen.add(target.site)
                    held += _waiting(of_kind(request.want, "input"), (*target.lead, target.inputs), some, request, itemsize)
        bytes_of[target.block] = bytes_of.get(target.block, 0) + held
    return max(bytes_of.values())


def largest_statistic(chosen: Iterable[Target], request: Request) -> int:
    """Bytes of the largest statistic of one parameter."""
    return max(
        _sums([name], {"gradient": target.shape, "output": target.shape[:-1]}.get(STATISTICS[name].kind, (*target.lead, target.shape[-1])), request)
        for target in chosen
        for name in request.want
    )


def _sums(names: Iterable[str], place: tuple[int, ...], request: Request) -> int:
    """The float64 numbers of statistics of one place."""
    total = 0
    for name in names:
        size = 8
        for extent in STATISTICS[name].shape(place, request.rank, max(1, request.tokens // request.sequence_length)):
            size *= extent
        total += size
    return total


def _waiting(names: list[str], place: tuple[int, ...], rows: int, request: Request, itemsize: int) -> int:
    """Rows that wait, those of them that are in float64, and their statistics: sums, a sketch's second half, and results."""
    return (rows * itemsize + 8 * min(rows, 2 * ROWS)) * place[-1] + 3 * _sums(names, place, request) if names else 0
