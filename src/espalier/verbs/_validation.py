"""The loss on validation data as a function of updates: what options of a compression method are chosen by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from espalier.attach.attachment import attach_updates, detach
from espalier.attach.load import load_model, load_tokenizer
from espalier.data.encode import Encoder
from espalier.data.sources import open_source
from espalier.data.store import open_store
from espalier.delta.forms import Update
from espalier.display import Display
from espalier.errors import at_least
from espalier.evaluate.perplexity import score
from espalier.memory.training_form import training_form
from espalier.plan.memory import default_chunk
from espalier.train import session


def validation_loss(
    stack: ExitStack, model: str, data: Sequence[str], *, sequence_length: int | None, micro_batch_size: int, device: str | None,
    display: Display,
) -> Callable[[Mapping[str, Update]], float]:
    """Load a model; what is returned puts updates on it and gives the loss, in nats per token of all the data.

    Args:
        stack: the model computes as ``eval`` computes until it is closed.

    Raises:
        EspalierError: for anything wrong with the model or the data.
    """
    at_least("micro_batch_size", micro_batch_size, 1)
    tokenizer = load_tokenizer(model)
    encoder = Encoder(tokenizer)
    stores = [open_store(open_source(path), encoder) for path in data]
    loaded = load_model(model, None, device)
    length = session.fitting_length(sequence_length, loaded.config)
    padded = session.must_pad(loaded, loaded.config.vocab_size, display)
    stack.enter_context(training_form(loaded, chunk=default_chunk(loaded.config.vocab_size), recompute=False, padded=padded))

    def loss(updates: Mapping[str, Update]) -> float:
        attach_updates(loaded, updates, "candidate")
        try:
            scores = [
                score(loaded, store, length, length * micro_batch_size, padded=padded, pad_token=session.pad_token(tokenizer))
                for store in stores
            ]
        finally:
            detach(loaded, "candidate")
        return sum(s.loss * s.tokens for s in scores) / sum(s.tokens for s in scores)

    return loss
