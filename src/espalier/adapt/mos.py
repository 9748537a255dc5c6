"""MoS: low-rank factors assembled from shards that all layers of a kind share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import LowRank, Pooled
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("mos", ids=(13,), paper="MoS, ICLR 2025", learning_rate=2e-4, size="equivalent_rank")
class MoS(Adapter):
    """Assemble each layer's B and A from pools of shards: ``W' = W + (alpha / r) B_k A_k``.

    All L matrices of one shape share two pools: S_A (L e l, in / l) and S_B (L e l, out / l), with e the
    equivalent rank (the trained numbers of a LoRA of rank e) and l the shards per vector. Row j of A_k is
    the concatenation of the shards S_A[I_a[k, j]], column j of B_k of S_B[I_b[k, j]]; the indices are drawn
    once, apart for A and B (pair dissociation). The first ``private`` ranks of a layer index shards that no
    other layer may (privatization); the others draw from the public ones without replacement within a layer
    while they last. S_A starts as LoRA's A, S_B at zero. Stored: the pools, and the indices (int32).

    The official repository's readable branch holds an earlier method; pools and indices follow the paper as
    our notes give it. Matrices are grouped by shape here, where the paper groups by type of layer.
    """

    rank: int = 16
    """materialised rank r of each layer, at least 1"""
    equivalent_rank: int = 2
    """e: trains as many numbers as LoRA of this rank would"""
    private: int = 1
    """ranks of each layer made of its own shards, less than or equal to equivalent_rank"""
    shards: int = 4
    """l: shards per vector; must divide the sizes of every matrix"""
    alpha: float = 32.0
    """the update is multiplied by alpha / rank"""

    def check(self) -> None:
        for name in ("rank", "equivalent_rank", "shards"):
            at_least(name, getattr(self, name), 1)
        if not 0 <= self.private <= min(self.equivalent_rank, self.rank):
            raise EspalierError(f"private is {self.private}; it must be from 0 to equivalent_rank and rank ({self.equivalent_rank}, {self.rank})")

    def gain(self, target: Target) -> float:
        return self.alpha / self.rank

    def _groups(self, targets: Sequence[Target]) -> dict[str, list[Target]]:
        groups: dict[str, list[Target]] = {}
        for target in targets:
            if target.outputs % self.shards or target.inputs % self.shards:
                raise EspalierError(f"shards is {self.shards}, which does not divide {target.name} of {target.outputs} x {target.inputs}")
            groups.setdefault(f"{target.outputs}x{target.inputs}", []).append(target)
        return groups

    def start_shared(self, targets: Sequence[Target], stream: Stream) -> Tensors:
        tensors: Tensors = {}
        for name, group in self._groups(targets).items():
            layers = sum(math.prod(t.lead) for t in group)
            count = layers * self.equivalent_rank * self.shards
            inputs, outputs = group[0].inputs, group[0].outputs
            own = stream.named(f"mos {name}")
            start = own.kaiming_uniform(count, inputs // self.shards, fan_in=inputs)
            tensors[f"A_{name}"] = nn.Parameter(start)
            tensors[f"B_{name}"] = nn.Parameter(torch.zeros(count, outputs // self.shards))
            for factor in "AB":
                rows = [self._index(k, layers, own) for k in range(layers)]
                tensors[f"index_{factor}_{name}"] = torch.stack(rows)
        return tensors

    def _index(self, layer: int, layers: int, stream: Stream) -> torch.Tensor:
        """Shard indices (rank, shards) of one layer: its private shards once each, then public ones."""
        public = layers * (self.equivalent_rank - self.private) * self.shards
        own = public + (layer * self.private + torch.arange(self.private)) [:, None] * self.shards + torch.arange(self.shards)
        needed = (self.rank - self.private) * self.shards
        if not public:
            public, offset = self.private * self.shards, int(own.min())
        else:
            offset = 0
        drawn = [stream.permutation(public) + offset for _ in range(-(-needed // public))]
        rest = torch.cat(drawn)[:needed] if needed else torch.empty(0, dtype=torch.int64)
        return torch.cat((own, rest.reshape(-1, self.shards)))

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {}

    def prepare(self, pool: Any, targets: Sequence[Target]) -> Mapping[str, LowRank]:
        made: dict[str, LowRank] = {}
        for name, group in self._groups(targets).items():
            A = getattr(pool, f"A_{name}")[getattr(pool, f"index_A_{name}")].flatten(-2)  # (layers, rank, in)
            B = getattr(pool, f"B_{name}")[getattr(pool, f"index_B_{name}")].flatten(-2).transpose(-1, -2)
            sizes = [math.prod(t.lead) for t in group]
            for target, a, b in zip(group, A.split(sizes), B.split(sizes), strict=True):
                made[target.name] = LowRank(b.reshape(*target.lead, *b.shape[1:]), a.reshape(*target.lead, *a.shape[1:]))
        return made

    def update(self, part: Any, context: LowRank) -> LowRank:
        return LowRank(context.B, context.A, part.gain)

    def export(self, part: Any, pool: Any) -> Pooled:
        groups = self._groups(pool.targets)
        name = f"{part.target.outputs}x{part.target.inputs}"
        sizes = [math.prod(t.lead) for t in groups[name]]
        position = [t.name for t in groups[name]].index(part.target.name)
        first = sum(sizes[:position])
        index = {f: getattr(pool, f"index_{f}_{name}")[first : first + sizes[position]].to(torch.int32) for f in "AB"}
        shape = (*part.target.lead, self.rank, self.shards)
        return Pooled(
            getattr(pool, f"B_{name}"), getattr(pool, f"A_{name}"), index["B"].reshape(shape), index["A"].reshape(shape),
            part.gain, {"B": f"mos/{name}/B", "A": f"mos/{name}/A"},
        )  # fmt: skip

    def count(self, target: Target) -> int:
        return math.prod(target.lead) * self.equivalent_rank * (target.outputs + target.inputs)
