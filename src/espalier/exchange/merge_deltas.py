"""Deltas into one delta, as deltas: neither the base nor anything dense is needed where updates are of low rank.

There are three spaces to do it in. ``updates``: a method that combines updates linearly (it says so by giving a
``Combination``) is done with the forms themselves: factors stand side by side, and are cut to a rank by the decomposition of
their small core. ``factors``: the mean of A and the mean of B, which is another thing. ``svd``: any method on the coefficients
of updates of low rank in a basis that they share (see ``delta/factors.py``).

What cannot be done in this way is merged as models and compared with the base (``merge_plan.write_as_delta``).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from espalier import registry
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.delta import algebra, store
from espalier.delta.compression import Outcome, naming
from espalier.delta.factors import mean, shared_basis
from espalier.delta.fit import distance, low_rank, require_finite
from espalier.delta.forms import LowRank, Sum, Update
from espalier.delta.forms.update import matrix_shape
from espalier.delta.merging import Combination, Parameter
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError, at_least
from espalier.exchange import conversion
from espalier.exchange.merge_recipe import Recipe, block_of, checker, require_fitting, settings
from espalier.exchange.merging import Method
from espalier.memory.meter import available_memory


class _Unread(EspalierError):
    """A method looked at numbers."""


class _Described(Parameter):
    """A parameter that is known by name and shape alone."""

    def stored(self, model: int | None, start: int, stop: int) -> torch.Tensor:
        raise _Unread

    def refuse(self, model: int | None, rows: torch.Tensor) -> NoReturn:
        raise _Unread


class _Held(Parameter):
    """What each update is in a shared basis, (models, rows, columns); the base is zero there."""

    def __init__(self, held: torch.Tensor, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._held = held

    def stored(self, model: int | None, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(1).expand(stop - start, self.columns) if model is None else self._held[model, start:stop]

    def refuse(self, model: int | None, rows: torch.Tensor) -> NoReturn:
        raise EspalierError(f"the update of delta {model} is not finite in the shared basis")


@dataclass
class Merge:
    """A merge of deltas that is ready to be done.

    Args:
        space: where it is done.
        deltas: what is merged.
        layouts: of every parameter that the new delta updates.
        make: from a parameter's name to its update before it is cut to a rank, and what errors are measured against:
            ``None`` where that would need the base.
        rank: to which updates are cut.
        seed: of randomised decompositions.
        manifest: of the new delta.
    """

    space: str
    deltas: list[Delta]
    layouts: dict[str, Layout]
    make: Callable[[str], tuple[Update, Update | None]]
    rank: int | None
    seed: int
    manifest: dict[str, Any]

    def write(self, target: Path, progress: Callable[[int], Any]) -> tuple[list[Outcome], float | None]:
        """Write the delta; gives what became of every parameter, and the relative error of all (``None`` where not known).

        Raises:
            EspalierError: naming the parameter that cannot be merged.
        """
        spool = conversion.Spool(target / "spool")
        made: dict[str, Update] = {}
        outcomes, apart, size, known = [], 0.0, 0.0, True
        for done, name in enumerate(self.layouts):
            with naming(name):
                before, exact = self.make(name)
                after = before if self.rank is None or len(before.shape) < 2 else low_rank(before, self.rank, seed=self.seed, name=name)
                require_finite(after)
                error = None
                if exact is None:
                    known = False
                elif exact is after:
                    error = 0.0
                    size = math.hypot(size, distance(exact, exact)[1]) if self.rank is not None and exact.low_rank() is not None else size
                else:
                    off, norm = distance(after, exact)
                    error, apart, size = off / (norm or 1.0), math.hypot(apart, off), math.hypot(size, norm)
            owned = [delta.updates[name] for delta in self.deltas if name in delta.updates]
            was = "+".join(dict.fromkeys(update.form for update in owned))
            outcomes.append(Outcome(name, was, after.form, sum(u.nbytes for u in owned), after.nbytes, error))
            made[name] = spool(name, after)
            progress(done + 1)
        merged = Delta(made, self.layouts, self.manifest)
        source = self.deltas[0].folder
        assert source is not None
        conversion.write(source, target, merged, f"Merged by `{self.manifest['method']}`.")
        spool.remove()
        return outcomes, apart / (size or 1.0) if known else None


def is_of_deltas(recipe: Recipe) -> bool:
    """Whether all that is merged are deltas."""
    return all(store.is_delta(Path(ingredient.path)) for ingredient in recipe.models)


def plan(recipe: Recipe, method: Method) -> Merge:
    """How a recipe's deltas become one; every parameter's updates are looked at, and none is computed.

    Raises:
        EspalierError: saying why that cannot be done as deltas.
    """
    if recipe.to != "delta":
        raise EspalierError("space and rank are of a merge of deltas into a delta: --to delta")
    if recipe.rank is not None:
        at_least("rank", recipe.rank, 1)
    if not is_of_deltas(recipe):
        raise EspalierError(f"{next(i.path for i in recipe.models if not store.is_delta(Path(i.path)))} is no delta")
    for entry in ("stack", "vocabulary", "dtype", "shard_size"):
        if getattr(recipe, entry) is not None:
            raise EspalierError(f"{entry} is of the merged model")
    space = recipe.space or "updates"
    deltas = [store.load(Path(ingredient.path), mapped=True) for ingredient in recipe.models]
    algebra.require_agreement(deltas)
    algebra.require_only_updates(deltas, "merged")
    names = dict.fromkeys(name for delta in deltas for name in delta.updates)
    layouts = {name: next(delta.layouts[name] for delta in deltas if name in delta.layouts) for name in names}
    if space != "updates" or recipe.rank is not None:
        room = available_memory()
        for delta in deltas:
            for name, update in delta.updates.items():
                if not isinstance(update, LowRank):  # whose factors are there already; of others, few bytes may stand for many
                    conversion.require_room(name, update, room)
    said = _settings(recipe, names, _blocks(recipe, deltas, names))
    info = registry.find(recipe.method, "merger")
    if method.first_pass is not None and space == "svd":
        raise EspalierError(f"{recipe.method} looks at the whole model first, and can only be done with models")

    def coefficients(name: str) -> list[float]:
        weights, scale, options = said(name)
        shape = next(delta.updates[name].shape for delta in deltas if name in delta.updates)
        try:
            made = method.function(_Described(name, tuple(shape), weights, scale, True, recipe.seed), **options)
        except _Unread:
            made = None
        if method.first_pass is not None or not isinstance(made, Combination):
            more = " (in the space svd it merges their coefficients in a shared basis: --space svd)" if space == "updates" else ""
            raise EspalierError(f"{recipe.method} does not combine updates linearly{more}")
        return made.of_updates()

    makers: dict[str, Callable[[], Callable[[str], tuple[Update, Update | None]]]] = {
        "updates": lambda: _of_updates(deltas, coefficients),
        "factors": lambda: _of_factors(deltas, names, coefficients),
        "svd": lambda: _in_shared_basis(deltas, names, method, said, recipe.seed),
    }
    make = makers[space]()
    hyperparameters = {
        **{h.name: h.default for h in info.hyperparameters}, **recipe.options, "weights": [i.weight for i in recipe.models],
        "scale": recipe.scale, "space": space, "rank": recipe.rank, "seed": recipe.seed,
    }  # fmt: skip
    manifest = store.manifest_after(deltas, recipe.method, json.loads(json.dumps(hyperparameters, default=lambda entry: entry.model_dump())))
    for entry in ("tuned", "training"):
        manifest.pop(entry, None)
    return Merge(space, deltas, layouts, make, recipe.rank, recipe.seed, manifest)


def _blocks(recipe: Recipe, deltas: Sequence[Delta], names: Mapping[str, None]) -> int:
    """How many blocks there are, of the base where one is given, which must then be the deltas'.

    Raises:
        EspalierError: for another base, or where a number goes over the depth and no base says how deep it is.
    """
    if recipe.model is not None:
        base = ModelDirectory(resolve_model(recipe.model))
        for delta in deltas if not recipe.any_base else ():
            assert delta.folder is not None
            store.check_base(delta, delta.folder, base.path, base.fingerprint())
        return 1 + max((block for name in base if (block := block_of(name)) is not None), default=0)
    if _goes_over_depth(recipe.model_dump(exclude={"models": {"__all__": {"path"}}})):
        raise EspalierError("a number goes over the depth, which the base says: --model BASE")
    return 1 + max((block for name in names if (block := block_of(name)) is not None), default=0)


def _goes_over_depth(entry: Any) -> bool:
    if isinstance(entry, dict):
        return "depth" in entry or any(map(_goes_over_depth, entry.values()))
    return isinstance(entry, list) and any(map(_goes_over_depth, entry))


def _settings(recipe: Recipe, names: Mapping[str, None], blocks: int) -> Callable[[str], tuple[list[float], float, dict[str, Any]]]:
    """From a parameter's name to its weights, scale and options.

    Raises:
        EspalierError: for an entry of ``parameters`` that fits no parameter.
    """
    info = registry.find(recipe.method, "merger")
    require_fitting(recipe, [(name, 0) for name in names], "parameter of the deltas")
    checked = checker(recipe.method)

    def of(name: str) -> tuple[list[float], float, dict[str, Any]]:
        weights, scale, options = settings(recipe, info, name, 0, [(0, blocks)])
        return weights, scale, checked(options)

    return of


def _of_updates(deltas: list[Delta], coefficients: Callable[[str], list[float]]) -> Callable[[str], tuple[Update, Update | None]]:
    combined = algebra.combine(deltas, functools.cache(coefficients)).updates

    def make(name: str) -> tuple[Update, Update | None]:
        update = combined[name]
        return update, update

    return make


def _of_factors(
    deltas: list[Delta], names: Mapping[str, None], coefficients: Callable[[str], list[float]]
) -> Callable[[str], tuple[Update, Update | None]]:
    def shares(name: str) -> list[float]:
        for delta in deltas:
            if name not in delta.updates:
                raise EspalierError(f"{name}: {delta.folder} does not update it; the mean of factors needs those of every delta")
        found = coefficients(name)
        if abs(sum(found) - 1) > 1e-5:
            raise EspalierError(f"{name}: the mean of factors needs coefficients that sum to 1, these are {found} (such as --method linear has)")
        return found

    def make(name: str) -> tuple[Update, Update | None]:
        updates, found = [delta.updates[name] for delta in deltas], shares(name)
        if any(u.depends_on_base for u in updates):
            return mean(updates, found), None
        return mean(updates, found), Sum([u.scaled(c) for u, c in zip(updates, found, strict=True)])

    for name in names:
        shares(name)
    return make


def _in_shared_basis(
    deltas: list[Delta], names: Mapping[str, None], method: Method, said: Callable[[str], tuple[list[float], float, dict[str, Any]]], seed: int
) -> Callable[[str], tuple[Update, Update | None]]:
    def factors(name: str) -> list[LowRank]:
        updates = [delta.updates.get(name) for delta in deltas]
        shape = next(u.shape for u in updates if u is not None)
        found = []
        for update in updates:
            made = _nothing(shape) if update is None else update.low_rank()
            if made is None or tuple(made.shape) != tuple(shape):
                form = update.form if update is not None else ""
                raise EspalierError(f"{name}: a shared basis is of updates of low rank of one shape; this is {form!r} (espalier convert --to lora)")
            found.append(made)
        return found

    def make(name: str) -> tuple[Update, Update | None]:
        found = factors(name)
        weights, scale, options = said(name)
        U, held = shared_basis(found)
        coefficients = torch.stack(held).float()  # (models, ..., k, in)
        parameter = _Held(coefficients.flatten(1, -2), name, tuple(coefficients.shape[1:]), weights, scale, True, seed)
        made = method.function(parameter, **options)
        if not isinstance(made, torch.Tensor):
            made = torch.cat([made(piece).clone() for piece in parameter.pieces()])
        update = LowRank(U.float(), made.reshape(coefficients.shape[1:]).float(), 1.0, found[0].shape)
        return update, update

    for name in names:
        factors(name)
    return make


def _nothing(shape: Sequence[int]) -> LowRank:
    """The update that changes nothing."""
    *lead, outputs, inputs = matrix_shape(tuple(shape))
    return LowRank(torch.zeros(*lead, outputs, 0), torch.zeros(*lead, 0, inputs), 1.0, tuple(shape))
