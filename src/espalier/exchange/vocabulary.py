"""Models with different vocabularies: which rows of their embeddings are the same token, and a tokenizer with the tokens of all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from espalier.checkpoint.directory import read_json
from espalier.errors import EspalierError
from espalier.exchange.merging import Changed, Model, Places

TOKENIZER = "tokenizer.json"
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
_ROWS = re.compile(rf"{EMBEDDING.pattern}|{HEAD.pattern}|(?:^|\.)(?:lm_head|embed_out)\.bias$")

Vocabulary = Mapping[str, int]


def is_by_token(name: str) -> bool:
    """Whether the rows of a tensor are tokens: embeddings, heads and their biases."""
    return _ROWS.search(name) is not None


def tokens(path: Path) -> Vocabulary:
    """Token to id, from a ``tokenizer.json``.

    Raises:
        EspalierError: when it is malformed.
    """
    content = read_json(path)
    try:
        listed = content["model"]["vocab"]
        found = {p[0]: i for i, p in enumerate(listed)} if isinstance(listed, list) else dict(listed)
        found.update({token["content"]: token["id"] for token in content.get("added_tokens") or []})
        if not all(isinstance(token, str) and isinstance(place, int) and place >= 0 for token, place in found.items()):
            raise ValueError
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise EspalierError(f"{path} has no vocabulary of tokens and their ids") from error
    return found


@dataclass
class Alignment:
    """Which rows of the models are which row of the merged one.

    Args:
        vocabularies: token to id, of each model, and last of the one whose files the merged model gets.
        merged: token to id, of the merged model.
        tokenizer: the content of its ``tokenizer.json``, where that is a new one.
    """

    vocabularies: Sequence[Vocabulary]
    merged: Vocabulary
    tokenizer: str | None = None

    def rows(self, own: int) -> int:
        """Rows of the merged tensor, where the one that gives the files has ``own``.

        Raises:
            EspalierError: when ids leave larger gaps than all tokens fill.
        """
        if self.tokenizer is None:
            return own
        rows = max(own, max(self.merged.values()) + 1)
        if rows > own + len(self.merged):
            raise EspalierError(f"the tokenizer has {len(self.merged)} tokens and the id {rows - 1}, the tensor {own} rows; they do not belong together")
        return rows

    def places(self, model: int, rows: int, merged_rows: int) -> Places:
        """Where a model that has so many rows has those of the merged one; rows that are no token stay where they are."""
        vocabulary = self.vocabularies[model]
        places = torch.full((merged_rows,), -1, dtype=torch.int64)
        unnamed = torch.ones(max(rows, merged_rows), dtype=torch.bool)
        for vocabulary_of in (vocabulary, self.merged):
            ids = torch.tensor([i for i in vocabulary_of.values() if i < len(unnamed)], dtype=torch.int64)
            unnamed[ids] = False
        both = min(rows, merged_rows)
        places[:both][unnamed[:both]] = torch.arange(both)[unnamed[:both]]
        for token, place in self.merged.items():
            found = vocabulary.get(token, rows)
            if place < merged_rows and found < rows:
                places[place] = found
        return places


def align(policy: str | None, like: Model, members: Sequence[Model | Changed]) -> Alignment | None:
    """How the vocabularies fit each other; ``None`` where they are the same, or no two tokenizers are there to compare.

    Args:
        like: whose files the merged model gets.

    Raises:
        EspalierError: when they differ and there is no policy, or they cannot be brought together.
    """
    own = like.file(TOKENIZER)
    if not own.is_file():
        if policy is not None:
            raise EspalierError(f"--vocabulary {policy} aligns tokens by {TOKENIZER}, which {like.path} does not have")
        return None
    content, reference = own.read_bytes(), tokens(own)
    found: list[Vocabulary] = []
    for member in members:
        path = member.file(TOKENIZER)
        same = not path.is_file() or path.read_bytes() == content
        found.append(reference if same else tokens(path))
        if policy is None and found[-1] != reference:
            differing = min(t for t in {*found[-1], *reference} if found[-1].get(t) != reference.get(t))
            raise EspalierError(
                f"{member.path} has another vocabulary than {like.path}: the token {differing!r} is {found[-1].get(differing, 'missing')} and "
                f"{reference.get(differing, 'missing')}; align them with --vocabulary base (its tokens) or union (all tokens)"
            )
    if all(vocabulary == reference for vocabulary in found):
        return None
    found.append(reference)
    if policy == "base" or all(set(vocabulary) <= set(reference) for vocabulary in found):
        return Alignment(found, reference)
    made = united(own, [member.file(TOKENIZER) for member in members])
    merged = {**reference, **_vocabulary_of(made)}
    return Alignment(found, merged, made)


def _vocabulary_of(tokenizer: str) -> Vocabulary:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer).get_vocab(with_added_tokens=True)


def united(base: Path, others: Sequence[Path]) -> str:
    """The ``tokenizer.json`` of a tokenizer that has the tokens of all: the base's at their places, then those of the others.

    Merges of the others (BPE) come after all of the base's, so the base's words are cut as before but where a longer
    token is new. Added tokens keep their properties.

    Raises:
        EspalierError: when tokenizers work in different ways, or are of a kind whose tokens have no ids of their own.
    """
    made = read_json(base)
    model = made["model"]
    added = {token["content"]: token for token in made.get("added_tokens") or []}
    taken = dict(tokens(base))
    last = max(taken.values())
    for path in others:
        if not path.is_file() or (vocabulary := tokens(path)).items() <= taken.items():
            continue
        other = read_json(path)
        theirs = {token["content"]: token for token in other.get("added_tokens") or []}
        regular = sorted((t for t in vocabulary if t not in theirs and t not in taken), key=lambda t: vocabulary[t])
        if regular:
            _require_same_kind(base, made, path, other)
            known = {tuple(pair) for pair in model.get("merges", [])}
            if model["type"] == "BPE":
                model["merges"] += [pair for pair in other["model"]["merges"] if tuple(pair) not in known]
        for token in [*regular, *sorted((t for t in theirs if t not in taken), key=lambda t: vocabulary[t])]:
            taken[token] = last = last + 1
            if token in theirs:
                added[token] = {**theirs[token], "id": last}
    if isinstance(model["vocab"], dict):
        model["vocab"] = taken  # added tokens too: what is not in here would be given a place after the rest
    made["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    text = json.dumps(made, ensure_ascii=False)
    try:
        agrees = _vocabulary_of(text) == taken
    except Exception as error:  # the library raises Exception itself
        raise EspalierError(f"the union of {base} and the others' is no tokenizer ({error}); use --vocabulary base") from error
    if not agrees:
        raise EspalierError(f"the tokens of a {model.get('type')} tokenizer ({base}) cannot be given places of their own; use --vocabulary base")
    return text


def _require_same_kind(base: Path, made: Any, path: Path, other: Any) -> None:
    for content, where in ((made, base), (other, path)):
        if content["model"].get("type") not in ("BPE", "WordPiece", "WordLevel"):
            raise EspalierError(
                f"{where} is a {content['model'].get('type')} tokenizer, to which only added tokens can be added; use --vocabulary base"
            )
    for key in ("type", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if made["model"].get(key) != other["model"].get(key):
            raise EspalierError(f"{path} and {base} cut text in different ways ({key}); use --vocabulary base")
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        if made.get(key) != other.get(key):
            raise EspalierError(f"{path} and {base} cut text in different ways (their {key}); use --vocabulary base")
    for content in (made, other):  # older files write a pair as one text
        if content["model"]["type"] == "BPE":
            content["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]


