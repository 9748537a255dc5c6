"""How many random numbers a second? The generator and its twins, against torch's and numpy's, alternating in one process.

    python benchmarks/generator.py [--numbers 16777216] [--rounds 7]

All write float32 into memory that is there already, where they can; the best of the rounds is shown, with the median
beside it. Torch's CPU generator is Mersenne Twister on one thread, numpy's here is Philox4x64 on one thread. Only
Espalier's numbers are promised to be the same everywhere. The last rows are what a seeded basis costs a product.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from common import machine, table, write_result

from espalier.kernels import philox_fast
from espalier.kernels.philox import GAUSSIAN, RADEMACHER, Distribution, Stream, plain_numbers
from espalier.kernels.seeded import SeededMatrix, seeded_matmul

KEY = Stream(0, "benchmark").key
DISTRIBUTIONS = {
    "uniform": Distribution("uniform", (0.0, 1.0)),
    "rademacher": RADEMACHER,
    "sparse rademacher": Distribution("sparse_rademacher", (3.0,)),
    "gaussian": GAUSSIAN,
}
Systems = dict[tuple[str, str, int], Callable[[], object]]
"""(distribution, system, threads) -> what is timed."""


def generators(count: int, threads: int) -> Systems:
    """Everything that makes ``count`` numbers."""
    out = torch.empty(count)
    array, numpy = out.numpy(), np.random.Generator(np.random.Philox(0))
    systems: Systems = {}
    for name, distribution in DISTRIBUTIONS.items():
        for number in sorted({1, threads}):
            systems[name, "espalier, compiled", number] = lambda d=distribution: philox_fast.fill(out, KEY, 3, d)
        systems[name, "espalier, torch alone", 1] = lambda d=distribution: plain_numbers(KEY, 3, count // 8, d)
    systems["uniform", "torch", 1] = lambda: torch.rand(count, out=out)
    systems["rademacher", "torch", 1] = lambda: out.bernoulli_().mul_(2).sub_(1)
    systems["gaussian", "torch", 1] = lambda: torch.randn(count, out=out)
    systems["uniform", "numpy Philox", 1] = lambda: numpy.random(count, np.float32, array)
    systems["rademacher", "numpy Philox", 1] = lambda: numpy.integers(0, 2, count, np.int8) * np.float32(2) - np.float32(1)
    systems["gaussian", "numpy Philox", 1] = lambda: numpy.standard_normal(count, np.float32, array)
    return systems


def measure(systems: Systems, rounds: int) -> dict[tuple[str, str, int], list[float]]:
    """Seconds of every system in every round, after one that is not counted."""
    seconds: dict[tuple[str, str, int], list[float]] = {key: [] for key in systems}
    for _ in range(rounds + 1):
        for key, run in systems.items():
            torch.set_num_threads(key[2])
            began = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - began)
    return {key: values[1:] for key, values in seconds.items()}


def products(threads: int) -> Systems:
    """A product with a 4,096 x 4,096 Gaussian matrix that is a seed, and with one in memory."""
    seeded, x = SeededMatrix.of(Stream(0, "basis"), 4096, 4096, GAUSSIAN), torch.randn(512, 4096)
    dense = seeded.dense()
    return {
        ("product, 512 x 4,096", "seeded", threads): lambda: seeded_matmul(x, seeded),
        ("product, 512 x 4,096", "in memory (64 MiB)", threads): lambda: x @ dense.T,
    }


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    a = parser.parse_args()
    load = os.getloadavg()[0]
    found = measure(generators(a.numbers, a.threads), a.rounds)
    rows = []
    for (distribution, system, threads), seconds in sorted(found.items(), key=lambda item: list(DISTRIBUTIONS).index(item[0][0])):
        made = (a.numbers // 8 if "alone" in system else a.numbers) / 1e6
        torch_speed = a.numbers / 1e6 / min(found[distribution, "torch", 1]) if (distribution, "torch", 1) in found else None
        best = made / min(seconds)
        ratio = round(best / torch_speed, 2) if torch_speed else ""
        rows.append([distribution, system, threads, round(best), round(made / statistics.median(seconds)), ratio])
    columns = ["numbers", "system", "threads", "best, M/s", "median, M/s", "of torch's"]
    print(table(columns, rows))
    taken = measure(products(a.threads), a.rounds)
    dense = min(seconds for key, seconds_of in taken.items() if "memory" in key[1] for seconds in seconds_of)
    product_rows = [[*key, round(1000 * min(s), 1), round(min(s) / dense, 2)] for key, s in taken.items()]
    product_columns = ["what", "matrix", "threads", "best, ms", "of the one in memory"]
    print(table(product_columns, product_rows))
    versions = {name: importlib.metadata.version(name) for name in ("numba", "numpy")}
    write_result(
        "generator",
        {
            "machine": {**machine(), **versions}, "load_average_before": round(load, 2), "numbers": a.numbers, "rounds": a.rounds,
            "columns": columns, "rows": rows, "product_columns": product_columns, "product_rows": product_rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
