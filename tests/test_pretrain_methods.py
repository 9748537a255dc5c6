"""Pretraining with a method: the weights are made its way, the rest trains whole, and an ordinary checkpoint comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FUNCTIONS

from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.errors import EspalierError
from espalier.verbs.pretrain import pretrain
from espalier.verbs.tune import tune


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrain") / "text.txt"
    path.write_text(FUNCTIONS)
    return path


def new(text: Path, out: Path, method: str, **options: Any) -> dict[str, Any]:
    """A run of three steps from nothing."""
    config = json.loads((resolve_model("seedling") / "config.json").read_text())
    architecture = out.parent / "config.json"
    architecture.write_text(json.dumps({**config, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}))
    settings = {"steps": 3, "batch_size": 2, "sequence_length": 32, "eval_data": [str(text)], "dtype": "fp32", "quiet": True}
    return pretrain(str(text), str(out), architecture=str(architecture), tokenizer="seedling", method=method, **{**settings, **options})


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the matrices of its blocks."""
    directory = ModelDirectory(folder)
    return {name: directory.read(name) for name in directory if "layers" in name and len(directory.info(name).shape) == 2}


@pytest.mark.parametrize(("method", "options"), [("sltrain", {"rank": 4, "density": 0.1}), ("low-rank", {"rank": 4})])
def test_what_is_made_of_parts_is_saved_as_an_ordinary_model(method: str, options: dict[str, Any], text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = new(text, tmp_path / "out", method, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = sum(p.numel() for p in model.parameters())
    parts = sum(4 * sum(w.shape) + (w.numel() // 10 if method == "sltrain" else 0) for w in matrices(tmp_path / "out").values())
    assert result["method"] == method and result["trained"] == whole - sum(w.numel() for w in matrices(tmp_path / "out").values()) + parts
    assert result["plan"]["phases"]["steady state"]["trained"] == 4 * result["trained"]
    again = tune(str(tmp_path / "out"), str(text), str(tmp_path / "tuned"), steps=1, sequence_length=32, batch_size=2, eval_data=[str(text)], quiet=True)
    assert again["evaluation"][str(text)]["before"]["loss"] == pytest.approx(result["evaluation"][str(text)]["after"]["loss"], rel=1e-5)
    if method == "low-rank":
        assert all(torch.linalg.matrix_rank(w, rtol=1e-5) == 4 for w in matrices(tmp_path / "out").values())


@pytest.mark.parametrize(("method", "options"), [("spdf", {}), ("gradual-magnitude", {"sparsity": 0.75, "micro_batch_size": 1, "recompute": True})])
def test_a_sparse_model_is_sparse_in_its_file_and_dense_fine_tuning_goes_on_from_it(method: str, options: dict[str, Any], text: Path, tmp_path: Path) -> None:
    """At the switch the function is unchanged; then every weight moves."""
    result = new(text, tmp_path / "out", method, **options)
    found = matrices(tmp_path / "out")
    assert all(int(w.count_nonzero()) == round(0.25 * w.numel()) for w in found.values())
    assert result["course"]["prunable"] == sum(w.numel() for w in found.values()) and result["course"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    again = tune(str(tmp_path / "out"), str(text), str(tmp_path / "tuned"), method="full", learning_rate=1e-3, steps=1, sequence_length=32, batch_size=2, eval_data=[str(text)], quiet=True)
    assert again["evaluation"][str(text)]["before"]["loss"] == pytest.approx(result["evaluation"][str(text)]["after"]["loss"], rel=1e-5)


def test_a_branch_cannot_be_pretrained_with(text: Path, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="no adapter is called 'prefix'"):
        new(text, tmp_path / "out", "prefix")
