"""Bottleneck adapters: where they are, what they read, and what the unified view says of them."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, tiny, tokens

from espalier.anatomy.site import sites
from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.delta.forms import LowRank
from espalier.errors import EspalierError


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def seen(model: torch.nn.Module, path: str) -> dict[str, torch.Tensor]:
    """Input and output of a module in one forward pass of the model."""
    found: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        found["input"] = args[0] if args else next(iter(kwargs.values()))
        found["output"] = output[0] if isinstance(output, tuple) else output

    handle = model.get_submodule(path).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(tokens())
    handle.remove()
    return found


def test_houlsby_is_behind_both_sublayers_and_pfeiffer_behind_the_feed_forward() -> None:
    """"Adapter: h <- h + ReLU(h W_d) W_u (sequential)"."""
    for method, kinds in (("houlsby", {"attention", "mlp"}), ("pfeiffer", {"mlp"})):
        model = copy.deepcopy(tiny("llama"))
        attach(model, method)
        branches = attachments(model)[method].branches
        assert {branch.site.kind for branch in branches.values()} == kinds
        assert len(branches) == len(kinds) * 2


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_parallel_adapter_with_the_identity_is_lora(scale: float) -> None:
    """"parallel adapter with identity activation equals LoRA merged": beside the same matrix, it changes what LoRA changes."""
    model = copy.deepcopy(tiny("llama"))
    before = seen(model, "model.layers.0.mlp")
    attach(model, "scaled-parallel-adapter", width=3, activation="identity", scale=scale, targets="blocks.0.mlp")
    (branch,) = attachments(model)["scaled-parallel-adapter"].branches.values()
    with torch.no_grad():
        branch.up.copy_(torch.randn(branch.up.shape, generator=torch.Generator().manual_seed(1)))
    after = seen(model, "model.layers.0.mlp")
    lora = LowRank(branch.up.detach(), branch.down.detach(), torch.tensor(scale))
    assert torch.equal(before["input"], after["input"])
    torch.testing.assert_close(after["output"] - before["output"], lora.matmul(after["input"]), rtol=1e-4, atol=1e-5)


def test_sequential_reads_what_the_sublayer_gives_and_parallel_what_it_is_given() -> None:
    """"insertion form (parallel: input is the sub-layer's input; sequential: input is its output)"."""
    for method in ("pfeiffer", "parallel-adapter"):
        model = copy.deepcopy(tiny("gpt2"))
        before = seen(model, "transformer.h.0.mlp")
        attach(model, method, width=3, activation="tanh", targets="blocks.0.mlp")
        randomize(model)
        (branch,) = attachments(model)[method].branches.values()
        after = seen(model, "transformer.h.0.mlp")
        x = before["output" if method == "pfeiffer" else "input"]
        with torch.no_grad():
            change = torch.tanh(x @ branch.down.T + branch.down_bias) @ branch.up.T + branch.up_bias
        torch.testing.assert_close(after["output"] - before["output"], change, rtol=1e-4, atol=1e-5)


def test_a_learned_scale_is_one_number_for_each_site() -> None:
    model = copy.deepcopy(tiny("llama"))
    attach(model, "scaled-parallel-adapter", learned_scale=True)
    assert [p.tolist() for n, p in trainable_parameters(model).items() if n.endswith(".s")] == [[4.0], [4.0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_sites_and_a_branch_at_each_acts(family: str) -> None:
    model = copy.deepcopy(tiny(family))
    found = sites(model)
    assert [s.kind for s in found] == ["attention", "heads", "mlp"] * 2 + ["embedding", "model"]
    with torch.no_grad():
        before = model(tokens()).logits
        for site in found:
            if site.place == "sublayer":
                for method in ("houlsby", "parallel-adapter"):
                    attach(model, method, name=f"{method}-{site.name.replace('.', '-')}", targets=site.name)
                    randomize(model)
                    after = model(tokens()).logits
                    assert (after - before).abs().max() > 1e-3, (site, method)
                    before = after


def test_a_site_that_is_not_there_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"'heads' matches no site that this method can be at .*attention, mlp"):
        attach(copy.deepcopy(tiny("llama")), "houlsby", targets="heads")
    with pytest.raises(EspalierError, match="dropout is 1"):
        attach(copy.deepcopy(tiny("llama")), "houlsby", dropout=1.0)
