"""PEFT's adapters become deltas: every kind, on Llama, GPT-2 and BERT, against PEFT's own merged weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import disk_full_at
from torch import nn

from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import attach, attach_updates, attachments
from espalier.attach.load import load, load_model
from espalier.attach.tasks import choose_task
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.peft_adapter import Adapter
from espalier.checkpoint.safetensors_file import read_safetensors, write_safetensors
from espalier.delta import store
from espalier.errors import EspalierError
from espalier.exchange.peft_import import import_adapter
from espalier.verbs.convert import convert

peft = pytest.importorskip("peft")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LINEAR = {"llama": ["q_proj", "v_proj", "gate_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"], "bert": ["query", "intermediate.dense"]}
HEAD = {"gpt2": ["lm_head"]}
"""PEFT adapts GPT-2's transposed matrices with some kinds only; the others get its head, untied."""


def made(base: nn.Module, kind: str, **options: Any) -> Any:
    """A PEFT model whose adapter was moved from its start."""
    return moved(begun(base, kind, **options))


def begun(base: nn.Module, kind: str, **options: Any) -> Any:
    """A PEFT model as it starts."""
    family = base.config.model_type
    if kind in ("IA3", "Lora", "AdaLora", "Vera", "RandLora"):
        options.setdefault("fan_in_fan_out", family == "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, getattr(peft, f"{kind}Config")(**{"target_modules": LINEAR.get(family), **options}))


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "vera_lambda" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def saved(model: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def merged(model: Any, names: Any) -> dict[str, torch.Tensor]:
    """PEFT's own weights, by the base's names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = dict(model.merge_and_unload().named_parameters(remove_duplicate=False))
    return {name: weights[name].detach() for name in names}


def imported(adapter: Path, base: nn.Module, folder: Path) -> tuple[store.Delta, dict[str, torch.Tensor]]:
    """The delta, stored and read again, and every parameter of the base with it."""
    base.save_pretrained(folder)
    delta = import_adapter(adapter, {t.name: t for t in parameters(base)}, ModelDirectory(folder))
    store.save(folder / "delta", delta, "")
    delta = store.load(folder / "delta")
    new = {}
    for target in parameters(base):
        weight = base.get_parameter(target.name).detach()
        if target.name in delta.updates:
            logical = weight.transpose(-1, -2) if target.transposed else weight
            changed = delta.updates[target.name].apply(logical)
            weight = changed.transpose(-1, -2) if target.transposed else changed
        new[target.name] = weight
    return delta, new


def agree(kind: str, base: nn.Module, folder: Path, **options: Any) -> store.Delta:
    """Import what PEFT writes and hold it against what PEFT merges; returns the delta."""
    return agrees(made(tiny_like(base), kind, **options), base, folder)


def agrees(theirs: Any, base: nn.Module, folder: Path) -> store.Delta:
    """The same of a PEFT model on another copy of the base."""
    adapter = saved(theirs, folder / "adapter")
    delta, new = imported(adapter, base, folder / "base")
    for name, weight in merged(theirs, new).items():
        torch.testing.assert_close(new[name], weight, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert delta.updates
    for name in delta.updates:
        assert not torch.allclose(new[name], base.get_parameter(name), atol=1e-3), name
    return delta


def tiny_like(base: nn.Module) -> nn.Module:
    """A second copy of a tiny model."""
    import copy

    return copy.deepcopy(base)


KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "LoRA": ("Lora", {"r": 3, "lora_alpha": 5}, "low_rank"),
    "rank-stabilized LoRA": ("Lora", {"r": 3, "lora_alpha": 5, "use_rslora": True}, "low_rank"),
    "DoRA": ("Lora", {"r": 3, "lora_alpha": 5, "use_dora": True}, "magnitude"),
    "AdaLoRA": ("AdaLora", {"init_r": 4, "target_r": 2, "total_step": 10}, "low_rank"),
    "IA3": ("IA3", {"feedforward_modules": r".*(down_proj|c_proj|intermediate\.dense)"}, "diagonal"),
    "VeRA": ("Vera", {"r": 5}, "low_rank"),
    "RandLoRA": ("RandLora", {"r": 5, "randlora_alpha": 20}, "random_bases"),
    "LoHa": ("LoHa", {"r": 3, "alpha": 4}, "hadamard"),
    "LoHa of full rank": ("LoHa", {"r": 6, "alpha": 4}, "hadamard"),
    "LoKr": ("LoKr", {"r": 2, "alpha": 4}, "kronecker"),
    "LoKr of two products": ("LoKr", {"r": 1, "alpha": 4, "decompose_both": True, "decompose_factor": 4}, "kronecker"),
    "LoKr of whole factors": ("LoKr", {"r": 8, "alpha": 4}, "kronecker"),
    "OFT": ("OFT", {"r": 0, "oft_block_size": 8, "use_cayley_neumann": False}, "block_affine"),
    "OFT of a series": ("OFT", {"r": 0, "oft_block_size": 4}, "block_affine"),
    "OFT of one shared block": ("OFT", {"r": 0, "oft_block_size": 8, "block_share": True}, "block_affine"),
    "constrained OFT": ("OFT", {"r": 0, "oft_block_size": 8, "coft": True, "eps": 0.3}, "block_affine"),
    "BOFT": ("BOFT", {"boft_block_size": 8}, "chain"),
    "SHiRA": ("Shira", {"r": 3}, "sparse"),
    "MiSS": ("Miss", {"r": 4}, "tiled"),
    "MiSS that does not divide": ("Miss", {"r": 5}, "tiled"),
    "MiSS, mini": ("Miss", {"r": 4, "init_weights": "mini", "mini_r": 2}, "tiled"),
    "MiSS, bat": ("Miss", {"r": 4, "init_weights": "bat"}, "block_affine"),
}
TRANSPOSED = ("Lora", "AdaLora", "IA3", "Vera", "RandLora")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("what", KINDS)
def test_an_imported_adapter_makes_the_weights_that_peft_merges(what: str, family: str, tmp_path: Path) -> None:
    kind, options, form = KINDS[what]
    overrides: dict[str, Any] = {}
    if family == "gpt2" and kind not in TRANSPOSED:
        overrides, options = {"tie_word_embeddings": False}, {**options, "target_modules": HEAD["gpt2"]}
    base = tiny(family, **overrides)
    delta = agree(kind, base, tmp_path, **options)
    assert {update.form for update in delta.updates.values()} == {form}


@pytest.mark.parametrize("what", ["LoHa", "LoKr", "IA3", "VeRA", "RandLoRA", "OFT", "BOFT", "SHiRA", "MiSS", "MiSS, bat", "AdaLoRA"])
def test_a_model_with_the_delta_does_what_peft_does(what: str, tmp_path: Path) -> None:
    kind, options, _ = KINDS[what]
    tiny("llama").save_pretrained(tmp_path / "base")
    theirs = made(load_model(tmp_path / "base"), kind, **options)
    convert(str(saved(theirs, tmp_path / "adapter")), str(tmp_path / "delta"), model=str(tmp_path / "base"), quiet=True)
    ours = load(tmp_path / "base", [tmp_path / "delta"])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits, **CLOSE)


OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ranks and alphas by module": ("llama", "Lora", {
        "r": 3, "lora_alpha": 5, "rank_pattern": {"q_proj": 5, r"^model\.layers\.1\.mlp\..*": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 7, r".*\.(gate_proj|down_proj)": 9}}),
    "alphas by module of LoHa": ("llama", "LoHa", {"r": 3, "alpha": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 8}}),
    "ranks by module of LoKr": ("llama", "LoKr", {"r": 8, "alpha": 4, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}}),
    "a head saved whole": ("llama", "Lora", {"r": 2, "modules_to_save": ["lm_head"]}),
    "norms saved whole": ("llama", "Lora", {"r": 2, "modules_to_save": ["norm", "input_layernorm"]}),
    "a transposed module saved whole": ("gpt2", "Lora", {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["mlp"]}),
    "all biases": ("bert", "Lora", {"r": 2, "bias": "all"}),
    "biases of the adapted": ("bert", "Lora", {"r": 2, "bias": "lora_only"}),
    "biases of B": ("bert", "Lora", {"r": 2, "lora_bias": True}),
    "an embedding": ("llama", "Lora", {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "a DoRA of an embedding": ("llama", "Lora", {"r": 2, "target_modules": ["embed_tokens"], "use_dora": True}),
    "both sides of a tie": ("qwen2", "Lora", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "trained tokens": ("llama", "Lora", {"r": 2, "trainable_token_indices": [9, 3, 5]}),
    "trained tokens of a named module": ("gpt2", "Lora", {"r": 2, "trainable_token_indices": {"wte": [9, 3]}}),
    "trained tokens of a tie": ("qwen2", "Lora", {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [9, 3]}),
    "only trained tokens": ("qwen2", "TrainableTokens", {"token_indices": [7, 4], "target_modules": ["embed_tokens"]}),
    "an OFT of an embedding": ("llama", "OFT", {"r": 0, "oft_block_size": 8, "target_modules": ["embed_tokens"]}),
    "fused experts": ("qwen3_moe", "Lora", {
        "r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "transposed fused experts": ("gpt_oss", "Lora", {
        "r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("what", OPTIONS)
def test_an_adapter_is_imported_whole_that_has(what: str, tmp_path: Path) -> None:
    family, kind, options = OPTIONS[what]
    delta = agree(kind, tiny(family), tmp_path, **options)
    if "saved whole" in what or "both sides" in what:
        assert "replace" in {update.form for update in delta.updates.values()}


def ranks_of(delta: store.Delta) -> dict[str, int]:
    """The ranks of updates of low rank, by module."""
    return {name.removesuffix(".weight"): update.A.shape[-2] for name, update in delta.updates.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("adjusts", [True, False])
def test_a_lora_that_began_as_eva_is_imported_with_the_ranks_and_alphas_that_it_was_given(adjusts: bool, family: str, tmp_path: Path) -> None:
    """EVA spreads the ranks by what inputs explain; what is left without any is no module of the adapter."""
    config = peft.EvaConfig(rho=2.0, adjust_scaling_factors=adjusts)
    theirs = begun(tiny(family), "Lora", r=3, lora_alpha=5, init_lora_weights="eva", eva_config=config)
    data = [{"input_ids": tokens(4, seed=seed), "attention_mask": torch.ones(4, 12)} for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    first = {name: p.detach().clone() for name, p in theirs.named_parameters() if "lora_A" in name}
    delta = agrees(moved(theirs), tiny(family), tmp_path)
    config = theirs.peft_config["default"]
    assert config.init_lora_weights == "eva" and len(config.rank_pattern) > 2 and bool(config.alpha_pattern) == adjusts
    assert ranks_of(delta) == {name.split(".model.", 1)[1].split(".lora_A")[0]: len(A) for name, A in first.items()}


@pytest.mark.parametrize("target", [3, 1])
def test_an_adalora_whose_ranks_were_pruned_is_imported_with_what_is_left(target: int, tmp_path: Path) -> None:
    """``rank_pattern`` names the singular values that are left, in the file too; some modules have none. The first rank stays the divisor."""
    theirs = made(tiny("llama"), "AdaLora", init_r=4, target_r=target, lora_alpha=6, total_step=6, tinit=1, tfinal=2, deltaT=1)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 7):
        optimizer.zero_grad()
        theirs(tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    left = {name.split(".lora_E")[0]: sum(kept) for name, kept in theirs.peft_config["default"].rank_pattern.items()}
    assert sum(left.values()) == target * len(left) and len(set(left.values())) > 1 and (target > 1 or 0 in left.values())
    assert ranks_of(agrees(theirs, tiny("llama"), tmp_path)) == {name: rank for name, rank in left.items() if rank}


def test_a_butterfly_of_several_levels_is_a_chain_of_permuted_rotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT makes one level alone where it cannot build its CUDA kernel; here a stand-in lays out the blocks."""
    from peft.tuners.boft import layer

    class BlockDiagonal:
        @staticmethod
        def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
            return [torch.stack([torch.block_diag(*level) for level in blocks])]

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: BlockDiagonal)
    delta = agree("BOFT", tiny("llama"), tmp_path, boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["q_proj", "v_proj"])
    assert {len(update.parts) for update in delta.updates.values()} == {8}  # two levels between permutations, one without, the scale


def test_vera_keeps_one_basis_for_all_modules_of_a_width(tmp_path: Path) -> None:
    delta = agree("Vera", tiny("llama"), tmp_path, r=5)
    assert {factor for update in delta.updates.values() for factor in update.shared.values()} == {"vera_A.32", "vera_A.48"}


def test_a_bank_of_tasks_is_imported_and_written_back_and_every_task_does_what_it_does_in_peft(tmp_path: Path) -> None:
    """Poly: "divides by r, has no alpha", mixes "A and B separately", a router's row for every task."""
    tiny("llama").save_pretrained(tmp_path / "base")
    theirs = made(tiny("llama"), "Poly", r=3, n_tasks=3, n_skills=4, n_splits=2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.mul_(10 if "module_logits" in name else 1)
    convert(str(saved(theirs, tmp_path / "adapter")), str(tmp_path / "bank"), model=str(tmp_path / "base"), quiet=True)
    bank = store.load(tmp_path / "bank", bank=True)
    assert bank.manifest["tasks"] == ["0", "1", "2"] and {update.form for update in bank.updates.values()} == {"bank"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "bank").eval()
    outputs = []
    for task in range(3):
        convert(str(tmp_path / "bank"), str(tmp_path / str(task)), task=str(task), quiet=True)
        ours = attach_updates(tiny("llama"), store.load(tmp_path / str(task)).updates, "d")
        tasks = torch.full((len(tokens()),), task)
        with torch.no_grad():
            outputs.append(theirs.base_model(tokens(), task_ids=tasks).logits)
            torch.testing.assert_close(ours(tokens()).logits, outputs[-1], **CLOSE)
            torch.testing.assert_close(back(tokens(), task_ids=tasks).logits, outputs[-1], **CLOSE)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    live = attach(tiny("llama"), "mhr", name="d", targets=list(bank.updates), rank=3, alpha=1.0, skills=4, heads=2, tasks="0,1,2")
    attached = attachments(live)["d"]
    with torch.no_grad():
        for number, target in enumerate(attached.pool.targets):
            update, slot = bank.updates[target.name], attached.slots[target.name]
            slot.B.copy_(update.B), slot.A.copy_(update.A), attached.pool.Z[number].copy_(update.Z)
    choose_task(live, "1")
    y, z = live(tokens()).logits, theirs.base_model(tokens(), task_ids=torch.full((len(tokens()),), 1)).logits
    torch.testing.assert_close(y, z, **CLOSE)
    for one in (y, z):
        (one * torch.randn(one.shape, generator=torch.Generator().manual_seed(1))).mean().backward()
    for number, target in enumerate(attached.pool.targets):
        module = theirs.base_model.model.get_submodule(target.name.removesuffix(".weight"))
        gradients = {"A": module.poly_lora_A["default"].grad, "B": module.poly_lora_B["default"].grad}
        for key, gradient in gradients.items():
            torch.testing.assert_close(attached.slots[target.name].get_parameter(key).grad, gradient.transpose(-1, -2), rtol=1e-3, atol=1e-6)
        routed = module.poly_router["default"].module_logits.grad.unflatten(1, (2, 4))
        torch.testing.assert_close(attached.pool.Z.grad[number], routed, rtol=1e-3, atol=1e-6)


def test_a_convolution_is_imported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4)
    for use_dora in (False, True):
        agree("Lora", transformers.ViTModel(config), tmp_path / str(use_dora), r=2, target_modules=["projection"], use_dora=use_dora)


# patterns


@given(st.text(alphabet="ab.*+?()[]|^$\\{}-_0", max_size=12))
@settings(max_examples=200, deadline=None)
def test_a_pattern_is_matched_as_peft_matches_it_or_refused(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    adapter = Adapter(Path("adapter"), "LORA", {"lora_alpha": 1, "alpha_pattern": {pattern: 2}})
    for module in ("a.b", "b.a.0", "ab_a-0.b"):
        try:
            found = adapter.number_of("lora_alpha", "alpha_pattern", module)
        except EspalierError:
            return
        assert (found == 2) == (get_pattern_key([pattern], module) == pattern)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(.*.*)*x", ".*.*.*x", "(?=a)", "a{3}", r"(a)\1", "x" * 1000 + "*"])
def test_a_pattern_that_could_take_long_is_refused(pattern: str) -> None:
    adapter = Adapter(Path("adapter"), "LORA", {"lora_alpha": 1, "alpha_pattern": {pattern: 2}})
    with pytest.raises(EspalierError, match="alpha_pattern has the pattern"):
        adapter.number_of("lora_alpha", "alpha_pattern", "model.layers.0.self_attn.q_proj")


# what cannot be imported is refused by name

REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    # what: kind, its options, changed settings, changed tensors of model.layers.0.self_attn.q_proj, complaint
    "another kind": ("Lora", {"r": 2}, {"peft_type": "FOURIERFT"}, {}, "peft_type is 'FOURIERFT'; imported are: LORA"),
    "an option that is not known": ("LoHa", {"r": 2}, {"use_twist": 3}, {}, "use_twist is 3, which this version does not import for LOHA"),
    "a convolution's option": ("LoKr", {"r": 2}, {"use_effective_conv2d": True}, {}, "use_effective_conv2d is True"),
    "biases of no kind": ("Lora", {"r": 2}, {"bias": "some"}, {}, "bias is 'some'; it must be 'none', 'all' or 'lora_only'"),
    "a factor missing": ("LoHa", {"r": 2}, {}, {"hada_w2_a": None}, "q_proj has no hada_w2_a"),
    "a factor of another size": ("LoHa", {"r": 2}, {}, {"hada_w1_b": torch.zeros(2, 31)}, r"q_proj\.hada_w1_b is .*\(2, 31\).*\(2, 32\)"),
    "a factor of integers": ("LoHa", {"r": 2}, {}, {"hada_w1_b": torch.zeros(2, 32, dtype=torch.int32)}, "hada_w1_b is torch.int32"),
    "a number that is none": ("IA3", {"feedforward_modules": []}, {}, {"ia3_l": torch.full((32, 1), float("nan"))}, "ia3_l is not finite"),
    "a tensor of no kind": ("IA3", {"feedforward_modules": []}, {}, {"ia3_m": torch.zeros(1)}, "holds .*ia3_m.*, which is no tensor of a IA3"),
    "two updates of one weight": ("LoHa", {"r": 2}, {}, {"weight": torch.zeros(32, 32)}, "changes .*q_proj.weight in two ways"),
    "Kronecker factors that do not fit": ("LoKr", {"r": 2}, {}, {"lokr_w1": torch.zeros(5, 4)}, "the factors make an update of shape"),
    "no rank": ("LoKr", {"r": 8}, {"r": 0}, {}, "r of model.layers.0.self_attn.q_proj is 0"),
    "a rank of none at the start": ("AdaLora", {"init_r": 4, "target_r": 2, "total_step": 9}, {"init_r": -1e-5}, {}, "init_r is -1e-05"),
    "a router of other tasks": ("Poly", {"r": 2, "n_tasks": 2}, {"n_tasks": 10**15}, {}, r"module_logits is .*\(2, 4\).*\(1000000000000000, 4\)"),
    "splits that do not divide": ("Poly", {"r": 2}, {}, {"poly_lora_A": torch.zeros(3, 4, 16, 2)}, "has 3 splits, which do not divide 32 x 32"),
    "no basis": ("Vera", {"r": 2, "save_projection": False}, {}, {}, "does not hold vera_A.*save the adapter again with save_projection=True"),
    "no bases": ("RandLora", {"r": 2, "save_projection": False}, {}, {}, "does not hold randlora_A.*save_projection=True"),
    "a huge number of bases": ("RandLora", {"r": 2}, {}, {"randlora_lambda": torch.zeros(2, 900)}, "has 900 bases of rank 2"),
    "angles that do not fit": ("OFT", {"r": 0, "oft_block_size": 8}, {}, {"oft_R.weight": torch.zeros(4, 27)}, "has 4 blocks of 27 angles"),
    "a series without end": ("OFT", {"r": 0, "oft_block_size": 8}, {"num_cayley_neumann_terms": 10**9}, {}, "num_cayley_neumann_terms is"),
    "an alpha larger than any number": ("Lora", {"r": 2}, {"lora_alpha": 10**400}, {}, "lora_alpha is 1000.*; it must be a finite number"),
    "angles whose rotation no number holds": ("OFT", {"r": 0, "oft_block_size": 8}, {}, {"oft_R.weight": torch.full((4, 28), 1e30)}, "q_proj: .* must be finite"),
    "a negative limit of angles": ("OFT", {"r": 0, "oft_block_size": 8}, {"coft": True, "eps": -1}, {}, "eps is -1.0; it must be at least 0"),
    "a copy of integers": ("Lora", {"r": 2}, {}, {"weight": torch.zeros(32, 32, dtype=torch.int32)}, "weight is torch.int32; the model's .* is torch.float32"),
    "blocks that do not fit": ("BOFT", {"boft_block_size": 8}, {}, {"boft_R": torch.zeros(1, 3, 8, 8)}, "has 1 levels of 3 blocks of 8"),
    "a support outside": ("Shira", {"r": 2}, {}, {"shira_indices": torch.full((2, 128), 40, dtype=torch.int32)}, "support outside of 32 x 32"),
    "an entry twice": ("Shira", {"r": 2}, {}, {"shira_indices": torch.zeros(2, 128, dtype=torch.int32)}, "names an entry twice"),
    "a support of another size": ("Shira", {"r": 2}, {}, {"shira_indices": torch.zeros(2, 5, dtype=torch.int32)}, "has 128 values at"),
    "a block of another size": ("Miss", {"r": 4}, {}, {"miss_block": torch.zeros(4, 31)}, "miss_block is .*needs floating point of shape"),
    "a variant that is not known": ("Miss", {"r": 4}, {"init_weights": "cat"}, {}, "init_weights is 'cat'"),
    "tokens that there are not": ("Lora", {"r": 2, "trainable_token_indices": [3]}, {"trainable_token_indices": [96]}, {}, "list of ids below 96"),
    "tokens named twice": ("Lora", {"r": 2, "trainable_token_indices": [3, 4]}, {"trainable_token_indices": [3, 3]}, {}, "names an entry twice"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_an_adapter_is_refused_that_has(what: str, tmp_path: Path) -> None:
    kind, options, changes, tensors, complaint = REFUSED[what]
    base = tiny("llama")
    adapter = saved(made(tiny_like(base), kind, **{"target_modules": ["q_proj"], **options}), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    stored = read_safetensors(adapter / "adapter_model.safetensors")
    stored.update({f"base_model.model.model.layers.0.self_attn.q_proj.{n}": t for n, t in tensors.items()})
    write_safetensors(adapter / "adapter_model.safetensors", {n: t for n, t in stored.items() if t is not None})
    with pytest.raises(EspalierError, match=complaint) as error:
        imported(adapter, base, tmp_path / "base")
    assert str(adapter) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "5", "null", '"LORA"'])
@pytest.mark.parametrize("named", [True, False])
def test_an_adapter_whose_config_is_no_object_is_refused(content: str, named: bool, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    with pytest.raises(EspalierError, match=r"adapter_config\.json is .*; it must be a JSON object"):
        convert(str(tmp_path / "adapter"), str(tmp_path / "out"), model=str(tmp_path / "base") if named else None, quiet=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_8_bits_are_imported_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny("llama")
    adapter = saved(made(tiny_like(base), "Lora", r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    stored = {n: t.to(dtype) for n, t in read_safetensors(adapter / "adapter_model.safetensors").items()}
    found = []
    for kind in (dtype, torch.float32):
        write_safetensors(adapter / "adapter_model.safetensors", {n: t.to(kind) for n, t in stored.items()})
        found.append(imported(adapter, base, tmp_path / str(kind))[0])
    for name, update in found[0].updates.items():
        for key, tensor in update.tensors().items():
            assert torch.equal(tensor.float(), found[1].updates[name].tensors()[key])


def test_an_import_that_fails_leaves_nothing(tmp_path: Path) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    adapter = saved(made(tiny_like(base), "Lora", r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    with disk_full_at(600), pytest.raises(OSError):
        convert(str(adapter), str(tmp_path / "out"), model=str(tmp_path / "base"), quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_one_side_of_a_tie_saved_whole_is_refused(module: str, tmp_path: Path) -> None:
    base = tiny("qwen2")
    adapter = saved(made(tiny_like(base), "Lora", r=2, target_modules=["q_proj"], modules_to_save=[module]), tmp_path / "adapter")
    with pytest.raises(EspalierError, match="one side of the tie"):
        imported(adapter, base, tmp_path / "base")


def test_copies_of_the_base_change_nothing(tmp_path: Path) -> None:
    """PEFT stores embeddings beside other factors when it is told to; those of the base itself are no update."""
    base = tiny("qwen2")
    adapter = saved(made(tiny_like(base), "Lora", r=2, target_modules=["q_proj"]), tmp_path / "adapter", save_embedding_layers=True)
    assert any("embed_tokens" in name for name in read_safetensors(adapter / "adapter_model.safetensors"))
    delta, _ = imported(adapter, base, tmp_path / "base")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in delta.updates} == {"q_proj"}


@pytest.mark.parametrize("rank", ["8", None, [1]])
def test_a_lokr_of_whole_blocks_and_odd_settings_is_imported_and_not_exported(rank: Any, tmp_path: Path) -> None:
    """Its rank says nothing of its factors; PEFT's files beside the delta would repeat what is none."""
    tiny("llama").save_pretrained(tmp_path / "base")
    adapter, module = tmp_path / "adapter", "base_model.model.model.layers.0.self_attn.q_proj"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": rank, "alpha": 8, "decompose_factor": 0}))
    write_safetensors(
        adapter / "adapter_model.safetensors",
        {f"{module}.lokr_w1": torch.ones(4, 4), f"{module}.lokr_w2_a": torch.ones(8, 2), f"{module}.lokr_w2_b": torch.ones(2, 8)},
    )
    convert(str(adapter), str(tmp_path / "delta"), model=str(tmp_path / "base"), quiet=True)
    assert len(store.load(tmp_path / "delta").updates) == 1 and not (tmp_path / "delta" / "adapter_config.json").exists()
