"""PEFT's prefixes and prompts become branches, and ours become PEFT's: outputs are compared, and those of generation."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import attach, trainable_parameters
from espalier.attach.load import load
from espalier.checkpoint.safetensors_file import write_safetensors
from espalier.errors import EspalierError
from espalier.exchange.save import save
from espalier.verbs.convert import convert

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = {
    "prefix": ("PrefixTuningConfig", {}),
    "prefix with projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 6}),
    "prompt": ("PromptTuningConfig", {}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 6}),
    "p-tuning with an LSTM": ("PromptEncoderConfig", {"encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"}),
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def written(family: str, kind: str, folder: Path) -> Any:
    """A base and a PEFT adapter on disk; returns the PEFT model."""
    base = copy.deepcopy(tiny(family))
    base.save_pretrained(folder / "base")
    name, options = KINDS[kind]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=4, **options))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.3)
    theirs.eval().save_pretrained(folder / "peft")
    return theirs


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_what_peft_wrote_does_here_what_it_does_there(kind: str, family: str, tmp_path: Path) -> None:
    theirs = written(family, kind, tmp_path)
    made = convert(str(tmp_path / "peft"), str(tmp_path / "delta"), model=str(tmp_path / "base"), quiet=True)
    assert made["method"] == ("prefix" if "prefix" in kind else "prompt")
    ours = load(tmp_path / "base", [tmp_path / "delta"])
    x = tokens()
    with torch.no_grad():
        there = theirs(x, position_ids=torch.arange(x.shape[1])[None]) if "prefix" in kind else theirs(x)
        torch.testing.assert_close(ours(x).logits, there.logits[:, -x.shape[1] :], **CLOSE)
        options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(ours.generate(x, **options), theirs.generate(input_ids=x, **options))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_what_we_write_does_in_peft_what_it_does_here(method: str, family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = copy.deepcopy(tiny(family))
    model.save_pretrained(tmp_path / "base")
    options = {"length": 4, "shift": True} if method == "prefix" else {"prompt_length": 4}
    attach(model, method, **options)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    assert save(model, tmp_path / "delta", base=tmp_path / "base")["peft"] is None
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "delta").eval()
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, theirs(x).logits[:, -x.shape[1] :], **CLOSE)


def test_what_peft_cannot_hold_says_why(tmp_path: Path) -> None:
    for method, options, why in (("prefix", {}, "without shift"), ("prefix", {"shift": True, "targets": "blocks.0.heads"}, "only some"), ("houlsby", {}, "houlsby")):
        model = copy.deepcopy(tiny("llama"))
        model.save_pretrained(tmp_path / "base")
        attach(model, method, **options)
        assert why in save(model, tmp_path / "delta", base=tmp_path / "base")["peft"]
        assert not (tmp_path / "delta" / "adapter_config.json").exists()


@pytest.mark.parametrize("tensor", [torch.zeros(4, 7), torch.zeros(4, 64, dtype=torch.int64), torch.full((4, 64), float("nan"))], ids=["size", "type", "NaN"])
def test_a_prompt_that_does_not_fit_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    written("llama", "prefix", tmp_path)
    write_safetensors(tmp_path / "peft" / "adapter_model.safetensors", {"prompt_embeddings": tensor})
    with pytest.raises(EspalierError, match="prompt_embeddings is"):
        convert(str(tmp_path / "peft"), str(tmp_path / "delta"), model=str(tmp_path / "base"), quiet=True)
    assert not (tmp_path / "delta").exists()
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config["num_virtual_tokens"] = "4"
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(EspalierError, match="prompt_embeddings is"):
        convert(str(tmp_path / "peft"), str(tmp_path / "delta"), model=str(tmp_path / "base"), quiet=True)
