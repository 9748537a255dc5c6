"""What ``tune``, ``pretrain`` and ``eval`` do with data and a model: predict tokens, or tell labels.

One rule decides: data whose records have a ``label`` are classified, all other data are text. A task knows the order of
its data, how a model is scored on them, and what is said of a score. What a model's loss is, the model itself knows
(``memory/training_form.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from espalier.anatomy.classification import classifies, is_classifier, labels_of, with_labels
from espalier.data.batches import Order
from espalier.data.encode import Encoder
from espalier.data.labelled import Labelled
from espalier.data.store import TokenStore
from espalier.display import Display
from espalier.errors import EspalierError
from espalier.evaluate.classification import ClassScore, score_classes
from espalier.evaluate.perplexity import Score, score
from espalier.train import session

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Language:
    """The next token of text: windows packed end to end; loss, perplexity and bits per byte."""

    unit = "tokens"

    def __init__(self, encoder: Encoder) -> None:
        self.pad_token = session.pad_token(encoder.tokenizer)

    def order(self, store: TokenStore, sequence_length: int, seed: int) -> Order:
        return Order(store, sequence_length, seed)

    def must_pad(self, model: PreTrainedModel, display: Display) -> bool:
        """Whether windows cannot be packed; says so."""
        return session.must_pad(model, model.config.vocab_size, display)

    def size(self, store: TokenStore) -> int:
        """How many units there are to score."""
        return store.predictions

    def score(
        self, model: Any, store: TokenStore, sequence_length: int, micro_tokens: int, padded: bool, progress: Callable[[int], None]
    ) -> Score:
        return score(model, store, sequence_length, micro_tokens, padded=padded, pad_token=self.pad_token, progress=progress)

    def in_words(self, found: Any) -> str:
        return f"perplexity {found.perplexity:.3f}, {found.bits_per_byte:.4f} bits per byte"


class Classification:
    """The label of a text: padded batches; loss, accuracy and macro-F1.

    Args:
        classes: the labels, in the order of the model's outputs.
    """

    unit = "texts"

    def __init__(self, encoder: Encoder, classes: Sequence[str], pad_token: int) -> None:
        self.encoder, self.classes, self.pad_token = encoder, list(classes), pad_token

    def order(self, store: TokenStore, sequence_length: int, seed: int = 0) -> Labelled:
        return Labelled(store, self.encoder, self.classes, sequence_length, seed)

    def must_pad(self, model: PreTrainedModel, display: Display) -> bool:
        return True

    def size(self, store: TokenStore) -> int:
        return store.documents

    def score(
        self, model: Any, store: TokenStore, sequence_length: int, micro_tokens: int, padded: bool, progress: Callable[[int], None]
    ) -> ClassScore:
        texts = self.order(store, sequence_length)
        return score_classes(model, texts, self.classes, micro_tokens, pad_token=self.pad_token, progress=progress)

    def in_words(self, found: Any) -> str:
        return f"accuracy {found.accuracy:.1%}, macro-F1 {found.macro_f1:.3f}, loss {found.loss:.4f}"


Task = Language | Classification


def task_of(store: TokenStore, what: str, encoder: Encoder, model: PreTrainedModel) -> Task:
    """What ``eval`` does with data and a model.

    Raises:
        EspalierError: when the data have labels and the model no head that tells them, or the other way round.
    """
    labelled = store.kind == "label"
    if labelled != is_classifier(model):
        has, needs = ("labels", "a model with a classification head: give the --delta of a tune on labelled data, or the model that it was applied to")
        if not labelled:
            has, needs = "no labels", "JSON lines with text and label: the model is a sequence classifier"
        raise EspalierError(f"the data {what} have {has}; measuring needs {needs}")
    return Classification(encoder, labels_of(model.config), model.config.pad_token_id or 0) if labelled else Language(encoder)


def new_classifier(config: Any, store: TokenStore, encoder: Encoder, display: Display) -> tuple[Any, bool]:
    """The config of the classifier that is to be trained on data, and whether its head is a new one.

    A classifier that knows all labels of the data keeps its head; any other model gets a new one.

    Raises:
        EspalierError: when the data have fewer than two labels, or transformers has no such head for the family.
    """
    names = store.names
    if classifies(config) and set(names) <= set(labels_of(config)):
        display.note(f"the model's own classification head goes on, with its {len(config.id2label)} labels")
        return with_labels(config, labels_of(config), _padding(config, encoder)), False
    if len(names) < 2:
        raise EspalierError(f"all {store.documents} texts have the label {names[0]!r}; a classifier needs two labels at least")
    display.note(f"a new classification head for {len(names)} labels: {', '.join(names)}")
    return with_labels(config, names, _padding(config, encoder)), True


def _padding(config: Any, encoder: Encoder) -> int:
    """What fills rows, and where a decoder knows that a text has ended: the tokenizer's padding, else the model's, else any."""
    tokenizer = encoder.tokenizer
    given = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), tokenizer.eos_token_id)
    return next((token for token in given if token is not None), 0)
