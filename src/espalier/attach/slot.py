"""The tensors that a method has for one target, and the shared ones of a method, as modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Method, Tensors
from espalier.delta.forms import Update
from espalier.kernels.sharded import whole


def register(module: nn.Module, tensors: Tensors) -> None:
    """Give a module its tensors: parameters are trained, the rest become buffers."""
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)


def versions(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, int], ...] | None:
    """What changes when any of the tensors does, or ``None`` where that is not tracked."""
    try:
        return tuple((t.data_ptr(), t._version) for t in tensors)
    except RuntimeError:  # tensors made in inference mode have no version
        return None


class Whole:
    """A view of a slot or pool whose sharded tensors are gathered when they are read."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return whole(value) if isinstance(value, torch.Tensor) else value


class Holder(nn.Module):
    """A module of tensors whose buffers keep their dtype."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the model; what is not trained keeps its dtype, for scales and stored values are exact as they are."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Pool(Holder):
    """A method's shared tensors, at the root of the model, and the context of the forward pass under way."""

    def __init__(self, method: Method, targets: Sequence[Any], tensors: Tensors) -> None:
        super().__init__()
        register(self, tensors)
        self.names = tuple(tensors)
        self.method = method
        self.targets = tuple(targets)
        self.context: Mapping[str, Any] | None = None

    def prepare(self) -> None:
        """Read the shared tensors once for the forward pass that begins."""
        self.context = self.method.prepare(self, self.targets)

    def context_of(self, target: Any) -> Any:
        """The context of one target."""
        if self.context is None:
            raise RuntimeError(
                f"{self.method.name} shares tensors that are read at the model's own forward; call the model itself, "
                "not one of its submodules"
            )
        return self.context[target.name]


class Held(Holder):
    """The tensors that a method has for one target, their gain, and the shared ones that they go with."""

    gain: torch.Tensor
    pool: Pool | None

    def __init__(self, tensors: Tensors, gain: float, pool: Pool | None, dropout: float, device: torch.device) -> None:
        super().__init__()
        own = tensors.pop("gain", None)
        register(self, tensors)
        self.names = tuple(tensors)
        self.register_buffer("gain", torch.tensor(gain, device=device) if own is None else own)
        self.dropout = dropout
        self.__dict__["pool"] = pool  # owned by the root: not a child of this module

    def sources(self) -> list[torch.Tensor]:
        """The tensors that the update is made of, shared ones left out."""
        return [*self.parameters(), *self.buffers()]


class Slot(Held):
    """One update on one parameter: its tensors, its gain, and how to make the update of this forward pass.

    In evaluation the update object is cached until one of its tensors changes, so that what a form derives
    from the base (a norm, say) is computed once.
    """

    strength: torch.Tensor | None
    """What the update is multiplied by at run time beside its gain, 0-d; ``None``: nothing, which is exact."""

    def __init__(
        self, method: Adapter, target: Target, tensors: Tensors, pool: Pool | None, dropout: float, weight: torch.Tensor,
        bases: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(tensors, method.gain(target), pool, dropout, weight.device)
        self.base_dtype = weight.dtype
        self.register_buffer("strength", None, persistent=False)
        self.method = method
        self.target = target
        self.bases = bases
        self.held: Update | None = None
        self._cached: tuple[Any, Update] | None = None

    def update(self) -> Update:
        """The update that the tensors make now."""
        if self.held is not None:
            return self.held
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.pool is not None:
            self._cached = None
            return self._scaled()
        key = versions(self.sources())
        if key is None or self._cached is None or self._cached[0] != key:
            self._cached = (key, self._scaled())
        return self._cached[1]

    def _scaled(self) -> Update:
        update = self._make()
        return update if self.strength is None else update.scaled(self.strength)

    def _make(self) -> Update:
        return self.method.update(self, self.pool.context_of(self.target) if self.pool is not None else None)

    def export(self, pool: Any) -> Update:
        """The update in the form in which it is stored, of tensors that are gathered whole."""
        return self.method.export(Whole(self), pool)


class Companion(Slot):
    """The update of a parameter that goes with another one's: made of that one's tensors, which stay where they are."""

    leader: Slot

    def __init__(self, leader: Slot, target: Target, weight: torch.Tensor) -> None:
        super().__init__(leader.method, target, {}, None, 0.0, weight)
        self.__dict__["leader"] = leader  # its tensors have one owner: it is not a child of this module

    def sources(self) -> list[torch.Tensor]:
        return [*self.leader.sources(), *self.buffers()]

    def _make(self) -> Update:
        return self.method.accompany(self.leader, self.target)

    def export(self, pool: Any) -> Update:
        return self.method.accompany(Whole(self.leader), self.target)
