"""Sparsity that rises in the course of a run: how much is pruned after which step, and how many parameters a run had on average.

Pure functions of the run's length. The cubic fall is that of gradual magnitude pruning (arXiv:1710.01878, eq. 1), the
geometric one, a constant share of what is left at every pruning, that of The Journey Matters (arXiv:2501.12486).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fall = Literal["cubic", "geometric"]


def sparsity(share: float, initial: float, final: float, fall: Fall = "cubic") -> float:
    """The sparsity when a share of the pruning window is over; exactly ``initial`` and ``final`` at its ends.

    Args:
        share: from 0 to 1; what is beyond counts as the end.
        initial: sparsity at the start, from 0 to ``final``.
        final: at the end, less than 1.
    """
    if share <= 0 or share >= 1:
        return initial if share <= 0 else final
    if fall == "cubic":
        return final + (initial - final) * (1 - share) ** 3
    return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** share


@dataclass(frozen=True)
class Gradual:
    """Prunings after the steps ``begin``, ``begin + interval``, ..., and ``end``, of a run of ``steps``.

    Steps are counted as done, from 1. Nothing is pruned before the first step is done.
    """

    steps: int
    begin: int
    end: int
    interval: int
    initial: float
    final: float
    fall: Fall = "cubic"

    @classmethod
    def of(cls, steps: int, begin: float, end: float, interval: int, initial: float, final: float, fall: Fall = "cubic") -> Gradual:
        """The schedule whose window is given as shares of the run."""
        first = min(steps, max(1, round(begin * steps)))
        return cls(steps, first, min(steps, max(first, round(end * steps))), interval, initial, final, fall)

    def prunes(self, done: int) -> bool:
        """Whether anything is pruned when so many steps are done."""
        return done == self.end or (self.begin <= done < self.end and (done - self.begin) % self.interval == 0)

    def at(self, done: int) -> float:
        """The sparsity when so many steps are done, which the next one has."""
        if done < self.begin:
            return 0.0
        if done >= self.end:
            return self.final
        last = done - (done - self.begin) % self.interval
        return sparsity((last - self.begin) / (self.end - self.begin), self.initial, self.final, self.fall)

    def mean_density(self) -> float:
        """The mean over all steps of the share of the parameters that each has."""
        return sum(1 - self.at(done) for done in range(self.steps)) / self.steps


def steps_of_compute(flops: float, parameters: float, mean_density: float, tokens_per_step: float) -> int:
    """How many steps a run of so much compute has: the most of which ``6 * N_mean * tokens`` is at most ``flops``.

    Args:
        flops: floating-point operations of the whole run.
        parameters: of the dense model's linear layers.
        mean_density: N_mean as a share of them, see :meth:`Gradual.mean_density`.
    """
    return int(flops / (6 * mean_density * parameters * tokens_per_step))
