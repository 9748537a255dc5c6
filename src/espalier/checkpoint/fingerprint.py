"""What a model is, independent of how its files are cut: a hash over its logical tensors.

The fingerprint of a directory is the SHA-256 over the sorted lines ``name dtype shape sha256(bytes)`` of
its tensors, so re-sharding does not change it. Hashes of tensors are cached per file under
:func:`cache_directory` by (path, size, modification time, inode), those that it had when it was opened: what was read while
the file was written to is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from espalier.checkpoint.atomic import write_text
from espalier.checkpoint.safetensors_file import SafetensorsFile, TensorInfo


def cache_directory() -> Path:
    """Where Espalier keeps what it can compute again: ``$ESPALIER_CACHE`` or ``~/.cache/espalier``."""
    if explicit := os.environ.get("ESPALIER_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espalier"


def file_identity(path: Path) -> str:
    """A string that changes when a file is replaced or modified: path, size, modification time, inode."""
    real = path.resolve()
    status = real.stat()
    return f"{real}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached(file: SafetensorsFile) -> Path:
    identity = "|".join(map(str, (file.path.resolve(), *file.opened)))  # as that of file_identity
    return cache_directory() / "hashes" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"


def known_hashes(file: SafetensorsFile) -> dict[str, str] | None:
    """SHA-256 of each tensor's bytes when the cache has them for this very file, else ``None``."""
    if file.status() != file.opened:
        return None
    try:
        hashes = json.loads(_cached(file).read_text())
        return hashes if hashes.keys() == file.tensors.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def remember_hashes(file: SafetensorsFile, hashes: Mapping[str, str]) -> None:
    """Put the hashes of all of a file's tensors into the cache, where that can be written and the file did not change since it was opened."""
    if file.status() != file.opened:
        return
    with contextlib.suppress(OSError):
        write_text(_cached(file), json.dumps(dict(hashes)))


def tensor_hashes(file: SafetensorsFile) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, from the cache when the file is the one that was hashed."""
    if (hashes := known_hashes(file)) is not None:
        return hashes
    hashes = {}
    for name in file.tensors:
        digest = hashlib.sha256()
        file.read_bytes(name, digest.update)
        hashes[name] = digest.hexdigest()
    remember_hashes(file, hashes)
    return hashes


def combine(tensors: Mapping[str, TensorInfo], hashes: Mapping[str, str]) -> str:
    """The fingerprint of a model from its tensors' entries and hashes: ``"sha256:..."``."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        info = tensors[name]
        shape = "x".join(map(str, info.shape))
        digest.update(f"{name} {info.dtype} {shape} {hashes[name]}\n".encode())
    return f"sha256:{digest.hexdigest()}"
