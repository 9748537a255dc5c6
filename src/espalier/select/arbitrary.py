"""Arbitrary PET: exactly n numbers train, drawn at random over base tensors and low-rank pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta.forms import LowRank, Sparse, Sum, Update, compact
from espalier.errors import at_least, within
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("arbitrary", ids=(83,), paper="arXiv:2306.02320", learning_rate=1e-3, targets="linear,norm", size="numbers")
class Arbitrary(Adapter):
    """Train an arbitrary set of ``numbers`` numbers: ``W' = W + S_W + (B_W A_W)``, S_W sparse, pairs B A of rank r where they were drawn.

    Pairs are drawn over the matrices (not over fused experts), in an order drawn from the seed, as whole pairs, as long as they fit into the share
    ``inserted`` of the budget (a lone B without its A would get no signal); the rest are entries of the base tensors, in
    proportion to their sizes, drawn uniformly in each. All entries are one vector, which belongs to the model; they and the Bs start at
    zero. The released code looks at the first tensor of a pair only, and exceeds its budget by up to a pair: here the count
    is exact. For sweeps of n: the paper's question is from which n on the structure does not matter.
    """

    numbers: int = 16384
    """n: how many numbers train, at least 1; all there are where there are no more"""
    inserted: float = 0.5
    """share of them that may go into low-rank pairs, in [0, 1]"""
    rank: int = 1
    """r of each pair, at least 1"""

    def check(self) -> None:
        for name in ("numbers", "rank"):
            at_least(name, getattr(self, name), 1)
        within("inserted", self.inserted, 0, 1)

    def accepts(self, target: Target) -> bool:
        return True

    def start_shared(self, targets: Sequence[Target], stream: Stream) -> Tensors:
        tensors: Tensors = {}
        numbers = self.count_shared(targets)
        left = int(self.inserted * numbers)
        matrices = [target for target in targets if target.is_matrix and not target.lead]
        for target in sorted(matrices, key=lambda target: stream.named(f"arbitrary {target.name}").key):
            if (size := self.rank * (target.outputs + target.inputs)) <= left:
                left -= size
                tensors[f"B_{_key(target)}"] = nn.Parameter(torch.zeros(target.outputs, self.rank))
                tensors[f"A_{_key(target)}"] = nn.Parameter(stream.named(target.name).kaiming_uniform(self.rank, target.inputs))
        entries = numbers - sum(t.numel() for t in tensors.values())
        tensors["values"] = nn.Parameter(torch.zeros(entries))
        before, total = 0, sum(target.size for target in targets)
        for target in targets:
            count = entries * (before + target.size) // total - entries * before // total
            tensors[f"index_{_key(target)}"] = stream.named(f"arbitrary entries of {target.name}").choice(target.size, count)
            before += target.size
        return tensors

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return {}

    def prepare(self, pool: Any, targets: Sequence[Target]) -> Mapping[str, tuple[Sparse, LowRank | None]]:
        indices = [getattr(pool, f"index_{_key(target)}") for target in targets]
        made = {}
        for target, index, values in zip(targets, indices, pool.values.split([len(i) for i in indices]), strict=True):
            B, A = (getattr(pool, f"{factor}_{_key(target)}", None) for factor in "BA")
            pair = None if B is None or A is None else LowRank(B, A, 1.0, target.shape)
            made[target.name] = (Sparse(values, index, target.shape), pair)
        return made

    def update(self, part: Any, context: tuple[Sparse, LowRank | None]) -> Update:
        sparse, pair = context
        return sparse.scaled(part.gain) if pair is None else Sum([sparse, pair], part.gain)

    def export(self, part: Any, pool: Any) -> Update:
        sparse, pair = self.prepare(pool, pool.targets)[part.target.name]
        where = compact(sparse.positions, part.target.size)
        return self.update(part, (Sparse(sparse.values, where.get("index"), part.target.shape, mask=where.get("mask")), pair))

    def count(self, target: Target) -> int:
        return 0

    def count_shared(self, targets: Sequence[Target]) -> int:
        return min(self.numbers, sum(target.size for target in targets))


def _key(target: Target) -> str:
    return target.name.replace(".", "__")
