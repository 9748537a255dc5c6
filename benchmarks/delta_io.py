"""``apply``, ``diff`` and ``compress`` against PEFT's merge and against a plain copy of the same bytes.

    python benchmarks/delta_io.py [--sizes 374M,1.1B] [--rounds 2] [--threads 2]

Random Llama-shaped checkpoints in bf16, a rank-16 LoRA on every matrix of the blocks. Every job is a fresh process, and
they alternate; the best of the rounds is kept. ``seconds`` is the whole process; ``past start`` leaves out what it takes
before the work begins (the interpreter and imports, measured inside). ``anonymous`` is the peak of memory that the
process itself allocated (RssAnon, sampled every 5 ms), ``total`` its VmHWM, which also counts mapped pages of files. The
floor is a copy of the base's bytes that is fsynced, from the page cache as everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import machine, make_llama, table, write_result

SIZES = {
    "374M": {"hidden": 1024, "layers": 24, "intermediate": 2816, "heads": 16, "vocabulary": 32000},
    "1.1B": {"hidden": 2048, "layers": 22, "intermediate": 5632, "heads": 32, "vocabulary": 32000},
}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def watch() -> dict[str, int]:
    """The largest anonymous memory of this process, sampled from a thread."""
    peak = {"anonymous": 0}

    def look() -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak["anonymous"] = max(peak["anonymous"], int(line.split()[1]) * 1024)
            time.sleep(0.005)

    threading.Thread(target=look, daemon=True).start()
    return peak


def job(name: str, folder: Path, out: Path, threads: int) -> float:
    """Do one job in this process; returns when its work began."""
    base, delta = folder / "base", folder / "lora"
    if name == "copy":
        began = time.perf_counter()
        shutil.copytree(base, out)
        for file in out.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        return began
    import torch

    torch.set_num_threads(threads)
    if name == "peft merge":
        import peft
        import transformers

        began = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        peft.PeftModel.from_pretrained(model, delta).merge_and_unload().save_pretrained(out)
        return began
    import espalier
    import espalier.exchange.difference
    import espalier.exchange.materialize

    began = time.perf_counter()
    if name.startswith("apply"):
        if name == "apply, first time":  # nothing is known of the base
            os.environ["ESPALIER_CACHE"] = str(out.with_name("cache"))
        espalier.apply(str(base), [str(delta)], str(out), quiet=True)
    elif name == "diff, all changed":
        espalier.diff(str(base), str(folder / "merged"), str(out), quiet=True)
    elif name == "diff, 1 % changed":
        espalier.diff(str(base), str(folder / "nudged"), str(out), quiet=True)
    elif name == "apply the diff":
        espalier.apply(str(base), [str(folder / "nudged-delta")], str(out), quiet=True)
    elif name == "compress, compeft 5 %":
        espalier.compress(str(folder / "lora"), str(out), method="compeft", density=0.05, quiet=True)
    elif name == "compress the dense diff, compeft 5 %":
        espalier.compress(str(folder / "dense-delta"), str(out), method="compeft", density=0.05, quiet=True)
    return began


def worker(name: str, folder: Path, out: Path, threads: int) -> None:
    """Run one job and print what it took."""
    peak = watch()
    began = job(name, folder, out, threads)
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()
    total = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({"past_start": seconds, "anonymous": peak["anonymous"], "total": total}))


def measure(name: str, folder: Path, threads: int) -> dict[str, float]:
    """One job in a fresh process."""
    out = folder / "out"
    for leftover in (out, folder / "cache"):
        shutil.rmtree(leftover, ignore_errors=True)
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"seconds": seconds, "written": written, **json.loads(done.stdout.splitlines()[-1])}


def prepare(folder: Path, size: str) -> None:
    """The base, a LoRA on it, the model that it makes, and one of which a hundredth of the entries moved."""
    import torch

    import espalier
    from espalier.attach.load import load_model
    from espalier.checkpoint.directory import ModelDirectory
    from espalier.checkpoint.safetensors_file import SafetensorsFile, write_safetensors

    make_llama(folder / "base", **SIZES[size])
    model = espalier.attach(load_model(folder / "base"), "lora", rank=16, alpha=32.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    espalier.save(model, folder / "lora", base=folder / "base")
    del model
    espalier.apply(str(folder / "base"), [str(folder / "lora")], str(folder / "merged"), quiet=True)
    shutil.copytree(folder / "base", folder / "nudged")
    directory = ModelDirectory(folder / "base")
    for file in directory.files():
        tensors = {}
        with SafetensorsFile(folder / "base" / file) as opened:
            for name in opened.tensors:
                tensors[name] = opened.read(name)
                tensors[name].view(-1)[::100] += 0.125
        write_safetensors(folder / "nudged" / file, tensors)
    espalier.diff(str(folder / "base"), str(folder / "nudged"), str(folder / "nudged-delta"), quiet=True)
    espalier.diff(str(folder / "base"), str(folder / "merged"), str(folder / "dense-delta"), to="dense", quiet=True)


JOBS = (
    "copy", "peft merge", "apply", "apply, first time", "diff, all changed", "diff, 1 % changed", "apply the diff",
    "compress, compeft 5 %", "compress the dense diff, compeft 5 %",
)  # fmt: skip


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="374M,1.1B")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a.worker, a.folder, a.folder / "out", a.threads)
        return
    rows: list[dict[str, Any]] = []
    for size in a.sizes.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            prepare(folder, size)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in JOBS}
            for _ in range(a.rounds):
                for name, results in found.items():
                    results.append(measure(name, folder, a.threads))
                    print(size, name, results[-1], file=sys.stderr, flush=True)
        best = {name: min(results, key=lambda r: r["seconds"]) for name, results in found.items()}
        for name, r in best.items():
            rows.append({
                "model": size, "job": name, "seconds": round(r["seconds"], 2), "of PEFT's": round(r["seconds"] / best["peft merge"]["seconds"], 2),
                "past start": round(r["past_start"], 2), "of the copy": round(r["past_start"] / best["copy"]["past_start"], 2),
                "written MiB": round(r["written"] / 2**20), "GB/s": round(r["written"] / r["past_start"] / 1e9, 2),
                "anonymous MiB": round(r["anonymous"] / 2**20), "total MiB": round(r["total"] / 2**20),
            })  # fmt: skip
        print(table(list(rows[0]), [list(row.values()) for row in rows if row["model"] == size]), flush=True)
    write_result("delta_io", {"machine": machine(), "threads": a.threads, "rounds": a.rounds, "rows": rows})


if __name__ == "__main__":
    main()
