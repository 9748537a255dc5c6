"""BitFit: biases train, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import Dense
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("bitfit", ids=(), paper="arXiv:2106.10199", learning_rate=1e-3, targets="bias", size="")
class BitFit(Adapter):
    """Train all biases: ``b' = b + d``, d starting at zero.

    Norms' biases are among them. The paper's smaller set is ``--targets attention.q.bias,mlp.up.bias``; with
    ``--targets norm`` the norms' scales train, alone or beside ``bias``. A model without biases is refused. The update
    is added in float32, where ``full`` sets the numbers themselves: weight decay pulls to the base.
    """

    def accepts(self, target: Target) -> bool:
        return True

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {"values": nn.Parameter(torch.zeros(target.shape))}

    def update(self, part: Any, context: Any) -> Dense:
        return Dense(part.values, part.gain)

    def count(self, target: Target) -> int:
        return target.size
