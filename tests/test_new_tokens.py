"""New tokens: rows of the vocabulary that train beside a method, the tokenizer that a delta brings, the larger model that it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from espalier import apply, attach, compress, eval, generate, load, save, tune
from espalier.attach.attachment import attachments, trainable_parameters
from espalier.attach.load import load_model, load_tokenizer
from espalier.attach.new_tokens import grow
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.checkpoint.relaid import Relaid, Source
from espalier.delta import store
from espalier.errors import EspalierError

NEW = ("<|tool|>", "flibber", "日本")
TEXT = "".join(f"<|tool|>flibber {i} 日本 def f{i}():\n    return flibber\n" for i in range(40))


def base_of(family: str, folder: Path, **overrides: Any) -> Path:
    tiny(family, vocab_size=4096, **overrides).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder / "base")
    (folder / "text.txt").write_text(TEXT)
    return folder / "base"


def run(base: Path, folder: Path, out: str = "out", **options: Any) -> dict[str, Any]:
    settings = {"steps": 6, "batch_size": 2, "sequence_length": 32, "learning_rate": 0.02, "rank": 4, "add_tokens": ",".join(NEW), "quiet": True}
    settings = {**settings, **options}
    if settings.get("method", "lora") != "lora":
        del settings["rank"]
    return tune(str(base), str(folder / "text.txt"), str(folder / out), eval_data=[str(folder / "text.txt")], **settings)


def loss(model: Path, folder: Path, *deltas: Path) -> float:
    return eval(str(model), str(folder / "text.txt"), delta=[str(d) for d in deltas], sequence_length=32, quiet=True)["loss"]


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_a_delta_with_new_tokens_is_one_everywhere(family: str, tied: bool, tmp_path: Path) -> None:
    base = base_of(family, tmp_path, tie_word_embeddings=tied)
    result = run(base, tmp_path)
    scores = result["evaluation"][str(tmp_path / "text.txt")]
    assert scores["after"]["loss"] < scores["before"]["loss"]
    delta = store.load(tmp_path / "out")
    rows = {name: u for name, u in delta.updates.items() if u.form == "rows"}
    assert len(rows) == (1 if tied else 2) and all(u.tensors()["values"].shape == (3, 32) and u.shape == (4099, 32) for u in rows.values())
    assert delta.manifest["vocabulary"] == 4099 and delta.manifest["added_tokens"] == list(NEW)
    assert (tmp_path / "out" / "delta.safetensors").stat().st_size < 200_000, "no matrix of the vocabulary is in it"
    assert loss(base, tmp_path, tmp_path / "out") == pytest.approx(scores["after"]["loss"], rel=1e-6)
    tokenizer = load_tokenizer(base, [tmp_path / "out"])
    assert tokenizer.convert_tokens_to_ids(list(NEW)) == [4096, 4097, 4098] and len(tokenizer("flibber", add_special_tokens=False).input_ids) == 1
    (tmp_path / "note.txt").write_text("flibber and 日本 <|tool|>")
    apply(str(base), [str(tmp_path / "out")], str(tmp_path / "applied"), verify=str(tmp_path / "note.txt"), quiet=True)
    assert loss(tmp_path / "applied", tmp_path) == pytest.approx(scores["after"]["loss"], rel=1e-4)
    theirs, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "applied", output_loading_info=True)
    assert theirs.config.vocab_size == 4099 == theirs.get_input_embeddings().weight.shape[0] and not facts["missing_keys"] and not facts["unexpected_keys"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "applied")) == 4099
    ids = tokenizer(TEXT[:90], return_tensors="pt").input_ids
    torch.testing.assert_close(load(base, [tmp_path / "out"])(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    old, new = (load_file(p / "model.safetensors") for p in (base, tmp_path / "applied"))
    name = next(n for n in new if new[n].shape == (4099, 32))
    assert torch.equal(old[name], new[name][:4096]), "what was there stays, bit for bit"
    assert isinstance(generate(str(base), prompt="flibber", delta=[str(tmp_path / "out")], max_tokens=2, quiet=True)["completion"], str)


def test_new_rows_begin_as_the_mean_of_the_others_and_only_they_train(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    model = load_model(base)
    before = model.get_input_embeddings().weight.detach().clone()
    grow(model, 4098)
    attach(model, "lora", rank=2, new_tokens=[4096, 4097])
    embedding = model.get_input_embeddings()
    ids = torch.tensor([[5, 4096, 4097]])
    rows = embedding(ids)[0]
    assert torch.equal(rows[0], before[5])
    torch.testing.assert_close(rows[1], before.mean(0))
    torch.testing.assert_close(rows[2], before.mean(0))
    model(input_ids=ids, labels=ids).loss.backward()
    whole = load_model(base)
    grow(whole, 4098)
    attach(whole, "lora", rank=2, full="embedding", new_tokens=[4096, 4097])
    torch.testing.assert_close(whole.get_input_embeddings()(ids), embedding(ids), msg="as a whole, it begins there too")
    trained = {name: p for name, p in trainable_parameters(model).items() if "values" in name}
    assert sorted(tuple(p.shape) for p in trained.values()) == [(2, 32), (2, 32)] and all(float(p.grad.abs().max()) > 0 for p in trained.values())
    with pytest.raises(EspalierError, match=r"pass the tokenizer that has them: save\(..., tokenizer=tokenizer\)"):
        save(model, tmp_path / "never")
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["one", "two"])
    expected = model.eval()(input_ids=ids).logits
    save(model, tmp_path / "delta", tokenizer=tokenizer)
    torch.testing.assert_close(load(base, [tmp_path / "delta"])(input_ids=ids).logits, expected)
    assert attachments(model)["lora"].settings["new_tokens"] == [4096, 4097]


def test_tokens_that_fit_into_rows_without_a_token_need_no_new_ones(tmp_path: Path) -> None:
    base_of("llama", tmp_path)
    tiny("llama", vocab_size=4160).save_pretrained(tmp_path / "base")
    scores = run(tmp_path / "base", tmp_path)["evaluation"][str(tmp_path / "text.txt")]["after"]
    assert store.load(tmp_path / "out").manifest["vocabulary"] == 4160
    apply(str(tmp_path / "base"), [str(tmp_path / "out")], str(tmp_path / "applied"), quiet=True)
    assert loss(tmp_path / "applied", tmp_path) == pytest.approx(scores["loss"], rel=1e-4)


@pytest.mark.parametrize("options", [{"method": "full", "learning_rate": 1e-3}, {"full": "embedding,head"}, {"full": "norm"}])
def test_new_tokens_go_with_parameters_that_train_whole(options: dict[str, Any], tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    scores = run(base, tmp_path, **options)["evaluation"][str(tmp_path / "text.txt")]["after"]
    assert loss(base, tmp_path, tmp_path / "out") == pytest.approx(scores["loss"], rel=1e-6)
    apply(str(base), [str(tmp_path / "out")], str(tmp_path / "applied"), quiet=True)
    assert loss(tmp_path / "applied", tmp_path) == pytest.approx(scores["loss"], rel=1e-4)


def test_a_classifier_may_have_new_tokens_and_a_head(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps({"text": f"{word} {i}", "label": word}) + "\n" for i in range(20) for word in ("flibber", "plain")))
    result = tune(
        str(base), str(data), str(tmp_path / "out"), steps=12, batch_size=8, sequence_length=16, learning_rate=0.02, rank=2,
        add_tokens="flibber", eval_data=[str(data)], quiet=True,
    )  # fmt: skip
    scores = result["evaluation"][str(data)]["after"]
    assert scores["accuracy"] == 1.0
    measured = eval(str(base), str(data), delta=[str(tmp_path / "out")], sequence_length=16, quiet=True)
    assert measured["loss"] == scores["loss"]
    apply(str(base), [str(tmp_path / "out")], str(tmp_path / "applied"), quiet=True)
    assert eval(str(tmp_path / "applied"), str(data), sequence_length=16, quiet=True)["loss"] == pytest.approx(scores["loss"], rel=1e-4)


def test_an_interrupted_run_goes_on_and_tokens_may_come_from_a_file(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    (tmp_path / "tokens.txt").write_text("\n".join(NEW) + "\n")
    run(base, tmp_path, "whole")
    run(base, tmp_path, "parts", add_tokens=str(tmp_path / "tokens.txt"))
    for name in ("delta.safetensors", "files/tokenizer.json", "files/config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    (tmp_path / "tokens.txt").write_text("zzqq\n")
    (tmp_path / "parts" / "run" / "result.json").unlink()
    with pytest.raises(EspalierError, match=r"--resume: the (data|tokenizer) changed since the run"):
        run(base, tmp_path, "parts", add_tokens=str(tmp_path / "tokens.txt"), resume=True)


def test_a_delta_with_new_tokens_is_compressed_with_them(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    after = run(base, tmp_path)["evaluation"][str(tmp_path / "text.txt")]["after"]["loss"]
    compress(str(tmp_path / "out"), str(tmp_path / "small"), method="quantize", bits=8, quiet=True)
    assert loss(base, tmp_path, tmp_path / "small") == pytest.approx(after, rel=0.05)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("def,new", "--add-tokens def,new names 'def', which the tokenizer has already; give new tokens"),
        ("aa1,aa1", "--add-tokens aa1,aa1 names 'aa1' twice"),
        (" , ", "names no token"),
    ],
)
def test_tokens_that_are_none_are_refused(given: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=words):
        run(base_of("llama", tmp_path), tmp_path, add_tokens=given)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    with pytest.raises(EspalierError, match=r"new tokens train rows of model.embed_tokens.weight, which --targets names too"):
        run(base, tmp_path, targets="linear,embedding")
    with pytest.raises(EspalierError, match=r"the token 4096 has no row in model.embed_tokens.weight, which has 4096"):
        attach(load_model(base), "lora", new_tokens=[4096])
    with pytest.raises(EspalierError, match="the head of BertLMHeadModel has a bias"):
        run(base_of("bert", tmp_path / "b") if (tmp_path / "b").mkdir() is None else base, tmp_path)
    run(base, tmp_path, "one", steps=1)
    run(base, tmp_path, "two", steps=1, add_tokens="zzqq")
    with pytest.raises(EspalierError, match=r"one and .*two add different tokens"):
        loss(base, tmp_path, tmp_path / "one", tmp_path / "two")
    path = tmp_path / "one" / "delta.json"
    content = json.loads(path.read_text()) | {"added_tokens": ["x"]}
    path.write_text(json.dumps(content | {"sha256": store._digest(content)}))
    for use in (lambda: loss(base, tmp_path, tmp_path / "one"), lambda: apply(str(base), [str(tmp_path / "one")], str(tmp_path / "a"), quiet=True)):
        with pytest.raises(EspalierError, match=r"adds 1"):
            use()


def test_no_manifest_may_ask_for_zeros() -> None:
    with pytest.raises(EspalierError, match="runs of"):
        Source.from_json({"shape": [4], "runs": [["", 0, 4]]})


def test_a_grown_tensor_is_the_stored_one_with_zeros_behind_it(tmp_path: Path) -> None:
    directory = ModelDirectory(base_of("llama", tmp_path))
    name = "model.norm.weight"
    seen = Relaid(directory, {"more": Source((35,), ((name, 0, 32), ("", 0, 3)))})
    assert torch.equal(seen.read("more"), torch.cat([directory.read(name), torch.zeros(3)]))
    part = bytearray(16)
    seen.read_into(memoryview(part), "more", 30 * 4)
    assert bytes(part) == bytes(directory.read(name)[30:].numpy().tobytes()) + bytes(8)
