"""What is merged into what, by which method: the recipe of a merge, as a file says it and as the engine needs it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from espalier.anatomy.parameters import BLOCK
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.delta import store
from espalier.errors import EspalierError
from espalier.exchange.merging import Changed, Item, Member, Model


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class OverDepth(_Strict):
    """A number that changes over the blocks: ``values`` at equal distances from the first block to the last."""

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
    """Other values for some parameters; of several that fit, the last one says."""

    names: str | list[str] | None = None
    """globs over the names of tensors"""
    layers: list[int] | None = None
    """first block and the one after the last"""
    weights: list[Number] | None = None
    scale: Number | None = None
    options: dict[str, Any] = {}

    def fits(self, name: str) -> bool:
        """Whether it is about this tensor."""
        globs = [self.names] if isinstance(self.names, str) else self.names
        if globs is not None and not any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            return False
        block = _block(name)
        return self.layers is None or (block is not None and self.layers[0] <= block < self.layers[1])


class Part(_Strict):
    """Blocks of the merged model: of each ingredient (by its place in the list) the blocks from, to; all equally many."""

    blocks: dict[int, list[int]]


class Recipe(_Strict):
    """A merge. See docs/merge.md."""

    method: str
    models: list[Ingredient] = Field(min_length=1)
    model: str | None = None
    """the base: what changes are changes of, and whose files the new model gets"""
    options: dict[str, Any] = {}
    scale: Number = 1.0
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    seed: int = 0
    parameters: list[Override] = []
    stack: list[Part] | None = None
    any_base: bool = False

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe file.

        Raises:
            EspalierError: naming the file, and the entry that is wrong.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise EspalierError(f"{path} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise EspalierError(f"{path} is not YAML: {error}") from error
        return cls.of(content, str(path))

    @classmethod
    def of(cls, content: Any, where: str) -> Recipe:
        """A recipe from its entries.

        Raises:
            EspalierError: saying ``where``, and the entry that is wrong.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            entry = ".".join(str(key) for key in first["loc"]) or "it"
            raise EspalierError(f"{where}: {entry}: {first['msg'].lower()} (it is {str(first.get('input'))[:80]})") from error


def _block(name: str) -> int | None:
    found = BLOCK.search(name)
    return int(found.group(1)) if found else None


def _value(number: Any, place: float) -> Any:
    """A number of an option for one parameter; other kinds of values as they are."""
    if isinstance(number, dict) and set(number) == {"depth"}:
        number = OverDepth(**number)
    return number.at(place) if isinstance(number, OverDepth) else number


def members(recipe: Recipe) -> tuple[ModelDirectory, Model | None, list[Member]]:
    """(the model whose names and files the new one has, the base, what is merged), all opened.

    Without a base, deltas name their own; it is the base then.

    Raises:
        EspalierError: when something cannot be read, or a delta belongs to another base.
    """
    folders = [Path(ingredient.path) for ingredient in recipe.models]
    deltas = {i: store.load(folder, mapped=True) for i, folder in enumerate(folders) if store.is_delta(folder)}
    base_name = recipe.model
    if base_name is None and deltas:
        base_name = str(next(iter(deltas.values())).manifest.get("base", {}).get("name", ""))
        if not base_name:
            raise EspalierError(f"{folders[next(iter(deltas))]} does not name its base; give it: --model BASE")
    base = ModelDirectory(resolve_model(base_name)) if base_name is not None else None
    like = base or ModelDirectory(resolve_model(recipe.models[0].path))
    found: list[Member] = []
    for position, ingredient in enumerate(recipe.models):
        if position not in deltas:
            found.append(Model(ModelDirectory(resolve_model(ingredient.path)), like))
            continue
        assert base is not None
        if not recipe.any_base:
            store.check_base(deltas[position], folders[position], base.path, base.fingerprint())
        found.append(Changed(base, deltas[position], folders[position]))
    return like, Model(base, like) if base else None, found


def items(recipe: Recipe, like: ModelDirectory, base: Model | None, merged: Sequence[Member]) -> list[Item]:
    """Every tensor of the new model, and how it is merged.

    A tensor that not all models have is an error, but for one that the base has: models that lack it did not change it.

    Raises:
        EspalierError: naming the tensor and the model.
    """
    blocks = 1 + max((block for name in like if (block := _block(name)) is not None), default=0)
    dtype = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", None: None}[recipe.dtype]
    for member in merged:
        if member.extra:
            raise EspalierError(f"{member.path} has the tensor {member.extra[0]!r}, which {like.path} does not have")
    made = []
    for name in like:
        info = like.info(name)
        block = _block(name)
        place = (block / max(blocks - 1, 1)) if block is not None else 0.0
        overrides = [override for override in recipe.parameters if override.fits(name)]
        weights = [1.0 if i.weight is None else _value(i.weight, place) for i in recipe.models]
        scale: Any = recipe.scale
        options: dict[str, Any] = dict(recipe.options)
        for override in overrides:
            weights = [_value(w, place) for w in override.weights] if override.weights is not None else weights
            scale = override.scale if override.scale is not None else scale
            options.update(override.options)
        if len(weights) != len(recipe.models):
            raise EspalierError(f"{name}: there are {len(weights)} weights and {len(recipe.models)} models")
        sources = []
        for member, ingredient in zip(merged, recipe.models, strict=True):
            if name in member:
                sources.append((member, name))
            elif base is not None:
                sources.append((base, name))
            else:
                raise EspalierError(f"{ingredient.path} lacks the tensor {name!r}; with --model BASE it would be taken as unchanged")
        own = {option for ingredient in recipe.models for option in ingredient.options}
        for option in own:
            everyone = options.get(option)
            values = [_value(i.options.get(option, everyone), place) for i in recipe.models]
            if None in values:
                raise EspalierError(f"{option} is given for some models only; give it for all")
            options[option] = values
        options = {option: _value(value, place) for option, value in options.items()}
        stored = dtype if dtype and info.dtype in ("BF16", "F16", "F32", "F64") else info.dtype
        made.append(
            Item(name, stored, info.shape, sources, (base, name) if base else None, [float(w) for w in weights], float(_value(scale, place)), options)
        )
    return made


def as_yaml(recipe: Recipe, more: Mapping[str, Any]) -> str:
    """The recipe as a file that makes the same model again."""
    content = recipe.model_dump(exclude_defaults=True, mode="json")
    return yaml.safe_dump({**content, **more}, sort_keys=False, allow_unicode=True)


def write_lineage(folder: Path, recipe: Recipe, like: ModelDirectory, shard_size: str | None) -> None:
    """The recipe beside the model that it made, and a card that says what the model was made of."""
    (folder / "merge.yaml").write_text(as_yaml(recipe, {}), encoding="utf-8")
    made = "\n".join(
        f"- `{i.path}`" + (f", weight {i.weight if isinstance(i.weight, float) else i.weight.depth}" if i.weight is not None else "")
        for i in recipe.models
    )
    text = (
        f"---\nlibrary_name: transformers\nbase_model: {recipe.model or recipe.models[0].path}\ntags: [espalier, merge]\n---\n\n"
        f"# A merge of {len(recipe.models)} models\n\nWritten by `espalier merge` (`{recipe.method}`"
        + (f", base `{recipe.model}`" if recipe.model else "")
        + f") from:\n\n{made}\n\n`espalier merge merge.yaml --out DIR` makes it again.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
