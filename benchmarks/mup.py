"""muP beside the usual parametrization: do activations keep their size, and does the best learning rate stay, as a model gets wider?

    python benchmarks/mup.py [--widths 32,64,128] [--steps 120] [--seeds 0] [--quick]

1. The coordinate check: Llamas of two blocks and four heads, widths from the first on, four steps of AdamW at 0.01 on one batch; the power
   of the width by which the mean of |x| goes, for every part of the model.
2. The sweep: the same models learn bytes of the standard library for some steps (8 x 64 a step, each byte once, ten steps of warm-up, then
   linear to a tenth) at rates a factor of 2 apart; the loss is the mean over the last 20 steps, and over the seeds. Both parametrizations are
   one at the first width. The claim (arXiv:2203.03466): rates that are good move with the width without muP, and stay, within one cell, with
   it. The best of a flat valley is partly chance, so the least rate that comes within 5 % of it is shown too.

Prints tables and writes results/mup.json. A few minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path
from typing import Any

import torch
import transformers
from common import machine, table, write_result
from torch.nn import functional

from espalier import registry
from espalier.memory.joined_optimizer import build
from espalier.train import mup
from espalier.train.schedules import factor

RATES = [2.0**-k for k in range(11, 4, -1)]


def llama(width: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def made(width: int, base: int, is_mup: bool, rate: float, seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """A model and its optimizer."""
    torch.manual_seed(seed)
    model = llama(width)
    with torch.device("meta"):
        narrow = llama(base)
    factors = mup.widths(model, narrow) if is_mup else dict.fromkeys(dict(model.named_parameters()), mup.Width())
    mup.start(model, factors)
    rates = {name: mup.options(one, 0.0, "adam", True) for name, one in factors.items()}
    return model, build(registry.make("adamw", "optimizer").build, dict(model.named_parameters()), rate, rates)


def power(rate: float) -> str:
    """A rate as a power of 2."""
    return f"2^{math.log2(rate):.0f}"


def text() -> torch.Tensor:
    """Bytes of the standard library's own modules."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def learn(model: Any, optimizer: torch.optim.Optimizer, rate: float, windows: torch.Tensor, steps: int) -> float:
    """The mean loss of the last 20 steps."""
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor("linear", step, steps, 10, 0.1) * group.get("rate", 1.0)
        ids = windows[step * 8 : step * 8 + 8]
        loss = functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="32,64,128")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--quick", action="store_true", help="two widths, two rates, few steps; nothing is written")
    given = parser.parse_args()
    sizes, seeds, rates, steps = [int(w) for w in given.widths.split(",")], [int(s) for s in given.seeds.split(",")], RATES, given.steps
    if given.quick:
        sizes, seeds, rates, steps = sizes[:2], seeds[:1], RATES[2:4], 21
    data = text()
    check: dict[str, dict[str, float]] = {}
    for name, is_mup in (("muP", True), ("usual", False)):
        ids = data[: 8 * 64].view(8, 64)
        found = [mup.coordinates(*_with([ids] * 5, made(size, sizes[0], is_mup, 0.01, 0))) for size in sizes]
        check[name] = {part: mup.slope(sizes, [one[part][-1] for one in found]) for part in found[0]}
    print(table(["part", *check], [[part, *(f"{check[name][part]:+.2f}" for name in check)] for part in check["muP"]]), flush=True)
    rows = []
    for name, is_mup in (("muP", True), ("usual", False)):
        for size in sizes:
            if rows and size == sizes[0]:  # both are one there
                rows.append({**rows[0], "parametrization": name})
                continue
            losses = []
            for rate in rates:
                of = []
                for seed in seeds:
                    start = 1000 * 512 * seed
                    windows = data[start : start + steps * 8 * 64].view(-1, 64)
                    model, optimizer = made(size, sizes[0], is_mup, rate, seed)
                    of.append(learn(model, optimizer, rate, windows, steps))
                losses.append(sum(of) / len(of))
            best = min(range(len(rates)), key=losses.__getitem__)
            least = next(rate for rate, loss in zip(rates, losses, strict=True) if loss <= 1.05 * losses[best])
            rows.append({"parametrization": name, "width": size, "losses": losses, "best": rates[best], "least": least})
            print(name, size, " ".join(f"{loss:.3f}" for loss in losses), f"best {power(rates[best])}", flush=True)
    columns = ["parametrization", "width", *map(power, rates), "best", "within 5 % from"]
    print(table(columns, [[r["parametrization"], r["width"], *(f"{loss:.3f}" for loss in r["losses"]), power(r["best"]), power(r["least"])] for r in rows]))
    if not given.quick:
        write_result("mup", {"machine": machine(), "steps": steps, "seeds": seeds, "rates": rates, "powers": check, "rows": rows})


def _with(batches: list[torch.Tensor], pair: tuple[Any, torch.optim.Optimizer]) -> tuple[Any, list[torch.Tensor], torch.optim.Optimizer]:
    return pair[0], batches, pair[1]


if __name__ == "__main__":
    main()
