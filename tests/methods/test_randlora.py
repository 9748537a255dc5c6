"""RandLoRA (arXiv:2502.00987): a sum of scaled random bases."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.load import load
from espalier.checkpoint.directory import ModelDirectory
from espalier.delta import store
from espalier.delta.base import DenseBase, product
from espalier.delta.forms import RandomBases
from espalier.errors import EspalierError
from espalier.exchange.peft_import import import_adapter
from espalier.exchange.save import save


def randlora(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "randlora", name="d", **{"rank": 5, **options})
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def bases(outputs: int, inputs: int, count: int, rank: int, dtype: torch.dtype = torch.float64) -> RandomBases:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    large, small = max(outputs, inputs), min(outputs, inputs)
    tensors = {"lam": draw(count, rank), "gamma": draw(count, small), "B": draw(large, count * rank), "A": draw(rank, small)}
    return RandomBases(tensors, {}, (outputs, inputs), torch.tensor(0.3, dtype=dtype))


def test_the_update_is_zero_at_the_start_and_of_full_rank_when_trained() -> None:
    """rank(DeltaW) = min(in, out) with probability 1, though each base is of rank 5."""
    model, attachment = randlora()
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits)
    for name, slot in attachment.slots.items():
        assert not slot.lam.any() and bool((slot.gamma == 1 / max(slot.gamma.shape)).all())
        assert not attachment.updates()[name].materialize(model.get_parameter(name)).any()
    shake(model)
    for name, update in attachment.updates().items():
        weight = model.get_parameter(name)
        assert torch.linalg.matrix_rank(update.materialize(weight.double())) == min(weight.shape)


def test_a_smaller_rank_trains_more() -> None:
    """N (r + dmin) numbers with N = ceil(dmin / r)."""
    counts = {rank: randlora(rank=rank, targets="attention.q,mlp.down")[1].trainable() for rank in (2, 5, 16, 100)}
    assert counts == {rank: 4 * -(-32 // min(rank, 32)) * (min(rank, 32) + 32) for rank in counts}
    assert counts[2] > counts[5] > counts[16] > counts[100]


def test_layers_of_all_shapes_take_the_beginning_of_the_same_bases() -> None:
    """One layer's worth of frozen numbers for the whole model."""
    _, attachment = randlora(rank=5)
    pool = attachment.pool
    assert pool is not None and dict(pool.named_buffers()).keys() == {"A", "B"}
    assert (pool.B.numel(), pool.A.numel()) == (48 * 7 * 5, 5 * 32)
    pool.prepare()
    for slot in attachment.slots.values():
        update: Any = slot.update()
        assert all(update._frozen(name, torch.float32).data_ptr() == getattr(pool, name).data_ptr() for name in "BA")
        stored: Any = slot.method.export(slot, pool)
        assert all(torch.equal(stored.bases[name].dense(), update._frozen(name, torch.float32)) for name in "BA")


@pytest.mark.parametrize("sparsity", [0.0, 3.0, 5.5])
def test_bases_have_unit_variance(sparsity: float) -> None:
    """Uniform, or -1/0/+1 with probabilities 1/(2s), 1 - 1/s, 1/(2s); the gain holds what makes their variance one."""
    _, attachment = randlora(rank=2, sparsity=sparsity, alpha=1.0, scaling="plain")
    pool, slot = attachment.pool, next(iter(attachment.slots.values()))
    assert pool is not None
    variance = float(pool.B.square().mean())
    assert float(slot.gain) * 2 * variance == pytest.approx(1, rel=0.1)
    if sparsity:
        assert set(pool.B.unique().tolist()) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("tokens_", [1, 40], ids=["through the factors", "through the update"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_gradients_are_right_whichever_way_a_product_goes(shape: tuple[int, int], dtype: torch.dtype, tokens_: int) -> None:
    update = bases(*shape, 3, 2)
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[:1]))
    x = torch.randn(tokens_, shape[1], generator=generator, dtype=torch.float64, requires_grad=True)
    leaves = [update.lam.requires_grad_(), update.gamma.requires_grad_()]

    def with_base(x: torch.Tensor, lam: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return product(x, DenseBase(weight, bias), update.with_tensors({"lam": lam, "gamma": gamma}))

    def alone(x: torch.Tensor, lam: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return update.with_tensors({"lam": lam, "gamma": gamma}).matmul(x)

    if dtype == torch.float64:
        assert torch.autograd.gradcheck(with_base, (x, *leaves)) and torch.autograd.gradcheck(alone, (x, *leaves))
    dense = torch.nn.functional.linear(x, update.apply(weight), bias)
    torch.testing.assert_close(with_base(x, *leaves), dense)
    torch.testing.assert_close(alone(x, *leaves), x @ update.materialize(weight).T)


class Sizes(TorchDispatchMode):
    """The shapes of what products of matrices make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.made.append(tuple(result.shape))
        return result


def test_the_update_is_made_only_where_that_is_cheaper() -> None:
    """dmax dmin Nr multiplications against tokens Nr (dmax + 2 dmin)."""
    update, base = bases(90, 60, 6, 10, torch.float32), DenseBase(torch.zeros(90, 60))
    for count, made in ((20, False), (30, True)):
        with Sizes() as sizes:
            product(torch.zeros(count, 60), base, update)
        assert ((90, 60) in sizes.made) == made == (count * (90 + 2 * 60) > 90 * 60)
        assert len(sizes.made) == (2 if made else 3)


def test_an_update_smaller_than_the_rounding_of_a_bfloat16_weight_still_acts() -> None:
    """It is never added to a weight of 16 bits while it trains."""
    update = bases(8, 8, 2, 4, torch.float32).scaled(1e-4)
    x = torch.full((64, 8), 1.0, dtype=torch.bfloat16)
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    for row in range(8):
        weight[row, 0], weight[row, 1] = 1, -1  # whose product with x is zero
    y = product(x, DenseBase(weight), update)[0].float()
    torch.testing.assert_close(y, update.materialize(weight).sum(1), rtol=0.05, atol=1e-5)
    assert y.abs().max() > 0


def test_the_delta_is_a_seed_and_the_trained_numbers(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model, attachment = randlora()
    shake(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    assert store.load(tmp_path / "delta").nbytes == 4 * attachment.trainable()
    torch.manual_seed(9)
    torch.testing.assert_close(load(tmp_path / "base", [tmp_path / "delta"])(tokens()).logits, model(tokens()).logits)


def peft_model(attachment: Attachment, alpha: float) -> Any:
    """PEFT's RandLoRA with the numbers of ours: its flattened sides pair term (n, k) with place k N + n."""
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny("llama"), peft.RandLoraConfig(r=5, randlora_alpha=alpha, target_modules=modules))
    assert attachment.pool is not None
    B, A = attachment.pool.B.view(48, 7, 5) * 3**0.5, attachment.pool.A.view(5, 32) * 3**0.5
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "randlora_A" in name:
                buffer[:, :, :32].copy_(A[:, None])
            elif "randlora_B" in name:
                buffer[:48, :7].copy_(B.transpose(1, 2).reshape(48, 7, 5))
        for name, slot in attachment.slots.items():
            theirs = model.base_model.model.get_submodule(name.removesuffix(".weight"))
            theirs.randlora_lambda["default"].copy_(slot.lam.T)
            theirs.randlora_gamma["default"].copy_(slot.gamma)
    return model


def test_loss_and_gradients_are_those_of_peft(tmp_path: Path) -> None:
    model, attachment = randlora(targets="attention.q,attention.o,mlp", scaling="plain", alpha=2.0)
    shake(model)
    theirs = peft_model(attachment, 2.0)
    x = tokens()
    losses = [m(input_ids=x, labels=x).loss for m in (model, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for name, slot in attachment.slots.items():
        module = theirs.base_model.model.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(slot.lam.grad.T, module.randlora_lambda["default"].grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slot.gamma.grad, module.randlora_gamma["default"].grad, rtol=1e-5, atol=1e-5)
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "adapter")
    delta = import_adapter(tmp_path / "adapter", {t.name: t for t in parameters(base)}, ModelDirectory(tmp_path / "base"))
    assert delta.nbytes < 4 * (attachment.trainable() + 2 * 48 * 35 + 5 * 32), "the bases are kept once"
    for name, update in attachment.updates().items():
        weight = base.get_parameter(name)
        torch.testing.assert_close(delta.updates[name].materialize(weight), update.materialize(weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"rank": 0}, "rank is 0; it must be at least 1"), ({"sparsity": 0.5}, "sparsity is 0.5; it must be 0, or at least 1")],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        randlora(**options)


def test_a_file_with_more_bases_than_full_rank_needs_is_refused() -> None:
    tensors = {"lam": torch.zeros(900, 2), "gamma": torch.zeros(900, 6)}
    with pytest.raises(EspalierError, match="there are 900 bases of rank 2; 3 of rank at most 6 are enough"):
        RandomBases.from_tensors(tensors, {"bases": {}}, (8, 6), 1.0)
