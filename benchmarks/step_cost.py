"""What one training step costs: every adaptation method against the floor, and against PEFT where it has the method.

    python benchmarks/step_cost.py [--shape 70m|350m] [--methods lora,dora] [--rounds 3] [--tokens 1024] [--dtype bf16]
                                   [--threads 2] [--out runs/step_cost] [--no-memory] [--quick]

The floor is what no method that changes the model inside can be under: forward, and backward to the output of the embedding, of
the frozen model, with no gradient of any weight and no optimizer. A step of a method is forward, backward, clipping and AdamW,
and what the method does in its course. All use one random Llama, the same tokens and the model's own loss, with factors in
float32. The base computes in bf16 where the processor multiplies bf16 (avx512_bf16, amx_bf16), as such models are stored;
elsewhere bf16 is emulated, so slow that it hides what is measured, and the base is float32.

In a round the floor, ours and PEFT's each take one step, in turn, in one process and on the same base weights; the order turns
round in every other round, and one step each goes before the first. Columns are medians over the rounds: seconds, and the
ratios of the steps of the same round. Peaks are of a fresh process each: VmHWM after three steps, less what it was after
the imports; what a method needs to start is in it.

Beside the default options, those of :data:`EQUAL` are also set so that they train as many numbers as LoRA of rank 16, or the
nearest fewer. PEFT gets the same options (``peft_twins.py``). Each measurement is kept in ``--out``, so that a run that was
broken off goes on; a method whose file has changed is measured again. All methods on the 70 M shape take about 25 minutes on 2
cores that do nothing else; parts (``--methods a,b``) add up in results/step_cost.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import SHAPES, Ledger, digest, llama_config, read_result, table, versions, with_rows, write_result
from peft_twins import has_twin, twin

KINDS = ("adapt", "select", "branch")
EQUAL = ("bat", "loha", "lokr", "miss", "mos", "oft", "paca", "randlora")
STEPS = 100
"""Length of the run that the measured steps are the first of: schedules are made for it."""
PEAK_STEPS = 3


def default_dtype() -> str:
    """bf16 where the processor multiplies it."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


# -- what is measured


def settings(names: list[str], shape: str) -> dict[str, Any]:
    """Label -> method with its options, or the reason why it cannot be made with its default ones."""
    import torch
    import transformers

    from espalier import registry
    from espalier.anatomy.parameters import parameters, select
    from espalier.budget.fitting import fit, trained
    from espalier.errors import EspalierError

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(llama_config(**SHAPES[shape]))
    linear = select(parameters(model), ["linear"])
    found: dict[str, Any] = {}
    for info in registry.methods():
        if info.kind in KINDS and (not names or info.name in names):
            try:
                found[info.name] = method = registry.make(info.name, info.role)
            except EspalierError as error:  # ScaLearn needs trained adapters
                found[info.name] = str(error)
                continue
            if info.name in EQUAL:
                found[f"{info.name}, as many as LoRA 16"] = fit(method, linear, trained(registry.make("lora", "adapter"), linear))
    return found


def base_model(shape: str, dtype: str) -> Any:
    """The random model."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    return transformers.AutoModelForCausalLM.from_config(llama_config(**SHAPES[shape]), dtype=kind).train()


def batch(shape: str, tokens: int) -> Any:
    """(1, tokens) token ids."""
    import torch

    vocabulary = llama_config(**SHAPES[shape]).vocab_size
    return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(1))


def random_statistics(model: Any, method: Any) -> Callable[[str, str], Any] | None:
    """Statistics of random inputs, for methods that start from any: a step costs what it costs with those of data."""
    import torch

    from espalier.anatomy.parameters import parameters
    from espalier.calibrate.statistics import STATISTICS

    wanted = getattr(method, "wanted", lambda: None)()
    if wanted is None:
        return None
    inputs = {target.name: target.inputs for target in parameters(model) if target.is_matrix}

    def statistic(name: str, which: str) -> Any:
        sums = STATISTICS[which]((inputs[name],), wanted.rank, torch.device("cpu"))
        sums.add(torch.randn(2 * wanted.rank, inputs[name], generator=torch.Generator().manual_seed(2)).double())
        return sums.result()

    return statistic


def floor_step(model: Any, ids: Any) -> Callable[[], None]:
    """Forward, and backward to the embedding's output, of a frozen model."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def optimizer_of(parameters: list[Any], rate: float) -> Any:
    """The optimizer that both sides have."""
    import torch

    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)


def prune(model: Any) -> None:
    """Make every second number of the matrices zero, in copies of them: others share the base."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.clone()
                parameter.data.view(-1)[::2] = 0.0


def our_step(model: Any, ids: Any, method: Any, alone: bool) -> Callable[[], None]:
    """A step of a method of ours; ``alone``: base values that the method replaces are freed, as ``tune`` frees them."""
    import torch

    from espalier.attach.attachment import attach, release_base, trainable_parameters
    from espalier.attach.course import Course

    if getattr(method, "needs", "") == "pruned":
        prune(model)
    attach(model, method, statistics=random_statistics(model, method))
    if alone:
        release_base(model)
    parameters = list(trainable_parameters(model).values())
    course, optimizer, done = Course(model, STEPS), optimizer_of(parameters, method.learning_rate), iter(range(STEPS))

    def step() -> None:
        course.begin(next(done), method.learning_rate, measure=lambda: float(model(input_ids=ids, labels=ids, use_cache=False).loss))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss + course.penalty()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        course.before_step()
        optimizer.step()
        course.after_step()
        optimizer.zero_grad()

    return step


def their_step(model: Any, ids: Any, method: Any) -> Callable[[], None]:
    """A step of PEFT's method, as its documentation shows it."""
    import torch

    wrapped = twin(model, method, STEPS).train()
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer, done = optimizer_of(parameters, method.learning_rate), iter(range(STEPS))
    allocate = getattr(wrapped.base_model, "update_and_allocate", None)  # AdaLoRA's

    def step() -> None:
        wrapped(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if allocate is not None:
            allocate(next(done))
        optimizer.zero_grad()

    return step


# -- time


class Clock:
    """Alternates steps on one base, which it makes when it is first asked."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.base = a, None

    def copy(self) -> Any:
        """A model of its own on the shared base weights."""
        if self.base is None:
            self.base, self.ids = base_model(self.a.shape, self.a.dtype).requires_grad_(False), batch(self.a.shape, self.a.tokens)
        return copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})

    def measure(self, method: Any) -> dict[str, Any]:
        """Seconds per step of the floor, ours and PEFT's, by round."""
        from espalier.attach.attachment import trainable_parameters
        from espalier.errors import EspalierError

        model = self.copy()
        steps = {"floor": floor_step(self.copy(), self.ids)}
        try:
            steps["ours"] = our_step(model, self.ids, method, alone=False)
        except EspalierError as error:
            return {"refused": str(error)}
        refused = None
        if has_twin(method.name):
            try:
                steps["peft"] = their_step(self.copy(), self.ids, method)
            except EspalierError as error:
                refused = str(error)
        seconds: dict[str, list[float]] = {side: [] for side in steps}
        for number in range(-1, self.a.rounds):
            for side in reversed(steps) if number % 2 else steps:
                began = time.perf_counter()
                steps[side]()
                if number >= 0:
                    seconds[side].append(time.perf_counter() - began)
        trained = sum(p.numel() for p in trainable_parameters(model).values())
        del steps, model
        gc.collect()
        return {"seconds": seconds, "trained": trained, "peft refused": refused}


# -- memory


def peak_worker(a: argparse.Namespace) -> None:
    """A few steps of one side in this process; prints its peak and what the imports had taken."""
    import torch
    import transformers  # noqa: F401

    from espalier.memory.meter import peak_memory

    torch.set_num_threads(a.threads)
    method = settings([a.label.split(",")[0] or "lora"], a.shape).get(a.label)  # which imports the model's code, too
    # every side imports the same: memory that an import has freed again is free for what follows
    import peft  # noqa: F401

    import espalier.attach.attachment
    import espalier.attach.course  # noqa: F401

    before = peak_memory()
    model, ids = base_model(a.shape, a.dtype), batch(a.shape, a.tokens)
    if a.peak == "floor":
        step = floor_step(model, ids)
    else:
        step = our_step(model, ids, method, alone=True) if a.peak == "ours" else their_step(model, ids, method)
    for _ in range(PEAK_STEPS):
        step()
    print(json.dumps(peak_memory() - before))


def peak(a: argparse.Namespace, side: str, label: str = "") -> int:
    """Bytes, of a fresh process."""
    command = [sys.executable, __file__, "--peak", side, "--label", label, "--shape", a.shape, "--tokens", str(a.tokens)]
    command += ["--dtype", a.dtype, "--threads", str(a.threads)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode:
        raise SystemExit(f"{side} {label} failed:\n{done.stderr[-3000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


# -- the whole


def ratio(seconds: dict[str, list[float]], side: str, to: str) -> float:
    """The median over rounds of one side's seconds over the other's."""
    return statistics.median(x / y for x, y in zip(seconds[side], seconds[to], strict=True))


def summary(label: str, timed: dict[str, Any], peaks: dict[str, int | None]) -> dict[str, Any]:
    """A row of the results; a peak of PEFT's or a ratio that there is not is ``None``."""
    seconds, theirs = timed["seconds"], "peft" in timed["seconds"]
    mine, other = peaks.get("ours"), peaks.get("peft")
    return {
        "setting": label, "trained": timed["trained"], "seconds": statistics.median(seconds["ours"]),
        "to floor": ratio(seconds, "ours", "floor"), "PEFT to floor": ratio(seconds, "peft", "floor") if theirs else None,
        "PEFT to ours": ratio(seconds, "peft", "ours") if theirs else None,
        "peak MiB": mine and mine / 2**20, "PEFT's peak MiB": other and other / 2**20, "rounds": seconds,
    }  # fmt: skip


def publish(shape: str, conditions: dict[str, Any], floor_peak: int | None, rows: list[dict[str, Any]], refused: dict[str, str]) -> None:
    """Put rows among those of a shape that were measured under the same conditions."""
    whole = read_result("step_cost")
    before = whole.get(shape, {})
    measured = {row["setting"] for row in rows}
    kept = before.get("refused", {}) if before.get("conditions") == conditions else {}
    why = {label: reason for label, reason in kept.items() if label not in measured} | refused
    whole[shape] = {**with_rows(before, conditions, rows, ("setting",)), "refused": why}
    if floor_peak is not None:
        whole[shape]["floor peak MiB"] = floor_peak / 2**20
    write_result("step_cost", whole)


def shown(value: Any) -> str:
    """A cell."""
    if isinstance(value, float):
        return f"{value:.0f}" if value > 50 else f"{value:.3f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="70m")
    parser.add_argument("--methods", default="", help="names with commas; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, one sequence")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=default_dtype())
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("runs/step_cost"))
    parser.add_argument("--no-memory", action="store_true", help="measure times alone, and publish them with the peaks that --out has")
    parser.add_argument("--quick", action="store_true", help="one round of 16 tokens, to see that it runs; nothing is kept or published")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--label", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peak:
        peak_worker(a)
        return
    import torch

    from espalier import registry

    torch.set_num_threads(a.threads)
    names = [name.strip() for name in a.methods.split(",") if name.strip()]
    for name in names:
        registry.find(name)
    if a.quick:
        a.rounds, a.tokens = 1, 16
    a.out.mkdir(parents=True, exist_ok=True)
    if a.quick:
        (a.out / "quick.jsonl").unlink(missing_ok=True)
    ledger, clock = Ledger(a.out / ("quick.jsonl" if a.quick else "ledger.jsonl")), Clock(a)
    common = {"shape": a.shape, "tokens": a.tokens, "dtype": a.dtype, "threads": a.threads, **versions()}

    def key(what: str, label: str, **more: Any) -> str:
        code = digest(registry.find(label.split(",")[0]).file)
        return json.dumps({"what": what, "label": label, "code": code, **common, **more}, sort_keys=True)

    rows, refused = [], {}

    def peak_of(key: str, side: str, label: str = "") -> int | None:
        return ledger.entries.get(key) if a.no_memory else ledger.get(key, lambda: peak(a, side, label))

    floor_peak = peak_of(json.dumps({"what": "floor", **common}, sort_keys=True), "floor")
    for label, method in settings(names, a.shape).items():
        if isinstance(method, str):
            refused[label] = method
            continue
        timed = ledger.get(key("time", label, rounds=a.rounds), lambda m=method: clock.measure(m))
        if why := timed.get("refused", timed.get("peft refused")):
            refused[label] = why
        if "refused" in timed:
            continue
        peaks = {side: peak_of(key(side, label), side, label) for side in ("ours", "peft") if side in timed["seconds"]}
        rows.append(summary(label, timed, peaks))
        print(label, {k: shown(v) for k, v in rows[-1].items() if k not in ("setting", "rounds")}, file=sys.stderr, flush=True)
    if rows:
        columns = [column for column in rows[0] if column != "rounds"]
        print(table(columns, [[shown(row[column]) for column in columns] for row in rows]))
        floors = [s for row in rows for s in row["rounds"]["floor"]]
        print(f"\nfloor: {statistics.median(floors):.3f} s a step of {a.tokens} tokens, {a.dtype}; peak {shown(floor_peak and floor_peak / 2**20)} MiB")
    if ours := [row["to floor"] for row in rows if math.isfinite(row["to floor"])]:
        print(f"median over {len(ours)} settings: {statistics.median(ours):.3f} times the floor")
    for label, why in refused.items():
        print(f"{label}: {why}")
    if not a.quick:
        publish(a.shape, {**common, "rounds": a.rounds}, floor_peak, rows, refused)


if __name__ == "__main__":
    main()
