"""Our methods beside PEFT's of the same name: the same numbers give the same model and the same gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch import nn

from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import Attachment, attach, attachments
from espalier.attach.load import load, load_model
from espalier.delta import store
from espalier.delta.forms import Hadamard
from espalier.exchange.peft_kinds import export
from espalier.exchange.save import save
from espalier.verbs.convert import convert

peft = pytest.importorskip("peft")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Change = Callable[[torch.Tensor], torch.Tensor]
Names = list[tuple[str, str, Change]]


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def term(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None]


MISS: Names = [("miss_block", "block", torch.t)]
LOKR: Names = [("lokr_w1", "A", term), ("lokr_w1_a", "A", term), ("lokr_w1_b", "A_in", term), ("lokr_w2", "B", term), ("lokr_w2_a", "B", term), ("lokr_w2_b", "B_in", term)]
LOHA: Names = [("hada_w1_a", "B1", same), ("hada_w1_b", "A1", same), ("hada_w2_a", "B2", same), ("hada_w2_b", "A2", same)]
# what: our method and options, PEFT's, their tensors with ours and how ours is laid out
METHODS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], Names]] = {
    "MiSS": ("miss", {"rank": 4}, "Miss", {"r": 4}, MISS),
    "MiSS that does not divide": ("miss", {"rank": 5}, "Miss", {"r": 5}, MISS),
    "MiSS, mini": ("miss", {"rank": 4, "mini_rank": 2}, "Miss", {"r": 4, "init_weights": "mini", "mini_r": 2}, MISS),
    "BAT": ("bat", {"rank": 8}, "Miss", {"r": 8, "init_weights": "bat"}, [("miss_block", "B", same)]),
    "LoKr": ("lokr", {"rank": 2, "alpha": 4.0}, "LoKr", {"r": 2, "alpha": 4}, LOKR),
    "LoKr of whole factors": ("lokr", {"rank": 8, "alpha": 4.0}, "LoKr", {"r": 8, "alpha": 4}, LOKR),
    "LoKr of two products": (
        "lokr", {"rank": 1, "alpha": 4.0, "factor": 4, "decompose_both": True},
        "LoKr", {"r": 1, "alpha": 4, "decompose_factor": 4, "decompose_both": True}, LOKR),
    "LoKr of a wanted size that divides none": ("lokr", {"rank": 2, "alpha": 2.0, "factor": 7}, "LoKr", {"r": 2, "alpha": 2, "decompose_factor": 7}, LOKR),
    "LoHa": ("loha", {"rank": 3, "alpha": 4.0}, "LoHa", {"r": 3, "alpha": 4}, LOHA),
    "LoHa of full rank": ("loha", {"rank": 7, "alpha": 4.0}, "LoHa", {"r": 7, "alpha": 4}, LOHA),
    "IA3": ("ia3", {}, "IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, [("ia3_l", "s", torch.flatten)]),
    "IA3 of keys alone": ("ia3", {"targets": "attention.k"}, "IA3", {"target_modules": ["k_proj"], "feedforward_modules": []}, [("ia3_l", "s", torch.flatten)]),
    "OFT": ("oft", {"block_size": 8}, "OFT", {"r": 0, "oft_block_size": 8, "use_cayley_neumann": False}, [("oft_R.weight", "angles", same)]),
    "SHiRA": ("shira", {"rank": 3}, "Shira", {"r": 3}, [("shira_weight", "values", same)]),
}  # fmt: skip
every_method = pytest.mark.parametrize("what", METHODS)


def theirs_of(base: nn.Module, kind: str, **options: Any) -> Any:
    """A PEFT model whose adapter was moved from its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, getattr(peft, f"{kind}Config")(**{"target_modules": LINEAR, **options}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tensors_of(theirs: Any, module: str, names: Names) -> dict[str, tuple[torch.Tensor, Change]]:
    """By our names, PEFT's tensors at a module, those that there are."""
    owner, found = theirs.base_model.model.get_submodule(module), {}
    for name, ours, change in names:
        local, *rest = name.split(".")
        if "default" in getattr(owner, local):
            tensor = getattr(owner, local)["default"]
            found[ours] = (tensor.get_parameter(*rest) if rest else tensor, change)
    return found


def support_of(theirs: Any, module: str, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat positions of PEFT's SHiRA in order, and their order."""
    rows, columns = theirs.base_model.model.get_submodule(module).shira_indices["default"].long()
    return (rows * inputs + columns).sort()


def pair(what: str, base: nn.Module) -> tuple[nn.Module, Attachment, Any]:
    """Our model and PEFT's with the same numbers."""
    method, options, kind, their_options, names = METHODS[what]
    theirs = theirs_of(copy.deepcopy(base), kind, **their_options)
    ours = attach(base, method, name="d", **options)
    attachment = attachments(ours)["d"]
    for name, slot in attachment.slots.items():
        module = name.removesuffix(".weight")
        found = tensors_of(theirs, module, names)
        assert {name for name, _ in slot.named_parameters()} == set(found)
        with torch.no_grad():
            for key, (tensor, change) in found.items():
                number = change(tensor)
                if method == "shira":
                    slot.index, order = support_of(theirs, module, slot.target.inputs)
                    number = number[order]
                slot.get_parameter(key).copy_(number - 1 if method == "ia3" else number)
    return ours, attachment, theirs


@every_method
def test_the_same_numbers_give_the_outputs_and_the_gradients_of_peft(what: str) -> None:
    base = tiny("llama")
    plain = base(tokens()).logits.detach()
    ours, attachment, theirs = pair(what, base)
    outputs = [model(tokens()).logits for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert (outputs[0] - plain).abs().max() > 0.1
    assert attachment.trainable() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    for y in outputs:
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).mean().backward()
    for name, slot in attachment.slots.items():
        module = name.removesuffix(".weight")
        for key, (tensor, change) in tensors_of(theirs, module, METHODS[what][-1]).items():
            gradient = change(tensor.grad)
            if what == "SHiRA":
                gradient = gradient[support_of(theirs, module, slot.target.inputs)[1]]
            torch.testing.assert_close(slot.get_parameter(key).grad, gradient, rtol=1e-3, atol=1e-6)


@every_method
def test_what_peft_writes_is_imported_as_the_form_that_ours_makes(what: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    ours, _, theirs = pair(what, load_model(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "adapter")
    convert(str(tmp_path / "adapter"), str(tmp_path / "delta"), model=str(tmp_path / "base"), quiet=True)
    imported = load(tmp_path / "base", [tmp_path / "delta"])
    with torch.no_grad():
        torch.testing.assert_close(imported(tokens()).logits, ours(tokens()).logits, rtol=1e-5, atol=2e-5)
    save(ours, tmp_path / "ours", base=tmp_path / "base")
    made, read = (store.load(tmp_path / folder).updates for folder in ("ours", "delta"))
    assert {name: update.form for name, update in made.items()} == {name: update.form for name, update in read.items()}


@every_method
def test_peft_loads_what_ours_writes(what: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    ours, _, _ = pair(what, load_model(tmp_path / "base"))
    assert save(ours, tmp_path / "delta", base=tmp_path / "base")["peft"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "delta").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "method", "targets", "options", "why"),
    [
        ("gpt2", "lokr", "attention", {}, "transformer.h.0.attn.c_attn.weight is no plain matrix of a Linear of its own"),
        ("llama", "loha", "embedding", {}, "model.embed_tokens.weight is no plain matrix of a Linear of its own"),
        ("qwen3_moe", "miss", "experts", {}, "is no plain matrix"),
        ("qwen2", "ia3", "attention.k", {}, "PEFT would scale the bias of model.layers.0.self_attn.k_proj too"),
        ("llama", "miss", "linear", {"rank": 40}, "mlp.down_proj is MISS of {'r': 40, 'init_weights': True, 'mini_r': 1}, others are MISS of {'r': 32,"),
        ("llama", "oft", "linear", {"block_size": 32}, "mlp.down_proj is OFT of {'r': 0, 'oft_block_size': 24,"),
        ("llama", "shira", "attention", {"rank": 12}, "has 512 entries, no multiple of 16 + 32"),
        ("bert", "bitfit", "bias", {}, "is no plain matrix"),
    ],
)  # fmt: skip
def test_what_peft_has_no_place_for_is_not_written_and_the_reason_is_said(
    family: str, method: str, targets: str, options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    tiny(family).save_pretrained(tmp_path / "base")
    model = attach(tiny(family), method, targets=targets, **options)
    assert why in save(model, tmp_path / "delta", base=tmp_path / "base")["peft"]
    assert not (tmp_path / "delta" / "adapter_config.json").exists()


def test_ranks_and_alphas_of_loha_differ_by_module(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    ours, _, _ = pair("LoHa", load_model(tmp_path / "base"))
    save(ours, tmp_path / "delta", base=tmp_path / "base")
    delta = store.load(tmp_path / "delta")
    name = "model.layers.1.mlp.up_proj.weight"
    factors = {key: t[:, :2] if key[0] == "B" else t[:2] for key, t in delta.updates[name].tensors().items()}
    delta.updates[name] = Hadamard(**factors, gain=0.25)
    targets = {t.name: t for t in parameters(load_model(tmp_path / "base"))}
    store.save(tmp_path / "other", delta, "")
    assert export(tmp_path / "other", delta, targets, str(tmp_path / "base"), load_model(tmp_path / "base")) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "other").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, load(tmp_path / "base", [tmp_path / "other"])(tokens()).logits, rtol=1e-5, atol=1e-5)
