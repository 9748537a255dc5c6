"""Writes that either happen wholly or not at all: temporary name, fsync, rename, fsync of the folder.

A reader never sees a half-written file or directory, whenever the writer is killed. Leftover temporary
names (``.NAME.tmp-PID``) of dead writers are swept by the next write to the same target.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from espalier.errors import EspalierError


def fsync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _is_another_running(process: str) -> bool:
    """In a container a new process often has the number of the one that died: what bears our own is not at work."""
    return process.isdigit() and int(process) != os.getpid() and Path(f"/proc/{process}").exists()


def sweep_temporaries(path: Path) -> None:
    """Remove temporaries that writers of ``path`` left when they died."""
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
        if _is_another_running(leftover.name.rpartition("-")[2]):
            continue
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes ``path``, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(path)
    temporary = _temporary_name(path)
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` to ``path`` atomically, as UTF-8."""
    write_bytes(path, content.encode())


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory to fill; on success it becomes ``path``, on failure it is removed.

    Raises:
        EspalierError: when ``path`` exists and is not an empty directory.
    """
    refuse_existing(path)
    path = path.resolve()  # also where it is given as "." or as a link
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(path)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                fsync_file(Path(folder) / name)
            fsync_directory(Path(folder))
        temporary.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(path: Path) -> None:
    """Refuse an output that is already there.

    Raises:
        EspalierError: when ``path`` exists and is not an empty directory.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise EspalierError(f"{path} already exists; give an --out that does not, or remove it first")


def require_free_space(path: Path, needed: int, what: str) -> None:
    """Refuse to start writing ``needed`` bytes where the disk has fewer.

    Raises:
        EspalierError: when the file system of ``path`` has less free space than ``needed``.
    """
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EspalierError(
            f"{what} needs {needed / 2**20:,.1f} MiB on the disk of {folder}, which has {free / 2**20:,.1f} MiB free"
        )
