"""The recipe of a merge as a file says it: what is merged into what, by which method, with which numbers where."""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from espalier import registry
from espalier.anatomy.parameters import BLOCK
from espalier.errors import EspalierError
from espalier.registry import MethodInfo


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class OverDepth(_Strict):
    """A number that changes over the blocks: ``depth`` at equal distances from the first block to the last."""

    depth: list[float] = Field(min_length=1)

    def at(self, place: float) -> float:
        """The value at a place from 0 (the first block) to 1 (the last), linear between the given ones."""
        position = place * (len(self.depth) - 1)
        low = min(int(position), max(len(self.depth) - 2, 0))
        high = min(low + 1, len(self.depth) - 1)
        return self.depth[low] + (self.depth[high] - self.depth[low]) * (position - low)


Number = float | OverDepth


class Ingredient(_Strict):
    """A model or delta that is merged: its weight, and options of the method that are its own (such as its density)."""

    path: str
    weight: Number | None = None
    options: dict[str, Number] = {}


class Override(_Strict):
    """Other values for some parameters; of several that fit, the last one says.

    Lists are of one value for each model; ``null`` leaves what was said before. A number over the depth goes over the
    blocks of ``layers`` or of the part, if one is given, else over all of the new model.
    """

    names: str | list[str] | None = None
    """globs over the names of tensors"""
    layers: tuple[int, int] | None = None
    """first block of the new model, and the one after the last"""
    part: int | None = None
    """a part of the stack, counted from 0; what comes before all blocks belongs to the first, what comes after to the last"""
    weights: list[Number | None] | None = None
    scale: Number | None = None
    options: dict[str, Any] = {}

    def fits(self, name: str, part: int) -> bool:
        """Whether it is about this tensor of the new model, which is in this part of it."""
        globs = [self.names] if isinstance(self.names, str) else self.names
        if globs is not None and not any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            return False
        block = block_of(name)
        if self.part not in (None, part):
            return False
        return self.layers is None or (block is not None and self.layers[0] <= block < self.layers[1])


class Part(_Strict):
    """Blocks of the new model: of each model (by its place in the list) from, to; all equally many."""

    blocks: dict[int, tuple[int, int]] = Field(min_length=1)
    base: tuple[int, int] | None = None
    """the base's blocks that changes are changes of; default: those of the first model"""


class Recipe(_Strict):
    """A merge. See docs/merge.md."""

    method: str
    models: list[Ingredient] = Field(min_length=1)
    model: str | None = None
    """the base: what changes are changes of, and whose files the new model gets"""
    options: dict[str, Any] = {}
    scale: Number = 1.0
    parameters: list[Override] = []
    stack: list[Part] | None = Field(default=None, min_length=1)
    vocabulary: Literal["base", "union"] | None = None
    to: Literal["model", "delta"] = "model"
    space: Literal["updates", "factors", "svd"] | None = None
    """in which deltas are merged into a delta (see exchange/merge_deltas.py)"""
    rank: int | None = None
    """most of the merged delta's factors"""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    shard_size: str | None = None
    seed: int = 0
    any_base: bool = False

    @classmethod
    def of(cls, content: Any, where: str) -> Recipe:
        """A recipe from its entries.

        Raises:
            EspalierError: saying ``where``, and the entry that is wrong.
        """
        try:
            recipe = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            entry = ".".join(str(key) for key in first["loc"]) or "it"
            raise EspalierError(f"{where}: {entry}: {first['msg'].lower()} (it is {str(first.get('input'))[:80]})") from error
        for number, override in enumerate(recipe.parameters):
            if override.weights is not None and len(override.weights) != len(recipe.models):
                raise EspalierError(
                    f"{where}: parameters.{number}.weights: there are {len(override.weights)} weights and {len(recipe.models)} models"
                )
        return recipe


def read(path: Path) -> dict[str, Any]:
    """The entries of a recipe file.

    Raises:
        EspalierError: when it cannot be read, or holds none.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EspalierError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise EspalierError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise EspalierError(f"{path} is no recipe: it must hold entries such as 'method: ties' and 'models: [...]'")
    return content


def block_of(name: str) -> int | None:
    """The number of the block that a tensor belongs to, or ``None``."""
    found = BLOCK.search(name)
    return int(found.group(1)) if found else None


def in_block(name: str, block: int) -> str:
    """The name of the same tensor of another block."""
    found = BLOCK.search(name)
    assert found is not None
    return f"{name[: found.start(1)]}{block}{name[found.end(1) :]}"


def _place(block: int | None, first: int, stop: int) -> float:
    """How deep a block lies among those from ``first`` to ``stop``: 0 to 1; a single one is the last, no block is 0."""
    if block is None:
        return 0.0
    return (block - first) / (stop - 1 - first) if stop - 1 > first else 1.0


def _value(number: Any, place: float) -> Any:
    """A number, or a list of numbers, for one parameter; other kinds of values as they are."""
    if isinstance(number, dict):
        try:
            number = OverDepth.model_validate(number)
        except ValidationError as error:
            raise EspalierError(f"{str(number)[:80]} is no number, nor a list of numbers over the depth ({{depth: [0.2, 0.8]}})") from error
    if isinstance(number, list):
        return [_value(item, place) for item in number]
    return number.at(place) if isinstance(number, OverDepth) else number


def settings(recipe: Recipe, info: MethodInfo, name: str, part: int, spans: Sequence[tuple[int, int]]) -> tuple[list[float], float, dict[str, Any]]:
    """The weights, scale and options of one parameter; options of single models as lists.

    Args:
        part: the part of the new model that the parameter is in.
        spans: (first block, the one after the last) of every part.

    Raises:
        EspalierError: when an option has another number of values than there are models.
    """
    block, count = block_of(name), len(recipe.models)
    place = _place(block, 0, spans[-1][1])
    weights = [1.0 if i.weight is None else _value(i.weight, place) for i in recipe.models]
    scale = _value(recipe.scale, place)
    options: dict[str, Any] = {h.name: h.default for h in info.hyperparameters}

    def change(option: str, values: Sequence[Any]) -> None:
        if len(values) == 1:
            values = [*values] * count
        if len(values) != count:
            raise EspalierError(f"{option} has {len(values)} values, there are {count} models (or give one for all)")
        if any(value is None for value in values):
            before = options.get(option)
            before = before if isinstance(before, list) else [before] * count
            values = [b if v is None else v for v, b in zip(values, before, strict=True)]
        options[option] = list(values)

    def change_all(given: dict[str, Any], place: float) -> None:
        for option, value in given.items():
            if isinstance(found := _value(value, place), list):
                change(option, found)
            else:
                options[option] = found

    change_all(recipe.options, place)
    for option in dict.fromkeys(option for i in recipe.models for option in i.options):
        change(option, [_value(i.options.get(option), place) for i in recipe.models])
    for override in recipe.parameters:
        if not override.fits(name, part):
            continue
        span = override.layers or (spans[part] if override.part is not None else None)
        inside = _place(block, *span) if span else place
        if override.weights is not None:
            weights = [w if given is None else _value(given, inside) for w, given in zip(weights, override.weights, strict=True)]
        scale = scale if override.scale is None else _value(override.scale, inside)
        change_all(override.options, inside)
    return [float(weight) for weight in weights], float(scale), options


def require_fitting(recipe: Recipe, tensors: Sequence[tuple[str, int]], what: str) -> None:
    """Refuse an entry of ``parameters`` that is about nothing.

    Args:
        tensors: name and part of everything that is merged.
        what: they are, for the message.

    Raises:
        EspalierError: naming the entry.
    """
    for number, override in enumerate(recipe.parameters):
        if not any(override.fits(name, part) for name, part in tensors):
            about = override.model_dump(include={"names", "layers", "part"}, exclude_none=True)
            raise EspalierError(f"parameters.{number}: no {what} fits {about}")


def checker(method: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What checks a method's options; equal ones, as most tensors have, once."""

    @functools.cache
    def checked(text: str) -> dict[str, Any]:
        options: dict[str, Any] = registry.options_of(method, "merger", json.loads(text))[1]
        return options

    return lambda options: checked(json.dumps({k: v for k, v in options.items() if v is not None}, sort_keys=True, default=str))


def given_options(method: str, options: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A method and the options that were given for it; a list of one value is that value, for all models.

    Raises:
        EspalierError: for an option that it does not have.
    """
    function, own = registry.options_of(method, "merger", dict(options))
    return function, {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in own.items()}


def _options(recipe: Recipe, info: MethodInfo) -> dict[str, Any]:
    return {**{h.name: h.default for h in info.hyperparameters}, **recipe.options}


def as_yaml(recipe: Recipe, info: MethodInfo) -> str:
    """The recipe as a file that makes the same model again, from wherever it is run: with every option, and full paths."""

    def full(path: str) -> str:
        return str(Path(path).resolve()) if path != "seedling" and Path(path).exists() else path

    content = recipe.model_dump(exclude_defaults=True, mode="json")
    content["options"] = {k: [full(v) if isinstance(v, str) else v for v in vs] if isinstance(vs, list) else vs for k, vs in _options(recipe, info).items()}
    content["seed"] = recipe.seed
    for ingredient in content["models"]:
        ingredient["path"] = full(ingredient["path"])
    if recipe.model is not None:
        content["model"] = full(recipe.model)
    content = {entry: content[entry] for entry in Recipe.model_fields if entry in content}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def card(recipe: Recipe, info: MethodInfo, base: str | None) -> str:
    """A model card that says what the model was made of."""
    lines = []
    for ingredient in recipe.models:
        weight = ingredient.weight.depth if isinstance(ingredient.weight, OverDepth) else ingredient.weight
        options = {k: v.depth if isinstance(v, OverDepth) else v for k, v in ingredient.options.items()}
        more = [f"weight {weight}"] if weight is not None else []
        lines.append(", ".join([f"- `{ingredient.path}`", *more, *(f"{key} {value}" for key, value in options.items())]))
    how = ", ".join([f"`{recipe.method}`", *(f"{k} {v}" for k, v in _options(recipe, info).items() if v is not None)])
    return (
        f"---\nlibrary_name: transformers\nbase_model: {base or recipe.models[0].path}\ntags: [espalier, merge]\n---\n\n"
        f"# A merge of {len(recipe.models)} {'models' if len(recipe.models) > 1 else 'model'}\n\n"
        f"Written by `espalier merge` ({how}{f'; base `{base}`' if base else ''}) from:\n\n" + "\n".join(lines) + "\n\n"
        "`merge.yaml` is the whole recipe; `espalier merge merge.yaml --out DIR` makes the same again.\n"
    )
