"""FRUGAL: Adam for a part of the gradient, its sign for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from espalier.errors import EspalierError, at_least, within
from espalier.kernels.philox import Stream
from espalier.memory.rule import Shape
from espalier.memory.subspace import Choice, Kind, LowDimensional
from espalier.registry import optimizer


@optimizer("frugal", ids=(43,), paper="arXiv:2411.07837")
class Frugal(LowDimensional):
    """A share ``density`` of what the matrices of the blocks are has Adam's state; the rest moves by its sign (or as SGD).

    ``w -= lr (up(rule(R)) + rest_scale sign(S) + decay w)``. What the share is of is chosen anew every ``every`` steps and its
    moments start at zero: columns, rows or entries of each matrix, a projector of its singular vectors or a random one, or
    whole matrices (``blocks``; the share is then of their number).
    """

    density: float = 0.25
    """share that has state, in [0, 1]; 0 is signSGD"""
    rank: int = 0
    """columns, rows or singular vectors of each matrix that have state, in the place of the density; 0: as the density says"""
    split: Literal["columns", "rows", "entries", "svd", "randomized", "random", "blocks"] = "columns"
    """what is chosen"""
    rest_rule: Literal["sign", "sgd", "none"] = "sign"
    """what moves the rest"""
    rest_scale: float = 1.0
    """of the rest's step, at least 0"""
    every: int = 200
    """steps between choices"""
    rule: str = "adamw"
    """the optimizer that has the state"""
    beta1: float = 0.9
    """decay of the mean, in [0, 1)"""
    beta2: float = 0.999
    """decay of the mean square, in [0, 1)"""
    epsilon: float = 1e-8
    """added to the root of the mean square, at least 0"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""

    least_rank = 0
    moments = "reset"
    staggered = False

    def check(self) -> None:
        super().check()
        within("density", self.density, 0, 1)
        if self.rank and self.split in ("entries", "blocks"):
            raise EspalierError(f"rank is {self.rank}, which is of columns, rows or singular vectors; --split {self.split} takes --density")
        at_least("rest_scale", self.rest_scale, 0)
        self.has_rest = self.rest_rule != "none"
        self.chooses_among_all = self.split == "blocks"
        self.choice: Choice = self.split if self.split in ("svd", "randomized") else "random"  # type: ignore[assignment]

    def kind(self, shape: Shape) -> Kind:
        if self.split == "blocks":
            return "whole"
        return self.split if self.split in ("columns", "rows", "entries") else super().kind(shape)  # type: ignore[return-value]

    def size(self, shape: Shape) -> int:
        rows, columns = shape
        of = {"columns": columns, "rows": rows, "entries": rows * columns}.get(self.split, min(shape))
        if self.rank:
            return min(self.rank, of)
        return int(self.density * of) if self.split in ("columns", "rows", "entries") else round(self.density * of)

    def state_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes of state; of blocks, those of as many of the largest matrices as are chosen at once."""
        return self._at_once(shapes, super().state_bytes)

    def summed_bytes(self, shapes: Mapping[str, Shape]) -> int:
        return self._at_once(shapes, super().summed_bytes)

    def _at_once(self, shapes: Mapping[str, Shape], count: Callable[[Mapping[str, Shape]], int]) -> int:
        if self.split != "blocks":
            return count(shapes)
        each = {name: count({name: shape}) for name, shape in shapes.items()}
        split = sorted((each.pop(name) for name, shape in shapes.items() if self.splits(name, shape)), reverse=True)
        return sum(each.values()) + sum(split[: round(self.density * len(split))])

    def basis(self, gradient: torch.Tensor, stream: Stream, period: int, place: tuple[int, int], last: torch.Tensor | None) -> torch.Tensor:
        if self.split != "blocks":
            return super().basis(gradient, stream, period, place, last)
        which, of = place
        active = round(self.density * of)
        turn = int(Stream(self.seed, "order of the blocks").permutation(of)[which])  # all have their turn before one has it again
        return torch.zeros(1 if (turn - period * active) % of < active else 0)

    def rest(self, rest: torch.Tensor, reduced: torch.Tensor, direction: torch.Tensor, kind: Kind, state: dict[str, Any]) -> torch.Tensor:
        return (rest.sign() if self.rest_rule == "sign" else rest) * self.rest_scale
