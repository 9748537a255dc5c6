"""What the methods on a model do while it trains: penalties, schedules of ranks and freezing, budgets.

The loop of ``tune`` drives a course; in one's own loop it goes like this::

    course = Course(model, steps)
    course.check()
    for step in range(steps):
        course.begin(step, learning_rate, optimizer)
        loss = model(...).loss + course.penalty()
        loss.backward()
        course.before_step()  # then gradients are clipped, where they are
        optimizer.step()
        course.after_step()
        optimizer.zero_grad()
    course.finish()
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from espalier.attach.attachment import attachments, trainable_parameters
from espalier.attach.method import Method, Moment, Renewed
from espalier.kernels import sharded
from espalier.kernels.sharded import put, whole


class Course:
    """The course of a run of ``steps`` steps on a model that carries trained deltas."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.steps = steps
        self._model = model
        self._moment = Moment(0, steps)
        self._attached = list(attachments(model).values())
        self._driven = [group for attached in self._attached for group in _by_method(attached.parts)]
        self._names = {id(p): name for name, p in trainable_parameters(model).items()}
        self._masks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._still: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._before: list[Any] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._modules = {id(m): name for name, m in model.named_modules()}

    def optimizer_options(self) -> dict[str, dict[str, float]]:
        """Options of the optimizer by parameter name, of those that their method gives any."""
        found = {}
        pools = [(attached.method, [attached.pool]) for attached in self._attached if attached.pool is not None]
        for method, holders in (*self._driven, *pools):
            for local, options in method.optimizer_options().items():
                for holder in holders:
                    parameter = holder._parameters.get(local)
                    if parameter is not None and id(parameter) in self._names:
                        found[self._names[id(parameter)]] = dict(options)
        return found

    def kept(self) -> dict[str, torch.Tensor]:
        """The tensors beside the trained ones that a run cannot make again as they are now, by name."""
        return {
            f"{self._modules[id(part)]}.{local}": getattr(part, local)
            for method, parts in self._driven
            for part in parts
            for local in method.kept
            if local in part._buffers
        }

    def check(self) -> None:
        """The run is about to begin, or to go on.

        Raises:
            EspalierError: when it is too short for a method.
        """
        for method, parts in self._driven:
            method.check_run(parts, self.steps)

    def begin(
        self, step: int, learning_rate: float = 0.0, optimizer: torch.optim.Optimizer | None = None, measure: Callable[[], float] | None = None
    ) -> None:
        """A step begins, before its forward pass.

        Args:
            optimizer: forgets its state of what is frozen or becomes another number, where a method asks for that.
            measure: gives the mean loss of the step's batch, of this process's part of it; for methods that compare losses.
        """
        self._moment = Moment(step, self.steps, learning_rate)
        self._optimizer = optimizer
        self._masks.clear()
        for method, parts in self._driven:
            method.before_forward(parts, self._moment, functools.partial(self._measured, measure) if measure else None)
            for part in parts:
                still = method.frozen(part, self._moment)
                for local, parameter in part._parameters.items():
                    if id(parameter) in self._names:
                        parameter.requires_grad_(still.get(local) is not True)
                        if method.state_policy != "keep" and optimizer is not None and not parameter.requires_grad:
                            _forget(optimizer, parameter)
                masked = [(getattr(part, local), mask) for local, mask in still.items() if isinstance(mask, torch.Tensor)]
                self._masks.update({id(tensor): (tensor, mask) for tensor, mask in masked})

    def _measured(self, measure: Callable[[], float]) -> float:
        """A loss in evaluation mode, without gradients, averaged over processes; every module's mode is then as it was."""
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            with torch.no_grad():
                loss = torch.tensor(float(measure()), dtype=torch.float64)
        finally:
            for module, mode in modes:
                module.training = mode
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            loss = loss.to(next(self._model.parameters()).device)
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        return float(loss)

    def penalty(self) -> torch.Tensor | float:
        """What the methods add to the loss of this step; 0 where none does."""
        found = [p for method, parts in self._driven if (p := method.penalty(parts)) is not None]
        return sum(found) if found else 0.0

    @torch.no_grad()
    def before_step(self) -> None:
        """The gradients are there; clipping and the optimizer are next, and see nothing of what stands still."""
        self._before = [method.before_step(parts, self._moment) for method, parts in self._driven]
        self._still = [(tensor, mask, whole(tensor.detach()).clone()) for tensor, mask in self._masks.values()]
        self.mask_gradients(tensor for tensor, _ in self._masks.values())

    @torch.no_grad()
    def mask_gradients(self, some: Iterable[torch.Tensor]) -> None:
        """Zero what gradients of some parameters have of entries that do not move in this step: not part of a norm, nor of momentum."""
        for tensor, mask in (self._masks[id(parameter)] for parameter in some if id(parameter) in self._masks):
            if tensor.grad is not None:
                sharded.local(tensor.grad).masked_fill_(sharded.local(sharded.like(tensor, mask.expand(tensor.shape).contiguous())), 0.0)

    def check_without_gradients(self, what: str, is_blind: bool = False) -> None:
        """Refuse a way of training without all gradients at once, where a method needs them; see :class:`Method`.

        There, ``before_step`` comes before anything is moved, without gradients.
        """
        for method, _ in self._driven:
            method.check_without_gradients(what, is_blind)

    @torch.no_grad()
    def after_step(self) -> None:
        """The optimizer has moved what it moves."""
        for tensor, mask, before in self._still:
            put(tensor, torch.where(mask, before, whole(tensor)))
        self._still.clear()
        for (method, parts), before in zip(self._driven, self._before, strict=True):
            method.after_step(parts, self._moment, before)
            for renewed in method.reselect(parts, self._moment):
                if method.state_policy != "keep" and self._optimizer is not None:
                    _renew(self._optimizer, renewed, method.state_policy == "seed")
        self._before.clear()

    @torch.no_grad()
    def finish(self) -> None:
        """The last step is done.

        Raises:
            EspalierError: when a method did not reach its budget.
        """
        for method, parts in self._driven:
            method.finish(parts)

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        """What the methods say of the run that is done, by name."""
        return {key: value for method, parts in self._driven for key, value in method.report(parts, self.steps).items()}


def _forget(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    state = optimizer.state.pop(parameter, {})
    if "drawn" in state:  # random numbers go on where they were
        optimizer.state[parameter] = {"drawn": state["drawn"]}


def _renew(optimizer: torch.optim.Optimizer, renewed: Renewed, seeded: bool) -> None:
    """Let the optimizer's state of renewed numbers begin anew; ours count the steps of these from there on, and take seeds."""
    parameter = getattr(renewed.part, renewed.name)
    seeds = (renewed.gradients, renewed.squares, renewed.steps) if seeded else (None, None, 0)
    if bool(renewed.places.all()) and seeds[0] is None:
        _forget(optimizer, parameter)
    elif parameter not in optimizer.state:
        return
    elif hasattr(optimizer, "renew"):
        optimizer.renew(parameter, renewed.places, *seeds)
    else:
        places = sharded.local(sharded.like(parameter, renewed.places)).reshape(-1)
        for value in optimizer.state[parameter].values():
            if isinstance(value, torch.Tensor) and value.ndim and sharded.local(value).numel() == len(places):
                sharded.local(value).view(-1)[places] = 0


def _by_method(parts: Sequence[Any]) -> list[tuple[Method, list[Any]]]:
    """The parts of a delta with the method that each is of: where it is composed of several, these drive their own."""
    found: dict[int, tuple[Method, list[Any]]] = {}
    for part in parts:
        found.setdefault(id(part.method), (part.method, []))[1].append(part)
    return list(found.values())
