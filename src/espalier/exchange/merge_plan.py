"""From the recipe of a merge to what is read and written: the models, every tensor of the new one, and its config.

What does not fit is refused here, before anything is written.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from espalier import registry
from espalier.checkpoint.directory import ModelDirectory, read_json, resolve_model
from espalier.checkpoint.safetensors_file import torch_dtype
from espalier.checkpoint.stream import one_thread_each
from espalier.delta import store
from espalier.errors import EspalierError
from espalier.exchange import difference, vocabulary
from espalier.exchange import recipe as recipes
from espalier.exchange.merge_recipe import Recipe, block_of, checker, in_block, require_fitting, settings
from espalier.exchange.merging import Aligned, Changed, Item, Member, Model

_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(?:masked_)?bias$|position_ids$")
"""Buffers that old checkpoints hold and any model makes itself: in no new model that its base does not hold them in."""
_MATTERS = (
    "model_type", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "hidden_act", "activation_function",
    "num_experts_per_tok", "rope_theta", "rope_type", "factor",
)  # fmt: skip
"""What tensors of one shape may disagree in, and mean something else by."""
_APART = 0.1
"""Below this cosine of a matrix two models count as trained apart; of 4096 numbers, chance makes about 1/64."""
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass
class Opened:
    """The models of a merge: ``like`` has the names and files that the new one gets, and is the base where there is one."""

    like: Model
    base: Model | None
    base_name: str | None
    members: list[Model | Changed]


def opened(recipe: Recipe) -> Opened:
    """Open everything.

    Without a base, deltas name their own. Where that is not found, a model of the recipe that has its fingerprint is it.

    Raises:
        EspalierError: when something cannot be read, a delta belongs to another base, or models are of different kinds.
    """
    folders = [Path(ingredient.path) for ingredient in recipe.models]
    deltas = {}
    for i, folder in enumerate(folders):
        if store.is_delta(folder):
            deltas[i] = store.load(folder, mapped=True)
        elif (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            store.manifest_of(folder)  # says how to import it
    name = recipe.model
    if name is None and deltas:
        name = _base_of(recipe, deltas)
    base = ModelDirectory(resolve_model(name)) if name is not None else None
    like = base or ModelDirectory(resolve_model(recipe.models[0].path))
    members: list[Model | Changed] = []
    for position, ingredient in enumerate(recipe.models):
        if position not in deltas:
            members.append(Model(ModelDirectory(resolve_model(ingredient.path)), like))
            continue
        assert base is not None
        if not recipe.any_base:
            store.check_base(deltas[position], folders[position], base.path, base.fingerprint())
            store.check_chain(deltas[position], folders[position])
        members.append(Changed(base, deltas[position], folders[position]))
    reference = Model(like, like)
    for member in (reference, *members):
        _require_alike(reference, member)
    return Opened(reference, reference if base else None, name, members)


def _base_of(recipe: Recipe, deltas: dict[int, store.Delta]) -> str:
    wanted = {delta.base_fingerprint for delta in deltas.values()}
    if len(wanted) > 1 and not recipe.any_base:
        raise EspalierError(
            f"the deltas belong to different bases, with the fingerprints {', '.join(sorted(map(str, wanted)))}; "
            "give the base that all are to be changes of, and --any-base: --model BASE --any-base"
        )
    names = [str(delta.manifest.get("base", {}).get("name", "")) for delta in deltas.values()]
    for name in dict.fromkeys(names):
        if name == "seedling" or Path(name).is_dir() or (name and not name.startswith(("/", ".")) and name.count("/") == 1):
            return name
    for position, ingredient in enumerate(recipe.models):
        if position not in deltas and ModelDirectory(resolve_model(ingredient.path)).fingerprint() in wanted:
            return ingredient.path
    raise EspalierError(f"the base {names[0]!r} of {recipe.models[next(iter(deltas))].path} is not here; give it: --model BASE")


def _meaning(config: dict[str, Any]) -> dict[str, Any]:
    """What matters of a config, spelled as transformers 4 and 5 do."""
    text: dict[str, Any] = config["text_config"] if isinstance(config.get("text_config"), dict) else {}
    flat = {**config, **text, "model_type": config.get("model_type")}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(flat.get(key), dict):
            flat.update({k: v for k, v in flat[key].items() if k in ("rope_theta", "rope_type", "factor")})
            flat.setdefault("rope_type", flat[key].get("type"))
    if flat.get("rope_type") == "default":
        del flat["rope_type"]
    return {key: flat[key] for key in _MATTERS if flat.get(key) is not None}


def _require_alike(like: Model, member: Model | Changed) -> None:
    if "quantization_config" in member.config:
        raise EspalierError(f"{member.path} is quantized; merge the model that it was made from")
    wanted, found = _meaning(like.config), _meaning(member.config)
    for key in _MATTERS:
        if key in wanted and key in found and wanted[key] != found[key]:
            raise EspalierError(f"{key} is {found[key]!r} in {member.path / 'config.json'}, and {wanted[key]!r} in {like.path}; they do not merge")


@dataclass
class _Slot:
    """A tensor of the new model: its name in every model that has a part in it, and in the base."""

    name: str
    sources: list[tuple[int, str]]
    base: str
    part: int = 0


def _slots(recipe: Recipe, models: Opened) -> tuple[list[_Slot], list[tuple[int, int]]]:
    """Every tensor of the new model, and the blocks (from, to) of its parts."""
    everyone = range(len(models.members))
    if recipe.stack is None:
        blocks = 1 + max((block for name in models.like.names if (block := block_of(name)) is not None), default=0)
        return [_Slot(name, [(i, name) for i in everyone], name) for name in models.like.names], [(0, blocks)]
    for number, part in enumerate(recipe.stack):
        if len({stop - start for start, stop in part.blocks.values()}) != 1 or not all(0 <= a < b for a, b in part.blocks.values()):
            raise EspalierError(f"stack.{number}: the models' blocks {dict(part.blocks)} must be equally many, from a lower number to a higher")
        if (unknown := max(part.blocks)) >= len(models.members) or min(part.blocks) < 0:
            raise EspalierError(f"stack.{number}: there is no model {unknown}; the {len(models.members)} models count from 0")
    before: list[_Slot] = []
    after: list[_Slot] = []
    for name in models.like.names:
        if block_of(name) is None:
            early = re.search(r"embed|(^|\.)w[tp]e\.", name) is not None
            number = 0 if early else len(recipe.stack) - 1
            (before if early else after).append(_Slot(name, [(i, name) for i in recipe.stack[number].blocks], name, number))
    inside: list[_Slot] = []
    spans, made = [], 0
    for number, part in enumerate(recipe.stack):
        first, (start, stop) = next(iter(part.blocks.items()))
        based = part.base or (start, stop)
        for offset in range(stop - start):
            names = [n for n in models.members[first].names if block_of(n) == start + offset]
            if not names:
                raise EspalierError(f"stack.{number}: {models.members[first].path} has no block {start + offset}")
            for name in names:
                sources = [(i, in_block(name, begin + offset)) for i, (begin, _) in part.blocks.items()]
                inside.append(_Slot(in_block(name, made), sources, in_block(name, based[0] + offset), number))
            made += 1
        spans.append((made - (stop - start), made))
    return [*before, *inside, *after], spans


def items(recipe: Recipe, models: Opened) -> tuple[list[Item], vocabulary.Alignment | None]:
    """Every tensor of the new model and how it is merged, and how vocabularies are brought together where they differ.

    Raises:
        EspalierError: naming the tensor and the model that does not fit, or the option that is wrong.
    """
    if recipe.stack is None:
        for member in models.members:
            _refuse_extra(member, models.like)
    alignment = vocabulary.align(recipe.vocabulary, models.like, models.members)
    slots, spans = _slots(recipe, models)
    info = registry.find(recipe.method, "merger")
    require_fitting(recipe, [(slot.name, slot.part) for slot in slots], "tensor of the new model")
    checked = checker(recipe.method)
    made = []
    for slot in slots:
        try:
            weights, scale, options = settings(recipe, info, slot.name, slot.part, spans)
            taking = [i for i, _ in slot.sources]
            options = {k: [v[i] for i in taking] if isinstance(v, list) and len(v) == len(models.members) else v for k, v in options.items()}
            options = checked(options)
            made.append(_item(recipe, models, alignment, slot, [weights[i] for i in taking], scale, options))
        except EspalierError as error:
            raise EspalierError(f"{slot.name}: {error}") from error
    return made, alignment


def _item(
    recipe: Recipe, models: Opened, alignment: vocabulary.Alignment | None, slot: _Slot, weights: list[float], scale: float, options: dict[str, Any]
) -> Item:
    owner: Model | Changed = models.like
    name = slot.base
    if name not in owner:  # a block that only the first model has
        owner, name = models.members[slot.sources[0][0]], slot.sources[0][1]
    stored = owner.dtype(name)
    if recipe.dtype and stored in ("BF16", "F16", "F32", "F64"):
        stored = _DTYPES[recipe.dtype]
    if not torch_dtype(stored).is_floating_point or not math.prod(owner.shape(name)):
        return Item(slot.name, stored, owner.shape(name), [(owner, name)], None, [1.0])
    found = [_source(models, models.members[i], tensor, slot.base) for i, tensor in slot.sources]
    base = (models.base, slot.base) if models.base is not None and slot.base in models.base else None
    if base is None and models.base is not None:
        raise EspalierError(f"the base {models.base.path} has no {slot.base!r}; say with which blocks of it the part is compared (base: [from, to])")
    shape = owner.shape(name)
    sources: list[tuple[Member, str]] = list(found)
    aligned_base: tuple[Member, str] | None = base
    if alignment is not None and vocabulary.is_by_token(slot.name):
        shape, sources, aligned_base = _aligned(alignment, models, slot, found, base)
    for member, tensor in sources:
        if member.shape(tensor) != shape:
            hint = "; align the tokens: --vocabulary base or union" if vocabulary.is_by_token(slot.name) else ""
            raise EspalierError(f"it is {member.shape(tensor)} in {member.path}, and {shape} in {owner.path}{hint}")
        if not torch_dtype(member.dtype(tensor)).is_floating_point:
            raise EspalierError(f"it is {member.dtype(tensor)} in {member.path}, and {stored} in {owner.path}")
    return Item(slot.name, stored, shape, sources, aligned_base, weights, scale, options)


def _source(models: Opened, member: Model | Changed, name: str, base: str) -> tuple[Model | Changed, str]:
    """Where a model has a tensor; a tied head is the embedding, and what only the base has did not change."""
    if name in member:
        return member, name
    if vocabulary.HEAD.search(name) and (embedding := _embedding(member)):
        return member, embedding
    if base in models.like and (models.base is not None or _COMPUTED.search(base)):
        return models.like, base
    raise EspalierError(f"{member.path} lacks it; with --model BASE it would be taken as unchanged")


def _embedding(member: Model | Changed) -> str | None:
    return next((name for name in member.names if vocabulary.EMBEDDING.search(name)), None)


def _refuse_extra(member: Model | Changed, like: Model) -> None:
    for name in member.extra:
        if _COMPUTED.search(name):
            continue
        embedding = _embedding(member)
        if not vocabulary.HEAD.search(name) or embedding is None:
            raise EspalierError(f"{member.path} has the tensor {name!r}, which {like.path} does not have")
        if member.shape(name) != member.shape(embedding) or not _are_equal(member, name, embedding):
            raise EspalierError(
                f"{member.path} has a head of its own ({name!r}); {like.path} uses its embedding as head, and the merged model would too"
            )


def _are_equal(member: Model | Changed, first: str, second: str) -> bool:
    one, other = member.rows(first), member.rows(second)
    count = math.prod(member.shape(first)[:-1])
    return all(torch.equal(one(row, min(row + 256, count)), other(row, min(row + 256, count))) for row in range(0, count, 256))


def _aligned(
    alignment: vocabulary.Alignment, models: Opened, slot: _Slot, found: Sequence[tuple[Model | Changed, str]], base: tuple[Model, str] | None
) -> tuple[tuple[int, ...], list[tuple[Member, str]], tuple[Member, str] | None]:
    own = models.like.shape(slot.base)
    shape = (alignment.rows(own[0]), *own[1:])

    def places(position: int, member: Model | Changed, tensor: str) -> torch.Tensor:
        if member is models.like:
            position = len(models.members)
        return alignment.places(position, member.shape(tensor)[0], shape[0])

    placed = [(m, t, places(i, m, t)) for (i, _), (m, t) in zip(slot.sources, found, strict=True)]
    reference = (models.like, slot.base, places(len(models.members), models.like, slot.base))
    others = [reference, *placed]
    sources: list[tuple[Member, str]] = []
    for member, tensor, where in placed:
        if member.shape(tensor)[1:] != own[1:]:
            raise EspalierError(f"it is {member.shape(tensor)} in {member.path}, and {own} in {models.like.path}")
        sources.append((Aligned(member, tensor, where, shape, others), tensor))
    return shape, sources, (Aligned(*reference, shape, others), slot.base) if base else None


def trained_apart(items: Sequence[Item]) -> tuple[Path, Path, float] | None:
    """Two models of a merge that have no coordinates in common, and the cosine of a matrix of theirs; ``None`` without such.

    Tunes of one base keep most of its direction, whatever they learnt; models from different seeds are orthogonal, up to
    chance (arXiv:2402.04051 is about what then helps). Looked at is the smallest matrix of the blocks that has enough
    numbers to tell the two apart, of every model against the base, or else the first.
    """
    fitting = [
        item for item in items
        if item.is_merged and len(item.shape) == 2 and math.prod(item.shape) >= 4096 and block_of(item.name) is not None
        and all(tensor == item.name for _, tensor in item.sources)
    ]  # fmt: skip
    if not fitting:
        return None
    item = min(fitting, key=lambda item: math.prod(item.shape))
    (first, name), *others = [*([item.base] if item.base else []), *item.sources]
    with one_thread_each():
        for member, tensor in others:
            if member is first:
                continue
            sums = torch.zeros(3, dtype=torch.float64)
            one, other = first.rows(name), member.rows(tensor)
            for row in range(0, item.shape[0], 256):
                a, b = (rows(row, min(row + 256, item.shape[0])).double() for rows in (one, other))
                sums += torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
            cosine = float(sums[0] / (sums[1] * sums[2]).sqrt())
            if abs(cosine) < _APART:
                return first.path, member.path, cosine
    return None


def write_beside(folder: Path, recipe: Recipe, models: Opened, made: Sequence[Item], alignment: vocabulary.Alignment | None) -> None:
    """Write what stands beside the weights: the base's (or first model's) files, with depth and tokens as they are now."""
    recipes.write_side_files(folder, models.like.directory, [], [], _DTYPES[recipe.dtype] if recipe.dtype else None)
    config = read_json(folder / "config.json")
    if recipe.stack is not None:
        _deepen(config, recipe, models)
    if alignment is not None and alignment.tokenizer is not None:
        (folder / vocabulary.TOKENIZER).write_text(alignment.tokenizer, encoding="utf-8")
        rows = next(item.shape[0] for item in made if vocabulary.EMBEDDING.search(item.name))
        text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        text["vocab_size"] = rows
    if recipe.stack is not None or alignment is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_as_delta(folder: Path, models: Opened, write: Callable[[Path], None]) -> None:
    """Write the exact delta that makes the merged model of the base; ``write`` writes that model, which is not kept."""
    assert models.base is not None
    merged = folder / "merged"
    merged.mkdir()
    write(merged)
    pair = difference.Pair(models.base.directory, ModelDirectory(merged))
    changes = difference.measure(pair, lambda done: None)
    difference.write(pair, changes, "auto", {}, (str(models.base_name), "what merge.yaml makes"), folder, folder, lambda done: None)
    shutil.rmtree(merged)


def _deepen(config: dict[str, Any], recipe: Recipe, models: Opened) -> None:
    """Set the number of blocks, and lists of one entry for each block."""
    assert recipe.stack is not None
    where = config if any(key in config for key in _DEPTHS) else config.get("text_config", {})
    key = next((key for key in _DEPTHS if key in where), None)
    if key is None:
        raise EspalierError(f"{models.like.path / 'config.json'} does not say how many blocks there are ({', '.join(_DEPTHS)})")
    lists = [name for name, value in where.items() if isinstance(value, list) and len(value) == where[key]]
    blocks = [(models.members[i].config, start + offset) for part in recipe.stack for i, (start, stop) in [next(iter(part.blocks.items()))] for offset in range(stop - start)]
    for name in lists:
        taken = [source.get("text_config", source) if name not in source else source for source, _ in blocks]
        where[name] = [source.get(name, where[name])[block] for source, (_, block) in zip(taken, blocks, strict=True)]
    where[key] = len(blocks)
