"""NTK-Attention: a prefix of any length as a summary of fixed size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from espalier.anatomy.site import Site
from espalier.attach.branch import Branch
from espalier.attach.method import Tensors
from espalier.kernels.philox import Stream
from espalier.registry import brancher


@brancher(
    "ntk-attention", ids=(189,), paper="arXiv:2406.14036", learning_rate=1e-3, targets="heads", form="phi(x W_q) Z / phi(x W_q) |k|",
    place="heads", insertion="parallel", composition="(1 - lambda) h + lambda change",
)  # fmt: skip
class NTKAttention(Branch):
    """Add a learned linear attention to the softmax of every head, in place of a prefix.

    ``out = (sum_j exp(q k_j / sqrt d) v_j + phi(q) Z) / (sum_j exp(q k_j / sqrt d) + phi(q) |k|)`` with
    ``phi(x) = elu(x / d^(1/4)) + 1``; Z (heads, d, d) stands for the sum of phi(k_i) v_i^T over a prefix, k (heads, d) for
    that of phi(k_i). Both start at zero: the base. q is what attention sees, with its rotary phase. The slope of |k| at
    zero is taken as 1; as 0, k would never leave its start. Exponentials are taken in differences (``attach/attention.py``).
    """

    def start(self, site: Site, model: nn.Module, stream: Stream) -> Tensors:
        size = site.head_dim
        return {"Z": nn.Parameter(torch.zeros(site.heads, size, size)), "k": nn.Parameter(torch.zeros(site.heads, size))}

    def branch(self, part: Any, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        features = functional.elu(query * query.shape[-1] ** -0.25) + 1
        k = torch.where(part.k < 0, -part.k, part.k)
        return features @ part.Z, (features @ k[..., None]).to(part.wide), 0.0

    def count(self, site: Site) -> int:
        return site.heads * site.head_dim * (site.head_dim + 1)
