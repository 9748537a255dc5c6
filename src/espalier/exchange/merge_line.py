"""The loss along the straight line between two models, in one live model that becomes each point in turn.

The barrier is that of arXiv:2402.04051: how far the loss rises above the straight line between its ends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from espalier import registry
from espalier.exchange.live_merge import Live
from espalier.exchange.merging import Item, Member, Method

BASE = -1
"""Stands for the base, where models are counted from 0."""


@dataclass
class Line:
    """Losses at points along a line, in nats per token.

    Args:
        points: 0 is the first model, 1 the second.
        barrier: the most that a loss is above the straight line between those of the ends; at least 0.
        at: where that is.
    """

    points: list[float]
    losses: list[float]

    @property
    def barrier(self) -> float:
        return barrier(self.losses)

    @property
    def at(self) -> float:
        above = _above(self.losses)
        return self.points[above.index(max(above))]


def barrier(losses: Sequence[float]) -> float:
    """The most that losses at equidistant points are above the straight line between those of the ends; at least 0."""
    return max(_above(losses))


def _above(losses: Sequence[float]) -> list[float]:
    last = len(losses) - 1
    inner = [loss - (1 - place / last) * losses[0] - place / last * losses[-1] for place, loss in enumerate(losses)]
    return [0.0, *inner[1:-1], 0.0]


def become(live: Live, items: Sequence[Item], first: int, second: int, share: float) -> None:
    """Have the live model be the first model and ``share`` of the way to the second, as a linear merge is.

    Raises:
        EspalierError: naming the tensor, where a model is not finite.
    """
    info = registry.find("linear", "merger")
    between = [replace(item, sources=[_end(item, first), _end(item, second)], base=None, weights=[1 - share, share], options={}) for item in items]
    live.become(between, Method.of(info, registry.load(info)), 0)


def _end(item: Item, model: int) -> tuple[Member, str]:
    """Where a model, or the base, has a tensor."""
    end = item.base if model == BASE else item.sources[model]
    assert end is not None
    return end


def along(
    live: Live,
    items: Sequence[Item],
    pairs: Sequence[tuple[int, int]],
    points: int,
    measure: Callable[[], Mapping[str, float]],
    progress: Callable[[int], None],
) -> dict[tuple[int, int], dict[str, Line]]:
    """The losses on every data set at ``points`` points, the ends among them, along the line of every pair.

    Args:
        items: every tensor of the models.
        measure: gives the live model's losses, by data set.
        progress: called with how many points have been measured.
    """
    ends: dict[int, Mapping[str, float]] = {}
    found, done = {}, 0

    def at(first: int, second: int, share: float) -> Mapping[str, float]:
        nonlocal done
        become(live, items, first, second, share)
        losses = {data: loss if math.isfinite(loss) else math.inf for data, loss in measure().items()}
        progress(done := done + 1)
        return losses

    for pair in pairs:
        for end in pair:
            if end not in ends:
                ends[end] = at(end, end, 0.0)
        shares = [step / (points - 1) for step in range(points)]
        losses = [ends[pair[0]], *(at(*pair, share) for share in shares[1:-1]), ends[pair[1]]]
        found[pair] = {data: Line(shares, [loss[data] for loss in losses]) for data in losses[0]}
    return found


def every_pair(models: int, has_base: bool) -> list[tuple[int, int]]:
    """The lines of a report: between any two models, and from the base to each."""
    return [*itertools.combinations(range(models), 2), *((BASE, model) for model in range(models) if has_base)]


def measured_points(pairs: Sequence[tuple[int, int]], points: int) -> int:
    """How many times :func:`along` measures."""
    return len({end for pair in pairs for end in pair}) + len(pairs) * (points - 2)

