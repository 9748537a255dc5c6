"""The one mapping between the names of a live model's parameters and the tensors of its files.

transformers 5 fuses experts into 3-D parameters while files keep a tensor per expert and projection, and
checkpoints leave out prefixes, rename heads or repeat tied tensors. :func:`locate` gives, for a parameter,
the file tensors that it is made of; whoever writes a parameter writes all of them.
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


_PREFIXES = ("model.", "transformer.", "gpt_neox.", "bert.", "model.decoder.")
_RENAMED = {"lm_head.weight": ("embed_out.weight", "output.weight")}
# fused parameter -> (file tensors of expert e, stacked by rows)
_EXPERTS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    (
        r"(.*)\.experts\.gate_up_proj",
        (
            ("{0}.experts.{e}.gate_proj.weight", "{0}.experts.{e}.up_proj.weight"),
            ("{0}.experts.{e}.w1.weight", "{0}.experts.{e}.w3.weight"),
        ),
    ),
    (r"(.*)\.experts\.down_proj", (("{0}.experts.{e}.down_proj.weight",), ("{0}.experts.{e}.w2.weight",))),
)


def _spellings(name: str) -> list[str]:
    """Names under which files may hold a parameter, the exact one first."""
    found = [name, *_RENAMED.get(name, ())]
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            found.append(name.removeprefix(prefix))
        else:
            found.append(prefix + name)
    found += [n.replace(".mlp.", ".block_sparse_moe.") for n in found if ".mlp." in n]
    return found


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
        for pattern, layouts in _EXPERTS:
            if not (found := re.fullmatch(pattern, spelling)):
                continue
            for layout in layouts:
                pieces = [Piece(tuple(n.format(found.group(1), e=e) for n in layout), e) for e in range(experts or 0)]
                if all(n in names for piece in pieces for n in piece.names):
                    return pieces
    raise EspalierError(f"the checkpoint holds no tensor for the parameter {name!r}")


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
