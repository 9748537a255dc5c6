"""What an optimizer's step costs beside the rest of a training step, against torch's fused AdamW.

    python benchmarks/optimizer_step.py [--tokens 4096] [--threads 1] [--only galore,lion]

A Llama of 17 M parameters in float32 (hidden 512, 4 blocks, vocabulary 4,096) trains whole. The forward and backward pass of
``--tokens`` tokens is timed once its caches are warm, the least of three; then every optimizer takes steps on gradients of this
pass, with its default options: 20, or as many as lie between two choices of its subspaces. Columns: milliseconds of a step on average and of the
slowest but the first, which allocates (and which every optimizer with a projector begins all of them in); and how much longer than with fused AdamW the whole training
step takes on average, and the slowest. Times are processor seconds of this process: other work on the machine does not count. The coding of 8 bits is shown apart, in nanoseconds a number,
plain and compiled. Takes about 8 minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from common import llama_config, machine, table, write_result

CASES = (
    ("adamw", "fp32"), ("adamw", "bf16"), ("adamw", "8bit"), ("adabelief", "fp32"), ("lion", "fp32"), ("lion", "8bit"), ("muon", "fp32"), ("perpgrad", "fp32"),
    ("galore", "fp32"), ("galore", "8bit"), ("fira", "fp32"), ("natural-galore", "fp32"), ("gradnorm-lorp", "fp32"), ("frugal", "fp32"), ("frugal", "8bit"),
)  # fmt: skip


def seconds(do: Callable[[], Any]) -> float:
    """Of the processor."""
    began = time.process_time()
    do()
    return time.process_time() - began


def coding() -> list[list[Any]]:
    """Nanoseconds a number of coding and decoding, plain and compiled."""
    import torch

    from espalier.kernels import codes, codes_fast

    values = torch.randn(1 << 22)
    stored = codes.plain_encode(values, True)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "encode 8 bits": (lambda: codes.plain_encode(values, True), lambda: codes_fast.encode(values, True)),
        "decode 8 bits": (lambda: codes.plain_decode(*stored, True), lambda: codes_fast.decode(*stored, True)),
        "round to bf16": (lambda: codes.plain_round_at_random(values, (1, 2), 0), lambda: codes_fast.round_at_random(values, (1, 2), 0)),
    }
    rows = []
    for what, both in pairs.items():
        times = [min(seconds(do) for _ in range(4)) / len(values) * 1e9 for do in both]
        rows.append([what, *(f"{t:.2f}" for t in times), f"{times[0] / times[1]:.1f}"])
    return rows


def main() -> None:
    """Time all cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="names of optimizers, with commas")
    a = parser.parse_args()

    import torch
    import transformers

    from espalier import registry

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(layers=4, vocabulary=4096))
    parameters = dict(model.named_parameters())
    ids = torch.randint(4096, (a.tokens // 512, 512))

    def forward_and_backward() -> None:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    forward_and_backward()
    rest = min(seconds(forward_and_backward) for _ in range(3))
    print(f"{sum(p.numel() for p in parameters.values()):,} parameters, {a.tokens:,} tokens: forward and backward {rest:.2f} s on {a.threads} thread(s)\n")
    start = {name: p.detach().clone() for name, p in parameters.items()}
    rows, floor = [], 0.0
    for name, state in CASES:
        if a.only and name not in (*a.only.split(","), "adamw"):
            continue
        with torch.no_grad():
            for key, p in parameters.items():
                p.copy_(start[key])
        rule = registry.make(name, "optimizer")
        rule.state = state
        optimizer = rule.build(parameters, 1e-4)
        times = [seconds(optimizer.step) for _ in range(getattr(rule, "every", 20) + 1)]
        first, times = times[0], times[1:]
        mean, worst = statistics.fmean(times), max(times)
        floor = floor or mean
        over = [(t - floor) / (rest + floor) for t in (mean, worst)]
        rows.append([f"{name} {state}", f"{1e3 * mean:.0f}", f"{1e3 * worst:.0f}", f"{1e3 * first:.0f}", *(f"{o:+.1%}" for o in over)])
        print(rows[-1], flush=True)
    columns = ("optimizer", "ms a step", "slowest", "first", "whole step, mean", "whole step, slowest")
    print("\n" + table(columns, rows) + "\n")
    codecs = coding()
    print(table(("coding", "plain ns", "compiled ns", "times"), codecs))
    if not a.only:
        write_result("optimizer_step", {"machine": machine(), "threads": a.threads, "tokens": a.tokens, "rest": rest, "rows": rows, "coding": codecs})


if __name__ == "__main__":
    main()
