"""Prefix tuning: keys and values that every query also attends to."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from espalier.anatomy.site import Site
from espalier.attach.branch import Branch
from espalier.attach.method import Tensors
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import brancher


@brancher(
    "prefix", ids=(213,), paper="arXiv:2101.00190", learning_rate=1e-2, size="length", targets="heads", form="softmax(x W_q P_k^T) P_v", place="heads",
    insertion="parallel", composition="(1 - lambda) h + lambda change", starts_as_base=False,
)  # fmt: skip
class Prefix(Branch):
    """Train n keys P_k and values P_v for every key-value head: attention over ``[P_k; K]`` and ``[P_v; V]``.

    P_k and P_v (n, key-value heads, head size) start standard normal, as PEFT's. They are merged into attention by its
    log-sum-exp (``attach/attention.py``), which is the gate lambda of arXiv:2110.04366, so any attention implementation
    and packed sequences work, and tokens keep their positions. Prefix keys have no rotary phase. With ``shift`` the
    tokens' positions begin behind the prefix, as where it lies in a cache (PEFT). With ``projection`` m > 0 all are made,
    in training, by two layers from n shared vectors (n, d): ``P = tanh(E W_1 + b_1) W_2 + b_2``; only P is stored.
    """

    length: int = 30
    """n, the size of the prefix, at least 1"""
    projection: int = 0
    """m, the hidden size of the network that makes the prefix in training; 0: none"""
    shift: bool = False
    """move all tokens' positions behind the prefix's"""

    def check(self) -> None:
        at_least("length", self.length, 1)
        at_least("projection", self.projection, 0)

    def start(self, site: Site, model: nn.Module, stream: Stream) -> Tensors:
        if self.projection:
            return {}
        shape = (self.length, site.key_value_heads, site.head_dim)
        return {"key": nn.Parameter(stream.gaussian(*shape)), "value": nn.Parameter(stream.gaussian(*shape))}

    def start_shared(self, sites: Sequence[Site], stream: Stream) -> Tensors:
        if not self.projection:
            return {}
        width, outputs = sites[0].width, 2 * sum(site.key_value_heads * site.head_dim for site in sites)
        tensors = {
            "embedding": stream.gaussian(self.length, width),
            "first": stream.kaiming_uniform(self.projection, width),
            "first_bias": stream.kaiming_uniform(self.projection, fan_in=width),
            "second": stream.kaiming_uniform(outputs, self.projection),
            "second_bias": stream.kaiming_uniform(outputs, fan_in=self.projection),
        }
        return {name: nn.Parameter(tensor) for name, tensor in tensors.items()}

    def prepare(self, pool: Any, sites: Sequence[Site]) -> Mapping[str, Any]:
        inner = torch.tanh(functional.linear(pool.embedding, pool.first, pool.first_bias))
        made = functional.linear(inner, pool.second, pool.second_bias)
        sizes = [site.key_value_heads * site.head_dim for site in sites for _ in "kv"]
        parts = [part.unflatten(-1, (-1, site.head_dim)) for part, site in zip(made.split(sizes, -1), [s for s in sites for _ in "kv"], strict=True)]
        return {site.name: (parts[2 * i], parts[2 * i + 1]) for i, site in enumerate(sites)}

    def branch(self, part: Any, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        key, value = part.context if self.projection else (part.key, part.value)
        grouped = query.unflatten(1, (key.shape[1], -1))  # (batch, key-value heads, group, tokens, head size)
        logits = part.cap((grouped @ key.to(query.dtype).permute(1, 2, 0)[:, None]).to(part.wide) * part.scaling)
        lse = torch.logsumexp(logits, -1, keepdim=True)
        mean = torch.exp(logits - lse).to(query.dtype) @ value.to(query.dtype).transpose(0, 1)[:, None]
        return mean.flatten(1, 2), torch.ones_like(lse).flatten(1, 2), lse.flatten(1, 2)

    def positions(self) -> int:
        return self.length if self.shift else 0

    def stored(self) -> Prefix:
        plain = copy.copy(self)
        plain.projection = 0
        return plain

    def export(self, part: Any, pool: Any) -> Tensors:
        if not self.projection:
            return super().export(part, pool)
        key, value = self.prepare(pool, pool.targets)[part.site.name]
        return {"key": key.contiguous(), "value": value.contiguous()}

    def export_shared(self, pool: Any) -> Tensors:
        return {}

    def count(self, site: Site) -> int:
        return 0 if self.projection else 2 * self.length * site.key_value_heads * site.head_dim

    def count_shared(self, sites: Sequence[Site]) -> int:
        outputs = 2 * sum(site.key_value_heads * site.head_dim for site in sites)
        layers = sites[0].width * self.projection + self.projection + (self.projection + 1) * outputs
        return self.length * sites[0].width + layers if self.projection else 0
