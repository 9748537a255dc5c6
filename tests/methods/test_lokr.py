"""LoKr (LyCORIS, arXiv:2309.14859): a Kronecker product, whose rank is the product of its factors' ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.delta.forms.kronecker import factorize
from espalier.errors import EspalierError


def lokr(**options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny("llama"), "lokr", name="d", **options)
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("both", [False, True])
def test_the_start_is_the_base_exactly(both: bool) -> None:
    model, _ = lokr(rank=1, factor=4, decompose_both=both)
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits)


def test_the_update_is_a_kronecker_product_times_alpha_over_r() -> None:
    model, attachment = lokr(rank=2, alpha=3.0)
    shake(model)
    for slot in attachment.slots.values():
        with torch.no_grad():
            dense = slot.update().materialize(torch.zeros(slot.target.shape))
            B = slot.B[0] @ slot.B_in[0] if hasattr(slot, "B_in") else slot.B[0]
            torch.testing.assert_close(dense, 1.5 * torch.kron(slot.A[0], B))


def test_the_rank_of_the_update_is_the_product_of_the_ranks() -> None:
    """A (4, 4) of full rank and B of rank 2: rank 8, where LoRA of as many numbers has rank 1."""
    model, attachment = lokr(rank=2, factor=4, targets="attention.q")
    shake(model)
    for slot in attachment.slots.values():
        with torch.no_grad():
            dense = slot.update().materialize(torch.zeros(slot.target.shape, dtype=torch.float64))
        assert int(torch.linalg.matrix_rank(dense)) == 4 * 2
        assert sum(p.numel() for p in slot.parameters()) == 4 * 4 + 2 * (8 + 8) <= 32 + 32


def test_a_factor_is_a_product_only_where_that_is_smaller() -> None:
    shapes = {}
    for rank, both in ((1, False), (1, True), (4, True)):
        _, attachment = lokr(rank=rank, factor=4, decompose_both=both, targets="attention.q")
        shapes[rank, both] = {name for name, _ in next(iter(attachment.slots.values())).named_parameters()}
    assert shapes == {(1, False): {"A", "B", "B_in"}, (1, True): {"A", "A_in", "B", "B_in"}, (4, True): {"A", "B"}}


@pytest.mark.parametrize(("size", "wanted", "factors"), [(256, -1, (16, 16)), (128, -1, (8, 16)), (127, -1, (1, 127)), (128, 4, (4, 32)), (12, 6, (6, 2)), (32, 7, (4, 8)), (1, -1, (1, 1))])
def test_sizes_are_factored_as_lycoris_does(size: int, wanted: int, factors: tuple[int, int]) -> None:
    assert factorize(size, wanted) == factors


def test_sizes_are_factored_as_peft_does() -> None:
    factorization = pytest.importorskip("peft.tuners.lokr.layer").factorization
    assert all(factorize(n, f) == factorization(n, f) for n in range(1, 100) for f in (-1, *range(1, 12)))


def test_a_wanted_size_of_zero_is_refused() -> None:
    with pytest.raises(EspalierError, match="factor is 0; it must be at least 1, or -1"):
        lokr(factor=0)
