"""What of an update was trained, as differences from where it started, and the update over other such numbers.

Compression that keeps signs (ComPEFT, arXiv:2311.13171) works on what training added. The B of a LoRA starts at zero
and is that difference; its A starts at random, and the difference is known only where the start can be drawn again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from espalier.delta import fit
from espalier.delta.fit import Source
from espalier.delta.forms import (
    Columns,
    Dense,
    Factored,
    Golomb,
    LowRank,
    Magnitude,
    Quantized,
    RandomBases,
    Rows,
    Seeded,
    SeededLowRank,
    Sparse,
    Subspace,
    Ternary,
    Update,
)
from espalier.delta.forms.factored import Start
from espalier.delta.forms.quantized import Codebook
from espalier.errors import EspalierError

ALIKE = 0.3
"""Cosine of A and a drawn A0 above which A was trained from it: of others it is near 0."""

Coder = Callable[[torch.Tensor], Update]


def recorded_start(manifest: Mapping[str, Any], name: str, update: Update) -> Start | None:
    """The start of the update's A, where the delta records its seed and A still resembles what that draws."""
    seed = manifest.get("settings", {}).get("seed")
    factors = _inmost(update)
    if not isinstance(factors, LowRank) or type(seed) is not int:
        return None
    start = Start(seed, name)
    drawn, A = start.draw(*factors.A.shape).to(factors.A.device), factors.A.float()
    size = float(torch.linalg.vector_norm(drawn) * torch.linalg.vector_norm(A))
    return start if size and float((drawn * A).sum()) > ALIKE * size else None


def _inmost(update: Update) -> Update:
    """The update without codes and magnitudes around it."""
    return _inmost(update.inner) if isinstance(update, Quantized | Magnitude) else update


def leaves_factors(update: Update, start: Start | None) -> bool:
    """Whether :func:`recoded` leaves the A of low-rank factors as it is, because where it started is not known."""
    factors = _factors(_inmost(update), start)
    return factors is not None and factors.start is None and not any(isinstance(p, Sparse | Seeded) for p in factors.parts.values())


def quantized(update: Source, start: Start | None, bits: int, group: int, codebook: Codebook) -> Update:
    """:func:`fit.quantized` of what was trained: of low-rank factors, B and the distance of A from its start.

    Where the start is not known, A stays as it is.
    """
    if isinstance(update, Update) and isinstance(_inmost(update), LowRank | Factored):
        return recoded(update, start, lambda tau: fit.quantized(tau, bits, group, codebook))
    return fit.quantized(update, bits, group, codebook)


def vectors(update: Update, start: Start | None, B_alone: bool = False) -> list[torch.Tensor]:
    """What was trained: of the update's factors or values, else the dense update; float32.

    Raises:
        EspalierError: when the update depends on the base, or shares pools with others.
    """
    found: list[torch.Tensor] = []

    def see(vector: torch.Tensor) -> Ternary:
        found.append(vector)
        return Ternary.of(torch.zeros(vector.shape, dtype=torch.int8, device=vector.device), torch.zeros(()))

    recoded(update, start, see, B_alone)
    return found


def recoded(update: Update, start: Start | None, code: Coder, B_alone: bool = False) -> Update:
    """The same update with what was trained replaced by what ``code`` makes of it; as it is where that is no smaller.

    Updates that are made of factors stay so. Their A is coded as its distance from where it started: ``start``, or what
    an update that was coded before knows; else it stays as it is. Of columns and rows, the values are coded and the
    places kept; of a sparse update, the values at its support.

    Args:
        code: from a float32 tensor of any shape to an update of that shape (of values at a support: to signs); called
            in a fixed order.
        B_alone: leave A as it is even where its start is known.

    Raises:
        EspalierError: when the update depends on the base, or shares pools with others.
    """
    if isinstance(update, Magnitude):
        return Magnitude(update.magnitude, recoded(update.inner, start, code, B_alone), update.gain)
    if isinstance(update, Quantized):
        made = recoded(update.inner, start, code, B_alone)
    else:
        made = _recoded(update, None if B_alone else start, code, B_alone)
    return made if made.nbytes < update.nbytes else update


def _recoded(update: Update, start: Start | None, code: Coder, B_alone: bool) -> Update:
    if not update.shape or isinstance(update, Seeded | Subspace | RandomBases) or (isinstance(update, SeededLowRank) and update.B is None):
        return update  # one number, or seeds and few of them
    if (factors := _factors(update, start)) is not None:
        B, A = factors.parts["B"], factors.parts["A"]
        learnt = isinstance(B, Sparse) or (factors.start is not None and not B_alone)
        made = B if isinstance(B, Sparse) else code(_values(B))
        return Factored(made, code(_values(A)) if learnt else A, factors.gain, factors.start, factors.shape)
    if isinstance(update, Sparse):
        return _at_support(update, code(update.values.float()))
    if isinstance(update, Dense):
        return code(update.values.float()).scaled(update.gain)
    if update.depends_on_base:
        raise EspalierError(f"the form {update.form!r} depends on the base; the base model is needed to make another of it (--model BASE)")
    return code(_values(update))


def _at_support(update: Sparse, coded: Update) -> Update:
    """Coded values (n,) as signs at the support of a sparse update."""
    assert isinstance(coded, Ternary | Golomb)
    signs = torch.zeros(update.shape, dtype=torch.int8, device=coded.scale.device)
    signs.view(-1)[update.positions] = coded.signs()
    scale = coded.scale.expand(signs.shape[0]) if signs.ndim == 3 and isinstance(coded, Ternary) else coded.scale
    return type(coded).of(signs, scale.clone(), update.gain)


def _values(update: Update) -> torch.Tensor:
    """The dense numbers of an update that does not depend on the base, float32."""
    return update.materialize(torch.empty(update.shape, device="meta"))


def _factors(update: Update, start: Start | None) -> Factored | None:
    """The update as two factors, of which one may be places (``Sparse``), or ``None`` where it is not made of such.

    Raises:
        EspalierError: when it shares pools with others: its factors would be larger than it is.
    """
    if isinstance(update, Factored):
        return update
    if isinstance(update, Columns):
        return Factored(Dense(update.values), _places(update.index, update.inputs), update.gain, None, update.shape)
    if isinstance(update, Rows):
        return Factored(_places(update.index, update.outputs, turned=True), Dense(update.values), update.gain, None, update.shape)
    if update.shared and not isinstance(update, LowRank):
        raise EspalierError(f"the form {update.form!r} shares its tensors with other parameters; make it low rank first (espalier convert --to lora)")
    if (factors := update.low_rank()) is None:
        return None
    A: Update = Dense(factors.A)
    if isinstance(update, SeededLowRank) and "A" in update.bases and update.coefficients_A is None:
        basis = update.bases["A"]
        A = Seeded(torch.ones(1), dataclasses.replace(basis, rows=basis.rows * basis.columns, columns=1), tuple(factors.A.shape))
    if not isinstance(update, LowRank) or start is None:
        A.shared = {"values": update.shared["A"]} if "A" in update.shared else {}
        return Factored(Dense(factors.B), A, factors.gain, None, update.shape)
    change = factors.A.float() - start.draw(*factors.A.shape).to(factors.A.device)
    return Factored(Dense(factors.B), Dense(change), factors.gain, start, update.shape)


def _places(index: torch.Tensor, count: int, turned: bool = False) -> Sparse:
    """A matrix with a one in each row (``turned``: each column), at ``index`` (..., k) of ``count``."""
    rows = torch.arange(index.numel(), device=index.device)
    if not turned:
        return Sparse(torch.ones(index.numel()), rows * count + index.flatten(), (*index.shape, count))
    k = index.shape[-1]
    lead = rows // max(k, 1) * count * k
    flat = lead + index.flatten().long() * k + rows % max(k, 1)
    return Sparse(torch.ones(index.numel()), flat.sort().values, (*index.shape[:-1], count, k))
