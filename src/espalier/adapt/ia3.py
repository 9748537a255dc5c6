"""IA3: one scale for each output, or input, of a matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Diagonal
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("ia3", ids=(), paper="arXiv:2205.05638", learning_rate=3e-3, targets="attention.k,attention.v,mlp.down", size="")
class IA3(Adapter):
    """Scale keys, values and the hidden features of the feed-forward: ``W' = diag(1 + s) W``, or ``W diag(1 + s)``.

    s starts at zero, so the start is the base, and weight decay pulls to it; the paper trains l = 1 + s. Outputs are
    scaled, but of the matrix that ends the feed-forward (``mlp.down``, ``experts.down``) the inputs, which is l_ff of
    the paper, and of an embedding the features. Where q, k and v are one matrix, name ``attention.qkv``: all three are
    scaled. Biases are left as they are: the paper's model has none (PEFT scales them with the outputs).
    """

    def _side(self, target: Target) -> str:
        return "columns" if target.role.endswith(".down") or target.route == "lookup" else "rows"

    def _shape(self, target: Target) -> tuple[int, ...]:
        return *target.lead, target.inputs if self._side(target) == "columns" else target.outputs

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {"s": nn.Parameter(torch.zeros(self._shape(target)))}

    def update(self, part: Any, context: Any) -> Diagonal:
        sides = {"rows": None, "columns": None, self._side(part.target): 1 + part.s}
        return Diagonal(sides["rows"], sides["columns"], part.target.shape, part.gain)

    def count(self, target: Target) -> int:
        return math.prod(self._shape(target))
