"""What this process has used: peak and present resident memory, from the kernel's own counters."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def _read(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def peak_memory() -> int:
    """Peak resident bytes of this process since it began (VmHWM); where /proc is missing, of getrusage."""
    if _STATUS.exists():
        return _read("VmHWM")
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Resident bytes of this process now (VmRSS); the peak where /proc is missing."""
    return _read("VmRSS") if _STATUS.exists() else peak_memory()


def available_memory() -> int:
    """Bytes of main memory that this machine could give a process now (MemAvailable); 1 TiB where /proc is missing."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 1 << 40


def parse_bytes(text: str) -> int:
    """``"2GiB"``, ``"1500MB"``, ``"800000000"`` as a number of bytes.

    Raises:
        EspalierError: for anything else.
    """
    from espalier.errors import EspalierError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if not found:
        raise EspalierError(f"{text!r} is no amount of memory; write it like 2GiB, 800MiB or 1500MB")
    number, prefix, binary = found.groups()
    step = 1024 if binary else 1000
    return round(float(number) * step ** " KMGT".index(prefix.upper() or " "))


def release_free_memory() -> None:
    """Give the C heap's free pages back to the system, where the C library can (glibc).

    Tensors of many sizes leave holes in the heap that are never given back by themselves, and that grow with the
    number of steps.
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _libc() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # no such thing on this system
        return None


def format_bytes(count: float) -> str:
    """A number of bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
