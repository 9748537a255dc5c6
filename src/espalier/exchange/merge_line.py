"""The loss along the straight line between two models, in one live model that becomes each point in turn.

The barrier is that of arXiv:2402.04051: how far the loss rises above the straight line between its ends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import nn

from espalier.anatomy.layout import locate
from espalier.anatomy.parameters import parameters
from espalier.checkpoint.stream import one_thread_each
from espalier.errors import EspalierError
from espalier.exchange.merging import Item, Member

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
        return max(self._above())

    @property
    def at(self) -> float:
        above = self._above()
        return self.points[above.index(max(above))]

    def _above(self) -> list[float]:
        first, last = self.losses[0], self.losses[-1]
        inner = [loss - (1 - a) * first - a * last for a, loss in zip(self.points, self.losses, strict=True)]
        return [0.0, *inner[1:-1], 0.0]


class LiveModel:
    """A live model whose numbers are set to points between models on disk, slice by slice.

    Args:
        model: of the same kind as those on disk.
        items: every tensor of the models.

    Raises:
        EspalierError: when a parameter is in no tensor, or has another shape there.
    """

    def __init__(self, model: nn.Module, items: Sequence[Item]) -> None:
        self.model = model
        by_name = {item.name: item for item in items}
        tensors = dict(model.named_parameters(remove_duplicate=False))
        self._places: list[tuple[torch.Tensor, Item]] = []
        for target in parameters(model):
            tensor = tensors[target.name].data
            pieces = locate(target.name, target.names, tensor.shape[0] if tensor.ndim == 3 else None, by_name)
            for piece in pieces if pieces[0].expert is not None else pieces[:1]:
                row, matrix = 0, tensor if piece.expert is None else tensor[piece.expert]
                for name in piece.names:
                    item = by_name[name]
                    part = matrix if len(piece.names) == 1 else matrix[row : row + item.shape[0]]
                    row += item.shape[0] if item.shape else 0
                    if tuple(part.shape) != item.shape:
                        raise EspalierError(
                            f"{name} is {item.shape} with the vocabularies aligned, and {tuple(part.shape)} in the model that the loss is "
                            "measured with; use --vocabulary base"
                        )
                    self._places.append((part.view(-1, item.shape[-1] if item.shape else 1), item))

    def become(self, first: int, second: int, share: float) -> None:
        """Be the first model and ``share`` of the way to the second, in float32 and rounded once, as a merge is.

        Raises:
            EspalierError: naming the tensor, where a model is not finite.
        """

        def set_one(place: tuple[torch.Tensor, Item]) -> None:
            target, item = place
            between = replace(item, sources=[_end(item, first), _end(item, second)], base=None, weights=[1.0, 1.0])
            try:
                for piece in between.parameter(0).pieces():
                    start = piece.start // target.shape[1]
                    rows = torch.lerp(piece.models[0], piece.models[1], share)
                    target[start : start + len(rows)].copy_(rows)
            except EspalierError as error:
                raise EspalierError(f"{item.name}: {error}") from error

        with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool, torch.no_grad():
            for _ in pool.map(set_one, self._places):
                pass


def _end(item: Item, model: int) -> tuple[Member, str]:
    """Where a model, or the base, has a tensor."""
    end = item.base if model == BASE else item.sources[model]
    assert end is not None
    return end


def along(
    live: LiveModel,
    pairs: Sequence[tuple[int, int]],
    points: int,
    measure: Callable[[], Mapping[str, float]],
    progress: Callable[[int], None],
) -> dict[tuple[int, int], dict[str, Line]]:
    """The losses on every data set at ``points`` points, the ends among them, along the line of every pair.

    Args:
        measure: gives the live model's losses, by data set.
        progress: called with how many points have been measured.
    """
    ends: dict[int, Mapping[str, float]] = {}
    found, done = {}, 0

    def at(first: int, second: int, share: float) -> Mapping[str, float]:
        nonlocal done
        live.become(first, second, share)
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

