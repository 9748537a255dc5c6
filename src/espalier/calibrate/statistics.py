"""The statistics that can be asked for by name, and how rows, or gradients, are added up to them.

A statistic is one small class: what it is of (``input`` or ``output`` rows of a linear module, or the
``gradient`` of a parameter), what it keeps, and the shape of its result. Everything is kept in float64.
Rows are tokens, (n, features); of fused experts each has its own, from the tokens routed to it. A gradient
is that of one sequence: minus the log-likelihood of its target tokens, summed over them.

``register`` puts a class into the table; nothing else has to know it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from espalier.errors import EspalierError, suggestion

Kind = Literal["input", "output", "gradient"]
ROWS = 1024
"""Rows that are converted to float64 at a time."""
PIECE = 1 << 20
"""Entries of a gradient that are converted to float64 at a time."""


class Statistic:
    """Something that is added up over rows (or over the gradients of sequences).

    Args:
        shape: ``(features,)`` of one module or expert; of a gradient, the parameter's as the model stores it.
        rank: how many vectors a statistic that keeps some shall keep.
    """

    kind: ClassVar[Kind] = "input"
    by_sequence: ClassVar[bool] = False
    """Whether its value depends on how the rows are cut: then it gets those of one sequence at a time."""

    def __init__(self, shape: tuple[int, ...], rank: int, device: torch.device) -> None:
        self.sum = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Take in rows, (n, features) in float64; or one sequence's gradient, as computed."""
        raise NotImplementedError

    def result(self) -> torch.Tensor:
        """The value, of the shape that ``shape`` promises."""
        return self.sum

    @staticmethod
    def shape(place: tuple[int, ...], rank: int, sequences: int) -> tuple[int, ...]:
        """The result's shape; ``place`` is ``(*experts, features)``, or the parameter's shape."""
        return place


STATISTICS: dict[str, type[Statistic]] = {}
"""Name -> class, of all statistics that ``--want`` knows."""


def register(name: str, kind: Kind = "input") -> Any:
    """Enter a class under a name; ``kind`` is what it is of."""

    def enter(cls: type[Statistic]) -> type[Statistic]:
        STATISTICS[name] = type(cls.__name__, (cls,), {"kind": kind, "__doc__": cls.__doc__})
        return cls

    return enter


def parse_want(want: str | Sequence[str]) -> list[str]:
    """The statistics that a comma-separated list (or a sequence) names, in the table's order, each once.

    Raises:
        EspalierError: for an empty list, or a name that is not in the table.
    """
    parts = [part.strip() for part in (want.split(",") if isinstance(want, str) else want)]
    names = [part for part in parts if part]
    for name in names:
        if name not in STATISTICS:
            raise EspalierError(f"--want names {name!r}{suggestion(name, list(STATISTICS))} (there are: {', '.join(STATISTICS)})")
    if not names:
        raise EspalierError(f"--want is empty; it takes one or more of: {', '.join(STATISTICS)}")
    return [name for name in STATISTICS if name in names]


@register("mean")
@register("output_mean", "output")
class Mean(Statistic):
    """The mean row, (features,); zero where no token came."""

    count = 0

    def add(self, rows: torch.Tensor) -> None:
        self.count += len(rows)
        self.sum += rows.sum(0)

    def result(self) -> torch.Tensor:
        return self.sum / max(self.count, 1)


@register("variance")
@register("output_variance", "output")
class Variance(Statistic):
    """The variance of each feature over tokens, divided by their number: the fluctuation of FLAP (arXiv:2312.11983).

    Chan, Golub and LeVeque's pairwise update of mean and squared deviations, which loses no digits to a large mean.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, device: torch.device) -> None:
        super().__init__(shape, rank, device)
        self.mean, self.count = torch.zeros_like(self.sum), 0

    def add(self, rows: torch.Tensor) -> None:
        mean, total = rows.mean(0), self.count + len(rows)
        delta = mean - self.mean
        self.sum += (rows - mean).square().sum(0) + delta.square() * (self.count * len(rows) / total)
        self.mean += delta * (len(rows) / total)
        self.count = total

    def result(self) -> torch.Tensor:
        return self.sum / max(self.count, 1)


@register("second_moment")
class SecondMoment(Statistic):
    """X^T X, (features, features), summed over tokens: what RegMean, GPTQ, SparseGPT and EoRA start from."""

    def __init__(self, shape: tuple[int, ...], rank: int, device: torch.device) -> None:
        super().__init__((*shape, *shape), rank, device)

    def add(self, rows: torch.Tensor) -> None:
        self.sum.addmm_(rows.T, rows)

    @staticmethod
    def shape(place: tuple[int, ...], rank: int, sequences: int) -> tuple[int, ...]:
        return (*place, place[-1])


@register("norm")
class Norm(Statistic):
    """The Euclidean norm of each input feature over all tokens, ||X_j||: the factor of Wanda (arXiv:2306.11695)."""

    def add(self, rows: torch.Tensor) -> None:
        self.sum += rows.square().sum(0)

    def result(self) -> torch.Tensor:
        return self.sum.sqrt()


@register("absmax")
class AbsoluteMaximum(Statistic):
    """The largest magnitude of each input feature."""

    def add(self, rows: torch.Tensor) -> None:
        torch.maximum(self.sum, rows.abs().amax(0), out=self.sum)


@register("singular_vectors")
class SingularVectors(Statistic):
    """The top right singular vectors of the inputs X (uncentred), each times its singular value: S_k V_k^T, (rank, features).

    An incremental truncated SVD as in EVA (arXiv:2410.07170), twice as wide as what is given out: the sketch B and
    new rows are stacked, and the rows of U^T [B; X] with the largest singular values are the next B. Exact while the rows
    have no larger rank than the sketch. Rows are sorted, the largest entry of each is positive. Two sketches
    of other data can be joined in the same way.
    """

    by_sequence = True

    def __init__(self, shape: tuple[int, ...], rank: int, device: torch.device) -> None:
        self.rank = min(rank, *shape)
        super().__init__((min(2 * rank, *shape), *shape), rank, device)

    def add(self, rows: torch.Tensor) -> None:
        for part in rows.split(512):
            stacked = torch.cat([self.sum, part])
            vectors = torch.linalg.eigh(stacked @ stacked.T).eigenvectors
            self.sum = vectors[:, -len(self.sum) :].flip(1).T @ stacked

    def result(self) -> torch.Tensor:
        top = self.sum[: self.rank]
        largest = top.gather(1, top.abs().argmax(1, keepdim=True))
        return torch.where(largest < 0, -top, top)

    @staticmethod
    def shape(place: tuple[int, ...], rank: int, sequences: int) -> tuple[int, ...]:
        return (*place[:-1], min(rank, place[-1]), place[-1])


@register("gradient", "gradient")
class Gradient(Statistic):
    """The gradient itself, summed over sequences, as the model stores the parameter: what LoRA-GA starts from."""

    def add(self, rows: torch.Tensor) -> None:
        for total, part in zip(self.sum.view(-1).split(PIECE), rows.reshape(-1).split(PIECE), strict=True):
            total.add_(part)


@register("fisher", "gradient")
class Fisher(Statistic):
    """The diagonal of the empirical Fisher information, summed over sequences: the squares of each one's gradient.

    Matena and Raffel (arXiv:2111.09832), with the data's own tokens as labels. Divide by the number of sequences
    for the mean.
    """

    def add(self, rows: torch.Tensor) -> None:
        for total, part in zip(self.sum.view(-1).split(PIECE), rows.reshape(-1).split(PIECE), strict=True):
            part = part.double()
            total.addcmul_(part, part)


@register("gradient_norm", "gradient")
class GradientNorm(Statistic):
    """The Frobenius norm of the parameter's gradient on each sequence, (sequences,)."""

    def __init__(self, shape: tuple[int, ...], rank: int, device: torch.device) -> None:
        self.norms: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        parts = [torch.linalg.vector_norm(part.double()) for part in rows.reshape(-1).split(PIECE)]
        self.norms.append(torch.linalg.vector_norm(torch.stack(parts)))

    def result(self) -> torch.Tensor:
        return torch.stack(self.norms)

    @staticmethod
    def shape(place: tuple[int, ...], rank: int, sequences: int) -> tuple[int, ...]:
        return (sequences,)


class Sums:
    """The rows of one place, those that wait and the statistics of those before; a set of them per expert.

    Args:
        names: of the statistics; none where only tokens are counted.
        shape: ``(features,)`` or ``(experts, features)``.
    """

    def __init__(self, names: Sequence[str], shape: tuple[int, ...], rank: int, device: torch.device) -> None:
        self.names, self.lead = list(names), shape[:-1]
        count = math.prod(self.lead)
        self.tokens = [0] * count
        self._waiting: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self._sums = [[STATISTICS[name](shape[-1:], rank, device) for name in names] for _ in range(count)]

    def put(self, rows: torch.Tensor, expert: int = 0) -> None:
        """Rows of one sequence, of any shape (..., features)."""
        rows = rows.detach().reshape(-1, rows.shape[-1])
        self.tokens[expert] += len(rows)
        if self.names:
            self._waiting[expert].append(rows)

    def add_up(self) -> None:
        """Add the rows that wait; more at a time is faster, and moves a float64 sum by its rounding only."""
        for waiting, sums in zip(self._waiting, self._sums, strict=True):
            whole = [s for s in sums if not s.by_sequence]
            for part in torch.cat(waiting).split(ROWS) if waiting and whole else ():
                part = part.double()
                for statistic in whole:
                    statistic.add(part)
            for statistic in sums:
                for rows in waiting if statistic.by_sequence else ():
                    statistic.add(rows.double())
            waiting.clear()

    def results(self) -> dict[str, torch.Tensor]:
        """The value of each statistic, experts stacked."""
        found = {}
        for position, name in enumerate(self.names):
            values = [sums[position].result() for sums in self._sums]
            found[name] = torch.stack(values) if self.lead else values[0]
        return found
