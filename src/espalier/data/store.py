"""The token store: a data set tokenized once, on disk, read by position, so that it may exceed memory.

A directory under the cache: ``tokens.bin`` (uint16 or uint32), ``targets.bin`` (one byte a token, only
where some tokens are no targets), ``documents.npy`` (offsets, int64), ``bytes.npy`` (target bytes a
document), ``labels.npy`` and ``tasks.npy`` (where they have labels or tasks: which of the names in meta.json, int64),
``meta.json``. Its name is a hash of the files' identities and the tokenizer's fingerprint.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from espalier.checkpoint.atomic import atomic_directory
from espalier.checkpoint.fingerprint import cache_directory, file_digest
from espalier.data.encode import Encoded, Encoder
from espalier.data.sources import Example, Source, examples, pieces
from espalier.errors import EspalierError

FORMAT = 4
_BATCH_CHARACTERS = 4 << 20
Item = TypeVar("Item")


@dataclass
class TokenStore:
    """A tokenized data set: ``offsets`` (documents + 1,) int64, ``nbytes`` (documents,) int64, ``digest`` of its content.

    Where documents have labels, ``labels`` (documents,) int64 says which of ``names``; where they are told apart by tasks,
    ``task_of`` (documents,) int64 which of ``tasks``, -1 for none.
    """

    path: Path
    kind: str
    dtype: np.dtype
    offsets: np.ndarray
    nbytes: np.ndarray
    has_targets: bool
    digest: str
    names: tuple[str, ...] = ()
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    tasks: tuple[str, ...] = ()
    task_of: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        self._tokens = os.open(self.path / "tokens.bin", os.O_RDONLY)
        self._targets = os.open(self.path / "targets.bin", os.O_RDONLY) if self.has_targets else -1

    def __del__(self) -> None:
        for descriptor in (getattr(self, "_tokens", -1), getattr(self, "_targets", -1)):
            if descriptor >= 0:
                os.close(descriptor)

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def predictions(self) -> int:
        """Tokens that have one before them in their document."""
        return int(np.maximum(np.diff(self.offsets) - 1, 0).sum())

    def by_task(self, things: Iterable[Item], document: Callable[[Item], int]) -> Mapping[str, Iterable[Item]]:
        """Things by the task of the document that each is of; all under "" where tasks are not told apart."""
        if not self.tasks:
            return {"": things}
        groups: dict[str, list[Item]] = {}
        for one in things:
            groups.setdefault(self.tasks[self.task_of[document(one)]], []).append(one)
        return groups

    def document_at(self, position: int) -> int:
        """The number of the document that a token belongs to."""
        return int(np.searchsorted(self.offsets, position, side="right")) - 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop) as int64."""
        size = self.dtype.itemsize
        return np.frombuffer(os.pread(self._tokens, (stop - start) * size, start * size), self.dtype).astype(np.int64)

    def read_targets(self, start: int, stop: int) -> np.ndarray | None:
        """Whether tokens [start, stop) are targets, as bool; ``None`` when all are."""
        if not self.has_targets:
            return None
        return np.frombuffer(os.pread(self._targets, stop - start, start), np.bool_)


def _documents(source: Source, encoder: Encoder) -> Iterator[list[Encoded] | tuple[list[int], int, bool]]:
    """Batches of whole documents, or (ids, bytes, ends) pieces of one long document."""
    batch: list[Example] = []
    size = 0
    for example in examples(source):
        if not example.spans and not example.messages:
            file = Path(example.where)
            if file.stat().st_size > _BATCH_CHARACTERS:
                if batch:
                    yield encoder.encode(batch)
                    batch, size = [], 0
                yield from _long_document(file, encoder)
                continue
            text = "".join(pieces(file))
            if not text:
                continue
            example = Example((_plain(text),), where=example.where)
        batch.append(example)
        size += sum(len(span.text) for span in example.spans) + 1000 * len(example.messages)
        if size > _BATCH_CHARACTERS or len(batch) >= 4096:
            yield encoder.encode(batch)
            batch, size = [], 0
    if batch:
        yield encoder.encode(batch)


def _plain(text: str) -> Any:
    from espalier.data.sources import Span

    return Span(text)


def _long_document(file: Path, encoder: Encoder) -> Iterator[tuple[list[int], int, bool]]:
    first = True
    for piece in pieces(file):
        nbytes = len(piece.encode())
        if first:
            framed = encoder.frame(encoder.ids([piece])[0], nbytes)
            ids, nbytes, first = framed.ids[: len(framed.ids) - len(encoder.end)], framed.nbytes, False
        else:
            ids = encoder.continued(piece)
        yield ids, nbytes, False
    yield list(encoder.end), 0, True


def _write(folder: Path, source: Source, encoder: Encoder, dtype: np.dtype, progress: Callable[[int], None]) -> dict[str, Any]:
    offsets, nbytes, total, open_bytes = [0], [], 0, 0
    has_targets = source.kind not in ("text", "label")
    labels: list[str] = []
    tasks: list[str] = []

    def put(tokens: IO[bytes], targets: IO[bytes], ids: list[int], flags: list[bool] | None) -> None:
        nonlocal total
        tokens.write(np.asarray(ids, dtype).tobytes())
        if has_targets:
            targets.write(np.asarray(flags if flags is not None else [True] * len(ids), np.bool_).tobytes())
        total += len(ids)

    with (folder / "tokens.bin").open("wb") as tokens, (folder / "targets.bin").open("wb") as targets:
        for item in _documents(source, encoder):
            if isinstance(item, list):
                for document in item:
                    put(tokens, targets, document.ids, document.targets)
                    offsets.append(total)
                    nbytes.append(document.nbytes)
                    labels += [document.label] if document.label is not None else []
                    tasks.append(document.task)
            else:
                ids, count, ends = item
                put(tokens, targets, ids, None)
                open_bytes += count
                if ends:
                    tasks.append("")
                    offsets.append(total)
                    nbytes.append(open_bytes)
                    open_bytes = 0
            progress(total)
    if not has_targets:
        (folder / "targets.bin").unlink()
    np.save(folder / "documents.npy", np.asarray(offsets, np.int64))
    np.save(folder / "bytes.npy", np.asarray(nbytes, np.int64))
    names = _ordered(set(labels))
    if labels:
        np.save(folder / "labels.npy", _numbers(labels, names))
    known = sorted(set(tasks) - {""})
    if known:
        np.save(folder / "tasks.npy", _numbers(tasks, known))
    digests = "".join(file_digest(file) for file in sorted(folder.iterdir()))
    said = json.dumps([names, known]) if known else json.dumps(names) if names else ""
    return {
        "format": FORMAT, "kind": source.kind, "dtype": dtype.name, "tokens": total, "documents": len(nbytes),
        "digest": f"sha256:{hashlib.sha256((digests + said).encode()).hexdigest()}", "names": names, "tasks": known,
    }  # fmt: skip


def _numbers(given: list[str], names: list[str]) -> np.ndarray:
    """Which of the names each one is, -1 for none; there may be as many names as records."""
    number = {name: n for n, name in enumerate(names)}
    return np.asarray([number.get(one, -1) for one in given], np.int64)


def _ordered(labels: set[str]) -> list[str]:
    """Labels by their number where all are whole numbers, else by name."""
    return sorted(labels, key=lambda label: (int(label), label)) if all(label.isascii() and label.isdigit() for label in labels) else sorted(labels)


def open_store(source: Source, encoder: Encoder, progress: Callable[[int], None] = lambda tokens: None, *, by_task: bool = False) -> TokenStore:
    """The token store of a data set, made when it is not in the cache.

    Args:
        progress: called with the number of tokens written so far.
        by_task: tell the tasks of documents apart, where they have any.

    Raises:
        EspalierError: when the data hold no token, or some documents have a task and others none, or what :func:`examples` raises.
    """
    template = encoder.template_fingerprint if source.kind == "chat" else None
    key = f"{FORMAT}|{source.identity()}|{source.kind}|{encoder.fingerprint}|{template}"
    folder = cache_directory() / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.exists():
        largest = max(encoder.tokenizer.get_vocab().values())
        dtype = np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)
        try:
            with atomic_directory(folder) as temporary:
                meta = _write(temporary, source, encoder, dtype, progress)
                if not meta["tokens"]:
                    raise EspalierError(f"--data {source.name} holds no text")
                (temporary / "meta.json").write_text(json.dumps(meta))
        except OSError as error:  # another process may have been first
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (folder / "meta.json").exists():
                raise
    try:
        meta = json.loads((folder / "meta.json").read_text())
        kind, dtype, size = meta["kind"], np.dtype(meta["dtype"]), meta["tokens"]
        offsets, nbytes = np.load(folder / "documents.npy"), np.load(folder / "bytes.npy")
        labels = np.load(folder / "labels.npy") if kind == "label" else np.empty(0, np.int64)
        store = TokenStore(folder, kind, dtype, offsets, nbytes, kind not in ("text", "label"), str(meta["digest"]), tuple(meta.get("names", ())), labels)
        if by_task and meta["tasks"]:
            store.tasks, store.task_of = tuple(meta["tasks"]), np.load(folder / "tasks.npy")
            if len(store.task_of) != meta["documents"]:
                raise ValueError("the list of tasks is not the one that was written")
        if kind == "label" and len(labels) != meta["documents"]:
            raise ValueError("the list of labels is not the one that was written")
        if len(offsets) != meta["documents"] + 1 or len(nbytes) != meta["documents"] or store.tokens != size:
            raise ValueError("the list of documents is not the one that was written")
        for name, expected in [("tokens.bin", size * dtype.itemsize), *([("targets.bin", size)] if store.has_targets else [])]:
            if (found := (folder / name).stat().st_size) != expected:
                raise ValueError(f"{name} has {found:,} bytes, not {expected:,}")
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
        raise EspalierError(f"the cached tokens in {folder} are damaged ({error}); remove that folder") from error
    if without := int((store.task_of < 0).sum()):
        raise EspalierError(f"--data {source.name}: {without} of {store.documents} records name no task; every record needs one, or none has")
    return store
