"""Parameters that train whole beside a method's updates: one delta of several forms, and PEFT's ``modules_to_save``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from espalier import apply, attach, convert, detach, load, save, tune
from espalier.attach.attachment import attachments, trainable_parameters
from espalier.attach.load import load_model
from espalier.checkpoint.directory import resolve_model
from espalier.delta import store
from espalier.errors import EspalierError


def base_of(family: str, folder: Path) -> Path:
    tiny(family, tie_word_embeddings=False).save_pretrained(folder / "base")
    return folder / "base"


def moved(model: Any) -> Any:
    """As a training would leave it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=tokens()).logits


@pytest.mark.parametrize(("family", "full"), [("llama", "norm,head"), ("gpt2", ["norm", "norm.bias", "*.h.0.attn.c_attn.weight"])])
@pytest.mark.parametrize("method", ["lora", "dora", "mos"])
def test_one_delta_holds_the_methods_forms_and_whole_parameters(method: str, family: str, full: Any, tmp_path: Path) -> None:
    base = base_of(family, tmp_path)
    model = load_model(base)
    before = logits(model)
    attach(model, method, targets="linear", full=full, **({"rank": 4} if method != "mos" else {}))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5, msg="the start is the base")
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    whole = {name for name, slot in attachments(model)[method].slots.items() if slot.method.name == "full"}
    for name in whole:
        slot = attachments(model)[method].slots[name]
        assert slot.values.grad is not None and float(slot.values.grad.abs().max()) > 0, name
        assert slot.values.numel() == slot.target.size
    expected = logits(moved(model))
    save(model, tmp_path / "delta")
    manifest = json.loads((tmp_path / "delta" / "delta.json").read_text())
    assert {n for n, entry in manifest["parameters"].items() if entry["form"] == "replace"} == whole
    assert manifest["settings"]["full"] == (full.split(",") if isinstance(full, str) else full) and manifest["method"] == method
    assert "h.0.attn.c_attn.weight" not in str(whole) or family == "gpt2", "of what both name, the whole one holds"
    torch.testing.assert_close(logits(load(base, [tmp_path / "delta"])), expected, rtol=1e-5, atol=1e-5)
    apply(str(base), [str(tmp_path / "delta")], str(tmp_path / "applied"), quiet=True)
    torch.testing.assert_close(logits(load_model(tmp_path / "applied")), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(detach(model)), before)


def test_without_whole_parameters_nothing_is_said_of_them(tmp_path: Path) -> None:
    model = attach(load_model(base_of("llama", tmp_path)), "lora", rank=2)
    assert "full" not in attachments(model)["lora"].settings


def test_dropout_is_for_the_methods_own_updates(tmp_path: Path) -> None:
    model = attach(load_model(base_of("llama", tmp_path)), "lora", rank=2, dropout=0.5, full="norm,embedding,head")
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert {slot.dropout for slot in attachments(model)["lora"].slots.values()} == {0.0, 0.5}
    with pytest.raises(EspalierError, match=r"dropout 0.5 cannot act on model\.embed_tokens.weight"):
        attach(tiny("llama"), "lora", targets="linear,embedding", dropout=0.5, full="norm")


def test_what_cannot_train_is_refused() -> None:
    with pytest.raises(EspalierError, match="--full 'nrom' matches no parameter of this model; did you mean 'norm'"):
        attach(tiny("llama"), "lora", full="nrom")
    with pytest.raises(EspalierError, match=r"--full \(lm_head\.weight\) leaves nothing of --targets head to lora; --method full trains them"):
        attach(tiny("llama"), "lora", targets="head", full="head")
    assert attachments(attach(tiny("llama"), "full", targets="head", full="head,norm"))["full"].trainable() == 96 * 32 + 5 * 32


@pytest.mark.parametrize("method", ["adalora", "sora", "lora"])
def test_methods_with_a_course_of_their_own_leave_whole_parameters_alone(method: str, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(base)
    tiny("llama", vocab_size=4096, tie_word_embeddings=False).save_pretrained(base)
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    options = {"steps": 4, "batch_size": 2, "sequence_length": 32, "learning_rate": 0.01, "quiet": True}
    result = tune(str(base), str(tmp_path / "text.txt"), str(tmp_path / "out"), method=method, full="norm,head", eval_data=[str(tmp_path / "text.txt")], **options)
    scores = result["evaluation"][str(tmp_path / "text.txt")]
    assert scores["after"]["loss"] < scores["before"]["loss"]
    found = store.load(tmp_path / "out").updates
    assert found["model.norm.weight"].form == found["lm_head.weight"].form == "replace"


# PEFT


def quietly(function: Any, *arguments: Any, **options: Any) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


@pytest.mark.parametrize(
    ("family", "full"), [("llama", "norm,head"), ("gpt2", "norm,norm.bias,head,transformer.h.1.mlp.c_proj.*"), ("llama", "model.norm.weight")]
)
def test_peft_has_what_trained_whole_as_modules_to_save(family: str, full: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = base_of(family, tmp_path)
    model = moved(attach(load_model(base), "lora", targets="linear", full=full, rank=4))
    assert save(model, tmp_path / "delta")["peft"] is None
    theirs = quietly(peft.PeftModel.from_pretrained, load_model(base), tmp_path / "delta")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(theirs), logits(load_model(base)), atol=0.01)
    for file in ("delta.json", "delta.safetensors"):
        (tmp_path / "delta" / file).unlink()
    convert(str(tmp_path / "delta"), str(tmp_path / "back"), model=str(base), quiet=True)
    assert {u.form for u in store.load(tmp_path / "back").updates.values()} == {"low_rank", "replace"}
    torch.testing.assert_close(logits(load(base, [tmp_path / "back"])), logits(model), rtol=1e-5, atol=1e-5)


def test_a_module_of_which_only_a_part_trained_is_not_pefts(tmp_path: Path) -> None:
    model = moved(attach(load_model(base_of("gpt2", tmp_path)), "lora", targets="linear", full="norm", rank=4))
    reason = save(model, tmp_path / "delta")["peft"]
    assert reason == "of transformer.h.0.ln_1, weight trained whole, and PEFT keeps all or nothing of a module (bias, weight)"
    assert not (tmp_path / "delta" / "adapter_config.json").exists()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_classifier_is_pefts_with_its_head_and_back(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = base_of(family, tmp_path)

    def fresh(seed: int) -> Any:
        torch.manual_seed(seed)
        return quietly(AutoModelForSequenceClassification.from_pretrained, base, num_labels=3, pad_token_id=0)

    model = moved(attach(fresh(0), "lora", targets="linear", full="score.weight" if family == "llama" else "head.classifier,classifier.bias,*pooler*", rank=4))
    assert save(model, tmp_path / "delta")["peft"] is None
    config = json.loads((tmp_path / "delta" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    theirs = quietly(peft.PeftModel.from_pretrained, fresh(1), tmp_path / "delta")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    for file in ("delta.json", "delta.safetensors"):
        (tmp_path / "delta" / file).unlink()
    convert(str(tmp_path / "delta"), str(tmp_path / "back"), model=str(base), quiet=True)
    back = store.load(tmp_path / "back")
    assert back.manifest["classifier"] == {"labels": ["LABEL_0", "LABEL_1", "LABEL_2"], "pad_token": 0}
    torch.testing.assert_close(logits(load(base, [tmp_path / "back"])), logits(model), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "back" / "adapter_config.json").exists()


def test_a_classifiers_adapter_that_peft_wrote_is_imported_with_its_head(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = base_of("llama", tmp_path)
    torch.manual_seed(0)
    theirs = quietly(AutoModelForSequenceClassification.from_pretrained, base, num_labels=5, pad_token_id=0)
    theirs = moved(peft.get_peft_model(theirs, peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["q_proj", "down_proj"])))
    quietly(theirs.save_pretrained, tmp_path / "adapter")
    convert(str(tmp_path / "adapter"), str(tmp_path / "delta"), model=str(base), quiet=True)
    assert len(store.load(tmp_path / "delta").manifest["classifier"]["labels"]) == 5
    torch.testing.assert_close(logits(load(base, [tmp_path / "delta"])), logits(theirs), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    model = moved(attach(load_model(base), "lora", rank=2))
    assert save(model, tmp_path / "delta")["peft"] is None
    path = tmp_path / "delta" / "adapter_config.json"
    path.write_text(path.read_text().replace("CAUSAL_LM", "SEQ_CLS"))
    (tmp_path / "delta" / "delta.json").unlink()
    with pytest.raises(EspalierError, match=r"is of a sequence classifier and does not hold its head 'score\.weight'"):
        convert(str(tmp_path / "delta"), str(tmp_path / "back"), model=str(base), quiet=True)
