"""The named sites of a model that a branch can be at: where it reads, and what it changes.

A site is named after what it is and not after how a family calls its modules, so that a branch stored for one file
layout is found in another: ``blocks.3.attention``, ``blocks.3.mlp``, ``blocks.3.heads``, ``embedding``, ``model``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from espalier.anatomy.structure import Block, anatomy
from espalier.anatomy.target import at_blocks
from espalier.errors import EspalierError, suggestion

if TYPE_CHECKING:
    from torch import nn

Place = Literal["sublayer", "heads", "embedding", "model"]


@dataclass(frozen=True)
class Site:
    """A site of a model.

    Args:
        name: see above.
        kind: ``attention`` and ``mlp``: the two sublayers of a block, before what they make is added to the residual
            stream; ``heads``: the attention's queries, keys and values; ``embedding``: the sequence behind the input
            embeddings; ``model``: the hidden states of all blocks.
        block: index of its block, or ``None``.
        owner: path of the module that holds the branch; a sublayer's output is this module's.
        reads: path of the module whose input is the sublayer's.
        width: size of the vectors that the branch reads and changes.
        heads, key_value_heads, head_dim: of the attention, for ``heads`` and ``model``.
        layers: blocks of the model.
        config: the model's, for ``model``.
    """

    name: str
    kind: Literal["attention", "mlp", "heads", "embedding", "model"]
    block: int | None
    owner: str
    reads: str
    width: int
    heads: int = 0
    key_value_heads: int = 0
    head_dim: int = 0
    layers: int = 0
    config: Any = field(default=None, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what the branch reads, but for the tokens."""
        return (self.width,)

    @property
    def place(self) -> Place:
        """The kind, with the two sublayers as one."""
        return "sublayer" if self.kind == "attention" or self.kind == "mlp" else self.kind


def backbone_path(model: nn.Module) -> str:
    """The path of the module that maps tokens to the last hidden states; empty where the model itself is it."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and hasattr(model, prefix) else ""


def sites(model: nn.Module) -> list[Site]:
    """The sites of a transformers model, block by block; then those of the model as a whole.

    Raises:
        EspalierError: for a model whose anatomy is not known.
    """
    found = anatomy(model)
    backbone = backbone_path(model)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    first = found.blocks[0].attention
    heads = (first.heads, first.key_value_heads, first.head_dim, len(found.blocks))
    made = [site for block in found.blocks for site in _of_block(block, found.hidden_size, len(found.blocks))]
    made.append(Site("embedding", "embedding", None, backbone, backbone, int(embedding.weight.shape[-1]), *heads))
    made.append(Site("model", "model", None, backbone, backbone, found.hidden_size, *heads, config=model.config))
    return made


def block_paths(model: nn.Module) -> list[str]:
    """The paths of a model's blocks, in order."""
    return [block.path for block in anatomy(model).blocks]


def _of_block(block: Block, width: int, layers: int) -> Iterable[Site]:
    name, attention, half = f"blocks.{block.index}", block.attention, block.feed_forward
    yield Site(f"{name}.attention", "attention", block.index, _module(attention.o.weight), _module(attention.q.weight), width)
    heads = (attention.heads, attention.key_value_heads, attention.head_dim, layers)
    owner = _module(_module(attention.q.weight))
    yield Site(f"{name}.heads", "heads", block.index, owner, owner, width, *heads)
    owner, reads = _module(half.down.weight), _module(half.up.weight)
    if half.experts:  # the experts and their router together are the sublayer
        rest = half.down.weight.removeprefix(block.path + ".")
        owner = reads = f"{block.path}.{rest.partition('.')[0]}"
    yield Site(f"{name}.mlp", "mlp", block.index, owner, reads, width)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def select_sites(sites: Iterable[Site], patterns: Sequence[str]) -> list[Site]:
    """The sites that any of the patterns names: a kind (``mlp``), or a glob over names (``blocks.[01].mlp``); ``mlp@0-5`` in these blocks.

    Raises:
        EspalierError: when a pattern matches nothing, or there is none.
    """
    sites = list(sites)
    chosen = set()
    for pattern in patterns:
        what, is_among = at_blocks(pattern)
        matched = {site.name for site in sites if is_among(site.block) and (what == site.kind or fnmatch.fnmatchcase(site.name, what))}
        if not matched:
            kinds: list[str] = list(dict.fromkeys(site.kind for site in sites))
            raise EspalierError(f"--targets {pattern!r} matches no site that this method can be at{suggestion(pattern, kinds)} (sites: {', '.join(kinds)})")
        chosen |= matched
    if not patterns:
        raise EspalierError("--targets is empty; name sites such as attention,mlp or globs of their names")
    return [site for site in sites if site.name in chosen]
