"""Which optimizer trains best for the memory that it takes? Small Llamas trained from nothing, by held-out loss and bytes of state.

    python benchmarks/optim.py [--shape 3m|9m] [--methods adamw,galore] [--threads 2] [--out runs/optim] [--dtype bf16] [--quick]

The model: a Llama over bytes (259 tokens), so that nearly all of it is in the matrices of its blocks, which are what the low-dimensional optimizers split.
``3m``: hidden 256, 4 blocks, 3.1 M parameters in all, 3.0 M of them in the blocks; ``9m``: hidden 384, 5 blocks, 9.0 M in all, 8.8 M in the blocks.
The text: :data:`TOKENS` bytes of the standard library (files of ``stdlib:train`` in a fixed random order), 16 sequences of 256 a step, once. What is
measured on is the first 6,000 characters of each file of ``stdlib:valid``: every second file chooses the learning rate, the others are measured on, once.

Every optimizer has the same effort: the learning rates of :data:`GRID` times the middle that :data:`SETTINGS` gives it, on one seed and a third of
the steps, and one rate more, at most :data:`MORE` times, while the best is at the edge; then :data:`SEEDS` at the best. Ranks are a quarter of the
hidden size, densities a quarter, as in the papers; a subspace is kept for :data:`EVERY` steps (in the papers for 200 of ten thousand and more). Under all but Lion
and AdaBelief is the same Adam (beta1 0.9, beta2 0.95, epsilon 1e-8). No decay; cosine to a tenth, a tenth of the steps warms up; clipping at 1. ``9m`` is for the four that
are best on ``3m``, at the rates that were best there.

Bytes of state are those of the tensors that the optimizer holds after a few steps, beside what ``state_bytes`` predicts of it.

What a step costs beside AdamW's is measured by ``optimizer_step.py``, and shown from its results.

Every run is a process of its own, kept in the ledger under ``--out`` by what its result depends on (of the code: the optimizer's own file), so that a benchmark that was broken
off goes on, and parts (``--methods a,b``) add up, also several at once over one ``--out``. Rows go into results/optim.json, and the plot into results/optim.png, as they
are made. Ten optimizers on 3m take about
3 hours on 2 cores, as two parts of one thread each (a step takes a core 1 s in bf16, a run 9 minutes, an optimizer 4.3 runs); four on 9m, which have half as much
text each, 1 hour.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    with_rows,
    write_result,
)
from step_cost import default_dtype

BATCH, LENGTH, WARMUP, FLOOR, CLIP = 16, 256, 0.1, 0.1, 1.0
TOKENS = 2_000_000
"""Tokens of a run on 3m."""
SHAPES: dict[str, dict[str, int]] = {
    "3m": {"hidden": 256, "layers": 4, "intermediate": 640, "heads": 4},
    "9m": {"hidden": 384, "layers": 5, "intermediate": 1024, "heads": 6},
}
SHARE = {"3m": 1.0, "9m": 0.5}
"""Of :data:`TOKENS` that a run has."""
GRID = (1 / 3, 1, 3)
MORE = 2
SEEDS = (0, 1, 2)
EVERY = 50
STATE_STEPS = 6
"""Steps after which the state is looked at: as long as the longest history takes to fill."""
TEXT = 6000
"""Characters of a held-out file."""


@dataclass(frozen=True)
class Setting:
    """An optimizer with what it is used with.

    Args:
        rate: the middle of the grid of learning rates.
        options: beside ``rank``, ``every`` and those of Adam, which are set for all that have them.
        method: what is trained, if not the weights themselves.
    """

    optimizer: str
    rate: float
    state: str = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = "full"


SETTINGS = {
    "adamw": Setting("adamw", 3e-3),
    "adamw-8bit": Setting("adamw", 3e-3, "8bit"),
    "galore": Setting("galore", 1e-2),
    "fira": Setting("fira", 1e-2),
    "frugal": Setting("frugal", 2e-3, options={"density": 0.25}),
    "gradnorm-lorp": Setting("gradnorm-lorp", 1e-2),
    "natural-galore": Setting("natural-galore", 1e-2),
    "lion": Setting("lion", 5e-4),
    "adabelief": Setting("adabelief", 3e-3),
    "sltrain": Setting("adamw", 3e-3, method="sltrain"),
}
ADAM = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
OWN_ADAM = ("lion", "adabelief")
"""Optimizers whose means are their own."""

PAPERS: tuple[tuple[str, str, str, str], ...] = (
    ("arXiv:2110.02861", "adamw-8bit", "as", "adamw"),
    ("arXiv:2403.03507", "galore", "as", "adamw"),
    ("arXiv:2410.01623", "fira", "not above", "adamw"),
    ("arXiv:2410.01623", "fira", "below", "galore"),
    ("arXiv:2411.07837", "frugal", "below", "galore"),
    ("arXiv:2411.07837", "frugal", "not below", "adamw"),
    ("arXiv:2410.16029", "natural-galore", "below", "galore"),
    ("arXiv:2302.06675", "lion", "as", "adamw"),
    ("arXiv:2010.07468", "adabelief", "as", "adamw"),
    ("arXiv:2406.02214", "sltrain", "as", "adamw"),
)
"""Paper, whose loss it says to be how in relation to whose; ``as``: within 2 %. GradNormLoRP's figures are of fine-tuning: it has no line."""
CLOSE = 0.02


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the papers say of pairs that are both there, and what shows here; a difference counts from the larger deviation over seeds on."""
    found = {row["setting"]: row for row in rows if "loss" in row}
    judged = []
    for paper, mine, how, other in PAPERS:
        if mine in found and other in found:
            a, b = found[mine], found[other]
            difference, spread = a["loss"] - b["loss"], max(a["deviation"], b["deviation"])
            shows = {
                "as": abs(difference) <= max(CLOSE * b["loss"], spread), "below": difference < -spread,
                "not above": difference <= spread, "not below": difference >= -spread,
            }[how]  # fmt: skip
            judged.append({"paper": paper, "of": mine, "says": how, "than": other, "difference": difference, "deviation": spread, "shows": shows})
    return judged


# -- data and models


def write_data(folder: Path, quick: bool) -> None:
    """Text to learn from, to choose the rate by and to measure on, a tokenizer of bytes, and a config of every shape."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from espalier.bundled.corpus import bundled_files

    if folder.exists():
        return
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)

    def put(part: str, texts: list[str]) -> None:
        (temporary / part).mkdir(parents=True)
        for number, text in enumerate(texts):
            (temporary / part / f"{number:04}.txt").write_text(text, encoding="utf-8")

    files = bundled_files("train")
    random.Random(0).shuffle(files)
    texts, size = [], 0
    for file in files:
        if size >= TOKENS:
            break
        texts.append(file.read_text(encoding="utf-8"))
        size += len(texts[-1].encode())
    held_out = [file.read_text(encoding="utf-8")[: 300 if quick else TEXT] for file in bundled_files("valid")]
    put("train", texts), put("choose", held_out[::2]), put("test", held_out[1::2])
    begin, end, pad = "<|begin|>", "<|end|>", "<|pad|>"
    vocabulary = {token: number for number, token in enumerate([begin, end, pad, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad, clean_up_tokenization_spaces=False, model_max_length=1 << 30
    )
    fast.save_pretrained(temporary / "tokenizer")
    for shape in SHAPES:
        (temporary / f"{shape}.json").write_text(config_of(shape).to_json_string())
    temporary.rename(folder)


def config_of(shape: str) -> Any:
    """The config of a shape."""
    import transformers

    s = SHAPES[shape]
    return transformers.LlamaConfig(
        vocab_size=259, hidden_size=s["hidden"], intermediate_size=s["intermediate"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["heads"], max_position_embeddings=LENGTH, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def options_of(name: str, shape: str, every: int) -> dict[str, Any]:
    """The options of a setting; ``every``: steps between choices of a subspace."""
    from espalier import registry

    setting = SETTINGS[name]
    own = {h.name for h in registry.find(setting.optimizer, "optimizer").hyperparameters}
    more: dict[str, Any] = {} if setting.optimizer in OWN_ADAM else dict(ADAM)
    more |= {"rank": SHAPES[shape]["hidden"] // 4, "every": every}
    if setting.method != "full":
        own |= {h.name for h in registry.find(setting.method, registry.ATTACHED).hyperparameters}
    return {key: value for key, value in more.items() if key in own} | dict(setting.options)


def missing(name: str) -> str | None:
    """Why a setting cannot be run here, if it cannot."""
    import espalier
    from espalier import registry

    setting = SETTINGS[name]
    known = {info.name for info in registry.methods()}
    if lacking := next((method for method in (setting.optimizer, setting.method) if method not in known), None):
        return f"no method is called {lacking}"
    if setting.method != "full" and "method" not in inspect.signature(espalier.pretrain).parameters:
        return "pretrain has no --method"
    return None


# -- one run, in a process of its own


def train(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """The verb, from nothing; losses by part."""
    import espalier

    data, more = Path(spec["data"]), {"method": spec["method"]} if spec["method"] != "full" else {}
    found = espalier.pretrain(
        str(data / "train"), str(out), architecture=str(data / f"{spec['shape']}.json"), tokenizer=str(data / "tokenizer"), steps=spec["steps"],
        batch_size=BATCH, sequence_length=LENGTH, learning_rate=spec["rate"], schedule="cosine", warmup=WARMUP, floor=FLOOR, clip=CLIP,
        optimizer=spec["optimizer"], state=spec["state"], eval_data=[str(data / spec["measured"])], checkpoint_every=0, micro_batch_size=BATCH,
        recompute=False, dtype=spec["dtype"], threads=spec["threads"], seed=spec["seed"], quiet=True, **spec["options"], **more,
    )  # fmt: skip
    (score,) = found["evaluation"].values()
    return {"loss": score["after"]["loss"], "trained": found["trained"], "peak": found["peak_memory"], "seconds": found["seconds"]}


def made(spec: dict[str, Any], steps: int) -> tuple[Any, Any, Any, Any]:
    """(model, its trained parameters by name, optimizer, rule) of a setting, as ``pretrain`` makes them."""
    import torch
    import transformers

    from espalier import registry
    from espalier.anatomy.parameters import parameters
    from espalier.attach.attachment import attach, release_base, targets_of, trainable_parameters
    from espalier.attach.course import Course
    from espalier.memory.joined_optimizer import build

    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec["dtype"]]
    model = transformers.AutoModelForCausalLM.from_config(config_of(spec["shape"]), dtype=torch.float32).to(dtype).train()
    owns = {h.name for h in registry.find(spec["optimizer"], "optimizer").hyperparameters}
    method = registry.make(spec["method"], registry.ATTACHED, **{k: v for k, v in spec["options"].items() if k not in owns})
    own = {target.name for target in targets_of(model, method, method.targets)}
    attach(model, method, full=[target.name for target in parameters(model) if target.name not in own])
    release_base(model)
    rule = registry.make(spec["optimizer"], "optimizer", **{k: v for k, v in spec["options"].items() if k in owns})
    rule.state = spec["state"]
    rule.check()
    trained = trainable_parameters(model)
    return model, trained, build(rule.build, trained, spec["rate"], Course(model, steps).optimizer_options()), rule


def tensors_in(value: Any) -> list[Any]:
    """The tensors of an optimizer's state."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inner for tensor in tensors_in(item)]


def look_at_state(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """Bytes of state after a few steps on random gradients, and as predicted."""
    import torch

    _, parameters, optimizer, rule = made(spec, STATE_STEPS)
    for _ in range(STATE_STEPS):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    held = tensors_in(optimizer.state_dict()["state"])
    predicted = rule.state_bytes({name: tuple(p.shape) for name, p in parameters.items()})
    return {"measured": sum(t.numel() * t.element_size() for t in held), "predicted": predicted}


# -- losses


class Lab:
    """Runs, each once, kept by everything that they depend on."""

    def __init__(self, a: argparse.Namespace) -> None:
        from espalier import registry

        self.a, self.registry = a, registry
        a.out.mkdir(parents=True, exist_ok=True)
        if a.quick:
            (a.out / "quick.jsonl").unlink(missing_ok=True)
        code = digest_of(f"{inspect.getsource(write_data)}\n{(TOKENS, TEXT, SHAPES)}")  # what other code has written is not taken for it
        self.data = a.out.resolve() / f"{'quick' if a.quick else 'data'}-{code}"
        with alone(self.data):
            write_data(self.data, a.quick)
        files = sorted(file for file in self.data.rglob("*") if file.is_file())
        self.common = {
            "data": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16], "batch": BATCH, "length": LENGTH,
            "warmup": WARMUP, "floor": FLOOR, "clip": CLIP, "dtype": a.dtype, "torch": machine()["torch"],
        }  # fmt: skip
        self.ledger = Ledger(a.out / ("quick.jsonl" if a.quick else "ledger.jsonl"))

    def steps(self) -> int:
        """Steps of a whole run."""
        return 6 if self.a.quick else round(TOKENS * SHARE[self.a.shape]) // (BATCH * LENGTH)

    def run(self, name: str, **more: Any) -> dict[str, Any]:
        """A run of a setting with what else it depends on."""
        setting = SETTINGS[name]
        # no history is cut short by a new subspace where the state is looked at, though matrices take turns
        every = EVERY if more["what"] == "train" else 1000 * STATE_STEPS
        spec = {
            "optimizer": setting.optimizer, "state": setting.state, "method": setting.method, "options": options_of(name, self.a.shape, every),
            "shape": self.a.shape, **more,
        }  # fmt: skip
        code = [digest(self.registry.find(method).file) for method in dict.fromkeys((setting.optimizer, setting.method))]
        key = json.dumps({**spec, **self.common, "shape": SHAPES[self.a.shape], "code": code}, sort_keys=True)
        spec |= {"data": str(self.data), "dtype": self.a.dtype, "threads": self.a.threads}
        return self.ledger.get(key, lambda: self._process(name, spec))

    def _process(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        found = apart(look_at_state if spec["what"] == "state" else train, spec)
        print(name, {k: spec[k] for k in ("what", "rate", "seed", "steps") if k in spec}, found, f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return found

    def choose(self, name: str) -> tuple[float | None, dict[float, float | None]]:
        """The best learning rate and the losses of all that were tried, on one seed and a third of the steps."""

        def loss_at(rate: float) -> float | None:
            found = self.run(name, what="train", rate=rate, seed=SEEDS[0], steps=max(3, self.steps() // 3), measured="choose")
            return found.get("loss")

        middle = SETTINGS[name].rate
        return best_rate(loss_at, middle, GRID[1:2]) if self.a.quick else best_rate(loss_at, middle, GRID, MORE)

    def row(self, name: str) -> dict[str, Any]:
        """The whole of one setting; ``refused`` where no run of it ended well."""
        if self.a.shape == "3m":
            rate, tried = self.choose(name)
        else:
            rows = {row["setting"]: row for row in read_result("optim").get("3m", {}).get("rows", [])}
            rate, tried = rows.get(name, {}).get("rate", SETTINGS[name].rate), {}
        if rate is None:
            return {"setting": name, "refused": "no rate gave a finite loss"}
        state = self.run(name, what="state", rate=rate)
        runs = [self.run(name, what="train", rate=rate, seed=seed, steps=self.steps(), measured="test") for seed in (SEEDS[:1] if self.a.quick else SEEDS)]
        ended = [found for found in runs if math.isfinite(found.get("loss", math.nan))]
        if not ended:
            return {"setting": name, "refused": runs[0].get("failed", "no finite loss")}
        losses = [found["loss"] for found in ended]
        return {
            "setting": name, "rate": rate, "edge": bool(tried) and rate in (min(tried), max(tried)), "ended": len(ended), "loss": statistics.mean(losses),
            "deviation": statistics.stdev(losses) if len(losses) > 1 else 0.0, "trained": ended[0]["trained"], "state bytes": state["measured"],
            "predicted": state["predicted"], "peak": statistics.median(found["peak"] for found in ended), "grid": {f"{r:.3g}": loss for r, loss in tried.items()},
        }  # fmt: skip


# -- the whole


def publish(a: argparse.Namespace, conditions: dict[str, Any], row: dict[str, Any]) -> None:
    """Put a row of a shape among those that were measured under the same conditions."""
    with alone(a.out / "optim.json"):
        whole = read_result("optim")
        whole[a.shape] = with_rows(whole.get(a.shape, {}), conditions, [row], ("setting",))
        whole["papers"] = judge(whole.get("3m", {}).get("rows", []))
        write_result("optim", whole)
        plot(whole, RESULTS / "optim.png")


def plot(whole: dict[str, Any], path: Path) -> None:
    """Loss against bytes of state, by shape, and against the time of a step by ``optimizer_step.py``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {part: [row for row in whole[part]["rows"] if "loss" in row] for part in SHAPES if part in whole}
    step = read_result("optimizer_step")
    times = {name.replace(" fp32", "").replace(" ", "-"): float(over.rstrip("%")) for name, *_, over, _ in step.get("rows", [])}
    panels = [(f"{shape}: loss and optimizer state", "MiB of optimizer state", [(r, r["state bytes"] / 2**20) for r in rows]) for shape, rows in drawn.items() if rows]
    timed = [(row, times[row["setting"]]) for row in drawn.get("3m", []) if row["setting"] in times]
    if timed:
        panels.append(("3m: loss, and time of a step on 17 M", f"% that a step of {step['tokens']:,} tokens takes longer than AdamW's", timed))
    if not panels:
        return
    figure, all_axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5.5), constrained_layout=True, squeeze=False)
    for axes, (title, label, points) in zip(all_axes[0], panels, strict=True):
        axes.errorbar([x for _, x in points], [row["loss"] for row, _ in points], [row["deviation"] for row, _ in points], fmt="o", color="tab:blue", elinewidth=0.8)
        for row, x in points:
            axes.annotate(row["setting"], (x, row["loss"]), xytext=(4, 3), textcoords="offset points", fontsize=8)
        axes.set_title(title, loc="left")
        axes.set_xlabel(label)
        axes.set_ylabel("loss on held-out files (nats a byte)")
        axes.grid(alpha=0.3)
        axes.margins(x=0.15)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def chosen(a: argparse.Namespace) -> list[str]:
    """The settings that were asked for and can be run; says what is left out."""
    names = [name.strip() for name in a.methods.split(",") if name.strip()]
    if unknown := next((name for name in names if name not in SETTINGS), None):
        raise SystemExit(f"--methods {unknown}: there are {', '.join(SETTINGS)}")
    if not names and a.shape == "9m":
        rows = sorted((row for row in read_result("optim").get("3m", {}).get("rows", []) if "loss" in row), key=lambda row: row["loss"])
        if not rows:
            raise SystemExit("--shape 9m takes the best four of results/optim.json; run --shape 3m first, or give --methods")
        names = [row["setting"] for row in rows[:4]]
    kept = []
    for name in names or SETTINGS:
        if why := missing(name):
            print(f"{name} is left out: {why}", file=sys.stderr)
        else:
            kept.append(name)
    return kept


def main() -> None:
    """Run what was asked for, and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="", help=f"names with commas of {', '.join(SETTINGS)}; default: all, on 9m the best four")
    parser.add_argument("--shape", choices=list(SHAPES), default="3m")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=default_dtype())
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("runs/optim"))
    parser.add_argument("--quick", action="store_true", help="a few steps at one rate, to see that it runs; nothing is published")
    a = parser.parse_args()
    names = chosen(a)
    lab = Lab(a)

    def keep(row: dict[str, Any]) -> None:
        if not a.quick:
            conditions = {**lab.common, "steps": lab.steps(), "grid": list(GRID), "seeds": list(SEEDS), "every": EVERY, **SHAPES[a.shape]}
            publish(a, conditions, row)

    rows, broken = rows_of(names, lab.row, keep)
    columns = ("setting", "rate", "edge", "loss", "deviation", "state bytes", "predicted", "trained", "peak")
    say_rows(columns, rows)
    if judged := judge(rows):
        print("\n" + table(list(judged[0]), [[f"{v:+.4f}" if isinstance(v, float) else v for v in line.values()] for line in judged]))
    for row in rows:
        if "refused" in row:
            print(f"{row['setting']} has no row: {row['refused']}")
    if broken:
        raise broken


if __name__ == "__main__":
    main()
