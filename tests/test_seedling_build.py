"""What seedling's figures stand on: the Kneser-Ney baseline, the syntax test's rule, the split of the corpus, the report."""

from __future__ import annotations

import ast
import importlib
import json
import platform
import textwrap
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from espalier.bundled import corpus

SEEDLING = Path(__file__).parents[1] / "seedling"


@pytest.fixture
def seedling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of seedling/, which is no package, by its name."""
    monkeypatch.syspath_prepend(str(SEEDLING))

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        assert Path(module.__file__ or "").parent == SEEDLING
        return module

    return load


# -- Kneser-Ney


def _zipf_documents(count: int = 6, length: int = 120, vocabulary: int = 7) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, vocabulary + 1)
    return [generator.choice(vocabulary, length, p=weights / weights.sum()).astype(np.int64) for _ in range(count)]


def _distribution(model: Any, history: list[int]) -> np.ndarray:
    return np.exp([model.log_probabilities(np.array([*history, w]))[-1] for w in range(model.vocabulary)])


@pytest.mark.parametrize("modified", [False, True])
def test_kneser_ney_probabilities_sum_to_one_after_any_history(seedling: Any, modified: bool) -> None:
    model = seedling("kneser_ney").KneserNey(_zipf_documents(), 7, order=5, modified=modified)
    for history in ([0], [6], [1, 0], [0, 0, 1], [3, 5, 6, 6], [0, 1, 0, 2, 0, 1]):
        probabilities = _distribution(model, history)
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
        assert (probabilities > 0).all()


def test_a_bigram_kneser_ney_model_gives_the_numbers_computed_by_hand(seedling: Any) -> None:
    # bigrams 01, 12 (twice), 21, 23: D = 3 / (3 + 2 * 1) = 0.6. Distinct left contexts: token 1 has two, 2 and 3
    # one; 0 only begins the document and keeps its count. Unigrams: D = 0.6, total 5, freed mass 4 * 0.6.
    model = seedling("kneser_ney").KneserNey([np.array([0, 1, 2, 1, 2, 3])], 4, order=2)
    lower = np.array([0.4 + 0.6, 1.4 + 0.6, 0.4 + 0.6, 0.4 + 0.6]) / 5
    after_2 = (np.array([0, 0.4, 0, 0.4]) + 2 * 0.6 * lower) / 2
    after_1 = (np.array([0, 0, 1.4, 0]) + 0.6 * lower) / 2
    assert _distribution(model, [2]) == pytest.approx(after_2)
    assert _distribution(model, [1]) == pytest.approx(after_1)
    assert after_2 == pytest.approx([0.12, 0.44, 0.12, 0.32])


def test_an_unseen_context_backs_off_to_the_shorter_one(seedling: Any) -> None:
    documents = [np.array([0, 1, 2, 1, 2, 3]), np.array([0, 1, 3])]
    model = seedling("kneser_ney").KneserNey(documents, 5, order=3)
    assert _distribution(model, [3, 1]) == pytest.approx(_distribution(model, [1]))  # 3 1 never occurs, 1 does
    assert _distribution(model, [4]) == pytest.approx(_distribution(model, [3]))  # neither is ever followed


def test_the_fast_kneser_ney_agrees_with_one_written_down_plainly(seedling: Any) -> None:
    documents, order, vocabulary = _zipf_documents(), 3, 7
    raw = {n: Counter(tuple(d[i : i + n].tolist()) for d in documents for i in range(len(d) - n + 1)) for n in range(1, order + 1)}
    counts = {order: raw[order]}
    for n in range(1, order):
        left = Counter(gram[1:] for gram in raw[n + 1])
        counts[n] = Counter({gram: left[gram] or raw[n][gram] for gram in raw[n]})

    def probability(history: tuple[int, ...], token: int) -> float:
        n = len(history) + 1
        lower = probability(history[1:], token) if history else 1 / vocabulary
        seen = {gram: c for gram, c in counts[n].items() if gram[:-1] == history}
        if not seen:
            return lower
        once, twice = (sum(c == k for c in counts[n].values()) for k in (1, 2))
        discount = max(1, once) / (max(1, once) + 2 * max(1, twice))
        here = counts[n][(*history, token)]
        return (max(here - discount, 0) + discount * len(seen) * lower) / sum(seen.values())

    text = np.random.default_rng(1).integers(0, vocabulary, 40)
    expected = [np.log(probability(tuple(text[max(0, i - order + 1) : i].tolist()), int(text[i]))) for i in range(1, len(text))]
    model = seedling("kneser_ney").KneserNey(documents, vocabulary, order=order)
    assert model.log_probabilities(text) == pytest.approx(expected)


# -- the syntax test


ACCEPTED = {
    "whole": "x = 1\ny = 2\n",
    "the last line is cut": "x = 1\ny = (",
    "indented alike": "        x = 1\n\n        if x:\n            y = 2\n",
    "leaves its block": "        return x\n\n    def f(self):\n        return 1\n\nclass A:\n    x = 1\n    y",
    "a comment": "    # nothing but words\nnext",
    "await outside a function": "    await x\n",
}
REFUSED = {
    "empty": "",
    "no whole line": "x = 1",
    "only blank lines": "\n    \n    x = 1",
    "words of a docstring": "    Return the sum of both.\n",
    "an open bracket": "x = f(\n    1,\n",
    "an open string": 'x = """a\nb\n',
    "a block without a body": "def f(x):\n    retu",
    "leaves its block for a head without a body": "        return x\n\n    def f(self):\n        retu",
    "deeper without a reason": "    x = 1\n        y = 2\n",
    "the rest of a statement that began before": "    x = 1\nelse:\n    y = 2\n",
    "a null byte": "x = '\0'\n",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_piece_that_parses_is_accepted(seedling: Any, name: str) -> None:
    assert seedling("syntax").parses(ACCEPTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_a_piece_that_does_not_parse_is_refused(seedling: Any, name: str) -> None:
    assert not seedling("syntax").parses(REFUSED[name])


def test_the_cut_drops_what_follows_the_last_line_end(seedling: Any) -> None:
    cut = seedling("syntax").cut
    assert cut("a\n  b\nc") == "a\n  b\n"
    assert cut("a\n") == "a\n"
    assert cut("a") == ""


def test_the_dedent_is_that_of_textwrap_where_no_line_is_shallower_than_the_first(seedling: Any) -> None:
    dedent = seedling("syntax").dedent
    for text in ("a\n  b\n", "    a\n      b\n\n    c\n", "\ta\n\t\tb\n", "\n    a\n        b\n"):
        assert dedent(text) == textwrap.dedent(text)
    assert dedent("        a\n    b\n        c\nd\n") == "a\nb\n    c\nd\n"


def test_places_begin_after_a_line_end_and_its_indentation_and_are_the_same_each_time(seedling: Any) -> None:
    syntax = seedling("syntax")

    class Tokenizer:
        texts = ("<begin>", "<end>", "x", " = 1", "\n", "\n    ", "  ")

        def __len__(self) -> int:
            return len(self.texts)

        def decode(self, ids: list[int]) -> str:
            return "".join(self.texts[i] for i in ids)

    documents = [np.array([0, *[2, 3, 4, 2, 3, 5] * n, 1]) for n in (3, 12, 150)]
    drawn = syntax.places(documents, Tokenizer(), 30)
    assert drawn == syntax.places(documents, Tokenizer(), 30)
    assert {place.indentation for place in drawn} == {"", "    "}
    for place in drawn:
        assert place.prompt[-1] in (4, 5) and 1 < len(place.prompt) <= syntax.CONTEXT
        assert len(place.continuation) == syntax.LENGTH and 1 not in place.continuation
        assert place.continuation[0] == 2


# -- the corpus


def test_every_file_of_the_corpus_is_in_exactly_one_split() -> None:
    halves = [f"{package}:{half}" for package in corpus.HELD_OUT for half in ("train", "heldout")]
    parts = {name: corpus.bundled_files(name) for name in ("train", "valid", *halves)}
    assert all(parts.values())
    everything = [path for files in parts.values() for path in files]
    assert len(everything) == len(set(everything))
    assert sorted(everything) == sorted(corpus.source_files().values())
    for package in corpus.HELD_OUT:
        both = {*parts[f"{package}:train"], *parts[f"{package}:heldout"]}
        assert set(corpus.bundled_files(package)) == both


def test_packages_that_are_held_out_are_never_trained_on() -> None:
    for name in ("train", "valid"):
        for path in corpus.bundled_files(name):
            assert path.relative_to(corpus.library()).parts[0] not in corpus.HELD_OUT


@pytest.mark.parametrize("half", ["train", "heldout"])
def test_docstring_pairs_come_from_held_out_packages_and_are_whole_functions(half: str) -> None:
    text = "".join(p.read_text(encoding="utf-8") for package in corpus.HELD_OUT for p in corpus.bundled_files(f"{package}:{half}"))
    (file,) = corpus.bundled_files(f"docstrings:{half}")
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(pairs) > 100
    for pair in pairs:
        source = pair["prompt"] + pair["completion"]
        assert source in text
        inside = source if not source[0].isspace() else f"if 1:\n{source}"
        tree: Any = ast.parse(inside)
        function = tree.body[0] if inside is source else tree.body[0].body[0]
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) and len(function.body) > 1
        assert pair["prompt"].rstrip().endswith(("'", '"'))


def test_the_recorded_hashes_are_those_of_the_files() -> None:
    record = json.loads((Path(corpus.__file__).parent / "stdlib.json").read_text())
    assert set().union(*record["splits"].values()) == set(record["files"])
    assert all(corpus.split_of(name) == split for split, names in record["splits"].items() for name in names)
    if platform.python_version() == record["python"]:
        mine = corpus.hashes()
        # a distribution may patch a file or leave one out; most are the same everywhere
        assert sum(mine.get(name) == digest for name, digest in record["files"].items()) > 0.9 * len(record["files"])


# -- the report


def _figures(model: float, ours: int) -> dict[str, Any]:
    bits = {"model": model, "kneser_ney": 2.0, "modified_kneser_ney": 1.9}
    under, ratio = 1 - model / 2.0, ours / 20
    return {
        "sha256": "0" * 64, "parameters": 10, "sequence_length": 1024, "splits": {"stdlib:xml": {"files": 1, "bytes": 2, "tokens": 3}},
        "bits_per_byte": {"stdlib:xml": bits, "held-out": bits},
        "syntax": {
            "samples": 50, "tokens": 64, "temperature": 0.8, "top_p": 0.95,
            "running": {"model": ours, "file": 20, "ratio": ratio}, "textwrap": {"model": 0, "file": 0, "ratio": None},
        },
        "bars": {
            "bits_per_byte": {"value": under, "least": 0.15, "aim": 0.25, "met": under >= 0.15},
            "syntax": {"value": ratio, "least": 0.7, "met": ratio >= 0.7},
        },
    }  # fmt: skip


def test_the_report_says_of_each_bar_whether_it_is_met(seedling: Any) -> None:
    results = seedling("results")
    met, missed = results.bar_lines(_figures(1.6, 14)), results.bar_lines(_figures(2.1, 13))
    assert met[0].startswith("PASS") and "20.0% under" in met[0] and "aim of 25% is not reached" in met[0]
    assert met[1].startswith("PASS") and "0.70 of their share" in met[1]
    assert missed[0].startswith("FAIL") and "5.0% OVER" in missed[0]
    assert missed[1].startswith("FAIL")
    assert all(line in results.results_markdown(None, _figures(1.6, 14)) for line in met)


def test_the_curve_has_a_row_every_twenty_steps_and_at_each_measurement(seedling: Any, tmp_path: Path) -> None:
    results = seedling("results")
    _write_run(tmp_path, steps=50, measured={30: 1.5})
    (tmp_path / "state.json").write_text(json.dumps({"environment": {}}))
    rows = results.RunRecord(tmp_path).rows()
    assert [row["step"] for row in rows] == [20, 30, 40, 50]
    assert rows[1]["stdlib:xml"] == 1.5 and rows[0]["stdlib:xml"] is None
    assert rows[0]["tokens"] == 200 and rows[0]["train_loss"] == pytest.approx(10.5)
    lines = results.curve_csv(results.RunRecord(tmp_path)).splitlines()
    assert lines[0] == "step,tokens,train_loss,stdlib:xml" and lines[1] == "20,200,10.50000,"


def test_bits_per_byte_are_pooled_over_bytes(seedling: Any) -> None:
    scores = [{"bits_per_byte": 1.0, "bytes": 300}, {"bits_per_byte": 2.0, "bytes": 100}]
    assert seedling("results").pooled(scores) == 1.25


def _write_run(folder: Path, steps: int, measured: dict[int, float], **resolved: Any) -> None:
    record = {"verb": "pretrain", "resolved": {"steps": steps, **resolved}}
    (folder / "run.json").write_text(json.dumps(record))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "loss": float(step), "tokens": 10, "seconds": 1.0}) + "\n")
            if step in measured:
                scores = {"stdlib:xml": {"bits_per_byte": measured[step]}}
                file.write(json.dumps({"step": step, "evaluation": scores}) + "\n")


# -- a model from a checkpoint


def test_a_checkpoint_of_a_run_becomes_an_ordinary_model_with_the_record_up_to_its_step(seedling: Any, tmp_path: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    from espalier.data.batches import Cursor
    from espalier.train import checkpoint

    build = seedling("build")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "architecture")
    backend = Tokenizer(models.BPE({"a": 0, "<e>": 1}, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>").save_pretrained(tmp_path / "tokenizer")
    run = tmp_path / "out" / "run"
    run.mkdir(parents=True)
    places = {"architecture": str(tmp_path / "architecture" / "config.json"), "tokenizer": str(tmp_path / "tokenizer")}
    _write_run(run, steps=9, measured={4: 3.0, 8: 2.0}, **places)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # the run is writing its next line
    trained = {n.removesuffix("weight") + "espalier.weight:full.values": p for n, p in model.named_parameters()}
    saved = checkpoint.save(run / "checkpoints", trained, torch.optim.SGD(trained.values()), checkpoint.State(5, Cursor(), 50, 5.0))

    made = build.model_of_checkpoint(saved, tmp_path / "models")
    assert made == tmp_path / "models" / "step-00000005"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(made)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(torch.bfloat16)), name
    record = seedling("results").RunRecord(made / "run")
    assert len(record.steps) == 5 and list(record.measured) == [4]
    assert build.model_of_checkpoint(saved, tmp_path / "models") == made  # made once


# -- publishing


def _model_directory(folder: Path, dtype: Any) -> Path:
    import torch

    from espalier.checkpoint.safetensors_file import write_safetensors

    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {"weight": torch.ones(4, 4, dtype=dtype)})
    return folder


def test_publishing_replaces_the_bundled_model_and_records_the_corpus(
    seedling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    build = seedling("build")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "BUNDLED", tmp_path / "bundled" / "seedling")
    build.BUNDLED.mkdir(parents=True)
    (build.BUNDLED / "of_the_old_one.json").write_text("{}")
    build.publish(_model_directory(tmp_path / "new", torch.bfloat16), _figures(1.6, 14))
    assert sorted(p.name for p in build.BUNDLED.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [p.name for p in (tmp_path / "bundled").iterdir() if p.name.startswith(".")] == []
    assert json.loads((tmp_path / "bundled" / "stdlib.json").read_text())["files"] == corpus.hashes()
    assert "PASS" in (tmp_path / "seedling" / "RESULTS.md").read_text()


def test_a_model_that_is_not_bf16_or_too_large_is_not_published(
    seedling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from espalier.errors import EspalierError

    build = seedling("build")
    monkeypatch.setattr(build, "BUNDLED", tmp_path / "bundled" / "seedling")
    with pytest.raises(EspalierError, match="F32; seedling is shipped in bf16"):
        build.publish(_model_directory(tmp_path / "wide", torch.float32), _figures(1.6, 14))
    monkeypatch.setattr(build, "LARGEST", 30)
    with pytest.raises(EspalierError, match="at most 30 are shipped"):
        build.publish(_model_directory(tmp_path / "large", torch.bfloat16), _figures(1.6, 14))
    assert not build.BUNDLED.exists()
