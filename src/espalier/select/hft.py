"""HFT: half of the parameters of every kind train, the others stay."""

from __future__ import annotations

import math
from collections.abc import Sequence

from espalier.anatomy.target import Target
from espalier.attach.whole_tensors import WholeTensors
from espalier.errors import within
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("hft", ids=(9,), paper="arXiv:2404.18466", learning_rate=2e-5, targets="all", size="")
class HFT(WholeTensors):
    """Train half of the matrices of attention, half of those of the feed-forward part and half of the norms of every block.

    ``W' = V`` as in ``full``, for the chosen ones; what is in no block (embeddings, head, last norm) trains always. Of a kind's
    n parameters in a block n/2 are drawn; where that is no whole number, one more in a random half of the blocks: 2 of 4
    attention matrices, and of gate, up and down 2 in half of the blocks and 1 in the others (biases are kinds of their own). A round of the paper is a run: tune
    again, ``--over`` it or on the model with it, with another ``--seed``. Where q, k and v, or the experts of a block, are one tensor they are chosen together.
    """

    share: float = 0.5
    """of the parameters of each kind that train, in [0, 1]"""

    def check(self) -> None:
        within("share", self.share, 0, 1)

    def selected(self, targets: Sequence[Target], seed: int) -> Sequence[Target]:
        kinds: dict[str, dict[int, list[Target]]] = {}
        for target in targets:
            if target.block is not None:
                kind = target.roles[0].split(".")[0] + (".bias" if target.roles[0].endswith(".bias") else "")
                kinds.setdefault(kind, {}).setdefault(target.block, []).append(target)
        chosen = {target.name for target in targets if target.block is None}
        for kind, blocks in kinds.items():
            exact = {block: self.share * len(here) for block, here in blocks.items()}
            # so many blocks have one more that the whole is the share of the whole, but for less than one
            more = math.floor(sum(e % 1 for e in exact.values()) + 0.5)
            drawn = sorted((block for block in blocks if exact[block] % 1), key=lambda block: Stream(seed, f"half of {kind}, block {block}").key)
            for block, here in blocks.items():
                order = sorted(target.name for target in here)
                order.sort(key=lambda name: Stream(seed, f"half of {name}").key)
                chosen |= set(order[: math.floor(exact[block]) + (block in drawn[:more])])
        return [target for target in targets if target.name in chosen]
