"""From an example to token ids and which of them are targets: special tokens, prompts, chat templates."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from espalier.data.sources import Example, Span
from espalier.errors import EspalierError

MASK_POLICY = {"text": "all tokens", "label": "the label of a text", "prompt": "completion only", "chat": "assistant turns only"}
"""What is a target, by kind of data."""


@dataclass(frozen=True)
class Encoded:
    """One document: token ids, a flag per token (``None``: all are targets), the bytes of target text, the label and the task."""

    ids: list[int]
    targets: list[bool] | None
    nbytes: int
    label: str | None = None
    task: str = ""


class Encoder:
    """A tokenizer with what training needs to know of it.

    Documents are framed as ``prefix + text + end``: the prefix is what the tokenizer itself puts before a
    text (such as a BOS token), the end is what it puts after it (``closing``), or else its EOS token. A text that is to be
    labelled is framed as the tokenizer does it, ``prefix + text + closing``, for that is how others ask for its label.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        plain = tokenizer("a", add_special_tokens=False).input_ids
        framed = tokenizer("a", add_special_tokens=True).input_ids
        start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
        self.prefix: list[int] = framed[:start]
        self.closing: list[int] = framed[start + len(plain) :]
        self.end = self.closing
        if not self.end and tokenizer.eos_token_id is not None:
            self.end = [tokenizer.eos_token_id]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids: vocabulary, merges, special tokens, framing."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        digest = hashlib.sha256(content.encode())
        digest.update(json.dumps([self.prefix, self.end]).encode())
        return f"sha256:{digest.hexdigest()}"

    @property
    def template_fingerprint(self) -> str | None:
        """A hash of the chat template, or ``None`` without one."""
        template = self.tokenizer.chat_template
        return f"sha256:{hashlib.sha256(str(template).encode()).hexdigest()}" if template else None

    @property
    def special_tokens(self) -> dict[str, Any]:
        """The special tokens by role, as strings."""
        return {k: str(v) if not isinstance(v, list) else [str(i) for i in v] for k, v in self.tokenizer.special_tokens_map.items()}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, without special tokens."""
        return self.tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []

    def encode(self, batch: Sequence[Example]) -> list[Encoded]:
        """Whole documents, framed."""
        plain = [e.spans[0].text if len(e.spans) == 1 and not e.messages else "" for e in batch]
        encoded = self.ids(plain)
        result = []
        for example, text, ids in zip(batch, plain, encoded, strict=True):
            if example.label is not None:
                result.append(self._labelled(example, ids))
            elif example.messages:
                result.append(self._chat(example))
            elif len(example.spans) == 1:
                result.append(self.frame(ids, len(text.encode())))
            else:
                result.append(self._prompt(example))
        return [dataclasses.replace(one, task=example.task) if example.task else one for example, one in zip(batch, result, strict=True)]

    def _labelled(self, example: Example, ids: list[int]) -> Encoded:
        framed = self.prefix + ids + self.closing
        if not framed:
            raise EspalierError(f"{example.where}: the text has no token; every example needs one at least")
        return Encoded(framed, None, len(example.spans[0].text.encode()), example.label)

    def frame(self, ids: list[int], nbytes: int) -> Encoded:
        """A document of plain text from the ids of its text."""
        framed = self.prefix + ids + self.end
        return Encoded(framed, None, max(nbytes - self._unpredicted(framed), 0))

    def _unpredicted(self, framed: list[int]) -> int:
        """Bytes of text in a document's first token, which is never predicted."""
        if self.prefix or framed == self.end:
            return 0
        text = self.tokenizer.decode(framed[:1], clean_up_tokenization_spaces=False)
        if "\ufffd" in text:  # part of a character: a letter of the token is a byte, or the token is one, as <0xE6>
            token = self.tokenizer.convert_ids_to_tokens(framed[0])
            return 1 if token.startswith("<0x") else len(token)
        return len(text.encode())

    @functools.cached_property
    def _marks_starts(self) -> bool:
        """Whether a text's beginning is tokenized otherwise than its middle, as by SentencePiece, which adds a space."""
        (line, both, alone) = self.ids(["\n", "\na", "a"])
        return both != line + alone

    def continued(self, text: str) -> list[int]:
        """Ids of a text that goes on from another one."""
        if self._marks_starts:
            for before in ("\n", ".", "a", "0", "_"):  # one that does not merge with the text
                known, both = self.ids([before, before + text])
                if both[: len(known)] == known:
                    return both[len(known) :]
        return self.ids([text])[0]

    def _prompt(self, example: Example) -> Encoded:
        prompt, completion = (span.text for span in example.spans)
        first, whole = self.ids([prompt, prompt + completion])
        # a token must not span the boundary: where the completion is written later, there is the prompt alone
        second = whole[len(first) :] if whole[: len(first)] == first else self.continued(completion)
        ids = self.prefix + first + second + self.end
        known = len(self.prefix) + len(first)
        nbytes = len(completion.encode()) - (0 if known else self._unpredicted(ids))
        return Encoded(ids, [False] * known + [True] * (len(ids) - known), nbytes)

    def _render(self, messages: Sequence[dict[str, Any]], where: str, prompt: bool = False) -> str:
        if not messages:
            return ""
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise EspalierError(f"{where}: the tokenizer's chat template refuses these messages: {error}") from error

    def chat_spans(self, messages: Sequence[dict[str, Any]], where: str) -> list[Span]:
        """The rendered conversation as spans; assistant turns, up to and with their end marker, are targets.

        Raises:
            EspalierError: without a chat template, without an assistant turn, or with a template that
                renders a turn differently once more turns follow.
        """
        if not self.tokenizer.chat_template:
            raise EspalierError(f"{where} is a chat, but the model's tokenizer has no chat template; use prompt and completion")
        whole = self._render(messages, where)
        spans: list[Span] = []
        done = ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            after = self._render(messages[: turn + 1], where)
            before = self._render(messages[:turn], where, prompt=True) if turn else self._opening(messages[0], after, where)
            if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
                raise EspalierError(
                    f"{where}: the chat template renders turn {turn + 1} differently when other turns follow, so its "
                    "targets cannot be told; give one conversation per assistant turn"
                )
            spans += [Span(before[len(done) :], False), Span(after[len(before) :], True)]
            done = after
        if not spans:
            raise EspalierError(f"{where}: no message has the role assistant, so there is nothing to learn")
        return [*spans, Span(whole[len(done) :], False)]

    def _opening(self, message: dict[str, Any], rendered: str, where: str) -> str:
        """What stands before the content of an assistant's turn that is the first; templates cannot render no turns."""
        header = self._render([message], where, prompt=True).removeprefix(rendered)
        found = rendered.find(header) if header else -1
        return rendered[: found + len(header)] if found >= 0 else ""

    def _chat(self, example: Example) -> Encoded:
        spans = self.chat_spans(example.messages, example.where)
        text = "".join(span.text for span in spans)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        flags: list[bool] = []
        ends = list(itertools.accumulate(len(span.text) for span in spans))
        nbytes = sum(len(span.text.encode()) for span in spans if span.is_target)
        current = 0
        for token, (start, stop) in zip(encoding.input_ids, encoding.offset_mapping, strict=True):
            while current < len(ends) - 1 and start >= ends[current]:
                current += 1
            flags.append(spans[current].is_target)
            if flags[-1] and token in self._special_ids:  # a marker is predicted, but is no text
                nbytes -= len(text[start:stop].encode())
            elif not flags[-1] and stop > ends[current]:  # begins before the answer
                nbytes -= len(text[ends[current] : stop].encode())
        return Encoded(encoding.input_ids, flags, nbytes)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset(token for token, content in added.items() if content.special)
