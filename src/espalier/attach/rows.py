"""Different deltas for different rows of a batch, on a live model: each row sees its own, and no other."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from espalier.attach.attachment import activate, active, attachments
from espalier.attach.routes import Adapted, Slots
from espalier.errors import EspalierError


@dataclass
class _Batch:
    """The rows that the module under way works on, and how long each is; shared by all modules of a model."""

    rows: tuple[int, ...]
    length: int | None = None
    _indices: dict[Any, torch.Tensor] = field(default_factory=dict)

    def index(self, positions: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The positions as a tensor, made once: most modules ask for the same."""
        key = (positions, device)
        if key not in self._indices:
            self._indices[key] = torch.tensor(positions, device=device)
        return self._indices[key]


@dataclass
class _Group:
    """Rows that a module treats alike: with these updates, and what is kept of them in evaluation."""

    rows: set[int]
    slots: Slots
    cache: dict[str, Any] = field(default_factory=dict)


class Divided(Adapted):
    """Mixin in front of a module's route: its forward runs once for each group of rows, with that group's updates."""

    _espalier_batch: _Batch
    _espalier_groups: list[_Group]
    _espalier_path: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._espalier_batch
        all_rows = batch.rows
        parts = [(g, p) for g in self._espalier_groups if (p := tuple(i for i, row in enumerate(all_rows) if row in g.rows))]
        if len(parts) == 1:
            return self._with(parts[0][0], all_rows, *args, **kwargs)
        given = [*args, *kwargs.values()]
        if len(given) != 1 or not isinstance(given[0], torch.Tensor):
            raise EspalierError(f"{self._espalier_path} is called with more than one tensor, so its rows cannot be told apart; leave it out of the deltas' targets")
        (x,) = given
        count, first = len(all_rows), x.shape[0] if x.ndim else 0
        if first not in (count, 1, count * (batch.length or 1)):
            raise EspalierError(f"{self._espalier_path} is called with {tuple(x.shape)}, in which the {count} rows of the batch cannot be told apart")
        outputs = []
        for group, positions in parts:
            own = tuple(all_rows[i] for i in positions)
            if first == 1:  # one row that all share, such as positions
                y = self._with(group, own, x)
                outputs.append(tree_map(partial(_spread, count=len(own)), y))
                continue
            some = x.unflatten(0, (count, -1)).index_select(0, batch.index(positions, x.device)).flatten(0, 1)
            y = self._with(group, own, some)
            outputs.append(tree_map(partial(_by_row, count=len(own)), y))
        order = [i for _, positions in parts for i in positions]
        back = batch.index(tuple(sorted(range(count), key=order.__getitem__)), x.device)

        def join(*tensors: torch.Tensor) -> torch.Tensor:
            y = torch.cat(tensors).index_select(0, back)
            return y if first == 1 else y.flatten(0, 1)

        return tree_map(join, *outputs)

    def _with(self, group: _Group, rows: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
        """The module's forward of some rows, with the updates that they have."""
        batch, before = self._espalier_batch, (self._espalier_batch.rows, self._espalier, self._espalier_cache)
        batch.rows, self._espalier, self._espalier_cache = rows, group.slots, group.cache
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            batch.rows, self._espalier, self._espalier_cache = before


def _spread(y: torch.Tensor, count: int) -> torch.Tensor:
    return y.expand(count, *y.shape[1:])


def _by_row(y: torch.Tensor, count: int) -> torch.Tensor:
    return y.unflatten(0, (count, -1))


_made: dict[type, type] = {}


def _divide(module: Any, path: str, chains: Sequence[Collection[str]], name_of: dict[int, str], batch: _Batch) -> bool:
    """Let a module tell its rows apart where they differ; whether they do.

    Raises:
        EspalierError: when it cannot.
    """
    groups: dict[tuple[int, ...], _Group] = {}
    for row, chain in enumerate(chains):
        kept = {local: own for local, slots in module._espalier.items() if (own := [s for s in slots if name_of[id(s)] in chain])}
        key = tuple(id(slot) for own in kept.values() for slot in own)
        groups.setdefault(key, _Group(set(), kept)).rows.add(row)
    if len(groups) < 2:
        return False
    if "experts" in module._espalier_routes.values():
        raise EspalierError(f"{path} holds fused experts, whose tokens are not in rows: their deltas cannot differ between the rows of a batch")
    inputs = list(inspect.signature(module._espalier_class.forward).parameters)[1:]
    if len(inputs) != 1:
        raise EspalierError(
            f"{path} ({module._espalier_class.__name__}) takes {', '.join(inputs)}, so its rows cannot be told apart: "
            f"deltas that have {next(iter(module._espalier))} of it cannot differ between the rows of a batch"
        )
    made = type(module)
    if made not in _made:
        _made[made] = type(f"Divided{made.__name__}", (Divided, made), {})
    module.__dict__.update(_espalier_batch=batch, _espalier_groups=list(groups.values()), _espalier_path=path)
    module.__class__ = _made[made]
    return True


def _reunite(module: Any) -> None:
    module.__class__ = module.__dict__["_espalier_made"]
    for key in ("_espalier_batch", "_espalier_groups", "_espalier_path"):
        del module.__dict__[key]


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | Collection[str] | None]) -> Iterator[nn.Module]:
    """Within, row i of every batch sees the delta ``names[i]`` alone: ``with rows(model, ["a", "b", None]): model(...)``.

    Which deltas act without it does not matter, and is as before after it. Each module runs once for each group of rows with
    the same updates, on these rows alone, so that it costs as many products as without. Where activations are recomputed in
    the backward pass, that belongs within too.

    Args:
        model: carries the deltas.
        names: for each row a delta's name; several names, whose deltas make a chain in the order in which they were attached;
            or ``None``, for the base. Batches are (rows, length), padded, not packed.

    Raises:
        EspalierError: when the model carries no delta of a name, or the rows differ in a branch, in an update of
            fused experts, or in one of a module that takes more than one input; within, when a batch has another number of rows.
    """
    if "_espalier_rows" in model.__dict__:
        raise EspalierError("the rows of this model have their deltas already; leave that `with` first")
    if not names or isinstance(names, str):
        raise EspalierError(f"rows are {names!r}; give a list with a name, names or None for each row of the batch")
    chains = [() if one is None else (one,) if isinstance(one, str) else tuple(one) for one in names]
    for one in attachments(model).values():
        if one.branches and len({one.name in chain for chain in chains}) > 1:
            raise EspalierError(f"the delta {one.name!r} holds branches ({one.method.name}), which act on all rows of a batch or on none")
    batch, divided, before = _Batch(tuple(range(len(chains)))), [], active(model)
    activate(model, {name for chain in chains for name in chain})
    name_of = {id(slot): a.name for a in attachments(model).values() for slot in a.slots.values()}

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tensors = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        ids = next(t for t in tensors if isinstance(t, torch.Tensor))
        if ids.ndim < 2 or ids.shape[0] != len(chains):
            raise EspalierError(f"there are deltas for {len(chains)} rows, and the batch is {tuple(ids.shape)}; give one row for each (padded, not packed)")
        batch.length = ids.shape[1]

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    model.__dict__["_espalier_rows"] = batch
    try:
        for path, module in model.named_modules():
            if "_espalier" in module.__dict__ and _divide(module, path, chains, name_of, batch):
                divided.append(module)
        yield model
    finally:
        for module in divided:
            _reunite(module)
        hook.remove()
        del model.__dict__["_espalier_rows"]
        activate(model, before)
