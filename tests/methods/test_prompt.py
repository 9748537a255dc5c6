"""Soft prompts."""

from __future__ import annotations

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import attach, trainable_parameters


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_it_starts_as_tokens_look_behind_the_embedding_which_may_scale_them(family: str) -> None:
    """Gemma 3's embedding multiplies its rows by the root of their width."""
    model = tiny(family)
    embeddings = model.get_input_embeddings()(torch.arange(model.config.vocab_size))
    attach(model, "prompt", prompt_length=4)
    (P,) = trainable_parameters(model).values()
    assert all(bool((vector == embeddings).all(-1).any()) for vector in P.detach())
    model(tokens())
