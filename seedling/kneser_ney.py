"""The baseline that seedling is held against: an interpolated 5-gram Kneser-Ney model over the same tokens.

``p(w | h) = max(c(h w) - D, 0) / c(h) + D N1+(h .) / c(h) * p(w | h')``, with raw counts at the highest
order, counts of distinct left contexts below it, and the uniform distribution at the bottom. Discounts are
``n1 / (n1 + 2 n2)`` per order (Ney, Essen and Kneser 1994), or the three of the modified form (Chen and Goodman
1999). n-grams never cross documents, and windows of a document are not cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from espalier.data.store import TokenStore


@dataclass
class _Order:
    """Counts of one order: sorted n-gram codes with counts, sorted context codes with their totals."""

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    mass: np.ndarray
    """Discounted probability mass of each context, before division by its total."""
    discounts: np.ndarray


def _codes(tokens: np.ndarray, length: int, base: int) -> np.ndarray:
    """Codes of all n-grams of ``length`` ending at positions length-1.., oldest token most significant."""
    code = np.zeros(len(tokens) - length + 1, np.int64)
    for offset in range(length):
        code = code * base + tokens[offset : offset + len(code)]
    return code


class KneserNey:
    """An interpolated Kneser-Ney model of token documents; ``vocabulary ** order`` must fit in 63 bits."""

    def __init__(self, documents: list[np.ndarray], vocabulary: int, order: int = 5, modified: bool = False) -> None:
        self.vocabulary, self.order = vocabulary, order
        self.orders: list[_Order] = []
        raw = []
        for length in range(1, order + 1):
            codes = np.concatenate([_codes(d, length, vocabulary) for d in documents if len(d) >= length])
            raw.append(np.unique(codes, return_counts=True))
        for length in range(1, order + 1):
            grams, counts = raw[length - 1]
            if length < order:  # distinct left contexts; an n-gram that only begins documents keeps its count
                longer = raw[length][0]
                tails, continuation = np.unique(longer % vocabulary**length, return_counts=True)
                at = np.searchsorted(tails, grams)
                found = (at < len(tails)) & (tails[np.minimum(at, len(tails) - 1)] == grams)
                counts = np.where(found, continuation[np.minimum(at, len(tails) - 1)], counts)
            self.orders.append(self._finish(grams, counts, modified))

    def _finish(self, grams: np.ndarray, counts: np.ndarray, modified: bool) -> _Order:
        n = [max(1, int((counts == k).sum())) for k in range(1, 5)]
        base = n[0] / (n[0] + 2 * n[1])
        discounts = np.full(3, base)
        if modified:
            discounts = np.array([k + 1 - (k + 2) * base * n[k + 1] / n[k] for k in range(3)])
        contexts, first = np.unique(grams // self.vocabulary, return_index=True)
        totals = np.add.reduceat(counts, first)
        mass = np.add.reduceat(discounts[np.minimum(counts, 3) - 1], first)
        return _Order(grams, counts, contexts, totals, mass, discounts)

    def log_probabilities(self, document: np.ndarray) -> np.ndarray:
        """Natural logs of the probabilities of tokens 1.. of a document, each given those before it."""
        size = len(document) - 1
        probability = np.full(size, 1.0 / self.vocabulary)
        for length, order in enumerate(self.orders, 1):
            start = max(0, length - 2)  # first predicted token that has length - 1 tokens before it
            if size <= start:
                break
            codes = _codes(document, length, self.vocabulary)[(1 if length == 1 else 0) :]
            at = np.minimum(np.searchsorted(order.contexts, codes // self.vocabulary), len(order.contexts) - 1)
            known = order.contexts[at] == codes // self.vocabulary
            place = np.minimum(np.searchsorted(order.grams, codes), len(order.grams) - 1)
            counts = np.where(order.grams[place] == codes, order.counts[place], 0)
            discounted = np.where(counts > 0, counts - order.discounts[np.minimum(np.maximum(counts, 1), 3) - 1], 0.0)
            mixed = (discounted + order.mass[at] * probability[start:]) / order.totals[at]
            probability[start:] = np.where(known, mixed, probability[start:])
        return np.log(probability)


def documents(store: TokenStore) -> list[np.ndarray]:
    """All documents of a store."""
    return [store.read(int(a), int(b)) for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


def bits_per_byte(model: KneserNey, store: TokenStore) -> float:
    """Bits per UTF-8 byte of a store under the model."""
    nats = -sum(float(model.log_probabilities(d).sum()) for d in documents(store) if len(d) > 1)
    return nats / np.log(2) / int(store.nbytes.sum())
