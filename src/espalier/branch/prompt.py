"""Soft prompts: trained vectors in front of every sequence, where the input embeddings are."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from espalier.anatomy.site import Site
from espalier.attach.branch import Branch
from espalier.attach.method import Tensors
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import brancher

_LAYERS = ("first", "second", "third")


@brancher(
    "prompt", ids=(), paper="arXiv:2104.08691", learning_rate=1e-2, size="prompt_length", targets="embedding", form="P", place="embedding",
    insertion="parallel", composition="[P; h]", starts_as_base=False,
)  # fmt: skip
class Prompt(Branch):
    """Train n vectors P (n, d) that stand in front of every sequence: ``[P; E(x)]``.

    They are put in behind the embeddings and their places are taken out of the last hidden states, so labels, losses and
    caches need not know of them; tokens move n positions back. In a packed row every window gets them. They start as
    the embeddings of n tokens drawn from the vocabulary. With ``encoder`` m > 0 they are made, in training, by the
    network of P-tuning (arXiv:2103.10385; its variant of three layers, without the LSTM):
    ``P = W_3 relu(W_2 relu(W_1 E + b_1) + b_2) + b_3`` of n vectors E (n, d); only P is stored.
    """

    prompt_length: int = 20
    """n, how many vectors, at least 1"""
    start_from: Literal["vocabulary", "normal"] = "vocabulary"
    """the embeddings of tokens drawn at random, or standard normal numbers"""
    encoder: int = 0
    """m, the hidden size of the network that makes the vectors in training; 0: none"""

    def check(self) -> None:
        at_least("prompt_length", self.prompt_length, 1)
        at_least("encoder", self.encoder, 0)

    def start(self, site: Site, model: nn.Module, stream: Stream) -> Tensors:
        n, d, m = self.prompt_length, site.width, self.encoder
        if self.start_from == "vocabulary":
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            drawn = stream.integers32(n, device=embedding.weight.device) % len(embedding.weight)
            with torch.no_grad():  # by the module itself, which may scale, and without what stands behind it
                tensors = {"P": embedding.forward(drawn).float()}
        else:
            tensors = {"P": stream.gaussian(n, d)}
        for name, outputs, inputs in zip(_LAYERS, (m, m, d), (d, m, m), strict=True) if m else ():
            tensors[name] = stream.kaiming_uniform(outputs, inputs)
            tensors[f"{name}_bias"] = stream.kaiming_uniform(outputs, fan_in=inputs)
        return {name: nn.Parameter(tensor) for name, tensor in tensors.items()}

    def branch(self, part: Any) -> torch.Tensor:
        x = part.P
        for name in _LAYERS if self.encoder else ():
            x = functional.linear(x, getattr(part, name), getattr(part, f"{name}_bias"))
            x = x if name == "third" else functional.relu(x)
        return x

    def positions(self) -> int:
        return self.prompt_length

    def stored(self) -> Prompt:
        plain = copy.copy(self)
        plain.encoder = 0
        return plain

    def export(self, part: Any, pool: Any) -> Tensors:
        return {"P": self.branch(part)}

    def count(self, site: Site) -> int:
        d, m = site.width, self.encoder
        return self.prompt_length * d + (m * (d + 1) + m * (m + 1) + d * (m + 1) if m else 0)
