"""Keeping a frozen model's matrices as codes, for training deltas on what memory does not hold otherwise."""

from __future__ import annotations

import torch
from torch import nn

from espalier.anatomy.parameters import parameters
from espalier.attach.coded import CodedWeight
from espalier.attach.routes import rebuild
from espalier.errors import one_of


@torch.no_grad()
def quantize_base(model: nn.Module, bits: int) -> nn.Module:
    """Keep the weights of linear layers and fused experts as codes, in place; heads, embeddings, norms and biases stay as they are.

    Such a parameter is no parameter of its module any more. It leaves its shape there, as a tensor on the meta device, and
    ``anatomy.parameters`` still finds it. Before deltas are put on the model, and before it is sharded.

    Args:
        bits: 8 or 4.

    Raises:
        EspalierError: for other bits.
    """
    one_of("base_bits", bits, (4, 8))
    others = []
    for target in parameters(model):
        path, _, local = target.name.rpartition(".")
        module = model.get_submodule(path)
        weight = module._parameters[local]
        assert weight is not None
        if target.routes not in (("linear",), ("experts",)) or target.role.startswith("head"):
            others.append(weight)
            continue
        if "espalier_base" not in module._modules:
            module.add_module("espalier_base", nn.ModuleDict())
        logical = weight.transpose(-1, -2) if target.transposed else weight
        module.get_submodule("espalier_base").add_module(local, CodedWeight(logical, bits, target.transposed))
        module._parameters[local] = None  # which keeps its place in the order
        module.__dict__[local] = torch.empty_like(weight, device="meta", requires_grad=False)
        rebuild(module)
    for parameter in others:  # a file that was mapped stays in memory, all of it, while one of its tensors does
        parameter.data = parameter.data.clone()
    return model
