"""Accuracy, macro-F1 and loss of a sequence classifier on labelled texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from espalier.attach.tasks import choose_task
from espalier.data.labelled import Labelled


@dataclass(frozen=True)
class ClassScore:
    """``loss`` in nats a text; ``accuracy``; ``macro_f1``, the mean of ``f1`` over the classes that occur.

    ``f1`` by class is 2 tp / (2 tp + fp + fn) of the classes that a text has or is said to have; ``truncated`` is the
    number of ``examples`` that were longer than the sequence length.
    """

    loss: float
    accuracy: float
    macro_f1: float
    f1: dict[str, float]
    examples: int
    truncated: int
    tokens: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def f1_by_class(truth: np.ndarray, said: np.ndarray, classes: int) -> dict[int, float]:
    """F1 of every class that occurs in the truth (n,) or in what was said (n,), both of numbers below ``classes``."""
    found = {}
    for number in range(classes):
        is_it, says_it = truth == number, said == number
        if total := int(is_it.sum() + says_it.sum()):  # 2 tp + fp + fn
            found[number] = 2 * int((is_it & says_it).sum()) / total
    return found


@torch.no_grad()
def score_classes(
    model: nn.Module,
    texts: Labelled,
    names: Sequence[str],
    micro_tokens: int,
    *,
    pad_token: int = 0,
    progress: Callable[[int], None] = lambda texts: None,
) -> ClassScore:
    """Score a classifier on all texts.

    Args:
        names: of the classes, in the order of the model's outputs.
        micro_tokens: tokens that run at a time, padding counted.
        progress: called with the number of texts gone through so far.
    """
    model.eval()
    device = next(p for p in model.parameters() if not p.is_meta).device
    said = np.empty(texts.store.documents, np.int64)
    loss, done = 0.0, 0
    for numbers in texts.divide(range(texts.store.documents), micro_tokens):
        batch = texts.batch(numbers, pad_token).to(device)
        if batch.task:
            choose_task(model, batch.task)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()  # (texts, classes)
        loss += float(functional.cross_entropy(logits, batch.targets, reduction="sum"))
        said[numbers] = logits.argmax(-1).cpu().numpy()
        progress(done := done + len(numbers))
    f1 = f1_by_class(texts.classes, said, len(names))
    accuracy = float((said == texts.classes).mean())
    macro = sum(f1.values()) / len(f1)
    by_name = {names[number]: value for number, value in f1.items()}
    return ClassScore(loss / len(said), accuracy, macro, by_name, len(said), texts.truncated, int(texts.lengths.sum()))
