"""The loss of a sequence classifier, as a model in training form returns it (see ``memory/language_loss.py``)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional

from espalier.memory.chunked_loss import Kind
from espalier.memory.stablemax import stablemax_losses


class ClassLoss:
    """Mixin: ``model(targets=..., scale=..., ...)`` gives ``scale`` times the cross-entropy summed over the texts of a batch.

    ``targets`` (texts,) are their classes; ``label_smoothing`` is spread over all classes; ``kind`` is ``cross_entropy`` or
    ``stablemax``; ``weights`` (texts,) multiply the losses, and ``each`` takes them as they are. The logits are those of
    the model's own forward, in float32.
    """

    def forward(
        self, *args: Any, targets: torch.Tensor | None = None, rows: None = None, scale: float = 1.0, kind: Kind = "cross_entropy",
        label_smoothing: float = 0.0, weights: torch.Tensor | None = None, each: torch.Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if targets is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        plain = super().forward  # type: ignore[misc]
        if "use_cache" in inspect.signature(plain).parameters:
            kwargs["use_cache"] = False
        logits = plain(*args, **kwargs).logits  # (texts, classes)
        if kind == "stablemax":
            losses = stablemax_losses(logits, targets)
        else:
            losses = functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
        if each is not None:
            each.copy_(losses.detach())
        return scale * (losses if weights is None else losses * weights).sum()
