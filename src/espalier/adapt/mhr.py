"""MHR and Polytropon: a bank of low-rank skills that all tasks share, mixed for each task by learned routing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta import store
from espalier.delta.forms import Bank, LowRank, Update
from espalier.delta.forms.bank import mixed, mixing
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("mhr", ids=(69,), paper="arXiv:2211.03831", learning_rate=1e-3)
class MHR(Adapter):
    """Mix each task's B and A from a bank of skills, in each head by its own routing: ``W'_t = W + (alpha / r) B_t A_t``.

    A parameter has factors B_qs (out / Q, r) and A_qs (r, in / Q) for S skills in Q heads; task t mixes them by
    ``w = sigmoid(Z_t) / sum_s sigmoid(Z_t)``, and its heads are put side by side: ``B_t = [sum_s w_qs B_qs]_q`` (out, r), A_t
    alike (r, in). B and A are mixed apart, which is not the mean of the skills' updates. One head is Polytropon
    (arXiv:2202.13914). B starts at zero, A as LoRA's block by block, Z (tasks, Q, S) uniform in +-0.001; Z learns at
    ``ratio`` times the rate. All rows of a batch are of one task (``attach/tasks.py``); ``tune`` divides them by the ``task`` of
    a record. The paper's sampling of routes in training, which its released recipe leaves out, is left out.

    Over a given ``bank``, for new tasks: ``variant="routing"`` (MHR-z) trains their Z alone, "mean" (MHR-mu) one LoRA that starts
    as the mean skill, "all" everything.
    """

    rank: int = 1
    """rank r of every skill, at least 1"""
    alpha: float = 2.0
    """the update is multiplied by alpha / rank"""
    skills: int = 8
    """S: how many skills are shared by the tasks"""
    heads: int = 4
    """Q: blocks that are mixed by routings of their own; must divide the sizes of every matrix"""
    routing: Literal["layer", "model"] = "layer"
    """a routing for each matrix (fine), or one for the whole model (coarse)"""
    ratio: float = 100.0
    """learning rate of the routing over that of the skills"""
    tasks: str = ""
    """names of the tasks, separated by commas; default: those of the data, or one"""
    bank: str = ""
    """directory of a trained bank to begin with, whose rank, alpha, skills and heads are taken"""
    variant: Literal["all", "routing", "mean"] = "all"
    """of a given bank: train all, the new tasks' routing alone, or one LoRA from its mean"""

    def check(self) -> None:
        self.by_task = self.variant != "mean"  # type: ignore[misc]
        if self.bank:
            self.size = ""  # type: ignore[misc]  # the bank's rank, which no --trainable changes
            delta = store.load(Path(self.bank), bank=True)
            self._given = {name: update for name, update in delta.updates.items() if isinstance(update, Bank)}
            if len(self._given) < len(delta.updates) or not delta.updates:
                raise EspalierError(f"bank is {self.bank}, a delta of {delta.manifest.get('method')}; it must be one of mhr")
            first = next(iter(self._given.values()))
            (self.heads, self.skills, _, self.rank), self.alpha = first.B.shape[-4:], float(first.gain) * first.B.shape[-1]
        elif self.variant != "all":
            raise EspalierError(f"variant is {self.variant!r}, which is of a trained bank; say which with bank")
        for name in ("rank", "skills", "heads"):
            at_least(name, getattr(self, name), 1)
        if not 0 < self.ratio < math.inf:
            raise EspalierError(f"ratio is {self.ratio!r}; it must be more than 0 and finite")

    def task_names(self) -> Sequence[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()] if self.variant != "mean" else ()

    def choose(self, pool: Any, task: str) -> None:
        pool.task.fill_(self.task_names().index(task))

    def _routing(self, targets: Sequence[Target]) -> tuple[int, ...]:
        """The shape of Z."""
        return (1 if self.routing == "model" else len(targets), max(1, len(self.task_names())), self.heads, self.skills)

    def start_shared(self, targets: Sequence[Target], stream: Stream) -> Tensors:
        if self.variant == "mean":
            return {}
        Z = stream.named("mhr routing").uniform(*self._routing(targets), low=-1e-3, high=1e-3)
        return {"Z": nn.Parameter(Z), "task": torch.zeros(1, dtype=torch.int64)}

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        if target.outputs % self.heads or target.inputs % self.heads:
            raise EspalierError(f"heads is {self.heads}, which does not divide {target.name} of {target.outputs} x {target.inputs}")
        lead = (*target.lead, self.heads, self.skills)
        B, A = (*lead, target.outputs // self.heads, self.rank), (*lead, self.rank, target.inputs // self.heads)
        if not self.bank:
            return {"B": nn.Parameter(torch.zeros(B)), "A": nn.Parameter(stream.kaiming_uniform(*A))}
        given = self._given.get(target.name)
        if given is None or given.B.shape != B or given.A.shape != A:
            has = "nothing" if given is None else f"skills of shapes {tuple(given.B.shape)} and {tuple(given.A.shape)}"
            raise EspalierError(f"the bank {self.bank} has {has} for {target.name}; it must have {B} and {A}")
        skills: Update = given.mean() if self.variant == "mean" else given
        tensors = {name: skills.tensors()[name].clone() for name in "BA"}
        return tensors if self.variant == "routing" else {name: nn.Parameter(tensor) for name, tensor in tensors.items()}

    def gain(self, target: Target) -> float:
        return self.alpha / self.rank

    def prepare(self, pool: Any, targets: Sequence[Target]) -> Mapping[str, torch.Tensor]:
        shares = mixing(pool.Z.index_select(1, pool.task).squeeze(1))  # (layers, heads, skills)
        each = shares.expand(len(targets), -1, -1).unbind()
        return {target.name: own for target, own in zip(targets, each, strict=True)}

    def update(self, part: Any, context: torch.Tensor | None) -> LowRank:
        return LowRank(part.B, part.A, part.gain) if context is None else LowRank(*mixed(part.B, part.A, context), part.gain)

    def export(self, part: Any, pool: Any) -> Update:
        if self.variant == "mean":
            return self.update(part, None)
        one = self.routing == "model"
        number = 0 if one else [target.name for target in pool.targets].index(part.target.name)
        return Bank(part.B, part.A, pool.Z[number], part.gain, {"Z": "mhr/Z"} if one else None)

    def optimizer_options(self) -> Mapping[str, Mapping[str, float]]:
        return {"Z": {"rate": self.ratio}}

    def count(self, target: Target) -> int:
        skills = {"all": self.skills, "routing": 0, "mean": 1}[self.variant]
        return math.prod(target.lead) * skills * self.rank * (target.outputs + target.inputs)

    def count_shared(self, targets: Sequence[Target]) -> int:
        return 0 if self.variant == "mean" else math.prod(self._routing(targets))
