"""What of an update was trained, as differences from where it started, and the update over other such numbers.

Compression that keeps signs (ComPEFT, arXiv:2311.13171) works on what training added. The B of a LoRA starts at zero
and is that difference; its A starts at random, and the difference is known only where the start can be drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from espalier.delta.forms import (
    Columns,
    Dense,
    Factored,
    Golomb,
    LowRank,
    Magnitude,
    Rows,
    Sparse,
    Ternary,
    Update,
)
from espalier.delta.forms.factored import Start
from espalier.errors import EspalierError

ALIKE = 0.3
"""Cosine of A and a drawn A0 above which A was trained from it: of others it is near 0."""

Coder = Callable[[torch.Tensor], Ternary | Golomb]


def recorded_start(manifest: Mapping[str, Any], name: str, update: Update) -> Start | None:
    """The start of the update's A, where the delta records its seed and A still resembles what that draws."""
    seed = manifest.get("settings", {}).get("seed")
    factors = update.inner if isinstance(update, Magnitude) else update
    if not isinstance(factors, LowRank) or type(seed) is not int:
        return None
    start = Start(seed, name)
    drawn, A = start.draw(*factors.A.shape).to(factors.A.device), factors.A.float()
    size = float(torch.linalg.vector_norm(drawn) * torch.linalg.vector_norm(A))
    return start if size and float((drawn * A).sum()) > ALIKE * size else None


def vectors(update: Update, start: Start | None) -> list[torch.Tensor]:
    """What was trained: of the update's factors or values, else the dense update; float32.

    Raises:
        EspalierError: when the update depends on the base, or shares its numbers with others.
    """
    found: list[torch.Tensor] = []

    def see(vector: torch.Tensor) -> Ternary:
        found.append(vector)
        return Ternary.of(torch.zeros(vector.shape, dtype=torch.int8, device=vector.device), torch.zeros(()))

    recoded(update, start, see)
    return found


def recoded(update: Update, start: Start | None, code: Coder) -> Update:
    """The same update with what was trained replaced by what ``code`` makes of it.

    The A of low-rank factors stays as it is where there is no ``start``. Of columns and rows, the values are coded and
    the places kept; of a sparse update, the values at its support.

    Args:
        code: from a float32 tensor of any shape to signs and a scale of that shape; called in a fixed order.

    Raises:
        EspalierError: when the update depends on the base, or shares its numbers with others.
    """
    if update.shared:
        raise EspalierError(f"the form {update.form!r} shares its tensors with other parameters; make it low rank first (espalier convert --to lora)")
    if not update.shape:
        return update  # one number is no smaller as a sign and a scale
    if isinstance(update, Magnitude):
        return Magnitude(update.magnitude, recoded(update.inner, start, code), update.gain)
    if isinstance(update, LowRank):
        B = code(update.B.float())
        A = Dense(update.A) if start is None else code(update.A.float() - start.draw(*update.A.shape).to(update.A.device))
        return Factored(B, A, update.gain, start, update.shape)
    if isinstance(update, Columns):
        return Factored(code(update.values.float()), _places(update.index, update.inputs), update.gain, None, update.shape)
    if isinstance(update, Rows):
        values = code(update.values.float())
        return Factored(_places(update.index, update.outputs, turned=True), values, update.gain, None, update.shape)
    if isinstance(update, Sparse):
        coded = code(update.values.float())
        signs = torch.zeros(update.shape, dtype=torch.int8, device=coded.scale.device)
        signs.view(-1)[update.positions] = coded.signs()
        scale = coded.scale.expand(signs.shape[0]) if signs.ndim == 3 and isinstance(coded, Ternary) else coded.scale
        return type(coded).of(signs, scale.clone(), update.gain)
    if isinstance(update, Dense):
        return code(update.values.float()).scaled(update.gain)
    if update.depends_on_base:
        raise EspalierError(f"the form {update.form!r} depends on the base; the base model is needed to make another of it (--model BASE)")
    return code(update.materialize(torch.empty(update.shape, device="meta")))


def _places(index: torch.Tensor, count: int, turned: bool = False) -> Sparse:
    """A matrix with a one in each row (``turned``: each column), at ``index`` (..., k) of ``count``."""
    rows = torch.arange(index.numel(), device=index.device)
    if not turned:
        return Sparse(torch.ones(index.numel()), rows * count + index.flatten(), (*index.shape, count))
    k = index.shape[-1]
    lead = rows // max(k, 1) * count * k
    flat = lead + index.flatten().long() * k + rows % max(k, 1)
    return Sparse(torch.ones(index.numel()), flat.sort().values, (*index.shape[:-1], count, k))
