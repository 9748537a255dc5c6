"""Branches inside attention, whatever attention implementation a model runs (eager, sdpa, flash, our packed one).

The implementation gives ``out``, the softmax-weighted values. A branch adds to the softmax's numerator and denominator.
With the logarithm ``lse`` of the denominator that the implementation had,

    out' = (e^lse out + e^c n) / (e^lse + e^c d)

where n, d and c are the branch's (a prefix: the weighted values of its own keys, 1, and the log-sum-exp of their
logits). That is the gated form of arXiv:2110.04366, and it equals attention over the concatenated keys. Implementations
do not give lse. The CPU's kernel behind ``sdpa`` and our packed attention has it, and :class:`_Attention` is that kernel
with lse as a second output. For all others :func:`log_sum_exp` computes it again from queries, keys and mask, some rows
at a time, in the backward pass too, so that no logits are kept.

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
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from espalier.kernels import windows

if TYPE_CHECKING:
    from espalier.attach.places import HeadsSlot

_NUMBERS = 1 << 22
"""Logits that are in memory at a time."""


class BranchedInterface(AttentionInterface):
    """The registry of attention functions, each with the branches of the module that calls it behind it."""

    def get_interface(self, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(_with_branches, attn_implementation, super().get_interface(attn_implementation, default))


def install() -> None:
    """Let models find the branches of their attention."""
    ALL_ATTENTION_FUNCTIONS.__class__ = BranchedInterface


def _with_branches(
    implementation: str, attend: Callable[..., Any], module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    slots: list[HeadsSlot] = [slot for slot in module.__dict__.get("_espalier_heads", ()) if slot.active]
    if not slots:
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, lengths = kwargs.get("softcap"), kwargs.get("segment_lengths")
    if slots[0].site.heads != query.shape[1] or kwargs.get("position_bias") is not None:
        raise RuntimeError(f"{type(module).__name__} attends in a way that branches in attention do not know")
    mask, causal, window = _reach(module, query, attention_mask, kwargs)
    weights = None
    # lse is (batch, heads, tokens, 1), and so is out but for its last dimension
    if not args and mask is None and _has_kernel(implementation, query, key, value, causal, window, kwargs):
        out, lse = _attention(query, key, value, causal, lengths, scaling)
    else:
        output, weights = attend(module, query, key, value, attention_mask, *args, **kwargs)
        out = output.transpose(1, 2)
        lse = log_sum_exp(query, key, mask, causal, window, lengths, scaling, softcap)
        if (sinks := kwargs.get("s_aux")) is not None:
            lse = torch.logaddexp(lse, sinks.to(lse.dtype).reshape(1, -1, 1, 1))
    dtype = out.dtype
    for slot in slots:
        numerator, denominator, log_scale = slot.terms(query, scaling, softcap)
        top = torch.maximum(lse, torch.as_tensor(log_scale, device=lse.device)).detach()
        here, there = torch.exp(lse - top), torch.exp(log_scale - top)
        total = here + there * denominator
        seen = total > 0  # a padding row may see nothing, and a branch may have nothing for it
        weight = torch.where(seen, slot.gain * there / torch.where(seen, total, 1.0), 0.0)
        out = out * (1 - weight * denominator) + numerator * weight  # in lse's dtype; what is kept is in the model's
        here = here + slot.gain.clamp_min(0) * there * denominator  # what a branch takes away does not count for those behind it
        lse = torch.where(seen, top + torch.log(torch.where(seen, here, 1.0)), lse)
    return out.transpose(1, 2).to(dtype), weights


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


_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_ROOM = 8
"""Channels beside those of a head, for one number: the kernel's code for bfloat16 wants an even number of them."""


def _has_kernel(
    implementation: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, window: int | None, kwargs: dict[str, Any]
) -> bool:
    """Whether the implementation is one behind which the CPU's kernel stands, and but for a mask nothing but causality hides a key."""
    is_plain = all(t.stride(-1) == 1 and t.dtype == query.dtype and t.shape[-1] == query.shape[-1] for t in (query, key, value))
    square, near = query.shape[2] == key.shape[2], window is not None and window < key.shape[2]
    return (
        implementation in ("sdpa", windows.NAME) and query.device.type == "cpu" and query.dtype.is_floating_point
        and query.dtype != torch.float16 and is_plain and (square or not causal) and not near and not kwargs.get("dropout")
        and kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    )  # fmt: skip


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, lengths: tuple[int, ...] | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp, (batch, heads, tokens, head_dim) and (batch, heads, tokens, 1); arguments as of :func:`log_sum_exp`."""
    if lengths is None:
        return _Attention.apply(query, *windows.of_every_head(query, key, value), causal, scaling)
    parts = [
        (windows.joined(out, size, own), windows.joined(lse, size, own))
        for (size, own), q, k, v in windows.batches(query, key, value, lengths, causal)
        for out, lse in [_Attention.apply(q, k, v, causal and size > 1, scaling)]
    ]
    out, lse = (torch.cat(part, 1).transpose(1, 2) for part in zip(*parts, strict=True))
    return out, lse


class _Attention(torch.autograd.Function):
    """The CPU's kernel with its log-sum-exp as a second output, in the backward pass too.

    The slope of logits p ∘ (dO V^T - rowsum(dO ∘ O)) needs + p dlse. A channel more, in which V is one, dO is dlse and O is
    zero, adds it, and nothing else.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _KERNEL(query, key, value, 0.0, causal, scale=scaling)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = (causal, scaling)
        return out, lse[..., None]

    @staticmethod
    def backward(ctx: Any, of_out: torch.Tensor, of_lse: torch.Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        causal, scaling = ctx.options
        size = query.shape[-1]

        def beside(tensor: torch.Tensor, number: torch.Tensor | float) -> torch.Tensor:
            wide = functional.pad(tensor, (0, _ROOM))
            wide[..., size : size + 1] = number
            return wide

        of_out, query, key, value, out = (
            beside(tensor, number) for tensor, number in ((of_out, of_lse), (query, 0.0), (key, 0.0), (value, 1.0), (out, 0.0))
        )
        gradients = _KERNEL_BACKWARD(of_out, query, key, value, out, lse, 0.0, causal, scale=scaling)
        return *(gradient[..., :size] for gradient in gradients), None, None


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


class _LogSumExp(torch.autograd.Function):
    """Saves queries and keys, which attention saves too, and one number a row."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool, window: int | None,
        scaling: float, softcap: float | None,
    ) -> torch.Tensor:  # fmt: skip
        ctx.options = (causal, window, scaling, softcap)
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
