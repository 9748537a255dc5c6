"""The coordinate check of muP: do activations keep their size as a model gets wider?

    python examples/coordinate_check.py narrow.json wide.json wider.json
    python examples/coordinate_check.py narrow.json wide.json wider.json --standard

The arguments are config.json files of causal language models that differ in their widths only; the first is the base. Each is
trained for a few steps on the same random tokens; the table shows the mean of |x| for every part after the last, and the power of the width
by which it goes: near 0 under muP, often 1 and more without (--standard).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from espalier import registry
from espalier.memory.joined_optimizer import build
from espalier.train import mup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, help="config.json files, the base first")
    parser.add_argument("--standard", action="store_true", help="without muP")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="a large one: what blows up must show")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adabelief", "lion", "perpgrad"))
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    configs = [transformers.AutoConfig.from_pretrained(path) for path in given.configs]
    sizes = [config.hidden_size for config in configs]
    ids = torch.randint(0, min(config.vocab_size for config in configs), (8, 32), generator=torch.Generator().manual_seed(0))
    rule = registry.make(given.optimizer, "optimizer")
    found = []
    for config in configs:
        with torch.device("meta"):
            base = transformers.AutoModelForCausalLM.from_config(configs[0])
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        factors = dict.fromkeys(dict(model.named_parameters()), mup.Width()) if given.standard else mup.widths(model, base)
        mup.start(model, factors)
        rates = {name: mup.options(factor, rule.weight_decay, "adam", True) for name, factor in factors.items()}
        optimizer = build(rule.build, dict(model.named_parameters()), given.learning_rate, rates)
        found.append(mup.coordinates(model.train(), [ids] * (given.steps + 1), optimizer))
    print(f"mean |x| after {given.steps} steps of {given.optimizer} at {given.learning_rate}, {'without muP' if given.standard else 'muP'}")
    print(f"{'part':18}" + "".join(f"{size:>10}" for size in sizes) + f"{'power':>10}")
    for name in found[0]:
        last = [one[name][-1] for one in found]
        print(f"{name:18}" + "".join(f"{value:>10.4g}" for value in last) + f"{mup.slope(sizes, last):>+10.2f}")


if __name__ == "__main__":
    main()
