"""S2FT (#250): slices of heads and channels, wherever a family keeps them."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import loops
import peft
import pytest
import torch
from families import tiny, tokens

from espalier import convert
from espalier.anatomy.parameters import parameters
from espalier.anatomy.structure import anatomy, couplings, permute
from espalier.anatomy.units import units_of
from espalier.attach.attachment import Attachment, attach, attachments, settle, trainable_parameters
from espalier.attach.load import load, load_model
from espalier.errors import EspalierError
from espalier.exchange.save import save

FAMILIES = {
    "qwen2": "linear",  # grouped queries, biases
    "gpt2": "linear",  # one matrix for q, k and v, stored as (in, out)
    "gpt_neox": "linear",  # the same, head by head
    "phi3": "linear",  # q, k, v and gate, up in one matrix each, grouped queries
    "qwen3": "linear",  # heads that are wider than hidden / heads
    "qwen3_moe": "linear",
    "gpt_oss": "linear",  # gate and up of experts row by row
}
SHARES = {"heads": 0.3, "channels": 0.2}


def s2ft(family: str, layers: int = 2, **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family, num_hidden_layers=layers), "s2ft", name="d", **options)
    return model, attachments(model)["d"]


def train(model: torch.nn.Module, steps: int = 3) -> None:
    loops.train_on(model, [tokens(seed=seed) for seed in range(steps)], weight_decay=0.1)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(tokens()).logits


def logical(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    stored = dict(model.named_parameters())
    return {t.name: (stored[t.name].mT if t.transposed else stored[t.name]).detach().clone() for t in parameters(model)}


def members(model: torch.nn.Module, kind: str) -> set[tuple[str, int, int, int | None]]:
    """(parameter, axis, index, expert) of everything that belongs to a unit, as the couplings of the whole model say."""
    return {
        (m.name, m.axis, int(i), m.expert)
        for c in couplings(anatomy(model))
        if c.kind in kind
        for m in c.members
        for i in m.indices(c.units).flatten()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_unselected_rows_and_columns_are_bit_identical_after_training_and_the_selected_are_whole_heads_and_channels(family: str) -> None:
    """Check (3); and the units are those of the model's anatomy: "index error under grouped-query attention" is the trap."""
    base = tiny(family)
    before = logical(base)
    model, attachment = s2ft(family, targets=FAMILIES[family], **SHARES)
    train(model)
    after = logical(settle(model))
    known = members(base, "channels groups heads")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n, slot in attachment.slots.items() if slot.index.numel()}
    for name, slot in attachment.slots.items():
        kinds = units_of(slot.target)
        moved = (before[name] != after[name]).any(-1 if kinds[0].axis == 0 else -2)
        chosen = torch.zeros_like(moved).scatter(-1, slot.index, True)
        assert torch.equal(moved, chosen)
        for units in kinds:
            whole = chosen[..., units.indices(torch.arange(units.count))].unflatten(-1, (units.count, units.width))
            assert torch.equal(whole.all(-1), whole.any(-1))
        for expert, index in enumerate(slot.index if slot.target.lead else [slot.index]):
            assert all((name, kinds[0].axis, int(i), expert if slot.target.lead else None) in known for i in index)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi3", "gpt_oss"])
def test_the_matrices_of_a_block_train_the_same_heads_and_channels(family: str) -> None:
    _, attachment = s2ft(family, targets="linear", heads=0.5, channels=0.2)
    of: dict[Any, list[torch.Tensor]] = {}
    for slot in attachment.slots.values():
        first = 0
        for units in units_of(slot.target):
            places = units.indices(torch.arange(units.count)).reshape(units.count, units.width)
            chosen = torch.stack([(slot.index.unsqueeze(-1) == p[0]).any(-1).any(-1) for p in places], -1)
            of.setdefault((slot.target.block, units.kind, units.count), []).append(chosen)
            first += 1
        assert first
    assert all(torch.equal(one, some[0]) for some in of.values() for one in some)
    assert sum(len(some) > 1 for some in of.values()) >= 4


def test_a_permutation_that_makes_the_selection_one_block_leaves_logits_unchanged_and_trains_the_same() -> None:
    """Check (1): the paper's co-permutation; ours are "indices in the original order", on the layout as it is."""
    model, attachment = s2ft("llama", targets="mlp", channels=0.2)
    moved = tiny("llama")
    orders = {}
    for coupling in couplings(anatomy(moved)):
        if coupling.kind == "channels":
            down = attachment.slots[f"model.layers.{coupling.block}.mlp.down_proj.weight"]
            rest = [c for c in range(coupling.units) if c not in down.index]
            orders[coupling.block] = (coupling, [*down.index.tolist(), *rest])
    for coupling, order in orders.values():
        permute(moved, coupling, order)
    torch.testing.assert_close(logits(moved), logits(tiny("llama")), rtol=1e-5, atol=1e-5)
    train(model)
    with torch.no_grad():
        for name, slot in attachment.slots.items():
            weight = moved.get_parameter(name)
            block = weight[: len(slot.index)] if "down" not in name else weight[:, : len(slot.index)]
            block += slot.values
    torch.testing.assert_close(logits(moved), logits(model), rtol=1e-5, atol=1e-5)
    for coupling, order in orders.values():  # and it is invertible
        permute(moved, coupling, [order.index(c) for c in range(len(order))])
    merged = settle(model)
    for name, tensor in moved.named_parameters():
        torch.testing.assert_close(tensor, merged.get_parameter(name), rtol=0, atol=1e-7)


def test_units_are_drawn_over_all_layers_together_so_that_counts_differ_and_can_be_zero() -> None:
    model, attachment = s2ft("llama", 6, targets="mlp.down", channels=0.02, seed=1)
    counts = [len(slot.index) for slot in attachment.slots.values()]
    assert sum(counts) == 6 and 0 in counts and max(counts) > 1
    assert sum(p.numel() for p in trainable_parameters(model).values()) == 6 * 32
    train(model)
    draws = Counter(
        (slot.target.block, i)
        for seed in range(30)
        for slot in s2ft("llama", 3, targets="mlp.down", channels=0.25, seed=seed)[1].slots.values()
        for i in slot.index.tolist()
    )
    assert len(draws) >= 3 * 48 - 2 and max(draws.values()) < 20 and sum(draws.values()) == 30 * 36
    assert s2ft("llama", seed=4)[1].slots["model.layers.0.mlp.down_proj.weight"].index.tolist() == s2ft("llama", seed=4)[1].slots["model.layers.0.mlp.down_proj.weight"].index.tolist()


def test_every_expert_has_its_own_channels_and_equally_many() -> None:
    _, attachment = s2ft("qwen3_moe", channels=0.25)
    assert set(attachment.slots) == {f"model.layers.{b}.mlp.experts.down_proj" for b in (0, 1)}
    index = [slot.index for slot in attachment.slots.values()]
    assert all(i.shape[0] == 4 for i in index) and sum(i.shape[1] for i in index) == 2 * 4
    assert len({tuple(row) for i in index for row in i.tolist()}) > 2


def brute(scores: dict[int, torch.Tensor], share: float, smallest: bool) -> dict[int, list[int]]:
    ranked = sorted(((float(s), b, i) for b, per in scores.items() for i, s in enumerate(per)), reverse=not smallest)
    chosen = ranked[: round(share * len(next(iter(scores.values())))) * len(scores)]
    return {b: sorted(i for _, c, i in chosen if c == b) for b in scores}


@pytest.mark.parametrize("rank_by", ["largest", "smallest"])
def test_by_weight_the_norm_of_all_that_a_channel_has_decides(rank_by: str) -> None:
    model, attachment = s2ft("llama", 3, targets="mlp.up,mlp.down", channels=0.25, selection="weight", rank_by=rank_by)
    w = logical(tiny("llama", num_hidden_layers=3))
    scores = {
        b: w[f"model.layers.{b}.mlp.up_proj.weight"].square().sum(1) + w[f"model.layers.{b}.mlp.down_proj.weight"].square().sum(0) for b in range(3)
    }
    for block, wanted in brute(scores, 0.25, rank_by == "smallest").items():
        for which in ("up", "down"):
            assert attachment.slots[f"model.layers.{block}.mlp.{which}_proj.weight"].index.tolist() == wanted
    train(model)


def statistic_of(family: str) -> Any:
    """Norms of inputs, and gradients, as a calibration gives them: of a parameter as the model stores it."""
    model = tiny(family)

    def statistic(name: str, which: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name) * 31 + ord(name.split(".")[2][0]))
        weight = model.get_parameter(name)
        return torch.rand(weight.shape if which == "gradient" else (next(t.inputs for t in parameters(model) if t.name == name),), generator=generator).double()

    return statistic


def test_by_activation_heads_are_ranked_by_what_o_reads_and_by_gradient_by_the_gradient_in_its_logical_layout() -> None:
    statistic = statistic_of("llama")
    _, attachment = s2ft("llama", targets="attention.q,attention.o,mlp.down", selection="activation", heads=0.5, channels=0.1, statistics=statistic)
    names = {b: f"model.layers.{b}.self_attn.o_proj.weight" for b in (0, 1)}
    scores = {b: statistic(n, "norm").square().view(4, 8).sum(1) for b, n in names.items()}
    for block, heads in brute(scores, 0.5, False).items():
        rows = [h * 8 + i for h in heads for i in range(8)]
        for which in ("q", "o"):
            assert attachment.slots[f"model.layers.{block}.self_attn.{which}_proj.weight"].index.tolist() == rows
    statistic = statistic_of("gpt2")
    _, attachment = s2ft("gpt2", selection="gradient", channels=0.25, statistics=statistic)
    down = {b: f"transformer.h.{b}.mlp.c_proj.weight" for b in (0, 1)}
    scores = {b: statistic(n, "gradient").square().sum(1) for b, n in down.items()}  # stored as (in, out)
    for block, wanted in brute(scores, 0.25, False).items():
        assert attachment.slots[down[block]].index.tolist() == wanted


def test_what_cannot_be_scored_or_chosen_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"scores channels by what reads them, and --targets has model.layers.0.mlp.up_proj.weight alone"):
        s2ft("llama", targets="mlp.up", selection="activation", statistics=statistic_of("llama"))
    with pytest.raises(EspalierError, match=r"is looked up: it has no input to measure"):
        s2ft("llama", targets="embedding", selection="activation", statistics=statistic_of("llama"))
    with pytest.raises(EspalierError, match=r"starts from statistics of the data \(norm\)"):
        s2ft("llama", selection="activation")
    with pytest.raises(EspalierError, match=r"channels is 1\.5"):
        s2ft("llama", channels=1.5)
    with pytest.raises(EspalierError, match=r"--targets 'mlp.dwn\?' matches no parameter"):
        s2ft("llama", targets="mlp.dwn?")


def test_only_the_slice_of_the_input_of_down_is_kept_for_the_backward_pass() -> None:
    """"Saved-activation bytes of the Down layer = fraction of the full ones."""
    model, attachment = s2ft("llama", channels=0.25)
    slot = attachment.slots["model.layers.0.mlp.down_proj.weight"]
    module, kept = model.get_submodule("model.layers.0.mlp.down_proj"), []
    frozen = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in frozen:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.randn(2, 7, 48, requires_grad=True)).sum().backward()
    assert sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values()) == 2 * 7 * len(slot.index) * 4


@pytest.mark.parametrize(("family", "layers"), [("qwen2", 2), ("llama", 6)], ids=["heads and channels of all", "some layers have none"])
def test_it_is_exported_to_peft_as_lora_losslessly(family: str, layers: int, tmp_path: Path) -> None:
    tiny(family, num_hidden_layers=layers).save_pretrained(tmp_path / "base")
    options = {"targets": "linear", **SHARES} if family == "qwen2" else {"channels": 0.02, "seed": 1}
    model, attachment = s2ft(family, layers, **options)
    train(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    result = convert(str(tmp_path / "delta"), str(tmp_path / "peft"), to="peft", quiet=True)
    assert result["worst"] < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load(tmp_path / "base", [tmp_path / "delta"])), logits(model), rtol=1e-6, atol=1e-6)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert ranks == {len(slot.index) for slot in attachment.slots.values()} - {0}
