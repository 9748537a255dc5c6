"""Sampling continuations, with transformers' generation loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: Any, ids: Sequence[int], max_tokens: int, temperature: float, top_p: float, seed: int,
    adjust: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[list[int], bool]:
    """New token ids that continue ``ids``, and whether the model ended the text by itself.

    Args:
        temperature: 0 takes the likeliest token each time.
        seed: of sampling; the same seed gives the same text on the same machine and thread count.
        adjust: from all ids so far (1, n) and the logits of the next one (1, vocabulary) to other logits.
    """
    model.eval()
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    start = torch.tensor([list(ids)], device=device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generate: Any = model.generate
    result = generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=max_tokens, pad_token_id=pad,
        logits_processor=[adjust] if adjust is not None else None, **sampling,
    )[0]
    made = result[len(ids) :].tolist()
    finished = bool(made) and made[-1] == tokenizer.eos_token_id
    return (made[:-1] if finished else made), finished
