"""What a model is taught for the time of a run: its loss, packed attention and recomputation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from espalier.memory import language_loss, packed_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def training_form(model: PreTrainedModel, *, chunk: int, recompute: bool, padded: bool) -> Iterator[None]:
    """Let a model return its loss, ``chunk`` tokens' logits at a time; pack unless ``padded``; recompute activations or not."""
    language_loss.install(model, chunk)
    before = None if padded else packed_attention.install(model)
    if recompute:
        _recomputation(model, "enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if recompute:
            _recomputation(model, "disable")()
        if before is not None:
            packed_attention.restore(model, before)
        language_loss.remove(model)


def _recomputation(model: PreTrainedModel, what: str) -> Callable[..., None]:
    """transformers' own switch, whose name changed within version 5."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")
