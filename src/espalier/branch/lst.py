"""Ladder side-tuning: a small network beside the model, which reads its hidden states and is trained alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModel, DynamicCache

from espalier.anatomy.narrowing import narrowing
from espalier.anatomy.parameters import parameters
from espalier.anatomy.site import Site, block_paths
from espalier.anatomy.target import Target
from espalier.attach.branch import Branch
from espalier.attach.method import Tensors, Wanted
from espalier.errors import at_least
from espalier.kernels.philox import Stream
from espalier.registry import brancher

_TEMPERATURE = 0.1
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size")
_NUMBERS = ("mlp_only_layers", "cross_attention_layers")
"""Lists in configs of the numbers of some blocks."""
_OTHERS = ("architectures", "eos_token_id")
"""Lists in configs that are not of blocks, however long."""


@brancher(
    "lst", ids=(196,), paper="arXiv:2206.06522", learning_rate=3e-3, targets="model", form="side network", place="model",
    insertion="parallel", composition="h + mu change",
)  # fmt: skip
class LST(Branch):
    """Train a ladder of the model's own kind of blocks, R times narrower; no gradient goes through the model.

    ``s_0 = D_0 h_0``; before side block i ``s <- mu_i s + (1 - mu_i) D_i h_i`` with the output h_i of block i and
    ``mu_i = sigmoid(a_i / 0.1)``; at last, behind the side's norm, ``h <- h + mu W_up s``. The paper's end,
    ``mu W_up s + (1 - mu) h``, is this one for a W_up that first learns to give h; here W_up starts at zero, and the start is
    the base. Side blocks have no dropout and start normal, with a variance of R / width. With ``every`` > 1 only every so-manieth
    block, and the last, has a rung. Generation keeps a second cache; beam search does not reorder it.

    With ``initialization="pruned"`` (the paper's) side block i is what is left of block i: of the residual stream the units with the
    largest Fisher information, one set for all blocks; in each block heads, their dimensions (the same in all its heads, in the
    pairs that rotary embeddings turn) and channels. A unit's importance is the sum over the matrices that share it; the paper
    takes the residual stream's from the embedding, which only knows the tokens that came. Norms, biases and positions come along.
    """

    reduction: int = 8
    """R, how many times narrower the side network is, at least 1"""
    every: int = 1
    """a rung at every so-manieth block, counted from the last, at least 1"""
    initialization: Literal["random", "pruned"] = "random"
    """side blocks at random, or of the model's most important units on the training data"""
    tokens: int = 4096
    """tokens of the training data that importance is measured on"""

    def check(self) -> None:
        at_least("reduction", self.reduction, 1)
        at_least("every", self.every, 1)
        at_least("tokens", self.tokens, 1)

    def wanted(self) -> Wanted | None:
        return Wanted("fisher", tokens=self.tokens, targets="linear") if self.initialization == "pruned" else None

    def machine(self, site: Site) -> nn.Module:
        return Ladder(site.config, self.reduction, self.every)

    def start(self, site: Site, model: nn.Module, stream: Stream) -> Tensors:
        tensors: Tensors = {}
        ladder = Ladder(site.config, self.reduction, self.every)
        for name, parameter in ladder.trained().items():
            value = parameter.detach().float().clone()  # of norms and biases, as the family has them
            if value.dim() > 1 and name != "up.weight":
                inputs = site.width if name.startswith("down") else ladder.up.in_features
                value = stream.gaussian(*value.shape) * inputs**-0.5
            tensors[name.replace(".", "__")] = nn.Parameter(value)
        return tensors

    def start_measured(
        self, site: Site, model: nn.Module, stream: Stream, weight: Callable[[Target], torch.Tensor], statistic: Callable[[str, str], torch.Tensor]
    ) -> Tensors:
        tensors = self.start(site, model, stream)
        known = {target.name: target for target in parameters(model)}
        with torch.device("meta"):
            ladder = Ladder(site.config, self.reduction, self.every)

        def importance(name: str) -> torch.Tensor:
            fisher = statistic(name, "fisher")
            return fisher.mT if known[name].transposed else fisher

        for name, taken in narrowing(model, ladder.side, ladder.rungs, importance).items():
            value = taken.of(weight(known[taken.name])).float()
            tensors[f"side__{name.replace('.', '__')}"] = nn.Parameter(value.mT.contiguous() if known[taken.name].transposed else value)
        return tensors

    def branch(self, part: Any, hidden: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        tensors = {name: getattr(part, name.replace(".", "__")) for name in part.machine.trained()}
        return functional_call(part.machine, tensors, (hidden, arguments, part.implementation))

    def count(self, site: Site) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Ladder(site.config, self.reduction, self.every).trained().values())


class Ladder(nn.Module):
    """The side network: a backbone of the model's class with a narrow config, and the rungs to it."""

    def __init__(self, config: Any, reduction: int, every: int) -> None:
        super().__init__()
        width, layers = config.hidden_size, config.num_hidden_layers
        self.rungs = [i for i in range(layers) if (layers - 1 - i) % every == 0]
        config = copy.deepcopy(config)
        narrow = _narrow(config, reduction, self.rungs)
        with torch.random.fork_rng(devices=[]):
            self.side: Any = AutoModel.from_config(config, dtype=torch.float32).eval()  # it has no dropout
        if getattr(self.side, "pooler", None) is not None:
            self.side.pooler = None
        for path in block_paths(self.side):
            self.side.get_submodule(path).register_forward_pre_hook(self._merge, with_kwargs=True)
        self.down = nn.ModuleList([nn.Linear(width, narrow) for _ in range(len(self.rungs) + 1)])
        self.up = nn.Linear(narrow, width)
        self.mix = nn.Parameter(torch.zeros(len(self.rungs)))
        self.gate = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.up.weight)
        for linear in (*self.down, self.up):
            nn.init.zeros_(linear.bias)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters but the table of tokens, which nothing reads."""
        table = self.side.get_input_embeddings().weight
        return {name: p for name, p in self.named_parameters() if p is not table}

    def _merge(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mu, rung = self._waiting.pop(0)
        s = args[0] if args else kwargs["hidden_states"]
        s = mu * s + (1 - mu) * rung
        return ((s, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": s})

    def forward(self, hidden: list[torch.Tensor], arguments: dict[str, Any], implementation: str) -> torch.Tensor:
        if self.side.config._attn_implementation != implementation:
            self.side.config._attn_implementation = implementation
        cache = arguments.get("past_key_values")
        if cache is not None:  # the side network's own lies with the model's
            arguments = {**arguments, "past_key_values": cache.__dict__.setdefault("_espalier_side", DynamicCache())}
        mus = torch.sigmoid(self.mix / _TEMPERATURE)
        self._waiting = [(mus[n], self.down[n + 1](hidden[i + 1])) for n, i in enumerate(self.rungs)]
        s = self.side(inputs_embeds=self.down[0](hidden[0]), **{**arguments, "use_cache": cache is not None}).last_hidden_state
        return torch.sigmoid(self.gate / _TEMPERATURE) * self.up(s)


def _narrow(config: Any, reduction: int, rungs: list[int]) -> int:
    """Make a config's widths ``reduction`` times smaller, with whole and even heads; returns the new width."""
    heads = max(1, config.num_attention_heads // reduction)
    unit = math.lcm(8, 2 * heads)  # kernels want rows of whole 16 bytes
    width = max(1, round(config.hidden_size / reduction / unit)) * unit
    for name in _INNER:
        if getattr(config, name, None):
            setattr(config, name, max(1, round(getattr(config, name) / reduction / 8)) * 8)
    groups = getattr(config, "num_key_value_heads", None)
    values = {"hidden_size": width, "num_attention_heads": heads, "head_dim": width // heads, "word_embed_proj_dim": width}
    if groups:
        values["num_key_value_heads"] = math.gcd(heads, max(1, groups // reduction))
    layers = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and name in _NUMBERS:
            setattr(config, name, [n for n, i in enumerate(rungs) if i in value])
        elif isinstance(value, list) and len(value) == layers and name not in _OTHERS:  # what each block is
            setattr(config, name, [value[i] for i in rungs])
    values |= {"num_hidden_layers": len(rungs), "vocab_size": 1}
    for name, value in values.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.pad_token_id = None
    return width
