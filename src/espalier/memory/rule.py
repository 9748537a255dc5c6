"""The contract of optimizers (``optim/``): a rule, and what becomes of gradients before and after it.

A rule is a function from float32 gradients and state to directions, over lists of tensors; it knows nothing of how
state is stored, of sharding, of decay or of the learning rate. What is below does the rest::

    w <- w - lr (direction + decay w)

so a new optimizer is the few lines of its rule (``optim/lion.py``), and one with a low-dimensional state is a way to
split the gradient (``memory/subspace.py``).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from espalier import registry
from espalier.errors import EspalierError, at_least, one_of
from espalier.kernels.philox import Stream
from espalier.kernels.sharded import like, local
from espalier.memory import stored_state
from espalier.memory.stored_state import Precision

BUCKET = 1 << 22
"""Numbers that are worked on at once, in slices of large tensors and many small ones together; what is decoded for them is in memory for a moment."""

Tensors = list[torch.Tensor]
Shape = tuple[int, ...]
Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of slices (n,) of a parameter and of its gradient, in float32: what takes the gradient's place."""


class Rule(abc.ABC):
    """An optimizer method. Subclasses are declared with ``@optimizer`` and give :attr:`slots` and :meth:`directions`."""

    name: ClassVar[str]
    zeroth_order: ClassVar[bool] = False
    """Whether it needs losses and no gradients: ``step`` is then given a closure that evaluates the loss, several times."""
    slots: ClassVar[Mapping[str, bool]] = {}
    """State tensors that are like the gradient: name to whether they have negative numbers."""
    state: Precision = "fp32"
    """how the slots are stored; set where the optimizer is made"""
    seed: int = 0
    """what is drawn depends on it, and on nothing else of the run; set where the optimizer is made"""
    weight_decay: float = 0.0
    scales_as: ClassVar[Literal["adam", "sgd"] | None] = "adam"
    """Whose rates its own follow as a model gets wider: Adam's, whose steps do not know how long gradients are, SGD's, or neither's."""
    working: ClassVar[int] = 8
    """bytes a number, about, that :meth:`directions` holds beside gradients and slots"""

    def check(self) -> None:
        """Refuse hyperparameters that make no sense.

        Raises:
            EspalierError: naming the hyperparameter.
        """
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name, 0.0) < 1:
                raise EspalierError(f"{name} is {getattr(self, name)}; it must be at least 0 and less than 1")
        one_of("state", self.state, ("fp32", "bf16", "8bit"))
        at_least("epsilon", getattr(self, "epsilon", 0.0), 0)
        at_least("weight_decay", self.weight_decay, 0)

    @abc.abstractmethod
    def directions(self, gradients: Tensors, state: Mapping[str, Tensors], steps: Sequence[Any]) -> Tensors:
        """The directions to go against, for a rate of 1; slots are changed in place, gradients may be.

        Args:
            gradients: float32.
            state: of each slot, float32, a tensor for each gradient, zero at first.
            steps: how many steps each has taken with its slots, this one included; a tensor like the gradient where each of
                its numbers has an age of its own.
        """

    def seeds(self, gradients: torch.Tensor, squares: torch.Tensor, steps: int) -> Mapping[str, torch.Tensor]:
        """The slots of numbers whose gradients and squares of gradients had these means over so many steps. Default: zeros."""
        return {}

    def standing_on(self, name: str) -> Rule:
        """The rule of another optimizer, with hyperparameters of this one; its slots become those of this one.

        Raises:
            EspalierError: where it has none that works on any numbers.
        """
        stands_itself = any(h.name == "rule" for h in registry.find(name, "optimizer").hyperparameters)
        inner = None if stands_itself else registry.make_below(self, name, "optimizer")
        if not isinstance(inner, Rule):
            raise EspalierError(f"rule is {name}; it must be an optimizer that treats all numbers alike: adamw, adabelief or lion")
        self.slots = inner.slots  # type: ignore[misc]
        return inner

    def turned(self, parameter: torch.Tensor, gradient: torch.Tensor) -> Turn | None:
        """What takes the place of a gradient before anything else sees it, slice by slice. Default: ``None``, itself.

        Args:
            parameter, gradient: whole, and perhaps sharded; what is computed over all of them is computed here.
        """
        return None

    def build(self, parameters: Mapping[str, torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer over named parameters; decay acts on those of two or more dimensions."""
        return Ruled(self, self._groups(parameters), learning_rate)

    def _groups(self, parameters: Mapping[str, torch.nn.Parameter]) -> list[tuple[dict[str, torch.nn.Parameter], float]]:
        decayed = {name: p for name, p in parameters.items() if p.ndim >= 2}
        others = {name: p for name, p in parameters.items() if p.ndim < 2}
        return [(some, decay) for some, decay in ((decayed, self.weight_decay), (others, 0.0)) if some]

    def state_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes of state for parameters of these names and shapes."""
        return len(self.slots) * sum(stored_state.bytes_of(math.prod(shape), self.state) for shape in shapes.values())

    def step_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes that a step holds for a moment beside gradients and state, for parameters of these names and shapes."""
        return self._held_bytes(shapes, BUCKET)

    def _held_bytes(self, shapes: Mapping[str, Shape], at_once: int) -> int:
        """Bytes of decoded state and of what is worked with, of so many numbers at once."""
        decoded = 4 * len(self.slots) if self.state != "fp32" else 0
        return min(at_once, sum(map(math.prod, shapes.values()))) * (decoded + self.working)

    def check_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Refuse to be asked for what would make no difference to parameters of these names and shapes.

        Raises:
            EspalierError: saying what would.
        """
        largest = max((math.prod(shape) for shape in shapes.values()), default=0)
        if self.state != "fp32" and largest < stored_state.SMALL:
            raise EspalierError(
                f"--state {self.state} is for tensors of {stored_state.SMALL:,} numbers or more; the largest that trains has {largest:,}: "
                "take --state fp32, or a method or rank that trains more"
            )


@dataclass
class Part:
    """Numbers of one parameter, or of what has state in its place, that are worked on at once.

    Args:
        name: of the parameter.
        state: of the parameter.
        size: how many numbers the slots have in all, before they are sharded.
        here: how many of them this process has.
        begin: the first of these numbers.
        gradient: (n,), float32.
        prefix: of the slots' names, and that of their ``step``, in the state.
    """

    name: str
    state: dict[str, torch.Tensor]
    size: int
    here: int
    begin: int
    gradient: torch.Tensor
    prefix: str = ""

    @property
    def step(self) -> int:
        """How many steps the slots have taken, this one included."""
        return int(self.state[f"{self.prefix}step"])

    @property
    def age(self) -> int | torch.Tensor:
        """The same, or how many each number has taken, (n,), where some are younger than the parameter."""
        ages = None if self.prefix else self.state.get("age")
        return self.step if ages is None else ages[self.begin : self.begin + len(self.gradient)]


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """The loss that a closure given to ``step`` evaluates anew, with its gradients; ``None`` where there is no closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def keep_dtypes(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give tensors of state that torch has loaded, and made of the dtype of their parameter, the dtype and numbers that were saved."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and key != "step":
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def age_anew(state: dict[str, torch.Tensor], mask: torch.Tensor, steps: int) -> None:
    """Give some numbers of a parameter an age in steps, and the others, where they have none of their own, the parameter's."""
    ages = state.setdefault("age", torch.full(mask.shape, float(state["step"]), device=mask.device))
    ages[mask] = float(steps)


def corrections(decay: float, steps: Sequence[Any], root: bool = False) -> list[Any]:
    """``1 - decay^t``, by which a moving average that began at zero is too small, for each of some tensors (see :meth:`Rule.directions`).

    Args:
        root: give its square root.
    """
    found = [1 - decay**step for step in steps]
    if not any(isinstance(c, torch.Tensor) for c in found):
        return [math.sqrt(c) for c in found] if root else found
    return [torch.as_tensor(c).sqrt() if root else torch.as_tensor(c) for c in found]


class Ruled(torch.optim.Optimizer):
    """A rule as an optimizer of torch. State of each parameter: ``step``, and its slots as they are stored, flat.

    Args:
        groups: (parameters by name, decay) of each.
    """

    def __init__(self, rule: Rule, groups: Sequence[tuple[Mapping[str, torch.nn.Parameter], float]], learning_rate: float) -> None:
        self.rule = rule
        self.names = {id(p): name for some, _ in groups for name, p in some.items()}
        if odd := next((name for some, _ in groups for name, p in some.items() if not local(p).is_contiguous()), None):
            raise EspalierError(f"the parameter {odd} is not contiguous, and its numbers are moved in slices of a line; make it so: p.data = p.data.contiguous()")
        super().__init__([{"params": list(some.values()), "weight_decay": decay} for some, decay in groups], {"lr": learning_rate})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps the dtype that it has: torch would give it that of the parameter."""
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; returns what the closure does, where there is one."""
        loss = evaluated(closure)
        self._move_all()
        return loss

    def _move_all(self) -> None:
        for group in self.param_groups:
            held: list[tuple[torch.Tensor, Part]] = []
            size = 0
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                for pair in self._parts(parameter):
                    if held and size + pair[0].numel() > BUCKET:
                        self._move(held, group)
                        held, size = [], 0
                    held.append(pair)
                    size += pair[0].numel()
            if held:
                self._move(held, group)

    def hold(self, parameter: torch.nn.Parameter) -> bool:
        """Add the gradient to a sum that the next step takes in, where the optimizer has a smaller form of it that adds up.

        Returns:
            Whether that was done; else the gradient is needed whole.
        """
        return False

    def _parts(self, parameter: torch.nn.Parameter) -> Iterator[tuple[torch.Tensor, Part]]:
        """Slices of a parameter, (n,) views of it, and what they are moved by."""
        assert parameter.grad is not None
        state, weight, gradient = self._begun(parameter), local(parameter).view(-1), local(parameter.grad).reshape(-1)
        turn = self.rule.turned(parameter, parameter.grad)
        for begin in range(0, len(weight), BUCKET):
            own, some = weight[begin : begin + BUCKET], gradient[begin : begin + BUCKET].float()
            if turn is not None:
                some = turn(own.float(), some)
            yield own, Part(self.names[id(parameter)], state, parameter.numel(), len(weight), begin, some)

    def _begun(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        state["step"] = state.get("step", torch.zeros(())) + 1
        if "age" in state:
            state["age"] += 1
        return state

    @torch.no_grad()
    def renew(
        self, parameter: torch.nn.Parameter, places: torch.Tensor, gradients: torch.Tensor | None, squares: torch.Tensor | None, steps: int
    ) -> None:
        """Let other numbers stand at some places of a parameter: their state begins anew, and their age.

        Args:
            places: which, a mask of the parameter's shape.
            gradients, squares, steps: as :meth:`Rule.seeds` takes them, of the parameter's shape; ``None``: nothing is known.
        """
        state, mask = self.state[parameter], local(like(parameter, places)).reshape(-1)
        seeds = self.rule.seeds(gradients, squares, steps) if gradients is not None and squares is not None else {}
        for slot, signed in self.rule.slots.items():
            if slot in state:
                part = Part(self.names[id(parameter)], state, parameter.numel(), len(mask), 0, mask.float())
                numbers = self._load(part, slot, signed)
                numbers[mask] = local(like(parameter, seeds[slot])).reshape(-1)[mask] if slot in seeds else 0.0
                self._store(part, slot, signed, numbers)
        age_anew(state, mask, steps if seeds else 0)

    def _move(self, pairs: list[tuple[torch.Tensor, Part]], group: Mapping[str, Any]) -> None:
        weights, parts = [weight for weight, _ in pairs], [part for _, part in pairs]
        directions = self._directions(parts)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, directions, alpha=-group["lr"])

    def _directions(self, parts: list[Part]) -> Tensors:
        """The rule's directions, and its state after them."""
        slots = {slot: [self._load(part, slot, signed) for part in parts] for slot, signed in self.rule.slots.items()}
        directions = self.rule.directions([part.gradient for part in parts], slots, [part.age for part in parts])
        for slot, signed in self.rule.slots.items():
            for part, numbers in zip(parts, slots[slot], strict=True):
                self._store(part, slot, signed, numbers)
        return directions

    def _load(self, part: Part, slot: str, signed: bool) -> torch.Tensor:
        precision = stored_state.precision_of(part.size, self.rule.state)
        if part.prefix + slot not in part.state:
            made = stored_state.zeros(part.here, precision, part.gradient.device)
            part.state.update({part.prefix + slot + suffix: tensor for suffix, tensor in made.items()})
        return stored_state.decode(*self._places(part, slot), signed)

    def _store(self, part: Part, slot: str, signed: bool, numbers: torch.Tensor) -> None:
        precision = stored_state.precision_of(part.size, self.rule.state)
        if precision == "fp32":  # the rule has worked on the state itself
            return
        stream = Stream(self.rule.seed, f"state {part.prefix}{slot} of {part.name}").at((part.step - 1) * part.here + part.begin)
        for place, made in zip(self._places(part, slot), stored_state.encode(numbers, precision, signed, stream), strict=True):
            if place is not None and made is not None:
                place.copy_(made)

    @staticmethod
    def _places(part: Part, slot: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where a part's numbers are stored, and their scales where they have any."""
        end, scale = part.begin + len(part.gradient), part.state.get(f"{part.prefix}{slot}_scale")
        where = scale[part.begin // stored_state.BLOCK : -(-end // stored_state.BLOCK)] if scale is not None else None
        return part.state[part.prefix + slot][part.begin : end], where
