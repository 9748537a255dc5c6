"""ScaLearn: scaled outputs of trained adapters."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import HIDDEN, tiny, tokens

from espalier.attach.attachment import attach, attachments, detach, trainable_parameters
from espalier.attach.load import load
from espalier.budget.fitting import trained
from espalier.errors import EspalierError
from espalier.exchange.save import save


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return copy.deepcopy(tiny("llama"))


@pytest.fixture(scope="module")
def folder(base: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and three adapters of two methods."""
    folder = tmp_path_factory.mktemp("sources")
    base.save_pretrained(folder / "base")
    for number, method in enumerate(("pfeiffer", "pfeiffer", "parallel-adapter")):
        model = copy.deepcopy(base)
        attach(model, method, width=3, seed=number)
        with torch.no_grad():
            for p in trainable_parameters(model).values():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        save(model, folder / str(number), base=folder / "base")
    return folder


def put(base: torch.nn.Module, folder: Path, numbers: tuple[int, ...] = (0, 1), **options: object) -> torch.nn.Module:
    model = copy.deepcopy(base)
    return attach(model, "scalearn", sources=",".join(str(folder / str(n)) for n in numbers), **options)


def set_omega(model: torch.nn.Module, *values: float) -> None:
    with torch.no_grad():
        for name, p in trainable_parameters(model).items():
            if name.endswith("omega"):
                p.copy_(torch.tensor(values)[:, None].expand_as(p))


@pytest.mark.parametrize("number", [0, 1])
def test_omega_one_hot_reproduces_a_source_exactly(number: int, base: torch.nn.Module, folder: Path) -> None:
    """"omega one-hot reproduces source s exactly"."""
    model = put(base, folder)
    set_omega(model, *(float(number == n) for n in (0, 1)))
    source = load(folder / "base", [folder / str(number)])
    torch.testing.assert_close(model(tokens()).logits, source(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sources_that_are_codes_are_reproduced_too(dtype: str, base: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    source = attach(copy.deepcopy(base), "binary-adapter", width=4)
    save(source, tmp_path / "source", base=folder / "base")
    model = load(folder / "base", dtype=dtype)
    attach(model, "scalearn", sources=str(tmp_path / "source"))
    set_omega(model, 1.0)
    model.eval()
    assert torch.equal(model(tokens()).logits, load(folder / "base", [tmp_path / "source"], dtype=dtype)(tokens()).logits)
    model.train()
    model(tokens()).logits.float().sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(model).values())


def test_omega_of_one_part_in_s_averages_the_outputs(base: torch.nn.Module, folder: Path) -> None:
    """"omega = 1/S equals output averaging": at the first site, where both sources see the same."""

    def first(model: torch.nn.Module) -> torch.Tensor:
        found = []
        handle = model.model.layers[0].mlp.register_forward_hook(lambda m, a, output: found.append(output.detach()))
        model(tokens())
        handle.remove()
        return found[0]

    model = put(base, folder)
    set_omega(model, 0.5, 0.5)
    each = [first(load(folder / "base", [folder / str(n)])) for n in (0, 1)]
    torch.testing.assert_close(first(model), (each[0] + each[1]) / 2, rtol=1e-5, atol=1e-5)


def test_the_counts_are_those_of_the_paper(base: torch.nn.Module, folder: Path) -> None:
    """"Counts: L*S*d, L*S, S*d, S"; "Init: N(c/S, 0.001^2) with c = 2"."""
    S, L, d = 2, 2, HIDDEN
    for options, count in (({}, L * S * d), ({"uniform": True}, L * S), ({"shared": True}, S * d), ({"uniform": True, "shared": True}, S)):
        model = put(base, folder, **options)
        attachment = attachments(model)["scalearn"]
        assert attachment.trainable() == count == trained(attachment.method, [b.site for b in attachment.branches.values()])
        assert all((p - 1.0).abs().max() < 0.01 for p in trainable_parameters(model).values())


@pytest.mark.parametrize("shared", [False, True])
def test_the_result_holds_its_sources(shared: bool, base: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    model = put(base, folder, (2,), shared=shared)
    set_omega(model, 0.3)
    save(model, tmp_path / "delta", base=folder / "base")
    loaded = load(folder / "base", [tmp_path / "delta"])
    assert attachments(loaded)["delta0"].method.sources == ""
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=1e-6, atol=1e-6)
    detach(loaded)
    assert torch.equal(loaded(tokens()).logits, base(tokens()).logits)


def test_dropout_lets_whole_coefficients_vanish_in_training_only(base: torch.nn.Module, folder: Path) -> None:
    """"dropout acts on omega (whole coefficients vanish), inverted scaling 1/(1-p) included"."""
    model = put(base, folder, uniform=True, omega_dropout=0.5)
    still = model(tokens()).logits
    assert torch.equal(model(tokens()).logits, still)
    model.train()
    torch.manual_seed(0)
    assert len({float(model(tokens()).logits.sum()) for _ in range(12)}) > 3


def test_sources_that_do_not_go_together_or_fit_are_refused(base: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="different methods or options"):
        put(base, folder, (0, 2))
    with pytest.raises(EspalierError, match="sources is ''; give the directories"):
        attach(copy.deepcopy(base), "scalearn")
    with pytest.raises(EspalierError, match=r"has nothing for down at blocks\.0\.attention"):
        put(base, folder, targets="attention")
    with pytest.raises(EspalierError, match="it must be"):
        put(tiny("llama", hidden_size=64), folder)
