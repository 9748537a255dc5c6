"""Comparing the logits of an applied model with those of its base under the deltas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from espalier.attach.attachment import attach_updates
from espalier.attach.load import empty_model, load, load_config, load_model, load_tokenizer
from espalier.checkpoint.directory import resolve_model
from espalier.delta.store import Delta
from espalier.display import Display
from espalier.errors import EspalierError

LARGEST = 512


def require_attachable(model: str, folders: Sequence[Path], deltas: Sequence[Delta]) -> None:
    """Refuse deltas that the live base cannot carry, so that nothing could be compared; loads no numbers.

    Raises:
        EspalierError: naming the parameter that the model does not have, or has in another shape.
    """
    live = empty_model(resolve_model(model), folders)
    for number, delta in enumerate(deltas):
        try:
            attach_updates(live, delta.updates, f"delta{number}")
        except EspalierError as error:
            raise EspalierError(f"--verify needs the delta on the live base, which cannot carry it: {error}. Leave --verify out") from error


@torch.no_grad()
def compare(
    model: str, deltas: Sequence[str], scale: float, any_base: bool, applied: Path, text: Path, out: Path, display: Display
) -> dict[str, Any]:
    """Largest and mean difference of log probabilities on the first tokens of a text, and agreement of the likeliest token.

    Raises:
        EspalierError: when the text is empty, or the two disagree by more than the rounding of the weights explains.
    """
    try:
        ids = load_tokenizer(model, deltas)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :LARGEST]
    except UnicodeDecodeError as error:
        raise EspalierError(f"--verify {text} is not UTF-8 text; give a text file") from error
    ids = ids[:, : getattr(load_config(resolve_model(model)), "max_position_embeddings", LARGEST)]
    if (tokens := ids.shape[1]) < 2:
        raise EspalierError(f"--verify {text} has fewer than two tokens")

    def log_probabilities(loaded: Any) -> torch.Tensor:
        return loaded(input_ids=ids.to(next(loaded.parameters()).device)).logits.float().log_softmax(-1).cpu()

    # one model in memory at a time
    there = log_probabilities(load(model, deltas, dtype="fp32", scale=scale, any_base=any_base))
    merged = log_probabilities(load_model(applied, "fp32"))
    base = log_probabilities(load_model(model, "fp32", deltas=deltas))
    largest, mean = float((there - merged).abs().max()), float((there - merged).abs().mean())
    moved = float((there - base).abs().mean())
    agreement = float((there.argmax(-1) == merged.argmax(-1)).float().mean())
    display.note(
        f"verified on {tokens} tokens: log probabilities differ by {mean:.2e} on average ({largest:.2e} at most), the "
        f"delta moved them by {moved:.2e}; the likeliest {'label' if there.ndim == 2 else 'token'} agrees on {agreement:.1%}"
    )
    if mean > 0.25 * moved + 1e-4:
        raise EspalierError(
            f"{out} was not written: it would not do what the base and the delta do. Log probabilities differ by {mean:.2e} on average, the "
            f"delta itself moves them by {moved:.2e}. The model's dtype is too coarse for this delta; apply it at run time"
        )
    return {"tokens": tokens, "largest": largest, "mean": mean, "moved": moved, "agreement": agreement}
