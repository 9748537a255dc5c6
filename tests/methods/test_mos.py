"""MoS (ICLR 2025): factors assembled from shards of shared pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.load import load
from espalier.checkpoint.safetensors_file import SafetensorsFile
from espalier.delta import store
from espalier.delta.forms import Pooled
from espalier.errors import EspalierError
from espalier.exchange.save import save


def mos(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "mos", name="d", **{"rank": 6, "equivalent_rank": 2, "private": 1, "shards": 4, **options})
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def groups(attachment: Attachment) -> dict[tuple[int, int], list[str]]:
    """Shape -> names of its parameters, in order."""
    found: dict[tuple[int, int], list[str]] = {}
    for target in attachment.targets:
        found.setdefault((target.outputs, target.inputs), []).append(target.name)
    return found


def pooled(attachment: Attachment) -> dict[str, Pooled]:
    return {name: update for name, update in attachment.updates().items() if isinstance(update, Pooled)}


def test_the_delta_is_zero_at_the_start() -> None:
    model, attachment = mos()
    assert len(pooled(attachment)) == 14
    for name, update in pooled(attachment).items():
        assert not update.materialize(model.get_parameter(name)).any()
        assert update.low_rank().A.abs().min() > 0, "and A is not"
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits)


@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("gpt2", "attention,mlp"), ("qwen3_moe", "experts")])
@pytest.mark.parametrize(("equivalent_rank", "shards"), [(1, 1), (2, 4), (3, 2)])
def test_it_trains_what_a_lora_of_the_equivalent_rank_would(family: str, targets: str, equivalent_rank: int, shards: int) -> None:
    """The paper's count: L e (in + out) numbers, whatever the materialised rank."""
    _, attachment = mos(family, targets=targets, equivalent_rank=equivalent_rank, shards=shards, rank=7)
    experts = 4 if family == "qwen3_moe" else 1
    expected = sum(len(names) * experts * equivalent_rank * (o + i) for (o, i), names in groups(attachment).items())
    assert attachment.trainable() == expected
    rival = attach(tiny(family), "lora", targets=targets, rank=equivalent_rank, name="d")
    assert attachments(rival)["d"].trainable() == expected


def test_the_materialised_rank_is_beyond_the_equivalent_and_within_the_declared() -> None:
    model, attachment = mos(rank=6, equivalent_rank=2)
    shake(model)
    for name, update in pooled(attachment).items():
        assert torch.linalg.matrix_rank(update.materialize(model.get_parameter(name)), rtol=1e-4) == 6


def test_the_first_ranks_of_a_layer_are_its_own_shards_once_each() -> None:
    """Privatization: public shards come first in the pool, then ``private * shards`` of each layer's own."""
    _, attachment = mos(rank=6, equivalent_rank=3, private=2)
    for names in groups(attachment).values():
        public = len(names) * (3 - 2) * 4
        for factor in ("index_A", "index_B"):
            owned = [getattr(pooled(attachment)[name], factor).long() for name in names]
            for layer, index in enumerate(owned):
                first = public + layer * 2 * 4
                assert index[:2].flatten().tolist() == list(range(first, first + 2 * 4))
                assert int(index[2:].max()) < public


def test_private_shards_receive_no_gradient_from_other_layers() -> None:
    model, attachment = mos(rank=5, equivalent_rank=2, private=1)
    shake(model)
    assert attachment.pool is not None
    names = groups(attachment)[48, 32]
    public = len(names) * (2 - 1) * 4
    for layer, name in enumerate(names):
        attachment.pool.prepare()
        model.zero_grad()
        attachment.slots[name].update().matmul(torch.randn(9, 32)).square().sum().backward()
        for factor in "AB":
            gradient = getattr(attachment.pool, f"{factor}_48x32").grad
            touched = set(torch.nonzero(gradient.abs().sum(1)).flatten().tolist())
            own = set(range(public + layer * 4, public + layer * 4 + 4))
            index = set(getattr(attachment.pool, f"index_{factor}_48x32")[layer].flatten().tolist())
            assert touched == index
            assert own <= touched <= own | set(range(public))
    assert all(p.grad is None for n, p in attachment.pool.named_parameters() if not n.endswith("_48x32"))


@pytest.mark.parametrize(("rank", "equivalent_rank", "private"), [(6, 2, 1), (9, 2, 0), (4, 4, 2), (20, 1, 0), (7, 2, 2)])
def test_other_ranks_draw_shards_without_replacement_while_they_last(rank: int, equivalent_rank: int, private: int) -> None:
    """Each layer uses every shard that it may draw equally often, but for the last round."""
    _, attachment = mos(rank=rank, equivalent_rank=equivalent_rank, private=private)
    for names in groups(attachment).values():
        public = len(names) * (equivalent_rank - private) * 4
        for layer, name in enumerate(names):
            for factor in ("index_A", "index_B"):
                drawn = getattr(pooled(attachment)[name], factor).long()[private:].flatten()
                first, size = (0, public) if public else (layer * private * 4, private * 4)
                counts = torch.bincount(drawn - first, minlength=size)
                assert int(drawn.min()) >= first and len(counts) == size
                assert int(counts.max() - counts.min()) <= 1


def test_rows_of_a_and_columns_of_b_are_drawn_apart() -> None:
    """Pair dissociation; and layers draw apart too."""
    _, attachment = mos()
    for names in groups(attachment).values():
        updates = [pooled(attachment)[name] for name in names]
        assert all(not torch.equal(u.index_A[1:], u.index_B[1:]) for u in updates)
        assert len({tuple(u.index_A[1:].flatten().tolist()) for u in updates}) == len(updates)


def test_with_one_shard_and_every_rank_private_it_is_lora_bit_for_bit() -> None:
    """The limit case of the paper. Layer k's private shards are indexed once each and in order, for A and B alike, so its
    factors are rows k r to (k + 1) r of the pools, as they lie: no permutation is left over."""
    model, attachment = mos(rank=3, equivalent_rank=3, private=3, shards=1, alpha=5.0)
    shake(model)
    rival = attach(tiny("llama"), "lora", rank=3, alpha=5.0, name="d")
    for (outputs, inputs), names in groups(attachment).items():
        for layer, name in enumerate(names):
            assert pooled(attachment)[name].index_A.flatten().tolist() == list(range(3 * layer, 3 * layer + 3))
            slot = attachments(rival)["d"].slots[name]
            A, B = [getattr(attachment.pool, f"{f}_{outputs}x{inputs}").detach()[3 * layer : 3 * layer + 3] for f in "AB"]
            # B lies in memory as the pool holds it, by columns: another layout may round products otherwise
            slot.A, slot.B = torch.nn.Parameter(A.clone()), torch.nn.Parameter(B.clone().T)
    x = tokens()
    for _ in range(3):
        losses = [m(x, labels=x).loss for m in (model, rival)]
        assert torch.equal(losses[0], losses[1])
        for loss, m in zip(losses, (model, rival), strict=True):
            m.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in trainable_parameters(m).values():
                    p -= 0.1 * p.grad
    assert torch.equal(model(x).logits, rival(x).logits)
    assert not torch.allclose(model(x).logits, tiny("llama")(x).logits, atol=0.1)


def test_the_pool_of_a_starts_as_the_whole_vectors_of_a_lora_would() -> None:
    """Uniform within 1 / sqrt(in) of the full input, not of a shard's; B starts at zero."""
    _, attachment = mos(equivalent_rank=4, private=0)
    for outputs, inputs in groups(attachment):
        largest = float(getattr(attachment.pool, f"A_{outputs}x{inputs}").detach().abs().max())
        assert 0.9 * inputs**-0.5 < largest <= inputs**-0.5
        assert not getattr(attachment.pool, f"B_{outputs}x{inputs}").any()


def test_indices_and_starts_are_drawn_by_the_seed_alone() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        _, attachment = mos(seed=seed)
        assert attachment.pool is not None
        states.append({n: t.clone() for n, t in attachment.pool.state_dict().items()})
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[2][name]) == name.startswith("B_"), name


def test_the_pools_are_stored_once_and_never_expanded(tmp_path: Path) -> None:
    """Saving the assembled factors would throw the method's saving away on disk."""
    tiny("llama").save_pretrained(tmp_path / "base")
    model, attachment = mos(rank=16, equivalent_rank=1, private=0)
    shake(model)
    size = save(model, tmp_path / "delta", base=tmp_path / "base")["bytes"]
    trained, indices = 4 * attachment.trainable(), sum(2 * 4 * u.index_A.numel() for u in pooled(attachment).values())
    with SafetensorsFile(tmp_path / "delta" / store.TENSORS) as file:
        assert sum(i.nbytes for i in file.tensors.values()) == trained + indices
        pools = {n: i.dtype for n, i in file.tensors.items() if n.startswith("shared:")}
        assert len(pools) == 2 * len(groups(attachment)) and set(pools.values()) == {"F32"}
        assert {i.dtype for n, i in file.tensors.items() if ":index_" in n} == {"I32"}
    assert size < trained + indices + 8000
    delta = store.load(tmp_path / "delta")
    assert delta.nbytes == trained + indices
    expanded = sum(4 * 16 * sum(u.shape) for u in delta.updates.values())
    assert delta.nbytes < expanded / 4
    names = groups(attachment)[48, 32]
    assert len({delta.updates[name].tensors()["A"].data_ptr() for name in names}) == 1, "and read once"
    loaded = load(tmp_path / "base", [tmp_path / "delta"])
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)


class Gathers(TorchDispatchMode):
    """Counts reads by index."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.index.Tensor
        return func(*args, **(kwargs or {}))


def test_a_forward_reads_each_pool_once_however_many_layers_there_are() -> None:
    counts = []
    for layers in (1, 3):
        bare = tiny("llama", num_hidden_layers=layers)
        with Gathers() as plain:
            bare(tokens())
        model = attach(bare, "mos", name="d")
        with Gathers() as gathers:
            model(tokens())
        assert gathers.count - plain.count == 2 * len(groups(attachments(model)["d"]))
        counts.append(gathers.count - plain.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"shards": 5}, r"shards is 5, which does not divide model\.layers\.0\.self_attn\.q_proj\.weight of 32 x 32"),
        ({"private": 3}, r"private is 3; it must be from 0 to equivalent_rank and rank \(2, 6\)"),
        ({"private": -1}, "private is -1"),
        ({"rank": 1, "private": 2}, r"private is 2"),
        ({"equivalent_rank": 0}, "equivalent_rank is 0; it must be at least 1"),
        ({"shards": 0}, "shards is 0; it must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, int], complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        mos(**options)
