"""IST: of another method's layers a few train in each step, the important ones more often."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Moment, Tensors
from espalier.attach.over import Over
from espalier.errors import EspalierError, at_least, within
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("ist", ids=(24,), paper="arXiv:2410.11772", learning_rate=2e-4)
class IST(Over):
    """Train a quarter of the layers in each step, drawn by an importance that is learned from what the loss does without them.

    What trains is what ``inner`` makes: LoRA, or any other method that updates parameters, ``full`` among them. Of its L blocks
    ``active * L`` are drawn before every step, without replacement, with weights sigmoid(-I): I, zero at first, is high where a
    layer is NOT important. Every ``every`` steps the loss of the step's batch is taken ``trials`` times, each time with the updates of a set S_k of
    ``suppressed * L`` blocks (drawn with weights sigmoid(I)) scaled by ``suppression``; r_k = exp(-l_k) - mean_j exp(-l_j), and
    for i in S_k ``I_i += step_size r_k p_i (1 - p_i)``, p = sigmoid(I) before. At ``step_size`` 0 nothing is measured, and the
    draws are uniform. Optimizer state is kept, so that what is saved is gradients and, below the lowest active block, the
    backward pass. What is in no block trains always. The paper takes 16 further examples for the losses, here it is the batch.
    """

    inner: str = "lora"
    """the method whose layers these are"""
    rank: int | None = 32
    """rank of the inner method, where it has one"""
    alpha: float = 64.0
    """alpha of the inner method, where it has one"""
    active: float = 0.25
    """share of the blocks that train in a step, in [0, 1]; one at least"""
    suppressed: float = 0.5
    """share of the blocks whose updates are suppressed in a trial, in [0, 1]; one at least"""
    suppression: float = 0.25
    """what suppressed updates are multiplied by"""
    trials: int = 3
    """losses that are compared, with different blocks suppressed; at least 2"""
    every: int = 10
    """steps from one comparison to the next, at least 1"""
    step_size: float = 10.0
    """of the importance, at least 0"""

    needs_base = True
    shared = ("rank", "alpha")

    def check(self) -> None:
        for name in ("active", "suppressed"):
            within(name, getattr(self, name), 0, 1)
        at_least("trials", self.trials, 2)
        at_least("every", self.every, 1)
        at_least("step_size", self.step_size, 0)
        self.below.check()
        if type(self.below).moving is not Adapter.moving:
            raise EspalierError(f"inner is {self.inner!r}, which draws itself what trains in a step; give one that trains all, such as full")

    @property
    def kept(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.below.kept, "importance")

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        return self.start_from(None, target, weight, stream)

    def start_from(self, finding: Any, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        tensors = self.below.start_from(finding, target, weight, stream)
        if target.block is None:
            return tensors
        return {**tensors, "importance": torch.zeros(()), "turns": stream.named("turns of the layers").integers32(1)}

    def before_forward(self, parts: Sequence[Any], moment: Moment, measure: Callable[[], float] | None) -> None:
        super().before_forward(parts, moment, measure)
        blocks: dict[int, list[Any]] = {}
        for part in parts:
            if part.target.block is not None:
                blocks.setdefault(part.target.block, []).append(part)
        if not blocks:
            return
        layers = [blocks[number] for number in sorted(blocks)]
        key = int(layers[0][0].turns)
        if moment.step and moment.step % self.every == 0 and self.step_size:
            self._score(layers, Stream(key, f"suppressed in step {moment.step}"), measure)
        chosen = draw([-importance_of(layer) for layer in layers], _share(self.active, layers), Stream(key, f"active in step {moment.step}"))
        for number, layer in enumerate(layers):
            for part in layer:
                part.is_active = number in chosen

    def _score(self, layers: list[list[Any]], stream: Stream, measure: Callable[[], float] | None) -> None:
        """Learn from the losses without some of the layers."""
        if measure is None:
            raise EspalierError("ist compares losses: give course.begin a measure=, which returns the loss of the batch")
        importance, count, sets = [importance_of(layer) for layer in layers], _share(self.suppressed, layers), list[set[int]]()
        if math.comb(len(layers), count) < 2:
            return
        while len(sets) < min(self.trials, math.comb(len(layers), count)):
            if (drawn := draw(importance, count, stream)) not in sets:
                sets.append(drawn)
        gains = [math.exp(-self._without([layers[i] for i in some], measure)) for some in sets]
        mean, p = math.fsum(gains) / len(gains), torch.tensor(importance, dtype=torch.float64).sigmoid().tolist()
        for some, gain in zip(sets, gains, strict=True):
            for i in some:
                for part in layers[i]:
                    part.importance += self.step_size * (gain - mean) * p[i] * (1 - p[i])

    def _without(self, layers: list[list[Any]], measure: Callable[[], float]) -> float:
        """The loss with the updates of some layers suppressed; their scales are put back as they were."""
        parts = [part for layer in layers for part in layer]
        before = [part.strength for part in parts]
        try:
            for part in parts:
                part.strength = torch.as_tensor(self.suppression, device=part.gain.device) * (1.0 if part.strength is None else part.strength)
            return measure()
        finally:
            for part, strength in zip(parts, before, strict=True):
                part.strength = strength

    def moving(self, targets: Sequence[Target]) -> Sequence[Target]:
        blocks = sorted({target.block for target in targets if target.block is not None})
        lowest = blocks[: _share(self.active, blocks)] if blocks else []  # whose backward is the longest
        return [target for target in super().moving(targets) if target.block is None or target.block in lowest]

    def frozen(self, part: Any, moment: Moment) -> Mapping[str, torch.Tensor | bool]:
        return super().frozen(part, moment) if getattr(part, "is_active", True) else dict.fromkeys(part._parameters, True)


def importance_of(layer: list[Any]) -> float:
    """I of a layer, the same in all its parts."""
    return float(layer[0].importance)


def draw(logits: Sequence[float], count: int, stream: Stream) -> set[int]:
    """``count`` of the numbers from 0 on, one after the other without replacement, with weights sigmoid(logits): Gumbel's keys, the largest."""
    weights = torch.nn.functional.logsigmoid(torch.tensor(list(logits), dtype=torch.float64))
    noise = -(-(stream.uniform(len(weights)).double() + 2**-25).log()).log()
    return set(torch.sort(weights + noise, descending=True, stable=True).indices[:count].tolist())


def _share(share: float, layers: Sequence[Any]) -> int:
    return max(1, math.floor(share * len(layers)))
