"""Robust weight signatures: what a robust model has learnt beside what a clean one has."""

from __future__ import annotations

from pathlib import Path

import torch

from espalier.anatomy.parameters import BLOCK
from espalier.delta import store
from espalier.delta.compression import Compressor, Whole
from espalier.delta.fit import densify, quantized
from espalier.delta.forms import Dense, LowRank, Update
from espalier.errors import EspalierError, at_least
from espalier.registry import compressor


@compressor("rws", ids=(29,), paper="Robust Weight Signatures, ICML 2023")
class RobustWeightSignature(Compressor):
    """Keep what is orthogonal to a clean delta, in the first blocks: ``v - (<v, u> / <u, u>) u`` for each tensor.

    v is the update by robust training and u that by clean training, both from the same base. Two low-rank updates give
    a low-rank signature, where that is smaller than a dense one. ``layers`` counts blocks; the paper counts layers that
    have weights, of which a block has several. Patching is ``espalier apply`` or ``--delta``, scaled by ``--scale``; taking the delta off
    leaves the base's bits. The reference code multiplies by the strength twice; here it counts once. Running
    statistics of normalisation layers, which the paper replaces, are no parameters and are not part of a delta.
    """

    against: str = ""
    """the delta of clean training, u"""
    layers: int = 0
    """keep the first so many blocks and nothing outside blocks; 0: everything"""
    bits: int = 0
    """bits of a number of the signature, 1 to 8, between the least and greatest of a tensor; 0: not quantized"""

    def check(self) -> None:
        at_least("layers", self.layers, 0)
        if not 0 <= self.bits <= 8:
            raise EspalierError(f"bits is {self.bits!r}; it must be from 0 to 8")

    def begin(self, whole: Whole) -> store.Delta:
        if not self.against:
            raise EspalierError("rws needs the delta of clean training: --against DELTA")
        clean = store.load(Path(self.against), mapped=True)
        if clean.base_fingerprint != whole.delta.base_fingerprint:
            raise EspalierError(f"{self.against} is of the base {clean.base_fingerprint}, the delta of {whole.delta.base_fingerprint}")
        return clean

    def compress(self, name: str, update: Update, whole: Whole, state: store.Delta) -> Update | None:
        block = BLOCK.search(name)
        if self.layers and (block is None or int(block.group(1)) >= self.layers):
            return None
        signature = update
        if name in state.updates:
            clean = state.updates[name]
            if clean.shape != update.shape:
                raise EspalierError(f"the update has shape {tuple(update.shape)}; that in {self.against} has {tuple(clean.shape)}")
            signature = _orthogonal(update, clean, whole.weight(name))
        elif update.depends_on_base:
            signature = Dense(densify(update, whole.weight(name)))
        return quantized(signature, self.bits, 0) if self.bits else signature


def _orthogonal(update: Update, clean: Update, weight: torch.Tensor | None) -> Update:
    v, u = update.low_rank(), clean.low_rank()
    if v is None or u is None or len(update.shape) == 3 or (v.rank + u.rank) * (len(v.B) + v.A.shape[-1]) >= len(v.B) * v.A.shape[-1]:
        dense, other = densify(update, weight).double(), densify(clean, weight).double()
        share = (dense * other).sum() / other.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        return Dense((dense - share * other).float())
    B, A, clean_B, clean_A = (v.B.double() * v.gain, v.A.double(), u.B.double() * u.gain, u.A.double())
    size = ((clean_B.mT @ clean_B) * (clean_A @ clean_A.mT)).sum()
    share = ((B.mT @ clean_B) * (A @ clean_A.mT)).sum() / size.clamp_min(torch.finfo(torch.float64).tiny)
    return LowRank(torch.cat((B, -share * clean_B), -1).float(), torch.cat((A, clean_A), -2).float(), 1.0, v.shape)
