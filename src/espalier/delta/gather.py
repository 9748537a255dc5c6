"""Updates in the layout of what they are put on: those of single experts become one of the parameter that fuses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from espalier.anatomy.layout import Place, place
from espalier.anatomy.target import Target
from espalier.delta.forms import Blocks, Update
from espalier.errors import EspalierError


def gathered(updates: Mapping[str, Update], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Update]:
    """The same updates, those of single experts' matrices under the names of the fused parameters that hold these.

    Args:
        shapes: name to logical shape of the parameters that the updates are for. An update that is of none of them, or
            of one as a whole, keeps its name.

    Returns:
        Updates that are made when they are asked for.

    Raises:
        EspalierError: when one update is of a fused parameter and another of an expert of it.
    """
    fused: dict[str, dict[str, Place]] = {}
    for name in updates:
        if name not in shapes and (found := place(name, shapes)) is not None and found.expert is not None:
            fused.setdefault(found.name, {})[name] = found
    for name, blocks in fused.items():
        if name in updates:
            raise EspalierError(f"the delta updates {name!r} and {next(iter(blocks))!r}, which is a part of it")
    return _Gathered(updates, fused, shapes) if fused else updates


def by_parameter(updates: Mapping[str, Update], targets: Iterable[Target]) -> dict[str, Update]:
    """Updates by the canonical names of a live model's parameters, whatever layout of its files their names are of.

    Raises:
        EspalierError: when the model has no such parameter, or one of another shape, or two updates of one differ.
    """
    by_name = {alias: target for target in targets for alias in target.names}
    found: dict[str, Update] = {}
    called: dict[str, str] = {}
    for name, update in gathered(updates, {alias: target.shape for alias, target in by_name.items()}).items():
        at = place(name, by_name)
        if at is None or at.expert is not None:
            raise EspalierError(f"the delta updates {name!r}, which the model does not have")
        target = by_name[at.name]
        if tuple(update.shape) != target.shape:
            raise EspalierError(f"the delta's update of {name!r} is for shape {update.shape}; the model's is {target.shape}")
        if target.name in found and not found[target.name].equals(update):  # files may hold a tied parameter under each of its names
            raise EspalierError(f"the delta updates {called[target.name]!r} and {name!r} differently; the model ties them")
        found[target.name], called[target.name] = update, name
    return found


class _Gathered(Mapping[str, Update]):
    def __init__(self, updates: Mapping[str, Update], fused: Mapping[str, Mapping[str, Place]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.updates, self.fused, self.shapes = updates, fused, shapes
        gone = {name for blocks in fused.values() for name in blocks}
        self.names = [name for name in updates if name not in gone] + list(fused)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Update:
        return self.updates[name] if name not in self.fused else _one(self.updates, name, self.fused[name], self.shapes[name])


def _one(updates: Mapping[str, Update], fused: str, blocks: Mapping[str, Place], shape: tuple[int, ...]) -> Update:
    """One update of a fused parameter of a logical shape (experts, out, in)."""
    if len(shape) != 3:
        raise EspalierError(f"the delta updates {next(iter(blocks))!r}, an expert of {fused!r}, whose shape is {shape}, of no experts")
    experts, outputs, inputs = shape
    parts: dict[tuple[int, int], Update] = {}
    for name, at in blocks.items():
        assert at.expert is not None
        rows = outputs // at.parts
        update = updates[name]
        if at.expert >= experts or outputs % at.parts or tuple(update.shape) != (rows, inputs):
            raise EspalierError(f"the delta's update of {name!r} is for shape {tuple(update.shape)}; {fused!r} has {experts} experts of {(rows, inputs)}")
        start = at.expert * outputs + at.part * rows
        if (start, start + rows) in parts:
            raise EspalierError(f"the delta updates {name!r} twice, under names of two layouts")
        parts[start, start + rows] = update
    return Blocks([parts[rows] for rows in sorted(parts)], sorted(parts), shape)
