"""The method of a delta that comes from disk: its update is what was stored, scaled, never trained."""

from __future__ import annotations

from typing import Any

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter
from espalier.delta.forms import Update


class Stored(Adapter):
    """Holds the stored update as a pattern; the tensors live in the slot, so they move with the model."""

    name = "stored"

    def __init__(self, pattern: Update | None, scale: float) -> None:
        self.pattern = pattern
        self.scale = scale

    @classmethod
    def of_many(cls, name: str, scale: float) -> Stored:
        """The method that stands for a whole stored delta, under the name of the method that made it."""
        made = cls(None, scale)
        made.name = name  # type: ignore[misc]
        return made

    def gain(self, target: Target) -> float:
        assert self.pattern is not None
        return float(self.pattern.gain) * self.scale

    def update(self, part: Any, context: Any) -> Update:
        assert self.pattern is not None
        update = self.pattern.with_tensors({name: getattr(part, name.replace(".", "__")) for name in self.pattern.tensors()})
        if not (self.pattern.exact_at_one and self.gain(part.target) == 1.0):
            update.gain = part.gain
        return update
