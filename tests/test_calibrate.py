"""Calibrate: what one block at a time gives is what hooks on the whole model give, for every family, batch size and end."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import EXPERTS, VOCABULARY, tiny
from processes import arm, command_line
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from espalier.anatomy.parameters import parameters
from espalier.calibrate import make as making
from espalier.calibrate.make import choose_windows, make
from espalier.calibrate.statistics import STATISTICS, SingularVectors, Variance, parse_want
from espalier.calibrate.store import Calibration, Request, load
from espalier.calibrate.walk import Walker
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.checkpoint.safetensors_file import read_safetensors, write_safetensors
from espalier.data.batches import IGNORED
from espalier.data.store import TokenStore
from espalier.errors import EspalierError, NotFiniteError

LENGTH = 12
MOMENTS = ("mean", "variance", "second_moment", "norm", "absmax", "output_mean", "output_variance")
GRADIENTS = ("fisher", "gradient_norm")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that another test made is found."""
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))


def store_of(folder: Path, sizes: tuple[int, ...] = (30, 13, 2, 1, 13, 25), targets: bool = False) -> TokenStore:
    """Documents of random tokens; with ``targets``, two of three tokens are no targets."""
    folder.mkdir(exist_ok=True)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    drawn = np.random.default_rng(0)
    drawn.integers(3, VOCABULARY, offsets[-1]).astype(np.uint16).tofile(folder / "tokens.bin")
    if targets:
        (drawn.random(offsets[-1]) < 1 / 3).tofile(folder / "targets.bin")
    return TokenStore(folder, "text", np.dtype(np.uint16), offsets, np.array(sizes), targets, f"{sizes}{targets}")


def saved(folder: Path, family: str, **overrides: Any) -> ModelDirectory:
    tiny(family, **overrides).save_pretrained(folder)
    return ModelDirectory(folder)


def calibrated(
    directory: ModelDirectory, store: TokenStore, want: str, dtype: torch.dtype = torch.float32, batch_size: int = 8, **changes: Any
) -> Calibration:
    asked = {"targets": ("all",), "tokens": 0, "sequence_length": LENGTH, "seed": 0, "rank": 4, **changes}
    name = str(dtype).removeprefix("torch.")
    request = Request(model=directory.fingerprint(), data=store.digest, want=tuple(parse_want(want)), dtype=name, **asked)
    return make(directory, store, request, dtype=dtype, device=CPU, batch_size=batch_size)[0]


def sequences(store: TokenStore) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs (1, n) and what is predicted (n,), of every sequence in the order of the calibration."""
    found = []
    for window in choose_windows(store, LENGTH, 0, 0):
        ids = torch.from_numpy(store.read(window.start, window.stop + 1))
        flags = store.read_targets(window.start + 1, window.stop + 1)
        goals = ids[1:] if flags is None else torch.where(torch.from_numpy(flags.copy()), ids[1:], IGNORED)
        found.append((ids[None, :-1], goals))
    return found


def whole_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    for parameter in model.parameters():  # from views of a file to memory of its own: kernels are chosen by alignment
        parameter.data = parameter.data.clone()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def seen_by_hooks(model: Any, store: TokenStore) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """All rows that every watched parameter reads and gives in a pass over the whole model; a list entry per expert."""
    inputs: dict[str, dict[int, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    outputs: dict[str, dict[int, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    handles = []

    def of_linear(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            inputs[name][0].append(args[0].flatten(0, -2))
            outputs[name][0].append(output.flatten(0, -2))

        return hook

    def of_experts(path: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            hidden, chosen = args[0], args[1]
            for expert in range(module.num_experts):
                rows = hidden[(chosen == expert).any(-1)]
                weights = [w[expert].T if module.is_transposed else w[expert] for w in (module.gate_up_proj, module.down_proj)]
                biases = [b[expert] for b in (module.gate_up_proj_bias, module.down_proj_bias)] if module.has_bias else [None, None]
                before = functional.linear(rows, weights[0], biases[0])
                inner = module._apply_gate(before)
                after = functional.linear(inner, weights[1], biases[1])
                for local, x, y in (("gate_up_proj", rows, before), ("down_proj", inner, after)):
                    inputs[f"{path}.{local}"][expert].append(x)
                    outputs[f"{path}.{local}"][expert].append(y)

        return hook

    for target in parameters(model):
        if "linear" in target.routes:
            path = target.names[target.routes.index("linear")].rpartition(".")[0]
            handles.append(model.get_submodule(path).register_forward_hook(of_linear(target.name)))
        elif target.route == "experts" and target.role == "experts.down":
            path = target.name.rpartition(".")[0]
            handles.append(model.get_submodule(path).register_forward_pre_hook(of_experts(path)))
    with torch.no_grad():
        for ids, _ in sequences(store):
            model(ids)
    for handle in handles:
        handle.remove()

    def joined(rows: dict[str, dict[int, list[torch.Tensor]]]) -> dict[str, list[torch.Tensor]]:
        return {name: [torch.cat(of[e]).double() for e in sorted(of)] for name, of in rows.items()}

    return joined(inputs), joined(outputs)


def plainly(statistic: str, X: torch.Tensor) -> torch.Tensor:
    """A statistic of all rows at once, by its definition."""
    some = max(len(X), 1)
    return {
        "mean": lambda: X.sum(0) / some,
        "variance": lambda: ((X - X.sum(0) / some) ** 2).sum(0) / some,
        "second_moment": lambda: X.T @ X,
        "norm": lambda: (X * X).sum(0).sqrt(),
        "absmax": lambda: X.abs().amax(0) if len(X) else torch.zeros(X.shape[1], dtype=X.dtype),
    }[statistic.removeprefix("output_")]()


def assert_close(found: torch.Tensor, right: torch.Tensor, relative: float, what: str = "") -> None:
    assert found.shape == right.shape, what
    assert found.dtype == torch.float64, what
    error = float((found - right).abs().max())
    assert error <= relative * max(float(right.abs().max()), 1e-30), f"{what}: {error}"


ALL = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "phi3", "gpt2", "gpt_neox", "opt",
       "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss")  # fmt: skip


@pytest.mark.parametrize("family", ALL)
def test_statistics_are_those_of_hooks_on_the_whole_model(family: str, tmp_path: Path) -> None:
    directory, store = saved(tmp_path / "model", family), store_of(tmp_path / "tokens")
    # transformers' loop over experts has an expert's rows in another order (by rank of the choice, then by token), and with
    # more than one thread the bits of a row of a product depend on its place; gpt-oss adds biases in another order as well
    dtype = torch.float64 if family in EXPERTS else torch.float32
    made = calibrated(directory, store, ",".join(MOMENTS), dtype)
    inputs, outputs = seen_by_hooks(whole_model(directory.path, dtype), store)
    assert set(made.sites) == set(inputs)
    for name, rows in inputs.items():
        assert made.tokens(name) == [len(x) for x in rows]
        for statistic in MOMENTS:
            of = outputs[name] if statistic.startswith("output") else rows
            right = torch.stack([plainly(statistic, x) for x in of])
            found = made.read(name, statistic)
            assert_close(found if len(of) > 1 else found[None], right, 1e-10, f"{statistic} of {name}")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt", "gemma3", "mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", [False, True], ids=["all tokens", "some tokens"])
def test_fisher_is_that_of_autograd_on_each_sequence(family: str, targets: bool, tmp_path: Path) -> None:
    directory, store = saved(tmp_path / "model", family), store_of(tmp_path / "tokens", targets=targets)
    made = calibrated(directory, store, "fisher,gradient_norm", torch.float64)
    model = whole_model(directory.path, torch.float64)
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    norms: dict[str, list[float]] = defaultdict(list)
    total, predictions = 0.0, 0
    for ids, goals in sequences(store):
        model.zero_grad()
        loss = functional.cross_entropy(model(ids).logits[0], goals, ignore_index=IGNORED, reduction="sum")
        loss.backward()
        total, predictions = total + float(loss.detach()), predictions + int((goals != IGNORED).sum())
        for name, p in model.named_parameters():
            gradient = p.grad if p.grad is not None else torch.zeros_like(p)
            fisher[name] += gradient**2
            norms[name].append(float(gradient.norm()))
    assert set(made.names("fisher")) == set(fisher)
    for name, right in fisher.items():
        assert right.any(), name
        assert_close(made.read(name, "fisher"), right, 1e-10, name)
        assert_close(made.read(name, "gradient_norm"), torch.tensor(norms[name], dtype=torch.float64), 1e-10, name)
    assert made.facts["loss"] == pytest.approx(total / predictions) and made.facts["predictions"] == predictions


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_batch_size_changes_rounding_in_float64_only(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences run one by one, so every row has the same bits; what waits for one addition is summed in another order."""
    directory, store = saved(tmp_path / "model", family), store_of(tmp_path / "tokens")
    made = []
    for batch_size in (1, 3, 100):
        monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / f"cache{batch_size}"))
        made.append(calibrated(directory, store, ",".join(STATISTICS), batch_size=batch_size))
    for statistic in STATISTICS:
        for name in made[0].names(statistic):
            first = made[0].read(name, statistic)
            for other in made[1:]:
                if statistic in ("fisher", "gradient_norm", "absmax", "singular_vectors"):
                    assert torch.equal(first, other.read(name, statistic)), (name, statistic)
                else:
                    assert_close(other.read(name, statistic), first, 1e-12, f"{statistic} of {name}")


def test_variance_loses_no_digits_to_a_large_mean_whatever_the_batches() -> None:
    rows = torch.randn(500, 7, dtype=torch.float64) + 1e7
    variance = Variance((7,), 0, CPU)
    for part in rows.split([1, 99, 250, 150]):
        variance.add(part)
    assert_close(variance.result(), rows.var(0, unbiased=False), 1e-7)


def test_singular_vectors_are_those_of_all_rows_where_the_sketch_holds_their_rank() -> None:
    rows = torch.randn(300, 6, dtype=torch.float64) @ torch.randn(6, 20, dtype=torch.float64)
    sketch = SingularVectors((20,), 4, CPU)
    for part in rows.split(37):
        sketch.add(part)
    values, right = torch.linalg.svd(rows, full_matrices=False)[1:]
    found = sketch.result()
    assert found.shape == SingularVectors.shape((20,), 4, 1)
    assert_close(found.norm(dim=1), values[:4], 1e-10)
    assert_close((functional.normalize(found) * right[:4]).sum(1).abs(), torch.ones(4, dtype=torch.float64), 1e-10)


def test_singular_vectors_of_full_rank_rows_keep_nearly_all_that_the_best_ones_do() -> None:
    scales = 0.7 ** torch.arange(40, dtype=torch.float64)
    rows = torch.randn(2000, 40, dtype=torch.float64) * scales
    sketch = SingularVectors((40,), 6, CPU)
    for part in rows.split(64):
        sketch.add(part)
    kept = (rows @ functional.normalize(sketch.result()).T).square().sum()
    best = torch.linalg.svdvals(rows)[:6].square().sum()
    assert 0.9999 * best <= kept <= best * (1 + 1e-12)


# what others make of it


def test_least_squares_from_the_second_moment_is_least_squares_on_the_activations(tmp_path: Path) -> None:
    """What pruning and quantization do: the weight of half the inputs that gives nearest what all of them gave."""
    directory, store = saved(tmp_path / "model", "llama"), store_of(tmp_path / "tokens", (60, 60, 60))
    made = calibrated(directory, store, "second_moment")
    model = whole_model(directory.path)
    inputs, _ = seen_by_hooks(model, store)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        (X,), H = inputs[name], made.read(name, "second_moment")
        W = model.get_parameter(name).detach().double()
        kept = torch.arange(0, X.shape[1], 2)
        direct = torch.linalg.lstsq(X[:, kept], X @ W.T).solution
        from_moments = torch.linalg.solve(H[kept][:, kept], H[kept] @ W.T)
        assert_close(from_moments, direct, 1e-6, name)


def test_regmean_of_two_models_minimises_the_distance_to_both_outputs(tmp_path: Path) -> None:
    """RegMean (arXiv:2212.09849): W = (G1 + G2)^-1 (G1 W1 + G2 W2), from siblings that share one stored moment."""
    name, grams, weights, rows = "model.layers.0.self_attn.v_proj.weight", [], [], []
    store = store_of(tmp_path / "tokens", (60, 60))
    for seed in (0, 1):
        directory = saved(tmp_path / f"model{seed}", "llama", seed=seed)
        made = calibrated(directory, store, "second_moment")
        assert made.sites[name] == made.sites[name.replace("v_proj", "q_proj")] == "0.attention"
        grams.append(made.read(name, "second_moment"))
        model = whole_model(directory.path)
        weights.append(model.get_parameter(name).detach().double().T)
        rows.append(seen_by_hooks(model, store)[0][name][0])
    merged = torch.linalg.solve(sum(grams), sum(G @ W for G, W in zip(grams, weights, strict=True)))
    right = torch.linalg.lstsq(torch.cat(rows), torch.cat([X @ W for X, W in zip(rows, weights, strict=True)])).solution
    assert_close(merged, right, 1e-6)


def test_experts_have_their_own_statistics_and_those_without_tokens_are_counted(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", "mixtral")
    tensors = read_safetensors(directory.path / "model.safetensors")
    router = next(name for name in tensors if name.endswith("layers.0.block_sparse_moe.gate.weight") or name.endswith("layers.0.mlp.gate.weight"))
    store = store_of(tmp_path / "tokens")
    tensors[router][:] = 0.0  # all experts tie, and the same two are taken for every token
    write_safetensors(directory.path / "model.safetensors", tensors, {"format": "pt"})
    made = calibrated(ModelDirectory(directory.path), store, "second_moment,mean")
    name = "model.layers.0.mlp.experts.down_proj"
    seen = made.tokens(name)
    assert len(seen) == 4 and sum(seen) == 2 * made.facts["tokens"] and seen.count(0) == 2
    moment = made.read(name, "second_moment")
    for expert, tokens in enumerate(seen):
        assert bool(moment[expert].any()) == (tokens > 0)


# what a request is


def test_only_the_targets_that_are_named_are_watched(tmp_path: Path) -> None:
    directory, store = saved(tmp_path / "model", "gpt2"), store_of(tmp_path / "tokens")
    made = calibrated(directory, store, "norm,fisher", targets=("mlp.down",))
    assert made.names("norm") == made.names("fisher") == [f"transformer.h.{i}.mlp.c_proj.weight" for i in (0, 1)]
    with pytest.raises(EspalierError, match=r"holds no norm of 'transformer\.h\.0\.attn\.c_attn\.weight'"):
        made.read("transformer.h.0.attn.c_attn.weight", "norm")
    with pytest.raises(EspalierError, match="does not hold 'mean'"):
        made.read("transformer.h.0.mlp.c_proj.weight", "mean")
    with pytest.raises(EspalierError, match="matches no parameter"):
        calibrated(directory, store, "norm", targets=("experts",))


def test_the_token_limit_and_the_seed_choose_the_sequences(tmp_path: Path) -> None:
    store = store_of(tmp_path / "tokens", (9,) * 50)
    few = choose_windows(store, LENGTH, 40, 0)
    assert sum(map(len, few)) == 40 and few != choose_windows(store, LENGTH, 40, 1)
    assert len(choose_windows(store, LENGTH, 0, 0)) == 50 and len(choose_windows(store, LENGTH, 1, 0)) == 1


def test_an_unknown_statistic_is_refused_by_name() -> None:
    with pytest.raises(EspalierError, match="names 'fischer'; did you mean 'fisher'"):
        parse_want("mean,fischer")
    with pytest.raises(EspalierError, match="--want is empty"):
        parse_want(" ,")
    assert parse_want("fisher, mean,fisher") == ["mean", "fisher"]


def test_the_same_request_and_a_part_of_it_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, store = saved(tmp_path / "model", "llama"), store_of(tmp_path / "tokens")
    whole = calibrated(directory, store, "mean,norm,fisher")
    with monkeypatch.context() as closed:
        closed.setattr(making, "Walker", None)  # no model is made
        assert calibrated(directory, store, "mean,norm,fisher").path == whole.path
        part = calibrated(directory, store, "norm")
        part.copy_to(tmp_path / "part.safetensors", ["norm"])
        with pytest.raises(TypeError):
            calibrated(directory, store, "norm", seed=1)
        with pytest.raises(TypeError):
            calibrated(directory, store, "norm,absmax")
    copied = load(tmp_path / "part.safetensors")
    assert copied.statistics == ["norm"] and copied.coverage == whole.coverage
    assert all(torch.equal(copied.read(name, "norm"), whole.read(name, "norm")) for name in whole.names("norm"))
    assert not list(tmp_path.rglob("*.work"))


def test_a_damaged_file_is_refused_and_in_the_cache_made_anew(tmp_path: Path) -> None:
    directory, store = saved(tmp_path / "model", "llama"), store_of(tmp_path / "tokens")
    path = calibrated(directory, store, "mean").path
    content, tensors, facts = path.read_bytes(), read_safetensors(path), load(path).facts
    key = "espalier_calibration"

    def refused(words: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        write_safetensors(path, tensors, metadata)
        with pytest.raises(EspalierError, match=words) as raised:
            load(path)
        assert str(path) in str(raised.value)

    refused("is no calibration", tensors, {})
    refused("metadata are malformed", tensors, {key: "{"})
    refused("metadata are malformed", tensors, {key: json.dumps({**facts, "places": {"input": {"x": 3}}})})
    refused("format 99", tensors, {key: json.dumps({**facts, "format": 99})})
    name = next(iter(tensors))
    refused("is missing; it should be F64", {k: v for k, v in tensors.items() if k != name}, {key: json.dumps(facts)})
    refused("it should be F64", {**tensors, name: tensors[name][:-1].clone()}, {key: json.dumps(facts)})
    refused("it should be F64", {**tensors, name: tensors[name].float()}, {key: json.dumps(facts)})
    refused("it should be not there", {**tensors, "x:mean": tensors[name]}, {key: json.dumps(facts)})
    path.write_bytes(content[:-8])
    with pytest.raises(EspalierError, match="not a valid safetensors file"):
        load(path)
    assert calibrated(directory, store, "mean").path == path and path.read_bytes() == content


# a model that is too large, or wrong


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    directory, store = saved(tmp_path / "model", "llama", num_hidden_layers=12), store_of(tmp_path / "tokens")
    walker = Walker(directory, torch.float32, CPU)

    def nbytes(targets: Any) -> int:
        return 4 * sum(target.size for target in targets)

    block, small = max(map(nbytes, walker.inside)), nbytes(walker.small)
    made, facts = make(
        directory, store, Request(directory.fingerprint(), store.digest, ("norm", "fisher"), ("all",), 0, LENGTH, 0, "float32", 4),
        dtype=torch.float32, device=CPU,
    )  # fmt: skip
    assert made.names("fisher") and not facts["cached"]
    assert facts["resident"] == small + max(block, nbytes(walker.embedding), nbytes(walker.head)) < nbytes(walker.targets) / 4


def test_a_hidden_state_that_is_not_finite_is_reported_by_block(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", "llama", num_hidden_layers=3)
    tensors = read_safetensors(directory.path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    write_safetensors(directory.path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"the hidden states after block 1 \(model\.layers\.1\) are not finite on tokens \d+ to \d+"):
        calibrated(ModelDirectory(directory.path), store_of(tmp_path / "tokens"), "mean")


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", "llama")
    tensors = read_safetensors(directory.path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"][:, :-1].clone()
    write_safetensors(directory.path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(EspalierError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' has shape \[32, 47\], the config makes it \[32, 48\]"):
        calibrated(ModelDirectory(directory.path), store_of(tmp_path / "tokens"), "mean")


@pytest.mark.parametrize(
    ("family", "why"), [("gemma3n", "depends on the tokens"), ("zamba2", "its blocks share")], ids=["token-dependent calls", "shared blocks"]
)
def test_a_family_that_is_no_chain_of_blocks_is_refused_by_name(family: str, why: str, tmp_path: Path) -> None:
    import transformers

    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 0}
    config: Any
    if family == "gemma3n":
        config = transformers.Gemma3nTextConfig(
            **small, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=VOCABULARY, laurel_rank=4,
            hidden_size_per_layer_input=8, layer_types=["full_attention"] * 2, num_kv_shared_layers=0, activation_sparsity_pattern=None,
        )  # fmt: skip
    else:
        config = transformers.Zamba2Config(
            **small, num_hidden_layers=4, num_key_value_heads=4, mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(EspalierError, match=f"ForCausalLM cannot be walked block by block: .*{why}"):
        calibrated(ModelDirectory(tmp_path / "model"), store_of(tmp_path / "tokens"), "mean")


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_blocks_that_return_tuples_are_walked(family: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"falcon": ("FalconConfig", {"num_hidden_layers": 2, "num_attention_heads": 4}), "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4})}
    name, more = sizes[family]
    config = getattr(transformers, name)(vocab_size=VOCABULARY, hidden_size=32, pad_token_id=0, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    store = store_of(tmp_path / "tokens")
    made = calibrated(ModelDirectory(tmp_path / "model"), store, "mean")
    for parameter, (rows,) in seen_by_hooks(whole_model(tmp_path / "model"), store)[0].items():
        assert_close(made.read(parameter, "mean"), rows.mean(0), 1e-10, parameter)


# the command


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts with seedling's tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("calibrate")
    tiny("mixtral", vocab_size=4096).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("".join(f"def double_{i}(x):\n    return x * {2 * i}\n\n\n" for i in range(120)))
    return folder


def command(work: Path, cache: Path, out: Path, *more: str, armed: tuple[str, int] | None = None) -> subprocess.CompletedProcess[str]:
    """One process; ``armed`` are the moment and count at which it kills itself."""
    arguments = ["calibrate", "--model", work / "model", "--data", work / "text.txt", "--out", out, "--want", "mean,second_moment,fisher"]
    options = ["--tokens", "200", "--sequence-length", "32", "--threads", "1", "--json", *more]
    return command_line(*arguments, *options, before=functools.partial(arm, *armed) if armed else None, ESPALIER_CACHE=str(cache))


def test_the_command_reports_what_was_done_and_returns_at_once_the_second_time(work: Path, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out.safetensors"
    done = command(work, cache, out)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["statistics"] == ["mean", "second_moment", "fisher"] and not result["cached"] and result["resumed_at"] is None
    assert 150 < result["tokens"] <= 200 and result["bytes"] == out.stat().st_size and result["loss"] > 0
    assert "tokens per expert" in done.stderr and load(out).coverage == result["coverage"]
    again = command(work, cache, out)
    assert json.loads(again.stdout)["cached"] and "it was taken from the cache" in again.stderr
    fewer = command(work, cache, tmp_path / "fewer.safetensors", "--want", "mean")
    assert json.loads(fewer.stdout)["cached"] and load(tmp_path / "fewer.safetensors").statistics == ["mean"]
    other = command(work, cache, out, "--seed", "1")
    assert other.returncode == 2 and "already exists and is not the calibration that is asked for" in other.stderr
    wrong = command(work, cache, out, "--want", "means")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --want names 'means'; did you mean 'mean'")


def test_a_killed_calibration_goes_on_to_the_same_bits(work: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.safetensors"
    assert command(work, tmp_path / "reference-cache", reference).returncode == 0
    for moment, count in (("file", 8), ("rename", 9)):
        cache, out = tmp_path / f"{moment}{count}", tmp_path / f"{moment}{count}.safetensors"
        killed = command(work, cache, out, armed=(moment, count))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists()
        done = command(work, cache, out)
        assert done.returncode == 0, done.stderr
        stage = json.loads(done.stdout)["resumed_at"]
        assert stage and f"from its stage {stage}" in done.stderr
        assert out.read_bytes() == reference.read_bytes(), stage
        assert not list(cache.rglob("*.work")) and not list(cache.rglob(".*tmp-*"))
