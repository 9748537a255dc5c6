"""Branches inside attention, whatever attention implementation a model runs (eager, sdpa, flash, our packed one).

The implementation gives ``out``, the softmax-weighted values. A branch adds to the softmax's numerator and denominator.
With the logarithm ``lse`` of the denominator that the implementation had,

    out' = (e^lse out + e^c n) / (e^lse + e^c d)

where n, d and c are the branch's (a prefix: the weighted values of its own keys, 1, and the log-sum-exp of their
logits). That is the gated form of arXiv:2110.04366, and it equals attention over the concatenated keys. Implementations
do not give lse; :func:`log_sum_exp` computes it again from queries, keys and mask, some rows at a time, in the backward
pass too, so that no logits are kept.

transformers' models ask a registry for their attention function. Once a branch is put on, that registry hands out each
function with the branches behind it. Modules without branches are not affected.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

if TYPE_CHECKING:
    from espalier.attach.places import HeadsSlot

_NUMBERS = 1 << 22
"""Logits that are in memory at a time."""


class BranchedInterface(AttentionInterface):
    """The registry of attention functions, each with the branches of the module that calls it behind it."""

    def get_interface(self, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(_with_branches, super().get_interface(attn_implementation, default))


def install() -> None:
    """Let models find the branches of their attention."""
    ALL_ATTENTION_FUNCTIONS.__class__ = BranchedInterface


def _with_branches(
    attend: Callable[..., Any], module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    output, weights = attend(module, query, key, value, attention_mask, *args, **kwargs)
    slots: list[HeadsSlot] = [slot for slot in module.__dict__.get("_espalier_heads", ()) if slot.active]
    if not slots:
        return output, weights
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    reach = _reach(module, query, attention_mask, kwargs)
    lse = log_sum_exp(query, key, *reach, kwargs.get("segment_lengths"), scaling, softcap)  # (batch, heads, tokens, 1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).reshape(1, -1, 1, 1))
    if slots[0].site.heads != query.shape[1] or kwargs.get("position_bias") is not None:
        raise RuntimeError(f"{type(module).__name__} attends in a way that branches in attention do not know")
    out = output.transpose(1, 2).to(lse.dtype)
    for slot in slots:
        numerator, denominator, log_scale = slot.terms(query, scaling, softcap)
        top = torch.maximum(lse, torch.as_tensor(log_scale, device=lse.device)).detach()
        here, there = torch.exp(lse - top), torch.exp(log_scale - top)
        total = here + there * denominator
        out = out + slot.gain * there * (numerator - denominator * out) / total
        lse = top + torch.log(total)
    return out.transpose(1, 2).to(output.dtype), weights


def _reach(
    module: nn.Module, query: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, bool, int | None]:
    """What a query attends to, as the implementations read their arguments: (4-D mask, whether causal beside it, window)."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise RuntimeError(f"branches in attention do not know the mask of {module.config._attn_implementation}; set_attn_implementation('sdpa')")  # type: ignore[union-attr]
    if mask is not None and mask.dim() == 4:
        return mask, False, None
    if mask is not None:  # flash attention: (batch, keys)
        mask = mask.bool()[:, None, None, :]
    return mask, bool(causal) and query.shape[2] > 1, kwargs.get("sliding_window")


def log_sum_exp(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool, window: int | None,
    lengths: tuple[int, ...] | None, scaling: float, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """The logarithm of attention's denominator, (batch, heads, tokens, 1) in float32 (float64 for float64).

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, key-value heads, keys, head_dim); the last token is where the last key is.
        mask: 4-D, boolean (true: seen) or added to the logits; ``None``: all are seen.
        causal: whether a token sees no later key.
        window: how many keys back a token sees, or ``None`` for all; both ways where it is not causal.
        lengths: of the windows of a packed row, which do not see one another; ``None`` without.
        scaling: of the logits.
        softcap: c where logits become c tanh(logits / c), or ``None``.
    """
    if lengths is None:
        return _LogSumExp.apply(query, key, mask, causal, window, scaling, softcap)
    groups = [(length, len(list(group))) for length, group in itertools.groupby(lengths)]
    sizes = [length * count for length, count in groups]
    parts = []
    for (length, count), q, k in zip(groups, query.split(sizes, 2), key.split(sizes, 2), strict=True):
        # neighbours of equal length are a batch: (count, heads, length, head_dim)
        q, k = (t[0].unflatten(1, (count, length)).transpose(0, 1) for t in (q, k))
        lse = _LogSumExp.apply(q, k, None, causal and length > 1, window, scaling, softcap)
        parts.append(lse.transpose(0, 1).flatten(1, 2)[None])
    return torch.cat(parts, 2)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which exponentials are summed."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows(query: torch.Tensor, keys: int) -> int:
    """Tokens whose logits are made at a time."""
    return max(1, _NUMBERS // max(1, query.shape[0] * query.shape[1] * keys))


def _logits(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool, window: int | None, scaling: float,
    softcap: float | None, start: int, stop: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Logits of the tokens from ``start`` to ``stop``, (batch, heads, rows, keys), at least float32: before and after the mask."""
    batch, heads, tokens, size = query.shape
    count, keys = key.shape[1:3]
    rows = query[:, :, start:stop].reshape(batch, count, -1, size)  # the heads of a group share their keys
    logits = (rows @ key.transpose(-1, -2)).view(batch, heads, stop - start, keys).to(_wide(query)) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    masked = logits
    if mask is not None:
        part = (mask[..., start:stop, :] if mask.shape[-2] > 1 else mask)[..., :keys]
        masked = logits.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else logits + part
    if causal or window is not None:
        at = torch.arange(start, stop, device=query.device) + (keys - tokens)
        distance = at[:, None] - torch.arange(keys, device=query.device)
        hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
        if window is not None:
            hidden = hidden | (distance >= window if causal else distance.abs() > window)
        masked = masked.masked_fill(hidden, float("-inf"))
    return logits, masked


_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _is_fast(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool, window: int | None, softcap: float | None
) -> bool:
    """Whether the CPU's kernel does this (in bfloat16 it keeps code for every length; see ``memory/packed_attention.py``)."""
    plain = mask is None and window is None and softcap is None and (not causal or query.shape[2] == key.shape[2])
    return plain and query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)


class _LogSumExp(torch.autograd.Function):
    """Saves queries and keys, which attention saves too, and one number a row.

    Where nothing but causality is hidden, the CPU's own kernel does the work: it gives the log-sum-exp beside attention
    over the keys as values, ``o = softmax(q K^T) K``, in which the gradients are ``o`` for q and those of the values for K.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool, window: int | None,
        scaling: float, softcap: float | None,
    ) -> torch.Tensor:  # fmt: skip
        ctx.options = (causal, window, scaling, softcap)
        ctx.fast = _is_fast(query, key, mask, causal, window, softcap)
        if ctx.fast:
            own = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            out, lse = _KERNEL(query, own, own, 0.0, causal, scale=scaling)
            ctx.save_for_backward(query, key, out, lse)
            return lse[..., None]
        step, tokens = _rows(query, key.shape[2]), query.shape[2]
        parts = []
        for start in range(0, tokens, step):
            _, logits = _logits(query, key, mask, causal, window, scaling, softcap, start, min(start + step, tokens))
            parts.append(torch.logsumexp(logits, -1, keepdim=True))
        # a padding row may see nothing: a number whose exponential is 0 and whose difference to itself is 0
        lse = torch.cat(parts, 2).clamp_min(-1e30)
        ctx.save_for_backward(query, key, mask, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, mask, lse = ctx.saved_tensors
        causal, window, scaling, softcap = ctx.options
        batch, heads, tokens, size = query.shape
        count, keys = key.shape[1:3]
        if ctx.fast:
            own, out = key.repeat_interleave(heads // count, 1), mask
            _, _, slope = _KERNEL_BACKWARD(query * gradient, query, own, own, out, lse, 0.0, causal, scale=scaling)
            slope = slope.view(batch, count, heads // count, keys, size).sum(2)
            return out * gradient * scaling, slope * scaling, None, None, None, None, None
        step = _rows(query, keys)
        rows_gradient = []
        key_gradient = torch.zeros(key.shape, dtype=_wide(key), device=key.device)
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            logits, masked = _logits(query, key, mask, causal, window, scaling, softcap, start, stop)
            slope = torch.exp(masked - lse[:, :, start:stop]) * gradient[:, :, start:stop]
            if softcap is not None:
                slope = slope * (1 - (logits / softcap).square())
            slope = (slope * scaling).to(query.dtype).view(batch, count, -1, keys)
            rows = query[:, :, start:stop].reshape(batch, count, -1, size)
            rows_gradient.append((slope @ key).view(batch, heads, stop - start, size))
            key_gradient += slope.transpose(-1, -2) @ rows
        return torch.cat(rows_gradient, 2), key_gradient.to(key.dtype), None, None, None, None, None
