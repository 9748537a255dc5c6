"""LoRA (arXiv:2106.09685), its rank-stabilized scaling (arXiv:2312.03732), and its starts from the weight (PiSSA, OLoRA)."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import Attachment, attach, attachments, stored, trainable_parameters
from espalier.attach.course import Course
from espalier.attach.load import load
from espalier.checkpoint.directory import ModelDirectory
from espalier.delta import store
from espalier.delta.fit import singular_vectors
from espalier.delta.forms import LowRank
from espalier.errors import EspalierError
from espalier.exchange.peft_import import import_adapter
from espalier.exchange.save import save
from espalier.kernels.philox import Stream


@pytest.fixture(autouse=True)
def the_same_numbers() -> None:
    torch.manual_seed(0)


def lora(family: str = "llama", **options: object) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "lora", name="d", **options)
    return model, attachments(model)["d"]


def fill(model: torch.nn.Module) -> None:
    """Standard normal numbers in B and A."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("scaling", "factor"), [("standard", 6 / 9), ("rank-stabilized", 6 / 3)])
def test_the_update_is_alpha_over_rank_or_its_root_times_b_a(scaling: str, factor: float) -> None:
    model, attachment = lora(rank=9, alpha=6.0, scaling=scaling)
    fill(model)
    for name, slot in attachment.slots.items():
        dense = slot.update().materialize(model.get_parameter(name))
        torch.testing.assert_close(dense, factor * slot.B @ slot.A, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scaling", "power"), [("standard", -0.5), ("rank-stabilized", 0.0)])
def test_the_rank_stabilized_output_keeps_its_size_at_any_rank(scaling: str, power: float) -> None:
    """Theorem 3.2 of rsLoRA: at alpha / sqrt(r) the output's second moment is independent of r; at alpha / r it shrinks as r^-1/2."""
    sizes = []
    for rank in (4, 256):
        model, attachment = lora(rank=rank, scaling=scaling, targets="mlp.down")
        fill(model)
        update = attachment.slots["model.layers.0.mlp.down_proj.weight"].update()
        x = torch.randn(64, update.shape[1], generator=torch.Generator().manual_seed(1))
        sizes.append(float(update.matmul(x).detach().square().mean().sqrt()))
    assert sizes[1] / sizes[0] == pytest.approx((256 / 4) ** power, rel=0.25)


def test_b_starts_at_zero_and_a_uniform_from_the_parameters_own_stream() -> None:
    _, attachment = lora(rank=4, seed=5)
    for name, slot in attachment.slots.items():
        assert not slot.B.any()
        assert torch.equal(slot.A, Stream(5, name).kaiming_uniform(4, slot.target.inputs))
        bound = 1 / math.sqrt(slot.target.inputs)
        assert 0.8 * bound < float(slot.A.detach().abs().max()) <= bound
    firsts = {float(slot.A.detach()[0, 0]) for slot in attachment.slots.values()}
    assert len(firsts) == len(attachment.slots)


def test_the_start_depends_on_the_seed_and_on_no_global_generator() -> None:
    torch.manual_seed(0)
    _, first = lora(rank=4, seed=5)
    torch.manual_seed(1)
    _, second = lora(rank=4, seed=5)
    _, other = lora(rank=4, seed=6)
    for name, slot in first.slots.items():
        assert torch.equal(slot.A, second.slots[name].A)
        assert not torch.equal(slot.A, other.slots[name].A)


def test_the_update_has_at_most_the_rank() -> None:
    model, attachment = lora(rank=3)
    fill(model)
    for name, slot in attachment.slots.items():
        assert torch.linalg.matrix_rank(slot.update().materialize(model.get_parameter(name)), rtol=1e-4) == 3


def test_every_expert_gets_its_own_pair() -> None:
    _, attachment = lora("qwen3_moe", rank=2, targets="experts.gate_up")
    for slot in attachment.slots.values():
        assert slot.B.shape == (4, 32, 2) and slot.A.shape == (4, 2, 32)
        assert len({float(a[0, 0]) for a in slot.A.detach()}) == 4


def test_dropout_acts_on_the_updates_input_alone_and_in_training_alone() -> None:
    model, _ = lora(dropout=0.5)
    x = tokens()
    bare = tiny("llama")(x).logits
    model.train()
    assert torch.equal(model(x).logits, bare), "B is zero: what is dropped is the update's"
    fill(model)
    torch.manual_seed(0)
    first, second = model(x).logits, model(x).logits
    assert not torch.allclose(first, second)
    model.eval()
    assert torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"rank": "many"}, "rank is 'many'"),
        ({"scaling": "cubic"}, "scaling is 'cubic'"),
        ({"rnk": 3}, "rnk is no option of lora; did you mean 'rank'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"initialization": "pissa", "alpha": 0.0}, "alpha is 0.0; with initialization 'pissa' it must be above 0"),
        ({"initialization": "olora", "rank": 40}, "rank is 40; .* has no more than 32 for initialization 'olora'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        lora(**options)


def test_dropout_is_refused_wherever_it_cannot_act_not_only_on_the_first_parameter() -> None:
    with pytest.raises(EspalierError, match=r"dropout 0\.1 cannot act on .*mlp\.gate\.weight"):
        attach(tiny("qwen3_moe"), "lora", targets="attention,router", dropout=0.1)


from_the_weight = pytest.mark.parametrize("kind", ["pissa", "olora"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "targets"), [("llama", "linear,embedding"), ("gpt2", "attention,mlp"), ("qwen3_moe", "experts")])
@from_the_weight
def test_a_start_from_the_weight_is_the_base_exactly(kind: str, family: str, targets: str, trained: torch.dtype, dtype: torch.dtype) -> None:
    """The papers subtract B0 A0 from a weight, which is rounded; here what is added is exactly zero."""
    bare = tiny(family).to(dtype)
    model = attach(tiny(family).to(dtype), "lora", rank=4, targets=targets, initialization=kind, dtype=trained)
    assert torch.equal(model(tokens()).logits, bare(tokens()).logits)
    for name, parameter in bare.named_parameters():
        assert torch.equal(stored(model, name), parameter)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pissa_starts_at_the_best_low_rank_fit_of_the_weight(family: str) -> None:
    """PiSSA, eq. 2 and 3: A = U sqrt(S), B = sqrt(S) V^T of the principal singular values."""
    model, attachment = lora(family, rank=4, alpha=6.0, initialization="pissa", targets="attention")
    for name, slot in attachment.slots.items():
        weight = stored(model, name).T if slot.target.transposed else stored(model, name)
        U, S, Vt = torch.linalg.svd(weight)
        torch.testing.assert_close(6 / 4 * slot.B @ slot.A, U[:, :4] * S[:4] @ Vt[:4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(slot.B.norm(dim=0), slot.A.norm(dim=1), msg="the root of S is on either side")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_olora_starts_at_the_first_columns_and_rows_of_the_qr_decomposition(family: str) -> None:
    model, attachment = lora(family, rank=4, initialization="olora", targets="attention")
    for name, slot in attachment.slots.items():
        weight = stored(model, name).T if slot.target.transposed else stored(model, name)
        Q, R = torch.linalg.qr(weight)
        torch.testing.assert_close(slot.B.detach(), Q[:, :4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(slot.A.detach(), R[:4], rtol=1e-4, atol=1e-5)


def test_large_weights_are_decomposed_at_random_the_same_way_for_a_seed() -> None:
    spectrum = 0.8 ** torch.arange(48.0)
    weight = torch.linalg.qr(torch.randn(96, 48))[0] * spectrum @ torch.linalg.qr(torch.randn(64, 48))[0].T
    exact = singular_vectors(weight, 4, Stream(0, "w"), method="exact")
    first, second = (singular_vectors(weight, 4, Stream(0, "w"), method="randomized") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first[0] * first[1] @ first[2], exact[0] * exact[1] @ exact[2], rtol=1e-3, atol=1e-4)


def test_what_is_learnt_is_not_lost_beside_a_large_start_in_bfloat16() -> None:
    """B0 is far from zero: a step of a thousandth of it is below the spacing of bf16, but not as a difference."""
    _, attachment = lora(rank=4, initialization="pissa", targets="mlp.down")
    slot = next(iter(attachment.slots.values()))
    with torch.no_grad():
        slot.B.mul_(1.001)
    x = torch.randn(64, slot.target.inputs)
    exact = slot.update().matmul(x.double())
    as_published = LowRank(torch.cat((slot.B, -slot.B0), 1), torch.cat((slot.A, slot.A0)), slot.gain)
    errors = [float((update.matmul(x.bfloat16()) - exact).detach().norm() / exact.detach().norm()) for update in (slot.update(), as_published)]
    assert errors[0] < 0.02 and errors[1] > 0.2


@from_the_weight
def test_checkpoints_hold_what_was_computed_from_the_weight(kind: str) -> None:
    """Another machine finds singular vectors of other signs: a B that was trained from the one is nothing beside the other."""
    model, attachment = lora(rank=4, initialization=kind, targets="mlp.down")
    found = Course(model, 1).kept()
    for slot in attachment.slots.values():
        assert {id(slot.B0), id(slot.A0)} <= {id(t) for t in found.values()}
    assert not Course(lora()[0], 1).kept()


@from_the_weight
def test_a_start_from_the_weight_compiles(kind: str) -> None:
    torch._dynamo.reset()
    model, _ = lora(rank=4, initialization=kind, targets="attention,mlp.down")
    fill(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@from_the_weight
def test_training_from_the_weight_is_what_peft_does(kind: str, optimizer: str, tmp_path: Path) -> None:
    """Step for step, and as PEFT's own conversion of such an adapter to a plain LoRA."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=kind)
    tiny("llama").save_pretrained(tmp_path / "base")
    ours = attach(load(tmp_path / "base"), "lora", rank=4, alpha=6.0, initialization=kind, targets="attention.q,attention.v,mlp.down")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = peft.get_peft_model(load(tmp_path / "base"), config)
        theirs.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it, so that the start is not drawn again
        theirs.save_pretrained(tmp_path / "start")
        for model in (ours, theirs):
            options = {"lr": 1e-2} | ({"weight_decay": 0.1, "eps": 1e-4} if optimizer == "AdamW" else {"momentum": 0.9})
            steps: Any = getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], **options)
            for seed in range(3):
                steps.zero_grad()
                x = tokens(seed=seed)
                model(input_ids=x, labels=x).loss.backward()
                steps.step()
        theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    bare = load(tmp_path / "base")
    moved = (ours(tokens()).logits - bare(tokens()).logits).abs().max()
    assert moved > 0.05
    torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits, rtol=1e-4, atol=1e-4)
    plain = import_adapter(tmp_path / "converted", {t.name: t for t in parameters(bare)}, ModelDirectory(tmp_path / "base"))
    assert save(ours, tmp_path / "ours", base=tmp_path / "base")["peft"] is None
    mine = store.load(tmp_path / "ours")
    assert mine.updates.keys() == plain.updates.keys()
    for name, update in mine.updates.items():
        weight = bare.get_parameter(name)
        assert update.form == "low_rank" and update.tensors()["B"].shape[1] == 8, "of twice the rank"
        torch.testing.assert_close(update.materialize(weight), plain.updates[name].materialize(weight), rtol=1e-4, atol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(bare, tmp_path / "ours")
    torch.testing.assert_close(read(input_ids=tokens()).logits, ours(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_from_the_gradient_the_first_step_is_the_best_of_rank_two_r() -> None:
    """LoRA-GA, theorem 3.1: the first step of SGD moves W by a multiple of the best rank-2r approximation's subspaces of its gradient."""
    model = tiny("llama")
    x = tokens()
    model(x, labels=x).loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    attach(model, "lora", rank=3, initialization="gradient", targets="attention.q,mlp.up", statistics=lambda name, which: gradients[name])
    slots = attachments(model)["lora"].slots
    bare = tiny("llama")(x).logits
    torch.testing.assert_close(model(x).logits, bare, rtol=1e-5, atol=1e-6)
    for name, slot in slots.items():
        U, _, Vh = torch.linalg.svd(gradients[name])
        size = slot.target.outputs**0.25 / 4
        torch.testing.assert_close(slot.B0.T @ slot.B0, size**2 * torch.eye(3), rtol=1e-4, atol=1e-5)
        assert torch.linalg.svdvals(slot.B0.double().T @ U[:, 3:6]).min() > 0.999 * size
        assert torch.linalg.svdvals(slot.A0.double() @ Vh[:3].T).min() > 0.999 * size
    model(x, labels=x).loss.backward()
    for name, slot in slots.items():
        step = slot.gain * (slot.B.grad @ slot.A0 + slot.B0 @ slot.A.grad)
        U, _, Vh = torch.linalg.svd(gradients[name])
        inside = U[:, :6] @ U[:, :6].T @ step.double() @ Vh[:6].T @ Vh[:6]
        torch.testing.assert_close(inside, step.double(), rtol=1e-2, atol=1e-5)


def test_the_gradient_of_the_data_is_what_calibrate_finds(tmp_path: Path) -> None:
    from espalier import calibrate
    from espalier.attach.load import load
    from espalier.calibrate.store import load as open_calibration

    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    calibrate("seedling", str(text), str(tmp_path / "found"), "gradient", targets="attention.q", tokens=64, quiet=True)
    found = open_calibration(tmp_path / "found")
    model = load("seedling")
    names = [name for name, _ in model.named_parameters() if "q_proj" in name]
    assert sorted(found.names("gradient")) == sorted(names)
    attach(model, "lora", rank=2, initialization="gradient", targets="attention.q", statistics=found.read)
    assert all(float(slot.B0.abs().max()) > 0 for slot in attachments(model)["lora"].slots.values())
