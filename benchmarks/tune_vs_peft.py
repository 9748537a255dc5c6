"""LoRA through Espalier, through PEFT in a plain loop, and through TRL's SFTTrainer with PEFT, side by side.

    python benchmarks/tune_vs_peft.py [--rounds 2] [--steps 5] [--threads 2] [--models llama70m,seedling]
                                      [--measures fixed,variable,losses]

The same model, documents, target tokens per step, adapter (rank 16, alpha 32, every matrix of the blocks), bf16 base
with float32 factors, AdamW. Every row is the best of ``--rounds`` fresh processes, in which the systems alternate; the
first two steps of each process are not timed. Tokens are real ones: padding is not counted. ``peak`` is the process's
VmHWM. No system recomputes activations, but "TRL, defaults", which is SFTTrainer with nothing set but the batch.

Each measure's rows are put into ``results/tune_vs_peft.json`` when it is done. The 70 M model pads variable documents into
up to 20 GB. ``losses``: 50 float32 steps of Espalier's verb (packed) and of a PEFT loop (padded) from one adapter over the same batches
of documents of variable length.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, machine, make_llama, table, write_result

LENGTH, BATCH, RANK, ALPHA, RATE, UNTIMED = 512, 8, 16, 32, 1e-4, 2
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SYSTEMS = {
    "fixed": ("espalier", "peft loop", "trl padded", "trl packed (bfd)", "trl defaults"),
    "variable": ("espalier", "peft loop", "trl padded", "trl packed (bfd)", "trl packed (wrapped)", "trl defaults"),
}


# -- documents


def make_documents(folder: Path, count: int) -> None:
    """``fixed.jsonl``: texts of LENGTH predictions each; ``variable.jsonl``: functions of 16 to LENGTH predictions."""
    from espalier.attach.load import load_tokenizer
    from espalier.bundled.corpus import bundled_files
    from espalier.data.encode import Encoder

    encoder = Encoder(load_tokenizer("seedling"))
    frame = len(encoder.prefix) + len(encoder.end)
    size = LENGTH + 1 - frame

    def pieces() -> Iterator[str]:
        for path in bundled_files("train"):
            ids = encoder.ids([path.read_text(encoding="utf-8")])[0]
            for start in range(0, len(ids) - size, size):
                yield encoder.tokenizer.decode(ids[start : start + size])

    def functions() -> Iterator[str]:
        for path in bundled_files("train"):
            source = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_source_segment(source, node)):
                    yield text

    for name, texts, least in (("fixed", pieces(), size), ("variable", functions(), 16)):
        with (folder / f"{name}.jsonl").open("w") as text_file, (folder / f"{name}.ids.jsonl").open("w") as ids_file:
            kept = 0
            for text in texts:
                ids = encoder.ids([text])[0]
                if not least <= len(ids) <= size:
                    continue
                text_file.write(json.dumps({"text": text}) + "\n")
                ids_file.write(json.dumps({"input_ids": [*encoder.prefix, *ids, *encoder.end]}) + "\n")
                if (kept := kept + 1) == count:
                    break


def read_ids(folder: Path, data: str) -> list[list[int]]:
    """The documents as token ids."""
    return [json.loads(line)["input_ids"] for line in (folder / f"{data}.ids.jsonl").read_text().splitlines()]


# -- the systems; each runs in a process of its own and returns (seconds, real tokens) per step and its losses

Steps = list[tuple[float, int, float]]


def run_espalier(model: str, folder: Path, data: str, steps: int, out: Path, threads: int) -> Steps:
    """The verb."""
    import espalier

    espalier.tune(
        model, str(folder / f"{data}.jsonl"), str(out), steps=steps, batch_size=BATCH, sequence_length=LENGTH, learning_rate=RATE,
        schedule="constant", warmup=0.0, checkpoint_every=0, dtype="bf16", recompute=False, threads=threads, quiet=True,
        rank=RANK, alpha=float(ALPHA),
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(line["seconds"], line["tokens"], line["loss"]) for line in lines]


def peft_model(model: str, dtype: Any) -> Any:
    """The model with a PEFT adapter."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def padded(rows: list[list[int]]) -> dict[str, Any]:
    """A padded batch, as a data collator of transformers makes it."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run_peft(model: str, folder: Path, data: str, steps: int, out: Path, threads: int) -> Steps:
    """A plain loop, as PEFT's documentation shows it."""
    import torch

    wrapped = peft_model(model, torch.bfloat16).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0, fused=True)
    documents = read_ids(folder, data)
    size = examples_per_step(documents)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    result = []
    for step in range(steps):
        began = time.perf_counter()
        rows = [documents[i] for i in order[step * size : (step + 1) * size]]
        loss = wrapped(**padded(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in wrapped.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result.append((time.perf_counter() - began, sum(len(row) - 1 for row in rows), loss.item()))
    return result


def examples_per_step(documents: list[list[int]]) -> int:
    """Documents that make about as many predictions as a step of Espalier's."""
    return round(BATCH * LENGTH / (sum(len(d) - 1 for d in documents) / len(documents)))


def run_trl(model: str, folder: Path, data: str, steps: int, out: Path, threads: int, kind: str) -> Steps:
    """SFTTrainer."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    documents = read_ids(folder, data)
    packed = kind.startswith("packed")
    settings: dict[str, Any] = {
        "output_dir": str(out), "max_steps": steps, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "per_device_train_batch_size": BATCH if packed else examples_per_step(documents), "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    load: dict[str, Any] = {}
    if kind != "defaults":
        settings |= {"gradient_checkpointing": False, "learning_rate": RATE, "lr_scheduler_type": "constant", "max_length": LENGTH + 1}
        load = {"dtype": torch.bfloat16}
    if packed:
        settings |= {"packing": True, "packing_strategy": "wrapped" if "wrapped" in kind else "bfd"}
    result: Steps = []

    class Timed(trl.SFTTrainer):
        """Notes the real tokens and the seconds of every step."""

        def training_step(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens = int(mask.sum() - len(mask)) if mask is not None else int((inputs["labels"] != -100).sum())
            loss = super().training_step(model, inputs, *more, **named)
            pending.append((tokens, loss.item()))
            return loss

    class Clock(transformers.TrainerCallback):
        """Times whole steps, the optimizer's part included."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tokens, loss = pending.pop()
            result.append((time.perf_counter() - self.began, tokens, loss))

    pending: list[tuple[int, float]] = []
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    trainer = Timed(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, **load),
        args=trl.SFTConfig(**settings), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"input_ids": documents}),
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, task_type="CAUSAL_LM"), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return result


def worker(system: str, model: str, folder: Path, data: str, steps: int, threads: int) -> None:
    """Run one system here, and print what it took as JSON."""
    import torch

    from espalier.memory.meter import peak_memory

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        arguments = (model, folder, data, steps, Path(temporary) / "out", threads)
        if system == "espalier":
            found = run_espalier(*arguments)
        elif system == "peft loop":
            found = run_peft(*arguments)
        else:
            found = run_trl(*arguments, kind=system.removeprefix("trl ").replace("(", "").replace(")", ""))
    timed = found[UNTIMED:]
    speed = sum(tokens for _, tokens, _ in timed) / sum(seconds for seconds, _, _ in timed)
    print(json.dumps({"tokens_per_second": speed, "peak": peak_memory(), "loss": sum(s[2] for s in timed) / len(timed)}))


def measure(system: str, model: str, folder: Path, data: str, steps: int, threads: int) -> dict[str, float]:
    """One fresh process."""
    command = [sys.executable, __file__, "--worker", system, "--models", model, "--folder", str(folder), "--data", data]
    command += ["--steps", str(steps), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- losses


def compare_losses(model: str, folder: Path, data: str, steps: int, threads: int) -> dict[str, float]:
    """Largest relative difference of the losses of Espalier's verb and PEFT's loop over the same float32 steps."""
    import peft
    import torch
    import transformers

    import espalier
    from espalier.attach.load import load_tokenizer
    from espalier.data.batches import Cursor, Order, next_step
    from espalier.data.encode import Encoder
    from espalier.data.sources import open_source
    from espalier.data.store import open_store

    torch.set_num_threads(threads)
    text = str(folder / f"{data}.jsonl")
    with tempfile.TemporaryDirectory() as temporary:
        out, start = Path(temporary) / "out", Path(temporary) / "start"
        espalier.tune(
            model, text, str(out), steps=steps, batch_size=2, sequence_length=LENGTH, learning_rate=1e-3, schedule="constant",
            warmup=0.0, checkpoint_every=0, dtype="fp32", threads=threads, quiet=True, seed=3, rank=RANK, alpha=float(ALPHA),
        )  # fmt: skip
        ours = [json.loads(line)["loss"] for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
        begun = espalier.attach(espalier.load(model, dtype="fp32"), "lora", seed=3, rank=RANK, alpha=float(ALPHA))
        espalier.save(begun, start)
        base = transformers.AutoModelForCausalLM.from_pretrained(_directory(model), dtype=torch.float32)
        wrapped = peft.PeftModel.from_pretrained(base, start, is_trainable=True).train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    store = open_store(open_source(text), Encoder(load_tokenizer(model)))
    order, cursor, theirs = Order(store, LENGTH, 3), Cursor(), []
    for _ in range(steps):
        windows = next_step(order, cursor, 2 * LENGTH)
        loss = wrapped(**padded([store.read(w.start, w.stop + 1).tolist() for w in windows])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return {"steps": steps, "first": ours[0], "last": ours[-1], "peft_last": theirs[-1], "largest_relative_difference": worst}


def _directory(model: str) -> str:
    from espalier.checkpoint.directory import resolve_model

    return str(resolve_model(model))


# -- the whole


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="steps of a process, two of which are not timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--models", default="llama70m,seedling")
    parser.add_argument("--measures", default="fixed,variable,losses")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a.worker, a.models, a.folder, a.data, a.steps, a.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_documents(folder, 1200)
        models = {"llama70m": str(folder / "llama70m"), "seedling": _directory("seedling")}
        for name in a.models.split(","):
            if name == "llama70m":
                make_llama(folder / "llama70m")
            for measured in a.measures.split(","):
                if measured == "losses":
                    rows = [{"model": name, **compare_losses(models[name], folder, "variable", 50, a.threads)}]
                else:
                    rows = compare_speed(name, models[name], folder, measured, a)
                print(table(list(rows[0]), [list(row.values()) for row in rows]), flush=True)
                record(f"{name} {measured}", {"machine": machine(), "threads": a.threads, "rounds": a.rounds, "steps": a.steps, "rows": rows})


def compare_speed(name: str, model: str, folder: Path, data: str, a: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per system, after rounds in which they alternate."""
    found: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS[data]}
    for _ in range(a.rounds):
        for system, results in found.items():
            results.append(measure(system, model, folder, data, a.steps, a.threads))
            print(name, data, system, results[-1], file=sys.stderr, flush=True)
    best = {s: (max(f["tokens_per_second"] for f in fs), min(f["peak"] for f in fs)) for s, fs in found.items()}
    peft_speed, peft_peak = best["peft loop"]
    return [
        {
            "model": name, "documents": data, "system": system, "real tokens/s": round(speed), "of PEFT's": round(speed / peft_speed, 2),
            "peak MiB": round(peak / 2**20), "of PEFT's peak": round(peak / peft_peak, 2), "mean loss": round(found[system][0]["loss"], 3),
        }
        for system, (speed, peak) in best.items()
    ]  # fmt: skip


def record(measured: str, content: dict[str, Any]) -> None:
    """Put one measure into the results beside the others."""
    path = RESULTS / "tune_vs_peft.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    write_result("tune_vs_peft", {**before, measured: content})


if __name__ == "__main__":
    main()
