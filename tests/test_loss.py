"""The loss: packed attention, chunked cross-entropy, its invariance to how a step is cut, and perplexity."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, HIDDEN, VOCABULARY, config, tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from espalier.attach.attachment import attach
from espalier.data.batches import IGNORED, Cursor, Order, Window, divide, make_batch, next_step
from espalier.data.encode import Encoder
from espalier.data.sources import open_source
from espalier.data.store import TokenStore, open_store
from espalier.errors import EspalierError
from espalier.evaluate.perplexity import score
from espalier.memory import language_loss, packed_attention
from espalier.memory.chunked_loss import chunked_cross_entropy
from espalier.train.steps import Losses, accumulate, targets_of

CAUSAL = tuple(name for name in FAMILIES if name != "bert")
PACKING = tuple(name for name in FAMILIES if name != "gpt_oss")
_WINDOW = {"sliding_window": 4}
_SLIDING_LAYERS = {**_WINDOW, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
SLIDING: dict[str, dict[str, Any]] = {
    "mistral": _WINDOW,
    "mixtral": _WINDOW,
    "phi3": _WINDOW,
    "qwen2": _SLIDING_LAYERS,
    "qwen3": _SLIDING_LAYERS,
    "qwen3_moe": {**_WINDOW, "use_sliding_window": True},
    "gemma2": {**_WINDOW, "attn_logit_softcapping": 3.0},
    "gemma3": _WINDOW,
}
CASES = [*((name, {}) for name in PACKING), *SLIDING.items()]
every_case = pytest.mark.parametrize(
    ("family", "options"), CASES, ids=[name + ("-sliding" if o else "") for name, o in CASES]
)
LENGTHS = (7, 12, 5, 5, 1, 2)


def scaled(kind: str, **options: Any) -> PreTrainedModel:
    """A tiny Llama-like model of another family of transformers."""
    options = {**config("llama").to_diff_dict(), **options}
    for key in ("model_type", "transformers_version", "architectures", "head_dim", "rope_parameters"):
        options.pop(key, None)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model.eval()


# packed attention


def alone(model: PreTrainedModel, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Logits of windows that run one by one, under the model's own attention."""
    return torch.cat([model(input_ids=part[None]).logits[0] for part in ids.split(list(lengths))])


def packed(model: PreTrainedModel, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Logits of windows that run as one packed row."""
    positions = torch.cat([torch.arange(n) for n in lengths])
    before = packed_attention.install(model)
    try:
        row = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
        return model(**row, segment_lengths=tuple(lengths)).logits[0]
    finally:
        packed_attention.restore(model, before)


@every_case
def test_packed_logits_are_those_of_separate_windows(family: str, options: dict[str, Any]) -> None:
    model = tiny(family, **options)
    for lengths in (LENGTHS, (8, 8, 8), (30,), (1, 1)):
        ids = tokens(1, sum(lengths))[0]
        with torch.no_grad():
            expected, found = alone(model, ids, lengths), packed(model, ids, lengths)
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@every_case
def test_gradients_of_a_packed_row_are_those_of_separate_windows(family: str, options: dict[str, Any]) -> None:
    model = tiny(family, **options)
    ids = tokens(1, sum(LENGTHS))[0]
    found: list[dict[str, torch.Tensor]] = []
    for logits in (alone, packed):
        model.zero_grad()
        functional.cross_entropy(logits(model, ids, LENGTHS), ids.roll(-1)).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert (found[1][name] - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), name


@every_case
def test_packed_logits_in_bf16_are_as_near_to_float32_as_those_of_separate_windows(family: str, options: dict[str, Any]) -> None:
    model = tiny(family, **options)
    ids = tokens(1, sum(LENGTHS))[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        exact = alone(model, ids, LENGTHS)
        model.to(torch.bfloat16)
        expected, found = (run(model, ids, LENGTHS).float() for run in (alone, packed))
    error, allowed = (found - exact).norm(), (expected - exact).norm()
    assert 0 < error <= 1.25 * allowed < 0.25 * exact.norm()


@every_case
def test_families_that_pack_are_found_to(family: str, options: dict[str, Any]) -> None:
    model = tiny(family, **options)
    before = model.config.to_dict(), model.config._attn_implementation
    assert packed_attention.packs(model, VOCABULARY)
    assert (model.config.to_dict(), model.config._attn_implementation) == before
    assert packed_attention.packs(model.to(torch.bfloat16), VOCABULARY)


def test_attention_sinks_do_not_pack() -> None:
    assert not packed_attention.packs(tiny("gpt_oss"), VOCABULARY)


@pytest.mark.parametrize("reach", [4, 20])
def test_a_window_that_attention_is_not_told_of_does_not_pack(reach: int) -> None:
    model = tiny("qwen2_moe", **{**_SLIDING_LAYERS, "sliding_window": reach})
    assert not packed_attention.packs(model, VOCABULARY)
    assert model.config.sliding_window == model.model.layers[0].self_attn.sliding_window == reach
    ids = tokens(1, 30)[0]
    assert (packed(model, ids, (30,)) - alone(model, ids, (30,))).abs().max() > 0.1  # as it would be


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("BloomConfig", {"n_layer": 2, "n_head": 4}),  # positions as biases of attention
        ("MambaConfig", {"num_hidden_layers": 2}),  # a state that runs on from window to window
        ("Llama4TextConfig", {"attention_chunk_size": 20, "head_dim": 8, "num_local_experts": 2}),  # attention in chunks
    ],
)
def test_families_whose_windows_would_see_each_other_or_too_much_do_not_pack(kind: str, options: dict[str, Any]) -> None:
    assert not packed_attention.packs(scaled(kind, **options), VOCABULARY)


def test_packed_attention_without_lengths_is_an_error() -> None:
    model = tiny("llama")
    before = packed_attention.install(model)
    with pytest.raises(RuntimeError, match="needs segment_lengths"):
        model(input_ids=tokens())
    packed_attention.restore(model, before)
    assert model.config._attn_implementation == before
    model(input_ids=tokens())


# chunked cross-entropy


def problem(count: int, vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head's weight and bias, and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((count, 8), (vocabulary, 8), (vocabulary,)))
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    targets[torch.rand(count, generator=generator) < 0.3] = IGNORED
    return hidden, weight, bias, targets


def by_torch(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum") * scale


@given(count=st.integers(1, 40), chunk=st.integers(1, 50), scale=st.floats(0.001, 3), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40, database=None)
def test_the_chunked_loss_and_its_gradients_are_those_of_torch(count: int, chunk: int, scale: float, seed: int) -> None:
    hidden, weight, bias, targets = problem(count, 30, seed)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    expected = by_torch(hidden @ weight.T + bias, targets, scale)
    found = chunked_cross_entropy(hidden, targets, lambda x: x @ weight.T + bias, [weight, bias], scale, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale)


@given(count=st.integers(1, 40), chunk=st.integers(1, 50), smoothing=st.floats(0.001, 0.999), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30, database=None)
def test_the_loss_with_smoothed_labels_and_its_gradients_are_those_of_torch(count: int, chunk: int, smoothing: float, seed: int) -> None:
    hidden, weight, bias, targets = problem(count, 30, seed)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    expected = functional.cross_entropy(hidden @ weight.T + bias, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing) * 0.5
    found = chunked_cross_entropy(hidden, targets, lambda x: x @ weight.T + bias, [weight, bias], 0.5, chunk, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_chunked_loss_holds_no_more_than_its_logits_and_their_gradient() -> None:
    """What operators allocate inside counts too, which fake tensors, by which memory is planned, do not see."""
    chunk, vocabulary = 64, 20_000
    hidden, head = torch.randn(3 * chunk, 8).bfloat16().requires_grad_(), torch.randn(vocabulary, 8).bfloat16()
    with profile(profile_memory=True) as profiled:
        chunked_cross_entropy(hidden, torch.arange(3 * chunk), lambda h: functional.linear(h, head), [head], 1.0, chunk, label_smoothing=0.1)
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(changes))
    each = chunk * vocabulary
    assert (2 + 4 + 2) * each <= peak <= (2 + 4 + 2.1) * each  # in bfloat16, in float32, and the gradient in bfloat16


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_confidence_is_the_sum_of_the_largest_probabilities_of_targets(smoothing: float) -> None:
    hidden, weight, bias, targets = problem(40, 30)
    confidence = torch.zeros((), dtype=torch.float64)
    chunked_cross_entropy(hidden, targets, lambda x: x @ weight.T + bias, [], 1.0, 7, label_smoothing=smoothing, confidence=confidence)
    expected = (hidden @ weight.T + bias).softmax(-1).amax(-1)[targets != IGNORED].sum()
    assert float(confidence) == pytest.approx(float(expected), rel=1e-6)


class _Largest(TorchDispatchMode):
    """Counts the tensors as large as a chunk of logits that are made."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        before = {t.data_ptr() for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)}
        result = function(*arguments, **(options or {}))
        self.made += sum(t.numel() >= self.size and t.data_ptr() not in before for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


def test_smoothed_labels_and_stablemax_take_no_more_memory() -> None:
    """As many tensors as large as a chunk's logits, of which the plan counts the bytes."""
    hidden, weight, bias, targets = problem(120, 500)
    made = []
    for terms in ({"label_smoothing": 0.0}, {"label_smoothing": 0.1}, {"kind": "stablemax"}):
        with _Largest(60 * 500) as counted:
            chunked_cross_entropy(hidden.requires_grad_(), targets, lambda x: x @ weight.T + bias, [], 1.0, 60, **terms)  # type: ignore[arg-type]
        made.append(counted.made)
    assert made[0] == made[1] > 0 and made[2] <= made[0] + 2, "and the signs, a quarter as large, once for each chunk"


def test_a_head_that_needs_its_own_output_for_its_gradient_finds_it_unchanged() -> None:
    hidden, weight, _, targets = problem(10, 30)
    hidden.requires_grad_()
    found, expected = (
        chunked_cross_entropy(hidden, targets, lambda x: torch.tanh(x @ weight.T), [], 0.1, 4),
        by_torch(torch.tanh(hidden @ weight.T), targets, 0.1),
    )
    torch.testing.assert_close(torch.autograd.grad(found, [hidden]), torch.autograd.grad(expected, [hidden]))


@pytest.mark.parametrize("trained", ["hidden", "weight", "nothing"])
def test_only_what_needs_a_gradient_gets_one(trained: str) -> None:
    hidden, weight, _, targets = problem(10, 30)
    hidden.requires_grad_(trained == "hidden"), weight.requires_grad_(trained == "weight")
    leaves = [weight] if trained == "weight" else []
    found = chunked_cross_entropy(hidden, targets, lambda x: x @ weight.T, leaves, 0.5, 4)
    torch.testing.assert_close(found.detach(), by_torch(hidden @ weight.T, targets, 0.5).detach())
    assert found.requires_grad == (trained != "nothing")
    if found.requires_grad:
        found.backward()
    assert (hidden.grad is not None, weight.grad is not None) == (trained == "hidden", trained == "weight")


def test_gradients_from_behind_are_multiplied_in() -> None:
    hidden, weight, _, targets = problem(10, 30)
    hidden.requires_grad_()
    once, thrice = (chunked_cross_entropy(hidden, targets, lambda x: x @ weight.T, [], 1.0, 4) for _ in range(2))
    (one,), (three,) = torch.autograd.grad(once, [hidden]), torch.autograd.grad(3 * thrice, [hidden])
    torch.testing.assert_close(three, 3 * one)


def test_a_weight_that_is_tied_to_the_hidden_states_gets_both_gradients() -> None:
    _, weight, _, targets = problem(10, 30)
    weight.requires_grad_()
    ids = torch.arange(10)
    found = chunked_cross_entropy(torch.tanh(weight[ids]), targets, lambda x: x @ weight.T, [weight], 0.1, 3)
    expected = by_torch(torch.tanh(weight[ids]) @ weight.T, targets, 0.1)
    torch.testing.assert_close(torch.autograd.grad(found, [weight]), torch.autograd.grad(expected, [weight]))


def test_ignored_targets_alone_give_a_loss_and_gradients_of_zero() -> None:
    hidden, weight, _, targets = problem(10, 30)
    hidden.requires_grad_(), weight.requires_grad_()
    for count in (10, 0):
        found = chunked_cross_entropy(hidden[:count], torch.full_like(targets, IGNORED)[:count], lambda x: x @ weight.T, [weight], 1.0, 4)
        assert found.item() == 0
        assert all(not g.any() for g in torch.autograd.grad(found, [hidden, weight]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_give_finite_losses_and_gradients(dtype: torch.dtype, size: float) -> None:
    logits = (torch.eye(4, 6) * 2 - 1).mul_(size).to(dtype).requires_grad_()
    targets = torch.tensor([0, 1, 5, 5])  # as sure as can be: right twice, wrong twice
    found = chunked_cross_entropy(logits, targets, lambda x: x * 1, [], 0.25, 3)
    expected = by_torch(logits, targets, 0.25)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, [logits])[0] for loss in (found, expected)]
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() == 0.25


@pytest.mark.parametrize("chunk", [1, 16, 256])
def test_in_bf16_the_loss_is_that_of_the_rounded_logits(chunk: int) -> None:
    hidden, weight, _, targets = (t.bfloat16() if t.is_floating_point() else t for t in problem(256, 50))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    found = chunked_cross_entropy(hidden, targets, lambda x: x @ weight.T, [weight], 1 / 256, chunk)
    gradients = torch.autograd.grad(found, leaves)
    assert found.dtype == torch.float32 and [g.dtype for g in gradients] == [torch.bfloat16] * 2
    torch.testing.assert_close(found, by_torch(hidden @ weight.T, targets, 1 / 256))
    exact = [t.detach().float().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(by_torch(exact[0] @ exact[1].T, targets, 1 / 256), exact)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


# the loss of whole models


HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: (lambda name=name: tiny(name)) for name in CAUSAL},
    "llama-tied": lambda: tiny("llama", tie_word_embeddings=True),
    "gemma2-capped": lambda: tiny("gemma2", final_logit_softcapping=2.0),
    "cohere": lambda: scaled("CohereConfig", logit_scale=0.3),
    "cohere2": lambda: scaled("Cohere2Config", logit_scale=0.3),
    "granite": lambda: scaled("GraniteConfig", logits_scaling=5.0),
    "granitemoe": lambda: scaled("GraniteMoeConfig", logits_scaling=5.0, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_a_model_is_the_cross_entropy_of_its_own_logits(name: str) -> None:
    model = HEADS[name]()
    ids = tokens(2, 12)
    targets = ids.roll(-1).reshape(-1).clone()
    targets[::3] = IGNORED
    model.zero_grad()
    expected = by_torch(model(input_ids=ids).logits.flatten(0, 1), targets, 0.05)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    language_loss.install(model, chunk=5)
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), targets=targets, scale=0.05)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for parameter, wanted in gradients.items():
        assert (model.get_parameter(parameter).grad - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max())), parameter


@pytest.mark.parametrize("name", HEADS)
def test_the_head_that_the_loss_uses_is_checked_against_the_models_logits(name: str) -> None:
    model = HEADS[name]()
    assert language_loss.matches_logits(model, VOCABULARY)
    assert language_loss.matches_logits(model.to(torch.bfloat16), VOCABULARY)


@pytest.mark.parametrize("make", [lambda: tiny("bert"), lambda: scaled("RecurrentGemmaConfig", lru_width=HIDDEN, num_hidden_layers=3)])
def test_a_head_that_is_made_otherwise_is_noticed(make: Callable[[], PreTrainedModel]) -> None:
    assert not language_loss.matches_logits(make(), VOCABULARY)


def test_a_scale_that_the_model_does_not_apply_is_noticed() -> None:
    model = tiny("llama")
    model.config.logit_scale = 0.5
    assert not language_loss.matches_logits(model, VOCABULARY)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(EspalierError, match="has no language-model head"):
        language_loss.install(tiny("llama").model, chunk=5)


def test_without_targets_a_model_answers_as_before_and_the_loss_can_be_removed() -> None:
    model = tiny("llama")
    plain, before = type(model), model(input_ids=tokens()).logits
    language_loss.install(model, chunk=5)
    language_loss.install(model, chunk=7)
    assert model.espalier_chunk == 7 and isinstance(model, plain)
    assert torch.equal(model(input_ids=tokens()).logits, before)
    language_loss.remove(model)
    assert type(model) is plain and not hasattr(model, "espalier_chunk")
    assert torch.equal(model(input_ids=tokens(), targets=tokens().reshape(-1)).logits, before)


@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
def test_the_size_of_a_chunk_changes_nothing(chunk: int) -> None:
    model = tiny("gemma2")
    ids = tokens(2, 12)
    expected = model(input_ids=ids).logits
    language_loss.install(model, chunk)
    found = model(input_ids=ids, targets=ids.reshape(-1), scale=1 / 24)
    torch.testing.assert_close(found, functional.cross_entropy(expected.flatten(0, 1), ids.reshape(-1)), rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that any operator made."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.known:
                self.numbers = max(self.numbers, leaf.numel())
        return result

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_logits_of_a_large_vocabulary_are_never_whole_in_memory(method: str) -> None:
    vocabulary, chunk = 50_000, 16
    options = {"vocab_size": vocabulary, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 512}
    model = tiny("llama", tie_word_embeddings=True, **options)
    attach(model, method, **({"targets": "linear"} if method == "lora" else {}))
    ids = tokens(4, 500)

    def largest(run: Callable[[], torch.Tensor]) -> int:
        with Largest(model) as watch:
            run().backward()
        return watch.numbers

    few = ids[:1, :100]
    whole = largest(lambda: functional.cross_entropy(model(input_ids=few).logits[0], few[0]))
    assert whole == 100 * vocabulary  # the watch sees logits where they are whole
    language_loss.install(model, chunk)
    packed_attention.install(model)
    row = {"input_ids": ids.reshape(1, -1), "position_ids": torch.arange(500).repeat(4)[None], "segment_lengths": (500,) * 4}
    held = largest(lambda: model(**row, targets=ids.flatten(), scale=1 / 2000))
    assert held == chunk * vocabulary < 0.01 * ids.numel() * vocabulary


# invariance to how a step is cut


def words() -> PreTrainedTokenizerFast:
    """A tokenizer that gives every word its own token: w5 is 5."""
    vocabulary = {"</s>" if i == 2 else f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def stored(folder: Path, sizes: Sequence[int], masked: bool) -> TokenStore:
    """Documents of so many random words, the first part of each a prompt when ``masked``."""
    random = np.random.default_rng(0)
    records = []
    for size in sizes:
        document = [f"w{i}" for i in random.integers(3, VOCABULARY, size)]
        cut = 1 + 2 * size // 3
        parts = (" ".join(document[:cut]), " " + " ".join(document[cut:]))
        records.append({"prompt": parts[0], "completion": parts[1]} if masked else {"text": " ".join(document)})
    folder.mkdir(exist_ok=True)
    file = folder / f"{masked}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_store(open_source(file), Encoder(words()))


def training_forms(model: PreTrainedModel) -> Iterator[bool]:
    """The model ready for padded and then for packed batches: yields whether padded."""
    language_loss.install(model, chunk=7)
    yield True
    packed_attention.install(model)
    yield False


@pytest.mark.parametrize("masked", [False, True], ids=["text", "prompts"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "qwen3_moe"])
def test_micro_batches_packing_and_accumulation_change_neither_loss_nor_gradients(tmp_path: Path, family: str, masked: bool) -> None:
    store = stored(tmp_path, [3, 30, 9, 14, 5, 5, 21, 2], masked)
    windows = next_step(Order(store, 16, 0), Cursor(), 90)
    assert len(windows) > 6
    model = tiny(family)
    results: dict[tuple[bool, int], tuple[float, int, dict[str, torch.Tensor]]] = {}
    for padded in training_forms(model):
        for micro in (16, 32, 1000):
            batches = [make_batch(store, part, micro, padded) for part in divide(windows, micro, padded)]
            model.zero_grad()
            loss, count = accumulate(Losses(model), batches), targets_of(batches)
            results[padded, micro] = (loss, count, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            assert len(batches) == 1 or micro < 1000
            assert any(batch.rows is not None for batch in batches) or not masked
    loss, count, gradients = results.pop((False, 1000))
    wanted = sum(int(flags.sum()) if (flags := store.read_targets(w.start + 1, w.stop + 1)) is not None else len(w) for w in windows)
    assert count == wanted
    for other_loss, other_count, other_gradients in results.values():
        assert other_count == count and abs(other_loss - loss) <= 1e-6 * loss
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (other_gradients[name] - gradient).abs().max() <= 1e-6 * max(1.0, float(gradient.abs().max())), name


def test_the_mean_is_over_target_tokens_and_not_over_micro_batches(tmp_path: Path) -> None:
    store = stored(tmp_path, [30, 3], masked=False)
    model = tiny("llama")
    losses = []
    for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
        row = torch.from_numpy(store.read(int(begin), int(end)))
        losses.append(functional.cross_entropy(model(input_ids=row[None, :-1]).logits[0], row[1:], reduction="sum").item())
    language_loss.install(model, chunk=7)
    batches = [make_batch(store, [Window(int(b), int(e) - 1)], 32, padded=True) for b, e in zip(store.offsets, store.offsets[1:], strict=False)]
    loss, count = accumulate(Losses(model), batches), targets_of(batches)
    assert count == 33
    assert loss == pytest.approx(sum(losses) / 33, rel=1e-6)


# perplexity


def naive(model: PreTrainedModel, store: TokenStore, sequence_length: int) -> tuple[float, int]:
    """Loss and count, a token at a time: each sees the window that ends with it, or a longer one."""
    total, count = 0.0, 0
    stride = max(1, sequence_length // 2)
    for begin, end in zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True):
        ids = store.read(begin, end)
        flags = store.read_targets(begin, end)
        for predicted in range(1, len(ids)):
            if flags is not None and not flags[predicted]:
                continue
            whole = max(0, predicted - sequence_length)  # predictions beyond the first window
            start = -(-whole // stride) * stride
            logits = model(input_ids=torch.from_numpy(ids[start:predicted])[None]).logits[0, -1]
            total -= functional.log_softmax(logits, -1)[ids[predicted]].item()
            count += 1
    return total, count


@pytest.mark.parametrize(
    ("sizes", "masked"), [([60], False), ([3, 1, 9, 2, 15], False), ([40, 7, 2, 19], True)], ids=["long", "short", "masked"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_score_is_that_of_predicting_token_by_token(tmp_path: Path, family: str, sizes: list[int], masked: bool) -> None:
    store = stored(tmp_path, sizes, masked)
    model = tiny(family)
    with torch.no_grad():
        total, count = naive(model, store, 16)
    seen: list[int] = []
    for padded in training_forms(model):
        for micro in (16, 40, 1000):
            found = score(model, store, 16, micro, padded=padded, progress=seen.append)
            assert found.tokens == count and seen[-1] == store.predictions and found.documents == len(sizes)
            assert found.loss == pytest.approx(total / count, rel=1e-5)
            assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
            assert found.bytes == store.nbytes.sum() > 0
            assert found.bits_per_byte == pytest.approx(total / math.log(2) / found.bytes, rel=1e-5)


def test_bits_per_byte_do_not_depend_on_how_text_is_cut_into_tokens(tmp_path: Path) -> None:
    """A model that knows nothing needs log2(vocabulary) bits a token, whatever the window."""
    store = stored(tmp_path, [50], masked=False)
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    language_loss.install(model, chunk=7)
    text = (tmp_path / "False.jsonl").read_text()
    size = len(json.loads(text)["text"]) - len(words().decode(store.read(0, 1)))
    for sequence_length in (1, 2, 7, 16, 512):
        found = score(model, store, sequence_length, 64, padded=True)
        assert found.bytes == size and found.tokens == 50
        assert found.bits_per_byte == pytest.approx(50 * math.log2(VOCABULARY) / size)


def test_the_perplexity_of_a_hopeless_model_is_finite(tmp_path: Path) -> None:
    store = stored(tmp_path, [9], masked=False)
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    language_loss.install(model, chunk=7)
    found = score(model, store, 16, 16, padded=True)
    assert found.loss > 1000 and math.isfinite(found.perplexity) and math.isfinite(found.bits_per_byte)
