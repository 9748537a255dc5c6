"""Sequence classification: which configs and models do it, and what a config must say to do it with given labels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError

if TYPE_CHECKING:
    from torch import nn

_ENDING = "ForSequenceClassification"


def classifies(config: Any) -> bool:
    """Whether a config is of a model with a classification head over sequences."""
    architectures = getattr(config, "architectures", None) or [""]
    return str(architectures[0]).endswith(_ENDING)


def is_classifier(model: nn.Module) -> bool:
    """Whether a live model has a classification head over sequences."""
    return type(model).__name__.endswith(_ENDING)


def labels_of(config: Any) -> list[str]:
    """The labels of a classification head, in the order of its outputs."""
    return [str(config.id2label[number]) for number in range(len(config.id2label))]


def with_labels(config: Any, labels: Sequence[str], pad_token: int) -> Any:
    """The config of a model with a classification head for these labels; ``pad_token`` is what rows are filled with.

    Raises:
        EspalierError: when transformers has no such head for the family.
    """
    from transformers.models.auto import modeling_auto

    heads = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if config.model_type not in heads:
        raise EspalierError(f"transformers has no sequence classification for the family {config.model_type!r}; take a model of another")
    made = copy.deepcopy(config)
    made.architectures = [heads[config.model_type]]
    made.id2label = dict(enumerate(labels))
    made.label2id = {label: number for number, label in enumerate(labels)}
    made.problem_type = "single_label_classification"
    made.pad_token_id = pad_token
    return made
