"""Cross-entropy over a large vocabulary without ever holding the logits of all tokens.

The head runs on a few hundred tokens at a time; each chunk's logits give their part of the loss *and*
their gradient at once, and are then dropped. So backward recomputes nothing, and the memory is one chunk
of logits plus the gradient of the hidden states, whatever the vocabulary.

Works for any head: plain, tied, adapted, with logits scaled or soft-capped. ``project`` maps hidden
states to logits; ``leaves`` are the tensors inside it that need gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Project = Callable[[torch.Tensor], torch.Tensor]


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, smoothing: float, confidence: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropies of a chunk, and its gradient times ``scale``, in the dtype of the logits."""
    kept = targets >= 0
    targets = targets.clamp_min(0)[:, None]
    probabilities = logits.float()
    if probabilities is logits:
        probabilities = logits.clone()
    normalizer = probabilities.logsumexp(-1, keepdim=True)
    right = probabilities.gather(-1, targets)
    if smoothing:  # the target (1 - e) y + e / V: its cross-entropy takes the mean of the logits, and no further row of them
        right = torch.lerp(right, probabilities.mean(-1, keepdim=True), smoothing)
    losses = (normalizer - right).squeeze(-1)
    loss = torch.where(kept, losses, 0.0).sum(dtype=torch.float64)
    probabilities.sub_(normalizer).exp_()
    if confidence is not None:
        confidence += torch.where(kept, probabilities.amax(-1), 0.0).sum(dtype=torch.float64)
    if smoothing:
        probabilities.sub_(smoothing / probabilities.shape[-1])
    probabilities.scatter_add_(-1, targets, torch.full_like(normalizer, smoothing - 1.0))
    return loss, probabilities.mul_((kept * scale)[:, None]).to(logits.dtype)


def _entropy_and_gradient(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the entropies of a chunk's predictions where there is a target, whatever it is; and its gradient times ``scale``.

    H = -sum_j p_j log p_j; dH / dz_j = -p_j (log p_j + H).
    """
    kept = targets >= 0
    logs = logits.float().log_softmax(-1)
    probabilities = logs.exp()
    entropies = -(probabilities * logs).sum(-1, keepdim=True)
    total = torch.where(kept, entropies.squeeze(-1), 0.0).sum(dtype=torch.float64)
    return total, (-probabilities * (logs + entropies) * (kept * scale)[:, None]).to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, project: Project, targets: torch.Tensor, scale: float, chunk: int, entropy: bool, smoothing: float,
        confidence: torch.Tensor | None, hidden: torch.Tensor, *leaves: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        inputs = [t for t in (hidden, *leaves) if t.requires_grad]
        # summed in float32: a bf16 sum would lose more the more chunks there are
        gradients = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves if leaf.requires_grad]
        hidden_gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part = hidden[start : start + chunk].detach().requires_grad_(hidden.requires_grad)
            with torch.set_grad_enabled(bool(inputs)):
                logits = project(part)
            some = targets[start : start + chunk]
            if entropy:
                loss, gradient = _entropy_and_gradient(logits.detach(), some, scale)
            else:
                loss, gradient = _loss_and_gradient(logits.detach(), some, scale, smoothing, confidence)
            total += loss
            if not inputs:
                continue
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
        ctx.needs = (hidden.requires_grad, [leaf.requires_grad for leaf in leaves])
        return (total * scale).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        hidden, leaves = ctx.needs
        results = [next(saved) * gradient if need else None for need in (hidden, *leaves)]
        dtypes = ctx.dtypes
        results = [r if r is None else r.to(dtype) for r, dtype in zip(results, dtypes, strict=True)]
        return (None, None, None, None, None, None, None, *results)


def chunked_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, project: Project, leaves: Sequence[torch.Tensor], scale: float, chunk: int, *,
    entropy: bool = False, label_smoothing: float = 0.0, confidence: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``scale`` times the sum of the cross-entropies of ``targets``, or of the entropies of the predictions there.

    Args:
        hidden: (n, features), the head's input.
        targets: (n,) int64; negative ones are not predicted.
        project: the head, from (n, features) to logits (n, vocabulary).
        leaves: tensors in ``project`` that may need gradients.
        scale: usually 1 / (target tokens of the whole step).
        chunk: tokens whose logits are held at a time, at least 1.
        entropy: measures how unsure the predictions are; which tokens the targets are means nothing then.
        label_smoothing: share of every target that is spread over the whole vocabulary, in [0, 1] (arXiv:1512.00567).
        confidence: a 0-d float64 tensor to which the largest probability of every target is added.

    Returns:
        A 0-d float32 tensor; summed in float64.
    """
    if not torch.is_grad_enabled():
        leaves = ()  # that they could have gradients would make some
    return _ChunkedCrossEntropy.apply(project, targets, scale, chunk, entropy, label_smoothing, confidence, hidden, *leaves)
