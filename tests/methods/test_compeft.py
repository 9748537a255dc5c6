"""ComPEFT (arXiv:2311.13171): signs of the largest numbers of what was trained, and one scale."""

from __future__ import annotations

import dataclasses
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier import registry
from espalier.attach.attachment import (
    Attachment,
    attach,
    attach_updates,
    attachments,
    detach,
    trainable_parameters,
)
from espalier.delta import store
from espalier.delta.compression import Compressor, Whole, choose, compress
from espalier.delta.fit import quantized
from espalier.delta.forms import (
    Columns,
    Dense,
    Factored,
    Golomb,
    Kronecker,
    LowRank,
    Magnitude,
    Rows,
    SeededLowRank,
    Sparse,
    Sum,
    Ternary,
    Update,
)
from espalier.delta.forms.factored import Start
from espalier.delta.trained import recorded_start
from espalier.errors import EspalierError
from espalier.kernels import golomb
from espalier.kernels.philox import GAUSSIAN, Stream
from espalier.kernels.seeded import SeededMatrix


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compeft(**options: Any) -> Any:
    return registry.make("compeft", "compressor", **options)


def whole(updates: dict[str, Update], seed: int | None = None) -> Whole:
    manifest = {"settings": {} if seed is None else {"seed": seed}}
    return Whole(store.Delta(updates, {name: store.Layout() for name in updates}, manifest))


def one(update: Update, seed: int | None = None, **options: Any) -> Update:
    return compress(compeft(**options), whole({"w": update}, seed))[0]["w"]


def dense(update: Update) -> torch.Tensor:
    return update.materialize(torch.zeros(update.shape))


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("code", ["bitmaps", "golomb"])
def test_exactly_the_share_of_largest_numbers_keeps_its_sign_and_all_have_one_magnitude(density: float, code: str) -> None:
    """tau~ = alpha std(tau) sgn(tau) at the top k: every non-zero has that magnitude."""
    tau = random(0, 200, 150)
    made = one(Dense(tau), density=density, alpha=3.0, code=code)
    assert isinstance(made, Ternary if code == "bitmaps" else Golomb)
    found = dense(made)
    nonzero = found != 0
    assert int(nonzero.sum()) == round(density * tau.numel())
    assert float(tau[nonzero].abs().min()) >= float(tau[~nonzero].abs().max())
    assert torch.equal(found[nonzero].sign(), tau[nonzero].sign())
    torch.testing.assert_close(found[nonzero].abs(), torch.full((int(nonzero.sum()),), 3.0) * tau.std(correction=0))


def test_ties_of_bf16_are_broken_by_index_and_a_tiny_tensor_keeps_one() -> None:
    tau = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.25], dtype=torch.bfloat16)
    assert dense(one(Dense(tau), density=0.4)).sign().tolist() == [1, -1, 0, 0, 0]
    assert int(dense(one(Dense(tau), density=0.01)).count_nonzero()) == 1


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_the_file_is_within_2_percent_of_the_formula(density: float, tmp_path: Path) -> None:
    updates: dict[str, Update] = {f"layers.{i}.w": Dense(random(i, 512, 512)) for i in range(4)}
    made, _ = compress(compeft(density=density), whole(updates))
    size = store.save(tmp_path / "d", store.Delta(made, {n: store.Layout() for n in made}), "")
    formula = sum(golomb.expected_bits(round(density * 512 * 512), 512 * 512) + 16 for _ in updates) / 8
    assert size == pytest.approx(formula, rel=0.02)
    if density == 0.05:
        assert 4 * 512 * 512 * 2 / size > 40, "about 47 times smaller than 16 bits, says the paper"


def test_reading_what_was_written_gives_the_same_signs_and_scale(tmp_path: Path) -> None:
    made = {"w": one(Dense(random(0, 30, 20)), density=0.1), "b": one(Dense(random(1, 30, 20)), density=0.1, code="bitmaps")}
    store.save(tmp_path / "d", store.Delta(made, {n: store.Layout() for n in made}), "")
    read = store.load(tmp_path / "d").updates
    assert all(torch.equal(dense(read[name]), dense(made[name])) for name in made)


def test_an_alpha_of_zero_is_the_base() -> None:
    assert not dense(one(Dense(random(0, 30, 20)), alpha=0.0)).any()


def test_the_mean_rule_has_the_least_error_of_all_scales() -> None:
    tau = random(0, 60, 50)
    best = float((dense(one(Dense(tau), scale="mean")) - tau).norm())
    for alpha in (0.5, 0.9, 1.1, 2.0):
        assert float((dense(one(Dense(tau), scale="mean", alpha=alpha)) - tau).norm()) > best


def test_global_takes_share_and_scale_over_the_whole_delta() -> None:
    updates: dict[str, Update] = {"a": Dense(random(0, 40, 30)), "b": Dense(random(1, 20, 10) * 0.1), "c": Dense(random(2, 7))}
    made, _ = compress(compeft(density=0.1, scope="global"), whole(updates))
    everything = torch.cat([dense(u).flatten() for u in updates.values()])
    found = torch.cat([dense(made[name]).flatten() for name in updates])
    assert int(found.count_nonzero()) == round(0.1 * len(everything)) and not dense(made["b"]).any()
    torch.testing.assert_close(found.abs().max(), everything.std(correction=0))
    assert float(everything[found != 0].abs().min()) >= float(everything[found == 0].abs().max())


# low-rank factors


def stored(attachment: Attachment) -> dict[str, Update]:
    """The updates as they are read from a file."""
    updates = {n: u.with_tensors({k: t.detach() for k, t in u.tensors().items()}) for n, u in attachment.updates().items()}
    for update in updates.values():
        update.gain = float(update.gain)
    return updates


def lora(seed: int = 3, rank: int = 4, family: str = "llama", method: str = "lora", **options: Any) -> tuple[dict[str, Update], dict[str, Any]]:
    """The updates of a trained LoRA, and its manifest: what ``attach`` drew, moved by training."""
    model = attach(tiny(family), method, name="d", seed=seed, rank=rank, **options)
    attachment = attachments(model)["d"]
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(model).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return stored(attachment), {"settings": attachment.settings}


@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("gpt2", "attention,mlp"), ("qwen3_moe", "experts")])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_seed_draws_the_start_of_a_again_bit_for_bit(family: str, targets: str, method: str) -> None:
    model = attach(tiny(family), method, name="d", seed=11, targets=targets)
    for name, update in stored(attachments(model)["d"]).items():
        factors = update.inner if isinstance(update, Magnitude) else update
        start = recorded_start({"settings": {"seed": 11}}, name, update)
        assert start is not None and torch.equal(start.draw(*factors.A.shape), factors.A)
        assert recorded_start({"settings": {"seed": 12}}, name, update) is None, "another seed draws another start"
        assert recorded_start({}, name, update) is None


def test_of_a_lora_b_and_the_change_of_a_are_compressed() -> None:
    updates, manifest = lora()
    made, _ = compress(compeft(density=0.2), Whole(store.Delta(updates, {n: store.Layout() for n in updates}, manifest)))
    for name, update in updates.items():
        small = made[name]
        assert isinstance(update, LowRank) and isinstance(small, Factored) and small.start is not None
        start = small.start.draw(*update.A.shape)
        factors = small.low_rank()
        for tau, found in ((update.B, factors.B), (update.A - start, factors.A - start)):
            nonzero = found.abs() > 1e-4
            assert int(nonzero.sum()) == max(1, round(0.2 * tau.numel()))
            torch.testing.assert_close(found[nonzero], tau[nonzero].sign() * tau.std(correction=0), rtol=1e-3, atol=1e-5)
        assert small.nbytes < update.nbytes / 8, "8 to 50 times smaller, says the paper, of 16 bits; this was 32"


def test_without_the_start_of_a_only_b_is_compressed_or_it_is_refused() -> None:
    update = LowRank(random(0, 60, 4) * 0.01, random(1, 4, 50), 0.5)
    made = one(update, seed=0)
    assert isinstance(made, Factored) and made.start is None
    assert torch.equal(made.low_rank().A, update.A), "A itself, at random from its start, is never compressed"
    with pytest.raises(EspalierError, match=r"compeft of w: where A started is not recorded .*use --factors B"):
        one(update, seed=0, factors="both")
    updates, manifest = lora()
    only, _ = compress(compeft(factors="B"), Whole(store.Delta(updates, {n: store.Layout() for n in updates}, manifest)))
    assert all(isinstance(u, Factored) and u.start is None and torch.equal(u.low_rank().A, updates[n].A) for n, u in only.items())


def test_of_columns_rows_and_supports_the_values_are_compressed_where_they_are() -> None:
    places = torch.tensor([1, 5, 6])
    for update, values in (
        (Columns(random(0, 40, 3), places, 30), lambda d: d[:, places]),
        (Rows(random(0, 3, 30), places, 40), lambda d: d[places]),
        (Sparse(random(0, 100), torch.arange(0, 1200, 12), (40, 30)), lambda d: d.flatten()[::12]),
    ):
        found = dense(one(update, density=0.25))
        k = round(0.25 * values(dense(update)).numel())
        assert int(values(found).count_nonzero()) == k == int(found.count_nonzero())


def test_shared_pools_are_refused_with_what_to_do() -> None:
    model = attach(tiny("llama"), "mos", name="d")
    with pytest.raises(EspalierError, match=r"compeft of .*: the form 'pooled' shares its tensors .*convert --to lora"):
        compress(compeft(), whole(dict(attachments(model)["d"].updates())))


# the choice of alpha


def test_alpha_is_chosen_among_the_papers_by_the_lowest_score() -> None:
    tau = random(0, 60, 50)

    def score(updates: Any) -> float:
        return float((dense(updates["w"]).abs().max() - 5.2 * tau.std(correction=0)).abs())

    best, tried = choose(compeft(), whole({"w": Dense(tau)}), score)
    assert [t["alpha"] for t in tried] == [0.5, 1, 2, 3, 4, 5, 6, 8, 10] and best.alpha == 5
    with pytest.raises(EspalierError, match="svd has nothing that validation data could choose"):
        choose(registry.make("svd", "compressor"), whole({"w": Dense(tau)}), score)


def test_a_density_out_of_range_is_refused() -> None:
    for density in (0.0, -1, 1.5, math.nan):
        with pytest.raises(EspalierError, match=r"density is .*; it must be (above 0 and at most 1|a finite number)"):
            compeft(density=density)


def test_an_alpha_that_is_no_scale_is_refused() -> None:
    for alpha in (-1.0, math.nan, math.inf):
        with pytest.raises(EspalierError, match=r"alpha is (-1.0|nan|inf); it must be a finite number"):
            compeft(alpha=alpha)


def test_one_candidate_at_a_time_is_in_memory() -> None:
    made: list[weakref.ref[Update]] = []

    @dataclasses.dataclass
    class Watched(Compressor):
        alpha: float = 1.0

        def candidates(self) -> tuple[dict[str, float], ...]:
            return tuple({"alpha": float(alpha)} for alpha in range(3))

        def compress(self, name: str, update: Update, whole: Whole, state: Any) -> Update:
            assert all(earlier() is None for earlier in made)
            smaller = update.scaled(self.alpha)
            made.append(weakref.ref(smaller))
            return smaller

    Watched.name = "watched"
    choose(Watched(), whole({"w": Dense(random(0, 60, 50))}), lambda updates: 0.0)
    assert len(made) == 3


@torch.no_grad()
def test_compressed_updates_compute_on_a_model_what_they_materialize() -> None:
    updates, manifest = lora()
    made, _ = compress(compeft(), Whole(store.Delta(updates, {n: store.Layout() for n in updates}, manifest)))
    model = tiny("llama")
    attach_updates(model, made, "small")
    found = model(tokens()).logits
    detach(model)
    for name, update in made.items():
        weight = model.get_parameter(name)
        weight.copy_(update.apply(weight))
    torch.testing.assert_close(found, model(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_an_update_of_one_magnitude_is_exact_by_the_mean_rule_at_any_larger_share(scope: str) -> None:
    tau = torch.zeros(30, 20)
    tau[:3] = random(0, 3, 20).sign() * 0.25
    assert torch.equal(dense(one(Dense(tau), density=0.5, scale="mean", scope=scope)), tau)


# updates that are small already


def small(kind: str) -> tuple[Update, int | None]:
    """A LoRA of rank 4 that some other way has made small, and the recorded seed."""
    start = Start(5, "w")
    A = start.draw(4, 500) + random(1, 4, 500) * 0.02
    update = LowRank(random(0, 600, 4) * 0.01, A, 0.5)
    if kind == "seeded":
        basis = SeededMatrix.of(Stream(3, "basis"), 4, 500, GAUSSIAN)
        return SeededLowRank((600, 500), 4, {"A": basis}, {"B": update.B}, 0.5), None
    if kind == "seeds alone":
        bases = {"B": SeededMatrix.of(Stream(3, "b"), 600, 4, GAUSSIAN), "A": SeededMatrix.of(Stream(3, "a"), 4, 500, GAUSSIAN)}
        return SeededLowRank((600, 500), 4, bases, {"d": random(0, 4)}, 0.5), None
    if kind == "kronecker":
        return Kronecker(random(0, 1, 20, 25), random(1, 1, 30, 20)), None
    if kind == "sum":
        return Sum([update, update.scaled(2.0)]), None
    made = quantized(update, 4, 64) if kind.startswith("quantized") else one(update, 5 if kind == "signs" else None)
    return made, None if kind == "quantized, no start" else 5


@pytest.mark.parametrize("kind", ["signs", "signs of B", "quantized", "quantized, no start", "seeded", "seeds alone", "kronecker", "sum"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("density", [0.05, 0.2])
def test_what_is_small_already_never_becomes_larger_and_stays_factors(kind: str, scope: str, density: float) -> None:
    update, seed = small(kind)
    made = one(update, seed, density=density, scope=scope)
    assert made.nbytes <= update.nbytes and (made is update or isinstance(made, Factored))
    if kind in ("signs", "signs of B", "quantized", "seeded") and density == 0.05:
        assert made.nbytes < update.nbytes
    before, after = update.low_rank(), made.low_rank()
    if kind == "seeded":
        assert before is not None and after is not None and torch.equal(after.A, before.A), "a frozen A is drawn, not stored"
    if kind == "signs":
        assert isinstance(made, Factored) and made.start == Start(5, "w")


def test_both_factors_are_refused_wherever_the_start_of_a_is_unknown_and_b_alone_leaves_a() -> None:
    for kind in ("signs of B", "quantized, no start", "sum"):
        with pytest.raises(EspalierError, match=r"compeft of w: where A started is not recorded"):
            one(*small(kind), factors="both")
    for kind in ("signs", "quantized"):
        one(*small(kind), factors="both")
    signs, seed = small("signs")
    alone = one(signs, seed, factors="B", density=0.01)
    assert isinstance(alone, Factored) and isinstance(signs, Factored) and alone.parts["A"] is signs.parts["A"]
    one(Columns(random(0, 40, 3), torch.tensor([1, 5, 6]), 30), factors="both")


def test_an_a_that_is_shared_stays_shared_and_b_is_compressed(tmp_path: Path) -> None:
    """VeRA's A, say: the same for all modules of a width."""
    A = random(0, 4, 50)
    updates: dict[str, Update] = {name: LowRank(random(i, 60, 4), A) for i, name in enumerate("ab")}
    for update in updates.values():
        update.shared = {"A": "basis"}
    for method in ("compeft", "bit1", "quantize"):
        made, _ = compress(registry.make(method, "compressor"), whole(updates))
        delta = store.Delta(made, {n: store.Layout() for n in made})
        assert delta.nbytes < 60 * 4 * 4 + A.numel() * 4
        store.save(tmp_path / method, delta, "")
        read = store.load(tmp_path / method).updates
        for name, update in made.items():
            assert isinstance(update, Factored) and torch.equal(update.low_rank().A, A)
            assert torch.equal(dense(read[name]), dense(update)) and read[name].shared == {"A.values": "basis"}
