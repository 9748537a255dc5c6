"""One step of training: the losses of its micro-batches, and three ways to move parameters by them.

The usual one takes all gradients first. Others move each parameter as soon as its gradient is there, or take losses alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from espalier.attach.course import Course
from espalier.attach.tasks import choose_task
from espalier.data.batches import Batch
from espalier.memory.chunked_loss import Kind
from espalier.memory.in_backward import InBackward
from espalier.memory.language_loss import run_batch
from espalier.memory.meter import release_free_memory, resident_memory

Weigh = Callable[[torch.Tensor], torch.Tensor]
"""From the mean losses (M,) of a step's sequences to their weights, which sum to 1."""
Factors = Sequence[torch.Tensor | None]
"""Of each micro-batch, what its targets' losses (targets,) are multiplied by; ``None``: 1."""

_RATHER = "try a lower --learning-rate, or --dtype fp32"
ADVICE = f"Nothing of this step was kept; {_RATHER}"
_MOVED = f"Parameters whose gradients came before it have moved, which no checkpoint holds; {_RATHER}"


def targets_of(batches: list[Batch]) -> int:
    """Target tokens of a step, at least 1."""
    return max(1, sum(batch.target_count for batch in batches))


@dataclass(frozen=True)
class Losses:
    """How a model's losses of micro-batches are taken.

    Args:
        resident_between: resident bytes above which free memory goes back to the system before a micro-batch; 0: never.
    """

    model: nn.Module
    resident_between: int = 0
    label_smoothing: float = 0.0
    kind: Kind = "cross_entropy"

    def parts(self, batches: list[Batch], factors: Factors | None = None) -> Iterator[torch.Tensor]:
        """Of each micro-batch, its share of the mean loss per target token, 0-d."""
        total = targets_of(batches)
        for batch, own in zip(batches, factors or [None] * len(batches), strict=True):
            yield self._forward(batch, total, weights=own)

    def mean(self, batches: list[Batch]) -> float:
        """The mean loss per target token, of the model as it is now."""
        return sum(float(part.detach()) for part in self.parts(batches))

    def look(self, batches: list[Batch], weigh: Weigh) -> tuple[float, Factors]:
        """A first pass over a step: its mean loss, and the factors of its targets.

        A sequence of weight w among M has the factor M w: sequences of one length make the sum of w l, and equal weights the mean.
        """
        loss, means, present, total = 0.0, [], [], targets_of(batches)
        device = batches[0].targets.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # so that dropout is the same in the second pass
            for batch in batches:
                each = torch.zeros(len(batch.targets), device=device)
                # with gradients on: what is cached without them would be held beside the second pass
                loss += float(self._forward(batch, total, each=each).detach())
                sums, counts = (torch.zeros(len(batch.lengths), device=device).index_add_(0, batch.windows, of) for of in (each, (batch.targets >= 0).float()))
                present.append(counts > 0)
                means.append((sums / counts)[present[-1]])
        if not math.isfinite(loss) or not any(len(mean) for mean in means):  # nothing to weight by, or nothing to weight
            return loss, [None] * len(batches)
        found = weigh(torch.cat(means))
        factors = (found * len(found)).float().split([len(mean) for mean in means])
        every = [torch.ones(len(there), device=device).masked_scatter_(there, own) for there, own in zip(present, factors, strict=True)]
        return loss, [own[batch.windows] for own, batch in zip(every, batches, strict=True)]

    def _forward(self, batch: Batch, total: int, **terms: Any) -> torch.Tensor:
        if self.resident_between and resident_memory() > self.resident_between:
            release_free_memory()
        if batch.task:
            choose_task(self.model, batch.task)
        return run_batch(self.model, batch, 1.0 / total, label_smoothing=self.label_smoothing, kind=self.kind, **terms)


def accumulate(losses: Losses, batches: list[Batch], weigh: Weigh | None = None) -> float:
    """Forward and backward of a step's micro-batches; returns the mean loss per target token.

    Args:
        weigh: weights of the step's sequences by their losses, for which all of them are looked at first; the loss that is
            returned is the one without weights.
    """
    looked, factors = losses.look(batches, weigh) if weigh else (0.0, None)
    if not math.isfinite(looked):
        return looked
    taken = 0.0
    for part in losses.parts(batches, factors):
        part.backward()
        taken += float(part.detach())
        if not math.isfinite(taken):
            return taken
    return looked if weigh else taken


class ByGradients:
    """The usual way to take steps: all gradients, clipped together, before the optimizer.

    Args:
        clip: the largest norm of the gradient; 0: no clipping.
    """

    def __init__(self, losses: Losses, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, course: Course, clip: float) -> None:
        self.losses, self.parameters, self.optimizer, self.course, self.clip = losses, parameters, optimizer, course, clip

    def take(self, batches: list[Batch], weigh: Weigh | None, refuse: Callable[..., None]) -> tuple[float, float]:
        """Move the parameters once.

        Args:
            refuse: raises where a loss or a norm is not finite; takes the two, and advice that is not the usual one.

        Returns:
            The mean loss per target token, and the norm of the gradient.
        """
        loss = accumulate(self.losses, batches, weigh)
        if isinstance(penalty := self.course.penalty(), torch.Tensor) and math.isfinite(loss):
            penalty.backward()
        refuse(loss, 0.0)
        self.course.before_step()
        norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), self.clip or math.inf))
        refuse(loss, norm)
        self.optimizer.step()
        self.course.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def close(self) -> None:
        """Training ends, or is broken off."""


class DuringBackward(ByGradients):
    """Every parameter is moved as soon as its gradient is there."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.course.check_without_gradients("--update-in-backward")
        self._norms: dict[int, torch.Tensor] = {}
        self._mover = InBackward(self.parameters, self._move, self._hold)

    def _measure(self, some: list[nn.Parameter]) -> None:
        norms = torch._foreach_norm([p.grad for p in some if p.grad is not None])
        if not bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all()):
            advice = _MOVED if self._mover.is_last else ADVICE
            self._refuse(0.0, next(float(norm) for norm in norms if not math.isfinite(norm)), advice)
        for parameter, norm in zip(some, norms, strict=True):
            self._norms[id(parameter)] = self._norms.get(id(parameter), 0.0) + norm

    def _move(self, some: list[nn.Parameter]) -> None:
        self.course.mask_gradients(some)
        self._measure(some)
        self.optimizer.step()

    def _hold(self, parameter: nn.Parameter) -> bool:
        hold = getattr(self.optimizer, "hold", None)
        if hold is None:
            return False
        self.course.mask_gradients([parameter])
        if not hold(parameter):
            return False
        self._measure([parameter])
        return True

    def take(self, batches: list[Batch], weigh: Weigh | None, refuse: Callable[..., None]) -> tuple[float, float]:
        self._norms.clear()
        self._refuse = refuse
        looked, factors = self.losses.look(batches, weigh) if weigh else (0.0, None)
        refuse(looked, 0.0)
        taken = 0.0
        self.course.before_step()
        for number, part in enumerate(self.losses.parts(batches, factors), 1):
            taken += float(part.detach())
            refuse(taken, 0.0)  # before anything of this step is moved
            self._mover.is_last = number == len(batches)
            part.backward()
        self._mover.finish()
        self.course.after_step()
        norm = torch.linalg.vector_norm(torch.stack([norm.float() for norm in self._norms.values()]))
        return looked if weigh else taken, float(norm)

    def close(self) -> None:
        self._mover.__exit__(None, None, None)


class ByLosses(ByGradients):
    """No gradients: an optimizer that evaluates the loss at several places and moves by that."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.course.check_without_gradients("a zeroth-order optimizer", is_blind=True)

    @torch.no_grad()
    def take(self, batches: list[Batch], weigh: Weigh | None, refuse: Callable[..., None]) -> tuple[float, float]:
        device = next(iter(self.parameters.values())).device
        looked, factors = self.losses.look(batches, weigh) if weigh else (0.0, None)
        refuse(looked, 0.0)
        random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        def loss_of() -> torch.Tensor:
            torch.set_rng_state(random[0])  # dropout is the same in all evaluations: they differ by where the parameters are
            if random[1] is not None:
                torch.cuda.set_rng_state(random[1], device)
            return torch.stack(list(self.losses.parts(batches, factors))).sum() + self.course.penalty()

        self.course.before_step()
        loss = float(self.optimizer.step(loss_of))  # type: ignore[arg-type]
        norm = float(self.optimizer.slope)  # type: ignore[attr-defined]
        refuse(loss, norm)
        self.course.after_step()
        return looked if weigh else loss, norm
