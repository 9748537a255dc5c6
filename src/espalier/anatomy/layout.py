"""The one mapping between the names of a live model's parameters and the tensors of its files.

transformers 5 fuses experts into 3-D parameters while files keep a tensor per expert and projection, and
checkpoints leave out prefixes, rename heads or repeat tied tensors. :func:`locate` gives, for a parameter,
the file tensors that it is made of; whoever writes a parameter writes all of them. :func:`place` is its inverse: for
a tensor of one layout, the tensor of another that it is, or is a part of.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass

from espalier.errors import EspalierError


@dataclass(frozen=True)
class Piece:
    """Tensors of a file that together are one parameter, or one expert of it.

    ``names`` are stacked along the rows of the stored matrix in order (gate, then up); ``expert`` is the
    leading index that they make, or ``None`` for the whole parameter.
    """

    names: tuple[str, ...]
    expert: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a tensor of one layout lies in another.

    It is the tensor ``name`` there or, where that one fuses experts, of the matrix of one ``expert`` the block of rows
    number ``part`` among ``parts`` equal ones.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


_PREFIXES = ("model.", "transformer.", "gpt_neox.", "bert.", "model.decoder.")
_SAME = (("lm_head.weight", "embed_out.weight"), ("lm_head.weight", "output.weight"))
_WITHIN = ((".mlp.", ".block_sparse_moe."), (".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))
# local name of a fused parameter -> projections of one expert, stacked by rows, as families call them
_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}


def _spellings(name: str) -> list[str]:
    """Names that files or models may have for a tensor, the exact one first; each has it among its own spellings."""
    found = [name]
    for one, other in _SAME:
        found += [other] * (name == one) + [one] * (name == other)
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            found.append(name.removeprefix(prefix))
        found.append(prefix + name)
    for one, other in _WITHIN:
        found += [n.replace(one, other) for n in found if one in n] + [n.replace(other, one) for n in found if other in n]
    return list(dict.fromkeys(found))


def locate(name: str, aliases: Sequence[str], experts: int | None, names: Container[str]) -> list[Piece]:
    """The pieces of a parameter among a checkpoint's tensor names.

    Args:
        name: the parameter's canonical name.
        aliases: its other names (tied weights); whichever of them the files also hold is a piece too.
        experts: number of leading indices of a fused parameter, or ``None``.
        names: the tensor names of the files.

    Returns:
        Whole pieces (one per spelling that the files hold), or one piece per expert.

    Raises:
        EspalierError: when the files hold the parameter under no known name.
    """
    whole = []
    for candidate in dict.fromkeys((name, *aliases)):
        for spelling in _spellings(candidate):
            if spelling in names:
                whole.append(Piece((spelling,)))
                break
    if whole:
        return whole
    for spelling in _spellings(name) if experts else ():
        if not (found := re.fullmatch(r"(.*\.experts)\.(\w+)", spelling)):
            continue
        for projections in _EXPERTS.get(found.group(2), ()):
            pieces: list[Piece] = []  # as many as there are in the files, however many experts a shape claims
            for e in range(experts or 0):
                piece = Piece(tuple(f"{found.group(1)}.{e}.{p}.weight" for p in projections), e)
                if not all(n in names for n in piece.names):
                    break
                pieces.append(piece)
            if len(pieces) == experts:
                return pieces
    raise EspalierError(f"the checkpoint holds no tensor for the parameter {name!r}")


def place(name: str, names: Container[str]) -> Place | None:
    """Where a tensor called ``name`` in some layout lies among ``names``, those of another: the inverse of :func:`locate`.

    Returns:
        ``None`` when nothing there is known to hold it.
    """
    for spelling in _spellings(name):
        if spelling in names:
            return Place(spelling)
    if not (found := re.fullmatch(r"(.*\.experts)\.(\d{1,9})\.(\w+)\.weight", name)):
        return None
    stem, expert, projection = found.groups()
    for fused, layouts in _EXPERTS.items():
        for projections in layouts:
            for spelling in _spellings(f"{stem}.{fused}") if projection in projections else ():
                if spelling in names:
                    return Place(spelling, int(expert), projections.index(projection), len(projections))
    return None


_TRANSPOSED = {
    "gpt2": r"(.*\.)?(c_attn|q_attn|c_proj|c_fc)\.weight",
    "openai-gpt": r"(.*\.)?(c_attn|c_proj|c_fc)\.weight",
    "gpt_oss": r".*\.experts\.(gate_up_proj|down_proj)",
    "llama4": r".*\.experts\.(gate_up_proj|down_proj)",
    "llama4_text": r".*\.experts\.(gate_up_proj|down_proj)",
}


def is_transposed(model_type: str, name: str) -> bool:
    """Whether the files of a family store this matrix as (..., in, out): GPT-2's Conv1D, some fused experts."""
    return re.fullmatch(_TRANSPOSED.get(model_type, "(?!)"), name) is not None
