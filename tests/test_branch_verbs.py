"""The verbs with branches: tune makes such a delta, eval and generate use it, and what works on weights refuses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import espalier
from espalier.delta import store
from espalier.errors import EspalierError

SMALL = {"steps": 3, "batch_size": 2, "sequence_length": 32, "quiet": True, "threads": 1}
METHODS = {"houlsby": {"width": 4}, "prefix": {"length": 3, "projection": 5}, "prompt": {"prompt_length": 3}}


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "notes.txt"
    file.write_text("def add(a, b):\n    return a + b\n\n\n" * 30)
    return file


@pytest.fixture(scope="module", params=METHODS)
def tuned(request: pytest.FixtureRequest, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict]:
    out = tmp_path_factory.mktemp("tuned") / "delta"
    made = espalier.tune("seedling", str(notes), str(out), method=request.param, eval_data=[str(notes)], learning_rate=1e-2, **SMALL, **METHODS[request.param])
    return request.param, out, made


def test_tune_trains_a_branch_and_eval_measures_the_same(tuned: tuple[str, Path, dict], notes: Path) -> None:
    method, out, made = tuned
    (measured,) = made["evaluation"].values()
    assert made["method"] == method and made["trained"] > 0 and made["peak_memory"] > 0
    assert measured["after"]["loss"] != measured["before"]["loss"]
    found = espalier.eval("seedling", str(notes), delta=[str(out)], sequence_length=32, quiet=True)
    assert found["loss"] == pytest.approx(measured["after"]["loss"], rel=1e-3)
    base = espalier.eval("seedling", str(notes), sequence_length=32, quiet=True)
    assert espalier.eval("seedling", str(notes), delta=[str(out)], scale=0.0, sequence_length=32, quiet=True)["loss"] == pytest.approx(base["loss"], rel=1e-6)


def test_generate_continues_under_a_branch(tuned: tuple[str, Path, dict]) -> None:
    _, out, _ = tuned
    assert espalier.generate("seedling", "def add(", delta=[str(out)], max_tokens=4, temperature=0, quiet=True)["tokens"] == 4


def test_info_lists_the_branches_and_what_works_on_weights_refuses_them(tuned: tuple[str, Path, dict], tmp_path: Path) -> None:
    method, out, _ = tuned
    found = espalier.info(str(out))
    assert found["method"] == method and found["branches"] and found["numbers"] > 0 and found["bytes"] > 0
    card = (out / "README.md").read_text()
    assert "espalier generate" in card and "espalier apply" not in card
    with pytest.raises(EspalierError, match=f"holds branches of {method} .*cannot be merged into them; eval, generate"):
        espalier.apply("seedling", [str(out)], str(tmp_path / "merged"), quiet=True)
    with pytest.raises(EspalierError, match="holds branches"):
        espalier.convert(str(out), str(tmp_path / "dense"), to="dense", quiet=True)


def test_a_damaged_branch_is_refused(tuned: tuple[str, Path, dict]) -> None:
    _, out, _ = tuned
    manifest = json.loads((out / "delta.json").read_text())
    site = next(iter(manifest["branches"]))
    kept = (out / "delta.json").read_text()
    for wrong, message in (
        ({**manifest["branches"], "blocks.0.nowhere": {}}, "no such site"),
        ({**manifest["branches"], site: 3}, "must be a table"),
        ({**manifest["branches"], site: {**manifest["branches"][site], "more": ["F32", [1]]}}, "'more' of the branch .* is missing"),
        ({name: own for name, own in manifest["branches"].items() if name != site}, "does not describe"),
    ):
        changed = {**manifest, "branches": wrong}
        changed["sha256"] = store._digest(changed)
        (out / "delta.json").write_text(json.dumps(changed))
        with pytest.raises(EspalierError, match=message):
            espalier.load("seedling", [out])
    (out / "delta.json").write_text(kept)


def test_a_prompt_takes_positions_that_the_model_must_have(notes: Path, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=r"sequence_length is \d+; the model has \d+ positions, of which the branch takes 8"):
        longest = espalier.info("seedling")["config"]["max_position_embeddings"]
        espalier.tune("seedling", str(notes), str(tmp_path / "out"), method="prompt", prompt_length=8, **{**SMALL, "sequence_length": longest})


@pytest.mark.parametrize("method", ["houlsby", "prompt"])
def test_a_branch_trains_beside_a_new_head_norms_and_new_tokens_on_a_coded_base(method: str, notes: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps({"text": f"x = {i}", "label": "odd" if i % 2 else "even"}) + "\n" for i in range(12)))
    cases = (("classifier", labelled, {}), ("text", notes, {"base_bits": 8, "full": "norm", "add_tokens": "<|tool|>"}))
    for name, data, more in cases:
        made = espalier.tune("seedling", str(data), str(tmp_path / name), method=method, eval_data=[str(data)], **SMALL, **more)
        (measured,) = made["evaluation"].values()
        found = espalier.eval("seedling", str(data), delta=[str(tmp_path / name)], sequence_length=32, quiet=True)
        assert found["loss"] == pytest.approx(measured["after"]["loss"], rel=0.02)
        with pytest.raises(EspalierError, match="holds branches"):
            espalier.apply("seedling", [str(tmp_path / name)], str(tmp_path / "merged"), quiet=True)
