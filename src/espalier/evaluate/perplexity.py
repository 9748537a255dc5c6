"""Loss, perplexity and bits per byte of a causal language model on a token store.

Every prediction of every document is scored exactly once, in windows that overlap by half so that it sees
at least half a window of context where the document has it (``data.batches.scoring_windows``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from espalier.attach.tasks import choose_task
from espalier.data.batches import IGNORED, Window, assemble, scoring_windows
from espalier.data.store import TokenStore
from espalier.memory.language_loss import run_batch


@dataclass(frozen=True)
class Score:
    """``loss`` in nats per target token; ``bits_per_byte`` over the UTF-8 bytes of the target text.

    ``confidence`` is the mean over target tokens of the largest probability that the model gives any token there.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    confidence: float
    tokens: int
    bytes: int
    documents: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _groups(windows: Iterable[tuple[Window, int]], micro_tokens: int, padded: bool) -> Iterator[list[tuple[Window, int]]]:
    """Windows in order, as many at a time as fit."""
    group: list[tuple[Window, int]] = []
    longest = 0
    for window, skip in windows:
        longest = max(longest, len(window))
        size = longest * (len(group) + 1) if padded else sum(len(w) for w, _ in group) + len(window)
        if group and size > micro_tokens:
            yield group
            group, longest = [], len(window)
        group.append((window, skip))
    if group:
        yield group


@torch.no_grad()
def score(
    model: nn.Module,
    store: TokenStore,
    sequence_length: int,
    micro_tokens: int,
    *,
    padded: bool = False,
    pad_token: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Score a model (that ``memory.language_loss`` has been installed on) on a whole store.

    Args:
        micro_tokens: tokens that run at a time.
        progress: called with the number of predictions gone through so far, of ``store.predictions``.
    """
    model.eval()
    device = next(p for p in model.parameters() if not p.is_meta).device
    total, count, done = 0.0, 0, 0
    confidence = torch.zeros((), dtype=torch.float64, device=device)
    of_tasks = store.by_task(scoring_windows(store, sequence_length), lambda one: store.document_at(one[0].start))
    for task, group in ((task, group) for task, windows in of_tasks.items() for group in _groups(windows, micro_tokens, padded)):
        if task:
            choose_task(model, task)
        inputs, targets = [], []
        for window, skip in group:
            row = store.read(window.start, window.stop + 1)
            flags = store.read_targets(window.start + 1, window.stop + 1)
            wanted = row[1:].copy()
            wanted[:skip] = IGNORED
            inputs.append(row[:-1])
            targets.append(wanted if flags is None else np.where(flags, wanted, IGNORED))
        batch = assemble(inputs, targets, micro_tokens, padded, pad_token).to(device)
        total += float(run_batch(model, batch, 1.0, confidence=confidence))
        count += batch.target_count
        done += sum(len(window) - skip for window, skip in group)
        progress(done)
    nbytes = int(store.nbytes.sum())
    loss = total / max(count, 1)
    perplexity = math.exp(min(loss, 700.0))
    bits = total / math.log(2) / max(nbytes, 1)
    return Score(loss, perplexity, bits, float(confidence) / max(count, 1), count, nbytes, store.documents)
