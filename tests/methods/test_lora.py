"""LoRA (arXiv:2106.09685) and its rank-stabilized scaling (arXiv:2312.03732)."""

from __future__ import annotations

import math

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream


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
        ({"ranks": 3}, "ranks is no option of lora; did you mean 'rank'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        lora(**options)


def test_dropout_is_refused_wherever_it_cannot_act_not_only_on_the_first_parameter() -> None:
    with pytest.raises(EspalierError, match=r"dropout 0\.1 cannot act on .*mlp\.gate\.weight"):
        attach(tiny("qwen3_moe"), "lora", targets="attention,router", dropout=0.1)
