"""MAM adapters are a prefix and a scaled parallel adapter, and nothing else."""

from __future__ import annotations

import copy

import torch
from families import tiny, tokens

from espalier import registry
from espalier.anatomy.site import sites
from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.budget.fitting import fit, trained


def test_it_is_the_two_methods_attached_one_after_the_other() -> None:
    """"MAM = prefix with small bottleneck l=30 at attention + scaled parallel adapter at FFN with r=512, s=4"."""
    one, two = copy.deepcopy(tiny("llama")), copy.deepcopy(tiny("llama"))
    attach(one, "mam")
    attach(two, "prefix", length=30)
    attach(two, "scaled-parallel-adapter", width=512, scale=4.0)
    together = {**attachments(two)["prefix"].branches, **attachments(two)["scaled-parallel-adapter"].branches}
    branches = attachments(one)["mam"].branches
    assert branches.keys() == together.keys()
    for site, branch in branches.items():
        assert branch.names == together[site].names
        for name in branch.names:
            assert torch.equal(getattr(branch, name), getattr(together[site], name))
            with torch.no_grad():
                noise = torch.randn(getattr(branch, name).shape, generator=torch.Generator().manual_seed(1)) * 0.1
                getattr(branch, name).add_(noise)
                getattr(together[site], name).add_(noise)
    assert torch.equal(one(tokens()).logits, two(tokens()).logits)
    assert {n.rpartition(".")[2] for n in trainable_parameters(one)} == {"key", "value", "down", "down_bias", "up", "up_bias"}


def test_a_width_that_is_set_later_reaches_the_adapter() -> None:
    """``--trainable`` sets ``mlp_width`` on a method that has been asked for its sites before."""
    method = registry.make("mam", "brancher")
    chosen = [site for site in sites(tiny("llama")) if method.accepts(site)]
    narrow = fit(method, chosen, 5000)
    assert trained(narrow, chosen) <= 5000 < trained(method, chosen)
    assert narrow.mlp_width < 512 and {part.name: part for part in narrow.made}["scaled-parallel-adapter"].width == narrow.mlp_width
