"""Moving every parameter during the backward pass, as soon as its gradient is there, so that few gradients are alive at a time.

Gradients of all parameters take as much memory as the parameters in float32; most of that is for nothing, where a step
needs no two of them together. What does need all of them (a norm to clip by, penalties, methods that look at gradients)
cannot be had so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import nn

from espalier.kernels import sharded

WAITING = 1 << 20
"""Numbers of gradients that wait for each other, so that many small parameters are moved together."""

Move = Callable[[list[nn.Parameter]], None]


class InBackward:
    """Calls ``move`` in the backward pass, with parameters whose gradients are complete, and then frees these gradients.

    A step of one backward pass is exact to the bit. In one of several, :attr:`is_last` tells the last; before it, gradients
    are given to ``hold``, which may sum a small form of them and says whether it did, and else are summed whole.

    Args:
        parameters: those that are trained, by name; other optimizers' or sharded ones are not for this.
        move: moves parameters, by ``grad``; what it raises ends the backward pass.

    Raises:
        EspalierError: naming a parameter that is sharded.
    """

    is_last = True
    """Whether the next backward pass is the last of its step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], move: Move, hold: Callable[[nn.Parameter], bool] = lambda parameter: False) -> None:
        sharded.refuse(parameters.items(), "updates during the backward pass need")
        self._move, self._hold = move, hold
        self._waiting: list[nn.Parameter] = []
        self._held: dict[nn.Parameter, torch.Tensor | None] = {}
        """Sums of gradients of earlier passes, ``None`` where the optimizer has them."""
        self._handles = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in parameters.values()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _arrived(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        if not self.is_last:
            if self._hold(parameter):
                self._held[parameter] = None
            elif (there := self._held.get(parameter)) is not None:
                there += parameter.grad
            else:
                self._held[parameter] = parameter.grad
            parameter.grad = None
            return
        if (there := self._held.pop(parameter, None)) is not None:
            parameter.grad = there.add_(parameter.grad)
        self._waiting.append(parameter)
        if sum(p.numel() for p in self._waiting) >= WAITING:
            self._move_waiting()

    def _move_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._move(waiting)
        for parameter in waiting:
            parameter.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """The step's last backward pass is done: move what still waits, and what its last pass gave no gradient."""
        for parameter, there in self._held.items():
            parameter.grad = torch.zeros_like(parameter) if there is None else there
            self._waiting.append(parameter)
        self._held.clear()
        self._move_waiting()
