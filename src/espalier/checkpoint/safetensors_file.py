"""Reading and writing one safetensors file with positioned reads and nothing trusted.

The header is checked in full before a byte of data is allocated: known dtypes, sizes that match shapes,
offsets inside the file, no overlap, no hole. ``read`` is ``pread`` into fresh memory, ``read_into`` into a buffer
that is used again; ``map`` is a view of the file's own pages, which are no memory of the process.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import errno
import functools
import json
import math
import mmap
import os
import reprlib
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError

if TYPE_CHECKING:
    import torch

DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}
"""Name in the file -> (name in torch, bytes per element)."""

LARGEST_HEADER = 100 * 2**20
MOST_DIMENSIONS = 64
CHUNK = 16 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its dtype (the file's name for it), shape, and byte range in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a file dtype name such as ``"BF16"``."""
    import torch

    return getattr(torch, DTYPES[name][0])


def dtype_name(dtype: torch.dtype) -> str:
    """The file's name of a torch dtype, such as ``"BF16"``.

    Raises:
        EspalierError: for a dtype that safetensors files cannot hold.
    """
    wanted = str(dtype).removeprefix("torch.")
    for name, (torch_name, _) in DTYPES.items():
        if torch_name == wanted:
            return name
    raise EspalierError(f"tensors of dtype {wanted} cannot be stored in a safetensors file")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, as ``object_pairs_hook``.

    Raises:
        ValueError: when it names something twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"it names {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} twice")
    return found


class SafetensorsFile:
    """An open safetensors file: ``tensors`` maps names to :class:`TensorInfo`, ``read`` gives one tensor.

    Raises:
        EspalierError: naming the file (and tensor) when anything in the header is not as it must be.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        except (OSError, ValueError) as error:
            raise EspalierError(f"{self.path} cannot be read: {getattr(error, 'strerror', error)}") from error
        try:
            self.opened = self.status()
            self.tensors, self.metadata = self._parse_header()
        except OSError as error:
            self.close()
            raise EspalierError(f"{self.path} cannot be read: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def status(self) -> tuple[int, int, int]:
        """Size, modification time and inode of the open file, now; ``opened`` is what they were when it was opened."""
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns, found.st_ino

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0 and os is not None:  # when the interpreter ends, modules may be gone before
            self.close()

    def _refuse(self, why: str) -> EspalierError:
        return EspalierError(f"{self.path} is not a valid safetensors file: {why}")

    def _parse_header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise EspalierError(f"{self.path} cannot be read: it is no regular file")
        size = status.st_size
        if size < 8:
            raise self._refuse(f"it has {size} bytes, a header alone needs 8")
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if length > min(size - 8, LARGEST_HEADER):
            raise self._refuse(f"its header claims {length:,} bytes, the file has {size:,}")
        raw = os.pread(self._descriptor, length, 8)

        try:
            header = json.loads(raw.decode(), object_pairs_hook=unique)
            if b"\\u" in raw:  # escapes can spell lone surrogates, which no file name or header can repeat
                json.dumps(header, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise self._refuse(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._refuse("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._refuse("__metadata__ is not a map of strings")
        begin = 8 + length
        tensors = {name: self._check_entry(name, entry, begin, size) for name, entry in header.items()}
        position = begin
        for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
            if info.start != position:
                raise self._refuse(f"tensor {info.name!r} begins at byte {info.start}, the one before ends at {position}")
            position = info.stop
        if position != size:
            raise self._refuse(f"its tensors end at byte {position}, the file has {size} (truncated or padded?)")
        return tensors, metadata

    def _check_entry(self, name: str, entry: Any, begin: int, size: int) -> TensorInfo:
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise self._refuse(f"the entry of tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._refuse(f"tensor {name!r} has the unknown dtype {dtype!r}")

        def are_counts(values: Any) -> bool:
            return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)

        if not are_counts(shape) or len(shape) > MOST_DIMENSIONS or not are_counts(offsets) or len(offsets) != 2:
            raise self._refuse(f"tensor {name!r} has shape {reprlib.repr(shape)} and data_offsets {reprlib.repr(offsets)}")
        if math.prod(n for n in shape if n) >= 2**62:
            raise self._refuse(f"tensor {name!r} has shape {shape!r}, larger than any tensor")
        expected = math.prod(shape) * DTYPES[dtype][1]
        if offsets[1] - offsets[0] != expected or begin + offsets[1] > size:
            raise self._refuse(
                f"tensor {name!r} of {dtype} {shape} needs {expected:,} bytes; its data_offsets are {offsets}, "
                f"the file holds {size - begin:,}"
            )
        return TensorInfo(name, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])

    def info(self, name: str) -> TensorInfo:
        """The entry of ``name``.

        Raises:
            EspalierError: when the file has no such tensor.
        """
        if name not in self.tensors:
            raise EspalierError(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]

    def read_bytes(self, name: str, consume: Callable[[memoryview], object]) -> None:
        """Hand the tensor's bytes to ``consume`` in pieces of at most 16 MiB, holding one piece."""
        info = self.info(name)
        buffer = memoryview(bytearray(min(CHUNK, info.nbytes)))
        position = info.start
        while position < info.stop:
            piece = buffer[: min(len(buffer), info.stop - position)]
            self._fill(piece, position, name)
            consume(piece)
            position += len(piece)

    def _fill(self, buffer: memoryview, position: int, name: str) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done:]], position + done)
            if count == 0:
                raise self._refuse(f"it ended while tensor {name!r} was read")
            done += count

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in fresh memory, in the file's dtype."""
        import torch

        info = self.info(name)
        flat = torch.empty(info.nbytes, dtype=torch.uint8)
        self.read_into(flat.numpy(), name)
        return flat.view(torch_dtype(info.dtype)).reshape(info.shape)

    def read_into(self, buffer: Any, name: str, offset: int = 0) -> None:
        """Fill a writable byte buffer with the tensor's bytes from ``offset`` on."""
        info = self.info(name)
        view = memoryview(buffer)
        if offset < 0 or offset + len(view) > info.nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + len(view)} of {info.nbytes}")
        self._fill(view, info.start + offset, name)

    def map(self, name: str) -> torch.Tensor:
        """The tensor as a view of the file's pages, private to this process: reading it allocates nothing."""
        import torch

        info = self.info(name)
        if not info.nbytes:
            return torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
        item = DTYPES[info.dtype][1]
        if info.start % item:  # a foreign header may leave its data unaligned
            return self.read(name)
        flat = torch.frombuffer(self._map, dtype=torch_dtype(info.dtype), count=info.nbytes // item, offset=info.start)
        return flat.reshape(info.shape)

    def pages(self, name: str) -> Pages | None:
        """The tensor's bytes as views of the file's own pages; ``None`` where they are not aligned to its numbers."""
        info, whole = self.info(name), self.map(name)
        if not info.nbytes or info.start % DTYPES[info.dtype][1]:
            return None
        return Pages(whole.view(-1).view(torch_dtype("U8")), self._refuse(f"it ended while tensor {name!r} was read"))


class Pages:
    """Bytes of a file that is mapped, (bytes,) uint8; called with from and to it gives a view. Nothing is copied.

    The pages of a view are mapped at once, which costs far less than at the first touch of each, and stay so as long
    as this lives.
    """

    def __init__(self, everything: torch.Tensor, short: EspalierError) -> None:
        self._everything, self._short = everything, short
        self._begin, self._size = everything.data_ptr(), len(everything)

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        first = (self._begin + start) // mmap.PAGESIZE * mmap.PAGESIZE
        if _advise(first, self._begin + stop - first, _POPULATE_READ) == errno.EFAULT:
            raise self._short
        return self._everything[start:stop]

    def __del__(self) -> None:
        if sys is None or sys.is_finalizing():  # then the process gives all pages back, and modules may be gone before
            return
        first = -(-self._begin // mmap.PAGESIZE) * mmap.PAGESIZE
        _advise(first, max(self._begin + self._size - first, 0), _DONTNEED)


_DONTNEED, _POPULATE_READ = 4, 22  # sys/mman.h of Linux


@functools.cache
def _madvise() -> Any:
    import ctypes

    try:
        found = ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" else None
    except (OSError, AttributeError):  # another C library
        return None
    if found is not None:
        found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


def _advise(address: int, size: int, advice: int) -> int:
    """Tell the system about pages; the error, or 0. One that does not know the advice maps pages when they are touched."""
    import ctypes

    advise = _madvise()
    return ctypes.get_errno() if advise is not None and size and advise(address, size, advice) else 0


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor (copied when it is not contiguous or not on the CPU)."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class SafetensorsWriter:
    """Write a file whose tensors' names, dtypes and shapes are known first and whose data come in any order.

    ``layout`` maps each name to (file dtype name, shape). Every byte is written exactly once, whole tensors or parts
    of them, from any number of threads, so that a model is streamed. The caller makes the file durable.

    Raises:
        EspalierError: when a tensor has the name of the header's own entry.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self._spans: dict[str, tuple[int, int]] = {}
        self._layout = dict(layout)
        if "__metadata__" in layout:
            raise EspalierError(f"{path.name}: a tensor cannot be called '__metadata__', which is the header's own entry")
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        position = 0
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-DTYPES[item[1][0]][1], item[0])):
            length = math.prod(shape) * DTYPES[dtype][1]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + length]}
            self._spans[name] = (position, length)
            position += length
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._begin = 8 + len(raw)
        self._missing = {name: length for name, (_, length) in self._spans.items()}
        self._counting = threading.Lock()
        self.nbytes = self._begin + position
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.ftruncate(self._descriptor, self.nbytes)
        self._pwrite(memoryview(len(raw).to_bytes(8, "little") + raw), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place; it must have the declared dtype and shape."""
        dtype, shape = self._layout[name]
        if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (dtype, tuple(shape)):
            raise ValueError(f"{name}: declared {dtype} {shape}, given {tensor.dtype} {tuple(tensor.shape)}")
        self.write_bytes(name, tensor_bytes(tensor))

    def write_bytes(self, name: str, content: Any, offset: int = 0) -> None:
        """Write a part of a tensor, the bytes that belong at ``offset`` of it.

        Raises:
            ValueError: when they reach out of it, or more bytes come than it has.
        """
        start, length = self._spans[name]
        view = memoryview(content).cast("B")
        with self._counting:
            if offset < 0 or offset + len(view) > length or self._missing[name] < len(view):
                raise ValueError(f"{name}: bytes {offset} to {offset + len(view)} do not belong into its {length}, or were written twice")
            self._missing[name] -= len(view)
        self._pwrite(view, self._begin + start + offset)

    def _pwrite(self, view: memoryview, position: int) -> None:
        while len(view):
            done = os.pwrite(self._descriptor, view, position)
            view, position = view[done:], position + done

    def close(self) -> None:
        """Close the file, whatever has been written."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def require_complete(self) -> None:
        """Refuse a file that is not whole.

        Raises:
            ValueError: when a declared tensor was not written.
        """
        if missing := sorted(name for name, length in self._missing.items() if length):
            raise ValueError(f"{self.path}: never written: {missing[:5]}")


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a whole file of tensors that are in memory (not atomic by itself: see ``atomic``)."""
    layout = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = SafetensorsWriter(path, layout, metadata)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    writer.require_complete()


def read_safetensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """All (or the named) tensors of a file, in memory."""
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in (names if names is not None else file.tensors)}
