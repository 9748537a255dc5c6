"""How a forward pass reaches an update: three routes and the experts', as classes that modules change into.

A module that carries updates becomes an instance of a subclass of its own class, made here, so that its
identity, its name, its parameters and ``isinstance`` stay what they were, and going back is assigning the
old class. Which route a parameter takes depends on its module alone; no method is named here.

- ``linear`` (Linear, Conv1D) and ``lookup`` (Embedding): the module's forward asks the update for its product.
- ``weight``: inside the module's forward, reading the parameter gives the updated one, rebuilt under autograd
  at each read (kept, in evaluation, until something changes); outside, the stored one. It always works.
- ``experts``: fused 3-D experts; ``linear`` on each expert's slice. Under a compiler, whose graphs cannot
  branch on how many tokens each expert got, the weight route.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from espalier.attach.coded import CodedBase, CodedWeight
from espalier.attach.slot import Slot, versions
from espalier.delta.base import BaseWeight, DenseBase, UpdatedBase, product

Slots = dict[str, list[Slot]]
"""Local parameter name -> the updates on it, innermost first."""


def coded_weights(module: nn.Module) -> dict[str, CodedWeight]:
    """Local parameter name -> the codes that it is kept as, of a module."""
    bases = module._modules.get("espalier_base")
    return {} if bases is None else bases._modules  # type: ignore[return-value]


def stored_parameter(module: nn.Module, local: str) -> torch.Tensor | None:
    """A module's own parameter, whether or not reading it gives an updated one; decoded where it is kept as codes."""
    coded = coded_weights(module).get(local)
    return module._parameters.get(local) if coded is None else coded.stored()


def put_parameter(module: nn.Module, local: str, parameter: nn.Parameter) -> None:
    """Give a module another parameter in the place of the one that it has, or of the codes of that."""
    if local in coded_weights(module):
        bases: nn.ModuleDict = module._modules["espalier_base"]  # type: ignore[assignment]
        del bases[local], module.__dict__[local]
        if not len(bases):
            del module._modules["espalier_base"]
        rebuild(module)
    module._parameters[local] = parameter


class Adapted:
    """Mixin of every module that carries updates; ``_espalier`` holds them."""

    _espalier: Slots
    _espalier_routes: dict[str, str]
    _espalier_class: type[nn.Module]
    _espalier_cache: dict[str, tuple[Any, torch.Tensor]]

    def _read(self, local: str) -> torch.Tensor | None:
        """The parameter, updated where it has updates."""
        return self._updated(local) if local in self._espalier else self._stored(local)

    def _stored(self, local: str) -> torch.Tensor | None:
        return stored_parameter(self, local)  # type: ignore[arg-type]

    def _updated(self, local: str) -> torch.Tensor:
        """The parameter with its updates applied, as stored."""
        weight = self._stored(local)
        slots = self._espalier[local]
        assert weight is not None
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            self._espalier_cache.pop(local, None)
            return self._under(weight, slots)
        key = versions([weight, *(t for s in slots for t in s.sources())])
        pools = versions([t for s in slots if s.pool is not None for t in (*s.pool.parameters(), *s.pool.buffers())])
        cached = self._espalier_cache.get(local)
        if key is None or pools is None or cached is None or cached[0] != (key, pools):
            cached = ((key, pools), self._under(weight, slots))
            self._espalier_cache[local] = cached
        return cached[1]

    @contextlib.contextmanager
    def espalier_held(self) -> Iterator[list[torch.Tensor]]:
        """Make this module's updates once for several forward passes of it; gives the tensors that they are made of."""
        slots = [slot for slots in self._espalier.values() for slot in slots]
        for slot in slots:
            slot.held = slot.update()
        try:
            tensors = [tensor for slot in slots for tensor in slot.update().tensors().values()]
            yield list({id(tensor): tensor for tensor in tensors}.values())  # a weight's and its bias's may be the same
        finally:
            for slot in slots:
                slot.held = None

    @staticmethod
    def _under(weight: torch.Tensor, slots: list[Slot]) -> torch.Tensor:
        transposed = slots[0].target.transposed
        logical = weight.transpose(-1, -2) if transposed else weight
        for slot in slots:
            logical = slot.update().apply(logical)
        return logical.transpose(-1, -2) if transposed else logical

    def _base(self, local: str, bias: torch.Tensor | None, transposed: bool) -> BaseWeight:
        """The stored weight with every update but the last on it."""
        coded = coded_weights(self).get(local)  # type: ignore[arg-type]
        if coded is not None:
            base: BaseWeight = CodedBase(coded, bias)
        else:
            weight = self._stored(local)
            assert weight is not None
            base = DenseBase(weight, bias, transposed)
        for slot in self._espalier.get(local, ())[:-1]:
            base = UpdatedBase(base, slot.update())
        return base


def _product(x: torch.Tensor, base: BaseWeight, slot: Slot, training: bool) -> torch.Tensor:
    update = slot.update()
    if slot.dropout and training:
        return update.matmul(functional.dropout(x, slot.dropout), base.linear(x))
    return product(x, base, update)


class LinearRoute(Adapted, nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = self._read("bias")
        if "weight" not in self._espalier:
            return self._base("weight", bias, False).linear(input)
        return _product(input, self._base("weight", bias, False), self._espalier["weight"][-1], self.training)


class Conv1DRoute(Adapted, Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self._read("bias")
        if "weight" not in self._espalier:
            return self._base("weight", bias, True).linear(x)
        return _product(x, self._base("weight", bias, True), self._espalier["weight"][-1], self.training)


class LookupRoute(Adapted, nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        base = self._base("weight", None, False)
        return self._espalier["weight"][-1].update().lookup(input, base) if "weight" in self._espalier else base.rows(input)


class WeightRoute(Adapted):
    """The module's own forward, in which reading a parameter gives the updated one."""

    _espalier_inside = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._espalier_inside = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._espalier_inside = False


class ExpertsRoute(WeightRoute):
    """The module's own attributes say how it gates, whether it has biases and how it stores its matrices."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, top_k_index, top_k_weights)
        tokens, chosen = top_k_index.shape
        flat = top_k_index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()  # type: ignore[attr-defined]
        x = hidden_states[order // chosen]  # (tokens * chosen, hidden), sorted by expert
        up = "gate_up_proj" if self.has_gate else "up_proj"  # type: ignore[attr-defined]
        first, second = self._experts(up), self._experts("down_proj")
        outputs = []
        for expert, part in enumerate(x.split(counts)):
            if not len(part):
                continue
            inner = first(expert, part)
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)  # type: ignore[attr-defined]
            outputs.append(second(expert, inner))
        y = torch.cat(outputs)
        if self.has_post_expert_norm:  # type: ignore[attr-defined]
            y = self.post_expert_norm(y)  # type: ignore[attr-defined]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        y = y[back].view(tokens, chosen, -1) * top_k_weights.unsqueeze(-1)
        return y.sum(dim=1).to(hidden_states.dtype)

    def _experts(self, local: str) -> Any:
        slots = self._espalier.get(local, [])
        coded = coded_weights(self).get(local)  # type: ignore[arg-type]
        weight = self._stored(local) if coded is None else None
        transposed = self.is_transposed  # type: ignore[attr-defined]
        biases = self._read(f"{local}_bias")
        updates = [slot.update().unbind() for slot in slots]

        def apply(expert: int, x: torch.Tensor) -> torch.Tensor:
            bias = None if biases is None else biases[expert]
            base: BaseWeight
            if coded is not None:
                base = CodedBase(coded, bias, expert)
            else:
                assert weight is not None
                base = DenseBase(weight[expert], bias, transposed)
            for update in updates:
                base = UpdatedBase(base, update[expert])
            if slots and slots[-1].dropout and self.training and isinstance(base, UpdatedBase):  # type: ignore[attr-defined]
                dropped = functional.dropout(x, slots[-1].dropout)
                return base.update.matmul(dropped, base.base.linear(x))
            return base.linear(x)

        return apply


_made: dict[Any, Any] = {}


def adapted_class(cls: Any, route: Any, read: frozenset[str]) -> Any:
    """The subclass of ``cls`` with a route's forward, in which reading the parameters ``read`` gives updated ones."""
    if (cls, route, read) in _made:
        return _made[cls, route, read]

    def reader(local: str) -> property:
        return property(lambda self: self._read(local) if self._espalier_inside else self._stored(local))

    # a route stands behind a class that only scales what super().forward gives, and in front of any other
    scales = issubclass(route, nn.Embedding) and cls is not nn.Embedding
    bases = (cls, route) if scales else (route,) if issubclass(route, cls) else (route, cls)
    readers = {local: reader(local) for local in sorted(read)} if issubclass(route, WeightRoute) else {}
    made = type(f"Adapted{cls.__name__}", bases, readers)
    return _made.setdefault((cls, route, read), made)


def _route_class(original: type[nn.Module], routes: set[str]) -> type[Adapted]:
    if original.forward is Conv1D.forward:
        return Conv1DRoute
    if original.forward is nn.Linear.forward:
        return LinearRoute
    if "lookup" in routes:
        return LookupRoute
    return ExpertsRoute if "experts" in routes else WeightRoute


def rebuild(module: nn.Module) -> None:
    """Give a module the class that fits the updates it carries; without any, the class it had."""
    state = module.__dict__
    original: type[nn.Module] = state.get("_espalier_class", type(module))
    slots: Slots = state.get("_espalier", {})
    slots = {local: updates for local, updates in slots.items() if updates}
    if type(module) not in (original, state.get("_espalier_made", original)):
        raise RuntimeError(f"{type(module).__name__} was made from an adapted module; detach before sharding or wrapping")
    coded = coded_weights(module)
    if not slots and not coded:
        for key in [key for key in state if key.startswith("_espalier")]:
            del state[key]
        module.__class__ = original
        return
    routes: dict[str, str] = {local: state["_espalier_routes"][local] for local in slots}
    ways = {*routes.values(), *(["experts"] if coded else [])}  # or linear, as the class of the module says
    made = adapted_class(original, _route_class(original, ways), frozenset({*routes, *coded}))
    state.update(_espalier=slots, _espalier_class=original, _espalier_made=made)
    state.setdefault("_espalier_cache", {})
    module.__class__ = made
