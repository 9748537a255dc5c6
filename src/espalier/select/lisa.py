"""LISA: a few layers train at a time, drawn anew every few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from espalier.anatomy.target import Target
from espalier.attach.method import Moment, Tensors
from espalier.attach.whole_tensors import WholeTensors
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("lisa", ids=(160,), paper="arXiv:2403.17919", learning_rate=2e-5, targets="all", size="")
class LISA(WholeTensors):
    """Train embeddings, head and last norm always, and of the L blocks ``layers`` at a time, drawn anew every ``every`` steps.

    ``W' = V`` as in ``full``. Every block has its turn with probability layers / L in each period; gradients are not reweighted. The
    optimizer forgets its state of a block that is left, as the paper says and the released code does not: so only what
    moves has gradients and state. What always moves is most of it in small models: ``--targets attention,mlp`` leaves it out.
    """

    layers: int = 2
    """blocks that train at a time, at least 1; all of them where there are no more"""
    every: int = 20
    """steps between draws, at least 1"""

    state_policy = "drop"

    def check(self) -> None:
        at_least("layers", self.layers, 1)
        at_least("every", self.every, 1)

    def moving(self, targets: Sequence[Target]) -> Sequence[Target]:
        blocks = sorted({target.block for target in targets if target.block is not None})[: self.layers]  # whose backward is the longest
        return [target for target in targets if target.block is None or target.block in blocks]

    def survey(
        self, targets: Sequence[Target], weight: Callable[[Target], torch.Tensor], statistic: Callable[[str, str], torch.Tensor] | None
    ) -> Mapping[str, list[int]]:
        blocks = sorted({target.block for target in targets if target.block is not None})
        return {target.name: [blocks.index(target.block), len(blocks)] for target in targets if target.block is not None}

    def start_from(self, finding: list[int] | None, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        made = self.start(target, weight, stream)
        if finding is not None:  # which block of how many, and what turns are drawn from
            made["place"] = torch.tensor([*finding, int(stream.named("turns of the layers").integers32(1))])
        return made

    def frozen(self, part: Any, moment: Moment) -> Mapping[str, torch.Tensor | bool]:
        if "place" not in part._buffers:
            return {}
        place, blocks, key = part.place.tolist()
        turns = Stream(key, "turns").at(moment.step // self.every * blocks).permutation(blocks)[: self.layers]
        return {"values": place not in turns.tolist()}
