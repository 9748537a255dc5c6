"""The hyperparameter that makes a method as large as a budget allows."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError

if TYPE_CHECKING:
    from espalier.attach.method import Method


def parse_numbers(text: str) -> int:
    """How many float32 numbers ``"200k"``, ``"1.5M"``, ``"40000"`` or, in bytes, ``"2MiB"``, ``"800kB"`` are.

    Raises:
        EspalierError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)(i?)(B?)\s*", str(text))
    if not found or (found[3] and not found[4]):
        raise EspalierError(f"trainable is {text!r}; write it like 200k or 1.5M (numbers), or 2MiB (bytes)")
    number = float(found[1]) * (1024 if found[3] else 1000) ** " kMG".index(found[2].replace("K", "k") or " ")
    return int(number / 4 if found[4] else number)


def fit(method: Method, targets: Sequence[Any], numbers: int) -> Method:
    """The method with the value of its ``size`` hyperparameter that trains the most numbers, at most so many.

    Counts grow with it, or fall (RandLoRA's rank), but do not turn; of values that train equally many, the smallest.

    Raises:
        EspalierError: when the method has no such hyperparameter, or even its smallest form trains more.
    """
    if not method.size:
        raise EspalierError(f"{method.name} has no hyperparameter that sets how many numbers train")

    def count(value: int) -> int | None:
        try:
            made = _with_size(method, value)
            made.check()
            return sum(made.count(target) for target in targets) + made.count_shared(targets)
        except EspalierError:
            return None

    highest = max(numbers, *(max(target.shape) for target in targets))
    tried = {value: found for value in _values(highest) if (found := count(value)) is not None}
    best = _best(tried, numbers)
    if best is None:
        least = min(tried.values(), default=0)
        raise EspalierError(f"{method.name} trains {least:,} numbers at least on these {len(targets)} parameters; {numbers:,} are allowed")
    while unseen := [value for value in _between(tried, best) if value not in tried]:
        tried |= {value: found for value in unseen if (found := count(value)) is not None}
        if not (set(unseen) & tried.keys()):
            break
        best = _best(tried, numbers) or best
    return _with_size(method, best)


def _with_size(method: Method, value: int) -> Method:
    other = copy.copy(method)
    setattr(other, method.size, value)
    return other


def trained(method: Method, targets: Sequence[Any]) -> int:
    """How many numbers a method trains on some parameters or sites."""
    return sum(method.count(target) for target in targets) + method.count_shared(targets)


def _values(highest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to ``highest`` and it."""
    values = {highest, *(size for power in range(highest.bit_length()) for size in (1 << power, 3 << power >> 1))}
    return sorted(value for value in values if 1 <= value <= highest)


def _best(tried: dict[int, int], numbers: int) -> int | None:
    """The value that trains the most numbers, at most so many; of equals, the smallest."""
    fitting = {value: found for value, found in tried.items() if found <= numbers}
    return max(fitting, key=lambda value: (fitting[value], -value)) if fitting else None


def _between(tried: dict[int, int], best: int) -> list[int]:
    """Up to 64 values, evenly spread, between the neighbours of ``best`` among those tried."""
    values = sorted(tried)
    at = values.index(best)
    low, high = values[max(at - 1, 0)], values[min(at + 1, len(values) - 1)]
    return sorted({low + (high - low) * k // 63 for k in range(64)})
