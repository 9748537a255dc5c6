"""What the methods on a model do while it trains: penalties, schedules of ranks and freezing, budgets.

The loop of ``tune`` drives a course; in one's own loop it goes like this::

    course = Course(model, steps)
    course.check()
    for step in range(steps):
        course.begin(step, learning_rate, optimizer)
        loss = model(...).loss + course.penalty()
        loss.backward()
        course.before_step()
        optimizer.step()
        course.after_step()
        optimizer.zero_grad()
    course.finish()
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from espalier.attach.attachment import attachments, trainable_parameters
from espalier.attach.method import Moment
from espalier.kernels.sharded import put, whole


class Course:
    """The course of a run of ``steps`` steps on a model that carries trained deltas."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.steps = steps
        self._moment = Moment(0, steps)
        self._attached = [(attached, attached.parts) for attached in attachments(model).values()]
        self._names = {id(p): name for name, p in trainable_parameters(model).items()}
        self._masks: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._still: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._before: dict[str, Any] = {}
        self._modules = {id(m): name for name, m in model.named_modules()}

    def optimizer_options(self) -> dict[str, dict[str, float]]:
        """Options of the optimizer by parameter name, of those that their method gives any."""
        found = {}
        for attached, parts in self._attached:
            for local, options in attached.method.optimizer_options().items():
                for part in (*parts, *([attached.pool] if attached.pool is not None else [])):
                    parameter = part._parameters.get(local)
                    if parameter is not None and id(parameter) in self._names:
                        found[self._names[id(parameter)]] = dict(options)
        return found

    def kept(self) -> dict[str, torch.Tensor]:
        """The tensors beside the trained ones that a run cannot make again as they are now, by name."""
        return {
            f"{self._modules[id(part)]}.{local}": getattr(part, local)
            for attached, parts in self._attached
            for part in parts
            for local in attached.method.kept
            if local in part._buffers
        }

    def check(self) -> None:
        """The run is about to begin, or to go on.

        Raises:
            EspalierError: when it is too short for a method.
        """
        for attached, parts in self._attached:
            attached.method.check_run(parts, self.steps)

    def begin(self, step: int, learning_rate: float = 0.0, optimizer: torch.optim.Optimizer | None = None) -> None:
        """A step begins, before its forward pass.

        Args:
            optimizer: forgets its state of what is frozen, where a method asks for that.
        """
        self._moment = Moment(step, self.steps, learning_rate)
        self._masks.clear()
        for attached, parts in self._attached:
            for part in parts:
                still = attached.method.frozen(part, self._moment)
                for local, parameter in part._parameters.items():
                    if id(parameter) in self._names:
                        parameter.requires_grad_(still.get(local) is not True)
                        if attached.method.forgets and optimizer is not None and not parameter.requires_grad:
                            optimizer.state.pop(parameter, None)
                self._masks += [(getattr(part, local), mask) for local, mask in still.items() if isinstance(mask, torch.Tensor)]

    def penalty(self) -> torch.Tensor | float:
        """What the methods add to the loss of this step; 0 where none does."""
        found = [p for attached, parts in self._attached if (p := attached.method.penalty(parts)) is not None]
        return sum(found) if found else 0.0

    @torch.no_grad()
    def before_step(self) -> None:
        """The gradients are there; the optimizer is next."""
        for attached, parts in self._attached:
            self._before[attached.name] = attached.method.before_step(parts, self._moment)
        self._still = [(tensor, mask, whole(tensor.detach()).clone()) for tensor, mask in self._masks]

    @torch.no_grad()
    def after_step(self) -> None:
        """The optimizer has moved what it moves."""
        for tensor, mask, before in self._still:
            put(tensor, torch.where(mask, before, whole(tensor)))
        self._still.clear()
        for attached, parts in self._attached:
            attached.method.after_step(parts, self._moment, self._before.pop(attached.name))

    @torch.no_grad()
    def finish(self) -> None:
        """The last step is done.

        Raises:
            EspalierError: when a method did not reach its budget.
        """
        for attached, parts in self._attached:
            attached.method.finish(parts)
