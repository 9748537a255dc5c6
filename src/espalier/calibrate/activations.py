"""The hidden states (or their gradients) of all sequences at one place of the model: a file of rows, read by sequence.

They are on disk because a run that is killed goes on from them; while there is memory, the system keeps them there too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from espalier.checkpoint.atomic import atomic_file
from espalier.checkpoint.safetensors_file import tensor_bytes
from espalier.errors import EspalierError


class Activations:
    """Rows (tokens, width) of sequences of the given lengths, in order, in ``path``."""

    def __init__(self, path: Path, lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self.path, self.width, self.dtype = path, width, dtype
        self._starts = [0]
        for length in lengths:
            self._starts.append(self._starts[-1] + length)

    @property
    def nbytes(self) -> int:
        return self._starts[-1] * self.width * self.dtype.itemsize

    @contextlib.contextmanager
    def write(self) -> Iterator[Callable[[torch.Tensor], None]]:
        """Yields what appends the rows of the next sequence; the file is there when all are."""
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:

            def append(rows: torch.Tensor) -> None:
                file.write(tensor_bytes(rows.to(self.dtype)))

            yield append
            file.flush()

    @contextlib.contextmanager
    def read(self) -> Iterator[Callable[[int], torch.Tensor]]:
        """Yields what reads the rows of a sequence, (1, n, width).

        Raises:
            EspalierError: when the file is not the one that was written.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise EspalierError(f"{self.path} cannot be read: {error.strerror}; remove {self.path.parent}") from error
        try:
            if (size := os.fstat(descriptor).st_size) != self.nbytes:
                raise EspalierError(f"{self.path} has {size:,} bytes, not {self.nbytes:,}; remove {self.path.parent}")

            def rows(index: int) -> torch.Tensor:
                first, last = self._starts[index], self._starts[index + 1]
                step = self.width * self.dtype.itemsize
                content = bytearray(os.pread(descriptor, (last - first) * step, first * step))
                return torch.frombuffer(content, dtype=self.dtype).reshape(1, last - first, self.width)

            yield rows
        finally:
            os.close(descriptor)
