"""BinaryAdapter (ICCV 2023) in its first form: a bottleneck beside the feed-forward, trained through its codes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import HIDDEN, tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.load import load
from espalier.checkpoint.safetensors_file import SafetensorsFile
from espalier.delta import store
from espalier.errors import EspalierError
from espalier.exchange.save import save


def attached(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(copy.deepcopy(tiny(family)), "binary-adapter", name="d", **options)
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the matrices of every site are in a forward pass."""
    (attachment,) = attachments(model).values()
    found = {}
    for site, slot in attachment.branches.items():
        found |= {f"{site} {name}": tensor.detach() for name, tensor in slot.method.tensors(slot).items()}
    return found


every_width = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])


@every_width
def test_what_was_trained_is_bit_for_bit_what_is_read_back_and_written_again(bits: int, tmp_path: Path) -> None:
    """"w_hat is bit-equal after reload", and so is the whole model's output, in bf16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        tiny("llama").to(dtype).save_pretrained(tmp_path / "base")
        model = attach(load(tmp_path / "base"), "binary-adapter", bits=bits, width=5)
        shake(model)
        save(model, tmp_path / "delta", base=tmp_path / "base")
        loaded = load(tmp_path / "base", [tmp_path / "delta"])
        here, there = matrices(model), matrices(loaded)
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
        assert all(1 < len(tensor.unique()) <= 2**bits for tensor in here.values())
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)
        save(loaded, tmp_path / "again", base=tmp_path / "base")
        assert (tmp_path / "again" / store.TENSORS).read_bytes() == (tmp_path / "delta" / store.TENSORS).read_bytes()


@every_width
def test_a_matrix_takes_its_bits_and_two_numbers(bits: int, tmp_path: Path) -> None:
    """"File: per tensor ceil(numel*b/8) packed bytes + two float32 (mu, sd)"; the trap is a last byte that is not full."""
    model, attachment = attached(bits=bits, width=3)
    tiny("llama").save_pretrained(tmp_path / "base")
    save(model, tmp_path / "delta", base=tmp_path / "base")
    size = sum(info.nbytes for info in SafetensorsFile(tmp_path / "delta" / store.TENSORS).tensors.values())
    assert size == len(attachment.branches) * 2 * (math.ceil(3 * HIDDEN * bits / 8) + 8)


def test_it_is_the_parallel_bottleneck_of_the_matrices_that_it_stands_for() -> None:
    """"x + MLP(LN x) + s * Up(Drop(ReLU(Down(x))))": the scaled parallel adapter of the same matrices, without biases."""
    model, attachment = attached("gpt2", width=6, scale=2.5)
    shake(model)
    plain = attach(copy.deepcopy(tiny("gpt2")), "scaled-parallel-adapter", name="d", width=6, scale=2.5)
    for site, slot in attachment.branches.items():
        own = attachments(plain)["d"].branches[site]
        for name, tensor in slot.method.tensors(slot).items():
            getattr(own, name).data.copy_(tensor)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, rtol=1e-5, atol=1e-6)


def test_the_start_is_near_the_base_and_not_at_it() -> None:
    """The trap: "delta not zero at init ... (bound: |Delta y| <= s*...*1e-3)"; W_u is a normal of 0.001 cut at 0.002."""
    _, attachment = attached()
    up = torch.cat([slot.up.detach().flatten() for slot in attachment.branches.values()])
    assert float(up.abs().max()) <= 2e-3 and 0.8e-3 < float(up.std()) < 0.95e-3
    slot = attachment.branches["blocks.0.mlp"]
    part, x = slot.method.tensors(slot), torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0))
    hidden = torch.relu(x @ part["down"].T)
    change = (hidden @ part["up"].T).abs()
    assert bool((change > 0).any()) and bool((change <= 1e-3 * hidden.sum(-1, keepdim=True) + 1e-9).all())


def test_gradients_go_straight_through_the_codes_and_one_bit_learns() -> None:
    model, _ = attached(width=16)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=3e-2)
    x, losses = tokens(), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_without_gradients_the_codes_are_made_once_and_again_when_a_number_moves() -> None:
    model, attachment = attached()
    shake(model)
    (slot, *_) = attachment.branches.values()
    x = tokens()
    with torch.no_grad():
        before, first = model(x).logits, slot.meant()
        assert slot.meant() is first
        slot.up.mul_(-30)
        assert slot.meant() is not first and not torch.allclose(model(x).logits, before, atol=1e-3)
    assert slot.meant()["up"].requires_grad and slot._meant is None


def test_dropout_is_between_the_matrices_and_in_training_only() -> None:
    model, _ = attached(inner_dropout=0.5, width=64)
    shake(model)
    x = tokens()
    with torch.no_grad():
        assert torch.equal(model(x).logits, model(x).logits)
        model.train()
        assert not torch.equal(model(x).logits, model(x).logits)


def test_scalearn_takes_stored_ones_as_its_sources(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    for number in (0, 1):
        model, _ = attached(width=4, seed=number)
        shake(model)
        save(model, tmp_path / str(number), base=tmp_path / "base")
    mixed = attach(load(tmp_path / "base"), "scalearn", sources=f"{tmp_path / '0'},{tmp_path / '1'}", name="d")
    with torch.no_grad():
        for slot in attachments(mixed)["d"].branches.values():
            slot.omega.copy_(torch.tensor([[1.0], [0.0]]).expand_as(slot.omega))
        alone = load(tmp_path / "base", [tmp_path / "0"])
        torch.testing.assert_close(mixed(tokens()).logits, alone(tokens()).logits, rtol=1e-5, atol=1e-6)


def test_codes_of_another_kind_and_options_out_of_range_are_refused(tmp_path: Path) -> None:
    model, _ = attached(width=4)
    tiny("llama").save_pretrained(tmp_path / "base")
    save(model, tmp_path / "delta", base=tmp_path / "base")
    delta = store.load(tmp_path / "delta", branches=True)
    delta.branches["blocks.0.mlp"]["down_codes"] = delta.branches["blocks.0.mlp"]["down_codes"].float()  # type: ignore[index]
    store.save(tmp_path / "delta", delta, "")
    with pytest.raises(EspalierError, match=r"holds tensors .*'down_codes': \(16,\)"):
        load(tmp_path / "base", [tmp_path / "delta"])
    with pytest.raises(EspalierError, match="bits is 5; it must be one of: 1, 2, 3, 4, 8"):
        attached(bits=5)
