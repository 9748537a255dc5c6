"""Updates of one parameter merged by what they are made of: the mean of their factors, and a basis that they share.

The mean of factors is not the mean of updates: of low rank, ``(sum w_i B_i)(sum w_i A_i)`` and ``sum w_i B_i A_i`` differ by
the cross terms ``sum w_i (B_i - B)(A_i - A)``, B and A the means. It is what MHR-mu makes of a bank of adapters (L. Caccia
et al., NeurIPS 2023) and a variant of Metrics-Weighted Averaging (arXiv:2504.18580), for adapters of one start or run.

The shared basis is that of KnOTS (G. Stoica et al., arXiv:2410.19735, ``[D_1 .. D_n] = U S [V_1 .. V_n]^T``): it is found from
the factors, and the concatenation of the dense updates is never made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from espalier.delta.algebra import sets_values
from espalier.delta.forms import LowRank, Update, working_dtype
from espalier.errors import EspalierError


def mean(updates: Sequence[Update], shares: Sequence[float]) -> Update:
    """The update whose every tensor is the mean of those of the updates: of low rank, the mean of A and the mean of B.

    Updates of one form are averaged in it, a magnitude too; codes and positions must be equal. Others are taken as the factors
    that they stand for.

    Args:
        updates: of one parameter.
        shares: one of each, that sum to 1.

    Raises:
        EspalierError: when forms, ranks or positions differ.
    """
    if any(sets_values(update) for update in updates):
        raise EspalierError("an update sets values, and has no factors")
    made = _mean_of_tensors(updates, shares)
    if made is None:
        factors = [update.low_rank() for update in updates]
        known = [f for f in factors if f is not None]
        made = _mean_of_tensors([_with_gain_in_B(f) for f in known], shares) if len(known) == len(factors) else None
    if made is None:
        raise EspalierError(
            f"the mean of factors is of updates of one form and rank; these are {' and '.join(dict.fromkeys(map(_described, updates)))}: "
            "merge them as updates (without --space factors)"
        )
    return made


def _described(update: Update) -> str:
    factors = update.low_rank()
    return update.form + (f" of rank {factors.rank}" if factors is not None else "")


def _with_gain_in_B(factors: LowRank) -> LowRank:
    wide = working_dtype(factors.B)
    return LowRank(factors.B.to(wide) * float(factors.gain), factors.A.to(wide), 1.0, factors.shape)


def _mean_of_tensors(updates: Sequence[Update], shares: Sequence[float]) -> Update | None:
    """The mean, or ``None`` where anything but the floating point numbers differs."""
    first, *others = updates
    tensors = first.tensors()
    for other in others:
        theirs = other.tensors()
        facts = [(u.form, u.shape, float(u.gain), u.constants(), dict(u.shared)) for u in (first, other)]
        if facts[0] != facts[1] or {n: (t.shape, t.dtype) for n, t in tensors.items()} != {n: (t.shape, t.dtype) for n, t in theirs.items()}:
            return None
        if not all(t.is_floating_point() or torch.equal(t, theirs[n]) for n, t in tensors.items()):
            return None
    made = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            wide = working_dtype(tensor)
            made[name] = sum(u.tensors()[name].to(wide) * w for u, w in zip(updates, shares, strict=True)).to(tensor.dtype)  # type: ignore[union-attr]
    return first.with_tensors({**tensors, **made})


def shared_basis(factors: Sequence[LowRank]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The left singular vectors of all updates side by side, and what each update is in them.

    Args:
        factors: updates of one parameter, B (..., out, r_i) and A (..., r_i, in).

    Returns:
        U (..., out, k) with orthonormal columns, and of each update ``S V_i^T = U^T D_i`` (..., k, in), in float64; k is the rank
        of all of them together, of experts the largest.
    """
    Q, R = torch.linalg.qr(torch.cat([f.B.double() * float(f.gain) for f in factors], -1))
    parts = R.split([f.rank for f in factors], -1)  # D_i = Q R_i A_i
    narrow = [part @ torch.linalg.qr(f.A.double().mT, mode="r").R.mT for part, f in zip(parts, factors, strict=True)]
    U, S, _ = torch.linalg.svd(torch.cat(narrow, -1), full_matrices=False)
    least = S[..., :1] * torch.finfo(torch.float64).eps * max(Q.shape[-2:])
    U = U[..., : max(int((least < S).sum(-1).max()), 1)]
    return Q @ U, [U.mT @ (part @ f.A.double()) for part, f in zip(parts, factors, strict=True)]
