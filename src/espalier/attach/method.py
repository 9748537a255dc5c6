"""What an adaptation method is: starting tensors for a parameter, and the form that they make now.

A method is a dataclass of hyperparameters with two functions, like a gradient transformation: ``start``
makes the tensors of one parameter, ``update`` says which form they make in this forward pass. A method
whose parameters share factors also has ``start_shared`` and ``prepare``, which is called once per forward
of the whole model, outside recomputed regions. Everything else (layers, saving, merging, sharding,
recomputation, compilation) comes with the form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from espalier.anatomy.target import Target
from espalier.delta.forms import Update
from espalier.kernels.philox import Stream

Tensors = dict[str, torch.Tensor]
"""Name -> tensor; an ``nn.Parameter`` is trained, any other tensor is kept beside it unchanged."""


class Adapter:
    """Base of every method that updates parameters; fields of the subclass are its hyperparameters."""

    name: ClassVar[str]
    learning_rate: ClassVar[float] = 1e-4
    """Peak learning rate that ``tune`` takes when none is given."""
    takes: ClassVar[str] = "matrices"
    """What :meth:`accepts` accepts, in words."""
    targets: ClassVar[str] = "linear"
    """Targets that ``attach`` takes when none are given."""

    def check(self) -> None:
        """Refuse hyperparameters out of range.

        Raises:
            EspalierError: naming the hyperparameter, its value and the range.
        """

    def accepts(self, target: Target) -> bool:
        """Whether the method can update this parameter; by default, any matrix."""
        return target.is_matrix

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        """The private tensors of one parameter.

        Args:
            target: the parameter, with its logical shape.
            weight: the base weight, logical shape (..., out, in); not to be kept.
            stream: random numbers named after the parameter.
        """
        raise NotImplementedError

    def gain(self, target: Target) -> float:
        """What the update is multiplied by, such as alpha / rank."""
        return 1.0

    def update(self, part: Any, context: Any) -> Update:
        """The update that the tensors make now.

        Args:
            part: has every tensor of ``start`` as an attribute, plus ``target``, ``gain`` (0-d tensor) and
                ``base_dtype``.
            context: what ``prepare`` returned for this parameter, or ``None``.
        """
        raise NotImplementedError

    def export(self, part: Any, pool: Any) -> Update:
        """The update in the form in which it is stored; by default the one that it makes now."""
        return self.update(part, None)

    def companions(self, target: Target) -> Sequence[str]:
        """Names of further parameters that the tensors of this one update too, as far as the model has them.

        Such a parameter is no target of its own: :meth:`accompany` makes its update.
        """
        return ()

    def accompany(self, part: Any, companion: Target) -> Update:
        """The update of a companion, of the tensors of the parameter that it goes with (``part``, as for :meth:`update`)."""
        raise NotImplementedError

    def start_bound(self, target: Target) -> float:
        """The largest magnitude that an entry of the update has at the start; by default 0: the start is the base."""
        return 0.0

    def start_shared(self, targets: Sequence[Target], stream: Stream) -> Tensors:
        """Tensors that several parameters' updates read; owned once, at the model's root."""
        return {}

    def prepare(self, pool: Any, targets: Sequence[Target]) -> Mapping[str, Any]:
        """Context per parameter name, from the shared tensors (attributes of ``pool``)."""
        return {}

    def count(self, target: Target) -> int:
        """Trained numbers for one parameter (its part of the shared ones included): the planner's formula."""
        raise NotImplementedError
