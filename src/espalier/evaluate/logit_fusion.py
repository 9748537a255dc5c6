"""Dynamic logit fusion (C. Fan et al., arXiv:2406.15480): what tuning did to a small model, done to the logits of a large one.

For each next token, with the log-probabilities log P of a large model, log Q of a small one and log Q_t of its tuned experts,

    P~(alpha) = softmax(log P + sum_t alpha_t (log Q_t - log Q)),

and alpha in [0, 2]^T minimises ``sum_t (KL(P~||P) - KL(Q_t||Q))^2 + (KL(P||P~) - KL(Q||Q_t))^2``: the large model is moved as
far as the small one was. With alpha fixed at 1 it is proxy tuning (arXiv:2401.08565). No official code was found; this is from
the paper's equations. All models must have one vocabulary.

It is an alternative to a merge at the time of decoding: T + 2 forward passes for each token. Experts that are deltas of one small
base share its live module, and take no more memory than their tensors and their keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from espalier.attach.attachment import activate
from espalier.errors import EspalierError
from espalier.memory.language_loss import head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 2.0
"""The upper end of alpha."""
GRID, FINE, ZOOMS = 21, 9, 3
"""Points of the first grid over [0, 2]; of each finer one around the best point, between its neighbours; how many of those."""
EVALUATIONS = GRID + FINE * ZOOMS
"""Of the objective, for each expert and token; alpha is known to 2 / 20 / 4^3 = 0.0016."""
SWEEPS = 3
"""Over the experts, each in turn, when all of them may be active."""


@dataclass(frozen=True)
class Fused:
    """``log_probabilities`` (..., V) of P~, ``alpha`` (..., T) and the ``objective`` (...,) there, float32."""

    log_probabilities: torch.Tensor
    alpha: torch.Tensor
    objective: torch.Tensor


def divergences(log_p: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """KL(P~||P) and KL(P||P~), (..., 2), of ``P~ = softmax(log P + shift)``.

    With ``A = log sum P exp(shift)`` they are ``E_P~[shift] - A`` and ``A - E_P[shift]``.

    Args:
        log_p, shift: (..., V), which may broadcast.
    """
    moved = log_p + shift
    A = moved.logsumexp(-1, keepdim=True)
    there = ((moved - A).exp() * shift).sum(-1) - A.squeeze(-1)
    back = A.squeeze(-1) - (log_p.exp() * shift).sum(-1)
    return torch.stack((there, back), -1).clamp_min(0)  # what rounding leaves below zero


def _search(log_p: torch.Tensor, offset: torch.Tensor, direction: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha (...,) in [0, 2] of least objective for ``shift = offset + alpha direction``, all (..., V), and the objective.

    Args:
        wanted: KL(Q_t||Q) and KL(Q||Q_t) of every expert, (..., T, 2).
    """
    start = log_p + offset
    sums = torch.stack((torch.ones_like(log_p), offset, direction), -2).mT  # of exp(..), once, or times offset or direction
    _, of_offset, of_direction = (log_p.exp().unsqueeze(-2) @ sums).squeeze(-2).unbind(-1)

    def value(alpha: torch.Tensor) -> torch.Tensor:
        moved = torch.addcmul(start, direction, alpha.unsqueeze(-1))
        peak = moved.amax(-1, keepdim=True)
        total, by_offset, by_direction = (moved.sub_(peak).exp_().unsqueeze(-2) @ sums).squeeze(-2).unbind(-1)
        A = total.log() + peak.squeeze(-1)
        there, back = (by_offset + alpha * by_direction) / total - A, A - of_offset - alpha * of_direction
        return _objective(torch.stack((there, back), -1).clamp_min(0), wanted)

    def best(points: list[torch.Tensor], alpha: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for point in points:  # one by one: a row of a large vocabulary stays in the cache
            found = value(point)
            alpha, least = torch.where(found < least, point, alpha), torch.minimum(found, least)
        return alpha, least

    alpha = torch.zeros_like(of_offset)
    step = LARGEST / (GRID - 1)
    alpha, least = best([alpha + step * i for i in range(GRID)], alpha, torch.full_like(alpha, torch.inf))
    for _ in range(ZOOMS):
        finer = 2 * step / (FINE - 1)
        alpha, least = best([(alpha - step + finer * i).clamp(0, LARGEST) for i in range(FINE)], alpha, least)
        step = finer
    return alpha, least


def _objective(apart: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How far P~ is from being as far from P (..., 2) as every expert is from the small base (..., T, 2): (...,)."""
    return (apart.unsqueeze(-2) - wanted).square().sum((-2, -1))


def fuse(
    large: torch.Tensor, base: torch.Tensor, experts: torch.Tensor, *, alpha: float | None = None, active: Literal["one", "all"] = "one"
) -> Fused:
    """Logits of a large model, moved as those of a small one were by its tuning.

    Args:
        large, base: logits of the large model and of the small base, (..., V).
        experts: logits of the small base's tuned models, (T, ..., V).
        alpha: the same fixed coefficient of every expert; by default those of least objective.
        active: whether one expert acts on a token, the one with which the (whole) objective is least, or all may: these are
            searched for in turn, from the best single one.
    """
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (large, base))
    directions = experts.float().log_softmax(-1) - log_q
    wanted = divergences(log_q, directions).movedim(0, -2)  # (..., T, 2)
    count = len(directions)
    if alpha is not None:
        alphas = torch.full((count, *log_p.shape[:-1]), float(alpha), device=log_p.device)
    else:
        nothing = torch.zeros_like(log_p)
        single, least = zip(*[_search(log_p, nothing, direction, wanted) for direction in directions], strict=True)
        lowest, place = torch.stack(least).min(0)
        chosen = torch.nn.functional.one_hot(place, count).movedim(-1, 0)
        alphas = torch.stack(single) * chosen
        for turn in range(SWEEPS * count if active == "all" and count > 1 else 0):
            expert = turn % count
            others = (alphas.unsqueeze(-1) * directions).sum(0) - alphas[expert].unsqueeze(-1) * directions[expert]
            better, found = _search(log_p, others, directions[expert], wanted)
            alphas[expert] = torch.where(found < lowest, better, alphas[expert])
            lowest = torch.minimum(found, lowest)
    shift = (alphas.unsqueeze(-1) * directions).sum(0)
    return Fused((log_p + shift).log_softmax(-1), alphas.movedim(0, -1), _objective(divergences(log_p, shift), wanted))


@dataclass(frozen=True)
class Voice:
    """A model with some of the deltas that it carries; several voices may share a model."""

    model: PreTrainedModel
    deltas: tuple[str, ...] = ()

    def speaking(self) -> Any:
        """The model, with these deltas acting and no others."""
        activate(self.model, self.deltas)
        return self.model


class NextLogits:
    """The logits of the token that follows a text, which grows; the keys and values of what was there are kept."""

    def __init__(self, voice: Voice) -> None:
        self.voice = voice
        self._past: Any = None
        self._seen = 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, V) of ids (1, n), of which those of the call before are the beginning.

        Raises:
            EspalierError: when the model keeps no keys and values.
        """
        model = self.voice.speaking()
        few = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        result = model(ids[:, self._seen :], attention_mask=torch.ones_like(ids), past_key_values=self._past, use_cache=True, **few)
        self._past, self._seen = getattr(result, "past_key_values", None), ids.shape[1]
        if self._past is None:
            raise EspalierError(f"{type(model).__name__} keeps no keys and values; it cannot be an expert of a fusion")
        return result.logits[:, -1]


@dataclass
class Fusion:
    """How the logits of one position become those of the fusion, and the coefficients so far.

    Args:
        alpha, active: see :func:`fuse`.
    """

    alpha: float | None
    active: Literal["one", "all"]
    _sum: torch.Tensor | None = None
    _positions: int = 0

    def __call__(self, large: torch.Tensor, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
        """log P~ (n, V) of logits (n, V) each; rows beyond the smallest vocabulary are padding, and have no probability."""
        width = min(logits.shape[-1] for logits in (large, base, *experts))
        cut = [logits[:, :width].to(large.device) for logits in (large, base, *experts)]
        fused = fuse(cut[0], cut[1], torch.stack(cut[2:]), alpha=self.alpha, active=self.active)
        found = fused.alpha.double().sum(0)
        self._sum, self._positions = found if self._sum is None else self._sum + found, self._positions + len(large)
        made = torch.full_like(large, -torch.inf, dtype=torch.float32)
        made[:, :width] = fused.log_probabilities
        return made

    @property
    def mean_alpha(self) -> list[float]:
        """Of every expert, over the positions so far."""
        return [] if self._sum is None else (self._sum / self._positions).tolist()


class Decoding:
    """What generation calls with the large model's logits of each token."""

    def __init__(self, fusion: Fusion, base: Voice, experts: Sequence[Voice]) -> None:
        self.fusion = fusion
        self._models = [NextLogits(voice) for voice in (base, *experts)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """log P~ (1, V) from ids (1, n) and logits (1, V)."""
        base, *experts = [model(input_ids) for model in self._models]
        return self.fusion(scores, base, experts)


class FusedLoss(nn.Module):
    """Stands for a model that ``memory.language_loss`` has been installed on, as all of these have been: to score a fusion.

    Args:
        chunk: positions whose logits are held at a time.
    """

    def __init__(self, fusion: Fusion, large: Voice, base: Voice, experts: Sequence[Voice], chunk: int) -> None:
        super().__init__()
        self.large = large.model  # whose device inputs are put on
        self.fusion, self.chunk = fusion, chunk
        self._voices = (large, base, *experts)

    def forward(
        self, targets: torch.Tensor, rows: torch.Tensor | None, scale: float, confidence: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor:  # fmt: skip
        """``scale`` times the summed cross-entropy of targets (n,)."""
        hidden = []
        for voice in self._voices:
            model = voice.speaking()
            states = getattr(model, model.base_model_prefix)(use_cache=False, **inputs).last_hidden_state.flatten(0, -2)
            hidden.append(states if rows is None else states[rows])
        total = torch.zeros((), dtype=torch.float64, device=targets.device)
        for start in range(0, len(targets), self.chunk):
            part = targets[start : start + self.chunk]
            kept = part >= 0
            large, base, *experts = [
                head_of(voice.speaking())(states[start : start + self.chunk][kept]) for voice, states in zip(self._voices, hidden, strict=True)
            ]
            if not len(large):
                continue
            found = self.fusion(large, base, experts)
            total -= found.gather(-1, part[kept, None]).sum(dtype=torch.float64)
            if confidence is not None:
                confidence += found.amax(-1).exp().sum(dtype=torch.float64)
        return (total * scale).float()


def require_one_vocabulary(large: Any, other: Any, where: str) -> None:
    """Refuse tokenizers that give other ids.

    Raises:
        EspalierError: naming a token that differs.
    """
    one, two = large.get_vocab(), other.get_vocab()
    if one != two:
        token = min(token for token in one.keys() | two.keys() if one.get(token) != two.get(token))
        raise EspalierError(
            f"the tokenizer of {where} has {token!r} as {two.get(token, 'no token')}, the large model's as {one.get(token, 'no token')}; "
            "logits are fused token by token, so the vocabulary must be the same"
        )
