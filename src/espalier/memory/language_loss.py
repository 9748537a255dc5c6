"""The loss of a causal language model, from packed or padded batches, through the chunked cross-entropy.

:func:`install` teaches a model's own forward one more keyword, ``targets``: with it the model returns the
loss and not logits. Going through the model's forward keeps everything that hooks on it working (sharding,
shared factors, compilation).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from espalier.anatomy.classification import is_classifier
from espalier.data.batches import Batch
from espalier.errors import EspalierError
from espalier.memory.chunked_loss import Kind, chunked_cross_entropy
from espalier.memory.class_loss import ClassLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LanguageLoss:
    """Mixin: ``model(targets=..., scale=..., ...)`` gives ``scale`` times the summed cross-entropy.

    ``rows`` (n,) are the flat positions that are predicted, ``None`` for all; ``targets`` (n,) what is. ``kind``,
    ``label_smoothing``, ``confidence``, ``weights`` and ``each`` are those of
    :func:`~espalier.memory.chunked_loss.chunked_cross_entropy`.
    """

    espalier_chunk: int

    def forward(
        self, *args: Any, targets: torch.Tensor | None = None, rows: torch.Tensor | None = None, scale: float = 1.0,
        kind: Kind = "cross_entropy", label_smoothing: float = 0.0, confidence: torch.Tensor | None = None,
        weights: torch.Tensor | None = None, each: torch.Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if targets is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        backbone = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        hidden = backbone(*args, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if rows is not None:
            hidden = hidden[rows]
        with _tensors_of(self.get_output_embeddings()) as leaves:  # type: ignore[attr-defined]
            return chunked_cross_entropy(
                hidden, targets, head_of(self), leaves, scale, self.espalier_chunk, kind=kind, label_smoothing=label_smoothing,  # type: ignore[arg-type]
                confidence=confidence, weights=weights, each=each,
            )  # fmt: skip


_made: dict[Any, Any] = {}
"""Class of a model -> the subclass that knows its loss: that of its head."""


def install(model: PreTrainedModel, chunk: int) -> None:
    """Teach the model's forward the keyword ``targets``; ``chunk`` tokens' logits are held at a time.

    Raises:
        EspalierError: when the model has neither a language-model head nor one that classifies.
    """
    kind = ClassLoss if is_classifier(model) else LanguageLoss
    if kind is LanguageLoss and model.get_output_embeddings() is None:
        raise EspalierError(f"{type(model).__name__} has no language-model head; tune and eval need a causal language model")
    if not isinstance(model, kind):
        model.__dict__["_espalier_plain"] = type(model)
        plain = type(model)
        model.__class__ = _made.setdefault(plain, type(plain.__name__, (kind, plain), {}))
    model.__dict__["espalier_chunk"] = chunk


def remove(model: nn.Module) -> None:
    """Give the model its own forward back."""
    if plain := model.__dict__.pop("_espalier_plain", None):
        model.__class__ = plain
        del model.__dict__["espalier_chunk"]


@contextlib.contextmanager
def _tensors_of(head: Any) -> Iterator[list[torch.Tensor]]:
    """The tensors in a head that need gradients, the same ones in every call meanwhile."""
    with head.espalier_held() if hasattr(head, "espalier_held") else contextlib.nullcontext(list(head.parameters())) as own:
        yield [tensor for tensor in own if tensor.requires_grad]


def head_of(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map from final hidden states to logits.

    Soft caps and scales of logits are read from the config, as the families of transformers name them.
    """
    config = model.config
    head: Any = model.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divide = getattr(config, "logits_scaling", None) or 1.0  # Granite

    def project(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        if scale != 1.0 or divide != 1.0:
            logits = logits * (scale / divide)
        return torch.tanh(logits / cap) * cap if cap else logits

    return project


def run_batch(model: nn.Module, batch: Batch, scale: float, **terms: Any) -> torch.Tensor:
    """``scale`` times the batch's summed loss; ``terms`` (``kind``, ``weights``, ...) are those of :class:`LanguageLoss`."""
    if batch.attention_mask is not None:
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
    else:
        inputs = {"position_ids": batch.position_ids, "segment_lengths": batch.lengths}
    return model(input_ids=batch.input_ids, targets=batch.targets, rows=batch.rows, scale=scale, **inputs, **terms)


@torch.no_grad()
def matches_logits(model: PreTrainedModel, vocabulary: int) -> bool:
    """Whether :func:`head_of` gives this model the logits that its own forward gives."""
    device = next(model.parameters()).device
    ids = ((torch.arange(9, device=device) * 7919 + 13) % vocabulary)[None]
    own = model(input_ids=ids).logits
    backbone = getattr(model, model.base_model_prefix, None)
    if backbone is None:
        return False
    ours = head_of(model)(backbone(input_ids=ids, use_cache=False).last_hidden_state)
    return own.shape == ours.shape and bool((own - ours).abs().max() <= 1e-5 * own.abs().max().clamp_min(1))
