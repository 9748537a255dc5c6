"""What a data set is: files of plain text, or JSON lines, read one example at a time.

An example is a list of spans, each a text and whether its tokens are targets of the loss:

- plain text (a file, or every file of a folder, is one document): one span, all targets;
- JSON lines with ``text``: likewise; with ``text`` and ``label``: the label is to be told from the text, and what is
  learnt; with ``prompt`` and ``completion``: only the completion is a target;
  with chat ``messages``: rendered by the tokenizer's chat template, only assistant turns are targets.

A record may also name the ``task`` that it belongs to, for methods that tell tasks apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from espalier.checkpoint.fingerprint import file_identity
from espalier.errors import EspalierError

PIECE = 1 << 20
"""Characters of a text file that are read and tokenized at a time."""


@dataclass(frozen=True)
class Span:
    """A piece of text and whether its tokens are targets."""

    text: str
    is_target: bool = True


@dataclass(frozen=True)
class Example:
    """One document: spans of text, or chat messages that a template still has to render; its label and its task, if it has them."""

    spans: tuple[Span, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    where: str = ""
    label: str | None = None
    task: str = ""


@dataclass(frozen=True)
class Source:
    """The files of a data set, in order, and what kind they are (``text``, ``label``, ``prompt``, ``chat``)."""

    name: str
    files: tuple[Path, ...]
    kind: str

    def identity(self) -> str:
        """A hash that changes when any file is replaced or modified."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file_identity(file)}\n".encode())
        return digest.hexdigest()


def open_source(data: str | Path) -> Source:
    """The data set at a path or of a bundled name (``stdlib:...``).

    Raises:
        EspalierError: when there is nothing to read, or what there is has an unknown shape.
    """
    text = str(data)
    if text.startswith("stdlib:"):
        from espalier.bundled.corpus import bundled_files

        files = bundled_files(text.removeprefix("stdlib:"))
        return Source(text, tuple(files), _kind(files[0]))
    path = Path(data)
    if not path.exists():
        raise EspalierError(f"--data {path} does not exist; give a file or folder of text, a .jsonl file, or stdlib:NAME")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not any(x.startswith(".") for x in p.relative_to(path).parts))
        if not files:
            raise EspalierError(f"--data {path} is a folder without files")
    else:
        files = [path]
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise EspalierError(f"--data {path} mixes kinds of examples ({', '.join(sorted(kinds))}); give one kind at a time")
    return Source(text, tuple(files), kinds.pop())


def _is_json_lines(file: Path) -> bool:
    return file.suffix in (".jsonl", ".ndjson")


def _kind(file: Path) -> str:
    if file.suffix == ".json":
        raise EspalierError(f"{file} is one JSON document; write its records as JSON lines, one object per line, in a .jsonl file")
    if not _is_json_lines(file):
        return "text"
    with _open_text(file) as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    return _record(line, file, number)[0]
        except UnicodeDecodeError as error:
            raise _not_text(file) from error
    raise EspalierError(f"{file} is empty")


def _open_text(file: Path) -> IO[str]:
    try:
        return file.open(encoding="utf-8", newline="")
    except OSError as error:
        raise EspalierError(f"{file} cannot be read: {error.strerror}") from error


def _not_text(file: Path) -> EspalierError:
    with file.open("rb") as lines:  # the decoder counts from the block that it was reading
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                return EspalierError(f"{file}:{number} is not UTF-8 text (byte {byte:#04x}); remove the file from the data")
    return EspalierError(f"{file} changed while it was read")


def _record(line: str, file: Path, number: int) -> tuple[str, Example]:
    where = f"{file}:{number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EspalierError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise EspalierError(f"{where} is no JSON object; each line needs text, prompt and completion, or messages")
    if "\\ud" in line.lower():  # JSON can write half of a surrogate pair, which is no text
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise EspalierError(f"{where} holds half a character (an unpaired surrogate such as \\ud83d); remove it") from error

    def text_of(key: str) -> str:
        if not isinstance(record[key], str):
            raise EspalierError(f"{where}: {key!r} is {type(record[key]).__name__}; it must be a string")
        return record[key]

    task = record.get("task")
    named: dict[str, Any] = {"where": where, "task": str(task).strip() if isinstance(task, int | str) and not isinstance(task, bool) else ""}
    if "messages" in record:
        messages = record["messages"]
        if not (
            isinstance(messages, list)
            and messages
            and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
        ):
            raise EspalierError(f"{where}: messages must be a non-empty list of objects with role and content")
        return "chat", Example(messages=tuple(messages), **named)
    if "completion" in record and "prompt" in record:
        return "prompt", Example((Span(text_of("prompt"), False), Span(text_of("completion"))), **named)
    if "text" in record and "label" in record:
        return "label", Example((Span(text_of("text")),), label=_label(record["label"], where), **named)
    if "text" in record:
        return "text", Example((Span(text_of("text")),), **named)
    raise EspalierError(f"{where} has keys {sorted(record)}; it needs text, prompt and completion, or messages")


def _label(value: Any, where: str) -> str:
    """A label by its name: a whole number and its digits are one label."""
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise EspalierError(f"{where}: the label is {value!r}; it must be a name or a whole number")
    return str(value)


def examples(source: Source) -> Iterator[Example]:
    """Every example, in the order of the files and lines; a text file longer than ``PIECE`` comes as one
    example whose spans are read lazily by :func:`pieces`.

    Raises:
        EspalierError: naming file and line of the first example that is malformed.
    """
    for file in source.files:
        if not _is_json_lines(file):
            yield Example(where=str(file))
            continue
        with _open_text(file) as lines:
            try:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    kind, example = _record(line, file, number)
                    if {kind, source.kind} == {"text", "label"}:
                        has, others = ("no", "some") if kind == "text" else ("a", "none")
                        raise EspalierError(f"{file}:{number} has {has} label, and the lines before have {others}; every line needs one, or none has")
                    if kind != source.kind:
                        raise EspalierError(f"{file}:{number} is of kind {kind}, the lines before of {source.kind}")
                    yield example
            except UnicodeDecodeError as error:
                raise _not_text(file) from error


def pieces(file: Path) -> Iterator[str]:
    """A text file in pieces of about a million characters, cut after a line end so that words stay whole.

    Raises:
        EspalierError: when the file is not UTF-8 text.
    """
    with _open_text(file) as stream:
        try:
            rest = ""
            while block := stream.read(PIECE):
                rest += block
                cut = rest.rfind("\n") + 1
                if cut or len(rest) >= PIECE:
                    cut = cut or len(rest)
                    yield rest[:cut]
                    rest = rest[cut:]
            if rest:
                yield rest
        except UnicodeDecodeError as error:
            raise _not_text(file) from error
