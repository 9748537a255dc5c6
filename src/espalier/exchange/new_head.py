"""What a delta must bring where its model is a sequence classifier and its base is not: the head, and the config that has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.anatomy.classification import (
    classifies,
    is_classifier,
    labels_of,
    with_labels,
)
from espalier.anatomy.layout import locate
from espalier.anatomy.parameters import parameters
from espalier.anatomy.target import Target
from espalier.attach.load import empty_model, empty_of, load_config
from espalier.attach.new_tokens import holds_tokens
from espalier.checkpoint import peft_adapter
from espalier.checkpoint.atomic import write_text
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.fingerprint import file_digest
from espalier.checkpoint.safetensors_file import SafetensorsFile, dtype_name
from espalier.delta.forms import Replace, Update
from espalier.delta.store import FILES, Layout
from espalier.errors import EspalierError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Beyond:
    """How a live classifier goes beyond its base: parameters that the base lacks (or has in another shape), tensors of the
    base that it has no use for, and whether its config says otherwise."""

    lacking: frozenset[str]
    unused: tuple[str, ...]
    other_config: bool


def beyond(model: PreTrainedModel, base: ModelDirectory) -> Beyond | None:
    """Compare a model with its base by names and shapes; ``None`` for a model that is no classifier, or is all in its base."""
    if not is_classifier(model):
        return None
    used: set[str] = set()
    lacking = []
    for target in parameters(model):
        names = found_in(base, target, may_grow=holds_tokens(target))
        if not names:
            lacking.append(target.name)
        used.update(names)
    config = load_config(base.path)
    same = classifies(config) and labels_of(config) == labels_of(model.config) and config.pad_token_id == model.config.pad_token_id
    if same and not lacking:
        return None
    buffers = {name for name, _ in model.named_buffers()}
    return Beyond(frozenset(lacking), tuple(name for name in base if name not in used and name not in buffers), not same)


def found_in(base: ModelDirectory, target: Target, may_grow: bool = False) -> list[str]:
    """The tensors of the base that hold a parameter in its shape (``may_grow``: or with fewer rows); none where it has none."""
    try:
        pieces = locate(target.name, target.names, target.shape[0] if len(target.shape) == 3 else None, base)
    except EspalierError:
        return []
    if pieces[0].expert is None:
        stored = (*target.shape[:-2], target.shape[-1], target.shape[-2]) if target.transposed else target.shape
        shapes = {tuple(base.info(piece.names[0]).shape) for piece in pieces}
        if shapes != {stored} and not (may_grow and all(s[1:] == stored[1:] and s[:1] <= stored[:1] for s in shapes)):
            return []
    return [name for piece in pieces for name in piece.names]


def as_whole(head: Beyond, updates: Mapping[str, Update], layouts: dict[str, Layout]) -> None:
    """Say of the updates that set what the base lacks that they do so.

    Raises:
        EspalierError: when nothing sets such a parameter: nobody else would ever have its values.
    """
    for name in sorted(head.lacking):
        update = updates.get(name)
        if not (isinstance(update, Replace) and update.ignores_base):
            raise EspalierError(f"the base does not have {name!r}, so a delta must hold it whole: train it with --full {name}")
        layouts[name].dtype = dtype_name(update.dtype)


def bring(head: Beyond, model: PreTrainedModel, base: ModelDirectory, out: Path) -> dict[str, Any]:
    """Write the classifier's ``config.json`` into a delta's directory; what ``delta.json`` says of the head.

    Raises:
        EspalierError: when the config does not say what rows are filled with.
    """
    if not head.other_config:
        return {}
    config = model.config
    if config.pad_token_id is None:
        raise EspalierError(f"the config of this {type(model).__name__} has no pad_token_id, without which it cannot run on batches; set it")
    labels = labels_of(config)
    content = {key: value for key, value in base.config.items() if key != "num_labels"} | {
        "architectures": [type(model).__name__],
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
        "problem_type": config.problem_type,
        "pad_token_id": config.pad_token_id,
    }
    path = out / FILES / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")
    return {
        "classifier": {"labels": labels, "pad_token": config.pad_token_id},
        "removed": list(head.unused),
        "files": {"config.json": file_digest(path)},
    }


def model_of_adapter(folder: Path, config: Mapping[str, Any], base: ModelDirectory) -> PreTrainedModel:
    """The empty model that a PEFT adapter is for: a classifier of as many labels as its head has where it is one, else the base's own.

    Args:
        config: content of adapter_config.json.

    Raises:
        EspalierError: when the adapter of a classifier does not hold the head, or holds one of another size.
    """
    if config.get("task_type") != "SEQ_CLS":
        return empty_model(base.path)
    own = load_config(base.path)
    pad_token = next((token for token in (own.pad_token_id, own.eos_token_id) if isinstance(token, int)), 0)
    likely = empty_of(with_labels(own, ["0", "1"], pad_token), base.path)
    target = [t for t in parameters(likely) if t.role == "head.classifier" and len(t.shape) == 2][-1]
    head = target.name
    with SafetensorsFile(folder / peft_adapter.TENSORS) as file:
        if (stored := f"{peft_adapter.PREFIX}{head}") not in file.tensors:
            if classifies(own):
                return empty_model(base.path)
            raise EspalierError(f"{folder} is of a sequence classifier and does not hold its head {head!r}, which the base does not have either")
        shape = file.info(stored).shape
        if len(shape) != 2 or shape[1] != target.inputs or not shape[0]:  # so there are no more labels than the file has rows
            raise EspalierError(f"{file.path}: {stored!r} has shape {shape}; the head of this base has a row of {target.inputs} for each label")
        count = shape[0]
    if classifies(own) and len(own.id2label) == count:
        return empty_model(base.path)
    return empty_of(with_labels(own, [f"LABEL_{number}" for number in range(count)], pad_token), base.path)
