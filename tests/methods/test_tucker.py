"""FLoRA (arXiv:2405.14739): a core and a factor for each dimension, of matrices, experts and convolutions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.attach.attachment import Attachment, attach, attachments, detach, stored, trainable_parameters
from espalier.delta.forms import LowRank, Tucker
from espalier.errors import EspalierError


@pytest.fixture(autouse=True)
def the_same_numbers() -> None:
    torch.manual_seed(0)


class SmallCNN(nn.Module):
    """Convolutions of every kind, a grouped one and a one-dimensional one among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=4, dilation=2)
        self.depthwise = nn.Conv2d(12, 12, 2, groups=12, bias=False)
        self.line = nn.Conv1d(12, 6, 3)
        self.out = nn.Linear(6, 5)

    def get_input_embeddings(self) -> None:
        return None

    get_output_embeddings = get_input_embeddings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(torch.relu(self.grouped(torch.relu(self.first(x)))))
        return self.out(torch.relu(self.line(x.flatten(2))).mean(-1))


def attached(model: nn.Module, **options: Any) -> tuple[nn.Module, Attachment]:
    model = attach(model, "tucker", name="d", **options)
    return model, attachments(model)["d"]


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def dense(model: nn.Module, attachment: Attachment) -> dict[str, torch.Tensor]:
    return {n: slot.update().materialize(stored(model, n)).detach() for n, slot in attachment.slots.items()}


IMAGES = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("qwen3_moe", "experts"), ("llama", "embedding")])
def test_each_unfolding_of_the_update_has_at_most_its_rank(family: str, targets: str) -> None:
    """The rank of the mode-n unfolding of G x_1 U_1 ... x_N U_N is at most r_n."""
    model, attachment = attached(tiny(family), rank=3, targets=targets)
    fill(model)
    for update in dense(model, attachment).values():
        for mode, size in enumerate(update.shape):
            assert torch.linalg.matrix_rank(update.movedim(mode, 0).flatten(1), rtol=1e-4) == min(3, size)


def test_a_matrix_with_the_identity_for_a_core_is_lora() -> None:
    B, A, x = torch.randn(12, 4), torch.randn(4, 9), torch.randn(5, 9)
    update, lora = Tucker(torch.eye(4), [B, A.T], 1.5), LowRank(B, A, 1.5)
    torch.testing.assert_close(update.materialize(torch.zeros(12, 9)), lora.materialize(torch.zeros(12, 9)))
    torch.testing.assert_close(update.matmul(x), lora.matmul(x))


def test_experts_share_factors_and_differ_by_a_mixture_of_the_core() -> None:
    """A third dimension like any other: E matrices of d x d cost less than two LoRAs of that rank."""
    model, attachment = attached(tiny("qwen3_moe"), rank=3, targets="experts.gate_up")
    fill(model)
    slot = next(iter(attachment.slots.values()))
    assert slot.core.shape == (3, 3, 3) and slot.factor_0.shape == (4, 3)
    whole = slot.update().materialize(torch.zeros(4, 32, 32))
    for expert, update in enumerate(slot.update().unbind()):
        core = torch.einsum("j,jkl->kl", slot.factor_0[expert], slot.core)
        torch.testing.assert_close(whole[expert], slot.factor_1 @ core @ slot.factor_2.T)
        torch.testing.assert_close(update.materialize(torch.zeros(32, 32)), whole[expert])


def test_a_convolutional_network_trains_and_is_what_it_is_with_the_updates_in_its_weights() -> None:
    plain = SmallCNN()
    model, attachment = attached(copy.deepcopy(plain), rank=3, targets="*.weight")
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))
    assert attachment.trainable() == sum(attachment.method.count(t) for t in attachment.targets)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=3e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(IMAGES), torch.tensor([1, 3]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    updates, expected = dense(model, attachment), model(IMAGES)
    assert all(update.any() for update in updates.values())
    with torch.no_grad():
        merged = copy.deepcopy(plain)
        for name, update in updates.items():
            merged.get_parameter(name).add_(update)
    torch.testing.assert_close(merged(IMAGES), expected)
    detach(model)
    assert torch.equal(model(IMAGES), plain(IMAGES))


def test_the_branchs_output_is_that_of_a_convolution_with_the_update() -> None:
    """With the same stride, padding, dilation and groups."""
    plain = SmallCNN()
    model, attachment = attached(copy.deepcopy(plain), rank=2, targets="grouped.weight")
    fill(model)
    x = torch.relu(plain.first(IMAGES))
    branch = functional.conv2d(x, dense(model, attachment)["grouped.weight"], stride=2, dilation=2, groups=4)
    torch.testing.assert_close(model.grouped(x), plain.grouped(x) + branch)


def test_a_grouped_convolution_has_a_factor_for_the_channels_of_one_group() -> None:
    """The trap of the released code: it takes all the input's channels, of which a group reads a part."""
    _, attachment = attached(SmallCNN(), rank=3, targets="grouped.weight,depthwise.weight")
    grouped, depthwise = attachment.slots["grouped.weight"], attachment.slots["depthwise.weight"]
    assert [tuple(f.shape) for f in grouped.update().factors] == [(12, 3), (2, 2), (3, 3), (3, 3)]
    assert [tuple(f.shape) for f in depthwise.update().factors] == [(12, 3), (1, 1), (2, 2), (2, 2)]


def test_an_embedding_gets_an_update_of_its_table_not_one_vector_for_all_tokens() -> None:
    """The trap of the released embedding variant, which would add a constant."""
    model, attachment = attached(tiny("llama"), rank=3, targets="embedding")
    fill(model)
    slot = next(iter(attachment.slots.values()))
    changes = model.get_input_embeddings()(tokens()) - tiny("llama").get_input_embeddings()(tokens())
    torch.testing.assert_close(changes, slot.update().materialize(torch.zeros(96, 32))[tokens()], rtol=1e-5, atol=1e-5)
    assert changes.flatten(0, 1).std(0).min() > 1e-3


class _Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.add(tuple(result.shape))
        return result


def test_the_product_with_a_matrix_never_makes_the_update() -> None:
    """The released code makes it in every forward: fine for kernels, wasteful for large matrices."""
    update = Tucker(torch.randn(2, 2), [torch.randn(31, 2), torch.randn(37, 2)])
    with _Shapes() as shapes:
        update.matmul(torch.randn(5, 37))
    assert not shapes.seen & {(31, 37), (37, 31)}


def test_the_count_is_of_core_and_factors() -> None:
    _, attachment = attached(SmallCNN(), rank=3, targets="first.weight")
    assert attachment.trainable() == math.prod((3, 3, 3, 3)) + 3 * (8 + 3 + 3 + 3)


def test_biases_and_ranks_below_one_are_refused() -> None:
    with pytest.raises(EspalierError, match="tucker takes matrices and convolutions"):
        attached(SmallCNN(), targets="first.*")
    with pytest.raises(EspalierError, match="rank is 0"):
        attached(SmallCNN(), rank=0)
