"""The loss on validation data as a function of updates: what options of a compression method are chosen by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from espalier.attach.attachment import attach_updates, detach
from espalier.attach.load import load_model, load_tokenizer
from espalier.data.encode import Encoder
from espalier.data.sources import open_source
from espalier.data.store import open_store
from espalier.delta.forms import Update
from espalier.display import Display
from espalier.errors import at_least
from espalier.evaluate.perplexity import Score, score
from espalier.memory.training_form import training_form
from espalier.plan.memory import default_chunk
from espalier.train import session

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def losses_of(
    stack: ExitStack, model: str, data: Sequence[str], *, sequence_length: int | None, micro_batch_size: int, device: str | None,
    display: Display, dtype: str | None = None,
) -> Callable[[], tuple[PreTrainedModel, Callable[[], dict[str, float]]]]:
    """Read the data; what is returned loads the model, and with it gives its loss on each data set, in nats per token, as it is then.

    Args:
        stack: the model computes as ``eval`` computes until it is closed.

    Raises:
        EspalierError: for anything wrong with the model or the data.
    """
    load = _scoring(stack, model, data, sequence_length, micro_batch_size, device, dtype, display)

    def losses() -> tuple[PreTrainedModel, Callable[[], dict[str, float]]]:
        loaded, scores = load()
        return loaded, lambda: {path: found.loss for path, found in zip(data, scores(), strict=True)}

    return losses


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
    loaded, scores = _scoring(stack, model, data, sequence_length, micro_batch_size, device, None, display)()

    def loss(updates: Mapping[str, Update]) -> float:
        attach_updates(loaded, updates, "candidate")
        try:
            found = scores()
        finally:
            detach(loaded, "candidate")
        return sum(s.loss * s.tokens for s in found) / sum(s.tokens for s in found)

    return loss


def _scoring(
    stack: ExitStack, model: str, data: Sequence[str], sequence_length: int | None, micro_batch_size: int, device: str | None,
    dtype: str | None, display: Display,
) -> Callable[[], tuple[PreTrainedModel, Callable[[], list[Score]]]]:
    at_least("micro_batch_size", micro_batch_size, 1)
    if sequence_length is not None:
        at_least("sequence_length", sequence_length, 1)
    tokenizer = load_tokenizer(model)
    encoder = Encoder(tokenizer)
    stores = [open_store(open_source(path), encoder) for path in data]

    def load() -> tuple[PreTrainedModel, Callable[[], list[Score]]]:
        loaded = load_model(model, dtype, device)
        length = session.fitting_length(sequence_length, loaded.config)
        padded = session.must_pad(loaded, loaded.config.vocab_size, display)
        stack.enter_context(training_form(loaded, chunk=default_chunk(loaded.config.vocab_size), recompute=False, padded=padded))
        pad = session.pad_token(tokenizer)
        return loaded, lambda: [score(loaded, store, length, length * micro_batch_size, padded=padded, pad_token=pad) for store in stores]

    return load
