"""muP: how initial values and learning rates follow the width of a model, so that a rate found on a narrow one suits a wide one.

The maximal update parametrization (arXiv:2011.14522; for Adam, arXiv:2203.03466) is laid out here so that what comes of it is an
ordinary checkpoint: every multiplier that it wants in the forward pass (logits over the width, attention over head_dim instead of
its root) is folded into the weight that it stands before. By the symmetry of the parametrization that is the same training: a
multiplier c of a weight is the same as initial values and Adam's rate times c, and SGD's times c^2. Where it cannot be folded, because
two uses share a weight or a norm undoes it, the model is refused. All factors are over those of a base model, at
whose width this is the usual parametrization.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from espalier.anatomy.parameters import parameters
from espalier.anatomy.structure import Anatomy, Block, anatomy
from espalier.anatomy.target import Target
from espalier.errors import EspalierError

Kind = Literal["input", "hidden", "output", "vector"]
"""What a parameter is as the width grows: from a fixed size to the width, from width to width, from the width to a fixed size, or a vector."""


@dataclass(frozen=True)
class Width:
    """Factors over a base model: on the initial values, and on the learning rate of rules like Adam's and of SGD."""

    initial: float = 1.0
    adam: float = 1.0
    sgd: float = 1.0

    def folded(self, multiplier: float) -> Width:
        """The same with a multiplier of the forward pass written into the weight."""
        return Width(self.initial * multiplier, self.adam * multiplier, self.sgd * multiplier**2)


def kind_of(role: str) -> Kind | None:
    """The kind of a role; ``None`` for one that is not known."""
    part = role.partition(".")[0]
    if role.endswith(".bias") or part in ("norm", "sinks"):
        return "vector"
    if part in ("attention", "mlp", "experts"):
        return "hidden"
    return {"embedding": "input", "head": "output", "router": "output"}.get(part)  # type: ignore[return-value]


def width_of(kind: Kind, inputs: float, outputs: float) -> Width:
    """The factors of a parameter with so many times the inputs and outputs of the base's; of an ``output``, its multiplier folded in.

    Hidden matrices start with a standard deviation of ``1 / sqrt(inputs)`` and have Adam's rate ``1 / inputs``; SGD's are kept.
    """
    match kind:
        case "hidden":
            return Width(inputs**-0.5, 1 / inputs, outputs / inputs)
        case "output":
            return Width(sgd=inputs).folded(1 / inputs)
        case _:
            return Width(sgd=outputs)


def widths(model: nn.Module, base: nn.Module) -> dict[str, Width]:
    """Parameter name -> its factors, for a transformers model whose base is a narrower one; both may be on the meta device.

    Raises:
        EspalierError: when the two differ in more than width, or a multiplier cannot be folded into a weight.
    """
    own, other = ({target.name: target for target in parameters(one)} for one in (model, base))
    if odd := sorted(own.keys() ^ other.keys()):
        raise EspalierError(f"--mup: the base model {'has' if odd[0] in other else 'lacks'} {odd[0]}; it must differ from the model in its widths only")
    here, there = anatomy(model), anatomy(base)
    logits = there.logit_scale / here.logit_scale
    embedded = _embedding_scale(base) / _embedding_scale(model)
    queries = {name: factor for one, two in zip(here.blocks, there.blocks, strict=True) for name, factor in _queries(model, base, one, two).items()}
    return {name: _one(own[name], other[name], logits, embedded, queries.get(name, 1.0), here) for name in own}


def _one(target: Target, base: Target, logits: float, embedded: float, query: float, model: Anatomy) -> Width:
    found = []
    for role in target.roles:
        kind = kind_of(role)
        if kind is None:
            raise EspalierError(f"--mup: the part of {target.name} ({role}) in the width of this {model.family} model is not known")
        if kind in ("input", "vector"):
            made = width_of(kind, 1.0, target.shape[-1] / base.shape[-1])
            found.append(made.folded(embedded if role == "embedding" else query))
        else:
            made = width_of(kind, target.inputs / base.inputs, target.outputs / base.outputs)
            found.append(made.folded(logits if role.startswith("head") else query))
    if any(not math.isclose(one.initial, found[0].initial) for one in found):
        raise EspalierError(
            f"--mup: {' and '.join(target.names)} are one parameter, and the width wants other factors of its uses; set tie_word_embeddings to false, "
            f"or divide the logits by {found[0].initial / found[-1].initial:g} where the config can (logits_scaling, logit_scale)"
        )
    return found[0]


def _embedding_scale(model: Any) -> float:
    own = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)  # Gemma
    return own * (getattr(model.config, "embedding_multiplier", None) or 1.0)  # Granite


def _queries(model: nn.Module, base: nn.Module, here: Block, there: Block) -> dict[str, float]:
    """The factor of a block's queries that makes its attention's scale ``1 / head_dim``, as it is where the base's is ``s``.

    Raises:
        EspalierError: when head_dim is not the base's, and the queries are in one matrix with the keys or go through a norm.
    """
    scales = [getattr(one.get_submodule(block.attention.q.weight.rsplit(".", 2)[0]), "scaling", block.attention.head_dim**-0.5)
              for one, block in ((model, here), (base, there))]  # fmt: skip
    factor = scales[1] / scales[0] * there.attention.head_dim / here.attention.head_dim
    if math.isclose(factor, 1.0):
        return {}
    why = "keeps q, k and v in one matrix" if here.attention.layout != "separate" else ""
    if norm := next((name for name in here.norms if re.search(r"\bq_(?:layer)?norm\b", name)), None):
        why = f"has a norm of its queries ({norm})"
    if why:
        raise EspalierError(
            f"--mup: {here.path} {why}, so its attention cannot be scaled by 1 / head_dim; head_dim is {here.attention.head_dim} and the base's "
            f"{there.attention.head_dim}: keep it, and let the number of heads grow"
        )
    return dict.fromkeys(here.attention.q.names, factor)


@torch.no_grad()
def start(model: nn.Module, factors: Mapping[str, Width]) -> None:
    """Scale the initial values of a model, which transformers draws with a deviation that does not know the width."""
    for name, parameter in model.named_parameters():
        parameter.mul_(factors[name].initial)


def options(width: Width, weight_decay: float, scales_as: Literal["adam", "sgd"], matrix: bool) -> dict[str, float]:
    """The options of an optimizer for one parameter: its ``rate``, and for a matrix a decay that moves it as much as before."""
    rate = width.adam if scales_as == "adam" else width.sgd
    if rate == 1.0:
        return {}
    return {"rate": rate, **({"weight_decay": weight_decay / rate} if matrix and weight_decay else {})}


def coordinates(model: Any, batches: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """The coordinate check: the mean of |x| for what every part gives, before the first step and after each.

    Under muP none of it depends on the width by more than a little; else something grows, or vanishes.

    Args:
        model: a causal language model of transformers, in training.
        batches: token ids (rows, n), one of each step; the last is only looked at.
        optimizer: of the model's parameters.

    Returns:
        ``embedding``, ``0.attention``, ``0.feed_forward``, ``0`` (the residual stream after the block), ..., ``logits``: one number for each batch.
    """
    own = anatomy(model)
    places = {"embedding": own.embedding.rsplit(".", 1)[0], "logits": ""}
    for block in own.blocks:
        places |= {f"{block.index}": block.path, f"{block.index}.attention": block.attention.o.weight.rsplit(".", 1)[0]}
        if block.feed_forward.experts is None:
            places[f"{block.index}.feed_forward"] = block.feed_forward.down.weight.rsplit(".", 1)[0]
    found: dict[str, list[float]] = {name: [] for name in sorted(places)}

    def keep(name: str, output: Any) -> None:
        tensor = output.logits if name == "logits" else output[0] if isinstance(output, tuple) else output
        found[name].append(float(tensor.detach().abs().double().mean()))

    hooks = [model.get_submodule(path).register_forward_hook(lambda m, i, out, name=name: keep(name, out)) for name, path in places.items()]
    try:
        for number, ids in enumerate(batches):
            loss = functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            if number + 1 < len(batches):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of the width that values go by: the least-squares slope of their logarithms; 0 where they do not depend on it."""
    x, y = (torch.tensor(some, dtype=torch.float64).log() for some in (sizes, values))
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())
