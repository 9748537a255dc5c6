"""The loss of a sequence classifier, as a model in training form returns it (see ``memory/language_loss.py``)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional


class ClassLoss:
    """Mixin: ``model(targets=..., scale=..., ...)`` gives ``scale`` times the cross-entropy summed over the texts of a batch.

    ``targets`` (texts,) are their classes; ``label_smoothing`` is spread over all classes. The logits are those of the
    model's own forward, in float32.
    """

    def forward(
        self, *args: Any, targets: torch.Tensor | None = None, rows: None = None, scale: float = 1.0, entropy: bool = False,
        label_smoothing: float = 0.0, confidence: None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if targets is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        plain = super().forward  # type: ignore[misc]
        if "use_cache" in inspect.signature(plain).parameters:
            kwargs["use_cache"] = False
        logits = plain(*args, **kwargs).logits  # (texts, classes)
        return scale * functional.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)
