"""The methods that PEFT has too: its config for one of ours, with the same options, so that both do the same arithmetic.

But for RandLoRA: ours divides its scale by the root of the number of bases, PEFT's does not; each has its own learning rate.
"""

from __future__ import annotations

import warnings
from typing import Any

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What ``linear`` names in a Llama."""


def _lora(m: Any, **more: Any) -> tuple[str, dict[str, Any]]:
    return "Lora", {"r": m.rank, "lora_alpha": m.alpha, **more}


TWINS: dict[str, Any] = {
    "lora": lambda m, steps: _lora(
        m, use_rslora=m.scaling != "standard", init_lora_weights=True if m.initialization == "random" else m.initialization
    ),
    "dora": lambda m, steps: _lora(m, use_dora=True),
    "adalora": lambda m, steps: ("AdaLora", {
        "init_r": m.initial_rank or 3 * m.rank // 2, "target_r": m.rank, "lora_alpha": m.alpha, "orth_reg_weight": m.orthogonality,
        "tinit": round(m.begin * steps), "tfinal": steps - round(m.end * steps), "deltaT": m.interval, "beta1": m.decay,
        "beta2": m.decay, "total_step": steps,
    }),
    "ia3": lambda m, steps: ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": lambda m, steps: ("Vera", {"r": m.rank, "d_initial": m.d_initial}),
    "randlora": lambda m, steps: ("RandLora", {"r": m.rank, "randlora_alpha": m.alpha}),
    "miss": lambda m, steps: ("Miss", {"r": m.rank}),
    "bat": lambda m, steps: ("Miss", {"r": m.rank, "init_weights": "bat"}),
    "loha": lambda m, steps: ("LoHa", {"r": m.rank, "alpha": m.alpha}),
    "lokr": lambda m, steps: ("LoKr", {"r": m.rank, "alpha": m.alpha, "decompose_both": m.decompose_both, "decompose_factor": m.factor}),
    # PEFT's default is a truncated series, ours the exact inverse
    "oft": lambda m, steps: ("OFT", {"r": 0, "oft_block_size": m.block_size, "use_cayley_neumann": False}),
    "shira": lambda m, steps: ("Shira", {"r": m.rank}),
    "prefix": lambda m, steps: ("PrefixTuning", {"num_virtual_tokens": m.length, "target_modules": None}),
    "prompt": lambda m, steps: ("PromptTuning", {"num_virtual_tokens": m.prompt_length, "target_modules": None}),
}  # fmt: skip
"""Name of a method -> from the method and the steps of a run to the kind of PEFT's config and its options."""
PROMPTS = ("prefix", "prompt")
"""Those that PEFT puts in front of the whole model, and not into its layers."""


def has_twin(name: str) -> bool:
    """Whether PEFT has a method of ours."""
    return name in TWINS


def twin(base: Any, method: Any, steps: int) -> Any:
    """A model with PEFT's adapter that does what ``method`` does, in place.

    Raises:
        EspalierError: when PEFT cannot put it on this model.
    """
    import peft

    from espalier.errors import EspalierError

    kind, options = TWINS[method.name](method, steps)
    options = {"target_modules": MODULES, "task_type": "CAUSAL_LM", **options}
    if options["target_modules"] is None:
        del options["target_modules"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return peft.get_peft_model(base, getattr(peft, f"{kind}Config")(**options))
        except ValueError as error:
            raise EspalierError(f"PEFT refuses: {error}") from error
