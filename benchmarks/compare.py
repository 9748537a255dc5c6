"""Which method adapts best? Every method on one job, ours and PEFT's, by quality, forgetting, size, memory and speed.

    python benchmarks/compare.py [--methods lora,dora | --methods front] [--job package|docstrings|packages] [--package asyncio]
                                 [--steps 120] [--systems ours,peft] [--threads 2] [--out runs/compare] [--quick] [--speed]

The job ``package``: seedling, adapted to a package of the standard library that it was not trained on. Of the package's files to
adapt to (``stdlib:NAME:train``) every fifth chooses the learning rate; ``stdlib:NAME:heldout`` is measured on, once. Forgetting is what the
loss on seedling's own held-out text (``stdlib:valid``, the first 3,000 characters of each file) gains. ``docstrings``: bodies of functions
from signature and docstring; ``packages``: which package a docstring comes from (the loss of the classifier; its head trains too).

Every method has the same effort: its default options; the learning rates of :data:`GRID` times its own default on one seed and a third
of the steps, and one rate more, at most :data:`MORE` times, while the best is at an edge; then :data:`SEEDS` at the best. All run in float32, 4 sequences of 256 tokens a step, AdamW without decay, cosine. A rate that
is at an edge even then is marked: there the method may do better than is shown. PEFT's method (``peft_twins.py``) is put into the
model and then trained by the same loop on the same batches, so that only the layers differ (RandLoRA's also by the root of the number of bases in the scale); prefix and prompt tuning, which PEFT
puts in front of the model, and classification are ours alone, and so is EVA.

Every run is a process of its own. Bytes are those of the file of tensors; peak memory is VmHWM, scoring included. Losses do not depend on
what else the machine does, but times do: tokens a second are the median of the last steps of one short run of each method, in a pass of its
own, ``--speed``, which wants an idle machine and takes about 4 minutes. Its peaks, of all methods on one machine and without
scoring, stand in the place of the rows'.

Runs are kept in the ledger under ``--out``, by everything that they depend on (of the code: the method's own file), so that a run that was broken off
goes on; a row that is in results/compare.json is not measured again either. Parts (``--methods a,b``) add up, also several at once over one ``--out``. The rows go into results/compare.json and the plot of loss against bytes
into results/compare.png as they are made; ``make docs`` then writes the table into docs/methods/compare.md. All methods take about
3 hours on 2 cores, two parts of one thread each at once (some 65 rows; 120 steps are about one pass over the package); ``--methods front`` takes the (up to ten) methods of ours on the Pareto front of the job ``package``.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Ledger,
    alone,
    apart,
    best_rate,
    digest,
    digest_of,
    machine,
    read_result,
    rows_of,
    say_rows,
    table,
    versions,
    with_rows,
    write_result,
)
from peft_twins import PROMPTS, has_twin, twin

KINDS = ("adapt", "select", "branch")
GRID = (1, 3, 10, 30)
MORE = 2
"""Rates beyond an edge of the grid that are tried while the best is there."""
SEEDS = (0, 1, 2)
STEPS = 120
BATCH, LENGTH, WARMUP, CLIP = 4, 256, 0.05, 1.0
SPEED_STEPS, TIMED = 8, 5
"""Steps of a run for its speed, and how many of them, the last, are timed."""
TEXT = 3000
"""Characters of a file of seedling's own held-out text."""


# -- data


def name_of(job: str, package: str) -> str:
    """A job with its package, if it has one."""
    return f"{job}-{package}" if job == "package" else job


def write_data(out: Path, job: str, package: str, quick: bool) -> dict[str, str]:
    """The parts of a job: ``train``, ``choose``, ``test``, and for text ``own``; paths by name. What other code has written under ``out`` is not taken for it."""
    from espalier.bundled.corpus import bundled_files

    code = digest_of(f"{inspect.getsource(write_data)}\n{TEXT}")
    folder = out.resolve() / ("quick" if quick else "data") / f"{name_of(job, package)}-{code}"
    parts = {part: folder / part for part in ("train", "choose", "test", "own")}
    if job != "package":
        parts = {part: folder / f"{part}.jsonl" for part in ("train", "choose", "test")} | ({"own": parts["own"]} if job == "docstrings" else {})
    if not folder.exists():
        temporary = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

        def put(part: str, files: list[Path], most: int | None) -> None:
            (temporary / part).mkdir()
            for number, file in enumerate(files):
                (temporary / part / f"{number:03}-{file.name}.txt").write_text(file.read_text(encoding="utf-8")[:most], encoding="utf-8")

        least = 400 if quick else None
        if job == "package":
            files = bundled_files(f"{package}:train")
            put("train", [f for i, f in enumerate(files) if i % 5 != 4], None)
            put("choose", files[4::5], least)
            put("test", bundled_files(f"{package}:heldout"), least)
        else:
            (train,), (test,) = (bundled_files(f"{job}:{half}") for half in ("train", "heldout"))
            lines, tested = (file.read_text(encoding="utf-8").splitlines(keepends=True) for file in (train, test))
            (temporary / "train.jsonl").write_text("".join(line for i, line in enumerate(lines) if i % 5 != 4))
            (temporary / "choose.jsonl").write_text("".join(lines[4::5][: 50 if quick else None]))
            (temporary / "test.jsonl").write_text("".join(tested[:: 20 if quick else 1]))
        if "own" in parts:
            put("own", bundled_files("valid"), least or TEXT)
        temporary.rename(folder)
    return {part: str(path) for part, path in parts.items()}


# -- one run, in a process of its own


def run_ours(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """The verb."""
    import espalier

    found = espalier.tune(
        spec.get("model", "seedling"), spec["data"]["train"], str(out), method=spec["method"], steps=spec["steps"], batch_size=spec["batch"], sequence_length=LENGTH,
        learning_rate=spec["rate"], warmup=WARMUP, clip=CLIP, eval_data=[spec["data"][part] for part in spec["measured"]],
        checkpoint_every=0, dtype=spec.get("dtype", "fp32"), micro_batch_size=spec["batch"], recompute=False, threads=spec["threads"], seed=spec["seed"],
        quiet=True, weight_decay=0.0, **spec["options"],
    )  # fmt: skip
    scores = {part: found["evaluation"][spec["data"][part]] for part in spec["measured"]}
    kept = {part: {when: {k: s[k] for k in ("loss", "accuracy") if k in s} for when, s in score.items()} for part, score in scores.items()}
    size = (out / "delta.safetensors").stat().st_size
    return {"trained": found["trained"], "bytes": size, "peak": found["peak_memory"], "speed": late_speed(out / "run"), "scores": kept}


def late_speed(run: Path) -> float:
    """Tokens a second: the median of a run's last steps."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(step["tokens_per_second"] for step in steps[-TIMED:] if "tokens_per_second" in step)


def run_peft(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """PEFT's layers in the same loop."""
    from espalier import registry
    from espalier.attach.load import load_model, load_tokenizer
    from espalier.data.batches import Order
    from espalier.data.encode import Encoder
    from espalier.data.sources import open_source
    from espalier.data.store import open_store
    from espalier.evaluate.perplexity import score
    from espalier.memory.meter import peak_memory
    from espalier.memory.training_form import training_form
    from espalier.plan.memory import default_chunk
    from espalier.train.loop import Hooks, Run, Settings, train
    from espalier.train.session import seed_everything

    seed_everything(spec["seed"], spec["threads"])
    name = spec.get("model", "seedling")
    model = load_model(name, spec.get("dtype", "fp32"), "cpu")
    encoder = Encoder(load_tokenizer(name))
    stores = {part: open_store(open_source(spec["data"][part]), encoder) for part in ("train", *spec["measured"])}
    chunk, tokens = default_chunk(model.config.vocab_size), spec["batch"] * LENGTH
    scores: dict[str, dict[str, Any]] = {part: {} for part in spec["measured"]}

    def measure(when: str) -> None:
        for part in spec["measured"]:
            scores[part][when] = {"loss": score(model, stores[part], LENGTH, tokens).loss}

    with training_form(model, chunk=chunk, recompute=False, padded=False):
        measure("before")
    wrapped = twin(model, registry.make(spec["method"], "adapter"), spec["steps"])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = registry.make("adamw", "optimizer", weight_decay=0.0).build(parameters, spec["rate"])
    settings = Settings(
        steps=spec["steps"], batch_tokens=tokens, micro_tokens=tokens, learning_rate=spec["rate"],
        warmup=round(WARMUP * spec["steps"]), clip=CLIP,
    )  # fmt: skip
    run = Run(out / "run")
    with training_form(model, chunk=chunk, recompute=False, padded=False):
        train(model, parameters, optimizer, Order(stores["train"], LENGTH, spec["seed"]), settings, their_course(wrapped, spec["steps"]), run, Hooks())
        measure("after")
    wrapped.save_pretrained(out)
    return {
        "trained": sum(p.numel() for p in parameters.values()), "bytes": (out / "adapter_model.safetensors").stat().st_size,
        "peak": peak_memory(), "speed": late_speed(run.folder), "scores": scores,
    }  # fmt: skip


def their_course(wrapped: Any, steps: int) -> Any:
    """What PEFT's method does beside the layers: AdaLoRA's penalty and allocation, which its users call themselves."""
    import torch

    from espalier.attach.course import Course

    adalora = hasattr(wrapped.base_model, "update_and_allocate")
    factors = [(n, p) for n, p in wrapped.named_parameters() if "lora_A" in n or "lora_B" in n]

    class Theirs(Course):
        def penalty(self) -> torch.Tensor | float:
            if not adalora:
                return 0.0
            grams = [p @ p.T if "lora_A" in name else p.T @ p for name, p in factors]
            norms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram))) for gram in grams]
            return wrapped.peft_config["default"].orth_reg_weight * sum(norms) / len(norms)

        def after_step(self) -> None:
            if adalora:
                wrapped.base_model.update_and_allocate(self._moment.step)

    return Theirs(wrapped.get_base_model(), steps)


def run_base(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """seedling as it is: not every method starts as it (a prefix does not)."""
    import espalier

    evaluate = espalier.eval
    common = {"sequence_length": LENGTH, "micro_batch_size": BATCH, "dtype": "fp32", "threads": spec["threads"], "quiet": True}
    losses = {part: evaluate("seedling", spec["data"][part], **common)["loss"] for part in spec["measured"]}
    return {"scores": {part: {"after": {"loss": loss}} for part, loss in losses.items()}}


# -- the whole


class Lab:
    """Runs of one job, each once, kept by everything that they depend on."""

    def __init__(self, a: argparse.Namespace) -> None:
        from espalier.checkpoint.directory import ModelDirectory, resolve_model

        self.a = a
        a.out.mkdir(parents=True, exist_ok=True)
        if a.quick:
            a.steps = 6
            (a.out / "quick.jsonl").unlink(missing_ok=True)
        with alone(a.out / "data"):
            self.data = write_data(a.out, a.job, a.package, a.quick)
        text = sorted(p for path in map(Path, self.data.values()) for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
        self.common = {
            "job": name_of(a.job, a.package), "data": hashlib.sha256(b"".join(p.read_bytes() for p in text)).hexdigest()[:16],
            "base": ModelDirectory(resolve_model("seedling")).fingerprint(), "batch": BATCH, "length": LENGTH, "warmup": WARMUP, "clip": CLIP, **versions(),
        }  # fmt: skip
        self.ledger = Ledger(a.out / ("quick.jsonl" if a.quick else "ledger.jsonl"))

    def run(
        self, info: Any, system: str, options: dict[str, Any], rate: float, seed: int, steps: int, measured: tuple[str, ...]
    ) -> dict[str, Any]:
        """One run; two processes that share a ledger do none twice."""
        spec = {"system": system, "method": info.name, "options": options, "rate": rate, "seed": seed, "steps": steps, "measured": measured}
        whole = {h.name: h.default for h in info.hyperparameters} | options
        key = json.dumps({**spec, **self.common, "options": whole, "code": digest(info.file)}, sort_keys=True)
        return self.ledger.get(key, lambda: self._process(spec))

    def base(self, measured: tuple[str, ...]) -> dict[str, float]:
        """Losses of seedling as it is."""
        spec = {"system": "base", "method": "", "rate": 0.0, "seed": 0, "measured": measured}
        key = json.dumps({**spec, **self.common}, sort_keys=True)
        found = self.ledger.get(key, lambda: self._process(spec))
        return {part: score["after"]["loss"] for part, score in found["scores"].items()}

    def _process(self, spec: dict[str, Any]) -> dict[str, Any]:
        run = {"ours": run_ours, "peft": run_peft, "base": run_base}[spec["system"]]
        found = apart(run, {**spec, "batch": BATCH, "data": self.data, "threads": self.a.threads})
        loss = {part: round(s["after"]["loss"], 4) for part, s in found.get("scores", {}).items()}
        print(spec["system"], spec["method"], f"rate {spec['rate']:.2g} seed {spec['seed']}", loss or found, file=sys.stderr, flush=True)
        return found

    def row(self, info: Any, system: str = "ours", options: dict[str, Any] | None = None, share: float = 1.0) -> dict[str, Any]:
        """The whole of one method, over a share of the steps; ``refused`` where no run of it ended well."""
        a, given = self.a, options or {}
        if not given and share == 1.0 and not a.quick and (known := self.published(info, system)) is not None:
            return known
        steps = max(round(self.a.steps * share), 3)
        default = rate_of(info)
        why = "no finite loss"

        def loss_at(rate: float) -> float | None:
            nonlocal why
            found = self.run(info, system, given, rate, SEEDS[0], steps // 3, ("choose",))
            why = found.get("failed", why)
            return found["scores"]["choose"]["after"]["loss"] if "failed" not in found else None

        best, tried = best_rate(loss_at, default, GRID[:1]) if a.quick else best_rate(loss_at, default, GRID, MORE)
        if best is None:
            return {"system": system, "method": info.name, "refused": why}
        measured = tuple(part for part in ("test", "own") if part in self.data)
        runs = [self.run(info, system, given, best, seed, steps, measured) for seed in (SEEDS[:1] if a.quick else SEEDS)]
        ended = [found for found in runs if "failed" not in found]
        if not ended:
            return {"system": system, "method": info.name, "refused": runs[0]["failed"]}
        test = [found["scores"]["test"] for found in ended]
        own = [found["scores"]["own"]["after"]["loss"] for found in ended if "own" in found["scores"]]
        # a classifier's base is its untrained head
        base = self.base(measured) if a.job != "packages" else {"test": test[0]["before"]["loss"]}
        after = [score["after"]["loss"] for score in test]
        accuracy = [score["after"]["accuracy"] for score in test if "accuracy" in score["after"]]
        return {
            "system": system, "method": info.name, "rate": best, "edge": best in (min(tried), max(tried)), "ended": len(ended),
            "base loss": base["test"], "loss": statistics.mean(after), "deviation": statistics.stdev(after) if len(after) > 1 else 0.0,
            "accuracy": statistics.mean(accuracy) if accuracy else None,
            "forgetting": statistics.mean(own) - base["own"] if own else None,
            "trained": ended[0]["trained"], "bytes": ended[0]["bytes"], "peak": statistics.median(f["peak"] for f in ended),
            "grid": {f"{rate:.3g}": loss for rate, loss in tried.items()}, "code": digest(info.file),
        }  # fmt: skip

    @property
    def conditions(self) -> dict[str, Any]:
        """What all rows of a job have in common."""
        return {**self.common, "steps": self.a.steps, "grid": list(GRID), "seeds": list(SEEDS)}

    def published(self, info: Any, system: str) -> dict[str, Any] | None:
        """The row of results/compare.json that was measured under these conditions with this code, if there is one."""
        job = read_result("compare").get(self.a.job, {})
        rows = job["rows"] if job.get("conditions") == self.conditions else []
        here = (system, info.name, digest(info.file))
        return next((row for row in rows if (row["system"], row["method"], row.get("code")) == here), None)

    def cost(self, info: Any, system: str) -> dict[str, Any] | None:
        """Tokens a second and peak bytes of a short run now; nothing where it does not end well."""
        spec = {"system": system, "method": info.name, "options": {}, "rate": rate_of(info), "seed": SEEDS[0], "steps": SPEED_STEPS, "measured": ()}
        found = self._process(spec)
        return None if "failed" in found else {"tokens a second": found["speed"], "peak": found["peak"]}


def rate_of(info: Any) -> float:
    """A method's default learning rate."""
    from espalier import registry

    return float(registry.load(info).learning_rate)


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other beats in both loss and bytes, smallest first."""
    kept: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["bytes"], row["loss"])):
        if not kept or row["loss"] < kept[-1]["loss"]:
            kept.append(row)
    return kept


def chosen(asked: str, systems: list[str]) -> list[tuple[Any, str]]:
    """(method, system) in the order in which they run: ours and then PEFT's of each."""
    from espalier import registry

    names = [name.strip() for name in asked.split(",") if name.strip()]
    if names == ["front"]:
        path = RESULTS / "compare.json"
        if not path.exists():
            raise SystemExit("--methods front takes the front of results/compare.json; run the job package first")
        rows = json.loads(path.read_text())["package"]["rows"]
        names = [row["method"] for row in front([row for row in rows if row["system"] == "ours" and "loss" in row])]
        names = [names[round(i * (len(names) - 1) / 9)] for i in range(10)] if len(names) > 10 else names
    found = [registry.find(name) for name in names] or [info for info in registry.methods() if info.kind in KINDS]
    both = [(info, system) for info in found for system in ("ours", "peft") if system in systems]
    return [(info, system) for info, system in both if system == "ours" or (has_twin(info.name) and info.name not in PROMPTS)]


def publish(lab: Lab, row: dict[str, Any]) -> None:
    """Put one row among those that were measured under the same conditions."""
    a = lab.a
    with alone(a.out / "compare.json"):
        content = read_result("compare")
        content[a.job] = with_rows(content.get(a.job, {}), lab.conditions, [row], ("system", "method"))
        write_result("compare", content)
        if a.job == "package" and (drawn := [row for row in content[a.job]["rows"] if "loss" in row]):
            plot(drawn, RESULTS / "compare.png")


def publish_cost(lab: Lab, name: str, cost: dict[str, Any] | None) -> None:
    """Put one method's tokens a second and peak among those that were measured with as many threads on the same processor."""
    a = lab.a
    with alone(a.out / "compare.json"):
        content = read_result("compare")
        job = content.setdefault(a.job, {"rows": []})
        before, here = job.get("speed", {}), {"threads": a.threads, "machine": machine()}
        found = before["runs"] if {k: before.get(k) for k in here} == here else {}
        job["speed"] = {**here, "runs": {**found, name: cost}}
        write_result("compare", content)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss against bytes, with the Pareto front of ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6.5), constrained_layout=True)
    ours, theirs = ([row for row in rows if row["system"] == system] for system in ("ours", "peft"))
    for side, marker, color, label in ((theirs, "x", "tab:orange", "PEFT"), (ours, "o", "tab:blue", "Espalier")):
        axes.errorbar(
            [row["bytes"] for row in side], [row["loss"] for row in side], [row["deviation"] for row in side],
            fmt=marker, color=color, label=label, markersize=5, elinewidth=0.8,
        )  # fmt: skip
    for row in ours:
        axes.annotate(row["method"], (row["bytes"], row["loss"]), xytext=(4, 3), textcoords="offset points", fontsize=8)
    best = front(ours)
    axes.step([row["bytes"] for row in best], [row["loss"] for row in best], where="post", color="tab:blue", linewidth=1, alpha=0.6, label="Pareto front")
    axes.set_xscale("log")
    axes.set_xlabel("bytes of the delta's tensors")
    axes.set_ylabel("loss on held-out files (nats a token)")
    axes.axhline(rows[0]["base loss"], color="grey", linewidth=0.8, linestyle="--", label="seedling")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("seedling adapted to a package that it has not seen", loc="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run what was asked for, and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="", help="names with commas, or front; default: all")
    parser.add_argument("--systems", default="ours,peft")
    parser.add_argument("--job", choices=("package", "docstrings", "packages"), default="package")
    parser.add_argument("--package", choices=("asyncio", "email", "xml"), default="asyncio")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--speed", action="store_true", help="measure tokens a second and peaks, and nothing else; on an idle machine")
    parser.add_argument("--quick", action="store_true", help="a few steps at one rate, to see that it runs; nothing is published")
    a = parser.parse_args()
    systems = a.systems.split(",") if a.job != "packages" else ["ours"]
    work = chosen(a.methods, systems)
    lab = Lab(a)
    if a.speed:
        rows = []
        for info, system in work:
            cost = lab.cost(info, system)
            rows.append([system, info.name, *(["none"] * 2 if cost is None else [f"{cost['tokens a second']:,.0f}", f"{cost['peak'] / 2**20:.0f}"])])
            if not a.quick:
                publish_cost(lab, f"{system} {info.name}", cost)
        print(table(("system", "method", "tokens a second", "peak MiB"), rows))
        return
    made, broken = rows_of(work, lambda one: lab.row(*one), lambda row: None if a.quick else publish(lab, row))
    columns = ("system", "method", "rate", "loss", "deviation", "accuracy", "forgetting", "trained", "bytes", "peak")
    say_rows(columns, made)
    for row in made:
        if "refused" in row:
            print(f"{row['system']} {row['method']} has no row: {row['refused']}")
    if broken:
        raise broken


if __name__ == "__main__":
    main()
