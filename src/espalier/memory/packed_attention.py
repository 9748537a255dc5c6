"""Attention that stays inside each window of a packed row, at the cost of the windows alone.

Registered with transformers as an attention implementation; the lengths of the windows arrive as the
keyword ``segment_lengths`` that the model passes through to its attention. Windows of equal length that
lie side by side run as one batch, so a row of equal windows costs what a batch of them does. There is no
mask of tokens x tokens and no padding. A family whose attention cannot be reached this way is padded
instead: :func:`packs` finds out by comparing outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from espalier.kernels import windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REACH = 3


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **unknown: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed row: query (1, heads, tokens, dim), key and value with as many or fewer heads.

    Returns:
        (1, tokens, heads, dim), and ``None`` for the weights.
    """
    if segment_lengths is None:
        raise RuntimeError("packed attention needs segment_lengths; this model's family does not pass it through")
    if unknown.get("s_aux") is not None or unknown.get("position_bias") is not None:
        raise RuntimeError("packed attention knows neither attention sinks nor position biases")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    outputs = [
        windows.joined(_attend(q, k, v, causal, scaling, dropout, sliding_window, softcap), size, lengths)
        for (size, lengths), q, k, v in windows.batches(query, key, value, segment_lengths, causal)
    ]
    return torch.cat(outputs, 1), None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scaling: float | None, dropout: float,
    window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    length = q.shape[-2]
    reach = window if window is not None and window < length else length
    if reach == length and softcap is None:
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=causal and length > 1)
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position[None, :]
    allowed = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
    if reach < length:
        allowed &= distance.abs() < reach if causal else distance.abs() <= reach
    if softcap is None:
        return functional.scaled_dot_product_attention(q, k, v, allowed, dropout_p=dropout, scale=scaling)
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~allowed, float("-inf"))
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return functional.dropout(weights, dropout) @ v


def install(model: PreTrainedModel) -> str:
    """Make a transformers model use packed attention; returns the implementation that it had."""
    from transformers import AttentionInterface

    AttentionInterface.register(windows.NAME, packed_attention)
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(windows.NAME)
    return before


def restore(model: PreTrainedModel, implementation: str) -> None:
    """Give the model back the attention implementation that it had."""
    model.set_attn_implementation(implementation)


@contextlib.contextmanager
def _short_reach(model: nn.Module) -> Iterator[None]:
    """Let sliding and chunked attention reach no farther than a few tokens, so that a short window shows how."""
    owners = {id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", None)) if owner is not None}
    before = [
        (owner, name, reach)
        for owner in owners.values()
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(reach := vars(owner).get(name), int) and reach > _REACH
    ]
    try:
        for owner, name, _ in before:
            setattr(owner, name, _REACH)
        yield
    finally:
        for owner, name, reach in before:
            setattr(owner, name, reach)


@torch.no_grad()
def packs(model: PreTrainedModel, vocabulary: int) -> bool:
    """Whether packed windows give this model the logits that they have alone.

    Compares three short windows, packed and each by itself, under the model's own attention: to 1e-5 of
    the logits' size in float32, to the rounding of the dtype otherwise. Attention that slides is made to
    slide within these windows: some families tell it to their mask and not to their attention.
    """
    with _short_reach(model):
        return _packs(model, vocabulary)


def _packs(model: PreTrainedModel, vocabulary: int) -> bool:
    device = next(model.parameters()).device
    lengths = (7, 4, 5)
    ids = (torch.arange(sum(lengths), device=device) * 7919 + 13) % vocabulary
    alone = torch.cat([model(input_ids=part[None]).logits[0] for part in ids.split(lengths)])
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    before = install(model)
    try:
        packed = model(input_ids=ids[None], position_ids=positions[None], segment_lengths=lengths, use_cache=False).logits[0]
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        restore(model, before)
    tolerance = 1e-5 if alone.dtype == torch.float32 else 8 * torch.finfo(alone.dtype).eps
    return bool((packed - alone).abs().max() <= tolerance * alone.abs().max().clamp_min(1))
