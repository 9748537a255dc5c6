"""Several optimizers as one, for parameters that are treated differently."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from espalier.memory.rule import Ruled, evaluated, keep_dtypes
from espalier.memory.zeroth_order import ZerothOrder


class Joined(torch.optim.Optimizer):
    """Several optimizers over separate parameters as one: their groups side by side, their state in one dictionary."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts: list[torch.optim.Optimizer] = []
        self._owners: dict[int, torch.optim.Optimizer] = {}
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.add(part)

    def add(self, part: torch.optim.Optimizer) -> None:
        """One more; its groups must be among those that there are, or are added. Of a joined one, its parts, which hold its state."""
        if isinstance(part, Joined):
            for one in part.parts:
                self.add(one)
            return
        self.parts.append(part)
        self._owners.update({id(parameter): part for group in part.param_groups for parameter in group["params"]})
        self.param_groups += [group for group in part.param_groups if all(group is not there for there in self.param_groups)]
        part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the parts go on with the state and the groups that were loaded."""
        super().load_state_dict(state_dict)
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[begin:end]
            begin = end
        keep_dtypes(self, state_dict)

    def hold(self, parameter: torch.nn.Parameter) -> bool:
        """See :meth:`Ruled.hold`."""
        owner = self._owners[id(parameter)]
        return owner.hold(parameter) if isinstance(owner, Ruled) else False

    @property
    def zeroth_order(self) -> bool:
        """Whether the parts evaluate the closure themselves, each for its own parameters."""
        return any(getattr(part, "zeroth_order", False) for part in self.parts)

    @property
    def slope(self) -> float:
        """See :class:`ZerothOrder`."""
        return math.hypot(*(part.slope for part in self.parts if isinstance(part, ZerothOrder)))

    def renew(self, parameter: torch.nn.Parameter, *anew: Any) -> None:
        """See :meth:`Ruled.renew`; torch's own optimizers have nothing to be told."""
        owner = self._owners[id(parameter)]
        if hasattr(owner, "renew"):
            owner.renew(parameter, *anew)

    def step(self, closure: Any = None) -> Any:
        """Let every part move what it has; returns what the closure does, where there is one."""
        if self.zeroth_order:
            losses = [part.step(closure) for part in self.parts]
            return losses[0]
        loss = evaluated(closure)
        for part in self.parts:
            part.step()
        return loss


Build = Callable[[dict[str, torch.nn.Parameter], float], torch.optim.Optimizer]


def build(
    make: Build, parameters: Mapping[str, torch.nn.Parameter], learning_rate: float, options: Mapping[str, Mapping[str, float]]
) -> torch.optim.Optimizer:
    """The optimizer over named parameters of which some have options of their own.

    Args:
        make: builds one from (parameters, learning rate).
        options: parameter name -> values that take the place of the optimizer's, and ``rate``, a factor on the learning
            rate that the loop minds.
    """
    kinds: dict[tuple[tuple[str, float], ...], dict[str, torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        kinds.setdefault(tuple(sorted(options.get(name, {}).items())), {})[name] = parameter
    parts = []
    for kind, chosen in kinds.items():
        parts.append(make(chosen, learning_rate))
        for group in parts[-1].param_groups:
            group.update(kind)
            group["lr"] = learning_rate * group.get("rate", 1.0)
    return parts[0] if len(parts) == 1 else Joined(parts)
