"""BitFit (arXiv:2106.10199): biases train, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier import apply
from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.load import load, load_model
from espalier.errors import EspalierError
from espalier.exchange.save import save


def bitfit(family: str = "gpt2", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "bitfit", name="d", **options)
    return model, attachments(model)["d"]


def train(model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["gpt2", "bert", "opt", "qwen2"])
def test_all_biases_train_and_nothing_else(family: str) -> None:
    model, attachment = bitfit(family)
    biases = {name: p for name, p in tiny(family).named_parameters() if name.endswith("bias")}
    assert set(attachment.slots) == set(biases)
    assert attachment.trainable() == sum(p.numel() for p in biases.values()) < 0.1 * sum(p.numel() for p in model.parameters())


def test_only_biases_are_in_the_applied_model(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "base")
    model, _ = bitfit()
    train(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    apply(str(tmp_path / "base"), [str(tmp_path / "delta")], str(tmp_path / "out"), quiet=True)
    before, after = (dict(load_model(tmp_path / folder).named_parameters()) for folder in ("base", "out"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {name for name in before if name.endswith("bias")}
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out")(tokens()).logits, model(tokens()).logits)


def test_the_smaller_set_of_the_paper_is_a_choice_of_targets() -> None:
    """Table 3: the query's bias and that of the feed-forward's first matrix alone."""
    _, attachment = bitfit("bert", targets="attention.q.bias,mlp.up.bias")
    assert [name.split("layer.")[1] for name in attachment.slots] == [
        f"{block}.{name}.bias" for block in (0, 1) for name in ("attention.self.query", "intermediate.dense")
    ]


def test_the_scales_of_norms_train_where_they_are_named() -> None:
    _, attachment = bitfit("llama", targets="norm")
    assert all(name.endswith("norm.weight") and slot.values.shape == (32,) for name, slot in attachment.slots.items())
    assert len(attachment.slots) == 2 * 2 + 1


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"--targets 'bias' matches no parameter of this model \(roles: "):
        bitfit("llama")
