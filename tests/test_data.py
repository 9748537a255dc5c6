"""Data: files to examples, examples to token ids and targets, and the token store on disk."""

from __future__ import annotations

import ast
import json
import os
import textwrap
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from espalier.data import sources, store
from espalier.data.encode import Encoded, Encoder
from espalier.data.sources import Example, Span, examples, open_source, pieces
from espalier.data.store import TokenStore, open_store
from espalier.errors import EspalierError

TEXT = """the cat sat on the mat
the dog ran home,
    and then there was that other thing:

it was raining, and the cat came in.
"""
UNUSUAL = "naïve café, 日本語 — 😀\n"
MARKERS = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (  # as reasoning models' templates do: what an earlier turn thought is dropped
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('=>')[-1] }}{% else %}{{ m.content }}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_level(frame: str | None = None, **special: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE as of GPT-2, trained on a little text; ``frame`` is what it puts around a text itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=MARKERS, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    if frame:
        ids = [(marker, tokenizer.token_to_id(marker)) for marker in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", **special})


def metaspace() -> PreTrainedTokenizerFast:
    """A BPE as of SentencePiece: it writes spaces as a letter, and puts one before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """A BPE as of Llama 2: the space before a text comes from its normalizer, unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(TEXT.splitlines() * 5, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "without BOS": byte_level,
    "with BOS": lambda: byte_level("<s> $A"),
    "metaspace": metaspace,
    "byte fallback": byte_fallback,
}
every_tokenizer = pytest.mark.parametrize("kind", KINDS)
texts = st.text(st.sampled_from("the catdog\n  é日😀.,:"), max_size=30)
quickly = settings(deadline=None, max_examples=40, database=None)


def token_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> int:
    """Bytes of text in tokens of byte-level BPE, whose letters each stand for a byte; special tokens have none."""
    return sum(len(t) for t in tokenizer.convert_ids_to_tokens(ids) if t not in MARKERS)


def parted(tokenizer: PreTrainedTokenizerFast, document: Encoded) -> list[tuple[bool, str]]:
    """A document as runs of text that are targets or not."""
    assert document.targets is not None and len(document.targets) == len(document.ids)
    runs: list[tuple[bool, list[int]]] = []
    for token, flag in zip(document.ids, document.targets, strict=True):
        if not runs or runs[-1][0] != flag:
            runs.append((flag, []))
        runs[-1][1].append(token)
    return [(flag, tokenizer.decode(ids)) for flag, ids in runs]


def json_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def tokenized(path: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> TokenStore:
    return open_store(open_source(path), Encoder(tokenizer or byte_level()))


def documents(found: TokenStore) -> list[list[int]]:
    return [found.read(a, b).tolist() for a, b in pairwise(found.offsets.tolist())]


# sources


def test_a_plain_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    found = open_source(tmp_path / "a.txt")
    assert found.kind == "text" and found.files == (tmp_path / "a.txt",)
    assert "".join(pieces(found.files[0])) == TEXT
    assert tokenized(tmp_path / "a.txt").documents == 1


def test_a_folder_gives_its_files_by_name_with_those_of_its_folders_and_without_hidden_ones(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "corpus"  # a hidden folder above the data hides nothing
    for name in ("b.txt", "a/z.md", "a/deep/er.py", ".hidden.txt", ".git/config", "a/.ipynb/x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    found = open_source(root)
    assert [f.relative_to(root).as_posix() for f in found.files] == ["a/deep/er.py", "a/z.md", "b.txt"]
    tokenizer = byte_level()
    assert [tokenizer.decode(ids) for ids in documents(tokenized(root, tokenizer))] == ["a/deep/er.py</s>", "a/z.md</s>", "b.txt</s>"]


def test_empty_files_of_a_folder_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("the cat")
    assert tokenized(tmp_path).documents == 1


@pytest.mark.parametrize(
    ("record", "kind", "spans"),
    [
        ({"text": "the cat"}, "text", (Span("the cat", True),)),
        ({"prompt": "the", "completion": " cat", "id": 3}, "prompt", (Span("the", False), Span(" cat", True))),
        ({"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]}, "chat", ()),
    ],
)
def test_json_lines_are_one_example_a_line(tmp_path: Path, record: dict[str, Any], kind: str, spans: tuple[Span, ...]) -> None:
    found = open_source(json_lines(tmp_path / "a.jsonl", record, record))
    first, second = examples(found)
    assert found.kind == kind
    assert first.spans == second.spans == spans
    assert first.messages == tuple(record.get("messages", ()))
    assert second.where == f"{tmp_path / 'a.jsonl'}:2"


def test_tasks_are_told_apart_only_where_asked_for_and_every_record_may_have_its_own(tmp_path: Path) -> None:
    names = [f"task {(7 * n) % 300} \u8a9e" for n in range(300)]
    path = json_lines(tmp_path / "a.jsonl", *({"text": "a", "task": name} for name in names))
    assert tokenized(path).tasks == ()
    found = open_store(open_source(path), Encoder(byte_level()), by_task=True)
    assert [found.tasks[number] for number in found.task_of] == names


def test_kinds_are_not_mixed_in_a_folder(tmp_path: Path) -> None:
    json_lines(tmp_path / "a.jsonl", {"prompt": "the", "completion": "cat"})
    (tmp_path / "b.txt").write_text(TEXT)
    with pytest.raises(EspalierError, match=r"mixes kinds of examples \(prompt, text\)"):
        open_source(tmp_path)


def test_kinds_are_not_mixed_in_a_file(tmp_path: Path) -> None:
    file = json_lines(tmp_path / "a.jsonl", {"text": "the"}, {"prompt": "the", "completion": "cat"})
    with pytest.raises(EspalierError, match=r"a\.jsonl:2 is of kind prompt, the lines before of text"):
        list(examples(open_source(file)))


def test_plain_text_and_json_lines_of_text_go_together(tmp_path: Path) -> None:
    json_lines(tmp_path / "a.jsonl", {"text": "the"}, {"text": "cat"})
    (tmp_path / "b.txt").write_text(TEXT)
    assert tokenized(tmp_path).documents == 3


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{'text': 1}", "is not JSON"),
        ('{"text": "the', "is not JSON"),
        ("[" * 5000, "is not JSON"),
        ('["text"]', "is no JSON object"),
        ('{"txt": "the"}', r"has keys \['txt'\]"),
        ('{"prompt": "the"}', r"has keys \['prompt'\]"),
        ('{"text": null}', "'text' is NoneType; it must be a string"),
        ('{"prompt": "the", "completion": 3}', "'completion' is int; it must be a string"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"messages": {"role": "user", "content": "the"}}', "list of objects"),
        ('{"text": "the \\ud83d cat"}', "half a character"),
        ('{"messages": [{"role": "user", "content": "the \\ud83d cat"}]}', "half a character"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "the"}\n\n' + line + "\n")
    with pytest.raises(EspalierError, match=r"a\.jsonl:3.*" + why):
        list(examples(open_source(file)))


def test_characters_beyond_the_basic_plane_may_be_written_as_surrogate_pairs(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "\\ud83d\\ude00"}\n')
    (example,) = examples(open_source(file))
    assert example.spans == (Span("😀"),)


@pytest.mark.parametrize("line", [1, 2000])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path: Path, name: str, line: int) -> None:
    good, bad = ('{"text": "the é"}\n'.encode(), '{"text": "é"}\n'.encode("latin-1"))
    (tmp_path / name).write_bytes(good * (line - 1) + bad + good)
    with pytest.raises(EspalierError, match=rf"{name}:{line} is not UTF-8 text \(byte 0xe9\)"):
        tokenized(tmp_path / name)


def test_a_character_cut_off_by_the_end_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"the caf\xc3")
    with pytest.raises(EspalierError, match=r"a\.txt:1 is not UTF-8 text"):
        tokenized(tmp_path / "a.txt")


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").write_text("the")
    with pytest.raises(EspalierError, match="is a folder without files"):
        open_source(tmp_path)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=r"nowhere does not exist; give a file or folder"):
        open_source(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "why"), [("a.txt", "", "holds no text"), ("a.jsonl", "", "is empty"), ("a.jsonl", "\n \n", "is empty")]
)
def test_data_without_text_are_refused(tmp_path: Path, name: str, content: str, why: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(EspalierError, match=why):
        tokenized(tmp_path / name)


def test_blank_lines_between_json_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "the"}\n   \n\n{"text": "cat"}')
    assert [e.where.rpartition(":")[2] for e in examples(open_source(tmp_path / "a.jsonl"))] == ["2", "5"]


def test_blank_lines_of_plain_text_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\nthe\n\n")
    tokenizer = byte_level()
    (ids,) = documents(tokenized(tmp_path / "a.txt", tokenizer))
    assert tokenizer.decode(ids) == "\n\nthe\n\n</s>"


def test_carriage_returns_of_plain_text_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"the\r\ncat\rdog\r\n")
    tokenizer = byte_level()
    (ids,) = documents(tokenized(tmp_path / "a.txt", tokenizer))
    assert tokenizer.decode(ids) == "the\r\ncat\rdog\r\n</s>"


def test_json_lines_may_end_in_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "the\\r\\n"}\r\n\r\n{"text": "cat"}\r\n')
    found = list(examples(open_source(tmp_path / "a.jsonl")))
    assert [e.spans[0].text for e in found] == ["the\r\n", "cat"]
    assert [e.where.rpartition(":")[2] for e in found] == ["1", "3"]


@pytest.mark.parametrize("size", [1, 5, 64, 10_000])
@pytest.mark.parametrize("text", [TEXT * 3 + UNUSUAL, "x" * 300, "a\r\nb\r" * 50, "\n" * 130 + "é" * 70])
def test_the_pieces_of_a_file_are_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, text: str) -> None:
    monkeypatch.setattr(sources, "PIECE", size)
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = list(pieces(tmp_path / "a.txt"))
    assert "".join(found) == text
    if size < 100:
        assert max(map(len, found)) <= 2 * size + max(map(len, text.split("\n")))


def test_pieces_end_where_lines_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 100)
    (tmp_path / "a.txt").write_text(TEXT * 10)
    found = list(pieces(tmp_path / "a.txt"))
    assert len(found) > 10 and all(piece.endswith("\n") for piece in found)


@every_tokenizer
def test_a_long_file_is_tokenized_in_pieces_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    text = TEXT * 30 + "thecatandthe" * 60 + "\n\n\n  " + TEXT
    monkeypatch.setattr(sources, "PIECE", 300)
    monkeypatch.setattr(store, "_BATCH_CHARACTERS", 1000)
    for name, content in (("a.txt", "the cat"), ("b.txt", text), ("c.txt", "the dog")):
        (tmp_path / name).write_text(content)
    tokenizer = KINDS[kind]()
    encoder = Encoder(tokenizer)
    found = open_store(open_source(tmp_path), encoder)
    decoded = []
    for ids in documents(found):
        assert ids[: len(encoder.prefix)] == encoder.prefix and ids[-1:] == encoder.end
        decoded.append(tokenizer.decode(ids[len(encoder.prefix) : -1]))
    assert decoded == ["the cat", text, "the dog"]
    unpredicted = 0 if encoder.prefix else len("the")
    assert found.nbytes.tolist() == [len(t.encode()) - unpredicted for t in decoded]


def test_the_standard_library_is_cut_into_parts_that_share_no_file() -> None:
    parts = [open_source(f"stdlib:{name}").files for name in ("train", "valid", "asyncio", "email", "xml")]
    assert all(parts)
    assert len(set().union(*parts)) == sum(map(len, parts))
    for package in ("asyncio", "email", "xml"):
        train, held_out = (set(open_source(f"stdlib:{package}:{split}").files) for split in ("train", "heldout"))
        assert train and held_out and not train & held_out
        assert train | held_out == set(open_source(f"stdlib:{package}").files)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_docstrings_are_paired_with_the_bodies_that_follow_them(split: str) -> None:
    found = list(examples(open_source(f"stdlib:docstrings:{split}")))
    assert len(found) > 30
    for prompt, completion in (e.spans for e in found):
        (whole,) = ast.parse("class Any:\n" + textwrap.indent(prompt.text + completion.text, " ")).body[0].body  # type: ignore[attr-defined]
        (begun,) = ast.parse("class Any:\n" + textwrap.indent(prompt.text, " ")).body[0].body  # type: ignore[attr-defined]
        assert isinstance(whole, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(whole)
        assert len(begun.body) == 1 and len(whole.body) > 1
        assert completion.is_target and not prompt.is_target


def test_an_unknown_bundled_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(EspalierError, match=r"no data set is called stdlib:asynci .*stdlib:asyncio"):
        open_source("stdlib:asynci")


# framing and bytes


@pytest.mark.parametrize(
    ("frame", "special", "prefix", "end"),
    [
        (None, {}, [], ["</s>"]),
        ("<s> $A", {}, ["<s>"], ["</s>"]),
        ("<s> $A </s>", {}, ["<s>"], ["</s>"]),
        ("$A </s>", {"eos_token": "<|end|>"}, [], ["</s>"]),
        (None, {"eos_token": None}, [], []),
    ],
)
def test_a_document_is_framed_as_the_tokenizer_does_and_ended_once(
    frame: str | None, special: dict[str, Any], prefix: list[str], end: list[str]
) -> None:
    tokenizer = byte_level(frame, **special)
    (document,) = Encoder(tokenizer).encode([Example((Span("the cat"),))])
    assert tokenizer.convert_ids_to_tokens(document.ids) == [*prefix, "the", "Ġcat", *end]
    assert document.targets is None


@quickly
@given(text=texts)
def test_bytes_are_those_of_the_tokens_that_are_predicted(text: str) -> None:
    for kind in ("with BOS", "without BOS"):
        tokenizer = KINDS[kind]()
        (document,) = Encoder(tokenizer).encode([Example((Span(text),))])
        assert document.nbytes == token_bytes(tokenizer, document.ids[1:])
        if kind == "with BOS":
            assert document.nbytes == len(text.encode())


def test_without_bos_the_first_token_does_not_count_even_when_it_is_part_of_a_character() -> None:
    tokenizer = byte_level()
    first, second = Encoder(tokenizer).encode([Example((Span("the cat"),)), Example((Span("日the"),))])
    assert len(tokenizer("日", add_special_tokens=False).input_ids) == 3
    assert (first.nbytes, second.nbytes) == (4, 5)


def test_a_batch_is_encoded_in_its_order() -> None:
    tokenizer = byte_level()
    encoded = Encoder(tokenizer).encode(
        [Example((Span("the"),)), Example((Span("the", False), Span(" cat"))), Example((Span("dog"),))]
    )
    assert [tokenizer.decode(e.ids) for e in encoded] == ["the</s>", "the cat</s>", "dog</s>"]
    assert [e.targets for e in encoded] == [None, [False, True, True], None]


def test_the_fingerprint_tells_vocabularies_and_framings_apart() -> None:
    tokenizers = [byte_level(), byte_level("<s> $A"), byte_level(eos_token="<|end|>"), metaspace()]
    assert len({Encoder(t).fingerprint for t in tokenizers}) == 4
    assert Encoder(byte_level()).fingerprint == Encoder(byte_level()).fingerprint
    assert Encoder(byte_level()).template_fingerprint is None
    templates = [Encoder(byte_level(chat_template=t)).template_fingerprint for t in (TEMPLATE, WORDS)]
    assert None not in templates and len(set(templates)) == 2


# prompts and completions


@every_tokenizer
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the cat", " sat on the mat"),
        ("the cat\n", "the dog"),
        ("th", "e cat"),  # "the" is one token
        ("the ", "cat"),  # so is " cat"
        ("the cat\n", "\n"),
        ("the", ""),
    ],
)
def test_only_the_completion_and_the_end_are_targets(kind: str, prompt: str, completion: str) -> None:
    tokenizer = KINDS[kind]()
    encoder = Encoder(tokenizer)
    (document,) = encoder.encode([Example((Span(prompt, False), Span(completion)))])
    known = document.targets.index(True)
    assert document.targets == [False] * known + [True] * (len(document.ids) - known)
    assert document.ids[:known] == encoder.prefix + encoder.ids([prompt])[0]
    assert tokenizer.decode(document.ids[len(encoder.prefix) : -1]) == prompt + completion
    assert document.ids[-1:] == encoder.end
    assert document.nbytes == len(completion.encode())


@pytest.mark.parametrize("kind", ["with BOS", "byte fallback"])
def test_a_completion_of_characters_that_the_vocabulary_lacks_is_parted_too(kind: str) -> None:
    tokenizer = KINDS[kind]()
    (document,) = Encoder(tokenizer).encode([Example((Span("the 日", False), Span("本 cat")))])
    assert [text.removeprefix("<s>").strip() for _, text in parted(tokenizer, document)] == ["the 日", "本 cat</s>"]
    assert document.nbytes == len("本 cat".encode())


def test_the_boundary_tests_do_merge() -> None:
    for tokenizer in (byte_level(), metaspace()):
        first, second = Encoder(tokenizer).ids(["th", "the"])
        assert len(second) == 1 and first[0] != second[0]


@quickly
@given(prompt=texts, completion=texts)
def test_prompt_and_completion_are_parted_at_their_boundary(prompt: str, completion: str) -> None:
    for kind in ("with BOS", "without BOS"):
        tokenizer = KINDS[kind]()
        encoder = Encoder(tokenizer)
        (document,) = encoder.encode([Example((Span(prompt, False), Span(completion)))])
        targets = np.array(document.targets)
        ids = np.array(document.ids)
        assert token_bytes(tokenizer, ids[~targets].tolist()) == len(prompt.encode())
        assert document.nbytes == token_bytes(tokenizer, ids[1:][targets[1:]].tolist())
        assert tokenizer.decode(ids[len(encoder.prefix) : -1]) == prompt + completion


# chats


def chat(*turns: str) -> Example:
    """``role: content`` a turn."""
    messages = [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]
    return Example(messages=tuple(messages), where="a.jsonl:1")


@pytest.mark.parametrize("frame", [None, "<s> $A"])
def test_exactly_the_turns_of_the_assistant_and_their_end_markers_are_targets(frame: str | None) -> None:
    tokenizer = byte_level(frame, chat_template=TEMPLATE)
    example = chat("system: the mat", "user: the cat", "assistant: sat", "user: sat", "assistant: the café 日", "user: home")
    (document,) = Encoder(tokenizer).encode([example])
    assert parted(tokenizer, document) == [
        (False, "<s><|system|>the mat<|end|><|user|>the cat<|end|><|assistant|>"),
        (True, "sat<|end|>"),
        (False, "<|user|>sat<|end|><|assistant|>"),
        (True, "the café 日<|end|>"),
        (False, "<|user|>home<|end|>"),
    ]
    assert document.nbytes == len("satthe café 日".encode())


def test_when_the_assistant_begins_its_header_is_no_target() -> None:
    tokenizer = byte_level(chat_template=TEMPLATE)
    (document,) = Encoder(tokenizer).encode([chat("assistant: the cat", "user: sat", "assistant: home")])
    assert parted(tokenizer, document) == [
        (False, "<s><|assistant|>"),
        (True, "the cat<|end|>"),
        (False, "<|user|>sat<|end|><|assistant|>"),
        (True, "home<|end|>"),
    ]


@quickly
@given(turns=st.lists(st.tuples(st.sampled_from(("user", "assistant")), texts), min_size=1, max_size=4))
def test_the_bytes_of_a_chat_are_those_of_its_target_tokens(turns: list[tuple[str, str]]) -> None:
    turns.append(("assistant", "the cat"))
    for template in (TEMPLATE, WORDS):
        tokenizer = byte_level(chat_template=template)
        (document,) = Encoder(tokenizer).encode([chat("user: the", *(f"{role}: {text}" for role, text in turns))])
        ids, targets = np.array(document.ids), np.array(document.targets)
        assert document.nbytes == token_bytes(tokenizer, ids[targets].tolist())


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    encoder = Encoder(byte_level(chat_template=FORGETFUL))
    encoder.encode([chat("user: the", "assistant: so => cat")])
    with pytest.raises(EspalierError, match=r"a\.jsonl:1: the chat template renders turn 2 differently when other turns follow"):
        encoder.encode([chat("user: the", "assistant: so => cat", "user: and")])


def test_a_chat_without_an_assistant_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"a\.jsonl:1: no message has the role assistant"):
        Encoder(byte_level(chat_template=TEMPLATE)).encode([chat("user: the", "system: cat")])


def test_a_chat_without_a_template_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"a\.jsonl:1 is a chat, but the model's tokenizer has no chat template"):
        Encoder(byte_level()).encode([chat("user: the", "assistant: cat")])


def test_what_a_template_says_against_the_messages_is_passed_on() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(EspalierError, match=r"a\.jsonl:1: .*refuses these messages: roles must alternate"):
        Encoder(byte_level(chat_template=strict)).encode([chat("user: the", "assistant: cat")])


# the token store


def test_the_store_gives_back_documents_targets_and_bytes(tmp_path: Path) -> None:
    records = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "", "completion": "the café"}]
    tokenizer = byte_level("<s> $A")
    found = tokenized(json_lines(tmp_path / "a.jsonl", *records), tokenizer)
    assert [tokenizer.decode(ids) for ids in documents(found)] == ["<s>the cat sat</s>", "<s>the café</s>"]
    assert found.read_targets(0, found.tokens).tolist() == [
        flag for e in Encoder(tokenizer).encode(list(examples(open_source(tmp_path / "a.jsonl")))) for flag in e.targets
    ]
    assert found.nbytes.tolist() == [4, len("the café".encode())]
    assert found.kind == "prompt" and found.tokens == found.offsets[-1]


def test_text_that_is_all_target_stores_no_flags(tmp_path: Path) -> None:
    found = tokenized(json_lines(tmp_path / "a.jsonl", {"text": "the cat"}))
    assert found.read_targets(0, 2) is None
    assert not (found.path / "targets.bin").exists()


def test_the_same_data_are_tokenized_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    first = tokenized(tmp_path / "a.txt")
    written: list[int] = []
    second = open_store(open_source(tmp_path / "a.txt"), Encoder(byte_level()), written.append)
    assert second.path == first.path and written == []
    assert documents(second) == documents(first)


def test_a_changed_file_is_tokenized_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    first = tokenized(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("the dog")
    second = tokenized(tmp_path / "a.txt")
    assert second.path != first.path
    assert byte_level().decode(documents(second)[0]) == "the dog</s>"
    assert byte_level().decode(documents(first)[0]) == "the cat</s>"


def test_an_added_file_is_tokenized(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    assert tokenized(tmp_path).documents == 1
    (tmp_path / "b.txt").write_text("the dog")
    assert tokenized(tmp_path).documents == 2


def test_another_tokenizer_has_another_store(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    assert len({tokenized(tmp_path / "a.txt", kind()).path for kind in KINDS.values()}) == len(KINDS)


def test_another_chat_template_has_another_store_for_chats_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    chats = json_lines(tmp_path / "a.jsonl", {"messages": [{"role": r, "content": "the"} for r in ("user", "assistant")]})
    one, other = byte_level(chat_template=TEMPLATE), byte_level(chat_template=WORDS)
    assert tokenized(tmp_path / "a.txt", one).path == tokenized(tmp_path / "a.txt", other).path
    assert tokenized(chats, one).path != tokenized(chats, other).path


def test_a_failure_leaves_no_store_behind(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "the cat"}\n' * 5000 + "nonsense\n")
    folder = Path(os.environ["ESPALIER_CACHE"]) / "tokens"
    before = set(folder.iterdir())
    with pytest.raises(EspalierError, match=":5001 is not JSON"):
        tokenized(file)
    assert set(folder.iterdir()) == before


def test_two_processes_may_tokenize_the_same_data_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    exits: list[int] = []

    def let_another_be_first(tokens: int) -> None:
        if not exits and not (child := os.fork()):
            status = 1
            try:
                status = int(documents(tokenized(tmp_path / "a.txt")) == [])
            finally:
                os._exit(status)
        elif not exits:
            exits.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    found = open_store(open_source(tmp_path / "a.txt"), Encoder(byte_level()), let_another_be_first)
    assert exits == [0]
    assert byte_level().decode(documents(found)[0]) == TEXT + "</s>"
    assert not list(found.path.parent.glob(".*"))


def _shortened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["tokens.bin", "targets.bin", "documents.npy", "bytes.npy", "meta.json"])
@pytest.mark.parametrize(
    "harm",
    [Path.unlink, _shortened, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"[1]"), lambda file: file.write_bytes(b"\xff" * 999)],
    ids=["missing", "shortened", "empty", "other", "garbage"],
)
def test_damaged_tokens_are_refused_with_their_folder(tmp_path: Path, name: str, harm: Callable[[Path], Any]) -> None:
    file = json_lines(tmp_path / "a.jsonl", {"prompt": "the", "completion": " cat"}, {"prompt": "the", "completion": " dog"})
    found = tokenized(file)
    harm(found.path / name)
    with pytest.raises(EspalierError, match=rf"the cached tokens in {found.path} are damaged .*remove that folder"):
        tokenized(file)


def test_reading_touches_only_the_place_that_is_read(tmp_path: Path) -> None:
    tokens = 1 << 38  # a file of 512 GiB, of which only the last page exists
    with (tmp_path / "tokens.bin").open("wb") as file:
        file.truncate(2 * tokens - 8)
        file.seek(0, os.SEEK_END)
        file.write(np.array([5, 6, 7, 8], np.uint16).tobytes())
    found = TokenStore(tmp_path, "text", np.dtype(np.uint16), np.array([0, tokens]), np.array([0]), False, "")
    tracemalloc.start()
    assert found.read(tokens - 5, tokens).tolist() == [0, 5, 6, 7, 8]
    assert tracemalloc.get_traced_memory()[1] < 1 << 16
    tracemalloc.stop()


def test_tokenizing_holds_one_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 1 << 13)
    monkeypatch.setattr(store, "_BATCH_CHARACTERS", 1 << 15)
    (tmp_path / "a.txt").write_text(TEXT * 10_000)
    source, encoder = open_source(tmp_path / "a.txt"), Encoder(byte_level())
    tracemalloc.start()
    found = open_store(source, encoder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tokens > 300_000
    assert peak < 1 << 20  # the ids alone, as a list, would be 8 bytes a token


@pytest.mark.parametrize(("ids", "dtype"), [(range(1 << 16), "uint16"), (range((1 << 16) + 1), "uint32"), ([0, 1 << 16], "uint32")])
def test_ids_have_two_bytes_where_they_fit_and_else_four(tmp_path: Path, ids: list[int], dtype: str) -> None:
    vocabulary = {f"w{i}": i for i in ids}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    last = max(vocabulary.values())
    (tmp_path / "a.txt").write_text(f"w0 w{last} w0")
    found = tokenized(tmp_path / "a.txt", PreTrainedTokenizerFast(tokenizer_object=words))
    assert found.dtype == dtype
    assert found.read(0, 3).tolist() == [0, last, 0]


def test_a_json_document_is_refused(tmp_path: Path) -> None:
    """A .json array is no JSON lines; it would otherwise be learnt as if it were prose."""
    file = tmp_path / "data.json"
    file.write_text('[{"text": "a"}]')
    with pytest.raises(EspalierError, match=r"one JSON document.*\.jsonl"):
        open_source(file)
