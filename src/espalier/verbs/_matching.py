"""What `merge match` reads beside the models: their vocabularies, and text."""

from __future__ import annotations

from typing import Any

from espalier.attach.load import load_tokenizer
from espalier.calibrate.make import choose_windows
from espalier.calibrate.pair import Text, text
from espalier.checkpoint.directory import resolve_model
from espalier.data.encode import Encoder
from espalier.data.sources import open_source
from espalier.data.store import open_store
from espalier.errors import EspalierError, at_least
from espalier.train import session


def require_one_vocabulary(names: tuple[str, str]) -> None:
    """Refuse models whose tokenizers give one token different numbers; a model without a tokenizer is taken at its word.

    Raises:
        EspalierError: naming such a token.
    """
    if not all((resolve_model(name) / "tokenizer.json").is_file() for name in names):
        return
    one, other = (load_tokenizer(name).get_vocab() for name in names)
    for token in dict.fromkeys([*one, *other]):
        if one.get(token) != other.get(token):
            raise EspalierError(
                f"the token {token!r} is number {one.get(token)} in {names[0]}, and {other.get(token)} in {names[1]}; models of different "
                "vocabularies cannot be lined up"
            )


def read_text(
    model: str, config: Any, data: str | None, eval_data: str | None, tokens: int, sequence_length: int | None, seed: int
) -> tuple[Text | None, Text] | None:
    """The sequences of ``data`` (or ``None``) and those to measure the loss on; ``None`` without any text."""
    if data is None and eval_data is None:
        return None
    if sequence_length is not None:
        at_least("sequence_length", sequence_length, 1)
    length = session.fitting_length(sequence_length, config)
    encoder = Encoder(load_tokenizer(model))

    def drawn(source: str) -> Text:
        store = open_store(open_source(source), encoder)
        return text(store, choose_windows(store, length, tokens, seed))

    fitted_on = drawn(data) if data is not None else None
    return fitted_on, drawn(eval_data) if eval_data is not None else fitted_on or []
