"""Calibrate: what one block at a time gives is what hooks on the whole model give, for every family, batch size and end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, tiny
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from espalier.anatomy.parameters import parameters
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
    # gpt-oss's own loop over experts adds biases in another order than a linear layer does: the same in float64 only
    dtype = torch.float64 if family == "gpt_oss" else torch.float32
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
