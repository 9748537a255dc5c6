"""Keeping a frozen model's linear weights as codes, for training deltas on what memory does not hold otherwise."""

from __future__ import annotations

import torch
from torch import nn

from espalier.anatomy.parameters import parameters
from espalier.attach.coded import CodedWeight
from espalier.attach.routes import rebuild
from espalier.errors import one_of


@torch.no_grad()
def quantize_base(model: nn.Module, bits: int) -> nn.Module:
    """Keep the weights of linear layers as codes, in place; heads, embeddings, norms, biases and fused experts stay as they are.

    The parameters keep their names and shapes, on the meta device. Before deltas are put on the model.

    Args:
        bits: 8 or 4.

    Raises:
        EspalierError: for other bits.
    """
    one_of("base_bits", bits, (4, 8))
    for target in parameters(model):
        if target.routes != ("linear",) or target.role.startswith("head"):
            continue
        path, _, local = target.name.rpartition(".")
        module = model.get_submodule(path)
        weight = module._parameters[local]
        assert weight is not None
        module.add_module("espalier_base", CodedWeight(weight.t() if target.transposed else weight, bits))
        module._parameters[local] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        rebuild(module)
    return model
