"""Training a delta over frozen ones: the chain is recorded, comes back the same everywhere, and is asked for where it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from transformers import AutoTokenizer

from espalier import apply, attach, convert, eval, load, merge, save, tune
from espalier.attach.attachment import attachments, detach, trainable_parameters
from espalier.checkpoint.directory import resolve_model
from espalier.delta import store
from espalier.errors import EspalierError

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(60))


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a text, and two deltas, the second trained over the first."""
    folder = tmp_path_factory.mktemp("over")
    tiny("llama", vocab_size=4096).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder / "base")
    (folder / "text.txt").write_text(TEXT)
    run(folder, "first", method="dora", rank=4)
    run(folder, "second", over=[str(folder / "first")], rank=4)
    return folder


def run(folder: Path, out: str, **options: Any) -> dict[str, Any]:
    settings = {"steps": 4, "batch_size": 2, "sequence_length": 32, "learning_rate": 0.02, "quiet": True, "threads": 1}
    settings |= {"micro_batch_size": 2, "recompute": False, "logits_chunk": 64, **options}
    return tune(str(folder / "base"), str(folder / "text.txt"), str(folder / out), eval_data=[str(folder / "text.txt")], **settings)


def loss(folder: Path, model: str, *deltas: str) -> float:
    found = eval(str(folder / model), str(folder / "text.txt"), delta=[str(folder / d) for d in deltas], sequence_length=32, quiet=True)
    return found["loss"]


def test_the_second_starts_where_the_first_ended_and_both_are_one_model_everywhere(there: Path, tmp_path: Path) -> None:
    first, second = (json.loads((there / n / "run" / "result.json").read_text())["evaluation"][str(there / "text.txt")] for n in ("first", "second"))
    assert second["before"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-6)
    assert second["after"]["loss"] < second["before"]["loss"]
    assert loss(there, "base", "first", "second") == pytest.approx(second["after"]["loss"], rel=1e-6)
    apply(str(there / "base"), [str(there / "first"), str(there / "second")], str(tmp_path / "merged"), quiet=True)
    ids = tokens()
    with torch.no_grad():
        both = load(there / "base", [there / "first", there / "second"])(ids).logits
        torch.testing.assert_close(load(tmp_path / "merged")(ids).logits, both, rtol=1e-4, atol=1e-4)


def test_the_manifest_records_the_chain_and_training_leaves_the_first_as_it_was(there: Path) -> None:
    first, second = store.manifest_of(there / "first"), store.manifest_of(there / "second")
    assert second["over"] == [{"delta": str(there / "first"), "sha256": first["sha256"]}]
    assert f"--delta {there / 'first'} --delta ." in (there / "second" / "README.md").read_text()
    assert not (there / "second" / "adapter_config.json").exists(), "PEFT would put it on the base"


def test_what_stands_on_another_is_refused_without_it(there: Path, tmp_path: Path) -> None:
    stands = f"was trained over {there / 'first'}"
    for deltas in ([there / "second"], [there / "second", there / "first"]):
        with pytest.raises(EspalierError, match=stands):
            load(there / "base", deltas)
        with pytest.raises(EspalierError, match=stands):
            apply(str(there / "base"), [str(d) for d in deltas], str(tmp_path / "merged"), quiet=True)
    load(there / "base", [there / "second"], any_base=True)
    with pytest.raises(EspalierError, match=stands):
        merge([str(there / "second"), str(there / "first")], str(tmp_path / "m"), model=str(there / "base"), method="linear", quiet=True)


def test_a_resumed_run_ends_with_the_same_bits(there: Path) -> None:
    """Its last checkpoint is one of the middle: everything after it is done again."""
    import shutil

    options = {"over": [str(there / "first")], "rank": 4, "checkpoint_every": 2}
    run(there, "again", **options)
    assert (there / "again" / "delta.safetensors").read_bytes() == (there / "second" / "delta.safetensors").read_bytes()
    (there / "again" / "run" / "result.json").unlink()
    (there / "again" / "delta.json").unlink()
    newest = sorted((there / "again" / "run" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    run(there, "again", **options, resume=True)
    assert (there / "again" / "delta.safetensors").read_bytes() == (there / "second" / "delta.safetensors").read_bytes()


def test_a_run_over_another_first_delta_cannot_be_resumed(there: Path) -> None:
    with pytest.raises(EspalierError, match="over is"):
        run(there, "second", over=[str(there / "again")], rank=4, resume=True)


@pytest.mark.parametrize("method", ["full", "mos"])
def test_any_method_trains_over_any(there: Path, method: str) -> None:
    over = [str(there / "first"), str(there / "second")]
    result = run(there, f"third-{method}", over=over, method=method, learning_rate=0.005)
    measured = result["evaluation"][str(there / "text.txt")]
    assert measured["after"]["loss"] < measured["before"]["loss"]
    assert loss(there, "base", "first", "second", f"third-{method}") == pytest.approx(measured["after"]["loss"], rel=1e-5)
    assert [Path(one["delta"]).name for one in store.manifest_of(there / f"third-{method}")["over"]] == ["first", "second"]


@pytest.mark.parametrize("method", ["houlsby", "prefix", "prompt", "lst"])
def test_a_branch_trains_over_updates_of_weights(there: Path, method: str) -> None:
    over, name = [str(there / "first"), str(there / "second")], str(there / "text.txt")
    result = run(there, f"branch-{method}", over=over, method=method)
    measured = result["evaluation"][name]
    second = json.loads((there / "second" / "run" / "result.json").read_text())["evaluation"][name]
    if method in ("houlsby", "lst"):  # which start as nothing
        assert measured["before"]["loss"] == pytest.approx(second["after"]["loss"], rel=1e-6)
    assert measured["after"]["loss"] < measured["before"]["loss"]
    assert loss(there, "base", "first", "second", f"branch-{method}") == pytest.approx(measured["after"]["loss"], rel=1e-6)
    with pytest.raises(EspalierError, match=f"was trained over {there / 'first'}"):
        load(there / "base", [there / f"branch-{method}"])
    with pytest.raises(EspalierError, match="holds branches; a new one can be trained over updates of weights only"):
        run(there, "x", over=[*over, str(there / f"branch-{method}")], rank=2)


@pytest.mark.parametrize("method", ["lora", "houlsby"])
def test_a_chain_trains_on_codes(there: Path, method: str) -> None:
    """The deltas below are those of the base as it is on disk; the new one is recorded as trained on its codes, over them."""
    over, name = [str(there / "first"), str(there / "second")], str(there / "text.txt")
    result = run(there, f"coded-{method}", over=over, method=method, base_bits=8, learning_rate=0.005)
    measured = result["evaluation"][name]
    second = json.loads((there / "second" / "run" / "result.json").read_text())["evaluation"][name]
    assert measured["before"]["loss"] == pytest.approx(second["after"]["loss"], rel=0.02)
    assert measured["after"]["loss"] < measured["before"]["loss"]
    manifest = store.manifest_of(there / f"coded-{method}")
    assert manifest["training"]["base_bits"] == 8 and len(manifest["over"]) == 2
    assert loss(there, "base", "first", "second", f"coded-{method}") == pytest.approx(measured["after"]["loss"], rel=0.02)


def test_one_line_says_what_cannot_be_trained_over(there: Path) -> None:
    run(there, "tokens", add_tokens="flibber", rank=2, steps=1)
    with pytest.raises(EspalierError, match="brings tokens"):
        run(there, "x", over=[str(there / "tokens")], rank=2)
    with pytest.raises(EspalierError, match="statistics of the base"):
        run(there, "x", over=[str(there / "first")], method="eva")
    with pytest.raises(EspalierError, match="was trained over"):
        run(there, "x", over=[str(there / "second")], rank=2)


def test_in_ones_own_loop_the_chain_is_recorded_too(there: Path, tmp_path: Path) -> None:
    model = load(there / "base", [there / "first"])
    attach(model, "lora", rank=2, name="mine")
    assert all("espalier" in name and name.endswith((":mine.A", ":mine.B")) for name in trainable_parameters(model))
    save(model, tmp_path / "mine", name="mine", base=there / "base")
    assert [one["sha256"] for one in store.manifest_of(tmp_path / "mine")["over"]] == [store.manifest_of(there / "first")["sha256"]]
    detach(model, "mine")
    assert list(attachments(model)) == ["delta0"]
    with pytest.raises(EspalierError, match="stand on the base alone"):
        convert(str(there / "second"), str(tmp_path / "dense"), to="dense", model=str(there / "base"), quiet=True)
