"""Deltas into deltas: other forms of the same updates, and where such a delta comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.layout import locate
from espalier.checkpoint.directory import TEMPLATES, ModelDirectory, resolve_model
from espalier.checkpoint.relaid import Relaid
from espalier.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from espalier.delta import store
from espalier.delta.compression import Outcome
from espalier.delta.fit import fit, relative_error
from espalier.delta.forms import LowRank, Magnitude, Update
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError

SYNONYMS = {"lora": "lowrank", "peft": "lowrank"}


class BaseWeights:
    """The weights of a delta's base, read when they are asked for, in their logical shapes.

    Args:
        delta, folder: the delta, and where it is.
        model: directory, ``seedling`` or hub id.

    Raises:
        EspalierError: when the model is not the delta's base.
    """

    def __init__(self, delta: Delta, folder: Path, model: str) -> None:
        directory = ModelDirectory(resolve_model(model))
        store.check_base(delta, folder, directory.path, directory.fingerprint())
        self.directory = Relaid(directory, store.relaid(delta.manifest))

    def __call__(self, name: str, layout: Layout, shape: tuple[int, ...]) -> torch.Tensor:
        pieces = locate(name, layout.names, shape[0] if len(shape) == 3 else None, self.directory)
        if pieces[0].expert is not None:
            return torch.stack([torch.cat([self.directory.read(part) for part in piece.names]) for piece in pieces])
        weight = self.directory.read(pieces[0].names[0])
        weight = weight.transpose(-1, -2) if layout.transposed else weight
        if tuple(weight.shape) != tuple(shape):
            raise EspalierError(f"the update of {name} is for shape {tuple(shape)}; the base has {tuple(weight.shape)}")
        return weight


class Spool:
    """Keeps updates in files until they are written, so that a delta larger than memory can be made.

    Args:
        folder: for the files; made when it is needed, and removed by :meth:`remove`.
    """

    SMALL = 1 << 20
    """Bytes of an update that may stay in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def __call__(self, name: str, update: Update) -> Update:
        """The same update, its tensors in the pages of a file."""
        if update.nbytes <= self.SMALL or update.shared:
            return update
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{self.count}.safetensors"
        self.count += 1
        tensors = update.tensors()
        write_safetensors(path, tensors)
        file = SafetensorsFile(path)
        return update.with_tensors({key: file.map(key) for key in tensors})

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def converted(
    delta: Delta,
    to: str,
    options: Mapping[str, Any],
    weights: BaseWeights | None,
    keep: Callable[[str, Update], Update],
    progress: Callable[[int], Any],
) -> tuple[dict[str, Update], list[Outcome]]:
    """Every update of a delta in another form, and what became of each.

    Integers and tensors that the base does not have stay as they are. ``peft`` keeps a low-rank magnitude and
    direction, which PEFT knows as DoRA.

    Raises:
        EspalierError: naming the parameter, when one cannot have that form.
    """
    made: dict[str, Update] = {}
    outcomes = []
    for done, (name, update) in enumerate(delta.updates.items()):
        layout, new = delta.layouts[name], update
        whole = not update.dtype.is_floating_point or bool(layout.dtype)
        dora = to == "peft" and isinstance(update, Magnitude) and isinstance(update.inner, LowRank)
        error = 0.0
        if not whole and not dora:
            try:
                weight = weights(name, layout, update.shape) if weights and update.depends_on_base else None
                new = fit(update, SYNONYMS.get(to, to), weight=weight, name=name, **options)
                error = relative_error(new, update, weight)
            except EspalierError as problem:
                raise EspalierError(f"{name}: {problem}") from problem
        made[name] = new if new is update else keep(name, new)
        outcomes.append(Outcome(name, update.form, new.form, update.nbytes, new.nbytes, error))
        progress(done + 1)
    return made, outcomes


def write(source: Path, target: Path, delta: Delta, sentence: str) -> int:
    """Write a delta that was made of the one in ``source``, with its files; returns the bytes of its tensors' file."""
    target.mkdir(parents=True, exist_ok=True)
    if (source / store.FILES).is_dir():  # those that a delta between two checkpoints brings along
        shutil.copytree(source / store.FILES, target / store.FILES)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)
    for side in source.iterdir():
        if side.is_file() and side.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copyfile(side, target / side.name)
    return store.save(target, delta, card(delta.manifest, sentence))


def card(manifest: Mapping[str, Any], sentence: str) -> str:
    """The model card of a delta that was made of another."""
    base = manifest.get("base", {})
    lineage = "".join(
        f"- `{parent['delta']}`: {parent['method']} {json.dumps(parent['hyperparameters'] or {})}\n" for parent in manifest["lineage"]
    )
    return (
        f"---\nlibrary_name: espalier\nbase_model: {base.get('name')}\ntags: [espalier, {manifest['method']}]\n---\n\n"
        f"# A delta of {base.get('name')}\n\n{sentence} Base fingerprint `{base.get('fingerprint')}`. It comes from:\n\n{lineage}"
    )
