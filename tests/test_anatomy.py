"""Anatomy: roles, blocks, heads and channels of every family, what moves together, and names in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS, FAMILIES, HEADS, HIDDEN, LAYERS, TIED, VOCABULARY, config, tiny, tokens
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from espalier import attach
from espalier.anatomy.layout import Piece, locate, place
from espalier.anatomy.parameters import parameters, select
from espalier.anatomy.site import select_sites, sites
from espalier.anatomy.structure import Anatomy, Part, anatomy, couplings, logical_tensors, permute
from espalier.checkpoint.directory import ModelDirectory
from espalier.errors import EspalierError

UNGROUPED = ("gpt2", "gpt_neox", "opt", "bert")  # as many key-value heads as heads
GATED = tuple(name for name in FAMILIES if name not in UNGROUPED)
CHANNELS = {"qwen2_moe": 16, "qwen3_moe": 16}
HEAD_DIM = {"qwen3": 16, "gemma": 16}

every_family = pytest.mark.parametrize("family", FAMILIES)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((before - after).abs().max())


def shuffled(units: int, seed: int = 0) -> list[int]:
    """A permutation that leaves no unit where it was."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[(order.index(unit) + 1) % units] for unit in range(units)]


# roles


@every_family
def test_every_parameter_has_a_role(family: str) -> None:
    assert [t.name for t in parameters(tiny(family)) if any(role.startswith("other") for role in t.roles)] == []


@every_family
def test_every_parameter_of_the_model_is_listed_once_with_all_its_names(family: str) -> None:
    model = tiny(family)
    names = [name for target in parameters(model) for name in target.names]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, _ in model.named_parameters(remove_duplicate=False)}


@every_family
def test_logical_shapes_are_out_by_in(family: str) -> None:
    for target in parameters(tiny(family)):
        if target.role in ("attention.o", "mlp.down", "experts.down"):
            assert target.outputs == HIDDEN, target
        if target.role in ("attention.q", "attention.qkv", "mlp.up", "mlp.gate", "experts.gate_up"):
            assert target.inputs == HIDDEN, target


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "qwen3_moe"])
def test_a_model_that_carries_a_delta_has_the_targets_of_the_bare_model(family: str) -> None:
    model = tiny(family)
    before = parameters(model)
    attach(model, "lora", targets="attention,mlp,embedding" if family != "qwen3_moe" else "linear")
    assert parameters(model) == before


# the anatomy


@every_family
def test_blocks_heads_and_channels_are_those_of_the_config(family: str) -> None:
    model = tiny(family)
    found = anatomy(model)
    assert (found.family, found.hidden_size, found.vocabulary) == (model.config.model_type, HIDDEN, VOCABULARY)
    assert [block.index for block in found.blocks] == list(range(LAYERS))
    for block in found.blocks:
        assert isinstance(model.get_submodule(block.path), nn.Module)
        assert block.others == ()
        attention, half = block.attention, block.feed_forward
        assert attention.heads == HEADS
        assert attention.key_value_heads == (HEADS if family in UNGROUPED else 2)
        assert attention.head_dim == HEAD_DIM.get(family, 8)
        assert half.channels == CHANNELS.get(family, 48)
        assert (half.gate is not None) == (family in GATED)
        assert (half.experts, half.experts_per_token) == ((4, 2) if family in EXPERTS else (None, None))
        assert (half.router is not None) == (family in EXPERTS)
        assert (half.shared is not None) == (half.shared_gate is not None) == (family == "qwen2_moe")


@every_family
def test_every_parameter_in_a_block_is_claimed_by_exactly_one_block(family: str) -> None:
    model = tiny(family)
    found = anatomy(model)
    claims = [name for block in found.blocks for name in block.names]
    assert len(claims) == len(set(claims))
    assert set(claims) == {target.name for target in parameters(model) if target.block is not None}
    for block in found.blocks:
        assert all(name.startswith(block.path + ".") for name in block.names)
        halves = [block.attention.names, block.feed_forward.names]
        assert not halves[0] & halves[1]


@every_family
def test_the_parts_outside_the_blocks_are_found(family: str) -> None:
    model = tiny(family)
    found = anatomy(model)
    stored = dict(model.named_parameters())
    assert stored[found.embedding] is model.get_input_embeddings().weight
    assert found.head is not None
    assert stored[found.head.weight] is model.get_output_embeddings().weight
    assert (found.positions is not None) == (family in ("gpt2", "opt", "bert"))
    # BERT norms each block's output instead
    assert (found.final_norm is None) == (family == "bert")
    assert found.logit_softcap == (30.0 if family == "gemma2" else None)
    assert found.logit_scale == 1.0


@every_family
def test_tied_groups_are_those_of_the_model(family: str) -> None:
    model = tiny(family)
    found = anatomy(model)
    tied = {name for group in found.tied for name in group}
    assert (found.embedding in tied) == (family in TIED)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for group in found.tied:
        assert len(group) > 1
        assert len({id(by_name[name]) for name in group}) == 1
    assert len(by_name) - len(list(model.parameters())) == sum(len(group) - 1 for group in found.tied)
    if family in TIED:
        assert found.head is not None
        assert found.head.weight == found.embedding


def test_untying_the_head_gives_it_a_name_of_its_own() -> None:
    found = anatomy(tiny("qwen2", tie_word_embeddings=False))
    assert found.tied == ()
    assert found.head == Part("lm_head.weight")


def test_the_head_of_bert_has_its_bias_though_it_is_stored_beside_it() -> None:
    found = anatomy(tiny("bert"))
    assert found.head is not None
    assert found.head.bias == "cls.predictions.bias"
    assert ("cls.predictions.bias", "cls.predictions.decoder.bias") in found.tied


def test_dense_blocks_among_blocks_of_experts_are_told_apart() -> None:
    first, second = anatomy(tiny("qwen3_moe", mlp_only_layers=[1])).blocks
    assert (first.feed_forward.experts, first.feed_forward.channels) == (4, 16)
    assert (second.feed_forward.experts, second.feed_forward.channels) == (None, 48)


def test_a_model_without_a_head_has_an_anatomy() -> None:
    found = anatomy(AutoModel.from_config(config("llama")))
    assert found.head is None
    assert [block.path for block in found.blocks] == ["layers.0", "layers.1"]
    assert found.final_norm == Part("norm.weight")


def test_a_model_on_the_meta_device_has_the_same_anatomy() -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config("gpt_neox"))
    assert anatomy(empty) == anatomy(tiny("gpt_neox"))


def test_scales_of_logits_come_from_the_config() -> None:
    model = tiny("llama")
    model.config.logit_scale, model.config.logits_scaling = 0.5, 4.0
    assert anatomy(model).logit_scale == 0.125


def test_an_encoder_decoder_is_refused_by_its_class() -> None:
    sizes = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    with pytest.raises(EspalierError, match=r"T5ForConditionalGeneration has \d stacks of blocks .*encoder.*; one is needed"):
        anatomy(AutoModelForSeq2SeqLM.from_config(sizes))


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(EspalierError, match="Linear is not a transformers model"):
        anatomy(nn.Linear(2, 2))


def test_a_block_without_an_attention_that_we_know_is_refused() -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.latent = attention._modules.pop("k_proj")
    with pytest.raises(EspalierError, match=r"LlamaForCausalLM .*attention\.k in model\.layers\.1"):
        anatomy(model)


def test_blocks_that_share_a_parameter_are_refused() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(EspalierError, match=r"LlamaForCausalLM shares .*layers\.0\.mlp.* with .*layers\.1\.mlp"):
        anatomy(model)


def test_an_attention_whose_rows_are_not_its_heads_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].self_attn.q_proj = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)  # q and a gate, as in Qwen3.5
    with pytest.raises(EspalierError, match=r"LlamaForCausalLM has an attention of an unknown kind in model\.layers\.0"):
        anatomy(model)


def test_fused_queries_of_an_unknown_family_are_refused() -> None:
    model = tiny("phi3")
    model.config.model_type = "phi99"
    with pytest.raises(EspalierError, match=r"Phi3ForCausalLM keeps q, k and v in one matrix .*layout is not known"):
        anatomy(model)


@pytest.mark.parametrize(
    ("place", "made"),
    [
        ("self_attn", {"relative_bias": nn.Parameter(torch.zeros(HEADS))}),
        ("mlp", {"sub_norm": nn.LayerNorm(48)}),
        ("self_attn", {"sub_norm": nn.LayerNorm(HIDDEN)}),
    ],
)
def test_couplings_are_refused_where_a_block_holds_something_unknown(place: str, made: dict[str, Any]) -> None:
    model = tiny("llama")
    (name,) = made
    setattr(model.model.layers[1].get_submodule(place), name, made[name])
    found = anatomy(model)
    assert any(name in other for other in found.blocks[1].others)
    with pytest.raises(EspalierError, match=rf"model\.layers\.1 of this llama model .*{name}"):
        couplings(found)


# what rows and columns mean


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gemma2", "gpt_oss")])  # eager ones
def test_the_rows_of_a_head_are_those_that_the_model_attends_with(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    attention = anatomy(model).blocks[1].attention
    values = logical_tensors(model)
    seen: list[dict[str, torch.Tensor]] = []
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append({"q": query, "k": key, "v": value})  # (batch, heads, length, head_dim)
        return plain(module, query, key, value, *rest, **more)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", record)
    assert model.config._attn_implementation == "sdpa"
    inputs: list[torch.Tensor] = []
    read = model.get_submodule(attention.v.weight.rpartition(".")[0])
    read.register_forward_hook(lambda module, given, output: inputs.append(given[0].detach()))
    logits(model)
    normed = any("q_norm" in name for name in values)
    for which in "v" if normed else "kv" if family == "opt" else "qkv":  # OPT scales q before
        part = getattr(attention, which)
        for head in range(attention.heads if which == "q" else attention.key_value_heads):
            rows = attention.rows(which, head)
            expected = inputs[0] @ values[part.weight][rows].T
            if part.bias:
                expected = expected + values[part.bias][rows]
            # at position 0 the rotary embedding turns nothing; v is never turned
            length = slice(None) if which == "v" else slice(0, 1)
            torch.testing.assert_close(seen[1][which][:, head, length], expected[:, length], atol=1e-5, rtol=0)


@every_family
def test_silencing_a_head_in_o_is_silencing_its_values(family: str) -> None:
    model = tiny(family)
    attention = anatomy(model).blocks[0].attention
    values = logical_tensors(model)
    before = logits(model)
    saved = values[attention.o.weight].clone()
    for head in range(attention.group, 2 * attention.group):  # the query heads of group 1
        values[attention.o.weight][:, attention.columns(head)] = 0
    by_columns = logits(model)
    values[attention.o.weight].copy_(saved)
    for name in attention.v.names:
        values[name][attention.rows("v", 1)] = 0
    assert change(by_columns, logits(model)) < 1e-5
    assert change(by_columns, before) > 1e-3


def test_a_head_that_is_not_there_is_an_index_error() -> None:
    attention = anatomy(tiny("llama")).blocks[0].attention
    assert attention.rows("q", 3) == slice(24, 32)
    with pytest.raises(IndexError):
        attention.rows("k", 2)
    with pytest.raises(IndexError):
        attention.columns(4)


@pytest.mark.parametrize("family", GATED)
def test_a_feed_forward_whose_gate_is_shut_gives_what_one_without_down_gives(family: str) -> None:
    model = tiny(family)
    half = anatomy(model).blocks[0].feed_forward
    values = logical_tensors(model)
    assert half.gate is not None
    saved = {name: values[name].clone() for name in half.gate.names}
    values[half.gate.weight][..., half.rows("gate"), :] = 0
    if half.gate.bias:
        values[half.gate.bias][..., half.rows("gate")] = 0
    shut = logits(model)
    for name, value in saved.items():
        values[name].copy_(value)
    values[half.down.weight].zero_()
    assert change(shut, logits(model)) < 1e-5


@pytest.mark.parametrize("family", [name for name in GATED if name != "gpt_oss"])  # which multiplies by up + 1
def test_a_feed_forward_with_up_negated_is_one_with_down_negated(family: str) -> None:
    one, other = tiny(family), tiny(family)
    half = anatomy(one).blocks[0].feed_forward
    logical_tensors(one)[half.up.weight][..., half.rows("up"), :].neg_()
    logical_tensors(other)[half.down.weight].neg_()
    assert change(logits(one), logits(other)) < 1e-5
    assert change(logits(one), logits(tiny(family))) > 1e-3


# couplings


def of_kind(found: Anatomy, kind: str) -> list[Any]:
    return [coupling for coupling in couplings(found) if coupling.kind == kind]


@every_family
def test_permuting_feed_forward_channels_leaves_the_outputs_unchanged(family: str) -> None:
    model = tiny(family)
    before = logits(model)
    for coupling in of_kind(anatomy(model), "channels"):
        permute(model, coupling, shuffled(coupling.units))
    assert change(logits(model), before) < 1e-5


@every_family
def test_permuting_key_value_groups_leaves_the_outputs_unchanged(family: str) -> None:
    model = tiny(family)
    before = logits(model)
    groups = of_kind(anatomy(model), "groups")
    assert len(groups) == LAYERS
    for coupling in groups:
        permute(model, coupling, shuffled(coupling.units))
    assert change(logits(model), before) < 1e-5


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNGROUPED])
def test_permuting_query_heads_within_a_group_leaves_the_outputs_unchanged(family: str) -> None:
    model = tiny(family)
    before = logits(model)
    heads = of_kind(anatomy(model), "heads")
    assert len(heads) == 2 * LAYERS
    for coupling in heads:
        permute(model, coupling, shuffled(coupling.units))
    assert change(logits(model), before) < 1e-5


def test_heads_without_groups_are_their_own_groups() -> None:
    found = anatomy(tiny("gpt2"))
    assert [coupling.units for coupling in of_kind(found, "groups")] == [HEADS] * LAYERS
    assert of_kind(found, "heads") == []


@every_family
def test_leaving_any_weight_out_of_a_coupling_changes_the_outputs(family: str) -> None:
    model = tiny(family)
    before = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for coupling in couplings(anatomy(model)):
        if coupling.block != 1:
            continue
        for left_out in coupling.members:
            if left_out.name.endswith("bias"):  # a bias of k adds the same to all scores, where nothing is rotated
                continue
            rest = tuple(member for member in coupling.members if member is not left_out)
            kept = type(coupling)(coupling.kind, coupling.block, coupling.units, rest, coupling.number)
            permute(model, kept, shuffled(coupling.units))
            assert change(logits(model), before) > 1e-4, left_out
            model.load_state_dict(state)


@every_family
def test_the_units_of_couplings_share_no_entries_and_stay_inside_their_tensors(family: str) -> None:
    model = tiny(family)
    shapes = {target.name: target.shape for target in parameters(model)}
    for kind in ("channels", "groups", "heads"):
        taken: set[tuple[str, int, int | None, int]] = set()
        for coupling in of_kind(anatomy(model), kind):
            for member in coupling.members:
                indices = member.indices(coupling.units)
                assert indices.shape == (coupling.units, member.width)
                shape = shapes[member.name] if member.expert is None else shapes[member.name][1:]
                assert int(indices.min()) >= 0
                assert int(indices.max()) < shape[member.axis]
                entries = {(member.name, member.axis, member.expert, index) for index in indices.flatten().tolist()}
                assert len(entries) == indices.numel()
                assert not entries & taken
                taken |= entries


@every_family
def test_every_row_and_column_of_channels_and_heads_belongs_to_a_coupling(family: str) -> None:
    model = tiny(family)
    found = anatomy(model)
    covered: dict[tuple[str, int], int] = {}
    for kind in ("channels", "groups"):
        for coupling in of_kind(found, kind):
            for member in coupling.members:
                key = (member.name, member.axis)
                covered[key] = covered.get(key, 0) + coupling.units * member.width
    for target in parameters(model):
        if target.role.startswith(("attention.", "mlp.", "experts.")):
            ends = target.role.removesuffix(".bias").endswith((".o", ".down"))
            if ends and target.role.endswith(".bias"):
                continue
            count = target.inputs if ends else target.shape[-1] if target.role.endswith(".bias") else target.outputs
            experts = target.shape[0] if target.role.startswith("experts.") else 1
            assert covered[target.name, int(ends)] == count * experts, target.name


def test_permuting_a_dict_of_logical_tensors_is_permuting_the_model() -> None:
    model = tiny("gpt2")
    coupling = couplings(anatomy(model))[0]
    values = {name: tensor.clone() for name, tensor in logical_tensors(model).items()}
    permute(values, coupling, [2, 0, 3, 1])
    permute(model, coupling, [2, 0, 3, 1])
    for name, tensor in logical_tensors(model).items():
        assert torch.equal(values[name], tensor)
    attention = anatomy(model).blocks[0].attention
    before = logical_tensors(tiny("gpt2"))[attention.k.weight]
    assert torch.equal(values[attention.k.weight][attention.rows("k", 0)], before[attention.rows("k", 2)])


def test_an_order_that_is_no_permutation_is_refused() -> None:
    model = tiny("llama")
    (coupling, *_) = of_kind(anatomy(model), "groups")
    for order in ([0, 0], [0], [0, 1, 2]):
        with pytest.raises(EspalierError, match=r"the permutation of 2 groups must hold each of 0 \.\. 1 once"):
            permute(model, coupling, order)


# choosing parameters


def chosen(family: str, *patterns: str) -> list[str]:
    return [target.name for target in select(parameters(tiny(family)), patterns)]


def test_a_role_selects_its_matrices_and_not_their_biases() -> None:
    assert chosen("qwen2", "attention.q") == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(LAYERS)]
    assert chosen("qwen2", "attention.q.bias") == [f"model.layers.{i}.self_attn.q_proj.bias" for i in range(LAYERS)]


def test_the_first_part_of_a_role_selects_all_that_it_covers() -> None:
    assert len(chosen("qwen2", "attention")) == 4 * LAYERS
    assert len(chosen("qwen2", "mlp", "attention")) == 7 * LAYERS
    assert chosen("gpt2", "embedding") == ["transformer.wte.weight", "transformer.wpe.weight"]


def test_linear_is_every_matrix_of_the_blocks_but_routers() -> None:
    targets = parameters(tiny("qwen2_moe"))
    names = set(chosen("qwen2_moe", "linear"))
    assert names == {t.name for t in targets if t.block is not None and len(t.shape) > 1 and not t.role.startswith("router")}


def test_all_and_bias_are_keywords() -> None:
    assert len(chosen("opt", "all")) == len(list(tiny("opt").parameters()))
    assert all(name.endswith("bias") for name in chosen("opt", "bias"))
    assert len(chosen("opt", "bias")) == sum(name.endswith("bias") for name, _ in tiny("opt").named_parameters())


def test_a_tied_parameter_is_selected_by_either_of_its_roles_and_names() -> None:
    for pattern in ("embedding", "head", "lm_head.*", "model.embed_tokens.weight"):
        assert chosen("gemma", pattern) == ["model.embed_tokens.weight"], pattern


def test_a_glob_selects_by_name_and_the_order_is_the_models() -> None:
    assert chosen("llama", "*.1.mlp.down_proj.weight", "*.1.self_attn.q*") == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]


def test_a_pattern_that_matches_nothing_names_the_roles_there_are() -> None:
    with pytest.raises(EspalierError, match=r"'atention' matches no parameter.*did you mean 'attention'.*attention\.q.*mlp\.down"):
        chosen("llama", "mlp", "atention")


def test_asking_for_q_of_a_model_that_fuses_qkv_says_what_to_ask_for() -> None:
    with pytest.raises(EspalierError, match=r"keeps q, k and v in one matrix: use attention\.qkv"):
        chosen("gpt2", "attention.q")


def test_blocks_behind_an_at_are_those_that_are_meant() -> None:
    targets = parameters(tiny("llama", num_hidden_layers=5))
    names = [target.name for target in select(targets, ["mlp.up@0-1+4", "*o_proj*@3", "head"])]
    ups, outputs = ([f"model.layers.{i}.{part}.weight" for i in blocks] for part, blocks in (("mlp.up_proj", (0, 1, 4)), ("self_attn.o_proj", (3,))))
    assert sorted(names) == sorted([*ups, *outputs, "lm_head.weight"])
    assert [site.name for site in select_sites(sites(tiny("llama", num_hidden_layers=5)), ["mlp@2-3"])] == ["blocks.2.mlp", "blocks.3.mlp"]
    for pattern, words in (("mlp@", "blocks such as"), ("mlp@1-", "blocks such as"), ("@3", "stands before"), ("mlp@7", "matches no parameter")):
        with pytest.raises(EspalierError, match=words):
            select(targets, [pattern])


def test_an_empty_selection_is_refused() -> None:
    with pytest.raises(EspalierError, match="--targets is empty"):
        chosen("llama")


# names in files


def test_a_parameter_under_its_own_name_is_one_piece() -> None:
    assert locate("model.norm.weight", (), None, {"model.norm.weight", "norm.weight"}) == [Piece(("model.norm.weight",))]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        ("model.decoder.layers.0.fc1.weight", "decoder.layers.0.fc1.weight"),
        ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("bert.encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.weight"),
        ("lm_head.weight", "embed_out.weight"),
        ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
    ],
)
def test_prefixes_and_older_names_are_found(name: str, file: str) -> None:
    assert locate(name, (), None, {file, "something.else"}) == [Piece((file,))]


def test_a_tied_parameter_is_found_under_every_name_that_the_files_hold() -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    assert locate(names[0], names, None, {"lm_head.weight"}) == [Piece(("lm_head.weight",))]
    assert locate(names[0], names, None, {"embed_tokens.weight", "lm_head.weight"}) == [
        Piece(("embed_tokens.weight",)),
        Piece(("lm_head.weight",)),
    ]


def test_fused_experts_are_found_in_files_that_keep_a_tensor_for_each() -> None:
    stem = "model.layers.0.mlp.experts"
    files = {f"{stem}.{e}.{part}_proj.weight" for e in range(3) for part in ("gate", "up", "down")}
    assert locate(f"{stem}.gate_up_proj", (), 3, files) == [
        Piece((f"{stem}.{e}.gate_proj.weight", f"{stem}.{e}.up_proj.weight"), e) for e in range(3)
    ]
    assert locate(f"{stem}.down_proj", (), 3, files) == [Piece((f"{stem}.{e}.down_proj.weight",), e) for e in range(3)]


def test_fused_experts_are_found_under_the_names_of_mixtral() -> None:
    stem = "model.layers.0.block_sparse_moe.experts"
    files = {f"{stem}.{e}.w{part}.weight" for e in range(2) for part in (1, 2, 3)}
    assert locate("model.layers.0.mlp.experts.gate_up_proj", (), 2, files) == [
        Piece((f"{stem}.{e}.w1.weight", f"{stem}.{e}.w3.weight"), e) for e in range(2)
    ]


def test_a_fused_tensor_in_the_files_is_taken_whole() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert locate(name, (), 4, {name}) == [Piece((name,))]


def test_files_that_lack_a_parameter_or_one_expert_of_it_are_refused_by_its_name() -> None:
    with pytest.raises(EspalierError, match=r"no tensor for the parameter 'model\.norm\.weight'"):
        locate("model.norm.weight", (), None, {"lm_head.weight"})
    files = {f"mlp.experts.{e}.down_proj.weight" for e in (0, 2)}
    for claimed in (3, 2**60):  # a forged shape costs nothing
        with pytest.raises(EspalierError, match=r"'mlp\.experts\.down_proj'"):
            locate("mlp.experts.down_proj", (), claimed, files)


@every_family
def test_every_parameter_of_a_saved_model_is_found_in_its_files_with_its_values(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    directory = ModelDirectory(tmp_path)
    stored = dict(model.named_parameters())
    claimed: list[str] = []
    for target in parameters(model):
        experts = target.lead[0] if target.lead else None
        for piece in locate(target.name, target.names, experts, directory):
            claimed += piece.names
            value = torch.cat([directory.read(name) for name in piece.names])
            whole = stored[target.name] if piece.expert is None else stored[target.name][piece.expert]
            assert torch.equal(value, whole), piece
    assert sorted(claimed) == sorted(directory)
    if family in ("qwen3_moe", "qwen2_moe", "mixtral"):
        assert any(".experts.3." in name for name in directory)


@every_family
def test_the_place_of_every_tensor_of_the_files_is_in_the_parameter_that_it_was_located_for(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    names = {name for target in parameters(model) for name in target.names}
    for target in parameters(model):
        for piece in locate(target.name, target.names, target.lead[0] if target.lead else None, ModelDirectory(tmp_path)):
            for part, name in enumerate(piece.names):
                found = place(name, names)
                assert found is not None and found.name in target.names
                assert (found.expert, found.part, found.parts) == (piece.expert, part, len(piece.names))


def test_a_name_that_no_layout_knows_has_no_place() -> None:
    for name in ("mlp.experts.0.gate.weight", "mlp.experts.x.up_proj.weight", f"mlp.experts.{'9' * 5000}.up_proj.weight", "base_model.model.mlp.experts.0.up_proj.weight", ""):
        assert place(name, {"mlp.experts.gate_up_proj"}) is None
