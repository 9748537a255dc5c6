"""Ladder side-tuning: nothing of the model is kept for the backward pass, and the memory shows it."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, HIDDEN, config, tiny, tokens

from espalier import registry
from espalier.anatomy.narrowing import Taken, narrowing
from espalier.anatomy.parameters import parameters
from espalier.anatomy.structure import anatomy, logical_tensors
from espalier.anatomy.symmetry import symmetries
from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.branch.lst import Ladder
from espalier.errors import EspalierError
from espalier.plan.trace import trace_step


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)


def kept_for_backward(method: str) -> list[torch.Size]:
    """Shapes of what a forward pass keeps, parameters of the model aside."""
    model = copy.deepcopy(tiny("llama", num_hidden_layers=4))
    attach(model, method)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Size] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.dim() > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.model(tokens()).last_hidden_state.sum()
    return list(kept.values())


def test_no_backbone_activation_is_saved_but_what_the_rungs_read() -> None:
    """"no tensor of the backbone requires grad and no backbone activation is saved for backward"."""
    wide = [shape for shape in kept_for_backward("lst") if shape[-1] >= HIDDEN]
    assert len(wide) == 5 + 1  # the embedding, the outputs of four blocks; and W_up s, for the gate
    assert len([shape for shape in kept_for_backward("lora") if shape[-1] >= HIDDEN]) > 20


def test_no_gradient_goes_into_the_model() -> None:
    model = copy.deepcopy(tiny("llama"))
    attach(model, "lst")
    randomize(model)
    found = []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: found.append((output[0] if isinstance(output, tuple) else output).requires_grad))
    model(tokens()).logits.sum().backward()
    assert found == [False, False]


def test_the_peak_memory_of_a_step_is_far_below_loras() -> None:
    """"69% of training memory saved vs 26% for LoRA/adapters": by what the planner counts for one step."""
    shape = config("llama", hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512)
    peaks = {
        method: trace_step(
            shape, registry.make(method, registry.ATTACHED), {"targets": targets}, dtype=torch.float32, tokens=1024, sequence_length=512, recompute=False, chunk=64
        ).peak
        for method, targets in (("full", "all"), ("lora", "linear"), ("lst", "model"))
    }
    assert peaks["lst"] < 0.35 * peaks["full"] and peaks["lst"] < 0.4 * peaks["lora"], peaks


def test_the_side_network_has_about_one_part_in_r_squared_of_the_blocks() -> None:
    """"side parameter count about 1/R^2 of the backbone blocks"."""
    model = copy.deepcopy(tiny("llama", hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=8))
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    attach(model, "lst", reduction=4)
    side = sum(p.numel() for n, p in trainable_parameters(model).items() if ".side__layers" in n)
    assert blocks / 16 <= side <= 1.1 * blocks / 16


def test_a_closed_gate_is_the_base() -> None:
    """"with mu_f -> 0 output equals base"."""
    model = copy.deepcopy(tiny("gpt2"))
    before = model(tokens()).logits
    attach(model, "lst")
    randomize(model)
    assert (model(tokens()).logits - before).abs().max() > 1e-3
    (branch,) = attachments(model)["lst"].branches.values()
    branch.gate.data.fill_(-100)
    assert torch.equal(model(tokens()).logits, before)


def test_rungs_stand_at_every_so_manieth_block_and_the_last() -> None:
    model = copy.deepcopy(tiny("llama", num_hidden_layers=5))
    attach(model, "lst", every=2)
    (branch,) = attachments(model)["lst"].branches.values()
    assert branch._machine.rungs == [0, 2, 4]
    assert len({n.split("__")[2] for n in branch.names if n.startswith("side__layers")}) == 3
    with pytest.raises(EspalierError, match="every is 0"):
        attach(model, "lst", every=0)


def importances(model: torch.nn.Module, seed: int = 3) -> Callable[[str, str], torch.Tensor]:
    """A Fisher information for every parameter, as calibration gives it: in the orientation of the file."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def statistic(name: str, which: str) -> torch.Tensor:
        assert which == "fisher"
        return torch.rand(shapes[name], dtype=torch.float64, generator=torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))) ** 4

    return statistic


def pruned(family: str, reduction: int = 2, every: int = 1, **overrides: Any) -> tuple[torch.nn.Module, Any, dict[str, Taken]]:
    """A model, its branch, and where the side network's parameters come from."""
    model = copy.deepcopy(tiny(family, **overrides))
    statistic = importances(model)
    attach(model, "lst", reduction=reduction, every=every, initialization="pruned", statistics=statistic)
    (branch,) = attachments(model)["lst"].branches.values()
    known = {target.name: target for target in parameters(model)}

    def importance(name: str) -> torch.Tensor:
        return statistic(name, "fisher").mT if known[name].transposed else statistic(name, "fisher")

    return model, branch, narrowing(model, branch._machine.side, branch._machine.rungs, importance)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_index_set_of_the_residual_stream_is_the_same_in_all_side_tensors(family: str) -> None:
    """"index set for the residual axis identical in all side tensors", and every number is one of the model's."""
    model, branch, taken = pruned(family)
    weights, shapes = logical_tensors(model), {t.name: t.shape for t in parameters(branch._machine.side)}
    width = branch._machine.up.in_features
    assert width < HIDDEN
    side = {target.name: target for target in parameters(branch._machine.side)}
    for name, source in taken.items():
        value = getattr(branch, f"side__{name.replace('.', '__')}").detach()
        value = value.mT if side[name].transposed else value
        assert value.shape == shapes[name]
        assert set(value.flatten().tolist()) <= set(weights[source.name].flatten().tolist())
    stream = {(member.name, member.axis - weights[member.name].dim()) for member in symmetries(model).residual.members}
    index = {tuple(source.axes[axis].tolist()) for source in taken.values() for name, axis in stream if source.name == name}
    assert len(index) == 1 and len(set(*index)) == width
    assert len({name for name, _ in stream} - {source.name for source in taken.values()}) <= 6, "all but the table and the head"
    assert set(side) - set(taken) == {anatomy(branch._machine.side).embedding}


def test_inner_dimensions_are_chosen_in_every_block_for_itself_and_alike_in_what_shares_them() -> None:
    _, branch, taken = pruned("llama", reduction=2)
    channels = []
    for block in anatomy(branch._machine.side).blocks:
        half = block.feed_forward
        assert half.gate is not None
        chosen = taken[half.down.weight].axes[-1].tolist()
        assert taken[half.up.weight].axes[-2].tolist() == taken[half.gate.weight].axes[-2].tolist() == chosen
        assert taken[block.attention.q.weight].axes[-2].tolist() == taken[block.attention.o.weight].axes[-1].tolist()
        assert torch.equal(taken[block.attention.k.weight].axes[-2], taken[block.attention.v.weight].axes[-2])
        channels.append(chosen)
    assert channels[0] != channels[1]


def test_the_most_important_units_stay() -> None:
    """Top channels, heads and residual units by summed Fisher information, of a model whose important ones are known."""
    model = copy.deepcopy(tiny("llama", num_key_value_heads=4))
    attach(model, "lst", reduction=2, initialization="pruned", statistics=lambda name, which: marked(model, name))
    (branch,) = attachments(model)["lst"].branches.values()
    weights = logical_tensors(model)
    for i in range(2):
        q, down = (weights[f"model.layers.{i}.{name}.weight"] for name in ("self_attn.q_proj", "mlp.down_proj"))
        own = {name: getattr(branch, f"side__layers__{i}__{name}__weight") for name in ("self_attn__q_proj", "mlp__down_proj")}
        assert torch.equal(own["self_attn__q_proj"], q[8:24, 10:26]), "heads 1 and 2, units 10 to 25"
        assert torch.equal(own["mlp__down_proj"], down[10:26, 20:44]), "channels 20 to 43"


def marked(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Importance of residual units 10 to 25, of heads 1 and 2 and of channels 20 to 43."""
    stream, heads, channels = (torch.zeros(n, dtype=torch.float64) for n in (32, 32, 48))
    stream[10:26], heads[8:24], channels[20:44] = 1, 1, 1
    inner = heads if "self_attn" in name else channels
    outer = torch.outer(stream, inner)
    return outer if "o_proj" in name or "down_proj" in name else outer.T


def test_heads_that_are_larger_than_the_models_are_made_of_several() -> None:
    """GPT-2's widths are such that R = 8 leaves one head of 96 dimensions, where the model's twelve have 64."""
    model, branch, taken = pruned("gpt2", reduction=8, n_embd=96, n_head=12)
    attention = anatomy(branch._machine.side).blocks[0].attention
    rows = taken[attention.q.weight].axes[-2]
    assert (attention.heads, attention.head_dim) == (1, 16) and len(set(rows.tolist())) == len(rows) == 3 * 16
    assert {int(row) // 8 for row in rows[:16]} == {int(row) // 8 - 12 for row in rows[16:32]} and len({int(row) // 8 for row in rows[:16]}) == 2
    with torch.no_grad():
        assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_narrowing_the_pruned_side_network_is_the_model(family: str) -> None:
    """R = 1, every block: what is left of the model is all of it, so its blocks do what the model's do."""
    model, branch, taken = pruned(family, reduction=1, **({"num_key_value_heads": 4} if family == "llama" else {}))
    backbone = model.model if family == "llama" else model.transformer
    own = dict(backbone.named_parameters())
    for name in taken:
        assert torch.equal(getattr(branch, f"side__{name.replace('.', '__')}"), own[name]), name


def test_a_pruned_start_needs_the_statistics_and_trains() -> None:
    with pytest.raises(EspalierError, match=r"lst starts from statistics of the data \(fisher\); pass statistics="):
        attach(copy.deepcopy(tiny("llama")), "lst", initialization="pruned")
    before = copy.deepcopy(tiny("llama"))(tokens()).logits
    model, _, _ = pruned("llama", every=2)
    assert torch.equal(model(tokens()).logits, before), "the start is the base"
    model(tokens(), labels=tokens()).loss.backward()


def test_a_tuple_may_be_asked_for() -> None:
    model, x = tiny("llama"), tokens()
    attach(model, "lst")
    (hidden, *_), named = model.model(x, return_dict=False), model.model(x)
    torch.testing.assert_close(hidden, named.last_hidden_state)


def test_what_each_block_is_comes_along_with_its_rung() -> None:
    from transformers import SmolLM3Config

    config = SmolLM3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        no_rope_layers=[1, 0, 1, 0], pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ladder = Ladder(config, 2, 2)
    assert ladder.rungs == [1, 3] and list(ladder.side.config.no_rope_layers) == [0, 0]


def test_lists_of_numbers_of_blocks_and_of_tokens_are_not_of_what_each_block_is() -> None:
    from transformers import Qwen2MoeConfig

    config = Qwen2MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0, 1], eos_token_id=[5, 7],
    )  # fmt: skip
    ladder = Ladder(config, 2, 2)
    assert ladder.rungs == [1] and ladder.side.config.mlp_only_layers == [0] and ladder.side.config.eos_token_id == [5, 7]
    assert type(ladder.side.layers[0].mlp).__name__ == "Qwen2MoeMLP"
