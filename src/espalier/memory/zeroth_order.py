"""Optimizers that evaluate the loss and need no gradients: nothing is kept for a backward pass, as in inference.

Simultaneous perturbation (SPSA): for z of independent standard normal numbers, one for each trained number,
``(L(w + eps z) - L(w - eps z)) / (2 eps)`` is the slope along z, and that times z has the gradient as its expectation, up to
terms in eps^2. z is never stored: it is drawn anew from its seed wherever it is added, a slice at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from espalier.errors import EspalierError
from espalier.kernels import sharded
from espalier.kernels.philox import Stream
from espalier.memory.rule import Part, Rule, Ruled

Piece = tuple[int, torch.nn.Parameter, int, int]
"""The number of a group, a parameter of it, and a slice of that: where it begins, and how long it is."""
SLICE = 1 << 20
"""Numbers that are drawn at once."""


class ZerothOrder(Ruled):
    """A rule on estimated gradients as an optimizer of torch, whose ``step`` must be given a closure that gives the loss.

    The closure is called ``2 samples`` times, with the parameters perturbed in place; it must give the same loss for the same
    parameters (the same batch, the same dropout), as a 0-d tensor, and no gradients. Parameters that do not require gradients stay.
    State of a parameter beside the rule's: how many steps' directions were ``drawn`` before its next.
    What a perturbation leaves behind when it is taken back is what float32 rounds: at most ``3 (|w| + 2 eps |z|) 2^-24`` of a
    number and sample. Where a loss is not finite, nothing is moved.

    Args:
        perturbation: eps, more than 0.
        samples: how many directions z are looked along in a step.
    """

    zeroth_order = True
    slope = 0.0
    """Root mean square of the slopes found in the last step: the norm of the gradient, up to chance."""

    def __init__(
        self, rule: Rule, groups: Sequence[tuple[Mapping[str, torch.nn.Parameter], float]], learning_rate: float, perturbation: float, samples: int
    ) -> None:
        super().__init__(rule, groups, learning_rate)
        sharded.refuse(((self.names[id(p)], p) for g in self.param_groups for p in g["params"]), "a zeroth-order optimizer needs")
        self.perturbation, self.samples = perturbation, samples
        self._pieces = list(self._in_slices())
        self._total = sum(p.numel() for group in self.param_groups for p in group["params"])
        self._name = f"directions from {next(iter(self.names.values()))} on"
        self._slopes: list[float] = []

    def _in_slices(self) -> Iterator[tuple[int, list[Piece]]]:
        """Pieces of parameters of :data:`SLICE` numbers together, and where they are among all numbers."""
        held: list[Piece] = []
        begin = size = 0
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                for start in range(0, parameter.numel(), SLICE):
                    count = min(SLICE, parameter.numel() - start)
                    if held and size + count > SLICE:
                        yield begin, held
                        held, begin, size = [], begin + size, 0
                    held.append((number, parameter, start, count))
                    size += count
        yield begin, held

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Estimate the gradient and move every parameter; returns the mean of all losses.

        Raises:
            EspalierError: without a closure.
        """
        if closure is None:
            raise EspalierError("a zeroth-order optimizer has no gradients: give step a closure that returns the loss")
        # it outlasts a state that is forgotten: no parameter goes along directions that it has had
        known = [self.state[p] for group in self.param_groups for p in group["params"] if p in self.state]
        self._number = max((int(state["drawn"]) for state in known), default=0)
        losses = []
        self._slopes = []
        for sample in range(self.samples):
            self._shift(sample, self.perturbation)
            above = closure()
            self._shift(sample, -2 * self.perturbation)
            below = closure()
            self._shift(sample, self.perturbation)
            losses += [above, below]
            self._slopes.append((float(above) - float(below)) / (2 * self.perturbation))
        self.slope = math.sqrt(sum(slope**2 for slope in self._slopes) / self.samples)
        if math.isfinite(self.slope):
            self._move_all()
        return torch.stack(losses).mean()

    def _moving(self) -> Iterator[tuple[int, list[Piece]]]:
        for begin, pieces in self._pieces:
            if any(parameter.requires_grad for _, parameter, _, _ in pieces):
                yield begin, pieces

    def _direction(self, sample: int, begin: int, pieces: list[Piece]) -> torch.Tensor:
        """Numbers of this step's z, for some pieces: (n,)."""
        stream = Stream(self.rule.seed, self._name).at((self._number * self.samples + sample) * self._total + begin)
        return stream.gaussian(sum(count for *_, count in pieces), device=pieces[0][1].device)

    def _shift(self, sample: int, by: float) -> None:
        for begin, pieces in self._moving():
            drawn = self._direction(sample, begin, pieces).split([count for *_, count in pieces])
            moved = [(_view(piece), z) for piece, z in zip(pieces, drawn, strict=True) if piece[1].requires_grad]
            torch._foreach_add_([view for view, _ in moved], [z for _, z in moved], alpha=by)

    def _move_all(self) -> None:
        for group in self.param_groups:  # before anything large is drawn: what stays must not lie between what comes and goes
            for parameter in (p for p in group["params"] if p.requires_grad):
                self._begun(parameter)["drawn"] = torch.tensor(float(self._number + 1))
        for begin, pieces in self._moving():
            scaled = (self._direction(sample, begin, pieces).mul_(slope / self.samples) for sample, slope in enumerate(self._slopes))
            estimate = functools.reduce(torch.Tensor.add_, scaled)  # a direction at a time
            by_group: dict[int, list[tuple[torch.Tensor, Part]]] = {}
            for piece, some in zip(pieces, estimate.split([count for *_, count in pieces]), strict=True):
                number, parameter, start, _ = piece
                if parameter.requires_grad:
                    part = Part(self.names[id(parameter)], self.state[parameter], parameter.numel(), parameter.numel(), start, some)
                    by_group.setdefault(number, []).append((_view(piece), part))
            for number, pairs in by_group.items():
                self._move(pairs, self.param_groups[number])


def _view(piece: Piece) -> torch.Tensor:
    _, parameter, start, count = piece
    return parameter.view(-1)[start : start + count]
