"""Matching by permutations and partial merges: what is free to move, what matching finds, and what PLeaS makes of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import EXPERTS, FAMILIES, tiny, tokens
from torch import nn

import espalier
from espalier.anatomy.structure import anatomy, logical_tensors, permute
from espalier.anatomy.symmetry import symmetries
from espalier.attach.load import load_model
from espalier.calibrate.pair import Moments, moments
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.cli.main import espalier as command
from espalier.errors import EspalierError
from espalier.evaluate.along_line import along, loss
from espalier.exchange import alignment, matched, matching, pleas
from espalier.exchange.merge_line import barrier
from espalier.verbs._matching import read_text

every_family = pytest.mark.parametrize("family", FAMILIES)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def shuffle(model: nn.Module, seed: int = 0) -> None:
    """A random permutation of every set of units."""
    generator = torch.Generator().manual_seed(seed)
    for coupling in symmetries(model):
        permute(model, coupling, torch.randperm(coupling.units, generator=generator).tolist())


def batches(rows: int = 4, length: int = 12) -> Any:
    ids = tokens(rows, length + 1)
    return [(ids[:, :-1], ids[:, 1:])]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))


# what is free to move


@every_family
def test_any_permutation_of_every_set_leaves_the_outputs_unchanged(family: str) -> None:
    model = tiny(family)
    before, bits = logits(model), [p.clone() for p in model.parameters()]
    shuffle(model)
    assert float((logits(model) - before).abs().max()) < 1e-5
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), bits, strict=True)]
    # norms of one head (Qwen3, Gemma 3), biases of heads and rows of positions aside, nothing is left where it was
    assert sum(moved) > 0.8 * len(moved)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen2_moe", "gemma2"])
def test_leaving_any_tensor_out_of_the_residual_stream_changes_the_outputs(family: str) -> None:
    model = tiny(family)
    before, residual = logits(model), symmetries(model).residual
    state = {name: value.clone() for name, value in model.state_dict().items()}
    order = torch.randperm(residual.units, generator=torch.Generator().manual_seed(1)).tolist()
    for left_out in residual.members:
        if left_out.name.endswith("token_type_embeddings.weight"):
            continue
        rest = tuple(member for member in residual.members if member is not left_out)
        permute(model, type(residual)(residual.kind, None, residual.units, rest), order)
        assert float((logits(model) - before).abs().max()) > 1e-4, left_out
        model.load_state_dict(state)


def test_value_dimensions_of_a_group_are_those_of_its_query_heads() -> None:
    first = symmetries(tiny("llama")).attentions[0]
    assert [coupling.units for coupling in first.values] == [8, 8]
    assert [member.start for member in first.values[1].members] == [8, 16, 24]  # rows of v; columns of o of heads 2 and 3


def test_an_outside_parameter_that_is_not_known_is_refused_by_name() -> None:
    model = tiny("llama")
    model.model.register_parameter("memory", nn.Parameter(torch.zeros(32)))
    with pytest.raises(EspalierError, match=r"model\.memory of this llama model has a part in it that is not known"):
        symmetries(model)


def test_stored_buffers_are_refused_by_name() -> None:
    model = tiny("qwen3_moe")
    model.model.layers[0].mlp.register_buffer("score_correction", torch.zeros(4))
    with pytest.raises(EspalierError, match=r"layers\.0\.mlp\.score_correction of this qwen3_moe model is stored and no parameter"):
        symmetries(model)


def test_a_norm_over_groups_of_units_is_refused() -> None:
    model = tiny("llama")

    class GroupNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))

    model.model.norm = GroupNorm()
    with pytest.raises(EspalierError, match=r"model\.norm\.weight .* belongs to a GroupNorm"):
        symmetries(model)


# matching


@every_family
def test_matching_a_model_with_its_own_permutation_recovers_it_bit_for_bit(family: str) -> None:
    model = tiny(family)
    other = copy.deepcopy(model)
    shuffle(other)
    assert not same(model, other)
    matching.match(model, other, seed=3)
    assert same(model, other)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in EXPERTS])
def test_matching_by_activations_recovers_a_permuted_copy(family: str) -> None:
    model = tiny(family)
    other = copy.deepcopy(model)
    shuffle(other)
    ids = tokens(16, 33)
    found = matching.match(model, other, evidence=matching.correlations(model, other, [(ids[:, :-1], ids[:, 1:])]))
    assert same(model, other)
    for similarity in found.similarity.values():
        assert bool(((similarity > 1 - 1e-4) | (similarity == 0)).all())  # 0: a unit that never fires (OPT's, of a ReLU)


def test_the_barrier_to_the_own_permuted_copy_is_gone_after_matching() -> None:
    model = tiny("llama")
    other = copy.deepcopy(model)
    shuffle(other)
    # what a model is sure of, its average with a permuted copy is not
    labels = [(tokens(), logits(model).argmax(-1))]
    assert barrier(along(model, other, labels, 5)) > 0.01
    matching.match(model, other)
    losses = along(model, other, labels, 5)
    assert max(losses) - min(losses) < 1e-5
    assert 0 <= barrier(losses) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen2_moe", "gpt_oss"])
def test_the_objective_never_falls_and_is_what_was_gained(family: str) -> None:
    one, other = tiny(family), tiny(family, seed=1)
    outputs = logits(other)
    found = matching.match(one, other)
    assert found.objectives == sorted(found.objectives)
    assert found.objectives[-1] > found.objectives[0]
    outside = matching.on_both_sides(symmetries(one).residual)
    reached = matching.objective(logical_tensors(one), logical_tensors(other), outside)
    assert reached == pytest.approx(found.objectives[-1], rel=1e-5)
    assert float((logits(other) - outputs).abs().max()) < 1e-5
    again = matching.match(one, other, seed=9)
    assert again.objectives[-1] >= found.objectives[-1] * (1 - 1e-6)


def test_matching_is_the_same_for_the_same_seed() -> None:
    results = []
    for _ in range(2):
        other = tiny("llama", seed=1)
        matching.match(tiny("llama"), other, seed=4)
        results.append(other)
    assert same(*results)


def test_matching_heads_beats_every_order_of_groups_whose_insides_stay() -> None:
    one, other = tiny("llama"), tiny("llama", seed=1)
    heads = symmetries(one).attentions[0]
    evidence = matching.WeightEvidence(logical_tensors(one), logical_tensors(other))
    _, gain, _ = matching._match_heads(evidence, heads)
    plain = evidence.units(heads.groups)
    swapped = float(plain.fliplr().diagonal().sum() - plain.diagonal().sum())
    assert gain >= max(swapped, 0.0)


def test_permuting_a_matrix_leaves_its_singular_values_and_turns_its_vectors() -> None:
    one, other = tiny("llama"), tiny("llama", seed=1)
    before = alignment.spectra(other, logical_tensors(other))
    found = matching.match(one, other)
    after = alignment.spectra(other, logical_tensors(other))
    for name, directions in before.items():
        torch.testing.assert_close(directions.S, after[name].S, rtol=1e-5, atol=1e-5)
        turned = alignment.permuted(directions, name, found.reordered)
        torch.testing.assert_close(turned.U * turned.S @ turned.V.T, logical_tensors(other)[name], rtol=1e-4, atol=1e-5)


def test_alignment_is_one_for_a_matrix_and_itself_and_small_for_others() -> None:
    spectrum = alignment.spectra(tiny("llama"), logical_tensors(tiny("llama")))
    mine = spectrum["model.layers.0.mlp.up_proj.weight"]
    theirs = spectrum["model.layers.1.mlp.up_proj.weight"]
    assert alignment.alignment(mine, mine) == pytest.approx(1, abs=1e-5)
    assert alignment.alignment(mine, mine, 0.3) == pytest.approx(1, abs=1e-5)
    assert abs(alignment.alignment(mine, theirs)) < 0.3


def test_models_of_another_size_or_meaning_are_refused_by_name() -> None:
    with pytest.raises(EspalierError, match=r"one and two are not of one architecture: model\.layers\.0\.mlp\.gate_proj\.weight is \(48, 32\)"):
        matching.require_alike(tiny("llama"), tiny("llama", intermediate_size=40), ("one", "two"))
    with pytest.raises(EspalierError, match=r"hidden_act is 'silu' in one, and 'gelu' in two"):
        matching.require_alike(tiny("llama"), tiny("llama", hidden_act="gelu"), ("one", "two"))


def test_activations_of_experts_are_refused() -> None:
    with pytest.raises(EspalierError, match="match by weights"):
        matching.correlations(tiny("mixtral"), tiny("mixtral"), batches())


# PLeaS


def fully_merged(width: float, data: Any = None, family: str = "llama", widen: Any = "all") -> tuple[Any, Any, Any, Any]:
    one, other = tiny(family), tiny(family, seed=1)
    found = matching.match(one, other)
    return one, other, *matched.merged(one, other, found, pleas.widths(one, width, widen), data, 1e-6)


def test_blocks_are_the_papers_with_outputs_as_rows_and_inputs_as_columns() -> None:
    a, b = torch.randn(3, 2), torch.randn(3, 2)
    rows = pleas.Axis(torch.tensor([[0, 2, 1, -1], [0, 2, -1, 1]]))  # shared 0 and 2, then 1 of A, then 1 of B
    columns = pleas.Axis(torch.tensor([[1, 0, -1], [1, -1, 0]]))
    made = pleas.blocks(a, b, (rows, columns))
    assert made.shape == (4, 3)
    shared = [0, 2]
    torch.testing.assert_close(made[:2, 0], (a + b)[shared, 1] / 2)  # shared from shared: the mean
    torch.testing.assert_close(made[:2, 1], a[shared, 0] / 2)  # shared from A's own: half
    torch.testing.assert_close(made[:2, 2], b[shared, 0] / 2)
    torch.testing.assert_close(made[2], torch.stack([a[1, 1], a[1, 0], torch.tensor(0.0)]))  # A's own: A's, nothing from B's own
    torch.testing.assert_close(made[3], torch.stack([b[1, 1], torch.tensor(0.0), b[1, 0]]))
    bias = pleas.blocks(a[:, 0], b[:, 0], (rows,))
    torch.testing.assert_close(bias, torch.stack([(a + b)[0, 0] / 2, (a + b)[2, 0] / 2, a[1, 0], b[1, 0]]))


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_least_squares_keep_the_zeros_and_are_those_of_an_explicit_regression(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 2, generator=generator) for _ in "ab")
    biases = (torch.randn(3, generator=generator), torch.randn(3, generator=generator)) if has_bias else None
    rows = pleas.Axis(torch.tensor([[0, 2, 1, -1], [0, 2, -1, 1]]))
    columns = pleas.Axis(torch.tensor([[1, 0, -1], [1, -1, 0]]))
    z = [torch.randn(50, 2, generator=generator).double() for _ in "ab"]
    sums = Moments.empty(2)
    sums.add(*z)
    weight, bias, fit = pleas.fit((a, b), biases, (rows, columns), sums, 0.0)
    assert weight[2, 2] == 0 == weight[3, 1]  # (out, in): what is only A's reads nothing that is only B's
    assert fit.after <= fit.before
    out = [x @ w.double().T + (biases[i].double() if biases else 0) for i, (x, w) in enumerate(zip(z, (a, b), strict=True))]
    x = torch.stack([(z[0] + z[1])[:, 1] / 2, z[0][:, 0], z[1][:, 0], torch.ones(50)], 1)
    y = torch.stack([(out[0] + out[1])[:, 0] / 2, (out[0] + out[1])[:, 2] / 2, out[0][:, 1], out[1][:, 1]], 1)
    one = [3] if has_bias else []
    for row, allowed in ((0, [0, 1, 2]), (1, [0, 1, 2]), (2, [0, 1]), (3, [0, 2])):
        expected = torch.linalg.lstsq(x[:, allowed + one], y[:, row, None]).solution[:, 0]
        torch.testing.assert_close(weight[row, allowed].double(), expected[: len(allowed)], atol=1e-5, rtol=1e-4)
        if has_bias:
            assert bias is not None
            assert float(bias[row]) == pytest.approx(float(expected[-1]), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "qwen2"])
def test_no_fit_is_worse_than_the_permuted_average(family: str) -> None:
    for width in (1.0, 1.5):
        _, _, _, fits = fully_merged(width, batches(), family)
        assert fits
        for name, fit in fits.items():
            assert fit.after <= fit.before + 1e-9, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("data", [False, True])
def test_a_model_merged_with_itself_is_itself_however_its_copy_was_permuted(family: str, data: bool) -> None:
    model = tiny(family)
    before = logits(model)
    for width in (1.0, 1.5, 2.0):
        other = copy.deepcopy(model)
        shuffle(other)
        found = matching.match(model, other)
        made, _ = matched.merged(model, other, found, pleas.widths(model, width), batches() if data else None, 1e-6)
        assert float((logits(made) - before).abs().max()) < 2e-5
        if width == 1.0:
            for one, another in zip(model.parameters(), made.parameters(), strict=True):
                torch.testing.assert_close(one, another, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_at_twice_the_width_each_half_block_is_the_mean_of_both_models_on_its_input(family: str) -> None:
    one, other, made, _ = fully_merged(2.0, None, family)
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    models = (one, other, made)
    with torch.no_grad():
        halves = [model.model.layers[1].mlp(x) for model in models]
        torch.testing.assert_close(halves[2], (halves[0] + halves[1]) / 2, rtol=1e-4, atol=1e-5)
        places = one.model.rotary_emb(x, torch.arange(6)[None])
        halves = [model.model.layers[1].self_attn(x, position_embeddings=places, attention_mask=None)[0] for model in models]
        torch.testing.assert_close(halves[2], (halves[0] + halves[1]) / 2, rtol=1e-4, atol=1e-5)


def test_widths_are_taken_from_the_units_that_are_kept_and_rounded_to_what_the_config_can_say() -> None:
    assert pleas.separate(torch.tensor([0.5, 0.1, 0.1, 0.1, 0.9]), 2) == ([0, 3, 4], [1, 2])  # of equals exactly two
    sizes = pleas.widths(tiny("llama"), 1.5)  # 6 heads do not divide a hidden size of 32
    assert sizes == {"channels": (48, 72), "groups": (2, 2)}
    assert pleas.widths(tiny("qwen3"), 1.5) == {"channels": (48, 72), "groups": (2, 3)}
    assert pleas.widths(tiny("gpt2"), 2.0) == {"channels": (48, 96), "groups": (4, 4)}  # which has no head_dim
    assert pleas.widths(tiny("olmo2"), 2.0) == {"channels": (48, 96), "groups": (2, 2)}  # which norms all heads together
    assert pleas.widths(tiny("llama"), 2.0, "heads") == {"channels": (48, 48), "groups": (2, 4)}
    _, _, made, _ = fully_merged(1.5, None, "qwen3")
    found = anatomy(made).blocks[1]
    assert (found.feed_forward.channels, found.attention.heads, found.attention.key_value_heads) == (72, 6, 3)


def test_a_budget_goes_to_what_is_least_alike_and_is_kept() -> None:
    model = tiny("qwen3")
    alike, apart = torch.full((48,), 0.9), torch.linspace(0, 0.9, 48)
    groups = {("groups", block): torch.full((2,), 0.5) for block in range(2)}
    for flops in (1.0, 1.1, 1.3, 1.7, 2.0):
        for channels in (alike, apart):
            sizes = pleas.budgeted(model, flops, "all", groups | {("channels", block): channels for block in range(2)})
            assert pleas.flops_of(model, sizes) <= flops + 1e-9
            made = type(model)(pleas.config_of(model, sizes))
            counted = [sum(p.numel() for n, p in m.named_parameters() if p.ndim == 2 and "embed" not in n) for m in (model, made)]
            assert counted[1] / counted[0] == pytest.approx(pleas.flops_of(model, sizes))
    to_heads = pleas.budgeted(model, 1.35, "all", groups | {("channels", block): alike for block in range(2)})
    to_channels = pleas.budgeted(model, 1.35, "all", groups | {("channels", block): -apart for block in range(2)})
    assert to_heads["groups"] == (2, 3)
    assert to_channels["groups"] == (2, 2)
    with pytest.raises(EspalierError, match="flops is 3; it must be from 1"):
        pleas.budgeted(model, 3, "all", {})


def test_what_cannot_be_partly_merged_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"width is 2\.5; it must be from 1"):
        pleas.widths(tiny("llama"), 2.5)
    with pytest.raises(EspalierError, match="needs dense feed-forwards"):
        pleas.widths(tiny("mixtral"), 1.0)


def test_moments_do_not_depend_on_how_layers_are_grouped() -> None:
    one, other = tiny("llama"), tiny("llama", seed=1)
    widths = {f"model.layers.{i}.mlp.down_proj": 48 for i in range(2)}
    together = {k: v for group in moments(one, other, widths, batches()) for k, v in group.items()}
    groups = list(moments(one, other, widths, batches(), largest=1))
    assert [list(group) for group in groups] == [[path] for path in widths]
    for group in groups:
        for path, sums in group.items():
            assert torch.equal(sums.sums, together[path].sums)
            assert float(sums.sums[-1, -1]) == 48  # rows


# the verb


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Llamas ``a`` and ``b``, ``b`` in bf16 and ``permuted``, a shuffled ``a``; and a text."""
    folder = tmp_path_factory.mktemp("pair")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model("seedling"))
    models = {"a": tiny("llama", vocab_size=len(tokenizer)), "b": tiny("llama", seed=1, vocab_size=len(tokenizer)).to(torch.bfloat16)}
    models["permuted"] = copy.deepcopy(models["a"])
    shuffle(models["permuted"])
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("def double(x):\n    return 2 * x\n\n\nclass Pair:\n    first = 1\n" * 40)
    return folder


def run(pair: Path, out: Path, other: str = "b", **options: Any) -> dict[str, Any]:
    return espalier.merge_match(str(pair / "a"), str(pair / other), str(out), quiet=True, threads=1, **options)


def test_the_delta_makes_the_permuted_model_bit_for_bit_and_only_permutes(pair: Path, tmp_path: Path) -> None:
    result = run(pair, tmp_path / "delta")
    assert result["wrote"] == "delta"
    assert result["objective"][1] > result["objective"][0]
    manifest = json.loads((tmp_path / "delta" / "delta.json").read_text())
    assert {entry["form"] for entry in manifest["parameters"].values()} == {"permute"}
    espalier.apply(str(pair / "b"), [str(tmp_path / "delta")], str(tmp_path / "applied"), quiet=True)
    run(pair, tmp_path / "model", to="model")
    applied, written, before = (ModelDirectory(path) for path in (tmp_path / "applied", tmp_path / "model", pair / "b"))
    assert applied.fingerprint() == written.fingerprint() != before.fingerprint()
    for name in before:
        assert written.info(name) is not None
        assert torch.equal(written.read(name).flatten().sort().values, before.read(name).flatten().sort().values)
    with torch.no_grad():
        one, other = (transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens()).logits for path in (pair / "b", tmp_path / "model"))
    assert float((one - other).abs().max()) < 1e-5
    losses = [espalier.eval(str(pair / "b"), str(pair / "text.txt"), dtype="fp32", quiet=True, **more)["loss"] for more in ({}, {"delta": [str(tmp_path / "delta")]})]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_delta_of_experts_that_moved_applies_to_what_matching_made(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        tiny("qwen3_moe", seed=seed).to(torch.bfloat16).save_pretrained(tmp_path / name)
    run(tmp_path, tmp_path / "delta")
    forms = {entry["form"] for entry in json.loads((tmp_path / "delta" / "delta.json").read_text())["parameters"].values()}
    assert forms == {"permute", "replace"}
    run(tmp_path, tmp_path / "model", to="model")
    espalier.apply(str(tmp_path / "b"), [str(tmp_path / "delta")], str(tmp_path / "applied"), quiet=True)
    applied, written = (ModelDirectory(tmp_path / name) for name in ("applied", "model"))
    assert applied.fingerprint() == written.fingerprint()
    with torch.no_grad():
        one, other = (load_model(tmp_path / name, "fp32", "cpu")(tokens()).logits for name in ("b", "model"))
    assert float((one - other).abs().max()) < 1e-5


def test_matching_with_the_own_permutation_reports_no_barrier_and_no_distance(pair: Path, tmp_path: Path) -> None:
    result = run(pair, tmp_path / "model", other="permuted", to="model", data=str(pair / "text.txt"), points=3)
    assert ModelDirectory(tmp_path / "model").fingerprint() == ModelDirectory(pair / "a").fingerprint()
    assert result["distance"]["after"] == 0
    assert result["distance"]["reduction"] == 1
    assert result["alignment"]["all"]["after"] == pytest.approx(1, abs=1e-4)
    assert result["alignment"]["top"]["before"] < 0.5
    assert result["barrier"]["after"] < 1e-5
    assert result["losses"]["after"][0] == pytest.approx(result["losses"]["before"][-1], abs=1e-5)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_a_partial_merge_is_an_ordinary_checkpoint(pair: Path, tmp_path: Path, by: Any) -> None:
    options: Any = {"width": 2.0} if by == "weights" else {"flops": 2.0}
    result = run(pair, tmp_path / "wide", **options, by=by, data=str(pair / "text.txt"), points=3, report=False)
    assert result["wrote"] == "merged model"
    assert result["widths"] == {"channels": (48, 96), "groups": (2, 4)}
    assert all(fit["after"] <= fit["before"] + 1e-9 for fit in result["fits"].values())
    loaded = load_model(tmp_path / "wide", "fp32", "cpu")
    texts = read_text(str(pair / "a"), loaded.config, None, str(pair / "text.txt"), 32768, None, 0)
    assert texts is not None
    assert loss(loaded, texts[1]) == pytest.approx(result["merged_loss"], abs=1e-5)
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"], config["head_dim"]) == (96, 8, 8)
    assert ModelDirectory(tmp_path / "wide").side_files().keys() >= {"tokenizer.json"}


def test_the_command_line_has_it(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", "match", str(pair / "a"), str(pair / "b"), "--out", str(tmp_path / "out"), "--no-report", "--quiet", "--json"]
    command.main(arguments, standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    assert set(result["moved"]) == {"residual", "groups", "channels"}


def test_merging_models_that_were_trained_apart_warns_and_tunes_of_one_base_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    big = {"hidden_size": 64, "intermediate_size": 96}
    base = tiny("llama", **big)
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    for name, model in {"base": base, "tuned": tuned, "other": tiny("llama", seed=1, **big)}.items():
        model.save_pretrained(tmp_path / name)
    espalier.merge([str(tmp_path / "base"), str(tmp_path / "tuned")], str(tmp_path / "one"), method="linear")
    assert "trained apart" not in capsys.readouterr().err
    espalier.merge([str(tmp_path / "base"), str(tmp_path / "other")], str(tmp_path / "two"), method="linear")
    assert "were trained apart" in capsys.readouterr().err.replace("\n", " ")


def test_options_that_do_not_go_together_are_refused(pair: Path, tmp_path: Path) -> None:
    for options in ({"width": 1.0, "to": "model"}, {"width": 1.0, "flops": 1.5}):
        with pytest.raises(EspalierError, match="give one of them"):
            run(pair, tmp_path / "x", **options)
    with pytest.raises(EspalierError, match="--by activations needs text"):
        run(pair, tmp_path / "x", by="activations")
    with pytest.raises(EspalierError, match="flops is 0; it must be from 1"):
        run(pair, tmp_path / "x", flops=0)
    with pytest.raises(EspalierError, match="give its --width or --flops too"):
        run(pair, tmp_path / "x", widen="heads")
    with pytest.raises(EspalierError, match="points is 2"):
        run(pair, tmp_path / "x", points=2)
    assert not (tmp_path / "x").exists()


def test_models_whose_inner_products_overflow_are_refused() -> None:
    a, b = tiny("llama"), tiny("llama")
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.fill_(3e38)
    with pytest.raises(EspalierError, match="similarity of two units is not finite"):
        matching.match(a, b)


def test_models_of_another_vocabulary_are_refused(pair: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = tiny("llama", vocab_size=4096)
    model.save_pretrained(other)
    content = json.loads((pair / "a" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    for name in ("tokenizer_config.json",):
        (other / name).write_text((pair / "a" / name).read_text())
    with pytest.raises(EspalierError, match="models of different vocabularies cannot be lined up"):
        espalier.merge_match(str(pair / "a"), str(other), str(tmp_path / "out"), quiet=True)
