"""Streaming whole models: bytes read in slices into buffers that are used again, hashed on the way, by several threads.

Reads, writes, hashes and torch's arithmetic all release the interpreter's lock, so plain threads that each take one
tensor at a time keep disk and cores busy. What is resident is a buffer per thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.fingerprint import combine, known_hashes, remember_hashes

SLICE = 1 << 19
"""Bytes that are read at once: large enough for the disk, small enough that the arithmetic on them stays in cache."""


class Hashes:
    """The SHA-256 of a model's tensors, taken on bytes that are read anyway."""

    def __init__(self, directory: ModelDirectory) -> None:
        self.directory = directory
        self._taken: dict[str, Any] = {}

    def of(self, name: str) -> Any:
        """The hash of one tensor, to be updated with all of its bytes in order."""
        return self._taken.setdefault(name, hashlib.sha256())

    def complete(self, name: str) -> None:
        """Read and hash a tensor that nothing has read."""
        for _ in slices(self.directory, name, hashes=self):
            pass

    def __contains__(self, name: object) -> bool:
        return name in self._taken

    def fingerprint(self) -> str:
        """The model's fingerprint, when every tensor has been read; it is remembered for the next time."""
        found = {name: digest.hexdigest() for name, digest in self._taken.items()}
        for file in self.directory.files():
            tensors = self.directory.file(file)
            if found.keys() >= tensors.tensors.keys():
                remember_hashes(tensors, {name: found[name] for name in tensors.tensors})
        return combine({name: self.directory.info(name) for name in self.directory}, found)


def known_fingerprint(directory: ModelDirectory) -> str | None:
    """The fingerprint of a model whose files have all been hashed before, or ``None``."""
    hashes: dict[str, str] = {}
    for file in directory.files():
        if (known := known_hashes(directory.file(file))) is None:
            return None
        hashes.update(known)
    return combine({name: directory.info(name) for name in directory}, hashes)


def slices(
    directory: ModelDirectory, name: str, unit: int = 1, start: int = 0, stop: int | None = None, hashes: Hashes | None = None
) -> Iterator[tuple[int, memoryview]]:
    """(offset, bytes) of a tensor in order, in slices of about :data:`SLICE` bytes and whole multiples of ``unit``.

    Every slice lies in the same buffer, which the next one overwrites. ``hashes`` takes those of the tensors of its own model.
    """
    info = directory.info(name)
    stop = info.nbytes if stop is None else stop
    step = max(SLICE // max(unit, 1), 1) * max(unit, 1)
    digest = hashes.of(name) if hashes is not None and name in hashes.directory else None
    buffer = np.empty(max(min(step, stop - start), 0), np.uint8).data
    for position in range(start, stop, step):
        piece = buffer[: min(step, stop - position)]
        directory.read_into(piece, name, position)
        if digest is not None:
            digest.update(piece)
        yield position, piece


@contextlib.contextmanager
def one_thread_each() -> Iterator[int]:
    """Have torch's operations run in the thread that calls them; yields how many threads to work with."""
    import torch

    _keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield max(threads, 2)  # with one core too, reading and computing overlap
    finally:
        torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: slices of the same size are allocated again and again, and fresh pages cost more than they do."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, 32 << 20)
            mallopt(_M_TRIM_THRESHOLD, 256 << 20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
