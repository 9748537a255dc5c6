"""Whole deltas as vectors: scaled, added, restricted to some parameters, and put one after the other.

Every function takes deltas and gives a new one, whose updates are made when they are asked for: deltas that are mapped
(``store.load(folder, mapped=True)``) are not read before, and may be larger than memory. Each of their updates is made
once beforehand, over the mapped tensors, so that what cannot be combined is refused at once. (A sum that is combined
again is added up for that, and forgotten.) A factor goes into the gain, factors of low rank are concatenated, dense
updates are added, and anything else stays as it is inside a ``Sum`` or a ``Chain``.

What sets numbers in place of changing them (``Replace``, integers, tensors that the base does not have, removed tensors
and files of ``espalier diff``) can be restricted and, where one delta alone touches it, passed on; nothing else.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from espalier.anatomy.parameters import BLOCK
from espalier.delta.forms import Chain, Dense, LowRank, Replace, Sum, Update, working_dtype
from espalier.delta.forms.composite import Composite
from espalier.delta.forms.update import is_one, matrix_shape
from espalier.delta.store import Delta, Layout, manifest_after
from espalier.errors import EspalierError


class Lazy(Mapping[str, Update]):
    """Updates by parameter name, each made when it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Update]) -> None:
        self.names, self.make = dict.fromkeys(names), make

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names  # that of Mapping makes the update

    def __getitem__(self, name: str) -> Update:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)


def scale(delta: Delta, factor: float) -> Delta:
    """``factor`` times the delta, by its gains.

    Raises:
        EspalierError: for a factor that is not finite, or naming a parameter that is set, not changed.
    """
    return _combined([delta], [factor], "scale", {"factor": factor})


def negate(delta: Delta) -> Delta:
    """The delta with the other sign. Added to the first it is zero; to undo a delta in bf16, use ``espalier revert``.

    Raises:
        EspalierError: naming a parameter that is set, not changed.
    """
    return _combined([delta], [-1.0], "negate", {})


def combine(deltas: Sequence[Delta], coefficients: Sequence[float] | Callable[[str], Sequence[float]]) -> Delta:
    """The linear combination ``sum_i coefficients[i] * deltas[i]``.

    A parameter that a delta does not touch has the update zero in it. Updates that depend on the base cannot be summed.

    Args:
        coefficients: one of each delta, or what gives them for a parameter's name.

    Raises:
        EspalierError: when bases or layouts differ, or naming a parameter whose updates cannot be combined.
    """
    said = {} if callable(coefficients) else {"coefficients": list(coefficients)}
    return _combined(deltas, coefficients, "combine", said)


def add(*deltas: Delta) -> Delta:
    """The sum of deltas: :func:`combine` with coefficients of 1."""
    return _combined(deltas, [1.0] * len(deltas), "add", {})


def chain(deltas: Sequence[Delta]) -> Delta:
    """The deltas one after the other, the first one first; of updates that do not depend on the base, their sum.

    Raises:
        EspalierError: when bases or layouts differ, or a tensor that one sets as a whole is touched by another.
    """

    def parts(name: str, updates: Mapping[int, Update], layout: Layout) -> list[Update]:
        if len(updates) > 1 and layout.dtype:
            raise EspalierError(f"{name}: the tensor is set as a whole ({layout.dtype}) and cannot stand in a chain; apply the deltas one after the other")
        return list(updates.values())

    return _joined(deltas, parts, _chained, "chain", {}, "put in a chain")


def restrict(delta: Delta, *, names: str | Iterable[str] | None = None, layers: Collection[int] | None = None) -> Delta:
    """The updates of some parameters; tensors that the delta removes and files that it brings stay behind.

    Args:
        names: globs over the parameters' names, those of tied parameters too.
        layers: numbers of transformer blocks, such as ``range(8)``. With ``names``, both must fit.

    Raises:
        EspalierError: when neither is given, or a glob or number fits no parameter of the delta.
    """
    if names is None and layers is None:
        raise EspalierError("restrict needs names (globs over parameter names) or layers (numbers of blocks)")
    globs = None if names is None else [names] if isinstance(names, str) else list(names)
    blocks = {n: int(found.group(1)) for n in delta.layouts if (found := BLOCK.search(n))}
    for glob in globs or ():
        if not any(_fits(n, layout, [glob]) for n, layout in delta.layouts.items()):
            raise EspalierError(f"the name {glob!r} fits no parameter of the delta, such as {next(iter(delta.layouts), 'none')}")
    if missing := sorted(set(layers or ()) - set(blocks.values())):
        raise EspalierError(f"the delta updates nothing in layer {missing[0]}; it has the layers {sorted(set(blocks.values()))}")
    layouts = {
        n: layout
        for n, layout in delta.layouts.items()
        if (globs is None or _fits(n, layout, globs)) and (layers is None or blocks.get(n) in layers)
    }
    manifest = manifest_after([delta], "restrict", {"names": globs, "layers": None if layers is None else list(layers)})
    for key in ("removed", "files"):
        manifest.pop(key, None)
    return Delta(Lazy((n for n in delta.updates if n in layouts), delta.updates.__getitem__), layouts, manifest)


def _fits(name: str, layout: Layout, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(spelling, glob) for spelling in (name, *layout.names) for glob in globs)


def require_agreement(deltas: Sequence[Delta]) -> None:
    """Refuse deltas of different bases, or that hold a parameter in different layouts.

    Raises:
        EspalierError: naming both fingerprints, or the parameter and both layouts.
    """
    layouts: dict[str, Layout] = {}
    for delta in deltas:
        if delta.base_fingerprint != deltas[0].base_fingerprint:
            raise EspalierError(
                f"the deltas are of different bases: one has the fingerprint {deltas[0].base_fingerprint}, another {delta.base_fingerprint}"
            )
        for name, layout in delta.layouts.items():
            if layouts.setdefault(name, layout) != layout:
                raise EspalierError(f"{name}: the deltas hold it in different layouts, {layouts[name]} and {layout}")


def require_only_updates(deltas: Sequence[Delta], doing: str) -> None:
    """Refuse deltas that remove tensors or bring files.

    Args:
        doing: what cannot be done with them, such as "scaled or added".

    Raises:
        EspalierError: naming the delta and the tensor or file.
    """
    for delta in deltas:
        for key, what in (("removed", "removes the tensor"), ("files", "brings the file")):
            if found := delta.manifest.get(key):
                raise EspalierError(
                    f"the delta{f' {delta.folder}' if delta.folder else ''} {what} {next(iter(found))!r}, which cannot be {doing}; "
                    "restrict the delta to its parameters first (names='*'), or apply the deltas one after the other"
                )


Parts = Callable[[str, Mapping[int, Update], Layout], list[Update]]
"""From a parameter, its updates by the position of their delta, and its layout, to what they become in a combination."""


def _combined(
    deltas: Sequence[Delta], coefficients: Sequence[float] | Callable[[str], Sequence[float]], method: str, hyperparameters: Mapping[str, Any]
) -> Delta:
    def terms(name: str, updates: Mapping[int, Update], layout: Layout) -> list[Update]:
        factors = coefficients(name) if callable(coefficients) else coefficients
        if callable(coefficients):
            _check_coefficients(deltas, factors)
        for position, update in updates.items():
            if len(updates) > 1:
                _require_change(name, update, layout, "added to another update")
                if update.depends_on_base:
                    raise EspalierError(
                        f"{name}: the form {update.form!r} depends on the base and cannot be added to another update; "
                        "chain the deltas, or make it dense first (espalier convert --to dense --model BASE)"
                    )
            elif factors[position] != 1:
                _require_change(name, update, layout, f"scaled by {factors[position]}")
        return [u if factors[i] == 1 else u.scaled(float(factors[i])) for i, u in updates.items()]

    if not callable(coefficients):
        _check_coefficients(deltas, coefficients)
    return _joined(deltas, terms, _sum, method, hyperparameters, "scaled or added")


def _check_coefficients(deltas: Sequence[Delta], coefficients: Sequence[float]) -> None:
    if len(deltas) != len(coefficients):
        raise EspalierError(f"there are {len(deltas)} deltas and {len(coefficients)} coefficients; each delta needs one")
    if wrong := [c for c in coefficients if not math.isfinite(c)]:
        raise EspalierError(f"a coefficient is {wrong[0]}; it must be a finite number")


def _joined(
    deltas: Sequence[Delta], parts: Parts, join: Callable[[list[Update]], Update], method: str, hyperparameters: Mapping[str, Any], doing: str
) -> Delta:
    """The delta whose update of each parameter is the join of its parts, which are refused now and joined when asked for."""
    if not deltas:
        raise EspalierError("there are no deltas to combine; give one at least")
    require_agreement(deltas)
    require_only_updates(deltas, doing)
    owners: dict[str, list[int]] = {}
    for position, delta in enumerate(deltas):
        for name in delta.updates:
            owners.setdefault(name, []).append(position)
    layouts = {name: deltas[found[0]].layouts[name] for name, found in owners.items()}

    def of(name: str) -> list[Update]:
        updates = {i: deltas[i].updates[name] for i in owners[name]}
        if len(shapes := {tuple(u.shape) for u in updates.values()}) > 1:
            raise EspalierError(f"{name}: the deltas hold updates of different shapes, {' and '.join(map(str, sorted(shapes)))}")
        if len(deltas) > 1:
            updates = {i: _own_factors(u, i) for i, u in updates.items()}
        return parts(name, updates, layouts[name])

    for name in owners:
        of(name)
    return Delta(Lazy(owners, lambda name: join(of(name))), layouts, manifest_after(deltas, method, hyperparameters))


def _own_factors(update: Update, position: int) -> Update:
    """The update with shared factors of another name: two deltas may call different factors the same."""
    if not update.shared:
        return update
    other = copy.copy(update)
    other.shared = {field: f"{position}.{factor}" for field, factor in update.shared.items()}
    return other


def _require_change(name: str, update: Update, layout: Layout, doing: str) -> None:
    """Refuse an update that sets numbers."""
    if layout.dtype or (isinstance(update, Replace) and not update.dtype.is_floating_point):
        raise EspalierError(f"{name}: the tensor is set as a whole ({layout.dtype or update.dtype}) and cannot be {doing}; leave it out (algebra.restrict)")
    if sets_values(update):
        raise EspalierError(
            f"{name}: the form {update.form!r} sets values and cannot be {doing}; make the difference of it first "
            "(espalier convert --to dense or sparse --model BASE)"
        )


def sets_values(update: Update) -> bool:
    """Whether an update, or a part of it, sets numbers in place of changing them."""
    return isinstance(update, Replace) or (isinstance(update, Composite) and any(map(sets_values, update.parts.values())))


def _chained(parts: list[Update]) -> Update:
    if not any(part.depends_on_base for part in parts):
        return _sum(parts)
    flat = [p for part in parts for p in (part.parts.values() if isinstance(part, Chain) and is_one(part.gain) and not part.shared else [part])]
    return flat[0] if len(flat) == 1 else Chain(flat)


def _sum(terms: list[Update]) -> Update:
    """The sum of updates that do not depend on the base, each form by itself."""
    if len(terms) == 1:
        return terms[0]
    flat = [
        p for t in terms for p in ([part.scaled(t.gain) for part in t.parts.values()] if isinstance(t, Sum) and not t.shared else [t])
    ]
    dense = [p for p in flat if isinstance(p, Dense)]
    factors = [p for p in flat if isinstance(p, LowRank)]
    others = [p for p in flat if not isinstance(p, Dense | LowRank)]
    if len(dense) > 1:
        wide = working_dtype(*(p.values for p in dense))
        values = dense[0].values.to(wide) * dense[0].gain
        for part in dense[1:]:
            values += part.values.to(wide) * part.gain
        dense = [Dense(values)]
    if len(factors) > 1:
        factors = _concatenated(factors)
    parts = [*dense, *factors, *others]
    return parts[0] if len(parts) == 1 else Sum(parts)


def _concatenated(parts: list[LowRank]) -> list[LowRank]:
    """``[B_1 B_2 ..] [A_1; A_2; ..]``, where that is smaller than the dense update."""
    *_, outputs, inputs = matrix_shape(parts[0].shape)
    if sum(p.rank for p in parts) * (outputs + inputs) >= outputs * inputs:
        return parts
    A = torch.cat([p.A for p in parts], -2)
    if len({float(p.gain) for p in parts}) == 1:
        return [LowRank(torch.cat([p.B for p in parts], -1), A, parts[0].gain, parts[0].shape)]
    wide = working_dtype(*(p.B for p in parts))
    return [LowRank(torch.cat([p.B.to(wide) * p.gain for p in parts], -1), A, 1.0, parts[0].shape)]
