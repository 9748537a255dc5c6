"""BANG: ``tune --label-smoothing``, the confidence of both ends, and WiSE-FT between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch.nn import functional

import espalier
from espalier.data.batches import Cursor, Order, divide, make_batch, next_step
from espalier.data.encode import Encoder
from espalier.data.sources import open_source
from espalier.data.store import open_store
from espalier.delta import store
from espalier.errors import EspalierError
from espalier.memory.training_form import training_form
from espalier.train.steps import Losses, accumulate, targets_of


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"def double_{i}(x):\n    return x * {2 * i}\n\n\n" for i in range(120)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    from espalier.checkpoint.directory import resolve_model

    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tiny("gpt2", vocab_size=4096).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder)
    return folder


def tuned(model: Path, text: Path, out: Path, **options: Any) -> dict[str, Any]:
    return espalier.tune(
        str(model), str(text), str(out), steps=30, batch_size=2, sequence_length=32, learning_rate=0.01, method="full",
        eval_data=[str(text)], micro_batch_size=2, recompute=False, checkpoint_every=0, threads=1, quiet=True, **options,
    )  # fmt: skip


def test_a_steps_loss_and_gradients_are_those_of_torch_with_smoothed_labels(model: Path, text: Path) -> None:
    from transformers import AutoTokenizer

    live = tiny("gpt2", vocab_size=4096)
    found = open_store(open_source(str(text)), Encoder(AutoTokenizer.from_pretrained(model)))
    windows = next_step(Order(found, 32, 0), Cursor(), 64)
    batches = [make_batch(found, part, 40, True, 0) for part in divide(windows, 40, True)]
    with training_form(live, chunk=7, recompute=False, padded=True):
        loss, count = accumulate(Losses(live, label_smoothing=0.2), batches), targets_of(batches)
    ours = {n: p.grad.clone() for n, p in live.named_parameters() if p.grad is not None}
    live.zero_grad()
    parts = []
    for batch in batches:
        logits = live(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
        parts.append(functional.cross_entropy(logits[batch.rows] if batch.rows is not None else logits, batch.targets, label_smoothing=0.2, reduction="sum"))
    expected = sum(parts) / count
    expected.backward()  # type: ignore[union-attr]
    assert loss == pytest.approx(float(expected), rel=1e-5)
    for name, parameter in live.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_smoothed_labels_make_a_model_less_confident_and_the_plan_stays_as_it_is(model: Path, text: Path, tmp_path: Path) -> None:
    plain, smooth = (tuned(model, text, tmp_path / str(share), label_smoothing=share) for share in (0.0, 0.4))
    parts = [{**result["plan"]["phases"]["steady state"], "libraries": 0} for result in (plain, smooth)]  # what this process holds already grows
    assert parts[0] == parts[1] and parts[0]["activations"] + parts[0]["gradients"] > 0
    before, sure, unsure = (r["evaluation"][str(text)][when]["confidence"] for r, when in ((plain, "before"), (plain, "after"), (smooth, "after")))
    assert 0 < before < 1 and unsure < sure - 0.05
    assert plain["evaluation"][str(text)]["before"] == smooth["evaluation"][str(text)]["before"], "what is measured is not smoothed"
    assert "label_smoothing" not in store.load(tmp_path / "0.0").manifest["training"]
    assert store.load(tmp_path / "0.4").manifest["training"]["label_smoothing"] == 0.4
    # BANG: half way between the base and the tuned model; the delta's scale says the same
    espalier.merge([str(tmp_path / "0.4")], str(tmp_path / "half"), method="wise_ft", alpha=0.5, quiet=True)
    options: dict[str, Any] = {"sequence_length": 32, "quiet": True}
    merged = espalier.eval(str(tmp_path / "half"), str(text), **options)
    scaled = espalier.eval(str(model), str(text), delta=[str(tmp_path / "0.4")], scale=0.5, **options)
    assert merged["confidence"] == pytest.approx(scaled["confidence"], rel=1e-4) and 0 < merged["confidence"] < 1


def test_confidence_is_the_mean_of_the_largest_probability(model: Path, text: Path) -> None:
    from transformers import AutoTokenizer

    short = text.parent / "short.txt"
    short.write_text("def f(x):\n")
    found = espalier.eval(str(model), str(short), quiet=True, sequence_length=32)
    encoder = Encoder(AutoTokenizer.from_pretrained(model))
    ids = torch.tensor([[*encoder.prefix, *encoder.ids(["def f(x):\n"])[0], *encoder.end]])
    with torch.no_grad():
        expected = espalier.load(model)(ids[:, :-1]).logits.softmax(-1).amax(-1).mean()
    assert found["tokens"] == ids.shape[1] - 1 and found["confidence"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share: float, model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="label_smoothing is"):
        tuned(model, text, tmp_path / "out", label_smoothing=share)
    assert not (tmp_path / "out" / store.MANIFEST).exists()
