"""Tiny models of the families of transformers that the tests go through, made from configs, never downloaded.

Every weight is moved away from its start, norms and biases too: at the usual small random start, attention is
nearly uniform and biases are zero, and a test that mixes up two heads would pass.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from espalier import registry
from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import attach, trainable_parameters
from espalier.calibrate.statistics import STATISTICS
from espalier.checkpoint.directory import resolve_model
from espalier.exchange.save import save

VOCABULARY = 96
HIDDEN = 32
HEADS = 4
LAYERS = 2

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_GROUPED = dict(_COMMON, num_key_value_heads=2)
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_inner": 48,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    **_SPECIAL,
}
_OPT = {key: value for key, value in _COMMON.items() if key != "intermediate_size"} | {
    "ffn_dim": 48,
    "word_embed_proj_dim": 16,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

# name -> (config class, arguments)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED),
    "qwen2": ("Qwen2Config", dict(_GROUPED, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(_GROUPED, head_dim=16)),
    "gemma": ("GemmaConfig", dict(_GROUPED, head_dim=16)),
    "gemma2": ("Gemma2Config", dict(_GROUPED, head_dim=8)),
    "gemma3": ("Gemma3TextConfig", dict(_GROUPED, head_dim=8)),
    "olmo2": ("Olmo2Config", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "opt": ("OPTConfig", _OPT),
    "bert": ("BertConfig", _COMMON),
    "qwen2_moe": ("Qwen2MoeConfig", dict(_GROUPED, **_EXPERTS, shared_expert_intermediate_size=24)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(_GROUPED, **_EXPERTS, head_dim=8)),
    "mixtral": ("MixtralConfig", dict(_GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": ("GptOssConfig", dict(_GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
}
FAMILIES = tuple(_CONFIGS)
TIED = ("qwen2", "gemma", "gemma2", "gemma3", "gpt2", "opt", "bert")
EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss")


def config(name: str, **overrides: Any) -> PretrainedConfig:
    """The config of a tiny model: 96 tokens, hidden size 32, 2 blocks, 4 heads.

    Args:
        name: one of ``FAMILIES``.
        **overrides: config fields that shall be otherwise, such as ``tie_word_embeddings``.
    """
    kind, arguments = _CONFIGS[name]
    return getattr(transformers, kind)(**{**arguments, **overrides})


def tiny(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A fresh tiny model with a language-model head, in float32 and evaluation mode, the same for the same seed."""
    made = config(name, **overrides)
    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind.from_config(made, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids without special ones, (rows, length)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


FUNCTIONS = "".join(f"def add_{i}(a, b):\n    return a + {i} * b\n\n\n" for i in range(60))
"""A text that is quickly learnt."""


def save_model(folder: Path, template: str | None = None, family: str = "llama") -> Path:
    """A tiny model with seedling's tokenizer, in a folder."""
    from transformers import AutoTokenizer

    tiny(family, vocab_size=4096).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("seedling"))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def needed(method: str, model: PreTrainedModel, targets: str) -> dict[str, str]:
    """The options that a method declares it cannot do without."""
    if registry.find(method).settings.get("needs") != "sources":
        return {}
    return {"sources": _sources(type(model.config), json.dumps(model.config.to_dict(), sort_keys=True, default=str), targets)}


@torch.no_grad()
def fit_for(method: str, model: Any) -> Any:
    """The model, pruned where the method declares that it needs that: of every matrix of its blocks a third is zero."""
    if registry.find(method).settings.get("needs") == "pruned":
        for target in parameters(model):
            if target.is_matrix and target.block is not None:
                weight = model.get_parameter(target.name)
                weight[weight.abs() <= weight.abs().float().quantile(1 / 3)] = 0.0
    return model


@functools.cache
def _sources(kind: type[PretrainedConfig], said: str, targets: str) -> str:
    """Two low-rank deltas of a model like this, of other ranks."""
    folder = Path(tempfile.mkdtemp(prefix="espalier-tests-"))
    for number in (0, 1):
        model = transformers.AutoModelForCausalLM.from_config(kind(**json.loads(said)))
        model.save_pretrained(folder / "base")
        attach(model, "lora", targets=targets, rank=2 + number, seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        save(model, folder / str(number), base=folder / "base")
    return f"{folder / '0'},{folder / '1'}"


def statistics_of(model: torch.nn.Module, seed: int = 7) -> Callable[[str, str], torch.Tensor]:
    """Statistics, as ``attach`` takes them, of random inputs whose features differ in size; those of gradients are random too."""
    targets = {target.name: target for target in parameters(model)}

    def statistic(name: str, which: str) -> torch.Tensor:
        target = targets[name]
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        if STATISTICS[which].kind == "gradient":
            return torch.randn(model.get_parameter(name).shape, generator=generator)
        made = []
        for _ in range(math.prod(target.lead)):
            rows = torch.randn(64, target.inputs, generator=generator) * torch.linspace(2, 0.1, target.inputs)
            sums = STATISTICS[which]((target.inputs,), 32, torch.device("cpu"))
            sums.add(rows.double())
            made.append(sums.result())
        return torch.stack(made).reshape(*target.lead, *made[0].shape)

    return statistic
