"""Cross-entropy over a large vocabulary without ever holding the logits of all tokens.

The head runs on a few hundred tokens at a time; each chunk's logits give their part of the loss *and*
their gradient at once, and are then dropped. So backward recomputes nothing, and the memory is one chunk
of logits plus the gradient of the hidden states, whatever the vocabulary.

Works for any head: plain, tied, adapted, with logits scaled or soft-capped. ``project`` maps hidden
states to logits; ``leaves`` are the tensors inside it that need gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from espalier.memory import stablemax

Project = Callable[[torch.Tensor], torch.Tensor]
Kind = Literal["cross_entropy", "stablemax", "entropy"]
"""What is summed: the cross-entropy of the targets, that under StableMax, or how unsure the predictions are."""


def _losses_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float, confidence: torch.Tensor | None, kept: torch.Tensor, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The cross-entropies (n,) of a chunk, and if ``wanted`` the gradient of each in float32."""
    targets = targets[:, None]
    wide = logits.float()
    right = wide.gather(-1, targets)
    if smoothing:  # the target (1 - e) y + e / V: its cross-entropy takes the mean of the logits, and no further row of them
        right = torch.lerp(right, wide.mean(-1, keepdim=True), smoothing)
    # not logsumexp, which makes another tensor of the logits' size, and exponentiates twice where the gradient is wanted
    largest = wide.amax(-1, keepdim=True)
    powers = (wide - largest if wide is logits else wide.sub_(largest)).exp_()
    sums = powers.sum(-1, keepdim=True)
    losses = (largest + sums.log() - right).squeeze(-1)
    if confidence is not None:
        confidence += torch.where(kept, sums.squeeze(-1).reciprocal(), 0.0).sum(dtype=torch.float64)
    if not wanted:
        return losses, None
    probabilities = powers.div_(sums)
    if smoothing:
        probabilities.sub_(smoothing / probabilities.shape[-1])
    probabilities.scatter_add_(-1, targets, torch.full_like(sums, smoothing - 1.0))
    return losses, probabilities


def _entropies_and_gradient(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entropies (n,) of a chunk's predictions, and the gradient of each in float32.

    H = -sum_j p_j log p_j; dH / dz_j = -p_j (log p_j + H).
    """
    logs = logits.float().log_softmax(-1)
    probabilities = logs.exp()
    entropies = -(probabilities * logs).sum(-1, keepdim=True)
    return entropies.squeeze(-1), -probabilities * (logs + entropies)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, project: Project, targets: torch.Tensor, scale: float, chunk: int, kind: Kind, smoothing: float,
        confidence: torch.Tensor | None, weights: torch.Tensor | None, each: torch.Tensor | None, hidden: torch.Tensor, *leaves: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        inputs = [t for t in (hidden, *leaves) if t.requires_grad] if each is None else []
        # summed in float32: a bf16 sum would lose more the more chunks there are
        gradients = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves if inputs and leaf.requires_grad]
        hidden_gradient = torch.empty_like(hidden) if inputs and hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part = hidden[start : start + chunk].detach().requires_grad_(hidden.requires_grad)
            with torch.set_grad_enabled(bool(inputs)):
                logits = project(part)
            some = targets[start : start + chunk]
            kept, some = some >= 0, some.clamp_min(0)
            gradient: torch.Tensor | None
            if kind == "entropy":
                losses, gradient = _entropies_and_gradient(logits.detach())
            elif kind == "stablemax":
                losses, gradient = stablemax.losses_and_gradient(logits.detach(), some)
            else:
                losses, gradient = _losses_and_gradient(logits.detach(), some, smoothing, confidence, kept, bool(inputs))
            losses = torch.where(kept, losses, 0.0)
            if each is not None:
                each[start : start + chunk] = losses
            factors = kept * scale
            if weights is not None:
                losses, factors = losses * weights[start : start + chunk], factors * weights[start : start + chunk]
            total += losses.sum(dtype=torch.float64)
            if gradient is None or not inputs:
                continue
            gradient = gradient.mul_(factors[:, None]).to(logits.dtype)
            wanted = ([part] if hidden.requires_grad else []) + [leaf for leaf in leaves if leaf.requires_grad]
            found = torch.autograd.grad(logits, wanted, gradient, allow_unused=True)
            if hidden_gradient is not None:
                hidden_gradient[start : start + chunk] = found[0]
                found = found[1:]
            for sum_, piece in zip(gradients, found, strict=True):
                if piece is not None:
                    sum_ += piece
        ctx.save_for_backward(*([hidden_gradient] if hidden_gradient is not None else []), *gradients)
        ctx.dtypes = [t.dtype for t in (hidden, *leaves)]
        ctx.needs = (bool(inputs) and hidden.requires_grad, [bool(inputs) and leaf.requires_grad for leaf in leaves])
        return (total * scale).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        hidden, leaves = ctx.needs
        results = [next(saved) * gradient if need else None for need in (hidden, *leaves)]
        dtypes = ctx.dtypes
        results = [r if r is None else r.to(dtype) for r, dtype in zip(results, dtypes, strict=True)]
        return (*[None] * 9, *results)


def chunked_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, project: Project, leaves: Sequence[torch.Tensor], scale: float, chunk: int, *,
    kind: Kind = "cross_entropy", label_smoothing: float = 0.0, confidence: torch.Tensor | None = None,
    weights: torch.Tensor | None = None, each: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``scale`` times the sum of the losses of ``targets``.

    Args:
        hidden: (n, features), the head's input.
        targets: (n,) int64; negative ones are not predicted.
        project: the head, from (n, features) to logits (n, vocabulary).
        leaves: tensors in ``project`` that may need gradients.
        scale: usually 1 / (target tokens of the whole step).
        chunk: tokens whose logits are held at a time, at least 1.
        kind: which loss; of the entropy of predictions it means nothing which tokens the targets are.
        label_smoothing: share of every target that is spread over the whole vocabulary, in [0, 1) (arXiv:1512.00567); of a
            cross-entropy only.
        confidence: a 0-d float64 tensor to which the largest probability of every target is added; of a cross-entropy only.
        weights: (n,) float32, what the loss of each target is multiplied by.
        each: (n,), which takes the loss of each target, 0 where nothing is predicted; the result then has no gradient.

    Returns:
        A 0-d float32 tensor; summed in float64.
    """
    if not torch.is_grad_enabled():
        leaves = ()  # that they could have gradients would make some
    return _ChunkedCrossEntropy.apply(project, targets, scale, chunk, kind, label_smoothing, confidence, weights, each, hidden, *leaves)
