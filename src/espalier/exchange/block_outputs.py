"""Which tensors make what a block adds to the residual stream, and whether scaling them is scaling the stream.

In a network whose blocks read the stream through norms, ``h + f(norm(h))``, multiplying the stream by s before a block is
dividing by s what that block and all later ones add: norms do not see the size of what they read (but for their epsilon).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from espalier.anatomy.layout import place
from espalier.anatomy.parameters import BLOCK, parameters
from espalier.anatomy.structure import anatomy
from espalier.errors import EspalierError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADDED = ("attention.o", "mlp.down", "experts.down")


def block_outputs(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Globs for the tensors of files that make what blocks add to the stream.

    Args:
        model: live, without anything attached.
        names: of the tensors of its files.

    Raises:
        EspalierError: where blocks do not read the stream through norms, so that scaling these is not scaling the stream.
    """
    targets = {target.name: target for target in parameters(model) if target.role.removesuffix(".bias") in _ADDED}
    live = dict(model.named_parameters())
    found: dict[str, None] = {}
    for name in names:
        where, inside = place(name, live), BLOCK.search(name)
        if where is not None and inside and where.name in targets:
            found[f"*.{inside.group(2)}"] = None
    tensors = [live[name] for name in targets]
    if not found or not _is_scaled(model, tensors):
        raise EspalierError(f"the blocks of {type(model).__name__} do not read the stream through norms alone; leave scales out: --spread 0")
    return list(found)


@torch.no_grad()
def _is_scaled(model: PreTrainedModel, added: Sequence[torch.Tensor], by: float = 4.0) -> bool:
    """Whether dividing what all blocks add does what multiplying the stream before the first one does."""
    device = next(model.parameters()).device
    ids = ((torch.arange(9, device=device) * 7919 + 13) % model.config.get_text_config().vocab_size)[None]
    first = model.get_submodule(anatomy(model).blocks[0].path)

    def enlarge(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments:
            return (arguments[0] * by, *arguments[1:]), keywords
        return arguments, {**keywords, "hidden_states": keywords["hidden_states"] * by}

    own = model(input_ids=ids).logits.float()
    hook = first.register_forward_pre_hook(enlarge, with_kwargs=True)
    try:
        larger = model(input_ids=ids).logits.float()
    finally:
        hook.remove()
    kept = [tensor.clone() for tensor in added]
    try:
        for tensor in added:
            tensor.div_(by)
        smaller = model(input_ids=ids).logits.float()
    finally:
        for tensor, before in zip(added, kept, strict=True):
            tensor.copy_(before)
    return bool((larger - smaller).norm() <= 0.1 * (larger - own).norm() + 1e-4 * own.norm())
