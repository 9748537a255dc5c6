"""GradNormLoRP: length and direction of every row apart, the direction's gradient in a subspace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from espalier.kernels.sharded import put, whole
from espalier.memory import stored_state
from espalier.memory.rule import Part, Shape
from espalier.memory.subspace import OnProjector, Projected
from espalier.registry import optimizer


@optimizer("gradnorm-lorp", ids=(162,), paper="arXiv:2412.19616")
class GradNormLoRP(OnProjector):
    """``w_i = g_i v_i / ||v_i||`` for each row: the lengths g go by the rule, v by it in the leading singular space of its gradient.

    With D the rows of unit length, ``grad g = rowsum(G D)`` and ``grad v = G - D grad g``, which is tangent; v is w at every step, so
    only g and its slots are more than GaLore has. The released code undoes what the lengths learnt and leaves the tangent out;
    this is the paper's equations.
    """

    every: int = 250
    """steps between choices of P"""

    def adds_up(self) -> bool:
        return False  # there is a second sum, of the lengths' gradients

    copies = 3

    def more_bytes(self, shape: Shape, reduced: int) -> int:
        return len(self.slots) * stored_state.bytes_of(shape[0], self.state)

    def build(self, parameters: Mapping[str, torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        return _Normalized(self, self._groups(parameters), learning_rate)


class _Normalized(Projected):
    """What moves lengths and directions, and then puts them together."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lengths: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def _move_all(self) -> None:
        super()._move_all()
        for parameter, lengths in self._lengths:
            moved = whole(parameter.detach()).float()
            norms = moved.norm(dim=1, keepdim=True)
            # a row of zeros has no length to keep, and takes that of its first step
            has_length = (norms > 0) & (lengths[:, None] != 0)
            put(parameter, torch.where(has_length, moved * (lengths[:, None] / norms.clamp_min(1e-30)), moved))
        self._lengths.clear()

    def _parts(self, parameter: torch.nn.Parameter) -> Iterator[tuple[torch.Tensor, Part]]:
        name = self.names[id(parameter)]
        yield from super()._parts(parameter)
        if name in self.offsets:
            lengths, units = _lengths_and_units(whole(parameter.detach()))
            gradient = (whole(parameter.grad).float() * units).sum(1)  # type: ignore[arg-type]
            self._lengths.append((parameter, lengths))
            state = self.state[parameter]
            state["lengths_step"] = state.get("lengths_step", torch.zeros(())) + 1  # their slots stay where those of R are reset
            yield lengths, Part(f"{name} lengths", state, len(lengths), len(lengths), 0, gradient, "lengths_")

    def _gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        gradient = super()._gradient(parameter)
        units = _lengths_and_units(whole(parameter.detach()))[1]
        return gradient - units * (gradient * units).sum(1, keepdim=True)


def _lengths_and_units(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of the rows, (out,), and rows of unit length; rows of zeros stay such."""
    lengths = weight.float().norm(dim=1)
    return lengths, weight.float() / torch.where(lengths > 0, lengths, 1.0)[:, None]
