"""Rows of a vocabulary's matrices that train beside a method's updates, for tokens that a tokenizer was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.attach.slot import Slot
from espalier.delta.forms import Rows
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NewRows(Adapter):
    """Train the rows T of W alone: ``W'[t] = W[t] + V[t]`` for t in T, and ``W' = W`` elsewhere.

    V starts so that every new row is the mean of the rows that are not new. Rows that the base does not have are zero in it.
    """

    name = "new tokens"

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        index = torch.tensor(self.tokens, dtype=torch.int32, device=weight.device)
        mean, own = mean_of_others(weight, index), weight.index_select(0, index)
        return {"values": nn.Parameter((mean - own).float()), "index": index}

    def update(self, part: Any, context: Any) -> Rows:
        return Rows(part.values, part.index, part.target.outputs)

    def count(self, target: Target) -> int:
        return len(self.tokens) * target.inputs


def mean_of_others(weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The mean (in,) of the rows of W (out, in) that ``index`` does not name, float64."""
    rest = weight.sum(0, dtype=torch.float64) - weight.index_select(0, index).sum(0, dtype=torch.float64)
    return rest / max(len(weight) - len(index), 1)


def holds_tokens(target: Target) -> bool:
    """Whether a parameter has a row for every token: an embedding, or a language model's head."""
    return target.is_matrix and any(role in ("embedding", "head") for role in target.roles)


def places(present: Sequence[Target], slots: Mapping[str, Slot], tokens: Sequence[int]) -> list[Target]:
    """The matrices that have a row for every token.

    Args:
        slots: what trains already, by parameter.

    Raises:
        EspalierError: when a method updates one of them, other than as a whole, or a token has no row.
    """
    found = [t for t in present if holds_tokens(t)]
    if both := next((t for t in found if t.name in slots and slots[t.name].method.name != "full"), None):
        raise EspalierError(f"new tokens train rows of {both.name}, which --targets names too; leave it out there, or name it in --full")
    if lacking := next((t for t in found if max(tokens) >= t.outputs), None):
        raise EspalierError(f"the token {max(tokens)} has no row in {lacking.name}, which has {lacking.outputs}; let the model grow first")
    return found


@torch.no_grad()
def grow(model: PreTrainedModel, rows: int) -> None:
    """Give a model's embedding and head more rows, which are zero: as many as ``rows`` in all.

    Raises:
        EspalierError: when its head has a bias, whose new entries nothing would hold.
    """
    before = model.config.vocab_size
    if rows <= before:
        return
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise EspalierError(f"the head of {type(model).__name__} has a bias, so this version cannot give it new tokens")
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.weight[before:] = 0  # type: ignore[operator, index]
