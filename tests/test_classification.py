"""Labels: data, heads, batches, the loss, what is measured, and that a delta of a classifier is one everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import tiny
from safetensors.torch import load_file, save_file
from test_cli import error_of, espalier
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from espalier import apply, attach, compress, eval, generate, load, pretrain, save, tune
from espalier.anatomy.classification import with_labels
from espalier.attach.attachment import trainable_parameters
from espalier.bundled import corpus
from espalier.checkpoint.directory import resolve_model
from espalier.data.batches import Cursor
from espalier.data.encode import Encoder
from espalier.data.labelled import Labelled
from espalier.data.sources import open_source
from espalier.data.store import TokenStore, open_store
from espalier.errors import EspalierError
from espalier.evaluate.classification import f1_by_class, score_classes
from espalier.memory.training_form import training_form
from espalier.train import steps
from espalier.train.steps import Losses, accumulate, targets_of

FAMILIES = ("llama", "bert")
ANIMALS = ("cat", "dog", "bird")
HEADS = {"llama": {"score.weight"}, "bert": {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def animals(count: int = 40) -> list[dict[str, Any]]:
    """Texts of many lengths that name their label."""
    return [{"text": f"a {name} of {i}" + " and more" * (i % 7), "label": name} for i in range(count) for name in ANIMALS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("labelled") / "animals.jsonl", animals())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny language models by family, with seedling's tokenizer."""
    folder = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        if not (folder / family).exists():
            tiny(family, vocab_size=4096).save_pretrained(folder / family)
            AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder / family)
        return folder / family

    return base


def run(model: Path, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings = {"steps": 4, "batch_size": 8, "sequence_length": 32, "learning_rate": 0.01, "quiet": True}
    return tune(str(model), str(data), str(out), **{**settings, **options})


@pytest.fixture(scope="module")
def learnt(bases: Callable[[str], Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A delta by family that has learnt the animals, and what tune said."""
    folder, results = tmp_path_factory.mktemp("learnt"), {}

    def delta(family: str) -> tuple[Path, dict[str, Any]]:
        if family not in results:
            results[family] = run(bases(family), data, folder / family, steps=60, batch_size=16, eval_data=[str(data)])
        return folder / family, results[family]

    return delta


def measured(model: Path, data: Path, *deltas: Path, **options: Any) -> dict[str, Any]:
    result = eval(str(model), str(data), delta=[str(d) for d in deltas], sequence_length=32, quiet=True, **options)
    return {key: value for key, value in result.items() if key != "peak_memory"}


def alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert {**one, "loss": pytest.approx(one["loss"], rel=1e-5)} == other


def classifier(family: str, labels: int = 3) -> tuple[Any, Encoder]:
    """A live classifier with transformers' own head, without dropout, and the encoder of its texts."""
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    config = tiny(family, vocab_size=4096, **silent).config
    config.num_labels, config.pad_token_id = labels, 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    return model.train(), Encoder(AutoTokenizer.from_pretrained(resolve_model("seedling")))


def texts_of(data: Path, encoder: Encoder, length: int = 32) -> Labelled:
    return Labelled(open_store(open_source(data), encoder), encoder, ["bird", "cat", "dog"], length)


# the loss


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_padded_batches_is_transformers_own_and_the_mean_over_texts(family: str, data: Path) -> None:
    model, encoder = classifier(family)
    texts = texts_of(data, encoder)
    alone = []
    for number in range(16):
        ids = torch.from_numpy(texts.tokens(number))[None]
        alone.append(model(input_ids=ids, labels=torch.tensor([texts.classes[number]])).loss)
    torch.stack(alone).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    whole = texts.batch(range(16), 1)
    assert whole.attention_mask is not None and not bool(whole.attention_mask.all()), "some rows are padded"
    theirs = model(input_ids=whole.input_ids, attention_mask=whole.attention_mask, labels=whole.targets).loss
    for micro_tokens in (1, 90, 1000):
        model.zero_grad()
        batches = [texts.batch(numbers, 1) for numbers in texts.divide(range(16), micro_tokens)]
        assert len(batches) == 16 if micro_tokens == 1 else len(batches) < 16
        with training_form(model, chunk=7, recompute=False, padded=True):
            loss, count = accumulate(Losses(model), batches), targets_of(batches)
        assert count == 16 and loss == pytest.approx(float(theirs.detach()), rel=1e-5) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    assert type(model).__name__ == type(classifier(family)[0]).__name__ and hasattr(model(whole.input_ids), "logits")


def test_recomputation_changes_no_gradient(data: Path) -> None:
    found = []
    for recompute in (False, True):
        model, encoder = classifier("llama")
        with training_form(model, chunk=7, recompute=recompute, padded=True):
            accumulate(Losses(model), [texts_of(data, encoder).batch(range(6), 1)])
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_an_epoch_visits_every_text_once_in_another_order(data: Path) -> None:
    _, encoder = classifier("llama")
    texts, cursor = texts_of(data, encoder), Cursor()
    assert texts.steps_of_epoch(8 * 32) == 15
    epochs = []
    for _ in range(2):
        rows = [row for _ in range(15) for batch in texts.batches(cursor, 8 * 32, 100, True, 1) for row in batch.input_ids.tolist()]
        epochs.append([tuple(token for token in row if token != 1) for row in rows])
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(tuple(texts.tokens(n).tolist()) for n in range(120)) and epochs[0] != epochs[1]


def test_a_text_that_is_too_long_keeps_the_tokens_that_end_it(tmp_path: Path) -> None:
    """As the tokenizer itself truncates: BERT's [SEP] stays."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("seedling"))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    ends = [("<|begin|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    from tokenizers import Tokenizer, processors

    made = Tokenizer.from_str(json.dumps(backend))
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A <|end|>", special_tokens=ends)
    framed = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>")
    path = write(tmp_path / "long.jsonl", [{"text": "one two three " * 9, "label": "a"}, {"text": "b", "label": "b"}])
    encoder = Encoder(framed)
    texts = Labelled(open_store(open_source(path), encoder), encoder, ["a", "b"], 8)
    assert texts.truncated == 1
    for number, record in enumerate(path.read_text().splitlines()):
        assert texts.tokens(number).tolist() == framed(json.loads(record)["text"], truncation=True, max_length=8).input_ids
    with pytest.raises(EspalierError, match="sequence_length is 1; it must be more than the 1 tokens that end every text"):
        Labelled(texts.store, encoder, ["a", "b"], 1)


# what is measured


def test_accuracy_and_macro_f1_are_those_computed_by_hand() -> None:
    truth, said = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 0])
    # class 0: tp 2, fp 1, fn 1; class 1: tp 1, fp 1, fn 1; class 2: tp 0, fn 1; class 3: tp 0, fp 1; class 4 does not occur
    assert f1_by_class(truth, said, 5) == {0: pytest.approx(4 / 6), 1: pytest.approx(2 / 4), 2: 0.0, 3: 0.0}


class Says(torch.nn.Module):
    """Gives each text the logits that stand under its first token."""

    def __init__(self, table: dict[int, list[float]]) -> None:
        super().__init__()
        self.table, self.weight = table, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=torch.tensor([self.table[int(row[1])] for row in input_ids]))


def test_a_score_is_the_mean_over_texts(tmp_path: Path) -> None:
    _, encoder = classifier("llama")
    path = write(tmp_path / "d.jsonl", [{"text": t, "label": n} for t, n in (("a", "x"), ("a", "x"), ("b", "x"), ("b", "y"))])
    texts = Labelled(open_store(open_source(path), encoder), encoder, ["x", "y"], 8)
    first = {text: encoder.ids([text])[0][0] for text in "ab"}
    model = Says({first["a"]: [1.0, 0.0], first["b"]: [0.0, 2.0]})
    found = score_classes(model, texts, ["x", "y"], 4)
    right, wrong = float(np.log1p(np.exp(-1))), float(np.log1p(np.exp(2)))
    assert found.loss == pytest.approx((2 * right + wrong + float(np.log1p(np.exp(-2)))) / 4, rel=1e-6)
    assert found.accuracy == 0.75 and found.f1 == {"x": pytest.approx(4 / 5), "y": pytest.approx(2 / 3)}
    assert found.macro_f1 == pytest.approx((4 / 5 + 2 / 3) / 2) and found.examples == 4


# tune, eval, load, apply


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_that_can_be_learnt_is_learnt(family: str, learnt: Callable[[str], Any], data: Path) -> None:
    out, result = learnt(family)
    scores = result["evaluation"][str(data)]
    assert scores["before"]["accuracy"] < 0.7 and scores["after"]["accuracy"] == scores["after"]["macro_f1"] == 1.0
    manifest = json.loads((out / "delta.json").read_text())
    assert manifest["classifier"] == {"labels": ["bird", "cat", "dog"], "pad_token": 1}
    forms = {name: entry["form"] for name, entry in manifest["parameters"].items()}
    assert {name for name, form in forms.items() if form == "replace"} == HEADS[family] and "low_rank" in forms.values()
    assert {name for name, entry in manifest["parameters"].items() if entry["dtype"]} == HEADS[family], "set as a whole: the base has none"


@pytest.mark.parametrize("family", FAMILIES)
def test_delta_and_applied_model_and_transformers_agree(
    family: str, learnt: Callable[[str], Any], bases: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    (out, result), base = learnt(family), bases(family)
    (tmp_path / "note.txt").write_text("a dog and a cat " * 9)
    done = apply(str(base), [str(out)], str(tmp_path / "applied"), verify=str(tmp_path / "note.txt"), quiet=True)
    assert done["verified"]["agreement"] == 1.0
    scores = measured(base, data, out)
    alike(scores, result["evaluation"][str(data)]["after"])
    alike(measured(tmp_path / "applied", data), scores)
    theirs, facts = AutoModelForSequenceClassification.from_pretrained(tmp_path / "applied", output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"] and theirs.config.id2label == {0: "bird", 1: "cat", 2: "dog"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "applied")
    records = animals()
    said = transformers.pipeline("text-classification", model=theirs, tokenizer=tokenizer, batch_size=8)([r["text"] for r in records])
    assert [s["label"] for s in said] == [r["label"] for r in records]
    ours = load(base, [out])
    ids = tokenizer(records[1]["text"], return_tensors="pt").input_ids
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(EspalierError, match=r"as a whole, which cannot be scaled by 0\.5; use it with scale 1"):
        measured(base, data, out, scale=0.5)


def test_an_interrupted_run_goes_on_to_the_same_bits(bases: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With BERT's own dropout, over the end of an epoch."""
    short = write(tmp_path / "short.jsonl", animals(7))
    run(bases("bert"), short, tmp_path / "whole", steps=6, checkpoint_every=2)
    true, calls = steps.accumulate, []

    def cut(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(steps, "accumulate", cut)
    with pytest.raises(KeyboardInterrupt):
        run(bases("bert"), short, tmp_path / "cut", steps=6, checkpoint_every=2)
    assert run(bases("bert"), short, tmp_path / "cut", steps=6, checkpoint_every=2, resume=True)["steps"] == 6 and len(calls) == 8
    for name in ("delta.safetensors", "delta.json", "files/config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_probe_trains_the_head_alone(family: str, bases: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    result = run(bases(family), data, tmp_path / "probe", method="full", targets="head", steps=60, batch_size=16, learning_rate=0.02, eval_data=[str(data)])
    scores = result["evaluation"][str(data)]
    assert scores["after"]["accuracy"] > scores["before"]["accuracy"] + 0.2
    assert set(json.loads((tmp_path / "probe" / "delta.json").read_text())["parameters"]) == HEADS[family]
    assert result["trained"] == sum(t.numel() for t in load_file(tmp_path / "probe" / "delta.safetensors").values())


def test_a_classifier_keeps_its_head_for_labels_that_it_knows_and_gets_a_new_one_for_others(
    learnt: Callable[[str], Any], bases: Callable[[str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = learnt("bert")
    model = tmp_path / "applied"
    apply(str(bases("bert")), [str(out)], str(model), quiet=True)
    two = write(tmp_path / "two.jsonl", [r for r in animals() if r["label"] != "cat"])
    before = run(model, two, tmp_path / "more", steps=1, eval_data=[str(two)])["evaluation"][str(two)]["before"]
    manifest = json.loads((tmp_path / "more" / "delta.json").read_text())
    assert before["accuracy"] == 1.0 and "classifier" not in manifest and "files" not in manifest
    assert measured(model, data, tmp_path / "more")["accuracy"] > 0.6, "it still knows three"
    other = write(tmp_path / "other.jsonl", [{**r, "label": f"no {r['label']}"} for r in animals()])
    capsys.readouterr()
    before = run(model, other, tmp_path / "other", eval_data=[str(other)], quiet=False, steps=25, seed=1)["evaluation"][str(other)]
    assert "a new classification head for 3 labels: no bird, no cat, no dog" in capsys.readouterr().err
    assert before["before"]["accuracy"] < 0.9 < before["after"]["accuracy"] == measured(model, other, tmp_path / "other")["accuracy"]
    apply(str(model), [str(tmp_path / "other")], str(tmp_path / "again"), quiet=True)
    assert measured(tmp_path / "again", other)["accuracy"] == before["after"]["accuracy"]


def test_whole_numbers_are_labels_in_their_order(bases: Callable[[str], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "numbers.jsonl", [{"text": f"number {i}", "label": i % 11} for i in range(33)])
    run(bases("llama"), path, tmp_path / "out", steps=1)
    assert json.loads((tmp_path / "out" / "delta.json").read_text())["classifier"]["labels"] == [str(i) for i in range(11)]


def test_a_base_whose_files_lack_the_prefix_of_its_names_gets_a_head_too(bases: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """As BertModel.save_pretrained writes it, pooler and all."""
    transformers.AutoModel.from_pretrained(bases("bert")).save_pretrained(tmp_path / "bare")
    for file in bases("bert").glob("token*"):
        shutil.copy(file, tmp_path / "bare")
    assert "pooler.dense.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    scores = run(tmp_path / "bare", data, tmp_path / "out", eval_data=[str(data)])["evaluation"][str(data)]["after"]
    assert measured(tmp_path / "bare", data, tmp_path / "out") == scores
    apply(str(tmp_path / "bare"), [str(tmp_path / "out")], str(tmp_path / "applied"), quiet=True)
    alike(measured(tmp_path / "applied", data), scores)


def test_a_head_survives_compression(learnt: Callable[[str], Any], bases: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    out, _ = learnt("llama")
    compress(str(out), str(tmp_path / "small"), method="quantize", bits=8, quiet=True)
    assert measured(bases("llama"), data, tmp_path / "small")["accuracy"] > 0.95
    assert torch.equal(*(load_file(folder / "delta.safetensors")["score.weight:values"] for folder in (out, tmp_path / "small")))


# one's own loop


def test_a_head_of_ones_own_loop_is_saved_only_when_it_trains_whole(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=1)
    attach(model, "lora", rank=2, name="without")
    with pytest.raises(EspalierError, match=r"the base does not have 'score.weight', so a delta must hold it whole: train it with --full score.weight"):
        save(model, tmp_path / "never")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=1)
    attach(model, "lora", rank=2, full="head.classifier")
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.05)
    save(model, tmp_path / "delta")
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(load(base, [tmp_path / "delta"])(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


# what is refused


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b"}], r":2 has no label, and the lines before have some; every line needs one, or none has"),
        ([{"text": "a"}, {"text": "b", "label": "y"}], r":2 has a label, and the lines before have none"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], r"all 2 texts have the label 'x'; a classifier needs two labels at least"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], r":2: the label is None; it must be a name or a whole number"),
        ([{"text": "a", "label": 0.5}], r":1: the label is 0.5; it must be a name or a whole number"),
        ([{"text": "a", "label": True}], r":1: the label is True"),
        ([{"text": "a", "label": " "}], r":1: the label is ' '"),
        ([{"text": 3, "label": "x"}], r":1: 'text' is int; it must be a string"),
    ],
)
def test_bad_labels_are_refused_in_one_line(records: list[dict[str, Any]], words: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=words):
        run(bases("llama"), write(tmp_path / "d.jsonl", records), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_and_models_that_do_not_go_together_are_refused(
    learnt: Callable[[str], Any], bases: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    (out, _), base = learnt("llama"), bases("llama")
    text = tmp_path / "text.txt"
    text.write_text("plain text\n" * 9)
    fish = write(tmp_path / "fish.jsonl", [*animals(2), {"text": "a fish", "label": "fish"}])
    with pytest.raises(EspalierError, match=r"the data have the label 'fish' \(1 of 7 texts\), which the model does not know; it knows: bird, cat, dog"):
        measured(base, fish, out)
    with pytest.raises(EspalierError, match="which the model does not know"):
        run(base, data, tmp_path / "a", eval_data=[str(fish)])
    with pytest.raises(EspalierError, match="have labels; measuring needs a model with a classification head: give the --delta of a tune on labelled data"):
        measured(base, data)
    with pytest.raises(EspalierError, match="have no labels; measuring needs JSON lines with text and label"):
        measured(base, text, out)
    with pytest.raises(EspalierError, match="either both have labels or neither has"):
        run(base, data, tmp_path / "b", eval_data=[str(text)])
    with pytest.raises(EspalierError, match="has labels, which pretrain does not learn; use espalier tune, or give text"):
        pretrain(str(data), str(tmp_path / "c"), model=str(base), steps=1, sequence_length=32, quiet=True)
    with pytest.raises(EspalierError, match="transformers has no sequence classification for the family 'cohere'"):
        with_labels(transformers.CohereConfig(), ["a", "b"], 0)
    with pytest.raises(EspalierError, match="LlamaForSequenceClassification tells labels and makes no text; measure it with espalier eval"):
        generate(str(base), prompt="a", delta=[str(out)], quiet=True)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"labels": ["a", "a"], "pad_token": 1}, r"delta.json: the labels are \['a', 'a'\]; they must be different names"),
        ({"labels": 3, "pad_token": 1}, "delta.json: the labels are 3"),
        ({"labels": ["a", "b"], "pad_token": 4096}, "pad_token is 4096; it must be the id of a token, below 4096"),
        ({"labels": ["a", "b"]}, "pad_token is None"),
        ([1], "classifier is .*must be a dict"),
    ],
)
def test_a_malformed_head_is_refused(said: Any, words: str, learnt: Callable[[str], Any], bases: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    from espalier.delta.store import _digest

    shutil.copytree(learnt("llama")[0], tmp_path / "delta", ignore=shutil.ignore_patterns("run"))
    path = tmp_path / "delta" / "delta.json"
    content = json.loads(path.read_text()) | {"classifier": said}
    path.write_text(json.dumps(content | {"sha256": _digest(content)}))
    with pytest.raises(EspalierError, match=words):
        measured(bases("llama"), data, tmp_path / "delta")


def test_a_base_that_lacks_more_than_a_head_is_refused(bases: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    shutil.copytree(bases("llama"), tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(EspalierError, match=r"lacks 'model.layers.1.mlp.up_proj.weight' \(1 tensors in all\), which LlamaForSequenceClassification needs"):
        run(tmp_path / "base", data, tmp_path / "out")


# the bundled task, and the command


def packages(half: str) -> TokenStore:
    return open_store(open_source(f"stdlib:packages:{half}"), Encoder(AutoTokenizer.from_pretrained(resolve_model("seedling"))))


def test_the_bundled_task_tells_packages_by_docstrings_and_its_halves_are_apart() -> None:
    found = {half: packages(half) for half in ("train", "heldout")}
    texts = {}
    for half, store in found.items():
        assert store.names == corpus.LABELLED and set(store.labels.tolist()) == set(range(10))
        (path,) = corpus.bundled_files(f"packages:{half}")
        texts[half] = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        assert len(set(texts[half])) == len(texts[half]) == store.documents
    assert not set(texts["train"]) & set(texts["heldout"])
    assert 0.15 < found["heldout"].documents / (found["heldout"].documents + found["train"].documents) < 0.35


def test_the_command_tunes_and_measures_a_classifier_and_says_what_it_does(bases: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = espalier(
        "tune", "--model", "seedling", "--data", data, "--out", out, "--steps", 8, "--batch-size", 8, "--sequence-length", 32, "--threads", 1,
        "--learning-rate", 0.001, "--full", "norm", "--eval-data", data, "--json",
    )  # fmt: skip
    scores = json.loads(done.stdout)["evaluation"][str(data)]
    assert scores["after"]["loss"] < scores["before"]["loss"] and set(scores["after"]) >= {"accuracy", "macro_f1", "f1", "examples", "truncated"}
    for promised in ("of label", "a new classification head for 3 labels: bird, cat, dog", "head.classifier", "macro-F1", "the delta is in"):
        assert promised in done.stderr
    assert "LOAD REPORT" not in done.stderr
    again = json.loads(espalier("eval", "--model", "seedling", "--delta", out, "--data", data, "--sequence-length", 32, "--json").stdout)
    assert again["accuracy"] == scores["after"]["accuracy"]
    shown = espalier("eval", "--model", "seedling", "--delta", out, "--data", data, "--sequence-length", 32, "--quiet").stdout
    assert "macro f1" in shown and "accuracy" in shown
    done = espalier(
        "tune", "--model", bases("bert"), "--data", data, "--out", tmp_path / "shown", "--steps", 1, "--batch-size", 2, "--sequence-length", 16,
        "--eval-data", data, "--quiet",
    )  # fmt: skip
    assert f"{data}: accuracy " in done.stdout and "(was " in done.stdout
    assert "which the model does not know" not in error_of("eval", "--model", "seedling", "--data", data)


def test_texts_of_several_tasks_are_trained_and_measured_each_as_its_own(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The label alone tells nothing: the tasks ask for opposite ones of the same texts."""
    records = [
        {"text": f"a {name} of {i}", "label": ("yes", "no")[(name == "cat") == (task == "is")], "task": task}
        for i in range(12) for name in ("cat", "dog") for task in ("is", "is not")
    ]  # fmt: skip
    data = write(tmp_path / "data.jsonl", records)
    result = tune(
        str(bases("llama")), str(data), str(tmp_path / "bank"), method="mhr", rank=4, learning_rate=1e-2, steps=40, batch_size=16, sequence_length=32,
        micro_batch_size=16, recompute=False, eval_data=[str(data)], quiet=True,
    )  # fmt: skip
    assert result["evaluation"][str(data)]["after"]["accuracy"] > 0.9
    encoder = Encoder(AutoTokenizer.from_pretrained(bases("llama")))
    texts = Labelled(open_store(open_source(data), encoder, by_task=True), encoder, ["no", "yes"], 32)
    runs = list(texts.divide(range(len(records)), 64))
    assert sorted(number for run in runs for number in run) == list(range(len(records)))
    assert all({records[number]["task"] for number in run} == {texts.batch(run, 0).task} for run in runs)
