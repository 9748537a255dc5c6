"""ScaLearn over low-rank deltas: their updates, each scaled by learned numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.load import load
from espalier.budget.fitting import trained
from espalier.delta import store
from espalier.errors import EspalierError
from espalier.exchange.save import save


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return copy.deepcopy(tiny("llama"))


@pytest.fixture(scope="module")
def folder(base: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and deltas of two LoRAs of other ranks and scales, a MoS and, elsewhere, an OFT."""
    folder = tmp_path_factory.mktemp("sources")
    base.save_pretrained(folder / "base")
    for number, (method, options) in enumerate([("lora", {"rank": 2}), ("lora", {"rank": 3, "alpha": 3.0}), ("mos", {"rank": 4}), ("oft", {"block_size": 8})]):
        model = attach(copy.deepcopy(base), method, seed=number, **options)
        with torch.no_grad():
            for p in trainable_parameters(model).values():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        save(model, folder / str(number), base=folder / "base")
    return folder


def put(base: torch.nn.Module, folder: Path, numbers: tuple[int, ...] = (0, 1, 2), **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(copy.deepcopy(base), "scalearn-lora", name="d", sources=",".join(str(folder / str(n)) for n in numbers), **options)
    return model, attachments(model)["d"]


def set_omega(model: torch.nn.Module, *values: float) -> None:
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p.copy_(torch.tensor(values)[:, None].expand_as(p))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("number", [0, 1, 2])
def test_omega_one_hot_reproduces_a_source_exactly(number: int, base: torch.nn.Module, folder: Path) -> None:
    """"omega one-hot reproduces source s exactly"."""
    model, _ = put(base, folder)
    set_omega(model, *(float(number == n) for n in range(3)))
    torch.testing.assert_close(logits(model), logits(load(folder / "base", [folder / str(number)])), rtol=1e-5, atol=1e-5)


def test_omega_of_one_part_in_s_averages_the_updates(base: torch.nn.Module, folder: Path) -> None:
    """"omega = 1/S equals output averaging": of every matrix."""
    model, attached = put(base, folder)
    set_omega(model, 1 / 3, 1 / 3, 1 / 3)
    sources = [store.load(folder / str(n)).updates for n in range(3)]
    for name, update in attached.updates().items():
        weight = torch.zeros(update.shape)
        mean = sum(source[name].materialize(weight) for source in sources) / 3
        torch.testing.assert_close(update.materialize(weight), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"shared": True}])
def test_summed_and_merged_it_is_the_forward(options: dict[str, Any], base: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    """"for LoRA sources diag(omega_s) B_s A_s summed and merged equals the runtime forward": one plain LoRA to others."""
    model, attached = put(base, folder, **options)
    with torch.no_grad():
        for number, p in enumerate(trainable_parameters(model).values()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    assert save(model, tmp_path / "delta", base=folder / "base")["peft"] is None
    delta = store.load(tmp_path / "delta")
    assert {(update.form, update.rank) for update in delta.updates.values()} == {("low_rank", 2 + 3 + 4)}
    torch.testing.assert_close(logits(load(folder / "base", [tmp_path / "delta"])), logits(model), rtol=1e-5, atol=1e-5)
    merged = copy.deepcopy(base)
    sources = [store.load(folder / str(n)).updates for n in range(3)]
    with torch.no_grad():
        for name, slot in attached.slots.items():
            omega = slot.omega if not options.get("shared") else getattr(attached.pool, f"omega_{slot.target.outputs}")
            weight = merged.get_parameter(name)
            weight.add_(sum(o[:, None] * source[name].materialize(weight) for o, source in zip(omega, sources, strict=True)))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_the_counts_are_those_of_the_paper(base: torch.nn.Module, folder: Path) -> None:
    """"Counts: L*S*d, L*S, S*d, S", d by matrix; "Init: N(c/S, 0.001^2) with c = 2"."""
    outputs = [p.shape[0] for name, p in base.named_parameters() if "proj" in name]
    S, widths = 3, sorted(set(outputs))
    for options, count in (({}, S * sum(outputs)), ({"uniform": True}, S * 7 * LAYERS), ({"shared": True}, S * sum(widths)), ({"uniform": True, "shared": True}, S)):
        model, attached = put(base, folder, **options)
        assert attached.trainable() == count == trained(attached.method, attached.targets)
        assert all((p - 2 / 3).abs().max() < 0.01 for p in trainable_parameters(model).values())


def test_dropout_lets_whole_coefficients_vanish_in_training_only(base: torch.nn.Module, folder: Path) -> None:
    """"dropout acts on omega (whole coefficients vanish), inverted scaling 1/(1-p) included"."""
    model, attached = put(base, folder, (0, 1), uniform=True, omega_dropout=0.5)
    still = logits(model)
    assert torch.equal(logits(model), still)
    set_omega(model, 1.0, 1.0)
    slot = next(iter(attached.slots.values()))
    B = slot.B.clone()
    model.train()
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        ratio = (slot.update().B / B).detach()
        seen.add((float(ratio[0, 0]), float(ratio[0, -1])))
        assert bool((ratio[:, :2] == ratio[0, 0]).all()) and bool((ratio[:, 2:] == ratio[0, -1]).all())
    assert seen == {(a, b) for a in (0.0, 2.0) for b in (0.0, 2.0)}


def test_sources_that_do_not_fit_are_refused(base: torch.nn.Module, folder: Path) -> None:
    with pytest.raises(EspalierError, match="sources is ''; give the directories"):
        attach(copy.deepcopy(base), "scalearn-lora")
    with pytest.raises(EspalierError, match=r"3 has an update of form block_affine .*q_proj.weight; it must be of low rank"):
        put(base, folder, (0, 3))
    with pytest.raises(EspalierError, match=r"0 has nothing for model.embed_tokens.weight"):
        put(base, folder, targets="embedding")
    with pytest.raises(EspalierError, match=r"it must be of low rank and shape \(64, 64\)"):
        put(tiny("llama", hidden_size=64), folder)
    with pytest.raises(EspalierError, match=r"omega_dropout is 1\.0"):
        put(base, folder, omega_dropout=1.0)
