"""Generate: continue a prompt with a model, with or without deltas."""

from __future__ import annotations

from typing import Any, Literal


def generate(
    model: str,
    prompt: str,
    *,
    delta: list[str] | None = None,
    scale: float = 1.0,
    any_base: bool = False,
    expert: list[str] | None = None,
    expert_base: str | None = None,
    fusion: Literal["one", "all"] = "one",
    fusion_alpha: float | None = None,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    chat: bool = False,
    seed: int = 0,
    device: str | None = None,
    dtype: Literal["bf16", "fp32"] | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Continue a prompt with a model, with or without deltas.

    Args:
        model: a directory, `seedling`, or a hub id
        prompt: the text to continue
        delta: directory of a delta; may be given several times, innermost first
        scale: multiplies every delta; 0 is the base
        any_base: accept deltas that were made for another base
        expert: a tuned smaller model, or a delta of --expert-base, whose change moves this model's logits; may be given several times
        expert_base: the smaller model that the experts were tuned from; it must have the vocabulary of --model
        fusion: of several experts, whether one acts on a token or all may
        fusion_alpha: how much of the experts' change is added (1: proxy tuning); default: found for each token, in [0, 2]
        max_tokens: new tokens at most
        temperature: of sampling; 0 takes the likeliest token each time
        top_p: sample among the likeliest tokens of this total probability, in (0, 1]
        chat: put the prompt into the model's chat template as a user's message
        seed: of sampling
        device: such as cpu or cuda; default: cuda where there is one
        dtype: what to compute in; default: as stored
        threads: CPU threads
        quiet: print nothing but the result

    Returns:
        `prompt`, `completion`, `tokens` (new ones) and `finished` (whether the model ended the text); with experts `alpha`, the
        mean coefficient of each.

    Raises:
        EspalierError: for anything wrong with the model, a delta or the options.
    """
    from pathlib import Path

    from espalier.anatomy.classification import is_classifier
    from espalier.attach.attachment import positions_taken
    from espalier.attach.load import load_model, load_tokenizer, put_on
    from espalier.checkpoint.directory import ModelDirectory, resolve_model
    from espalier.data.encode import Encoder
    from espalier.display import Display
    from espalier.errors import EspalierError, at_least
    from espalier.evaluate.logit_fusion import Decoding
    from espalier.evaluate.sampling import complete
    from espalier.train import session
    from espalier.verbs._experts import Asked

    at_least("max_tokens", max_tokens, 1)
    at_least("temperature", temperature, 0)
    asked = Asked(expert, expert_base, fusion, fusion_alpha)
    if not 0 < top_p <= 1:
        raise EspalierError(f"top_p is {top_p}; it must be more than 0 and at most 1")
    display = Display(quiet)
    session.seed_everything(seed, threads)
    directory = ModelDirectory(resolve_model(model))
    tokenizer = load_tokenizer(model, delta or ())
    encoder = Encoder(tokenizer)
    loaded = load_model(directory.path, dtype, device, delta or ())
    if is_classifier(loaded):
        raise EspalierError(f"{type(loaded).__name__} tells labels and makes no text; measure it with espalier eval")
    for folder in delta or ():
        manifest = put_on(loaded, Path(folder), directory, any_base=any_base, scale=scale).manifest
        session.check_tokenizer(manifest, folder, encoder, "chat" if chat else "text", display)
    if chat:
        if not tokenizer.chat_template:
            raise EspalierError(f"the tokenizer of {model} has no chat template; leave --chat out")
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = encoder.ids([text])[0]
    else:
        ids = encoder.prefix + encoder.ids([prompt])[0]
    if not ids:
        raise EspalierError("the prompt is empty, and this tokenizer has no token that begins a text")
    decoding = None
    models: list[Any] = [loaded]
    if asked:
        base, experts = asked.voices(tokenizer, "chat" if chat else "text", any_base, device, dtype, display)
        models += [base.model, *(voice.model for voice in experts)]
        decoding = Decoding(asked.fusion(), base, experts)
    longest = min((n for m in models if (n := getattr(m.config, "max_position_embeddings", None))), default=None)
    longest = longest and longest - positions_taken(loaded)
    if longest is not None and len(ids) >= longest:
        raise EspalierError(f"the prompt has {len(ids)} tokens; the model has {longest} positions: shorten the prompt")
    if longest and len(ids) + max_tokens > longest:
        max_tokens = longest - len(ids)
        display.note(f"the model has {longest} positions, so at most {max_tokens} tokens follow this prompt")
    made, finished = complete(loaded, tokenizer, ids, max_tokens, temperature, top_p, seed, decoding)
    text = tokenizer.decode(made, skip_special_tokens=True)
    result = {"prompt": prompt, "completion": text, "tokens": len(made), "finished": finished}
    return result if decoding is None else {**result, "alpha": decoding.fusion.mean_alpha}
