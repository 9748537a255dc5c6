"""Deltas into deltas: other forms of the same updates, and where such a delta comes from."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.layout import Piece, locate
from espalier.checkpoint.atomic import require_free_space
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.checkpoint.relaid import GROWN, Relaid
from espalier.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from espalier.delta import store
from espalier.delta.compression import Outcome, naming
from espalier.delta.fit import fit, relative_error
from espalier.delta.forms import Bank, LowRank, Magnitude, Update
from espalier.delta.forms.composite import Composite
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError
from espalier.exchange.composition import grown
from espalier.memory.meter import available_memory, format_bytes

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
        store.check_chain(delta, folder)
        self.directory = Relaid(directory, {**store.relaid(delta.manifest), **grown(directory, delta)})

    def _pieces(self, name: str, layout: Layout, shape: tuple[int, ...]) -> list[Piece]:
        """The tensors of a parameter; nothing but headers is read.

        Raises:
            EspalierError: when there are none, or they make another shape.
        """
        experts = min(shape[0], len(self.directory.file_of) + 1) if len(shape) == 3 else None
        pieces = locate(name, layout.names, experts, self.directory)
        pieces = [Piece(tuple(n + GROWN if n + GROWN in self.directory else n for n in piece.names), piece.expert) for piece in pieces]
        first = [self.directory.info(part).shape for part in pieces[0].names]
        if pieces[0].expert is not None:
            found: tuple[int, ...] = (len(pieces), sum(part[0] for part in first), *first[0][1:])
        else:
            found = (*first[0][:-2], *first[0][:-3:-1]) if layout.transposed else first[0]
        if tuple(found) != tuple(shape):
            raise EspalierError(f"the update of {name} is for shape {tuple(shape)}; the base has {tuple(found)}")
        return pieces

    def check(self, name: str, layout: Layout, shape: tuple[int, ...]) -> None:
        """Refuse an update of a parameter that the base does not have in this shape.

        Raises:
            EspalierError: naming the parameter and both shapes.
        """
        self._pieces(name, layout, shape)

    def __call__(self, name: str, layout: Layout, shape: tuple[int, ...]) -> torch.Tensor:
        pieces = self._pieces(name, layout, shape)
        if pieces[0].expert is not None:
            return torch.stack([torch.cat([self.directory.read(part) for part in piece.names]) for piece in pieces])
        weight = self.directory.read(pieces[0].names[0])
        return weight.transpose(-1, -2) if layout.transposed else weight


def base_of(delta: Delta, folder: Path, model: str | None) -> BaseWeights | None:
    """The base's weights, of ``model`` or else of the base that the delta names, where that is here, and is that base.

    Before anything is made dense, every update is held against the shape that the base has (from the headers of its
    files), and what it takes against the memory that there is.

    Raises:
        EspalierError: when ``model`` is not the delta's base; naming the parameter, when its shape is not the base's, or
            the dense update and another such would not fit in memory.
    """
    if model:
        base: BaseWeights | None = BaseWeights(delta, folder, model)
    else:
        base = _recorded(delta, folder)
    room = available_memory()
    for name, update in delta.updates.items():
        if delta.layouts[name].dtype or not update.dtype.is_floating_point:
            continue  # set as it is
        if base is not None:
            base.check(name, delta.layouts[name], update.shape)
        require_room(name, update, room)
    return base


def require_room(name: str, update: Update, room: int) -> None:
    """Refuse an update that takes more than ``room`` bytes when it is made dense.

    Raises:
        EspalierError: naming the parameter, its shape, and both sizes.
    """
    if (needed := 8 * _entries(update)) > room:
        raise EspalierError(
            f"{name}: an update of shape {tuple(update.shape)} takes {format_bytes(needed)} when it is made dense and compared "
            f"(two numbers of float32 an entry); there are {format_bytes(room)}"
        )


def _recorded(delta: Delta, folder: Path) -> BaseWeights | None:
    """The base that a delta names, where it is a folder of this machine that holds that base."""
    name = delta.manifest.get("base", {}).get("name")
    if not isinstance(name, str) or not (name == "seedling" or Path(name).is_dir()):
        return None
    try:
        return BaseWeights(delta, folder, name)
    except EspalierError:  # another model, or none at all
        return None


def _entries(update: Update) -> int:
    """Numbers of the largest dense tensor that an update, or a part of it, stands for."""
    parts = update.parts.values() if isinstance(update, Composite) else ()
    return max([math.prod(update.shape), *map(_entries, parts)])


class Spool:
    """Keeps updates in files until they are written, so that a delta larger than memory can be made.

    Args:
        folder: for the files; made when it is needed, and removed by :meth:`remove`.
    """

    SMALL = 1 << 20
    """Bytes of an update that may stay in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = self.bytes = 0

    def __call__(self, name: str, update: Update) -> Update:
        """The same update, its tensors in the pages of a file.

        Raises:
            EspalierError: when the disk has no room for it twice (the delta itself is written beside the spool), and once
                more for all that came before.
        """
        if update.nbytes <= self.SMALL or update.shared:
            return update
        require_free_space(self.folder, self.bytes + 2 * update.nbytes, "the new delta")
        self.bytes += update.nbytes
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
        if dora and any(options.get(key) is not None for key in ("rank", "energy")):
            raise EspalierError(f"{name}: DoRA stays DoRA for PEFT, of the rank that it has; leave --rank and --energy out, or convert it --to lora")
        if not whole and not dora:
            with naming(name):
                weight = weights(name, layout, update.shape) if weights and update.depends_on_base else None
                new = fit(update, SYNONYMS.get(to, to), weight=weight, name=name, **options)
                error = relative_error(new, update, weight)
        made[name] = new if new is update else keep(name, new)
        outcomes.append(Outcome(name, update.form, new.form, update.nbytes, new.nbytes, error))
        progress(done + 1)
    return made, outcomes


def of_task(delta: Delta, task: str) -> Delta:
    """The delta of one task of a bank: what its skills are mixed to, as two factors of every matrix.

    Raises:
        EspalierError: when the delta is no bank, or has no task of that name.
    """
    names = delta.manifest.get("tasks", [])
    if task not in names:
        raise EspalierError(f"{delta.folder} has no task {task!r}; " + (f"its tasks are: {', '.join(names)}" if names else "it is no bank of tasks"))
    number = names.index(task)
    if odd := next((name for name, u in delta.updates.items() if isinstance(u, Bank) and u.tasks != len(names)), None):
        raise EspalierError(f"{delta.folder}: the update of {odd} is not of the {len(names)} tasks that the delta names")
    updates = {name: update.of(number) if isinstance(update, Bank) else update for name, update in delta.updates.items()}
    return dataclasses.replace(delta, updates=updates, manifest={key: value for key, value in delta.manifest.items() if key != "tasks"})


def manifest_after(delta: Delta, method: str, hyperparameters: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What ``delta.json`` says of a delta that was made of one other, whose settings it keeps: its seed draws the start of A.

    Where an update changed, the model between which and the base this was the difference is not recorded any more.
    """
    manifest = store.manifest_after([delta], method, hyperparameters)
    if any(o.error != 0.0 or o.form != o.was for o in outcomes):
        manifest.pop("tuned", None)
    return manifest


def write(source: Path, target: Path, delta: Delta, sentence: str) -> int:
    """Write a delta that was made of the one in ``source``, with the files that it brings along.

    Returns:
        The bytes of its tensors' file.

    Raises:
        EspalierError: when such a file is missing, damaged or leads out of ``source``, when the lineage is no list of
            deltas, or the disk is too small.
    """
    text = card(delta.manifest, sentence)
    files = {name: file for name, file in store.brought_files(delta, source).items() if file is not None}
    needed = delta.nbytes + sum(file.stat().st_size for file in files.values()) + (8 << 20)
    require_free_space(target, needed, "the new delta")
    for name, file in files.items():
        copy = target / store.FILES / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return store.save(target, delta, text)


def card(manifest: Mapping[str, Any], sentence: str) -> str:
    """The model card of a delta that was made of another.

    Raises:
        EspalierError: when the lineage is not of objects that name a delta.
    """
    base = manifest.get("base", {})
    lines = []
    for parent in manifest["lineage"]:
        if not isinstance(parent, dict) or not isinstance(parent.get("delta"), str):
            raise EspalierError(f"{store.MANIFEST}: lineage holds {parent!r}; it must be objects that name a \"delta\"")
        lines.append(f"- `{parent['delta']}`: {parent.get('method')} {json.dumps(parent.get('hyperparameters') or {})}\n")
    return (
        f"---\nlibrary_name: espalier\nbase_model: {base.get('name')}\ntags: [espalier, {manifest['method']}]\n---\n\n"
        f"# A delta of {base.get('name')}\n\n{sentence} Base fingerprint `{base.get('fingerprint')}`. It comes from:\n\n{''.join(lines)}"
    )
