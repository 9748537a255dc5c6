"""EVA (arXiv:2410.07170): directions and ranks from the inputs' singular values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import statistics_of, tiny, tokens

from espalier.attach.attachment import attach, attachments, detach
from espalier.calibrate.statistics import STATISTICS
from espalier.errors import EspalierError


def eva(model: torch.nn.Module, statistic: Any = None, **options: Any) -> dict[str, Any]:
    attach(model, "eva", statistics=statistic or statistics_of(model), **options)
    return attachments(model)["eva"].slots


def test_rows_of_A_are_orthonormal_and_explain_most_of_the_inputs() -> None:
    slots = eva(tiny("llama"), rank=4, spread=1.0)
    for slot in slots.values():
        torch.testing.assert_close(slot.A @ slot.A.T, torch.eye(4), rtol=1e-4, atol=1e-5)
        inputs = torch.linspace(2, 0.1, slot.target.inputs)
        assert (slot.A * inputs).square().sum() > 0.7 * inputs.square().topk(4).values.sum()


def test_ranks_sum_to_the_budget_and_none_exceeds_its_share() -> None:
    model = tiny("llama")
    even = statistics_of(model)
    peaked = {name: 0.05 + 0.95 * ("q_proj" in name) for name, _ in model.named_parameters()}

    def statistic(name: str, which: str) -> torch.Tensor:
        value = even(name, which)
        if which == "singular_vectors":
            value = value * torch.tensor([peaked[name] ** k for k in range(len(value))])[:, None]
        return value

    slots = eva(model, statistic, rank=4, spread=2.0)
    ranks = {name: slot.A.shape[0] for name, slot in slots.items()}
    assert sum(ranks.values()) == 4 * len(slots) and max(ranks.values()) <= 8
    assert min(r for n, r in ranks.items() if "q_proj" in n) > max(r for n, r in ranks.items() if "q_proj" not in n)


def test_the_greedy_choice_is_the_largest_shares_of_all_layers() -> None:
    model = tiny("llama")
    statistic = statistics_of(model)
    slots = eva(model, rank=3, spread=4.0)
    shares = []
    for name in slots:
        sigma = torch.linalg.vector_norm(statistic(name, "singular_vectors"), dim=-1)[:12]
        shares += [(float(s), name) for s in sigma.square() / statistic(name, "norm").square().sum()]
    chosen = [name for _, name in sorted(shares, reverse=True)[: 3 * len(slots)]]
    assert {name: slot.A.shape[0] for name, slot in slots.items()} == {name: chosen.count(name) for name in slots}


def test_a_layer_may_get_no_rank_at_all_and_the_model_still_trains_and_exports() -> None:
    model = tiny("llama")
    even = statistics_of(model)

    def statistic(name: str, which: str) -> torch.Tensor:
        value = even(name, which)
        return value * (1e-6 if which == "singular_vectors" and "up_proj" in name else 1)

    slots = eva(model, statistic, rank=2, spread=4.0)
    assert [slot.A.shape[0] for name, slot in slots.items() if "up_proj" in name] == [0, 0]
    x = tokens()
    model(x, labels=x).loss.backward()
    assert all(update.shape for update in attachments(model)["eva"].updates().values())


def test_whitening_divides_each_row_by_the_root_of_its_singular_value_once_for_siblings_too() -> None:
    plain, white = eva(tiny("llama"), rank=2, spread=1.0), eva(tiny("llama"), rank=2, spread=1.0, whiten=True, tokens=64)
    statistic = statistics_of(tiny("llama"))
    for name in plain:
        sigma = torch.linalg.vector_norm(statistic(name, "singular_vectors")[:2], dim=-1, keepdim=True)
        torch.testing.assert_close(white[name].A * (sigma / 8).sqrt().float(), plain[name].A.detach(), rtol=1e-4, atol=1e-6)


def test_alpha_over_rank_is_the_same_for_all_unless_it_shall_not_be() -> None:
    model = tiny("llama")
    assert {float(slot.gain) for slot in eva(model, rank=4, alpha=8.0).values()} == {2.0}
    detach(model)
    for slot in eva(model, rank=4, alpha=8.0, rescale=False).values():
        assert float(slot.gain) == pytest.approx(8.0 / slot.A.shape[0])


def test_the_streaming_svd_is_that_of_all_rows_together() -> None:
    """What the shares are computed from: shuffled batches against one SVD of the concatenation."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(900, 20, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(20)
    sums = STATISTICS["singular_vectors"]((20,), 4, torch.device("cpu"))
    for part in rows[torch.randperm(900, generator=generator)].split(90):
        sums.add(part)
    _, _, Vh = torch.linalg.svd(rows, full_matrices=False)
    found = sums.result() / torch.linalg.vector_norm(sums.result(), dim=-1, keepdim=True)
    assert torch.linalg.matrix_norm(found.T @ found - Vh[:4].T @ Vh[:4]) < 1e-2


def test_without_statistics_it_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"eva starts from statistics of the data \(norm,singular_vectors\); pass statistics="):
        attach(tiny("llama"), "eva")
