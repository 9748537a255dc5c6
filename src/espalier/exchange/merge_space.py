"""Recipes of merges that leave numbers open: ``{search: [low, high]}`` in the place of any number or choice.

Two short forms save writing: ``{each: X}`` is a list of one X for each model, and ``layers: {every: 4}`` in an entry of
``parameters`` is one such entry for every four blocks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from espalier.delta.searching import Gene
from espalier.errors import EspalierError

_LARGEST = 1_000_000
"""Entries of a recipe that is written out; recipes may come from others."""
_GROUPS = 10_000
"""Groups of blocks that an entry of ``parameters`` may stand for."""


class _Range(BaseModel):
    model_config = ConfigDict(extra="forbid")

    range: tuple[float, float]
    log: bool = False
    integer: bool = False


class _Choices(BaseModel):
    model_config = ConfigDict(extra="forbid")

    choices: list[Any] = Field(min_length=1)


class _Every(BaseModel):
    model_config = ConfigDict(extra="forbid")

    every: int = Field(ge=1)


def _gene(name: str, said: Any) -> Gene:
    said = {"range": said} if isinstance(said, list) else said
    try:
        if isinstance(said, dict) and "choices" in said:
            return Gene(name, choices=tuple(_Choices.model_validate(said).choices))
        found = _Range.model_validate(said)
    except ValidationError as error:
        right = "{search: [low, high]}, {search: {range: [low, high], log: true, integer: true}} or {search: {choices: [...]}}"
        raise EspalierError(f"{name}: search is {str(said)[:80]}; it must be one of: {right}") from error
    low, high = found.range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise EspalierError(f"{name}: search is from {low} to {high}; it must go from a lower number to a higher")
    if found.log and low <= 0:
        raise EspalierError(f"{name}: search is from {low} with log; it must be above 0")
    if found.integer and not (low.is_integer() and high.is_integer()):
        raise EspalierError(f"{name}: search is from {low} to {high} with integer; both must be whole numbers")
    return Gene(name, low, high, found.log, found.integer)


def _each(node: Any, models: int, left: list[int], depth: int = 0) -> Any:
    """A copy with every ``{each: X}`` written out; ``left`` is how many entries it may still have."""
    left[0] -= 1
    if depth > 32 or left[0] < 0:
        raise EspalierError(f"the recipe has more than {_LARGEST:,} entries, or lists within lists 32 deep; that is no recipe")
    if isinstance(node, dict) and set(node) == {"each"}:
        return [_each(node["each"], models, left, depth + 1) for _ in range(models)]
    if isinstance(node, dict):
        return {key: _each(value, models, left, depth + 1) for key, value in node.items()}
    return [_each(item, models, left, depth + 1) for item in node] if isinstance(node, list) else node


def _every(overrides: Sequence[Any], blocks: int) -> Iterator[Any]:
    for number, override in enumerate(overrides):
        if not (isinstance(override, dict) and isinstance(override.get("layers"), dict)):
            yield override
            continue
        try:
            step = _Every.model_validate(override["layers"]).every
        except ValidationError as error:
            raise EspalierError(f"parameters.{number}.layers is {override['layers']}; it must be [from, to] or {{every: blocks}}") from error
        if blocks > step * _GROUPS:
            raise EspalierError(f"parameters.{number}.layers is {{every: {step}}} and the model has {blocks:,} blocks; no model has so many")
        for start in range(0, blocks, step):
            yield copy.deepcopy(override) | {"layers": [start, min(start + step, blocks)]}


class Space:
    """A recipe and what it leaves open.

    Args:
        content: the entries of its file.
        models: how many models it has.
        blocks: how many the new model has.

    Raises:
        EspalierError: naming the entry, for a range that is none.
    """

    def __init__(self, content: dict[str, Any], models: int, blocks: int) -> None:
        self.content = _each(content, models, [_LARGEST])
        if isinstance(self.content.get("parameters"), list):
            self.content["parameters"] = list(_every(self.content["parameters"], blocks))
        self._paths = {".".join(map(str, path)): (path, said) for path, said in self._open(self.content, ())}
        self.genes = tuple(_gene(name, said) for name, (_, said) in self._paths.items())

    def _open(self, node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        if isinstance(node, dict) and set(node) == {"search"}:
            yield path, node["search"]
            return
        inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in inside:
            yield from self._open(value, (*path, key))

    def at(self, places: Sequence[float]) -> dict[str, Any]:
        """The recipe with every gene at its place, from 0 to 1."""
        made = copy.deepcopy(self.content)
        for gene, place in zip(self.genes, places, strict=True):
            *path, last = self._paths[gene.name][0]
            where = made
            for key in path:
                where = where[key]
            where[last] = gene.at(place)
        return made

    def value(self, recipe: dict[str, Any], gene: Gene) -> Any:
        """What a recipe of :meth:`at` has in the place of a gene."""
        found: Any = recipe
        for key in self._paths[gene.name][0]:
            found = found[key]
        return found
