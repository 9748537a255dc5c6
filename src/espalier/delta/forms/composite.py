"""Forms made of other updates, and how these are kept: one way for all of them.

The tensors of the part called NAME are those of its own with ``NAME.`` before their names; the constants of the
whole have, under ``parts``, the form, gain and constants of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch

from espalier.delta.forms.update import Gain, Update, form
from espalier.errors import EspalierError

DEEPEST = 8
"""How many levels of parts within parts are read."""


class Composite(Update):
    """An update made of others of the same shape, and of the tensors in ``fields``."""

    parts: Mapping[str, Update]

    def __init__(self, parts: Mapping[str, Update], gain: Gain) -> None:
        self.parts = dict(parts)
        self.gain = gain
        self.shape = next(iter(self.parts.values())).shape
        self.shared = {f"{name}.{key}": factor for name, part in self.parts.items() for key, factor in part.shared.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        parts = {f"{name}.{key}": t for name, part in self.parts.items() for key, t in part.tensors().items()}
        return {**super().tensors(), **parts}

    def constants(self) -> dict[str, Any]:
        return {
            "parts": {
                name: {"form": part.form, "gain": float(part.gain), "constants": part.constants()}
                for name, part in self.parts.items()
            }
        }

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        own = {name: tensor for name, tensor in tensors.items() if name in self.fields}
        of: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.parts}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            if part in of and key:  # a form above may have tensors of its own
                of[part][key] = tensor
        return self._with_parts({n: p.with_tensors(of[n]) for n, p in self.parts.items()}, own)

    def _with_parts(self, parts: Mapping[str, Update], own: Mapping[str, torch.Tensor]) -> Self:
        """The same form over other parts and, by name, other tensors of its own."""
        other = super().with_tensors(own)
        other.parts = dict(parts)  # type: ignore[attr-defined]
        other.shape = next(iter(parts.values())).shape
        return other  # type: ignore[return-value]

    def unbind(self) -> list[Update]:
        own = {name: tensor.unbind(0) for name, tensor in Update.tensors(self).items()}
        parts = {name: part.unbind() for name, part in self.parts.items()}
        return [
            self._with_parts({n: p[e] for n, p in parts.items()}, {n: t[e] for n, t in own.items()})
            for e in range(self.shape[0])
        ]

    def _sliced_parts(self, start: int, stop: int) -> dict[str, Update] | None:
        """The parts of those rows, or ``None`` where any needs other rows."""
        parts = {name: part.slice_rows(start, stop) for name, part in self.parts.items()}
        return {name: part for name, part in parts.items() if part is not None} if None not in parts.values() else None


def _of(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of one part, under their own names."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def read_parts(
    tensors: Mapping[str, torch.Tensor],
    constants: Mapping[str, Any],
    shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
    names: Iterable[str] | None = None,
    additive_in: str = "",
) -> dict[str, Update]:
    """The parts that constants describe.

    Args:
        shape: of what every part updates, or of what each does, by name.
        names: those that there must be; ``None`` for any number of them, numbered from 0.
        additive_in: the form, named in the error, whose parts may not depend on the base; by default any may.

    Raises:
        EspalierError: for other parts than those, an unknown form, one that depends on the base where it may not,
            a tensor that does not fit, or too many levels.
    """
    described = constants["parts"]
    level, depth = [constants], 0
    while level := [part["constants"] for one in level for part in one.get("parts", {}).values()]:
        depth += 1
        if depth > DEEPEST:
            raise EspalierError(f"the update is nested more than {DEEPEST} levels deep")
    wanted = list(map(str, range(len(described)))) if names is None else list(names)
    shapes = shape if isinstance(shape, Mapping) else dict.fromkeys(wanted, shape)
    if not wanted or set(described) != set(wanted):
        raise EspalierError(f"the parts are {list(described)}; they must be {wanted or 'at least one'}")
    parts = {}
    for name in wanted:
        part = described[name]
        kind: Any = form(part["form"])
        if not (additive_in and kind.depends_on_base):
            kind = kind.from_tensors(_of(name, tensors), part["constants"], shapes[name], _gain(part["gain"]))
        if additive_in and kind.depends_on_base:
            raise EspalierError(f"the form {kind.form!r} depends on the base and cannot stand inside a {additive_in}")
        parts[name] = kind
    return parts


def _gain(gain: Any) -> float:
    if not isinstance(gain, int | float) or not abs(gain) < float("inf"):
        raise EspalierError(f"the gain of a part is {gain!r}; it must be a finite number")
    return float(gain)
